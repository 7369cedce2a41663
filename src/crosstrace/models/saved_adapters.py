"""A LoRA adapter's folder as a model: read on its base, merged into it or left as it is."""

from __future__ import annotations

import warnings
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crosstrace.core.errors import UserError
from crosstrace.models.adapter_files import ADAPTER, ADAPTER_WEIGHTS
from crosstrace.models.modes import silent

# How an adapter began (PEFT's init_lora_weights): on the base as it is, or on a base that PEFT changes, in the same way
# each time.
LEAVE_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")

CHANGE_BASE = ("pissa", "olora")


def check_further_weights(tuned: Any, parameters: dict[str, nn.Parameter], folder: Path, base: str) -> None:
    """Raise a `UserError` unless an adapter's file has the further weights that its config names, and no others.

    Further weights are biases, tokens and whole modules. PEFT would go on without those that are missing. Others it
    would put into the base, if need be into both uses of a tied tensor. Copies of the base's weights are allowed.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    with fitting(folder, base):
        expected = set(get_peft_model_state_dict(tuned, save_embedding_layers=False))
        stored = load_file(folder / ADAPTER_WEIGHTS)
    missing = sorted(name for name in expected - set(stored) if "lora_" not in name)
    if missing:
        raise UserError(
            f"the adapter in {folder} lacks {missing[0]} and {len(missing) - 1} others that its {ADAPTER} names (bias, "
            "modules_to_save, trainable_token_indices); expected what PEFT's save_pretrained writes"
        )
    for name in sorted(set(stored) - expected):
        parameter = parameters.get(name.removeprefix("base_model.model.").replace(".base_layer", ""))
        if "lora_" in name or parameter is None or stored[name].shape != parameter.shape:
            continue  # PEFT reports those
        if not torch.equal(stored[name].to(parameter.dtype), parameter):
            raise UserError(
                f"the adapter in {folder} holds {name}, which its {ADAPTER} does not name and which differs from the "
                f"base {base}; expected it among modules_to_save, so merge the adapter where it was trained and save "
                "the model"
            )


def check_tied_ends(tuned: Any, folder: Path, base: str) -> None:
    """Raise a `UserError` if merging an adapter changes what its tied embeddings and unembedding give.

    PEFT may add to the one tensor for each of its uses.
    """
    from crosstrace.models.adapters import merged

    with fitting(folder, base):
        before = _uses(tuned)
        with merged(tuned):
            after = _uses(tuned)
    for one, other in zip(before, after):
        # merging rounds each value once
        if ((one - other).abs() > 8 * torch.finfo(one.dtype).eps * one.abs().max()).any():
            raise UserError(
                f"the adapter in {folder} can't be merged exactly: it changes the embeddings or the unembedding of its "
                f"base {base}, which are one tensor, and what is added for one use changes the other; expected both "
                "as modules_to_save or with the same trainable_token_indices (and ensure_weight_tying), or a base that "
                "was saved untied (tie_word_embeddings: false)"
            )


def check_shared_layers(tuned: Any, folder: Path, base: str) -> None:
    """Raise a `UserError` if layers that share a tensor of the base have matrices of their own.

    PEFT would add all of them to that tensor.
    """
    owners: dict[int, set[int]] = defaultdict(set)
    for module in tuned.modules():
        for p in module.parameters(recurse=False):
            owners[id(p)].add(id(module))
    ends = {id(tuned.get_input_embeddings()), id(tuned.get_output_embeddings())}
    for name, module in tuned.named_modules():
        if not hasattr(module, "lora_A") or id(module) in ends:
            continue
        if any(len(owners[id(p)]) > 1 for p in module.get_base_layer().parameters(recurse=False)):
            raise UserError(
                f"the adapter in {folder} can't be merged exactly: in its base {base} as it changes it "
                f"(layer_replication), {name} shares its tensor with another layer; expected layers of their own, so "
                "save the base with these layers copied first"
            )


@torch.no_grad()
def _uses(model: Any) -> tuple[Tensor, Tensor]:
    """The embedding of every token [tokens, width], and the unembedding of some unit vectors [some, tokens]."""
    words, head = model.get_input_embeddings(), model.get_output_embeddings()
    tokens, width = model.get_base_model().get_input_embeddings().weight.shape
    units = torch.eye(width, dtype=model.dtype)[:: max(1, width // 16)]
    return words(torch.arange(tokens)).clone(), head(units).clone()


@contextmanager
def fitting(folder: Path, base: str):
    """While PEFT reads an adapter's folder: whatever it raises becomes a `UserError` of one sentence."""
    try:
        with silent(), warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # the config may hold anything, and PEFT trusts it
        lines = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise UserError(
            f"the adapter in {folder} does not fit its base {base}: {type(error).__name__}: {lines}; expected what "
            "PEFT's save_pretrained writes"
        ) from None


def check_finite(model: nn.Module, source: str, only: str = "") -> None:
    """Raise a `UserError` if a weight is NaN or infinite: everything computed with it would be too."""
    for name, p in model.named_parameters():
        # the sum is tried first since it needs no memory: unless it overflows, it is finite if all its terms are
        if only in name and not p.detach().sum().isfinite() and not p.detach().isfinite().all():
            count = int((~p.detach().isfinite()).sum())
            raise UserError(
                f"the weights in {source} are no numbers: {name} holds {count:,} NaN or infinite values of "
                f"{p.numel():,}; has its training diverged, or is the file damaged?"
            )
