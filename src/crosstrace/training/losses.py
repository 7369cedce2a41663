"""The one loss of the project: ℓ_i, the mean cross-entropy of example i's target tokens.

Training, tracing and evaluation all use it; it knows neither tasks nor tokenizers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def example_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """ℓ_i [B]: the mean over example i's target tokens of their cross-entropy, in nats.

    Raises:
        ValueError: an example has no target token, so that its loss is undefined.
    """
    return aligned_losses(logits, next_tokens(labels))


def next_tokens(labels: Tensor) -> Tensor:
    """What each position is to predict, [B, T]: the label of the token after it; -100 at the last."""
    return F.pad(labels[:, 1:], (0, 1), value=-100)


def target_positions(wanted: Tensor) -> Tensor:
    """The positions that are to predict something, [B, P], P the most that a row has; filled up with others.

    Args:
        wanted: [B, T], as `next_tokens` gives it.
    """
    target = wanted != -100
    most = int(target.sum(1).max())
    return target.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]


def aligned_losses(logits: Tensor, wanted: Tensor) -> Tensor:
    """ℓ_i [B] as `example_losses`, of logits [B, K, V] whose position k predicts the token wanted[:, k], [B, K]."""
    losses = cross_entropies(logits, wanted)
    count = (wanted != -100).sum(1)
    if bool((count == 0).any()):
        row = int((count == 0).nonzero()[0])
        raise ValueError(
            f"example {row} of the batch has no target token, so its mean loss is undefined; "
            "every label is -100 (or only the first token, which nothing predicts, is a target)"
        )
    return losses.sum(1) / count


def cross_entropies(logits: Tensor, wanted: Tensor) -> Tensor:
    """Of logits [B, K, V] and the tokens that they are to predict [B, K], in nats; 0 where nothing is wanted.

    The logits are not sliced or transposed: they are what is large here."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    losses = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-100, reduction="none")
    return losses.view(wanted.shape)
