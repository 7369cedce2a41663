"""The run folder: killed at every change of the file system, tampered with, shared, replaced."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from crosstrace.core import provenance, run_folder
from crosstrace.core.errors import UserError
from crosstrace.core.files import read_json, remove_folder, replacing, sha256_file, sha256_tree, write_json, write_text
from crosstrace.core.run_folder import Run

CONFIG = "seed: 0\ntraining:\n  lr: 0.001\n  phases: [1, 2]\n"


def experiment(run: Run, lr: float = 0.1, log: Callable[[str], None] = lambda line: None) -> None:
    """A run in small: a file, a folder of its own checkpoints, a folder that depends on both, the results."""

    def data(partial: Path) -> None:
        log("data")
        write_text(partial, "facts\n")

    def model(partial: Path) -> None:
        done = sorted(partial.glob("checkpoint-*"))
        log(f"model from {len(done)}")
        for number in range(len(done), 3):
            write_text(partial / f"checkpoint-{number}", f"{lr} {number}")
        write_text(partial / "weights" / "model", f"trained with {lr}")
        for checkpoint in partial.glob("checkpoint-*"):
            checkpoint.unlink()

    def traces(partial: Path) -> None:
        log("traces")
        partial.mkdir()
        for task in ("bio", "qa"):
            (partial / task).write_text(task + (run.path("models/mixed") / "weights" / "model").read_text())

    run.stage("data.txt", {"people": 3}, data)
    run.stage("models/mixed", {"lr": lr, **run.inputs("data.txt")}, model, keep_partial=True)
    run.stage("traces/mixed", run.inputs("models/mixed", "data.txt"), traces)
    run.stage("results.json", run.inputs("traces/mixed"), lambda partial: write_json(partial, {"lr": lr}))


def outputs(folder: Path) -> dict[str, bytes]:
    """Every file but the manifest, whose records hold times."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith("manifest/")}


def in_child(work: Callable[[], None], kill_before: int) -> int:
    """Run `work` in a forked process which kills itself -9 before its n-th change of the file system.

    Returns the wait status as `os.waitstatus_to_exitcode` gives it: -9 if it was killed, 0 if it got through.
    """
    child = os.fork()
    if not child:
        changes = 0

        def hook(event: str, arguments: tuple) -> None:
            nonlocal changes
            writes = event == "open" and isinstance(arguments[1], str) and arguments[1][0] in "wax"
            if writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "fcntl.flock"):
                changes += 1
                if changes == kill_before:
                    os.kill(os.getpid(), signal.SIGKILL)

        code = 1
        try:
            sys.addaudithook(hook)
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def create_and_work(folder: Path, mode: run_folder.Mode, lr: float = 0.1, config: str = CONFIG) -> Callable[[], None]:
    def work() -> None:
        with Run.create(folder, config, mode) as run:
            experiment(run, lr)

    return work


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process loses nothing that it wrote; fsync is for power cuts, and slow."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def clean(tmp_path: Path) -> dict[str, bytes]:
    """The outputs of an uninterrupted run."""
    create_and_work(tmp_path / "clean", "new")()
    return outputs(tmp_path / "clean")


def kills(work_of: Callable[[int], Callable[[], None]], step: int = 1, last: int = 1000) -> Iterator[int]:
    """Kill `work_of(n)` before its n-th change, for every `step`-th n below `last`, until it survives."""
    for n in range(1, last, step):
        code = in_child(work_of(n), kill_before=n)
        assert code in (0, -9)
        yield n
        if code == 0:
            assert n > 20
            return
    assert last < 1000


@pytest.mark.long
def test_killed_anywhere_then_resumed(tmp_path: Path, clean: dict[str, bytes]) -> None:
    for n in kills(lambda n: create_and_work(tmp_path / f"{n}" / "run", "new")):
        folder = tmp_path / f"{n}" / "run"
        create_and_work(folder, "resume")()
        assert outputs(folder) == clean
        assert not list(folder.rglob(".partial-*"))
        assert set(run_folder._walk(folder)) == set(run_folder._walk(tmp_path / "clean"))


def test_killed_again_and_again(tmp_path: Path, clean: dict[str, bytes]) -> None:
    folder = tmp_path / "run"
    for n in range(1, 1000, 2):  # each attempt dies a little later than the one before
        if in_child(create_and_work(folder, "resume"), kill_before=n) == 0:
            break
    assert outputs(folder) == clean


