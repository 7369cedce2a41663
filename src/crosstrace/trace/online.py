"""The online trace: every example of a training, traced as it happens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from crosstrace.core.errors import UserError
from crosstrace.models.forward import TrainingForward, TrainingForwards
from crosstrace.trace.accumulated import Accumulated
from crosstrace.trace.borrowed import Drew, calm, is_the_same
from crosstrace.trace.distributed import Scatter, Team
from crosstrace.trace.engine import Batch, Forward
from crosstrace.trace.means import by_part, order_by_part, without_group
from crosstrace.trace.packed import unpacked
from crosstrace.trace.rules import sum_dtype


class OnlineTrace(Accumulated):
    """Traces accumulated over the steps of a training, by a forward and backward of their own.

    Call `step` before each update with the step's batches: the trace's targets may differ from the training's. The
    model, its gradients and the random state are left alone. See `Accumulated` for the arguments; `TrainingTrace`
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
            forwards: per task, the training's own forward, which is traced in the place of one more. Called as
                forward(micro-batch, True), once for each in order, it gives the losses ℓ [B] of its labels, and keeps
                what the training needs. In a task's first step it is called before as forward(two of the rows, False),
                and compared with the trace's own forward; where they differ, as by dropout, the trace goes on with its
                own (see `borrows`). So it does for every task behind one without a forward that may be traced, since
                the training makes its own in this order. Not used where several processes share out the examples.

        Raises:
            UserError: a task that was not announced, or a batch that can't be traced; nothing is added then.
        """
        self._check_whole()
        unknown = [task for task in batches if task not in self._steps]
        if unknown:
            raise UserError(f"task {unknown[0]!r} is not one of those announced: {', '.join(self._steps)}")
        micro_batches = {
            task: [unpacked(batch)[0] for batch in ([own] if isinstance(own, Mapping) else own)]
            for task, own in batches.items()
        }
        for own in micro_batches.values():
            for batch in own:
                self._engine.checked(without_group(batch))
        factor = self._factor(lr)
        self._whole = False
        in_turn = True  # whether the training's next forward is that of this task
        for task, own in micro_batches.items():
            if self._team is not None and self._team.sharded:
                self._step_in_pieces(self._team, task, own, factor)
            else:
                forward = forwards.get(task)
                if forward is not None and not in_turn:
                    self.borrows[task], forward = False, None
                in_turn = self._step_of(task, own, forward, factor)
        self._whole = True

    def _step_of(self, task: str, batches: Sequence[Batch], forward: TrainingForward | None, factor: float) -> bool:
        """Add a task's step: its micro-batches, one after the other. Gives whether all of them are the training's."""
        count = sum(len(batch["labels"]) for batch in batches)
        dealt = batches if self._team is None else self._team.deal(batches)
        gradients: dict[str, Tensor] = {}
        sizes: Counter[int] = Counter()
        seen = 0
        for of_all, given in zip(batches, dealt):
            if self._team is not None:  # the rules are chosen on the same examples everywhere
                self._engine.plan_for(without_group(of_all))
            batch, chosen, shares = by_part(given, self._parts, seen)
            own = {part: share.stop - share.start for part, share in zip(chosen, shares)}
            complete = len(shares) if self._team is None and of_all is batches[-1] else 0  # 0: not here
            add = partial(self._add, task, chosen, count, gradients, factor, Counter(), complete)
            if sum(own.values()):
                borrowed = self._borrowed(task, given, forward)
                order = None
                if borrowed and len(shares) > 1:
                    order = order_by_part(given, self._parts, seen)[1].to(given["labels"].device)
                try:
                    self._engine.run(batch, shares, add, borrowed, order)
                except Drew:  # before anything was added
                    self.borrows[task], forward = False, None
                    self._engine.run(batch, shares, add)
            sizes.update(own)
            seen += len(of_all["labels"])
        if self._team is not None and "step" in self._settings["reductions"]:
            self._add_step_of_all(self._team, task, gradients, count, factor)
        for name in list(gradients):  # what the last micro-batch does not use, as of an expert
            self._add_step(task, name, gradients.pop(name), count, factor)
        self._count(task, sizes.items(), factor)
        return forward is not None and self.borrows.get(task, False)

    def _borrowed(self, task: str, batch: Batch, forward: TrainingForward | None) -> Forward | None:
        """The training's own forward of this very batch, its rows in the training's order, if it may be traced."""
        if forward is None or self._team is not None or self.borrows.get(task) is False:
            return None
        rows = self._engine.checked(without_group(batch))
        if task not in self._compared:
            self._compared.add(task)
            self.borrows[task] = is_the_same(self._engine, rows, forward)
        return partial(_of_these, forward, rows) if self.borrows[task] else None

    def _step_in_pieces(self, team: Team, task: str, batches: Sequence[Batch], factor: float) -> None:
        """Add a task's step of a sharded model: all processes go through the same parts together, each with its
        examples, or with any one that counts nothing, and get the sums of their rows."""
        rows = [without_group(batch) for batch in batches]
        if self._engine.probed < min(2, max(len(batch["labels"]) for batch in batches)):
            team.prepare(self._engine, rows)
        gradients: dict[str, Tensor] = {}
        sizes: Counter[int] = Counter()
        seen = 0
        for of_all, given, any_rows in zip(batches, team.deal(batches), rows):
            _, chosen, whole_shares = by_part(of_all, self._parts, seen)
            batch, own, shares = by_part(given, self._parts, seen)
            if not len(batch["labels"]):
                batch, own = {key: value[:1] for key, value in any_rows.items()}, []
            of_part = dict(zip(own, shares))
            scatter = Scatter(self._engine, team.processes)

            def add(name: str, number: int, chosen: list[int] = chosen, scatter: Scatter = scatter) -> Any:
                return self._open(task, chosen[number], name, gradients, factor, scatter)

            self._engine.run(batch, [of_part.get(part, slice(0, 0)) for part in chosen], add)
            scatter.finish()
            sizes.update({part: share.stop - share.start for part, share in zip(chosen, whole_shares)})
            seen += len(of_all["labels"])
        for name in list(gradients):
            self._add_step(task, name, gradients.pop(name), seen, factor)
        self._count(task, sizes.items(), factor)

    def _add_step_of_all(self, team: Team, task: str, gradients: dict[str, Tensor], count: int, factor: float) -> None:
        """Add a step's mean gradient over all processes: its absolute value is not the sum of theirs."""
        for name, theta in self._engine.parameters.items():
            own = gradients.pop(name, None)
            own = torch.zeros_like(theta, dtype=sum_dtype(theta.dtype)) if own is None else own
            team.processes.add_up(own)
            if self._holds:
                self._add_step(task, name, own, count, factor)

    @contextmanager
    def _add(
        self, task: str, chosen: list[int], count: int, gradients: dict[str, Tensor], factor: float,
        added: Counter[str], complete: int, name: str, number: int,
    ) -> Iterator[dict[str, Tensor]]:  # fmt: skip
        """Where a share's sums of a parameter are added. When `complete` shares have been, the step's gradient of it is
        whole, and is let go of."""
        with self._open(task, chosen[number], name, gradients, factor) as sums:
            yield sums
        added[name] += 1
        if name in gradients and added[name] == complete:
            self._add_step(task, name, gradients.pop(name), count, factor)


def _of_these(forward: TrainingForward, rows: Batch, _: Batch) -> Tensor:
    """The losses of the training's rows, whichever batch is traced: a training must not change by being traced."""
    return calm(forward, rows, True)
