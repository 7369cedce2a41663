"""Damaged and hostile input to an import: each mistake is one sentence, and nothing is left behind."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
from imported_files import CITIES, imported, refused, source_settings, table

from crosstrace.core.errors import UserError
from crosstrace.core.files import read_json
from crosstrace.data.facts import World
from crosstrace.data.text import texts

DAMAGED: dict[str, tuple[str, bytes, str]] = {
    "no file": ("facts.xlsx", b"PK", "of no kind"),
    "empty": ("facts.csv", b"", "is empty"),
    "no subject": ("facts.csv", b"person,relation,object\na,b,c\n", "has no column 'subject'"),
    "no rows": (
        "facts.csv",
        b"subject,relation,object\n",
        "no fact could be kept of 0 rows in {path}; expected facts below the columns' names",
    ),
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
    "nothing": ("facts.jsonl", b"{}\n", "has no column 'subject'"),
    "nested": ("facts.jsonl", b'{"subject": {"a": 1}, "relation": "r", "object": "o"}\n', "neither text nor a number"),
    "surrogate": ("facts.jsonl", b'{"subject": "\\ud800", "relation": "r", "object": "o"}\n', "half a surrogate"),
    "all empty": ("facts.jsonl", b'{"subject": "", "relation": "r", "object": "o"}\n', "1 × an empty subject"),
    "json list": ("facts.json", b"[]", "expected facts below the columns' names"),
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


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_told_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    name, content, told = DAMAGED[case]
    (tmp_path / name).write_bytes(content)
    assert told.replace("{path}", str(tmp_path / name)) in refused(capsys, tmp_path, tmp_path / name, tmp_path / "own")


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
        "has no column 'who'": (path, new, "--subject", "who"),
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
        texts(source_settings(tmp_path))


def test_names_like_paths_and_markup_stay_text(tmp_path: Path) -> None:
    rows = [
        ("../../up", "../city", "<b>Lyon</b>"),
        ("/etc/passwd", "../city", "{{ 7 * 7 }}"),
        ("C:\\x", "../city", "a|b"),
    ]
    imported(tmp_path, table(tmp_path / "facts.csv", rows))
    assert sorted(os.listdir(tmp_path)) == ["facts.csv", "own"]
    assert [f.object for p in World.draw(source_settings(tmp_path)).people for f in p.facts] == [row[2] for row in rows]


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
    taught = texts(source_settings(tmp_path))
    assert len(taught["qa"]) == counts["kept"] and {item.split for item in taught["qa"]} == {"id", "ood"}


def test_the_example_of_own_facts(tmp_path: Path) -> None:
    examples = Path(__file__).parents[1] / "examples" / "facts"
    found = imported(tmp_path, examples / "elements.csv", wording=examples / "elements-wording.yaml")
    assert found.counts()["kept"] == 354 and not found.dropped and len(found.subjects) == 118
