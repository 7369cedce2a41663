"""One's own facts or texts, from files of several kinds, checked row by row, into a folder that a run can be taught.

Rows are (subject, relation, object), or plain texts with their continuations for tasks that are no facts. What is
unfit is dropped and counted with its reason; nothing is mended in silence. It trains nothing, and asks of a model only
which texts are too long for it.

    OWN/world.json       relations with their wordings, subjects with their facts (of facts)
    OWN/bio.jsonl, qa.jsonl    the examples of both tasks (of rows of text)
    OWN/import.json      what was read, kept and dropped, with counts and hashes of the files
    OWN/dropped.csv      every dropped row: file, row, reason
    OWN/experiment.yaml  an experiment that teaches it, to be changed at will
"""

from __future__ import annotations

import csv
import os
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from crosstrace.core.errors import UserError
from crosstrace.core.files import remove_folder, replacing, sha256_file, sha256_tree, write_json, write_text
from crosstrace.data.facts import FactSettings, World
from crosstrace.data.text import Example, texts, write_jsonl
from crosstrace.data.tokens import context_length, encode, too_long
from crosstrace.importing.facts import import_facts
from crosstrace.importing.kept import LONG, REASONS, Imported
from crosstrace.importing.rows import check_asked, import_rows
from crosstrace.importing.tables import data_set_of
from crosstrace.models import loading, locating
from crosstrace.training.recipes import bio_only, mixed, two_stage

WRITTEN = ("world.json", "bio.jsonl", "qa.jsonl", "import.json", "dropped.csv", "experiment.yaml")  # of an import

# What suits a pretrained model of about 160 M parameters, as in examples/pythia-160m.yaml: the default settings are
# those of the tiny bundled base, whose learning rate would wreck any larger model.
PRETRAINED: dict[str, Any] = {
    "train": {
        "optimiser": {"learning_rate": 1e-4, "betas": [0.9, 0.95], "weight_decay": 0.01, "warmup": 40},
        "checkpoint_every": 200, "recall_every": 100, "recall_examples": 120,
    },
    "trace": {"every": 5, "parts": 2, "examples": 400, "batch": 16},
    "analysis": {"central_fractions": [0.01, 0.05]},
    "interventions": {"fractions": [0.05, 0.2], "seeds": 1, "questions": 120},
    "mechanism": {
        "parts": ["gradients", "representations", "lens", "transfer"], "facts": 96, "together": 24, "questions": 48
    },
    "jobs": 1,
}  # fmt: skip

# What the default experiment is too long with for a thousand facts in ten minutes on two cores.
SMALL: dict[str, Any] = {
    "trace": {"every": 5}, "interventions": {"seeds": 2, "questions": 150}, "mechanism": {"questions": 48}
}  # fmt: skip

BIO, QA, PASSES = 16, 32, 13  # examples in its updates, and how often each text that stores is seen


# ------------------------------------------------------------------------------- the folder


