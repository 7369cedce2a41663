"""The command line: the table of its commands, and how errors are reported. No science here.

A command checks its arguments, then calls one function of the library. cyclopts makes options and help from the
command's signature and docstring. A user's mistake is one sentence on stderr and exit code 2.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from errno import EDQUOT, ENOSPC
from importlib.metadata import version
from typing import Any, Literal

from cyclopts import App, Group, Parameter
from cyclopts import exceptions as wrong
from pydantic import ValidationError
from safetensors import SafetensorError

from crosstrace.cli import experiments, options, preparing, sharing, stages
from crosstrace.core import interrupts
from crosstrace.core.errors import UserError


def completion(shell: Literal["bash", "zsh", "fish"], /) -> None:
    """Print a script that completes crosstrace's commands and options in a shell.

    For bash: `source <(crosstrace completion bash)`; for others, write it to a file that the shell reads.

    Args:
        shell: whose completion.
    """
    for command in COMMANDS.values():
        options.add_settings(command)
    print(_app().generate_completion(shell=shell))


GROUPS: dict[str, dict[str, Callable[..., Any]]] = {
    "The whole experiment": {
        "demo": experiments.demo,
        "run": experiments.run,
        "study": experiments.study,
        "compare": experiments.compare,
    },
    "One stage, in the folder of a run": {
        "data": stages.data,
        **{stage: stages.stage_command(stage) for stage in stages.ABOUT},
    },
    "For other tools, from the folder of a run": {
        "graft": sharing.graft,
        "ablate": sharing.ablate,
        "export": sharing.export,
    },
    "Around a run": {
        "settings": preparing.settings,
        "plan": preparing.plan,
        "doctor": preparing.doctor,
        "import": preparing.import_facts,
        "fetch": preparing.fetch,
        "new-model": preparing.new_model,
        "pretrain-base": preparing.pretrain_base,
        "completion": completion,
    },
}
COMMANDS = {name: command for commands in GROUPS.values() for name, command in commands.items()}
# commands whose work the processes of a launcher share
TOGETHER = ("demo", "run", "compare", "data", *stages.ABOUT)

_ABOUT = """crosstrace: does a fine-tuning recipe teach knowledge or rote memory, and in which parameters does it live?

Finished work is not done again: a stage makes what is missing in the folder of a run. `crosstrace COMMAND --help` says
more on a command; `crosstrace settings` prints the default experiment, and `crosstrace settings NAME` explains a
setting. Any setting can be given to demo, run, compare and plan by its dotted name, e.g. `--facts.people 200`."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; `arguments` default to the process's own."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    command = arguments[0] if arguments else ""
    try:
        if "WORLD_SIZE" in os.environ:
            _side_by_side(command, arguments)
        _call(arguments)
        sys.stdout.flush()
        if not arguments:
            raise SystemExit(2)
    except UserError as error:
        print(f"crosstrace: {error}", file=sys.stderr)
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


def _app() -> App:
    """The command line as cyclopts knows it."""
    app = App(
        name="crosstrace",
        help=_ABOUT,
        help_flags=("--help", "-h"),
        version=lambda: version("crosstrace"),
        default_parameter=Parameter(negative=(), show_default=_shown),
        result_action="return_value",
        suppress_keyboard_interrupt=False,
    )
    for number, (title, commands) in enumerate(GROUPS.items()):
        group = Group(title, sort_key=number)
        for position, name in enumerate(commands):
            app.command(COMMANDS[name], name=name, group=group, sort_key=position)
    return app


def _shown(default: Any) -> str | None:
    """A default as the help shows it; None for a flag that is off and for an option without a default."""
    return None if default is False or default is None else str(default)


def _call(arguments: list[str]) -> None:
    """Run the command that the arguments name.

    Raises:
        UserError: they name no command, or its options are wrong.
    """
    command = COMMANDS.get(arguments[0]) if arguments else None
    if command is not None:
        options.add_settings(command)
    try:
        _app()(arguments, exit_on_error=False, print_error=False)
    except wrong.CycloptsError as error:
        raise UserError(_sentence(error, arguments)) from None
    except ValidationError as error:
        from crosstrace.experiment.config import complaint

        raise UserError(complaint(error)) from None


def _side_by_side(command: str, arguments: list[str]) -> None:
    """If a launcher started several processes, run the command in all of them and exit. Only the first prints."""
    from crosstrace.core import processes

    def work(joined: processes.Processes) -> None:
        if joined.rank:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (as long as the process is)
        if command not in TOGETHER:
            raise UserError(
                f"{command} is the work of one process, but a launcher has started {joined.size}; start `crosstrace "
                f"{command}` without one ({', '.join(TOGETHER)} share their work)"
            )
        _call(arguments)

    if processes.launched() > 1:
        processes.main(work)


# ------------------------------------------------------------------------------- mistakes


def _sentence(error: wrong.CycloptsError, arguments: list[str]) -> str:
    """What is wrong with the arguments, and where the right ones are listed."""
    error.verbose = False
    command = arguments[0]
    more = f"`crosstrace {command} --help` lists what there is"
    if isinstance(error, wrong.UnknownCommandError):
        return " ".join(str(error).split())
    if isinstance(error, wrong.UnknownOptionError):
        option = error.token.keyword or error.token.value
        if command in ("data", *stages.ABOUT) and "." in option:
            return _settings_stay(command, arguments)
        return f"{str(error).rstrip('.')}{'' if str(error).endswith('?') else '.'} {more}"
    if isinstance(error, wrong.MissingArgumentError) and error.argument is not None:
        name = error.argument.name
        if name.startswith("--") and name in " ".join(arguments):
            return f"{_last_option(arguments, name)} needs a value, e.g. `--facts.people 200`; {more}"
        return f"{command} needs {name}; {more}"
    if isinstance(error, wrong.UnusedCliTokensError):
        unused = ", ".join(error.unused_tokens or [])
        return f"{command} takes fewer names: {unused} is left over; {more}"
    return f"{' '.join(str(error).split())} {more}"


def _last_option(arguments: list[str], name: str) -> str:
    """The option whose value is missing, as the user wrote it."""
    return next((word for word in reversed(arguments) if word.startswith(name)), name)


def _settings_stay(command: str, arguments: list[str]) -> str:
    """The error for settings given to a stage: it uses those of its run. It says how to run with others."""
    words = arguments[1:]
    first = next(i for i, word in enumerate(words) if word.startswith("--") and "." in word)
    run = next((word for word in words[:first] if not word.startswith("-")), "RUN")
    changed = " ".join(words[first:])
    if command == "data" and not os.path.isfile(os.path.join(run, "config.yaml")):
        return (
            f"data takes its settings from --config, so {words[first]} belongs in that file (`crosstrace settings` "
            "prints one); or do all at once with `crosstrace run`"
        )
    return (
        "settings of an existing run cannot be changed; begin another with "
        f"`crosstrace run {run}/config.yaml NEWRUN {changed}`"
    )
