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
    accepted = inspect.signature(model.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    return {"use_cache": False} if takes_any or "use_cache" in accepted else {}
