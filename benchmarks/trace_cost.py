"""What the trace costs beside a plain backward pass, a loop over examples, and libraries of per-example gradients.

    make bench                                   # installs the libraries too
    python benchmarks/trace_cost.py --quick      # the headline shape alone, without libraries

Every contender computes Σ_i |∂ℓ_i/∂θ| from the same model (random weights), the same batch and the same loss, mean
cross-entropy of each example's tokens; `plain` is an ordinary batched forward and backward, the floor. Libraries form
the gradients of single examples at full dimension, without projections, and the same sum is taken of them. Some give
those of certain layers alone: the table says what share of the parameters each covers and which modules it lacks, and
the headline compares the trace with the best library that covers every parameter.
Contenders alternate, round after round, in one process; times are medians, memory is the peak of the resident set
above what was there before (model, accumulators; zero where freed memory was still held), errors are relative to the
loop's result, the largest over the parameters that the contender covers.
Prints a table, writes benchmarks/results/trace_cost.json, and ends with one line of JSON for the headline shape.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn

from crosstrace.core.files import write_json
from crosstrace.core.provenance import metadata
from crosstrace.models.loading import load_model
from crosstrace.trace import OnlineTrace, SummedTrace, TrainingTrace
from crosstrace.trace.engine import Engine
from crosstrace.training.losses import example_losses
from crosstrace.training.update_loss import task_losses

Sums = dict[str, Tensor]
PYTHIA = {
    "pythia-70m": {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 2048},
    "pythia-160m": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
}
HEADLINE = ("pythia-70m", 64, 32)
SHORT, SHORTEST, LONG = ("pythia-70m", 16, 32), ("pythia-70m", 9, 64), ("pythia-70m", 256, 8)


def model_of(shape: str) -> nn.Module:
    if shape == "bundled":
        return load_model("bundled")
    from transformers import AutoModelForCausalLM, GPTNeoXConfig

    config = GPTNeoXConfig(
        vocab_size=50304, rotary_pct=0.25, max_position_embeddings=2048, **PYTHIA[shape], use_cache=False
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def batch_of(model: nn.Module, length: int, count: int) -> Sums:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, model.config.vocab_size, (count, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def losses_of(model: nn.Module, batch: Sums) -> Tensor:
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return example_losses(output.logits, batch["labels"])


# ---------------------------------------------------------------------------------------------- contenders


def plain(model: nn.Module, batch: Sums, sums: Sums) -> None:
    """The floor: it gives Σ_i g_i only."""
    parameters = [model.get_parameter(name) for name in sums]
    for total, gradient in zip(sums.values(), torch.autograd.grad(losses_of(model, batch).sum(), parameters)):
        total.add_(gradient)


class Ours:
    """The engine keeps its plan from the first batch, as it does over a data set."""

    def __init__(self, model: nn.Module) -> None:
        self.engine = Engine(model)

    def __call__(self, model: nn.Module, batch: Sums, sums: Sums) -> None:
        self.engine.run(batch, [slice(None)], lambda name, share: contextlib.nullcontext({"abs": sums[name]}))


class TwoSums(Ours):
    """Σg beside Σ|g|, as the online trace needs them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.totals = {name: torch.zeros_like(p) for name, p in model.named_parameters()}

    def __call__(self, model: nn.Module, batch: Sums, sums: Sums) -> None:
        def open_sums(name: str, share: int) -> contextlib.AbstractContextManager[Sums]:
            return contextlib.nullcontext({"abs": sums[name], "sum": self.totals[name]})

        self.engine.run(batch, [slice(None)], open_sums)


def loop(model: nn.Module, batch: Sums, sums: Sums) -> None:
    """One forward and backward for each example."""
    parameters = [model.get_parameter(name) for name in sums]
    for i in range(len(batch["labels"])):
        loss = losses_of(model, {key: value[i : i + 1] for key, value in batch.items()}).sum()
        for total, gradient in zip(sums.values(), torch.autograd.grad(loss, parameters)):
            total.add_(gradient.abs_())


