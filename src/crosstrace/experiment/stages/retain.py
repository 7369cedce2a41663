"""Retention: what becomes of taught facts, and of the shared parameters, when a taught model goes on learning.

A taught model is trained further on other material (new people, or any text), with and without replay of what it was
taught. Measured are recall of the taught facts over the updates, how far the shared parameters move, which parameters
are shared afterwards, and whether putting only the shared parameters back restores recall. Formulas: docs/method.md.

`moved` and `repaired` measure models and ParamSets; `retain` is the stage of a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crosstrace.analyses.dynamics import shared_now
from crosstrace.core.errors import UserError
from crosstrace.core.files import expanded, remove_folder, sha256_file, write_json
from crosstrace.core.left_out import optional
from crosstrace.core.pieces import at_rest, local, piece, processes_of
from crosstrace.core.processes import Processes
from crosstrace.data.chat import put_questions
from crosstrace.data.facts import World
from crosstrace.data.text import MAKERS, read_lines
from crosstrace.data.tokens import Encoded, encode
from crosstrace.experiment.config import Experiment
from crosstrace.experiment.examples import (
    data_steps,
    examples,
    facts_key,
    mark_traced,
    replayable,
    sample,
    samples,
    training_examples,
)
from crosstrace.experiment.needs.files import Files
from crosstrace.experiment.needs.material import times, work_of
from crosstrace.experiment.needs.sizes import Need, Operations, Sizes, costliest
from crosstrace.experiment.stage import Stage
from crosstrace.experiment.studied import StudiedModel, trains_in_bf16
from crosstrace.sets.controls import random_sets
from crosstrace.sets.interventions import grafted, snapshot
from crosstrace.sets.paramset import ParamSet
from crosstrace.training.evaluation import recall
from crosstrace.training.listeners import RecallHistory
from crosstrace.training.recipes import Phase
from crosstrace.training.trainer import train

Row = dict[str, Any]
ARMS = ("alone", "replay")
OTHERS_SEED = 10_000  # added to the seed of the taught world


@optional("retain", "retention/{}")
def retain(studied: StudiedModel) -> None:
    """Train a taught model further, with and without replay: retention/<strategy>/."""
    run, experiment, name = studied.run, studied.experiment, studied.name
    options = experiment.retention
    text = {"sha256": sha256_file(_text_file(options.text))} if options.text else {}
    key = run.alone(lambda: {
        "retention": {k: v for k, v in asdict(options).items() if k != "run"} | text,
        "train": asdict(experiment.train), "targets": experiment.trace.targets, "facts": facts_key(experiment.facts),
        "embeddings": experiment.analysis.embeddings, "threads": experiment.threads,
        "bf16": trains_in_bf16(experiment), "model": studied.key(),
        **run.inputs(*data_steps(experiment), f"shared/{name}"),
    })  # fmt: skip

    def make(folder: Path) -> None:
        folder.mkdir(exist_ok=True)  # (all processes run this: they train, ask and trace together)
        tokenizer = studied.tokenizer
        parts = examples(
            run, experiment, tokenizer, known=experiment.eval.known_examples if experiment.eval.known else 0
        )
        roles = experiment.roles
        old, world = training_examples(parts, roles), replayable(parts)
        new = new_material(experiment, tokenizer)
        questions = samples(parts, options.questions, roles)
        if f"new_{roles.recalled}" in new:
            questions["new"] = sample(new[f"new_{roles.recalled}"], options.questions)
        sets = {
            when: {"shared": [pset], **random_sets(pset, options.draws, f"retain/{name}/{when}")}
            for when, pset in studied.shared_sets()
        }
        model = studied.load()
        taught, names = snapshot(model), studied.view.scope(model)
        traced = {task: sample(items, options.questions) for task, items in old.items()}
        traced = {task: traced[task] for task in roles.shared}
        before = shared_now(model, tokenizer, traced, names, "trace")
        taught_tasks = {task for phase in studied.phases for task in phase.composition()}

        def measure(model: nn.Module) -> Row:
            return {part: _exact(model, tokenizer, items, run.processes) for part, items in questions.items()}

        tables: dict[str, list[Row]] = {table: [] for table in ("history", "moved", "shared", "repair")}
        for arm in ARMS:
            model = studied.load_trainable()
            history = RecallHistory(measure, options.every)
            of_recall = [f"new_{task}" for task in roles.of_role("recall")]
            batch = {task: options.recall if task in of_recall else options.store for task in new}
            counts = dict.fromkeys(roles.of_role("store"), options.replay_store)
            counts |= dict.fromkeys(roles.of_role("recall"), options.replay_recall)
            counts = {task: counts[task] for task in roles.tasks if task in counts and task in taught_tasks}
            counts |= dict.fromkeys(world, options.replay_known)
            phase = Phase("new", batch, options.steps, replay=counts if arm == "replay" else {},
                          optimiser=options.optimiser)  # fmt: skip
            with studied.bar(f"retain, {arm}") as update:
                train(
                    model, tokenizer, [phase], new | old | world, folder / arm, experiment.train,
                    bf16=trains_in_bf16(experiment), trace_targets="trace",
                    listeners=[history], progress=update, logs=run.folder / "logs" / "retention" / name / arm,
                    processes=run.processes,
                )  # fmt: skip
            model = studied.view.merge(model)
            tables["history"] += [{"arm": arm} | row for row in history.rows]
            tables["shared"].append({"arm": arm} | _kept(before, shared_now(model, tokenizer, traced, names, "trace")))
            asks = {part: questions[part] for part in roles.asked}
            for when, by_label in sets.items():
                labels = {"arm": arm, "when": when}
                tables["moved"] += [labels | row for row in moved(model, taught, by_label)]
                tables["repair"] += [
                    labels | row for row in repaired(model, tokenizer, taught, by_label, asks, run.processes)
                ]
        run.alone(lambda: keep(folder, tables))

    def keep(folder: Path, tables: dict[str, list[Row]]) -> None:
        write_json(folder / "retention.json", tables)
        for arm in ARMS:
            remove_folder(folder / arm)

    run.stage(f"retention/{name}", key, make, keep_partial=True)


def new_material(experiment: Experiment, tokenizer: Any) -> dict[str, list[Encoded]]:
    """The examples of further training, by task: the lines of a text file, or examples about new people.

    No new person has the name of a taught one.

    Raises:
        UserError: the file holds no text, the facts are from a source and so have no new people, or no task is made of
            the world's facts.
    """
    options = experiment.retention
    if options.text:
        lines = read_lines(_text_file(options.text), "text", "retention.text")
        return {"text": mark_traced(encode(tokenizer, lines), "train")}
    facts = experiment.facts
    if facts.source is not None:
        raise UserError(
            f"there are no new people beside the facts of {facts.source} to train further on; name a text file as "
            "retention.text"
        )
    names = {person.name for person in World.draw(facts).people}
    drawn = World.draw(replace(facts, seed=facts.seed + OTHERS_SEED, people=options.people))
    new_world = replace(drawn, people=tuple(person for person in drawn.people if person.name not in names))
    material = {}
    for name, task in experiment.tasks.items():
        if not task.is_of_world or task.role == "other" or (task.role == "recall" and not options.recall):
            continue
        items = MAKERS[task.source](new_world)
        if task.role == "recall" and task.source != "cloze":
            items = put_questions(facts, tokenizer, items)
        material[f"new_{name}"] = mark_traced(encode(tokenizer, items), experiment.trace.targets)
    if not material:
        raise UserError("no task is made of the world's facts, so there is nothing new to train; set retention.text")
    return material


def _text_file(name: str) -> Path:
    path = expanded(name)
    if not path.is_file():
        raise UserError(f"retention.text = {name} is no file; expected a text file in UTF-8, one text a line")
    return path


def _exact(model: nn.Module, tokenizer: Any, items: Sequence[Encoded], processes: Processes | None) -> float:
    """The share of the examples that a model recalls exactly."""
    return recall(model, tokenizer, items, processes=processes).summary()["exact_match"]


def moved(model: nn.Module, before: Mapping[str, Tensor], sets: Mapping[str, Sequence[ParamSet]]) -> list[Row]:
    """How much of the parameters' movement lies in some sets S.

    Args:
        before: every parameter's earlier value.
        sets: by label, one or several draws of the same size.

    Returns:
        a row {set, size, energy, lift} for each label, mean over its draws. With the movement Δ of the N parameters in
        the tensors of the sets, energy = Σ_S Δ² / Σ Δ², and lift = energy / (|S| / N). The lift is 1 if S moves like
        all parameters. Both are None if nothing moved.
    """
    values = at_rest(model)
    processes = processes_of(values)
    rows = []
    for label, draws in sets.items():
        energies = []
        for pset in draws:
            sums = torch.zeros(2, dtype=torch.float64)  # of all parameters, and of those in the set
            for name, mask in pset.masks.items():
                theta = values[name].detach()
                square = (local(theta).cpu() - piece(before[name].detach(), theta).cpu()).double().square()
                sums += torch.stack([square.sum(), square[piece(mask, theta).cpu()].sum()])
            if processes is not None:
                processes.add_up(on_device := sums.to(local(theta).device))
                sums = on_device.cpu()
            total, inside = sums.tolist()
            energies.append(inside / total if total else None)
        size, count = draws[0].size, sum(mask.numel() for mask in draws[0].masks.values())
        known = [value for value in energies if value is not None]
        energy = sum(known) / len(known) if known else None
        lift = energy / (size / count) if energy is not None and size else None
        rows.append({"set": label, "size": size, "energy": energy, "lift": lift})
    return rows


def repaired(
    model: nn.Module,
    tokenizer: Any,
    taught: Mapping[str, Tensor],
    sets: Mapping[str, Sequence[ParamSet]],
    questions: Mapping[str, Sequence[Encoded]],
    processes: Processes | None = None,
) -> list[Row]:
    """Recall of a model that was trained further, as it is and with some sets put back to their taught values.

    Args:
        taught: every parameter's value before the further training.
        sets: by label, one or several draws of the same size.
        questions: by part.
        processes: those that share out the questions, as in `evaluation.recall`.

    Returns:
        rows {set, size, draws, PART: exact match}, mean over a label's draws. The set "none" is the model as it is.
    """
    rows: list[Row] = [{"set": "none", "size": 0, "draws": 1}]
    rows[0] |= {part: _exact(model, tokenizer, items, processes) for part, items in questions.items()}
    for label, draws in sets.items():
        scores: dict[str, list[float]] = {part: [] for part in questions}
        for pset in draws:
            with grafted(model, pset, taught):
                for part, items in questions.items():
                    scores[part].append(_exact(model, tokenizer, items, processes))
        row = {"set": label, "size": draws[0].size, "draws": len(draws)}
        rows.append(row | {part: sum(values) / len(values) for part, values in scores.items()})
    return rows


def _kept(before: ParamSet, after: ParamSet) -> Row:
    """Sizes of a shared set before and after, and the share of the earlier one that is still shared."""
    return {
        "before": before.size,
        "after": after.size,
        "still": (before & after).size / before.size if before.size else None,
    }


def is_wanted(experiment: Experiment) -> bool:
    """Whether the experiment trains its taught models further."""
    return experiment.retention.run


def needs(sizes: Sizes, name: str) -> Iterator[Need]:
    """What training holds, a copy of the taught values, and the sets."""
    options, roles = sizes.experiment.retention, sizes.experiment.roles
    sets = len(sizes.whens) * (1 + 2 * options.draws) * sizes.alone.scope
    batch = dict.fromkeys(roles.of_role("store"), options.store + options.replay_store)
    batch |= dict.fromkeys(roles.of_role("recall"), options.recall + options.replay_recall)
    phase = Phase("new", {task: count for task, count in batch.items() if count}, options.steps)
    data = sizes.updates(phase, "0")
    held = sizes.trained_held() | {"a copy of the weights": sizes.weights}
    chosen = {task: [sizes.share(batch) for batch in micro_batches] for task, micro_batches in costliest(data).items()}
    yield sizes.each("a step", held | sizes.step(phase, chosen), {"masks": sets})


def work(sizes: Sizes, name: str) -> Iterator[Operations]:
    """Forward and backward of every update, alone and with replay."""
    options, roles, flops = sizes.experiment.retention, sizes.experiment.roles, 0.0
    counts = {"store": (options.store, options.replay_store), "recall": (options.recall, options.replay_recall)}
    for task, items in sizes.material.trained.items():
        if roles.tasks[task] in counts:
            new, replayed = counts[roles.tasks[task]]
            per_example = times(work_of(items, max(1, new)), 1 / len(items))
            flops += 3 * options.steps * (2 * new + replayed) * sizes.flops(per_example)
    yield Operations("retain", flops, sizes.precision)


def disk(files: Files) -> None:
    """The checkpoints of each further training beside those before; nothing of them is kept."""
    saves, weights = files.sizes.saves(files.sizes.experiment.retention.steps), 0.0
    for arm in ARMS:
        weights += files.train([(arm, saves)], earlier=weights, what=f"retain, {arm}")


RETAIN = Stage(
    "retain", retain, steps=("retention",), of_given=False, is_wanted=is_wanted, asks=True, is_shared=True,
    needs=needs, work=work, disk=disk,
)  # fmt: skip
