"""The trace files of a run: where they are, reading them, and which stay when the stages have read them (`trace.keep`).

    traces/<strategy>/<when>/<task>.safetensors         a trace of each part of the data
    traces/<strategy>/means/<when>/<task>.safetensors   their means, in place of the parts once those are dropped

Selection, ablation and grafting give the same from the means as from the parts, to the last bit; the intervals of
`analyze` need the parts. A step whose files were dropped stays finished. This module knows which files stay; it does
not know which stages have read them.
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


def place_of(folder: Path, when: str) -> Path:
    """Where the traces of one time are, in the folder of a strategy's traces: the parts, or the means."""
    means = folder / MEANS / when
    return means if means.is_dir() else folder / when


def read_traces(
    folder: Path, when: str, measure: str, roles: Roles, reduction: str = "example", like: Any = None
) -> dict[str, list[Trace]]:
    """task -> the parts of its trace at one time, or its mean where that alone was kept; `like` as in `load_traces`.

    Empty if a task of the shared set has none: of a strategy that never trains a task there is no online trace of it,
    so nothing online to share. The summed trace has a measure of its own.
    """
    tasks: dict[str, list[Trace]] = {}
    measure = "net" if when == LEARNING["summed"] else measure
    for file in sorted(place_of(folder, when).glob("*.safetensors")):
        for item in load_traces(file, like, measure=measure, reduction=reduction):
            if item.task not in roles.tasks:  # it would name files
                known = " or ".join(roles.tasks)
                raise UserError(f"{file} holds a trace of {item.task!r}; expected {known}: was it edited?")
            tasks.setdefault(item.task, []).append(item)
    if len(roles.shared) < 2 or not {*roles.shared} <= {*tasks}:
        return {}
    tasks = {task: tasks[task] for task in roles.tasks if task in tasks}
    if len({len(parts) for parts in tasks.values()}) > 1:  # too few steps or people for all parts: no intervals
        return {task: [Trace.combine(parts)] for task, parts in tasks.items()}
    return tasks


def has(run: Run, name: str) -> str:
    """What is there of a strategy's traces: "parts", "means" or "none".

    Traces that were never taken count as parts: whoever needs them is told so by `Run.inputs`.
    """
    if run.dropped(f"traces/{name}") is None:
        return "parts"
    return "means" if (run.path(f"traces/{name}") / MEANS).is_dir() else "none"


def need(run: Run, name: str, who: str, parts: bool = False) -> None:
    """Raise a `UserError` if the traces that `who` reads of a strategy were dropped.

    Args:
        parts: whether the means are not enough.
    """
    there = has(run, name)
    if there == "none" or (there == "means" and parts):
        raise UserError(f"{who} needs traces of {name} that are gone: {run.dropped(f'traces/{name}')}")


def keep_means(run: Run, name: str) -> None:
    """Put the means in the place of a strategy's traces, those of one time after the other. A kill leaves of each the
    parts or the means, never neither."""
    home = run.path(f"traces/{name}")
    for when in (when for when in WHENS if (home / when).is_dir()):
        if not (home / MEANS / when).is_dir():
            with replacing(home / MEANS / when) as partial:
                for file in sorted((home / when).rglob("*.safetensors")):
                    if file.parent.suffix != ".safetensors":  # (a folder of that name is one trace file in pieces)
                        _write_means(file, partial / file.relative_to(home / when))
        run.drop(f"traces/{name}", [when], _told(MEANS), added=[MEANS])
        _drop_second_names(run, name, MEANS)  # at once: until then the disk is not free
    _drop_second_names(run, name, MEANS)  # an earlier call may have been killed before it


def keep_none(run: Run, name: str) -> None:
    """Remove all of a strategy's traces."""
    run.drop(f"traces/{name}", [MEANS, *WHENS], _told("none"))
    _drop_second_names(run, name, "none")


def _write_means(source: Path, target: Path) -> None:
    """One file's traces, each the mean over its parts, in their order."""
    parts: dict[tuple[str, str], list[Trace]] = {}
    for item in load_traces(source):
        parts.setdefault((item.measure, item.reduction), []).append(item)
    save_traces(target, [Trace.combine(of_all) for of_all in parts.values()])


def _drop_second_names(run: Run, name: str, keep: str) -> None:
    """The traces during training lie in the taught model's folder too: the same files, so none is gone before this."""
    there = [when for when in LEARNING.values() if (run.path(f"models/{name}") / when).is_dir()]
    if there:
        run.drop(f"models/{name}", there, _told(keep))


def _told(keep: str) -> str:
    what = "the traces of its parts were" if keep == MEANS else "they were"
    return (
        f"{what} removed when the stages had read them, since trace.keep was {keep}; give the run another folder and "
        "trace.keep: parts"
    )
