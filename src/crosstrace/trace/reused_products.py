"""A linear layer in training whose weight gradient comes from products that the trace makes anyway."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module computes x Wᵀ + b (Conv1D: x W + b) and nothing else: no subclass's forward, patch or hook."""
    from transformers.pytorch_utils import Conv1D

    if "forward" in vars(module) or module._forward_pre_hooks or len(module._forward_hooks) > 1:
        return False  # (one hook is the recording's)
    if not set(module._parameters) <= {"weight", "bias"}:
        return False
    return inspect.unwrap(type(module).forward) in (nn.Linear.forward, Conv1D.forward)


class ReusedProduct(torch.autograd.Function):
    """y = x Wᵀ + b (transposed: x W + b), computed already. In the backward `gradient` gives that of W from y's.

    It saves no tensor of its own: within a checkpointed block their number must not change.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, gradient: Any):
        ctx.weight, ctx.version, ctx.transposed, ctx.gradient = weight, weight._version, transposed, gradient
        ctx.mark_dirty(y)  # y itself, not a view of it: what follows may change it in place
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, e: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.weight._version != ctx.version:
            raise RuntimeError("a weight was changed between the forward and the backward of a step")
        weight = ctx.weight.detach()
        of_x = e @ (weight.t() if ctx.transposed else weight) if ctx.needs_input_grad[1] else None
        of_bias = e.flatten(0, -2).sum(0) if ctx.needs_input_grad[3] else None
        of_weight = ctx.gradient(e) if ctx.needs_input_grad[2] else None
        return None, of_x, of_weight, of_bias, None, None
