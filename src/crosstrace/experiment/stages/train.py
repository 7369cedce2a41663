"""The stage `train`: one strategy from the base to its last phase, with the traces during it and its recall."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from crosstrace.core.files import linked, remove_folder, write_json
from crosstrace.data.tokens import Encoded
from crosstrace.experiment.examples import data_steps, examples, replayable, samples, training_examples
from crosstrace.experiment.needs.files import CHECKPOINTS, MODELS, TRACES, Files
from crosstrace.experiment.needs.sizes import Need, Operations, Sizes, asked_work, costliest, seen_work
from crosstrace.experiment.stage import Stage
from crosstrace.experiment.stages.recall import Asking, asking
from crosstrace.experiment.stages.tracers import SUMS, OnlineListener, SummedListener, Tracer
from crosstrace.experiment.studied import START, StudiedModel, model_key, trains_in_bf16
from crosstrace.models import adapter_files, adapters, locating
from crosstrace.training.listeners import Listener, RecallHistory
from crosstrace.training.trainer import PhaseReport, train


def teach(studied: StudiedModel) -> None:
    """Train one strategy: models/<strategy>/<phase>/ with the model after each phase, traces and history.json."""
    run, experiment, name, phases = studied.run, studied.experiment, studied.name, studied.phases
    options, tracing, bf16 = experiment.train, experiment.trace, trains_in_bf16(experiment)
    watched = {"targets", "online", "every", "forward", "lr_weighted", "parts"} | ({"view"} if options.lora else set())
    watched |= {"definitions", "metric"} if tracing.definitions != ["per_example"] else set()
    trained = {name: value for name, value in asdict(options).items() if value is not None}
    key = run.alone(lambda: {
        "model": model_key(experiment), "train": trained, "phases": [asdict(phase) for phase in phases],
        "trace": {k: v for k, v in asdict(tracing).items() if k in watched}, "measure": tracing.measures[0],
        "threads": experiment.threads, "bf16": bf16, **run.inputs(*data_steps(experiment)),
    })  # fmt: skip

    def make(folder: Path) -> None:
        if not run.alone((folder / "training.json").exists):
            learn(folder)
        run.alone(lambda: [remove_folder(folder / name) for name in ("checkpoints", SUMS)])

    def learn(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        tokenizer, model = studied.tokenizer, studied.view.load_base()
        if options.lora:
            model = adapters.adapted(model, options.lora, options.seed)
            if run.leads:
                model.save_pretrained(folder / START)
                (folder / START / "README.md").unlink()  # PEFT's card, which says nothing
        parts = examples(
            run, experiment, tokenizer, known=experiment.eval.known_examples if experiment.eval.known else 0
        )
        ask = asking(run, experiment, tokenizer, bf16=False)
        measure = _recall_on(ask, samples(parts, options.recall_examples, experiment.roles))
        history = RecallHistory(measure, options.recall_every)
        taught = training_examples(parts, experiment.roles) | replayable(parts)
        listeners: list[Listener] = [history]
        kinds = {"per_example": OnlineListener, "summed": SummedListener}
        tracers: list[Tracer] = [
            kinds[definition](model, experiment, folder, run.processes)
            for definition in kinds
            if tracing.online and definition in tracing.definitions
        ]
        listeners += tracers
        with studied.bar("train") as update:
            reports = train(
                model, tokenizer, phases, taught, folder / "checkpoints", options,
                bf16=bf16, trace_targets="trace", listeners=listeners,
                progress=update, logs=run.folder / "logs" / name, processes=run.processes,
            )  # fmt: skip
        origin = run.alone(studied.origin) if tracers else {}
        for tracer in tracers:
            for task, traces in tracer.traces().items():
                for item in traces:
                    item.meta |= origin
                tracer.keep(task, traces)
        run.alone(lambda: keep(folder, tokenizer, history, reports))

    def keep(folder: Path, tokenizer: Any, history: RecallHistory, reports: list[PhaseReport]) -> None:
        write_json(folder / "history.json", history.rows)
        _keep_models(folder, tokenizer, [phase.name for phase in phases], options.keep_checkpoints)
        if options.lora:
            for file in folder.glob(f"*/**/{adapter_files.ADAPTER}"):
                adapters.name_base(file.parent, _portable(experiment.model.name))
        write_json(
            folder / "training.json", [asdict(report) for report in reports]
        )  # last: it marks the training as complete

    run.stage(f"models/{name}", key, make, keep_partial=True)


def _portable(base: str) -> str:
    """A base's name that holds from any folder: the full path of a local one."""
    path = locating.locate(base)
    return str(Path(path).resolve()) if base != locating.BUNDLED and Path(path).exists() else base


def _recall_on(ask: Asking, chosen: Mapping[str, list[Encoded]]) -> Callable[[Any], dict[str, Any]]:
    """A function that measures a model's recall on the chosen examples of each part."""

    def measure(model: Any) -> dict[str, Any]:
        scores = {name: ask(model, items).summary() for name, items in chosen.items()}
        return {name: score["exact_match"] for name, score in scores.items()} | {
            "n": {name: score["n"] for name, score in scores.items()}
        }

    return measure


