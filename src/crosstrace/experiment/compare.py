"""A comparison: a base and models that were tuned from it elsewhere, analysed without any training.

A comparison is an experiment without strategies. This module makes its settings; `pipeline.run` runs it like any
other, and `models.compatibility` checks that the models fit.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from crosstrace.core.errors import UserError
from crosstrace.core.files import expanded
from crosstrace.data.chat import put_questions
from crosstrace.data.facts import FactSettings
from crosstrace.data.tasks import default_tasks
from crosstrace.data.text import read_jsonl, texts
from crosstrace.experiment import config
from crosstrace.experiment.config import Experiment
from crosstrace.experiment.settings import AnalysisSettings, ModelSettings, TraceSettings
from crosstrace.models.loading import load_tokenizer
from crosstrace.models.locating import BUNDLED

FILES = ("bio.jsonl", "qa.jsonl")


def comparison(base: str, tuned: Sequence[str], tasks: str) -> Experiment:
    """The experiment that compares a base with tuned models.

    Args:
        base: `bundled`, a folder or a hub name.
        tuned: the same, or a folder with an adapter. NAME=MODEL gives the model a name of its own.
        tasks: the folder of a run or of an import, or one with bio.jsonl and qa.jsonl in the form that `crosstrace
            data` writes. Its examples are taken.

    Raises:
        UserError: two models have one name, or the folder holds no tasks.
    """
    given: dict[str, str] = {}
    for text in tuned:
        name, model = named(text)
        if name in given:
            raise UserError(f"{given[name]} and {model} would both be called {name}; write one of them as NAME={model}")
        given[name] = model
    folder = expanded(tasks)
    experiment = Experiment(
        name="compare", model=ModelSettings(name=base), strategies={}, given=given, trace=TraceSettings(online=False)
    )
    given_tasks = _other_tasks(folder)
    if given_tasks is None:
        return replace(experiment, facts=tasks_in(folder, base))
    of, texts_folder = given_tasks
    return replace(
        experiment,
        facts=of.facts if of.facts.source is None else replace(of.facts, source=str(texts_folder)),
        tasks={
            name: replace(task, source=str(texts_folder / f"{name}.jsonl"), held_out=task.is_split)
            for name, task in of.tasks.items()
        },
        outcome=of.outcome,
        analysis=AnalysisSettings(tasks=of.analysis.tasks),
    )


def _other_tasks(folder: Path) -> tuple[Experiment, Path] | None:
    """The settings of a run or import with tasks of its own, and the folder with their texts.

    `None` for biographies and questions, and for any other folder.
    """
    for saved, texts_folder in ((folder / "config.yaml", folder / "data"), (folder / "experiment.yaml", folder)):
        if saved.is_file():
            experiment = config.load(saved)
            return None if experiment.tasks == default_tasks() else (experiment, texts_folder)
    return None


def named(text: str) -> tuple[str, str]:
    """The name and the model of NAME=MODEL.

    A model alone gets its name from the last part of its path or, if it lies in a run, from its strategy.
    """
    name, equals, model = text.partition("=")
    if equals and re.fullmatch(r"[\w-]+", name):
        return name, model
    parts = Path(text).parts
    name = parts[-2] if len(parts) > 2 and parts[-3] == "models" else parts[-1] if parts else ""
    name = re.sub(r"[^\w-]+", "-", name).strip("-")
    return ("tuned" if name in ("", "base") else name), text


def tasks_in(folder: Path, base: str = BUNDLED) -> FactSettings:
    """The facts that a folder's examples are about: as its run drew them, or the examples themselves.

    Args:
        base: the model whose chat template the questions get, if the run's questions have one (`facts.template`).

    Raises:
        UserError: the folder holds no examples, or the base has no chat template.
    """
    saved = folder / "config.yaml"
    if saved.is_file():
        facts, data = config.load(saved).facts, folder / "data"
        if facts.source is not None:
            return replace(facts, source=str(data))  # the copy from the run's beginning
        rows = {Path(file).stem: read_jsonl(data / file) for file in FILES}
        tokenizer = load_tokenizer(base) if facts.template == "chat" else None
        drawn = texts(facts)
        drawn["qa"] = put_questions(facts, tokenizer, drawn["qa"])
        return facts if drawn == rows else FactSettings(source=str(data))
    imported = folder / "experiment.yaml"
    if imported.is_file():
        return replace(config.load(imported).facts, source=str(folder))
    if not all((folder / file).is_file() for file in FILES):
        raise UserError(
            f"tasks folder {folder} holds no {' and '.join(FILES)}; expected the folder of a run, or what `crosstrace "
            "data` or `crosstrace import` wrote"
        )
    return FactSettings(source=str(folder))
