"""Tries whether a map of heads or neurons holds: perturbing a unit must move its own columns, and no others.

A *map* (`unit_maps.py`) says which rows of some projections belong to which unit, and which columns of the output
projection's input the unit reaches. `try_maps` tries all maps of a model in one forward of a few tokens, in which
other units are perturbed in each example (`short_forward.py`).

The bits of the units' numbers say which units are perturbed in which example: for each bit, the units that have it, and
the units that don't. Any two units differ in a bit. So if a column moves in no example without its own unit, it depends
on that unit alone. n units take 2 log2(n) examples. Some examples are left unperturbed. They differ by the noise of the
kernels, and only a larger difference counts.

It knows no architecture and no names; the maps come from `anatomy.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from crosstrace.core.pieces import is_sharded
from crosstrace.models.short_forward import TOKENS, ShortForward
from crosstrace.models.unit_maps import Map, other_modules

NOISE = 4.0  # a column moved if it changed by more than so many times what equal examples differ by


def why_untriable(model: nn.Module) -> str | None:
    """Why nothing can be tried with this model, or None."""
    if is_sharded(model):
        return "the model's weights lie in pieces on several processes, so no map of them was tried"
    if any(p.is_meta or isinstance(p, FakeTensor) for p in model.parameters()):
        return "the model's weights have no numbers here, so no map of them was tried"
    return None


def try_maps(model: nn.Module, decoder: nn.Module, maps: Sequence[Map]) -> tuple[list[str | None], dict[int, set[str]]]:
    """Try maps.

    Maps of the same home are alternatives; each is tried by itself.

    Args:
        model: the whole model; its modes, random state, hooks and weights are left as they were.
        decoder: the part of it that is run, without the unembedding.

    Returns:
        for each map, what speaks against it, None if it holds; and for each module (by id) inside the homes that has
        parameters of its own, the kinds of unit whose perturbation reaches its input.
    """
    trial = _Trial(model, decoder, maps)
    return trial.verdicts(), trial.reached


class _Trial:
    """One forward that tries maps.

    Attributes:
        against: number of a map -> what speaks against it.
        reached: module (by id) -> the kinds of unit whose perturbation reaches its input.
    """

    def __init__(self, model: nn.Module, decoder: nn.Module, maps: Sequence[Map]) -> None:
        self.maps = maps
        self.forward = ShortForward(model, decoder, maps, judge=self._note_verdict)
        self.against: dict[int, str] = {}
        self.reached: dict[int, set[str]] = defaultdict(set)

    def verdicts(self) -> list[str | None]:
        """What speaks against each map."""
        try:
            with self._watching_inputs(), torch.no_grad():
                self.forward.run()
        except Exception as error:  # a model may fail in any way
            why = str(error).strip().splitlines() or [type(error).__name__]
            return [f"it could not be tried, since a short forward fails ({why[0]})" for _ in self.maps]
        problems, called = self.forward.problems, self.forward.called
        for number, m in enumerate(self.maps):
            for module, name in [*((rows.projection, rows.name) for rows in m.rows), (m.output, "the output")]:
                if id(module) in problems or id(module) not in called:
                    problem = problems.get(id(module), "never called")
                    self.against.setdefault(number, f"the projection of {name} is {problem}")
        return [self.against.get(number) for number in range(len(self.maps))]

    def _note_verdict(self, number: int, x: Tensor) -> None:
        why = self._judge(number, x)
        if why is not None:
            self.against.setdefault(number, why)

    def _judge(self, number: int, x: Tensor) -> str | None:
        """What a call of a map's output projection says against it; x is its input [examples, TOKENS, columns]."""
        m, spans = self.maps[number], self.forward.spans[number]
        if not bool(x.isfinite().all()):
            return "what goes into the output projection is not finite"
        blank = [start + i for start, pattern in spans for i in (~pattern.any(1)).nonzero()[:, 0].tolist()]
        noise = float((x[blank] - x[:1]).abs().max())
        for rows, (start, pattern) in zip(m.rows, spans):
            stop = start + len(pattern)
            moved = _moved(x[:1], x[start:stop], noise)
            unit = rows.unit_of_column
            expected = pattern[:, unit] & (unit >= 0)
            if bool((moved & ~expected).any()):
                return f"perturbing {rows.name} moves columns of other units too"
            if not bool(moved.any(0)[unit >= 0].all()):
                return f"perturbing {rows.name} does not move all of its unit's columns"
            if rows.reaches_later is not None:
                later = _moved(x[:1, TOKENS // 2 + 1 :], x[stop : stop + 1, TOKENS // 2 + 1 :], noise)
                if bool(later.any()) != rows.reaches_later:
                    return f"perturbing {rows.name} at one token does not act as queries and keys do"
            if rows.mixes:
                by_quarter = _moved(x[:1], x[stop + 1 : stop + 2], noise)[0, unit >= 0]
                if 2 * int(by_quarter.sum()) <= len(by_quarter):
                    return f"some of {rows.name} move only a part of the head's columns, as if it were several heads"
        return None

    @contextmanager
    def _watching_inputs(self) -> Iterator[None]:
        """Notes which kinds of unit reach the inputs of the other modules of each home."""
        with ExitStack() as hooks:
            for m, spans in zip(self.maps, self.forward.spans):
                for module, _ in other_modules(m, self.maps):
                    if module is not m.home:
                        hook = partial(self._note_reached, m, spans)
                        hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield

    def _note_reached(
        self, m: Map, spans: Sequence[tuple[int, Tensor]], module: nn.Module, args: Any, kwargs: Any
    ) -> None:
        """Note the kinds of unit whose perturbation moves a module's input."""
        examples = self.forward.examples
        for x in tree_leaves((args, kwargs)):
            x = x if isinstance(x, Tensor) and x.is_floating_point() else None
            if x is None or x.numel() == 0 or x.shape[0] % examples:
                continue
            by_example = x.detach().reshape(examples, 1, -1)
            for rows, (start, pattern) in zip(m.rows, spans):
                blank = by_example[start : start + len(pattern)][~pattern.any(1)]
                noise = float((blank - by_example[:1]).abs().max())
                if bool(_moved(by_example[:1], by_example[start : start + len(pattern)], noise).any()):
                    self.reached[id(module)].add(rows.unit)


def _moved(base: Tensor, others: Tensor, noise: float) -> Tensor:
    """Which columns differ from the base's [1, tokens, columns] at any token: bool [n, columns] for n others."""
    rounding = 2 * torch.finfo(torch.float32).eps * base.abs().amax((0, 1))  # (softmax and norms are never finer)
    return ((others - base).abs().amax(1) > (NOISE * noise + rounding)).cpu()
