"""When a run's trace files may go, and when they must be taken again: `trace.keep`."""

from __future__ import annotations

from typing import Any

from crosstrace.experiment import trace_files
from crosstrace.experiment.stages.analyze import is_analysed
from crosstrace.experiment.stages.intervene import intervention_key
from crosstrace.experiment.studied import StudiedModel


def drop_traces(studied: StudiedModel) -> None:
    """Remove the trace files that `trace.keep` does not keep, once the stages that read them are done.

    `analyze` reads each part's trace. For `intervene` the means are enough.
    """
    run, name, keep = studied.run, studied.name, studied.experiment.trace.keep
    if keep == "parts" or not run.is_there(f"traces/{name}") or not is_analysed(studied):
        return
    if keep == "means" and trace_files.has(run, name) != "none":
        trace_files.keep_means(run, name)
    elif keep == "none" and not _awaits_interventions(studied):
        trace_files.keep_none(run, name)


def _awaits_interventions(studied: StudiedModel) -> bool:
    """Whether the interventions are wanted and not yet complete."""
    step, key = f"interventions/{studied.name}.json", intervention_key(studied)
    return studied.experiment.interventions.run and not studied.run.complete(step, key)


def take_again(studied: StudiedModel, key: Any) -> None:
    """Mark dropped traces to be taken again, if a stage that needs them must be done again.

    Traces during training are not marked: taking them again would need the training.
    """
    run, name = studied.run, studied.name
    kept, has_online = trace_files.has(run, name), studied.experiment.trace.online and studied.is_trained
    if kept == "parts" or has_online or not run.complete(f"traces/{name}", key):
        return
    lacking = not is_analysed(studied)
    if lacking or (kept == "none" and _awaits_interventions(studied)):
        run.forget(f"traces/{name}")
