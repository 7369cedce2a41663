"""What a run's folder holds at its fullest moment and at its end: the files that its stages state, added up.

It knows no stage and reads no files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from crosstrace.experiment.config import Experiment
from crosstrace.experiment.needs.files import KINDS, Files

Row = dict[str, Any]


def rows(experiment: Experiment, models: Sequence[Files]) -> list[Row]:
    """A row for each kind of file: {what, bytes, left, moment}.

    bytes are those at the run's fullest moment, left those at its end, and moment says which moment is the fullest. As
    many models as `jobs` says are worked on at once. It is not known which of their moments coincide, so the
    fullest ones are assumed to.
    """
    done: Counter[str] = Counter()
    most, moment = Counter[str](), "nothing"
    spare: list[tuple[str, Counter[str]]] = []  # what each model so far has at its fullest beyond what it leaves
    for files in models:
        what, fullest = max(files.moments, key=lambda moment: moment[1].total())
        name, left = files.name, files.moments[-1][1]
        beside = sorted(spare, key=lambda other: -other[1].total())[: experiment.jobs - 1]
        now = Counter(done)
        for other in (fullest, *(beyond for _, beyond in beside)):
            now.update(other)
        if now.total() > most.total():
            most, moment = now, " and ".join([*(label for label, _ in beside), f"{name}: {what}"])
        beyond = Counter(fullest)
        beyond.subtract(left)
        spare.append((f"{name}: {what}", beyond))
        done.update(left)
    return [{"what": kind, "bytes": most[kind], "left": done[kind], "moment": moment} for kind in KINDS]
