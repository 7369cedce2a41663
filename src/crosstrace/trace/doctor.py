"""Doctor: can this model be traced exactly here, in this dtype, with this attention kernel and these versions?

A handful of examples goes through the model in every way that must not matter: alone and padded, alone and in a
batch, once and again, one at a time over `torch.autograd.grad` and by the fast trace; and, to know what the dtype
and the attention kernel cost, in float32 with eager attention.

How far rounding takes two such ways apart depends on the model, on the dtype and on the machine, so it is measured
(`Noise`): with one rounding more in every module, forward and backward, and with an example beside copies of itself.
Where two ways differ by more, the module that makes the difference is looked for and named. A cause is named only
after it was tried, for example that `attention_mask` is ignored after other tokens under the padding moved the output.

It sees what these examples show: a kernel that only fails on longer texts or larger batches passes.
"""

from __future__ import annotations

import copy
import html
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crosstrace.core.errors import UserError
from crosstrace.core.provenance import metadata
from crosstrace.core.results import aligned
from crosstrace.data.facts import FactSettings, World
from crosstrace.data.text import Example, biographies, questions
from crosstrace.data.tokens import Encoded, encode
from crosstrace.models.compatibility import check_vocabulary
from crosstrace.models.forward import accepted
from crosstrace.models.loading import pad_id
from crosstrace.models.modes import silent
from crosstrace.trace.doctor_noise import (
    DIRECTION,
    TWICE,
    Comparison,
    Computed,
    Errors,
    Gradients,
    Noise,
    Row,
    TwiceNoise,
    checked_row,
    cosine,
    name_pattern,
)
from crosstrace.trace.doctor_passes import (
    attention_kernel,
    backward_culprit,
    first_position,
    forward_culprit,
    gradients_of,
    noise_of,
    one_of,
    one_rounding_more,
    padded_batch,
    record_calls,
    reversed_positions,
)
from crosstrace.trace.engine import Batch, Engine, undisturbed
from crosstrace.trace.rules import sum_dtype


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


