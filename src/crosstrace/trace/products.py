"""Inner products of per-example gradients. They are exact, and no gradient of the whole model is ever held.

Restricted to a set of parameters S, ⟨g_i, g_j⟩_S = Σ_{p∈S} g_ip g_jp is a sum over the model's parameters. Each
parameter adds its share as soon as a batched backward has passed it: the products of all examples' gradients on a tile
of it. For a whole linear layer with few tokens, g_i = Σ_t e_it a_itᵀ itself is not computed:
⟨g_i, g_j⟩ = Σ_{t,s} (e_it · e_js)(a_it · a_js).

Nothing here knows facts or formats.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from crosstrace.core.errors import UserError
from crosstrace.sets.paramset import ParamSet
from crosstrace.trace.batches import Batch
from crosstrace.trace.engine import Engine
from crosstrace.trace.rules import Linear, Rule

BLOCK = 1 << 23  # elements of the gradients of all examples on one tile of a parameter


def gradient_products(
    model: nn.Module, batches: Iterable[Batch], sets: Mapping[str, ParamSet]
) -> Iterator[dict[str, Tensor]]:
    """⟨g_i, g_j⟩ of all pairs of examples of each batch, restricted to each set of parameters.

    Args:
        model: left as it was.
        batches: as for `trace`; the pairs are of examples of the same batch.
        sets: by label. A parameter without a mask is outside of the set.

    Yields:
        for each batch: label -> products [B, B] in float64, on the model's device. The diagonal has the squared norms.

    Raises:
        UserError: there is no set, all sets are empty, a set is of another model, or a batch can't be traced.
    """
    parameters = dict(model.named_parameters())
    if not sets:
        raise UserError("gradient products need at least one set of parameters to be taken over")
    wanted: dict[str, dict[str, Tensor | None]] = {}  # parameter -> label -> its mask; None: all of it
    for label, pset in sets.items():
        for name, mask in pset.masks.items():
            if name not in parameters or parameters[name].shape != mask.shape:
                raise UserError(
                    f"set {label!r} has '{name}' with shape {list(mask.shape)}, which the model does not have; was the "
                    "set made for another model?"
                )
            if bool(mask.any()):
                wanted.setdefault(name, {})[label] = None if bool(mask.all()) else mask
    if not wanted:
        raise UserError("every set of parameters that gradient products were asked over is empty")
    engine = Engine(model, set(wanted))
    for batch in batches:
        rows = {key: value for key, value in batch.items() if key != "group"}
        count = len(rows["labels"]) if "labels" in rows else 0
        device = next(iter(parameters.values())).device
        products = {label: torch.zeros(count, count, dtype=torch.float64, device=device) for label in sets}

        def add(name: str, rules: list[Rule], products: dict[str, Tensor] = products) -> None:
            if rules:
                _add(rules, parameters[name], wanted[name], products)

        engine.visit(rows, add)
        yield products


def _add(
    rules: list[Rule], parameter: Tensor, wanted: Mapping[str, Tensor | None], products: dict[str, Tensor]
) -> None:
    """Add one parameter's share of the products to every set that holds some of it."""
    full = [label for label, mask in wanted.items() if mask is None]
    partial = {label: mask for label, mask in wanted.items() if mask is not None}
    if not partial and len(rules) == 1 and isinstance(rules[0], Linear):
        gram = rules[0].gram()
        if gram is not None:
            for label in full:
                products[label] += gram
            return
    count = rules[0].batch
    shape = parameter.shape or (1,)
    row = parameter.numel() // shape[0]
    height = max(1, BLOCK // (count * row))
    wide = torch.promote_types(parameter.dtype, torch.float32)
    for top in range(0, shape[0], height):
        rows = slice(top, min(top + height, shape[0]))
        block = torch.empty(count, rows.stop - top, *shape[1:], dtype=wide, device=parameter.device)
        for number, rule in enumerate(rules):
            rule.product(block, slice(0, count), rows, min(number, 1))
        flat = block.flatten(1)
        if full:
            gram = (flat @ flat.t()).double()
            for label in full:
                products[label] += gram
        for label, mask in partial.items():
            chosen = (mask[rows] if parameter.dim() else mask).flatten().to(flat.device)
            if bool(chosen.any()):
                selected = flat[:, chosen]
                products[label] += (selected @ selected.t()).double()
