"""Doctor: can this model be traced exactly here, in this dtype, with this attention kernel and these versions?

A handful of examples goes through the model in every way that must not matter: alone and padded, alone and in a
batch, once and again, one at a time over `torch.autograd.grad` and by the fast trace; and, to know what the dtype
and the attention kernel cost, in float32 with eager attention.

How far rounding takes two such ways apart depends on the model, on the dtype and on the machine, so it is measured
(`_Noise`): with one rounding more in every module, forward and backward, and with an example beside copies of itself.
Where two ways differ by more, the module that makes the difference is looked for and named. A cause is named only
after it was tried, for example that `attention_mask` is ignored after other tokens under the padding moved the output.

It sees what these examples show: a kernel that only fails on longer texts or larger batches passes.
"""

from __future__ import annotations

import copy
import html
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from statistics import median
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from crosstrace.core.errors import UserError
from crosstrace.core.provenance import metadata
from crosstrace.core.results import aligned
from crosstrace.data.facts import FactSettings, World
from crosstrace.data.text import Example, biographies, questions
from crosstrace.data.tokens import Encoded, collate, encode
from crosstrace.models.compatibility import check_vocabulary
from crosstrace.models.forward import accepted
from crosstrace.models.loading import pad_id
from crosstrace.models.modes import silent
from crosstrace.trace.engine import Batch, Engine, undisturbed
from crosstrace.trace.rules import sum_dtype
from crosstrace.training.losses import example_losses

Row = dict[str, Any]
Gradients = dict[str, Tensor]  # a parameter that the loss does not reach is left out

# Two ways through the model may differ by LIMIT times its noise (see `_Noise`). An example beside copies of itself may
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


@dataclass
class Diagnosis:
    """What `diagnose` found; JSON-able by `dataclasses.asdict`.

    Attributes:
        verdict: "exact" or "inexact".
        problems: one sentence for each reason of an inexact verdict: what differs, where, why, what to do.
        checks: one row for each comparison. check, what; worst: the parameter; error: the largest difference, relative
            to the parameter's largest gradient, of the loss relative to it or to one nat, of a "scale" by which share
            the gradient is too large or too small as a whole; frobenius: the difference in norms; tolerance: of that
            parameter; ok: None is information only; disagree: the parameters beyond their tolerance, worst first, each
            with error, frobenius and scale, at most SHOWN. An error of None is not a finite number. The check "noise"
            is what one rounding more does, of which the tolerances are made.
        coverage: "rules", the share of the parameters by rule ("general": one example at a time); and the parameters
            of the general path and those without gradient, by their patterns.
        model: its name.
        dtype: of the weights.
        attention: the attention kernel, None where a model has no such setting.
        device: where the weights are.
        versions: of Python and of the packages.
    """

    verdict: str
    problems: list[str]
    checks: list[Row]
    coverage: dict[str, Any]
    model: str
    dtype: str
    attention: str | None
    device: str
    versions: dict[str, str | None]

    def rows(self) -> list[list[str]]:
        """The checks as text, a header first."""

        def number(x: float | None) -> str:
            return "not finite" if x is None else f"{x:.1e}"

        rows = [["check", "what", "error", "tolerance", "", "worst parameter"]]
        for row in self.checks:
            tolerance = "" if row["tolerance"] is None else number(row["tolerance"])
            error = "" if row["error"] is None and row["ok"] is None else number(row["error"])
            judged = {True: "ok", False: "DIFFERS", None: "–"}[row["ok"]]
            rows.append([row["check"], row["what"], error, tolerance, judged, row["worst"]])
        return rows

    def summary(self) -> list[str]:
        """The verdict, the problems and the coverage, a line each."""
        kernel = f", attention {self.attention}" if self.attention else ""
        shares = ", ".join(f"{label} {100 * share:.1f} %" for label, share in self.coverage.get("rules", {}).items())
        lines = [f"{self.verdict}: {self.model}, {self.dtype}{kernel}, {self.device}", *self.problems]
        lines += [f"parameters by rule: {shares}"] if shares else []
        for label in ("general", "no gradient"):
            if self.coverage.get(label):
                lines.append(f"{label}: {', '.join(self.coverage[label])}")
        return lines

    def __str__(self) -> str:
        return "\n".join(self.summary()) + "\n\n" + aligned(self.rows())

    def _repr_html_(self) -> str:

        def cells(row: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(x)}</{tag}>" for x in row) + "</tr>"

        head, *body = self.rows()
        table = cells(head, "th") + "".join(cells(row, "td") for row in body)
        return "".join(f"<p>{html.escape(line)}</p>" for line in self.summary()) + f"<table>{table}</table>"


