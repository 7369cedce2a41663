"""What a run's folder holds, moment by moment: its fullest moment and its end, by kind of file.

It follows the order of the stages (`experiment/stages`): if a stage writes or removes something else, this must change
too. Only weights, sums and masks are counted, in bytes; texts, tables and the report are not. It reads no files and
knows nothing of memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crosstrace.experiment.config import Experiment
from crosstrace.experiment.stages.retain import ARMS

Row = dict[str, Any]
Sizes = Counter[str]  # kind -> bytes
CHECKPOINTS, MODELS, TRACES, SETS = "checkpoints while training", "the taught models", "traces", "shared sets"
KINDS = (CHECKPOINTS, MODELS, TRACES, SETS)


@dataclass(frozen=True)
class Strategy:
    """The sizes of one strategy, in bytes. A model that was given is not trained and has no checkpoints.

    Attributes:
        phases: for each phase its name, and how many checkpoints it saves.
        further: checkpoints that each further training of the stage `retain` saves.
        model: size of a taught model, as it is saved.
        optimiser: size of the optimiser's state.
        trace: size of one part of one task's trace, at one time and by one definition and reduction.
        tasks: number of tasks that are traced.
        online: number of traces of a task during training: definitions times reductions times parts; 0 if there are
            none.
        times: number of traces of a task after it: measures times parts, at each checkpoint that is traced.
        parts: parts of each of those.
        sets: size of all sets that are saved.
    """

    phases: Sequence[tuple[str, int]]
    further: int
    model: float
    optimiser: float
    trace: float
    tasks: int
    online: int
    times: int
    parts: int
    sets: float

    def moments(self, experiment: Experiment) -> Iterator[tuple[str, Sizes]]:
        """What happens, and the files that are there meanwhile. The last moment is what is left."""
        e, is_trained = experiment, bool(self.phases)
        keep = e.train.keep_checkpoints
        start = self.model * (is_trained and e.train.lora is not None)
        saves = self._training(self.phases, keep, self.tasks * self.online)
        for what, size, _ in saves:
            yield what, _sizes(checkpoints=size, models=start)
        weights = saves[-1][2] if saves else 0.0
        online = self.online * self.trace if is_trained else 0.0  # of a task
        for task in range(self.tasks if online else 0):
            sums = (self.tasks - task) * online
            yield "the traces of training", _sizes(weights + sums, start, (task + 1) * online)
        models, traces = start + weights, self.tasks * (online + self.times * self.trace)
        yield "trace", _sizes(models=models, traces=traces)
        yield "analyze", _sizes(models=models, traces=traces, sets=self.sets)
        if e.trace.keep == "means":
            for parts in (self.tasks * online, self.tasks * self.times * self.trace):
                means = parts / self.parts
                yield "the means of the traces", _sizes(models=models, traces=traces + means, sets=self.sets)
                traces += means - parts
        if e.trace.keep == "none":
            traces = 0.0
        arms = 0.0
        for arm in ARMS if e.retention.run and is_trained else ():
            saves = self._training([(arm, self.further)], keep, 0)
            for _, size, _ in saves:
                yield f"retain, {arm}", _sizes(arms + size, models, traces, self.sets)
            arms += saves[-1][2]
        yield "the end", _sizes(models=models, traces=traces, sets=self.sets)

    def _training(self, phases: Sequence[tuple[str, int]], keep: bool, sums: int) -> list[tuple[str, float, float]]:
        """A row for each checkpoint: what it is, all that is there while it is written, and the weights there after it.

        A new checkpoint is written beside the one before it, which has the optimiser until the new one is complete. The
        sums of a trace are there once, and one of them twice while it is replaced.
        """
        rows: list[tuple[str, float, float]] = []
        lasting = before = 0.0  # what lasts to the end of training; the checkpoint from which a resume would go on
        for name, checkpoints in phases:
            for number in range(checkpoints):
                new = self.model + (self.optimiser if number < checkpoints - 1 else 0)
                traces = (sums + (sums > 0 and before > 0)) * self.trace
                present = lasting + before + new + traces
                if before and (keep or not number):
                    lasting += self.model
                before = new
                rows.append((f"a checkpoint of {name}", present, lasting + self.model))
        return rows


def _sizes(checkpoints: float = 0.0, models: float = 0.0, traces: float = 0.0, sets: float = 0.0) -> Sizes:
    return Counter({kind: round(size) for kind, size in zip(KINDS, (checkpoints, models, traces, sets))})


def rows(experiment: Experiment, strategies: Mapping[str, Strategy]) -> list[Row]:
    """A row for each kind of file: {what, bytes, left, moment}.

    bytes are those at the run's fullest moment, left those at its end, and moment says which moment is the fullest. As
    many strategies as `jobs` says are worked on at once. It is not known which of their moments coincide, so the
    fullest ones are assumed to.
    """
    done: Sizes = Counter()
    most, moment = Counter(), "nothing"
    spare: list[tuple[str, Sizes]] = []  # what each strategy so far has at its fullest beyond what it leaves
    for name, strategy in strategies.items():
        moments = list(strategy.moments(experiment))
        what, fullest = max(moments, key=lambda moment: moment[1].total())
        left = moments[-1][1]
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
