"""The stage `trace`: traces at the final checkpoint, and at kept ones."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from crosstrace.core.errors import UserError
from crosstrace.core.files import linked
from crosstrace.core.pieces import is_sharded
from crosstrace.data.tokens import Batch, Encoded, batches
from crosstrace.experiment.config import Experiment
from crosstrace.experiment.examples import examples, sample, training_examples
from crosstrace.experiment.needs.files import TRACES, Files
from crosstrace.experiment.needs.material import work_of
from crosstrace.experiment.needs.sizes import Need, Operations, Sizes
from crosstrace.experiment.stage import Stage
from crosstrace.experiment.stages.doctor import examine, needs_of_doctor
from crosstrace.experiment.stages.dropping import take_again
from crosstrace.experiment.studied import BASE, LEARNING, StudiedModel
from crosstrace.trace import Trace, load_traces, save_traces, trace


def take_traces(studied: StudiedModel) -> None:
    """Take the traces at the final checkpoint, and at kept ones: traces/<strategy>/<when>/<task>.safetensors."""
    run, experiment, name = studied.run, studied.experiment, studied.name
    options = experiment.trace
    taken = {name: value for name, value in asdict(options).items() if name != "keep"}
    key = run.alone(lambda: {"trace": taken, "model": studied.key(), **run.inputs("data")})
    run.alone(partial(take_again, studied, key))

    def make(folder: Path) -> None:
        if options.online and studied.is_trained and (why := run.dropped(f"models/{name}")):
            raise UserError(f"trace needs the trace during the training of {name}, which is gone: {why}")
        by_task = training_examples(examples(run, experiment, studied.tokenizer), experiment.roles)
        home, phases = run.path(f"models/{name}"), studied.phases
        checkpoints = {"final": studied.folder}
        origin = run.alone(studied.origin) | {"targets": options.targets}
        if options.checkpoints:
            for index, phase in enumerate(phases):
                for checkpoint in sorted(home.glob(f"{phase.name}/checkpoint-*")):
                    checkpoints[f"checkpoints/{index}-{phase.name}-{checkpoint.name}"] = checkpoint
                if phase is not phases[-1]:
                    checkpoints[f"checkpoints/{index}-{phase.name}-end"] = home / phase.name
        for when, checkpoint in checkpoints.items():
            model = studied.view.load_checkpoint(checkpoint)
            group = None if run.processes is None or is_sharded(model) else run.processes.group
            names = studied.view.adapter_scope(model)
            source = {"checkpoint": checkpoint.relative_to(home).as_posix() if phases else str(checkpoint)}
            for task, items in by_task.items():
                items = sample(items, options.examples) if options.examples else items
                with studied.bar(f"trace {task}", len(items)) as update:
                    traces = trace(
                        model, _trace_batches(items, studied), task=task,
                        measures=options.measures, parts=options.parts, names=names, progress=update.add, group=group,
                        tell=lambda needed, task=task: studied.progress.note(f"{name}, {task}: {needed}"),
                    )  # fmt: skip
                served = traces[0].meta["coverage"].items()
                shares = ", ".join(f"{rule} {100 * share:.3g} %" for rule, share in served)
                studied.progress.note(f"{name}, {task}: {shares}")
                for item in traces:
                    item.meta |= origin | source
                if run.leads or is_sharded(model):
                    save_traces(folder / when / f"{task}.safetensors", traces)
        if run.leads and options.checkpoints and phases:
            _mean_over_checkpoints(folder, checkpoints, by_task)
        for when in LEARNING.values() if run.leads and options.online and phases else ():
            if (home / when).is_dir():
                shutil.copytree(home / when, folder / when, copy_function=linked)

    run.stage(f"traces/{name}", key, make)


def _trace_batches(items: list[Encoded], studied: StudiedModel) -> Iterator[Batch]:
    """The batches of a task's trace."""
    options = studied.experiment.trace
    return batches(items, options.batch, "trace", pad_id=studied.pad_id, by_length=True)


def _mean_over_checkpoints(folder: Path, checkpoints: Mapping[str, Path], tasks: Mapping[str, Any]) -> None:
    """Save each task's mean trace, in which all checkpoints count alike. Its part p is the mean of their parts p."""
    for task in tasks:
        traces = [load_traces(folder / when / f"{task}.safetensors") for when in checkpoints]
        save_traces(folder / "checkpoints" / f"{task}.safetensors", [Trace.combine(same) for same in zip(*traces)])


def take_or_examine(studied: StudiedModel) -> None:
    """Take the traces of a taught model; check that the base is traced exactly."""
    if studied.is_base:
        studied.run.alone(lambda: examine(studied))
    else:
        take_traces(studied)


def is_checked(experiment: Experiment) -> bool:
    """Whether the experiment checks the trace of the base."""
    return experiment.trace.check


def needs(sizes: Sizes, name: str) -> Iterator[Need]:
    """The traces of one task, and those of the task before, which are still held.

    The traces of a sharded model lie where its pieces do.
    """
    if name == BASE:
        yield from needs_of_doctor(sizes.alone)
        return
    options, before = sizes.experiment.trace, 0
    several = len(options.measures) * options.parts
    for task, items in sizes.material.trained.items():
        rows = sizes.material.once(("rows", task, repr(options)), partial(sizes.trace_rows, items))
        rows = [sizes.share(row) for row in rows]
        held = {"weights": (1 + options.checkpoints) * sizes.weights} | sizes.estimate(rows)
        if sizes.sharded:
            held |= {"whole sums on their way": sizes.on_their_way(len(options.measures))}
            device_sums = {"sums": several * sizes.sums, "the task before": before}
            host = {} if sizes.machine.gpu is None else {"sums to save": several * sizes.sums}
        else:
            device_sums, host = sizes.trace_sums(several * sizes.sums, sum(held.values()))
            host |= {"the task before": before}
        yield sizes.each(f"the trace of {task}", held | device_sums, host)
        before = several * sizes.sums
    if options.checkpoints:
        alone = sizes.alone
        traces = {"traces": (alone.checkpoints(name) + 1) * several * alone.sums}
        yield alone.first("the mean over checkpoints", {"weights": alone.weights}, traces)


def work(sizes: Sizes, name: str) -> Iterator[Operations]:
    """A forward and backward of every traced example, as in training, at every checkpoint."""
    if name == BASE:
        return
    options = sizes.experiment.trace
    trained = sizes.material.trained.values()
    chosen = [sample(items, options.examples) if options.examples else items for items in trained]
    once = 3 * sum(sizes.flops(work_of(items, options.batch)) for items in chosen)
    times = (sizes.checkpoints(name) or 1) if options.checkpoints else 1
    yield Operations("trace", once * times, sizes.experiment.model.dtype)


def disk(files: Files) -> None:
    """The traces of each checkpoint that is traced, and of their mean."""
    sizes, options = files.sizes, files.sizes.experiment.trace
    times = 1 + options.checkpoints * sizes.checkpoints(files.name)  # the last: the end, or the mean over all
    files.kept[TRACES] += sizes.tasks * times * len(options.measures) * options.parts * sizes.sums
    files.moment("trace")


TRACE = Stage(
    "trace", take_or_examine, steps=("traces", "doctor.json"), of_base=is_checked, is_shared=True, needs=needs,
    work=work, disk=disk,
)  # fmt: skip
