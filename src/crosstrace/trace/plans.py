"""The plan of a model: which rule serves each parameter, and passes through the model by that plan.

The rule is not guessed. On the first batch a probe tries the rules on two examples, against `torch.autograd.grad` of
each alone (see `probe`). The plan of a model is kept for the next engine of the same model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.distributed.tensor import DTensor

from crosstrace.core.errors import UserError
from crosstrace.trace.batches import Batch
from crosstrace.trace.calls import Arrangement, Unfit, find_output
from crosstrace.trace.modules import RULES
from crosstrace.trace.passes import Passes
from crosstrace.trace.probe import Kind, Trial, Way, agree_along, find_ways, kind_of, pair_of
from crosstrace.trace.recording import OF_EVERY_MODULE, Recording, Uses, random_states
from crosstrace.trace.rules import Rule, make_rule

Owners = dict[str, dict[str, str]]  # module -> its local name of each parameter -> the canonical one
Forward = Callable[[Batch], Tensor]  # a batch -> ℓ [B], with their graph
# What the last engine of a model chose: what the model was, and (owners, plan, order).
_PLANS: WeakKeyDictionary[nn.Module, tuple[Hashable, tuple[Owners, dict[str, Way | None], list[str]]]] = (
    WeakKeyDictionary()
)


class PlannedPasses(Passes):
    """The passes through one model by its plan.

    Args:
        model, names: as in `Passes`.

    Attributes:
        plan: each parameter's way; None: no rule, one example at a time.
        order: the parameters, in the order in which the backward of the probed examples reached them.
        probed: how many examples the plan was tried on.
        undecided: parameters whose gradient was zero then, which shows nothing about a rule.
        seen: how many batches came since.
        owners: which module shows a parameter's calls; for a tied tensor under its first name.
    """

    def __init__(self, model: nn.Module, names: Collection[str] | None = None) -> None:
        super().__init__(model, names)
        self.plan: dict[str, Way | None] = {}
        self.order: list[str] = []
        self.probed = 0
        self.undecided: set[str] = set()
        self.seen = 0
        canonical = {id(p): name for name, p in self.parameters.items()}
        self.owners: Owners = {}
        for owner, module in model.named_modules():
            if any(p is not None for p in module._parameters.values()):  # without one of ours it may be a first call
                held = module._parameters.items()
                self.owners[owner] = {local: canonical[id(p)] for local, p in held if id(p) in canonical}
        self._has_final_owners = False

    # ---- passes by the plan

    def make_rules(self, name: str, uses: Uses) -> list[Rule] | None:
        """The planned rules of a parameter's recorded uses; None if there are none that fit these."""
        way = self.plan[name]
        if way is None or not self.expects(name, uses):
            return None
        by_name = {rule.name: rule for rule in RULES}
        try:
            return [make_rule(by_name[rule], call, local) for (call, local), (_, _, rule) in zip(uses, way)]
        except Unfit:
            return None

    def expects(self, name: str, uses: Uses) -> bool:
        """Whether a parameter's calls are those of when it was probed."""
        return [[call.name, local] for call, local in uses] == [use[:2] for use in self.plan[name] or ()]

    def find_read_modules(self) -> set[str]:
        """Modules whose outputs some rule of the plan reads."""
        return self._find_owners_served_by({rule.name for rule in RULES if rule.reads_output})

    def find_rerun_modules(self) -> set[str]:
        """Modules that some rule of the plan runs again."""
        return self._find_owners_served_by({rule.name for rule in RULES if rule.reruns})

    def _find_owners_served_by(self, rules: set[str]) -> set[str]:
        ways = [way for way in self.plan.values() if way]
        return {owner for way in ways for owner, _, rule in way if rule in rules}

    def _run_by_plan(
        self,
        batch: dict[str, Tensor],
        use: Callable[[str, list[Rule]], None],
        forward: Forward | None = None,
        order: Tensor | None = None,
    ) -> set[str]:
        """One batched pass; gives the parameters that no rule served."""
        missing = set(self.parameters)

        def deliver(name: str, uses: Uses) -> None:
            rules = self.make_rules(name, uses)
            if rules is not None:
                missing.discard(name)
                use(name, rules)
            elif self.sharded and self.plan[name] != []:
                # at once: all processes must go the same way through the backward
                raise self._make_refusal(name)

        if any(way is not None for way in self.plan.values()):
            idle = [name for name, way in self.plan.items() if way == []]
            with self._backward(batch, deliver, idle, forward=forward, order=order):
                pass
        return missing

    def _make_refusal(self, name: str) -> UserError:
        return UserError(
            f"parameter {name!r} is used in a way that no rule knows, and one example at a time can't be traced while "
            "the model is sharded; trace it unsharded"
        )

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

        Args:
            idle: parameters expected to have no gradient. Those that have none are delivered without calls.
            keep: hold the calls, and all that a rule may read, until the context is left.
            forward, order: as in `Engine.run`.
        """
        shape = (batch["labels"].shape[0], batch["labels"].shape[1])
        every = set(self.owners)
        reading, rerun = (every, every) if keep else (self.find_read_modules(), self.find_rerun_modules())
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
            # (torch's stubs do not know a list of both)
            ends: Any = [GradientEdge(node, 0) for _, node in sources] + self.leaves(idle)
            gradients: Sequence[Tensor | None] = ()
            if ends:
                keeps_graph = forward is not None
                with torch.autocast(losses.device.type, enabled=False):  # it may be on around somebody else's forward
                    gradients = torch.autograd.grad(losses.sum(), ends, retain_graph=keeps_graph, allow_unused=True)
            for (call, _), e in zip(sources, gradients):
                if e is not None:
                    recording.arrived(call, e)
            for name, gradient in zip(idle, self.join_uses(idle, gradients[len(sources) :])):
                if gradient is None:
                    deliver(name, [])
            yield
        finally:
            recording.close()

    # ---- choosing the plan

    def _choose_plan(self, batch: Batch) -> None:
        """Choose the plan on this batch, unless it is known already."""
        if not self._has_final_owners and not self._take_remembered_plan(batch):
            self._assign_owners(batch)
        if self.probed < min(2, len(batch["labels"])):
            self._probe(batch, list(self.parameters))
            self.seen = 0
            self._remember_plan()
        elif self.undecided and self.seen & (self.seen - 1) == 0 and not self.sharded:
            # Again, ever more rarely, what had no gradient: that of an adapter's A is zero until its B is not.
            self._probe(batch, sorted(self.undecided))
        self.seen += 1

    def _remember_plan(self) -> None:
        """Keep the plan for the next engine of this model.

        A plan is not kept if it was tried on a single example, or if a gradient was zero: that shows nothing about a
        rule."""
        if self.probed == 2 and not self.undecided and not self.sharded:
            _PLANS[self.model] = (_signature(self.model), copy.deepcopy((self.owners, self.plan, self.order)))

    def _take_remembered_plan(self, batch: Batch) -> bool:
        """Take over the plan of an earlier engine; gives whether that was possible.

        It is possible if the plan holds all parameters, the model looks as it did then, and the rules give the gradient
        of the longest example: which rules are right may depend on values.
        """
        if self.probed or self.sharded or self.model not in _PLANS:
            return False
        signature, (owners, plan, order) = _PLANS[self.model]
        before = self.owners, self.plan, self.order
        if not self.parameters.keys() <= plan.keys() or signature != _signature(self.model):
            return False
        traced = self.parameters
        self.owners = {
            owner: {local: name for local, name in names.items() if name in traced} for owner, names in owners.items()
        }
        self.plan, self.order = {name: plan[name] for name in traced}, [name for name in order if name in traced]
        i = pair_of(batch["attention_mask"])[0]
        example = {key: value[i : i + 1] for key, value in batch.items()}
        expected, agreed = self.gradients_along(example, 0), []

        def compare(name: str, rules: list[Rule]) -> None:
            agreed.append(self._agree(name, rules, expected.get(name)))

        missing = self._run_by_plan(example, compare)
        if not all(agreed) or any(self.plan[name] for name in missing):
            self.owners, self.plan, self.order = before
            return False
        self.probed, self.seen, self._has_final_owners = 2, 0, True
        return True

    def _agree(self, name: str, rules: list[Rule], expected: Tensor | None) -> bool:
        theta = self.parameters[name]
        return agree_along(rules, 0, expected, theta, theta.dtype) if rules else expected is None

    def _assign_owners(self, batch: Batch) -> None:
        """Give parameters to the closest module around whose calls show them example by example.

        Two kinds of module do not show them so: one whose parameters are used without calling it (Mamba's convolution),
        and one that sees the tokens of several examples mixed (an expert that is a module of its own).
        """
        pair = {key: value[:2] for key, value in batch.items()}
        rows = (len(pair["labels"]), pair["labels"].numel())
        shows_examples: dict[str, bool] = {}
        canonical = {id(p): name for name, p in self.parameters.items()}
        every = self.model.named_parameters(remove_duplicate=False)
        names = {local: canonical[id(p)] for local, p in every if id(p) in canonical}

        def note_gathered(module: nn.Module, args: Any) -> None:  # as they are while the module is called
            for local, p in self.model.named_parameters(remove_duplicate=False):
                if local in names and not isinstance(p, DTensor):
                    live = [x for x in self._live[names[local]] if not isinstance(x, DTensor)]
                    self._live[names[local]] = live if any(x is p for x in live) else [*live, p]

        with ExitStack() as hooks:
            for name, module in self.model.named_modules():
                if self.sharded:
                    hooks.callback(module.register_forward_pre_hook(note_gathered).remove)

                def note(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                    # one row for all examples
                    is_common = isinstance(output, Tensor) and output.shape[:2] == (1, pair["labels"].shape[1])
                    has_rows = is_common or find_output(output, rows) is not None
                    shows_examples[name] = shows_examples.get(name, True) and has_rows

                hooks.callback(module.register_forward_hook(note).remove)
            self._check_determinism(pair)
        for owner in [owner for owner in self.owners if not shows_examples.get(owner)]:
            around = owner
            while around and not shows_examples.get(around):
                around = around.rpartition(".")[0]
            if around:  # not the whole model
                of_around = self.owners.setdefault(around, {})
                for local, name in self.owners.pop(owner).items():
                    of_around[f"{owner[len(around) + 1 :]}.{local}"] = name
        self._has_final_owners = True

    def _check_determinism(self, batch: Batch) -> None:
        """Raise a `UserError` if the model draws random numbers that its losses depend on."""
        device = batch["labels"].device
        drawing: list[str] = []  # the first module that drew
        before = random_states(device)

        def note(module: nn.Module, args: Any, output: Any, name: str) -> None:
            if not drawing and not all(torch.equal(a, b) for a, b in zip(before, random_states(device))):
                drawing.append(name)

        with ExitStack() as hooks:
            for name, module in self.model.named_modules():
                hooks.callback(module.register_forward_hook(partial(note, name=name)).remove)
            first = self.losses(batch, only_targets=True)
        if drawing and not torch.equal(first, self.losses(batch, only_targets=True)):
            raise UserError(
                f"the model draws random numbers in evaluation mode too, first in {drawing[0] or 'its own forward'}, "
                "so that it has no one gradient to trace; switch that off (dropout that is always on, sampling, noise)"
            )

    def _probe(self, batch: Batch, names: Sequence[str]) -> None:
        """Choose the way of these parameters: the first that is right for the longest and the shortest example."""
        pair = pair_of(batch["attention_mask"])
        self.plan |= dict.fromkeys(names)
        uses: dict[str, Uses] = {}
        reached: set[str] = set()
        decided: set[str] = set()
        with self._backward({key: value[pair] for key, value in batch.items()}, uses.__setitem__, keep=True):
            doubtful: set[str] = set()
            for rules, by_kind in ((RULES[:-1], True), (RULES[:-1], False), (RULES, False)):
                # in the order of the backward, in which the first of a kind is judged before the others
                rest = {name: calls for name, calls in uses.items() if name in names and not self.plan[name]}
                if rules is not RULES and not by_kind:
                    rest = {name: calls for name, calls in rest.items() if name in doubtful}
                trials = self._make_trials(rest, rules, by_kind)
                for row, i in enumerate(pair if trials else ()):
                    reached |= self._compare(batch, i, row, trials)
                decided |= {name for name, trial in trials.items() if trial.has_gradient}
                self.plan |= find_ways(trials)
                doubtful = {name for name, trial in trials.items() if trial.is_doubtful}
        without_calls = [name for name in names if name not in uses]
        for i in pair if without_calls else ():
            gradients = self.example_gradients(batch, i, without_calls)
            reached |= {name for name, gradient in zip(without_calls, gradients) if gradient is not None}
        self.plan |= {name: [] for name in names if name not in reached}
        self.undecided = (self.undecided - set(names)) | {n for n in names if n in uses and n not in decided}
        self.probed = len(pair)
        self.order += [name for name in uses if name not in self.order]

    def _make_trials(self, uses: Mapping[str, Uses], rules: Sequence[type[Rule]], by_kind: bool) -> dict[str, Trial]:
        """A trial of the rules for each parameter; if `by_kind`, all of a kind follow the first."""
        trials: dict[str, Trial] = {}
        firsts: dict[Kind, Trial] = {}
        for name, calls in uses.items():
            theta = self._live[name][0]
            kind = kind_of(theta, calls)
            trials[name] = Trial(theta, calls, rules, firsts.get(kind) if by_kind else None)
            firsts.setdefault(kind, trials[name])
        return trials

    def _compare(self, batch: Batch, i: int, row: int, trials: Mapping[str, Trial]) -> set[str]:
        """Judge the trials by example i alone, which is `row` of the pair; gives the parameters with a gradient."""
        reached: set[str] = set()

        def judge(name: str, gradient: Tensor) -> None:
            reached.add(name)
            trials[name].judge(row, gradient)

        with self.streaming_gradients(trials, judge):
            self.example_gradients(batch, i, list(trials))
        if not self.sharded:  # by now the rules of a sharded model would meet pieces
            for name in trials.keys() - reached:
                trials[name].judge(row, None)
        return reached


def _signature(model: nn.Module) -> Hashable:
    """What a model computes, as far as it shows without its values.

    It holds the modules, what they keep and what hooks them, the parameters' shapes, the config and the list of rules.
    """
    parts: list[Hashable] = [*RULES]
    for name, module in model.named_modules():
        hooks = [tuple(value) for key, value in sorted(vars(module).items()) if key.endswith("_hooks")]
        state = [_identify(key, value) for key, value in sorted(vars(module).items()) if key not in OF_EVERY_MODULE]
        tensors = [(key, id(p), p.shape, p.dtype, p.device) for key, p in module._parameters.items() if p is not None]
        parts.append((name, type(module), tuple(hooks), tuple(state), tuple(tensors)))
    config: dict[str, Any] = getattr(getattr(model, "config", None), "__dict__", {})
    return (*parts, *(_identify(key, value) for key, value in sorted(config.items())))


def _identify(key: str, value: Any) -> Hashable:
    """A plain value by what it is, an object by its identity."""
    if isinstance(value, (list, tuple, dict, set)):
        return key, repr(value)
    return (key, value) if isinstance(value, (bool, int, float, str, type(None), torch.dtype)) else (key, id(value))
