"""Another package adds a measure, an analysis with a claim and a section, and a stage: settings, plan, run, study and
report use them, by their records alone; and tasks, strategies and outcome have names of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import tiny_base

from crosstrace.core.errors import UserError
from crosstrace.core.registry import Registry
from crosstrace.trace.measures import MEASURES, Measure

pytestmark = pytest.mark.long

PACKAGE = '''
"""Sensitivity in place of gradients, how long answers are, and how large a model's weights are."""
from crosstrace.core.files import write_json
from crosstrace.experiment.analysis import Analysis
from crosstrace.experiment.stage import Stage
from crosstrace.report.blocks import Plot, Section, Table
from crosstrace.trace.measures import Measure


def relative(total, theta):
    return total / (theta.abs() + 0.01)


def lengths(studied):
    return [{"part": part, "tokens": sum(len(item.ids) for item in items) / len(items)}
            for part, items in studied.questions.items()]


def longer(case):
    rows = case.results.mechanism.of("lengths")
    if not set(case.pair) <= set(rows):
        return []
    first, second = (rows[name][0]["tokens"] for name in case.pair)
    return [{
        "claim": "longer", "text": f"{case.names[0]} is asked longer questions", "when": "final",
        "verdict": "undecided", "effect": first - second, "low": None, "high": None, "unit": "tokens",
        "test": "none", "note": "a count",
    }]


def section(results):
    from matplotlib.figure import Figure
    from crosstrace.report import drawing as F

    of_models = results.mechanism.of("lengths")
    rows = [{"model": model, **row} for model, own in of_models.items() for row in own]
    figure = Figure()
    figure.add_subplot().bar([row["model"] for row in rows], [row["tokens"] for row in rows])
    panels = [F.to_svg(figure, "lengths", "Lengths")]
    plot = Plot("lengths", "Questions have a length.", "Mean tokens.", [], panels, rows)
    return Section("lengths", "How long the questions are", blocks=[plot])


def need(needs, name):
    yield "counting", {"weights": needs.weights}, {"lists of lengths": 12345.0}


def weigh(studied):
    def make(path):
        write_json(path, {"mean": float(sum(p.abs().sum() for p in studied.load().parameters())),
                          "scale": studied.experiment.extensions.get("weigh", {}).get("scale", 1)})

    studied.run.stage(f"weights/{studied.name}.json", {"model": studied.key()}, make)


def weighed(studied):
    from crosstrace.core.files import read_json

    return read_json(studied.run.path(f"weights/{studied.name}.json"))


def table(results):
    rows = [[name, str(row["mean"])] for name, row in results.stages["weigh"].items()]
    return Section("weigh", "What the weights weigh", blocks=[Table(["Model", "Sum of sizes"], rows, "Weights")])


def numbers(row):
    return {"mean": row["mean"]}


