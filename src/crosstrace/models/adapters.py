"""LoRA adapters in training: put one on a base, merge it for a while, read its weights back. By PEFT.

An adapter replaces a projection W by W + s·B·A, with s = alpha/rank; only A and B are trained. It knows neither tasks,
strategies nor traces; `loading.load_model` reads what is saved. Formulas and the views of an adapter: docs/method.md.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as settings
from torch import nn

from crosstrace.core.errors import UserError
from crosstrace.core.files import read_json, write_json
from crosstrace.core.settings import STRICT
from crosstrace.models.adapter_files import ADAPTER, ADAPTER_WEIGHTS, import_peft
from crosstrace.models.modes import silent
from crosstrace.sets.selection import scope

ONLY = r"\.lora_[AB]\."  # in the names of an adapter's parameters, as PEFT gives them
_PREFIX, _INNER = "base_model.model.", ".base_layer"  # what PEFT adds to the names of the base's parameters


@settings(frozen=True, config=STRICT)
class LoraSettings:
    """A LoRA adapter, which is trained in place of all weights."""

    rank: Annotated[int, Field(ge=1, le=65_536)] = 8
    """Rows of A and columns of B."""
    alpha: Annotated[int, Field(ge=1)] = 16
    """B·A counts alpha/rank times."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on what A reads, in training alone: no trace and no measurement has any."""
    targets: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Projections that get an adapter, by the ends of their modules' names (e.g. [q_proj, v_proj]): all linear layers
    but the unembedding where not given."""
    rslora: bool = False
    """B·A counts alpha/sqrt(rank) times instead."""


def adapted(model: Any, options: LoraSettings, seed: int, *, empty: bool = False) -> Any:
    """The model with a new adapter on it, which changes nothing yet: B is zero and A is drawn.

    Args:
        model: a plain transformers model; its projections are wrapped in place.
        seed: of A; the generators' states stay as they are.
        empty: leave A and B on the meta device, without numbers.

    Returns:
        PEFT's model, in which A and B alone are trained.

    Raises:
        UserError: PEFT is not installed, or the targets name no linear layers of the model or its embeddings.
    """
    peft = import_peft("train.lora")
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    config = peft.LoraConfig(
        r=options.rank, lora_alpha=options.alpha, lora_dropout=options.dropout, use_rslora=options.rslora,
        target_modules=options.targets, task_type="CAUSAL_LM",
    )  # fmt: skip
    try:
        with silent(), warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            tuned = peft.get_peft_model(model, config, low_cpu_mem_usage=empty)
    except ValueError as error:
        raise UserError(
            f"train.lora.targets = {options.targets} fits no {type(model).__name__} ({' '.join(str(error).split())}); "
            "expected the ends of names of linear layers, or all-linear"
        ) from None
    if [tuned.get_input_embeddings(), tuned.get_output_embeddings()] != ends:
        raise UserError(
            f"train.lora.targets = {options.targets} names the embeddings or the unembedding of "
            f"{type(model).__name__}, which are no part of the shared sets; expected the ends of names of other layers"
        )

    return tuned


def is_adapted(model: nn.Module) -> bool:
    """Whether the model is PEFT's, with an adapter that is not merged."""
    return hasattr(model, "peft_config")


def adapter_names(model: nn.Module) -> list[str]:
    """The names of the adapter's parameters, in canonical order."""
    return scope(model, include_embeddings=True, only=ONLY)


def base_names(model: nn.Module) -> list[str]:
    """The names of the base's parameters in a model with an adapter."""
    of_adapter = set(adapter_names(model))
    return [name for name, _ in model.named_parameters() if name not in of_adapter]


def plain_name(name: str) -> str:
    """The name that a parameter of the base has without the adapter."""
    return name.removeprefix(_PREFIX).replace(_INNER, "")


def check_plain(model: Any, where: str) -> None:
    """Raise a `UserError` unless the adapter adds matrices A and B alone.

    Then the model where B is zero is the base, and the adapter at its start.
    """
    others = [
        name for name, _ in model.named_parameters()
        if ("lora_" in name or "modules_to_save" in name) and not re.search(ONLY + r"[^.]+\.weight$", name)
    ]  # fmt: skip
    bias = model.peft_config["default"].bias
    if others or bias != "none":
        raise UserError(
            f"the adapter in {where} has more than matrices A and B ({others[0] if others else f'bias: {bias}'}), as "
            "DoRA, adapted embeddings, biases and whole modules do; trace.view: merged takes it, adapter does not"
        )


@contextmanager
def merged(model: Any) -> Iterator[Any]:
    """The model with the adapter in the base's weights, as `load_model` reads it; afterwards every bit is back.

    It holds a copy of the adapted weights.
    """
    bases = [module.get_base_layer() for module in model.modules() if hasattr(module, "get_base_layer")]
    kept = {id(p): (p, p.detach().clone()) for base in bases for p in base.parameters(recurse=False)}
    try:
        model.merge_adapter()
        yield model
    finally:
        model.unmerge_adapter()
        for p, bits in kept.values():
            p.data.copy_(bits)


def load_weights(model: Any, folder: Path) -> None:
    """Put the weights of a saved adapter into a model that has one of the same settings.

    Raises:
        UserError: it has other parameters.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    with silent(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = set_peft_model_state_dict(model, load_file(folder / ADAPTER_WEIGHTS))
    odd = [*(key for key in report.missing_keys if "lora_" in key), *report.unexpected_keys]
    if odd:
        raise UserError(f"the adapter in {folder} has other parameters than the one in training ({odd[0]})")


def name_base(folder: Path, base: str) -> None:
    """Write into a saved adapter's folder which base it is for, by a name that holds from any folder."""
    file = folder / ADAPTER
    write_json(file, read_json(file) | {"base_model_name_or_path": base})
