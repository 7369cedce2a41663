"""Where a training's loss falls apart into its examples: at the logits that the model gives, or at the
log-probabilities of the labels, where a fused head gives those alone (as TRL's trainers use it).

A loss L = Σ_i w_i ℓ_i has a known gradient there, up to a factor: that is what a training is checked by. And the rows
of one example, alone and sent through the training's own graph, give the gradient of that example's ℓ_i.
Nothing here knows parameters or rules.

Shapes: B examples in the order of the trace, T positions, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from crosstrace.core.errors import UserError
from crosstrace.training.losses import next_tokens

# How far the gradient may be from Σ_i w_i ∂ℓ_i, relative to its norm: rounding, and dtype of the logits.
AGREES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.02}
CHECKED = 16  # examples of a batch whose logits are looked at for that


class Split:
    """A tensor of a model's output, one row for each of the training's examples.

    Args:
        x: logits [rows, T, V].
        labels: [B, T] of the examples that have a target.
        weights: [rows] w_i up to a common factor, in the order of the trace; 0 for rows without a target, at the end.
        order: [rows], the row that is example 0, 1, …; None: as they come.
        number: of the batch: which examples are looked at.
    """

    def __init__(self, x: Tensor, labels: Tensor, weights: Tensor, order: Tensor | None, number: int) -> None:
        node: Any = x.grad_fn
        while node.name() == "ToCopyBackward0":  # accelerate gives a float32 copy, which the loss is not made of
            node = node.next_functions[0][0]
        self.node, self.edge, self.order = node, GradientEdge(node, 0), order
        self.wanted = next_tokens(labels)
        self.rows = torch.arange(len(labels), device=x.device) if order is None else order[: len(labels)]
        self.share = weights[: len(labels)] / (self.wanted != -100).sum(1)  # of each target in the loss
        self._look(x, number)

    def _look(self, x: Tensor, number: int) -> None:
        """Note what the gradient must be at the first and the last target of some examples: all of the vocabulary is
        too much to look at each time."""
        targets = self.wanted != -100
        count = len(targets)
        some = (torch.arange(min(CHECKED, count), device=x.device) + CHECKED * number) % count
        span = torch.arange(targets.shape[1], device=x.device) * targets[some]
        rows, place = some.repeat(2), torch.cat([targets[some].to(torch.uint8).argmax(1), span.argmax(1)])
        there = self.rows[rows], place
        expected = x.detach()[there].to(torch.promote_types(x.dtype, torch.float32)).softmax(-1)
        expected[torch.arange(len(rows), device=rows.device), self.wanted[rows, place]] -= 1
        self.there, self.expected, self.shares = there, expected, self.share[rows].unsqueeze(1)
        self.expected *= self.shares

    def factor(self, e: Tensor, known: Tensor | None) -> Tensor:
        """What the training multiplied Σ_i w_i ℓ_i with.

        Args:
            e: the gradient that arrives.
            known: that factor where the loss told it already.

        Raises:
            UserError: the gradient is not that of Σ_i w_i ℓ_i.
        """
        got = e[self.there].to(self.expected.dtype)
        factor = (got * self.expected).sum() / self.expected.square().sum() if known is None else known
        apart = (got - factor.to(got.dtype) * self.expected).norm(dim=1)
        noise = 2 * torch.finfo(e.dtype).eps * (self.shares.squeeze(1) * factor).abs()
        right = bool((apart <= AGREES[e.dtype] * got.norm(dim=1) + noise).all())
        if not right or bool((self._size(e) * self._outside(e)).any()):
            raise UserError(
                "the training's loss is not the weighted mean over examples that the trace takes it for; expected the "
                "mean cross-entropy of the labels, each predicted from the token before it (no label smoothing, no "
                "loss of TRL's other than nll, no model that leaves the shift to its user), or the columns "
                "loss_labels and loss_weight that say how it differs"
            )
        return factor.detach().double()

    def _size(self, e: Tensor) -> Tensor:
        """How large e is at each position, [rows, T]: few of the vocabulary tell it."""
        return e[..., :8].abs().amax(-1)

    def _outside(self, e: Tensor) -> Tensor:
        """Where there is no target, [rows, T]."""
        outside = torch.ones(e.shape[:2], dtype=torch.bool, device=e.device)
        outside[self.rows] = self.wanted[:, : e.shape[1]] == -100
        return outside

    def only(self, e: Tensor, i: int) -> Tensor:
        """The gradient with the rows of example i alone."""
        alone = torch.zeros_like(e)
        row = self.rows[i]
        alone[row] = e[row]
        return alone


class FusedSplit(Split):
    """The same for the log-probabilities of the labels, [rows, T] or [rows, T - 1]."""

    def _look(self, x: Tensor, number: int) -> None:
        rows, place = (self.wanted[:, : x.shape[1]] != -100).nonzero(as_tuple=True)
        self.there, self.shares = (self.rows[rows], place), self.share[rows].unsqueeze(1)
        self.expected = -self.shares.to(torch.promote_types(x.dtype, torch.float32))
        self.constant = x.detach() == 0  # as a fused head leaves it where there is no label

    def factor(self, e: Tensor, known: Tensor | None) -> Tensor:
        return super().factor(e.unsqueeze(-1), known)

    def _outside(self, e: Tensor) -> Tensor:
        return super()._outside(e) & ~self.constant


def splits(
    output: Any, shape: tuple[int, int], labels: Tensor, weights: Tensor, order: Tensor | None, number: int
) -> Sequence[Split]:
    """The places in a model's output where its loss may fall apart; `shape` is [rows, T] of its input."""
    found = []
    for name, kind, wanted in (
        ("logits", Split, (shape,)),
        ("log_probs", FusedSplit, (shape, (shape[0], shape[1] - 1))),
    ):
        x = getattr(output, name, None)
        if (
            isinstance(x, Tensor)
            and x.requires_grad
            and x.dim() == 2 + (kind is Split)
            and tuple(x.shape[:2]) in wanted
        ):
            found.append(kind(x, labels, weights, order, number))
    return found
