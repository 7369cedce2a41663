"""Sums over examples of per-example gradients: Σg, Σ|g| and Σg², added block by block.

A block holds the gradients of a few examples on some rows of a parameter. It is folded into the sums while it is still
in the processor's cache. No [B, *parameter] tensor exists at any time.

Nothing here knows how a gradient is made.

Shapes: B examples, c examples of a block, r rows of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

# Elements of one example's tile, 4 MB in float32. With 64 positions a matmul of fewer rows loses more than the cache
# saves (benchmarks/tiles.py). Several examples share a block of that size only where their tiles are small.
TILE = 1 << 20
SMALL = 1 << 17  # most elements of a tile that shares its block with other examples
GPU_TILE = 1 << 24  # of a tile on a GPU, where each operation on a block has a price of its own
ROWS = 64  # fewest rows of a tile


class HasProduct(Protocol):
    """What gives per-example gradients: a rule."""

    def product(self, out: Tensor, examples: slice, rows: slice, beta: int) -> None: ...


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums of half-precision gradients are kept in float32, others in their own dtype."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def fold(block: Tensor, sums: dict[str, Tensor]) -> None:
    """Add the gradients in block [c, …] to the sums […]. The block is used up."""
    single = len(block) == 1  # one example's is not copied
    block = block[0] if single else block
    if "sum" in sums:
        sums["sum"].add_(block if single else block.sum(0))
    if "abs" in sums:
        block.abs_()
        sums["abs"].add_(block if single else block.sum(0))
    if "square" in sums:
        if single:
            sums["square"].addcmul_(block, block)
        else:
            sums["square"].add_(block.square_().sum(0))


def add_blocks(
    uses: Sequence[HasProduct],
    sums: dict[str, Tensor],
    examples: slice,
    batch: int,
    weighted: Tensor | None = None,
    weights: Sequence[float] = (),
) -> None:
    """Add the gradients of all uses of a parameter, and fold them into the sums block by block.

    Args:
        uses, sums, examples, weighted, weights: as in `reduction.reduce`.
        batch: B.
    """
    like = next(iter(sums.values()))
    row = max(1, like[0].numel())
    tile_size, small = (GPU_TILE, GPU_TILE) if like.is_cuda else (TILE, SMALL)
    r = min(len(like), max(ROWS, tile_size // row))
    start, stop, step = examples.indices(batch)
    count = len(range(start, stop, step))
    c = max(1, min(count, tile_size // (r * row))) if r * row <= small else 1
    scratch = like.new_empty(c * r * row)
    for top in range(0, len(like), r):
        rows = slice(top, min(top + r, len(like)))
        height = rows.stop - rows.start
        tile = {name: total[rows] for name, total in sums.items()}
        weighted_tile = None if weighted is None else weighted[rows]
        blocks = scratch[: c * height * row].view(c, height, *like.shape[1:])
        for first in range(0, count, c):
            n = min(c, count - first)
            chosen = slice(start + first * step, start + (first + n - 1) * step + 1, step)
            block = blocks[:n]
            for beta, use in enumerate(uses):
                use.product(block, chosen, rows, min(beta, 1))
            if weighted_tile is not None:
                for k in range(n):
                    weighted_tile.add_(block[k], alpha=weights[chosen.start + k * step])
            fold(block, tile)


def put(out: Tensor, value: Tensor, beta: int) -> None:
    """out = beta · out + value, for a beta of 0 or 1."""
    out.copy_(value) if beta == 0 else out.add_(value)  # not beta · out: fresh scratch may hold NaN
