"""A run's results as flat rows, one list a figure: what a figure draws and what its CSV holds.

It only reorders: every number stands in results.json, and is None where it is missing there.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from crosstrace.report.words import number
from crosstrace.results import base
from crosstrace.results.mechanism import Circuit, Dynamics, MinimalGraft
from crosstrace.results.results import Results

T = TypeVar("T")
AnyRow = TypeVar("AnyRow", bound=base.Row)
HEADLINE = 0.05  # captions, maps and tables are about the fraction nearest to this one
KNOWN_ORDER = ("mixed", "two_stage", "qa_first", "bio_only", "qa_only")  # each keeps its colour in every report


@dataclass(frozen=True)
class RecallRow:
    """A model's recall on a test; over all relations where `relation` is empty."""

    model: str
    test: str
    relation: str
    exact_match: float | None
    low: float | None
    high: float | None
    n: int
    first_token: float | None
    logprob: float | None
    normalized_match: float | None = None
    f1: float | None = None
    contains: float | None = None


@dataclass(frozen=True)
class HistoryRow:
    """Recall of a test while training; updates are counted over all phases."""

    strategy: str
    update: int
    phase: str
    test: str
    value: float | None
    n: int | None


@dataclass(frozen=True)
class MapRow:
    """The share of a module's parameters that a set holds."""

    strategy: str
    when: str
    task: str
    fraction: float
    layer: str
    kind: str
    share: float | None


@dataclass(frozen=True)
class UnitRow:
    """The shares of the parameters of a layer's units that the shared set holds."""

    strategy: str
    when: str
    fraction: float
    unit: str
    layer: str
    values: list[float | None]


@dataclass(frozen=True)
class InterventionRow:
    """Exact match on a test with a set ablated or grafted."""

    strategy: str
    kind: str
    when: str
    fraction: float
    set: str
    size: int
    seeds: int
    test: str
    n: int | None
    value: float | None
    low: float | None
    high: float | None


def recall_rows(results: Results) -> list[RecallRow]:
    """Every model's recall on every test, over all relations and by relation."""
    rows = []
    for model, recall in results.recall.items():
        cells = [(test, "", cell) for test, cell in recall.rest.items()]
        for relation, by_test in recall.relations.items():
            cells += [(test, relation, cell) for test, cell in by_test.items()]
        rows += [RecallRow(model, test, relation, **dict(cell)) for test, relation, cell in cells]
    return rows


def history_rows(results: Results) -> list[HistoryRow]:
    """Recall while training, a row for each test."""
    return [
        HistoryRow(point.strategy, point.update, point.phase, test, value, (point.n or {}).get(test))
        for points in results.history.values()
        for point in points
        for test, value in point.rest.items()
    ]


def strategy_rows(results: Results, table: Mapping[str, Sequence[AnyRow]]) -> list[AnyRow]:
    """The rows of all strategies, in the order of their colours."""
    return [row for strategy in strategies(results) for row in table.get(strategy) or []]


def model_rows(results: Results, table: Mapping[str, Sequence[AnyRow]]) -> list[AnyRow]:
    """The rows of all models, the base's first."""
    return [row for model in ["base", *strategies(results)] for row in table.get(model) or []]


def table_rows(results: Results, records: Mapping[str, Circuit | MinimalGraft | Dynamics], table: str) -> list[Any]:
    """The rows of one table of every model's record, the base's first."""
    return model_rows(results, {model: getattr(record, table) for model, record in records.items()})


def map_rows(results: Results) -> list[MapRow]:
    """A row for each kind of module of a layer."""
    return [
        MapRow(grid.strategy, grid.when, grid.task, grid.fraction, layer, kind, share)
        for grid in strategy_rows(results, results.maps)
        for layer, values in zip(grid.rows, grid.values)
        for kind, share in zip(grid.columns, values)
    ]


def unit_rows(results: Results) -> list[UnitRow]:
    """A row for each layer."""
    return [
        UnitRow(grid.strategy, grid.when, grid.fraction, grid.unit, layer, values)
        for grid in strategy_rows(results, results.units)
        for layer, values in zip(grid.rows, grid.values)
    ]


