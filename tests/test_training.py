"""Traces from a training's own backward: against the plain loop, and the training as it would have been."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from reference import reference_trace
from test_trace import Odd, Stop, assert_same, fingerprint, make_examples, pad
from tiny_models import KINDS, tiny_model
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from crosstrace.core.errors import UserError
from crosstrace.trace import TrainingTrace
from crosstrace.trace.callback import TraceCallback
from crosstrace.training.losses import example_losses

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
        taught(model, [step])
    return {task: {name: value / counts[task] for name, value in found.items()} for task, found in sums.items()}


@pytest.mark.long
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


def test_the_training_is_the_same_bit_for_bit_and_equal_where_products_are_reused():
    steps = [with_tasks(make_examples(6, seed=s)) for s in range(4)]
    plain, traced, reused = (calm(tiny_model("gpt_neox")) for _ in range(3))
    taught(plain, steps)
    for model, reuse in ((traced, False), (reused, True)):
        with TrainingTrace(model, TASKS, reuse=reuse) as tracing:
            taught(model, steps, tracing)
    for a, b, c in zip(plain.parameters(), traced.parameters(), reused.parameters()):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-9, atol=1e-12)
    assert any(not torch.equal(a, c) for a, c in zip(plain.parameters(), reused.parameters())), "nothing was reused"


def test_dropout_draws_what_it_would_have_drawn():
    steps = [with_tasks(make_examples(6, seed=s)) for s in range(3)]
    weights = []
    for traced in (False, True):
        model = tiny_model("gpt2", resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3)
        torch.manual_seed(5)
        if traced:
            with TrainingTrace(model, TASKS) as tracing:
                taught(model, steps, tracing)
        else:
            taught(model, steps)
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights))


@pytest.mark.parametrize("parts", [1, 2])
def test_steps_parts_and_learning_rates(parts):
    model = calm(tiny_model("llama", tied=True))
    steps = [with_tasks(make_examples(7, seed=s)) for s in range(3)]
    rates = [0.1, 0.3, 0.2]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    means: dict[tuple, dict[str, Tensor]] = {}
    weights: dict[tuple, float] = {}

    def add(key: tuple, values: dict[str, Tensor], weight: float) -> None:
        total = means.setdefault(key, {name: torch.zeros_like(v) for name, v in values.items()})
        weights[key] = weights.get(key, 0.0) + weight
        for name, value in values.items():
            total[name] += weight * value

    with TrainingTrace(model, TASKS, ("square",), ("example", "step"), parts, lr_weighted=True) as tracing:
        for number, (step, lr) in enumerate(zip(steps, rates)):
            groups = list(range(3, 3 + len(step)))
            for k, task in enumerate(TASKS):
                mine = of_task(step, k)
                mean = reference_trace(model, mine, "net")
                add((task, "step", number % parts), {n: v**2 for n, v in mean.items()}, lr)
                for part in range(parts):
                    own = [e for e, g in zip(step, groups) if int(e["task"]) == k and g % parts == part]
                    if own:
                        add((task, "example", part), reference_trace(model, own, "square"), lr * len(own))
            with tracing.step(lr):
                for slice_ in (slice(0, 3), slice(3, 7)):
                    batch = mixed(step[slice_]) | {"group": torch.tensor(groups[slice_])}
                    model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        traces = tracing.traces()
    assert len(traces) == len(means)
    for found in traces:
        key = (found.task, found.reduction, found.meta["part"])
        assert found.weight == pytest.approx(weights[key])
        assert_same(found.values, {name: total / weights[key] for name, total in means[key].items()})


def test_a_loss_of_ones_own_and_a_module_without_rules():
    """Σ_i w_i ℓ_i outside of the model, times something; the module has parameters that only the general path knows."""
    torch.manual_seed(0)
    model = Odd().double()

    class Named(nn.Module):
        """As transformers' models answer."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            return type("Output", (), {"logits": self.inner(input_ids, attention_mask)})()

    whole = Named()
    examples = with_tasks(make_examples(6))
    batch = mixed(examples)
    labels, weight = batch.pop("labels"), torch.tensor([0.5, 1.0, 2.0, 0.1, 0.7, 1.5], dtype=torch.float64)
    with TrainingTrace(whole, TASKS) as tracing, tracing.step():
        logits = whole(**batch, loss_labels=labels, loss_weight=weight).logits
        (64 * (weight * example_losses(logits, labels)).sum()).backward()
    for found in tracing.traces():
        expected = reference_trace(model, of_task(examples, TASKS.index(found.task)), "abs")
        assert_same({name.removeprefix("inner."): value for name, value in found.values.items()}, expected)
    assert tracing.traces()[0].meta["coverage"]["general"] > 0


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
def test_gradient_checkpointing():
    model = calm(tiny_model("llama"))
    examples = with_tasks(make_examples(6))
    expected = by_hand(model, [examples], "abs")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for reuse in (False, True):
        with TrainingTrace(model, TASKS, reuse=reuse) as tracing:
            model.train()
            with tracing.step():
                model(**mixed(examples)).loss.backward()
        model.zero_grad()
        for found in tracing.traces():
            assert_same(found.values, expected[found.task])
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with TrainingTrace(model, TASKS) as tracing:
        tracing.begin()
        with pytest.raises(UserError, match="use_reentrant"):
            model(**mixed(examples))


