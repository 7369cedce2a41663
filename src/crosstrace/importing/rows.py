"""Rows of text for two tasks, from plain files, tables and JSON."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from crosstrace.core.errors import UserError
from crosstrace.data.columns import UnfitConversationError, answers_of, column_of, names_text, with_question
from crosstrace.data.text import NO_QUESTIONS, Example, Mention
from crosstrace.importing.facts import is_wide, is_within, note_scripts, unused_text
from crosstrace.importing.imported import (
    INVISIBLE,
    ROW_COLUMNS,
    SPLITS,
    Imported,
    counted,
    dropped_text,
    has_half_letter,
    tidy,
)
from crosstrace.importing.tables import read_records
from crosstrace.importing.text_files import read_lines

LONG_COMPLETION = 5  # words of a completion that two rows hardly share by chance
# what a row of text has -> the name that `columns.NAMES` has for it
COLUMN_OF = {
    "text": "text", "prompt": "question", "completion": "answer", "aliases": "aliases", "subject": "subject",
    "split": "split",
}  # fmt: skip


def import_rows(
    rows: Mapping[str, Path], columns: Mapping[str, str] | None = None
) -> tuple[list[Example], list[Example], Imported]:
    """Read two tasks that are no facts: texts that store, and prompts with completions that recall.

    Args:
        rows: the files by the names of ROWS. store: a text file with one text a line, or a table with a column text, or
            with columns prompt and completion. recall, which may be left out: a table with columns prompt and
            completion, and with split (id or ood) unless it is to be drawn by subject. In both, rows with the same text
            in a column subject belong together; without it every row is on its own. store-completions,
            recall-completions: text files whose lines complete those of the other file. Other usual names of the
            columns are known (`columns.NAMES`), and conversations of one turn (`messages`) are read.
        columns: the names that the files have for text, question (the prompt), answer (the completion), aliases (other
            right completions), subject and split.

    Returns:
        the texts that store, those that recall, and what was read.

    Raises:
        UserError: a file cannot be read or lacks a column, a pair of files differs in lines, or nothing can be kept.
    """
    imported = Imported()
    parts: dict[str, list[Example]] = {"bio": [], "qa": []}
    unused: dict[str, None] = {}
    for task, name in (("bio", "store"), ("qa", "recall")):
        if name not in rows:
            continue
        path, dropped = rows[name], len(imported.dropped)
        numbered = _numbered_rows(path, rows.get(f"{name}-completions"), task, imported, columns or {}, unused)
        parts[task] = list(_examples(path, task, numbered, imported))
        if not parts[task]:
            reasons = Counter(reason for _, _, reason, _ in imported.dropped[dropped:])
            raise UserError(f"no row of {path} could be kept: {dropped_text(reasons) or 'it has none'}")
    if unused:
        imported.notes.append(unused_text(unused, ROW_COLUMNS))
    note_scripts(imported, {"texts": [item.text for items in parts.values() for item in items]})
    if not parts["qa"]:
        imported.notes.append(NO_QUESTIONS)
        return [replace(example, split="id") for example in parts["bio"]], [], imported
    recall = rows["recall"]
    if all(example.split == "" for example in parts["qa"]):  # the split is drawn by subject
        people = sorted({example.person for example in parts["qa"]})
        trained = {*random.Random("crosstrace/rows/split").sample(people, len(people) // 2)}
        parts["qa"] = [replace(example, split="id" if example.person in trained else "ood") for example in parts["qa"]]
        imported.notes.append(f"{recall} has no column split, so {_held_out_text(len(people), len(parts['qa']))}")
    held_out = {example.person for example in parts["qa"] if example.split == "ood"}
    parts["bio"] = [replace(example, split="ood" if example.person in held_out else "id") for example in parts["bio"]]
    check_splits(parts["qa"], recall)
    _note_leaks(parts, imported)
    return parts["bio"], parts["qa"], imported


def _note_leaks(parts: Mapping[str, Sequence[Example]], imported: Imported) -> None:
    """Note how many held-out rows have a long completion that is trained too, or stand in a text that stores."""
    trained = {_completion(example) for example in parts["qa"] if example.split == "id"}
    held_out = [example for example in parts["qa"] if example.split == "ood"]
    twins = sum(words in trained and len(words.split()) >= LONG_COMPLETION for words in map(_completion, held_out))
    if twins:
        imported.notes.append(
            f"{counted(twins, 'held-out row')} with the completion of a trained row: if they are about the same, say "
            "so in a column subject, so that they stay on one side"
        )
    stored = {" ".join(example.text.split()) for example in parts["bio"]}
    inside = sum(" ".join(example.text.split()) in stored for example in held_out)
    if inside:
        imported.notes.append(
            f"{counted(inside, 'held-out row')} word for word among the texts that store: answering them is no recall "
            "in another format"
        )


def _held_out_text(subjects: int, rows: int) -> str:
    """Which rows are held out."""
    return "half of its rows are held out" if subjects == rows else "the rows of half of its subjects are held out"


def _completion(example: Example) -> str:
    return " ".join(example.text[slice(*example.targets[0])].split())


def check_splits(questions: Sequence[Example], recall: Path) -> None:
    """Raise a `UserError` unless some rows that recall are trained and some only test."""
    splits = {example.split for example in questions}
    if splits != {*SPLITS}:
        raise UserError(
            f"the rows of {recall} have the splits {', '.join(map(repr, sorted(splits)))}; expected in column split id "
            "for rows that are trained and ood for those that only test, and both of them"
        )


def _examples(
    path: Path, task: str, rows: Iterable[tuple[int, Mapping[str, Any]]], imported: Imported
) -> Iterator[Example]:
    """The rows that can be kept, as examples."""
    imported.read.setdefault(str(path), 0)
    seen: dict[str, str] = {}  # prompt, or text -> completion
    joined, given_away = 0, []
    for number, values in rows:
        imported.read[str(path)] += 1
        cells = {name: values.get(name) for name in ROW_COLUMNS}
        row = {name: value if isinstance(value, str) else "" for name, value in cells.items()}
        prompt, completion = row["prompt"], row["completion"]
        if "text" in values:
            prompt, completion = "", row["text"]
        blank = blank_between(prompt, completion)
        whole = prompt + blank + completion
        split = row["split"].strip().lower()
        aliases = values.get("aliases", ())
        is_text = all(isinstance(value, str | None) for value in cells.values()) and aliases is not None
        reason = None if is_text else "not a text"
        if any(map(has_half_letter, aliases or ())):
            reason = "not Unicode"
        reason = reason or _reason_to_drop(task, prompt, completion, whole, split, seen)
        if reason:
            imported.drop(str(path), number, reason, whole)
            continue
        seen[prompt if task == "qa" else whole] = completion
        joined += len(blank)
        if task == "qa" and is_within(completion.strip().casefold(), prompt.casefold()):
            given_away.append(number)
        start = len(whole) - len(completion.lstrip())
        if not prompt.strip():  # nothing predicts a text's first word
            start += len(completion.split()[0])
        answer = (start, len(whole.rstrip()))
        person = tidy(row["subject"]) or f"{task}.{number}"
        mention = Mention(f"{task}.{number}", "", task, (0, 0), (), answer)
        targets = ((0, len(whole)),) if task == "bio" else (answer,)
        imported.sources[f"{task}.{number}"] = str(path), number
        yield Example(f"{task}.{number}", task, whole, person, split, targets, (mention,), aliases=tuple(aliases or ()))
    if joined:
        imported.notes.append(f"{path}: a blank was put between prompt and completion of {joined} rows that had none")
    if given_away:
        imported.notes.append(
            f"{path}: {len(given_away)} prompts hold their completion, e.g. row {given_away[0]}; they are kept, but "
            "answering them may be no recall"
        )


def blank_between(prompt: str, completion: str) -> str:
    """A blank if prompt and completion need one between them, else nothing."""
    is_glued = bool(prompt and completion) and not (prompt[-1].isspace() or completion[0].isspace())
    return " " if is_glued and not is_wide(prompt[-1]) and not is_wide(completion[0]) else ""


def _reason_to_drop(
    task: str, prompt: str, completion: str, whole: str, split: str, seen: Mapping[str, str]
) -> str | None:
    """Why a row of texts can't be kept; None if it can.

    Args:
        whole: prompt and completion as one text.
        seen: the earlier rows: prompt (of the task `bio`: text) -> completion.
    """
    if has_half_letter(whole):
        return "not Unicode"
    if not completion.strip() or (task == "qa" and not prompt.strip()):
        return "empty"
    if not prompt.strip() and len(completion.split()) < 2:
        return "one word"
    if INVISIBLE.search(whole):
        return "control"
    if split not in ("", *SPLITS):
        return "other split"
    if task == "qa" and prompt in seen:
        return "duplicate" if seen[prompt] == completion else "contradiction"
    if task == "bio" and whole in seen:
        return "duplicate"
    return None


def _numbered_rows(
    path: Path,
    completions: Path | None,
    task: str,
    imported: Imported,
    columns: Mapping[str, str],
    unused: dict[str, None],
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The numbered rows of a task from a text file, a pair of text files, or a table."""
    if completions is not None:
        imported.read.setdefault(str(completions), 0)  # the rows count for the file of the prompts
        pairs = zip_longest(_text_lines(path), _text_lines(completions))
        for number, (prompt, completion) in enumerate(pairs, 1):
            if prompt is None or completion is None:
                more, less = (path, completions) if completion is None else (completions, path)
                raise UserError(
                    f"{more} has more lines than {less}, which ends after {number - 1}; expected each line of "
                    f"{completions} to complete the same line of {path}"
                )
            yield number, {"prompt": prompt, "completion": completion}
        return
    if path.suffix.lower() == ".txt":
        if task == "qa":
            raise UserError(
                f"{path} is a text file without completions; expected them in another one, line by line, as "
                "--recall-completions, or a table with columns prompt and completion"
            )
        yield from ((number, {"text": line}) for number, line in enumerate(_text_lines(path), 1) if line)
        return
    for number, values in read_records(path):
        try:
            yield number, _row_of(with_question(values, f"{path} row {number}"), task, columns, unused, path, number)
        except UnfitConversationError as error:
            imported.read[str(path)] += 1
            imported.drop(str(path), number, str(error), str(next(iter(values.values()), "")))


