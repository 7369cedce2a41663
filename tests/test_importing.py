"""One's own facts: counts that add up, spans that cover, splits, and what is unfit told in a sentence."""

from __future__ import annotations

import csv
import json
import math
import os
import pickle
import re
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crosstrace.cli import commands
from crosstrace.core.errors import UserError
from crosstrace.core.files import read_json
from crosstrace.core.results import Results
from crosstrace.data.facts import FactSettings, World
from crosstrace.data.text import NO_QUESTIONS, texts
from crosstrace.data.tokens import encode
from crosstrace.experiment import config, pipeline
from crosstrace.importing import facts, importing, kept
from crosstrace.importing.rows import import_rows
from crosstrace.models import untaught
from crosstrace.planning import plan
from crosstrace.training.pretraining import word_tokenizer

CITIES = [
    ("Ada Brook", "city", "Lyon"),
    ("Bo Dale", "city", "Oslo"),
    ("Cy Holt", "city", "Bonn"),
    ("Di Ames", "city", "Rome"),
]
RELATION = {
    "name": "city", "prompt_templates": ["{} lives in"], "prompt_templates_zs": ["Where does {} live? In"],
    "samples": [{"subject": s, "object": o} for s, _, o in CITIES],
}  # fmt: skip


def table(path: Path, rows: list[tuple], head: tuple = ("subject", "relation", "object")) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *rows])
    return path


def imported(tmp_path: Path, *files: Path, **options) -> kept.Imported:
    return importing.make(tmp_path / "own", files, tell=lambda text: None, **options)


def own(tmp_path: Path, **options) -> FactSettings:
    return FactSettings(source=str(tmp_path / "own"), **options)


# ------------------------------------------------------------------------------- what is kept


def test_counts_add_up_and_every_row_has_its_reason(tmp_path: Path) -> None:
    rows = [
        *CITIES, ("Ada Brook", "city", "Lyon"), ("Ada Brook", "city", "Nice"), (" ", "city", "Lyon"),
        ("Ed Fox", "city", ""), ("Bank of Oslo", "city", "Oslo"), ("Ed\u202eFox", "city", "Rome"),
        ("Ed Fox", "city", "x" * 201), ("Ed Fox", "city", "--"), ("  Ed   Fox ", "city", "Rome"),
    ]  # fmt: skip
    found = imported(tmp_path, table(tmp_path / "facts.csv", rows))
    counts = read_json(tmp_path / "own" / "import.json")
    assert counts["dropped"] == {
        "duplicate": 1, "contradiction": 1, "empty": 2, "answer in the prompt": 1, "control": 1, "too long": 1,
        "no words": 1,
    }  # fmt: skip
    assert counts["read"] == len(rows) == counts["kept"] + sum(counts["dropped"].values())
    assert counts["kept"] == 5 and found.subjects[-1]["name"] == "Ed Fox"
    with (tmp_path / "own" / "dropped.csv").open(newline="", encoding="utf-8") as file:
        dropped = list(csv.DictReader(file))
    assert len(dropped) == 8 and dropped[0]["row"] == "6" and dropped[0]["reason"] == "duplicate"


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet", "json"])
def test_kinds_of_files_say_the_same(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"city.{kind}"
    rows = [dict(zip(("subject", "relation", "object"), row)) for row in CITIES]
    if kind == "csv":
        table(path, CITIES)
    elif kind == "tsv":
        path.write_text("\ufeffsubject\trelation\tobject\n" + "".join("\t".join(row) + "\n" for row in CITIES), "utf-8")
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(RELATION))
    imported(tmp_path, path)
    world = World.draw(own(tmp_path))
    assert [(f.subject, f.relation, f.object) for p in world.people for f in p.facts] == CITIES
    assert world.wording.objects == {"city": ("Lyon", "Oslo", "Bonn", "Rome")}


@pytest.mark.parametrize("kind", ["saved", "parts", "files"])
def test_a_data_set_says_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [dict(zip(("subject", "relation", "object"), row)) for row in CITIES]
    whole, folder = datasets.Dataset.from_list(rows), tmp_path / "facts"
    if kind == "saved":
        whole.save_to_disk(folder)
    elif kind == "parts":
        parts = {"train": whole, "test": datasets.Dataset.from_list(rows[:1])}
        datasets.DatasetDict(parts).save_to_disk(folder)
        capsys.readouterr()
        assert "has the parts train, test; expected one of them" in refused(capsys, tmp_path, folder, tmp_path / "own")
        told = refused(capsys, tmp_path, f"{folder}:valid", tmp_path / "own")
        assert "has the parts train, test" in told
    else:
        folder.mkdir()
        whole.to_parquet(folder / "train.parquet")
    capsys.readouterr()  # its own bars
    imported(tmp_path, Path(f"{folder}:train") if kind == "parts" else folder)
    world = World.draw(own(tmp_path))
    assert [(f.subject, f.relation, f.object) for p in world.people for f in p.facts] == CITIES
    (about,) = read_json(tmp_path / "own" / "import.json")["files"].values()
    assert about["rows"] == len(CITIES) and len(about["sha256"]) == 64


def test_a_data_set_without_its_library_and_one_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    assert "can't be read as a data set" in refused(capsys, tmp_path, "nobody/has-this", tmp_path / "own")
    (tmp_path / "facts").mkdir()
    (tmp_path / "facts" / "facts.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")  # the old kind: code
    assert "can't be read as a data set" in refused(capsys, tmp_path, tmp_path / "facts", tmp_path / "own")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'crosstrace[datasets]'" in refused(capsys, tmp_path, tmp_path / "facts", tmp_path / "own")


def test_a_relations_templates_become_statements_and_questions(tmp_path: Path) -> None:
    (tmp_path / "city.json").write_text(json.dumps(RELATION))
    imported(tmp_path, tmp_path / "city.json")
    found = texts(own(tmp_path))
    assert found["bio"][0].text == "Ada Brook lives in Lyon."
    assert found["qa"][0].text == "Where does Ada Brook live? In Lyon"
    (mention,) = found["qa"][0].mentions
    words = [found["qa"][0].text[slice(*span)] for span in mention.relation_words]
    assert words == ["Where does", "live? In"] and found["qa"][0].text[slice(*mention.object)] == "Lyon"


