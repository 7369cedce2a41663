"""How much do the tasks share, how similar are their traces, and how centralized is the shared set?

Strengths and ParamSets in, rows (plain dicts, ready for JSON) out. Every interval is a delete-one jackknife over
disjoint parts of the data, so the strengths come as a list of parts for each task. It knows nothing of models beyond an
`Anatomy`, and draws nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crosstrace.core.errors import UserError
from crosstrace.core.statistics import (
    cosine,
    effective_number,
    gini,
    jackknife,
    jackknife_interval,
    spearman,
    top_share,
)
from crosstrace.models.anatomy import Anatomy
from crosstrace.sets.paramset import ParamSet, shared
from crosstrace.sets.selection import select_each
from crosstrace.trace.result import weighted_mean

Parts = Mapping[str, Sequence[Mapping[str, Tensor]]]  # task -> part of the data -> tensor name -> values
Weights = Mapping[str, Sequence[float]]  # task -> the weight (number of examples) of each part
Row = dict[str, Any]

CENTRAL_UNITS = ("query_head", "kv_head", "neuron", "module", "layer")


def overlap_rows(
    strengths: Parts,
    fractions: Sequence[float],
    scope: Sequence[str],
    *,
    how: str = "global",
    weights: Weights | None = None,
) -> list[Row]:
    """The shared set against chance, one row a fraction.

    Args:
        strengths: for each task its trace's values on each part; all tasks have the same number of parts. Values of
            the measure `net` keep their sign: parts are averaged before the absolute value.
        weights: how many examples each part stands for; all the same if not given.

    Returns:
        rows {fraction, size: |S|, selected: max_t |S_t|, overlap: |S|/selected, chance, lift, jaccard, low, high,
        parts}. chance is the overlap expected of independent sets, N Π_t(|S_t|/N) / selected (ρ for two); lift =
        overlap/chance; jaccard = |∩|/|∪|; low and high are the overlap's 95 % interval.
    """
    parts = _parts(strengths)

    def measure(kept: Sequence[int]) -> np.ndarray:
        return np.array([_overlap(sets) for sets in _select(strengths, weights, kept, fractions, scope, how)])

    estimate, low, high = jackknife(measure, range(parts))
    names = ("size", "selected", "overlap", "chance", "lift", "jaccard")
    return [
        _row(
            fraction=fraction,
            **dict(zip(names, (int(size), int(selected), *others))),
            low=low[i, 2],
            high=high[i, 2],
            parts=parts,
        )
        for i, (fraction, (size, selected, *others)) in enumerate(zip(fractions, estimate.tolist()))
    ]


def similarity_rows(strengths: Parts, scope: Sequence[str], *, weights: Weights | None = None) -> list[Row]:
    """Rank correlation and cosine of the traces: a row {tasks, spearman, cosine} for each pair of tasks."""
    means = _means(strengths, weights, range(_parts(strengths)), scope)
    return [
        _row(tasks=[a, b], spearman=spearman(means[a], means[b]), cosine=cosine(means[a], means[b]))
        for a, b in combinations(means, 2)
    ]


def centralization_rows(
    strengths: Parts,
    fractions: Sequence[float],
    scope: Sequence[str],
    anatomy: Anatomy,
    *,
    units: Sequence[str] = CENTRAL_UNITS,
    draws: int = 20,
    seed: int = 0,
    how: str = "global",
    weights: Weights | None = None,
) -> list[Row]:
    """How unevenly the shared set spreads over units, beside random sets of its size in the same scope.

    What is measured is the number of S's parameters in each unit that has parameters in scope. Random sets are uniform
    over the scope. Only their counts are drawn, which gives the same distribution and is much faster.

    Returns:
        rows {fraction, unit, units: how many, size: |S|, gini, effective, top10, random_gini (mean of the draws),
        random_gini_low, random_gini_high (2.5 and 97.5 % of the draws), random_effective, random_top10, excess_gini =
        gini − random_gini, low, high: its 95 % jackknife interval over the parts, parts}, one for each fraction and
        each unit that the model has. None where undefined.
    """
    parts = _parts(strengths)
    sizes = {unit: anatomy.sizes(unit, scope) for unit in units}
    sizes = {unit: n for unit, n in sizes.items() if n.any()}
    kept = [
        range(parts),
        *([p for p in range(parts) if p != out] for out in range(parts if parts > 1 else 0)),
    ]
    total = sum(anatomy.shapes[name].numel() for name in scope)

    def tally(pset: ParamSet) -> tuple[int, dict[str, np.ndarray]]:
        """A set's size and its counts for each unit: all that is needed of the set, and much smaller."""
        return pset.size, {unit: anatomy.count(pset, unit) for unit in sizes}

    tallies = [[tally(shared(s)) for s in _select(strengths, weights, k, fractions, scope, how)] for k in kept]
    rng = np.random.default_rng(seed)
    rows = []
    for i, fraction in enumerate(fractions):
        set_sizes, unit_counts = zip(*(by_fraction[i] for by_fraction in tallies))  # of S, then of S without each part
        for unit, available in sizes.items():
            in_scope = available > 0
            counts = [by_unit[unit][in_scope] for by_unit in unit_counts]
            rest = total - int(available.sum())
            random = _random_counts(rng, available[in_scope], rest, set_sizes, draws)
            random_gini = np.array([[gini(x) for x in drawn] for drawn in random])  # [replicates, draws]
            excess = np.array([gini(x) for x in counts]) - random_gini.mean(1)
            _, low, high = jackknife_interval(excess[0], excess[1:].tolist())
            rows.append(
                _row(
                    fraction=fraction,
                    unit=unit,
                    units=int(in_scope.sum()),
                    size=set_sizes[0],
                    gini=gini(counts[0]),
                    effective=effective_number(counts[0]),
                    top10=top_share(counts[0], 0.1),
                    random_gini=random_gini[0].mean(),
                    random_gini_low=np.quantile(random_gini[0], 0.025),
                    random_gini_high=np.quantile(random_gini[0], 0.975),
                    random_effective=np.mean([effective_number(x) for x in random[0]]),
                    random_top10=np.mean([top_share(x, 0.1) for x in random[0]]),
                    excess_gini=excess[0],
                    low=low,
                    high=high,
                    parts=parts,
                )
            )
    return rows


