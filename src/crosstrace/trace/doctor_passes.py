"""The passes through a model that the doctor compares, and the search for the module that makes two of them differ."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from crosstrace.data.tokens import Encoded, collate
from crosstrace.models.forward import accepted
from crosstrace.trace.batches import Batch
from crosstrace.trace.doctor_noise import COPIES, ROUNDINGS, Computed, finite_size
from crosstrace.training.losses import example_losses


def padded_batch(items: Sequence[Encoded], padding: int, side: str) -> dict[str, Tensor]:
    """The examples as a batch of what a model reads, padded on one side."""
    batch = collate(items, pad_id=padding, side=side)
    # A token after padding is the first of its example: nothing predicts it.
    batch["labels"][:, 1:].masked_fill_(batch["attention_mask"][:, :-1] == 0, -100)
    shape = batch["input_ids"].shape
    return {key: value for key, value in batch.items() if value.shape == shape}


def one_of(batch: Batch, row: int) -> Batch:
    """The batch of one row."""
    return {key: value[row : row + 1] for key, value in batch.items()}


def reversed_positions(batch: Batch) -> Batch:
    """The batch with other positions."""
    return {**batch, "position_ids": batch["position_ids"].flip(1)}


def first_position(model: Any, batch: Batch) -> int:
    """The model's first position: 0, or the number after the padding token's (RoBERTa)."""
    after = (getattr(getattr(model, "config", None), "pad_token_id", None) or 0) + 1
    if not accepted(model, {"position_ids": None}):
        return 0
    inputs = {key: batch[key][:1] for key in ("input_ids", "attention_mask")}
    positions = torch.arange(inputs["input_ids"].shape[1], device=inputs["input_ids"].device).unsqueeze(0)
    with torch.no_grad():
        default, from_0, from_after = (
            model(**inputs, **position_ids).logits
            for position_ids in ({}, {"position_ids": positions}, {"position_ids": positions + after})
        )
    return after if (from_after - default).norm() < 0.1 * (from_0 - default).norm() else 0


def _logits(model: Any, batch: Batch) -> Tensor:
    """The model's logits for a batch, given all inputs that it accepts. (The engine's logits are what is judged.)"""
    inputs = {key: value for key, value in batch.items() if key != "labels"} | {"use_cache": False}
    output = model(**accepted(model, inputs))
    return output if isinstance(output, Tensor) else output.logits


def gradients_of(model: Any, batch: Batch, row: int = 0) -> Computed:
    """ℓ of one example of the batch, and ∂ℓ/∂θ, by autograd alone: the reference."""
    loss = example_losses(_logits(model, batch), batch["labels"])[row]
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return Computed(float(loss.detach()), {name: g for name, g in zip(parameters, gradients) if g is not None})


@contextmanager
def one_rounding_more(model: Any) -> Iterator[None]:
    """Within the context, every module's output, and the gradient that arrives at it, is rounded once more.

    See `Noise` for how."""
    device = next(model.parameters()).device
    random = torch.Generator(device).manual_seed(0)

    def rounded(x: Tensor) -> Tensor:
        epsilon = max(torch.finfo(x.dtype).eps, torch.finfo(torch.float32).eps)
        size = x.detach().to(torch.promote_types(x.dtype, torch.float32)).square().mean().sqrt().to(x.dtype)
        noise = torch.empty_like(x).uniform_(-1, 1, generator=random)
        return x + epsilon * size * noise

    def changed(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.numel() == 0:
            return x
        y = rounded(x)
        if y.requires_grad:
            y.register_hook(rounded)
        return y

    with ExitStack() as hooks:
        for module in model.modules():
            hook = module.register_forward_hook(lambda module, args, output: tree_map(changed, output))
            hooks.callback(hook.remove)
        yield


@contextmanager
def attention_kernel(model: Any, name: str | None) -> Iterator[None]:
    """Within the context, the model has another attention kernel (None: the one that it has).

    Raises:
        Exception: the kernel is not supported. transformers and the kernels raise errors of any kind.
    """
    if name is None:
        yield
        return
    configs = [c for m in model.modules() if (c := getattr(m, "config", None)) is not None]
    configs += [getattr(c, key, None) for c in configs for key in getattr(c, "sub_configs", ())]
    before = [(c, c._attn_implementation_internal) for c in configs if hasattr(c, "_attn_implementation_internal")]
    try:
        model.set_attn_implementation(name)
        if model.config._attn_implementation != name:
            raise ValueError(f"{type(model).__name__} cannot change its kernel")
        yield
    finally:
        for config, kernel in before:
            config._attn_implementation_internal = kernel


@dataclass
class _ModuleCall:
    """The inputs and outputs of one module for one example, without padding; or the gradients at both.

    Attributes:
        name: of the module; empty: the model itself.
        type_name: of the module's class.
    """

    name: str
    type_name: str
    inputs: list[Tensor]
    outputs: list[Tensor]

    def __str__(self) -> str:
        return f"module {self.name} ({self.type_name})" if self.name else self.type_name


def record_calls(model: Any, batch: Batch, row: int, backward: bool = False) -> list[_ModuleCall]:
    """The inputs and outputs of every module for one example, in the order in which the modules finished.

    Args:
        backward: record the gradients of the example's loss at these tensors instead.
    """
    is_token = batch["attention_mask"][row].bool()
    shape = batch["input_ids"].shape
    if "position_ids" not in batch:  # else only a batch padded on the left would have positions
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        batch = {**batch, "position_ids": positions + first_position(model, batch)}

    def at_tokens(x: Any) -> Tensor | None:
        if not isinstance(x, Tensor):
            return None
        if x.shape[:2] == shape:
            return x[row, is_token]
        if x.shape[:1] == (shape.numel(),):  # a router sees [B·T, …]
            return x.unflatten(0, shape)[row, is_token]
        return None

    def keep(value: Any, kept: list[Tensor]) -> None:
        for x in tree_leaves(value):
            of_example = at_tokens(x)
            if of_example is None:
                continue
            if not backward:
                kept.append(of_example.detach())
            elif x.requires_grad:
                kept.append(torch.zeros(()))  # replaced by the gradient, if one comes
                x.register_hook(partial(put, kept, len(kept) - 1))

    def put(kept: list[Tensor], index: int, gradient: Tensor) -> None:
        of_example = at_tokens(gradient)
        if of_example is not None:
            kept[index] = of_example.detach()

    record: list[_ModuleCall] = []

    def note(name: str, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        call = _ModuleCall(name, type(module).__name__, [], [])
        keep((args, kwargs), call.inputs)
        keep(output, call.outputs)
        record.append(call)

    with ExitStack() as hooks, torch.set_grad_enabled(backward):
        for name, module in model.named_modules():
            hook = module.register_forward_hook(
                lambda module, args, kwargs, output, name=name: note(name, module, args, kwargs, output),
                with_kwargs=True,
            )
            hooks.callback(hook.remove)
        if backward:
            gradients_of(model, batch, row)
        else:
            _logits(model, batch)
    return record


Tolerances = Mapping[str, tuple[float, float]]  # module -> largest difference of its inputs and of its outputs


def noise_of(first: Sequence[_ModuleCall], second: Sequence[_ModuleCall]) -> Tolerances:
    """The differences between two records that differ by rounding alone."""
    return {a.name: (_difference(a.inputs, b.inputs), _difference(a.outputs, b.outputs)) for a, b in zip(first, second)}


def forward_culprit(
    first: Sequence[_ModuleCall], second: Sequence[_ModuleCall], noise: Tolerances, epsilon: float
) -> str | None:
    """The first module with the same inputs and different outputs, beyond the noise; None if there is none.

    It is the innermost, as a module finishes after the modules inside it."""
    for a, b in zip(first, second):
        if a.name != b.name:
            return None
        for_inputs, for_outputs = _tolerances(noise, a.name, epsilon)
        if _difference(a.inputs, b.inputs) <= for_inputs and not _difference(a.outputs, b.outputs) <= for_outputs:
            return str(a)
    return None


def backward_culprit(
    first: Sequence[_ModuleCall], second: Sequence[_ModuleCall], noise: Tolerances, epsilon: float
) -> str | None:
    """The last module with the same gradients at its outputs and different ones at its inputs; None if there is none.

    It is described with the last module whose outputs' gradients differ, which is where the difference begins."""
    culprit, begins = None, None
    for a, b in zip(reversed(first), reversed(second)):
        if a.name != b.name:
            return None
        for_inputs, for_outputs = _tolerances(noise, a.name, epsilon)
        has_same_outputs = _difference(a.outputs, b.outputs) <= for_outputs
        if begins is None and not has_same_outputs:
            begins = a
        is_inside = culprit is None or a.name.startswith(f"{culprit.name}.") or not culprit.name
        if is_inside and has_same_outputs and not _difference(a.inputs, b.inputs) <= for_inputs:
            culprit = a
    if culprit is None:
        return None
    start = f", from the output of {begins.name} on" if begins is not None and begins.name else ""
    return f"the backward of {culprit}{start}"


def _tolerances(noise: Tolerances, module: str, epsilon: float) -> tuple[float, float]:
    """The largest difference of a module's inputs, and of its outputs, that rounding explains."""
    for_inputs, for_outputs = noise.get(module, (0.0, 0.0))
    return max(COPIES * for_inputs, ROUNDINGS * epsilon), max(COPIES * for_outputs, ROUNDINGS * epsilon)


def _difference(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """The largest difference between two lists of tensors, relative to the largest number of each tensor."""
    if [x.shape for x in first] != [x.shape for x in second]:
        return math.inf
    largest = 0.0
    for x, y in zip(first, second):
        if x.numel() == 0:
            continue
        difference, size = float((x.double() - y.double()).abs().max()), float(y.double().abs().max())
        largest = max(largest, 0.0 if difference == 0 else finite_size(difference / size) if size > 0 else math.inf)
    return largest
