"""Tries whether a map of heads or neurons holds: perturbing a unit must move its own columns, and no others.

A *map* says which rows of some projections belong to which unit (a head or a neuron), and which columns of the output
projection's input the unit reaches. `refuted` tries all maps of a model in one forward of a few tokens. In that forward
every projection named in a map is a stand-in that gives random numbers instead of W x. Each example of the batch is the
same text; in each, other units have other numbers. The output projections give zeros. So

- an example in which unit u is perturbed differs from the first one in u's rows alone;
- nothing that a layer computes reaches the next one, so all layers are tried at once;
- the large weights are neither multiplied nor changed.

Which units are perturbed in which example follows the bits of their numbers: for each bit, the units that have it, and
the units that don't. Any two units differ in a bit, so a column that moves in no example without its own unit depends
on that unit alone. n units take 2 log2(n) examples. Some examples are left unperturbed: how far these differ is the
noise of the kernels, above which a difference counts.

`owned` then asks which units the other parameters between the projections (sinks, norms, gates, scales) move. A
backward from the columns of some units gives a gradient of exactly zero to whatever these columns do not depend on, and
the bits of the units' numbers again tell every unit apart.

It knows no architecture and no names; what it is given to try comes from `anatomy.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from crosstrace.core.pieces import is_sharded
from crosstrace.models.forward import accepted

TOKENS = 8
BITS = 3  # at least so many are tried, so that each unit is perturbed by several draws
NOISE = 4.0  # a column moved if it changed by more than so many times what equal examples differ by


@dataclass(frozen=True)
class Rows:
    """The rows of one projection that belong to units, and the columns that these units reach.

    Attributes:
        name: what a message calls them, e.g. "the rows of q_proj".
        unit: the kind of unit: "query_head", "kv_head" or "neuron".
        projection: the module whose output has these rows.
        of_row: for each row its unit, or -1: int64 [rows].
        of_column: for each column of the output projection's input its unit, or -1: int64 [columns].
        reaches_later: whether perturbing one token moves later tokens; None if it does not matter. It tells queries
            (False) from keys (True) where both are parts of one projection.
        mixes: whether a quarter of a unit's rows moves most of the unit's columns, as rows of Q or K do through the
            softmax. It tells one head from several that were taken for one.
    """

    name: str
    unit: str
    projection: nn.Module
    of_row: Tensor
    of_column: Tensor
    reaches_later: bool | None = None
    mixes: bool = False

    @property
    def units(self) -> int:
        return int(max(self.of_row.max(), self.of_column.max())) + 1


@dataclass(frozen=True)
class Map:
    """What is claimed of one attention module or MLP.

    Attributes:
        home: the module that holds the projections.
        output: its output projection.
        rows: the claims, each to be tried by itself.
    """

    home: nn.Module
    output: nn.Module
    rows: tuple[Rows, ...]


@dataclass(frozen=True)
class Owned:
    """A parameter that belongs to units, besides the projections.

    Attributes:
        map: of the attention module or MLP.
        parameter: the tensor.
        unit: the kind of unit; None if it moves columns, but those of no single unit.
        axis: along which its units lie; None if the whole tensor belongs to one unit.
        ids: the unit of each place along the axis: int64 [size], or [] for a whole tensor.
    """

    map: Map
    parameter: Tensor
    unit: str | None
    axis: int | None = None
    ids: Tensor = field(default_factory=lambda: torch.tensor(-1))


def untriable(model: nn.Module) -> str | None:
    """Why nothing can be tried with this model, or None."""
    if is_sharded(model):
        return "the model's weights lie in pieces on several processes, so no map of them was tried"
    if any(p.is_meta or isinstance(p, FakeTensor) for p in model.parameters()):
        return "the model's weights have no numbers here, so no map of them was tried"
    return None


def refuted(model: nn.Module, decoder: nn.Module, maps: Sequence[Map]) -> tuple[list[str | None], dict[int, set[str]]]:
    """Try maps.

    Maps of the same home are alternatives; each is tried by itself.

    Args:
        model: the whole model; its modes, random state, hooks and weights are left as they were.
        decoder: the part of it that is run, without the unembedding.

    Returns:
        for each map, what speaks against it, None if it holds; and for each module (by id) inside the homes that has
        parameters of its own, the kinds of unit whose perturbation reaches its input.
    """
    forward = _Forward(model, decoder, maps)
    return forward.verdicts(), forward.reached


def owned(model: nn.Module, decoder: nn.Module, maps: Sequence[Map], reached: Mapping[int, set[str]]) -> list[Owned]:
    """The parameters between the projections of maps that hold, and which units they belong to.

    A parameter that moves no column is left out.

    Args:
        maps: maps that hold, one for each home.
        reached: as `refuted` gives it.
    """
    asked = [(m, parameters) for m, parameters in _others(maps) if parameters]
    if not asked:
        return []
    forward = _Forward(model, decoder, maps, examples=1)
    everything = [p for _, parameters in asked for _, p in parameters]
    with torch.inference_mode(False), torch.enable_grad(), _differentiable(everything):
        seen = forward.run()
        return [own for m, parameters in asked for own in _owned_in(m, parameters, seen[id(m.output)], reached)]


# -------------------------------------------------------------------------------- one forward


class _Forward:
    """A forward of a few tokens with stand-ins for the projections of maps."""

    def __init__(self, model: nn.Module, decoder: nn.Module, maps: Sequence[Map], examples: int | None = None) -> None:
        self.model, self.decoder, self.maps = model, decoder, maps
        self.random = torch.Generator().manual_seed(0)
        self.problems: dict[int, str] = {}  # projection -> why its stand-in could not do
        self.seen: dict[
            int, Tensor
        ] = {}  # output projection -> its input where nothing is perturbed [1, TOKENS, width]
        self.against: dict[int, str] = {}  # number of a map -> what speaks against it
        self.called: set[int] = set()
        self.reached: dict[int, set[str]] = defaultdict(set)

        patterns: dict[int, Tensor] = {}  # number of units -> which are perturbed in which example
        self.spans: list[list[tuple[int, Tensor]]] = []  # of each map and its rows: the first example, and the patterns
        ends: dict[int, int] = defaultdict(lambda: 1)  # home -> examples that it needs; the first is without change
        self.plans: dict[int, list[tuple[int, Tensor, Rows]]] = defaultdict(list)  # projection -> its rows in maps
        for m in maps:
            spans = []
            for rows in m.rows:
                if rows.units not in patterns:
                    patterns[rows.units] = _with_blanks(_patterns(rows.units, self.random))
                pattern, start = patterns[rows.units], ends[id(m.home)]
                spans.append((start, pattern))
                self.plans[id(rows.projection)].append((start, pattern, rows))
                ends[id(m.home)] = (
                    start + len(pattern) + 2
                )  # in the last two, one token, and a quarter of each unit's rows
            self.spans.append(spans)
        self.examples = max(ends.values(), default=1) if examples is None else examples
        if self.examples == TOKENS:
            self.examples += 1  # so that a shape tells examples from tokens

    def verdicts(self) -> list[str | None]:
        """What speaks against each map."""
        try:
            with self._watched(), torch.no_grad():
                self.run()
        except Exception as error:  # a model may fail in any way
            why = str(error).strip().splitlines() or [type(error).__name__]
            return [f"it could not be tried, since a short forward fails ({why[0]})" for _ in self.maps]
        for number, m in enumerate(self.maps):
            for module, name in [*((rows.projection, rows.name) for rows in m.rows), (m.output, "the output")]:
                if id(module) in self.problems or id(module) not in self.called:
                    problem = self.problems.get(id(module), "never called")
                    self.against.setdefault(number, f"the projection of {name} is {problem}")
        return [self.against.get(number) for number in range(len(self.maps))]

    def _judge(self, number: int, x: Tensor) -> str | None:
        """What a call of a map's output projection says against it; x is its input [examples, TOKENS, columns]."""
        m = self.maps[number]
        if not bool(x.isfinite().all()):
            return "what goes into the output projection is not finite"
        blank = [start + i for start, pattern in self.spans[number] for i in (~pattern.any(1)).nonzero()[:, 0].tolist()]
        noise = float((x[blank] - x[:1]).abs().max())
        for rows, (start, pattern) in zip(m.rows, self.spans[number]):
            stop = start + len(pattern)
            moved = _moved(x[:1], x[start:stop], noise)
            of = rows.of_column
            own = pattern[:, of] & (of >= 0)
            if bool((moved & ~own).any()):
                return f"perturbing {rows.name} moves columns of other units too"
            if not bool(moved.any(0)[of >= 0].all()):
                return f"perturbing {rows.name} does not move all of its unit's columns"
            if rows.reaches_later is not None:
                later = _moved(x[:1, TOKENS // 2 + 1 :], x[stop : stop + 1, TOKENS // 2 + 1 :], noise)
                if bool(later.any()) != rows.reaches_later:
                    return f"perturbing {rows.name} at one token does not act as queries and keys do"
            if rows.mixes:
                few = _moved(x[:1], x[stop + 1 : stop + 2], noise)[0, of >= 0]
                if 2 * int(few.sum()) <= len(few):
                    return f"some of {rows.name} move only a part of the head's columns, as if it were several heads"
        return None

    def run(self) -> dict[int, Tensor]:
        """What goes into each output projection, in its last call, where no unit is perturbed: [1, TOKENS, columns]."""
        self.seen = {}
        self.random.manual_seed(0)  # the same random numbers in each run
        device = next(self.decoder.parameters()).device
        known = _vocabulary(self.model)
        text = (torch.arange(TOKENS, 2 * TOKENS) % known).expand(self.examples, TOKENS).to(device)
        inputs = {"input_ids": text, "attention_mask": torch.ones_like(text), "use_cache": False}
        devices = [device] if device.type == "cuda" else []
        with ExitStack() as stack:
            stack.enter_context(_resting(self.model))
            stack.enter_context(torch.random.fork_rng(devices))
            projections = {id(rows.projection): rows.projection for m in self.maps for rows in m.rows}
            for projection in projections.values():
                stack.enter_context(_stand_in(projection, self._give(projection)))
            for output in {id(m.output): m.output for m in self.maps}.values():
                stack.enter_context(_stand_in(output, self._take(output)))
            self.decoder(**accepted(self.decoder, inputs))
        return self.seen

    def _give(self, projection: nn.Module) -> Callable[..., Tensor]:
        """The stand-in of a projection whose output is perturbed.

        Its random numbers are the same in each example, but for what is perturbed there. At every other token they are
        positive, so that no ReLU is off at all of them.
        """
        plans = self.plans[id(projection)]
        width = len(plans[0][2].of_row)
        drawn = torch.randn(2 * TOKENS + self.examples, width, generator=self.random)
        drawn[::2].abs_()

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self.called.add(id(projection))
            values = drawn[:TOKENS].repeat(self.examples, 1, 1)
            for start, pattern, rows in plans if self.examples > 1 else ():
                named = rows.of_row >= 0
                for example, perturbed in enumerate(pattern, start):
                    mask = perturbed[rows.of_row] & named
                    values[example][:, mask] = drawn[TOKENS + example : 2 * TOKENS + example, mask]
                last = start + len(pattern)
                values[last, TOKENS // 2, named] = drawn[TOKENS + start, named]
                if rows.mixes:
                    first = _first_quarters(rows.of_row)
                    values[last + 1][:, first] = drawn[TOKENS + start : 2 * TOKENS + start, first]
            return self._as(x, values.to(x.device, x.dtype), projection)

        return forward

    def _take(self, projection: nn.Module) -> Callable[..., Tensor]:
        """The stand-in of an output projection."""
        width = _outputs(projection)

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self.called.add(id(projection))
            values = _by_example(x, self.examples)
            if values is None:
                self.problems[id(projection)] = f"called with {list(x.shape)}, not with one row for each token"
                return x.new_zeros(*x.shape[:-1], width)
            self.seen[id(projection)] = values[:1]
            for number, m in enumerate(self.maps):
                if m.output is projection and self.examples > 1:
                    why = self._judge(number, values)
                    if why is not None:
                        self.against.setdefault(number, why)
            return x.new_zeros(*x.shape[:-1], width)

        return forward

    def _as(self, x: Tensor, values: Tensor, projection: nn.Module) -> Tensor:
        """Values [examples, TOKENS, width] in the layout in which a projection was called."""
        if _by_example(x, self.examples) is None:
            self.problems[id(projection)] = f"called with {list(x.shape)}, not with one row for each token"
            return x.new_zeros(*x.shape[:-1], values.shape[-1])
        if x.shape[:2] == (TOKENS, self.examples):
            values = values.transpose(0, 1)
        return values.reshape(*x.shape[:-1], values.shape[-1])

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Notes which kinds of unit reach the inputs of the other modules of each home."""

        def note(m: Map, spans: Sequence[tuple[int, Tensor]], module: nn.Module, args: Any, kwargs: Any) -> None:
            for x in tree_leaves((args, kwargs)):
                x = x if isinstance(x, Tensor) and x.is_floating_point() else None
                if x is None or x.numel() == 0 or x.shape[0] % self.examples:
                    continue
                by_example = x.detach().reshape(self.examples, 1, -1)
                for rows, (start, pattern) in zip(m.rows, spans):
                    blank = by_example[start : start + len(pattern)][~pattern.any(1)]
                    noise = float((blank - by_example[:1]).abs().max())
                    if bool(_moved(by_example[:1], by_example[start : start + len(pattern)], noise).any()):
                        self.reached[id(module)].add(rows.unit)

        with ExitStack() as hooks:
            for m, spans in zip(self.maps, self.spans):
                for module, _ in _owners(m, self.maps):
                    if module is not m.home:
                        hook = lambda module, args, kwargs, m=m, spans=spans: note(m, spans, module, args, kwargs)
                        hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield


# -------------------------------------------------------------------------------- other parameters


def _owned_in(
    m: Map, parameters: Sequence[tuple[nn.Module, Tensor]], columns: Tensor, reached: Mapping[int, set[str]]
) -> Iterator[Owned]:
    """The parameters of one home that move columns [1, TOKENS, width] of its output projection's input."""
    if not columns.requires_grad:
        return
    tensors = [p for _, p in parameters]
    units_of: dict[str, list[Tensor]] = {}  # unit -> for each parameter the unit that each of its numbers moves
    for rows in m.rows:
        if rows.unit not in units_of:
            units_of[rows.unit] = _moving(tensors, columns, rows.of_column, rows.units)
    for number, (owner, p) in enumerate(parameters):
        if all(bool((units[number] == NOTHING).all()) for units in units_of.values()):
            continue
        yield next(
            (
                Owned(m, p, unit, *where)
                for unit in _kinds(m, reached.get(id(owner), set()))
                if (where := _laid_out(units_of[unit][number])) is not None
            ),
            Owned(m, p, None),
        )


NOTHING, SEVERAL = -1, -2  # in place of a unit: what moves no column, and what moves those of several units


def _moving(parameters: Sequence[Tensor], columns: Tensor, of_column: Tensor, units: int) -> list[Tensor]:
    """For each number of each parameter the unit whose columns it moves, NOTHING or SEVERAL."""
    random = torch.Generator().manual_seed(0)
    weights = torch.randn(columns.shape, generator=random).to(columns)
    pattern = _patterns(units, random)
    codes = [torch.zeros(p.shape, dtype=torch.int64) for p in parameters]
    touched = [torch.zeros(p.shape, dtype=torch.bool) for p in parameters]
    one = [torch.ones(p.shape, dtype=torch.bool) for p in parameters]  # of each bit, one value and not the other
    for bit, halves in enumerate(pattern.view(-1, 2, units)):
        reached = []
        for half in halves:
            chosen = (half[of_column] & (of_column >= 0)).to(columns)
            loss = (columns * weights * chosen).sum()
            gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            reached.append([g.cpu() != 0 if g is not None else torch.zeros_like(t) for g, t in zip(gradients, touched)])
        for number, (zero, set_) in enumerate(zip(*reached)):
            codes[number] += set_.long() << bit
            touched[number] |= zero | set_
            one[number] &= zero ^ set_
    # the code of each unit, as its own pattern spells it
    spelled = (pattern.view(-1, 2, units)[:, 1].long() << torch.arange(len(pattern) // 2).view(-1, 1)).sum(0)
    of_code = torch.full((1 << len(pattern) // 2,), SEVERAL)
    of_code[spelled] = torch.arange(units)
    found = []
    for code, any_, single in zip(codes, touched, one):
        of = torch.where(single, of_code[code], torch.tensor(SEVERAL))
        found.append(torch.where(any_, of, torch.tensor(NOTHING)))
    return found


def _laid_out(units: Tensor) -> tuple[int | None, Tensor] | None:
    """How a parameter's numbers belong to units: the axis along which the units lie, and the unit of each place there.

    The axis is None if the whole parameter is of one unit. None if some number moves several units, or the units do not
    lie along an axis.
    """
    if bool((units == SEVERAL).any()):
        return None
    last = int(units.max())
    lowest = torch.where(units == NOTHING, last, units)
    if bool((lowest == last).all()):
        return None, torch.tensor(last)
    for axis in range(units.dim()):
        others = [i for i in range(units.dim()) if i != axis]
        high = units.amax(others) if others else units
        if bool(
            ((units == NOTHING) | (units == high.view([-1 if i == axis else 1 for i in range(units.dim())]))).all()
        ):
            return axis, high
    return None


def _kinds(m: Map, reached: set[str]) -> list[str]:
    """The kinds of unit that a module's parameters may belong to, the likeliest first.

    A module whose input only keys or values reach is of key/value heads; one that only queries reach, of query heads.
    A single key/value head owns only what keys or values reach: what moves every column may be of no head.
    """
    counts = {rows.unit: rows.units for rows in m.rows}
    if len(reached) == 1:
        return [unit for unit in counts if unit in reached]
    return [unit for unit, count in counts.items() if unit != "kv_head" or count > 1]


def _others(maps: Sequence[Map]) -> list[tuple[Map, list[tuple[nn.Module, Tensor]]]]:
    """Of each map the parameters inside its home that are not the projections' (of any map), each once."""
    taken: set[int] = set()
    found = []
    for m in sorted(maps, key=lambda m: sum(1 for _ in m.home.modules())):  # a home inside another one comes first
        parameters = []
        for owner, p in ((owner, p) for owner, own in _owners(m, maps) for p in own):
            if id(p) not in taken and p.is_floating_point():
                taken.add(id(p))
                parameters.append((owner, p))
        found.append((m, parameters))
    return found


def _owners(m: Map, maps: Sequence[Map]) -> list[tuple[nn.Module, list[nn.Parameter]]]:
    """The modules inside a home that have parameters of their own, without the projections of all maps."""
    projections = {id(rows.projection) for other in maps for rows in other.rows} | {id(x.output) for x in maps}
    inside = {id(x) for module in m.home.modules() if id(module) in projections for x in module.modules()}
    return [
        (module, own)
        for module in m.home.modules()
        if id(module) not in inside and (own := list(module.parameters(recurse=False)))
    ]


# -------------------------------------------------------------------------------- helpers


def _patterns(units: int, random: torch.Generator) -> Tensor:
    """Which units are perturbed in which example: bool [2 · bits, units]. The units are numbered at random."""
    bits = max(BITS, (units - 1).bit_length())
    number = torch.randperm(units, generator=random)
    return torch.stack([(number >> bit & 1) == value for bit in range(bits) for value in (0, 1)])


def _with_blanks(pattern: Tensor) -> Tensor:
    """The patterns, with one after every four in which no unit is perturbed."""
    blank = torch.zeros(1, pattern.shape[1], dtype=torch.bool)
    return torch.cat([torch.cat([four, blank]) for four in pattern.split(4)])


def _first_quarters(of_row: Tensor) -> Tensor:
    """The first quarter of each unit's rows, at least one."""
    rows = [(of_row == unit).nonzero()[:, 0] for unit in of_row.unique().tolist() if unit >= 0]
    return torch.cat([own[: max(1, len(own) // 4)] for own in rows])


def _moved(base: Tensor, others: Tensor, noise: float) -> Tensor:
    """Which columns differ from the base's [1, tokens, columns] at any token: bool [n, columns] for n others."""
    rounding = 2 * torch.finfo(torch.float32).eps * base.abs().amax((0, 1))  # (softmax and norms are never finer)
    return ((others - base).abs().amax(1) > (NOISE * noise + rounding)).cpu()


def _by_example(x: Tensor, examples: int) -> Tensor | None:
    """A projection's input as [examples, TOKENS, width], or None if it is not laid out by tokens."""
    leading = x.shape[:-1]
    if leading == (TOKENS, examples):
        return x.transpose(0, 1)
    if leading in ((examples, TOKENS), (examples * TOKENS,)):
        return x.reshape(examples, TOKENS, x.shape[-1])
    return None


def _outputs(projection: nn.Module) -> int:
    while isinstance(inner := getattr(projection, "base_layer", None), nn.Module):  # an adapter's wrapper
        projection = inner
    weight: Any = projection.weight
    return weight.shape[0] if isinstance(projection, nn.Linear) else weight.shape[1]


def _vocabulary(model: nn.Module) -> int:
    """How many tokens the model knows, as far as can be told."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    return getattr(embeddings, "num_embeddings", None) or TOKENS


@contextmanager
def _stand_in(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """The module with another forward; hooks and weights stay."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


@contextmanager
def _differentiable(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Parameters that have gradients, also those that are frozen."""
    frozen = [p for p in parameters if not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(True)
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


@contextmanager
def _resting(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; each module's own mode comes back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode
