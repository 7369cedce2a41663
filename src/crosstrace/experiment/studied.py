"""The models of a run: the base, those that its strategies taught, and those given, as `trace.view` sees them.

`View` reads an experiment's models. `StudiedModel` is one model of a run; every stage gets one. This module alone knows
how the three kinds of models differ, and how an adapter differs from merged weights.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from crosstrace.analyses.claims.effects import FEWEST
from crosstrace.analyses.consistency import FactPair, fact_pairs
from crosstrace.core.errors import UserError
from crosstrace.core.files import read_json, sha256_tree
from crosstrace.core.processes import Processes, launched
from crosstrace.core.progress import Progress
from crosstrace.core.run_folder import Run
from crosstrace.core.statistics import nearest
from crosstrace.data.tokens import Encoded
from crosstrace.experiment.config import Experiment
from crosstrace.experiment.examples import A_OOD, examples, sample
from crosstrace.models import adapters, loading, locating
from crosstrace.sets.paramset import ParamSet
from crosstrace.sets.selection import scope
from crosstrace.training.recipes import Phase

BASE = "base"  # the name of the model that was taught nothing
START = "start"  # the folder of the adapter as it was before training
WHENS = ("online", "summed", "final", "checkpoints")  # the times of traces
LEARNING = {"per_example": "online", "summed": "summed"}  # `trace.definitions` -> the time of that trace


class View:
    """How an experiment reads models: in which dtype, with which attention, on which device, adapters merged or not.

    Args:
        processes: those that work on the run side by side. If `model.sharded` is true, each loads only its rows.
    """

    def __init__(self, experiment: Experiment, processes: Processes | None = None) -> None:
        self.experiment, self.processes = experiment, processes
        self.is_merged = experiment.trace.view == "merged"

    def load_base(self) -> Any:
        """The model that every strategy starts from."""
        options = self.experiment.model
        return self._read(options.name, random_init=options.random_init)

    def load_checkpoint(self, folder: str | Path) -> Any:
        """A model that a training saved in a folder. The view says whether its adapter, if any, is merged."""
        model = self._read(str(folder), merge=self.is_merged)
        if not self.is_merged:
            adapters.check_plain(model, str(folder))
        return model

    def load_trainable(self, folder: str | Path) -> Any:
        """A model that a training saved in a folder, to train it further: an adapter stays apart from the base."""
        if not self.experiment.train.lora:
            return self.load_checkpoint(folder)
        return View(self.experiment)._read(str(folder), merge=False)

    def merge(self, trained: Any) -> Any:
        """A model that was just trained, as the view shows it."""
        if self.is_merged and adapters.is_adapted(trained):
            return trained.merge_and_unload().requires_grad_(True)
        return trained

    def scope(self, model: Any) -> list[str]:
        """The names of the parameters that may be selected, in canonical order."""
        if not self.is_merged and adapters.is_adapted(model):
            return adapters.adapter_names(model)
        return scope(model, self.experiment.analysis.embeddings)

    def adapter_scope(self, model: Any) -> list[str] | None:
        """The names of the adapter's parameters, if the view shows only those; None if it shows merged weights."""
        return None if self.is_merged else self.scope(model)

    def _read(self, name: str, **how: Any) -> Any:
        options = self.experiment.model
        how |= {"pickled": options.pickled}
        if self.processes is not None and options.sharded:
            return loading.load_model(name, options.dtype, options.attention, processes=self.processes, **how)
        model = loading.load_model(name, options.dtype, options.attention, **how)
        # (a model that needs sharding may not fit whole on a device, beside the other processes' models)
        return model.to("cpu" if options.sharded and launched() > 1 else loading.device(options.device))


