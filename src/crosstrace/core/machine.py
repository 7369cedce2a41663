"""How a process uses the machine: settings of Python, of the C library and of OpenMP, and the memory that it keeps.

The settings are made before torch is loaded. Only the command line and its workers make them; a program that imports
crosstrace as a library makes its own.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# of glibc's malloc.h
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
KEPT = (1 << 31) - 1  # bytes of freed memory that a process keeps for its next tensors
MAPPED = 1 << 26  # bytes of a tensor that is given back to the system at once
SPINS = 1000  # rounds that a thread waits for the next piece of work before it sleeps: some microseconds
GROWTH = 1.15  # more than what one update needs by this factor is not kept
YOUNG = 10_000  # objects that are made before Python looks for those that nothing needs (700 by default)
# a filter for what multiprocessing's helper process says of a killed process, whose semaphores it frees
_UNTOLD = "ignore::UserWarning:multiprocessing.resource_tracker"


@contextmanager
def same_threads_after() -> Iterator[None]:
    """After the context, torch has as many threads as before it."""
    import torch

    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def prepare() -> None:
    """Keep freed memory, let idle threads sleep, and look for unneeded Python objects less often.

    By default glibc returns a tensor's memory to the system when it is freed, and gets pages of zeros for the next one.
    That can take a fifth of a training step (benchmarks/smollm2_shape.py). And by default OpenMP's threads wait
    spinning for milliseconds. If something else needs the core, a step then takes several times as long. What the user
    has set in the environment stays.

    Importing torch and transformers makes a million objects. Python looks through them again and again while they are
    made, and once more at its end, which together took three seconds of every process. Processes that this one starts
    do not warn of the semaphores that a killed worker leaves.
    """
    gc.set_threshold(YOUNG)
    atexit.register(gc.freeze)  # the system takes all memory back
    filters = os.environ.get("PYTHONWARNINGS", "")
    if _UNTOLD not in filters:  # a worker has its leader's
        os.environ["PYTHONWARNINGS"] = f"{filters},{_UNTOLD}".lstrip(",")
    if not any(name.startswith("OMP_WAIT") or name == "GOMP_SPINCOUNT" for name in os.environ):
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        # (older versions refuse more than 32 MB; the others alone would make every tensor a mapping of its own)
        if mallopt(_MMAP_THRESHOLD, MAPPED) or mallopt(_MMAP_THRESHOLD, 1 << 25):
            mallopt(_TRIM_THRESHOLD, KEPT)
            mallopt(_TOP_PAD, 1 << 26)


def give_back() -> None:
    """Give the memory that nothing needs back to the system, where the C library can (glibc)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def held() -> int:
    """Bytes of memory that this process alone holds, freed ones that it keeps included; 0 if the system can't say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            _, resident, shared, *_ = map(int, file.read().split())
    except (OSError, ValueError):
        return 0
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


class KeptMemory:
    """Limits the freed memory that training keeps for its next update.

    If texts have many lengths, each update has tensors of other sizes, which fit badly into what the last one left. So
    the process would hold more with every update. What one update needs is known by the first one after all freed
    memory was given back.
    """

    def __init__(self) -> None:
        give_back()
        self.needed, self.was_given_back = 0, True

    def after_update(self) -> None:
        """Give freed memory back if the process holds far more than an update needs."""
        now = held()
        if self.was_given_back:
            self.needed = max(self.needed, now)
        self.was_given_back = now > GROWTH * self.needed
        if self.was_given_back:
            give_back()
