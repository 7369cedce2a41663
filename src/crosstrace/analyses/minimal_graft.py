"""Minimal graft: the fewest parameters whose tuned values restore recall in the base, and how many of them are shared.

Every parameter is ranked by how much its change from the base's value to the tuned one moves the trained answers. The
first ones of that order are grafted into the base, and recall is measured. Formulas: docs/method.md.

Takes two models' parameters and encoded questions. It knows no strategies, and trains nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from crosstrace.core.statistics import finite, jackknife_interval
from crosstrace.data.tokens import Batch
from crosstrace.sets.controls import random_set
from crosstrace.sets.interventions import check_values, grafted
from crosstrace.sets.paramset import ParamSet
from crosstrace.sets.selection import select, select_each
from crosstrace.trace import Trace, trace

POINTS = (0.25, 0.5, 0.75, 1.0)  # of the way from the base to the tuned model, at which gradients are taken
RANDOM = "random_per_tensor"
ROUNDING = 1e-9  # of a share: 0.9 times 0.8 is a little more than 0.72
RESTORED = 0.9  # share of the tuned model's recall that counts as restored
Row = dict[str, Any]


def contributions(
    base: nn.Module,
    tuned: Mapping[str, Tensor],
    batches: Sequence[Batch],
    names: Sequence[str],
    *,
    parts: int = 1,
    points: Sequence[float] = POINTS,
    progress: Callable[[int], None] | None = None,
) -> list[Trace]:
    """How much the change of each parameter moves the answers, for each of some disjoint parts of the questions.

    With θ the base's values, θ' the tuned ones of the named parameters, and ℓ_i the loss of question i,

        C_j = (θ'_j − θ_j)² · mean over α and i of (∂ℓ_i/∂θ_j at θ + α (θ' − θ))²

    is the mean square of what the change of parameter j adds to ℓ_i by itself, to first order. Signs are left out: a
    change that raises one answer and lowers another was learned too, and a graft without it breaks what was learned.

    Args:
        base: the base model; it is left as it was.
        tuned: parameter name -> tuned value.
        batches: the questions; labels are the answers, group says which part a question belongs to.
        names: the parameters that may be grafted. They move together; all others stay at the base's values.
        parts: questions of group g count for part g % parts.
        points: α; all points count the same.
        progress: called with the number of questions that are done.

    Returns:
        C of each part, with the measure "square" and the part's number of questions as its weight.

    Raises:
        UserError: there are fewer questions than parts, or a parameter is missing or has another shape.
    """
    parameters = dict(base.named_parameters())
    whole = ParamSet({name: torch.ones(parameters[name].shape, dtype=torch.bool) for name in names})
    check_values(whole, names, parameters, tuned)
    ends = {name: tuned[name].detach().to(parameters[name]) for name in names}
    totals: list[Trace] = []
    for alpha in points:
        point = {name: parameters[name].detach().lerp(ends[name], alpha) for name in names}
        with grafted(base, whole, point):
            squares = trace(
                base, batches, task="answers", measures=["square"], parts=parts, names=set(names), progress=progress
            )
        if totals:
            for sums, more in zip(totals, squares):
                for name in names:
                    sums.values[name] += more.values[name]
        else:
            totals = squares
    for part in totals:
        for name in names:
            change = (ends[name] - parameters[name].detach()).to(part.values[name])
            part.values[name] *= change.square() / len(points)
    return totals


def order(parts: Sequence[Trace]) -> dict[str, Tensor]:
    """The strength that ranks the parameters: C over all questions of the parts."""
    return Trace.combine(parts).values


def movement(base: nn.Module, tuned: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """The strength that ranks the parameters by how far they moved: |θ'_j − θ_j|."""
    before = {name: parameter.detach() for name, parameter in base.named_parameters()}
    return {name: (tuned[name].detach().to(before[name]) - before[name]).abs() for name in names}