def _row_of(
    values: Mapping[str, Any],
    task: str,
    columns: Mapping[str, str],
    unused: dict[str, None],
    path: Path,
    number: int,
) -> dict[str, Any]:
    """A table's row by the names of ROW_COLUMNS, with the aliases of its completion."""
    where = f"{path} row {number}"
    given = {what: column for what, column in columns.items() if column in values}
    names = {name: column_of(what, values, given, where) for name, what in COLUMN_OF.items()}
    is_pair = names["prompt"] is not None and names["completion"] is not None
    if task == "qa" or (is_pair and names["text"] not in ("text", given.get("text"))):
        del names["text"]
    row = {name: values[column] for name, column in names.items() if column is not None}
    lacking = [name for name in ("prompt", "completion") if name not in row]
    if lacking and "text" not in row:
        raise UserError(
            f"{where} has no {lacking[0]!r}; it has {names_text(values)}. Expected columns "
            f"{'' if task == 'qa' else 'text, or '}prompt and completion, so rename yours or name them "
            f"({'' if task == 'qa' else '--text, '}--question, --answer)"
        )
    answers, further = answers_of(row.get("completion")), answers_of(row.pop("aliases", None))
    if answers and "text" not in row:
        row["completion"], row["aliases"] = answers[0], None if further is None else [*answers[1:], *further]
    unused |= dict.fromkeys(str(name) for name in values if name not in names.values())
    return row


def _text_lines(path: Path) -> Iterator[str]:
    """The lines of a text file, without the blanks at their ends."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; expected a text file, one text a line")
    yield from (line.strip() for line in read_lines(path))
