"""The results of a run: what `results.json` holds, and how it shows itself on a terminal and in a notebook.

This is the one description of the file. `describe` makes docs/results-format.md and the JSON Schema of it.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import Field, model_validator

from crosstrace.core import left_out
from crosstrace.core.text_tables import aligned
from crosstrace.data.tasks import DEFAULT_ROLES, Roles
from crosstrace.results.base import ResultsFile, Row
from crosstrace.results.imported import Import
from crosstrace.results.mechanism import Mechanism
from crosstrace.results.recall import HistoryPoint, Known, ModelRecall, Recall, Retention, Training
from crosstrace.results.run import Doctor, LeftOut, RunInfo, RunTasks
from crosstrace.results.sharing import (
    Centralization,
    Claim,
    Difference,
    DriftTables,
    Interventions,
    ModuleMap,
    Overlap,
    Similarity,
    UnitMap,
)

SCHEMA = 2  # of results.json; 1 had no tasks, pairs, compare and words, and is read as well
PARTS = {
    "bio": "biographies",
    "qa_id": "QA, trained",
    "qa_ood": "QA, held out",
    "a_ood": "QA, known to the base",
    "known": "facts of the world",
    "known_replayed": "facts of the world, replayed",
}


class Results(ResultsFile):
    """A run's results: everything that the report shows. Print it, or let a notebook show it as a table.

    Accuracies are shares (0 to 1); `low` and `high` bound a 95 % interval; a value that is undefined is null. A model
    is `base`, a strategy, or a given model. Given models have neither history nor training.
    """

    what = "results of a run"
    newest = SCHEMA

    schema_: int = Field(default=SCHEMA, alias="schema")
    """Version of this format."""
    run: RunInfo | None = None
    """What was run, on what."""
    lacking: str | None = None
    """Of a run without questions: what cannot be measured, a sentence."""
    import_: Import | None = Field(default=None, alias="import")
    """Of one's own facts or rows: what `crosstrace import` read."""
    recall: dict[str, ModelRecall] = {}
    """Model -> its recall."""
    known: Known | None = None
    """With `eval.known`: facts of the world that the base knew, and what is left of them."""
    history: dict[str, list[HistoryPoint]] = {}
    """Strategy -> recall during training."""
    training: dict[str, Training] = {}
    """Strategy -> what it trained."""
    drift: dict[str, DriftTables] = {}
    """Strategy -> how far its weights moved."""
    shared: dict[str, list[Overlap]] = {}
    """Strategy -> the shared set at every fraction."""
    pairs: dict[str, list[Overlap]] = {}
    """Strategy -> with three or more tasks, the same of each two of them, at the central fractions."""
    similarity: dict[str, list[Similarity]] = {}
    """Strategy -> how alike the tasks' traces are."""
    centralization: dict[str, list[Centralization]] = {}
    """Strategy -> how concentrated the shared set is."""
    maps: dict[str, list[ModuleMap]] = {}
    """Strategy -> where in the modules sets lie."""
    units: dict[str, list[UnitMap]] = {}
    """Strategy -> where in heads and neurons the shared set lies."""
    interventions: dict[str, Interventions] = {}
    """Strategy -> ablation and grafting."""
    mechanism: Mechanism = Field(default_factory=lambda: Mechanism.model_validate({}))
    """How the models recall."""
    retention: dict[str, Retention] = {}
    """Strategy -> what is left after further training."""
    stages: dict[str, dict[str, Any]] = {}
    """Stage of another package -> model -> what it tells (docs/extend.md)."""
    claims: list[Claim] = []
    """The claims with their verdicts."""
    differences: list[Difference] = []
    """Why claims come out differently at two times."""
    doctor: Doctor | None = None
    """What `crosstrace doctor` says of the base."""
    coverage: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    """Strategy -> when -> task -> rule -> share of the parameters traced by it."""
    left_out: list[LeftOut] = []
    """Parts of analyses that failed."""
    seconds: dict[str, float] = {}
    """Stage -> time, all strategies together."""
    versions: dict[str, str] = {}
    """Package -> version."""

    @model_validator(mode="after")
    def _name_rows(self) -> Results:
        """Every row knows whose it is."""
        tables: list[Mapping[str, Any]] = [
            self.history, self.drift, self.shared, self.pairs, self.similarity, self.centralization, self.maps,
            self.units, self.interventions, self.retention,
        ]  # fmt: skip
        tables += [getattr(self.mechanism, name) for name in Mechanism.model_fields]
        for table in tables:
            for model, rows in table.items():
                for row in _rows(rows):
                    row.set_owner(model)
        return self

    @property
    def roles(self) -> Roles:
        """Which task stores, which recalls, and the outcome."""
        return roles_of(self.run.tasks if self.run is not None else None)

    def recall_rows(self) -> list[list[str]]:
        """Exact match of every model on every set of questions, with 95 % Wilson intervals; a header first."""
        if not self.recall:
            return []
        asked = list(next(iter(self.recall.values())).rest)
        order = [*PARTS][:3] + [part for part in asked if part not in PARTS] + [*PARTS][3:]  # the base's own last
        parts = [part for part in order if part in asked]
        rows = [["exact match", *(_part_in_words(part) for part in parts)]]
        rows += [[name, *(_with_interval(recall[part]) for part in parts)] for name, recall in self.recall.items()]
        return rows

    def claim_rows(self) -> list[list[str]]:
        """Every claim with its verdict, effect and interval; a header first."""
        rows = [["claim", "trace", "verdict", "effect [95 % interval]"]]
        return rows + [[claim.text, claim.when, claim.verdict, _effect_in_words(claim)] for claim in self.claims]

    def left_out_lines(self) -> list[str]:
        """A line for each part of an analysis that the run does without, with the reason."""
        return [f"left out: {part_name(row)}: {row.reason}" for row in self.left_out]

    def __str__(self) -> str:
        tables = [aligned(rows) for rows in (self.recall_rows(), self.claim_rows()) if len(rows) > 1]
        notes = [self.lacking or "", "\n".join(self.left_out_lines())]
        return "\n\n".join([*tables, *filter(None, notes)])

    def _repr_html_(self) -> str:
        tables = []
        for rows in (self.recall_rows(), self.claim_rows()):
            if len(rows) < 2:
                continue
            head = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])
            body = "".join(
                "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:]
            )
            tables.append(f"<table><tr>{head}</tr>{body}</table>")
        tables += [f"<p>{html.escape(line)}</p>" for line in filter(None, [self.lacking, *self.left_out_lines()])]
        return "".join(tables) or "no results yet: they come with the stage <code>report</code>"


