"""The stage `intervene`: what recall becomes when the shared parameters are ablated or grafted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from crosstrace.core.files import write_json
from crosstrace.core.left_out import optional
from crosstrace.core.pieces import at_rest, is_sharded
from crosstrace.core.statistics import mean_interval, wilson
from crosstrace.experiment import trace_files
from crosstrace.experiment.analysis import Moment
from crosstrace.experiment.config import Experiment
from crosstrace.experiment.examples import examples, sample
from crosstrace.experiment.needs.sizes import Need, Operations, Sizes, asked_work
from crosstrace.experiment.selection import controls, select_tasks, strengths
from crosstrace.experiment.stage import Stage
from crosstrace.experiment.stages.recall import asking
from crosstrace.experiment.studied import WHENS, StudiedModel
from crosstrace.experiment.trace_files import read_traces
from crosstrace.sets.interventions import ablated, grafted
from crosstrace.sets.paramset import ParamSet


@optional("intervene", "interventions/{}.json")
def intervene(studied: StudiedModel) -> None:
    """Ablate and graft the shared sets and their controls: interventions/<strategy>.json."""
    run, experiment, name = studied.run, studied.experiment, studied.name
    options, how, roles = experiment.interventions, experiment.analysis.how, experiment.roles
    key = run.alone(partial(intervention_key, studied))

    def make(path: Path) -> None:
        trace_files.need(run, name, "intervene")
        tokenizer = studied.tokenizer
        parts = examples(run, experiment, tokenizer)
        questions = {part: sample(parts[part], options.questions) for part in roles.asked}
        base, tuned = studied.load_start(), studied.load()
        # not copied: while one model is changed the other is not
        base_values, tuned_values = at_rest(base), at_rest(tuned)
        names = studied.view.scope(base)
        like = base if is_sharded(base) else None
        ask = asking(run, experiment, tokenizer, experiment.eval.precision == "bf16")
        tables: dict[str, Any] = {"ablate": [], "graft": [], "people": {}}
        tables["people"] = {part: [item.example.person for item in items] for part, items in questions.items()}
        tables["untouched"] = {
            label: {part: ask(model, items).summary() for part, items in questions.items()}
            for label, model in (("tuned", tuned), ("base", base))
        }
        changes = {
            "ablate": (tuned, lambda pset: ablated(tuned, pset, options.to, base_values)),
            "graft": (base, lambda pset: grafted(base, pset, tuned_values)),
        }
        traces = run.path(f"traces/{name}")

        def sets(when: str) -> Iterator[tuple[float, str, list[ParamSet]]]:
            """The shared sets and their controls at one time. Only those of one fraction are held."""
            by_task = strengths(read_traces(traces, when, key["measure"], roles, like=like))
            for fraction, chosen in select_tasks(by_task, options.fractions, names, how, roles.shared):
                drawn = controls(by_task, chosen, options.seeds, f"{name}/{when}/{fraction:g}")
                for label, psets in drawn.items():
                    yield fraction, label, psets

        times = sum(trace_files.folder_of(traces, when).is_dir() for when in WHENS)
        most = times * len(options.fractions) * (1 + 2 * options.seeds + len(experiment.tasks))
        with studied.bar("intervene", len(changes) * most) as update:
            for when in WHENS:
                for fraction, label, psets in sets(when):
                    for kind, (model, changed) in changes.items():
                        scores: dict[str, list[list[int]]] = {part: [] for part in questions}
                        for pset in psets:
                            with changed(pset):
                                for part, items in questions.items():
                                    scores[part].append(ask(model, items).exact.astype(int).tolist())
                            update.add(1)
                        row = {"when": when, "fraction": fraction, "set": label, "size": psets[0].size}
                        row |= {"seeds": len(psets)}
                        for part, answers in scores.items():
                            row |= _accuracy(part, answers)
                        row["answers"] = {p: ["".join(map(str, a)) for a in draws] for p, draws in scores.items()}
                        tables[kind].append(row)
        run.alone(lambda: write_json(path, tables))

    run.stage(f"interventions/{name}.json", key, make)


def intervention_key(studied: StudiedModel) -> dict[str, Any]:
    """What the interventions depend on."""
    experiment = studied.experiment
    return {
        "interventions": asdict(experiment.interventions),
        "analysis": [experiment.analysis.how, experiment.analysis.embeddings],
        "measure": experiment.trace.measures[0],
        "threads": experiment.threads,
        "precision": experiment.eval.precision,
        "model": studied.key(),
        **studied.run.inputs("data", f"traces/{studied.name}"),
    }


def _accuracy(part: str, answers: list[list[int]]) -> dict[str, float]:
    """Accuracy with its interval: over the seeds if there are several, else Wilson's over the questions."""
    rates = [sum(row) / len(row) for row in answers]
    if len(rates) > 1:
        mean, low, high = mean_interval(rates)
        low, high = max(0.0, low), min(1.0, high)
    else:
        mean = rates[0]
        low, high = wilson(sum(answers[0]), len(answers[0]))
    return {part: mean, f"{part}_low": low, f"{part}_high": high}


