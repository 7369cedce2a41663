"""Where a training's loss falls apart into its examples: at the logits, or at the log-probabilities of the labels.

A fused head, as TRL's trainers use it, gives the log-probabilities alone.

A loss L = Σ_i w_i ℓ_i has a known gradient there, up to a factor. Two things follow. A training can be checked: its
gradient must be that one. And the rows of one example, alone and sent through the training's own graph, give the
gradient of that example's ℓ_i.

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
CHECKED = 16  # examples of a batch whose logits are compared with it


class Split:
    """A tensor of a model's output, one row for each of the training's examples.

    Args:
        x: logits [rows, T, V].
        labels: [B, T] of the examples that have a target.
        weights: [rows] w_i up to a common factor, in the order of the trace; 0 for rows without a target, at the end.
        order: [rows], the row that is example 0, 1, …; None: as they come.
        number: of the batch; it decides which examples are compared.
    """

    def __init__(self, x: Tensor, labels: Tensor, weights: Tensor, order: Tensor | None, number: int) -> None:
        node: Any = x.grad_fn
        while node.name() == "ToCopyBackward0":  # accelerate gives a float32 copy, which the loss is not made of
            node = node.next_functions[0][0]
        self.node, self.edge, self.order = node, GradientEdge(node, 0), order
        self.targets = next_tokens(labels)
        self.rows = torch.arange(len(labels), device=x.device) if order is None else order[: len(labels)]
        self.share = weights[: len(labels)] / (self.targets != -100).sum(1)  # of each target in the loss
        self._expect(x, number)

    def _expect(self, x: Tensor, number: int) -> None:
        """Compute what the gradient must be at the first and the last target of some examples.

        All examples, with the whole vocabulary, would be too much for each batch."""
        is_target = self.targets != -100
        count = len(is_target)
        examples = (torch.arange(min(CHECKED, count), device=x.device) + CHECKED * number) % count
        counted = torch.arange(is_target.shape[1], device=x.device) * is_target[examples]
        first, last = is_target[examples].to(torch.uint8).argmax(1), counted.argmax(1)
        rows, positions = examples.repeat(2), torch.cat([first, last])
        compared = self.rows[rows], positions
        expected = x.detach()[compared].to(torch.promote_types(x.dtype, torch.float32)).softmax(-1)
        expected[torch.arange(len(rows), device=rows.device), self.targets[rows, positions]] -= 1
        self.compared, self.expected, self.shares = compared, expected, self.share[rows].unsqueeze(1)
        self.expected *= self.shares

    def factor(self, e: Tensor, known: Tensor | None) -> Tensor:
        """What the training multiplied Σ_i w_i ℓ_i with.

        Args:
            e: the gradient that arrives.
            known: that factor, if the loss's own gradient showed it already.

        Raises:
            UserError: the gradient is not that of Σ_i w_i ℓ_i.
        """
        gradient = e[self.compared].to(self.expected.dtype)
        factor = (gradient * self.expected).sum() / self.expected.square().sum() if known is None else known
        difference = (gradient - factor.to(gradient.dtype) * self.expected).norm(dim=1)
        noise = 2 * torch.finfo(e.dtype).eps * (self.shares.squeeze(1) * factor).abs()
        is_right = bool((difference <= AGREES[e.dtype] * gradient.norm(dim=1) + noise).all())
        if not is_right or bool((self._measure_size(e) * self._is_outside(e)).any()):
            raise UserError(
                "the training's loss is not the weighted mean over examples that the trace takes it for; expected the "
                "mean cross-entropy of the labels, each predicted from the token before it (no label smoothing, no "
                "loss of TRL's other than nll, no model that leaves the shift to its user), or the columns "
                "loss_labels and loss_weight that say how it differs"
            )
        return factor.detach().double()

    def _measure_size(self, e: Tensor) -> Tensor:
        """How large e is at each position, [rows, T]. A few tokens of the vocabulary show it."""
        return e[..., :8].abs().amax(-1)

    def _is_outside(self, e: Tensor) -> Tensor:
        """Where there is no target, [rows, T]."""
        outside = torch.ones(e.shape[:2], dtype=torch.bool, device=e.device)
        outside[self.rows] = self.targets[:, : e.shape[1]] == -100
        return outside

    def only(self, e: Tensor, i: int) -> Tensor:
        """The gradient with the rows of example i alone."""
        alone = torch.zeros_like(e)
        row = self.rows[i]
        alone[row] = e[row]
        return alone


class FusedSplit(Split):
    """The same for the log-probabilities of the labels, [rows, T] or [rows, T - 1]."""

    def _expect(self, x: Tensor, number: int) -> None:
        rows, positions = (self.targets[:, : x.shape[1]] != -100).nonzero(as_tuple=True)
        self.compared, self.shares = (self.rows[rows], positions), self.share[rows].unsqueeze(1)
        self.expected = -self.shares.to(torch.promote_types(x.dtype, torch.float32))
        self.constant = x.detach() == 0  # as a fused head leaves it where there is no label

    def factor(self, e: Tensor, known: Tensor | None) -> Tensor:
        return super().factor(e.unsqueeze(-1), known)

    def _is_outside(self, e: Tensor) -> Tensor:
        return super()._is_outside(e) & ~self.constant


def find_splits(
    output: Any, shape: tuple[int, int], labels: Tensor, weights: Tensor, order: Tensor | None, number: int
) -> Sequence[Split]:
    """The tensors of a model's output where its loss may fall apart; `shape` is [rows, T] of its input."""
    splits = []
    for name, kind, shapes in (
        ("logits", Split, (shape,)),
        ("log_probs", FusedSplit, (shape, (shape[0], shape[1] - 1))),
    ):
        x = getattr(output, name, None)
        if (
            isinstance(x, Tensor)
            and x.requires_grad
            and x.dim() == 2 + (kind is Split)
            and tuple(x.shape[:2]) in shapes
        ):
            splits.append(kind(x, labels, weights, order, number))
    return splits
