"""Claims on recall: of held-out questions, and after ablation and grafting."""

from __future__ import annotations

import numpy as np

from crosstrace.analyses.claims.case import TIMES, Case
from crosstrace.analyses.claims.effects import (
    BOOTSTRAP_SEED,
    Effect,
    Row,
    against_controls,
    answers_of,
    counted,
    mean_of,
    number,
    over_people,
    points,
    values_of,
    verdict_of,
)
from crosstrace.core.statistics import cluster_bootstrap, nearest
from crosstrace.core.text_tables import capital
from crosstrace.results.mechanism import MinimalGraft

FEW = 0.05  # the fraction of the parameters whose graft must restore half of the recall


def recall(case: Case) -> list[Row]:
    """Whether the first model answers held-out questions, and the second does not."""
    part = case.roles.outcome
    if not all(part in case.evals.get(name, {}).get("answers", ()) for name in case.pair):
        return []
    one, two = (answers_of(case.evals[name]["answers"][part]) for name in case.pair)
    effect, low, high = cluster_bootstrap(one, two, case.evals[case.pair[0]]["people"][part], seed=BOOTSTRAP_SEED)
    recalls, fails = one.mean() > 0.5, two.mean() < 0.5
    verdict = verdict_of(low, high)
    if verdict == "holds" and not (recalls and fails):
        verdict = "does not hold"
    first, second = case.names
    return [
        {
            "claim": "recall",
            "text": f"{capital(case.first_training)} answers held-out questions; "
            f"{case.training(case.pair[1])} does not",
            "when": "training",
            "verdict": verdict,
            **points(effect, low, high),
            "test": f"held-out exact match, {case.minus}: 95 % bootstrap interval over subjects above 0, "
            f"with {first} above 50 % and {second} below 50 %",
            "note": f"{first} {100 * one.mean():.1f} %, {second} {100 * two.mean():.1f} % of {len(one)} questions",
        }
    ]


def interventions(case: Case, name: str) -> list[Row]:
    """Whether a model's recall depends on its shared set."""
    if name not in case.interventions or not case.roles.outcome:
        return []
    return [
        row for when in TIMES for kind in ("ablate", "graft")
        for row in _beats_controls(case, name, when, kind)
    ]  # fmt: skip


def minimal_graft(case: Case, name: str) -> list[Row]:
    """Whether a few grafted parameters restore a model's recall, and whether the shared ones are among them."""
    tables = case.results.mechanism.minimal_graft.get(name)
    return [] if tables is None else [*_few_restore(case, name, tables), *_restored_by_shared(case, name, tables)]


def _beats_controls(case: Case, name: str, when: str, kind: str) -> list[Row]:
    """How much more recall the shared set takes away (ablation) or gives (grafting) than each control."""
    tables, part = case.interventions[name], case.roles.outcome
    rows = [row for row in tables[kind] if row["when"] == when]
    shared = {row["fraction"]: row for row in rows if row["set"] == "shared"}
    if not shared:
        return []
    people = tables["people"][part]
    effects: dict[str, Effect] = {}
    partly: dict[str, str] = {}
    for control in dict.fromkeys(row["set"] for row in rows if row["set"] != "shared"):
        by_fraction = {row["fraction"]: row for row in rows if row["set"] == control}
        common = [fraction for fraction in shared if fraction in by_fraction]
        if len(common) < len(shared):
            partly[control] = f" (only at {', '.join(f'{100 * f:g}' for f in common)} %: too few parameters are left)"
        with_shared = np.mean([_mean_answers(shared[f], part) for f in common], axis=0)
        with_control = np.mean([_mean_answers(by_fraction[f], part) for f in common], axis=0)
        more, less = (with_control, with_shared) if kind == "ablate" else (with_shared, with_control)
        effects[control] = tuple(cluster_bootstrap(more, less, people, seed=BOOTSTRAP_SEED))  # type: ignore[assignment]
    if not effects:
        return []
    strongest, verdict = against_controls(effects)
    effect, low, high = effects[strongest]
    in_points = {control: None if e is None else 100 * e for control, (e, _, _) in effects.items()}
    does = "Ablating the shared set destroys" if kind == "ablate" else "Grafting the shared set restores"
    fractions = ", ".join(f"{100 * fraction:g}" for fraction in shared)
    return [
        {
            "claim": "ablation" if kind == "ablate" else "grafting",
            "text": f"{does} held-out recall more than any control",
            "when": when,
            "verdict": verdict,
            **points(effect, low, high),
            "test": f"{case.called(name)} held-out exact match, mean over the top {fractions} %, against each control "
            "of the same size: 95 % bootstrap interval over subjects above 0 for every control",
            "note": "against the strongest control, " + strongest + "; all: "
            + ", ".join(f"{control} {number(e, '+.1f')}{partly.get(control, '')}" for control, e in in_points.items()),
        }
    ]  # fmt: skip


