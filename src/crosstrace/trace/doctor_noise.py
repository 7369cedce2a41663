"""How far rounding alone takes two gradients apart, and whether two gradients differ by more than that."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Row = dict[str, Any]

Gradients = dict[str, Tensor]  # a parameter that the loss does not reach is left out

# Two passes through the model may differ by LIMIT times its noise (see `Noise`).
LIMIT = 8.0

# An example beside copies of itself may differ by COPIES times what one rounding more does. Other shapes are multiplied
# by other kernels, which were up to 16 times as far apart (a model of 30 layers, two threads).
COPIES = 40.0

ROUNDINGS = 8  # the smallest tolerance, in roundings of the dtype

# Largest difference between two passes of the same example. More than this is noise that no rounding explains.
TWICE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.15}

# If a parameter's error against float32 is known, it may differ by so many times that error.
EXPLAINED = 2.0

# A parameter's errors are relative to its largest gradient. If it is more, they are relative to these shares of the
# largest gradient of its module and of the model. A gradient that cancels exactly in theory (a key's bias under
# softmax) is rounding noise of its neighbours' size, and a millionth of the largest gradient is noise in float32.
NEIGHBOURS = 0.1
FAINT = 1e-6

DIRECTION = 0.1  # largest 1 - cosine between the gradients in the run's dtype and in float32 that is tolerated

SHOWN = 10  # most parameters that are listed for each check


class Errors(NamedTuple):
    """How far a gradient is from the expected one.

    Attributes:
        largest: the largest difference of one number, relative to the largest gradient (see NEIGHBOURS).
        norm: ‖actual − expected‖, relative to ‖expected‖.
        scale: |⟨actual − expected, expected⟩|, relative to ‖expected‖²: by which share the gradient is too large or too
            small altogether. Rounding errors cancel in it, so it shows a wrong factor long before the others do.
    """

    largest: float = 0.0
    norm: float = 0.0
    scale: float = 0.0


class _Limits(Protocol):
    """Tolerances of a comparison."""

    def limit(self, name: str) -> Errors: ...

    def loss_limit(self) -> float: ...


@dataclass(frozen=True)
class Computed:
    """ℓ of one example, and ∂ℓ/∂θ by parameter."""

    loss: float
    gradients: Gradients

    @cached_property
    def scales(self) -> dict[str, float]:
        """For each parameter, what its largest error is relative to."""
        return _scales(self.gradients)

    @cached_property
    def norms(self) -> dict[str, float]:
        """The Frobenius norm of each gradient."""
        return {name: _norm(g) for name, g in self.gradients.items()}


class Comparison:
    """The errors of one comparison: the largest over all examples. Gradients are not kept.

    Args:
        check: the check that it belongs to, e.g. "padding".
        label: what is compared, e.g. "on the left".
        noise: the tolerances; None: the errors are information only.
    """

    def __init__(self, check: str, label: str, noise: _Limits | None = None) -> None:
        self.check, self.label, self.noise = check, label, noise
        self.loss = 0.0
        self.errors: dict[str, Errors] = {}  # parameter -> its largest errors
        self.example = 0  # with the largest error

    def add(self, example: int, actual: Computed, expected: Computed) -> None:
        """Compare the loss and the gradients of one example with the expected ones."""
        before = self._largest_error()
        self.loss = max(self.loss, finite_size(abs(actual.loss - expected.loss) / max(abs(expected.loss), 1.0)))
        for name in expected.gradients | actual.gradients:
            gradients = actual.gradients.get(name), expected.gradients.get(name)
            self.add_gradient(name, *gradients, expected.scales.get(name, 0.0), expected.norms.get(name, 0.0))
        if self._largest_error() > before:
            self.example = example

    def add_gradient(self, name: str, actual: Tensor | None, expected: Tensor | None, size: float, norm: float) -> None:
        """Compare the gradient of one parameter with the expected one; None is a gradient of zero.

        Args:
            size: what the largest error is relative to.
            norm: the Frobenius norm of the expected gradient.
        """
        length = max(norm, size)
        if actual is not None and expected is not None:
            if math.isfinite(norm) and torch.equal(actual, expected):
                self.errors.setdefault(name, Errors())
                return
            wide = _wide(expected)
            difference = _wide(actual) - wide
            along = abs(_product(difference, wide, norm)) / length if length else 0.0
        elif actual is not None:
            difference, along = _wide(actual), 0.0
        elif expected is not None:
            difference, along = _wide(expected), norm * norm / length if length else 0.0
        else:
            return
        new = Errors(
            _relative(float(torch.linalg.vector_norm(difference, math.inf)), size),
            _relative(_norm(difference), length),
            _relative(along, length),
        )
        self.errors[name] = _largest(self.errors.get(name, Errors()), new)

    def _largest_error(self) -> float:
        return max([self.loss, *(errors.largest for errors in self.errors.values())])

    def limit(self, name: str) -> Errors:
        """The tolerances for one parameter; all are 1 if the errors are information only."""
        return Errors(1.0, 1.0, 1.0) if self.noise is None else self.noise.limit(name)

    def loss_limit(self) -> float:
        """The tolerance for the loss."""
        return math.inf if self.noise is None else self.noise.loss_limit()

    def ranked(self) -> list[tuple[float, str, str]]:
        """(error / tolerance, parameter, "largest" or "scale") of each parameter with an error, worst first."""
        shares = []
        for name, errors in self.errors.items():
            limit = self.limit(name)
            kind = "scale" if errors.scale / limit.scale > errors.largest / limit.largest else "largest"
            if errors.largest > 0:
                shares.append((getattr(errors, kind) / getattr(limit, kind), name, kind))
        return sorted(shares, key=lambda row: -row[0])

    def worst(self, kind: str = "largest") -> tuple[str, float]:
        """The parameter with the largest error / tolerance, for one kind of error, and that error."""
        shares = {n: getattr(e, kind) / getattr(self.limit(n), kind) for n, e in self.errors.items() if e.largest > 0}
        name = max(shares, key=lambda n: shares[n], default="")
        return name, getattr(self.errors.get(name, Errors()), kind)

    def disagree(self) -> list[Row]:
        """The parameters beyond their tolerances, worst first."""
        beyond = [name for share, name, _ in self.ranked() if self.noise is not None and share > 1]
        return [
            {
                "parameter": name,
                "error": json_number(largest),
                "frobenius": json_number(norm),
                "scale": json_number(scale),
            }
            for name, (largest, norm, scale) in ((name, self.errors[name]) for name in beyond)
        ]

    def fails(self) -> bool:
        """Whether the loss or a parameter is beyond its tolerance."""
        return self.noise is not None and (self.loss > self.loss_limit() or bool(self.disagree()))

    def effect(self) -> str:
        """What differs, in words."""

        def by(x: float) -> str:
            return f"by {100 * x:.2g} %" if math.isfinite(x) else "to what is no finite number"

        if self.loss > self.loss_limit():
            return f"moves the loss {by(self.loss)}"
        _, name, kind = next(iter(self.ranked()), (0.0, "", "largest"))
        error = getattr(self.errors.get(name, Errors()), kind)
        return (
            f"leaves the loss, but moves the gradient of {name} {by(error)}{' as a whole' if kind == 'scale' else ''}"
        )

    def rows(self) -> list[Row]:
        """A row each for the loss, the gradients and the gradients' scale (see `checked_row`)."""
        is_judged = self.noise is not None
        rows = [checked_row(self.check, f"{self.label}: loss", self.loss, self.loss_limit() if is_judged else None)]
        norm = max((errors.norm for errors in self.errors.values()), default=0.0)
        for kind, quantity in (("largest", "gradient"), ("scale", "gradient's scale")):
            name, error = self.worst(kind)
            limit = getattr(self.limit(name), kind) if is_judged else None
            disagree = self.disagree() if kind == "largest" or error > (limit or math.inf) else ()
            rows.append(checked_row(self.check, f"{self.label}: {quantity}", error, limit, name, norm, disagree))
        return rows


