"""A study: its grid, its budget, its table; runs that fail, and a study that is killed."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet
import pytest
import yaml
from tiny_models import tiny_base

from crosstrace.cli import commands
from crosstrace.core.errors import UserError
from crosstrace.core.progress import Progress
from crosstrace.core.run_folder import Run
from crosstrace.experiment import config, run_pool, study, study_settings
from crosstrace.results.study import StudyResults

EXPERIMENT = """
facts: {people: 16}
strategies:
  two_stage: [{name: bio, batch: {bio: 4}, steps: 2}, {name: qa, batch: {qa: 4}, steps: 2}]
  mixed: [{name: mixed, batch: {bio: 4, qa: 4}, steps: 2}]
train: {precision: float32, recall_every: 0, recall_examples: 8}
eval: {known_examples: 24}
trace: {parts: 2, every: 1, check: false}
analysis: {fractions: [0.05], central_fractions: [0.05], draws: 2}
interventions: {run: false}
mechanism: {run: false}
jobs: 1
"""
GRID = {
    "name": "grid",
    "experiment": yaml.safe_load(EXPERIMENT) | {"model": {"name": str(tiny_base())}},
    "vary": {"length": {"short": {}, "long": {"strategies.mixed.0.steps": 3}}},
    "seeds": [1, 2],
    "cores": 2,
}


def parsed(**changes) -> study_settings.StudySettings:
    return study_settings.parse(GRID | changes, "the test")


def file_of(folder: Path, values: dict) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def table(folder: Path) -> list[dict]:
    with open(folder / "table.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_every_combination_is_a_run_seed_by_seed() -> None:
    runs = study_settings.plan(parsed(vary=GRID["vary"] | {"facts.people": [16, 24]}))
    assert [run.label for run in runs[:4]] == ["short+people=16/1", "short+people=24/1", "long+people=16/1",
                                               "long+people=24/1"]  # fmt: skip
    assert len(runs) == 8 and [run.seed for run in runs] == [1] * 4 + [2] * 4
    last = runs[-1].experiment
    assert last.facts.people == 24 and last.facts.seed == last.train.seed == 2
    assert last.strategies["mixed"][0].steps == 3 and runs[0].experiment.strategies["mixed"][0].steps == 2
    assert runs[-1].setting == "long+people=24"
    (alone,) = study_settings.plan(parsed(vary={}, seeds=[7]))
    assert alone.label == "default/7"
    (random,) = study_settings.plan(parsed(vary={}, seeds=[7], seeded=["facts.seed", "model.random_init"]))
    assert random.experiment.model.random_init == 7


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sedes": [1]}, "sedes"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "a seed is given twice"),
        ({"experiment": {"fcts": {}}}, "unknown setting 'fcts'"),
        ({"vary": {"length": {"short": {"facts.peeple": 3}}}}, "unknown setting 'facts.peeple'"),
        ({"vary": {"facts.people": [4]}}, "setting facts.people is 4"),
        ({"vary": {"length": {"short": {"strategies.mixed.7.steps": 3}}}}, "no item of a list"),
        ({"vary": {"length": {"../up": {}}}}, "cannot name a folder"),
        ({"vary": {"length": {".hidden": {}}}}, "cannot name a folder"),
        ({"vary": {"facts.people": [16, 16]}}, "one name"),
        ({"vary": {"facts.people": []}}, "vary"),
        ({"vary": {"facts.seed": [7, 8]}}, "facts.seed is set by two"),
        ({"vary": {"facts.people": [16], "x": {"a": {"facts.people": 24}}}}, "facts.people is set by two"),
        ({"vary": {"x": {"a": {"facts": {"order": "permuted"}}}}}, "a whole section"),
        ({"compare": ["mixed", "replay"]}, "no strategy 'replay'"),
        ({"compare": ["mixed", "mixed"]}, "two different strategies"),
        ({"seeds": [2**32]}, "seeds"),
        ({"name": "a/b"}, "cannot name a folder"),
        ({"cores": 0}, "cores"),
        ({"memory": -1}, "memory"),
    ],
)
def test_bad_studies_are_told_in_a_sentence(changes: dict, told: str) -> None:
    with pytest.raises(UserError) as error:
        study_settings.plan(parsed(**changes))
    assert told in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["- a list", "a: [", "", "\x00"])
def test_bad_files_end_the_command_with_a_sentence(tmp_path: Path, text: str, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(text)
    values = [] if text else ["--cores", "nothing"]  # an empty file is a study of the defaults
    with pytest.raises(SystemExit) as ended:
        commands.main(["study", str(path), str(tmp_path / "out"), *values])
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.count("\n") == 1 and not (tmp_path / "out").exists()


def test_keys_tell_experiments_apart_and_not_their_names_or_jobs() -> None:
    """What is complete is known by its key: a collision would pass one experiment's results for another's."""
    default = {"two_stage": None, "mixed": None}
    other = {"mixed": [{"name": "mixed", "batch": {"bio": 4, "qa": 4}, "steps": 2}]}

    def key(experiment: dict, **changes) -> dict:
        (planned,) = study_settings.plan(parsed(experiment=experiment, vary={}, seeds=[1], **changes))
        return study._key(planned)

    whole = config.plain(config.Experiment())["strategies"]
    assert key({}) == key({"jobs": 1, "name": "x"}) == key({"strategies": {n: whole[n] for n in default}})
    keys = [key({}), key({"facts": {"people": 16}}), key({"strategies": {**whole, **other}}),
            key({"strategies": {"mixed": whole["mixed"], "other": other["mixed"]}}, compare=["mixed", "other"]),
            key({"strategies": {**whole, "other": other["mixed"]}}), key({"threads": 2})]  # fmt: skip
    assert all(a != b for i, a in enumerate(keys) for b in keys[:i])


def test_a_study_in_which_nobody_recalls_has_a_report(tmp_path: Path) -> None:
    from crosstrace.experiment import summary
    from crosstrace.experiment.study_page import prediction

    rows = [
        {"setting": f"s{d}", "seed": 1, "strategy": name, "recall.qa_ood": 0.0, "logprob.bio": -1.0 * d}
        for d in range(5) for name in ("mixed", "two_stage")
    ]  # fmt: skip
    about = {"name": "x", "runs": 10, "seeds": [1], "settings": {row["setting"]: {} for row in rows}, "strategies": {},
             "compare": [], "hours": 0.0, "peak_gib": 0.0}  # fmt: skip
    found = StudyResults.of({"prediction": summary.prediction(rows), "study": about})
    assert "nothing to predict" in prediction(found, rows).absent


def test_a_point_of_a_study_says_which_model_it_is() -> None:
    from crosstrace.experiment import summary
    from crosstrace.experiment.study_page import prediction

    rows = [
        {"setting": f"s{d}", "seed": 7, "strategy": name, "recall.qa_ood": 0.1 * d + (name == "mixed") * 0.2,
         "logprob.bio": -1.0 * d - (name == "mixed")}
        for d in range(5) for name in ("mixed", "two_stage")
    ]  # fmt: skip
    about = {"name": "x", "runs": 10, "seeds": [7], "settings": {row["setting"]: {} for row in rows}, "strategies": {},
             "compare": ["mixed", "two_stage"], "hours": 0.0, "peak_gib": 0.0}  # fmt: skip
    found = StudyResults.of({"prediction": summary.prediction(rows), "study": about})
    (plot,) = [block for block in prediction(found, rows).blocks if hasattr(block, "panels")]
    titles = re.findall(r"<title>(.*?)</title>", "".join(plot.panels))
    assert sum("s3, seed 7" in title for title in titles) == 2 and len(titles) >= 10


def test_strategies_to_compare_are_those_that_every_run_has() -> None:
    only = {"strategies": {"only": [{"name": "all", "batch": {"bio": 4, "qa": 4}, "steps": 2}]}}
    single = parsed(experiment=yaml.safe_load(EXPERIMENT) | only, vary={})
    assert study._compared(single, study_settings.plan(single)) is None
    assert study._compared(parsed(), study_settings.plan(parsed())) == ("mixed", "two_stage")


def test_the_experiment_may_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(EXPERIMENT)
    named = parsed(experiment=str(tmp_path / "own.yaml"))
    assert named == parsed(experiment=yaml.safe_load(EXPERIMENT)), "and so is what is saved of it"
    with pytest.raises(UserError, match=r"config file .*none\.yaml does not exist"):
        parsed(experiment=str(tmp_path / "none.yaml"))


def test_none_is_a_point_like_any_other() -> None:
    runs = study_settings.plan(parsed(vary={"trace.examples": [None, 8]}, seeds=[1]))
    assert [(run.setting, run.experiment.trace.examples) for run in runs] == [
        ("examples=none", None),
        ("examples=8", 8),
    ]


@pytest.mark.parametrize(("second", "begun"), [(0.5, "1 2 3 4"), (0.7, "1 2 3 3 4"), (1.2, "1 2 3 3 4")])
def test_a_study_keeps_to_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: float, begun: str
) -> None:
    """Processes that only claim to use memory, 0.5 GiB each but the second, under a budget of 1 GiB."""
    began: list[str] = []

    class Process:
        def __init__(self, target, args):
            self.pid, self.exitcode, self.looks = int(args[0].name), 0, 5

        def start(self):
            began.append(str(self.pid))

        def is_alive(self):
            self.looks -= 1
            return self.looks > 0

        def terminate(self):
            pass

        join = terminate

    monkeypatch.setattr(run_pool, "get_context", lambda kind: type("Context", (), {"Process": Process}))
    monkeypatch.setattr(run_pool, "memory_of", lambda pid: run_pool.GIB * (second if pid == 2 else 0.5))
    kept = []
    monkeypatch.setattr(study, "_keep", lambda opened, planned, *rest: kept.append(planned.seed))
    monkeypatch.setattr(run_pool, "POLL", 0.0)
    settings = parsed(vary={}, seeds=[1, 2, 3, 4], memory=1.0, cores=2)
    with Run.create(tmp_path / "out", "study: test", "new") as opened:
        failed = study._make(opened, study_settings.plan(settings), settings, Progress(True))
    assert " ".join(began) == begun
    if second > 1:
        assert kept == [1, 3, 4] and len(failed) == 1 and "it alone uses 1.2 GiB" in failed[0]
    else:
        assert kept == [1, 2, 3, 4] and not failed


def test_a_run_that_is_wider_than_the_budget_is_refused(tmp_path: Path) -> None:
    wide = parsed(experiment=GRID["experiment"] | {"jobs": 3})
    with pytest.raises(UserError, match="uses 3 cores"):
        study.run(wide, tmp_path / "wide", quiet=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "whole"
    study.run(parsed(), folder, quiet=True)
    return folder


def test_the_table_has_a_row_for_each_run_and_strategy(whole: Path) -> None:
    rows = table(whole)
    places = [(row["setting"], row["seed"], row["strategy"]) for row in rows]
    assert len(places) == len(set(places)) == 8
    assert {row["vary.length"] for row in rows} == {"short", "long"}
    steps = {(row["setting"], row["strategy"]): row["updates"] for row in rows}
    assert steps["long", "mixed"] == "3" and steps["short", "mixed"] == "2" and steps["long", "two_stage"] == "4"
    columns = pyarrow.parquet.read_table(whole / "table.parquet").to_pydict()
    for name, values in columns.items():
        for row, value in zip(rows, values):
            assert row[name] == ("" if value is None else str(value))
    for row in rows:
        results = json.loads((whole / "runs" / row["setting"] / row["seed"] / "results.json").read_text())
        assert float(row["recall.bio"]) == results["recall"][row["strategy"]]["bio"]["exact_match"]


def test_a_finished_study_keeps_results_and_reports(whole: Path) -> None:
    results = json.loads((whole / "results.json").read_text())
    assert results["study"]["runs"] == 4 and results["failed"] == []
    assert results["study"]["settings"] == {"short": {}, "long": {"strategies.mixed.0.steps": 3}}
    assert {row["measure"] for row in results["differences"]} >= {"recall.qa_ood", "overlap.online.example.0.05"}
    assert (whole / "report" / "index.html").stat().st_size > 10_000
    run = whole / "runs" / "short" / "1"
    assert (run / "report" / "index.html").is_file() and not (run / "models").exists()
    assert "exact match, held out" in str(StudyResults.read(whole))


def test_a_finished_study_is_not_run_again_and_may_grow(whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (whole / "results").rglob("*.json")}
    study.run(parsed(seeds=[1]), whole, "resume", quiet=True)
    assert before == {path: path.stat().st_mtime_ns for path in (whole / "results").rglob("*.json")}
    assert {row["seed"] for row in table(whole)} == {"1"}, "what is no longer asked for is not told"
    study.run(parsed(), whole, "resume", quiet=True)
    assert len(table(whole)) == 8
    with pytest.raises(UserError, match="already holds"):
        study.run(parsed(), whole, quiet=True)


@pytest.mark.long
def test_a_failed_run_does_not_stop_the_others(tmp_path: Path) -> None:
    folder = tmp_path / "failing"
    short = parsed(vary={}, seeds=[1, 2])
    place = folder / "runs" / "default" / "1"
    place.mkdir(parents=True)
    (place / "mine.txt").write_text("not a run")
    for path in ("manifest/RUN", "config.yaml"):  # a study of that name that somebody put a file into
        (folder / path).parent.mkdir(exist_ok=True)
    (folder / "manifest" / "RUN").write_text('{"crosstrace": "x", "layout": 1}')
    with pytest.raises(UserError, match=r"1 of 2 runs failed, first default/1: .* is not empty"):
        study.run(short, folder, "resume", quiet=True)
    assert (place / "mine.txt").read_text() == "not a run"
    assert {row["seed"] for row in table(folder)} == {"2"}
    (place / "mine.txt").unlink()
    study.run(short, folder, "resume", quiet=True)
    assert {row["seed"] for row in table(folder)} == {"1", "2"}


@pytest.mark.long
def test_a_killed_study_goes_on_and_comes_to_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    single: dict[str, Any] = {"vary": {}, "seeds": [1]}
    study.run(parsed(**single), tmp_path / "whole", quiet=True)
    file = file_of(tmp_path, GRID | single)
    command = [sys.executable, "-m", "crosstrace", "study", str(file), str(folder), "--quiet"]
    process = subprocess.Popen(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, start_new_session=True)
    until = time.monotonic() + 120
    while not list(folder.glob("runs/*/*/models")) and time.monotonic() < until:
        time.sleep(0.05)
    workers = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert any("spawn" in " ".join(worker.cmdline()) for worker in workers if worker.is_running())
    gone, alive = psutil.wait_procs(workers, timeout=10)
    assert gone and not alive, "a killed study leaves nobody who still writes"
    subprocess.run([*command, "--resume"], check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True)
    assert table(folder) == table(tmp_path / "whole") != []


def test_the_study_of_smollm2_is_its_experiment_over_seeds():
    examples = Path(__file__).parents[1] / "examples"
    whole, single = (yaml.safe_load((examples / f"{n}.yaml").read_text()) for n in ("study-smollm2", "smollm2-135m"))
    del single["name"]
    assert whole["experiment"] == single and len(whole["seeds"]) == 3 and 1 in whole["seeds"], "seed 1 is the example"
