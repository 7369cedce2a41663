"""What an experiment holds and does, stage by stage: memory, operations and disk, on the facts that it will draw.

What goes on inside a model is rehearsed (`rehearse`); what the stages keep beside it is counted here as `pipeline`
keeps it, so a stage that comes to keep other things has its function here to be changed with it.

Of several processes (`Launch`) it is told what each of them holds, and where process 0 holds more, or works alone,
what that one does.

It reads a config and perhaps a tokenizer, no weights, and knows neither what fits nor how long anything takes.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crosstrace.core.errors import UserError
from crosstrace.core.pieces import rows_of
from crosstrace.data.text import KNOWN
from crosstrace.data.tokens import IGNORE, Batch, Encoded, batches, check_room, collate, context_length, encode
from crosstrace.experiment import config
from crosstrace.experiment.analysis import ANALYSES, Analysis
from crosstrace.experiment.config import Experiment
from crosstrace.experiment.examples import (
    REPLAYED,
    encode_tasks,
    replayable,
    sample,
    samples,
    taught_texts,
    training_examples,
)
from crosstrace.experiment.registry import OWN, stages
from crosstrace.experiment.stage import Stage
from crosstrace.experiment.stages.analyze import DRIFT_DRAWS
from crosstrace.experiment.stages.known import asks
from crosstrace.experiment.studied import LEARNING, View
from crosstrace.models import gguf, loading
from crosstrace.models.anatomy import Anatomy
from crosstrace.planning import disk
from crosstrace.planning.rehearse import Parts, Understudy
from crosstrace.trace.memory import MOST_PASSES, SPARE, free_memory
from crosstrace.trace.rules import sum_dtype
from crosstrace.trace.trace import REDUCTIONS
from crosstrace.training.evaluation import TOKENS, recall_batches
from crosstrace.training.recipes import Phase
from crosstrace.training.updates import Updates, epoch_sizes

Row = dict[str, Any]
Moment = tuple[
    str, Mapping[str, float], Mapping[str, float]
]  # what happens; what is held on the training's device, and on the host
Work = Counter  # "tokens": positions that go through the model; "pairs": Σ of each text's length squared
LOOKED_AT = 2000  # updates of a phase whose lengths are counted; of more, so many spread evenly
CHARACTERS = 4  # a token, by rule of thumb, where there is no tokenizer
# and about as many words as chat templates have
STAND_IN_TEMPLATE = (
    "You are a helpful assistant. Answer the questions of the user in a few words.<end>"
    "{% for message in messages %}<any>{{ message['role'] }}<any>{{ message['content'] }}<end>{% endfor %}"
)
RANKING = {"float32": 8, "float64": 66}  # bytes a parameter of `stats.spearman` beside its two traces, as measured
SHAPES = "shapes"
EACH, FIRST = "each process", "process 0"  # whose memory a row is
MOST_TOGETHER = 1024  # processes that are planned; of a small model on so many it takes minutes
MAPPED = "traces"  # a part that is read from files as they lie there, which all processes of a machine see in one place


@dataclass(frozen=True)
class Machine:
    """What there is: bytes free, None where that isn't known.

    Attributes:
        name: of the GPU, or "cpu".
        gpu: free on the GPU; None without one.
        ram, disk: free.
        flops: operations a second that matrix products reach, by place and dtype ("ram float32"), or by place alone.
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
class Launch:
    """What a launcher starts: `torchrun --nproc-per-node`, on one machine or several; one process is no launcher's.

    Attributes:
        processes: in all; of GPUs each has one.
        nodes: machines, with as many processes each.

    Raises:
        UserError: the processes don't divide among the machines, or are more than can be rehearsed.
    """

    processes: int = 1
    nodes: int = 1

    def __post_init__(self) -> None:
        if self.processes < 1 or self.nodes < 1 or self.processes % self.nodes:
            raise UserError(
                f"{self.processes} processes on {self.nodes} machines were asked for; expected as many on each, one at "
                "least"
            )
        if self.processes > MOST_TOGETHER:
            raise UserError(
                f"{self.processes:,} processes were asked for; expected {MOST_TOGETHER:,} at most, since what FSDP2 "
                "does for each of them is rehearsed"
            )

    @property
    def beside(self) -> int:
        """Processes that share a machine."""
        return self.processes // self.nodes


# ------------------------------------------------------------------------------- the base and the facts


