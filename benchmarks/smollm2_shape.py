"""Seconds of the work of an experiment at SmolLM2-135M's shape (random weights), before a change and after it.

    python benchmarks/smollm2_shape.py --label after
    git worktree add ../before COMMIT; PYTHONPATH=../before/src python benchmarks/smollm2_shape.py --label before

Each call measures the version of crosstrace that it imports, adds a column to benchmarks/results/smollm2_shape.json,
and prints all columns. An update has 16 biographies of 60 to 68 tokens and 32 questions of 18 to 23, as the default
world's have with this model's tokenizer; the trace's targets are the object's last three tokens. Times are medians over
the rounds (the first is apart where it is more), with the lowest and highest. Versions that can share the training's
forward with the trace of the object do so, and logits are computed where the version computes them.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
with contextlib.suppress(ImportError):  # versions before it
    from crosstrace.core import machine

    machine.prepare()  # as the command line does

import torch
from torch import Tensor

from crosstrace.core.files import read_json, write_json
from crosstrace.core.provenance import metadata
from crosstrace.sets.interventions import ablated, snapshot
from crosstrace.sets.paramset import ParamSet
from crosstrace.trace import OnlineTrace, TrainingTrace
from crosstrace.trace.engine import Engine
from crosstrace.training.losses import example_losses

Batch = dict[str, Tensor]
RESULTS = Path("benchmarks/results/smollm2_shape.json")
VOCABULARY = 49152


def model_of() -> torch.nn.Module:
    """The shape with random weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        intermediate_size=1536, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")  # as experiments load it


def batch_of(count: int, shortest: int, longest: int, trained: int | None, seed: int) -> tuple[Batch, Batch]:
    """Examples with what is trained (the last tokens; None: all), and with what is traced (the last three)."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (count, longest), generator=draw)
    length = torch.randint(shortest, longest + 1, (count, 1), generator=draw)
    length[0] = longest
    place = torch.arange(longest).expand(count, -1)
    mask = (place < length).long()

    def last(tokens: int) -> Tensor:
        return ids.masked_fill((place >= length) | (place < length - tokens), -100)

    inputs = {"input_ids": ids, "attention_mask": mask}
    return inputs | {"labels": last(trained or longest)}, inputs | {"labels": last(3)}


def losses_of(model: torch.nn.Module, batch: Batch, labels: list[Tensor]) -> list[Tensor]:
    """What the imported version's training computes."""
    try:
        from crosstrace.training.update_loss import task_losses
    except ImportError:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = model(**inputs).logits
        return [example_losses(logits, chosen) for chosen in labels]
    return task_losses(model, batch, labels)


BIO, TRACED_BIO = batch_of(16, 60, 68, None, 1)
QA, TRACED_QA = batch_of(32, 18, 23, 4, 2)


def measured(work: Callable[[], object], rounds: int) -> list[float]:
    times = []
    for _ in range(rounds):
        clock = time.perf_counter()
        work()
        times.append(time.perf_counter() - clock)
    return times


