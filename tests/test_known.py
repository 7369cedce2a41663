"""What a base knows of the world: against greedy generation, by hand, and in runs of a base that knows a little."""

from __future__ import annotations

import functools
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from crosstrace.cli.commands import main
from crosstrace.core.errors import UserError
from crosstrace.data.text import texts
from crosstrace.data.tokens import collate, encode
from crosstrace.data.world_facts import best_wordings, world_of
from crosstrace.experiment import config, pipeline
from crosstrace.experiment.examples import asks
from crosstrace.experiment.stages import known
from crosstrace.experiment.stages.known import said_instead
from crosstrace.models.loading import save_model
from crosstrace.training.evaluation import recall
from crosstrace.training.judging import continued
from crosstrace.training.losses import example_losses

CAPITALS = {
    "Norlia": "Niger", "Sarmat": "Nigeria", "Beluna": "Ostra", "Kaltor": "Vim", "Dorane": "Vimpol", "Esk": "Tarn",
    "Fenwick": "Lowe", "Gallia": "Lowell", "Hurst": "Pell", "Istra": "Rome",
}  # fmt: skip
WORDING = """
capital:
  statements: ["[The capital of] {subject} [is] {object}.", "{object} [is the capital of] {subject}.",
               "[In] {subject}[, the government sits in] {object}."]
  questions: ["[What is the capital of] {subject}?"]
"""


@functools.cache
def facts() -> Path:
    """The capitals as `crosstrace import` writes them."""
    home = Path(tempfile.mkdtemp())
    rows = ["subject,relation,object", *(f"{s},capital,{o}" for s, o in CAPITALS.items())]
    (home / "capitals.csv").write_text("\n".join(rows))
    (home / "wording.yaml").write_text(WORDING)
    words = ["import", str(home / "capitals.csv"), str(home / "own"), "--wording", str(home / "wording.yaml")]
    main(words)
    return home / "own"


@functools.cache
def base() -> Path:
    """A folder with a model that half knows the capitals, in the first wording best, and has words for people."""
    experiment = an_experiment(model="none")
    people = texts(experiment.facts)
    inner = Tokenizer(models.BPE(unk_token=None))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    inner.train_from_iterator([item.text for item in people["bio"] + people["qa"]], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="</s>")
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "head_dim": 12, "num_hidden_layers": 2, "max_position_embeddings": 256}
    model = tiny_model("llama", torch.float32, tied=True, vocab_size=len(tokenizer), **sizes)
    told = [item for item in asks(experiment, tokenizer) if ".statement.0" in item.mentions[0].wording]
    seen = encode(tokenizer, told[:7])
    adam = torch.optim.AdamW(model.parameters(), lr=5e-3)
    batch = collate(seen, "all", pad_id=0)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    for _ in range(60):
        adam.zero_grad()
        example_losses(model(**inputs).logits, batch["labels"]).mean().backward()
        adam.step()
    folder = Path(tempfile.mkdtemp()) / "base"
    save_model(model.eval(), tokenizer, folder)
    return folder


def an_experiment(model: str | None = None, **changes: str) -> config.Experiment:
    small = """
name: known
facts: {people: 16}
strategies:
  mixed: [{name: mixed, batch: {bio: 4, qa: 4}, steps: 6}]
train: {precision: float32, recall_every: 3, recall_examples: 12, checkpoint_every: 3}
trace: {every: 2, parts: 2, check: false, definitions: [per_example, summed]}
analysis: {fractions: [0.05], central_fractions: [0.05], draws: 2}
interventions: {run: false}
mechanism: {run: false}
jobs: 1
"""
    own = {"model.name": model or str(base()), "eval.known": str(facts())}
    return config.override(config.loads(small, "small"), own | changes)


def loaded() -> tuple[Any, Any]:
    from crosstrace.models.loading import load_model, load_tokenizer

    return load_model(str(base()), "float32"), load_tokenizer(str(base()))


def test_facts_are_asked_in_every_wording_that_names_the_object_after_the_subject():
    _, tokenizer = loaded()
    found = asks(an_experiment(), tokenizer)
    assert len(found) == 3 * len(CAPITALS)
    of_one = [item for item in found if item.text.count("Norlia")]
    assert [item.text for item in of_one] == [
        "The capital of Norlia is Niger.", "In Norlia, the government sits in Niger.",
        "What is the capital of Norlia? Niger",
    ]  # fmt: skip
    for item in found:
        (mention,) = item.mentions
        assert item.open_ended and item.task == "known"
        assert item.text[slice(*mention.object)] == CAPITALS[item.text[slice(*mention.subject)]]
    assert {item.split for item in found} == {"id", "ood"}


