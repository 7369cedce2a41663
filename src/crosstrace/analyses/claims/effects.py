"""Effects of the claims with their intervals, and the verdicts that they give."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from crosstrace.core.statistics import cluster_bootstrap, student
from crosstrace.results.mechanism import CircuitAgreement
from crosstrace.results.sharing import Centralization, Overlap

BOOTSTRAP_SEED = 0

FEWEST = 6  # people; five differ all in one direction by chance in more than 5 % of the cases

Row = dict[str, Any]  # of a claim, as `results.sharing.Claim` has it

Values = dict[tuple[str, int], float]  # of single facts: the person, and which one of the person's facts

Effect = tuple[float | None, float | None, float | None]


def against_controls(effects: Mapping[str, Effect]) -> tuple[str, str]:
    """The strongest control, and the verdict. The claim must hold against every control."""
    verdicts = [verdict_of(low, high) for _, low, high in effects.values()]
    strongest = min(effects, key=lambda control: math.inf if (e := effects[control][0]) is None else e)
    if "does not hold" in verdicts:
        return strongest, "does not hold"
    return strongest, "holds" if set(verdicts) == {"holds"} else "undecided"


def values_of(by_person: Mapping[str, Sequence[float | None]]) -> Values:
    """The defined values of single facts."""
    return {
        (person, number): value
        for person, values in by_person.items()
        for number, value in enumerate(values)
        if value is not None
    }


def over_people(a: Sequence[float], b: Sequence[float], facts: Sequence[tuple[str, int]]) -> Effect:
    """Mean a − b of paired facts, and its interval over people if there are enough of them."""
    people = [person for person, _ in facts]
    if not people:
        return None, None, None
    effect, low, high = cluster_bootstrap(a, b, people, seed=BOOTSTRAP_SEED)
    return (effect, low, high) if len(set(people)) >= FEWEST else (effect, None, None)


def counted(facts: Collection[tuple[str, int]]) -> str:
    """How many facts and subjects a claim rests on, for the end of its note."""
    people = len({person for person, _ in facts})
    few = f", too few for an interval (at least {FEWEST})" if people < FEWEST else ""
    return f"; {len(facts)} facts of {people} subjects{few}"


def mean_of(values: Sequence[float]) -> float | None:
    """The mean; None of no values."""
    return float(np.mean(values)) if values else None


def difference(a: Overlap | Centralization, b: Overlap | Centralization, name: str) -> Effect:
    """a − b of two independent jackknife estimates, Welch's interval."""
    values = [getattr(row, name) for row in (a, b)]
    widths = [row.high - row.low for row in (a, b) if row.low is not None and row.high is not None]
    if None in values or len(widths) < 2:
        return None, None, None
    freedoms = [row.parts - 1 for row in (a, b)]
    errors = [width / 2 / student(freedom) for width, freedom in zip(widths, freedoms)]
    effect, variance = values[0] - values[1], errors[0] ** 2 + errors[1] ** 2
    if variance == 0:
        return effect, effect, effect
    welch = variance**2 / sum(error**4 / freedom for error, freedom in zip(errors, freedoms))
    half = student(welch) * math.sqrt(variance)
    return effect, effect - half, effect + half


def apart(a: CircuitAgreement, b: CircuitAgreement, name: str) -> Effect:
    """a − b of two independent estimates with 95 % intervals, whose half-widths add up in quadrature."""
    if any(getattr(row, key) is None for row in (a, b) for key in (name, f"{name}_low", f"{name}_high")):
        return None, None, None
    effect = getattr(a, name) - getattr(b, name)
    half = math.hypot(*((getattr(row, f"{name}_high") - getattr(row, f"{name}_low")) / 2 for row in (a, b)))
    return effect, effect - half, effect + half


def verdict_of(low: float | None, high: float | None) -> str:
    """The verdict of an effect's interval: above 0, below 0, or undecided."""
    if low is None or high is None:
        return "undecided"
    return "holds" if low > 0 else "does not hold" if high < 0 else "undecided"


def points(effect: float | None, low: float | None, high: float | None) -> Row:
    """An effect that is a difference of shares, in percentage points."""
    named = {"effect": effect, "low": low, "high": high}
    return {k: None if v is None else 100 * v for k, v in named.items()} | {"unit": "percentage points"}


def answers_of(bits: str) -> np.ndarray:
    """Answers as numbers: 1 for right, 0 for wrong."""
    return np.array([bit == "1" for bit in bits], dtype=float)


def number(value: float | None, form: str = "+.3f") -> str:
    """A number as a claim's note writes it."""
    return "undefined" if value is None else format(value, form)
