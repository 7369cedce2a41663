"""Circuits: planted ones are found, attributions are complete, ablations equal editing by hand."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu, rankdata, spearmanr
from tiny_facts import tiny_world, tokenizer
from tiny_models import tiny_model
from torch import nn

from crosstrace.analyses.circuit import (
    NODES,
    _concentration,
    agreement,
    answer_batches,
    attribution,
    curve,
    node_means,
    nodes_ablated,
    single_ablations,
    smallest,
)
from crosstrace.core.errors import UserError
from crosstrace.data.text import biographies, questions
from crosstrace.data.tokens import Encoded, encode
from crosstrace.models.anatomy import Anatomy
from crosstrace.sets.paramset import ParamSet
from crosstrace.training.evaluation import recall
from crosstrace.training.losses import example_losses

KINDS = ["llama", "gpt_neox", "gpt2", "qwen3"]
WORDS = tokenizer("word")


@functools.cache
def asked(count: int = 24) -> list[Encoded]:
    return encode(WORDS, questions(tiny_world(people=8)))[:count]


@functools.cache
def word_model(kind: str) -> nn.Module:
    return tiny_model(kind, vocab_size=len(WORDS), max_position_embeddings=128)


def logits_of(model: nn.Module, item: Encoded) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=item.ids.unsqueeze(0)).logits


@pytest.mark.parametrize("kind", [*KINDS, "qwen3_moe"])
def test_means_are_over_all_tokens(kind):
    model, items, anatomy = word_model(kind), asked(), Anatomy(word_model(kind))
    units = [unit for unit in NODES if anatomy.sites(unit)]
    assert units == (["query_head"] if kind == "qwen3_moe" else list(NODES))
    means = node_means(model, answer_batches(items, WORDS, 5), anatomy, units)
    site = next(iter(anatomy.sites("query_head")))
    seen: list[torch.Tensor] = []
    with model.get_submodule(site).register_forward_pre_hook(lambda m, args: seen.append(args[0][0].detach())):
        for item in items:
            logits_of(model, item)
    torch.testing.assert_close(means[site], torch.cat(seen).mean(0), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unit", NODES)
def test_ablation_to_zero_equals_a_model_with_those_weights_at_zero(kind, unit):
    """With means of 0, ablating a node is the same as zeroing the columns that read it."""
    model, anatomy, item = word_model(kind), Anatomy(word_model(kind)), asked()[0]
    numbers = [1, len(anatomy.units(unit)) - 2]
    zeros = {site: torch.zeros(len(index)) for site, index in anatomy.sites(unit).items()}
    with nodes_ablated(model, anatomy, {unit: numbers}, zeros):
        found = logits_of(model, item)
    before = logits_of(model, item)
    edited = {name: p.detach().clone() for name, p in model.named_parameters()}
    for site, index in anatomy.sites(unit).items():
        weight = edited[f"{site}.weight"]
        axis = 0 if kind == "gpt2" else 1
        weight.movedim(axis, 0)[torch.isin(index, torch.tensor(numbers))] = 0
    with torch.no_grad():
        expected = torch.func.functional_call(model, edited, kwargs={"input_ids": item.ids.unsqueeze(0)}).logits
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(found, before)
    torch.testing.assert_close(logits_of(model, item), before, rtol=0, atol=0)  # nothing stays


@pytest.mark.long
@pytest.mark.parametrize("kind", [*KINDS, "opt", "qwen3_moe"])
def test_attributions_are_complete(kind):
    """A module's nodes sum to what ablating all of them takes away."""
    model, anatomy = word_model(kind), Anatomy(word_model(kind))
    units = [unit for unit in NODES if anatomy.sites(unit)]
    data = answer_batches(asked(12), WORDS, 5)
    means = node_means(model, data, anatomy, units)
    scores, rows = attribution(model, data, anatomy, means, units)
    assert len(rows) == sum(len(anatomy.sites(unit)) for unit in units)
    for row in rows if kind != "qwen3_moe" else ():  # a router's choice of experts jumps along the path
        assert row["sum"] == pytest.approx(row["drop"], rel=0.01, abs=1e-4) and row["steps"] >= 16
    for unit in units:
        by_site = [row["sum"] for row in rows if row["module"] in anatomy.sites(unit)]
        assert scores[unit].sum() == pytest.approx(sum(by_site), abs=1e-9)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    # one module by hand: the drop
    site = rows[0]["module"]
    unit = units[0]
    first = sorted(set(anatomy.sites(unit)[site].tolist()))
    losses = []
    for nodes in ([], first):
        with nodes_ablated(model, anatomy, {unit: nodes}, means), torch.no_grad():
            of = [
                example_losses(model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits, b["labels"])
                for b in data
            ]
        losses.append(float(torch.cat(of).mean()))
    assert rows[0]["drop"] == pytest.approx(losses[1] - losses[0], abs=1e-9)


