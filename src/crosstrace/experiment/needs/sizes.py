"""Sizes of what an experiment's stages hold, and of what they compute: of weights, sums, batches and steps.

What goes on inside a model is rehearsed (`trace.rehearse`). It knows neither stages nor what fits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from crosstrace.core.pieces import rows_of
from crosstrace.data.tokens import IGNORE, Batch, Encoded, batches, collate
from crosstrace.experiment.config import Experiment
from crosstrace.experiment.examples import (
    sample,
)
from crosstrace.experiment.needs.machine import ALONE, Launch, Machine
from crosstrace.experiment.needs.material import Material, Work, times, work_of
from crosstrace.experiment.studied import LEARNING, View
from crosstrace.models import loading
from crosstrace.models.anatomy import Anatomy
from crosstrace.trace.blocks import sum_dtype
from crosstrace.trace.means import REDUCTIONS
from crosstrace.trace.memory import MOST_PASSES, SPARE
from crosstrace.trace.rehearse import Parts
from crosstrace.training.evaluation import TOKENS, recall_batches
from crosstrace.training.recipes import Phase
from crosstrace.training.updates import Updates

LOOKED_AT = 2000  # updates of a phase whose lengths are counted; of more, so many spread evenly


@dataclass(frozen=True)
class Need:
    """A moment of a stage: what happens, and what is held meanwhile, in bytes by what it is.

    Attributes:
        device, host: on the training's device, and in RAM.
        of: the sizes that it was counted with.
        is_of_first: whether process 0 alone holds it.
    """

    what: str
    device: Mapping[str, float]
    host: Mapping[str, float]
    of: Sizes
    is_of_first: bool


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of a stage of one model, by all processes that share it.

    Attributes:
        label: the stage, or what of it.
        dtype: that matrices are multiplied in.
        is_shared: whether the processes share them, or process 0 does them alone.
    """

    label: str
    flops: float
    dtype: str
    is_shared: bool = True


