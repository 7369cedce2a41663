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
from crosstrace.trace.distributed import Scatter
from crosstrace.trace.engine import Batch, Engine
from crosstrace.trace.measures import MEASURES
from crosstrace.trace.rules import sum_dtype

REDUCTIONS = ("example", "step")


class Mean:
    """A weighted mean of one measure by one reduction: Σ so far per parameter, and the weight it is over."""

    def __init__(
        self, parameters: Mapping[str, Tensor], measure: str, reduction: str, device: torch.device | None = None
    ) -> None:
        self.measure, self.reduction = MEASURES[measure], reduction
        self.like = parameters
        self.total = {n: torch.zeros(local(p).shape, dtype=sum_dtype(p.dtype), device=device or p.device)
                      for n, p in parameters.items()}  # fmt: skip
        self.weight = 0.0

    def takes(self, theta: Tensor, factor: float) -> bool:
        """Whether the engine may add its sum right here: nothing is to be done with it, and it is at hand."""
        here = next(iter(self.total.values())).device == theta.device
        return self.measure.at is None and factor == 1.0 and here

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
        """The mean, on the CPU (of sharded parameters sharded likewise). The sums are used up, unless they are to be
        kept: there may be no room for both."""
        found = {}
        for name in list(self.total):
            mean = self.total[name] / self.weight if keep else self.total.pop(name).div_(self.weight)
            theta = self.like[name]
            found[name] = laid(mean, theta) if isinstance(theta, DTensor) else mean.cpu()
        return found


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

    Where a sum is all that one of them wants, it is the accumulator itself: no copy. With `scatter` the means hold a
    process's rows of it, and get theirs later.
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
    for key, fed in users.items():
        if not fed:
            sums[key] = also[key]
        elif len(fed) == 1 and key not in also and fed[0].takes(theta, factor):
            sums[key] = fed[0].total[name]
        else:
            sums[key] = torch.zeros_like(theta, dtype=sum_dtype(theta.dtype))
    yield sums
    for key, fed in users.items():
        for mean in fed:
            if sums[key] is not mean.total[name]:
                mean.add(name, sums[key], theta, factor)
        if fed and key in also:
            also[key].add_(sums[key])


def by_part(batch: Batch, parts: int, seen: int) -> tuple[Batch, list[int], list[slice]]:
    """The batch sorted by part, which parts it has, and where each lies; `seen` examples came before it."""
    if "labels" not in batch:
        return batch, [0], [slice(0, 0)]  # the engine says what is wrong with it
    part, order = order_by_part(batch, parts, seen)
    chosen, sizes = part.unique(return_counts=True)
    ends = sizes.cumsum(0).tolist()
    shares = [slice(end - size, end) for end, size in zip(ends, sizes.tolist())]
    rest = {key: value for key, value in batch.items() if key != "group"}
    if len(shares) > 1:
        rest = {key: value[order.to(value.device)] for key, value in rest.items()}
    return rest, chosen.tolist(), shares


def without_group(batch: Batch) -> Batch:
    return {key: value for key, value in batch.items() if key != "group"}


def order_by_part(batch: Batch, parts: int, seen: int) -> tuple[Tensor, Tensor]:
    """Which part each example of a batch belongs to, and the examples' order by part."""
    group = batch.get("group")
    part = (torch.arange(seen, seen + len(batch["labels"])) if group is None else group.cpu()) % parts
    return part, part.argsort(stable=True)


def check_settings(measures: Sequence[str], parts: int, reductions: Sequence[str]) -> None:
    for what, given, known in (("measure", measures, MEASURES), ("reduction", reductions, REDUCTIONS)):
        unknown = [name for name in given if name not in known]
        if unknown or not given:
            raise UserError(f"unknown {what} {unknown[0] if unknown else '(none)'!r}; expected of {', '.join(known)}")
    if parts < 1:
        raise UserError(f"parts is {parts}; expected at least 1")


def facts_of(engine: Engine) -> dict[str, Any]:
    """What a reader of the trace must know of how it was taken."""
    config = getattr(engine.model, "config", None)
    dtypes = {str(p.dtype).removeprefix("torch.") for p in engine.parameters.values()}
    return {
        "model": getattr(config, "name_or_path", "") or type(engine.model).__name__,
        "parameters": sum(p.numel() for p in engine.parameters.values()),
        "dtype": "+".join(sorted(dtypes)),
        "attention": getattr(config, "_attn_implementation", None),
        "coverage": engine.coverage(),
    }
