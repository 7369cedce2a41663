"""Facts to examples: the texts of all formats, with the character spans of subjects, relations and objects. No tokens.

A biography stores facts. A question with its answer, or a statement to complete, recalls one. Spans are [start, end)
offsets into the example's own text, from which `tokens` later finds the tokens of any tokenizer.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from crosstrace.core.errors import UserError
from crosstrace.core.files import expanded
from crosstrace.data.facts import Fact, FactSettings, Person, World
from crosstrace.data.tasks import TaskSettings, default_tasks

Span = tuple[int, int]
KNOWN = "known"  # the task of real facts that the base knows: it may be replayed, and is never traced
MOST_REPEATS = 100_000  # of an example in an epoch
NO_QUESTIONS = (
    "there are no questions, so recall of held-out facts (OOD), sharing between tasks, ablation, grafting, the "
    "mechanism and the claims of the paper cannot be measured; measured are recall of the texts themselves, the trace "
    "of this one task and how far the weights move"
)


@dataclass(frozen=True)
class Mention:
    """One fact as one text words it."""

    fact: str
    relation: str
    wording: str
    subject: Span
    relation_words: tuple[Span, ...]
    object: Span


@dataclass(frozen=True)
class Example:
    """One text of one task.

    Attributes:
        targets: the spans that training predicts: all of a biography, the answer of a question. An end token follows
            the last target if the tokenizer has one.
        split: `id` or `ood`: whether the person's questions are trained.
        repeats: how often the example occurs in an epoch.
        has_special_tokens: whether the text itself holds all of its special tokens, its end token last, as a chat
            template writes them.
        open_ended: whether an answer needs no end token.
        aliases: other right answers to the question.
    """

    id: str
    task: str
    text: str
    person: str
    split: str
    targets: tuple[Span, ...]
    mentions: tuple[Mention, ...]
    repeats: int = 1
    has_special_tokens: bool = False
    open_ended: bool = False
    aliases: tuple[str, ...] = ()


def texts(settings: FactSettings, tasks: Mapping[str, TaskSettings] | None = None) -> dict[str, list[Example]]:
    """The examples of every task.

    They are about drawn people, or about the facts or rows of a source that `crosstrace import` wrote, or they come
    from a task's own file.

    Args:
        tasks: if not given, biographies and questions, called bio and qa.

    Raises:
        UserError: as `World.draw`, or the rows of a source or file cannot be read.
    """
    tasks = default_tasks() if tasks is None else tasks
    rows: dict[str, list[Example]] = {}
    if settings.source is not None and not (expanded(settings.source) / "world.json").exists():
        files = {source: expanded(settings.source) / name for source, name in ROW_FILES.items()}
        if all(path.is_file() for path in files.values()):
            rows = {source: read_jsonl(path) for source, path in files.items()}
    world = World.draw(settings) if not rows and any(task.is_of_world for task in tasks.values()) else None
    examples = {}
    for name, task in tasks.items():
        if not task.is_of_world:
            items = _read_file(name, task.source)
        elif world is not None:
            items = MAKERS[task.source](world)
        elif task.source in rows:
            items = rows[task.source]
        else:
            raise UserError(
                f"tasks.{name}.source is {task.source}, but {settings.source} holds rows of text alone; expected a "
                f"folder of facts with world.json, or one of {', '.join(rows)}"
            )
        examples[name] = [item if item.task == name else replace(item, task=name) for item in items]
    return examples


def _read_file(task: str, source: str) -> list[Example]:
    """A task's own examples: JSONL as `write_jsonl` writes it, or text with one example a line."""
    path = expanded(source)
    if not path.is_file():
        raise UserError(
            f"tasks.{task}.source = {source} is no file; expected {', '.join(MAKERS)}, a .jsonl file of examples, or a "
            "text file in UTF-8 with one text a line"
        )
    return read_jsonl(path) if path.suffix == ".jsonl" else read_lines(path, task, f"tasks.{task}.source")


