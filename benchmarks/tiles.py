"""Which tile of a linear layer's gradient to reduce at once: milliseconds of Σ|g| by size, beside a plain matmul.

python benchmarks/tiles.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from crosstrace.trace import blocks, calls, reduction, rules

TILES = [1 << n for n in range(15, 23)]


def milliseconds(work: Callable[[], object], rounds: int = 5) -> float:
    times = []
    for _ in range(rounds + 1):
        clock = time.perf_counter()
        work()
        times.append(1000 * (time.perf_counter() - clock))
    return statistics.median(times[1:])


def main() -> None:
    torch.manual_seed(0)
    print("| examples × length | inputs → outputs | plain | " + " | ".join(f"{t:,}" for t in TILES) + " |")
    print("|---" * (3 + len(TILES)) + "|")
    for batch, length, inputs, outputs in [
        (32, 64, 512, 2048), (32, 64, 2048, 512), (32, 16, 512, 2048), (32, 16, 2048, 512), (8, 256, 512, 2048),
        (64, 64, 128, 352), (64, 9, 128, 352),
    ]:  # fmt: skip
        module = nn.Linear(inputs, outputs, bias=False)
        a, e = torch.randn(batch, length, inputs), torch.randn(batch, length, outputs)
        call = calls.Call("layer", module, (a,), {}, a, e, None, e=e)
        use, total = rules.Linear(call, "weight"), torch.zeros_like(module.weight)
        cells = [milliseconds(lambda: e.flatten(0, 1).t() @ a.flatten(0, 1))]  # noqa: B023
        for blocks.TILE in TILES:
            cells.append(milliseconds(lambda: reduction.reduce([use], {"abs": total}, slice(None))))  # noqa: B023
        print(
            f"| {batch} × {length} | {inputs} → {outputs} | " + " | ".join(f"{c:.1f}" for c in cells) + " |", flush=True
        )


if __name__ == "__main__":
    main()
