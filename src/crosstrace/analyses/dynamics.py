"""Dynamics: what a model is like at every checkpoint of its training, and in which order recall and its signs appear.

`measure` measures one model, with the library's other analyses on few examples. `appearance` finds the order from a
list of such measures. It knows no checkpoints, loads nothing and draws nothing. Formulas: docs/method.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor, nn

from crosstrace.analyses import circuit
from crosstrace.analyses.consistency import FactPair, gradient_consistency, representation_consistency
from crosstrace.analyses.signature import ASKED, input_signature
from crosstrace.core.statistics import effective_number, finite, rank_correlation, spearman
from crosstrace.data.tokens import Encoded, batches
from crosstrace.models.anatomy import Anatomy
from crosstrace.models.loading import pad_id
from crosstrace.sets.paramset import ParamSet, shared
from crosstrace.sets.selection import select
from crosstrace.trace import trace
from crosstrace.training.evaluation import recall

Row = dict[str, Any]
Single = dict[str, list[float | None]]  # a value of each fact, a list for each person
FRACTION = 0.05  # of the parameters in scope that are shared
TENTH, HALF = 0.1, 0.5


@dataclass(frozen=True)
class Probe:
    """The texts and options of the measures, the same at every checkpoint.

    Attributes:
        questions: part -> texts about one fact each, whose recall and circuit are measured.
        stored: part -> texts whose objects' recall is measured (biographies).
        traced: task -> the examples of its trace.
        facts: part -> facts in both formats.
        scope: names of the parameters that sets are selected from.
        targets: tokens whose loss is traced.
        together: facts whose gradients are compared at once.
        steps: points of the circuit's quadrature, to begin with.
        read: part -> facts whose input-level signature is measured, in the text that stores each.
    """

    questions: Mapping[str, Sequence[Encoded]]
    stored: Mapping[str, Sequence[Encoded]]
    traced: Mapping[str, Sequence[Encoded]]
    facts: Mapping[str, Sequence[FactPair]]
    scope: Sequence[str]
    targets: str = "object"
    together: int = 48
    steps: int = 8
    read: Mapping[str, Sequence[FactPair]] = field(default_factory=dict)


@dataclass(frozen=True)
class Moment:
    """A model at one checkpoint.

    Attributes:
        measures: name of the measure -> value.
        by_person: name of the measure -> the values of single facts.
        shared: the shared set, with which other checkpoints are compared.
        nodes: heads.PART and neurons.PART -> |attribution| of the nodes, compared likewise.
    """

    measures: dict[str, float | None]
    by_person: dict[str, Single]
    shared: ParamSet
    nodes: dict[str, np.ndarray]


def measure(model: nn.Module, tokenizer: Any, probe: Probe, last: Moment | None = None) -> Moment:
    """All measures of a model.

    - recall.PART: exact match.
    - overlap, spearman: of the tasks' traces of this model, at FRACTION.
    - gradient.PART: cosine of a fact's two formats beyond that of the same relation.
    - states.PART: share of the questions whose state before the object finds its fact among the biographies', at the
      best layer.
    - signature.PART: share of the attribution of a biography's object that the tokens of subject and relation hold.
    - heads.PART, neurons.PART: the effective number of nodes that recall goes through, exp(entropy) of |attribution|.
    - shared_of_last: the share of the last model's shared set that is in this one's, |S ∩ S_last| / |S_last|.
    - heads_as_last.PART, neurons_as_last.PART: Spearman's correlation of |attribution| with the last model's.

    Single facts have values of gradient.PART, of states.PART (the mean over all layers after the embeddings) and of
    signature.PART.

    Args:
        last: the model at the end of training; this one if not given.
    """
    pad = pad_id(tokenizer)
    measures: dict[str, float | None] = {}
    for part, items in {**probe.stored, **probe.questions}.items():
        measures[f"recall.{part}"] = recall(model, tokenizer, items).summary()["exact_match"]

    strengths, sets = _selected(model, tokenizer, probe.traced, probe.scope, probe.targets)
    shared_set, largest = shared(sets), max(pset.size for pset in sets.values())
    measures["overlap"] = shared_set.size / largest if largest else None
    first, second, *_ = strengths.values()
    measures["spearman"] = finite(spearman(first, second))

    anatomy = Anatomy(model)
    whole = anatomy.whole(probe.scope)
    single: dict[str, Single] = {}
    for part, pairs in probe.facts.items():
        (row,) = gradient_consistency(model, pairs, {"all": whole}, pad_id=pad, together=probe.together)
        measures[f"gradient.{part}"], single[f"gradient.{part}"] = row["excess"], row["by_person"]
        rows = [row for row in representation_consistency(model, pairs, pad_id=pad) if row["place"] == "answer"]
        measures[f"states.{part}"] = max((row["top1"] for row in rows if row["top1"] is not None), default=None)
        single[f"states.{part}"] = _combine(np.mean, [row["by_person"] for row in rows if row["layer"] > 0])
    for part, pairs in probe.read.items():
        rows = input_signature(model, pairs, pad_id=pad, formats=["stored"])
        rows = [row for row in rows if row["group"] in ASKED]
        shares = [row["share"] for row in rows if row["share"] is not None]
        measures[f"signature.{part}"] = float(np.sum(shares)) if shares else None
        single[f"signature.{part}"] = _combine(np.sum, [row["by_person"] for row in rows])

    nodes = _node_importance(model, tokenizer, probe, anatomy)
    measures |= {name: finite(effective_number(importance)) for name, importance in nodes.items()}

    end = last or Moment(measures, single, shared_set, nodes)
    measures["shared_of_last"] = (shared_set & end.shared).size / end.shared.size if end.shared.size else None
    for name, importance in nodes.items():
        unit, _, part = name.partition(".")
        measures[f"{unit}_as_last.{part}"] = finite(rank_correlation(importance, end.nodes[name]))
    return Moment(measures, single, shared_set, nodes)


def _node_importance(model: nn.Module, tokenizer: Any, probe: Probe, anatomy: Anatomy) -> dict[str, np.ndarray]:
    """heads.PART and neurons.PART -> |attribution| of each node, for the units whose geometry is known."""
    nodes: dict[str, np.ndarray] = {}
    units = [unit for unit in circuit.NODES if anatomy.sites(unit)]
    for part, items in probe.questions.items() if units else ():
        data = circuit.answer_batches(items, tokenizer)
        means = circuit.node_means(model, data, anatomy, units)
        scores, _ = circuit.attribution(model, data, anatomy, means, units, probe.steps)
        for unit in units:
            name = {"query_head": "heads", "neuron": "neurons"}[unit]
            nodes[f"{name}.{part}"] = np.abs(scores[unit])
    return nodes


def _combine(statistic: Callable[[Sequence[float]], Any], tables: Sequence[Single]) -> Single:
    """The mean or sum over some tables of each fact's values, of those that are defined; None if none is."""
    combined: Single = {}
    for person in tables[0] if tables else ():
        columns = zip(*(table[person] for table in tables))  # the values of each fact
        defined = [[value for value in values if value is not None] for values in columns]
        combined[person] = [float(f"{statistic(values):.6g}") if values else None for values in defined]
    return combined


