"""What one update minimises: the weighted sum of the tasks' losses, one micro-batch after the other.

It knows nothing of the Trainer, of checkpoints or of who listens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from crosstrace.core.processes import Processes
from crosstrace.data.tokens import Batch
from crosstrace.models.forward import logits_at, rows_at
from crosstrace.training.losses import aligned_losses, next_tokens, target_positions
from crosstrace.training.recipes import Phase
from crosstrace.training.updates import MicroBatches


class UpdateLoss:
    """An update's loss, Σ_t w_t · mean over task t's examples of ℓ_i.

    Each micro-batch adds a part. The gradient of a part is computed before the next forward, so only one graph is held.

    Args:
        model: what is called. Where several processes train, it is what DDP wraps around `inner`. They call it in the
            last micro-batch alone, and add up their gradients in its backward.
        phase: it has the weights w_t.
        batches: each task's micro-batches.
        backward: called with each part but the last one.
        after: called with a task when its gradient has been computed, and the next task's has not. It is not called
            for the last task: the caller of `finish` computes that gradient.
        processes: all that train, where they are several. Each takes its rows of every micro-batch. The mean of their
            losses has the gradient of the whole.
        inner: the model itself, if `model` is wrapped around it.
    """

    def __init__(
        self,
        model: Any,
        phase: Phase,
        batches: MicroBatches,
        backward: Callable[[Tensor], object] = Tensor.backward,
        processes: Processes | None = None,
        inner: Any = None,
        after: Callable[[str], object] = lambda task: None,
    ) -> None:
        self.model, self.inner, self.processes, self.backward = model, inner, processes, backward
        self.after = after
        self.micro_batches: list[tuple[str, Batch, float]] = []  # the task, and its share of the loss
        for task, task_batches in batches.items():
            count = sum(len(batch["labels"]) for batch in task_batches)
            weight = phase.weights.get(task, 1.0) / count
            self.micro_batches += [(task, batch, weight * len(batch["labels"])) for batch in task_batches]
        self.made = 0  # micro-batches whose part of the loss was made
        self.loss = torch.zeros(())
        self.last: Tensor | None = None  # the part made last, whose gradient has not been computed

    def share_next(self, task: str, batch: Mapping[str, Tensor]) -> Tensor:
        """The losses [B] of the next micro-batch's `labels`, from the forward that the update goes on with.

        The update minimises the losses of the labels `trained`. The graph is there until the next micro-batch is asked
        for. The next micro-batch must be of this task: whoever traces may watch the model, and must see no other task.
        """
        next_task, _, share = self.micro_batches[self.made]
        assert next_task == task, f"the next micro-batch is of {next_task}, not of {task}"
        self._differentiate_last()
        trained, others = task_losses(self.model, batch, [batch["trained"], batch["labels"]], self.inner)
        self._add(share * trained.mean())
        return others

    def finish(self) -> Tensor:
        """The update's loss, of which the last part alone is left to differentiate."""
        while self.made < len(self.micro_batches):
            _, batch, share = self.micro_batches[self.made]
            is_last = self.made == len(self.micro_batches) - 1
            rows, rows_share = _rows_of_process(batch, self.processes)
            model = self.model if is_last or self.inner is None else self.inner
            self._differentiate_last()
            self._add(rows_share * share * task_losses(model, rows, [rows["labels"]], self.inner)[0].mean())
        assert self.last is not None
        return self.last + (self.loss - self.last.detach())

    def _differentiate_last(self) -> None:
        """Compute the gradient of the part made last, which lets go of its graph."""
        if self.last is not None:
            self.backward(self.last)
            self.last = None
            last_task, next_task = (self.micro_batches[number][0] for number in (self.made - 1, self.made))
            if next_task != last_task:
                self.after(last_task)

    def _add(self, part: Tensor) -> None:
        self.last, self.made = part, self.made + 1
        self.loss = self.loss.to(part.device) + part.detach()


def task_losses(model: Any, batch: Mapping[str, Tensor], labels: Sequence[Tensor], inner: Any = None) -> list[Tensor]:
    """ℓ [B] of one forward, for each of several choices of labels [B, T].

    Logits are computed only where one of the choices has a target: logits are large, and questions have few targets.

    Args:
        inner: the model itself, if `model` is wrapped around it.
    """
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    choices = [next_tokens(chosen) for chosen in labels]
    positions = target_positions(torch.stack(choices).amax(0))
    logits = logits_at(model, positions, inputs, inner)
    losses = []
    for wanted in choices:
        wanted_there = wanted.gather(1, positions)
        columns = target_positions(wanted_there)
        if columns.shape[1] < positions.shape[1]:  # a softmax over the vocabulary is made only where it is read
            losses.append(aligned_losses(rows_at(logits, columns), wanted_there.gather(1, columns)))
        else:
            losses.append(aligned_losses(logits, wanted_there))
    return losses


def _rows_of_process(batch: Batch, processes: Processes | None) -> tuple[Batch, float]:
    """This process's rows of a batch, and the factor of their mean loss.

    The gradients of N processes are averaged, so the factor is N times the share of all rows. A process without rows
    takes part with any row, whose factor is 0.
    """
    if processes is None:
        return batch, 1.0
    rows = {name: x[processes.rank :: processes.size] for name, x in batch.items()}
    count = len(rows["labels"])
    return rows if count else {name: x[:1] for name, x in batch.items()}, processes.size * count / len(batch["labels"])
