"""Traces during a strategy's training: they listen to the trainer, and its checkpoints hold their state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

from crosstrace.core.files import read_json, remove, write_json
from crosstrace.core.pieces import local
from crosstrace.core.processes import Processes
from crosstrace.experiment.config import Experiment
from crosstrace.experiment.studied import LEARNING
from crosstrace.models import adapters
from crosstrace.models.forward import TrainingForwards
from crosstrace.trace import OnlineTrace, SummedTrace, Trace, save_traces
from crosstrace.trace.accumulated import Accumulated
from crosstrace.trace.blocks import sum_dtype
from crosstrace.trace.means import REDUCTIONS
from crosstrace.trace.memory import free_memory
from crosstrace.training.listeners import Listener, TaskPart
from crosstrace.training.updates import MicroBatches

SUMS = "sums"  # the folder of the trace during training, until it is over


class Tracer(Listener):
    """Feeds a trace during training.

    The sums lie in <folder>/sums, once for all checkpoints (`Accumulated.save_pieces`). Each checkpoint has the rest of
    the state. After training each task's traces are written to <folder>/<when>/<task>.safetensors, and its sums are
    removed. Several processes share out the examples.
    """

    when: str
    trace: Accumulated
    meta: Mapping[str, Any]  # metadata that every trace file gets

    def __init__(self, tasks: Sequence[str], folder: Path, processes: Processes | None = None):
        self.tasks, self.folder, self.updates = tasks, folder, 0
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
        kept = [task for task in self.tasks if self._file(task).exists()]
        self.trace.load_pieces(self._sums, self.updates, header, without=kept)

    def traces(self) -> dict[str, list[Trace]]:
        """Each task's traces after training. The first process has them; a sharded model's are in pieces on all."""
        by_task: dict[str, list[Trace]] = {}
        for item in self.trace.traces(last=True):
            item.meta |= self.meta
            by_task.setdefault(item.task, []).append(item)
        return by_task

    def keep(self, task: str, traces: list[Trace]) -> None:
        """Write a task's traces, and remove its sums."""
        if not self._file(task).exists():  # (after a kill, some of its sums may lie beside it)
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
        super().__init__(tuple(experiment.tasks), folder, processes)
        names = adapters.adapter_names(model) if experiment.trace.view == "adapter" else None
        parts = experiment.trace.parts
        self.meta = {"targets": "train", "every": 1, "definition": "summed", "metric": experiment.trace.metric}
        self.by_optimiser = experiment.trace.metric == "optimiser"
        self.trace: SummedTrace = SummedTrace(
            model, self.tasks, parts, _where_of_sums(model, names, len(self.tasks) * parts), names,
            None if processes is None else processes.group,
        )  # fmt: skip

    def on_gradient(self, model: Any, task: str, part: TaskPart) -> None:
        if task in self.tasks:
            optimizer = part.optimizer if self.by_optimiser else None
            self.trace.add(task, part.lr, part.examples, part.weight, last=part.last, optimizer=optimizer)
        else:
            self.trace.skip(last=part.last)


class OnlineListener(Tracer):
    """Feeds every `every`-th update to an `OnlineTrace`.

    If the model has an adapter, the trace is of the adapter's parameters or of the merged weights, as the view says.
    """

    when = LEARNING["per_example"]

    def __init__(self, model: Any, experiment: Experiment, folder: Path, processes: Processes | None = None):
        super().__init__(tuple(experiment.tasks), folder, processes)
        options = experiment.trace
        self.every = options.every
        self.meta = {"targets": options.targets, "every": options.every}
        self.merges = adapters.is_adapted(model) and options.view == "merged"
        self.borrows = options.forward == "training" and not self.merges
        names = adapters.base_names(model) if self.merges else None
        if options.view == "adapter":
            names = adapters.adapter_names(model)
        self.trace: OnlineTrace = OnlineTrace(
            model, self.tasks, [options.measures[0]], parts=options.parts, lr_weighted=options.lr_weighted, names=names,
            where=_where_of_sums(model, names, len(self.tasks) * len(REDUCTIONS) * options.parts),
            group=None if processes is None else processes.group,
        )  # fmt: skip

    def on_update(self, model: Any, batches: MicroBatches, lr: float, update: int, forwards: TrainingForwards) -> None:
        if update % self.every:
            return
        traced = {task: micro_batches for task, micro_batches in batches.items() if task in self.tasks}
        if not self.borrows:
            forwards = {}
        elif len(traced) < len(batches):  # the training's forwards must be used in order, without a gap
            before = takewhile(self.tasks.__contains__, batches)
            forwards = {task: forwards[task] for task in before if task in forwards}
        with adapters.merged(model) if self.merges else nullcontext():
            self.trace.step(traced, lr, forwards)

    def load(self, folder: Path) -> None:
        older = folder / "trace"  # earlier versions had all of the state in the checkpoint
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
    """Where the sums of a training's trace are kept: beside the model if they fit, or else on the CPU.

    They fit if they take less than half of what is free there. The other half is for gradients, AdamW's states and
    activations.
    """
    parameters = dict(model.named_parameters())
    traced = [parameters[name] for name in names or parameters]
    needed = sum(local(p).numel() * sum_dtype(p.dtype).itemsize for p in traced) * sums
    free = free_memory(next(iter(parameters.values())).device)
    return "device" if free is None or needed < free / 2 else "cpu"
