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
from crosstrace.data.columns import NAMES, answers_of, names_text
from crosstrace.data.text import NO_QUESTIONS
from crosstrace.importing.imported import (
    COLUMNS,
    INVISIBLE,
    LONG,
    SPLITS,
    Imported,
    Patterns,
    Source,
    counted,
    dropped_text,
    has_half_letter,
    row_text,
    tidy,
)
from crosstrace.importing.published_facts import POPQA, from_entity_questions, from_popqa, is_entity_questions
from crosstrace.importing.tables import EXPECTED, data_set_of, read_json, read_records, records_of
from crosstrace.importing.wordings import checked_pattern, read_wordings

STATEMENT, QUESTION = "[The {relation} of] {subject} [is] {object}.", "[What is the {relation} of] {subject}[?]"
UNSPACED = ("\u0e00\u0eff", "\u1000\u109f", "\u1780\u17ff")  # Thai and Lao; Burmese; Khmer: the first and last letter
# other names of the columns, as published tables have them
OTHER_NAMES = {
    "subject": ("head", "subj", "sub_label", "subject_label"),
    "relation": ("predicate", "prop", "predicate_id", "relation_id"),
    "object": ("tail", "obj", "obj_label", "object_label", "attribute"),
    "aliases": NAMES["aliases"],
}
MOST_NOTES = 5  # of one kind
OFTEN = 3  # facts with one object: fewer say nothing of how well a guess does
OF_RELATION = ("name", "prompt_templates", "prompt_templates_zs", "samples", "properties")  # keys of a relation's file

_WORD = re.compile(r"\w")


def import_facts(
    files: Sequence[Path], wording: Path | None = None, columns: Mapping[str, str] | None = None
) -> Imported:
    """Read facts and check them.

    Args:
        files: tables, or JSON of one relation. A table is CSV, TSV, JSONL or Parquet with columns subject, relation and
            object; without a column relation, the relation is the file's name. Further columns are optional: pronoun;
            type (of the subject, {type} in patterns); split (id or ood); aliases (a list of other right answers);
            statement and question, patterns of that relation with {subject} and {object}, where [brackets] mark the
            words of the relation. JSON has a relation with its prompt templates: {name, prompt_templates,
            prompt_templates_zs, samples [{subject, object}]}.
        wording: YAML of relation -> {statements: [...], questions: [...]}, which goes before what the files say.
        columns: the names that the files have for the columns: {"subject": "person", ...}.

    Raises:
        UserError: a file cannot be read, is malformed, or nothing of it can be kept.
    """
    imported = Imported()
    given = read_wordings(wording) if wording else {}
    patterns: Patterns = {}
    people: dict[str, dict[str, Any]] = {}
    objects: dict[tuple[str, str], str] = {}
    unused: dict[str, None] = {}
    retyped: dict[str, None] = {}
    several = 0
    for path in files:
        imported.read.setdefault(str(path), 0)
        for row in _rows(path, patterns, columns or {}, unused):
            imported.read[str(path)] += 1
            fact = {name: row.values.get(name) for name in (*COLUMNS, "aliases")}
            reason = _reason_to_drop(fact, objects)
            if reason is not None:
                imported.drop(row.file, row.number, reason, row_text(row.values))
                continue
            subject, relation, object = (tidy(fact[name]) for name in COLUMNS[:3])
            objects[subject, relation] = object
            imported.rows[subject, relation] = (row.file, row.number)
            person = people.setdefault(subject, {"name": subject, "type": None, "pronoun": None, "facts": []})
            person["pronoun"] = person["pronoun"] or tidy(fact["pronoun"] or "") or None
            kind = tidy(fact["type"] or "") or None
            person["type"] = person["type"] or kind
            if kind not in (None, person["type"]):
                retyped[subject] = None
            split = tidy(fact["split"] or "").lower() or None
            aliases = _further_answers(fact)
            several += bool(aliases)
            further = {"aliases": aliases} if aliases else {}
            person["facts"].append({"relation": relation, "object": object, "split": split} | further)
            for part, name in (("statements", "statement"), ("questions", "question")):
                if fact[name]:
                    where = f"{row.file} row {row.number}: {name}"
                    _patterns_of(patterns, relation)[part][checked_pattern(fact[name], name, where)] = None
    imported.subjects = list(people.values())
    if not imported.kept:
        total = imported.counts()
        raise UserError(
            f"no fact could be kept of {total['read']} rows in {', '.join(map(str, files))}"
            + (
                f": {dropped_text(total['dropped'])}"
                if total["dropped"]
                else "; expected facts below the columns' names"
            )
        )
    _word_relations(imported, given, patterns)
    if unused:
        imported.notes.append(unused_text(unused, COLUMNS))
    if retyped:
        imported.notes.append(
            f"{len(retyped)} subjects have several types, e.g. {next(iter(retyped))!r}; the first stays"
        )
    if several:
        imported.notes.append(
            f"{counted(several, 'fact')} with several right answers: the first is taught, and exact match wants it; "
            "answers that are generated may be any of them"
        )
    _note_difficulty(imported)
    return imported


