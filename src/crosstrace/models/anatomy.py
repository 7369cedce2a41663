"""Where a parameter sits: its layer, its kind, and the attention head or MLP neuron it belongs to.

Attention modules and MLPs are recognised by the names of their projections. The shapes of the projections and the
usual layouts then propose a map from rows and columns to heads and neurons. A map is believed only after it was tried
(`perturb.py`): perturbing a unit's rows must move exactly the unit's columns of the output projection's input. If a
layer has no map that holds, it has modules but no heads or no neurons, and `notes` say why.

    query head h    its rows of Q (and their biases), its columns of O
    key/value head  its rows of K and V (and their biases); several query heads may share one
    head            all of these; only where every query head has its own keys and values
    neuron j        row j of the gate and up projections (and biases), column j of the down projection

Other parameters of an attention module or MLP (sinks, gates, norms of single heads) belong to a unit if perturbing them
moves that unit's columns alone (`unit_parameters.py`).

A LoRA adapter's parameters are of its projection's layer and kind. The rows of B belong to the units of the
projection's rows, and the columns of A to the units of its columns. The axis along the rank belongs to no unit.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from crosstrace.core.errors import UserError
from crosstrace.models.perturb import try_maps, why_untriable
from crosstrace.models.projections import (
    ATTENTION,
    COUNTS,
    MLP,
    Proposal,
    attention_maps,
    axis_of,
    base_layer,
    width_of,
)
from crosstrace.models.unit_maps import Map, Rows, UnitParameter
from crosstrace.models.unit_parameters import find_unit_parameters
from crosstrace.sets.paramset import ParamSet

UNITS = ("query_head", "kv_head", "head", "neuron", "module", "layer", "kind")

_LETTER = {"query_head": "H", "kv_head": "KV", "head": "H", "neuron": "N"}


class Anatomy:
    """The map from parameters to layers, kinds, heads and neurons of a causal language model.

    Attributes:
        shapes: name -> shape of every parameter, in canonical order.
        layer: name -> number of its layer, None outside the layers.
        kind: name -> "embedding", "unembedding", "position", "norm", "attention.q" (k, v, o, qkv),
            "mlp.up" (gate, gate_up, down), "experts", "router", "other".
        notes: sentences: what has no heads or no neurons and why, and which parameters between the projections of
            heads or neurons belong to none of them.
    """

    layer: dict[str, int | None]
    kind: dict[str, str]
    notes: list[str]

    def __init__(self, model: nn.Module) -> None:
        named = dict(model.named_parameters())
        self._name = {id(p): name for name, p in named.items()}
        self._path = {id(module): path for path, module in model.named_modules()}
        self.shapes = {name: p.shape for name, p in named.items()}
        self.layer = {name: _layer(name) for name in named}
        self.kind = dict.fromkeys(named, "other")
        # unit -> name -> (axis, the unit's number or -1 at every index along it); axis None: the whole tensor
        self._index: dict[str, dict[str, tuple[int | None, Tensor]]] = {unit: {} for unit in UNITS}
        self._cells: dict[str, list[tuple[int, int]]] = {unit: [] for unit in UNITS}  # (layer, column)
        self._sites: dict[str, dict[str, Tensor]] = {unit: {} for unit in UNITS}  # module -> index along its input
        self._kinds: list[str] = []

        for path, module in model.named_modules():
            self._set_simple_kind(path, module)
        for role in ("input", "output"):
            module = getattr(model, f"get_{role}_embeddings", lambda: None)()
            for p in module.parameters() if module is not None else ():
                if self.kind[self._name[id(p)]] != "embedding":  # a tied unembedding is the embedding
                    self.kind[self._name[id(p)]] = "embedding" if role == "input" else "unembedding"
        config = getattr(model, "config", None)
        config = config.get_text_config() if config is not None else None
        # of a model for images too, only the part for text has the heads that the text's config describes
        decoder = getattr(model, "get_decoder", lambda: None)()
        if not isinstance(decoder, nn.Module) or not any(decoder.children()):  # some call their unembedding a decoder
            decoder = model
        self._users = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
        self._refused: list[tuple[str, str, int, str]] = []  # "heads" or "neurons", module within its layer, layer, why
        self._of_several_units: list[str] = []
        self._failed_backward: str | None = None  # why it could not be tried which units other parameters belong to
        self._accept_maps(model, decoder, list(self._propose_maps(decoder, config)))
        self.notes = self._write_notes(decoder)
        self._place_whole_tensors()
        del self._name, self._path, self._users

    def _propose_maps(self, decoder: nn.Module, config) -> Iterator[Proposal]:
        """The maps of all attention modules and MLPs of a known form."""
        for module in decoder.modules():
            children = dict(module.named_children())
            families = (("heads", ATTENTION, self._attention_maps), ("neurons", MLP, self._mlp_maps))
            for family, forms, propose in families:
                form = next((f for f in forms if children.keys() >= set(f.values())), None)
                if form is None:
                    continue
                modules = {role: children[child] for role, child in form.items()}
                layer = self._set_kinds(modules, "attention" if family == "heads" else "mlp")
                if layer is None:
                    continue
                linear = all(isinstance(base_layer(m), (nn.Linear, Conv1D)) for m in modules.values())
                maps = propose(module, modules, config) if linear else "its projections are no linear layers"
                path = _path_in_layer(self._path[id(module)])
                if isinstance(maps, str):
                    yield Proposal(family, layer, path, [], maps)
                else:
                    yield Proposal(family, layer, path, maps)

    def why(self, unit: str) -> str:
        """Why the model, or a part of it, has no such unit: the notes about it as one sentence."""
        self._check_unit(unit)
        family = "neurons" if unit == "neuron" else "heads"
        return "; ".join(note for note in self.notes if note.startswith(f"no {family}")) or "there are none"

    def units(self, unit: str) -> list[str]:
        """The unit's labels, by layer: "L1.H3", "L1.KV0", "L0.N17", "layers.1.mlp.up", "L2", "norm".

        Empty if the model has no such unit, or if no map of them was believed; `why` says which.
        """
        self._check_unit(unit)
        cells = self._cells[unit]
        if unit == "kind":
            return list(self._kinds)
        if unit == "layer":
            return [f"L{layer}" for layer, _ in cells]
        if unit == "module":
            return [f"layers.{layer}.{self._kinds[column]}" for layer, column in cells]
        return [f"L{layer}.{_LETTER[unit]}{column}" for layer, column in cells]

    def count(self, pset: ParamSet, unit: str) -> np.ndarray:
        """How many of the set's parameters each unit holds: int64 [n_units]."""

        def along(name: str, axis: int | None) -> Tensor:
            mask = pset.masks[name].cpu()
            if axis is None:
                return mask.count_nonzero()
            return mask.movedim(axis, 0).reshape(mask.shape[axis], -1).sum(1)

        return self._tally(unit, along, pset.masks)

    def sizes(self, unit: str, scope: Sequence[str] | None = None) -> np.ndarray:
        """How many parameters (in scope; default: all) each unit has: int64 [n_units]."""

        def along(name: str, axis: int | None) -> Tensor:
            shape = self.shapes[name]
            return torch.tensor(shape.numel()) if axis is None else torch.tensor(shape.numel() // shape[axis])

        return self._tally(unit, along, self.shapes if scope is None else dict.fromkeys(scope))

    def members(self, unit: str, label: str, scope: Sequence[str] | None = None) -> ParamSet:
        """The parameters (in scope; default: all) that belong to one unit."""
        labels = self.units(unit)
        if label not in labels:
            raise UserError(
                f"the model has no {unit} '{label}'"
                + (f"; they run from '{labels[0]}' to '{labels[-1]}'" if labels else f": {self.why(unit)}")
            )
        wanted = labels.index(label)
        no_unit = None, torch.tensor(-1)
        masks = {
            name: self._mask(name, *self._index[unit].get(name, no_unit), wanted).clone()
            for name in (self.shapes if scope is None else scope)
        }
        return ParamSet(masks, label)

    def whole(self, scope: Sequence[str], name: str = "") -> ParamSet:
        """All parameters in scope; the set takes no memory of its own."""
        return ParamSet({n: torch.ones((), dtype=torch.bool).expand(self.shapes[n]) for n in scope}, name)

    def parts(self, unit: str, scope: Sequence[str] | None = None) -> dict[str, ParamSet]:
        """Label -> the parameters (in scope; default: all) of each unit that has any.

        It is for callers that look at many units: a set takes no memory of its own. It leaves out the tensors that its
        unit has no part of.
        """
        self._check_unit(unit)
        labels, masks = self.units(unit), defaultdict(dict)
        for name in self.shapes if scope is None else scope:
            axis, index = self._index[unit].get(name, (None, torch.tensor(-1)))
            for number in index.unique().tolist():
                if number >= 0:
                    masks[labels[number]][name] = self._mask(name, axis, index, number)
        return {label: ParamSet(masks[label], label) for label in labels if label in masks}

    def _mask(self, name: str, axis: int | None, index: Tensor, wanted: int) -> Tensor:
        """The mask of one unit in a tensor: a view that is expanded along the other axes."""
        shape = self.shapes[name]
        along = index == wanted
        return (
            along.expand(shape)
            if axis is None
            else along.view([-1 if i == axis else 1 for i in range(len(shape))]).expand(shape)
        )

    def sites(self, unit: str) -> dict[str, Tensor]:
        """Where the units' activations are: module path -> for every column of its input the unit's number or -1.

        A head's activation is what it reads from its values, before the output projection mixes the heads. A neuron's
        is what goes into the down projection. Empty if the geometry is not known, or if units of this kind have no
        activations.
        """
        self._check_unit(unit)
        return dict(self._sites[unit])

    def axes(self, unit: str) -> tuple[list[str], list[str]]:
        """Labels of the rows (layers) and columns (heads, neurons, kinds) of `grid`."""
        self._check_unit(unit)
        cells = self._cells[unit]
        if unit == "kind":
            return ["all"], list(self._kinds)
        rows = [f"L{layer}" for layer in sorted({layer for layer, _ in cells})]
        columns = sorted({column for _, column in cells})
        if unit == "module":
            return rows, [self._kinds[column] for column in columns]
        return rows, ["all"] if unit == "layer" else [f"{_LETTER[unit]}{column}" for column in columns]

    def grid(self, values: np.ndarray | Sequence[float], unit: str) -> np.ndarray:
        """One value per unit, as [layers, heads, neurons or kinds]; NaN where a layer has none."""
        self._check_unit(unit)
        cells = np.array(self._cells[unit]).reshape(-1, 2)
        rows, row = np.unique(cells[:, 0], return_inverse=True)
        columns, column = np.unique(cells[:, 1], return_inverse=True)
        grid = np.full((len(rows), len(columns)), np.nan)
        grid[row, column] = values
        return grid

    def _check_unit(self, unit: str) -> None:
        if unit not in UNITS:
            raise UserError(f"the unit is '{unit}', but it must be one of {', '.join(UNITS)}")

    def _tally(self, unit: str, along: Callable[[str, int | None], Tensor], names: Mapping[str, object]) -> np.ndarray:
        self._check_unit(unit)
        n = len(self._cells[unit])
        totals = torch.zeros(n + 1, dtype=torch.int64)  # the last one takes what belongs to no unit (-1)
        for name, (axis, index) in self._index[unit].items():
            if name in names:
                totals.index_add_(0, index.remainder(n + 1).view(-1), along(name, axis).expand(index.shape).view(-1))
        return totals[:n].numpy()

    def _names(self, module: nn.Module) -> list[str]:
        """Canonical names of a module's own parameters, and of an adapter's on it."""
        return [self._name[id(p)] for p in module.parameters(recurse=base_layer(module) is not module)]

    def _set_simple_kind(self, path: str, module: nn.Module) -> None:
        """Set the kind that a module's class or path shows; attention and MLP follow from their families."""
        kind = None
        if "norm" in type(module).__name__.lower():
            kind = "norm"
        elif isinstance(base_layer(module), nn.Embedding):
            kind = "position"  # `__init__` sets the kind of token embeddings afterwards, by identity
        elif re.search(r"(^|\.)(router|gate)$", path):
            kind = "router"
        elif re.search(r"(^|\.)experts(\.|$)", path):
            kind = "experts"
        for name in self._names(module) if kind else ():
            self.kind[name] = kind or "other"

    def _set_kinds(self, modules: Mapping[str, nn.Module], family: str) -> int | None:
        """Set the kinds of a family's modules; returns their layer, or None outside the layers."""
        names = [(role, name) for role, module in modules.items() for name in self._names(module)]
        for role, name in names:
            if self.kind[name] == "other":
                self.kind[name] = f"{family}.{role}"
        return self.layer[names[0][1]] if names else None

    def _attention_maps(self, home: nn.Module, modules: Mapping[str, nn.Module], config) -> list[Map] | str:
        """The maps of an attention module that its shapes allow, or why there is none."""
        values = [_setting(config, "num_attention_heads"), *(getattr(home, name, None) for name in COUNTS)]
        counts = [heads for heads in dict.fromkeys(values) if isinstance(heads, int) and heads > 0]
        if not counts:
            return "neither the config nor the module tells the number of heads"
        maps = [m for heads in counts for m in attention_maps(home, modules, heads)]
        if maps:
            return maps
        shapes = ", ".join(f"{width_of(x, 'out')} rows of {role.upper()}" for role, x in modules.items() if role != "o")
        return f"{shapes} and {width_of(modules['o'], 'in')} columns of O do not fit {counts[0]} heads"

    def _mlp_maps(self, home: nn.Module, modules: Mapping[str, nn.Module], config) -> list[Map] | str:
        """The maps of an MLP that its shapes allow, or why there is none."""
        neurons = width_of(modules["down"], "in")
        ids = torch.arange(neurons)
        layouts = {"gate": [ids], "up": [ids], "gate_up": [ids.repeat(2), ids.repeat_interleave(2)]}
        inner = {role: module for role, module in modules.items() if role != "down"}
        for role, module in inner.items():
            if width_of(module, "out") != len(layouts[role][0]):
                return f"{width_of(module, 'out')} rows of its {role} projection do not fit {neurons} columns of down"
        maps = []
        for layout in product(*(layouts[role] for role in inner)):
            claims = [
                Rows(f"a neuron's row of its {role} projection", "neuron", module, unit_of_row, ids)
                for (role, module), unit_of_row in zip(inner.items(), layout)
            ]
            maps.append(Map(home, modules["down"], tuple(claims)))
        return maps

    def _accept_maps(self, model: nn.Module, decoder: nn.Module, proposals: Sequence[Proposal]) -> None:
        """Try the maps, place the units of those that hold, and note why the others don't."""
        maps = [m for proposal in proposals for m in proposal.maps]
        why = why_untriable(model)
        verdicts, reached = try_maps(model, decoder, maps) if maps and why is None else ([why] * len(maps), {})
        against = {id(m): verdict for m, verdict in zip(maps, verdicts)}
        held: list[tuple[Map, dict[str, int]]] = []
        for proposal in proposals:
            reason = proposal.why
            for m in proposal.maps:
                reason = against[id(m)] or self._why_tied(m)
                if reason is None:
                    held.append((m, self._place_map(proposal.layer, m)))
                    break
            if reason is not None:
                self._refused.append((proposal.family, proposal.path, proposal.layer, reason))
        try:
            parameters = find_unit_parameters(model, decoder, [m for m, _ in held], reached)
        except Exception as error:  # a kernel may have no backward
            self._failed_backward = str(error).strip().partition("\n")[0] or type(error).__name__
            return
        for parameter in parameters:
            self._place_parameter(parameter, held)

    def _why_tied(self, m: Map) -> str | None:
        """Why a map does not hold if its projections share their weights with other modules."""
        projections = [*(rows.projection for rows in m.rows), m.output]
        shared = any(self._users[id(p)] > 1 for x in projections for p in x.parameters())
        return "its projections share weights with other modules" if shared else None

    def _place_map(self, layer: int, m: Map) -> dict[str, int]:
        """Number a map's units, and note where they are; returns the first one's number of each kind."""
        counts = {rows.unit: rows.units for rows in m.rows}
        firsts = {unit: self._add(unit, layer, count) for unit, count in counts.items()}
        of_rows: dict[str, dict[int, tuple[nn.Module, Tensor]]] = {unit: {} for unit in UNITS}
        together = counts.get("kv_head") == counts.get("query_head")
        if together and "query_head" in counts:
            firsts["head"] = self._add("head", layer, counts["query_head"])
        for rows in m.rows:
            for unit in (rows.unit, "head") if "head" in firsts else (rows.unit,):
                _, ids = of_rows[unit].get(id(rows.projection), (None, rows.unit_of_row))
                of_rows[unit][id(rows.projection)] = rows.projection, torch.maximum(ids, rows.unit_of_row)
        columns = {rows.unit: rows.unit_of_column for rows in m.rows if rows.unit != "kv_head"}
        if "head" in firsts:
            columns["head"] = columns["query_head"]
        for unit, first in firsts.items():
            for projection, ids in of_rows[unit].values():
                self._place(unit, projection, "out", first, ids)
            if unit in columns:
                self._place(unit, m.output, "in", first, columns[unit])
        return firsts

    def _place_parameter(self, parameter: UnitParameter, held: Sequence[tuple[Map, dict[str, int]]]) -> None:
        """Note which unit a parameter besides the projections belongs to."""
        name = self._name[id(parameter.tensor)]
        if parameter.unit is None:
            self._of_several_units.append(name)
            return
        firsts = next(firsts for m, firsts in held if m is parameter.map)
        for unit in (parameter.unit, "head") if parameter.unit != "neuron" and "head" in firsts else (parameter.unit,):
            self._index[unit][name] = parameter.axis, torch.where(parameter.ids >= 0, parameter.ids + firsts[unit], -1)

    def _write_notes(self, decoder: nn.Module) -> list[str]:
        """The sentences of `notes`."""
        numbers = {self.layer[self._name[id(p)]] for p in decoder.parameters() if id(p) in self._name}
        layers = {number for number in numbers if number is not None}
        some = {
            "heads": {layer for layer, _ in self._cells["query_head"]},
            "neurons": {layer for layer, _ in self._cells["neuron"]},
        }
        notes = []
        for family, form in (("heads", "attention module"), ("neurons", "MLP")):
            layers_without: dict[tuple[str, str], list[int]] = defaultdict(list)  # (module, reason) -> layers
            refused = [(path, layer, why) for kind, path, layer, why in self._refused if kind == family]
            for path, layer, why in refused:
                layers_without[path, why].append(layer)
            for layer in sorted(layers - some[family] - {layer for _, layer, _ in refused}):
                layers_without["", f"no {form} of a known form"].append(layer)
            for (path, why), numbers in layers_without.items():
                module = f" in {path}" if path else ""
                word = " of " if path else " in "
                notes.append(
                    f"no {family}{module}{'' if {*numbers} == layers else word + _layers(sorted({*numbers}))}: {why}"
                )
        patterns = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in self._of_several_units))
        if patterns:
            notes.append(f"of no single head or neuron: {', '.join(patterns)} (perturbing them moves several)")
        if self._failed_backward is not None:
            notes.append(
                f"of no head or neuron: all but the projections, since a short backward fails ({self._failed_backward})"
            )
        return notes

    def _place_whole_tensors(self) -> None:
        """Note the kind, layer and module that each whole tensor belongs to."""
        self._kinds = sorted(set(self.kind.values()), key=list(self.kind.values()).index)
        layers = sorted({layer for layer in self.layer.values() if layer is not None})
        modules = sorted(
            {(layer, self._kinds.index(self.kind[name])) for name, layer in self.layer.items() if layer is not None}
        )
        self._cells["layer"] = [(layer, 0) for layer in layers]
        self._cells["module"] = modules
        self._cells["kind"] = [(0, column) for column in range(len(self._kinds))]
        for name, layer in self.layer.items():
            kind = self._kinds.index(self.kind[name])
            self._index["kind"][name] = None, torch.tensor(kind)
            if layer is not None:
                self._index["layer"][name] = None, torch.tensor(layers.index(layer))
                self._index["module"][name] = None, torch.tensor(modules.index((layer, kind)))

    def _add(self, unit: str, layer: int, count: int) -> int:
        """Number `count` new units of a layer, after those it may already have; returns the first one's number."""
        cells = self._cells[unit]
        before = sum(1 for other, _ in cells if other == layer)
        cells.extend((layer, before + i) for i in range(count))
        return len(cells) - count

    def _place(self, unit: str, module: nn.Module, side: str, first: int, ids: Tensor) -> None:
        """Note which unit each index along a projection's input or output side belongs to."""
        index = torch.where(ids >= 0, ids + first, -1)
        if side == "in":
            self._sites[unit][self._path[id(module)]] = index
        for p, axis in _parameters_along(module, side):
            if p.shape[axis] == len(index):  # else a variant of LoRA with another layout
                self._index[unit][self._name[id(p)]] = axis, index


