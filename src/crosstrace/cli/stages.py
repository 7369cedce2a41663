"""The commands that do one stage of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from crosstrace.cli.experiments import exit_if_left_out, run_pipeline
from crosstrace.core.errors import UserError

ABOUT = {
    "train": "Teach the base by every strategy, tracing as it learns.",
    "eval": "Test the recall of the base and of every taught model.",
    "trace": "Trace gradients at the final checkpoint of every strategy.",
    "analyze": "Analyse the shared sets: size, overlap, centralization.",
    "intervene": "Ablate and graft the shared set and its controls.",
    "mechanism": "Examine how the models recall: consistency, circuit, grafting at tokens.",
    "retain": "Train the taught models further, with and without replay: what do they keep?",
    "report": "Judge the claims; write results.json and report/index.html.",
}  # stage -> the first line of its command's help


def stage_command(stage: str) -> Callable[..., None]:
    """The command that does one stage of a run that has begun."""

    def command(run: Path, /, *, quiet: bool = False) -> None:
        from crosstrace.experiment.config import load

        saved = run / "config.yaml"
        if not saved.is_file():
            raise UserError(
                f"{run} holds no run (no config.yaml); begin one with `crosstrace data {run} --config CONFIG`, or do "
                "all at once with `crosstrace run CONFIG`"
            )
        results = run_pipeline(load(saved), run, "resume", stages=[stage], quiet=quiet)
        if shown := str(results):
            print(shown)
        if stage == "report":
            print(f"\nreport   {run / 'report' / 'index.html'}")
        exit_if_left_out(results)

    command.__doc__ = f"""{ABOUT[stage]}

    Finished work is not done again: what is missing, unfinished or damaged in RUN is made, and the rest stays. The
    settings are those of RUN/config.yaml.

    Args:
        run: the folder of a run.
        quiet: print no progress.
    """
    return command


def data(run: Path, /, *, config: Path | None = None, overwrite: bool = False, quiet: bool = False) -> None:
    """Draw the facts and write the examples; this begins a run.

    In a run that has begun, without --config: finished work is not done again, and the settings are those of
    RUN/config.yaml.

    Args:
        run: the folder of the run.
        config: the experiment, a YAML file; the embedded default if not given.
        overwrite: replace an existing run.
        quiet: print no progress.
    """
    from crosstrace.experiment.config import Experiment, load

    saved = run / "config.yaml"
    goes_on = config is None and saved.is_file() and not overwrite
    mode = "overwrite" if overwrite else "resume" if goes_on else "new"
    experiment = load(saved) if goes_on else load(config) if config else Experiment()
    run_pipeline(experiment, run, mode, stages=["data"], quiet=quiet)
