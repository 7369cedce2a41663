"""What is told of long work where there is no terminal."""

from __future__ import annotations

import pytest

from crosstrace.core import progress
from crosstrace.core.progress import Progress, duration


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_a_minute_says_what_is_left(clock, capsys):
    with Progress().bar("mixed: train", 300) as bar:
        for done in range(1, 301):
            clock[0] += 1
            bar(done, 300)
    assert capsys.readouterr().err.splitlines() == [
        "  mixed: train             20 % in 1 min, about 4 min left",
        "  mixed: train             40 % in 2 min, about 3 min left",
        "  mixed: train             60 % in 3 min, about 2 min left",
        "  mixed: train             80 % in 4 min, about 1 min left",
        "  mixed: train             100 % in 5 min, about 0 s left",
    ]


def test_work_that_counts_nothing_says_what_it_does(clock, capsys):
    with Progress().bar("doctor") as bar:
        clock[0] = 59
        bar.label("the first check")
        clock[0] = 61
        bar.label("the second check")
    assert capsys.readouterr().err == "  doctor                   1 min so far, the second check\n"


def test_a_resumed_stage_tells_its_own_pace(clock, capsys):
    with Progress().bar("train") as bar:
        for done in range(901, 904):
            clock[0] += 30
            bar(done, 1000)
    assert capsys.readouterr().err == "  train                    90 % in 1 min, about 49 min left\n"


@pytest.mark.parametrize("quiet", [True, False])
def test_no_line_of_short_or_quiet_work(clock, capsys, quiet):
    with Progress(quiet).bar("trace", 10) as bar:
        for _ in range(10):
            clock[0] += 50 if quiet else 5
            bar.add(1)
    assert capsys.readouterr().err == ""


def test_durations_as_said():
    said = {0.4: "0 s", 59: "59 s", 60: "1 min", 3599: "1 h 0 min", 7500: "2 h 5 min"}
    assert {seconds: duration(seconds) for seconds in said} == said
