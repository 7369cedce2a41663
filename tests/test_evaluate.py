"""Recall: equal to greedy generation, to a plain loop, and to numbers worked by hand."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_facts import tiny_world, tokenizer
from tiny_models import tiny_model

from crosstrace.core.errors import UserError
from crosstrace.core.statistics import wilson
from crosstrace.data.text import Example, Mention, biographies, questions
from crosstrace.data.tokens import collate, encode
from crosstrace.training.evaluation import Recall, answers, recall, summaries
from crosstrace.training.losses import example_losses

WORDS, BPE = tokenizer("word"), tokenizer("bpe")
WORLD = tiny_world()
QA = encode(WORDS, questions(WORLD)[:48])
BIO = encode(WORDS, biographies(WORLD)[:6])


@functools.cache
def _taught():
    """A float64 model that has half learned the questions: some of its answers are right, some wrong."""
    torch.manual_seed(0)
    model = tiny_model(
        "llama", vocab_size=len(WORDS), max_position_embeddings=160, hidden_size=32, head_dim=8, num_hidden_layers=1
    )
    adam = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = collate(QA[:32], "answer", pad_id=WORDS.pad_token_id)
    labels = batch.pop("labels")
    for _ in range(200):
        logits = model(**batch).logits
        right = ((logits[:, :-1].argmax(-1) == labels[:, 1:]) | (labels[:, 1:] == -100)).all(1)
        if right.double().mean() > 0.5:
            return model
        adam.zero_grad()
        example_losses(logits, labels).mean().backward()
        adam.step()
    raise AssertionError("the model has not learned")


def test_exact_match_is_what_generate_answers():
    model, end = _taught(), WORDS.eos_token_id
    asked = [*QA]
    for item, exact in zip(QA, recall(model, WORDS, QA).exact):
        if exact and int(item.targets["object"].sum()) > 1:
            # asked for an answer that goes on otherwise than the model's: right at first and wrong later
            ids = item.ids.clone()
            ids[-2] = int(ids[0])
            asked.append(replace(item, ids=ids))
    assert len(asked) > len(QA)
    found = recall(model, WORDS, asked)
    lengths = set()
    for item, exact, first in zip(asked, found.exact, found.first, strict=True):
        start = int(item.targets["answer"].nonzero()[0])
        prompt, answer = item.ids[:start], item.ids[start:].tolist()
        written = model.generate(
            prompt[None], attention_mask=torch.ones_like(prompt[None]), do_sample=False, max_new_tokens=len(answer),
            eos_token_id=end, pad_token_id=WORDS.pad_token_id,
        )[0, start:].tolist()  # fmt: skip
        assert (written == answer) == exact
        assert (written[0] == answer[0]) == first
        lengths.add(len(answer))
    assert found.exact.any() and not found.exact.all()
    assert (found.first & ~found.exact).any()
    assert {2, 3, 4} <= lengths  # one to three tokens, and the end


@pytest.mark.parametrize("tokens", [1, 200, 8192])
def test_batch_size_and_padding_do_not_matter(tokens: int):
    everything = [*QA, *BIO]
    rng = np.random.default_rng(tokens)
    order = rng.permutation(len(everything))
    plain = [recall(_taught(), WORDS, [item], 1) for item in everything]  # alone, without any padding
    found = recall(_taught(), WORDS, [everything[i] for i in order], tokens)
    for name in ("exact", "first", "relation", "person", "fact"):
        assert list(getattr(found, name)) == [value for i in order for value in getattr(plain[i], name)]
    logprob = np.concatenate([plain[i].logprob for i in order])
    np.testing.assert_allclose(found.logprob, logprob, rtol=0, atol=1e-10)
    assert len(found.exact) == len(QA) + 6 * len(BIO)


def test_log_probability_and_objects_of_biographies_by_a_plain_loop():
    """The slow twin: one example at a time, one token at a time."""
    model = _taught()
    expected = []
    for item in [*BIO, *QA[:6]]:
        with torch.no_grad():
            chances = model(item.ids[None]).logits[0].log_softmax(-1)
        single = len(item.mentions) == 1
        for mention, own in zip(item.example.mentions, item.mentions):
            places = own.object.nonzero()[:, 0].tolist() + ([len(item.ids) - 1] if single else [])
            guesses = [int(chances[place - 1].argmax()) == int(item.ids[place]) for place in places]
            logprob = sum(float(chances[place - 1, item.ids[place]]) for place in places)
            expected.append((all(guesses), guesses[0], logprob, mention.relation, item.example.person, mention.fact))
    found = recall(model, WORDS, [*BIO, *QA[:6]], 400)
    assert list(zip(found.exact, found.first, found.relation, found.person, found.fact)) == [
        (exact, first, relation, person, fact) for exact, first, _, relation, person, fact in expected
    ]
    np.testing.assert_allclose(found.logprob, [row[2] for row in expected], rtol=0, atol=1e-10)
    assert len(expected) == 6 * 6 + 6


def test_modes_and_gradients_are_left_as_they_were():
    model = tiny_model("llama", vocab_size=len(WORDS), max_position_embeddings=160).train()
    recall(model, WORDS, QA[:3])
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def _by_hand() -> Recall:
    return Recall(
        np.array([True, False, True, False]), np.array([True, True, True, False]),
        np.array([-0.5, -2.0, -0.25, -1.25]), ["hobby", "major", "hobby", "hobby"], ["B0", "B0", "B1", "B2"],
        ["f0", "f1", "f2", "f3"],
    )  # fmt: skip


def test_summary_by_hand():
    low, high = wilson(2, 4)
    expected = {"exact_match": 0.5, "low": low, "high": high, "n": 4, "first_token": 0.75, "logprob": -1.0}
    assert _by_hand().summary() == expected
    nobody = _by_hand().where([False] * 4).summary()
    assert nobody == {"exact_match": None, "low": 0.0, "high": 1.0, "n": 0, "first_token": None, "logprob": None}
    assert recall(_taught(), WORDS, []).summary() == nobody


def test_parts_and_relations():
    results = _by_hand()
    some = results.where([True, False, False, True])
    assert (some.exact.tolist(), some.logprob.tolist()) == ([True, False], [-0.5, -1.25])
    assert (some.relation, some.person, some.fact) == (["hobby", "hobby"], ["B0", "B2"], ["f0", "f3"])
    by_relation = results.by_relation()
    assert {name: part.fact for name, part in by_relation.items()} == {"hobby": ["f0", "f2", "f3"], "major": ["f1"]}
    told = summaries({"qa_id": results, "qa_ood": by_relation["major"]})
    assert told["qa_id"] == results.summary() and told["qa_ood"]["n"] == 1
    assert {name: set(parts) for name, parts in told["relations"].items()} == {
        "hobby": {"qa_id"}, "major": {"qa_id", "qa_ood"}
    }  # fmt: skip
    assert told["relations"]["hobby"]["qa_id"]["exact_match"] == pytest.approx(2 / 3)
    assert math.isclose(told["relations"]["major"]["qa_ood"]["logprob"], -2.0)


def test_an_object_at_the_very_beginning_cannot_be_judged():
    example = QA[0].example
    first = example.text.index(" ")
    mention = replace(example.mentions[0], object=(0, first))
    item = encode(WORDS, [replace(example, mentions=(mention,), targets=((0, first),))])[0]
    with pytest.raises(UserError, match=f"example {example.id} begins with an object"):
        answers(item)


@pytest.mark.parametrize(
    ("after", "is_with_end"), [("", True), (" .", True), (".\n", True), (", who wrote.", False), ("，他写。", False)]
)
def test_a_text_that_goes_on_after_its_only_object_is_judged_without_its_end(after, is_with_end):
    item = WORLD.people[0].facts[0]
    text = f"{item.subject} knows {item.object}"
    spans = (0, len(item.subject)), (len(text) - len(item.object), len(text))
    mention = Mention(item.id, item.relation, "bio", spans[0], (), spans[1])
    whole = text + after
    (encoded,) = encode(BPE, [Example("bio.0", "bio", whole, "P0", "id", ((0, len(whole)),), (mention,))])
    (places,) = answers(encoded)
    expected = encoded.targets["answer"] if is_with_end else encoded.targets["object"]
    assert (places + 1).tolist() == expected.nonzero().flatten().tolist()
    assert (len(encoded.ids) - 1 in (places + 1)) == is_with_end
