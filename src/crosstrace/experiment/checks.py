"""Checks before a run: what would otherwise fail after hours, or after an earlier run was removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from crosstrace.core.errors import UserError
from crosstrace.core.files import expanded, sha256_tree
from crosstrace.core.processes import Processes
from crosstrace.data.tasks import ID
from crosstrace.data.text import KNOWN, NO_QUESTIONS, texts
from crosstrace.data.tokens import Encoded, check_fast, encode
from crosstrace.data.world_facts import world_of
from crosstrace.experiment import config
from crosstrace.experiment.analysis import ANALYSES
from crosstrace.experiment.config import Experiment
from crosstrace.experiment.examples import (
    asks,
    encode_tasks,
    groups,
    known_people,
    sample,
    taught_texts,
    training_examples,
)
from crosstrace.experiment.registry import stage_names
from crosstrace.experiment.stages.retain import new_material
from crosstrace.experiment.stages.tracers import SUMS
from crosstrace.experiment.studied import LEARNING, START, View
from crosstrace.models import adapters, loading, locating, modes
from crosstrace.models.compatibility import check_alike, check_fits, check_same_tokens
from crosstrace.training.optimisers import check_optimisers
from crosstrace.training.trainer import check_trackers


def check_place(experiment: Experiment, processes: Processes) -> None:
    """Raise a `UserError` if the processes are to compute on the CPU but were joined through their GPUs."""
    backend = dist.get_backend(processes.group)
    if loading.device(experiment.model.device).type == "cpu" and "gloo" not in backend:
        raise UserError(
            f"model.device is cpu, but the {processes.size} processes were joined through their GPUs ({backend}); "
            "start them with CUDA_VISIBLE_DEVICES= in the environment"
        )


def check_outside(experiment: Experiment, folder: Path) -> None:
    """Raise a `UserError` if the experiment reads something in the run folder that is to be overwritten."""
    sources = {"model.name": experiment.model.name, "facts.source": experiment.facts.source,
            "retention.text": experiment.retention.text, "eval.known": experiment.eval.known}  # fmt: skip
    sources |= {f"given.{name}": model for name, model in experiment.given.items()}
    sources |= {f"tasks.{name}.source": task.source for name, task in experiment.tasks.items() if not task.is_of_world}
    for name, source in sources.items():
        if source and expanded(source).resolve().is_relative_to(expanded(folder).resolve()):
            raise UserError(
                f"{name} = {source} lies in {folder}, which would be removed first; choose another run folder"
            )


RESERVED = ("checkpoints", *LEARNING.values(), SUMS, START)  # folders beside the phases' in a strategy's folder


def check(experiment: Experiment, whole: bool, stages: Sequence[str] = ()) -> None:
    """Raise a `UserError` for what would otherwise fail after hours, or after an earlier run was removed.

    Args:
        whole: whether to read the model too.
        stages: the stages that will run; all if empty.
    """
    roles, taught = experiment.roles, texts(experiment.facts, experiment.tasks)
    sizes = {
        task: sum(item.repeats for item in items if task not in roles.split or item.split == ID)
        for task, items in taught.items()
    }
    asks_something = any(taught[task] for task in roles.of_role("recall"))
    if experiment.eval.known and experiment.replays_known:
        sizes[KNOWN] = sum(person.in_distribution for person in world_of(experiment.eval.known).people)
    if not asks_something:
        config.check_unasked(experiment)
    for strategy, phases in experiment.strategies.items():
        names = [phase.name for phase in phases]
        for phase in phases:
            phase.updates(sizes)
            if names.count(phase.name) > 1 or not phase.name.replace("_", "").replace("-", "").isalnum():
                raise UserError(
                    f"phase {phase.name!r} cannot name a folder of its own; expected letters, digits, '_' and '-', and "
                    "no name twice in a strategy"
                )
            if phase.name in RESERVED:
                raise UserError(
                    f"phase {phase.name!r} of strategy {strategy} has the name of a folder that crosstrace makes "
                    "beside it; choose another name"
                )
    known = [*stage_names(), *ANALYSES]
    for name in (name for name in experiment.extensions if name not in known):
        raise UserError(
            f"extensions names {name!r}, but no installed package adds a stage or analysis of that name; there are "
            f"{', '.join(known)}"
        )
    check_trackers(experiment.train.report_to)
    check_optimisers(experiment.optimisers, experiment.model.sharded)
    tokenizer = loading.load_tokenizer(experiment.model.name)
    check_fast(tokenizer)
    taught = taught_texts(experiment, tokenizer)
    known_people(experiment.model)
    of_world = asks(experiment, tokenizer) if experiment.eval.known else []
    retains = experiment.retention.run or (
        "retain" in stages and len(stages) == 1
    )  # named alone, it runs whatever the setting
    if retains and not asks_something:
        raise UserError(f"retain has nothing to ask: {NO_QUESTIONS}")
    further = new_material(experiment, tokenizer) if retains else {}
    lora = experiment.train.lora
    if lora and locating.adapted_base(locating.locate(experiment.model.name)) is not None:
        raise UserError(
            f"model.name = {experiment.model.name} holds an adapter, and train.lora would put another one on it; merge "
            "the first and save the model (load_model and save_model of crosstrace.models.loading do)"
        )
    if whole:
        model = View(experiment).load_base()
        with modes.checkpointing_gradients(model, experiment.train.gradient_checkpointing):
            pass
        parts = encode_tasks(tokenizer, taught, groups(taught, roles), experiment)
        encoded = [item for items in parts.values() for item in items]
        _check_targets(parts, experiment, asks_something)
        _check_parts(experiment, training_examples(parts, roles))
        _check_known(tokenizer, encoded, experiment.model.name)
        check_fits(model, [*encoded, *encode(tokenizer, of_world), *(i for items in further.values() for i in items)])
        for name, given in experiment.given.items():
            _check_given(experiment, model, tokenizer, name, given, [item.example.text for item in encoded])
        if lora:
            adapters.adapted(model, lora, 0)


def _check_targets(parts: Mapping[str, list[Encoded]], experiment: Experiment, asks_something: bool) -> None:
    """Raise a `UserError` if a part that is asked has no example, or a traced example no token to trace."""
    roles = experiment.roles
    for part in roles.asked if asks_something else ():
        if not parts[part]:
            raise UserError(
                f"the part {part} of tasks.{roles.task_of(part)} has no example; expected some of each split, `id` and "
                "`ood`, or held_out: false"
            )
    for task, items in training_examples(parts, roles).items():
        empty = [item for item in items if not bool(item.targets["trace"][1:].any())]
        if empty:
            raise UserError(
                f"{len(empty)} of the {len(items)} examples of tasks.{task} to trace have no token of the kind that is "
                f"traced, e.g. {empty[0].example.id}; set tasks.{task}.trace_targets: train, or name their objects"
            )


def _check_parts(experiment: Experiment, trained: Mapping[str, Sequence[Encoded]]) -> None:
    """Raise a `UserError` if a part of the trace has no example of some task."""
    options = experiment.trace
    for task, items in trained.items():
        items = sample(items, options.examples) if options.examples else items
        people = {item.group for item in items}
        empty = options.parts - len({person % options.parts for person in people})
        if empty:
            raise UserError(
                f"trace.parts = {options.parts}, but the {len(items)} examples of {task} to trace are about "
                f"{len(people)} people or subjects, which leaves {empty} of the parts empty; take more of them (facts, "
                "trace.examples) or fewer parts"
            )


def _check_given(
    experiment: Experiment, base: Any, tokenizer: Any, name: str, given: str, texts: Sequence[str]
) -> None:
    """Raise a `UserError` if a model that was tuned elsewhere does not fit the base or `trace.view`."""
    label = f"given.{name} = {given}"
    adapted_base = locating.adapted_base(locating.locate(given))
    if experiment.trace.view == "adapter":
        if adapted_base is None:
            raise UserError(f"{label} has no adapter, which trace.view: adapter asks for; take trace.view: merged")
        base_folder = Path(locating.locate(experiment.model.name))
        if Path(adapted_base) != base_folder and (
            not base_folder.exists()
            or not Path(adapted_base).exists()
            or sha256_tree(adapted_base) != sha256_tree(base_folder)
        ):
            raise UserError(
                f"{label} is an adapter of {adapted_base}, but the base is {experiment.model.name}; expected one of "
                "it, or take trace.view: merged"
            )
    options = experiment.model
    if experiment.trace.view == "adapter":
        adapters.check_plain(loading.load_model(given, options.dtype, options.attention, merge=False), label)
    tuned = loading.load_model(given, options.dtype, options.attention, pickled=options.pickled)
    check_alike(base, tuned, (options.name, label))
    check_same_tokens(tokenizer, given, texts, options.name)


def _check_known(tokenizer: Any, encoded: Sequence[Encoded], name: str) -> None:
    """Raise a `UserError` if the tokenizer has no token for an object: nobody can recall the unknown word."""
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown == tokenizer.eos_token_id:
        return
    lost = {}
    for item in encoded:
        for mention, places in zip(item.example.mentions, item.mentions):
            if bool((item.ids[places.object] == unknown).any()):
                lost[item.example.text[slice(*mention.object)]] = item.example.id
    if lost:
        object, example = next(iter(lost.items()))
        raise UserError(
            f"the tokenizer of {name} has no token for {len(lost)} of the objects, e.g. {object!r} in {example}; use a "
            "model whose tokenizer was made for such text, or make one with `crosstrace new-model`"
        )
