"""The command line: validate, then call one function of the library. No science here.

A mistake of the user's is one sentence on stderr and exit code 2.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from crosstrace.errors import UserError

RunFolder = Annotated[Path, tyro.conf.Positional]
DEMO = Path("runs/demo")


@dataclass
class _Flags:
    """How to begin, and what to print."""

    resume: bool = False
    """Go on with an existing run: skip what is complete and unchanged."""
    overwrite: bool = False
    """Replace an existing run."""
    quiet: bool = False
    """Print no progress."""

    def mode(self) -> str:
        if self.resume and self.overwrite:
            raise UserError("--resume and --overwrite were both given; they exclude each other")
        return "resume" if self.resume else "overwrite" if self.overwrite else "new"


_BEGIN = """  --resume       go on with an existing run: skip what is complete and unchanged
  --overwrite    replace an existing run
  --quiet        print no progress"""

_HELP = f"""crosstrace: does a fine-tuning recipe teach knowledge or rote memory, and in which parameters does it live?

The whole experiment:
  crosstrace demo [RUN]                the embedded default, in runs/demo unless RUN is given
  crosstrace run CONFIG [RUN]          any experiment, in runs/<name> unless RUN is given

Any stage by itself, on the folder of a run:
  crosstrace data RUN --config CONFIG  draw the facts and write the examples; begins the run
  crosstrace train RUN                 teach the base by every strategy, tracing as it learns
  crosstrace eval RUN                  recall of the base and of every taught model
  crosstrace trace RUN                 gradient traces at the final checkpoint
  crosstrace analyze RUN               shared sets: size, overlap, centralization
  crosstrace intervene RUN             ablate and graft the shared set and its controls
  crosstrace report RUN                judge the claims, write results.json and report/index.html

And:
  crosstrace settings                  the default experiment as YAML, to copy and change
  crosstrace pretrain-base FOLDER      make a base like the bundled one, of any size
  crosstrace COMMAND --help            more on a command; after `demo` and `run`, every setting

Options of demo and run, before or after the names:
{_BEGIN}
  --SECTION.SETTING VALUE              any setting by its dotted name, e.g. --facts.people 200
