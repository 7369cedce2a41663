"""Values that say which rows, columns and parameters of a model belong to which unit (an attention head or an MLP
neuron).

A map is a claim: `projections.py` and `anatomy.py` propose it, `perturb.py` tries it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Rows:
    """The rows of one projection that belong to units, and the columns that these units reach.

    Attributes:
        name: what a message calls them, e.g. "the rows of q_proj".
        unit: the kind of unit: "query_head", "kv_head" or "neuron".
        projection: the module whose output has these rows.
        unit_of_row: for each row its unit, or -1: int64 [rows].
        unit_of_column: for each column of the output projection's input its unit, or -1: int64 [columns].
        reaches_later: whether perturbing one token moves later tokens; None if it does not matter. Where queries and
            keys are parts of one projection, it tells queries (False) from keys (True).
        mixes: whether a quarter of a unit's rows moves most of the unit's columns, as rows of Q or K do through the
            softmax. It tells one head from several that were taken for one.
    """

    name: str
    unit: str
    projection: nn.Module
    unit_of_row: Tensor
    unit_of_column: Tensor
    reaches_later: bool | None = None
    mixes: bool = False

    @property
    def units(self) -> int:
        """Number of units."""
        return int(max(self.unit_of_row.max(), self.unit_of_column.max())) + 1


@dataclass(frozen=True)
class Map:
    """What is claimed of one attention module or MLP.

    Attributes:
        home: the module that holds the projections.
        output: its output projection.
        rows: the claims, each to be tried by itself.
    """

    home: nn.Module
    output: nn.Module
    rows: tuple[Rows, ...]


@dataclass(frozen=True)
class UnitParameter:
    """A parameter besides the projections that moves columns of units.

    Attributes:
        map: of the attention module or MLP.
        tensor: the parameter itself.
        unit: the kind of unit that it belongs to; None if it moves columns of several units.
        axis: along which its units lie; None if the whole tensor belongs to one unit.
        ids: the unit of each index along the axis: int64 [size], or [] for a whole tensor.
    """

    map: Map
    tensor: Tensor
    unit: str | None
    axis: int | None = None
    ids: Tensor = field(default_factory=lambda: torch.tensor(-1))


def other_modules(m: Map, maps: Sequence[Map]) -> list[tuple[nn.Module, list[nn.Parameter]]]:
    """The modules inside a map's home that have parameters of their own, with these parameters.

    The projections of all maps are left out.
    """
    projections = {id(rows.projection) for other in maps for rows in other.rows} | {id(x.output) for x in maps}
    inside = {id(x) for module in m.home.modules() if id(module) in projections for x in module.modules()}
    modules = []
    for module in m.home.modules():
        parameters = list(module.parameters(recurse=False))
        if id(module) not in inside and parameters:
            modules.append((module, parameters))
    return modules
