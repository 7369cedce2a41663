"""How the cost of a trace grows: seconds against parameters, examples and length, beside a plain backward pass.

    python benchmarks/growth.py

One of the three is moved at a time around a GPT-NeoX shape with random weights; trace and plain alternate, medians of
several rounds. Prints a table with the exponent of a power law fitted to each line (1 is linear), writes
benchmarks/results/growth.json and draws docs/growth.png.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import numpy as np
import torch
from trace_cost import Ours, batch_of, once, plain  # beside this file

from crosstrace.core.files import write_json
from crosstrace.core.provenance import metadata

WIDTHS, EXAMPLES, LENGTHS = [128, 256, 512, 768], [8, 16, 32, 64], [16, 32, 64, 128, 256]
MIDDLE = {"width": 256, "examples": 16, "length": 64}


def model_of(width: int) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM, GPTNeoXConfig

    config = GPTNeoXConfig(
        vocab_size=8192, hidden_size=width, num_hidden_layers=6, num_attention_heads=8, intermediate_size=4 * width,
        rotary_pct=0.25, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def point(width: int, examples: int, length: int, rounds: int) -> dict:
    model = model_of(width)
    batch = batch_of(model, length, examples)
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    contenders = {"trace": Ours(model), "plain": plain}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, contender in contenders.items():
            seconds, _ = once(contender, model, batch, sums)
            if number:
                times[name].append(seconds)
    found = {name: statistics.median(values) for name, values in times.items()}
    parameters = sum(p.numel() for p in model.parameters())
    return {"width": width, "examples": examples, "length": length, "parameters": parameters, **found}


def exponent(x: list[float], y: list[float]) -> float:
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/growth.json"))
    parser.add_argument("--figure", type=Path, default=Path("docs/growth.png"))
    options = parser.parse_args()
    from matplotlib.figure import Figure

    lines = {"parameters": ("width", WIDTHS), "examples": ("examples", EXAMPLES), "length": ("length", LENGTHS)}
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    found: dict[str, list[dict]] = {}
    print("| moved | values | trace, s | plain, s | exponent of trace | exponent of plain |\n|---|---|---|---|---|---|")
    for ax, (moved, (setting, values)) in zip(figure.subplots(1, 3, sharey=True), lines.items()):
        rows = found[moved] = [point(**{**MIDDLE, setting: value}, rounds=options.rounds) for value in values]
        x = [row[moved] for row in rows]
        cells = [" ".join(f"{row[name]:.3f}" for row in rows) for name in ("trace", "plain")]
        powers = [f"{exponent(x, [row[name] for row in rows]):.2f}" for name in ("trace", "plain")]
        print(f"| {moved} | {' '.join(f'{v:,}' for v in x)} | {' | '.join(cells)} | {' | '.join(powers)} |", flush=True)
        for name, look in (("trace", "o-"), ("plain", "s--")):
            ax.loglog(x, [row[name] for row in rows], look, color="#0072b2" if name == "trace" else "0.45", label=name)
        ax.set_xlabel({"length": "tokens an example", "examples": "examples in a batch"}.get(moved, moved))
        ax.set_xticks(x, [f"{v / 1e6:.0f} M" if v >= 1e6 else f"{v:g}" for v in x])
        ax.set_xticks([], minor=True)
        ax.grid(color="0.92")
    figure.axes[0].set_ylabel("seconds a batch")
    figure.axes[0].legend(frameon=False)
    figure.savefig(options.figure, dpi=120)
    about = metadata() | {"threads": torch.get_num_threads()}
    write_json(options.out, {"rows": found, "middle": MIDDLE, **about})
    print(f"\n{about['cpu']}, {about['cores']} cores; torch {about['versions']['torch']}; middle: {MIDDLE}")


if __name__ == "__main__":
    main()
