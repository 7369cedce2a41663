"""The page's section on how far the weights moved from the base's."""

from __future__ import annotations

from crosstrace.report import rows as R
from crosstrace.report import words as say
from crosstrace.report.blocks import Cell, Section
from crosstrace.report.model_tables import Columns, table
from crosstrace.results.results import Results
from crosstrace.results.sharing import Drift


def drift(results: Results) -> Section:
    """Which tensors moved, how far, and how much of the movement lies in the shared set."""
    section = Section("drift", "How far the weights moved", command="analyze")
    modules = R.strategy_rows(results, {name: tables.modules for name, tables in results.drift.items()})
    sets = R.strategy_rows(results, {name: tables.sets for name, tables in results.drift.items()})
    if not modules:
        section.absent = "The weights were not compared with the base's"
        return section
    columns: Columns = {
        "Model": lambda r: say.model(r.strategy),
        "Where": lambda r: "all" if r.layer is None and r.kind == "all" else _tensor_kind(r),
        "Parameters changed": lambda r: Cell(say.plain(r.changed), f"of {say.plain(r.size)}"),
        "Way, of the base's norm": lambda r: say.percent(r.relative),
        "Share of the squared way": lambda r: say.percent(r.share),
    }
    section.blocks.append(
        table("From the base to the tuned model", R.where(modules, kind="all"), columns, folded=False)
    )
    if sets:
        of_sets: Columns = {
            "Model": columns["Model"],
            "Shared set": lambda r: say.when(r.when),
            "Set": lambda r: say.pset(r.set),
            "Parameters": lambda r: say.plain(r.size),
            "Share of the squared way": lambda r: say.percent(r.energy),
            "Over its share of the parameters": lambda r: say.decimal(r.lift),
        }
        section.blocks.append(table("How much of the way lies in the shared set", sets, of_sets, folded=False))
    section.blocks.append(table("By layer and kind of tensor", [r for r in modules if r.kind != "all"], columns))
    tensors = R.strategy_rows(results, {name: tables.tensors for name, tables in results.drift.items()})
    of_tensors = columns | {
        "Where": lambda r: r.tensor, "Largest change of a parameter": lambda r: say.plain(r.largest)
    }  # fmt: skip
    section.blocks.append(table("Every tensor", tensors, of_tensors))
    return section


def _tensor_kind(row: Drift) -> str:
    """A layer's kind of tensor, e.g. layers.2.attention.q."""
    return row.kind if row.layer is None else f"layers.{row.layer}.{row.kind}"
