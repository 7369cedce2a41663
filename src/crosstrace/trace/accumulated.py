"""What every trace during training has: the means of all tasks, reductions, measures and parts, and their state."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from crosstrace.core.errors import UserError
from crosstrace.core.files import read_json, remove, replacing, write_json
from crosstrace.core.pieces import Pieces, laid, local, own_rows, piece, write
from crosstrace.core.processes import by_first
from crosstrace.trace.blocks import sum_dtype
from crosstrace.trace.distributed import Scatter, Team
from crosstrace.trace.engine import Engine
from crosstrace.trace.means import REDUCTIONS, Mean, check_settings, describe_engine, open_sums
from crosstrace.trace.result import Trace

_STATE = "crosstrace online trace 1"
_SUM = "crosstrace sum of an online trace 1"


class Accumulated:
    """What every online trace has: the means of all tasks, reductions, measures and parts, and their state.

    Args:
        model: the model in training.
        tasks: all tasks that will occur; a step may have any of them.
        measures: of MEASURES.
        reductions: "example", the mean over every example of every step; "step", the mean over steps of the
            measure of the step's mean gradient.
        parts: for "example", examples of group g count for part g % parts (as in `trace`). So every part sees all of
            training, whose gradients shrink as it goes. For "step", a task's step number s counts for part s % parts.
        lr_weighted: weight each step by its learning rate.
        where: the sums are kept on the "device" of the model or on the "cpu".
        names: the parameters to trace; None: all.
        group: processes of torch.distributed that share out the examples of each step. All of them call everything
            here, with the same batches. When the sums are saved or read, they meet in the first process. Those of a
            sharded model do so without this argument, and each keeps the sums of its rows.

    Attributes:
        borrows: by task, whether the training's own forward is traced.
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
            f"{task}/{reduction}/{measure}/{part}": Mean(self._engine.parameters, measure, reduction, device)
            for task, reduction, measure, part in product(self._steps, reductions, measures, range(parts))
        }
        self.borrows: dict[str, bool] = {}
        self._compared: set[str] = set()  # tasks whose forward was compared with one of the trace's own
        self._is_complete = True  # whether no step was interrupted half-way

    @property
    def _parts(self) -> int:
        """Parts that a batch is cut into: for "step" whole steps are parts."""
        return self._settings["parts"] if "example" in self._settings["reductions"] else 1

    @property
    def _sharded(self) -> bool:
        return self._team is not None and self._team.sharded

    @property
    def _has_sums(self) -> bool:
        """Whether this process has sums once they have met: it is alone, the first of a team, or has its rows."""
        return self._team is None or self._sharded or self._team.processes.rank == 0

    def _factor(self, lr: float) -> float:
        return float(lr) if self._settings["lr_weighted"] else 1.0

    def _part_means(self, task: str, part: int) -> list[Mean]:
        """The means that examples of one part are added to."""
        measures = self._settings["measures"] if "example" in self._settings["reductions"] else []
        return [self._means[f"{task}/example/{measure}/{part}"] for measure in measures]

    def _step_means(self, task: str) -> list[Mean]:
        """The means that the task's step now is added to."""
        measures = self._settings["measures"] if "step" in self._settings["reductions"] else []
        part = self._steps[task] % self._settings["parts"]
        return [self._means[f"{task}/step/{measure}/{part}"] for measure in measures]

    def _open_task_sums(
        self,
        task: str,
        part: int,
        name: str,
        gradients: dict[str, Tensor],
        factor: float,
        scatter: Scatter | None = None,
    ) -> AbstractContextManager[dict[str, Tensor]]:
        """The sums that the engine adds examples of one task and part to; Σg of the step goes to `gradients`."""
        theta = self._engine.parameters[name]
        also = {}
        if "step" in self._settings["reductions"]:
            if name not in gradients:
                gradients[name] = torch.zeros_like(local(theta), dtype=sum_dtype(theta.dtype))
            also["sum"] = gradients[name]
        return open_sums(name, theta, self._part_means(task, part), factor, also, scatter)

    def _add_step(self, task: str, name: str, total: Tensor, count: int, factor: float) -> None:
        """Add a step's mean gradient of one parameter, given as its sum over `count` examples, which is used up."""
        means = self._step_means(task)
        theta = local(self._engine.parameters[name])
        for number, mean in enumerate(means, start=1):  # the last one uses the total itself up
            mean.add_step(name, total if number == len(means) else total.clone(), count, theta, factor)

    def _count(self, task: str, sizes: Iterable[tuple[int, int]], factor: float) -> None:
        """Count a task's step, all of whose sums were added: its weight, and the examples of each part."""
        for mean in self._step_means(task) if self._has_sums else ():
            mean.weight += factor
        for part, size in sizes:
            for mean in self._part_means(task, part):
                mean.weight += factor * size
        self._steps[task] += 1

    def replan(self) -> None:
        """Choose each parameter's rule anew at the next step: for a changed model, as by an adapter put on it."""
        self._engine.probed = 0

    def traces(self, *, last: bool = False) -> list[Trace]:
        """The traces so far, by task, reduction, measure, part; parts without a step yet are left out.

        A team's first process gets them, the others none. If the model is sharded, each gets its rows, and the values
        are sharded.

        Args:
            last: nothing will be added any more: the sums themselves become the traces, which saves their memory.
        """
        self._bring_together()
        meta = describe_engine(self._engine) | {k: self._settings[k] for k in ("parts", "lr_weighted")}
        if self._team is not None:
            meta["processes"] = self._team.processes.size
        self._is_complete = not last
        traces = []
        for key, mean in self._means.items():
            if mean.weight > 0:
                task, _, _, part = key.rsplit("/", 3)
                traces.append(
                    Trace(
                        task,
                        mean.measure.name,
                        mean.reduction,
                        "online",
                        mean.finished(keep=not last),
                        mean.weight,
                        meta | self._describe_forward(task) | {"part": int(part)},
                    )
                )
        return traces

    def _describe_forward(self, task: str) -> dict[str, str]:
        """Which forward was traced, if it could have been the training's."""
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
            "untold": sorted(self._engine.undecided),
            "seen": self._engine.seen,
            "borrows": dict(self.borrows),
        }

    def _sums(self) -> dict[str, Tensor]:
        """The sums themselves; if the model is sharded, laid out as its parameters."""
        like = self._engine.parameters
        return {f"{key}/{n}": laid(v, like[n]) for key, mean in self._means.items() for n, v in mean.total.items()}

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on bit for bit: {"header": JSON-able, "tensors": {…}}.

        A team's first process has it. If the model is sharded, every process has its rows."""
        self._bring_together()
        return {"header": self._header(), "tensors": {key: v.clone() for key, v in self._sums().items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the state of one process, or of the first of a team.

        Any number of processes can go on with it; each is given the whole state.

        Raises:
            UserError: it is of other settings or of another model.
        """
        tensors = state["tensors"]
        shapes = {key: tuple(v.shape) for key, v in tensors.items()}
        self._take(state["header"], shapes, lambda key, theta: piece(tensors[key], theta))

    def _take(
        self, header: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], read: Callable[[str, Tensor], Tensor]
    ) -> None:
        """Take over a saved state.

        Args:
            read: gives what this process holds of a sum, as it holds the sum's parameter.
        """
        self._check_settings(header)
        if shapes != {key: tuple(v.shape) for key, v in self._sums().items()}:
            raise UserError("the saved online trace has other parameters than the model; is it of another model?")
        self._take_header(header)
        for key, mean in self._means.items():
            mean.weight = header["weights"][key]
            for name, total in mean.total.items():
                total.copy_(read(f"{key}/{name}", self._engine.parameters[name]))
        self._is_complete = True
        if not self._has_sums:
            self._forget_sums()

    def _check_settings(self, header: Mapping[str, Any]) -> None:
        """Raise a `UserError` if a saved state is of other settings."""
        for name, value in self._settings.items():
            saved = header["settings"].get(name)
            if saved != value:
                raise UserError(
                    f"the saved online trace has {name} {saved!r}, this one {value!r}; "
                    "resume with the settings it was begun with"
                )

    def _take_header(self, header: Mapping[str, Any]) -> None:
        """Take over all but the sums of a saved state."""
        self._steps, self.borrows = dict(header["steps"]), dict(header.get("borrows", {}))
        # Not compared again: late in a training a rounded forward may seem to differ, and then the trace would go on
        # with another forward than if the training had not been interrupted.
        self._compared = set(self.borrows)
        self._engine.plan, self._engine.order = dict(header["plan"]), list(header["order"])
        self._engine.probed, self._engine.seen = header["probed"], header["seen"]
        self._engine.undecided = set(header["untold"])

    def save(self, stem: Path) -> None:
        """Write the state as <stem>.safetensors and <stem>.json.

        A team calls it together, and its first process writes. The processes of a sharded model write a folder <stem>,
        each its rows."""
        self._bring_together()
        if self._sharded:
            assert self._team is not None
            write(stem, self._sums(), self._team.processes, _STATE, self._header())
        elif self._has_sums:
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
        """Write each sum as <folder>/<sum>-<update>.safetensors, and remove its file of an earlier update.

        So hardly more than one state lies on the disk. A call that is killed leaves some sums of this update and the
        others of the earlier one. A training that goes on from the earlier one makes the same steps again and comes to
        this call again. The sums that are written already are then read, since those in memory began without what came
        before (`load_pieces`).

        Args:
            update: how many updates the training has made.

        Returns:
            the rest of the state, JSON-able, for `load_pieces`; of a team's first process.
        """
        self._bring_together()
        paths = {key: self._piece_path(folder, key, update) for key in self._means}
        processes = None if self._team is None else self._team.processes
        written = by_first(processes, lambda: [key for key, path in paths.items() if path.exists()])
        for key, path in paths.items() if self._has_sums else ():
            if key in written:
                self._load_sum(key, path)
            else:
                self._save_sum(key, path)
            if processes is None or processes.rank == 0:
                for other in folder.glob(path.name.replace(f"-{update}.", "-*.")):
                    if other != path:
                        remove(other)
        return self._header()

    def load_pieces(self, folder: Path, update: int, header: Mapping[str, Any], without: Collection[str] = ()) -> None:
        """Take over the state of an update, on any number of processes.

        A sum whose file is of a later update is empty until `save_pieces` is called at that update.

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
            path = self._piece_path(folder, key, update)
            if path.exists():
                self._load_sum(key, path)
            elif key.rsplit("/", 3)[0] not in without and not _is_later(path, update):
                raise UserError(f"{path} is missing, so the training cannot go on; begin the run again")
        self._is_complete = True
        if not self._has_sums:
            self._forget_sums()

    def _piece_path(self, folder: Path, key: str, update: int) -> Path:
        return folder / f"{key.replace('/', '+')}-{update}.safetensors"

    def _save_sum(self, key: str, path: Path) -> None:
        mean, like = self._means[key], self._engine.parameters
        if self._sharded:
            assert self._team is not None
            tensors = {name: laid(total, like[name]) for name, total in mean.total.items()}
            return write(path, tensors, self._team.processes, _SUM, {"weight": mean.weight})
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

            def read(name: str, rows: tuple[int, int] | None) -> Tensor:
                return file.get_tensor(name) if rows is None else file.get_slice(name)[slice(*rows)]

            take(shapes, read)

    def _bring_together(self) -> None:
        """Add up a team's sums in its first process, which goes on with them; the others begin anew.

        The sums of a sharded model's rows stay with the processes that hold these rows."""
        self._check_complete()
        if self._team is None or self._sharded:
            return
        for mean in self._means.values():
            mean.weight = self._team.add_up(mean.total, mean.weight)
        if not self._has_sums:
            self._forget_sums()

    def _forget_sums(self) -> None:
        for mean in self._means.values():
            mean.weight = 0.0
            for total in mean.total.values():
                total.zero_()

    def _check_complete(self) -> None:
        if not self._is_complete:
            raise RuntimeError(
                "an online trace was interrupted in the middle of a step and holds part of it, or its last traces were "
                "taken; load the state from before that"
            )


def _is_later(path: Path, update: int) -> bool:
    """Whether a sum has a file of a later update than the one that `path` names."""
    paths = path.parent.glob(path.name.replace(f"-{update}.", "-*."))
    return any(int(piece_path.stem.rpartition("-")[2]) > update for piece_path in paths)
