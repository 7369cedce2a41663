"""Modes of a model within a context: evaluation, gradients of its inputs, checkpointed gradients.

Afterwards the model is as it was.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from crosstrace.core.errors import UserError
from crosstrace.core.pieces import at_rest


@contextmanager
def silent():
    """Without transformers' own bars and notices: the caller shows progress, once."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def evaluating(model: nn.Module):
    """The model in evaluation mode without gradients; afterwards each module has its mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # (not in inference mode, in which sharded models and lazy buffers would keep what no later backward can use)
        with torch.no_grad():
            yield model
    finally:
        at_rest(model)
        for module, mode in modes:
            module.training = mode


@contextmanager
def checkpointing_gradients(model: Any, on: bool = True):
    """The model in training keeping only what enters its layers, and computing the rest again in the backward.

    Raises:
        UserError: its architecture does not support that.
    """
    if not on:
        yield
        return
    # transformers before 5.20 has the second name alone, and later ones warn of it
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    embeddings = model.get_input_embeddings()
    hooks = {*embeddings._forward_hooks}
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise UserError(
            f"train.gradient_checkpointing is true, but {type(model).__name__} is not made for it ({error}); leave it "
            "out, and take a smaller train.micro_batch"
        ) from None
    try:
        yield
    finally:
        disable()
        for hook in {
            *embeddings._forward_hooks
        } - hooks:  # transformers leaves the one that makes inputs need gradients
            del embeddings._forward_hooks[hook]


@contextmanager
def differentiating(model: nn.Module):
    """The model in evaluation mode, with gradients of its inputs but not of its parameters; afterwards as it was."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    with evaluating(model), torch.enable_grad():
        try:
            for p in trainable:  # the graph begins at the inputs
                p.requires_grad_(False)
            yield
        finally:
            for p in trainable:
                p.requires_grad_(True)
