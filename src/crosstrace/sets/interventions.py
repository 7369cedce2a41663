"""Ablation and grafting: the selected parameters have other values for a while, and then every bit of the old ones.

The parameters' data are changed in place, so that tied uses, optimisers and hooks see the same tensors. Nothing here
knows why a set was selected, and nothing is measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from crosstrace.core.errors import UserError
from crosstrace.core.pieces import at_rest, local, piece
from crosstrace.sets.paramset import ParamSet


@contextmanager
def replaced(model: nn.Module, pset: ParamSet, source: Mapping[str, Tensor] | None) -> Iterator[nn.Module]:
    """Within the context, the parameters in `pset` have the values of `source` (None: zero).

    On leaving, also by an exception, the selected parameters get their old bits back. Changes that the caller makes to
    other parameters stay. If the model is sharded, every process changes its rows; the set and the values may be
    sharded likewise or be whole.

    Args:
        source: values by the names of `model.named_parameters()`, where a tied tensor occurs once. They are cast to the
            parameter's type and device.

    Raises:
        UserError: a tensor of the set is missing in the model or the source, or has another shape there. Nothing has
            been changed then.
    """
    parameters = at_rest(model)
    touched = [name for name, count in pset.counts().items() if count]
    check_values(pset, touched, parameters, source)
    saved: list[tuple[Tensor, Tensor, Tensor]] = []  # data, mask, the bits to put back
    try:
        for name in touched:
            theta = parameters[name]
            data = local(theta.data)
            mask = piece(pset.masks[name], theta).to(data.device)
            new = 0 if source is None else piece(source[name].detach(), theta).to(data.device)[mask].to(data.dtype)
            saved.append((data, mask, data[mask]))
            data[mask] = new
        yield model
    finally:
        at_rest(model)  # frees the gathered weights of a sharded model, which have the values of `source`
        for data, mask, bits in saved:
            data[mask] = bits


@contextmanager
def ablated(
    model: nn.Module, pset: ParamSet, to: str = "base", base: Mapping[str, Tensor] | None = None
) -> Iterator[nn.Module]:
    """Ablation: within the context, the selected parameters have the values of `base`, or 0.

    Args:
        to: "base" or "zero".
        base: name -> the values before fine-tuning; needed for "base".

    Raises:
        UserError: another value of `to`, no `base` where it is needed, or as `replaced`.
    """
    if to not in ("base", "zero"):
        raise UserError(f"ablation is to 'base' or to 'zero', not to '{to}'")
    if to == "base" and base is None:
        raise UserError("ablation to base needs the base model's parameters, but none were given")
    with replaced(model, pset, base if to == "base" else None):
        yield model


@contextmanager
def grafted(model: nn.Module, pset: ParamSet, tuned: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """Grafting: within the context, the selected parameters of the base `model` have their fine-tuned values.

    Args:
        tuned: name -> the values after fine-tuning.

    Raises:
        UserError: as `replaced`.
    """
    with replaced(model, pset, tuned):
        yield model


def check_values(
    pset: ParamSet, names: Sequence[str], parameters: Mapping[str, Tensor], source: Mapping[str, Tensor] | None
) -> None:
    """Raise a `UserError` unless the model and the source have these tensors, in the shapes of the set's masks."""
    for name in names:
        _check(name, pset.masks[name], parameters, "the model")
        if source is not None:
            _check(name, pset.masks[name], source, "the values to put in")


def _check(name: str, mask: Tensor, tensors: Mapping[str, Tensor], where: str) -> None:
    if name not in tensors:
        raise UserError(f"'{name}' is in the set but not in {where}; the set was made for another model")
    if tensors[name].shape != mask.shape:
        raise UserError(
            f"'{name}' has shape {tuple(tensors[name].shape)} in {where} but {tuple(mask.shape)} in the set; "
            "the set was made for another model"
        )


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the model's parameters by name, as `base` or `tuned` for the interventions.

    If the model is sharded, each process copies its rows."""
    with torch.no_grad():
        return {name: p.detach().clone() for name, p in at_rest(model).items()}
