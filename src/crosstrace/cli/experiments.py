"""The commands that run whole experiments: demo, run, study, compare. Each calls one function of the library."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from crosstrace.cli.options import given_settings, takes_settings
from crosstrace.core.errors import UserError

DEMO, QUICK, COMPARED = Path("runs/demo"), Path("runs/quick"), Path("runs/compare")


@Parameter(name="*")
@dataclass(frozen=True)
class Start:
    """How a command begins its folder."""

    resume: bool = False
    """Go on with what is in the folder: skip what is complete and unchanged."""
    overwrite: bool = False
    """Replace what is in the folder."""
    quiet: bool = False
    """Print no progress."""

    @property
    def mode(self) -> str:
        """`new`, `resume` or `overwrite`, as `pipeline.run` calls it."""
        if self.resume and self.overwrite:
            raise UserError("--resume and --overwrite were both given; they exclude each other")
        return "resume" if self.resume else "overwrite" if self.overwrite else "new"


@takes_settings("crosstrace.experiment.config:Experiment")
def demo(run: Path | None = None, /, *, quick: bool = False, start: Start = Start(), **settings: Any) -> None:
    """Run the embedded default experiment.

    Args:
        run: the folder of the run; runs/demo, or runs/quick with --quick, if not given.
        quick: a first look in less than a minute: fewer people, shorter training, no mechanism.
    """
    from crosstrace.experiment.config import Experiment, override, quick_look

    experiment = quick_look() if quick else Experiment()
    _run(override(experiment, given_settings(settings)), run or (QUICK if quick else DEMO), start)


@takes_settings("crosstrace.experiment.config:Experiment")
def run(config: Path, run: Path | None = None, /, *, start: Start = Start(), **settings: Any) -> None:
    """Run any experiment.

    Args:
        config: the experiment, a YAML file such as `crosstrace settings` prints.
        run: the folder of the run; runs/NAME, with the experiment's name, if not given.
    """
    from crosstrace.experiment.config import load, override

    experiment = override(load(config), given_settings(settings))
    _run(experiment, run or Path("runs") / experiment.name, start)


@takes_settings("crosstrace.experiment.study_settings:StudySettings")
def study(
    config: Path,
    folder: Path | None = None,
    /,
    *,
    only_list: Annotated[bool, Parameter(name="--list")] = False,
    start: Start = Start(),
    **settings: Any,
) -> None:
    """Run one experiment over a grid of settings and seeds.

    Every run has a folder of its own and several go at once; then one table and one report are made of them all.

    Args:
        config: the study, a YAML file, e.g. examples/study-claims.yaml.
        folder: the folder of the study; runs/NAME, with the study's name, if not given.
        only_list: print the commands that make the runs, one a line, and run none; the study with --resume collects
            what they have made.
    """
    from crosstrace.experiment import config as experiments
    from crosstrace.experiment import study as studies
    from crosstrace.experiment import study_settings

    options, changes = study_settings.load(config), given_settings(settings)
    if changes:
        values = study_settings.plain(options)
        for name, text in changes.items():
            experiments.assign(values, name, experiments.value_of(name, text))
        options = study_settings.parse(values, "the command line")
    folder = folder or Path("runs") / options.name
    if only_list:
        for command in studies.commands(options, folder, start.mode):
            print(shlex.join(command))
        return
    results = studies.run(options, folder, start.mode, quiet=start.quiet)
    print(results)
    print(f"\nreport   {folder / 'report' / 'index.html'}\ntable    {folder / 'table.csv'}")
    exit_if_left_out(results)


@takes_settings("crosstrace.experiment.config:Experiment")
def compare(
    base: str, /, *tuned: str, tasks: str, run: Path = COMPARED, start: Start = Start(), **settings: Any
) -> None:
    """Compare a base with models tuned from it elsewhere, with no training.

    Recall, traces, shared sets, ablation and grafting, how they recall, how far the weights moved: one report.

    Args:
        base: bundled, a folder written by save_pretrained, a GGUF file, or a hub name.
        tuned: the same, or a folder with a LoRA adapter; NAME=MODEL gives it a name.
        tasks: what is asked and traced: the folder of a run, or one with bio.jsonl and qa.jsonl.
        run: the folder where the results go.
    """
    from crosstrace.experiment.compare import comparison
    from crosstrace.experiment.config import override

    if not tuned:
        raise UserError(
            "compare takes a base and one or more models tuned from it, e.g. crosstrace compare bundled my/model "
            f"--tasks {DEMO}; no tuned model was given"
        )
    _run(override(comparison(base, tuned, tasks), given_settings(settings)), run, start)


def _run(experiment: Any, folder: Path, start: Start) -> None:
    """Run an experiment and print its results and where they are."""
    results = run_pipeline(experiment, folder, start.mode, quiet=start.quiet)
    print(results)
    print(f"\nreport   {folder / 'report' / 'index.html'}\nresults  {folder / 'results.json'}")
    exit_if_left_out(results)


def run_pipeline(*arguments: Any, **options: Any) -> Any:
    """`pipeline.run`; if a launcher started several processes, they share the work."""
    from crosstrace.core import processes
    from crosstrace.experiment import pipeline

    joined = processes.Processes() if processes.launched() > 1 else None
    return pipeline.run(*arguments, **options, processes=joined)


def exit_if_left_out(results: Any) -> None:
    """Exit with `EXIT_CODE` if parts of the run were left out."""
    if results.left_out:
        from crosstrace.core.left_out import EXIT_CODE

        raise SystemExit(EXIT_CODE)
