"""Plan: what an experiment takes before anything of it runs: parameters, tokens, memory, time and disk.

The facts are drawn and tokenized, and the base is made of fake tensors from its config alone; what a training step and
an evaluation hold at once is rehearsed on those (`rehearse`), what a trace holds is `trace.memory`'s own estimate, and
what the stages keep beside it is counted as `pipeline` does it. Where it does not fit, settings that would make it fit
are searched for by planning again.

It reads no weights, downloads nothing and writes nothing. It does not know what an allocator wastes, nor the time of
what is no matrix product.
"""

from __future__ import annotations

import copy
import math
import os
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crosstrace import circuit, config, lens, models, positions
from crosstrace.anatomy import Anatomy
from crosstrace.config import Experiment
from crosstrace.errors import UserError
from crosstrace.facts import World
from crosstrace.losses import example_losses, token_losses
from crosstrace.material import sample, samples
from crosstrace.rehearse import Rehearsal, pretended
from crosstrace.results import aligned
from crosstrace.schedule import Phase
from crosstrace.shared import scope
from crosstrace.store import read_json
from crosstrace.text import biographies, questions
from crosstrace.tokens import Batch, Encoded, batches, collate, encode
from crosstrace.trace.engine import Engine
from crosstrace.trace.memory import SPARE, free_memory, size_text
from crosstrace.trace.rules import sum_dtype
from crosstrace.trace.trace import REDUCTIONS
from crosstrace.train import Updates, epoch_sizes, update_loss

Row = dict[str, Any]
Parts = dict[str, float]  # what is held -> bytes
Work = Counter  # "tokens": positions that go through the model; "pairs": Σ of each text's length squared
TASKS = 2
LOOKED_AT = 2000  # updates of a phase whose lengths are counted; of more, so many spread evenly
RECALLED = 256  # texts that `evaluate.recall` asks at once
CHARACTERS = 4  # a token, by rule of thumb, where there is no tokenizer
RANKING = 46  # bytes a parameter in scope of `stats.spearman`, its two arrays included
SHAPES = "shapes"


@dataclass(frozen=True)
class Machine:
    """What there is: bytes free, None where that isn't known.

    Attributes:
        name: of the GPU, or "cpu".
        gpu: free on the GPU; None without one.
        ram, disk: free.
        flops: operations a second that matrix products reach, by dtype; measured, or told.
        source: of `flops`.
    """

    name: str
    gpu: int | None
    ram: int | None
    disk: int | None
    flops: dict[str, float] = field(default_factory=dict)
    source: str = ""

    @classmethod
    def here(cls, folder: Path) -> Machine:
        """This machine; `folder` is where the run would go."""
        there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
        found = torch.cuda.is_available()
        return cls(
            torch.cuda.get_device_name() if found else "cpu",
            free_memory(torch.device("cuda", torch.cuda.current_device())) if found else None,
            free_memory(torch.device("cpu")),
            shutil.disk_usage(there).free,
        )


@dataclass(frozen=True)
class Plan:
    """What an experiment takes; every field is JSON-able.

    Attributes:
        model: name, architecture, source (of the shape), dtype, parameters, scope (how many may be shared), kinds.
        data: a row {part, examples, tokens, longest} for each part of the examples, and `tokenizer`, whose it is.
        training: a row {strategy, phase, updates, examples, tokens, flops} for each phase.
        memory: a row {process, stage, where, moment, bytes, parts} for each stage of each process: its fullest moment.
        work: a row {process, stage, where, flops, hours}; hours are None without a probe.
        disk: a row {what, bytes, lasting}: what stays in the run folder, and what is there at most meanwhile.
        machine: see `Machine`.
        totals: bytes of each of "gpu", "ram" and "disk" that all processes take at once, and hours in all.
        problems: a sentence for each thing that does not fit.
        remedies: settings, each as on the command line, that would make it fit; each alone, or the last all together.
    """

    model: Row
    data: Row
    training: list[Row]
    memory: list[Row]
    work: list[Row]
    disk: list[Row]
    machine: Row
    totals: Row
    problems: list[str]
    remedies: list[str]

    @property
    def fits(self) -> bool:
        return not self.problems

    def peak(self, process: str, stage: str) -> int:
        """Bytes that a stage holds at most, on the device and on the host, beside the interpreter."""
        return sum(row["bytes"] for row in self.memory if (row["process"], row["stage"]) == (process, stage))

    def __str__(self) -> str:
        return "\n".join(_told(self))