def planted(kind: str, unit: str, keep: int) -> tuple[nn.Module, list[Encoded]]:
    """A model in which one head (and, for a neuron, one neuron behind it) is all that the last token can learn the
    subject from, and questions whose answers are what it says: without that node it says one thing to all."""
    model = tiny_model(kind, vocab_size=len(WORDS), max_position_embeddings=128)
    anatomy = Anatomy(model)
    with torch.no_grad():
        for of in NODES:
            for site, index in anatomy.sites(of).items():
                weight, bias = model.get_parameter(f"{site}.weight"), getattr(model.get_submodule(site), "bias", None)
                columns = weight.movedim(0 if kind == "gpt2" else 1, 0)
                columns[index != (keep if of == unit else -2)] = 0
                if of == unit:
                    columns *= 20
                if bias is not None:
                    bias.zero_()
    items = []
    for item in asked():
        ids = item.ids.clone()
        answer = int(item.targets["object"].nonzero()[0])
        ids = ids[: answer + 1]
        ids[answer] = logits_of(model, replace(item, ids=ids[:answer]))[0, -1].argmax()
        target = torch.zeros(len(ids), dtype=torch.bool)
        target[answer] = True
        items.append(Encoded(item.example, ids, {"answer": target, "object": target}, item.mentions, item.group))
    return model, items


@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_head_is_found(kind):
    keep = 6  # of the second layer
    model, items = planted(kind, "query_head", keep)
    anatomy = Anatomy(model)
    assert recall(model, WORDS, items).exact.all()
    assert len({int(item.ids[-1]) for item in items}) > 3
    data = answer_batches(items, WORDS)
    means = node_means(model, data, anatomy)
    scores, _ = attribution(model, data, anatomy, means)
    assert scores["query_head"].argmax() == keep and scores["query_head"][keep] > 0
    assert np.abs(np.delete(scores["query_head"], keep)).max() < 1e-9 and np.abs(scores["neuron"]).max() < 1e-9
    alone = single_ablations(model, WORDS, items, anatomy, means, "query_head", range(8))
    assert max(alone, key=lambda row: row["drop"])["node"] == anatomy.units("query_head")[keep] == "L1.H2"
    assert alone[keep]["exact_match"] < 0.7 and all(row["exact_match"] == 1 for i, row in enumerate(alone) if i != keep)
    rows = curve(model, WORDS, items, anatomy, means, scores["query_head"], "query_head", (0.0, 0.125, 0.5, 1.0))
    assert smallest(rows) == 1
    dip = [
        {"kind": "keep", "order": "top", "nodes": n, "exact_match": e}
        for n, e in ((0, 0), (1, 1.0), (2, 0.1), (8, 1.0))
    ]
    assert smallest(dip) == 8 and smallest(dip[:1]) is None
    at = {(r["kind"], r["order"], r["nodes"]): r["exact_match"] for r in rows}
    assert at["keep", "top", 1] == at["keep", "top", 8] == at["ablate", "top", 0] == 1
    assert at["ablate", "top", 1] == at["keep", "top", 0] == alone[keep]["exact_match"]
    assert at["keep", "random", 1] < 1


