"""Facts from tables and relation files, each row checked."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from crosstrace.core.errors import UserError
from crosstrace.data.text import NO_QUESTIONS
from crosstrace.importing.kept import (
    COLUMNS,
    INVISIBLE,
    LONG,
    SPLITS,
    Imported,
    Said,
    Source,
    dropped_text,
    short,
    tidy,
)
from crosstrace.importing.tables import EXPECTED, data_set_of, read_lines, read_object, read_table
from crosstrace.importing.wordings import checked_pattern, wordings

STATEMENT, QUESTION = "[The {relation} of] {subject} [is] {object}.", "[What is the {relation} of] {subject}[?]"
OFTEN = 3  # facts with one object: fewer say nothing of how well a guess does

OF_RELATION = ("name", "prompt_templates", "prompt_templates_zs", "samples", "properties")  # of the relations format

_WORD = re.compile(r"\w")


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
    given = wordings(wording) if wording else {}
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
                subject, relation, object = (tidy(fact[name]) for name in COLUMNS[:3])
                before = objects.get((subject, relation))
                if before is not None:
                    reason = "duplicate" if before == object else "contradiction"
                elif any(within(object.casefold(), tidy(fact[name] or "").casefold()) for name in ("subject", "type")):
                    reason = "answer in the prompt"
            if reason is not None:
                found.dropped.append((row.file, row.number, reason, short(row.values)))
                continue
            objects[subject, relation] = object
            found.rows[subject, relation] = (row.file, row.number)
            person = people.setdefault(subject, {"name": subject, "type": None, "pronoun": None, "facts": []})
            person["pronoun"] = person["pronoun"] or tidy(fact["pronoun"] or "") or None
            kind = tidy(fact["type"] or "") or None
            person["type"] = person["type"] or kind
            if kind not in (None, person["type"]):
                retyped[subject] = None
            split = tidy(fact["split"] or "").lower() or None
            person["facts"].append({"relation": relation, "object": object, "split": split})
            for part, name in (("statements", "statement"), ("questions", "question")):
                if fact[name]:
                    where = f"{row.file} row {row.number}: {name}"
                    _known(said, relation)[part][checked_pattern(fact[name], name, where)] = None
    found.subjects = list(people.values())
    if not found.kept:
        total = found.counts()
        raise UserError(
            f"no fact could be kept of {total['read']} rows in {', '.join(map(str, files))}"
            + (f": {dropped_text(total['dropped'])}" if total["dropped"] else "")
        )
    _word(found, given, said)
    if unused:
        found.notes.append(told_unused(unused, COLUMNS))
    if retyped:
        found.notes.append(f"{len(retyped)} subjects have several types, e.g. {next(iter(retyped))!r}; the first stays")
    _note(found)
    return found


def _known(said: Said, relation: str) -> dict[str, dict[str, None]]:
    """The wordings of a relation that files have brought so far."""
    return said.setdefault(relation, {"statements": {}, "questions": {}})


def told_unused(unused: Iterable[str], known: Sequence[str]) -> str:
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
        if INVISIBLE.search(text):
            return "control"
        if name in COLUMNS[:3]:
            if not tidy(text):
                return "empty"
            if len(tidy(text)) > LONG:
                return "too long"
            if not any(letter.isalnum() or unicodedata.category(letter)[0] == "S" for letter in text):
                return "no words"
    if fact["split"] not in (None, "") and tidy(fact["split"]).lower() not in SPLITS:
        return "other split"
    return None


def within(object: str, text: str) -> bool:
    """Whether the object stands in a text as words of its own; at an end whose letter belongs to a script that puts no
    blanks between words, as a part of one."""
    start = text.find(object)
    while start >= 0:
        end = start + len(object)
        begins = is_wide(object[0]) or not _WORD.match(text[start - 1 : start])
        if begins and (is_wide(object[-1]) or not _WORD.match(text[end : end + 1])):
            return True
        start = text.find(object, start + 1)
    return False


def is_wide(letter: str) -> bool:
    """Whether a letter is of a Chinese, Japanese or Korean script."""
    return unicodedata.east_asian_width(letter) in "WF" and letter.isalpha()


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
    """The objects that stand in one of the texts as `within` sees it. Each text is gone through once, however many
    objects there are: where a word may begin, every length that an object has is looked up."""
    lengths = sorted({len(object) for object in objects})
    standing = set()
    for text in dict.fromkeys(texts):
        # a word begins and ends beside what is no letter of a word; one in a script without blanks, anywhere
        wide = {place for place, letter in enumerate(text) if is_wide(letter)}
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
    note_scripts(found, {"subjects": names, "objects": objects, "relations": [*found.relations]})
    splits = Counter(f["split"] for s in found.subjects for f in s["facts"])
    if splits[None] and len(splits) > 1:
        found.notes.append(f"{splits[None]} facts have no split, so facts.split: given can't be used")


def note_scripts(found: Imported, kinds: Mapping[str, Collection[str]]) -> None:
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


# ------------------------------------------------------------------------------- files


def _rows(path: Path, said: Said, columns: Mapping[str, str], unused: dict[str, None]) -> Iterator[Source]:
    """The rows of a file of any kind; wordings that it brings go to `said`, columns of no use to `unused`."""
    if path.suffix.lower() == ".json":
        yield from _relation_file(path, said, unused)
        return
    own = {name: columns.get(name, name) for name in COLUMNS}
    named = data_set_of(path)
    fixed = tidy(named[0].name if named else path.stem)
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
    if not isinstance(name, str) or not tidy(name) or not isinstance(samples, list):
        raise UserError(
            f"{path} is no relation with samples; expected {{name, prompt_templates, samples: [{{subject, object}}]}} "
            "(or JSONL, one fact a line)"
        )
    unused |= dict.fromkeys(key for key in values if key not in OF_RELATION)
    relation = tidy(name)
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
            known[part][checked_pattern(pattern, part[:-1], f"{path}: {key}")] = None
    for number, sample in enumerate(samples, 1):
        if not isinstance(sample, dict):
            raise UserError(f"{path}: sample {number} is {sample!r}; expected {{subject, object}}")
        unused |= dict.fromkeys(key for key in sample if key not in COLUMNS)
        yield Source(str(path), number, {**sample, "relation": relation})