def functional_loss(model: nn.Module, parameters: Sums, example: tuple[Tensor, Tensor]) -> Tensor:
    """The loss of one example, its token ids and labels, as a function of the parameters."""
    ids, labels = example
    # no mask tensor: with one, transformers branches on its content, which vmap cannot follow
    inputs = {"input_ids": ids.unsqueeze(0), "position_ids": torch.arange(len(ids)).unsqueeze(0)}
    logits = torch.func.functional_call(model, parameters, kwargs=inputs).logits
    return nn.functional.cross_entropy(logits[0, :-1], labels[1:])


def vmap(model: nn.Module, batch: Sums, sums: Sums) -> None:
    """torch.func: the gradient of one example, vectorised over examples."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    gradients = torch.func.vmap(torch.func.grad(partial(functional_loss, model)), in_dims=(None, 0))
    found = gradients(parameters, (batch["input_ids"], batch["labels"]))
    for name, total in sums.items():
        total.add_(found.pop(name).abs_().sum(0))


class Opacus:
    def __init__(self, model: nn.Module) -> None:
        from opacus import GradSampleModule

        self.module = GradSampleModule(model, loss_reduction="sum").train()  # it looks away in evaluation mode

    def __call__(self, model: nn.Module, batch: Sums, sums: Sums) -> None:
        losses_of(self.module, batch).sum().backward()
        for name, total in sums.items():
            parameter = model.get_parameter(name)
            total.add_(parameter.grad_sample.abs_().sum(0))
            parameter.grad = parameter.grad_sample = None

    def close(self) -> None:
        self.module.remove_hooks()
        self.module.cleanup()


class BackPACK:
    """Of the modules it can extend; it knows no norms and no embeddings, whose parameters it is let off."""

    def __init__(self, model: nn.Module) -> None:
        from backpack import extend

        self.names = []
        tied = model.get_input_embeddings().weight  # of a tied tensor it knows one use of two
        for owner, module in model.named_modules():
            if isinstance(module, nn.Linear) and module.weight is not tied:
                extend(module)
                self.names += [f"{owner}.{local}" for local, _ in module.named_parameters(recurse=False)]

    def __call__(self, model: nn.Module, batch: Sums, sums: Sums) -> None:
        from backpack import backpack
        from backpack.extensions import BatchGrad

        with backpack(BatchGrad()):
            losses_of(model, batch).sum().backward()
        for name, parameter in model.named_parameters():
            if name in self.names:
                sums[name].add_(parameter.grad_batch.abs_().sum(0))
                del parameter.grad_batch
            parameter.grad = None


def freeze_all_but_inputs(model: nn.Module) -> None:
    """For libraries that need no gradients of weights: autograd then computes those of activations alone."""
    model.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)


def add_layer(total: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Add a layer's sum to its parameters' sums.

    Bergson and dattri-LLM give a layer's weight and bias as one: in a linear layer the bias is the last column, in a
    norm the second half.
    """
    if bias is None:
        weight.add_(total.view_as(weight))
        return
    columns = total.view(len(weight), -1) if weight.ndim == 2 else total.view(2, -1).T
    weight.add_(columns[:, :-1].reshape(weight.shape))
    bias.add_(columns[:, -1])