def steps(model: torch.nn.Module, rounds: int, bf16: bool) -> dict[str, list[float]]:
    """A step of mixed training without a trace, and with."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=bf16)
    tasks = ["bio", "qa"]

    def finish() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    given = {"bio": TRACED_BIO | {"trained": BIO["labels"]}, "qa": TRACED_QA | {"trained": QA["labels"]}}
    means: dict[str, Tensor] = {}

    def forward(task: str, batch: Batch, kept: bool) -> Tensor:
        with autocast():
            losses, traced = losses_of(model, batch, [batch["trained"], batch["labels"]])
        if kept:
            means[task] = losses.mean()
        return traced

    def plain() -> None:
        for task, batch in given.items():
            if task not in means:
                with autocast():
                    means[task] = losses_of(model, batch, [batch["trained"]])[0].mean()
        sum(means.values()).backward()
        means.clear()
        finish()

    def online(trace: OnlineTrace) -> None:
        if "forwards" in inspect.signature(OnlineTrace.step).parameters:
            trace.step(given, 1.0, {task: partial(forward, task) for task in given})
        else:
            trace.step({"bio": TRACED_BIO, "qa": TRACED_QA})
        plain()

    def shared(trace: TrainingTrace) -> None:
        with trace, trace.step():
            for task, batch in enumerate((BIO, QA)):
                with autocast():
                    loss = model(**batch, task=torch.full((len(batch["labels"]),), task)).loss
                loss.backward()
        finish()

    def backward_alone() -> None:
        """What the object's trace can't do without: from its loss to what the embeddings give."""
        looked_up: list[Tensor] = []
        hook = model.get_input_embeddings().register_forward_hook(lambda _, __, output: looked_up.append(output))
        for task, batch in given.items():
            traced = forward(task, batch, True)
            torch.autograd.grad(traced.sum(), looked_up[-1], retain_graph=True)
        hook.remove()
        plain()

    model.train()
    plain()
    found = {"plain step": measured(plain, rounds)}
    found["step and the object's backward, no sums"] = measured(backward_alone, rounds)
    for name, kind, work in (
        ("step, the object traced", OnlineTrace, online),
        ("step, the training's loss traced", TrainingTrace, shared),
    ):
        trace = kind(model, tasks, ("abs",), ("example", "step"))
        step = partial(work, trace)
        found[f"first {name}"], found[name] = measured(step, 1), measured(step, rounds)
        del trace, step
    model.eval()
    return found


def traces(model: torch.nn.Module, rounds: int) -> dict[str, list[float]]:
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}

    def open_sums(name: str, share: int) -> contextlib.AbstractContextManager[dict[str, Tensor]]:
        return contextlib.nullcontext({"abs": sums[name]})

    found = {}
    run = partial(Engine(model).run, TRACED_BIO, [slice(None)], open_sums)
    found["trace, first batch"], found["trace, batch"] = measured(run, 1), measured(run, rounds)
    run = partial(Engine(model).run, TRACED_BIO, [slice(None)], open_sums)
    found["trace again, first batch"] = measured(run, 1)
    return found


def asked(model: torch.nn.Module, rounds: int) -> dict[str, list[float]]:
    """Recall of 256 questions, and the same under an ablation of a random 5 %."""
    from crosstrace.data.facts import FactSettings, World
    from crosstrace.data.text import biographies, questions
    from crosstrace.data.tokens import encode
    from crosstrace.models.loading import load_tokenizer
    from crosstrace.training.evaluation import recall

    tokenizer = load_tokenizer("bundled")
    world = World.draw(FactSettings())
    items = encode(tokenizer, questions(world))[:256]
    texts = encode(tokenizer, biographies(world))[:64]
    base = snapshot(model)
    draw = torch.Generator().manual_seed(1)
    chosen = ParamSet({name: torch.rand(p.shape, generator=draw) < 0.05 for name, p in model.named_parameters()})

    def under() -> None:
        with ablated(model, chosen, "base", base):
            recall(model, tokenizer, items)

    return {
        "recall of 256 questions": measured(lambda: recall(model, tokenizer, items), rounds),
        "recall of 64 biographies": measured(lambda: recall(model, tokenizer, texts), rounds),
        "one intervention, 256 questions": measured(under, rounds),
    }


def table(columns: dict[str, dict]) -> str:
    rows = list(dict.fromkeys(name for column in columns.values() for name in column["seconds"]))
    lines = ["| seconds | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for name in rows:
        cells = []
        for column in columns.values():
            times = column["seconds"].get(name)
            spread = "" if not times or len(times) < 2 else f" [{min(times):.2f}, {max(times):.2f}]"
            cells.append(f"{statistics.median(times):.2f}{spread}" if times else "–")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--label", required=True, help="of the column")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=("bf16", "float32"), default="bf16", help="of the training")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    model = model_of()
    seconds = steps(model, options.rounds, options.precision == "bf16")
    seconds |= traces(model, options.rounds) | asked(model, options.rounds)
    columns = read_json(options.out) if options.out.exists() else {}
    about = metadata() | {"threads": torch.get_num_threads(), "precision": options.precision}
    columns[options.label] = {"seconds": seconds, **about}
    write_json(options.out, columns)
    print(f"{about['cpu']}, {about['threads']} threads, training in {options.precision}\n")
    print(table(columns))


if __name__ == "__main__":
    main()
