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

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from crosstrace.errors import UserError
from crosstrace.losses import next_tokens
from crosstrace.sharded import is_sharded
from crosstrace.trace.engine import Batch, undisturbed
from crosstrace.trace.modules import Linear, TransposedLinear
from crosstrace.trace.recording import Recording, Uses
from crosstrace.trace.rules import Arrangement, Call, reduce, sum_dtype
from crosstrace.trace.trace import Accumulated

COLUMNS = ("task", "group", "loss_weight", "loss_labels")  # of a batch, for the trace alone: the model never sees them
# How far the logits' gradient may be from Σ_i w_i ∂ℓ_i, relative to its norm: rounding, and dtype of the logits.
AGREES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.02}
CHECKED = 16  # examples of a batch whose targets are looked at for that
_LISTENING: WeakKeyDictionary[nn.Module, TrainingTrace] = WeakKeyDictionary()


@dataclass(eq=False)
class _Pass:
    """One forward of the training and its backward. Tensors are in the order of the shares."""

    batch: Batch  # of the examples that have a target
    shares: list[tuple[str, int, slice]]  # task, part, its examples
    weights: Tensor  # [B] w_i up to a factor common to all; 0: no target, in no share
    order: Tensor | None  # [B] of the training's rows
    missing: set[str]  # parameters not traced yet
    others: list[str]  # tensors that the model got besides the batch
    recording: Recording
    wanted: dict[Call, Tensor] = field(default_factory=dict)  # a linear layer's weight gradient, to be filled
    unseen: bool = False  # the logits' gradient is to be checked and has not come
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
        if is_sharded(model):
            raise UserError(
                "the model is sharded, and a trace from the training's own backward needs each gradient whole; use "
                "OnlineTrace, or trace its checkpoints with `trace`"
            )
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        super().__init__(model, tasks, measures, reductions, parts, lr_weighted, where, trained)
        self._reuse = reuse
        self._hooks = ExitStack()
        self._active = False  # within a step
        self._now: _Pass | None = None  # the forward that is going on
        self._passes: list[_Pass] = []
        self._gradients: dict[str, dict[str, Tensor]] = {}  # per task, Σg of the step
        self._step_factor = 1.0
        self._checked = 0  # passes whose loss was checked
        self._late_numel = self._passed = 0  # parameters (a pass) computed one example at a time; passes

    def __enter__(self) -> TrainingTrace:
        model = self._engine.model
        other = _LISTENING.get(model)
        if other is not None and other is not self:  # of a training that was interrupted
            other.__exit__()
        _LISTENING[model] = self
        self._hooks.callback(model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True).remove)
        self._hooks.callback(model.register_forward_hook(self._after, with_kwargs=True).remove)
        return self

    def __exit__(self, *_: Any) -> None:
        self._forget()
        self._hooks.close()
        if _LISTENING.get(self._engine.model) is self:
            del _LISTENING[self._engine.model]

    @property
    def late(self) -> float:
        """Share of the parameters computed one example at a time at the end of steps, over all passes so far."""
        whole = sum(p.numel() for p in self._engine.parameters.values())
        return self._late_numel / (whole * self._passed) if self._passed else 0.0

    @property
    def stepping(self) -> bool:
        """Whether a step has begun and not ended."""
        return not self._whole

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
            if done.unseen:
                raise UserError(
                    "the training's backward does not pass through the logits that its model gives, so its loss can't "
                    "be checked; expected a loss made of them"
                )
            self._passed += 1
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
        if self._active and torch.is_grad_enabled():
            self._now = self._started(args, kwargs, columns)
        return args, kwargs

    def _started(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], columns: dict[str, Tensor]) -> _Pass | None:
        """Record the forward that begins; None if no example has a target."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        if isinstance(ids, Tensor):
            columns = {name: torch.as_tensor(value, device=ids.device) for name, value in columns.items()}
        labels = columns.get("loss_labels", kwargs.get("labels"))
        found = ", ".join(repr(name) for name in (*kwargs, *columns)) or "nothing by name"
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            raise UserError(f"the training's forward got {found}; the trace expects input_ids [examples, positions]")
        if labels is None or ("loss_labels" in columns) != ("loss_weight" in columns):
            raise UserError(
                f"the training's forward got {found}; the trace expects labels or, where the loss is computed outside "
                "of the model, the columns loss_labels and loss_weight"
            )
        if "task" not in columns:
            raise UserError(
                f"the training's batch has {found}, but no column 'task' with the number of each example's task; "
                "with transformers' Trainer set remove_unused_columns=False, or it takes the column away (or has a "
                "training been interrupted whose trace still listens? leave its context, or close its callback)"
            )
        mask = kwargs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        for name, value in (*columns.items(), ("labels", labels), ("attention_mask", mask)):
            shape = ids.shape if name in ("labels", "loss_labels", "attention_mask") else ids.shape[:1]
            if value.shape != shape:
                raise UserError(
                    f"{name!r} of the training's batch has shape {list(value.shape)}; expected {list(shape)}, as "
                    f"input_ids is {list(ids.shape)}"
                )
        task, known = columns["task"].long(), list(self._steps)
        if bool(((task < 0) | (task >= len(known)) | (task != columns["task"])).any()):
            raise UserError(
                f"column 'task' is {columns['task'].tolist()[:8]}; expected for each of {len(ids)} examples a number "
                f"from 0 to {len(known) - 1} ({', '.join(known)})"
            )
        if bool(((labels[:, 1:] != -100) & (mask[:, 1:] == 0)).any()):
            raise UserError(
                "the training's labels count padding (positions where attention_mask is 0) as targets; expected -100 "
                "there, or the model is taught to predict padding and an example's loss depends on its batch"
            )
        targets = (next_tokens(labels) != -100).sum(1)
        group = columns.get("group", torch.arange(len(ids), device=ids.device)).long()
        parts = self._parts
        key = torch.where(targets > 0, task * parts + group % parts, len(known) * parts)  # without a target: last
        order = key.argsort(stable=True)
        kept = order[: int((targets > 0).sum())]
        if not len(kept):
            return None

        if "loss_weight" in columns:
            weights = columns["loss_weight"].double().masked_fill(targets == 0, 0)[order]
            if bool((weights[: len(kept)] == 0).any()):
                raise UserError("the loss_weight of an example with labels is 0; expected its labels to be -100 then")
        else:
            total = kwargs.get("num_items_in_batch")
            weights = targets[order].double() / (targets.sum() if total is None else float(total))
        whole = {"input_ids": ids, "attention_mask": mask, "labels": labels, "position_ids": kwargs.get("position_ids")}
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
        given = {"input_ids", "attention_mask", "position_ids", "labels", "num_items_in_batch"}
        others = sorted(name for name, value in kwargs.items() if isinstance(value, Tensor) and name not in given)
        done = _Pass(batch, shares, weights, moved, missing, others, None)  # pyright: ignore[reportArgumentType]
        deliver = lambda name, uses: self._deliver(done, name, uses)
        replace = (lambda call, result: self._shared(done, call, result)) if self._reuse else None
        done.recording = Recording(
            engine.owners, (ids.shape[0], ids.shape[1]), deliver, engine.reading(), None, replace
        )
        done.hooks.enter_context(done.recording.watching(engine.model, root=False))
        return done

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        done, self._now = self._now, None
        if done is None:
            return
        if "" in done.recording.owners:  # the whole model, whose own hooks are being called right now
            done.recording.record("", module, args, kwargs, output)
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
        """See to it that the gradient of the logits is Σ_i w_i ∂ℓ_i.

        All positions without a target must have none; the first and the last target of some examples, others in every
        batch, must have the one of the cross-entropy: all of the vocabulary is too much to look at each time.
        """
        wanted = next_tokens(done.batch["labels"])
        targets = wanted != -100
        count = len(wanted)
        some = (torch.arange(min(CHECKED, count), device=logits.device) + CHECKED * self._checked) % count
        self._checked += 1
        span = torch.arange(wanted.shape[1], device=logits.device) * targets[some]
        rows, place = some.repeat(2), torch.cat([targets[some].to(torch.uint8).argmax(1), span.argmax(1)])
        there = rows if done.order is None else done.order[rows]
        wide = torch.promote_types(logits.dtype, torch.float32)
        expected = logits.detach()[there, place].to(wide).softmax(-1)
        expected[torch.arange(len(rows), device=rows.device), wanted[rows, place]] -= 1
        share = (done.weights[rows] / targets.sum(1)[rows]).unsqueeze(1)
        expected *= share
        empty = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
        empty[slice(0, count) if done.order is None else done.order[:count]] = ~targets
        done.unseen = True

        def check(gradients: Sequence[Tensor]) -> None:
            e, done.unseen = gradients[0], False
            got = e[there, place].to(wide)
            if done.factor is None:
                self._begun(done, (got * expected).sum() / expected.square().sum())
            assert done.factor is not None
            apart = (got - done.factor.to(wide) * expected).norm(dim=1)
            noise = 2 * torch.finfo(e.dtype).eps * (share.squeeze(1) * done.factor).abs()
            right = bool((apart <= AGREES[e.dtype] * got.norm(dim=1) + noise).all())
            if not right or bool((e[..., :8].abs().amax(-1) * empty).any()):
                raise UserError(
                    "the training's loss is not the weighted mean over examples that the trace takes it for (label "
                    "smoothing, another loss, or other weights?); expected the mean cross-entropy of the labels, or "
                    "the columns loss_labels and loss_weight that say how it differs"
                )

        node: Any = logits.grad_fn
        while node.name() == "ToCopyBackward0":  # accelerate gives a float32 copy, which the loss is not made of
            node = node.next_functions[0][0]
        node.register_prehook(check)

    def _begun(self, done: _Pass, factor: Tensor) -> None:
        """The backward has begun, and what the loss was multiplied with is known."""
        done.factor = factor.detach().double()
        if not bool(done.factor.isfinite()) or not bool(done.factor):
            raise UserError(
                f"the training multiplies its loss with {float(done.factor)}; expected a finite factor, not 0"
            )
        scale = done.factor * done.weights
        done.recording.arrange(Arrangement(done.order, torch.where(scale == 0, 0, 1 / scale)))

    def _shared(self, done: _Pass, call: Call, result: Tensor) -> Tensor | None:
        """For a linear layer's output: the same, its weight's gradient to come from the trace's products."""
        weight: Any = getattr(call.module, "weight", None)
        bias = getattr(call.module, "bias", None)
        own = self._engine.owners[call.name]
        if call.input is None or "weight" not in own or not _plain(call.module):
            return None
        way = self._engine.plan[own["weight"]] or []
        kinds = {Linear.name: False, TransposedLinear.name: True}
        if len(way) != 1 or way[0][2] not in kinds or not weight.dtype == call.input.dtype == result.dtype:
            return None  # another module, a tied weight, or autocast

        def gradient(e: Tensor) -> Tensor:
            if call.input is None:
                raise RuntimeError("a second backward through one forward can't be traced with reuse=True")
            inputs = call.input.detach().flatten(0, -2)
            total = done.wanted[call] = torch.zeros_like(weight, dtype=sum_dtype(weight.dtype))
            done.recording.arrived(call, e)
            if done.wanted.pop(call, None) is not None:  # its calls were others than planned
                e = e.flatten(0, -2)
                total = inputs.t() @ e if kinds[way[0][2]] else e.t() @ inputs
            return total.to(weight.dtype)

        return _Shared.apply(result.detach(), call.input, weight, bias, kinds[way[0][2]], gradient)

    def _deliver(self, done: _Pass, name: str, uses: Uses) -> None:
        device = done.weights.device
        with ExitStack() as apart:
            apart.enter_context(torch.autocast(device.type, enabled=False))
            if any(rule.reruns for rule in self._engine.planned(name)):  # the training's random numbers are its own
                apart.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
            rules = self._engine.rules(name, uses)
            if rules is None:
                done.missing.add(name)
                return
            total = done.wanted.pop(uses[0][0], None) if uses and uses[0][1] == "weight" else None
            weights = [] if total is None or done.factor is None else (done.factor * done.weights).tolist()
            for task, part, share in done.shares:
                with self._open(task, part, name, self._gradients.setdefault(task, {}), self._step_factor) as sums:
                    reduce(rules, sums, share, weighted=total, weights=weights)
        done.missing.discard(name)

    def _late(self, done: _Pass) -> None:
        """What no rule served, one example at a time."""
        engine, recording = self._engine, done.recording
        names = []
        for name, way in engine.plan.items():
            called = name in recording.of or name in recording.hidden
            if way == [] or (way is not None and name in done.missing and not called):
                # no gradient, as was planned, or of a module that this forward left out; or a use that no call shows
                if engine.parameters[name].grad is not None and way == []:
                    names.append(name)
            elif name in done.missing:
                names.append(name)
        if not names:
            return
        if done.others:
            raise UserError(
                f"parameter {names[0]!r} has no rule, and the model got {done.others[0]!r}, which it would not get "
                "where one example at a time is traced; expected input_ids, attention_mask and position_ids only"
            )
        self._late_numel += sum(engine.parameters[name].numel() for name in names)

        def into(name: str, number: int) -> AbstractContextManager[dict[str, Tensor]]:
            task, part, _ = done.shares[number]
            return self._open(task, part, name, self._gradients.setdefault(task, {}), self._step_factor)

        active, self._active = self._active, False
        with undisturbed(engine.model):
            engine.one_by_one(done.batch, [share for _, _, share in done.shares], names, into)
        self._active = active


def _plain(module: nn.Module) -> bool:
    """Whether a module computes x Wᵀ + b (Conv1D: x W + b) and nothing else: no subclass's forward, patch or hook."""
    from transformers.pytorch_utils import Conv1D

    if "forward" in vars(module) or module._forward_pre_hooks or len(module._forward_hooks) > 1:
        return False  # (one is the recording's)
    if not set(module._parameters) <= {"weight", "bias"}:
        return False
    return inspect.unwrap(type(module).forward) in (nn.Linear.forward, Conv1D.forward)


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
    @once_differentiable
    def backward(ctx: Any, e: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.weight._version != ctx.version:
            raise RuntimeError("a weight was changed between the forward and the backward of a step")
        weight = ctx.weight.detach()
        of_x = e @ (weight.t() if ctx.transposed else weight) if ctx.needs_input_grad[1] else None
        of_bias = e.flatten(0, -2).sum(0) if ctx.needs_input_grad[3] else None
        of_weight = ctx.gradient(e) if ctx.needs_input_grad[2] else None
        return None, of_x, of_weight, of_bias, None, None