def read_lines(path: Path, task: str, setting: str) -> list[Example]:
    """The lines of a text file, each an example that is about nobody.

    Args:
        setting: what an error calls the file.

    Raises:
        UserError: it is not text, or has no line of text.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(f"{setting} = {path} is not text in UTF-8 ({error})") from None
    examples = [
        Example(f"{task}.{number}", task, line, f"{task}.{number}", "id", ((0, len(line)),), ())
        for number, line in enumerate(lines)
        if line
    ]
    if not examples:
        raise UserError(f"{setting} = {path} holds no line of text; expected one text a line")
    return examples


def biographies(world: World) -> list[Example]:
    """The biographies of every person (task `bio`)."""
    return [example for person in world.people for example in _biographies(world, person)]


def questions(world: World) -> list[Example]:
    """The question-answer pairs of every person (task `qa`), of both splits."""
    return [example for person in world.people for example in _questions(world, person)]


def _biographies(world: World, person: Person) -> list[Example]:
    """The biographies of one person."""
    settings = world.settings
    draw = random.Random(f"crosstrace/{settings.population}/{settings.seed}/bio/{person.id}")
    number = settings.augmented_biographies if person.augmented else settings.biographies
    examples = []
    for index in range(number):
        facts = list(person.facts)
        if settings.order == "permuted" or person.augmented:
            draw.shuffle(facts)
        by_name = {"name": True, "pronoun": False, "either": draw.random() < 0.5}[settings.subject]
        text, mentions = "", []
        for fact in facts:
            patterns = world.wording.statements[fact.relation]
            chosen = draw.randrange(len(patterns))
            subject = fact.subject if by_name or not mentions or not person.pronoun else person.pronoun
            sentence, mention = fill(patterns[chosen], fact, f"bio.{fact.relation}.{chosen}", subject, len(text))
            text += sentence + " "
            mentions.append(mention)
        text = text.rstrip()
        split = "id" if person.in_distribution else "ood"
        examples.append(
            Example(
                f"{person.id}.bio.{index}",
                "bio",
                text,
                person.id,
                split,
                ((0, len(text)),),
                tuple(mentions),
                person.repeats,
            )
        )
    return examples


def _questions(world: World, person: Person) -> list[Example]:
    """The questions about one person, with their answers.

    Raises:
        UserError: a relation has fewer wordings of its question than the settings ask for.
    """
    settings = world.settings
    draw = random.Random(f"crosstrace/{settings.population}/{settings.seed}/qa/{person.id}")
    examples = []
    for fact in person.facts:
        patterns = world.wording.questions[fact.relation]
        if not patterns:  # nothing is asked about the relation
            continue
        if settings.questions > len(patterns):
            raise UserError(
                f"facts.questions is {settings.questions}, but relation {fact.relation} has {len(patterns)} wordings "
                f"of its question; use at most {len(patterns)}"
            )
        for index, chosen in enumerate(draw.sample(range(len(patterns)), settings.questions)):
            pattern = patterns[chosen] + " {object}"
            text, mention = fill(pattern, fact, f"qa.{fact.relation}.{chosen}", fact.subject, 0)
            split = "id" if (person.in_distribution if fact.trained is None else fact.trained) else "ood"
            examples.append(
                Example(
                    f"{fact.id}.qa.{index}",
                    "qa",
                    text,
                    person.id,
                    split,
                    (mention.object,),
                    (mention,),
                    person.repeats,
                    aliases=fact.aliases,
                )
            )
    return examples


def statements_to_complete(world: World) -> list[Example]:
    """A statement about every fact, to be completed by its object (task `cloze`).

    Its wording is one that none of the person's biographies has, if there is one. If all statements of a relation name
    the object before the subject, there is none about it.
    """
    used = {(mention.fact, mention.wording) for text in biographies(world) for mention in text.mentions}
    examples = []
    for person in world.people:
        for fact in person.facts:
            patterns = world.wording.statements[fact.relation]
            fitting = [
                number
                for number, pattern in enumerate(patterns)
                if pattern.index("{subject}") < pattern.index("{object}")
            ]
            unused = [number for number in fitting if (fact.id, f"bio.{fact.relation}.{number}") not in used]
            if not fitting:
                continue
            number = random.Random(f"crosstrace/cloze/{fact.id}").choice(unused or fitting)
            text, mention = fill(patterns[number], fact, f"cloze.{fact.relation}.{number}", fact.subject, 0)
            end = mention.object[1]
            words = tuple(span for span in mention.relation_words if span[1] <= end)
            split = "id" if (person.in_distribution if fact.trained is None else fact.trained) else "ood"
            examples.append(
                Example(
                    f"{fact.id}.cloze",
                    "cloze",
                    text[:end],
                    person.id,
                    split,
                    (mention.object,),
                    (replace(mention, relation_words=words),),
                    person.repeats,
                    aliases=fact.aliases,
                )
            )
    return examples


def fill(pattern: str, fact: Fact, wording: str, subject: str, start: int) -> tuple[str, Mention]:
    """Fill a pattern.

    A pronoun that begins the sentence gets a capital; names and objects stay as they are.

    Args:
        subject: the name or pronoun of the subject.
        start: where the sentence begins in its text; the spans count from the text's beginning.
    """
    text, spans = "", {"subject": (0, 0), "object": (0, 0)}
    relation_words: list[Span] = []
    opened = 0
    for piece in re.split(r"(\{subject\}|\{object\}|\{type\}|\[|\])", pattern):
        if piece == "[":
            opened = start + len(text)
        elif piece == "]":
            relation_words.append((opened, start + len(text)))
        elif piece in ("{subject}", "{object}"):
            value = subject if piece == "{subject}" else fact.object
            if not text and value not in (fact.subject, fact.object):
                value = value[0].upper() + value[1:]
            spans[piece[1:-1]] = (start + len(text), start + len(text) + len(value))
            text += value
        else:
            text += fact.type if piece == "{type}" else piece
    return text, Mention(fact.id, fact.relation, wording, spans["subject"], tuple(relation_words), spans["object"])


def write_jsonl(path: Path, examples: Iterable[Example]) -> None:
    """Write one example a line; the same examples give the same bytes. What is False, or no alias, is left out."""
    lines = []
    for example in examples:
        row = asdict(example)
        row = {name: value for name, value in row.items() if value is not False and (value or name != "aliases")}
        lines.append(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


def read_jsonl(path: Path) -> list[Example]:
    """Read what `write_jsonl` wrote.

    Raises:
        UserError: there is no such file, or a line is not an example.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; expected the examples that `crosstrace data` writes")
    examples = []
    # read as bytes, so that a line that is no UTF-8 is reported like any other broken line
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                example = _example_of(json.loads(line))
                _check_values(example)
                examples.append(example)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise UserError(
                    f"{path} line {number} is not an example ({type(error).__name__}: {error}); expected the JSON that "
                    "`crosstrace data` writes, so the file was edited or truncated"
                ) from None
    return examples


