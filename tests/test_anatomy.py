"""The map from parameters to heads and neurons, proved on models against hooks on their activations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import VOCABULARY, tiny_model
from torch import nn

from crosstrace.anatomy import UNITS, Anatomy
from crosstrace.errors import UserError
from crosstrace.intervene import ablated, replaced
from crosstrace.shared import ParamSet, random_set, scope

# case -> (kind, settings, (layers, output projection, down projection), key/value heads)
LLAMA = ("model.layers", "self_attn.o_proj", "mlp.down_proj")
FALCON = ("transformer.h", "self_attention.dense", "mlp.dense_4h_to_h")
CASES = {
    "llama, grouped": ("llama", {}, LLAMA, 2),
    "llama, biases, tied": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        LLAMA,
        2,
    ),
    "llama, own keys": ("llama", {"num_key_value_heads": 4}, LLAMA, 4),
    "wide heads": ("qwen3", {"head_dim": 10}, LLAMA, 2),
    "qwen3": ("qwen3", {}, LLAMA, 2),
    "mistral": ("mistral", {}, LLAMA, 2),
    "gemma3": ("gemma3", {}, LLAMA, 2),
    "phi3": ("phi3", {}, LLAMA, 2),
    "gpt_neox": ("gpt_neox", {}, ("gpt_neox.layers", "attention.dense", "mlp.dense_4h_to_h"), 4),
    "gpt2": ("gpt2", {}, ("transformer.h", "attn.c_proj", "mlp.c_proj"), 4),
    "opt": ("opt", {}, ("model.decoder.layers", "self_attn.out_proj", "fc2"), 4),
    "bloom": ("bloom", {}, FALCON, 4),
    "falcon, one key": ("falcon", {}, FALCON, 1),
    "falcon, own keys": ("falcon", {"multi_query": False, "num_kv_heads": 4, "bias": True}, FALCON, 4),
    "falcon, grouped": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, FALCON, 2),
}
HEADS, LAYER = 4, 1  # the models' query heads; the layer that is looked at
IDS = torch.arange(3, 3 + 2 * 9).view(2, 9) % VOCABULARY
TIGHT = {"rtol": 0, "atol": 1e-12}


@pytest.fixture(params=CASES, scope="module")
def case(request):
    kind, settings, (layers, out, down), kv = CASES[request.param]
    model = tiny_model(kind, **settings)
    modules = dict(model.named_modules())
    path = f"{layers}.{LAYER}"
    return model, Anatomy(model), modules[f"{path}.{out}"], modules[f"{path}.{down}"], kv


@torch.no_grad()
def run(model: nn.Module, watch: nn.Module, zero: slice | list[int] | None = None):
    """Logits, and the input of the module `watch`, of which the columns `zero` are set to zero."""
    seen = []

    def hook(_module, inputs):
        seen.append(inputs[0].clone())
        if zero is not None:
            changed = inputs[0].clone()
            changed[..., zero] = 0
            return (changed, *inputs[1:])

    handle = watch.register_forward_pre_hook(hook)
    try:
        return model(input_ids=IDS).logits, seen[0].reshape(-1, seen[0].shape[-1])
    finally:
        handle.remove()


def columns_of(heads, dim):
    return [h * dim + i for h in heads for i in range(dim)]


def noise(model, pset):
    """Other values for the parameters of a set."""
    named = dict(model.named_parameters())
    return {n: named[n].detach() + torch.randn(named[n].shape, dtype=torch.float64) for n in pset.masks}


def test_zeroing_a_query_head_is_zeroing_its_contribution(case):
    model, anatomy, out, _, _ = case
    plain, attended = run(model, out)
    dim = attended.shape[-1] // HEADS
    for head in range(HEADS):
        with ablated(model, anatomy.members("query_head", f"L{LAYER}.H{head}"), to="zero"):
            found, _ = run(model, out)
        expected, _ = run(model, out, columns_of([head], dim))
        torch.testing.assert_close(found, expected, **TIGHT)
        assert (found - plain).abs().max() > 1e-6


def test_zeroing_a_kv_head_is_zeroing_the_query_heads_that_read_it(case):
    model, anatomy, out, _, kv = case
    dim = run(model, out)[1].shape[-1] // HEADS
    group = HEADS // kv
    for head in range(kv):
        with ablated(model, anatomy.members("kv_head", f"L{LAYER}.KV{head}"), to="zero"):
            found, _ = run(model, out)
        readers = range(head * group, (head + 1) * group)
        torch.testing.assert_close(found, run(model, out, columns_of(readers, dim))[0], **TIGHT)


def test_a_heads_projections_move_its_own_columns_and_no_others(case):
    """Rows of Q, and rows of K and V, one after the other: bit for bit nothing else moves in the layer."""
    model, anatomy, out, _, kv = case
    _, plain = run(model, out)
    dim, group = plain.shape[-1] // HEADS, HEADS // kv
    units = [("query_head", f"L{LAYER}.H{h}", [h]) for h in range(HEADS)]
    units += [("kv_head", f"L{LAYER}.KV{h}", range(h * group, (h + 1) * group)) for h in range(kv)]
    for unit, label, readers in units:
        pset = anatomy.members(unit, label)
        with replaced(model, pset, noise(model, pset)):
            _, found = run(model, out)
        moved = ((found - plain).abs() > 1e-9).any(0).nonzero().view(-1).tolist()
        assert moved == columns_of(readers, dim)


def test_heads_hold_every_attention_parameter_once(case):
    _, anatomy, _, _, kv = case
    of_attention = [n for n, kind in anatomy.kind.items() if kind.startswith("attention.")]
    outside = [n for n in of_attention if anatomy.kind[n] == "attention.o" and n.endswith("bias")]
    total = sum(anatomy.shapes[n].numel() for n in of_attention if n not in outside)
    assert anatomy.sizes("query_head").sum() + anatomy.sizes("kv_head").sum() == total
    assert len(set(anatomy.sizes("query_head"))) == 1 and len(set(anatomy.sizes("kv_head"))) == 1
    assert len(anatomy.units("query_head")) == 2 * HEADS and len(anatomy.units("kv_head")) == 2 * kv
    if kv == HEADS:
        assert anatomy.units("head") == anatomy.units("query_head")
        for h in range(HEADS):
            both = anatomy.members("query_head", f"L0.H{h}") | anatomy.members("kv_head", f"L0.KV{h}")
            assert anatomy.members("head", f"L0.H{h}") == both
    else:
        assert anatomy.units("head") == []


def test_zeroing_a_neuron_is_zeroing_its_activation(case):
    model, anatomy, _, down, _ = case
    plain, inner = run(model, down)
    neurons = inner.shape[-1]
    assert len(anatomy.units("neuron")) == 2 * neurons
    live = (inner.abs().amax(0) > 1e-3).nonzero().view(-1).tolist()  # a ReLU may never fire
    for neuron in (live[0], live[len(live) // 2], live[-1]):
        members = anatomy.members("neuron", f"L{LAYER}.N{neuron}")
        with ablated(model, members, to="zero"):
            found, _ = run(model, down)
        torch.testing.assert_close(found, run(model, down, [neuron])[0], **TIGHT)
        assert (found - plain).abs().max() > 1e-8
        with replaced(model, members, noise(model, members)):
            _, moved = run(model, down)
        assert ((moved - inner).abs() > 1e-12).any(0).nonzero().view(-1).tolist() == [neuron]


def test_neurons_hold_every_mlp_parameter_once(case):
    _, anatomy, _, _, _ = case
    names = [n for n, kind in anatomy.kind.items() if kind.startswith("mlp.")]
    inside = [n for n in names if not (anatomy.kind[n] == "mlp.down" and n.endswith("bias"))]
    assert anatomy.sizes("neuron").sum() == sum(anatomy.shapes[n].numel() for n in inside)


def test_every_parameter_has_a_kind_and_a_layer(case):
    model, anatomy, _, _, _ = case
    assert list(anatomy.kind) == [n for n, _ in model.named_parameters()]
    assert "other" not in anatomy.kind.values()
    for name, kind in anatomy.kind.items():
        inside = kind.startswith(("attention", "mlp"))
        assert anatomy.layer[name] in ((0, 1) if inside else (0, 1, None)), name
        if "embedding" in kind or kind == "position":
            assert anatomy.layer[name] is None
    assert anatomy.sizes("kind").sum() == sum(p.numel() for p in model.parameters())
    assert anatomy.sizes("layer").sum() == anatomy.sizes("module").sum()


def test_counts_equal_membership_one_unit_at_a_time(case):
    """The slow twin of `count`: intersect with each unit's own set."""
    model, anatomy, _, _, _ = case
    names = scope(model)
    everything = ParamSet({n: torch.ones(anatomy.shapes[n], dtype=torch.bool) for n in names})
    third = ParamSet({n: torch.rand(m.shape) < 0.3 for n, m in everything.masks.items()})
    for unit in UNITS:
        labels = anatomy.units(unit)[:30]
        units = [anatomy.members(unit, label, names) for label in labels]
        assert anatomy.count(third, unit)[:30].tolist() == [(third & u).size for u in units]
        assert anatomy.sizes(unit, names)[:30].tolist() == [u.size for u in units]