class Sizes:
    """Sizes of one experiment on one machine, or on several alike that process 0's stands for.

    With `model.sharded` they are those of one process's pieces: some rows of each parameter, rounded up.

    Attributes:
        alone: the sizes of process 0 where it works alone: on the whole model, on the CPU if that is sharded.
    """

    def __init__(self, experiment: Experiment, material: Material, machine: Machine, launch: Launch = ALONE) -> None:
        number = launch.processes
        if number > 1:
            experiment = replace(experiment, jobs=1)  # who work side by side do one thing at a time
        self.experiment, self.material, self.machine, self.launch = experiment, material, machine, launch
        self.sharded = experiment.model.sharded and number > 1
        self.tasks = len(experiment.tasks)
        self.alone = self
        if number > 1:
            self.alone = Sizes(experiment, material, replace(machine, gpu=None) if self.sharded else machine)
        holders = number if self.sharded else 1
        self.gloo = self.sharded and machine.gpu is None
        self.learner = material.model(experiment, True, holders, self.gloo)
        merged = experiment.trace.view == "merged"
        self.base = self.learner  # as the stages after training see it
        if merged:
            self.base = material.model(experiment, False, holders, self.gloo)
        self.model, self.plain = self.base.whole, material.model(experiment).whole
        named = dict(self.model.named_parameters())
        inside = View(experiment).scope(self.model)
        traced = [*named] if merged else inside
        size = lambda model, wanted=lambda p: True: sum(bytes_of(p, holders) for p in model.parameters() if wanted(p))
        self.weights = size(self.model)
        self.learning = size(self.learner.whole)
        self.learned = size(self.learner.whole, lambda p: p.requires_grad)
        states = [optimiser_state(self.learner.whole, optimiser.name, holders) for optimiser in experiment.optimisers]
        self.optimised = max(states, default=0)
        self.saved = self.learned if experiment.train.lora else self.weights  # of a taught model
        self.adapted = adapted_bytes(self.learner.whole) if merged else 0
        self.sums = sum(wide(named[name], holders) for name in traced)  # of one trace
        self.largest = max(wide(named[name], holders) for name in traced)
        self.scope = sum(held(named[name], holders) for name in inside)
        self.scope_sums = sum(wide(named[name], holders) for name in inside)
        self.bf16 = machine.gpu is not None and experiment.train.precision != "float32"  # (any that there is has it)
        self.bf16 = self.bf16 or loading.trains_in_bf16(experiment.train.precision, torch.device("cpu"))
        self.precision = "bfloat16" if self.bf16 else experiment.model.dtype
        self.asking_dtype = "bfloat16" if experiment.eval.precision == "bf16" else experiment.model.dtype
        tracing = experiment.trace
        defined = [name for name in LEARNING if tracing.online and name in tracing.definitions]
        # accumulators of a task during training: two reductions of the trace per example, one of the summed
        self.learning_sums = tracing.parts * sum(
            {"per_example": len(REDUCTIONS), "summed": 1}[name] for name in defined
        )
        self.online = self.tasks * self.learning_sums * self.sums
        self.whens = [LEARNING[name] for name in defined] + ["final"] + ["checkpoints"] * tracing.checkpoints

    def each(self, what: str, device: Mapping[str, float], host: Mapping[str, float]) -> Need:
        """A moment of every process."""
        return Need(what, device, host, self, is_of_first=False)

    def first(self, what: str, device: Mapping[str, float], host: Mapping[str, float]) -> Need:
        """A moment of process 0, beside what every process holds, or while it works alone."""
        return Need(what, device, host, self, is_of_first=True)

    def learning_held(self) -> tuple[Parts, Parts]:
        """What is there throughout a training. The online trace's sums are on the device if half of what is free there
        holds them."""
        if self.sums_on_device:
            return self.trained_held() | {"trace's sums": self.online}, {}
        return self.trained_held(), {"trace's sums": self.online}

    @property
    def sums_on_device(self) -> bool:
        gpu = self.machine.gpu
        return gpu is not None and self.online < (gpu - self.learning) / 2

    def trained_held(self) -> Parts:
        """DDP keeps flat buckets beside the gradients, as accelerate sets it up."""
        ddp = self.launch.processes > 1 and not self.sharded
        return {"weights": self.learning, "optimiser": self.optimised, "DDP's buckets": ddp * self.learned}

    def copies(self) -> Parts:
        """On the host, of what is saved from a GPU: the optimiser's state, then the online trace's sums. Those on the
        host are saved, and in the end divided, in place."""
        optimiser = 0 if self.machine.gpu is None else self.optimised
        if self.sums_on_device and self.online > optimiser:
            return {"copies of the sums": self.online}
        return {"a copy of the optimiser": optimiser}

    def share(self, batch: Batch) -> Batch:
        """As many rows of a batch as one process may have of it."""
        return {name: x[: -(-len(x) // self.launch.processes)] for name, x in batch.items()}

    @property
    def shares_forward(self) -> bool:
        """Whether the trace during training goes back through the training's own forward."""
        e = self.experiment
        merges = e.train.lora is not None and e.trace.view == "merged"
        alone = self.launch.processes == 1 and not merges and not e.train.gradient_checkpointing
        return e.trace.forward == "training" and alone

    def phases(self, name: str) -> list[tuple[Phase, Updates]]:
        """A strategy's phases, each with what its updates see."""
        seed = self.experiment.train.seed
        return [
            (phase, self.updates(phase, f"{seed}/{index}"))
            for index, phase in enumerate(self.experiment.strategies.get(name, []))
        ]

    def updates(self, phase: Phase, seed: str) -> Updates:
        """What the updates of a phase see, as `train` has it."""
        seen, targets, most = self.material, "trace", self.experiment.train.micro_batch
        processes = self.launch.processes
        make = lambda: Updates(phase, seen.seen, seed, seen.pad, targets, most, processes, self.sharded)
        return seen.once((seed, repr(phase), targets, most, processes, self.sharded), make)

    def step(self, phase: Phase, chosen: Mapping[str, Sequence[Batch]]) -> Parts:
        """What an update holds beside weights and optimiser: at its fullest, or all gradients when that is over."""
        shapes = tuple((task, *(tuple(batch["input_ids"].shape) for batch in own)) for task, own in chosen.items())
        checkpointing = self.experiment.train.gradient_checkpointing
        key = ("step", id(self.learner), self.bf16, checkpointing, shapes)
        found = self.material.once(key, lambda: self.learner.update(phase, chosen, self.bf16, checkpointing))
        return found if sum(found.values()) > self.learned else {"gradients": self.learned}

    def traced(self, chosen: Mapping[str, Sequence[Batch]]) -> Parts:
        """What a trace of some batches holds beside weights and sums."""
        rows = [
            {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
            | {"labels": batch.get("trace_labels", batch["labels"])}
            for own in chosen.values()
            for batch in own
        ]
        parts = max((self.estimate([row]) for row in rows), key=lambda parts: sum(parts.values()))
        several = any(len(own) > 1 for own in chosen.values())
        if self.launch.processes > 1 or several:  # a step's gradients meet when all of it has been gone through
            parts = parts | {"the step's gradients": self.sums}
        if self.sharded:
            return parts | {"whole sums on their way": self.on_their_way(2)}
        # the mean gradient of a step, and a sum that is not wanted as it is
        return parts | {"a tensor's sums": 2 * self.largest}

    def on_their_way(self, kinds: int) -> float:
        """`trace.distributed.Scatter`: whole sums of two parameters, and the copy of one that gloo sends."""
        return (2 + self.gloo) * kinds * self.alone.largest

    def estimate(self, rows: Sequence[Mapping[str, Tensor]]) -> Parts:
        """Activations of the costliest of some batches, as a trace itself estimates them, and what is gathered."""
        largest = max(rows, key=lambda row: row["input_ids"].numel() * row["input_ids"].shape[1])
        targets = int((largest["labels"] != -100).sum(1).max())
        key = ("trace", id(self.base), largest["input_ids"].shape, targets)
        return self.material.once(key, lambda: self.base.traced(rows))

    def recall(self, part: str, number: int | None = None, tokens: int = TOKENS) -> Parts:
        """What `evaluation.recall` holds beside the weights, of the batch with most tokens and that with most answers.
        Each of N processes asks its share, every N-th by length; `tokens` are those that go through at once."""
        items, pad, size = self.material.asked(part, number), self.material.pad, self.launch.processes
        share = lambda: sorted(items, key=lambda item: len(item.ids))[(len(items) - 1) % size :: size]

        def largest() -> list[Batch]:
            found = list(recall_batches(share(), tokens, self.base.whole.config.get_text_config().vocab_size, pad))
            positions = [row["labels"].numel() for row in found]
            answers = [len(row["labels"]) * int((row["labels"] != IGNORE).sum(1).max()) for row in found]
            return [found[sizes.index(max(sizes))] for sizes in (positions, answers)]

        rows = self.material.once(("recalled", part, number, size, tokens), largest)
        key = ("recall", id(self.base), tuple(row["input_ids"].shape for row in rows))
        return self.material.once(key, lambda: self.base.recall(rows))

    def trace_sums(self, size: float, held: float) -> tuple[Parts, Parts]:
        """Where a trace's sums lie, as `trace.memory` decides it: on a GPU in a few passes, or on the host."""
        gpu = self.machine.gpu
        if gpu is None:
            return {"sums": size}, {}
        passes = -(-size // max(1.0, SPARE * gpu - held))
        return ({"sums": size / passes}, {"sums": size}) if passes <= MOST_PASSES else ({}, {"sums": size})

    def trace_rows(self, items: Sequence[Encoded]) -> list[Mapping[str, Tensor]]:
        """The batches of a task's trace."""
        options = self.experiment.trace
        items = sample(items, options.examples) if options.examples else items
        rows = batches(items, options.batch, "trace", pad_id=self.material.pad, by_length=True)
        return [{k: v for k, v in row.items() if k != "group"} for row in rows]

    def traces_read(self) -> float:
        """Bytes of the traces of one time by one reduction. Files are mapped: what nobody looks at takes none."""
        return self.tasks * self.experiment.trace.parts * self.sums

    def masks(self, fractions: int) -> float:
        """A mask of every task's set and of the shared one, at each fraction."""
        return fractions * (self.tasks + 1) * self.scope

    def formats(self) -> Mapping[str, Tensor]:
        """The longest facts in both formats, as many as are compared at once."""
        seen, together = self.material, self.experiment.mechanism.together
        texts = sorted(seen.parts[seen.roles.trained_part(seen.roles.stored)], key=lambda item: len(item.ids))[
            -together:
        ]
        questions = sorted(seen.parts[seen.roles.outcome], key=lambda item: len(item.ids))[-together:]
        row = collate([item.about(len(item.mentions) - 1) for item in texts] + questions, pad_id=seen.pad)
        return {k: v for k, v in row.items() if k != "group"}

    def inward(self, row: Batch) -> float:
        """What a forward and backward to the embeddings holds, no parameter's gradient with it."""
        key = ("inward", id(self.base), row["input_ids"].shape)
        return sum(self.material.once(key, lambda: self.base.inward(row)).values())

    def flops(self, work: Mapping[str, float]) -> float:
        """Of one forward: 2 N a position, N the parameters of matrix products, and 4 L H Q T for the attention of L
        layers with H heads of width Q to T positions (Chowdhery et al. 2022, arXiv 2204.02311, appendix B; a backward
        is two more of them)."""
        c = self.plain.config.get_text_config()
        heads = getattr(c, "num_attention_heads", 0) or 0
        width = heads * (getattr(c, "head_dim", None) or (c.hidden_size // heads if heads else 0))
        return 2 * self._multiplied * work["tokens"] + 4 * c.num_hidden_layers * width * work["pairs"]

    @cached_property
    def _multiplied(self) -> float:
        """Parameters of the matrices that a position is multiplied with: of experts those that are chosen."""
        anatomy, c = Anatomy(self.plain), self.plain.config.get_text_config()
        experts = getattr(c, "num_experts", None) or getattr(c, "num_local_experts", None) or 1
        share = {"experts": getattr(c, "num_experts_per_tok", experts) / experts, "position": 0.0}
        head, found = self.plain.get_output_embeddings(), 0.0
        tied = head is not None and head.weight is self.plain.get_input_embeddings().weight
        for name, kind in anatomy.kind.items():
            used = share.get(kind, 1.0) if kind != "embedding" else float(tied)
            found += used * anatomy.shapes[name].numel() * (len(anatomy.shapes[name]) > 1)
        return found

    def update_flops(self, data: Updates, update: int) -> float:
        """Of one update, forward and backward."""
        return 3 * self.flops(work_of_update(data, update))

    @cached_property
    def stored_flops(self) -> float:
        """Of one forward of a text that stores facts."""
        return self._mean_flops(self.material.roles.trained_part(self.material.roles.stored))

    @cached_property
    def asked_flops(self) -> float:
        """Of one forward of a question."""
        return self._mean_flops(self.material.roles.outcome)

    def _mean_flops(self, part: str) -> float:
        items = self.material.parts[part]
        return self.flops(times(work_of(items, 64), 1 / len(items)))

    @property
    def layers(self) -> int:
        """Layers of the model."""
        return self.model.config.get_text_config().num_hidden_layers


def asked_work(items: Sequence[Encoded], tokens: int) -> Counter[str]:
    """The work of `evaluation.recall`, `tokens` at once."""
    longest = max((len(item.ids) for item in items), default=1)
    return work_of(items, max(1, tokens // longest))


def held(p: Tensor, holders: int) -> int:
    """How many of a parameter's numbers the first of its holders has, if they have rows of it in equal parts."""
    return p.numel() if holders == 1 or not p.dim() else rows_of(len(p), 0, holders)[1] * (p.numel() // len(p))


def bytes_of(p: Tensor, holders: int = 1) -> int:
    return held(p, holders) * p.element_size()


def wide(p: Tensor, holders: int) -> int:
    """Bytes of a sum of one parameter's gradients."""
    return held(p, holders) * torch.empty(0, dtype=sum_dtype(p.dtype)).element_size()


def optimiser_state(model: Any, name: str, holders: int) -> int:
    """Bytes that an optimiser keeps for the parameters that are trained: AdamW two numbers each, in 8 bits for those
    with 4,096 and more (and two float32 for every 256); Adafactor a mean for each row and each column of a matrix."""
    found = 0
    for p in model.parameters():
        if not p.requires_grad:
            continue
        if name == "adafactor":
            found += 4 * (p.numel() // p.shape[-1] + p.numel() // p.shape[-2] if p.dim() > 1 else p.numel())
        elif name == "adamw_8bit" and p.numel() >= 4096:
            found += 2 * (p.numel() + 4 * p.numel() // 256 + 4 * 256)
        else:
            found += 2 * bytes_of(p, holders) * (4 // p.element_size() if name == "adamw_8bit" else 1)
    return found


def adapted_bytes(model: Any) -> int:
    """Bytes of the base's weights that an adapter is on."""
    layers = [module.get_base_layer() for module in model.modules() if hasattr(module, "get_base_layer")]
    return sum(bytes_of(p) for layer in layers for p in layer.parameters(recurse=False))


def saved_after(updates: int, every: int) -> list[int]:
    """After which updates of a phase a checkpoint is saved."""
    return sorted({*range(every, updates + 1, every), updates})


def _looked_at(data: Updates) -> list[int]:
    return sorted({round(i) for i in torch.linspace(0, len(data) - 1, min(len(data), LOOKED_AT)).tolist()})


def seen_work(data: Updates) -> Work:
    """What goes through the model in a whole phase, padding included."""
    looked = _looked_at(data)
    found: Work = sum((work_of_update(data, update) for update in looked), Counter())
    return times(found, len(data) / len(looked))


def work_of_update(data: Updates, update: int) -> Work:
    found: Work = Counter()
    for count, longest in (size for sizes in data.sizes(update).values() for size in sizes):
        found["tokens"] += count * longest
        found["pairs"] += count * longest**2
    return found


def costliest(data: Updates) -> dict[str, list[Batch]]:
    """Of each task the micro-batch with the most tokens, in an update that has it, and another one like it if that
    update has several: the second meets the gradients of the first."""
    found = {}
    for task in data.tasks:
        cost = lambda update, task=task: max(count * longest for count, longest in data.sizes(update)[task])
        batches = data[max(_looked_at(data), key=cost)][task]
        largest = max(batches, key=lambda batch: batch["input_ids"].numel())
        found[task] = [largest] * min(2, len(batches))
    return found
