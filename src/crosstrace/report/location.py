"""The page's sections on where the shared parameters sit: in which modules, heads and neurons, and how centrally."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from crosstrace.report import drawing
from crosstrace.report import figures as F
from crosstrace.report import rows as R
from crosstrace.report import words as say
from crosstrace.report.blocks import Cell, Plot, Section, Table, key
from crosstrace.report.rows import MapRow, UnitRow
from crosstrace.results.results import Results
from crosstrace.results.sharing import Centralization

NamedShares = Callable[[Any], list[tuple[str, object]]]  # a row's modules or units: names and shares


def location(results: Results) -> Section:
    """Where the shared parameters sit: modules, heads, neurons."""
    section = Section("where", "Where they sit", command="analyze")
    rows, units = R.map_rows(results), R.unit_rows(results)
    if not rows and not units:
        section.absent = "The traces were not mapped"
        return section
    if rows:
        section.blocks.append(_map_plot(results, rows))
    for unit in R.distinct(units, "unit"):
        section.blocks.append(_unit_plot(results, R.where(units, unit=unit), unit))
    return section


def _map_plot(results: Results, rows: Sequence[MapRow]) -> Plot:
    """The shared set's share of each layer's modules; each task's set, folded."""
    headline = R.headline(rows)
    at_headline = R.where(rows, fraction=headline)
    tasks = [task for task in R.distinct(at_headline, "task") if task != "shared"]
    shared = R.where(at_headline, task="shared")
    return Plot(
        "map",
        _densest(results, shared, _module_shares) or "Layers and modules.",
        f"Cells show the per cent of a module's parameters that the set of {say.rho(headline)} holds; all "
        "panels have one scale.",
        [],
        _map_panels(results, at_headline, ["shared"], "map"),
        rows,
        folded=_map_panels(results, at_headline, tasks, "task-map"),
        folded_title="Each task's own set",
    )


def _map_panels(results: Results, rows: Sequence[MapRow], tasks: Sequence[str], name: str) -> list[str]:
    """The maps of some tasks' sets at one fraction; those of one task have one scale."""
    label, panels = "Share of each module's parameters in the set, by layer and module", []
    for i, task in enumerate(tasks):
        of_task = R.where(rows, task=task)
        for j, when in enumerate(R.distinct(rows, "when")):
            for k, s in enumerate(R.strategies(results)):
                if R.where(of_task, strategy=s, when=when):
                    figure = F.figure_map(
                        results, strategy=s, when=when, task=task, fraction=rows[0].fraction, top=_top(of_task)
                    )
                    panels.append(drawing.to_svg(figure, f"{name}-{i}-{j}-{k}", label))
    return panels


def _module_shares(row: MapRow) -> list[tuple[str, object]]:
    return [(f"{row.kind} of {row.layer}", row.share)]


def _unit_plot(results: Results, rows: Sequence[UnitRow], unit: str) -> Plot:
    """The shared set's share of each unit: heads or neurons."""
    headline = R.headline(rows)
    fraction = R.headline(_reached(rows)) or headline
    later = "" if fraction == headline else f" At {say.rho(headline)} some model's holds none of them."
    at_fraction = R.where(rows, fraction=fraction)
    name = re.sub(r"\W+", "_", unit)
    label, panels = f"Share of each of the {say.unit(unit)} in the set", []
    for j, when in enumerate(R.distinct(at_fraction, "when")):
        names = [s for s in R.strategies(results) if R.where(at_fraction, strategy=s, when=when)]
        for k, s in enumerate(names):
            figure = F.figure_units(results, strategy=s, when=when, unit=unit, fraction=fraction, top=_top(at_fraction))
            panels.append(drawing.to_svg(figure, f"{name}-{j}-{k}", label))
    one = say.unit(unit).removesuffix("s")

    def unit_shares(row: UnitRow) -> list[tuple[str, object]]:
        return [(f"{one} {j} of {row.layer}", value) for j, value in enumerate(row.values)]

    is_grouped = any(len(row.values) > drawing.COLUMNS for row in rows)
    grouping = " Each layer's are sorted; a column is the mean of a group of them." if is_grouped else ""
    return Plot(
        f"units_{name}",
        _densest(results, at_fraction, unit_shares, f"the median {one}") or say.unit(unit).capitalize() + ".",
        f"Per cent of the parameters of each {one} that the shared set of {say.rho(fraction)} holds; all "
        f"panels have one scale.{grouping}{later}",
        [],
        panels,
        rows,
    )


def centralization(results: Results) -> Section:
    """Whether few units hold most of the shared set, against random sets of its size."""
    section = Section("centralization", "Centralization", command="analyze")
    rows = R.strategy_rows(results, results.centralization)
    if not rows:
        section.absent = "Centralization was not computed"
        return section
    at_headline = R.where(rows, fraction=R.headline(rows))
    names = [s for s in R.strategies(results) if R.where(at_headline, strategy=s)]
    section.blocks += [
        _centralization_plot(results, rows, at_headline, names),
        _centralization_table(rows, at_headline, names),
    ]
    return section


