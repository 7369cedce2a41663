"""The names and shapes of projections, and which of their rows and columns may belong to a head.

These are proposals, which `perturb` tries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from crosstrace.models.unit_maps import Map, Rows

# The children by which an attention module or an MLP is recognised: role -> the child's name.
ATTENTION = (
    {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"},  # Llama, Mistral, Qwen, Gemma
    {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"},  # OPT, GPT-J
    {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "dense"},  # Phi
    {"qkv": "qkv_proj", "o": "o_proj"},  # Phi-3
    {"qkv": "Wqkv", "o": "out_proj"},  # MPT
    {"qkv": "query_key_value", "o": "dense"},  # GPT-NeoX, BLOOM, Falcon
    {"qkv": "c_attn", "o": "c_proj"},  # GPT-2
)

MLP = (
    {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
    {"gate_up": "gate_up_proj", "down": "down_proj"},
    {"up": "up_proj", "down": "down_proj"},
    {"up": "dense_h_to_4h", "down": "dense_4h_to_h"},
    {"up": "c_fc", "down": "c_proj"},
    {"up": "fc1", "down": "fc2"},
    {"up": "fc_in", "down": "fc_out"},
)

# Names under which an attention module may have its own number of query heads, other than the config's.
COUNTS = ("num_heads", "num_attention_heads", "n_heads")


@dataclass(frozen=True)
class Proposal:
    """The maps of one attention module or MLP that its shapes allow; the first that holds is taken."""

    family: str  # "heads" or "neurons"
    layer: int
    path: str  # the module's path within its layer
    maps: list[Map]
    why: str | None = None  # why there is none


def base_layer(module: nn.Module) -> nn.Module:
    """The module inside an adapter's (PEFT's) wrapper; any other module itself."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def axis_of(module: nn.Module, side: str) -> int:
    """The weight's axis: nn.Linear keeps [out, in], GPT-2's Conv1D [in, out]."""
    return int((side == "out") == isinstance(module, Conv1D))


def width_of(module: nn.Module, side: str) -> int:
    """The weight's size along the axis of a side, "in" or "out"."""
    weight = base_layer(module).weight
    assert isinstance(weight, Tensor)
    return weight.shape[axis_of(base_layer(module), side)]


def attention_maps(home: nn.Module, modules: Mapping[str, nn.Module], heads: int) -> list[Map]:
    """The maps of an attention module with so many query heads in the usual layouts; none if the shapes forbid them."""
    width = width_of(modules["o"], "in")
    dim = width // heads
    rows = {role: width_of(module, "out") for role, module in modules.items() if role != "o"}
    kv_rows = rows["k"] if "k" in rows else (rows["qkv"] - width) // 2
    kv = kv_rows // dim if dim else 0
    gated = rows.get("q") == 2 * width  # a gate of each query's size beside it
    expected = {"q": width * (1 + gated), "k": kv * dim, "v": kv * dim, "qkv": width + 2 * kv * dim}
    fits = kv > 0 and heads * dim == width and heads % kv == 0
    if not fits or any(number != expected[role] for role, number in rows.items()):
        return []
    queries = torch.arange(heads).repeat_interleave(dim)
    keys = queries // (heads // kv)
    maps = []
    for slices in _fused_layouts(heads, kv) if "qkv" in rows else _separate_layouts(heads, kv, gated):
        claims = []
        for role, units in slices.items():
            name = f"a {'query' if role == 'q' else 'key/value'} head's rows of {role.upper()}"
            claims.append(
                Rows(
                    name=name,
                    unit="query_head" if role == "q" else "kv_head",
                    projection=modules["qkv" if "qkv" in rows else role],
                    unit_of_row=units.repeat_interleave(dim),
                    unit_of_column=queries if role == "q" else keys,
                    reaches_later={"q": False, "k": True, "v": None}[role] if "qkv" in rows else None,
                    mixes=role != "v",
                )
            )
        maps.append(Map(home, modules["o"], tuple(claims)))
    return maps


def _separate_layouts(heads: int, kv: int, gated: bool) -> list[dict[str, Tensor]]:
    """The usual layouts of separate projections Q, K and V: the unit of each slice of head-width rows.

    If Q has a gate beside each query, there are two: for each head its query and its gate; and all queries, then all
    gates.
    """
    query, key = torch.arange(heads), torch.arange(kv)
    queries = [query.repeat_interleave(2), query.repeat(2)] if gated else [query]
    return [{"q": q, "k": key, "v": key} for q in queries]


def _fused_layouts(heads: int, kv: int) -> list[dict[str, Tensor]]:
    """The usual layouts of Q, K and V in one projection: the unit of each slice of head-width rows, -1 for none.

    There are two: all of Q, then all of K, then all of V; and for each key/value head its queries, its key, its value.
    """
    query, key, none = torch.arange(heads), torch.arange(kv), torch.tensor(-1)
    blocks = {
        "q": torch.cat([query, none.expand(2 * kv)]),
        "k": torch.cat([none.expand(heads), key, none.expand(kv)]),
        "v": torch.cat([none.expand(heads + kv), key]),
    }
    queries, nobody, key = query.view(kv, -1), none.expand(kv, heads // kv), key.view(-1, 1)
    one = none.expand(kv, 1)
    groups = {
        "q": torch.cat([queries, one, one], 1).view(-1),
        "k": torch.cat([nobody, key, one], 1).view(-1),
        "v": torch.cat([nobody, one, key], 1).view(-1),
    }
    return [blocks, groups]
