"""The page's section on how far the weights moved from the base's."""

from __future__ import annotations

from collections.abc import Mapping

from crosstrace.report import rows as R
from crosstrace.report import words as say
from crosstrace.report.blocks import Cell, Section
from crosstrace.report.mechanism import Columns, table


def drift(results: Mapping) -> Section:
    """Which tensors moved, how far, and how much of the way lies in the shared set."""
    section = Section("drift", "How far the weights moved", command="analyze")
    found = results.get("drift") or {}
    own = lambda part: [
        {"strategy": s, **row} for s in R.strategies(results) for row in (found.get(s) or {}).get(part, ())
    ]
    modules, sets = own("modules"), own("sets")
    if not modules:
        section.absent = "The weights were not compared with the base's"
        return section
    columns: Columns = {
        "Model": lambda r: say.model(r["strategy"]),
        "Where": lambda r: "all" if r["layer"] is None and r["kind"] == "all" else _place(r),
        "Parameters changed": lambda r: Cell(say.plain(r["changed"]), f"of {say.plain(r['size'])}"),
        "Way, of the base's norm": lambda r: say.percent(r["relative"]),
        "Share of the squared way": lambda r: say.percent(r["share"]),
    }
    section.blocks.append(
        table("From the base to the tuned model", R.where(modules, kind="all"), columns, folded=False)
    )
    if sets:
        of_sets: Columns = {
            "Model": columns["Model"],
            "Shared set": lambda r: say.when(r["when"]),
            "Set": lambda r: say.pset(r["set"]),
            "Parameters": lambda r: say.plain(r["size"]),
            "Share of the squared way": lambda r: say.percent(r["energy"]),
            "Over its share of the parameters": lambda r: say.decimal(r["lift"]),
        }
        section.blocks.append(table("How much of the way lies in the shared set", sets, of_sets, folded=False))
    section.blocks.append(table("By layer and kind of tensor", [r for r in modules if r["kind"] != "all"], columns))
    tensors = columns | {
        "Where": lambda r: r["tensor"], "Largest change of a parameter": lambda r: say.plain(r["largest"])
    }  # fmt: skip
    section.blocks.append(table("Every tensor", own("tensors"), tensors))
    return section


def _place(row: Mapping) -> str:
    return row["kind"] if row["layer"] is None else f"layers.{row['layer']}.{row['kind']}"