def test_wordings_come_from_the_wording_file_then_the_rows_then_plain_ones(tmp_path: Path) -> None:
    rows = [(*row, "[Who knows] {subject}[?] {object}" if row[0] == "Bo Dale" else "") for row in CITIES]
    rows += [(s, "pet", f"cat {i}", "") for i, (s, *_) in enumerate(CITIES)]
    path = table(tmp_path / "facts.csv", rows, ("subject", "relation", "object", "question"))
    wording = tmp_path / "wording.yaml"
    wording.write_text("city: {statements: ['{subject} dwells in {object}.']}")
    found = imported(tmp_path, path, wording=wording)
    assert found.relations["city"]["statements"] == ["{subject} [dwells in] {object}."]
    assert found.relations["city"]["questions"] == ["[Who knows] {subject}[?]"]
    assert found.relations["pet"]["questions"] == ["[What is the pet of] {subject}[?]"]
    assert any("plain wordings were made for pet" in note for note in found.notes)


def test_names_stay_as_they_are_and_pronouns_get_capitals(tmp_path: Path) -> None:
    rows = [("iPhone", "maker", "Apple", "it"), ("iPhone", "screen", "large", "it"), ("eBook", "maker", "Kobo", ""),
            ("eBook", "screen", "grey", "")]  # fmt: skip
    path = table(tmp_path / "facts.csv", rows, ("subject", "relation", "object", "pronoun"))
    wording = tmp_path / "wording.yaml"
    wording.write_text(
        "maker: {statements: ['{subject} is of {object}.']}\nscreen: {statements: ['{subject} has a {object} screen.']}"
    )
    imported(tmp_path, path, wording=wording)
    assert [item.text for item in texts(own(tmp_path))["bio"]] == [
        "iPhone is of Apple. It has a large screen.", "eBook is of Kobo. eBook has a grey screen."
    ]  # fmt: skip


HEAD = ("subject", "relation", "object")


def worded(tmp_path: Path, text: str) -> Path:
    (tmp_path / "wording.yaml").write_text(text)
    return tmp_path / "wording.yaml"


def test_a_number_is_text_nothing_stays_nothing_and_a_list_is_no_text(tmp_path: Path) -> None:
    ages = [("Ada Brook", 0), ("Bo Dale", 3), ("Cy Holt", math.nan), ("Di Ames", ["a"]), ("Ed", True),
            ("Flo", math.inf), (7, None)]  # fmt: skip
    rows = [{"subject": subject, "relation": "age", "object": age} for subject, age in ages]
    (tmp_path / "age.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = imported(tmp_path, tmp_path / "age.jsonl")
    assert found.counts()["dropped"] == {"empty": 2, "not a text": 3}
    assert [f["object"] for s in found.subjects for f in s["facts"]] == ["0", "3"]
    nan = pyarrow.Table.from_pylist(
        [{"subject": s, "object": o} for s, o in (("a b", 1.5), ("c d", 2.5), ("e f", math.nan))]
    )
    pyarrow.parquet.write_table(nan, tmp_path / "size.parquet")
    assert imported(tmp_path, tmp_path / "size.parquet", overwrite=True).counts()["dropped"] == {"empty": 1}


VALUES = [
    ("007", "NA", "1.10"), ("1998", "null", "1e3"), ("Ed Fox", "True", "1998-01-02"), ("2001-05-03", "NA", "None"),
]  # fmt: skip


@pytest.mark.parametrize("road", ["csv", "jsonl", "parquet", "folder of csv", "folder of jsonl", "relation"])
def test_values_are_the_same_by_every_road(tmp_path: Path, road: str) -> None:
    path = tmp_path / ("facts" if road.startswith("folder") else f"facts.{road}")
    rows = [dict(zip(("subject", "relation", "object"), row)) for row in VALUES]
    if road.startswith("folder"):
        pytest.importorskip("datasets")
        path.mkdir()
    if road.endswith("csv"):
        table(path / "train.csv" if path.is_dir() else path, VALUES)
    elif road.endswith("jsonl"):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (path / "train.jsonl" if path.is_dir() else path).write_text(lines.replace('"1.10"', "1.10"))
    elif road == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    files = [path]
    if road == "relation":
        files = []
        for name in dict.fromkeys(relation for _, relation, _ in VALUES):
            samples = [row for row in rows if row["relation"] == name]
            text = json.dumps({"name": name, "samples": samples}).replace('"1.10"', "1.10")
            (tmp_path / f"{name}.json").write_text(text)
            files.append(tmp_path / f"{name}.json")
    found = facts.import_facts(files)
    assert {(s["name"], f["relation"], f["object"]) for s in found.subjects for f in s["facts"]} == {*VALUES}


def test_numbers_of_every_column_are_as_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "facts.jsonl").write_text(
        '{"subject": 1.10, "relation": 2e3, "object": 3.0, "type": 4.50, "pronoun": 5.0, "split": "id"}\n'
    )
    (fact,) = facts.import_facts([tmp_path / "facts.jsonl"]).subjects
    assert fact == {
        "name": "1.10", "type": "4.50", "pronoun": "5.0",
        "facts": [{"relation": "2e3", "object": "3.0", "split": "id"}],
    }  # fmt: skip
    (tmp_path / "store.jsonl").write_text('{"prompt": 1.10, "completion": 2e3, "subject": 7.0}\n')
    (tmp_path / "recall.csv").write_text('prompt,completion,subject,split\n007, "NA", 7.0,id\n1.10,1e3,8.0,ood\n')
    store, recall, _ = import_rows({name: tmp_path / f"{name}.{kind}" for name, kind in
                                              (("store", "jsonl"), ("recall", "csv"))})  # fmt: skip
    assert [(item.text, item.person) for item in store] == [("1.10 2e3", "7.0")]
    assert [(item.text, item.person) for item in recall] == [("007 NA", "7.0"), ("1.10 1e3", "8.0")]


def test_numbers_of_parquet_rows_of_text(tmp_path: Path) -> None:
    columns = {"prompt": ["When?", "How much?"], "completion": [1998.0, 1.1], "split": ["id", "ood"]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "recall.parquet")
    (tmp_path / "store.txt").write_text("It was then.\n")
    rows = {"store": tmp_path / "store.txt", "recall": tmp_path / "recall.parquet"}
    assert [item.text for item in import_rows(rows)[1]] == ["When? 1998", "How much? 1.1"]


def test_relations_of_a_wording_file_are_named_as_it_is_written(tmp_path: Path) -> None:
    names = ["1.10", "007", "1e3", "no", "2001-05-03", "null"]
    text = "".join(f"{name}: {{statements: ['{{subject}} has {{object}}.']}}\n" for name in names)
    path = table(tmp_path / "facts.csv", [(f"Subject {n}", name, f"o{n}") for n, name in enumerate(names)])
    found = imported(tmp_path, path, wording=worded(tmp_path, text))
    assert all(found.relations[name]["statements"] == ["{subject} [has] {object}."] for name in names)


