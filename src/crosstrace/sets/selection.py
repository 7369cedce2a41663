"""Which parameters: the scope, and the exact selection of the strongest.

Strengths of a sharded model give sets that are sharded likewise: all its processes call the same functions together.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from crosstrace.core.errors import UserError
from crosstrace.core.pieces import laid, local, processes_of
from crosstrace.core.processes import Processes
from crosstrace.sets.paramset import ParamSet

HOW = ("global", "per_tensor", "mass")

_DIGIT = 12  # bits decided by one pass over the strengths: 4096 bins stay in the cache


def scope(model: nn.Module, include_embeddings: bool = False, only: str | None = None) -> list[str]:
    """Names of the parameters that may be selected, in canonical order (`model.named_parameters()`).

    Args:
        include_embeddings: keep the token embeddings and the unembedding, which are left out by default.
        only: regular expression; keep the names in which it is found.

    Raises:
        UserError: the expression is invalid, or nothing is left.
    """
    out: set[int] = set()
    if not include_embeddings:
        for getter in ("get_input_embeddings", "get_output_embeddings"):
            module = getattr(model, getter, lambda: None)()
            out |= {id(p) for p in module.parameters()} if module is not None else set()
    try:
        pattern = re.compile(only or "")
    except re.error as error:
        raise UserError(f"the scope's expression '{only}' is not a regular expression: {error}") from None
    names = [name for name, p in model.named_parameters() if id(p) not in out and pattern.search(name)]
    if not names:
        raise UserError(
            f"no parameter is left in scope of {type(model).__name__}: no name "
            + (f"outside the embeddings contains '{only}'" if only else "lies outside the embeddings")
        )
    return names


def select(
    strength: Mapping[str, Tensor],
    fraction: float,
    *,
    scope: Sequence[str],
    how: str = "global",
) -> ParamSet:
    """S_t(ρ): the strongest parameters in scope.

    Args:
        strength: name -> non-negative tensor, any float type.
        fraction: ρ in (0, 1].
        scope: names in canonical order, as `scope(model)` gives them.
        how: "global": the round(ρ·N) largest of all N, at least one; "per_tensor": the same in every tensor
            by itself; "mass": the smallest set that holds the share ρ of the summed strength.

    The size is exact: among parameters that tie at the threshold, those that come first in canonical order
    are taken. A strength of zero is never selected, so the set is smaller where fewer are positive.

    Raises:
        UserError: a bad fraction, an unknown `how`, a missing tensor, or a strength that is negative or
            not finite.
    """
    return next(select_each(strength, [fraction], scope=scope, how=how))


def select_each(
    strength: Mapping[str, Tensor], fractions: Sequence[float], *, scope: Sequence[str], how: str = "global"
) -> Iterator[ParamSet]:
    """`select` for each of several fractions, sharing the work that does not depend on the fraction. A set is made when
    its turn comes: all of them together may be larger than the strengths."""
    for fraction in fractions:
        check_fraction(fraction)
    if how not in HOW:
        raise UserError(f"the way of selecting is '{how}', but it must be one of {', '.join(HOW)}")
    values, processes = values_of(strength, scope)
    if how == "per_tensor":
        rankings = [Ranking([value], processes=processes) for value in values.values()]
    else:
        rankings = [Ranking(list(values.values()), by_mass=how == "mass", processes=processes)]

    def top(fraction: float) -> ParamSet:
        masks = [mask for ranking in rankings for mask in ranking.top_fraction(fraction)]
        found = {name: laid(mask, strength[name]) for name, mask in zip(values, masks)}
        return ParamSet(found, meta={"fraction": fraction, "how": how})

    yield from map(top, fractions)


def check_fraction(fraction: float) -> None:
    """Raise UserError unless 0 < fraction ≤ 1."""
    if not 0 < fraction <= 1:
        raise UserError(f"the fraction is {fraction}, but it must lie in (0, 1]; 0.05 means the top 5 %")


def values_of(strength: Mapping[str, Tensor], names: Sequence[str]) -> tuple[dict[str, Tensor], Processes | None]:
    """The strengths in scope, checked, in one float type whose bit patterns order as the numbers do.

    Of sharded ones this process's rows, and the processes that hold them.
    """
    if not names:
        raise UserError("no tensor is in scope, so nothing can be selected")
    missing = [name for name in names if name not in strength]
    if missing:
        raise UserError(f"no strength was given for '{missing[0]}' ({len(missing)} such tensors of the scope)")
    double = any(strength[name].dtype == torch.float64 for name in names)
    processes = processes_of({name: strength[name] for name in names})
    values: dict[str, Tensor] = {}
    odd: list[str] = []
    for name in names:
        value = local(strength[name].detach()).to(torch.float64 if double else torch.float32).contiguous()
        if value.numel():
            low, high = (float(x) for x in value.aminmax())
            if not math.isfinite(low) or not math.isfinite(high):  # aminmax hands NaN on
                odd.append(f"the strength of '{name}' holds NaN or infinity; did a gradient overflow?")
            elif low < 0:
                odd.append(f"the strength of '{name}' holds negative values; take the trace's strength()")
            elif low == 0:
                value = value.abs()  # -0.0, whose bit pattern is negative
        values[name] = value
    if processes is not None:  # all of them must stop, wherever it is
        odd = [why for found in processes.gathered(odd[:1]) for why in found]
    if odd:
        raise UserError(odd[0])
    return values, processes


class Ranking:
    """Finds the largest of many values by a radix search over their bit patterns.

    For non-negative floats the pattern orders as the number does, so a histogram of the leading digit tells
    in which bin the threshold lies, and the search goes on in that bin alone. Nothing is sorted or
    concatenated; the first histogram serves every threshold. Where several processes hold the rows of each tensor,
    their histograms are added, so that all of them find the threshold that one would.
    """

    def __init__(self, values: list[Tensor], by_mass: bool = False, processes: Processes | None = None) -> None:
        self.processes = processes
        self.dtype = values[0].dtype
        self.by_mass = by_mass
        self.width, integer = (64, torch.int64) if self.dtype == torch.float64 else (32, torch.int32)
        self.patterns = [v.view(integer) for v in values]
        counts = torch.stack([torch.tensor([v.numel(), int(v.count_nonzero())]) for v in values]).sum(0)
        self.total, self.positive = self._of_all(counts, values[0].device).tolist()
        self.root = self._histogram([p.view(-1) for p in self.patterns], self.width)

    def top_fraction(self, fraction: float) -> list[Tensor]:
        """Masks of the largest values: the share `fraction` of the number, or by mass of the sum, of all."""
        if self.by_mass:
            return self.top(fraction * float(self.root.sum()))
        return self.top(max(1, round(fraction * self.total)))

    def top(self, amount: float) -> list[Tensor]:
        """Masks of the `amount` largest, or by mass of the fewest that sum to `amount`; on the CPU, unless sharded."""
        if not self.by_mass:
            amount = min(amount, self.positive)
        kept = self.patterns[0].device if self.processes is not None else torch.device("cpu")
        if amount <= 0:
            return [torch.zeros(p.shape, dtype=torch.bool, device=kept) for p in self.patterns]

        left, top, threshold, histogram = [p.view(-1) for p in self.patterns], self.width, 0, self.root
        while True:
            shift = max(0, top - _DIGIT)
            above = histogram.flip(0).cumsum(0)  # above[j]: what the j + 1 highest bins hold
            reach = min(amount, above[-1].item())  # sums of mass may differ in the last bit
            highest = int((above >= reach).nonzero()[0])
            amount = reach - (above[highest - 1].item() if highest else 0)
            digit = len(histogram) - 1 - highest
            left = [p[(p >> shift) & (2 ** (top - shift) - 1) == digit] for p in left]
            threshold = threshold << (top - shift) | digit
            if not shift:
                break
            top, histogram = shift, self._histogram(left, shift)

        counts = torch.tensor([len(p) for p in left])
        rank, everyones = 0, [counts.tolist()]
        if self.processes is not None:
            rank, everyones = self.processes.rank, self.processes.gathered(counts.tolist())
        tied = sum(sum(counts) for counts in everyones)
        if self.by_mass:  # the ties needed to reach the rest of the mass
            value = torch.tensor(threshold, dtype=self.patterns[0].dtype).view(self.dtype).item()
            amount = max(1, math.ceil(amount / value * (1 - 1e-12)))
        if amount >= tied:
            return [(p >= threshold).to(kept) for p in self.patterns]
        masks, wanted = [], int(amount)
        for pattern, of_each in zip(self.patterns, zip(*everyones)):  # a tensor's rows are in the order of processes
            mask = pattern > threshold
            first = (pattern == threshold).view(-1).nonzero().view(-1)[: max(0, wanted - sum(of_each[:rank]))]
            mask.view(-1)[first] = True
            wanted = max(0, wanted - sum(of_each))
            masks.append(mask.to(kept))
        return masks

    def _histogram(self, patterns: list[Tensor], top: int) -> Tensor:
        """How many values (by mass: the sum of the values) have each digit below bit `top`."""
        shift = max(0, top - _DIGIT)
        bins = 2 ** (top - shift)
        histogram = torch.zeros(bins, dtype=torch.float64 if self.by_mass else torch.int64)
        for p in patterns:
            weights = p.view(self.dtype).double() if self.by_mass else None
            histogram += torch.bincount((p >> shift) & (bins - 1), weights, minlength=bins).cpu()
        return self._of_all(histogram, patterns[0].device)

    def _of_all(self, counts: Tensor, device: torch.device) -> Tensor:
        """Counts (on the CPU) of this process, summed over all."""
        return counts if self.processes is None else self.processes.add_up(counts.to(device)).cpu()
