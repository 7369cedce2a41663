"""The kernel for the CPU: the per-example sums of a linear layer in one pass, compiled on first use.

It is the twin of the Triton kernel in `kernels`. PyTorch has to write every block of per-example gradients to memory
before it can take |g|. In `cpu_kernel.cpp` the gradient of an example stays in registers, and only the sums are
written.

The source needs the standard headers alone, so a C++ compiler makes a library of it in seconds. That is done once per
machine and version: the library is kept in the user's cache. (`torch.utils.cpp_extension.load` would need ninja on the
path, and waits for ever on the lock of a process that was killed.) If there is no compiler, or the environment variable
CROSSTRACE_CPU_KERNEL is "off", `takes` is false, and PyTorch computes the same sums (`blocks.add_blocks`).

This module knows neither rules, models nor losses.

Shapes: B examples, T positions, R rows and K columns of the parameter.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("cpu_kernel.cpp")
SWITCH = "CROSSTRACE_CPU_KERNEL"
KINDS = ("sum", "abs", "square", "weighted")
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
FLAGS = ("-std=c++17", "-O3", "-fPIC")
# Tried in order. With OpenMP the kernel shares torch's threads: the library is not linked with a runtime of its own,
# but finds the one that torch has loaded. (Clang's code needs another runtime than GCC's, which torch may not have.)
OPTIONAL_FLAGS = (("-march=native", "-fopenmp"), ("-march=native",), ("-fopenmp",), ())
_LINK = ("-shared", "-undefined", "dynamic_lookup") if sys.platform == "darwin" else ("-shared",)
LONGEST = 300  # seconds that a compiler may take


def takes(left: Tensor, right: Tensor, sums: Mapping[str, Tensor]) -> bool:
    """Whether `per_example_sums` takes such factors and sums: by their dtypes, on the CPU, if there is a library."""
    return (
        all(x.device.type == "cpu" and x.dtype in DTYPES for x in (left, right))
        and all(x.device.type == "cpu" and x.dtype == torch.float32 and x.stride(-1) == 1 for x in sums.values())
        and len({x.stride(0) for x in sums.values()}) == 1
        and _library() is not None
    )


def per_example_sums(
    left: Tensor,
    right: Tensor,
    sums: Mapping[str, Tensor],
    examples: Sequence[int] | Tensor,
    scale: Tensor | None = None,
    weights: Tensor | None = None,
    *,
    left_is_gradient: bool = True,
) -> None:
    """Add Σ_b f(s_b G_b) to `sums`, where G_b = Σ_t left[b, t]ᵀ right[b, t] is example b's gradient of a linear layer.

    For the formula see `kernels.per_example_sums`. Products of bfloat16 factors are exact, whether the processor
    multiplies them (AVX-512 BF16) or they are widened first. All sums are kept in float32. Positions at which the
    output's gradient is zero are not multiplied. The order of a sum does not depend on the number of threads: the same
    call on the same machine gives the same bits.

    Args:
        left: [B, T, R], float32 or bfloat16.
        right: [B, T, K], float32 or bfloat16.
        sums: those that are wanted of "sum" Σ s G, "abs" Σ |s G|, "square" Σ (s G)² and "weighted" Σ w s G: float32
            [R, K] with dense rows, of equal strides. They are added to in place.
        examples: which b, in the order in which they are added.
        scale: s of each of these examples; None: 1.
        weights: w of each of these examples; for "weighted" alone.
        left_is_gradient: `left` is the output's gradient; if false, `right` is.

    Raises:
        ValueError: the factors or sums are not such that it `takes` them, or they do not fit together.
        MemoryError: there is no memory for packed factors; the sums may be incomplete.
    """
    if not takes(left, right, sums):
        raise ValueError("the kernel for the CPU takes float32 and bfloat16 factors and float32 sums with dense rows")
    shape = (left.shape[-1], right.shape[-1])
    if left.dim() != 3 or right.dim() != 3 or left.shape[:2] != right.shape[:2]:
        raise ValueError(f"the factors have shapes {list(left.shape)} and {list(right.shape)}; expected [B, T, R|K]")
    unknown = [name for name in sums if name not in KINDS]
    if unknown or any(total.shape != shape for total in sums.values()):
        raise ValueError(f"the sums are {sorted(sums)}; expected some of {', '.join(KINDS)}, each {list(shape)}")
    if ("weighted" in sums) != (weights is not None):
        raise ValueError("the weighted sum and the weights belong together")
    rows = torch.as_tensor(examples, dtype=torch.int64).contiguous()
    if not sums or not len(rows) or left.numel() == 0 or right.numel() == 0:
        return
    if int(rows.min()) < 0 or int(rows.max()) >= len(left):
        raise ValueError(f"examples are from {int(rows.min())} to {int(rows.max())}; there are {len(left)}")
    per_example = []
    for values in (scale, weights):
        values = None if values is None else values.to(torch.float32).contiguous()
        if values is not None and values.shape != rows.shape:
            raise ValueError(f"scale and weights have shape {list(values.shape)}; expected {list(rows.shape)}")
        per_example.append(values)
    left, right = (x.detach() if x.stride(-1) == 1 else x.detach().contiguous() for x in (left, right))
    library = _library()
    assert library is not None
    failed = library.crosstrace_per_example_sums(
        *_factor(left),
        *_factor(right),
        _address(rows),
        *map(_address, per_example),
        ctypes.c_int64(len(rows)),
        ctypes.c_int64(left.shape[1]),
        *map(ctypes.c_int64, shape),
        int(left_is_gradient),
        torch.get_num_threads(),
        *(_address(sums.get(name)) for name in KINDS),
        ctypes.c_int64(next(iter(sums.values())).stride(0)),
    )
    if failed:
        raise MemoryError("no memory for the packed factors of a layer's per-example gradients")


def _factor(x: Tensor) -> tuple[object, ...]:
    """A factor as the library gets it: address, number of its dtype, strides of examples and positions."""
    return _address(x), DTYPES[x.dtype], ctypes.c_int64(x.stride(0)), ctypes.c_int64(x.stride(1))


def _address(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


# ---- the library


def _library() -> ctypes.CDLL | None:
    """The compiled library; None if it is switched off or can't be compiled."""
    return None if os.environ.get(SWITCH, "").lower() in ("off", "0", "no", "false") else _compiled()


