"""What `crosstrace import` read, kept and dropped, and how answers stand in their documents."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from crosstrace.results.base import Record

LONG = 200  # characters of a name: more is a text
# reason in `Import.dropped` -> what it means
REASONS = {
    "empty": "an empty subject, relation or object, document, question or completion",
    "not a text": "a value that is neither text nor a number nor a date, e.g. a list, a truth value or bytes",
    "too long": f"a subject, relation or object of more than {LONG} characters",
    "control": "characters that control the text's direction or a terminal",
    "not Unicode": "half a surrogate pair, which no file can hold",
    "duplicate": "said before",
    "contradiction": "another object for a subject and relation, or another completion for a prompt, than before",
    "answer in the prompt": "the object stands in the subject's name or type, so the question gives it away",
    "other split": "a split other than id and ood",
    "no words": "a subject, relation or object without a word",
    "too long for the model": "a text of more tokens than the model of --model can read",
    "known to the model": "a fact that the model of --model says by itself, in one of its wordings",
    "one word": "a text of one word, in which nothing is predicted",
    "no answer": "a question without an answer",
    "no document": "a question about a document that is not there, or was dropped",
    "asked before": "a question that was there before, with another answer",
    "same name": "another text under the name of an earlier document",
    "one split": "a question of a task whose questions are all trained, or all held out",
    "several turns": "a conversation of several questions and answers",
    "other roles": "a conversation with roles beside a system, a user and an assistant, e.g. calls of tools",
}
# way in `Import.answers` -> where such an answer is
ANSWERS = {
    "exact": "in their document, word for word",
    "case": "in their document, in another case",
    "accents": "in their document, with other accents or quotes",
    "form": "in their document, as another form of the words, number or date",
    "unaligned": "not in their document",
    "several": "of several facts, which no document has alone",
    "cut": "in no window of their document as a whole",
}


class ImportedFile(Record):
    """A file of one's own facts, documents or rows."""

    rows: int
    """Rows in it."""
    sha256: str | None
    """Hash of its bytes; null for a data set on the hub."""


class Import(Record):
    """What `crosstrace import` read, of one's own facts, documents or rows."""

    schema_: int = Field(default=1, alias="schema")
    """Version of the import's format."""
    files: dict[str, ImportedFile] = {}
    """File -> what was in it."""
    read: int
    """Rows read."""
    kept: int
    """Facts or rows kept."""
    dropped: dict[str, int]
    """Reason -> rows dropped."""
    subjects: int | None = None
    """Of facts: subjects."""
    relations: dict[str, int] | None = None
    """Of facts: relation -> facts kept."""
    answers: dict[str, int] | None = None
    """Of questions about documents: how their answers stand there -> questions; `unaligned` ones do not."""
    notes: list[str] = []
    """What else is to know of the import."""


def answers_in_words(answers: Mapping[str, int]) -> list[tuple[str, str]]:
    """Each way of `Import.answers` in words, with its number and share of all answers; the closest way first."""
    number = sum(answers.values())
    known = [way for way in ANSWERS if answers.get(way)]
    further = [way for way in answers if way not in ANSWERS]
    return [
        (f"answers {ANSWERS.get(way, way)}", f"{answers[way]} ({answers[way] / number:.1%})") for way in known + further
    ]
