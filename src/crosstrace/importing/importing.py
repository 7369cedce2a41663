"""A user's facts or texts, from files of several kinds, checked row by row, to a folder that a run can teach.

Rows are (subject, relation, object), or plain texts with their continuations for tasks that are no facts. A row that
can't be used is dropped and counted with its reason; nothing is repaired in silence. It trains nothing. A model says
only which texts are too long for it, and, if that is wanted, which facts it knows.

    FOLDER/world.json            relations with their wordings, subjects with their facts (of facts)
    FOLDER/bio.jsonl, qa.jsonl   the examples of both tasks (of rows of text)
    FOLDER/import.json           what was read, kept and dropped, with counts and hashes of the files
    FOLDER/dropped.csv           every dropped row: file, row, reason
    FOLDER/experiment.yaml       an experiment that teaches it, to be changed at will
"""

from __future__ import annotations

import csv
import os
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import yaml

from crosstrace.core.errors import UserError
from crosstrace.core.files import remove_folder, replacing, sha256_file, sha256_tree, write_json, write_text
from crosstrace.data.facts import FactSettings, World
from crosstrace.data.text import Example, texts, write_jsonl
from crosstrace.data.tokens import context_length, encode, too_long
from crosstrace.importing.experiment_settings import experiment_settings
from crosstrace.importing.facts import import_facts
from crosstrace.importing.imported import LONG, REASONS, Imported
from crosstrace.importing.rows import check_splits, import_rows
from crosstrace.importing.tables import data_set_of
from crosstrace.models import loading, locating

WRITTEN = ("world.json", "bio.jsonl", "qa.jsonl", "import.json", "dropped.csv", "experiment.yaml")  # of an import