def test_an_open_ended_answer_is_right_as_greedy_generation_says_it():
    """Whether the model, left to itself, says the object and then no letter more."""
    model, tokenizer = loaded()
    every = encode(tokenizer, asks(an_experiment(), tokenizer))
    # asked for a part of what the model says, too: "Nige" where it says "Niger"
    cut = [
        replace(item.example, id=f"cut.{i}", text=item.example.text[: stop - 1], targets=(),
                mentions=(replace(item.example.mentions[0], object=(start, stop - 1)),))
        for i, item in enumerate(every) for start, stop in [item.example.mentions[0].object]
    ]  # fmt: skip
    every += encode(tokenizer, cut)
    found = recall(model, tokenizer, every)
    for item, exact in zip(every, found.exact):
        places = item.mentions[0].object.nonzero().flatten()
        prompt = item.ids[: int(places[0])][None]
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=0,
                             max_new_tokens=len(places) + 1)[0, prompt.shape[1] :]  # fmt: skip
        same = torch.equal(out[: len(places)], item.ids[places])
        said, more = tokenizer.decode(item.ids[places]), tokenizer.decode(out[: len(places) + 1])
        goes_on = more[len(said) : len(said) + 1].isalnum()
        assert bool(exact) == (same and not goes_on), item.example.text
    assert found.exact.any() and not found.exact.all()
    one_by_one = np.concatenate([recall(model, tokenizer, [item]).exact for item in every])
    assert (one_by_one == found.exact).all()
    closed = [replace(item, example=replace(item.example, open_ended=False)) for item in every]
    assert recall(model, tokenizer, closed).exact.sum() < found.exact.sum()  # the end token is asked for


def test_the_best_wording_of_each_relation_is_kept_with_what_is_known_in_it():
    _, tokenizer = loaded()
    every = list(asks(an_experiment(), tokenizer))
    right = [
        ("question" in item.mentions[0].wording and item.text.count("Esk") + item.text.count("Hurst") > 0)
        or (".statement.0" in item.mentions[0].wording and "Esk" in item.text)
        for item in every
    ]
    chosen, (row,) = best_wordings(every, right)
    assert [item.text for item in chosen] == ["What is the capital of Esk? Tarn", "What is the capital of Hurst? Pell"]
    assert row["facts"] == 10 and row["known"] == 2 and row["wording"] == "capital.question.0"
    assert row["wordings"] == {"capital.statement.0": 1, "capital.statement.2": 0, "capital.question.0": 2}
    assert row["example"] == "What is the capital of Norlia? Niger"


def test_what_is_said_instead_is_told_apart(monkeypatch: pytest.MonkeyPatch):
    model, tokenizer = loaded()
    every = encode(tokenizer, asks(an_experiment(), tokenizer)[:5])
    answers = ["Vimpol, a town", "Lyon.", "", "Vimpolitan", "Rome and more"]
    monkeypatch.setattr(known, "continued", lambda *args: answers)
    rows = said_instead(model, tokenizer, every, ["Lyon", "Rome"], {"capital": {*CAPITALS.values()}})
    assert [row["kind"] for row in rows] == ["relation", "taught", "nothing", "other", "taught"]
    assert rows[0]["prompt"] == "The capital of Norlia is" and rows[0]["object"] == "Niger"


def test_a_model_goes_on_alone_as_among_others():
    model, tokenizer = loaded()
    prompts = [tokenizer(text)["input_ids"] for text in ("The capital of Esk is", "In", "The capital of Hurst is")]
    together = continued(model, tokenizer, prompts, 12)
    assert together == [continued(model, tokenizer, [prompt], 12)[0] for prompt in prompts]
    assert together[0].startswith("Tarn")


