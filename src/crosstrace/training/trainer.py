"""Training a model by a strategy: its phases, one after the other, each with its own optimiser and checkpoints.

What every update sees is a function of (seed, phase, update) alone. So an interrupted training that resumes from its
last checkpoint ends in the same weights, and strategies can be compared at equal cost. Several processes share the
examples of each update. Its gradient is then that of one process but for rounding, and any number of processes goes on
from a checkpoint. It knows nothing of traces.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crosstrace.core.errors import UserError
from crosstrace.core.pieces import is_sharded
from crosstrace.core.processes import Processes
from crosstrace.data.tokens import Encoded
from crosstrace.models.loading import pad_id
from crosstrace.training import optimisers
from crosstrace.training.listeners import Listener
from crosstrace.training.recipes import Strategy
from crosstrace.training.settings import TrainSettings
from crosstrace.training.updates import Updates, epoch_sizes


@dataclass
class PhaseReport:
    """What a phase did: updates made and examples seen of each task."""

    name: str
    updates: int
    examples: dict[str, int] = field(default_factory=dict)


def train(
    model: Any,
    tokenizer: Any,
    strategy: Strategy,
    examples: Mapping[str, Sequence[Encoded]],
    folder: Path,
    options: TrainSettings,
    *,
    bf16: bool = False,
    trace_targets: str = "object",
    listeners: Sequence[Listener] = (),
    progress: Callable[[int, int], None] | None = None,
    logs: Path | None = None,
    processes: Processes | None = None,
) -> list[PhaseReport]:
    """Train `model` in place through all phases; resume from what `folder` holds.

    Args:
        model: a transformers causal LM, or one with an adapter, which alone is trained; where it is, it is trained.
        strategy: the phases, in order.
        examples: for each task, its training examples.
        folder: where phases' checkpoints go. A phase that is complete there is not trained again.
        bf16: autocast to bfloat16.
        trace_targets: which tokens the `trace_labels` of a batch mark.
        listeners: told of every update; their state is saved and restored with the checkpoints.
        progress: called with (updates made, updates in all).
        logs: where trackers that write files (`options.report_to`) put them; beside the checkpoints if not given.
        processes: all that were started, where they are several; each of them calls this with the same, and trains its
            share of every update's examples: DDP, or FSDP2 if the model is sharded. They must see one file system.

    Raises:
        UserError: a phase is ill-defined or trains a task without examples, or a tracker is not installed.
    """
    from crosstrace.training.phases import PhaseRun, run_phase  # here, since it imports transformers' Trainer

    check_trackers(options.report_to)
    optimisers.check_optimisers([phase.optimiser or options.optimiser for phase in strategy], is_sharded(model))
    sizes = epoch_sizes(examples)
    lengths = [phase.updates(sizes) for phase in strategy]
    reports, updates_before = [], 0
    for index, (phase, length) in enumerate(zip(strategy, lengths)):
        phase_folder = folder / f"{index}-{phase.name}"
        data = Updates(
            phase, examples, f"{options.seed}/{index}", pad_id(tokenizer), trace_targets, options.micro_batch,
            processes.size if processes else 1, is_sharded(model),
        )  # fmt: skip
        run = PhaseRun(
            model=model,
            phase=phase,
            data=data,
            folder=phase_folder,
            logs=(logs or folder) / phase_folder.name,
            options=options,
            bf16=bf16,
            listeners=listeners,
            updates_before=updates_before,
            updates_in_all=sum(lengths),
            progress=progress,
            processes=processes,
        )
        run_phase(run)
        updates_before += length
        reports.append(PhaseReport(phase.name, length, {task: n * length for task, n in phase.composition().items()}))
    return reports


def check_trackers(names: Sequence[str]) -> None:
    """Raise a `UserError` unless the packages of these trackers are installed; each has the tracker's name."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"train.report_to names {name}, which is not installed here; run `pip install {name}`, or leave it out"
            )
