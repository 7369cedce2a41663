"""The base's shape and an experiment's examples, of which a plan is made. It reads no weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from crosstrace.core.errors import UserError
from crosstrace.data.text import KNOWN
from crosstrace.data.tokens import Encoded, check_room, context_length, encode
from crosstrace.experiment import config
from crosstrace.experiment.config import Experiment
from crosstrace.experiment.examples import (
    REPLAYED,
    encode_tasks,
    mark_traced,
    replayable,
    sample,
    taught_texts,
    training_examples,
)
from crosstrace.experiment.studied import View
from crosstrace.experiment.world_facts import asks
from crosstrace.models import gguf, loading, locating
from crosstrace.models.anatomy import Anatomy
from crosstrace.trace.rehearse import Understudy
from crosstrace.training.updates import epoch_sizes

Row = dict[str, Any]
Work = Counter  # "tokens": positions that go through the model; "pairs": Σ of each text's length squared
CHARACTERS = 4  # a token, by rule of thumb, where there is no tokenizer
# and about as many words as chat templates have
STAND_IN_TEMPLATE = (
    "You are a helpful assistant. Answer the questions of the user in a few words.<end>"
    "{% for message in messages %}<any>{{ message['role'] }}<any>{{ message['content'] }}<end>{% endfor %}"
)
SHAPES = "shapes"


def shape_folder(name: str) -> tuple[Path, str]:
    """A folder with a model's config.json, or its GGUF file, and what that is: its own, or the package's copy of its
    shape.

    Raises:
        UserError: a hub name of which nothing is on this machine.
    """
    place = locating.locate(name)
    place = locating.adapted_base(place) or place
    if Path(place).exists():
        return Path(place), "its folder" if Path(place).is_dir() else "its file"
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(place, "config.json")
    if isinstance(cached, str):
        return Path(cached).parent, "the hub's cache"
    copied = locating.bundled_folder().parent / SHAPES / place.replace("/", "--")
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
        self.config = locating.read_config(str(self.folder))
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
            self.wordings = mark_traced(encode(self.tokenizer, every), experiment.trace.targets)
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


def times(work: Mapping[str, float], factor: float) -> Work:
    return Counter({name: value * factor for name, value in work.items()})
