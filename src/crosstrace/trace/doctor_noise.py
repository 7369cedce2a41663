"""How far rounding takes two exact ways apart, and whether two gradients differ by more than that."""

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

# Two ways through the model may differ by LIMIT times its noise (see `Noise`). An example beside copies of itself may
# differ by COPIES times what one rounding more does: other shapes are multiplied by other kernels, which were up to 16
# times as far apart (a model of 30 layers, two threads).
LIMIT = 8.0

COPIES = 40.0

ROUNDINGS = 8  # nothing is judged more finely than so many roundings of the dtype

# The same again must be the same; more than this is noise that no rounding explains, whatever else the model does.
TWICE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.15}

# Where the yardstick tells a parameter's rounding error in the run's dtype, so many times that is explained too.
EXPLAINED = 2.0

# Errors are relative to the parameter's largest gradient, or to these shares of the largest one of its module and of
# the model if that is more: what cancels exactly in theory (a key's bias under softmax) is rounding noise of its
# neighbours' size, and what is a millionth of the others is noise in float32.
NEIGHBOURS = 0.1

FAINT = 1e-6

DIRECTION = 0.1  # largest 1 - cosine between a gradient in the run's dtype and in float32 that still is a gradient

SHOWN = 10  # disagreeing parameters listed for each check


class Errors(NamedTuple):
    """How far a gradient is from the one expected.

    Attributes:
        largest: of all its numbers, relative to the largest gradient (see NEIGHBOURS).
        norm: ‖got − expected‖, relative to ‖expected‖.
        scale: |⟨got − expected, expected⟩| relative to ‖expected‖²: it is too large or too small as a whole. Rounding
            errors cancel in it, so it shows a wrong factor long before the others do.
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
        """What a parameter's largest error is relative to."""
        return _scales(self.gradients)

    @cached_property
    def norms(self) -> dict[str, float]:
        """The gradients' lengths."""
        return {name: _norm(g) for name, g in self.gradients.items()}


class Comparison:
    """Errors of one comparison, the largest over all examples: numbers alone are kept, never gradients.

    Attributes:
        noise: by which its errors are judged; None for information only.
    """

    def __init__(self, check: str, what: str, noise: _Limits | None = None) -> None:
        self.check, self.what, self.noise = check, what, noise
        self.loss = 0.0
        self.errors: dict[str, Errors] = {}  # parameter -> its largest errors
        self.example = 0  # with the largest error

    def add(self, example: int, got: Computed, expected: Computed) -> None:
        before = self._most()
        self.loss = max(self.loss, finite_size(abs(got.loss - expected.loss) / max(abs(expected.loss), 1.0)))
        for name in expected.gradients | got.gradients:
            mine, theirs = got.gradients.get(name), expected.gradients.get(name)
            self.gradient(name, mine, theirs, expected.scales.get(name, 0.0), expected.norms.get(name, 0.0))
        if self._most() > before:
            self.example = example

    def gradient(self, name: str, got: Tensor | None, expected: Tensor | None, size: float, norm: float) -> None:
        """Add one parameter; None is a gradient of zero. `size` is what its largest error is relative to, `norm` the
        expected one's length."""
        length = max(norm, size)
        if got is not None and expected is not None:
            if math.isfinite(norm) and torch.equal(got, expected):
                self.errors.setdefault(name, Errors())
                return
            wide = _wide(expected)
            difference = _wide(got) - wide
            along = abs(_product(difference, wide, norm)) / length if length else 0.0
        elif got is not None:
            difference, along = _wide(got), 0.0
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

    def _most(self) -> float:
        return max([self.loss, *(errors.largest for errors in self.errors.values())])

    def limit(self, name: str) -> Errors:
        """The tolerances for one parameter; all are the same where nothing is judged."""
        return Errors(1.0, 1.0, 1.0) if self.noise is None else self.noise.limit(name)

    def loss_limit(self) -> float:
        """The tolerance for the loss."""
        return math.inf if self.noise is None else self.noise.loss_limit()

    def ranked(self) -> list[tuple[float, str, str]]:
        """(share of what is tolerated, parameter, "largest" or "scale"), where there is any error, worst first."""
        shares = []
        for name, errors in self.errors.items():
            limit = self.limit(name)
            kind = "scale" if errors.scale / limit.scale > errors.largest / limit.largest else "largest"
            if errors.largest > 0:
                shares.append((getattr(errors, kind) / getattr(limit, kind), name, kind))
        return sorted(shares, key=lambda row: -row[0])

    def worst(self, kind: str = "largest") -> tuple[str, float]:
        """The parameter with the largest share of what is tolerated in one kind of error, and that error."""
        shares = {n: getattr(e, kind) / getattr(self.limit(n), kind) for n, e in self.errors.items() if e.largest > 0}
        name = max(shares, key=lambda n: shares[n], default="")
        return name, getattr(self.errors.get(name, Errors()), kind)

    def disagree(self) -> list[Row]:
        """The parameters beyond what is tolerated, worst first."""
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
        judged = self.noise is not None
        rows = [checked_row(self.check, f"{self.what}: loss", self.loss, self.loss_limit() if judged else None)]
        norm = max((errors.norm for errors in self.errors.values()), default=0.0)
        for kind, what in (("largest", "gradient"), ("scale", "gradient's scale")):
            name, error = self.worst(kind)
            limit = getattr(self.limit(name), kind) if judged else None
            disagree = self.disagree() if kind == "largest" or error > (limit or math.inf) else ()
            rows.append(checked_row(self.check, f"{self.what}: {what}", error, limit, name, norm, disagree))
        return rows


