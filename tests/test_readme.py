"""The README's example runs as written, and the commands it names exist."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from crosstrace.cli import commands
from crosstrace.core.errors import UserError
from crosstrace.experiment import config, study_settings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_quick_example(capsys: pytest.CaptureFixture[str]) -> None:
    quick, two_lines = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    space: dict = {"__name__": "readme"}
    exec(compile(quick, "README.md", "exec"), space)
    printed = capsys.readouterr().out
    assert "overlap" in printed and "exact_match" in printed
    space["trainer"] = trainer = SimpleNamespace(callbacks=[])
    trainer.add_callback = trainer.callbacks.append
    exec(compile(two_lines, "README.md", "exec"), space)
    assert [type(callback).__name__ for callback in trainer.callbacks] == ["TraceCallback"]


def test_the_example_of_the_page_on_extending(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/extend.md").read_text("utf-8"), re.DOTALL)
    exec(compile(example, "extend.md", "exec"), {"__name__": "extend"})
    printed = capsys.readouterr().out.splitlines()
    assert "parameters are in the top 5 % of all three" in printed[0]
    assert [line.split()[0] for line in printed[1:]] == ["untouched", "shared"] + ["random"] * 3 + [
        "random_per_tensor"
    ] * 3


def test_named_commands_and_files_exist() -> None:
    for command in re.findall(r"crosstrace ([a-z][a-z-]*)", re.sub(r"```python.*?```", "", README, flags=re.DOTALL)):
        if command in ("answers",):
            continue
        assert command in commands.COMMANDS, command


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_of_pages_lead_somewhere(page: str) -> None:
    headings = lambda path: {
        re.sub(r"[^\w -]", "", line.lstrip("# ").strip().lower()).replace(" ", "-")
        for line in path.read_text("utf-8").splitlines() if line.startswith("#")
    }  # fmt: skip
    for link, anchor in re.findall(r"\]\(([^)#:]*)#?([^):]*)\)", (ROOT / page).read_text("utf-8")):
        target = (ROOT / page).parent / link if link else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in headings(target), f"{link}#{anchor}"


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_examples_are_valid(path: Path) -> None:
    if path.name.startswith("study-"):
        with pytest.raises(UserError, match="is a study"):
            config.load(path)
        assert study_settings.plan(study_settings.load(path))
        return
    experiment = config.load(path)
    assert config.loads(config.dumps(experiment), "dumped") == experiment
