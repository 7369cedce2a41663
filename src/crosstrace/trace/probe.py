"""Which rule serves each parameter: tried on two examples, against `torch.autograd.grad` of each alone.

A module's name is no reason to trust a rule. The rules that fit a parameter's calls compute the gradient of single
examples from a recorded batch of two. The first that gives autograd's gradient is taken. No rule is known here by name.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from crosstrace.trace.blocks import sum_dtype
from crosstrace.trace.calls import Call, Unfit
from crosstrace.trace.recording import Uses
from crosstrace.trace.reduction import reduce
from crosstrace.trace.rules import Rule, make_rule, raising_unfit

Way = list[list[str]]  # a parameter's uses in order, each [module, local name, rule]; empty: no use, no gradient

# Largest difference (Frobenius norm) between a rule and autograd that rounding explains. The first number is relative
# to the gradient, the second to the sum of its terms' absolute values: what cancels exactly in theory (a key's bias
# under softmax) is noise of that size. In half precision an example alone differs that much from the same in a batch.
# float64 is wider than need be, because transformers computes norms and softmax in float32 even then.
AGREES = {
    torch.float64: (1e-6, 1e-12),
    torch.float32: (1e-3, 1e-5),
    torch.float16: (0.05, 0.002),
    torch.bfloat16: (0.15, 0.02),
}
WELL = 0.3  # share of that difference below which there is no doubt
DIRECTIONS = 4  # so many are nearly orthogonal to a wrong rule's error less than once in 10^12


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
        like: the trial of the first parameter of its kind; None if this is the first.

    Attributes:
        has_gradient: whether any gradient was not zero. One that is zero shows nothing about a rule.
        is_doubtful: the parameter agreed with the first of its kind in one example alone; it must be tried by itself.
    """

    def __init__(self, parameter: Tensor, uses: Uses, rules: Sequence[type[Rule]], like: Trial | None = None) -> None:
        self.parameter, self.uses, self.rules, self.like = parameter, uses, rules, like
        self.misfits: dict[tuple[str, ...], float] = {}  # by the names of the uses' rules, in the order of the list
        self.judged: set[int] = set()
        self.followed: set[tuple[str, ...]] = set()  # the rules that served the first, where they clearly agreed
        self.has_gradient = self.is_doubtful = False

    def judge(self, i: int, gradient: Tensor | None) -> None:
        """Compare with the gradient of the batch's example i alone (None: it has none)."""
        if self.like is not None and not self.misfits and self._follows(self.like, i, gradient):
            return
        if self.followed:
            self.is_doubtful = True
            return
        self.has_gradient |= gradient is not None and bool(gradient.any())
        for rules in self._combine_rules():
            worst = max(misfit(rules, i, gradient, self.parameter, totals=totals) for totals in (True, False))
            names = tuple(rule.name for rule in rules)
            self.misfits[names] = max(self.misfits.get(names, 0.0), worst)
        self.judged.add(i)

    def _follows(self, first: Trial, i: int, gradient: Tensor | None) -> bool:
        """Whether what served the first parameter of this kind clearly gives this gradient too."""
        names = first.best_names() if i in first.judged else None
        if names is None or len(names) != len(self.uses):
            return False
        by_name = {rule.name: rule for rule in self.rules}
        try:
            rules = [make_rule(by_name[name], call, local) for name, (call, local) in zip(names, self.uses)]
        except Unfit:
            return False
        size = clear_size(rules, i, gradient, self.parameter)
        if size is None:
            return False
        self.has_gradient |= size > 0
        self.followed.add(names)
        return True

    def best_names(self) -> tuple[str, ...] | None:
        """The names of the first rules, one a use, that are right for all examples so far."""
        bar = max(4 * min(self.misfits.values(), default=1.0), WELL)  # a wrong rule may nearly pass in half precision
        for names, misfit in self.misfits.items():
            if misfit <= min(bar, 1.0):
                return names
        return None

    def best(self) -> Way | None:
        """The first way that is right for all examples; None if there is none yet."""
        if not self.has_gradient or self.is_doubtful:
            return None
        if self.like is not None and self.followed:
            names = self.like.best_names()
            self.is_doubtful = self.followed != {names}  # the second example showed that another rule is right
            names = None if self.is_doubtful else names
        else:
            names = self.best_names()
        return None if names is None else [[call.name, local, rule] for (call, local), rule in zip(self.uses, names)]

    def _combine_rules(self) -> Iterator[tuple[Rule, ...]]:
        """Every choice of one rule for each use."""
        if self.parameter.dim() == 0 and len(self.uses) > 1:
            return  # uses are added by rows, and a number has none
        yield from itertools.product(*(list(_make_fitting_rules(call, local, self.rules)) for call, local in self.uses))


def misfit(
    rules: Sequence[Rule],
    i: int,
    gradient: Tensor | None,
    parameter: Tensor,
    *,
    totals: bool,
    dtype: torch.dtype | None = None,
) -> float:
    """Difference between the rules' gradient of example i and the given, in units of what rounding explains.

    It is infinite if the rules fail.

    Args:
        totals: compute it as Σg alone, which rules give without work per example; else in the way of Σ|g|.
        dtype: of the multiplications; the parameter's if not given.
    """
    try:
        with raising_unfit():
            return _misfit(rules, i, gradient, parameter, totals, dtype or parameter.dtype)
    except Unfit:
        return math.inf


