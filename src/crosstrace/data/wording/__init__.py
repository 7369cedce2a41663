"""Names, objects and sentence patterns as package data, one per line. It knows no people and no facts.

A pattern holds `{subject}` and `{object}` (questions only `{subject}`); its [bracketed] words express the relation.
"""

from __future__ import annotations

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


def objects(relation: str) -> tuple[str, ...]:
    """The objects that a relation may take."""
    return lines(f"objects_{relation}")


def biography_patterns(relation: str) -> tuple[str, ...]:
    """The wordings of one sentence of a biography."""
    return lines(f"bio_{relation}")


def question_patterns(relation: str) -> tuple[str, ...]:
    """The wordings of a question."""
    return lines(f"qa_{relation}")


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
    """The package's own relations."""
    return Wording(
        {relation: biography_patterns(relation) for relation in RELATIONS},
        {relation: question_patterns(relation) for relation in RELATIONS},
        {relation: objects(relation) for relation in RELATIONS},
    )
