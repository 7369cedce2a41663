"""The formats in which a world's facts are asked, from the trained question to the way back from the facts to a name.

In some formats the model must give the answer. In others it must tell the answer from false ones by log-probability,
so a model that answers no such question may still know the fact.

A wording is untrained for one fact, but not for others, since the world draws a wording for each fact. Only the ways
back to the name, and to "yes", are new for all facts.

Takes a world and a tokenizer; it knows no model. The same seed gives the same facts, wordings and false answers. With
`facts.template: chat` every question is a conversation, and statements are plain text.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from crosstrace.core.errors import UserError
from crosstrace.data.chat import in_template
from crosstrace.data.facts import Fact, Person, World
from crosstrace.data.text import Example, Mention, Span, biographies, fill, questions
from crosstrace.data.tokens import Encoded, encode
from crosstrace.data.wording import Wording

PARTS = ("qa_id", "qa_ood")  # of the people: whose questions are trained, and the others
FORMATS = ("asked", "wording", "cloze", "choice", "pair", "true_statement", "yes_no", "reversed")
ENDED = ("asked", "wording")  # where the end of the answer counts too, as everywhere in recall
STATED = ("cloze", "true_statement")  # these ask no question, so they are plain text under any template
_Wording = tuple[str, str]  # its name and its pattern


@dataclass(frozen=True)
class Item:
    """One question, statement or choice in one format.

    Attributes:
        person: whom it is about.
        chance: of being right without knowing the fact.
        candidates: texts of which the first is true; only their `answer` tokens are judged. If there is one, the model
            must give its answer; if there are several, the true one must be the likeliest.
    """

    person: str
    chance: float
    candidates: tuple[Encoded, ...]


@dataclass(frozen=True)
class _Draft:
    """An item before it is tokenized; the object of each candidate's mention is what is judged."""

    person: str
    chance: float
    candidates: tuple[Example, ...]


def formats(
    world: World, tokenizer: Any, part: str, *, number: int = 96, k: int = 4, seed: int = 0
) -> tuple[dict[str, list[Item]], dict[str, str]]:
    """The facts of some people in every format, and for each format that can't be asked, the reason.

    asked: the question as the world words it; wording: the question in words that are not trained for this fact.
    cloze: a statement up to its object, with the full name, in words that no biography of the person has.
    choice: the question with the true object among k of the relation; pair: among two.
    true_statement: the statement against the same one with a false object. Every token is judged but a first one that
    nothing predicts; no question is asked.
    yes_no: the answer to "Is it true that …?", of a true and a false statement for each fact.
    reversed: all of a person's facts ("Who was born on …? Who studied at …?", worded as in cloze if possible), and the
    name among k people of the same part who do not have all of these facts; once for each person.

    In the first three the greedy answer must be right, with its end in asked and wording (see `recall`); chance is
    that of a guess among the relation's objects. In the others the judged tokens are those of the object, name or word
    alone, and their log-probabilities are summed. A shorter candidate has it easier, but the true one was drawn from
    all with equal chances, so chance stays 1/k.

    Args:
        part: of PARTS, the people.
        number: of facts: from as many people as possible, and from all relations alike. All formats that have a
            wording for them ask the same facts.
        k: candidates.
        seed: of the facts, the wordings and the false candidates.

    Returns:
        format -> items, without the absent formats; absent format -> the reason: all wordings are trained, there are
        too few people, or the tokenizer lacks words.

    Raises:
        UserError: an unknown part, no facts, more or fewer candidates than can be; the tokenizer gives no offsets.
    """
    _check_arguments(world, part, number, k)
    people = [person for person in world.people if person.in_distribution == (part == "qa_id")]
    if not people:
        return {}, dict.fromkeys(FORMATS, f"nobody in this world is of the part {part}")
    reasons = {
        "wording": "the questions of every fact are trained in all wordings",
        "reversed": f"no person of {part} can be told from {k - 1} others by the facts",
    }
    items, absent = {}, {}
    for name, drafts in _draft_formats(world, people, part, number, k, seed).items():
        if not drafts:
            absent[name] = reasons.get(name, "the biographies tell every fact in all wordings")
            continue
        examples = [example for draft in drafts for example in draft.candidates]
        encoded = encode(tokenizer, examples)
        unknown = next((text.example.text for text in encoded if _has_unknown(text, tokenizer)), None)
        if unknown is not None:
            absent[name] = f"the tokenizer does not have all words of {unknown!r}"
            continue
        if world.settings.template == "chat" and name not in STATED:
            answers = [replace(example, targets=(example.mentions[0].object,)) for example in examples]
            encoded = encode(tokenizer, in_template(tokenizer, answers))
        texts = iter(encoded if name in ENDED else map(_cut_after_judged, encoded))
        items[name] = [
            Item(draft.person, draft.chance, tuple(next(texts) for _ in draft.candidates)) for draft in drafts
        ]
    return items, absent


