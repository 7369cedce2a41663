"""A trace that several processes take together: each traces its share of the examples, and the sums are added up.

Process n mod size traces example n, whatever the batches. Only sums over examples are exchanged, so the trace is that
of one process but for the order of additions. If every process has the whole model (DDP), the sums are added once, at
the end. If the model is sharded (FSDP2), a parameter's sums go to the processes that hold its rows as soon as its part
of the backward is done: no process ever has the sums of the whole model.

Nothing here computes a gradient, or knows tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from crosstrace.core.errors import UserError
from crosstrace.core.pieces import at_rest, local, processes_of
from crosstrace.core.processes import Processes
from crosstrace.trace.batches import Batch
from crosstrace.trace.blocks import sum_dtype
from crosstrace.trace.engine import Engine
from crosstrace.trace.memory import Plan

# (its name since torch 2.13)
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Team:
    """The processes that take a trace together.

    Attributes:
        sharded: whether each holds some rows of every parameter, rather than the whole model.
    """

    def __init__(self, processes: Processes, sharded: bool) -> None:
        self.processes, self.sharded = processes, sharded

    @staticmethod
    def of(model: nn.Module, group: dist.ProcessGroup | None) -> Team | None:
        """The processes of `group`, or those that hold the model's pieces; None: this process takes the trace alone.

        Raises:
            UserError: the model is wrapped in DDP, is sharded in another way than by rows, or over other processes.
        """
        if isinstance(model, DistributedDataParallel):
            raise UserError(
                "the model to trace is wrapped in DistributedDataParallel; expected the model itself (model.module, or "
                "accelerator.unwrap_model(model)), and group= for the processes to share out the examples"
            )
        holders = processes_of(at_rest(model))
        if holders is None:
            return None if group is None else Team(Processes(group), sharded=False)
        if group is not None and dist.get_process_group_ranks(group) != dist.get_process_group_ranks(holders.group):
            raise UserError(
                "the group given for the trace is not that of the processes that hold the sharded model's pieces; "
                "leave group= out, they share out the examples by themselves"
            )
        return Team(holders, sharded=True)

    def deal(self, batches: Sequence[Batch]) -> list[dict[str, Tensor]]:
        """This process's rows of every batch; a batch may have none for it.

        A row without a group gets one: its number among all examples. So the parts of the data do not depend on how
        many processes there are.
        """
        dealt, seen = [], 0
        for batch in batches:
            numbers = torch.arange(seen, seen + len(batch["labels"]))
            mine = numbers % self.processes.size == self.processes.rank
            dealt.append({key: x[mine.to(x.device)] for key, x in {"group": numbers, **batch}.items()})
            seen += len(numbers)
        return dealt

    def largest_share(self, batches: Sequence[Batch]) -> list[Batch]:
        """As many rows of every batch as one process may get."""
        return [{k: x[: -(-len(x) // self.processes.size)] for k, x in batch.items()} for batch in batches]

    def agreed(self, plan: Plan) -> Plan:
        """Process 0's plan, with this process's device. (Another process may have other memory free.)"""
        on_cpu, groups = self.processes.from_first((plan.device.type == "cpu", plan.groups))
        return Plan(torch.device("cpu") if on_cpu else plan.device, groups)

    def prepare(self, engine: Engine, batches: Sequence[Batch]) -> None:
        """Choose the rules, on the same examples everywhere: a share may hold too few, and the ways must not differ."""
        engine.plan_for(next((batch for batch in batches if len(batch["labels"]) > 1), batches[0]))
        engine.plan = self.processes.from_first(engine.plan)
        general = [name for name, way in engine.plan.items() if way is None]
        if self.sharded and general:
            raise UserError(
                f"parameter {general[0]!r} ({len(general)} such) has no rule, and one example at a time can't be "
                "traced while the model is sharded; trace it unsharded, or write a rule (docs/rules.md)"
            )

    def add_up(self, totals: Mapping[str, Tensor], weight: float) -> float:
        """Add this process's sums up over all processes, in place; gives their weight over all.

        Under DDP it is the only exchange."""
        if not self.sharded:
            for total in totals.values():
                sent = total
                if dist.get_backend(self.processes.group) == "nccl" and not total.is_cuda:  # which knows GPUs alone
                    sent = total.to(torch.device("cuda", torch.cuda.current_device()))
                self.processes.add_up(sent)
                if sent is not total:
                    total.copy_(sent)
        return sum(self.processes.gathered(weight))


class Scatter:
    """Takes whole sums of one parameter at a time, and leaves each process with those of its rows.

    While a parameter's sums are sent, the engine makes the next one's. So those of two parameters are held at once.

    Args:
        engine: of the sharded model; it knows the order in which the backward delivers parameters.
    """

    def __init__(self, engine: Engine, processes: Processes) -> None:
        self.parameters, self.processes = engine.parameters, processes
        self.expected = [name for name in engine.order if engine.plan[name]]
        self._begun = 0  # how many of them, in this batch
        self._flying: tuple[list[dist.Work], Callable[[], None]] | None = None

    @contextmanager
    def open(self, name: str, kinds: Sequence[str], add: Callable[[str, Tensor], None]) -> Iterator[dict[str, Tensor]]:
        """The sums of one part of the data, to be filled; `add` gets those of the rows that this process holds.

        Raises:
            UserError: the parameter is another one than all processes expect now.
        """
        self._follow(name)
        theta, size = self.parameters[name], self.processes.size
        part = -(-theta.shape[0] // size)

        def make_zeros(rows: int) -> Tensor:
            return torch.zeros(rows, *theta.shape[1:], dtype=sum_dtype(theta.dtype), device=theta.device)

        sums = {kind: make_zeros(part * size) for kind in kinds}  # (rows beyond the last are padding)
        yield {kind: total[: theta.shape[0]] for kind, total in sums.items()}
        self.settle()
        my_sums = {kind: make_zeros(part) for kind in kinds}
        group = self.processes.group
        works = [_reduce_scatter(my_sums[kind], sums[kind], group=group, async_op=True) for kind in kinds]
        rows = len(local(theta))

        def add_my_rows(sent: dict[str, Tensor] = sums) -> None:
            for kind, total in my_sums.items():
                add(kind, total[:rows])
            sent.clear()

        self._flying = ([work for work in works if work is not None], add_my_rows)

    def settle(self) -> None:
        """Wait for what is being sent."""
        flying, self._flying = self._flying, None
        if flying is not None:
            works, add_my_rows = flying
            for work in works:
                work.wait()
            add_my_rows()

    def finish(self) -> None:
        """The batch is done."""
        self.settle()
        if self._begun < len(self.expected):
            self._raise_unexpected(self.expected[self._begun])
        self._begun = 0

    def _follow(self, name: str) -> None:
        """Check that the parameter is the one that all processes expect now."""
        if self.expected[: self._begun][-1:] == [name]:
            return  # another part of the data
        if self.expected[self._begun :][:1] != [name]:
            self._raise_unexpected(name)
        self._begun += 1

    def _raise_unexpected(self, name: str) -> None:
        raise UserError(
            f"parameter {name!r} is used otherwise in this batch than in the first, which the trace of a sharded model "
            "can't follow, since all processes must do the same; trace the model unsharded"
        )