def test_only_trained_parameters_and_examples_with_targets():
    model = calm(tiny_model("gpt_neox")).train()
    frozen = [name for name, p in model.named_parameters() if "layers.0" in name]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    examples = with_tasks(make_examples(6))
    batch = mixed(examples)
    batch["labels"][2] = -100
    with TrainingTrace(model, TASKS) as tracing, tracing.step():
        model(**batch).loss.backward()
    kept = examples[:2] + examples[3:]
    for found in tracing.traces():
        mine = of_task(kept, TASKS.index(found.task))
        assert found.weight == len(mine)
        expected = reference_trace(model.requires_grad_(True), mine, "abs")
        assert_same(found.values, {name: value for name, value in expected.items() if name not in frozen})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda batch: batch.pop("task"), "no column 'task'"),
        (lambda batch: batch.update(task=torch.full((4,), 2)), "from 0 to 1"),
        (lambda batch: batch.pop("labels"), "no labels, so its loss is computed outside"),
        (lambda batch: batch.update(loss_weight=torch.ones(4)), "both columns"),
        (lambda batch: batch.update(labels=batch["input_ids"].clone()), "count padding"),
        (lambda batch: batch.update(task=[0, 1]), "has shape"),
        (lambda batch: batch.update(task=[0.5, 1, 0, 0]), "from 0 to 1"),
        (lambda batch: batch.update(group=torch.zeros(4, 1)), "has shape"),
    ],
)
def test_bad_batches_are_told(change, message):
    model = calm(tiny_model("llama")).train()
    batch = mixed(with_tasks(make_examples(4)))
    change(batch)
    with TrainingTrace(model, TASKS) as tracing:
        tracing.begin()
        with pytest.raises(UserError, match=message):
            model(**batch)


def test_another_loss_is_told():
    model = calm(tiny_model("llama")).train()
    batch = mixed(with_tasks(make_examples(4)))
    with TrainingTrace(model, TASKS) as tracing:
        tracing.begin()
        output = model(**batch)
        smooth = torch.nn.functional.cross_entropy(
            output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), label_smoothing=0.1
        )
        with pytest.raises(UserError, match="label smoothing"):
            smooth.backward()


def test_nothing_is_left_behind():
    model = calm(tiny_model("gpt_neox")).train()
    before = fingerprint(model)
    batch = mixed(with_tasks(make_examples(4)))
    with pytest.raises(Stop), TrainingTrace(model, TASKS, reuse=True) as tracing, tracing.step():
        model(**batch)
        raise Stop
    assert fingerprint(model) == before
    with pytest.raises(RuntimeError, match="interrupted"):
        tracing.traces()
    with TrainingTrace(model, TASKS) as tracing:
        model(**batch)  # not in a step: as if nothing were there
        with tracing.step(), torch.no_grad():
            model(**batch)
        assert tracing.traces() == []
        model.eval()
        model(**batch)
    assert fingerprint(model)[0] != before[0] and model.train() is model
    assert fingerprint(model) == before