def test_labels_and_grid_by_hand():
    anatomy = Anatomy(tiny_model("llama", tied=True))
    assert anatomy.units("query_head")[:5] == ["L0.H0", "L0.H1", "L0.H2", "L0.H3", "L1.H0"]
    assert anatomy.units("kv_head") == ["L0.KV0", "L0.KV1", "L1.KV0", "L1.KV1"]
    assert anatomy.units("layer") == ["L0", "L1"]
    kinds = [
        "attention.q",
        "attention.k",
        "attention.v",
        "attention.o",
        "mlp.gate",
        "mlp.up",
        "mlp.down",
        "norm",
    ]
    assert anatomy.units("module") == [f"layers.{layer}.{kind}" for layer in (0, 1) for kind in kinds]
    assert anatomy.units("kind") == ["embedding", *kinds]
    assert anatomy.sizes("query_head").tolist() == [6 * 24 + 24 * 6] * 8
    assert anatomy.sizes("kv_head").tolist() == [2 * 6 * 24] * 4
    assert anatomy.sizes("neuron").tolist() == [3 * 24] * 80
    assert anatomy.sizes("query_head", ["model.layers.0.self_attn.q_proj.weight"]).tolist() == [144] * 4 + [0] * 4
    assert anatomy.grid(range(8), "query_head").tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert anatomy.axes("query_head") == (["L0", "L1"], ["H0", "H1", "H2", "H3"])
    assert anatomy.axes("module") == (["L0", "L1"], kinds)
    assert anatomy.grid(range(16), "module").shape == (2, 8)
    assert anatomy.grid([1, 2], "layer").tolist() == [[1], [2]] and anatomy.axes("layer")[1] == ["all"]
    assert anatomy.grid(range(9), "kind").shape == (1, 9)


