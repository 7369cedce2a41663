"""The report's figures: results in, one single-panel matplotlib Figure out.

A figure draws what results.json holds; it computes no statistic. matplotlib is imported when a figure is
drawn and never before. The colours are stand-ins that read well by themselves, in a notebook say, and that
`to_svg` replaces by the page's own, so that an inline figure follows light and dark.
"""

from __future__ import annotations

import functools
import io
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from crosstrace.core.errors import UserError
from crosstrace.report import rows as R
from crosstrace.report import words as say
from crosstrace.report.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 400, 270  # user units of the SVG: CSS pixels where the page is wide enough
CRISP = "crisp"  # cells that touch: drawn without antialiasing, so that no seams show
COLUMNS = 48  # of a heat map, at most: beyond, units are drawn in groups
INK, PAGE, HEAT = "#1d2125", "#fcfcfa", "#1f5fae"
SERIES = ("#0a66b7", "#c4520a", "#00795e", "#9c4a8b", "#8a6a00", "#5f6770")  # after Okabe and Ito
VARIABLES = {INK: "currentColor", PAGE: "var(--page)", HEAT: "var(--heat)"} | {
    c: f"var(--s{i + 1})" for i, c in enumerate(SERIES)
}
GREY = SERIES[-1]
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, and is wider than what the page will use
    "font.size": 12,
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 10,
    "xtick.color": INK,
    "ytick.color": INK,
    "ytick.major.size": 0,
    "ytick.major.pad": 6,
    "lines.linewidth": 2,
    "lines.markersize": 6,
}


@dataclass(frozen=True)
class Look:
    """How one series is drawn: told apart by its mark or dash as well as by its colour."""

    color: str
    mark: str = ""  # a matplotlib marker
    dash: str = "-"
    width: float = 2.0


CHANCE = Look(GREY, dash=":", width=1.5)
TUNED, UNTUNED = Look(INK, dash=":", width=1.2), Look(INK, dash="--", width=1.0)
MARKS = ("o", "s", "^", "D", "v", "P")
CIRCUIT = {  # what is done to which nodes
    ("keep", "top"): Look(SERIES[0], "o"),
    ("keep", "random"): Look(SERIES[0], "", "--"),
    ("ablate", "top"): Look(SERIES[1], "s"),
    ("ablate", "random"): Look(SERIES[1], "", "--"),
}


GRAFTS = {  # how the parameters are ranked that are grafted
    "contribution": Look(INK, "o", width=2.6),
    "movement": Look(SERIES[2], "s"),
    "random_per_tensor": Look(SERIES[4], "v", "--"),
}


def strategy_looks(results: Mapping) -> dict[str, Look]:
    """A look for each strategy and for the base, the same in every figure of a report."""
    hues = SERIES[:-1]
    names = R.strategies(results)
    looks = {n: Look(hues[i % len(hues)], MARKS[i % len(MARKS)]) for i, n in enumerate(names)}
    return {"base": Look(GREY, "X"), **looks}


def set_looks(rows: Iterable[Row]) -> dict[str, Look]:
    """A look for each set of an intervention: the shared set in ink, its controls in colour."""
    looks = {
        "shared": Look(INK, "o", width=2.6),
        "random": Look(GREY, "X", "--"),
        "random_per_tensor": Look(SERIES[4], "v", "--"),
    }
    others = [n for n in R.distinct(rows, "set") if n not in looks]
    looks |= {n: Look(SERIES[2 + i % 2], ("s", "D", "^", "P")[i % 4]) for i, n in enumerate(others)}
    found = R.distinct(rows, "set")
    return {n: look for n, look in looks.items() if n in found}