class Bergson:
    """Its collector of unprojected gradients, as its trainer callback uses it; each layer's are summed at once.

    It knows linear layers and convolutions, with their biases, but no norms and no embeddings.
    """

    def __init__(self, model: nn.Module) -> None:
        from bergson import GradientProcessor
        from bergson.collector.gradient_collectors import StreamingGradientCollector

        class SummingCollector(StreamingGradientCollector):
            sums: Sums  # set before each batch

            def backward_hook(self, module: nn.Module, g: Tensor) -> None:
                name, gradients = module._name, self._compute_gradient(module, g)
                bias = self.sums.get(f"{name}.bias")
                add_layer(gradients.abs_().sum(0), self.sums[f"{name}.weight"], bias)

        tied = model.get_input_embeddings().weight  # of a tied tensor it knows one use of two
        layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.weight is not tied}
        self.names = [f"{owner}.{local}" for owner, layer in layers.items() for local, _ in layer.named_parameters()]
        freeze_all_but_inputs(model)  # as its own loader does
        processor = GradientProcessor(projection_dim=None, include_bias=True)
        self.collector = SummingCollector(
            model=model, target_modules=set(layers), processor=processor, dtype=torch.float32
        )

    def __call__(self, model: nn.Module, batch: Sums, sums: Sums) -> None:
        self.collector.sums = sums
        with self.collector.with_batch():
            losses_of(model, batch).sum().backward()
        model.zero_grad()


class Dattri:
    """Its gradients of single examples are torch.func's; parameters are kept apart, which saves it one long vector."""

    def __init__(self, model: nn.Module) -> None:
        from dattri.task import AttributionTask

        task = AttributionTask(partial(functional_loss, model), model, model.state_dict())
        parameters, _ = task.get_param(layer_split=True)
        self.parameters = tuple(p.detach() for p in parameters)  # else autograd would record the gradients' making
        self.gradients = task.get_grad_loss_func(in_dims=(None, 0))

    def __call__(self, model: nn.Module, batch: Sums, sums: Sums) -> None:
        gradients = list(self.gradients(self.parameters, (batch["input_ids"], batch["labels"])))
        for total in reversed(sums.values()):
            total.add_(gradients.pop().abs_().sum(0).view_as(total))


class DattriLLM:
    """Its hooks keep each layer's input and output gradient, of which the examples' gradients are made layer by layer.

    Of a tensor with two uses it gives the gradients of each, which are added here before their absolute value is taken.
    """

    def __init__(self, model: nn.Module) -> None:
        from dattri_llm import REGISTER_ALL, HookManager, HookManagerConfig
        from dattri_llm.utils.module import rms_norm_module_kwargs

        layers = {n: m for n, m in model.named_modules() if list(m.parameters(recurse=False))}
        # it must be told of norms that are not torch's own
        norms = {name: layer for name, layer in layers.items() if hasattr(layer, "variance_epsilon")}
        config = HookManagerConfig(
            linear_io=REGISTER_ALL,
            hook_types=dict.fromkeys(norms, "linear_io"),
            layer_types=dict.fromkeys(norms, "nn.RMSNorm"),
            module_kwargs={
                name: rms_norm_module_kwargs(normalized_shape=len(norm.weight), eps=norm.variance_epsilon)
                for name, norm in norms.items()
            },
            include_frozen=True,
        )
        names = {id(p): name for name, p in model.named_parameters()}
        self.uses: dict[tuple[str, ...], list[str]] = {}  # names of a layer's parameters: the modules that use them
        for name, layer in layers.items():
            parameters = tuple(names[id(p)] for p in layer.parameters(recurse=False))
            self.uses.setdefault(parameters, []).append(name)
        freeze_all_but_inputs(model)
        self.manager = HookManager(model, config=config)

    def __call__(self, model: nn.Module, batch: Sums, sums: Sums) -> None:
        from dattri_llm.gradient import ops

        with self.manager.collect():
            losses_of(model, batch).sum().backward()
        record = self.manager.get_gradient()
        for parameters, modules in self.uses.items():
            gradients = (ops.materialize(record.data.pop(name), record.layer_types[name]) for name in modules)
            add_layer(reduce(Tensor.add_, gradients).abs_().sum(0), *(sums[name] for name in parameters))
        model.zero_grad()


