"""A forward of a few tokens with stand-ins for a model's projections, which shows what perturbing a unit moves.

Each projection of a map gives random numbers instead of W x. Each example of the batch is the same text; in each, other
units have other numbers. The output projections give zeros. So

- an example in which unit u is perturbed differs from the first one in u's rows alone;
- nothing that a layer computes reaches the next one, so all layers are tried at once;
- the large weights are neither multiplied nor changed.

It judges nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from crosstrace.models.forward import accepted
from crosstrace.models.projections import width_of
from crosstrace.models.unit_maps import Map, Rows

TOKENS = 8
BITS = 3  # at least so many are tried, so that each unit is perturbed by several draws


class ShortForward:
    """A forward with stand-ins for the projections of maps.

    Args:
        model: the whole model.
        decoder: the part of it that is run.
        maps: whose units are perturbed.
        examples: texts of the batch; as many as the patterns need if not given. With one, nothing is perturbed.
        judge: called with a map's number and the input of its output projection [examples, TOKENS, columns].

    Attributes:
        spans: for each map and each of its rows, the number of their first example, and the pattern: which units are
            perturbed in this and the following examples.
        problems: projection (by id) -> why its stand-in could not do.
        called: the projections (by id) that the forward called.
        seen: output projection (by id) -> its input where nothing is perturbed [1, TOKENS, columns].
    """

    def __init__(
        self,
        model: nn.Module,
        decoder: nn.Module,
        maps: Sequence[Map],
        examples: int | None = None,
        judge: Callable[[int, Tensor], None] | None = None,
    ) -> None:
        self.model, self.decoder, self.maps, self.judge = model, decoder, maps, judge
        self.random = torch.Generator().manual_seed(0)
        self.problems: dict[int, str] = {}
        self.called: set[int] = set()
        self.seen: dict[int, Tensor] = {}

        patterns: dict[int, Tensor] = {}  # number of units -> which are perturbed in which example
        self.spans: list[list[tuple[int, Tensor]]] = []
        ends: dict[int, int] = defaultdict(lambda: 1)  # home -> examples that it needs; the first is without change
        self.plans: dict[int, list[tuple[int, Tensor, Rows]]] = defaultdict(list)  # projection -> its rows in maps
        for m in maps:
            spans = []
            for rows in m.rows:
                if rows.units not in patterns:
                    patterns[rows.units] = _with_blanks(draw_patterns(rows.units, self.random))
                pattern, start = patterns[rows.units], ends[id(m.home)]
                spans.append((start, pattern))
                self.plans[id(rows.projection)].append((start, pattern, rows))
                # two further examples: one token is perturbed, and a quarter of each unit's rows
                ends[id(m.home)] = start + len(pattern) + 2
            self.spans.append(spans)
        self.examples = max(ends.values(), default=1) if examples is None else examples
        if self.examples == TOKENS:
            self.examples += 1  # so that a shape tells examples from tokens

    def run(self) -> dict[int, Tensor]:
        """Run the forward; returns `seen`, of the last call of each output projection."""
        self.seen = {}
        self.random.manual_seed(0)  # the same random numbers in each run
        device = next(self.decoder.parameters()).device
        text = (torch.arange(TOKENS, 2 * TOKENS) % _vocabulary(self.model)).expand(self.examples, TOKENS).to(device)
        inputs = {"input_ids": text, "attention_mask": torch.ones_like(text), "use_cache": False}
        devices = [device] if device.type == "cuda" else []
        with ExitStack() as stack:
            stack.enter_context(_resting(self.model))
            stack.enter_context(torch.random.fork_rng(devices))
            projections = {id(rows.projection): rows.projection for m in self.maps for rows in m.rows}
            for projection in projections.values():
                stack.enter_context(_standing_in(projection, self._perturbed_forward(projection)))
            for output in {id(m.output): m.output for m in self.maps}.values():
                stack.enter_context(_standing_in(output, self._output_forward(output)))
            self.decoder(**accepted(self.decoder, inputs))
        return self.seen

    def _perturbed_forward(self, projection: nn.Module) -> Callable[..., Tensor]:
        """The stand-in of a projection whose output is perturbed.

        Its random numbers are the same in each example, but for what is perturbed there. At every other token they are
        positive, so that no ReLU is off at all of them.
        """
        plans = self.plans[id(projection)]
        width = len(plans[0][2].unit_of_row)
        drawn = torch.randn(2 * TOKENS + self.examples, width, generator=self.random)
        drawn[::2].abs_()

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self.called.add(id(projection))
            values = drawn[:TOKENS].repeat(self.examples, 1, 1)
            for start, pattern, rows in plans if self.examples > 1 else ():
                belongs = rows.unit_of_row >= 0
                for example, perturbed in enumerate(pattern, start):
                    mask = perturbed[rows.unit_of_row] & belongs
                    values[example][:, mask] = drawn[TOKENS + example : 2 * TOKENS + example, mask]
                last = start + len(pattern)
                values[last, TOKENS // 2, belongs] = drawn[TOKENS + start, belongs]
                if rows.mixes:
                    first = _first_quarters(rows.unit_of_row)
                    values[last + 1][:, first] = drawn[TOKENS + start : 2 * TOKENS + start, first]
            return self._in_layout_of(x, values.to(x.device, x.dtype), projection)

        return forward

    def _output_forward(self, projection: nn.Module) -> Callable[..., Tensor]:
        """The stand-in of an output projection."""
        width = width_of(projection, "out")

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self.called.add(id(projection))
            values = _by_example(x, self.examples)
            if values is None:
                self.problems[id(projection)] = f"called with {list(x.shape)}, not with one row for each token"
                return x.new_zeros(*x.shape[:-1], width)
            self.seen[id(projection)] = values[:1]
            if self.judge is not None and self.examples > 1:
                for number, m in enumerate(self.maps):
                    if m.output is projection:
                        self.judge(number, values)
            return x.new_zeros(*x.shape[:-1], width)

        return forward

    def _in_layout_of(self, x: Tensor, values: Tensor, projection: nn.Module) -> Tensor:
        """Values [examples, TOKENS, width] in the layout of x, with which a projection was called."""
        if _by_example(x, self.examples) is None:
            self.problems[id(projection)] = f"called with {list(x.shape)}, not with one row for each token"
            return x.new_zeros(*x.shape[:-1], values.shape[-1])
        if x.shape[:2] == (TOKENS, self.examples):
            values = values.transpose(0, 1)
        return values.reshape(*x.shape[:-1], values.shape[-1])


def draw_patterns(units: int, random: torch.Generator) -> Tensor:
    """Which units are perturbed in which example: bool [2 · bits, units].

    The units are numbered at random. For each bit of their numbers there are two examples: the units without it, and
    the units that have it.
    """
    bits = max(BITS, (units - 1).bit_length())
    number = torch.randperm(units, generator=random)
    return torch.stack([(number >> bit & 1) == value for bit in range(bits) for value in (0, 1)])


def _with_blanks(pattern: Tensor) -> Tensor:
    """The patterns, with one after every four in which no unit is perturbed."""
    blank = torch.zeros(1, pattern.shape[1], dtype=torch.bool)
    return torch.cat([torch.cat([four, blank]) for four in pattern.split(4)])


def _first_quarters(unit_of_row: Tensor) -> Tensor:
    """The first quarter of each unit's rows, at least one."""
    rows_of_units = [(unit_of_row == unit).nonzero()[:, 0] for unit in unit_of_row.unique().tolist() if unit >= 0]
    return torch.cat([rows[: max(1, len(rows) // 4)] for rows in rows_of_units])


def _by_example(x: Tensor, examples: int) -> Tensor | None:
    """A projection's input as [examples, TOKENS, width], or None if it is not laid out by tokens."""
    leading = x.shape[:-1]
    if leading == (TOKENS, examples):
        return x.transpose(0, 1)
    if leading in ((examples, TOKENS), (examples * TOKENS,)):
        return x.reshape(examples, TOKENS, x.shape[-1])
    return None


def _vocabulary(model: nn.Module) -> int:
    """How many tokens the model knows, TOKENS if it does not say."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    return getattr(embeddings, "num_embeddings", None) or TOKENS


@contextmanager
def _standing_in(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
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
def _resting(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; each module's own mode comes back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode
