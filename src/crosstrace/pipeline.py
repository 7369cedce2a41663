"""The whole experiment on one page: teach, test, trace, share, intervene, report.

Data flows one way through a run folder; each function below is one stage, reads what earlier ones saved and writes
one output, so a killed run goes on where it stopped and every stage can be run again alone.

Processes that a launcher started go through it side by side: they share out the work of the stages that train, ask and
trace, and wait for the first at the others.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product, takewhile
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from crosstrace import adapters, claims, config, interrupts, keeping, left_out, machine, models
from crosstrace.alike import check_alike, check_fits, check_same_tokens
from crosstrace.analysis import centralization_rows, density_map, overlap_rows, similarity_rows
from crosstrace.anatomy import Anatomy
from crosstrace.chains import done_by
from crosstrace.chat import put_questions, read_template
from crosstrace.config import Experiment
from crosstrace.drift import drift
from crosstrace.errors import UserError
from crosstrace.evaluate import Recall, recall, summaries
from crosstrace.facts import World
from crosstrace.forward import TrainingForwards
from crosstrace.intervene import ablated, grafted
from crosstrace.known import asks, find_known, instead_of, world_of
from crosstrace.left_out import Part, attempt, optional
from crosstrace.material import (
    LEARNING,
    REPLAYED,
    START,
    WHENS,
    data_steps,
    examples,
    facts_key,
    groups,
    in_scope,
    known_people,
    load,
    load_base,
    load_checkpoint,
    load_start,
    model_inputs,
    model_key,
    origin,
    replayable,
    sample,
    samples,
    shared_sets,
    taught_place,
    training_examples,
    trains_in_bf16,
)
from crosstrace.mechanism import Asked, explain, parts_of
from crosstrace.optimisers import check_optimisers
from crosstrace.processes import Processes, by_first
from crosstrace.progress import Progress
from crosstrace.results import Results
from crosstrace.retention import moved, new_material, retain
from crosstrace.schedule import Phase
from crosstrace.sharded import at_rest, is_sharded, local
from crosstrace.shared import ParamSet, only_set, random_sets, select_each, shared
from crosstrace.stats import mean_interval, wilson
from crosstrace.store import (
    Run,
    end_with_parent,
    expanded,
    linked,
    metadata,
    read_json,
    remove,
    remove_folder,
    sha256_tree,
    write_json,
)
from crosstrace.text import KNOWN, NO_QUESTIONS, questions, read_jsonl, texts, write_jsonl
from crosstrace.tokens import Encoded, batches, check_fast, encode
from crosstrace.trace import OnlineTrace, SummedTrace, Trace, load_traces, save_traces, trace
from crosstrace.trace.memory import free_memory
from crosstrace.trace.rules import sum_dtype
from crosstrace.trace.trace import REDUCTIONS, Accumulated
from crosstrace.train import Listener, PhaseReport, RecallHistory, TaskPart, check_trackers, train
from crosstrace.updates import MicroBatches

DRIFT_DRAWS = 3  # random sets of each kind whose share of the weights' way the shared set's is compared with
Asking = Callable[[Any, Sequence[Encoded]], Recall]
STAGES = ("data", "train", "eval", "trace", "analyze", "intervene", "mechanism", "retain", "report")
TASKS = ("bio", "qa")
SUMS = "sums"  # the folder of the trace during training, until it is over
SOURCE = ("world.json", "import.json")  # of one's own facts, what a run keeps


def run(
    experiment: Experiment,
    folder: Path,
    mode: str = "new",
    *,
    stages: Sequence[str] = STAGES,
    quiet: bool = False,
    processes: Processes | None = None,
) -> Results:
    """Run an experiment in `folder` and return its results, as `results.json` holds them.

    If a part of an analysis fails, it is left out and the rest goes on: `results["left_out"]` tells which and why, and
    the next attempt tries it again. What fails in training, recall or the trace stops the run.

    Args:
        experiment: all settings.
        folder: the run folder.
        mode: `new` (an existing run is an error), `resume` or `overwrite`.
        stages: which of STAGES to run; those before must have been run in the same folder.
        quiet: no progress on stderr.
        processes: all that a launcher started, if it did; each of them calls this with the same.

    Raises:
        UserError: bad settings, a folder that holds another run, or a stage whose inputs are missing.
    """
    unknown = [stage for stage in stages if stage not in STAGES]
    if mode not in ("new", "resume", "overwrite") or unknown or isinstance(stages, str):
        raise UserError(
            f"mode is {mode!r} and stages are {stages!r}; expected mode new, resume or overwrite, and a list of "
            f"{', '.join(STAGES)}"
        )
    if processes is not None:
        check_place(experiment, processes)
    if mode == "overwrite":
        _check_outside(experiment, folder)
    by_first(processes, lambda: check(experiment, whole=mode != "resume", stages=stages))
    text = config.dumps(experiment)
    with machine.same_threads_after(), Run.together(folder, text, mode, processes) as opened:  # type: ignore[arg-type]
        about = {"precision": _precision(experiment), "threads": experiment.threads}
        about["processes"] = 1 if processes is None else processes.size
        opened.alone(lambda: write_json(opened.folder / "metadata.json", metadata() | about))
        progress = Progress(quiet or not opened.leads)
        if "data" in stages:
            opened.alone(lambda: make_data(opened, experiment))
            find_known(opened, experiment, progress)
            seconds = opened.seconds()
            progress.done("data", sum(seconds[step] for step in ("data", "known") if step in seconds))
        _strategies(opened, experiment, stages, progress)
        if "report" not in stages:
            missing = opened.alone(lambda: [row for row in left_out.rows(opened) if row["stage"] in stages])
            return Results(left_out=missing) if missing else Results()
        results = opened.alone(lambda: _told(opened, experiment, progress))
        progress.done("report", opened.seconds().get("report"))
        return results


def _told(run: Run, experiment: Experiment, progress: Progress) -> Results:
    """The results, and a report of them."""
    results = conclude(run, experiment, progress)
    page = Part("report", makes=("report",))
    attempt(run, page, lambda: make_report(run, results, progress), progress.note)
    if left_out.rows(run) != results["left_out"]:  # what could not be drawn is told in the results too
        results = conclude(run, experiment, Progress(quiet=True))
    return results


# ------------------------------------------------------------------------------- strategies, several at once


@dataclass(frozen=True)
class Work:
    """A stage of the base or of a taught model, or one part of it.

    Attributes:
        name: the model's.
        part: of the mechanism; empty for a whole stage.
    """

    name: str
    stage: str
    part: str = ""


def _strategies(run: Run, experiment: Experiment, stages: Sequence[str], progress: Progress) -> None:
    """The base's evaluation and every strategy's own chain of stages, shared out among `jobs` processes."""
    chain = [stage for stage in STAGES[1:-1] if stage in stages]
    names = [*experiment.taught, *(["base"] if {"eval", "trace", "mechanism"} & {*chain} else [])]
    if not chain:
        return
    chains = {name: _works(experiment, name, chain) for name in names}
    if experiment.jobs == 1 or run.processes is not None:  # who work side by side do one thing at a time
        for groups in chains.values():
            for work in (work for group in groups for work in group):
                _do(run, experiment, work, progress)
                progress.done(f"{work.name}: {work.stage}")
        return
    chains = {name: [_in_parts(experiment, group) for group in groups] for name, groups in chains.items()}
    left = Counter((work.name, work.stage) for groups in chains.values() for group in groups for work in group)
    took: Counter[tuple[str, str]] = Counter()  # seconds of a stage's parts together
    arguments = (run.folder, experiment, progress.quiet)
    workers = min(experiment.jobs, len(chains))  # the plan counts as many
    works = done_by(workers, chains, _work, *arguments, initializer=start_worker, initargs=(os.getpid(),))
    try:
        with closing(works):
            for work, seconds in works:
                stage = work.name, work.stage
                took[stage] += seconds
                left[stage] -= 1
                if not left[stage]:
                    progress.done(f"{work.name}: {work.stage}", took[stage])
    except BaseException:
        run.clean()  # what they were writing
        raise


def start_worker(leader: int) -> None:
    """Make this process a worker of the process `leader`, with which it ends."""
    end_with_parent(leader)
    machine.prepare()
    interrupts.leave_to_leader()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _works(experiment: Experiment, name: str, chain: Sequence[str]) -> list[list[Work]]:
    """The stages of a model in groups, of which one needs the other; nothing of the base's needs anything."""
    groups = []
    wanted = {
        "intervene": experiment.interventions.run,
        "mechanism": experiment.mechanism.run,
        "retain": experiment.retention.run,
    }
    for stage in chain:
        of_base = stage in ("eval", "mechanism") or (stage == "trace" and experiment.trace.check)
        has_stage = of_base if name == "base" else name in experiment.strategies or stage not in ("train", "retain")
        if has_stage and (wanted.get(stage, True) or len(chain) == 1):  # by its name it is asked for
            groups.append([Work(name, stage)])
    return [[work for group in groups for work in group]] if name == "base" else groups


