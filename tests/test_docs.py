"""The site: its reference has every public name, each with a docstring; its notebooks run; no link is dead."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import crosstrace
from crosstrace import plots

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
NAMES = [name for name in crosstrace.__all__ if name != "plots"]


def test_the_reference_has_every_public_name() -> None:
    listed = set(re.findall(r"^::: crosstrace\.([\w.]+)$", (ROOT / "docs/reference.md").read_text(), re.MULTILINE))
    homes = {f"{crosstrace._MODULE[name]}.{name}" for name in NAMES}
    short = {path.rpartition(".")[2] for path in listed}
    assert {home.rpartition(".")[2] for home in homes} <= short
    for path in listed:
        module, _, name = f"crosstrace.{path}".rpartition(".")
        assert hasattr(__import__(module, fromlist=[name]), name), path


def members(value: Any) -> list[tuple[str, Any]]:
    """The public methods and properties of a class; the Trainer's own callbacks aside."""
    return [
        (name, member.fget if isinstance(member, property) else getattr(value, name))
        for name, member in vars(value).items()
        if not name.startswith(("_", "on_"))
        and isinstance(member, (property, classmethod, staticmethod, type(lambda: 0)))
    ]


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_documented(name: str) -> None:
    value = getattr(crosstrace, name)
    text = inspect.getdoc(value) or ""
    assert len(text.split()) > 3, name
    assert not text.startswith(f"{name}("), f"{name} has its signature for a docstring, as a dataclass without one"
    if inspect.isclass(value):
        for member, function in members(value):
            assert inspect.getdoc(function), f"{name}.{member}"
    else:
        listed = [p for p in inspect.signature(value).parameters.values() if p.kind is not p.VAR_KEYWORD]
        assert "Args:" in text or len(listed) <= 3, name


def test_every_figure_is_documented_and_named_in_the_reference() -> None:
    reference = (ROOT / "docs/reference.md").read_text()
    for name in plots.__all__:
        assert inspect.getdoc(getattr(plots, name)), name
        assert re.search(rf"members: \[.*\b{name}\b", reference), name


def test_a_look_at_knowledge_is_drawn_and_shown() -> None:
    rows = [
        {"step": step, "part": part, "n": 4, "recall": step / 10, "logprob": step - 10.0}
        for step in (0, 5, 10)
        for part in ("stored", "held_out")
    ]
    figure = plots.knowledge(rows)
    (axes,) = figure.axes
    assert [line.get_label() for line in axes.lines] == ["stored", "held out"]
    assert list(axes.lines[0].get_ydata()) == [0.0, 0.5, 1.0] and axes.get_ylim()[1] == pytest.approx(1.04)
    assert list(plots.knowledge(rows, measure="logprob").axes[0].lines[1].get_ydata()) == [-10.0, -5.0, 0.0]
    assert figure._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(crosstrace.UserError, match="no looks to draw"):
        plots.knowledge([])
    with pytest.raises(crosstrace.UserError, match="measure = 'loss'; expected one of recall, logprob"):
        plots.knowledge(rows, measure="loss")  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.skipif("CROSSTRACE_SLOW" not in os.environ, reason="takes a minute or two; set CROSSTRACE_SLOW=1")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {"__name__": "notebook"}
    for number, cell in enumerate(json.loads(path.read_text())["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), space)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_hold_what_they_show(path: Path) -> None:
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output["output_type"] == "error" or output.get("name") == "stderr" for output in outputs)


@pytest.mark.long
def test_the_site_has_no_dead_link(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs_jupyter")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-f", str(ROOT / "mkdocs.yml"), "-d"]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run([*words, str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.html")}
    assert {"index.html", "reference.html", "notebooks/first_look.html"} <= pages
    for page in sorted(pages - {"404.html"}):  # (which is shown under any path, so that its links begin at the root)
        text = (tmp_path / page).read_text(encoding="utf-8")
        for link in re.findall(r'(?:href|src)="([^"]+)"', text):
            path = re.split("[#?]", link)[0]
            if path and ":" not in path:
                assert ((tmp_path / page).parent / path).exists(), f"{page}: {link}"
        assert not re.search(r'<(?:link|script|img)[^>]*(?:href|src)="https?:', text), page  # no request to anyone
