"""How much memory a trace takes, before it is taken, and where its sums are kept.

Nothing here computes a trace: one forward of one example is looked at, the rest is arithmetic.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from crosstrace.core.errors import UserError
from crosstrace.core.pieces import at_rest, is_sharded, local
from crosstrace.trace.blocks import sum_dtype

Where = Literal["auto", "device", "cpu"]
SPARE = 0.9  # share of the free memory that a trace may plan with
MOST_PASSES = 4  # chosen by itself


@dataclass(frozen=True)
class Plan:
    """Where the sums of a trace are kept, and in how many passes over the data it is taken.

    Attributes:
        device: of the accumulators.
        groups: the parameters of each pass; one group is one pass.
    """

    device: torch.device
    groups: list[list[str]]


@dataclass(frozen=True)
class Estimate:
    """Bytes that a trace needs on the model's device (and on the CPU, where it is another).

    Attributes:
        parameters: traced, and of the model.
        weights: of the model; they are there already.
        activations: what the largest batch keeps for its backward, and the largest of what comes and goes with it.
        sums: the accumulators that are held at once.
        result: the traces, on the CPU; where the accumulators are on the CPU they become the result.
        passes: over the data.
        free: bytes free on the model's device before the trace; None if not known.
    """

    parameters: int
    weights: int
    activations: int
    sums: int
    result: int
    passes: int
    device: str
    sums_on: str
    free: int | None

    @property
    def peak(self) -> int:
        """Most bytes on the model's device at once, weights included."""
        here = self.sums if self.sums_on == self.device else 0
        return self.weights + self.activations + (max(here, self.result) if self.device == "cpu" else here)

    def __str__(self) -> str:
        free = "" if self.free is None else f"; {size_text(self.free)} are free"
        passes = "one pass" if self.passes == 1 else f"{self.passes} passes"
        return (
            f"{self.parameters:,} parameters in {passes}: weights {size_text(self.weights)}, activations "
            f"{size_text(self.activations)}, sums {size_text(self.sums)} on {self.sums_on}; at most "
            f"{size_text(self.peak)} on {self.device}{free}"
        )


def estimate(
    model: nn.Module,
    losses: Any,
    batches: Sequence[Mapping[str, Tensor]],
    sums: int,
    where: Where = "auto",
    passes: int | None = None,
    names: Collection[str] | None = None,
) -> tuple[Plan, Estimate]:
    """Choose where the sums are kept, and say what that takes.

    Args:
        model: as `trace` has it.
        losses: the engine's loss of a batch, for the one forward.
        batches: those to trace.
        sums: tensors of the model's size that are accumulated.
        where: the sums are kept on the "device" of the model, on the "cpu", or ("auto") on the device where they fit in
            a few passes, else on the CPU.
        passes: over the data, each with the sums of one group of parameters alone; None: as few as fit.
        names: the parameters to trace; None: all.

    Raises:
        UserError: `passes` is not from 1 to the number of parameters.
    """
    everything = at_rest(model)
    named = {name: p for name, p in everything.items() if names is None or name in names}
    sharded = is_sharded(model)
    if sharded and where == "cpu":
        raise UserError("the sums of a sharded model lie where its pieces do; leave where out")
    if passes is not None and not 1 <= passes <= len(named):
        raise UserError(f"passes is {passes}; expected from 1 to {len(named)}, the number of tensors to trace")
    device = next(iter(named.values())).device
    weights = sum(local(p).numel() * p.element_size() for p in everything.values())
    accumulated = {name: sums * local(p).numel() * _bytes(p) for name, p in named.items()}
    whole = sum(accumulated.values())
    activations = _activations(model, losses, batches)
    free = free_memory(device)
    room = None if free is None else int(SPARE * free) - activations

    kept = torch.device("cpu") if where == "cpu" else device
    if passes is None:
        needed = 1 if kept.type == "cpu" or sharded or room is None else -(-whole // max(1, room))
        if needed > MOST_PASSES and where == "auto":  # moving the sums of each batch costs less than that many passes
            kept, needed = torch.device("cpu"), 1
        passes = min(len(named), needed)
    groups = list(_groups(accumulated, passes))
    held = max(sum(accumulated[name] for name in group) for group in groups)
    return Plan(kept, groups), Estimate(
        parameters=sum(p.numel() for p in named.values()),
        weights=weights,
        activations=activations,
        sums=held,
        result=whole,
        passes=len(groups),
        device=str(device),
        sums_on=str(kept),
        free=free,
    )


def free_memory(device: torch.device) -> int | None:
    """Bytes that may still be had on a device; None where that can't be known."""
    if device.type == "cuda":  # torch keeps what was freed, for tensors to come
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if device.type != "cpu":
        return None
    found = []
    try:
        with open("/proc/meminfo") as file:
            found += [1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable:")]
    except OSError:
        if "SC_AVPHYS_PAGES" in os.sysconf_names:
            found.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    try:  # a container's own limit
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as used:
            found.append(int(limit.read()) - int(used.read()))
    except (OSError, ValueError):  # none, or "max"
        pass
    return max(0, min(found)) if found else None


def _bytes(p: Tensor) -> int:
    return torch.empty(0, dtype=sum_dtype(p.dtype)).element_size()


def _groups(sizes: Mapping[str, int], passes: int) -> Iterator[list[str]]:
    """The parameters in order, in at most so many groups of about the same size; none is empty."""
    share = sum(sizes.values()) / passes
    group: list[str] = []
    held, done = 0, 0
    for name, size in sizes.items():
        if group and held + size / 2 > share * (done + 1):
            yield group
            group, done = [], done + 1
        group.append(name)
        held += size
    yield group


def _activations(model: nn.Module, losses: Any, batches: Sequence[Mapping[str, Tensor]]) -> int:
    """Bytes that the costliest batch keeps for its backward, with the logits' gradients on the way."""
    largest = max(batches, key=lambda batch: batch["input_ids"].numel() * batch["input_ids"].shape[1])
    count = len(largest["input_ids"])
    longest = int(largest["attention_mask"].sum(1).argmax())
    device = next(model.parameters()).device
    one = {key: value[longest : longest + 1].to(device) for key, value in largest.items() if value.dim() == 2}
    # (by what torch calls a storage: a tensor that is only pretended has no address)
    own = {local(p).untyped_storage()._cdata for p in at_rest(model).values()}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        losses(one)
    at_rest(model)  # weights that were gathered for the forward are empty now
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", 0)
    targets = max(int((batch["labels"][:, 1:] != -100).sum(1).max()) * len(batch["labels"]) for batch in batches)
    # While the loss is differentiated its logits are there three times in float32: log-probabilities (among what is
    # kept), their gradient and that of the logits.
    return count * sum(storage.nbytes() for storage in kept.values()) + 2 * 4 * targets * vocabulary


def size_text(count: int) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:.3g} {unit}"
        count = count / 1000  # pyright: ignore[reportAssignmentType]
    raise AssertionError
