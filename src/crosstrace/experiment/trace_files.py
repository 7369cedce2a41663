"""The trace files of a run: where they are, how to read them, and which ones `trace.keep` keeps in the end.

    traces/<strategy>/<when>/<task>.safetensors         a trace of each part of the data
    traces/<strategy>/means/<when>/<task>.safetensors   their means, in place of the parts once those are dropped

Selection, ablation and grafting give the same results from the means as from the parts, to the last bit. The intervals
of `analyze` need the parts. A step whose files were dropped stays complete. This module knows which files are kept, but
not which stages have read them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from crosstrace.core.errors import UserError
from crosstrace.core.files import replacing
from crosstrace.core.run_folder import Run
from crosstrace.data.tasks import Roles
from crosstrace.experiment.studied import LEARNING, WHENS
from crosstrace.trace import Trace, load_traces, save_traces

MEANS = "means"


def folder_of(folder: Path, when: str) -> Path:
    """The folder with the traces of one time, inside that of a strategy's traces: the means if they are there."""
    means = folder / MEANS / when
    return means if means.is_dir() else folder / when


def read_traces(
    folder: Path, when: str, measure: str, roles: Roles, reduction: str = "example", like: Any = None
) -> dict[str, list[Trace]]:
    """The parts of each task's trace at one time; only their mean if that alone was kept.

    The result is empty if a task of the shared set has no trace. For example, a strategy that never trains a task has
    no online trace of it, and so no online shared set.

    Args:
        folder: the folder of a strategy's traces.
        when: the time of the traces.
        measure: of the traces. (Summed traces have a measure of their own, which is taken for them.)
        like: as in `load_traces`.

    Raises:
        UserError: a file holds a trace of a task that the run does not have.
    """
    tasks: dict[str, list[Trace]] = {}
    measure = "net" if when == LEARNING["summed"] else measure
    for file in sorted(folder_of(folder, when).glob("*.safetensors")):
        for item in load_traces(file, like, measure=measure, reduction=reduction):
            if item.task not in roles.tasks:  # (the task's name would become a file's)
                known = " or ".join(roles.tasks)
                raise UserError(f"{file} holds a trace of {item.task!r}; expected {known}: was it edited?")
            tasks.setdefault(item.task, []).append(item)
    if len(roles.shared) < 2 or not {*roles.shared} <= {*tasks}:
        return {}
    tasks = {task: tasks[task] for task in roles.tasks if task in tasks}
    if len({len(parts) for parts in tasks.values()}) > 1:  # too few steps or people for all parts, so no intervals
        return {task: [Trace.combine(parts)] for task, parts in tasks.items()}
    return tasks


def has(run: Run, name: str) -> str:
    """What was kept of a strategy's traces: "parts", "means" or "none".

    Traces that were never taken count as parts. (`Run.inputs` raises an error if a stage needs them.)
    """
    if run.dropped(f"traces/{name}") is None:
        return "parts"
    return "means" if (run.path(f"traces/{name}") / MEANS).is_dir() else "none"


def need(run: Run, name: str, who: str, parts: bool = False) -> None:
    """Raise a `UserError` if the traces of a strategy that a stage needs were dropped.

    Args:
        who: the stage.
        parts: whether it needs the parts, not just the means.
    """
    kept = has(run, name)
    if kept == "none" or (kept == "means" and parts):
        raise UserError(f"{who} needs traces of {name} that are gone: {run.dropped(f'traces/{name}')}")


def keep_means(run: Run, name: str) -> None:
    """Replace the parts of a strategy's traces by their means, one time after the other.

    If the process is killed, the parts or the means of each time are there.
    """
    home = run.path(f"traces/{name}")
    for when in (when for when in WHENS if (home / when).is_dir()):
        if not (home / MEANS / when).is_dir():
            with replacing(home / MEANS / when) as partial:
                for file in sorted((home / when).rglob("*.safetensors")):
                    if file.parent.suffix != ".safetensors":  # (a folder with that suffix is a single trace in pieces)
                        _write_means(file, partial / file.relative_to(home / when))
        run.drop(f"traces/{name}", [when], _why_removed(MEANS), added=[MEANS])
        _drop_second_names(run, name, MEANS)  # now, since the disk is not free before
    _drop_second_names(run, name, MEANS)  # (an earlier call may have been killed before it did)


def keep_none(run: Run, name: str) -> None:
    """Remove all of a strategy's traces."""
    run.drop(f"traces/{name}", [MEANS, *WHENS], _why_removed("none"))
    _drop_second_names(run, name, "none")


def _write_means(source: Path, target: Path) -> None:
    """Write the means of the traces in a file, each over its parts, in their order."""
    parts: dict[tuple[str, str], list[Trace]] = {}
    for item in load_traces(source):
        parts.setdefault((item.measure, item.reduction), []).append(item)
    save_traces(target, [Trace.combine(traces) for traces in parts.values()])


def _drop_second_names(run: Run, name: str, keep: str) -> None:
    """Remove the traces during training from the taught model's folder, where the same files have a second name."""
    whens = [when for when in LEARNING.values() if (run.path(f"models/{name}") / when).is_dir()]
    if whens:
        run.drop(f"models/{name}", whens, _why_removed(keep))


def _why_removed(keep: str) -> str:
    """Why the traces are gone, and how to have them: for errors."""
    what = "the traces of its parts were" if keep == MEANS else "they were"
    return (
        f"{what} removed when the stages had read them, since trace.keep was {keep}; give the run another folder and "
        "trace.keep: parts"
    )