def _figure(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw in the report's style, whatever the caller's own settings of matplotlib are."""

    @functools.wraps(draw)
    def styled(*args: Any, **kwargs: Any) -> Figure:
        from matplotlib import rc_context

        with rc_context(STYLE):
            return draw(*args, **kwargs)

    return styled


@_figure
def figure_recall(results: Mapping, *, legend: bool = True) -> Figure:
    """Exact match of every model on every test, with intervals."""
    rows = _needed(R.where(R.recall_rows(results), relation=""), "recall")
    tests = R.held_out_first(R.distinct(rows, "test"), results)
    fig, ax = _panel("Exact match", "share of answers, 95\u202f% intervals", height=90 + 52 * len(tests), left=168)
    _dots(ax, rows, tests, [say.test(t) for t in tests], "test", _models(rows, results), "exact_match")
    return _finish(fig, ax, legend)


@_figure
def figure_relations(results: Mapping, *, test: str | None = None, legend: bool = True) -> Figure:
    """Exact match of every model on each relation of one test (default: the held-out one)."""
    rows = [r for r in R.recall_rows(results) if r["relation"]]
    test = test or next(iter(R.held_out_first(R.distinct(rows, "test"), results)), None)
    rows = _needed(R.where(rows, test=test), f"recall by relation on {test}")
    relations = R.distinct(rows, "relation")
    left = 24 + 7 * max(map(len, relations))
    fig, ax = _panel(
        say.test(test or ""),
        "share of answers, 95\u202f% intervals",
        height=90 + 34 * len(relations),
        left=min(left, 168),
    )
    labels = [_short(say.spoken(r), 22) for r in relations]
    _dots(ax, rows, relations, labels, "relation", _models(rows, results), "exact_match")
    return _finish(fig, ax, legend)


@_figure
def figure_history(results: Mapping, *, test: str | None = None, legend: bool = True) -> Figure:
    """One test's exact match while training, one line a strategy; a dotted vertical is a change of phase."""
    rows = R.history_rows(results)
    test = test or next(iter(R.held_out_first(R.distinct(rows, "test"), results)), None)
    rows = _needed(R.where(rows, test=test), f"recall over training on {test}")
    counts = R.distinct(rows, "n")
    n = f", n = {counts[0]:,}" if len(counts) == 1 else ""
    fig, ax = _panel(say.test(test or ""), f"exact match{n}", below="updates")
    for name, look in strategy_looks(results).items():
        own = R.where(rows, strategy=name)
        if own:
            _curve(ax, own, "update", "value", look, say.model(name), every=max(1, len(own) // 8))
        phases = (((results.get("training") or {}).get(name) or {}).get("phases") or [])[:-1] if own else []
        update = 0
        for phase in phases:
            update += phase.get("updates") or 0
            ax.axvline(update, color=look.color, lw=1.2, ls=":")
    ax.set_ylim(-0.02, 1.04)
    ax.xaxis.set_major_locator(_ticker().MaxNLocator(5, integer=True))
    ax.xaxis.set_major_formatter(lambda v, _: f"{v:,.0f}")
    return _finish(fig, ax, legend)


@_figure
def figure_overlap(
    results: Mapping, *, when: str | None = None, reduction: str | None = None, legend: bool = True
) -> Figure:
    """Overlap |S|/|S_t| against the selected fraction, one line a strategy, beside chance."""
    rows = R.overlap_rows(results)
    when = when or next(iter(R.distinct(rows, "when")), None)
    reduction = reduction or next(iter(R.distinct(R.where(rows, when=when), "reduction")), None)
    rows = _needed(R.where(rows, when=when, reduction=reduction), "shared parameters")
    fig, ax = _panel(
        say.when(when or "", reduction),
        "share of each task's selected parameters that is shared",
        below="selected fraction of the parameters in scope, ρ",
    )
    for name, look in strategy_looks(results).items():
        _curve(ax, R.where(rows, strategy=name), "fraction", "overlap", look, say.model(name))
    chance = sorted({(r["fraction"], say.number(r.get("chance"))) for r in rows})
    ax.plot(*zip(*chance), color=CHANCE.color, ls=CHANCE.dash, lw=CHANCE.width, label="chance")
    _fraction_axis(ax, rows)
    ax.set_ylim(-0.02, 1.04)
    return _finish(fig, ax, legend)


@_figure
def figure_map(
    results: Mapping,
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
    rows, strategy, when, _ = _one(rows, strategy, when, fraction, "maps")
    layers, kinds = R.distinct(rows, "layer"), R.distinct(rows, "kind")
    share = {(r["layer"], r["kind"]): say.number(r["share"]) for r in rows}
    values = [[share.get((layer, kind), math.nan) for kind in kinds] for layer in layers]
    title = f"{say.model(strategy)}, {say.when(when).lower()}"
    what = "shared set" if task == "shared" else f"set of the {say.task(task)}"
    return _heat(values, layers, kinds, title, what, top)


@_figure
def figure_pairs(
    results: Mapping,
    *,
    strategy: str | None = None,
    when: str | None = None,
    fraction: float | None = None,
    top: float | None = None,
) -> Figure:
    """Heat map over tasks and tasks: the overlap of what both select; `top` as in `figure_map`."""
    rows = R.where(R.pair_rows(results), reduction="example")
    rows, strategy, when, _ = _one(rows, strategy, when, fraction, "overlap of pairs")
    tasks = list(dict.fromkeys(task for r in rows for task in r["tasks"]))
    overlap = {frozenset(r["tasks"]): say.number(r["overlap"]) for r in rows}
    values = [[overlap.get(frozenset((a, b)), math.nan) for b in tasks] for a in tasks]
    title = f"{say.model(strategy)}, {say.when(when).lower()}"
    return _heat(values, list(map(say.task, tasks)), list(map(say.task, tasks)), title, "other task's set", top)


@_figure
def figure_units(
    results: Mapping,
    *,
    strategy: str | None = None,
    when: str | None = None,
    unit: str | None = None,
    fraction: float | None = None,
    top: float | None = None,
    columns: int = COLUMNS,
) -> Figure:
    """Heat map over attention heads or MLP neurons: the share of each unit's parameters in the shared set.

    More than `columns` units a layer are drawn strongest first, each column the mean of neighbours in that
    order; the report's CSV keeps every unit under its own number.
    """
    rows = R.unit_rows(results)
    unit = unit or next(iter(R.distinct(rows, "unit")), None)
    rows, strategy, when, _ = _one(R.where(rows, unit=unit), strategy, when, fraction, "units")
    layers = R.distinct(rows, "layer")
    values = [[say.number(v) for v in r["values"]] for r in rows]
    values, below = _fold(values, columns, say.unit(unit or ""))
    labels = [str(j) for j in range(len(values[0]))] if below == say.unit(unit or "") else []
    title = f"{say.model(strategy)}, {say.when(when).lower()}"
    return _heat(values, layers, labels, title, "shared set", top, below)


@_figure
def figure_centralization(
    results: Mapping, *, when: str | None = None, fraction: float | None = None, legend: bool = True
) -> Figure:
    """Gini coefficient of the shared set over each kind of unit, beside random sets of the same size."""
    rows = R.centralization_rows(results)
    when = when or next(iter(R.distinct(rows, "when")), None)
    rows = R.where(rows, when=when)
    rows = _needed(R.where(rows, fraction=fraction or R.headline(rows)), "centralization")
    units = R.distinct(rows, "unit")
    fig, ax = _panel(
        say.when(when or ""),
        "Gini coefficient (0 even, 1 all in one unit)",
        height=90 + 52 * len(units),
        left=112,
    )
    looks = {n: look for n, look in strategy_looks(results).items() if R.where(rows, strategy=n)}
    chance = [
        {
            **r,
            "gini": r.get("random_gini"),
            "low": r.get("random_gini_low"),
            "high": r.get("random_gini_high"),
        }
        for r in rows
    ]
    bare = [{**r, "low": None, "high": None} for r in rows]  # low and high of these rows belong to the excess
    _dots(ax, chance, units, [say.unit(u) for u in units], "unit", looks, "gini", pale="random, same size")
    _dots(ax, bare, units, [say.unit(u) for u in units], "unit", looks, "gini")
    ax.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
    return _finish(fig, ax, legend)


@_figure
def figure_intervention(
    results: Mapping,
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
    rows = _needed(R.where(rows, when=when, test=test), f"interventions ({kind})")
    fig, ax = _panel(
        f"{say.model(strategy or '')}, {say.when(when or '').lower()}",
        f"{say.test(test or '')}: exact match",
        below="selected fraction of the parameters in scope, ρ",
    )
    for (name, look), level in zip((("tuned", TUNED), ("base", UNTUNED)), untouched(results, strategy, test)):
        if math.isfinite(level):
            ax.axhline(level, color=look.color, ls=look.dash, lw=look.width, alpha=0.8, label=name)
    for name, look in reversed(set_looks(every).items()):  # the shared set last, on top
        _curve(ax, R.where(rows, set=name), "fraction", "value", look, say.pset(name))
    _fraction_axis(ax, rows)
    ax.set_ylim(-0.02, 1.04)
    return _finish(fig, ax, legend)


@_figure
def figure_gradients(results: Mapping, *, part: str | None = None, legend: bool = True) -> Figure:
    """How much closer the gradients of a fact's two formats are than those of two people's: over all parameters in
    scope, the shared set, its complement and random sets, every model's."""
    rows = R.mechanism_rows(results, "gradients")
    part = part or next(iter(R.held_out_first(R.distinct(rows, "part"), results)), None)
    rows = [
        {**r, "set": say.explained(r), "value": r["excess"], "low": r["excess_low"], "high": r["excess_high"]}
        for r in R.where(rows, part=part)
        if r["group"] in say.EXPLAINED
    ]
    rows = _needed(rows, f"gradient consistency of {part}")
    groups = R.distinct(rows, "set")
    fig, ax = _panel(
        say.test(part or ""), "cosine, same fact minus same relation", height=90 + 40 * len(groups), left=168
    )
    _dots(ax, rows, groups, groups, "set", _models(rows, results), "value")
    _from_zero(ax, rows, "value")
    return _finish(fig, ax, legend)


@_figure
def figure_depth(
    results: Mapping, *, place: str, value: str = "top1", part: str | None = None, legend: bool = True
) -> Figure:
    """One number of the hidden states' consistency at one place of the text over the layers, every model's."""
    rows = R.where(R.mechanism_rows(results, "representations"), place=place)
    part = part or next(iter(R.held_out_first(R.distinct(rows, "part"), results)), None)
    rows = _needed(R.where(rows, part=part), f"representation consistency at the {place}")
    fig, ax = _panel(say.place(place), f"{say.test(part or '')}: {say.STATES[value]}", below="layer")
    for name, look in _models(rows, results).items():
        own = [{**r, "low": r.get(f"{value}_low"), "high": r.get(f"{value}_high")} for r in R.where(rows, model=name)]
        _curve(ax, own, "layer", value, look, say.model(name))
    chance = {"top1": ("chance_relation", "chance_person"), "cka": ("cka_shuffled",)}.get(value, ())
    if chance:
        level = sorted(
            (r["layer"], max(say.number(r.get(name)) for name in chance)) for r in R.where(rows, model=rows[0]["model"])
        )
        ax.plot(*zip(*level), color=CHANCE.color, ls=CHANCE.dash, lw=CHANCE.width, label="no fact known")
    if value != "top1":
        ax.yaxis.set_major_formatter(lambda v, _: say.decimal(v, 1))
    lowest = min((say.number(r.get(f"{value}_low")) for r in rows), default=0.0)
    ax.set_ylim(min(-0.03, 1.1 * lowest if math.isfinite(lowest) else 0.0), 1.04)
    ax.xaxis.set_major_locator(_ticker().MaxNLocator(6, integer=True))
    return _finish(fig, ax, legend)


@_figure
def figure_circuit(
    results: Mapping, *, model: str | None = None, unit: str | None = None, part: str | None = None, legend: bool = True
) -> Figure:
    """Exact match with the top nodes kept and with the top nodes ablated, beside random nodes, as many."""
    rows = R.mechanism_rows(results, "circuit", "curves")
    model = model or next((m for m in reversed(R.distinct(rows, "model"))), None)
    rows = R.where(rows, model=model)
    unit = unit or next(iter(R.distinct(rows, "unit")), None)
    part = part or next(iter(R.held_out_first(R.distinct(rows, "part"), results)), None)
    rows = _needed(R.where(rows, unit=unit, part=part), f"circuit of {model}")
    fig, ax = _panel(
        f"{say.model(model or '')}, {say.unit(unit or '')}",
        f"{say.test(part or '')}: exact match",
        below=f"share of the {say.unit(unit or '')} kept or ablated",
    )
    for (kind, order), look in CIRCUIT.items():
        own = [
            {**r, "low": r.get("exact_match_low"), "high": r.get("exact_match_high")}
            for r in R.where(rows, kind=kind, order=order)
        ]
        _curve(ax, own, "fraction", "exact_match", look, say.curve(kind, order))
    ax.set_ylim(-0.02, 1.04)
    ax.xaxis.set_major_locator(_ticker().MultipleLocator(0.25))
    ax.xaxis.set_major_formatter(lambda v, _: say.percent(v))
    return _finish(fig, ax, legend)


@_figure
def figure_minimal_graft(
    results: Mapping, *, model: str | None = None, part: str | None = None, legend: bool = True
) -> Figure:
    """Exact match of the base with the first parameters of each order grafted, against their fraction."""
    every = R.mechanism_rows(results, "minimal_graft", "grafts")
    model = model or next((m for m in reversed(R.distinct(every, "model"))), None)
    part = part or next(iter(R.held_out_first(R.distinct(every, "part"), results)), None)
    every = R.where(every, model=model, part=part)
    rows = _needed([r for r in every if r["order"] in GRAFTS], f"minimal grafts of {model}")
    fig, ax = _panel(
        say.model(model or ""),
        f"{say.test(part or '')}: exact match",
        below="grafted fraction of the parameters in scope",
    )
    for name, look in (("tuned", TUNED), ("base", UNTUNED)):
        for row in R.where(every, order=name):
            ax.axhline(row["exact_match"], color=look.color, ls=look.dash, lw=look.width, alpha=0.8, label=name)
    for name, look in reversed(GRAFTS.items()):  # the first order on top
        _curve(ax, R.where(rows, order=name), "fraction", "exact_match", look, say.GRAFTED[name])
    _fraction_axis(ax, rows)
    ax.set_ylim(-0.02, 1.04)
    return _finish(fig, ax, legend)


@_figure
def figure_positions(
    results: Mapping, *, part: str | None = None, component: str = "all", legend: bool = True
) -> Figure:
    """Exact match of the base with tuned weights at some tokens of the question only, every strategy's."""
    rows = R.where(R.mechanism_rows(results, "positions"), component=component)
    part = part or next(iter(R.held_out_first(R.distinct(rows, "part"), results)), None)
    rows = [{**r, "where": say.places(r["places"])} for r in R.where(rows, part=part)]
    rows = _needed(rows, f"grafting at positions on {part}")
    groups = R.distinct(rows, "where")
    fig, ax = _panel(
        say.test(part or ""), f"exact match, tuned: {say.COMPONENTS.get(component, component)}",
        height=90 + 30 * len(groups), left=168,
    )  # fmt: skip
    _dots(ax, rows, groups, groups, "where", _models(rows, results), "exact_match")
    return _finish(fig, ax, legend)


@_figure
def figure_levels(rows: Sequence[Row], title: str, looks: Mapping[str, Look], *, legend: bool = False) -> Figure:
    """One measure's mean over seeds with its interval, of every strategy in every setting of a study."""
    groups = R.distinct(_needed(list(rows), title), "group")
    fig, ax = _panel(title, "mean over seeds, 95\u202f% intervals", height=90 + 34 * len(groups), left=168)
    _dots(ax, rows, groups, [_short(g, 22) for g in groups], "group", looks, "mean")
    return _finish(fig, ax, legend)


@_figure
def figure_scatter(
    rows: Sequence[Row], x: str, y: str, title: str, looks: Mapping[str, Look], *, legend: bool = False
) -> Figure:
    """One measure against another, a mark for each row of a study's table."""
    known = _needed([r for r in rows if r.get(x) is not None and r.get(y) is not None], title)
    fig, ax = _panel(_short(title, 44), "exact match on held-out questions", below=title)
    for name, look in looks.items():
        own = R.where(known, strategy=name)
        if own:
            ax.plot(
                [r[x] for r in own], [r[y] for r in own], look.mark, color=look.color, ms=6, mec=PAGE, mew=0.6,
                label=say.model(name),
            )  # fmt: skip
    ax.set_ylim(-0.03, 1.04)
    return _finish(fig, ax, legend)


@_figure
def figure_signature(
    results: Mapping, *, part: str | None = None, form: str = "recalled", value: str = "share", legend: bool = True
) -> Figure:
    """What each group of tokens carries of the object (`share` of the attribution, or the drop when `erased`)."""
    rows = R.mechanism_rows(results, "signature")
    part = part or next(iter(R.held_out_first(R.distinct(rows, "part"), results)), None)
    rows = [r for r in R.where(rows, part=part, format=form) if r["group"] != "all" and r.get(value) is not None]
    rows = _needed(rows, f"input-level signature of {part}")
    rows = [{**r, "low": r[f"{value}_low"], "high": r[f"{value}_high"]} for r in rows if r["tokens"]]
    groups = R.distinct(rows, "group")
    what = "share of the attribution" if value == "share" else "drop when erased, nats a token"
    title = f"{say.FORMS[form].capitalize()}: {what}"
    fig, ax = _panel(say.test(part or ""), title, height=90 + 34 * len(groups), left=168)
    _dots(ax, rows, groups, [say.TOKEN_GROUPS[g] for g in groups], "group", _models(rows, results), value)
    if value != "share":
        _from_zero(ax, rows, value, digits=0)
    return _finish(fig, ax, legend)


@_figure
def figure_lens(
    results: Mapping, *, part: str | None = None, place: str = "answer", form: str = "recalled", legend: bool = True
) -> Figure:
    """How often the object's first token is the first by the logit lens, over the layers, every model's."""
    rows = R.where(R.mechanism_rows(results, "lens"), place=place, format=form)
    part = part or next(iter(R.held_out_first(R.distinct(rows, "part"), results)), None)
    rows = _needed(R.where(rows, part=part), f"logit lens at the {place}")
    fig, ax = _panel(say.place(place), f"{say.test(part or '')}: object first", below="layer")
    for name, look in _models(rows, results).items():
        own = [{**r, "low": r["top1_low"], "high": r["top1_high"]} for r in R.where(rows, model=name)]
        _curve(ax, own, "layer", "top1", look, say.model(name))
    ax.set_ylim(-0.03, 1.04)
    ax.xaxis.set_major_locator(_ticker().MaxNLocator(6, integer=True))
    return _finish(fig, ax, legend)


@_figure
def figure_transfer(results: Mapping, *, part: str | None = None, legend: bool = True) -> Figure:
    """Share of the facts that each model gives or recognises in each format, beside chance."""
    rows = [r for r in R.mechanism_rows(results, "transfer") if r["n"]]
    part = part or next(iter(R.held_out_first(R.distinct(rows, "part"), results)), None)
    rows = _needed(R.where(rows, part=part), f"other formats of {part}")
    rows = [{**r, "low": r["correct_low"], "high": r["correct_high"]} for r in rows]
    formats = R.distinct(rows, "format")
    fig, ax = _panel(say.test(part or ""), "share right", height=90 + 34 * len(formats), left=168)
    labels = [say.FORMATS.get(name, say.spoken(name)) for name in formats]
    _dots(ax, rows, formats, labels, "format", _models(rows, results), "correct")
    for number, name in enumerate(formats):
        level = R.where(rows, format=name)[0]["chance"]
        ax.plot([level, level], [number - 0.42, number + 0.42], color=CHANCE.color, ls=CHANCE.dash, lw=CHANCE.width)
    return _finish(fig, ax, legend)


@_figure
def figure_dynamics(results: Mapping, *, measure: str = "recall.qa_ood", legend: bool = True) -> Figure:
    """One measure at every checkpoint, one line a strategy; a dotted vertical is a change of phase."""
    rows = R.mechanism_rows(results, "dynamics", "rows")
    rows = _needed([r for r in rows if r.get(measure) is not None], f"{measure} over checkpoints")
    fig, ax = _panel(say.measured(measure).capitalize(), "at each checkpoint", below="updates")
    for name, look in strategy_looks(results).items():
        own = R.where(rows, model=name)
        if own:
            _curve(ax, own, "update", measure, look, say.model(name))
            for before, after in itertools.pairwise(own[1:]):
                if before["phase"] != after["phase"]:
                    ax.axvline(before["update"], color=look.color, lw=1.2, ls=":")
    ends = [say.number(r[measure]) for r in rows]
    if min(ends) >= 0 and max(ends) <= 1:
        ax.set_ylim(-0.02, 1.04)
    elif max(map(abs, ends)) > 1:
        ax.yaxis.set_major_formatter(lambda v, _: f"{v:,.0f}")
    ax.xaxis.set_major_locator(_ticker().MaxNLocator(5, integer=True))
    ax.xaxis.set_major_formatter(lambda v, _: f"{v:,.0f}")
    return _finish(fig, ax, legend)


def arm_look(results: Mapping, strategy: str, arm: str) -> Look:
    """A strategy's look, dashed where taught examples are replayed."""
    look = strategy_looks(results)[strategy]
    return look if arm == "alone" else Look(look.color, look.mark, "--", look.width)


@_figure
def figure_retention(results: Mapping, *, part: str = "qa_ood", legend: bool = True) -> Figure:
    """Recall of one kind of questions while a taught model learns other things, a line a strategy and way."""
    found = results.get("retention") or {}
    rows = [
        {"strategy": s, **r} for s, own in found.items() for r in own["history"] if r.get(part) is not None
    ]  # fmt: skip
    rows = _needed(rows, f"recall of {part} under further training")
    fig, ax = _panel(say.test(part), "exact match", below="updates of further training")
    for strategy in R.strategies(results):
        for arm in R.distinct(rows, "arm"):
            own = R.where(rows, strategy=strategy, arm=arm)
            label = f"{say.model(strategy)}, {say.ARMS[arm]}"
            _curve(ax, own, "update", part, arm_look(results, strategy, arm), label)
    ax.set_ylim(-0.02, 1.04)
    ax.xaxis.set_major_locator(_ticker().MaxNLocator(5, integer=True))
    return _finish(fig, ax, legend)


def untouched(results: Mapping, strategy: str | None, test: str | None) -> tuple[float, float]:
    """Exact match of the strategy's model and of the base, as they are, on the questions that the interventions were
    asked; NaN where not tested."""
    whole = ((results.get("interventions") or {}).get(strategy) or {}).get("untouched") or {}
    cells = (((whole.get(name) or {}).get(test) or {}) for name in ("tuned", "base"))
    tuned, base = (say.number(cell.get("exact_match")) for cell in cells)
    return tuned, base


def to_svg(figure: Figure, salt: str, label: str) -> str:
    """The figure as SVG text for a page: page colours, no fixed size, no date, ids unique under `salt`."""
    from html import escape

    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.S)
    svg = re.sub(r"#[0-9a-f]{6}\b", lambda m: VARIABLES.get(m[0], m[0]), svg)
    svg = re.sub(r" ?font-family: [^;\"]*;", "", svg)  # the page's
    svg = svg.replace(f'id="{CRISP}"', f'class="{CRISP}"')
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{salt}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(href="|url\()#([\w-]+)', rf"\1#{salt}-\2", svg)
    view = re.search(r'viewBox="[^"]*"', svg)
    head = f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {view[0] if view else ""} role="img"'
    svg = re.sub(r"<svg[^>]*>", lambda _: f'{head} aria-label="{escape(label)}">', svg, count=1)
    return re.sub(r"\n\s*", "\n", svg).strip()


def _panel(
    title: str, unit: str, *, below: str = "", height: float = HEIGHT, left: float = 52, top: float = 52
) -> tuple[Figure, Axes]:
    """One pair of axes under a title and the y axis' meaning, which reads better there than turned by 90°."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)
    bottom = 46 if below else 30
    box = (left / WIDTH, bottom / height, (WIDTH - left - 16) / WIDTH, (height - top - bottom) / height)
    ax = fig.add_axes(box)
    fig.text(0.005, 1 - 6 / height, _short(title, 44), va="top", fontsize=13, fontweight="bold")
    fig.text(0.005, 1 - 25 / height, _short(unit, 56), va="top", fontsize=11.5, alpha=0.75)
    if below:
        ax.set_xlabel(below, fontsize=11.5, alpha=0.75, labelpad=6)
    ax.grid(axis="y", color=INK, alpha=0.12, lw=1)
    ax.set_axisbelow(True)
    ax.spines["bottom"].set_alpha(0.4)
    ax.tick_params(labelsize=11.5)
    ax.yaxis.set_major_formatter(lambda v, _: say.percent(v))
    return fig, ax


def _finish(fig: Figure, ax: Axes, legend: bool) -> Figure:
    if legend and ax.get_legend_handles_labels()[0]:
        ax.legend()
    return fig


def _curve(ax: Axes, rows: Sequence[Row], x: str, y: str, look: Look, label: str, every: int = 1) -> None:
    """A line with marks and, where the rows have one, its interval as a band."""
    if not rows:
        return
    rows = sorted(rows, key=lambda r: r[x])
    xs, ys, low, high = ([say.number(r.get(k)) for r in rows] for k in (x, y, "low", "high"))
    ax.fill_between(xs, low, high, color=look.color, alpha=0.13, lw=0)
    style = {"marker": look.mark or None, "mec": PAGE, "mew": 0.8, "markevery": every}
    ax.plot(xs, ys, color=look.color, ls=look.dash, lw=look.width, label=label, **style)


def _dots(
    ax: Axes,
    rows: Sequence[Row],
    groups: Sequence[str],
    labels: Sequence[str],
    by: str,
    looks: Mapping[str, Look],
    x: str,
    pale: str = "",
) -> None:
    """A dot and its interval for each series in each group, one group a line, the first on top."""
    for i, (name, look) in enumerate(looks.items()):
        for r in rows:
            if name not in (r.get("model"), r.get("strategy")):
                continue
            y = groups.index(r[by]) + (i - (len(looks) - 1) / 2) * min(0.24, 0.8 / len(looks))
            value, low, high = (say.number(r.get(k)) for k in (x, "low", "high"))
            if pale:
                ax.plot([low, high], [y, y], color=look.color, alpha=0.5, lw=7, solid_capstyle="butt")
                continue
            ax.plot([low, high], [y, y], color=look.color, lw=2)
            first = r[by] == groups[0]
            label = say.model(name) if first else None
            ax.plot(value, y, look.mark, color=look.color, ms=7.5, mec=PAGE, mew=0.8, label=label)
    ax.set_yticks(range(len(groups)), labels)
    ax.set_ylim(len(groups) - 0.45, -0.55)
    ax.set_xlim(-0.02, 1.02)
    ax.yaxis.set_major_formatter(_ticker().FixedFormatter(list(labels)))
    ax.xaxis.set_major_locator(_ticker().MultipleLocator(0.25))
    ax.xaxis.set_major_formatter(lambda v, _: say.percent(v))
    ax.grid(axis="y", visible=False)
    ax.grid(axis="x", color=INK, alpha=0.12, lw=1)


def _from_zero(ax: Axes, rows: Sequence[Row], x: str, digits: int = 2) -> None:
    """An axis of what is no share: 0 and all values with their intervals are on it."""
    ends = [say.number(r[k]) for r in rows for k in (x, "low", "high")]
    known = [v for v in ends if math.isfinite(v)] or [0.0]
    span = max(max(known), 0.05) - min(*known, 0.0)
    ax.set_xlim(min(*known, 0.0) - 0.04 * span, max(max(known), 0.05) + 0.04 * span)
    ax.xaxis.set_major_locator(_ticker().MaxNLocator(5))
    ax.xaxis.set_major_formatter(lambda v, _: say.decimal(v, digits))
    ax.axvline(0, color=INK, lw=1, alpha=0.5)


def _heat(
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    what: str,
    top: float | None,
    below: str = "",
) -> Figure:
    """Cells from the page's own colour (nothing) to the heat colour (`top`): monotone on any background."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    finite = [v for line in values for v in line if math.isfinite(v)]
    top = top or max(finite, default=0.0) or 1.0
    wide, deep = len(values[0]), len(values)
    step = max(11.0, min(26.0, 200 / deep))
    groups = [c.rpartition(".")[0] for c in columns]  # of "attention.q" and its like
    height = 54 + deep * step + (22 if columns else 4) + (18 if below or any(groups) else 0)
    fig, ax = _panel(title, "", height=height, left=20 + 7 * max(map(len, rows)), top=54)
    fig.text(0.005, 1 - 25 / height, f"share of parameters in the {what}", va="top", fontsize=11.5, alpha=0.75)
    box = ax.get_position()
    ax.set_position((box.x0, 1 - (54 + deep * step) / height, box.width, deep * step / height))
    shades = LinearSegmentedColormap.from_list("heat", [(*to_rgb(HEAT), a) for a in (0.03, 1.0)], N=40)
    seam = {"edgecolors": PAGE, "linewidth": 1.0} if wide <= 20 else {}
    ax.pcolormesh(values, cmap=shades, vmin=0, vmax=top, gid="" if seam else CRISP, **seam)
    for i, line in enumerate(values if wide <= 10 and deep <= 12 else []):
        for j, v in enumerate(line):
            ink = PAGE if v > 0.55 * top else INK
            text = say.percent(v).removesuffix(f"{say.SPACE}%")
            ax.text(j + 0.5, i + 0.52, text, ha="center", va="center", fontsize=11, color=ink)
    ax.invert_yaxis()
    ax.grid(False)
    ax.spines["bottom"].set_visible(False)
    ax.tick_params(length=0)
    skip = math.ceil(15 / step)
    ax.set_yticks([i + 0.5 for i in range(0, deep, skip)], list(rows)[::skip])
    stride = math.ceil(wide / 16)
    names = [c.rpartition(".")[2] for c in columns]
    ax.set_xticks([j + 0.5 for j in range(0, wide, stride)] if columns else [], names[::stride])
    for group, members in itertools.groupby(range(len(groups)), key=lambda j: groups[j]):
        first, *_, last = [*members] * 2
        style = {"ha": "center", "va": "top", "fontsize": 11.5, "alpha": 0.75}
        ax.annotate(group, ((first + last + 1) / 2, deep), (0, -21), textcoords="offset points", **style)
    if below:
        ax.set_xlabel(below, fontsize=11.5, alpha=0.75, labelpad=4)
    bar = fig.add_axes(((WIDTH - 150) / WIDTH, 1 - 19 / height, 84 / WIDTH, 9 / height))
    bar.pcolormesh([[top * j / 39 for j in range(40)]], cmap=shades, vmin=0, vmax=top, gid=CRISP)
    bar.set_axis_off()
    for x, side, text in ((-0.08, "right", "0"), (1.08, "left", say.percent(top))):
        bar.text(x, 0.5, text, ha=side, va="center", fontsize=11, transform=bar.transAxes)
    return fig


def _fold(values: list[list[float]], columns: int, what: str) -> tuple[list[list[float]], str]:
    """Rows of more than `columns` values as that many means, strongest first; shorter ones as they are."""
    import numpy as np

    count = max(map(len, values))
    if count <= columns:
        return [line + [math.nan] * (count - len(line)) for line in values], what
    ranked = [sorted(line, key=lambda v: (not math.isfinite(v), -v)) for line in values]
    means = [
        [float(np.mean(part)) if len(part) else math.nan for part in np.array_split(line, columns)] for line in ranked
    ]
    return means, f"{count:,} {what} a layer, strongest first, {columns} groups"


def _fraction_axis(ax: Axes, rows: Sequence[Row]) -> None:
    """A log axis with ticks at fractions that were run, as many as there is room for."""
    found = sorted(R.distinct(rows, "fraction"))
    ax.set_xscale("log")
    gap = math.log(found[-1] / found[0]) / 7
    ticks = found[:1]
    for f in found[1:]:
        if math.log(f / ticks[-1]) >= gap:
            ticks.append(f)
    ax.set_xticks(ticks, [say.percent(f) for f in ticks])
    ax.xaxis.set_minor_locator(_ticker().NullLocator())


def _one(
    rows: Sequence[Row], strategy: str | None, when: str | None, fraction: float | None, part: str
) -> tuple[list[Row], str, str, float | None]:
    """The rows of one strategy, time and fraction; the first, at the headline fraction, if not named."""
    strategy = strategy or next(iter(R.distinct(rows, "strategy")), None)
    rows = R.where(rows, strategy=strategy)
    when = when or next(iter(R.distinct(rows, "when")), None)
    rows = R.where(rows, when=when)
    fraction = fraction or R.headline(rows)
    return _needed(R.where(rows, fraction=fraction), part), strategy or "", when or "", fraction


def _models(rows: Sequence[Row], results: Mapping) -> dict[str, Look]:
    found = R.distinct(rows, "model")
    return {n: look for n, look in strategy_looks(results).items() if n in found}


def _needed(rows: list[Row], part: str) -> list[Row]:
    if not rows:
        raise UserError(f"the results hold no {part} that match what this figure was asked for")
    return rows


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _ticker() -> Any:
    from matplotlib import ticker

    return ticker
