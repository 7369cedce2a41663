"""The stage `mechanism`: how the base and the taught models recall, one analysis after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial

from crosstrace.core.files import write_json
from crosstrace.core.left_out import Part, attempt
from crosstrace.experiment.analysis import ANALYSES
from crosstrace.experiment.config import Experiment
from crosstrace.experiment.needs.sizes import Need, Operations, Sizes
from crosstrace.experiment.stage import Stage, always
from crosstrace.experiment.studied import BASE, StudiedModel


def explain(studied: StudiedModel) -> None:
    """Analyse how the base or a taught model recalls: mechanism/<model>/<part>.json of `studied.part` or all parts."""
    run, experiment, name = studied.run, studied.experiment, studied.name
    options = experiment.mechanism
    key = {
        "mechanism": {k: v for k, v in asdict(options).items() if k not in ("run", "parts")},
        "embeddings": experiment.analysis.embeddings, "model": studied.key(),
        "threads": experiment.threads, **run.inputs("data"),
    }  # fmt: skip

    def make(part: str, step: str) -> None:
        analysis = ANALYSES[part]
        sets = [f"shared/{name}"] if analysis.reads_sets and not studied.is_base else []
        part_key = key | {"format": analysis.version} | run.inputs(*sets)
        run.stage(step, part_key, lambda path: write_json(path, analysis.measure(studied)))

    for part in [studied.part] if studied.part else parts_of(experiment, name):
        step = f"mechanism/{name}/{part}.json"
        attempt(run, Part("mechanism", name, (step,), part), partial(make, part, step), studied.progress.note)


def parts_of(experiment: Experiment, name: str) -> list[str]:
    """The analyses that a model of the experiment gets."""
    analyses = [(part, ANALYSES[part]) for part in experiment.mechanism.parts]
    if name == BASE:
        return [part for part, analysis in analyses if analysis.of_base]
    return [part for part, analysis in analyses if analysis.of_given or name not in experiment.given]


def is_wanted(experiment: Experiment) -> bool:
    """Whether the experiment analyses how the models recall."""
    return experiment.mechanism.run


def needs(sizes: Sizes, name: str) -> Iterator[Need]:
    """The analyses one after the other. The model and the shared sets are held throughout."""
    sizes = sizes.alone
    taught = None if name == BASE else name
    for analysis in (ANALYSES[part] for part in parts_of(sizes.experiment, name)):
        for what, device, host in analysis.needs(sizes, taught) if analysis.needs is not None else ():
            yield sizes.first(what, device, host)
    sets = 0 if taught is None else len(sizes.whens) * sizes.scope
    questions = sizes.recall(sizes.experiment.roles.outcome, sizes.experiment.mechanism.questions)
    yield sizes.first("recall", {"weights": sizes.weights} | questions, {"masks": sets})


def work(sizes: Sizes, name: str) -> Iterator[Operations]:
    """All analyses. The base is asked one kind of questions, any other model two."""
    kinds = 1 if name == BASE else 2
    chosen = [ANALYSES[part] for part in parts_of(sizes.experiment, name)]
    flops = sum(analysis.work(sizes, kinds) for analysis in chosen if analysis.work is not None)
    yield Operations("mechanism", flops, sizes.experiment.model.dtype, is_shared=False)


MECHANISM = Stage(
    "mechanism", explain, steps=("mechanism",), of_base=always, is_wanted=is_wanted, asks=True, parts=parts_of,
    needs=needs, work=work,
)  # fmt: skip
