"""Facts of the world: which of them a base knows before it is taught, and what it says instead afterwards.

The base is asked every fact in every wording. For each relation, the wording in which it answers most is kept. The
facts that it answers in that wording are its known set. They are asked again during and after each strategy's training.
An answer is right if its object is. No end token is needed: an untaught base has no reason to write one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from crosstrace.core.files import sha256_file, write_json
from crosstrace.core.progress import Progress
from crosstrace.core.run_folder import Run
from crosstrace.data.text import write_jsonl
from crosstrace.data.tokens import Encoded, encode
from crosstrace.data.world_facts import best_wordings, source_of
from crosstrace.experiment.config import Experiment
from crosstrace.experiment.examples import asks
from crosstrace.experiment.studied import View, model_key
from crosstrace.models import loading
from crosstrace.training.evaluation import Recall, recall
from crosstrace.training.judging import continued, prompt

LONGEST = 12  # tokens that a model says in place of a known object, at most

Row = dict[str, Any]


def find_known(run: Run, experiment: Experiment, progress: Progress) -> None:
    """Ask the base what it knows of the world.

    known/known.jsonl gets each known fact in its relation's best wording. known/asked.json gets, for each relation and
    wording, how many facts it answered.
    """
    name = experiment.eval.known
    if name is None:
        return
    key = run.alone(lambda: {
        "model": model_key(experiment), "facts": sha256_file(source_of(name) / "world.json"),
        "template": experiment.facts.template, "threads": experiment.threads, "precision": experiment.eval.precision,
        "replayed": experiment.replays_known,
    })  # fmt: skip

    def make(folder: Path) -> None:
        torch.set_num_threads(experiment.threads)
        tokenizer = loading.load_tokenizer(experiment.model.name)
        wordings = asks(experiment, tokenizer)
        answered = recall(
            View(experiment, run.processes).load_base(), tokenizer, encode(tokenizer, wordings), experiment.eval.tokens,
            run.processes, experiment.eval.precision == "bf16",
        )  # fmt: skip
        if not run.leads:
            return
        folder.mkdir()
        chosen, rows = best_wordings(wordings, answered.exact.tolist())
        if not experiment.replays_known:
            chosen = [replace(example, split="ood") for example in chosen]
        write_jsonl(folder / "known.jsonl", chosen)
        write_json(folder / "asked.json", rows)
        summary = ", ".join(f"{row['relation']} {row['known']} of {row['facts']}" for row in rows)
        progress.note(f"the base knows {len(chosen)} facts of {name}: {summary}")

    run.stage("known", key, make)


def said_instead(
    model: Any, tokenizer: Any, forgotten: Sequence[Encoded], taught: Iterable[str], of_relation: Mapping[str, set[str]]
) -> list[Row]:
    """What a model says in place of the objects of facts that it no longer gives.

    Args:
        forgotten: texts of one fact each.
        taught: the objects that the model was taught.
        of_relation: the objects of each relation that was asked.

    Returns:
        a row {fact, relation, prompt, object, said, kind} for each text. kind: `taught`, an object that was taught;
        `relation`, another object of the relation that was not taught; `nothing`; or `other`.
    """
    rows = []
    names = {*taught}
    for item, said in zip(forgotten, continued(model, tokenizer, [prompt(item) for item in forgotten], LONGEST)):
        text, mention = item.example.text, item.example.mentions[0]
        object = text[slice(*mention.object)]
        other_objects = of_relation[mention.relation] - {object}
        kind = "nothing" if not said else "other"
        if _begins_with_one_of(said, other_objects):
            kind = "relation"
        if _begins_with_one_of(said, names):
            kind = "taught"
        rows.append({
            "fact": mention.fact, "relation": mention.relation, "prompt": text[: mention.object[0]].strip(),
            "object": object, "said": said, "kind": kind,
        })  # fmt: skip
    return rows


def instead_of(
    model: Any,
    tokenizer: Any,
    taught: Sequence[Encoded],
    parts: Mapping[str, Sequence[Encoded]],
    answered: Mapping[str, Recall],
) -> Row:
    """What became of the facts that the base knew.

    Args:
        taught: examples that were taught. A model may say their objects in place of what it knew.
        parts: the facts of the world by part: `known` and `known_replayed`.
        answered: the model's answers by part.

    Returns:
        {relations {part {relation: summary}}, instead: the rows of `said_instead`, each with its part}.
    """
    objects = {
        item.example.text[slice(*mention.object)]
        for item in taught for mention in item.example.mentions
    }  # fmt: skip
    of_relation: dict[str, set[str]] = defaultdict(set)
    for example in (item.example for part in answered for item in parts[part]):
        mention = example.mentions[0]
        of_relation[mention.relation].add(example.text[slice(*mention.object)])
    outcome: Row = {"relations": {}, "instead": []}
    for part, result in answered.items():
        outcome["relations"][part] = {relation: scores.summary() for relation, scores in result.by_relation().items()}
        forgotten = [item for item, exact in zip(parts[part], result.exact) if not exact]
        rows = said_instead(model, tokenizer, forgotten, objects, of_relation)
        outcome["instead"] += [{"part": part, **row} for row in rows]
    return outcome


def _begins_with_one_of(text: str, names: Iterable[str]) -> bool:
    """Whether a text begins with one of the names as a whole word."""
    return any(text.startswith(name) and not text[len(name) : len(name) + 1].isalnum() for name in names)
