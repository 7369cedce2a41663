"""The online trace of the training's own forward, with other targets than the training's."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from test_trace import assert_same, make_examples, pad
from tiny_models import VOCABULARY, tiny_model
from torch import Tensor, nn

from crosstrace.trace import OnlineTrace, online
from crosstrace.training.update_loss import task_losses

TASKS = ["bio", "qa"]
MEASURES = ("abs", "square")


def steps(count: int) -> list[dict[str, dict[str, Tensor]]]:
    """Batches of both tasks: labels of the trace are the last token, those of the training every token."""
    found = []
    for number in range(count):
        batches = {}
        for task in TASKS:
            batch = pad(make_examples(5, seed=10 * number + len(task)))
            trained = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            last = batch["attention_mask"].sum(1, keepdim=True) - 1
            traced = torch.full_like(trained, -100).scatter(1, last, trained.gather(1, last))
            batches[task] = batch | {"labels": traced, "trained": trained, "group": torch.arange(5)}
        found.append(batches)
    return found


def teach(model: nn.Module, trace: OnlineTrace | None, borrow: bool, count: int = 3, bf16: bool = False) -> dict:
    """A few steps of training; what is seen on the way."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: dict = {"rows": [], "grads": []}
    for batches in steps(count):
        means: dict[str, Tensor] = {}

        def forward(task: str, batch: dict[str, Tensor], kept: bool, means=means) -> Tensor:
            seen["rows"].append(len(batch["labels"]))
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                trained, traced = task_losses(model, batch, [batch["trained"], batch["labels"]])
            if kept:
                means[task] = trained.mean()
            return traced

        if trace is not None:
            forwards = {task: partial(forward, task) for task in TASKS} if borrow else {}
            trace.step(batches, 0.1, forwards)
        for task, batch in batches.items():
            if task not in means:
                forward(task, batch, True)
        sum(means.values()).backward()
        seen["grads"].append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
        optimizer.zero_grad()
    return seen


def both(make, bf16: bool = False, **settings) -> tuple[OnlineTrace, OnlineTrace, dict, dict]:
    found = []
    for borrow in (False, True):
        model = make()
        trace = OnlineTrace(model, TASKS, MEASURES, **settings)
        found.append((trace, teach(model, trace, borrow, bf16=bf16)))
    (own, plain), (borrowed, seen) = found
    return own, borrowed, plain, seen


@pytest.mark.long
@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("parts", [1, 2])
def test_it_is_the_trace_of_a_forward_of_its_own(kind, parts):
    own, borrowed, plain, seen = both(lambda: calm(tiny_model(kind)), parts=parts)
    assert borrowed.borrows == {"bio": True, "qa": True} and own.borrows == {}
    for a, b in zip(own.traces(), borrowed.traces(), strict=True):
        assert (a.task, a.measure, a.reduction) == (b.task, b.measure, b.reduction)
        assert_same(b.values, a.values)
        assert b.meta["forward"] == "of the training" and "forward" not in a.meta
    for before, after in zip(plain["grads"], seen["grads"], strict=True):
        assert_same(after, before)
    # two of a task's rows in the first step, to compare; then each batch once
    assert seen["rows"] == [2, 5, 2, 5, 5, 5, 5, 5]


def calm(model: nn.Module, dropout: float = 0.0) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return model.train()


def test_a_forward_with_dropout_is_not_borrowed():
    own, borrowed, _, seen = both(lambda: calm(tiny_model("gpt2"), 0.1))
    assert borrowed.borrows == {"bio": False, "qa": False}
    assert {t.meta["forward"] for t in borrowed.traces()} == {"of its own"}
    assert seen["rows"][:3] == [2, 5, 5]  # the second task, whose turn has not come, is not compared
    assert own.traces()[0].weight == borrowed.traces()[0].weight


def test_comparing_leaves_the_random_state_and_buffers_alone():
    model = calm(tiny_model("gpt2"), 0.1)
    model.register_buffer("seen", torch.zeros(1))

    def count(module: nn.Module, args: tuple, output: object) -> None:
        if module.training:
            module.seen.add_(1.0)

    model.register_forward_hook(count)
    trace = OnlineTrace(model, TASKS)
    forwards = {task: lambda batch, kept: task_losses(model, batch, [batch["labels"]])[0] for task in TASKS}
    before = torch.get_rng_state()
    trace.step(steps(1)[0], 0.1, forwards)
    assert torch.equal(before, torch.get_rng_state()) and model.seen == 0
    assert trace.borrows == {"bio": False, "qa": False}
    calm(model)
    again = OnlineTrace(model, TASKS)
    again.step(steps(1)[0], 0.1, forwards)
    assert model.seen == 0 and again.borrows == {"bio": False, "qa": False}


