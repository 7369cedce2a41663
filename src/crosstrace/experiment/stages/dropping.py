"""When a run's trace files may go, and when they must be taken again: `trace.keep`."""

from __future__ import annotations

from typing import Any

from crosstrace.experiment import trace_files
from crosstrace.experiment.needs.files import TRACES, Files
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


def disk(files: Files) -> None:
    """What `trace.keep` leaves of the traces. The means of each time are written before its parts are removed."""
    sizes, options = files.sizes, files.sizes.experiment.trace
    if options.keep == "means":
        online = sizes.online if sizes.phases(files.name) else 0.0
        for parts in (online, files.kept[TRACES] - online):
            means = parts / options.parts
            files.moment("the means of the traces", {TRACES: means})
            files.kept[TRACES] += means - parts
    elif options.keep == "none":
        files.kept[TRACES] = 0.0


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