class Adapted(nn.Linear):
    """A linear layer whose forward does more than its name says."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, bias=False, dtype=torch.float64)
        self.low = nn.Linear(width, width, bias=False, dtype=torch.float64)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + self.low(input)


class Small(nn.Module):
    """A parameter of the whole model's own, and a linear layer that may be more than one."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(53, 8), nn.Linear(8, 53)
        self.shift = nn.Parameter(torch.randn(8))
        self.linear = linear
        self.double()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.out(torch.tanh(self.linear(self.embed(input_ids)) + self.shift))
        if labels is None:
            return logits
        count = (labels[:, 1:] != -100).sum(1)
        loss = (example_losses(logits, labels) * count).sum() / count.sum()
        return type("Output", (), {"logits": logits, "loss": loss})()


@pytest.mark.parametrize("how", ["subclass", "hook", "patch", "plain"])
def test_only_plain_linear_layers_share_their_products(how):
    torch.manual_seed(0)
    model = Small(Adapted(8) if how == "subclass" else nn.Linear(8, 8))
    if how == "hook":
        model.linear.register_forward_hook(lambda module, args, output: output + 2 * args[0])
    if how == "patch":
        inner = model.linear.forward
        model.linear.forward = lambda x: inner(x) + 2 * x
    batch = mixed(with_tasks(make_examples(6)))
    plain = {k: v for k, v in batch.items() if k != "task"}
    model(**plain).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with TrainingTrace(model, TASKS, reuse=True) as tracing, tracing.step():
        model(**batch).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-10, atol=1e-14)
    for found in tracing.traces():
        mine = of_task(with_tasks(make_examples(6)), TASKS.index(found.task))
        assert_same(found.values, reference_trace(model, mine, "abs"))


def test_positions_looked_up_once_for_all_examples_have_a_rule():
    model = tiny_model("gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).train()
    examples = with_tasks(make_examples(5))
    with TrainingTrace(model, TASKS) as tracing, tracing.step():
        model(**mixed(examples)).loss.backward()
    assert tracing.late == 0
    for found in tracing.traces():
        assert_same(found.values, reference_trace(model, of_task(examples, TASKS.index(found.task)), "abs"))


def test_a_model_in_evaluation_mode_is_traced_too():
    model = tiny_model("llama")
    with TrainingTrace(model, TASKS) as tracing, tracing.step():
        model(**mixed(with_tasks(make_examples(4)))).loss.backward()
    assert {t.task: t.weight for t in tracing.traces()} == {"bio": 3, "qa": 1}


@pytest.mark.parametrize("wrong", ["tokens", "rows", "zero"])
def test_losses_that_are_no_mean_over_examples_are_told(wrong):
    model = calm(tiny_model("llama")).train()
    batch = mixed(with_tasks(make_examples(6)))
    if wrong == "rows":
        batch["labels"][1] = -100
    with TrainingTrace(model, TASKS) as tracing:
        tracing.begin()
        output = model(**batch)
        if wrong == "zero":
            loss = output.loss * 0
        elif wrong == "rows":
            loss = output.loss + 0.1 * output.logits[1].square().mean()
        else:
            kept = batch["labels"][:, 1:].flatten()
            each = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), kept, reduction="none")
            loss = (each * (1 + torch.arange(len(each)) % batch["labels"].shape[1])).sum() / (kept != -100).sum()
        with pytest.raises(
            UserError, match="multiplies its loss" if wrong == "zero" else "weighted mean over examples"
        ):
            loss.backward()


def test_a_training_after_an_interrupted_one():
    model = calm(tiny_model("llama")).train()
    batch = mixed(with_tasks(make_examples(4)))
    first = TrainingTrace(model, TASKS)
    first.__enter__()
    first.begin()
    with TrainingTrace(model, TASKS) as tracing, tracing.step():
        model(**batch).loss.backward()
    assert len(tracing.traces()) == 2
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


# ---------------------------------------------------------------------------------------------- the Trainer


class Rows(torch.utils.data.Dataset):
    def __init__(self, examples: list[dict[str, Tensor]]) -> None:
        whole = mixed(examples)
        self.rows = [{key: value[i] for key, value in whole.items()} for i in range(len(examples))]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return self.rows[i]


