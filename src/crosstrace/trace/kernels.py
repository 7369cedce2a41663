"""Kernels: the per-example sums of a linear layer in one pass on a GPU (Triton).

PyTorch must write every block of per-example gradients to memory before it can take |g|; here the gradient of
an example stays in registers, and only the sums are written. The plain twin that runs anywhere, and that the
tests compare with, is `blocks.add_blocks`.

This module knows neither rules, models nor losses. Triton is imported at the first call, so the package works
without it; the kernel below is a plain function until then.

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
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MEASURES = ("sum", "abs", "square")
PRECISIONS = ("ieee", "tf32x3", "tf32", "bf16x6", "bf16x3")

# (BLOCK_R, BLOCK_K, BLOCK_T, warps, stages). Larger tiles spill registers: sm_90 gives 16 warps 128 a thread, all of
# which the product and one sum of a 128 x 256 tile take.
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
INTERPRETED = (16, 32, 16, 4, 1)  # smallest that tl.dot takes: a test's few numbers fill several blocks
REGISTERS = 168  # per thread, for product and sums: 255 less what addresses and operands need
SHARED = 220 * 1024  # bytes of shared memory a program may have on H100 and H200, less some for the compiler
LONGEST = 128  # positions; a longer example needs no tiling of its own

tl: Any = None  # triton.language, once the kernel is built: a kernel finds names only among its module's globals


def available(tensor: Tensor) -> bool:
    """Whether `per_example_sums` takes factors like this: its dtype, and a GPU with Triton or its interpreter."""
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

    With the input a [B, T, I] and the output's gradient e = ∂Σℓ/∂y [B, T, O] of y = a Wᵀ, this is the
    per-example gradient ∂ℓ_b/∂W = Σ_t e_btᵀ a_bt (Goodfellow, arXiv 1510.01799, equation 3, with positions):
    left = e and right = a; of y = a W (GPT-2's Conv1D), left = a and right = e. The unit is one example: f is
    taken of its whole gradient, over all of its positions. |θ·g| needs no own measure: it is |θ|·|g|.

    Half-precision factors are multiplied as they are: a product of two bfloat16 (float16) numbers is exact in
    float32, in which all sums are kept. So pass what the model computed in its own dtype: casting it to float32
    first gives the same numbers many times slower. Float32 factors are multiplied as `precision` says.

    A sum's order is fixed (no atomics): the same call on the same device gives the same bits. Where the tiling
    is tuned again (another machine or cache), last bits may differ.

    Args:
        left: [B, T, R], bfloat16, float16 or float32, any strides.
        right: [B, T, K], of the same dtype and device.
        sums: of "sum" Σ G, "abs" Σ |G| and "square" Σ G², those wanted: float32 [R, K], equal strides. Added to
            in place.
        examples: which b.
        lengths: int32 [B]: how many leading positions of each example count; the rest is not read. None: all T.
        scale: float32 [B]: what G_b is multiplied by before f. None: nothing.
        precision: how float32 factors are multiplied, as Triton's `input_precision`: "ieee" (exact float32, no
            tensor cores), "tf32x3" (three tensor core products, nearly float32), or coarser.

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
    grid = lambda meta: (cdiv(rows, meta["BLOCK_R"]) * cdiv(columns, meta["BLOCK_K"]),)
    # Triton launches on the current device, which need not be the tensors'.
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
    # Programs that run at the same time take GROUP rows of tiles, column by column: both factors stay in L2.
    tile = tl.program_id(0)
    high = tl.cdiv(rows, BLOCK_R)
    wide = tl.cdiv(columns, BLOCK_K)
    group = tile // (GROUP * wide)
    height = tl.minimum(high - group * GROUP, GROUP)
    inside = tile - group * GROUP * wide
    r = (group * GROUP + inside % height) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = (inside // height) * BLOCK_K + tl.arange(0, BLOCK_K)

    # Beyond the edge the tile wraps around: loads need no mask there, and only the store must know.
    t = tl.arange(0, BLOCK_T)
    left_place = (r % rows)[:, None] * left_r + t[None, :] * left_t
    right_place = t[:, None] * right_t + (k % columns)[None, :] * right_k
    if SUM:
        sum_tile = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    if ABS:
        abs_tile = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    if SQUARE:
        square_tile = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    for n in range(count):
        b = (first + n * step).to(tl.int64)  # B·T·R may pass 2³¹
        length = positions
        if lengths is not None:
            length = tl.minimum(tl.load(lengths + b), positions)
        left_at = left + b * left_b
        right_at = right + b * right_b
        product = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
        # A loop of one constant step is none: the compiler then overlaps this example with the next one's loads.
        end = BLOCK_T if SINGLE else length
        for start in range(0, end, BLOCK_T):
            present = t < length - start
            x = tl.load(left_at + left_place, mask=present[None, :], other=0.0)
            y = tl.load(right_at + right_place, mask=present[:, None], other=0.0)
            if WIDEN:  # the interpreter's dot knows no bfloat16
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

    place = r.to(tl.int64)[:, None] * out_r + k.to(tl.int64)[None, :] * out_k
    known = (r < rows)[:, None] & (k < columns)[None, :]
    if SUM:
        tl.store(summed + place, tl.load(summed + place, mask=known) + sum_tile, mask=known)
    if ABS:
        tl.store(absolute + place, tl.load(absolute + place, mask=known) + abs_tile, mask=known)
    if SQUARE:
        tl.store(squared + place, tl.load(squared + place, mask=known) + square_tile, mask=known)


@functools.cache
def _kernel() -> tuple[Any, Any]:
    """`_tiles`, compiled when called and tuned per shape, and Triton's cdiv."""
    global tl
    triton = importlib.import_module("triton")
    tl = importlib.import_module("triton.language")
    # Specialised only on what changes the code (strides, divisibility of R and K), not on each batch's numbers.
    varying = ["first", "step", "count", "positions", "tuned_length"]
    kernel = triton.jit(_tiles, do_not_specialize=varying)
    kernel = triton.heuristics({"SINGLE": lambda args: args["positions"] <= args["BLOCK_T"]})(kernel)
    sums = _Sums()
    # Kept on disk, where this Triton can: otherwise every process measures every shape again.
    kept = {"cache_results": True} if "cache_results" in inspect.signature(triton.autotune).parameters else {}
    tuned = triton.autotune(
        configs=[
            triton.Config({"BLOCK_R": r, "BLOCK_K": k, "BLOCK_T": t, "GROUP": 8}, num_warps=warps, num_stages=stages)
            for r, k, t, warps, stages in ((INTERPRETED,) if _interpreting() else TILINGS)
        ],
        key=["rows", "columns", "tuned_length", "SUM", "ABS", "SQUARE", "PRECISION"],
        pre_hook=sums.keep,
        post_hook=sums.put_back,
        prune_configs_by={"early_config_prune": _promising},
        **kept,
    )
    return tuned(kernel), triton.cdiv


