"""Facts: who the people are and what is true of them. No text, no tokens.

A `World` is drawn from a seed: people with names of three parts, each with one object for every relation. A share of
them get questions to train on; the others are out of distribution (OOD). Or the subjects and facts are those that
`crosstrace import` wrote, and only the split is drawn. The same settings give the same world.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as settings

from crosstrace.core.errors import UserError
from crosstrace.core.files import expanded, read_json
from crosstrace.data.wording import NAME_PARTS, Wording, names, packaged, pronouns

Share = Annotated[float, Field(ge=0, le=1)]


@settings(frozen=True, config=ConfigDict(extra="forbid"))
class FactSettings:
    """The world of facts and how its biographies are written."""

    people: Annotated[int, Field(ge=8)] = 500
    """Number of people."""
    relations: tuple[str, ...] | None = None
    """What is told and asked of each subject, such as [birth_city, employer]; every relation if not given."""
    seed: int = 1
    """Seed of names, objects, wordings and the split."""
    qa_share: Share = 0.5
    """Share of the people whose question-answer pairs are trained (in distribution); the rest are OOD."""
    biographies: Annotated[int, Field(ge=1, le=1000)] = 1
    """Biographies per person, each worded anew."""
    augmented_share: Share = 0.0
    """Share of the people who get `augmented_biographies` in permuted order instead."""
    augmented_biographies: Annotated[int, Field(ge=1, le=1000)] = 5
    """Biographies of an augmented person."""
    order: Literal["fixed", "permuted"] = "fixed"
    """Order of the sentences in a biography."""
    subject: Literal["name", "pronoun", "either"] = "pronoun"
    """How sentences after the first name the person; `either` draws one way for each biography."""
    questions: Annotated[int, Field(ge=1, le=1000)] = 1
    """Differently worded questions for each fact."""
    template: Literal["plain", "chat"] = "plain"
    """How a question is put: as plain text, or by the tokenizer's chat template, where the user asks and the assistant
    answers. Biographies are plain text."""
    frequency: Literal["uniform", "zipf"] = "uniform"
    """How often a person's examples occur in an epoch: once, or after Zipf's law."""
    zipf_exponent: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Exponent s of Zipf's law: the person of rank r occurs max(1, round(zipf_top / r^s)) times."""
    zipf_top: Annotated[int, Field(ge=1, le=100_000)] = 20
    """Occurrences of the most frequent person under Zipf's law."""
    population: Literal["A", "B"] = "B"
    """Which half of all names people are drawn from: the bundled base knows people of A, none of B."""
    source: str | None = None
    """Folder that `crosstrace import` wrote: its subjects and facts in place of drawn people. `people`, `population`
    and `frequency` are of drawn people alone; a subject without a pronoun is called by its name."""
    subjects: Annotated[int, Field(ge=2)] | None = None
    """Of a source, so many of its subjects, drawn at random; all if not given."""
    split: Literal["subject", "relation", "given"] = "subject"
    """Of a source, whose questions are held out: those about some subjects or those of some relations (`qa_share` of
    them are trained), or those that the file says."""


@dataclass(frozen=True)
class Fact:
    """One (subject, relation, object), e.g. (Ada Mae Brook, birth_city, Lyon)."""

    id: str
    person: str
    subject: str
    relation: str
    object: str
    trained: bool | None = None  # whether its questions are trained; None: as its person's
    type: str = ""  # of the subject, if it is known
    aliases: tuple[str, ...] = ()  # other right answers


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
    wording: Wording = field(default_factory=packaged)

    @property
    def relations(self) -> tuple[str, ...]:
        """The relations, in the fixed order of biographies."""
        return self.wording.relations

    @classmethod
    def draw(cls, settings: FactSettings) -> World:
        """Draw the world of these settings; the same settings give the same world.

        Raises:
            UserError: there are too few names for so many people, or the source can't be read, or it leaves nobody on
                one side of the split.
        """
        if settings.source is not None:
            return _imported_world(settings)
        trained = round(settings.qa_share * settings.people)
        augmented = round(settings.augmented_share * settings.people)
        full_names = _draw_names(settings)
        order = _rng(settings, "split").sample(range(settings.people), settings.people)
        with_qa = set(order[:trained])
        order = _rng(settings, "augmented").sample(range(settings.people), settings.people)
        with_augmentation = set(order[:augmented])
        ranks = _rng(settings, "frequency").sample(range(settings.people), settings.people)
        draw = _rng(settings, "facts")
        wording = _restrict_wording(settings.relations, packaged(), "the relations of people")
        people = []
        for index, name in enumerate(full_names):
            person = f"{settings.population}{index:05d}"
            every = {relation: _pick(draw, choices) for relation, choices in packaged().objects.items()}
            facts = tuple(
                Fact(f"{person}.{relation}", person, name, relation, every[relation]) for relation in wording.relations
            )
            pronoun = pronouns()[name.split()[0]]
            repeats = _zipf(ranks[index] + 1, settings) if settings.frequency == "zipf" else 1
            people.append(Person(person, name, pronoun, index in with_qa, index in with_augmentation, repeats, facts))
        return cls(settings, tuple(people), wording)