def _keep_models(folder: Path, tokenizer: Any, phases: Sequence[str], checkpoints: bool) -> None:
    """Put each phase's last checkpoint into models/<strategy>/<phase>, without the files that only a resume needs.

    Weights are not copied: their files get a second name.

    Args:
        checkpoints: whether to keep the earlier checkpoints too, in <phase>/checkpoint-*.
    """
    for index, phase in enumerate(phases):
        home = folder / "checkpoints" / f"{index}-{phase}"
        saved = sorted(home.glob("checkpoint-*"), key=lambda f: int(f.name.rpartition("-")[2]))
        for checkpoint in saved if checkpoints else saved[-1:]:
            target = folder / phase / (checkpoint.name if checkpoint != saved[-1] else "")
            target.mkdir(parents=True, exist_ok=True)
            for file in checkpoint.glob("*.json"):
                if file.name != "trainer_state.json":
                    shutil.copy2(file, target)
            for file in checkpoint.glob("*.safetensors"):
                (target / file.name).unlink(missing_ok=True)  # of an earlier attempt
                linked(str(file), str(target / file.name))
            tokenizer.save_pretrained(target)


def needs(sizes: Sizes, name: str) -> Iterator[Need]:
    """Weights, gradients, the optimiser's state (in the weights' dtype), and the sums of the traces."""
    experiment = sizes.experiment
    held, host = sizes.learning_held()
    for phase, data in sizes.phases(name):
        chosen = sizes.material.once(("costliest", id(data)), partial(costliest, data))
        chosen = {task: [sizes.share(batch) for batch in micro_batches] for task, micro_batches in chosen.items()}
        step = sizes.step(phase, chosen)
        if "summed" in sizes.whens and len(chosen) > 1:  # each task's gradient apart
            step = step | {"gradients of a task": sizes.learned}
        yield sizes.each(f"a step of {phase.name}", held | step, host)
        if "online" in sizes.whens:
            further = {"a copy of what is merged": sizes.adapted} if sizes.adapted else {}
            if sizes.shares_forward and sum(map(len, chosen.values())) > 1:  # those of the micro-batches before
                further |= {"gradients": sizes.learned}
            yield sizes.each(f"a traced step of {phase.name}", held | further | sizes.traced(chosen), host)
    for part, items in samples(sizes.material.parts, experiment.train.recall_examples, experiment.roles).items():
        recalled = sizes.recall(part, len(items), experiment.eval.tokens)
        yield sizes.each(f"recall of {part}", held | recalled, host)
    if sizes.sharded:
        yield sizes.each("a checkpoint", held, host | sizes.copies())
    # process 0 gathers a sharded model and saves it whole; of any other model it saves its own copy
    saved = {"the whole model": sizes.alone.weights} if sizes.sharded else sizes.copies()
    yield sizes.first("a checkpoint", held, host | saved)


def work(sizes: Sizes, name: str) -> Iterator[Operations]:
    """Forward and backward of every update, recall now and then, and the trace of some updates."""
    experiment, material = sizes.experiment, sizes.material
    steps = sum(sizes.flops(seen_work(data)) for _, data in sizes.phases(name))
    updates = sum(len(data) for _, data in sizes.phases(name))
    chosen = samples(material.parts, experiment.train.recall_examples, experiment.roles)
    recalled = sum((asked_work(items, experiment.eval.tokens) for items in chosen.values()), Counter())
    interval = experiment.train.recall_every
    times = 1 + len(sizes.phases(name)) + (updates // interval if interval else 0)
    # a frozen base has no gradients of its weights, which are a third of the work
    passes = (2 if experiment.train.lora else 3) + experiment.train.gradient_checkpointing
    yield Operations("train", passes * steps + times * sizes.flops(recalled), sizes.precision)
    traced = (3 - sizes.shares_forward) * steps / experiment.trace.every if "online" in sizes.whens else 0.0
    yield Operations("train, traced", traced, experiment.model.dtype)


def disk(files: Files) -> None:
    """The checkpoints of its phases, then the traces of training, written one task after the other."""
    sizes = files.sizes
    phases = [(phase.name, sizes.saves(len(data))) for phase, data in sizes.phases(files.name)]
    if sizes.experiment.train.lora is not None:
        files.kept[MODELS] = sizes.saved  # the untrained adapter
    weights = files.train(phases, sums=sizes.tasks * sizes.learning_sums)
    for task in range(sizes.tasks if sizes.online else 0):
        sums, written = sizes.tasks - task, task + 1
        trace = sizes.learning_sums * sizes.sums
        files.moment("the traces of training", {CHECKPOINTS: weights + sums * trace, TRACES: written * trace})
    files.kept[MODELS] += weights
    files.kept[TRACES] = sizes.online


TRAIN = Stage("train", teach, steps=("models",), of_given=False, is_shared=True, needs=needs, work=work, disk=disk)