def test_killed_overwrite(tmp_path: Path) -> None:
    changed = CONFIG.replace("seed: 0", "seed: 1")
    create_and_work(tmp_path / "wanted", "new", lr=0.2, config=changed)()

    def again(n: int) -> Callable[[], None]:
        create_and_work(tmp_path / f"{n}" / "run", "new")()
        return create_and_work(tmp_path / f"{n}" / "run", "overwrite", lr=0.2, config=changed)

    for n in kills(again, last=50):  # until the old run is gone; from there on it is a new one
        folder = tmp_path / f"{n}" / "run"
        create_and_work(folder, "overwrite", lr=0.2, config=changed)()
        assert outputs(folder) == outputs(tmp_path / "wanted")
        assert [item.name for item in folder.parent.iterdir()] == ["run"]  # nothing set aside stays


def test_changed_key_killed_then_resumed(tmp_path: Path) -> None:
    create_and_work(tmp_path / "wanted", "new", lr=0.2)()

    def changed(n: int) -> Callable[[], None]:
        create_and_work(tmp_path / f"{n}", "new")()
        return create_and_work(tmp_path / f"{n}", "resume", lr=0.2)

    for n in kills(changed, step=2):
        create_and_work(tmp_path / f"{n}", "resume", lr=0.2)()
        assert outputs(tmp_path / f"{n}") == outputs(tmp_path / "wanted")


def test_kill_from_outside_keeps_checkpoints_and_seconds(tmp_path: Path) -> None:
    folder, log = tmp_path / "run", []

    def slow(partial: Path) -> None:
        partial.mkdir()
        write_text(partial / "checkpoint-0", "")
        time.sleep(0.2)
        write_text(partial / "checkpoint-1", "")
        (tmp_path / "ready").touch()
        time.sleep(60)

    child = os.fork()
    if not child:
        try:
            Run.create(folder, CONFIG).stage("model", 1, slow, keep_partial=True)
        finally:
            os._exit(1)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)

    def resumed(partial: Path) -> None:
        log.extend(sorted(item.name for item in partial.iterdir()))

    with Run.create(folder, CONFIG, "resume") as run:
        run.stage("model", 1, resumed, keep_partial=True)
        assert log == ["checkpoint-0", "checkpoint-1"]
        assert 0.15 < run.seconds()["model"] < 10  # what the kept checkpoints took


def test_finished_steps_are_skipped_and_a_changed_key_rebuilds_all_below(tmp_path: Path) -> None:
    log: list[str] = []
    for lr in (0.1, 0.1, 0.2):
        with Run.create(tmp_path, CONFIG, "resume") as run:
            experiment(run, lr, log.append)
    assert log == ["data", "model from 0", "traces", "model from 0", "traces"]
    assert read_json(tmp_path / "results.json") == {"lr": 0.2}
    assert set(run.seconds()) == {"data.txt", "models/mixed", "traces/mixed", "results.json"}


def test_an_equal_rebuilt_output_spares_what_depends_on_it(tmp_path: Path) -> None:
    log: list[str] = []
    with Run.create(tmp_path, CONFIG) as run:
        for setting in (1, 2):
            run.stage("a", setting, lambda partial: write_text(partial, "same"))
            run.stage("b", run.inputs("a"), lambda partial: log.append("b") or write_text(partial, ""))
    assert log == ["b"]


RECORDS = ("{", "[" * 100_000, '{"key": 1, "hash": 2, "seconds": "x", "files": 3}')


@pytest.mark.parametrize("tamper", ["change", "remove", "same size", *RECORDS])
def test_tampered_output_is_rebuilt(tmp_path: Path, clean: dict[str, bytes], tamper: str) -> None:
    folder, log = tmp_path / "run", []
    create_and_work(folder, "new")()
    weights = folder / "models" / "mixed" / "weights" / "model"
    if tamper == "change":
        weights.write_text("other")
    elif tamper == "remove":
        weights.unlink()
    elif tamper == "same size":
        weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    else:
        (folder / "manifest" / "models%2Fmixed.json").write_text(tamper)
    with Run.create(folder, CONFIG, "resume") as run:
        with pytest.raises(UserError, match="models/mixed"):
            run.inputs("models/mixed")
        experiment(run, log=log.append)
    assert log == ["model from 0"]
    assert outputs(folder) == clean


def test_a_kept_partial_of_another_key_is_not_used(tmp_path: Path) -> None:
    def fail(partial: Path) -> None:
        write_text(partial / "checkpoint", "")
        raise KeyboardInterrupt

    with Run.create(tmp_path, CONFIG) as run:
        for key, kept in ((1, False), (1, True), (2, False)):
            with pytest.raises(KeyboardInterrupt):
                run.stage("m", key, lambda partial, kept=kept: (_same(partial.exists(), kept), fail(partial)),
                          keep_partial=True)  # fmt: skip
        with pytest.raises(KeyboardInterrupt):
            run.stage("n", 1, fail)
    assert not (tmp_path / ".partial-n").exists() and not (tmp_path / "n").exists()


