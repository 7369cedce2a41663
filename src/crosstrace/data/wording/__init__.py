"""Names, and each relation's objects and sentence patterns, as package data. It knows no people and no facts.

A relation is a file: its statements, questions and objects. A statement holds `{subject}` and `{object}`, a question
only `{subject}`; the [bracketed] words express the relation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

RELATIONS = ("birth_date", "birth_city", "university", "major", "employer", "hobby")
NAME_PARTS = ("first", "middle", "last")


@cache
def lines(name: str) -> tuple[str, ...]:
    """The non-empty lines of `<name>.txt` in this folder."""
    text = files(__name__).joinpath(f"{name}.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line.strip())


def names(part: str) -> tuple[str, ...]:
    """The list of one part of a name: first, middle or last."""
    return tuple(line.split()[0] for line in lines(f"names_{part}"))


@cache
def pronouns() -> dict[str, str]:
    """The pronoun that goes with each first name."""
    return dict(line.split() for line in lines("names_first"))


@dataclass(frozen=True)
class Wording:
    """How some relations are worded, and the objects that each may take: the package's lists, or a user's own."""

    statements: Mapping[str, tuple[str, ...]]
    questions: Mapping[str, tuple[str, ...]]
    objects: Mapping[str, tuple[str, ...]]

    @property
    def relations(self) -> tuple[str, ...]:
        """The relations, in the fixed order of biographies."""
        return tuple(self.statements)


@cache
def packaged() -> Wording:
    """The package's own relations, each from `<name>.json` in this folder."""
    folder = files(__name__)
    read = {name: json.loads(folder.joinpath(f"{name}.json").read_text(encoding="utf-8")) for name in RELATIONS}
    kinds = ("statements", "questions", "objects")
    return Wording(**{kind: {name: tuple(said[kind]) for name, said in read.items()} for kind in kinds})
