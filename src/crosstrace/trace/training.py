"""Traces from a training's own backward.

`TrainingTrace` listens to a model in training: the forward that the training makes anyway is recorded, and what its
backward brings to every module becomes the per-example gradients of both tasks, before the update. The training
computes what it would have computed; its loss is what is traced, so the targets are the training's.

The training's loss must be L = Σ_i w_i ℓ_i over the examples of its batches, ℓ_i the mean cross-entropy of example i's
labels; then e, the gradient of L, is that of ℓ_i times w_i in the rows of example i, and dividing by w_i gives back the
trace's unit, one example. w_i is n_i / N for the loss of transformers' causal language models (n_i labels of the
example, N of the batch or of all batches of an update), times whatever the training multiplies its loss with. That it
is so is checked in every batch, where the loss falls apart into its examples (`split`).

A training's forward may differ from the one that the rules were chosen on: dropout, a cache that it fills, modules that
evaluation does not call. So the rules are tried on it too, against the gradients of single examples that its own graph
gives. What no rule serves there is computed one example at a time: by itself, where that was seen to give the same
gradient, else through the training's graph. Nothing is left out: at the end of a step every parameter whose gradient
the training changed has been traced, or an error names it.

What is not known here: examples packed into one row, and losses that mix examples (an auxiliary loss of experts).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from crosstrace.core.errors import UserError
from crosstrace.core.pieces import is_sharded
from crosstrace.trace.accumulated import Accumulated
from crosstrace.trace.engine import Batch, undisturbed
from crosstrace.trace.modules import Linear, TransposedLinear
from crosstrace.trace.packed import is_packed
from crosstrace.trace.probe import AGREES, Kind, agree, kind_of, pair_of
from crosstrace.trace.recording import Recording, Uses, ignore, random_states
from crosstrace.trace.rules import Arrangement, Call, Unfit, reduce, sum_dtype
from crosstrace.trace.split import Split, splits
from crosstrace.training.losses import next_tokens

COLUMNS = ("task", "group", "loss_weight", "loss_labels")  # of a batch, for the trace alone: the model never sees them
SAMPLE = 4096  # elements of a gradient by which two of the same parameter are compared
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
    by_itself: dict[int, dict[str, Tensor]]  # for the examples that rules are tried on, samples of their gradients
    wanted: dict[Call, Tensor] = field(default_factory=dict)  # a linear layer's weight gradient, to be filled
    unseen: bool = False  # the loss is to be checked where it falls apart, and its gradient there has not come
    factor: Tensor | None = None  # what the training multiplied its loss with, once its backward has begun
    before: list[Tensor] = field(default_factory=list)  # the states of the random generators before the forward
    drew: bool = False  # whether it drew random numbers
    loss: Tensor | None = None  # that the model gave
    refused: set[str] = field(default_factory=set)  # parameters whose rule did not fit, against what was planned
    unreached: set[str] = field(default_factory=set)  # parameters that no example's loss reaches
    hooks: ExitStack = field(default_factory=ExitStack)

    @property
    def scale(self) -> Tensor:
        """[B] what the gradient of the training's loss is multiplied by to be that of ℓ_i; 0 without a target."""
        assert self.factor is not None
        whole = self.factor * self.weights
        return torch.where(whole == 0, 0, 1 / whole)


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
    use `TraceCallback`. Dropout is traced as it was drawn. Frozen parameters are left out.

    The first forward costs more: the rules are tried on it. A parameter that no rule serves is computed one example at
    a time: at the end of the step, at the price of about one more forward and backward of the batch; or, where one
    example by itself has another gradient (dropout, a cache that was filled), through the training's graph, at the
    price of a backward of the whole batch for each example. `late` says how large a share that is.

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
        self._seen = 0  # passes so far
        self._tries = 0  # passes that the rules were tried on
        self._untried = set(self._engine.parameters)  # whose rules were not seen to be right in the training's forward
        self._calm: set[str] = set()  # parameters whose gradient is the same where an example is by itself
        self._alive: set[str] = set()  # parameters whose gradient and trace were both seen not to be zero
        self._grads: dict[str, tuple[int, int]] = {}  # which gradients there were when the step began
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
        """Share of the parameters computed one example at a time, over all passes so far."""
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
        self._grads = self._marks()

    def _marks(self) -> dict[str, tuple[int, int]]:
        """Which gradient each parameter has, and how often it was changed."""
        grads = {name: p.grad for name, p in self._engine.parameters.items()}
        return {name: (id(grad), grad._version) for name, grad in grads.items() if grad is not None}

    def end(self) -> None:
        """End the step, before the parameters are changed."""
        sizes: dict[str, dict[int, int]] = {}
        changed = {name for name, mark in self._marks().items() if self._grads.get(name) != mark}
        for done in self._passes:
            if done.factor is None and not done.recording.early:
                continue  # a forward without a backward
            if done.factor is None or done.unseen:
                raise UserError(
                    "the training's backward does not come through the loss, the logits or the log-probabilities that "
                    "its model gives, so its loss can't be checked; expected a loss made of them (not of hidden "
                    "states, as fused heads outside of the model make it), or use OnlineTrace"
                )
            self._passed += 1
            self._late(done, changed)
            for task, part, share in done.shares:
                of_task = sizes.setdefault(task, {})
                of_task[part] = of_task.get(part, 0) + share.stop - share.start
        if changed and not sizes:
            raise UserError(
                f"a step of the training changed gradients ({min(changed)} and {len(changed) - 1} others), but no "
                "forward of the model that is traced had to do with it; expected the loss to come from a call of that "
                "very model in training, not of a part of it, a copy or a compiled one; or use OnlineTrace"
            )
        for task, of_task in sizes.items():
            gradients = self._gradients.pop(task, {})
            for name in list(gradients):
                self._add_step(task, name, gradients.pop(name), sum(of_task.values()), self._step_factor)
            self._count(task, of_task.items(), self._step_factor)
        self._check_alive(changed)
        self._forget()
        self._whole = True

    def _check_alive(self, changed: set[str]) -> None:
        """Raise a `UserError` if a parameter that the training has changed the gradient of has a trace of zero."""
        # θ·g is zero where θ is, g² where it is too small for a float, and all at a learning rate of zero
        means = [mean for mean in self._means.values() if mean.measure.at is None and mean.measure.sums != "square"]
        if not means or not self._step_factor:
            return
        for name in sorted(changed - self._alive):
            grad = self._engine.parameters[name].grad
            if grad is None or not grad.any():
                continue
            if not any(bool(mean.total[name].any()) for mean in means):
                raise self._no_example(name)
            self._alive.add(name)

    def _no_example(self, name: str) -> UserError:
        return UserError(
            f"parameter {name!r} gets a gradient in the training, but none of its examples gives it one, so it can't "
            "be traced there; does something else than their loss change it, such as a penalty on weights? Trace "
            "checkpoints, or use OnlineTrace"
        )

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
        if labels is None and not columns.keys() & {"loss_labels", "loss_weight"}:
            raise UserError(
                f"the training's forward got {found}, and no labels, so its loss is computed outside of the model (by "
                "compute_loss_func, by label smoothing, which can't be traced, or by a loop of one's own); expected "
                "labels, or the columns loss_labels and loss_weight, which say what the loss is made of"
            )
        if labels is None or ("loss_labels" in columns) != ("loss_weight" in columns):
            raise UserError(
                f"the training's forward got {found}; where the loss is computed outside of the model, the trace "
                "expects both columns, loss_labels and loss_weight"
            )
        if "task" not in columns:
            raise UserError(
                f"the training's batch has {found}, but no column 'task' with the number of each example's task; a "
                "Trainer takes it away unless remove_unused_columns=False, and many data collators do (TRL's too) "
                "unless wrapped: trainer.data_collator = KeepColumns(trainer.data_collator)"
            )
        mask = kwargs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        positions = kwargs.get("position_ids")
        if "cu_seq_lens_q" in kwargs or (
            isinstance(positions, Tensor) and positions.shape == ids.shape and is_packed(positions, mask)
        ):
            raise UserError(
                "the training packs several examples into a row, and its own backward can't be taken apart into them; "
                "expected one example a row (with TRL packing=False and padding_free=False, with transformers another "
                "collator than DataCollatorWithFlattening), or use OnlineTrace, which unpacks"
            )
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
        by_itself = {}
        self._active = False  # the forwards here are not the training's
        before = dict(engine.plan)
        engine.plan_for(batch)
        chosen = {name for name, way in engine.plan.items() if before.get(name) != way}
        self._untried |= chosen
        if self._untried and (chosen or self._tries == 0 or self._seen & (self._seen - 1) == 0):  # ever more rarely
            with undisturbed(engine.model):
                by_itself = {i: self._samples(batch, i) for i in pair_of(batch["attention_mask"])}
        self._active = True
        moved = None if torch.equal(order, torch.arange(len(order), device=order.device)) else order
        missing = set(engine.parameters)
        given = {"input_ids", "attention_mask", "position_ids", "labels", "num_items_in_batch"}
        others = sorted(name for name, value in kwargs.items() if isinstance(value, Tensor) and name not in given)
        done = _Pass(batch, shares, weights, moved, missing, others, None, by_itself)  # pyright: ignore[reportArgumentType]
        deliver, replace = partial(self._deliver, done), partial(self._shared, done) if self._reuse else None
        shape, rerun = (ids.shape[0], ids.shape[1]), engine.rerun()
        done.recording = Recording(engine.owners, shape, deliver, engine.reading(), None, replace, rerun=rerun)
        done.hooks.enter_context(done.recording.watching(engine.model, root=False))
        if "" in rerun:
            done.recording.begin("", engine.model, args)
        done.before = random_states(ids.device)
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
        for call, node in done.recording.sources:
            node.register_prehook(lambda e, call=call: done.recording.arrived(call, e[0]))
        done.drew = any(not torch.equal(a, b) for a, b in zip(done.before, random_states(done.weights.device)))
        loss = getattr(output, "loss", None)
        loss = loss if isinstance(loss, Tensor) and loss.requires_grad else None
        shape, labels = done.recording.shape, done.batch["labels"]
        found = splits(output, shape, labels, done.weights, done.order, self._seen)
        if not found and loss is None:
            raise UserError(
                "the training's model gives neither a loss nor logits [examples, positions, tokens] with a gradient; "
                "expected one of them, or use OnlineTrace"
            )
        self._seen += 1
        done.unseen = bool(found)
        for split in found:
            split.node.register_prehook(partial(self._splits, done, split))
        if loss is not None:
            done.loss = loss.detach()
            loss.register_hook(partial(self._told, done))

    # ---- the training's backward

    def _told(self, done: _Pass, e: Tensor) -> None:
        """The loss's gradient has come: what the training multiplied it with."""
        if done.recording.aside is None:
            self._multiplied(done, e)
            if not done.unseen:
                done.recording.arrange(Arrangement(done.order, done.scale))

    def _splits(self, done: _Pass, split: Split, gradients: Sequence[Tensor]) -> None:
        """The gradient has come to where the loss falls apart."""
        if done.recording.aside is not None:
            return  # of a backward of the trace's own
        e = gradients[0]
        factor = split.factor(e, done.factor)
        done.unseen = False
        if done.recording.arrangement is not None:
            return  # the loss is made of two such places
        if done.factor is None:
            self._multiplied(done, factor)
        if done.by_itself:
            self._try(done, split, e)
        without = [*self._without_rule(done), *self._reached(done, split, e)]
        through = [name for name in without if done.drew or name not in self._calm]
        if through:
            self._through(done, split, e, through)
        done.recording.arrange(Arrangement(done.order, done.scale))

    def _multiplied(self, done: _Pass, factor: Tensor) -> None:
        """What the training multiplied its loss with is known."""
        done.factor = factor.detach().double()
        if not bool(done.factor.isfinite()) or not bool(done.factor):
            raise UserError(
                f"the training multiplies its loss with {float(done.factor)}; expected a finite factor, not 0"
            )

    def _without_rule(self, done: _Pass) -> list[str]:
        """The parameters that this forward uses in a way that no rule is planned for."""
        engine, recording = self._engine, done.recording
        return sorted(
            name for name, way in engine.plan.items()
            if way is None or (way and name in recording.hidden)
            or (way and name in recording.of and not engine.expects(name, recording.of[name]))
        )  # fmt: skip

    def _reached(self, done: _Pass, split: Split, e: Tensor) -> list[str]:
        """The parameters that were planned to have no gradient and have one. (It costs nothing if none has: autograd
        computes what leads to a parameter alone.)"""
        idle = [name for name, way in self._engine.plan.items() if way == []]
        if not idle:
            return []
        with self._apart(done, ignore):
            gradients = self._through_graph(split, e, idle)
        done.unreached = {name for name, gradient in zip(idle, gradients) if gradient is None}
        return [name for name in idle if name not in done.unreached]

    @contextmanager
    def _apart(self, done: _Pass, arrived: Callable[[Call, Tensor], None]) -> Iterator[None]:
        """For a backward of the trace's own through the training's graph: what arrives goes to `arrived`, and the
        training goes on as if nothing had been."""
        done.recording.aside, active, self._active = arrived, self._active, False
        try:
            with torch.autocast(done.weights.device.type, enabled=False):
                yield
        finally:
            done.recording.aside, self._active = None, active

    def _try(self, done: _Pass, split: Split, e: Tensor) -> None:
        """Compare each parameter's rule, and its gradient where an example is by itself, with the gradient of single
        examples that the training's own graph gives. A rule that differs is given up."""
        self._tries += 1
        trials = [self._try_one(done, split, e, i) for i in done.by_itself]
        told, wrong, differ = (set().union(*of) for of in zip(*trials))
        self._untried -= told
        self._calm = (self._calm - differ) | (told - differ)
        self._engine.plan |= dict.fromkeys(wrong)

    def _try_one(self, done: _Pass, split: Split, e: Tensor, i: int) -> tuple[set[str], set[str], set[str]]:
        """The same for example i: the parameters not tried before that have a gradient which is not zero, those of
        them whose rule is wrong, and those with another gradient where the example is by itself."""
        engine, recording = self._engine, done.recording
        names = sorted(self._untried)
        waiting = {
            call: {name for name in engine.owners[call.name].values() if name in recording.of}
            for call in recording.calls
        }
        half = next((call.autocast for call in recording.calls if call.autocast is not None), None)
        by_itself = done.by_itself[i]
        told: set[str] = set()
        wrong: set[str] = set()
        differ: set[str] = set()
        right: set[Kind] = set()  # kinds of which a parameter's gradient was compared number by number

        def arrived(call: Call, gradient: Tensor) -> None:
            call.e, call.arrangement = gradient.detach(), Arrangement(done.order, done.scale)

        def judge(name: str, gradient: Tensor) -> None:
            theta, uses = engine.parameters[name], recording.of.get(name, [])
            dtype = half or theta.dtype
            gradient = gradient.to(sum_dtype(theta.dtype)) * done.scale[i].to(sum_dtype(theta.dtype))
            if gradient.any():
                told.add(name)
            there = bool(uses) and all(call.e is not None for call, _ in uses)
            rules = engine.rules(name, uses) if there and engine.plan[name] else None
            if rules is None or not agree(rules, i, gradient, theta, dtype, known=kind_of(theta, uses) in right):
                wrong.add(name)
            else:
                right.add(kind_of(theta, uses))
            if name not in by_itself or not _alike(by_itself[name], _sample(gradient), AGREES[dtype][0]):
                differ.add(name)
            for call, _ in uses:
                waiting[call].discard(name)
                if not waiting[call]:
                    call.e, call.kept = None, {}

        with self._apart(done, arrived), engine.streaming(names, judge):
            self._through_graph(split, split.only(e, i), names)
        for call in recording.calls:
            call.e, call.kept = None, {}
        return told, wrong, differ

    def _samples(self, batch: Batch, i: int) -> dict[str, Tensor]:
        """Some elements of each untried parameter's gradient of example i by itself. They are had before the training's
        forward: a model may change its weights for evaluation (RWKV)."""
        samples: dict[str, Tensor] = {}

        def note(name: str, gradient: Tensor) -> None:
            samples[name] = _sample(gradient)

        names = sorted(self._untried)
        with self._engine.streaming(names, note):
            self._engine.alone(batch, i, names)
        return samples

    def _through_graph(self, split: Split, e: Tensor, names: Sequence[str]) -> tuple[Tensor | None, ...]:
        """The named parameters' gradients by the training's own graph, for a gradient where the loss falls apart."""
        ends: Any = self._engine.ends(names)
        found = torch.autograd.grad([split.edge], ends, [e], retain_graph=True, allow_unused=True)
        return self._engine.by_name(names, found)

    def _through(self, done: _Pass, split: Split, e: Tensor, names: list[str]) -> None:
        """What no rule serves, one example after the other through the training's own graph."""
        engine = self._engine

        def alone(i: int) -> list[Tensor | None]:
            found = self._through_graph(split, split.only(e, i), names)
            factor = float(done.scale[i])
            return [None if g is None else g.to(sum_dtype(g.dtype)) * factor for g in found]

        with self._apart(done, ignore):
            for task, part, share in done.shares:
                engine.one_by_one(done.batch, share, names, partial(self._sums_of, task, part), alone)
        self._late_numel += sum(engine.parameters[name].numel() for name in names)
        done.missing -= set(names)

    def _sums_of(self, task: str, part: int, name: str) -> AbstractContextManager[dict[str, Tensor]]:
        """Where the sums of a task's examples of one part are added for a parameter."""
        return self._open(task, part, name, self._gradients.setdefault(task, {}), self._step_factor)

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
        if name not in done.missing:
            return  # it went through the training's graph
        with torch.autocast(done.weights.device.type, enabled=False):
            rules = self._engine.rules(name, uses)
            if rules is None:
                done.refused.add(name)
                return
            total = done.wanted.pop(uses[0][0], None) if uses and uses[0][1] == "weight" else None
            weights = [] if total is None or done.factor is None else (done.factor * done.weights).tolist()
            for number, (task, part, share) in enumerate(done.shares):
                try:
                    with self._sums_of(task, part, name) as sums:
                        reduce(rules, sums, share, weighted=total, weights=weights)
                except Unfit:
                    if number:
                        raise self._refusal(name) from None
                    done.refused.add(name)
                    return
        done.missing.discard(name)

    def _late(self, done: _Pass, changed: set[str]) -> None:
        """What no rule served, each example by itself, where the training's gradient is the same."""
        engine, recording = self._engine, done.recording
        called = {*done.refused, *recording.hidden, *recording.of}
        names = sorted(done.missing & (changed if changed else called))
        if not names:
            return
        elsewhere = sorted(done.unreached.intersection(names))
        if elsewhere:
            raise self._no_example(elsewhere[0])
        if done.others:
            raise UserError(
                f"parameter {names[0]!r} has no rule, and the model got {done.others[0]!r}, which it would not get "
                "where one example at a time is traced; expected input_ids, attention_mask and position_ids only"
            )
        active, self._active = self._active, False
        with undisturbed(engine.model):
            if done.drew or not (set(names) <= self._calm or self._has_the_same_loss(done)):
                raise self._refusal(next(name for name in names if done.drew or name not in self._calm))
            for task, part, share in done.shares:
                engine.one_by_one(done.batch, share, names, partial(self._sums_of, task, part))
        self._active = active
        self._late_numel += sum(engine.parameters[name].numel() for name in names)

    def _has_the_same_loss(self, done: _Pass) -> bool:
        """Whether the examples by themselves have the loss that the training's model gave: all that is known where it
        gives nothing else."""
        if done.loss is None or self._tries:
            return False
        with torch.no_grad():
            count = len(done.batch["labels"])
            mask = done.batch["attention_mask"].bool()
            whole, given = 0.0, float(done.loss)
            for i in range(count):
                example = {key: value[i : i + 1, mask[i]] for key, value in done.batch.items()}
                whole += float(done.weights[i]) * float(self._engine.losses(example, only_targets=True))
        dtypes = {call.autocast or call.module.get_parameter(call.locals[0]).dtype
                  for call in done.recording.calls if call.locals}  # fmt: skip
        return abs(whole - given) <= max(AGREES[dtype][0] for dtype in dtypes) / 10 * abs(given)

    def _refusal(self, name: str) -> UserError:
        return UserError(
            f"parameter {name!r} can't be traced in a step of this training: no rule serves its use there, and an "
            "example by itself does not have the gradient that it has in the training (dropout, a cache, modules that "
            "training alone calls); switch that off, or use OnlineTrace, which traces the model without it"
        )


def _sample(gradient: Tensor) -> Tensor:
    """Some of a gradient's elements, spread over it."""
    flat = gradient.flatten()
    return flat[:: max(1, len(flat) // SAMPLE)].clone()


def _alike(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether two samples of a gradient differ by no more than rounding explains."""
    wide = torch.promote_types(a.dtype, torch.float32)
    a, b = a.to(wide), b.to(wide)
    return bool((a - b).norm() <= tolerance * b.norm())


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