def shape_folder(name: str) -> tuple[Path, str]:
    """A folder with a model's config.json, or its GGUF file, and what that is: its own, or the package's copy of its
    shape.

    Raises:
        UserError: a hub name of which nothing is on this machine.
    """
    place = loading.locate(name)
    place = loading.adapted_base(place) or place
    if Path(place).exists():
        return Path(place), "its folder" if Path(place).is_dir() else "its file"
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(place, "config.json")
    if isinstance(cached, str):
        return Path(cached).parent, "the hub's cache"
    copied = loading.bundled_folder().parent / SHAPES / place.replace("/", "--")
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
    return PreTrainedTokenizerFast(
        tokenizer_object=counting, unk_token="<any>", eos_token="<end>", chat_template=STAND_IN_TEMPLATE
    )


class Material:
    """The base's shape and the experiment's examples. What was rehearsed on them is kept, for planning again."""

    def __init__(self, experiment: Experiment) -> None:
        self.folder, self.source = shape_folder(experiment.model.name)
        self.config = loading.read_config(str(self.folder))
        # of a config alone transformers would make a tokenizer that knows no word
        files = ("tokenizer.json", "tokenizer_config.json")
        if gguf.is_gguf(self.folder) or any((self.folder / file).is_file() for file in files):
            self.tokenizer, self.tokenizer_of = loading.load_tokenizer(str(self.folder)), "its own"
        else:
            self.tokenizer = _stand_in()
            self.tokenizer_of = f"none at hand, so tokens are estimated, about {CHARACTERS} characters each"
        self.pad = loading.pad_id(self.tokenizer)
        self.roles = experiment.roles
        self.parts = encode_tasks(self.tokenizer, taught_texts(experiment, self.tokenizer), {}, experiment)
        self.trained = training_examples(self.parts, self.roles)
        self.wordings = []  # all that the base is asked of the world, of which it may know everything
        if experiment.eval.known:
            every = asks(experiment, self.tokenizer)
            self.wordings = encode(self.tokenizer, every)
            of_fact = {item.example.mentions[0].fact: item for item in self.wordings}
            facts = sample([*of_fact.values()], experiment.eval.known_examples)
            split = lambda item: item.example.split if experiment.replays_known else "ood"
            self.parts[KNOWN] = [item for item in facts if split(item) == "ood"]
            self.parts[REPLAYED] = [item for item in facts if split(item) == "id"]
        self.seen = self.trained | replayable(self.parts)  # in training
        self._kept: dict[Any, Any] = {}

    def model(
        self, experiment: Experiment, adapted: bool = False, processes: int = 1, gloo: bool = False
    ) -> Understudy:
        """The base without numbers, or the model that is trained on it: with an adapter, if the experiment has one;
        in pieces on several processes."""
        options, lora = experiment.model, experiment.train.lora if adapted else None
        make = lambda: Understudy(self.config, options.dtype, options.attention, lora, processes, gloo)
        return self.once(("model", options.dtype, options.attention, repr(lora), processes, gloo), make)

    def asked(self, part: str, number: int | None = None) -> list[Encoded]:
        """Some examples of a part, as the stages choose them; the same list every time."""
        items = self.parts[part]
        return items if number is None else self.once(("asked", part, number), lambda: sample(items, number))

    def longest(self, questions: int) -> list[Encoded]:
        """The longest of some questions, as many as go through a model at once for attribution."""
        items = [item for part in self.roles.both for item in self.asked(part, questions)]
        return sorted(items, key=lambda item: len(item.ids))[-64:]

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` gave the first time."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def check(self, experiment: Experiment) -> None:
        """What no later part could do without."""
        if not any(self.parts[part] for part in self.roles.asked):
            config.check_unasked(experiment)
        sizes = epoch_sizes(self.seen)
        for phases in experiment.strategies.values():
            for phase in phases:
                phase.updates(sizes)
        every = [item for items in self.parts.values() for item in items]
        check_room(every, context_length(self.config), experiment.model.name)

    def about(self, experiment: Experiment) -> Row:
        """Parameters of the base, by kind and in all."""
        merged = experiment.trace.view == "merged"
        model = self.model(experiment, adapted=not merged).whole
        inside = {*View(experiment).scope(model)}
        kinds: dict[str, dict[str, int]] = {}
        for name, kind in Anatomy(model).kind.items():
            own = kinds.setdefault(kind, {"parameters": 0, "scope": 0})
            size = model.get_parameter(name).numel()
            own["parameters"] += size
            own["scope"] += size * (name in inside)
        learner = self.model(experiment, adapted=True).whole
        adapter = sum(p.numel() for p in learner.parameters() if p.requires_grad) if experiment.train.lora else 0
        return {
            "name": experiment.model.name,
            "architecture": type(self.model(experiment).whole).__name__,
            "source": self.source,
            "dtype": experiment.model.dtype,
            "parameters": sum(own["parameters"] for own in kinds.values()),
            "adapter": adapter,
            "sharded": experiment.model.sharded,
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


class Needs:
    """Memory, work and disk of one experiment on one machine, or on several alike that process 0's stands for.

    With `model.sharded` the sizes are those of one process's pieces: some rows of each parameter, rounded up.

    Attributes:
        alone: the needs of process 0 where it works alone: on the whole model, on the CPU if that is sharded.
    """

    def __init__(self, experiment: Experiment, material: Material, machine: Machine, launch: Launch = Launch()) -> None:
        number = launch.processes
        if number > 1:
            experiment = replace(experiment, jobs=1)  # who work side by side do one thing at a time
        self.experiment, self.material, self.machine, self.launch = experiment, material, machine, launch
        self.sharded = experiment.model.sharded and number > 1
        self.tasks = len(experiment.tasks)
        self.alone = self
        if number > 1:
            self.alone = Needs(experiment, material, replace(machine, gpu=None) if self.sharded else machine)
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
        size = lambda model, wanted=lambda p: True: sum(_bytes(p, holders) for p in model.parameters() if wanted(p))
        self.weights = size(self.model)
        self.learning = size(self.learner.whole)
        self.learned = size(self.learner.whole, lambda p: p.requires_grad)
        states = [_optimiser_state(self.learner.whole, optimiser.name, holders) for optimiser in experiment.optimisers]
        self.optimised = max(states, default=0)
        self.saved = self.learned if experiment.train.lora else self.weights  # of a taught model
        self.adapted = _adapted(self.learner.whole) if merged else 0
        self.sums = sum(_wide(named[name], holders) for name in traced)  # of one trace
        self.largest = max(_wide(named[name], holders) for name in traced)
        self.scope = sum(_held(named[name], holders) for name in inside)
        self.scope_sums = sum(_wide(named[name], holders) for name in inside)
        self.bf16 = machine.gpu is not None and experiment.train.precision != "float32"  # (any that there is has it)
        self.bf16 = self.bf16 or loading.trains_in_bf16(experiment.train.precision, torch.device("cpu"))
        self.precision = "bfloat16" if self.bf16 else experiment.model.dtype
        tracing = experiment.trace
        defined = [name for name in LEARNING if tracing.online and name in tracing.definitions]
        # accumulators of a task during training: two reductions of the trace per example, one of the summed
        self.learning_sums = tracing.parts * sum(
            {"per_example": len(REDUCTIONS), "summed": 1}[name] for name in defined
        )
        self.online = self.tasks * self.learning_sums * self.sums
        self.whens = [LEARNING[name] for name in defined] + ["final"] + ["checkpoints"] * tracing.checkpoints

    @cached_property
    def memory(self) -> list[Row]:
        """A row for the fullest moment of each stage, by whose memory it is and where."""
        return [row for process in self.processes() for row in self._stages(process)]

    @cached_property
    def disk(self) -> list[Row]:
        """What the run folder holds, however many write it."""
        return self.alone._disk()

    def processes(self) -> list[str]:
        return [*self.experiment.taught, "base"]

    def _stages(self, process: str) -> Iterator[Row]:
        """The fullest moment of each stage, on the GPU and on the host: of each process, and of process 0 where it
        holds more than the others do."""
        fullest: dict[tuple[str, str, str], tuple[str, dict[str, int]]] = {}
        for stage, whose, of, moments in self._moments(process):
            for what, device, host in moments:
                if of.machine.gpu is None:
                    host, device = {**host, **device}, {}
                for where, parts in (("gpu", device), ("ram", host)):
                    sizes = {part: round(size) for part, size in parts.items() if size}
                    key = stage, EACH if self.launch.processes == 1 else whose, where
                    known = [fullest[k][1] for k in (key, (stage, EACH, where)) if k in fullest]
                    if sum(sizes.values()) > max([sum(other.values()) for other in known] or [0]):
                        fullest[key] = what, sizes
        for (stage, whose, where), (what, sizes) in fullest.items():
            place = {"process": process, "stage": stage, "whose": whose, "where": where, "moment": what}
            yield place | {"bytes": sum(sizes.values()), "parts": sizes}

    def _moments(self, process: str) -> Iterator[tuple[str, str, Needs, Iterator[Moment]]]:
        """Each stage's moments and whose they are, as `pipeline.TOGETHER` has it."""
        e, alone = self.experiment, self.alone
        if process == "base":
            yield "eval", EACH, self, self._eval()
            if e.trace.check:
                yield "trace", FIRST, alone, alone._doctor()
            if e.mechanism.run:
                yield "mechanism", FIRST, alone, alone._mechanism(None)
            return
        if process in e.strategies:
            yield "train", EACH, self, self._train(process)
            yield "train", FIRST, self, self._kept()
        yield "eval", EACH, self, self._eval()
        yield "trace", EACH, self, self._trace()
        if e.trace.checkpoints:
            yield "trace", FIRST, alone, alone._mean_of_checkpoints(process)
        yield "analyze", FIRST, alone, alone._analyze()
        if e.interventions.run:
            yield "intervene", EACH, self, self._intervene_in_pieces() if self.sharded else self._intervene()
        if e.mechanism.run:
            yield "mechanism", FIRST, alone, alone._mechanism(process)
        if e.retention.run and process in e.strategies:
            yield "retain", EACH, self, self._retain()
        for stage in self._further(process):
            if stage.needs is not None:
                of = self if stage.is_shared else alone
                yield stage.name, EACH if stage.is_shared else FIRST, of, stage.needs(of, process)

    def _further(self, process: str) -> list[Stage]:
        """The stages of other packages that a model has."""
        e = self.experiment
        return [own for own in stages().values()
                if own not in OWN and own.is_wanted(e) and own.is_done_for(e, process)]  # fmt: skip

    # Each of these gives moments: what happens, what is held on the device, and what on the host.

    def _train(self, name: str) -> Iterator[Moment]:
        """`pipeline.teach`: weights, gradients and the optimiser's state, which is of the weights' dtype."""
        e = self.experiment
        held, host = self._learning()
        for phase, data in self.phases(name):
            chosen = self.material.once(("costliest", id(data)), lambda data=data: _costliest(data))
            chosen = {task: [self._share(batch) for batch in own] for task, own in chosen.items()}
            step = self._step(phase, chosen)
            if "summed" in self.whens and len(chosen) > 1:  # each task's gradient apart
                step = step | {"gradients of a task": self.learned}
            yield f"a step of {phase.name}", held | step, host
            if "online" in self.whens:
                further = {"a copy of what is merged": self.adapted} if self.adapted else {}
                if self._shares_forward and sum(map(len, chosen.values())) > 1:  # of the micro-batches before
                    further |= {"gradients": self.learned}
                yield f"a traced step of {phase.name}", held | further | self._traced(chosen), host
        for part, items in samples(self.material.parts, e.train.recall_examples, e.roles).items():
            yield f"recall of {part}", held | self.recall(part, len(items), e.eval.tokens), host
        if self.sharded:
            yield "a checkpoint", held, host | self._copies()

    def _kept(self) -> Iterator[Moment]:
        """What process 0 holds to save a checkpoint: of a sharded model the whole, gathered; else it saves alone what
        all have."""
        held, host = self._learning()
        yield "a checkpoint", held, host | ({"the whole model": self.alone.weights} if self.sharded else self._copies())

    def _learning(self) -> tuple[Parts, Parts]:
        """What is there throughout a training. The online trace's sums are on the device if half of what is free there
        holds them."""
        if self._sums_on_device:
            return self._trained() | {"trace's sums": self.online}, {}
        return self._trained(), {"trace's sums": self.online}

    @property
    def _sums_on_device(self) -> bool:
        gpu = self.machine.gpu
        return gpu is not None and self.online < (gpu - self.learning) / 2

    def _trained(self) -> Parts:
        """DDP keeps flat buckets beside the gradients, as accelerate sets it up."""
        ddp = self.launch.processes > 1 and not self.sharded
        return {"weights": self.learning, "optimiser": self.optimised, "DDP's buckets": ddp * self.learned}

    def _copies(self) -> Parts:
        """On the host, of what is saved from a GPU: the optimiser's state, then the online trace's sums. Those on the
        host are saved, and in the end divided, in place."""
        optimiser = 0 if self.machine.gpu is None else self.optimised
        if self._sums_on_device and self.online > optimiser:
            return {"copies of the sums": self.online}
        return {"a copy of the optimiser": optimiser}

    def _share(self, batch: Batch) -> Batch:
        """As many rows of a batch as one process may have of it."""
        return {name: x[: -(-len(x) // self.launch.processes)] for name, x in batch.items()}

    @property
    def _shares_forward(self) -> bool:
        """Whether the trace during training goes back through the training's own forward."""
        e = self.experiment
        merges = e.train.lora is not None and e.trace.view == "merged"
        alone = self.launch.processes == 1 and not merges and not e.train.gradient_checkpointing
        return e.trace.forward == "training" and alone

    def phases(self, name: str) -> list[tuple[Phase, Updates]]:
        """A strategy's phases, each with what its updates see."""
        seed = self.experiment.train.seed
        return [
            (phase, self._updates(phase, f"{seed}/{index}"))
            for index, phase in enumerate(self.experiment.strategies.get(name, []))
        ]

    def _updates(self, phase: Phase, seed: str) -> Updates:
        """What the updates of a phase see, as `train` has it."""
        seen, targets, most = self.material, self.experiment.trace.targets, self.experiment.train.micro_batch
        processes = self.launch.processes
        make = lambda: Updates(phase, seen.seen, seed, seen.pad, targets, most, processes, self.sharded)
        return seen.once((seed, repr(phase), targets, most, processes, self.sharded), make)

    def _step(self, phase: Phase, chosen: Mapping[str, Sequence[Batch]]) -> Parts:
        """What an update holds beside weights and optimiser: at its fullest, or all gradients when that is over."""
        shapes = tuple((task, *(tuple(batch["input_ids"].shape) for batch in own)) for task, own in chosen.items())
        checkpointing = self.experiment.train.gradient_checkpointing
        key = ("step", id(self.learner), self.bf16, checkpointing, shapes)
        found = self.material.once(key, lambda: self.learner.update(phase, chosen, self.bf16, checkpointing))
        return found if sum(found.values()) > self.learned else {"gradients": self.learned}

    def _traced(self, chosen: Mapping[str, Sequence[Batch]]) -> Parts:
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
            return parts | {"whole sums on their way": self._on_their_way(2)}
        # the mean gradient of a step, and a sum that is not wanted as it is
        return parts | {"a tensor's sums": 2 * self.largest}

    def _on_their_way(self, kinds: int) -> float:
        """`trace.distributed.Scatter`: whole sums of two parameters, and the copy of one that gloo sends."""
        return (2 + self.gloo) * kinds * self.alone.largest

    def estimate(self, rows: Sequence[Mapping[str, Tensor]]) -> Parts:
        """Activations of the costliest of some batches, as a trace itself estimates them, and what is gathered."""
        largest = max(rows, key=lambda row: row["input_ids"].numel() * row["input_ids"].shape[1])
        targets = int((largest["labels"] != -100).sum(1).max())
        key = ("trace", id(self.base), largest["input_ids"].shape, targets)
        return self.material.once(key, lambda: self.base.traced(rows))

    def recall(self, part: str, number: int | None = None, tokens: int = TOKENS) -> Parts:
        """What `evaluate.recall` holds beside the weights, of the batch with most tokens and that with most answers.
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

    def _eval(self) -> Iterator[Moment]:
        for part in (part for part, items in self.material.parts.items() if items):
            yield (
                f"recall of {part}",
                {"weights": self.weights} | self.recall(part, tokens=self.experiment.eval.tokens),
                {},
            )

    def _doctor(self) -> Iterator[Moment]:
        """`doctor.diagnose`: about four gradients, and of half precision a model in float32 with gradients."""
        half = self.experiment.model.dtype in ("bfloat16", "float16")
        parts = {"weights": self.weights, "gradients": 3 * self.weights + self.sums}
        yield "the check", parts | {"a copy in float32": 2 * self.sums * half}, {}

    def _trace(self) -> Iterator[Moment]:
        """`pipeline.take_traces`: the traces of one task are still held while the next one's are taken. Those of a
        sharded model lie where its pieces do."""
        e = self.experiment
        several = len(e.trace.measures) * e.trace.parts
        before = 0
        for task, items in self.material.trained.items():
            rows = self.material.once(("rows", task, repr(e.trace)), partial(self._rows, items))
            rows = [self._share(row) for row in rows]
            places = 1 + e.trace.checkpoints
            held = {"weights": places * self.weights} | self.estimate(rows)
            if self.sharded:
                held |= {"whole sums on their way": self._on_their_way(len(e.trace.measures))}
                there = {"sums": several * self.sums, "the task before": before}
                host = {} if self.machine.gpu is None else {"sums to save": several * self.sums}
            else:
                there, host = self._sums(several * self.sums, sum(held.values()))
                host |= {"the task before": before}
            yield f"the trace of {task}", held | there, host
            before = several * self.sums

    def _mean_of_checkpoints(self, name: str) -> Iterator[Moment]:
        e = self.experiment
        each = sum(len(_saved(len(data), e.train.checkpoint_every)) for _, data in self.phases(name))
        sums = (each + 1) * len(e.trace.measures) * e.trace.parts * self.sums
        yield "the mean over checkpoints", {"weights": self.weights}, {"traces": sums}

    def _sums(self, size: float, held: float) -> tuple[Parts, Parts]:
        """Where a trace's sums lie, as `trace.memory` decides it: on a GPU in a few passes, or on the host."""
        gpu = self.machine.gpu
        if gpu is None:
            return {"sums": size}, {}
        passes = -(-size // max(1.0, SPARE * gpu - held))
        return ({"sums": size / passes}, {"sums": size}) if passes <= MOST_PASSES else ({}, {"sums": size})

    def _rows(self, items: Sequence[Encoded]) -> list[Mapping[str, Tensor]]:
        """The batches of a task's trace."""
        options = self.experiment.trace
        items = sample(items, options.examples) if options.examples else items
        rows = batches(items, options.batch, options.targets, pad_id=self.material.pad, by_length=True)
        return [{k: v for k, v in row.items() if k != "group"} for row in rows]

    def _read(self) -> float:
        """Bytes of the traces of one time by one reduction. Files are mapped: what nobody looks at takes none."""
        return self.tasks * self.experiment.trace.parts * self.sums

    def _sets(self, fractions: int) -> float:
        """A mask of every task's set and of the shared one, at each fraction."""
        return fractions * (self.tasks + 1) * self.scope

    def _analyze(self) -> Iterator[Moment]:
        """`pipeline.analyze`: the traces of one time by one reduction, and what one set or table needs beside them."""
        strengths, wide = {"strengths": self.tasks * self.sums}, {"a tensor in float64": 4 * self.largest}
        yield "sets", {}, {"traces": self._read()} | strengths | wide
        seen = {"traces": self.tasks * self.experiment.trace.parts * self.scope_sums}  # in scope alone
        means = {"strengths": self.tasks * self.scope_sums}
        masks = (self.tasks + 2) * self.scope  # every task's set, what they share, and what any has
        yield "overlap", {}, seen | means | wide | {"masks": masks}
        ranking = RANKING["float64" if self.scope_sums > 4 * self.scope else "float32"]
        yield "similarity", {}, seen | means | {"ranks": ranking * self.scope}
        masks = (len(self.whens) + 2 * DRIFT_DRAWS) * self.scope
        yield "the weights' way", {"weights": 2 * self.weights}, {"masks": masks} | wide

    def controls(self) -> int:
        """Sets of one time and fraction that are put in: the shared one and its controls."""
        return 1 + 2 * self.experiment.interventions.seeds + self.tasks

    def _intervene(self) -> Iterator[Moment]:
        """`pipeline.intervene`: base and tuned model, the strengths of one time, and the sets of one fraction."""
        options = self.experiment.interventions
        both, strengths = {"weights": 2 * self.weights}, {"strengths": self.tasks * self.sums}
        yield "strengths", both, strengths | {"traces": self._read(), "a tensor in float64": 4 * self.largest}
        held = strengths | {"masks": self._sets(1) + (self.controls() - 1) * self.scope}
        yield "controls", both, held | {"what is free of one task": self.scope_sums}
        saved = {"values to put back": max(options.fractions) * self.scope_sums}
        for part in self.experiment.roles.asked:
            yield (
                f"recall of {part}",
                both | saved | self.recall(part, options.questions, self.experiment.eval.tokens),
                held,
            )

    def _intervene_in_pieces(self) -> Iterator[Moment]:
        """The same of a sharded model: traces, strengths and sets lie where its pieces do, but for random sets, which
        every process draws whole on its host."""
        drawn = 2 * self.experiment.interventions.seeds
        for what, device, host in self._intervene():
            if "masks" in host:
                pieces = {**device, **host, "masks": host["masks"] - drawn * self.scope}
                yield what, pieces, {"random masks": drawn * self.alone.scope}
            else:
                yield what, {**device, **host}, {}

    def _mechanism(self, name: str | None) -> Iterator[Moment]:
        """`mechanism.explain`: its analyses one after the other, the model and the shared sets held throughout."""
        for analysis in self._analyses(name):
            if analysis.needs is not None:
                yield from analysis.needs(self, name)
        sets = 0 if name is None else len(self.whens) * self.scope
        asked = self.recall(self.experiment.roles.outcome, self.experiment.mechanism.questions)
        yield "recall", {"weights": self.weights} | asked, {"masks": sets}

    def _analyses(self, name: str | None) -> list[Analysis]:
        """Those that are made of a model."""
        found = [ANALYSES[part] for part in self.experiment.mechanism.parts]
        return [own for own in found if own.of_base or name is not None]

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

    def _retain(self) -> Iterator[Moment]:
        """`retention.retain`: as training, beside a copy of the taught values and the sets."""
        options = self.experiment.retention
        sets = len(self.whens) * (1 + 2 * options.draws) * self.alone.scope
        roles = self.experiment.roles
        batch = dict.fromkeys(roles.of_role("store"), options.store + options.replay_store)
        batch |= dict.fromkeys(roles.of_role("recall"), options.recall + options.replay_recall)
        phase = Phase("new", {task: count for task, count in batch.items() if count}, options.steps)
        data = self._updates(phase, "0")
        held = self._trained() | {"a copy of the weights": self.weights}
        chosen = {task: [self._share(batch) for batch in own] for task, own in _costliest(data).items()}
        yield "a step", held | self._step(phase, chosen), {"masks": sets}

    # ---- all processes together

    def totals(self) -> dict[str, int]:
        """Bytes that are taken at once: on a GPU, in the RAM of a machine and on the disk."""
        found = {}
        together = min(self.experiment.jobs, len(self.processes()))
        for where in ("gpu", "ram"):
            sizes = [self.fullest(process, where)[0] for process in self.processes()]
            # several may work on one model's mechanism
            shared = [self.fullest(process, where, ("mechanism",))[0] for process in self.processes()]
            found[where] = sum(sorted([*sizes, *(together - 1) * shared])[-together:])
        found["ram"] += (together + (self.experiment.jobs > 1)) * self.launch.beside * _interpreter()
        found["disk"] = sum(row["bytes"] for row in self.disk)
        return found

    def fullest(self, process: str, where: str, only: Sequence[str] = ()) -> tuple[int, Row]:
        """What the fullest stage takes on one GPU, or in the RAM of a machine by all that a launcher started there; and
        the stage's fullest row. Of some stages if `only` names any."""
        stages: dict[str, dict[str, Row]] = {}
        for row in self.memory:
            if (row["process"], row["where"]) == (process, where) and (not only or row["stage"] in only):
                stages.setdefault(row["stage"], {})[row["whose"]] = row
        found: list[tuple[int, Row]] = [(0, {})]
        for rows in stages.values():
            row = max(rows.values(), key=lambda row: row["bytes"])
            others = 0
            if where == "ram" and EACH in rows:
                each = rows[EACH]
                mapped = 0 if self.sharded else each["parts"].get(MAPPED, 0)
                others = (self.launch.beside - 1) * (each["bytes"] - mapped)
            found.append((row["bytes"] + others, row))
        return max(found, key=lambda of: of[0])

    def _disk(self) -> list[Row]:
        """`pipeline`'s run folder at its fullest, and what stays."""
        e = self.experiment
        saves = lambda steps: len(_saved(steps, e.train.checkpoint_every))
        several, found = len(e.trace.measures) * e.trace.parts, {}
        for name in e.taught:
            phases = [(phase.name, saves(len(data))) for phase, data in self.phases(name)]
            # each checkpoint, the last one as the final model, and the mean over all
            places = 1 + sum(number for _, number in phases) if e.trace.checkpoints and phases else 1
            found[name] = disk.Strategy(
                phases=phases, further=saves(e.retention.steps), model=self.saved, optimiser=self.optimised,
                trace=self.sums, tasks=self.tasks, online=self.learning_sums,
                times=places * several, parts=e.trace.parts,
                sets=(len(self.whens) if phases else 1) * self._sets(len(e.analysis.central_fractions)) / 8,
            )  # fmt: skip
        return disk.rows(e, found)

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
        return 3 * self.flops(_work_of_update(data, update))

    def work(self) -> list[Row]:
        """Operations of each stage, by all processes that share it; a trace costs as much as a training's forward and
        backward."""
        e, seen, rows = self.experiment, self.material, []

        def add(process: str, stage: str, flops: float) -> None:
            asks = stage in ("data", "eval", "intervene")
            asked_in = "bfloat16" if e.eval.precision == "bf16" else e.model.dtype
            dtype = self.precision if stage in ("train", "retain") else asked_in if asks else e.model.dtype
            of = self.alone if stage == "mechanism" else self
            rows.append({"process": process, "stage": stage, "where": "ram" if of.machine.gpu is None else "gpu",
                         "dtype": dtype, "flops": flops, "shared_by": of.launch.processes})  # fmt: skip

        asked_of = partial(_asked, tokens=e.eval.tokens)
        asked = sum(map(asked_of, seen.parts.values()), Counter())
        for name in e.taught:
            if name in e.strategies:
                steps = sum(self.flops(_seen(data)) for _, data in self.phases(name))
                updates = sum(len(data) for _, data in self.phases(name))
                chosen = samples(seen.parts, e.train.recall_examples, e.roles)
                few = sum(map(asked_of, chosen.values()), Counter())
                times = 1 + len(self.phases(name)) + (updates // e.train.recall_every if e.train.recall_every else 0)
                # of a frozen base there is no gradient of the weights, a third of it all
                passes = (2 if e.train.lora else 3) + e.train.gradient_checkpointing
                add(name, "train", passes * steps + times * self.flops(few))
                add(
                    name,
                    "train, traced",
                    (3 - self._shares_forward) * steps / e.trace.every if "online" in self.whens else 0.0,
                )
            add(name, "eval", self.flops(asked))
            chosen = [sample(i, e.trace.examples) if e.trace.examples else i for i in seen.trained.values()]
            once = 3 * sum(self.flops(work_of(items, e.trace.batch)) for items in chosen)
            places = sum(len(_saved(len(data), e.train.checkpoint_every)) for _, data in self.phases(name)) or 1
            add(name, "trace", once * (places if e.trace.checkpoints else 1))
            if e.interventions.run:
                few = sum((asked_of(seen.asked(p, e.interventions.questions)) for p in e.roles.asked), Counter())
                sets = len(self.whens) * len(e.interventions.fractions) * self.controls()
                add(name, "intervene", (2 * sets + 2) * self.flops(few))
            if e.mechanism.run:
                add(name, "mechanism", self._mechanism_flops(name))
            if e.retention.run and name in e.strategies:
                o = e.retention
                counts = {"store": (o.store, o.replay_store), "recall": (o.recall, o.replay_recall)}
                once = 0.0
                for task, items in seen.trained.items():
                    if e.roles.tasks[task] in counts:
                        new, replayed = counts[e.roles.tasks[task]]
                        each = _times(work_of(items, max(1, new)), 1 / len(items))
                        once += 3 * o.steps * (2 * new + replayed) * self.flops(each)
                add(name, "retain", once)
            for stage in self._further(name):
                if stage.work is not None:
                    add(name, stage.name, stage.work(self, name))
        if seen.wordings:
            add("base", "data", self.flops(asked_of(seen.wordings)))
        add("base", "eval", self.flops(asked))
        if e.mechanism.run:
            add("base", "mechanism", self._mechanism_flops(None))
        return rows

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
        return self.flops(_times(work_of(items, 64), 1 / len(items)))

    @property
    def layers(self) -> int:
        """Layers of the model."""
        return self.model.config.get_text_config().num_hidden_layers

    def _mechanism_flops(self, name: str | None) -> float:
        """Of one model: the base is asked one kind of questions, any other two."""
        kinds = 1 if name is None else 2
        return sum(analysis.work(self, kinds) for analysis in self._analyses(name) if analysis.work is not None)


def _asked(items: Sequence[Encoded], tokens: int) -> Counter[str]:
    """The work of `evaluate.recall`, `tokens` at once."""
    longest = max((len(item.ids) for item in items), default=1)
    return work_of(items, max(1, tokens // longest))


def _held(p: Tensor, holders: int) -> int:
    """How many of a parameter's numbers the first of its holders has, if they have rows of it in equal parts."""
    return p.numel() if holders == 1 or not p.dim() else rows_of(len(p), 0, holders)[1] * (p.numel() // len(p))


def _bytes(p: Tensor, holders: int = 1) -> int:
    return _held(p, holders) * p.element_size()


def _wide(p: Tensor, holders: int) -> int:
    """Bytes of a sum of one parameter's gradients."""
    return _held(p, holders) * torch.empty(0, dtype=sum_dtype(p.dtype)).element_size()


def _optimiser_state(model: Any, name: str, holders: int) -> int:
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
            found += 2 * _bytes(p, holders) * (4 // p.element_size() if name == "adamw_8bit" else 1)
    return found


def _adapted(model: Any) -> int:
    """Bytes of the base's weights that an adapter is on."""
    layers = [module.get_base_layer() for module in model.modules() if hasattr(module, "get_base_layer")]
    return sum(_bytes(p) for layer in layers for p in layer.parameters(recurse=False))


def _saved(updates: int, every: int) -> list[int]:
    """After which updates of a phase a checkpoint is saved."""
    return sorted({*range(every, updates + 1, every), updates})


def _looked_at(data: Updates) -> list[int]:
    return sorted({round(i) for i in torch.linspace(0, len(data) - 1, min(len(data), LOOKED_AT)).tolist()})


def _seen(data: Updates) -> Work:
    """What goes through the model in a whole phase, padding included."""
    looked = _looked_at(data)
    found: Work = sum((_work_of_update(data, update) for update in looked), Counter())
    return _times(found, len(data) / len(looked))


def _work_of_update(data: Updates, update: int) -> Work:
    found: Work = Counter()
    for count, longest in (size for sizes in data.sizes(update).values() for size in sizes):
        found["tokens"] += count * longest
        found["pairs"] += count * longest**2
    return found


def _costliest(data: Updates) -> dict[str, list[Batch]]:
    """Of each task the micro-batch with the most tokens, in an update that has it, and another one like it if that
    update has several: the second meets the gradients of the first."""
    found = {}
    for task in data.tasks:
        cost = lambda update, task=task: max(count * longest for count, longest in data.sizes(update)[task])
        batches = data[max(_looked_at(data), key=cost)][task]
        largest = max(batches, key=lambda batch: batch["input_ids"].numel())
        found[task] = [largest] * min(2, len(batches))
    return found


@cache
def _interpreter() -> int:
    """Bytes that a process holds before it reads a model: this one when first asked, which has the same libraries."""
    import psutil

    return psutil.Process().memory_info().rss
