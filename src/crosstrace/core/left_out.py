"""Parts that a run can do without. If one fails, that is reported and recorded, and all that does not need it goes on.

Training, recall and the trace are no such parts: a failure in them stops the run. So does a failure that is no fault of
the part: an interruption, no memory, a file that can't be read or written. The records are in RUN/manifest/left_out,
one for each part, with the traceback; results.json lists them under `left_out`. A part with a record is not done. So
the next attempt tries it again, and removes the record if the part succeeds.

It knows nothing of what the parts do.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from textwrap import shorten
from typing import Any, Protocol
from urllib.parse import quote

import torch
from safetensors import SafetensorError

from crosstrace.core.errors import UserError
from crosstrace.core.files import read_json, write_json
from crosstrace.core.processes import FailedElsewhere, Processes, is_lost
from crosstrace.core.run_folder import MissingStep, Run

Row = dict[str, Any]
EXIT_CODE = 3  # of a command whose run lacks some parts; all others are there


@dataclass(frozen=True)
class Part:
    """A part that a run can do without.

    Attributes:
        stage: the name of its stage.
        model: the name of its model; empty for all models.
        makes: the steps that it makes, which are missing without it.
        name: the name of a part of the stage; empty for all of the stage.
    """

    stage: str
    model: str = ""
    makes: tuple[str, ...] = ()
    name: str = ""

    def __str__(self) -> str:
        return part_name(self.stage, self.name, self.model)


def part_name(stage: str, part: str, model: str) -> str:
    """A part in words, e.g. "mixed: mechanism, lens"."""
    name = f"{stage}, {part}" if part else stage
    return f"{model}: {name}" if model else name


@dataclass(frozen=True)
class Failure:
    """Why a part is not there.

    Attributes:
        error: the exception's type.
        reason: one line: the sentence of a `UserError`, or the type and message of another exception.
        traceback: where it was raised.
    """

    error: str
    reason: str
    traceback: str = ""


def attempt(run: Run, part: Part, work: Callable[[], object], tell: Callable[[str], object]) -> bool:
    """Do a part's work; if it fails, tell and record why the part is left out. Returns whether it succeeded.

    Processes that work on the run side by side all call this. If the work fails in all of them, they go on together.
    """
    failure = hindrance(work, partial(steps, run))
    if run.processes is not None:
        failure = _agreed(run.processes, part, failure)
    if failure is None:
        run.alone(lambda: _file(run, part).unlink(missing_ok=True))
        return True
    record(run, part, failure)
    tell(f"{part} is left out: {failure.reason}")
    return False


def _agreed(processes: Processes, part: Part, failure: Failure | None) -> Failure | None:
    """Why a part failed in any of the processes; None if it failed in none.

    It may have failed in one process while another, amid the part, waits for that one.
    """
    try:
        failures = [each for each in processes.agreed(failure) if each is not None]
    except RuntimeError:
        if failure is None:
            raise
        raise RuntimeError(f"{part} failed in this process and not in all: {failure.traceback}") from None
    causes = [each for each in failures if each.error != FailedElsewhere.__name__]
    return next(iter(causes or failures), None)


def hindrance(work: Callable[[], object], absent: Callable[[], Sequence[str]] = tuple) -> Failure | None:
    """Do some work and return why it failed, or None. An exception that must stop the run is raised.

    Args:
        absent: gives the steps that are left out, which the work may need.
    """
    try:
        work()
    except Exception as error:
        if isinstance(error, MissingStep) and error.step in absent():
            return Failure("UserError", f"it needs {error.step}, which is left out")
        if stops_a_run(error):
            raise
        return failure_of(error)
    return None


def stops_a_run(error: Exception) -> bool:
    """Whether an exception must stop the run, as it is no fault of the part that raised it."""
    if isinstance(error, FailedElsewhere):
        return False
    if isinstance(error, OSError):
        return error.errno is not None  # Python's own errors, e.g. for a source that it can't find, have none
    if isinstance(error, (MissingStep, MemoryError, torch.OutOfMemoryError, SafetensorError)) or is_lost(error):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def failure_of(error: Exception) -> Failure:
    """The record of an exception."""
    name = type(error).__name__
    message = shorten(" ".join(str(error).split()), 400, placeholder=" …")
    reason = message if isinstance(error, UserError) and message else f"{name}: {message}".rstrip(": ")
    return Failure(name, reason, "".join(traceback.format_exception(error)))


class Studied(Protocol):
    """One model of a run, as a stage gets it."""

    run: Run
    name: str
    progress: Any


def optional(stage: str, *makes: str, name: str = "") -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a stage's function of one model: the run can do without what it makes.

    Args:
        makes: the steps that it makes, with {} in place of the model's name.
        name: as of `Part`.
    """

    def decorate(fn: Callable[..., None]) -> Callable[..., None]:
        @wraps(fn)
        def tried(studied: Studied) -> None:
            part = Part(stage, studied.name, tuple(step.format(studied.name) for step in makes), name)
            attempt(studied.run, part, partial(fn, studied), studied.progress.note)

        return tried

    return decorate


def record(run: Run, part: Part, failure: Failure) -> None:
    """Keep why a part is left out."""
    row = {"stage": part.stage, "part": part.name, "model": part.model, "error": failure.error}
    row |= {"reason": failure.reason, "steps": part.makes, "traceback": failure.traceback}
    run.alone(lambda: write_json(_file(run, part), row))


def forget(run: Run, part: Part) -> None:
    """Remove a part's record, as the part is there now."""
    _file(run, part).unlink(missing_ok=True)


def rows(run: Run) -> list[Row]:
    """All parts that are left out, as results.json lists them: stage, part, model, error, reason."""
    return [{name: row[name] for name in ("stage", "part", "model", "error", "reason")} for row in _records(run)]


def steps(run: Run) -> list[str]:
    """All steps that are left out."""
    return [step for row in _records(run) for step in row["steps"]]


def _file(run: Run, part: Part) -> Path:
    name = quote("+".join((part.stage, part.name, part.model)), safe="+")
    return run.folder / "manifest" / "left_out" / f"{name}.json"


def _records(run: Run) -> list[Row]:
    return [read_json(file) for file in sorted((run.folder / "manifest" / "left_out").glob("[!.]*.json"))]