@dataclass
class StudiedModel:
    """One model of a run.

    Attributes:
        name: "base", the name of a strategy, or that of a given model.
        part: the part of the stage to do; empty for all of it.
    """

    run: Run
    experiment: Experiment
    name: str
    progress: Progress
    part: str = ""

    @property
    def is_base(self) -> bool:
        return self.name == BASE

    @property
    def is_trained(self) -> bool:
        """Whether a strategy of the run taught it, so that the run has its training."""
        return self.name in self.experiment.strategies

    @property
    def is_given(self) -> bool:
        return self.name in self.experiment.given

    @property
    def phases(self) -> list[Phase]:
        """The phases of its strategy; none if it was not trained here."""
        return self.experiment.strategies.get(self.name, [])

    @property
    def view(self) -> View:
        return View(self.experiment, self.run.processes)

    @cached_property
    def tokenizer(self) -> Any:
        return loading.load_tokenizer(self.experiment.model.name)

    @property
    def pad_id(self) -> int:
        return loading.pad_id(self.tokenizer)

    @cached_property
    def model(self) -> Any:
        """The model itself, loaded when first needed and kept."""
        return self.load()

    @property
    def folder(self) -> Path:
        """The folder of a taught model: that of its strategy's last phase, or the given one."""
        if self.is_given:
            return Path(locating.locate(self.experiment.given[self.name]))
        return self.run.path(f"models/{self.name}") / self.phases[-1].name

    def load(self) -> Any:
        """The model, ready for use on the run's device."""
        return self.view.load_base() if self.is_base else self.view.load_checkpoint(self.folder)

    def load_start(self) -> Any:
        """The model that training began from. Its parameters have the names of the taught model's.

        That is the base. If the view shows an adapter, it is the base with the adapter as it was before training. The
        beginning of a given adapter is not known, so zeros stand for it.
        """
        if self.view.is_merged:
            return self.view.load_base()
        if not self.is_given:
            return View(self.experiment).load_checkpoint(self.run.path(f"models/{self.name}") / START)
        model = self.load()
        for name in adapters.adapter_names(model):
            model.get_parameter(name).data.zero_()
        return model

    def load_trainable(self) -> Any:
        """The model, to train it further as it was taught."""
        return self.view.load_trainable(self.folder)

    def checkpoints(self) -> list[tuple[int, str, Path]]:
        """The kept checkpoints of its training in order, each as (updates over all phases, phase, folder).

        The end of each phase is always one of them.
        """
        home, kept, before = self.run.path(f"models/{self.name}"), [], 0
        lengths = {phase["name"]: phase["updates"] for phase in read_json(home / "training.json")}
        for phase in self.phases:
            for folder in (home / phase.name).glob("checkpoint-*"):
                kept.append((before + int(folder.name.rpartition("-")[2]), phase.name, folder))
            before += lengths[phase.name]
            kept.append((before, phase.name, home / phase.name))
        return sorted(kept)

    def shared_sets(self) -> list[tuple[str, ParamSet]]:
        """The shared set of each time, at the central fraction. The base has none."""
        if self.is_base:
            return []
        fraction = central_fraction(self.experiment)
        home = self.run.path(f"shared/{self.name}")
        files = {when: home / f"{when}-{fraction:g}-shared.safetensors" for when in WHENS}
        return [(when, ParamSet.load(file)) for when, file in files.items() if file.exists()]

    def key(self) -> Any:
        """What the model depends on: for the key of a step that reads it."""
        base = model_key(self.experiment)
        if self.is_base:
            return base
        if self.is_given:
            return {"given": _content(self.experiment.given[self.name]), "base": base}
        inputs = self.run.inputs(f"models/{self.name}")
        return inputs | {"base": base} if self.experiment.train.lora else inputs

    def origin(self) -> dict[str, Any]:
        """Where the model comes from, as its artefacts record it: base, data, strategy and dtype."""
        base = self.experiment.model
        origin = {
            "model": base.name,
            "revision": locating.revision(base.name),
            "dtype": base.dtype,
            "strategy": self.name,
            "data": f"sha256:{self.run.inputs('data')['data']}",
        }
        return origin if base.random_init is None else origin | {"random_init": base.random_init}

    # ---- examples, questions and facts

    @cached_property
    def parts(self) -> dict[str, list[Encoded]]:
        """All examples of the run, by part."""
        return examples(self.run, self.experiment, self.tokenizer, known=None if self.is_base else 0)

    @cached_property
    def questions(self) -> dict[str, list[Encoded]]:
        """Some questions of each kind that the model may be able to answer.

        The base knows nobody of the run's world, so it is asked about its own people.
        """
        kinds = (A_OOD,) if self.is_base else self.experiment.roles.both
        number = self.experiment.mechanism.questions
        return {part: sample(self.parts[part], number) for part in kinds if part in self.parts}

    @cached_property
    def facts(self) -> dict[str, list[FactPair]]:
        """Some facts in both formats (`people_facts`), of people whose questions are trained and of the others."""
        facts, roles = {}, self.experiment.roles
        if not roles.stored or not roles.outcome:
            raise UserError(
                "no task stores facts, or none asks for held-out ones, so there are no two formats to compare"
            )
        stored = [item for part in roles.parts_of(roles.stored) for item in self.parts[part]]
        for part in roles.both:
            pairs = fact_pairs(stored, self.parts[part])
            facts[part] = people_facts(pairs, self.experiment.mechanism.facts, f"explain/{part}")
        return facts

    @cached_property
    def read(self) -> dict[str, list[FactPair]]:
        """Those of the facts whose input-level signature is measured (`sample_facts`)."""
        most = self.experiment.mechanism.signature
        return {part: sample_facts(pairs, most, f"signature/{part}") for part, pairs in self.facts.items()}

    @cached_property
    def shared(self) -> list[tuple[str, ParamSet]]:
        """Its shared sets, read once."""
        return self.shared_sets()

    # ---- progress

    def bar(self, label: str, total: int | None = None) -> Any:
        return self.progress.bar(f"{self.name}: {label}", total)

    def note(self, text: str) -> None:
        self.progress.note(f"{self.name}: {text}")


