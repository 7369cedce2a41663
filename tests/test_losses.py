"""The loss, against numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from crosstrace.training.losses import cross_entropies, example_losses, next_tokens


def test_by_hand():
    # two tokens of vocabulary 2; odds 3:1 for the right one, then 1:1; logits at the last position predict nothing
    logits = torch.tensor([[[math.log(3), 0.0], [0.0, 0.0], [9.0, -9.0]]], dtype=torch.float64).repeat(2, 1, 1)
    labels = torch.tensor([[1, 0, 1], [-100, -100, 1]])
    expected = torch.tensor([[math.log(4 / 3), math.log(2)], [0.0, math.log(2)]], dtype=torch.float64)
    losses, targets = cross_entropies(logits, next_tokens(labels))[:, :-1], next_tokens(labels)[:, :-1] != -100
    torch.testing.assert_close(losses, expected)
    assert targets.tolist() == [[True, True], [False, True]]
    mean = torch.tensor([(math.log(4 / 3) + math.log(2)) / 2, math.log(2)], dtype=torch.float64)
    torch.testing.assert_close(example_losses(logits, labels), mean)


def test_half_precision_is_summed_in_float32():
    logits = torch.randn(2, 5, 7).bfloat16()
    labels = torch.randint(0, 7, (2, 5))
    found = example_losses(logits, labels)
    assert found.dtype == torch.float32
    assert torch.equal(found, example_losses(logits.float(), labels))


@pytest.mark.parametrize("row", [[-100, -100, -100], [1, -100, -100]])  # nothing predicts the first token
def test_a_row_without_targets_is_an_error(row: list[int]):
    with pytest.raises(ValueError, match="example 1 of the batch has no target token"):
        example_losses(torch.zeros(2, 3, 4), torch.tensor([[0, 1, 2], row]))
