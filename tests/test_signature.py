"""The input-level signature: coalitions against embeddings put in by hand, Shapley values against all orders, and
models of which it is known off which tokens they read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_consistency import word_model, word_pairs
from tiny_facts import tiny_world, tokenizer
from tiny_models import tiny_model
from torch import Tensor, nn

from crosstrace.analyses.consistency import FactPair
from crosstrace.analyses.signature import (
    FORMATS,
    GROUPS,
    WHOLE,
    coalitions,
    embedding_baseline,
    input_signature,
    shapley,
    token_groups,
)
from crosstrace.core.errors import UserError
from crosstrace.data.text import Example, Mention, biographies
from crosstrace.data.tokens import Encoded, encode

KINDS = ["llama", "gpt_neox", "gpt2", "qwen3", "qwen3_moe", "opt", "gemma3"]


def texts(pairs: Sequence[FactPair]) -> list[Encoded]:
    return [getattr(pair, name) for name in FORMATS for pair in pairs]


def some_texts() -> list[Encoded]:
    """Both formats, objects of one token and of several."""
    chosen = texts([word_pairs()[i] for i in (0, 2, 5, 10)])
    assert {int(item.targets["object"].sum()) for item in chosen} == {1, 2, 3}
    return chosen


def looked_up(model: nn.Module, item: Encoded) -> Tensor:
    """What the embedding module gives for a text [T, width], scaled if it scales."""
    with torch.no_grad():
        return model.get_input_embeddings()(item.ids)


def score(model: nn.Module, item: Encoded, embeddings: Tensor) -> tuple[Tensor, bool]:
    """Mean log-probability of the object's tokens with these embeddings [T, width], and whether all are the argmax."""
    logprob = model(inputs_embeds=embeddings.unsqueeze(0)).logits[0].log_softmax(-1)
    at = [t for t, own in enumerate(item.targets["object"].tolist()) if own]
    mean = sum(logprob[t - 1, item.ids[t]] for t in at) / len(at)
    return mean, all(int(logprob[t - 1].argmax()) == int(item.ids[t]) for t in at)


# ---- groups


def biography(kind: str = "word") -> Encoded:
    """A biography of three facts; what is no name, relation or object is a word of the template."""
    text = "Today Ada Mae Brook was born in Lyon. She, then, studied at Ashford College. Her hobby is chess, of all."

    def span(words):
        return (text.index(words), text.index(words) + len(words))

    mentions = (
        Mention("city", "birth_city", "b", span("Ada Mae Brook"), (span("was born in"),), span("Lyon")),
        Mention("school", "university", "b", span("She"), (span("studied"), span("at")), span("Ashford College")),
        Mention("hobby", "hobby", "b", span("Her"), (span("hobby"),), span("chess")),
    )
    return encode(tokenizer(kind), [Example("ada", "bio", text, "P", "id", ((0, len(text)),), mentions)])[0]


def test_groups_of_a_biography():
    r, s, f, o, x = "relation", "subject", "facts", "object", "rest"
    city = [x, s, s, s, r, r, r]
    known = [x, s, s, s, f, f, f, f, x]  # up to the first full stop
    school = [*known, s, x, x, x, r, r, o]
    hobby = [*known, s, x, x, x, f, f, f, f, x, s, r, x]
    for number, expected in enumerate((city, school, hobby)):
        item = biography().about(number)
        assert [GROUPS[g] for g in token_groups(item)] == expected
        assert len(item.ids) == len(expected) + 1 and len(item.context) == 2
    again = biography().about(2).about(0)  # what was left out stays known
    assert torch.equal(token_groups(again), token_groups(biography().about(2)))
    begun = token_groups(biography("bos").about(0))
    assert GROUPS[begun[0]] == x and {GROUPS[g] for g in begun} >= {x, s, r}


