"""Facts in the forms of two published data sets: PopQA (a table) and EntityQuestions (a relation a file)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from crosstrace.core.errors import UserError
from crosstrace.data.columns import answers_of

POPQA = ("subj", "prop", "obj", "question")
LEAST = 8  # letters that all questions of one template share


def from_popqa(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of PopQA as a fact, with its question as a pattern if it names the subject."""
    fact = {"subject": row["subj"], "relation": row["prop"], "object": row["obj"]}
    fact["aliases"] = row.get("possible_answers")
    question, subject = row["question"], row["subj"]
    if isinstance(question, str) and isinstance(subject, str) and subject and question.count(subject) == 1:
        fact["question"] = question.replace(subject, "{subject}")
    return fact


def is_entity_questions(values: Any) -> bool:
    """Whether a JSON value is a list of {question, answers} and nothing else."""
    return (
        isinstance(values, list)
        and bool(values)
        and all(isinstance(row, Mapping) and row.keys() == {"question", "answers"} for row in values)
    )


def from_entity_questions(values: Sequence[Mapping[str, Any]], path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The facts of a file of EntityQuestions. What all its questions share is their pattern, the rest is the subject.

    Raises:
        UserError: the questions have no pattern in common, or an answer is no text.
    """
    questions = [row["question"] for row in values]
    if not all(isinstance(question, str) for question in questions):
        raise UserError(f"{path}: a question is no text; expected a list of {{question, answers}}")
    before = _beginning_of_all(questions)
    before = before[: before.rfind(" ") + 1]
    after = _beginning_of_all([question[len(before) :][::-1] for question in questions])[::-1]
    after = after[min((place for place in (after.find(" "), after.find("?")) if place >= 0), default=len(after)) :]
    subjects = [question[len(before) : len(question) - len(after)] for question in questions]
    if len(questions) < 2 or len(before) + len(after) < LEAST or not all(map(str.strip, subjects)):
        raise UserError(
            f"{path} is a list of {{question, answers}}, but its {len(questions)} questions have no wording in common, "
            "so their subjects are not known; expected a file of EntityQuestions, which has one relation, or questions "
            "with their documents (--documents)"
        )
    relation = path.stem.partition(".")[0]
    for number, (subject, row) in enumerate(zip(subjects, values), 1):
        answers = answers_of(row["answers"])
        if answers is None:
            raise UserError(f"{path} record {number}: answers is {row['answers']!r:.60}; expected a list of texts")
        object, *aliases = answers or [None]
        fact = {"subject": subject, "relation": relation, "object": object, "aliases": aliases}
        yield number, fact | {"question": f"{before}{{subject}}{after}"}


def _beginning_of_all(texts: Sequence[str]) -> str:
    """The letters with which all texts begin."""
    first, last = min(texts), max(texts)
    same = next(
        (place for place, pair in enumerate(zip(first, last)) if pair[0] != pair[1]), min(len(first), len(last))
    )
    return first[:same]