def test_padding_on_the_left_and_a_frozen_unused_parameter():
    def make(frozen: bool = True) -> nn.Module:
        model = calm(tiny_model("gpt2"))
        model.register_parameter("unused", nn.Parameter(torch.ones(3), requires_grad=not frozen))
        return model

    batches = {task: pad(make_examples(5, seed=3), side="left") for task in TASKS}
    batches = {task: {k: v for k, v in batch.items() if k != "position_ids"} for task, batch in batches.items()}
    own, borrowed = OnlineTrace(make(), TASKS, parts=2), OnlineTrace(make(), TASKS, parts=2)
    model = borrowed._engine.model
    own.step(batches)
    borrowed.step(batches, 1.0, dict.fromkeys(TASKS, lambda b, kept: task_losses(model, b, [b["labels"]])[0]))
    assert borrowed.borrows == {"bio": True, "qa": True}
    for a, b in zip(own.traces(), borrowed.traces(), strict=True):
        assert_same(b.values, a.values)


def test_frozen_layers_and_models_without_rules_are_not_borrowed():
    model = calm(tiny_model("llama"))
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    trace = OnlineTrace(model, ["qa"])
    batch = steps(1)[0]["qa"]
    trace.step({"qa": batch}, 1.0, {"qa": lambda b, kept: task_losses(model, b, [b["labels"]])[0]})
    assert trace.borrows == {"qa": False}

    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.h = (nn.Parameter(torch.randn(VOCABULARY, 6, dtype=torch.float64)) for _ in range(2))

        def forward(self, input_ids, attention_mask):
            return nn.functional.embedding(input_ids, self.e * 2).cumsum(1) @ self.h.t()

    raw = Raw()
    trace = OnlineTrace(raw, ["qa"])
    trace.step({"qa": batch}, 1.0, {"qa": lambda b, kept: task_losses(raw, b, [b["labels"]])[0]})
    assert trace.borrows == {"qa": False} and trace.traces()


def test_dropout_that_begins_later_ends_the_borrowing():
    model = calm(tiny_model("gpt2"))
    trace = OnlineTrace(model, TASKS, MEASURES)
    teach(model, trace, True, count=1)
    assert trace.borrows == {"bio": True, "qa": True}
    calm(model, 0.1)
    own = OnlineTrace(model, TASKS, MEASURES)
    own.load_state_dict(trace.state_dict())
    own.step(steps(1)[0], 0.1)
    teach(model, trace, True, count=1)
    assert trace.borrows == {"bio": False, "qa": False}
    for a, b in zip(own.traces(), trace.traces(), strict=True):
        assert_same(b.values, a.values)


class Louder(nn.Linear):
    """Training mode gives something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.2 if self.training else 1.0)


class Twofold(nn.Linear):
    """Training mode gives the same with another gradient."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return 2 * y - y.detach() if self.training else y


@pytest.mark.parametrize("odd", [Louder, Twofold])
def test_a_forward_that_training_alone_makes_is_not_borrowed(odd):
    def make() -> nn.Module:
        model = calm(tiny_model("llama"))
        model.model.layers[1].mlp.up_proj.__class__ = odd
        return model

    own, borrowed, _, _ = both(make)
    assert borrowed.borrows == {"bio": False, "qa": False}
    for a, b in zip(own.traces(), borrowed.traces(), strict=True):
        assert_same(b.values, a.values)


def test_in_bfloat16_it_is_near_that_of_float32():
    own, borrowed, _, _ = both(lambda: calm(tiny_model("llama", torch.float32)), bf16=True)
    assert borrowed.borrows == {"bio": True, "qa": True}
    for a, b in zip(own.traces(), borrowed.traces(), strict=True):
        whole, other = (torch.cat([v.flatten() for v in t.values.values()]) for t in (a, b))
        assert not torch.equal(whole, other)
        assert float((whole - other).norm() / whole.norm()) < 0.05


def test_a_resumed_trace_goes_on_with_what_was_decided(monkeypatch):
    def make() -> nn.Module:
        return calm(tiny_model("llama", torch.float32))

    model = make()
    whole = OnlineTrace(model, TASKS)
    teach(model, whole, True)
    model = make()
    begun = OnlineTrace(model, TASKS)
    teach(model, begun, True, count=1)
    resumed = OnlineTrace(model, TASKS)
    resumed.load_state_dict(begun.state_dict())
    assert resumed.borrows == {"bio": True, "qa": True}
    monkeypatch.setattr(online, "is_the_same", lambda *_: False)  # as late in a training, where losses are small
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batches in steps(3)[1:]:
        means = {}

        def forward(task, batch, kept, means=means):
            trained, traced = task_losses(model, batch, [batch["trained"], batch["labels"]])
            if kept:
                means[task] = trained.mean()
            return traced

        resumed.step(batches, 0.1, {task: partial(forward, task) for task in TASKS})
        sum(means.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    for a, b in zip(whole.traces(), resumed.traces(), strict=True):
        assert all(torch.equal(a.values[name], b.values[name]) for name in a.values)
