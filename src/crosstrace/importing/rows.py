"""Rows of text of two tasks, from plain files, tables and JSON."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from crosstrace.core.errors import UserError
from crosstrace.data.text import NO_QUESTIONS, Example, Mention
from crosstrace.importing.facts import is_wide, note_scripts, told_unused, within
from crosstrace.importing.kept import INVISIBLE, LONG, ROW_COLUMNS, SPLITS, Imported, dropped_text, tidy
from crosstrace.importing.tables import read_lines, read_table


def import_rows(
    rows: Mapping[str, Path], columns: Mapping[str, str] | None = None
) -> tuple[list[Example], list[Example], Imported]:
    """Read two tasks that are no facts: texts that store, and prompts with completions that recall.

    Args:
        rows: by the names of ROWS. store: a text file, one text a line, or a table with a column text, or prompt and
            completion. recall, which may be left out: a table with columns prompt and completion, and split (id or ood)
            unless it is to be drawn by subject. A column subject says in both what belongs together; without it every
            row is of its own. store-completions, recall-completions: text files whose lines complete those of another.
        columns: names of the files' own columns subject and split.

    Raises:
        UserError: a file cannot be read or lacks a column, a pair of files differs in lines, or nothing can be kept.
    """
    found = Imported()
    parts: dict[str, list[Example]] = {"bio": [], "qa": []}
    unused: dict[str, None] = {}
    for task, name in (("bio", "store"), ("qa", "recall")):
        if name not in rows:
            continue
        path, dropped = rows[name], len(found.dropped)
        given = _texts(path, rows.get(f"{name}-completions"), task, found, columns or {}, unused)
        parts[task] = list(_examples(path, task, given, found))
        if not parts[task]:
            reasons = Counter(reason for _, _, reason, _ in found.dropped[dropped:])
            raise UserError(f"no row of {path} could be kept: {dropped_text(reasons) or 'it has none'}")
    if unused:
        found.notes.append(told_unused(unused, ROW_COLUMNS))
    note_scripts(found, {"texts": [item.text for items in parts.values() for item in items]})
    if not parts["qa"]:
        found.notes.append(NO_QUESTIONS)
        return [replace(e, split="id") for e in parts["bio"]], [], found
    recall = rows["recall"]
    if all(example.split == "" for example in parts["qa"]):  # drawn, by whom the rows are about
        people = sorted({example.person for example in parts["qa"]})
        trained = {*random.Random("crosstrace/rows/split").sample(people, len(people) // 2)}
        parts["qa"] = [replace(e, split="id" if e.person in trained else "ood") for e in parts["qa"]]
        found.notes.append(f"{recall} has no column split, so the rows of half of what they are about are held out")
    held = {example.person for example in parts["qa"] if example.split == "ood"}
    parts["bio"] = [replace(e, split="ood" if e.person in held else "id") for e in parts["bio"]]
    check_asked(parts["qa"], recall)
    return parts["bio"], parts["qa"], found


def check_asked(questions: Sequence[Example], recall: Path) -> None:
    """Raise a `UserError` unless some rows that recall are trained and some only test."""
    asked = {example.split for example in questions}
    if asked != {*SPLITS}:
        raise UserError(
            f"the rows of {recall} have the splits {', '.join(map(repr, sorted(asked)))}; expected in column split id "
            "for rows that are trained and ood for those that only test, and both of them"
        )


def _examples(
    path: Path, task: str, rows: Iterable[tuple[int, Mapping[str, Any]]], found: Imported
) -> Iterator[Example]:
    """The rows that can be kept, as examples."""
    found.read.setdefault(str(path), 0)
    seen: dict[str, str] = {}
    joined, given_away = 0, []
    for number, values in rows:
        found.read[str(path)] += 1
        given = {name: values.get(name) for name in ROW_COLUMNS}
        text = {name: value if isinstance(value, str) else "" for name, value in given.items()}
        prompt, completion = text["prompt"], text["completion"]
        if "text" in values:
            prompt, completion = "", text["text"]
        glued = bool(prompt and completion) and not (prompt[-1].isspace() or completion[0].isspace())
        blank = " " if glued and not is_wide(prompt[-1]) and not is_wide(completion[0]) else ""
        split = text["split"].strip().lower()
        whole = prompt + blank + completion
        reason = None
        if not all(isinstance(value, str | None) for value in given.values()):
            reason = "not a text"
        elif any("\ud800" <= letter <= "\udfff" for letter in whole):
            reason = "not Unicode"
        elif not completion.strip() or (task == "qa" and not prompt.strip()):
            reason = "empty"
        elif not prompt.strip() and len(completion.split()) < 2:
            reason = "one word"
        elif INVISIBLE.search(whole):
            reason = "control"
        elif split not in ("", *SPLITS):
            reason = "other split"
        elif task == "qa" and prompt in seen:
            reason = "duplicate" if seen[prompt] == completion else "contradiction"
        elif task == "bio" and whole in seen:
            reason = "duplicate"
        if reason:
            found.dropped.append((str(path), number, reason, whole.encode("utf-8", "replace").decode()[:LONG]))
            continue
        seen[prompt if task == "qa" else whole] = completion
        joined += len(blank)
        if task == "qa" and within(completion.strip().casefold(), prompt.casefold()):
            given_away.append(number)
        start = len(whole) - len(completion.lstrip())
        if not prompt.strip():  # nothing predicts a text's first word
            start += len(completion.split()[0])
        answer = (start, len(whole.rstrip()))
        person = tidy(text["subject"]) or f"{task}.{number}"
        mention = Mention(f"{task}.{number}", "", task, (0, 0), (), answer)
        targets = ((0, len(whole)),) if task == "bio" else (answer,)
        yield Example(f"{task}.{number}", task, whole, person, split, targets, (mention,))
    if joined:
        found.notes.append(f"{path}: a blank was put between prompt and completion of {joined} rows that had none")
    if given_away:
        found.notes.append(
            f"{path}: {len(given_away)} prompts hold their completion, e.g. row {given_away[0]}; they are kept, but "
            "answering them may be no recall"
        )


def _texts(
    path: Path,
    completions: Path | None,
    task: str,
    found: Imported,
    columns: Mapping[str, str],
    unused: dict[str, None],
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The numbered rows of a task, of a text file, of a pair of them, or of a table."""
    if completions is not None:
        found.read.setdefault(str(completions), 0)  # the prompts' file counts the rows
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
    own = {name: columns.get(name, name) for name in ROW_COLUMNS}
    for number, values in read_table(path):
        row = {name: values[column] for name, column in own.items() if column in values}
        lacking = [name for name in ("prompt", "completion") if name not in row]
        if lacking and (task == "qa" or "text" not in row):
            raise UserError(
                f"{path} row {number} has no {lacking[0]!r}; it has {', '.join(map(str, values)) or 'nothing'}. "
                f"Expected columns {'' if task == 'qa' else 'text, or '}prompt and completion, so rename yours"
            )
        unused |= dict.fromkeys(str(name) for name in values if name not in own.values())
        yield number, row


def _text_lines(path: Path) -> Iterator[str]:
    """The lines of a text file, without the blanks at their ends."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; expected a text file, one text a line")
    yield from (line.strip() for line in read_lines(path))
