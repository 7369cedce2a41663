"""What only a GPU can tell: the kernel, what a trace costs, the plan's memory, and a training that is traced.

    benchmarks/gpu.sh                          # a GPU of 80 GB; 8 minutes at most
    benchmarks/gpu.sh --part kernel cost       # some of the parts
    benchmarks/gpu.sh --smoke                  # that all of it runs: tiny shapes on the CPU, two minutes at most

Each part is a process of its own and has its own seconds. A case that no longer fits is left out, and the file says so.
An error is noted with the case it belongs to, and the next case goes on; the exit status is then 1. The results are in
$OUT/gpu.json (benchmarks/results/gpu.json), which is written anew after each case.

The parts:
    machine   device, versions, and the rate of a large matrix product, in which other rates are given
    kernel    every tiling of the Triton kernel against float64, then the tuned kernel's speed
    cost      trace, loop (one example at a time) and plain forward and backward, of random weights in bfloat16
    memory    what `plan` says that stages hold on the GPU, beside what they held
    training  updates of the Trainer with the online trace and without it
    tests     the tests that are marked `gpu`, where pytest is there
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

Row = dict[str, Any]
HOME = Path(__file__).resolve().parent.parent
GRACE = 12  # seconds that a part may take longer than it has, until it is ended
LENGTHS = (1, 9, 16, 17, 64, 100, 256)  # of the kernel's checks
TOKENS = 4096  # of a batch in `cost` and in the kernel's speed
ALONE = 8  # examples of which the loop's time is measured


class NoCase(Exception):
    """A case can't be done here; the message says why."""


@dataclass
class Sheet:
    """The results of one part: written after every case, and the seconds that are left for more.

    Attributes:
        file: the JSON file, which holds other parts too.
        part: this part's name.
        end: when its seconds are over, by `time.time()`.
        smoke: whether the shapes are tiny and on the CPU.
    """

    file: Path
    part: str
    end: float
    smoke: bool

    def __post_init__(self) -> None:
        self.row: Row = {"cases": [], "left_out": [], "failed": []}
        self.write()

    @property
    def left(self) -> float:
        return self.end - time.time()

    def case(self, name: str, seconds: float, work: Callable[[], Row | None]) -> Row | None:
        """The result of a case, or None: fewer than so many seconds are left, it can't be done here, or it failed."""
        if self.left < seconds and not self.smoke:
            self.leave_out(name, f"{max(0, self.left):.0f} s were left, and it takes about {seconds:.0f} s")
            return None
        clock = time.perf_counter()
        try:
            found = work()
        except NoCase as why:
            return self.leave_out(name, str(why))
        except Exception as error:
            self.fail(name, error)
            return None
        finally:
            _freed()
        if found is not None:
            self.row["cases"].append({"case": name, "took": round(time.perf_counter() - clock, 2), **found})
            print(f"  {name}: {_told(found)}", flush=True)
            if found.get("wrong"):
                self.row["failed"].append({"case": name, "error": f"wrong: {found['wrong']}"})
        self.write()
        return found

    def leave_out(self, name: str, why: str) -> None:
        self.row["left_out"].append({"case": name, "why": why})
        print(f"  {name}: left out, {why}", flush=True)
        self.write()

    def fail(self, name: str, error: BaseException) -> None:
        """Note an error, with the last lines of its traceback."""
        lines = "".join(traceback.format_exception(error)).splitlines()
        self.row["failed"].append(
            {"case": name, "error": f"{type(error).__name__}: {error}"[:500], "traceback": lines[-24:]}
        )
        print(f"  {name}: FAILED, {type(error).__name__}: {str(error)[:300]}", flush=True)
        self.write()
        _check_device()

    def write(self) -> None:
        write_part(self.file, self.part, self.row)


def write_part(file: Path, part: str, row: Row) -> None:
    """Put a part's results in the place of those that the file has of it, atomically."""
    whole = json.loads(file.read_text()) if file.exists() else {}
    whole[part] = row
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(whole, indent=1, default=str) + "\n")
    partial.replace(file)


def _check_device() -> None:
    """Raise the GPU's error if it can compute nothing more in this process."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _freed() -> None:
    """Let go of what a case held."""
    gc.collect()
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _told(row: Row) -> str:
    """A case's numbers, short."""
    short = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}
    return ", ".join(
        f"{key} {value}" for key, value in short.items() if not isinstance(value, (dict, list)) and value is not None
    )


