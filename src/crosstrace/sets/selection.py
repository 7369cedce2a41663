"""The scope, and the exact selection of the strongest parameters in it.

If the strengths are sharded, so are the sets. All processes call the same functions together then.
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
    """Names of the parameters that may be selected, in canonical order (that of `model.named_parameters()`).

    Args:
        include_embeddings: include the token embeddings and the unembedding.
        only: a regular expression; names that it does not match anywhere are left out.

    Raises:
        UserError: the expression is invalid, or no name is left.
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
        strength: name -> non-negative tensor, of any float type.
        fraction: ρ in (0, 1].
        scope: names in canonical order, as `scope(model)` gives them.
        how: "global": the round(ρ·N) largest of all N, at least one; "per_tensor": the same within each tensor; "mass":
            the smallest set that holds the share ρ of the summed strength.

    The size is exact: of parameters with equal strengths at the threshold, the first in canonical order are taken. A
    strength of zero is never selected, so the set is smaller if fewer are positive.

    Raises:
        UserError: the fraction or `how` is invalid, a tensor is missing, or a strength is negative or not finite.
    """
    return next(select_each(strength, [fraction], scope=scope, how=how))


def select_each(
    strength: Mapping[str, Tensor], fractions: Sequence[float], *, scope: Sequence[str], how: str = "global"
) -> Iterator[ParamSet]:
    """`select` for each of several fractions. The work that does not depend on the fraction is done once.

    A set is made when it is taken from the iterator: all of them together may be larger than the strengths."""
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
        by_name = {name: laid(mask, strength[name]) for name, mask in zip(values, masks)}
        return ParamSet(by_name, meta={"fraction": fraction, "how": how})

    yield from map(top, fractions)


def check_fraction(fraction: float) -> None:
    """Raise a `UserError` unless 0 < fraction ≤ 1."""
    if not 0 < fraction <= 1:
        raise UserError(f"the fraction is {fraction}, but it must lie in (0, 1]; 0.05 means the top 5 %")


def values_of(strength: Mapping[str, Tensor], names: Sequence[str]) -> tuple[dict[str, Tensor], Processes | None]:
    """The strengths in scope, checked and in one float type; and the processes that hold them, if they are sharded.

    Each process gets its rows of sharded strengths. There is no negative zero, so that the bit patterns of the values
    are in the same order as the values.

    Raises:
        UserError: no name, a missing tensor, or a strength that is negative or not finite, in any of the processes.
    """
    if not names:
        raise UserError("no tensor is in scope, so nothing can be selected")
    missing = [name for name in names if name not in strength]
    if missing:
        raise UserError(f"no strength was given for '{missing[0]}' ({len(missing)} such tensors of the scope)")
    double = any(strength[name].dtype == torch.float64 for name in names)
    processes = processes_of({name: strength[name] for name in names})
    values: dict[str, Tensor] = {}
    errors: list[str] = []
    for name in names:
        value = local(strength[name].detach()).to(torch.float64 if double else torch.float32).contiguous()
        if value.numel():
            low, high = (float(x) for x in value.aminmax())
            if not math.isfinite(low) or not math.isfinite(high):  # aminmax of NaN is NaN
                errors.append(f"the strength of '{name}' holds NaN or infinity; did a gradient overflow?")
            elif low < 0:
                errors.append(f"the strength of '{name}' holds negative values; take the trace's strength()")
            elif low == 0:
                value = value.abs()  # the bit pattern of -0.0 is negative
        values[name] = value
    if processes is not None:  # an error in one process must stop all of them
        errors = [error for of_process in processes.gathered(errors[:1]) for error in of_process]
    if errors:
        raise UserError(errors[0])
    return values, processes


class Ranking:
    """Finds the largest of many values by a radix search over their bit patterns.

    The bit patterns of non-negative floats are in the same order as the numbers. A histogram of the leading digit shows
    in which bin the threshold is, and the search goes on in that bin alone. Nothing is sorted or concatenated. The
    first histogram serves every threshold. If several processes hold the rows of each tensor, their histograms are
    added, so that all of them find the same threshold as one process would.

    Args:
        values: non-negative and without negative zeros (`values_of`).
        by_mass: count the sum of the values rather than their number.
        processes: those that hold the rows of each tensor; None: this one has all of them.
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
        """Masks of the largest values: the share `fraction` of their number, or (by mass) of their sum."""
        if self.by_mass:
            return self.top(fraction * float(self.root.sum()))
        return self.top(max(1, round(fraction * self.total)))

    def top(self, amount: float) -> list[Tensor]:
        """Masks of the `amount` largest values, or (by mass) of the fewest that sum to `amount`.

        They are on the CPU, or, if sharded, where the values are."""
        if not self.by_mass:
            amount = min(amount, self.positive)
        kept = self.patterns[0].device if self.processes is not None else torch.device("cpu")
        if amount <= 0:
            return [torch.zeros(p.shape, dtype=torch.bool, device=kept) for p in self.patterns]

        left, top, threshold, histogram = [p.view(-1) for p in self.patterns], self.width, 0, self.root
        while True:
            shift = max(0, top - _DIGIT)
            above = histogram.flip(0).cumsum(0)  # above[j]: the content of the j + 1 highest bins
            reach = min(amount, above[-1].item())  # sums of values may differ in the last bit
            highest = int((above >= reach).nonzero()[0])
            amount = reach - (above[highest - 1].item() if highest else 0)
            digit = len(histogram) - 1 - highest
            left = [p[(p >> shift) & (2 ** (top - shift) - 1) == digit] for p in left]
            threshold = threshold << (top - shift) | digit
            if not shift:
                break
            top, histogram = shift, self._histogram(left, shift)

        counts = torch.tensor([len(p) for p in left])
        rank, all_counts = 0, [counts.tolist()]
        if self.processes is not None:
            rank, all_counts = self.processes.rank, self.processes.gathered(counts.tolist())
        tied = sum(sum(counts) for counts in all_counts)
        if self.by_mass:  # how many values at the threshold are needed for the rest of the mass
            value = torch.tensor(threshold, dtype=self.patterns[0].dtype).view(self.dtype).item()
            amount = max(1, math.ceil(amount / value * (1 - 1e-12)))
        if amount >= tied:
            return [(p >= threshold).to(kept) for p in self.patterns]
        masks, wanted = [], int(amount)
        for pattern, of_each in zip(self.patterns, zip(*all_counts)):  # a tensor's rows are in the order of processes
            mask = pattern > threshold
            first = (pattern == threshold).view(-1).nonzero().view(-1)[: max(0, wanted - sum(of_each[:rank]))]
            mask.view(-1)[first] = True
            wanted = max(0, wanted - sum(of_each))
            masks.append(mask.to(kept))
        return masks

    def _histogram(self, patterns: list[Tensor], top: int) -> Tensor:
        """For each value of the digit below bit `top`: how many values have it, or (by mass) their sum."""
        shift = max(0, top - _DIGIT)
        bins = 2 ** (top - shift)
        histogram = torch.zeros(bins, dtype=torch.float64 if self.by_mass else torch.int64)
        for p in patterns:
            weights = p.view(self.dtype).double() if self.by_mass else None
            histogram += torch.bincount((p >> shift) & (bins - 1), weights, minlength=bins).cpu()
        return self._of_all(histogram, patterns[0].device)

    def _of_all(self, counts: Tensor, device: torch.device) -> Tensor:
        """This process's counts, summed over all processes; on the CPU."""
        return counts if self.processes is None else self.processes.add_up(counts.to(device)).cpu()
