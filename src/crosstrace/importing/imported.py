"""What an import keeps, what it drops, and why. It reads no files."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from crosstrace.results.imported import LONG, REASONS

COLUMNS = ("subject", "relation", "object", "type", "pronoun", "split", "statement", "question")  # of facts
ROW_COLUMNS = ("text", "prompt", "completion", "subject", "split")  # of rows of text
ROWS = ("store", "store-completions", "recall", "recall-completions")  # files of rows of text
SPLITS = ("id", "ood")
# relation -> "statements" or "questions" -> the different patterns that the files have, in order
Patterns = dict[str, dict[str, dict[str, None]]]
INVISIBLE = re.compile(
    "[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]"
)


@dataclass(frozen=True)
class Source:
    """One row of a file: the file, the row's number and its columns."""

    file: str
    number: int
    values: Mapping[str, Any]


@dataclass
class Imported:
    """What was read, and what became of it.

    Attributes:
        relations: name -> {statements, questions, objects}.
        subjects: {name, type, pronoun, facts [{relation, object, split, and aliases if there are any}]}.
        dropped: (file, row, reason, what) of each row that was not kept.
        read: file -> number of its rows.
        rows: (subject, relation) -> (file, row) of each fact.
        sources: the id of each example of text -> (file, row).
        ways: the fact of each question about a document -> how its answer stands there: one of `alignment.WAYS`,
            `unaligned`, `several` (it needs several facts) or `cut` (in no window of the document as a whole).
        notes: what a reader of results should know of the data.
    """

    relations: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    subjects: list[dict[str, Any]] = field(default_factory=list)
    dropped: list[tuple[str, int, str, str]] = field(default_factory=list)
    read: dict[str, int] = field(default_factory=dict)
    rows: dict[tuple[str, str], tuple[str, int]] = field(default_factory=dict)
    sources: dict[str, tuple[str, int]] = field(default_factory=dict)
    ways: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def drop(self, file: str, row: int, reason: str, what: str) -> None:
        """Note a row that is not kept."""
        self.dropped.append((file, row, reason, what.encode("utf-8", "replace").decode()[:LONG]))

    @property
    def answers(self) -> Counter[str]:
        """How many answers stand in their documents in each way."""
        return Counter(self.ways.values())

    @property
    def kept(self) -> int:
        """Number of rows that were kept: facts, or texts."""
        return sum(self.read.values()) - len(self.dropped)

    def counts(self) -> dict[str, Any]:
        """Rows read = facts kept + rows dropped, the latter by reason."""
        return {
            "read": sum(self.read.values()),
            "kept": self.kept,
            "dropped": dict(Counter(reason for _, _, reason, _ in self.dropped)),
            "subjects": len(self.subjects),
            "relations": {name: len(facts) for name, facts in self.by_relation().items()},
        } | ({"answers": dict(self.answers)} if self.answers else {})

    def by_relation(self) -> dict[str, list[tuple[dict[str, Any], str]]]:
        """Relation -> (subject, object) of each of its facts."""
        facts: dict[str, list[tuple[dict[str, Any], str]]] = {name: [] for name in self.relations}
        for subject in self.subjects:
            for fact in subject["facts"]:
                facts.setdefault(fact["relation"], []).append((subject, fact["object"]))
        return facts


def counted(number: int, noun: str) -> str:
    """A number of things."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def tidy(value: Any) -> str:
    """A value as one line of composed characters, without blanks at its ends."""
    return " ".join(unicodedata.normalize("NFC", str(value)).split())


def has_half_letter(text: str) -> bool:
    """Whether a text holds half a surrogate pair."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def row_text(values: Mapping[str, Any]) -> str:
    """A row of facts as one short text."""
    cells = (values.get(name) for name in COLUMNS[:3])
    text = " | ".join("" if cell is None else str(cell) for cell in cells)
    return text.encode("utf-8", "replace").decode()[:LONG]


def dropped_text(dropped: Mapping[str, int]) -> str:
    """The numbers of dropped rows, each with its reason."""
    return ", ".join(f"{number} × {REASONS[reason]}" for reason, number in dropped.items())
