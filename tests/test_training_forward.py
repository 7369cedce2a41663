"""A training's own forward may be another than evaluation's: dropout, caches, state, other modules, other losses. Its
trace is exact, through that forward, or an error names the parameter or what to do."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from reference import reference_trace, training_trace
from test_trace import assert_same, make_examples, pad
from test_training import TASKS, Rows, calm, mixed, of_task, with_tasks
from tiny_models import VOCABULARY, in_float64, tiny_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from crosstrace.core.errors import UserError
from crosstrace.trace import OnlineTrace, TrainingTrace, trace
from crosstrace.trace.callback import TraceCallback
from crosstrace.training.losses import example_losses

SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip


def built(config: Any) -> nn.Module:
    """A model of a config, in float64, in training mode, without weights that are ones or zeros."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float64)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the fast one knows no float64
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return in_float64(model).train()


def traced(
    model: nn.Module, batch: dict[str, Tensor], *, seed: int = 7, measure: str = "abs", reuse: bool = False,
    loss: Callable[[Any, Tensor], Tensor] = lambda output, labels: output.loss,
) -> TrainingTrace:  # fmt: skip
    """One step of a training whose forward draws its random numbers from `seed`."""
    with TrainingTrace(model, TASKS, [measure], reuse=reuse) as tracing:
        tracing._engine.plan_for({key: value for key, value in batch.items() if key != "task"})
        torch.manual_seed(seed)
        with tracing.step():
            loss(model(**batch), batch["labels"]).backward()
    return tracing


def assert_exact(model: nn.Module, tracing: TrainingTrace, batch: dict[str, Tensor], seed: int = 7) -> None:
    plain = {key: value for key, value in batch.items() if key != "task"}
    for found in tracing.traces():
        rows = [i for i, task in enumerate(batch["task"].tolist()) if task == TASKS.index(found.task)]
        assert_same(found.values, training_trace(model, plain, rows, seed, found.measure))


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return mixed(with_tasks(make_examples(5, seed=3)))


