"""The wheel: what it holds is all that a run needs, and it is the wheel that runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
TINY = """
name: tiny
facts: {people: 16}
strategies:
  two_stage: [{name: bio, batch: {bio: 4}, steps: 2}, {name: qa, batch: {qa: 4}, steps: 2}]
  mixed: [{name: mixed, batch: {bio: 4, qa: 4}, steps: 2}]
train: {recall_every: 2, recall_examples: 8}
trace: {every: 1, parts: 2, examples: 8}
analysis: {fractions: [0.05], central_fractions: [0.05], draws: 2}
interventions: {fractions: [0.05], seeds: 1, questions: 8}
mechanism: {run: false}
eval: {known_examples: 8}
jobs: 1
"""


def run(*words: object, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COV_"))}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, words)], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]
    return done


def link_dependencies(site: Path) -> None:
    """Link what crosstrace depends on, and nothing else, from this environment into another's packages."""
    found: dict[str, metadata.Distribution] = {}
    names = ["crosstrace"]
    while names:
        name = names.pop()
        if canonicalize_name(name) in found:
            continue
        try:
            found[canonicalize_name(name)] = part = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # of another platform, or of torch's builds for GPUs
            continue
        wanted = map(Requirement, part.requires or ())
        names += [each.name for each in wanted if each.marker is None or each.marker.evaluate({"extra": ""})]
    del found["crosstrace"]
    here = Path(sysconfig.get_path("purelib"))
    for part in found.values():
        for top in {file.parts[0] for file in part.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(here / top)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the sources, which a build would else litter."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(
        ROOT / "src" / "crosstrace", folder / "src" / "crosstrace", ignore=shutil.ignore_patterns("__pycache__")
    )
    options = ("--no-deps", "--no-index", "--no-build-isolation", "-q", "-w", folder / "dist")
    run(sys.executable, "-m", "pip", "wheel", folder, *options, folder=folder)
    (path,) = (folder / "dist").glob("*.whl")
    return path


@pytest.mark.long
def test_it_holds_what_the_sources_hold(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if not name.split("/")[0].endswith(".dist-info")}
    sources = {
        str(path.relative_to(ROOT / "src"))
        for path in (ROOT / "src" / "crosstrace").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == sources
    assert "crosstrace/py.typed" in held and wheel.stat().st_size < 12e6


@pytest.mark.long
def test_it_runs_in_an_empty_environment_elsewhere(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "venv"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        wheel,
        folder=tmp_path,
    )
    site = Path(sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)}))
    link_dependencies(site)
    (missing,) = run(
        python, "-c", "import importlib.util as u; print(u.find_spec('pytest'))", folder=tmp_path
    ).stdout.split()
    assert missing == "None", "only what the wheel asks for is there"
    command = home / "bin" / "crosstrace"
    found = run(python, "-c", "import crosstrace; print(crosstrace.__file__)", folder=tmp_path).stdout.strip()
    assert Path(found).is_relative_to(site)
    assert run(command, "--version", folder=tmp_path).stdout.strip().endswith("0.1.0")
    settings = yaml.safe_load(run(command, "settings", folder=tmp_path).stdout)
    assert settings["model"]["name"] == "bundled"
    (tmp_path / "tiny.yaml").write_text(TINY)
    done = run(command, "run", "tiny.yaml", "out", "--quiet", folder=tmp_path)
    assert "exact match" in done.stdout and (tmp_path / "out" / "report" / "index.html").is_file()