def _misfit(
    rules: Sequence[Rule], i: int, gradient: Tensor | None, parameter: Tensor, totals: bool, dtype: torch.dtype
) -> float:

    def compute(rules: Sequence[Rule]) -> Tensor:
        sums = {"sum": torch.zeros_like(parameter, dtype=sum_dtype(parameter.dtype))}
        reduce(rules, sums, slice(i, i + 1), totals)
        return sums["sum"]

    difference = compute(rules)
    size = 0.0
    if gradient is not None:
        difference.sub_(gradient)
        size = float(gradient.norm(dtype=difference.dtype))
    distance = float(difference.norm())
    del difference  # as large as the parameter
    if not math.isfinite(distance):
        return math.inf
    relative, terms = AGREES[dtype]
    if distance <= WELL * relative * size:
        return distance / (relative * size) if distance else 0.0
    return distance / (relative * size + terms * float(compute([rule.magnitude() for rule in rules]).norm()))


def clear_size(
    rules: Sequence[Rule], i: int, gradient: Tensor | None, parameter: Tensor, dtype: torch.dtype | None = None
) -> float | None:
    """How large the gradient of example i is (about its Frobenius norm), if the rules clearly give it.

    None if they may not give it, or if random directions can't show it.

    Args:
        dtype: of the multiplications; the parameter's if not given.
    """
    product = rules_along(rules, i, parameter)
    if product is None:
        return None
    difference, size = product, 0.0
    if gradient is not None:
        expected = along(gradient.to(product.dtype))
        size = float(expected.norm()) / DIRECTIONS**0.5
        difference = product - expected
    relative, _ = AGREES[dtype or parameter.dtype]
    # (a comparison with NaN is false)
    return size if float(difference.norm()) / DIRECTIONS**0.5 <= WELL * relative * size else None


def along(gradient: Tensor) -> Tensor:
    """g v for each of a few random directions v, [..., DIRECTIONS]. A vector or a number stays as it is."""
    if gradient.dim() < 2:
        return gradient.clone()
    return gradient @ _directions(gradient.shape[-1], gradient.dtype, gradient.device)


def rules_along(rules: Sequence[Rule], i: int, parameter: Tensor) -> Tensor | None:
    """`along` of the rules' gradient of example i, without making that gradient.

    None if a rule fails or has no such product, or if the parameter is a vector or a number."""
    wide = sum_dtype(parameter.dtype)
    if parameter.dim() < 2:
        return None
    directions = _directions(parameter.shape[-1], wide, parameter.device)
    product = torch.zeros(*parameter.shape[:-1], DIRECTIONS, dtype=wide, device=parameter.device)
    try:
        for rule in rules:
            with raising_unfit():
                part = rule.along(directions, i)
            if part is None:
                return None
            product += part
    except Unfit:
        return None
    return product


def agree(
    rules: Sequence[Rule], i: int, gradient: Tensor | None, parameter: Tensor, dtype: torch.dtype, *, known: bool
) -> bool:
    """Whether the rules give the gradient of example i.

    If they are `known` to give that of another parameter of its kind, random directions are compared first."""
    if known and clear_size(rules, i, gradient, parameter, dtype) is not None:
        return True
    return all(misfit(rules, i, gradient, parameter, totals=totals, dtype=dtype) <= 1 for totals in (True, False))


def agree_along(rules: Sequence[Rule], i: int, expected: Tensor | None, parameter: Tensor, dtype: torch.dtype) -> bool:
    """Whether the rules' gradient of example i is the expected one, but for rounding in this dtype.

    Both are compared along random directions."""
    product = _compute_along(rules, i, parameter)
    if product is None:
        return False
    difference = product if expected is None else product - expected
    relative, terms = AGREES[dtype]
    limit = relative * float(expected.norm()) if expected is not None else 0.0
    if float(difference.norm()) <= limit:
        return True
    size = _compute_along([rule.magnitude() for rule in rules], i, parameter)
    return size is not None and float(difference.norm()) <= limit + terms * float(size.norm())


def _compute_along(rules: Sequence[Rule], i: int, parameter: Tensor) -> Tensor | None:
    """`rules_along`, or else `along` of the rules' gradient; None if the rules fail."""
    product = rules_along(rules, i, parameter)
    if product is not None:
        return product
    sums = {"sum": torch.zeros_like(parameter, dtype=sum_dtype(parameter.dtype))}
    try:
        with raising_unfit():
            reduce(rules, sums, slice(i, i + 1), totals=False)
    except Unfit:
        return None
    return along(sums["sum"])


@functools.lru_cache(maxsize=64)
def _directions(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(width)
    return torch.randn(width, DIRECTIONS, generator=generator, dtype=dtype, device="cpu").to(device)


Kind = tuple[Any, ...]


def kind_of(parameter: Tensor, uses: Uses) -> Kind:
    """What parameters have in common if the same rules are likely to serve them."""
    calls = [
        (type(call.module), local, call.flat is None, call.autocast, call.repeatable, "forward" in vars(call.module))
        for call, local in uses
    ]
    return (tuple(parameter.shape), parameter.dtype, *calls)


def hollow(gradient: Tensor) -> Tensor:
    """A tensor of the gradient's shape without memory of its own, to be held in its stead."""
    return gradient.new_zeros(()).expand(gradient.shape)


def _make_fitting_rules(call: Call, local: str, rules: Sequence[type[Rule]]) -> Iterator[Rule]:
    for rule in rules:
        if rule.nested or "." not in local:
            try:
                yield make_rule(rule, call, local)
            except Unfit:
                continue


def find_ways(trials: Mapping[str, Trial]) -> dict[str, Way]:
    """The way of each parameter that has one now."""
    return {name: way for name, trial in trials.items() if (way := trial.best()) is not None}
