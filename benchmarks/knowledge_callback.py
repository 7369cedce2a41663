"""`KnowledgeCallback` in real trainings by TRL: two-stage and mixed, on the bundled base.

    python benchmarks/knowledge_callback.py --logs FOLDER

Some people's biographies and questions are taught by `SFTTrainer`: all biographies and then the questions about half of
the people, or both at once. Printed are what every look found, the warnings, and the share of the time that looks
took. TensorBoard shows the curves in FOLDER. The figures are written to benchmarks/results/knowledge_callback.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import crosstrace as ct
from crosstrace.core.provenance import metadata

OUTPUT = Path(__file__).parent / "results" / "knowledge_callback.json"
BIOGRAPHIES, QUESTIONS = 32, 64  # in an update


def row_of(item: Any) -> dict[str, list[int]]:
    """An example as SFTTrainer takes it."""
    labels = torch.where(item.targets["train"], item.ids, -100)
    return {"input_ids": item.ids.tolist(), "labels": labels.tolist()}


def updates_of(parts: Sequence[tuple[list[Any], int]], updates: int, seed: int) -> Dataset:
    """The rows of a training, update after update: so many of each part, each part begun anew when it is used up."""
    draw = random.Random(seed)
    decks: list[list[Any]] = [[] for _ in parts]
    rows = []
    for _ in range(updates):
        for (items, count), deck in zip(parts, decks):
            for _ in range(count):
                deck[:] = deck or draw.sample(items, len(items))
                rows.append(row_of(deck.pop()))
    return Dataset.from_list(rows)


def train(model: Any, tokenizer: Any, parts: Sequence[tuple[list[Any], int]], updates: int, folder: Path,
          watched: dict[str, Any], seed: int) -> dict[str, Any]:  # fmt: skip
    """Train by TRL with the callback; what it saw and told."""
    settings = SFTConfig(
        output_dir=str(folder), max_steps=updates, per_device_train_batch_size=sum(count for _, count in parts),
        learning_rate=1e-3, lr_scheduler_type="cosine", warmup_steps=20, report_to="tensorboard",
        logging_steps=20, disable_tqdm=True, save_strategy="no", bf16=False, gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(), train_sampling_strategy="sequential", seed=seed,
    )  # fmt: skip
    trainer = SFTTrainer(model, settings, train_dataset=updates_of(parts, updates, seed), processing_class=tokenizer)
    watching = ct.KnowledgeCallback(trainer, **watched)
    trainer.add_callback(watching)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    told = [str(w.message) for w in caught if issubclass(w.category, ct.ForgettingWarning)]
    return {"history": watching.history, "warnings": told, "share": watching.time_share,
            "seconds": trainer.state.log_history[-1]["train_runtime"]}  # fmt: skip


def show(name: str, result: dict[str, Any]) -> None:
    """Print a training's looks."""
    print(f"\n{name}: {result['seconds']:.0f} s, of which looks took {result['share']:.1%}")
    looks: dict[int, dict[str, float]] = {}
    for row in result["history"]:
        looks.setdefault(row["step"], {})[row["part"]] = row["recall"]
    print("  update  " + "  ".join(looks[0]))
    for step, parts in looks.items():
        print(f"  {step:6d}  " + "  ".join(f"{value:{len(part)}.2f}" for part, value in parts.items()))
    print("  warned: " + ("; ".join(result["warnings"]) or "no"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logs", type=Path, required=True, help="a folder for TensorBoard")
    parser.add_argument("--people", type=int, default=300)
    parser.add_argument("--updates", type=int, default=300, help="of each phase")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    tokenizer = ct.load_tokenizer("bundled")
    results: dict[str, Any] = {}
    for seed in range(options.seeds):
        world = ct.World.draw(ct.FactSettings(people=options.people, seed=seed))
        bios = ct.encode(tokenizer, ct.biographies(world))
        asked = ct.encode(tokenizer, ct.questions(world))
        trained = [item for item in asked if item.example.split == "id"]
        watched = {"stored": [item.example for item in bios], "trained": [item.example for item in trained],
                   "held_out": [item.example for item in asked if item.example.split == "ood"]}  # fmt: skip
        recipes = {
            "two-stage": [[(bios, BIOGRAPHIES)], [(trained, QUESTIONS)]],
            "mixed": [[(bios, BIOGRAPHIES), (trained, QUESTIONS)]],
        }
        for name, phases in recipes.items():
            model = ct.load_model("bundled", "float32")
            for number, parts in enumerate(phases):
                key = f"{name}, phase {number + 1}, seed {seed}"
                folder = options.logs / key.replace(", ", "-").replace(" ", "-")
                results[key] = train(model, tokenizer, parts, options.updates, folder, watched, seed)
                show(key, results[key])
    chosen = {"people": options.people, "updates": options.updates, "biographies": BIOGRAPHIES, "questions": QUESTIONS}
    values = {"settings": chosen, "machine": metadata(), "trainings": results}
    options.output.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    print(f"\n{options.output}")


if __name__ == "__main__":
    main()
