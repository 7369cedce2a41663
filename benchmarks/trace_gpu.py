"""The trace on a GPU at the sizes of Pythia-2.8B and Llama-3.2-3B: random weights, bfloat16, length 64, batch 64.

    python benchmarks/trace_gpu.py                                          # a CUDA device with about 40 GiB, Triton
    python benchmarks/trace_gpu.py --shape tiny --device cpu --rounds 1     # that the program runs

Contenders alternate in one process: `plain`, an ordinary batched forward and backward whose gradients are added to
sums; `trace`, Σ|g| for every parameter; `loop`, one backward for each example, of which 8 are timed and the rest are
counted as these. Matmul rate: a product of two 8192 x 8192 matrices in the same dtype. The trace is compared with the
loop's on those 8 examples. Prints one line of JSON for each shape; writes benchmarks/results/trace_gpu.json.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from trace_cost import Ours, batch_of, loop, plain
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig

from crosstrace.store import metadata, write_json
from crosstrace.trace import kernels

SHAPES = {
    "pythia-2.8b": GPTNeoXConfig(
        vocab_size=50304, hidden_size=2560, num_hidden_layers=32, num_attention_heads=32, intermediate_size=10240,
        rotary_pct=0.25, max_position_embeddings=2048, use_cache=False,
    ),
    "llama-3.2-3b": LlamaConfig(
        vocab_size=128256, hidden_size=3072, num_hidden_layers=28, num_attention_heads=24, num_key_value_heads=8,
        head_dim=128, intermediate_size=8192, tie_word_embeddings=True, use_cache=False,
    ),
    "tiny": GPTNeoXConfig(
        vocab_size=300, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        use_cache=False,
    ),
}  # fmt: skip
ALONE = 8


def finished(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Floating point operations a second."""
    n = 8192 if device == "cuda" else 512
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(12):
        finished(device)
        clock = time.perf_counter()
        a @ b
        finished(device)
        times.append(time.perf_counter() - clock)
    return 2 * n**3 / statistics.median(times[2:])


def measured(shape: str, device: str, rounds: int, length: int, count: int) -> dict:
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(SHAPES[shape], dtype=torch.bfloat16).eval()
    batch = {key: value.to(device) for key, value in batch_of(model, length, count).items()}
    few = {key: value[:ALONE] for key, value in batch.items()}
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in model.named_parameters()}
    ours = Ours(model)
    work = {"plain": (plain, batch), "trace": (ours, batch), "loop": (loop, few)}
    times: dict[str, list[float]] = {name: [] for name in work}
    peaks: dict[str, int] = {}
    for number in range(rounds + 2):  # the first compiles and tunes
        for name, (contender, data) in work.items():
            gc.collect()
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            finished(device)
            clock = time.perf_counter()
            contender(model, data, sums)
            finished(device)
            if number >= 2:
                times[name].append(time.perf_counter() - clock)
            if device == "cuda":
                peaks[name] = torch.cuda.max_memory_allocated() - before
    seconds = {name: statistics.median(own) for name, own in times.items()}
    seconds["loop"] *= count / ALONE

    results = []
    for contender in (ours, loop):
        for total in sums.values():
            total.zero_()
        contender(model, few, sums)
        results.append({name: total.clone() for name, total in sums.items()})
    got, expected = results
    error = max(
        float((got[name] - value.cpu()).norm() / value.cpu().norm().clamp(min=1e-30))
        for name, value in expected.items()
    )
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    rate = matmul_rate(device, torch.bfloat16)
    return {
        "shape": shape,
        "parameters": sum(p.numel() for p in model.parameters()),
        "length": length,
        "examples": count,
        "kernel": kernels.available(torch.empty(1, device=device, dtype=torch.bfloat16)),
        "seconds": seconds,
        "rounds": times,
        "trace_over_plain": seconds["trace"] / seconds["plain"],
        "loop_over_trace": seconds["loop"] / seconds["trace"],
        "matmul_tflops": rate / 1e12,
        # forward, gradient of the inputs and per-example gradients: 2 operations each a weight and token
        "share_of_matmul_rate": 6 * linear * length * count / seconds["trace"] / rate,
        "extra_bytes": peaks or None,
        "largest_relative_error": error,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=["pythia-2.8b", "llama-3.2-3b"])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/trace_gpu.json"))
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "there is no CUDA device; --shape tiny --device cpu shows that the program runs\n")
    about = metadata()
    if options.device == "cuda":
        about["gpu"] = torch.cuda.get_device_name()
    rows = []
    for shape in options.shape:
        with contextlib.redirect_stdout(None):
            rows.append(measured(shape, options.device, options.rounds, options.length, options.examples))
        gc.collect()
        write_json(options.out, {"cases": rows, **about})
        print(json.dumps({key: value for key, value in rows[-1].items() if key != "rounds"}))


if __name__ == "__main__":
    main()