def _few_restore(case: Case, name: str, tables: MinimalGraft) -> list[Row]:
    """Whether a few grafted parameters restore half of the held-out recall that was learned."""
    grafts = [row for row in tables.grafts if row.part == case.roles.outcome]
    ranked = [row for row in grafts if row.order == "contribution"]
    if not ranked:
        return []
    few = nearest([row.fraction for row in ranked], FEW)
    chosen = next(row for row in ranked if row.fraction == few)
    base, tuned = (next(row for row in grafts if row.order == order) for order in ("base", "tuned"))
    values = [values_of(row.by_person or {}) for row in (chosen, base, tuned)]
    facts = [*values[0]]
    restored, before, after = ([by_fact[fact] for fact in facts] for by_fact in values)
    effect, low, high = over_people(restored, [(b + a) / 2 for b, a in zip(before, after)], facts)
    percent, tuned_name = f"{100 * chosen.fraction:g} %", case.called(name)
    smallest = next(r for r in tables.fewest if (r.part, r.order) == (case.roles.outcome, "contribution"))
    enough = "no graft restores" if smallest.fraction is None else f"{100 * smallest.fraction:g} % restore"
    levels = ", ".join(
        f"{label} {number(mean_of(answers), '.1%').replace('%', ' %')}"
        for label, answers in (("base", before), (f"with {percent} grafted", restored), ("tuned", after))
    )
    return [
        {
            "claim": "minimal_graft",
            "text": f"Grafting {percent} of the parameters restores half of held-out recall",
            "when": "final",
            "verdict": verdict_of(low, high),
            **points(effect, low, high),
            "test": f"base with the {tuned_name} values of the parameters whose change moves the trained answers most: "
            f"held-out exact match, minus the mean of base and {tuned_name} model: 95 % bootstrap interval over "
            "subjects above 0",
            "note": f"{levels}{counted(facts)}; {enough} nine tenths",
        }
    ]


def _restored_by_shared(case: Case, name: str, tables: MinimalGraft) -> list[Row]:
    """Whether the shared parameters are among those that restore recall."""
    return [
        {
            "claim": "graft_is_shared",
            "text": "The parameters that restore recall when grafted hold the shared ones",
            "when": row.when,
            "verdict": verdict_of(row.excess_low, row.excess_high),
            **points(row.excess, row.excess_low, row.excess_high),
            "test": f"the smallest graft that restores nine tenths of the {case.called(name)} model's trained answers: "
            "the share of the shared set that it holds, minus the share expected with the same counts in each tensor: "
            "95 % jackknife interval over parts of the questions above 0",
            "note": f"the graft has {row.graft:,} parameters and holds {number(row.overlap, '.3f')} of the "
            f"{row.size:,} shared ones, expected {number(row.expected, '.3f')}"
            if row.graft
            else "no graft of less than all parameters restores nine tenths of the trained answers",
        }
        for row in tables.overlap
        if row.when in TIMES
    ]


def _mean_answers(row: Row, part: str) -> np.ndarray:
    """Each question's share of right answers over the draws of a set."""
    return np.mean([answers_of(bits) for bits in row["answers"][part]], axis=0)
