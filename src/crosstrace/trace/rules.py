"""Rules: how one use of a parameter turns (input a, output gradient e) into per-example gradients.

A batched backward gives, for every call of a module, its input a and the gradient e = ∂Σℓ/∂output. Example i
only touches row i of both, so its own weight gradient is a small product of row i of a and e. A rule knows
that product for one kind of use; `reduce` adds the uses of a parameter per example (tied weights!) and folds
the result into the sums Σg, Σ|g| and Σg² block by block, while a block is still in the processor's cache. No
[B, *parameter] tensor exists at any time.

Rules know neither models, losses nor traces, and they need not be right for every module: the engine tries
them against `torch.autograd.grad` and uses for a parameter the first that agrees.

Shapes: B examples, T positions, O and I outputs and inputs, c examples of a block, r rows of a block.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from enum import Enum
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from crosstrace.trace import cpu_kernel, kernels

# Elements of one example's tile, 4 MB in float32: with 64 positions a matmul of fewer rows is slower than what the
# cache saves (benchmarks/tiles.py). Several examples share a block of that size only where their tiles are small.
TILE = 1 << 20
SMALL = 1 << 17
GPU_TILE = 1 << 24  # of a tile on a GPU, where each operation on a block has a price of its own
ROWS = 64  # fewest rows of a tile
COLUMNS = 1024  # of a linear layer's tile, at least: products of few long rows are slow (10240 -> 2560: 260 ms, 197 so)
REPLAYED = 1 << 16  # largest parameter whose per-example gradients may all be held at once


# Arguments of a call that it leaves as they are; any other object may hold a state, as a cache does.
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

    # (of one example at a time Python's numbers are much faster)

    @functools.cached_property
    def places(self) -> list[int] | None:
        """`order`, as Python's numbers."""
        return None if self.order is None else self.order.tolist()

    @functools.cached_property
    def factors(self) -> list[float] | None:
        """`scale`, as Python's numbers."""
        return None if self.scale is None else self.scale.tolist()

    @property
    def untouched(self) -> bool:
        """Whether rows and e are as they come."""
        return self.order is None and self.scale is None

    def rows(self, x: Tensor) -> Tensor:
        """x [B, …] in the rules' order."""
        return x if self.order is None else x[self.order]

    def scaled(self, x: Tensor) -> Tensor:
        """x [B, …], made of e and in the rules' order, multiplied."""
        return x if self.scale is None else x * self.scale.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


@dataclass(eq=False)
class Call:
    """One call of a module that owns parameters: what went in and out and, once the backward is there, e."""

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
    place: int = 0  # of `output` among all that the module gave
    locals: tuple[str, ...] = ()  # the module's names of all parameters this call is recorded for
    repeatable: bool = False  # it drew no random number and left no state in its module, so it can be made again
    autocast: torch.dtype | None = None  # that it was made in
    arrangement: Arrangement = field(default_factory=Arrangement)
    kept: dict[Any, Any] = field(default_factory=dict)  # what a rule found for several of them at once

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
        """`gradient` with rows and scale of the training, for a rule that heeds `arrangement` itself: no copy."""
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
        """args and kwargs with every tensor changed, and None in the place of an object that the call may have changed,
        such as a cache: it was empty before if the same output comes without it, which the caller has to check."""
        self._check_unchanged()

        def swap(x: Any) -> Any:
            if isinstance(x, Tensor):
                return change(self.arranged(x))
            return x if isinstance(x, PLAIN) else None

        return tree_map(swap, self.args), tree_map(swap, self.kwargs)

    def arranged(self, x: Tensor) -> Tensor:
        """A tensor of the call, detached, with the rules' order of examples; one without rows for them as it is."""
        x, order = x.detach(), self.arrangement.order
        if order is None or x.dim() == 0:
            return x
        if len(x) == len(order):
            return x[order]
        whole = self.flat is not None and len(x) == self.rows
        return x.unflatten(0, (len(order), -1))[order].flatten(0, 1) if whole else x

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
            return tree_leaves(torch.func.functional_call(self.module, parameters, args, kwargs))[self.place]


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums of half-precision gradients are kept in float32, others in their own dtype."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


