"""Imports of facts: counts that add up, values that stay as they are, spans that cover, and splits."""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from imported_files import CITIES, RELATION, imported, refused, source_settings, table, worded

from crosstrace.core.errors import UserError
from crosstrace.core.files import read_json
from crosstrace.data.facts import World
from crosstrace.data.tasks import TaskSettings
from crosstrace.data.text import texts
from crosstrace.data.tokens import encode
from crosstrace.experiment import config
from crosstrace.importing import facts
from crosstrace.importing.rows import import_rows
from crosstrace.models import untaught


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
    world = World.draw(source_settings(tmp_path))
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
    world = World.draw(source_settings(tmp_path))
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
    found = texts(source_settings(tmp_path))
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
    assert [item.text for item in texts(source_settings(tmp_path))["bio"]] == [
        "iPhone is of Apple. It has a large screen.", "eBook is of Kobo. eBook has a grey screen."
    ]  # fmt: skip


HEAD = ("subject", "relation", "object")


def test_further_right_answers_of_facts(tmp_path: Path) -> None:
    cells = ['["Lugdunum", " LYON ", "Lyon"]', "Ada's city", "", "7"]
    path = table(
        tmp_path / "facts.csv", [(*row, cell) for row, cell in zip(CITIES, cells)], head=(*HEAD, "answer_alias")
    )
    found = imported(tmp_path, path)
    lists = [["Lugdunum", "LYON"], ["Ada's city"], [], ["7"]]
    assert [fact.aliases for person in World.draw(source_settings(tmp_path)).people for fact in person.facts] == [
        tuple(aliases) for aliases in lists
    ]
    for task in ("questions", "cloze"):
        tasks = {"asked": TaskSettings("recall", task)}
        assert [[*item.aliases] for item in texts(source_settings(tmp_path), tasks)["asked"]] == lists
    assert any(note.startswith("3 facts with several right answers") for note in found.notes)
    assert not any("nothing was made of" in note for note in found.notes)
    assert config.load(tmp_path / "own" / "experiment.yaml").eval.spoken == 32
    imported(tmp_path, table(path, CITIES), overwrite=True)
    assert config.load(tmp_path / "own" / "experiment.yaml").eval.spoken is None


def test_further_right_answers_that_are_none(tmp_path: Path) -> None:
    cells = [["Oslo, in the north", "Bo", ""], {"a": 1}, ["\ud800"], ["a\u202eb"]]
    facts = [*CITIES[1:], ("Ed Fox", "city", "Nice"), ("Flo Gray", "city", "Kyiv")]
    rows = [{**dict(zip(HEAD, fact)), "also": cell} for fact, cell in zip(facts, [*cells, None])]
    path = tmp_path / "facts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = imported(tmp_path, path, columns={"aliases": "also"})
    assert found.counts()["dropped"] == {"not a text": 1, "not Unicode": 1, "control": 1}
    assert found.subjects[0]["facts"] == [
        {"relation": "city", "object": "Oslo", "split": None, "aliases": ["Oslo, in the north"]}
    ]  # the name of the subject is no answer


def test_further_right_answers_of_rows(tmp_path: Path) -> None:
    (tmp_path / "store.txt").write_text("The key is here.\n")
    cells = [["there", "in here"], "near", None, [True], ["\ud800"]]
    rows = [
        {"prompt": f"Where is key {number}?", "completion": ["here", "hither"], "also": cell, "split": split}
        for number, (cell, split) in enumerate(zip(cells, ("id", "ood", "id", "id", "id")))
    ]
    (tmp_path / "ask.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"store": tmp_path / "store.txt", "recall": tmp_path / "ask.jsonl"}
    found = imported(tmp_path, rows=files, columns={"aliases": "also"})
    assert found.counts()["dropped"] == {"not a text": 1, "not Unicode": 1}
    aliases = [item.aliases for item in texts(source_settings(tmp_path))["qa"]]
    assert aliases == [("hither", "there", "in here"), ("hither", "near"), ("hither",)]
    assert not any("nothing was made of" in note for note in found.notes)


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
    found = {object for object in objects if any(facts.is_within(object, line) for line in lines)}
    assert facts._contained(objects, lines) == found
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
        "1 group of subjects that share all names, in another order, e.g. 'Ada Brook' and 'Brook Ada' and 'Brook, Ada'"
        in notes
    )
    assert "1 group of subjects that differ in case or accents only, e.g. 'Zoë' and 'Zoe'" in notes
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
    found = texts(source_settings(tmp_path))
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


def splits(tmp_path: Path, **options) -> dict[tuple[str, str], str]:
    return {
        (q.mentions[0].relation, q.text[slice(*q.mentions[0].subject)]): q.split
        for q in texts(source_settings(tmp_path, **options))["qa"]
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
    few = World.draw(source_settings(tmp_path, subjects=2))
    assert len(few.people) == 2 and few.wording.relations == ("x", "y", "z")
    some = World.draw(source_settings(tmp_path, relations=("z", "x")))
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
        texts(replace(source_settings(tmp_path), **options))


WORD = st.text(st.characters(exclude_categories=["Cs", "Cc", "Cf", "Zl", "Zp"]), min_size=1, max_size=12)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(WORD, WORD, WORD), min_size=3, max_size=8))
def test_spans_cover_their_objects_whatever_the_facts(tmp_path: Path, rows: list[tuple]) -> None:
    rows = [*CITIES, *rows]
    found = imported(tmp_path, table(tmp_path / "facts.csv", rows), overwrite=True)
    assert found.counts()["kept"] + sum(found.counts()["dropped"].values()) == len(rows)
    known = {(s["name"], f["relation"]): f["object"] for s in found.subjects for f in s["facts"]}
    taught = texts(source_settings(tmp_path))
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