# ---------------------------------------------------------------------------------------------- measuring


def _device(smoke: bool) -> str:
    return "cpu" if smoke else "cuda"


def _wait(device: str) -> None:
    """Until the device has done all that it was given."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def _seconds(device: str, work: Callable[[], object]) -> float:
    _wait(device)
    clock = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - clock


@contextmanager
def _peak(device: str) -> Iterator[Row]:
    """Fills "peak" with the most bytes of tensors that the device held meanwhile, and "more" with those beyond what it
    held before. Nothing on a CPU."""
    import torch

    found: Row = {}
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    yield found
    if device == "cuda":
        torch.cuda.synchronize()
        found["peak"] = torch.cuda.max_memory_allocated()
        found["more"] = found["peak"] - before


def matmul_rate(device: str) -> float:
    """Operations a second of a large product in bfloat16."""
    import torch

    n = 8192 if device == "cuda" else 256
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = [_seconds(device, lambda: a @ b) for _ in range(15)]
    return 2 * n**3 / statistics.median(times[5:])


# ---------------------------------------------------------------------------------------------- parts


def machine(sheet: Sheet) -> None:
    import torch

    from crosstrace.core.provenance import metadata

    device = _device(sheet.smoke)

    def about() -> Row:
        found = metadata()
        found["git"] = found["git"] or os.environ.get("COMMIT")
        found["cuda"] = torch.version.cuda
        found["versions"]["triton"] = _triton_version()
        if device == "cuda":
            properties = torch.cuda.get_device_properties(0)
            found |= {
                "driver": _driver(), "capability": [properties.major, properties.minor],
                "bytes": properties.total_memory, "multiprocessors": properties.multi_processor_count,
            }  # fmt: skip
        return found

    sheet.case("about", 0, about)
    sheet.case("matrix product", 2, lambda: {"tflops": matmul_rate(device) / 1e12})


def _triton_version() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return None
    import triton

    return triton.__version__


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


# dtype, and how float32 is multiplied; the last compiles for minutes
DTYPES = (("bfloat16", "ieee"), ("float16", "ieee"), ("float32", "tf32x3"), ("float32", "ieee"))
SPEEDS = (*((("abs",), length) for length in (64, 16, 256)), (("sum", "abs"), 64), (("sum", "abs"), 16))


def kernel(sheet: Sheet) -> None:
    if importlib.util.find_spec("triton") is None:
        return sheet.leave_out("the kernel", "triton is not installed here")
    if sheet.smoke:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    device = _device(sheet.smoke)
    sheet.case("bfloat16 ieee", 5, lambda: kernel_errors(sheet, device, "bfloat16", "ieee"))
    for names, length in SPEEDS if not sheet.smoke else ():
        name = f"speed of {'+'.join(names)} at length {length}"
        sheet.case(name, 12, lambda names=names, length=length: kernel_speed(names, length))
    for dtype, precision in DTYPES[1:]:
        name = f"{dtype} {precision}"
        sheet.case(name, 5, lambda dtype=dtype, precision=precision: kernel_errors(sheet, device, dtype, precision))


def kernel_errors(sheet: Sheet, device: str, dtype: str, precision: str) -> Row:
    """The largest error of every tiling at every length, relative to the largest number of a sum in float64."""
    import torch

    from crosstrace.trace import kernels

    tuned, _ = kernels._kernel()
    tilings = list(tuned.configs)
    sizes = (
        [((37, 21), kernels.MEASURES)] if sheet.smoke else [((1031, 517), kernels.MEASURES), ((1024, 512), ("abs",))]
    )
    lengths = (1, 9, 17) if sheet.smoke else LENGTHS
    inputs = [
        (_factors(4, length, *size, dtype, device), names) for length in lengths for size, names in sizes
    ]  # fmt: skip
    expected = [_in_float64(*factors, names) for factors, names in inputs]
    errors: dict[str, float] = {}
    lacking: list[str] = []
    refused: dict[str, str] = {}
    try:
        for config in tilings:
            name = str(config).partition(", num_ctas")[0]
            if sheet.left < 4 and not sheet.smoke:
                lacking.append(name)
                continue
            tuned.configs = [config]  # (of one alone none is tried)
            for ((left, right), names), want in zip(inputs, expected):
                wanted = {key.upper(): key in names for key in kernels.MEASURES}
                told = {"left": left, "tuned_length": kernels._tuned_length(left.shape[1])}
                if len(tilings) > 1 and config not in kernels._promising(tilings, told, **wanted):
                    continue
                sums = {key: torch.zeros_like(x, dtype=torch.float32) for key, x in want.items()}
                try:
                    kernels.per_example_sums(left, right, sums, slice(None), precision=precision)
                except Exception as error:  # too few registers or too little shared memory, say
                    refused[name] = f"{type(error).__name__}: {str(error)[:200]}"
                    _check_device()
                    continue
                for key, x in want.items():
                    error = float((sums[key].double() - x).abs().max() / x.abs().max())
                    errors[name] = max(errors.get(name, 0.0), error if error == error else float("inf"))
    finally:
        tuned.configs = tilings
    worst = max(errors, key=lambda name: errors[name], default=None)
    found: Row = {
        "largest_error": errors[worst] if worst else None,
        "of": worst,
        "lengths": list(lengths),
        "tilings": errors,
        "refused": refused,
        "no_time_for": lacking,
    }
    wrong = [name for name, error in errors.items() if error > 2e-5]
    if wrong or refused or not errors:
        found["wrong"] = f"errors over 2e-5: {wrong}; refused: {refused}; tilings seen: {len(errors)}"
    return found


def _factors(count: int, length: int, rows: int, columns: int, dtype: str, device: str) -> tuple[Any, Any]:
    import torch

    draw = torch.Generator(device).manual_seed(length)

    def make(width: int) -> Any:
        return torch.randn(count, length, width, generator=draw, device=device)

    return make(rows).to(getattr(torch, dtype)), make(columns).to(getattr(torch, dtype))


def _in_float64(left: Any, right: Any, names: Sequence[str]) -> dict[str, Any]:
    """The sums, one example after the other."""
    import torch

    folds = {"sum": lambda g: g, "abs": torch.abs, "square": torch.square}
    sums: dict[str, Any] = {}
    for a, b in zip(left.double(), right.double()):
        gradient = a.t() @ b
        for name in names:
            part = folds[name](gradient)
            sums[name] = sums[name] + part if name in sums else part
    return sums


def kernel_speed(names: tuple[str, ...], length: int) -> Row:
    """The tuned kernel on an MLP of Pythia-2.8B, beside the plain gradient of the weight, one product of the batch."""
    import torch

    from crosstrace.trace import kernels

    rows, columns = 10240, 2560
    left, right = _factors(TOKENS // length, length, rows, columns, "bfloat16", "cuda")
    sums = {name: torch.zeros(rows, columns, device="cuda") for name in names}

    def work() -> None:
        kernels.per_example_sums(left, right, sums, slice(None))

    def plain() -> Any:
        return left.flatten(0, 1).t() @ right.flatten(0, 1)

    tuning = _seconds("cuda", work)
    seconds = statistics.median(_seconds("cuda", work) for _ in range(10))
    floor = statistics.median([_seconds("cuda", plain) for _ in range(12)][2:])
    rate = 2 * TOKENS * rows * columns / seconds
    return {
        "seconds": seconds, "over_plain": seconds / floor, "tflops": rate / 1e12,
        "share_of_matmul_rate": rate / matmul_rate("cuda"), "tuning": tuning,
        "tiling": str(kernels._kernel()[0].best_config),
    }  # fmt: skip


SHAPES = ("EleutherAI/pythia-2.8b", "meta-llama/Llama-3.2-3B", "llama-1.2b")


def shape_of(name: str) -> Any:
    """The config of a shape; of the models, the package's copies."""
    from transformers import AutoConfig, GPTNeoXConfig

    from crosstrace.experiment.needs.material import shape_folder

    if name == "tiny":
        return GPTNeoXConfig(
            vocab_size=4000, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
            max_position_embeddings=256, use_cache=False,
        )  # fmt: skip
    if name == "llama-1.2b":  # Llama-3.2-1B's
        config = AutoConfig.from_pretrained(shape_folder("meta-llama/Llama-3.2-3B")[0], use_cache=False)
        config.update(
            {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "head_dim": 64}
        )  # fmt: skip
        return config
    return AutoConfig.from_pretrained(shape_folder(name)[0], use_cache=False)


