"""When a run's trace files may go, and when they must be taken again: `trace.keep`."""

from __future__ import annotations

from typing import Any

from crosstrace.experiment import trace_files
from crosstrace.experiment.stages.analyze import is_analysed
from crosstrace.experiment.stages.intervene import intervention_key
from crosstrace.experiment.studied import StudiedModel


def drop_traces(studied: StudiedModel) -> None:
    """Remove the trace files that `trace.keep` does not keep, once the stages that read them are done.

    The parts are read by `analyze`; the means would do for `intervene`.
    """
    run, name, keep = studied.run, studied.name, studied.experiment.trace.keep
    if keep == "parts" or not run.is_there(f"traces/{name}") or not is_analysed(studied):
        return
    if keep == "means" and trace_files.has(run, name) != "none":
        trace_files.keep_means(run, name)
    elif keep == "none" and not _awaits_interventions(studied):
        trace_files.keep_none(run, name)


def _awaits_interventions(studied: StudiedModel) -> bool:
    step, key = f"interventions/{studied.name}.json", intervention_key(studied)
    return studied.experiment.interventions.run and not studied.run.complete(step, key)


def take_again(studied: StudiedModel, key: Any) -> None:
    """Have traces that were dropped taken again if a stage that needs them must be done again. Those during training
    can't be taken again without it."""
    run, name = studied.run, studied.name
    there, trained = trace_files.has(run, name), studied.experiment.trace.online and studied.is_trained
    if there == "parts" or trained or not run.complete(f"traces/{name}", key):
        return
    lacking = not is_analysed(studied)
    if lacking or (there == "none" and _awaits_interventions(studied)):
        run.forget(f"traces/{name}")
