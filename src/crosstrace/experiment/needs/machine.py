"""A machine, and how many processes a launcher starts on it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch

from crosstrace.core.errors import UserError
from crosstrace.trace.memory import free_memory

MOST_TOGETHER = 1024  # processes that are planned; of a small model on so many it takes minutes


@dataclass(frozen=True)
class Machine:
    """What there is: bytes free, None where that isn't known.

    Attributes:
        name: of the GPU, or "cpu".
        gpu: free on the GPU; None without one.
        ram, disk: free.
        flops: operations a second that matrix products reach, by place and dtype ("ram float32"), or by place alone.
        source: of `flops`.
    """

    name: str
    gpu: int | None
    ram: int | None
    disk: int | None
    flops: dict[str, float] = field(default_factory=dict)
    source: str = ""

    @classmethod
    def here(cls, folder: Path) -> Machine:
        """This machine; `folder` is where the run would go."""
        there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
        found = torch.cuda.is_available()
        return cls(
            torch.cuda.get_device_name() if found else "cpu",
            free_memory(torch.device("cuda", torch.cuda.current_device())) if found else None,
            free_memory(torch.device("cpu")),
            shutil.disk_usage(there).free,
        )


@dataclass(frozen=True)
class Launch:
    """What a launcher starts: `torchrun --nproc-per-node`, on one machine or several; one process is no launcher's.

    Attributes:
        processes: in all; of GPUs each has one.
        nodes: machines, with as many processes each.

    Raises:
        UserError: the processes don't divide among the machines, or are more than can be rehearsed.
    """

    processes: int = 1
    nodes: int = 1

    def __post_init__(self) -> None:
        if self.processes < 1 or self.nodes < 1 or self.processes % self.nodes:
            raise UserError(
                f"{self.processes} processes on {self.nodes} machines were asked for; expected as many on each, one at "
                "least"
            )
        if self.processes > MOST_TOGETHER:
            raise UserError(
                f"{self.processes:,} processes were asked for; expected {MOST_TOGETHER:,} at most, since what FSDP2 "
                "does for each of them is rehearsed"
            )

    @property
    def beside(self) -> int:
        """Processes that share a machine."""
        return self.processes // self.nodes


ALONE = Launch()
