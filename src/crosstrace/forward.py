"""One forward pass, as every analysis makes it. It knows nothing of what is measured."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def forward(model: nn.Module, batch: Mapping[str, Tensor], **options: Any) -> Any:
    """What the model gives for the texts of a batch.

    No cache is filled: a cache takes memory, some models change it in place, which no gradient survives, and some read
    in it what an earlier pass left there.

    Args:
        batch: input_ids and attention_mask, on any device; what else it holds is not read.
        options: further arguments, such as output_attentions.
    """
    device = next(model.parameters()).device
    inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
    return model(**inputs, **options, **without_cache(model))


def without_cache(model: nn.Module) -> dict[str, Any]:
    """The arguments that keep a model from filling a cache; none if it has no such argument."""
    return accepted(model, {"use_cache": False})


def accepted(model: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the named arguments that the model's forward takes."""
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return {name: value for name, value in arguments.items() if takes_any or name in parameters}
