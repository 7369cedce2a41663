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
    """How the base or a taught model recalls: mechanism/<model>/<part>.json, of `studied.part` or of all parts."""
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
        own = key | {"format": analysis.version} | run.inputs(*sets)
        run.stage(step, own, lambda path: write_json(path, analysis.measure(studied)))

    for each in [studied.part] if studied.part else parts_of(experiment, name):
        step = f"mechanism/{name}/{each}.json"
        attempt(run, Part("mechanism", name, (step,), each), partial(make, each, step), studied.progress.note)


def parts_of(experiment: Experiment, name: str) -> list[str]:
    """The parts that are found out of a model."""
    found = [(part, ANALYSES[part]) for part in experiment.mechanism.parts]
    if name == BASE:
        return [part for part, analysis in found if analysis.of_base]
    return [part for part, analysis in found if analysis.of_given or name not in experiment.given]


def is_wanted(experiment: Experiment) -> bool:
    """Whether the experiment asks how the models recall."""
    return experiment.mechanism.run


def needs(sizes: Sizes, name: str) -> Iterator[Need]:
    """The analyses one after the other, the model and the shared sets held throughout."""
    sizes = sizes.alone
    of = None if name == BASE else name
    for analysis in (ANALYSES[part] for part in parts_of(sizes.experiment, name)):
        for what, device, host in analysis.needs(sizes, of) if analysis.needs is not None else ():
            yield sizes.first(what, device, host)
    sets = 0 if of is None else len(sizes.whens) * sizes.scope
    asked = sizes.recall(sizes.experiment.roles.outcome, sizes.experiment.mechanism.questions)
    yield sizes.first("recall", {"weights": sizes.weights} | asked, {"masks": sets})


def work(sizes: Sizes, name: str) -> Iterator[Operations]:
    """The base is asked one kind of questions, any other model two."""
    kinds = 1 if name == BASE else 2
    chosen = [ANALYSES[part] for part in parts_of(sizes.experiment, name)]
    flops = sum(analysis.work(sizes, kinds) for analysis in chosen if analysis.work is not None)
    yield Operations("mechanism", flops, sizes.experiment.model.dtype, is_shared=False)


MECHANISM = Stage(
    "mechanism", explain, steps=("mechanism",), of_base=always, is_wanted=is_wanted, asks=True, parts=parts_of,
    needs=needs, work=work,
)  # fmt: skip