def overlap(parts: Sequence[Trace], fraction: float | None, shared: ParamSet, names: Sequence[str]) -> Row:
    """How much of the shared set lies among the parameters that restore recall.

    R are the first parameters of the order, as many as `fraction` says; S is the shared set. If R were dealt anew
    within each tensor, Σ_t r_t s_t / n_t of S would be expected in it, where tensor t has n_t parameters, r_t of them
    in R and s_t in S.

    Args:
        fraction: of the smallest graft that restores recall; None if there is none.

    Returns:
        {size, graft, overlap, expected, excess, excess_low, excess_high, parts}: |S|, |R|, |R ∩ S| / |S|, its
        expectation, and overlap − expected with the 95 % jackknife interval over the parts of the questions. None if S
        is empty, or if no graft of less than all parameters restores recall.
    """
    row: Row = {"size": shared.size, "parts": len(parts)}
    if not shared.size or fraction is None or fraction >= 1:
        return row | dict.fromkeys(("graft", "overlap", "expected", "excess", "excess_low", "excess_high"))
    size, share, expected = _overlap(parts, fraction, shared, names)
    left_out = []
    if len(parts) > 1:
        for number in range(len(parts)):
            _, *shares = _overlap([*parts[:number], *parts[number + 1 :]], fraction, shared, names)
            left_out.append(shares[0] - shares[1])
    excess = jackknife_interval(share - expected, left_out)
    bounds = {"excess_low": finite(excess.low), "excess_high": finite(excess.high)}
    return row | {"graft": size, "overlap": share, "expected": expected, "excess": excess.value, **bounds}


def sets(
    orders: Mapping[str, Mapping[str, Tensor]], fractions: Sequence[float], names: Sequence[str]
) -> Iterator[tuple[str, float, ParamSet]]:
    """(order, fraction, set): the first parameters of each order at each fraction, and random controls.

    A random control has as many parameters in each tensor as the set of the first order.
    """
    for number, (label, strength) in enumerate(orders.items()):
        for fraction, pset in zip(fractions, select_each(strength, fractions, scope=names)):
            yield label, fraction, pset
            if not number:
                yield RANDOM, fraction, random_set(pset, 0, within="tensor")


def fewest(rows: Sequence[Row], share: float = RESTORED) -> list[Row]:
    """The smallest graft of each order and part of the questions that restores `share` of the tuned model's recall.

    All larger grafts of that order restore it too.

    Args:
        rows: {part, order, size, fraction, exact_match}; those of the order "tuned" are of the tuned model itself.

    Returns:
        rows {part, order, size, fraction}; size and fraction are None if no graft restores it, or if there is nothing
        to restore.
    """
    tuned = {row["part"]: row["exact_match"] for row in rows if row["order"] == "tuned"}

    def restores(row: Row) -> bool:
        recalled = tuned[row["part"]]
        return bool(recalled) and row["exact_match"] >= share * recalled - ROUNDING

    grafts = [row for row in rows if row["order"] not in ("base", "tuned")]
    fewest_rows = []
    for part, order in dict.fromkeys((row["part"], row["order"]) for row in grafts):
        candidates = [row for row in grafts if (row["part"], row["order"]) == (part, order)]
        enough = [*takewhile(restores, sorted(candidates, key=lambda row: -row["size"]))]
        smallest = enough[-1] if enough else {"size": None, "fraction": None}
        fewest_rows.append({"part": part, "order": order, "size": smallest["size"], "fraction": smallest["fraction"]})
    return fewest_rows


def _overlap(
    parts: Sequence[Trace], fraction: float, shared: ParamSet, names: Sequence[str]
) -> tuple[int, float, float]:
    """|R|, |R ∩ S| / |S|, and the expectation of that share by chance within tensors."""
    restoring = select(order(parts), fraction, scope=names)
    common = expected = 0.0
    for name in names:
        in_graft, in_shared = restoring.masks[name], shared.masks[name].to(restoring.masks[name].device)
        common += int((in_graft & in_shared).sum())
        expected += int(in_graft.sum()) * int(in_shared.sum()) / in_graft.numel()
    return restoring.size, common / shared.size, expected / shared.size
