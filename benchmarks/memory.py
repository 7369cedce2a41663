"""The memory that a trace says it needs, beside what it takes: a random model of Llama-3.2-1B's shape in bfloat16.

    python benchmarks/memory.py                       # 1.2 billion parameters, 4 examples of 64 tokens
    python benchmarks/memory.py --shape small         # a minute less

The peak is that of the resident set during the trace, less what the process held before besides the weights (Linux).
Prints the estimate, the peak, their ratio and the seconds; writes benchmarks/results/memory.json.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from trace_cost import batch_of, forget_peak, resident
from transformers import AutoModelForCausalLM, LlamaConfig

from crosstrace.store import metadata, write_json
from crosstrace.trace import trace

SHAPES = {
    "llama-3.2-1b": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
    },
    "small": {
        "vocab_size": 50304, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8,
        "num_attention_heads": 16, "num_key_value_heads": 4, "tie_word_embeddings": False,
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b")
    parser.add_argument("--examples", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/memory.json"))
    options = parser.parse_args()

    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[options.shape], use_cache=False)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype)).eval()
    whole = batch_of(model, options.length, options.examples)
    batches = [
        {key: value[start : start + options.batch] for key, value in whole.items()}
        for start in range(0, options.examples, options.batch)
    ]
    told = []
    gc.collect()
    forget_peak()
    before, clock = resident(), time.perf_counter()
    (found,) = trace(model, batches, task="any", tell=lambda needed: (told.append(needed), print(needed, flush=True)))
    seconds = time.perf_counter() - clock
    (needed,) = told
    peak = resident(peak=True) - before + needed.weights
    finite = all(bool(value.isfinite().all()) for value in found.values.values())
    row = {
        "shape": options.shape,
        "dtype": options.dtype,
        "parameters": needed.parameters,
        "examples": options.examples,
        "batch": options.batch,
        "length": options.length,
        "seconds": seconds,
        "estimate": needed.peak,
        "peak": peak,
        "estimate_over_peak": needed.peak / peak,
        "coverage": found.meta["coverage"],
        "finite": finite,
    }
    print(f"peak {peak / 1e9:.2f} GB, estimate {needed.peak / 1e9:.2f} GB ({needed.peak / peak:.2f} of it), "
          f"{seconds:.0f} s; coverage {found.meta['coverage']}; finite: {finite}")  # fmt: skip
    write_json(options.out, {"cases": [row], **metadata()})


if __name__ == "__main__":
    main()