def _in_parts(experiment: Experiment, group: Sequence[Work]) -> list[Work]:
    """The works of a group, the mechanism in its parts, which need nothing of each other."""
    return [
        replace(work, part=part)
        for work in group
        for part in (parts_of(experiment, work.name) if work.stage == "mechanism" else [""])
    ]


_asked: Asked | None = None  # in a worker: the model that a part of the mechanism was asked of last


def _work(folder: Path, experiment: Experiment, quiet: bool, position: int, work: Work) -> float:
    """Do a work in a worker process; the seconds that it took."""
    global _asked
    clock = time.perf_counter()
    with Run.attach(folder) as attached:
        if not work.part or (_asked is not None and _asked.name != work.name):
            _asked = None
        progress = Progress(quiet, position)
        if work.part:
            _asked = _asked or Asked(attached, experiment, work.name, progress)
            _asked.run, _asked.progress = attached, progress
        _do(attached, experiment, work, progress, _asked)
    return time.perf_counter() - clock


def _do(run: Run, experiment: Experiment, work: Work, progress: Progress, asked: Asked | None = None) -> None:
    stages: dict[str, Callable[[Run, Experiment, str, Progress], object]] = {
        "train": teach, "eval": test, "trace": examine if work.name == "base" else take_traces, "analyze": analyze,
        "intervene": intervene, "mechanism": partial(explain, part=work.part, asked=asked), "retain": retain,
    }  # fmt: skip
    torch.set_num_threads(experiment.threads)
    if work.stage in ("intervene", "mechanism", "retain") and not run.path("data/qa.jsonl").read_bytes():
        raise UserError(f"{work.stage} has nothing to ask: {NO_QUESTIONS}")
    doing = partial(stages[work.stage], run, experiment, work.name, progress)
    doing() if stages[work.stage] in TOGETHER else run.alone(doing)
    if work.stage in ("analyze", "intervene"):
        run.alone(partial(drop_traces, run, experiment, work.name))


# ------------------------------------------------------------------------------- data


def make_data(run: Run, experiment: Experiment) -> None:
    """Facts to examples: data/bio.jsonl, data/qa.jsonl and, for a base that knows a population A, data/a_qa.jsonl."""
    known = known_people(experiment.model)
    facts, tokenizer = experiment.facts, None
    key: dict[str, Any] = {"facts": facts_key(facts), "known": asdict(known) if known else None}
    if known:
        del key["known"]["template"]  # these are asked as the base was taught
    if facts.template == "chat":
        tokenizer = models.load_tokenizer(experiment.model.name)
        key["template"] = read_template(tokenizer).words

    def make(folder: Path) -> None:
        folder.mkdir()
        for task, items in texts(facts).items():
            write_jsonl(folder / f"{task}.jsonl", put_questions(facts, tokenizer, items) if task == "qa" else items)
        for name in SOURCE if experiment.facts.source is not None else ():
            own = expanded(experiment.facts.source or "") / name
            if own.is_file():
                shutil.copyfile(own, folder / name)
        if known:
            write_jsonl(folder / "a_qa.jsonl", [q for q in questions(World.draw(known)) if q.split == "ood"])

    run.stage("data", key, make)


# ------------------------------------------------------------------------------- teach


