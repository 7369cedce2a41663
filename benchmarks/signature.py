"""Integrated gradients of embeddings against Shapley values of groups of tokens: which add up, at what cost.

    python benchmarks/signature.py runs/smollm2 two_stage

Takes a run, one of its models, and some of its biographies and held-out questions. Prints, for each number of points of
a Gauss-Legendre sum, by how much of the drop in log-probability the tokens' attributions miss it (all tokens at the
mean embedding), and the seconds of that; then the seconds of all 32 coalitions of the groups of tokens, whose Shapley
values add up by construction.
"""
# ruff: noqa: E402  (the machine is prepared before torch is loaded)

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
from crosstrace.core import machine

machine.prepare()  # as the command line does

import numpy as np
import torch

from crosstrace.analyses.signature import WHOLE, coalitions, embedding_baseline
from crosstrace.core.files import read_json
from crosstrace.core.provenance import metadata
from crosstrace.data.text import read_jsonl
from crosstrace.data.tokens import Encoded, encode
from crosstrace.experiment import config
from crosstrace.experiment.examples import sample
from crosstrace.models import loading
from crosstrace.models.modes import differentiating
from crosstrace.training.losses import example_losses


def missed(model: Any, item: Encoded, baseline: torch.Tensor, points: int) -> float:
    """|Σ_t A_t − drop| / |drop| of one text, A_t = (e_t − ē) · ∫₀¹ ∂F/∂e_t dα by so many points."""
    ids, labels = item.ids[None], torch.where(item.targets["object"], item.ids, -100)[None]
    mask = torch.ones_like(ids)

    def score(change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        with model.get_input_embeddings().register_forward_hook(lambda module, args, output: change(output)):
            return -example_losses(model(input_ids=ids, attention_mask=mask).logits, labels)[0]

    with torch.no_grad():
        at = model.get_input_embeddings()(ids)
        away = baseline.to(at).expand_as(at)
        drop = float(score(lambda _: at) - score(lambda _: away))
    total = 0.0
    for place, weight in zip(*np.polynomial.legendre.leggauss(points)):
        here = (away + (1 + float(place)) / 2 * (at - away)).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(score(lambda _, here=here: here), here)
        total += float(weight) / 2 * float((gradient * (at - away)).sum())
    return abs(total - drop) / abs(drop)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("strategy")
    parser.add_argument("--texts", type=int, default=8, help="of each format")
    parser.add_argument("--points", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/signature.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    experiment = config.load(options.run / "config.yaml")
    phases = experiment.strategies[options.strategy]
    tokenizer = loading.load_tokenizer(experiment.model.name)
    model = loading.load_model(str(options.run / "models" / options.strategy / phases[-1].name), "float32")
    asked = [item for item in read_jsonl(options.run / "data/qa.jsonl") if item.split == "ood"]
    told = encode(tokenizer, sample(read_jsonl(options.run / "data/bio.jsonl"), options.texts))
    texts = {
        "biographies": [item.about(number % len(item.mentions)) for number, item in enumerate(told)],
        "questions": [item.about(0) for item in encode(tokenizer, sample(asked, options.texts))],
    }
    baseline = embedding_baseline(model, [item for items in texts.values() for item in items])
    rows: list[dict[str, Any]] = []
    for name, items in texts.items():
        for points in options.points:
            clock = time.perf_counter()
            with differentiating(model):
                errors = [missed(model, item, baseline, points) for item in items]
            row = {"texts": name, "n": len(items), "points": points, "seconds": time.perf_counter() - clock}
            row |= {"missed": [round(error, 4) for error in sorted(errors)], "median": float(np.median(errors))}
            rows.append(row)
            print(json.dumps(row), flush=True)
        clock = time.perf_counter()
        logprob, _ = coalitions(model, items, baseline, pad_id=loading.pad_id(tokenizer))
        row = {"texts": name, "n": len(items), "coalitions": WHOLE + 1, "seconds": time.perf_counter() - clock}
        row["drop"] = [round(float(x), 2) for x in logprob[:, WHOLE] - logprob[:, 0]]
        rows.append(row)
        print(json.dumps(row), flush=True)
    about = {
        "run": experiment.name,
        "strategy": options.strategy,
        "training": read_json(options.run / "metadata.json")["git"],
    }
    options.out.write_text(json.dumps(about | {"rows": rows, "machine": metadata()}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