def test_groups_of_a_question():
    """[Which company does] {subject} [work for]?"""
    for pair in word_pairs():
        words = tokenizer("word").convert_ids_to_tokens(pair.recalled.ids[:-1])
        found = [GROUPS[g] for g in token_groups(pair.recalled)]
        end = words.index("?")
        assert found[end] == "rest" and set(found[:end]) == {"subject", "relation"}
        assert found[:end].count("subject") == 3 and set(found[end + 1 :]) <= {"object"}
        assert len(found) - end == int(pair.recalled.targets["object"].sum())


@pytest.mark.parametrize("kind", ["word", "space", "spaceless", "bos"])
def test_each_group_spells_its_own_mentions(kind):
    own, spelled = tokenizer(kind), 0

    def squeeze(words):
        return "".join("".join(words).split()).lower()

    for whole in encode(own, biographies(tiny_world(people=8)))[:2]:
        text, mentions = whole.example.text, whole.example.mentions
        for number, asked in enumerate(mentions):
            cut, told = whole.about(number), mentions[:number]
            spans = {
                "subject": [m.subject for m in (*told, asked)],
                "relation": asked.relation_words,
                "facts": [span for m in told for span in (*m.relation_words, m.object)],
            }
            for name, expected in spans.items():
                found = own.decode(cut.ids[:-1][token_groups(cut) == GROUPS.index(name)])
                assert squeeze(found) == squeeze(text[slice(*span)] for span in expected)
                spelled += bool(found)
    assert spelled == 2 * (6 + 6 + 5)


# ---- coalitions and their shares


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_coalitions_equal_embeddings_put_in_by_hand(kind):
    model, items = word_model(kind), some_texts()
    baseline = embedding_baseline(model, items)
    every = torch.cat([looked_up(model, item) for item in items])
    torch.testing.assert_close(baseline, every.mean(0), rtol=1e-12, atol=1e-12)
    assert torch.equal(embedding_baseline(model, items, "zeros"), torch.zeros_like(baseline))
    logprob, exact = coalitions(model, items, baseline, pad_id=0, tokens=30)
    for number, item in enumerate(items):
        group = [*token_groups(item).tolist(), -1]  # nothing is predicted from the last token
        for column in range(WHOLE + 1):
            gone = torch.tensor([g >= 0 and not column >> g & 1 for g in group])
            with torch.no_grad():
                at = torch.where(gone.unsqueeze(1), baseline, looked_up(model, item))
                expected, right = score(model, item, at)
            assert logprob[number, column] == pytest.approx(float(expected), abs=1e-10)
            assert exact[number, column] == right
    for size, order in ((1, range(8)), (64, [5, 1, 7, 0, 3, 2, 6, 4])):
        found, _ = coalitions(model, [items[i] for i in order], baseline, pad_id=3, tokens=size)
        np.testing.assert_allclose(found, logprob[[*order]], rtol=0, atol=1e-10)


@pytest.mark.parametrize("players", [1, 2, 5])
def test_shapley_values_are_means_over_all_orders(players):
    values = np.random.default_rng(players).normal(size=(3, 1 << players))
    expected = np.zeros((3, players))
    orders = list(permutations(range(players)))
    for order in orders:
        there = 0
        for player in order:
            expected[:, player] += (values[:, there | 1 << player] - values[:, there]) / len(orders)
            there |= 1 << player
    found = shapley(values)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.sum(1), values[:, -1] - values[:, 0], rtol=0, atol=1e-12)


def test_who_changes_nothing_has_nothing_and_who_are_alike_have_the_same():
    column = np.arange(8)
    first, second = column & 1, column >> 1 & 1  # the third player changes nothing
    assert shapley((5.0 * first * second)[None]).tolist() == [[2.5, 2.5, 0.0]]
    assert shapley((first + 3.0 * second)[None]) == pytest.approx(np.array([[1.0, 3.0, 0.0]]))


