"""Consistency of a fact's two formats: against plain computations, and where the answer is known."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from reference import example_gradient
from tiny_facts import tiny_world, tokenizer
from tiny_models import tiny_model
from torch import Tensor, nn

from crosstrace.analyses.consistency import (
    PAIRINGS,
    FactPair,
    by_person,
    cka,
    fact_pairs,
    gradient_consistency,
    places,
    representation_consistency,
)
from crosstrace.core.errors import UserError
from crosstrace.data.text import biographies, questions
from crosstrace.data.tokens import Encoded, encode
from crosstrace.sets.paramset import ParamSet

KINDS = ["llama", "gpt_neox", "gpt2", "qwen3", "qwen3_moe"]


@functools.cache
def word_pairs(people: int = 5) -> list[FactPair]:
    return some_pairs(tokenizer("word"), people)


def some_pairs(own: Any, people: int) -> list[FactPair]:
    world = tiny_world(people=max(people, 8))
    pairs = fact_pairs(*(encode(own, texts) for texts in (biographies(world), questions(world))))
    first = list(dict.fromkeys(pair.person for pair in pairs))[:people]
    return [pair for pair in pairs if pair.person in first]


@functools.cache
def word_model(kind: str = "llama", seed: int = 0) -> nn.Module:
    return tiny_model(kind, vocab_size=len(tokenizer("word")), max_position_embeddings=128, seed=seed)


def everything(model: nn.Module) -> ParamSet:
    return ParamSet({name: torch.ones(p.shape, dtype=torch.bool) for name, p in model.named_parameters()})


def gradient(model: nn.Module, item: Encoded) -> Tensor:
    labels = torch.where(item.targets["object"], item.ids, -100)
    example = {"input_ids": item.ids, "attention_mask": torch.ones_like(item.ids), "labels": labels}
    found = example_gradient(model, {key: value.unsqueeze(0) for key, value in example.items()})
    return torch.cat([value.flatten() for value in found.values()])


# ---- pairs


def test_a_pair_words_one_fact_twice_and_ends_with_its_object():
    pairs = word_pairs()
    assert len(pairs) == 5 * 6 and len({pair.fact for pair in pairs}) == 30
    for pair in pairs:
        for item in (pair.stored, pair.recalled):
            (mention,) = item.example.mentions
            assert mention.fact == pair.fact and mention.relation == pair.relation
            start, stop = mention.object
            assert (mention.relation, item.example.text[start:stop]) == pair.answer
            target = item.targets["object"]
            assert target[-1] and tokenizer("word").decode(item.ids[target]) == pair.answer[1]


@pytest.mark.parametrize("kind", ["word", "space", "spaceless", "bos"])
def test_places_are_where_the_words_are(kind):
    own = tokenizer(kind)
    for pair in some_pairs(own, 3):
        for item in (pair.stored, pair.recalled):
            at, mention, text = places(item), item.example.mentions[0], item.example.text

            def upto(token, item=item):
                return own.decode(item.ids[: token + 1], skip_special_tokens=True).replace(" ", "")

            def plain(end, text=text):
                return text[:end].replace(" ", "").lower()

            assert upto(at["subject"]).lower() == plain(mention.subject[1])
            if mention.subject[1] <= mention.relation_words[-1][1]:
                assert upto(at["relation"]).lower() == plain(mention.relation_words[-1][1])
            else:  # nothing there knows yet of whom
                assert "relation" not in at
            assert upto(at["answer"]).lower() == plain(mention.object[0])


def test_facts_of_different_people_are_no_pairs():
    own = tokenizer("word")
    stored = encode(own, biographies(tiny_world()))
    recalled = encode(own, [replace(q, mentions=(replace(q.mentions[0], fact=f"x{i}"),))
                            for i, q in enumerate(questions(tiny_world()))])  # fmt: skip
    with pytest.raises(UserError, match="recalled by another text"):
        fact_pairs(stored, recalled)


# ---- gradients


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_consistency_equals_cosines_of_materialised_gradients(kind):
    model, pairs = word_model(kind), word_pairs(3)
    generator = torch.Generator().manual_seed(0)
    some = ParamSet({n: torch.rand(p.shape, generator=generator) < 0.2 for n, p in model.named_parameters()})
    rows = gradient_consistency(model, pairs, {"all": everything(model), "some": some}, pad_id=0)
    a, b = (torch.stack([gradient(model, getattr(pair, side)) for pair in pairs]) for side in ("stored", "recalled"))
    chosen = torch.cat([mask.flatten() for mask in some.masks.values()])
    for row, columns in zip(rows, (slice(None), chosen)):
        x, y = (nn.functional.normalize(z[:, columns], dim=1) for z in (a, b))
        expected = {name: [] for name in PAIRINGS}
        for i, one in enumerate(pairs):
            of: dict[str, list[float]] = {name: [] for name in PAIRINGS}
            for j, two in enumerate(pairs):
                name = "same" if i == j else "relation" if one.relation == two.relation else (
                    "person" if one.person == two.person else "other")  # fmt: skip
                of[name].append(float(x[i] @ y[j]))
            for name, values in of.items():
                expected[name].append(np.mean(values))
        for name, values in expected.items():
            assert row[name] == pytest.approx(np.mean(values), abs=1e-10)
            assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]
        assert row["excess"] == pytest.approx(row["same"] - row["relation"], abs=1e-12)
        single = np.subtract(expected["same"], expected["relation"])
        assert list(row["by_person"]) == list(dict.fromkeys(pair.person for pair in pairs))
        assert [x for own in row["by_person"].values() for x in own] == pytest.approx(
            single.tolist(), rel=1e-5, abs=1e-9
        )
    assert rows[1]["size"] == some.size and rows[0]["facts"] == 18 and rows[0]["people"] == 3


def test_a_text_is_consistent_with_itself():
    model = word_model()
    twins = [replace(pair, recalled=pair.stored) for pair in word_pairs(3)]
    (row,) = gradient_consistency(model, twins, {"all": everything(model)}, pad_id=0)
    assert row["same"] == pytest.approx(1, abs=1e-9) and row["first"] == 1
    assert row["relation"] < 0.999
    for row in representation_consistency(model, twins, pad_id=0):
        assert row["same"] == pytest.approx(1, abs=1e-9) and row["cka"] == pytest.approx(1, abs=1e-9)


def test_mismatched_facts_are_at_baseline():
    """Each stored fact beside another person's of the same relation: what is called the same is no closer."""
    model, pairs = word_model(), word_pairs(12)
    moved = [replace(pair, recalled=pairs[(i + 6) % len(pairs)].recalled) for i, pair in enumerate(pairs)]
    sets = {"all": everything(model)}
    (right,), (wrong,) = (gradient_consistency(model, p, sets, pad_id=0, together=72) for p in (pairs, moved))
    assert right["excess_low"] > 0  # even untrained: the two texts have their object in common
    assert wrong["excess_low"] < 0 < wrong["excess_high"] or abs(wrong["excess"]) < 0.2 * right["excess"]


