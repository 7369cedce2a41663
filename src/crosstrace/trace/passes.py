"""Plain passes through a model: the losses of a batch, and single examples' gradients by autograd.

Here is no rule: this is what rules are compared with, and what serves a parameter that has none.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from crosstrace.core.errors import UserError
from crosstrace.core.pieces import at_rest, is_sharded
from crosstrace.models.forward import accepted, logits_at
from crosstrace.trace import batches
from crosstrace.trace.batches import Batch
from crosstrace.trace.blocks import fold, sum_dtype
from crosstrace.trace.probe import AGREES, along, hollow
from crosstrace.training.losses import aligned_losses, next_tokens, target_positions


class Passes:
    """The passes through one model, for some of its parameters.

    Args:
        model: any module that maps input_ids [B, T] (and attention_mask, position_ids) to logits [B, T, V].
        names: the parameters; None: all.

    Raises:
        UserError: a parameter's dtype has no gradient.
    """

    def __init__(self, model: nn.Module, names: Collection[str] | None = None) -> None:
        self.model = model
        self.sharded = is_sharded(model)
        self.parameters = {n: p for n, p in at_rest(model).items() if names is None or n in names}
        # The parameters as autograd sees them: those of a sharded model as they are gathered. A tied tensor may come
        # once for each use.
        self._live = {name: [p] for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            if p.dtype not in AGREES:
                raise UserError(f"parameter {name!r} is {p.dtype}, which has no gradient; load the model unquantised")

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
        targets = next_tokens(labels)
        positions = target_positions(targets) if only_targets else None
        logits = logits_at(self.model, positions, inputs)
        return aligned_losses(logits, targets if positions is None else targets.gather(1, positions))

    def check_batch(self, batch: Batch) -> dict[str, Tensor]:
        """The batch checked, on the model's device, with padding on its right (see `batches.check_batch`)."""
        return batches.check_batch(batch, next(iter(self.parameters.values())).device)

    # ---- one example at a time

    def add_one_by_one(
        self,
        batch: Batch,
        share: slice,
        names: Sequence[str],
        open_sums: Callable[[str], AbstractContextManager[dict[str, Tensor]]],
        gradients_of: Callable[[int], Sequence[Tensor | None]] | None = None,
    ) -> None:
        """Add the gradients of one example of the share after the other, restricted to `names`.

        Args:
            open_sums: gives a context with the sums of a parameter.
            gradients_of: gives example i's gradients; None: each by itself and without its padding.
        """
        with ExitStack() as contexts:
            sums = {name: contexts.enter_context(open_sums(name)) for name in names}
            for i in range(len(batch["labels"]))[share]:
                gradients = gradients_of(i) if gradients_of is not None else self.example_gradients(batch, i, names)
                for name, gradient in zip(names, gradients):
                    if gradient is not None:
                        fold(gradient.to(sum_dtype(gradient.dtype), copy=True).unsqueeze(0), sums[name])

    def example_gradients(self, batch: Batch, i: int, names: Sequence[str]) -> tuple[Tensor | None, ...]:
        """∂ℓ_i/∂θ of the named parameters, of example i by itself and without its padding."""
        is_token = batch["attention_mask"][i].bool()
        example = {key: value[i : i + 1, is_token] for key, value in batch.items()}
        loss = self.losses(example, only_targets=False).sum()
        return self.join_uses(names, torch.autograd.grad(loss, self.leaves(names), allow_unused=True))

    def gradients_along(self, batch: Batch, i: int) -> dict[str, Tensor]:
        """Each parameter's gradient of example i by itself, along random directions (`probe.along`).

        A parameter without gradient is left out."""
        gradients: dict[str, Tensor] = {}

        def note(name: str, gradient: Tensor) -> None:
            gradients[name] = along(gradient.to(sum_dtype(gradient.dtype)))

        names = list(self.parameters)
        with undisturbed(self.model), self.streaming_gradients(names, note):
            self.example_gradients(batch, i, names)
        return gradients

    @contextmanager
    def streaming_gradients(self, names: Iterable[str], use: Callable[[str, Tensor], None]) -> Iterator[None]:
        """Within the context, a backward gives each named parameter's gradient to `use` as soon as it is complete.

        No gradient is kept. A parameter without gradient does not come.
        """
        parts: dict[str, list[Tensor]] = defaultdict(list)
        is_using = False

        def receive(name: str, gradient: Tensor) -> Tensor | None:
            nonlocal is_using
            if is_using:  # a rule's own backward
                return None
            parts[name].append(gradient)
            if len(parts[name]) == len(self._live[name]):
                is_using = True
                try:
                    use(name, functools.reduce(torch.add, parts.pop(name)))
                finally:
                    is_using = False
            return hollow(gradient)

        with ExitStack() as hooks:
            for name in names:
                for x in self._live[name]:
                    hooks.callback(x.register_hook(partial(receive, name)).remove)
            yield

    def leaves(self, names: Iterable[str]) -> list[Tensor]:
        """The named parameters as autograd sees them."""
        return [x for name in names for x in self._live[name]]

    def join_uses(self, names: Sequence[str], gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """The gradients of the parameters, from those of `leaves`."""
        rest = iter(gradients)
        per_name = [[g for _ in self._live[name] if (g := next(rest)) is not None] for name in names]
        return tuple(functools.reduce(torch.add, uses) if uses else None for uses in per_name)


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
