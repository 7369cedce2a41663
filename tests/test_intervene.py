"""Interventions change what was selected, nothing else, and give every bit back."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model

from crosstrace.core.errors import UserError
from crosstrace.sets.interventions import ablated, grafted, replaced, snapshot
from crosstrace.sets.paramset import ParamSet
from crosstrace.sets.selection import scope


def raw(model):
    """Every bit of every parameter."""
    return {n: p.detach().view(torch.uint8).numpy().tobytes() for n, p in model.named_parameters()}


def some(model, share=0.3, seed=0, names=None):
    generator = torch.Generator().manual_seed(seed)
    names = names or scope(model, include_embeddings=True)
    named = dict(model.named_parameters())
    return ParamSet({n: torch.rand(named[n].shape, generator=generator) < share for n in names})


@pytest.fixture(params=["llama", "gpt2", "gpt_neox", "mixtral"])
def pair(request):
    """A tuned and a base model of one shape, in bf16, float32 and float64."""
    dtype = {"llama": torch.bfloat16, "gpt2": torch.float64}.get(request.param, torch.float32)
    return tiny_model(request.param, dtype, seed=1), tiny_model(request.param, dtype, seed=2)


def test_selected_values_are_replaced_and_the_rest_untouched(pair):
    model, other = pair
    before, base, pset = snapshot(model), snapshot(other), some(model)
    bits, storage = raw(model), [p.data_ptr() for p in model.parameters()]
    with ablated(model, pset, base=base) as inside:
        assert inside is model
        for name, p in model.named_parameters():
            assert torch.equal(p, torch.where(pset.masks[name], base[name], before[name]))
    assert raw(model) == bits
    with ablated(model, pset, to="zero"):
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name].masked_fill(pset.masks[name], 0))
    assert raw(model) == bits
    with grafted(other, pset, before):
        for name, p in other.named_parameters():
            assert torch.equal(p, torch.where(pset.masks[name], before[name], base[name]))
    assert raw(other) == raw_of(base)
    assert [p.data_ptr() for p in model.parameters()] == storage


def raw_of(tensors):
    return {n: t.view(torch.uint8).numpy().tobytes() for n, t in tensors.items()}


def test_bits_come_back_after_an_exception(pair):
    model, other = pair
    bits = raw(model)
    with pytest.raises(RuntimeError, match="inside"):
        with ablated(model, some(model), base=snapshot(other)):
            assert raw(model) != bits
            raise RuntimeError("inside")
    assert raw(model) == bits
    with pytest.raises(KeyboardInterrupt):
        with ablated(model, some(model), to="zero"):
            raise KeyboardInterrupt
    assert raw(model) == bits


def test_bits_come_back_after_a_failure_half_way():
    model = tiny_model("llama", torch.float32)
    bits, pset = raw(model), some(model)

    class Failing(dict):
        """Values whose third tensor cannot be read when it is needed."""

        reads = 0

        def __getitem__(self, name):
            self.reads += 1
            if self.reads > len(pset.masks) + 2:  # each is looked at once for its shape
                raise MemoryError(name)
            return super().__getitem__(name)

    with pytest.raises(MemoryError):
        with replaced(model, pset, Failing({n: t + 1 for n, t in snapshot(model).items()})):
            raise AssertionError("not reached")
    assert raw(model) == bits


def test_odd_bits_survive():
    model = tiny_model("llama", torch.float32)
    weight = model.get_parameter("model.norm.weight")
    payload = torch.tensor([0x7FC00123, -0x3FFFFF, 0x7F800000, -0x80000000], dtype=torch.int32)
    weight.data[:4] = payload.view(torch.float32)  # NaNs with payload, infinity, -0.0
    bits = raw(model)
    pset = ParamSet({"model.norm.weight": torch.ones(24, dtype=torch.bool)})
    with ablated(model, pset, to="zero"):
        assert not weight.any()
    assert raw(model) == bits


def test_nested_contexts_unwind():
    model, other = tiny_model("llama", seed=1), tiny_model("llama", seed=2)
    bits, base = raw(model), snapshot(other)
    with ablated(model, some(model, seed=1), base=base):
        outer = raw(model)
        with ablated(model, some(model, seed=2), to="zero"):
            assert raw(model) != outer
        assert raw(model) == outer
    assert raw(model) == bits


def test_a_tied_tensor_is_changed_once_for_both_uses():
    model = tiny_model("llama", tied=True)
    embedding, bits = model.get_input_embeddings().weight, raw(model)
    names = scope(model, include_embeddings=True)
    assert "lm_head.weight" not in names
    everything = some(model, share=2.0, names=["model.embed_tokens.weight"])
    with ablated(model, everything, to="zero"):
        assert not embedding.any() and model.get_output_embeddings().weight is embedding
        assert not model(input_ids=torch.tensor([[3, 4]])).logits.any()
    assert raw(model) == bits


def test_values_are_cast_to_the_models_type():
    model = tiny_model("llama", torch.bfloat16)
    tuned, pset, bits = snapshot(tiny_model("llama", torch.float32, seed=3)), some(model), raw(model)
    with grafted(model, pset, tuned):
        for name, p in model.named_parameters():
            assert torch.equal(p[pset.masks[name]], tuned[name].bfloat16()[pset.masks[name]])
    assert raw(model) == bits


def test_grafting_everything_makes_the_tuned_model():
    tuned, base = tiny_model("qwen3", seed=1), tiny_model("qwen3", seed=2)
    ids = torch.tensor([[3, 9, 4, 7]])
    wanted, plain = tuned(input_ids=ids).logits, base(input_ids=ids).logits
    with grafted(base, some(base, share=2.0), snapshot(tuned)):
        assert torch.equal(base(input_ids=ids).logits, wanted)
    assert torch.equal(base(input_ids=ids).logits, plain)


def test_an_empty_set_does_nothing_and_needs_nothing():
    model = tiny_model("llama")
    bits = raw(model)
    with replaced(model, some(model, share=0.0), {}):
        assert raw(model) == bits
    with replaced(model, ParamSet({"of another model": torch.zeros(3, dtype=torch.bool)}), {}):
        assert raw(model) == bits


def test_frozen_parameters_gradients_and_modes_are_left_alone():
    model = tiny_model("llama").train()
    first = next(model.parameters()).requires_grad_(False)
    versions = [p._version for p in model.parameters()]
    with ablated(model, some(model), to="zero"):
        pass
    assert not first.requires_grad and model.training
    assert all(p.grad is None for p in model.parameters())
    assert [p._version for p in model.parameters()] == versions


def test_sets_of_another_model_and_missing_values_are_named_before_anything_changes():
    model = tiny_model("llama")
    bits, pset, base = raw(model), some(model), snapshot(model)
    with pytest.raises(UserError, match=r"'transformer.*' is in the set but not in the model"):
        with ablated(model, some(tiny_model("gpt2")), to="zero"):
            pass
    with pytest.raises(UserError, match=r"shape \(53, 24\) in the model but \(53, 36\)"):
        with ablated(model, some(tiny_model("llama", hidden_size=36)), to="zero"):
            pass
    with pytest.raises(UserError, match=r"'model\.norm\.weight'.*values to put in"):
        with grafted(model, pset, {n: t for n, t in base.items() if n != "model.norm.weight"}):
            pass
    with pytest.raises(UserError, match="none were given"):
        with ablated(model, pset):
            pass
    with pytest.raises(UserError, match="'mean'"):
        with ablated(model, pset, to="mean"):
            pass
    assert raw(model) == bits
