"""The report's figures on how the models recall: results in, one single-panel matplotlib Figure out."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

from crosstrace.report import rows as R
from crosstrace.report import words as say
from crosstrace.report.drawing import (
    CHANCE,
    INK,
    SERIES,
    TUNED,
    UNTUNED,
    Look,
    curve,
    dots,
    finish,
    fraction_axis,
    from_zero,
    load_ticker,
    models_of,
    needed,
    panel,
    strategy_looks,
    styled,
)
from crosstrace.results.mechanism import Positions
from crosstrace.results.results import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


@styled
def figure_gradients(results: Results, *, part: str | None = None, legend: bool = True) -> Figure:
    """How much more alike the gradients are for one fact in both formats than for two people's facts.

    A line for each set of parameters: all in scope, the shared set, its complement and random sets.
    """
    rows = R.model_rows(results, results.mechanism.gradients)
    part = part or next(iter(R.held_out_first(R.distinct(rows, "part"), results)), None)
    rows = [row for row in R.where(rows, part=part) if row.group in say.EXPLAINED]
    rows = needed(rows, f"gradient consistency of {part}")
    groups = list(dict.fromkeys(say.explained(row) for row in rows))
    fig, ax = panel(
        say.test(part or ""), "cosine, same fact minus same relation", height=90 + 40 * len(groups), left=168
    )
    ends = ("excess_low", "excess_high")
    dots(ax, rows, groups, groups, say.explained, models_of(rows, results), "excess", ends=ends)
    from_zero(ax, rows, "excess", ends=ends)
    return finish(fig, ax, legend)


@styled
def figure_depth(
    results: Results, *, place: str, value: str = "top1", part: str | None = None, legend: bool = True
) -> Figure:
    """One number of the hidden states' consistency at one place of the text over the layers, every model's."""
    rows = R.where(R.model_rows(results, results.mechanism.representations), place=place)
    part = part or next(iter(R.held_out_first(R.distinct(rows, "part"), results)), None)
    rows = needed(R.where(rows, part=part), f"representation consistency at the {place}")
    fig, ax = panel(say.place(place), f"{say.test(part or '')}: {say.STATES[value]}", below="layer")
    for name, look in models_of(rows, results).items():
        points = R.where(rows, model=name)
        curve(ax, points, "layer", value, look, say.model(name), ends=(f"{value}_low", f"{value}_high"))
    chance = {"top1": ("chance_relation", "chance_person"), "cka": ("cka_shuffled",)}.get(value, ())
    if chance:
        level = sorted(
            (row.layer, max(say.number(getattr(row, name)) for name in chance))
            for row in R.where(rows, model=rows[0].model)
        )
        ax.plot(*zip(*level), color=CHANCE.color, ls=CHANCE.dash, lw=CHANCE.width, label="no fact known")
    if value != "top1":
        ax.yaxis.set_major_formatter(lambda v, _: say.decimal(v, 1))
    lowest = min((say.number(getattr(row, f"{value}_low")) for row in rows), default=0.0)
    ax.set_ylim(min(-0.03, 1.1 * lowest if math.isfinite(lowest) else 0.0), 1.04)
    ax.xaxis.set_major_locator(load_ticker().MaxNLocator(6, integer=True))
    return finish(fig, ax, legend)


@styled
def figure_circuit(
    results: Results, *, model: str | None = None, unit: str | None = None, part: str | None = None, legend: bool = True
) -> Figure:
    """Exact match with the top nodes kept and with the top nodes ablated, beside random nodes, as many."""
    rows = R.table_rows(results, results.mechanism.circuit, "curves")
    model = model or next((m for m in reversed(R.distinct(rows, "model"))), None)
    rows = R.where(rows, model=model)
    unit = unit or next(iter(R.distinct(rows, "unit")), None)
    part = part or next(iter(R.held_out_first(R.distinct(rows, "part"), results)), None)
    rows = needed(R.where(rows, unit=unit, part=part), f"circuit of {model}")
    fig, ax = panel(
        f"{say.model(model or '')}, {say.unit(unit or '')}",
        f"{say.test(part or '')}: exact match",
        below=f"share of the {say.unit(unit or '')} kept or ablated",
    )
    for (kind, order), look in CIRCUIT.items():
        points, ends = R.where(rows, kind=kind, order=order), ("exact_match_low", "exact_match_high")
        curve(ax, points, "fraction", "exact_match", look, say.curve(kind, order), ends=ends)
    ax.set_ylim(-0.02, 1.04)
    ax.xaxis.set_major_locator(load_ticker().MultipleLocator(0.25))
    ax.xaxis.set_major_formatter(lambda v, _: say.percent(v))
    return finish(fig, ax, legend)


@styled
def figure_minimal_graft(
    results: Results, *, model: str | None = None, part: str | None = None, legend: bool = True
) -> Figure:
    """Exact match of the base with the first parameters of each order grafted, against their fraction."""
    every = R.table_rows(results, results.mechanism.minimal_graft, "grafts")
    model = model or next((m for m in reversed(R.distinct(every, "model"))), None)
    part = part or next(iter(R.held_out_first(R.distinct(every, "part"), results)), None)
    every = R.where(every, model=model, part=part)
    rows = needed([r for r in every if r.order in GRAFTS], f"minimal grafts of {model}")
    fig, ax = panel(
        say.model(model or ""),
        f"{say.test(part or '')}: exact match",
        below="grafted fraction of the parameters in scope",
    )
    for name, look in (("tuned", TUNED), ("base", UNTUNED)):
        for row in R.where(every, order=name):
            ax.axhline(row.exact_match, color=look.color, ls=look.dash, lw=look.width, alpha=0.8, label=name)
    for name, look in reversed(GRAFTS.items()):  # the first order on top
        curve(ax, R.where(rows, order=name), "fraction", "exact_match", look, say.GRAFTED[name])
    fraction_axis(ax, rows)
    ax.set_ylim(-0.02, 1.04)
    return finish(fig, ax, legend)


@styled
def figure_positions(
    results: Results, *, part: str | None = None, component: str = "all", legend: bool = True
) -> Figure:
    """Exact match of the base with tuned weights at some tokens of the question only, every strategy's."""
    rows = R.where(R.model_rows(results, results.mechanism.positions), component=component)
    part = part or next(iter(R.held_out_first(R.distinct(rows, "part"), results)), None)
    rows = needed(R.where(rows, part=part), f"grafting at positions on {part}")
    groups = list(dict.fromkeys(map(_tokens_of, rows)))
    fig, ax = panel(
        say.test(part or ""), f"exact match, tuned: {say.COMPONENTS.get(component, component)}",
        height=90 + 30 * len(groups), left=168,
    )  # fmt: skip
    dots(ax, rows, groups, groups, _tokens_of, models_of(rows, results), "exact_match")
    return finish(fig, ax, legend)


