"""A part that fails in one of several processes hangs none of them; a signal ends them all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_interrupts import group
from test_pipeline import experiment

from crosstrace.core.files import read_json
from crosstrace.experiment import config

pytestmark = pytest.mark.long

WORKER = Path(__file__).with_name("left_out_worker.py")
SMALLER = config.override(
    experiment,
    {
        "strategies": "{mixed: [{name: mixed, batch: {bio: 8, qa: 8}, steps: 2}]}", "mechanism.run": "false",
        "facts.people": "16", "interventions.seeds": "1", "trace.check": "false", "train.recall_every": "0",
    },
)  # fmt: skip


def launch(*arguments: object) -> subprocess.Popen[str]:
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.Popen(
        [sys.executable, *map(str, words)], env=environment, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.fixture
def small(tmp_path: Path) -> Path:
    (tmp_path / "small.yaml").write_text(config.dumps(SMALLER))
    return tmp_path / "small.yaml"


def test_what_fails_in_one_of_several_processes_is_left_out_by_all(small: Path) -> None:
    _, told = launch(WORKER, small, small.parent, "shared", "first").communicate(timeout=300)
    assert told.count("exitcode  : 3") >= 1 and "crosstrace: process" not in told, told[-3000:]
    for where in ("shared", "first"):
        assert (small.parent / where / "interventions" / "mixed.json").exists()


def test_what_fails_in_one_process_while_another_waits_for_it_ends_the_run(small: Path) -> None:
    launched = launch(WORKER, small, small.parent, "alone")
    _, told = launched.communicate(timeout=300)
    assert launched.returncode != 0
    assert "mixed: intervene failed in this process and not in all" in told and "ValueError: a fault" in told
    assert not (small.parent / "alone" / "interventions" / "mixed.json").exists()


def test_a_signal_to_the_launcher_ends_all_processes(small: Path) -> None:
    folder = small.with_name("run")
    process = launch("-m", "crosstrace", "run", small, folder, "--quiet")
    until = time.monotonic() + 120
    while not (folder / "models").exists() and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    lines = [line for line in told.splitlines() if line.startswith("crosstrace: ")]
    assert sorted(lines) == [f"crosstrace: process {rank} of 2: terminated; go on with --resume" for rank in (0, 1)]
    assert "Traceback" not in told.partition("SignalException")[0].replace("Traceback (most recent call last):", "", 1)
    assert not group(process.pid)
    done = launch("-m", "crosstrace", "run", small, folder, "--quiet", "--resume")
    out, told = done.communicate(timeout=300)
    assert done.returncode == 0 and "report   " in out, told[-3000:]
    assert read_json(folder / "results.json")["left_out"] == []
