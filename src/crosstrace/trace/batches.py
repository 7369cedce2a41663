"""A batch to trace: checked, on the model's device, and with its padding on the right."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from crosstrace.core.errors import UserError
from crosstrace.trace.packed import is_packed

Batch = Mapping[str, Tensor]


def check_batch(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """The batch on the device, its shapes checked, with padding on its right, where it moves no position.

    A model counts its positions as it likes (RoBERTa begins behind the padding's). So position_ids that only say
    0, 1, … for every example are left out, and the model counts.

    Raises:
        UserError: the batch lacks a tensor, or one has another shape, or examples are packed, or one has no target.
    """
    lacking = [key for key in ("input_ids", "attention_mask", "labels") if key not in batch]
    if lacking:
        raise UserError(f"a batch to trace lacks {lacking[0]!r}; it has {', '.join(map(repr, batch)) or 'nothing'}")
    shape = batch["input_ids"].shape
    for key, value in batch.items():
        if value.shape != shape or len(shape) != 2:
            raise UserError(
                f"batch tensor {key!r} has shape {list(value.shape)}; expected [examples, positions] "
                f"like input_ids, which has {list(shape)}"
            )
    if "position_ids" in batch and is_packed(batch["position_ids"], batch["attention_mask"]):
        raise UserError(
            "position_ids of a batch to trace begin anew within a row, so several examples are packed into it; "
            "expected one example a row (`unpacked` makes it so)"
        )
    targets = (batch["labels"][:, 1:] != -100) & (batch["attention_mask"][:, :-1] != 0)
    if not bool(targets.any(1).all()):
        row = int((~targets.any(1)).nonzero()[0])
        raise UserError(
            f"example {row} of a batch to trace has no target token that an earlier token predicts, so "
            "its loss is undefined; are all its labels -100?"
        )
    return {key: value.to(device) for key, value in _pad_right(batch).items()}


def _pad_right(batch: Batch) -> dict[str, Tensor]:
    """The batch with padding on the right, without position_ids that only count."""
    is_token = batch["attention_mask"] != 0
    padded = dict(batch)
    if "position_ids" in padded and bool((padded["position_ids"] == is_token.cumsum(1) - 1)[is_token].all()):
        del padded["position_ids"]
    if bool((~is_token[:, :-1] & is_token[:, 1:]).any()):
        order = (~is_token).to(torch.uint8).argsort(dim=1, stable=True)
        padded = {key: value.gather(1, order) for key, value in padded.items()}
        padded["labels"] = padded["labels"].clone()
        padded["labels"][~is_token.gather(1, order)] = -100
    return padded
