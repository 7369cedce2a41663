"""Minimal graft: the fewest parameters whose tuned values restore recall in the base, and how many of them are shared.

Every parameter is ranked by how much its way from the base's value to the tuned one adds to the trained answers. The
first ones of that order are grafted into the base, and recall is asked. Formulas: docs/method.md.

Takes two models' parameters and encoded questions. It knows no strategies, and trains nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from crosstrace.errors import UserError
from crosstrace.forward import inputs_of
from crosstrace.losses import example_losses
from crosstrace.models import differentiating
from crosstrace.shared import ParamSet, random_set, select, select_each
from crosstrace.stats import finite, jackknife_interval
from crosstrace.tokens import Batch

POINTS = 8  # of the way from the base to the tuned model, at which gradients are taken
RANDOM = "random_per_tensor"
ROUNDING = 1e-9  # of a share: 0.9 times 0.8 is a little more than 0.72
RESTORED = 0.9  # share of the tuned model's recall that counts as restored
Row = dict[str, Any]


def contributions(
    base: nn.Module,
    tuned: Mapping[str, Tensor],
    parts: Sequence[Sequence[Batch]],
    names: Sequence[str],
    points: int = POINTS,
) -> tuple[list[dict[str, Tensor]], Row]:
    """How much the change of each parameter adds to the answers' log-probability.

    With θ the base's values, θ' the tuned ones of the named parameters, and F_i = −ℓ_i of question i,

        A_j = (θ'_j − θ_j) · ∫₀¹ Σ_i ∂F_i/∂θ_j at θ + α (θ' − θ) dα        (Sundararajan et al. 2017)

    by Gauss-Legendre quadrature. All A_j sum to what F gains when all named parameters are grafted.

    Args:
        base: the base model; its parameters stay as they are.
        tuned: parameter name -> tuned value.
        parts: disjoint parts of the questions, each in batches whose labels are the answers.
        names: the parameters that may be grafted.
        points: of the quadrature; each costs a forward and a backward of all questions.

    Returns:
        A of each part (name -> tensor on the CPU, float32 or wider), and {sum, gain, points, questions}: what all A_j
        sum to and what F gains, both in nats a question. The more the two differ, the rougher the order is.

    Raises:
        UserError: there is no question, or a parameter is missing or has another shape.
    """
    own = dict(base.named_parameters())
    for name in names:
        if name not in tuned or tuned[name].shape != own[name].shape:
            raise UserError(f"'{name}' of the base is missing in the tuned model, or has another shape there")
    count = sum(len(batch["labels"]) for part in parts for batch in part)
    if not count:
        raise UserError("a minimal graft needs at least one question to rank the parameters by")
    wide = {name: torch.promote_types(own[name].dtype, torch.float32) for name in names}
    found = [{name: torch.zeros(own[name].shape, dtype=wide[name]) for name in names} for _ in parts]
    ends = {name: tuned[name].detach().to(own[name]) for name in names}
    with differentiating(base):
        for point, weight in zip(*np.polynomial.legendre.leggauss(points)):  # on [−1, 1]
            alpha = (float(point) + 1) / 2
            values = {name: own[name].detach().lerp(ends[name], alpha).requires_grad_() for name in names}
            for sums, part in zip(found, parts):
                for batch in part:
                    likelihood = _log_probability(base, values, batch)
                    gradients = torch.autograd.grad(likelihood, [*values.values()], allow_unused=True)
                    for name, gradient in zip(names, gradients):
                        if gradient is not None:
                            sums[name] += float(weight) / 2 * gradient.to("cpu", wide[name])
        for sums in found:
            for name, value in sums.items():
                value *= (ends[name] - own[name].detach()).to("cpu", wide[name])
        with torch.no_grad():
            gain = sum(
                float(_log_probability(base, ends, batch) - _log_probability(base, {}, batch))
                for part in parts
                for batch in part
            )
    total = sum(float(value.double().sum()) for sums in found for value in sums.values())
    return found, {"sum": total / count, "gain": gain / count, "points": points, "questions": count}


def order(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The strength that ranks the parameters: Σ of the parts' contributions where that is positive, else 0."""
    first, *others = parts
    return {name: sum((part[name] for part in others), value).clamp(min=0) for name, value in first.items()}