@functools.cache
def _compiled() -> ctypes.CDLL | None:
    if sys.platform == "win32":
        return None
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    for flags in OPTIONAL_FLAGS:
        with suppress(OSError, subprocess.SubprocessError):
            return ctypes.CDLL(str(_build(compiler, flags)))
    return None


def _build(compiler: Sequence[str], optional_flags: Sequence[str]) -> Path:
    """The library's path. The library is compiled unless it is in the cache.

    Its name has a hash of all that it depends on: the source, the flags, and the compiler's macros for this processor.

    Raises:
        OSError, subprocess.SubprocessError: there is no compiler, or it fails.
    """
    flags = (*FLAGS, *optional_flags)
    defined = subprocess.run(
        [*compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull],
        capture_output=True,
        check=True,
        timeout=LONGEST,
    ).stdout
    key = hashlib.sha256(b"\0".join([SOURCE.read_bytes(), " ".join(flags).encode(), defined])).hexdigest()
    library = _cache() / f"cpu_kernel-{key[:20]}.so"
    with _locked(library.with_suffix(".lock")):
        if not library.exists():
            with tempfile.TemporaryDirectory(dir=library.parent) as folder:
                compiled, linked = Path(folder) / "cpu_kernel.o", Path(folder) / library.name
                steps = (
                    [*flags, "-c", str(SOURCE), "-o", str(compiled)],
                    [*_LINK, str(compiled), "-o", str(linked)],  # without -fopenmp: no runtime of its own
                )
                for step in steps:
                    subprocess.run([*compiler, *step], capture_output=True, check=True, timeout=LONGEST)
                ctypes.CDLL(str(linked))  # only what loads is kept
                os.replace(linked, library)
    return library


def _cache() -> Path:
    """The folder for compiled libraries. Only its user can write to it."""
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(root).expanduser() / "crosstrace"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
        if os.access(folder, os.W_OK) and status.st_uid == os.getuid() and not status.st_mode & 0o022:
            return folder
    except (OSError, RuntimeError):  # no home, or one that can't be written to
        pass
    return _cache_of_process()


@functools.cache
def _cache_of_process() -> Path:
    """A folder for this process alone, removed at its end."""
    folder = tempfile.TemporaryDirectory(prefix="crosstrace-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


@contextmanager
def _locked(lock: Path) -> Iterator[None]:
    """Within the context, no other process holds the lock. A process that is killed releases it."""
    import fcntl

    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