def _patterns_of(patterns: Patterns, relation: str) -> dict[str, dict[str, None]]:
    """The patterns that the files have for a relation so far, to be added to."""
    return patterns.setdefault(relation, {"statements": {}, "questions": {}})


def unused_text(unused: Iterable[str], known: Sequence[str]) -> str:
    """The columns that are not used, each with the known one that may be meant."""
    close = {name: difflib.get_close_matches(name, known, 1, 0.75) for name in unused}
    return "columns that nothing was made of: " + ", ".join(
        (name or "one without a name") + (f" (is {meant[0]} meant?)" if meant and meant[0] != name else "")
        for name, meant in close.items()
    )


def _reason_to_drop(fact: Mapping[str, Any], objects: Mapping[tuple[str, str], str]) -> str | None:
    """Why a row can't be kept; None if it can.

    Args:
        objects: the earlier rows: subject and relation -> object.
    """
    reason = _unfit(fact)
    if reason is not None:
        return reason
    subject, relation, object = (tidy(fact[name]) for name in COLUMNS[:3])
    before = objects.get((subject, relation))
    if before is not None:
        return "duplicate" if before == object else "contradiction"
    if any(is_within(object.casefold(), tidy(fact[name] or "").casefold()) for name in ("subject", "type")):
        return "answer in the prompt"
    return None


def _unfit(fact: Mapping[str, Any]) -> str | None:
    """Why a row can't be kept, whatever the other rows are; None if it can."""
    for name in COLUMNS:
        value = fact[name]
        if value is None and name not in COLUMNS[:3]:
            continue
        if not isinstance(value, str | None):
            return "not a text"
        text = value or ""
        if has_half_letter(text):
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
    aliases = answers_of(fact["aliases"])
    if aliases is None:
        return "not a text"
    for alias in aliases:
        if has_half_letter(alias):
            return "not Unicode"
        if INVISIBLE.search(alias):
            return "control"
    if fact["split"] not in (None, "") and tidy(fact["split"]).lower() not in SPLITS:
        return "other split"
    return None


def _further_answers(fact: Mapping[str, Any]) -> list[str]:
    """The other right answers of a fact that can be kept, without those that stand in the prompt."""
    given = " ".join(tidy(fact[name] or "") for name in ("subject", "type")).casefold()
    aliases = [tidy(alias) for alias in answers_of(fact["aliases"]) or ()]
    kept = [alias for alias in aliases if _WORD.search(alias) and not is_within(alias.casefold(), given)]
    return [alias for alias in dict.fromkeys(kept) if alias != tidy(fact["object"])]


def is_within(object: str, text: str) -> bool:
    """Whether a text has the object as whole words.

    Some scripts put no blanks between words. If the object's first or last letter is of such a script, it need not be
    at the border of a word there.
    """
    start = text.find(object)
    while start >= 0:
        end = start + len(object)
        begins = is_wide(object[0]) or not _WORD.match(text[start - 1 : start])
        if begins and (is_wide(object[-1]) or not _WORD.match(text[end : end + 1])):
            return True
        start = text.find(object, start + 1)
    return False