def _check_arguments(world: World, part: str, number: int, k: int) -> None:
    if part not in PARTS:
        raise UserError(f"unknown part {part!r} of the people; expected of {', '.join(PARTS)}")
    if number < 1:
        raise UserError(f"number is {number}; expected at least one fact to ask about")
    most = min(len(values) for values in world.wording.objects.values())
    if not 2 <= k <= most:
        raise UserError(f"k is {k}; expected from 2 candidates to {most}, the objects that a relation has")


def _draft_formats(
    world: World, people: Sequence[Person], part: str, number: int, k: int, seed: int
) -> dict[str, list[_Draft]]:
    """The drafts of each format, for `number` facts of the people of one part."""
    order = random.Random(f"transfer/{seed}/{part}").sample(people, len(people))
    chosen = replace(world, people=tuple(order[:number]))  # a person's texts depend on no other person
    trained: dict[str, list[Example]] = {}
    for example in questions(chosen):
        trained.setdefault(example.mentions[0].fact, []).append(example)
    stated = {(mention.fact, mention.wording) for text in biographies(chosen) for mention in text.mentions}

    drafts: dict[str, list[_Draft]] = {name: [] for name in FORMATS}
    for fact in _facts_in_turn(order, number):
        draw = random.Random(f"transfer/{seed}/{fact.id}")
        unstated = _unstated_wordings(fact, world.wording, stated)
        for name, draft in _draft_fact(fact, world.wording, trained[fact.id], unstated, k, draw):
            drafts[name].append(draft)
    for person in chosen.people:
        draw = random.Random(f"transfer/{seed}/{person.id}")
        strangers = [other for other in people if _objects(other) != _objects(person)]
        if len(strangers) >= k - 1:
            wordings = [
                draw.choice(_unstated_wordings(fact, world.wording, stated) or _wordings(fact, world.wording))
                for fact in person.facts
            ]
            drafts["reversed"].append(_draft_reversed(person, wordings, draw.sample(strangers, k - 1)))
    return drafts


def _facts_in_turn(people: Sequence[Person], number: int) -> list[Fact]:
    """One fact of each person, then a second one of each, and so on, of all relations alike: `number` in all."""
    rounds = range(max(len(person.facts) for person in people))
    turns = [(turn, index) for turn in rounds for index, person in enumerate(people) if turn < len(person.facts)]
    return [people[index].facts[(index + turn) % len(people[index].facts)] for turn, index in turns[:number]]


