"""Works of several chains on several workers: each once, in their order, and none idle while there is one to do."""

from __future__ import annotations

import os
import time
from itertools import pairwise
from pathlib import Path

import pytest

from crosstrace.core.chains import _next, done_by


def _note(folder: Path, worker: int, work: tuple[str, float]) -> tuple[float, float, int]:
    """Take some time, and say when it was."""
    began = time.monotonic()
    time.sleep(work[1])
    with (folder / work[0]).open("x"):  # once
        return began, time.monotonic(), os.getpid()


def _fail(folder: Path, worker: int, work: tuple[str, float]) -> None:
    if work[0] == "bad":
        raise ValueError("this one is bad")
    time.sleep(60)


def _nothing() -> None:
    pass


def test_groups_come_one_after_the_other_and_their_works_side_by_side(tmp_path: Path) -> None:
    chains = {
        "a": [[("a1", 0.1)], [("a2", 0.1)], [("a3", 0.3), ("a4", 0.3), ("a5", 0.3)]],
        "b": [[("b1", 0.1)], [], [("b2", 0.1)]],
        "nothing": [[], []],
    }
    found = dict(done_by(2, chains, _note, tmp_path, initializer=_nothing))
    works = {work for groups in chains.values() for group in groups for work in group}
    assert found.keys() == works and len({pid for _, _, pid in found.values()}) == 2
    for groups in chains.values():
        times = [[found[work] for work in group] for group in groups if group]
        for earlier, later in pairwise(times):
            assert max(end for _, end, _ in earlier) <= min(begin for begin, _, _ in later)
    of_last = sorted(found[work] for work in chains["a"][-1])
    assert of_last[1][0] < of_last[0][1]  # side by side


def test_the_longest_chain_is_taken_up_first_and_then_the_own() -> None:
    left = {"base": [["x", "y"]], "mixed": [["train"], ["eval"]], "two_stage": [["train"], ["eval"]]}
    assert _next(left, [], None) == "mixed"
    left["mixed"][0].clear()  # it is being done
    assert _next(left, ["mixed"], None) == "two_stage"
    left["two_stage"][0].clear()
    assert _next(left, ["mixed", "two_stage"], None) == "base"
    last = {"base": [["x", "y"]], "mixed": [["p", "q"]], "two_stage": [["p"]]}
    assert _next(last, ["two_stage"], "mixed") == "mixed"
    assert _next(last, ["mixed", "mixed"], "two_stage") == "two_stage"
    assert _next({"base": [["x"]], "mixed": [["p"]]}, ["mixed"], None) == "base"
    assert _next({"base": [[]], "mixed": []}, ["base"], "base") is None


def test_what_fails_ends_all(tmp_path: Path) -> None:
    clock = time.monotonic()
    with pytest.raises(ValueError, match="this one is bad"):
        list(done_by(2, {"a": [[("long", 0.0)]], "b": [[("bad", 0.0)]]}, _fail, tmp_path, initializer=_nothing))
    assert time.monotonic() - clock < 50
