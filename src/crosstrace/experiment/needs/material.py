"""The base's shape and an experiment's examples: what a plan is made from. It reads no weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from crosstrace.core.errors import UserError
from crosstrace.core.memo import Memo
from crosstrace.data.text import KNOWN
from crosstrace.data.tokens import Encoded, check_room, context_length, encode
from crosstrace.experiment import config
from crosstrace.experiment.config import Experiment
from crosstrace.experiment.examples import (
    REPLAYED,
    asks,
    encode_tasks,
    mark_traced,
    replayable,
    sample,
    taught_texts,
    training_examples,
)
from crosstrace.experiment.studied import View
from crosstrace.models import gguf, loading, locating
from crosstrace.models.anatomy import Anatomy
from crosstrace.trace.rehearse import Understudy
from crosstrace.training.updates import epoch_sizes

Row = dict[str, Any]
# What goes through a model. "tokens": positions; "pairs": the sum of each text's squared length.
Work = Counter
CHARACTERS = 4  # of a token, by rule of thumb, where there is no tokenizer
# It has about as many words as usual chat templates.
STAND_IN_TEMPLATE = (
    "You are a helpful assistant. Answer the questions of the user in a few words.<end>"
    "{% for message in messages %}<any>{{ message['role'] }}<any>{{ message['content'] }}<end>{% endfor %}"
)
SHAPES = "shapes"
_understudies = Memo()  # of all plans of this process, with what was rehearsed on them


def shape_folder(name: str) -> tuple[Path, str]:
    """The folder of a model's config.json, or its GGUF file; and in words what that is, e.g. "its folder".

    The package has copies of the config of some models of the hub.

    Raises:
        UserError: nothing of that name is on this machine.
    """
    source = locating.locate(name)
    source = locating.adapted_base(source) or source
    if Path(source).exists():
        return Path(source), "its folder" if Path(source).is_dir() else "its file"
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(source, "config.json")
    if isinstance(cached, str):
        return Path(cached).parent, "the hub's cache"
    copied = locating.bundled_folder().parent / SHAPES / source.replace("/", "--")
    if copied.is_dir():
        return copied, "the package's copy of its config"
    known = sorted(folder.name.replace("--", "/") for folder in copied.parent.iterdir() if folder.is_dir())
    raise UserError(
        f"the config of {source} is not on this machine, and a plan downloads nothing; run `hf download {source} "
        f"config.json tokenizer.json tokenizer_config.json`, or name a folder or one of {', '.join(known)}"
    )


def _stand_in() -> Any:
    """A tokenizer that is only good for counting: its tokens have about CHARACTERS characters."""
    from tokenizers import Regex, Tokenizer, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    counting = Tokenizer(kinds.WordLevel({"<any>": 0, "<end>": 1}, unk_token="<any>"))
    counting.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\d{1,3}| ?\w{1,5}|[^\w]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=counting, unk_token="<any>", eos_token="<end>", chat_template=STAND_IN_TEMPLATE
    )


class Material(Memo):
    """The base's shape and the experiment's examples.

    Attributes:
        folder, source: where the base's config is, and in words what that is.
        parts: the examples by part, as a run would have them.
        trained: by task, the examples that are trained and traced.
        in_training: these, and the facts that training replays.
        wordings: all that the base is asked about the world. The plan takes it that the base knows all of it.
    """

    def __init__(self, experiment: Experiment) -> None:
        super().__init__()
        self.folder, self.source = shape_folder(experiment.model.name)
        self.config = locating.read_config(str(self.folder))
        # (with a config alone, transformers would make a tokenizer that knows no words)
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
        self.wordings = []
        if experiment.eval.known:
            examples = asks(experiment, self.tokenizer)
            self.wordings = mark_traced(encode(self.tokenizer, examples), experiment.trace.targets)
            by_fact = {item.example.mentions[0].fact: item for item in self.wordings}
            facts = sample([*by_fact.values()], experiment.eval.known_examples)
            replayed = [item for item in facts if experiment.replays_known and item.example.split == "id"]
            self.parts[KNOWN] = [item for item in facts if not experiment.replays_known or item.example.split == "ood"]
            self.parts[REPLAYED] = replayed
        self.in_training = self.trained | replayable(self.parts)

    def model(
        self, experiment: Experiment, adapted: bool = False, processes: int = 1, gloo: bool = False
    ) -> Understudy:
        """The model without its numbers.

        Args:
            adapted: whether it has the adapter that is trained, if the experiment has one.
            processes: those that hold the model in pieces; one holds it whole.
            gloo: whether they are joined through gloo, which makes copies of what it sends.
        """
        options, lora = experiment.model, experiment.train.lora if adapted else None
        key = (self.config.to_json_string(), options.dtype, options.attention, repr(lora), processes, gloo)
        make = partial(Understudy, self.config, options.dtype, options.attention, lora, processes, gloo)
        return _understudies.once(key, make)

    def examples_of(self, part: str, number: int | None = None) -> list[Encoded]:
        """`number` examples of a part (None: all), as the stages choose them; the same list every time."""
        items = self.parts[part]
        return items if number is None else self.once(("asked", part, number), lambda: sample(items, number))

    def longest(self, questions: int) -> list[Encoded]:
        """The longest 64 of some questions: so many go through a model at once for attribution."""
        items = [item for part in self.roles.both for item in self.examples_of(part, questions)]
        return sorted(items, key=lambda item: len(item.ids))[-64:]

    def check(self, experiment: Experiment) -> None:
        """Check that the experiment can be planned.

        Raises:
            UserError: a stage has nothing to ask, a phase nothing to train, or a text is too long for the base.
        """
        if not any(self.parts[part] for part in self.roles.asked):
            config.check_unasked(experiment)
        sizes = epoch_sizes(self.in_training)
        for phases in experiment.strategies.values():
            for phase in phases:
                phase.updates(sizes)
        texts = [item for items in self.parts.values() for item in items]
        check_room(texts, context_length(self.config), experiment.model.name)

    def base_info(self, experiment: Experiment) -> Row:
        """The base in a plan: its name, architecture and dtype, and its parameters by kind and in all."""
        merged = experiment.trace.view == "merged"
        model = self.model(experiment, adapted=not merged).whole
        inside = {*View(experiment).scope(model)}
        kinds: dict[str, dict[str, int]] = {}
        for name, kind in Anatomy(model).kind.items():
            counts = kinds.setdefault(kind, {"parameters": 0, "scope": 0})
            size = model.get_parameter(name).numel()
            counts["parameters"] += size
            counts["scope"] += size * (name in inside)
        learner = self.model(experiment, adapted=True).whole
        adapter = sum(p.numel() for p in learner.parameters() if p.requires_grad) if experiment.train.lora else 0
        return {
            "name": experiment.model.name,
            "architecture": type(self.model(experiment).whole).__name__,
            "source": self.source,
            "dtype": experiment.model.dtype,
            "parameters": sum(counts["parameters"] for counts in kinds.values()),
            "adapter": adapter,
            "sharded": experiment.model.sharded,
            "scope": sum(counts["scope"] for counts in kinds.values()),
            "kinds": kinds,
        }

    def rows(self) -> Row:
        """The tokenizer, and each part's examples, tokens and longest example."""
        rows = [
            {"part": part, "examples": len(items), "tokens": sum(len(i.ids) for i in items),
             "longest": max((len(i.ids) for i in items), default=0)}
            for part, items in self.parts.items()
        ]  # fmt: skip
        return {"tokenizer": self.tokenizer_of, "rows": rows}


def work_of(items: Sequence[Encoded], size: int) -> Work:
    """The work of these texts, sorted by length, in batches of `size`, padding included."""
    lengths = sorted(len(item.ids) for item in items)
    work: Work = Counter()
    for start in range(0, len(lengths), size):
        batch = lengths[start : start + size]
        work["tokens"] += len(batch) * batch[-1]
        work["pairs"] += len(batch) * batch[-1] ** 2
    return work


def times(work: Mapping[str, float], factor: float) -> Work:
    """`factor` times the work."""
    return Counter({name: value * factor for name, value in work.items()})