def _parameters_along(module: nn.Module, side: str) -> Iterator[tuple[Tensor, int]]:
    """The parameters of a projection, and of a LoRA adapter on it, that have an axis along one of its sides."""
    plain: Any = base_layer(module)
    yield plain.weight, axis_of(plain, side)
    if side == "out" and getattr(plain, "bias", None) is not None:
        yield plain.bias, 0
    for part, axis in {"in": {"lora_A": 1}, "out": {"lora_B": 0, "lora_magnitude_vector": 0}}[side].items():
        for adapter in getattr(module, part, nn.ModuleDict()).values():  # (B may have a bias; magnitudes are DoRA's)
            for p in adapter.parameters():
                yield p, axis


def _setting(config, name: str) -> Any:
    """A setting of the config; None if it has none, or one for each layer (transformers then raises)."""
    try:
        return getattr(config, name, None)
    except Exception:
        return None


def _layers(numbers: Sequence[int]) -> str:
    """Some layers in words: "layer 3", "layers 0 to 5", "layers 0, 2, 4"."""
    first, last = numbers[0], numbers[-1]
    if len(numbers) == 1:
        return f"layer {first}"
    if list(numbers) == list(range(first, last + 1)):
        return f"layers {first} to {last}"
    return f"layers {', '.join(map(str, numbers))}"


def _path_in_layer(path: str) -> str:
    """A module's path after the number of its layer: "model.layers.3.self_attn" is "self_attn"."""
    parts = path.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[0] + 1 :]) if numbers else path


def _layer(name: str) -> int | None:
    """The first number in a parameter's path: "model.layers.3.mlp.experts.1.weight" is of layer 3."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)