def shared_now(
    model: nn.Module,
    tokenizer: Any,
    traced: Mapping[str, Sequence[Encoded]],
    scope: Sequence[str],
    targets: str = "object",
) -> ParamSet:
    """The shared set of a model at FRACTION, from a trace of a few examples of each task."""
    return shared(_selected(model, tokenizer, traced, scope, targets)[1])


def _selected(
    model: nn.Module, tokenizer: Any, traced: Mapping[str, Sequence[Encoded]], scope: Sequence[str], targets: str
) -> tuple[dict[str, dict[str, Tensor]], dict[str, ParamSet]]:
    """Each task's strengths in scope, and the set that it selects."""
    strengths = {}
    for task, items in traced.items():
        data = batches(items, 64, targets, pad_id=pad_id(tokenizer), by_length=True)
        (only,) = trace(model, data, task=task, measures=["abs"], parts=1)
        strength = only.strength()
        strengths[task] = {name: strength[name] for name in scope}
    return strengths, {task: select(values, FRACTION, scope=scope) for task, values in strengths.items()}


def appearance(rows: Sequence[Row], names: Sequence[str] | None = None) -> list[Row]:
    """In which order the measures came: when each had changed by a tenth, and by half, of its change in all.

    Args:
        rows: {update, measure: value, …} of every checkpoint in order, the untaught model's first.
        names: of the measures; all numbers if not given.

    Returns:
        a row {measure, first, last, tenth, half, after} for each, those that were halfway earliest first. tenth and
        half are updates, interpolated linearly between checkpoints, of the *first* crossing (it may fall back later).
        after: the last checkpoint before it was halfway. The order of measures with the same `after` is not known. They
        are None if the first or last value is unknown, or if the change is less than half of the measure's range: then
        the measure came back from elsewhere, or did not move.
    """
    names = names or [
        name for name, value in rows[0].items() if name != "update" and not isinstance(value, str | Mapping)
    ]
    appearances = []
    for name in names:
        known = [(row["update"], row[name]) for row in rows if row.get(name) is not None]
        row: Row = {
            "measure": name,
            "first": rows[0].get(name),
            "last": rows[-1].get(name),
            "tenth": None,
            "half": None,
            "after": None,
        }
        span = np.ptp([value for _, value in known]) if known else 0.0
        if None not in (row["first"], row["last"]) and span and abs(row["last"] - row["first"]) >= HALF * span:
            line = [(update, (value - row["first"]) / (row["last"] - row["first"])) for update, value in known]
            (tenth, _), (half, after) = _crossing(line, TENTH), _crossing(line, HALF)
            row |= {"tenth": tenth, "half": half, "after": after}
        appearances.append(row)
    return sorted(appearances, key=lambda row: math.inf if row["half"] is None else row["half"])


def _crossing(line: Sequence[tuple[float, float]], level: float) -> tuple[float, float]:
    """Where a broken line that begins at height 0 and ends at 1 first reaches a level, and the last corner before."""
    for (x0, y0), (x1, y1) in pairwise(line):
        if y1 >= level:
            return x0 + (x1 - x0) * (level - y0) / (y1 - y0), x0
    raise AssertionError("the line ends at 1")
