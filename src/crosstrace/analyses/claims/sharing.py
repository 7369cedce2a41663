"""Claims on the shared set: how large, how central, and where."""

from __future__ import annotations

from crosstrace.analyses.claims.case import TIMES, Case
from crosstrace.analyses.claims.effects import Row, apart, difference, number, points, verdict_of
from crosstrace.core.text_tables import capital


def sharing(case: Case) -> list[Row]:
    """Whether the first model's shared set is larger, and more central, at each time and fraction."""
    if not set(case.pair) <= set(case.evals):
        return []
    rows: list[Row] = []
    for when in TIMES:
        for fraction in case.fractions:
            rows += _more_shared(case, when, fraction)
        for fraction in case.fractions:
            for unit in ("query_head", "neuron"):
                rows += _more_central(case, when, fraction, unit)
    return rows


def circuits(case: Case) -> list[Row]:
    """Whether the first model shares more where its recall goes through."""
    return [row for when in TIMES for unit in ("query_head", "neuron") for row in _in_circuit(case, when, unit)]


def _more_shared(case: Case, when: str, fraction: float) -> list[Row]:
    """Whether the first model's tasks share more of what they select."""
    pair = case.two(case.results.shared, when=when, reduction="example", fraction=fraction)
    if pair is None:
        return []
    one, two = pair
    first, second = case.names
    effect, low, high = difference(one, two, "overlap")
    return [
        {
            "claim": "more_shared",
            "text": f"The shared set is larger under {case.first_training}: overlap of the top {100 * fraction:g} %"
            + case.against,
            "when": when,
            "fraction": fraction,
            "verdict": verdict_of(low, high),
            **points(effect, low, high),
            "test": f"overlap |S|/|S_t|, {case.minus}: 95 % jackknife interval above 0",
            "note": f"{first} {number(one.overlap, '.3f')}, {second} {number(two.overlap, '.3f')}, "
            f"chance {number(one.chance, '.3f')}",
        }
    ]


def _more_central(case: Case, when: str, fraction: float, unit: str) -> list[Row]:
    """Whether the first model's shared set is more concentrated in few heads or neurons."""
    pair = case.two(case.results.centralization, when=when, fraction=fraction, unit=unit)
    if pair is None:
        return []
    one, two = pair
    first, second = case.names
    effect, low, high = difference(one, two, "excess_gini")
    units = "attention heads" if unit == "query_head" else "MLP neurons"
    return [
        {
            "claim": "more_central",
            "text": f"{capital(case.first_training)} shares more centrally: over {units}, top {100 * fraction:g} %"
            + case.against,
            "when": when,
            "fraction": fraction,
            "verdict": verdict_of(low, high),
            "effect": effect,
            "low": low,
            "high": high,
            "unit": "Gini over random",
            "test": f"Gini coefficient above that of random sets of the same size, {case.minus}: 95 % jackknife "
            "interval above 0",
            "note": f"excess {first} {number(one.excess_gini)}, {second} {number(two.excess_gini)}",
        }
    ]


def _in_circuit(case: Case, when: str, unit: str) -> list[Row]:
    """Whether the first model shares more in the heads or neurons that its recall goes through."""
    agreements = {name: circuit.agreement for name, circuit in case.results.mechanism.circuit.items()}
    pair = case.two(agreements, when=when, unit=unit, part=case.roles.trained)
    if pair is None or any(
        "concentration" not in row.model_fields_set for row in pair
    ):  # results of an earlier version
        return []
    effect, low, high = apart(*pair, name="concentration")
    units = "attention heads" if unit == "query_head" else "MLP neurons"
    levels = [number(None if row.concentration is None else 100 * row.concentration, "+.1f") for row in pair]
    return [
        {
            "claim": "in_circuit",
            "text": f"{capital(case.first_training)} shares more in the {units} that recall goes through{case.against}",
            "when": when,
            "verdict": verdict_of(low, high),
            **points(effect, low, high),
            "test": f"share of the shared set's parameters in {units} that the tenth of them with the most "
            f"attribution (trained questions) holds, minus their share of all such parameters; {case.minus}: 95 % "
            f"interval above 0, from bootstraps over {units}",
            "note": f"{case.names[0]} {levels[0]}, {case.names[1]} {levels[1]} percentage points",
        }
    ]