def plan(
    experiment: Experiment,
    *,
    folder: Path | None = None,
    machine: Machine | None = None,
    probe: bool = True,
    step: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Plan:
    """Plan an experiment.

    Args:
        folder: where its run would go; runs/<name> if not given.
        machine: what there is; this machine if not given.
        probe: measure matrix products for a second or two, for the hours, where the machine does not tell.
        step: make the base with random weights and time one real update, where it fits; hours are then those of such
            updates rather than of matrix products alone.
        progress: told what is being done.

    Raises:
        UserError: bad settings, or the base's config is not on this machine.
    """
    folder = folder or Path("runs") / experiment.name
    machine = machine or Machine.here(folder)
    progress("facts and tokens")
    material = _Material(experiment)
    material.check(experiment)
    progress("memory")
    needs = _Needs(experiment, material, machine)
    problems = needs.problems()
    progress("settings that would fit" if problems else "disk")
    remedies = _remedies(experiment, material, machine) if problems else []
    dtypes = {experiment.model.dtype, needs.precision}
    if probe and not machine.flops and machine.name != "planned":
        progress("matrix products")
        machine = replace(machine, flops={d: _products(material, d, experiment.threads) for d in sorted(dtypes)},
                          source=f"matrix products, measured on {_width(machine, experiment)}")  # fmt: skip
    if step and machine.flops and not problems:
        progress("one update")
        machine = _stepped(experiment, material, machine, needs)
    work = _hours(needs.work(), machine)
    return Plan(
        model=material.about(experiment),
        data=material.rows(),
        training=needs.training(),
        memory=needs.memory,
        work=work,
        disk=needs.disk,
        machine=asdict(machine),
        totals=needs.totals() | {"hours": _wall(work, experiment, machine)},
        problems=problems,
        remedies=remedies,
    )


# ------------------------------------------------------------------------------- the base and the facts


def shape_folder(name: str) -> tuple[Path, str]:
    """A folder with a model's config.json, and what that is: its own, or the package's copy of its shape.

    Raises:
        UserError: a hub name of which nothing is on this machine.
    """
    place = models.locate(name)
    place = models.adapted_base(place) or place
    if Path(place).is_dir():
        return Path(place), "its folder"
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(place, "config.json")
    if isinstance(cached, str):
        return Path(cached).parent, "the hub's cache"
    copied = models.bundled_folder().parent / SHAPES / place.replace("/", "--")
    if copied.is_dir():
        return copied, "the package's copy of its config"
    known = sorted(folder.name.replace("--", "/") for folder in copied.parent.iterdir() if folder.is_dir())
    raise UserError(
        f"the config of {place} is not on this machine, and a plan downloads nothing; run `hf download {place} "
        f"config.json tokenizer.json tokenizer_config.json`, or name a folder or one of {', '.join(known)}"
    )


def _stand_in() -> Any:
    """A tokenizer for counting alone: words cut into pieces that make about CHARACTERS characters a token."""
    from tokenizers import Regex, Tokenizer, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    counting = Tokenizer(kinds.WordLevel({"<any>": 0, "<end>": 1}, unk_token="<any>"))
    counting.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\d{1,3}| ?\w{1,5}|[^\w]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=counting, unk_token="<any>", eos_token="<end>")


