"""Makes the runs of a study as jobs: one command a run, which submitit gives to a cluster, or which anyone may start.

A job is `crosstrace run` on a file of settings in STUDY/jobs, so it needs crosstrace and the study's folder where it
runs, and nothing else. It knows nothing of what a run measures.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

from crosstrace.core import left_out
from crosstrace.core.errors import UserError
from crosstrace.core.files import read_json, write_json, write_text
from crosstrace.core.progress import Progress
from crosstrace.experiment import config
from crosstrace.experiment.run_pool import POLL, MadeRun, how_it_ended, memory_of
from crosstrace.experiment.study_settings import Planned

ALIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "RESIZING", "SUSPENDED")
# Slurm may not know a job for some seconds after it was submitted, and forgets jobs after days.
NEW = 600  # seconds in which a job that Slurm does not know counts as alive


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


def make_executor(executor: str, parameters: Mapping[str, Any], logs: Path) -> Any:
    """What submits jobs.

    Args:
        executor: submitit's name of what starts the jobs: `slurm`, or `local` for processes of this machine.
        parameters: of submitit's jobs.
        logs: the folder of submitit's files.

    Raises:
        UserError: submitit is not installed, the executor is not there, or a parameter is none of its.
    """
    try:
        import submitit
    except ImportError:
        raise UserError(
            f"executor = {executor} needs submitit, which is not installed; run `pip install "
            "'crosstrace[submitit]'`, or print the commands with --list"
        ) from None
    usual = {"name": "crosstrace", "timeout_min": 24 * 60}
    try:
        made = submitit.AutoExecutor(folder=logs, cluster=executor)
        made.update_parameters(**(usual | dict(parameters)))
    except (RuntimeError, NameError, TypeError, ValueError, AssertionError) as error:
        raise UserError(
            f"executor = {executor}: submitit says: {str(error).strip().splitlines()[0]}; its parameters are called "
            "timeout_min, mem_gb, gpus_per_node, slurm_partition and so on"
        ) from None
    return made


class JobQueue:
    """Makes runs as jobs of submitit.

    Jobs of a cluster go on if this process ends. Made again, a queue waits for those that are still running, and does
    not start them twice.

    Args:
        folder: of the study.
        executor, parameters: as of `make_executor`.
        most: jobs at once at most; None: all of them.
        progress: is told of each run that failed.

    Attributes:
        failed: a sentence on each run that failed.

    Raises:
        UserError: as `make_executor`.
    """

    def __init__(
        self, folder: Path, executor: str, parameters: dict[str, Any], most: int | None, progress: Progress
    ) -> None:
        self.failed: list[str] = []
        self._folder, self._most, self._progress = folder, most, progress
        self._is_local = executor == "local"  # else jobs go on without this process
        self._logs = (folder / "jobs" / "logs").absolute()
        self._executor = make_executor(executor, parameters, self._logs)
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
                if self._is_local:
                    job.cancel()
            if self._running and not self._is_local:
                self._progress.note(
                    f"{len(self._running)} jobs go on without this process; the same command with --resume waits for "
                    "them"
                )

    def _start(self, planned: Planned) -> None:
        from submitit.core.utils import FailedJobError

        command = write_command(self._folder, planned)
        item = MadeRun(planned, home_of(self._folder, planned), None, time.time())
        note = self._folder / "jobs" / f"{planned.label}.json"
        log = (self._folder / "jobs" / f"{planned.label}.log").absolute()
        job = self._submitted_job(note)
        if job is None:
            # submitit hides the GPUs from jobs of this machine that ask for none
            gpus = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES")} if self._is_local else {}
            try:
                job = self._executor.submit(
                    run_command, command, str(log), gpus, os.getpid() if self._is_local else None
                )
            except FailedJobError as error:
                raise UserError(f"{planned.label} can't be submitted: {' '.join(str(error).split())}") from None
            write_json(note, {"job": job.job_id})
        self._running.append((item, job))

    def _submitted_job(self, note: Path) -> Any:
        """The job that an earlier process submitted for a run, unless it failed or is gone."""
        if self._is_local or not note.is_file():
            return None
        from submitit import SlurmJob

        job = SlurmJob(self._logs, read_json(note)["job"])
        if job.paths.result_pickle.is_file():
            return job if job.exception() is None else None
        state = str(job.watcher.get_state(job.job_id, mode="force")).upper()
        is_new = time.time() - note.stat().st_mtime < NEW
        return job if state.startswith(ALIVE) or (state == "UNKNOWN" and is_new) else None

    def _fail(self, why: str) -> None:
        self.failed.append(why)
        self._progress.note(why)


def run_command(
    command: Sequence[str], log: str, environment: Mapping[str, str | None] | None = None, leader: int | None = None
) -> int:
    """Run a command to its end; the most memory that it was seen to use, in bytes, with that of its workers.

    Args:
        log: the file that gets what the command writes.
        environment: variables that it gets; None: it does not have this one.
        leader: a process of this machine with whose end the command ends.

    Raises:
        RuntimeError: it failed; with the last line that it wrote.
    """
    changed = {**os.environ, **(environment or {})}
    variables = {name: value for name, value in changed.items() if value is not None}
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=variables)
    peak = 0
    try:
        while process.poll() is None:
            peak = max(peak, memory_of(process.pid))
            if leader is not None and not psutil.pid_exists(leader):
                raise RuntimeError("the study that started it has ended")
            time.sleep(POLL)
    finally:
        process.terminate()
        process.wait()
    if process.returncode in (0, left_out.EXIT_CODE):
        return peak
    lines = Path(log).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if process.returncode < 0 or not lines:  # (the last line of a process that was killed says nothing of that)
        raise RuntimeError(how_it_ended(process.returncode))
    raise RuntimeError(lines[-1].removeprefix("crosstrace: "))


def _sentence(error: BaseException) -> str:
    """Why a job failed: what `run_command` raised, or what submitit says that the cluster did."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" -")]
    raised = [line.removeprefix("RuntimeError: ") for line in lines if line.startswith("RuntimeError: ")]
    said = [line for line in lines if "state:" in line or "not requeued because" in line]
    return [*raised, *said, *lines[:1], type(error).__name__][0]
