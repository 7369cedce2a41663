"""Controls of a set: random sets of its size, and the parameters that are strong for one task alone."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from crosstrace.core.errors import UserError
from crosstrace.core.pieces import laid, piece
from crosstrace.sets.paramset import ParamSet
from crosstrace.sets.selection import Ranking, values_of


def random_set(like: ParamSet, seed: int, *, within: Literal["global", "tensor"] = "global") -> ParamSet:
    """A uniformly random set of the size of `like`, drawn from its scope.

    Args:
        within: "tensor": each tensor has as many selected parameters as in `like`; "global": the total alone is kept.

    Raises:
        UserError: another value of `within`.
    """
    generator = torch.Generator().manual_seed(seed)
    if within == "tensor":
        counts = like.counts()
        masks = {n: _random_mask(m.numel(), counts[n], generator).view_as(m) for n, m in like.masks.items()}
    elif within == "global":
        pieces = _random_mask(like.total, like.size, generator).split([m.numel() for m in like.masks.values()])
        masks = {name: piece.view_as(mask) for (name, mask), piece in zip(like.masks.items(), pieces)}
    else:
        raise UserError(f"a random set is drawn within 'global' or 'tensor', not within '{within}'")
    name = "random" if within == "global" else "random_per_tensor"
    return ParamSet(masks, name, {"seed": seed, "within": within})


def random_sets(like: ParamSet, number: int, salt: str) -> dict[str, list[ParamSet]]:
    """The random controls of a set: `number` uniform ones, and `number` with the same count in each tensor.

    Args:
        salt: a name of the draw. Controls of different sets need different names: the same random numbers for all would
            not average out.
    """
    seeds = [zlib.crc32(f"{salt}/{draw}".encode()) for draw in range(number)]
    return {
        "random": [random_set(like, seed) for seed in seeds],
        "random_per_tensor": [random_set(like, seed, within="tensor") for seed in seeds],
    }


def only_set(
    strengths: Mapping[str, Mapping[str, Tensor]], task: str, others: Mapping[str, ParamSet], size: int
) -> ParamSet:
    """The single-task control: the task's `size` strongest parameters outside every other task's S_t(ρ).

    If S_task ∖ S_other is smaller than `size`, parameters beyond ρ in the task's ranking are taken too.

    Args:
        strengths: task -> its strengths.
        others: task -> S_t(ρ), whose scope is used; an entry for `task` itself is ignored.
        size: how many parameters to select.

    Raises:
        UserError: fewer than `size` parameters outside the other sets have a positive strength.
    """
    rivals = [pset for name, pset in others.items() if name != task]
    if task not in strengths or not rivals:
        raise UserError(
            f"the single-task set of '{task}' needs its strengths and another task's set; "
            f"found strengths of {list(strengths)} and sets of {list(others)}"
        )
    taken = rivals[0]
    for pset in rivals[1:]:
        taken = taken | pset
    values, processes = values_of(strengths[task], list(taken.masks))
    free = [v.masked_fill(piece(taken.masks[n], strengths[task][n]).to(v.device), 0) for n, v in values.items()]
    masks = zip(values, Ranking(free, processes=processes).top(size))
    control = ParamSet({n: laid(mask, strengths[task][n]) for n, mask in masks}, f"{task}_only", {"task": task})
    if control.size != size:
        raise UserError(
            f"the control '{task}_only' needs {size} parameters outside the other tasks' sets, but only "
            f"{control.size} there have a positive strength; choose a smaller fraction"
        )
    return control


def _random_mask(total: int, size: int, generator: torch.Generator) -> Tensor:
    """The mask [total] of a uniformly random subset of exactly `size`, without a permutation of `total` numbers.

    Positions are drawn with replacement until `size` different ones were drawn. No more are drawn at a time than are
    missing, so no draw is dropped, and every subset is equally likely.
    """
    few = min(size, total - size)
    mask = torch.zeros(total, dtype=torch.bool)
    while missing := few - int(mask.count_nonzero()):
        mask[torch.randint(total, (missing,), generator=generator)] = True
    return mask if few == size else ~mask