@dataclass(frozen=True)
class Contender:
    """`make` takes a model and gives a function of the model, a batch and the sums, which it adds to.

    If it covers some parameters only, what `make` gives has their `names`.
    """

    name: str
    make: Callable[[nn.Module], Callable]
    package: str = ""  # of a library, as pip names it

    def version(self) -> str | None:
        try:
            return version(self.package)
        except (PackageNotFoundError, ValueError):
            return None


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("plain", lambda model: plain),
        Contender("trace", Ours),
        Contender("trace, two sums", TwoSums),
        Contender("loop", lambda model: loop),
        Contender("vmap", lambda model: vmap, "torch"),
        Contender("opacus", Opacus, "opacus"),
        Contender("backpack", BackPACK, "backpack-for-pytorch"),
        Contender("bergson", Bergson, "bergson"),
        Contender("dattri", Dattri, "dattri"),
        Contender("dattri-llm", DattriLLM, "dattri-llm"),
    )
}
LIBRARIES = tuple(name for name, contender in CONTENDERS.items() if contender.package)
# shape, tokens an example, examples, contenders beside plain and trace
CASES = [
    (*HEADLINE, ("loop", *LIBRARIES)),
    (*SHORT, ("loop",)),
    (*SHORTEST, ("loop",)),
    ("pythia-70m", 64, 8, ("loop",)),
    (*LONG, ("loop",)),
    ("pythia-160m", 64, 16, ("loop",)),
    ("bundled", 16, 64, ("loop", *LIBRARIES)),
    ("bundled", 64, 64, ("loop", *LIBRARIES)),
]


# ---------------------------------------------------------------------------------------------- measuring


def resident(peak: bool = False) -> int:
    """Bytes of memory that this process holds, or has held at most since `forget_peak` (Linux)."""
    key = "VmHWM" if peak else "VmRSS"
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(key))


def forget_peak() -> bool:
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


def once(contender: Callable, model: nn.Module, batch: Sums, sums: Sums) -> tuple[float, int | None]:
    for total in sums.values():
        total.zero_()
    gc.collect()
    before = resident() if forget_peak() else None
    clock = time.perf_counter()
    contender(model, batch, sums)
    seconds = time.perf_counter() - clock
    return seconds, None if before is None else resident(peak=True) - before


def coverage(model: nn.Module, covered: list[str]) -> dict[str, Any]:
    """The share of the model's parameters that are among `covered`, and the classes of the modules with others."""
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    lacking = {type(model.get_submodule(name.rpartition(".")[0])).__name__ for name in sizes.keys() - set(covered)}
    return {"share": sum(sizes[name] for name in covered) / sum(sizes.values()), "lacks": sorted(lacking)}


def case(shape: str, length: int, count: int, peers: tuple[str, ...], rounds: int, warm: int) -> dict:
    """All contenders on one shape, and what could not run.

    {contender: {seconds, rounds, memory, error, share and lacks (see `coverage`), version of a library}}
    """
    found: dict = {"shape": shape, "length": length, "examples": count}
    model = model_of(shape)
    batch = batch_of(model, length, count)
    found["parameters"] = sum(p.numel() for p in model.parameters())
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    loop(model, batch, sums)
    reference = {name: total.clone() for name, total in sums.items()}
    times: dict[str, list[float]] = {}
    memory: dict[str, list[int]] = {}
    errors: dict[str, float] = {}
    covers: dict[str, dict[str, Any]] = {}
    names = ("plain", "trace", "trace, two sums", *peers)
    # libraries leave hooks in a model, so each has one of its own
    models = {name: model_of(shape) if CONTENDERS[name].package else model for name in names}
    ready: dict[str, Callable] = {}
    for name, own in models.items():
        try:
            ready[name] = CONTENDERS[name].make(own)
            once(ready[name], own, batch, sums)
        except (ImportError, RuntimeError, NotImplementedError, AttributeError, ValueError) as problem:
            ready.pop(name, None)
            found.setdefault("failed", {})[name] = f"{type(problem).__name__}: {str(problem).splitlines()[0][:200]}"
            continue
        if name != "plain":
            covered = getattr(ready[name], "names", list(sums))
            covers[name] = coverage(model, covered)
            errors[name] = max(
                float((sums[n] - reference[n]).abs().max() / reference[n].abs().max().clamp(min=1e-30)) for n in covered
            )
    for number in range(rounds + warm):
        for name, contender in ready.items():
            seconds, peak = once(contender, models[name], batch, sums)
            if number >= warm:
                times.setdefault(name, []).append(seconds)
                if peak is not None:
                    memory.setdefault(name, []).append(peak)
    for name in ready:
        found[name] = {
            "seconds": statistics.median(times[name]),
            "rounds": times[name],
            "memory": statistics.median(memory[name]) if name in memory else None,
            "error": errors.get(name),
            **covers.get(name, {}),
            **({"version": CONTENDERS[name].version()} if CONTENDERS[name].package else {}),
        }
    return found


