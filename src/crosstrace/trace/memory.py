"""How much memory a trace will need, and where its sums are kept.

Nothing here computes a trace. One forward of one example is made; the rest is arithmetic.
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
SPARE = 0.9  # share of the free memory that a trace may use
MOST_PASSES = 4  # more passes are made only if they are asked for


@dataclass(frozen=True)
class Plan:
    """Where the sums of a trace are kept, and in how many passes over the data it is taken.

    Attributes:
        device: where the sums are kept.
        groups: the parameters of each pass.
    """

    device: torch.device
    groups: list[list[str]]


@dataclass(frozen=True)
class Estimate:
    """Bytes that a trace needs on the model's device, and on the CPU if that is another.

    Attributes:
        parameters: how many parameters are traced.
        weights: bytes of the model, which is there already.
        activations: bytes that the largest batch keeps for its backward, and of the gradients of its logits.
        sums: bytes of the sums that are held at once.
        result: bytes of the traces, on the CPU. Sums on the CPU become the result.
        passes: how many passes over the data are made.
        device: the model's device.
        sums_on: the device of the sums.
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
        """Most bytes on the model's device at once, with the weights."""
        sums = self.sums if self.sums_on == self.device else 0
        return self.weights + self.activations + (max(sums, self.result) if self.device == "cpu" else sums)

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
    """Choose where the sums are kept, and estimate the memory that the trace needs then.

    Args:
        model: as in `trace`.
        losses: gives the losses of a batch, for the one forward.
        batches: the batches to trace.
        sums: how many sums there are of each parameter.
        where: the sums are kept on the "device" of the model or on the "cpu". "auto": on the device if they fit in a
            few passes, else on the CPU.
        passes: how many passes over the data are made, each for one group of parameters alone; None: as few as fit.
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
    all_sums = sum(accumulated.values())
    activations = _activations(model, losses, batches)
    free = free_memory(device)
    room = None if free is None else int(SPARE * free) - activations

    kept = torch.device("cpu") if where == "cpu" else device
    if passes is None:
        needed = 1 if kept.type == "cpu" or sharded or room is None else -(-all_sums // max(1, room))
        if needed > MOST_PASSES and where == "auto":  # moving the sums of each batch costs less than that many passes
            kept, needed = torch.device("cpu"), 1
        passes = min(len(named), needed)
    groups = list(_groups(accumulated, passes))
    largest_group = max(sum(accumulated[name] for name in group) for group in groups)
    return Plan(kept, groups), Estimate(
        parameters=sum(p.numel() for p in named.values()),
        weights=weights,
        activations=activations,
        sums=largest_group,
        result=all_sums,
        passes=len(groups),
        device=str(device),
        sums_on=str(kept),
        free=free,
    )


def free_memory(device: torch.device) -> int | None:
    """Free bytes on a device; None if that is not known."""
    if device.type == "cuda":  # torch keeps the memory of freed tensors for new ones
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if device.type != "cpu":
        return None
    limits = []
    try:
        with open("/proc/meminfo") as file:
            limits += [1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable:")]
    except OSError:
        if "SC_AVPHYS_PAGES" in os.sysconf_names:
            limits.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    try:  # the limit of a container
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as used:
            limits.append(int(limit.read()) - int(used.read()))
    except (OSError, ValueError):  # none, or "max"
        pass
    return max(0, min(limits)) if limits else None


def _bytes(p: Tensor) -> int:
    """Bytes of one number of a parameter's sums."""
    return torch.empty(0, dtype=sum_dtype(p.dtype)).element_size()


def _groups(sizes: Mapping[str, int], passes: int) -> Iterator[list[str]]:
    """The parameters in order, in at most `passes` groups of about the same size, none of them empty."""
    share = sum(sizes.values()) / passes
    group: list[str] = []
    total, done = 0, 0
    for name, size in sizes.items():
        if group and total + size / 2 > share * (done + 1):
            yield group
            group, done = [], done + 1
        group.append(name)
        total += size
    yield group


def _activations(model: nn.Module, losses: Any, batches: Sequence[Mapping[str, Tensor]]) -> int:
    """Bytes that the costliest batch keeps for its backward, and of the gradients of its logits."""
    largest = max(batches, key=lambda batch: batch["input_ids"].numel() * batch["input_ids"].shape[1])
    count = len(largest["input_ids"])
    longest = int(largest["attention_mask"].sum(1).argmax())
    device = next(model.parameters()).device
    one = {key: value[longest : longest + 1].to(device) for key, value in largest.items() if value.dim() == 2}
    # Storages are told apart by torch's object: a fake tensor has no address.
    weights = {local(p).untyped_storage()._cdata for p in at_rest(model).values()}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        losses(one)
    at_rest(model)  # frees the weights that were gathered for the forward
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", 0)
    targets = max(int((batch["labels"][:, 1:] != -100).sum(1).max()) * len(batch["labels"]) for batch in batches)
    # While the loss is differentiated there are three float32 tensors of the logits' size: the log-probabilities, which
    # are kept, their gradient, and the gradient of the logits.
    return count * sum(storage.nbytes() for storage in kept.values()) + 2 * 4 * targets * vocabulary


def size_text(count: int) -> str:
    """Bytes as text, e.g. 1230000 as "1.23 MB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:.3g} {unit}"
        count = count / 1000  # pyright: ignore[reportAssignmentType]
    raise AssertionError