def people_facts(pairs: Sequence[FactPair], most: int, seed: str) -> list[FactPair]:
    """All facts of some people, in a random order of the people; `most` in all, if one person has not more.

    At most an eighth of `most` are of one person, but two may be: of a document with many questions some facts are
    drawn. Otherwise those that are chosen could be of a few documents, too few for an interval over them.
    """
    draw, of_one = random.Random(seed), max(2, most // 8)
    of_person: dict[str, list[FactPair]] = defaultdict(list)
    for pair in pairs:
        of_person[pair.person].append(pair)
    people = [*of_person]
    draw.shuffle(people)
    chosen: list[FactPair] = []
    for person in people:
        facts = of_person[person]
        if len(facts) > of_one:
            facts = [facts[i] for i in sorted(draw.sample(range(len(facts)), of_one))]
        if len(chosen) + len(facts) > most and chosen:
            break
        chosen += facts
    return chosen


def sample_facts(pairs: Sequence[FactPair], most: int, seed: str) -> list[FactPair]:
    """`most` of some facts, drawn at random; if these are of too few people for an interval, people take turns."""
    draw = random.Random(seed)
    drawn = draw.sample(pairs, min(len(pairs), most))
    people = {pair.person for pair in pairs}
    if len({pair.person for pair in drawn}) >= min(FEWEST, len(people), most):
        return drawn
    shuffled, turns = draw.sample(pairs, len(pairs)), Counter[str]()
    turn: list[int] = []
    for pair in shuffled:
        turn.append(turns[pair.person])
        turns[pair.person] += 1
    return [shuffled[i] for i in sorted(range(len(shuffled)), key=turn.__getitem__)][:most]


def model_key(experiment: Experiment) -> dict[str, Any]:
    """The base's settings and, if it is on this machine, its content; not sharding, which only changes rounding."""
    settings = asdict(experiment.model)
    given = {
        name: value for name, value in settings.items() if value is not None and name not in ("sharded", "pickled")
    }
    return given | {"content": _content(experiment.model.name)}


def _content(model: str) -> Any:
    """A hash of a model's folder, with that of its adapter's base if it has one; its name if it is not here."""
    path = Path(locating.locate(model))
    content: Any = sha256_tree(path) if path.exists() else str(path)
    adapted_base = locating.adapted_base(str(path))
    if adapted_base is not None:
        content = [content, sha256_tree(adapted_base) if Path(adapted_base).exists() else adapted_base]
    return content


def central_fraction(experiment: Experiment) -> float:
    """The one of analysis.central_fractions nearest to 5 %, for analyses of a single shared set."""
    return nearest(experiment.analysis.central_fractions, 0.05)


def trains_in_bf16(experiment: Experiment) -> bool:
    """Whether the run's training multiplies in bf16."""
    return loading.trains_in_bf16(experiment.train.precision, loading.device(experiment.model.device))
