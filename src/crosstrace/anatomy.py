"""Where a parameter sits: its layer, its kind, and the attention head or MLP neuron it belongs to.

Read off the model's modules, their shapes and, for fused projections, a table of known layouts. It knows
Llama-like models (separate projections, grouped queries), Phi-3, GPT-NeoX, BLOOM, Falcon, GPT-2 and OPT. A
model with another geometry still has layers and kinds, but no heads or neurons: it does not guess.

    query head h    its rows of Q (and their biases), its columns of O
    key/value head  its rows of K and V (and their biases); several query heads may share one
    head            all of these; only where every query head has its own keys and values
    neuron j        row j of the gate and up projections (and biases), column j of the down projection

A LoRA adapter's parameters are of its projection's layer and kind. Rows of B belong where the rows of that projection
do, and columns of A where its columns do; the axis along the rank belongs to no unit.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from crosstrace.errors import UserError
from crosstrace.shared import ParamSet

UNITS = ("query_head", "kv_head", "head", "neuron", "module", "layer", "kind")
_LETTER = {"query_head": "H", "kv_head": "KV", "head": "H", "neuron": "N"}

# The children by which an attention module or an MLP is recognised: role -> the child's name.
_ATTENTION = (
    {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"},  # Llama, Mistral, Qwen, Gemma
    {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"},  # OPT, GPT-J
    {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "dense"},  # Phi
    {"qkv": "qkv_proj", "o": "o_proj"},  # Phi-3
    {"qkv": "query_key_value", "o": "dense"},  # GPT-NeoX, BLOOM, Falcon
    {"qkv": "c_attn", "o": "c_proj"},  # GPT-2
)
_MLP = (
    {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
    {"gate_up": "gate_up_proj", "down": "down_proj"},
    {"up": "up_proj", "down": "down_proj"},
    {"up": "dense_h_to_4h", "down": "dense_4h_to_h"},
    {"up": "c_fc", "down": "c_proj"},
    {"up": "fc1", "down": "fc2"},
    {"up": "fc_in", "down": "fc_out"},
)
# How a fused projection is laid out cannot be seen from its shape, so it is known by architecture only.
# "blocks": all Q, then all K, then all V. "groups": for every key/value head its query heads, its K, its V.
_FUSED = {"phi3": "blocks", "gpt2": "blocks", "gpt_neox": "groups", "bloom": "groups", "falcon": "groups"}


class Anatomy:
    """The map from parameters to layers, kinds, heads and neurons of a causal language model.

    Attributes:
        shapes: name -> shape of every parameter, in canonical order.
        layer: name -> number of its layer, None outside the layers.
        kind: name -> "embedding", "unembedding", "position", "norm", "attention.q" (k, v, o, qkv),
            "mlp.up" (gate, gate_up, down), "experts", "router", "other".
    """

    layer: dict[str, int | None]
    kind: dict[str, str]

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
        for module in (decoder if isinstance(decoder, nn.Module) else model).modules():
            children = dict(module.named_children())
            for families, reader in ((_ATTENTION, self._attention), (_MLP, self._mlp)):
                family = next((f for f in families if children.keys() >= set(f.values())), None)
                if family is not None:
                    reader({role: children[child] for role, child in family.items()}, config)
        self._whole_tensors()
        del self._name, self._path

    def units(self, unit: str) -> list[str]:
        """The unit's labels, by layer: "L1.H3", "L1.KV0", "L0.N17", "layers.1.mlp.up", "L2", "norm".

        Empty where the model has no such unit or its geometry is not known.
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
                + (f"; they run from '{labels[0]}' to '{labels[-1]}'" if labels else ": its geometry is not known")
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
        return [self._name[id(p)] for p in module.parameters(recurse=_plain(module) is not module)]

    def _simple_kinds(self, path: str, module: nn.Module) -> None:
        """The kinds that a module's class or path tells; attention and MLP follow from their families."""
        kind = None
        if "norm" in type(module).__name__.lower():
            kind = "norm"
        elif isinstance(_plain(module), nn.Embedding):
            kind = "position"  # token embeddings are told apart afterwards, by identity
        elif re.search(r"(^|\.)(router|gate)$", path):
            kind = "router"
        elif re.search(r"(^|\.)experts(\.|$)", path):
            kind = "experts"
        for name in self._names(module) if kind else ():
            self.kind[name] = kind or "other"

    def _set_kinds(self, modules: Mapping[str, nn.Module], family: str) -> int | None:
        """Name the kinds of a family's modules; their layer, or None where no geometry can be read."""
        names = [(role, name) for role, module in modules.items() for name in self._names(module)]
        for role, name in names:
            if self.kind[name] == "other":
                self.kind[name] = f"{family}.{role}"
        readable = names and all(isinstance(_plain(m), (nn.Linear, Conv1D)) for m in modules.values())
        return self.layer[names[0][1]] if readable else None

    def _attention(self, modules: Mapping[str, nn.Module], config) -> None:
        layer = self._set_kinds(modules, "attention")
        heads = getattr(config, "num_attention_heads", None)
        if layer is None or not isinstance(heads, int):
            return
        width = _width(modules["o"], "in")
        dim = width // heads
        rows = {role: _width(module, "out") for role, module in modules.items() if role != "o"}
        kv_rows = rows["k"] if "k" in rows else (rows["qkv"] - width) // 2
        kv = kv_rows // dim if dim else 0
        if not kv or heads * dim != width or kv * dim != kv_rows or heads % kv:
            return
        q_ids, kv_ids = torch.arange(heads), torch.arange(kv)
        none = torch.full((1,), -1)
        if "qkv" in rows:  # which query head, and which key/value head, each of its slices of `dim` rows is
            layout = _FUSED.get(getattr(config, "model_type", ""))
            if rows["qkv"] != width + 2 * kv_rows or layout is None:
                return
            if layout == "blocks":
                q_of = {"qkv": torch.cat([q_ids, none.expand(2 * kv)])}
                kv_of = {"qkv": torch.cat([none.expand(heads), kv_ids, kv_ids])}
            else:
                q_of = {"qkv": torch.cat([q_ids.view(kv, -1), none.expand(kv, 2)], 1).view(-1)}
                kv_of = {"qkv": torch.cat([none.expand(kv, heads // kv), kv_ids.view(-1, 1).expand(kv, 2)], 1).view(-1)}
        elif rows["q"] == width and rows["v"] == kv_rows:
            q_of, kv_of = {"q": q_ids}, {"k": kv_ids, "v": kv_ids}
        else:  # a gate or a second value hides in the projection
            return
        query, keys = self._add("query_head", layer, heads), self._add("kv_head", layer, kv)
        together = self._add("head", layer, heads) if kv == heads else None
        for unit, first, index in (("query_head", query, q_of), ("kv_head", keys, kv_of)):
            for role, ids in index.items():
                self._place(unit, modules[role], "out", first, ids.repeat_interleave(dim))
        self._place("query_head", modules["o"], "in", query, q_ids.repeat_interleave(dim))
        if together is not None:
            self._place("head", modules["o"], "in", together, q_ids.repeat_interleave(dim))
            for role in rows:
                ids = torch.maximum(q_of.get(role, none), kv_of.get(role, none))
                self._place("head", modules[role], "out", together, ids.repeat_interleave(dim))

    def _mlp(self, modules: Mapping[str, nn.Module], config) -> None:
        layer = self._set_kinds(modules, "mlp")
        if layer is None:
            return
        neurons = _width(modules["down"], "in")
        expected = {"gate": neurons, "up": neurons, "gate_up": 2 * neurons}
        inner = {role: module for role, module in modules.items() if role != "down"}
        if any(_width(module, "out") != expected[role] for role, module in inner.items()):
            return
        first, ids = self._add("neuron", layer, neurons), torch.arange(neurons)
        self._place("neuron", modules["down"], "in", first, ids)
        for role, module in inner.items():
            self._place("neuron", module, "out", first, ids.repeat(expected[role] // neurons))

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


def _plain(module: nn.Module) -> nn.Module:
    """The module that an adapter (PEFT's) is put on, which its wrapper holds; of any other, itself."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def _along(module: nn.Module, side: str) -> Iterator[tuple[Tensor, int]]:
    """The parameters of a projection, and of a LoRA adapter on it, that have an axis along one of its sides."""
    plain: Any = _plain(module)
    yield plain.weight, _axis(plain, side)
    if side == "out" and getattr(plain, "bias", None) is not None:
        yield plain.bias, 0
    for part, axis in {"in": {"lora_A": 1}, "out": {"lora_B": 0, "lora_magnitude_vector": 0}}[side].items():
        for adapter in getattr(module, part, nn.ModuleDict()).values():  # (B may have a bias; magnitudes are DoRA's)
            for p in adapter.parameters():
                yield p, axis


def _axis(module: nn.Module, side: str) -> int:
    """The weight's axis: nn.Linear keeps [out, in], GPT-2's Conv1D [in, out]."""
    return int((side == "out") == isinstance(module, Conv1D))


def _width(module: nn.Module, side: str) -> int:
    weight = _plain(module).weight
    assert isinstance(weight, Tensor)
    return weight.shape[_axis(_plain(module), side)]


def _layer(name: str) -> int | None:
    """The first number in a parameter's path: "model.layers.3.mlp.experts.1.weight" is of layer 3."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)