"""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; `arguments` default to the process's own."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_HELP)
        raise SystemExit(0 if arguments else 2)
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(version("crosstrace"))
        return
    command, *rest = arguments
    try:
        if command not in COMMANDS:
            import difflib

            close = difflib.get_close_matches(command, COMMANDS, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"commands are {', '.join(COMMANDS)}"
            raise UserError(f"unknown command {command!r}; {hint}")
        COMMANDS[command](rest)
    except UserError as error:
        print(f"crosstrace: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("crosstrace: interrupted; go on with --resume", file=sys.stderr)
        raise SystemExit(130) from None


# ------------------------------------------------------------------------------- whole experiments


def demo(arguments: list[str]) -> None:
    """The embedded default experiment."""
    from crosstrace import config

    names, flags, rest = _split(arguments)
    if len(names) > 1:
        raise UserError(f"demo takes at most one run folder, but {len(names)} names were given: {', '.join(names)}")
    experiment = _settings(config.Experiment(), rest, "crosstrace demo")
    _run(experiment, Path(names[0]) if names else DEMO, flags)


def run(arguments: list[str]) -> None:
    """Any experiment from its config."""
    from crosstrace import config

    names, flags, rest = _split(arguments)
    if "-h" in rest or "--help" in rest:
        _settings(config.load(Path(names[0])) if names else config.Experiment(), rest, "crosstrace run CONFIG")
    if not 1 <= len(names) <= 2:
        raise UserError(f"run takes a config file and at most one run folder, but {len(names)} names were given")
    experiment = _settings(config.load(Path(names[0])), rest, "crosstrace run CONFIG")
    _run(experiment, Path(names[1]) if len(names) == 2 else Path("runs") / experiment.name, flags)


def _run(experiment: Any, folder: Path, flags: _Flags) -> None:
    from crosstrace import pipeline

    results = pipeline.run(experiment, folder, flags.mode(), quiet=flags.quiet)
    print(results)
    print(f"\nreport   {folder / 'report' / 'index.html'}\nresults  {folder / 'results.json'}")


def _split(arguments: list[str]) -> tuple[list[str], _Flags, list[str]]:
    """Names, the three flags, and the settings, which take a value each unless written with '='."""
    flags, names, rest = _Flags(), [], []
    waiting = iter(arguments)
    for word in waiting:
        if word in ("--resume", "--overwrite", "--quiet"):
            setattr(flags, word[2:], True)
        elif word in ("-h", "--help"):
            rest.append(word)
        elif word.startswith("--"):
            rest.append(word)
            if "=" not in word and not word.rpartition(".")[2].startswith("no-"):
                rest += _values(waiting)
        else:
            names.append(word)
    return names, flags, rest


def _values(waiting: Any) -> list[str]:
    value = next(waiting, None)
    return [] if value is None else [value]


def _settings(experiment: Any, arguments: list[str], program: str) -> Any:
    """The experiment with settings from the command line; --help prints all of them and leaves."""
    from crosstrace import config

    if "-h" in arguments or "--help" in arguments:
        print(f"options:\n{_BEGIN}\n")
        tyro.cli(type(experiment), default=experiment, args=["--help"], prog=program)
    changes: dict[str, str] = {}
    words = iter(arguments)
    for word in words:
        name, equals, value = word[2:].partition("=")
        if not equals:
            value = next(words, None)
        if value is None:
            raise UserError(f"{word} needs a value, e.g. --facts.people 200")
        changes[name.replace("-", "_")] = value
    return config.override(experiment, changes) if changes else experiment


# ------------------------------------------------------------------------------- single stages


@dataclass
class _Stage:
    run: RunFolder
    """Folder of a run."""
    quiet: bool = False
    """Print no progress."""


@dataclass
class _Data(_Stage):
    config: Path | None = None
    """Config file that begins the run; the embedded default if not given."""
    overwrite: bool = False
    """Replace an existing run."""


def _stage(name: str, help: str) -> Callable[[list[str]], None]:
    def command(arguments: list[str]) -> None:
        from crosstrace import config, pipeline

        options = tyro.cli(_Stage, args=arguments, prog=f"crosstrace {name}", description=help)
        saved = options.run / "config.yaml"
        if not saved.is_file():
            raise UserError(
                f"{options.run} holds no run (no config.yaml); begin one with `crosstrace data {options.run} --config "
                "CONFIG`, or do all at once with `crosstrace run CONFIG`"
            )
        experiment = config.load(saved)
        results = pipeline.run(experiment, options.run, "resume", stages=[name], quiet=options.quiet)
        if results:
            print(results)
            print(f"\nreport   {options.run / 'report' / 'index.html'}")

    return command


def data(arguments: list[str]) -> None:
    """Begin a run: draw the facts and write the examples."""
    from crosstrace import config, pipeline

    help = "Draw the facts and write the examples of both tasks; begins the run."
    options = tyro.cli(_Data, args=arguments, prog="crosstrace data", description=help)
    saved = options.run / "config.yaml"
    mode = "overwrite" if options.overwrite else "new"
    if options.config is None and saved.is_file() and not options.overwrite:
        experiment, mode = config.load(saved), "resume"
    else:
        experiment = config.load(options.config) if options.config else config.Experiment()
    pipeline.run(experiment, options.run, mode, stages=["data"], quiet=options.quiet)


# ------------------------------------------------------------------------------- the rest


def settings(arguments: list[str]) -> None:
    """Print the default experiment as YAML."""
    from crosstrace import config

    if arguments and arguments != ["--help"] and arguments != ["-h"]:
        raise UserError("settings takes no arguments; it prints the default experiment, so redirect it into a file")
    print(config.dumps(config.Experiment()), end="")


def pretrain(arguments: list[str]) -> None:
    """Make a base."""
    from crosstrace.pretrain import PretrainCommand, pretrain_base
    from crosstrace.progress import Progress

    help = "Pretrain a base on population A in both formats: the exact recipe of the bundled one by default."
    # with an instance as default: pydantic's default factories are not seen on the class
    default = PretrainCommand(folder=tyro.MISSING)
    options = tyro.cli(
        PretrainCommand, default=default, args=arguments, prog="crosstrace pretrain-base", description=help
    )
    if options.folder.exists():
        raise UserError(f"{options.folder} exists; a base is never written over, so choose another folder")
    import torch

    torch.set_num_threads(options.threads)
    with Progress().bar("pretrain") as update:
        scores = pretrain_base(
            options.folder,
            options.recipe,
            work=options.folder.with_name(options.folder.name + "-work"),
            progress=update,
        )
    for name in ("qa_trained", "qa_held_out", "bio"):
        print(f"{name:12} {scores[name]['exact_match']:.3f} [{scores[name]['low']:.3f}, {scores[name]['high']:.3f}]")


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "demo": demo,
    "run": run,
    "data": data,
    "train": _stage("train", "Teach the base by every strategy, tracing as it learns."),
    "eval": _stage("eval", "Recall of the base and of every taught model."),
    "trace": _stage("trace", "Gradient traces at the final checkpoint of every strategy."),
    "analyze": _stage("analyze", "Shared sets of every strategy: size, overlap, centralization."),
    "intervene": _stage("intervene", "Ablate and graft the shared set and its controls."),
    "report": _stage("report", "Judge the claims, write results.json and report/index.html."),
    "settings": settings,
    "pretrain-base": pretrain,
}
