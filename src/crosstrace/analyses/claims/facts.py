"""Claims on single facts in both of their formats: on gradients, hidden states, and the tokens that are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from crosstrace.analyses.claims.case import TIMES, Case
from crosstrace.analyses.claims.effects import (
    Effect,
    Row,
    Values,
    against_controls,
    counted,
    mean_of,
    number,
    over_people,
    points,
    values_of,
    verdict_of,
)
from crosstrace.analyses.signature import ASKED
from crosstrace.core.statistics import mean_between
from crosstrace.core.text_tables import capital
from crosstrace.data.tasks import Roles
from crosstrace.results.mechanism import DynamicsPoint, Gradients, Representations, Signature

RANDOM = ("random", "random_per_tensor")


@dataclass(frozen=True)
class Comparison:
    """A claim that compares single held-out facts of two models.

    Attributes:
        claim: its name.
        makes: what the claim says that the first model's training does.
        quantity: what is compared.
        unit: of the effect.
        measure: the quantity's name in the rows of `dynamics`, without the part.
    """

    claim: str
    makes: str
    quantity: str
    unit: str
    measure: str

    def says(self, case: Case, when: str) -> str:
        """What the claim says of the end of training ("final"), or of all of it ("training")."""
        text = f"{capital(case.first_training)} {self.makes}"
        return (f"{text} while it trains" if when == "training" else text) + case.against

    def test(self, case: Case, when: str) -> str:
        """What decides it."""
        moment, over = "at the end of training", ""
        if when == "training":
            moment = "during training"
            over = ", mean over the share of training that checkpoints of both models span, without base and end"
        return (
            f"held-out facts {moment}: {self.quantity}{over}, {case.minus}: 95 % bootstrap interval over subjects "
            "above 0"
        )


GRADIENTS = Comparison(
    claim="gradient_consistency",
    makes="makes the gradients of a fact's two formats more alike",
    quantity="cosine of the two formats' gradients beyond that with another subject's fact of the relation, over all "
    "parameters in scope",
    unit="cosine",
    measure="gradient",
)

STATES = Comparison(
    claim="state_consistency",
    makes="makes the hidden states of a fact's two formats more alike",
    quantity="how often the question's state before the object finds its own fact first among the stored ones, mean "
    "over all layers after the embeddings",
    unit="percentage points",
    measure="states",
)

INPUTS = Comparison(
    claim="input_signature",
    makes="reads a biography's object more off its subject and relation",
    quantity="share of the attribution of the object in the biography that the tokens of subject and relation hold, "
    "against all of the context before it",
    unit="percentage points",
    measure="signature",
)

COMPARISONS = (GRADIENTS, STATES, INPUTS)


def followed(roles: Roles) -> tuple[str, ...]:
    """The measures of single facts that the claims need at every checkpoint."""
    return tuple(f"{what.measure}.{roles.outcome}" for what in COMPARISONS)


def compares_facts(part: str, row: Mapping[str, Any], outcome: str) -> bool:
    """Whether a claim compares the single facts of this row of a part of the mechanism."""
    if row["part"] != outcome:
        return False
    if part == "gradients":
        return row["group"] in ("all", "shared", *RANDOM)
    if part == "minimal_graft":
        return row["order"] in ("base", "contribution", "tuned")
    if part == "representations":
        return row["place"] == "answer" and row["layer"] > 0
    return part == "signature" and row["format"] == "stored" and row["group"] in ASKED


def gradient_consistency(case: Case) -> list[Row]:
    """Whether the gradients of a fact's two formats are more alike in the first model."""
    rows = case.results.mechanism.gradients
    tables = [_tables(case, rows.get(name, ()), "gradients", group="all") for name in case.pair]
    if not all(tables):
        return _while_training(case, GRADIENTS)
    trained = [
        row.excess for name in case.pair for row in rows[name]
        if row.part == case.roles.trained and row.group == "all"
    ]  # fmt: skip
    also = f"; trained facts {_levels(case, trained[0], trained[1])}" if len(trained) == 2 else ""
    return [_compared(case, GRADIENTS, tables[0], tables[1], also=also), *_while_training(case, GRADIENTS)]


def state_consistency(case: Case) -> list[Row]:
    """Whether the hidden states of a fact's two formats are more alike in the first model."""
    rows = case.results.mechanism.representations
    tables = [_tables(case, rows.get(name, ()), "representations") for name in case.pair]
    at_the_end = [_compared(case, STATES, tables[0], tables[1])] if all(tables) else []
    return at_the_end + _while_training(case, STATES)


def input_signature(case: Case) -> list[Row]:
    """Whether the first model reads a stored object more off its subject and relation."""
    rows = case.results.mechanism.signature
    shares: list[list[Values]] = []
    for name in case.pair:
        groups = [_tables(case, rows.get(name, ()), "signature", group=group) for group in ASKED]
        if not all(groups):
            return _while_training(case, INPUTS)
        (subject,), (relation,) = groups
        shares.append([{fact: value + relation[fact] for fact, value in subject.items() if fact in relation}])
    return [_compared(case, INPUTS, shares[0], shares[1]), *_while_training(case, INPUTS)]


def in_shared_set(case: Case, name: str) -> list[Row]:
    """Whether a model's gradients are more alike inside the shared set of each time."""
    rows = case.results.mechanism.gradients.get(name, ())
    return [claim for when in TIMES for claim in _in_shared_set(case, name, rows, when)]


