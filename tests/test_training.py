"""Traces from a training's own backward: against the plain loop, and the training as it would have been."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from reference import measured, reference_trace
from test_trace import Odd, Stop, assert_same, batches, fingerprint, make_examples, pad
from tiny_models import KINDS, tiny_model
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from crosstrace.errors import UserError
from crosstrace.losses import example_losses
from crosstrace.trace import TrainingTrace
from crosstrace.trace.callback import TraceCallback

TASKS = ["bio", "qa"]


def calm(model: nn.Module) -> nn.Module:
    """Without dropout, also where it is not a module."""
    for module in model.modules():
        for name in ("p", "dropout", "attention_dropout", "hidden_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def with_tasks(examples: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [e | {"task": torch.tensor([n % 3 % 2])} for n, e in enumerate(examples)]


def mixed(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return pad(examples) | {"task": torch.cat([e["task"] for e in examples])}


def of_task(examples: list[dict[str, Tensor]], number: int) -> list[dict[str, Tensor]]:
    return [e for e in examples if int(e["task"]) == number]


def taught(model: nn.Module, steps: list[list[dict[str, Tensor]]], tracing: TrainingTrace | None = None) -> None:
    """A training of two batches an update, with momentum and clipping."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.train()
    for step in steps:
        if tracing is not None:
            tracing.begin(0.1)
        for half in (mixed(step[: len(step) // 2]), mixed(step[len(step) // 2 :])):
            if tracing is None:
                half.pop("task")
            (model(**half).loss / 2).backward()
        if tracing is not None:
            tracing.end()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def by_hand(model: nn.Module, steps: list[list[dict[str, Tensor]]], measure: str) -> dict[str, dict[str, Tensor]]:
    """Per task, the mean over all examples of all steps, at the parameters before each update."""
    model = copy.deepcopy(model)
    sums: dict[str, dict[str, Tensor]] = {}
    counts = dict.fromkeys(TASKS, 0)
    for step in steps:
        model.eval()
        for number, task in enumerate(TASKS):
            mine = of_task(step, number)
            counts[task] += len(mine)
            for name, value in reference_trace(model, mine, measure).items() if mine else ():
                found = sums.setdefault(task, {})
                found[name] = found.get(name, 0) + value * len(mine)
        yielded = [step]
        taught(model, yielded)
    return {task: {name: value / counts[task] for name, value in found.items()} for task, found in sums.items()}


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_one_backward_gives_both_tasks_traces(kind, reuse):
    model = calm(tiny_model(kind))
    examples = with_tasks(make_examples(8, seed=3))
    with TrainingTrace(model, TASKS, ("abs", "net", "taylor"), reuse=reuse) as tracing:
        expected = {m: by_hand(model, [examples], m) for m in ("abs", "net", "taylor")}
        taught(model, [examples], tracing)
        traces = tracing.traces()
    assert len(traces) == 6
    for found in traces:
        assert found.weight == len(of_task(examples, TASKS.index(found.task)))
        assert_same(found.values, expected[found.measure][found.task])
