"""Which rule serves each parameter: tried on two examples, against `torch.autograd.grad` of each alone.

A rule is not trusted for what a module is called. Those that fit a parameter's calls compute the gradient of single
examples from a recorded batch of two, and the first that gives autograd's is taken. No rule is known here by name.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

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
        told: whether any gradient was not zero: one that is tells nothing about a rule.
        doubted: the parameter agreed with the first of its kind in one example alone; it must be tried by itself.
    """

    def __init__(self, parameter: Tensor, uses: Uses, rules: Sequence[type[Rule]], like: Trial | None = None) -> None:
        self.parameter, self.uses, self.rules, self.like = parameter, uses, rules, like
        self.misfits: dict[tuple[str, ...], float] = {}  # by the names of the uses' rules, in the order of the list
        self.judged: set[int] = set()
        self.followed: set[tuple[str, ...]] = set()  # the names of what served the first, where that clearly agreed
        self.told = self.doubted = False

    def judge(self, i: int, gradient: Tensor | None) -> None:
        """Compare with the gradient of the batch's example i alone (None: it has none)."""
        if self.like is not None and not self.misfits and self._follows(self.like, i, gradient):
            return
        if self.followed:
            self.doubted = True
            return
        self.told |= gradient is not None and bool(gradient.any())
        for rules in self._ways():
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
            rules = [made(by_name[name], call, local) for name, (call, local) in zip(names, self.uses)]
        except Unfit:
            return False
        size = clear_size(rules, i, gradient, self.parameter)
        if size is None:
            return False
        self.told |= size > 0
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
        """The first way that is right for all examples."""
        if not self.told or self.doubted:
            return None
        if self.like is not None and self.followed:
            names = self.like.best_names()
            self.doubted = self.followed != {names}  # the second example showed that it is another
            names = None if self.doubted else names
        else:
            names = self.best_names()
        return None if names is None else [[call.name, local, rule] for (call, local), rule in zip(self.uses, names)]

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


def clear_size(
    rules: Sequence[Rule], i: int, gradient: Tensor | None, parameter: Tensor, dtype: torch.dtype | None = None
) -> float | None:
    """How large the gradient of example i is (its Frobenius norm, about) if the rules clearly give it; None if they
    may not, or if that can't be told along random directions.

    Args:
        dtype: of the multiplications; the parameter's if not given.
    """
    found = rules_along(rules, i, parameter)
    if found is None:
        return None
    apart, size = found, 0.0
    if gradient is not None:
        expected = along(gradient.to(found.dtype))
        size = float(expected.norm()) / DIRECTIONS**0.5
        apart = found - expected
    relative, _ = AGREES[dtype or parameter.dtype]
    # (a comparison with NaN is false)
    return size if float(apart.norm()) / DIRECTIONS**0.5 <= WELL * relative * size else None


def along(gradient: Tensor) -> Tensor:
    """g v for each of a few random directions v, [..., DIRECTIONS]; of a vector or a number itself."""
    if gradient.dim() < 2:
        return gradient.clone()
    return gradient @ _directions(gradient.shape[-1], gradient.dtype, gradient.device)


def rules_along(rules: Sequence[Rule], i: int, parameter: Tensor) -> Tensor | None:
    """`along` of the rules' gradient of example i, which is not made; None if a rule fails, or knows no way to it, or
    the parameter is a vector or a number."""
    wide = sum_dtype(parameter.dtype)
    if parameter.dim() < 2:
        return None
    directions = _directions(parameter.shape[-1], wide, parameter.device)
    found = torch.zeros(*parameter.shape[:-1], DIRECTIONS, dtype=wide, device=parameter.device)
    try:
        for rule in rules:
            with fitting():
                part = rule.along(directions, i)
            if part is None:
                return None
            found += part
    except Unfit:
        return None
    return found


def agree(
    rules: Sequence[Rule], i: int, gradient: Tensor | None, parameter: Tensor, dtype: torch.dtype, *, known: bool
) -> bool:
    """Whether the rules give the gradient of example i; compared along random directions first if they are `known` to
    give that of another parameter of its kind."""
    if known and clear_size(rules, i, gradient, parameter, dtype) is not None:
        return True
    return all(misfit(rules, i, gradient, parameter, totals=totals, dtype=dtype) <= 1 for totals in (True, False))


def agree_along(rules: Sequence[Rule], i: int, expected: Tensor | None, parameter: Tensor, dtype: torch.dtype) -> bool:
    """Whether the rules' gradient of example i is the expected, both along random directions, as far as rounding in
    this dtype goes."""
    found = _any_along(rules, i, parameter)
    if found is None:
        return False
    apart = found if expected is None else found - expected
    relative, terms = AGREES[dtype]
    limit = relative * float(expected.norm()) if expected is not None else 0.0
    if float(apart.norm()) <= limit:
        return True
    size = _any_along([rule.magnitude() for rule in rules], i, parameter)
    return size is not None and float(apart.norm()) <= limit + terms * float(size.norm())


def _any_along(rules: Sequence[Rule], i: int, parameter: Tensor) -> Tensor | None:
    found = rules_along(rules, i, parameter)
    if found is not None:
        return found
    sums = {"sum": torch.zeros_like(parameter, dtype=sum_dtype(parameter.dtype))}
    try:
        with fitting():
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
    """What parameters have in common that are likely to be served by the same rules."""
    calls = [
        (type(call.module), local, call.flat is None, call.autocast, call.repeatable, "forward" in vars(call.module))
        for call, local in uses
    ]
    return (tuple(parameter.shape), parameter.dtype, *calls)


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
