"""The wordings of a user's relations, from a YAML file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from crosstrace.core.errors import UserError
from crosstrace.experiment.config import read_yaml
from crosstrace.importing.imported import INVISIBLE, LONG, tidy


def read_wordings(path: Path) -> dict[str, dict[str, list[str]]]:
    """The wordings of a YAML file: relation -> {statements, questions} -> patterns.

    Raises:
        UserError: the file is malformed, or one of its patterns is.
    """
    values = read_yaml(path, "docs/guide.md's")
    wordings: dict[str, dict[str, list[str]]] = {}
    for relation, row in values.items():
        where = f"{path}: {relation}"
        if not isinstance(row, dict) or {*row} - {"statements", "questions"}:
            raise UserError(f"{where} is {row!r}; expected statements and questions, each a list of patterns")
        wordings[tidy(relation)] = {}
        for part, patterns in row.items():
            if not isinstance(patterns, list) or (not patterns and part == "statements"):
                raise UserError(
                    f"{where}: {part} is {patterns!r}; expected a list of patterns"
                    + (", or [] where nothing is asked" if part == "questions" else "")
                )
            checked = [checked_pattern(pattern, part[:-1], f"{where}: {part}") for pattern in patterns]
            wordings[tidy(relation)][part] = checked
    return wordings


def checked_pattern(text: Any, kind: str, where: str) -> str:
    """A pattern of one statement or question, with the words of its relation in brackets.

    Args:
        kind: "statement" or "question".
        where: what an error calls the pattern.

    Raises:
        UserError: it has braces other than {subject}, {object} and {type}, lacks one of the first two or has it twice,
            or its brackets don't close.
    """
    if not isinstance(text, str) or not text.strip():
        raise UserError(
            f"{where} is {text!r}; expected a pattern with {{subject}}{' and {object}' * (kind == 'statement')}"
        )
    if len(text) > 10 * LONG or INVISIBLE.search(text):
        raise UserError(f"{where} is {text[:60]!r}…; expected one sentence without control characters")
    pattern = tidy(text)
    if kind == "question":
        pattern = re.sub(r"\s*\{object\}\W*$", "", pattern)  # the answer follows anyhow
    expected = ("{subject}", "{object}") if kind == "statement" else ("{subject}",)
    counts = {name: pattern.count(name) for name in ("{subject}", "{object}")}
    without_names = re.sub(r"\{(subject|object|type)\}", "", pattern)
    if any(counts[name] != (name in expected) for name in counts) or re.search(r"[{}]", without_names):
        raise UserError(
            f"{where} is {text!r}; expected {' and '.join(expected)}, each once"
            + (", and no {object}: the answer follows the question" if kind == "question" else "")
            + ", and no other braces but {type}"
        )
    if "[" in pattern or "]" in pattern:
        if re.search(r"[][]", re.sub(r"\[[^][{}]*\]", "", pattern)):  # a bracket outside the pairs
            raise UserError(
                f"{where} is {text!r}; expected [brackets] around words of the relation, closed and not nested"
            )
        return pattern
    return _bracketed(pattern)


def _bracketed(pattern: str) -> str:
    """The pattern with brackets around all words but the subject, its type and the object."""
    pieces = re.split(r"(\{subject\}|\{object\}|\{type\})", pattern)
    marked = (re.sub(r"(\w(?:.*\w)?)", r"[\1]", piece, count=1) for piece in pieces)
    return "".join(piece if piece.startswith("{") else words for piece, words in zip(pieces, marked))
