"""The models of a run: the base, those that its strategies taught, and those given, as `trace.view` sees them.

`View` reads an experiment's models; `StudiedModel` is one model of a run, which every stage is given. What differs
between the three kinds of models, and between an adapter and merged weights, is decided here and nowhere else.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

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

BASE = "base"  # the name of the model that nothing was taught
START = "start"  # the folder of an adapter before training, beside the phases'
WHENS = ("online", "summed", "final", "checkpoints")  # of traces
LEARNING = {"per_example": "online", "summed": "summed"}  # by definition, when a trace during training is


class View:
    """How an experiment reads models: their dtype, attention and device, and an adapter merged or as it is.

    Args:
        processes: those that work on the run side by side. If `model.sharded` is true, each of them loads its rows
            alone.
    """

    def __init__(self, experiment: Experiment, processes: Processes | None = None) -> None:
        self.experiment, self.processes = experiment, processes
        self.is_merged = experiment.trace.view == "merged"

    def load_base(self) -> Any:
        """The model that every strategy starts from."""
        options = self.experiment.model
        return self._read(options.name, random_init=options.random_init)

    def load_checkpoint(self, folder: str | Path) -> Any:
        """A model that a training left in a folder; its adapter, if it has one, merged or not."""
        model = self._read(str(folder), merge=self.is_merged)
        if not self.is_merged:
            adapters.check_plain(model, str(folder))
        return model

    def load_trainable(self, folder: str | Path) -> Any:
        """A model that a training left in a folder, to go on training: with its adapter, if that is what is trained."""
        if not self.experiment.train.lora:
            return self.load_checkpoint(folder)
        return View(self.experiment)._read(str(folder), merge=False)

    def merge(self, trained: Any) -> Any:
        """A model that was trained here as the view shows it."""
        if self.is_merged and adapters.is_adapted(trained):
            return trained.merge_and_unload().requires_grad_(True)
        return trained

    def scope(self, model: Any) -> list[str]:
        """The names of the parameters that may be selected, in canonical order."""
        if not self.is_merged and adapters.is_adapted(model):
            return adapters.adapter_names(model)
        return scope(model, self.experiment.analysis.embeddings)

    def adapter_scope(self, model: Any) -> list[str] | None:
        """The names of the adapter's parameters, if the view shows them alone; None where it shows whole weights."""
        return None if self.is_merged else self.scope(model)

    def _read(self, name: str, **how: Any) -> Any:
        options = self.experiment.model
        how |= {"pickled": options.pickled}
        if self.processes is not None and options.sharded:
            return loading.load_model(name, options.dtype, options.attention, processes=self.processes, **how)
        model = loading.load_model(name, options.dtype, options.attention, **how)
        # (beside the other processes' models, one that is sharded may find no room on a device as a whole)
        return model.to("cpu" if options.sharded and launched() > 1 else loading.device(options.device))


