"""The kernels, that for the CPU and the Triton one, against a plain sum in float64.

The tests of the Triton kernel's logic run in Triton's interpreter, which needs no GPU but must be switched on before
Triton is imported: one test runs this file again in a process where it is on. The CPU's kernel is compiled for this
processor and for lesser ones.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from test_trace import make_examples, pad
from test_training import calm, taught, with_tasks
from tiny_models import tiny_model
from torch import Tensor

from crosstrace.trace import Trace, TrainingTrace, blocks, cpu_kernel, kernels, rules, trace
from crosstrace.trace.calls import Arrangement

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter's process")
gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(
    INTERPRETED or not torch.cuda.is_available() or importlib.util.find_spec("triton") is None,
    reason="needs a CUDA device and triton",
)
ALL = kernels.MEASURES
SUBSETS = [names for n in (1, 2, 3) for names in itertools.combinations(ALL, n)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FOLDS: dict[str, Callable[[Tensor], Tensor]] = {"sum": lambda g: g, "abs": torch.abs, "square": torch.square}


def factors(b: int, t: int, r: int, k: int, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    return tuple(torch.randn(b, t, n).to(device, dtype) for n in (r, k))


def zeros(left: Tensor, right: Tensor, names=ALL) -> dict[str, Tensor]:
    return {name: torch.zeros(left.shape[2], right.shape[2], device=left.device) for name in names}


def expected(left: Tensor, right: Tensor, examples: slice, lengths: Tensor | None = None) -> dict[str, Tensor]:
    """One example after the other, in float64."""
    sums = {name: torch.zeros(left.shape[2], right.shape[2], dtype=torch.float64, device=left.device) for name in ALL}
    for b in range(len(left))[examples]:
        stop = left.shape[1] if lengths is None else int(lengths[b])
        g = torch.einsum("tr,tk->rk", left[b, :stop].double(), right[b, :stop].double())
        for name, fold in FOLDS.items():
            sums[name] += fold(g)
    return sums


def tiling(rows: int, columns: int, positions: int, warps: int, stages: int):
    import triton

    kwargs = {"BLOCK_R": rows, "BLOCK_K": columns, "BLOCK_T": positions, "GROUP": 8}
    return triton.Config(kwargs, num_warps=warps, num_stages=stages)


def linear_rule(left: Tensor, right: Tensor) -> rules.Linear:
    linear = rules.Linear.__new__(rules.Linear)
    linear.left, linear.right, linear.batch, linear.arrangement = left, right, len(left), Arrangement()
    linear.on_gpu = False
    return linear


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 3e-6) -> None:
    """To float32's rounding whatever the factors' dtype: products of half-precision numbers are exact."""
    assert got
    for name, value in got.items():
        scale = float(want[name].abs().max())
        assert float((value.double() - want[name]).abs().max()) <= tolerance * max(scale, 1e-30), name


def assert_same_traces(some: list[Trace], others: list[Trace]) -> None:
    for a, b in zip(some, others, strict=True):
        for name, value in a.values.items():
            scale = float(b.values[name].abs().max())
            assert float((value - b.values[name]).abs().max()) <= 1e-5 * max(scale, 1e-20), name


@pytest.mark.skipif(INTERPRETED, reason="is the one that starts the interpreter's process")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_the_kernel_in_the_interpreter():
    arguments = ["-p", "no:cacheprovider", "-p", "no:xdist", "-k", "interpreter_", "-rs", "-x", __file__]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-m", "pytest", *arguments], env=environment, capture_output=True, text=True)
    if "only 0-dimensional arrays can be converted to Python scalars" in done.stdout:
        pytest.skip("the interpreter of this Triton fails with this NumPy (Triton 3.6 with NumPy 2.4)")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout and "skipped" not in done.stdout, done.stdout


# ---- in the interpreter's process: blocks of 16 rows, 32 columns and 16 positions


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes",
    [(3, 5, 17, 33), (3, 1, 17, 33), (1, 16, 16, 32), (2, 17, 5, 7), (2, 40, 50, 70), (2, 3, 1, 1), (1, 2, 145, 33)],
)
def test_interpreter_equals_the_plain_sum(sizes, dtype):
    left, right = factors(*sizes, dtype)
    sums = zeros(left, right)
    assert kernels.available(left)
    kernels.per_example_sums(left, right, sums, slice(None))
    assert_close(sums, expected(left, right, slice(None)))


@interpreted
@pytest.mark.parametrize("names", SUBSETS)
def test_interpreter_any_subset_of_the_sums(names):
    left, right = factors(3, 5, 17, 33)
    sums = zeros(left, right, names)
    kernels.per_example_sums(left, right, sums, slice(None))
    assert tuple(sums) == names
    assert_close(sums, expected(left, right, slice(None)))


@interpreted
@pytest.mark.parametrize(
    "share", [slice(0, None, 2), slice(1, None, 2), slice(1, 4), slice(-1, None), slice(4, 0, -2), slice(5, None)]
)
def test_interpreter_a_share_of_the_batch(share):
    left, right = factors(5, 6, 17, 33)
    sums = zeros(left, right)
    kernels.per_example_sums(left, right, sums, share)
    assert_close(sums, expected(left, right, share))


@interpreted
@pytest.mark.parametrize("t", [9, 40])
@pytest.mark.parametrize("share", [slice(None), slice(1, None, 2)])
def test_interpreter_lengths_and_padding_that_is_not_read(t, share):
    left, right = factors(5, t, 17, 33, torch.bfloat16)
    lengths = torch.tensor([t, 1, 0, t // 2, t - 1], dtype=torch.int32)
    for b, length in enumerate(lengths.tolist()):
        left[b, length:], right[b, length:] = float("nan"), float("inf")
    sums = zeros(left, right)
    kernels.per_example_sums(left, right, sums, share, lengths)
    assert_close(sums, expected(left, right, share, lengths))


@interpreted
@pytest.mark.parametrize("share", [slice(None), slice(1, None, 2)])
def test_interpreter_examples_are_multiplied_before_the_sums(share):
    left, right = factors(5, 6, 17, 33)
    scale = torch.tensor([2.0, -3.0, 0.0, 0.5, 1e3])
    sums = zeros(left, right)
    kernels.per_example_sums(left, right, sums, share, scale=scale)
    assert_close(sums, expected(left * scale.view(-1, 1, 1), right, share))


@interpreted
def test_interpreter_lengths_beyond_the_factors_read_nothing_more():
    left, right = factors(2, 9, 17, 33)
    sums = zeros(left, right)
    padded_left, padded_right = (torch.nn.functional.pad(x, (0, 0, 0, 9), value=float("nan")) for x in (left, right))
    lengths = torch.tensor([9, 18], dtype=torch.int32)
    kernels.per_example_sums(padded_left[:, :9], padded_right[:, :9], sums, slice(None), lengths)
    assert_close(sums, expected(left, right, slice(None)))


@interpreted
@pytest.mark.parametrize("t", [5, 40])
def test_interpreter_strides(t):
    left, right = torch.randn(17, t, 3).permute(2, 1, 0), torch.randn(6, 2 * t, 70)[::2, ::2, 3:69:2]
    assert not left.is_contiguous() and not right.is_contiguous()
    sums = {name: torch.zeros(33, 17).t() for name in ALL}
    kernels.per_example_sums(left, right, sums, slice(None))
    assert_close(sums, expected(left, right, slice(None)))


@interpreted
@pytest.mark.parametrize("names", [("abs",), ("sum", "abs"), ALL])
def test_interpreter_trials_of_tilings_leave_nothing_in_the_sums(names, monkeypatch):
    """As on a GPU, where several tilings are tried on the caller's own sums."""
    left, right = factors(3, 5, 17, 33)
    kernel, _ = kernels._kernel()
    tried = []
    monkeypatch.setattr(kernel, "configs", [tiling(16, 32, 16, 4, 1), tiling(32, 32, 16, 4, 1)])

    def timed(call: Callable[[], None], quantiles: tuple[float, ...]) -> list[float]:
        tried.append(call())
        return [float(len(tried))] * len(quantiles)

    monkeypatch.setitem(vars(kernel), "do_bench", timed)  # Triton's own asks the GPU's driver
    sums = {name: torch.ones_like(x) for name, x in zeros(left, right, names).items()}
    kernels.per_example_sums(left, right, sums, slice(None))
    assert len(tried) == 2
    assert_close(sums, {name: x + 1 for name, x in expected(left, right, slice(None)).items()})


