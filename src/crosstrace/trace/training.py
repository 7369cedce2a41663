"""Traces from a training's own backward.

`TrainingTrace` listens to a model in training: the forward that the training makes anyway is recorded, and what its
backward brings to every module becomes the per-example gradients of both tasks, before the update. The training
computes what it would have computed; its loss is what is traced, so the targets are the training's.

The training's loss must be L = Σ_i w_i ℓ_i over the examples of its batches, ℓ_i the mean cross-entropy of example i's
labels. Then e, the gradient of L, is that of ℓ_i times w_i in the rows of example i, and dividing by w_i gives back the
trace's unit, one example. For the loss of transformers' causal language models, w_i is n_i / N (n_i labels of the
example, N of the batch or of all batches of an update), times whatever the training multiplies its loss with. Every
batch is checked for that, where the loss falls apart into its examples (`split`).

A training's forward may differ from the one that the rules were chosen on, so the rules are tried on it too
(`training_trials`). What no rule serves there is computed one example at a time: by itself, if that was seen to give
the same gradient, else through the training's graph. Nothing is left out: at the end of a step every parameter whose
gradient the training changed has been traced, or an error names it.

Two things can't be traced here: examples packed into one row, and losses that mix examples (an auxiliary loss of
experts).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from crosstrace.core.errors import UserError
from crosstrace.core.pieces import is_sharded
from crosstrace.trace.accumulated import Accumulated
from crosstrace.trace.blocks import sum_dtype
from crosstrace.trace.calls import Arrangement, Call, Unfit
from crosstrace.trace.passes import undisturbed
from crosstrace.trace.recording import Recording, Uses, ignore, random_states
from crosstrace.trace.reduction import reduce
from crosstrace.trace.reused_products import ReusedProduct, is_plain_linear
from crosstrace.trace.rules import Linear, TransposedLinear
from crosstrace.trace.split import Split, find_splits
from crosstrace.trace.training_forward import COLUMNS, TracedForward, read_training_batch
from crosstrace.trace.training_trials import TrainingTrials, gradients_through_graph

_LISTENING: WeakKeyDictionary[nn.Module, TrainingTrace] = WeakKeyDictionary()


class TrainingTrace(Accumulated):
    """Traces accumulated over a training, from its own forwards and backwards.

    Batches carry for each example the number of its task in the column `task` [B] (and, for `parts`, its `group`).
    These columns are taken out before the model sees them. In a training loop of your own:

        with TrainingTrace(model, ["bio", "qa"]) as tracing:
            for batch in loader:
                with tracing.step(lr):
                    model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

    Several forwards and backwards in one step accumulate. If the model does not compute the loss itself, a batch must
    have `loss_labels` [B, T], what is trained on, and `loss_weight` [B], w_i. With transformers' Trainer use
    `TraceCallback`. Dropout is traced as it was drawn. Frozen parameters are left out.

    The first forward costs more: the rules are tried on it. A parameter that no rule serves is computed one example at
    a time. That is done at the end of the step, at the price of about one more forward and backward of the batch. If an
    example by itself has another gradient (dropout, a cache that was filled), it is done through the training's graph,
    at the price of a backward of the whole batch for each example. `late` says how large a share that is.

    Args:
        model, tasks, measures, parts, lr_weighted, where: as in `Accumulated`.
        reductions: "example" by default; "step" needs a sum of gradients of the model's size for each task.
        reuse: the training takes the weight gradients of linear layers from the products that the trace makes, rather
            than multiply twice. That is much cheaper, and equal but for rounding: the sum over examples is taken in
            another order. Without it the training's gradients are those it would have had, bit for bit.
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
        self._current: TracedForward | None = None  # the forward that is going on
        self._forwards: list[TracedForward] = []  # of the step
        self._gradients: dict[str, dict[str, Tensor]] = {}  # per task, Σg of the step
        self._step_factor = 1.0
        self._seen = 0  # forwards so far
        self._trials = TrainingTrials(self._engine)
        self._alive: set[str] = set()  # parameters whose gradient and trace were both seen not to be zero
        self._marks: dict[str, tuple[int, int]] = {}  # of the gradients when the step began
        self._late_numel = self._passed = 0  # parameters (of each forward) computed one example at a time; forwards

    def __enter__(self) -> TrainingTrace:
        model = self._engine.model
        other = _LISTENING.get(model)
        if other is not None and other is not self:  # of a training that was interrupted
            other.__exit__()
        _LISTENING[model] = self
        self._hooks.callback(
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True, prepend=True).remove
        )
        self._hooks.callback(model.register_forward_hook(self._after_forward, with_kwargs=True).remove)
        return self

    def __exit__(self, *_: Any) -> None:
        self._forget()
        self._hooks.close()
        if _LISTENING.get(self._engine.model) is self:
            del _LISTENING[self._engine.model]

    @property
    def late(self) -> float:
        """Share of the parameters computed one example at a time, over all forwards so far."""
        total = sum(p.numel() for p in self._engine.parameters.values())
        return self._late_numel / (total * self._passed) if self._passed else 0.0

    @property
    def is_stepping(self) -> bool:
        """Whether a step has begun and not ended."""
        return not self._is_complete

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
        """Begin a step, for a caller that can't use the context `step`."""
        self._check_complete()
        self._active, self._is_complete = True, False
        self._step_factor = self._factor(lr)
        self._marks = self._mark_gradients()

    def _mark_gradients(self) -> dict[str, tuple[int, int]]:
        """Which gradient each parameter has, and how often it was changed."""
        grads = {name: p.grad for name, p in self._engine.parameters.items()}
        return {name: (id(grad), grad._version) for name, grad in grads.items() if grad is not None}

    def end(self) -> None:
        """End the step, before the parameters are changed."""
        sizes: dict[str, dict[int, int]] = {}
        changed = {name for name, mark in self._mark_gradients().items() if self._marks.get(name) != mark}
        for forward in self._forwards:
            if forward.factor is None and not forward.recording.early:
                continue  # a forward without a backward
            if forward.factor is None or forward.is_unchecked:
                raise UserError(
                    "the training's backward does not come through the loss, the logits or the log-probabilities that "
                    "its model gives, so its loss can't be checked; expected a loss made of them (not of hidden "
                    "states, as fused heads outside of the model make it), or use OnlineTrace"
                )
            self._passed += 1
            self._add_late(forward, changed)
            for task, part, share in forward.shares:
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
        self._is_complete = True

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
                raise self._make_no_example_error(name)
            self._alive.add(name)

    def _make_no_example_error(self, name: str) -> UserError:
        return UserError(
            f"parameter {name!r} gets a gradient in the training, but none of its examples gives it one, so it can't "
            "be traced there; does something else than their loss change it, such as a penalty on weights? Trace "
            "checkpoints, or use OnlineTrace"
        )

    def _forget(self) -> None:
        """Let go of what was recorded."""
        for forward in (*self._forwards, *([self._current] if self._current else [])):
            forward.hooks.close()
            forward.recording.close()
        self._forwards, self._current, self._active = [], None, False

    # ---- the training's forward

    def _before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Take the trace's columns out of what the model gets, and record its forward if a step has begun."""
        columns = {name: kwargs[name] for name in COLUMNS if name in kwargs}
        kwargs = {name: value for name, value in kwargs.items() if name not in columns}
        if self._current is not None:  # its forward failed, and a new one is tried
            self._current.hooks.close()
            self._current = None
        if self._active and torch.is_grad_enabled():
            self._current = self._begin_forward(args, kwargs, columns)
        return args, kwargs

    def _begin_forward(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], columns: dict[str, Tensor]
    ) -> TracedForward | None:
        """Record the forward that begins; None if no example has a target."""
        read = read_training_batch(args, kwargs, columns, list(self._steps), self._parts)
        if read is None:
            return None
        engine = self._engine
        self._active = False  # the forwards here are not the training's
        samples = self._trials.choose_rules(read.batch, self._seen)
        self._active = True
        forward = TracedForward(**vars(read), missing=set(engine.parameters), samples=samples)
        deliver, replace = partial(self._deliver, forward), partial(self._reuse_product, forward)
        ids, rerun = read.batch["input_ids"], engine.find_rerun_modules()
        forward.recording = Recording(
            engine.owners,
            (len(read.weights), ids.shape[1]),
            deliver,
            engine.find_read_modules(),
            None,
            replace if self._reuse else None,
            rerun=rerun,
        )
        forward.hooks.enter_context(forward.recording.watching(engine.model, root=False))
        if "" in rerun:
            forward.recording.begin("", engine.model, args)
        forward.random_states = random_states(ids.device)
        return forward

    def _after_forward(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """The forward is over: wait for the gradient of its loss."""
        forward, self._current = self._current, None
        if forward is None:
            return
        if "" in forward.recording.owners:  # the whole model, whose own hooks are being called right now
            forward.recording.record("", module, args, kwargs, output)
        forward.hooks.close()
        self._forwards.append(forward)
        if forward.recording.has_call_without_gradients:
            raise UserError(
                "the training runs modules without gradients and again in the backward, as gradient checkpointing with "
                "use_reentrant=True does; the trace expects gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        if getattr(output, "aux_loss", None) is not None:
            raise UserError(
                "the training adds the model's auxiliary loss, which mixes examples; the trace expects "
                "output_router_logits=False"
            )
        for call, node in forward.recording.sources:
            node.register_prehook(lambda e, call=call: forward.recording.arrived(call, e[0]))
        states = random_states(forward.weights.device)
        forward.is_random = any(not torch.equal(a, b) for a, b in zip(forward.random_states, states))
        loss = getattr(output, "loss", None)
        loss = loss if isinstance(loss, Tensor) and loss.requires_grad else None
        shape, labels = forward.recording.shape, forward.batch["labels"]
        splits = find_splits(output, shape, labels, forward.weights, forward.order, self._seen)
        if not splits and loss is None:
            raise UserError(
                "the training's model gives neither a loss nor logits [examples, positions, tokens] with a gradient; "
                "expected one of them, or use OnlineTrace"
            )
        self._seen += 1
        forward.is_unchecked = bool(splits)
        for split in splits:
            split.node.register_prehook(partial(self._receive_split_gradient, forward, split))
        if loss is not None:
            forward.loss = loss.detach()
            loss.register_hook(partial(self._receive_loss_gradient, forward))

    # ---- the training's backward

    def _receive_loss_gradient(self, forward: TracedForward, e: Tensor) -> None:
        """The loss's gradient has come: what the training multiplied it with."""
        if forward.recording.aside is None:
            self._set_factor(forward, e)
            if not forward.is_unchecked:
                forward.recording.arrange(Arrangement(forward.order, forward.scale))

    def _receive_split_gradient(self, forward: TracedForward, split: Split, gradients: Sequence[Tensor]) -> None:
        """The gradient has come to where the loss falls apart."""
        if forward.recording.aside is not None:
            return  # of a backward of the trace's own
        e = gradients[0]
        factor = split.factor(e, forward.factor)
        forward.is_unchecked = False
        if forward.recording.arrangement is not None:
            return  # the loss is made of two such places
        if forward.factor is None:
            self._set_factor(forward, factor)
        if forward.samples:
            self._trials.try_rules(forward, split, e, self._divert)
        without_rule = [*self._find_without_rule(forward), *self._find_reached(forward, split, e)]
        names = [name for name in without_rule if forward.is_random or name not in self._trials.same_alone]
        if names:
            self._add_through_graph(forward, split, e, names)
        forward.recording.arrange(Arrangement(forward.order, forward.scale))

    def _set_factor(self, forward: TracedForward, factor: Tensor) -> None:
        """What the training multiplied its loss with is known."""
        forward.factor = factor.detach().double()
        if not bool(forward.factor.isfinite()) or not bool(forward.factor):
            raise UserError(
                f"the training multiplies its loss with {float(forward.factor)}; expected a finite factor, not 0"
            )

    def _find_without_rule(self, forward: TracedForward) -> list[str]:
        """The parameters that this forward uses in a way that no rule is planned for."""
        engine, recording = self._engine, forward.recording

        def has_rule(name: str) -> bool:
            if engine.plan[name] is None:
                return False
            is_known = name not in recording.uses or engine.expects(name, recording.uses[name])
            return engine.plan[name] == [] or (name not in recording.hidden and is_known)

        return sorted(name for name in engine.plan if not has_rule(name))

    def _find_reached(self, forward: TracedForward, split: Split, e: Tensor) -> list[str]:
        """The parameters that were planned to have no gradient and have one.

        It costs nothing if none has: autograd computes only what leads to a parameter."""
        idle = [name for name, way in self._engine.plan.items() if way == []]
        if not idle:
            return []
        with self._divert(forward, ignore):
            gradients = gradients_through_graph(self._engine, split, e, idle)
        forward.unreached = {name for name, gradient in zip(idle, gradients) if gradient is None}
        return [name for name in idle if name not in forward.unreached]

    @contextmanager
    def _divert(self, forward: TracedForward, receive: Callable[[Call, Tensor], None]) -> Iterator[None]:
        """For a backward of the trace's own through the training's graph: what arrives at the calls goes to `receive`.

        The training then goes on as if nothing had happened."""
        forward.recording.aside, active, self._active = receive, self._active, False
        try:
            with torch.autocast(forward.weights.device.type, enabled=False):
                yield
        finally:
            forward.recording.aside, self._active = None, active

    def _add_through_graph(self, forward: TracedForward, split: Split, e: Tensor, names: list[str]) -> None:
        """Add what no rule serves, one example after the other through the training's own graph."""
        engine = self._engine

        def gradients_of(i: int) -> list[Tensor | None]:
            gradients = gradients_through_graph(engine, split, split.only(e, i), names)
            factor = float(forward.scale[i])
            return [None if g is None else g.to(sum_dtype(g.dtype)) * factor for g in gradients]

        with self._divert(forward, ignore):
            for task, part, share in forward.shares:
                engine.add_one_by_one(forward.batch, share, names, partial(self._open_sums, task, part), gradients_of)
        self._late_numel += sum(engine.parameters[name].numel() for name in names)
        forward.missing -= set(names)

    def _open_sums(self, task: str, part: int, name: str) -> AbstractContextManager[dict[str, Tensor]]:
        """Where the sums of a task's examples of one part are added for a parameter."""
        return self._open_task_sums(task, part, name, self._gradients.setdefault(task, {}), self._step_factor)

    def _reuse_product(self, forward: TracedForward, call: Call, result: Tensor) -> Tensor | None:
        """For a linear layer's output: the same, with a backward whose weight gradient comes from the trace's products.

        None for any other module."""
        weight: Any = getattr(call.module, "weight", None)
        bias = getattr(call.module, "bias", None)
        names = self._engine.owners[call.name]
        if call.input is None or "weight" not in names or not is_plain_linear(call.module):
            return None
        way = self._engine.plan[names["weight"]] or []
        is_transposed = {Linear.name: False, TransposedLinear.name: True}
        if len(way) != 1 or way[0][2] not in is_transposed or not weight.dtype == call.input.dtype == result.dtype:
            return None  # another module, a tied weight, or autocast
        transposed = is_transposed[way[0][2]]

        def gradient(e: Tensor) -> Tensor:
            if call.input is None:
                raise RuntimeError("a second backward through one forward can't be traced with reuse=True")
            inputs = call.input.detach().flatten(0, -2)
            total = forward.wanted[call] = torch.zeros_like(weight, dtype=sum_dtype(weight.dtype))
            forward.recording.arrived(call, e)
            if forward.wanted.pop(call, None) is not None:  # its calls were others than planned
                e = e.flatten(0, -2)
                total = inputs.t() @ e if transposed else e.t() @ inputs
            return total.to(weight.dtype)

        return ReusedProduct.apply(result.detach(), call.input, weight, bias, transposed, gradient)

    def _deliver(self, forward: TracedForward, name: str, uses: Uses) -> None:
        """Add a parameter's sums of all shares by its rules."""
        if name not in forward.missing:
            return  # it went through the training's graph
        with torch.autocast(forward.weights.device.type, enabled=False):
            rules = self._engine.make_rules(name, uses)
            if rules is None:
                forward.refused.add(name)
                return
            total = forward.wanted.pop(uses[0][0], None) if uses and uses[0][1] == "weight" else None
            weights = [] if total is None or forward.factor is None else (forward.factor * forward.weights).tolist()
            for number, (task, part, share) in enumerate(forward.shares):
                try:
                    with self._open_sums(task, part, name) as sums:
                        reduce(rules, sums, share, weighted=total, weights=weights)
                except Unfit:
                    if number:
                        raise self._make_refusal(name) from None
                    forward.refused.add(name)
                    return
        forward.missing.discard(name)

    def _add_late(self, forward: TracedForward, changed: set[str]) -> None:
        """Add what no rule served, each example by itself, if its gradient in the training is the same."""
        engine, recording = self._engine, forward.recording
        called = {*forward.refused, *recording.hidden, *recording.uses}
        names = sorted(forward.missing & (changed if changed else called))
        if not names:
            return
        unreached = sorted(forward.unreached.intersection(names))
        if unreached:
            raise self._make_no_example_error(unreached[0])
        if forward.other_inputs:
            raise UserError(
                f"parameter {names[0]!r} has no rule, and the model got {forward.other_inputs[0]!r}, which it would "
                "not get where one example at a time is traced; expected input_ids, attention_mask and position_ids "
                "only"
            )
        active, self._active = self._active, False
        with undisturbed(engine.model):
            same_alone = self._trials.same_alone
            if forward.is_random or not (set(names) <= same_alone or self._trials.have_same_loss(forward)):
                raise self._make_refusal(next(name for name in names if forward.is_random or name not in same_alone))
            for task, part, share in forward.shares:
                engine.add_one_by_one(forward.batch, share, names, partial(self._open_sums, task, part))
        self._active = active
        self._late_numel += sum(engine.parameters[name].numel() for name in names)

    def _make_refusal(self, name: str) -> UserError:
        return UserError(
            f"parameter {name!r} can't be traced in a step of this training: no rule serves its use there, and an "
            "example by itself does not have the gradient that it has in the training (dropout, a cache, modules that "
            "training alone calls); switch that off, or use OnlineTrace, which traces the model without it"
        )
