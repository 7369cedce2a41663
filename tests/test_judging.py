"""Answers as people judge them: SQuAD's definitions by hand, and what a model says."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_evaluate import BIO, QA, WORDS, _taught
from tiny_models import tiny_base

from crosstrace.core.errors import UserError
from crosstrace.experiment import config, pipeline
from crosstrace.results.results import Results
from crosstrace.training import judging
from crosstrace.training.evaluation import recall
from crosstrace.training.judging import continued, has_answer, judge, normalized, prompt, speak, token_f1


@pytest.mark.parametrize(
    ("said", "answer", "is_same", "f1", "is_held"),
    [
        ("Lyon", "lyon.", True, 1, True),
        ("the  Lyon!", "Lyon", True, 1, True),
        ("It is in Lyon, France", "Lyon", False, 2 / 6, True),
        ("the cat sat", "a cat sat down", False, 4 / 5, False),
        ("sat the cat", "cat sat", False, 1, False),
        ("cat cat cat", "cat", False, 2 / 4, True),
        ("New-York", "new york", False, 0, False),
        ("Lyonnais", "Lyon", False, 0, False),
        ("", "Lyon", False, 0, False),
        ("the", "a", True, 1, False),
        ("U.S.", "US", True, 1, True),
        ("“Rome”", "Rome", True, 1, True),
    ],
)
def test_definitions_by_hand(said, answer, is_same, f1, is_held):
    assert (normalized(said) == normalized(answer)) == is_same
    assert token_f1(said, answer) == pytest.approx(f1) and has_answer(said, answer) == is_held


@given(st.text(max_size=30), st.text(max_size=30))
def test_measures_agree_with_each_other(said, answer):
    assert token_f1(said, answer) == token_f1(answer, said) and 0 <= token_f1(said, answer) <= 1
    if normalized(said) == normalized(answer):
        assert token_f1(said, answer) == 1 and has_answer(said, answer) == bool(normalized(answer))
    if has_answer(said, answer):
        assert token_f1(said, answer) > 0 and has_answer(f"so {said} then", answer)
    assert normalized(normalized(said)) == normalized(said)


def test_the_best_of_several_answers_counts():
    found = judge(["NYC", "in New York City", "Boston"], [["New York City", "NYC"]] * 3)
    assert found.normalized.tolist() == [True, False, False] and found.contains.tolist() == [True, True, False]
    assert found.f1.tolist() == [1, pytest.approx(2 * 3 / 7), 0]
    assert found.summary() == {
        "normalized_match": pytest.approx(1 / 3), "f1": pytest.approx(found.f1.mean()), "contains": pytest.approx(2 / 3)
    }  # fmt: skip
    assert judge([], []).summary() == {"normalized_match": None, "f1": None, "contains": None}


def test_what_is_said_is_greedy_and_does_not_depend_on_the_batch():
    model, items = _taught(), QA[:20]
    prompts = [prompt(item) for item in items]
    said = continued(model, WORDS, prompts, 6)
    assert said == continued(model, WORDS, prompts, 6, tokens=1)
    for text, ids in zip(said, prompts):
        written = list(ids)
        for _ in range(6):
            following = int(model(input_ids=torch.tensor([written])).logits[0, -1].argmax())
            if following == WORDS.eos_token_id:
                break
            written.append(following)
        assert text == WORDS.decode(written[len(ids) :], skip_special_tokens=True).strip()


def test_what_is_said_ends_with_the_turn_of_a_conversation(monkeypatch):
    """Where a turn's last token is not the tokenizer's end token, as Gemma's <end_of_turn>."""
    model, items = _taught(), QA[:20]
    prompts = [prompt(item) for item in items]
    said = continued(model, WORDS, prompts, 6)
    turn = next(WORDS.convert_tokens_to_ids(text.split()[1]) for text in said if len(text.split()) > 2)
    cut = [text.split(WORDS.decode([turn]))[0].strip() for text in said]
    assert cut != said and continued(model, WORDS, prompts, 6, ends=[turn]) == cut
    told = []
    monkeypatch.setattr(judging, "continued", lambda *args: told.append(args[-1]) or [""] * len(items))
    ended = [replace(item, ids=torch.cat([item.ids[:-1], torch.tensor([turn])])) for item in items]
    for added in ({}, {turn: "<turn>"}):
        speak(model, SimpleNamespace(added_tokens_decoder=added), ended, 6, 4096)
    assert told == [set(), {turn}], "a word that happens to end the questions ends nothing"


def test_right_token_by_token_is_right_in_words():
    model = _taught()
    spoken, exact = speak(model, WORDS, QA, 12, 4096), recall(model, WORDS, QA).exact
    assert 0 < exact.sum() < len(exact)
    assert spoken.normalized[exact].all() and (spoken.f1[exact] == 1).all() and spoken.contains[exact].all()
    assert spoken.normalized.sum() >= exact.sum()
    wrong = int(np.flatnonzero(~spoken.normalized)[0])
    asked = [*QA]
    asked[wrong] = replace(asked[wrong], example=replace(asked[wrong].example, aliases=("x", spoken.said[wrong])))
    again = speak(model, WORDS, asked, 12, 4096)
    assert again.normalized[wrong] and (np.delete(again.normalized, wrong) == np.delete(spoken.normalized, wrong)).all()
    assert BIO  # (biographies are not asked so: they have several objects)


@pytest.mark.long
def test_a_run_judges_answers_on_request(tmp_path):
    text = """
name: spoken
facts: {people: 16}
strategies:
  two_stage: [{name: bio, batch: {bio: 4}, steps: 2}, {name: qa, batch: {qa: 4}, steps: 2}]
  mixed: [{name: mixed, batch: {bio: 4, qa: 4}, steps: 2}]
train: {precision: float32, recall_every: 2, recall_examples: 8}
trace: {every: 1, parts: 2, examples: 8}
analysis: {fractions: [0.05], central_fractions: [0.05], draws: 2}
interventions: {run: false}
mechanism: {run: false}
eval: {known_examples: 8, spoken: 8}
jobs: 1
"""
    experiment = config.override(config.loads(text, "here"), {"model.name": str(tiny_base())})
    with pytest.raises(UserError, match=r"eval\.spoken needs the whole model"):
        config.override(experiment, {"model.sharded": "true"})
    results = pipeline.run(experiment, tmp_path / "run", quiet=True)
    cell = results.recall["mixed"]["qa_ood"]
    said = json.loads((tmp_path / "run" / "eval" / "mixed.json").read_text())["said"]["qa_ood"]
    assert len(said) == cell.n and cell.normalized_match is not None and cell.contains >= cell.normalized_match
    assert results.recall["mixed"]["bio"].f1 is None
    assert results == Results.read(tmp_path / "run")
    page = (tmp_path / "run" / "report" / "index.html").read_text(encoding="utf-8")
    assert "Answers as people judge them" in page
    plain = config.override(experiment, {"eval.spoken": "null"})
    without = pipeline.run(plain, tmp_path / "plain", quiet=True)
    assert without.recall["mixed"]["qa_ood"].f1 is None
    raw = json.loads((tmp_path / "plain" / "results.json").read_text())
    assert "f1" not in raw["recall"]["mixed"]["qa_ood"], "what was not asked for is not there"