def test_a_column_without_a_name_is_told_as_one(tmp_path: Path) -> None:
    path = table(tmp_path / "facts.csv", [("0", *row) for row in CITIES], ("", *HEAD))
    assert "columns that nothing was made of: one without a name" in imported(tmp_path, path).notes


@settings(deadline=None)
@given(st.lists(st.text("ab 1.京é", min_size=1, max_size=4), max_size=6), st.lists(st.text("ab 1.京é\n"), max_size=3))
def test_objects_in_texts_are_found_as_one_by_one(objects: list[str], lines: list[str]) -> None:
    found = {object for object in objects if any(facts.within(object, line) for line in lines)}
    assert facts._standing(objects, lines) == found
    slow = set()
    for object in objects:
        before, after = ("" if facts.is_wide(letter) else r"\w" for letter in (object[0], object[-1]))
        whole = (f"(?<!{before})" if before else "") + re.escape(object) + (f"(?!{after})" if after else "")
        slow |= {object} if any(re.search(whole, line) for line in lines) else set()
    assert found == slow


@pytest.mark.parametrize("relations", [1, 10**6])
def test_the_work_of_an_import_grows_with_its_rows(tmp_path: Path, relations: int) -> None:
    def calls(rows: int) -> int:
        """How often anything was called while so many rows were imported, each with wordings of its own."""
        patterns = "In {}, {{subject}} has {{object}}.", "In {}, {{subject}}?"
        worded = [
            (f"Ada {n}", f"r{n % relations}", f"town {n}", *(pattern.format(n) for pattern in patterns))
            for n in range(1000, 1000 + rows)
        ]
        path = table(tmp_path / "facts.csv", worded, (*HEAD, "statement", "question"))
        count = 0

        def counted(*_) -> None:
            nonlocal count
            count += 1

        sys.setprofile(counted)
        try:
            facts.import_facts([path])
        finally:
            sys.setprofile(None)
        return count

    calls(10)  # what is imported or compiled once
    assert calls(400) < 2.2 * calls(200)


def test_objects_in_names_types_and_questions_are_found(tmp_path: Path) -> None:
    rows = [
        ("Bank of Oslo", "city", "oslo", ""), ("Osloer", "city", "Oslo", ""), ("東京大学", "city", "東京", ""),
        ("Ed", "city", "Rome", "citizen of Rome"), ("Flo", "city", "Lyon", "person"), ("Gil", "city", "In", ""),
    ]  # fmt: skip
    path = table(tmp_path / "facts.csv", rows, (*HEAD, "type"))
    wording = worded(
        tmp_path, "city: {questions: ['Lyon, or where, is {subject}?', 'Is it in the city of {subject}?']}"
    )
    found = imported(tmp_path, path, wording=wording)
    assert [(row, reason) for _, row, reason, _ in found.dropped] == [(n, "answer in the prompt") for n in (2, 4, 5)]
    told = [note for note in found.notes if "stand in the words of a question" in note]
    assert len(told) == 1 and "objects of 1 facts of city, e.g. 'Lyon'" in told[0]  # "In" is no "in"


def test_names_in_another_order_and_scripts_are_counted(tmp_path: Path) -> None:
    names = ["Ada Brook", "Brook Ada", "Brook, Ada", "Zoë", "Zoe", "C", "C++"]
    rows = [(name, "stadt", value) for name, value in zip(names, ("a", "b", "c", "مصر", "Köln", "d", "e"))]
    notes = imported(tmp_path, table(tmp_path / "facts.csv", [*rows, ("Ed", "größe", "f")])).notes
    assert (
        "1 groups of subjects share all names, in another order, e.g. 'Ada Brook' and 'Brook Ada' and 'Brook, Ada'"
        in notes
    )
    assert "1 groups of subjects differ in case or accents only, e.g. 'Zoë' and 'Zoe'" in notes
    assert "letters beyond ASCII: 1 of 8 subjects, 2 of 8 objects, 1 of 2 relations" in notes
    assert "words written from right to left: 1 of 8 objects" in notes
    assert not any("guessing it is right so often" in note for note in notes), "each object is that of one fact"


def test_types_are_kept_and_fill_wordings(tmp_path: Path) -> None:
    rows = [(*row, "the painter" if row[0] == "Ada Brook" else "the poet") for row in CITIES]
    path = table(tmp_path / "facts.csv", [*rows, ("Ada Brook", "pet", "cat", "")], (*HEAD, "kind"))
    text = (
        "city: {statements: ['{type} {subject} lives in {object}.'], questions: ['Where does {type} {subject} live?']}"
    )
    imported(tmp_path, path, wording=worded(tmp_path, text), columns={"type": "kind"})
    found = texts(own(tmp_path))
    assert found["bio"][0].text.startswith("the painter Ada Brook lives in Lyon. ")
    for item in (found["bio"][0], found["qa"][0]):
        (mention, *_) = item.mentions
        assert item.text[slice(*mention.object)] == "Lyon" and item.text[slice(*mention.subject)] == "Ada Brook"
        assert not any("painter" in item.text[slice(*span)] for span in mention.relation_words)
    with pytest.raises(UserError, match="needs a type, but 4 of its subjects have none"):
        imported(tmp_path, table(tmp_path / "city.csv", CITIES), wording=tmp_path / "wording.yaml", overwrite=True)


def test_columns_of_no_use_are_named(tmp_path: Path) -> None:
    rows = [(*row, "x", "y") for row in CITIES]
    notes = imported(tmp_path, table(tmp_path / "facts.csv", rows, (*HEAD, "statment", "source"))).notes
    assert "columns that nothing was made of: statment (is statement meant?), source" in notes
    (tmp_path / "city.json").write_text(json.dumps(RELATION | {"prompts": [], "properties": {}}))
    notes = imported(tmp_path, tmp_path / "city.json", overwrite=True).notes
    assert any(
        note.startswith("columns that nothing was made of: prompts") and "properties" not in note for note in notes
    )


# ------------------------------------------------------------------------------- splits


def splits(tmp_path: Path, **options) -> dict[tuple[str, str], str]:
    return {
        (q.mentions[0].relation, q.text[slice(*q.mentions[0].subject)]): q.split
        for q in texts(own(tmp_path, **options))["qa"]
    }


