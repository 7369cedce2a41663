"""Transfer: is a fact that biographies and one question taught available in formats that were never trained?

The same facts are asked in several formats (`FORMATS`), from the question that the world trains, by its other wordings
and statements about the person, to the way back from the facts to the name. In some the model must give the answer, in
others tell it from false ones by log-probability, so a model that answers no such question may still know. A wording
is untrained for the fact, but not for others: the world draws one for each. Only the ways back and to yes are all new.

Takes a model and the world that it was taught; it knows no strategies, nor what a base was taught before, and draws the
same facts, wordings and false answers whenever it is asked again. With `facts.template: chat` whatever is asked is a
conversation, and statements are plain text.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from crosstrace.analyses.consistency import mean_over_people
from crosstrace.core.errors import UserError
from crosstrace.data.chat import in_template
from crosstrace.data.facts import Fact, Person, World
from crosstrace.data.text import Example, Mention, Span, biographies, fill, questions
from crosstrace.data.tokens import Encoded, encode
from crosstrace.data.wording import Wording
from crosstrace.training.evaluation import TOKENS, recall

PARTS = ("qa_id", "qa_ood")  # of the people: whose questions are trained, and the others
FORMATS = ("asked", "wording", "cloze", "choice", "pair", "true_statement", "yes_no", "reversed")
ENDED = ("asked", "wording")  # where the end of the answer counts too, as everywhere in recall
STATED = ("cloze", "true_statement")  # nothing is asked, so they are plain text under any template
TIE = 1e-6  # log-probabilities, in nats, that differ by less are equal
Row = dict[str, Any]
_Wording = tuple[str, str]  # its name and its pattern


@dataclass(frozen=True)
class Item:
    """One thing that is asked in one format.

    Attributes:
        person: whom it is about.
        chance: of being right without knowing the fact.
        candidates: texts of which the first is true; only their `answer` tokens are judged. Of one alone the model must
            give the answer itself, of several the true one must be the likeliest.
    """

    person: str
    chance: float
    candidates: tuple[Encoded, ...]


def transfer(
    model: nn.Module,
    tokenizer: Any,
    world: World,
    *,
    parts: Mapping[str, str] | None = None,
    number: int = 96,
    k: int = 4,
    seed: int = 0,
    tokens: int = TOKENS,
) -> list[Row]:
    """How many of a world's facts a model gives or recognises in each format; for the other arguments see `formats`.

    Args:
        parts: what a row calls the people -> which of PARTS they are; those names themselves if not given.

    Returns:
        a row for each part and format: part, format; correct: the share of right answers, with correct_low and
        correct_high (95 % cluster bootstrap over people); chance; logprob: mean log-probability in nats of the true
        candidate's judged tokens; n, people: items, and different people among them; absent: None, or why the format
        isn't asked, with None and 0 for the numbers. Ties are shared: a true candidate that is as likely as m others is
        right to 1/(m + 1), so a model to which all are alike is at chance.

    Raises:
        UserError: as `formats`.
    """
    rows: list[Row] = []
    for label, part in (parts or dict(zip(PARTS, PARTS))).items():
        found, absent = formats(world, tokenizer, part, number=number, k=k, seed=seed)
        texts = {id(text): text for items in found.values() for item in items for text in item.candidates}
        judged = recall(model, tokenizer, list(texts.values()), tokens)
        exact, logprob = (dict(zip(texts, values)) for values in (judged.exact, judged.logprob))
        for name in FORMATS:
            items, right = found.get(name, []), []
            people = [item.person for item in items]
            for item in items:
                own = [id(text) for text in item.candidates]
                right.append(share_right([logprob[i] for i in own]) if own[1:] else float(exact[own[0]]))
            row: Row = {"part": label, "format": name} | mean_over_people("correct", np.array(right), people)
            row["chance"] = float(np.mean([item.chance for item in items])) if items else None
            row["logprob"] = float(np.mean([logprob[id(item.candidates[0])] for item in items])) if items else None
            rows.append(row | {"n": len(items), "people": len(set(people)), "absent": absent.get(name)})
    return rows


def share_right(logprobs: Sequence[float]) -> float:
    """Of the candidates' log-probabilities, the true one first: 1 if it is the highest, 1/m if m are, else 0."""
    values = np.asarray(logprobs, dtype=float)
    highest = values >= values.max() - TIE
    return 1 / int(highest.sum()) if highest[0] else 0.0


