"""The benchmark for a GPU: what of it runs on a CPU, what it leaves out and survives, and its folder of wheels."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import gpu
import gpu_wheels
from gpu_wheels import Requirement


@pytest.fixture
def sheet(tmp_path: Path) -> gpu.Sheet:
    return gpu.Sheet(tmp_path / "gpu.json", "cost", time.time() + 600, smoke=True)


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


@pytest.mark.long
@pytest.mark.parametrize("part", ["machine", "cost", "training", "memory"])
def test_a_part_runs_with_tiny_shapes_on_the_cpu(part: str, sheet: gpu.Sheet) -> None:
    gpu.PARTS[part].work(sheet)
    row = read(sheet.file)["cost"]
    assert row["cases"] and not row["failed"] and not row["left_out"]


def test_the_kernel_is_left_out_without_triton(sheet: gpu.Sheet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    gpu.kernel(sheet)
    assert "triton is not installed" in read(sheet.file)["cost"]["left_out"][0]["why"]


def test_a_case_that_fails_is_told_and_the_next_goes_on(sheet: gpu.Sheet) -> None:
    assert sheet.case("bad", 0, lambda: {"x": 1 // 0}) is None
    assert sheet.case("wrong", 0, lambda: {"wrong": "2 is not 3"})
    assert sheet.case("good", 0, lambda: {"seconds": 2.0}) == {"seconds": 2.0}
    row = read(sheet.file)["cost"]
    assert [case["case"] for case in row["cases"]] == ["wrong", "good"]
    assert "ZeroDivisionError" in row["failed"][0]["error"] and "1 // 0" in "".join(row["failed"][0]["traceback"])
    assert row["failed"][1] == {"case": "wrong", "error": "wrong: 2 is not 3"}
    assert "FAILED: bad" in gpu.summary(read(sheet.file)) and "2" in gpu.summary(read(sheet.file))


def test_a_case_for_which_no_time_is_left_is_left_out(sheet: gpu.Sheet) -> None:
    sheet.smoke, sheet.end = False, time.time() + 5
    assert sheet.case("long", 10, lambda: pytest.fail("it was begun")) is None
    assert "takes about 10 s" in read(sheet.file)["cost"]["left_out"][0]["why"]


def test_a_part_that_dies_or_hangs_leaves_the_others_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, started = tmp_path / "gpu.json", []

    def run(command: list[str], timeout: float, **options: Any) -> subprocess.CompletedProcess:
        part = command[command.index("--this") + 1]
        started.append(part)
        if part == "cost":
            raise subprocess.TimeoutExpired(command, timeout)
        if part == "memory":
            gpu.Sheet(file, part, 0.0, True).case("good", 0, lambda: {"seconds": 1.0})
        return subprocess.CompletedProcess(command, 0 if part == "memory" else -11)

    monkeypatch.setattr(gpu.subprocess, "run", run)
    assert not gpu.run_all(["kernel", "cost", "memory"], file, smoke=True)
    assert started == ["kernel", "cost", "memory"]
    found = read(file)
    assert "status -11" in found["kernel"]["failed"][0]["error"] and "was killed" in found["cost"]["failed"][0]["error"]
    assert found["memory"]["cases"] and not found["memory"]["failed"]
    assert gpu.run_all(["memory"], file, smoke=True) and list(read(file)) == ["memory"]


def test_all_parts_end_in_eight_minutes() -> None:
    assert sum(part.seconds for part in gpu.PARTS.values()) + gpu.GRACE < 475 < 480
    assert "timeout --kill-after=5 475" in (gpu.HOME / "benchmarks/gpu.sh").read_text()


# ---- wheels


def test_only_what_is_missing_or_too_old_is_taken_from_the_wheels() -> None:
    there = {"numpy": "2.5.2", "scipy": "1.9", "typing-extensions": "4.16.0", "pydantic-core": "2.0"}
    wheels = {
        "pydantic": [Requirement("pydantic-core==2.50.4"), Requirement("typing_extensions>=4.14")],
        "scipy": [Requirement("numpy>=1.26")],
        "peft": [Requirement("torch>=1.10")],
    }
    asked = [Requirement(line) for line in ("numpy>=1.26", "scipy>=1.11", "pydantic>=2.7", "peft>=0.9")]
    assert gpu_wheels.missing(asked, wheels, there.get) == ["scipy", "pydantic", "peft", "pydantic-core"]


def test_what_belongs_to_torch_is_not_packed() -> None:
    names = [gpu_wheels.plain(requirement.name) for requirement in gpu_wheels.wanted()]
    assert "pydantic" in names and not {"torch", "transformers"} & set(names)
    every = gpu_wheels.with_their_needs([Requirement("peft"), Requirement("pydantic[email]>=2")], "3.12")
    assert {"peft", "pydantic", "pydantic-core", "numpy"} <= every.keys()
    assert not any(name in gpu_wheels.BESIDE or name.startswith("nvidia-") for name in every)


def test_markers_are_those_of_the_other_machine() -> None:
    applies = lambda line: gpu_wheels.applies(Requirement(line), "3.12")
    assert applies("a; python_version >= '3.12'") and not applies("a; python_version < '3.12'")
    assert applies("a; sys_platform == 'linux'") and not applies("a; extra == 'test'")


def test_the_largest_wheels_are_left_out(tmp_path: Path) -> None:
    for name, size in {"a": 10, "b": 30, "c": 50}.items():
        (tmp_path / f"{name}-1-py3-none-any.whl").write_bytes(bytes(size))
    assert gpu_wheels.trimmed(tmp_path, 45) == ["c-1-py3-none-any.whl"]
    assert sorted(wheel.name[0] for wheel in tmp_path.iterdir()) == ["a", "b"]