def test_splits_by_subject_by_relation_and_as_given(tmp_path: Path) -> None:
    rows = [
        (s, r, f"{o}{r}", "id" if (i + j) % 2 else "ood")
        for i, (s, _, o) in enumerate(CITIES)
        for j, r in enumerate("xyz")
    ]
    imported(tmp_path, table(tmp_path / "facts.csv", rows, ("subject", "relation", "object", "split")))
    subject = splits(tmp_path, split="subject", qa_share=0.25)
    assert sum(split == "id" for split in subject.values()) == 3
    assert len({name for (_, name), split in subject.items() if split == "id"}) == 1, "all of one subject"
    assert splits(tmp_path, split="subject", qa_share=0.25) == subject
    assert len({tuple(sorted(splits(tmp_path, seed=s).items())) for s in range(8)}) > 1
    relation = splits(tmp_path, split="relation", qa_share=0.67)
    assert len({name for (name, _), split in relation.items() if split == "ood"}) == 1 and len(relation) == 12
    asked = splits(tmp_path, split="given")
    assert asked == {(r, s): split for s, r, _, split in rows}
    few = World.draw(own(tmp_path, subjects=2))
    assert len(few.people) == 2 and few.wording.relations == ("x", "y", "z")
    some = World.draw(own(tmp_path, relations=("z", "x")))
    assert some.wording.relations == ("x", "z")
    assert {fact.relation for person in some.people for fact in person.facts} == {"x", "z"}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"split": "given"}, "does not say whether"), ({"qa_share": 0.0}, "whose questions are trained"),
        ({"qa_share": 1.0}, "to test recall on"), ({"split": "relation"}, "leaves no fact"),
        ({"subjects": 9}, "holds 4"), ({"relations": ("nothing",)}, "facts.relations names nothing; the relations of"),
        ({"people": 40}, "facts.subjects"), ({"population": "A"}, "facts.population"),
        ({"frequency": "zipf"}, "facts.frequency"), ({"source": "/nowhere"}, "crosstrace import"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together(tmp_path: Path, options: dict, told: str) -> None:
    imported(tmp_path, table(tmp_path / "facts.csv", CITIES))
    with pytest.raises(UserError, match=told):
        texts(replace(own(tmp_path), **options))


# ------------------------------------------------------------------------------- plain rows


def test_rows_of_two_tasks(tmp_path: Path) -> None:
    store, recall = tmp_path / "store.txt", tmp_path / "recall.jsonl"
    store.write_text("The key is under the mat.\n\nThe lamp is on the table.\nThe lamp is on the table.\n")
    rows = [
        {"prompt": f"Where is the {x}? ", "completion": y, "split": z}
        for x, y, z in (("key", "mat", "id"), ("lamp", "table", "ood"))
    ]
    recall.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = imported(tmp_path, rows={"store": store, "recall": recall})
    assert found.counts()["kept"] == 4 and found.counts()["dropped"] == {"duplicate": 1}
    taught = texts(own(tmp_path))
    assert [item.split for item in taught["qa"]] == ["id", "ood"]
    for item in taught["qa"]:
        assert item.text[slice(*item.targets[0])] in ("mat", "table")
    assert taught["bio"][0].targets == ((0, len("The key is under the mat.")),)
    assert taught["bio"][0].text[slice(*taught["bio"][0].mentions[0].object)].strip() == "key is under the mat."


def test_a_pair_of_text_files_a_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = {
        "store.txt": "The key is\nThe lamp is\nThe cup is\n", "ends.txt": "here\nthere\n0\n",
        "ask.txt": "Where is the key?\nWhere is the lamp?\nWhere is the cup?\n", "answers.txt": "here\nthere\n0\n",
    }  # fmt: skip
    for name, text in lines.items():
        (tmp_path / name).write_text(text)
    given = ["--store", "store.txt", "--store-completions", "ends.txt", "--recall", "ask.txt"]
    given = [str(tmp_path / word) if word.endswith(".txt") else word for word in given]
    commands.main(["import", str(tmp_path / "own"), *given, "--recall-completions", str(tmp_path / "answers.txt")])
    assert "a blank was put between prompt and completion of 3 rows" in capsys.readouterr().out
    found = texts(own(tmp_path))
    assert found["bio"][0].text == "The key is here" and found["qa"][2].text == "Where is the cup? 0"
    assert [item.text[slice(*item.targets[0])] for item in found["qa"]] == ["here", "there", "0"]
    about = read_json(tmp_path / "own" / "import.json")
    assert about["read"] == 6 and len(about["files"]) == 4
    (tmp_path / "answers.txt").write_text("here\nthere\n")
    again = [tmp_path / "new", *given, "--recall-completions", tmp_path / "answers.txt"]
    assert "ask.txt has more lines than" in refused(capsys, tmp_path, *again)


def test_rows_count_numbers_scripts_blanks_and_answers_given_away(tmp_path: Path) -> None:
    (tmp_path / "store.txt").write_text("Der Schlüssel liegt da.\n")
    rows = [
        ("Where is it?", "in Rome", "id", "a"), ("Is it here, yes or no? ", "no", "ood", "b"),
        ("東京は", "日本", "id", "c"), ("How many? ", 0, "ood", "d"), ("What? ", ["x"], "id", "e"),
        ("Who? ", math.nan, "id", "f"),
    ]  # fmt: skip
    keys = ("prompt", "completion", "split", "subjct")
    (tmp_path / "recall.jsonl").write_text("".join(json.dumps(dict(zip(keys, row))) + "\n" for row in rows))
    rows = {"store": tmp_path / "store.txt", "recall": tmp_path / "recall.jsonl"}
    found = imported(tmp_path, rows=rows)
    assert found.counts()["dropped"] == {"not a text": 1, "empty": 1}
    asked = texts(own(tmp_path))["qa"]
    assert [item.text for item in asked] == [
        "Where is it? in Rome",
        "Is it here, yes or no? no",
        "東京は日本",
        "How many? 0",
    ]
    notes = "\n".join(found.notes)
    assert "between prompt and completion of 1 rows" in notes and "subjct (is subject meant?)" in notes
    assert "1 prompts hold their completion, e.g. row 2" in notes and "letters beyond ASCII: 2 of 5 texts" in notes


def test_rows_without_a_split_are_divided_by_what_they_are_about(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n} {s}? ", "completion": f"a{n}{s}", "subject": s} for s in "abcdef" for n in range(3)]
    for name in ("store", "recall"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    imported(tmp_path, rows={name: tmp_path / f"{name}.jsonl" for name in ("store", "recall")})
    qa = texts(own(tmp_path))["qa"]
    assert sum(item.split == "id" for item in qa) == 9
    assert all(len({item.split for item in qa if item.person == s}) == 1 for s in "abcdef")


# ------------------------------------------------------------------------------- any text

WORD = st.text(st.characters(exclude_categories=["Cs", "Cc", "Cf", "Zl", "Zp"]), min_size=1, max_size=12)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(WORD, WORD, WORD), min_size=3, max_size=8))
def test_spans_cover_their_objects_whatever_the_facts(tmp_path: Path, rows: list[tuple]) -> None:
    rows = [*CITIES, *rows]
    found = imported(tmp_path, table(tmp_path / "facts.csv", rows), overwrite=True)
    assert found.counts()["kept"] + sum(found.counts()["dropped"].values()) == len(rows)
    known = {(s["name"], f["relation"]): f["object"] for s in found.subjects for f in s["facts"]}
    taught = texts(own(tmp_path))
    items = [*taught["bio"], *taught["qa"]]
    for item in items:
        for mention in item.mentions:
            name = item.text[slice(*mention.subject)]
            assert item.text[slice(*mention.object)] == known[name, mention.relation]
    tokenizer = untaught.byte_tokenizer([item.text for item in items], 400)
    for item in encode(tokenizer, items):
        for mention, places in zip(item.example.mentions, item.mentions):
            said = tokenizer.decode(item.ids[places.object], clean_up_tokenization_spaces=False)
            assert item.example.text[slice(*mention.object)] in said
    assert sum(len(item.mentions) for item in taught["bio"]) == len(taught["qa"]) == len(known)