def is_wide(letter: str) -> bool:
    """Whether a letter is of a script without blanks between words, or of Korean.

    They are Chinese, Japanese, Thai, Lao, Burmese and Khmer.
    """
    if any(first <= letter <= last for first, last in UNSPACED):
        return True
    return unicodedata.east_asian_width(letter) in "WF" and letter.isalpha()


def _word_relations(imported: Imported, given: Mapping[str, Mapping[str, list[str]]], patterns: Patterns) -> None:
    """Give every relation its wordings: those of the wording file, else those of the facts' files, else plain ones."""
    facts = imported.by_relation()
    unknown = [name for name in given if name not in facts]
    if unknown:
        raise UserError(
            f"the wording file words {unknown[0]!r}, but no fact has that relation; relations are {', '.join(facts)}"
        )
    plain = []
    for name, rows in facts.items():
        words = _without_braces(name.replace("_", " "))
        wordings = {}
        for part, pattern in (("statements", STATEMENT), ("questions", QUESTION)):
            by_file = given.get(name, {}).get(part)
            is_left_out = by_file == []  # the wording file says that nothing is asked
            wordings[part] = list(by_file or (not is_left_out and patterns.get(name, {}).get(part)) or ())
            if not wordings[part] and not is_left_out:
                wordings[part] = [pattern.replace("{relation}", words)]
                plain.append(f"{name} ({part})")
        imported.relations[name] = wordings | {"objects": [*dict.fromkeys(object for _, object in rows)]}
    if plain:
        imported.notes.append(
            f"plain wordings were made for {names_text(plain)}: give better ones with --wording, or in columns "
            "statement and question"
        )
    unasked = [name for name, row in imported.relations.items() if not row["questions"]]
    if len(unasked) == len(imported.relations):
        imported.notes.append(NO_QUESTIONS)
    elif unasked:
        imported.notes.append(f"nothing is asked about {', '.join(unasked)}: these facts are stored only")
    for name, row in imported.relations.items():
        _check_types(name, facts[name], [*row["statements"], *row["questions"]])
        _note_given_away(imported, name, facts[name], row["questions"])


def _check_types(relation: str, facts: Sequence[tuple[dict[str, Any], str]], patterns: Sequence[str]) -> None:
    """Raise a `UserError` if a relation's wordings name the type of a subject that has none."""
    pattern = next((pattern for pattern in patterns if "{type}" in pattern), None)
    if pattern is None:
        return
    lacking = [subject["name"] for subject, _ in facts if not subject["type"]]
    if lacking:
        raise UserError(
            f"the wording {pattern!r} of {relation} needs a type, but {len(lacking)} of its subjects have none, e.g. "
            f"{lacking[0]!r}; give it in a column type, or leave {{type}} out"
        )


def _note_given_away(
    imported: Imported, relation: str, facts: Sequence[tuple[dict[str, Any], str]], questions: Sequence[str]
) -> None:
    """Note how many objects are in the fixed words of a question.

    Such facts are kept: the words are the same for every subject, so they single out nobody's answer, and a short word
    is easily met by chance.
    """
    fixed = [re.sub(r"[][]", "", re.sub(r"\{\w+\}", "\n", question)) for question in questions]
    contained = _contained({object for _, object in facts}, fixed)
    given_away = [object for _, object in facts if object in contained]
    if given_away:
        imported.notes.append(
            f"the objects of {len(given_away)} facts of {relation}, e.g. {given_away[0]!r}, stand in the words of a "
            "question, the same for every subject; they are kept, so word it without them"
        )


