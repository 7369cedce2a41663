"""What the command line sets before torch is loaded."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from crosstrace.core import machine


def prepared(given: dict[str, str]) -> tuple[str, list[int]]:
    """GOMP_SPINCOUNT, and the parameters that malloc was told, in a process with some environment."""
    code = (
        "import ctypes, os\nfrom crosstrace.core import machine\ntold = []\n"
        "class Library:\n    def mallopt(self, parameter, value): told.append(parameter); return 1\n"
        "machine.ctypes.CDLL = lambda name: Library()\nmachine.prepare()\nimport gc\n"
        "assert gc.get_threshold()[0] == machine.YOUNG and gc.isenabled()\n"
        "import sys\nprint(os.environ.get('GOMP_SPINCOUNT', ''), *told, 'torch' in sys.modules)"
    )
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_WAIT", "GOMP_", "MALLOC_"))}
    done = subprocess.run([sys.executable, "-c", code], env=kept | given, capture_output=True, text=True, check=True)
    *told, has_torch = done.stdout.split(" ")
    assert has_torch.strip() == "False"
    return told[0], [int(parameter) for parameter in told[1:]]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_freed_memory_is_kept_and_threads_sleep_unless_the_user_says_otherwise():
    spins, told = prepared({})
    assert 0 < int(spins) < 10_000 and sorted(told) == [-3, -2, -1]
    assert prepared({"GOMP_SPINCOUNT": "7"}) == ("7", told)
    assert prepared({"OMP_WAIT_POLICY": "active"}) == ("", told)
    assert prepared({"MALLOC_TRIM_THRESHOLD_": "131072"}) == (spins, [])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="malloc_trim is glibc's")
def test_freed_memory_is_given_back():
    """With the settings of the command line, a freed gap below a kept tensor stays the process's until it is asked."""
    code = (
        "from crosstrace.core import machine\nmachine.prepare()\nimport torch\n"
        "gap = [torch.ones(10_000_000) for _ in range(5)]\nkept = torch.ones(1_000_000)\nbefore = machine.held()\n"
        "gap.clear()\n"
        "freed = machine.held()\nmachine.give_back()\nprint(before, freed, machine.held())"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=True)
    before, freed, after = map(int, done.stdout.split())
    assert freed > before - 20_000_000 and after < before - 180_000_000


def test_training_gives_memory_back_once_it_holds_far_more_than_an_update_needs(monkeypatch):
    sizes, given = iter([100, 110, 114, 116, 90, 108, 130, 125, 140, 145]), []
    monkeypatch.setattr(machine, "held", lambda: next(sizes))
    monkeypatch.setattr(machine, "give_back", lambda: given.append(len(given)))
    memory, times = machine.KeptMemory(), []
    for update in range(10):
        memory.after_update()
        times += [update] * (len(given) - 1 - len(times))
    # 116 is too much beside 100, and so is 130; the update after that needs 125 by itself, beside which 140 is not
    assert times == [3, 6, 9] and memory.needed == 125


def test_a_killed_process_leaves_no_warning_of_semaphores():
    code = "import os\n{}from multiprocessing import get_context\nlock = get_context('spawn').Lock()\nos._exit(0)"
    prepare = "from crosstrace.core import machine\nmachine.prepare()\n"
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}

    def told(first: str) -> str:
        command = [sys.executable, "-c", code.format(first)]
        return subprocess.run(command, env=kept, capture_output=True, text=True, check=True).stderr

    assert "leaked semaphore" in told("") and told(prepare) == ""
