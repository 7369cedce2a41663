"""What one forward of a batch leaves for the rules: every module's calls and, from the backward, their gradients e.

`Engine` records forwards of its own, `TrainingTrace` those of somebody else's training. The one who records says what
is done with a parameter as soon as all of its calls have their e. Nothing here knows rules, losses or sums.

Shapes: B examples, T positions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from crosstrace.trace.calls import Arrangement, Call, find_output, is_lookup

Uses = Sequence[tuple[Call, str]]  # a parameter's calls in order, each with the module's own name of the parameter
Replace = Callable[[Call, Tensor], Tensor | None]
AS_IT_IS = Arrangement()
OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # attributes that are no state of a module's own


class Recording:
    """The calls of one forward.

    Args:
        owners: per module, its local name of each parameter to its canonical one.
        shape: (B, T) of the batch.
        deliver: called as (parameter, its uses) once all of them have their e. A parameter is not delivered if one of
            its calls does not keep examples apart, or does not reach the loss. The calls are cleared afterwards.
        reading: the modules whose outputs are kept for the rules.
        arrangement: how rows become the rules' examples; None: not known yet, see `arrange`.
        replace: may give another tensor of the same values for a call's output. That tensor's own backward then calls
            `arrived`. None leaves the output as it is.
        keep: hold all calls until `close`.
        rerun: the modules that a rule may run again. For each of their calls it is noted whether it is repeatable.
    """

    def __init__(
        self,
        owners: Mapping[str, Mapping[str, str]],
        shape: tuple[int, int],
        deliver: Callable[[str, Uses], None],
        reading: set[str],
        arrangement: Arrangement | None = AS_IT_IS,
        replace: Replace | None = None,
        keep: bool = False,
        rerun: Collection[str] = (),
    ) -> None:
        self.owners, self.shape, self.deliver, self.reading = owners, shape, deliver, reading
        self.arrangement, self.replace, self.keep, self.rerun = arrangement, replace, keep, rerun
        self.states: dict[str, list[list[Any]]] = defaultdict(list)  # per module, those in which its open calls began
        self.aside: Callable[[Call, Tensor], None] | None = None  # gets what arrives, in place of the rules
        self.early: list[tuple[Call, Tensor]] = []  # what arrived before the arrangement
        self.calls: list[Call] = []
        # the calls whose inputs need no gradient, which are the model's first, each with the node whose gradient e is
        self.sources: list[tuple[Call, Any]] = []
        self.uses: dict[str, list[tuple[Call, str]]] = defaultdict(list)
        self.has_call_without_gradients = False
        self.hidden: set[str] = set()  # parameters of a call whose output does not show the examples

    @contextmanager
    def watching(self, model: nn.Module, root: bool = True) -> Iterator[None]:
        """Record the calls made within the context; not those of the whole model unless `root`."""
        with ExitStack() as hooks:
            for owner in self.owners:
                if not owner and not root:
                    continue
                module = model.get_submodule(owner)
                if owner in self.rerun:
                    hooks.callback(module.register_forward_pre_hook(partial(self.begin, owner)).remove)
                hooks.callback(module.register_forward_hook(partial(self.record, owner), with_kwargs=True).remove)
            yield
        self.settle()

    def begin(self, owner: str, module: nn.Module, args: Any) -> None:
        """A call begins, of a module that may be run again."""
        self.states[owner].append(_read_state(module))

    def record(self, owner: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor | None:
        """Note a call; gives the tensor to put in place of its output, if any."""
        names, count = self.owners[owner], self.shape[0]
        repeatable = bool(self.states[owner]) and _are_equal(self.states[owner].pop(), _read_state(module))
        is_first = not any(isinstance(x, Tensor) and x.requires_grad for x in tree_leaves((args, kwargs)))
        if not names and not is_first:
            return None
        spread = None
        if count > 1 and isinstance(output, Tensor) and output.requires_grad and output.shape[:1] == (1,):
            # One row for all examples, as for looked-up positions: their gradients meet in what broadcasts it.
            output = spread = output.expand(count, *output.shape[1:])
        index = find_output(output, (count, count * self.shape[1]))
        if index is None:
            self.has_call_without_gradients |= not torch.is_grad_enabled()
            self.hidden.update(names.values())
            return None
        result = tree_leaves(output)[index]
        rows = len(result)
        flat = None if rows == count else self.shape
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        only_tensor = tensors[0] if len(tensors) == 1 and tensors[0].shape[:1] == (rows,) else None
        kept_output = result if owner in self.reading else None
        node = result.grad_fn if spread is None else result.grad_fn.next_functions[0][0]
        call = Call(owner, module, args, kwargs, only_tensor, kept_output, node, flat, rows=rows, output_index=index)
        call.locals, call.repeatable = tuple(names), repeatable
        device = result.device.type
        call.autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        self.calls.append(call)
        for local, name in names.items():
            self.uses[name].append((call, local))
            call.waiting.add(name)
        if is_first:
            call.node = _find_lookup(call.node)
            self.sources.append((call, call.node if spread is None else result.grad_fn))
            return spread
        other = self.replace(call, result) if self.replace is not None and result is output and spread is None else None
        if other is None:  # else that tensor's own backward calls `arrived`
            # A hook set now sees the gradient of this output, whatever is done to it in place later.
            result.register_hook(lambda e: self.arrived(call, e))
        return spread if other is None else other

    def settle(self) -> None:
        """The forward is over: parameters with a call that hides its examples are not delivered."""
        for name in self.hidden:
            for call, _ in self.uses.pop(name, []):
                call.waiting.discard(name)

    def arrived(self, call: Call, e: Tensor) -> None:
        """The gradient of a call's output has come."""
        if self.aside is not None:
            self.aside(call, e)
            return
        if self.arrangement is None:
            self.early.append((call, e))
            return
        call.e, call.arrangement = e.detach(), self.arrangement
        for name in self.owners[call.name].values():  # (a set's order would differ between processes)
            if name not in call.waiting:
                continue
            uses = self.uses[name]
            if all(c.e is not None for c, _ in uses):
                self.deliver(name, uses)
                del self.uses[name]
                for c, _ in uses:
                    c.waiting.discard(name)
                    if not c.waiting and not self.keep:  # free the activations before the backward goes on
                        c.clear()

    def arrange(self, arrangement: Arrangement) -> None:
        """The arrangement is known from now on."""
        self.arrangement = arrangement
        early, self.early = self.early, []
        for call, e in early:
            self.arrived(call, e)

    def close(self) -> None:
        """Let go of all tensors: an output's hook holds its call, a cycle that no collector sees.

        What arrives later, in another backward of the same forward, is ignored.
        """
        self.aside = ignore
        self.early.clear()
        self.sources.clear()
        for call in self.calls:
            call.clear()


