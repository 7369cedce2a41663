"""Gradient traces: how strongly the examples of a task push every parameter.

`trace` takes one at a checkpoint, `OnlineTrace` over the steps of a training; both feed on `engine`, which
gives sums of per-example gradients. Here those sums become the measures of docs/method.md:

    abs  mean_i |g_i|      square  mean_i g_i²      taylor  mean_i |θ·g_i|      net  mean_i g_i (signed)

with g_i = ∂ℓ_i/∂θ for the reduction `example`, and the step's mean gradient in place of g_i for `step`.
Nothing here knows what a task is beyond its name, or where its targets come from.
"""

from __future__ import annotations

import html
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from crosstrace.core.errors import UserError
from crosstrace.core.files import read_json, remove, replacing, write_json
from crosstrace.core.pieces import Pieces, at_rest, laid, local, own_rows, piece, processes_of, whole, write
from crosstrace.core.processes import by_first
from crosstrace.core.provenance import versions
from crosstrace.models.forward import TrainingForward, TrainingForwards
from crosstrace.trace.borrowed import Drew, calm, is_the_same
from crosstrace.trace.distributed import Scatter, Team
from crosstrace.trace.engine import Batch, Engine, Forward
from crosstrace.trace.measures import MEASURES
from crosstrace.trace.memory import Estimate, Where
from crosstrace.trace.packed import unpacked
from crosstrace.trace.rules import sum_dtype

REDUCTIONS = ("example", "step")
_FORMAT = "crosstrace traces 1"
_STATE = "crosstrace online trace 1"
_SUM = "crosstrace sum of an online trace 1"


@dataclass
class Trace:
    """One task's trace by one measure.

    Attributes:
        task: the task's name.
        measure: one of MEASURES.
        reduction: "example" (mean over examples) or "step" (mean over steps of the step's mean gradient).
        when: "checkpoint" or "online".
        values: per parameter, in the order of `named_parameters`, the mean; float32 (float64 for a float64
            model), on the CPU. Non-negative, except `net`, which is the signed mean gradient.
        weight: number of examples (or steps) in the mean; each counts as its learning rate if so weighted.
        meta: JSON-able: model, dtype, attention kernel, part, coverage, and what the caller adds.
    """

    task: str
    measure: str
    reduction: str
    when: str
    values: dict[str, Tensor]
    weight: float
    meta: dict[str, Any] = field(default_factory=dict)

    def strength(self) -> dict[str, Tensor]:
        """Non-negative strength per parameter: |values| of a signed measure, the values themselves otherwise."""
        signed = MEASURES[self.measure].is_signed
        return {name: v.abs() for name, v in self.values.items()} if signed else dict(self.values)

    def whole(self) -> Trace:
        """The same trace with every tensor whole, on the CPU of each process; an ordinary trace is one already."""
        return replace(self, values={name: whole(value) for name, value in self.values.items()})

    @staticmethod
    def combine(traces: Iterable[Trace]) -> Trace:
        """The trace over the union of disjoint data: the weighted mean, exact for every measure.

        Raises:
            UserError: no trace, or traces that differ in task, measure, reduction, time or parameters.
        """
        traces = list(traces)
        if not traces:
            raise UserError("there is no trace to combine; at least one was expected")
        first = traces[0]
        for other in traces[1:]:
            for what in ("task", "measure", "reduction", "when"):
                if getattr(other, what) != getattr(first, what):
                    raise UserError(
                        f"traces to combine differ in {what}: {getattr(first, what)!r} and {getattr(other, what)!r}"
                    )
            if {n: v.shape for n, v in other.values.items()} != {n: v.shape for n, v in first.values.items()}:
                raise UserError("traces to combine have different parameters; are they of different models?")
        weights = [t.weight for t in traces]
        values = dict(first.values)
        if len(traces) > 1:  # (the mean of one is that one, to the last bit)
            values = {
                name: weighted_mean([t.values[name] for t in traces], weights).to(value.dtype)
                for name, value in values.items()
            }
        shared = {k: v for k, v in first.meta.items() if all(t.meta.get(k) == v for t in traces)}
        meta = shared | {"combined": len(traces)}
        return Trace(first.task, first.measure, first.reduction, first.when, values, sum(weights), meta)

    def _repr_html_(self) -> str:
        """Share of the whole strength per kind of tensor and layer, for notebooks."""
        mass: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for name, value in self.strength().items():
            number = re.search(r"\.(\d+)\.", name)
            layer = number.group(1) if number else "–"
            mass[re.sub(r"\.\d+\.", ".*.", name, count=1)][layer] += float(value.double().sum())
        total = sum(sum(row.values()) for row in mass.values()) or 1.0
        layers = sorted({layer for row in mass.values() for layer in row}, key=lambda x: (x.isdigit(), x.zfill(6)))
        cells = lambda row: "".join(f"<td>{100 * row[x] / total:.1f}</td>" if x in row else "<td></td>" for x in layers)
        head = "".join(f"<th>{x if x == '–' else 'layer ' + x}</th>" for x in layers)
        body = "".join(f"<tr><th>{html.escape(kind)}</th>{cells(row)}</tr>" for kind, row in mass.items())
        unit = f"mean over {self.weight:g} ({self.reduction}, {self.when}), % of all"
        title = f"{self.task}: {self.measure}, {unit}"
        return f"<table><caption>{html.escape(title)}</caption><tr><th></th>{head}</tr>{body}</table>"