def _contained(objects: Collection[str], texts: Iterable[str]) -> set[str]:
    """The objects that are in one of the texts, as `is_within` says.

    Each text is gone through once, however many objects there are: every length that an object has is looked up
    wherever a word may begin.
    """
    lengths = sorted({len(object) for object in objects})
    contained = set()
    for text in dict.fromkeys(texts):
        # A word begins and ends beside a character that is no letter of a word. In a script without blanks it may begin
        # and end anywhere.
        wide = {position for position, letter in enumerate(text) if is_wide(letter)}
        begins = wide | {match.start() for match in re.finditer(r"(?<!\w)", text)}
        ends = {position + 1 for position in wide} | {match.start() for match in re.finditer(r"(?!\w)", text)}
        for begin in begins:
            for length in lengths:
                if begin + length > len(text):
                    break
                if begin + length in ends and text[begin : begin + length] in objects:
                    contained.add(text[begin : begin + length])
    return contained


def _without_braces(text: str) -> str:
    return re.sub(r"[][{}]", " ", text)


def _note_difficulty(imported: Imported) -> None:
    """Note what makes recall easier or harder than it looks."""
    same, often = [], []
    for name, facts in imported.by_relation().items():
        objects = Counter(object for _, object in facts)
        top, count = objects.most_common(1)[0]
        if len(objects) == 1:
            same.append(f"every object of {name} is {top!r}")
        elif count / len(facts) > 0.2 and count >= OFTEN:
            often.append(f"{top!r} is the object of {count} of {len(facts)} facts of {name}")
    for notes, so in ((same, ", so recall of it shows nothing"), (often, ": guessing it is right so often")):
        imported.notes += [note + so for note in notes[:MOST_NOTES]]
        if len(notes) > MOST_NOTES:
            imported.notes.append(f"the same of {counted(len(notes) - MOST_NOTES, 'further relation')}")
    names = [subject["name"] for subject in imported.subjects]
    reordered = [group for group in _groups_by(_name_parts, names) if len({*map(_fold, group)}) > 1]
    for groups, how in (
        (_groups_by(_fold, names), "differ in case or accents only"),
        (reordered, "share all names, in another order"),
    ):
        if groups:
            first_group = " and ".join(map(repr, groups[0]))
            imported.notes.append(f"{counted(len(groups), 'group')} of subjects that {how}, e.g. {first_group}")
    first = Counter(name.split()[0] for name in names)
    alone = sum(first[name.split()[0]] == 1 for name in names)
    if alone > len(names) / 2:
        imported.notes.append(
            f"{alone} of {len(names)} subjects can be told by their first word alone, which makes recall easier"
        )
    objects = {object for row in imported.relations.values() for object in row["objects"]}
    note_scripts(imported, {"subjects": names, "objects": objects, "relations": [*imported.relations]})
    splits = Counter(fact["split"] for subject in imported.subjects for fact in subject["facts"])
    if splits[None] and len(splits) > 1:
        imported.notes.append(f"{splits[None]} facts have no split, so facts.split: given can't be used")


def note_scripts(imported: Imported, kinds: Mapping[str, Collection[str]]) -> None:
    """Note how many texts of each kind have letters that a tokenizer or a terminal may not expect."""
    for what, is_such in (
        ("letters beyond ASCII", _is_beyond_ascii),
        ("words written from right to left", _is_right_to_left),
    ):
        counts = {kind: sum(map(is_such, each)) for kind, each in kinds.items()}
        if any(counts.values()):
            numbers = ", ".join(f"{n} of {len(kinds[kind])} {kind}" for kind, n in counts.items() if n)
            imported.notes.append(f"{what}: {numbers}")


def _is_beyond_ascii(text: str) -> bool:
    return not text.isascii()


def _is_right_to_left(text: str) -> bool:
    return any(unicodedata.bidirectional(letter) in ("R", "AL") for letter in text)


