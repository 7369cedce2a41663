"""The settings of a training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass as settings

from crosstrace.core.settings import STRICT
from crosstrace.models.adapters import LoraSettings
from crosstrace.training.recipes import Optimiser


@settings(frozen=True, config=STRICT)
class TrainSettings:
    """How every strategy is trained."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1
    """Seed of the order in which examples are seen."""
    optimiser: Optimiser = Field(default_factory=Optimiser)
    """Settings of every phase that names none of its own."""
    lora: LoraSettings | None = None
    """Train a LoRA adapter in place of all weights, e.g. {rank: 8, alpha: 16}; all weights are trained if not given."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """Of the multiplications in training: `auto` is bf16 autocast where the processor has it, else float32."""
    micro_batch: Annotated[int, Field(ge=1)] | None = None
    """Examples of one task that go through the model at once, at most; the gradients of an update's micro-batches are
    added up. Fewer take less memory; an update's loss and traces are the same but for rounding."""
    gradient_checkpointing: bool = False
    """Keep only what enters each layer in a forward, and compute the rest again in the backward: slower, with less
    memory. What is traced during training is then a forward of its own (see trace.forward)."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 50
    """Updates between the checkpoints that an interrupted training resumes from."""
    keep_checkpoints: bool = False
    """Keep every checkpoint (as models/<strategy>/<phase>/checkpoint-N) rather than the last one."""
    recall_every: Annotated[int, Field(ge=0)] = 50
    """Updates between measurements of recall during training; 0 for none."""
    recall_examples: Annotated[int, Field(ge=1)] = 300
    """Examples in each of those measurements."""
    report_to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(default_factory=list)
    """Trackers that get the loss and the learning rate while training, by the Trainer's own integrations."""
