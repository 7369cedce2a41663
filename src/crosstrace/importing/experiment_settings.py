"""The experiment that an import writes beside its data, to be changed at will. It reads no data and no models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from crosstrace.models import locating
from crosstrace.training.recipes import bio_only, mixed, two_stage

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

BIO, QA = 16, 32  # examples of each task in an update
PASSES = 13  # how often each text that stores is seen


def experiment_settings(model: str | None, sizes: Mapping[str, int], *, is_rows: bool) -> dict[str, Any]:
    """What the experiment sets beside its name and facts.

    Args:
        model: its name; the bundled base if None.
        sizes: task -> number of its texts.
        is_rows: whether the data are rows of text, not facts.
    """
    is_pretrained = model not in (None, locating.BUNDLED)
    values: dict[str, Any] = {"model": {"name": model}} if is_pretrained else {}
    steps = max(100, round(PASSES * sizes["bio"] / BIO))
    strategies = {}
    if is_pretrained:
        strategies = {"two_stage": two_stage(BIO, QA, steps), "mixed": mixed(BIO, QA, steps)}
    if not sizes["qa"]:
        strategies = {"store": bio_only(BIO, steps) if is_pretrained else bio_only()}
    if strategies:
        values["strategies"] = {
            name: [{"name": phase.name, "batch": phase.batch, "steps": phase.steps} for phase in phases]
            for name, phases in strategies.items()
        }
    values |= PRETRAINED if is_pretrained else SMALL
    if is_rows:
        # Only the analysis of circuits needs neither both formats of a fact nor its subject, and for a pretrained model
        # it takes hours.
        values["mechanism"] = {"run": False} if is_pretrained else SMALL["mechanism"] | {"parts": ["circuit"]}
    if not sizes["qa"]:
        values |= {"interventions": {"run": False}, "mechanism": {"run": False}}
    return values
