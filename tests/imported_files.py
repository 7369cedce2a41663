"""Files of facts for the tests of imports, and folders that imports made of them."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from crosstrace.cli import commands
from crosstrace.data.facts import FactSettings
from crosstrace.importing import importing
from crosstrace.importing.imported import Imported

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


def imported(tmp_path: Path, *files: Path, **options) -> Imported:
    return importing.import_to(tmp_path / "own", files, tell=lambda text: None, **options)


def source_settings(tmp_path: Path, **options) -> FactSettings:
    return FactSettings(source=str(tmp_path / "own"), **options)


def worded(tmp_path: Path, text: str) -> Path:
    (tmp_path / "wording.yaml").write_text(text)
    return tmp_path / "wording.yaml"


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: object) -> str:
    """The one sentence that a command ends with; nothing new lies in the folder."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        commands.main(["import", *map(str, arguments)])
    told = capsys.readouterr()
    assert ended.value.code == 2 and told.out == "" and told.err.count("\n") == 1 and len(told.err) < 900
    assert sorted(folder.rglob("*")) == before
    return told.err
