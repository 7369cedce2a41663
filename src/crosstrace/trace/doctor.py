"""Doctor: can this model be traced exactly here, in this dtype, with this attention kernel and these versions?

The gradients of a few examples are computed in several ways that must give the same: alone and padded, alone and in a
batch, twice, and by `torch.autograd.grad` of one example at a time and by the fast trace. They are also computed in
float32 with eager attention, which shows the errors that the dtype and the attention kernel make.

Rounding makes small differences. How large they are depends on the model, the dtype and the machine, so it is measured
(`Noise`): with one rounding more in every module, forward and backward, and with an example beside copies of itself. If
two ways differ by more, the module that makes the difference is searched and named. A cause is named only after it was
tried. For example, `attention_mask` is said to be ignored if other tokens under the padding change the output.

The doctor sees only what these examples show. A kernel that fails on longer texts or larger batches alone passes.
"""

from __future__ import annotations

import copy
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from crosstrace.core.errors import UserError
from crosstrace.core.provenance import metadata
from crosstrace.data.facts import FactSettings, World
from crosstrace.data.text import Example, biographies, questions
from crosstrace.data.tokens import Encoded, encode
from crosstrace.models.compatibility import check_vocabulary
from crosstrace.models.forward import accepted
from crosstrace.models.loading import pad_id
from crosstrace.models.modes import silent
from crosstrace.trace.batches import Batch
from crosstrace.trace.blocks import sum_dtype
from crosstrace.trace.diagnosis import Diagnosis
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
from crosstrace.trace.engine import Engine
from crosstrace.trace.passes import undisturbed


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

    Memory: about four gradients of the model are held at a time, whatever the number of examples. For a model in half
    precision there are also a float32 copy and its gradients (not with `yardstick=False`). A model in float32 or
    float64 is its own yardstick: its kernel is changed for a while, and nothing is copied.

    Args:
        model: a causal language model in the dtype and with the attention kernel of the run; left as it was.
        tokenizer: the model's tokenizer.
        examples: how many biographies and questions, of different lengths; at least 2.
        texts: by task, the texts to choose from; None: those of a small world.
        kernels: attention kernels to compare with eager. The model's kernel is always compared.
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

        def make_batch(items: Sequence[Encoded], side: str) -> dict[str, Tensor]:
            return {key: value.to(device) for key, value in padded_batch(items, padding, side).items()}

        self.alone = [make_batch([item], "right") for item in items]
        self.shortest = min(range(len(items)), key=lambda i: len(items[i].ids))
        self.padded = {side: make_batch(items, side) for side in ("right", "left")}
        self.padded["left"]["position_ids"] += first_position(model, self.alone[0])

        dtypes = sorted({p.dtype for p in self.parameters.values()}, key=lambda d: torch.finfo(d).eps)
        self.dtype = "+".join(str(d).removeprefix("torch.") for d in dtypes)
        self.attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
        coarsest = dtypes[-1]
        half = coarsest in (torch.float16, torch.bfloat16)
        self.yardstick = None
        if yardstick:
            self.yardstick = copy.deepcopy(model).float() if half else model
        self.precise = "float32" if half else self.dtype
        names = dict.fromkeys([*kernels, self.attention]) if yardstick and self.attention else {}

        self.noise = Noise(coarsest)
        self.precise_noise = Noise(torch.float32, "float32, one rounding more") if half else self.noise
        self.twice = Comparison("twice", "the same again", TwiceNoise(self.noise, TWICE[coarsest]))
        self.sides = {side: Comparison("padding", f"on the {side}", self.noise) for side in self.padded}
        self.together = Comparison("batch", "among others", self.noise)
        self.kernels = {name: Comparison("kernel", f"{name}, {self.precise}", self.precise_noise) for name in names}
        self.kernels.pop("eager", None)  # that of the yardstick
        self.unsupported: dict[str, str] = {}
        self.rounded = Comparison("dtype", f"{self.dtype} against float32") if half and yardstick else None
        self.noise.against_float32 = self.rounded
        self.direction = 0.0  # largest 1 - cosine between the model's gradients in its dtype and in float32
        self.trace = Comparison("trace", "fast, against one at a time", self.noise)
        self.total: Gradients = {}  # Σ|g| of one example at a time

    def diagnosis(self, progress: Callable[[int, int], None] | None) -> Diagnosis:
        """Make all comparisons, and search the causes of those that fail."""
        steps = len(self.alone) + 1
        for i, batch in enumerate(self.alone):
            torch.manual_seed(0)  # so that a model that draws random numbers draws the same with one rounding more
            alone = gradients_of(self.model, batch)
            if not math.isfinite(alone.loss):
                kernel = f" with attention {self.attention}" if self.attention else ""
                hint = "" if self.dtype == "float32" else ", or does the dtype overflow (try --model.dtype float32)"
                sentence = (
                    f"the loss of an example alone is not a finite number in {self.dtype}{kernel}; "
                    f"has training diverged{hint}?"
                )
                return self._make_diagnosis([checked_row("finite", "loss", math.inf, 0.0)], [sentence])
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
        errors = self._compare_trace()
        if progress is not None:
            progress(steps, steps)
        return self._make_diagnosis(self._rows(), self._problems() or errors)

    def _copies(self, i: int) -> Batch:
        """A batch of one example repeated, at least twice and with at least as many tokens as the padded example."""
        length = self.padded["right"]["input_ids"].shape[1]
        times = max(2, -(-length // self.alone[i]["input_ids"].shape[1]))
        return {key: value.repeat(times, 1) for key, value in self.alone[i].items()}

    def _against_yardstick(self, i: int, alone: Computed) -> None:
        """Compare an example's gradients with those in float32, and the attention kernels there with eager attention.

        A kernel that fails is noted as unsupported, and not compared."""
        yardstick = self.yardstick
        if yardstick is None:
            return

        def with_kernel(name: str | None) -> Computed:
            if yardstick is self.model and name == self.attention:
                return alone  # computed already
            with attention_kernel(yardstick, name):
                return gradients_of(yardstick, self.alone[i])

        try:
            exact = with_kernel("eager" if self.attention else None)
        except Exception as why:  # a kernel may fail in any way
            self.unsupported["eager"] = _short(why)
            self.yardstick = self.rounded = self.noise.against_float32 = None
            self.kernels.clear()
            return
        if self.rounded is not None:
            self.rounded.add(i, alone, exact)
            self.direction = max(self.direction, 1 - cosine(alone.gradients, exact.gradients))
            with attention_kernel(yardstick, "eager" if self.attention else None), one_rounding_more(yardstick):
                self.precise_noise.rounded.add(i, gradients_of(yardstick, self.alone[i]), exact)
        for name, comparison in list(self.kernels.items()):
            try:
                comparison.add(i, with_kernel(name), exact)
            except Exception as why:
                self.unsupported[name] = _short(why)
                del self.kernels[name]

    def _compare_trace(self) -> list[str]:
        """Compare the fast trace of all examples, padded into one batch, with Σ|g| of one example at a time.

        Gives the error of a trace that can't be taken."""
        total = Computed(0.0, self.total)

        @contextmanager
        def open_sums(name: str, number: int) -> Iterator[dict[str, Tensor]]:
            theta = self.engine.parameters[name]
            sums = {"abs": torch.zeros_like(theta, dtype=sum_dtype(theta.dtype))}
            yield sums
            size, norm = total.scales.get(name, 0.0), total.norms.get(name, 0.0)
            self.trace.add_gradient(name, sums["abs"], self.total.get(name), size, norm)

        try:
            self.engine.run(self.padded["right"], [slice(None)], open_sums)
        except UserError as why:
            self.trace.errors[""] = Errors(math.inf, math.inf, math.inf)
            return [str(why)]
        return []

    # ---- the result

    def _rows(self) -> list[Row]:
        """The rows of all comparisons."""
        rows = []
        of_model = (self.noise.rounded, self.twice, *self.sides.values(), self.noise.copies, self.together)
        for comparison in (*of_model, *self.kernels.values(), self.rounded):
            rows += comparison.rows() if comparison is not None else []
        if self.rounded is not None:
            label = f"{self.rounded.label}: 1 - cosine"
            rows.append(checked_row("dtype", label, self.direction, DIRECTION, self.rounded.worst()[0]))
        for name, why in self.unsupported.items():
            rows.append(checked_row("kernel", f"{name}: not supported here ({why})", None, None))
        _, trace, scale = self.trace.rows()
        label = f"{self.trace.label}: Σ|g|"
        return [*rows, trace | {"what": label}, scale | {"what": f"{label}'s scale"}]

    def _problems(self) -> list[str]:
        """One sentence for each reason why the model can't be traced exactly."""
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
        problems = [self._explain_padding(side) for side, comparison in self.sides.items() if comparison.fails()]
        if (self.together.fails() or self.noise.copies.fails()) and not self.sides["right"].fails():
            problems.append(self._explain_neighbours())
        kernel = self.kernels.get(self.attention or "")
        if kernel is not None and kernel.fails() and self.yardstick is not None:
            problems.append(self._explain_kernel(kernel, self.yardstick))
        if self.rounded is not None and self.direction > DIRECTION:
            problems.append(
                f"gradients in {self.dtype} point elsewhere than in float32 (cosine {1 - self.direction:.2f}, worst "
                f"{self.rounded.worst()[0]}), so rounding rules them; use --model.dtype float32"
            )
        if self.trace.fails() and "" not in self.trace.errors:
            problems += self._explain_trace(problems)
        return problems

    def _explain_padding(self, side: str) -> str:
        """What padding on one side changes, in which module, and which causes were tried."""
        comparison, i = self.sides[side], self.sides[side].example
        padded = one_of(self.padded[side], i)
        spared = side == "left" and not self.sides["right"].fails()
        advice = "; pad on the right, as crosstrace itself does, which is exact" if spared else ""
        module = self._find_culprit(self.alone[i], padded, 0, 0)
        if comparison.loss == math.inf:
            cause = f"{module} fails on padding in {self.dtype} (try another --model.attention or --model.dtype)"
            return f"padding on the {side} {comparison.effect()}: {cause}{advice}"
        other = self._other_tokens_under(padded)
        if self._differ(padded, other, 0):
            reader = self._find_culprit(padded, other, 0, 0)
            kernel = self._kernel_advice()
            cause = f"{reader} ignored attention_mask: other tokens under the padding move its output{kernel}"
        else:
            cause = f"{module} gives something else, though other tokens under the padding change nothing"
            if "position_ids" in padded and not accepted(self.model, {"position_ids": None}):
                cause += "; its forward takes no position_ids"
            elif "position_ids" in padded and not self._differ(padded, reversed_positions(padded), 0):
                cause += "; other position_ids change nothing either, so positions may be counted from the padding on"
        return f"padding on the {side} {comparison.effect()}: {cause}{advice}"

    def _explain_neighbours(self) -> str:
        """What other examples in a batch change, in which module, and which causes were tried."""
        batch = self.padded["right"]
        failing = self.together if self.together.fails() else self.noise.copies
        i = failing.example
        if self._differ(batch, self._other_neighbours(i), i):
            module = self._find_culprit(batch, self._other_neighbours(i), i, i)
            cause = (
                f"{module} mixes examples: other neighbours move its output (statistics over the batch, shared "
                "capacity)"
            )
        else:
            larger, row = (batch, i) if failing is self.together else (self._copies(i), 0)
            single = one_of(batch, i) if failing is self.together else self.alone[i]
            module = self._find_culprit(single, larger, 0, row)
            cause = f"{module} gives something else in a larger batch, whatever the other examples are"
        return (
            f"company in a batch {failing.effect()}: {cause}; traces fall back to one example at a time where they "
            "must, but training and recall depend on who shares a batch, so change the module, or train and evaluate "
            "in batches of one"
        )

    def _explain_kernel(self, comparison: Comparison, yardstick: Any) -> str:
        """What the model's attention kernel changes, and in which module."""
        records, batch = [], self.alone[comparison.example]
        for name in ("eager", self.attention):
            with attention_kernel(yardstick, name):
                records.append(record_calls(yardstick, batch, 0))
        with attention_kernel(yardstick, "eager"), one_rounding_more(yardstick):
            noise = noise_of(records[0], record_calls(yardstick, batch, 0))
        culprit = forward_culprit(records[0], records[1], noise, self.precise_noise.epsilon)
        return (
            f"the attention kernel {self.attention} instead of eager, in {self.precise}, {comparison.effect()}"
            + (f", first in {culprit}" if culprit else "")
            + "; use --model.attention eager"
        )

    def _explain_trace(self, other_problems: list[str]) -> list[str]:
        """Which rule gives another trace. A rule is wrong only if the gradients in the same batch are right."""
        wrong_traces = [row["parameter"] for row in self.trace.disagree()]
        wrong_gradients = {row["parameter"] for c in (self.together, *self.sides.values()) for row in c.disagree()}
        blamed = [name for name in wrong_traces if name not in wrong_gradients]
        if not blamed:
            return [] if other_problems else ["the fast trace differs as the gradients in a batch do"]
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

    # ---- trying causes

    def _kernel_advice(self) -> str:
        if self.attention in (None, "eager"):
            return ""
        return f" (try --model.attention eager instead of {self.attention})"

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
        """Whether a row has another loss or other gradients in the second batch, beyond the noise."""
        comparison = Comparison("", "", self.noise)
        comparison.add(0, gradients_of(self.model, second, row), gradients_of(self.model, first, row))
        return comparison.fails()

    def _find_culprit(self, first: Batch, second: Batch, row: int, other_row: int) -> str:
        """The module that makes one example differ in two batches, in the forward or else in the backward."""
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

    def _make_diagnosis(self, rows: list[Row], problems: list[str]) -> Diagnosis:
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
    """Examples of each task that the model can hold, of lengths as different as possible.

    The tasks have equal numbers of examples; the first ones have one more if need be."""
    if count < 2:
        raise UserError(f"examples is {count}; expected at least 2, as one alone has neither padding nor neighbours")
    if texts is None:
        world = World.draw(FactSettings(people=max(8, count)))
        texts = {"bio": biographies(world), "qa": questions(world)}
    room = getattr(getattr(model, "config", None), "max_position_embeddings", None) or math.inf
    chosen = []
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
        chosen += [fitting[round(n * last / max(number - 1, 1))] for n in range(number)]
    return chosen


def _short(error: Exception) -> str:
    return textwrap.shorten(str(error), 100, placeholder=" …") or type(error).__name__
