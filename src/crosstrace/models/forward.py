"""One forward pass, as every analysis makes it. It knows nothing of what is measured."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

# A training's own forward of a task: (a batch, whether the training goes on with what it computes) -> ℓ [B].
TrainingForward = Callable[[Mapping[str, Tensor], bool], Tensor]
TrainingForwards = Mapping[str, TrainingForward]  # by task


def forward(model: nn.Module, batch: Mapping[str, Tensor], **options: Any) -> Any:
    """What the model gives for the texts of a batch.

    No cache is filled. A cache takes memory. Some models change it in place, which no gradient survives, and some read
    what an earlier pass left in it.

    Args:
        batch: input_ids and attention_mask, on any device; nothing else of it is read.
        options: further arguments, such as output_attentions.
    """
    return model(**inputs_of(model, batch), **options)


def inputs_of(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of a model's forward for the texts of a batch, on its device."""
    device = next(model.parameters()).device
    inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
    return inputs | without_cache(model)


def logits_at(
    model: nn.Module,
    positions: Tensor | None,
    inputs: Mapping[str, Any],
    within: nn.Module | None = None,
) -> Tensor:
    """The logits of a forward at some positions, [B, P, V]; at all of them if none are given.

    The logits of the other positions are not computed if the model hands its hidden states [B, T, H] to its output
    embeddings, as nearly all models do. This saves memory: logits are the largest tensor of a forward.

    Args:
        positions: [B, P], for each text.
        inputs: of the forward; input_ids [B, T] among them.
        within: the language model itself, if `model` is wrapped around it.
    """
    chosen = False

    def choose(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        nonlocal chosen
        if chosen or positions is None or len(args) != 1 or args[0].shape[:2] != inputs["input_ids"].shape:
            return None
        chosen = True
        return (rows_at(args[0], positions),)

    head = getattr(within or model, "get_output_embeddings", lambda: None)()
    with ExitStack() as hooks:
        if head is not None and positions is not None:
            hooks.callback(head.register_forward_pre_hook(choose).remove)
        output = model(**inputs)
    logits = output if isinstance(output, Tensor) else output.logits
    return logits if chosen or positions is None else rows_at(logits, positions)


def without_cache(model: nn.Module) -> dict[str, Any]:
    """The arguments that keep a model from filling a cache; none if it has no such argument."""
    return accepted(model, {"use_cache": False})


def accepted(model: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the named arguments that the model's forward takes."""
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return {name: value for name, value in arguments.items() if takes_any or name in parameters}


def rows_at(x: Tensor, positions: Tensor) -> Tensor:
    """x [B, T, N] at positions [B, P]: [B, P, N]."""
    return x.take_along_dim(positions.unsqueeze(-1), 1)