def _tokens_of(row: Positions) -> str:
    """Which tokens have tuned weights, in words."""
    return say.tokens(row.places)


@styled
def figure_signature(
    results: Results, *, part: str | None = None, form: str = "recalled", value: str = "share", legend: bool = True
) -> Figure:
    """What each group of tokens carries of the object (`share` of the attribution, or the drop when `erased`)."""
    rows = R.model_rows(results, results.mechanism.signature)
    part = part or next(iter(R.held_out_first(R.distinct(rows, "part"), results)), None)
    rows = R.where(rows, part=part, format=form)
    rows = [row for row in rows if row.group != "all" and getattr(row, value) is not None]
    rows = [row for row in needed(rows, f"input-level signature of {part}") if row.tokens]
    ends = (f"{value}_low", f"{value}_high")
    groups = R.distinct(rows, "group")
    what = "share of the attribution" if value == "share" else "drop when erased, nats a token"
    title = f"{say.FORMS[form].capitalize()}: {what}"
    fig, ax = panel(say.test(part or ""), title, height=90 + 34 * len(groups), left=168)
    labels = [say.TOKEN_GROUPS[group] for group in groups]
    dots(ax, rows, groups, labels, "group", models_of(rows, results), value, ends=ends)
    if value != "share":
        from_zero(ax, rows, value, digits=0, ends=ends)
    return finish(fig, ax, legend)


