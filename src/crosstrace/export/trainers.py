"""A phase of training in the words of other trainers: TRL, LLaMA-Factory, axolotl.

Each trainer is one record: how a row is written, how it tokenizes a row, and the settings that its command takes. It
reads no run and writes no file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from crosstrace.core.errors import UserError
from crosstrace.models.adapters import LoraSettings
from crosstrace.training.optimisers import arguments
from crosstrace.training.recipes import Optimiser

BASE = "./base"  # the base, where it is written beside the data
ADAMW = {"optim": "adamw_torch"}  # what our own training leaves to the Trainer's choice
MICRO = 16  # rows that go through the model at once, at most
Values = dict[str, Any]


@dataclass(frozen=True)
class TrainingRow:
    """A text in two parts: what is read, and what is learned. The end token follows, if it is not there already."""

    task: str
    prompt: str
    completion: str


@dataclass(frozen=True)
class PhaseOfTrainer:
    """What the settings of a phase are made of.

    Attributes:
        name: of its files.
        base: the model that it begins with, as a path or a hub name.
        recipe_base: the model that the first phase begins with; an adapter begins anew on it.
        rows: in an update.
        longest: tokens of the longest row.
    """

    name: str
    base: str
    recipe_base: str
    updates: int
    rows: int
    longest: int
    optimiser: Optimiser
    lora: LoraSettings | None
    bf16: bool
    seed: int
    gradient_checkpointing: bool
    out: str

    @property
    def starts_anew(self) -> bool:
        """Whether it is the first phase."""
        return self.base == self.recipe_base

    @property
    def micro_batch(self) -> int:
        """Rows that go through the model at once: they divide those of an update."""
        return next(n for n in range(min(MICRO, self.rows), 0, -1) if self.rows % n == 0)


@dataclass(frozen=True)
class Trainer:
    """A trainer that others keep.

    Attributes:
        title: its name.
        row: a row as its file has it, given the end token's text and the text of the token that begins every text.
        tokenize: the tokens of a row, and how many of them are only read: f(tokenizer, row).
        settings: of a phase, for its command.
        command: that trains a phase, given the file of its settings.
        install: the command that installs it.
        note_on_bf16: what a phase in bf16 does otherwise than the run.
    """

    title: str
    row: Callable[[TrainingRow, str, str], Values]
    tokenize: Callable[[Any, TrainingRow], tuple[list[int], int]]
    settings: Callable[[PhaseOfTrainer], Values]
    command: str
    install: str
    note_on_bf16: str = ""


def ended(completion: str, end: str) -> str:
    """A completion with its end token's text."""
    return completion if completion.endswith(end) else completion + end


def _together(tokenizer: Any, row: TrainingRow) -> tuple[list[int], int]:
    """Prompt and completion as one text, as TRL does."""
    ids = tokenizer(row.prompt + ended(row.completion, tokenizer.eos_token))["input_ids"]
    return ids, len(tokenizer(row.prompt)["input_ids"])


def _apart(tokenizer: Any, row: TrainingRow) -> tuple[list[int], int]:
    """Prompt and completion each alone, behind the tokenizer's begin token."""
    before, after = (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in (row.prompt, ended(row.completion, tokenizer.eos_token))
    )
    before = begin_ids(tokenizer) + before
    return before + after, len(before)


def begin_ids(tokenizer: Any) -> list[int]:
    """The begin token, if the tokenizer puts one before every text."""
    ids = tokenizer("")["input_ids"]
    return ids[:1] if ids[:1] == [tokenizer.bos_token_id] else []


def _behind_bos(tokenizer: Any, row: TrainingRow) -> tuple[list[int], int]:
    """As `_apart`, but behind the begin token wherever there is one, as LLaMA-Factory's template `empty` does."""
    ids, read = _apart(tokenizer, row)
    lacking = [] if begin_ids(tokenizer) or tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return lacking + ids, len(lacking) + read


def _schedule(optimiser: Optimiser) -> tuple[str, Values]:
    """The schedule of the learning rate, as transformers names it, and its options."""
    return {
        "cosine": ("cosine_with_min_lr", {"min_lr_rate": optimiser.floor}),
        "linear": ("polynomial", {"lr_end": optimiser.floor * optimiser.learning_rate, "power": 1.0}),
        "constant": ("constant_with_warmup", {}),
    }[optimiser.decay]


def _lora(lora: LoraSettings, rank: str = "lora_r", rslora: str = "use_rslora") -> Values:
    """The numbers of an adapter, under a trainer's own names."""
    return {rank: lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout, rslora: lora.rslora}


def _of_trainer(phase: PhaseOfTrainer) -> Values:
    """The settings that are transformers' own, so that TRL and LLaMA-Factory have them too."""
    optimiser = phase.optimiser
    schedule, options = _schedule(optimiser)
    return {
        "output_dir": phase.out, "max_steps": phase.updates, "per_device_train_batch_size": phase.micro_batch,
        "gradient_accumulation_steps": phase.rows // phase.micro_batch, **ADAMW, **arguments(optimiser),
        "warmup_steps": optimiser.warmup, "lr_scheduler_type": schedule,
        **({"lr_scheduler_kwargs": options} if options else {}), "bf16": phase.bf16,
        "gradient_checkpointing": phase.gradient_checkpointing, "seed": phase.seed, "logging_steps": 10,
        "save_strategy": "steps", "save_steps": phase.updates, "save_only_model": True, "report_to": "none",
    }  # fmt: skip