def own_texts(rounds: int, warm: int) -> dict:
    """The default experiment's own texts, objects as targets: an ordinary pass over padded batches, and the trace.

    The pass takes the texts as they come and has logits everywhere; the trace sorts them by length and has logits only
    where a target is to be predicted. Both as the experiment does it, 64 texts at once.
    """
    from crosstrace.data.facts import World
    from crosstrace.data.text import biographies, questions
    from crosstrace.data.tokens import batches, encode
    from crosstrace.experiment.config import Experiment
    from crosstrace.models.loading import load_tokenizer

    model, tokenizer, world = load_model("bundled"), load_tokenizer("bundled"), World.draw(Experiment().facts)
    encoded = [encode(tokenizer, texts) for texts in (biographies(world), questions(world))]
    kept = ("input_ids", "attention_mask", "labels")
    padded, sorted_ = (
        [{k: b[k] for k in kept} for items in encoded for b in batches(items, 64, pad_id=0, by_length=by_length)]
        for by_length in (False, True)
    )
    contender = Ours(model)
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    work = {"plain": (plain, padded), "trace": (contender, sorted_)}
    times: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + warm):
        for name, (pass_, data) in work.items():
            clock = time.perf_counter()
            for batch in data:
                pass_(model, batch, sums)
            if number >= warm:
                times[name].append(time.perf_counter() - clock)
    found = {name: {"seconds": statistics.median(rounds), "rounds": rounds} for name, rounds in times.items()}
    return {"examples": sum(len(items) for items in encoded), **found}


# kinds of a training's step that `online` times
STEPS = (
    "plain", "online", "online, reuse", "online, object", "online, object, every third",
    "plain, task by task", "summed",
)  # fmt: skip


def online(shape: str, length: int, count: int, rounds: int, warm: int) -> dict:
    """A step of mixed training (AdamW, clipping), without a trace and with: both tasks' from the same backward.

    `online` leaves the training's gradients as they are, bit for bit; `online, reuse` lets the training take those of
    linear layers from the trace's products; `online, object` traces other targets, the last three tokens, by a backward
    of its own through the training's forward; `online, object, every third` does so in every third step (a third of
    three steps' time). `summed` adds up the training's own gradients of each task, and is to be compared with `plain,
    task by task`: one backward after the other.
    """
    model = model_of(shape).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    batch, task = batch_of(model, length, count), torch.arange(count) % 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    tracing = {
        "online": TrainingTrace(model, ["bio", "qa"]),
        "online, reuse": TrainingTrace(model, ["bio", "qa"], reuse=True),
    }

    last = batch["labels"].clone()
    last[:, :-3] = -100
    given = {t: {k: v[task == n] for k, v in (batch | {"trained": batch["labels"], "labels": last}).items()}
             for n, t in enumerate(("bio", "qa"))}  # fmt: skip
    other, summed = OnlineTrace(model, list(given)), SummedTrace(model, list(given))

    def trace_object() -> None:
        means: dict[str, Tensor] = {}

        def forward(name: str, part: Sums, kept: bool) -> Tensor:
            trained, traced = task_losses(model, part, [part["trained"], part["labels"]])
            if kept:
                means[name] = trained.mean()
            return traced

        other.step(given, forwards={name: partial(forward, name) for name in given})
        (sum(means.values()) / 2).backward()

    def step(name: str) -> None:
        if name == "online, object, every third":
            for one in ("plain", "plain", "online, object"):
                step(one)
            return
        if name == "plain":
            model(**batch).loss.backward()
        elif name == "online, object":
            trace_object()
        elif name in ("plain, task by task", "summed"):
            for t, part in given.items():
                (task_losses(model, part, [part["trained"]])[0].mean() / 2).backward()
                if name == "summed":
                    summed.add(t, 1e-6, len(part["labels"]), 0.5, last=t == "qa")
        else:
            with tracing[name] as trace, trace.step():
                model(**batch, task=task).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    times: dict[str, list[float]] = {}
    for number in range(rounds + warm):
        for name in STEPS:
            clock = time.perf_counter()
            step(name)
            if number >= warm:
                steps = 3 if name.endswith("every third") else 1
                times.setdefault(name, []).append((time.perf_counter() - clock) / steps)
    found = {name: {"seconds": statistics.median(own), "rounds": own} for name, own in times.items()}
    return {"shape": shape, "length": length, "examples": count, **found}


