"""Documents and questions in the forms in which data sets of knowledge are published.

A form is known by its keys. What is read is passed on as it is; `documents` judges it. Tables are in `document_tables`,
forms of facts without documents (PopQA, EntityQuestions) in `published_facts`.

| form | keys | documents | questions |
|---|---|---|---|
| Fictional Knowledge | train_context, mem_input, … | the contexts | the tasks memorization, generalization, … |
| SQuAD | data, paragraphs, qas | the paragraphs | their questions |
| CounterFact | requested_rewrite {prompt, subject, target_new} | the new statements | their paraphrases |
| MQuAKE | requested_rewrite [{…, question}], questions | the new statements | questions about one and about several |
| edits | subject, prompt with it or {}, target | the new statements | their questions or rephrased prompts |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from crosstrace.core.errors import UserError
from crosstrace.data.columns import NAMES, answer_start, answers_of, names_text, nested_column
from crosstrace.importing.documents import QA, Document, Question
from crosstrace.importing.imported import Imported
from crosstrace.importing.tables import KINDS, first_record, read_records

Items = Iterator[Document | Question]
Row = Mapping[str, Any]

FICTIONAL = {"mem": "memorization", "gen": "generalization", "hard_gen": "hard_generalization"}
SEVERAL_FACTS = "several_facts"  # MQuAKE's questions that need all facts of a record
TASKS = (*FICTIONAL.values(), SEVERAL_FACTS)  # of the questions, beside qa
PROMPTS = ("prompt", "src")  # the latter of zsRE, as are the last of TARGETS
TARGETS = ("target_new", "target", "new_target", "alt")
PASSAGES = ("context", "document", "passage", "article")  # columns that hold a document beside its question


def form_of(path: Path) -> str | None:
    """The form of a file of documents with questions; None if it has none, or can have none.

    It is of READERS; or `nested`: a table whose rows have a document and a list of its questions; or `flat`: one whose
    rows have a question, its answer and its document, as SQuAD's have on the hub.
    """
    if path.suffix.lower() not in KINDS or not path.is_file():
        return None
    row = first_record(path)
    is_asked = "question" in row and any(name in row for name in NAMES["answer"]) and "object" not in row
    if is_asked and any(isinstance(row.get(name), str) for name in PASSAGES):
        return "flat"
    if path.suffix.lower() in (".csv", ".tsv"):
        return None
    if "train_context" in row:
        return "fictional"
    if "paragraphs" in row or ("context" in row and "qas" in row):
        return "squad"
    if "requested_rewrite" in row:
        return "edits"
    prompt, subject = str(_first(row, PROMPTS)), row.get("subject")
    if subject and ("{}" in prompt or str(subject) in prompt) and any(name in row for name in TARGETS):
        return "edits"
    return "nested" if any(isinstance(asked, Mapping) for asked in row.get(nested_column(row) or "", ())) else None


def read_published(path: Path, form: str, imported: Imported) -> Items:
    """The documents and questions of a file in a form of READERS.

    Raises:
        UserError: a record is not as its form has it.
    """
    imported.read.setdefault(str(path), 0)
    for number, row in read_records(path):
        for item in READERS[form](row, path, number):
            imported.read[str(path)] += 1
            yield item


def _first(row: Row, names: Sequence[str]) -> Any:
    """The first of some cells that a row has; None if it has none of them."""
    return next((row[name] for name in names if row.get(name) is not None), None)


def _text(row: Row, name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        found = f"is {value!r:.60}" if name in row else f"is missing; it has {names_text(row)}"
        raise UserError(f"{where}: {name} {found}; expected a text")
    return value


def _list(row: Row, name: str, where: str) -> list[Any]:
    value = row.get(name)
    if not isinstance(value, list):
        found = f"is {value!r:.60}" if name in row else f"is missing; it has {names_text(row)}"
        raise UserError(f"{where}: {name} {found}; expected a list")
    return value


def _fictional(row: Row, path: Path, number: int) -> Items:
    where, key = f"{path} record {number}", str(number)
    yield Document(key, _text(row, "train_context", where), (), str(path), number)
    for short, task in FICTIONAL.items():
        inputs, targets = (_list(row, f"{short}_{part}", where) for part in ("input", "target"))
        if len(inputs) != len(targets):
            raise UserError(
                f"{where}: {short}_input has {len(inputs)} texts, and {short}_target {len(targets)}; expected one "
                "target for each input"
            )
        for prompt, target in zip(inputs, targets):
            if not isinstance(prompt, str) or not isinstance(target, str):
                raise UserError(
                    f"{where}: {short}_input or {short}_target holds {prompt!r:.40}, {target!r:.40}; expected texts"
                )
            yield Question(key, prompt, (target,), "", task, "", task, str(path), number)


def _squad(row: Row, path: Path, number: int) -> Items:
    where = f"{path} record {number}"
    title = str(row.get("title") or "").replace("_", " ")
    for index, paragraph in enumerate(_list(row, "paragraphs", where) if "paragraphs" in row else [row], 1):
        if not isinstance(paragraph, Mapping):
            raise UserError(f"{where}: paragraph {index} is {paragraph!r:.60}; expected {{context, qas}}")
        key = f"{number}.{index}"
        yield Document(key, _text(paragraph, "context", where), (title,) if title else (), str(path), number)
        for asked in _list(paragraph, "qas", where):
            if not isinstance(asked, Mapping):
                raise UserError(f"{where}: qas holds {asked!r:.60}; expected {{question, answers}}")
            answers = answers_of(asked.get("answers"))
            if answers is None:
                raise UserError(f"{where}: answers is {asked.get('answers')!r:.60}; expected a list of {{text}}")
            text, start = _text(asked, "question", where), answer_start(asked, "answers")
            yield Question(key, text, tuple(answers), "", "", "", QA, str(path), number, start)


def _edits(row: Row, path: Path, number: int) -> Items:
    where = f"{path} record {number}"
    rewrites = row.get("requested_rewrite", row)
    rewrites = rewrites if isinstance(rewrites, list) else [rewrites]
    statements = []
    for rewrite in rewrites:
        if not isinstance(rewrite, Mapping):
            raise UserError(
                f"{where}: requested_rewrite holds {rewrite!r:.60}; expected {{prompt, subject, target_new}}"
            )
        subject, target, statement = _new_statement(rewrite, where)
        statements.append(statement)
        yield Document(statement, statement, (subject,), str(path), number)
        names = ("question", "rephrase", "rephrase_prompt")
        asked = [rewrite[name] for name in names if rewrite.get(name) is not None]
        for name in ("paraphrase_prompts", "queries"):
            if len(rewrites) == 1 and row.get(name) is not None:
                asked += _list(row, name, where)
        relation = str(rewrite.get("relation_id") or "")
        for question in asked:
            if not isinstance(question, str):
                raise UserError(f"{where}: a question is {question!r:.60}; expected a text")
            yield Question(statement, question, (target,), subject, relation, "", QA, str(path), number)
    if len(statements) > 1 and "new_answer" in row:  # MQuAKE's, which need all of a record's facts
        answers = [_text(row, "new_answer", where), *(answers_of(row.get("new_answer_alias")) or [])]
        for question in answers_of(row.get("questions")) or []:
            yield Question(
                statements[0], question, tuple(answers), "", "", "", SEVERAL_FACTS, str(path), number,
                needs_several=True,
            )  # fmt: skip


def _new_statement(rewrite: Row, where: str) -> tuple[str, str, str]:
    """The subject of an edit, its new object, and the sentence that states it."""
    subject = _text(rewrite, "subject", where)
    prompt = _text(rewrite, next((name for name in PROMPTS if name in rewrite), PROMPTS[0]), where)
    target = _first(rewrite, TARGETS)
    target = target.get("str") if isinstance(target, Mapping) else target
    if not isinstance(target, str):
        raise UserError(f"{where}: the target is {target!r:.60}; expected a text, or {{str}}, as target_new")
    if prompt.count("{}") != 1 and ("{}" in prompt or subject not in prompt):
        raise UserError(
            f"{where}: prompt is {prompt!r:.80}; expected a text with one {{}} for the subject, or with the subject"
        )
    statement = f"{prompt.replace('{}', subject)} {target}"
    return subject, target, statement if statement.endswith((".", "?", "!")) else statement + "."


READERS = {"fictional": _fictional, "squad": _squad, "edits": _edits}
