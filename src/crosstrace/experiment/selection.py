"""From traces to sets: each task's strongest parameters, those that all tasks share, and controls of that size."""

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
    """Each task's strength per parameter, over all parts of its trace."""
    return {task: Trace.combine(parts).strength() for task, parts in tasks.items()}


def select_tasks(
    found: Strengths, fractions: Sequence[float], in_scope: Sequence[str], how: str, together: Collection[str]
) -> Iterator[tuple[float, dict[str, ParamSet]]]:
    """For each fraction, when its turn comes, S_t of every task, and under the name "shared" the intersection of those
    of the tasks `together`. Nothing if no task is given."""
    each = {task: select_each(values, fractions, scope=in_scope, how=how) for task, values in found.items()}
    for fraction in fractions if each else ():
        sets = {task: next(own) for task, own in each.items()}
        yield fraction, {**sets, "shared": shared({task: sets[task] for task in together})}


def controls(found: Strengths, psets: Mapping[str, ParamSet], seeds: int, salt: str = "") -> dict[str, list[ParamSet]]:
    """The shared set and its controls, all of its size: random, random with the same count in each tensor, and each
    task's strongest parameters outside the others' sets (left out where too few remain). `salt` names the draw."""
    both, chosen = psets["shared"], {task: psets[task] for task in found}
    plan = {"shared": [both], **random_sets(both, seeds, salt)}
    for task in found:
        try:
            plan[f"{task}_only"] = [only_set(found, task, chosen, both.size)]
        except UserError:
            continue
    return plan