@interpreted
def test_interpreter_adds_to_part_of_a_larger_tensor_and_nothing_beside():
    left, right = factors(3, 5, 17, 33)
    whole = {name: torch.full((20, 40), 7.0) for name in ALL}
    kernels.per_example_sums(left, right, {name: x[2:19, 3:36] for name, x in whole.items()}, slice(None))
    for name, want in expected(left, right, slice(None)).items():
        assert_close({name: whole[name][2:19, 3:36]}, {name: want + 7})
        whole[name][2:19, 3:36] = 7.0
        assert bool((whole[name] == 7).all()), name


@interpreted
def test_interpreter_shares_add_up_and_calls_repeat_bit_for_bit():
    left, right = factors(5, 20, 17, 33, torch.bfloat16)
    runs = []
    for _ in range(2):
        sums = zeros(left, right)
        for first in range(2):
            kernels.per_example_sums(left, right, sums, slice(first, None, 2))
        runs.append(sums)
    assert_close(runs[0], expected(left, right, slice(None)))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in ALL)


@interpreted
def test_interpreter_agrees_with_the_plain_twin():
    left, right = factors(5, 6, 17, 33)
    linear = linear_rule(left, right)
    got, want = zeros(left, right), zeros(left, right)
    kernels.per_example_sums(left, right, got, slice(None, None, 2))
    blocks.add_blocks([linear], want, slice(None, None, 2), len(left))
    assert_close(got, {name: x.double() for name, x in want.items()})


