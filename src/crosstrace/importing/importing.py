"""A user's facts or texts, from files of several kinds, checked row by row, to a folder that a run can teach.

Rows are (subject, relation, object); or documents with questions about them; or plain texts with their continuations.
A row that can't be used is dropped and counted with its reason; nothing is repaired in silence. It trains nothing. A
model says only which texts are too long for it, and, if that is wanted, which facts it knows.

    FOLDER/world.json            relations with their wordings, subjects with their facts (of facts)
    FOLDER/bio.jsonl, qa.jsonl   the examples of each task (of rows of text; of documents also documents.jsonl)
    FOLDER/import.json           what was read, kept and dropped, with counts and hashes of the files
    FOLDER/dropped.csv           every dropped row: file, row, reason
    FOLDER/experiment.yaml       an experiment that teaches it, to be changed at will
"""

from __future__ import annotations

import csv
import os
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from crosstrace.core.errors import UserError
from crosstrace.core.files import remove_folder, replacing, sha256_file, sha256_tree, write_json, write_text
from crosstrace.data.facts import FactSettings, World
from crosstrace.data.text import Example, texts, write_jsonl
from crosstrace.data.tokens import check_fast, context_length, encode, too_long
from crosstrace.importing import published
from crosstrace.importing.document_tables import read_tables
from crosstrace.importing.documents import QA, STORED, UNASKED, cut_to_windows, make_examples, set_unasked_apart
from crosstrace.importing.experiment_settings import Kind, experiment_settings, leave_out_facts
from crosstrace.importing.facts import import_facts
from crosstrace.importing.imported import Imported, counted
from crosstrace.importing.rows import check_splits, import_rows
from crosstrace.importing.tables import data_set_of
from crosstrace.models import loading, locating
from crosstrace.results.imported import REASONS, answers_in_words

TASKS = ("bio", QA, STORED, UNASKED, *published.TASKS)  # those that an import may write
OVERLAP = 8  # two neighbouring windows share one part in so many
SPECIAL_TOKENS = 4  # tokens kept free in a window: a piece of a text may have a few more tokens than in the text
WRITTEN = ("world.json", "import.json", "dropped.csv", "experiment.yaml", *(f"{task}.jsonl" for task in TASKS))


@dataclass(frozen=True)
class DocumentFiles:
    """Files of documents and questions about them.

    Attributes:
        documents, questions: tables, see `read_tables`; or `documents` alone in a form of `published`.
        key: the column that names documents; if not given, it is looked for.
        question_key: the column by which a question names its document, if it has another name.
        window: tokens of a text that stores at most; longer documents are cut into windows. If not given, as many as
            the model reads.
    """

    documents: Path | None = None
    questions: Path | None = None
    key: str | None = None
    question_key: str | None = None
    window: int | None = None


