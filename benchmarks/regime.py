"""Recall over training of one recipe in one world, without traces: to look for settings in which recipes differ.

    python benchmarks/regime.py examples/smollm2-135m.yaml mixed --facts.people 200 --train.optimiser.learning_rate 2e-4

Takes an experiment, one of its strategies, and changes as `crosstrace run` does. Asks some trained questions, held-out
questions, objects of biographies and facts of the world that the base knew (`eval.known`; replayed ones apart) every so
many updates, prints a line for each time, and adds all of them to
benchmarks/results/regime.jsonl, with what was changed, also if it is stopped before its end. Nothing else is kept.
"""
# ruff: noqa: E402  (the machine is prepared before torch is loaded)

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
from crosstrace.core import machine

machine.prepare()  # as the command line does

import torch

from crosstrace.core.provenance import metadata
from crosstrace.data.text import texts
from crosstrace.data.tokens import Encoded, encode
from crosstrace.data.world_facts import best_wordings
from crosstrace.experiment import config
from crosstrace.experiment.config import Experiment
from crosstrace.experiment.examples import asks, sample
from crosstrace.models import loading
from crosstrace.training.evaluation import recall
from crosstrace.training.listeners import Listener
from crosstrace.training.trainer import train


class Curve(Listener):
    """Asks now and then; a listener of the training."""

    def __init__(self, tokenizer: Any, parts: dict[str, list[Any]], every: int) -> None:
        self.tokenizer, self.parts, self.every = tokenizer, parts, every
        self.began, self.asking, self.rows = time.time(), 0.0, []

    def on_updated(self, model: Any, update: int, phase: str, last: bool) -> None:
        if update % self.every and not last:
            return
        clock = time.time()
        found = {name: recall(model, self.tokenizer, items, bf16=True) for name, items in self.parts.items()}
        row = {"update": update, "phase": phase} | {n: round(r.summary()["exact_match"], 3) for n, r in found.items()}
        self.asking += time.time() - clock
        row["seconds"] = round(time.time() - self.began - self.asking)  # of training alone
        self.rows.append(row)
        print(json.dumps(row), flush=True)


def known(experiment: Experiment, model: Any, tokenizer: Any) -> dict[str, list[Encoded]]:
    """The facts of the world that the base knows, as a run has them: those that may be replayed, and the others."""
    if experiment.eval.known is None:
        return {}
    wordings = asks(experiment, tokenizer)
    chosen, _ = best_wordings(wordings, recall(model, tokenizer, encode(tokenizer, wordings), bf16=True).exact.tolist())
    replayed = [item for item in chosen if experiment.replays_known and item.split == "id"]
    others = [item for item in chosen if item not in replayed]
    return {"known": encode(tokenizer, others), "known_replayed": encode(tokenizer, replayed)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("strategy")
    parser.add_argument("--every", type=int, default=25, help="updates between two times that are asked")
    parser.add_argument("--asked", type=int, default=150, help="examples of each kind that are asked")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/regime.jsonl"))
    options, rest = parser.parse_known_args()
    changes = {name.removeprefix("--"): value for name, value in zip(rest[::2], rest[1::2], strict=True)}
    experiment = config.override(config.load(options.experiment), changes)
    torch.set_num_threads(options.threads)
    place = experiment.model
    tokenizer, model = loading.load_tokenizer(place.name), loading.load_model(place.name, place.dtype, place.attention)
    own = texts(experiment.facts)
    asked = {split: [item for item in own["qa"] if item.split == split] for split in ("id", "ood")}
    parts = {"trained": asked["id"], "held_out": asked["ood"], "bio": own["bio"]}
    encoded = {name: encode(tokenizer, items) for name, items in parts.items()} | known(experiment, model, tokenizer)
    encoded = {name: items for name, items in encoded.items() if items}
    strategy = experiment.strategies[options.strategy]
    some = {name: sample(items, options.asked // (6 if name == "bio" else 1)) for name, items in encoded.items()}
    curve = Curve(tokenizer, some, options.every)
    sizes = {
        name: f"{len(items)} of {sum(len(x.ids) for x in items) / len(items):.0f} tokens"
        for name, items in encoded.items()
    }
    print(options.strategy, changes, sizes, flush=True)
    curve.on_updated(model, 0, "base", True)
    bf16 = loading.trains_in_bf16(experiment.train.precision, next(model.parameters()).device)
    row = {"strategy": options.strategy, "changes": changes, "threads": options.threads, "curve": curve.rows}
    row |= {"stopped": True, "config": config.plain(experiment), "machine": metadata()}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was measured until then is kept
    try:
        with tempfile.TemporaryDirectory(prefix="crosstrace-regime-") as folder:
            train(
                model, tokenizer, strategy,
                {"bio": encoded["bio"], "qa": encoded["trained"], "known": encoded.get("known_replayed", [])},
                Path(folder), experiment.train, bf16=bf16, listeners=[curve],
            )  # fmt: skip
        del row["stopped"]
    finally:
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