def trainer_of(model: nn.Module, folder: Any, callbacks: list[TrainerCallback], **settings: Any) -> Trainer:
    arguments = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.01,
        "max_grad_norm": 0.5,
        "save_steps": 3,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "use_cpu": True,
    }
    rows = Rows(with_tasks(make_examples(12)))
    return Trainer(model, TrainingArguments(**(arguments | settings)), train_dataset=rows, callbacks=callbacks)


class Watch(TrainerCallback):
    """The same traces by hand: every batch that the model gets, at the parameters of its step."""

    def __init__(self) -> None:
        self.sums: dict[str, dict[str, Tensor]] = {}
        self.counts = dict.fromkeys(TASKS, 0)
        self.batches: list[dict[str, Tensor]] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        inner = model.forward

        def forward(*args, **kwargs):
            if model.training:
                self.batches.append({k: kwargs[k] for k in ("input_ids", "attention_mask", "labels")})
            return inner(*args, **kwargs)

        model.forward = forward

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        model.eval()
        known = {tuple(e["input_ids"][0].tolist()): int(e["task"]) for e in with_tasks(make_examples(12))}
        for batch in self.batches:
            for i in range(len(batch["labels"])):
                own = batch["attention_mask"][i].bool()
                example = {key: value[i : i + 1, own] for key, value in batch.items()}
                task = TASKS[known[tuple(example["input_ids"][0].tolist())]]
                sums = self.sums.setdefault(task, {})
                for name, value in reference_trace(model, [example], "abs").items():
                    sums[name] = sums.get(name, 0) + value
                self.counts[task] += 1
        self.batches.clear()
        model.train()


def test_two_lines_added_to_a_trainer(tmp_path):
    weights = []
    for traced in (False, True):
        model = calm(tiny_model("llama"))
        tracing, watch = TraceCallback(TASKS), Watch()
        trainer_of(model, tmp_path / str(traced), [tracing, watch] if traced else []).train()
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights))
    assert {t.task: t.weight for t in tracing.traces()} == watch.counts and min(watch.counts.values()) > 0
    for found in tracing.traces():
        expected = {name: value / watch.counts[found.task] for name, value in watch.sums[found.task].items()}
        assert_same(found.values, expected)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_resumed_training_goes_on_with_its_trace(tmp_path):
    model = calm(tiny_model("llama", torch.float32))
    tracing = TraceCallback(TASKS, reductions=("example", "step"))
    trainer_of(model, tmp_path / "whole", [tracing]).train()
    whole = tracing.traces()
    resumed = TraceCallback(TASKS, reductions=("example", "step"))
    again = calm(tiny_model("llama", torch.float32))
    trainer_of(again, tmp_path / "whole", [resumed]).train(str(tmp_path / "whole" / "checkpoint-3"))
    for a, b in zip(whole, resumed.traces(), strict=True):
        assert a.weight == b.weight and all(torch.equal(v, b.values[name]) for name, v in a.values.items())
    (tmp_path / "whole" / "checkpoint-3" / "crosstrace.json").unlink()
    with pytest.raises(UserError, match="saved with this callback"):
        trainer_of(again, tmp_path / "whole", [resumed]).train(str(tmp_path / "whole" / "checkpoint-3"))


def test_a_trainer_that_drops_columns_is_told(tmp_path):
    trainer = trainer_of(tiny_model("llama"), tmp_path, [TraceCallback(TASKS)], remove_unused_columns=True)
    with pytest.raises(UserError, match="remove_unused_columns=False"):
        trainer.train()
    with pytest.raises(UserError, match="nothing has been trained"):
        TraceCallback(TASKS).traces()


class Stream(torch.utils.data.IterableDataset):
    """Of unknown length: an epoch's last update may lack batches."""

    def __iter__(self):
        return iter(Rows(with_tasks(make_examples(9))).rows)


def test_an_epoch_that_ends_within_an_update(tmp_path):
    model = calm(tiny_model("llama"))
    tracing = TraceCallback(TASKS)
    trainer = trainer_of(model, tmp_path, [tracing])
    trainer.train_dataset = Stream()
    trainer.train()
    assert sum(t.weight for t in tracing.traces()) > 18
