"""Which units the parameters between the projections (sinks, norms, gates, scales) belong to.

A backward from the columns of some units gives a gradient of exactly zero to whatever these columns do not depend on.
The bits of the units' numbers say from which units each backward starts, so all units are told apart in 2 log2(n)
backwards, as `perturb.py` does in its forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from crosstrace.models.short_forward import ShortForward, draw_patterns
from crosstrace.models.unit_maps import Map, UnitParameter, other_modules

NOTHING, SEVERAL = -1, -2  # in place of a unit: what moves no column, and what moves those of several units


def find_unit_parameters(
    model: nn.Module, decoder: nn.Module, maps: Sequence[Map], reached: Mapping[int, set[str]]
) -> list[UnitParameter]:
    """The parameters between the projections of maps that hold, and which units they belong to.

    A parameter that moves no column is left out.

    Args:
        maps: maps that hold, one for each home.
        reached: as `try_maps` gives it.
    """
    candidates = [(m, parameters) for m, parameters in _other_parameters(maps) if parameters]
    if not candidates:
        return []
    forward = ShortForward(model, decoder, maps, examples=1)
    tensors = [p for _, parameters in candidates for _, p in parameters]
    unit_parameters: list[UnitParameter] = []
    with torch.inference_mode(False), torch.enable_grad(), _differentiable(tensors):
        columns = forward.run()
        for m, parameters in candidates:
            unit_parameters += _judge_parameters(m, parameters, columns[id(m.output)], reached)
    return unit_parameters


def _judge_parameters(
    m: Map, parameters: Sequence[tuple[nn.Module, Tensor]], columns: Tensor, reached: Mapping[int, set[str]]
) -> Iterator[UnitParameter]:
    """The parameters of one home that move columns [1, TOKENS, width] of its output projection's input."""
    if not columns.requires_grad:
        return
    tensors = [p for _, p in parameters]
    units_of: dict[str, list[Tensor]] = {}  # kind of unit -> for each parameter the unit that each of its numbers moves
    for rows in m.rows:
        if rows.unit not in units_of:
            units_of[rows.unit] = _moved_units(tensors, columns, rows.unit_of_column, rows.units)
    for number, (module, p) in enumerate(parameters):
        if all(bool((units[number] == NOTHING).all()) for units in units_of.values()):
            continue
        unit_parameter = UnitParameter(m, p, None)
        for unit in _likely_kinds(m, reached.get(id(module), set())):
            layout = _layout_of(units_of[unit][number])
            if layout is not None:
                unit_parameter = UnitParameter(m, p, unit, *layout)
                break
        yield unit_parameter


def _moved_units(parameters: Sequence[Tensor], columns: Tensor, unit_of_column: Tensor, units: int) -> list[Tensor]:
    """For each number of each parameter the unit whose columns it moves, NOTHING or SEVERAL."""
    random = torch.Generator().manual_seed(0)
    weights = torch.randn(columns.shape, generator=random).to(columns)
    pattern = draw_patterns(units, random)
    codes = [torch.zeros(p.shape, dtype=torch.int64) for p in parameters]
    touched = [torch.zeros(p.shape, dtype=torch.bool) for p in parameters]
    single = [torch.ones(p.shape, dtype=torch.bool) for p in parameters]  # for each bit, one value and not the other
    for bit, halves in enumerate(pattern.view(-1, 2, units)):
        moved = []
        for half in halves:
            chosen = (half[unit_of_column] & (unit_of_column >= 0)).to(columns)
            loss = (columns * weights * chosen).sum()
            gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            moved.append([g.cpu() != 0 if g is not None else torch.zeros_like(t) for g, t in zip(gradients, touched)])
        for number, (without_bit, with_bit) in enumerate(zip(*moved)):
            codes[number] += with_bit.long() << bit
            touched[number] |= without_bit | with_bit
            single[number] &= without_bit ^ with_bit
    # the code of each unit, as its own pattern spells it
    spelled = (pattern.view(-1, 2, units)[:, 1].long() << torch.arange(len(pattern) // 2).view(-1, 1)).sum(0)
    unit_of_code = torch.full((1 << len(pattern) // 2,), SEVERAL)
    unit_of_code[spelled] = torch.arange(units)
    moved_units = []
    for code, is_touched, is_single in zip(codes, touched, single):
        unit = torch.where(is_single, unit_of_code[code], torch.tensor(SEVERAL))
        moved_units.append(torch.where(is_touched, unit, torch.tensor(NOTHING)))
    return moved_units


def _layout_of(units: Tensor) -> tuple[int | None, Tensor] | None:
    """The axis of a parameter along which its units lie, and the unit of each index there.

    The axis is None if the whole parameter is of one unit. There is no layout, and None is returned, if some number
    moves several units, or the units do not lie along an axis.

    Args:
        units: the unit that each number of the parameter moves, as `_moved_units` gives it.
    """
    if bool((units == SEVERAL).any()):
        return None
    last = int(units.max())
    lowest = torch.where(units == NOTHING, last, units)
    if bool((lowest == last).all()):
        return None, torch.tensor(last)
    for axis in range(units.dim()):
        others = [i for i in range(units.dim()) if i != axis]
        along = units.amax(others) if others else units
        expanded = along.view([-1 if i == axis else 1 for i in range(units.dim())])
        if bool(((units == NOTHING) | (units == expanded)).all()):
            return axis, along
    return None


def _likely_kinds(m: Map, reached: set[str]) -> list[str]:
    """The kinds of unit that a module's parameters may belong to, the likeliest first.

    A module belongs to key/value heads if only keys or values reach its input, and to query heads if only queries do.
    A single key/value head owns only what keys or values reach: what moves every column may be of no head.
    """
    counts = {rows.unit: rows.units for rows in m.rows}
    if len(reached) == 1:
        return [unit for unit in counts if unit in reached]
    return [unit for unit, count in counts.items() if unit != "kv_head" or count > 1]


def _other_parameters(maps: Sequence[Map]) -> list[tuple[Map, list[tuple[nn.Module, Tensor]]]]:
    """For each map the parameters inside its home that are not the projections' (of any map), each once."""
    taken: set[int] = set()
    by_map = []
    for m in sorted(maps, key=lambda m: sum(1 for _ in m.home.modules())):  # a home inside another one comes first
        parameters: list[tuple[nn.Module, Tensor]] = []
        for module, module_parameters in other_modules(m, maps):
            for p in module_parameters:
                if id(p) not in taken and p.is_floating_point():
                    taken.add(id(p))
                    parameters.append((module, p))
        by_map.append((m, parameters))
    return by_map


@contextmanager
def _differentiable(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Parameters that have gradients, also those that are frozen."""
    frozen = [p for p in parameters if not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(True)
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)