def formats(
    world: World, tokenizer: Any, part: str, *, number: int = 96, k: int = 4, seed: int = 0
) -> tuple[dict[str, list[Item]], dict[str, str]]:
    """The facts of some people in every format, and of the formats that can't be asked, why.

    asked: the question as the world words it; wording: as it doesn't, for this fact. cloze: a statement with the full
    name, as none of the person's biographies words the fact, up to its object. choice: the question with the true
    object among k of the relation; pair: among two. true_statement: the statement against the same with a false object,
    every token of it but a first one that nothing predicts; no question is asked. yes_no: the answer to "Is it true
    that …?", of a true and a false statement for each fact. reversed: all of a person's facts ("Who was born on …? Who
    studied at …?", wordings as in cloze where there are), and the name among k people's of the same part who do not
    have them all, once for each person.

    The greedy answer must be right in the first three, with its end in asked and wording (see `recall`). In the others
    the judged tokens are those of the object, name or word alone, and their log-probabilities are summed: a shorter one
    has it easier, but which one is true was drawn from all with equal chances, so chance stays 1/k. In the first three
    chance is that of a guess among the relation's objects.

    Args:
        part: of PARTS, the people.
        number: of facts, the same in all formats that have a wording for them: of as many people as can be, and of all
            relations alike.
        k: candidates.
        seed: of the facts, the wordings and the false candidates.

    Returns:
        format -> items, without the absent ones; absent format -> the reason: wordings that are all trained, too few
        people, or words that the tokenizer does not have.

    Raises:
        UserError: an unknown part, no facts, more or fewer candidates than can be; the tokenizer gives no offsets.
    """
    if part not in PARTS:
        raise UserError(f"unknown part {part!r} of the people; expected of {', '.join(PARTS)}")
    if number < 1:
        raise UserError(f"number is {number}; expected at least one fact to ask about")
    most = min(len(values) for values in world.wording.objects.values())
    if not 2 <= k <= most:
        raise UserError(f"k is {k}; expected from 2 candidates to {most}, the objects that a relation has")
    people = [person for person in world.people if person.in_distribution == (part == "qa_id")]
    if not people:
        return {}, dict.fromkeys(FORMATS, f"nobody in this world is of the part {part}")
    order = random.Random(f"transfer/{seed}/{part}").sample(people, len(people))
    chosen = replace(world, people=tuple(order[:number]))  # a person's texts depend on no other person
    trained: dict[str, list[Example]] = {}
    for example in questions(chosen):
        trained.setdefault(example.mentions[0].fact, []).append(example)
    told = {(mention.fact, mention.wording) for text in biographies(chosen) for mention in text.mentions}

    drafts: dict[str, list[_Draft]] = {name: [] for name in FORMATS}
    laps = range(max(len(person.facts) for person in order))
    turns = [(lap, place) for lap in laps for place, person in enumerate(order) if lap < len(person.facts)]
    for lap, place in turns[:number]:
        fact = order[place].facts[(place + lap) % len(order[place].facts)]
        draw = random.Random(f"transfer/{seed}/{fact.id}")
        for name, draft in _about_fact(
            fact, world.wording, trained[fact.id], _untold(fact, world.wording, told), k, draw
        ):
            drafts[name].append(draft)
    for person in chosen.people:
        draw = random.Random(f"transfer/{seed}/{person.id}")
        strangers = [one for one in people if _objects(one) != _objects(person)]
        if len(strangers) >= k - 1:
            wordings = [
                draw.choice(_untold(fact, world.wording, told) or _wordings(fact, world.wording))
                for fact in person.facts
            ]
            drafts["reversed"].append(_reversed(person, wordings, draw.sample(strangers, k - 1)))

    reasons = {
        "wording": "the questions of every fact are trained in all wordings",
        "reversed": f"no person of {part} can be told from {k - 1} others by the facts",
    }
    found, absent = {}, {}
    for name, asked in drafts.items():
        if not asked:
            absent[name] = reasons.get(name, "the biographies tell every fact in all wordings")
            continue
        examples = [example for draft in asked for example in draft.candidates]
        encoded = encode(tokenizer, examples)
        unknown = next((item.example.text for item in encoded if _unknown(item, tokenizer)), None)
        if unknown is not None:
            absent[name] = f"the tokenizer does not have all words of {unknown!r}"
            continue
        if world.settings.template == "chat" and name not in STATED:
            answered = [replace(example, targets=(example.mentions[0].object,)) for example in examples]
            encoded = encode(tokenizer, in_template(tokenizer, answered))
        texts = iter(encoded if name in ENDED else map(_unended, encoded))
        found[name] = [Item(d.person, d.chance, tuple(next(texts) for _ in d.candidates)) for d in asked]
    return found, absent