RECORDS = [
    Measure("relative", "mean of |g| over |θ|", "abs", at=relative),
    Analysis("lengths", "how long are the questions?", lengths, needs=need, work=lambda needs, kinds: 1e9,
             pair_claim=longer, section=section, numbers=lambda rows: {"tokens": rows[0]["tokens"]}),
    Stage("weigh", weigh, steps=("weights",), after="eval", results=weighed, section=table, numbers=numbers,
          needs=lambda sizes, name: [sizes.each("weighing", {"weights": sizes.weights}, {})]),
]
'''

EXPERIMENT = """
name: own_names
model: {{name: {base}}}
facts: {{people: 24}}
tasks:
  wiki: {{role: store, source: biographies}}
  quiz: {{role: recall, source: questions}}
  gaps: {{role: recall, source: cloze}}
outcome: gaps_ood
strategies:
  after: [{{name: store, batch: {{wiki: 6}}, steps: 2}}, {{name: ask, batch: {{quiz: 6, gaps: 6}}, steps: 2}}]
  together: [{{name: all, batch: {{wiki: 6, quiz: 6, gaps: 6}}, steps: 3}}]
compare: [[together, after]]
words: {{together: All at once}}
train: {{precision: float32, checkpoint_every: 2, recall_every: 0, recall_examples: 12}}
trace: {{measures: [relative, abs], parts: 2, check: false}}
analysis: {{fractions: [0.05, 0.2], central_fractions: [0.05], draws: 4}}
interventions: {{fractions: [0.05], seeds: 1, questions: 8}}
mechanism: {{parts: [representations, lengths], facts: 8, questions: 6}}
extensions: {{weigh: {{scale: 3}}}}
eval: {{known_examples: 12}}
jobs: {jobs}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder on Python's path that holds the package, as an installer leaves it, and the experiment."""
    home = tmp_path_factory.mktemp("extensions")
    (home / "site").mkdir()
    (home / "site" / "own_records.py").write_text(PACKAGE)
    about = home / "site" / "own_records-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: own-records\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[crosstrace.extensions]\nown = own_records:RECORDS\n")
    (home / "own.yaml").write_text(EXPERIMENT.format(base=tiny_base(), jobs=2))
    return home


def crosstrace(home: Path, *words: str, fails: bool = False) -> str:
    """What a command prints, with the package installed."""
    paths = os.pathsep.join([str(home / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "crosstrace", *words], cwd=home, env=environment, capture_output=True, text=True
    )
    assert (done.returncode != 0) == fails, done.stderr
    return done.stderr if fails else done.stdout


@pytest.fixture(scope="module")
def results(home: Path) -> dict:
    crosstrace(home, "run", "own.yaml", "run", "--quiet")
    return json.loads((home / "run" / "results.json").read_text())


def test_a_run_uses_what_the_package_adds(results: dict) -> None:
    assert results["left_out"] == []
    assert results["run"]["trace"]["measure"] == "relative" and results["shared"]["together"]
    assert {*results["mechanism"]["lengths"]} == {"base", "after", "together"}
    assert results["stages"]["weigh"]["together"]["mean"] > 0 and results["stages"]["weigh"]["after"]["scale"] == 3
    assert "weigh" in results["seconds"]
    (claim,) = [row for row in results["claims"] if row["claim"] == "longer"]
    assert claim["text"] == "All at once is asked longer questions" and claim["pair"] == ["together", "after"]


def test_tasks_and_outcome_have_their_own_names(results: dict) -> None:
    parts = {"wiki", "quiz_id", "quiz_ood", "gaps_id", "gaps_ood", "a_ood", "relations"}
    assert {*results["recall"]["together"]} == parts - ({"a_ood"} - {*results["recall"]["together"]})
    assert results["run"]["tasks"]["outcome"] == "gaps_ood"
    pairs = {tuple(row["tasks"]) for row in results["pairs"]["together"]}
    assert pairs == {("wiki", "quiz"), ("wiki", "gaps"), ("quiz", "gaps")}
    asked = {row["part"] for row in results["mechanism"]["representations"]["together"]}
    assert asked == {"gaps_id", "gaps_ood"}
    (recall,) = [row for row in results["claims"] if row["claim"] == "recall"]
    assert recall["note"].startswith("All at once ") and "after" in recall["note"]
    sets = {row["set"] for row in results["interventions"]["together"]["ablate"]}
    assert {"shared", "random", "random_per_tensor"} < sets <= {
        "shared", "random", "random_per_tensor", "wiki_only", "quiz_only", "gaps_only"
    }  # fmt: skip


def test_the_report_has_its_sections(home: Path, results: dict) -> None:
    page = (home / "run" / "report" / "index.html").read_text()
    assert 'id="lengths"' in page and "Questions have a length." in page and 'id="weigh"' in page
    assert (home / "run" / "report" / "lengths.csv").read_text().startswith("model,part,tokens\n")
    assert "All at once" in page and "Overlap of each two tasks" in page


def test_a_plan_counts_what_it_says_it_needs(home: Path) -> None:
    plan = json.loads(crosstrace(home, "plan", "own.yaml", "--json"))
    rows = {(row["process"], row["stage"]): row for row in plan["memory"] if row["where"] == "ram"}
    assert rows["together", "mechanism"]["bytes"] > 0 and rows["together", "weigh"]["moment"] == "weighing"


def test_a_study_has_its_numbers(home: Path, results: dict) -> None:
    own = (home / "own.yaml").read_text().replace("name: own_names\n", "").replace("jobs: 2", "jobs: 1")
    lines = "".join(f"  {line}\n" for line in own.splitlines() if line)
    (home / "study.yaml").write_text(f"name: own\nexperiment:\n{lines}seeds: [1, 2]\n")
    printed = crosstrace(home, "study", "study.yaml", "study", "--quiet")
    table = (home / "study" / "table.csv").read_text().splitlines()
    assert len(table) == 5 and {"weigh.mean", "lengths.tokens", "recall.gaps_ood"} < {*table[0].split(",")}
    assert "overlap.wiki+quiz.online.example.0.05" in table[0]
    found = json.loads((home / "study" / "results.json").read_text())
    assert found["study"]["compare"] == ["together", "after"] and "together" in printed
    assert any(row["measure"] == "recall.gaps_ood" for row in found["differences"])
    page = (home / "study" / "report" / "index.html").read_text()
    assert "Which two tasks share most" in page and "recall: Quiz, held out (OOD)" in page


def test_without_the_package_its_names_are_refused(home: Path, results: dict, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "own.yaml").write_text((home / "own.yaml").read_text())
    told = crosstrace(tmp_path, "run", "own.yaml", fails=True)
    assert "'relative'" in told and "'abs' or 'square'" in told and "Traceback" not in told


def test_a_broken_package_is_told(home: Path, tmp_path: Path) -> None:
    about = tmp_path / "site" / "broken-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[crosstrace.extensions]\nbroken = nowhere:RECORDS\n")
    (tmp_path / "own.yaml").write_text((home / "own.yaml").read_text())
    told = crosstrace(tmp_path, "run", "own.yaml", fails=True)
    assert "the extension broken (nowhere:RECORDS) can't be loaded" in told and "Traceback" not in told


def test_a_name_that_no_record_has_is_told_with_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown measure 'squared'; did you mean 'square'"):
        MEASURES["squared"]
    assert "squared" not in MEASURES and [*MEASURES][:4] == ["abs", "square", "taylor", "net"]
    twice = Registry(Measure, "crosstrace.trace.measures:OWN")
    twice.__dict__["_records"] = {"abs": MEASURES["abs"]}
    assert len(twice) == 1 and twice["abs"].sums == "abs"
