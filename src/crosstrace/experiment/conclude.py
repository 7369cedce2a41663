"""The last stage's results: everything gathered into results.json, and the paper's claims judged on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from crosstrace.analyses.claims import judge
from crosstrace.analyses.claims.case import Case
from crosstrace.core import left_out
from crosstrace.core.files import read_json, write_json
from crosstrace.core.left_out import Part, attempt
from crosstrace.core.progress import Progress
from crosstrace.core.run_folder import Run
from crosstrace.data.text import NO_QUESTIONS
from crosstrace.experiment import config
from crosstrace.experiment.analysis import ANALYSES
from crosstrace.experiment.config import Experiment
from crosstrace.experiment.examples import asks_something, data_steps
from crosstrace.experiment.registry import stage_names, stage_of, stages
from crosstrace.experiment.studied import StudiedModel, View
from crosstrace.models import adapters, loading
from crosstrace.results.results import SCHEMA, Results
from crosstrace.results.tables import Claim, Difference
from crosstrace.training.recipes import Phase


def conclude(run: Run, experiment: Experiment, progress: Progress) -> Results:
    """Gather everything into results.json and test the paper's claims on it."""
    names, trained = experiment.taught, [*experiment.strategies]
    absent = left_out.steps(run)
    is_done = lambda step: step not in absent and run.path(step).exists()
    needed = [*data_steps(experiment), "eval/base.json"]
    for name in names:
        needed += [f"eval/{name}.json", f"traces/{name}", f"analysis/{name}.json", f"drift/{name}.json"]
    needed += [f"models/{name}" for name in trained]
    needed += ["doctor.json"] if experiment.trace.check else []
    with_interventions = [name for name in names if is_done(f"interventions/{name}.json")]
    needed += [f"interventions/{name}.json" for name in with_interventions]
    mechanism = {
        part: [name for name in ("base", *names) if is_done(f"mechanism/{name}/{part}.json")]
        for part in experiment.mechanism.parts
    }
    needed += [f"mechanism/{name}/{part}.json" for part, found in mechanism.items() for name in found]
    retained = [name for name in names if is_done(f"retention/{name}")]
    needed += [f"retention/{name}" for name in retained]
    told = {
        stage: [name for name in ("base", *names) if is_done(f"{stage.steps[0]}/{name}.json")]
        for stage in stages().values() if stage.results is not None
    }  # fmt: skip
    needed += [f"{stage.steps[0]}/{name}.json" for stage, own in told.items() for name in own]
    claimed = Part("report", name="claims")
    key = {
        "inputs": run.inputs(*(step for step in needed if step not in absent)),
        "experiment": config.deciding(experiment),
        "left_out": [row for row in left_out.rows(run) if row["part"] != claimed.name],
    }
    if run.complete("results.json", key):
        return Results.read(run.path("results.json"))

    def gather() -> Results:
        evals = {name: read_json(run.path(f"eval/{name}.json")) for name in ("base", *names)}
        analyses = {name: read_json(run.path(f"analysis/{name}.json")) for name in names
                    if f"analysis/{name}.json" not in absent}  # fmt: skip
        interventions = {name: read_json(run.path(f"interventions/{name}.json")) for name in with_interventions}
        about = read_json(run.folder / "metadata.json")
        values: dict[str, Any] = {"schema": SCHEMA, "run": _about(run, experiment, about)}
        if not asks_something(run, experiment):
            values["lacking"] = NO_QUESTIONS
        if run.path("data/import.json").is_file():
            values["import"] = read_json(run.path("data/import.json"))
        values["recall"] = {name: found["summary"] for name, found in evals.items()}
        if experiment.eval.known:
            asked = read_json(run.path("known") / "asked.json")
            values["known"] = {"source": experiment.eval.known, "relations": asked}
            values["known"]["models"] = {name: found["known"] for name, found in evals.items() if "known" in found}
        home = {name: run.path(f"models/{name}") for name in trained}
        values["history"] = {name: read_json(home[name] / "history.json") for name in trained}
        values["training"] = {name: _training(run, name) for name in trained}
        values["drift"] = {
            name: read_json(run.path(f"drift/{name}.json")) for name in names if f"drift/{name}.json" not in absent
        }
        for part in ("shared", "pairs", "similarity", "centralization", "maps", "units"):
            values[part] = {name: found.get(part, []) for name, found in analyses.items()}
        values["interventions"] = {
            name: {kind: [_without_answers(row) for row in found[kind]] for kind in ("ablate", "graft")}
            | {"untouched": found["untouched"]}
            for name, found in interventions.items()
        }
        values["mechanism"] = {
            part: {name: read_json(run.path(f"mechanism/{name}/{part}.json")) for name in found}
            for part, found in mechanism.items()
        }
        values["retention"] = {name: read_json(run.path(f"retention/{name}") / "retention.json") for name in retained}
        values["stages"] = {
            stage.name: {name: stage.results(StudiedModel(run, experiment, name, progress)) for name in own}
            for stage, own in told.items() if stage.results is not None
        }  # fmt: skip
        if experiment.trace.check and "doctor.json" not in absent:
            diagnosis = read_json(run.path("doctor.json"))
            values["doctor"] = {key: diagnosis[key] for key in ("verdict", "problems", "checks")}
        values["coverage"] = {name: found["coverage"] for name, found in analyses.items()}
        values |= {"claims": [], "differences": [], "left_out": []}
        values |= {"seconds": _seconds(run), "versions": about["versions"]}
        results = Results.of(values)

        def judge_claims() -> None:
            case = Case(
                results, evals, interventions, experiment.analysis.central_fractions, experiment.roles,
                given=experiment.given, words=experiment.words,
            )  # fmt: skip
            claims, differences = judge.judge(case, experiment.pairs, _further_claims(experiment))
            results.claims = [Claim(**claim) for claim in claims]
            results.differences = [Difference(**difference) for difference in differences]

        attempt(run, claimed, judge_claims, progress.note)
        results.left_out = Results.of({"left_out": left_out.rows(run)}).left_out
        return results

    results = gather()
    if not results.claims and any(row.part == claimed.name for row in results.left_out):
        key["without"] = claimed.name  # so it is not done, and is tried again
    return Results.read(run.stage("results.json", key, lambda path: write_json(path, results.as_values())))