def density_map(pset: ParamSet, anatomy: Anatomy, unit: str) -> Row:
    """The share of each unit's parameters in scope that the set holds, for a heat map.

    Returns:
        {rows: layer labels, columns: labels, values: [rows][columns]}; a value is None if there is no such unit.
    """
    size = anatomy.sizes(unit, list(pset.masks))
    share = np.divide(anatomy.count(pset, unit), size, out=np.full(len(size), np.nan), where=size > 0)
    rows, columns = anatomy.axes(unit)
    return {
        "rows": rows,
        "columns": columns,
        "values": [[_finite(x) for x in line] for line in anatomy.grid(share, unit).tolist()],
    }


def _parts(strengths: Parts) -> int:
    """The number of parts of each task's trace."""
    lengths = {task: len(parts) for task, parts in strengths.items()}
    if len(lengths) < 2 or len(set(lengths.values())) != 1 or not min(lengths.values()):
        raise UserError(f"sharing needs two or more tasks, each traced over the same number of parts; found {lengths}")
    return next(iter(lengths.values()))


def _means(
    strengths: Parts, weights: Weights | None, kept: Sequence[int], scope: Sequence[str]
) -> dict[str, dict[str, Tensor]]:
    """Each task's strengths over the kept parts: |Σ_p w_p v_p / Σ_p w_p|."""
    means: dict[str, dict[str, Tensor]] = {}
    for task, parts in strengths.items():
        weight = [1.0 if weights is None else float(weights[task][p]) for p in kept]
        means[task] = {}
        for name in scope:
            chosen = [parts[p][name] for p in kept]
            wide = torch.promote_types(chosen[0].dtype, torch.float32)
            means[task][name] = weighted_mean(chosen, weight).abs_().to(wide)
    return means


def _select(
    strengths: Parts,
    weights: Weights | None,
    kept: Sequence[int],
    fractions: Sequence[float],
    scope: Sequence[str],
    how: str,
) -> Iterator[dict[str, ParamSet]]:
    """For each fraction every task's S_t, from the kept parts of the data."""
    means = _means(strengths, weights, kept, scope)
    each = {task: select_each(mean, fractions, scope=scope, how=how) for task, mean in means.items()}
    for _ in fractions:
        yield {task: next(sets) for task, sets in each.items()}


def _overlap(sets: Mapping[str, ParamSet]) -> tuple[float, ...]:
    """size, selected, overlap, chance, lift and jaccard of `overlap_rows`."""
    both, sizes = shared(sets), [pset.size for pset in sets.values()]
    union, *rest = sets.values()
    for pset in rest:
        union = union | pset
    selected = max(sizes)
    chance = both.total * math.prod(size / both.total for size in sizes) / selected if selected else math.nan
    overlap = both.size / selected if selected else math.nan
    return (
        both.size,
        selected,
        overlap,
        chance,
        overlap / chance if chance else math.nan,
        both.size / union.size if union.size else math.nan,
    )


def _random_counts(
    rng: np.random.Generator, available: np.ndarray, rest: int, sizes: Sequence[int], draws: int
) -> np.ndarray:
    """Counts per unit of uniformly random sets of each size: [sizes, draws, units].

    Within a draw the sets are nested, each a random subset of the next larger one. So the noise of the draws does not
    hide the differences between sizes.
    """
    counts = np.empty((len(sizes), draws, len(available)), dtype=np.int64)
    for draw in range(draws):
        urn = np.append(available, rest)
        for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
            if urn.sum() < 1_000_000_000:
                urn = rng.multivariate_hypergeometric(urn, sizes[i], method="marginals")
            else:  # beyond numpy's limit, independent draws are off by parts in ten thousand
                urn = rng.binomial(urn, sizes[i] / urn.sum())
            counts[i, draw] = urn[:-1]
    return counts


def _row(**values: Any) -> Row:
    return {key: _finite(value) for key, value in values.items()}


def _finite(value: Any) -> Any:
    """JSON has no NaN: what is undefined becomes None. NumPy scalars become plain floats."""
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value
