"""The stages of a run, in their order: the package's own, and those that other packages add."""

from __future__ import annotations

from crosstrace.core.errors import UserError
from crosstrace.core.registry import Registry
from crosstrace.experiment.stage import Stage
from crosstrace.experiment.stages.analyze import ANALYZE
from crosstrace.experiment.stages.intervene import INTERVENE
from crosstrace.experiment.stages.mechanism import MECHANISM
from crosstrace.experiment.stages.recall import EVAL
from crosstrace.experiment.stages.retain import RETAIN
from crosstrace.experiment.stages.trace import TRACE
from crosstrace.experiment.stages.train import TRAIN

OWN = (TRAIN, EVAL, TRACE, ANALYZE, INTERVENE, MECHANISM, RETAIN)
OF_RUN = ("data", "known", "report")  # stages and steps of the run as a whole
_ALL: Registry[Stage] = Registry(Stage, "crosstrace.experiment.registry:OWN")


def stages() -> dict[str, Stage]:
    """Every stage that is done for one model at a time, in their order.

    Raises:
        UserError: a stage of another package follows a stage that does not exist, or has a name that is taken.
    """
    ordered, waiting = [*OWN], [_ALL[name] for name in _ALL if _ALL[name] not in OWN]
    for stage in waiting:
        if {stage.name, *stage.steps} & {*OF_RUN}:
            raise UserError(f"the stage {stage.name} of a package has the name or a step of one of {', '.join(OF_RUN)}")
    while waiting:
        names = [other.name for other in ordered]
        stage = next((stage for stage in waiting if stage.after in names), None)
        if stage is None:
            lost = waiting[0]
            raise UserError(f"the stage {lost.name} is to follow {lost.after!r}; expected of {', '.join(names)}")
        position = names.index(stage.after) + 1
        while position < len(ordered) and ordered[position].after == stage.after and ordered[position] not in OWN:
            position += 1
        ordered.insert(position, stage)
        waiting.remove(stage)
    return {stage.name: stage for stage in ordered}


def stage_names() -> tuple[str, ...]:
    """The names of all stages, in their order. The first and the last are done once for the whole run."""
    return ("data", *stages(), "report")


def stage_of(step: str) -> str | None:
    """The stage that writes a step of the run folder; None if no stage does."""
    first = step.partition("/")[0]
    if first in OF_RUN:
        return "report" if first == "report" else "data"
    return next((stage.name for stage in stages().values() if first in stage.steps), None)
