"""The optimisers that a training may use, their learning-rate schedule, and their state on disk.

All of them are the Trainer's own. The state is saved by the names of the parameters, as safetensors and JSON, so any
number of processes goes on from it.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crosstrace.core.errors import UserError
from crosstrace.core.pieces import Pieces, at_rest, laid, local, own_rows, processes_of, write
from crosstrace.training.recipes import Optimiser

FOLDER = "optimiser"  # in a checkpoint


@dataclass(frozen=True)
class Kind:
    """An optimiser that the Trainer has.

    Attributes:
        state: bytes of its state for a parameter of which a process holds so many numbers.
        of_trainer: how `TrainingArguments` name it; of AdamW the Trainer takes the fastest there is.
        package: the package that has it, if not PyTorch or transformers.
        in_rows: whether its state is made for the rows of a sharded model.
    """

    state: Callable[[Tensor, int], int]
    of_trainer: Mapping[str, Any] = field(default_factory=dict)
    package: str | None = None
    in_rows: bool = False


def _two_numbers(p: Tensor, numbers: int) -> int:
    """Two numbers in the parameter's dtype for each of its numbers."""
    return 2 * numbers * p.element_size()


def _rows_and_columns(p: Tensor, numbers: int) -> int:
    """A float32 mean for each row and each column of a matrix."""
    return 4 * (p.numel() // p.shape[-1] + p.numel() // p.shape[-2] if p.dim() > 1 else p.numel())


def _two_bytes(p: Tensor, numbers: int) -> int:
    """Two bytes for each number and two float32 for every 256, beside two tables; two float32 in small parameters."""
    return 2 * (numbers + 4 * numbers // 256 + 4 * 256) if numbers >= 4096 else 8 * numbers


KINDS = {
    "adamw": Kind(_two_numbers, in_rows=True),
    "adafactor": Kind(_rows_and_columns, {"optim": "adafactor"}),
    "adamw_8bit": Kind(_two_bytes, {"optim": "adamw_bnb_8bit"}, package="bitsandbytes"),
}


def arguments(optimiser: Optimiser) -> dict[str, Any]:
    """The optimiser as `TrainingArguments` take it; the schedule of its learning rate aside."""
    return {
        "learning_rate": optimiser.learning_rate,
        "adam_beta1": optimiser.betas[0],
        "adam_beta2": optimiser.betas[1],
        "weight_decay": optimiser.weight_decay,
        "max_grad_norm": optimiser.clip,
        **KINDS[optimiser.name].of_trainer,
    }


def learning_rate_factor(optimiser: Optimiser, total: int) -> Callable[[int], float]:
    """The schedule as a factor of the peak learning rate, for update 0, 1, …, total-1.

    Linear from 1/warmup to 1, then cosine to `floor`, linear to `floor`, or constant.
    """

    def factor(update: int) -> float:
        if update < optimiser.warmup:
            return (update + 1) / optimiser.warmup
        course = min(1.0, (update - optimiser.warmup) / max(1, total - optimiser.warmup))
        if optimiser.decay == "constant":
            return 1.0
        if optimiser.decay == "linear":
            return 1 - (1 - optimiser.floor) * course
        return optimiser.floor + (1 - optimiser.floor) * 0.5 * (1 + math.cos(math.pi * course))

    return factor


def check_optimisers(optimisers: Sequence[Optimiser], sharded: bool = False) -> None:
    """Raise a `UserError` unless these optimisers can be had, for a model that is sharded or not."""
    for optimiser in optimisers:
        kind = KINDS[optimiser.name]
        if kind.package is not None and importlib.util.find_spec(kind.package) is None:
            raise UserError(
                f"optimiser.name is {optimiser.name}, but {kind.package}, which has it, is not installed here; run "
                f"`pip install {kind.package}`, or take adamw or adafactor"
            )
        if sharded and not kind.in_rows:
            raise UserError(
                f"optimiser.name is {optimiser.name}, whose state is not made for the rows of a sharded model; take "
                "adamw, or model.sharded: false"
            )


def save(trainer: Any, folder: Path) -> None:
    """Write the state of a Trainer's optimiser, and how many updates were made; in pieces if its tensors are."""
    names = {id(p): name for name, p in at_rest(trainer.model).items()}
    tensors: dict[str, Tensor] = {}
    single: dict[str, dict[str, Any]] = {}  # numbers; one that is a tensor with its dtype
    memory: set[int] = set()
    for p, state in trainer.optimizer.state.items():
        name = names[id(p)]
        single[name] = {}
        for key, value in state.items():
            if not isinstance(value, Tensor):
                single[name][key] = value
            elif value.dim():
                place = local(value).untyped_storage().data_ptr()
                tensors[f"{name}/{key}"] = value.clone() if place in memory else value  # bitsandbytes shares tables
                memory.add(place)
            else:
                single[name][key] = [value.item(), str(value.dtype).removeprefix("torch.")]
    holders = processes_of(tensors)
    if holders is not None or trainer.args.should_save:
        header = {"updates": trainer.lr_scheduler.last_epoch, "single": single}
        write(folder / FOLDER, tensors, holders, FOLDER, header)


def load(trainer: Any, folder: Path) -> None:
    """Read what `save` wrote, and set the learning rate to where it was.

    Raises:
        UserError: the folder is damaged, or was saved by an earlier version.
    """
    pieces, optimizer, scheduler = Pieces(folder / FOLDER, FOLDER), trainer.optimizer, trainer.lr_scheduler
    if "single" not in pieces.header:
        raise UserError(f"{folder} was saved by an earlier version of crosstrace; train anew, with --overwrite")
    updates, single = pieces.header["updates"], pieces.header["single"]
    tensors: dict[str, list[str]] = {name: [] for name in single}
    for key in pieces.shapes:
        tensors[key.rpartition("/")[0]].append(key)
    names = {id(p): name for name, p in at_rest(trainer.model).items()}
    scheduler.last_epoch = updates
    scheduler._last_lr = [base * factor(updates) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas)]
    for group, rate in zip(optimizer.param_groups, scheduler._last_lr):
        group["lr"] = rate
        steps_on_device = group.get("fused") or group.get("capturable")
        for p in group["params"]:
            if (name := names[id(p)]) not in single:
                continue
            state: dict[str, Any] = {}
            for key, value in single[name].items():
                on_host = key == "step" and not steps_on_device
                state[key] = _scalar(value, torch.device("cpu") if on_host else p.device)
            for key in tensors[name]:
                value = pieces.read(key, own_rows(p)).to(p.device)
                state[key.rpartition("/")[2]] = laid(value, p) if pieces.shapes[key] == tuple(p.shape) else value
            # not by load_state_dict, which casts every number to the parameter's dtype
            optimizer.state[p] = state


def _scalar(value: Any, device: torch.device) -> Any:
    """A number, or from [number, dtype] the tensor that it was."""
    if not isinstance(value, list):
        return value
    number, dtype = value
    return torch.tensor(number, dtype=getattr(torch, dtype), device=device)
