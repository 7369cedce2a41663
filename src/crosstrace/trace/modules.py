"""Rules for modules that multiply in other ways than a linear layer, and the list of all rules.

`Convolution` and `ChannelShift` serve nn.Conv1d, `Experts` the three-dimensional parameters of
mixture-of-experts layers, and `Alone` whatever has no rule of its own. How to add one: docs/rules.md.

Three things have no rule here: two- and three-dimensional convolutions, experts behind a norm of their own, and modules
whose examples see each other. `Alone` or, in the end, the engine's general path serves those.

Shapes: as in rules.py; K taps of a filter, E experts, N = B·T tokens, P pairs of a token and one of its experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from crosstrace.trace import cpu_kernel
from crosstrace.trace.blocks import fold, put, sum_dtype
from crosstrace.trace.calls import Call, Unfit
from crosstrace.trace.rules import Embedding, Gain, Linear, Replay, Rule, Scale, Shift, TransposedLinear


class ChannelShift(Shift):
    """g_i = Σ_t e_it of y [B, O, T] = … + b: the bias of a convolution."""

    name = "channel shift"

    def __init__(self, call: Call, local: str) -> None:
        e = call.raw_gradient()
        if e.dim() < 3:
            raise Unfit
        self._keep(call, e.movedim(1, -1), getattr(call.module, local))


class Convolution(Rule):
    """g_i[o, c, k] = Σ_t e_i[o, t] x_i[c, stride·t + dilation·k] of nn.Conv1d, c a channel of o's group."""

    name = "convolution"
    reads_output = False

    def __init__(self, call: Call, local: str) -> None:
        module = call.module
        if not isinstance(module, nn.Conv1d) or local != "weight":
            raise Unfit
        x, e = call.by_example(call.tensor()), call.gradient()
        if x.dim() != 3 or e.dim() != 3 or x.shape[1] != module.in_channels or e.shape[1] != module.out_channels:
            raise Unfit
        (taps,), (stride,), (dilation,) = module.kernel_size, module.stride, module.dilation
        span = dilation * (taps - 1) + 1  # positions that one output sees
        if module.padding == "same":
            padding = ((span - 1) // 2, span - 1 - (span - 1) // 2)
        else:
            padding = (0, 0) if module.padding == "valid" else (int(module.padding[0]),) * 2
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = nn.functional.pad(x.to(e.dtype), padding, mode=mode)
        if x.shape[-1] < span:
            raise Unfit
        windows = x.unfold(-1, span, stride)[..., ::dilation]  # [B, I, T, K], a view
        if windows.shape[2] != e.shape[2]:
            raise Unfit
        self.batch, self.e = len(e), e
        self.group_rows = module.out_channels // module.groups  # rows of the parameter in one group
        self.windows = windows.unflatten(1, (module.groups, -1))  # [B, groups, I / groups, T, K]

    def product(self, out: Tensor, examples: slice, rows: slice, beta: int) -> None:
        top = rows.start
        while top < rows.stop:  # as many whole groups at once as there are, else a part of one
            whole_groups = (rows.stop - top) // self.group_rows if top % self.group_rows == 0 else 0
            groups = max(1, whole_groups)
            rest = min(self.group_rows - top % self.group_rows, rows.stop - top)
            height = self.group_rows if whole_groups else rest
            bottom = top + groups * height
            first = top // self.group_rows
            left = self.e[examples, top:bottom].unflatten(1, (groups, height))
            right = self.windows[examples, first : first + groups].transpose(2, 3).flatten(3)  # [c, groups, T, …]
            value = left @ right
            part = out[:, top - rows.start : bottom - rows.start]
            put(part, value.view(part.shape), beta)
            top = bottom


class Experts(Rule):
    """The expert layers of transformers 5: g_i[x] = Σ left ⊗ right over example i's tokens that x serves.

    For the pairs (token, expert) that the gradient reaches, the module's computation is repeated from its input to the
    products: up projection, its own gate, routing weights. Pairs are sorted by expert and example, so that an expert
    costs only the examples routed to it.
    """

    name = "experts"
    reads_output = False

    def __init__(self, call: Call, local: str) -> None:
        module, parameters = call.module, call.module._parameters
        up_name = "gate_up_proj" if "gate_up_proj" in parameters else "up_proj"
        up_weight, down_weight = parameters.get(up_name), parameters.get("down_proj")
        if up_weight is None or down_weight is None or up_weight.dim() != 3 or down_weight.dim() != 3:
            raise Unfit
        known = (up_name, "down_proj", f"{up_name}_bias", "down_proj_bias")
        if any(p is not None and name not in known for name, p in parameters.items()):
            raise Unfit
        if local not in known or getattr(module, "has_post_expert_norm", False):
            raise Unfit
        up_bias, down_bias = parameters.get(f"{up_name}_bias"), parameters.get("down_proj_bias")
        hidden, index, share = self._read_arguments(call)
        e = call.gradient().flatten(0, -2)  # [N, H]
        count, width = len(up_weight), hidden.shape[-1]
        if e.shape != hidden.shape:
            raise Unfit
        transposed = getattr(module, "is_transposed", up_weight.shape[2] != width)
        up, down = up_weight.detach(), down_weight.detach()
        if not transposed:
            up, down = up.transpose(1, 2), down.transpose(1, 2)  # [E, H, …] and [E, I, H], as y = x W
        if up.shape[1] != width or down.shape[2] != width:
            raise Unfit

        self.batch, self.count = call.flat[0] if call.flat else len(hidden), count
        reached = (e.abs().amax(-1, keepdim=True) != 0) & (index < count) & (share != 0)  # (number E: no expert here)
        token, slot = reached.nonzero(as_tuple=True)
        expert, example = index[token, slot], token // (len(hidden) // self.batch)
        order = (expert * self.batch + example).argsort(stable=True)
        token, slot, self.expert, self.example = token[order], slot[order], expert[order], example[order]
        x, weight = hidden[token], share[token, slot].unsqueeze(-1)
        d = e[token] * weight.to(e.dtype)  # the gradient of the down projection's output [P, H]

        a = x.new_empty(len(x), up.shape[2])
        for number, rows in self._groups():
            torch.matmul(x[rows], up[number], out=a[rows])
        if up_bias is not None:
            a += up_bias.detach()[self.expert]
        z, back = torch.func.vjp(_find_gate(module, up_name), a)[:2]
        if z.shape != (len(x), down.shape[1]):
            raise Unfit
        if local.startswith("down"):
            left, right = z.to(e.dtype), d
        else:
            dz = torch.empty_like(z)
            for number, rows in self._groups():
                torch.matmul(d[rows].to(z.dtype), down[number].t(), out=dz[rows])
            left, right = x.to(e.dtype), back(dz)[0].to(e.dtype)
        if local.endswith("_bias"):
            if (up_bias if local.startswith(up_name) else down_bias) is None:
                raise Unfit
            self.left, self.right, self.flat = right, right.new_ones(len(right), 1), True
        else:
            self.left, self.right, self.flat = (left, right, False) if transposed else (right, left, False)

    def _read_arguments(self, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [N, H], the numbers of their experts [N, k] and the weights of these [N, k]."""
        tensors = call.tensors()
        indices = [x for x in tensors if not x.is_floating_point()]
        if len(tensors) != 3 or len(indices) != 1 or any(x.dim() != 2 for x in tensors):
            raise Unfit
        shares = [x for x in tensors if x.is_floating_point() and x.shape == indices[0].shape]
        hidden = [x for x in tensors if x.is_floating_point() and x.shape != indices[0].shape]
        if len(shares) != 1 or len(hidden) != 1:
            raise Unfit
        return hidden[0], indices[0], shares[0]

    def _groups(self, pairs: Tensor | None = None) -> Iterator[tuple[int, slice]]:
        """Each expert that has some of the pairs (None: of all), with its slice of them."""
        expert = self.expert if pairs is None else self.expert[pairs]
        sizes = torch.bincount(expert, minlength=self.count).tolist()
        start = 0
        for number, size in enumerate(sizes):
            if size:
                yield number, slice(start, start + size)
            start += size

    def _pairs_of(self, examples: slice) -> Tensor:
        """The pairs that belong to `examples`, in order."""
        is_chosen = torch.zeros(self.batch, dtype=torch.bool, device=self.example.device)
        is_chosen[examples] = True
        return is_chosen[self.example].nonzero().squeeze(1)

    def _matrix(self, sums: Tensor) -> Tensor:
        return sums.unsqueeze(-1) if self.flat else sums

    def product(self, out: Tensor, examples: slice, rows: slice, beta: int) -> None:
        if beta == 0:
            out.zero_()
        block = self._matrix(out)
        for index, i in enumerate(range(self.batch)[examples]):
            pairs = self._pairs_of(slice(i, i + 1))
            left, right = self.left[pairs], self.right[pairs]
            for number, group in self._groups(pairs):
                if rows.start <= number < rows.stop:
                    block[index, number - rows.start].addmm_(left[group].t(), right[group])

    def total(self, out: Tensor, examples: slice) -> None:
        pairs = self._pairs_of(examples)
        for number, group in self._groups(pairs):
            self._matrix(out)[number].addmm_(self.left[pairs[group]].t(), self.right[pairs[group]])

    def along(self, directions: Tensor, i: int) -> Tensor:
        width = 1 if self.flat else self.left.shape[1]
        products = directions.new_zeros(self.count, width, directions.shape[1])
        pairs = self._pairs_of(slice(i, i + 1))
        left, right = (x[pairs].to(directions.dtype) for x in (self.left, self.right))
        if self.flat:
            left, right = right, left
        for number, group in self._groups(pairs):
            products[number] = left[group].t() @ (right[group] @ directions)
        return products.squeeze(1) if self.flat else products

    def reduce(self, sums: dict[str, Tensor], examples: slice) -> None:
        """Expert by expert, over the examples routed to it alone."""
        pairs = self._pairs_of(examples)
        for number, group in self._groups(pairs):
            of_expert = pairs[group]
            routed = _Routed(self.left[of_expert], self.right[of_expert], self.example[of_expert])
            routed.reduce({name: self._matrix(total)[number] for name, total in sums.items()}, slice(None))


class _Routed(Rule):
    """One expert's pairs, sorted by example: a batch of the examples that occur, filled up with zeros."""

    def __init__(self, left: Tensor, right: Tensor, example: Tensor) -> None:
        _, row, sizes = torch.unique_consecutive(example, return_inverse=True, return_counts=True)
        self.batch = len(sizes)
        position = torch.arange(len(example), device=example.device) - (sizes.cumsum(0) - sizes)[row]
        longest = int(sizes.max())
        self.left = left.new_zeros(self.batch, longest, left.shape[1])
        self.right = right.new_zeros(self.batch, longest, right.shape[1])
        self.left[row, position], self.right[row, position] = left, right

    def product(self, out: Tensor, examples: slice, rows: slice, beta: int) -> None:
        left = self.left[examples, :, rows].transpose(1, 2)
        torch.baddbmm(out, left, self.right[examples], beta=beta, out=out)

    def reduce(self, sums: dict[str, Tensor], examples: slice) -> None:
        if cpu_kernel.takes(self.left, self.right, sums):
            cpu_kernel.per_example_sums(self.left, self.right, sums, range(self.batch)[examples])
        else:
            super().reduce(sums, examples)


def _find_gate(module: Any, up_name: str) -> Callable[[Tensor], Tensor]:
    """The module's own function from the up projection [P, 2I] (or [P, I]) to the down projection's input."""
    if up_name == "gate_up_proj" and hasattr(module, "_apply_gate"):
        return module._apply_gate
    if not hasattr(module, "act_fn"):
        raise Unfit
    if up_name == "up_proj":
        return module.act_fn

    def gate(a: Tensor) -> Tensor:
        gate, up = a.chunk(2, dim=-1)
        return module.act_fn(gate) * up

    return gate


class Alone(Rule):
    """The module is run again for one example at a time: any parameter of any module that keeps examples apart.

    A tensor argument with a row (or T rows) per example is cut. Any other is taken as shared by all examples. That is
    a guess, which a later batch may refute (T = B by chance). So one example must first give the recorded output again,
    with None in place of a cache.

    One run serves all parameters of the call: the sums of the others are kept until they are needed. A tensor with
    several uses has to be run again for each of its blocks.
    """

    name = "alone"
    reruns = True
    lazy = True
    nested = True

    def __init__(self, call: Call, local: str) -> None:
        if not call.name:
            raise Unfit  # the whole model: the general path does the same
        self.call, self.local = call, local
        self.batch, self.height = call.flat or (call.rows, 1)
        if "fits" not in call.kept:
            call.kept["fits"] = False  # also where it fails
            call.kept["fits"] = self._gives_output_again()
        if not call.kept["fits"]:
            raise Unfit

    def _gives_output_again(self) -> bool:
        """Whether the example with the largest gradient gives the recorded output again."""
        y, e = self.call.result(), self._gradient()
        if y is None:
            return False
        i = int(e.flatten(1).abs().amax(1).argmax()) // self.height
        rows = self._rows(i)
        again = self._run(i).detach()
        y, reached = y[rows], e[rows] != 0  # elsewhere, e.g. at padding, it may give anything
        if again.shape != y.shape:
            return False
        difference, size = (torch.where(reached, x, 0).norm() for x in (again - y, y))
        return bool(difference <= max(torch.finfo(y.dtype).eps ** 0.5, 1e-6) * size)

    def _gradient(self) -> Tensor:
        """e as the module gave its output, [B, …] or [B·T, …]."""
        if "e" not in self.call.kept:  # every example needs it
            e = self.call.gradient()
            self.call.kept["e"] = e if self.call.flat is None else e.flatten(0, 1)
        return self.call.kept["e"]

    def _rows(self, i: int) -> slice:
        return slice(i * self.height, (i + 1) * self.height)

    def _run(self, i: int) -> Tensor:
        def cut(x: Tensor) -> Tensor:
            x = x.detach()
            if x.dim() and len(x) == self.batch * self.height:
                return x[self._rows(i)]
            return x[i : i + 1] if x.dim() and len(x) == self.batch else x

        args, kwargs = self.call.arguments(cut)
        with torch.enable_grad(), self.call.as_it_was():
            return tree_leaves(self.call.module(*args, **kwargs))[self.call.output_index]

    def _gradients(self, i: int, parameters: list[Tensor]) -> tuple[Tensor | None, ...]:
        output = self._run(i)
        e = self._gradient()[self._rows(i)].to(output.dtype)
        return torch.autograd.grad(output, parameters, e, allow_unused=True)

    def product(self, out: Tensor, examples: slice, rows: slice, beta: int) -> None:
        parameter = self.call.module.get_parameter(self.local)
        for block, i in zip(out, range(self.batch)[examples]):
            (gradient,) = self._gradients(i, [parameter])
            put(block, torch.zeros_like(block) if gradient is None else torch.atleast_1d(gradient)[rows], beta)

    def total(self, out: Tensor, examples: slice) -> None:
        self.reduce({"sum": out}, examples)

    def reduce(self, sums: dict[str, Tensor], examples: slice) -> None:
        kept = self.call.kept.setdefault((examples.start, examples.stop, examples.step, *sums), {})
        if self.local not in kept:
            kept.update(self._compute_sums(list(sums), examples))
        for name, total in kept.pop(self.local).items():
            sums[name].add_(total)

    def _compute_sums(self, kinds: list[str], examples: slice) -> dict[str, dict[str, Tensor]]:
        """The sums of these kinds, of all the call's parameters."""
        parameters = {local: self.call.module.get_parameter(local) for local in self.call.locals}
        sums = {
            local: {kind: torch.zeros_like(p, dtype=sum_dtype(p.dtype)) for kind in kinds}
            for local, p in parameters.items()
        }
        for i in range(self.batch)[examples]:
            for (local, p), gradient in zip(parameters.items(), self._gradients(i, list(parameters.values()))):
                if gradient is not None:  # (a copy: it may be e itself, and a block is used up)
                    fold(gradient.to(sum_dtype(p.dtype), copy=True).unsqueeze(0), sums[local])
        return sums

    def magnitude(self) -> Rule:
        return self  # autograd's own gradient is rounded as much as what it is compared with


# Cheapest first. The last is tried only where no other is right.
RULES: list[type[Rule]] = [
    Linear,
    TransposedLinear,
    Embedding,
    Shift,
    ChannelShift,
    Gain,
    Scale,
    Convolution,
    Experts,
    Replay,
    Alone,
]