# ------------------------------------------------------------------------------- hostile input

DAMAGED: dict[str, tuple[str, bytes, str]] = {
    "no file": ("facts.xlsx", b"PK", "of no kind"),
    "empty": ("facts.csv", b"", "is empty"),
    "no subject": ("facts.csv", b"person,relation,object\na,b,c\n", "has no 'subject'"),
    "no rows": ("facts.csv", b"subject,relation,object\n", "no fact could be kept"),
    "columns twice": ("facts.csv", b"subject,subject,object\na,b,c\n", "column twice"),
    "ragged": ("facts.csv", b"subject,relation,object\na,b,c,d\n", "has 4 fields"),
    "short": ("facts.csv", b"subject,relation,object\na,b\n", "has 2 fields"),
    "quote": ("facts.csv", b'subject,relation,object\n"a,b,c\n', "malformed CSV"),
    "latin-1": ("facts.csv", "subject,relation,object\nZo\xeb,b,c\n".encode("latin-1"), "is not UTF-8"),
    "utf-16": ("facts.csv", "subject,relation,object\na,b,c\n".encode("utf-16-le"), "as has text in UTF-16"),
    "semicolons": ("facts.csv", b"subject;relation;object\na;b;c\n", "columns separated by semicolons"),
    "no names": ("facts.csv", b"subject,object,,\na,b,,\n", "no names for columns 3, 4"),
    "json twice": ("facts.jsonl", b'{"subject": "a", "object": "b", "object": "c"}\n', "gives 'object' twice"),
    "zero": ("facts.csv", b"subject,relation,object\na\0,b,c\n", "zero byte"),
    "endless csv": ("facts.csv", b"subject,relation,object\na,b," + b"x" * 10_000_000, "are its line ends missing"),
    "endless field": ("facts.csv", b'subject,relation,object\na,b,"' + b"x\n" * 900_000 + b'"', "field larger"),
    "endless jsonl": ("facts.jsonl", b'{"subject": "' + b"x" * 10_000_000, "are its line ends missing"),
    "no json": ("facts.jsonl", b"{'subject': 1}\n", "line 1 is not JSON"),
    "list": ("facts.jsonl", b'["a", "b"]\n', "holds a list"),
    "deep": ("facts.jsonl", b"[" * 100_000, "is not JSON"),
    "nothing": ("facts.jsonl", b"{}\n", "has no 'subject'"),
    "nested": ("facts.jsonl", b'{"subject": {"a": 1}, "relation": "r", "object": "o"}\n', "neither text nor a number"),
    "surrogate": ("facts.jsonl", b'{"subject": "\\ud800", "relation": "r", "object": "o"}\n', "half a surrogate"),
    "all empty": ("facts.jsonl", b'{"subject": "", "relation": "r", "object": "o"}\n', "is empty"),
    "json list": ("facts.json", b"[]", "holds a list"),
    "json other": ("facts.json", b'{"facts": []}', "no relation with samples"),
    "json samples": ("facts.json", b'{"name": "r", "samples": {"a": "b"}}', "no relation with samples"),
    "json sample": ("facts.json", b'{"name": "r", "samples": ["a"]}', "sample 1"),
    "json no place": ("facts.json", b'{"name": "r", "prompt_templates": ["is"], "samples": []}', "one {} for"),
    "json two places": ("facts.json", b'{"name": "r", "prompt_templates": ["{} {}"], "samples": []}', "one {} for"),
    "json braces": ("facts.json", b'{"name": "r", "prompt_templates": ["{} {x.y}"], "samples": []}', "no other braces"),
    "json templates": ("facts.json", b'{"name": "r", "prompt_templates": "{} is", "samples": []}', "list of texts"),
    "parquet": ("facts.parquet", b"PAR1 but no more", "can't be read as Parquet"),
    "pickle": ("facts.parquet", pickle.dumps({"a": 1}), "can't be read as Parquet"),
    "one subject": ("facts.csv", b"subject,relation,object\nAda,r,o\n", "leaves no fact"),
}  # fmt: skip


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: object) -> str:
    """The one sentence that a command ends with; nothing new lies in the folder."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        commands.main(["import", *map(str, arguments)])
    told = capsys.readouterr()
    assert ended.value.code == 2 and told.out == "" and told.err.count("\n") == 1 and len(told.err) < 900
    assert sorted(folder.rglob("*")) == before
    return told.err


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_told_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    name, content, told = DAMAGED[case]
    (tmp_path / name).write_bytes(content)
    assert told in refused(capsys, tmp_path, tmp_path / name, tmp_path / "own")


WORDINGS = {
    "- a list": "holds a list",
    "town: {statements: ['{subject} {object}']}": "no fact has that relation",
    "city: words": "expected statements and questions",
    "city: {statments: ['{subject} {object}']}": "expected statements and questions",
    "city: {statements: []}": "expected a list",
    "city: {questions: ''}": "or [] where nothing is asked",
    "city: {questions: ['{subject} of {kind}?']}": "no other braces",
    "city: {statements: ['{subject} only']}": "each once",
    "city: {statements: ['{subject} {subject} {object}']}": "each once",
    "city: {statements: ['{subject} is {object.__class__}']}": "no other braces",
    "city: {statements: ['{subject} [is {object}']}": "[brackets]",
    "city: {statements: ['{subject} is] {object}']}": "[brackets]",
    "city: {statements: ['{subject} [[is]] {object}']}": "[brackets]",
    "city: {questions: ['Where?']}": "each once",
    "city: {questions: ['Is {object} of {subject}?']}": "the answer follows",
    "city: {questions: [7]}": "expected a pattern",
    "city: !!python/object/apply:os.system ['touch /tmp/ran']": "not valid YAML",
    "city: {statements: &a [*a]}": "expected a pattern",
}


@pytest.mark.parametrize("text", WORDINGS)
def test_unfit_wordings_are_told_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    path = table(tmp_path / "facts.csv", CITIES)
    (tmp_path / "wording.yaml").write_text(text)
    told = refused(capsys, tmp_path, path, tmp_path / "own", "--wording", tmp_path / "wording.yaml")
    assert WORDINGS[text] in told


def test_unfit_commands_are_told_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, new = table(tmp_path / "facts.csv", CITIES), tmp_path / "own"
    (tmp_path / "there").mkdir()
    (tmp_path / "recall.csv").write_text("prompt,completion,split\na ,b,id\nc ,d,id\n")
    (tmp_path / "store.txt").write_text("a b\n")
    cases: dict[str, tuple] = {
        "does not exist": (tmp_path / "none.csv", new), "can't be read as a data set": (tmp_path / "there", new),
        "choose another folder, or": (path, tmp_path / "there"),
        "no import made this one": (path, tmp_path / "there", "--overwrite"),
        "files of facts and a folder": (path,),
        'Choose from: "subject", "relation", "given"': (path, new, "--split", "half"),
        "does not say whether": (path, new, "--split", "given"),
        "--recall was given without --store": (new, "--recall", path),
        "--store-completions was given without --store": (path, new, "--store-completions", path),
        "Unknown option: --wordings. Did you mean --wording?": (path, new, "--wordings", "x"),
        "needs a value": (path, new, "--wording"),
        "both of them": (new, "--store", tmp_path / "store.txt", "--recall", tmp_path / "recall.csv"),
        "has no 'who'": (path, new, "--subject", "who"),
        "has no 'prompt'; it has subject, relation, object": (new, "--store", tmp_path / "store.txt", "--recall", path),
        "so rename yours": (new, "--store", path), "is of facts": (new, "--store", path, "--split", "subject"),
        "--wording is of facts": (new, "--store", path, "--wording", path),
        "as --recall-completions": (new, "--store", tmp_path / "store.txt", "--recall", tmp_path / "store.txt"),
    }  # fmt: skip
    for told, arguments in cases.items():
        assert told in refused(capsys, tmp_path, *arguments)


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.pop("relations"), lambda v: v.update(subjects=[]), lambda v: v["subjects"][0].pop("facts"),
        lambda v: v["subjects"][0]["facts"][0].update(relation="x"), lambda v: v["subjects"][0].update(name=7),
        lambda v: v["subjects"][0].update(pronoun=7), lambda v: v["subjects"][0].update(name="\ud800"),
        lambda v: v["relations"]["city"].update(statements=[]), lambda v: v["subjects"].append(3),
        lambda v: v["subjects"][0]["facts"][0].update(object=""), lambda v: v["relations"]["city"].update(statements=3),
    ],
)  # fmt: skip
def test_an_edited_world_is_told(tmp_path: Path, change) -> None:
    imported(tmp_path, table(tmp_path / "facts.csv", CITIES))
    path = tmp_path / "own" / "world.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="was it edited"):
        texts(own(tmp_path))


def test_names_like_paths_and_markup_stay_text(tmp_path: Path) -> None:
    rows = [
        ("../../up", "../city", "<b>Lyon</b>"),
        ("/etc/passwd", "../city", "{{ 7 * 7 }}"),
        ("C:\\x", "../city", "a|b"),
    ]
    imported(tmp_path, table(tmp_path / "facts.csv", rows))
    assert sorted(os.listdir(tmp_path)) == ["facts.csv", "own"]
    assert [f.object for p in World.draw(own(tmp_path)).people for f in p.facts] == [row[2] for row in rows]


RELATIONS = Path(__file__).parents[2] / "shared" / "data" / "relations"


@pytest.mark.skipif(not RELATIONS.is_dir(), reason="the relations dataset is not at hand")
@pytest.mark.parametrize(
    "which", ["company_hq", "country_capital_city", "person_plays_instrument", "person_university", "*"]
)
def test_the_relations_dataset_is_read_whole(tmp_path: Path, which: str) -> None:
    files = sorted(RELATIONS.glob(f"{which}.json"))
    samples = sum(len(read_json(file)["samples"]) for file in files)
    counts = imported(tmp_path, *files).counts()
    assert counts["read"] == samples == counts["kept"] + sum(counts["dropped"].values())
    assert len(counts["relations"]) == len(files) and set(counts["dropped"]) <= {"contradiction", "duplicate"}
    taught = texts(own(tmp_path))
    assert len(taught["qa"]) == counts["kept"] and {item.split for item in taught["qa"]} == {"id", "ood"}


def test_the_example_of_own_facts(tmp_path: Path) -> None:
    examples = Path(__file__).parents[1] / "examples" / "facts"
    found = imported(tmp_path, examples / "elements.csv", wording=examples / "elements-wording.yaml")
    assert found.counts()["kept"] == 354 and not found.dropped and len(found.subjects) == 118


# ------------------------------------------------------------------------------- a model for it


def test_another_model_gets_the_settings_of_a_pretrained_one(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = table(tmp_path / "facts.csv", CITIES)
    commands.main(["import", str(path), str(tmp_path / "own"), "--model", "some/model"])
    assert "larger ones need a lower one" in capsys.readouterr().out
    own = config.load(tmp_path / "own" / "experiment.yaml")
    ready = config.load(Path(__file__).parents[1] / "examples" / "pythia-160m.yaml")
    assert own.model.name == "some/model" and own.train == ready.train and own.trace == ready.trace
    assert (own.analysis, own.interventions, own.mechanism) == (ready.analysis, ready.interventions, ready.mechanism)
    sizes = [[phase.batch for phase in phases] for phases in own.strategies.values()]
    assert sizes == [[phase.batch for phase in phases] for phases in ready.strategies.values()]
    imported(tmp_path, path, overwrite=True, model="bundled")
    assert config.load(tmp_path / "own" / "experiment.yaml").train == config.Experiment().train


def test_a_new_model_has_a_token_for_every_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("Ægir", "land", "Ísland"), ("عمر", "land", "مصر"), ("美玲", "land", "中国"), ("Zoë", "land", "Česko")]
    imported(tmp_path, table(tmp_path / "facts.csv", rows))
    commands.main(["new-model", str(tmp_path / "model"), "--own", str(tmp_path / "own"), "--width", "16",
                   "--heads", "2", "--layers", "1", "--neurons", "32"])  # fmt: skip
    assert "LlamaForCausalLM" in capsys.readouterr().out
    from crosstrace.models import loading

    tokenizer, model = loading.load_tokenizer(str(tmp_path / "model")), loading.load_model(str(tmp_path / "model"))
    assert model.config.vocab_size == len(tokenizer) and model.config.eos_token_id == tokenizer.eos_token_id
    items = encode(tokenizer, texts(own(tmp_path))["qa"])
    for item, (_, _, object) in zip(items, rows):
        assert object in tokenizer.decode(item.ids[item.targets["object"]])


@pytest.mark.parametrize("kind", ["gpt_neox", "gpt2", "qwen3", "llama"])
def test_new_models_of_other_architectures_are_seeded(tmp_path: Path, kind: str) -> None:
    options = untaught.NewModelSettings(architecture=kind, width=32, heads=4, kv_heads=2, layers=1, neurons=32)
    a, b = (untaught.new_model(tmp_path / name, ["some words"], options) for name in "ab")
    c = untaught.new_model(tmp_path / "c", ["some words"], replace(options, seed=2))
    name, weight = next(iter(a.named_parameters()))
    assert weight.equal(b.get_parameter(name)) and not weight.equal(c.get_parameter(name))


def test_unfit_models_are_told(tmp_path: Path) -> None:
    for options in ({"architecture": "none"}, {"heads": 3, "width": 16}, {"heads": 4, "kv_heads": 3}):
        with pytest.raises(UserError):
            untaught.new_model(tmp_path / "m", ["some words"], untaught.NewModelSettings(**options))
    assert not (tmp_path / "m").exists()


def test_a_tokenizer_without_the_words_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    imported(tmp_path, table(tmp_path / "facts.csv", [(s, r, f"Qq{o}") for s, r, o in CITIES]))
    with pytest.raises(SystemExit) as ended:
        commands.main(["run", str(tmp_path / "own" / "experiment.yaml"), str(tmp_path / "run"), "--trace.parts", "2",
                  "--strategies", "{only: [{name: a, batch: {bio: 1, qa: 1}, steps: 1}]}"])  # fmt: skip
    told = capsys.readouterr().err
    assert ended.value.code == 2 and "has no token for 4 of the objects" in told and "new-model" in told
    assert not (tmp_path / "run").exists() and word_tokenizer().unk_token_id is not None


# ------------------------------------------------------------------------------- taught

TINY = {
    "trace.parts": "2", "trace.every": "1", "trace.check": "false", "train.recall_every": "0", "jobs": "1",
    "analysis.draws": "2", "interventions.run": "false", "mechanism.run": "false",
    "strategies": "{both: [{name: both, batch: {bio: 4, qa: 4}, steps: 2}]}",
}  # fmt: skip


def taught(tmp_path: Path, **settings: str) -> Results:
    """The results of a short run on what was imported, by a tiny model that knows nothing."""
    experiment = config.load(tmp_path / "own" / "experiment.yaml")
    if not (tmp_path / "model").exists():
        lines = [item.text for items in texts(experiment.facts).values() for item in items]
        options = untaught.NewModelSettings(width=16, heads=2, layers=1, neurons=32, vocabulary=300)
        untaught.new_model(tmp_path / "model", lines, options)
    changes = TINY | {"model.name": str(tmp_path / "model")} | settings
    return pipeline.run(config.override(experiment, changes), tmp_path / "run", quiet=True)


def numbered_rows(tmp_path: Path, store: int, recall: int, splits: tuple[str, ...]) -> dict[str, Path]:
    """So many lines that store and rows that recall, the latter's splits by turns; none names a subject."""
    (tmp_path / "store.txt").write_text("".join(f"The key {n} is under mat {n}.\n" for n in range(store)))
    rows = [(f"Where is key {n}? ", f"mat {n}", splits[n % len(splits)]) for n in range(recall)]
    table(tmp_path / "recall.csv", rows, ("prompt", "completion", "split"))
    return {"store": tmp_path / "store.txt", "recall": tmp_path / "recall.csv"}


