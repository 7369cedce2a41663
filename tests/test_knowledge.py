"""What a model knows, watched while a Trainer trains it: what is asked, when, what is told, and that training is the
same."""

from __future__ import annotations

import itertools
import json
import random
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_facts
import torch
from tiny_models import VOCABULARY, tiny_model
from torch import multiprocessing, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import Trainer, TrainerCallback, TrainingArguments

from crosstrace.core.errors import UserError
from crosstrace.data.facts import FactSettings, World
from crosstrace.data.text import biographies, questions
from crosstrace.models.loading import load_model, load_tokenizer
from crosstrace.trace.callback import TraceCallback
from crosstrace.training import knowledge
from crosstrace.training.knowledge import KEY, ForgettingWarning, KnowledgeCallback
from crosstrace.training.watched import Watched, read_rows

WORLD = World.draw(FactSettings(people=8))
BIOS, QUESTIONS = list(biographies(WORLD)), list(questions(WORLD))
CHAT = "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} </s>{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer("bundled")


def answer_of(tokenizer: Any, item: Any) -> str:
    return tokenizer.decode(item.ids[item.mentions[0].object])


QUESTION = QUESTIONS[0].text
CITY = QUESTION[slice(*QUESTIONS[0].mentions[0].object)]
PROMPT = QUESTION[: QUESTIONS[0].mentions[0].object[0]]
FORMS = {
    "example": QUESTIONS[0],
    "prompt, completion": {"prompt": PROMPT, "completion": CITY},
    "blank in the completion": {"prompt": PROMPT.rstrip(), "completion": " " + CITY},
    "question, answer": {"question": PROMPT.rstrip(), "answer": CITY},
    "several answers": {"question": PROMPT.rstrip(), "answer": [CITY, "other"]},
    "alpaca": {"instruction": PROMPT.rstrip(), "output": CITY, "input": ""},
    "alpaca with input": {
        "instruction": PROMPT.split(" ", 1)[0],
        "input": PROMPT.rstrip().split(" ", 1)[1],
        "output": CITY,
    },
    "an answer with aliases": {"question": PROMPT.rstrip(), "answer": {"value": CITY, "aliases": []}},
    "SQuAD": {"question": PROMPT.rstrip(), "answers": {"text": [CITY], "answer_start": [3]}},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_question_is_read_in_any_form(form, tokenizer):
    (item,) = read_rows("held_out", [FORMS[form]], tokenizer)
    (plain,) = read_rows("held_out", [QUESTIONS[0]], tokenizer)
    assert item.ids.tolist() == plain.ids.tolist() and answer_of(tokenizer, item) == answer_of(tokenizer, plain)


def test_rows_of_tokens_and_conversations_are_read(tokenizer):
    (plain,) = read_rows("held_out", [QUESTIONS[0]], tokenizer)
    ids, mask = plain.ids.tolist(), plain.mentions[0].object.tolist()
    labels = [token if marked else -100 for token, marked in zip(ids, mask)]
    for row in ({"labels": labels}, {"completion_mask": [int(m) for m in mask]}, {"assistant_masks": mask}):
        (item,) = read_rows("held_out", [{"input_ids": ids} | row], tokenizer)
        assert answer_of(tokenizer, item) == answer_of(tokenizer, plain)
    for row in ({}, {"labels": ids}, {"labels": torch.tensor(ids)}):  # every token is to be predicted
        (item,) = read_rows("stored", [{"input_ids": ids} | row], tokenizer)
        assert not item.example.mentions and item.ids.tolist() == ids
    padded, unmarked = [*ids, 0, 0], [-100, -100]
    for row in (
        {"attention_mask": [1] * len(ids) + [0, 0]},
        {"attention_mask": [1] * len(ids) + [0, 0], "labels": [*ids, *unmarked]},
        {"labels": [*ids, *unmarked]},
    ):
        (item,) = read_rows("stored", [{"input_ids": padded} | row], tokenizer)
        assert not item.example.mentions and item.ids.tolist() == ids
    (item,) = read_rows("held_out", [{"input_ids": padded, "labels": [*labels, *unmarked]}], tokenizer)
    assert answer_of(tokenizer, item) == answer_of(tokenizer, plain)
    left = {"input_ids": [0, 0, *ids], "attention_mask": [0, 0] + [1] * len(ids), "labels": [*unmarked, *ids]}
    assert read_rows("stored", [left], tokenizer)[0].ids.tolist() == ids

    chat = load_tokenizer("bundled")
    chat.chat_template = CHAT
    told = [{"role": "user", "content": PROMPT.strip()}, {"role": "assistant", "content": CITY}]
    for row in ({"messages": told}, {"prompt": told[:1], "completion": told[1:]}):
        (item,) = read_rows("held_out", [row], chat)
        assert answer_of(chat, item) == answer_of(tokenizer, plain)
    for answer in ("s", "user", "content"):  # the template's own words hold it
        (item,) = read_rows("held_out", [{"messages": [told[0], {"role": "assistant", "content": answer}]}], chat)
        start, stop = item.example.mentions[0].object
        text = item.example.text
        assert text[start:stop] == answer and text[:start].endswith("assistant ") and text[stop:] == " </s>"


def test_texts_are_cut_to_what_the_model_reads_and_long_questions_refused(tokenizer):
    text = " ".join(item.text for item in BIOS)
    (item,) = read_rows("stored", [text], tokenizer, 20)
    (whole,) = read_rows("stored", [text], tokenizer)
    assert item.ids.tolist() == whole.ids[:20].tolist() and len(item.targets["all"]) == 20
    with pytest.raises(UserError, match="but the training reads 3; expected a shorter question"):
        read_rows("held_out", [QUESTIONS[0]], tokenizer, 3)


REFUSED = {
    "keys": ({"a": 1, "b": 2}, "row 0 has the keys a, b; expected a text"),
    "kind": (3, "row 0 is a int; expected a text"),
    "empty text": ("  ", "row 0 is an empty text"),
    "empty answer": ({"prompt": "Who?", "completion": " "}, "row 0 has an empty answer"),
    "no label": ({"input_ids": [3, 4, 5], "labels": [-100] * 3}, "row 0 has no label"),
    "only the first label": ({"input_ids": [3, 4, 5], "labels": [3, -100, -100]}, "row 0 has 1 token"),
    "labels": ({"input_ids": [3, 4, 5], "labels": [3]}, "row 0 has 3 tokens and 1 labels"),
    "one token": ({"input_ids": [3]}, "row 0 has 1 token"),
    "empty list": ({"question": "Who?", "answer": []}, "answer is '\\[\\]'; expected a text"),
    "object": ({"question": "Who?", "answer": {"a": 1}}, "answer is 'None'; expected a text"),
    "packed": ({"input_ids": [3, 4, 5, 6], "seq_lengths": [2, 2]}, "holds several texts in one row"),
    "packed positions": ({"input_ids": [3, 4, 5, 6], "position_ids": [0, 1, 0, 1]}, "holds several texts in one row"),
    "mask": ({"input_ids": [3, 4, 5], "attention_mask": [1]}, "has 3 tokens and 1 labels or marks"),
    "turns": ({"messages": [{"role": "user", "content": "Who?"}]}, "no conversation that ends with the assistant's"),
    "no template": (
        {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]},
        "chat template of the tokenizer refuses it",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_rows_are_refused_in_a_sentence(case, tokenizer):
    row, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        read_rows("stored", [row], tokenizer)


def test_scores_are_those_of_a_loop(tokenizer):
    model = load_model("bundled", "float64")
    rows = [BIOS[0].text, *(item.text for item in BIOS[1:4])]
    right, logprob = Watched("stored", read_rows("stored", rows, tokenizer)).scores(model, tokenizer)
    for text, share, mean in zip(rows, right, logprob, strict=True):
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        assert ids[0, -2] != tokenizer.eos_token_id
        predicted = model(ids).logits[0, :-1].log_softmax(-1)
        assert share == pytest.approx((predicted.argmax(-1) == ids[0, 1:]).double().mean().item())
        assert mean == pytest.approx(predicted.gather(1, ids[0, 1:, None]).mean().item())
    asked = [{"prompt": PROMPT, "completion": CITY}, {"prompt": PROMPT, "completion": "Nowhere"}, *rows]
    both, _ = Watched("stored", read_rows("stored", asked, tokenizer)).scores(model, tokenizer)
    assert set(both[:2]) <= {0, 1} and both[2:].tolist() == right.tolist()


class Rows(torch.utils.data.Dataset):
    def __init__(self, count: int = 24) -> None:
        draw = random.Random(0)
        self.rows = [[draw.randrange(3, VOCABULARY) for _ in range(6)] for _ in range(count)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"input_ids": torch.tensor(self.rows[i]), "labels": torch.tensor(self.rows[i])}


def a_trainer(folder: Path, tokenizer: Any, **options: Any) -> Trainer:
    settings = {"output_dir": str(folder), "max_steps": 8, "per_device_train_batch_size": 4, "report_to": "none",
                "learning_rate": 0.01, "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}  # fmt: skip
    settings |= options
    model = tiny_model("llama", torch.float32, attention_dropout=0.2, vocab_size=len(tokenizer))
    arguments = TrainingArguments(**settings)
    return Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows(4), processing_class=tokenizer)


def watch(trainer: Trainer, **options: Any) -> KnowledgeCallback:
    rows = [{"input_ids": row} for row in Rows().rows]
    asked = [row | {"labels": [-100, -100, *row["input_ids"][2:]]} for row in rows]
    given = {"stored": rows[:12], "trained": asked[:4], "held_out": asked[12:], "known": None} | options
    watching = KnowledgeCallback(trainer, **given)
    trainer.add_callback(watching)
    return watching


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def test_training_is_the_same_bit_for_bit_and_everything_is_logged(tmp_path, tokenizer):
    plain = a_trainer(tmp_path, tokenizer)
    plain.train()
    watched = a_trainer(tmp_path, tokenizer)
    watching = watch(watched, every=3)
    watched.train()
    ends, ends_watched = weights_of(plain), weights_of(watched)
    assert all(torch.equal(ends[name], ends_watched[name]) for name in ends)
    assert [row["step"] for row in watching.history if row["part"] == "stored"] == [0, 3, 6, 8]
    assert {row["part"]: row["n"] for row in watching.history} == {"stored": 12, "trained": 4, "held_out": 12}
    logged = [row for row in watched.state.log_history if "knowledge/stored/recall" in row]
    assert [row["step"] for row in logged] == [0, 3, 6, 8]
    for row in watching.history:
        entry = next(log for log in logged if log["step"] == row["step"])
        assert entry[f"knowledge/{row['part']}/recall"] == row["recall"]
        assert entry[f"knowledge/{row['part']}/logprob"] == row["logprob"]
    stored = [row["logprob"] for row in watching.history if row["part"] == "stored"]
    assert stored[-1] > stored[0]  # the texts are trained


def test_a_resumed_training_has_the_same_history(tmp_path, tokenizer):
    whole = a_trainer(tmp_path / "whole", tokenizer, save_strategy="steps", save_steps=4)
    expected = watch(whole, every=2)
    whole.train()
    resumed = a_trainer(tmp_path / "resumed", tokenizer)  # in another folder
    watching = watch(resumed, every=2)
    target = tmp_path / "whole" / "checkpoint-4"
    resumed.train(resume_from_checkpoint=str(target))
    assert watching.history == expected.history
    assert watching._best == expected._best and watching._best_step == expected._best_step

    others = a_trainer(tmp_path / "others", tokenizer)
    watch(others, every=2, held_out=[])
    with pytest.raises(UserError, match="watched other texts or questions"):
        others.train(resume_from_checkpoint=str(target))
    state = json.loads((target / "trainer_state.json").read_text())
    del state["stateful_callbacks"][KEY]
    (target / "trainer_state.json").write_text(json.dumps(state))
    anew = a_trainer(tmp_path / "anew", tokenizer)
    watching = watch(anew, every=2)
    with pytest.warns(UserWarning, match="begins anew"):
        anew.train(resume_from_checkpoint=str(target))
    assert watching.history[0]["step"] == 4


@pytest.mark.long
def test_the_last_look_is_of_the_weights_that_its_update_made(tmp_path, tokenizer):
    """Early stopping, after which the Trainer loads an earlier checkpoint before training ends."""

    class StopsAtSix(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step >= 6

    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 20}
    ended = []
    for best in (False, True):
        trainer = a_trainer(
            tmp_path / str(best), tokenizer, **options, load_best_model_at_end=best, greater_is_better=True
        )
        trainer.add_callback(StopsAtSix())
        watching = watch(trainer, every=100)
        trainer.train()
        assert [row["step"] for row in watching.history if row["part"] == "stored"] == [0, 6]
        ended.append([row for row in watching.history if row["step"] == 6])
    assert ended[0] == ended[1]


class Clock:
    """A clock by which an update takes a second and a look a given time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, look: float) -> None:
        self.now, self.look = 100.0, look
        monkeypatch.setattr(knowledge, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def asked(self, *args: Any, **kwargs: Any) -> tuple[np.ndarray, np.ndarray]:
        self.now += self.look
        return np.ones(4), np.zeros(4)


@pytest.mark.parametrize(("updates", "look", "fits"), [(2000, 0.5, True), (400, 5.0, True), (100, 4.0, False)])
def test_looks_take_the_share_of_the_time_that_they_may(updates, look, fits, monkeypatch, tmp_path, tokenizer):
    clock = Clock(monkeypatch, look)
    monkeypatch.setattr(Watched, "scores", clock.asked)
    watching = KnowledgeCallback(a_trainer(tmp_path, tokenizer), stored=["a text"], known=None)
    state = SimpleNamespace(global_step=0, max_steps=updates, is_world_process_zero=True, stateful_callbacks={})
    monkeypatch.setattr(knowledge.Trainer, "log", lambda *args: None)
    args, control = (
        SimpleNamespace(bf16=False, load_best_model_at_end=False),
        SimpleNamespace(should_training_stop=False),
    )
    watching.on_train_begin(args, state, control, model=None)
    for state.global_step in range(1, updates + 1):
        clock.now += 1.0
        watching.on_step_end(args, state, control, model=None)
    watching.on_train_end(args, state, control, model=None)
    steps = [row["step"] for row in watching.history]
    assert steps[0] == 0 and steps[-1] == updates and len(steps) == len({*steps})
    most = int(0.03 * (clock.now - 100) / look)
    assert watching.time_share == pytest.approx(len(steps) * look / (clock.now - 100))
    if not fits:
        assert len(steps) == 2
        return
    assert watching.time_share <= 0.03 and most - 1 <= len(steps) <= most
    gaps = np.diff(steps)[1:-1]  # (the first updates are no measure, and the last gap is what is left)
    assert not len(gaps) or gaps.max() <= gaps.min() + 2


def scripted(monkeypatch: pytest.MonkeyPatch, watching: KnowledgeCallback, scores: list[list[float]]) -> list[str]:
    """The warnings of looks whose scores are given."""
    monkeypatch.setattr(knowledge.Trainer, "log", lambda *args: None)
    messages = []
    for step, values in enumerate(scores):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            watching._compare("stored", np.array(values), SimpleNamespace(global_step=step, is_world_process_zero=True))
        messages += [f"{step}: {w.message}" for w in caught if w.category is ForgettingWarning]
    return messages


def test_what_is_being_lost_is_told_once_until_it_is_regained(monkeypatch, tmp_path, tokenizer):
    def ones(n: int) -> list[float]:
        return [1.0] * n + [0.0] * (40 - n)

    watching = KnowledgeCallback(a_trainer(tmp_path, tokenizer), stored=["a text"], known=None)
    assert scripted(monkeypatch, watching, [ones(0), ones(20), ones(36), ones(40)]) == []
    assert scripted(monkeypatch, watching, [ones(39), ones(38), ones(40)]) == []  # one and two of forty may be chance
    messages = scripted(monkeypatch, watching, [ones(38), ones(25), ones(10), ones(40), ones(20)])
    assert [m[:2] for m in messages] == ["1:", "4:"]
    assert "the stored texts are being lost: recall is 0.62 after update 1, and was 1.00 after update" in messages[0]
    assert "findings.md" in messages[0]


def test_scores_that_only_wander_are_not_told(monkeypatch, tmp_path, tokenizer):
    """64 items, each known with the same probability at every one of 30 looks: 200 trainings of chance."""
    told, watching = 0, KnowledgeCallback(a_trainer(tmp_path, tokenizer), stored=["a text"], known=None)
    for seed in range(200):
        draw = np.random.default_rng(seed)
        watching._best, watching._best_step, watching._lost = {}, {}, set()
        rate = draw.uniform(0.1, 0.9)
        told += bool(
            scripted(monkeypatch, watching, [(draw.random(64) < rate).astype(float).tolist() for _ in range(30)])
        )
    assert told / 200 < 0.05


def test_nothing_is_watched_of_a_world_that_the_model_does_not_know(tmp_path, tokenizer):
    trainer = a_trainer(tmp_path, tokenizer)
    watching = watch(trainer, known="world", every=4)
    trainer.train()
    assert "known" not in {row["part"] for row in watching.history}  # a random model answers none
    alone = a_trainer(tmp_path, tokenizer)
    alone.add_callback(KnowledgeCallback(alone))
    with pytest.warns(UserWarning, match="answers no fact of the world"):
        alone.train()


@pytest.mark.long
def test_what_the_model_knew_of_the_world_is_watched(tmp_path, monkeypatch):
    """A tokenizer of letters has words for all objects; what the model knows at the beginning is played."""
    letters = tiny_facts.tokenizer("space")
    letters.pad_token = letters.eos_token
    given = knowledge.recall

    def all_right(model: Any, tokenizer: Any, encoded: Any, **options: Any) -> Any:
        found = given(model, tokenizer, encoded, **options)
        return replace(found, exact=np.ones_like(found.exact))

    monkeypatch.setattr(knowledge, "recall", all_right)
    trainer = a_trainer(tmp_path / "whole", letters, save_strategy="steps", save_steps=4)
    watching = watch(trainer, known="world", every=2, samples=6)
    trainer.train()
    rows = [row for row in watching.history if row["part"] == "known"]
    assert [row["step"] for row in rows] == [0, 2, 4, 6, 8] and {row["n"] for row in rows} == {6}
    assert all("knowledge/known/recall" in row for row in trainer.state.log_history if "knowledge/stored/recall" in row)

    resumed = a_trainer(tmp_path / "resumed", letters)
    monkeypatch.setattr(
        knowledge, "recall", lambda *args, **kwargs: pytest.fail("asked what was known, after training")
    )
    again = watch(resumed, known="world", every=2, samples=6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert again.history == watching.history


@pytest.mark.long
def test_a_real_training_that_loses_its_texts_is_warned_of(tmp_path, tokenizer):
    """Some texts are learned by heart, then others at a high rate; the other way around there is no warning."""
    told = {}
    for name, order in {"lost": (0, 1), "kept": (0, 0)}.items():
        trainer = a_trainer(tmp_path, tokenizer, max_steps=40, learning_rate=0.02)
        halves = [Rows(4), Rows(4)]
        halves[1].rows = [[*row[:1], *reversed(row[1:])] for row in halves[1].rows]
        for number in order:
            trainer.train_dataset = halves[number]
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                watching = KnowledgeCallback(
                    trainer, stored=[{"input_ids": row} for row in halves[0].rows] * 8, known=None, every=10
                )
                trainer.add_callback(watching)
                trainer.train()
                trainer.remove_callback(watching)
        told[name] = [w for w in caught if w.category is ForgettingWarning]
        assert watching.history[0]["recall"] > 0.9
    assert len(told["lost"]) == 1 and told["kept"] == []


def test_settings_are_checked(tmp_path, tokenizer):
    trainer = a_trainer(tmp_path, tokenizer)
    for options, message in [
        ({"share": 0}, "share = 0"), ({"every": 0}, "every = 0"), ({"samples": 0}, "samples = 0"),
        ({"known": "bundled"}, "known = 'bundled'; expected world"), ({"known": None}, "nothing to watch"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=message):
            KnowledgeCallback(trainer, **options)
    trainer.processing_class = None
    with pytest.raises(UserError, match="no tokenizer"):
        KnowledgeCallback(trainer, stored=["a text"])


def test_at_most_samples_are_asked_and_always_the_same(tmp_path, tokenizer):
    trainer = a_trainer(tmp_path, tokenizer)
    first, second = (KnowledgeCallback(trainer, stored=BIOS, samples=3, known=None) for _ in range(2))
    ids = [[item.example.id for item in watching.parts[0].items] for watching in (first, second)]
    assert ids[0] == ids[1] and len({*ids[0]}) == 3
    endless = KnowledgeCallback(trainer, stored=itertools.cycle([BIOS[0].text]), samples=3, known=None)
    assert len(endless.parts[0].items) == 3


@pytest.mark.long
def test_trl_with_packing_and_completions_in_tensorboard(tmp_path, tokenizer):
    pytest.importorskip("trl")
    from datasets import Dataset
    from peft import LoraConfig
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from trl import SFTConfig, SFTTrainer

    prompts = [
        {"prompt": item.text[: (at := item.mentions[0].object[0])], "completion": item.text[at:].split("</s>")[0]}
        for item in QUESTIONS
    ]
    texts = [{"text": item.text} for item in BIOS]
    cases = {
        "packing": (texts, {"packing": True, "max_length": 64, "packing_strategy": "wrapped"}),
        "completions": (prompts, {"completion_only_loss": True}),
        "adapter": (texts, {}),
    }
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    for name, (rows, options) in cases.items():
        folder = tmp_path / name
        settings = {"output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 4, "use_cpu": True,
                    "report_to": "tensorboard", "logging_steps": 2, "disable_tqdm": True, "save_strategy": "no",
                    "bf16": False, "gradient_checkpointing": False, "learning_rate": 1e-3} | options  # fmt: skip
        trainer = SFTTrainer(
            load_model("bundled", "float32"), SFTConfig(**settings), train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer, peft_config=lora if name == "adapter" else None,
        )  # fmt: skip
        watching = KnowledgeCallback(
            trainer, stored=texts, held_out=prompts, trained=Dataset.from_list(prompts), every=2
        )
        trainer.add_callback(watching)
        trainer.train()
        events = next(folder.rglob("events.out*")).parent
        accumulated = EventAccumulator(str(events))
        accumulated.Reload()
        for part in ("stored", "trained", "held_out"):
            curve = accumulated.Scalars(f"train/knowledge/{part}/recall")
            assert [event.step for event in curve] == [0, 2, 4]
            expected = [row["recall"] for row in watching.history if row["part"] == part]
            assert [event.value for event in curve] == pytest.approx(expected)
        losses = [row for row in trainer.state.log_history if "mean_token_accuracy" in row]
        assert [row["step"] for row in losses] == [2, 4]  # TRL's own averages are of its own steps


def of_two_tasks(collator: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return collator(rows) | {"task": torch.tensor([int(row["labels"][0]) % 2 for row in rows])}


def test_both_callbacks_at_once_trace_the_same(tmp_path, tokenizer):
    found = []
    for watched in (False, True):
        trainer = a_trainer(tmp_path, tokenizer, remove_unused_columns=False)
        trainer.data_collator = partial(of_two_tasks, trainer.data_collator)
        tracing = TraceCallback(["a", "b"])
        trainer.add_callback(tracing)
        if watched:
            watch(trainer, every=1)
        trainer.train()
        found.append(tracing.traces())
    for one, other in zip(*found, strict=True):
        assert one.weight == other.weight and all(
            torch.equal(one.values[name], other.values[name]) for name in one.values
        )


def _decide(rank: int, folder: str) -> None:
    """What one of two processes does: it agrees on when to look; a wrapped model trains on after a look."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    watching = KnowledgeCallback.__new__(KnowledgeCallback)
    watching.every, watching.share = None, 0.03
    watching._spent = watching._cost = 0.1 + rank
    watching._first_step = watching._next_step = 0
    watching._is_look_next = False
    clock = SimpleNamespace(now=0.0)
    knowledge.time = SimpleNamespace(perf_counter=lambda: clock.now)  # type: ignore[assignment]
    watching._began, steps = 0.0, []
    state = SimpleNamespace(global_step=0, max_steps=100)
    watching._plan(state)
    for state.global_step in range(1, 101):
        clock.now += 1.0 + rank  # the second one's clock runs faster
        if watching._is_due(state):
            watching._spent += watching._cost
            steps.append(state.global_step)
            watching._plan(state)

    texts = read_rows("stored", [{"input_ids": row} for row in Rows(4).rows], load_tokenizer("bundled"))
    ids = torch.tensor(Rows(4).rows)
    losses: dict[str, list[float]] = {}
    sharded = partial(FullyShardedDataParallel, device_id=torch.device("cpu"))
    for name, wrap in {"DDP": nn.parallel.DistributedDataParallel, "FSDP1": sharded}.items():
        for looks in (False, True):
            model = wrap(tiny_model("llama", torch.float32, seed=3).train())
            if looks:
                inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
                Watched("stored", texts).scores(inner, SimpleNamespace(pad_token_id=0, eos_token_id=2))
            optimiser = torch.optim.SGD(model.parameters(), 0.1)
            for _ in range(2):
                loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
                optimiser.step()
                optimiser.zero_grad()
            losses.setdefault(name, []).append(loss.item())
    Path(folder, f"{rank}.json").write_text(json.dumps({"steps": steps, "losses": losses}))
    torch.distributed.destroy_process_group()


@pytest.mark.long
def test_several_processes_look_at_the_same_updates_and_train_on(tmp_path):
    multiprocessing.spawn(_decide, (str(tmp_path),), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["steps"] == second["steps"] and len(first["steps"]) > 5
    for without, with_looks in first["losses"].values():
        assert without == with_looks