def import_to(
    folder: Path,
    files: Sequence[Path],
    *,
    rows: Mapping[str, Path] | None = None,
    documents: DocumentFiles | None = None,
    wording: Path | None = None,
    columns: Mapping[str, str] | None = None,
    split: str = "subject",
    model: str | None = None,
    unknown: bool = False,
    overwrite: bool = False,
    tell: Callable[[str], object] = print,
) -> Imported:
    """Import facts, documents with questions or rows of text to a folder, which appears complete or not at all.

    Args:
        files: as of `import_facts`; or one file in a form that `published.form_of` knows.
        rows: as of `import_rows`.
        wording: as of `import_facts`.
        columns: the names that the files have for their columns, of whatever kind the files are.
        split, model: facts.split and model.name of the experiment that is written beside the data.
        unknown: drop the facts that the model says by itself in one of their wordings (`world_facts.every_wording`).
        overwrite: replace an earlier import.
        tell: called with the counts and notes, and with how to go on.

    Raises:
        UserError: as `import_facts`, `import_rows` and `make_examples`; the folder exists, or the split leaves nothing
            on one side.
    """
    folder = Path(os.path.normpath(folder))
    foreign = sorted(item.name for item in folder.iterdir() if item.name not in WRITTEN) if folder.is_dir() else []
    if overwrite and foreign:
        raise UserError(f"{folder} holds {foreign[0]}, which no import wrote, so nothing in it was touched")
    if folder.exists() and not (overwrite and (folder / "import.json").is_file()):
        raise UserError(
            f"{folder} exists; choose another folder"
            + (", since no import made this one" if overwrite else ", or replace it with --overwrite")
        )
    if documents is None and len(files) == 1 and not rows and published.form_of(files[0]):
        documents = DocumentFiles(documents=files[0])
    parts: dict[str, list[Example]] = {}
    if rows:
        parts["bio"], parts[QA], imported = import_rows(rows, columns)
    elif documents is not None:
        parts, imported = _read_documents(documents, columns or {})
        if model is None:
            imported.notes.append(
                "the experiment names the bundled base, which has words for its own people only; name another model "
                "with --model, or make one with crosstrace new-model"
            )
    else:
        imported = import_facts(files, wording, columns)
    with replacing(folder) as partial:
        partial.mkdir()
        examples = _write_data(partial, folder, imported, parts, split)
        if model is not None and _fit_to_model(imported, parts, examples, model, documents):
            if rows and "recall" in rows:
                check_splits(parts[QA], rows["recall"])
            examples = _write_data(partial, folder, imported, parts, split)
        if unknown and model is not None and _drop_known(imported, partial, model):
            examples = _write_data(partial, folder, imported, parts, split)
        read_files = {name: {"rows": count, "sha256": _hash(Path(name))} for name, count in imported.read.items()}
        write_json(
            partial / "import.json", {"schema": 1, "files": read_files, **imported.counts(), "notes": imported.notes}
        )
        with (partial / "dropped.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("file", "row", "reason", "what"), *imported.dropped])
        kind: Kind = "rows" if rows else "documents" if documents else "facts"
        experiment = _experiment(folder, examples, kind, split, model)
        write_text(partial / "experiment.yaml", yaml.safe_dump(experiment, sort_keys=False, allow_unicode=True))
        if folder.exists():
            remove_folder(folder)
    tell(counts_text(imported))
    if model not in (None, locating.BUNDLED):
        tell("its learning rate suits a pretrained model of about 135 M parameters; larger ones need a lower one")
    tell(f"\nimported to {folder}; teach it with  crosstrace run {shlex.quote(str(folder / 'experiment.yaml'))}")
    return imported


def _experiment(
    folder: Path, examples: Mapping[str, Sequence[Example]], kind: Kind, split: str, model: str | None
) -> dict[str, Any]:
    """The experiment that teaches what was imported to `folder`, as plain values."""
    facts: dict[str, Any] = {"source": str(folder)} | ({"split": split} if kind == "facts" else {})
    own_tasks = {} if examples.keys() == {"bio", QA} else {task: folder / f"{task}.jsonl" for task in examples}
    experiment: dict[str, Any] = {"name": folder.name} | ({} if own_tasks else {"facts": facts})
    experiment |= experiment_settings(model, examples, kind, own_tasks)
    if kind == "documents" and not any(example.mentions for example in examples[STORED]):
        leave_out_facts(experiment)
    return experiment


def _read_documents(files: DocumentFiles, columns: Mapping[str, str]) -> tuple[dict[str, list[Example]], Imported]:
    """The examples of documents and their questions, and what was read."""
    imported = Imported()
    form = published.form_of(files.documents) if files.documents and not files.questions else None
    if files.documents and form in published.READERS:
        items = published.read_published(files.documents, form, imported)
    else:
        keys = (files.key, files.question_key or files.key) if files.key else None
        of_documents, of_questions = (None, files.documents) if form == "flat" else (files.documents, files.questions)
        items = read_tables(of_documents, of_questions, keys, columns, imported)
    return make_examples(items, imported), imported


def _write_data(
    partial: Path, folder: Path, imported: Imported, parts: dict[str, list[Example]], split: str
) -> dict[str, list[Example]]:
    """Write facts or texts to `partial`, which will be renamed to `folder`. Returns their examples.

    Raises:
        UserError: as `texts`; its sentence names `folder`.
    """
    if parts:
        parts = set_unasked_apart(parts)
        for task in TASKS:
            (partial / f"{task}.jsonl").unlink(missing_ok=True)  # of texts before they were cut
        for task, examples in parts.items():
            write_jsonl(partial / f"{task}.jsonl", examples)
        if parts.keys() != {"bio", QA}:
            return parts
    else:
        write_json(
            partial / "world.json", {"schema": 1, "relations": imported.relations, "subjects": imported.subjects}
        )
    try:
        return texts(FactSettings(source=str(partial), split=split))  # type: ignore[arg-type]
    except UserError as error:
        raise UserError(str(error).replace(str(partial), str(folder))) from None


def _fit_to_model(
    imported: Imported,
    parts: dict[str, list[Example]],
    examples: Mapping[str, Sequence[Example]],
    model: str,
    documents: DocumentFiles | None,
) -> bool:
    """Cut documents into windows, and drop the facts and texts whose examples are too long for the model.

    The model must be a folder: nothing is known of any other before it is downloaded.

    Returns:
        whether anything changed.

    Raises:
        UserError: the folder holds no config or tokenizer, or nothing is left.
    """
    path = locating.adapted_base(locating.locate(model)) or locating.locate(model)
    if not Path(path).exists():
        if documents is not None and documents.window:
            raise UserError(f"--window needs the tokens of {model}, which is no folder on this machine; download it")
        imported.notes.append(f"{model} is no folder, so whether the texts are too long for it is checked when it runs")
        return False
    room = context_length(locating.read_config(path))
    tokenizer = loading.load_tokenizer(model)
    is_cut = documents is not None and _cut_documents(imported, parts, tokenizer, documents.window, room)
    examples = parts or examples
    items = [item for of_task in examples.values() for item in of_task]
    long = {item.example.id: item.example for item in too_long(encode(tokenizer, items), room)}
    if not long:
        return is_cut
    if parts:
        for example in long.values():
            if example.task != STORED:
                for mention in example.mentions:
                    imported.ways.pop(mention.fact, None)
            imported.drop(*imported.sources[example.id], "too long for the model", example.text)
        for task, of_task in parts.items():
            parts[task] = [example for example in of_task if example.id not in long]
        if documents is not None:
            _check_tasks(parts, model)
    else:
        too_long_facts = {mention.fact for example in long.values() for mention in example.mentions}
        _drop_facts(imported, too_long_facts, "too long for the model")
    if not next(iter(parts.values())) if parts else not imported.subjects:
        raise UserError(f"every text is too long for {model}, which reads {room} tokens; shorten them")
    return True


def _check_tasks(parts: Mapping[str, Sequence[Example]], model: str) -> None:
    """Raise a `UserError` if a task that recalls has lost all questions that are trained, or all that are held out."""
    for task, items in parts.items():
        if task != STORED and len({item.split for item in items}) < 2:
            raise UserError(
                f"all trained or all held-out questions of the task {task} are too long for {model}; shorten them, or "
                "take a model that reads more tokens"
            )


def _cut_documents(
    imported: Imported, parts: dict[str, list[Example]], tokenizer: Any, window: int | None, room: int | None
) -> bool:
    """Cut the documents that have more tokens than a window into windows; returns whether there were any.

    Raises:
        UserError: a window is larger than what the model reads.
    """
    check_fast(tokenizer)
    special = SPECIAL_TOKENS + tokenizer.num_special_tokens_to_add()
    if window is not None and room and window > room - special:
        raise UserError(
            f"--window is {window} tokens, but the model reads {room}, {special} of them kept for special tokens; "
            f"expected at most {room - special}"
        )
    length = window or (room - special if room else None)
    if length is None:
        return False
    pieces: list[Example] = []
    facts = {mention.fact for example in parts[STORED] for mention in example.mentions}
    number = 0
    for example in parts[STORED]:
        options = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
        offsets = tokenizer(example.text, **options)["offset_mapping"]
        cut = cut_to_windows(example, offsets, length, length // OVERLAP) if len(offsets) > length else [example]
        imported.sources |= {piece.id: imported.sources[example.id] for piece in cut}
        number += len(cut) > 1
        pieces += cut
    if not number:
        return False
    parts[STORED] = pieces
    lost = facts - {mention.fact for example in pieces for mention in example.mentions}
    imported.ways |= dict.fromkeys(lost, "cut")
    imported.notes.append(
        f"{counted(number, 'document')} of more than {length} tokens were cut into windows of so many, of which "
        f"neighbours share {length // OVERLAP}; there are {len(pieces)} texts now"
        + (f", and {counted(len(lost), 'answer')} in none of them as a whole" if lost else "")
    )
    return True


def _drop_known(imported: Imported, partial: Path, model: str) -> bool:
    """Drop the facts that the model knows. Returns whether there were any.

    Raises:
        UserError: the model can't be loaded, or knows all of them.
    """
    from crosstrace.data.world_facts import every_wording
    from crosstrace.training.evaluation import recall

    tokenizer = loading.load_tokenizer(model)
    examples = every_wording(World.draw(FactSettings(source=str(partial))), tokenizer)
    device = loading.device(None)
    recalled = recall(loading.load_model(model, "float32").to(device), tokenizer, encode(tokenizer, examples))
    known = {fact for fact, exact in zip(recalled.fact, recalled.exact) if exact}
    _drop_facts(imported, known, "known to the model")
    if not imported.subjects:
        raise UserError(f"{model} knows every fact, so there is nothing to teach it; leave --unknown out")
    return bool(known)


def _drop_facts(imported: Imported, ids: Collection[str], reason: str) -> None:
    """Drop the facts with these ids. `World.draw` makes an id of the subject's number and the fact's."""
    objects: dict[str, dict[str, None]] = {}
    for index, subject in enumerate(imported.subjects):
        kept = []
        for number, fact in enumerate(subject["facts"]):
            if f"S{index:06d}.{number}" in ids:
                row = imported.rows[subject["name"], fact["relation"]]
                what = f"{subject['name']} | {fact['relation']} | {fact['object']}"
                imported.drop(*row, reason, what)
            else:
                kept.append(fact)
                objects.setdefault(fact["relation"], {})[fact["object"]] = None
        subject["facts"] = kept
    imported.subjects = [subject for subject in imported.subjects if subject["facts"]]
    imported.relations = {
        name: row | {"objects": [*objects[name]]} for name, row in imported.relations.items() if name in objects
    }


def counts_text(imported: Imported) -> str:
    """The counts and notes as text."""
    from crosstrace.core.text_tables import aligned

    counts = imported.counts()
    rows = [["rows read", str(counts["read"])], ["rows kept", str(counts["kept"])]]
    rows += [[f"dropped: {REASONS[reason]}", str(number)] for reason, number in counts["dropped"].items()]
    rows += [["subjects", str(counts["subjects"])]] if counts["subjects"] else []
    rows += map(list, answers_in_words(imported.answers))
    rows += [[f"relation {name}", str(number)] for name, number in counts["relations"].items()]
    return "\n".join([aligned(rows), *(f"note: {note}" for note in imported.notes)])


def _hash(path: Path) -> str | None:
    """SHA-256 of a file or of a folder's content; None for a data set on the hub."""
    if path.is_file():
        return sha256_file(path)
    folder = (data_set_of(path) or (path, ""))[0]
    return sha256_tree(folder) if folder.is_dir() else None
