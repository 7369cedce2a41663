"""The map from parameters to heads and neurons, proved on models against hooks on their activations."""

from __future__ import annotations

import os

import architectures
import numpy as np
import pytest
import torch
from tiny_models import VOCABULARY, tiny_model
from torch import nn

from crosstrace.core.errors import UserError
from crosstrace.models.anatomy import UNITS, Anatomy
from crosstrace.sets.controls import random_set
from crosstrace.sets.interventions import ablated, replaced
from crosstrace.sets.paramset import ParamSet
from crosstrace.sets.selection import scope

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
    with pytest.raises(UserError, match="no heads: no attention module of a known form"):
        anatomy.members("query_head", "L0.H0")


def test_a_fused_projection_of_an_unknown_architecture_is_found_by_trying():
    model = tiny_model("gpt_neox")
    known = Anatomy(model)
    model.config.model_type = "something_new"
    anatomy = Anatomy(model)
    assert anatomy.units("query_head") == known.units("query_head") and anatomy.notes == []
    for unit in ("query_head", "kv_head", "head"):
        for label in known.units(unit):
            assert anatomy.members(unit, label) == known.members(unit, label)


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


# ---- a map is believed only if perturbing shows it


def reach(model: nn.Module, site: str, changes: dict[str, torch.Tensor]) -> torch.Tensor:
    """The slow way: which columns of a module's input change, in its first call, if some weights do. bool [columns]

    Args:
        changes: parameter -> the mask of what is perturbed.
    """
    seen, module, named = [], model.get_submodule(site), dict(model.named_parameters())
    handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    bits = {name: named[name].detach().clone() for name in changes}
    drawn = torch.Generator().manual_seed(5)
    ids = torch.arange(3, 12).view(1, -1)
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
            calls = len(seen)
            for name, mask in changes.items():
                noise = torch.randn(mask.shape, generator=drawn).to(bits[name])
                named[name].copy_(torch.where(mask, bits[name] + noise, bits[name]))
            model(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
        with torch.no_grad():
            for name, value in bits.items():
                named[name].copy_(value)
    before, after = (x.reshape(-1, x.shape[-1]) for x in (seen[0], seen[calls]))
    return (after - before).abs().amax(0) > 1e-6 * before.abs().max()


def check_units(model: nn.Module, anatomy: Anatomy, most: int = 3) -> dict[str, int]:
    """Perturb some units of each kind, one at a time, and compare what moves with the map; how many were perturbed.

    Units of a site are the first, one in the middle and the last; of layers that are alike only the first is looked at.
    """
    checked: dict[str, int] = {"query_head": 0, "kv_head": 0, "neuron": 0}
    sites = {unit: anatomy.sites(unit) for unit in checked}
    for unit in ("query_head", "neuron"):
        looked: set[str] = set()
        for site, index in sites[unit].items():
            form = ".".join(part for part in site.split(".") if not part.isdigit())
            if form in looked:
                continue
            looked.add(form)
            numbers = index.unique().tolist()
            for number in {numbers[i * (len(numbers) - 1) // (most - 1)] for i in range(most)}:
                found = reach(model, site, without(model, anatomy, unit, number, site))
                where = f"{unit} {anatomy.units(unit)[number]} of {site}"
                if unit == "neuron":  # a ReLU may never fire
                    assert not (found & (index != number)).any(), where
                else:
                    assert torch.equal(found, index == number), where
                checked[unit] += 1
            if unit == "query_head":
                checked["kv_head"] += check_keys(model, anatomy, site, index)
    return checked


def check_keys(model: nn.Module, anatomy: Anatomy, site: str, index: torch.Tensor) -> int:
    """Perturb each key/value head of an attention module: whole query heads move, each for one key/value head."""
    home, count = site.rpartition(".")[0] + ".", 0
    moved = torch.zeros(len(index), dtype=torch.int64)
    for number, label in enumerate(anatomy.units("kv_head")):
        changes = without(model, anatomy, "kv_head", number, site)
        if not any(name.startswith(home) for name in changes):
            continue
        found = reach(model, site, changes)
        heads = index[found].unique()
        assert torch.equal(found, torch.isin(index, heads)), f"{label} of {site}"
        moved += found
        count += 1
    assert (moved == 1).all(), site
    return count


def without(model: nn.Module, anatomy: Anatomy, unit: str, number: int, site: str) -> dict[str, torch.Tensor]:
    """A unit's parameters, without those of the output projection."""
    masks = anatomy.members(unit, anatomy.units(unit)[number]).masks
    return {name: mask for name, mask in masks.items() if mask.any() and not name.startswith(f"{site}.")}


def naive_heads(model: nn.Module, anatomy: Anatomy) -> dict[str, bool]:
    """Attention modules with separate projections of plain heads that were not believed, and whether their rows and
    columns agree after all, looked at in the slow way."""
    found = {}
    try:
        heads = getattr(model.config.get_text_config(), "num_attention_heads", None)
    except Exception:  # each layer has its own number
        return {}
    for path, module in model.named_modules():
        linear = {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}
        out = next((name for name in ("o_proj", "out_proj", "dense") if name in linear), None)
        site = f"{path}.{out}"
        if not heads or out is None or site in anatomy.sites("query_head"):
            continue
        width = linear[out].in_features
        kv = linear["k_proj"].out_features * heads // width if {"q_proj", "k_proj", "v_proj"} <= linear.keys() else 0
        if not kv or width % heads or heads % kv or linear["q_proj"].out_features != width:
            continue
        try:
            found[site] = all(
                torch.equal(reach(model, site, {f"{path}.{name}.weight": rows(linear[name], count, unit)}),
                            torch.arange(width) // (width // count) == unit)
                for name, count in (("q_proj", heads), ("k_proj", kv), ("v_proj", kv)) for unit in range(count)
            )  # fmt: skip
        except IndexError:  # never called
            continue
    return found


def rows(projection: nn.Linear, units: int, unit: int) -> torch.Tensor:
    """A mask of a unit's rows, if the units have equal blocks of them."""
    of = torch.arange(projection.out_features) // (projection.out_features // units)
    return (of == unit).view(-1, 1).expand(projection.weight.shape)


# Architectures with something of their own; `test_every_architecture` goes through all of them.
SOME = [
    "afmoe", "bitnet", "bloom", "deepseek_v3", "diffllama", "doge", "falcon", "gemma3_text", "gpt_bigcode", "gpt_neox",
    "gpt_oss", "gptj", "granite_swa", "minimax_m2", "mpt", "olmo2", "opt", "persimmon", "phi", "phi3", "qwen3_next",
    "qwen3", "stablelm",
]  # fmt: skip


def check_architecture(kind: str) -> str:
    """Check one architecture against the slow way; what was believed of it, as a line."""
    model = architectures.tiny(kind)
    anatomy = Anatomy(model)
    if any("a short forward fails" in note for note in anatomy.notes):
        return f"{kind}: {anatomy.notes[0]}"
    checked = check_units(model, anatomy)
    wrongly = [site for site, agrees in naive_heads(model, anatomy).items() if agrees]
    assert not wrongly, f"{kind}: {wrongly} not believed, though rows and columns agree"
    assert anatomy.units("query_head") or any(note.startswith("no heads") for note in anatomy.notes)
    assert anatomy.units("neuron") or any(note.startswith("no neurons") for note in anatomy.notes)
    return f"{kind}: {len(anatomy.units('query_head'))} heads, {len(anatomy.units('neuron'))} neurons, {checked}"


@pytest.mark.parametrize("kind", SOME)
def test_some_architectures(kind):
    check_architecture(kind)


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("CROSSTRACE_SLOW"), reason="takes minutes; set CROSSTRACE_SLOW=1")
def test_every_architecture():
    lines, unbuilt = [], []
    for kind in architectures.names():
        try:
            architectures.tiny(kind)
        except Exception as error:
            unbuilt.append(f"{kind}: not built ({type(error).__name__})")
            continue
        lines.append(check_architecture(kind))
    print("\n".join(lines + unbuilt))
    assert len(lines) > 150


@pytest.mark.parametrize("kind", ["diffllama", "olmo2", "bitnet", "minimax_m2"])
def test_heads_whose_rows_reach_other_columns_are_not_believed(kind):
    anatomy = Anatomy(architectures.tiny(kind))
    assert anatomy.units("query_head") == anatomy.units("kv_head") == [] and not anatomy.sites("query_head")
    assert any("a query head's rows of Q moves columns of other units too" in note for note in anatomy.notes)
    assert anatomy.kind["model.layers.0.self_attn.q_proj.weight"] == "attention.q"  # modules and layers stay
    with pytest.raises(UserError, match="moves columns of other units"):
        anatomy.members("query_head", "L0.H0")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "phi3", "gpt_neox", "olmo2", "falcon"])
def test_no_dtype_changes_what_is_believed(kind, dtype):
    anatomy = Anatomy(tiny_model(kind, dtype))
    assert len(anatomy.units("query_head")) == (0 if kind == "olmo2" else 8) and anatomy.units("neuron")


ORDERS = {
    "heads in reverse": lambda columns: columns.flip(0),
    "heads by turns": lambda columns: columns.view(4, 6).T.reshape(-1),
    "one column off": lambda columns: columns.roll(1),
    "two columns exchanged": lambda columns: torch.cat([columns[:5], columns[6:7], columns[5:6], columns[7:]]),
}


@pytest.mark.parametrize("order", ORDERS)
def test_one_layer_with_columns_in_another_order(order):
    model, columns = tiny_model("llama"), ORDERS[order](torch.arange(24))
    out = model.get_submodule("model.layers.1.self_attn.o_proj")
    out.register_forward_pre_hook(lambda module, args: (args[0][..., columns],))
    anatomy = Anatomy(model)
    assert anatomy.units("query_head") == [f"L0.H{h}" for h in range(4)]
    (note,) = anatomy.notes
    assert note.startswith("no heads in self_attn of layer 1: perturbing a query head's rows of Q moves")


@pytest.mark.parametrize("layout", ["interleaved", "swapped"])
def test_gate_and_up_in_one_projection(layout):
    """Phi-3's halves come in either order, or by turns as in GPT-OSS: the layout that holds is found."""
    model = tiny_model("phi3", torch.float32)
    for layer in model.model.layers:
        mlp = layer.mlp

        class Mlp(type(mlp)):
            def forward(self, x):
                both = self.gate_up_proj(x)
                gate, up = (both[..., ::2], both[..., 1::2]) if layout == "interleaved" else both.chunk(2, -1)[::-1]
                return self.down_proj(up * self.activation_fn(gate))

        mlp.__class__ = Mlp
    anatomy = Anatomy(model)
    name = "model.layers.0.mlp.gate_up_proj.weight"
    chosen = anatomy.members("neuron", "L0.N3").masks[name].any(1).nonzero()[:, 0].tolist()
    assert chosen == ([6, 7] if layout == "interleaved" else [3, 43])
    assert check_units(model, anatomy)["neuron"]


def test_a_number_of_heads_that_is_not_the_models_own():
    """Two heads of twice the width pass for one head, row by row and column by column, but for their mixing."""
    for told in (2, 8):
        model = tiny_model("llama", num_key_value_heads=4)
        model.config.num_attention_heads = told
        anatomy = Anatomy(model)
        assert anatomy.units("query_head") == [] and anatomy.notes[0].startswith("no heads in self_attn: ")
        for layer in model.model.layers:  # a module may know better
            layer.self_attn.num_heads = 4
        assert len(Anatomy(model).units("query_head")) == 8


def test_shared_projections_are_of_no_head():
    model = tiny_model("llama", num_key_value_heads=4)
    attention = model.get_submodule("model.layers.0.self_attn")
    attention.k_proj.weight = attention.q_proj.weight
    anatomy = Anatomy(model)
    assert {label.partition(".")[0] for label in anatomy.units("query_head")} == {"L1"}
    assert any("layer 0: its projections share weights" in note for note in anatomy.notes)


class Extras(nn.Module):
    """Attention with a parameter of its own in front of the output projection, for `add`."""

    def __init__(self, attention, shape, reader):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
        )  # fmt: skip
        self.own, self.reader = nn.Parameter(torch.randn(shape, dtype=torch.float64)), reader

    def forward(self, hidden_states, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, 6)
        q, k, v = (x(hidden_states).view(shape).transpose(1, 2) for x in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v, scores = self.reader(self.own, q, k, v)
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        weights = q @ k.transpose(2, 3) if scores is None else q @ k.transpose(2, 3) + scores
        mask = torch.ones(weights.shape[-2:], dtype=torch.bool).tril()
        mixed = weights.masked_fill(~mask, -1e9).softmax(-1) @ v
        return self.o_proj(mixed.transpose(1, 2).reshape(*hidden_states.shape[:-1], -1)), None


# case -> (shape of the parameter, what it does to q, k, v and the scores, its unit)
OWN = {
    "scale of query heads": ((4, 1, 1), lambda p, q, k, v: (q * p, k, v, None), "query_head"),
    "scale of key heads": ((2, 1, 1), lambda p, q, k, v: (q, k * p, v, None), "kv_head"),
    "norm of each value head": ((2, 6), lambda p, q, k, v: (q, k, v * p.unsqueeze(1), None), "kv_head"),
    "a flat norm": ((24,), lambda p, q, k, v: (q * p.view(4, 1, 6), k, v, None), "query_head"),
    "a flat norm, by turns": ((24,), lambda p, q, k, v: (q * p.view(6, 4).T.unsqueeze(1), k, v, None), "query_head"),
    "bias by distance": ((5, 4), lambda p, q, k, v: (q, k, v, distances(p, q)), "query_head"),
    "of one head": ((6,), lambda p, q, k, v: (torch.cat([q[:, :1], q[:, 1:2] * p, q[:, 2:]], 1), k, v, None), "one"),
    "of all heads": ((6,), lambda p, q, k, v: (q * p, k, v, None), None),
    "of two heads": ((2,), lambda p, q, k, v: (q * p.repeat_interleave(2).view(4, 1, 1), k, v, None), "kv_head"),
    "four numbers, but not of four heads": ((4,), lambda p, q, k, v: (q * p.sum(), k, v, None), None),
    "of nothing": ((4,), lambda p, q, k, v: (q, k, v, None), "nothing"),
}


def distances(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    places = torch.arange(q.shape[2])
    apart = (places.view(-1, 1) - places).clamp(0, len(p) - 1)
    return p[apart].permute(2, 0, 1)


@pytest.mark.parametrize("case", OWN)
def test_what_other_parameters_belong_to(case):
    shape, reader, unit = OWN[case]
    model = tiny_model("llama")
    layer = model.get_submodule("model.layers.1")
    layer.self_attn = Extras(layer.self_attn, shape, reader)
    name = "model.layers.1.self_attn.own"
    anatomy = Anatomy(model)
    assert len(anatomy.units("query_head")) == 8
    owners = {u: {i for i in range(8) if member(anatomy, u, i, name).any()} for u in ("query_head", "kv_head")}
    said = [note for note in anatomy.notes if "model.layers.*.self_attn.own" in note]
    if unit in (None, "nothing"):
        assert not owners["query_head"] and not owners["kv_head"]
        assert bool(said) == (unit is None)  # what moves nothing here is not of attention
        return
    assert not said
    if unit == "one":
        assert owners == {"query_head": {5}, "kv_head": set()} and member(anatomy, "query_head", 5, name).all()
        return
    other = "kv_head" if unit == "query_head" else "query_head"
    assert not owners[other] and owners[unit] == ({4, 5, 6, 7} if unit == "query_head" else {2, 3})
    for number in owners[unit]:
        mask = member(anatomy, unit, number, name)
        site = "model.layers.1.self_attn.o_proj"
        index = anatomy.sites("query_head")[site]
        own = index == number if unit == "query_head" else (index - 4) // 2 == number - 2
        assert torch.equal(reach(model, site, {name: mask}), own)
        assert mask.sum() == mask.numel() / len(owners[unit])


def member(anatomy: Anatomy, unit: str, number: int, name: str) -> torch.Tensor:
    labels = anatomy.units(unit)
    return anatomy.members(unit, labels[number], [name]).masks[name] if number < len(labels) else torch.zeros(1)


def test_sinks_and_gates_belong_to_their_heads():
    for kind, name in (("gpt_oss", "sinks"), ("granite_swa", "sinks"), ("afmoe", "gate_proj.weight")):
        model = architectures.tiny(kind)
        anatomy = Anatomy(model)
        full = f"model.layers.1.self_attn.{name}"
        shape = model.get_parameter(full).shape
        for head in range(4):
            chosen = anatomy.members("query_head", f"L1.H{head}", [full]).masks[full].reshape(shape[0], -1)
            assert chosen.any(1).nonzero()[:, 0].tolist() == list(
                range(head * shape[0] // 4, (head + 1) * shape[0] // 4)
            )
            assert chosen.sum() == chosen.numel() / 4


def test_norms_of_single_heads_belong_to_them():
    model = architectures.tiny("stablelm", qk_layernorm=True, num_key_value_heads=2)
    anatomy = Anatomy(model)
    home = "model.layers.0.self_attn"
    for unit, layer_norm, count in (("query_head", "q_layernorm", 4), ("kv_head", "k_layernorm", 2)):
        for number in range(count):
            name = f"{home}.{layer_norm}.norms.{number}.weight"
            label = anatomy.units(unit)[number]
            assert anatomy.members(unit, label, [name]).masks[name].all(), name
    cohere = architectures.tiny("cohere", use_qk_norm=True)
    anatomy, name = Anatomy(cohere), f"{home}.q_norm.weight"
    assert anatomy.members("query_head", "L0.H2", [name]).masks[name].any(1).tolist() == [False, False, True, False]


def test_nothing_is_left_changed():
    model = tiny_model("qwen3", torch.float32, attention_dropout=0.5).train()
    model.get_submodule("model.layers.0").eval()
    model.get_parameter("model.layers.0.self_attn.q_norm.weight").requires_grad_(False)
    seen = []
    out = model.get_submodule("model.layers.1.self_attn.o_proj")
    out.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    own = out.forward
    out.forward = own

    def state():
        modules = [
            (m.training, len(m._forward_hooks), len(m._forward_pre_hooks), m.__dict__.get("forward"))
            for m in model.modules()
        ]
        return modules, [(p.requires_grad, p.grad, p._version) for p in model.parameters()]

    before, bits = state(), [p.detach().clone() for p in model.parameters()]
    drawn = torch.random.get_rng_state()
    anatomy = Anatomy(model)
    assert len(anatomy.units("query_head")) == 8 and seen
    assert state() == before and torch.equal(torch.random.get_rng_state(), drawn)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), bits))
    with torch.inference_mode():
        again = Anatomy(model)
    assert again.units("query_head") == anatomy.units("query_head") and again.notes == anatomy.notes
    assert not torch.is_inference_mode_enabled() and state() == before


