"""The experiment that an import writes beside its data, to be changed at will. It reads no data and no models."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from crosstrace.data.text import Example
from crosstrace.experiment.settings import TraceSettings
from crosstrace.importing.documents import UNASKED
from crosstrace.models import locating
from crosstrace.training.recipes import Phase, bio_only

# For a pretrained model of about 135 M parameters: those of examples/smollm2-own.yaml, which were found on SmolLM2-135M
# (docs/findings.md, section 1). The default settings are for the tiny bundled base; their learning rate would wreck any
# larger model.
PRETRAINED: dict[str, Any] = {
    "train": {
        "optimiser": {"learning_rate": 7e-4, "betas": [0.9, 0.95], "weight_decay": 0.01, "warmup": 20},
        "checkpoint_every": 70,
        "recall_every": 20,
        "recall_examples": 90,
    },
    "eval": {"precision": "bf16"},
    "trace": {"every": 5, "parts": 2, "examples": 180, "batch": 32, "keep": "means"},
    "analysis": {"central_fractions": [0.01, 0.05, 0.2]},
    "interventions": {"fractions": [0.05, 0.2], "seeds": 1, "questions": 90},
    "mechanism": {"parts": ["gradients", "representations", "lens"], "facts": 48, "together": 24, "draws": 1},
    "jobs": 1,  # two of them would need twice the memory
}
# With the weight of the texts that store, questions are learned by heart before there is anything to retrieve.
QUESTIONS_WEIGHT = 0.1

# Less than the default experiment, which takes too long for a thousand facts in ten minutes on two cores.
SMALL: dict[str, Any] = {
    "trace": {"every": 5},
    "interventions": {"seeds": 2, "questions": 150},
    "mechanism": {"questions": 48},
}

SPOKEN = 32  # tokens of an answer that is generated, where a question has several right answers

# of documents with questions: what needs no wordings of relations, and no fact's subject in every text
DOCUMENTS: dict[str, Any] = {
    "mechanism": {
        "parts": ["gradients", "representations", "signature", "positions"],
        "facts": 24,
        "together": 24,
        "questions": 24,
        "draws": 1,
    },
}

Kind = Literal["facts", "rows", "documents"]  # of what was imported
DOCUMENT, QA = 8, 32  # examples in an update: documents (of the tiny base), questions
MOST_TEXTS = 96  # texts that store in an update
PASSES = 13  # how often each text that stores is seen
UPDATE = 2000  # tokens of the texts that store in an update
AT_ONCE = 3200  # tokens whose activations a pretrained model holds at once while it is traced
MOST_THREADS = 16  # more of them help little
BYTES = 4  # of text, in a token of most tokenizers


def experiment_settings(
    model: str | None,
    examples: Mapping[str, Sequence[Example]],
    kind: Kind,
    files: Mapping[str, Path],
) -> dict[str, Any]:
    """What the experiment sets beside its name and facts.

    Args:
        model: its name; the bundled base if None.
        examples: of each task; the task that stores is the first.
        kind: of what was imported.
        files: of the tasks, unless these are biographies and questions alone.
    """
    is_pretrained = model not in (None, locating.BUNDLED)
    values: dict[str, Any] = {"model": {"name": model}} if is_pretrained else {}
    sizes = {task: len(items) for task, items in examples.items()}
    store, *others = sizes
    stored = [*examples[store], *examples.get(UNASKED, ())]
    recalling = [task for task in others if task != UNASKED and sizes[task]]
    texts = _texts_of_an_update(stored) if is_pretrained else DOCUMENT
    steps = max(100, round(PASSES * len(stored) / texts))
    if files and recalling:
        values |= _tasks(files, recalling)
    if files or is_pretrained:
        values["strategies"] = _strategies(sizes, recalling, texts, steps, is_pretrained)
    elif not recalling:
        values["strategies"] = {"store": [_plain(phase) for phase in bio_only()]}
    values |= PRETRAINED | {"threads": min(MOST_THREADS, os.cpu_count() or 1)} if is_pretrained else SMALL
    if kind == "documents":
        values |= DOCUMENTS
    if kind == "documents" or any(item.aliases for items in examples.values() for item in items):
        values["eval"] = values.get("eval", {}) | {"spoken": SPOKEN}
    if is_pretrained:
        longest = max(_tokens(item.text) for items in examples.values() for item in items)
        values["trace"] = values["trace"] | {"batch": min(32, max(1, AT_ONCE // longest))}
        mechanism = {"together": min(24, max(4, AT_ONCE // longest))}
        if kind == "documents":  # each of these facts takes 32 passes through the model
            mechanism["signature"] = min(24, max(8, 2 * texts))
        values["mechanism"] = values["mechanism"] | mechanism
    if kind == "rows":
        # Only the analysis of circuits needs neither both formats of a fact nor its subject, and for a pretrained model
        # it takes hours.
        values["mechanism"] = {"run": False} if is_pretrained else SMALL["mechanism"] | {"parts": ["circuit"]}
    if not recalling:
        values |= {"interventions": {"run": False}, "mechanism": {"run": False}}
    # each part of the trace needs someone of each task
    parts = values["trace"].get("parts", TraceSettings().parts)
    for task, items in examples.items():
        trained = {item.person for item in items if item.split == "id" or task not in recalling}
        if trained and len(trained) < parts:
            parts = max(2, len(trained))
            values["trace"] = values["trace"] | {"parts": parts}
    return values


def _tokens(text: str) -> int:
    """About how many tokens a text has."""
    return 1 + len(text.encode()) // BYTES


def _texts_of_an_update(stored: Sequence[Example]) -> int:
    """How many texts that store make an update of about UPDATE tokens."""
    mean = sum(_tokens(item.text) for item in stored) / len(stored)
    return min(MOST_TEXTS, len(stored), max(2, round(UPDATE / mean)))


def _strategies(
    sizes: Mapping[str, int], recalling: Sequence[str], texts: int, steps: int, is_pretrained: bool
) -> dict[str, Any]:
    """Two-stage and mixed training, or the texts alone if there are no questions, as plain values."""
    stored, recalled = _shares(sizes, texts, recalling)
    if not recalling:
        return {"store": [_plain(Phase("store", stored, steps))]}
    weight = round(QUESTIONS_WEIGHT / len(recalling), 3)
    weights = dict.fromkeys(recalling, weight) if is_pretrained else {}
    two_stage = [Phase("store", stored, steps), Phase("recall", recalled, steps)]
    mixed = [Phase("mixed", stored | recalled, steps, weights=weights)]
    return {"two_stage": [*map(_plain, two_stage)], "mixed": [*map(_plain, mixed)]}


def _plain(phase: Phase) -> dict[str, Any]:
    values = {"name": phase.name, "batch": phase.batch, "steps": phase.steps}
    return values | ({"weights": phase.weights} if phase.weights else {})


def leave_out_facts(values: dict[str, Any]) -> None:
    """Change an experiment on texts in which no fact is known: whole texts are traced, and no mechanism is studied."""
    values["mechanism"] = {"run": False}
    values["trace"] = values.get("trace", {}) | {"targets": "train"}


def _tasks(files: Mapping[str, Path], recalling: Sequence[str]) -> dict[str, Any]:
    """The tasks of documents, and the part that tells recall.

    If the questions are of several kinds, recall shows best in those that are worded anew (generalization).
    """
    roles = dict.fromkeys(recalling, "recall") | {UNASKED: "other"}
    best = next((task for task in ("qa", "generalization") if task in recalling), recalling[0])
    tasks = {task: {"role": roles.get(task, "store"), "source": str(file)} for task, file in files.items()}
    return {"tasks": tasks, "outcome": f"{best}_ood"}


def _shares(sizes: Mapping[str, int], texts: int, recalling: Sequence[str]) -> tuple[dict[str, int], dict[str, int]]:
    """The examples of each task in an update: of those that store, by their number, and of those that recall."""
    store = next(iter(sizes))
    stored = {store: texts}
    if sizes.get(UNASKED):
        unasked = round(texts * sizes[UNASKED] / (sizes[store] + sizes[UNASKED]))
        stored[UNASKED] = min(max(1, unasked), texts - 1)
        stored[store] -= stored[UNASKED]
    return stored, {task: max(1, QA // len(recalling)) for task in recalling}
