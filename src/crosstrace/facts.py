"""Facts: who the people are and what is true of them. No wording, no text, no tokens.

A `World` is drawn from a seed: people with names of three parts, each with one object for every relation, a share of
whom get questions to train on (the others are out of distribution, OOD). The same settings give the same world.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from itertools import count
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as settings

from crosstrace.errors import UserError
from crosstrace.wording import NAME_PARTS, RELATIONS, names, objects, pronouns

Share = Annotated[float, Field(ge=0, le=1)]


@settings(frozen=True, config=ConfigDict(extra="forbid"))
class FactSettings:
    """The world of facts and how its biographies are written."""

    people: Annotated[int, Field(ge=8)] = 500
    """Number of people."""
    seed: int = 1
    """Seed of names, objects, wordings and the split."""
    qa_share: Share = 0.5
    """Share of the people whose question-answer pairs are trained (in distribution); the rest are OOD."""
    biographies: Annotated[int, Field(ge=1)] = 1
    """Biographies per person, each worded anew."""
    augmented_share: Share = 0.0
    """Share of the people who get `augmented_biographies` in permuted order instead."""
    augmented_biographies: Annotated[int, Field(ge=1)] = 5
    """Biographies of an augmented person."""
    order: Literal["fixed", "permuted"] = "fixed"
    """Order of the sentences in a biography."""
    subject: Literal["name", "pronoun", "either"] = "pronoun"
    """How sentences after the first name the person; `either` draws one way for each biography."""
    questions: Annotated[int, Field(ge=1)] = 1
    """Differently worded questions for each fact."""
    frequency: Literal["uniform", "zipf"] = "uniform"
    """How often a person's examples occur in an epoch: once, or after Zipf's law."""
    zipf_exponent: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Exponent s of Zipf's law: the person of rank r occurs max(1, round(zipf_top / r^s)) times."""
    zipf_top: Annotated[int, Field(ge=1)] = 20
    """Occurrences of the most frequent person under Zipf's law."""
    population: Literal["A", "B"] = "B"
    """Which half of all names people are drawn from: the bundled base knows people of A, none of B."""


@dataclass(frozen=True)
class Fact:
    """One (subject, relation, object), e.g. (Ada Mae Brook, birth_city, Lyon)."""

    id: str
    person: str
    subject: str
    relation: str
    object: str


@dataclass(frozen=True)
class Person:
    """A person: identity, full name, pronoun, split, and how often the examples occur in an epoch."""

    id: str
    name: str
    pronoun: str
    in_distribution: bool
    augmented: bool
    repeats: int
    facts: tuple[Fact, ...]


@dataclass(frozen=True)
class World:
    """People and their facts, drawn from `settings`."""

    settings: FactSettings
    people: tuple[Person, ...]

    @property
    def relations(self) -> tuple[str, ...]:
        """The relations, in the fixed order of biographies."""
        return RELATIONS

    @classmethod
    def draw(cls, settings: FactSettings) -> World:
        """Draw the world of these settings; the same settings give the same world.

        Raises:
            UserError: the names do not suffice for so many people.
        """
        trained = round(settings.qa_share * settings.people)
        augmented = round(settings.augmented_share * settings.people)
        full_names = _draw_names(settings)
        order = _rng(settings, "split").sample(range(settings.people), settings.people)
        with_qa = set(order[:trained])
        order = _rng(settings, "augmented").sample(range(settings.people), settings.people)
        with_augmentation = set(order[:augmented])
        ranks = _rng(settings, "frequency").sample(range(settings.people), settings.people)
        draw = _rng(settings, "facts")
        people = []
        for index, name in enumerate(full_names):
            person = f"{settings.population}{index:05d}"
            facts = tuple(
                Fact(f"{person}.{relation}", person, name, relation, _pick(draw, objects(relation)))
                for relation in RELATIONS
            )
            pronoun = pronouns()[name.split()[0]]
            repeats = _zipf(ranks[index] + 1, settings) if settings.frequency == "zipf" else 1
            people.append(Person(person, name, pronoun, index in with_qa, index in with_augmentation, repeats, facts))
        return cls(settings, tuple(people))


def _rng(settings: FactSettings, purpose: str) -> random.Random:
    """An independent stream for each purpose, so that one setting does not move another's draws."""
    return random.Random(f"crosstrace/{settings.population}/{settings.seed}/{purpose}")


def _pick(draw: random.Random, values: tuple[str, ...]) -> str:
    return values[draw.randrange(len(values))]


def _zipf(rank: int, settings: FactSettings) -> int:
    return max(1, round(settings.zipf_top / rank**settings.zipf_exponent))


def _draw_names(settings: FactSettings) -> list[str]:
    """Distinct full names, none of whose parts belongs to one person alone.

    Populations A and B take the names whose list indices add up to an even or odd number, so no seed makes them
    meet. Small worlds use the head of each list, or parts would be unique; who has a unique part is drawn anew.
    """
    lists = [names(part) for part in NAME_PARTS]
    lists = [values[: max(5, min(len(values), settings.people // 4))] for values in lists]
    room = len(lists[0]) * len(lists[1]) * len(lists[2]) // 2
    if settings.people > room // 2:
        raise UserError(
            f"facts.people is {settings.people}, but the name lists give only {room} names to a population and "
            f"half of them must stay free; use at most {room // 2} people"
        )
    draw, parity = _rng(settings, "names"), 0 if settings.population == "A" else 1
    drawn: list[tuple[int, ...]] = []
    taken: set[tuple[int, ...]] = set()
    for attempt in count(1):
        while len(drawn) < settings.people:
            name = tuple(draw.randrange(len(values)) for values in lists)
            if sum(name) % 2 == parity and name not in taken:
                taken.add(name)
                drawn.append(name)
        kept = drawn
        for position in range(len(lists)):
            used = Counter(name[position] for name in drawn)
            kept = [name for name in kept if used[name[position]] > 1]
        if len(kept) == len(drawn):
            break
        if attempt % 50 == 0:
            kept = []  # in a small world the kept may leave no room for another: they use up what their parts allow
        taken, drawn = set(kept), kept
    return [" ".join(values[i] for values, i in zip(lists, name)) for name in drawn]