class Noise:
    """How far rounding alone takes this model's gradients and losses, on this machine, in this dtype.

    Two things are measured for each parameter p, for its largest error and for the error of its scale:

        u_p  the largest over all examples if every module's output, and the gradient that arrives at it, is rounded
             once more: a random number between -1 and 1 times the dtype's epsilon times the root of the tensor's mean
             square is added;
        c_p  that of the shortest example beside copies of itself, as many tokens as when it is padded, which kernels
             may sum in another order.

    A few examples show u_p too small by chance, so parameters at the same place in different layers share the largest,
    and none has less than the median of all: n_p = max(u_q over q alike p, median of u). p may differ by

        max(LIMIT · max(n_p, min(c_p, COPIES · n_p)), ROUNDINGS · epsilon),

    and by EXPLAINED times its error against float32 where that is known. Losses likewise, with their own u and c. The
    tolerances are made when they are first asked for.
    """

    def __init__(self, dtype: torch.dtype, what: str = "one rounding more") -> None:
        self.epsilon = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)  # norms and softmax are no finer
        self.rounded = Comparison("noise", f"{what} in every module")
        self.copies = Comparison("batch", "beside copies of itself", _CopiesNoise(self))
        self.against_float32: Comparison | None = None

    @cached_property
    def _alike(self) -> tuple[Errors, dict[str, Errors]]:
        """The medians, and the largest errors of the parameters at the same place in different layers."""
        every = list(self.rounded.errors.values())
        alike: dict[str, Errors] = {}
        for name, errors in self.rounded.errors.items():
            place = name_pattern(name)
            alike[place] = _largest(errors, alike.get(place, Errors()))
        return Errors(*(median(values) for values in zip(*every))) if every else Errors(), alike

    def own(self, name: str) -> Errors:
        """n_p"""
        typical, alike = self._alike
        return _largest(typical, alike.get(name_pattern(name), Errors()))

    def limit(self, name: str) -> Errors:
        """The tolerances for a parameter's gradient."""
        own, copies = self.own(name), self.copies.errors.get(name, Errors())
        known = self.against_float32.errors.get(name, Errors()) if self.against_float32 is not None else Errors()
        return Errors(*(self._tolerance(n, c, f) for n, c, f in zip(own, copies, known)))

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
        return Errors(*(max(COPIES * n, ROUNDINGS * self.noise.epsilon) for n in self.noise.own(name)))

    def loss_limit(self) -> float:
        return max(COPIES * self.noise.rounded.loss, ROUNDINGS * self.noise.epsilon)


class TwiceNoise:
    """The tolerances for the same again: what is random in the model is in its noise too, so they have a fixed end."""

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
    """What a parameter's errors are relative to."""
    own = {name: float(g.abs().max()) for name, g in expected.items()}
    whole = max(own.values(), default=0.0)
    module: dict[str, float] = {}
    for name, size in own.items():
        path = name.rpartition(".")[0]
        module[path] = max(module.get(path, 0.0), size)
    return {n: max(size, NEIGHBOURS * module[n.rpartition(".")[0]], FAINT * whole) for n, size in own.items()}


def cosine(a: Gradients, b: Gradients) -> float:
    """Between two gradients of the whole model."""
    product = sum(float((g.double() * b[name].double()).sum()) for name, g in a.items() if name in b)
    first, second = (sum(float(g.double().square().sum()) for g in x.values()) for x in (a, b))
    return product / math.sqrt(first * second) if first * second > 0 else 0.0


def checked_row(
    check: str,
    what: str,
    error: float | None,
    tolerance: float | None,
    worst: str = "",
    frobenius: float | None = None,
    disagree: Sequence[Row] = (),
) -> Row:
    ok = None if tolerance is None or error is None else error <= tolerance
    return {
        "check": check, "what": what, "worst": worst, "error": json_number(error), "frobenius": json_number(frobenius),
        "tolerance": tolerance, "ok": ok, "disagree": list(disagree[:SHOWN]),
    }  # fmt: skip


def finite_size(x: float) -> float:
    return x if math.isfinite(x) else math.inf


def json_number(x: float | None) -> float | None:
    return x if x is not None and math.isfinite(x) else None