def first_batch(shape: str, length: int, count: int, rounds: int) -> dict:
    """A fresh model's first batch, in which its rules are found, and the second."""
    found: dict[str, list[float]] = {"first": [], "second": []}
    for _ in range(rounds):
        model = model_of(shape)
        sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        batch, contender = batch_of(model, length, count), Ours(model)
        for times in found.values():
            times.append(once(contender, model, batch, sums)[0])
    return {"shape": shape, "length": length, "examples": count, **found}


def overhead(found: dict, name: str, beside: str = "plain") -> float:
    """Share of a step that the trace adds, median over rounds: each beside the plain step of its round."""
    return statistics.median(a / b for a, b in zip(found[name]["rounds"], found[beside]["rounds"])) - 1


def scope(row: dict) -> str:
    """What a contender covers, in words."""
    if "share" not in row:
        return "Σg alone"
    return f"{100 * row['share']:.1f} %, no {', '.join(row['lacks'])}" if row["lacks"] else "every parameter"


def table(cases: list[dict]) -> str:
    lines = ["| model | parameters | length | examples | contender | seconds | over plain | extra memory, MB | over "
             "plain | largest relative error | covers |", "|---" * 11 + "|"]  # fmt: skip
    for found in cases:
        head = f"| {found['shape']} | {found['parameters']:,} | {found['length']} | {found['examples']} "
        floor = found["plain"]
        for name in CONTENDERS:
            if name in found:
                row = found[name]
                megabytes = "–" if row["memory"] is None else f"{row['memory'] / 1e6:.0f}"
                more = f"{row['memory'] / floor['memory']:.2f}" if row["memory"] and floor["memory"] else "–"
                error = "–" if row["error"] is None else f"{row['error']:.1e}"
                lines.append(
                    f"{head}| {name} | {row['seconds']:.3f} | {row['seconds'] / floor['seconds']:.2f} | {megabytes} | "
                    f"{more} | {error} | {scope(row)} |"
                )
            elif name in found.get("failed", {}):
                lines.append(f"{head}| {name} | could not run: {found['failed'][name]} | | | | | |")
    return "\n".join(lines)


def ratio(found: dict | None, a: str, b: str) -> dict[str, float] | None:
    """Of two contenders, each round's by itself: the median, and the lowest and highest."""
    if found is None or a not in found or b not in found:
        return None
    each = [x / y for x, y in zip(found[a]["rounds"], found[b]["rounds"])]
    return {"median": round(statistics.median(each), 3), "low": round(min(each), 3), "high": round(max(each), 3)}


