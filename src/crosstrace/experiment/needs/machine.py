"""A machine, and how many processes a launcher starts on it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch

from crosstrace.core.errors import UserError
from crosstrace.trace.memory import free_memory

MOST_TOGETHER = 1024  # most processes of a plan; for so many, planning a small model takes minutes


@dataclass(frozen=True)
class Machine:
    """A machine's memory and speed.

    Attributes:
        name: the name of the GPU, or "cpu".
        gpu: bytes free on the GPU; None without one.
        ram, disk: bytes free; None if not known.
        flops: operations a second of matrix products, by place and dtype ("ram float32") or by place alone.
        source: where `flops` comes from.
    """

    name: str
    gpu: int | None
    ram: int | None
    disk: int | None
    flops: dict[str, float] = field(default_factory=dict)
    source: str = ""

    @classmethod
    def here(cls, folder: Path) -> Machine:
        """This machine. `folder` is the folder of the run, which need not exist yet."""
        existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
        has_gpu = torch.cuda.is_available()
        return cls(
            torch.cuda.get_device_name() if has_gpu else "cpu",
            free_memory(torch.device("cuda", torch.cuda.current_device())) if has_gpu else None,
            free_memory(torch.device("cpu")),
            shutil.disk_usage(existing).free,
        )


@dataclass(frozen=True)
class Launch:
    """The processes that a launcher starts, e.g. `torchrun --nproc-per-node`. One process stands for no launcher.

    Attributes:
        processes: the number on all machines together. If there are GPUs, each process has one.
        nodes: the number of machines. All have equally many processes.

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
        """The number of processes on each machine."""
        return self.processes // self.nodes


ALONE = Launch()
