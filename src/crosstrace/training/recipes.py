"""Strategies as data: an ordered list of phases, each saying what an update sees and how it is optimised.

Knows the names of tasks, not their examples, and nothing of models. A new strategy is a new list in YAML, not code.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass as settings

from crosstrace.core.errors import UserError
from crosstrace.core.settings import STRICT

MOST = 100_000_000  # updates of a phase; more can only be a slip

WIDEST = 1_000_000  # examples of a task in an update

Beta = Annotated[float, Field(ge=0, lt=1)]


@settings(frozen=True, config=STRICT)
class Optimiser:
    """The optimiser and its learning-rate schedule, anew for each phase."""

    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    """Its peak, after the warm-up."""
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    """Decay of AdamW's means of the gradient and of its square; Adafactor has its own."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled, as a share of the learning rate."""
    clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest norm of the gradient."""
    warmup: Annotated[int, Field(ge=0)] = 20
    """Updates of linear warm-up."""
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after the warm-up."""
    floor: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of the learning rate that a decay ends at."""
    name: Literal["adamw", "adafactor", "adamw_8bit"] = "adamw"
    """AdamW; Adafactor with this learning rate, which keeps next to no state; or AdamW with its state in 8 bits, which
    needs bitsandbytes."""


@settings(frozen=True, config=STRICT)
class Phase:
    """One phase of training: the examples of each task in every update, and for how long."""

    name: str
    """Names the folder of the model after this phase."""
    batch: dict[str, Annotated[int, Field(ge=1, le=WIDEST)]]
    """Examples of each task in one update, e.g. {bio: 64, qa: 128}."""
    steps: Annotated[int, Field(ge=1, le=MOST)] | None = None
    """Updates. Give either this or `epochs`."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the first task of `batch`."""
    weights: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Weight of each task's mean loss in the sum that is minimised; 1 where not given."""
    replay: dict[str, Annotated[int, Field(ge=1, le=WIDEST)]] = Field(default_factory=dict)
    """Examples of earlier tasks added to every update, e.g. {bio: 8} in a phase of questions."""
    optimiser: Optimiser | None = None
    """This phase's optimiser; the training's own where not given."""

    def composition(self) -> dict[str, int]:
        """Examples of each task in one update, replay included."""
        tasks = dict(self.batch)
        for task, count in self.replay.items():
            tasks[task] = tasks.get(task, 0) + count
        return tasks

    def updates(self, sizes: dict[str, int]) -> int:
        """Updates of this phase, given how many examples each task has in an epoch.

        Raises:
            UserError: neither or both of steps and epochs are given, or a task has no example.
        """
        if not self.batch:
            raise UserError(f"phase {self.name} has an empty batch; expected examples per task, e.g. {{bio: 64}}")
        for task in self.composition():
            if not sizes.get(task):
                raise UserError(
                    f"phase {self.name} trains task {task!r}, which has no training example (tasks with examples: "
                    f"{', '.join(name for name, size in sizes.items() if size) or 'none'}); check facts.qa_share "
                    "and the task's name, or give strategies of your own: those by default train bio and qa"
                )
        unknown = set(self.weights) - set(self.composition())
        if unknown:
            raise UserError(f"phase {self.name} weighs {', '.join(sorted(unknown))}, which its batch does not hold")
        if (self.steps is None) == (self.epochs is None):
            raise UserError(f"phase {self.name} needs either steps or epochs, and not both")
        if self.steps is not None:
            return self.steps
        first = next(iter(self.batch))
        updates = max(1, round(self.epochs * sizes[first] / self.batch[first]))  # type: ignore[operator]
        if updates > MOST:
            raise UserError(f"phase {self.name} has {self.epochs:g} epochs, more than {MOST:,} updates; is it a slip?")
        return updates


Strategy = list[Phase]


def two_stage(bio: int = 64, qa: int = 128, steps: int = 300) -> Strategy:
    """Biographies first, questions afterwards (the Stage-tuned model)."""
    return [Phase("bio", {"bio": bio}, steps), Phase("qa", {"qa": qa}, steps)]


def mixed(bio: int = 64, qa: int = 128, steps: int = 300) -> Strategy:
    """Biographies and questions in every update (the Mix-tuned model)."""
    return [Phase("mixed", {"bio": bio, "qa": qa}, steps)]


def qa_first(bio: int = 64, qa: int = 128, steps: int = 300) -> Strategy:
    """Questions first, biographies afterwards (pre-instruction-tuning)."""
    return two_stage(bio, qa, steps)[::-1]


def bio_only(bio: int = 64, steps: int = 300) -> Strategy:
    """Biographies alone."""
    return [Phase("bio", {"bio": bio}, steps)]


def qa_only(qa: int = 128, steps: int = 300) -> Strategy:
    """Questions alone."""
    return [Phase("qa", {"qa": qa}, steps)]
