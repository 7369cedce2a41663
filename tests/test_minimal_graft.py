"""Minimal grafts: contributions equal a plain loop, the order finds what was planted, overlaps are those by hand."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch
from tiny_facts import tiny_world, tokenizer
from tiny_models import tiny_model
from torch import nn

from crosstrace.analyses.circuit import answer_batches
from crosstrace.analyses.minimal_graft import POINTS, RANDOM, contributions, fewest, movement, order, overlap, sets
from crosstrace.core.errors import UserError
from crosstrace.data.text import questions
from crosstrace.data.tokens import Encoded, encode
from crosstrace.sets.paramset import ParamSet
from crosstrace.sets.selection import scope
from crosstrace.trace import Trace
from crosstrace.training.losses import example_losses

WORDS = tokenizer("word")


@functools.cache
def asked(count: int = 12) -> list[Encoded]:
    return encode(WORDS, questions(tiny_world(people=8)))[::4][:count]  # of all people


def word_model(kind: str, seed: int = 0) -> nn.Module:
    return tiny_model(kind, vocab_size=len(WORDS), max_position_embeddings=128, seed=seed)


def moved(base: nn.Module, by: float = 0.02) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    values = {}
    for name, p in base.named_parameters():
        values[name] = p.detach() + by * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return values


def loss(model: nn.Module, item: Encoded) -> torch.Tensor:
    ids, labels = item.ids.unsqueeze(0), torch.where(item.targets["answer"], item.ids, -100).unsqueeze(0)
    return example_losses(model(input_ids=ids).logits, labels).sum()


def slow_contributions(base: nn.Module, tuned: dict, items: list[Encoded], names: list[str], points) -> dict:
    """One question and one point at a time, in a copy of the model."""
    found = {name: torch.zeros_like(tuned[name]) for name in names}
    for alpha in points:
        for item in items:
            model = copy.deepcopy(base)
            with torch.no_grad():
                for name in names:
                    p = model.get_parameter(name)
                    p += alpha * (tuned[name] - p)
            loss(model, item).backward()
            for name in names:
                gradient = model.get_parameter(name).grad
                if gradient is not None:
                    change = gradient * (tuned[name] - base.get_parameter(name).detach())
                    found[name] += change.square() / len(points) / len(items)
    return found


@pytest.mark.long
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "qwen3_moe"])
def test_contributions_equal_a_plain_loop_in_any_parts(kind):
    base, items = word_model(kind), asked()
    tuned, names = moved(base), scope(base)
    expected = slow_contributions(base, tuned, items, names, POINTS)
    for parts, size in ((1, 12), (1, 5), (2, 4), (3, 4)):
        batches = answer_batches(items, WORDS, size)
        found = contributions(base, tuned, batches, names, parts=parts)
        assert len(found) == parts and sum(part.weight for part in found) == len(items)
        total = order(found)
        for name in names:
            torch.testing.assert_close(total[name], expected[name], rtol=1e-9, atol=1e-14)
    own = [item for item in items if item.group % 3 == 1]
    alone = slow_contributions(base, tuned, own, names, POINTS)
    for name in names:
        torch.testing.assert_close(found[1].values[name], alone[name], rtol=1e-9, atol=1e-14)


def test_the_base_is_left_as_it_was():
    base, items = word_model("gpt2").train(), asked(4)
    frozen = [name for name, _ in base.named_parameters()][:2]
    for name in frozen:
        base.get_parameter(name).requires_grad_(False)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    contributions(base, moved(base), answer_batches(items, WORDS), scope(base), points=[0.5])
    assert base.training
    for name, p in base.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None and p.requires_grad == (name not in frozen)


def test_what_moves_far_and_does_nothing_is_last():
    base = word_model("gpt2")
    tuned = {name: p.detach().clone() for name, p in base.named_parameters()}
    place = "transformer.wpe.weight"  # positions that no question reaches
    tuned[place][100:] += 5
    helpful = "transformer.h.1.mlp.c_proj.weight"
    items = asked()
    for item in items:
        loss(base, item).backward()
    tuned[helpful] -= 0.01 * base.get_parameter(helpful).grad  # a step of training
    base.zero_grad(set_to_none=True)
    names = scope(base)
    found = contributions(base, tuned, answer_batches(items, WORDS), names)
    orders = {"contribution": order(found), "movement": movement(base, tuned, names)}
    chosen = {(label, fraction): pset for label, fraction, pset in sets(orders, [0.001, 1.0], names)}
    first, farthest = chosen["contribution", 0.001], chosen["movement", 0.001]
    assert first.counts()[helpful] == first.size > 0 and farthest.counts()[place] == farthest.size == first.size
    everything = chosen["contribution", 1.0]
    assert everything.counts()[helpful] == everything.size, "what moves nothing is never grafted"
    for fraction in (0.001, 1.0):
        random = chosen[RANDOM, fraction]
        assert random.counts() == chosen["contribution", fraction].counts()


def traced(weight: float, **values: list[float]) -> Trace:
    tensors = {name: torch.tensor(own) for name, own in values.items()}
    return Trace("answers", "square", "example", "checkpoint", tensors, weight)


def test_overlap_by_hand():
    names = ["a", "b"]
    shared = ParamSet({"a": torch.tensor([True, True, False, False]), "b": torch.tensor([True, *[False] * 5])})
    part = traced(2.0, a=[9.0, 0.0, 8.0, 1.0], b=[7.0, *[0.1] * 5])
    row = overlap([part, part], 0.3, shared, names)
    # R = a0, a2, b0 holds a0 and b0 of the three; by chance 2·2/4 + 1·1/6 of them
    assert (row["size"], row["graft"], row["parts"]) == (3, 3, 2) and row["overlap"] == pytest.approx(2 / 3)
    assert row["expected"] == pytest.approx((1 + 1 / 6) / 3)
    assert row["excess"] == row["excess_low"] == row["excess_high"] == pytest.approx(2 / 3 - 7 / 18)
    other = traced(2.0, a=[0.0, 0.0, 3.0, 2.0], b=[0.0, 20.0, *[0.0] * 4])
    row = overlap([part, other], 0.3, shared, names)
    # together R = b1, a2, a0; without the first part a2, a3, b1, without the second a0, a2, b0
    by_hand = [1 / 3 - (1 + 1 / 6) / 3, 0 - (1 + 1 / 6) / 3, 2 / 3 - (1 + 1 / 6) / 3]
    assert row["excess"] == pytest.approx(by_hand[0])
    half = 12.706204736 * np.sqrt(0.5 * np.square(np.array(by_hand[1:]) - np.mean(by_hand[1:])).sum())
    assert row["excess_high"] - row["excess"] == pytest.approx(half, rel=1e-6)
    assert overlap([part], 0.3, shared, names)["excess_low"] is None, "one part has no interval"
    nothing = ParamSet({name: torch.zeros_like(mask) for name, mask in shared.masks.items()})
    for row in (overlap([part], 0.3, nothing, names), overlap([part], None, shared, names)):
        assert row["overlap"] is row["excess"] is row["graft"] is None


def test_fewest_by_hand():
    def row(order: str, size: int, exact: float | None) -> dict:
        return {"part": "qa_ood", "order": order, "size": size, "fraction": size / 100, "exact_match": exact}

    rows = [row("base", 0, 0.0), row("tuned", 100, 0.8)]
    rows += [
        row("contribution", size, exact) for size, exact in ((1, 0.1), (5, 0.75), (10, 0.5), (20, 0.72), (50, 0.8))
    ]
    rows += [row("movement", size, exact) for size, exact in ((1, 0.0), (50, 0.6))]
    assert fewest(rows) == [
        {"part": "qa_ood", "order": "contribution", "size": 20, "fraction": 0.2},  # 5 do, but 10 do not
        {"part": "qa_ood", "order": "movement", "size": None, "fraction": None},
    ]
    assert fewest(rows, share=0.5)[0]["size"] == 5
    nobody = [row("tuned", 100, 0.0), row("contribution", 1, 0.0)]
    assert fewest(nobody) == [{"part": "qa_ood", "order": "contribution", "size": None, "fraction": None}]
    unasked = [row("tuned", 100, None), row("contribution", 1, None)]
    assert fewest(unasked)[0]["size"] is None


def test_without_questions_or_with_other_parameters_it_is_told():
    base = word_model("llama")
    tuned, names = moved(base), scope(base)
    with pytest.raises(UserError, match="no example to trace"):
        contributions(base, tuned, [], names)
    with pytest.raises(UserError, match="leave 21 of 24 parts empty"):
        contributions(base, tuned, answer_batches(asked(4), WORDS), names, parts=24)
    batches = answer_batches(asked(4), WORDS)
    with pytest.raises(UserError, match="is in the set but not in the values to put in"):
        contributions(base, {k: v for k, v in tuned.items() if k != names[0]}, batches, names)
    with pytest.raises(UserError, match="has shape"):
        contributions(base, tuned | {names[0]: tuned[names[0]][:1]}, batches, names)