class Rule:
    """One use of the parameter `local` of the called module.

    A new rule sets `name`, raises `Unfit` from its constructor where it does not apply, and writes `product`;
    the rest is optional and only makes it faster.
    """

    name: str
    batch: int  # B
    reads_output = True  # whether `call.result()` is asked for: only then is the module's output kept
    reruns = False  # whether it runs the module again
    lazy = False  # whether it does so only when it is asked for products, and may then find that it does not fit
    nested = False  # whether `local` may name a parameter of a module inside, e.g. "conv1d.weight"

    def __init__(self, call: Call, local: str) -> None:
        raise NotImplementedError

    def product(self, out: Tensor, examples: slice, rows: slice, beta: int) -> None:
        """out [c, r, …] = beta · out + the gradient of `examples`, restricted to `rows` of the parameter."""
        raise NotImplementedError

    def total(self, out: Tensor, examples: slice) -> None:
        """out (the parameter's shape) += Σ over `examples` of the gradient: no work per example."""
        _blocks([self], {"sum": out}, examples, self.batch)

    def reduce(self, sums: dict[str, Tensor], examples: slice) -> None:
        """Fold the gradients of `examples` into `sums`, where this is the parameter's only use."""
        _blocks([self], sums, examples, self.batch)

    def along(self, directions: Tensor, i: int) -> Tensor | None:
        """g_i v for each column v of `directions` [K, D], K the parameter's last size: [..., D]; None where that is not
        cheaper than the gradient."""
        return None

    def magnitude(self) -> Rule:
        """The same use with the absolute values of all it multiplies: the scale of its rounding errors."""
        twin = copy.copy(self)
        for key, value in vars(self).items():
            if isinstance(value, Tensor) and value.is_floating_point():
                setattr(twin, key, value.abs())
        return twin


