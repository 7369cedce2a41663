"""Passes through a model that the doctor compares, and which module makes two of them differ."""

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
from crosstrace.trace.doctor_noise import COPIES, ROUNDINGS, Computed, finite_size
from crosstrace.trace.engine import Batch
from crosstrace.training.losses import example_losses


def padded_batch(items: Sequence[Encoded], padding: int, side: str) -> dict[str, Tensor]:
    batch = collate(items, pad_id=padding, side=side)
    # a token after padding is its example's first: nothing predicts it
    batch["labels"][:, 1:].masked_fill_(batch["attention_mask"][:, :-1] == 0, -100)
    shape = batch["input_ids"].shape
    return {key: value for key, value in batch.items() if value.shape == shape}  # all that a model reads


def one_of(batch: Batch, row: int) -> Batch:
    return {key: value[row : row + 1] for key, value in batch.items()}


def reversed_positions(batch: Batch) -> Batch:
    """The batch with other positions."""
    return {**batch, "position_ids": batch["position_ids"].flip(1)}


def first_position(model: Any, batch: Batch) -> int:
    """What the model counts its positions from: 0, or what comes after the padding's (RoBERTa)."""
    after = (getattr(getattr(model, "config", None), "pad_token_id", None) or 0) + 1
    if not accepted(model, {"position_ids": None}):
        return 0
    inputs = {key: batch[key][:1] for key in ("input_ids", "attention_mask")}
    positions = torch.arange(inputs["input_ids"].shape[1], device=inputs["input_ids"].device).unsqueeze(0)
    with torch.no_grad():
        own, from_0, from_after = (
            model(**inputs, **told).logits
            for told in ({}, {"position_ids": positions}, {"position_ids": positions + after})
        )
    return after if (from_after - own).norm() < 0.1 * (from_0 - own).norm() else 0


def _logits(model: Any, batch: Batch) -> Tensor:
    """The model's answer to what it accepts of a batch; not the engine's, which is to be judged."""
    inputs = {key: value for key, value in batch.items() if key != "labels"} | {"use_cache": False}
    output = model(**accepted(model, inputs))
    return output if isinstance(output, Tensor) else output.logits


def gradients_of(model: Any, batch: Batch, row: int = 0) -> Computed:
    """ℓ of one example of the batch, and ∂ℓ/∂θ: the reference."""
    loss = example_losses(_logits(model, batch), batch["labels"])[row]
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return Computed(float(loss.detach()), {name: g for name, g in zip(parameters, found) if g is not None})


@contextmanager
def one_rounding_more(model: Any) -> Iterator[None]:
    """Every module's output, and the gradient that arrives at it, is rounded once more: see `Noise`."""
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
    """The model with another attention kernel (None: as it is), its own afterwards.

    Raises:
        Exception: whatever transformers or the kernel raises where it is not supported.
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
class _Seen:
    """What one module got and gave for one example, at its own tokens; or the gradients that arrived at both."""

    name: str
    kind: str
    got: list[Tensor]
    gave: list[Tensor]

    def __str__(self) -> str:
        return f"module {self.name} ({self.kind})" if self.name else self.kind


def record_calls(model: Any, batch: Batch, row: int, backward: bool = False) -> list[_Seen]:
    """What every module got and gave for one example, in the order in which they finished.

    Args:
        backward: the gradients of the example's loss instead, at the same tensors.
    """
    own = batch["attention_mask"][row].bool()
    shape = batch["input_ids"].shape
    if "position_ids" not in batch:  # or padding on the left alone would be fed positions
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        batch = {**batch, "position_ids": positions + first_position(model, batch)}

    def at_tokens(x: Any) -> Tensor | None:
        if not isinstance(x, Tensor):
            return None
        if x.shape[:2] == shape:
            return x[row, own]
        if x.shape[:1] == (shape.numel(),):  # a router sees [B·T, …]
            return x.unflatten(0, shape)[row, own]
        return None

    def keep(value: Any, kept: list[Tensor]) -> None:
        for x in tree_leaves(value):
            mine = at_tokens(x)
            if mine is None:
                continue
            if not backward:
                kept.append(mine.detach())
            elif x.requires_grad:
                kept.append(torch.zeros(()))  # until its gradient comes; none may
                x.register_hook(partial(put, kept, len(kept) - 1))

    def put(kept: list[Tensor], place: int, gradient: Tensor) -> None:
        mine = at_tokens(gradient)
        if mine is not None:
            kept[place] = mine.detach()

    record: list[_Seen] = []

    def note(name: str, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen = _Seen(name, type(module).__name__, [], [])
        keep((args, kwargs), seen.got)
        keep(output, seen.gave)
        record.append(seen)

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


Tolerances = Mapping[str, tuple[float, float]]  # module -> largest error of what it got and of what it gave


def noise_of(first: Sequence[_Seen], second: Sequence[_Seen]) -> Tolerances:
    """How far two records are apart that only rounding tells apart."""
    return {a.name: (_apart(a.got, b.got), _apart(a.gave, b.gave)) for a, b in zip(first, second)}


def forward_culprit(first: Sequence[_Seen], second: Sequence[_Seen], noise: Tolerances, epsilon: float) -> str | None:
    """The first module that gives something else for the same; the smallest, as parts finish before the whole."""
    for a, b in zip(first, second):
        if a.name != b.name:
            return None
        got, gave = (max(COPIES * x, ROUNDINGS * epsilon) for x in noise.get(a.name, (0.0, 0.0)))
        if _apart(a.got, b.got) <= got and not _apart(a.gave, b.gave) <= gave:
            return str(a)
    return None


def backward_culprit(first: Sequence[_Seen], second: Sequence[_Seen], noise: Tolerances, epsilon: float) -> str | None:
    """The last module that passes another gradient down though the same arrives, and at which output it begins."""
    culprit, begins = None, None
    for a, b in zip(reversed(first), reversed(second)):
        if a.name != b.name:
            return None
        got, gave = (max(COPIES * x, ROUNDINGS * epsilon) for x in noise.get(a.name, (0.0, 0.0)))
        same = _apart(a.gave, b.gave) <= gave
        if begins is None and not same:
            begins = a
        inside = culprit is None or a.name.startswith(f"{culprit.name}.") or not culprit.name
        if inside and same and not _apart(a.got, b.got) <= got:
            culprit = a
    if culprit is None:
        return None
    where = f", from the output of {begins.name} on" if begins is not None and begins.name else ""
    return f"the backward of {culprit}{where}"


def _apart(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """The largest difference of some tensors from others, relative to the largest number of each."""
    if [x.shape for x in first] != [x.shape for x in second]:
        return math.inf
    largest = 0.0
    for x, y in zip(first, second):
        if x.numel() == 0:
            continue
        difference, size = float((x.double() - y.double()).abs().max()), float(y.double().abs().max())
        largest = max(largest, 0.0 if difference == 0 else finite_size(difference / size) if size > 0 else math.inf)
    return largest
