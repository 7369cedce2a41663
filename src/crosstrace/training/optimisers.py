"""The optimisers that a training may use, their learning-rate schedule, and their state on disk.

All of them are the Trainer's own. The state is saved by the names of the parameters, as safetensors and JSON, so any
number of processes goes on from it.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crosstrace.core.errors import UserError
from crosstrace.core.pieces import Pieces, at_rest, laid, local, own_rows, processes_of, write
from crosstrace.training.recipes import Optimiser

FOLDER = "optimiser"  # in a checkpoint
# What the Trainer calls each; of AdamW it takes the fastest there is.
_OF_THE_TRAINER = {"adafactor": {"optim": "adafactor"}, "adamw_8bit": {"optim": "adamw_bnb_8bit"}}


def arguments(optimiser: Optimiser) -> dict[str, Any]:
    """The optimiser as `TrainingArguments` take it; the schedule of its learning rate aside."""
    return {
        "learning_rate": optimiser.learning_rate,
        "adam_beta1": optimiser.betas[0],
        "adam_beta2": optimiser.betas[1],
        "weight_decay": optimiser.weight_decay,
        "max_grad_norm": optimiser.clip,
        **_OF_THE_TRAINER.get(optimiser.name, {}),
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
        if optimiser.name == "adamw_8bit" and importlib.util.find_spec("bitsandbytes") is None:
            raise UserError(
                "optimiser.name is adamw_8bit, which is bitsandbytes' and that is not installed here; run `pip install "
                "bitsandbytes`, or take adamw or adafactor"
            )
        if sharded and optimiser.name != "adamw":
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
