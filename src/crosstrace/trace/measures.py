"""Measures: which number a trace makes of the gradients of a task's examples, for each parameter.

Each measure is one record. A trace is a weighted mean, so a measure names a sum over examples that the engine can take
(of |g|, g² or g). It may also change that sum, given the parameter's value. Another package adds measures by an entry
point (`core.registry`). Formulas: docs/method.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from crosstrace.core.registry import Registry


@dataclass(frozen=True)
class Measure:
    """One number for each parameter, from the gradients g_i of a task's examples.

    Attributes:
        name: in the setting `trace.measures`.
        formula: in words or signs, for help and docs.
        sums: what the engine adds up over the examples: "abs" (|g_i|), "square" (g_i²) or "sum" (g_i).
        at: `at(sum, theta)` gives what is added to the trace, from the sum and the parameter's value, all of the
            parameter's shape; None: the sum itself is added.
        is_signed: whether values may be negative. The strength of a parameter is then the absolute value.
    """

    name: str
    formula: str
    sums: Literal["abs", "square", "sum"]
    at: Callable[[Tensor, Tensor], Tensor] | None = None
    is_signed: bool = False

    def of_step(self, total: Tensor, count: int) -> tuple[Tensor, int]:
        """The measure of a step's mean gradient, as (numerator, divisor).

        Args:
            total: the sum of the gradients over the step's examples; it is used up.
            count: how many examples there are.
        """
        if self.sums == "abs":
            return total.abs_(), count
        if self.sums == "square":
            return total.square_(), count * count
        return total, count


def _times_size(total: Tensor, theta: Tensor) -> Tensor:
    """|θ| Σ|g_i|, which is Σ|θ g_i| at one θ."""
    return total * theta.abs()


OWN = (
    Measure("abs", "mean of |g|", "abs"),
    Measure("square", "mean of g², the diagonal of the empirical Fisher information", "square"),
    Measure("taylor", "mean of |θ·g|", "abs", at=_times_size),
    Measure("net", "|mean of g|", "sum", is_signed=True),
)
MEASURES: Registry[Measure] = Registry(Measure, "crosstrace.trace.measures:OWN")