@interpreted
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interpreter_serves_the_engine(dtype, tied, monkeypatch):
    """A whole model's trace with the kernel and without; in parts, so that shares are taken."""
    model = tiny_model("gpt_neox", dtype, tied=tied, vocab_size=300)
    called, rows = [], set()
    inner = kernels.per_example_sums

    def noted(left, right, *rest, **options):
        called.append(left.dtype)
        rows.add(left.shape[-1])
        inner(left, right, *rest, **options)

    monkeypatch.setattr(kernels, "per_example_sums", noted)
    data = [pad(make_examples(4))]
    with_kernel = trace(model, data, task="qa", measures=("abs", "square"), parts=2)
    assert set(called) == {dtype} and 300 in rows
    monkeypatch.setattr(kernels, "available", lambda tensor: False)
    called.clear()
    without = trace(model, data, task="qa", measures=("abs", "square"), parts=2)
    assert not called
    assert_same_traces(with_kernel, without)


@interpreted
@pytest.mark.parametrize("tied", [False, True])
def test_interpreter_serves_a_trainings_own_backward(tied, monkeypatch):
    """Whose gradients are those of a mean: each example's is multiplied in the kernel."""
    scaled = []
    inner = kernels.per_example_sums

    def noted(*arguments, scale=None, **options):
        scaled.append(scale is not None)
        inner(*arguments, scale=scale, **options)

    monkeypatch.setattr(kernels, "per_example_sums", noted)
    monkeypatch.setattr(cpu_kernel, "_library", lambda: None)
    examples = with_tasks(make_examples(6))
    found = []
    for with_kernel in (True, False):
        if not with_kernel:
            monkeypatch.setattr(kernels, "available", lambda tensor: False)
        model = calm(tiny_model("llama", torch.float32, tied=tied, vocab_size=300))
        with TrainingTrace(model, ["bio", "qa"], ("abs", "net")) as tracing:
            taught(model, [examples], tracing)
            found.append(tracing.traces())
        assert any(scaled) == with_kernel
        scaled.clear()
    assert_same_traces(*found)


