"""What the stages of a run read: its examples, its models, and the keys that say what those depend on.

It makes nothing and measures nothing.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, TypeVar

from crosstrace.core.errors import UserError
from crosstrace.core.files import expanded, read_json, sha256_file, sha256_tree
from crosstrace.core.processes import Processes, launched
from crosstrace.core.run_folder import Run
from crosstrace.core.statistics import nearest
from crosstrace.data.facts import FactSettings
from crosstrace.data.text import KNOWN, Example, read_jsonl
from crosstrace.data.tokens import Encoded, encode
from crosstrace.experiment.config import Experiment, ModelSettings
from crosstrace.models import adapters, loading
from crosstrace.sets.paramset import ParamSet
from crosstrace.sets.selection import scope

T = TypeVar("T", Example, Encoded)
START = "start"  # the folder of an adapter before training, beside the phases'
WHENS = ("online", "summed", "final", "checkpoints")  # of traces
REPLAYED = "known_replayed"  # the part of the facts that the base knows which training replays
LEARNING = {"per_example": "online", "summed": "summed"}  # by definition, when a trace during training is


def known_people(model: ModelSettings) -> FactSettings | None:
    """The people that a base made by `crosstrace pretrain-base` was taught; None for any other model."""
    recipe = Path(loading.locate(model.name)) / "recipe.json"
    if model.random_init is not None or not recipe.is_file():
        return None
    try:
        facts = FactSettings(**read_json(recipe)["recipe"]["facts"])
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{recipe} is no recipe of `crosstrace pretrain-base`; remove it if the model is of other making"
        ) from None
    return replace(facts, questions=1)  # one wording a fact, however many the base was taught


def data_steps(experiment: Experiment) -> list[str]:
    """The steps that make what is taught and asked."""
    return ["data", "known"] if experiment.eval.known else ["data"]


def examples(run: Run, tokenizer: Any, known: int | None = 0) -> dict[str, list[Encoded]]:
    """The run's examples by part: bio, qa_id, qa_ood and, where there are such, at most `known` each (None: all) of
    a_ood, questions about people whom the base knows, and of facts of the world that it knows: known, and those that
    training replays apart from them.

    All examples of a person are of one group, as `groups` numbers them.
    """
    texts = {"bio": read_jsonl(run.path("data/bio.jsonl")), "qa": read_jsonl(run.path("data/qa.jsonl"))}
    numbers = groups(texts)
    for part, file in (("a_ood", "data/a_qa.jsonl"), (KNOWN, "known/known.jsonl")):
        if known != 0 and run.path(file).exists():
            texts[part] = sample(read_jsonl(run.path(file)), known)
    parts = {name: encode(tokenizer, items, numbers) for name, items in texts.items()}
    of_split = lambda items, split: [item for item in items if item.example.split == split]
    qa, facts = parts.pop("qa"), parts.pop(KNOWN, [])
    parts |= {"qa_id": of_split(qa, "id"), "qa_ood": of_split(qa, "ood")}
    parts |= {KNOWN: of_split(facts, "ood")} if facts else {}
    replayed = of_split(facts, "id")
    return parts | ({REPLAYED: replayed} if replayed else {})


def groups(texts: Mapping[str, Sequence[Example]]) -> dict[str, int]:
    """The number of each person of bio and qa: its group, the unit that the traces' parts are made of.

    Those whose questions are trained come first, so that they spread evenly over the parts, as all people do.
    """
    asked = [item.person for item in texts["qa"] if item.split == "id"]
    told = [item.person for split in ("id", "ood") for item in texts["bio"] if item.split == split]
    return {person: number for number, person in enumerate(dict.fromkeys([*asked, *told]))}


def training_examples(parts: Mapping[str, list[Encoded]]) -> dict[str, list[Encoded]]:
    """What is trained and traced of each task that has examples: every biography, and the questions of the ID
    people."""
    return {task: parts[part] for task, part in (("bio", "bio"), ("qa", "qa_id")) if parts[part]}


def replayable(parts: Mapping[str, list[Encoded]]) -> dict[str, list[Encoded]]:
    """What a phase may replay beside what is taught."""
    return {KNOWN: parts[REPLAYED]} if parts.get(REPLAYED) else {}


def sample(items: Sequence[T], number: int | None) -> list[T]:
    """`number` of the examples (None: all), encoded or not, as many of each relation as can be, at random but always
    the same, in their order."""
    by_relation: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        example = item.example if isinstance(item, Encoded) else item
        by_relation.setdefault("+".join(mention.relation for mention in example.mentions), []).append(index)
    draws = {key: random.Random(f"sample/{key}").sample(found, len(found)) for key, found in by_relation.items()}
    turns = (index for turn in zip_longest(*draws.values()) for index in turn if index is not None)
    return [items[index] for index in sorted(islice(turns, number))]


def samples(parts: Mapping[str, list[Encoded]], number: int) -> dict[str, list[Encoded]]:
    """So many questions of each kind, and biographies with about as many objects."""
    kinds = ("qa_id", "qa_ood", KNOWN, REPLAYED)
    chosen = {name: sample(parts[name], number) for name in kinds if parts.get(name)}
    return chosen | {"bio": sample(parts["bio"], max(1, number // len(parts["bio"][0].example.mentions)))}


def load(run: Run, experiment: Experiment, name: str) -> Any:
    """The base or a taught model of the run, ready for use on the run's device, as all that these functions load.

    Where processes work on the run side by side and model.sharded says so, each of them loads its rows alone.
    """
    if name == "base":
        return load_base(experiment, run.processes)
    return load_checkpoint(experiment, taught_place(run, experiment, name), run.processes)


def taught_place(run: Run, experiment: Experiment, name: str) -> Path:
    """Where a taught model is: what its strategy's last phase left, or what was given."""
    if name in experiment.given:
        return Path(loading.locate(experiment.given[name]))
    return run.path(f"models/{name}") / experiment.strategies[name][-1].name


