"""The report's figures: results in, one single-panel matplotlib Figure out.

A figure draws what results.json holds; it computes no statistic. matplotlib is imported when a figure is drawn, not
before. The colours read well by themselves, in a notebook for example. In the page, `to_svg` replaces them by the
page's colours, so that a figure follows light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from crosstrace.report import hover
from crosstrace.report import rows as R
from crosstrace.report import words as say
from crosstrace.report.drawing import (
    CHANCE,
    COLUMNS,
    PAGE,
    TUNED,
    UNTUNED,
    Look,
    curve,
    dots,
    finish,
    fold,
    fraction_axis,
    heat,
    in_two_lines,
    load_ticker,
    models_of,
    needed,
    one_view,
    panel,
    set_looks,
    shortened,
    strategy_looks,
    styled,
)
from crosstrace.results.results import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled
def figure_recall(results: Results, *, legend: bool = True) -> Figure:
    """Exact match of every model on every test, with intervals."""
    rows = needed(R.where(R.recall_rows(results), relation=""), "recall")
    tests = R.held_out_first(R.distinct(rows, "test"), results)
    fig, ax = panel("Exact match", "share of answers, 95\u202f% intervals", height=90 + 52 * len(tests), left=168)
    labels = [in_two_lines(say.test(t), 26) for t in tests]
    dots(ax, rows, tests, labels, "test", models_of(rows, results), "exact_match")
    return finish(fig, ax, legend)


@styled
def figure_relations(results: Results, *, test: str | None = None, legend: bool = True) -> Figure:
    """Exact match of every model on each relation of one test (default: the held-out one)."""
    rows = [r for r in R.recall_rows(results) if r.relation]
    test = test or next(iter(R.held_out_first(R.distinct(rows, "test"), results)), None)
    rows = needed(R.where(rows, test=test), f"recall by relation on {test}")
    relations = R.distinct(rows, "relation")
    left = 24 + 7 * max(map(len, relations))
    fig, ax = panel(
        say.test(test or ""),
        "share of answers, 95\u202f% intervals",
        height=90 + 34 * len(relations),
        left=min(left, 168),
    )
    labels = [shortened(say.spoken(r), 22) for r in relations]
    dots(ax, rows, relations, labels, "relation", models_of(rows, results), "exact_match")
    return finish(fig, ax, legend)


@styled
def figure_history(results: Results, *, test: str | None = None, legend: bool = True) -> Figure:
    """One test's exact match while training, one line a strategy; a dotted vertical is a change of phase."""
    rows = R.history_rows(results)
    test = test or next(iter(R.held_out_first(R.distinct(rows, "test"), results)), None)
    rows = needed(R.where(rows, test=test), f"recall over training on {test}")
    counts = R.distinct(rows, "n")
    n = f", n = {counts[0]:,}" if len(counts) == 1 else ""
    fig, ax = panel(say.test(test or ""), f"exact match{n}", below="updates")
    for name, look in strategy_looks(results).items():
        points = R.where(rows, strategy=name)
        if points:
            curve(ax, points, "update", "value", look, say.model(name), every=max(1, len(points) // 8), ends=None)
        phases = results.training[name].phases[:-1] if points and name in results.training else []
        update = 0
        for phase in phases:
            update += phase.updates
            ax.axvline(update, color=look.color, lw=1.2, ls=":")
    ax.set_ylim(-0.02, 1.04)
    ax.xaxis.set_major_locator(load_ticker().MaxNLocator(5, integer=True))
    ax.xaxis.set_major_formatter(lambda v, _: f"{v:,.0f}")
    return finish(fig, ax, legend)


@styled
def figure_overlap(
    results: Results, *, when: str | None = None, reduction: str | None = None, legend: bool = True
) -> Figure:
    """Overlap |S|/|S_t| against the selected fraction, one line a strategy, beside chance."""
    rows = R.strategy_rows(results, results.shared)
    when = when or next(iter(R.distinct(rows, "when")), None)
    reduction = reduction or next(iter(R.distinct(R.where(rows, when=when), "reduction")), None)
    rows = needed(R.where(rows, when=when, reduction=reduction), "shared parameters")
    fig, ax = panel(
        say.when(when or "", reduction),
        "share of each task's selected parameters that is shared",
        below="selected fraction of the parameters in scope, ρ",
    )
    for name, look in strategy_looks(results).items():
        curve(ax, R.where(rows, strategy=name), "fraction", "overlap", look, say.model(name))
    chance = sorted({(r.fraction, say.number(r.chance)) for r in rows})
    ax.plot(*zip(*chance), color=CHANCE.color, ls=CHANCE.dash, lw=CHANCE.width, label="chance")
    fraction_axis(ax, rows)
    ax.set_ylim(-0.02, 1.04)
    return finish(fig, ax, legend)


@styled
def figure_map(
    results: Results,
    *,
    strategy: str | None = None,
    when: str | None = None,
    task: str = "shared",
    fraction: float | None = None,
    top: float | None = None,
) -> Figure:
    """Heat map over layers and module kinds: the share of each module's parameters that the set holds.

    `top` is the value of the full colour, so that several maps can be compared.
    """
    rows = R.where(R.map_rows(results), task=task)
    rows, strategy, when, _ = one_view(rows, strategy, when, fraction, "maps")
    layers, kinds = R.distinct(rows, "layer"), R.distinct(rows, "kind")
    share = {(r.layer, r.kind): say.number(r.share) for r in rows}
    values = [[share.get((layer, kind), math.nan) for kind in kinds] for layer in layers]
    title = f"{say.model(strategy)}, {say.when(when).lower()}"
    what = "shared set" if task == "shared" else f"set of the {say.task(task)}"
    return heat(values, layers, kinds, title, what, top)


@styled
def figure_pairs(
    results: Results,
    *,
    strategy: str | None = None,
    when: str | None = None,
    fraction: float | None = None,
    top: float | None = None,
) -> Figure:
    """Heat map over tasks and tasks: the overlap of what both select; `top` as in `figure_map`."""
    rows = R.where(R.strategy_rows(results, results.pairs), reduction="example")
    rows, strategy, when, _ = one_view(rows, strategy, when, fraction, "overlap of pairs")
    tasks = list(dict.fromkeys(task for r in rows for task in r.tasks or ()))
    overlap = {frozenset(r.tasks or ()): say.number(r.overlap) for r in rows}
    values = [[overlap.get(frozenset((a, b)), math.nan) for b in tasks] for a in tasks]
    title = f"{say.model(strategy)}, {say.when(when).lower()}"
    return heat(values, list(map(say.task, tasks)), list(map(say.task, tasks)), title, "other task's set", top)


@styled
def figure_units(
    results: Results,
    *,
    strategy: str | None = None,
    when: str | None = None,
    unit: str | None = None,
    fraction: float | None = None,
    top: float | None = None,
    columns: int = COLUMNS,
) -> Figure:
    """Heat map over attention heads or MLP neurons: the share of each unit's parameters in the shared set.

    If a layer has more than `columns` units, they are sorted, strongest first, and each column is the mean of
    neighbours. The report's CSV keeps every unit under its number.
    """
    rows = R.unit_rows(results)
    unit = unit or next(iter(R.distinct(rows, "unit")), None)
    rows, strategy, when, _ = one_view(R.where(rows, unit=unit), strategy, when, fraction, "units")
    layers = R.distinct(rows, "layer")
    values = [[say.number(v) for v in r.values] for r in rows]
    values, below = fold(values, columns, say.unit(unit or ""))
    count = len(values[0])
    cells = [f"{say.unit(unit or '').removesuffix('s')} {j}" for j in range(count)]
    labels = [str(j) for j in range(count)] if below == say.unit(unit or "") else []
    cells = cells if labels else [f"group {j + 1} of {count}" for j in range(count)]
    title = f"{say.model(strategy)}, {say.when(when).lower()}"
    return heat(values, layers, labels, title, "shared set", top, below, cells)


@styled
def figure_centralization(
    results: Results, *, when: str | None = None, fraction: float | None = None, legend: bool = True
) -> Figure:
    """Gini coefficient of the shared set over each kind of unit, beside random sets of the same size."""
    rows = R.strategy_rows(results, results.centralization)
    when = when or next(iter(R.distinct(rows, "when")), None)
    rows = R.where(rows, when=when)
    rows = needed(R.where(rows, fraction=fraction or R.headline(rows)), "centralization")
    units = R.distinct(rows, "unit")
    fig, ax = panel(
        say.when(when or ""),
        "Gini coefficient (0 even, 1 all in one unit)",
        height=90 + 52 * len(units),
        left=112,
    )
    looks = {n: look for n, look in strategy_looks(results).items() if R.where(rows, strategy=n)}
    labels, ends = [say.unit(unit) for unit in units], ("random_gini_low", "random_gini_high")
    dots(ax, rows, units, labels, "unit", looks, "random_gini", pale="random, same size", ends=ends)
    dots(ax, rows, units, labels, "unit", looks, "gini", ends=None)  # low and high of these rows are the excess's
    ax.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
    return finish(fig, ax, legend)


@styled
def figure_intervention(
    results: Results,
    *,
    kind: str = "ablate",
    strategy: str | None = None,
    when: str | None = None,
    test: str | None = None,
    legend: bool = True,
) -> Figure:
    """Recall after ablating ("ablate") or grafting ("graft") each set, against the selected fraction."""
    every = R.intervention_rows(results, kind)
    strategy = strategy or next((s for s in R.strategies(results) if R.where(every, strategy=s)), None)
    rows = R.where(every, strategy=strategy)
    when = when or next(iter(R.distinct(rows, "when")), None)
    test = test or next(iter(R.held_out_first(R.distinct(rows, "test"), results)), None)
    rows = needed(R.where(rows, when=when, test=test), f"interventions ({kind})")
    fig, ax = panel(
        f"{say.model(strategy or '')}, {say.when(when or '').lower()}",
        f"{say.test(test or '')}: exact match",
        below="selected fraction of the parameters in scope, ρ",
    )
    for (name, look), level in zip((("tuned", TUNED), ("base", UNTUNED)), untouched(results, strategy, test)):
        if math.isfinite(level):
            ax.axhline(level, color=look.color, ls=look.dash, lw=look.width, alpha=0.8, label=name)
    for name, look in reversed(set_looks(every).items()):  # the shared set last, on top
        curve(ax, R.where(rows, set=name), "fraction", "value", look, say.pset(name))
    fraction_axis(ax, rows)
    ax.set_ylim(-0.02, 1.04)
    return finish(fig, ax, legend)


@styled
def figure_levels(
    rows: Sequence[Any], title: str, looks: Mapping[str, Look], *, group: Callable[[Any], str], legend: bool = False
) -> Figure:
    """One measure of every strategy in every setting of a study: its mean over seeds, with its interval.

    `group` gives a row's setting in words.
    """
    groups = list(dict.fromkeys(map(group, needed(list(rows), title))))
    fig, ax = panel(title, "mean over seeds, 95\u202f% intervals", height=90 + 34 * len(groups), left=168)
    dots(ax, rows, groups, [shortened(g, 22) for g in groups], group, looks, "mean")
    return finish(fig, ax, legend)


@styled
def figure_scatter(
    rows: Sequence[Any], x: str, y: str, title: str, looks: Mapping[str, Look], *, legend: bool = False
) -> Figure:
    """One measure against another, a mark for each row of a study's table."""
    known = needed([row for row in rows if row.get(x) is not None and row.get(y) is not None], title)
    fig, ax = panel(shortened(title, 44), "exact match on held-out questions", below=title)
    for name, look in looks.items():
        points = R.where(known, strategy=name)
        if points:
            ax.plot(
                [r[x] for r in points], [r[y] for r in points], look.mark, color=look.color, ms=6, mec=PAGE, mew=0.6,
                label=say.model(name),
            )  # fmt: skip
            where = [f"{say.model(name)}, {r['setting']}, seed {r['seed']}; {title} {r[x]:.3g}" for r in points]
            hover.note_points(ax, [hover.Point(r[x], r[y], w, r[y]) for r, w in zip(points, where)], ax.yaxis)
    ax.set_ylim(-0.03, 1.04)
    return finish(fig, ax, legend)


def untouched(results: Results, strategy: str | None, test: str | None) -> tuple[float, float]:
    """Exact match of the strategy's model and of the base without intervention; NaN where not tested.

    It is measured on the same questions as the interventions.
    """
    interventions = results.interventions.get(strategy or "")
    if interventions is None or interventions.untouched is None:
        return math.nan, math.nan
    cells = [recall.get(test or "") for recall in (interventions.untouched.tuned, interventions.untouched.base)]
    tuned, base = (math.nan if cell is None else say.number(cell.exact_match) for cell in cells)
    return tuned, base
