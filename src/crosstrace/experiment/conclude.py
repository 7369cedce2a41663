"""Gathers what all stages saved into results.json, and judges the paper's claims on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
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
from crosstrace.experiment.stage import Stage
from crosstrace.experiment.studied import StudiedModel, View
from crosstrace.models import adapters, loading
from crosstrace.results.results import SCHEMA, Results
from crosstrace.results.run import LeftOut
from crosstrace.results.sharing import Claim, Difference
from crosstrace.training.recipes import Phase

CLAIMS = Part("report", name="claims")


@dataclass(frozen=True)
class _Outputs:
    """What the stages of a run have made: for each kind of output, the models that have it.

    Attributes:
        absent: the steps that are left out.
        taught: all models beside the base.
        trained: those that a strategy of the run taught.
        interventions, retention: those with the output of this stage.
        mechanism: by analysis, those with its rows.
        stages: by stage that adds to the results, those with its output.
    """

    absent: Sequence[str]
    taught: Sequence[str]
    trained: Sequence[str]
    interventions: Sequence[str]
    mechanism: Mapping[str, Sequence[str]]
    retention: Sequence[str]
    stages: Mapping[Stage, Sequence[str]]

    @classmethod
    def of(cls, run: Run, experiment: Experiment) -> _Outputs:
        """What is there in the run's folder."""
        absent, taught = left_out.steps(run), experiment.taught

        def with_step(step: str, models: Sequence[str]) -> list[str]:
            steps = {name: step.format(name) for name in models}
            return [name for name in models if steps[name] not in absent and run.path(steps[name]).exists()]

        return cls(
            absent=absent,
            taught=taught,
            trained=[*experiment.strategies],
            interventions=with_step("interventions/{}.json", taught),
            mechanism={
                part: with_step(f"mechanism/{{}}/{part}.json", ("base", *taught)) for part in experiment.mechanism.parts
            },
            retention=with_step("retention/{}", taught),
            stages={
                stage: with_step(f"{stage.steps[0]}/{{}}.json", ("base", *taught))
                for stage in stages().values()
                if stage.results is not None
            },
        )

    def steps(self, experiment: Experiment) -> list[str]:
        """The steps that the results are made of, without those that are left out."""
        steps = [*data_steps(experiment), "eval/base.json"]
        for name in self.taught:
            steps += [f"eval/{name}.json", f"traces/{name}", f"analysis/{name}.json", f"drift/{name}.json"]
        steps += [f"models/{name}" for name in self.trained]
        steps += ["doctor.json"] if experiment.trace.check else []
        steps += [f"interventions/{name}.json" for name in self.interventions]
        steps += [f"mechanism/{name}/{part}.json" for part, models in self.mechanism.items() for name in models]
        steps += [f"retention/{name}" for name in self.retention]
        steps += [f"{stage.steps[0]}/{name}.json" for stage, models in self.stages.items() for name in models]
        return [step for step in steps if step not in self.absent]


def conclude(run: Run, experiment: Experiment, progress: Progress) -> Results:
    """Gather everything into results.json and test the paper's claims on it."""
    outputs = _Outputs.of(run, experiment)
    key = {
        "inputs": run.inputs(*outputs.steps(experiment)),
        "experiment": config.deciding(experiment),
        "left_out": [row for row in left_out.rows(run) if row["part"] != CLAIMS.name],
        # of a version of crosstrace that judges further claims the run gets them when it is gone on with
        "claims": [claim.__name__ for claim in (*judge.OF_PAIRS, *judge.OF_MODELS)],
    }
    if run.complete("results.json", key):
        return Results.read(run.path("results.json"))
    evals = _read_each(run, "eval/{}.json", ("base", *outputs.taught))
    interventions = _read_each(run, "interventions/{}.json", outputs.interventions)
    results = _gather(run, experiment, progress, outputs, evals, interventions)
    attempt(run, CLAIMS, partial(_judge_claims, results, experiment, evals, interventions), progress.note)
    results.left_out = parts_left_out(run)
    if not results.claims and any(row.part == CLAIMS.name for row in results.left_out):
        key["without"] = CLAIMS.name  # so it is not done, and is tried again
    return Results.read(run.stage("results.json", key, lambda path: write_json(path, results.as_values())))


def parts_left_out(run: Run) -> list[LeftOut]:
    """The parts that the run does without so far, as results.json has them."""
    return [LeftOut(**row) for row in left_out.rows(run)]


