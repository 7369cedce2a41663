"""Tables of rows that each belong to a model: their columns, and the key of the figure beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from crosstrace.report import drawing
from crosstrace.report import rows as R
from crosstrace.report import words as say
from crosstrace.report.blocks import Cell, Table
from crosstrace.results.results import Results

Columns = dict[str, Callable[[Any], Cell | str]]  # a table's heads, and what each writes of a row
WORTH = 0.2  # a model that recalls less is not described


def model_of(row: Any) -> str:
    """The name of a row's model."""
    return say.model(row.model)


def models_of(results: Results, rows: Sequence[Any]) -> list[tuple[str, drawing.Look]]:
    """The models of some rows, each with its look: the key of their figure."""
    names = R.distinct(rows, "model")
    return [(say.model(m), look) for m, look in drawing.strategy_looks(results).items() if m in names]


def table(title: str, rows: Sequence[Any], columns: Columns, folded: bool = True) -> Table:
    """A table with a line for each row."""
    return Table(list(columns), [[cell(r) for cell in columns.values()] for r in rows], title, folded)


def by_part(results: Results, title: str, rows: Sequence[Any], columns: Columns) -> list[Table]:
    """A folded table for each kind of questions, the held-out ones first."""
    parts = R.held_out_first(R.distinct(rows, "part"), results)
    return [table(f"{say.test(p)}: {title}", R.where(rows, part=p), columns) for p in parts]


def bounds(row: Any, name: str, form: Callable[[object], str] = say.decimal) -> str:
    """The interval of a row's value, which the row has as `<name>_low` and `<name>_high`."""
    return say.interval(getattr(row, f"{name}_low"), getattr(row, f"{name}_high"), form)
