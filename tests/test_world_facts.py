"""The facts of the world: the bundled file is what its CSV gives, and its sentences can be completed."""

from __future__ import annotations

from pathlib import Path

import pytest

from crosstrace.cli import commands
from crosstrace.core.files import read_json
from crosstrace.data.facts import FactSettings, World
from crosstrace.data.text import texts
from crosstrace.importing.facts import import_facts
from crosstrace.models import locating

EXAMPLES = Path(__file__).parents[1] / "examples" / "facts"
BUNDLED = locating.bundled_folder().parent / "world"


def test_the_bundled_file_is_what_the_import_makes_of_the_table(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    commands.main(["import", str(EXAMPLES / "world.csv"), str(tmp_path / "world"),
              "--wording", str(EXAMPLES / "world-wording.yaml")])  # fmt: skip
    counts = read_json(tmp_path / "world" / "import.json")
    assert counts["kept"] == counts["read"] == 593 and not counts["dropped"]
    assert "plain wordings" not in capsys.readouterr().out
    assert (tmp_path / "world" / "world.json").read_bytes() == (BUNDLED / "world.json").read_bytes()


def test_its_readme_has_the_number_of_facts_of_each_relation() -> None:
    readme = (BUNDLED / "README.md").read_text(encoding="utf-8")
    counts = import_facts([EXAMPLES / "world.csv"]).counts()
    assert {*counts["relations"]} == {"capital", "continent", "currency", "language", "symbol"}
    for name, number in counts["relations"].items():
        assert readme.count(f"| {name} | {number} |") == 2
    assert f"{counts['kept']} facts about 162 countries and 103 chemical elements" in readme
    assert counts["subjects"] == 162 + 103


def test_every_statement_ends_with_its_object_and_none_begins_with_its_subject() -> None:
    relations = read_json(BUNDLED / "world.json")["relations"]
    for row in relations.values():
        assert len(row["statements"]) == 3 and len(row["questions"]) == 2
        for pattern in row["statements"]:
            assert pattern.replace("]", "").endswith(" {object}.")
            assert pattern.replace("[", "")[0].isupper()  # a name may begin with a small letter


def test_the_bundled_folder_is_a_source_whose_sentences_end_with_their_objects() -> None:
    settings = FactSettings(source=str(BUNDLED))
    objects = {fact.id: fact.object for person in World.draw(settings).people for fact in person.facts}
    taught = texts(settings)
    assert len(taught["qa"]) == len(objects) == 593
    for example in [*taught["bio"], *taught["qa"]]:
        for mention in example.mentions:
            start, end = mention.object
            assert example.text[start:end] == objects[mention.fact]
            assert example.text[end : end + 1] == ("." if example.task == "bio" else "")
