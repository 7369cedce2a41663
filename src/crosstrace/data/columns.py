"""The columns of documents and questions, by the names that published files have for them, and what cells hold."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from crosstrace.core.errors import UserError

# what a column holds -> the names that files have for it, the usual ones first
NAMES = {
    "text": ("text", "document", "context", "passage", "content", "body", "article"),
    "question": ("question", "prompt", "instruction", "query", "input"),
    "answer": ("answer", "answers", "completion", "output", "response", "target"),
    "aliases": ("aliases", "answer_aliases", "answer_alias", "possible_answers"),
    "subject": ("subject", "title", "entity", "topic"),
    "relation": ("relation",),
    "split": ("split",),
}
NESTED = ("qas", "questions", "qa", "qa_pairs")  # columns of a document with a list of its questions
MOST_NAMES = 20  # columns that a sentence names
MESSAGES = ("messages", "conversations")  # columns with a conversation
# who says something: names of the roles in such columns
ASKS, ANSWERS, SETS_UP = ("user", "human"), ("assistant", "gpt"), ("system",)


_PRINTED = re.compile(r"\s*(\[['\"].*['\"]\]|\{'\w+': .*\})\s*\Z", re.DOTALL)  # a list as Python prints it


class UnfitConversationError(ValueError):
    """A conversation is no question with its answer; the reason is one of `imported.REASONS`."""


def column_of(what: str, row: Mapping[str, Any], given: Mapping[str, str], where: str) -> str | None:
    """The name of the column of a row that holds something; None if there is none.

    Args:
        what: of NAMES.
        given: the names that the user gave.

    Raises:
        UserError: the user named a column that is not there.
    """
    if what in given:
        if given[what] not in row:
            raise UserError(f"{where} has no {given[what]!r}, which --{what} names; it has {names_text(row)}")
        return given[what]
    return next((name for name in NAMES[what] if name in row), None)


def nested_column(row: Mapping[str, Any]) -> str | None:
    """The column of a document's row that holds a list of its questions; None if there is none."""
    return next((name for name in NESTED if isinstance(row.get(name), list)), None)


def names_text(row: Collection[Any]) -> str:
    """The columns of a row, for a sentence; the first of many."""
    names = [str(name) for name in row]
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return (", ".join(names[:MOST_NAMES]) or "nothing") + more


def answers_of(value: Any) -> list[str] | None:
    """The answer in a cell, then its aliases: a text, a list of them (as JSON too), or SQuAD's {"text": [...]}.

    None if it is none of these, such as a list as Python prints it.
    """
    if isinstance(value, Mapping) and "text" in value:
        value = value["text"]
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            listed = json.loads(value)
        except (ValueError, RecursionError):
            listed = None
        is_list = isinstance(listed, list) and all(isinstance(each, str) for each in listed)
        value = listed if is_list else value
    if value is None:
        return []
    if isinstance(value, str):
        return None if _PRINTED.match(value) else [value]
    if not isinstance(value, list):
        return None
    texts: list[Any] = [each.get("text") if isinstance(each, Mapping) else each for each in value]
    return texts if all(isinstance(text, str) for text in texts) else None


def answer_start(row: Mapping[str, Any], column: str) -> int | None:
    """Where in its document a row says that its first answer begins, in characters: SQuAD's `answer_start`.

    It stands in the answers' cell, beside the texts as a list of its own or with each text, or in a column.
    """
    answers = row.get(column)
    if isinstance(answers, list) and answers:
        answers = answers[0]
    start = (answers if isinstance(answers, Mapping) else row).get("answer_start")
    first = str(start[0] if isinstance(start, list) and start else start)
    return int(first) if first.isdecimal() else None


def with_question(row: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """A row whose conversation (`messages` or `conversations`), or instruction and input, became question and answer.

    Raises:
        UserError: the conversation is none.
        UnfitConversationError: it has several questions, or roles beside a system, a user and an assistant.
    """
    column = next((name for name in MESSAGES if name in row), None)
    if column is not None:
        question, answer = _turn(row[column], f"{where}: {column}")
        return {name: value for name, value in row.items() if name != column} | {"question": question, "answer": answer}
    if "instruction" in row and "output" in row:
        parts = [row["instruction"], row.get("input")]
        texts = [part for part in parts if isinstance(part, str) and part.strip()]
        rest = {name: value for name, value in row.items() if name not in ("instruction", "input", "output")}
        return rest | {"question": "\n".join(texts), "answer": row["output"]}
    return row


def _turn(messages: Any, where: str) -> tuple[str, str]:
    """What is asked and answered in a conversation of one turn; a system's message goes before the question."""
    turns: list[tuple[str, str]] = []
    for message in messages if isinstance(messages, list) else [None]:
        said = message if isinstance(message, Mapping) else {}
        role, text = said.get("role", said.get("from")), _said(said.get("content", said.get("value")))
        if not isinstance(role, str) or not isinstance(text, str):
            raise UserError(
                f"{where} holds {message!r:.80}; expected a list of {{role, content}} or of {{from, value}} with texts"
            )
        turns.append((role, text))
    if any(role not in (*ASKS, *ANSWERS, *SETS_UP) for role, _ in turns):
        raise UnfitConversationError("other roles")
    asked = [text for role, text in turns if role not in ANSWERS]
    answered = [text for role, text in turns if role in ANSWERS]
    if len(answered) > 1 or sum(role in ASKS for role, _ in turns) > 1:
        raise UnfitConversationError("several turns")
    if not answered or turns[-1][0] not in ANSWERS:
        return "\n".join(asked), ""
    return "\n".join(asked), answered[0]


def _said(content: Any) -> Any:
    """What a message says, if its parts are listed ({type: text, text}) and all of them are texts."""
    if not isinstance(content, list) or not content:
        return content
    parts: list[Any] = [part.get("text", part.get("value")) if isinstance(part, Mapping) else None for part in content]
    return "".join(parts) if all(isinstance(part, str) for part in parts) else content


def shared_keys(
    documents: Sequence[Mapping[str, Any]], questions: Sequence[Mapping[str, Any]], file: str
) -> tuple[str, str]:
    """The column of documents and the one of questions by which questions name their documents.

    They are those by which most questions name a document. Several pairs will do if they say the same.

    Args:
        file: of the questions.

    Raises:
        UserError: there is none, or several say different things.
    """
    meant: dict[tuple[str, str], list[int | None]] = {}
    for column in dict.fromkeys(name for row in documents for name in row):
        numbers = {row[column]: i for i, row in enumerate(documents) if isinstance(row.get(column), str)}
        if len(numbers) <= len(documents) / 2:
            continue
        for name in dict.fromkeys(name for row in questions for name in row):
            keys = [row.get(name) for row in questions]
            found = [numbers.get(key) if isinstance(key, str) else None for key in keys]
            if sum(number is not None for number in found) > len(questions) / 2:
                meant[column, name] = found
    if meant and all(found == next(iter(meant.values())) for found in meant.values()):
        return next(iter(meant))
    could = ", ".join(f"{name} (documents: {column})" for column, name in meant)
    could = f"{could} could, and they differ" if meant else "no column of both files does"
    raise UserError(
        f"which column says what document a question of {file} is about? {could}. Documents have "
        f"{names_text(documents[0])}; questions have {names_text(questions[0])}. Expected a column that is different "
        "for each document and that the questions name, so give it with --key, and with --question-key if the "
        "questions call it otherwise"
    )