def _restrict_wording(relations: Sequence[str] | None, wording: Wording, known: str) -> Wording:
    """The wording of some relations alone, in its own order; of all if `relations` is None.

    Args:
        known: what an error calls the relations of the wording.

    Raises:
        UserError: there is no such relation, or none is named.
    """
    if relations is None:
        return wording
    unknown = [name for name in relations if name not in wording.relations]
    if unknown or not relations:
        raise UserError(
            f"facts.relations names {unknown[0] if unknown else 'none'}; {known} are {', '.join(wording.relations)}"
        )
    parts = (wording.statements, wording.questions, wording.objects)
    return Wording(*({name: values for name, values in part.items() if name in relations} for part in parts))


def _imported_world(settings: FactSettings) -> World:
    """The world of a source's facts."""
    values = read_world(settings)
    wording = Wording(*({r: tuple(w[part]) for r, w in values["relations"].items()} for part in _WORDED))
    wording = _restrict_wording(settings.relations, wording, f"the relations of {settings.source}")
    subjects = _choose_subjects(settings, values["subjects"], wording)
    asked_relations = [relation for relation in wording.relations if wording.questions[relation]]
    trained_subjects, trained_relations = _draw_split(settings, len(subjects), asked_relations)
    order = _rng(settings, "augmented").sample(range(len(subjects)), len(subjects))
    augmented = set(order[: round(settings.augmented_share * len(subjects))])
    people = []
    for index, row in enumerate(subjects):
        person = f"S{index:06d}"
        facts = []
        for number, fact in enumerate(row["facts"]):
            trained = {
                "subject": index in trained_subjects,
                "relation": fact["relation"] in trained_relations,
                "given": fact["split"] == "id",
            }[settings.split]
            if settings.split == "given" and fact["split"] not in ("id", "ood"):
                raise UserError(
                    f"facts.split is given, but {settings.source} does not say whether questions about "
                    f"{row['name']!r} are trained; import a file with a column split of id and ood, or use "
                    "facts.split: subject"
                )
            id, aliases = f"{person}.{number}", tuple(fact["aliases"])
            facts.append(Fact(id, person, row["name"], fact["relation"], fact["object"], trained, row["type"], aliases))
        if len({fact.trained for fact in facts}) == 1:  # then it is said of the subject
            in_distribution = bool(facts[0].trained)
            facts = [replace(fact, trained=None) for fact in facts]
        else:
            in_distribution = True
        pronoun = row.get("pronoun") or ""
        people.append(Person(person, row["name"], pronoun, in_distribution, index in augmented, 1, tuple(facts)))
    if asked_relations:
        _check_both_sides(settings, people, asked_relations)
    return World(settings, tuple(people), wording)


def _choose_subjects(
    settings: FactSettings, rows: Sequence[dict[str, Any]], wording: Wording
) -> Sequence[dict[str, Any]]:
    """The subjects of a source, each with its facts of the wording's relations; as many as the settings say.

    Raises:
        UserError: there are fewer.
    """
    subjects = []
    for row in rows:
        facts = [fact for fact in row["facts"] if fact["relation"] in wording.relations]
        if facts:
            subjects.append(row | {"facts": facts})
    if settings.subjects is None:
        return subjects
    if settings.subjects > len(subjects):
        raise UserError(
            f"facts.subjects is {settings.subjects}, but {settings.source} holds {len(subjects)}; leave it out to "
            "take all"
        )
    picked = _rng(settings, "subjects").sample(range(len(subjects)), settings.subjects)
    return [subjects[index] for index in sorted(picked)]


def _draw_split(settings: FactSettings, subjects: int, relations: Sequence[str]) -> tuple[set[int], set[str]]:
    """The numbers of the subjects and the relations whose questions are trained; a split has only one of them.

    Args:
        subjects: number of subjects.
        relations: those that questions ask about.
    """
    draw = _rng(settings, "split")

    def draw_share(number: int) -> set[int]:
        return set(draw.sample(range(number), round(settings.qa_share * number)))

    if settings.split == "subject":
        return draw_share(subjects), set()
    if settings.split == "relation":
        return set(), {relations[number] for number in draw_share(len(relations))}
    return set(), set()