CACHED = {
    "attention sinks": lambda: transformers.GptOssConfig(
        **SMALL, head_dim=8, num_local_experts=4, num_experts_per_tok=2
    ),
    "short convolutions": lambda: transformers.Lfm2Config(
        **SMALL, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False
    ),
    "state-space layers": lambda: transformers.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=24, state_size=4, num_hidden_layers=2, intermediate_size=48, time_step_rank=2
    ),
    "experts": lambda: transformers.Qwen3MoeConfig(
        **SMALL, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=20
    ),
    "state between calls": lambda: transformers.RecurrentGemmaConfig(
        **SMALL | {"intermediate_size": 96}, lru_width=32, attention_window_size=8,
        block_types=["recurrent", "attention"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("kind", CACHED)
def test_a_cache_that_the_forward_fills(kind, reuse, batch):
    model = calm(built(CACHED[kind]()))
    assert model.config.use_cache
    tracing = traced(model, batch, reuse=reuse)
    assert_exact(model, tracing, batch)
    assert tracing.late < 0.2


def adapted(**options: Any) -> nn.Module:
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for p in tuned.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.1)
    return tuned.train()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dropout_within_an_adapter(dora, dropout, batch):
    model = adapted(use_dora=dora, lora_dropout=dropout)
    tracing = traced(model, batch, measure="net")
    assert_exact(model, tracing, batch)
    assert all(value.any() for found in tracing.traces() for value in found.values.values())
    assert (tracing.late > 0) == (dora and dropout > 0)  # what runs its dropout within goes through the graph


NOISY = {
    "gpt2": {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3},
    "llama": {"attention_dropout": 0.3},
    "gpt_neox": {"attention_dropout": 0.3, "hidden_dropout": 0.3},
    "opt": {"dropout": 0.3, "attention_dropout": 0.3},
    "bloom": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
    "qwen3_moe": {"attention_dropout": 0.3},
}


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("kind", NOISY)
def test_dropout_is_traced_as_it_was_drawn(kind, reuse, batch):
    model = tiny_model(kind, **NOISY[kind]).train()
    tracing = traced(model, batch, reuse=reuse)
    assert_exact(model, tracing, batch)
    assert tracing.late == 0
    evaluated = reference_trace(model.eval(), of_task(with_tasks(make_examples(5, seed=3)), 0), "abs")
    name, value = next(iter(evaluated.items()))
    assert not torch.allclose(tracing.traces()[0].values[name], value), "no dropout was drawn"


class Layer(nn.Module):
    """A weight that no rule knows, used as a test likes."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.calls = how, 0
        self.weight = nn.Parameter(torch.randn(8, 8) / 3)
        self.inner = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.how == "counts"
        weight = self.weight
        if self.how == "drops weights":
            weight = nn.functional.dropout(weight, 0.5, self.training)
        if self.how == "drops inside":
            x = nn.functional.dropout(x, 0.5, self.training)
        if self.how == "grows in training" and self.training:
            weight = 3 * weight
        if self.how == "other modules in training" and self.training:
            return torch.tanh(self.inner(self.inner(x)))
        if self.how == "a quiet module in evaluation" and not self.training:
            return torch.tanh(x @ weight)
        if self.how == "mixes examples in training":
            x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        return torch.tanh(self.inner(x @ weight)) * (1 + 0.1 * self.calls)


class Whole(nn.Module):
    """Answers as transformers' models do."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.embed, self.layer, self.out = nn.Embedding(VOCABULARY, 8), Layer(how), nn.Linear(8, VOCABULARY)
        self.double()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        hidden = self.layer(self.embed(input_ids))
        logits = self.out(hidden)
        loss = None
        if labels is not None:
            count = (labels[:, 1:] != -100).sum(1)
            loss = (example_losses(logits, labels) * count).sum() / count.sum()
        return type("Output", (), {"logits": logits, "loss": loss, "hidden": hidden})()


HOW = ["drops weights", "drops inside", "grows in training", "other modules in training",
       "a quiet module in evaluation", "mixes examples in training", "plain"]  # fmt: skip


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("how", HOW)
def test_modules_that_do_something_else_in_training(how, reuse, batch):
    torch.manual_seed(1)
    model = Whole(how).train()
    tracing = traced(model, batch, reuse=reuse)
    assert_exact(model, tracing, batch)


def test_a_module_that_keeps_count_is_not_run_again(batch):
    torch.manual_seed(1)
    model = Whole("counts").train()
    with TrainingTrace(model, TASKS) as tracing:
        tracing._engine.plan_for({key: value for key, value in batch.items() if key != "task"})
        with tracing.step():
            loss = model(**batch).loss
            counted = model.layer.calls
            loss.backward()
    for found in tracing.traces():
        model.layer.calls = counted - 1
        rows = [i for i in range(5) if int(batch["task"][i]) == TASKS.index(found.task)]
        expected = training_trace(model, {k: v for k, v in batch.items() if k != "task"}, rows, 0)
        assert_same(found.values, expected)


def test_noise_that_a_hook_adds_to_embeddings(batch):
    """As NEFTune does."""
    model = calm(tiny_model("llama")).train()
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: output + torch.rand_like(output) if module.training else None
    )
    tracing = traced(model, batch)
    assert_exact(model, tracing, batch)


def test_what_was_not_drawn_in_the_first_step_is_tried_later(batch):
    """Layers that are dropped as a whole: what is called for the first time is compared then."""
    torch.manual_seed(1)
    model = Whole("drops inside").train()
    inner = model.layer.forward
    skip = [True, False, False]
    model.layer.forward = lambda x: x if skip[0] and model.training else inner(x)
    with TrainingTrace(model, TASKS) as tracing:
        tracing._engine.plan_for({key: value for key, value in batch.items() if key != "task"})
        plain = {key: value for key, value in batch.items() if key != "task"}
        total: dict[str, dict[str, Tensor]] = {}
        for seed in range(3):
            for k, task in enumerate(TASKS):
                rows = [i for i in range(5) if int(batch["task"][i]) == k]
                sums = total.setdefault(task, {})
                for name, value in training_trace(model, plain, rows, seed).items():
                    sums[name] = sums.get(name, 0) + value / 3
            torch.manual_seed(seed)
            with tracing.step():
                model(**batch).loss.backward()
            model.zero_grad()
            skip.pop(0)
            skip.append(False)
    for found in tracing.traces():
        assert_same(found.values, total[found.task])


def test_a_fresh_adapter_is_traced_by_rules_from_its_third_step_on(batch):
    """While B is zero, A has no gradient, which tells nothing about its rules."""
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(model, config, autocast_adapter_dtype=False).train()
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.1)
    plain = {key: value for key, value in batch.items() if key != "task"}
    rows = [[i for i in range(5) if int(batch["task"][i]) == k] for k in (0, 1)]
    total: list[dict[str, Tensor]] = [{}, {}]
    late = []
    with TrainingTrace(tuned, TASKS) as tracing:
        for _ in range(5):
            for k in (0, 1):
                for name, value in training_trace(tuned, plain, rows[k], 0).items():
                    total[k][name] = total[k].get(name, 0) + value / 5
            tuned.zero_grad()
            before = tracing._late_numel
            with tracing.step():
                tuned(**batch).loss.backward()
            late.append(tracing._late_numel - before)
            optimizer.step()
            optimizer.zero_grad()
    assert late[0] > 0 and late[2:] == [0, 0, 0]
    for found in tracing.traces():
        assert_same(found.values, total[TASKS.index(found.task)])


