"""Whether a training's own forward may be traced in place of one that the trace makes for itself.

It may if both give the same. Three things must hold: it draws no random numbers (dropout), its losses are those of the
engine's own forward, and the planned rules give the gradients of single examples in it. Two examples are compared,
along a few random directions (see `probe`). The training's forward may be rounded to half precision.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from crosstrace.models.forward import TrainingForward
from crosstrace.trace.batches import Batch
from crosstrace.trace.engine import Engine
from crosstrace.trace.passes import undisturbed
from crosstrace.trace.probe import AGREES, agree_along, pair_of
from crosstrace.trace.recording import random_states
from crosstrace.trace.rules import Rule


class RandomForward(Exception):
    """The training's forward drew random numbers."""


def compute_losses(forward: TrainingForward, batch: Batch, kept: bool) -> Tensor:
    """The losses of the forward.

    Raises:
        RandomForward: it drew random numbers.
    """
    device = batch["labels"].device
    before = random_states(device)
    losses = forward(batch, kept)
    if not all(torch.equal(a, b) for a, b in zip(before, random_states(device))):
        raise RandomForward
    return losses


def is_the_same(engine: Engine, batch: Batch, forward: TrainingForward) -> bool:
    """Whether the training's forward gives what the engine's own does, for the batch's longest and shortest example."""
    pair = pair_of(batch["attention_mask"])
    batch = engine.check_batch({name: value[pair] for name, value in batch.items()})
    examples = range(len(pair))
    expected = [engine.gradients_along(batch, i) for i in examples]
    with undisturbed(engine.model), torch.no_grad():
        engine_losses = engine.losses(batch, only_targets=True)
    dtypes: set[torch.dtype] = {p.dtype for p in engine.parameters.values()}
    training_losses: list[Tensor] = []
    compared: set[str] = set()
    differing: list[str] = []

    def note_autocast(module: Any, args: Any, output: Any) -> None:
        device = batch["labels"].device.type
        if torch.is_autocast_enabled(device):
            dtypes.add(torch.get_autocast_dtype(device))

    def run_forward(batch: Batch) -> Tensor:
        handle = engine.model.get_submodule(next(iter(engine.owners))).register_forward_hook(note_autocast)
        try:
            training_losses.append(compute_losses(forward, batch, False))
        finally:
            handle.remove()
        return training_losses[0]

    def compare(name: str, rules: list[Rule]) -> None:
        compared.add(name)
        coarsest = max(dtypes, key=lambda dtype: AGREES[dtype][0])
        theta = engine.parameters[name]
        for i, gradients in zip(examples, expected) if rules and not differing else ():
            if not agree_along(rules, i, gradients.get(name), theta, coarsest):
                differing.append(name)

    device = batch["labels"].device
    # A training keeps something of its batches here, such as running means. The two examples must leave nothing.
    buffers = [(buffer, buffer._version, buffer.clone()) for buffer in engine.model.buffers()]
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            engine.visit_forward(batch, compare, run_forward)
    except RandomForward:
        return False
    finally:
        changed = [(buffer, before) for buffer, version, before in buffers if buffer._version != version]
        with torch.no_grad():
            for buffer, before in changed:
                buffer.copy_(before)
    lacking = {name for name, way in engine.plan.items() if way} - compared
    if not training_losses or differing or changed or lacking:  # to trace what lacks, as of frozen layers, costs much
        return False
    tolerance = max(AGREES[dtype][0] for dtype in dtypes) / 5  # a loss is a mean over many roundings
    difference = (training_losses[0].detach() - engine_losses).abs()
    return bool((difference <= tolerance * engine_losses.abs().clamp(min=0.1)).all())