def test_groups_keep_people_whole_and_change_no_own_cosine():
    model, pairs = word_model(), word_pairs(5)
    sets = {"all": everything(model)}
    (whole,) = gradient_consistency(model, pairs, sets, pad_id=0, together=30)
    (cut,) = gradient_consistency(model, pairs, sets, pad_id=0, together=13)
    assert cut["same"] == pytest.approx(whole["same"], abs=1e-10)
    assert cut["person"] == pytest.approx(whole["person"], abs=1e-10)
    assert cut["chance_first"] == pytest.approx((12 / 12 + 12 / 12 + 6 / 6) / 30)
    with pytest.raises(UserError, match="at least 2"):
        gradient_consistency(model, pairs, sets, pad_id=0, together=1)


def test_a_set_without_gradient_is_undefined():
    """Position 127 is in no text, so its embedding has no gradient."""
    model = word_model("gpt2")
    mask = torch.zeros_like(model.get_parameter("transformer.wpe.weight"), dtype=torch.bool)
    mask[-1] = True
    (row,) = gradient_consistency(model, word_pairs(2), {"none": ParamSet({"transformer.wpe.weight": mask})}, pad_id=0)
    assert row["same"] is None and row["excess"] is None and row["first"] is None and row["size"] == mask.sum()
    assert list(row["by_person"].values()) == [[None] * 6] * 2


# ---- hidden states