def test_a_model_that_fails_has_no_heads_and_is_left_as_it_was():
    model = tiny_model("llama").train()

    def fail(module, args):
        raise RuntimeError("not today")

    hook = model.get_submodule("model.layers.1").register_forward_pre_hook(fail)
    anatomy = Anatomy(model)
    assert anatomy.units("query_head") == anatomy.units("neuron") == []
    assert anatomy.notes[0] == "no heads in self_attn: it could not be tried, since a short forward fails (not today)"
    hook.remove()
    assert all("forward" not in module.__dict__ for module in model.modules()) and model.training
    assert len(Anatomy(model).units("query_head")) == 8


def test_models_without_numbers_are_not_tried():
    with torch.device("meta"):
        model = tiny_model("llama", torch.float32)
    anatomy = Anatomy(model)
    assert anatomy.units("layer") == ["L0", "L1"] and anatomy.units("query_head") == []
    assert "no numbers here" in anatomy.notes[0]


def test_an_adapter_shares_its_projections_heads():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model("llama", torch.float32), LoraConfig(r=2, target_modules="all-linear"))
    anatomy = Anatomy(model)
    assert anatomy.notes == [] and len(anatomy.units("query_head")) == 8
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"
    assert anatomy.members("query_head", "L0.H1", [name]).masks[name].any(1).nonzero()[:, 0].tolist() == list(
        range(6, 12)
    )


def test_the_bundled_base_is_believed():
    from crosstrace.models.loading import load_model

    anatomy = Anatomy(load_model("bundled"))
    assert anatomy.notes == [] and len(anatomy.units("query_head")) == 12
