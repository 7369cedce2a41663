"""Chains of work for several worker processes, shared out so that no worker waits while there is work to do.

A chain is groups of works, one group after the other; the works of a group may be done at the same time. If there is a
choice, a worker takes the chain that has the most groups left, and stays with the chain whose model it has read. This
module does not know what the works do.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from typing import Any

from crosstrace.core import interrupts

Groups = Sequence[Sequence[Any]]  # of works


def done_by(
    workers: int,
    chains: Mapping[str, Groups],
    work: Callable[..., Any],
    *arguments: object,
    initializer: Callable[..., None],
    initargs: tuple[object, ...] = (),
) -> Generator[tuple[Any, Any], None, None]:
    """Do all works, and yield each with its result as soon as it is done. If one fails, all workers end.

    Each worker is a process: threads would share the interpreter, and results must not depend on how many run at once.

    Args:
        workers: processes.
        chains: by name, the groups of works.
        work: called in a worker as work(*arguments, number of the worker, work).
        initializer: called first in every worker, with `initargs`.
    """
    left = {name: [[*group] for group in groups if group] for name, groups in chains.items()}
    total = sum(len(group) for groups in left.values() for group in groups)
    pools = [
        ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=initializer, initargs=initargs)
        for _ in range(min(workers, total))
    ]
    running: dict[Future[Any], tuple[int, str, Any]] = {}
    before: list[str | None] = [None] * len(pools)  # the chain that each worker had last
    try:
        while any(left.values()) or running:
            with interrupts.held_back():  # processes start here
                busy = {number for number, _, _ in running.values()}
                for number in (number for number in range(len(pools)) if number not in busy):
                    name = _next(left, [name for _, name, _ in running.values()], before[number])
                    if name is not None:
                        item = left[name][0].pop(0)
                        before[number] = name
                        running[pools[number].submit(work, *arguments, number, item)] = number, name, item
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                _, name, item = running.pop(future)
                result = future.result()
                if not left[name][0] and name not in [other for _, other, _ in running.values()]:
                    left[name].pop(0)
                yield item, result
    except BaseException:
        for pool in pools:
            for worker in list((pool._processes or {}).values()):  # or the pool would wait for its work
                worker.terminate()
        raise
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)


def _next(left: Mapping[str, list[list[Any]]], running: Sequence[str], before: str | None) -> str | None:
    """The chain that a free worker takes, of those with work that may begin now; None if there is none.

    It is the one with the most groups left; if several have as many, the one the worker had before, then the one with
    the fewest workers.
    """
    ready = [name for name, groups in left.items() if groups and groups[0]]
    return min(ready, key=lambda name: (-len(left[name]), name != before, running.count(name)), default=None)