def _trl(phase: PhaseOfTrainer) -> Values:
    if phase.lora and not phase.starts_anew:
        raise UserError(
            "TRL's command begins every phase with a new adapter, but this strategy trains one adapter in several "
            "phases; expected --for llamafactory, axolotl or jsonl, or a strategy of one phase"
        )
    return {
        "model_name_or_path": phase.base, "dtype": "float32",
        "datasets": [{"path": "json", "data_files": f"data/{phase.name}.jsonl"}],
        "completion_only_loss": True, "max_length": None, "packing": False,
        "train_sampling_strategy": "sequential", **_of_trainer(phase), **_trl_lora(phase.lora),
    }  # fmt: skip


def _trl_lora(lora: LoraSettings | None) -> Values:
    if lora is None:
        return {}
    return {"use_peft": True, "lora_target_modules": lora.targets, **_lora(lora)}


def _llama_factory(phase: PhaseOfTrainer) -> Values:
    values: Values = {
        "model_name_or_path": phase.base, "stage": "sft", "do_train": True, "finetuning_type": "full",
        "dataset_dir": "data", "dataset": phase.name, "template": "empty", "cutoff_len": phase.longest + 8,
        "disable_shuffling": True, "disable_gradient_checkpointing": not phase.gradient_checkpointing,
        "packing": False, **_of_trainer(phase),
    }  # fmt: skip
    if phase.lora:
        targets = phase.lora.targets
        values |= {
            "finetuning_type": "lora", **_lora(phase.lora, rank="lora_rank"),
            "lora_target": "all" if isinstance(targets, str) else ",".join(targets),
        }  # fmt: skip
        if not phase.starts_anew:
            values |= {"model_name_or_path": phase.recipe_base, "adapter_name_or_path": phase.base}
    return values


def _axolotl(phase: PhaseOfTrainer) -> Values:
    optimiser = phase.optimiser
    name, options = _schedule(optimiser)
    schedule: Values = {"lr_scheduler": name, **({"lr_scheduler_kwargs": options} if options else {})}
    if optimiser.decay == "cosine":  # for which it has a setting of its own
        schedule = {"lr_scheduler": "cosine", "cosine_min_lr_ratio": optimiser.floor}
    values_of_optimiser = ADAMW | arguments(optimiser)
    values: Values = {
        "base_model": phase.base,
        "datasets": [{"path": f"data/{phase.name}.jsonl", "ds_type": "json", "type": "input_output"}],
        "dataset_prepared_path": f"prepared/{phase.name}", "shuffle_merged_datasets": False,
        "curriculum_sampling": True, "sample_packing": False, "train_on_inputs": False,
        "sequence_len": phase.longest + 8, "micro_batch_size": phase.micro_batch,
        "gradient_accumulation_steps": phase.rows // phase.micro_batch, "max_steps": phase.updates, "num_epochs": 1,
        "optimizer": values_of_optimiser.pop("optim"), **values_of_optimiser, "warmup_steps": optimiser.warmup,
        **schedule, "bf16": phase.bf16, "gradient_checkpointing": phase.gradient_checkpointing, "seed": phase.seed,
        "logging_steps": 10, "output_dir": phase.out,
    }  # fmt: skip
    if phase.lora:
        targets = phase.lora.targets
        values |= {
            "adapter": "lora", **_lora(phase.lora, rslora="peft_use_rslora"),
            **({"lora_target_linear": True} if isinstance(targets, str) else {"lora_target_modules": targets}),
        }  # fmt: skip
        if not phase.starts_anew:
            values |= {"base_model": phase.recipe_base, "lora_model_dir": phase.base}
    return values


def _plain_row(row: TrainingRow, end: str, begin: str) -> Values:
    return {"prompt": row.prompt, "completion": row.completion}


def _ended_row(row: TrainingRow, end: str, begin: str) -> Values:
    return {"instruction": row.prompt, "output": ended(row.completion, end)}


def _segments(row: TrainingRow, end: str, begin: str) -> Values:
    before = begin + row.prompt
    first = [{"label": False, "text": before}] if before else []
    return {"segments": [*first, {"label": True, "text": ended(row.completion, end)}]}


TRAINERS: Mapping[str, Trainer] = {
    "trl": Trainer("TRL", _plain_row, _together, _trl, "trl sft --config {file}", "pip install trl"),
    "llamafactory": Trainer(
        "LLaMA-Factory", _ended_row, _behind_bos, _llama_factory, "llamafactory-cli train {file}",
        "pip install llamafactory",
    ),
    "axolotl": Trainer(
        "axolotl", _segments, _apart, _axolotl, "axolotl train {file}", "pip install axolotl",
        "With `bf16: true` axolotl holds the weights themselves in bf16. The run holds them in float32, and multiplies "
        "in bf16.",
    ),
}  # fmt: skip
