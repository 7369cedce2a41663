"""When a run's trace files may go, and when they must be taken again: `trace.keep`."""

from __future__ import annotations

from typing import Any

from crosstrace.core.run_folder import Run
from crosstrace.experiment import trace_files
from crosstrace.experiment.config import Experiment
from crosstrace.experiment.stages.analyze import is_analysed
from crosstrace.experiment.stages.intervene import intervention_key


def drop_traces(run: Run, experiment: Experiment, name: str) -> None:
    """Remove the trace files that `trace.keep` does not keep, once the stages that read them are done.

    The parts are read by `analyze`; the means would do for `intervene`.
    """
    keep = experiment.trace.keep
    if keep == "parts" or not run.is_there(f"traces/{name}") or not is_analysed(run, experiment, name):
        return
    if keep == "means" and trace_files.has(run, name) != "none":
        trace_files.keep_means(run, name)
    elif keep == "none" and not _awaits_interventions(run, experiment, name):
        trace_files.keep_none(run, name)


def _awaits_interventions(run: Run, experiment: Experiment, name: str) -> bool:
    step, key = f"interventions/{name}.json", intervention_key(run, experiment, name)
    return experiment.interventions.run and not run.complete(step, key)


def take_again(run: Run, experiment: Experiment, name: str, key: Any) -> None:
    """Have traces that were dropped taken again if a stage that needs them must be done again. Those during training
    can't be taken again without it."""
    there, trained = trace_files.has(run, name), experiment.trace.online and name in experiment.strategies
    if there == "parts" or trained or not run.complete(f"traces/{name}", key):
        return
    lacking = not is_analysed(run, experiment, name)
    if lacking or (there == "none" and _awaits_interventions(run, experiment, name)):
        run.forget(f"traces/{name}")