def _centralization_plot(
    results: Results, rows: Sequence[Centralization], at_headline: Sequence[Centralization], names: Sequence[str]
) -> Plot:
    """Gini coefficients beside those of random sets, a panel for each trace."""
    headline, whens, unit = R.headline(rows), R.distinct(rows, "when"), R.distinct(rows, "unit")[0]
    sentences, panels = [], []
    for i, when in enumerate(whens):
        rows_of = {s: R.where(at_headline, strategy=s, when=when, unit=unit) for s in names}
        values = [(say.model(s), say.number(of_model[0].gini)) for s, of_model in rows_of.items() if of_model]
        sentence = say.compare(values, "has a Gini of", f" over {say.unit(unit)}", say.decimal)
        sentences.append(f"{say.when(when)}: {sentence}" if sentence else "")
        figure = F.figure_centralization(results, when=when, fraction=headline, legend=False)
        panels.append(drawing.to_svg(figure, f"central-{i}", say.when(when)))
    return Plot(
        "centralization",
        sentences[0] or "How unevenly the shared set is spread.",
        f"Shared set of {say.rho(headline)}. Pale bars: the range of random sets of the same size. Further right "
        "is more centralized.",
        key((say.model(s), drawing.strategy_looks(results)[s]) for s in names),
        panels,
        rows,
        also=" ".join(sentences[1:]),
    )


def _centralization_table(
    rows: Sequence[Centralization], at_headline: Sequence[Centralization], names: Sequence[str]
) -> Table:
    """Every measure of centralization; a unit is named in its first line only."""
    body, unit_before = [], ""
    order = [(u, w, s) for u in R.distinct(rows, "unit") for w in R.distinct(rows, "when") for s in names]
    for unit, when, s in order:
        matching = R.where(at_headline, strategy=s, when=when, unit=unit)
        if not matching:
            continue
        row = matching[0]
        chance = say.interval(row.random_gini_low, row.random_gini_high, say.decimal)
        body.append(
            [
                Cell(say.unit(unit), f"{say.plain(row.units)} in all") if unit != unit_before else "",
                Cell(say.model(s), say.when(when).lower()),
                Cell(say.decimal(row.gini), f"random {chance}"),
                Cell(say.signed(row.excess_gini), say.interval(row.low, row.high, say.signed)),
                Cell(_count(row.effective), f"random {_count(row.random_effective)}"),
                Cell(say.percent(row.top10), f"random {say.percent(row.random_top10)}"),
            ]
        )
        unit_before = unit
    top10 = f"Held by the top 10{say.SPACE}%"
    head = ["Units", "Model", "Gini", "Gini beyond random", "Effective number", top10]
    return Table(head, body, f"Against random sets of the same size, {say.rho(R.headline(rows))}")


def _densest(results: Results, rows: Sequence[Any], named_shares: NamedShares, median: str = "") -> str:
    """In which module or unit each shared set is densest, by the first trace.

    Args:
        rows: of maps or units, at one fraction.
        named_shares: the names and shares in a row.
        median: what the median share is called; no median if empty.
    """
    first = next(iter(R.distinct(rows, "when")), None)
    parts = []
    for s in R.strategies(results)[:3]:  # the figure shows the others
        cells = [
            (name, say.number(share))
            for row in R.where(rows, strategy=s, when=first)
            for name, share in named_shares(row)
        ]
        cells = [(name, share) for name, share in cells if math.isfinite(share)]
        if not cells:
            continue
        name, most = max(cells, key=lambda cell: cell[1])
        if most == 0:
            parts.append(f"{say.model(s)}'s shared set holds nothing here")
            continue
        middle = f" ({median} {say.percent(statistics.median(share for _, share in cells))})" if median else ""
        parts.append(f"{say.model(s)}'s shared set is densest in {name}, {say.percent(most)}{middle}")
    return f"{say.when(first or '')}: {'; '.join(parts)}." if parts else ""


def _reached(rows: Sequence[UnitRow]) -> list[UnitRow]:
    """The rows of the fractions at which every model's shared set, at every time, holds some of the units."""
    empty = set()
    for fraction in R.distinct(rows, "fraction"):
        largest: dict[tuple[str, str], float] = {}  # share, by strategy and time
        for row in R.where(rows, fraction=fraction):
            view = (row.strategy, row.when)
            positive = [share for share in map(say.number, row.values) if share > 0]
            largest[view] = max([largest.get(view, 0.0), *positive])
        if not all(largest.values()):
            empty.add(fraction)
    return [row for row in rows if row.fraction not in empty]


def _count(value: object) -> str:
    """An effective number: one decimal below a hundred."""
    x = say.number(value)
    return f"{x:,.0f}" if x >= 100 else say.decimal(x, 1)


def _top(rows: Iterable[MapRow | UnitRow]) -> float:
    """The largest share of some rows."""
    shares = (say.number(v) for row in rows for v in (row.values if isinstance(row, UnitRow) else [row.share]))
    return max((v for v in shares if math.isfinite(v)), default=0.0)
