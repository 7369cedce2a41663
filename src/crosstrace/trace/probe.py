"""Which rule serves each parameter: tried on two examples, against `torch.autograd.grad` of each alone.

A rule is not trusted for what a module is called. Those that fit a parameter's calls compute the gradient of single
examples from a recorded batch of two, and the first that gives autograd's is taken. No rule is known here by name.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from crosstrace.trace.recording import Uses
from crosstrace.trace.rules import Call, Rule, Unfit, fitting, made, reduce, sum_dtype

Way = list[list[str]]  # a parameter's uses in order, each [module, local name, rule]; empty: no use, no gradient

# Largest difference (Frobenius norm) between a rule and autograd that rounding explains, relative to the
# gradient and to the sum of its terms' absolute values: what cancels exactly in theory (a key's bias under
# softmax) is noise of the latter's size. Half precision differs that much between an example alone and in a
# batch; float64 is wider than need be because transformers computes norms and softmax in float32 even then.
AGREES = {
    torch.float64: (1e-6, 1e-12),
    torch.float32: (1e-3, 1e-5),
    torch.float16: (0.05, 0.002),
    torch.bfloat16: (0.15, 0.02),
}
WELL = 0.3  # share of that difference below which there is no doubt


def pair_of(mask: Tensor) -> list[int]:
    """The longest and the shortest example of an attention mask [B, T]; any two where all are as long."""
    lengths = mask.sum(1)
    pair = sorted({int(lengths.argmax()), int(lengths.argmin())})
    if len(pair) == 1 and len(lengths) > 1:
        pair.append((pair[0] + 1) % len(lengths))
    return pair


class Trial:
    """The rules of a list on one parameter, example by example.

    Args:
        uses: the parameter's calls in a batch of the examples.
        rules: which to try.
    """

    def __init__(self, parameter: Tensor, uses: Uses, rules: Sequence[type[Rule]]) -> None:
        self.parameter, self.uses, self.rules = parameter, uses, rules
        self.misfits: dict[tuple[str, ...], float] = {}  # by the names of the uses' rules, in the order of the list
        self.told = False  # a gradient that is zero tells nothing about a rule

    def judge(self, i: int, gradient: Tensor | None) -> None:
        """Compare with the gradient of the batch's example i alone (None: it has none)."""
        self.told |= gradient is not None and bool(gradient.any())
        for rules in self._ways():
            worst = max(misfit(rules, i, gradient, self.parameter, totals=totals) for totals in (True, False))
            names = tuple(rule.name for rule in rules)
            self.misfits[names] = max(self.misfits.get(names, 0.0), worst)

    def best(self) -> Way | None:
        """The first way that is right for all examples."""
        if not self.told:
            return None
        bar = max(4 * min(self.misfits.values(), default=1.0), WELL)  # a wrong rule may nearly pass in half precision
        for names, misfit in self.misfits.items():
            if misfit <= min(bar, 1.0):
                return [[call.name, local, rule] for (call, local), rule in zip(self.uses, names)]
        return None

    def _ways(self) -> Iterator[tuple[Rule, ...]]:
        if self.parameter.dim() == 0 and len(self.uses) > 1:
            return  # uses are added by rows, and a number has none
        yield from itertools.product(*(list(_fitting(call, local, self.rules)) for call, local in self.uses))


def misfit(
    rules: Sequence[Rule],
    i: int,
    gradient: Tensor | None,
    parameter: Tensor,
    *,
    totals: bool,
    dtype: torch.dtype | None = None,
) -> float:
    """Difference between the rules' gradient of example i and the given, in units of what rounding explains; infinite
    if the rules fail.

    Args:
        totals: ask for Σg alone, which rules give without work per example; else in the way of Σ|g|.
        dtype: of the multiplications; the parameter's if not given.
    """
    try:
        with fitting():
            return _misfit(rules, i, gradient, parameter, totals, dtype or parameter.dtype)
    except Unfit:
        return math.inf


def _misfit(
    rules: Sequence[Rule], i: int, gradient: Tensor | None, parameter: Tensor, totals: bool, dtype: torch.dtype
) -> float:
    only = slice(i, i + 1)

    def found(rules: Sequence[Rule]) -> Tensor:
        sums = {"sum": torch.zeros_like(parameter, dtype=sum_dtype(parameter.dtype))}
        reduce(rules, sums, only, totals)
        return sums["sum"]

    difference = found(rules)
    size = 0.0
    if gradient is not None:
        difference.sub_(gradient)
        size = float(gradient.norm(dtype=difference.dtype))
    apart = float(difference.norm())
    del difference  # as large as the parameter
    if not math.isfinite(apart):
        return math.inf
    relative, terms = AGREES[dtype]
    if apart <= WELL * relative * size:
        return apart / (relative * size) if apart else 0.0
    return apart / (relative * size + terms * float(found([rule.magnitude() for rule in rules]).norm()))


def hollow(gradient: Tensor) -> Tensor:
    """Nothing of the gradient's shape, to be held in its stead."""
    return gradient.new_zeros(()).expand(gradient.shape)


def _fitting(call: Call, local: str, rules: Sequence[type[Rule]]) -> Iterator[Rule]:
    for rule in rules:
        if rule.nested or "." not in local:
            try:
                yield made(rule, call, local)
            except Unfit:
                continue


def settled(trials: Mapping[str, Trial]) -> dict[str, Way]:
    """The parameters that have a way now."""
    return {name: way for name, trial in trials.items() if (way := trial.best()) is not None}