class Noise:
    """How far rounding alone takes this model's gradients and losses, on this machine, in this dtype.

    Two errors are measured for each parameter p, each of them as the largest error and as the error of the scale:

        u_p  the error if every module's output, and the gradient that arrives at it, is rounded once more; the largest
             over all examples. To round a tensor once more, a random number between -1 and 1, times the dtype's
             epsilon, times the root of the tensor's mean square, is added to each of its numbers.
        c_p  the error of the shortest example beside copies of itself. There are as many tokens as if it is padded, and
             kernels may sum them in another order.

    A few examples may show too small a u_p by chance. So parameters with the same name in different layers share the
    largest u, and none has less than the median of all: n_p = max(u_q over q named as p, median of u). The tolerance
    for p is

        max(LIMIT · max(n_p, min(c_p, COPIES · n_p)), ROUNDINGS · epsilon),

    or EXPLAINED times its error against float32, if that is known and larger. The tolerance for the loss is made
    likewise, of its own u and c. Tolerances are computed at their first use.
    """

    def __init__(self, dtype: torch.dtype, label: str = "one rounding more") -> None:
        self.epsilon = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)  # norms and softmax are no finer
        self.rounded = Comparison("noise", f"{label} in every module")
        self.copies = Comparison("batch", "beside copies of itself", _CopiesNoise(self))
        self.against_float32: Comparison | None = None

    @cached_property
    def _median_and_largest(self) -> tuple[Errors, dict[str, Errors]]:
        """The medians of u, and the largest u by the pattern of the parameters' names."""
        every = list(self.rounded.errors.values())
        largest: dict[str, Errors] = {}
        for name, errors in self.rounded.errors.items():
            pattern = name_pattern(name)
            largest[pattern] = _largest(errors, largest.get(pattern, Errors()))
        return Errors(*(median(values) for values in zip(*every))) if every else Errors(), largest

    def rounding_errors(self, name: str) -> Errors:
        """n_p of a parameter."""
        typical, largest = self._median_and_largest
        return _largest(typical, largest.get(name_pattern(name), Errors()))

    def limit(self, name: str) -> Errors:
        """The tolerances for a parameter's gradient."""
        rounded, copies = self.rounding_errors(name), self.copies.errors.get(name, Errors())
        known = self.against_float32.errors.get(name, Errors()) if self.against_float32 is not None else Errors()
        return Errors(*(self._tolerance(n, c, f) for n, c, f in zip(rounded, copies, known)))

    def loss_limit(self) -> float:
        """The tolerance for the loss."""
        return self._tolerance(self.rounded.loss, self.copies.loss)

    def _tolerance(self, n: float, c: float, against_float32: float = 0.0) -> float:
        return max(LIMIT * max(n, min(c, COPIES * n)), EXPLAINED * against_float32, ROUNDINGS * self.epsilon)