def ignore(call: Call, e: Tensor) -> None:
    """For `Recording.aside`: do nothing with what arrives."""


def random_states(device: torch.device) -> list[Tensor]:
    """The states of the generators that a model on this device draws from."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _read_state(module: nn.Module) -> list[Any]:
    """What a call changes if it draws random numbers or keeps something in its module.

    Each entry is a value itself or how often it was changed. Modules within are included.
    """
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    entries: list[Any] = [(None, bytes(state.numpy())) for state in random_states(device)]
    for inner in module.modules():
        for kept in (vars(inner), inner._buffers):
            for name, value in kept.items():
                if name not in OF_EVERY_MODULE:
                    changes = value._version if isinstance(value, Tensor) and not value.is_inference() else None
                    size = len(value) if isinstance(value, (list, dict, set)) else None
                    entries.append((value, (name, changes, size)))
    return entries


def _are_equal(before: list[Any], after: list[Any]) -> bool:
    return len(before) == len(after) and all(a is c and b == d for (a, b), (c, d) in zip(before, after))


def _find_lookup(node: Any) -> Any:
    """The embedding lookup behind a module's output (Gemma scales it afterwards), else the output's own node."""
    hop = node
    for _ in range(4):
        if hop is None or is_lookup(hop):
            break
        hop = hop.next_functions[0][0] if hop.next_functions else None
    return hop if is_lookup(hop) else node