@interpreted
def test_interpreter_nothing_to_add():
    sums = zeros(*factors(2, 3, 4, 5))
    kernels.per_example_sums(*factors(2, 3, 4, 5), {}, slice(None))
    kernels.per_example_sums(*factors(2, 0, 4, 5), sums, slice(None))
    kernels.per_example_sums(*factors(2, 3, 4, 5), sums, slice(2, 2))
    assert not any(bool(x.any()) for x in sums.values())


# ---- on the CPU: tiles of 4 rows and of 48, 24 or 12 columns, by the processor


def avx2() -> bool:
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


FLAGS = {
    "native": cpu_kernel.OPTIONAL_FLAGS[0],
    "one thread": cpu_kernel.OPTIONAL_FLAGS[1],
    "avx2": ("-mavx2", "-mfma", "-fopenmp"),
    "any": ("-fopenmp",),
}


@pytest.fixture(params=list(FLAGS))
def compiled(request, monkeypatch) -> ctypes.CDLL:
    """The kernel compiled for this processor and for others that it can play."""
    if INTERPRETED or cpu_kernel._library() is None:
        pytest.skip("needs a C++ compiler")
    if request.param == "avx2" and not avx2():
        pytest.skip("needs AVX2")
    library = ctypes.CDLL(str(cpu_kernel._build(["c++"], FLAGS[request.param])))
    monkeypatch.setattr(cpu_kernel, "_library", lambda: library)
    return library


HALVES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32),
          (torch.float32, torch.bfloat16)]  # fmt: skip


@pytest.mark.parametrize("dtypes", HALVES)
@pytest.mark.parametrize(
    "sizes",
    [(3, 5, 17, 33), (3, 1, 17, 33), (1, 16, 16, 32), (2, 17, 5, 7), (2, 40, 50, 70), (2, 3, 1, 1), (3, 2, 300, 49),
     (60, 90, 6, 50), (2, 1700, 9, 20), (2, 3, 9000, 17)],
)  # fmt: skip
def test_cpu_equals_the_plain_sum(compiled, sizes, dtypes):
    left, right = (x.to(dtype) for x, dtype in zip(factors(*sizes), dtypes, strict=True))
    sums = zeros(left, right)
    assert cpu_kernel.takes(left, right, sums)
    cpu_kernel.per_example_sums(left, right, sums, range(len(left)))
    assert_close(sums, expected(left, right, slice(None)), 1e-5 if torch.bfloat16 in dtypes else 3e-6)


