"""Doctor: can this model be traced exactly here, in this dtype, with this attention kernel and these versions?

A handful of examples goes through the model in every way that must not matter: alone and padded, alone and in a
batch, once and again, one at a time over `torch.autograd.grad` and by the fast trace; and, to know what the dtype
and the attention kernel cost, in float32 with eager attention. Where two ways differ by more than rounding, the
module that makes the difference is looked for and named.

It sees what these examples show: a kernel that only fails on longer texts or larger batches passes.
"""

from __future__ import annotations

import copy
import html
import inspect
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from crosstrace.alike import check_vocabulary
from crosstrace.errors import UserError
from crosstrace.facts import FactSettings, World
from crosstrace.losses import example_losses
from crosstrace.models import pad_id, silent
from crosstrace.results import aligned
from crosstrace.store import metadata
from crosstrace.text import Example, biographies, questions
from crosstrace.tokens import Encoded, collate, encode
from crosstrace.trace.engine import Batch, Engine, undisturbed
from crosstrace.trace.rules import sum_dtype

Row = dict[str, Any]
Gradients = dict[str, Tensor]  # a parameter that the loss does not reach is left out

# Largest relative error that rounding explains. Longer sums in another order cost float32 a few 1e-6 in three layers,
# more in deeper models; float64 is no better, because transformers computes norms and softmax in float32 even then.
# Half precision is as wide as the engine's AGREES: bfloat16 was 5 % off in three layers.
TOLERANCES = {
    torch.float64: 1e-4,
    torch.float32: 1e-4,
    torch.float16: 0.05,
    torch.bfloat16: 0.15,
}
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
        checks: one row for each comparison: check, what, worst (the parameter), error (largest difference relative to
            the parameter's largest gradient, or of the loss relative to it or to one nat), frobenius (the same in
            norms), tolerance, ok (None: information only) and disagree (the parameters beyond the tolerance, worst
            first, each with error and frobenius; at most SHOWN). An error of None is not a finite number.
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
        number = lambda x: "not finite" if x is None else f"{x:.1e}"
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
        cells = lambda row, tag: "<tr>" + "".join(f"<{tag}>{html.escape(x)}</{tag}>" for x in row) + "</tr>"
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


