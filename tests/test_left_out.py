"""A part that fails is told, recorded and left out; what is no part's fault stops the run."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from crosstrace.core import left_out
from crosstrace.core.errors import UserError
from crosstrace.core.files import write_json
from crosstrace.core.left_out import Part, attempt, hindrance, optional
from crosstrace.core.progress import Progress
from crosstrace.core.run_folder import MissingStep, Run
from crosstrace.experiment import config
from crosstrace.experiment.studied import StudiedModel
from crosstrace.results.results import Results

LENS = Part("mechanism", "mixed", ("mechanism/mixed/lens.json",), "lens")


@pytest.fixture
def run(tmp_path: Path):
    with Run.create(tmp_path / "run", "name: x\n") as opened:
        yield opened


def raises(error: BaseException):
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (UserError("it has no norm"), "it has no norm"),
        (ValueError("two\n  lines"), "ValueError: two lines"),
        (KeyError("at"), "KeyError: 'at'"),
        (AssertionError(), "AssertionError"),
        (RuntimeError("shapes " + "x " * 1000), None),
        (OSError("could not get source code"), "OSError: could not get source code"),
        (NotImplementedError("no kernel"), "NotImplementedError: no kernel"),
    ],
)
def test_what_fails_is_told_and_recorded_in_one_line(run: Run, parts_may_fail, error: Exception, reason) -> None:
    told: list[str] = []
    assert not attempt(run, LENS, raises(error), told.append)
    (row,) = left_out.rows(run)
    assert (row["stage"], row["part"], row["model"]) == ("mechanism", "lens", "mixed")
    assert row["error"] == type(error).__name__
    assert reason is None or row["reason"] == reason
    assert "\n" not in row["reason"] and len(row["reason"]) < 450
    assert told == [f"mixed: mechanism, lens is left out: {row['reason']}"]
    assert left_out.steps(run) == ["mechanism/mixed/lens.json"]
    (file,) = (run.folder / "manifest" / "left_out").iterdir()
    assert "in work" in json.loads(file.read_text())["traceback"], "where it failed can be looked up"
    assert str(Results(left_out=[row])) == f"left out: mixed: mechanism, lens: {row['reason']}"


def test_a_part_that_comes_through_is_no_longer_left_out(run: Run, parts_may_fail) -> None:
    assert not attempt(run, LENS, raises(ValueError("no")), print)
    assert attempt(run, LENS, lambda: None, print)
    assert left_out.rows(run) == [] and left_out.steps(run) == []


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(), SystemExit(3), MemoryError(), torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        OSError(errno.ENOSPC, "No space left on device"), PermissionError(errno.EACCES, "denied"),
        SafetensorError("I/O error"), BrokenPipeError(errno.EPIPE, "Broken pipe"),
        RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer"),
    ],
)  # fmt: skip
def test_what_is_no_fault_of_a_part_stops_the_run(run: Run, parts_may_fail, error: BaseException) -> None:
    with pytest.raises(type(error)):
        attempt(run, LENS, raises(error), print)
    assert left_out.rows(run) == []


def test_what_needs_a_step_that_is_left_out_is_left_out_too(run: Run, parts_may_fail) -> None:
    needs = Part("mechanism", "mixed", ("mechanism/mixed/circuit.json",), "circuit")
    with pytest.raises(MissingStep, match="shared/mixed"):  # nobody has tried to make it: a mistake in the order
        attempt(run, needs, lambda: run.inputs("shared/mixed"), print)
    attempt(run, Part("analyze", "mixed", ("shared/mixed",)), raises(ValueError("no")), print)
    assert not attempt(run, needs, lambda: run.inputs("shared/mixed"), print)
    reasons = {row["part"]: row["reason"] for row in left_out.rows(run)}
    assert reasons["circuit"] == "it needs shared/mixed, which is left out"


def test_a_stage_that_a_run_can_do_without(run: Run, parts_may_fail) -> None:
    @optional("intervene", "interventions/{}.json")
    def intervene(studied: StudiedModel) -> None:
        run.stage(f"interventions/{studied.name}.json", {}, lambda path: write_json(path, [][5]))

    intervene(StudiedModel(run, config.Experiment(), "mixed", Progress(quiet=True)))
    assert left_out.steps(run) == ["interventions/mixed.json"]
    assert not list(run.folder.rglob(".partial-*")) and not run.path("interventions/mixed.json").exists()


def test_tests_do_not_pass_over_a_fault() -> None:
    with pytest.raises(ZeroDivisionError):
        hindrance(lambda: 1 / 0)
