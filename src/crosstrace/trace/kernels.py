"""The kernel for the GPU (Triton): the per-example sums of a linear layer in one pass.

PyTorch must write every block of per-example gradients to memory before it can take |g|. Here the gradient of an
example stays in registers, and only the sums are written. The plain twin, which runs anywhere and which the tests
compare with, is `blocks.add_blocks`.

This module knows neither rules, models nor losses. Triton is imported at the first call, so the package works without
it. Until then the kernel below is a plain function.

Shapes: B examples, T positions, R rows and K columns of the parameter.
"""

# A kernel's constants are annotated tl.constexpr, and tl is not there before the first call:
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MEASURES = ("sum", "abs", "square")
PRECISIONS = ("ieee", "tf32x3", "tf32", "bf16x6", "bf16x3")

# (BLOCK_R, BLOCK_K, BLOCK_T, warps, stages). Larger tiles spill registers: sm_90 has 128 a thread for 16 warps, and the
# product and one sum of a 128 x 256 tile take all of them.
TILINGS = (
    (64, 64, 64, 4, 4),
    (64, 64, 32, 4, 4),
    (64, 64, 16, 4, 4),
    (64, 128, 64, 4, 3),
    (64, 128, 32, 4, 4),
    (128, 64, 64, 4, 3),
    (128, 64, 32, 4, 4),
    (128, 64, 64, 8, 3),
    (128, 128, 64, 8, 3),
    (128, 128, 32, 8, 4),
    (128, 128, 16, 8, 4),
    (64, 256, 64, 8, 3),
    (256, 64, 64, 8, 3),
)
INTERPRETED = (16, 32, 16, 4, 1)  # the smallest that tl.dot takes, so that a test's few numbers fill several blocks
REGISTERS = 168  # per thread, for the product and the sums: 255 less those for addresses and operands
SHARED = 220 * 1024  # bytes of shared memory that a program may have on H100 and H200, less some for the compiler
LONGEST = 128  # positions; longer examples share one tiling

# A kernel finds names only among its module's globals. These two are there once it is built.
tl: Any = None  # triton.language
tile_indices: Any = None  # `_tile_indices`, for Triton


def available(tensor: Tensor) -> bool:
    """Whether `per_example_sums` takes factors like this one: of its dtype, on a GPU with Triton (or interpreted)."""
    if tensor.dtype not in DTYPES or not (tensor.is_cuda or _interpreting()) or not _installed():
        return False
    if _interpreting():
        return True
    return torch.cuda.get_device_capability(tensor.device) >= (8, 0)  # older: no bfloat16


def per_example_sums(
    left: Tensor,
    right: Tensor,
    sums: dict[str, Tensor],
    examples: slice,
    lengths: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    precision: str = "ieee",
) -> None:
    """Add Σ_b f(G_b) to `sums`, where G_b = Σ_t left[b, t]ᵀ right[b, t] is example b's gradient of a linear layer.

    The layer y = a Wᵀ has the input a [B, T, I] and the output's gradient e = ∂Σℓ/∂y [B, T, O]. With left = e and
    right = a, G_b is the per-example gradient ∂ℓ_b/∂W = Σ_t e_btᵀ a_bt (Goodfellow, arXiv 1510.01799, equation 3, with
    positions). For y = a W (GPT-2's Conv1D), left = a and right = e. The unit is one example: f is taken of its whole
    gradient, over all of its positions. |θ·g| is no measure here, since it is |θ|·|g|.

    Half-precision factors are multiplied as they are. A product of two bfloat16 (float16) numbers is exact in float32,
    and all sums are kept in float32. So pass what the model computed in its own dtype: casting it to float32 first
    gives the same numbers many times slower. Float32 factors are multiplied as `precision` says.

    The order of each sum is fixed (no atomics): the same call on the same device gives the same bits. If the tiling is
    tuned again, on another machine or with another cache, the last bits may differ.

    Args:
        left: [B, T, R], bfloat16, float16 or float32, any strides.
        right: [B, T, K], of the same dtype and device.
        sums: those that are wanted of "sum" Σ G, "abs" Σ |G| and "square" Σ G²: float32 [R, K], of equal strides. They
            are added to in place.
        examples: which b.
        lengths: int32 [B], how many leading positions of each example count; the rest is not read. None: all T.
        scale: float32 [B], what G_b is multiplied by before f. None: nothing.
        precision: how float32 factors are multiplied, as Triton's `input_precision`: "ieee" (exact float32, no tensor
            cores), "tf32x3" (three tensor core products, nearly float32), or coarser.

    Raises:
        ValueError: a shape, dtype, device or name is not as above.
    """
    _check(left, right, sums, lengths, scale, precision)
    first, stop, step = examples.indices(len(left))
    count, rows, columns = len(range(first, stop, step)), left.shape[2], right.shape[2]
    positions = left.shape[1]
    if not sums or 0 in (count, rows, columns, positions):
        return
    left, right = _near(left), _near(right)
    like = next(iter(sums.values()))
    kernel, cdiv = _kernel()

    def grid(meta: Mapping[str, Any]) -> tuple[int]:
        return (cdiv(rows, meta["BLOCK_R"]) * cdiv(columns, meta["BLOCK_K"]),)

    # Triton launches on the current device, which may be another than the tensors'.
    with torch.cuda.device(left.device) if left.is_cuda else nullcontext():
        kernel[grid](
            left,
            right,
            sums.get("sum"),
            sums.get("abs"),
            sums.get("square"),
            None if lengths is None else lengths.contiguous(),
            None if scale is None else scale.contiguous(),
            first,
            step,
            count,
            positions,
            rows,
            columns,
            *left.stride(),
            *right.stride(),
            *like.stride(),
            _tuned_length(positions),
            SUM="sum" in sums,
            ABS="abs" in sums,
            SQUARE="square" in sums,
            PRECISION=precision if left.dtype == torch.float32 else "ieee",
            WIDEN=_interpreting(),
        )