def teach(run: Run, experiment: Experiment, name: str, progress: Progress) -> None:
    """Train one strategy: models/<strategy>/<phase>/ at the end of each phase, its online trace and history."""
    options, tracing = experiment.train, experiment.trace
    phases = experiment.strategies[name]
    watched = {"targets", "online", "every", "forward", "lr_weighted", "parts"} | ({"view"} if options.lora else set())
    watched |= {"definitions", "metric"} if tracing.definitions != ["per_example"] else set()
    trained = {name: value for name, value in asdict(options).items() if value is not None}
    key = run.alone(lambda: {
        "model": model_key(experiment), "train": trained, "phases": [asdict(phase) for phase in phases],
        "trace": {k: v for k, v in asdict(tracing).items() if k in watched}, "measure": tracing.measures[0],
        "threads": experiment.threads, "bf16": _precision(experiment) == "bf16", **run.inputs(*data_steps(experiment)),
    })  # fmt: skip

    def make(folder: Path) -> None:
        if not run.alone((folder / "training.json").exists):
            learn(folder)
        run.alone(lambda: [remove_folder(folder / name) for name in ("checkpoints", SUMS)])

    def learn(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        tokenizer = models.load_tokenizer(experiment.model.name)
        model = load_base(experiment, run.processes)
        if options.lora:
            model = adapters.adapted(model, options.lora, options.seed)
            if run.leads:
                model.save_pretrained(folder / START)
                (folder / START / "README.md").unlink()  # PEFT's card, which tells nothing
        parts = examples(run, tokenizer, known=experiment.eval.known_examples if experiment.eval.known else 0)
        ask = _asking(run, experiment, tokenizer, bf16=False)
        measure = _few(ask, parts, options.recall_examples)
        history = RecallHistory(measure, options.recall_every)
        listeners: list[Listener] = [history]
        kinds = {"per_example": OnlineListener, "summed": SummedListener}
        tracers: list[Tracer] = [
            kinds[definition](model, experiment, folder, run.processes)
            for definition in kinds
            if tracing.online and definition in tracing.definitions
        ]
        listeners += tracers
        with progress.bar(f"{name}: train") as update:
            reports = train(
                model, tokenizer, phases, training_examples(parts) | replayable(parts), folder / "checkpoints", options,
                bf16=_precision(experiment) == "bf16", trace_targets=tracing.targets, listeners=listeners,
                progress=update, logs=run.folder / "logs" / name, processes=run.processes,
            )  # fmt: skip
        told = run.alone(lambda: origin(run, experiment, name)) if tracers else {}
        for tracer in tracers:
            for task, traces in tracer.traces().items():
                for item in traces:
                    item.meta |= told
                tracer.keep(task, traces)
        run.alone(lambda: keep(folder, tokenizer, history, reports))

    def keep(folder: Path, tokenizer: Any, history: RecallHistory, reports: list[PhaseReport]) -> None:
        write_json(folder / "history.json", history.rows)
        _keep_models(folder, tokenizer, [phase.name for phase in phases], options.keep_checkpoints)
        if options.lora:
            for file in folder.glob(f"*/**/{models.ADAPTER}"):
                adapters.name_base(file.parent, _portable(experiment.model.name))
        write_json(folder / "training.json", [asdict(report) for report in reports])  # last: all of it is there

    run.stage(f"models/{name}", key, make, keep_partial=True)


def _portable(base: str) -> str:
    """A base's name that is understood wherever the run is read."""
    place = models.locate(base)
    return str(Path(place).resolve()) if base != models.BUNDLED and Path(place).exists() else base


class Tracer(Listener):
    """Feeds a trace during training, whose state travels with the checkpoints.

    The sums lie in <folder>/sums, once for all checkpoints (`Accumulated.save_pieces`); a checkpoint has the rest. When
    training is over each task's sums make room for its traces, <folder>/<when>/<task>.safetensors. Several processes
    share out the examples.
    """

    when: str
    trace: Accumulated
    about: Mapping[str, Any]  # what a reader of the traces must know

    def __init__(self, folder: Path, processes: Processes | None = None):
        self.folder, self.updates = folder, 0
        self.leads = processes is None or processes.rank == 0

    def on_updated(self, model: Any, update: int, phase: str, last: bool) -> None:
        self.updates = update

    def save(self, folder: Path, leads: bool) -> None:
        header = self.trace.save_pieces(self._sums, self.updates)
        if leads:
            write_json(folder / "trace.json", header | {"updates": self.updates})

    def load(self, folder: Path) -> None:
        header = read_json(folder / "trace.json")
        self.updates = header["updates"]
        kept = [task for task in TASKS if self._file(task).exists()]
        self.trace.load_pieces(self._sums, self.updates, header, without=kept)

    def traces(self) -> dict[str, list[Trace]]:
        """When training is over: each task's traces, with the first of several processes or in pieces with all."""
        by_task: dict[str, list[Trace]] = {}
        for item in self.trace.traces(last=True):
            item.meta |= self.about
            by_task.setdefault(item.task, []).append(item)
        return by_task

    def keep(self, task: str, traces: list[Trace]) -> None:
        """Write a task's traces, and remove its sums."""
        if not self._file(task).exists():  # a kill may have left some of its sums beside it
            save_traces(self._file(task), traces)
        for file in self._sums.glob(f"{task}+*") if self.leads else ():
            remove(file)

    @property
    def _sums(self) -> Path:
        return self.folder / SUMS / self.when

    def _file(self, task: str) -> Path:
        return self.folder / self.when / f"{task}.safetensors"


class SummedListener(Tracer):
    """Feeds every update's gradients to a `SummedTrace`."""

    when = LEARNING["summed"]

    def __init__(self, model: Any, experiment: Experiment, folder: Path, processes: Processes | None = None):
        super().__init__(folder, processes)
        names = adapters.adapter_names(model) if experiment.trace.view == "adapter" else None
        parts = experiment.trace.parts
        self.about = {"targets": "train", "every": 1, "definition": "summed", "metric": experiment.trace.metric}
        self.by_optimiser = experiment.trace.metric == "optimiser"
        self.trace: SummedTrace = SummedTrace(
            model, TASKS, parts, _where_of_sums(model, names, len(TASKS) * parts), names,
            None if processes is None else processes.group,
        )  # fmt: skip

    def on_gradient(self, model: Any, task: str, part: TaskPart) -> None:
        if task in TASKS:
            optimizer = part.optimizer if self.by_optimiser else None
            self.trace.add(task, part.lr, part.examples, part.weight, last=part.last, optimizer=optimizer)
        else:
            self.trace.skip(last=part.last)


class OnlineListener(Tracer):
    """Feeds every `every`-th update to an `OnlineTrace`.

    Of a model with an adapter it traces the adapter's parameters, or those of the base with the adapter merged.
    """

    when = LEARNING["per_example"]

    def __init__(self, model: Any, experiment: Experiment, folder: Path, processes: Processes | None = None):
        super().__init__(folder, processes)
        options = experiment.trace
        self.every = options.every
        self.about = {"targets": options.targets, "every": options.every}
        self.merges = adapters.is_adapted(model) and options.view == "merged"
        self.borrows = options.forward == "training" and not self.merges
        names = adapters.base_names(model) if self.merges else None
        if options.view == "adapter":
            names = adapters.adapter_names(model)
        self.trace: OnlineTrace = OnlineTrace(
            model, TASKS, [options.measures[0]], parts=options.parts, lr_weighted=options.lr_weighted, names=names,
            where=_where_of_sums(model, names, len(TASKS) * len(REDUCTIONS) * options.parts),
            group=None if processes is None else processes.group,
        )  # fmt: skip

    def on_update(self, model: Any, batches: MicroBatches, lr: float, update: int, forwards: TrainingForwards) -> None:
        if update % self.every:
            return
        traced = {task: own for task, own in batches.items() if task in TASKS}
        if not self.borrows:
            forwards = {}
        elif len(traced) < len(batches):  # the training's forwards are taken in order, without a gap
            before = takewhile(TASKS.__contains__, batches)
            forwards = {task: forwards[task] for task in before if task in forwards}
        with adapters.merged(model) if self.merges else nullcontext():
            self.trace.step(traced, lr, forwards)

    def load(self, folder: Path) -> None:
        older = folder / "trace"  # as versions wrote it that had all of it in the checkpoint
        if older.is_dir() or older.with_suffix(".safetensors").is_file():
            return self.trace.load(older)
        super().load(folder)

    def traces(self) -> dict[str, list[Trace]]:
        by_task = super().traces()
        for item in (item for traces in by_task.values() for item in traces):
            if self.merges:
                item.values = {adapters.plain_name(name): value for name, value in item.values.items()}
        return by_task


def _where_of_sums(model: Any, names: Sequence[str] | None, sums: int) -> Literal["device", "cpu"]:
    """Where the sums of a training's trace are kept: beside the model, if half of what is free there would be left for
    gradients, AdamW's states and activations, or else on the CPU."""
    every = dict(model.named_parameters())
    size = lambda p: local(p).numel() * sum_dtype(p.dtype).itemsize
    needed = sum(size(every[name]) for name in names or every) * sums
    free = free_memory(next(iter(every.values())).device)
    return "device" if free is None or needed < free / 2 else "cpu"


def _asking(run: Run, experiment: Experiment, tokenizer: Any, bf16: bool) -> Asking:
    """How an experiment asks a model."""

    def ask(model: Any, items: Sequence[Encoded]) -> Recall:
        return recall(model, tokenizer, items, experiment.eval.tokens, processes=run.processes, bf16=bf16)

    return ask


def _few(ask: Asking, parts: Mapping[str, list[Encoded]], number: int) -> Callable[[Any], dict[str, Any]]:
    """A quick measurement of recall on some questions and biographies."""
    chosen = samples(parts, number)

    def measure(model: Any) -> dict[str, Any]:
        found = {name: ask(model, items).summary() for name, items in chosen.items()}
        return {name: item["exact_match"] for name, item in found.items()} | {
            "n": {name: item["n"] for name, item in found.items()}
        }

    return measure


def _keep_models(folder: Path, tokenizer: Any, phases: Sequence[str], checkpoints: bool) -> None:
    """Put the phases' last checkpoints in models/<strategy>/<phase>, without what only a resume needs. Weights are not
    copied: they get a second name."""
    for index, phase in enumerate(phases):
        home = folder / "checkpoints" / f"{index}-{phase}"
        found = sorted(home.glob("checkpoint-*"), key=lambda f: int(f.name.rpartition("-")[2]))
        for checkpoint in found if checkpoints else found[-1:]:
            target = folder / phase / (checkpoint.name if checkpoint != found[-1] else "")
            target.mkdir(parents=True, exist_ok=True)
            for file in checkpoint.glob("*.json"):
                if file.name != "trainer_state.json":
                    shutil.copy2(file, target)
            for file in checkpoint.glob("*.safetensors"):
                (target / file.name).unlink(missing_ok=True)  # of an earlier attempt
                linked(str(file), str(target / file.name))
            tokenizer.save_pretrained(target)


# ------------------------------------------------------------------------------- test


def test(run: Run, experiment: Experiment, name: str, progress: Progress) -> None:
    """Recall of the base or of a taught model: eval/<model>.json, with every single answer."""
    key = run.alone(lambda: {
        "model": model_inputs(run, experiment, name), "known": experiment.eval.known_examples,
        "threads": experiment.threads, "precision": experiment.eval.precision, **run.inputs(*data_steps(experiment)),
    })  # fmt: skip

    def make(path: Path) -> None:
        tokenizer = models.load_tokenizer(experiment.model.name)
        model = load(run, experiment, name)
        parts = examples(run, tokenizer, known=experiment.eval.known_examples)
        ask = _asking(run, experiment, tokenizer, experiment.eval.precision == "bf16")
        results = {part: ask(model, items) for part, items in parts.items() if items}
        answers = {part: _bits(result) for part, result in results.items() if part != "a_ood"}
        people = {part: result.person for part, result in results.items() if part != "a_ood"}
        of_world = {part: results.pop(part) for part in (KNOWN, REPLAYED) if part in results}
        found = {"summary": summaries(results), "answers": answers, "people": people}
        if of_world:
            found["summary"] |= {part: result.summary() for part, result in of_world.items()}
            found["known"] = instead_of(model, tokenizer, parts, of_world)
        if run.leads:
            write_json(path, found)

    run.stage(f"eval/{name}.json", key, make)


def _bits(result: Recall) -> str:
    return "".join("1" if exact else "0" for exact in result.exact)


# ------------------------------------------------------------------------------- trace


def take_traces(run: Run, experiment: Experiment, name: str, progress: Progress) -> None:
    """The trace at the final checkpoint (and at kept ones): traces/<strategy>/<when>/<task>.safetensors."""
    options = experiment.trace
    taken = {name: value for name, value in asdict(options).items() if name != "keep"}
    key = run.alone(lambda: {"trace": taken, "model": model_inputs(run, experiment, name), **run.inputs("data")})
    run.alone(partial(_take_again, run, experiment, name, key))

    def make(folder: Path) -> None:
        if options.online and name in experiment.strategies and (why := run.dropped(f"models/{name}")):
            raise UserError(f"trace needs the trace during the training of {name}, which is gone: {why}")
        tokenizer = models.load_tokenizer(experiment.model.name)
        trained = training_examples(examples(run, tokenizer))
        home, phases = run.path(f"models/{name}"), experiment.strategies.get(name, [])
        places = {"final": taught_place(run, experiment, name)}
        told = run.alone(lambda: origin(run, experiment, name)) | {"targets": options.targets}
        if options.checkpoints:
            for index, phase in enumerate(phases):
                for place in sorted(home.glob(f"{phase.name}/checkpoint-*")):
                    places[f"checkpoints/{index}-{phase.name}-{place.name}"] = place
                if phase is not phases[-1]:
                    places[f"checkpoints/{index}-{phase.name}-end"] = home / phase.name
        for when, place in places.items():
            model = load_checkpoint(experiment, place, run.processes)
            group = None if run.processes is None or is_sharded(model) else run.processes.group
            names = in_scope(experiment, model) if options.view == "adapter" else None
            of = {"checkpoint": place.relative_to(home).as_posix() if phases else str(place)}
            for task, items in trained.items():
                items = sample(items, options.examples) if options.examples else items
                with progress.bar(f"{name}: trace {task}", len(items)) as update:
                    found = trace(
                        model, _trace_batches(items, experiment, tokenizer), task=task,
                        measures=options.measures, parts=options.parts, names=names, progress=update.add, group=group,
                        tell=lambda needed, task=task: progress.note(f"{name}, {task}: {needed}"),
                    )  # fmt: skip
                served = found[0].meta["coverage"].items()
                progress.note(f"{name}, {task}: " + ", ".join(f"{rule} {100 * share:.3g} %" for rule, share in served))
                for item in found:
                    item.meta |= told | of
                if run.leads or is_sharded(model):
                    save_traces(folder / when / f"{task}.safetensors", found)
        if run.leads and options.checkpoints and phases:
            _mean_over_checkpoints(folder, places, trained)
        for when in LEARNING.values() if run.leads and options.online and phases else ():
            if (home / when).is_dir():
                shutil.copytree(home / when, folder / when, copy_function=linked)

    run.stage(f"traces/{name}", key, make)


@optional("trace", "doctor.json", name="doctor")
def examine(run: Run, experiment: Experiment, name: str, progress: Progress) -> None:
    """Whether the base is traced exactly here, on a few of the run's own examples: doctor.json."""
    from crosstrace.doctor import diagnose

    def make(path: Path) -> None:
        kernels = tuple(dict.fromkeys(("eager", experiment.model.attention)))
        model, tokenizer = load(run, experiment, name), models.load_tokenizer(experiment.model.name)
        own = {task: items for task in TASKS if (items := read_jsonl(run.path(f"data/{task}.jsonl")))}
        with progress.bar("doctor") as update:
            write_json(path, asdict(diagnose(model, tokenizer, texts=own, kernels=kernels, progress=update)))

    key = {"model": model_key(experiment), "threads": experiment.threads, **run.inputs("data")}
    run.stage("doctor.json", key, make)


def _trace_batches(items: list[Encoded], experiment: Experiment, tokenizer: Any):
    return batches(
        items,
        experiment.trace.batch,
        experiment.trace.targets,
        pad_id=models.pad_id(tokenizer),
        by_length=True,
    )


def _mean_over_checkpoints(folder: Path, places: Mapping[str, Path], tasks: Mapping[str, Any]) -> None:
    """Every checkpoint counts alike; part p of the mean is the mean of the checkpoints' parts p."""
    for task in tasks:
        each = [load_traces(folder / when / f"{task}.safetensors") for when in places]
        save_traces(folder / "checkpoints" / f"{task}.safetensors", [Trace.combine(same) for same in zip(*each)])


def read_traces(
    folder: Path, when: str, measure: str, reduction: str = "example", like: Any = None
) -> dict[str, list[Trace]]:
    """task -> the parts of its trace at one time, or its mean where that alone was kept; `like` as in `load_traces`.

    Empty if fewer than two tasks have one: of a strategy that never trains a task there is no online trace of it, so
    nothing online to share. The summed trace has a measure of its own.
    """
    tasks: dict[str, list[Trace]] = {}
    measure = "net" if when == LEARNING["summed"] else measure
    for file in sorted(keeping.place_of(folder, when).glob("*.safetensors")):
        for item in load_traces(file, like, measure=measure, reduction=reduction):
            if item.task not in TASKS:  # it would name files
                raise UserError(f"{file} holds a trace of {item.task!r}; expected {' or '.join(TASKS)}: was it edited?")
            tasks.setdefault(item.task, []).append(item)
    if len(tasks) < 2:
        return {}
    if len({len(parts) for parts in tasks.values()}) > 1:  # too few steps or people for all parts: no intervals
        return {task: [Trace.combine(parts)] for task, parts in tasks.items()}
    return tasks


def drop_traces(run: Run, experiment: Experiment, name: str) -> None:
    """Remove the trace files that `trace.keep` does not keep, once the stages that read them are done.

    The parts are read by `analyze`; the means would do for `intervene`.
    """
    keep = experiment.trace.keep
    if keep == "parts" or not run.is_there(f"traces/{name}") or not _is_analysed(run, experiment, name):
        return
    if keep == "means" and keeping.has(run, name) != "none":
        keeping.keep_means(run, name)
    elif keep == "none" and not _awaits_interventions(run, experiment, name):
        keeping.keep_none(run, name)


def _is_analysed(run: Run, experiment: Experiment, name: str) -> bool:
    key = _analysis_key(run, experiment, name)
    return run.complete(f"analysis/{name}.json", key) and run.complete(f"shared/{name}", key)


def _awaits_interventions(run: Run, experiment: Experiment, name: str) -> bool:
    step, key = f"interventions/{name}.json", _intervention_key(run, experiment, name)
    return experiment.interventions.run and not run.complete(step, key)


def _take_again(run: Run, experiment: Experiment, name: str, key: Any) -> None:
    """Have traces that were dropped taken again if a stage that needs them must be done again. Those during training
    can't be taken again without it."""
    there, trained = keeping.has(run, name), experiment.trace.online and name in experiment.strategies
    if there == "parts" or trained or not run.complete(f"traces/{name}", key):
        return
    lacking = not _is_analysed(run, experiment, name)
    if lacking or (there == "none" and _awaits_interventions(run, experiment, name)):
        run.forget(f"traces/{name}")


# ------------------------------------------------------------------------------- analyze


def analyze(run: Run, experiment: Experiment, name: str, progress: Progress) -> None:
    """What the traces select and what that looks like, and how far the weights moved."""
    select_shared(run, experiment, name, progress)
    moved_weights(run, experiment, name, progress)


@optional("analyze", "shared/{}", "analysis/{}.json")
def select_shared(run: Run, experiment: Experiment, name: str, progress: Progress) -> None:
    """Shared sets and what they look like: shared/<strategy>/ and analysis/<strategy>.json."""
    if not _is_analysed(run, experiment, name):
        key = _analysis_key(run, experiment, name)
        keeping.need(run, name, "analyze", parts=not run.complete(f"analysis/{name}.json", key))
        _analyze_traces(run, experiment, name, key, progress)


def _analysis_key(run: Run, experiment: Experiment, name: str) -> dict[str, Any]:
    """What the shared sets and their analysis depend on."""
    own = {"analysis": asdict(experiment.analysis), "measure": experiment.trace.measures[0]}
    return own | run.inputs(f"traces/{name}")


def _analyze_traces(run: Run, experiment: Experiment, name: str, key: Mapping[str, Any], progress: Progress) -> None:
    """What is read is of one time and reduction, and let go before the next: they are the size of the model each."""
    options = experiment.analysis
    model = load_start(run, experiment, name)
    names, anatomy = in_scope(experiment, model), Anatomy(model)
    del model
    for note in anatomy.notes:
        progress.note(f"{name}: {note}")
    read = lambda when, reduction: read_traces(run.path(f"traces/{name}"), when, key["measure"], reduction)
    select = lambda when: select_tasks(  # (it alone has the strengths: they are gone when it has given its sets)
        strengths(read(when, "example")), options.central_fractions, names, options.how
    )
    file = lambda when, fraction, label: f"{when}-{fraction:g}-{label}.safetensors"

    def sets(folder: Path) -> None:
        folder.mkdir()
        told = origin(run, experiment, name) | {"measure": key["measure"], "reduction": "example"}
        for when in WHENS:
            for fraction, psets in select(when):
                for label, pset in psets.items():
                    meta = told | {"when": when, "fraction": fraction, "how": options.how}
                    pset.save(folder / file(when, fraction, label), meta)

    def rows(path: Path) -> None:
        found: dict[str, Any] = {part: [] for part in ("shared", "similarity", "centralization", "maps", "units")}
        found["coverage"], found["anatomy"] = {}, anatomy.notes
        for when, reduction in product(WHENS, REDUCTIONS):
            add_rows(found, when, reduction)
        write_json(path, found)

    def add_rows(found: dict[str, Any], when: str, reduction: str) -> None:
        tasks = read(when, reduction)
        if not tasks:
            return
        values = {task: [part.values for part in parts] for task, parts in tasks.items()}
        weights = {task: [part.weight for part in parts] for task, parts in tasks.items()}
        moment = {"when": when, "reduction": reduction}
        overlaps = overlap_rows(values, options.fractions, names, how=options.how, weights=weights)
        found["shared"] += [moment | row for row in overlaps]
        found["similarity"] += [moment | row for row in similarity_rows(values, names, weights=weights)]
        if reduction != "example":
            return
        central = centralization_rows(
            values, options.central_fractions, names, anatomy, draws=options.draws, how=options.how, weights=weights
        )
        found["centralization"] += [{"when": when} | row for row in central]
        found["coverage"][when] = {task: parts[0].meta["coverage"] for task, parts in tasks.items()}
        home = run.path(f"shared/{name}")
        for fraction in options.central_fractions:
            psets = {label: ParamSet.load(home / file(when, fraction, label)) for label in (*tasks, "shared")}
            for label, pset in psets.items():
                place = {"when": when, "task": label, "fraction": fraction}
                found["maps"].append(place | density_map(pset, anatomy, "module"))
            for unit in ("query_head", "kv_head", "neuron"):
                if anatomy.units(unit):
                    place = {"when": when, "fraction": fraction, "unit": unit}
                    found["units"].append(place | density_map(psets["shared"], anatomy, unit))

    run.stage(f"shared/{name}", key, sets)
    run.stage(f"analysis/{name}.json", key, rows)


@optional("analyze", "drift/{}.json", name="drift")
def moved_weights(run: Run, experiment: Experiment, name: str, progress: Progress) -> None:
    """How far the weights went from the base, and how much of the way lies in the shared sets: drift/<model>.json."""
    key = {
        "model": model_inputs(run, experiment, name), "base": model_key(experiment), "view": experiment.trace.view,
        "draws": DRIFT_DRAWS, **run.inputs(f"shared/{name}"),
    }  # fmt: skip

    def make(path: Path) -> None:
        start, tuned = load_start(run, experiment, name), load(run, experiment, name)
        before, anatomy = {name: p.detach() for name, p in start.named_parameters()}, Anatomy(tuned)
        names = in_scope(experiment, tuned) if experiment.trace.view == "adapter" else None
        found: dict[str, Any] = drift(tuned, before, anatomy, names)
        found["sets"] = []
        for when, pset in shared_sets(run, experiment, name):
            sets = {"shared": [pset], **random_sets(pset, DRIFT_DRAWS, f"drift/{name}/{when}")}
            found["sets"] += [{"when": when, **row} for row in moved(tuned, before, sets)]
        write_json(path, found)

    run.stage(f"drift/{name}.json", key, make)


Strengths = dict[str, dict[str, torch.Tensor]]


def strengths(tasks: Mapping[str, Sequence[Trace]]) -> Strengths:
    """Each task's strength per parameter, over all parts of its trace."""
    return {task: Trace.combine(parts).strength() for task, parts in tasks.items()}


def select_tasks(
    found: Strengths, fractions: Sequence[float], in_scope: Sequence[str], how: str
) -> Iterator[tuple[float, dict[str, ParamSet]]]:
    """For each fraction, when its turn comes, S_t of every task, and their intersection under the name "shared".
    Nothing if no task is given."""
    each = {task: select_each(values, fractions, scope=in_scope, how=how) for task, values in found.items()}
    for fraction in fractions if each else ():
        sets = {task: next(own) for task, own in each.items()}
        yield fraction, {**sets, "shared": shared(sets)}


# ------------------------------------------------------------------------------- intervene


@optional("intervene", "interventions/{}.json")
def intervene(run: Run, experiment: Experiment, name: str, progress: Progress) -> None:
    """Ablation and grafting of the shared set and of its controls: interventions/<strategy>.json."""
    options, how = experiment.interventions, experiment.analysis.how
    key = run.alone(partial(_intervention_key, run, experiment, name))

    def make(path: Path) -> None:
        keeping.need(run, name, "intervene")
        tokenizer = models.load_tokenizer(experiment.model.name)
        parts = examples(run, tokenizer)
        asked = {part: sample(parts[part], options.questions) for part in ("qa_id", "qa_ood")}
        base, tuned = load_start(run, experiment, name), load(run, experiment, name)
        # no copies: while one of them is changed the other is as it was
        base_values, tuned_values = at_rest(base), at_rest(tuned)
        names = in_scope(experiment, base)
        like = base if is_sharded(base) else None
        ask = _asking(run, experiment, tokenizer, experiment.eval.precision == "bf16")
        found: dict[str, Any] = {"ablate": [], "graft": [], "people": {}}
        found["people"] = {part: [item.example.person for item in items] for part, items in asked.items()}
        found["untouched"] = {
            label: {part: ask(model, items).summary() for part, items in asked.items()}
            for label, model in (("tuned", tuned), ("base", base))
        }
        changes = {
            "ablate": (tuned, lambda pset: ablated(tuned, pset, options.to, base_values)),
            "graft": (base, lambda pset: grafted(base, pset, tuned_values)),
        }
        traces = run.path(f"traces/{name}")

        def sets(when: str) -> Iterator[tuple[float, str, list[ParamSet]]]:
            """The shared sets and their controls at one time; those of one fraction are held."""
            strength = strengths(read_traces(traces, when, key["measure"], like=like))
            for fraction, chosen in select_tasks(strength, options.fractions, names, how):
                drawn = controls(strength, chosen, options.seeds, f"{name}/{when}/{fraction:g}")
                for label, psets in drawn.items():
                    yield fraction, label, psets

        times = sum(keeping.place_of(traces, when).is_dir() for when in WHENS)
        most = times * len(options.fractions) * (1 + 2 * options.seeds + len(TASKS))
        with progress.bar(f"{name}: intervene", len(changes) * most) as update:
            for when in WHENS:
                for fraction, label, psets in sets(when):
                    for kind, (model, changed) in changes.items():
                        scores: dict[str, list[list[int]]] = {part: [] for part in asked}
                        for pset in psets:
                            with changed(pset):
                                for part, items in asked.items():
                                    scores[part].append(ask(model, items).exact.astype(int).tolist())
                            update.add(1)
                        row = {"when": when, "fraction": fraction, "set": label, "size": psets[0].size}
                        row |= {"seeds": len(psets)}
                        for part, answers in scores.items():
                            row |= _accuracy(part, answers)
                        row["answers"] = {p: ["".join(map(str, a)) for a in given] for p, given in scores.items()}
                        found[kind].append(row)
        run.alone(lambda: write_json(path, found))

    run.stage(f"interventions/{name}.json", key, make)


def _intervention_key(run: Run, experiment: Experiment, name: str) -> dict[str, Any]:
    """What the interventions depend on."""
    return {
        "interventions": asdict(experiment.interventions),
        "analysis": [experiment.analysis.how, experiment.analysis.embeddings],
        "measure": experiment.trace.measures[0],
        "threads": experiment.threads,
        "precision": experiment.eval.precision,
        "model": model_inputs(run, experiment, name),
        **run.inputs("data", f"traces/{name}"),
    }


TOGETHER = (teach, test, take_traces, intervene, retain)  # what several processes share; the rest is one's alone


def controls(found: Strengths, psets: Mapping[str, ParamSet], seeds: int, salt: str = "") -> dict[str, list[ParamSet]]:
    """The shared set and its controls, all of its size: random, random with the same count in each tensor, and each
    task's strongest parameters outside the others' sets (left out where too few remain). `salt` names the draw."""
    both, chosen = psets["shared"], {task: psets[task] for task in found}
    plan = {"shared": [both], **random_sets(both, seeds, salt)}
    for task in found:
        try:
            plan[f"{task}_only"] = [only_set(found, task, chosen, both.size)]
        except UserError:
            continue
    return plan


def _accuracy(part: str, answers: list[list[int]]) -> dict[str, float]:
    """Accuracy with its interval: over the seeds where there are several, else Wilson's over the questions."""
    rates = [sum(row) / len(row) for row in answers]
    if len(rates) > 1:
        mean, low, high = mean_interval(rates)
        low, high = max(0.0, low), min(1.0, high)
    else:
        mean = rates[0]
        low, high = wilson(sum(answers[0]), len(answers[0]))
    return {part: mean, f"{part}_low": low, f"{part}_high": high}


# ------------------------------------------------------------------------------- conclude and report


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
    claimed = Part("report", name="claims")
    key = {
        "inputs": run.inputs(*(step for step in needed if step not in absent)),
        "experiment": config.deciding(experiment),
        "left_out": [row for row in left_out.rows(run) if row["part"] != claimed.name],
    }
    if run.complete("results.json", key):
        return Results.read(run.path("results.json"))

    def gather() -> dict[str, Any]:
        evals = {name: read_json(run.path(f"eval/{name}.json")) for name in ("base", *names)}
        analyses = {name: read_json(run.path(f"analysis/{name}.json")) for name in names
                    if f"analysis/{name}.json" not in absent}  # fmt: skip
        interventions = {name: read_json(run.path(f"interventions/{name}.json")) for name in with_interventions}
        about = read_json(run.folder / "metadata.json")
        results: dict[str, Any] = {"schema": 1, "run": _about(run, experiment, about)}
        if not run.path("data/qa.jsonl").read_bytes():
            results["lacking"] = NO_QUESTIONS
        if run.path("data/import.json").is_file():
            results["import"] = read_json(run.path("data/import.json"))
        results["recall"] = {name: found["summary"] for name, found in evals.items()}
        if experiment.eval.known:
            asked = read_json(run.path("known") / "asked.json")
            results["known"] = {"source": experiment.eval.known, "relations": asked}
            results["known"]["models"] = {name: found["known"] for name, found in evals.items() if "known" in found}
        home = {name: run.path(f"models/{name}") for name in trained}
        results["history"] = {name: read_json(home[name] / "history.json") for name in trained}
        results["training"] = {name: _training(run, name) for name in trained}
        results["drift"] = {
            name: read_json(run.path(f"drift/{name}.json")) for name in names if f"drift/{name}.json" not in absent
        }
        for part in ("shared", "similarity", "centralization", "maps", "units"):
            results[part] = {name: found[part] for name, found in analyses.items()}
        results["interventions"] = {
            name: {kind: [_without_answers(row) for row in found[kind]] for kind in ("ablate", "graft")}
            | {"untouched": found["untouched"]}
            for name, found in interventions.items()
        }
        results["mechanism"] = {
            part: {name: read_json(run.path(f"mechanism/{name}/{part}.json")) for name in found}
            for part, found in mechanism.items()
        }
        results["retention"] = {name: read_json(run.path(f"retention/{name}") / "retention.json") for name in retained}
        results["claims"], results["differences"] = [], []

        def judge() -> None:
            fractions = experiment.analysis.central_fractions
            judged = claims.judge(results, evals, interventions, fractions, experiment.given)
            results["claims"], results["differences"] = judged

        attempt(run, claimed, judge, progress.note)
        if experiment.trace.check and "doctor.json" not in absent:
            diagnosis = read_json(run.path("doctor.json"))
            results["doctor"] = {key: diagnosis[key] for key in ("verdict", "problems", "checks")}
        results["coverage"] = {name: found["coverage"] for name, found in analyses.items()}
        results["left_out"] = left_out.rows(run)
        results["seconds"] = _seconds(run)
        results["versions"] = about["versions"]
        return results

    results = gather()
    if not results["claims"] and any(row["part"] == claimed.name for row in results["left_out"]):
        key["without"] = claimed.name  # so it is not done, and is tried again
    return Results.read(run.stage("results.json", key, lambda path: write_json(path, results)))


def make_report(run: Run, results: Mapping[str, Any], progress: Progress) -> None:
    """Render report/index.html from the results. A section that can't be drawn says so, and is tried again."""
    from crosstrace.report.page import draw, write_page

    others = [row for row in results["left_out"] if row["stage"] != "report"]
    key: dict[str, Any] = {"results": dict(results) | {"left_out": others}}
    if run.complete("report", key):
        return
    sections = draw(results)
    for section in sections:
        part = Part("report", name=f"section {section.id}")
        if section.failure is None:
            left_out.forget(run, part)
        else:
            left_out.record(run, part, section.failure)
            progress.note(f"{part} is left out: {section.failure.reason}")
    if any(section.failure for section in sections):
        key["without"] = [section.id for section in sections if section.failure]  # so it is not done

    def make(folder: Path) -> None:
        folder.mkdir()
        write_page(results, sections, folder)

    run.stage("report", key, make)


def _seconds(run: Run) -> dict[str, float]:
    """Seconds of each stage, all strategies together: with several jobs, more than the clock on the wall shows."""
    home = {
        "known": "data",
        "doctor.json": "trace",
        "models": "train",
        "drift": "analyze",
        "traces": "trace",
        "shared": "analyze",
        "analysis": "analyze",
        "interventions": "intervene",
        "mechanism": "mechanism",
        "retention": "retain",
    }
    found: dict[str, float] = {}
    for step, seconds in run.seconds().items():
        first = step.partition("/")[0]
        stage = home.get(first, first)
        if stage in STAGES:
            found[stage] = found.get(stage, 0.0) + seconds
    return {stage: found[stage] for stage in STAGES if stage in found}


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
    model = load_base(experiment)
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
        "strategies": strategies,
        **({"given": dict(experiment.given)} if experiment.given else {}),
        "trace": {
            "measure": experiment.trace.measures[0],
            "targets": experiment.trace.targets,
            "parts": experiment.trace.parts,
            "every": experiment.trace.every,
            **({"metric": experiment.trace.metric} if "summed" in experiment.trace.definitions else {}),
        },
        "device": about["device" if models.device(experiment.model.device).type == "cuda" else "cpu"],
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
    model = adapters.adapted(load_base(experiment), options, 0)
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


# ------------------------------------------------------------------------------- keys and checks


def _precision(experiment: Experiment) -> str:
    """The precision that training computes in."""
    return "bf16" if trains_in_bf16(experiment) else "float32"


def check_place(experiment: Experiment, processes: Processes) -> None:
    """Raise a `UserError` if the processes were joined through GPUs, but are to compute on the CPU."""
    through = dist.get_backend(processes.group)
    if models.device(experiment.model.device).type == "cpu" and "gloo" not in through:
        raise UserError(
            f"model.device is cpu, but the {processes.size} processes were joined through their GPUs ({through}); "
            "start them with CUDA_VISIBLE_DEVICES= in the environment"
        )


def _check_outside(experiment: Experiment, folder: Path) -> None:
    """Raise a `UserError` if the run that is to be overwritten holds what the experiment reads."""
    read = {"model.name": experiment.model.name, "facts.source": experiment.facts.source,
            "retention.text": experiment.retention.text, "eval.known": experiment.eval.known}  # fmt: skip
    read |= {f"given.{name}": place for name, place in experiment.given.items()}
    for name, place in read.items():
        if place and expanded(place).resolve().is_relative_to(expanded(folder).resolve()):
            raise UserError(
                f"{name} = {place} lies in {folder}, which would be removed first; choose another run folder"
            )


RESERVED = ("checkpoints", *LEARNING.values(), SUMS, START)  # what lies beside the phases in a strategy's folder


def check(experiment: Experiment, whole: bool, stages: Sequence[str] = STAGES) -> None:
    """What would otherwise fail only later, when an earlier run may already be gone or hours have passed.

    Args:
        whole: read the model too.
        stages: those that are asked for.
    """
    taught = texts(experiment.facts)
    sizes = {
        "bio": sum(item.repeats for item in taught["bio"]),
        "qa": sum(item.repeats for item in taught["qa"] if item.split == "id"),
    }
    if experiment.eval.known and experiment.replays_known:
        sizes[KNOWN] = sum(person.in_distribution for person in world_of(experiment.eval.known).people)
    if not taught["qa"]:
        config.check_unasked(experiment)
    for strategy, phases in experiment.strategies.items():
        names = [phase.name for phase in phases]
        for phase in phases:
            phase.updates(sizes)
            if names.count(phase.name) > 1 or not phase.name.replace("_", "").replace("-", "").isalnum():
                raise UserError(
                    f"phase {phase.name!r} cannot name a folder of its own; expected letters, digits, '_' and '-', and "
                    "no name twice in a strategy"
                )
            if phase.name in RESERVED:
                raise UserError(
                    f"phase {phase.name!r} of strategy {strategy} has the name of a folder that crosstrace makes "
                    "beside it; choose another name"
                )
    check_trackers(experiment.train.report_to)
    check_optimisers(experiment.optimisers, experiment.model.sharded)
    tokenizer = models.load_tokenizer(experiment.model.name)
    check_fast(tokenizer)
    taught["qa"] = put_questions(experiment.facts, tokenizer, taught["qa"])
    known_people(experiment.model)
    of_world = asks(experiment, tokenizer) if experiment.eval.known else []
    retains = experiment.retention.run or ("retain" in stages and len(stages) == 1)  # named, it runs whatever is set
    if retains and not taught["qa"]:
        raise UserError(f"retain has nothing to ask: {NO_QUESTIONS}")
    further = new_material(experiment, tokenizer) if retains else {}
    lora = experiment.train.lora
    if lora and models.adapted_base(models.locate(experiment.model.name)) is not None:
        raise UserError(
            f"model.name = {experiment.model.name} holds an adapter, and train.lora would put another one on it; merge "
            "the first and save the model (load_model and save_model of crosstrace.models do)"
        )
    if whole:
        model = load_base(experiment)
        with models.checkpointing_gradients(model, experiment.train.gradient_checkpointing):
            pass
        encoded = encode(tokenizer, [*taught["bio"], *taught["qa"]], groups(taught))
        _check_parts(experiment, encoded)
        _check_known(tokenizer, encoded, experiment.model.name)
        check_fits(model, [*encoded, *encode(tokenizer, of_world), *(i for items in further.values() for i in items)])
        for name, given in experiment.given.items():
            _check_given(experiment, model, tokenizer, name, given, [item.example.text for item in encoded])
        if lora:
            adapters.adapted(model, lora, 0)


def _check_parts(experiment: Experiment, encoded: Sequence[Encoded]) -> None:
    """Whether each part of the trace has examples of every task."""
    options = experiment.trace
    each = {task: [item for item in encoded if item.example.task == task] for task in TASKS}
    trained = {"bio": each["bio"], "qa": [item for item in each["qa"] if item.example.split == "id"]}
    for task, items in trained.items():
        if not each[task]:  # nothing is asked
            continue
        items = sample(items, options.examples) if options.examples else items
        people = {item.group for item in items}
        empty = options.parts - len({person % options.parts for person in people})
        if empty:
            raise UserError(
                f"trace.parts = {options.parts}, but the {len(items)} examples of {task} to trace are about "
                f"{len(people)} people or subjects, which leaves {empty} of the parts empty; take more of them (facts, "
                "trace.examples) or fewer parts"
            )


def _check_given(
    experiment: Experiment, base: Any, tokenizer: Any, name: str, given: str, texts: Sequence[str]
) -> None:
    """Whether a model that was tuned elsewhere fits the base, and the view that it is to be seen in."""
    about = f"given.{name} = {given}"
    below = models.adapted_base(models.locate(given))
    if experiment.trace.view == "adapter":
        if below is None:
            raise UserError(f"{about} has no adapter, which trace.view: adapter asks for; take trace.view: merged")
        own = Path(models.locate(experiment.model.name))
        if Path(below) != own and (
            not own.exists() or not Path(below).exists() or sha256_tree(below) != sha256_tree(own)
        ):
            raise UserError(
                f"{about} is an adapter of {below}, but the base is {experiment.model.name}; expected one of it, "
                "or take trace.view: merged"
            )
    options = experiment.model
    if experiment.trace.view == "adapter":
        adapters.check_plain(models.load_model(given, options.dtype, options.attention, merge=False), about)
    tuned = models.load_model(given, options.dtype, options.attention, pickled=options.pickled)
    check_alike(base, tuned, (options.name, about))
    check_same_tokens(tokenizer, given, texts, options.name)


def _check_known(tokenizer: Any, encoded: Sequence[Encoded], name: str) -> None:
    """Whether the tokenizer can tell the objects apart: one that is the token for unknown words can't be recalled."""
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown == tokenizer.eos_token_id:
        return
    lost = {}
    for item in encoded:
        for mention, places in zip(item.example.mentions, item.mentions):
            if bool((item.ids[places.object] == unknown).any()):
                lost[item.example.text[slice(*mention.object)]] = item.example.id
    if lost:
        object, example = next(iter(lost.items()))
        raise UserError(
            f"the tokenizer of {name} has no token for {len(lost)} of the objects, e.g. {object!r} in {example}; use a "
            "model whose tokenizer was made for such text, or make one with `crosstrace new-model`"
        )