def made(name: str, device: str, dtype: str, attention: str) -> Any:
    """A model of random weights."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            shape_of(name), dtype=getattr(torch, dtype), attn_implementation=attention
        )
    return model.eval()


def cost(sheet: Sheet) -> None:
    device = _device(sheet.smoke)
    rate = 0.0

    def product() -> Row:
        nonlocal rate
        rate = matmul_rate(device)
        return {"tflops": rate / 1e12}

    sheet.case("matrix product", 0, product)
    for name in ("tiny",) if sheet.smoke else SHAPES:
        model: list[Any] = []

        def make(name: str = name, model: list[Any] = model) -> None:
            model.append(made(name, device, "bfloat16", "sdpa"))

        sheet.case(f"{name}: its weights", 12, make)
        for length in (8, 16) if sheet.smoke else (64, 16, 256):
            count = 4 if sheet.smoke else TOKENS // length

            def measure(length: int = length, count: int = count, model: list[Any] = model) -> Row:
                if not model:
                    raise NoCase("the model was not made")
                return traced(sheet, model[0], device, length, count, rate)

            sheet.case(f"{name}: {count} examples of {length}", 15, measure)
        model.clear()
        _freed()


def traced(sheet: Sheet, model: Any, device: str, length: int, count: int, rate: float) -> Row:
    """Seconds of the contenders on one batch, which alternate, and how far the trace is from the loop's sums."""
    import torch
    from torch import nn
    from trace_cost import Ours, batch_of, loop, plain

    from crosstrace.trace import kernels

    batch = {key: value.to(device) for key, value in batch_of(model, length, count).items()}
    alone = min(ALONE, count)
    few = {key: value[:alone] for key, value in batch.items()}
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in model.named_parameters()}
    ours = Ours(model)
    work = {"trace": (ours, batch), "plain": (plain, batch), "loop": (loop, few)}
    first = {
        name: _seconds(device, lambda do=do, data=data: do(model, data, sums)) for name, (do, data) in work.items()
    }
    times: dict[str, list[float]] = {name: [] for name in work}
    peaks: dict[str, int | None] = {}
    for number in range(6):
        if number > 1 and sheet.left < 8:
            break
        for name, (do, data) in work.items():
            with _peak(device) as held:
                seconds = _seconds(device, lambda do=do, data=data: do(model, data, sums))
            if number:  # the first warms up
                times[name].append(seconds * (count / alone if name == "loop" else 1))
            peaks[name] = held.get("more")
    seconds = {name: statistics.median(of) for name, of in times.items()}

    for total in sums.values():
        total.zero_()
    loop(model, few, sums)
    expected = {name: total.clone() for name, total in sums.items()}
    for total in sums.values():
        total.zero_()
    ours(model, few, sums)
    errors = {name: float((sums[name] - want).norm() / want.norm().clamp(min=1e-30)) for name, want in expected.items()}
    worst = max(errors, key=lambda name: errors[name])
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    operations = 6 * linear * length * count  # forward, gradient of the inputs, per-example gradients: 2 each
    found: Row = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "kernel": kernels.available(torch.empty(1, device=device, dtype=torch.bfloat16)),
        "trace": seconds["trace"], "plain": seconds["plain"], "loop": seconds["loop"],
        "trace_over_plain": seconds["trace"] / seconds["plain"],
        "loop_over_trace": seconds["loop"] / seconds["trace"],
        "trace_share_of_matmul_rate": operations / seconds["trace"] / rate if rate else None,
        "plain_share_of_matmul_rate": operations / seconds["plain"] / rate if rate else None,
        "first_trace": first["trace"],
        "largest_error": errors[worst], "of": worst, "median_error": statistics.median(errors.values()),
        "rounds": times, "more_bytes": peaks, "coverage": ours.engine.coverage(),
    }  # fmt: skip
    if not errors[worst] < 0.15:  # bfloat16 rounds each gradient of the loop, and batches round otherwise
        found["wrong"] = f"{worst} differs by {errors[worst]:.3g} of its norm from the loop's sums"
    return found


