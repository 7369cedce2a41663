"""The trace engine: sums over examples of per-example gradients, at the price of one batched backward.

Forward hooks record every call of a module that owns parameters; one backward of Σ_i ℓ_i to those calls'
outputs (no weight gradient is computed, no `.grad` touched) gives the gradients e; `rules` turns (input, e)
into sums as soon as the last use of a parameter has its e. Which rule serves a parameter is not guessed: on
the first batch a probe compares the rules with `torch.autograd.grad` of one or two examples alone. What no
rule serves is computed one example at a time, so every parameter is exact and none is skipped.

The engine knows the model, the loss and its batches; it knows neither tasks nor measures.
"""

from __future__ import annotations

import copy
import functools
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.distributed.tensor import DTensor

from crosstrace.core.errors import UserError
from crosstrace.core.pieces import at_rest, is_sharded
from crosstrace.models.forward import accepted, logits_at
from crosstrace.trace.memory import Estimate, Plan, Where, estimate
from crosstrace.trace.modules import RULES
from crosstrace.trace.packed import is_packed
from crosstrace.trace.probe import AGREES, Kind, Trial, Way, agree_along, along, hollow, kind_of, pair_of, settled
from crosstrace.trace.recording import OF_EVERY_MODULE, Recording, Uses, random_states
from crosstrace.trace.rules import Arrangement, Held, Rule, Unfit, fold, made, main_output, reduce, sum_dtype
from crosstrace.training.losses import aligned_losses, next_tokens, target_positions

Batch = Mapping[str, Tensor]
Owners = dict[str, dict[str, str]]  # module -> its local name of each parameter -> the canonical one
HELD = 1 << 26  # most elements of per-example gradients that are held at once for parameters without a rule
Forward = Callable[[Batch], Tensor]  # a batch -> ℓ [B], with their graph
Into = Callable[[str, int], AbstractContextManager[dict[str, Tensor]]]
# What the last engine of a model found: what the model was, and (owners, plan, order).
_PLANS: WeakKeyDictionary[nn.Module, tuple[Hashable, tuple[Owners, dict[str, Way | None], list[str]]]] = (
    WeakKeyDictionary()
)


