"""The whole experiment on one page: teach, test, trace, share, intervene, report.

Data flows one way through a run folder. Each stage (`stages/`) reads what earlier ones saved and writes its outputs.
So a killed run goes on where it stopped, and every stage can be run again alone.

If a launcher started several processes, all of them run this side by side. They share out the stages that train, ask
and trace, and wait while the first does the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from crosstrace.core import machine
from crosstrace.core.errors import UserError
from crosstrace.core.files import write_json
from crosstrace.core.left_out import Part, attempt
from crosstrace.core.processes import Processes, by_first
from crosstrace.core.progress import Progress
from crosstrace.core.provenance import metadata
from crosstrace.core.run_folder import Run
from crosstrace.experiment import config
from crosstrace.experiment.checks import check, check_outside, check_place
from crosstrace.experiment.conclude import conclude, parts_left_out
from crosstrace.experiment.config import Experiment
from crosstrace.experiment.registry import stage_names
from crosstrace.experiment.reporting import make_report
from crosstrace.experiment.stages.data import make_data
from crosstrace.experiment.stages.known import find_known
from crosstrace.experiment.studied import trains_in_bf16
from crosstrace.experiment.workers import do_stages
from crosstrace.results.results import Results


def run(
    experiment: Experiment,
    folder: Path,
    mode: str = "new",
    *,
    stages: Sequence[str] | None = None,
    quiet: bool = False,
    processes: Processes | None = None,
) -> Results:
    """Run an experiment in `folder` and return its results.

    If a part of an analysis fails, the rest goes on without it. `results.left_out` says which part and why, and the
    next attempt tries it again. A failure in training, recall or the trace stops the run.

    Args:
        experiment: all settings.
        folder: the run folder.
        mode: `new` (an existing run is an error), `resume` or `overwrite`.
        stages: which of `registry.stage_names()` to run, all if not given. Earlier stages must have been run in the
            same folder. Without the stage `report`, the results hold nothing but `left_out`.
        quiet: no progress on stderr.
        processes: all processes that a launcher started. Each of them calls this with the same arguments.

    Raises:
        UserError: bad settings, a folder that holds another run, or a stage whose inputs are missing.
    """
    known = stage_names()
    stages = known if stages is None else stages
    unknown = [stage for stage in stages if stage not in known]
    if mode not in ("new", "resume", "overwrite") or unknown or isinstance(stages, str):
        raise UserError(
            f"mode is {mode!r} and stages are {stages!r}; expected mode new, resume or overwrite, and a list of "
            f"{', '.join(known)}"
        )
    if processes is not None:
        check_place(experiment, processes)
    if mode == "overwrite":
        check_outside(experiment, folder)
    by_first(processes, lambda: check(experiment, whole=mode != "resume", stages=stages))
    text = config.dumps(experiment)
    with machine.same_threads_after(), Run.together(folder, text, mode, processes) as opened:  # type: ignore[arg-type]
        info = {"precision": "bf16" if trains_in_bf16(experiment) else "float32", "threads": experiment.threads}
        info["processes"] = 1 if processes is None else processes.size
        opened.alone(lambda: write_json(opened.folder / "metadata.json", metadata() | info))
        progress = Progress(quiet or not opened.leads)
        if "data" in stages:
            opened.alone(lambda: make_data(opened, experiment))
            find_known(opened, experiment, progress)
            seconds = opened.seconds()
            progress.done("data", sum(seconds[step] for step in ("data", "known") if step in seconds))
        do_stages(opened, experiment, stages, progress)
        if "report" not in stages:
            return Results(
                left_out=[part for part in opened.alone(lambda: parts_left_out(opened)) if part.stage in stages]
            )
        results = opened.alone(lambda: _write_results(opened, experiment, progress))
        progress.done("report", opened.seconds().get("report"))
        return results


def _write_results(run: Run, experiment: Experiment, progress: Progress) -> Results:
    """Gather the results and draw the report."""
    results = conclude(run, experiment, progress)
    page = Part("report", makes=("report",))
    attempt(run, page, lambda: make_report(run, results, progress), progress.note)
    if parts_left_out(run) != results.left_out:  # a section could not be drawn
        results = conclude(run, experiment, Progress(quiet=True))
    return results