def headline(rows: list[dict], steps: dict, texts: dict, starts: dict) -> dict[str, Any]:
    found = rows[0]

    def row_of(case: tuple[str, int, int]) -> dict | None:
        return next((r for r in rows if (r["shape"], r["length"], r["examples"]) == case), None)

    spreads = {
        "trace_over_plain": ratio(found, "trace", "plain"),
        "two_sums_over_plain": ratio(found, "trace, two sums", "plain"),
        "trace_over_plain_16": ratio(row_of(SHORT), "trace", "plain"),
        "trace_over_plain_9": ratio(row_of(SHORTEST), "trace", "plain"),
        "trace_over_plain_256": ratio(row_of(LONG), "trace", "plain"),
        "own_texts_over_plain": ratio(texts, "trace", "plain"),
        "loop_over_trace": ratio(found, "loop", "trace"),
        **{f"{name}_over_trace": ratio(found, name, "trace") for name in LIBRARIES},
    }
    full = [name for name in LIBRARIES if name in found and not found[name]["lacks"]]
    best = min(full, key=lambda name: found[name]["seconds"], default=None)
    spreads["best_full_peer_over_trace"] = ratio(found, best, "trace") if best else None
    memory = [found[name]["memory"] for name in ("trace", "plain")]
    return {
        "shape": f"{found['shape']}, length {found['length']}, {found['examples']} examples",
        **{name: None if spread is None else spread["median"] for name, spread in spreads.items()},
        "memory_over_plain": round(memory[0] / memory[1], 3) if all(memory) else None,
        "best_full_peer": best,
        "online_overhead": round(overhead(steps, "online, reuse"), 3),
        "online_overhead_same_bits": round(overhead(steps, "online"), 3),
        "online_overhead_object": round(overhead(steps, "online, object"), 3),
        "online_overhead_object_every_third": round(overhead(steps, "online, object, every third"), 3),
        "summed_overhead": round(overhead(steps, "summed", "plain, task by task"), 3),
        "first_batch_over_second": round(
            statistics.median(a / b for a, b in zip(starts["first"], starts["second"])), 3
        ),
        "spreads": spreads,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the headline shape alone, without libraries")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm", type=int, default=1, help="rounds that are not counted")
    parser.add_argument("--only", help="cases whose shape is this")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/trace_cost.json"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    cases = [(*HEADLINE, ("loop",))] if options.quick else CASES
    if options.only:
        cases = [c for c in cases if c[0] == options.only]
    about = metadata() | {"threads": torch.get_num_threads()}
    print(
        f"{about['cpu']}, {about['cores']} cores, {about['threads']} threads; torch {about['versions']['torch']}, "
        f"{about['platform']}\n"
    )
    rows = []
    for shape, length, count, peers in cases:
        with contextlib.redirect_stdout(None):
            rows.append(case(shape, length, count, peers, options.rounds, options.warm))
        gc.collect()
        if not options.quick:
            write_json(options.out, {"cases": rows, **about})
    print(table(rows))
    with contextlib.redirect_stdout(None):
        steps = online(*(HEADLINE if not options.only else cases[0][:3]), options.rounds + 2, options.warm + 1)
        texts = own_texts(options.rounds, options.warm)
        starts = first_batch(*HEADLINE, 3)
    for name in ("online", "online, reuse", "online, object", "online, object, every third"):
        print(
            f"\na step of training, {name}: {100 * overhead(steps, name):+.1f} % of {steps['plain']['seconds']:.3f} s"
        )
    print(
        f"\na step of training, summed: {100 * overhead(steps, 'summed', 'plain, task by task'):+.1f} % of "
        f"{steps['plain, task by task']['seconds']:.3f} s"
    )
    print(
        f"\nthe default experiment's {texts['examples']} texts: {texts['trace']['seconds']:.2f} s traced, "
        f"{texts['plain']['seconds']:.2f} s for a plain pass over padded batches\n"
    )
    if not options.quick:
        write_json(options.out, {"cases": rows, "online": steps, "own_texts": texts, "first_batch": starts, **about})
    print(json.dumps(headline(rows, steps, texts, starts)))


if __name__ == "__main__":
    main()
