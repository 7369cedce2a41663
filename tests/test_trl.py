"""TRL's SFTTrainer with the callback: what its own tests vary (collators, packing, losses) is traced exactly or refused
in a sentence. Needs trl."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from reference import example_gradient
from test_trace import assert_same
from tiny_models import VOCABULARY, tiny_model
from torch import Tensor, nn
from transformers import TrainerCallback

from crosstrace.core.errors import UserError
from crosstrace.trace.callback import KeepColumns, TraceCallback

pytest.importorskip("trl")
SINGLE = 1e-6  # TRL's fused head computes in float32, whatever the model's dtype
TASKS = ["bio", "qa"]


def rows(labels: bool = True, count: int = 8) -> list[dict[str, Any]]:
    """Tokenized examples of two tasks, as SFTTrainer takes them; their labels lack the first tokens."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for n in range(count):
        ids = torch.randint(3, VOCABULARY, (5 + n % 4,), generator=generator).tolist()
        told = {"labels": [-100, -100, *ids[2:]]} if labels else {}
        made.append({"input_ids": ids, "task": n % 3 % 2, **told})
    return made


class Watch(TrainerCallback):
    """The same traces by hand: every example of a step, alone, at the step's parameters."""

    def __init__(self, labels: bool) -> None:
        self.labels = labels
        self.sums: dict[str, dict[str, Tensor]] = {}
        self.counts = dict.fromkeys(TASKS, 0)
        self.seen: list[list[int]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if module.training and torch.is_grad_enabled() and kwargs.get("input_ids") is not None:
            mask = kwargs["attention_mask"].bool()
            self.seen += [ids[own].tolist() for ids, own in zip(kwargs["input_ids"], mask)]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        known = {tuple(row["input_ids"]): row for row in rows(self.labels)}
        seen, self.seen = self.seen, []
        model.eval()
        for ids in seen:
            row = known[tuple(ids)]
            example = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
                       "labels": torch.tensor([row.get("labels", ids)])}  # fmt: skip
            sums = self.sums.setdefault(TASKS[row["task"]], {})
            frozen = [p for p in model.parameters() if not p.requires_grad]
            for p in frozen:
                p.requires_grad_(True)
            for name, gradient in example_gradient(model, example).items():
                sums[name] = sums.get(name, 0) + gradient.abs()
            for p in frozen:
                p.requires_grad_(False)
            self.counts[TASKS[row["task"]]] += 1
        model.train()


@pytest.fixture
def trainer_of(tmp_path: Any) -> Iterator[Any]:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from crosstrace.models.loading import load_tokenizer

    def make(
        model: nn.Module,
        callbacks: list[TrainerCallback],
        *,
        labels: bool = True,
        keep: bool = True,
        given: Any = None,
        **options: Any,
    ) -> Any:
        chosen = {"output_dir": str(tmp_path), "max_steps": 3, "per_device_train_batch_size": 4, "report_to": "none",
                  "learning_rate": 0.01, "disable_tqdm": True, "remove_unused_columns": False, "use_cpu": True,
                  "save_strategy": "no", "bf16": False, "gradient_checkpointing": False} | options  # fmt: skip
        given = {"train_dataset": Dataset.from_list(rows(labels)), "callbacks": callbacks, **(given or {})}
        trainer = SFTTrainer(model, SFTConfig(**chosen), processing_class=load_tokenizer("bundled"), **given)
        if keep:
            trainer.data_collator = KeepColumns(trainer.data_collator)
        return trainer

    yield make


TRACED = {
    "nll, completions": ({}, {}),
    "nll, every token": ({"labels": False}, {}),
    "tied embeddings": ({}, {"tied": True}),
    "padded to a multiple": ({"pad_to_multiple_of": 8}, {}),
    "accumulated": ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}, {}),
    "checkpointed": ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}, {}),
}


@pytest.mark.long
@pytest.mark.parametrize("case", TRACED)
def test_the_loss_of_trl_is_traced_exactly(case, trainer_of):
    options, of_model = TRACED[case]
    model = tiny_model("llama", **{"tied": False} | of_model, vocab_size=VOCABULARY)
    tracing, watch = TraceCallback(TASKS), Watch(options.get("labels", True))
    trainer_of(model, [tracing, watch], **options).train()
    assert {t.task: t.weight for t in tracing.traces()} == watch.counts and min(watch.counts.values()) > 0
    for found in tracing.traces():
        total = watch.sums[found.task]
        assert_same(found.values, {name: total[name] / watch.counts[found.task] for name in found.values}, SINGLE)


def test_an_adapter_is_traced_exactly(trainer_of):
    from peft import LoraConfig

    tracing, watch = TraceCallback(TASKS), Watch(True)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = trainer_of(tiny_model("llama", tied=False), [tracing, watch], given={"peft_config": config})
    with torch.no_grad():
        for name, p in trainer.model.named_parameters():
            if "lora_B" in name:
                p.add_(torch.randn_like(p), alpha=0.1)
    trainer.train()
    for found in tracing.traces():
        total = watch.sums[found.task]
        assert all("lora_" in name for name in found.values)
        assert_same(found.values, {name: total[name] / watch.counts[found.task] for name in found.values}, SINGLE)


def mean_over_tokens(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
    each = nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return each / num_items_in_batch


REFUSED = {
    "dft": ({"loss_type": "dft"}, "weighted mean over examples"),
    "label smoothing": ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1"),
    "padding-free": ({"padding_free": True, "max_length": None}, "several examples into a row"),
    "a loss of one's own": ({"given": {"compute_loss_func": mean_over_tokens}}, "compute_loss_func"),
    "columns dropped": ({"keep": False}, r"KeepColumns\(trainer.data_collator\)"),
    "columns removed": ({"remove_unused_columns": True}, "remove_unused_columns=False"),
}


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_traced_is_told_at_the_first_step(case, trainer_of):
    options, message = REFUSED[case]
    tracing = TraceCallback(TASKS)
    trainer = trainer_of(tiny_model("llama"), [tracing], **options)
    with pytest.raises(UserError, match=message):
        trainer.train()
    tracing.close()