def _further_claims(experiment: Experiment) -> tuple[list[judge.PairClaim], list[judge.ModelClaim]]:
    """The claims of the analyses that are asked for and make one."""
    found = [ANALYSES[part] for part in experiment.mechanism.parts]
    return (
        [own.pair_claim for own in found if own.pair_claim is not None],
        [own.model_claim for own in found if own.model_claim is not None],
    )


def _seconds(run: Run) -> dict[str, float]:
    """Seconds of each stage, all strategies together: with several jobs, more than the clock on the wall shows."""
    found: dict[str, float] = {}
    for step, seconds in run.seconds().items():
        stage = stage_of(step)
        if stage is not None:
            found[stage] = found.get(stage, 0.0) + seconds
    return {stage: found[stage] for stage in stage_names() if stage in found}


def _training(run: Run, name: str) -> dict[str, Any]:
    phases = read_json(run.path(f"models/{name}") / "training.json")
    seen: dict[str, int] = {}
    for phase in phases:
        for task, number in phase["examples"].items():
            seen[task] = seen.get(task, 0) + number
    return {
        "updates": sum(phase["updates"] for phase in phases),
        "examples": seen,
        "seconds": run.seconds()[f"models/{name}"],
        "phases": phases,
    }


def _about(run: Run, experiment: Experiment, about: Mapping[str, Any]) -> dict[str, Any]:
    model = View(experiment).load_base()
    strategies = {
        name: "; then ".join(_phase_text(phase) for phase in phases) for name, phases in experiment.strategies.items()
    } | {name: f"tuned elsewhere: {model}" for name, model in experiment.given.items()}
    return {
        "name": experiment.name,
        "model": experiment.model.name,
        "architecture": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seed": experiment.facts.seed,
        "facts": asdict(experiment.facts),
        "tasks": experiment.roles.as_values(),
        "compare": [[*pair] for pair in experiment.pairs],
        "words": dict(experiment.words),
        "strategies": strategies,
        **({"given": dict(experiment.given)} if experiment.given else {}),
        "trace": {
            "measure": experiment.trace.measures[0],
            "targets": experiment.trace.targets,
            "parts": experiment.trace.parts,
            "every": experiment.trace.every,
            **({"metric": experiment.trace.metric} if "summed" in experiment.trace.definitions else {}),
        },
        "device": about["device" if loading.device(experiment.model.device).type == "cuda" else "cpu"],
        "threads": experiment.threads,
        "jobs": experiment.jobs,
        "precision": about["precision"],
        **_adapter_told(experiment),
        "kernel": experiment.model.attention,
        "git": about["git"],
    }


def _adapter_told(experiment: Experiment) -> dict[str, Any]:
    """Of a run with an adapter: what it is, how much is trained, and as what it is traced."""
    options = experiment.train.lora
    if options is None:
        return {}
    model = adapters.adapted(View(experiment).load_base(), options, 0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"lora": asdict(options) | {"parameters": trained}, "view": experiment.trace.view}


def _phase_text(phase: Phase) -> str:
    """What a phase trains, in words: its length, the examples of an update, and what does not weigh 1."""
    weights = {task: f" (weight {weight:g})" for task, weight in phase.weights.items() if weight != 1}
    batch = " and ".join(f"{count} {task}{weights.get(task, '')}" for task, count in phase.composition().items())
    length = f"{phase.steps} updates" if phase.steps else f"{phase.epochs:g} epochs"
    return f"{length} of {batch} examples"


def _without_answers(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "answers"}