def make(
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
    """Import facts, or the rows of `import_rows`, into `folder`, complete or not at all.

    Args:
        files, wording, columns: as of `import_facts`; the last of rows too.
        split, model: facts.split and model.name of the experiment that is written beside the data.
        unknown: drop the facts that the model says by itself (`world_facts.every_wording`), in one of their wordings.
        overwrite: replace an earlier import.
        tell: is given the counts and notes, and how to go on.

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
        parts["bio"], parts["qa"], found = import_rows(rows, columns)
    else:
        found = import_facts(files, wording, columns)
    with replacing(folder) as partial:
        partial.mkdir()
        taught = _write(partial, folder, found, parts, split)
        if model is not None and _drop_long(found, parts, taught, model, rows or {}):
            taught = _write(partial, folder, found, parts, split)
        if unknown and model is not None and _drop_known(found, partial, model):
            taught = _write(partial, folder, found, parts, split)
        about = {name: {"rows": count, "sha256": _hash(Path(name))} for name, count in found.read.items()}
        write_json(partial / "import.json", {"schema": 1, "files": about, **found.counts(), "notes": found.notes})
        with (partial / "dropped.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("file", "row", "reason", "what"), *found.dropped])
        facts = {"source": str(folder)} | ({} if rows else {"split": split})
        sizes = {task: len(items) for task, items in taught.items()}
        experiment = {"name": folder.name, "facts": facts} | _settings(model, sizes, bool(rows))
        write_text(partial / "experiment.yaml", yaml.safe_dump(experiment, sort_keys=False, allow_unicode=True))
        if folder.exists():
            remove_folder(folder)
    tell(told(found))
    if model not in (None, locating.BUNDLED):
        tell("its learning rate suits a pretrained model of about 160 M parameters; larger ones need a lower one")
    tell(f"\nimported to {folder}; teach it with  crosstrace run {shlex.quote(str(folder / 'experiment.yaml'))}")
    return found


def _write(
    partial: Path, folder: Path, found: Imported, parts: Mapping[str, Sequence[Example]], split: str
) -> dict[str, list[Example]]:
    """Write facts or rows to `partial`, which is to become `folder`; returns their examples.

    Raises:
        UserError: as `texts`, which names `folder`.
    """
    if parts:
        for task, examples in parts.items():
            write_jsonl(partial / f"{task}.jsonl", examples)
    else:
        write_json(partial / "world.json", {"schema": 1, "relations": found.relations, "subjects": found.subjects})
    try:
        return texts(FactSettings(source=str(partial), split=split))  # type: ignore[arg-type]
    except UserError as error:
        raise UserError(str(error).replace(str(partial), str(folder))) from None


def _drop_long(
    found: Imported,
    parts: dict[str, list[Example]],
    taught: Mapping[str, Sequence[Example]],
    model: str,
    rows: Mapping[str, Path],
) -> bool:
    """Drop the facts and rows whose examples are too long for a model that is a folder; of another nothing is known
    before it is downloaded. Returns whether there were any.

    Raises:
        UserError: the folder holds no config or tokenizer, or nothing is left.
    """
    place = locating.adapted_base(locating.locate(model)) or locating.locate(model)
    if not Path(place).exists():
        found.notes.append(f"{model} is no folder, so whether the texts are too long for it is checked when it runs")
        return False
    room = context_length(locating.read_config(place))
    items = [item for examples in taught.values() for item in examples]
    long = {item.example.id: item.example for item in too_long(encode(loading.load_tokenizer(model), items), room)}
    if not long:
        return False
    if parts:
        _drop_rows(found, parts, long, rows)
    else:
        too_long_facts = {mention.fact for example in long.values() for mention in example.mentions}
        _drop_facts(found, too_long_facts, "too long for the model")
    if not parts["bio"] if parts else not found.subjects:
        raise UserError(f"every text is too long for {model}, which reads {room} tokens; shorten them")
    if rows.keys() >= {"recall"}:
        check_asked(parts["qa"], rows["recall"])
    return True


def _drop_rows(
    found: Imported, parts: dict[str, list[Example]], long: Mapping[str, Example], rows: Mapping[str, Path]
) -> None:
    for example in long.values():
        file = str(rows["store" if example.task == "bio" else "recall"])
        number = int(example.id.rpartition(".")[2])
        found.dropped.append((file, number, "too long for the model", example.text[:LONG]))
    for task, examples in parts.items():
        parts[task] = [example for example in examples if example.id not in long]


def _drop_known(found: Imported, partial: Path, model: str) -> bool:
    """Drop the facts that a model knows. Returns whether there were any.

    Raises:
        UserError: the model can't be loaded, or knows all of them.
    """
    from crosstrace.experiment.world_facts import every_wording
    from crosstrace.training.evaluation import recall

    tokenizer = loading.load_tokenizer(model)
    every = every_wording(World.draw(FactSettings(source=str(partial))), tokenizer)
    device = loading.device(None)
    answered = recall(loading.load_model(model, "float32").to(device), tokenizer, encode(tokenizer, every))
    known = {fact for fact, exact in zip(answered.fact, answered.exact) if exact}
    _drop_facts(found, known, "known to the model")
    if not found.subjects:
        raise UserError(f"{model} knows every fact, so there is nothing to teach it; leave --unknown out")
    return bool(known)


def _drop_facts(found: Imported, doomed: Collection[str], reason: str) -> None:
    """Drop the facts of these ids, which `World.draw` makes of the subject's place and the fact's."""
    objects: dict[str, dict[str, None]] = {}
    for index, subject in enumerate(found.subjects):
        kept = []
        for number, fact in enumerate(subject["facts"]):
            if f"S{index:06d}.{number}" in doomed:
                row = found.rows[subject["name"], fact["relation"]]
                what = f"{subject['name']} | {fact['relation']} | {fact['object']}"
                found.dropped.append((*row, reason, what[:LONG]))
            else:
                kept.append(fact)
                objects.setdefault(fact["relation"], {})[fact["object"]] = None
        subject["facts"] = kept
    found.subjects = [subject for subject in found.subjects if subject["facts"]]
    found.relations = {
        name: row | {"objects": [*objects[name]]} for name, row in found.relations.items() if name in objects
    }


def _settings(model: str | None, sizes: Mapping[str, int], rows: bool) -> dict[str, Any]:
    """What an experiment sets beside its name and facts, for so many texts of each task, of `rows` or of facts."""
    pretrained = model not in (None, locating.BUNDLED)
    found: dict[str, Any] = {"model": {"name": model}} if pretrained else {}
    steps = max(100, round(PASSES * sizes["bio"] / BIO))
    strategies = {}
    if pretrained:
        strategies = {"two_stage": two_stage(BIO, QA, steps), "mixed": mixed(BIO, QA, steps)}
    if not sizes["qa"]:
        strategies = {"store": bio_only(BIO, steps) if pretrained else bio_only()}
    if strategies:
        found["strategies"] = {
            name: [{"name": phase.name, "batch": phase.batch, "steps": phase.steps} for phase in phases]
            for name, phases in strategies.items()
        }
    found |= PRETRAINED if pretrained else SMALL
    if rows:  # the other analyses compare a fact's two formats, or need to know its subject
        # (that one takes hours there)
        found["mechanism"] = {"run": False} if pretrained else SMALL["mechanism"] | {"parts": ["circuit"]}
    if not sizes["qa"]:
        found |= {"interventions": {"run": False}, "mechanism": {"run": False}}
    return found


def told(found: Imported) -> str:
    """The counts and notes as text."""
    from crosstrace.core.results import aligned

    counts = found.counts()
    rows = [["rows read", str(counts["read"])], ["rows kept", str(counts["kept"])]]
    rows += [[f"dropped: {REASONS[reason]}", str(number)] for reason, number in counts["dropped"].items()]
    rows += [["subjects", str(counts["subjects"])]] if counts["subjects"] else []
    rows += [[f"relation {name}", str(number)] for name, number in counts["relations"].items()]
    return "\n".join([aligned(rows), *(f"note: {note}" for note in found.notes)])


def _hash(path: Path) -> str | None:
    """Of a file's content, or a folder's; None of a data set on the hub."""
    if path.is_file():
        return sha256_file(path)
    folder = (data_set_of(path) or (path, ""))[0]
    return sha256_tree(folder) if folder.is_dir() else None
