"""What a micro-batch costs beside its tokens: `crosstrace.training.updates.ONCE`, by which batches are cut.

    python benchmarks/micro_batches.py

Times forward and backward of texts of one length, in several numbers, under the autocast that training takes here, and
fits seconds = a + b · tokens; a / b are the tokens that one more micro-batch costs as much as. Prints it for the
bundled base and for a model of SmolLM2-135M's shape with random weights, with the lowest and highest of the rounds, and
writes benchmarks/results/micro_batches.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from smollm2_shape import model_of  # (prepares the machine as the command line does)

from crosstrace.core.files import write_json
from crosstrace.core.provenance import metadata
from crosstrace.models.loading import load_model, trains_in_bf16
from crosstrace.training.update_loss import task_losses

LENGTH = 16
COUNTS = (8, 16, 32, 64, 128)
MODELS = {"bundled": lambda: load_model("bundled", dtype="float32"), "smollm2-135m": model_of}


def seconds(model: Any, count: int, bf16: bool) -> float:
    """Of forward and backward of so many texts."""
    ids = torch.randint(3, model.config.vocab_size, (count, LENGTH))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    labels = ids.clone()
    labels[:, : LENGTH // 2] = -100
    clock = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = task_losses(model, batch, [labels])[0].mean()
    loss.backward()
    return time.perf_counter() - clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=MODELS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/micro_batches.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bf16 = trains_in_bf16("auto", torch.device("cpu"))
    rows = {}
    for name, make in MODELS.items():
        if options.only not in (None, name):
            continue
        model = make().train()
        seconds(model, COUNTS[-1], bf16)
        fits = []
        for _ in range(options.rounds):
            times = [seconds(model, count, bf16) for count in COUNTS]
            b, a = np.polyfit([count * LENGTH for count in COUNTS], times, 1)
            fits.append(a / b)
        rows[name] = {"once": statistics.median(fits), "lowest": min(fits), "highest": max(fits), "bf16": bf16}
        print(f"{name}: a micro-batch costs as much as {rows[name]['once']:.0f} tokens "
              f"[{min(fits):.0f}, {max(fits):.0f}] more", flush=True)  # fmt: skip
        write_json(options.out, {"threads": options.threads, "models": rows, **metadata()})


if __name__ == "__main__":
    main()
