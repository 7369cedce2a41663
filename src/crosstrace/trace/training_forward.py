"""One forward of a training: its examples, tasks and weights, read from what the model gets, and what is traced of it.

Nothing here knows rules or sums.

Shapes: B examples that have a target, T positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from crosstrace.core.errors import UserError
from crosstrace.trace.batches import Batch
from crosstrace.trace.calls import Call
from crosstrace.trace.packed import is_packed
from crosstrace.trace.recording import Recording
from crosstrace.training.losses import next_tokens

COLUMNS = ("task", "group", "loss_weight", "loss_labels")  # of a batch, for the trace alone: the model never sees them
_MODEL_INPUTS = {"input_ids", "attention_mask", "position_ids", "labels", "num_items_in_batch"}


@dataclass(eq=False)
class TrainingBatch:
    """The examples of a training's batch. Tensors are in the order of the shares."""

    batch: Batch  # of the examples that have a target
    shares: list[tuple[str, int, slice]]  # task, part, its examples
    weights: Tensor  # [rows] w_i up to a factor common to all; 0: no target, in no share
    order: Tensor | None  # [rows] of the training's rows
    other_inputs: list[str]  # tensors that the model got besides the batch


@dataclass(eq=False)
class TracedForward(TrainingBatch):
    """One forward of the training and its backward."""

    recording: Recording = field(init=False)
    missing: set[str]  # parameters not traced yet
    samples: dict[int, dict[str, Tensor]]  # for each example that rules are tried on, of its gradients by itself
    wanted: dict[Call, Tensor] = field(default_factory=dict)  # a linear layer's weight gradient, to be filled
    is_unchecked: bool = False  # the loss is checked where it falls apart, and its gradient there has not come
    factor: Tensor | None = None  # what the training multiplied its loss with, once its backward has begun
    random_states: list[Tensor] = field(default_factory=list)  # of the generators before the forward
    is_random: bool = False  # whether it drew random numbers
    loss: Tensor | None = None  # that the model gave
    refused: set[str] = field(default_factory=set)  # parameters whose rule did not fit, against what was planned
    unreached: set[str] = field(default_factory=set)  # parameters that no example's loss reaches
    hooks: ExitStack = field(default_factory=ExitStack)

    @property
    def scale(self) -> Tensor:
        """[rows] what the gradient of the training's loss is multiplied by to be that of ℓ_i; 0 without a target."""
        assert self.factor is not None
        product = self.factor * self.weights
        return torch.where(product == 0, 0, 1 / product)


def read_training_batch(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], columns: dict[str, Tensor], tasks: Sequence[str], parts: int
) -> TrainingBatch | None:
    """The examples of a training's batch, sorted by task and part; None if no example has a target.

    Args:
        args, kwargs: what the model gets.
        columns: those of COLUMNS that the batch had.
        tasks: by their numbers in the column `task`.
        parts: an example of group g counts for part g % parts.

    Raises:
        UserError: the batch lacks something, or is not what the trace expects.
    """
    ids = kwargs.get("input_ids", args[0] if args else None)
    if isinstance(ids, Tensor):
        columns = {name: torch.as_tensor(value, device=ids.device) for name, value in columns.items()}
    labels = columns.get("loss_labels", kwargs.get("labels"))
    _check_names(ids, labels, kwargs, columns)
    assert isinstance(ids, Tensor) and labels is not None
    mask = kwargs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    _check_rows(ids, labels, mask, kwargs, columns)
    _check_tasks(columns["task"], tasks)
    if bool(((labels[:, 1:] != -100) & (mask[:, 1:] == 0)).any()):
        raise UserError(
            "the training's labels count padding (positions where attention_mask is 0) as targets; expected -100 "
            "there, or the model is taught to predict padding and an example's loss depends on its batch"
        )
    targets = (next_tokens(labels) != -100).sum(1)
    group = columns.get("group", torch.arange(len(ids), device=ids.device)).long()
    task = columns["task"].long()
    key = torch.where(targets > 0, task * parts + group % parts, len(tasks) * parts)  # without a target: last
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
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels, "position_ids": kwargs.get("position_ids")}
    batch = {name: value[kept] for name, value in inputs.items() if value is not None and value.shape == ids.shape}
    shares, start = [], 0
    for number, size in zip(*(x.tolist() for x in key[kept].unique_consecutive(return_counts=True))):
        shares.append((tasks[number // parts], number % parts, slice(start, start + size)))
        start += size
    is_in_order = torch.equal(order, torch.arange(len(order), device=order.device))
    other_inputs = sorted(name for name, x in kwargs.items() if isinstance(x, Tensor) and name not in _MODEL_INPUTS)
    return TrainingBatch(batch, shares, weights, None if is_in_order else order, other_inputs)


def _check_names(ids: Any, labels: Tensor | None, kwargs: Mapping[str, Any], columns: Mapping[str, Tensor]) -> None:
    """Raise a `UserError` if input_ids, labels or the columns are missing."""
    names = ", ".join(repr(name) for name in (*kwargs, *columns)) or "nothing by name"
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise UserError(f"the training's forward got {names}; the trace expects input_ids [examples, positions]")
    if labels is None and not columns.keys() & {"loss_labels", "loss_weight"}:
        raise UserError(
            f"the training's forward got {names}, and no labels, so its loss is computed outside of the model (by "
            "compute_loss_func, by label smoothing, which can't be traced, or by a loop of one's own); expected "
            "labels, or the columns loss_labels and loss_weight, which say what the loss is made of"
        )
    if labels is None or ("loss_labels" in columns) != ("loss_weight" in columns):
        raise UserError(
            f"the training's forward got {names}; where the loss is computed outside of the model, the trace "
            "expects both columns, loss_labels and loss_weight"
        )
    if "task" not in columns:
        raise UserError(
            f"the training's batch has {names}, but no column 'task' with the number of each example's task; a "
            "Trainer takes it away unless remove_unused_columns=False, and many data collators do (TRL's too) "
            "unless wrapped: trainer.data_collator = KeepColumns(trainer.data_collator)"
        )


def _check_rows(
    ids: Tensor, labels: Tensor, mask: Tensor, kwargs: Mapping[str, Any], columns: Mapping[str, Tensor]
) -> None:
    """Raise a `UserError` if a row holds several examples, or a tensor has another shape."""
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


def _check_tasks(column: Tensor, tasks: Sequence[str]) -> None:
    """Raise a `UserError` if an example's number is that of no task."""
    task = column.long()
    if bool(((task < 0) | (task >= len(tasks)) | (task != column)).any()):
        raise UserError(
            f"column 'task' is {column.tolist()[:8]}; expected for each of {len(column)} examples a number "
            f"from 0 to {len(tasks) - 1} ({', '.join(tasks)})"
        )
