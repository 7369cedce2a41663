"""The disk that a run takes, sampled while it runs, beside what `crosstrace plan` says of it.

    python benchmarks/disk.py [CONFIG] [--SECTION.SETTING VALUE ...] [--seconds 0.01]

CONFIG is examples/tiny.yaml if not given. The run goes to a folder that is removed at the end. Every few milliseconds
the blocks of all its files are added up, each file once however many names it has, by kind: weights, optimiser and
sums of a training that is not over; the taught models; traces; shared sets; the rest, which is texts, tables and the
report and which the plan does not count. The table gives each kind at the fullest moment of the whole, and what is
left.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from crosstrace.core.text_tables import aligned
from crosstrace.experiment import config
from crosstrace.planning.plan import other_machine, plan

KINDS = ("checkpoints while training", "the taught models", "traces", "shared sets", "the rest")


def kind_of(path: Path) -> str:
    names = set(path.parts)
    if names & {"checkpoints", "sums", "retention"}:
        return KINDS[0]
    if names & {"traces", "online"}:
        return KINDS[2]
    if "models" in names:
        return KINDS[1]
    return KINDS[3] if "shared" in names else KINDS[4]


def taken(folder: Path) -> Counter[str]:
    """Bytes by kind."""
    found, seen = Counter(), set()
    for base, _, files in sorted(os.walk(folder)):
        for name in files:
            path = Path(base, name)
            try:
                told = path.stat()
            except OSError:  # gone meanwhile
                continue
            if told.st_ino not in seen:
                seen.add(told.st_ino)
                found[kind_of(path.relative_to(folder))] += told.st_blocks * 512
    return found


def main() -> None:
    words = sys.argv[1:]
    path = words.pop(0) if words and not words[0].startswith("--") else "examples/tiny.yaml"
    changes = {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2])}
    seconds = float(changes.pop("seconds", 0.01))
    experiment = config.override(config.load(Path(path)), changes)
    planned = plan(experiment, machine=other_machine(ram=1000, disk=1000, tflops=1), probe=False)
    with tempfile.TemporaryDirectory() as place:
        file, folder = Path(place) / "config.yaml", Path(place) / "run"
        file.write_text(config.dumps(experiment))
        command = [sys.executable, "-m", "crosstrace", "run", str(file), str(folder), "--quiet"]
        most: Counter[str] = Counter()
        running = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while running.poll() is None:
            now = taken(folder)
            most = max(most, now, key=Counter.total)
            time.sleep(seconds)
        left = taken(folder)
        if running.returncode not in (0, 3):
            raise SystemExit(running.returncode)
    rows = {row["what"]: row for row in planned.disk}
    table = [["MB", "most, planned", "measured", "left, planned", "measured"]]
    sums: Counter[str] = Counter()
    for kind in KINDS:
        row = rows.get(kind, {"bytes": 0, "left": 0})
        values = {"p": row["bytes"], "m": most[kind], "l": row["left"], "f": left[kind]}
        sums.update(values if kind in rows else {})
        table.append([kind, *(f"{value / 1e6:.2f}" for value in values.values())])
    table.append(["all but the rest", *(f"{value / 1e6:.2f}" for value in sums.values())])
    print(
        f"{path} {' '.join(f'{name}={value}' for name, value in changes.items())}, fullest: {planned.disk[0]['moment']}"
    )
    print(aligned(table))
    print(f"planned / measured: {sums['p'] / sums['m']:.3f} at the fullest moment, {sums['l'] / sums['f']:.3f} left")


if __name__ == "__main__":
    main()