def test_exact_is_that_of_every_token_of_the_object():
    """Objects that are what the model says: right as they are, and no longer once one token is wrong."""
    model, item = word_model("llama"), some_texts()[0]
    places = item.targets["object"].nonzero().flatten().tolist()
    ids = item.ids.clone()
    for place in places:
        with torch.no_grad():
            ids[place] = model(input_ids=ids[:place].unsqueeze(0)).logits[0, -1].argmax()
    said = replace(item, ids=ids)
    wrong = replace(item, ids=torch.cat([ids[:-1], (ids[-1:] + 1) % 50]))
    _, exact = coalitions(model, [said, wrong], embedding_baseline(model, [said]), pad_id=0)
    assert len(places) > 1 and exact[:, WHOLE].tolist() == [1, 0]


# ---- planted


class Sensitive(nn.Module):
    """Logits that depend on the embeddings of some ids alone, at or before each token; all the rest is not read."""

    def __init__(self, ids: Sequence[int]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(tokenizer("word")), 6, dtype=torch.float64)
        self.head = nn.Linear(6, len(tokenizer("word")), dtype=torch.float64)
        self.read = torch.tensor(list(ids))

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        x = self.embedding(input_ids) * torch.isin(input_ids, self.read).unsqueeze(-1)
        return SimpleNamespace(logits=self.head(x.cumsum(1).tanh()))


def test_a_model_that_reads_names_alone_has_its_signature_on_the_subject():
    pairs = word_pairs(2)
    names = {int(i) for item in texts(pairs) for i in item.ids[item.mentions[0].subject]}
    names |= {int(i) for item in texts(pairs) for m in item.context for i in item.ids[: len(m.subject)][m.subject]}
    rows = input_signature(Sensitive(sorted(names)), pairs, pad_id=0)
    assert [(row["format"], row["group"]) for row in rows] == [(f, g) for f in FORMATS for g in (*GROUPS, "all")]
    for row in rows:
        if row["group"] in ("subject", "all"):
            assert row["share"] == pytest.approx(1) and abs(row["erased"]) > 0.01
            assert row["attribution"] == pytest.approx(row["erased"])
        else:
            assert row["share"] == row["attribution"] == 0 and row["erased"] in (0, None)
    missing = [row for row in rows if row["erased"] is None]
    assert [(row["format"], row["group"]) for row in missing] == [("recalled", "facts")]  # a question is of one fact
    assert missing[0]["facts"] == missing[0]["people"] == missing[0]["tokens"] == 0


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_without_attention_only_the_token_before_each_token_of_the_object_counts(kind):
    model = tiny_model(kind, vocab_size=len(tokenizer("word")), max_position_embeddings=128)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "o_proj" in name or "attn.c_proj" in name:
                p.zero_()
    # one token: relation words end right before it in a biography, and the question mark in a question
    pairs = [pair for pair in word_pairs() if int(pair.stored.targets["object"].sum()) == 1]
    rows = {(row["format"], row["group"]): row for row in input_signature(model, pairs, pad_id=0)}
    assert len(pairs) == 15
    for key, row in rows.items():
        if key in (("stored", "relation"), ("recalled", "rest"), ("stored", "all"), ("recalled", "all")):
            assert row["share"] == pytest.approx(1) and abs(row["erased"]) > 0.01
        else:
            assert row["share"] == pytest.approx(0, abs=1e-9) and (row["erased"] or 0) == pytest.approx(0, abs=1e-9)
    assert rows["stored", "object"]["facts"] == 0


# ---- rows