@dataclass
class StudiedModel:
    """One model of a run.

    Attributes:
        name: "base", a strategy's or a given one's.
        part: the part of a stage that is to be done; empty for all of it.
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
        """Whether a strategy of the run taught it, so that there is a training to look at."""
        return self.name in self.experiment.strategies

    @property
    def is_given(self) -> bool:
        return self.name in self.experiment.given

    @property
    def phases(self) -> list[Phase]:
        """What its strategy trains; nothing if it was not trained here."""
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
        """Where a taught model is: what its strategy's last phase left, or what was given."""
        if self.is_given:
            return Path(locating.locate(self.experiment.given[self.name]))
        return self.run.path(f"models/{self.name}") / self.phases[-1].name

    def load(self) -> Any:
        """The model, ready for use on the run's device."""
        return self.view.load_base() if self.is_base else self.view.load_checkpoint(self.folder)

    def load_start(self) -> Any:
        """The model that training began from, with the parameters of the taught one.

        That is the base. If the view shows an adapter, it is the base with the adapter as it was before training; for a
        given model, with an adapter of zeros, since nobody knows how it began.
        """
        if self.view.is_merged:
            return self.view.load_base()
        if not self.is_given:
            return View(self.experiment).load_checkpoint(self.run.path(f"models/{self.name}") / START)
        model = self.load()
        for own in adapters.adapter_names(model):
            model.get_parameter(own).data.zero_()
        return model

    def load_trainable(self) -> Any:
        """The model to go on training as it was taught."""
        return self.view.load_trainable(self.folder)

    def checkpoints(self) -> list[tuple[int, str, Path]]:
        """The kept checkpoints of its training, in order: updates over all phases, phase, folder. The end of each phase
        is always there."""
        home, found, before = self.run.path(f"models/{self.name}"), [], 0
        lengths = {phase["name"]: phase["updates"] for phase in read_json(home / "training.json")}
        for phase in self.phases:
            for place in (home / phase.name).glob("checkpoint-*"):
                found.append((before + int(place.name.rpartition("-")[2]), phase.name, place))
            before += lengths[phase.name]
            found.append((before, phase.name, home / phase.name))
        return sorted(found)

    def shared_sets(self) -> list[tuple[str, ParamSet]]:
        """The shared set of each time, at the central fraction; none of the base."""
        if self.is_base:
            return []
        fraction = central_fraction(self.experiment)
        home = self.run.path(f"shared/{self.name}")
        files = {when: home / f"{when}-{fraction:g}-shared.safetensors" for when in WHENS}
        return [(when, ParamSet.load(file)) for when, file in files.items() if file.exists()]

    def key(self) -> Any:
        """What the model depends on, for the key of a step that reads it."""
        base = model_key(self.experiment)
        if self.is_base:
            return base
        if self.is_given:
            return {"given": _content(self.experiment.given[self.name]), "base": base}
        own = self.run.inputs(f"models/{self.name}")
        return own | {"base": base} if self.experiment.train.lora else own

    def origin(self) -> dict[str, Any]:
        """What the model's artefacts say of where they come from: base, data, strategy and dtype."""
        base = self.experiment.model
        found = {
            "model": base.name,
            "revision": locating.revision(base.name),
            "dtype": base.dtype,
            "strategy": self.name,
            "data": f"sha256:{self.run.inputs('data')['data']}",
        }
        return found if base.random_init is None else found | {"random_init": base.random_init}

    # ---- what it is asked

    @cached_property
    def parts(self) -> dict[str, list[Encoded]]:
        """All examples of the run, by part."""
        return examples(self.run, self.experiment, self.tokenizer, known=None if self.is_base else 0)

    @cached_property
    def questions(self) -> dict[str, list[Encoded]]:
        """Some questions of each kind that the model may know the answer of: the base knows nobody of the run's world,
        but people of its own."""
        kinds = (A_OOD,) if self.is_base else self.experiment.roles.both
        number = self.experiment.mechanism.questions
        return {part: sample(self.parts[part], number) for part in kinds if part in self.parts}

    @cached_property
    def facts(self) -> dict[str, list[FactPair]]:
        """Some facts of whole people, both formats of each: of those whose questions are trained, and of the others."""
        found, roles = {}, self.experiment.roles
        if not roles.stored or not roles.outcome:
            raise UserError(
                "no task stores facts, or none asks for held-out ones, so there are no two formats to compare"
            )
        stored = [item for part in roles.parts_of(roles.stored) for item in self.parts[part]]
        for part in roles.both:
            pairs = fact_pairs(stored, self.parts[part])
            people = list(dict.fromkeys(pair.person for pair in pairs))
            random.Random(f"explain/{part}").shuffle(people)
            chosen: list[FactPair] = []
            for person in people:
                own = [pair for pair in pairs if pair.person == person]
                if len(chosen) + len(own) > self.experiment.mechanism.facts and chosen:
                    break
                chosen += own
            found[part] = chosen
        return found

    @cached_property
    def read(self) -> dict[str, list[FactPair]]:
        """Some of these facts, whose input-level signature is measured."""
        few = self.experiment.mechanism.signature
        return {
            part: random.Random(f"signature/{part}").sample(pairs, min(len(pairs), few))
            for part, pairs in self.facts.items()
        }

    @cached_property
    def shared(self) -> list[tuple[str, ParamSet]]:
        """Its shared sets, read once."""
        return self.shared_sets()

    # ---- what a waiting user is told

    def bar(self, label: str, total: int | None = None) -> Any:
        return self.progress.bar(f"{self.name}: {label}", total)

    def note(self, text: str) -> None:
        self.progress.note(f"{self.name}: {text}")


def model_key(experiment: Experiment) -> dict[str, Any]:
    """The base's settings and, of a local one, its content. Whether it is sharded changes nothing but rounding."""
    own = asdict(experiment.model)
    given = {name: value for name, value in own.items() if value is not None and name not in ("sharded", "pickled")}
    return given | {"content": _content(experiment.model.name)}


def _content(model: str) -> Any:
    """What a model holds: of a folder a hash, with that of the base that its adapter is for; else its name."""
    place = Path(locating.locate(model))
    content: Any = sha256_tree(place) if place.exists() else str(place)
    below = locating.adapted_base(str(place))
    if below is not None:
        content = [content, sha256_tree(below) if Path(below).exists() else below]
    return content


def central_fraction(experiment: Experiment) -> float:
    """The one of analysis.central_fractions that is nearest to 5 %: where one shared set stands for all."""
    return nearest(experiment.analysis.central_fractions, 0.05)


def trains_in_bf16(experiment: Experiment) -> bool:
    """Whether the run's training multiplies in bf16."""
    return loading.trains_in_bf16(experiment.train.precision, loading.device(experiment.model.device))