def _gather(
    run: Run,
    experiment: Experiment,
    progress: Progress,
    outputs: _Outputs,
    evals: Mapping[str, Any],
    interventions: Mapping[str, Any],
) -> Results:
    """The results without the claims."""
    names, absent = outputs.taught, outputs.absent
    analyses = _read_each(run, "analysis/{}.json", [n for n in names if f"analysis/{n}.json" not in absent])
    metadata = read_json(run.folder / "metadata.json")
    values: dict[str, Any] = {"schema": SCHEMA, "run": _run_info(run, experiment, metadata)}
    if not asks_something(run, experiment):
        values["lacking"] = NO_QUESTIONS
    if run.path("data/import.json").is_file():
        values["import"] = read_json(run.path("data/import.json"))
    values["recall"] = {name: scores["summary"] for name, scores in evals.items()}
    if experiment.eval.known:
        values["known"] = _known_facts(run, experiment, evals)
    homes = {name: run.path(f"models/{name}") for name in outputs.trained}
    values["history"] = {name: read_json(home / "history.json") for name, home in homes.items()}
    values["training"] = {name: _training(run, name) for name in outputs.trained}
    values["drift"] = _read_each(run, "drift/{}.json", [n for n in names if f"drift/{n}.json" not in absent])
    for table in ("shared", "pairs", "similarity", "centralization", "maps", "units"):
        values[table] = {name: tables.get(table, []) for name, tables in analyses.items()}
    values["interventions"] = {
        name: {kind: [_without_answers(row) for row in tables[kind]] for kind in ("ablate", "graft")}
        | {"untouched": tables["untouched"]}
        for name, tables in interventions.items()
    }
    values["mechanism"] = {
        part: _read_each(run, f"mechanism/{{}}/{part}.json", models) for part, models in outputs.mechanism.items()
    }
    values["retention"] = {n: read_json(run.path(f"retention/{n}") / "retention.json") for n in outputs.retention}
    values["stages"] = {
        stage.name: {name: stage.results(StudiedModel(run, experiment, name, progress)) for name in models}
        for stage, models in outputs.stages.items()
        if stage.results is not None
    }
    if experiment.trace.check and "doctor.json" not in absent:
        diagnosis = read_json(run.path("doctor.json"))
        values["doctor"] = {key: diagnosis[key] for key in ("verdict", "problems", "checks")}
    values["coverage"] = {name: tables["coverage"] for name, tables in analyses.items()}
    values |= {"claims": [], "differences": [], "left_out": []}
    values |= {"seconds": _seconds(run), "versions": metadata["versions"]}
    return Results.of(values)


def _judge_claims(
    results: Results, experiment: Experiment, evals: Mapping[str, Any], interventions: Mapping[str, Any]
) -> None:
    """Put the verdicts on the claims into the results."""
    case = Case(
        results, evals, interventions, experiment.analysis.central_fractions, experiment.roles,
        given=experiment.given, words=experiment.words,
    )  # fmt: skip
    claims, differences = judge.judge(case, experiment.pairs, _further_claims(experiment))
    results.claims = [Claim(**claim) for claim in claims]
    results.differences = [Difference(**difference) for difference in differences]


def _read_each(run: Run, step: str, models: Sequence[str]) -> dict[str, Any]:
    """What a step such as eval/{}.json has saved for each of some models."""
    return {name: read_json(run.path(step.format(name))) for name in models}


def _known_facts(run: Run, experiment: Experiment, evals: Mapping[str, Any]) -> dict[str, Any]:
    """Which facts of the world the base knew, and what became of them in each model."""
    return {
        "source": experiment.eval.known,
        "relations": read_json(run.path("known") / "asked.json"),
        "models": {name: scores["known"] for name, scores in evals.items() if "known" in scores},
    }


def _further_claims(experiment: Experiment) -> tuple[list[judge.PairClaim], list[judge.ModelClaim]]:
    """The claims that the experiment's analyses make, on two models and on one."""
    analyses = [ANALYSES[part] for part in experiment.mechanism.parts]
    return (
        [analysis.pair_claim for analysis in analyses if analysis.pair_claim is not None],
        [analysis.model_claim for analysis in analyses if analysis.model_claim is not None],
    )


def _seconds(run: Run) -> dict[str, float]:
    """Seconds of each stage, summed over the models. With several jobs the sum may exceed the wall clock."""
    total: dict[str, float] = {}
    for step, seconds in run.seconds().items():
        stage = stage_of(step)
        if stage is not None:
            total[stage] = total.get(stage, 0.0) + seconds
    return {stage: total[stage] for stage in stage_names() if stage in total}


def _training(run: Run, name: str) -> dict[str, Any]:
    """How a strategy was trained: updates, examples of each task, seconds, and its phases."""
    phases = read_json(run.path(f"models/{name}") / "training.json")
    examples: dict[str, int] = {}
    for phase in phases:
        for task, number in phase["examples"].items():
            examples[task] = examples.get(task, 0) + number
    return {
        "updates": sum(phase["updates"] for phase in phases),
        "examples": examples,
        "seconds": run.seconds()[f"models/{name}"],
        "phases": phases,
    }


def _run_info(run: Run, experiment: Experiment, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What was run: model, data, strategies, and the machine that the metadata describe."""
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
        "facts": asdict(experiment.facts) if any(task.is_of_world for task in experiment.tasks.values()) else {},
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
        "device": metadata["device" if loading.device(experiment.model.device).type == "cuda" else "cpu"],
        "threads": experiment.threads,
        "jobs": experiment.jobs,
        "precision": metadata["precision"],
        **_adapter_info(experiment),
        "kernel": experiment.model.attention,
        "git": metadata["git"],
    }


def _adapter_info(experiment: Experiment) -> dict[str, Any]:
    """The adapter's settings, how many parameters are trained, and the view of the trace; empty without an adapter."""
    options = experiment.train.lora
    if options is None:
        return {}
    model = adapters.adapted(View(experiment).load_base(), options, 0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"lora": asdict(options) | {"parameters": trained}, "view": experiment.trace.view}


def _phase_text(phase: Phase) -> str:
    """A phase in words: its length, the examples of an update, and the weights that are not 1."""
    weights = {task: f" (weight {weight:g})" for task, weight in phase.weights.items() if weight != 1}
    batch = " and ".join(f"{count} {task}{weights.get(task, '')}" for task, count in phase.composition().items())
    length = f"{phase.steps} updates" if phase.steps else f"{phase.epochs:g} epochs"
    return f"{length} of {batch} examples"


def _without_answers(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of interventions without the single answers."""
    return {name: value for name, value in row.items() if name != "answers"}