def _same(found: object, wanted: object) -> None:
    assert found == wanted


def test_two_processes_cannot_work_in_one_folder(tmp_path: Path) -> None:
    with Run.create(tmp_path / "run", CONFIG):
        for mode in ("new", "resume", "overwrite"):
            with pytest.raises(UserError, match=r"in use|already holds"):
                Run.create(tmp_path / "run", CONFIG, mode)
    Run.create(tmp_path / "run", CONFIG, "resume").close()


def test_workers_build_steps_and_die_with_their_leader(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    leader = os.fork()
    if not leader:
        try:
            run = Run.create(folder, CONFIG)
            if not os.fork():
                run._lock.close()  # as in a spawned worker, which inherits no lock
                with Run.attach(folder) as worker:
                    worker.stage("done", 1, lambda partial: write_text(partial, "by a worker"))
                    (tmp_path / "ready").touch()
                    worker.stage("never", 1, lambda partial: (partial.mkdir(), time.sleep(60)))
            time.sleep(60)
        finally:
            os._exit(1)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    os.kill(leader, signal.SIGKILL)
    os.waitpid(leader, 0)
    begun = time.monotonic()
    with Run.create(folder, CONFIG, "resume") as run:  # waits for the orphan to end
        assert time.monotonic() - begun < 10
        assert run.complete("done", 1) and not run.complete("never", 1)
        assert not (folder / ".partial-never").exists()
    with pytest.raises(RuntimeError, match="gone"):
        Run.attach(folder)


def test_processes_side_by_side(tmp_path: Path) -> None:
    """Two processes, acted out one after the other: what the first tells, the second is told."""
    told: list = []
    sees = [True, True]

    def first(fn: Callable) -> object:
        told.append(fn())
        return told[-1]

    def gathered(value):
        return [value, sees[1]]

    leader = SimpleNamespace(rank=0, size=2, by_first=first, gathered=gathered)
    follower = SimpleNamespace(rank=1, size=2, by_first=lambda fn: told.pop(0), gathered=gathered)
    folder = tmp_path / "run"
    made: list[int] = []

    def go(processes: SimpleNamespace, words: str) -> None:
        with Run.together(folder, CONFIG, "resume", processes) as run:  # pyright: ignore
            assert run.leads == (processes is leader)

            def make(path: Path) -> None:
                made.append(processes.rank)
                if run.leads:
                    path.write_text(words)

            key = run.alone(lambda: {"words": words, **run.inputs()})  # the run is its own there: nothing waits
            assert run.stage("x.txt", key, make).read_text() == words
            assert (run.processes is processes) and key == {"words": words}

    for words, makers in (("one", [0, 1]), ("one", []), ("two", [0, 1])):
        made.clear()
        go(leader, words)
        go(follower, words)
        assert made == makers and told == []
    sees[1] = False
    with pytest.raises(UserError, match="process 1 of 2 does not see"):
        go(leader, "two")
    with Run.create(folder, CONFIG, "resume") as run:  # the lock was given back
        assert run.leads and run.alone(lambda: 3) == 3


@pytest.mark.parametrize("mode", ["new", "resume", "overwrite"])
def test_a_foreign_folder_is_never_touched(tmp_path: Path, mode: run_folder.Mode) -> None:
    folder = tmp_path / "thesis"
    for name in ("chapter.tex", "manifest/lock", "config.yaml", ".partial-notes"):
        write_text(folder / name, "years of work")
    before = outputs(folder), sorted(run_folder._walk(folder))
    with pytest.raises(UserError, match=r"thesis is not empty and holds no crosstrace run"):
        Run.create(folder, CONFIG, mode)
    assert (outputs(folder), sorted(run_folder._walk(folder))) == before
    with pytest.raises(UserError, match=r"chapter\.tex"):
        Run.create(folder / "chapter.tex", CONFIG, mode)


def test_existing_run_needs_a_word(tmp_path: Path) -> None:
    create_and_work(tmp_path / "run", "new")()
    with pytest.raises(UserError, match=r"run already holds.*--resume.*--overwrite"):
        Run.create(tmp_path / "run", CONFIG)
    with Run.create(tmp_path / "run", "seed: 7\n", "overwrite") as run:
        assert run.config_text == "seed: 7\n" and set(outputs(run.folder)) == {"config.yaml"}
    with Run.create(tmp_path / "run", None, "resume") as run:
        assert run.config_text == "seed: 7\n"
    with pytest.raises(UserError, match="nowhere holds no crosstrace run"):
        Run.create(tmp_path / "nowhere", None, "resume")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    "config, said",
    [
        (CONFIG.replace("0.001", "0.002"), r"training\.lr = 0\.001.*training\.lr = 0\.002"),
        (CONFIG.replace("[1, 2]", "[1, 3]"), r"training\.phases\.1 = 2.*training\.phases\.1 = 3"),
        (CONFIG.replace("seed: 0\n", ""), r"seed = 0.*seed = not set"),
        (CONFIG + "new: []\n", r"new = not set.*new = \[\]"),
    ],
)
def test_resume_refuses_another_configuration(tmp_path: Path, config: str, said: str) -> None:
    create_and_work(tmp_path, "new")()
    before = outputs(tmp_path)
    with pytest.raises(UserError, match=said):
        Run.create(tmp_path, config, "resume")
    assert outputs(tmp_path) == before
    Run.create(tmp_path, "# reordered\ntraining: {phases: [1, 2], lr: 0.001}\nseed: 0", "resume").close()