class Engine:
    """Per-example gradient sums of every parameter of one model.

    Of a model that FSDP2 shards, every process runs the engine on a batch of its own, with the same plan: a forward
    and a backward gather the weights layer by layer, so the rules find them whole. The general path is not there.

    Args:
        model: any module that maps input_ids [B, T] (and attention_mask, position_ids) to logits [B, T, V].
    """

    def __init__(self, model: nn.Module, names: Collection[str] | None = None) -> None:
        self.model = model
        self.sharded = is_sharded(model)
        self.parameters = {n: p for n, p in at_rest(model).items() if names is None or n in names}
        # as autograd sees them: of a sharded model the gathered ones, a tied tensor perhaps once for each use
        self._live = {name: [p] for name, p in self.parameters.items()}
        self.plan: dict[str, Way | None] = {}  # per parameter; None: no rule, one example at a time
        self.order: list[str] = []  # in which the backward of the examples that it was tried on reached them
        self.probed = 0  # examples the plan was tried on
        self.untold: set[str] = set()  # parameters that had no gradient then, which tells nothing about a rule
        self.seen = 0  # batches since
        for name, p in self.parameters.items():
            if p.dtype not in AGREES:
                raise UserError(f"parameter {name!r} is {p.dtype}, which has no gradient; load the model unquantised")
        known = {id(p): name for name, p in self.parameters.items()}
        self.owners: Owners = {}  # (of a tied tensor the first name)
        for owner, module in model.named_modules():
            if any(p is not None for p in module._parameters.values()):  # without one of ours it may be a first call
                own = module._parameters.items()
                self.owners[owner] = {local: known[id(p)] for local, p in own if id(p) in known}
        self._adopted = False

    def run(
        self,
        batch: Batch,
        shares: Sequence[slice],
        into: Into,
        forward: Forward | None = None,
        order: Tensor | None = None,
    ) -> None:
        """Trace one batch.

        Args:
            batch: input_ids, attention_mask, labels [B, T]; padding may be on either side.
            shares: disjoint slices of the batch's examples, each summed by itself.
            into: called once per parameter and share as (parameter, number of the share); gives a context whose
                value are the tensors that the share's sums are added to: of "sum" Σg, "abs" Σ|g| and "square" Σg²
                those wanted, of the parameter's shape and the dtype `sum_dtype`. Nothing is divided by the number
                of examples. Leaving the context says that they are complete.
            forward: somebody else's forward of the model, as it is, to trace in the place of one of the engine's own.
                Its graph is kept. What no rule serves is computed by the engine's own nevertheless.
            order: [B], the row in that forward that is the batch's example 0, 1, …; None: the same rows.

        Raises:
            UserError: the batch lacks a tensor, or an example lacks a target.
        """
        batch = self.checked(batch)
        rows = range(len(batch["labels"]))
        refused: list[set[str]] = [set() for _ in shares]

        def add(name: str, rules: list[Rule]) -> None:
            if self.sharded and not rules:
                return
            for number, share in enumerate(shares):
                try:
                    with into(name, number) as sums:
                        if rows[share]:
                            reduce(rules, sums, share)
                except Unfit:
                    if self.sharded:
                        raise self._refusal(name) from None
                    refused[number].add(name)

        with undisturbed(self.model):
            self._plan(batch)
            missing = self._visit(batch, add) if forward is None else set()
        if forward is not None:
            missing = self._visit(batch, add, forward, order)
        with undisturbed(self.model) if missing or any(refused) else nullcontext():
            for number, share in enumerate(shares):
                names = sorted(missing | refused[number])

                def of_share(name: str, number: int = number) -> AbstractContextManager[dict[str, Tensor]]:
                    return into(name, number)

                if names:
                    self.one_by_one(batch, share, names, of_share)

    def visit(self, batch: Batch, use: Callable[[str, list[Rule]], None]) -> None:
        """Give each parameter's rules, which hold a batch's per-example gradients, to `use`: for more than sums.

        Args:
            batch: as in `run`.
            use: called once per parameter with the rules of all its uses, whose products add up to the gradients; none
                where the parameter has no gradient. A parameter that no rule serves comes as one that holds them.

        Raises:
            UserError: as `run`; or the model is sharded.
        """
        if self.sharded:
            raise UserError("single examples' gradients can't be had of a sharded model; load it unsharded for that")
        batch = self.checked(batch)
        with undisturbed(self.model):
            self._plan(batch)
            missing = sorted(self._visit(batch, use), key=lambda name: self.parameters[name].numel())
            count = len(batch["labels"])
            while missing:
                size, names = HELD, []
                while missing and (not names or self.parameters[missing[0]].numel() * count <= size):
                    names.append(missing.pop(0))
                    size -= self.parameters[names[-1]].numel() * count
                held = {name: _zeros(self.parameters[name], count) for name in names}
                for i in range(count):
                    for name, gradient in zip(names, self.alone(batch, i, names)):
                        if gradient is not None:
                            held[name][i] = gradient
                for name in names:
                    use(name, [Held(held.pop(name))])

    def look(self, batch: Batch, use: Callable[[str, list[Rule]], None], forward: Forward) -> None:
        """Give each parameter's planned rules in somebody else's forward of a batch to `use`, as `visit` does; not
        those of parameters that no rule serves."""
        batch = self.checked(batch)
        with undisturbed(self.model):
            self._plan(batch)
        self._visit(batch, use, forward)

    def _visit(
        self,
        batch: dict[str, Tensor],
        use: Callable[[str, list[Rule]], None],
        forward: Forward | None = None,
        order: Tensor | None = None,
    ) -> set[str]:
        """One batched pass by the plan; gives the parameters that no rule served."""
        missing = set(self.parameters)

        def deliver(name: str, uses: Uses) -> None:
            rules = self.rules(name, uses)
            if rules is not None:
                missing.discard(name)
                use(name, rules)
            elif self.sharded and self.plan[name] != []:
                # at once: all processes must go the same way through the backward
                raise self._refusal(name)

        if any(way is not None for way in self.plan.values()):
            idle = [name for name, way in self.plan.items() if way == []]
            with self._backward(batch, deliver, idle, forward=forward, order=order):
                pass
        return missing

    def _refusal(self, name: str) -> UserError:
        return UserError(
            f"parameter {name!r} is used in a way that no rule knows, and one example at a time can't be traced while "
            "the model is sharded; trace it unsharded"
        )

    def plan_for(self, batch: Batch) -> None:
        """Find each parameter's rule now, on this batch, if it is not known yet; `run` does so by itself."""
        batch = self.checked(batch)
        with undisturbed(self.model):
            self._plan(batch)

    def rules(self, name: str, uses: Uses) -> list[Rule] | None:
        """The planned rules of a parameter's recorded uses; None if there are none that fit these."""
        way = self.plan[name]
        if way is None or not self.expects(name, uses):
            return None
        by_name = {rule.name: rule for rule in RULES}
        try:
            return [made(by_name[rule], call, local) for (call, local), (_, _, rule) in zip(uses, way)]
        except Unfit:
            return None

    def expects(self, name: str, uses: Uses) -> bool:
        """Whether a parameter's calls are those of when it was probed."""
        return [[call.name, local] for call, local in uses] == [use[:2] for use in self.plan[name] or ()]

    def planned(self, name: str) -> list[type[Rule]]:
        """The rules that serve a parameter."""
        names = [rule for _, _, rule in self.plan[name] or ()]
        return [rule for rule in RULES if rule.name in names]

    def coverage(self) -> dict[str, float]:
        """Share of the parameters per rule ("a+b": tied, two uses; "general": one example at a time)."""
        sizes: dict[str, int] = defaultdict(int)
        for name, way in self.plan.items():
            label = "general" if way is None else "+".join(rule for _, _, rule in way) or "no gradient"
            sizes[label] += self.parameters[name].numel()
        total = sum(sizes.values())
        return {label: size / total for label, size in sizes.items()}

    # ---- one batched pass

    @contextmanager
    def _backward(
        self,
        batch: Batch,
        deliver: Callable[[str, Uses], None],
        idle: Sequence[str] = (),
        keep: bool = False,
        forward: Forward | None = None,
        order: Tensor | None = None,
    ) -> Iterator[None]:
        """One forward and backward, recorded (see `Recording` for which parameters are delivered).

        The parameters `idle` are expected to have no gradient; those that have none are delivered without calls. With
        `keep`, the calls and all that a rule may ask for are held until the context is left.
        """
        shape = (batch["labels"].shape[0], batch["labels"].shape[1])
        reading, rerun = (set(self.owners),) * 2 if keep else (self.reading(), self.rerun())
        recording = Recording(self.owners, shape, deliver, reading, Arrangement(order), keep=keep, rerun=rerun)
        try:
            with recording.watching(self.model):
                losses = self.losses(batch, only_targets=True) if forward is None else forward(batch)
            wrong = (~losses.isfinite()).nonzero()
            if len(wrong):
                raise UserError(
                    f"the loss of example {int(wrong[0])} of a batch to trace is not a finite number; has "
                    "training diverged, or does the attention kernel fail on padding in this dtype?"
                )
            # The model's first calls are where the backward ends; on the way there it passes all others.
            sources = recording.sources
            for name in [name for name in idle if not all(x.requires_grad for x in self._live[name])]:
                deliver(name, [])  # frozen in somebody else's forward
            idle = [name for name in idle if all(x.requires_grad for x in self._live[name])]
            ends = [GradientEdge(node, 0) for _, node in sources] + self.ends(idle)
            with torch.autocast(losses.device.type, enabled=False):  # which may be on around somebody else's forward
                whole: Any = ends  # (torch's stubs do not know a list of both)
                kept = forward is not None
                found = torch.autograd.grad(losses.sum(), whole, retain_graph=kept, allow_unused=True) if ends else ()
            for (call, _), e in zip(sources, found):
                if e is not None:
                    recording.arrived(call, e)
            for name, gradient in zip(idle, self.by_name(idle, found[len(sources) :])):
                if gradient is None:
                    deliver(name, [])
            yield
        finally:
            recording.close()

    def reading(self) -> set[str]:
        """Modules whose outputs some rule of the plan reads."""
        return self._served_by({rule.name for rule in RULES if rule.reads_output})

    def rerun(self) -> set[str]:
        """Modules that some rule of the plan runs again."""
        return self._served_by({rule.name for rule in RULES if rule.reruns})

    def _served_by(self, rules: set[str]) -> set[str]:
        return {owner for way in self.plan.values() for owner, _, rule in way or () if rule in rules}

    # ---- the general path

    def one_by_one(
        self,
        batch: Batch,
        share: slice,
        names: Sequence[str],
        into: Callable[[str], AbstractContextManager[dict[str, Tensor]]],
        alone: Callable[[int], Sequence[Tensor | None]] | None = None,
    ) -> None:
        """One example of the share after the other, its gradients restricted to `names`.

        Args:
            alone: gives example i's gradients; each by itself and without its padding if not given.
        """
        with ExitStack() as open_sums:
            sums = {name: open_sums.enter_context(into(name)) for name in names}
            for i in range(len(batch["labels"]))[share]:
                for name, gradient in zip(names, alone(i) if alone is not None else self.alone(batch, i, names)):
                    if gradient is not None:
                        fold(gradient.to(sum_dtype(gradient.dtype), copy=True).unsqueeze(0), sums[name])

    def alone(self, batch: Batch, i: int, names: Sequence[str]) -> tuple[Tensor | None, ...]:
        """∂ℓ_i/∂θ of the named parameters, of example i by itself and without its padding."""
        own = batch["attention_mask"][i].bool()
        example = {key: value[i : i + 1, own] for key, value in batch.items()}
        loss = self.losses(example, only_targets=False).sum()
        return self.by_name(names, torch.autograd.grad(loss, self.ends(names), allow_unused=True))

    @contextmanager
    def streaming(self, names: Iterable[str], use: Callable[[str, Tensor], None]) -> Iterator[None]:
        """In a backward within, each named parameter's gradient is given to `use` when it is there, and none is kept.
        A parameter without gradient does not come."""
        parts: dict[str, list[Tensor]] = defaultdict(list)
        using = False

        def come(name: str, gradient: Tensor) -> Tensor | None:
            nonlocal using
            if using:  # a rule's own backward
                return None
            parts[name].append(gradient)
            if len(parts[name]) == len(self._live[name]):
                using = True
                try:
                    use(name, functools.reduce(torch.add, parts.pop(name)))
                finally:
                    using = False
            return hollow(gradient)

        with ExitStack() as hooks:
            for name in names:
                for x in self._live[name]:
                    hooks.callback(x.register_hook(partial(come, name)).remove)
            yield

    def ends(self, names: Iterable[str]) -> list[Tensor]:
        """The named parameters as autograd sees them."""
        return [x for name in names for x in self._live[name]]

    def by_name(self, names: Sequence[str], found: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """The gradients of the parameters, from those of all that autograd sees of them."""
        left = iter(found)
        each = [[g for _ in self._live[name] if (g := next(left)) is not None] for name in names]
        return tuple(functools.reduce(torch.add, of) if of else None for of in each)

    # ---- the plan

    def _plan(self, batch: Batch) -> None:
        if not self._adopted and not self._recall(batch):
            self._adopt(batch)
        if self.probed < min(2, len(batch["labels"])):
            self._probe(batch, list(self.parameters))
            self.seen = 0
            self._remember()
        elif self.untold and self.seen & (self.seen - 1) == 0 and not self.sharded:
            # Again, ever more rarely, what had no gradient: that of an adapter's A is zero until its B is not.
            self._probe(batch, sorted(self.untold))
        self.seen += 1

    def _remember(self) -> None:
        """Keep the plan for the next engine of this model. Not one of a single example, nor where a gradient was zero:
        that tells nothing about a rule."""
        if self.probed == 2 and not self.untold and not self.sharded:
            _PLANS[self.model] = (_signature(self.model), copy.deepcopy((self.owners, self.plan, self.order)))

    def _recall(self, batch: Batch) -> bool:
        """Take over the plan of an engine before, if it holds all parameters, the model looks as it did then, and the
        rules give the gradient of the longest example: which are right may depend on values."""
        if self.probed or self.sharded or self.model not in _PLANS:
            return False
        signature, (owners, plan, order) = _PLANS[self.model]
        found = self.owners, self.plan, self.order
        if not self.parameters.keys() <= plan.keys() or signature != _signature(self.model):
            return False
        own = self.parameters
        self.owners = {
            owner: {local: name for local, name in names.items() if name in own} for owner, names in owners.items()
        }
        self.plan, self.order = {name: plan[name] for name in own}, [name for name in order if name in own]
        i = pair_of(batch["attention_mask"])[0]
        one = {key: value[i : i + 1] for key, value in batch.items()}
        expected, agreed = self.gradients_along(one, 0), []
        missing = self._visit(one, lambda name, rules: agreed.append(self._agrees(name, rules, expected.get(name))))
        if not all(agreed) or any(self.plan[name] for name in missing):
            self.owners, self.plan, self.order = found
            return False
        self.probed, self.seen, self._adopted = 2, 0, True
        return True

    def _agrees(self, name: str, rules: list[Rule], expected: Tensor | None) -> bool:
        theta = self.parameters[name]
        return agree_along(rules, 0, expected, theta, theta.dtype) if rules else expected is None

    def gradients_along(self, batch: Batch, i: int) -> dict[str, Tensor]:
        """Each parameter's gradient of example i by itself, along random directions (`probe.along`); those that have
        one."""
        found: dict[str, Tensor] = {}

        def note(name: str, gradient: Tensor) -> None:
            found[name] = along(gradient.to(sum_dtype(gradient.dtype)))

        names = list(self.parameters)
        with undisturbed(self.model), self.streaming(names, note):
            self.alone(batch, i, names)
        return found

    def _adopt(self, batch: Batch) -> None:
        """Give parameters to the closest module around whose calls show them example by example.

        Not so a module whose parameters are used without calling it (Mamba's convolution), or which sees the
        tokens of several examples mixed (an expert that is a module of its own).
        """
        pair = {key: value[:2] for key, value in batch.items()}
        rows = (len(pair["labels"]), pair["labels"].numel())
        apart: dict[str, bool] = {}
        known = {id(p): name for name, p in self.parameters.items()}
        every = self.model.named_parameters(remove_duplicate=False)
        names = {local: known[id(p)] for local, p in every if id(p) in known}

        def gathered(module: nn.Module, args: Any) -> None:  # as they are while the module is called
            for local, p in self.model.named_parameters(remove_duplicate=False):
                if local in names and not isinstance(p, DTensor):
                    seen = [x for x in self._live[names[local]] if not isinstance(x, DTensor)]
                    self._live[names[local]] = seen if any(x is p for x in seen) else [*seen, p]

        with ExitStack() as hooks:
            for name, module in self.model.named_modules():
                if self.sharded:
                    hooks.callback(module.register_forward_pre_hook(gathered).remove)

                def note(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                    once = isinstance(output, Tensor) and output.shape[:2] == (1, pair["labels"].shape[1])  # for all
                    apart[name] = apart.get(name, True) and (once or main_output(output, rows) is not None)

                hooks.callback(module.register_forward_hook(note).remove)
            self._check_calm(pair)
        for owner in [owner for owner in self.owners if not apart.get(owner)]:
            around = owner
            while around and not apart.get(around):
                around = around.rpartition(".")[0]
            if around:  # not the whole model
                own = self.owners.setdefault(around, {})
                for local, name in self.owners.pop(owner).items():
                    own[f"{owner[len(around) + 1 :]}.{local}"] = name
        self._adopted = True

    def _check_calm(self, batch: Batch) -> None:
        """Raise a `UserError` if the model draws random numbers that its losses depend on."""
        device = batch["labels"].device
        drew: list[str] = []
        before = random_states(device)

        def note(module: nn.Module, args: Any, output: Any, name: str) -> None:
            if not drew and not all(torch.equal(a, b) for a, b in zip(before, random_states(device))):
                drew.append(name)

        with ExitStack() as hooks:
            for name, module in self.model.named_modules():
                hooks.callback(module.register_forward_hook(partial(note, name=name)).remove)
            first = self.losses(batch, only_targets=True)
        if drew and not torch.equal(first, self.losses(batch, only_targets=True)):
            raise UserError(
                f"the model draws random numbers in evaluation mode too, first in {drew[0] or 'its own forward'}, so "
                "that it has no one gradient to trace; switch that off (dropout that is always on, sampling, noise)"
            )

    def _probe(self, batch: Batch, names: Sequence[str]) -> None:
        """Choose the way of these parameters: the first that is right for the longest and the shortest example."""
        pair = pair_of(batch["attention_mask"])
        self.plan |= dict.fromkeys(names)
        uses: dict[str, Uses] = {}
        reached: set[str] = set()
        told: set[str] = set()
        with self._backward({key: value[pair] for key, value in batch.items()}, uses.__setitem__, keep=True):
            doubted: set[str] = set()
            for rules, alike in ((RULES[:-1], True), (RULES[:-1], False), (RULES, False)):
                # in the order of the backward, in which the first of a kind is judged before the others
                left = {name: of for name, of in uses.items() if name in names and not self.plan[name]}
                if rules is not RULES and not alike:
                    left = {name: of for name, of in left.items() if name in doubted}
                trials = self._trials(left, rules, alike)
                for place, i in enumerate(pair if trials else ()):
                    reached |= self._compare(batch, i, place, trials)
                told |= {name for name, trial in trials.items() if trial.told}
                self.plan |= settled(trials)
                doubted = {name for name, trial in trials.items() if trial.doubted}
        unseen = [name for name in names if name not in uses]  # no call shows them
        for i in pair if unseen else ():
            gradients = self.alone(batch, i, unseen)
            reached |= {name for name, gradient in zip(unseen, gradients) if gradient is not None}
        self.plan |= {name: [] for name in names if name not in reached}
        self.untold = (self.untold - set(names)) | {name for name in names if name in uses and name not in told}
        self.probed = len(pair)
        self.order += [name for name in uses if name not in self.order]

    def _trials(self, uses: Mapping[str, Uses], rules: Sequence[type[Rule]], alike: bool) -> dict[str, Trial]:
        """A trial of the rules for each parameter; with `alike`, all of a kind follow the first."""
        trials: dict[str, Trial] = {}
        firsts: dict[Kind, Trial] = {}
        for name, of in uses.items():
            theta = self._live[name][0]
            kind = kind_of(theta, of)
            trials[name] = Trial(theta, of, rules, firsts.get(kind) if alike else None)
            firsts.setdefault(kind, trials[name])
        return trials

    def _compare(self, batch: Batch, i: int, place: int, trials: Mapping[str, Trial]) -> set[str]:
        """Judge the trials by example i alone; gives the parameters that it has a gradient of."""
        reached: set[str] = set()

        def judge(name: str, gradient: Tensor) -> None:
            reached.add(name)
            trials[name].judge(place, gradient)

        with self.streaming(trials, judge):
            self.alone(batch, i, list(trials))
        for name in trials.keys() - reached if not self.sharded else ():  # (whose rules would find pieces by now)
            trials[name].judge(place, None)
        return reached

    # ---- the loss

    def losses(self, batch: Batch, only_targets: bool) -> Tensor:
        """ℓ [B]; with `only_targets`, logits are computed at the positions that predict a target alone."""
        inputs = {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "position_ids": batch.get("position_ids"),
            "use_cache": False,
        }
        inputs = accepted(self.model, {name: value for name, value in inputs.items() if value is not None})

        # A token after padding is an example's first: nothing predicts it, whichever side the padding is on.
        mask, labels = batch["attention_mask"], batch["labels"].clone()
        labels[:, 1:].masked_fill_(mask[:, :-1] == 0, -100)
        wanted = next_tokens(labels)
        positions = target_positions(wanted) if only_targets else None
        logits = logits_at(self.model, positions, inputs)
        return aligned_losses(logits, wanted if positions is None else wanted.gather(1, positions))

    def memory(
        self, batches: Sequence[Batch], sums: int, where: Where = "auto", passes: int | None = None
    ) -> tuple[Plan, Estimate]:
        """What a trace of these batches will need, and how it is best taken (see `memory.estimate`)."""
        batches = [self.checked(batch) for batch in batches]
        with undisturbed(self.model):
            losses = partial(self.losses, only_targets=True)
            return estimate(self.model, losses, batches, sums, where, passes, self.parameters)

    def checked(self, batch: Batch) -> dict[str, Tensor]:
        """The batch on the model's device, its shapes checked; padding on its right, where it moves no position.

        A model counts its positions as it likes (RoBERTa begins behind the padding's); position_ids that only say
        0, 1, … for every example are left out, so that it does.
        """
        lacking = [key for key in ("input_ids", "attention_mask", "labels") if key not in batch]
        if lacking:
            raise UserError(f"a batch to trace lacks {lacking[0]!r}; it has {', '.join(map(repr, batch)) or 'nothing'}")
        shape = batch["input_ids"].shape
        for key, value in batch.items():
            if value.shape != shape or len(shape) != 2:
                raise UserError(
                    f"batch tensor {key!r} has shape {list(value.shape)}; expected [examples, positions] "
                    f"like input_ids, which has {list(shape)}"
                )
        if "position_ids" in batch and is_packed(batch["position_ids"], batch["attention_mask"]):
            raise UserError(
                "position_ids of a batch to trace begin anew within a row, so several examples are packed into it; "
                "expected one example a row (`unpacked` makes it so)"
            )
        targets = (batch["labels"][:, 1:] != -100) & (batch["attention_mask"][:, :-1] != 0)
        if not bool(targets.any(1).all()):
            row = int((~targets.any(1)).nonzero()[0])
            raise UserError(
                f"example {row} of a batch to trace has no target token that an earlier token predicts, so "
                "its loss is undefined; are all its labels -100?"
            )
        device = next(iter(self.parameters.values())).device
        return {key: value.to(device) for key, value in _plain(batch).items()}


def _signature(model: nn.Module) -> Hashable:
    """What a model computes, as far as it can be told without its values: its modules, what they hold and what hooks
    them, the parameters' shapes and the config; and the rules that there are."""
    found: list[Hashable] = [*RULES]
    for name, module in model.named_modules():
        hooks = [tuple(value) for key, value in sorted(vars(module).items()) if key.endswith("_hooks")]
        held = [_told(key, value) for key, value in sorted(vars(module).items()) if key not in OF_EVERY_MODULE]
        tensors = [(key, id(p), p.shape, p.dtype, p.device) for key, p in module._parameters.items() if p is not None]
        found.append((name, type(module), tuple(hooks), tuple(held), tuple(tensors)))
    config: dict[str, Any] = getattr(getattr(model, "config", None), "__dict__", {})
    return (*found, *(_told(key, value) for key, value in sorted(config.items())))


def _told(key: str, value: Any) -> Hashable:
    """A value by what it is, an object by its identity."""
    if isinstance(value, (list, tuple, dict, set)):
        return key, repr(value)
    return (key, value) if isinstance(value, (bool, int, float, str, type(None), torch.dtype)) else (key, id(value))


def _plain(batch: Batch) -> dict[str, Tensor]:
    """The batch with padding on the right, without position_ids that only count."""
    there = batch["attention_mask"] != 0
    plain = dict(batch)
    if "position_ids" in plain and bool((plain["position_ids"] == there.cumsum(1) - 1)[there].all()):
        del plain["position_ids"]
    if bool((~there[:, :-1] & there[:, 1:]).any()):
        order = (~there).to(torch.uint8).argsort(dim=1, stable=True)
        plain = {key: value.gather(1, order) for key, value in plain.items()}
        plain["labels"] = plain["labels"].clone()
        plain["labels"][~there.gather(1, order)] = -100
    return plain


def _zeros(parameter: Tensor, count: int) -> Tensor:
    return parameter.new_zeros((count, *parameter.shape), dtype=sum_dtype(parameter.dtype))


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """No dropout, no autocast, gradients for every parameter; all put back afterwards."""
    # accelerate (under a Trainer with bf16 or fp16) puts a forward on the model that turns autocast on again
    at_rest(model)
    wrapped, original = model.__dict__.get("forward"), model.__dict__.get("_original_forward")
    modes = [(module, module.training) for module in model.modules()]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    device = next(model.parameters()).device
    try:
        model.eval()
        for p in frozen:
            p.requires_grad_(True)
        if wrapped is not None and original is not None:
            model.forward = original
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
                yield
    finally:
        at_rest(model)
        if wrapped is not None and original is not None:
            model.forward = wrapped
        for p in frozen:
            p.requires_grad_(False)
        for module, training in modes:
            module.training = training