class Linear(Rule):
    """g_i = e_iᵀ a_i of y = a Wᵀ (+ b), W [O, I]; the rows of the parameter are the left factor's columns."""

    name = "linear"
    reads_output = False
    transposed = False

    def __init__(self, call: Call, local: str) -> None:
        assert call.e is not None
        a, e, weight = call.by_example(call.raw_tensor()), call.by_example(call.e), getattr(call.module, local)
        if call.autocast == e.dtype != a.dtype:
            a = a.to(e.dtype)  # as autocast hands it to the product, and to that of the weight's gradient
        left, right = (a, e) if self.transposed else (e, a)
        if weight.shape != (left.shape[-1], right.shape[-1]) or a.shape[:-1] != e.shape[:-1] or a.dim() < 2:
            raise Unfit
        self.batch = len(e)
        self.arrangement = call.arrangement
        self.on_gpu = a.dtype == e.dtype and kernels.available(e)
        if self.on_gpu and self.arrangement.order is not None:  # whose kernel takes the rows as they come
            left, right = self.arrangement.rows(left), self.arrangement.rows(right)
            self.arrangement = Arrangement(scale=self.arrangement.scale)
        # as they are: half precision is not widened before it must be
        self.left, self.right = (x.unsqueeze(1).flatten(1, -2) for x in (left, right))

    @functools.cached_property
    def factors(self) -> tuple[Tensor, Tensor]:
        """left [B, T', …] and right [B, T', …], without positions that no example of the batch needs; in the dtype of
        the sums, but for the GPU's kernel."""
        e = self.right if self.transposed else self.left
        left, right = self.left, self.right
        if not self.on_gpu:
            left, right = left.to(sum_dtype(e.dtype)), right.to(sum_dtype(e.dtype))
        return _occupied(left, right, e)

    @functools.cached_property
    def has_one_position(self) -> bool:
        """Whether every example has at most one position with a gradient."""
        e = self.right if self.transposed else self.left
        if e.shape[1] == 1:
            return True
        some = e[..., :8]  # few columns tell nearly always
        return all(int((x != 0).any(-1).sum(1).max()) <= 1 for x in (some, e))

    def magnitude(self) -> Rule:
        twin = super().magnitude()
        vars(twin).pop("factors", None)
        return twin

    def product(self, out: Tensor, examples: slice, rows: slice, beta: int) -> None:
        if len(out) == 1:  # a large tile: rows and scale cost nothing here
            places, factors = self.arrangement.places, self.arrangement.factors
            row = examples.start if places is None else places[examples.start]
            alpha = 1.0 if factors is None else factors[examples.start]
            left, right = (x[row : row + 1].to(out.dtype) for x in self.factors)
            torch.baddbmm(out, left[..., rows].transpose(1, 2), right, beta=beta, alpha=alpha, out=out)
            return
        left, right = self._chosen(examples, out.dtype)
        torch.baddbmm(out, left[..., rows].transpose(1, 2), right, beta=beta, out=out)

    def total(self, out: Tensor, examples: slice) -> None:
        left, right = (x.flatten(0, 1) for x in self._chosen(examples, out.dtype))
        out.addmm_(left.t(), right)

    def reduce(self, sums: dict[str, Tensor], examples: slice) -> None:
        """In one kernel, in which a product never leaves the registers, where there is one for these factors.

        Where every example has one position (of a single target, in the layers after the last attention), its gradient
        is e aᵀ: |e aᵀ| = |e| |a|ᵀ, so that one product over the batch gives Σ|g|, and another Σg².
        """
        if self.has_one_position:
            left, right = (x.squeeze(1) for x in self._chosen(examples, next(iter(sums.values())).dtype))
            for name, total in sums.items():
                change = {"sum": lambda x: x, "abs": torch.abs, "square": torch.square}[name]
                total.addmm_(change(left).t(), change(right))
        elif _for_gpu(self, sums):
            self.reduce_by_gpu_kernel(sums, examples)
        elif cpu_kernel.takes(self.left, self.right, sums):
            self.reduce_by_cpu_kernel(sums, examples)
        else:
            parts = max(1, self.right.shape[-1] // COLUMNS)
            columns = zip(*(total.chunk(parts, -1) for total in sums.values()))
            left, right = self.factors
            for piece, totals in zip(right.chunk(parts, -1), columns):
                part = copy.copy(self)
                part.factors = (left, piece)
                _blocks([part], dict(zip(sums, totals)), examples, self.batch)

    def reduce_by_gpu_kernel(self, sums: Mapping[str, Tensor], examples: slice) -> None:
        """`reduce` of factors that `kernels` takes."""
        scale = self.arrangement.scale
        kernels.per_example_sums(
            *self.factors, dict(sums), examples, scale=None if scale is None else scale.to(torch.float32)
        )

    def reduce_by_cpu_kernel(self, sums: Mapping[str, Tensor], examples: slice, weights: Sequence[float] = ()) -> None:
        """`reduce` of factors that `cpu_kernel` takes; "weighted" among the sums is Σ_i w_i g_i, w_i = weights[i]."""
        order, scale = self.arrangement.order, self.arrangement.scale
        chosen = range(self.batch)[examples]
        cpu_kernel.per_example_sums(
            self.left,
            self.right,
            sums,
            list(chosen) if order is None else order[examples],
            None if scale is None else scale[examples],
            torch.tensor([weights[i] for i in chosen]) if "weighted" in sums else None,
            left_is_gradient=not self.transposed,
        )

    def along(self, directions: Tensor, i: int) -> Tensor:
        left, right = self._chosen(slice(i, i + 1), directions.dtype)
        return left[0].t() @ (right[0] @ directions)

    def gram(self) -> Tensor | None:
        """⟨g_i, g_j⟩ [B, B] in float64, by Σ_{t,s} (e_it · e_js)(a_it · a_js); None where `product` is cheaper."""
        count, length, width = self.factors[0].shape
        height = self.right.shape[-1]
        if count * length**2 * (width + height) >= (length + count) * width * height:
            return None
        left, right = self._chosen(slice(None), sum_dtype(self.left.dtype))
        every = [x.flatten(0, 1).t() for x in (left, right)]
        step = max(1, TILE // (count * length**2))
        rows = []
        for top in range(0, count, step):
            pairs = left[top : top + step].flatten(0, 1) @ every[0]
            pairs *= right[top : top + step].flatten(0, 1) @ every[1]
            rows.append(pairs.double().view(-1, length, count, length).sum((1, 3)))
        return torch.cat(rows)

    def _chosen(self, examples: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        order, scale = self.arrangement.order, self.arrangement.scale
        rows = examples if order is None else order[examples]
        left, right = (x[rows].to(dtype) for x in self.factors)
        return left if scale is None else left * scale[examples].to(dtype).view(-1, 1, 1), right


class TransposedLinear(Linear):
    """g_i = a_iᵀ e_i of y = a W (+ b), W [I, O]: GPT-2's Conv1D."""

    name = "transposed linear"
    transposed = True


class Embedding(Rule):
    """g_i has e_it added to row ids_it; the ids are those that autograd saved, whatever the module got."""

    name = "embedding"
    reads_output = False

    def __init__(self, call: Call, local: str) -> None:
        weight = getattr(call.module, local)
        if not is_lookup(call.node) or weight.dim() != 2 or call.node._saved_scale_grad_by_freq:
            raise Unfit
        ids, e = call.arranged(call.node._saved_indices), call.gradient()
        if len(ids) == 1 != len(e):
            ids = ids.expand(len(e), *ids.shape[1:])  # looked up once for all examples
        if ids.shape != e.shape[:-1] or ids.dim() < 2 or e.shape[-1] != weight.shape[1]:
            raise Unfit
        padding = getattr(call.module, "padding_idx", None)
        if padding is not None:  # torch gives this row no gradient
            e = e.masked_fill((ids == padding).unsqueeze(-1), 0)
        self.batch, self.rows = len(e), len(weight)
        self.ids, self.e = ids.flatten(1), e.flatten(1, -2)

    def product(self, out: Tensor, examples: slice, rows: slice, beta: int) -> None:
        if beta == 0:
            out.zero_()
        ids, e = self.ids[examples] - rows.start, self.e[examples]
        inside = (ids >= 0) & (ids < out.shape[1])
        first = torch.arange(len(ids), device=ids.device).unsqueeze(1) * out.shape[1]
        out.view(-1, out.shape[-1]).index_add_(0, (first + ids)[inside], e[inside])

    def total(self, out: Tensor, examples: slice) -> None:
        out.index_add_(0, self.ids[examples].flatten(), self.e[examples].flatten(0, 1))

    def along(self, directions: Tensor, i: int) -> Tensor:
        found = directions.new_zeros(self.rows, directions.shape[1])
        return found.index_add_(0, self.ids[i], self.e[i].to(directions.dtype) @ directions)

    def reduce(self, sums: dict[str, Tensor], examples: slice) -> None:
        """Only the rows that occur: one per pair (example, id)."""
        ids, e = self.ids[examples], self.e[examples]
        pair = ids + torch.arange(len(ids), device=ids.device).unsqueeze(1) * self.rows
        pairs, place = torch.unique(pair, return_inverse=True)
        block = e.new_zeros(len(pairs), e.shape[-1]).index_add_(0, place.flatten(), e.flatten(0, 1))
        rows = pairs % self.rows
        if "sum" in sums:
            sums["sum"].index_add_(0, rows, block)
        if "abs" in sums:
            sums["abs"].index_add_(0, rows, block.abs())
        if "square" in sums:
            sums["square"].index_add_(0, rows, block.square())


class Shift(Rule):
    """g_i = Σ_t e_it of y = … + b: a bias."""

    name = "shift"
    reads_output = False

    def __init__(self, call: Call, local: str) -> None:
        self._keep(call, call.raw_gradient(), getattr(call.module, local))

    def _keep(self, call: Call, terms: Tensor, parameter: Tensor, divisor: Tensor | None = None) -> None:
        """The terms of the sums over t, [B, …, O], made of tensors with the rows and scale of the training."""
        if terms.dim() < 2 or parameter.shape != terms.shape[-1:]:
            raise Unfit
        self.batch = len(terms)
        self.terms = terms.unsqueeze(1).flatten(1, -2)  # [B, T, O], also where the call had no T
        self.divisor = divisor  # of the sums over t, [O]
        self.arrangement = call.arrangement

    def _gradients(self, examples: slice) -> Tensor:
        if self.arrangement.untouched:
            sums = self.terms[examples].sum(1)
        else:
            sums = self.arrangement.scaled(self.arrangement.rows(self.terms.sum(1)))[examples].clone()
        return sums if self.divisor is None else sums.div_(self.divisor)

    def product(self, out: Tensor, examples: slice, rows: slice, beta: int) -> None:
        put(out, self._gradients(examples)[:, rows], beta)

    def total(self, out: Tensor, examples: slice) -> None:
        out.add_(self._gradients(examples).sum(0))

    def reduce(self, sums: dict[str, Tensor], examples: slice) -> None:
        fold(self._gradients(examples), sums)


class Scale(Shift):
    """g_i = Σ_t e_it d_it of y = w ⊙ d(x) + c(x), any norm's weight; d is ∂y/∂w in the direction of ones."""

    name = "scale"
    reruns = True

    def __init__(self, call: Call, local: str) -> None:
        x, e, weight = call.raw_tensor(), call.raw_gradient(), getattr(call.module, local).detach()
        if weight.shape != e.shape[-1:]:
            raise Unfit
        d = torch.func.jvp(lambda w: call.again(x, {local: w}), (weight,), (torch.ones_like(weight),))[1]
        d = call.by_example(d.to(e.dtype))
        if d.shape != e.shape:
            raise Unfit
        self._keep(call, d * e, weight)


class Gain(Scale):
    """The same for y = w ⊙ d(x), an RMSNorm's weight: g_i = (Σ_t e_it y_it) / w, since y is there already."""

    name = "gain"
    reads_output = True

    def __init__(self, call: Call, local: str) -> None:
        if sum(p is not None for p in call.module._parameters.values()) > 1:
            raise Unfit  # a bias is in y
        weight, y = getattr(call.module, local).detach(), call.raw_result()
        if y is None or bool((weight.abs() < 1e-6).any()):  # no d from this y
            super().__init__(call, local)
            return
        e = call.raw_gradient()
        self._keep(call, call.by_example(y.to(e.dtype)) * e, weight, weight.to(e.dtype))


class Held(Rule):
    """All per-example gradients [B, …], as they are."""

    name = "held"

    def __init__(self, grads: Tensor) -> None:
        self.batch, self.grads = len(grads), grads if grads.dim() > 1 else grads.unsqueeze(1)  # a number has one row

    def product(self, out: Tensor, examples: slice, rows: slice, beta: int) -> None:
        put(out, self.grads[examples, rows], beta)


class Replay(Held):
    """The module is run again per example (vmap) and differentiated: any small parameter of any module."""

    name = "replay"
    reads_output = False
    reruns = True

    def __init__(self, call: Call, local: str) -> None:
        x, parameter = call.tensor(), getattr(call.module, local).detach()
        if parameter.numel() > REPLAYED or parameter.dim() == 0 or call.flat:
            raise Unfit

        def gradient(x: Tensor, e: Tensor) -> Tensor:
            again = lambda w: call.again(x.unsqueeze(0), {local: w}).to(e.dtype)
            return torch.func.vjp(again, parameter)[1](e.unsqueeze(0))[0]

        grads = torch.vmap(gradient)(x, call.gradient())  # (which can't trace everything, e.g. a branch on the data)
        super().__init__(grads.to(sum_dtype(grads.dtype)))


def made(rule: type[Rule], call: Call, local: str) -> Rule:
    """The rule for this use of the parameter.

    Raises:
        Unfit: it does not know this use, or fails on it, in whatever way.
    """
    if rule.reruns and not call.repeatable:
        raise Unfit
    with fitting():
        return rule(call, local)


@contextmanager
def fitting() -> Iterator[None]:
    """A rule at work on a module that may be of any kind: what it stumbles over says that it does not fit."""
    try:
        yield
    except (Unfit, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as why:
        raise Unfit from why


def main_output(output: Any, rows: Container[int]) -> int | None:
    """Place, among the leaves of a module's output, of the first tensor with a gradient and so many rows."""
    for place, x in enumerate(tree_leaves(output)):
        if isinstance(x, Tensor) and x.requires_grad and x.dim() and len(x) in rows:
            return place
    return None


def is_lookup(node: Any) -> bool:
    return node is not None and node.name() == "EmbeddingBackward0"


def reduce(
    uses: Sequence[Rule],
    sums: dict[str, Tensor],
    examples: slice,
    totals: bool = True,
    weighted: Tensor | None = None,
    weights: Sequence[float] = (),
) -> None:
    """Add the sums over `examples` of the per-example gradients of one parameter.

    Args:
        uses: all uses of the parameter in the batch, added before the absolute value; none: nothing to add.
        sums: what is added to: "sum" Σg, "abs" Σ|g| and "square" Σg², those that are wanted, each of the
            parameter's shape, in `sum_dtype` of the parameter's.
        examples: which of the batch.
        totals: where "sum" is all that is wanted, it may be had without work per example.
        weighted: where given, Σ_i w_i g_i of the same products is added to it.
        weights: w_i of all examples of the batch.

    Raises:
        Unfit: a rule found only now that it does not fit; nothing has been added.
    """
    if any(use.lazy for use in uses):
        apart = {name: torch.zeros_like(total) for name, total in sums.items()}
        with fitting():
            _blocks(uses, apart, examples, uses[0].batch) if len(uses) > 1 else uses[0].reduce(apart, examples)
        for name, total in sums.items():
            total.add_(apart[name])
    elif totals and weighted is None and list(sums) == ["sum"]:
        for use in uses:
            use.total(sums["sum"], examples)
    elif weighted is None and (linear := _tied(uses, sums, examples)):
        _reduce_tied(linear, uses, sums, examples)
    elif weighted is not None:
        every = sums | {"weighted": weighted}
        if len(uses) == 1 and isinstance(uses[0], Linear) and cpu_kernel.takes(uses[0].left, uses[0].right, every):
            uses[0].reduce_by_cpu_kernel(every, examples, weights)
        else:
            _blocks(uses, sums, examples, uses[0].batch, weighted, weights)
    elif len(uses) == 1:
        uses[0].reduce(sums, examples)
    elif uses:
        _blocks(uses, sums, examples, uses[0].batch)


def _tied(uses: Sequence[Rule], sums: Mapping[str, Tensor], examples: slice) -> Linear | None:
    """The product among the uses of a tied embedding, if a kernel takes it and most rows are not looked up."""
    products = [use for use in uses if type(use) is Linear]
    lookups = [use for use in uses if isinstance(use, Embedding)]
    if len(products) != 1 or not lookups or len(products) + len(lookups) != len(uses):
        return None
    linear = products[0]
    few = sum(use.ids[examples].numel() for use in lookups) < linear.left.shape[-1] // 2
    return linear if few and (_for_gpu(linear, sums) or cpu_kernel.takes(linear.left, linear.right, sums)) else None


def _for_gpu(linear: Linear, sums: Mapping[str, Tensor]) -> bool:
    """Whether the GPU's kernel takes a product and its sums."""
    return linear.on_gpu and all(total.dtype == torch.float32 for total in sums.values())


def _reduce_tied(linear: Linear, uses: Sequence[Rule], sums: Mapping[str, Tensor], examples: slice) -> None:
    """Add the sums of a tied embedding: rows that no example looks up have the product's gradient alone, which the
    kernel folds; in the others the uses are added before."""
    lookups = [use for use in uses if isinstance(use, Embedding)]
    looked_up = torch.cat([use.ids[examples].flatten() for use in lookups]).unique()
    apart = {name: total[looked_up] for name, total in sums.items()}
    if _for_gpu(linear, sums):
        linear.reduce_by_gpu_kernel(sums, examples)
    else:
        linear.reduce_by_cpu_kernel(sums, examples)
    parts: list[Rule] = []
    for use in uses:
        part = copy.copy(use)
        if isinstance(part, Linear):
            left, right = linear.factors
            part.factors = (left[..., looked_up], right)
        elif isinstance(part, Embedding):
            part.rows, part.ids = len(looked_up), torch.searchsorted(looked_up, part.ids)
        parts.append(part)
    _blocks(parts, apart, examples, linear.batch)
    for name, total in sums.items():
        total[looked_up] = apart[name]


def fold(block: Tensor, sums: dict[str, Tensor]) -> None:
    """Add the gradients in block [c, …] to the sums […]. The block is used up."""
    single = len(block) == 1  # one example's is not copied
    block = block[0] if single else block
    if "sum" in sums:
        sums["sum"].add_(block if single else block.sum(0))
    if "abs" in sums:
        block.abs_()
        sums["abs"].add_(block if single else block.sum(0))
    if "square" in sums:
        if single:
            sums["square"].addcmul_(block, block)
        else:
            sums["square"].add_(block.square_().sum(0))


def _blocks(
    uses: Sequence[Rule],
    sums: dict[str, Tensor],
    examples: slice,
    batch: int,
    weighted: Tensor | None = None,
    weights: Sequence[float] = (),
) -> None:
    """Fold the added uses into the sums, block by block: `c` examples times `r` rows of the parameter."""
    like = next(iter(sums.values()))
    row = max(1, like[0].numel())
    tile_size, small = (GPU_TILE, GPU_TILE) if like.is_cuda else (TILE, SMALL)
    r = min(len(like), max(ROWS, tile_size // row))
    start, stop, step = examples.indices(batch)
    count = len(range(start, stop, step))
    c = max(1, min(count, tile_size // (r * row))) if r * row <= small else 1
    scratch = like.new_empty(c * r * row)
    for top in range(0, len(like), r):
        rows = slice(top, min(top + r, len(like)))
        height = rows.stop - rows.start
        tile = {name: total[rows] for name, total in sums.items()}
        weighted_tile = None if weighted is None else weighted[rows]
        blocks = scratch[: c * height * row].view(c, height, *like.shape[1:])
        for done in range(0, count, c):
            n = min(c, count - done)
            chosen = slice(start + done * step, start + (done + n - 1) * step + 1, step)
            block = blocks[:n]
            for beta, use in enumerate(uses):
                use.product(block, chosen, rows, min(beta, 1))
            if weighted_tile is not None:
                for k in range(n):
                    weighted_tile.add_(block[k], alpha=weights[chosen.start + k * step])
            fold(block, tile)


def put(out: Tensor, value: Tensor, beta: int) -> None:
    out.copy_(value) if beta == 0 else out.add_(value)  # not beta · out: fresh scratch may hold NaN


def _occupied(left: Tensor, right: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    """left, right [B, T', …] without positions where e is zero: padding, and after the last target.

    T' is the most that any example of the batch has; where that saves little, nothing is moved.
    """
    left, right, e = (x.unsqueeze(1).flatten(1, -2) for x in (left, right, e))
    if int((e[..., :8] != 0).any(-1).sum(1).max()) > 0.8 * e.shape[1]:
        return left, right  # few columns tell it: no need to read all of them
    occupied = (e != 0).any(-1)
    longest = max(1, int(occupied.sum(1).max()))  # e may be zero all over, as before an adapter that is at its start
    if longest > 0.8 * occupied.shape[1]:
        return left, right
    kept = occupied.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :longest]
    kept = (kept + torch.arange(len(kept), device=kept.device).unsqueeze(1) * occupied.shape[1]).flatten()
    left, right = (x.flatten(0, 1)[kept].view(len(x), longest, -1) for x in (left, right))
    return left, right
