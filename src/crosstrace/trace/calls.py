"""One call of a module: what a rule may ask of it, from its input and output to the gradient e.

A forward records calls, and its backward brings their e (see `recording`). A training's batch may have its examples in
another order and multiplied by weights; an `Arrangement` says how its rows become the rules' examples.

Nothing here knows a rule.

Shapes: B examples, T positions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Container
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import Enum
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from crosstrace.trace.blocks import sum_dtype

# Arguments that no call changes. Any other object may hold a state, as a cache does.
PLAIN = (type(None), bool, int, float, complex, str, bytes, Enum, torch.dtype, torch.device, torch.Size)
PLAIN += (nn.Module, type, FunctionType)


class Unfit(Exception):
    """A rule does not know this use of the parameter."""


class Arrangement:
    """How the rows of a training's tensors become the rules' examples.

    Args:
        order: [B], the row that is the rules' example 0, 1, …; None: as they come.
        scale: [B], what e is multiplied by for each of these examples; None: nothing.
    """

    def __init__(self, order: Tensor | None = None, scale: Tensor | None = None) -> None:
        self.order, self.scale = order, scale

    # For one example at a time Python's numbers are much faster than tensors.

    @functools.cached_property
    def order_numbers(self) -> list[int] | None:
        """`order`, as Python's numbers."""
        return None if self.order is None else self.order.tolist()

    @functools.cached_property
    def scale_numbers(self) -> list[float] | None:
        """`scale`, as Python's numbers."""
        return None if self.scale is None else self.scale.tolist()

    @property
    def is_identity(self) -> bool:
        """Whether rows and e stay as they come."""
        return self.order is None and self.scale is None

    def rows(self, x: Tensor) -> Tensor:
        """x [B, …] in the rules' order."""
        return x if self.order is None else x[self.order]

    def scaled(self, x: Tensor) -> Tensor:
        """x [B, …], made of e and in the rules' order, multiplied."""
        return x if self.scale is None else x * self.scale.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


@dataclass(eq=False)
class Call:
    """One call of a module that owns parameters: what went in and out and, once the backward has brought it, e."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    input: Tensor | None  # the call's only tensor argument; None if it has none or several
    output: Tensor | None  # of a tuple, the first tensor with a gradient and a row (or T rows) per example
    node: Any  # autograd's node whose gradient e is
    flat: tuple[int, int] | None = None  # (B, T) where the module saw [B·T, …], else it saw [B, …]
    e: Tensor | None = None
    waiting: set[str] = field(default_factory=set)  # parameters whose gradient still needs this call
    rows: int = 0  # of the output: B, or B·T
    output_index: int = 0  # of `output` among all that the module gave
    locals: tuple[str, ...] = ()  # the module's names of all parameters this call is recorded for
    repeatable: bool = False  # it drew no random number and left no state in its module, so it can be made again
    autocast: torch.dtype | None = None  # that it was made in
    arrangement: Arrangement = field(default_factory=Arrangement)
    kept: dict[Any, Any] = field(default_factory=dict)  # what a rule computed for several parameters at once

    def __post_init__(self) -> None:
        self._versions = [x._version for x in self._tensors()]
        self._output_version = None if self.output is None else self.output._version

    def clear(self) -> None:
        """Let go of all tensors."""
        self.args, self.kwargs, self.kept = (), {}, {}
        self.input, self.output, self.node, self.e = None, None, None, None

    def gradient(self) -> Tensor:
        """e [B, …], in the dtype of the sums."""
        return self.arrangement.scaled(self.arrangement.rows(self.raw_gradient()))

    def tensor(self) -> Tensor:
        """The only tensor argument as the module saw it, detached and unchanged since the call."""
        return self.arranged(self.raw_tensor())

    def raw_gradient(self) -> Tensor:
        """`gradient` with the training's rows and scale, without a copy: for a rule that heeds `arrangement` itself."""
        assert self.e is not None
        return self.by_example(self.e.to(sum_dtype(self.e.dtype)))

    def raw_tensor(self) -> Tensor:
        """`tensor` with the rows of the training."""
        if self.input is None:
            raise Unfit
        self._check_unchanged()
        return self.input.detach()

    def tensors(self) -> list[Tensor]:
        """All tensor arguments, detached and unchanged since the call."""
        self._check_unchanged()
        return [self.arranged(x) for x in self._tensors()]

    def as_it_was(self) -> AbstractContextManager[Any]:
        """The autocast that the call was made in."""
        device = self.e.device.type if self.e is not None else "cpu"
        return torch.autocast(device, dtype=self.autocast, enabled=self.autocast is not None)

    def arguments(self, change: Callable[[Tensor], Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """args and kwargs with every tensor changed, and None for each object that the call may have changed.

        Such an object is a cache. It was empty before the call if the same output comes without it; the caller has to
        check that.
        """
        self._check_unchanged()

        def swap(x: Any) -> Any:
            if isinstance(x, Tensor):
                return change(self.arranged(x))
            return x if isinstance(x, PLAIN) else None

        return tree_map(swap, self.args), tree_map(swap, self.kwargs)

    def arranged(self, x: Tensor) -> Tensor:
        """A tensor of the call, detached, with the rules' order of examples. Without rows for them it stays."""
        x, order = x.detach(), self.arrangement.order
        if order is None or x.dim() == 0:
            return x
        if len(x) == len(order):
            return x[order]
        is_flat = self.flat is not None and len(x) == self.rows
        return x.unflatten(0, (len(order), -1))[order].flatten(0, 1) if is_flat else x

    def _check_unchanged(self) -> None:
        if [x._version for x in self._tensors()] != self._versions:
            raise Unfit

    def _tensors(self) -> list[Tensor]:
        return [x for x in tree_leaves((self.args, self.kwargs)) if isinstance(x, Tensor)]

    def result(self) -> Tensor | None:
        """What the module gave, detached; None if it was changed in place since, or is not kept (`reads_output`)."""
        y = self.raw_result()
        return None if y is None else self.arranged(y)

    def raw_result(self) -> Tensor | None:
        """`result` with the rows of the training."""
        return None if self.output is None or self.output._version != self._output_version else self.output.detach()

    def by_example(self, x: Tensor) -> Tensor:
        """What the module saw or gave, as [B, …]."""
        return x if self.flat is None else x.unflatten(0, self.flat)

    def again(self, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """The module's output for another input and other parameters."""
        if not all(isinstance(value, (Tensor, *PLAIN)) for value in tree_leaves((self.args, self.kwargs))):
            raise Unfit  # an object that the call may have changed

        def swap(value: Any) -> Any:
            return x if value is self.input else value

        args, kwargs = tree_map(swap, self.args), tree_map(swap, self.kwargs)
        with self.as_it_was():
            return tree_leaves(torch.func.functional_call(self.module, parameters, args, kwargs))[self.output_index]


def find_output(output: Any, rows: Container[int]) -> int | None:
    """Index, among the leaves of a module's output, of the first tensor with a gradient and that number of rows."""
    for index, x in enumerate(tree_leaves(output)):
        if isinstance(x, Tensor) and x.requires_grad and x.dim() and len(x) in rows:
            return index
    return None


def is_lookup(node: Any) -> bool:
    """Whether a node of autograd is that of an embedding lookup."""
    return node is not None and node.name() == "EmbeddingBackward0"