def test_rows_are_means_over_texts_and_add_up():
    model, pairs = word_model("qwen3"), word_pairs(3)
    rows = input_signature(model, pairs, pad_id=0)
    baseline = embedding_baseline(model, texts(pairs))
    for name in FORMATS:
        items = [getattr(pair, name) for pair in pairs]
        logprob, exact = coalitions(model, items, baseline, pad_id=0)
        own = {row["group"]: row for row in rows if row["format"] == name}
        sums = shapley(logprob)
        for g, group in enumerate(GROUPS):
            row, has = own[group], np.array([bool((token_groups(item) == g).any()) for item in items])
            assert row["attribution"] == pytest.approx(sums[:, g].mean())
            assert row["share"] == pytest.approx((np.abs(sums[:, g]) / np.abs(sums).sum(1)).mean())
            single = [value for values in row["by_person"].values() for value in values]
            assert single == pytest.approx((np.abs(sums[:, g]) / np.abs(sums).sum(1)).tolist(), rel=1e-5, abs=1e-9)
            assert row["tokens"] == pytest.approx(np.mean([int((token_groups(i) == g).sum()) for i in items]))
            assert row["facts"] == has.sum() and row["people"] == (3 if has.any() else 0)
            if has.any():
                assert row["erased"] == pytest.approx((logprob[:, WHOLE] - logprob[:, WHOLE - (1 << g)])[has].mean())
                assert row["erased_exact"] == pytest.approx(exact[has, WHOLE - (1 << g)].mean())
            else:
                assert row["erased"] is None and row["attribution"] == 0
            for value in ("attribution", "share", "erased"):
                if row[value] is not None:
                    assert row[f"{value}_low"] <= row[value] <= row[f"{value}_high"]
        total = own["all"]
        assert sum(own[group]["attribution"] for group in GROUPS) == pytest.approx(total["attribution"])
        assert sum(own[group]["share"] for group in GROUPS) == pytest.approx(1)
        assert total["attribution"] == pytest.approx(total["erased"])  # nothing is left over
        assert total["logprob"] == pytest.approx(logprob[:, WHOLE].mean()) and total["exact"] == exact[:, WHOLE].mean()
        assert total["facts"] == 18
    assert own["subject"]["attribution_low"] < own["subject"]["attribution_high"]
    alone = input_signature(model, pairs, pad_id=0, formats=["recalled"])
    assert alone == [row for row in rows if row["format"] == "recalled"], "with the same baseline"


# ---- bad input, and what is left behind


def test_bad_input_is_told():
    model, items = word_model("llama"), some_texts()
    baseline = embedding_baseline(model, items)
    whole = encode(tokenizer("word"), biographies(tiny_world()))[:1]
    begins = replace(items[0], mentions=(replace(items[0].mentions[0], object=torch.ones(len(items[0].ids)).bool()),))
    longer = replace(items[0], mentions=(replace(items[0].mentions[0], object=items[0].mentions[0].subject),))
    for item in (*whole, begins, longer):
        with pytest.raises(UserError, match="about one fact, up to its object"):
            coalitions(model, [items[0], item], baseline, pad_id=0)
    with pytest.raises(UserError, match="tokens is 0"):
        coalitions(model, items, baseline, pad_id=0, tokens=0)
    with pytest.raises(UserError, match="unknown baseline 'median'"):
        embedding_baseline(model, items, "median")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="at least one text"):
        input_signature(model, [], pad_id=0)
    with pytest.raises(UserError, match="Linear tells no input embeddings"):
        embedding_baseline(nn.Linear(2, 2), items)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_found(fails):
    model = tiny_model("llama", vocab_size=len(tokenizer("word")), max_position_embeddings=128).train()
    model.model.norm.eval()
    frozen = [name for name, _ in model.named_parameters()][1:4]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    calls, failing = [], []

    def count(module, args):
        calls.append(torch.is_grad_enabled())
        if len(calls) in failing:
            raise RuntimeError("planted")

    measures = (
        lambda: input_signature(model, word_pairs()[:2], pad_id=0),
        lambda: coalitions(model, some_texts(), torch.zeros(24), pad_id=0),
    )
    for measure in measures:
        calls.clear()
        with model.model.norm.register_forward_pre_hook(count):
            if fails:
                failing[:] = [2]
                with pytest.raises(RuntimeError, match="planted"):
                    measure()
                assert len(calls) == 2
            else:
                measure()
                assert len(calls) > 2
        assert [module.training for module in model.modules()] == modes
        assert [name for name, p in model.named_parameters() if not p.requires_grad] == frozen
        assert all(p.grad is None and torch.equal(p, values[name]) for name, p in model.named_parameters())
        assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
