"""The online trace: every example of a training, traced as it happens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from crosstrace.core.errors import UserError
from crosstrace.models.forward import TrainingForward, TrainingForwards
from crosstrace.trace.accumulated import Accumulated
from crosstrace.trace.batches import Batch
from crosstrace.trace.blocks import sum_dtype
from crosstrace.trace.borrowed import RandomForward, compute_losses, is_the_same
from crosstrace.trace.distributed import Scatter, Team
from crosstrace.trace.means import order_by_part, sort_by_part, without_group
from crosstrace.trace.packed import unpacked
from crosstrace.trace.plans import Forward


@dataclass
class _TaskStep:
    """One micro-batch of a task's step.

    Attributes:
        parts: that of each share.
        count: examples of the whole step.
        gradients: Σg of the step so far.
        factor: of the step in the means.
        shares: how many there are, if this is the step's last micro-batch; None: it is not, or a team shares it out.
        added: shares added so far, by parameter.
    """

    task: str
    parts: list[int]
    count: int
    gradients: dict[str, Tensor]
    factor: float
    shares: int | None
    added: Counter[str] = field(default_factory=Counter)


class OnlineTrace(Accumulated):
    """Traces accumulated over the steps of a training, by a forward and backward of their own.

    Call `step` before each update with the step's batches. The trace's targets may differ from the training's. The
    model, its gradients and the random state are left alone. See `Accumulated` for the arguments. `TrainingTrace`
    shares the training's own backward instead.
    """

    def step(
        self,
        batches: Mapping[str, Batch | Sequence[Batch]],
        lr: float = 1.0,
        forwards: TrainingForwards = MappingProxyType({}),
    ) -> None:
        """Add one training step: each task's batch, at the parameters before the update.

        Args:
            batches: per task, its examples in one batch or in several micro-batches; a task without examples in this
                step is left out.
            lr: the step's learning rate; counts only if `lr_weighted`.
            forwards: per task, the training's own forward, which is traced in place of one more. It is called as
                forward(micro-batch, True), once for each in order. It gives the losses ℓ [B] of its labels, and keeps
                what the training needs. In a task's first step it is first called as forward(two of the rows, False),
                and compared with the trace's own forward. If they differ, as by dropout, the trace goes on with its own
                (see `borrows`). So it does for every task after one whose forward may not be traced, since the training
                makes its forwards in this order. Not used if several processes share out the examples.

        Raises:
            UserError: a task that was not announced, or a batch that can't be traced; nothing is added then.
        """
        self._check_complete()
        unknown = [task for task in batches if task not in self._steps]
        if unknown:
            raise UserError(f"task {unknown[0]!r} is not one of those announced: {', '.join(self._steps)}")
        micro_batches = {
            task: [unpacked(batch)[0] for batch in ([of_task] if isinstance(of_task, Mapping) else of_task)]
            for task, of_task in batches.items()
        }
        for of_task in micro_batches.values():
            for batch in of_task:
                self._engine.check_batch(without_group(batch))
        factor = self._factor(lr)
        self._is_complete = False
        is_next = True  # whether the training's next forward is that of this task
        for task, of_task in micro_batches.items():
            if self._team is not None and self._team.sharded:
                self._add_sharded_step(self._team, task, of_task, factor)
            else:
                forward = forwards.get(task)
                if forward is not None and not is_next:
                    self.borrows[task], forward = False, None
                is_next = self._add_task_step(task, of_task, forward, factor)
        self._is_complete = True

    def _add_task_step(
        self, task: str, batches: Sequence[Batch], forward: TrainingForward | None, factor: float
    ) -> bool:
        """Add a task's step: its micro-batches, one after the other.

        Gives whether all of the traced forwards are the training's."""
        count = sum(len(batch["labels"]) for batch in batches)
        dealt = batches if self._team is None else self._team.deal(batches)
        gradients: dict[str, Tensor] = {}
        sizes: Counter[int] = Counter()
        seen = 0
        for whole_batch, my_rows in zip(batches, dealt):
            if self._team is not None:  # the rules are chosen on the same examples everywhere
                self._engine.plan_for(without_group(whole_batch))
            batch, parts, shares = sort_by_part(my_rows, self._parts, seen)
            my_sizes = {part: share.stop - share.start for part, share in zip(parts, shares)}
            is_last = self._team is None and whole_batch is batches[-1]
            step = _TaskStep(task, parts, count, gradients, factor, len(shares) if is_last else None)
            open_sums = partial(self._open_share, step)
            if sum(my_sizes.values()):
                borrowed = self._borrow(task, my_rows, forward)
                order = None
                if borrowed and len(shares) > 1:
                    order = order_by_part(my_rows, self._parts, seen)[1].to(my_rows["labels"].device)
                try:
                    self._engine.run(batch, shares, open_sums, borrowed, order)
                except RandomForward:  # before anything was added
                    self.borrows[task], forward = False, None
                    self._engine.run(batch, shares, open_sums)
            sizes.update(my_sizes)
            seen += len(whole_batch["labels"])
        if self._team is not None and "step" in self._settings["reductions"]:
            self._add_team_step(self._team, task, gradients, count, factor)
        for name in list(gradients):  # what the last micro-batch does not use, such as an expert's
            self._add_step(task, name, gradients.pop(name), count, factor)
        self._count(task, sizes.items(), factor)
        return forward is not None and self.borrows.get(task, False)

    def _borrow(self, task: str, batch: Batch, forward: TrainingForward | None) -> Forward | None:
        """The training's own forward of this very batch, its rows in the training's order, if it may be traced."""
        if forward is None or self._team is not None or self.borrows.get(task) is False:
            return None
        rows = self._engine.check_batch(without_group(batch))
        if task not in self._compared:
            self._compared.add(task)
            self.borrows[task] = is_the_same(self._engine, rows, forward)
        return partial(_compute_losses_of, forward, rows) if self.borrows[task] else None

    def _add_sharded_step(self, team: Team, task: str, batches: Sequence[Batch], factor: float) -> None:
        """Add a task's step of a sharded model.

        All processes go through the same parts together, and get the sums of their rows. Each has its own examples, or
        else any example, which then counts for nothing.
        """
        rows = [without_group(batch) for batch in batches]
        if self._engine.probed < min(2, max(len(batch["labels"]) for batch in batches)):
            team.prepare(self._engine, rows)
        gradients: dict[str, Tensor] = {}
        sizes: Counter[int] = Counter()
        seen = 0
        for whole_batch, my_rows, any_rows in zip(batches, team.deal(batches), rows):
            _, parts, whole_shares = sort_by_part(whole_batch, self._parts, seen)
            batch, my_parts, shares = sort_by_part(my_rows, self._parts, seen)
            if not len(batch["labels"]):
                batch, my_parts = {key: value[:1] for key, value in any_rows.items()}, []
            share_of = dict(zip(my_parts, shares))
            scatter = Scatter(self._engine, team.processes)

            def open_sums(name: str, number: int, parts: list[int] = parts, scatter: Scatter = scatter) -> Any:
                return self._open_task_sums(task, parts[number], name, gradients, factor, scatter)

            self._engine.run(batch, [share_of.get(part, slice(0, 0)) for part in parts], open_sums)
            scatter.finish()
            sizes.update({part: share.stop - share.start for part, share in zip(parts, whole_shares)})
            seen += len(whole_batch["labels"])
        for name in list(gradients):
            self._add_step(task, name, gradients.pop(name), seen, factor)
        self._count(task, sizes.items(), factor)

    def _add_team_step(self, team: Team, task: str, gradients: dict[str, Tensor], count: int, factor: float) -> None:
        """Add a step's mean gradient over all processes: its absolute value is not the sum of theirs."""
        for name, theta in self._engine.parameters.items():
            gradient = gradients.pop(name, None)
            gradient = torch.zeros_like(theta, dtype=sum_dtype(theta.dtype)) if gradient is None else gradient
            team.processes.add_up(gradient)
            if self._has_sums:
                self._add_step(task, name, gradient, count, factor)

    @contextmanager
    def _open_share(self, step: _TaskStep, name: str, number: int) -> Iterator[dict[str, Tensor]]:
        """The sums that a share of a micro-batch is added to. After the step's last share the parameter's gradient is
        complete: it is added, and let go of."""
        with self._open_task_sums(step.task, step.parts[number], name, step.gradients, step.factor) as sums:
            yield sums
        step.added[name] += 1
        if name in step.gradients and step.added[name] == step.shares:
            self._add_step(step.task, name, step.gradients.pop(name), step.count, step.factor)


def _compute_losses_of(forward: TrainingForward, rows: Batch, _: Batch) -> Tensor:
    """The losses of the training's rows, whichever batch is traced: a training must not change by being traced."""
    return compute_losses(forward, rows, True)