class _Sums:
    """Keeps the sums during a trial of a tiling, which adds to them too.

    Triton's own `restore_value` does this, but it fails on a sum that is not wanted, which is None.
    """

    names = ("summed", "absolute", "squared")  # among the kernel's arguments

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def keep(self, arguments: dict[str, Any], reset_only: bool = False) -> None:
        """Before a trial, or with `reset_only` after the last."""
        if not reset_only:
            self._kept = {name: arguments[name].clone() for name in self.names if arguments[name] is not None}

    def put_back(self, arguments: dict[str, Any], exception: Exception | None = None) -> None:
        for name, before in self._kept.items():
            arguments[name].copy_(before)
        self._kept = {}


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _promising(configs: list[Any], arguments: dict[str, Any], **constants: Any) -> list[Any]:
    """The tilings that are worth a trial: whose numbers fit registers and shared memory, and that waste no dots."""
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
    """The factor itself where 32-bit offsets reach over one block of it, else a contiguous copy."""
    reach = (factor.shape[2] - 1) * factor.stride(2) + LONGEST * factor.stride(1)
    return factor if reach < 2**31 else factor.contiguous()


def _tuned_length(positions: int) -> int:
    """T rounded up to a power of two: lengths differ in every batch, and each new one would be tuned for."""
    return min(LONGEST, max(16, 1 << (positions - 1).bit_length()))


def _interpreting() -> bool:
    """Whether Triton runs kernels in Python, on any device; it reads this once, when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
