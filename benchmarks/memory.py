"""The memory of a trace beside its estimate, and that of recall: random models of Llama-3.2-1B's shape in bfloat16.

    python benchmarks/memory.py                       # 1.2 billion parameters, vocabulary of 128,256
    python benchmarks/memory.py --shape small         # a minute less
    python benchmarks/memory.py --only recall         # 128 texts of 100 tokens with 40 answered ones each

A peak is that of the resident set meanwhile, less what the process held before besides the weights (Linux). Writes
benchmarks/results/memory.json, whose other case stays if one alone was asked for.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from trace_cost import batch_of, forget_peak, resident
from transformers import AutoModelForCausalLM, LlamaConfig

from crosstrace.core.files import read_json, write_json
from crosstrace.core.provenance import metadata
from crosstrace.data.text import Example, Mention
from crosstrace.data.tokens import Encoded, Places
from crosstrace.trace import trace
from crosstrace.training.evaluation import recall

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
    parser.add_argument("--only", choices=CASES)
    parser.add_argument("--examples", type=int, default=4, help="of the trace")
    parser.add_argument("--length", type=int, default=64, help="tokens of an example of the trace")
    parser.add_argument("--batch", type=int, default=2, help="examples of the trace in one pass")
    parser.add_argument("--texts", type=int, default=128, help="of recall, of 100 tokens each")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/memory.json"))
    options = parser.parse_args()

    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[options.shape], use_cache=False)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype)).eval()
    cases: dict[str, Any] = read_json(options.out)["cases"] if options.out.is_file() and options.only else {}
    for name, measure in CASES.items():
        if options.only in (None, name):
            cases[name] = {"shape": options.shape, "dtype": options.dtype, **measure(model, options)}
            write_json(options.out, {"cases": cases, **metadata()})


def of_trace(model: Any, options: argparse.Namespace) -> dict[str, Any]:
    """The peak of a trace, beside what it said before that it would need."""
    whole = batch_of(model, options.length, options.examples)
    batches = [
        {key: value[start : start + options.batch] for key, value in whole.items()}
        for start in range(0, options.examples, options.batch)
    ]
    told = []
    gc.collect()
    forget_peak()
    before, clock = resident(), time.perf_counter()
    (found,) = trace(model, batches, task="any", tell=told.append)
    seconds = time.perf_counter() - clock
    (needed,) = told
    peak = resident(peak=True) - before + needed.weights
    finite = all(bool(value.isfinite().all()) for value in found.values.values())
    print(f"trace: peak {peak / 1e9:.2f} GB, estimate {needed.peak / 1e9:.2f} GB ({needed.peak / peak:.2f} of it), "
          f"{seconds:.0f} s; coverage {found.meta['coverage']}; finite: {finite}")  # fmt: skip
    return {
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


def of_recall(model: Any, options: argparse.Namespace) -> dict[str, Any]:
    """The peak of `recall` over texts of 100 tokens, of which 40 are answers, beside the weights."""
    texts = [_text(torch.randint(4, model.config.vocab_size, (100,))) for _ in range(options.texts)]
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    gc.collect()
    forget_peak()
    before, clock = resident(), time.perf_counter()
    found = recall(model, _Tokenizer(), texts)
    seconds = time.perf_counter() - clock
    beside = resident(peak=True) - before
    print(f"recall: weights {weights / 1e9:.2f} GB, peak {beside / 1e9:.2f} GB beside them, {seconds:.0f} s for "
          f"{options.texts} texts; all logits at once would take "
          f"{4e-9 * options.texts * 100 * model.config.vocab_size:.1f} GB in float32")  # fmt: skip
    assert len(found.exact) == options.texts
    return {"texts": options.texts, "length": 100, "seconds": seconds, "weights": weights, "beside": beside}


def _text(ids: torch.Tensor) -> Encoded:
    nothing = torch.zeros(len(ids), dtype=torch.bool)
    asked = nothing.clone()
    asked[-40:] = True
    mention = Mention("any", "any", "any", (0, 1), (), (0, 1))
    example = Example("any", "qa", "any", "any", "ood", ((0, 1),), (mention,))
    return Encoded(example, ids, {"answer": asked}, (Places(nothing, nothing, asked),))


class _Tokenizer:
    pad_token_id = eos_token_id = 0


CASES = {"trace": of_trace, "recall": of_recall}


if __name__ == "__main__":
    main()
