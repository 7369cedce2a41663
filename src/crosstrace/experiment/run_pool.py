"""Makes the runs of a study, each in a process of its own, several at once within a budget of cores and memory."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from crosstrace.core import interrupts
from crosstrace.core.errors import UserError
from crosstrace.core.files import write_text
from crosstrace.core.parents import start_worker
from crosstrace.core.progress import Progress
from crosstrace.experiment.config import Experiment
from crosstrace.experiment.study_settings import Planned

GIB = 2**30
POLL = 0.2  # seconds between looks at the running processes


def width(planned: Planned) -> int:
    """Cores that a run uses."""
    return planned.experiment.jobs * planned.experiment.threads


@dataclass
class MadeRun:
    """A run that a process of its own is making, or has made.

    Attributes:
        home: the run's folder.
        began: when its process was started, as `time.time` gives it.
        peak: the most memory that was seen, in bytes, with that of its workers.
    """

    planned: Planned
    home: Path
    process: Any
    began: float
    peak: int = 0


class RunPool:
    """Makes runs in processes of their own, as many at once as a budget allows.

    Args:
        folder: each run is made in folder/<setting>/<seed>.
        cores: that all runs may use together.
        memory: bytes that all may use together; None: as many as there are.
        expected: bytes that a run is known to need. While it is 0, the first run is made alone if `memory` is given.
        progress: is told of each run that failed.

    Attributes:
        failed: a sentence on each run that failed.
    """

    def __init__(self, folder: Path, cores: int, memory: float | None, expected: int, progress: Progress) -> None:
        self.failed: list[str] = []
        self._folder, self._cores, self._memory, self._expected = folder, cores, memory, expected
        self._progress, self._context = progress, get_context("spawn")
        self._waiting: list[Planned] = []
        self._running: list[MadeRun] = []
        self._peaks: dict[str, int] = {}  # of runs that were stopped and go on later

    def make(self, runs: Sequence[Planned]) -> Generator[MadeRun]:
        """Make runs; gives each that succeeded, as soon as it has ended. Closing the iterator ends all processes."""
        self._waiting = [*runs]
        try:
            while self._waiting or self._running:
                while self._waiting and self._has_room(self._waiting[0]):
                    self._start(self._waiting.pop(0))
                time.sleep(POLL)
                used = self._note_memory()
                if self._memory is not None and used > self._memory:
                    self._stop_last()
                    continue
                for item in [item for item in self._running if not item.process.is_alive()]:
                    self._running.remove(item)
                    self._expected = max(self._expected, item.peak)
                    if item.process.exitcode:
                        self._fail(f"{item.planned.label}: {_why(item.home, item.process.exitcode)}")
                    else:
                        yield item
        finally:
            for item in self._running:
                item.process.terminate()
            for item in self._running:
                item.process.join()

    def _has_room(self, planned: Planned) -> bool:
        """Whether a run may be started beside those that are running. A run alone always may."""
        if not self._running:
            return True
        if sum(width(item.planned) for item in self._running) + width(planned) > self._cores:
            return False
        if self._memory is None:
            return True
        needed = sum(max(item.peak, self._expected) for item in self._running) + self._expected
        return self._expected > 0 and needed <= self._memory

    def _start(self, planned: Planned) -> None:
        home = self._folder / planned.label
        process = self._context.Process(target=_work, args=(home, planned.experiment, os.getpid()))
        with interrupts.held_back():
            process.start()
            peak = self._peaks.get(planned.label, 0)
            self._running.append(MadeRun(planned, home, process, time.time(), peak))

    def _note_memory(self) -> int:
        """Note how much memory each run uses; gives the bytes of all together."""
        total = 0
        for item in self._running:
            used = memory_of(item.process.pid)
            item.peak = max(item.peak, used)
            total += used
        return total

    def _stop_last(self) -> None:
        """Stop the run that was started last. Its finished steps stay, and it goes on when there is room."""
        last = self._running.pop()
        last.process.terminate()
        last.process.join()
        self._expected = max([self._expected, last.peak, *(item.peak for item in self._running)])
        self._peaks[last.planned.label] = last.peak
        if self._running:
            self._waiting.insert(0, last.planned)
        else:
            assert self._memory is not None
            self._fail(
                f"{last.planned.label}: it alone uses {last.peak / GIB:.1f} GiB, but the study's budget (memory) is "
                f"{self._memory / GIB:g} GiB; give it more, or set experiment.jobs: 1"
            )

    def _fail(self, why: str) -> None:
        self.failed.append(why)
        self._progress.note(why)


def _work(home: Path, experiment: Experiment, leader: int) -> None:
    """Make one run in this process, which ends with the process `leader`."""
    from crosstrace.experiment import pipeline

    start_worker(leader)
    home.parent.mkdir(parents=True, exist_ok=True)
    problem = home.with_name(f"{home.name}.failed")
    problem.unlink(missing_ok=True)
    try:
        pipeline.run(experiment, home, "resume", quiet=True)
    except UserError as error:
        write_text(problem, str(error))
        raise SystemExit(2) from None
    except BaseException as error:
        write_text(problem, f"{type(error).__name__}: {error}")
        raise


def _why(home: Path, code: int) -> str:
    """Why a run failed: the sentence that it left, or what its exit code says."""
    problem = home.with_name(f"{home.name}.failed")
    if problem.is_file():
        return problem.read_text(encoding="utf-8").strip()
    return how_it_ended(code)


def how_it_ended(code: int) -> str:
    """What the exit code of a failed process says."""
    if code < 0:
        return f"its process was ended by {signal.Signals(-code).name}; out of memory?"
    return f"its process ended with exit code {code}"


def memory_of(pid: int | None) -> int:
    """Resident bytes of a process and all its descendants."""
    import psutil

    total = 0
    try:
        leader = psutil.Process(pid)
        for process in [leader, *leader.children(recursive=True)]:
            try:
                total += process.memory_info().rss
            except psutil.Error:
                continue
    except psutil.Error:
        return 0
    return total
