"""The one loss of the project: ℓ_i, the mean cross-entropy of example i's target tokens.

Training, tracing and evaluation all use it; it knows neither tasks nor tokenizers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def token_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every target token.

    Args:
        logits: [B, T, V]; position t predicts token t + 1.
        labels: [B, T], aligned with the tokens; -100 where a token is no target.

    Returns:
        losses [B, T-1] in nats (0 where there is no target) and the mask [B, T-1] of targets.
    """
    wanted = labels[:, 1:]
    losses = F.cross_entropy(
        logits[:, :-1].transpose(1, 2).float()
        if logits.dtype in (torch.float16, torch.bfloat16)
        else logits[:, :-1].transpose(1, 2),
        wanted,
        ignore_index=-100,
        reduction="none",
    )
    return losses, wanted != -100


def example_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """ℓ_i [B]: the mean over example i's target tokens of their cross-entropy, in nats.

    Raises:
        ValueError: an example has no target token, so that its loss is undefined.
    """
    losses, targets = token_losses(logits, labels)
    count = targets.sum(1)
    if bool((count == 0).any()):
        row = int((count == 0).nonzero()[0])
        raise ValueError(
            f"example {row} of the batch has no target token, so its mean loss is undefined; "
            "every label is -100 (or only the first token, which nothing predicts, is a target)"
        )
    return losses.sum(1) / count
