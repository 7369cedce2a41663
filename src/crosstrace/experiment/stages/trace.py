"""The stage `trace`: traces at the final checkpoint, and at kept ones."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from crosstrace.core.errors import UserError
from crosstrace.core.files import linked
from crosstrace.core.pieces import is_sharded
from crosstrace.core.progress import Progress
from crosstrace.core.run_folder import Run
from crosstrace.data.tokens import Encoded, batches
from crosstrace.experiment.config import Experiment
from crosstrace.experiment.inputs import (
    LEARNING,
    examples,
    in_scope,
    load_checkpoint,
    model_inputs,
    origin,
    sample,
    taught_place,
    training_examples,
)
from crosstrace.experiment.stages.dropping import take_again
from crosstrace.models import loading
from crosstrace.trace import Trace, load_traces, save_traces, trace


def take_traces(run: Run, experiment: Experiment, name: str, progress: Progress) -> None:
    """The trace at the final checkpoint (and at kept ones): traces/<strategy>/<when>/<task>.safetensors."""
    options = experiment.trace
    taken = {name: value for name, value in asdict(options).items() if name != "keep"}
    key = run.alone(lambda: {"trace": taken, "model": model_inputs(run, experiment, name), **run.inputs("data")})
    run.alone(partial(take_again, run, experiment, name, key))

    def make(folder: Path) -> None:
        if options.online and name in experiment.strategies and (why := run.dropped(f"models/{name}")):
            raise UserError(f"trace needs the trace during the training of {name}, which is gone: {why}")
        tokenizer = loading.load_tokenizer(experiment.model.name)
        trained = training_examples(examples(run, tokenizer))
        home, phases = run.path(f"models/{name}"), experiment.strategies.get(name, [])
        places = {"final": taught_place(run, experiment, name)}
        told = run.alone(lambda: origin(run, experiment, name)) | {"targets": options.targets}
        if options.checkpoints:
            for index, phase in enumerate(phases):
                for place in sorted(home.glob(f"{phase.name}/checkpoint-*")):
                    places[f"checkpoints/{index}-{phase.name}-{place.name}"] = place
                if phase is not phases[-1]:
                    places[f"checkpoints/{index}-{phase.name}-end"] = home / phase.name
        for when, place in places.items():
            model = load_checkpoint(experiment, place, run.processes)
            group = None if run.processes is None or is_sharded(model) else run.processes.group
            names = in_scope(experiment, model) if options.view == "adapter" else None
            of = {"checkpoint": place.relative_to(home).as_posix() if phases else str(place)}
            for task, items in trained.items():
                items = sample(items, options.examples) if options.examples else items
                with progress.bar(f"{name}: trace {task}", len(items)) as update:
                    found = trace(
                        model, _trace_batches(items, experiment, tokenizer), task=task,
                        measures=options.measures, parts=options.parts, names=names, progress=update.add, group=group,
                        tell=lambda needed, task=task: progress.note(f"{name}, {task}: {needed}"),
                    )  # fmt: skip
                served = found[0].meta["coverage"].items()
                progress.note(f"{name}, {task}: " + ", ".join(f"{rule} {100 * share:.3g} %" for rule, share in served))
                for item in found:
                    item.meta |= told | of
                if run.leads or is_sharded(model):
                    save_traces(folder / when / f"{task}.safetensors", found)
        if run.leads and options.checkpoints and phases:
            _mean_over_checkpoints(folder, places, trained)
        for when in LEARNING.values() if run.leads and options.online and phases else ():
            if (home / when).is_dir():
                shutil.copytree(home / when, folder / when, copy_function=linked)

    run.stage(f"traces/{name}", key, make)


def _trace_batches(items: list[Encoded], experiment: Experiment, tokenizer: Any):
    return batches(
        items,
        experiment.trace.batch,
        experiment.trace.targets,
        pad_id=loading.pad_id(tokenizer),
        by_length=True,
    )


def _mean_over_checkpoints(folder: Path, places: Mapping[str, Path], tasks: Mapping[str, Any]) -> None:
    """Every checkpoint counts alike; part p of the mean is the mean of the checkpoints' parts p."""
    for task in tasks:
        each = [load_traces(folder / when / f"{task}.safetensors") for when in places]
        save_traces(folder / "checkpoints" / f"{task}.safetensors", [Trace.combine(same) for same in zip(*each)])
