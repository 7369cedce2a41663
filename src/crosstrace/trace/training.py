"""Traces from a training's own backward.

`TrainingTrace` listens to a model in training: the forward that the training makes anyway is recorded, and what its
backward brings to every module becomes the per-example gradients of both tasks, before the update. The training
computes what it would have computed; its loss is what is traced, so the targets are the training's.

The training's loss must be L = Σ_i w_i ℓ_i over the examples of its batches, ℓ_i the mean cross-entropy of example i's
labels; then e, the gradient of L, is that of ℓ_i times w_i in the rows of example i, and dividing by w_i gives back the
trace's unit, one example. w_i is n_i / N for the loss of transformers' causal language models (n_i labels of the
example, N of the batch or of all batches of an update), times whatever the training multiplies its loss with. That it
is so is checked on the gradient of the logits in every batch.

What is not known here: examples packed into one row, and losses that mix examples (an auxiliary loss of experts).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from crosstrace.errors import UserError
from crosstrace.losses import next_tokens
from crosstrace.trace.engine import Batch, undisturbed
from crosstrace.trace.modules import Linear, TransposedLinear
from crosstrace.trace.recording import Recording, Uses
from crosstrace.trace.rules import Arrangement, Call, reduce
from crosstrace.trace.trace import Accumulated

COLUMNS = ("task", "group", "loss_weight", "loss_labels")  # of a batch, for the trace alone: the model never sees them
# How far the logits' gradient may be from Σ_i w_i ∂ℓ_i, relative to its norm: rounding, and dtype of the logits.
AGREES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.05}


@dataclass(eq=False)
class _Pass:
    """One forward of the training and its backward. Tensors are in the order of the shares."""

    batch: Batch  # of the examples that have a target
    shares: list[tuple[str, int, slice]]  # task, part, its examples
    weights: Tensor  # [B] w_i up to a factor common to all; 0: no target, in no share
    order: Tensor | None  # [B] of the training's rows
    missing: set[str]  # parameters not traced yet
    recording: Recording
    wanted: dict[Call, Tensor] = field(default_factory=dict)  # a linear layer's weight gradient, to be filled
    factor: Tensor | None = None  # what the training multiplied its loss with, once its backward has begun
    hooks: ExitStack = field(default_factory=ExitStack)


class TrainingTrace(Accumulated):
    """Traces accumulated over a training, from its own forwards and backwards.

    Batches carry for each example the number of its task in the column `task` [B] (and, for `parts`, its `group`);
    these columns are taken out before the model sees them. A loop of one's own is

        with TrainingTrace(model, ["bio", "qa"]) as tracing:
            for batch in loader:
                with tracing.step(lr):
                    model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

    where several forwards and backwards in one step accumulate. Where the model does not compute the loss itself, a
    batch must have `loss_labels` [B, T], what is trained on, and `loss_weight` [B], w_i. With transformers' Trainer
    use `TraceCallback`. Parameters that have no rule are computed one example at a time at the end of a step, without
    dropout. Frozen parameters are left out.

    Args:
        model, tasks, measures, parts, lr_weighted, where: as in `Accumulated`.
        reductions: "example" by default; "step" needs a sum of gradients of the model's size for each task.
        reuse: let the training have the weight gradients of linear layers from the products that the trace makes,
            rather than multiply twice. That is much cheaper, and equal but for rounding: the sum over examples is
            taken in another order. Without it the training's gradients are those it would have had, bit for bit.
    """

    def __init__(
        self,
        model: nn.Module,
        tasks: Sequence[str],
        measures: Sequence[str] = ("abs",),
        reductions: Sequence[str] = ("example",),
        parts: int = 1,
        lr_weighted: bool = False,
        where: Literal["device", "cpu"] = "device",
        *,
        reuse: bool = False,
    ) -> None:
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        super().__init__(model, tasks, measures, reductions, parts, lr_weighted, where, trained)
        self._reuse = reuse
        self._hooks = ExitStack()
        self._active = False  # within a step
        self._now: _Pass | None = None  # the forward that is going on
        self._passes: list[_Pass] = []
        self._gradients: dict[str, dict[str, Tensor]] = {}  # per task, Σg of the step
        self._step_factor = 1.0

    def __enter__(self) -> TrainingTrace:
        model = self._engine.model
        self._hooks.callback(model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True).remove)
        self._hooks.callback(model.register_forward_hook(self._after).remove)
        return self

    def __exit__(self, *_: Any) -> None:
        self._forget()
        self._hooks.close()

    @contextmanager
    def step(self, lr: float = 1.0) -> Iterator[None]:
        """One step of training: the forwards and backwards within are traced, at the parameters as they are.

        Args:
            lr: the step's learning rate; counts only if `lr_weighted`.

        Raises:
            UserError: a batch without what the trace needs, or a loss that is not Σ_i w_i ℓ_i.
        """
        self.begin(lr)
        yield
        self.end()

    def begin(self, lr: float = 1.0) -> None:
        """Begin a step, where a context is of no use."""
        self._check_whole()
        self._active, self._whole = True, False
        self._step_factor = self._factor(lr)

    def end(self) -> None:
        """End the step, before the parameters are changed."""
        sizes: dict[str, dict[int, int]] = {}
        for done in self._passes:
            if done.factor is None:
                continue  # a forward without a backward
            self._late(done)
            for task, part, share in done.shares:
                of_task = sizes.setdefault(task, {})
                of_task[part] = of_task.get(part, 0) + share.stop - share.start
        for task, of_task in sizes.items():
            gradients = self._gradients.pop(task, {})
            for name in list(gradients):
                self._add_step(task, name, gradients.pop(name).div_(sum(of_task.values())), self._step_factor)
            self._count(task, of_task.items(), self._step_factor)
        self._forget()
        self._whole = True

    def _forget(self) -> None:
        """Let go of what was recorded."""
        for done in (*self._passes, *([self._now] if self._now else [])):
            done.hooks.close()
            done.recording.close()
        self._passes, self._now, self._active = [], None, False

    # ---- the training's forward

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        columns = {name: kwargs[name] for name in COLUMNS if name in kwargs}
        kwargs = {name: value for name, value in kwargs.items() if name not in columns}
        if self._now is not None:  # its forward failed, and a new one is tried
            self._now.hooks.close()
            self._now = None
        if self._active and module.training and torch.is_grad_enabled():
            self._now = self._started(args, kwargs, columns)
        return args, kwargs

    def _started(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], columns: dict[str, Tensor]) -> _Pass | None:
        """Record the forward that begins; None if no example has a target."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        labels = columns.get("loss_labels", kwargs.get("labels"))
        found = ", ".join(repr(name) for name in (*kwargs, *columns)) or "nothing by name"
        if ids is None or ids.dim() != 2:
            raise UserError(f"the training's forward got {found}; the trace expects input_ids [examples, positions]")
        if labels is None or ("loss_labels" in columns) != ("loss_weight" in columns):
            raise UserError(
                f"the training's forward got {found}; the trace expects labels or, where the loss is computed outside "
                "of the model, the columns loss_labels and loss_weight"
            )
        if "task" not in columns:
            raise UserError(
                f"the training's batch has {found}, but no column 'task' with the number of each example's task; "
                "with transformers' Trainer set remove_unused_columns=False, or it takes the column away"
            )
        task, known = columns["task"].to(ids.device).long(), list(self._steps)
        if task.shape != ids.shape[:1] or bool(((task < 0) | (task >= len(known))).any()):
            raise UserError(
                f"column 'task' is {task.tolist() if task.numel() < 9 else list(task.shape)}; expected, for each of "
                f"{len(ids)} examples, a number from 0 to {len(known) - 1} ({', '.join(known)})"
            )
        targets = (next_tokens(labels) != -100).sum(1)
        group = columns.get("group", torch.arange(len(ids))).to(ids.device)
        parts = self._parts
        key = torch.where(targets > 0, task * parts + group % parts, len(known) * parts)  # without a target: last
        order = key.argsort(stable=True)
        kept = order[: int((targets > 0).sum())]
        if not len(kept):
            return None

        if "loss_weight" in columns:
            weights = columns["loss_weight"].to(ids.device).double().masked_fill(targets == 0, 0)[order]
            if bool((weights[: len(kept)] == 0).any()):
                raise UserError("the loss_weight of an example with labels is 0; expected its labels to be -100 then")
        else:
            total = kwargs.get("num_items_in_batch")
            weights = targets[order].double() / (targets.sum() if total is None else float(total))
        mask = kwargs.get("attention_mask")
        whole = {"input_ids": ids, "labels": labels, "position_ids": kwargs.get("position_ids")}
        whole["attention_mask"] = torch.ones_like(ids) if mask is None else mask
        batch = {name: value[kept] for name, value in whole.items() if value is not None and value.shape == ids.shape}
        shares, start = [], 0
        for number, size in zip(*(x.tolist() for x in key[kept].unique_consecutive(return_counts=True))):
            shares.append((known[number // parts], number % parts, slice(start, start + size)))
            start += size

        engine = self._engine
        self._active = False  # the plan's own forwards are not the training's
        engine.plan_for(batch)
        self._active = True
        moved = None if torch.equal(order, torch.arange(len(order), device=order.device)) else order
        missing = {name for name, way in engine.plan.items() if way != []}
        done = _Pass(batch, shares, weights, moved, missing, None)  # pyright: ignore[reportArgumentType]
        deliver = lambda name, uses: self._deliver(done, name, uses)
        replace = (lambda call, result: self._shared(done, call, result)) if self._reuse else None
        done.recording = Recording(engine.owners, tuple(ids.shape), deliver, engine.reading(), None, replace)
        done.hooks.enter_context(done.recording.watching(engine.model))
        return done

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        done, self._now = self._now, None
        if done is None:
            return
        done.hooks.close()
        self._passes.append(done)
        if done.recording.blind:
            raise UserError(
                "the training runs modules without gradients and again in the backward, as gradient checkpointing with "
                "use_reentrant=True does; the trace expects gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        if getattr(output, "aux_loss", None) is not None:
            raise UserError(
                "the training adds the model's auxiliary loss, which mixes examples; the trace expects "
                "output_router_logits=False"
            )
        for call in done.recording.sources:
            call.node.register_prehook(lambda e, call=call: done.recording.arrived(call, e[0]))
        loss, logits = getattr(output, "loss", None), getattr(output, "logits", None)
        loss = loss if isinstance(loss, Tensor) and loss.requires_grad else None
        if logits is None or not logits.requires_grad or logits.shape[:2] != done.recording.shape:
            if loss is None:
                raise UserError("the training's model gives neither a loss nor logits [examples, positions, tokens]")
        else:
            self._check_loss(done, logits)
        if loss is not None:
            loss.register_hook(lambda e: self._begun(done, e))

    # ---- the training's backward

    def _check_loss(self, done: _Pass, logits: Tensor) -> None:
        """See to it that the gradient of the logits is Σ_i w_i ∂ℓ_i, by one target of each example."""
        labels, rows = done.batch["labels"], torch.arange(len(done.batch["labels"]), device=logits.device)
        wanted = next_tokens(labels)
        targets = wanted != -100
        place = targets.to(torch.uint8).argmax(1)
        there = rows if done.order is None else done.order[: len(rows)]
        expected = logits.detach()[there, place].double().softmax(-1)
        expected[rows, wanted[rows, place]] -= 1
        share = done.weights[: len(rows)] / targets.sum(1)
        expected *= share.unsqueeze(1)

        def check(e: Tensor) -> None:
            got = e[there, place].double()
            if done.factor is None:
                self._begun(done, (got * expected).sum() / expected.square().sum().clamp(min=1e-300))
            assert done.factor is not None
            noise = 8 * torch.finfo(e.dtype).eps * share.norm() * done.factor.abs()
            if bool((got - done.factor * expected).norm() > AGREES[e.dtype] * got.norm() + noise):
                raise UserError(
                    "the training's loss is not the weighted mean over examples that the trace takes it for (label "
                    "smoothing, another loss, or other weights?); expected the mean cross-entropy of the labels, or "
                    "the columns loss_labels and loss_weight that say how it differs"
                )

        logits.register_hook(check)

    def _begun(self, done: _Pass, factor: Tensor) -> None:
        """The backward has begun, and what the loss was multiplied with is known."""
        done.factor = factor.detach().double()
        scale = done.factor * done.weights
        done.recording.arrange(Arrangement(done.order, torch.where(scale == 0, 0, 1 / scale)))

    def _shared(self, done: _Pass, call: Call, result: Tensor) -> Tensor | None:
        """For a linear layer's output: the same, its weight's gradient to come from the trace's products."""
        weight: Any = getattr(call.module, "weight", None)
        bias = getattr(call.module, "bias", None)
        own = self._engine.owners[call.name]
        if call.input is None or "weight" not in own or not set(own) <= {"weight", "bias"}:
            return None
        way = self._engine.plan[own["weight"]] or []
        kinds = {Linear.name: False, TransposedLinear.name: True}
        if len(way) != 1 or way[0][2] not in kinds or not weight.dtype == call.input.dtype == result.dtype:
            return None  # another module, a tied weight, or autocast

        def gradient(e: Tensor) -> Tensor:
            assert call.input is not None
            inputs = call.input.detach().flatten(0, -2)
            total = done.wanted[call] = torch.zeros_like(weight)
            done.recording.arrived(call, e)
            if done.wanted.pop(call, None) is not None:  # its calls were others than planned
                e = e.flatten(0, -2)
                total = inputs.t() @ e if kinds[way[0][2]] else e.t() @ inputs
            return total

        return _Shared.apply(result.detach(), call.input, weight, bias, kinds[way[0][2]], gradient)

    def _deliver(self, done: _Pass, name: str, uses: Uses) -> None:
        with torch.autocast(done.weights.device.type, enabled=False):
            rules = self._engine.rules(name, uses)
            if rules is None:
                done.missing.add(name)
                return
            total = done.wanted.pop(uses[0][0], None) if uses and uses[0][1] == "weight" else None
            weights = [] if total is None or done.factor is None else (done.factor * done.weights).tolist()
            state = torch.get_rng_state() if any(rule.reruns for rule in rules) else None
            for task, part, share in done.shares:
                with self._open(task, part, name, self._gradients.setdefault(task, {}), self._step_factor) as sums:
                    reduce(rules, sums, share, weighted=total, weights=weights)
            if state is not None:
                torch.set_rng_state(state)
        done.missing.discard(name)

    def _late(self, done: _Pass) -> None:
        """What no rule served, one example at a time."""
        engine = self._engine
        unforeseen = {
            name for name, way in engine.plan.items() if way == [] and engine.parameters[name].grad is not None
        }
        names = sorted(done.missing | unforeseen)
        if not names:
            return

        def into(name: str, number: int) -> AbstractContextManager[dict[str, Tensor]]:
            task, part, _ = done.shares[number]
            return self._open(task, part, name, self._gradients.setdefault(task, {}), self._step_factor)

        active, self._active = self._active, False
        with undisturbed(engine.model):
            engine.one_by_one(done.batch, [share for _, _, share in done.shares], names, into)
        self._active = active


class _Shared(torch.autograd.Function):
    """y = x Wᵀ + b (transposed: x W + b), computed already; in the backward `gradient` gives that of W from y's.

    It saves no tensor of its own: within a checkpointed block their number must not change.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, gradient: Any):
        ctx.weight, ctx.version, ctx.transposed, ctx.gradient = weight, weight._version, transposed, gradient
        ctx.mark_dirty(y)  # y itself, not a view of it: what follows may change it in place
        return y

    @staticmethod
    def backward(ctx: Any, e: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.weight._version != ctx.version:
            raise RuntimeError("a weight was changed between the forward and the backward of a step")
        weight = ctx.weight.detach()
        of_x = e @ (weight.t() if ctx.transposed else weight) if ctx.needs_input_grad[1] else None
        of_bias = e.flatten(0, -2).sum(0) if ctx.needs_input_grad[3] else None
        of_weight = ctx.gradient(e) if ctx.needs_input_grad[2] else None
        return None, of_x, of_weight, of_bias, None, None