def _groups_by(key: Callable[[str], Any], names: Iterable[str]) -> list[list[str]]:
    """The groups of two or more names that have the same key."""
    groups: dict[Any, list[str]] = {}
    for name in names:
        groups.setdefault(key(name), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _name_parts(name: str) -> frozenset[str]:
    """The parts of a name in any order: the same for "Ada Brook" and "Brook, Ada"."""
    return frozenset(_fold(name).replace(",", " ").split())


def _fold(name: str) -> str:
    """A name without case and accents."""
    plain = unicodedata.normalize("NFKD", name.casefold())
    return "".join(letter for letter in plain if not unicodedata.combining(letter))


def _rows(path: Path, patterns: Patterns, columns: Mapping[str, str], unused: dict[str, None]) -> Iterator[Source]:
    """The rows of a file of any kind. Its patterns are added to `patterns`, and its unused columns to `unused`."""
    kind = path.suffix.lower()
    whole: Any = read_json(path) if kind == ".json" and path.is_file() else None
    if kind == ".json" and not isinstance(records_of(whole), list):
        yield from _relation_file(path, whole, patterns, unused)
        return
    rows: Iterable[tuple[int, Mapping[str, Any]]] = read_records(path)
    if kind in (".json", ".jsonl"):
        rows = [*rows]
        records = [row for _, row in rows]
        if is_entity_questions(records):
            for number, fact in from_entity_questions(records, path):
                yield Source(str(path), number, fact)
            return
    names: dict[str, str] = {}
    data_set = data_set_of(path)
    relation = tidy(data_set[0].name if data_set else path.stem)
    for number, values in rows:
        if not columns and values.keys() >= {*POPQA}:
            yield Source(str(path), number, from_popqa(values))
            continue
        names = names or {name: columns.get(name) or _column_of(name, values) for name in (*COLUMNS, "aliases")}
        row = {name: values.get(column) for name, column in names.items()}
        for name in ("subject", "object"):
            if names[name] not in values:
                raise UserError(
                    f"{path} has no column {names[name]!r} in row {number}; it has {names_text(values)}. Expected "
                    "subject, relation and object, or name yours, e.g. --subject NAME; a file of documents or of "
                    "questions about them is named with --documents or --questions; texts that are no facts, and "
                    "conversations, with --store and --recall"
                )
        if names["relation"] not in values:
            row["relation"] = relation
        unused |= dict.fromkeys(str(name) for name in values if name not in names.values())
        yield Source(str(path), number, row)


def _column_of(name: str, row: Mapping[str, Any]) -> str:
    """The column of a fact's part: its own name, or another usual one that the row has."""
    return name if name in row else next((other for other in OTHER_NAMES.get(name, ()) if other in row), name)


def _relation_file(path: Path, values: Any, patterns: Patterns, unused: dict[str, None]) -> Iterator[Source]:
    """The rows of a relation with prompt templates, where {} is the subject and the object follows the template."""
    if not path.is_file():
        raise UserError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}; expected {EXPECTED}")
    if not isinstance(values, dict):
        raise UserError(f'{path} holds a {type(values).__name__}; expected an object, e.g. {{"name": …, "samples": …}}')
    name, samples = values.get("name"), values.get("samples")
    if not isinstance(name, str) or not tidy(name) or not isinstance(samples, list):
        raise UserError(
            f"{path} is no relation with samples; expected {{name, prompt_templates, samples: [{{subject, object}}]}} "
            "(or JSONL, one fact a line)"
        )
    unused |= dict.fromkeys(key for key in values if key not in OF_RELATION)
    relation = tidy(name)
    of_relation = _patterns_of(patterns, relation)
    for key in ("prompt_templates", "prompt_templates_zs"):
        templates = values.get(key) or []
        if not isinstance(templates, list):
            raise UserError(f"{path}: {key} is {templates!r}; expected a list of texts with {{}}")
        for template in templates:
            if not isinstance(template, str) or template.count("{}") != 1:
                raise UserError(f"{path}: {key} holds {template!r}; expected a text with one {{}} for the subject")
            pattern = template.replace("{}", "{subject}")
            part = "questions" if "?" in template else "statements"
            if part == "statements":
                pattern += " {object}."
            of_relation[part][checked_pattern(pattern, part[:-1], f"{path}: {key}")] = None
    for number, sample in enumerate(samples, 1):
        if not isinstance(sample, dict):
            raise UserError(f"{path}: sample {number} is {sample!r}; expected {{subject, object}}")
        unused |= dict.fromkeys(key for key in sample if key not in COLUMNS)
        yield Source(str(path), number, {**sample, "relation": relation})
