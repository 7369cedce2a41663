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
import difflib
import os
import random
import re
import shlex
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml

from crosstrace.core.errors import UserError
from crosstrace.core.files import remove_folder, replacing, sha256_file, sha256_tree, write_json, write_text
from crosstrace.data.facts import FactSettings, World
from crosstrace.data.text import NO_QUESTIONS, Example, Mention, texts, write_jsonl
from crosstrace.data.tokens import context_length, encode, too_long
from crosstrace.experiment.config import read_yaml
from crosstrace.importing.tables import EXPECTED, data_set_of, read_lines, read_object, read_table
from crosstrace.models import loading
from crosstrace.training.recipes import bio_only, mixed, two_stage

LONG = 200  # characters of a name: more is a text
OFTEN = 3  # facts with one object: fewer say nothing of how well a guess does
COLUMNS = ("subject", "relation", "object", "type", "pronoun", "split", "statement", "question")
ROW_COLUMNS = ("text", "prompt", "completion", "subject", "split")
ROWS = ("store", "store-completions", "recall", "recall-completions")  # files of plain rows
OF_RELATION = ("name", "prompt_templates", "prompt_templates_zs", "samples", "properties")  # of the relations format
SPLITS = ("id", "ood")
Said = dict[str, dict[str, dict[str, None]]]  # relation -> statements, questions -> its different patterns, in order
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
STATEMENT, QUESTION = "[The {relation} of] {subject} [is] {object}.", "[What is the {relation} of] {subject}[?]"
_WORD = re.compile(r"\w")
_INVISIBLE = re.compile(
    "[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]"
)

REASONS = {
    "empty": "a subject, relation or object that is empty",
    "not a text": "a value that is neither text nor a number nor a date, e.g. a list, a truth value or bytes",
    "too long": f"a subject, relation or object of more than {LONG} characters",
    "control": "characters that control the text's direction or a terminal",
    "not Unicode": "half a surrogate pair, which no file can hold",
    "duplicate": "said before",
    "contradiction": "another object for a subject and relation that were there before",
    "answer in the prompt": "the object stands in the subject's name or type, so the question gives it away",
    "other split": "a split other than id and ood",
    "no words": "a subject, relation or object without a word",
    "too long for the model": "a text of more tokens than the model of --model can read",
    "known to the model": "a fact that the model of --model says by itself, in one of its wordings",
    "one word": "a text of one word, in which nothing is predicted",
}


@dataclass(frozen=True)
class Source:
    """One row of a file: where it stands and its columns."""

    file: str
    number: int
    values: Mapping[str, Any]