PLANNED = ("neox-160m", "llama-100m-long")  # of benchmarks/plan.py
STAGES = ("train", "eval", "trace")  # those that work on the GPU and take no minutes


def memory(sheet: Sheet) -> None:
    for name in ("tiny",) if sheet.smoke else PLANNED:
        home = Path(tempfile.mkdtemp(prefix=f"crosstrace-gpu-{name}-"))
        try:
            planned(sheet, name, home)
        finally:
            shutil.rmtree(home, ignore_errors=True)


def planned(sheet: Sheet, name: str, home: Path) -> None:
    """Each stage's estimate beside the most that tensors took on the GPU, all stages in this process."""
    from plan import CASES, made_experiment

    from crosstrace.experiment import pipeline
    from crosstrace.models.modes import silent
    from crosstrace.planning.plan import plan

    device = _device(sheet.smoke)
    tiny = {"vocab_size": 4000, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
    kind, settings, changes = CASES.get(name, ("llama", tiny, {"trace.parts": 2}))
    ready: list[Any] = []

    def prepare() -> Row:
        experiment = made_experiment(name, kind, settings, changes, home)
        estimate = plan(experiment, folder=home / "run", probe=False)
        with silent():
            pipeline.run(experiment, home / "run", "new", stages=["data"], quiet=True)
        ready.extend((experiment, estimate))
        return {"parameters": estimate.model["parameters"]}

    def stage(which: str) -> Row:
        if not ready:
            raise NoCase("there is no experiment")
        experiment, estimate = ready
        with silent(), _peak(device) as held:
            pipeline.run(experiment, home / "run", "resume", stages=[which], quiet=True)
        where = "gpu" if device == "cuda" else "ram"
        rows = [row for row in estimate.memory if (row["stage"], row["where"]) == (which, where)]
        size = max((row["bytes"] for row in rows), default=0)
        peak = held.get("peak")
        return {"estimate": size, "measured": peak, "ratio": size / peak if peak else None}

    sheet.case(f"{name}: the plan", 12, prepare)
    for which in STAGES:
        sheet.case(f"{name}: {which}", 8, lambda which=which: stage(which))


@dataclass(frozen=True)
class Training:
    """One training to be measured.

    Attributes:
        shape: of the model.
        updates: that are counted, without a trace and with.
        reductions: of the online trace; each is a set of sums of the model's size for each task.
        bio, qa: examples of an update.
        seconds: that it takes, about.
    """

    shape: str
    updates: int
    reductions: tuple[str, ...]
    bio: int
    qa: int
    seconds: float


# Of 2.8 B parameters weights, gradients and AdamW's means in float32 take 44 GB, and the sums of one reduction 22 GB.
TRAININGS = (
    Training("EleutherAI/pythia-160m", 20, ("example", "step"), 16, 32, 25),
    Training("EleutherAI/pythia-2.8b", 8, ("example",), 8, 16, 40),
)


def training(sheet: Sheet) -> None:
    tiny = Training("tiny", 3, ("example", "step"), 2, 4, 5)
    for case in (tiny,) if sheet.smoke else TRAININGS:
        plain = sheet.case(f"{case.shape}: plain", case.seconds / 2, lambda case=case: updates(sheet, case, False))

        def beside(case: Training = case, plain: Row | None = plain) -> Row:
            found = updates(sheet, case, True)
            return found | {"over_plain": found["seconds"] / plain["seconds"] if plain else None}

        sheet.case(f"{case.shape}: traced, {' and '.join(case.reductions)}", case.seconds / 2, beside)


class Enough(Exception):
    """The training has shown what it was made for; it ends before it saves anything."""


class Watch:
    """A listener of a training: traces each update if there is a trace, and notes when updates end."""

    def __init__(self, device: str, trace: Any, number: int, end: float) -> None:
        self.device, self.trace, self.number, self.end = device, trace, number, end
        self.times: list[float] = []

    def on_update(self, model: Any, batches: Any, lr: float, update: int, forwards: Any) -> None:
        if self.trace is not None:
            self.trace.step(batches, lr, forwards)

    def on_gradient(self, model: Any, task: str, part: Any) -> None: ...

    def on_updated(self, model: Any, update: int, phase: str, last: bool) -> None:
        _wait(self.device)
        self.times.append(time.perf_counter())
        if len(self.times) == self.number or (len(self.times) > 3 and time.time() > self.end):
            raise Enough

    def save(self, folder: Path, leads: bool) -> None: ...

    def load(self, folder: Path) -> None: ...


def updates(sheet: Sheet, case: Training, with_trace: bool) -> Row:
    """The median seconds of an update of mixed training on generated facts: the Trainer's own step in bf16 autocast."""
    from crosstrace.data.facts import FactSettings
    from crosstrace.data.tasks import DEFAULT_ROLES
    from crosstrace.data.text import texts
    from crosstrace.data.tokens import encode
    from crosstrace.experiment.examples import training_examples
    from crosstrace.experiment.settings import ModelSettings
    from crosstrace.models.loading import load_tokenizer
    from crosstrace.trace import OnlineTrace
    from crosstrace.training.recipes import Optimiser, Phase
    from crosstrace.training.settings import TrainSettings
    from crosstrace.training.trainer import train

    device = _device(sheet.smoke)
    tokenizer = load_tokenizer("bundled")
    own = texts(FactSettings(people=60 if sheet.smoke else 400))
    parts = {"bio": own["bio"], "qa_id": [item for item in own["qa"] if item.split == "id"]}
    examples = training_examples({part: encode(tokenizer, items) for part, items in parts.items()}, DEFAULT_ROLES)
    model = made(case.shape, device, "float32", ModelSettings().attention)
    trace = OnlineTrace(model, ["bio", "qa"], ["abs"], case.reductions) if with_trace else None
    # the first updates compile, tune and choose the rules
    watch = Watch(device, trace, case.updates + 3, sheet.end - 3)
    phase = Phase("mixed", {"bio": case.bio, "qa": case.qa}, case.updates + 4)
    settings = TrainSettings(optimiser=Optimiser(learning_rate=1e-5), checkpoint_every=10**6)
    home = Path(tempfile.mkdtemp(prefix="crosstrace-gpu-training-"))
    clock = time.perf_counter()
    try:
        with _peak(device) as held, suppress(Enough):
            train(model, tokenizer, [phase], examples, home, settings, bf16=True, listeners=[watch])
    finally:
        shutil.rmtree(home, ignore_errors=True)
    rounds = [b - a for a, b in zip(watch.times[2:], watch.times[3:])]
    found: Row = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": statistics.median(rounds),
        "first_update": watch.times[0] - clock,
        "updates": len(watch.times),
        "peak": held.get("peak"),
        "rounds": rounds,
    }
    if trace is not None:
        means = trace._means.values()
        finite = all(bool(total.isfinite().all()) for mean in means for total in mean.total.values())
        moved = all(any(bool(total.any()) for total in mean.total.values()) for mean in means)
        found |= {"shares_the_forward": str(trace.borrows), "coverage": trace._engine.coverage()}
        if not (finite and moved):
            found["wrong"] = f"the traces are {'zero' if finite else 'not finite'}"
    return found


