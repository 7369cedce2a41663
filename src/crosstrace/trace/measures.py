"""Measures: what a trace says of a parameter, given the gradients of a task's examples.

Each is one record. A trace is a weighted mean, so a measure is a sum over examples that the engine can take (|g|, g² or
g), and perhaps what is made of such a sum at the parameter's value. Another package adds its own by an entry point
(`core.registry`). Formulas: docs/method.md.
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
        name: as `trace.measures` has it.
        formula: in words or signs, for help and docs.
        sums: what the engine adds up over the examples: "abs" (|g_i|), "square" (g_i²) or "sum" (g_i).
        at: makes of such a sum what is added for it, at the parameter's value (`at(sum, theta)`, both [shape of the
            parameter]); the sum itself if None.
        is_signed: whether its values have a sign; the strength of a parameter is then their size.
    """

    name: str
    formula: str
    sums: Literal["abs", "square", "sum"]
    at: Callable[[Tensor, Tensor], Tensor] | None = None
    is_signed: bool = False

    def of_step(self, total: Tensor, count: int) -> tuple[Tensor, int]:
        """What a step's mean gradient gives, from its sum over `count` examples, which is used up; and what that is to
        be divided by."""
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