def test_step_names_and_empty_steps(tmp_path: Path) -> None:
    with Run.create(tmp_path, CONFIG) as run:
        for name in ("", "/etc/x", "../x", "a//b", ".hidden", "manifest", "config.yaml"):
            with pytest.raises(ValueError, match="cannot name a step"):
                run.stage(name, 1, lambda partial: None)
        with pytest.raises(FileNotFoundError, match="wrote nothing"):
            run.stage("a", 1, lambda partial: None)
        run.stage("models/a", 1, lambda partial: write_text(partial, ""))
        for name in ("models", "models/a/b"):
            with pytest.raises(ValueError, match="overlap"):
                run.stage(name, 1, lambda partial: partial.mkdir())
        run.stage("models/a", 2, lambda partial: partial.mkdir())  # a folder may take a file's place, and back
        assert run.complete("models/a", 2)
    with Run.create(tmp_path, CONFIG, "resume") as run:
        (tmp_path / "models" / "a").rmdir()
        assert not run.complete("models/a", 2)
        run.stage("models/a", 3, lambda partial: write_text(partial, "x"))
        assert run.path("models/a").read_text() == "x"
        with pytest.raises(UserError, match="no finished 'b' yet"):
            run.inputs("b")


def test_an_exception_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(RuntimeError), replacing(tmp_path / "a.json") as partial:
        partial.write_text("half")
        raise RuntimeError
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", object())
    assert read_json(tmp_path / "a.json") == 1
    assert [item.name for item in tmp_path.iterdir()] == ["a.json"]


def test_json_is_strict_and_exact(tmp_path: Path) -> None:
    third, tiny = 1 / 3, 5e-324
    value = {
        "a": [math.nan, math.inf, third, tiny],
        "b": np.float32(0.1),
        "c": torch.tensor([1, 2]),
        0.01: (True, None),
    }
    write_json(tmp_path / "x.json", value)
    read = json.loads((tmp_path / "x.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert read == {
        "a": [None, None, third, tiny],
        "b": float(np.float32(0.1)),
        "c": [1, 2],
        "0.01": [True, None],
    }
    with pytest.raises(UserError, match=r"y\.json does not exist"):
        read_json(tmp_path / "y.json")
    write_text(tmp_path / "y.json", "{")
    with pytest.raises(UserError, match=r"y\.json is not valid JSON"):
        read_json(tmp_path / "y.json")


def test_hashes(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "x", "")
    assert sha256_file(tmp_path / "a" / "x").startswith("e3b0c44298fc1c14")  # of nothing, as published
    write_text(tmp_path / "b" / "y", "")
    assert len({sha256_tree(tmp_path / "a"), sha256_tree(tmp_path / "b"), sha256_tree(tmp_path)}) == 3
    (tmp_path / "b" / "y").rename(tmp_path / "b" / "x")
    os.utime(tmp_path / "b" / "x", (0, 0))
    assert sha256_tree(tmp_path / "a") == sha256_tree(tmp_path / "b")


def test_metadata() -> None:
    found = provenance.metadata()
    versions = (found["versions"]["torch"], str(torch.__version__))  # a build's label (+cpu) need not be in both
    assert len({version.partition("+")[0] for version in versions}) == 1 and found["threads"] == 1
    assert json.loads(json.dumps(found)) == found


def test_a_removal_leaves_neighbours_alone(tmp_path: Path) -> None:
    for name in ("own", "removed-own"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("")
    remove_folder(tmp_path / "own")
    assert [path.name for path in tmp_path.iterdir()] == ["removed-own"]


def test_a_path_through_itself_is_the_same_path(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    with replacing(tmp_path / "own" / ".." / "own") as partial:
        partial.mkdir()
        (partial / "new").write_text("")
        remove_folder(tmp_path / "own")
    assert [path.name for path in (tmp_path / "own").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["own"]