@pytest.mark.long
def test_a_run_follows_what_the_base_knew(tmp_path: Path):
    experiment = an_experiment()
    results = pipeline.run(experiment, tmp_path / "run", quiet=True).as_values()
    (row,) = results["known"]["relations"]
    assert row["wording"] == "capital.statement.0" and 0 < row["known"] < row["facts"] == 10
    base, taught = (results["recall"][name]["known"] for name in ("base", "mixed"))
    assert base["n"] == taught["n"] == row["known"] and base["exact_match"] == 1
    assert "known_replayed" not in results["recall"]["base"]
    of_taught = results["known"]["models"]["mixed"]
    assert len(of_taught["instead"]) == round(taught["n"] * (1 - taught["exact_match"]))
    assert results["known"]["models"]["base"]["instead"] == []
    assert of_taught["relations"]["known"]["capital"]["n"] == row["known"]
    assert next(point["known"] for point in results["history"]["mixed"]) == 1
    assert results["history"]["mixed"][-1]["known"] == pytest.approx(taught["exact_match"])
    page = (tmp_path / "run/report/index.html").read_text()
    assert "What the base knew" in page and "The capital of Norlia is Niger." in page
    assert "capital" not in results["recall"]["mixed"]["relations"]
    # the same run without: nothing else changes
    unasked = config.override(experiment, {"eval.known": "null"})
    without = pipeline.run(unasked, tmp_path / "without", quiet=True).as_values()
    for part in ("shared", "similarity", "training", "claims"):
        a, b = (json.loads(json.dumps(r[part])) for r in (results, without))
        for found in (a, b):
            found["mixed"].pop("seconds") if part == "training" else None
        assert a == b, part
    assert (
        "known" not in without
        and "not asked facts of the world" in (tmp_path / "without/report/index.html").read_text()
    )


def test_what_is_replayed_is_asked_apart(tmp_path: Path):
    changes = {"strategies": "{mixed: [{name: mixed, batch: {bio: 4, qa: 4}, steps: 6, replay: {known: 3}}]}"}
    experiment = an_experiment(**changes)
    results = pipeline.run(experiment, tmp_path / "run", quiet=True).as_values()
    n = {part: results["recall"]["mixed"][part]["n"] for part in ("known", "known_replayed")}
    assert min(n.values()) > 0 and sum(n.values()) == results["known"]["relations"][0]["known"]
    assert results["training"]["mixed"]["examples"] == {"bio": 24, "qa": 24, "known": 18}
    assert {row["task"] for row in results["maps"]["mixed"]} == {"bio", "qa", "shared"}  # it is never traced
    halves = {person.name: person.in_distribution for person in world_of(str(facts())).people}
    kept = [json.loads(line) for line in (tmp_path / "run/known/known.jsonl").read_text().splitlines()]
    assert all(halves[row["text"][slice(*row["mentions"][0]["subject"])]] == (row["split"] == "id") for row in kept)


def test_impossible_settings_are_told(tmp_path: Path):
    with pytest.raises(UserError, match=r"eval.known = .* holds no world.json; expected bundled, or a folder"):
        pipeline.run(an_experiment(**{"eval.known": str(tmp_path)}), tmp_path / "run", quiet=True)
    replaying = {"strategies": "{mixed: [{name: mixed, batch: {bio: 4, qa: 4}, steps: 6, replay: {known: 3}}]}"}
    with pytest.raises(UserError, match=r"known is replayed, but eval.known names no facts"):
        an_experiment(**replaying | {"eval.known": "null"})
    other = str(facts())
    with pytest.raises(UserError, match=r"has no fact that .* could answer"):  # words of people alone
        pipeline.run(an_experiment(model="bundled", **{"eval.known": other}), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_an_import_leaves_out_what_the_model_knows(tmp_path: Path):
    model, tokenizer = loaded()
    every = encode(tokenizer, asks(an_experiment(), tokenizer))
    right = [item.example for item, exact in zip(every, recall(model, tokenizer, every).exact) if exact]
    known = {example.text[slice(*example.mentions[0].subject)] for example in right}
    words = ["import", str(facts().parent / "capitals.csv"), str(tmp_path / "own"), "--wording",
             str(facts().parent / "wording.yaml"), "--model", str(base())]  # fmt: skip
    main([*words, "--unknown"])
    counts = json.loads((tmp_path / "own/import.json").read_text())
    kept = {row["name"] for row in json.loads((tmp_path / "own/world.json").read_text())["subjects"]}
    assert counts["dropped"] == {"known to the model": len(known)} and kept == {*CAPITALS} - known and known and kept
    told = (tmp_path / "own/dropped.csv").read_text()
    assert all(f"{subject} | capital | {CAPITALS[subject]}" in told for subject in known)
    with pytest.raises(SystemExit):
        main([*words[:5], "--unknown"])
