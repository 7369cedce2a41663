"""Means of per-example gradients while they are summed: what every trace is made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from crosstrace.core.errors import UserError
from crosstrace.core.pieces import laid, local
from crosstrace.trace.batches import Batch
from crosstrace.trace.blocks import sum_dtype
from crosstrace.trace.distributed import Scatter
from crosstrace.trace.engine import Engine
from crosstrace.trace.measures import MEASURES

REDUCTIONS = ("example", "step")


class Mean:
    """A weighted mean of one measure by one reduction: Σ so far per parameter, and the weight it is over."""

    def __init__(
        self, parameters: Mapping[str, Tensor], measure: str, reduction: str, device: torch.device | None = None
    ) -> None:
        self.measure, self.reduction = MEASURES[measure], reduction
        self.like = parameters
        self.total = {
            name: torch.zeros(local(p).shape, dtype=sum_dtype(p.dtype), device=device or p.device)
            for name, p in parameters.items()
        }
        self.weight = 0.0

    def accepts(self, theta: Tensor, factor: float) -> bool:
        """Whether the engine may add its sum right into the total: it needs no change, and is on the same device."""
        is_on_device = next(iter(self.total.values())).device == theta.device
        return self.measure.at is None and factor == 1.0 and is_on_device

    def add(self, name: str, value: Tensor, theta: Tensor, factor: float) -> None:
        """Add the sum that the measure is made of, taken at the parameter theta."""
        if self.measure.at is not None:
            value = self.measure.at(value, theta.detach())
        self.total[name].add_(value.to(self.total[name].device), alpha=factor)

    def add_step(self, name: str, total: Tensor, count: int, theta: Tensor, factor: float) -> None:
        """Add a step's mean gradient, given as its sum over `count` examples, which is used up."""
        value, divisor = self.measure.of_step(total, count)
        self.add(name, value, theta, factor / divisor)

    def finished(self, keep: bool = False) -> dict[str, Tensor]:
        """The mean, on the CPU; if the parameters are sharded, sharded as they are.

        The sums are used up, unless `keep`: there may be no room for both."""
        means = {}
        for name in list(self.total):
            mean = self.total[name] / self.weight if keep else self.total.pop(name).div_(self.weight)
            theta = self.like[name]
            means[name] = laid(mean, theta) if isinstance(theta, DTensor) else mean.cpu()
        return means


@contextmanager
def open_sums(
    name: str,
    theta: Tensor,
    means: Sequence[Mean],
    factor: float = 1.0,
    also: Mapping[str, Tensor] = MappingProxyType({}),
    scatter: Scatter | None = None,
) -> Iterator[dict[str, Tensor]]:
    """The sums that `means` need of the parameter `name`, and those of `also`, for the engine to add to.

    If one mean alone needs a sum, and needs it as it is, the sum is that mean's total itself: no copy. With `scatter`
    the means hold a process's rows, and get their sums later.
    """
    users: dict[str, list[Mean]] = {key: [] for key in also}
    for mean in means:
        users.setdefault(mean.measure.sums, []).append(mean)
    if scatter is not None:

        def add(key: str, value: Tensor) -> None:
            for mean in users[key]:
                mean.add(name, value, local(theta), factor)
            if key in also:
                also[key].add_(value)

        with scatter.open(name, list(users), add) as sums:
            yield sums
        return
    sums = {}
    for key, using in users.items():
        if not using:
            sums[key] = also[key]
        elif len(using) == 1 and key not in also and using[0].accepts(theta, factor):
            sums[key] = using[0].total[name]
        else:
            sums[key] = torch.zeros_like(theta, dtype=sum_dtype(theta.dtype))
    yield sums
    for key, using in users.items():
        for mean in using:
            if sums[key] is not mean.total[name]:
                mean.add(name, sums[key], theta, factor)
        if using and key in also:
            also[key].add_(sums[key])


def sort_by_part(batch: Batch, parts: int, seen: int) -> tuple[Batch, list[int], list[slice]]:
    """The batch sorted by part, the parts that it has, and the slice of each.

    Args:
        parts: how many there are.
        seen: how many examples came before this batch.
    """
    if "labels" not in batch:
        return batch, [0], [slice(0, 0)]  # the engine says what is wrong with it
    part, order = order_by_part(batch, parts, seen)
    present, sizes = part.unique(return_counts=True)
    ends = sizes.cumsum(0).tolist()
    shares = [slice(end - size, end) for end, size in zip(ends, sizes.tolist())]
    rest = {key: value for key, value in batch.items() if key != "group"}
    if len(shares) > 1:
        rest = {key: value[order.to(value.device)] for key, value in rest.items()}
    return rest, present.tolist(), shares


def without_group(batch: Batch) -> Batch:
    return {key: value for key, value in batch.items() if key != "group"}


def order_by_part(batch: Batch, parts: int, seen: int) -> tuple[Tensor, Tensor]:
    """The part that each example of a batch belongs to, and the examples' order by part."""
    group = batch.get("group")
    part = (torch.arange(seen, seen + len(batch["labels"])) if group is None else group.cpu()) % parts
    return part, part.argsort(stable=True)


def check_settings(measures: Sequence[str], parts: int, reductions: Sequence[str]) -> None:
    """Raise a `UserError` if a measure or a reduction is unknown, or there is no part."""
    for kind, names, known in (("measure", measures, MEASURES), ("reduction", reductions, REDUCTIONS)):
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise UserError(f"unknown {kind} {unknown[0] if unknown else '(none)'!r}; expected of {', '.join(known)}")
    if parts < 1:
        raise UserError(f"parts is {parts}; expected at least 1")


def describe_engine(engine: Engine) -> dict[str, Any]:
    """How a trace was taken, for its reader: the model, its dtype, its attention kernel and the coverage."""
    config = getattr(engine.model, "config", None)
    dtypes = {str(p.dtype).removeprefix("torch.") for p in engine.parameters.values()}
    return {
        "model": getattr(config, "name_or_path", "") or type(engine.model).__name__,
        "parameters": sum(p.numel() for p in engine.parameters.values()),
        "dtype": "+".join(sorted(dtypes)),
        "attention": getattr(config, "_attn_implementation", None),
        "coverage": engine.coverage(),
    }
