"""Settings as options of the command line: one option for each setting of a dataclass, explained by its docstring.

An option's value is one word of YAML: a number, true or false, null, a list such as '[0.01, 0.05]'. Settings below a
name that the user chose take that name: --strategies.mixed.0.steps 300. cyclopts parses and completes options and
prints the help; pydantic checks values, where the settings are defined.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from cyclopts import Group, Parameter
from pydantic import TypeAdapter

from crosstrace.core.errors import UserError, did_you_mean

_METAVARS = {int: "INT", float: "NUMBER", bool: "true|false", list: "LIST", tuple: "LIST"}


def takes_settings(path: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Mark a command that takes settings as its `**settings`.

    Args:
        path: the settings' dataclass, as module:Name. It is imported when the command is called, since it may import
            torch.
    """

    def mark(command: Callable[..., Any]) -> Callable[..., Any]:
        command.settings = path  # type: ignore[attr-defined]
        return command

    return mark


def add_settings(command: Callable[..., Any]) -> None:
    """Replace a marked command's `**settings` by its options.

    A command without the mark, or with its options already, is left as it is.
    """
    path = command.__dict__.get("settings")
    if path is None or "__signature__" in command.__dict__:
        return
    module, _, name = path.partition(":")
    kind = getattr(importlib.import_module(module), name)
    signature = inspect.signature(command, eval_str=True)
    parameters = [item for item in signature.parameters.values() if item.kind is not inspect.Parameter.VAR_KEYWORD]
    options = _options(kind(), "", taken={item.name for item in parameters})
    signature = signature.replace(parameters=[*parameters, *options])
    command.__signature__ = signature  # type: ignore[attr-defined]
    command.__annotations__ = {item.name: item.annotation for item in signature.parameters.values()}