@styled
def figure_lens(
    results: Results, *, part: str | None = None, place: str = "answer", form: str = "recalled", legend: bool = True
) -> Figure:
    """How often the object's first token is the first by the logit lens, over the layers, every model's."""
    rows = R.where(R.model_rows(results, results.mechanism.lens), place=place, format=form)
    part = part or next(iter(R.held_out_first(R.distinct(rows, "part"), results)), None)
    rows = needed(R.where(rows, part=part), f"logit lens at the {place}")
    fig, ax = panel(say.place(place), f"{say.test(part or '')}: object first", below="layer")
    for name, look in models_of(rows, results).items():
        points = R.where(rows, model=name)
        curve(ax, points, "layer", "top1", look, say.model(name), ends=("top1_low", "top1_high"))
    ax.set_ylim(-0.03, 1.04)
    ax.xaxis.set_major_locator(load_ticker().MaxNLocator(6, integer=True))
    return finish(fig, ax, legend)


@styled
def figure_transfer(results: Results, *, part: str | None = None, legend: bool = True) -> Figure:
    """Share of the facts that each model gives or recognises in each format, beside chance."""
    rows = [r for r in R.model_rows(results, results.mechanism.transfer) if r.n]
    part = part or next(iter(R.held_out_first(R.distinct(rows, "part"), results)), None)
    rows = needed(R.where(rows, part=part), f"other formats of {part}")
    formats = R.distinct(rows, "format")
    fig, ax = panel(say.test(part or ""), "share right", height=90 + 34 * len(formats), left=168)
    labels = [say.FORMATS.get(name, say.spoken(name)) for name in formats]
    ends = ("correct_low", "correct_high")
    dots(ax, rows, formats, labels, "format", models_of(rows, results), "correct", ends=ends)
    for number, name in enumerate(formats):
        level = say.number(R.where(rows, format=name)[0].chance)
        ax.plot([level, level], [number - 0.42, number + 0.42], color=CHANCE.color, ls=CHANCE.dash, lw=CHANCE.width)
    return finish(fig, ax, legend)


@styled
def figure_dynamics(results: Results, *, measure: str = "recall.qa_ood", legend: bool = True) -> Figure:
    """One measure at every checkpoint, one line a strategy; a dotted vertical is a change of phase."""
    rows = R.table_rows(results, results.mechanism.dynamics, "rows")
    rows = needed([row for row in rows if row.rest.get(measure) is not None], f"{measure} over checkpoints")
    fig, ax = panel(say.measured(measure).capitalize(), "at each checkpoint", below="updates")
    for name, look in strategy_looks(results).items():
        points = R.where(rows, model=name)
        if points:
            curve(ax, points, "update", measure, look, say.model(name), ends=None)
            for before, after in itertools.pairwise(points[1:]):
                if before.phase != after.phase:
                    ax.axvline(before.update, color=look.color, lw=1.2, ls=":")
    values = [say.number(row.rest[measure]) for row in rows]
    if min(values) >= 0 and max(values) <= 1:
        ax.set_ylim(-0.02, 1.04)
    elif max(map(abs, values)) > 1:
        ax.yaxis.set_major_formatter(lambda v, _: f"{v:,.0f}")
    ax.xaxis.set_major_locator(load_ticker().MaxNLocator(5, integer=True))
    ax.xaxis.set_major_formatter(lambda v, _: f"{v:,.0f}")
    return finish(fig, ax, legend)


def arm_look(results: Results, strategy: str, arm: str) -> Look:
    """A strategy's look, dashed where taught examples are replayed."""
    look = strategy_looks(results)[strategy]
    return look if arm == "alone" else Look(look.color, look.mark, "--", look.width)


@styled
def figure_retention(results: Results, *, part: str = "qa_ood", legend: bool = True) -> Figure:
    """Recall of one kind of questions during further training, a line for each strategy with and without replay."""
    points = [point for retention in results.retention.values() for point in retention.history]
    rows = needed([point for point in points if point.rest.get(part) is not None], f"recall of {part} afterwards")
    fig, ax = panel(say.test(part), "exact match", below="updates of further training")
    for strategy in R.strategies(results):
        for arm in R.distinct(rows, "arm"):
            points = R.where(rows, strategy=strategy, arm=arm)
            label = f"{say.model(strategy)}, {say.ARMS[arm]}"
            curve(ax, points, "update", part, arm_look(results, strategy, arm), label, ends=None)
    ax.set_ylim(-0.02, 1.04)
    ax.xaxis.set_major_locator(load_ticker().MaxNLocator(5, integer=True))
    return finish(fig, ax, legend)
