"""Who does which stage of which model: several processes, each with a chain of works."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from crosstrace.core import interrupts, machine
from crosstrace.core.chains import done_by
from crosstrace.core.errors import UserError
from crosstrace.core.parents import end_with_parent
from crosstrace.core.progress import Progress
from crosstrace.core.run_folder import Run
from crosstrace.data.text import NO_QUESTIONS
from crosstrace.experiment.config import Experiment
from crosstrace.experiment.names import STAGES
from crosstrace.experiment.stages.analyze import analyze
from crosstrace.experiment.stages.doctor import examine
from crosstrace.experiment.stages.dropping import drop_traces
from crosstrace.experiment.stages.intervene import intervene
from crosstrace.experiment.stages.mechanism import Asked, explain, parts_of
from crosstrace.experiment.stages.recall import test
from crosstrace.experiment.stages.retain import retain
from crosstrace.experiment.stages.trace import take_traces
from crosstrace.experiment.stages.train import teach


@dataclass(frozen=True)
class Work:
    """A stage of the base or of a taught model, or one part of it.

    Attributes:
        name: the model's.
        part: of the mechanism; empty for a whole stage.
    """

    name: str
    stage: str
    part: str = ""


def do_stages(run: Run, experiment: Experiment, stages: Sequence[str], progress: Progress) -> None:
    """The base's evaluation and every strategy's own chain of stages, shared out among `jobs` processes."""
    chain = [stage for stage in STAGES[1:-1] if stage in stages]
    names = [*experiment.taught, *(["base"] if {"eval", "trace", "mechanism"} & {*chain} else [])]
    if not chain:
        return
    chains = {name: _works(experiment, name, chain) for name in names}
    if experiment.jobs == 1 or run.processes is not None:  # who work side by side do one thing at a time
        for groups in chains.values():
            for work in (work for group in groups for work in group):
                _do(run, experiment, work, progress)
                progress.done(f"{work.name}: {work.stage}")
        return
    chains = {name: [_in_parts(experiment, group) for group in groups] for name, groups in chains.items()}
    left = Counter((work.name, work.stage) for groups in chains.values() for group in groups for work in group)
    took: Counter[tuple[str, str]] = Counter()  # seconds of a stage's parts together
    arguments = (run.folder, experiment, progress.quiet)
    workers = min(experiment.jobs, len(chains))  # the plan counts as many
    works = done_by(workers, chains, _work, *arguments, initializer=start_worker, initargs=(os.getpid(),))
    try:
        with closing(works):
            for work, seconds in works:
                stage = work.name, work.stage
                took[stage] += seconds
                left[stage] -= 1
                if not left[stage]:
                    progress.done(f"{work.name}: {work.stage}", took[stage])
    except BaseException:
        run.clean()  # what they were writing
        raise


def start_worker(leader: int) -> None:
    """Make this process a worker of the process `leader`, with which it ends."""
    end_with_parent(leader)
    machine.prepare()
    interrupts.leave_to_leader()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _works(experiment: Experiment, name: str, chain: Sequence[str]) -> list[list[Work]]:
    """The stages of a model in groups, of which one needs the other; nothing of the base's needs anything."""
    groups = []
    wanted = {
        "intervene": experiment.interventions.run,
        "mechanism": experiment.mechanism.run,
        "retain": experiment.retention.run,
    }
    for stage in chain:
        of_base = stage in ("eval", "mechanism") or (stage == "trace" and experiment.trace.check)
        has_stage = of_base if name == "base" else name in experiment.strategies or stage not in ("train", "retain")
        if has_stage and (wanted.get(stage, True) or len(chain) == 1):  # by its name it is asked for
            groups.append([Work(name, stage)])
    return [[work for group in groups for work in group]] if name == "base" else groups


def _in_parts(experiment: Experiment, group: Sequence[Work]) -> list[Work]:
    """The works of a group, the mechanism in its parts, which need nothing of each other."""
    return [
        replace(work, part=part)
        for work in group
        for part in (parts_of(experiment, work.name) if work.stage == "mechanism" else [""])
    ]


_asked: Asked | None = None  # in a worker: the model that a part of the mechanism was asked of last


def _work(folder: Path, experiment: Experiment, quiet: bool, position: int, work: Work) -> float:
    """Do a work in a worker process; the seconds that it took."""
    global _asked
    clock = time.perf_counter()
    with Run.attach(folder) as attached:
        if not work.part or (_asked is not None and _asked.name != work.name):
            _asked = None
        progress = Progress(quiet, position)
        if work.part:
            _asked = _asked or Asked(attached, experiment, work.name, progress)
            _asked.run, _asked.progress = attached, progress
        _do(attached, experiment, work, progress, _asked)
    return time.perf_counter() - clock


def _do(run: Run, experiment: Experiment, work: Work, progress: Progress, asked: Asked | None = None) -> None:
    stages: dict[str, Callable[[Run, Experiment, str, Progress], object]] = {
        "train": teach, "eval": test, "trace": examine if work.name == "base" else take_traces, "analyze": analyze,
        "intervene": intervene, "mechanism": partial(explain, part=work.part, asked=asked), "retain": retain,
    }  # fmt: skip
    torch.set_num_threads(experiment.threads)
    if work.stage in ("intervene", "mechanism", "retain") and not run.path("data/qa.jsonl").read_bytes():
        raise UserError(f"{work.stage} has nothing to ask: {NO_QUESTIONS}")
    doing = partial(stages[work.stage], run, experiment, work.name, progress)
    doing() if stages[work.stage] in TOGETHER else run.alone(doing)
    if work.stage in ("analyze", "intervene"):
        run.alone(partial(drop_traces, run, experiment, work.name))


TOGETHER = (teach, test, take_traces, intervene, retain)  # what several processes share; the rest is one's alone