def _while_training(case: Case, what: Comparison) -> list[Row]:
    """A claim on each fact's mean during training, over the part of it that checkpoints of both models span."""
    tables, measure = case.results.mechanism.dynamics, f"{what.measure}.{case.roles.outcome}"
    models = [_checkpoints(tables[name].rows if name in tables else (), measure) for name in case.pair]
    if not all(models):
        return []
    start, stop = max(map(min, models)), min(map(max, models))
    if start > stop:  # the models' checkpoints span no common share of training
        return []
    one, two = (_over_training(checkpoints, start, stop) for checkpoints in models)
    span = f"from {100 * start:.0f} % to {100 * stop:.0f} % of training"
    also = f"; {span}, {len(models[0])} and {len(models[1])} checkpoints"
    return [_compared(case, what, [one], [two], when="training", also=also)]


def _checkpoints(rows: Sequence[DynamicsPoint], measure: str) -> dict[float, Values]:
    """The values of single facts by the share of training, at each checkpoint between the base and the end."""
    end = rows[-1].update if rows else 0
    return {
        row.update / end: values_of(row.by_person[measure]) for row in rows
        if 0 < row.update < end and row.by_person is not None and measure in row.by_person
    }  # fmt: skip


def _over_training(checkpoints: Mapping[float, Values], start: float, stop: float) -> Values:
    """Each fact's mean from one share of training to another; only facts that every checkpoint defines."""
    first, *others = checkpoints.values()
    facts = [fact for fact in first if all(fact in values for values in others)]
    shares = [*checkpoints]
    return {
        fact: mean_between(shares, [values[fact] for values in checkpoints.values()], start, stop) for fact in facts
    }


def _in_shared_set(case: Case, name: str, rows: Sequence[Gradients], when: str) -> list[Row]:
    """Consistency of gradients inside the shared set of one time, beyond random sets."""
    inside, *controls = (_tables(case, rows, "gradients", group=group, when=when) for group in ("shared", *RANDOM))
    if not inside or not all(controls):
        return []
    effects: dict[str, Effect] = {}
    levels: list[str] = []
    facts: set[tuple[str, int]] = set()
    for control, draws in zip(RANDOM, controls):
        common = [fact for fact in inside[0] if all(fact in draw for draw in draws)]
        random = [float(np.mean([draw[fact] for draw in draws])) for fact in common]
        effects[control] = over_people([inside[0][fact] for fact in common], random, common)
        levels.append(f"{control} {number(mean_of(random))}")
        facts |= set(common)
    strongest, verdict = against_controls(effects)
    effect, low, high = effects[strongest]
    note = f"inside {number(mean_of([inside[0][fact] for fact in inside[0] if fact in facts]))}, {', '.join(levels)}"
    return [
        {
            "claim": "consistency_in_shared_set",
            "text": "Gradients of the two formats are more alike inside the shared set than in random sets",
            "when": when,
            "verdict": verdict,
            "effect": effect,
            "low": low,
            "high": high,
            "unit": "cosine",
            "test": f"{case.called(name)}, held-out facts at the end of training: the cosine beyond another fact of "
            "the relation inside the shared set of the fraction nearest 5 %, minus its mean over random sets of the "
            "same size, and minus that over random sets of the same size in each tensor: 95 % bootstrap interval over "
            "subjects above 0 for both",
            "note": f"against the stronger control, {strongest}; {note}{counted(facts)}",
        }
    ]


def _tables(
    case: Case, rows: Sequence[Gradients] | Sequence[Representations] | Sequence[Signature], part: str, **wanted: Any
) -> list[Values]:
    """The defined values of single facts, a table for each row that a claim compares; layers are in their order."""
    return [
        values_of(row.by_person) for row in rows
        if row.by_person is not None and compares_facts(part, row.as_row(), case.roles.outcome)
        and all(getattr(row, key) == value for key, value in wanted.items())
    ]  # fmt: skip


def _compared(
    case: Case, what: Comparison, first: Sequence[Values], second: Sequence[Values], *, when: str = "final",
    also: str = "",
) -> Row:  # fmt: skip
    """A claim on the same facts in both models.

    Args:
        first, second: tables of single facts, one a layer if there are several. A fact's value is its mean over the
            tables that define it.
        also: the end of the claim's note.
    """
    pairs_of: dict[tuple[str, int], list[tuple[float, float]]] = {}  # a fact's values in both models, by table
    seen: set[tuple[str, int]] = set()
    for one, two in zip(first, second):
        seen |= one.keys() | two.keys()
        for fact, value in one.items():
            if fact in two:
                pairs_of.setdefault(fact, []).append((value, two[fact]))
    a, b = ([float(np.mean([pair[i] for pair in pairs])) for pairs in pairs_of.values()] for i in (0, 1))
    effect, low, high = over_people(a, b, list(pairs_of))
    percent = what.unit == "percentage points"
    amounts = points(effect, low, high) if percent else {"effect": effect, "low": low, "high": high, "unit": what.unit}
    alone = len(seen) - len(pairs_of)
    left_out = f"; {alone} more defined in one model only" if alone else ""
    levels = _levels(case, mean_of(a), mean_of(b), percent)
    return {
        "claim": what.claim,
        "text": what.says(case, when),
        "when": when,
        "verdict": verdict_of(low, high),
        **amounts,
        "test": what.test(case, when),
        "note": f"{levels}{counted(pairs_of)}{left_out}{also}",
    }


def _levels(case: Case, first: float | None, second: float | None, percent: bool = False) -> str:
    """The mean of each model, e.g. "Mix-tuned +0.310, Stage-tuned +0.052"."""
    levels = [number(value, ".1%" if percent else "+.3f").replace("%", " %") for value in (first, second)]
    return f"{case.names[0]} {levels[0]}, {case.names[1]} {levels[1]}"
