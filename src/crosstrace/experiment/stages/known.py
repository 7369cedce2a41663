"""Facts of the world: which of them a base knows before it is taught, and what it says instead afterwards.

The base is asked every fact in every wording. Of each relation, the wording in which it answers most is kept, with the
facts that it answers in it: its known set. Those are asked again while it is taught and when it is, by each recipe.
An answer counts by its object; the end token, which an untaught base has no reason to write, is not asked for.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from crosstrace.core.files import sha256_file, write_json
from crosstrace.core.progress import Progress
from crosstrace.core.run_folder import Run
from crosstrace.data.text import Example, write_jsonl
from crosstrace.data.tokens import Encoded, encode
from crosstrace.experiment.config import Experiment
from crosstrace.experiment.studied import View, model_key
from crosstrace.experiment.world_facts import asks, source_of
from crosstrace.models import loading
from crosstrace.models.loading import pad_id
from crosstrace.models.modes import evaluating
from crosstrace.training.evaluation import Recall, recall

LONGEST = 12  # tokens that are read of what is said instead

Row = dict[str, Any]


def find_known(run: Run, experiment: Experiment, progress: Progress) -> None:
    """Ask the base what it knows: known/known.jsonl, each known fact in its relation's best wording, and
    known/asked.json, how many it answered of each relation in each wording."""
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
        every = asks(experiment, tokenizer)
        answered = recall(
            View(experiment, run.processes).load_base(), tokenizer, encode(tokenizer, every), experiment.eval.tokens,
            run.processes, experiment.eval.precision == "bf16",
        )  # fmt: skip
        if not run.leads:
            return
        folder.mkdir()
        chosen, rows = best_wordings(every, answered.exact.tolist())
        if not experiment.replays_known:
            chosen = [replace(example, split="ood") for example in chosen]
        write_jsonl(folder / "known.jsonl", chosen)
        write_json(folder / "asked.json", rows)
        told = ", ".join(f"{row['relation']} {row['known']} of {row['facts']}" for row in rows)
        progress.note(f"the base knows {len(chosen)} facts of {name}: {told}")

    run.stage("known", key, make)


def best_wordings(every: Sequence[Example], right: Sequence[bool]) -> tuple[list[Example], list[Row]]:
    """What is known, in the wording of each relation in which most is known (the first of several).

    Args:
        every: each fact in each wording.
        right: whether each was answered.

    Returns:
        the known facts in that wording, in their order; and for each relation {relation, facts, known, wording, example
        of that wording, wordings {wording: answered}}.
    """
    facts: dict[str, set[str]] = defaultdict(set)
    scores: dict[str, Counter[str]] = defaultdict(Counter)
    for example, is_right in zip(every, right):
        mention = example.mentions[0]
        facts[mention.relation].add(mention.fact)
        scores[mention.relation][mention.wording] += int(is_right)
    best = {relation: max(counts, key=lambda wording: counts[wording]) for relation, counts in scores.items()}
    in_best = [(item, ok) for item, ok in zip(every, right) if item.mentions[0].wording in best.values()]
    chosen = [item for item, ok in in_best if ok]
    rows = []
    for relation, wording in best.items():
        example = next(item.text for item, _ in in_best if item.mentions[0].wording == wording)
        rows.append({
            "relation": relation, "facts": len(facts[relation]), "known": scores[relation][wording],
            "wording": wording, "example": example, "wordings": dict(scores[relation]),
        })  # fmt: skip
    return chosen, rows


def said_instead(
    model: Any, tokenizer: Any, forgotten: Sequence[Encoded], taught: Iterable[str], of_relation: Mapping[str, set[str]]
) -> list[Row]:
    """What a model says where it does not give a fact's object.

    Args:
        forgotten: texts of one fact each.
        taught: the objects that the model was taught.
        of_relation: the objects of each relation that was asked.

    Returns:
        a row {fact, relation, prompt, object, said, kind} each; kind: `taught`, an object that was taught; `relation`,
        another object of the relation asked, which was not taught; `nothing`; or `other`.
    """
    rows = []
    names = {*taught}
    for item, said in zip(forgotten, continued(model, tokenizer, [_prompt(item) for item in forgotten])):
        text, mention = item.example.text, item.example.mentions[0]
        object = text[slice(*mention.object)]
        others = of_relation[mention.relation] - {object}
        kind = "nothing" if not said else "other"
        if _begins_with_one_of(said, others):
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
    """What became of the facts that the base knew: {relations {part {relation: summary}}, instead: rows of
    `said_instead` with their part}.

    Args:
        taught: examples of what was taught, whose objects a model may say in place of what it knew.
        parts: the facts of the world, `known` and `known_replayed`.
        answered: of the same, what the model answered.
    """
    objects = {
        item.example.text[slice(*mention.object)]
        for item in taught for mention in item.example.mentions
    }  # fmt: skip
    of_relation: dict[str, set[str]] = defaultdict(set)
    for example in (item.example for part in answered for item in parts[part]):
        mention = example.mentions[0]
        of_relation[mention.relation].add(example.text[slice(*mention.object)])
    found: Row = {"relations": {}, "instead": []}
    for part, result in answered.items():
        found["relations"][part] = {relation: own.summary() for relation, own in result.by_relation().items()}
        forgotten = [item for item, exact in zip(parts[part], result.exact) if not exact]
        rows = said_instead(model, tokenizer, forgotten, objects, of_relation)
        found["instead"] += [{"part": part, **row} for row in rows]
    return found


def _prompt(item: Encoded) -> list[int]:
    """The tokens before a text's object."""
    return item.ids[: int(item.mentions[0].object.nonzero()[0])].tolist()


def _begins_with_one_of(text: str, names: Iterable[str]) -> bool:
    return any(text.startswith(name) and not text[len(name) : len(name) + 1].isalnum() for name in names)


def continued(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], length: int = LONGEST) -> list[str]:
    """What a model says after each prompt, greedily, up to its end token, without special tokens or blanks around it.
    Prompts of one length go through it together, so none is padded."""
    config = GenerationConfig(
        max_new_tokens=length, do_sample=False, pad_token_id=pad_id(tokenizer), eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, prompt in enumerate(prompts):
        by_length[len(prompt)].append(number)
    found = [""] * len(prompts)
    device = next(model.parameters()).device
    with evaluating(model):
        for size, numbers in by_length.items():
            ids = torch.tensor([prompts[number] for number in numbers], device=device)
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
            for number, row in zip(numbers, out[:, size:].tolist()):
                found[number] = tokenizer.decode(row, skip_special_tokens=True).strip()
    return found
