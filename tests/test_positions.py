"""Grafting at positions: the ends are the base and plain grafting; between them, every token has its own weights."""

from __future__ import annotations

import pytest
import torch
from test_circuit import WORDS, asked
from tiny_facts import tiny_world
from tiny_models import tiny_model
from torch import Tensor, nn

from crosstrace.analyses.positions import PLACES, at_places, grafted_at
from crosstrace.core.errors import UserError
from crosstrace.data.text import biographies
from crosstrace.data.tokens import collate, encode
from crosstrace.sets.interventions import grafted, snapshot
from crosstrace.sets.paramset import ParamSet
from crosstrace.training.evaluation import recall

KINDS = ["llama", "gpt_neox", "gpt2", "qwen3", "qwen3_moe", "opt", "gemma3"]


def pair_of(kind: str, **settings) -> tuple[nn.Module, dict[str, Tensor]]:
    """A base and another model's values."""
    models = [
        tiny_model(kind, vocab_size=len(WORDS), max_position_embeddings=128, seed=seed, **settings) for seed in (0, 1)
    ]
    return models[0], snapshot(models[1])


def everything(model: nn.Module, share: float = 1.0) -> ParamSet:
    generator = torch.Generator().manual_seed(0)
    return ParamSet({n: torch.rand(p.shape, generator=generator) < share for n, p in model.named_parameters()})


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@pytest.mark.parametrize("kind", KINDS)
def test_at_all_tokens_it_is_plain_grafting_and_at_none_the_base(kind):
    model, tuned = pair_of(kind)
    batch = collate(asked(6), "answer", pad_id=0)
    real = batch["attention_mask"] != 0
    for share in (1.0, 0.3):
        pset = everything(model, share)
        base = logits(model, batch)
        with grafted(model, pset, tuned):
            whole = logits(model, batch)
        with grafted_at(model, pset, tuned, at_places(asked(6), PLACES)):
            found = logits(model, batch)
        torch.testing.assert_close(found[real], whole[real], rtol=1e-9, atol=1e-9)
        with grafted_at(model, pset, tuned, at_places(asked(6), [])):
            found = logits(model, batch)
        torch.testing.assert_close(found, base, rtol=0, atol=0)
        assert not torch.allclose(base[real], whole[real])
    torch.testing.assert_close(logits(model, batch), base, rtol=0, atol=0)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_tokens_before_the_graft_are_the_bases_and_one_layer_is_by_hand(kind):
    """Of one linear layer's output each token has that of its own weights, whatever comes before."""
    model, tuned = pair_of(kind)
    items = asked(6)
    batch = collate(items, "answer", pad_id=0)
    with grafted_at(model, everything(model), tuned, at_places(items, ["last"])):
        found = logits(model, batch)
    base = logits(model, batch)
    for row, item in enumerate(items):
        last = int(item.targets["object"].nonzero()[0]) - 1
        torch.testing.assert_close(found[row, :last], base[row, :last], rtol=1e-10, atol=1e-10)
        assert not torch.allclose(found[row, last], base[row, last])
    name = "model.layers.1.mlp.down_proj.weight" if kind == "llama" else "transformer.h.1.mlp.c_proj.weight"
    only = ParamSet({name: torch.ones_like(model.get_parameter(name), dtype=torch.bool)})
    seen: list[tuple[Tensor, Tensor]] = []
    module = model.get_submodule(name.removesuffix(".weight"))
    with grafted_at(model, only, tuned, at_places(items, ["subject"])):
        with module.register_forward_hook(lambda m, args, out: seen.append((args[0], out))):
            logits(model, batch)
    inputs, outputs = seen[-1]
    mask = at_places(items, ["subject"])(batch["input_ids"])
    bias = getattr(module, "bias", None)
    for where, weight in ((mask, tuned[name]), (~mask, model.get_parameter(name).detach())):
        expected = inputs @ (weight if kind == "gpt2" else weight.t()) + (0 if bias is None else bias)
        torch.testing.assert_close(outputs[where], expected[where], rtol=1e-10, atol=1e-10)


def test_places_are_disjoint_and_cover_the_text():
    items = asked(12)
    batch = collate(items, "answer", pad_id=0)
    masks = torch.stack([at_places(items, [place])(batch["input_ids"]) for place in PLACES])
    assert torch.equal(masks.sum(0), batch["attention_mask"])
    for row, item in enumerate(items):
        text = item.example.text
        (mention,) = item.example.mentions
        decoded = [WORDS.decode(batch["input_ids"][row][masks[k, row]]) for k in range(4)]
        assert decoded[0].split() == text[slice(*mention.subject)].split()
        assert decoded[1].split() == " ".join(text[slice(*span)] for span in mention.relation_words).split()
        assert decoded[2].startswith("?")
    assert torch.equal(at_places(items, ["subject", "last"])(batch["input_ids"]), masks[0] | masks[2])


def test_recall_works_within_and_bad_input_is_told():
    model, tuned = pair_of("llama")
    items, pset = asked(12), everything(model)
    with grafted(model, pset, tuned):
        expected = recall(model, WORDS, items, 5)
    with grafted_at(model, pset, tuned, at_places(items, PLACES)):
        found = recall(model, WORDS, items, 5)
    assert (found.exact == expected.exact).all() and found.logprob == pytest.approx(expected.logprob, abs=1e-9)
    with pytest.raises(UserError, match="unknown place 'object'"):
        at_places(items, ["object"])
    with pytest.raises(UserError, match="about 6 facts"):
        at_places(encode(WORDS, biographies(tiny_world())), ["subject"])
    with grafted_at(model, pset, tuned, at_places(items[:2], PLACES)), pytest.raises(UserError, match="not known"):
        recall(model, WORDS, items)
    mamba, other = pair_of("mamba")
    with (
        pytest.raises(UserError, match="may mix positions"),
        grafted_at(mamba, everything(mamba), other, at_places(items, PLACES)),
    ):
        pass


class Borrowed(nn.Module):
    """Uses a layer's weight without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_model("llama", vocab_size=len(WORDS), max_position_embeddings=128)
        self.extra = nn.Linear(len(WORDS), len(WORDS), dtype=torch.float64)

    def forward(self, input_ids: Tensor, attention_mask: Tensor):
        output = self.inner(input_ids=input_ids, attention_mask=attention_mask)
        output.logits = nn.functional.linear(output.logits, self.extra.weight, self.extra.bias)
        return output


def test_parameters_that_are_used_without_their_module_are_told():
    model = Borrowed()
    tuned = {name: p.detach() + 0.5 for name, p in model.named_parameters()}
    with pytest.raises(UserError, match="without calling"):
        with grafted_at(model, everything(model), tuned, at_places(asked(4), PLACES)):
            pass
    inner = ParamSet({n: m for n, m in everything(model).masks.items() if n.startswith("inner.")})
    with grafted_at(model, inner, tuned, at_places(asked(4), PLACES)):
        pass