def movement(base: nn.Module, tuned: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """The strength that ranks the parameters by how far they moved: |θ'_j − θ_j|."""
    own = dict(base.named_parameters())
    return {name: (tuned[name].detach().to(own[name]) - own[name].detach()).abs() for name in names}


def overlap(parts: Sequence[Mapping[str, Tensor]], shared: ParamSet, names: Sequence[str]) -> Row:
    """How many of the parameters that restore recall are shared.

    R are the first |S| parameters of the order, S the shared set. By chance, with R dealt anew within each tensor,
    Σ_t r_t s_t / n_t of them are shared, where tensor t has n_t parameters, r_t of R and s_t of S.

    Returns:
        {size, overlap, chance, chance_per_tensor, excess, excess_low, excess_high, parts}: |R ∩ S| / |R|; the share of
        S among all in scope; the other chance as a share of |R|; overlap − chance_per_tensor, with the 95 % jackknife
        interval over the parts of the questions. None where S is empty.
    """
    total = sum(shared.masks[name].numel() for name in names)
    row: Row = {"size": shared.size, "parts": len(parts)}
    if not shared.size:
        return row | dict.fromkeys(
            ("overlap", "chance", "chance_per_tensor", "excess", "excess_low", "excess_high"), None
        )
    both = _overlap(parts, shared, names, total)
    left_out = []
    if len(parts) > 1:
        for number in range(len(parts)):
            hit, chance = _overlap([*parts[:number], *parts[number + 1 :]], shared, names, total)
            left_out.append(hit - chance)
    excess = jackknife_interval(both[0] - both[1], left_out)
    return row | {
        "overlap": both[0],
        "chance": shared.size / total,
        "chance_per_tensor": both[1],
        "excess": excess.value,
        "excess_low": finite(excess.low),
        "excess_high": finite(excess.high),
    }


def sets(
    orders: Mapping[str, Mapping[str, Tensor]], fractions: Sequence[float], names: Sequence[str]
) -> Iterator[tuple[str, float, ParamSet]]:
    """(order, fraction, set): the first parameters of each order at each fraction, and random ones, with the same count
    in each tensor as those of the first order."""
    for number, (label, strength) in enumerate(orders.items()):
        for fraction, pset in zip(fractions, select_each(strength, fractions, scope=names)):
            yield label, fraction, pset
            if not number:
                yield RANDOM, fraction, random_set(pset, 0, within="tensor")


def fewest(rows: Sequence[Row], share: float = RESTORED) -> list[Row]:
    """Of each order and kind of questions the smallest graft that restores `share` of the tuned model's recall, as all
    larger ones do: {part, order, size, fraction}; None where there is none, or nothing to restore.

    Args:
        rows: {part, order, size, fraction, exact_match}; those of the order "tuned" are of the tuned model itself.
    """
    whole = {row["part"]: row["exact_match"] for row in rows if row["order"] == "tuned"}

    def restores(row: Row) -> bool:
        recalled = whole[row["part"]]
        return bool(recalled) and row["exact_match"] >= share * recalled - ROUNDING

    grafts = [row for row in rows if row["order"] not in ("base", "tuned")]
    found = []
    for part, order in dict.fromkeys((row["part"], row["order"]) for row in grafts):
        own = [row for row in grafts if (row["part"], row["order"]) == (part, order)]
        enough = [*takewhile(restores, sorted(own, key=lambda row: -row["size"]))]
        smallest = enough[-1] if enough else {"size": None, "fraction": None}
        found.append({"part": part, "order": order, "size": smallest["size"], "fraction": smallest["fraction"]})
    return found


def _overlap(
    parts: Sequence[Mapping[str, Tensor]], shared: ParamSet, names: Sequence[str], total: int
) -> tuple[float, float]:
    """|R ∩ S| / |R|, and what it is by chance within tensors."""
    restoring = select(order(parts), shared.size / total, scope=names)
    hits = expected = 0.0
    for name in names:
        inside, own = restoring.masks[name], shared.masks[name].to(restoring.masks[name].device)
        hits += int((inside & own).sum())
        expected += int(inside.sum()) * int(own.sum()) / inside.numel()
    return hits / max(1, restoring.size), expected / max(1, restoring.size)


def _log_probability(model: nn.Module, values: Mapping[str, Tensor], batch: Batch) -> Tensor:
    """Σ F of a batch with some parameters' values replaced."""
    labels = batch["labels"].to(next(model.parameters()).device)
    output = functional_call(model, dict(values), (), inputs_of(model, batch))
    return -example_losses(output.logits, labels).sum()