@pytest.mark.long
@pytest.mark.parametrize("kind", [*KINDS, "mamba"])
def test_representation_consistency_equals_a_loop(kind):
    model, pairs = word_model(kind), word_pairs(4)
    rows = representation_consistency(model, pairs, pad_id=0, batch_size=5)
    layers = {row["layer"] for row in rows}
    assert len(rows) == 3 * len(layers) and layers == set(range(max(layers) + 1))
    for row in rows:
        states = []
        there = [p for p in pairs if all(row["place"] in places(item) for item in (p.stored, p.recalled))]
        assert row["facts"] == len(there) and (row["place"] == "relation") == (len(there) < len(pairs))
        for side in ("stored", "recalled"):
            of_side = []
            for pair in there:
                item = getattr(pair, side)
                with torch.no_grad():
                    hidden = model(input_ids=item.ids.unsqueeze(0), output_hidden_states=True).hidden_states
                of_side.append(hidden[row["layer"]][0, places(item)[row["place"]]].double())
            states.append(torch.stack(of_side))
        a, b = (z - z.mean(0) for z in states)
        if float(min(z.norm(dim=1).min() for z in (a, b))) < 1e-9:
            assert row["place"] == "answer" and row["layer"] == 0  # a question mark is a question mark
            assert row["same"] is None and row["cka"] is None and row["top1"] is None
            continue
        cosine = torch.cosine_similarity(a.unsqueeze(1), b.unsqueeze(0), dim=2)
        assert row["same"] == pytest.approx(float(cosine.diagonal().mean()), abs=1e-9)
        ranks = [int((cosine[:, j] >= cosine[j, j] - 1e-9).sum()) for j in range(len(there))]
        assert row["top1"] == pytest.approx(np.mean([rank == 1 for rank in ranks]))
        assert row["mrr"] == pytest.approx(np.mean([1 / rank for rank in ranks]))
        h = torch.eye(len(a), dtype=torch.float64) - 1 / len(a)

        def hsic(first, second, h=h):
            return float((h @ first @ h * second).sum())

        one, two = a @ a.t(), b @ b.t()
        assert row["cka"] == pytest.approx(hsic(one, two) / np.sqrt(hsic(one, one) * hsic(two, two)), abs=1e-9)


def test_cka_ignores_rotation_and_scale_and_is_low_for_noise():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=generator, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0]
    assert cka(x, 3 * x @ turn + 1) == pytest.approx(1, abs=1e-12)
    assert cka(x, torch.randn(200, 6, generator=generator, dtype=torch.float64)) < 0.1
    assert np.isnan(cka(x, torch.ones(200, 6, dtype=torch.float64)))


def test_shuffling_within_the_relation_keeps_what_only_the_relation_tells():
    """States that hold the relation and nothing of the fact: CKA is high, and no higher than shuffled."""
    from crosstrace.analyses.consistency import _compare_states, _pairings

    pairs = word_pairs(16)
    generator = torch.Generator().manual_seed(0)
    centres = dict.fromkeys(pair.relation for pair in pairs)
    centres = {relation: 5 * torch.randn(24, generator=generator, dtype=torch.float64) for relation in centres}
    one, two = (
        torch.stack([centres[pair.relation] for pair in pairs])
        + torch.randn(len(pairs), 24, generator=generator, dtype=torch.float64)
        for _ in range(2)
    )
    row = _compare_states(one, two, pairs, _pairings(pairs))
    assert row["cka"] > 0.8 and abs(row["cka"] - row["cka_shuffled"]) < 0.02
    assert abs(row["excess"]) < 0.05 and row["chance_relation"] == 6 / 96 and row["chance_person"] == 16 / 96


def test_a_reinitialised_model_is_at_baseline():
    """What one model makes of the stored facts tells nothing of what another makes of the recalled ones."""
    pairs = word_pairs(16)
    twins = [replace(pair, recalled=pair.stored) for pair in pairs]
    rows = representation_consistency(word_model(), twins, pad_id=0, other=word_model(seed=7))
    for row in rows:
        if row["same"] is None:
            continue
        assert abs(row["same"]) < 0.2  # in a random basis
        assert row["top1"] <= 0.1


def test_nothing_is_left_behind():
    model = word_model().train()
    try:

        def hooks():
            return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]

        representation_consistency(model, word_pairs(2), pad_id=0)
        before = hooks()  # transformers leaves hooks of its own for output_hidden_states
        gradient_consistency(model, word_pairs(2), {"all": everything(model)}, pad_id=0)
        assert model.training and all(p.grad is None for p in model.parameters()) and hooks() == before
    finally:
        model.eval()


def test_single_facts_by_person_are_in_order_and_of_six_digits():
    found = by_person(np.array([1 / 3, np.nan, 1.0, 0.0]), ["B1", "B0", "B1", "B0"])
    assert found == {"B1": [0.333333, 1.0], "B0": [None, 0.0]}


def test_single_facts_of_hidden_states_have_the_mean_of_their_row():
    for row in representation_consistency(word_model(), word_pairs(4), pad_id=0):
        single = [value for values in row["by_person"].values() for value in values]
        assert len(single) == row["facts"] and len(row["by_person"]) == row["people"]
        defined = [value for value in single if value is not None]
        assert set(defined) <= {0.0, 1.0}
        assert row["top1"] == (pytest.approx(np.mean(defined)) if defined else None)
