"""A trace that several processes take together: each its share of the examples, sums added up over all of them.

Example n is traced by process n mod size, whatever the batches; sums over examples are all that is exchanged, so the
trace is that of one process but for the order of additions. Where every process has the whole model (DDP), the sums
are added once, at the end. Where the model is sharded (FSDP2), a parameter's sums go to the processes that hold its
rows as soon as its part of the backward is done: no process ever has the sums of the whole model.

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
from crosstrace.trace.engine import Batch, Engine
from crosstrace.trace.memory import Plan
from crosstrace.trace.rules import sum_dtype

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
        """Those of `group`, or those that hold the model's pieces; None: this process takes the trace alone.

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
        """This process's rows of every batch; some may be left without any.

        A row keeps the number that it has among all examples, as its group if it has none of its own, so that parts of
        the data do not depend on how many processes there are.
        """
        dealt, seen = [], 0
        for batch in batches:
            numbers = torch.arange(seen, seen + len(batch["labels"]))
            mine = numbers % self.processes.size == self.processes.rank
            dealt.append({key: x[mine.to(x.device)] for key, x in {"group": numbers, **batch}.items()})
            seen += len(numbers)
        return dealt

    def largest_share(self, batches: Sequence[Batch]) -> list[Batch]:
        """As many rows of every batch as a process may have of it."""
        return [{k: x[: -(-len(x) // self.processes.size)] for k, x in batch.items()} for batch in batches]

    def agreed(self, plan: Plan) -> Plan:
        """Process 0's plan, with this process's device: others may find other memory free."""
        on_cpu, groups = self.processes.from_first((plan.device.type == "cpu", plan.groups))
        return Plan(torch.device("cpu") if on_cpu else plan.device, groups)

    def prepare(self, engine: Engine, batches: Sequence[Batch]) -> None:
        """Choose the rules, on the same examples everywhere: shares may hold too few, and ways must not differ."""
        engine.plan_for(next((batch for batch in batches if len(batch["labels"]) > 1), batches[0]))
        engine.plan = self.processes.from_first(engine.plan)
        general = [name for name, way in engine.plan.items() if way is None]
        if self.sharded and general:
            raise UserError(
                f"parameter {general[0]!r} ({len(general)} such) has no rule, and one example at a time can't be "
                "traced while the model is sharded; trace it unsharded, or write a rule (docs/rules.md)"
            )

    def add_up(self, totals: Mapping[str, Tensor], weight: float) -> float:
        """Sums of this process, in place, and their weight over all processes. The only exchange under DDP."""
        if not self.sharded:
            for total in totals.values():
                here = total
                if dist.get_backend(self.processes.group) == "nccl" and not total.is_cuda:  # which knows GPUs alone
                    here = total.to(torch.device("cuda", torch.cuda.current_device()))
                self.processes.add_up(here)
                if here is not total:
                    total.copy_(here)
        return sum(self.processes.gathered(weight))


class Scatter:
    """Takes whole sums of one parameter at a time, and leaves each process with those of its rows.

    While a parameter's sums are on their way the engine makes the next one's: those of two parameters are held at once.

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
        """The sums of one part of the data to be filled; `add` gets those of the rows that this process holds.

        Raises:
            UserError: the parameter is another one than all processes expect now.
        """
        self._follow(name)
        theta, size = self.parameters[name], self.processes.size
        part = -(-theta.shape[0] // size)
        rest = theta.shape[1:]
        make = lambda rows: torch.zeros(rows, *rest, dtype=sum_dtype(theta.dtype), device=theta.device)
        sums = {kind: make(part * size) for kind in kinds}  # (rows beyond the last are padding)
        yield {kind: total[: theta.shape[0]] for kind, total in sums.items()}
        self.settle()
        mine = {kind: make(part) for kind in kinds}
        works = [_reduce_scatter(mine[kind], sums[kind], group=self.processes.group, async_op=True) for kind in kinds]
        rows = len(local(theta))

        def arrived(held: dict[str, Tensor] = sums) -> None:
            for kind, total in mine.items():
                add(kind, total[:rows])
            held.clear()

        self._flying = ([work for work in works if work is not None], arrived)

    def settle(self) -> None:
        """Wait for what is on its way."""
        flying, self._flying = self._flying, None
        if flying is not None:
            works, arrived = flying
            for work in works:
                work.wait()
            arrived()

    def finish(self) -> None:
        """The batch is done."""
        self.settle()
        if self._begun < len(self.expected):
            self._refuse(self.expected[self._begun])
        self._begun = 0

    def _follow(self, name: str) -> None:
        if self.expected[: self._begun][-1:] == [name]:
            return  # another part of the data
        if self.expected[self._begun :][:1] != [name]:
            self._refuse(name)
        self._begun += 1

    def _refuse(self, name: str) -> None:
        raise UserError(
            f"parameter {name!r} is used otherwise in this batch than in the first, which the trace of a sharded model "
            "can't follow, since all processes must do the same; trace the model unsharded"
        )