class _Examination:
    """One model under examination."""

    def __init__(self, model: Any, items: Sequence[Encoded], padding: int, kernels: Sequence[str], yardstick: bool):
        self.model = model
        self.parameters = dict(model.named_parameters())
        self.engine = Engine(model)  # refuses dtypes without gradient
        device = next(iter(self.parameters.values())).device
        self.device = str(device)
        on_device = lambda batch: {key: value.to(device) for key, value in batch.items()}
        self.alone = [on_device(padded_batch([item], padding, "right")) for item in items]
        self.shortest = min(range(len(items)), key=lambda i: len(items[i].ids))
        self.padded = {side: on_device(padded_batch(items, padding, side)) for side in ("right", "left")}
        self.padded["left"]["position_ids"] += first_position(model, self.alone[0])

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

        self.noise = Noise(coarsest)
        self.precise_noise = Noise(torch.float32, "float32, one rounding more") if half else self.noise
        self.twice = Comparison("twice", "the same again", TwiceNoise(self.noise, TWICE[coarsest]))
        self.sides = {side: Comparison("padding", f"on the {side}", self.noise) for side in self.padded}
        self.together = Comparison("batch", "among others", self.noise)
        self.kernels = {name: Comparison("kernel", f"{name}, {self.precise}", self.precise_noise) for name in names}
        self.kernels.pop("eager", None)  # is the yardstick
        self.unsupported: dict[str, str] = {}
        self.rounded = Comparison("dtype", f"{self.dtype} against float32") if half and yardstick else None
        self.noise.against_float32 = self.rounded
        self.direction = 0.0  # largest 1 - cosine of the whole gradient with the one in float32
        self.trace = Comparison("trace", "fast, against one at a time", self.noise)
        self.total: Gradients = {}  # Σ|g| by the reference loop

    def diagnosis(self, progress: Callable[[int, int], None] | None) -> Diagnosis:
        steps = len(self.alone) + 1
        for i, batch in enumerate(self.alone):
            torch.manual_seed(0)  # what is random in the model is the same with one rounding more
            alone = gradients_of(self.model, batch)
            if not math.isfinite(alone.loss):
                kernel = f" with attention {self.attention}" if self.attention else ""
                hint = "" if self.dtype == "float32" else ", or does the dtype overflow (try --model.dtype float32)"
                sentence = (
                    f"the loss of an example alone is not a finite number in {self.dtype}{kernel}; "
                    f"has training diverged{hint}?"
                )
                return self._told([checked_row("finite", "loss", math.inf, 0.0)], [sentence])
            for name, g in alone.gradients.items():
                size = g.abs().to(sum_dtype(g.dtype))
                self.total[name] = self.total[name].add_(size) if name in self.total else size
            torch.manual_seed(0)
            with one_rounding_more(self.model):
                self.noise.rounded.add(i, gradients_of(self.model, batch), alone)
            if i == self.shortest:
                self.noise.copies.add(i, gradients_of(self.model, self._copies(i)), alone)
            self.twice.add(i, gradients_of(self.model, batch), alone)
            for side, comparison in self.sides.items():
                comparison.add(i, gradients_of(self.model, one_of(self.padded[side], i)), alone)
            self.together.add(i, gradients_of(self.model, self.padded["right"], i), alone)
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

    def _against_yardstick(self, i: int, alone: Computed) -> None:
        if self.standard is None:
            return

        def with_kernel(name: str | None) -> Computed:
            if self.standard is self.model and name == self.attention:
                return alone  # that is what was computed
            with attention_kernel(self.standard, name):
                return gradients_of(self.standard, self.alone[i])

        try:
            exact = with_kernel("eager" if self.attention else None)
        except Exception as why:  # a kernel may fail in any way
            self.unsupported["eager"] = _short(why)
            self.standard = self.rounded = self.noise.against_float32 = None
            self.kernels.clear()
            return
        if self.rounded is not None:
            self.rounded.add(i, alone, exact)
            self.direction = max(self.direction, 1 - cosine(alone.gradients, exact.gradients))
            with attention_kernel(self.standard, "eager" if self.attention else None), one_rounding_more(self.standard):
                self.precise_noise.rounded.add(i, gradients_of(self.standard, self.alone[i]), exact)
        for name, comparison in list(self.kernels.items()):
            try:
                comparison.add(i, with_kernel(name), exact)
            except Exception as why:
                self.unsupported[name] = _short(why)
                del self.kernels[name]

    def _traced(self) -> list[str]:
        """The fast trace of all examples, padded into one batch, against the reference loop's."""
        total = Computed(0.0, self.total)

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
            self.trace.errors[""] = Errors(math.inf, math.inf, math.inf)
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
            rows.append(checked_row("dtype", what, self.direction, DIRECTION, self.rounded.worst()[0]))
        for name, why in self.unsupported.items():
            rows.append(checked_row("kernel", f"{name}: not supported here ({why})", None, None))
        _, trace, scale = self.trace.rows()
        what = f"{self.trace.what}: Σ|g|"
        return [*rows, trace | {"what": what}, scale | {"what": f"{what}'s scale"}]

    def _problems(self) -> list[str]:
        if self.twice.fails():
            batch = self.alone[self.twice.example]
            culprit = forward_culprit(
                record_calls(self.model, batch, 0), record_calls(self.model, batch, 0), {}, self.noise.epsilon
            )
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
        padded = one_of(self.padded[side], i)
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
            elif "position_ids" in padded and not self._differ(padded, reversed_positions(padded), 0):
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
            single = one_of(batch, i) if failing is self.together else self.alone[i]
            place = self._place(single, crowd, 0, row)
            cause = f"{place} gives something else in a larger batch, whatever the other examples are"
        return (
            f"company in a batch {failing.effect()}: {cause}; traces fall back to one example at a time where they "
            "must, but training and recall depend on who shares a batch, so change the module, or train and evaluate "
            "in batches of one"
        )

    def _other_kernel(self, own: Comparison, standard: Any) -> str:
        records, batch = [], self.alone[own.example]
        for name in ("eager", self.attention):
            with attention_kernel(standard, name):
                records.append(record_calls(standard, batch, 0))
        with attention_kernel(standard, "eager"), one_rounding_more(standard):
            noise = noise_of(records[0], record_calls(standard, batch, 0))
        culprit = forward_culprit(records[0], records[1], noise, self.precise_noise.epsilon)
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
        comparison = Comparison("", "", self.noise)
        comparison.add(0, gradients_of(self.model, second, row), gradients_of(self.model, first, row))
        return comparison.fails()

    def _place(self, first: Batch, second: Batch, row: int, other_row: int) -> str:
        """The module that makes two ways of one example differ, in the forward or else in the backward."""
        records = record_calls(self.model, first, row), record_calls(self.model, second, other_row)
        with one_rounding_more(self.model):
            noise = noise_of(records[0], record_calls(self.model, first, row))
        epsilon = self.noise.epsilon
        culprit = forward_culprit(*records, noise, epsilon)
        if culprit is not None:
            return culprit
        backwards = (
            record_calls(self.model, first, row, backward=True),
            record_calls(self.model, second, other_row, backward=True),
        )
        with one_rounding_more(self.model):
            noise = noise_of(backwards[0], record_calls(self.model, first, row, backward=True))
        return backward_culprit(*backwards, noise, epsilon) or "the model"

    def _told(self, rows: list[Row], problems: list[str]) -> Diagnosis:
        plan = self.engine.plan
        coverage = {
            "rules": self.engine.coverage() if plan else {},
            "general": list(dict.fromkeys(name_pattern(name) for name, way in plan.items() if way is None)),
            "no gradient": list(dict.fromkeys(name_pattern(name) for name, way in plan.items() if way == [])),
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


def _short(error: Exception) -> str:
    return textwrap.shorten(str(error), 100, placeholder=" …") or type(error).__name__
