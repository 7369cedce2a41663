"""The rules, tried on a training's own forward: against the gradients of single examples that its graph gives.

A training's forward may differ from the one that the rules were chosen on. It may have dropout, a cache that it fills,
or modules that evaluation does not call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from crosstrace.trace.batches import Batch
from crosstrace.trace.blocks import sum_dtype
from crosstrace.trace.calls import Arrangement, Call
from crosstrace.trace.engine import Engine
from crosstrace.trace.passes import undisturbed
from crosstrace.trace.probe import AGREES, Kind, agree, kind_of, pair_of
from crosstrace.trace.split import Split
from crosstrace.trace.training_forward import TracedForward

SAMPLE = 4096  # elements of a gradient by which two of the same parameter are compared
Divert = Callable[[TracedForward, Callable[[Call, Tensor], None]], AbstractContextManager[None]]


class TrainingTrials:
    """What is known of the rules in a training's forwards.

    Attributes:
        untried: parameters whose rules were not seen to be right there yet.
        same_alone: parameters whose gradient is the same if an example is by itself.
        count: forwards that the rules were tried on.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.untried = set(engine.parameters)
        self.same_alone: set[str] = set()
        self.count = 0

    def choose_rules(self, batch: Batch, forwards: int) -> dict[int, dict[str, Tensor]]:
        """Choose the plan on a batch. If the rules are to be tried on its forward, gives `sample_gradients` of two
        examples by their numbers.

        Args:
            forwards: how many forwards there were before this one.
        """
        engine = self._engine
        before = dict(engine.plan)
        engine.plan_for(batch)
        changed = {name for name, way in engine.plan.items() if before.get(name) != way}
        self.untried |= changed
        is_due = changed or self.count == 0 or forwards & (forwards - 1) == 0  # ever more rarely
        if not self.untried or not is_due:
            return {}
        with undisturbed(engine.model):
            return {i: self._sample_gradients(batch, i) for i in pair_of(batch["attention_mask"])}

    def _sample_gradients(self, batch: Batch, i: int) -> dict[str, Tensor]:
        """Some elements of each untried parameter's gradient of example i by itself.

        They are taken before the training's forward: a model may change its weights for evaluation (RWKV)."""
        samples: dict[str, Tensor] = {}

        def note(name: str, gradient: Tensor) -> None:
            samples[name] = _sample(gradient)

        names = sorted(self.untried)
        with self._engine.streaming_gradients(names, note):
            self._engine.example_gradients(batch, i, names)
        return samples

    def try_rules(self, forward: TracedForward, split: Split, e: Tensor, divert: Divert) -> None:
        """Compare each parameter's rule, and its gradient of an example by itself, with the gradient of single
        examples that the training's own graph gives. A rule that differs is given up.

        Args:
            e: the gradient where the loss falls apart.
            divert: a context in which what a backward brings to the calls goes elsewhere.
        """
        self.count += 1
        trials = [self._try_example(forward, split, e, i, divert) for i in forward.samples]
        nonzero, wrong, differing = (set().union(*names) for names in zip(*trials))
        self.untried -= nonzero
        self.same_alone = (self.same_alone - differing) | (nonzero - differing)
        self._engine.plan |= dict.fromkeys(wrong)

    def _try_example(
        self, forward: TracedForward, split: Split, e: Tensor, i: int, divert: Divert
    ) -> tuple[set[str], set[str], set[str]]:
        """The same for example i.

        Returns:
            of the parameters not tried before: those whose gradient is not zero, those whose rule is wrong, and those
            with another gradient if the example is by itself.
        """
        engine, recording = self._engine, forward.recording
        names = sorted(self.untried)
        waiting = {
            call: {name for name in engine.owners[call.name].values() if name in recording.uses}
            for call in recording.calls
        }
        half = next((call.autocast for call in recording.calls if call.autocast is not None), None)
        samples = forward.samples[i]
        nonzero: set[str] = set()
        wrong: set[str] = set()
        differing: set[str] = set()
        right: set[Kind] = set()  # kinds of which a parameter's gradient was compared number by number

        def receive(call: Call, gradient: Tensor) -> None:
            call.e, call.arrangement = gradient.detach(), Arrangement(forward.order, forward.scale)

        def judge(name: str, gradient: Tensor) -> None:
            theta, uses = engine.parameters[name], recording.uses.get(name, [])
            dtype = half or theta.dtype
            gradient = gradient.to(sum_dtype(theta.dtype)) * forward.scale[i].to(sum_dtype(theta.dtype))
            if gradient.any():
                nonzero.add(name)
            has_all = bool(uses) and all(call.e is not None for call, _ in uses)
            rules = engine.make_rules(name, uses) if has_all and engine.plan[name] else None
            if rules is None or not agree(rules, i, gradient, theta, dtype, known=kind_of(theta, uses) in right):
                wrong.add(name)
            else:
                right.add(kind_of(theta, uses))
            if name not in samples or not _are_alike(samples[name], _sample(gradient), AGREES[dtype][0]):
                differing.add(name)
            for call, _ in uses:
                waiting[call].discard(name)
                if not waiting[call]:
                    call.e, call.kept = None, {}

        with divert(forward, receive), engine.streaming_gradients(names, judge):
            gradients_through_graph(engine, split, split.only(e, i), names)
        for call in recording.calls:
            call.e, call.kept = None, {}
        return nonzero, wrong, differing

    def have_same_loss(self, forward: TracedForward) -> bool:
        """Whether the examples by themselves have the loss that the training's model gave.

        That is compared if the model gives the loss alone, so that no rule could be tried."""
        if forward.loss is None or self.count:
            return False
        with torch.no_grad():
            count = len(forward.batch["labels"])
            mask = forward.batch["attention_mask"].bool()
            total, expected = 0.0, float(forward.loss)
            for i in range(count):
                example = {key: value[i : i + 1, mask[i]] for key, value in forward.batch.items()}
                total += float(forward.weights[i]) * float(self._engine.losses(example, only_targets=True))
        calls = [call for call in forward.recording.calls if call.locals]
        dtypes = {call.autocast or call.module.get_parameter(call.locals[0]).dtype for call in calls}
        return abs(total - expected) <= max(AGREES[dtype][0] for dtype in dtypes) / 10 * abs(expected)


def gradients_through_graph(engine: Engine, split: Split, e: Tensor, names: Sequence[str]) -> tuple[Tensor | None, ...]:
    """The named parameters' gradients by the training's own graph, for a gradient e where the loss falls apart."""
    leaves: Any = engine.leaves(names)
    gradients = torch.autograd.grad([split.edge], leaves, [e], retain_graph=True, allow_unused=True)
    return engine.join_uses(names, gradients)


def _sample(gradient: Tensor) -> Tensor:
    """Some of a gradient's elements, spread over it."""
    flat = gradient.flatten()
    return flat[:: max(1, len(flat) // SAMPLE)].clone()


def _are_alike(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether two samples of a gradient differ by no more than rounding explains."""
    wide = torch.promote_types(a.dtype, torch.float32)
    a, b = a.to(wide), b.to(wide)
    return bool((a - b).norm() <= tolerance * b.norm())