def is_wanted(experiment: Experiment) -> bool:
    """Whether the experiment asks for interventions."""
    return experiment.interventions.run


def sets_put_in(experiment: Experiment) -> int:
    """How many sets of one time and fraction are ablated and grafted: the shared one and controls."""
    return 1 + 2 * experiment.interventions.seeds + len(experiment.tasks)


def needs(sizes: Sizes, name: str) -> Iterator[Need]:
    """Base and tuned model, the strengths of one time, and the sets of one fraction.

    Traces, strengths and sets of a sharded model lie where its pieces do. But random sets lie on the host, where every
    process draws them whole.
    """
    drawn = 2 * sizes.experiment.interventions.seeds
    for what, device, host in _moments(sizes):
        if not sizes.sharded:
            yield sizes.each(what, device, host)
        elif "masks" in host:
            pieces = {**device, **host, "masks": host["masks"] - drawn * sizes.scope}
            yield sizes.each(what, pieces, {"random masks": drawn * sizes.alone.scope})
        else:
            yield sizes.each(what, {**device, **host}, {})


def _moments(sizes: Sizes) -> Iterator[Moment]:
    """The moments, with the device and the host apart as for a model that is not sharded."""
    options = sizes.experiment.interventions
    models, strengths = {"weights": 2 * sizes.weights}, {"strengths": sizes.tasks * sizes.sums}
    yield "strengths", models, strengths | {"traces": sizes.traces_read(), "a tensor in float64": 4 * sizes.largest}
    held = strengths | {"masks": sizes.masks(1) + (sets_put_in(sizes.experiment) - 1) * sizes.scope}
    yield "controls", models, held | {"what is free of one task": sizes.scope_sums}
    saved = {"values to put back": max(options.fractions) * sizes.scope_sums}
    for part in sizes.experiment.roles.asked:
        recalled = sizes.recall(part, options.questions, sizes.experiment.eval.tokens)
        yield f"recall of {part}", models | saved | recalled, held


def work(sizes: Sizes, name: str) -> Iterator[Operations]:
    """A forward pass of some questions under every set, ablated and grafted."""
    experiment, material = sizes.experiment, sizes.material
    options, tokens = experiment.interventions, experiment.eval.tokens
    questions = [material.examples_of(part, options.questions) for part in experiment.roles.asked]
    per_set = sum((asked_work(items, tokens) for items in questions), Counter())
    sets = len(sizes.whens) * len(options.fractions) * sets_put_in(experiment)
    yield Operations("intervene", (2 * sets + 2) * sizes.flops(per_set), sizes.asking_dtype)


INTERVENE = Stage(
    "intervene", intervene, steps=("interventions",), is_wanted=is_wanted, asks=True, is_shared=True, reads_traces=True,
    needs=needs, work=work,
)  # fmt: skip