def test_rules_that_are_chosen_anew_are_tried_anew(batch):
    """What training does otherwise is not forgotten when the rules are chosen again, on the model in evaluation."""
    torch.manual_seed(1)
    model = Whole("mixes examples in training").train()
    with TrainingTrace(model, TASKS) as tracing:
        for number in range(4):
            if number == 2:
                tracing.replan()
            with tracing.step():
                model(**batch).loss.backward()
            model.zero_grad()
    assert_exact(model, tracing, batch)


# ---------------------------------------------------------------------------------- what is told


def lost(output: Any, labels: Tensor) -> Tensor:
    """A loss made of hidden states, as fused heads outside of the model make it."""
    return output.hidden.square().mean()


def test_a_loss_around_the_logits_is_told_at_the_first_step(batch):
    with pytest.raises(UserError, match="does not come through the loss, the logits"):
        traced(Whole("plain").train(), batch, loss=lost)


def test_a_part_of_the_model_that_is_trained_by_itself_is_told(batch):
    model = Whole("plain").train()
    with TrainingTrace(model, TASKS) as tracing:
        tracing.begin()
        hidden = model.layer(model.embed(batch["input_ids"]))
        example_losses(hidden @ model.out.weight.T, batch["labels"]).mean().backward()
        with pytest.raises(UserError, match="no forward of the model that is traced"):
            tracing.end()


def test_a_penalty_beside_the_loss_is_told(batch):
    model = Whole("plain").train()
    model.layer.idle = nn.Parameter(torch.ones(3, dtype=torch.float64))
    with pytest.raises(UserError, match=r"layer.idle.*penalty on weights"):
        traced(model, batch, loss=lambda output, labels: output.loss + model.layer.idle.square().sum())


def test_gradients_that_were_there_before_a_step_are_not_its_own(batch):
    model = Whole("plain").train()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with TrainingTrace(model, TASKS) as tracing:
        with tracing.step():
            pass  # nothing is trained
        assert tracing.traces() == []
        with tracing.step():
            model(**batch).loss.backward()
        assert len(tracing.traces()) == 2


@pytest.mark.parametrize("how", ["logits alone", "loss alone"])
def test_a_loss_without_logits_or_logits_without_a_loss(how, batch):
    model = calm(tiny_model("llama")).train()
    inner = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = inner(*args, **kwargs)
        if model.training:
            setattr(output, "loss" if how == "logits alone" else "logits", None)
        return output

    plain = {key: value for key, value in batch.items() if key != "task"}
    expected = [training_trace(model, plain, [i for i in range(5) if int(batch["task"][i]) == k], 0) for k in (0, 1)]
    model.forward = forward
    count = (batch["labels"][:, 1:] != -100).sum(1)

    def loss(output: Any, labels: Tensor) -> Tensor:
        if how == "loss alone":
            return output.loss
        return (example_losses(output.logits, labels) * count).sum() / count.sum()

    for found in traced(model, batch, loss=loss).traces():
        assert_same(found.values, expected[TASKS.index(found.task)])


def smoothed(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return outputs.logits.mean()


@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        ({"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor is 0.1"),
        ({}, {"compute_loss_func": smoothed}, "compute_loss_func"),
        ({}, {"data_collator": lambda rows: {k: torch.stack([r[k] for r in rows]) for k in ("input_ids", "labels")}},
         r"KeepColumns\(trainer.data_collator\)"),
        ({}, {"data_collator": transformers.DataCollatorWithFlattening(return_tensors="pt")}, "no column 'task'"),
    ],
    ids=["label smoothing", "a loss of one's own", "a collator that drops columns", "a flattening collator"],
)  # fmt: skip
def test_what_a_trainer_is_asked_is_told_for_what_it_is(options, given, message, tmp_path):
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=3, report_to="none", disable_tqdm=True,
        remove_unused_columns=False, use_cpu=True, **options,
    )  # fmt: skip
    rows = Rows(with_tasks(make_examples(6)))
    if "DataCollatorWithFlattening" in repr(given):
        rows = [{key: row[key].tolist() for key in ("input_ids", "labels")} for row in rows]
    tracing = TraceCallback(TASKS)
    trainer = Trainer(tiny_model("llama", torch.float32), arguments, train_dataset=rows, callbacks=[tracing], **given)
    with pytest.raises(UserError, match=message):
        trainer.train()
    tracing.close()