@dataclass(frozen=True)
class _Draft:
    """An item before it is tokenized; the object of each candidate's mention is what is judged."""

    person: str
    chance: float
    candidates: tuple[Example, ...]


def _about_fact(
    fact: Fact, worded: Wording, trained: Sequence[Example], untold: Sequence[_Wording], k: int, draw: random.Random
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
    if not untold:
        return
    name, pattern = draw.choice(untold)
    (right, mention), (wrong, _) = (fill(pattern, one, name, fact.subject, 0) for one in (fact, false))
    yield "cloze", _Draft(person, guess, (_example(right, mention, mention.object, question),))
    statements = [_example(text, mention, (0, len(text)), question) for text in (right, wrong)]
    yield "true_statement", _Draft(person, 1 / 2, tuple(statements))
    for one, words in ((fact, ("yes", "no")), (false, ("no", "yes"))):
        text, mention = fill(f"Is it true that {pattern.removesuffix('.')}?", one, name, fact.subject, 0)
        start = len(text) + 1
        said = [_example(f"{text} {word}", mention, (start, start + len(word)), question) for word in words]
        yield "yes_no", _Draft(person, 1 / 2, tuple(said))


def _reversed(person: Person, wordings: Sequence[_Wording], strangers: Sequence[Person]) -> _Draft:
    """A person's facts and the names of some people, the own first."""
    asked = [
        fill(pattern.removesuffix(".") + "?", fact, name, "Who", 0)[0]
        for fact, (name, pattern) in zip(person.facts, wordings)
    ]
    text = " ".join(asked) + " "
    split = "id" if person.in_distribution else "ood"
    candidates = []
    for name in (person.name, *(stranger.name for stranger in strangers)):
        span = (len(text), len(text) + len(name))
        mention = Mention(person.id, "reversed", "+".join(own for own, _ in wordings), span, (), span)
        whole = (0, span[1])
        candidates.append(Example(f"{person.id}.reversed", "qa", text + name, person.id, split, (whole,), (mention,)))
    return _Draft(person.id, 1 / len(candidates), tuple(candidates))


def _example(text: str, mention: Mention, judged: Span, like: Example) -> Example:
    """An example about the same person as another, whose object is what is judged; all of its text is a target."""
    return replace(like, text=text, targets=((0, len(text)),), mentions=(replace(mention, object=judged),))


def _unended(item: Encoded) -> Encoded:
    """The text up to the end of what is judged, that alone as its answer; nothing predicts a text's first token."""
    cut = item.about(0)
    judged = cut.targets["object"].clone()
    judged[0] = False
    return replace(cut, targets={"answer": judged})


def _unknown(item: Encoded, tokenizer: Any) -> bool:
    """Whether one of the text's own tokens stands for unknown words."""
    own = item.ids[item.targets["train"]]
    if tokenizer.eos_token_id is not None:
        own = own[:-1]  # the end, which some tokenizers' unknown token also is
    return tokenizer.unk_token_id is not None and bool((own == tokenizer.unk_token_id).any())


def _wordings(fact: Fact, worded: Wording) -> list[_Wording]:
    """The names and patterns of all statements of a fact."""
    return [(f"bio.{fact.relation}.{i}", pattern) for i, pattern in enumerate(worded.statements[fact.relation])]


def _untold(fact: Fact, worded: Wording, told: Collection[tuple[str, str]]) -> list[_Wording]:
    """Those that are in no biography of the fact's person."""
    return [wording for wording in _wordings(fact, worded) if (fact.id, wording[0]) not in told]


def _objects(person: Person) -> tuple[str, ...]:
    return tuple(fact.object for fact in person.facts)