def _draft_fact(
    fact: Fact, worded: Wording, trained: Sequence[Example], unstated: Sequence[_Wording], k: int, draw: random.Random
) -> Iterator[tuple[str, _Draft]]:
    """One fact in each format but the reversed one."""
    person, values = fact.person, worded.objects[fact.relation]
    others = draw.sample([value for value in values if value != fact.object], k - 1)
    false = replace(fact, object=others[0])
    guess = 1 / len(values)

    question = trained[0]
    (mention,) = question.mentions
    start = mention.object[0]
    answers = [
        _example(question.text[:start] + value, mention, (start, start + len(value)), question)
        for value in (fact.object, *others)
    ]
    yield "asked", _Draft(person, guess, (answers[0],))
    yield "choice", _Draft(person, 1 / k, tuple(answers))
    yield "pair", _Draft(person, 1 / 2, tuple(answers[:2]))
    used = {example.mentions[0].wording for example in trained}
    patterns = [(f"qa.{fact.relation}.{i}", pattern) for i, pattern in enumerate(worded.questions[fact.relation])]
    if unused := [wording for wording in patterns if wording[0] not in used]:
        name, pattern = draw.choice(unused)
        text, mention = fill(pattern + " {object}", fact, name, fact.subject, 0)
        yield "wording", _Draft(person, guess, (_example(text, mention, mention.object, question),))
    if not unstated:
        return
    name, pattern = draw.choice(unstated)
    (right, mention), (wrong, _) = (fill(pattern, version, name, fact.subject, 0) for version in (fact, false))
    yield "cloze", _Draft(person, guess, (_example(right, mention, mention.object, question),))
    statements = [_example(text, mention, (0, len(text)), question) for text in (right, wrong)]
    yield "true_statement", _Draft(person, 1 / 2, tuple(statements))
    for version, words in ((fact, ("yes", "no")), (false, ("no", "yes"))):
        text, mention = fill(f"Is it true that {pattern.removesuffix('.')}?", version, name, fact.subject, 0)
        start = len(text) + 1
        replies = [_example(f"{text} {word}", mention, (start, start + len(word)), question) for word in words]
        yield "yes_no", _Draft(person, 1 / 2, tuple(replies))


def _draft_reversed(person: Person, wordings: Sequence[_Wording], strangers: Sequence[Person]) -> _Draft:
    """A person's facts, and as candidates this person's name and those of the strangers."""
    asked = [
        fill(pattern.removesuffix(".") + "?", fact, name, "Who", 0)[0]
        for fact, (name, pattern) in zip(person.facts, wordings)
    ]
    text = " ".join(asked) + " "
    split = "id" if person.in_distribution else "ood"
    wording = "+".join(name for name, _ in wordings)
    candidates = []
    for name in (person.name, *(stranger.name for stranger in strangers)):
        span = (len(text), len(text) + len(name))
        mention = Mention(person.id, "reversed", wording, span, (), span)
        whole = (0, span[1])
        candidates.append(Example(f"{person.id}.reversed", "qa", text + name, person.id, split, (whole,), (mention,)))
    return _Draft(person.id, 1 / len(candidates), tuple(candidates))


def _example(text: str, mention: Mention, judged: Span, like: Example) -> Example:
    """An example about the same person as `like`. What is judged is its object; all of its text is a target."""
    return replace(like, text=text, targets=((0, len(text)),), mentions=(replace(mention, object=judged),))


def _cut_after_judged(text: Encoded) -> Encoded:
    """The text up to the end of the judged tokens, which are its answer; nothing predicts a text's first token."""
    cut = text.about(0)
    judged = cut.targets["object"].clone()
    judged[0] = False
    return replace(cut, targets={"answer": judged})


def _has_unknown(text: Encoded, tokenizer: Any) -> bool:
    """Whether one of the text's tokens stands for unknown words."""
    ids = text.ids[text.targets["train"]]
    if tokenizer.eos_token_id is not None:
        ids = ids[:-1]  # some tokenizers use one token for the end and for unknown words
    return tokenizer.unk_token_id is not None and bool((ids == tokenizer.unk_token_id).any())


def _wordings(fact: Fact, worded: Wording) -> list[_Wording]:
    """The names and patterns of all statements of a fact."""
    return [(f"bio.{fact.relation}.{i}", pattern) for i, pattern in enumerate(worded.statements[fact.relation])]


def _unstated_wordings(fact: Fact, worded: Wording, stated: Collection[tuple[str, str]]) -> list[_Wording]:
    """The wordings of a fact that are in no biography of its person; `stated` has those that are."""
    return [wording for wording in _wordings(fact, worded) if (fact.id, wording[0]) not in stated]


def _objects(person: Person) -> tuple[str, ...]:
    return tuple(fact.object for fact in person.facts)