def test_packed_rows_are_told_for_what_they_are(batch):
    model = tiny_model("llama").train()
    positions = torch.arange(batch["input_ids"].shape[1]).remainder(3).expand_as(batch["input_ids"])
    with TrainingTrace(model, TASKS) as tracing:
        tracing.begin()
        with pytest.raises(UserError, match="several examples into a row"):
            model(**batch, position_ids=positions)


# ---------------------------------------------------------------------------------- evaluation too


def test_random_numbers_in_evaluation_are_told():
    model = tiny_model("llama")
    model.model.norm.register_forward_hook(lambda module, args, output: nn.functional.dropout(output, 0.3, True))
    for take in (
        lambda: trace(model, [pad(make_examples(4))], task="qa"),
        lambda: OnlineTrace(model, ["qa"]).step({"qa": pad(make_examples(4))}),
    ):
        with pytest.raises(UserError, match=r"draws random numbers in evaluation mode too, first in model\.norm"):
            take()


def test_random_numbers_that_do_not_matter_are_left_alone():
    model = tiny_model("llama")
    model.model.norm.register_forward_hook(lambda module, args, output: (torch.rand(3), None)[1])
    examples = make_examples(4)
    (found,) = trace(model, [pad(examples)], task="qa")
    assert_same(found.values, reference_trace(model, examples, "abs"))


class Stubborn(nn.Module):
    """Its second call fails, as of a module that keeps a graph between calls."""

    def __init__(self, error: type[Exception]) -> None:
        super().__init__()
        self.scale, self.error, self.inside = nn.Parameter(torch.rand(12)), error, False

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 1 and self.training is None:
            raise self.error("never")
        if self.inside:
            raise self.error("called again")
        return torch.cumsum(x * self.scale.cumsum(0), dim=1)


@pytest.mark.parametrize("error", [RuntimeError, KeyError, AssertionError, ZeroDivisionError])
def test_whatever_a_rule_stumbles_over_it_does_not_fit(error, monkeypatch):
    """A module that can't be run again is traced in the general way."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.middle = nn.Embedding(VOCABULARY, 12), Stubborn(error)
            self.out = nn.Linear(12, VOCABULARY)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.out(self.middle(self.embed(input_ids)))

    torch.manual_seed(0)
    model = Model().double()
    examples = make_examples(5)
    from crosstrace.trace.calls import Call

    def failing(method: str) -> Any:
        inner = getattr(Call, method)

        def call(self: Call, *args: Any) -> Any:
            self.module.inside = True
            try:
                return inner(self, *args)
            finally:
                self.module.inside = False

        return call

    monkeypatch.setattr(Call, "again", failing("again"))
    monkeypatch.setattr(Call, "arguments", lambda *_: (_ for _ in ()).throw(error("no arguments")))
    (found,) = trace(model, [pad(examples)], task="qa")
    assert_same(found.values, reference_trace(model, examples, "abs"))
    assert found.meta["coverage"]["general"] > 0


@pytest.mark.parametrize("kind", ["roberta", "camembert", "opt", "gpt2"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_model_counts_its_own_positions(kind, side):
    """RoBERTa's begin behind the padding's; whatever the padding, an example has the positions that it has alone."""
    if kind in ("roberta", "camembert"):
        config = transformers.AutoConfig.for_model(
            kind,
            **{k: v for k, v in SMALL.items() if k not in ("num_key_value_heads", "pad_token_id")},
            **{"pad_token_id": 1, "is_decoder": True},
        )
        model = calm(built(config)).eval()
    else:
        model = tiny_model(kind)
    examples = make_examples(5)
    given = pad(examples, side)
    for positions in (True, False):
        batch = given if positions else {key: value for key, value in given.items() if key != "position_ids"}
        (found,) = trace(model, [batch], task="qa")
        assert_same(found.values, reference_trace(model, examples, "abs"))


def test_positions_that_say_something_else_are_heeded():
    model = tiny_model("gpt2")
    examples = [e | {"position_ids": torch.arange(e["input_ids"].shape[1]).unsqueeze(0) + 5} for e in make_examples(4)]
    longest = max(e["input_ids"].shape[1] for e in examples)
    batch = pad(examples) | {"position_ids": (torch.arange(longest) + 5).expand(4, longest)}
    (found,) = trace(model, [batch], task="qa")
    inner = model.forward
    model.forward = lambda input_ids, **rest: inner(
        input_ids, position_ids=torch.arange(input_ids.shape[1]).unsqueeze(0) + 5, **rest
    )
    assert_same(found.values, reference_trace(model, examples, "abs"))