def diagnose(
    model: Any,
    tokenizer: Any,
    *,
    examples: int = 4,
    texts: Mapping[str, Sequence[Example]] | None = None,
    kernels: Sequence[str] = ("eager", "sdpa"),
    yardstick: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Diagnosis:
    """Can this model be traced exactly here?

    Memory: beside the model about four gradients of it at a time, whatever the number of examples, and for a model in
    half precision a float32 copy, whose gradients are float32 too (`yardstick=False` does without). A model in float32
    or float64 is its own yardstick: its kernel is changed for a while, and nothing is copied.

    Args:
        model: a causal language model in the dtype and with the attention kernel of the run; left as it was found.
        tokenizer: its own.
        examples: how many biographies and questions, of different lengths; at least 2.
        texts: those to take them from, by task; of a small world if not given.
        kernels: attention kernels to compare with eager; the model's own is always one of them.
        yardstick: compare with float32 and eager attention; without it, dtype and kernels are not judged.
        progress: called with (done, total).

    Raises:
        UserError: fewer than 2 examples, or the model cannot hold them or has no gradient in its dtype.
    """
    items = _examples(model, tokenizer, examples, texts)
    with undisturbed(model), silent():
        return _Examination(model, items, pad_id(tokenizer), kernels, yardstick).diagnosis(progress)


class _Errors(NamedTuple):
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

    def limit(self, name: str) -> _Errors: ...

    def loss_limit(self) -> float: ...


@dataclass(frozen=True)
class _Computed:
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


class _Comparison:
    """Errors of one comparison, the largest over all examples: numbers alone are kept, never gradients.

    Attributes:
        noise: by which its errors are judged; None for information only.
    """

    def __init__(self, check: str, what: str, noise: _Limits | None = None) -> None:
        self.check, self.what, self.noise = check, what, noise
        self.loss = 0.0
        self.errors: dict[str, _Errors] = {}  # parameter -> its largest errors
        self.example = 0  # with the largest error

    def add(self, example: int, got: _Computed, expected: _Computed) -> None:
        before = self._most()
        self.loss = max(self.loss, _finite(abs(got.loss - expected.loss) / max(abs(expected.loss), 1.0)))
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
                self.errors.setdefault(name, _Errors())
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
        new = _Errors(
            _relative(float(torch.linalg.vector_norm(difference, math.inf)), size),
            _relative(_norm(difference), length),
            _relative(along, length),
        )
        self.errors[name] = _largest(self.errors.get(name, _Errors()), new)

    def _most(self) -> float:
        return max([self.loss, *(errors.largest for errors in self.errors.values())])

    def limit(self, name: str) -> _Errors:
        """The tolerances for one parameter; all are the same where nothing is judged."""
        return _Errors(1.0, 1.0, 1.0) if self.noise is None else self.noise.limit(name)

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
        return name, getattr(self.errors.get(name, _Errors()), kind)

    def disagree(self) -> list[Row]:
        """The parameters beyond what is tolerated, worst first."""
        beyond = [name for share, name, _ in self.ranked() if self.noise is not None and share > 1]
        return [
            {"parameter": name, "error": _json(largest), "frobenius": _json(norm), "scale": _json(scale)}
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
        error = getattr(self.errors.get(name, _Errors()), kind)
        return (
            f"leaves the loss, but moves the gradient of {name} {by(error)}{' as a whole' if kind == 'scale' else ''}"
        )

    def rows(self) -> list[Row]:
        judged = self.noise is not None
        rows = [_row(self.check, f"{self.what}: loss", self.loss, self.loss_limit() if judged else None)]
        norm = max((errors.norm for errors in self.errors.values()), default=0.0)
        for kind, what in (("largest", "gradient"), ("scale", "gradient's scale")):
            name, error = self.worst(kind)
            limit = getattr(self.limit(name), kind) if judged else None
            disagree = self.disagree() if kind == "largest" or error > (limit or math.inf) else ()
            rows.append(_row(self.check, f"{self.what}: {what}", error, limit, name, norm, disagree))
        return rows


class _Noise:
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
        self.rounded = _Comparison("noise", f"{what} in every module")
        self.copies = _Comparison("batch", "beside copies of itself", _CopiesNoise(self))
        self.against_float32: _Comparison | None = None

    @cached_property
    def _alike(self) -> tuple[_Errors, dict[str, _Errors]]:
        """The medians, and the largest errors of the parameters at the same place in different layers."""
        every = list(self.rounded.errors.values())
        alike: dict[str, _Errors] = {}
        for name, errors in self.rounded.errors.items():
            place = _pattern(name)
            alike[place] = _largest(errors, alike.get(place, _Errors()))
        return _Errors(*(median(values) for values in zip(*every))) if every else _Errors(), alike

    def own(self, name: str) -> _Errors:
        """n_p"""
        typical, alike = self._alike
        return _largest(typical, alike.get(_pattern(name), _Errors()))

    def limit(self, name: str) -> _Errors:
        """The tolerances for a parameter's gradient."""
        own, copies = self.own(name), self.copies.errors.get(name, _Errors())
        known = self.against_float32.errors.get(name, _Errors()) if self.against_float32 is not None else _Errors()
        return _Errors(*(self._tolerance(n, c, f) for n, c, f in zip(own, copies, known)))

    def loss_limit(self) -> float:
        """The tolerance for the loss."""
        return self._tolerance(self.rounded.loss, self.copies.loss)

    def _tolerance(self, n: float, c: float, against_float32: float = 0.0) -> float:
        return max(LIMIT * max(n, min(c, COPIES * n)), EXPLAINED * against_float32, ROUNDINGS * self.epsilon)


class _CopiesNoise:
    """The tolerances for an example beside copies of itself."""

    def __init__(self, noise: _Noise) -> None:
        self.noise = noise

    def limit(self, name: str) -> _Errors:
        return _Errors(*(max(COPIES * n, ROUNDINGS * self.noise.epsilon) for n in self.noise.own(name)))

    def loss_limit(self) -> float:
        return max(COPIES * self.noise.rounded.loss, ROUNDINGS * self.noise.epsilon)


class _TwiceNoise:
    """The tolerances for the same again: what is random in the model is in its noise too, so they have a fixed end."""

    def __init__(self, noise: _Noise, most: float) -> None:
        self.noise, self.most = noise, most

    def limit(self, name: str) -> _Errors:
        return _Errors(*(min(limit, self.most) for limit in self.noise.limit(name)))

    def loss_limit(self) -> float:
        return min(self.noise.loss_limit(), self.most)


class _Examination:
    """One model under examination."""

    def __init__(self, model: Any, items: Sequence[Encoded], padding: int, kernels: Sequence[str], yardstick: bool):
        self.model = model
        self.parameters = dict(model.named_parameters())
        self.engine = Engine(model)  # refuses dtypes without gradient
        device = next(iter(self.parameters.values())).device
        self.device = str(device)
        on_device = lambda batch: {key: value.to(device) for key, value in batch.items()}
        self.alone = [on_device(_padded([item], padding, "right")) for item in items]
        self.shortest = min(range(len(items)), key=lambda i: len(items[i].ids))
        self.padded = {side: on_device(_padded(items, padding, side)) for side in ("right", "left")}
        self.padded["left"]["position_ids"] += _first_position(model, self.alone[0])

        dtypes = sorted({p.dtype for p in self.parameters.values()}, key=lambda d: torch.finfo(d).eps)
        self.dtype = "+".join(str(d).removeprefix("torch.") for d in dtypes)
        self.attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
        coarsest = dtypes[-1]
        half = coarsest in (torch.float16, torch.bfloat16)
        self.standard = None  # the yardstick
        if yardstick:
            self.standard = copy.deepcopy(model).float() if half else model
        self.precise = "float32" if half else self.dtype
        names = dict.fromkeys([*kernels, self.attention]) if yardstick and self.attention else {}

        self.noise = _Noise(coarsest)
        self.precise_noise = _Noise(torch.float32, "float32, one rounding more") if half else self.noise
        self.twice = _Comparison("twice", "the same again", _TwiceNoise(self.noise, TWICE[coarsest]))
        self.sides = {side: _Comparison("padding", f"on the {side}", self.noise) for side in self.padded}
        self.together = _Comparison("batch", "among others", self.noise)
        self.kernels = {name: _Comparison("kernel", f"{name}, {self.precise}", self.precise_noise) for name in names}
        self.kernels.pop("eager", None)  # is the yardstick
        self.unsupported: dict[str, str] = {}
        self.rounded = _Comparison("dtype", f"{self.dtype} against float32") if half and yardstick else None
        self.noise.against_float32 = self.rounded
        self.direction = 0.0  # largest 1 - cosine of the whole gradient with the one in float32
        self.trace = _Comparison("trace", "fast, against one at a time", self.noise)
        self.total: Gradients = {}  # Σ|g| by the reference loop

    def diagnosis(self, progress: Callable[[int, int], None] | None) -> Diagnosis:
        steps = len(self.alone) + 1
        for i, batch in enumerate(self.alone):
            torch.manual_seed(0)  # what is random in the model is the same with one rounding more
            alone = _gradients(self.model, batch)
            if not math.isfinite(alone.loss):
                kernel = f" with attention {self.attention}" if self.attention else ""
                hint = "" if self.dtype == "float32" else ", or does the dtype overflow (try --model.dtype float32)"
                sentence = (
                    f"the loss of an example alone is not a finite number in {self.dtype}{kernel}; "
                    f"has training diverged{hint}?"
                )
                return self._told([_row("finite", "loss", math.inf, 0.0)], [sentence])
            for name, g in alone.gradients.items():
                size = g.abs().to(sum_dtype(g.dtype))
                self.total[name] = self.total[name].add_(size) if name in self.total else size
            torch.manual_seed(0)
            with _one_rounding_more(self.model):
                self.noise.rounded.add(i, _gradients(self.model, batch), alone)
            if i == self.shortest:
                self.noise.copies.add(i, _gradients(self.model, self._copies(i)), alone)
            self.twice.add(i, _gradients(self.model, batch), alone)
            for side, comparison in self.sides.items():
                comparison.add(i, _gradients(self.model, _one(self.padded[side], i)), alone)
            self.together.add(i, _gradients(self.model, self.padded["right"], i), alone)
            self._against_yardstick(i, alone)
            del alone
            if progress is not None:
                progress(i + 1, steps)
        told = self._traced()
        if progress is not None:
            progress(steps, steps)
        return self._told(self._rows(), self._problems() or told)

    def _copies(self, i: int) -> Batch:
        """One example so many times that it has as many tokens as when it is padded, at least twice."""
        length = self.padded["right"]["input_ids"].shape[1]
        times = max(2, -(-length // self.alone[i]["input_ids"].shape[1]))
        return {key: value.repeat(times, 1) for key, value in self.alone[i].items()}

    def _against_yardstick(self, i: int, alone: _Computed) -> None:
        if self.standard is None:
            return

        def with_kernel(name: str | None) -> _Computed:
            if self.standard is self.model and name == self.attention:
                return alone  # that is what was computed
            with _kernel(self.standard, name):
                return _gradients(self.standard, self.alone[i])

        try:
            exact = with_kernel("eager" if self.attention else None)
        except Exception as why:  # a kernel may fail in any way
            self.unsupported["eager"] = _short(why)
            self.standard = self.rounded = self.noise.against_float32 = None
            self.kernels.clear()
            return
        if self.rounded is not None:
            self.rounded.add(i, alone, exact)
            self.direction = max(self.direction, 1 - _cosine(alone.gradients, exact.gradients))
            with _kernel(self.standard, "eager" if self.attention else None), _one_rounding_more(self.standard):
                self.precise_noise.rounded.add(i, _gradients(self.standard, self.alone[i]), exact)
        for name, comparison in list(self.kernels.items()):
            try:
                comparison.add(i, with_kernel(name), exact)
            except Exception as why:
                self.unsupported[name] = _short(why)
                del self.kernels[name]

    def _traced(self) -> list[str]:
        """The fast trace of all examples, padded into one batch, against the reference loop's."""
        total = _Computed(0.0, self.total)

        @contextmanager
        def into(name: str, number: int) -> Iterator[dict[str, Tensor]]:
            theta = self.engine.parameters[name]
            sums = {"abs": torch.zeros_like(theta, dtype=sum_dtype(theta.dtype))}
            yield sums
            size, norm = total.scales.get(name, 0.0), total.norms.get(name, 0.0)
            self.trace.gradient(name, sums["abs"], self.total.get(name), size, norm)

        try:
            self.engine.run(self.padded["right"], [slice(None)], into)
        except UserError as why:
            self.trace.errors[""] = _Errors(math.inf, math.inf, math.inf)
            return [str(why)]
        return []

    # ---- what is told

    def _rows(self) -> list[Row]:
        rows = []
        alike = (self.noise.rounded, self.twice, *self.sides.values(), self.noise.copies, self.together)
        for comparison in (*alike, *self.kernels.values(), self.rounded):
            rows += comparison.rows() if comparison is not None else []
        if self.rounded is not None:
            what = f"{self.rounded.what}: 1 - cosine"
            rows.append(_row("dtype", what, self.direction, DIRECTION, self.rounded.worst()[0]))
        for name, why in self.unsupported.items():
            rows.append(_row("kernel", f"{name}: not supported here ({why})", None, None))
        _, trace, scale = self.trace.rows()
        what = f"{self.trace.what}: Σ|g|"
        return [*rows, trace | {"what": what}, scale | {"what": f"{what}'s scale"}]

    def _problems(self) -> list[str]:
        if self.twice.fails():
            batch = self.alone[self.twice.example]
            culprit = _culprit(_record(self.model, batch, 0), _record(self.model, batch, 0), {}, self.noise.epsilon)
            return [
                f"the same example again {self.twice.effect()}: {culprit or 'the model'} is noisy in evaluation mode "
                "(dropout that is always on, sampling, a nondeterministic kernel); switch that off, no other "
                "comparison means anything before"
            ]
        found = [self._padding(side) for side, comparison in self.sides.items() if comparison.fails()]
        if (self.together.fails() or self.noise.copies.fails()) and not self.sides["right"].fails():
            found.append(self._company())
        own = self.kernels.get(self.attention or "")
        if own is not None and own.fails() and self.standard is not None:
            found.append(self._other_kernel(own, self.standard))
        if self.rounded is not None and self.direction > DIRECTION:
            found.append(
                f"gradients in {self.dtype} point elsewhere than in float32 (cosine {1 - self.direction:.2f}, worst "
                f"{self.rounded.worst()[0]}), so rounding rules them; use --model.dtype float32"
            )
        if self.trace.fails() and "" not in self.trace.errors:
            found += self._wrong_rule(found)
        return found

    def _padding(self, side: str) -> str:
        """What padding on one side does, where, and which causes were tried."""
        comparison, i = self.sides[side], self.sides[side].example
        padded = _one(self.padded[side], i)
        spared = side == "left" and not self.sides["right"].fails()
        advice = "; pad on the right, as crosstrace itself does, which is exact" if spared else ""
        place = self._place(self.alone[i], padded, 0, 0)
        if comparison.loss == math.inf:
            cause = f"{place} fails on padding in {self.dtype} (try another --model.attention or --model.dtype)"
            return f"padding on the {side} {comparison.effect()}: {cause}{advice}"
        other = self._other_tokens_under(padded)
        if self._differ(padded, other, 0):
            reader = self._place(padded, other, 0, 0)
            kernel = self._kernel_advice()
            cause = f"{reader} ignored attention_mask: other tokens under the padding move its output{kernel}"
        else:
            cause = f"{place} gives something else, though other tokens under the padding change nothing"
            if "position_ids" in padded and not accepted(self.model, {"position_ids": None}):
                cause += "; its forward takes no position_ids"
            elif "position_ids" in padded and not self._differ(padded, _reversed_positions(padded), 0):
                cause += "; other position_ids change nothing either, so positions may be counted from the padding on"
        return f"padding on the {side} {comparison.effect()}: {cause}{advice}"

    def _company(self) -> str:
        """What company in a batch does, where, and which causes were tried."""
        batch = self.padded["right"]
        failing = self.together if self.together.fails() else self.noise.copies
        i = failing.example
        if self._differ(batch, self._other_neighbours(i), i):
            place = self._place(batch, self._other_neighbours(i), i, i)
            cause = (
                f"{place} mixes examples: other neighbours move its output (statistics over the batch, shared capacity)"
            )
        else:
            crowd, row = (batch, i) if failing is self.together else (self._copies(i), 0)
            single = _one(batch, i) if failing is self.together else self.alone[i]
            place = self._place(single, crowd, 0, row)
            cause = f"{place} gives something else in a larger batch, whatever the other examples are"
        return (
            f"company in a batch {failing.effect()}: {cause}; traces fall back to one example at a time where they "
            "must, but training and recall depend on who shares a batch, so change the module, or train and evaluate "
            "in batches of one"
        )

    def _other_kernel(self, own: _Comparison, standard: Any) -> str:
        records, batch = [], self.alone[own.example]
        for name in ("eager", self.attention):
            with _kernel(standard, name):
                records.append(_record(standard, batch, 0))
        with _kernel(standard, "eager"), _one_rounding_more(standard):
            noise = _noise_of(records[0], _record(standard, batch, 0))
        culprit = _culprit(records[0], records[1], noise, self.precise_noise.epsilon)
        return (
            f"the attention kernel {self.attention} instead of eager, in {self.precise}, {own.effect()}"
            + (f", first in {culprit}" if culprit else "")
            + "; use --model.attention eager"
        )

    def _wrong_rule(self, others: list[str]) -> list[str]:
        """The rule that gives another trace. It is to blame only if the gradients in the same batch are right."""
        right = [row["parameter"] for row in self.trace.disagree()]
        wrong = {row["parameter"] for c in (self.together, *self.sides.values()) for row in c.disagree()}
        blamed = [name for name in right if name not in wrong]
        if not blamed:
            return [] if others else ["the fast trace differs as the gradients in a batch do"]
        name = blamed[0]
        way = self.engine.plan.get(name)
        errors = self.trace.errors[name]
        rule = "one at a time" if way is None else "+".join(rule for _, _, rule in way) or "no gradient"
        return [
            f"the fast trace of {name}{f' and {len(blamed) - 1} other parameters' if len(blamed) > 1 else ''} is off "
            f"by {100 * max(errors.largest, errors.scale):.2g} % (rule: {rule}), though the gradients of the examples "
            "in the same batch are right: that rule is wrong for this module; please report it with this table, and do "
            "not trust traces of these parameters"
        ]

    # ---- what causes are tried with

    def _kernel_advice(self) -> str:
        return (
            f" (try --model.attention eager instead of {self.attention})"
            if self.attention not in (None, "eager")
            else ""
        )

    def _other_tokens_under(self, batch: Batch) -> Batch:
        """The same example with other tokens where it is padded."""
        rows = torch.cat([x["input_ids"][0] for x in self.alone])
        length = batch["input_ids"].shape[1]
        others = rows.repeat(-(-length // len(rows)))[:length].view(1, -1).expand_as(batch["input_ids"])
        return {**batch, "input_ids": torch.where(batch["attention_mask"] == 0, others, batch["input_ids"])}

    def _other_neighbours(self, i: int) -> Batch:
        """The batch with other tokens in all examples but one; lengths and masks stay."""
        batch = self.padded["right"]
        ids = batch["input_ids"].roll(1, 0).roll(1, 1)  # another example's tokens
        ids = torch.where(batch["attention_mask"].bool(), ids, batch["input_ids"])
        ids[i] = batch["input_ids"][i]
        return {**batch, "input_ids": ids}

    def _differ(self, first: Batch, second: Batch, row: int) -> bool:
        """Whether two batches give a row another loss or other gradients, beyond the noise."""
        comparison = _Comparison("", "", self.noise)
        comparison.add(0, _gradients(self.model, second, row), _gradients(self.model, first, row))
        return comparison.fails()

    def _place(self, first: Batch, second: Batch, row: int, other_row: int) -> str:
        """The module that makes two ways of one example differ, in the forward or else in the backward."""
        records = _record(self.model, first, row), _record(self.model, second, other_row)
        with _one_rounding_more(self.model):
            noise = _noise_of(records[0], _record(self.model, first, row))
        epsilon = self.noise.epsilon
        culprit = _culprit(*records, noise, epsilon)
        if culprit is not None:
            return culprit
        backwards = (
            _record(self.model, first, row, backward=True),
            _record(self.model, second, other_row, backward=True),
        )
        with _one_rounding_more(self.model):
            noise = _noise_of(backwards[0], _record(self.model, first, row, backward=True))
        return _backward_culprit(*backwards, noise, epsilon) or "the model"

    def _told(self, rows: list[Row], problems: list[str]) -> Diagnosis:
        plan = self.engine.plan
        coverage = {
            "rules": self.engine.coverage() if plan else {},
            "general": list(dict.fromkeys(_pattern(name) for name, way in plan.items() if way is None)),
            "no gradient": list(dict.fromkeys(_pattern(name) for name, way in plan.items() if way == [])),
        }
        config = getattr(self.model, "config", None)
        return Diagnosis(
            verdict="inexact" if problems else "exact",
            problems=problems,
            checks=rows,
            coverage=coverage,
            model=getattr(config, "name_or_path", "") or type(self.model).__name__,
            dtype=self.dtype,
            attention=self.attention,
            device=self.device,
            versions=metadata()["versions"],
        )


# ---------------------------------------------------------------- ways through the model


def _examples(
    model: Any, tokenizer: Any, count: int, texts: Mapping[str, Sequence[Example]] | None = None
) -> list[Encoded]:
    """Examples of each task by turns, of lengths as different as there are, that the model can hold."""
    if count < 2:
        raise UserError(f"examples is {count}; expected at least 2, as one alone has neither padding nor neighbours")
    if texts is None:
        world = World.draw(FactSettings(people=max(8, count)))
        texts = {"bio": biographies(world), "qa": questions(world)}
    room = getattr(getattr(model, "config", None), "max_position_embeddings", None) or math.inf
    kinds = []
    for turn, examples in enumerate(texts.values()):
        number = (count + len(texts) - 1 - turn) // len(texts)
        encoded = sorted(encode(tokenizer, examples), key=lambda item: len(item.ids))
        check_vocabulary(model, encoded)
        fitting = [item for item in encoded if len(item.ids) <= room]
        if not fitting:
            raise UserError(
                f"the shortest {examples[0].task} example has {len(encoded[0].ids)} tokens, but the model holds "
                f"{room}; does the tokenizer belong to the model?"
            )
        last = len(fitting) - 1
        kinds += [fitting[round(n * last / max(number - 1, 1))] for n in range(number)]
    return kinds


def _padded(items: Sequence[Encoded], padding: int, side: str) -> dict[str, Tensor]:
    batch = collate(items, pad_id=padding, side=side)
    # a token after padding is its example's first: nothing predicts it
    batch["labels"][:, 1:].masked_fill_(batch["attention_mask"][:, :-1] == 0, -100)
    shape = batch["input_ids"].shape
    return {key: value for key, value in batch.items() if value.shape == shape}  # all that a model reads


def _one(batch: Batch, row: int) -> Batch:
    return {key: value[row : row + 1] for key, value in batch.items()}


def _reversed_positions(batch: Batch) -> Batch:
    """The batch with other positions."""
    return {**batch, "position_ids": batch["position_ids"].flip(1)}


def _first_position(model: Any, batch: Batch) -> int:
    """What the model counts its positions from: 0, or what comes after the padding's (RoBERTa)."""
    after = (getattr(getattr(model, "config", None), "pad_token_id", None) or 0) + 1
    if not accepted(model, {"position_ids": None}):
        return 0
    inputs = {key: batch[key][:1] for key in ("input_ids", "attention_mask")}
    positions = torch.arange(inputs["input_ids"].shape[1], device=inputs["input_ids"].device).unsqueeze(0)
    with torch.no_grad():
        own, from_0, from_after = (
            model(**inputs, **told).logits
            for told in ({}, {"position_ids": positions}, {"position_ids": positions + after})
        )
    return after if (from_after - own).norm() < 0.1 * (from_0 - own).norm() else 0


def _logits(model: Any, batch: Batch) -> Tensor:
    """The model's answer to what it accepts of a batch; not the engine's, which is to be judged."""
    inputs = {key: value for key, value in batch.items() if key != "labels"} | {"use_cache": False}
    output = model(**accepted(model, inputs))
    return output if isinstance(output, Tensor) else output.logits


def _gradients(model: Any, batch: Batch, row: int = 0) -> _Computed:
    """ℓ of one example of the batch, and ∂ℓ/∂θ: the reference."""
    loss = example_losses(_logits(model, batch), batch["labels"])[row]
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return _Computed(float(loss.detach()), {name: g for name, g in zip(parameters, found) if g is not None})


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


@contextmanager
def _one_rounding_more(model: Any) -> Iterator[None]:
    """Every module's output, and the gradient that arrives at it, is rounded once more: see `_Noise`."""
    device = next(model.parameters()).device
    random = torch.Generator(device).manual_seed(0)

    def rounded(x: Tensor) -> Tensor:
        epsilon = max(torch.finfo(x.dtype).eps, torch.finfo(torch.float32).eps)
        size = x.detach().to(torch.promote_types(x.dtype, torch.float32)).square().mean().sqrt().to(x.dtype)
        noise = torch.empty_like(x).uniform_(-1, 1, generator=random)
        return x + epsilon * size * noise

    def changed(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.numel() == 0:
            return x
        y = rounded(x)
        if y.requires_grad:
            y.register_hook(rounded)
        return y

    with ExitStack() as hooks:
        for module in model.modules():
            hook = module.register_forward_hook(lambda module, args, output: tree_map(changed, output))
            hooks.callback(hook.remove)
        yield


@contextmanager
def _kernel(model: Any, name: str | None) -> Iterator[None]:
    """The model with another attention kernel (None: as it is), its own afterwards.

    Raises:
        Exception: whatever transformers or the kernel raises where it is not supported.
    """
    if name is None:
        yield
        return
    configs = [c for m in model.modules() if (c := getattr(m, "config", None)) is not None]
    configs += [getattr(c, key, None) for c in configs for key in getattr(c, "sub_configs", ())]
    before = [(c, c._attn_implementation_internal) for c in configs if hasattr(c, "_attn_implementation_internal")]
    try:
        model.set_attn_implementation(name)
        if model.config._attn_implementation != name:
            raise ValueError(f"{type(model).__name__} cannot change its kernel")
        yield
    finally:
        for config, kernel in before:
            config._attn_implementation_internal = kernel


# ---------------------------------------------------------------- who makes the difference


@dataclass
class _Seen:
    """What one module got and gave for one example, at its own tokens; or the gradients that arrived at both."""

    name: str
    kind: str
    got: list[Tensor]
    gave: list[Tensor]

    def __str__(self) -> str:
        return f"module {self.name} ({self.kind})" if self.name else self.kind


def _record(model: Any, batch: Batch, row: int, backward: bool = False) -> list[_Seen]:
    """What every module got and gave for one example, in the order in which they finished.

    Args:
        backward: the gradients of the example's loss instead, at the same tensors.
    """
    own = batch["attention_mask"][row].bool()
    shape = batch["input_ids"].shape
    if "position_ids" not in batch:  # or padding on the left alone would be fed positions
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        batch = {**batch, "position_ids": positions + _first_position(model, batch)}

    def at_tokens(x: Any) -> Tensor | None:
        if not isinstance(x, Tensor):
            return None
        if x.shape[:2] == shape:
            return x[row, own]
        if x.shape[:1] == (shape.numel(),):  # a router sees [B·T, …]
            return x.unflatten(0, shape)[row, own]
        return None

    def keep(value: Any, kept: list[Tensor]) -> None:
        for x in tree_leaves(value):
            mine = at_tokens(x)
            if mine is None:
                continue
            if not backward:
                kept.append(mine.detach())
            elif x.requires_grad:
                kept.append(torch.zeros(()))  # until its gradient comes; none may
                x.register_hook(partial(put, kept, len(kept) - 1))

    def put(kept: list[Tensor], place: int, gradient: Tensor) -> None:
        mine = at_tokens(gradient)
        if mine is not None:
            kept[place] = mine.detach()

    record: list[_Seen] = []

    def note(name: str, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen = _Seen(name, type(module).__name__, [], [])
        keep((args, kwargs), seen.got)
        keep(output, seen.gave)
        record.append(seen)

    with ExitStack() as hooks, torch.set_grad_enabled(backward):
        for name, module in model.named_modules():
            hook = module.register_forward_hook(
                lambda module, args, kwargs, output, name=name: note(name, module, args, kwargs, output),
                with_kwargs=True,
            )
            hooks.callback(hook.remove)
        if backward:
            _gradients(model, batch, row)
        else:
            _logits(model, batch)
    return record


Tolerances = Mapping[str, tuple[float, float]]  # module -> largest error of what it got and of what it gave


def _noise_of(first: Sequence[_Seen], second: Sequence[_Seen]) -> Tolerances:
    """How far two records are apart that only rounding tells apart."""
    return {a.name: (_apart(a.got, b.got), _apart(a.gave, b.gave)) for a, b in zip(first, second)}


def _culprit(first: Sequence[_Seen], second: Sequence[_Seen], noise: Tolerances, epsilon: float) -> str | None:
    """The first module that gives something else for the same; the smallest, as parts finish before the whole."""
    for a, b in zip(first, second):
        if a.name != b.name:
            return None
        got, gave = (max(COPIES * x, ROUNDINGS * epsilon) for x in noise.get(a.name, (0.0, 0.0)))
        if _apart(a.got, b.got) <= got and not _apart(a.gave, b.gave) <= gave:
            return str(a)
    return None


def _backward_culprit(first: Sequence[_Seen], second: Sequence[_Seen], noise: Tolerances, epsilon: float) -> str | None:
    """The last module that passes another gradient down though the same arrives, and at which output it begins."""
    culprit, begins = None, None
    for a, b in zip(reversed(first), reversed(second)):
        if a.name != b.name:
            return None
        got, gave = (max(COPIES * x, ROUNDINGS * epsilon) for x in noise.get(a.name, (0.0, 0.0)))
        same = _apart(a.gave, b.gave) <= gave
        if begins is None and not same:
            begins = a
        inside = culprit is None or a.name.startswith(f"{culprit.name}.") or not culprit.name
        if inside and same and not _apart(a.got, b.got) <= got:
            culprit = a
    if culprit is None:
        return None
    where = f", from the output of {begins.name} on" if begins is not None and begins.name else ""
    return f"the backward of {culprit}{where}"


def _apart(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """The largest difference of some tensors from others, relative to the largest number of each."""
    if [x.shape for x in first] != [x.shape for x in second]:
        return math.inf
    largest = 0.0
    for x, y in zip(first, second):
        if x.numel() == 0:
            continue
        difference, size = float((x.double() - y.double()).abs().max()), float(y.double().abs().max())
        largest = max(largest, 0.0 if difference == 0 else _finite(difference / size) if size > 0 else math.inf)
    return largest


# ---------------------------------------------------------------- numbers


def _pattern(name: str) -> str:
    """A parameter's name without the numbers of its layer and expert."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _relative(x: float, size: float) -> float:
    return 0.0 if x == 0 else _finite(x / size) if size > 0 else math.inf


def _largest(first: _Errors, second: _Errors) -> _Errors:
    return _Errors(*(max(pair) for pair in zip(first, second)))


def _scales(expected: Mapping[str, Tensor]) -> dict[str, float]:
    """What a parameter's errors are relative to."""
    own = {name: float(g.abs().max()) for name, g in expected.items()}
    whole = max(own.values(), default=0.0)
    module: dict[str, float] = {}
    for name, size in own.items():
        path = name.rpartition(".")[0]
        module[path] = max(module.get(path, 0.0), size)
    return {n: max(size, NEIGHBOURS * module[n.rpartition(".")[0]], FAINT * whole) for n, size in own.items()}


def _cosine(a: Gradients, b: Gradients) -> float:
    """Between two gradients of the whole model."""
    product = sum(float((g.double() * b[name].double()).sum()) for name, g in a.items() if name in b)
    first, second = (sum(float(g.double().square().sum()) for g in x.values()) for x in (a, b))
    return product / math.sqrt(first * second) if first * second > 0 else 0.0


def _row(
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
        "check": check, "what": what, "worst": worst, "error": _json(error), "frobenius": _json(frobenius),
        "tolerance": tolerance, "ok": ok, "disagree": list(disagree[:SHOWN]),
    }  # fmt: skip


def _finite(x: float) -> float:
    return x if math.isfinite(x) else math.inf


def _json(x: float | None) -> float | None:
    return x if x is not None and math.isfinite(x) else None


def _short(error: Exception) -> str:
    return textwrap.shorten(str(error), 100, placeholder=" …") or type(error).__name__
