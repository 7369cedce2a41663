"""What a study's results.json holds."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from crosstrace.core.text_tables import aligned
from crosstrace.data.tasks import Roles
from crosstrace.results.base import Number, Record, ResultsFile
from crosstrace.results.results import part_name, roles_of
from crosstrace.results.run import LeftOut, RunTasks

SCHEMA = 2  # 1 had no tasks, and is read as well


class About(Record):
    """The study."""

    name: str
    """The study's name."""
    runs: int
    """Number of runs."""
    seeds: list[int]
    settings: dict[str, dict[str, Any]]
    """Setting -> what it changes."""
    strategies: dict[str, str]
    """Strategy -> its phases in words."""
    tasks: RunTasks | None = None
    """Which task does what."""
    words: dict[str, str] | None = None
    """What models are called."""
    compare: list[str]
    """The two strategies whose difference is told; empty without two."""
    hours: float
    """Hours of work, all runs together."""
    peak_gib: float
    """Most memory of a run."""


class Level(Record):
    """A measure's mean over seeds."""

    setting: str
    strategy: str
    measure: str
    """Its dotted name; `crosstrace.experiment.summary.measures` lists them all."""
    mean: float
    low: Number
    """Lower end of Student's 95 % interval."""
    high: Number
    """Upper end."""
    seeds: int


class PairedDifference(Record):
    """The first compared strategy minus the second, paired by seed."""

    setting: str
    measure: str
    mean: float
    low: Number
    high: Number
    seeds: int
    above: int
    """Seeds in which it is above 0."""


class Effect(Record):
    """What a point of an axis changes, paired by seed and by the points of the other axes."""

    axis: str
    """Which axis."""
    point: str
    """Which point of it."""
    against: str
    """The axis's first point."""
    strategy: str
    measure: str
    mean: float
    low: Number
    high: Number
    seeds: int
    above: int
    """Seeds in which it is above 0."""


class Prediction(Record):
    """How well a measure that needs no held-out question predicts held-out recall."""

    measure: str
    words: str
    """The measure in words."""
    rows: int
    settings: int
    """Settings in which it was measured."""
    across: Number
    """Rank correlation over all rows."""
    across_low: Number
    across_high: Number
    within: Number
    """Rank correlation within settings."""
    within_low: Number
    within_high: Number
    within_settings: int
    """Settings that enter `within`."""
    strategies: dict[str, Number]
    """Strategy -> rank correlation over its rows."""
    right: Number
    """Share of pairs that the measure puts in the right order."""
    pairs: int
    """Number of pairs."""
    right_low: Number
    right_high: Number


class ClaimOverSeeds(Record):
    """A claim in one setting: its verdicts counted, and its effect's mean over seeds."""

    setting: str
    claim: str
    """The claim's name."""
    text: str
    """The claim."""
    when: str
    fraction: float | None = None
    unit: str
    holds: int
    """Seeds in which it holds."""
    does_not_hold: int
    """Seeds in which it does not."""
    undecided: int
    """Seeds in which nothing can be told."""
    effect: Number
    """Mean effect over seeds."""
    effect_low: Number
    effect_high: Number
    seeds: int


class StudyResults(ResultsFile):
    """The findings of a study."""

    what = "study's results"
    newest = SCHEMA

    schema_: int = Field(default=SCHEMA, alias="schema")
    """Version of this format."""
    study: About
    levels: list[Level] = []
    differences: list[PairedDifference] = []
    effects: list[Effect] = []
    prediction: list[Prediction] = []
    claims: list[ClaimOverSeeds] = []
    left_out: list[LeftOut] = []
    failed: list[str] = []
    """Runs that failed, and why."""
    machine: dict[str, Any] = {}
    """Processor, cores, threads, versions."""
    versions: dict[str, str] = {}
    """Package -> version."""

    @property
    def roles(self) -> Roles:
        """Which task stores, which recalls, and the outcome."""
        return roles_of(self.study.tasks)

    def recall_rows(self) -> list[list[str]]:
        """Held-out recall of every setting and strategy, with intervals over seeds; a header first."""
        strategies, outcome = list(self.study.strategies), self.roles.measure("recall.qa_ood")
        rows = [["exact match, held out", *strategies]]
        for setting in self.study.settings:
            levels = {row.strategy: row for row in self.levels if (row.setting, row.measure) == (setting, outcome)}
            rows.append([setting, *(_with_interval(levels.get(name)) for name in strategies)])
        return rows

    def prediction_rows(self) -> list[list[str]]:
        """What predicts held-out recall; a header first. Nothing with fewer than four settings."""
        if len(self.study.settings) < 4:
            return []
        rows = [["predicts held-out recall", "pairs put right", "rho within settings", "rho over all"]]
        return rows + [
            [row.words, _number(row.right, ".2f"), _number(row.within, "+.2f"), _number(row.across, "+.2f")]
            for row in self.prediction
        ]

    def __str__(self) -> str:
        tables = [aligned(rows) for rows in (self.recall_rows(), self.prediction_rows()) if rows]
        notes = [f"left out: {row.run or 'study'}: {part_name(row)}: {row.reason}" for row in self.left_out]
        return "\n\n".join([*tables, *filter(None, ["\n".join(notes)])])


def _with_interval(level: Level | None) -> str:
    """A mean over seeds with its interval."""
    if level is None:
        return "–"
    return f"{level.mean:.3f}" + (f" [{level.low:.3f}, {level.high:.3f}]" if level.low is not None else "")


def _number(value: Number, form: str) -> str:
    return "–" if value is None else format(value, form)
