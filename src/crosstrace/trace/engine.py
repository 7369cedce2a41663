"""The trace engine: sums over examples of per-example gradients, at the price of one batched backward.

Forward hooks record every call of a module that owns parameters. One backward of Σ_i ℓ_i to those calls' outputs gives
the gradients e; it computes no weight gradient and touches no `.grad`. The rules turn (input, e) into sums as soon as
the last use of a parameter has its e. Which rule serves a parameter is decided by a trial (see `plans`). What no rule
serves is computed one example at a time, so every parameter is exact and none is skipped.

The engine knows the model, the loss and its batches. It knows neither tasks nor measures.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

from torch import Tensor

from crosstrace.core.errors import UserError
from crosstrace.trace.batches import Batch
from crosstrace.trace.blocks import sum_dtype
from crosstrace.trace.calls import Unfit
from crosstrace.trace.memory import Estimate, Plan, Where, estimate
from crosstrace.trace.passes import undisturbed
from crosstrace.trace.plans import Forward, PlannedPasses
from crosstrace.trace.reduction import reduce
from crosstrace.trace.rules import Held, Rule

HELD = 1 << 26  # most elements of per-example gradients that are held at once for parameters without a rule
OpenSums = Callable[[str, int], AbstractContextManager[dict[str, Tensor]]]


class Engine(PlannedPasses):
    """Per-example gradient sums of every parameter of one model.

    If FSDP2 shards the model, every process runs the engine on a batch of its own, with the same plan. A forward and a
    backward gather the weights layer by layer, so the rules see them whole. One example at a time can't be traced then.

    Args:
        model: any module that maps input_ids [B, T] (and attention_mask, position_ids) to logits [B, T, V].
        names: the parameters to trace; None: all.
    """

    def run(
        self,
        batch: Batch,
        shares: Sequence[slice],
        open_sums: OpenSums,
        forward: Forward | None = None,
        order: Tensor | None = None,
    ) -> None:
        """Trace one batch.

        Args:
            batch: input_ids, attention_mask, labels [B, T]; padding may be on either side.
            shares: disjoint slices of the batch's examples, each summed by itself.
            open_sums: called once per parameter and share as (parameter, number of the share). It gives a context whose
                value are the tensors that the share's sums are added to: of "sum" Σg, "abs" Σ|g| and "square" Σg²
                those wanted, of the parameter's shape and the dtype `sum_dtype`. Nothing is divided by the number
                of examples. Leaving the context says that they are complete.
            forward: somebody else's forward of the model, to trace in place of one of the engine's own. It is taken as
                it is, and its graph is kept. What no rule serves is still computed by the engine's own forwards.
            order: [B], the row in that forward that is the batch's example 0, 1, …; None: the same rows.

        Raises:
            UserError: the batch lacks a tensor, or an example lacks a target.
        """
        batch = self.check_batch(batch)
        rows = range(len(batch["labels"]))
        refused: list[set[str]] = [set() for _ in shares]

        def add(name: str, rules: list[Rule]) -> None:
            if self.sharded and not rules:
                return
            for number, share in enumerate(shares):
                try:
                    with open_sums(name, number) as sums:
                        if rows[share]:
                            reduce(rules, sums, share)
                except Unfit:
                    if self.sharded:
                        raise self._make_refusal(name) from None
                    refused[number].add(name)

        with undisturbed(self.model):
            self._choose_plan(batch)
            missing = self._run_by_plan(batch, add) if forward is None else set()
        if forward is not None:
            missing = self._run_by_plan(batch, add, forward, order)
        with undisturbed(self.model) if missing or any(refused) else nullcontext():
            for number, share in enumerate(shares):
                names = sorted(missing | refused[number])
                if names:
                    self.add_one_by_one(batch, share, names, lambda name, number=number: open_sums(name, number))

    def visit(self, batch: Batch, use: Callable[[str, list[Rule]], None]) -> None:
        """Give each parameter's rules to `use`. They hold the batch's per-example gradients, for more than sums.

        Args:
            batch: as in `run`.
            use: called once per parameter with the rules of all its uses, whose products add up to the gradients; with
                none if the parameter has no gradient. A parameter that no rule serves comes as one that holds them.

        Raises:
            UserError: as `run`; or the model is sharded.
        """
        if self.sharded:
            raise UserError("single examples' gradients can't be had of a sharded model; load it unsharded for that")
        batch = self.check_batch(batch)
        with undisturbed(self.model):
            self._choose_plan(batch)
            missing = sorted(self._run_by_plan(batch, use), key=lambda name: self.parameters[name].numel())
            count = len(batch["labels"])
            while missing:
                size, names = HELD, []
                while missing and (not names or self.parameters[missing[0]].numel() * count <= size):
                    names.append(missing.pop(0))
                    size -= self.parameters[names[-1]].numel() * count
                held = {name: _make_zeros(self.parameters[name], count) for name in names}
                for i in range(count):
                    for name, gradient in zip(names, self.example_gradients(batch, i, names)):
                        if gradient is not None:
                            held[name][i] = gradient
                for name in names:
                    use(name, [Held(held.pop(name))])

    def visit_forward(self, batch: Batch, use: Callable[[str, list[Rule]], None], forward: Forward) -> None:
        """Give each parameter's planned rules in somebody else's forward of a batch to `use`, as `visit` does.

        A parameter that no rule serves does not come."""
        batch = self.check_batch(batch)
        with undisturbed(self.model):
            self._choose_plan(batch)
        self._run_by_plan(batch, use, forward)

    def plan_for(self, batch: Batch) -> None:
        """Choose each parameter's rule now, on this batch, if it is not known yet; `run` does so by itself."""
        batch = self.check_batch(batch)
        with undisturbed(self.model):
            self._choose_plan(batch)

    def coverage(self) -> dict[str, float]:
        """Share of the parameters per rule ("a+b": tied, two uses; "general": one example at a time)."""
        sizes: dict[str, int] = defaultdict(int)
        for name, way in self.plan.items():
            label = "general" if way is None else "+".join(rule for _, _, rule in way) or "no gradient"
            sizes[label] += self.parameters[name].numel()
        total = sum(sizes.values())
        return {label: size / total for label, size in sizes.items()}

    def memory(
        self, batches: Sequence[Batch], sums: int, where: Where = "auto", passes: int | None = None
    ) -> tuple[Plan, Estimate]:
        """What a trace of these batches will need, and how it is best taken (see `memory.estimate`)."""
        batches = [self.check_batch(batch) for batch in batches]
        with undisturbed(self.model):
            losses = partial(self.losses, only_targets=True)
            return estimate(self.model, losses, batches, sums, where, passes, self.parameters)


def _make_zeros(parameter: Tensor, count: int) -> Tensor:
    return parameter.new_zeros((count, *parameter.shape), dtype=sum_dtype(parameter.dtype))
