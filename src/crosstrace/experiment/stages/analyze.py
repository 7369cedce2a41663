"""The stage `analyze`: which parameters the tasks share, how these sets look, and how far the weights moved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import combinations, product
from pathlib import Path
from typing import Any

from crosstrace.analyses.drift import drift
from crosstrace.analyses.sharing import centralization_rows, density_map, overlap_rows, similarity_rows
from crosstrace.core.files import write_json
from crosstrace.core.left_out import optional
from crosstrace.experiment import trace_files
from crosstrace.experiment.needs.files import SETS, Files
from crosstrace.experiment.needs.sizes import Need, Sizes
from crosstrace.experiment.selection import select_tasks, strengths
from crosstrace.experiment.stage import Stage
from crosstrace.experiment.stages.retain import moved
from crosstrace.experiment.studied import WHENS, StudiedModel, model_key
from crosstrace.experiment.trace_files import read_traces
from crosstrace.models.anatomy import Anatomy
from crosstrace.sets.controls import random_sets
from crosstrace.sets.paramset import ParamSet
from crosstrace.trace import Trace
from crosstrace.trace.means import REDUCTIONS

# Bytes for each parameter that `spearman` takes beside its two traces, as measured.
RANKING = {"float32": 8, "float64": 66}
DRIFT_DRAWS = 3  # random sets of each kind that the shared set's share of the weights' movement is compared with


def is_analysed(studied: StudiedModel) -> bool:
    """Whether the shared sets and their analysis are complete."""
    run, key = studied.run, _analysis_key(studied)
    return run.complete(f"analysis/{studied.name}.json", key) and run.complete(f"shared/{studied.name}", key)


def analyze(studied: StudiedModel) -> None:
    """Select the shared sets, analyse them, and measure how far the weights moved."""
    select_shared(studied)
    moved_weights(studied)


@optional("analyze", "shared/{}", "analysis/{}.json")
def select_shared(studied: StudiedModel) -> None:
    """Select the shared sets and analyse them: shared/<strategy>/ and analysis/<strategy>.json."""
    if not is_analysed(studied):
        run, name, key = studied.run, studied.name, _analysis_key(studied)
        trace_files.need(run, name, "analyze", parts=not run.complete(f"analysis/{name}.json", key))
        _analyze_traces(studied, key)


def _analysis_key(studied: StudiedModel) -> dict[str, Any]:
    """What the shared sets and their analysis depend on."""
    experiment = studied.experiment
    options = {name: value for name, value in asdict(experiment.analysis).items() if value is not None}
    settings = {"analysis": options, "measure": experiment.trace.measures[0]}
    return settings | studied.run.inputs(f"traces/{studied.name}")


def _analyze_traces(studied: StudiedModel, key: Mapping[str, Any]) -> None:
    """Select the sets, then make the tables about them.

    The traces of one time and reduction are read, used and freed before the next ones: each is as large as the model.
    """
    run, name, options, roles = studied.run, studied.name, studied.experiment.analysis, studied.experiment.roles
    model = studied.load_start()
    names, anatomy = studied.view.scope(model), Anatomy(model)
    del model
    for note in anatomy.notes:
        studied.note(note)

    def read(when: str, reduction: str) -> dict[str, list[Trace]]:
        return read_traces(run.path(f"traces/{name}"), when, key["measure"], roles, reduction)

    def select(when: str) -> Iterator[tuple[float, dict[str, ParamSet]]]:
        # (nobody else holds the strengths, so they are freed after the last sets)
        return select_tasks(
            strengths(read(when, "example")), options.central_fractions, names, options.how, roles.shared
        )

    def make_sets(folder: Path) -> None:
        folder.mkdir()
        origin = studied.origin() | {"measure": key["measure"], "reduction": "example"}
        for when in WHENS:
            for fraction, psets in select(when):
                for label, pset in psets.items():
                    meta = origin | {"when": when, "fraction": fraction, "how": options.how}
                    pset.save(folder / _set_file(when, fraction, label), meta)

    def make_tables(path: Path) -> None:
        tables: dict[str, Any] = {
            table: [] for table in ("shared", "pairs", "similarity", "centralization", "maps", "units")
        }
        tables["coverage"], tables["anatomy"] = {}, anatomy.notes
        for when, reduction in product(WHENS, REDUCTIONS):
            add_rows(tables, when, reduction)
        write_json(path, tables)

    def add_rows(tables: dict[str, Any], when: str, reduction: str) -> None:
        tasks = read(when, reduction)
        if not tasks:
            return
        by_task = {task: [part.values for part in parts] for task, parts in tasks.items()}
        values = {task: by_task[task] for task in roles.shared}
        weights = {task: [part.weight for part in parts] for task, parts in tasks.items()}
        moment = {"when": when, "reduction": reduction}
        overlaps = overlap_rows(values, options.fractions, names, how=options.how, weights=weights)
        tables["shared"] += [moment | row for row in overlaps]
        for pair in combinations(by_task, 2) if len(by_task) > 2 else ():
            two_tasks = {task: by_task[task] for task in pair}
            overlaps = overlap_rows(two_tasks, options.central_fractions, names, how=options.how, weights=weights)
            tables["pairs"] += [moment | {"tasks": [*pair]} | row for row in overlaps]
        tables["similarity"] += [moment | row for row in similarity_rows(by_task, names, weights=weights)]
        if reduction != "example":
            return
        central = centralization_rows(
            values, options.central_fractions, names, anatomy, draws=options.draws, how=options.how, weights=weights
        )
        tables["centralization"] += [{"when": when} | row for row in central]
        tables["coverage"][when] = {task: parts[0].meta["coverage"] for task, parts in tasks.items()}
        home = run.path(f"shared/{name}")
        for fraction in options.central_fractions:
            psets = {label: ParamSet.load(home / _set_file(when, fraction, label)) for label in (*tasks, "shared")}
            for label, pset in psets.items():
                labels = {"when": when, "task": label, "fraction": fraction}
                tables["maps"].append(labels | density_map(pset, anatomy, "module"))
            for unit in ("query_head", "kv_head", "neuron"):
                if anatomy.units(unit):
                    labels = {"when": when, "fraction": fraction, "unit": unit}
                    tables["units"].append(labels | density_map(psets["shared"], anatomy, unit))

    run.stage(f"shared/{name}", key, make_sets)
    run.stage(f"analysis/{name}.json", key, make_tables)


def _set_file(when: str, fraction: float, label: str) -> str:
    """The file of a set in the folder shared/<strategy>."""
    return f"{when}-{fraction:g}-{label}.safetensors"


@optional("analyze", "drift/{}.json", name="drift")
def moved_weights(studied: StudiedModel) -> None:
    """How far the weights moved from the base, and how much of that is in the shared sets: drift/<model>.json."""
    run, experiment, name = studied.run, studied.experiment, studied.name
    key = {
        "model": studied.key(), "base": model_key(experiment), "view": experiment.trace.view,
        "draws": DRIFT_DRAWS, **run.inputs(f"shared/{name}"),
    }  # fmt: skip

    def make(path: Path) -> None:
        start, tuned = studied.load_start(), studied.load()
        before, anatomy = {name: p.detach() for name, p in start.named_parameters()}, Anatomy(tuned)
        tables: dict[str, Any] = drift(tuned, before, anatomy, studied.view.adapter_scope(tuned))
        tables["sets"] = []
        for when, pset in studied.shared_sets():
            sets = {"shared": [pset], **random_sets(pset, DRIFT_DRAWS, f"drift/{name}/{when}")}
            tables["sets"] += [{"when": when, **row} for row in moved(tuned, before, sets)]
        write_json(path, tables)

    run.stage(f"drift/{name}.json", key, make)


def needs(sizes: Sizes, name: str) -> Iterator[Need]:
    """The traces of one time and reduction, and what one set or table needs beside them."""
    sizes = sizes.alone
    tasks, wide = sizes.tasks, {"a tensor in float64": 4 * sizes.largest}
    traces = {"traces": sizes.traces_read()}
    yield sizes.first("sets", {}, traces | {"strengths": tasks * sizes.sums} | wide)
    in_scope = {"traces": tasks * sizes.experiment.trace.parts * sizes.scope_sums}
    means = {"strengths": tasks * sizes.scope_sums}
    masks = (tasks + 2) * sizes.scope  # every task's set, their intersection and their union
    yield sizes.first("overlap", {}, in_scope | means | wide | {"masks": masks})
    ranking = RANKING["float64" if sizes.scope_sums > 4 * sizes.scope else "float32"]
    yield sizes.first("similarity", {}, in_scope | means | {"ranks": ranking * sizes.scope})
    masks = (len(sizes.whens) + 2 * DRIFT_DRAWS) * sizes.scope
    yield sizes.first("the weights' way", {"weights": 2 * sizes.weights}, {"masks": masks} | wide)


def disk(files: Files) -> None:
    """The saved sets of each time, a bit for each parameter."""
    sizes = files.sizes
    times = len(sizes.whens) if sizes.phases(files.name) else 1
    files.kept[SETS] = times * sizes.masks(len(sizes.experiment.analysis.central_fractions)) / 8
    files.moment("analyze")


ANALYZE = Stage("analyze", analyze, steps=("shared", "analysis", "drift"), reads_traces=True, needs=needs, disk=disk)
