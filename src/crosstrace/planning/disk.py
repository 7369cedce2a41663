"""What a run's folder holds, moment by moment: the fullest one, and what is left, by kind.

It follows the order of the stages (`experiment/stages`): a stage that writes or removes something else must be changed
here too. A kind is counted in bytes of weights, sums and masks; texts, tables and the report are
not counted. It reads no files and knows nothing of memory.
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
    """The sizes of one strategy, in bytes; one that was given is not trained and has no checkpoints.

    Attributes:
        phases: for each phase its name, and how many checkpoints it saves.
        further: checkpoints that each further training of the stage `retain` saves.
        model: of a taught model, as it is saved.
        optimiser: of the optimiser's state.
        trace: of the traces of one task at one time and reduction, of one part.
        tasks: tasks that are traced.
        online: traces of a task during training, by all definitions, reductions and parts; 0 without it.
        times: traces of a task after it: measures times parts, at each checkpoint that is traced.
        parts: parts of each of those.
        sets: of all sets that are saved.
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
        """What happens, and what is there meanwhile; the last one is what is left."""
        e, trained = experiment, bool(self.phases)
        keep = e.train.keep_checkpoints
        start = self.model * (trained and e.train.lora is not None)
        learnt = self._training(self.phases, keep, self.tasks * self.online)
        for what, size, _ in learnt:
            yield what, _sizes(checkpoints=size, models=start)
        weights = learnt[-1][2] if learnt else 0.0
        online = self.online * self.trace if trained else 0.0  # of a task
        for task in range(self.tasks if online else 0):
            sums = (self.tasks - task) * online
            yield "the traces of training", _sizes(weights + sums, start, (task + 1) * online)
        models, traces = start + weights, self.tasks * (online + self.times * self.trace)
        yield "trace", _sizes(models=models, traces=traces)
        yield "analyze", _sizes(models=models, traces=traces, sets=self.sets)
        if e.trace.keep == "means":
            of_each_time = (self.tasks * online, self.tasks * self.times * self.trace)
            for parts in of_each_time:
                means = parts / self.parts
                yield "the means of the traces", _sizes(models=models, traces=traces + means, sets=self.sets)
                traces += means - parts
        if e.trace.keep == "none":
            traces = 0.0
        arms = 0.0
        for arm in ARMS if e.retention.run and trained else ():
            learnt = self._training([(arm, self.further)], keep, 0)
            for _, size, _ in learnt:
                yield f"retain, {arm}", _sizes(arms + size, models, traces, self.sets)
            arms += learnt[-1][2]
        yield "the end", _sizes(models=models, traces=traces, sets=self.sets)

    def _training(self, phases: Sequence[tuple[str, int]], keep: bool, sums: int) -> list[tuple[str, float, float]]:
        """For each checkpoint what is there while it is written, and the weights in those that are there after it.

        A new one lies beside the one before it, of which the optimiser is needed until the new one is complete. The
        sums of a trace are there once, and one of them twice while it is replaced.
        """
        found: list[tuple[str, float, float]] = []
        stay = before = 0.0  # what lasts to the end of training; the checkpoint that a resume would take
        for name, saves in phases:
            for number in range(saves):
                new = self.model + (self.optimiser if number < saves - 1 else 0)
                traces = (sums + (sums > 0 and before > 0)) * self.trace
                present = stay + before + new + traces
                if before and (keep or not number):
                    stay += self.model
                before = new
                found.append((f"a checkpoint of {name}", present, stay + self.model))
        return found


def _sizes(checkpoints: float = 0.0, models: float = 0.0, traces: float = 0.0, sets: float = 0.0) -> Sizes:
    return Counter({kind: round(size) for kind, size in zip(KINDS, (checkpoints, models, traces, sets))})


def rows(experiment: Experiment, strategies: Mapping[str, Strategy]) -> list[Row]:
    """Each kind of file: {what, bytes: at the run's fullest moment, left: when it is over, moment: which that is}.

    As many strategies as `jobs` says are gone through at once; which of their moments meet is not known, so the fullest
    ones are taken to.
    """
    done: Sizes = Counter()
    most, moment = Counter(), "nothing"
    spare: list[tuple[str, Sizes]] = []  # what each begun strategy has at its fullest beyond what it leaves
    for name, own in strategies.items():
        told = list(own.moments(experiment))
        what, fullest = max(told, key=lambda moment: moment[1].total())
        left = told[-1][1]
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
