"""Ablation and grafting: put other values into the selected parameters for a while, then every bit back.

Works in place on the parameters' data, so that tied uses, optimisers and hooks see the same tensors. It
knows nothing of why a set was selected, and measures nothing.
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
    """Within the context, the parameters in `pset` have their values from `source` (None: zero).

    Names are those of `model.named_parameters()`, where a tied tensor occurs once. Values are cast to the
    parameter's type and device. On leaving, also by an exception, the selected parameters get their old bits
    back; changes that the caller makes to others inside the context stay. Of a sharded model every process changes its
    own rows; the set and the values may be sharded likewise or whole.

    Raises:
        UserError: a tensor of the set is missing in the model or the source, or has another shape there;
            nothing has been changed then.
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
        at_rest(model)  # what was gathered of a sharded model has the values put in
        for data, mask, bits in saved:
            data[mask] = bits


@contextmanager
def ablated(
    model: nn.Module, pset: ParamSet, to: str = "base", base: Mapping[str, Tensor] | None = None
) -> Iterator[nn.Module]:
    """Ablation: the selected parameters are set back to `base`'s values, or with to="zero" to 0.

    Args:
        base: name -> the values before fine-tuning; needed for to="base".
    """
    if to not in ("base", "zero"):
        raise UserError(f"ablation is to 'base' or to 'zero', not to '{to}'")
    if to == "base" and base is None:
        raise UserError("ablation to base needs the base model's parameters, but none were given")
    with replaced(model, pset, base if to == "base" else None):
        yield model


@contextmanager
def grafted(model: nn.Module, pset: ParamSet, tuned: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """Grafting: the fine-tuned values of the selected parameters are put into the base `model`."""
    with replaced(model, pset, tuned):
        yield model


def check_values(
    pset: ParamSet, names: Sequence[str], parameters: Mapping[str, Tensor], source: Mapping[str, Tensor] | None
) -> None:
    """Raise a UserError unless the model and the source have these tensors of the set, in its shapes."""
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
    """A copy of the model's parameters by canonical name, as `base` or `tuned` for the interventions; a sharded one's
    pieces."""
    with torch.no_grad():
        return {name: p.detach().clone() for name, p in at_rest(model).items()}
