"""The summed trace: the sum of a training's own gradients of each task, Δ_t = Σ_n lr_n ∇ℓ_n.

The sum is signed. It runs over every example n of task t that the training sees, at the parameters and with the
learning rate of its update. The strength of a parameter is |Δ_t|. A summary of arXiv 2505.16178 defines the trace so
(the paper's full text was not at hand). It differs from the default, the mean of |g_i|, in two ways: examples that push
a parameter in opposite directions cancel, and the targets are the training's.

AdamW does not move a parameter by lr · g but by about lr · m / (√v + ε). In the optimiser's metric each gradient is
divided by √v + ε too. Then Δ_t is how far the task's gradients alone would have moved a parameter.

No gradient is computed for this trace. A training that makes the tasks' backwards one after the other adds each task's
gradient to `.grad`, and what it added is read there. Clipping does not change the trace, since it comes later; nor does
weight decay, which is no gradient.
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

    In a training loop of your own:

        summed = SummedTrace(model, ["bio", "qa"])
        for batches in loader:
            for task, batch in batches.items():
                loss(batch).backward()                  # the mean over the batch's examples
                summed.add(task, lr, len(batch), last=task == "qa")
            clip, step, zero_grad

    `traces` gives a `Trace` of the measure `net` for each task. Its values are Δ_t divided by the weight Σ_n lr_n, so
    that parts of the data can be combined. Its strengths are their absolute values, in the same order as |Δ_t|.

    Args:
        model: the model in training.
        tasks: all tasks that will occur.
        parts: a task's update number u counts for part u % parts.
        where: the sums are kept on the "device" of the model or on the "cpu".
        names: the parameters to trace; None: all.
        group: processes of torch.distributed that share out each update's examples, their gradients averaged (DDP).
            Not needed for a sharded model (FSDP2).
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
        self._earlier: dict[str, Tensor] = {}  # the gradients of the update's tasks so far
        # In an update's last backward DDP averages what is in .grad, so all gradients must stay there until then.
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
        """Add the gradients since the last call: those of weight · (mean of ℓ_n over the examples).

        That is one task's part of an update's loss. Between the calls of one update, `.grad` is empty, unless DDP is to
        average it. After the last call, `.grad` has the sum over all tasks.

        Args:
            task: whose gradients they are.
            lr: the update's learning rate.
            examples: how many examples there are, in all processes together.
            weight: of the task in the loss.
            last: whether the update's gradients are complete.
            optimizer: AdamW, for the optimiser's metric; None: plain gradients are added. The gradients are divided by
                √v̂ + ε. v̂ is the mean of squares before this update, corrected for its beginning as AdamW does. Before
                an optimiser's first update there is no v̂, and nothing is added.

        Raises:
            UserError: a task that was not announced, or an optimiser that keeps no mean of squares for each number.
        """
        if task not in self._steps:
            raise UserError(f"task {task!r} is not one of those announced: {', '.join(self._steps)}")
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]} if optimizer else {}
        counts = optimizer is None  # whether anything is added
        (mean,) = self._part_means(task, self._steps[task] % self._settings["parts"])
        share = 1 / self._team.processes.size if self._averaged and self._team is not None else 1.0
        factor = lr * examples / weight * share
        self._is_complete = False
        for name, p in self._engine.parameters.items():
            total, earlier = mean.total[name], self._earlier.get(name)
            terms = [(factor, local(p.grad))] if p.grad is not None else []
            if earlier is not None and self._averaged:  # it is still in .grad
                terms.append((-factor, earlier))
            root = None if optimizer is None or not terms else _root(optimizer, groups[id(p)], name, p)
            counts |= root is not None
            for coefficient, gradient in terms:
                if optimizer is None:
                    total.add_(gradient.to(total), alpha=coefficient)
                elif root is not None:
                    total.addcdiv_(gradient.to(total), root.to(total), value=coefficient)
        self.skip(last=last)
        # Under DDP the weights of all processes are added up later, and this weight is that of all of them already.
        if counts and (not self._averaged or self._has_sums):
            mean.weight += lr * examples
        self._steps[task] += 1

    def skip(self, *, last: bool) -> None:
        """As `add`, for the gradients of a task that is not traced: nothing is added."""
        move = self._copy_gradient if self._averaged else self._take_gradient
        self._is_complete = last
        for name, p in self._engine.parameters.items():
            move(name, p, self._earlier.get(name), last)
        if last:
            self._earlier.clear()

    def _take_gradient(self, name: str, p: Tensor, earlier: Tensor | None, last: bool) -> None:
        """Empty `.grad` for the next task's gradient; after the last task, put the sum over all tasks there."""
        gradients = [x for x in (p.grad, earlier) if x is not None]
        total = gradients[0].add_(gradients[1]) if len(gradients) == 2 else next(iter(gradients), None)
        if last:
            p.grad = total
        elif total is not None:
            self._earlier[name], p.grad = total, None

    def _copy_gradient(self, name: str, p: Tensor, earlier: Tensor | None, last: bool) -> None:
        """Leave the gradients in `.grad`, and keep a copy for the next task to compare with."""
        if p.grad is not None and not last:
            self._earlier[name] = p.grad.clone()


def _root(optimizer: Optimizer, group: Mapping[str, Any], name: str, p: Tensor) -> Tensor | None:
    """√v̂ + ε of a parameter, with v̂ as AdamW corrects it for its beginning; None before its first update."""
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
