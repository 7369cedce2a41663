"""Slow, obvious twins of the fast code."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from crosstrace.training.losses import example_losses


def example_gradient(model: nn.Module, example: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """∂ℓ/∂θ of one example, a batch of one without padding; zeros where a parameter has no part in it."""
    output = model(input_ids=example["input_ids"], attention_mask=example["attention_mask"])
    loss = example_losses(getattr(output, "logits", output), example["labels"]).sum()
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), gradients)}


def reference_trace(model: nn.Module, examples: Iterable[Mapping[str, Tensor]], measure: str) -> dict[str, Tensor]:
    """The measure's mean over the examples, by a plain loop over torch.autograd.grad."""
    total: dict[str, Tensor] = {}
    count = 0
    for example in examples:
        for name, gradient in example_gradient(model, example).items():
            value = measured(measure, gradient, model.get_parameter(name))
            total[name] = total[name] + value if name in total else value
        count += 1
    return {name: value / count for name, value in total.items()}


def measured(measure: str, gradient: Tensor, parameter: Tensor) -> Tensor:
    """A gradient's contribution to a trace."""
    if measure == "abs":
        return gradient.abs()
    if measure == "square":
        return gradient**2
    if measure == "taylor":
        return (parameter.detach() * gradient).abs()
    assert measure == "net"
    return gradient


def training_trace(
    model: nn.Module, batch: Mapping[str, Tensor], rows: Sequence[int], seed: int, measure: str = "abs"
) -> dict[str, Tensor]:
    """The measure's mean over rows of a batch, each row's gradient by itself, through the forward that a training makes
    of the whole batch when its random numbers begin at `seed`."""
    torch.manual_seed(seed)
    losses = example_losses(model(**batch).logits, batch["labels"])
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total: dict[str, Tensor] = {}
    for row in rows:
        gradients = torch.autograd.grad(losses[row], list(parameters.values()), retain_graph=True, allow_unused=True)
        for (name, p), gradient in zip(parameters.items(), gradients):
            value = measured(measure, torch.zeros_like(p) if gradient is None else gradient, p)
            total[name] = total.get(name, torch.zeros_like(p)) + value
    return {name: value / len(rows) for name, value in total.items()}