class _CopiesNoise:
    """The tolerances for an example beside copies of itself."""

    def __init__(self, noise: Noise) -> None:
        self.noise = noise

    def limit(self, name: str) -> Errors:
        return Errors(*(max(COPIES * n, ROUNDINGS * self.noise.epsilon) for n in self.noise.rounding_errors(name)))

    def loss_limit(self) -> float:
        return max(COPIES * self.noise.rounded.loss, ROUNDINGS * self.noise.epsilon)


class TwiceNoise:
    """The tolerances for a second pass of the same example, at most a fixed number.

    What is random in the model is in its noise too, so that noise alone would tolerate it."""

    def __init__(self, noise: Noise, most: float) -> None:
        self.noise, self.most = noise, most

    def limit(self, name: str) -> Errors:
        return Errors(*(min(limit, self.most) for limit in self.noise.limit(name)))

    def loss_limit(self) -> float:
        return min(self.noise.loss_limit(), self.most)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _product(a: Tensor, b: Tensor, norm: float) -> float:
    """Σ a·b, `norm` the length of b. In float64 where the products are too small or large for float32."""
    a, b = a.flatten(), b.flatten()
    if a.dtype != b.dtype or not 1e-10 < norm < 1e10:
        a, b = a.double(), b.double()
    return float(torch.dot(a, b))


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(_wide(x)))


def name_pattern(name: str) -> str:
    """A parameter's name without the numbers of its layer and expert."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _relative(x: float, size: float) -> float:
    return 0.0 if x == 0 else finite_size(x / size) if size > 0 else math.inf


def _largest(first: Errors, second: Errors) -> Errors:
    return Errors(*(max(pair) for pair in zip(first, second)))


def _scales(expected: Mapping[str, Tensor]) -> dict[str, float]:
    """For each parameter, what its largest error is relative to (see NEIGHBOURS)."""
    sizes = {name: float(g.abs().max()) for name, g in expected.items()}
    largest = max(sizes.values(), default=0.0)
    module: dict[str, float] = {}
    for name, size in sizes.items():
        path = name.rpartition(".")[0]
        module[path] = max(module.get(path, 0.0), size)
    return {n: max(size, NEIGHBOURS * module[n.rpartition(".")[0]], FAINT * largest) for n, size in sizes.items()}


def cosine(a: Gradients, b: Gradients) -> float:
    """The cosine between two gradients of the model, over all parameters together."""
    product = sum(float((g.double() * b[name].double()).sum()) for name, g in a.items() if name in b)
    first, second = (sum(float(g.double().square().sum()) for g in x.values()) for x in (a, b))
    return product / math.sqrt(first * second) if first * second > 0 else 0.0


def checked_row(
    check: str,
    label: str,
    error: float | None,
    tolerance: float | None,
    worst: str = "",
    frobenius: float | None = None,
    disagree: Sequence[Row] = (),
) -> Row:
    """One row of `Diagnosis.checks`."""
    return {
        "check": check,
        "what": label,
        "worst": worst,
        "error": json_number(error),
        "frobenius": json_number(frobenius),
        "tolerance": tolerance,
        "ok": None if tolerance is None or error is None else error <= tolerance,
        "disagree": list(disagree[:SHOWN]),
    }


def finite_size(x: float) -> float:
    """x, or infinity if x is not finite."""
    return x if math.isfinite(x) else math.inf


def json_number(x: float | None) -> float | None:
    """x, or None if x is not finite: JSON has no such number."""
    return x if x is not None and math.isfinite(x) else None