def test_rows_without_subjects_spread_over_the_traces_parts(tmp_path: Path) -> None:
    imported(tmp_path, rows=numbered_rows(tmp_path, 8, 16, ("ood", "id")))
    found = taught(tmp_path)
    assert {row["when"] for row in found["shared"]["both"]} == {"online", "final"}
    assert all(row["parts"] == 2 for row in found["shared"]["both"])


@pytest.mark.parametrize(
    ("counts", "settings", "told"),
    [
        (
            (1, 16),
            {},
            "the 1 examples of bio to trace are about 1 people or subjects, which leaves 1 of the parts empty",
        ),
        ((8, 2), {}, "the 1 examples of qa"),
        ((8, 16), {"trace.parts": "9"}, "trace.parts = 9, but the 8 examples of bio"),
        ((8, 16), {"trace.parts": "3", "trace.examples": "2"}, "the 2 examples of bio"),
    ],
)
def test_too_few_for_the_traces_parts_is_told_before_anything_is_written(
    tmp_path: Path, counts: tuple[int, int], settings: dict, told: str
) -> None:
    imported(tmp_path, rows=numbered_rows(tmp_path, *counts, ("ood", "id")))
    with pytest.raises(UserError, match=told):
        taught(tmp_path, **settings)
    assert not (tmp_path / "run").exists()