def given_settings(settings: Mapping[str, Any]) -> dict[str, str]:
    """The settings that a command got as `**settings`, by dotted names, e.g. {"facts.people": "200"}."""
    texts: dict[str, str] = {}
    for option, words in settings.items():
        name = option.replace("__", ".")
        for rest, text in ({"": words} if isinstance(words, str) else words or {}).items():
            texts[f"{name}.{rest}" if rest else name] = text
    return texts


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any, str]]:
    """Name, value, type and docstring of each setting in a dataclass of dataclasses."""
    notes, hints = field_notes(type(value)), get_type_hints(type(value), include_extras=True)
    for item in fields(value):
        inner = getattr(value, item.name)
        if is_dataclass(inner):
            yield from leaves(inner, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", inner, hints[item.name], notes.get(item.name, "")


def described(value: Any, name: str) -> list[tuple[str, str, str]]:
    """Name, value as YAML and explanation of a setting, or of every setting in a section.

    Args:
        value: the settings, a dataclass of dataclasses.
        name: e.g. trace.measures, trace, or strategies, whose phases' settings come with it.

    Raises:
        UserError: there is none of that name.
    """
    rows = []
    for setting, inner, hint, note in leaves(value):
        if setting == name or setting.startswith(f"{name}."):
            rows.append((setting, word(inner), note + choices_note(hint)))
            path, kind = _inner(hint)
            if kind is not None:
                notes, hints = field_notes(kind), get_type_hints(kind, include_extras=True)
                rows += [
                    (f"{setting}{path}.{item.name}", "", notes.get(item.name, "") + choices_note(hints[item.name]))
                    for item in fields(kind)
                ]
    if not rows:
        hint = did_you_mean(
            name, (setting for setting, *_ in leaves(value)), "`crosstrace settings` prints all of them"
        )
        raise UserError(f"there is no setting {name!r}; {hint}")
    return rows


def word(value: Any) -> str:
    """A value as one word of YAML."""
    plain = TypeAdapter(Any).dump_python(value, mode="json")
    text = yaml.safe_dump(plain, default_flow_style=True, width=sys.maxsize, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def field_notes(section: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, read from its source."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(definition, ast.ClassDef)
    notes = {}
    for setting, note in pairwise(definition.body):
        is_field = isinstance(setting, ast.AnnAssign) and isinstance(setting.target, ast.Name)
        if is_field and isinstance(note, ast.Expr) and isinstance(note.value, ast.Constant):
            notes[setting.target.id] = inspect.cleandoc(str(note.value.value)).replace("\n", " ")  # type: ignore
    return notes


def choices_note(hint: Any) -> str:
    """The allowed words of a setting, or of a list's items, as a sentence; empty if any are allowed."""
    if get_origin(hint) is Literal:
        return f" One of {', '.join(map(str, get_args(hint)))}."
    return next(filter(None, map(choices_note, get_args(hint))), "")


# ------------------------------------------------------------------------------- for cyclopts


def _options(value: Any, prefix: str, taken: set[str], group: Group | None = None) -> Iterator[inspect.Parameter]:
    """A keyword parameter for each setting; the help groups them by section."""
    notes, hints = field_notes(type(value)), get_type_hints(type(value), include_extras=True)
    group = group or Group("Settings", help=_ABOUT, sort_key=_AFTER)
    sections = []
    for name in (item.name for item in fields(value)):
        inner = getattr(value, name)
        if is_dataclass(inner):
            about = Group(f"{prefix}{name}", help=inspect.getdoc(inner) or "", sort_key=_AFTER + 1)
            sections.append(_options(inner, f"{prefix}{name}.", taken, about))
        elif f"{prefix}{name}" not in taken:
            yield _option(f"{prefix}{name}", inner, hints[name], notes.get(name, ""), group)
    for section in sections:
        yield from section


_AFTER = 10  # settings stand below a command's own options
_ABOUT = (
    "Each with the value that it has unless you give another. A value is one word, read as YAML: a number, true or "
    "false, null, a list such as '[0.01, 0.05]'."
)


def _option(name: str, value: Any, hint: Any, note: str, group: Group) -> inspect.Parameter:
    """The keyword parameter of one setting."""
    plain = _without_extras(hint)
    inner, kind = _inner(hint)
    default = word(value)
    shared: dict[str, Any] = {
        "name": f"--{name}", "group": group, "negative": (), "show_default": _shows(default),
    }  # fmt: skip
    if get_origin(plain) is Literal:
        annotation: Any = Annotated[plain | None, Parameter(help=note, **shared)]
    elif inner or kind is not None:
        also = f" `crosstrace settings {name}` explains what lies in it." if kind is not None else ""
        short = default if len(default) < 60 else f"`crosstrace settings {name}` prints it"
        shared["show_default"] = _shows(short)
        annotation = Annotated[dict[str, str] | None, Parameter(help=note + also, converter=_words, **shared)]
    else:
        metavar = _METAVARS.get(get_origin(plain) or plain, "TEXT")
        annotation = Annotated[
            str | None, Parameter(help=note + choices_note(hint), metavar=metavar, **shared)
        ]  # fmt: skip
    return inspect.Parameter(
        name.replace(".", "__"), inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def _shows(text: str) -> Callable[[Any], str]:
    """What cyclopts calls to show a default: it gives `text`, whatever the default is."""

    def show(_: Any) -> str:
        return text

    return show


def _words(_: Any, tokens: Any) -> dict[str, str]:
    """The values of an option with names inside, by the rest of their names: {"mixed.0.steps": "300"}."""
    if isinstance(tokens, dict):
        inner = {name: _words(None, tokens[name]) for name in tokens}
        return {
            f"{name}.{rest}" if rest else name: text for name, words in inner.items() for rest, text in words.items()
        }
    return {"": tokens[-1].value}


def _without_extras(hint: Any) -> Any:
    """A type without its conditions and without None."""
    if get_origin(hint) is Annotated:
        return _without_extras(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        (first, *_) = [item for item in get_args(hint) if item is not type(None)]
        return _without_extras(first)
    return hint


def _inner(hint: Any) -> tuple[str, type | None]:
    """The names inside a setting (.NAME, .NUMBER), and the dataclass whose fields follow them, if there is one."""
    plain = _without_extras(hint)
    if is_dataclass(plain):
        return "", plain if isinstance(plain, type) else None
    arguments = get_args(plain)
    if get_origin(plain) is dict:
        path, kind = _inner(arguments[1])
        return f".NAME{path}", kind
    if get_origin(plain) is list:
        path, kind = _inner(arguments[0])
        return (f".NUMBER{path}", kind) if kind is not None else ("", None)
    return "", None
