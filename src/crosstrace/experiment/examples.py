"""The examples of a run: read from its folder, by part, and samples of them.

It makes nothing and measures nothing.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice, zip_longest
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
from crosstrace.experiment.config import Experiment
from crosstrace.experiment.settings import ModelSettings
from crosstrace.models import locating

T = TypeVar("T", Example, Encoded)
A_OOD = "a_ood"  # the part of questions about people whom the base knows, which it was never trained on
REPLAYED = "known_replayed"  # the part of the facts that the base knows which training replays


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
    """The run's examples by part: those of its tasks (bio, qa_id and qa_ood by default) and, where there are such, at
    most `known` each (None: all) of a_ood, questions about people whom the base knows, and of facts of the world that
    it knows: known, and those that training replays apart from them.

    All examples of a person are of one group, as `groups` numbers them.
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
    """The examples of an experiment's tasks by part, with the targets that their tasks name: `train`, which training
    predicts, and `trace`, whose loss is traced."""
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
    """The examples themselves, with `targets` as those whose loss is traced (`trace`)."""
    for item in items:
        item.targets["trace"] = item.targets[targets]
    return items


def _of_split(items: Sequence[Encoded], split: str) -> list[Encoded]:
    return [item for item in items if item.example.split == split]


def groups(texts: Mapping[str, Sequence[Example]], roles: Roles) -> dict[str, int]:
    """The number of each person that the tasks are about: its group, the unit that the traces' parts are made of.

    Those whose questions are trained come first, so that they spread evenly over the parts, as all people do.
    """
    ordered = [*roles.of_role("recall"), *roles.of_role("store"), *roles.of_role("other")]
    asked = [item.person for task in ordered if task in roles.split for item in texts[task] if item.split == ID]
    told = [
        item.person for task in ordered if task not in roles.split
        for split in (ID, OOD) for item in texts[task] if item.split == split
    ]  # fmt: skip
    return {person: number for number, person in enumerate(dict.fromkeys([*asked, *told]))}


def training_examples(parts: Mapping[str, list[Encoded]], roles: Roles) -> dict[str, list[Encoded]]:
    """What is trained and traced of each task that has examples: all of it, but held-out examples."""
    return {task: parts[part] for task in roles.tasks if parts[part := roles.trained_part(task)]}


def replayable(parts: Mapping[str, list[Encoded]]) -> dict[str, list[Encoded]]:
    """What a phase may replay beside what is taught."""
    return {KNOWN: parts[REPLAYED]} if parts.get(REPLAYED) else {}


def sample(items: Sequence[T], number: int | None) -> list[T]:
    """`number` of the examples (None: all), encoded or not, as many of each relation as can be, at random but always
    the same, in their order."""
    by_relation: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        example = item.example if isinstance(item, Encoded) else item
        by_relation.setdefault("+".join(mention.relation for mention in example.mentions), []).append(index)
    draws = {key: random.Random(f"sample/{key}").sample(found, len(found)) for key, found in by_relation.items()}
    turns = (index for turn in zip_longest(*draws.values()) for index in turn if index is not None)
    return [items[index] for index in sorted(islice(turns, number))]


def samples(parts: Mapping[str, list[Encoded]], number: int, roles: Roles) -> dict[str, list[Encoded]]:
    """So many questions of each kind, and of texts that store facts about as many objects."""
    kinds = (*roles.asked, KNOWN, REPLAYED)
    chosen = {name: sample(parts[name], number) for name in kinds if parts.get(name)}
    for part in (part for task in roles.of_role("store") for part in roles.parts_of(task) if parts.get(part)):
        chosen[part] = sample(parts[part], max(1, number // max(1, len(parts[part][0].example.mentions))))
    return chosen


def facts_key(facts: FactSettings) -> dict[str, Any]:
    """The settings of the facts and, of a source, its content."""
    own = asdict(facts)
    if facts.template == "plain":
        del own["template"]  # so that a run of the time before there were others goes on
    if facts.source is None:
        return own
    names = ("world.json", "bio.jsonl", "qa.jsonl", "import.json")
    files = [expanded(facts.source) / name for name in names]
    return own | {"content": {file.name: sha256_file(file) for file in files if file.is_file()}}


def tasks_key(tasks: Mapping[str, TaskSettings]) -> dict[str, Any]:
    """The tasks' settings and the content of their files."""
    files = {name: expanded(task.source) for name, task in tasks.items() if not task.is_of_world}
    content = {name: sha256_file(file) for name, file in files.items() if file.is_file()}
    return {"settings": {name: asdict(task) for name, task in tasks.items()}, "content": content}


def taught_texts(experiment: Experiment, tokenizer: Any) -> dict[str, list[Example]]:
    """The examples of every task, those that ask as `facts.template` says.

    Args:
        tokenizer: needed for a chat template alone.

    Raises:
        UserError: as `texts` and `put_questions`.
    """
    found = texts(experiment.facts, experiment.tasks)
    for name, task in experiment.tasks.items():
        if task.role == "recall" and task.source != "cloze":
            found[name] = put_questions(experiment.facts, tokenizer, found[name])
    return found


def asks_something(run: Run, experiment: Experiment) -> bool:
    """Whether a task that recalls has examples in the run."""
    recalling = experiment.roles.of_role("recall")
    return any(run.path(f"data/{task}.jsonl").read_bytes() for task in recalling)
