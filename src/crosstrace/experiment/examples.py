"""The examples of a run by part, as read from its folder, and samples of them.

It writes nothing and measures nothing.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any, TypeVar

from crosstrace.core.errors import UserError
from crosstrace.core.files import expanded, read_json, sha256_file
from crosstrace.core.run_folder import Run
from crosstrace.data.chat import put_questions
from crosstrace.data.facts import FactSettings
from crosstrace.data.tasks import ID, OOD, Roles, TaskSettings
from crosstrace.data.text import KNOWN, Example, read_jsonl, texts
from crosstrace.data.tokens import Encoded, encode
from crosstrace.data.world_facts import every_wording, world_of
from crosstrace.experiment.config import Experiment
from crosstrace.experiment.settings import ModelSettings
from crosstrace.models import locating

T = TypeVar("T", Example, Encoded)
A_OOD = "a_ood"  # questions about people whom the base knows, which it was never trained on
FEW = 16  # people of a task: fewer could miss a part of the trace
REPLAYED = "known_replayed"  # those of the base's facts that training replays


def known_people(model: ModelSettings) -> FactSettings | None:
    """The people that a base made by `crosstrace pretrain-base` was taught; None for any other model."""
    recipe = Path(locating.locate(model.name)) / "recipe.json"
    if model.random_init is not None or not recipe.is_file():
        return None
    try:
        facts = FactSettings(**read_json(recipe)["recipe"]["facts"])
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{recipe} is no recipe of `crosstrace pretrain-base`; remove it if the model is of other making"
        ) from None
    return replace(facts, questions=1)  # one wording a fact, however many the base was taught


def data_steps(experiment: Experiment) -> list[str]:
    """The steps that make what is taught and asked."""
    return ["data", "known"] if experiment.eval.known else ["data"]


def examples(run: Run, experiment: Experiment, tokenizer: Any, known: int | None = 0) -> dict[str, list[Encoded]]:
    """The run's examples by part.

    The parts are those of the run's tasks: bio, qa_id and qa_ood by default. Where there are such, a_ood has questions
    about people whom the base knows, `known` facts of the world that it knows, and `known_replayed` those of these
    facts that training replays. All examples of a person are of one group, as `groups` numbers them.

    Args:
        known: examples of a_ood at most, and of facts of the world; 0 for neither, None for all.
    """
    texts = {task: read_jsonl(run.path(f"data/{task}.jsonl")) for task in experiment.tasks}
    numbers = groups(texts, experiment.roles)
    for part, file in ((A_OOD, "data/a_qa.jsonl"), (KNOWN, "known/known.jsonl")):
        if known != 0 and run.path(file).exists():
            texts[part] = sample(read_jsonl(run.path(file)), known)
    parts = encode_tasks(tokenizer, texts, numbers, experiment)
    for name in (name for name in texts if name not in experiment.tasks):
        parts[name] = mark_traced(encode(tokenizer, texts[name], numbers), experiment.trace.targets)
    facts = parts.pop(KNOWN, [])
    parts |= {KNOWN: _of_split(facts, OOD)} if facts else {}
    replayed = _of_split(facts, ID)
    return parts | ({REPLAYED: replayed} if replayed else {})


def encode_tasks(
    tokenizer: Any, texts: Mapping[str, Sequence[Example]], numbers: Mapping[str, int], experiment: Experiment
) -> dict[str, list[Encoded]]:
    """The examples of an experiment's tasks by part, with the targets that their tasks name.

    Training predicts the targets `train`. The trace is of the loss of the targets `trace`.
    """
    parts: dict[str, list[Encoded]] = {}
    for name, task in experiment.tasks.items():
        traced = task.trace_targets or ("train" if task.role == "other" else experiment.trace.targets)
        items = mark_traced(encode(tokenizer, texts[name], numbers), traced)
        for item in items:
            item.targets["train"] = item.targets[task.targets]
        if task.is_split:
            parts |= {f"{name}_{split}": _of_split(items, split) for split in (ID, OOD)}
        else:
            parts[name] = items
    return parts


def mark_traced(items: list[Encoded], targets: str) -> list[Encoded]:
    """Have the loss of `targets` traced, in place; returns the same examples."""
    for item in items:
        item.targets["trace"] = item.targets[targets]
    return items


def _of_split(items: Sequence[Encoded], split: str) -> list[Encoded]:
    return [item for item in items if item.example.split == split]


def groups(texts: Mapping[str, Sequence[Example]], roles: Roles) -> dict[str, int]:
    """The group of each person that the tasks are about: a number from 0. Traces are split into parts by group.

    People whose questions are trained come first. So they spread evenly over the parts, as all people do. Before them
    come those of tasks that are about few, the fewest first: they would miss a part by chance.
    """
    ordered = [*roles.of_role("recall"), *roles.of_role("store"), *roles.of_role("other")]
    people = []
    for task in sorted(ordered, key=lambda task: task not in roles.split):
        splits = (ID,) if task in roles.split else (ID, OOD)
        of_task = dict.fromkeys(item.person for split in splits for item in texts[task] if item.split == split)
        people.append([*of_task])
    people.sort(key=lambda of_task: min(len(of_task), FEW))
    return {person: number for number, person in enumerate(dict.fromkeys(chain.from_iterable(people)))}


def training_examples(parts: Mapping[str, list[Encoded]], roles: Roles) -> dict[str, list[Encoded]]:
    """The examples of each task that are trained and traced: all but the held-out ones. No task without any."""
    return {task: parts[part] for task in roles.tasks if parts[part := roles.trained_part(task)]}


def replayable(parts: Mapping[str, list[Encoded]]) -> dict[str, list[Encoded]]:
    """The examples that a phase may replay beside those that it teaches."""
    return {KNOWN: parts[REPLAYED]} if parts.get(REPLAYED) else {}


def sample(items: Sequence[T], number: int | None) -> list[T]:
    """`number` of the examples (None: all), in their order. The choice is random but always the same.

    It has equally many examples of each relation, as far as there are so many.
    """
    by_relation: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        example = item.example if isinstance(item, Encoded) else item
        by_relation.setdefault("+".join(mention.relation for mention in example.mentions), []).append(index)
    draws = {key: random.Random(f"sample/{key}").sample(indices, len(indices)) for key, indices in by_relation.items()}
    turns = (index for turn in zip_longest(*draws.values()) for index in turn if index is not None)
    return [items[index] for index in sorted(islice(turns, number))]


def samples(parts: Mapping[str, list[Encoded]], number: int, roles: Roles) -> dict[str, list[Encoded]]:
    """`number` questions of each kind, and as many texts that store facts as have about `number` objects."""
    kinds = (*roles.asked, KNOWN, REPLAYED)
    chosen = {name: sample(parts[name], number) for name in kinds if parts.get(name)}
    for part in (part for task in roles.of_role("store") for part in roles.parts_of(task) if parts.get(part)):
        chosen[part] = sample(parts[part], max(1, number // max(1, len(parts[part][0].example.mentions))))
    return chosen


def facts_key(facts: FactSettings) -> dict[str, Any]:
    """The settings of the facts, and the content of their source if they have one."""
    key = asdict(facts)
    if facts.template == "plain":
        del key["template"]  # runs from before there were templates stay complete
    if facts.source is None:
        return key
    names = ("world.json", "bio.jsonl", "qa.jsonl", "import.json")
    files = [expanded(facts.source) / name for name in names]
    return key | {"content": {file.name: sha256_file(file) for file in files if file.is_file()}}


def import_folder(experiment: Experiment) -> Path | None:
    """The folder with the user's own facts, or with the file of the first task that stores; None if there is none."""
    if experiment.facts.source is not None:
        return expanded(experiment.facts.source)
    stored = experiment.tasks.get(experiment.roles.stored)
    return None if stored is None or stored.is_of_world else expanded(stored.source).parent


