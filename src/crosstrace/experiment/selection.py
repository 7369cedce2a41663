"""From traces to sets: each task's strongest parameters, the shared ones, and controls of the same size."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch

from crosstrace.core.errors import UserError
from crosstrace.sets.controls import only_set, random_sets
from crosstrace.sets.paramset import ParamSet, shared
from crosstrace.sets.selection import select_each
from crosstrace.trace import Trace

Strengths = dict[str, dict[str, torch.Tensor]]


def strengths(tasks: Mapping[str, Sequence[Trace]]) -> Strengths:
    """Each task's strength per parameter, from all parts of its trace."""
    return {task: Trace.combine(parts).strength() for task, parts in tasks.items()}


def select_tasks(
    by_task: Strengths, fractions: Sequence[float], in_scope: Sequence[str], how: str, together: Collection[str]
) -> Iterator[tuple[float, dict[str, ParamSet]]]:
    """For each fraction the set S_t of every task t and, under the name "shared", the intersection over some tasks.

    Sets are made one fraction at a time, so that only those of one fraction are in memory.

    Args:
        by_task: strength per parameter of each task. Without any task nothing is returned.
        fractions: of the parameters in scope.
        in_scope: names of the parameters that may be selected.
        how: as `analysis.how`.
        together: the tasks whose intersection is the shared set.
    """
    selections = {task: select_each(values, fractions, scope=in_scope, how=how) for task, values in by_task.items()}
    for fraction in fractions if selections else ():
        sets = {task: next(selection) for task, selection in selections.items()}
        yield fraction, {**sets, "shared": shared({task: sets[task] for task in together})}


def controls(
    by_task: Strengths, psets: Mapping[str, ParamSet], seeds: int, salt: str = ""
) -> dict[str, list[ParamSet]]:
    """The shared set and its controls, all of the same size.

    Controls are random sets, random sets with the same count in each tensor, and each task's strongest parameters
    outside the other tasks' sets. A task with too few of those has no such control.

    Args:
        by_task: strength per parameter of each task.
        psets: every task's set and the shared one, as `select_tasks` makes them.
        seeds: random sets of each kind.
        salt: names the draw. Another salt gives other random sets.
    """
    chosen = {task: psets[task] for task in by_task}
    pset = psets["shared"]
    plan = {"shared": [pset], **random_sets(pset, seeds, salt)}
    for task in by_task:
        try:
            plan[f"{task}_only"] = [only_set(by_task, task, chosen, pset.size)]
        except UserError:
            continue
    return plan