def import_to(
    folder: Path,
    files: Sequence[Path],
    *,
    rows: Mapping[str, Path] | None = None,
    wording: Path | None = None,
    columns: Mapping[str, str] | None = None,
    split: str = "subject",
    model: str | None = None,
    unknown: bool = False,
    overwrite: bool = False,
    tell: Callable[[str], object] = print,
) -> Imported:
    """Import facts, or the rows of `import_rows`, to a folder, which appears complete or not at all.

    Args:
        files, wording, columns: as of `import_facts`; columns are of `rows` too.
        split, model: facts.split and model.name of the experiment that is written beside the data.
        unknown: drop the facts that the model says by itself in one of their wordings (`world_facts.every_wording`).
        overwrite: replace an earlier import.
        tell: called with the counts and notes, and with how to go on.

    Raises:
        UserError: as `import_facts` and `import_rows`; the folder exists, or the split leaves nothing on one side.
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
    parts: dict[str, list[Example]] = {}
    if rows:
        parts["bio"], parts["qa"], imported = import_rows(rows, columns)
    else:
        imported = import_facts(files, wording, columns)
    with replacing(folder) as partial:
        partial.mkdir()
        examples = _write_data(partial, folder, imported, parts, split)
        if model is not None and _drop_long(imported, parts, examples, model, rows or {}):
            examples = _write_data(partial, folder, imported, parts, split)
        if unknown and model is not None and _drop_known(imported, partial, model):
            examples = _write_data(partial, folder, imported, parts, split)
        read_files = {name: {"rows": count, "sha256": _hash(Path(name))} for name, count in imported.read.items()}
        write_json(
            partial / "import.json", {"schema": 1, "files": read_files, **imported.counts(), "notes": imported.notes}
        )
        with (partial / "dropped.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("file", "row", "reason", "what"), *imported.dropped])
        facts = {"source": str(folder)} | ({} if rows else {"split": split})
        sizes = {task: len(items) for task, items in examples.items()}
        experiment = {"name": folder.name, "facts": facts} | experiment_settings(model, sizes, is_rows=bool(rows))
        write_text(partial / "experiment.yaml", yaml.safe_dump(experiment, sort_keys=False, allow_unicode=True))
        if folder.exists():
            remove_folder(folder)
    tell(counts_text(imported))
    if model not in (None, locating.BUNDLED):
        tell("its learning rate suits a pretrained model of about 160 M parameters; larger ones need a lower one")
    tell(f"\nimported to {folder}; teach it with  crosstrace run {shlex.quote(str(folder / 'experiment.yaml'))}")
    return imported


def _write_data(
    partial: Path, folder: Path, imported: Imported, parts: Mapping[str, Sequence[Example]], split: str
) -> dict[str, list[Example]]:
    """Write facts or rows to `partial`, which will be renamed to `folder`. Returns their examples.

    Raises:
        UserError: as `texts`; its sentence names `folder`.
    """
    if parts:
        for task, examples in parts.items():
            write_jsonl(partial / f"{task}.jsonl", examples)
    else:
        write_json(
            partial / "world.json", {"schema": 1, "relations": imported.relations, "subjects": imported.subjects}
        )
    try:
        return texts(FactSettings(source=str(partial), split=split))  # type: ignore[arg-type]
    except UserError as error:
        raise UserError(str(error).replace(str(partial), str(folder))) from None


def _drop_long(
    imported: Imported,
    parts: dict[str, list[Example]],
    examples: Mapping[str, Sequence[Example]],
    model: str,
    rows: Mapping[str, Path],
) -> bool:
    """Drop the facts and rows whose examples are too long for the model. Returns whether there were any.

    The model must be a folder: nothing is known of any other before it is downloaded.

    Raises:
        UserError: the folder holds no config or tokenizer, or nothing is left.
    """
    path = locating.adapted_base(locating.locate(model)) or locating.locate(model)
    if not Path(path).exists():
        imported.notes.append(f"{model} is no folder, so whether the texts are too long for it is checked when it runs")
        return False
    room = context_length(locating.read_config(path))
    items = [item for of_task in examples.values() for item in of_task]
    long = {item.example.id: item.example for item in too_long(encode(loading.load_tokenizer(model), items), room)}
    if not long:
        return False
    if parts:
        _drop_rows(imported, parts, long, rows)
    else:
        too_long_facts = {mention.fact for example in long.values() for mention in example.mentions}
        _drop_facts(imported, too_long_facts, "too long for the model")
    if not parts["bio"] if parts else not imported.subjects:
        raise UserError(f"every text is too long for {model}, which reads {room} tokens; shorten them")
    if rows.keys() >= {"recall"}:
        check_splits(parts["qa"], rows["recall"])
    return True


def _drop_rows(
    imported: Imported, parts: dict[str, list[Example]], long: Mapping[str, Example], rows: Mapping[str, Path]
) -> None:
    """Drop the rows whose examples, by their ids, are too long for the model."""
    for example in long.values():
        file = str(rows["store" if example.task == "bio" else "recall"])
        number = int(example.id.rpartition(".")[2])
        imported.dropped.append((file, number, "too long for the model", example.text[:LONG]))
    for task, examples in parts.items():
        parts[task] = [example for example in examples if example.id not in long]


def _drop_known(imported: Imported, partial: Path, model: str) -> bool:
    """Drop the facts that the model knows. Returns whether there were any.

    Raises:
        UserError: the model can't be loaded, or knows all of them.
    """
    from crosstrace.experiment.world_facts import every_wording
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
                imported.dropped.append((*row, reason, what[:LONG]))
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
    rows += [[f"relation {name}", str(number)] for name, number in counts["relations"].items()]
    return "\n".join([aligned(rows), *(f"note: {note}" for note in imported.notes)])


def _hash(path: Path) -> str | None:
    """SHA-256 of a file or of a folder's content; None for a data set on the hub."""
    if path.is_file():
        return sha256_file(path)
    folder = (data_set_of(path) or (path, ""))[0]
    return sha256_tree(folder) if folder.is_dir() else None
