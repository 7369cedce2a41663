"""Analyses of models that are built otherwise: several residual streams, cross-attention, other position tables,
embeddings that are scaled in place, caches."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny_facts import tiny_examples, tokenizer
from tiny_models import tiny_model
from torch import nn

from crosstrace.analyses import circuit, lens, positions, signature
from crosstrace.analyses.consistency import (
    FactPair,
    fact_pairs,
    hidden_states,
    places,
    representation_consistency,
    token_axes,
)
from crosstrace.core.errors import UserError
from crosstrace.data.tokens import Encoded
from crosstrace.models.anatomy import Anatomy
from crosstrace.sets.interventions import snapshot
from crosstrace.training.evaluation import recall

WORDS = tokenizer("word")
SMALL = {
    "vocab_size": len(WORDS), "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ENCODER_DECODER = {
    "vocab_size": len(WORDS), "d_model": 24, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 40,
    "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 40, "max_position_embeddings": 256,
    "is_decoder": True, "is_encoder_decoder": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "n_shared_experts": 1}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3n": ("Gemma3nTextConfig", SMALL | {
        "intermediate_size": [40, 40], "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4,
        "activation_sparsity_pattern": [0.0, 0.0], "hidden_size_per_layer_input": 8, "laurel_rank": 4,
        "vocab_size_per_layer_input": len(WORDS), "num_kv_shared_layers": 0,
    }),
    "deepseek_v4": ("DeepseekV4Config", SMALL | EXPERTS | {
        "num_key_value_heads": 1, "q_lora_rank": 8, "qk_rope_head_dim": 4, "o_lora_rank": 8, "o_groups": 2,
        "index_n_heads": 2, "index_head_dim": 8, "index_topk": 8, "hc_mult": 3, "sliding_window": 4,
    }),
    "ctrl": ("CTRLConfig", {"vocab_size": len(WORDS), "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 256,
                            "dff": 40}),
    "bart": ("BartConfig", ENCODER_DECODER),
    "blenderbot": ("BlenderbotConfig", ENCODER_DECODER),
}  # fmt: skip


@functools.cache
def model_of(kind: str) -> nn.Module:
    name, settings = KINDS[kind]
    if not hasattr(transformers, name):
        pytest.skip(f"this version of transformers has no {name}")
    config = getattr(transformers, name)(**settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # ones and zeros would hide mistakes
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@functools.cache
def pairs() -> list[FactPair]:
    data = tiny_examples(WORDS, people=8)
    return fact_pairs(data["bio"], data["qa"])


@functools.cache
def questions() -> list[Encoded]:
    return tiny_examples(WORDS, people=8)["qa"]


STREAMS = ("gemma3n", "deepseek_v4")


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("number", [2, 3, 4, 12])
def test_the_state_of_a_token_is_all_of_its_streams(kind: str, number: int) -> None:
    model, items = model_of(kind), [pair.recalled for pair in pairs()[:number]]
    found = hidden_states(model, items, 0, batch_size=64)
    for item, own in zip(items, found):
        ids = item.ids.unsqueeze(0)
        with torch.no_grad():
            states = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
        for place, token in places(item).items():
            assert len(own[place]) == len(states)
            for state, read in zip(states, own[place]):
                if state.dim() == 3:
                    wanted = state[0, token]
                else:
                    wanted = state[:, 0, token] if kind == "gemma3n" else state[0, token]
                torch.testing.assert_close(read.float(), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", STREAMS)
def test_streams_are_compared_layer_by_layer(kind: str) -> None:
    model = model_of(kind)
    rows = representation_consistency(model, pairs()[:12], pad_id=0)
    assert {row["layer"] for row in rows} == {0, 1, 2}
    assert all(row["same"] is None or -1.001 <= row["same"] <= 1.001 for row in rows)


@pytest.mark.parametrize("kind", STREAMS)
def test_the_logit_lens_joins_streams_as_the_model_does(kind: str) -> None:
    model, items = model_of(kind), [pair.recalled for pair in pairs()[:6]]
    ids = items[0].ids
    lens.check_joined(model, ids)
    rows = [row for row in lens.logit_lens(model, items, pad_id=0) if row["place"] == "answer"]
    assert [row["layer"] for row in rows] == [0, 1, 2]
    logprobs = []
    for item in items:
        with torch.no_grad():
            logits = model(input_ids=item.ids.unsqueeze(0), use_cache=False).logits[0].log_softmax(-1)
        at = int(item.mentions[0].object.nonzero()[0])
        logprobs.append(float(logits[at - 1, item.ids[at]]))
    assert rows[-1]["logprob"] == pytest.approx(np.mean(logprobs), abs=1e-3)
    assert all(math.isfinite(row["logprob"]) for row in rows) and rows[0]["logprob"] != rows[-1]["logprob"]


def test_states_in_which_tokens_cannot_be_told_apart_are_refused() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, input_ids, attention_mask, output_hidden_states=False):
            return type("Output", (), {"hidden_states": (torch.ones(len(input_ids), 7),)})()

    with pytest.raises(UserError, match="can't be told apart"):
        token_axes(Pooled(), [torch.ones(3, 7)], (3, 9))


def test_embeddings_that_are_scaled_in_place_are_put_in() -> None:
    model, items = model_of("ctrl"), [pair.recalled for pair in pairs()[:3]]
    start = signature.embedding_baseline(model, items)
    logprob, _ = signature.coalitions(model, items, start, pad_id=0)
    for item, whole in zip(items, logprob[:, -1]):
        with torch.no_grad():
            expected = model(input_ids=item.ids[None]).logits[0].log_softmax(-1)
        at = item.mentions[0].object.nonzero().flatten()
        assert whole == pytest.approx(float(expected[at - 1, item.ids[at]].mean()), abs=1e-5)
    assert (np.abs(logprob[:, 0] - logprob[:, -1]) > 1e-6).all()


def test_cross_attention_that_nothing_goes_through_is_no_part_of_the_circuit() -> None:
    model, items = model_of("bart"), questions()[:4]
    anatomy, data = Anatomy(model), circuit.answer_batches(items, WORDS)
    units = [unit for unit in circuit.NODES if anatomy.sites(unit)]
    means = circuit.node_means(model, data, anatomy, units)
    assert means and not any("encoder_attn" in site for site in means)
    scores, rows = circuit.attribution(model, data, anatomy, means, units, steps=4)
    assert {row["module"] for row in rows} == set(means)
    for unit in units:
        everything = list(range(len(scores[unit])))
        with circuit.nodes_ablated(model, anatomy, {unit: everything}, means):
            assert np.isfinite(recall(model, WORDS, items).logprob).all()


@pytest.mark.parametrize("kind", ["bart", "blenderbot"])
def test_grafting_everywhere_is_grafting_where_positions_are_looked_up_once(kind: str) -> None:
    model, items = model_of(kind), questions()[:5]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        tuned = {name: value + 0.3 * torch.randn_like(value) for name, value in snapshot(model).items()}
    pset = positions.components(Anatomy(model))["all"]
    with positions.grafted_at(model, pset, tuned, positions.at_places(items, positions.PLACES)):
        everywhere = recall(model, WORDS, items).logprob
    with positions.grafted_at(model, pset, tuned, positions.at_places(items, ())):
        nowhere = recall(model, WORDS, items).logprob
    with positions.grafted_at(model, pset, tuned, positions.at_places(items, ("subject",))):
        somewhere = recall(model, WORDS, items).logprob
    np.testing.assert_allclose(nowhere, recall(model, WORDS, items).logprob, rtol=1e-4)
    before = snapshot(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tuned[name])
        wanted = recall(model, WORDS, items).logprob
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])
    np.testing.assert_allclose(everywhere, wanted, rtol=1e-4)
    assert not np.allclose(somewhere, nowhere) and not np.allclose(somewhere, everywhere)


@pytest.mark.parametrize("kind", ["llama", "mamba", "opt"])
def test_no_analysis_fills_a_cache(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(kind, torch.float32, vocab_size=len(WORDS), **({} if kind == "mamba" else {
        "max_position_embeddings": 256}))  # fmt: skip
    model.config.use_cache = True
    asked: list[object] = []
    forward = model.forward

    @functools.wraps(forward)
    def watched(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs.get("use_cache"))
        output = forward(*args, **kwargs)
        assert getattr(output, "past_key_values", None) is None and getattr(output, "cache_params", None) is None
        return output

    monkeypatch.setattr(model, "forward", watched)
    items, texts = questions()[:3], [pair.recalled for pair in pairs()[:3]]
    anatomy, data = Anatomy(model), circuit.answer_batches(items, WORDS)
    units = [unit for unit in circuit.NODES if anatomy.sites(unit)]
    recall(model, WORDS, items)
    lens.logit_lens(model, texts, pad_id=0)
    signature.input_signature(model, pairs()[:2], pad_id=0)
    if units:
        means = circuit.node_means(model, data, anatomy, units)
        circuit.attribution(model, data, anatomy, means, units, steps=2)
    if "query_head" in units:
        lens.attention_patterns(model, texts, [0], pad_id=0)
    if kind != "mamba":  # whose modules mix positions
        pset = positions.components(anatomy)["all"]
        with positions.grafted_at(model, pset, snapshot(model), positions.at_places(items, ("last",))):
            recall(model, WORDS, items)
    assert asked and set(asked) == {False}
