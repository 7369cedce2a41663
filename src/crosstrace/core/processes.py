"""The processes of one run, as one of them sees them: join them, share work out, agree, and leave cleanly.

torchrun or `accelerate launch` starts them; nothing here does. It knows neither models nor traces.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from crosstrace.core import interrupts
from crosstrace.core.errors import UserError
from crosstrace.core.parents import end_with_parent

T = TypeVar("T")
PATIENCE = timedelta(days=30)  # others wait while one works alone; a process that is gone is noticed without a timeout
AGREEMENT = timedelta(seconds=60)  # time for all to say whether they have failed
FIRST_SPEAKS = 3.0  # seconds for process 0 to report a mistake that all processes meet, before another reports it


class FailedElsewhere(RuntimeError):
    """Another process has failed, so this one can't go on."""

    def __init__(self, rank: int, error: object):
        super().__init__(f"process {rank}: {error if isinstance(error, str) else f'{type(error).__name__}: {error}'}")
        self.rank, self.told = rank, str(self).partition(": ")[2]

    def __reduce__(self) -> tuple[type, tuple[int, str]]:
        return type(self), (self.rank, self.told)


class Processes:
    """Some processes of torch.distributed, of which this is one. Every call must be made by all of them.

    Args:
        group: which; None: all that were started.

    Attributes:
        rank: this one's number among them, from 0.
        size: how many they are.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise UserError(
                "no process group of torch.distributed is there; start the program with torchrun or `accelerate "
                "launch`, and join the group (`processes.main` does)"
            )
        self.group = dist.group.WORLD if group is None else group
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self._aside: Any = None  # the group of `agreed`, made when it is first needed
        if self.rank < 0:
            raise UserError("this process is none of the group that it was given; expected a group that it belongs to")

    def add_up(self, x: Tensor) -> Tensor:
        """x, in place, summed over all; every process has the same bits."""
        dist.all_reduce(x, group=self.group)
        return x

    def largest(self, x: Tensor) -> Tensor:
        """x, in place, the largest of all."""
        dist.all_reduce(x, dist.ReduceOp.MAX, self.group)
        return x

    def gathered(self, value: T) -> list[T]:
        """The value of each process, by rank; values must be small."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, self.group)
        return values

    def from_first(self, value: T) -> T:
        """The value of process 0; it must be small."""
        values = [value]
        dist.broadcast_object_list(values, group=self.group, group_src=0)
        return values[0]

    def by_first(self, fn: Callable[[], T]) -> T:
        """The result of fn(), which process 0 alone calls while the others wait; it must be small.

        Raises:
            UserError: fn raised it; it is raised in all.
            FailedElsewhere: in the others, if fn raised another exception in process 0.
        """
        result: Any = None
        if self.rank == 0:
            try:
                result = fn()
            except UserError as error:
                result = error
            except Exception as error:
                self.from_first(FailedElsewhere(0, error))
                raise
        result = self.from_first(result)
        if isinstance(result, (UserError, FailedElsewhere)):
            raise result
        return result

    def gathered_from(self, fn: Callable[[], T]) -> list[T]:
        """The result of fn() in each process, by rank; results must be small.

        Raises:
            Exception: fn raised it here; in the others it is FailedElsewhere.
        """
        try:
            value: Any = fn()
        except Exception as error:
            self.gathered(FailedElsewhere(self.rank, error))
            raise
        values = self.gathered(value)
        for failure in values:
            if isinstance(failure, FailedElsewhere):
                raise failure
        return values

    def agreed(self, value: T) -> list[T]:
        """The value of each process, by rank, although some may never call this, as they wait for one that has failed.

        Raises:
            RuntimeError: not all have called it within AGREEMENT.
        """
        if self._aside is None:
            ranks = dist.get_process_group_ranks(self.group)
            self._aside = dist.new_group(ranks, timeout=AGREEMENT, backend="gloo", use_local_synchronization=True)
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, self._aside)
        return values

    def wait(self) -> None:
        """Wait until all processes have called this."""
        self.gathered(None)

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's share of the items: item n belongs to process n mod size."""
        return items[self.rank :: self.size]


def by_first(processes: Processes | None, fn: Callable[[], T]) -> T:
    """The result of fn() in process 0, in all `processes`; without them this process is alone and calls fn."""
    return fn() if processes is None else processes.by_first(fn)


def launched() -> int:
    """How many processes a launcher says that it has started together with this one; 0 without one."""
    return int(os.environ.get("WORLD_SIZE") or 0) if "RANK" in os.environ else 0


def main(work: Callable[[Processes], None]) -> NoReturn:
    """Run `work` in every process that the launcher started, and end the process.

    A program of several processes is `if __name__ == "__main__": main(work)`; nothing after it is run. The group is
    joined through accelerate (NCCL on GPUs, gloo elsewhere) and left at the end. If the work raises SystemExit, in all
    processes alike, the program ends with its status.

    If one process fails, it says why in one line on stderr and ends with code 1 (2 for a mistake of the user's). The
    others can't go on without it, and the launcher ends them. A mistake that all processes meet is reported by process
    0. A trace is only in memory, so nothing half-written stays. Training goes on from its last checkpoint when the
    program is started again. A process whose launcher is gone ends too.

    Raises:
        UserError: the process was not started by a launcher.
    """
    from accelerate import PartialState

    if launched() < 1:
        raise UserError(
            "this program runs on several processes, and no launcher has started it; start it with `torchrun "
            "--nproc-per-node 2 PROGRAM` (or python -m torch.distributed.run)"
        )
    place = f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']}"
    end_with_parent(os.getppid())
    try:
        PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
        processes = Processes()
        code = _exit_code_of(work, processes)
        processes.wait()  # whoever leaves first must not look dead to the others
    except BaseException as error:
        code = 1
        if isinstance(error, KeyboardInterrupt) or interrupts.received() is not None:
            sys.stdout.flush()
            interrupts.tell(place=f"{place}: ")
            os._exit(interrupts.exit_code())
        if isinstance(error, UserError):
            code, why = 2, str(error)
            if os.environ["RANK"] != "0":
                time.sleep(FIRST_SPEAKS)  # the launcher ends this process as soon as process 0 has
        elif is_lost(error):
            why = "it can't go on: another process has ended, whose own message says why"
        else:
            traceback.print_exc()
            why = f"{type(error).__name__}: {error}"
        sys.stdout.flush()
        sys.stderr.write(f"crosstrace: {place}: {why}\n")  # (at once: others write there too)
        sys.stderr.flush()
        os._exit(code)  # leaving the group would wait for the others
    dist.destroy_process_group()
    _end(code)


def _exit_code_of(work: Callable[[Processes], None], processes: Processes) -> int:
    """Do the work and return the status that it ends with: that of its SystemExit, else 0."""
    try:
        work(processes)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _end(code: int) -> NoReturn:
    """End the process as multiprocessing ends its own: run the exit functions, then no more code.

    Tearing the interpreter down is not safe here. Gloo's threads release a collective's tensors after the code that
    waited for it has gone on. If a tensor has a Python object, that takes the interpreter's lock. An interpreter that
    is being torn down ends the thread instead, which unwinds through C++ code that forbids it: "terminate called
    without an active exception". Destroying the group does not end the threads, since DTensor's caches hold the group.
    """
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_lost(error: BaseException) -> bool:
    """Whether this process can't go on because another one is gone or has failed."""
    lost = (FailedElsewhere, dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)
    return isinstance(error, lost) or (isinstance(error, RuntimeError) and "gloo" in str(error))
