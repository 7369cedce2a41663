"""The experiment that an import writes beside its data, to be changed at will. It reads no data and no models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from crosstrace.importing.documents import UNASKED
from crosstrace.models import locating
from crosstrace.training.recipes import Phase, bio_only, mixed, two_stage

# For a pretrained model of about 160 M parameters, as in examples/pythia-160m.yaml. The default settings are for the
# tiny bundled base; their learning rate would wreck any larger model.
PRETRAINED: dict[str, Any] = {
    "train": {
        "optimiser": {"learning_rate": 1e-4, "betas": [0.9, 0.95], "weight_decay": 0.01, "warmup": 40},
        "checkpoint_every": 200,
        "recall_every": 100,
        "recall_examples": 120,
    },
    "trace": {"every": 5, "parts": 2, "examples": 400, "batch": 16},
    "analysis": {"central_fractions": [0.01, 0.05]},
    "interventions": {"fractions": [0.05, 0.2], "seeds": 1, "questions": 120},
    "mechanism": {
        "parts": ["gradients", "representations", "lens", "transfer"],
        "facts": 96,
        "together": 24,
        "questions": 48,
    },
    "jobs": 1,
}

# Less than the default experiment, which takes too long for a thousand facts in ten minutes on two cores.
SMALL: dict[str, Any] = {
    "trace": {"every": 5},
    "interventions": {"seeds": 2, "questions": 150},
    "mechanism": {"questions": 48},
}

# of documents with questions: what needs no wordings of relations, and no fact's subject in every text
DOCUMENTS: dict[str, Any] = {
    "eval": {"spoken": 32},
    "mechanism": {
        "parts": ["gradients", "representations", "signature", "positions"],
        "facts": 48,
        "together": 24,
        "questions": 48,
    },
}

Kind = Literal["facts", "rows", "documents"]  # of what was imported
BIO, QA, DOCUMENT = 16, 32, 8  # examples of each task in an update: texts that store, questions, whole documents
PASSES = 13  # how often each text that stores is seen


def experiment_settings(
    model: str | None,
    sizes: Mapping[str, int],
    kind: Kind,
    files: Mapping[str, Path],
) -> dict[str, Any]:
    """What the experiment sets beside its name and facts.

    Args:
        model: its name; the bundled base if None.
        sizes: task -> number of its texts; the task that stores is the first.
        kind: of what was imported.
        files: of the tasks, unless these are biographies and questions alone.
    """
    is_pretrained = model not in (None, locating.BUNDLED)
    values: dict[str, Any] = {"model": {"name": model}} if is_pretrained else {}
    store, *others = sizes
    recalling = [task for task in others if task != UNASKED and sizes[task]]
    texts = DOCUMENT if kind == "documents" else BIO  # of those that store
    steps = max(100, round(PASSES * (sizes[store] + sizes.get(UNASKED, 0)) / texts))
    strategies: dict[str, Sequence[Phase]] = {}
    if not recalling:
        strategies = {"store": bio_only(texts, steps) if is_pretrained else bio_only()}
    elif files:
        values |= _tasks(files, recalling)
        stored, recalled = _shares(sizes, texts, recalling)
        strategies = {
            "two_stage": [Phase("store", stored, steps=steps), Phase("recall", recalled, steps=steps)],
            "mixed": [Phase("mixed", stored | recalled, steps=steps)],
        }
    elif is_pretrained:
        strategies = {"two_stage": two_stage(texts, QA, steps), "mixed": mixed(texts, QA, steps)}
    if strategies:
        values["strategies"] = {
            name: [{"name": phase.name, "batch": phase.batch, "steps": phase.steps} for phase in phases]
            for name, phases in strategies.items()
        }
    values |= PRETRAINED if is_pretrained else SMALL
    if kind == "documents":
        values |= DOCUMENTS
    if kind == "rows":
        # Only the analysis of circuits needs neither both formats of a fact nor its subject, and for a pretrained model
        # it takes hours.
        values["mechanism"] = {"run": False} if is_pretrained else SMALL["mechanism"] | {"parts": ["circuit"]}
    if not recalling:
        values |= {"interventions": {"run": False}, "mechanism": {"run": False}}
    return values


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