def test_a_layer_without_a_module_leaves_a_hole_in_the_grid():
    anatomy = Anatomy(tiny_model("qwen3_moe", mlp_only_layers=[0]))
    assert {label.split(".")[0] for label in anatomy.units("neuron")} == {"L0"}
    rows, columns = anatomy.axes("module")
    grid = anatomy.grid(np.ones(len(anatomy.units("module"))), "module")
    assert grid.shape == (len(rows), len(columns))
    assert np.isnan(grid[1, columns.index("mlp.up")]) and np.isnan(grid[0, columns.index("experts")])


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_have_a_kind_but_no_neurons(kind):
    anatomy = Anatomy(tiny_model(kind))
    assert set(anatomy.kind.values()) >= {"experts", "router", "attention.q", "norm"}
    assert "other" not in anatomy.kind.values()
    assert anatomy.units("neuron") == [] and len(anatomy.units("query_head")) == 8


def test_unknown_geometry_has_layers_but_no_heads():
    model = tiny_model("mamba")
    anatomy = Anatomy(model)
    assert anatomy.units("query_head") == anatomy.units("kv_head") == anatomy.units("neuron") == []
    assert anatomy.grid([], "neuron").shape == (0, 0)
    assert anatomy.units("layer") == ["L0", "L1"] and "other" in anatomy.units("kind")
    like = ParamSet({n: torch.rand(p.shape) < 0.1 for n, p in model.named_parameters()})
    assert anatomy.count(random_set(like, 0), "layer").sum() > 0
    with pytest.raises(UserError, match="geometry is not known"):
        anatomy.members("query_head", "L0.H0")


def test_a_fused_projection_of_an_unknown_architecture_is_not_guessed():
    model = tiny_model("gpt_neox")
    model.config.model_type = "something_new"
    anatomy = Anatomy(model)
    assert anatomy.units("query_head") == [] and len(anatomy.units("neuron")) == 80
    assert anatomy.kind["gpt_neox.layers.0.attention.query_key_value.weight"] == "attention.qkv"


def test_unknown_units_and_labels_are_named():
    anatomy = Anatomy(tiny_model("llama"))
    for call in (anatomy.units, anatomy.axes, anatomy.sizes):
        with pytest.raises(UserError, match=r"'heads'.*query_head"):
            call("heads")
    with pytest.raises(UserError, match=r"'L9.H0'.*'L0.H0' to 'L1.H3'"):
        anatomy.members("query_head", "L9.H0")


def test_plain_modules_without_config_are_mapped_too():
    anatomy = Anatomy(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)))
    assert anatomy.kind == {"0.weight": "other", "0.bias": "other", "1.weight": "norm", "1.bias": "norm"}
    assert anatomy.units("query_head") == []
