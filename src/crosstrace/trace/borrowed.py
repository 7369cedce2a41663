"""Whether a training's own forward may be traced in the place of one that the trace makes for itself.

It may if both give the same: no random numbers are drawn in it (dropout), its losses are those of the engine's own
forward, and the rules that are planned give the gradients of single examples in it. They are looked at for two
examples, and compared along a few random directions (see `probe`); the training's may be rounded to half precision.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from crosstrace.models.forward import TrainingForward
from crosstrace.trace.engine import Batch, Engine, undisturbed
from crosstrace.trace.probe import AGREES, agree_along, pair_of
from crosstrace.trace.recording import random_states
from crosstrace.trace.rules import Rule


class Drew(Exception):
    """The training's forward drew random numbers."""


def calm(forward: TrainingForward, batch: Batch, kept: bool) -> Tensor:
    """The losses of the forward.

    Raises:
        Drew: it drew random numbers.
    """
    device = batch["labels"].device
    before = random_states(device)
    losses = forward(batch, kept)
    if not all(torch.equal(a, b) for a, b in zip(before, random_states(device))):
        raise Drew
    return losses


def is_the_same(engine: Engine, batch: Batch, forward: TrainingForward) -> bool:
    """Whether the training's forward gives what the engine's own does, for the batch's longest and shortest example."""
    pair = pair_of(batch["attention_mask"])
    batch = engine.checked({name: value[pair] for name, value in batch.items()})
    examples = range(len(pair))
    expected = [engine.gradients_along(batch, i) for i in examples]
    with undisturbed(engine.model), torch.no_grad():
        own = engine.losses(batch, only_targets=True)
    dtypes: set[torch.dtype] = {p.dtype for p in engine.parameters.values()}
    given: list[Tensor] = []
    seen: set[str] = set()
    differ: list[str] = []

    def note(module: Any, args: Any, output: Any) -> None:
        device = batch["labels"].device.type
        if torch.is_autocast_enabled(device):
            dtypes.add(torch.get_autocast_dtype(device))

    def watched(batch: Batch) -> Tensor:
        handle = engine.model.get_submodule(next(iter(engine.owners))).register_forward_hook(note)
        try:
            given.append(calm(forward, batch, False))
        finally:
            handle.remove()
        return given[0]

    def compare(name: str, rules: list[Rule]) -> None:
        seen.add(name)
        coarsest = max(dtypes, key=lambda dtype: AGREES[dtype][0])
        theta = engine.parameters[name]
        for i, of in zip(examples, expected) if rules and not differ else ():
            if not agree_along(rules, i, of.get(name), theta, coarsest):
                differ.append(name)

    device = batch["labels"].device
    # what training keeps of its batches, such as running means: two of the rows are to leave nothing there
    buffers = [(buffer, buffer._version, buffer.clone()) for buffer in engine.model.buffers()]
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            engine.look(batch, compare, watched)
    except Drew:
        return False
    finally:
        changed = [(buffer, before) for buffer, version, before in buffers if buffer._version != version]
        with torch.no_grad():
            for buffer, before in changed:
                buffer.copy_(before)
    lacking = {name for name, way in engine.plan.items() if way} - seen
    if not given or differ or changed or lacking:  # what is lacking, as of frozen layers, would be dear
        return False
    tolerance = max(AGREES[dtype][0] for dtype in dtypes) / 5  # a loss is a mean over many roundings
    return bool(((given[0].detach() - own).abs() <= tolerance * own.abs().clamp(min=0.1)).all())