@dataclass
class Imported:
    """What was read, and what became of it.

    Attributes:
        rows: (subject, relation) -> (file, row) of each fact.
        relations: name -> {statements, questions, objects}.
        subjects: {name, type, pronoun, facts [{relation, object, split}]}.
        dropped: (file, row, reason, what) of each row that was not kept.
        read: rows of each file.
        notes: what a reader of results should know of the data.
    """

    relations: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    subjects: list[dict[str, Any]] = field(default_factory=list)
    dropped: list[tuple[str, int, str, str]] = field(default_factory=list)
    read: dict[str, int] = field(default_factory=dict)
    rows: dict[tuple[str, str], tuple[str, int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def kept(self) -> int:
        """Number of rows that were kept: facts, or texts."""
        return sum(self.read.values()) - len(self.dropped)

    def counts(self) -> dict[str, Any]:
        """Rows read = facts kept + rows dropped, the latter by reason."""
        return {
            "read": sum(self.read.values()),
            "kept": self.kept,
            "dropped": dict(Counter(reason for _, _, reason, _ in self.dropped)),
            "subjects": len(self.subjects),
            "relations": {name: len(facts) for name, facts in self.by_relation().items()},
        }

    def by_relation(self) -> dict[str, list[tuple[dict[str, Any], str]]]:
        """Relation -> (subject, object) of each of its facts."""
        facts: dict[str, list[tuple[dict[str, Any], str]]] = {name: [] for name in self.relations}
        for subject in self.subjects:
            for fact in subject["facts"]:
                facts.setdefault(fact["relation"], []).append((subject, fact["object"]))
        return facts


# ------------------------------------------------------------------------------- facts


def import_facts(
    files: Sequence[Path], wording: Path | None = None, columns: Mapping[str, str] | None = None
) -> Imported:
    """Read facts and check them.

    Args:
        files: CSV, TSV, JSONL or Parquet with columns subject, relation and object (without a relation, the file's name
            is it), and, if wanted, pronoun, split (id or ood), statement and question (patterns of that relation with
            {subject} and {object}; [brackets] mark the words of the relation), and type (of the subject, {type} in
            patterns); or JSON of one relation with its prompt templates: {name, prompt_templates, prompt_templates_zs,
            samples [{subject, object}]}.
        wording: YAML of relation -> {statements: [...], questions: [...]}, which goes before what the files say.
        columns: names of the files' own columns: {"subject": "person", ...}.

    Raises:
        UserError: a file cannot be read, is malformed, or nothing of it can be kept.
    """
    found = Imported()
    given = _wordings(wording) if wording else {}
    said: Said = {}
    people: dict[str, dict[str, Any]] = {}
    objects: dict[tuple[str, str], str] = {}
    unused: dict[str, None] = {}
    retyped: dict[str, None] = {}
    for path in files:
        found.read.setdefault(str(path), 0)
        for row in _rows(path, said, columns or {}, unused):
            found.read[str(path)] += 1
            fact = {name: row.values.get(name) for name in COLUMNS}
            reason = _unfit(fact)
            if reason is None:
                subject, relation, object = (_tidy(fact[name]) for name in COLUMNS[:3])
                before = objects.get((subject, relation))
                if before is not None:
                    reason = "duplicate" if before == object else "contradiction"
                elif any(
                    _within(object.casefold(), _tidy(fact[name] or "").casefold()) for name in ("subject", "type")
                ):
                    reason = "answer in the prompt"
            if reason is not None:
                found.dropped.append((row.file, row.number, reason, _short(row.values)))
                continue
            objects[subject, relation] = object
            found.rows[subject, relation] = (row.file, row.number)
            person = people.setdefault(subject, {"name": subject, "type": None, "pronoun": None, "facts": []})
            person["pronoun"] = person["pronoun"] or _tidy(fact["pronoun"] or "") or None
            kind = _tidy(fact["type"] or "") or None
            person["type"] = person["type"] or kind
            if kind not in (None, person["type"]):
                retyped[subject] = None
            split = _tidy(fact["split"] or "").lower() or None
            person["facts"].append({"relation": relation, "object": object, "split": split})
            for part, name in (("statements", "statement"), ("questions", "question")):
                if fact[name]:
                    where = f"{row.file} row {row.number}: {name}"
                    _known(said, relation)[part][_pattern(fact[name], name, where)] = None
    found.subjects = list(people.values())
    if not found.kept:
        total = found.counts()
        raise UserError(
            f"no fact could be kept of {total['read']} rows in {', '.join(map(str, files))}"
            + (f": {_told(total['dropped'])}" if total["dropped"] else "")
        )
    _word(found, given, said)
    if unused:
        found.notes.append(_told_unused(unused, COLUMNS))
    if retyped:
        found.notes.append(f"{len(retyped)} subjects have several types, e.g. {next(iter(retyped))!r}; the first stays")
    _note(found)
    return found


def _known(said: Said, relation: str) -> dict[str, dict[str, None]]:
    """The wordings of a relation that files have brought so far."""
    return said.setdefault(relation, {"statements": {}, "questions": {}})


def _told_unused(unused: Iterable[str], known: Sequence[str]) -> str:
    """The columns that nothing was made of, each with the one that may be meant."""
    close = {name: difflib.get_close_matches(name, known, 1, 0.75) for name in unused}
    return "columns that nothing was made of: " + ", ".join(
        (name or "one without a name") + (f" (is {meant[0]} meant?)" if meant else "") for name, meant in close.items()
    )


def _unfit(fact: Mapping[str, Any]) -> str | None:
    """Why a row can't be kept, by itself."""
    for name in COLUMNS:
        value = fact[name]
        if value is None and name not in COLUMNS[:3]:
            continue
        if not isinstance(value, str | None):
            return "not a text"
        text = value or ""
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            return "not Unicode"
        if _INVISIBLE.search(text):
            return "control"
        if name in COLUMNS[:3]:
            if not _tidy(text):
                return "empty"
            if len(_tidy(text)) > LONG:
                return "too long"
            if not any(letter.isalnum() or unicodedata.category(letter)[0] == "S" for letter in text):
                return "no words"
    if fact["split"] not in (None, "") and _tidy(fact["split"]).lower() not in SPLITS:
        return "other split"
    return None


def _tidy(value: Any) -> str:
    """One line of composed characters, without blanks at its ends."""
    return " ".join(unicodedata.normalize("NFC", str(value)).split())


def _within(object: str, text: str) -> bool:
    """Whether the object stands in a text as words of its own; at an end whose letter belongs to a script that puts no
    blanks between words, as a part of one."""
    start = text.find(object)
    while start >= 0:
        end = start + len(object)
        begins = _wide(object[0]) or not _WORD.match(text[start - 1 : start])
        if begins and (_wide(object[-1]) or not _WORD.match(text[end : end + 1])):
            return True
        start = text.find(object, start + 1)
    return False


def _wide(letter: str) -> bool:
    """Whether a letter is of a Chinese, Japanese or Korean script."""
    return unicodedata.east_asian_width(letter) in "WF" and letter.isalpha()


def _short(values: Mapping[str, Any]) -> str:
    said = (values.get(name) for name in COLUMNS[:3])
    text = " | ".join("" if value is None else str(value) for value in said)
    return text.encode("utf-8", "replace").decode()[:LONG]


def _word(found: Imported, given: Mapping[str, Mapping[str, list[str]]], said: Said) -> None:
    """Give every relation its wordings: of the wording file, else of the facts' files, else the plain ones."""
    facts = found.by_relation()
    unknown = [name for name in given if name not in facts]
    if unknown:
        raise UserError(
            f"the wording file words {unknown[0]!r}, but no fact has that relation; relations are {', '.join(facts)}"
        )
    plain = []
    for name, rows in facts.items():
        words = {"relation": _braces(name.replace("_", " "))}
        own = {}
        for part, pattern in (("statements", STATEMENT), ("questions", QUESTION)):
            unasked = given.get(name, {}).get(part) == []
            own[part] = list(given.get(name, {}).get(part) or (not unasked and said.get(name, {}).get(part)) or ())
            if not own[part] and not unasked:
                own[part] = [pattern.replace("{relation}", words["relation"])]
                plain.append(f"{name} ({part})")
        found.relations[name] = own | {"objects": [*dict.fromkeys(object for _, object in rows)]}
    if plain:
        found.notes.append(
            f"plain wordings were made for {', '.join(plain)}: give better ones with --wording, or in columns "
            "statement and question"
        )
    unasked = [name for name, row in found.relations.items() if not row["questions"]]
    if len(unasked) == len(found.relations):
        found.notes.append(NO_QUESTIONS)
    elif unasked:
        found.notes.append(f"nothing is asked about {', '.join(unasked)}: these facts are stored only")
    for name, row in found.relations.items():
        _check_types(name, facts[name], [*row["statements"], *row["questions"]])
        _note_told(found, name, facts[name], row["questions"])


def _check_types(relation: str, facts: Sequence[tuple[dict[str, Any], str]], patterns: Sequence[str]) -> None:
    """Raise a `UserError` if a relation's wordings speak of the type of a subject that has none."""
    pattern = next((pattern for pattern in patterns if "{type}" in pattern), None)
    if pattern is None:
        return
    lacking = [subject["name"] for subject, _ in facts if not subject["type"]]
    if lacking:
        raise UserError(
            f"the wording {pattern!r} of {relation} needs a type, but {len(lacking)} of its subjects have none, e.g. "
            f"{lacking[0]!r}; give it in a column type, or leave {{type}} out"
        )


def _note_told(
    found: Imported, relation: str, facts: Sequence[tuple[dict[str, Any], str]], questions: Sequence[str]
) -> None:
    """Note how many objects stand in the words that a question has for every subject: these single nobody's answer out,
    and a short word is soon met by chance, so they are kept."""
    fixed = [re.sub(r"[][]", "", re.sub(r"\{\w+\}", "\n", question)) for question in questions]
    standing = _standing({object for _, object in facts}, fixed)
    told = [object for _, object in facts if object in standing]
    if told:
        found.notes.append(
            f"the objects of {len(told)} facts of {relation}, e.g. {told[0]!r}, stand in the words of a question, the "
            "same for every subject; they are kept, so word it without them"
        )


def _standing(objects: Collection[str], texts: Iterable[str]) -> set[str]:
    """The objects that stand in one of the texts as `_within` sees it. Each text is gone through once, however many
    objects there are: where a word may begin, every length that an object has is looked up."""
    lengths = sorted({len(object) for object in objects})
    standing = set()
    for text in dict.fromkeys(texts):
        # a word begins and ends beside what is no letter of a word; one in a script without blanks, anywhere
        wide = {place for place, letter in enumerate(text) if _wide(letter)}
        begins = wide | {place.start() for place in re.finditer(r"(?<!\w)", text)}
        ends = {place + 1 for place in wide} | {place.start() for place in re.finditer(r"(?!\w)", text)}
        for begin in begins:
            for length in lengths:
                if begin + length > len(text):
                    break
                if begin + length in ends and text[begin : begin + length] in objects:
                    standing.add(text[begin : begin + length])
    return standing


def _braces(text: str) -> str:
    return re.sub(r"[][{}]", " ", text)


def _note(found: Imported) -> None:
    """What makes recall easier or harder than it looks."""
    for name, facts in found.by_relation().items():
        objects = Counter(object for _, object in facts)
        top, count = objects.most_common(1)[0]
        if len(objects) == 1:
            found.notes.append(f"every object of {name} is {top!r}, so recall of it shows nothing")
        elif count / len(facts) > 0.2 and count >= OFTEN:
            found.notes.append(
                f"{top!r} is the object of {count} of {len(facts)} facts of {name}: guessing it is right so often"
            )
    names = [s["name"] for s in found.subjects]
    in_another_order = [group for group in _alike(names, _parts) if len({*map(_folded, group)}) > 1]
    for groups, how in (
        (_alike(names, _folded), "differ in case or accents only"),
        (in_another_order, "share all names, in another order"),
    ):
        if groups:
            told = " and ".join(map(repr, groups[0]))
            found.notes.append(f"{len(groups)} groups of subjects {how}, e.g. {told}")
    first = Counter(name.split()[0] for name in names)
    alone = sum(first[name.split()[0]] == 1 for name in names)
    if alone > len(names) / 2:
        found.notes.append(
            f"{alone} of {len(names)} subjects can be told by their first word alone, which makes recall easier"
        )
    objects = {object for row in found.relations.values() for object in row["objects"]}
    _note_scripts(found, {"subjects": names, "objects": objects, "relations": [*found.relations]})
    splits = Counter(f["split"] for s in found.subjects for f in s["facts"])
    if splits[None] and len(splits) > 1:
        found.notes.append(f"{splits[None]} facts have no split, so facts.split: given can't be used")


def _note_scripts(found: Imported, kinds: Mapping[str, Collection[str]]) -> None:
    """Count, of each kind of texts, those in which a tokenizer or a terminal may meet what it does not expect."""
    for what, is_such in (
        ("letters beyond ASCII", _is_beyond_ascii),
        ("words written from right to left", _is_right_to_left),
    ):
        counts = {kind: sum(map(is_such, each)) for kind, each in kinds.items()}
        if any(counts.values()):
            told = ", ".join(f"{n} of {len(kinds[kind])} {kind}" for kind, n in counts.items() if n)
            found.notes.append(f"{what}: {told}")


def _is_beyond_ascii(text: str) -> bool:
    return not text.isascii()


def _is_right_to_left(text: str) -> bool:
    return any(unicodedata.bidirectional(letter) in ("R", "AL") for letter in text)


def _alike(names: Iterable[str], key: Callable[[str], Any]) -> list[list[str]]:
    """The groups of names, of two or more, that have the same key."""
    groups: dict[Any, list[str]] = {}
    for name in names:
        groups.setdefault(key(name), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _parts(name: str) -> frozenset[str]:
    """The parts of a name in no order, as in "Ada Brook" and "Brook, Ada"."""
    return frozenset(_folded(name).replace(",", " ").split())


def _folded(name: str) -> str:
    plain = unicodedata.normalize("NFKD", name.casefold())
    return "".join(letter for letter in plain if not unicodedata.combining(letter))


# ------------------------------------------------------------------------------- patterns


def _wordings(path: Path) -> dict[str, dict[str, list[str]]]:
    """The wordings of a YAML file."""
    values = read_yaml(path, "docs/guide.md's")
    found: dict[str, dict[str, list[str]]] = {}
    for relation, row in values.items():
        where = f"{path}: {relation}"
        if not isinstance(row, dict) or {*row} - {"statements", "questions"}:
            raise UserError(f"{where} is {row!r}; expected statements and questions, each a list of patterns")
        found[_tidy(relation)] = {}
        for part, patterns in row.items():
            if not isinstance(patterns, list) or (not patterns and part == "statements"):
                raise UserError(
                    f"{where}: {part} is {patterns!r}; expected a list of patterns"
                    + (", or [] where nothing is asked" if part == "questions" else "")
                )
            found[_tidy(relation)][part] = [_pattern(p, part[:-1], f"{where}: {part}") for p in patterns]
    return found


def _pattern(text: Any, kind: str, where: str) -> str:
    """A pattern of one statement or question, with the words of its relation in brackets.

    Raises:
        UserError: braces other than {subject}, {object} and {type}, one of the first two missing or twice, brackets
            that don't close.
    """
    if not isinstance(text, str) or not text.strip():
        raise UserError(
            f"{where} is {text!r}; expected a pattern with {{subject}}{' and {object}' * (kind == 'statement')}"
        )
    if len(text) > 10 * LONG or _INVISIBLE.search(text):
        raise UserError(f"{where} is {text[:60]!r}…; expected one sentence without control characters")
    pattern = _tidy(text)
    if kind == "question":
        pattern = re.sub(r"\s*\{object\}\W*$", "", pattern)  # the answer follows anyhow
    wanted = ("{subject}", "{object}") if kind == "statement" else ("{subject}",)
    counts = {name: pattern.count(name) for name in ("{subject}", "{object}")}
    if any(counts[name] != (name in wanted) for name in counts) or re.search(
        r"[{}]", re.sub(r"\{(subject|object|type)\}", "", pattern)
    ):
        raise UserError(
            f"{where} is {text!r}; expected {' and '.join(wanted)}, each once"
            + (", and no {object}: the answer follows the question" if kind == "question" else "")
            + ", and no other braces but {type}"
        )
    if "[" in pattern or "]" in pattern:
        if re.sub(r"\[[^][{}]*\]", "", pattern).strip("[]") != re.sub(r"\[[^][{}]*\]", "", pattern) or re.search(
            r"[][]", re.sub(r"\[[^][{}]*\]", "", pattern)
        ):
            raise UserError(
                f"{where} is {text!r}; expected [brackets] around words of the relation, closed and not nested"
            )
        return pattern
    return _bracketed(pattern)


def _bracketed(pattern: str) -> str:
    """All words but the subject, its type and the object, marked as the relation's."""
    pieces = re.split(r"(\{subject\}|\{object\}|\{type\})", pattern)
    marked = (re.sub(r"(\w(?:.*\w)?)", r"[\1]", piece, count=1) for piece in pieces)
    return "".join(piece if piece.startswith("{") else words for piece, words in zip(pieces, marked))


# ------------------------------------------------------------------------------- files


def _rows(path: Path, said: Said, columns: Mapping[str, str], unused: dict[str, None]) -> Iterator[Source]:
    """The rows of a file of any kind; wordings that it brings go to `said`, columns of no use to `unused`."""
    if path.suffix.lower() == ".json":
        yield from _relation_file(path, said, unused)
        return
    own = {name: columns.get(name, name) for name in COLUMNS}
    named = data_set_of(path)
    fixed = _tidy(named[0].name if named else path.stem)
    for number, values in read_table(path):
        row = {name: values.get(column) for name, column in own.items()}
        for name in ("subject", "object"):
            if own[name] not in values:
                raise UserError(
                    f"{path} row {number} has no {own[name]!r}; it has {', '.join(map(str, values)) or 'nothing'}. "
                    f"Expected columns subject, relation and object, or name yours, e.g. --subject NAME"
                )
        if own["relation"] not in values:
            row["relation"] = fixed
        unused |= dict.fromkeys(str(name) for name in values if name not in own.values())
        yield Source(str(path), number, row)


def _relation_file(path: Path, said: Said, unused: dict[str, None]) -> Iterator[Source]:
    """A relation with its prompt templates, in which {} stands for the subject and the object follows at the end."""
    if not path.is_file():
        raise UserError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}; expected {EXPECTED}")
    values = read_object("".join(read_lines(path)), str(path))
    name, samples = values.get("name"), values.get("samples")
    if not isinstance(name, str) or not _tidy(name) or not isinstance(samples, list):
        raise UserError(
            f"{path} is no relation with samples; expected {{name, prompt_templates, samples: [{{subject, object}}]}} "
            "(or JSONL, one fact a line)"
        )
    unused |= dict.fromkeys(key for key in values if key not in OF_RELATION)
    relation = _tidy(name)
    known = _known(said, relation)
    for key in ("prompt_templates", "prompt_templates_zs"):
        templates = values.get(key) or []
        if not isinstance(templates, list):
            raise UserError(f"{path}: {key} is {templates!r}; expected a list of texts with {{}}")
        for template in templates:
            if not isinstance(template, str) or template.count("{}") != 1:
                raise UserError(f"{path}: {key} holds {template!r}; expected a text with one {{}} for the subject")
            own = template.replace("{}", "{subject}")
            part = "questions" if "?" in template else "statements"
            pattern = own if part == "questions" else f"{own} {{object}}."
            known[part][_pattern(pattern, part[:-1], f"{path}: {key}")] = None
    for number, sample in enumerate(samples, 1):
        if not isinstance(sample, dict):
            raise UserError(f"{path}: sample {number} is {sample!r}; expected {{subject, object}}")
        unused |= dict.fromkeys(key for key in sample if key not in COLUMNS)
        yield Source(str(path), number, {**sample, "relation": relation})


# ------------------------------------------------------------------------------- plain rows


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
            raise UserError(f"no row of {path} could be kept: {_told(reasons) or 'it has none'}")
    if unused:
        found.notes.append(_told_unused(unused, ROW_COLUMNS))
    _note_scripts(found, {"texts": [item.text for items in parts.values() for item in items]})
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
    _check_asked(parts["qa"], recall)
    return parts["bio"], parts["qa"], found


def _check_asked(questions: Sequence[Example], recall: Path) -> None:
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
        blank = " " if glued and not _wide(prompt[-1]) and not _wide(completion[0]) else ""
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
        elif _INVISIBLE.search(whole):
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
        if task == "qa" and _within(completion.strip().casefold(), prompt.casefold()):
            given_away.append(number)
        start = len(whole) - len(completion.lstrip())
        if not prompt.strip():  # nothing predicts a text's first word
            start += len(completion.split()[0])
        answer = (start, len(whole.rstrip()))
        person = _tidy(text["subject"]) or f"{task}.{number}"
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
        unknown: drop the facts that the model says by itself (`known.every_wording`), in one of their wordings.
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
    if model not in (None, loading.BUNDLED):
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
    place = loading.adapted_base(loading.locate(model)) or loading.locate(model)
    if not Path(place).exists():
        found.notes.append(f"{model} is no folder, so whether the texts are too long for it is checked when it runs")
        return False
    room = context_length(loading.read_config(place))
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
        _check_asked(parts["qa"], rows["recall"])
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
    pretrained = model not in (None, loading.BUNDLED)
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


def _told(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{number} × {REASONS[reason]}" for reason, number in dropped.items())