class _Material:
    """The base's shape and the experiment's examples. What was rehearsed on them is kept, for planning again."""

    def __init__(self, experiment: Experiment) -> None:
        from transformers import AutoConfig

        self.folder, self.source = shape_folder(experiment.model.name)
        try:
            self.config = AutoConfig.from_pretrained(self.folder)
        except (OSError, ValueError) as error:
            raise UserError(f"no architecture could be read from {self.folder}: {str(error).splitlines()[0]}") from None
        try:
            self.tokenizer = models.load_tokenizer(str(self.folder))
            self.tokenizer_of = "its own"
        except UserError:
            self.tokenizer = _stand_in()
            self.tokenizer_of = f"none at hand, so numbers of tokens are estimates: about {CHARACTERS} characters each"
        self.pad = models.pad_id(self.tokenizer)
        world = World.draw(experiment.facts)
        asked = questions(world)
        texts = {
            "bio": biographies(world),
            "qa_id": [item for item in asked if item.split == "id"],
            "qa_ood": [item for item in asked if item.split == "ood"],
        }
        self.parts = {part: encode(self.tokenizer, items) for part, items in texts.items()}
        self.trained = {"bio": self.parts["bio"], "qa": self.parts["qa_id"]}
        self._models: dict[Any, Any] = {}
        self._kept: dict[Any, Any] = {}

    def model(self, experiment: Experiment) -> Any:
        """The base, of fake tensors."""
        from transformers import AutoModelForCausalLM

        key = (experiment.model.dtype, experiment.model.attention)
        if key not in self._models:
            make = partial(
                AutoModelForCausalLM.from_config, copy.deepcopy(self.config),
                dtype=models.DTYPES[experiment.model.dtype], attn_implementation=experiment.model.attention,
            )  # fmt: skip
            try:
                with torch.random.fork_rng(), models.silent():
                    self._models[key] = pretended(make).eval()
            except (ValueError, ImportError) as error:
                raise UserError(
                    f"no model could be made from the config in {self.folder}: {str(error).splitlines()[0]}"
                ) from None
        return self._models[key]

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` gave the first time."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def check(self, experiment: Experiment) -> None:
        """What no later part could do without."""
        sizes = epoch_sizes(self.trained)
        for phases in experiment.strategies.values():
            for phase in phases:
                phase.updates(sizes)
        longest = max(len(item.ids) for items in self.parts.values() for item in items)
        room = getattr(self.config, "max_position_embeddings", None)
        if room and longest > room:
            raise UserError(f"the longest example has {longest} tokens, but the model has {room} positions")

    def about(self, experiment: Experiment) -> Row:
        """Parameters of the base, by kind and in all."""
        model = self.model(experiment)
        inside = {*scope(model, experiment.analysis.embeddings)}
        kinds: dict[str, dict[str, int]] = {}
        for name, kind in Anatomy(model).kind.items():
            own = kinds.setdefault(kind, {"parameters": 0, "scope": 0})
            size = model.get_parameter(name).numel()
            own["parameters"] += size
            own["scope"] += size * (name in inside)
        return {
            "name": experiment.model.name,
            "architecture": type(model).__name__,
            "source": self.source,
            "dtype": experiment.model.dtype,
            "parameters": sum(own["parameters"] for own in kinds.values()),
            "scope": sum(own["scope"] for own in kinds.values()),
            "kinds": kinds,
        }

    def rows(self) -> Row:
        """Examples and tokens of each part."""
        rows = [
            {"part": part, "examples": len(items), "tokens": sum(len(i.ids) for i in items),
             "longest": max((len(i.ids) for i in items), default=0)}
            for part, items in self.parts.items()
        ]  # fmt: skip
        return {"tokenizer": self.tokenizer_of, "rows": rows}


def work_of(items: Sequence[Encoded], size: int) -> Work:
    """What goes through a model for these texts, shortest first in batches of `size`, padding included."""
    lengths = sorted(len(item.ids) for item in items)
    found: Work = Counter()
    for start in range(0, len(lengths), size):
        batch = lengths[start : start + size]
        found["tokens"] += len(batch) * batch[-1]
        found["pairs"] += len(batch) * batch[-1] ** 2
    return found


def _times(work: Mapping[str, float], factor: float) -> Work:
    return Counter({name: value * factor for name, value in work.items()})


# ------------------------------------------------------------------------------- what stages hold


class _Needs:
    """Memory, work and disk of one experiment on one machine."""

    def __init__(self, experiment: Experiment, material: _Material, machine: Machine) -> None:
        self.experiment, self.material, self.machine = experiment, material, machine
        self.model = material.model(experiment)
        sized = [(name, p.numel(), p.element_size(), _wide(p)) for name, p in self.model.named_parameters()]
        inside = {*scope(self.model, experiment.analysis.embeddings)}
        self.weights = sum(n * bytes for _, n, bytes, _ in sized)
        self.sums = sum(n * wide for _, n, _, wide in sized)  # of one trace
        self.largest = max(n * wide for _, n, _, wide in sized)
        self.scope = sum(n for name, n, _, _ in sized if name in inside)
        self.parameters = sum(n for _, n, _, _ in sized)
        self.bf16 = machine.gpu is not None and experiment.train.precision != "float32"
        self.bf16 = self.bf16 or models.trains_in_bf16(experiment.train.precision)
        self.precision = "bfloat16" if self.bf16 else experiment.model.dtype
        online, parts = experiment.trace.online, experiment.trace.parts
        self.online = TASKS * len(REDUCTIONS) * parts * self.sums * online  # the accumulators of a training
        self.whens = ["online"] * online + ["final"] + ["checkpoints"] * experiment.trace.checkpoints
        self.memory = [row for process in self.processes() for row in self._stages(process)]
        self.disk = self._disk()

    def processes(self) -> list[str]:
        return [*self.experiment.strategies, "base"]

    def _stages(self, process: str) -> Iterator[Row]:
        """The fullest moment of each stage, on the GPU and on the host."""
        e = self.experiment
        if process == "base":
            stages: dict[str, Callable[[], Iterator[tuple[str, Parts, Parts]]]] = {"eval": self._eval}
            stages |= {"trace": self._doctor} if e.trace.check else {}
            stages |= {"mechanism": partial(self._mechanism, None)} if e.mechanism.run else {}
        else:
            stages = {
                "train": partial(self._train, process),
                "eval": self._eval,
                "trace": partial(self._trace, process),
            }
            stages |= {"analyze": self._analyze}
            stages |= {"intervene": self._intervene} if e.interventions.run else {}
            stages |= {"mechanism": partial(self._mechanism, process)} if e.mechanism.run else {}
            stages |= {"retain": self._retain} if e.retention.run else {}
        for stage, moments in stages.items():
            fullest: dict[str, tuple[str, Parts]] = {}
            for what, device, host in moments():
                if self.machine.gpu is None:
                    host, device = {**host, **device}, {}
                for where, parts in (("gpu", device), ("ram", host)):
                    if sum(parts.values()) > sum(fullest.get(where, ("", {}))[1].values()):
                        fullest[where] = (what, {k: v for k, v in parts.items() if v})
            for where, (what, parts) in fullest.items():
                yield {"process": process, "stage": stage, "where": where, "moment": what,
                       "bytes": round(sum(parts.values())), "parts": {k: round(v) for k, v in parts.items()}}  # fmt: skip

    # Each of these gives moments: what happens, what is held on the training's device, and what on the host.

    def _train(self, name: str) -> Iterator[tuple[str, Parts, Parts]]:
        """`pipeline.teach`: the Trainer's fused AdamW holds two numbers a parameter, and weights, gradients and states
        are of the weights' dtype. The online trace's sums are made where the base is read, on the host; its state is
        copied to be saved, and once more divided when training is over."""
        e = self.experiment
        held = {"weights": self.weights, "optimiser": 2 * self.weights}
        host = {"trace's sums": self.online}
        for phase, data in self.phases(name):
            chosen = _costliest(data)
            step = self._step(phase, chosen)
            yield f"a step of {phase.name}", held | step, host
            if e.trace.online:
                yield f"a traced step of {phase.name}", held | self._traced(chosen), host
        for what, texts in samples(self.material.parts, e.train.recall_examples).items():
            yield f"recall of {what}", held | self._recall(texts), host
        if e.trace.online:
            yield "a checkpoint", held, host | {"copies of the sums": self.online}
            yield "the online trace's end", held, host | {"copies of the sums": self.online}

    def phases(self, name: str) -> list[tuple[Phase, Updates]]:
        """A strategy's phases, each with what its updates see."""
        e, seen = self.experiment, self.material
        return [
            (phase, seen.once((name, index, repr(phase)), lambda index=index, phase=phase: Updates(
                phase, seen.trained, f"{e.train.seed}/{index}", seen.pad, e.trace.targets)))
            for index, phase in enumerate(e.strategies[name])
        ]  # fmt: skip

    def _step(self, phase: Phase, chosen: Mapping[str, Batch]) -> Parts:
        """What an update holds beside weights and optimiser."""
        shapes = tuple((task, *batch["input_ids"].shape) for task, batch in chosen.items())
        key = ("step", self.experiment.model, self.bf16, shapes)
        weights = {tuple(p.shape) for p in self.model.parameters()}
        vocabulary = self._vocabulary

        def make() -> Parts:
            forward, model = self.model.forward, self.model
            if self.bf16:  # as accelerate wraps it
                from accelerate.utils import convert_outputs_to_fp32

                forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(forward))
            kinds: dict[str, Callable[[Tensor], bool]] = {
                "weights in bf16": lambda x: self.bf16 and x.dtype == torch.bfloat16 and tuple(x.shape) in weights,
                "logits": lambda x: x.dim() > 1 and x.shape[-1] == vocabulary,
                "activations": lambda x: True,
            }
            try:
                model.train()
                with Rehearsal(kinds) as seen:
                    update_loss(forward, phase, chosen).backward()
                    for p in model.parameters():
                        seen.name(p.grad, "gradients")
                return {label: float(size) for label, size in seen.peak().items()}
            finally:
                model.zero_grad()
                model.eval()

        found = self.material.once(key, make)
        grown = found | {"gradients": found.get("gradients", 0)}
        # when the backward is over all gradients are there, and nothing else
        return grown if sum(found.values()) > self.weights else {"gradients": self.weights}

    @property
    def _vocabulary(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)

    def _traced(self, chosen: Mapping[str, Batch]) -> Parts:
        """What a trace of some batches holds beside weights and sums."""
        rows = [{k: v for k, v in batch.items() if k not in ("group", "trace_labels", "labels")}
                | {"labels": batch.get("trace_labels", batch["labels"])} for batch in chosen.values()]  # fmt: skip
        # the mean gradient of a step, and a sum that is not wanted as it is
        return {"activations": max(self._estimate([row]) for row in rows), "a tensor's sums": 2 * self.largest}

    def _estimate(self, rows: list[Mapping[str, Tensor]]) -> float:
        """Activations of the costliest of some batches, as a trace itself estimates them."""
        largest = max(rows, key=lambda row: row["input_ids"].numel() * row["input_ids"].shape[1])
        targets = int((largest["labels"] != -100).sum(1).max())
        key = ("trace", self.experiment.model, largest["input_ids"].shape, targets)
        return self.material.once(key, lambda: float(Engine(self.model).memory(rows, 1)[1].activations))

    def _recall(self, items: Sequence[Encoded]) -> Parts:
        """What `evaluate.recall` holds beside the weights: of its last and longest batch, and of the one before."""
        order = sorted(items, key=lambda item: len(item.ids))
        rows = list(batches(order, RECALLED, "answer", pad_id=self.material.pad))[-2:]
        key = ("recall", self.experiment.model, tuple(row["input_ids"].shape for row in rows))

        def make() -> float:
            with torch.no_grad(), Rehearsal() as seen:
                for row in rows:
                    logits = self.model(input_ids=row["input_ids"], attention_mask=row["attention_mask"]).logits
                    losses, _ = token_losses(logits, row["labels"])
                    right = logits[:, :-1].argmax(-1) == row["labels"][:, 1:]
                del logits, losses, right
            return float(sum(seen.peak().values()))

        return {"logits and activations": self.material.once(key, make)}

    def _eval(self) -> Iterator[tuple[str, Parts, Parts]]:
        for part, items in self.material.parts.items():
            yield f"recall of {part}", {}, {"weights": self.weights} | self._recall(items)

    def _doctor(self) -> Iterator[tuple[str, Parts, Parts]]:
        """`doctor.diagnose`: about four gradients, and of half precision a model in float32 with gradients."""
        half = self.experiment.model.dtype in ("bfloat16", "float16")
        parts = {"weights": self.weights, "gradients": 3 * self.weights + self.sums}
        yield "the check", {}, parts | {"a copy in float32": 2 * self.sums * half}

    def _trace(self, name: str) -> Iterator[tuple[str, Parts, Parts]]:
        """`pipeline.take_traces`: the traces of one task are still held while the next one's are taken."""
        e = self.experiment
        several = len(e.trace.measures) * e.trace.parts
        before = 0
        for task, items in self.material.trained.items():
            items = sample(items, e.trace.examples) if e.trace.examples else items
            rows = batches(items, e.trace.batch, e.trace.targets, pad_id=self.material.pad, by_length=True)
            rows = [{k: v for k, v in row.items() if k != "group"} for row in rows]
            places = 1 + e.trace.checkpoints
            parts = {"weights": places * self.weights, "activations": self._estimate(rows)}
            yield f"the trace of {task}", {}, parts | {"sums": several * self.sums, "the task before": before}
            before = several * self.sums
        if e.trace.checkpoints:
            each = sum(len(_saved(len(data), e.train.checkpoint_every)) for _, data in self.phases(name))
            yield "the mean over checkpoints", {}, {"weights": self.weights, "traces": (each + 1) * several * self.sums}

    def _read(self, when: str) -> int:
        """Bytes of the traces of one time that a stage reads, all reductions."""
        e = self.experiment
        return TASKS * e.trace.parts * self.sums * (len(REDUCTIONS) if when == "online" else 1)

    def _sets(self, fractions: int) -> float:
        """A mask of every task's set and of the shared one, at each fraction."""
        return fractions * (TASKS + 1) * self.scope

    def _analyze(self) -> Iterator[tuple[str, Parts, Parts]]:
        """`pipeline.analyze`: all traces, the sets at the central fractions, and what one table needs beside them."""
        options, parts = self.experiment.analysis, self.experiment.trace.parts
        held = {"weights": self.weights, "traces": sum(map(self._read, self.whens))}
        sets = len(self.whens) * self._sets(len(options.central_fractions))
        means = TASKS * self.sums
        yield "sets", {}, held | {"strengths": 2 * means, "masks": sets}
        masks = TASKS * len(options.fractions) * self.scope
        yield "overlap", {}, held | {"strengths": means + 2 * self.largest, "masks": sets + masks}
        yield "similarity", {}, held | {"strengths": means, "masks": sets, "ranks": RANKING * self.scope}
        kept = (parts + 1) * len(options.central_fractions) * self.scope
        central = TASKS * len(options.central_fractions) * self.scope
        yield "centralization", {}, held | {"strengths": means, "masks": sets + kept + central}

    def controls(self) -> int:
        """Sets of one time and fraction that are put in: the shared one and its controls."""
        return 1 + 2 * self.experiment.interventions.seeds + TASKS

    def _intervene(self) -> Iterator[tuple[str, Parts, Parts]]:
        """`pipeline.intervene`: base and tuned model, a copy of the values of each, and every set of every time."""
        options = self.experiment.interventions
        held = {"weights": 2 * self.weights, "copies of both": 2 * self.weights}
        held["traces"] = sum(self._read(when) / (len(REDUCTIONS) if when == "online" else 1) for when in self.whens)
        masks = len(self.whens) * len(options.fractions) * self.controls() * self.scope
        strengths = TASKS * self.sums
        chosen = self._sets(len(options.fractions))
        yield "controls", {}, held | {"masks": masks + chosen, "strengths": 2 * strengths + self.sums}
        for part in ("qa_id", "qa_ood"):
            asked = sample(self.material.parts[part], options.questions)
            yield (
                f"recall of {part}",
                {},
                held | {"masks": masks + chosen, "strengths": strengths} | self._recall(asked),
            )

    def _mechanism(self, name: str | None) -> Iterator[tuple[str, Parts, Parts]]:
        """`mechanism.explain`: its parts one after the other, the model and the shared sets held throughout."""
        options, seen = self.experiment.mechanism, self.material
        sets = 0 if name is None else len(self.whens) * self.scope
        held = {"weights": self.weights, "masks": sets}
        asked = [i for part in ("qa_id", "qa_ood") for i in sample(seen.parts[part], options.questions)]
        longest = sorted(asked, key=lambda item: len(item.ids))[-64:]
        if {"gradients", "dynamics"} & {*options.parts}:
            texts = sorted(seen.parts["bio"], key=lambda item: len(item.ids))
            texts = [item.about(len(item.mentions) - 1) for item in texts[-options.together :]]
            row = collate(texts + asked[: options.together], pad_id=seen.pad)
            others = 0 if name is None else len(self.whens) * (1 + 2 * options.draws) * self.scope
            parts = {"activations": self._estimate([{k: v for k, v in row.items() if k != "group"}])}
            yield "gradients of both formats", {}, held | parts | {"masks": sets + others}
        if {"circuit", "signature", "dynamics"} & {*options.parts}:
            row = collate(longest, "answer", pad_id=seen.pad)
            yield "attribution", {}, held | {"activations": self._inward(row)}
        if "positions" in options.parts and name is not None:
            yield "weights at some tokens", {}, held | {"weights": 3 * self.weights} | self._recall(asked)
        if "dynamics" in options.parts and name is not None:
            yield "checkpoints", {}, held | {"weights": 3 * self.weights, "traces": 2 * TASKS * self.sums,
                                             "activations": self._inward(collate(longest, "answer", pad_id=seen.pad))}  # fmt: skip
        yield "recall", {}, held | self._recall(asked)

    def _inward(self, row: Batch) -> float:
        """What a forward and backward to the embeddings holds, no parameter's gradient with it."""

        def make() -> float:
            put = lambda module, args, output: output.detach().requires_grad_()
            with models.differentiating(self.model), Rehearsal() as seen:
                with self.model.get_input_embeddings().register_forward_hook(put):
                    logits = self.model(input_ids=row["input_ids"], attention_mask=row["attention_mask"]).logits
                    example_losses(logits, row["labels"]).sum().backward()
            return float(sum(seen.peak().values()))

        return self.material.once(("inward", self.experiment.model, row["input_ids"].shape), make)

    def _retain(self) -> Iterator[tuple[str, Parts, Parts]]:
        """`retention.retain`: as training, beside a copy of the taught values and the sets."""
        e, options = self.experiment, self.experiment.retention
        sets = len(self.whens) * (1 + 2 * options.draws) * self.scope
        batch = {"bio": options.bio + options.replay_bio, "qa": options.qa + options.replay_qa}
        phase = Phase("new", {task: count for task, count in batch.items() if count}, options.steps)
        data = Updates(phase, self.material.trained, "0", self.material.pad, e.trace.targets)
        held = {"weights": self.weights, "optimiser": 2 * self.weights} | self._step(phase, _costliest(data))
        yield "a step", held, {"a copy of the weights": self.weights, "masks": sets}

    # ---- all processes together

    def totals(self) -> dict[str, int]:
        """Bytes that are taken at once: of the processes that run together, on the GPU, in RAM and on the disk."""
        found = {}
        together = min(self.experiment.jobs, len(self.processes()))
        for where in ("gpu", "ram"):
            peaks = [
                max([row["bytes"] for row in self.memory if (row["process"], row["where"]) == (process, where)] or [0])
                for process in self.processes()
            ]
            found[where] = sum(sorted(peaks)[-together:])
        found["ram"] += (together + (self.experiment.jobs > 1)) * _interpreter()
        found["disk"] = sum(row["bytes"] for row in self.disk)
        return found

    def problems(self) -> list[str]:
        """What does not fit, and by how much."""
        found, totals = [], self.totals()
        words = {"gpu": "memory of the GPU", "ram": "RAM", "disk": "disk"}
        for where, free in (("gpu", self.machine.gpu), ("ram", self.machine.ram), ("disk", self.machine.disk)):
            if free is None or totals[where] <= SPARE * free:
                continue
            if where == "disk":
                row = max(self.disk, key=lambda row: row["bytes"])
                most = f"{size_text(row['bytes'])} of it for {row['what']}"
            else:
                row = max((row for row in self.memory if row["where"] == where), key=lambda row: row["bytes"])
                most = f"{size_text(row['bytes'])} of it by {row['process']}: {row['stage']}, {row['moment']}"
            found.append(
                f"{words[where]}: {size_text(totals[where])} are needed at once ({most}), but {size_text(free)} are "
                f"free, of which {SPARE:.0%} may be planned with: {size_text(totals[where] - SPARE * free)} too much"
            )
        return found

    def _disk(self) -> list[Row]:
        """`pipeline`'s run folder: what stays, and what the strategies in training have beside it."""
        e, rows = self.experiment, []
        strategies = len(e.strategies)
        phases = [len(phases) for phases in e.strategies.values()]
        kept = {name: [_saved(len(data), e.train.checkpoint_every) for _, data in self.phases(name)]
                for name in e.strategies}  # fmt: skip
        all_kept = sum(len(each) for saves in kept.values() for each in saves)
        copies = all_kept if e.train.keep_checkpoints else sum(phases)
        rows.append(("the taught models", copies * self.weights, True))
        several = TASKS * len(e.trace.measures) * e.trace.parts * self.sums
        places = 1 + (all_kept / strategies + 1 if e.trace.checkpoints else 0)
        rows.append(("traces", strategies * (places * several + 2 * self.online), True))  # online ones lie there twice
        sets = strategies * len(self.whens) * self._sets(len(e.analysis.central_fractions)) / 8
        rows.append(("shared sets", sets, True))
        resumable = 3 * self.weights + self.online
        each = []
        for saves in kept.values():
            # the last one of every phase stays until the strategy is taught; one more while it is replaced
            number = sum(map(len, saves)) if e.train.keep_checkpoints else len(saves) + (max(map(len, saves)) > 1)
            each.append(number * resumable)
        together = sum(sorted(each)[-min(e.jobs, strategies) :])
        if e.retention.run:
            together = max(together, min(e.jobs, strategies) * 2 * 3 * self.weights)
        rows.append(("checkpoints while training", together, False))
        return [{"what": what, "bytes": round(size), "lasting": lasting} for what, size, lasting in rows]

    # ---- work

    def training(self) -> list[Row]:
        """What every phase sees."""
        rows = []
        for name in self.experiment.strategies:
            for phase, data in self.phases(name):
                seen = _seen(data)
                count = {task: count * len(data) for task, count in phase.composition().items()}
                rows.append({"strategy": name, "phase": phase.name, "updates": len(data), "examples": count,
                             "tokens": round(seen["tokens"]), "flops": 3 * self.flops(seen)})  # fmt: skip
        return rows

    def flops(self, work: Mapping[str, float]) -> float:
        """Of one forward: 2 N a position, N the parameters of matrix products, and 4 L H Q T for the attention of L
        layers with H heads of width Q to T positions (Chowdhery et al. 2022, arXiv 2204.02311, appendix B; a backward
        is two more of them)."""
        c = self.model.config.get_text_config()
        heads = getattr(c, "num_attention_heads", 0) or 0
        width = heads * (getattr(c, "head_dim", None) or (c.hidden_size // heads if heads else 0))
        return 2 * self._multiplied * work["tokens"] + 4 * c.num_hidden_layers * width * work["pairs"]

    @cached_property
    def _multiplied(self) -> float:
        """Parameters that a position is multiplied with: not the lookups, and of experts those that are chosen."""
        anatomy, c = Anatomy(self.model), self.model.config.get_text_config()
        experts = getattr(c, "num_experts", None) or getattr(c, "num_local_experts", None) or 1
        share = {"experts": getattr(c, "num_experts_per_tok", experts) / experts, "position": 0.0}
        head, found = self.model.get_output_embeddings(), 0.0
        tied = head is not None and head.weight is self.model.get_input_embeddings().weight
        for name, kind in anatomy.kind.items():
            used = share.get(kind, 1.0) if kind != "embedding" else float(tied)
            found += used * anatomy.shapes[name].numel()
        return found

    def work(self) -> list[Row]:
        """Operations of each stage; a trace costs as much as a training's forward and backward."""
        e, seen, rows = self.experiment, self.material, []

        def add(process: str, stage: str, where: str, flops: float) -> None:
            rows.append({"process": process, "stage": stage, "where": where, "flops": flops})

        device = "gpu" if self.machine.gpu is not None else "ram"
        asked = sum((work_of(items, RECALLED) for items in seen.parts.values()), Counter())
        for name in self.experiment.strategies:
            steps, traced = 0.0, 0.0
            for _, data in self.phases(name):
                steps += 3 * self.flops(_seen(data))
            updates = sum(len(data) for _, data in self.phases(name))
            if e.trace.online:
                traced = steps / e.trace.every
            few = sum((work_of(i, RECALLED) for i in samples(seen.parts, e.train.recall_examples).values()), Counter())
            times = 1 + len(self.phases(name)) + (updates // e.train.recall_every if e.train.recall_every else 0)
            add(name, "train", device, steps + times * self.flops(few))
            add(name, "train, traced", device, traced)
            add(name, "eval", "ram", self.flops(asked))
            chosen = [sample(i, e.trace.examples) if e.trace.examples else i for i in seen.trained.values()]
            once = 3 * sum(self.flops(work_of(items, e.trace.batch)) for items in chosen)
            places = sum(len(_saved(len(data), e.train.checkpoint_every)) for _, data in self.phases(name))
            add(name, "trace", "ram", once * (places if e.trace.checkpoints else 1))
            if e.interventions.run:
                few = sum((work_of(sample(seen.parts[p], e.interventions.questions), RECALLED)
                           for p in ("qa_id", "qa_ood")), Counter())  # fmt: skip
                sets = len(self.whens) * len(e.interventions.fractions) * self.controls()
                add(name, "intervene", "ram", (2 * sets + 2) * self.flops(few))
            if e.mechanism.run:
                add(name, "mechanism", "ram", self._mechanism_flops(2))
            if e.retention.run:
                o = e.retention
                texts = _times(work_of(seen.parts["bio"], o.bio), 1 / len(seen.parts["bio"]))
                once = 3 * o.steps * (2 * o.bio + o.replay_bio) * self.flops(texts)
                qa = _times(work_of(seen.parts["qa_id"], 128), 1 / len(seen.parts["qa_id"]))
                add(name, "retain", device, once + 3 * o.steps * (2 * o.qa + o.replay_qa) * self.flops(qa))
        add("base", "eval", "ram", self.flops(asked))
        if e.mechanism.run:
            add("base", "mechanism", "ram", self._mechanism_flops(1))
        return rows

    def _mechanism_flops(self, kinds: int) -> float:
        """Of one model; `kinds` of questions are asked."""
        o, seen = self.experiment.mechanism, self.material
        mean = lambda items: _times(work_of(items, 64), 1 / len(items))
        bio, qa = (self.flops(mean(seen.parts[part])) for part in ("bio", "qa_ood"))
        pair = bio + qa  # a fact's two formats; the text that stores it ends with its object
        layers = self.model.config.get_text_config().num_hidden_layers
        facts, few = 2 * o.facts, kinds * o.questions
        fractions = 9  # of `circuit.curve`
        nodes = len(circuit.NODES)
        costs = {
            "gradients": 3 * facts * pair,
            "representations": facts * pair,
            "signature": 2 * o.signature * (2 * o.steps + 8) * pair,
            "lens": facts * pair,
            "circuit": few * qa * (2 * layers * 2 * o.steps + nodes * (o.alone + 2 * fractions * (1 + o.seeds))),
            "positions": few * qa * 3 * len(positions.CHOICES) * 2,
            "transfer": 6 * few * qa,
        }
        costs["dynamics"] = o.checkpoints * (costs["gradients"] + few * qa * 4 * layers * o.steps)
        return sum(costs[part] for part in o.parts)


def _wide(p: Tensor) -> int:
    """Bytes of a sum of one parameter's gradients."""
    return torch.empty(0, dtype=sum_dtype(p.dtype)).element_size()


def _saved(updates: int, every: int) -> list[int]:
    """After which updates of a phase a checkpoint is saved."""
    return sorted({*range(every, updates + 1, every), updates})


def _looked_at(data: Updates) -> list[int]:
    return sorted({round(i) for i in torch.linspace(0, len(data) - 1, min(len(data), LOOKED_AT)).tolist()})


def _sizes(data: Updates, update: int) -> list[tuple[int, int]]:
    """(examples, longest) of each task of an update."""
    found = []
    for task, count in data.tasks.items():
        chosen = data.orders[task][update * count : (update + 1) * count]
        found.append((count, max(len(data.examples[task][i].ids) for i in chosen)))
    return found


def _seen(data: Updates) -> Work:
    """What goes through the model in a whole phase, padding included."""
    looked, found = _looked_at(data), Counter()
    for update in looked:
        for count, longest in _sizes(data, update):
            found["tokens"] += count * longest
            found["pairs"] += count * longest**2
    return _times(found, len(data) / len(looked))


def _costliest(data: Updates) -> dict[str, Batch]:
    """The batches of the update with the most tokens."""
    return data[max(_looked_at(data), key=lambda update: sum(n * longest for n, longest in _sizes(data, update)))]


def _interpreter() -> int:
    """Bytes that a process holds before it reads a model: this one, which has the same libraries."""
    import psutil

    return psutil.Process().memory_info().rss


# ------------------------------------------------------------------------------- settings that would fit


def _candidates(experiment: Experiment) -> Iterator[dict[str, str]]:
    """Changes that take less, the least painful first."""
    e = experiment
    if e.jobs > 1:
        yield {"jobs": "1"}
    if e.trace.batch > 8:
        yield {"trace.batch": "8"}
    if e.interventions.run and e.interventions.seeds > 1:
        yield {"interventions.seeds": "1"}
    if e.interventions.run and len(e.interventions.fractions) > 1:
        yield {"interventions.fractions": "[0.05]"}
    if len(e.analysis.central_fractions) > 1:
        yield {"analysis.central_fractions": "[0.05]"}
    if e.train.keep_checkpoints and not e.trace.checkpoints:
        yield {"train.keep_checkpoints": "false"}
    for share in (2, 4, 8):
        yield dict(_smaller(e, share))
    if e.retention.run:
        yield {"retention.run": "false"}
    if e.mechanism.run:
        yield {"mechanism.run": "false"}
    if e.interventions.run:
        yield {"interventions.run": "false"}
    if e.trace.check:
        yield {"trace.check": "false"}
    if e.trace.parts > 2:
        yield {"trace.parts": "2"}
    if e.trace.online:
        yield {"trace.online": "false"}
    if e.model.dtype != "bfloat16":
        yield {"model.dtype": "bfloat16"}


def _smaller(experiment: Experiment, share: int) -> Iterator[tuple[str, str]]:
    """Every phase's batch divided, and its updates multiplied, so that all is seen as often."""
    for name, phases in experiment.strategies.items():
        for index, phase in enumerate(phases):
            place = f"strategies.{name}.{index}"
            for kind in ("batch", "replay"):
                for task, count in getattr(phase, kind).items():
                    yield f"{place}.{kind}.{task}", str(max(1, count // share))
            if phase.steps:
                yield f"{place}.steps", str(phase.steps * share)


def _remedies(experiment: Experiment, material: _Material, machine: Machine) -> list[str]:
    """Settings that would make the experiment fit: each that does alone, else the fewest found that do together."""

    def fits(changes: Sequence[Mapping[str, str]]) -> bool:
        merged = {name: value for change in changes for name, value in change.items()}
        return not _Needs(config.override(experiment, merged), material, machine).problems()

    every = list(_candidates(experiment))
    alone = [change for change in every if fits([change])]
    if alone:
        return [_as_typed(change) for change in alone]
    taken: list[dict[str, str]] = []
    for change in every:
        taken = [other for other in taken if not other.keys() & change.keys()] + [change]
        if fits(taken):
            break
    else:
        return []
    for change in list(taken):  # what the later ones made needless
        rest = [other for other in taken if other is not change]
        if rest and fits(rest):
            taken = rest
    return [" ".join(_as_typed(change) for change in taken)]


def _as_typed(change: Mapping[str, str]) -> str:
    return " ".join(f"--{name} {value!r}" if " " in value else f"--{name} {value}" for name, value in change.items())


# ------------------------------------------------------------------------------- time


def _width(machine: Machine, experiment: Experiment) -> str:
    if machine.gpu is not None:
        return f"{machine.name}; stages off it on {experiment.threads} threads"
    return f"{experiment.threads} thread" + "s" * (experiment.threads > 1)


def _products(material: _Material, dtype: str, threads: int, seconds: float = 0.5) -> float:
    """Operations a second of the matrix product of the model's MLP with 512 positions."""
    c = material.config.get_text_config()
    width = min(4096, c.hidden_size)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a, b = (
            torch.randn(shape, dtype=models.DTYPES[dtype], device=device)
            for shape in ((512, width), (width, 4 * width))
        )
        best, end = math.inf, time.perf_counter() + seconds
        while time.perf_counter() < end or best == math.inf:
            clock = time.perf_counter()
            a @ b
            if device == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - clock)
    finally:
        torch.set_num_threads(before)
    return 2 * 512 * width * 4 * width / best


def _stepped(experiment: Experiment, material: _Material, machine: Machine, needs: _Needs) -> Machine:
    """The machine with the speed that one real update reaches, forward, backward and optimiser."""
    from transformers import AutoModelForCausalLM

    name = next(iter(experiment.strategies))
    phase, data = needs.phases(name)[0]
    batches_of = data[0]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    before = torch.get_num_threads()
    torch.set_num_threads(experiment.threads)
    try:
        with torch.random.fork_rng(), models.silent():
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(material.config), dtype=models.DTYPES[experiment.model.dtype],
                attn_implementation=experiment.model.attention,
            ).to(device).train()  # fmt: skip
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        here = {task: {k: v.to(device) for k, v in batch.items()} for task, batch in batches_of.items()}
        clock = 0.0
        for _ in range(2):  # the first one warms up
            clock = time.perf_counter()
            with torch.autocast(device, torch.bfloat16, enabled=needs.bf16):
                loss = update_loss(model, phase, here)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            if device == "cuda":
                torch.cuda.synchronize()
        seconds = time.perf_counter() - clock
    finally:
        torch.set_num_threads(before)
    work: Work = Counter()
    for count, longest in _sizes(data, 0):
        work["tokens"] += count * longest
        work["pairs"] += count * longest**2
    reached = 3 * needs.flops(work) / seconds
    share = reached / machine.flops[needs.precision]
    return replace(machine, flops={dtype: share * value for dtype, value in machine.flops.items()},
                   source=f"one real update of {seconds:.3g} s, {share:.0%} of the speed of {machine.source}")  # fmt: skip


def _hours(work: list[Row], machine: Machine) -> list[Row]:
    """The rows with their hours: training in its precision, all else in the weights' dtype."""
    if not machine.flops:
        return [row | {"hours": None} for row in work]
    fast = max(machine.flops.values())
    slow = min(machine.flops.values())
    return [
        row | {"hours": row["flops"] / (fast if row["stage"] in ("train", "retain") else slow) / 3600} for row in work
    ]


def _wall(work: list[Row], experiment: Experiment, machine: Machine) -> float | None:
    """Hours until all is done, processes sharing the jobs."""
    if not machine.flops:
        return None
    hours: dict[str, float] = defaultdict(float)
    for row in work:
        hours[row["process"]] += row["hours"]
    together = max(1, min(experiment.jobs, (os.cpu_count() or 1) // experiment.threads))
    busy = [0.0] * together
    for name in hours:
        place = busy.index(min(busy))
        busy[place] += hours[name]
    shared_gpu = sum(row["hours"] for row in work if row["where"] == "gpu")
    return max(*busy, shared_gpu) if len(busy) > 1 else busy[0]


# ------------------------------------------------------------------------------- telling


def _told(found: Plan) -> Iterator[str]:
    about = found.model
    yield f"{about['name']}: {about['architecture']}, {about['parameters']:,} parameters in {about['dtype']}"
    yield f"shape from {about['source']}; tokenizer: {found.data['tokenizer']}"
    rows = [["parameters", "", "in scope"]]
    rows += [[kind, f"{own['parameters']:,}", f"{own['scope']:,}"] for kind, own in about["kinds"].items()]
    rows.append(["all", f"{about['parameters']:,}", f"{about['scope']:,}"])
    yield "\n" + _right(rows)
    rows = [["examples", "", "tokens", "longest"]]
    rows += [[r["part"], f"{r['examples']:,}", f"{r['tokens']:,}", str(r["longest"])] for r in found.data["rows"]]
    yield "\n" + _right(rows)
    rows = [["training", "updates", "examples", "tokens", "PFLOP"]]
    for r in found.training:
        seen = " + ".join(f"{count:,} {task}" for task, count in r["examples"].items())
        rows.append([f"{r['strategy']}: {r['phase']}", f"{r['updates']:,}", seen, f"{r['tokens']:,}",
                     f"{r['flops'] / 1e15:,.4g}"])  # fmt: skip
    yield "\n" + _right(rows)
    rows = [["memory", "where", "at most", "made of"]]
    for r in found.memory:
        parts = ", ".join(f"{what} {size_text(size)}" for what, size in sorted(r["parts"].items(), key=lambda x: -x[1]))
        rows.append([f"{r['process']}: {r['stage']}", r["where"], size_text(r["bytes"]), f"{r['moment']}: {parts}"])
    yield "\n" + aligned(rows)
    rows = [["time", "where", "PFLOP", "hours"]]
    for r in found.work:
        hours = "–" if r["hours"] is None else f"{r['hours']:.3g}"
        rows.append([f"{r['process']}: {r['stage']}", r["where"], f"{r['flops'] / 1e15:,.4g}", hours])
    yield "\n" + _right(rows)
    rows = [["disk", "", ""]]
    rows += [[r["what"], size_text(r["bytes"]), "" if r["lasting"] else "meanwhile"] for r in found.disk]
    yield "\n" + aligned(rows)
    rows = [["in all", "at once", "free"]]
    for where, name in (("gpu", "GPU"), ("ram", "RAM"), ("disk", "disk")):
        free = found.machine[where]
        if where != "gpu" or free is not None:
            rows.append([name, size_text(found.totals[where]), "not known" if free is None else size_text(free)])
    yield "\n" + aligned(rows)
    if found.totals["hours"] is None:
        yield "hours: not known, since no speed was measured or told"
    else:
        speeds = ", ".join(f"{value / 1e12:.3g} TFLOP/s in {dtype}" for dtype, value in found.machine["flops"].items())
        yield f"hours: {found.totals['hours']:.3g}, at {speeds} ({found.machine['source']})"
    yield ""
    if found.fits:
        yield "It fits."
        return
    yield "It does not fit."
    yield from (f"- {problem}" for problem in found.problems)
    if not found.remedies:
        yield "No setting that a plan knows of would make it fit: take a smaller model or a larger machine."
    elif len(found.remedies) == 1:
        yield f"It would fit with {found.remedies[0]}"
    else:
        yield "Each of these alone would make it fit:"
        yield from (f"  {remedy}" for remedy in found.remedies)


def _right(rows: list[list[str]]) -> str:
    """A table whose columns of numbers, all but the first, are aligned on the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return aligned([[row[0], *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))] for row in rows])