def tests(sheet: Sheet) -> None:
    if importlib.util.find_spec("pytest") is None:
        return sheet.leave_out("the tests of the GPU", "pytest is not installed here")
    # in smoke, that pytest finds them: without a GPU they skip themselves
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "-m", "gpu", "-v"]
    files = ["--tb=short", "tests/test_kernels.py"]

    def run() -> Row:
        process = subprocess.Popen(
            [*command, *files], cwd=HOME, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        cut = False
        try:
            told, _ = process.communicate(timeout=max(1.0, sheet.left - 1))
        except subprocess.TimeoutExpired:
            process.kill()
            cut, (told, _) = True, process.communicate()
        lines = told.splitlines()
        outcomes = {
            outcome: sum(line.startswith("tests/") and f" {outcome.upper()}" in line for line in lines)
            for outcome in ("passed", "failed", "skipped")
        }
        found: Row = {**outcomes, "cut_short": cut}
        if found["failed"] or (process.returncode not in (0, 5) and not cut):
            found |= {"wrong": f"pytest ended with {process.returncode}", "end": lines[-40:]}
        return found

    sheet.case("the tests of the GPU", 10, run)


@dataclass(frozen=True)
class Part:
    """A part of the benchmark, and the seconds that it has, its process's start included. What it leaves of them is the
    next one's."""

    seconds: float
    work: Callable[[Sheet], None]


PARTS = {
    "machine": Part(20, machine),
    "kernel": Part(85, kernel),
    "cost": Part(165, cost),
    "training": Part(85, training),
    "memory": Part(45, memory),
    "tests": Part(55, tests),
}  # 455 seconds in all


# ---------------------------------------------------------------------------------------------- the whole


def run_part(name: str, file: Path, end: float, smoke: bool) -> int:
    """Do one part in this process."""
    sheet = Sheet(file, name, end, smoke)
    try:
        PARTS[name].work(sheet)
    except Exception as error:
        if not sheet.row["failed"] or str(error)[:100] not in sheet.row["failed"][-1]["error"]:
            lines = "".join(traceback.format_exception(error)).splitlines()
            told = {"case": "the part", "error": f"{type(error).__name__}: {error}"[:500], "traceback": lines[-24:]}
            sheet.row["failed"].append(told)
        sheet.leave_out("the cases that were to follow", f"{type(error).__name__}: {str(error)[:200]}")
    return 1 if sheet.row["failed"] else 0


def run_all(names: Sequence[str], file: Path, smoke: bool) -> bool:
    """Run each part in a process of its own; gives whether all went well."""
    start, well = time.time(), True
    end = start
    environment = dict(os.environ)
    if smoke:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    file.unlink(missing_ok=True)
    for name in names:
        end += PARTS[name].seconds
        seconds = end - time.time()
        print(f"{name} ({seconds:.0f} s)", flush=True)
        if seconds < 5:
            write_part(file, name, {"cases": [], "failed": [], "left_out": [{"case": name, "why": "no time was left"}]})
            print("  left out, no time was left")
            continue
        command = [sys.executable, __file__, "--this", name, "--end", str(end)]
        command += ["--out", str(file), *(["--smoke"] if smoke else [])]
        clock = time.time()
        try:
            status = subprocess.run(command, timeout=seconds + GRACE, env=environment, check=False).returncode
            ended = f"its process ended with status {status}"
        except subprocess.TimeoutExpired:
            status, ended = -1, f"it did not end after {seconds + GRACE:.0f} s and was killed"
        row = json.loads(file.read_text()).get(name) if file.exists() else None
        row = row or {"cases": [], "left_out": [], "failed": []}
        row["took"] = round(time.time() - clock, 1)
        if status not in (0, 1):
            row["failed"].append({"case": "the part", "error": ended})
            print(f"  {ended}")
        well &= status == 0
        write_part(file, name, row)
    print(f"\n{summary(json.loads(file.read_text()))}\n\n{file}, {time.time() - start:.0f} s")
    return well


COLUMNS = (
    "largest_error", "tflops", "share_of_matmul_rate", "over_plain", "plain", "trace", "loop", "trace_over_plain",
    "loop_over_trace", "trace_share_of_matmul_rate", "estimate", "measured", "ratio", "seconds", "peak", "passed",
    "failed",
)  # fmt: skip


def summary(whole: Row) -> str:
    """A table for each part, then what was left out and what failed."""
    blocks = []
    for part, row in whole.items():
        used = [name for name in COLUMNS if any(case.get(name) is not None for case in row["cases"])]
        cells = [[part, *(name.replace("_", " ") for name in used)]]
        cells += [[case["case"], *(_cell(case.get(name)) for name in used)] for case in row["cases"]]
        widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells]
        lines += [f"left out: {of['case']}: {of['why']}" for of in row["left_out"]]
        lines += [f"FAILED: {of['case']}: {of['error']}" for of in row["failed"]]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, int) and value > 10**6:
        return f"{value / 1e9:.2f} GB"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS), help="those to run; all if not given")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--out", type=Path, help="the JSON file; $OUT/gpu.json or benchmarks/results/gpu.json")
    parser.add_argument("--this", choices=PARTS, help=argparse.SUPPRESS)  # what a part's process is started with
    parser.add_argument("--end", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = Path(os.environ.get("OUT") or HOME / ("build" if options.smoke else "benchmarks/results"))
    file = options.out or folder / ("gpu_smoke.json" if options.smoke else "gpu.json")
    if options.this:
        return run_part(options.this, file, options.end, options.smoke)
    if not options.smoke and _driver() is None and not Path("/dev/nvidia0").exists():
        parser.exit(2, "there is no GPU here; --smoke shows that the program runs\n")
    return 0 if run_all(options.part, file, options.smoke) else 1


if __name__ == "__main__":
    sys.exit(main())
