"""Makes the runs of a study as jobs: one command a run, which submitit gives to a cluster, or which anyone may start.

A job is `crosstrace run` on a file of settings in STUDY/jobs, so it needs crosstrace and the study's folder where it
runs, and nothing else. It knows nothing of what a run measures.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import yaml

from crosstrace.core.errors import UserError
from crosstrace.core.files import read_json, write_json, write_text
from crosstrace.core.progress import Progress
from crosstrace.experiment import config
from crosstrace.experiment.run_pool import POLL, MadeRun, memory_of
from crosstrace.experiment.study_settings import Planned

LEFT_OUT = 3  # exit code of `crosstrace run` if parts of the run were left out; the others are there
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "UNKNOWN", "FINISHED")


def home_of(folder: Path, planned: Planned) -> Path:
    """The folder of a run."""
    return folder / "runs" / planned.label


def write_command(folder: Path, planned: Planned) -> list[str]:
    """Write a run's settings to STUDY/jobs; the words of the command that makes the run, or goes on with it."""
    path = (folder / "jobs" / f"{planned.label}.yaml").absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    home = home_of(folder, planned).absolute()
    home.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, yaml.safe_dump(config.plain(planned.experiment), sort_keys=False, allow_unicode=True))
    return [sys.executable, "-m", "crosstrace", "run", str(path), str(home), "--resume", "--quiet"]


class JobQueue:
    """Makes runs as jobs of submitit.

    Jobs of a cluster go on if this process ends. Made again, a queue waits for those that are still running, and does
    not start them twice.

    Args:
        folder: of the study.
        executor: submitit's name of what starts the jobs: `slurm`, or `local` for processes of this machine.
        parameters: of submitit's jobs.
        most: jobs at once at most; None: all of them.
        progress: is told of each run that failed.

    Attributes:
        failed: a sentence on each run that failed.

    Raises:
        UserError: submitit is not installed, the executor is not there, or a parameter is none of its.
    """

    def __init__(
        self, folder: Path, executor: str, parameters: dict[str, Any], most: int | None, progress: Progress
    ) -> None:
        try:
            import submitit
        except ImportError:
            raise UserError(
                f"executor = {executor} needs submitit, which is not installed; run `pip install "
                "'crosstrace[submitit]'`, or print the commands with --list"
            ) from None
        self.failed: list[str] = []
        self._folder, self._most, self._progress = folder, most, progress
        self._stays = executor != "local"  # whether jobs go on without this process
        self._logs = (folder / "jobs" / "logs").absolute()
        try:
            self._executor = submitit.AutoExecutor(folder=self._logs, cluster=executor)
            self._executor.update_parameters(**({"name": "crosstrace", "timeout_min": 24 * 60} | parameters))
        except (RuntimeError, NameError, TypeError, ValueError, AssertionError) as error:
            raise UserError(f"executor = {executor}: submitit says: {str(error).strip().splitlines()[0]}") from None
        self._running: list[tuple[MadeRun, Any]] = []

    def make(self, runs: Sequence[Planned]) -> Generator[MadeRun]:
        """Make runs; gives each that succeeded, as soon as it has ended."""
        waiting = [*runs]
        try:
            while waiting or self._running:
                while waiting and (self._most is None or len(self._running) < self._most):
                    self._start(waiting.pop(0))
                time.sleep(POLL)
                for item, job in [pair for pair in self._running if pair[1].done()]:
                    self._running.remove((item, job))
                    error = job.exception()
                    if error is None:
                        item.peak = int(job.result())
                        yield item
                    else:
                        self._fail(f"{item.planned.label}: {_sentence(error)}")
        finally:
            for _, job in self._running:
                if not self._stays:
                    job.cancel()
            if self._running and self._stays:
                self._progress.note(
                    f"{len(self._running)} jobs go on without this process; the same command with --resume waits for "
                    "them"
                )

    def _start(self, planned: Planned) -> None:
        command = write_command(self._folder, planned)
        item = MadeRun(planned, home_of(self._folder, planned), None, time.time())
        note = self._folder / "jobs" / f"{planned.label}.json"
        job = self._job_of(note)
        if job is None:
            job = self._executor.submit(run_command, command)
            write_json(note, {"job": job.job_id})
        self._running.append((item, job))

    def _job_of(self, note: Path) -> Any:
        """The job that an earlier process has submitted for a run, if it is still running or waiting."""
        if not self._stays or not note.is_file():
            return None
        from submitit import SlurmJob

        job = SlurmJob(self._logs, read_json(note)["job"])
        state = str(job.watcher.get_state(job.job_id, mode="force")).upper()
        return None if state.startswith(ENDED) else job

    def _fail(self, why: str) -> None:
        self.failed.append(why)
        self._progress.note(why)


def run_command(command: Sequence[str]) -> int:
    """Run a command to its end; the most memory that it was seen to use, in bytes, with that of its workers.

    Raises:
        RuntimeError: it failed; with the last line that it wrote.
    """
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        peak = 0
        try:
            while process.poll() is None:
                peak = max(peak, memory_of(process.pid))
                time.sleep(POLL)
        finally:
            process.terminate()
        assert process.stderr is not None
        lines = process.stderr.read().strip().splitlines()
    if process.returncode not in (0, LEFT_OUT):
        reason = lines[-1].removeprefix("crosstrace: ") if lines else f"exit code {process.returncode}"
        raise RuntimeError(reason)
    return peak


def _sentence(error: BaseException) -> str:
    """Why a job failed: what `run_command` raised, or the first line of what submitit says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" -")]
    raised = [line.removeprefix("RuntimeError: ") for line in lines if line.startswith("RuntimeError: ")]
    return [*raised, *lines[:1], type(error).__name__][0]
