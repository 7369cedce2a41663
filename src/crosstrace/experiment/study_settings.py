"""A study as data: the settings of all runs, what varies, and the runs that this makes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as settings

from crosstrace.core.errors import UserError
from crosstrace.core.settings import STRICT
from crosstrace.experiment import config
from crosstrace.experiment.config import Experiment

Scalar = bool | int | float | str | None

Points = list[Scalar] | dict[str, dict[str, Any]]


@settings(frozen=True, config=STRICT)
class StudySettings:
    """A grid of experiments."""

    name: str = "study"
    """Names the study's folder where none is given, and its report."""
    experiment: dict[str, Any] = Field(default_factory=dict)
    """Settings that all runs have in common, as in an experiment's file, or the path of one, such as an import writes;
    the defaults for what it leaves out."""
    vary: dict[str, Annotated[Points, Field(min_length=1)]] = Field(default_factory=dict)
    """What varies, every combination of it: either a dotted setting with a list of values (facts.people: [250, 500]),
    or any name with named points, each a few dotted settings (length: {short: {strategies.mixed.0.steps: 100}}). A
    value that is a list itself needs a named point. The first point is what the others are compared with."""
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1)] = Field(
        default_factory=lambda: [1, 2, 3]
    )
    """Seeds; every setting is run with each."""
    seeded: Annotated[list[str], Field(min_length=1)] = Field(default_factory=lambda: ["facts.seed", "train.seed"])
    """Dotted settings that take the seed."""
    compare: tuple[str, str] | None = None
    """Two strategies whose difference is told, the first minus the second, paired by seed; mixed and two_stage where
    every run has both, and none otherwise, if not given."""
    keep: Literal["results", "all"] = "results"
    """What stays of a finished run: its results and report, or its models and traces as well."""
    cores: Annotated[int, Field(ge=1)] | None = None
    """Cores that all runs together may use; those of the machine if not given. A run uses jobs × threads."""
    memory: Annotated[float, Field(gt=0)] | None = None
    """GiB that all runs together may use; unbounded if not given. What a run needs is known once one has ended, so the
    first runs alone. Where running ones outgrow the budget the last begun is stopped and goes on later; a run that does
    so alone fails."""
    executor: Literal["processes", "local", "slurm"] = "processes"
    """What makes the runs: processes of this command, within `cores` and `memory`; or submitit, one job a run: `slurm`,
    jobs of a cluster whose machines see the study's folder; `local`, the same on this machine, within `cores`."""
    job: dict[str, Any] = Field(default_factory=dict)
    """Parameters of submitit's jobs, e.g. {timeout_min: 240, gpus_per_node: 1, slurm_partition: gpu}."""


_ADAPTER = TypeAdapter(StudySettings)


@dataclass(frozen=True)
class Planned:
    """One run of a study: its place in the grid, the settings that its points change, and its experiment."""

    label: str
    points: dict[str, str]
    changes: dict[str, Any]
    seed: int
    experiment: Experiment

    @property
    def setting(self) -> str:
        """Its points in the grid. Runs of other seeds have the same."""
        return self.label.rpartition("/")[0]


def load(path: Path) -> StudySettings:
    """Read a study from a YAML file."""
    values = config.read_yaml(path, "examples/study-claims.yaml")
    return parse(values, str(path))


def parse(values: Mapping[str, Any], where: str) -> StudySettings:
    """Build a study from plain values.

    Raises:
        UserError: a key is unknown or a value unfit, or the experiment's file can't be read.
    """
    if isinstance(values.get("experiment"), str):
        values = {**values, "experiment": config.read_yaml(Path(values["experiment"]), "examples/tiny.yaml")}
    try:
        study = _ADAPTER.validate_python(values)
    except ValidationError as error:
        raise UserError(f"{where}: {config.complaint(error)}") from None
    if not study.name.strip(". ") or any(letter in study.name for letter in "/\\\0"):
        raise UserError(f"{where}: name = {study.name!r} cannot name a folder; use letters, digits, '_' and '-'")
    if study.compare and study.compare[0] == study.compare[1]:
        raise UserError(f"{where}: compare = {list(study.compare)}; expected two different strategies")
    if len(set(study.seeds)) < len(study.seeds):
        raise UserError(f"{where}: a seed is given twice in seeds = {study.seeds}; each is one run of every setting")
    return study


def plain(study: StudySettings) -> dict[str, Any]:
    """The study as plain values, ready for YAML or JSON."""
    return _ADAPTER.dump_python(study, mode="json", exclude_none=True)


def plan(study: StudySettings, where: str = "the study") -> list[Planned]:
    """Every run of a study: all settings with the first seed, then all with the next.

    Raises:
        UserError: an experiment of the grid is unfit, or two points cannot be told apart by their folders.
    """
    axes = [_points(name, points, where) for name, points in study.vary.items()]
    common = config.plain(config.parse(study.experiment, f"{where}: experiment"))
    runs = []
    for seed, point in product(study.seeds, product(*axes)):
        values = json.loads(json.dumps(common))
        changes = [(name, value) for _, changes in point for name, value in changes.items()]
        by_setting = dict(changes)
        for name, value in changes:
            if isinstance(value, dict):
                raise UserError(
                    f"{where}: {name} of a point is a whole section, which would lose its other settings; name each "
                    f"setting, e.g. {name}.{next(iter(value), 'SETTING')}"
                )
        _set_once([*(name for name, _ in changes), *study.seeded], where)
        label = "+".join(name for name, _ in point) or "default"
        for name, value in (by_setting | dict.fromkeys(study.seeded, seed)).items():
            try:
                config.assign(values, name, value)
            except UserError as error:
                raise UserError(f"{where}: {label}: {str(error).removeprefix('--')}") from None
        values["name"] = f"{study.name}: {label}, seed {seed}".replace("/", "-")
        experiment = config.parse(values, f"{where}: {label}")
        missing = [name for name in study.compare or () if name not in experiment.taught]
        if missing:
            raise UserError(
                f"{where}: {label} has no strategy {missing[0]!r}, which the study compares; strategies are "
                f"{', '.join(experiment.taught)}, so change `compare`"
            )
        points = dict(zip(study.vary, (name for name, _ in point)))
        runs.append(Planned(f"{label}/{seed}", points, by_setting, seed, experiment))
    if len({run.label for run in runs}) < len(runs):
        raise UserError(f"{where}: two points of the grid have one name; give each its own")
    return runs


def _set_once(names: Sequence[str], where: str) -> None:
    """Raise a `UserError` if two of a run's changes are of one setting, since one would be lost silently."""
    for number, name in enumerate(names):
        for other in names[:number]:
            if name == other or name.startswith(f"{other}.") or other.startswith(f"{name}."):
                raise UserError(
                    f"{where}: {name} is set by two of the study's axes and seeds (seeded: the settings that take the "
                    "seed), so one would be lost; let it vary in one place"
                )


def _points(axis: str, points: Points, where: str) -> list[tuple[str, dict[str, Any]]]:
    """The points of an axis: each one's name and the settings that it changes."""
    if isinstance(points, dict):
        named = list(points.items())
    else:
        short = axis.rpartition(".")[2]
        named = [(f"{short}={'none' if value is None else value}", {axis: value}) for value in points]
    for name, _ in named:
        if not re.fullmatch(r"[\w=,-][\w=,. -]*", name):
            raise UserError(f"{where}: point {name!r} of {axis} cannot name a folder; use letters, digits, '_' and '-'")
    return named