def _tiles(
    left,
    right,
    summed,
    absolute,
    squared,
    lengths,
    scale,
    first,
    step,
    count,
    positions,
    rows,
    columns,
    left_b,
    left_t,
    left_r,
    right_b,
    right_t,
    right_k,
    out_r,
    out_k,
    tuned_length,
    SUM: tl.constexpr,
    ABS: tl.constexpr,
    SQUARE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    SINGLE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One program: one tile of the sums, over all examples."""
    r, k = tile_indices(rows, columns, GROUP, BLOCK_R, BLOCK_K)
    # Beyond the edge the tile wraps around, so that loads need no mask there; the stores have one.
    t = tl.arange(0, BLOCK_T)
    left_offset = (r % rows)[:, None] * left_r + t[None, :] * left_t
    right_offset = t[:, None] * right_t + (k % columns)[None, :] * right_k
    sum_tile = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    abs_tile = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    square_tile = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    for n in range(count):
        b = (first + n * step).to(tl.int64)  # B·T·R may pass 2³¹
        length = positions
        if lengths is not None:
            length = tl.minimum(tl.load(lengths + b), positions)
        left_at = left + b * left_b
        right_at = right + b * right_b
        product = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
        # With one constant step there is no inner loop: the compiler overlaps this example with the next one's loads.
        end = BLOCK_T if SINGLE else length
        for start in range(0, end, BLOCK_T):
            present = t < length - start
            x = tl.load(left_at + left_offset, mask=present[None, :], other=0.0)
            y = tl.load(right_at + right_offset, mask=present[:, None], other=0.0)
            if WIDEN:  # the interpreter's dot can't multiply bfloat16
                x = x.to(tl.float32)
                y = y.to(tl.float32)
            product = tl.dot(x, y, product, input_precision=PRECISION)
            left_at += BLOCK_T * left_t
            right_at += BLOCK_T * right_t
        if scale is not None:
            product = product * tl.load(scale + b)
        if SUM:
            sum_tile += product
        if ABS:
            abs_tile += tl.abs(product)
        if SQUARE:
            square_tile = tl.fma(product, product, square_tile)

    offset = r.to(tl.int64)[:, None] * out_r + k.to(tl.int64)[None, :] * out_k
    is_inside = (r < rows)[:, None] & (k < columns)[None, :]
    if SUM:
        tl.store(summed + offset, tl.load(summed + offset, mask=is_inside) + sum_tile, mask=is_inside)
    if ABS:
        tl.store(absolute + offset, tl.load(absolute + offset, mask=is_inside) + abs_tile, mask=is_inside)
    if SQUARE:
        tl.store(squared + offset, tl.load(squared + offset, mask=is_inside) + square_tile, mask=is_inside)


def _tile_indices(rows, columns, GROUP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    """The rows and the columns of this program's tile."""
    # Programs that run at the same time take GROUP rows of tiles, column by column: both factors stay in L2.
    tile = tl.program_id(0)
    high = tl.cdiv(rows, BLOCK_R)
    wide = tl.cdiv(columns, BLOCK_K)
    group = tile // (GROUP * wide)
    height = tl.minimum(high - group * GROUP, GROUP)
    inside = tile - group * GROUP * wide
    r = (group * GROUP + inside % height) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = (inside // height) * BLOCK_K + tl.arange(0, BLOCK_K)
    return r, k


@functools.cache
def _kernel() -> tuple[Any, Any]:
    """`_tiles`, compiled at its calls and tuned for each shape, and Triton's cdiv."""
    global tl, tile_indices
    triton = importlib.import_module("triton")
    tl = importlib.import_module("triton.language")
    tile_indices = triton.jit(_tile_indices)
    # Specialised on what changes the code (strides, divisibility of R and K), not on the numbers of each batch.
    varying = ["first", "step", "count", "positions", "tuned_length"]
    kernel = triton.jit(_tiles, do_not_specialize=varying)
    kernel = triton.heuristics({"SINGLE": lambda args: args["positions"] <= args["BLOCK_T"]})(kernel)
    sums = _Sums()
    # If this Triton can, it keeps the results on disk: else every process measures every shape again.
    caching = {"cache_results": True} if "cache_results" in inspect.signature(triton.autotune).parameters else {}
    tuned = triton.autotune(
        configs=[
            triton.Config({"BLOCK_R": r, "BLOCK_K": k, "BLOCK_T": t, "GROUP": 8}, num_warps=warps, num_stages=stages)
            for r, k, t, warps, stages in ((INTERPRETED,) if _interpreting() else TILINGS)
        ],
        key=["rows", "columns", "tuned_length", "SUM", "ABS", "SQUARE", "PRECISION"],
        pre_hook=sums.keep,
        post_hook=sums.put_back,
        prune_configs_by={"early_config_prune": _promising},
        **caching,
    )
    return tuned(kernel), triton.cdiv


class _Sums:
    """Restores the sums after the trials of tilings, which add to them too.

    Triton's own `restore_value` does this, but it fails on None, a sum that is not wanted.
    """

    names = ("summed", "absolute", "squared")  # among the kernel's arguments

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def keep(self, arguments: dict[str, Any], reset_only: bool = False) -> None:
        """Copy the sums. Called before a trial, and with `reset_only` after the last one."""
        if not reset_only:
            self._kept = {name: arguments[name].clone() for name in self.names if arguments[name] is not None}

    def put_back(self, arguments: dict[str, Any], exception: Exception | None = None) -> None:
        """Restore the sums. Called after a trial."""
        for name, before in self._kept.items():
            arguments[name].copy_(before)
        self._kept = {}


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _promising(configs: list[Any], arguments: dict[str, Any], **constants: Any) -> list[Any]:
    """The tilings that are worth a trial: they fit into registers and shared memory, and multiply little padding."""
    outputs = constants["SUM"] + constants["ABS"] + constants["SQUARE"]
    size = arguments["left"].element_size()
    longest = max(16, min(64, arguments["tuned_length"]))

    def fits(config: Any) -> bool:
        r, k, t = (config.kwargs[name] for name in ("BLOCK_R", "BLOCK_K", "BLOCK_T"))
        registers = r * k * (1 + outputs) // (32 * config.num_warps)
        return registers <= REGISTERS and (r + k) * t * size * config.num_stages <= SHARED and t <= longest

    return [config for config in configs if fits(config)] or configs[:1]


def _check(
    left: Tensor,
    right: Tensor,
    sums: dict[str, Tensor],
    lengths: Tensor | None,
    scale: Tensor | None,
    precision: str,
) -> None:
    """Raise a `ValueError` if an argument of `per_example_sums` is not as it says."""
    if left.dim() != 3 or right.dim() != 3 or left.shape[:2] != right.shape[:2]:
        raise ValueError(f"the factors have shapes {list(left.shape)} and {list(right.shape)}; expected [B, T, R|K]")
    if left.dtype != right.dtype or left.dtype not in DTYPES or left.device != right.device:
        raise ValueError(
            f"the factors are {left.dtype} on {left.device} and {right.dtype} on {right.device}; expected one "
            "device and one of bfloat16, float16 and float32"
        )
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; expected one of {', '.join(PRECISIONS)}")
    shape = (left.shape[2], right.shape[2])
    for name, total in sums.items():
        if name not in MEASURES:
            raise ValueError(f"unknown sum {name!r}; expected some of {', '.join(MEASURES)}")
        if total.shape != shape or total.dtype != torch.float32 or total.device != left.device:
            raise ValueError(
                f"sum {name!r} is {total.dtype} {list(total.shape)} on {total.device}; expected torch.float32 "
                f"{list(shape)} on {left.device}"
            )
    if len({total.stride() for total in sums.values()}) > 1:
        raise ValueError("the sums differ in their strides; make them with torch.zeros_like of one tensor")
    for name, value, dtype in (("lengths", lengths, torch.int32), ("scale", scale, torch.float32)):
        if value is not None and (value.shape != left.shape[:1] or value.dtype != dtype or value.device != left.device):
            raise ValueError(
                f"{name} are {value.dtype} {list(value.shape)} on {value.device}; expected {dtype} [{len(left)}] on "
                f"{left.device}"
            )


def _near(factor: Tensor) -> Tensor:
    """The factor itself, if 32-bit offsets reach over one block of it, else a contiguous copy."""
    reach = (factor.shape[2] - 1) * factor.stride(2) + LONGEST * factor.stride(1)
    return factor if reach < 2**31 else factor.contiguous()


def _tuned_length(positions: int) -> int:
    """T rounded up to a power of two. Lengths differ in every batch, and each new one would be tuned for."""
    return min(LONGEST, max(16, 1 << (positions - 1).bit_length()))


def _interpreting() -> bool:
    """Whether Triton runs kernels in Python, on any device. Triton reads this variable once, at its import."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
