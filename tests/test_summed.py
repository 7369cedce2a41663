"""The summed trace against a plain loop that adds lr · ∇ℓ_n of every example, one at a time, in float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_facts import tiny_examples, tiny_world, tokenizer
from tiny_models import tiny_model
from torch import Tensor

from crosstrace.core.errors import UserError
from crosstrace.data.text import questions
from crosstrace.data.tokens import encode
from crosstrace.experiment import config
from crosstrace.trace import OnlineTrace, SummedTrace
from crosstrace.training.listeners import Listener, TaskPart
from crosstrace.training.optimisers import learning_rate_factor
from crosstrace.training.recipes import Optimiser, Phase, mixed, two_stage
from crosstrace.training.settings import TrainSettings
from crosstrace.training.trainer import train
from crosstrace.training.updates import Updates

WORDS = tokenizer("word")
TRACED = ("bio", "qa")
EXAMPLES = tiny_examples(WORDS) | {"known": encode(WORDS, questions(tiny_world(seed=9))[:12])}
FAST = Optimiser(learning_rate=1e-2, warmup=2, clip=0.05, weight_decay=0.2)


def _model() -> Any:
    sizes = {"hidden_size": 16, "head_dim": 4, "intermediate_size": 24, "num_hidden_layers": 1}
    return tiny_model("llama", torch.float64, vocab_size=len(WORDS), **sizes).train()


class Summing(Listener):
    """As the pipeline's: every task's gradient goes to the trace."""

    def __init__(self, model: Any, metric: str = "gradient", **options: Any) -> None:
        self.trace, self.metric = SummedTrace(model, TRACED, **options), metric

    def on_gradient(self, model: Any, task: str, part: TaskPart) -> None:
        if task in TRACED:
            optimizer = part.optimizer if self.metric == "optimiser" else None
            self.trace.add(task, part.lr, part.examples, part.weight, last=part.last, optimizer=optimizer)
        else:
            self.trace.skip(last=part.last)


def plain_loop(
    model: Any, strategy: list[Phase], parts: int = 1, metric: str = "gradient"
) -> dict[str, list[dict[str, Tensor]]]:
    """Train with a loop of its own: Δ_t by part, added up from the gradients of single examples."""
    found = {t: [{n: torch.zeros_like(p) for n, p in model.named_parameters()} for _ in range(parts)] for t in EXAMPLES}
    updates = dict.fromkeys(EXAMPLES, 0)
    for index, phase in enumerate(strategy):
        data = Updates(phase, EXAMPLES, f"1/{index}", WORDS.pad_token_id, "object")
        decayed = [p for n, p in model.named_parameters() if "norm" not in n and not n.endswith("bias")]
        others = [p for n, p in model.named_parameters() if "norm" in n or n.endswith("bias")]
        optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": FAST.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=FAST.learning_rate, betas=FAST.betas,
        )  # fmt: skip
        rate = learning_rate_factor(FAST, len(data))
        for update in range(len(data)):
            lr = FAST.learning_rate * rate(update)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad()
            for task, batches in data[update].items():
                count = sum(len(batch["labels"]) for batch in batches)
                for batch in batches:
                    for i in range(len(batch["labels"])):
                        row = {name: batch[name][i : i + 1] for name in ("input_ids", "attention_mask", "labels")}
                        loss = model(**row).loss
                        for (name, p), g in zip(
                            model.named_parameters(), torch.autograd.grad(loss, [*model.parameters()])
                        ):
                            push = lr * g
                            if metric == "optimiser":
                                state = optimizer.state[p]
                                unbiased = state["exp_avg_sq"] / (1 - FAST.betas[1] ** update) if state else torch.inf
                                push = push / (unbiased**0.5 + 1e-8)
                            found[task][updates[task] % parts][name] += push
                            share = phase.weights.get(task, 1.0) * g / count
                            p.grad = share if p.grad is None else p.grad + share
                updates[task] += 1
            torch.nn.utils.clip_grad_norm_(model.parameters(), FAST.clip)
            optimizer.step()
    return found


def taught(strategy: list[Phase], folder: Path, listeners: Any, **options: Any) -> Any:
    model = _model()
    told = [listener(model) for listener in listeners]
    settings = TrainSettings(seed=1, optimiser=FAST, checkpoint_every=1000, **options)
    train(model, WORDS, strategy, EXAMPLES, folder, settings, listeners=told)
    return model, told


STRATEGIES = {
    "mixed": mixed(3, 4, 3),
    "two stages": two_stage(3, 4, 3),
    "weighted": [Phase("p", {"bio": 3, "qa": 2}, 3, weights={"qa": 0.3, "bio": 2.0})],
    "replay": [Phase("bio", {"bio": 3}, 2), Phase("qa", {"qa": 4}, 3, replay={"bio": 1})],
    "a task that is not traced": [
        Phase("first", {"known": 2, "bio": 3, "qa": 2}, 2),
        Phase("last", {"qa": 3}, 2, replay={"known": 2}),
    ],
}


@pytest.mark.long
@pytest.mark.parametrize("metric", ["gradient", "optimiser"])
@pytest.mark.parametrize("options", [{}, {"micro_batch": 2}, {"gradient_checkpointing": True}], ids=str)
@pytest.mark.parametrize("kind", STRATEGIES)
def test_it_is_what_a_plain_loop_adds_up(kind: str, options: dict, metric: str, tmp_path: Path):
    strategy = STRATEGIES[kind]
    parts = 2 if kind == "mixed" else 1
    expected = plain_loop(_model(), strategy, parts, metric)
    _, (summing,) = taught(strategy, tmp_path, [lambda model: Summing(model, metric, parts=parts)], **options)
    traces = summing.trace.traces()
    assert {(item.task, item.measure, item.when) for item in traces} == {(t, "net", "online") for t in TRACED}
    largest = 0.0
    for task in TRACED:
        for part, item in enumerate(t for t in traces if t.task == task):
            for name, value in item.values.items():
                delta = value * item.weight
                # (roots of squares near zero enlarge what is rounding)
                bound = 1e-10 if metric == "gradient" else 1e-7 * expected[task][part][name].abs().max()
                assert (delta - expected[task][part][name]).abs().max() < bound, (task, name)
                assert torch.equal(item.strength()[name], value.abs())
                largest = max(largest, float(delta.abs().max()))
    assert largest > 1e-3  # there was something to add up


def test_the_training_is_left_alone(tmp_path: Path):
    """The same model, bit for bit, with it and without, beside an online trace or not."""
    strategy = mixed(3, 4, 4)
    plain, _ = taught(strategy, tmp_path / "plain", [])
    traced, _ = taught(strategy, tmp_path / "traced", [Summing])
    for a, b in zip(plain.parameters(), traced.parameters()):
        assert torch.equal(a, b)

    class Online(Listener):
        def __init__(self, model: Any) -> None:
            self.trace = OnlineTrace(model, ["bio", "qa"])

        def on_update(self, model: Any, batches: Any, lr: float, update: int, forwards: Any) -> None:
            self.trace.step(batches, lr, forwards)

    both, (online, summing) = taught(strategy, tmp_path / "both", [Online, Summing])
    alone, (only,) = taught(strategy, tmp_path / "alone", [Online])
    for a, b in zip(alone.parameters(), both.parameters()):
        assert torch.equal(a, b)
    for mine, theirs in zip(only.trace.traces(), online.trace.traces()):
        assert all(torch.equal(value, theirs.values[name]) for name, value in mine.values.items())
    expected = plain_loop(_model(), strategy)
    for item in summing.trace.traces():
        for name, value in item.values.items():
            assert (value * item.weight - expected[item.task][0][name]).abs().max() < 1e-10


def test_examples_that_push_both_ways_cancel():
    """Unlike in the mean of |g_i|: that is what the definition is about."""
    model = torch.nn.Linear(1, 1, bias=False)
    summed = SummedTrace(model, ["a"])
    for target in (1.0, -1.0):
        model.zero_grad()
        model.weight.grad = torch.full((1, 1), target)
        summed.add("a", 0.5, 2, last=True)
    (item,) = summed.traces()
    assert item.weight == 2.0 and float(item.values["weight"]) == 0.0


def test_gradients_are_whole_when_the_update_is_made():
    model = torch.nn.Linear(2, 2)
    summed = SummedTrace(model, ["a", "b", "c"])
    inputs, seen = torch.randn(3, 2), []
    expected = copy.deepcopy(model)
    for k, task in enumerate("abc"):
        model(inputs[k]).square().sum().backward()
        expected(inputs[k]).square().sum().backward()
        summed.add(task, 1.0, 1, last=task == "c")
        seen.append(model.weight.grad is None)
    assert seen == [True, True, False]
    for p, q in zip(model.parameters(), expected.parameters()):
        assert torch.allclose(p.grad, q.grad)
    whole = sum(item.values["weight"] for item in summed.traces())
    assert torch.allclose(whole, expected.weight.grad)


def test_a_state_goes_on(tmp_path: Path):
    model = torch.nn.Linear(2, 2)
    one = SummedTrace(model, ["a", "b"], parts=2)
    other = SummedTrace(model, ["a", "b"], parts=2)
    for step in range(4):
        if step == 2:
            one.save(tmp_path / "state")
            one = SummedTrace(model, ["a", "b"], parts=2)
            one.load(tmp_path / "state")
        for trace in (one, other):
            model.zero_grad()
            for task in "ab":
                model(torch.full((2,), step + len(task) + ord(task) / 50)).sum().backward()
                trace.add(task, 0.1, 3, last=task == "b")
    for mine, theirs in zip(one.traces(), other.traces(), strict=True):
        assert mine.weight == theirs.weight
        assert all(torch.equal(value, theirs.values[name]) for name, value in mine.values.items())


def test_a_task_that_was_not_announced():
    with pytest.raises(UserError, match="task 'b' is not one of those announced: a"):
        SummedTrace(torch.nn.Linear(1, 1), ["a"]).add("b", 1.0, 1, last=True)


def test_the_optimisers_metric_needs_a_mean_of_squares():
    model = torch.nn.Linear(1, 1)
    summed = SummedTrace(model, ["a"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for update in range(2):
        optimizer.zero_grad()
        model(torch.ones(1)).sum().backward()
        if update:
            with pytest.raises(UserError, match="keeps momentum_buffer of weight, and no mean of its squared gradient"):
                summed.add("a", 0.1, 1, last=True, optimizer=optimizer)
        optimizer.step()
    changes = {"trace.definitions": "[summed]", "trace.metric": "optimiser", "train.optimiser.name": "adafactor"}
    with pytest.raises(UserError, match=r"trace.metric: optimiser divides by AdamW's mean of .* adafactor does not"):
        config.override(config.Experiment(), changes)