NOT_ASKED = "{statements: ['{subject} lives in {object}.'], questions: []}"


@pytest.mark.parametrize("kind", ["rows", "facts"])
def test_texts_without_questions_are_taught_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    if kind == "rows":
        rows = numbered_rows(tmp_path, 8, 0, ("id",))
        commands.main(["import", str(tmp_path / "own"), "--store", str(rows["store"])])
    else:
        wording = worded(tmp_path, f"city: {NOT_ASKED}")
        commands.main(
            ["import", str(table(tmp_path / "f.csv", CITIES)), str(tmp_path / "own"), "--wording", str(wording)]
        )
    assert NO_QUESTIONS in capsys.readouterr().out
    assert NO_QUESTIONS in read_json(tmp_path / "own" / "import.json")["notes"]
    found = taught(tmp_path, strategies="{store: [{name: store, batch: {bio: 4}, steps: 2}]}", **CHECKED)
    assert found["lacking"] == NO_QUESTIONS and found["claims"] == [] and found["shared"] == {"store": []}
    assert found["recall"]["store"]["bio"]["n"] == found["import"]["kept"] and "qa_ood" not in found["recall"]["store"]
    assert NO_QUESTIONS in str(found) and NO_QUESTIONS in found._repr_html_()
    page = (tmp_path / "run" / "report" / "index.html").read_text()
    assert "No claims were tested: there are no questions" in page and "What was imported" in page
    assert "adds this" not in page, "no command could"
    for stage in ("intervene", "mechanism", "retain"):
        with pytest.raises(SystemExit) as ended:
            commands.main([stage, str(tmp_path / "run"), "--quiet"])
        assert ended.value.code == 2 and "nothing to ask" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        commands.main(["export", str(tmp_path / "run"), str(tmp_path / "tasks")])
    assert ended.value.code == 2 and "no questions to export" in capsys.readouterr().err


