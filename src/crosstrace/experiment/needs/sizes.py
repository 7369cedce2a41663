"""Sizes of what an experiment's stages hold and compute: weights, sums, batches and steps.

What happens inside a model is rehearsed (`trace.rehearse`). This module knows no stages, and not what fits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from crosstrace.core.pieces import rows_of
from crosstrace.data.tokens import IGNORE, Batch, Encoded, batches, collate
from crosstrace.experiment.config import Experiment
from crosstrace.experiment.examples import sample
from crosstrace.experiment.needs.machine import ALONE, Launch, Machine
from crosstrace.experiment.needs.material import Material, Work, times, work_of
from crosstrace.experiment.studied import LEARNING, View
from crosstrace.models import loading
from crosstrace.models.anatomy import Anatomy
from crosstrace.trace.blocks import sum_dtype
from crosstrace.trace.means import REDUCTIONS
from crosstrace.trace.memory import MOST_PASSES, SPARE
from crosstrace.trace.rehearse import Parts
from crosstrace.training import optimisers
from crosstrace.training.evaluation import TOKENS, recall_batches
from crosstrace.training.recipes import Phase
from crosstrace.training.updates import Updates

COUNTED = 2000  # updates of a phase whose lengths are counted; if it has more, evenly spread ones are


@dataclass(frozen=True)
class Need:
    """What a stage holds at one moment.

    Attributes:
        what: what happens then.
        device, host: bytes on the training's device and in RAM, by what they are for.
        sizes: the sizes that it was counted with.
        is_of_first: whether process 0 alone holds it.
    """

    what: str
    device: Mapping[str, float]
    host: Mapping[str, float]
    sizes: Sizes
    is_of_first: bool


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of a stage of one model, by all processes that share it.

    Attributes:
        label: the stage, or a part of it.
        dtype: the dtype of the matrix products.
        is_shared: whether the processes share them. If not, process 0 does them alone.
    """

    label: str
    flops: float
    dtype: str
    is_shared: bool = True


