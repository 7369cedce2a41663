"""Dynamics: the order of appearance on curves drawn by hand; the measures of a model against the library's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_facts import tiny_world, tokenizer
from tiny_models import tiny_model

from crosstrace.analyses.consistency import fact_pairs, gradient_consistency, representation_consistency
from crosstrace.analyses.dynamics import FRACTION, Probe, appearance, measure, shared_now
from crosstrace.analyses.signature import input_signature
from crosstrace.data.text import biographies, questions
from crosstrace.data.tokens import batches, encode
from crosstrace.sets.paramset import ParamSet, shared
from crosstrace.sets.selection import scope, select
from crosstrace.trace import trace
from crosstrace.training.evaluation import recall


def the(rows: list[dict], name: str) -> dict:
    (found,) = [row for row in rows if row["measure"] == name]
    return found


def test_the_first_crossing_is_interpolated_between_checkpoints() -> None:
    rows = [
        {"update": u, "phase": "x", "a": a, "by_person": {"a": {"B0": [a]}}}
        for u, a in ((0, 0.2), (10, 0.2), (20, 0.6), (40, 1.2))
    ]
    assert len(appearance(rows)) == 1, "single facts are no measure"
    found = the(appearance(rows), "a")  # goes 1.0 up: a tenth at 0.3, half at 0.7
    assert found["tenth"] == pytest.approx(10 + 10 * 0.1 / 0.4) and found["half"] == pytest.approx(20 + 20 * 0.1 / 0.6)
    assert (found["first"], found["last"]) == (0.2, 1.2) and found["after"] == 20


def test_what_falls_is_followed_downwards_and_the_earliest_comes_first() -> None:
    rows = [{"update": u, "late": a, "early": b} for u, a, b in ((0, 0.0, 1.0), (10, 0.0, 0.0), (20, 1.0, 0.0))]
    found = appearance(rows)
    assert [row["measure"] for row in found] == ["early", "late"]
    assert the(found, "early")["half"] == pytest.approx(5) and the(found, "late")["half"] == pytest.approx(15)


def test_of_what_goes_nowhere_or_comes_back_nothing_is_said() -> None:
    rows = [
        {"update": u, "flat": 0.5, "back": b, "unknown": None, "partly": p}
        for u, b, p in ((0, 0.0, 0.0), (10, 1.0, None), (20, 0.4, 1.0))
    ]  # `back` ends 0.4 from where it began, but had been 1.0 away
    found = appearance(rows)
    for name in ("flat", "back", "unknown"):
        assert the(found, name)["half"] is None and the(found, name)["tenth"] is None
    assert the(found, "partly")["half"] == pytest.approx(10), "a checkpoint that lacks it is left out"
    assert found[0]["measure"] == "partly"


def facts_of(by_person: dict) -> list:
    return [value for values in by_person.values() for value in values]


@pytest.mark.long
@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gpt2", "qwen3", "qwen3_moe"])
def test_measures_are_the_librarys_own(kind: str) -> None:
    words = tokenizer("word")
    model = tiny_model(kind, vocab_size=len(words), max_position_embeddings=128)
    world = tiny_world(people=8)
    bio, qa = (encode(words, texts(world)) for texts in (biographies, questions))
    pairs, names = fact_pairs(bio, qa)[:6], scope(model)
    tasks, own = {"bio": bio, "qa": qa}, {"qa_id": pairs}
    probe = Probe(
        {"qa_id": qa[:6]}, {"bio": bio[:2]}, tasks, own, names, together=6, steps=2, read={"qa_id": pairs[:3]}
    )
    found = measure(model, words, probe)
    assert found.measures["recall.qa_id"] == recall(model, words, qa[:6]).exact.mean()
    sets = {}
    for task, items in probe.traced.items():
        (only,) = trace(model, batches(items, 5, "object", pad_id=0), task=task, measures=["abs"], parts=1)
        sets[task] = select(only.strength(), FRACTION, scope=names)
    assert found.shared.size == shared(sets).size == shared_now(model, words, probe.traced, names).size
    assert found.measures["overlap"] == shared(sets).size / max(pset.size for pset in sets.values())
    whole = ParamSet({name: torch.ones(model.get_parameter(name).shape, dtype=torch.bool) for name in names})
    (row,) = gradient_consistency(model, pairs, {"all": whole}, pad_id=0, together=6)
    assert found.measures["gradient.qa_id"] == pytest.approx(row["excess"], abs=1e-12)
    assert found.by_person["gradient.qa_id"] == row["by_person"]
    states = [row for row in representation_consistency(model, pairs, pad_id=0) if row["place"] == "answer"]
    assert found.measures["states.qa_id"] == max(row["top1"] or 0 for row in states)
    layers = [facts_of(row["by_person"]) for row in states[1:]]
    assert facts_of(found.by_person["states.qa_id"]) == pytest.approx(np.mean(layers, axis=0), rel=1e-5)
    assert list(found.by_person["states.qa_id"]) == list(states[0]["by_person"])
    texts = input_signature(model, pairs[:3], pad_id=0)
    asked = [row for row in texts if row["format"] == "stored" and row["group"] in ("subject", "relation")]
    assert found.measures["signature.qa_id"] == pytest.approx(sum(row["share"] for row in asked))
    shares = facts_of(found.by_person["signature.qa_id"])
    assert shares == pytest.approx(np.sum([facts_of(row["by_person"]) for row in asked], axis=0), rel=1e-5)
    assert np.mean(shares) == pytest.approx(found.measures["signature.qa_id"], rel=1e-5)
    nodes = ["heads"] if kind == "qwen3_moe" else ["heads", "neurons"]  # experts are no nodes
    for name in ("shared_of_last", *(f"{unit}_as_last.qa_id" for unit in nodes)):
        assert found.measures[name] == pytest.approx(1.0), "a model is as itself"
    other = tiny_model(kind, vocab_size=len(words), max_position_embeddings=128, seed=5)
    apart = measure(other, words, probe, last=found)
    assert apart.measures["shared_of_last"] < 0.9 and apart.measures[f"{nodes[-1]}_as_last.qa_id"] < 0.9
    assert apart.measures["shared_of_last"] == (apart.shared & found.shared).size / found.shared.size
