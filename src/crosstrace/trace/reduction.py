"""The sums of one parameter, from the rules of all its uses."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from crosstrace.trace import cpu_kernel
from crosstrace.trace.blocks import add_blocks
from crosstrace.trace.rules import Embedding, Linear, Rule, raising_unfit


def reduce(
    uses: Sequence[Rule],
    sums: dict[str, Tensor],
    examples: slice,
    totals: bool = True,
    weighted: Tensor | None = None,
    weights: Sequence[float] = (),
) -> None:
    """Add the sums over `examples` of the per-example gradients of one parameter.

    Args:
        uses: all uses of the parameter in the batch, added before the absolute value; none: nothing to add.
        sums: what is added to: of "sum" Σg, "abs" Σ|g| and "square" Σg² those that are wanted, each of the
            parameter's shape, in `sum_dtype` of the parameter's.
        examples: which of the batch.
        totals: if "sum" alone is wanted, it may be computed without work per example.
        weighted: if given, Σ_i w_i g_i of the same products is added to it.
        weights: w_i of all examples of the batch.

    Raises:
        Unfit: a rule turned out to be unfit only now; nothing has been added.
    """
    if any(use.lazy for use in uses):
        apart = {name: torch.zeros_like(total) for name, total in sums.items()}
        with raising_unfit():
            add_blocks(uses, apart, examples, uses[0].batch) if len(uses) > 1 else uses[0].reduce(apart, examples)
        for name, total in sums.items():
            total.add_(apart[name])
    elif totals and weighted is None and list(sums) == ["sum"]:
        for use in uses:
            use.total(sums["sum"], examples)
    elif weighted is None and (linear := _find_tied_product(uses, sums, examples)):
        _reduce_tied(linear, uses, sums, examples)
    elif weighted is not None:
        every = sums | {"weighted": weighted}
        if len(uses) == 1 and isinstance(uses[0], Linear) and cpu_kernel.takes(uses[0].left, uses[0].right, every):
            uses[0].reduce_by_cpu_kernel(every, examples, weights)
        else:
            add_blocks(uses, sums, examples, uses[0].batch, weighted, weights)
    elif len(uses) == 1:
        uses[0].reduce(sums, examples)
    elif uses:
        add_blocks(uses, sums, examples, uses[0].batch)


def _find_tied_product(uses: Sequence[Rule], sums: Mapping[str, Tensor], examples: slice) -> Linear | None:
    """The product among the uses of a tied embedding, if a kernel takes it and most rows are not looked up."""
    products = [use for use in uses if type(use) is Linear]
    lookups = [use for use in uses if isinstance(use, Embedding)]
    if len(products) != 1 or not lookups or len(products) + len(lookups) != len(uses):
        return None
    linear = products[0]
    if sum(use.ids[examples].numel() for use in lookups) >= linear.left.shape[-1] // 2:
        return None
    has_kernel = linear.fits_gpu_kernel(sums) or cpu_kernel.takes(linear.left, linear.right, sums)
    return linear if has_kernel else None


def _reduce_tied(linear: Linear, uses: Sequence[Rule], sums: Mapping[str, Tensor], examples: slice) -> None:
    """Add the sums of a tied embedding.

    Rows that no example looks up have the product's gradient alone: the kernel folds them. In the other rows the uses
    are added first.
    """
    lookups = [use for use in uses if isinstance(use, Embedding)]
    looked_up = torch.cat([use.ids[examples].flatten() for use in lookups]).unique()
    apart = {name: total[looked_up] for name, total in sums.items()}
    if linear.fits_gpu_kernel(sums):
        linear.reduce_by_gpu_kernel(sums, examples)
    else:
        linear.reduce_by_cpu_kernel(sums, examples)
    parts: list[Rule] = []
    for use in uses:
        part = copy.copy(use)
        if isinstance(part, Linear):
            left, right = linear.factors
            part.factors = (left[..., looked_up], right)
        elif isinstance(part, Embedding):
            part.rows, part.ids = len(looked_up), torch.searchsorted(looked_up, part.ids)
        parts.append(part)
    add_blocks(parts, apart, examples, linear.batch)
    for name, total in sums.items():
        total[looked_up] = apart[name]
