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
from crosstrace.data.facts import FactSettings
from crosstrace.data.text import KNOWN, Example, read_jsonl
from crosstrace.data.tokens import Encoded, encode
from crosstrace.experiment.config import Experiment, ModelSettings
from crosstrace.models import loading

T = TypeVar("T", Example, Encoded)
REPLAYED = "known_replayed"  # the part of the facts that the base knows which training replays


def known_people(model: ModelSettings) -> FactSettings | None:
    """The people that a base made by `crosstrace pretrain-base` was taught; None for any other model."""
    recipe = Path(loading.locate(model.name)) / "recipe.json"
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


def examples(run: Run, tokenizer: Any, known: int | None = 0) -> dict[str, list[Encoded]]:
    """The run's examples by part: bio, qa_id, qa_ood and, where there are such, at most `known` each (None: all) of
    a_ood, questions about people whom the base knows, and of facts of the world that it knows: known, and those that
    training replays apart from them.

    All examples of a person are of one group, as `groups` numbers them.
    """
    texts = {"bio": read_jsonl(run.path("data/bio.jsonl")), "qa": read_jsonl(run.path("data/qa.jsonl"))}
    numbers = groups(texts)
    for part, file in (("a_ood", "data/a_qa.jsonl"), (KNOWN, "known/known.jsonl")):
        if known != 0 and run.path(file).exists():
            texts[part] = sample(read_jsonl(run.path(file)), known)
    parts = {name: encode(tokenizer, items, numbers) for name, items in texts.items()}
    of_split = lambda items, split: [item for item in items if item.example.split == split]
    qa, facts = parts.pop("qa"), parts.pop(KNOWN, [])
    parts |= {"qa_id": of_split(qa, "id"), "qa_ood": of_split(qa, "ood")}
    parts |= {KNOWN: of_split(facts, "ood")} if facts else {}
    replayed = of_split(facts, "id")
    return parts | ({REPLAYED: replayed} if replayed else {})


def groups(texts: Mapping[str, Sequence[Example]]) -> dict[str, int]:
    """The number of each person of bio and qa: its group, the unit that the traces' parts are made of.

    Those whose questions are trained come first, so that they spread evenly over the parts, as all people do.
    """
    asked = [item.person for item in texts["qa"] if item.split == "id"]
    told = [item.person for split in ("id", "ood") for item in texts["bio"] if item.split == split]
    return {person: number for number, person in enumerate(dict.fromkeys([*asked, *told]))}


def training_examples(parts: Mapping[str, list[Encoded]]) -> dict[str, list[Encoded]]:
    """What is trained and traced of each task that has examples: every biography, and the questions of the ID
    people."""
    return {task: parts[part] for task, part in (("bio", "bio"), ("qa", "qa_id")) if parts[part]}


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


def samples(parts: Mapping[str, list[Encoded]], number: int) -> dict[str, list[Encoded]]:
    """So many questions of each kind, and biographies with about as many objects."""
    kinds = ("qa_id", "qa_ood", KNOWN, REPLAYED)
    chosen = {name: sample(parts[name], number) for name in kinds if parts.get(name)}
    return chosen | {"bio": sample(parts["bio"], max(1, number // len(parts["bio"][0].example.mentions)))}


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