def weighted_mean(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ_p w_p v_p / Σ_p w_p in float64, for tensors of one shape."""
    total = torch.zeros_like(values[0], dtype=torch.float64)
    for value, weight in zip(values, weights):
        total.add_(value.double(), alpha=weight)
    return total / sum(weights)


def save_traces(path: str | os.PathLike[str], traces: Sequence[Trace]) -> None:
    """Write traces to one safetensors file: tensors "<number>/<parameter>".

    The file's metadata has, as JSON, `traces`, a list of their other attributes, and the `versions` that wrote it. It
    appears whole or not at all. Traces of a sharded model are saved by all its processes together, as a folder of files
    (see `sharded.write`).
    """
    headers = [{k: v for k, v in vars(t).items() if k != "values"} | {"names": list(t.values)} for t in traces]
    held = {f"{i}/{n}": v for i, t in enumerate(traces) for n, v in t.values.items()}
    processes = processes_of(held)
    if processes is not None:
        write(path, held, processes, _FORMAT, {"traces": headers})
        return
    tensors = {key: v.detach().cpu().contiguous() for key, v in held.items()}
    with replacing(path) as partial:
        told = {"format": _FORMAT, "traces": json.dumps(headers), "versions": json.dumps(versions())}
        save_file(tensors, partial, metadata=told)


def load_traces(
    path: str | os.PathLike[str],
    like: nn.Module | None = None,
    *,
    measure: str | None = None,
    reduction: str | None = None,
) -> list[Trace]:
    """Read what `save_traces` wrote, exactly, on any number of processes.

    Args:
        like: a sharded model: each of its processes reads the rows that it holds; None: everything is read.
        measure, reduction: read the traces by these alone; None: by any.

    Raises:
        UserError: no such file, a truncated file, or one of something else, or of another model than `like`.
    """
    parameters = {} if like is None else at_rest(like)

    def taken(headers: list[dict[str, Any]], read: Callable[[str, tuple[int, int] | None], Tensor]) -> list[Trace]:
        traces = []
        for i, header in enumerate(headers):
            if measure not in (None, header["measure"]) or reduction not in (None, header["reduction"]):
                continue
            values = {}
            for name in header.pop("names"):
                if like is not None and name not in parameters:
                    raise UserError(f"{path} has a trace of '{name}', which the model does not have; is it of another?")
                theta = parameters.get(name)
                value = read(f"{i}/{name}", None if theta is None else own_rows(theta))
                values[name] = value if theta is None else laid(value.to(theta.device), theta)
            traces.append(Trace(values=values, **header))
        return traces

    try:
        if os.path.isdir(path):
            pieces = Pieces(path, _FORMAT)
            return taken(pieces.header["traces"], pieces.read)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise UserError(f"{path} is a safetensors file but holds no traces; expected one from save_traces")
            return taken(
                json.loads(metadata["traces"]),
                lambda key, rows: file.get_tensor(key) if rows is None else file.get_slice(key)[slice(*rows)],
            )
    except FileNotFoundError:
        raise UserError(f"there is no trace file {path}; take the trace first") from None
    except UserError:
        raise
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as why:
        raise UserError(f"{path} can't be read as traces ({why}); it is truncated or another kind of file") from why


def trace(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    task: str,
    measures: Sequence[str] = ("abs",),
    parts: int = 1,
    where: Where = "auto",
    passes: int | None = None,
    names: Collection[str] | None = None,
    tell: Callable[[Estimate], None] | None = None,
    progress: Callable[[int], None] | None = None,
    group: ProcessGroup | None = None,
) -> list[Trace]:
    """Trace a task at a checkpoint: exact per example, whatever the batches' size, order and padding.

    Args:
        model: left as it was found: mode, flags, `.grad`, hooks, random state. Of one sharded by FSDP2 the values are
            sharded likewise, on its device.
        batches: dicts of input_ids, attention_mask, labels [B, T], padded on either side; for `parts`, group [B] too.
            A model counts its own positions unless position_ids [B, T] other than 0, 1, … are given. Examples packed
            into one row are taken apart where position_ids begin anew.
        task: its name in the result.
        measures: of MEASURES; several cost little more than one.
        parts: examples of group g count for part g % parts, so that intervals can be taken over disjoint parts of
            the data; where a batch has no group, each example is one of its own.
        where: the sums are kept on the "device" of the model, on the "cpu", or ("auto") on the device where they fit in
            a few passes, else on the CPU. The trace is the same.
        passes: over the data, each for one group of parameters alone; None: as few as fit.
        names: the parameters to trace; None: all.
        tell: called before the trace begins with the memory that it needs.
        progress: called after each batch (of the last pass) with the number of its examples.
        group: processes of torch.distributed that share out the examples. All of them call this with the same batches,
            and each gets the whole trace. Those of a sharded model do so without being asked.

    Returns:
        measures × parts traces with reduction "example", all parts of the first measure first.

    Raises:
        UserError: an unknown measure, fewer examples than parts, or a batch that can't be traced.
    """
    check_settings(measures, parts, ("example",))
    team = Team.of(model, group)
    batches = [part for batch in batches for part in unpacked(batch, by_length=True)]
    if not batches:
        raise UserError(f"task {task!r} has no example to trace; expected at least one batch")
    entire = Engine(model, names)
    rows = [{key: value for key, value in batch.items() if key != "group"} for batch in batches]
    own = rows if team is None else team.largest_share(rows)
    plan, needed = entire.memory(own, len(measures) * parts, where, passes)
    if team is not None:
        plan = team.agreed(plan)
    if tell is not None:
        tell(needed)
    found = [Trace(task, measure, "example", "checkpoint", {}, 0.0) for measure in measures for _ in range(parts)]
    coverage: dict[str, float] = defaultdict(float)
    for own_names in plan.groups:
        engine = entire if len(plan.groups) == 1 else Engine(model, set(own_names))
        # before the sums are there: it needs memory of its own
        engine.plan_for(rows[0]) if team is None else team.prepare(engine, rows)
        means = [[_Mean(engine.parameters, m, "example", plan.device) for m in measures] for _ in range(parts)]
        _one_pass(engine, batches, means, progress if own_names is plan.groups[-1] else None, team)
        empty = sum(mean.weight == 0 for mean, *_ in means)
        if empty:
            raise UserError(
                f"the {sum(len(row['labels']) for row in rows)} examples of task {task!r} to trace leave {empty} of "
                f"{parts} parts empty; expected examples of at least as many groups (people) as parts, so trace more "
                "or ask for fewer parts"
            )
        share = sum(p.numel() for p in engine.parameters.values()) / needed.parameters
        for label, of_group in engine.coverage().items():
            coverage[label] += share * of_group
        for number, one in enumerate(found):
            mean = means[number % parts][number // parts]
            one.weight = mean.weight
            one.values |= mean.finished()
    meta = _facts(entire) | {"coverage": dict(coverage), "parts": parts, "memory": asdict(replace(needed, free=None))}
    if team is not None:  # others may have more rows, or other memory free
        meta = team.processes.from_first(meta) | {"processes": team.processes.size}
    for number, one in enumerate(found):
        one.meta = meta | {"part": number % parts}
    return found


def _one_pass(
    engine: Engine,
    batches: Sequence[Batch],
    means: list[list[_Mean]],
    progress: Callable[[int], None] | None,
    team: Team | None,
) -> None:
    """Add all batches, or a team's, to each part's means."""
    seen = 0
    scatter = Scatter(engine, team.processes) if team is not None and team.sharded else None
    for given, mine in zip(batches, batches if team is None else team.deal(batches)):
        count = len(given["labels"])
        batch, chosen, shares = _by_part(mine, len(means), seen)
        for part, share in zip(chosen, shares):
            for mean in means[part]:
                mean.weight += share.stop - share.start
        if scatter is not None:  # all processes do the same, with any example in the place of none
            of_part = dict(zip(chosen, shares))
            chosen, shares = list(range(len(means))), [of_part.get(part, slice(0, 0)) for part in range(len(means))]
            batch = batch if len(mine["labels"]) else {k: v[:1] for k, v in given.items() if k != "group"}

        def into(name: str, number: int, chosen: list[int] = chosen) -> AbstractContextManager[dict[str, Tensor]]:
            return _open(name, engine.parameters[name], means[chosen[number]], scatter=scatter)

        if len(batch["labels"]):
            engine.run(batch, shares, into)
        if scatter is not None:
            scatter.finish()
        seen += count
        if progress is not None:
            progress(count)
    if team is not None:
        for mean in (mean for of_part in means for mean in of_part):
            mean.weight = team.add_up(mean.total, mean.weight)


class Accumulated:
    """What every online trace has: the means of all tasks, reductions, measures and parts, and their state.

    Args:
        model: the model in training.
        tasks: all tasks that will occur; a step may have any of them.
        measures: of MEASURES.
        reductions: "example", the mean over every example of every step; "step", the mean over steps of the
            measure of the step's mean gradient.
        parts: for "example", examples of group g count for part g % parts (as in `trace`), so that every part sees
            all of training, whose gradients shrink as it goes; for "step", a task's step number s counts for part
            s % parts.
        lr_weighted: weight each step by its learning rate.
        where: the sums are kept on the "device" of the model or on the "cpu".
        names: the parameters to trace; None: all.
        group: processes of torch.distributed that share out the examples of each step. All of them call everything
            here, with the same batches; the sums meet in the first one where they are saved or read. Those of a sharded
            model do so without being asked, and each has the sums of its rows.
    """

    def __init__(
        self,
        model: nn.Module,
        tasks: Iterable[str],
        measures: Sequence[str] = ("abs",),
        reductions: Sequence[str] = REDUCTIONS,
        parts: int = 1,
        lr_weighted: bool = False,
        where: Literal["device", "cpu"] = "device",
        names: Collection[str] | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        check_settings(measures, parts, reductions)
        self._team = Team.of(model, group)
        self._engine = Engine(model, names)
        device = torch.device("cpu") if where == "cpu" else None
        self._settings = {
            "tasks": list(tasks),
            "measures": list(measures),
            "reductions": list(reductions),
            "parts": parts,
            "lr_weighted": lr_weighted,
        }
        self._steps = dict.fromkeys(self._settings["tasks"], 0)
        self._means = {
            f"{task}/{reduction}/{measure}/{part}": _Mean(self._engine.parameters, measure, reduction, device)
            for task in self._steps
            for reduction in reductions
            for measure in measures
            for part in range(parts)
        }
        self.borrows: dict[str, bool] = {}  # by task: whether the training's own forward is traced
        self._compared: set[str] = set()  # tasks whose forward was compared with one of the trace's own
        self._whole = True  # no step was interrupted half-way

    @property
    def _parts(self) -> int:
        """Parts that a batch is cut into: for "step" whole steps are parts."""
        return self._settings["parts"] if "example" in self._settings["reductions"] else 1

    @property
    def _sharded(self) -> bool:
        return self._team is not None and self._team.sharded

    @property
    def _holds(self) -> bool:
        """Whether this process has sums when they have met: alone, the first of a team, or of its rows."""
        return self._team is None or self._sharded or self._team.processes.rank == 0

    def _factor(self, lr: float) -> float:
        return float(lr) if self._settings["lr_weighted"] else 1.0

    def _of_part(self, task: str, part: int) -> list[_Mean]:
        wanted = self._settings["measures"] if "example" in self._settings["reductions"] else []
        return [self._means[f"{task}/example/{measure}/{part}"] for measure in wanted]

    def _of_step(self, task: str) -> list[_Mean]:
        wanted = self._settings["measures"] if "step" in self._settings["reductions"] else []
        part = self._steps[task] % self._settings["parts"]
        return [self._means[f"{task}/step/{measure}/{part}"] for measure in wanted]

    def _open(
        self, task: str, part: int, name: str, gradients: dict[str, Tensor], factor: float,
        scatter: Scatter | None = None,
    ) -> AbstractContextManager[dict[str, Tensor]]:  # fmt: skip
        """Where the engine adds the sums of examples of one task and part; Σg of the step goes to `gradients`."""
        theta = self._engine.parameters[name]
        also = {}
        if "step" in self._settings["reductions"]:
            if name not in gradients:
                gradients[name] = torch.zeros_like(local(theta), dtype=sum_dtype(theta.dtype))
            also["sum"] = gradients[name]
        return _open(name, theta, self._of_part(task, part), factor, also, scatter)

    def _add_step(self, task: str, name: str, total: Tensor, count: int, factor: float) -> None:
        """Add a step's mean gradient of one parameter, given as its sum over `count` examples, which is used up."""
        means = self._of_step(task)
        for left, mean in zip(reversed(range(len(means))), means):
            mean.add_step(
                name, total if left == 0 else total.clone(), count, local(self._engine.parameters[name]), factor
            )

    def _count(self, task: str, sizes: Iterable[tuple[int, int]], factor: float) -> None:
        """All of a step's sums of a task are there, of so many examples for each part."""
        for mean in self._of_step(task) if self._holds else ():
            mean.weight += factor
        for part, size in sizes:
            for mean in self._of_part(task, part):
                mean.weight += factor * size
        self._steps[task] += 1

    def replan(self) -> None:
        """Choose each parameter's rule anew at the next step: after the model was changed, such as by another adapter
        put on it."""
        self._engine.probed = 0

    def traces(self, *, last: bool = False) -> list[Trace]:
        """The traces so far, by task, reduction, measure, part; parts without a step yet are left out. A team's first
        process gets them, the others none; of a sharded model each gets its rows, and the values are sharded.

        Args:
            last: nothing will be added any more: the sums themselves become the traces, which saves their memory.
        """
        self._bring_together()
        facts = _facts(self._engine) | {k: self._settings[k] for k in ("parts", "lr_weighted")}
        if self._team is not None:
            facts["processes"] = self._team.processes.size
        self._whole = not last
        return [
            Trace(key.rsplit("/", 3)[0], mean.measure.name, mean.reduction, "online", mean.finished(keep=not last),
                  mean.weight, facts | self._forward_of(key.rsplit("/", 3)[0]) | {"part": int(key.rsplit("/", 1)[1])})
            for key, mean in self._means.items()
            if mean.weight > 0
        ]  # fmt: skip

    def _forward_of(self, task: str) -> dict[str, str]:
        """Which forward was traced, where it could have been the training's."""
        return {"forward": "of the training" if self.borrows[task] else "of its own"} if task in self.borrows else {}

    def _header(self) -> dict[str, Any]:
        """What is saved beside the sums."""
        return {
            "settings": self._settings,
            "steps": dict(self._steps),
            "weights": {key: mean.weight for key, mean in self._means.items()},
            "plan": dict(self._engine.plan),
            "order": list(self._engine.order),
            "probed": self._engine.probed,
            "untold": sorted(self._engine.untold),
            "seen": self._engine.seen,
            "borrows": dict(self.borrows),
        }

    def _sums(self) -> dict[str, Tensor]:
        """The sums themselves, of a sharded model laid out as its parameters."""
        like = self._engine.parameters
        return {f"{key}/{n}": laid(v, like[n]) for key, mean in self._means.items() for n, v in mean.total.items()}

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on bit for bit: {"header": JSON-able, "tensors": {…}}. A team's is with
        its first process; of a sharded model every process has its rows."""
        self._bring_together()
        return {"header": self._header(), "tensors": {key: v.clone() for key, v in self._sums().items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state: that of one process, or of the first of a team, which any number of processes can go on
        with; each of them is given it.

        Raises:
            UserError: it is of other settings or of another model.
        """
        tensors = state["tensors"]
        shapes = {key: tuple(v.shape) for key, v in tensors.items()}
        self._take(state["header"], shapes, lambda key, theta: piece(tensors[key], theta))

    def _take(
        self, header: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], read: Callable[[str, Tensor], Tensor]
    ) -> None:
        """Take over a saved state; `read` gives what this process holds of a sum, as it holds its parameter."""
        self._check_settings(header)
        if shapes != {key: tuple(v.shape) for key, v in self._sums().items()}:
            raise UserError("the saved online trace has other parameters than the model; is it of another model?")
        self._take_header(header)
        for key, mean in self._means.items():
            mean.weight = header["weights"][key]
            for name, total in mean.total.items():
                total.copy_(read(f"{key}/{name}", self._engine.parameters[name]))
        self._whole = True
        if not self._holds:
            self._forget_sums()

    def _check_settings(self, header: Mapping[str, Any]) -> None:
        """Raise a `UserError` if a saved state is of other settings."""
        for what, mine in self._settings.items():
            if header["settings"].get(what) != mine:
                raise UserError(
                    f"the saved online trace has {what} {header['settings'].get(what)!r}, this one {mine!r}; "
                    "resume with the settings it was begun with"
                )

    def _take_header(self, header: Mapping[str, Any]) -> None:
        """Take over all but the sums of a saved state."""
        self._steps, self.borrows = dict(header["steps"]), dict(header.get("borrows", {}))
        self._engine.plan, self._engine.order = dict(header["plan"]), list(header["order"])
        self._engine.probed, self._engine.seen = header["probed"], header["seen"]
        self._engine.untold = set(header["untold"])

    def save(self, stem: Path) -> None:
        """Write the state as <stem>.safetensors and <stem>.json. A team calls it together and its first process
        writes; the processes of a sharded model write a folder <stem>, each its rows."""
        self._bring_together()
        if self._sharded:
            assert self._team is not None
            write(stem, self._sums(), self._team.processes, _STATE, self._header())
        elif self._holds:
            save_file({key: v.contiguous() for key, v in self._sums().items()}, stem.with_suffix(".safetensors"))
            write_json(stem.with_suffix(".json"), self._header())

    def load(self, stem: Path) -> None:
        """Take over what `save` wrote, on any number of processes; raises as `load_state_dict`."""
        if stem.is_dir():
            pieces = Pieces(stem, _STATE)
            return self._take(pieces.header, pieces.shapes, lambda key, theta: pieces.read(key, own_rows(theta)))
        with safe_open(stem.with_suffix(".safetensors"), framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118

            def read(key: str, theta: Tensor) -> Tensor:
                rows = own_rows(theta)
                return file.get_tensor(key) if rows is None else file.get_slice(key)[slice(*rows)]

            self._take(read_json(stem.with_suffix(".json")), shapes, read)

    def save_pieces(self, folder: Path, update: int) -> dict[str, Any]:
        """Write each sum as <folder>/<sum>-<update>.safetensors, in the place of its file of an earlier update, so that
        hardly more than one state lies on the disk.

        A call that is killed leaves some sums of this update and the others of the earlier one. A training that goes on
        from the earlier one makes the same steps again and comes to this call again; the sums that are there already
        are then read, since those in memory began without what came before (`load_pieces`).

        Args:
            update: how many updates the training has made.

        Returns:
            the rest of the state, JSON-able, for `load_pieces`; of a team's first process.
        """
        self._bring_together()
        paths = {key: self._piece(folder, key, update) for key in self._means}
        processes = None if self._team is None else self._team.processes
        there = by_first(processes, lambda: [key for key, path in paths.items() if path.exists()])
        for key, path in paths.items() if self._holds else ():
            if key in there:
                self._load_sum(key, path)
            else:
                self._save_sum(key, path)
            if processes is None or processes.rank == 0:
                for other in folder.glob(path.name.replace(f"-{update}.", "-*.")):
                    if other != path:
                        remove(other)
        return self._header()

    def load_pieces(self, folder: Path, update: int, header: Mapping[str, Any], without: Collection[str] = ()) -> None:
        """Take over the state of an update, on any number of processes. A sum whose file is of a later update is
        empty until `save_pieces` is called at that one.

        Args:
            header: what `save_pieces` gave.
            without: tasks whose sums may be gone, since nothing is added to them any more; they are empty.

        Raises:
            UserError: it is of other settings or of another model, or a sum is missing.
        """
        self._check_settings(header)
        self._take_header(header)
        self._forget_sums()
        for key in self._means:
            path = self._piece(folder, key, update)
            if path.exists():
                self._load_sum(key, path)
            elif key.rsplit("/", 3)[0] not in without and not _is_later(path, update):
                raise UserError(f"{path} is missing, so the training cannot go on; begin the run again")
        self._whole = True
        if not self._holds:
            self._forget_sums()

    def _piece(self, folder: Path, key: str, update: int) -> Path:
        return folder / f"{key.replace('/', '+')}-{update}.safetensors"

    def _save_sum(self, key: str, path: Path) -> None:
        mean, like = self._means[key], self._engine.parameters
        if self._sharded:
            assert self._team is not None
            held = {name: laid(total, like[name]) for name, total in mean.total.items()}
            return write(path, held, self._team.processes, _SUM, {"weight": mean.weight})
        with replacing(path) as partial:
            tensors = {name: total.contiguous() for name, total in mean.total.items()}
            save_file(tensors, partial, metadata={"weight": json.dumps(mean.weight)})

    def _load_sum(self, key: str, path: Path) -> None:
        mean, like = self._means[key], self._engine.parameters

        def take(shapes: Mapping[str, tuple[int, ...]], read: Callable[[str, tuple[int, int] | None], Tensor]) -> None:
            if shapes != {name: tuple(like[name].shape) for name in mean.total}:
                raise UserError(f"{path} has other parameters than the model; is it of another model?")
            for name, total in mean.total.items():
                total.copy_(read(name, own_rows(like[name])))

        if path.is_dir():
            pieces = Pieces(path, _SUM)
            mean.weight = pieces.header["weight"]
            return take(pieces.shapes, pieces.read)
        with safe_open(path, framework="pt") as file:
            mean.weight = json.loads(file.metadata()["weight"])
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            take(
                shapes, lambda name, rows: file.get_tensor(name) if rows is None else file.get_slice(name)[slice(*rows)]
            )

    def _bring_together(self) -> None:
        """Add up a team's sums, in its first process, which goes on with them; the others begin anew. Those of a
        sharded model's rows are with whom they belong to."""
        self._check_whole()
        if self._team is None or self._sharded:
            return
        for mean in self._means.values():
            mean.weight = self._team.add_up(mean.total, mean.weight)
        if not self._holds:
            self._forget_sums()

    def _forget_sums(self) -> None:
        for mean in self._means.values():
            mean.weight = 0.0
            for total in mean.total.values():
                total.zero_()

    def _check_whole(self) -> None:
        if not self._whole:
            raise RuntimeError(
                "an online trace was interrupted in the middle of a step and holds part of it, or its last traces were "
                "taken; load the state from before that"
            )


class OnlineTrace(Accumulated):
    """Traces accumulated over the steps of a training, by a forward and backward of their own.

    Call `step` before each update with the step's batches: the trace's targets may differ from the training's. The
    model, its gradients and the random state are left alone. See `Accumulated` for the arguments; `TrainingTrace`
    shares the training's own backward instead.
    """

    def step(
        self,
        batches: Mapping[str, Batch | Sequence[Batch]],
        lr: float = 1.0,
        forwards: TrainingForwards = MappingProxyType({}),
    ) -> None:
        """Add one training step: each task's batch, at the parameters before the update.

        Args:
            batches: per task, its examples in one batch or in several micro-batches; a task without examples in this
                step is left out.
            lr: the step's learning rate; counts only if `lr_weighted`.
            forwards: per task, the training's own forward, which is traced in the place of one more. Called as
                forward(micro-batch, True), once for each in order, it gives the losses ℓ [B] of its labels, and keeps
                what the training needs. In a task's first step it is called before as forward(two of the rows, False),
                and compared with the trace's own forward; where they differ, as by dropout, the trace goes on with its
                own (see `borrows`). So it does for every task behind one without a forward that may be traced, since
                the training makes its own in this order. Not used where several processes share out the examples.

        Raises:
            UserError: a task that was not announced, or a batch that can't be traced; nothing is added then.
        """
        self._check_whole()
        unknown = [task for task in batches if task not in self._steps]
        if unknown:
            raise UserError(f"task {unknown[0]!r} is not one of those announced: {', '.join(self._steps)}")
        micro_batches = {
            task: [unpacked(batch)[0] for batch in ([own] if isinstance(own, Mapping) else own)]
            for task, own in batches.items()
        }
        for own in micro_batches.values():
            for batch in own:
                self._engine.checked(_without_group(batch))
        factor = self._factor(lr)
        self._whole = False
        in_turn = True  # whether the training's next forward is that of this task
        for task, own in micro_batches.items():
            if self._team is not None and self._team.sharded:
                self._step_in_pieces(self._team, task, own, factor)
            else:
                forward = forwards.get(task)
                if forward is not None and not in_turn:
                    self.borrows[task], forward = False, None
                in_turn = self._step_of(task, own, forward, factor)
        self._whole = True

    def _step_of(self, task: str, batches: Sequence[Batch], forward: TrainingForward | None, factor: float) -> bool:
        """Add a task's step: its micro-batches, one after the other. Gives whether all of them are the training's."""
        count = sum(len(batch["labels"]) for batch in batches)
        dealt = batches if self._team is None else self._team.deal(batches)
        gradients: dict[str, Tensor] = {}
        sizes: Counter[int] = Counter()
        seen = 0
        for of_all, given in zip(batches, dealt):
            if self._team is not None:  # the rules are chosen on the same examples everywhere
                self._engine.plan_for(_without_group(of_all))
            batch, chosen, shares = _by_part(given, self._parts, seen)
            own = {part: share.stop - share.start for part, share in zip(chosen, shares)}
            complete = len(shares) if self._team is None and of_all is batches[-1] else 0  # 0: not here
            add = partial(self._add, task, chosen, count, gradients, factor, Counter(), complete)
            if sum(own.values()):
                borrowed = self._borrowed(task, given, forward)
                order = None
                if borrowed and len(shares) > 1:
                    order = _order(given, self._parts, seen)[1].to(given["labels"].device)
                try:
                    self._engine.run(batch, shares, add, borrowed, order)
                except Drew:  # before anything was added
                    self.borrows[task], forward = False, None
                    self._engine.run(batch, shares, add)
            sizes.update(own)
            seen += len(of_all["labels"])
        if self._team is not None and "step" in self._settings["reductions"]:
            self._add_step_of_all(self._team, task, gradients, count, factor)
        for name in list(gradients):  # what the last micro-batch does not use, as of an expert
            self._add_step(task, name, gradients.pop(name), count, factor)
        self._count(task, sizes.items(), factor)
        return forward is not None and self.borrows.get(task, False)

    def _borrowed(self, task: str, batch: Batch, forward: TrainingForward | None) -> Forward | None:
        """The training's own forward of this very batch, its rows in the training's order, if it may be traced."""
        if forward is None or self._team is not None or self.borrows.get(task) is False:
            return None
        rows = self._engine.checked(_without_group(batch))
        if task not in self._compared:
            self._compared.add(task)
            self.borrows[task] = is_the_same(self._engine, rows, forward)
        return partial(_of_these, forward, rows) if self.borrows[task] else None

    def _step_in_pieces(self, team: Team, task: str, batches: Sequence[Batch], factor: float) -> None:
        """Add a task's step of a sharded model: all processes go through the same parts together, each with its
        examples, or with any one that counts nothing, and get the sums of their rows."""
        rows = [_without_group(batch) for batch in batches]
        if self._engine.probed < min(2, max(len(batch["labels"]) for batch in batches)):
            team.prepare(self._engine, rows)
        gradients: dict[str, Tensor] = {}
        sizes: Counter[int] = Counter()
        seen = 0
        for of_all, given, any_rows in zip(batches, team.deal(batches), rows):
            _, chosen, whole_shares = _by_part(of_all, self._parts, seen)
            batch, own, shares = _by_part(given, self._parts, seen)
            if not len(batch["labels"]):
                batch, own = {key: value[:1] for key, value in any_rows.items()}, []
            of_part = dict(zip(own, shares))
            scatter = Scatter(self._engine, team.processes)

            def add(name: str, number: int, chosen: list[int] = chosen, scatter: Scatter = scatter) -> Any:
                return self._open(task, chosen[number], name, gradients, factor, scatter)

            self._engine.run(batch, [of_part.get(part, slice(0, 0)) for part in chosen], add)
            scatter.finish()
            sizes.update({part: share.stop - share.start for part, share in zip(chosen, whole_shares)})
            seen += len(of_all["labels"])
        for name in list(gradients):
            self._add_step(task, name, gradients.pop(name), seen, factor)
        self._count(task, sizes.items(), factor)

    def _add_step_of_all(self, team: Team, task: str, gradients: dict[str, Tensor], count: int, factor: float) -> None:
        """Add a step's mean gradient over all processes: its absolute value is not the sum of theirs."""
        for name, theta in self._engine.parameters.items():
            own = gradients.pop(name, None)
            own = torch.zeros_like(theta, dtype=sum_dtype(theta.dtype)) if own is None else own
            team.processes.add_up(own)
            if self._holds:
                self._add_step(task, name, own, count, factor)

    @contextmanager
    def _add(
        self, task: str, chosen: list[int], count: int, gradients: dict[str, Tensor], factor: float,
        added: Counter[str], complete: int, name: str, number: int,
    ) -> Iterator[dict[str, Tensor]]:  # fmt: skip
        """Where a share's sums of a parameter are added. When `complete` shares have been, the step's gradient of it is
        whole, and is let go of."""
        with self._open(task, chosen[number], name, gradients, factor) as sums:
            yield sums
        added[name] += 1
        if name in gradients and added[name] == complete:
            self._add_step(task, name, gradients.pop(name), count, factor)


class _Mean:
    """A weighted mean of one measure by one reduction: Σ so far per parameter, and the weight it is over."""

    def __init__(
        self, parameters: Mapping[str, Tensor], measure: str, reduction: str, device: torch.device | None = None
    ) -> None:
        self.measure, self.reduction = MEASURES[measure], reduction
        self.like = parameters
        self.total = {n: torch.zeros(local(p).shape, dtype=sum_dtype(p.dtype), device=device or p.device)
                      for n, p in parameters.items()}  # fmt: skip
        self.weight = 0.0

    def takes(self, theta: Tensor, factor: float) -> bool:
        """Whether the engine may add its sum right here: nothing is to be done with it, and it is at hand."""
        here = next(iter(self.total.values())).device == theta.device
        return self.measure.at is None and factor == 1.0 and here

    def add(self, name: str, value: Tensor, theta: Tensor, factor: float) -> None:
        """Add the sum that the measure is made of, taken at the parameter theta."""
        if self.measure.at is not None:
            value = self.measure.at(value, theta.detach())
        self.total[name].add_(value.to(self.total[name].device), alpha=factor)

    def add_step(self, name: str, total: Tensor, count: int, theta: Tensor, factor: float) -> None:
        """Add a step's mean gradient, given as its sum over `count` examples, which is used up."""
        value, divisor = self.measure.of_step(total, count)
        self.add(name, value, theta, factor / divisor)

    def finished(self, keep: bool = False) -> dict[str, Tensor]:
        """The mean, on the CPU (of sharded parameters sharded likewise). The sums are used up, unless they are to be
        kept: there may be no room for both."""
        found = {}
        for name in list(self.total):
            mean = self.total[name] / self.weight if keep else self.total.pop(name).div_(self.weight)
            theta = self.like[name]
            found[name] = laid(mean, theta) if isinstance(theta, DTensor) else mean.cpu()
        return found


@contextmanager
def _open(
    name: str,
    theta: Tensor,
    means: Sequence[_Mean],
    factor: float = 1.0,
    also: Mapping[str, Tensor] = MappingProxyType({}),
    scatter: Scatter | None = None,
) -> Iterator[dict[str, Tensor]]:
    """The sums that `means` need of the parameter `name`, and those of `also`, for the engine to add to.

    Where a sum is all that one of them wants, it is the accumulator itself: no copy. With `scatter` the means hold a
    process's rows of it, and get theirs later.
    """
    users: dict[str, list[_Mean]] = {key: [] for key in also}
    for mean in means:
        users.setdefault(mean.measure.sums, []).append(mean)
    if scatter is not None:

        def add(key: str, value: Tensor) -> None:
            for mean in users[key]:
                mean.add(name, value, local(theta), factor)
            if key in also:
                also[key].add_(value)

        with scatter.open(name, list(users), add) as sums:
            yield sums
        return
    sums = {}
    for key, fed in users.items():
        if not fed:
            sums[key] = also[key]
        elif len(fed) == 1 and key not in also and fed[0].takes(theta, factor):
            sums[key] = fed[0].total[name]
        else:
            sums[key] = torch.zeros_like(theta, dtype=sum_dtype(theta.dtype))
    yield sums
    for key, fed in users.items():
        for mean in fed:
            if sums[key] is not mean.total[name]:
                mean.add(name, sums[key], theta, factor)
        if fed and key in also:
            also[key].add_(sums[key])


def _by_part(batch: Batch, parts: int, seen: int) -> tuple[Batch, list[int], list[slice]]:
    """The batch sorted by part, which parts it has, and where each lies; `seen` examples came before it."""
    if "labels" not in batch:
        return batch, [0], [slice(0, 0)]  # the engine says what is wrong with it
    part, order = _order(batch, parts, seen)
    chosen, sizes = part.unique(return_counts=True)
    ends = sizes.cumsum(0).tolist()
    shares = [slice(end - size, end) for end, size in zip(ends, sizes.tolist())]
    rest = {key: value for key, value in batch.items() if key != "group"}
    if len(shares) > 1:
        rest = {key: value[order.to(value.device)] for key, value in rest.items()}
    return rest, chosen.tolist(), shares


def _is_later(path: Path, update: int) -> bool:
    """Whether a sum's file is there, of a later update than the one that `path` names."""
    others = path.parent.glob(path.name.replace(f"-{update}.", "-*."))
    return any(int(other.stem.rpartition("-")[2]) > update for other in others)


def _of_these(forward: TrainingForward, rows: Batch, _: Batch) -> Tensor:
    """The losses of the training's rows, whichever batch is traced: a training must not change by being traced."""
    return calm(forward, rows, True)


def _without_group(batch: Batch) -> Batch:
    return {key: value for key, value in batch.items() if key != "group"}


def _order(batch: Batch, parts: int, seen: int) -> tuple[Tensor, Tensor]:
    """Which part each example of a batch belongs to, and the examples' order by part."""
    group = batch.get("group")
    part = (torch.arange(seen, seen + len(batch["labels"])) if group is None else group.cpu()) % parts
    return part, part.argsort(stable=True)


def check_settings(measures: Sequence[str], parts: int, reductions: Sequence[str]) -> None:
    for what, given, known in (("measure", measures, MEASURES), ("reduction", reductions, REDUCTIONS)):
        unknown = [name for name in given if name not in known]
        if unknown or not given:
            raise UserError(f"unknown {what} {unknown[0] if unknown else '(none)'!r}; expected of {', '.join(known)}")
    if parts < 1:
        raise UserError(f"parts is {parts}; expected at least 1")


def _facts(engine: Engine) -> dict[str, Any]:
    """What a reader of the trace must know of how it was taken."""
    config = getattr(engine.model, "config", None)
    dtypes = {str(p.dtype).removeprefix("torch.") for p in engine.parameters.values()}
    return {
        "model": getattr(config, "name_or_path", "") or type(engine.model).__name__,
        "parameters": sum(p.numel() for p in engine.parameters.values()),
        "dtype": "+".join(sorted(dtypes)),
        "attention": getattr(config, "_attn_implementation", None),
        "coverage": engine.coverage(),
    }