class _Comparison:
    """Errors of one comparison, the largest over all examples: numbers alone are kept, never gradients."""

    def __init__(self, check: str, what: str, tolerance: float | None) -> None:
        self.check, self.what, self.tolerance = check, what, tolerance
        self.loss = 0.0
        self.errors: dict[str, tuple[float, float]] = {}  # parameter -> largest error, and in norms
        self.example = 0  # with the largest error
        self.explained: dict[str, float] = {}  # parameter -> error that rounding was seen to cause

    def add(self, example: int, got: tuple[float, Gradients], expected: tuple[float, Gradients]) -> None:
        before = max(self.loss, self.worst()[1])
        self.loss = max(self.loss, _finite(abs(got[0] - expected[0]) / max(abs(expected[0]), 1.0)))
        scales = _scales(expected[1])
        for name in expected[1] | got[1]:
            self.gradient(name, got[1].get(name), expected[1].get(name), scales.get(name, 0.0))
        if max(self.loss, self.worst()[1]) > before:
            self.example = example

    def gradient(self, name: str, got: Tensor | None, expected: Tensor | None, scale: float) -> None:
        """Add one parameter; None is a gradient of zero."""
        some = expected if got is None else got
        if some is None:
            return
        wide = torch.promote_types(some.dtype, torch.float32)
        a, b = (torch.zeros((), dtype=wide, device=some.device) if x is None else x.to(wide) for x in (got, expected))
        difference = a - b
        largest, norm = float(difference.abs().max()), float(difference.norm())
        old = self.errors.get(name, (0.0, 0.0))
        relative = lambda x, size: 0.0 if x == 0 else _finite(x / size) if size > 0 else math.inf
        new = relative(largest, scale), relative(norm, max(float(b.norm()), scale))
        self.errors[name] = max(old[0], new[0]), max(old[1], new[1])

    def limit(self, name: str) -> float:
        """The tolerance for one parameter; all are the same where nothing is judged."""
        return 1.0 if self.tolerance is None else max(self.tolerance, self.explained.get(name, 0.0))

    def ranked(self) -> list[str]:
        """The parameters that differ at all, by their share of what is tolerated, worst first."""
        differ = [name for name, (error, _) in self.errors.items() if error > 0]
        return sorted(differ, key=lambda name: -self.errors[name][0] / self.limit(name))

    def worst(self) -> tuple[str, float]:
        name = next(iter(self.ranked()), "")
        return name, self.errors[name][0] if name in self.errors else 0.0

    def disagree(self) -> list[Row]:
        """The parameters beyond what is tolerated, worst first."""
        beyond = [n for n in self.ranked() if self.tolerance is not None and self.errors[n][0] > self.limit(n)]
        return [
            {"parameter": n, "error": _json(self.errors[n][0]), "frobenius": _json(self.errors[n][1])} for n in beyond
        ]

    def fails(self) -> bool:
        return self.tolerance is not None and (self.loss > self.tolerance or bool(self.disagree()))

    def effect(self) -> str:
        """What differs, in words."""
        told = lambda x: f"by {100 * x:.2g} %" if math.isfinite(x) else "to what is no finite number"
        if self.tolerance is not None and self.loss > self.tolerance:
            return f"moves the loss {told(self.loss)}"
        name, error = self.worst()
        return f"leaves the loss, but moves the gradient of {name} {told(error)}"

    def rows(self) -> list[Row]:
        name, error = self.worst()
        norm = max((norm for _, norm in self.errors.values()), default=0.0)
        limit = None if self.tolerance is None else self.limit(name)
        return [
            _row(self.check, f"{self.what}: loss", self.loss, self.tolerance),
            _row(self.check, f"{self.what}: gradient", error, limit, name, norm, self.disagree()),
        ]


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
        self.padded = {side: on_device(_padded(items, padding, side)) for side in ("right", "left")}

        dtypes = sorted({p.dtype for p in self.parameters.values()}, key=lambda d: TOLERANCES[d])
        self.dtype = "+".join(str(d).removeprefix("torch.") for d in dtypes)
        self.attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
        tolerance = TOLERANCES[dtypes[-1]]  # of the coarsest
        half = dtypes[-1] in (torch.float16, torch.bfloat16)
        self.standard = None  # the yardstick
        if yardstick:
            self.standard = copy.deepcopy(model).float() if half else model
        self.precise = "float32" if half else self.dtype
        names = dict.fromkeys([*kernels, self.attention]) if yardstick and self.attention else {}
        limit = TOLERANCES[torch.float32] if half else tolerance

        self.twice = _Comparison("twice", "the same again", tolerance)
        self.sides = {side: _Comparison("padding", f"on the {side}", tolerance) for side in self.padded}
        self.together = _Comparison("batch", "among others", tolerance)
        self.kernels = {name: _Comparison("kernel", f"{name}, {self.precise}", limit) for name in names}
        self.kernels.pop("eager", None)  # is the yardstick
        self.unsupported: dict[str, str] = {}
        self.rounded = _Comparison("dtype", f"{self.dtype} against float32", None) if half and yardstick else None
        self.direction = 0.0  # largest 1 - cosine of the whole gradient with the one in float32
        self.trace = _Comparison("trace", "fast, against one at a time", tolerance)
        self.total: Gradients = {}  # Σ|g| by the reference loop

    def diagnosis(self, progress: Callable[[int, int], None] | None) -> Diagnosis:
        steps = len(self.alone) + 1
        for i, batch in enumerate(self.alone):
            loss, gradients = _gradients(self.model, batch)
            if not math.isfinite(loss):
                kernel = f" with attention {self.attention}" if self.attention else ""
                hint = "" if self.dtype == "float32" else ", or does the dtype overflow (try --model.dtype float32)"
                sentence = (
                    f"the loss of an example alone is not a finite number in {self.dtype}{kernel}; "
                    f"has training diverged{hint}?"
                )
                return self._told([_row("finite", "loss", math.inf, 0.0)], [sentence])
            for name, g in gradients.items():
                size = g.abs().to(sum_dtype(g.dtype))
                self.total[name] = self.total[name].add_(size) if name in self.total else size
            self.twice.add(i, _gradients(self.model, batch), (loss, gradients))
            for side, comparison in self.sides.items():
                comparison.add(i, _gradients(self.model, _one(self.padded[side], i)), (loss, gradients))
            self.together.add(i, _gradients(self.model, self.padded["right"], i), (loss, gradients))
            self._against_yardstick(i, loss, gradients)
            del gradients
            if progress is not None:
                progress(i + 1, steps)
        told = self._traced()
        if self.rounded is not None:
            explained = {name: EXPLAINED * error for name, (error, _) in self.rounded.errors.items()}
            for comparison in (self.twice, *self.sides.values(), self.together, self.trace):
                comparison.explained = explained
        if progress is not None:
            progress(steps, steps)
        return self._told(self._rows(), self._problems() or told)

    def _against_yardstick(self, i: int, loss: float, gradients: Gradients) -> None:
        if self.standard is None:
            return
        try:
            with _kernel(self.standard, "eager" if self.attention else None):
                exact = _gradients(self.standard, self.alone[i])
        except Exception as why:  # a kernel may fail in any way
            self.unsupported["eager"] = _short(why)
            self.standard = self.rounded = None
            self.kernels.clear()
            return
        if self.rounded is not None:
            self.rounded.add(i, (loss, gradients), exact)
            self.direction = max(self.direction, 1 - _cosine(gradients, exact[1]))
        for name, comparison in list(self.kernels.items()):
            try:
                with _kernel(self.standard, name):
                    comparison.add(i, _gradients(self.standard, self.alone[i]), exact)
            except Exception as why:
                self.unsupported[name] = _short(why)
                del self.kernels[name]

    def _traced(self) -> list[str]:
        """The fast trace of all examples, padded into one batch, against the reference loop's."""
        scales = _scales(self.total)

        @contextmanager
        def into(name: str, number: int) -> Iterator[dict[str, Tensor]]:
            theta = self.engine.parameters[name]
            sums = {"abs": torch.zeros_like(theta, dtype=sum_dtype(theta.dtype))}
            yield sums
            self.trace.gradient(name, sums["abs"], self.total.get(name), scales.get(name, 0.0))

        try:
            self.engine.run(self.padded["right"], [slice(None)], into)
        except UserError as why:
            self.trace.errors[""] = math.inf, math.inf
            return [str(why)]
        return []

    # ---- what is told

    def _rows(self) -> list[Row]:
        rows = []
        for comparison in (self.twice, *self.sides.values(), self.together, *self.kernels.values(), self.rounded):
            rows += comparison.rows() if comparison is not None else []
        if self.rounded is not None:
            what = f"{self.rounded.what}: 1 - cosine"
            rows.append(_row("dtype", what, self.direction, DIRECTION, self.rounded.worst()[0]))
        for name, why in self.unsupported.items():
            rows.append(_row("kernel", f"{name}: not supported here ({why})", None, None))
        (_, trace) = self.trace.rows()
        return [*rows, trace | {"what": f"{self.trace.what}: Σ|g|"}]

    def _problems(self) -> list[str]:
        tolerance = self.twice.tolerance or 0.0
        if self.twice.fails():
            batch = self.alone[self.twice.example]
            culprit = _culprit(_record(self.model, batch, 0), _record(self.model, batch, 0), tolerance)
            return [
                f"the same example again {self.twice.effect()}: {culprit or 'the model'} is noisy in evaluation mode "
                "(dropout that is always on, sampling, a nondeterministic kernel); switch that off, no other "
                "comparison means anything before"
            ]
        found = []
        other = self.attention not in (None, "eager")
        kernel = f"the attention kernel {self.attention} (try --model.attention eager)" if other else "its forward"
        for side, comparison in self.sides.items():
            if comparison.fails():
                i = comparison.example
                padded = _record(self.model, _one(self.padded[side], i), 0)
                culprit = _culprit(_record(self.model, self.alone[i], 0), padded, tolerance)
                ignored = "attention_mask" if side == "right" else "attention_mask or position_ids"
                cause = f"gives other outputs for the same tokens, as if {kernel} ignored {ignored}"
                if comparison.loss == math.inf:
                    cause = f"fails on padding in {self.dtype} (try another --model.attention or --model.dtype)"
                spared = side == "left" and not self.sides["right"].fails()
                found.append(
                    f"padding on the {side} {comparison.effect()}: {culprit or 'the model'} {cause}"
                    + ("; pad on the right, as crosstrace itself does, which is exact" if spared else "")
                )
        if self.together.fails() and not self.sides["right"].fails():
            i = self.together.example
            batch = self.padded["right"]
            culprit = _culprit(_record(self.model, _one(batch, i), 0), _record(self.model, batch, i), tolerance)
            found.append(
                f"company in a batch {self.together.effect()}: {culprit or 'the model'} mixes examples (statistics "
                "over the batch, shared capacity); traces fall back to one example at a time, but training and recall "
                "depend on who shares a batch, so change the module, or train and evaluate in batches of one"
            )
        own = self.kernels.get(self.attention or "")
        if own is not None and own.fails() and self.standard is not None:
            records = []
            for name in ("eager", self.attention):
                with _kernel(self.standard, name):
                    records.append(_record(self.standard, self.alone[own.example], 0))
            culprit = _culprit(records[0], records[1], own.tolerance or 0.0)
            found.append(
                f"the attention kernel {self.attention} instead of eager, in {self.precise}, {own.effect()}"
                + (f", first in {culprit}" if culprit else "")
                + "; use --model.attention eager"
            )
        if self.rounded is not None and self.direction > DIRECTION:
            found.append(
                f"gradients in {self.dtype} point elsewhere than in float32 (cosine {1 - self.direction:.2f}, worst "
                f"{self.rounded.worst()[0]}), so rounding rules them; use --model.dtype float32"
            )
        if self.trace.fails() and "" not in self.trace.errors:
            name, error = self.trace.worst()
            way = self.engine.plan.get(name)
            rule = "one at a time" if way is None else "+".join(rule for _, _, rule in way) or "no gradient"
            others = len(self.trace.disagree()) - 1
            found.append(
                f"the fast trace of {name}{f' and {others} other parameters' if others else ''} is off by "
                f"{100 * error:.2g} % (rule: {rule}): that rule is wrong for this module; please report it with this "
                "table, and do not trust traces of these parameters"
            )
        return found

    def _told(self, rows: list[Row], problems: list[str]) -> Diagnosis:
        plan = self.engine.plan
        pattern = lambda name: re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        coverage = {
            "rules": self.engine.coverage() if plan else {},
            "general": list(dict.fromkeys(pattern(name) for name, way in plan.items() if way is None)),
            "no gradient": list(dict.fromkeys(pattern(name) for name, way in plan.items() if way == [])),
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


def _logits(model: Any, batch: Batch) -> Tensor:
    """The model's answer to what it accepts of a batch; not the engine's, which is to be judged."""
    accepted = inspect.signature(model.forward).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    inputs = {key: value for key, value in batch.items() if key != "labels"} | {"use_cache": False}
    output = model(**{key: value for key, value in inputs.items() if anything or key in accepted})
    return output if isinstance(output, Tensor) else output.logits


def _gradients(model: Any, batch: Batch, row: int = 0) -> tuple[float, Gradients]:
    """ℓ of one example of the batch, and ∂ℓ/∂θ: the reference."""
    loss = example_losses(_logits(model, batch), batch["labels"])[row]
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return float(loss.detach()), {name: g for name, g in zip(parameters, found) if g is not None}


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


def _record(model: Any, batch: Batch, row: int) -> list[tuple[str, str, list[Tensor], list[Tensor]]]:
    """What every module got and gave for one example, at its own tokens, in the order in which they finished."""
    own = batch["attention_mask"][row].bool()
    shape = batch["input_ids"].shape
    if "position_ids" not in batch:  # or padding on the left alone would be fed positions
        batch = {**batch, "position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}

    def kept(value: Any) -> list[Tensor]:
        found = []
        for x in tree_leaves(value):
            if isinstance(x, Tensor) and x.shape[:2] == shape:
                found.append(x[row, own])
            elif isinstance(x, Tensor) and x.shape[:1] == (shape.numel(),):  # a router sees [B·T, …]
                found.append(x.unflatten(0, shape)[row, own])
        return found

    record: list[tuple[str, str, list[Tensor], list[Tensor]]] = []

    def recorder(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs, output: record.append(
            (name, type(module).__name__, kept((args, kwargs)), kept(output))
        )

    with ExitStack() as hooks, torch.no_grad():
        for name, module in model.named_modules():
            hooks.callback(module.register_forward_hook(recorder(name), with_kwargs=True).remove)
        _logits(model, batch)
    return record


def _culprit(first: Sequence[Any], second: Sequence[Any], tolerance: float) -> str | None:
    """The first module that gives something else for the same; the smallest, as parts finish before the whole."""
    for (name, kind, got, gave), (other, _, got_too, gave_too) in zip(first, second):
        if name != other:
            return None
        if _same(got, got_too, tolerance) and not _same(gave, gave_too, tolerance):
            return f"module {name} ({kind})" if name else kind
    return None


def _same(first: Sequence[Tensor], second: Sequence[Tensor], tolerance: float) -> bool:
    if [x.shape for x in first] != [x.shape for x in second]:
        return False
    close = lambda x, y: x.numel() == 0 or bool((x - y).abs().max() <= tolerance * y.abs().max())
    return all(close(x.double(), y.double()) for x, y in zip(first, second))


# ---------------------------------------------------------------- numbers


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
