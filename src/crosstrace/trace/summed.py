"""The summed trace: what a training's own gradients of each task add up to, Δ_t = Σ_n lr_n ∇ℓ_n.

The sum is signed and runs over every example n of task t that the training sees, at the parameters and with the
learning rate of its update; the strength of a parameter is |Δ_t|. So a summary of arXiv 2505.16178 defines the trace
(the paper's full text was not at hand). It differs from the default, the mean of |g_i|, in that examples which push a
parameter both ways cancel, and in that its targets are the training's.

AdamW does not move a parameter by lr · g but by about lr · m / (√v + ε). In the optimiser's metric each gradient is
divided by √v + ε as well, so that Δ_t is how far the task's gradients alone would have moved a parameter.

No gradient is computed for it: a training that takes one task's backward after the other's has each task's gradient
in what `.grad` gains. Clipping, which comes later, does not change it, nor does weight decay, which is no gradient.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from crosstrace.core.errors import UserError
from crosstrace.core.pieces import local
from crosstrace.trace.accumulated import Accumulated


class SummedTrace(Accumulated):
    """Δ_t over a training, from the gradients that it computes anyway.

    A loop of one's own is

        summed = SummedTrace(model, ["bio", "qa"])
        for batches in loader:
            for task, batch in batches.items():
                loss(batch).backward()                  # the mean over the batch's examples
                summed.add(task, lr, len(batch), last=task == "qa")
            clip, step, zero_grad

    `traces` gives, for each task, a `Trace` of the measure `net`: its values are Δ_t over the weight, Σ_n lr_n, so that
    parts of the data can be combined; the strength is their absolute value, and the order of parameters is that of
    |Δ_t|.

    Args:
        model: the model in training.
        tasks: all tasks that will occur.
        parts: a task's update number u counts for part u % parts.
        where: the sums are kept on the "device" of the model or on the "cpu".
        names: the parameters to trace; None: all.
        group: processes of torch.distributed that share out each update's examples, their gradients averaged (DDP).
            Those of a sharded model (FSDP2) need not be named.
    """

    def __init__(
        self,
        model: nn.Module,
        tasks: Iterable[str],
        parts: int = 1,
        where: Literal["device", "cpu"] = "device",
        names: Collection[str] | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(model, tasks, ("net",), ("example",), parts, True, where, names, group)
        self._aside: dict[str, Tensor] = {}  # the gradients of the update's tasks so far
        # DDP averages what it finds in .grad in an update's last backward, so nothing may be taken out before
        self._averaged = self._team is not None and not self._team.sharded

    def add(
        self,
        task: str,
        lr: float,
        examples: int,
        weight: float = 1.0,
        *,
        last: bool,
        optimizer: Optimizer | None = None,
    ) -> None:
        """Take over what the gradients have gained since the last call: a task's part of an update's loss,
        weight · mean over the examples of ℓ_n.

        Between the calls of one update the gradients lie elsewhere, unless DDP is to average them; after the last one
        they are in `.grad`, all tasks' together.

        Args:
            task: whose.
            lr: the update's learning rate.
            examples: how many, of all processes together.
            weight: of the task in the loss.
            last: whether the update's gradients are complete.
            optimizer: AdamW, for the optimiser's metric: gradients are divided by √v̂ + ε, with v̂ the mean of squares
                as it stood before this update, corrected for its beginning as AdamW does. Before an optimiser's first
                update there is none, and nothing is added up.

        Raises:
            UserError: a task that was not announced, or an optimiser that keeps no mean of squares for each number.
        """
        if task not in self._steps:
            raise UserError(f"task {task!r} is not one of those announced: {', '.join(self._steps)}")
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]} if optimizer else {}
        counts = optimizer is None  # whether anything is added up
        (mean,) = self._part_means(task, self._steps[task] % self._settings["parts"])
        share = 1 / self._team.processes.size if self._averaged and self._team is not None else 1.0
        factor = lr * examples / weight * share
        self._whole = False
        for name, p in self._engine.parameters.items():
            total, before = mean.total[name], self._aside.get(name)
            gained = [(factor, local(p.grad))] if p.grad is not None else []
            if before is not None and self._averaged:  # it is in .grad still
                gained.append((-factor, before))
            root = None if optimizer is None or not gained else _root(optimizer, groups[id(p)], name, p)
            counts |= root is not None
            for sign, gradient in gained:
                if optimizer is None:
                    total.add_(gradient.to(total), alpha=sign)
                elif root is not None:
                    total.addcdiv_(gradient.to(total), root.to(total), value=sign)
        self.skip(last=last)
        if counts and (
            not self._averaged or self._has_sums
        ):  # weights are added up too, and this one is of all processes
            mean.weight += lr * examples
        self._steps[task] += 1

    def skip(self, *, last: bool) -> None:
        """The gradients have gained those of a task that is not traced: as `add`, but nothing is added up."""
        settle = self._stay if self._averaged else self._set_aside
        self._whole = last
        for name, p in self._engine.parameters.items():
            settle(name, p, self._aside.get(name), last)
        if last:
            self._aside.clear()

    def _set_aside(self, name: str, p: Tensor, before: Tensor | None, last: bool) -> None:
        """Make room in `.grad` for the next task's gradient alone, or put all of them together there."""
        gradients = [x for x in (p.grad, before) if x is not None]
        whole = gradients[0].add_(gradients[1]) if len(gradients) == 2 else next(iter(gradients), None)
        if last:
            p.grad = whole
        elif whole is not None:
            self._aside[name], p.grad = whole, None

    def _stay(self, name: str, p: Tensor, before: Tensor | None, last: bool) -> None:
        """Leave the gradients in `.grad`, and note what is there before the next task."""
        if p.grad is not None and not last:
            self._aside[name] = p.grad.clone()


def _root(optimizer: Optimizer, group: Mapping[str, Any], name: str, p: Tensor) -> Tensor | None:
    """√v̂ + ε of a parameter, v̂ as AdamW corrects it for its beginning; None before its first update."""
    state = optimizer.state.get(p) or {}
    if not state:
        return None
    if "exp_avg_sq" not in state:
        raise UserError(
            f"the optimiser keeps {', '.join(map(str, state))} of {name}, and no mean of its squared gradient, which "
            "the optimiser's metric divides by; train with AdamW, or take the gradient's metric"
        )
    corrected = local(state["exp_avg_sq"]) / (1 - group["betas"][1] ** float(state["step"]))
    return corrected.sqrt_().add_(group["eps"])