def _example_of(row: Mapping[str, Any]) -> Example:
    """The example of a line that was read. Raises a `KeyError`, `TypeError` or `ValueError` if it is none."""
    mentions = tuple(
        Mention(
            mention["fact"],
            mention["relation"],
            mention["wording"],
            _span(mention["subject"]),
            tuple(_span(span) for span in mention["relation_words"]),
            _span(mention["object"]),
        )
        for mention in row["mentions"]
    )
    return Example(
        row["id"],
        row["task"],
        row["text"],
        row["person"],
        row["split"],
        tuple(_span(span) for span in row["targets"]),
        mentions,
        row["repeats"],
        row.get("has_special_tokens", False),
        row.get("open_ended", False),
        tuple(row.get("aliases", ())),
    )


def _span(value: list[int]) -> Span:
    """A span that was read. Raises a `TypeError` or `ValueError` if it is none."""
    start, end = value
    if not isinstance(start, int) or not isinstance(end, int):
        raise TypeError(f"{value} in place of a first and a last character")
    return start, end


def _check_values(example: Example) -> None:
    """Raise a `ValueError` or `TypeError` unless an example's values are valid texts, and its spans inside its text."""
    words = (example.id, example.task, example.text, example.person, *example.aliases)
    for value in [*words, *(word for m in example.mentions for word in (m.fact, m.relation))]:
        if not isinstance(value, str):
            raise TypeError(f"{value!r:.60} in place of a text")
        value.encode()  # (half a surrogate pair is no text)
    if example.split not in ("id", "ood"):
        raise ValueError(f"split is {example.split!r:.60}; expected id or ood")
    if not isinstance(example.repeats, int) or not 1 <= example.repeats <= MOST_REPEATS:
        raise ValueError(f"repeats is {example.repeats!r:.60}; expected a number from 1 to {MOST_REPEATS:,}")
    for name in ("has_special_tokens", "open_ended"):
        if not isinstance(getattr(example, name), bool):
            raise TypeError(f"{name} is {getattr(example, name)!r:.60}; expected true or false")
    spans = [*example.targets]
    for mention in example.mentions:
        spans += [mention.subject, *mention.relation_words, mention.object]
    for start, end in spans:
        if not 0 <= start <= end <= len(example.text):
            raise ValueError(f"characters {start} to {end} of a text of {len(example.text)}")


MAKERS: Mapping[str, Callable[[World], list[Example]]] = {
    "biographies": biographies,
    "questions": questions,
    "cloze": statements_to_complete,
}
ROW_FILES = {"biographies": "bio.jsonl", "questions": "qa.jsonl"}  # in a folder of imported rows
