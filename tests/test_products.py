"""Inner products of per-example gradients against gradients that are all there."""

from __future__ import annotations

import pytest
import torch
from reference import example_gradient
from test_trace import make_examples, pad
from tiny_models import tiny_model
from torch import Tensor, nn

from crosstrace.core.errors import UserError
from crosstrace.sets.paramset import ParamSet
from crosstrace.trace.products import gradient_products


def materialised(model: nn.Module, examples: list[dict[str, Tensor]], pset: ParamSet) -> Tensor:
    rows = []
    for example in examples:
        gradient = example_gradient(model, example)
        rows.append(torch.cat([gradient[name][mask] for name, mask in pset.masks.items()]))
    g = torch.stack(rows)
    return g @ g.t()


def some_sets(model: nn.Module) -> dict[str, ParamSet]:
    generator = torch.Generator().manual_seed(0)
    named = dict(model.named_parameters())
    share = {name: torch.rand(p.shape, generator=generator) < 0.3 for name, p in named.items()}
    first = next(name for name in named if ".1." in name)
    return {
        "all": ParamSet({name: torch.ones(p.shape, dtype=torch.bool) for name, p in named.items()}),
        "some": ParamSet(share),
        "rest": ParamSet({name: ~mask for name, mask in share.items()}),
        "one tensor": ParamSet({first: torch.ones(named[first].shape, dtype=torch.bool)}),
    }


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gpt2", "qwen3", "qwen3_moe", "mamba", "bloom"])
def test_products_equal_those_of_materialised_gradients(kind):
    model, examples = tiny_model(kind), make_examples(5)
    sets = some_sets(model)
    (found,) = gradient_products(model, [pad(examples)], sets)
    for label, pset in sets.items():
        expected = materialised(model, examples, pset)
        torch.testing.assert_close(found[label], expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))
    torch.testing.assert_close(found["some"] + found["rest"], found["all"], rtol=1e-10, atol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_tensor_is_one_vector(tied):
    model, examples = tiny_model("llama", tied=tied), make_examples(4)
    sets = {"all": some_sets(model)["all"]}
    (found,) = gradient_products(model, [pad(examples, "left")], sets)
    expected = materialised(model, examples, sets["all"])
    torch.testing.assert_close(found["all"], expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))


class Scaled(nn.Module):
    """A module of the user's own, with a parameter that is a number."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.factor = inner, nn.Parameter(torch.tensor(1.3, dtype=torch.float64))
        self.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.inner(input_ids=input_ids, attention_mask=attention_mask).logits * self.factor


def test_parameters_without_a_rule_and_without_a_use():
    model, examples = Scaled(tiny_model("llama", num_hidden_layers=1)), make_examples(4)
    sets = {name: ParamSet({name: torch.ones(p.shape, dtype=torch.bool)}) for name, p in model.named_parameters()}
    (found,) = gradient_products(model, [pad(examples)], sets)
    for name, pset in sets.items():
        expected = materialised(model, examples, pset)
        torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-12)
    assert float(found["factor"].abs().max()) > 0 == float(found["unused"].abs().max())


def test_tiles_and_token_products_change_nothing(monkeypatch):
    from crosstrace.trace import products, rules

    model, examples = tiny_model("llama"), make_examples(5)
    sets = {label: pset for label, pset in some_sets(model).items() if label != "one tensor"}
    (expected,) = gradient_products(model, [pad(examples)], sets)
    monkeypatch.setattr(products, "BLOCK", 5 * 7)
    monkeypatch.setattr(rules.Linear, "gram", lambda self: None)
    (found,) = gradient_products(model, [pad(examples)], sets)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


def test_token_products_are_used_where_examples_are_few(monkeypatch):
    from crosstrace.trace import rules

    used = []
    gram = rules.Linear.gram
    monkeypatch.setattr(rules.Linear, "gram", lambda self: used.append(gram(self)) or used[-1])
    model, examples = tiny_model("llama", hidden_size=96, intermediate_size=160, head_dim=24), make_examples(2)
    sets = {"all": some_sets(model)["all"]}
    (found,) = gradient_products(model, [pad(examples)], sets)
    assert any(value is not None for value in used)
    expected = materialised(model, examples, sets["all"])
    torch.testing.assert_close(found["all"], expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))


def test_nothing_is_left_behind_and_sets_of_other_models_are_told():
    model = tiny_model("llama").train()
    sets = {"all": some_sets(model)["all"]}
    state = torch.random.get_rng_state()
    list(gradient_products(model, [pad(make_examples(3))], sets))
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert torch.equal(state, torch.random.get_rng_state())
    with pytest.raises(UserError, match="made for another model"):
        list(gradient_products(tiny_model("gpt2"), [pad(make_examples(3))], sets))
    empty = ParamSet({name: torch.zeros_like(mask) for name, mask in sets["all"].masks.items()})
    with pytest.raises(UserError, match="is empty"):
        list(gradient_products(model, [pad(make_examples(3))], {"none": empty}))
    with pytest.raises(UserError, match="at least one set"):
        list(gradient_products(model, [pad(make_examples(3))], {}))