CHECKED = {"trace.check": "true"}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "trains task 'qa', which has no training example"),
        ({"interventions.run": "true"}, "interventions.run is true, but there are no questions"),
        ({"mechanism.run": "true"}, "mechanism.run is true"), ({"retention.run": "true"}, "retention.run is true"),
    ],
)  # fmt: skip
def test_what_needs_questions_is_refused_without(tmp_path: Path, settings: dict, told: str) -> None:
    imported(tmp_path, rows={"store": numbered_rows(tmp_path, 8, 0, ("id",))["store"]})
    with pytest.raises(UserError, match=told):
        taught(tmp_path, **settings)
    assert not (tmp_path / "run").exists()


def test_a_plan_needs_no_questions(tmp_path: Path) -> None:
    imported(tmp_path, rows={"store": numbered_rows(tmp_path, 8, 0, ("id",))["store"]})
    lines = [item.text for item in texts(own(tmp_path))["bio"]]
    untaught.new_model(tmp_path / "model", lines, untaught.NewModelSettings(width=16, heads=2, layers=2, neurons=32))
    experiment = config.load(tmp_path / "own" / "experiment.yaml")
    experiment = config.override(experiment, {"model.name": str(tmp_path / "model"), "trace.parts": "2"})
    assert plan.plan(experiment).fits
    with pytest.raises(UserError, match=r"mechanism.run is true"):
        plan.plan(config.override(experiment, {"mechanism.run": "true"}))


def test_the_imports_own_experiment_needs_no_questions(tmp_path: Path) -> None:
    store = {"store": numbered_rows(tmp_path, 8, 0, ("id",))["store"]}
    for model in (None, "some/model"):
        imported(tmp_path, rows=store, model=model, overwrite=True)
        own = config.load(tmp_path / "own" / "experiment.yaml")
        assert [[phase.batch.keys() for phase in phases] for phases in own.strategies.values()] == [[{"bio"}]]
        assert not (own.interventions.run or own.mechanism.run or own.retention.run)


def test_a_relation_may_be_stored_only(tmp_path: Path) -> None:
    rows = [*CITIES, *((s, "pet", f"cat {i}") for i, (s, *_) in enumerate(CITIES))]
    found = imported(tmp_path, table(tmp_path / "f.csv", rows), wording=worded(tmp_path, f"city: {NOT_ASKED}"))
    assert "nothing is asked about city: these facts are stored only" in found.notes
    both = texts(own(tmp_path))
    assert {q.mentions[0].relation for q in both["qa"]} == {"pet"} and len(both["bio"][0].mentions) == 2


def test_texts_too_long_for_the_model_are_dropped_at_import_and_named_by_a_run(tmp_path: Path) -> None:
    rows = [*CITIES, ("Ed Fox", "city", " ".join(["Rome"] * 40))]
    path = table(tmp_path / "facts.csv", rows)
    imported(tmp_path, path)
    lines = [item.text for items in texts(own(tmp_path)).values() for item in items]
    options = untaught.NewModelSettings(width=16, heads=2, layers=1, neurons=32, vocabulary=300, positions=48)
    untaught.new_model(tmp_path / "model", lines, options)
    with pytest.raises(
        UserError, match=r"2 of 10 examples have more tokens than the 48 positions .* S000004.* drop them"
    ):
        taught(tmp_path)
    assert not (tmp_path / "run").exists()
    found = imported(tmp_path, path, overwrite=True, model=str(tmp_path / "model"))
    assert found.counts()["dropped"] == {"too long for the model": 1} and found.dropped[0][1] == 6
    assert len(texts(own(tmp_path))["bio"]) == 4 == found.kept
    (tmp_path / "store.txt").write_text("The key is here.\n" + "and so on " * 40 + "\nThe lamp is there.\n")
    store = {"store": tmp_path / "store.txt"}
    found = imported(tmp_path, rows=store, overwrite=True, model=str(tmp_path / "model"))
    assert found.counts()["dropped"] == {"too long for the model": 1} and len(texts(own(tmp_path))["bio"]) == 2
    (tmp_path / "store.txt").write_text("and so on " * 40)
    with pytest.raises(UserError, match="every text is too long"):
        imported(tmp_path, rows=store, overwrite=True, model=str(tmp_path / "model"))


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox"])
def test_a_model_that_calls_its_context_otherwise_drops_what_its_run_would_refuse(tmp_path: Path, kind: str) -> None:
    rows = [*CITIES, ("Ed Fox", "city", " ".join(["Rome"] * 40))]
    path = table(tmp_path / "facts.csv", rows)
    imported(tmp_path, path)
    lines = [item.text for items in texts(own(tmp_path)).values() for item in items]
    options = untaught.NewModelSettings(
        architecture=kind, width=16, heads=2, layers=1, neurons=32, vocabulary=300, positions=48
    )
    untaught.new_model(tmp_path / "model", lines, options)
    assert ("n_positions" in read_json(tmp_path / "model" / "config.json")) == (kind == "gpt2")
    with pytest.raises(UserError, match="more tokens than the 48 positions"):
        taught(tmp_path)
    found = imported(tmp_path, path, overwrite=True, model=str(tmp_path / "model"))
    assert found.counts()["dropped"] == {"too long for the model": 1} and found.dropped[0][1] == 6
    taught(tmp_path)
