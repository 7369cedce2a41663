"""trace.keep: the same results whatever stays, nothing done again for what was dropped, and a sentence where it is
missed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_pipeline import forget, numbers
from tiny_models import tiny_base

from crosstrace.core import run_folder
from crosstrace.core.errors import UserError
from crosstrace.core.pieces import INDEX
from crosstrace.core.progress import Progress
from crosstrace.core.run_folder import Run
from crosstrace.experiment import config, pipeline, trace_files
from crosstrace.experiment.stages import analyze, dropping, intervene, train
from crosstrace.experiment.stages import trace as trace_stage
from crosstrace.experiment.studied import StudiedModel, View
from crosstrace.export import artefacts
from crosstrace.sets.paramset import ParamSet
from crosstrace.trace import Trace, load_traces, trace

pytestmark = pytest.mark.long

SMALL = """
name: small
facts: {people: 24}
strategies:
  two_stage: [{name: bio, batch: {bio: 8}, steps: 4}, {name: qa, batch: {qa: 8}, steps: 4}]
  mixed: [{name: mixed, batch: {bio: 8, qa: 8}, steps: 5}]
train: {precision: float32, checkpoint_every: 2, recall_every: 0, recall_examples: 12}
trace: {measures: [abs, net], every: 1, parts: 3, check: false}
analysis: {fractions: [0.01, 0.05, 0.2], central_fractions: [0.05], draws: 4}
interventions: {fractions: [0.05], seeds: 2, questions: 12}
mechanism: {parts: [gradients], facts: 12, together: 12, draws: 1}
eval: {known_examples: 24}
jobs: 1
"""
experiment = config.override(config.loads(SMALL, "SMALL"), {"model.name": str(tiny_base())})


def keeping_only(keep: str, **more: str) -> config.Experiment:
    return config.override(experiment, {"trace.keep": keep, **{k.replace("__", "."): v for k, v in more.items()}})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    pipeline.run(experiment, folder, quiet=True)
    return folder


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def traced(folder: Path) -> set[str]:
    """All trace files of a run."""
    return {file.relative_to(folder).as_posix() for name in ("traces", "models") for file in (folder / name).rglob("*")
            if file.is_file() and file.name in ("bio.safetensors", "qa.safetensors")}  # fmt: skip


def stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


def same_outputs(folder: Path, other: Path) -> bool:
    files = ["analysis/mixed.json", "interventions/mixed.json"]
    sets = [ParamSet.load(home / "shared/mixed/online-0.05-shared.safetensors") for home in (folder, other)]
    return sets[0] == sets[1] and all((folder / file).read_bytes() == (other / file).read_bytes() for file in files)


MEANS = {f"traces/{name}/means/{when}/{task}.safetensors" for name in ("two_stage", "mixed")
         for when in ("online", "final") for task in ("bio", "qa")}  # fmt: skip


@pytest.mark.parametrize("keep", ["means", "none"])
def test_results_are_the_same_and_nothing_is_done_again(whole: Path, tmp_path: Path, keep: str, monkeypatch) -> None:
    folder = tmp_path / "run"
    pipeline.run(keeping_only(keep), folder, quiet=True)
    assert numbers(folder) == numbers(whole)
    assert traced(folder) == (MEANS if keep == "means" else set())
    assert same_outputs(folder, whole)
    before = stamps(folder)
    functions = ((train, "train"), (trace_stage, "trace"), (analyze, "_analyze_traces"), (intervene, "ablated"),
                 (analyze, "overlap_rows"))  # fmt: skip
    for module, name in functions:
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("done again"))
    pipeline.run(keeping_only(keep), folder, "resume", quiet=True)
    for stage in ("train", "trace", "analyze", "intervene", "mechanism"):
        pipeline.run(keeping_only(keep), folder, "resume", stages=[stage], quiet=True)
    after = stamps(folder)
    told = {path for path in after if after[path] != before.get(path)}
    assert {path.name for path in told} <= {"metadata.json", "lock", "workers"} and traced(folder) == traced(folder)


def test_means_are_those_of_the_parts(whole: Path, copied: Path) -> None:
    pipeline.run(keeping_only("means"), copied, "resume", quiet=True)  # of a run that kept all so far
    assert traced(copied) == MEANS and numbers(copied) == numbers(whole)
    for when, kinds in (("online", 2), ("final", 2)):
        parts = load_traces(whole / f"traces/mixed/{when}/qa.safetensors")
        means = load_traces(copied / f"traces/mixed/means/{when}/qa.safetensors")
        assert len(means) == kinds and len(parts) == 3 * kinds
        for mean in means:
            own = [part for part in parts if (part.measure, part.reduction) == (mean.measure, mean.reduction)]
            expected = Trace.combine(own)
            assert mean.weight == expected.weight and mean.meta == expected.meta
            assert all(torch.equal(mean.values[name], value) for name, value in expected.values.items())
            again = Trace.combine([mean])
            assert all(torch.equal(again.values[name], value) for name, value in expected.values.items())


def test_interventions_are_the_same_from_the_means(whole: Path, copied: Path) -> None:
    pipeline.run(keeping_only("means"), copied, "resume", quiet=True)
    forget(copied, "interventions/mixed.json", "shared/mixed")  # neither needs the parts
    pipeline.run(keeping_only("means"), copied, "resume", quiet=True)
    assert same_outputs(copied, whole)


@pytest.mark.parametrize(
    ("keep", "lost", "stage"),
    [("means", "analysis/mixed.json", "analyze"), ("none", "analysis/mixed.json", "analyze"),
     ("none", "interventions/mixed.json", "intervene")],
)  # fmt: skip
def test_what_was_dropped_is_told_where_it_is_missed(
    copied: Path, keep: str, lost: str, stage: str, parts_may_fail
) -> None:
    pipeline.run(keeping_only(keep), copied, "resume", quiet=True)
    forget(copied, lost)
    results = pipeline.run(keeping_only(keep), copied, "resume", quiet=True)
    (row,) = [row for row in results.left_out if row.stage == stage and not row.part]
    assert row.model == "mixed" and "are gone: " in row.reason and f"trace.keep was {keep}" in row.reason
    assert "another folder and trace.keep: parts" in row.reason


def test_traces_that_need_no_training_are_taken_again(whole: Path, tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "run"
    changes = {"trace__online": "false", "strategies": "{}", "mechanism__run": "false",
               "given": f"{{tuned: {whole / 'models/mixed/mixed'}}}"}  # fmt: skip
    pipeline.run(keeping_only("none", **changes), folder, quiet=True)
    before = (folder / "analysis/tuned.json").read_bytes()
    assert not traced(folder)
    forget(folder, "analysis/tuned.json")
    calls: list[str] = []
    monkeypatch.setattr(trace_stage, "trace", lambda *a, **k: calls.append(k["task"]) or trace(*a, **k))
    pipeline.run(keeping_only("none", **changes), folder, "resume", quiet=True)
    assert calls == ["bio", "qa"] and (folder / "analysis/tuned.json").read_bytes() == before and not traced(folder)


def test_a_trace_stage_that_must_be_done_again_says_what_is_missing(copied: Path) -> None:
    pipeline.run(keeping_only("none"), copied, "resume", quiet=True)
    forget(copied, "traces/mixed")
    with pytest.raises(
        UserError, match=r"the trace during the training of mixed, which is gone: .*trace\.keep was none"
    ):
        pipeline.run(keeping_only("none"), copied, "resume", quiet=True)


def kill_at(number: int, patch: pytest.MonkeyPatch) -> None:
    """End the process, as it were, at one of the steps that change the run: a removal, a record, a rename."""
    count = 0

    def watched(step: Callable[..., object]) -> Callable[..., object]:
        def at(*words: Any) -> object:
            nonlocal count
            count += 1
            if count == number + 1:
                raise KeyboardInterrupt
            return step(*words)

        return at

    for name in ("remove_folder", "write_json", "install"):
        patch.setattr(run_folder, name, watched(getattr(run_folder, name)))


@pytest.mark.parametrize("keep", ["means", "none"])
def test_killed_while_dropping_and_resumed(whole: Path, tmp_path: Path, keep: str, monkeypatch) -> None:
    wanted = keeping_only(keep)

    def drop(run: Run) -> None:
        for name in ("two_stage", "mixed"):
            dropping.drop_traces(StudiedModel(run, wanted, name, Progress(quiet=True)))

    folder, stops, was_killed = tmp_path / "run", 0, True
    while was_killed:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        was_killed = False
        with Run.create(folder, config.dumps(wanted), "resume") as run, monkeypatch.context() as patch:
            kill_at(stops, patch)
            try:
                drop(run)
            except KeyboardInterrupt:
                stops, was_killed = stops + 1, True
        with Run.create(folder, None, "resume") as run:
            for name in ("two_stage", "mixed"):  # what others find meanwhile
                run.inputs(f"traces/{name}", f"models/{name}", f"shared/{name}")
                if trace_files.has(run, name) != "none":
                    for when in ("online", "final"):
                        assert {*trace_files.read_traces(run.path(f"traces/{name}"), when, "abs", wanted.roles)} == {
                            "bio",
                            "qa",
                        }
            drop(run)
            assert traced(folder) == (MEANS if keep == "means" else set())
    assert stops >= 10
    pipeline.run(wanted, folder, "resume", quiet=True)
    assert numbers(folder) == numbers(whole)
    assert not [path for path in folder.rglob(".*") if path.name.startswith((".partial", ".removed"))]


def test_models_are_made_of_what_stays(whole: Path, copied: Path) -> None:
    pipeline.run(keeping_only("none"), copied, "resume", quiet=True)
    base = View(experiment).load_base()
    for label in ("shared", "bio", "random", "random_per_tensor"):
        options = artefacts.EditSettings(set=label)
        with Run.create(whole, None, "resume") as run:
            expected = artefacts.chosen_set(run, experiment, options, base)
        with Run.create(copied, None, "resume") as run:
            found = artefacts.chosen_set(run, experiment, options, base)
        assert found == expected and (found.name, found.meta) == (expected.name, expected.meta)
    with Run.create(copied, None, "resume") as run:
        for options in (artefacts.EditSettings(fraction=0.3), artefacts.EditSettings(set="bio_only")):
            with pytest.raises(UserError, match=r"needs traces of mixed that are gone: .* trace\.keep was none"):
                artefacts.chosen_set(run, experiment, options, base)
    means = Path(shutil.copytree(whole, copied.parent / "means"))
    pipeline.run(keeping_only("means"), means, "resume", quiet=True)
    options = artefacts.EditSettings(fraction=0.3, set="bio_only")
    sets = []
    for folder in (whole, means):
        with Run.create(folder, None, "resume") as run:
            sets.append(artefacts.chosen_set(run, experiment, options, base))
    assert sets[0] == sets[1]


def test_a_run_of_an_earlier_version_goes_on(copied: Path) -> None:
    """Its settings have no trace.keep."""
    saved = copied / "config.yaml"
    saved.write_text("".join(line for line in saved.read_text().splitlines(True) if "keep: parts" not in line))
    assert "keep: parts" not in saved.read_text()
    pipeline.run(experiment, copied, "resume", quiet=True)
    assert "keep: parts" in saved.read_text()


def test_traces_in_pieces_become_whole_means(tmp_path: Path) -> None:
    """A sharded run's trace file is a folder."""
    items = [Trace("bio", "abs", "example", "online", {"w": torch.rand(4, 3)}, weight) for weight in (2.0, 3.0)]
    with Run.create(tmp_path / "run", "name: x\n") as run:

        def make(folder: Path) -> None:
            held = {f"{i}/w": item.values["w"] for i, item in enumerate(items)}
            headers = [{k: v for k, v in vars(item).items() if k != "values"} | {"names": ["w"]} for item in items]
            (folder / "online").mkdir(parents=True)
            pipeline_write(folder / "online" / "bio.safetensors", held, headers)

        run.stage("traces/x", {}, make)
        assert (run.path("traces/x") / "online/bio.safetensors" / INDEX).is_file()
        trace_files.keep_means(run, "x")
        (mean,) = load_traces(run.path("traces/x") / "means/online/bio.safetensors")
    assert torch.equal(mean.values["w"], Trace.combine(items).values["w"]) and mean.weight == 5


def pipeline_write(path: Path, held: dict[str, torch.Tensor], headers: list[dict]) -> None:
    from crosstrace.core.pieces import write
    from crosstrace.trace.result import _FORMAT

    write(path, held, None, _FORMAT, {"traces": headers})
