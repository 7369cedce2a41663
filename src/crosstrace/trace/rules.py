"""Rules: how one use of a parameter turns (input a, output gradient e) into per-example gradients.

A batched backward gives, for every call of a module, its input a and the gradient e = ∂Σℓ/∂output. Example i touches
row i of both alone, so its own weight gradient is a small product of row i of a and row i of e. A rule knows that
product for one kind of use. `reduction.reduce` adds the uses of a parameter per example (tied weights!) and folds the
result into the sums.

Rules know neither models, losses nor traces. They need not be right for every module: the engine tries them against
`torch.autograd.grad`, and a parameter gets the first that agrees.

Shapes: B examples, T positions, O and I outputs and inputs, c examples of a block, r rows of a block.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from crosstrace.trace import blocks, cpu_kernel, kernels
from crosstrace.trace.blocks import add_blocks, fold, put, sum_dtype
from crosstrace.trace.calls import Arrangement, Call, Unfit, is_lookup

COLUMNS = 1024  # of a linear layer's tile, at least: products of few long rows are slow (10240 -> 2560: 260 ms, 197 so)
REPLAYED = 1 << 16  # largest parameter whose per-example gradients may all be held at once


def _same(x: Tensor) -> Tensor:
    return x


_ELEMENTWISE = {"sum": _same, "abs": torch.abs, "square": torch.square}  # f(x yᵀ) = f(x) f(y)ᵀ


class Rule:
    """One use of the parameter `local` of the called module.

    A new rule sets `name`, raises `Unfit` from its constructor where it does not apply, and writes `product`. The rest
    is optional: it only makes the rule faster.
    """

    name: str
    batch: int  # B
    reads_output = True  # whether it calls `call.result()`: only then is the module's output kept
    reruns = False  # whether it runs the module again
    lazy = False  # whether it runs the module only in `product`, so that it may turn out to be unfit then
    nested = False  # whether `local` may name a parameter of a module inside, e.g. "conv1d.weight"

    def __init__(self, call: Call, local: str) -> None:
        raise NotImplementedError

    def product(self, out: Tensor, examples: slice, rows: slice, beta: int) -> None:
        """out [c, r, …] = beta · out + the gradient of `examples`, restricted to `rows` of the parameter."""
        raise NotImplementedError

    def total(self, out: Tensor, examples: slice) -> None:
        """out (the parameter's shape) += Σ over `examples` of the gradient: no work per example."""
        add_blocks([self], {"sum": out}, examples, self.batch)

    def reduce(self, sums: dict[str, Tensor], examples: slice) -> None:
        """Fold the gradients of `examples` into `sums`, where this is the parameter's only use."""
        add_blocks([self], sums, examples, self.batch)

    def along(self, directions: Tensor, i: int) -> Tensor | None:
        """g_i v for each column v of `directions` [K, D], K the parameter's last size: [..., D].

        None where that is not cheaper than the gradient."""
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
        if self.on_gpu and self.arrangement.order is not None:  # the GPU's kernel takes the rows as they come
            left, right = self.arrangement.rows(left), self.arrangement.rows(right)
            self.arrangement = Arrangement(scale=self.arrangement.scale)
        # In their own dtype: half precision is not widened before it must be.
        self.left, self.right = (x.unsqueeze(1).flatten(1, -2) for x in (left, right))

    @functools.cached_property
    def factors(self) -> tuple[Tensor, Tensor]:
        """left [B, T', …] and right [B, T', …], without positions that no example of the batch needs.

        They have the dtype of the sums, or their own dtype for the GPU's kernel."""
        e = self.right if self.transposed else self.left
        left, right = self.left, self.right
        if not self.on_gpu:
            left, right = left.to(sum_dtype(e.dtype)), right.to(sum_dtype(e.dtype))
        return _drop_empty_positions(left, right, e)

    @functools.cached_property
    def has_one_position(self) -> bool:
        """Whether every example has at most one position with a gradient."""
        e = self.right if self.transposed else self.left
        if e.shape[1] == 1:
            return True
        few_columns = e[..., :8]  # they settle nearly every case
        return all(int((x != 0).any(-1).sum(1).max()) <= 1 for x in (few_columns, e))

    def magnitude(self) -> Rule:
        twin = super().magnitude()
        vars(twin).pop("factors", None)
        return twin

    def product(self, out: Tensor, examples: slice, rows: slice, beta: int) -> None:
        if len(out) == 1:  # a large tile: rows and scale cost nothing here
            order, scale = self.arrangement.order_numbers, self.arrangement.scale_numbers
            row = examples.start if order is None else order[examples.start]
            alpha = 1.0 if scale is None else scale[examples.start]
            left, right = (x[row : row + 1].to(out.dtype) for x in self.factors)
            torch.baddbmm(out, left[..., rows].transpose(1, 2), right, beta=beta, alpha=alpha, out=out)
            return
        left, right = self._choose_factors(examples, out.dtype)
        torch.baddbmm(out, left[..., rows].transpose(1, 2), right, beta=beta, out=out)

    def total(self, out: Tensor, examples: slice) -> None:
        left, right = (x.flatten(0, 1) for x in self._choose_factors(examples, out.dtype))
        out.addmm_(left.t(), right)

    def reduce(self, sums: dict[str, Tensor], examples: slice) -> None:
        """In one kernel, if there is one for these factors: a product then never leaves the registers.

        Every example may have one position alone: that of a single target, in the layers after the last attention. Its
        gradient is then e aᵀ, and |e aᵀ| = |e| |a|ᵀ. So one product over the batch gives Σ|g|, and another Σg².
        """
        if self.has_one_position:
            left, right = (x.squeeze(1) for x in self._choose_factors(examples, next(iter(sums.values())).dtype))
            for name, total in sums.items():
                total.addmm_(_ELEMENTWISE[name](left).t(), _ELEMENTWISE[name](right))
        elif self.fits_gpu_kernel(sums):
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
                add_blocks([part], dict(zip(sums, totals)), examples, self.batch)

    def fits_gpu_kernel(self, sums: Mapping[str, Tensor]) -> bool:
        """Whether the GPU's kernel takes this product and these sums."""
        return self.on_gpu and all(total.dtype == torch.float32 for total in sums.values())

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
        left, right = self._choose_factors(slice(i, i + 1), directions.dtype)
        return left[0].t() @ (right[0] @ directions)

    def gram(self) -> Tensor | None:
        """⟨g_i, g_j⟩ [B, B] in float64, by Σ_{t,s} (e_it · e_js)(a_it · a_js). None where `product` is cheaper."""
        count, length, width = self.factors[0].shape
        height = self.right.shape[-1]
        if count * length**2 * (width + height) >= (length + count) * width * height:
            return None
        left, right = self._choose_factors(slice(None), sum_dtype(self.left.dtype))
        left_columns, right_columns = (x.flatten(0, 1).t() for x in (left, right))
        step = max(1, blocks.TILE // (count * length**2))
        rows = []
        for top in range(0, count, step):
            pairs = left[top : top + step].flatten(0, 1) @ left_columns
            pairs *= right[top : top + step].flatten(0, 1) @ right_columns
            rows.append(pairs.double().view(-1, length, count, length).sum((1, 3)))
        return torch.cat(rows)

    def _choose_factors(self, examples: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        order, scale = self.arrangement.order, self.arrangement.scale
        rows = examples if order is None else order[examples]
        left, right = (x[rows].to(dtype) for x in self.factors)
        return left if scale is None else left * scale[examples].to(dtype).view(-1, 1, 1), right


class TransposedLinear(Linear):
    """g_i = a_iᵀ e_i of y = a W (+ b), W [I, O]: GPT-2's Conv1D."""

    name = "transposed linear"
    transposed = True


class Embedding(Rule):
    """g_i has e_it added to row ids_it. The ids are those that autograd saved, whatever the module got."""

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
        products = directions.new_zeros(self.rows, directions.shape[1])
        return products.index_add_(0, self.ids[i], self.e[i].to(directions.dtype) @ directions)

    def reduce(self, sums: dict[str, Tensor], examples: slice) -> None:
        """Only the rows that occur: one per pair (example, id)."""
        ids, e = self.ids[examples], self.e[examples]
        pair = ids + torch.arange(len(ids), device=ids.device).unsqueeze(1) * self.rows
        pairs, index = torch.unique(pair, return_inverse=True)
        block = e.new_zeros(len(pairs), e.shape[-1]).index_add_(0, index.flatten(), e.flatten(0, 1))
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
        """Keep the terms of the sums over t, [B, …, O], made of tensors with the training's rows and scale."""
        if terms.dim() < 2 or parameter.shape != terms.shape[-1:]:
            raise Unfit
        self.batch = len(terms)
        self.terms = terms.unsqueeze(1).flatten(1, -2)  # [B, T, O], also where the call had no T
        self.divisor = divisor  # of the sums over t, [O]
        self.arrangement = call.arrangement

    def _gradients(self, examples: slice) -> Tensor:
        if self.arrangement.is_identity:
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
    """g_i = Σ_t e_it d_it of y = w ⊙ d(x) + c(x), any norm's weight. d is ∂y/∂w in the direction of ones."""

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
    """The same for y = w ⊙ d(x), an RMSNorm's weight: g_i = (Σ_t e_it y_it) / w, as y is computed already."""

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
            def run_again(w: Tensor) -> Tensor:
                return call.again(x.unsqueeze(0), {local: w}).to(e.dtype)

            return torch.func.vjp(run_again, parameter)[1](e.unsqueeze(0))[0]

        grads = torch.vmap(gradient)(x, call.gradient())  # vmap fails on some modules, e.g. on a branch on the data
        super().__init__(grads.to(sum_dtype(grads.dtype)))


def make_rule(rule: type[Rule], call: Call, local: str) -> Rule:
    """The rule for this use of the parameter.

    Raises:
        Unfit: it does not know this use, or fails on it, in whatever way.
    """
    if rule.reruns and not call.repeatable:
        raise Unfit
    with raising_unfit():
        return rule(call, local)


@contextmanager
def raising_unfit() -> Iterator[None]:
    """For a rule at work on a module of any kind: whatever it fails with says that it does not fit."""
    try:
        yield
    except (Unfit, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as why:
        raise Unfit from why


def _drop_empty_positions(left: Tensor, right: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    """left, right [B, T', …] without positions where e is zero: padding, and after the last target.

    T' is the most that any example of the batch has. Where that saves little, nothing is moved.
    """
    left, right, e = (x.unsqueeze(1).flatten(1, -2) for x in (left, right, e))
    if int((e[..., :8] != 0).any(-1).sum(1).max()) > 0.8 * e.shape[1]:
        return left, right  # few columns show it: no need to read all of them
    occupied = (e != 0).any(-1)
    longest = max(1, int(occupied.sum(1).max()))  # e may be zero all over, as before an adapter at its start
    if longest > 0.8 * occupied.shape[1]:
        return left, right
    kept = occupied.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :longest]
    kept = (kept + torch.arange(len(kept), device=kept.device).unsqueeze(1) * occupied.shape[1]).flatten()
    left, right = (x.flatten(0, 1)[kept].view(len(x), longest, -1) for x in (left, right))
    return left, right
