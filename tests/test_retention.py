"""Retention: how far sets move and what putting them back brings, by hand; what is trained further."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tiny_facts import tiny_world, tokenizer
from tiny_models import tiny_model

from crosstrace.core.errors import UserError
from crosstrace.data.facts import World
from crosstrace.data.text import questions
from crosstrace.data.tokens import encode
from crosstrace.experiment import config
from crosstrace.experiment.stages.retain import moved, new_material, repaired
from crosstrace.sets.interventions import snapshot
from crosstrace.sets.paramset import ParamSet
from crosstrace.training.evaluation import recall


def of(**retention) -> config.Experiment:
    return config.parse({"facts": {"people": 24}, "retention": {"people": 24, **retention}}, "the test")


def test_the_way_is_told_by_its_square_over_the_sets_share() -> None:
    model = tiny_model("llama")
    before = snapshot(model)
    name, other = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    with torch.no_grad():
        model.get_parameter(name)[0, 0] += 3.0
        model.get_parameter(name)[1, 1] -= 4.0
        model.get_parameter(other)[0, 0] += 5.0  # of a tensor that the sets do not cover: no part of the way
    masks = [torch.zeros_like(model.get_parameter(name), dtype=torch.bool) for _ in range(3)]
    masks[0][0, 0] = masks[1][1, 1] = masks[2][2, 2] = True
    (alone,) = moved(model, before, {"x": [ParamSet({name: masks[0]})]})
    total = masks[0].numel()
    assert alone["energy"] == pytest.approx(9 / 25) and alone["lift"] == pytest.approx(9 / 25 * total)
    (mean,) = moved(model, before, {"x": [ParamSet({name: mask}) for mask in masks]})
    assert mean["energy"] == pytest.approx((9 / 25 + 16 / 25 + 0) / 3) and mean["size"] == 1
    (nothing,) = moved(model, snapshot(model), {"x": [ParamSet({name: masks[0]})]})
    assert nothing["energy"] is None and nothing["lift"] is None


def test_putting_everything_back_is_the_taught_model_and_nothing_the_drifted_one() -> None:
    words = tokenizer("word")
    model = tiny_model("llama", vocab_size=len(words), max_position_embeddings=128)
    items = {"qa_id": encode(words, questions(tiny_world()))[:40]}
    with torch.no_grad():  # a model that answers some: the unembedding's rows of some objects win
        logits = recall(model, words, items["qa_id"]).logprob
        taught = snapshot(model)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    drifted = recall(model, words, items["qa_id"])
    sets = {
        "all": [ParamSet({n: torch.ones(p.shape, dtype=torch.bool) for n, p in model.named_parameters()})],
        "none": [ParamSet({n: torch.zeros(p.shape, dtype=torch.bool) for n, p in model.named_parameters()})],
    }
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    rows = repaired(model, words, taught, sets, items)
    assert [row["set"] for row in rows] == ["none", "all", "none"]
    assert rows[0]["qa_id"] == rows[2]["qa_id"] == drifted.exact.mean()
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters()), "the model drifts no more"
    model.load_state_dict(taught, strict=False)
    again = recall(model, words, items["qa_id"])
    assert rows[1]["qa_id"] == again.exact.mean() and (again.logprob == logits).all()


def test_new_people_have_no_taught_persons_name() -> None:
    experiment = of()
    material = new_material(experiment, tokenizer("word"))
    taught = {person.name for person in World.draw(experiment.facts).people}
    named = {item.example.text for item in material["new_qa"]}
    assert material["new_bio"] and named and not any(name in text for name in taught for text in named)
    assert set(new_material(of(recall=0), tokenizer("word"))) == {"new_bio"}
    with_taught_names = dataclasses.replace(experiment.facts, seed=experiment.facts.seed)
    assert {p.name for p in World.draw(with_taught_names).people} == taught


def test_a_text_file_is_trained_line_by_line_and_a_bad_one_is_told(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("Lyon is a city.\n\n  Ada likes tea.  \n", encoding="utf-8")
    (task,) = new_material(of(text=str(path)), tokenizer("space")).items()
    assert task[0] == "text" and [item.example.text for item in task[1]] == ["Lyon is a city.", "Ada likes tea."]
    assert all(item.targets["train"].all() for item in task[1]), "every token of a text is trained"
    path.write_text("\n \n")
    with pytest.raises(UserError, match="no line of text"):
        new_material(of(text=str(path)), tokenizer("word"))
    with pytest.raises(UserError, match="is no file"):
        new_material(of(text=str(tmp_path / "absent.txt")), tokenizer("word"))
    path.write_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(UserError, match="UTF-8"):
        new_material(of(text=str(path)), tokenizer("word"))