def tasks_key(tasks: Mapping[str, TaskSettings]) -> dict[str, Any]:
    """The tasks' settings and the content of their files, and of what an import says of them."""
    files = {name: expanded(task.source) for name, task in tasks.items() if not task.is_of_world}
    content = {name: sha256_file(file) for name, file in files.items() if file.is_file()}
    imports = {str(Path(tasks[name].source).parent): file.parent / "import.json" for name, file in files.items()}
    content |= {folder: sha256_file(file) for folder, file in imports.items() if file.is_file()}
    return {"settings": {name: asdict(task) for name, task in tasks.items()}, "content": content}


def taught_texts(experiment: Experiment, tokenizer: Any) -> dict[str, list[Example]]:
    """The examples of every task; questions are written as `facts.template` says.

    Args:
        tokenizer: only used if the template is chat.

    Raises:
        UserError: as `texts` and `put_questions`.
    """
    by_task = texts(experiment.facts, experiment.tasks)
    for name, task in experiment.tasks.items():
        if task.role == "recall" and task.source != "cloze":
            by_task[name] = put_questions(experiment.facts, tokenizer, by_task[name])
    return by_task


def asks_something(run: Run, experiment: Experiment) -> bool:
    """Whether a task that recalls has examples in the run."""
    recalling = experiment.roles.of_role("recall")
    return any(run.path(f"data/{task}.jsonl").read_bytes() for task in recalling)


def asks(experiment: Experiment, tokenizer: Any) -> list[Example]:
    """Every fact of `eval.known` in every wording. Questions are written as `facts.template` says.

    Raises:
        UserError: as `world_of`; or the base could answer none of them.
    """
    name = experiment.eval.known
    assert name is not None
    examples = every_wording(world_of(name), tokenizer, experiment.facts.template)
    if not examples:
        raise UserError(
            f"eval.known = {name} has no fact that {experiment.model.name} could answer: no wording names the "
            "object after the subject, or its tokenizer has no words for the objects"
        )
    return examples
