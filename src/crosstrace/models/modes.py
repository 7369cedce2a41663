"""Modes of a model for a while: evaluation, gradients of what is put into it, checkpointed gradients; each as it was
afterwards."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from crosstrace.core.errors import UserError
from crosstrace.core.pieces import at_rest, is_sharded


@contextmanager
def silent():
    """Without transformers' own bars and notices: progress is shown once, by whoever called."""
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
    """The model in evaluation mode without gradients; its modules' own modes come back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # (FSDP2 would keep weights gathered in inference mode, of which no later backward could make use)
        with torch.no_grad() if is_sharded(model) else torch.inference_mode():
            yield model
    finally:
        at_rest(model)
        for module, mode in modes:
            module.training = mode


@contextmanager
def checkpointing_gradients(model: Any, on: bool = True):
    """A model that keeps only what enters its layers in training, and computes the rest again in the backward.

    Raises:
        UserError: its architecture is not made for that.
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
        for hook in {*embeddings._forward_hooks} - hooks:  # which makes inputs need gradients, and is left there
            del embeddings._forward_hooks[hook]


@contextmanager
def differentiating(model: nn.Module):
    """The model in evaluation mode, with gradients of what is put into it but not of its parameters; as it was
    afterwards."""
    learned = [p for p in model.parameters() if p.requires_grad]
    with evaluating(model), torch.inference_mode(False), torch.enable_grad():
        try:
            for p in learned:  # the graph begins at what is put in
                p.requires_grad_(False)
            yield
        finally:
            for p in learned:
                p.requires_grad_(True)