def _check_both_sides(settings: FactSettings, people: Sequence[Person], relations: Sequence[str]) -> None:
    """Raise a `UserError` unless there are trained and held-out questions about these relations."""
    trained = [
        person.in_distribution if fact.trained is None else fact.trained
        for person in people
        for fact in person.facts
        if fact.relation in relations
    ]
    if len(set(trained)) < 2:
        raise UserError(
            f"the split of {settings.source} by {settings.split} leaves no fact "
            f"{'to test recall on' if any(trained) else 'whose questions are trained'}; change facts.split or "
            f"facts.qa_share, which is {settings.qa_share:g}"
        )


_WORDED = ("statements", "questions", "objects")


def read_world(settings: FactSettings) -> dict[str, Any]:
    """What `crosstrace import` wrote.

    Returns:
        relations {name: {statements, questions, objects}} and subjects [{name, type, pronoun, facts [{relation, object,
        aliases, split}]}]. A relation that nothing asks about has no questions.

    Raises:
        UserError: the source holds no such file, or settings of drawn people are given with it.
    """
    default = FactSettings()
    for name in ("people", "population", "frequency"):
        if getattr(settings, name) != getattr(default, name):
            raise UserError(
                f"facts.{name} is of people that are drawn, but facts.source names one's own; leave {name} out"
                + (", or use facts.subjects" if name == "people" else "")
            )
    path = expanded(settings.source or "") / "world.json"
    if not path.is_file():
        raise UserError(
            f"facts.source = {settings.source} holds no world.json; expected a folder that `crosstrace import` wrote, "
            "relative to the one that the command is given in"
        )
    values = read_json(path)
    try:
        relations = {
            name: {part: [_text(v) for v in row[part]] for part in _WORDED} for name, row in values["relations"].items()
        }
        subjects = [
            {
                "name": _text(row["name"]),
                "pronoun": _text(row["pronoun"]) if row.get("pronoun") else None,
                "type": _text(row["type"]) if row.get("type") else "",
                "facts": [
                    {
                        "relation": f["relation"],
                        "object": _text(f["object"]),
                        "aliases": [_text(alias) for alias in f.get("aliases", ())],
                        "split": f.get("split"),
                    }
                    for f in row["facts"]
                    if relations[f["relation"]]
                ],
            }
            for row in values["subjects"]
        ]
        if not all(row["statements"] for row in relations.values()):
            raise ValueError("a relation without statements")
        if not subjects or not all(row["facts"] for row in subjects):
            raise ValueError("a subject without facts")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} is not what `crosstrace import` writes ({type(error).__name__}: {error}); was it edited? Import "
            "the facts again"
        ) from None
    return {"relations": relations, "subjects": subjects}


def _text(value: Any) -> str:
    """The value, which is a text. Raises a `ValueError` if it is none."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"{value!r} in place of a text")
    value.encode()  # (half a surrogate pair is no text)
    return value


def _rng(settings: FactSettings, purpose: str) -> random.Random:
    """An independent stream for each purpose, so that one setting does not move another's draws."""
    return random.Random(f"crosstrace/{settings.population}/{settings.seed}/{purpose}")


def _pick(draw: random.Random, values: tuple[str, ...]) -> str:
    return values[draw.randrange(len(values))]


def _zipf(rank: int, settings: FactSettings) -> int:
    """How often the person of a rank occurs in an epoch."""
    return max(1, round(settings.zipf_top / rank**settings.zipf_exponent))


def _draw_names(settings: FactSettings) -> list[str]:
    """Distinct full names, none of whose parts belongs to one person alone.

    Population A takes the names whose list indices add up to an even number, B the others, so no name is in both.
    Small worlds use the head of each list, else parts would be unique. A person with a unique part is drawn anew.
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
            kept = []  # in a small world the names that were kept may leave no room for another one
        taken, drawn = set(kept), kept
    return [" ".join(values[i] for values, i in zip(lists, name)) for name in drawn]


def people_on_both_sides(facts: FactSettings, where: str) -> int:
    """How many people have trained questions.

    Raises:
        UserError: all or none of them have.
    """
    trained = round(facts.qa_share * facts.people)
    if not 0 < trained < facts.people:
        raise UserError(
            f"{where}: facts.qa_share = {facts.qa_share:g} of {facts.people} people leaves "
            f"nobody {'whose questions are trained' if facts.qa_share < 0.5 else 'to test recall on'}; "
            "expected a share that leaves people on both sides, e.g. 0.5"
        )
    return trained