def load_checkpoint(experiment: Experiment, folder: Path, processes: Processes | None = None) -> Any:
    """The model that a strategy's training left in a folder; an adapter merged or not, as trace.view says."""
    merge = experiment.trace.view == "merged"
    model = _read(experiment, str(folder), merge=merge, processes=processes)
    if not merge:
        adapters.check_plain(model, str(folder))
    return model


def _read(experiment: Experiment, name: str, processes: Processes | None = None, **how: Any) -> Any:
    options = experiment.model
    how |= {"pickled": options.pickled}
    if processes is not None and options.sharded:
        return loading.load_model(name, options.dtype, options.attention, processes=processes, **how)
    model = loading.load_model(name, options.dtype, options.attention, **how)
    # (beside the other processes' models, one that is sharded may find no room on a device as a whole)
    return model.to("cpu" if options.sharded and launched() > 1 else loading.device(options.device))


def load_start(run: Run, experiment: Experiment, name: str) -> Any:
    """The model that a strategy started from, with the parameters of the taught one: the base, or with trace.view:
    adapter the base with the adapter as it was before training, zero if it was given."""
    if experiment.trace.view == "merged":
        return load_base(experiment, run.processes)
    if name not in experiment.given:
        return load_checkpoint(experiment, run.path(f"models/{name}") / START)
    model = load(run, experiment, name)
    for own in adapters.adapter_names(model):  # nobody knows how it began
        model.get_parameter(own).data.zero_()
    return model


def load_trainable(run: Run, experiment: Experiment, name: str) -> Any:
    """A taught model to go on training as it was taught: with an adapter, its adapter."""
    if not experiment.train.lora:
        return load(run, experiment, name)
    return _read(experiment, str(run.path(f"models/{name}") / experiment.strategies[name][-1].name), merge=False)


def viewed(experiment: Experiment, model: Any) -> Any:
    """A model that was trained, as trace.view sees it: its adapter merged, if it has one, or as it is."""
    if experiment.trace.view == "merged" and adapters.is_adapted(model):
        return model.merge_and_unload().requires_grad_(True)
    return model


def in_scope(experiment: Experiment, model: Any) -> list[str]:
    """The names of the parameters that may be selected in a model of the run, in canonical order."""
    if experiment.trace.view == "adapter" and adapters.is_adapted(model):
        return adapters.adapter_names(model)
    return scope(model, experiment.analysis.embeddings)


