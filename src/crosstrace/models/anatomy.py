"""Where a parameter sits: its layer, its kind, and the attention head or MLP neuron it belongs to.

Attention modules and MLPs are recognised by the names of their projections. The shapes of the projections and the
usual layouts then propose a map from rows and columns to heads and neurons. A map is believed only after it was tried
(`perturb.py`): perturbing a unit's rows must move exactly the unit's columns of the output projection's input. A layer
whose map is refuted, or that has none, has modules but no heads or no neurons, and `notes` say why.

    query head h    its rows of Q (and their biases), its columns of O
    key/value head  its rows of K and V (and their biases); several query heads may share one
    head            all of these; only where every query head has its own keys and values
    neuron j        row j of the gate and up projections (and biases), column j of the down projection

Other parameters of an attention module or MLP (sinks, gates, norms of single heads) belong to a unit if perturbing them
moves that unit's columns alone.

A LoRA adapter's parameters are of its projection's layer and kind. Rows of B belong where the rows of that projection
do, and columns of A where its columns do; the axis along the rank belongs to no unit.
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
from crosstrace.models.perturb import Map, Owned, Rows, owned, refuted, untriable
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
        notes: what has no heads or no neurons and why, and which parameters between the projections of heads or neurons
            belong to none of them; a sentence each.
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
        # unit -> name -> (axis, for every place along it the unit's index or -1); axis None: the whole tensor
        self._index: dict[str, dict[str, tuple[int | None, Tensor]]] = {unit: {} for unit in UNITS}
        self._cells: dict[str, list[tuple[int, int]]] = {unit: [] for unit in UNITS}  # (layer, column)
        self._sites: dict[str, dict[str, Tensor]] = {unit: {} for unit in UNITS}  # module -> index along its input
        self._kinds: list[str] = []

        for path, module in model.named_modules():
            self._simple_kinds(path, module)
        for role in ("input", "output"):
            module = getattr(model, f"get_{role}_embeddings", lambda: None)()
            for p in module.parameters() if module is not None else ():
                if self.kind[self._name[id(p)]] != "embedding":  # a tied unembedding is the embedding
                    self.kind[self._name[id(p)]] = "embedding" if role == "input" else "unembedding"
        config = getattr(model, "config", None)
        config = config.get_text_config() if config is not None else None
        # of a model that sees too, only what reads text has the heads that the text's config tells of
        decoder = getattr(model, "get_decoder", lambda: None)()
        if not isinstance(decoder, nn.Module) or not any(decoder.children()):  # some call their unembedding a decoder
            decoder = model
        self._users = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
        self._refused: list[tuple[str, str, int, str]] = []  # "heads" or "neurons", module within its layer, layer, why
        self._unowned: list[str] = []
        self._untold: str | None = None  # why it could not be tried which units other parameters belong to
        self._believe(model, decoder, list(self._propose(decoder, config)))
        self.notes = self._notes(decoder)
        self._whole_tensors()
        del self._name, self._path, self._users

    def _propose(self, decoder: nn.Module, config) -> Iterator[Proposal]:
        """The maps of all attention modules and MLPs of a known form."""
        for module in decoder.modules():
            children = dict(module.named_children())
            for family, forms, reader in (("heads", ATTENTION, self._attention), ("neurons", MLP, self._mlp)):
                form = next((f for f in forms if children.keys() >= set(f.values())), None)
                if form is None:
                    continue
                modules = {role: children[child] for role, child in form.items()}
                layer = self._set_kinds(modules, "attention" if family == "heads" else "mlp")
                if layer is None:
                    continue
                linear = all(isinstance(base_layer(m), (nn.Linear, Conv1D)) for m in modules.values())
                maps = reader(module, modules, config) if linear else "its projections are no linear layers"
                place = _within(self._path[id(module)])
                if isinstance(maps, str):
                    yield Proposal(family, layer, place, [], maps)
                else:
                    yield Proposal(family, layer, place, maps)

    def why(self, unit: str) -> str:
        """Why the model, or a part of it, has no such unit: the notes about it as one sentence."""
        self._known(unit)
        family = "neurons" if unit == "neuron" else "heads"
        return "; ".join(note for note in self.notes if note.startswith(f"no {family}")) or "there are none"

    def units(self, unit: str) -> list[str]:
        """The unit's labels, by layer: "L1.H3", "L1.KV0", "L0.N17", "layers.1.mlp.up", "L2", "norm".

        Empty where the model has no such unit, or where no map of them was believed; `why` tells.
        """
        self._known(unit)
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
        nowhere = None, torch.tensor(-1)
        masks = {
            name: self._mask(name, *self._index[unit].get(name, nowhere), wanted).clone()
            for name in (self.shapes if scope is None else scope)
        }
        return ParamSet(masks, label)

    def whole(self, scope: Sequence[str], name: str = "") -> ParamSet:
        """All parameters in scope; the set takes no memory of its own."""
        return ParamSet({n: torch.ones((), dtype=torch.bool).expand(self.shapes[n]) for n in scope}, name)

    def parts(self, unit: str, scope: Sequence[str] | None = None) -> dict[str, ParamSet]:
        """Label -> the parameters (in scope; default: all) of each unit that has any, for what looks at many units.

        A set leaves out the tensors that its unit has no part of, and takes no memory of its own.
        """
        self._known(unit)
        labels, masks = self.units(unit), defaultdict(dict)
        for name in self.shapes if scope is None else scope:
            axis, index = self._index[unit].get(name, (None, torch.tensor(-1)))
            for number in index.unique().tolist():
                if number >= 0:
                    masks[labels[number]][name] = self._mask(name, axis, index, number)
        return {label: ParamSet(masks[label], label) for label in labels if label in masks}

    def _mask(self, name: str, axis: int | None, index: Tensor, wanted: int) -> Tensor:
        """Where a tensor belongs to one unit: a view that is expanded along the other axes."""
        shape = self.shapes[name]
        along = index == wanted
        return (
            along.expand(shape)
            if axis is None
            else along.view([-1 if i == axis else 1 for i in range(len(shape))]).expand(shape)
        )

    def sites(self, unit: str) -> dict[str, Tensor]:
        """Where the units' activations are: module path -> for every column of its input the unit's number or -1.

        A head's is what it reads from its values, before the output projection mixes the heads; a neuron's is what
        goes into the down projection. Empty where the geometry is not known, and for units that are no such nodes.
        """
        self._known(unit)
        return dict(self._sites[unit])

    def axes(self, unit: str) -> tuple[list[str], list[str]]:
        """Labels of the rows (layers) and columns (heads, neurons, kinds) of `grid`."""
        self._known(unit)
        cells = self._cells[unit]
        if unit == "kind":
            return ["all"], list(self._kinds)
        rows = [f"L{layer}" for layer in sorted({layer for layer, _ in cells})]
        columns = sorted({column for _, column in cells})
        if unit == "module":
            return rows, [self._kinds[column] for column in columns]
        return rows, ["all"] if unit == "layer" else [f"{_LETTER[unit]}{column}" for column in columns]

    def grid(self, values: np.ndarray | Sequence[float], unit: str) -> np.ndarray:
        """One value per unit laid out as [layers, heads, neurons or kinds]; NaN where a layer has none."""
        self._known(unit)
        cells = np.array(self._cells[unit]).reshape(-1, 2)
        rows, row = np.unique(cells[:, 0], return_inverse=True)
        columns, column = np.unique(cells[:, 1], return_inverse=True)
        grid = np.full((len(rows), len(columns)), np.nan)
        grid[row, column] = values
        return grid

    def _known(self, unit: str) -> None:
        if unit not in UNITS:
            raise UserError(f"the unit is '{unit}', but it must be one of {', '.join(UNITS)}")

    def _tally(self, unit: str, along: Callable[[str, int | None], Tensor], names: Mapping[str, object]) -> np.ndarray:
        self._known(unit)
        n = len(self._cells[unit])
        totals = torch.zeros(n + 1, dtype=torch.int64)  # the last one takes what belongs to no unit (-1)
        for name, (axis, index) in self._index[unit].items():
            if name in names:
                totals.index_add_(0, index.remainder(n + 1).view(-1), along(name, axis).expand(index.shape).view(-1))
        return totals[:n].numpy()

    def _names(self, module: nn.Module) -> list[str]:
        """Canonical names of a module's own parameters, and of an adapter's on it."""
        return [self._name[id(p)] for p in module.parameters(recurse=base_layer(module) is not module)]

    def _simple_kinds(self, path: str, module: nn.Module) -> None:
        """The kinds that a module's class or path tells; attention and MLP follow from their families."""
        kind = None
        if "norm" in type(module).__name__.lower():
            kind = "norm"
        elif isinstance(base_layer(module), nn.Embedding):
            kind = "position"  # token embeddings are told apart afterwards, by identity
        elif re.search(r"(^|\.)(router|gate)$", path):
            kind = "router"
        elif re.search(r"(^|\.)experts(\.|$)", path):
            kind = "experts"
        for name in self._names(module) if kind else ():
            self.kind[name] = kind or "other"

    def _set_kinds(self, modules: Mapping[str, nn.Module], family: str) -> int | None:
        """Name the kinds of a family's modules; their layer, or None outside the layers."""
        names = [(role, name) for role, module in modules.items() for name in self._names(module)]
        for role, name in names:
            if self.kind[name] == "other":
                self.kind[name] = f"{family}.{role}"
        return self.layer[names[0][1]] if names else None

    def _attention(self, home: nn.Module, modules: Mapping[str, nn.Module], config) -> list[Map] | str:
        """The maps of an attention module that its shapes allow, or why there is none."""
        told = [_told(config, "num_attention_heads"), *(getattr(home, name, None) for name in COUNTS)]
        counts = [heads for heads in dict.fromkeys(told) if isinstance(heads, int) and heads > 0]
        if not counts:
            return "neither the config nor the module tells the number of heads"
        maps = [m for heads in counts for m in attention_maps(home, modules, heads)]
        if maps:
            return maps
        shapes = ", ".join(f"{width_of(x, 'out')} rows of {role.upper()}" for role, x in modules.items() if role != "o")
        return f"{shapes} and {width_of(modules['o'], 'in')} columns of O do not fit {counts[0]} heads"

    def _mlp(self, home: nn.Module, modules: Mapping[str, nn.Module], config) -> list[Map] | str:
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
                Rows(f"a neuron's row of its {role} projection", "neuron", module, of_row, ids)
                for (role, module), of_row in zip(inner.items(), layout)
            ]
            maps.append(Map(home, modules["down"], tuple(claims)))
        return maps

    def _believe(self, model: nn.Module, decoder: nn.Module, proposals: Sequence[Proposal]) -> None:
        """Try the maps, place the units of those that hold, and say why the others don't."""
        maps = [m for proposal in proposals for m in proposal.maps]
        why = untriable(model)
        verdicts, reached = refuted(model, decoder, maps) if maps and why is None else ([why] * len(maps), {})
        against = {id(m): verdict for m, verdict in zip(maps, verdicts)}
        held: list[tuple[Map, dict[str, int]]] = []
        for proposal in proposals:
            reason = proposal.why
            for m in proposal.maps:
                reason = against[id(m)] or self._tied(m)
                if reason is None:
                    held.append((m, self._place_map(proposal.layer, m)))
                    break
            if reason is not None:
                self._refused.append((proposal.family, proposal.place, proposal.layer, reason))
        try:
            owners = owned(model, decoder, [m for m, _ in held], reached)
        except Exception as error:  # a kernel may have no backward
            self._untold = str(error).strip().partition("\n")[0] or type(error).__name__
            return
        for own in owners:
            self._place_owned(own, held)

    def _tied(self, m: Map) -> str | None:
        """Why a map does not hold if its projections share their weights with other modules."""
        projections = [*(rows.projection for rows in m.rows), m.output]
        shared = any(self._users[id(p)] > 1 for x in projections for p in x.parameters())
        return "its projections share weights with other modules" if shared else None

    def _place_map(self, layer: int, m: Map) -> dict[str, int]:
        """Number a map's units, and say where they are; the first one's number of each kind."""
        counts = {rows.unit: rows.units for rows in m.rows}
        firsts = {unit: self._add(unit, layer, count) for unit, count in counts.items()}
        of_rows: dict[str, dict[int, tuple[nn.Module, Tensor]]] = {unit: {} for unit in UNITS}
        together = counts.get("kv_head") == counts.get("query_head")
        if together and "query_head" in counts:
            firsts["head"] = self._add("head", layer, counts["query_head"])
        for rows in m.rows:
            for unit in (rows.unit, "head") if "head" in firsts else (rows.unit,):
                _, ids = of_rows[unit].get(id(rows.projection), (None, rows.of_row))
                of_rows[unit][id(rows.projection)] = rows.projection, torch.maximum(ids, rows.of_row)
        columns = {rows.unit: rows.of_column for rows in m.rows if rows.unit != "kv_head"}
        if "head" in firsts:
            columns["head"] = columns["query_head"]
        for unit, first in firsts.items():
            for projection, ids in of_rows[unit].values():
                self._place(unit, projection, "out", first, ids)
            if unit in columns:
                self._place(unit, m.output, "in", first, columns[unit])
        return firsts

    def _place_owned(self, own: Owned, held: Sequence[tuple[Map, dict[str, int]]]) -> None:
        """Say which unit a parameter besides the projections belongs to."""
        name = self._name[id(own.parameter)]
        if own.unit is None:
            self._unowned.append(name)
            return
        firsts = next(firsts for m, firsts in held if m is own.map)
        for unit in (own.unit, "head") if own.unit != "neuron" and "head" in firsts else (own.unit,):
            self._index[unit][name] = own.axis, torch.where(own.ids >= 0, own.ids + firsts[unit], -1)

    def _notes(self, decoder: nn.Module) -> list[str]:
        """What `notes` holds."""
        numbers = {self.layer[self._name[id(p)]] for p in decoder.parameters() if id(p) in self._name}
        layers = {number for number in numbers if number is not None}
        some = {
            "heads": {layer for layer, _ in self._cells["query_head"]},
            "neurons": {layer for layer, _ in self._cells["neuron"]},
        }
        notes = []
        for family, form in (("heads", "attention module"), ("neurons", "MLP")):
            where: dict[tuple[str, str], list[int]] = defaultdict(list)  # (module, reason) -> layers
            refused = [(place, layer, why) for kind, place, layer, why in self._refused if kind == family]
            for place, layer, why in refused:
                where[place, why].append(layer)
            for layer in sorted(layers - some[family] - {layer for _, layer, _ in refused}):
                where["", f"no {form} of a known form"].append(layer)
            for (place, why), numbers in where.items():
                module = f" in {place}" if place else ""
                of = " of " if place else " in "
                notes.append(
                    f"no {family}{module}{'' if {*numbers} == layers else of + _layers(sorted({*numbers}))}: {why}"
                )
        patterns = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in self._unowned))
        if patterns:
            notes.append(f"of no single head or neuron: {', '.join(patterns)} (perturbing them moves several)")
        if self._untold is not None:
            notes.append(
                f"of no head or neuron: all but the projections, since a short backward fails ({self._untold})"
            )
        return notes

    def _whole_tensors(self) -> None:
        self._kinds = sorted(set(self.kind.values()), key=list(self.kind.values()).index)
        layers = sorted({layer for layer in self.layer.values() if layer is not None})
        modules = sorted(
            {(at, self._kinds.index(self.kind[name])) for name, at in self.layer.items() if at is not None}
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
        """Number `count` new units of a layer, after those it may already have; the first one's index."""
        cells = self._cells[unit]
        before = sum(1 for other, _ in cells if other == layer)
        cells.extend((layer, before + i) for i in range(count))
        return len(cells) - count

    def _place(self, unit: str, module: nn.Module, side: str, first: int, ids: Tensor) -> None:
        """Say which unit each place along a projection's input or output side belongs to."""
        index = torch.where(ids >= 0, ids + first, -1)
        if side == "in":
            self._sites[unit][self._path[id(module)]] = index
        for p, axis in _along(module, side):
            if p.shape[axis] == len(index):  # else a variant of LoRA that is laid out otherwise
                self._index[unit][self._name[id(p)]] = axis, index


def _along(module: nn.Module, side: str) -> Iterator[tuple[Tensor, int]]:
    """The parameters of a projection, and of a LoRA adapter on it, that have an axis along one of its sides."""
    plain: Any = base_layer(module)
    yield plain.weight, axis_of(plain, side)
    if side == "out" and getattr(plain, "bias", None) is not None:
        yield plain.bias, 0
    for part, axis in {"in": {"lora_A": 1}, "out": {"lora_B": 0, "lora_magnitude_vector": 0}}[side].items():
        for adapter in getattr(module, part, nn.ModuleDict()).values():  # (B may have a bias; magnitudes are DoRA's)
            for p in adapter.parameters():
                yield p, axis


def _told(config, name: str) -> Any:
    """A setting of the config, None where it has none, or one of its own for each layer (transformers then raises)."""
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


def _within(path: str) -> str:
    """A module's path after the number of its layer: "model.layers.3.self_attn" is "self_attn"."""
    parts = path.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[0] + 1 :]) if numbers else path


def _layer(name: str) -> int | None:
    """The first number in a parameter's path: "model.layers.3.mlp.experts.1.weight" is of layer 3."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)
