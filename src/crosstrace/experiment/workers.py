"""Shares out the stages of all models among several processes."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from crosstrace.core import machine
from crosstrace.core.chains import done_by
from crosstrace.core.errors import UserError
from crosstrace.core.parents import start_worker
from crosstrace.core.progress import Progress
from crosstrace.core.run_folder import Run
from crosstrace.data.text import NO_QUESTIONS
from crosstrace.experiment.config import Experiment
from crosstrace.experiment.examples import asks_something
from crosstrace.experiment.registry import stages as all_stages
from crosstrace.experiment.stages.dropping import drop_traces
from crosstrace.experiment.studied import BASE, StudiedModel


@dataclass(frozen=True)
class Work:
    """A stage of the base or of a taught model, or one part of it.

    Attributes:
        name: the name of the model.
        part: the part of the stage; empty for all of it.
    """

    name: str
    stage: str
    part: str = ""


def do_stages(run: Run, experiment: Experiment, stages: Sequence[str], progress: Progress) -> None:
    """Do some stages for every model that has them, in `jobs` processes.

    The stages of a taught model are done one after the other. Different models, and the parts of a stage, are done at
    once.
    """
    known = all_stages()
    chain = [stage for stage in known if stage in stages]
    if not chain:
        return
    names = [*experiment.taught]
    if any(known[stage].of_base(experiment) for stage in chain):
        names.append(BASE)
    chains = {name: _works(experiment, name, chain) for name in names}
    if experiment.jobs == 1 or run.processes is not None:  # processes side by side do one thing at a time
        for groups in chains.values():
            for work in (work for group in groups for work in group):
                _do(StudiedModel(run, experiment, work.name, progress), work.stage)
                progress.done(f"{work.name}: {work.stage}")
        return
    chains = {name: [_in_parts(experiment, group) for group in groups] for name, groups in chains.items()}
    left = Counter((work.name, work.stage) for groups in chains.values() for group in groups for work in group)
    took: Counter[tuple[str, str]] = Counter()  # seconds of all parts of a stage
    arguments = (run.folder, experiment, progress.quiet)
    workers = min(experiment.jobs, len(chains))  # the plan counts on this number
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
        run.clean()  # remove what the workers were writing
        raise


def _works(experiment: Experiment, name: str, chain: Sequence[str]) -> list[list[Work]]:
    """The stages of a model in groups. Each group needs those before it; the base's stages are independent."""
    groups = []
    known = all_stages()
    for stage in (known[stage] for stage in chain):
        if stage.is_done_for(experiment, name) and (stage.is_wanted(experiment) or len(chain) == 1):
            groups.append([Work(name, stage.name)])
    return [[work for group in groups for work in group]] if name == BASE else groups


def _in_parts(experiment: Experiment, group: Sequence[Work]) -> list[Work]:
    """The works of a group, each split into the parts of its stage, which are independent."""
    known = all_stages()
    return [replace(work, part=part) for work in group for part in known[work.stage].parts(experiment, work.name)]


_studied: StudiedModel | None = None  # in a worker: the model of its last work, if that was a part


def _work(folder: Path, experiment: Experiment, quiet: bool, position: int, work: Work) -> float:
    """Do a work in a worker process; returns the seconds that it took."""
    global _studied
    clock = time.perf_counter()
    with Run.attach(folder) as attached:
        progress = Progress(quiet, position)
        if not work.part or _studied is None or _studied.name != work.name:
            _studied = None  # frees that model before the next is read
            _studied = StudiedModel(attached, experiment, work.name, progress)
        _studied.run, _studied.progress, _studied.part = attached, progress, work.part
        _do(_studied, work.stage)
        if not work.part:
            _studied = None
    return time.perf_counter() - clock


def _do(studied: StudiedModel, name: str) -> None:
    """Do a stage for a model, or the part that `studied.part` names."""
    run, stage = studied.run, all_stages()[name]
    torch.set_num_threads(studied.experiment.threads)
    machine.give_back()  # what the stages before this one needed
    if stage.asks and not asks_something(run, studied.experiment):
        raise UserError(f"{name} has nothing to ask: {NO_QUESTIONS}")
    if stage.is_shared:
        stage.run(studied)
    else:
        run.alone(partial(stage.run, studied))
    if stage.reads_traces:
        run.alone(partial(drop_traces, studied))
