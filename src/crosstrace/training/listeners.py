"""Who is told of every update of a training, and may keep a state with its checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crosstrace.models.forward import TrainingForwards
from crosstrace.training.updates import MicroBatches


class Listener:
    """What is told of training; a class of its own does something with it.

    Its state travels with the checkpoints. Of several processes each has its own, and all are told the same.
    """

    def on_update(self, model: Any, batches: MicroBatches, lr: float, update: int, forwards: TrainingForwards) -> None:
        """Before update number `update` (0-based, over all phases): the model as it is and each task's micro-batches,
        which it will see next, those of all processes together.

        Args:
            forwards: by task, the training's own forward: of some rows of a micro-batch; or of the next one, in the
                order of tasks and micro-batches without a gap, to be kept for the update, which then makes none of its
                own. It gives the losses of the labels [B]. A task has one if its labels are among those trained, so
                that nothing else is computed than without; none has one where several processes train or gradients are
                checkpointed.
        """

    def on_gradient(self, model: Any, task: str, part: TaskPart) -> None:
        """A task's part of an update's loss has been differentiated: `.grad` has gained its gradient since the last
        call, before clipping. Every task of the update is told of, in their order."""

    def on_updated(self, model: Any, update: int, phase: str, last: bool) -> None:
        """After `update` updates over all phases; `last` at the end of a phase."""

    def save(self, folder: Path, leads: bool) -> None:
        """Write everything that a resumed training needs. Of several processes all call this, and one `leads`: it
        writes what all of them have."""

    def load(self, folder: Path) -> None:
        """Read it back."""


@dataclass(frozen=True)
class TaskPart:
    """A task's part of an update's loss: weight · mean over its examples of ℓ."""

    lr: float
    examples: int
    weight: float
    last: bool
    """Whether it is the update's last one."""
    optimizer: Any = None
    """The phase's optimiser, as the update before left it."""


class RecallHistory(Listener):
    """A listener that measures recall every so many updates."""

    def __init__(self, measure: Callable[[Any], dict[str, Any]], every: int):
        self.measure, self.every = measure, every
        self.rows: list[dict[str, Any]] = []

    def on_update(self, model: Any, batches: MicroBatches, lr: float, update: int, forwards: TrainingForwards) -> None:
        if update == 0 and not self.rows:
            self.rows.append({"update": 0, "phase": "", **self.measure(model)})

    def on_updated(self, model: Any, update: int, phase: str, last: bool) -> None:
        if (self.every and update % self.every == 0) or last:
            self.rows.append({"update": update, "phase": phase, **self.measure(model)})

    def save(self, folder: Path, leads: bool) -> None:
        if leads:
            (folder / "recall.json").write_text(json.dumps(self.rows))

    def load(self, folder: Path) -> None:
        self.rows = json.loads((folder / "recall.json").read_text())