def intervention_rows(results: Results, kind: str) -> list[InterventionRow]:
    """A row for each test of each set; kind: ablate or graft."""
    rows = []
    for strategy, interventions in results.interventions.items():
        tuned = interventions.untouched.tuned if interventions.untouched is not None else {}
        for point in interventions.ablate if kind == "ablate" else interventions.graft:
            about = (strategy, kind, point.when, point.fraction, point.set, point.size, point.seeds)
            for test in point.parts:
                ends = (point.rest[test], point.rest[f"{test}_low"], point.rest.get(f"{test}_high"))
                rows.append(InterventionRow(*about, test, tuned[test].n if test in tuned else None, *ends))
    return rows


def strategies(results: Results) -> list[str]:
    """Every strategy that any part of the results names, in the order of `in_order`."""
    parts: list[Iterable[str]] = [results.run.strategies if results.run is not None else {}]
    parts += [results.training, results.history, results.shared, results.similarity, results.centralization]
    parts += [results.maps, results.units, results.interventions, (m for m in results.recall if m != "base")]
    return in_order(name for part in parts for name in part)


def in_order(names: Iterable[str]) -> list[str]:
    """Strategies, each once, the known ones first: also the order of colours."""
    unique = list(dict.fromkeys(names))
    return [name for name in KNOWN_ORDER if name in unique] + [name for name in unique if name not in KNOWN_ORDER]


def value(row: Any, name: str) -> Any:
    """The value under a name: an attribute, a key that the run named, or a column of a study's table.

    Raises:
        AttributeError: such a row has no such attribute.
    """
    if isinstance(row, Mapping):
        return row.get(name)
    if isinstance(row, base.Open) and name not in type(row).model_fields and not hasattr(type(row), name):
        return row.rest.get(name)
    return getattr(row, name)


def series(row: Any) -> str:
    """The model or strategy that a row is of."""
    return row.model if hasattr(row, "model") else row.strategy


def distinct(rows: Iterable[Any], name: str) -> list:
    """The values under a name, each once, in order of appearance."""
    values = (value(row, name) for row in rows)
    return list(dict.fromkeys(item for item in values if item is not None))


def where(rows: Iterable[T], **wanted: Any) -> list[T]:
    """The rows that have every wanted value; a wanted None is ignored."""
    values = {name: item for name, item in wanted.items() if item is not None}
    return [row for row in rows if all(value(row, name) == item for name, item in values.items())]


def held_out_first(tests: Sequence[str], results: Results) -> list[str]:
    """Tests in the order of interest: the outcome, other held-out ones, trained ones, others, what the base knew."""
    last, outcome = ("a_ood", "known", "known_replayed"), results.roles.outcome

    def rank(test: str) -> tuple[bool, ...]:
        return test in last, test != outcome, not test.endswith("_ood"), not test.endswith("_id")

    return sorted(tests, key=rank)


def headline(rows: Iterable[Any]) -> float | None:
    """The fraction nearest to HEADLINE on a log scale."""
    fractions = [fraction for fraction in distinct(rows, "fraction") if number(fraction) > 0]
    return min(fractions, key=lambda fraction: abs(math.log(fraction / HEADLINE)), default=None)


def plain(row: Any) -> dict[str, Any]:
    """A row's columns."""
    if isinstance(row, base.Row):
        return row.as_row()
    if isinstance(row, base.Record):
        return row.as_values()
    return dict(row) if isinstance(row, Mapping) else dataclasses.asdict(row)


def to_csv(rows: Sequence[Any]) -> str:
    """CSV with every column that any row has; None and NaN are empty cells, floats keep all their digits.

    The list under `values` becomes one column a unit, named by the unit's number.
    """
    columns_of = [plain(row) for row in rows]
    flat = [{**columns, **dict(enumerate(columns.get("values", ())))} for columns in columns_of]
    columns = [name for name in dict.fromkeys(name for row in flat for name in row) if name != "values"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    cells = ((row.get(name) for name in columns) for row in flat)
    writer.writerows([None if item != item else item for item in line] for line in cells)  # item != item: NaN
    return out.getvalue()