def checkpoints(run: Run, experiment: Experiment, name: str) -> list[tuple[int, str, Path]]:
    """A strategy's kept checkpoints in the order of training: updates over all phases, phase, folder. The end of each
    phase is always there."""
    home, found, before = run.path(f"models/{name}"), [], 0
    lengths = {phase["name"]: phase["updates"] for phase in read_json(home / "training.json")}
    for phase in experiment.strategies[name]:
        for place in (home / phase.name).glob("checkpoint-*"):
            found.append((before + int(place.name.rpartition("-")[2]), phase.name, place))
        before += lengths[phase.name]
        found.append((before, phase.name, home / phase.name))
    return sorted(found)


def load_base(experiment: Experiment, processes: Processes | None = None) -> Any:
    """The model that every strategy starts from."""
    options = experiment.model
    return _read(experiment, options.name, processes, random_init=options.random_init)


def central_fraction(experiment: Experiment) -> float:
    """The one of analysis.central_fractions that is nearest to 5 %: where one shared set stands for all."""
    return nearest(experiment.analysis.central_fractions, 0.05)


def shared_sets(run: Run, experiment: Experiment, name: str) -> list[tuple[str, ParamSet]]:
    """A strategy's shared set of each time, at the central fraction."""
    fraction = central_fraction(experiment)
    files = {when: run.path(f"shared/{name}") / f"{when}-{fraction:g}-shared.safetensors" for when in WHENS}
    return [(when, ParamSet.load(file)) for when, file in files.items() if file.exists()]


def trains_in_bf16(experiment: Experiment) -> bool:
    """Whether the run's training multiplies in bf16."""
    return loading.trains_in_bf16(experiment.train.precision, loading.device(experiment.model.device))


def precision_of(experiment: Experiment) -> str:
    """The precision that training computes in."""
    return "bf16" if trains_in_bf16(experiment) else "float32"


def facts_key(facts: FactSettings) -> dict[str, Any]:
    """The settings of the facts and, of a source, its content."""
    own = asdict(facts)
    if facts.template == "plain":
        del own["template"]  # so that a run of the time before there were others goes on
    if facts.source is None:
        return own
    names = ("world.json", "bio.jsonl", "qa.jsonl", "import.json")
    files = [expanded(facts.source) / name for name in names]
    return own | {"content": {file.name: sha256_file(file) for file in files if file.is_file()}}


def model_key(experiment: Experiment) -> dict[str, Any]:
    """The base's settings and, of a local one, its content. Whether it is sharded changes nothing but rounding."""
    own = asdict(experiment.model)
    given = {name: value for name, value in own.items() if value is not None and name not in ("sharded", "pickled")}
    return given | {"content": _content(experiment.model.name)}


def _content(model: str) -> Any:
    """What a model holds: of a folder a hash, with that of the base that its adapter is for; else its name."""
    place = Path(loading.locate(model))
    content: Any = sha256_tree(place) if place.exists() else str(place)
    below = loading.adapted_base(str(place))
    if below is not None:
        content = [content, sha256_tree(below) if Path(below).exists() else below]
    return content


def origin(run: Run, experiment: Experiment, name: str) -> dict[str, Any]:
    """What the artefacts of a strategy say of where they come from: base, data, strategy and dtype."""
    base = experiment.model
    found = {
        "model": base.name, "revision": loading.revision(base.name), "dtype": base.dtype, "strategy": name,
        "data": f"sha256:{run.inputs('data')['data']}",
    }  # fmt: skip
    return found if base.random_init is None else found | {"random_init": base.random_init}


def model_inputs(run: Run, experiment: Experiment, name: str) -> Any:
    """What a model of the run depends on, for the key of a step that reads it."""
    if name == "base":
        return model_key(experiment)
    if name in experiment.given:
        return {"given": _content(experiment.given[name]), "base": model_key(experiment)}
    own = run.inputs(f"models/{name}")
    return own | {"base": model_key(experiment)} if experiment.train.lora else own