def roles_of(tasks: RunTasks | None) -> Roles:
    """The roles of a run's tasks; the default ones of a run of an early version."""
    if tasks is None:
        return DEFAULT_ROLES
    return Roles(dict(tasks.roles), tuple(tasks.split), tasks.outcome, tuple(tasks.shared))


def part_name(row: LeftOut) -> str:
    """A part that is left out, e.g. "mixed: mechanism, lens"."""
    return left_out.part_name(row.stage, row.part, row.model)


def _rows(rows: Any) -> Iterable[Row]:
    """The rows of a table, or of all lists of a record of tables."""
    if isinstance(rows, list):
        return rows
    lists = (getattr(rows, name) for name in type(rows).model_fields)
    return [row for rows in lists if isinstance(rows, list) for row in rows]


def _with_interval(recall: Recall) -> str:
    return f"{recall.exact_match:.3f} [{recall.low:.3f}, {recall.high:.3f}]"


def _effect_in_words(claim: Claim) -> str:
    """An effect with its interval and unit."""
    if claim.effect is None:
        return "–"
    digits = 1 if claim.unit == "percentage points" else 3
    effect, low, high = ("–" if v is None else f"{v:+.{digits}f}" for v in (claim.effect, claim.low, claim.high))
    return f"{effect} [{low}, {high}] {claim.unit}"


def _part_in_words(part: str) -> str:
    """A part of the examples, e.g. "QA, held out"."""
    if part in PARTS:
        return PARTS[part]
    for ending, which in (("_id", "trained"), ("_ood", "held out")):
        if part.endswith(ending):
            return f"{part.removesuffix(ending).replace('_', ' ')}, {which}"
    return part.replace("_", " ")