class Sizes:
    """Sizes of one experiment on one machine, in bytes. If there are several machines, all are like that of process 0.

    With `model.sharded` they are the sizes of one process's pieces: some rows of each parameter, rounded up.

    Attributes:
        alone: the sizes of process 0 while it works alone on the whole model; if the model is sharded, on the CPU.
        learner, base: the model that is trained, and the model that the stages after training see.
        weights, learning: all weights of `base`, and of `learner`.
        learned: the weights that are trained.
        optimised: the largest state of an optimiser.
        saved: the saved weights of a taught model.
        adapted: the weights that an adapter is merged into.
        sums, largest: the sums of one trace: of all parameters, and of the largest one.
        scope, scope_sums: how many numbers are in scope, and their sums.
        learning_sums: how many sums a task's traces during training have for each number.
        online: the sums of all traces during training.
        whens: the times of traces.
    """

    def __init__(self, experiment: Experiment, material: Material, machine: Machine, launch: Launch = ALONE) -> None:
        number = launch.processes
        if number > 1:
            experiment = replace(experiment, jobs=1)  # processes side by side do one thing at a time
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
        self.base = self.learner
        if merged:
            self.base = material.model(experiment, False, holders, self.gloo)
        self.model, self.plain = self.base.whole, material.model(experiment).whole
        named = dict(self.model.named_parameters())
        inside = View(experiment).scope(self.model)
        traced = [*named] if merged else inside
        self.weights = sum(bytes_of(p, holders) for p in self.model.parameters())
        self.learning = sum(bytes_of(p, holders) for p in self.learner.whole.parameters())
        self.learned = sum(bytes_of(p, holders) for p in self.learner.whole.parameters() if p.requires_grad)
        states = [optimiser_state(self.learner.whole, optimiser.name, holders) for optimiser in experiment.optimisers]
        self.optimised = max(states, default=0)
        self.saved = self.learned if experiment.train.lora else self.weights
        self.adapted = adapted_bytes(self.learner.whole) if merged else 0
        self.sums = sum(sum_bytes(named[name], holders) for name in traced)
        self.largest = max(sum_bytes(named[name], holders) for name in traced)
        self.scope = sum(held(named[name], holders) for name in inside)
        self.scope_sums = sum(sum_bytes(named[name], holders) for name in inside)
        self.bf16 = machine.gpu is not None and experiment.train.precision != "float32"  # (every GPU has bf16)
        self.bf16 = self.bf16 or loading.trains_in_bf16(experiment.train.precision, torch.device("cpu"))
        self.precision = "bfloat16" if self.bf16 else experiment.model.dtype
        self.asking_dtype = "bfloat16" if experiment.eval.precision == "bf16" else experiment.model.dtype
        tracing = experiment.trace
        defined = [name for name in LEARNING if tracing.online and name in tracing.definitions]
        # `per_example` has two reductions, `summed` one
        self.learning_sums = tracing.parts * sum(
            {"per_example": len(REDUCTIONS), "summed": 1}[name] for name in defined
        )
        self.online = self.tasks * self.learning_sums * self.sums
        self.whens = [LEARNING[name] for name in defined] + ["final"] + ["checkpoints"] * tracing.checkpoints

    def each(self, what: str, device: Mapping[str, float], host: Mapping[str, float]) -> Need:
        """A moment of every process, as `Need` has it."""
        return Need(what, device, host, self, is_of_first=False)

    def first(self, what: str, device: Mapping[str, float], host: Mapping[str, float]) -> Need:
        """A moment of process 0 alone: beside the moments of every process, or while it works alone."""
        return Need(what, device, host, self, is_of_first=True)

    def learning_held(self) -> tuple[Parts, Parts]:
        """What the device and the host hold throughout a training.

        The online trace's sums are on the device if they take less than half of what is free there.
        """
        if self.sums_on_device:
            return self.trained_held() | {"trace's sums": self.online}, {}
        return self.trained_held(), {"trace's sums": self.online}

    @property
    def sums_on_device(self) -> bool:
        """Whether the online trace's sums are on the device."""
        gpu = self.machine.gpu
        return gpu is not None and self.online < (gpu - self.learning) / 2

    def trained_held(self) -> Parts:
        """Weights and optimiser in training. (accelerate has DDP keep flat buckets beside the gradients.)"""
        ddp = self.launch.processes > 1 and not self.sharded
        return {"weights": self.learning, "optimiser": self.optimised, "DDP's buckets": ddp * self.learned}

    def copies(self) -> Parts:
        """Copies on the host while a GPU's state is saved: of the optimiser's, then of the online trace's sums.

        Sums that lie on the host are saved, and in the end divided, in place.
        """
        optimiser = 0 if self.machine.gpu is None else self.optimised
        if self.sums_on_device and self.online > optimiser:
            return {"copies of the sums": self.online}
        return {"a copy of the optimiser": optimiser}

    def share(self, batch: Batch) -> Batch:
        """The rows of a batch that one process gets at most."""
        return {name: x[: -(-len(x) // self.launch.processes)] for name, x in batch.items()}

    @property
    def shares_forward(self) -> bool:
        """Whether the trace during training goes back through the training's own forward."""
        e = self.experiment
        merges = e.train.lora is not None and e.trace.view == "merged"
        alone = self.launch.processes == 1 and not merges and not e.train.gradient_checkpointing
        return e.trace.forward == "training" and alone

    def phases(self, name: str) -> list[tuple[Phase, Updates]]:
        """A strategy's phases, each with the micro-batches of its updates."""
        seed = self.experiment.train.seed
        return [
            (phase, self.updates(phase, f"{seed}/{index}"))
            for index, phase in enumerate(self.experiment.strategies.get(name, []))
        ]

    def saves(self, updates: int) -> int:
        """How many checkpoints so many updates of a phase save: at every interval and at the end."""
        interval = self.experiment.train.checkpoint_every
        return len({*range(interval, updates + 1, interval), updates})

    def checkpoints(self, name: str) -> int:
        """How many checkpoints a model's training saves; none of a model that was given."""
        return sum(self.saves(len(data)) for _, data in self.phases(name))

    def updates(self, phase: Phase, seed: str) -> Updates:
        """The micro-batches of a phase's updates, as `train` makes them."""
        material, targets, most = self.material, "trace", self.experiment.train.micro_batch
        processes, sharded = self.launch.processes, self.sharded
        make = partial(Updates, phase, material.in_training, seed, material.pad, targets, most, processes, sharded)
        return material.once((seed, repr(phase), targets, most, processes, sharded), make)

    def step(self, phase: Phase, chosen: Mapping[str, Sequence[Batch]]) -> Parts:
        """What an update holds beside weights and optimiser at its fullest: all gradients at least."""
        shapes = tuple((task, *map(_shape, micro_batches)) for task, micro_batches in chosen.items())
        checkpointing = self.experiment.train.gradient_checkpointing
        key = ("step", self.bf16, checkpointing, shapes)
        peak = self.learner.once(key, lambda: self.learner.update(phase, chosen, self.bf16, checkpointing))
        return peak if sum(peak.values()) > self.learned else {"gradients": self.learned}

    def traced(self, chosen: Mapping[str, Sequence[Batch]]) -> Parts:
        """What a trace of some batches holds beside weights and sums, at its fullest."""
        rows = [
            {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
            | {"labels": batch.get("trace_labels", batch["labels"])}
            for micro_batches in chosen.values()
            for batch in micro_batches
        ]
        parts = max((self.estimate([row]) for row in rows), key=lambda parts: sum(parts.values()))
        several = any(len(micro_batches) > 1 for micro_batches in chosen.values())
        if self.launch.processes > 1 or several:  # they are added up once the whole step is done
            parts = parts | {"the step's gradients": self.sums}
        if self.sharded:
            return parts | {"whole sums on their way": self.on_their_way(2)}
        # the mean gradient of a step, and one sum as it is changed
        return parts | {"a tensor's sums": 2 * self.largest}

    def on_their_way(self, kinds: int) -> float:
        """What `trace.distributed.Scatter` holds: whole sums of two parameters, and the copy of one that gloo sends."""
        return (2 + self.gloo) * kinds * self.alone.largest

    def estimate(self, rows: Sequence[Mapping[str, Tensor]]) -> Parts:
        """Activations of the costliest of some batches, as the trace estimates them, and what is gathered."""
        largest = max(rows, key=lambda row: row["input_ids"].numel() * row["input_ids"].shape[1])
        return self.base.once(("trace", _shape(largest)), lambda: self.base.traced(rows))

    def recall(self, part: str, number: int | None = None, tokens: int = TOKENS) -> Parts:
        """What `evaluation.recall` holds beside the weights, in the batch with most tokens or that with most answers.

        Each of N processes asks every N-th question by length.

        Args:
            number: the number of questions; None for all of the part.
            tokens: those that go through the model at once.
        """
        items, pad, size = self.material.examples_of(part, number), self.material.pad, self.launch.processes

        def largest() -> list[Batch]:
            share = sorted(items, key=lambda item: len(item.ids))[(len(items) - 1) % size :: size]
            rows = list(recall_batches(share, tokens, self.base.whole.config.get_text_config().vocab_size, pad))
            positions = [row["labels"].numel() for row in rows]
            answers = [len(row["labels"]) * int((row["labels"] != IGNORE).sum(1).max()) for row in rows]
            return [rows[sizes.index(max(sizes))] for sizes in (positions, answers)]

        rows = self.material.once(("recalled", part, number, size, tokens), largest)
        return self.base.once(("recall", *map(_shape, rows)), lambda: self.base.recall(rows))

    def trace_sums(self, size: float, held: float) -> tuple[Parts, Parts]:
        """What the sums of a trace take on the device and on the host, as `trace.memory` places them.

        Those that fit a GPU in a few passes are there; others are on the host.
        """
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
        """Bytes of the traces of one time and reduction. (Files are mapped, so unread parts take no memory.)"""
        return self.tasks * self.experiment.trace.parts * self.sums

    def masks(self, fractions: int) -> float:
        """Bytes of the masks of every task's set and of the shared one, at each fraction."""
        return fractions * (self.tasks + 1) * self.scope

    def formats(self) -> Mapping[str, Tensor]:
        """The longest facts in both formats, as many as are compared at once: a batch."""
        parts, roles, together = self.material.parts, self.material.roles, self.experiment.mechanism.together
        texts = sorted(parts[roles.trained_part(roles.stored)], key=lambda item: len(item.ids))[-together:]
        questions = sorted(parts[roles.outcome], key=lambda item: len(item.ids))[-together:]
        row = collate([item.about(len(item.mentions) - 1) for item in texts] + questions, pad_id=self.material.pad)
        return {k: v for k, v in row.items() if k != "group"}

    def inward(self, row: Batch) -> float:
        """What a forward and a backward to the embeddings hold, without gradients of parameters."""
        return sum(self.base.once(("inward", _shape(row)), lambda: self.base.inward(row)).values())

    def flops(self, work: Mapping[str, float]) -> float:
        """Floating-point operations of one forward: 2 N + 4 L H Q T for each position.

        N is the number of parameters in matrix products. L layers with H heads of width Q attend to T positions. A
        backward takes twice as many. Source: Chowdhery et al. 2022, arXiv 2204.02311, appendix B.
        """
        c = self.plain.config.get_text_config()
        heads = getattr(c, "num_attention_heads", 0) or 0
        width = heads * (getattr(c, "head_dim", None) or (c.hidden_size // heads if heads else 0))
        return 2 * self._multiplied * work["tokens"] + 4 * c.num_hidden_layers * width * work["pairs"]

    @cached_property
    def _multiplied(self) -> float:
        """Parameters of the matrices that a position is multiplied with; only the chosen ones of the experts."""
        anatomy, c = Anatomy(self.plain), self.plain.config.get_text_config()
        experts = getattr(c, "num_experts", None) or getattr(c, "num_local_experts", None) or 1
        share = {"experts": getattr(c, "num_experts_per_tok", experts) / experts, "position": 0.0}
        head, count = self.plain.get_output_embeddings(), 0.0
        tied = head is not None and head.weight is self.plain.get_input_embeddings().weight
        for name, kind in anatomy.kind.items():
            used = share.get(kind, 1.0) if kind != "embedding" else float(tied)
            count += used * anatomy.shapes[name].numel() * (len(anatomy.shapes[name]) > 1)
        return count

    def update_flops(self, data: Updates, update: int) -> float:
        """Floating-point operations of one update, forward and backward."""
        return 3 * self.flops(work_of_update(data, update))

    @cached_property
    def stored_flops(self) -> float:
        """Floating-point operations of one forward of a text that stores facts, on average."""
        return self._mean_flops(self.material.roles.trained_part(self.material.roles.stored))

    @cached_property
    def asked_flops(self) -> float:
        """Floating-point operations of one forward of a question, on average."""
        return self._mean_flops(self.material.roles.outcome)

    def _mean_flops(self, part: str) -> float:
        items = self.material.parts[part]
        return self.flops(times(work_of(items, 64), 1 / len(items)))

    @property
    def layers(self) -> int:
        """How many layers the model has."""
        return self.model.config.get_text_config().num_hidden_layers


def _shape(row: Mapping[str, Tensor]) -> tuple[int, ...]:
    """What a batch's memory depends on: rows, positions, targets in all and of the row that has most."""
    targets = (row["labels"] != IGNORE).sum(1)
    return (*row["input_ids"].shape, int(targets.sum()), int(targets.max()))


def asked_work(items: Sequence[Encoded], tokens: int) -> Counter[str]:
    """The work of `evaluation.recall`, with `tokens` going through the model at once."""
    longest = max((len(item.ids) for item in items), default=1)
    return work_of(items, max(1, tokens // longest))


def held(p: Tensor, holders: int) -> int:
    """How many of a parameter's numbers its first holder has, if all hold equally many rows."""
    return p.numel() if holders == 1 or not p.dim() else rows_of(len(p), 0, holders)[1] * (p.numel() // len(p))


def bytes_of(p: Tensor, holders: int = 1) -> int:
    """Bytes of a parameter, or of what its first holder has of it."""
    return held(p, holders) * p.element_size()


def sum_bytes(p: Tensor, holders: int) -> int:
    """Bytes of a sum of one parameter's gradients, or of what its first holder has of it."""
    return held(p, holders) * torch.empty(0, dtype=sum_dtype(p.dtype)).element_size()


def optimiser_state(model: Any, name: str, holders: int) -> int:
    """Bytes of an optimiser's state for the trained parameters."""
    kind = optimisers.KINDS[name]
    return sum(kind.state(p, held(p, holders)) for p in model.parameters() if p.requires_grad)


def adapted_bytes(model: Any) -> int:
    """Bytes of the base's weights that have an adapter."""
    layers = [module.get_base_layer() for module in model.modules() if hasattr(module, "get_base_layer")]
    return sum(bytes_of(p) for layer in layers for p in layer.parameters(recurse=False))


def _counted_updates(data: Updates) -> list[int]:
    """The updates of a phase whose lengths are counted."""
    return sorted({round(i) for i in torch.linspace(0, len(data) - 1, min(len(data), COUNTED)).tolist()})


def seen_work(data: Updates) -> Work:
    """The work of a whole phase, padding included."""
    updates = _counted_updates(data)
    work: Work = sum((work_of_update(data, update) for update in updates), Counter())
    return times(work, len(data) / len(updates))


def work_of_update(data: Updates, update: int) -> Work:
    """The work of one update, padding included."""
    work: Work = Counter()
    for count, longest in (size for sizes in data.sizes(update).values() for size in sizes):
        work["tokens"] += count * longest
        work["pairs"] += count * longest**2
    return work


def costliest(data: Updates) -> dict[str, list[Batch]]:
    """The micro-batch of each task that has the most tokens.

    If its update has several micro-batches of the task, it is given twice: the second one is computed beside the
    gradients of the first.
    """
    chosen = {}
    for task in data.tasks:
        batches = data[max(_counted_updates(data), key=partial(_most_tokens, data, task))][task]
        largest = max(batches, key=lambda batch: batch["input_ids"].numel())
        chosen[task] = [largest] * min(2, len(batches))
    return chosen


def _most_tokens(data: Updates, task: str, update: int) -> int:
    """Tokens of the largest micro-batch of a task in one update, padding included."""
    return max(count * longest for count, longest in data.sizes(update)[task])