def test_agreement_is_that_of_scipy_and_finds_a_planted_set():
    model = word_model("llama")
    anatomy = Anatomy(model)
    scores = np.arange(8) - 3.5
    masks = {
        name: torch.rand(p.shape, generator=torch.Generator().manual_seed(3)) < 0.4
        for name, p in model.named_parameters()
    }
    row = agreement(scores, ParamSet(masks), anatomy, "query_head", 2000)
    share = anatomy.count(ParamSet(masks), "query_head") / anatomy.sizes("query_head")
    expected = spearmanr(np.abs(scores), share)
    assert row["spearman"] == pytest.approx(expected.statistic)
    critical = np.isin(np.arange(8), np.argsort(-np.abs(scores), kind="stable")[:1])
    assert row["auc"] == pytest.approx(mannwhitneyu(share[critical], share[~critical]).statistic / 7)
    ranks = [[rankdata(x[layer]) - 2.5 for layer in (slice(4), slice(4, 8))] for x in (np.abs(scores), share)]
    assert row["within"] == pytest.approx(np.corrcoef(*(np.concatenate(x) for x in ranks))[0, 1])
    assert row["nodes"] == 8 and row["critical"] == 1 and 0 < row["spearman_p"] <= 1
    held = anatomy.members("query_head", "L1.H3")
    importance = np.where(np.arange(8) == 7, 5.0, np.linspace(0, 1, 8))
    found = agreement(importance, held, anatomy, "query_head")
    assert found["auc"] == 1 and found["spearman"] > 0.5
    assert found["within"] > 0 and found["within_p"] > 0.2, "three ties and one in one layer of two prove nothing"
    layers = ParamSet({name: torch.full(p.shape, ".1." in name) for name, p in model.named_parameters()})
    apart = agreement(np.where(np.arange(8) >= 4, 5.0, 1.0) + np.arange(8) % 3, layers, anatomy, "query_head")
    assert apart["spearman"] > 0.8 and apart["within"] is None, "all between layers, nothing within"
    nothing = ParamSet({name: torch.zeros(p.shape, dtype=torch.bool) for name, p in model.named_parameters()})
    empty = agreement(scores, nothing, anatomy, "query_head")
    assert empty["auc"] is None and empty["concentration"] is None


def test_concentration_in_the_critical_nodes_by_hand():
    model = word_model("llama")
    anatomy = Anatomy(model)
    importance = np.where(np.arange(8) == 7, 5.0, np.linspace(0, 1, 8))  # of eight heads the last is critical
    held = anatomy.members("query_head", "L1.H3")
    found = agreement(importance, held, anatomy, "query_head")
    assert found["concentration"] == pytest.approx(1 - 1 / 8), "the set lies in it alone"
    both = agreement(importance, held | anatomy.members("query_head", "L0.H0"), anatomy, "query_head")
    assert both["concentration"] == pytest.approx(1 / 2 - 1 / 8)
    everywhere = ParamSet({name: torch.ones(p.shape, dtype=torch.bool) for name, p in model.named_parameters()})
    even = agreement(importance, everywhere, anatomy, "query_head")
    assert even["concentration"] == pytest.approx(0) and even["concentration_low"] == even["concentration_high"] == 0
    # the bootstrap, drawn plainly
    held_by, sizes, critical = np.array([3.0, 1, 0, 2]), np.array([4.0, 4, 4, 4]), np.array([1, 0, 0, 1])
    row = _concentration(held_by, sizes, critical.astype(bool), draws=20_000)
    draws = np.random.default_rng(5).integers(0, 4, (20_000, 4))
    inside, whole = (held_by * critical)[draws].sum(1), held_by[draws].sum(1)
    plain = (inside / np.where(whole, whole, np.nan)) - critical[draws].mean(1)
    low, high = np.nanquantile(plain, [0.025, 0.975])
    assert row["concentration"] == pytest.approx(5 / 6 - 1 / 2)
    assert row["concentration_low"] == pytest.approx(low, abs=0.06) and row["concentration_high"] == pytest.approx(
        high, abs=0.06
    )


def test_a_model_without_known_geometry_and_texts_of_many_facts_are_told():
    with pytest.raises(UserError, match="geometry"):
        node_means(tiny_model("mamba"), [], Anatomy(tiny_model("mamba")))
    model = word_model("llama")
    anatomy = Anatomy(model)
    items = encode(WORDS, biographies(tiny_world(people=8)))
    means = node_means(model, answer_batches(items, WORDS), anatomy)
    for nodes, match in (({"kv_head": [0]}, "no kv_head"), ({"neuron": [999]}, "numbers from 0 to")):
        with pytest.raises(UserError, match=match), nodes_ablated(model, anatomy, nodes, means):
            pass
    with pytest.raises(UserError, match="one answer each"):
        single_ablations(model, WORDS, items, anatomy, means, "neuron", [0])


def test_a_training_model_with_frozen_parameters_is_left_as_it_was():
    model = tiny_model("llama", vocab_size=len(WORDS), max_position_embeddings=128).train()
    frozen: Sequence[str] = [name for name, _ in model.named_parameters()][:3]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    data, anatomy = answer_batches(asked(4), WORDS), Anatomy(model)
    attribution(model, data, anatomy, node_means(model, data, anatomy), steps=1)
    assert model.training
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == frozen
    assert all(not m._forward_pre_hooks for m in model.modules())
