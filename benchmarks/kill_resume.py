"""Kill a run with SIGKILL at random moments, resume it each time, and compare it with an uninterrupted one.

    python benchmarks/kill_resume.py --kills 10

Compares every number of both results.json, but for seconds. Prints the moments of the kills and `identical` or the
first difference; the exit code tells too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path


def start(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "crosstrace", *arguments], start_new_session=True)


def numbers(value: object, at: str = "") -> Iterator[tuple[str, object]]:
    """Every leaf by its path, without what may differ: times and the git revision."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key not in ("seconds", "git"):
                yield from numbers(item, f"{at}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from numbers(item, f"{at}[{index}]")
    else:
        yield at, value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs/kill"))
    parser.add_argument("--whole", type=Path, help="an uninterrupted run of the same settings, if there is one")
    parser.add_argument("settings", nargs="*", help="further arguments of `crosstrace demo`, after --")
    options = parser.parse_args()
    whole = options.whole or options.runs / "whole"
    seconds = None
    if options.whole is None:
        began = time.monotonic()
        assert start(["demo", str(whole), "--overwrite", "--quiet", *options.settings]).wait() == 0
        seconds = time.monotonic() - began
    results = json.loads((whole / "results.json").read_text())
    seconds = seconds or max(results["seconds"].values()) * 1.5
    draw = random.Random(options.seed)
    killed, mode = options.runs / "killed", "--overwrite"
    for number in range(options.kills):
        process = start(["demo", str(killed), mode, "--quiet", *options.settings])
        after = draw.uniform(0.02, 2 / options.kills) * seconds
        try:
            code = process.wait(after)
            print(f"kill {number + 1}: came too late, the run had ended with code {code}", flush=True)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            print(f"kill {number + 1}: after {after:.1f} s", flush=True)
        mode = "--resume"
    code = start(["demo", str(killed), mode, "--quiet", *options.settings]).wait()
    if code != 0:
        print(f"the resumed run ended with code {code}")
        return 1
    after = dict(numbers(json.loads((killed / "results.json").read_text())))
    before = dict(numbers(results))
    differing = [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)]
    if differing:
        first = min(differing)
        print(f"{len(differing)} of {len(before)} values differ; {first} is {before.get(first)} and {after.get(first)}")
        return 1
    print(f"identical: {len(before)} values of results.json after {options.kills} kills")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
