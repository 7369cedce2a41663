"""Wordings of one's own relations, from YAML."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from crosstrace.core.errors import UserError
from crosstrace.experiment.config import read_yaml
from crosstrace.importing.kept import INVISIBLE, LONG, tidy


def wordings(path: Path) -> dict[str, dict[str, list[str]]]:
    """The wordings of a YAML file."""
    values = read_yaml(path, "docs/guide.md's")
    found: dict[str, dict[str, list[str]]] = {}
    for relation, row in values.items():
        where = f"{path}: {relation}"
        if not isinstance(row, dict) or {*row} - {"statements", "questions"}:
            raise UserError(f"{where} is {row!r}; expected statements and questions, each a list of patterns")
        found[tidy(relation)] = {}
        for part, patterns in row.items():
            if not isinstance(patterns, list) or (not patterns and part == "statements"):
                raise UserError(
                    f"{where}: {part} is {patterns!r}; expected a list of patterns"
                    + (", or [] where nothing is asked" if part == "questions" else "")
                )
            found[tidy(relation)][part] = [checked_pattern(p, part[:-1], f"{where}: {part}") for p in patterns]
    return found


def checked_pattern(text: Any, kind: str, where: str) -> str:
    """A pattern of one statement or question, with the words of its relation in brackets.

    Raises:
        UserError: braces other than {subject}, {object} and {type}, one of the first two missing or twice, brackets
            that don't close.
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
    wanted = ("{subject}", "{object}") if kind == "statement" else ("{subject}",)
    counts = {name: pattern.count(name) for name in ("{subject}", "{object}")}
    if any(counts[name] != (name in wanted) for name in counts) or re.search(
        r"[{}]", re.sub(r"\{(subject|object|type)\}", "", pattern)
    ):
        raise UserError(
            f"{where} is {text!r}; expected {' and '.join(wanted)}, each once"
            + (", and no {object}: the answer follows the question" if kind == "question" else "")
            + ", and no other braces but {type}"
        )
    if "[" in pattern or "]" in pattern:
        if re.sub(r"\[[^][{}]*\]", "", pattern).strip("[]") != re.sub(r"\[[^][{}]*\]", "", pattern) or re.search(
            r"[][]", re.sub(r"\[[^][{}]*\]", "", pattern)
        ):
            raise UserError(
                f"{where} is {text!r}; expected [brackets] around words of the relation, closed and not nested"
            )
        return pattern
    return _bracketed(pattern)


def _bracketed(pattern: str) -> str:
    """All words but the subject, its type and the object, marked as the relation's."""
    pieces = re.split(r"(\{subject\}|\{object\}|\{type\})", pattern)
    marked = (re.sub(r"(\w(?:.*\w)?)", r"[\1]", piece, count=1) for piece in pieces)
    return "".join(piece if piece.startswith("{") else words for piece, words in zip(pieces, marked))
