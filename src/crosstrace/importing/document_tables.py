"""Documents and questions from tables: CSV, TSV, JSONL, JSON, Parquet or a Hugging Face data set.

The documents are in one file and the questions in another, with a key of both. Or a row has a document and a list of
its questions, or a question and its document. What is read is passed on as it is; `documents` judges it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crosstrace.core.errors import UserError
from crosstrace.data.columns import (
    NAMES,
    UnfitConversationError,
    answer_start,
    answers_of,
    column_of,
    names_text,
    nested_column,
    shared_keys,
    with_question,
)
from crosstrace.importing.documents import ENDS, QA, Document, Question
from crosstrace.importing.facts import unused_text
from crosstrace.importing.imported import Imported, dropped_text
from crosstrace.importing.tables import read_records

Items = Iterator[Document | Question]
Row = Mapping[str, Any]


def read_tables(
    documents: Path | None,
    questions: Path | None,
    keys: tuple[str, str] | None,
    columns: Mapping[str, str],
    imported: Imported,
) -> Items:
    """The documents and questions of two tables, or of one that has both.

    Args:
        documents: a table with a text, perhaps with a list of its questions; None if the questions' table has it.
        questions: a table with question and answer; None if the documents' table has them.
        keys: the column that names documents, and the column by which a question names its document; if not given, they
            are looked for.
        columns: the names that the files have, by those of `columns.NAMES`.

    Raises:
        UserError: a file can't be read or lacks a column, or the key is not known.
    """
    if documents == questions:  # a row has both
        documents = None
    tables: dict[Path, list[tuple[int, Row]]] = {}
    for path in (documents, questions):
        if path is not None:
            tables[path] = list(_rows(path, imported))
            if not tables[path]:
                reasons = Counter(reason for file, _, reason, _ in imported.dropped if file == str(path))
                why = f": {dropped_text(reasons)}" if reasons else "; expected a document or a question in each"
                raise UserError(f"{path} has no row that can be used{why}")
    if documents is None and questions and nested_column(tables[questions][0][1]):
        documents, questions = questions, None
    _check_columns(columns, [row for rows in tables.values() for _, row in rows])
    if documents and questions and keys is None:
        keys = shared_keys(*([row for _, row in rows] for rows in tables.values()), file=str(questions))
        imported.notes.append(f"the column {keys[1]} says which document a question is about")
    reader = _Reader(columns, keys if documents and questions else None, imported)
    if documents:
        for number, row in tables[documents]:
            yield from reader.document(row, str(documents), number)
    if questions:
        for number, row in tables[questions]:
            yield from reader.question(row, str(questions), number)
    if reader.unused:
        imported.notes.append(unused_text(reader.unused, [*NAMES]))


def _check_columns(columns: Mapping[str, str], rows: Sequence[Row]) -> None:
    """Raise a `UserError` if the user named a column that no file has, nor a list of questions in one."""
    nested = [asked for row in rows for asked in row.get(nested_column(row) or "", ()) if isinstance(asked, Mapping)]
    there = dict.fromkeys(str(name) for row in (*rows, *nested) for name in row)
    for what, name in columns.items():
        if name not in there:
            option = "split-column" if what == "split" else what
            raise UserError(f"no file has {name!r}, which --{option} names; the columns are {names_text(there)}")


def _rows(path: Path, imported: Imported) -> Iterator[tuple[int, Row]]:
    """The numbered rows of a table or of a JSON file, each with its conversation as question and answer."""
    imported.read.setdefault(str(path), 0)
    for number, row in read_records(path):
        imported.read[str(path)] += 1
        try:
            yield number, with_question(row, f"{path} row {number}")
        except UnfitConversationError as error:
            imported.drop(str(path), number, str(error), str(next(iter(row.values()), "")))


@dataclass
class _Reader:
    """Makes documents and questions of rows.

    Attributes:
        columns: the names that the user gave.
        keys: the column that names documents, and the one by which questions that are in another file name them; None
            if there is no other file.
        unused: columns that nothing was made of.
    """

    columns: Mapping[str, str]
    keys: tuple[str, str] | None
    imported: Imported
    unused: dict[str, None] = field(default_factory=dict)
    _texts: set[str] = field(default_factory=set)  # documents of earlier rows with questions

    def document(self, row: Row, file: str, number: int) -> Items:
        """A row's document, then its questions if it holds a list of them."""
        where = f"{file} row {number}"
        text = column_of("text", row, self.columns, where)
        if text is None:
            raise UserError(
                f"{where} has no text; it has {names_text(row)}. Expected a column {', '.join(NAMES['text'][:4])}, or "
                "name yours with --text"
            )
        subject = column_of("subject", row, self._there("subject", row), where)
        nested = None if self.keys else nested_column(row)
        key = _cell(row, self._key(row, 0, where), where) or f"{file} row {number}"
        yield Document(key, _cell(row, text, where), _names(row, subject), file, number)
        self._note_unused(row, [text, subject, nested])
        for asked in row[nested] if nested else []:
            self.imported.read[file] += 1
            if not isinstance(asked, Mapping):
                raise UserError(f"{where}: {nested} holds {asked!r:.60}; expected {{question, answer}}")
            yield self._question(asked, file, number, key, {what: self._column(what, asked, where) for what in NAMES})

    def question(self, row: Row, file: str, number: int) -> Items:
        """A row's question, after its document if the row has that too."""
        where = f"{file} row {number}"
        cells = {what: self._column(what, row, where) for what in NAMES}
        document = _cell(row, self._key(row, 1, where), where)
        if self.keys is None:
            if cells["text"] is None:
                raise UserError(
                    f"{where} has no text; it has {names_text(row)}. Expected the document's text in each row, or a "
                    "file of documents with --documents; questions without documents are rows of text, which --store "
                    "or --recall reads"
                )
            document = _cell(row, cells["text"], where)
            if document not in self._texts:
                self._texts.add(document)
                self.imported.read[file] += 1
                yield Document(document, document, _names(row, cells["subject"]), file, number)
        yield self._question(row, file, number, document, cells)

    def _question(self, row: Row, file: str, number: int, document: str, cells: Mapping[str, str | None]) -> Question:
        where = f"{file} row {number}"
        for what in ("question", "answer"):
            if cells[what] is None:
                raise UserError(
                    f"{where} has no {what}; it has {names_text(row)}. Expected a column {', '.join(NAMES[what][:4])}, "
                    f"or name yours with --{what}"
                )
        answers: list[str] = []
        for name in (cells["answer"], cells["aliases"]):
            listed = answers_of(row.get(name)) if name else []
            if listed is None:
                raise UserError(f"{where}: {name} is {row.get(name or '')!r:.60}; expected a text or a list of texts")
            answers += listed
        split = _cell(row, cells["split"], where).strip().lower()
        self._note_unused(row, [*cells.values(), "answer_start"])
        subject = next(iter(_names(row, cells["subject"])), "")
        relation = _cell(row, cells["relation"], where).strip()
        question, start = _cell(row, cells["question"], where), answer_start(row, cells["answer"] or "")
        return Question(
            document, question, tuple(answers), subject, relation, ENDS.get(split, split), QA, file, number, start
        )  # fmt: skip

    def _column(self, what: str, row: Row, where: str) -> str | None:
        return column_of(what, row, self._there(what, row), where)

    def _there(self, what: str, row: Row) -> Mapping[str, str]:
        """The user's names of columns, without that of a column which only the other file has."""
        is_needed = what in ("question", "answer")
        return self.columns if is_needed or self.columns.get(what) in row else {}

    def _key(self, row: Row, which: int, where: str) -> str | None:
        """The column of the key: of a document (0) or of a question (1)."""
        if self.keys is None:
            return None
        if self.keys[which] not in row:
            option = "question-key" if which and len({*self.keys}) > 1 else "key"
            raise UserError(f"{where} has no {self.keys[which]!r}, which --{option} names; it has {names_text(row)}")
        return self.keys[which]

    def _note_unused(self, row: Row, used: Sequence[str | None] | Any) -> None:
        self.unused |= dict.fromkeys(str(name) for name in row if name not in (*used, *(self.keys or ())))


def _cell(row: Row, name: str | None, where: str) -> str:
    """A cell's text; nothing for a missing value or column."""
    value = row.get(name) if name is not None else None
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where}: {name} is {value!r:.60}; expected a text")
    return value


def _names(row: Row, column: str | None) -> tuple[str, ...]:
    """The names in a cell of a subject or title."""
    value = row.get(column) if column else None
    names = [name for name in (value if isinstance(value, list) else [value]) if isinstance(name, str) and name.strip()]
    return tuple(dict.fromkeys(form for name in names for form in (name, name.replace("_", " "))))