@pytest.mark.parametrize("names", SUBSETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_any_subset_of_the_sums_with_scales_and_weights(compiled, names, dtype):
    left, right = factors(6, 5, 17, 60, dtype)
    examples, scale, weights = [4, 0, 2, 5], torch.tensor([-2.0, 0.0, 1.5, 3.0]), torch.tensor([1.0, 2.0, -0.5, 4.0])
    scaled = left.double()[examples] * scale.view(-1, 1, 1)
    want = expected(scaled, right[examples], slice(None))
    want["weighted"] = expected(scaled * weights.view(-1, 1, 1), right[examples], slice(None))["sum"]
    sums = zeros(left, right, (*names, "weighted"))
    cpu_kernel.per_example_sums(left, right, sums, examples, scale, weights)
    assert_close(sums, want, 1e-5)


@pytest.mark.parametrize("left_is_gradient", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_positions_without_gradient_are_not_read(compiled, dtype, left_is_gradient):
    left, right = factors(5, 9, 17, 33, dtype)
    e, a = (left, right) if left_is_gradient else (right, left)
    for b, t in [(0, 0), (1, 3), (1, 4), (1, 8), *((2, t) for t in range(9))]:
        e[b, t], a[b, t] = 0.0, 0.0
    e[3, :8] = 0.0
    e[3, :8, -1] = 1e-3  # the last column alone
    want = expected(left, right, slice(None))
    a[1, 3], a[2] = float("nan"), float("inf")
    sums = zeros(left, right)
    cpu_kernel.per_example_sums(left, right, sums, range(5), left_is_gradient=left_is_gradient)
    assert_close(sums, want, 1e-5)


def test_cpu_strides_and_part_of_a_larger_tensor(compiled):
    left, right = torch.randn(17, 5, 3).permute(2, 1, 0), torch.randn(6, 10, 70)[::2, ::2, 3:36]
    whole = {name: torch.full((20, 40), 7.0) for name in ALL}
    part = {name: x[2:19, 3:36] for name, x in whole.items()}
    cpu_kernel.per_example_sums(left, right, part, torch.tensor([2, 0]))
    for name, want in expected(left, right, slice(2, None, -2)).items():
        assert_close({name: part[name]}, {name: want + 7})
        part[name].fill_(7.0)
        assert bool((whole[name] == 7).all()), name


def test_cpu_threads_change_no_bit(compiled, monkeypatch):
    left, right = factors(20, 90, 600, 100)
    runs = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        runs.append(zeros(left, right))
        cpu_kernel.per_example_sums(left, right, runs[-1], range(20))
    assert all(torch.equal(runs[0][name], other[name]) for other in runs[1:] for name in ALL)


def test_cpu_nothing_to_add_and_what_is_wrong_is_named(compiled):
    left, right = factors(2, 3, 4, 5)
    sums = zeros(left, right)
    cpu_kernel.per_example_sums(left, right, sums, [])
    cpu_kernel.per_example_sums(left[:, :0], right[:, :0], sums, [0])
    assert not any(bool(x.any()) for x in sums.values())
    assert not cpu_kernel.takes(left.double(), right, sums)
    assert not cpu_kernel.takes(left.half(), right, sums)
    assert not cpu_kernel.takes(left, right, {"abs": torch.zeros(5, 4).t()})
    assert not cpu_kernel.takes(left, right, {"abs": torch.zeros(4, 5), "sum": torch.zeros(4, 9)[:, :5]})
    call = cpu_kernel.per_example_sums
    with pytest.raises(ValueError, match="float32 and bfloat16"):
        call(left.double(), right, sums, [0])
    with pytest.raises(ValueError, match=r"\[2, 3, 4\] and \[2, 2, 5\]"):
        call(left, right[:, :2], sums, [0])
    with pytest.raises(ValueError, match=r"expected some of .* \[4, 5\]"):
        call(left, right, {"net": torch.zeros(4, 5)}, [0])
    with pytest.raises(ValueError, match="from 0 to 2; there are 2"):
        call(left, right, sums, [0, 2])
    with pytest.raises(ValueError, match=r"shape \[1\]; expected \[2\]"):
        call(left, right, sums, [0, 1], torch.ones(1))
    with pytest.raises(ValueError, match="belong together"):
        call(left, right, sums, [0], weights=torch.ones(1))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_serves_the_engine(compiled, dtype, tied, monkeypatch):
    """A whole model's trace with the kernel and without; in parts, so that shares are taken."""
    model = tiny_model("llama", dtype, tied=tied, vocab_size=2000)
    called = []
    inner = cpu_kernel.per_example_sums
    monkeypatch.setattr(cpu_kernel, "per_example_sums", lambda *a, **k: (called.append(a[0].shape[-1]), inner(*a, **k)))
    data = [pad(make_examples(4))]
    with_kernel = trace(model, data, task="qa", measures=("abs", "square"), parts=2)
    assert 2000 in called and 24 in called
    monkeypatch.setenv(cpu_kernel.SWITCH, "off")
    monkeypatch.setattr(cpu_kernel, "_library", lambda: None)
    called.clear()
    without = trace(model, data, task="qa", measures=("abs", "square"), parts=2)
    assert not called
    assert_same_traces(with_kernel, without)


@pytest.mark.long
@pytest.mark.parametrize("reason", ["switched off", "no compiler", "compiler fails", "no cache"])
def test_cpu_without_a_library_pytorch_computes(reason, monkeypatch, tmp_path):
    cpu_kernel._compiled.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if reason == "switched off":
        monkeypatch.setenv(cpu_kernel.SWITCH, "off")
    elif reason == "no cache":
        (tmp_path / "cache").write_text("a file")
    else:
        monkeypatch.setenv("CXX", str(tmp_path / "none") if reason == "no compiler" else "false")
    left, right = factors(2, 3, 4, 5)
    there = cpu_kernel.takes(left, right, zeros(left, right))
    cpu_kernel._compiled.cache_clear()
    assert there == (reason == "no cache" and shutil.which("c++") is not None and not INTERPRETED)
    sums = zeros(left, right)
    linear_rule(left, right).reduce(sums, slice(None))
    assert_close(sums, expected(left, right, slice(None)))


def test_a_library_is_compiled_once_and_one_that_fails_is_not_kept(monkeypatch, tmp_path):
    if cpu_kernel._library() is None:
        pytest.skip("needs a C++ compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    way = ()
    first = cpu_kernel._build(["c++"], way)
    made = first.stat().st_mtime_ns
    assert cpu_kernel._build(["c++"], way) == first and first.stat().st_mtime_ns == made
    assert oct(first.parent.stat().st_mode & 0o777) == "0o700"
    broken = tmp_path / "source.cpp"
    broken.write_text("int main( {")
    monkeypatch.setattr(cpu_kernel, "SOURCE", broken)
    with pytest.raises(subprocess.CalledProcessError):
        cpu_kernel._build(["c++"], way)
    assert sorted(path.suffix for path in first.parent.iterdir()) == [".lock", ".lock", ".so"]


# ---- without the kernel


def test_available_says_no_to_what_it_cannot_take():
    assert not kernels.available(torch.zeros(1, dtype=torch.float64))
    assert kernels.available(torch.zeros(1)) == INTERPRETED


def test_what_is_wrong_is_named():
    left, right = factors(2, 3, 4, 5)

    def call(left=left, right=right, sums=None, lengths=None, **more):
        sums = zeros(*factors(2, 3, 4, 5)) if sums is None else sums
        kernels.per_example_sums(left, right, sums, slice(None), lengths, **more)

    with pytest.raises(ValueError, match=r"\[2, 3, 4\] and \[2, 2, 5\]"):
        call(right=right[:, :2])
    with pytest.raises(ValueError, match="float64"):
        call(left.double(), right.double())
    with pytest.raises(ValueError, match="bfloat16"):
        call(left.bfloat16())
    with pytest.raises(ValueError, match="unknown sum 'net'"):
        call(sums={"net": torch.zeros(4, 5)})
    with pytest.raises(ValueError, match=r"expected torch.float32 \[4, 5\]"):
        call(sums={"abs": torch.zeros(5, 4)})
    with pytest.raises(ValueError, match="strides"):
        call(sums={"abs": torch.zeros(4, 5), "sum": torch.zeros(5, 4).t()})
    with pytest.raises(ValueError, match=r"lengths are torch.int64 \[2\]"):
        call(lengths=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"scale are torch.float32 \[3\]"):
        kernels.per_example_sums(left, right, zeros(left, right), slice(None), scale=torch.ones(3))
    with pytest.raises(ValueError, match="precision 'fast'"):
        call(precision="fast")


def test_a_factor_is_copied_only_where_its_offsets_pass_32_bits():
    near = torch.zeros(2, 3, 4)
    far = torch.empty_strided((1, 3, 2), (1, 1, 2**31), device="meta")
    assert kernels._near(near) is near
    assert kernels._near(near.transpose(1, 2)).stride() == (12, 1, 4)
    assert kernels._near(far).stride() == (6, 2, 1)


def test_lengths_are_tuned_for_in_few_sizes():
    assert [kernels._tuned_length(t) for t in (1, 16, 17, 33, 64, 100, 5000)] == [16, 16, 32, 64, 64, 128, 128]


@pytest.mark.parametrize("names", SUBSETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_few_tilings_are_tried_that_fit_the_gpu(names, dtype):
    configs = [
        SimpleNamespace(kwargs={"BLOCK_R": r, "BLOCK_K": k, "BLOCK_T": t}, num_warps=warps, num_stages=stages)
        for r, k, t, warps, stages in kernels.TILINGS
    ]
    wanted = {name.upper(): name in names for name in ALL}
    for positions in (1, 20, 64, 300):
        arguments = {"left": torch.zeros(1, dtype=dtype), "tuned_length": kernels._tuned_length(positions)}
        tried = kernels._promising(configs, arguments, grid=None, warmup=False, **wanted)
        assert tried
        for config in tried:
            r, k, t = config.kwargs.values()
            # of 255 registers a thread, 65536 a multiprocessor; and of 227 KB of shared memory
            assert (1 + len(names)) * r * k <= 32 * config.num_warps * 168 and 32 * config.num_warps * 255 <= 65536
            assert config.num_stages * t * (r + k) * dtype.itemsize <= 227 * 1024
            assert t < 2 * max(16, positions)


# ---- on a GPU


@gpu
@needs_gpu
@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.bfloat16, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32x3")]
)
@pytest.mark.parametrize("names", [("abs",), ALL])
def test_gpu_equals_the_plain_sum(dtype, precision, names):
    left, right = factors(8, 64, 2048, 512, dtype, "cuda")
    want = expected(left, right, slice(None))
    runs = []
    for _ in range(2):  # the first call tunes, which must leave no trace in the sums
        sums = zeros(left, right, names)
        kernels.per_example_sums(left, right, sums, slice(None), precision=precision)
        runs.append(sums)
        assert_close(sums, want, 2e-5)
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in names)


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("t", "scaled"), [(1, False), (40, True), (150, False)])
def test_gpu_edges_lengths_shares_scales_and_strides(dtype, t, scaled):
    left, right = factors(5, t, 131, 77, dtype, "cuda")
    left, right = left[:, :, 1:], right.transpose(1, 2).contiguous().transpose(1, 2)
    lengths = torch.tensor([t, 1, 0, t // 2, t - 1], dtype=torch.int32, device="cuda")
    for b, length in enumerate(lengths.tolist()):
        left[b, length:], right[b, length:] = float("nan"), float("inf")
    sums = {name: torch.ones_like(x) for name, x in zeros(left, right).items()}
    scale = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.1], device="cuda") if scaled else None
    multiplied = left if scale is None else left.double() * scale.view(-1, 1, 1)
    want = expected(multiplied, right, slice(1, None, 2), lengths)
    kernels.per_example_sums(left, right, sums, slice(1, None, 2), lengths, scale=scale)
    assert_close(sums, {name: x + 1 for name, x in want.items()}, 2e-5)


@gpu
@needs_gpu
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_traces_as_the_cpu_does(dtype, tied):
    model = tiny_model("llama", dtype, tied=tied, vocab_size=300)
    data = [pad(make_examples(6))]
    (expected_trace,) = trace(model, data, task="qa")
    (got,) = trace(model.cuda(), data, task="qa")
    for name, value in got.values.items():
        scale = float(expected_trace.values[name].abs().max())
        tolerance = 1e-3 if dtype == torch.float32 else 0.1
        assert float((value - expected_trace.values[name]).abs().max()) <= tolerance * max(scale, 1e-20), name
