"""A signal ends the command line with one line and a status, at any moment, and nothing half-written stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_pipeline import experiment

from crosstrace.core import interrupts
from crosstrace.experiment import config

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks into /proc")
TWO = config.override(experiment, {"jobs": "2", "mechanism.run": "false"})


def listens(process: subprocess.Popen[str]) -> bool:
    """Whether a process catches SIGTERM already."""
    (line,) = [x for x in Path(f"/proc/{process.pid}/status").read_text().splitlines() if x.startswith("SigCgt")]
    return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def group(leader: int) -> list[str]:
    """The processes of a group that are not gone."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().partition(") ")
        except OSError:
            continue
        state, _, own = rest.split()[:3]
        if int(own) == leader and state != "Z":
            found.append(name)
    return found


def hear() -> None:
    """In a new process: no signal is ignored, as SIGINT is in what a shell started in the background."""
    for number in interrupts.WORDS:
        signal.signal(number, signal.SIG_DFL)


def end(arguments: list[str], number: signal.Signals, delay: float, whole_group: bool) -> subprocess.Popen[str]:
    """Start the command line, send it a signal when it has listened for `delay` seconds, and check how it ends."""
    process = subprocess.Popen(
        [sys.executable, "-m", "crosstrace", *arguments],
        start_new_session=True, preexec_fn=hear, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        while not listens(process):
            time.sleep(0.001)
        time.sleep(delay)
        (os.killpg if whole_group else os.kill)(process.pid, number)
        _, told = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 128 + number, told
    lines = told.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"crosstrace: {interrupts.WORDS[number]}; "), told
    until = time.monotonic() + 30  # a worker that was importing its modules notices afterwards
    while left := group(process.pid):
        assert time.monotonic() < until, f"left behind: {left}"
        time.sleep(0.1)
    return process


def ended(program: str, command: list[str], number: signal.Signals = signal.SIGTERM) -> tuple[int, str, str]:
    """Send a program the signal when it has printed "begun"; its exit status, what else it printed, and its stderr."""
    process = subprocess.Popen(
        [sys.executable, "-c", program, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    process.send_signal(number)
    out, told = process.communicate(timeout=30)
    return process.returncode, out, told


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("delay", [0.0, 0.03, 0.1, 0.4])
def test_a_signal_while_the_command_line_is_imported(tmp_path: Path, number: signal.Signals, delay: float) -> None:
    end(["demo", str(tmp_path / "run"), "--quiet"], number, delay, whole_group=delay > 0.05)


@pytest.mark.parametrize(
    ("number", "whole_group"), [(signal.SIGINT, True), (signal.SIGTERM, False), (signal.SIGTERM, True)]
)
def test_a_signal_while_workers_work_leaves_nobody_and_a_run_to_go_on_with(
    tmp_path: Path, number: signal.Signals, whole_group: bool
) -> None:
    (tmp_path / "two.yaml").write_text(config.dumps(TWO))
    command = ["run", str(tmp_path / "two.yaml"), str(tmp_path / "run"), "--quiet", "--resume"]
    for delay in (2.5, 5.0):
        end(command, number, delay, whole_group)
    assert not list((tmp_path / "run").glob("[!m]*/.partial-*")), "only a training keeps what it had begun"


def test_a_signal_while_a_file_is_written_takes_the_half_of_it_away(tmp_path: Path) -> None:
    program = (
        "import pathlib, sys, time\n"
        "from crosstrace import __main__\nfrom crosstrace.cli import commands\nfrom crosstrace.core import files\n"
        "def write(file: pathlib.Path, /):\n"
        "    with files.replacing(file) as partial:\n"
        "        partial.write_text('half')\n"
        "        print('begun', flush=True)\n"
        "        time.sleep(60)\n"
        "commands.COMMANDS['export'] = write\n"
        "__main__.main()\n"
    )
    code, _, told = ended(program, ["export", str(tmp_path / "file")])
    assert code == 143 and told == "crosstrace: terminated; give the same command again to go on\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "begin",
    [
        "class Slow:\n    def __del__(self): wait()\nheld = [Slow()]",
        "class Slow: pass\nheld = [Slow()]\nreference = weakref.ref(held[0], lambda _: wait())",
    ],
    ids=["destructor", "weak reference"],
)
def test_a_signal_whose_exception_python_drops_is_heard(begin: str) -> None:
    program = (
        "import time, weakref\n"
        "from crosstrace import __main__\nfrom crosstrace.cli import commands\n"
        "def wait():\n"
        "    print('begun', flush=True)\n"
        "    time.sleep(30)\n"
        f"{begin}\n"
        "def work():\n"
        "    try:\n"
        "        held.clear()\n"
        "        time.sleep(30)\n"
        "    finally:\n"
        "        print('cleaned up', flush=True)\n"
        "commands.COMMANDS['demo'] = work\n"
        "__main__.main()\n"
    )
    code, out, told = ended(program, ["demo"])
    assert code == 143 and told == "crosstrace: terminated; go on with --resume\n"
    assert out == "cleaned up\n"


@pytest.mark.parametrize(
    "work",
    [
        "ctypes.CDLL(None).sleep(60)",  # a library that runs no Python code meanwhile
        "threading.Lock().acquire(); [time.sleep(0.01) for _ in iter(int, 1)]",
        "lost()",
    ],
)
def test_a_process_that_does_not_hear_is_ended(tmp_path: Path, work: str) -> None:
    program = (
        "import contextlib, ctypes, threading, time\n"
        "from crosstrace import __main__\nfrom crosstrace.cli import commands\nfrom crosstrace.core import interrupts\n"
        "interrupts.PATIENCE = 0.5\n"
        "def lost():\n"  # as in a destructor, where exceptions are dropped
        "    while True:\n"
        "        with contextlib.suppress(BaseException):\n"
        "            time.sleep(60)\n"
        "def work():\n"
        "    print('begun', flush=True)\n"
        f"    {work}\n"
        "commands.COMMANDS['demo'] = work\n"
        "__main__.main()\n"
    )
    code, _, told = ended(program, ["demo"])
    assert code == 143 and told == "crosstrace: terminated; go on with --resume\n"


def test_a_signal_that_is_to_be_ignored_is(tmp_path: Path) -> None:
    program = (
        "import signal, time\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"  # as nohup does
        "from crosstrace import __main__\nfrom crosstrace.cli import commands\n"
        "commands.COMMANDS['demo'] = lambda: (print('begun', flush=True), time.sleep(1))\n"
        "__main__.main()\n"
    )
    assert ended(program, ["demo"], signal.SIGHUP)[0] == 0
