"""The paper's claims, each judged on a run by a stated test: holds, does not hold, or undecided.

Numbers come in, verdicts go out. A verdict is about one run: its intervals cover which questions were asked and which
examples were traced, not which seed the world or the training had.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import t as student

from crosstrace.analyses.signature import ASKED
from crosstrace.core.statistics import cluster_bootstrap, mean_between, nearest

MIXED, STAGED = "mixed", "two_stage"
TIMES = ("online", "summed", "final")
BOOTSTRAP_SEED = 0
HELD_OUT = "qa_ood"  # the facts that gradients, hidden states and inputs are compared on
RANDOM = ("random", "random_per_tensor")
FEW = 0.05  # of the parameters, that are grafted to restore recall
FEWEST = 6  # people: of five, all differ in one direction by chance in more than 5 % of the cases
Row = dict[str, Any]
Values = dict[tuple[str, int], float]  # of single facts: the person, and which one of the person's facts
Effect = tuple[float | None, float | None, float | None]


@dataclass(frozen=True)
class Comparison:
    """A claim that compares single facts of the Mix-tuned and of the Stage-tuned model.

    Attributes:
        claim, text: its name, and what it says of the end of training.
        quantity: what is compared.
        unit: of the effect.
        measure: its name at each checkpoint of training, in the rows of `dynamics`.
    """

    claim: str
    text: str
    quantity: str
    unit: str
    measure: str

    def says(self, when: str) -> str:
        """What the claim says of the end of training ("final"), or of all of it ("training")."""
        return f"{self.text} while it trains" if when == "training" else self.text

    def test(self, when: str) -> str:
        """What decides it."""
        moment, over = "at the end of training", ""
        if when == "training":
            moment = "during training"
            over = ", mean over the share of training that checkpoints of both models span, without base and end"
        return (
            f"held-out facts {moment}: {self.quantity}{over}, Mix-tuned minus Stage-tuned: 95 % bootstrap interval "
            "over subjects above 0"
        )


GRADIENTS = Comparison(
    claim="gradient_consistency",
    text="Mixed training makes the gradients of a fact's two formats more alike",
    quantity="cosine of the two formats' gradients beyond that with another subject's fact of the relation, over all "
    "parameters in scope",
    unit="cosine",
    measure=f"gradient.{HELD_OUT}",
)
STATES = Comparison(
    claim="state_consistency",
    text="Mixed training makes the hidden states of a fact's two formats more alike",
    quantity="how often the question's state before the object finds its own fact first among the stored ones, mean "
    "over all layers after the embeddings",
    unit="percentage points",
    measure=f"states.{HELD_OUT}",
)
INPUTS = Comparison(
    claim="input_signature",
    text="Mixed training reads a biography's object more off its subject and relation",
    quantity="share of the attribution of the object in the biography that the tokens of subject and relation hold, "
    "against all of the context before it",
    unit="percentage points",
    measure=f"signature.{HELD_OUT}",
)
# no trace has a part in these
OF_CHECKPOINTS = (*(what.claim for what in (GRADIENTS, STATES, INPUTS)), "minimal_graft")
FOLLOWED = tuple(what.measure for what in (GRADIENTS, STATES, INPUTS))  # at every checkpoint, fact by fact


def judge(
    results: Mapping[str, Any],
    evals: Mapping[str, Any],
    interventions: Mapping[str, Any],
    fractions: Sequence[float],
    given: Collection[str] = (),
) -> tuple[list[Row], list[Row]]:
    """Judge every claim that the run's models allow.

    Args:
        results: what is known so far, as in results.json.
        evals: per model, its answers ("answers": part -> bits) and whom each is about ("people").
        interventions: per strategy, its rows with answers.
        fractions: at which sharing and centralization are judged.
        given: models that were taught elsewhere: each of them is judged by its interventions, and what asks for an
            online trace is told as not tested.

    Returns:
        the claims, and a sentence on each one that comes out differently online and at the final checkpoint.
    """
    rows: list[Row] = []
    if {MIXED, STAGED} <= set(evals) and "qa_ood" in evals[MIXED]["answers"]:
        rows.append(_recall(evals))
        for when in TIMES:
            for fraction in fractions:
                rows += _more_shared(results, when, fraction)
            for fraction in fractions:
                for unit in ("query_head", "neuron"):
                    rows += _more_central(results, when, fraction, unit)
    mechanism = results.get("mechanism") or {}
    followed = mechanism.get("dynamics") or {}
    rows += _gradient_consistency(mechanism.get("gradients") or {}) + _while_training(GRADIENTS, followed)
    rows += _state_consistency(mechanism.get("representations") or {}) + _while_training(STATES, followed)
    rows += _input_signature(mechanism.get("signature") or {}) + _while_training(INPUTS, followed)
    for name, found in (mechanism.get("gradients") or {}).items():
        if name == MIXED or name in given:
            for when in TIMES:
                rows += [_of(name, row) for row in _in_shared_set(found, when)]
    for name in (name for name in interventions if name == MIXED or name in given):
        for when in TIMES:
            for kind in ("ablate", "graft"):
                rows += [_of(name, row) for row in _beats_controls(interventions[name], when, kind)]
    for name, found in (mechanism.get("minimal_graft") or {}).items():
        if name == MIXED or name in given:
            rows += [_of(name, row) for row in (*_few_restore(found), *_restored_by_shared(found))]
    circuits = mechanism.get("circuit") or {}
    for when in TIMES:
        for unit in ("query_head", "neuron"):
            rows += _in_circuit(circuits, when, unit)
    if given:
        rows += _not_tested(rows, results)
    return rows, _differences(rows, results)


def _of(name: str, row: Row) -> Row:
    """A row about the Mix-tuned model as one about another."""
    if name == MIXED:
        return row
    return row | {"text": f"{name}: {row['text']}", "test": row["test"].replace("Mix-tuned", name)}


def _not_tested(rows: Sequence[Row], results: Mapping[str, Any]) -> list[Row]:
    """What was judged at the final checkpoint and has no online trace, since training was not seen."""
    online = {(row["claim"], row["text"]) for row in rows if row["when"] == "online"}
    lacking = [
        row for row in rows
        if row["when"] == "final" and row["claim"] not in OF_CHECKPOINTS and (row["claim"], row["text"]) not in online
    ]  # fmt: skip
    nothing = {"effect": None, "low": None, "high": None, "verdict": "not tested", "when": "online"}
    return [row | nothing | {"note": "no online trace: the models were not trained here"} for row in lacking]


def _recall(evals: Mapping[str, Any]) -> Row:
    mixed, staged = (_answers(evals[name]["answers"]["qa_ood"]) for name in (MIXED, STAGED))
    effect, low, high = cluster_bootstrap(mixed, staged, evals[MIXED]["people"]["qa_ood"], seed=BOOTSTRAP_SEED)
    recalls, fails = mixed.mean() > 0.5, staged.mean() < 0.5
    verdict = _verdict(low, high)
    if verdict == "holds" and not (recalls and fails):
        verdict = "does not hold"
    return {
        "claim": "recall",
        "text": "Mixed training answers held-out questions; two-stage training does not",
        "when": "training",
        "verdict": verdict,
        **_points(effect, low, high),
        "test": "held-out exact match, Mix-tuned minus Stage-tuned: 95 % bootstrap interval over subjects above 0, "
        "with Mix-tuned above 50 % and Stage-tuned below 50 %",
        "note": f"Mix-tuned {100 * mixed.mean():.1f} %, Stage-tuned {100 * staged.mean():.1f} % "
        f"of {len(mixed)} questions",
    }


def _more_shared(results: Mapping[str, Any], when: str, fraction: float) -> list[Row]:
    pair = _pair(results["shared"], when=when, reduction="example", fraction=fraction)
    if pair is None:
        return []
    mixed, staged = pair
    effect, low, high = _difference(mixed, staged, "overlap")
    return [
        {
            "claim": "more_shared",
            "text": f"The shared set is larger under mixed training: overlap of the top {100 * fraction:g} %",
            "when": when,
            "fraction": fraction,
            "verdict": _verdict(low, high),
            **_points(effect, low, high),
            "test": "overlap |S|/|S_t|, Mix-tuned minus Stage-tuned: 95 % jackknife interval above 0",
            "note": f"Mix-tuned {_number(mixed['overlap'], '.3f')}, Stage-tuned {_number(staged['overlap'], '.3f')}, "
            f"chance {_number(mixed['chance'], '.3f')}",
        }
    ]


def _more_central(results: Mapping[str, Any], when: str, fraction: float, unit: str) -> list[Row]:
    pair = _pair(results["centralization"], when=when, fraction=fraction, unit=unit)
    if pair is None:
        return []
    mixed, staged = pair
    effect, low, high = _difference(mixed, staged, "excess_gini")
    units = "attention heads" if unit == "query_head" else "MLP neurons"
    return [
        {
            "claim": "more_central",
            "text": f"Mixed training shares more centrally: over {units}, top {100 * fraction:g} %",
            "when": when,
            "fraction": fraction,
            "verdict": _verdict(low, high),
            "effect": effect,
            "low": low,
            "high": high,
            "unit": "Gini over random",
            "test": "Gini coefficient above that of random sets of the same size, Mix-tuned minus Stage-tuned: 95 % "
            "jackknife interval above 0",
            "note": f"excess Mix-tuned {_number(mixed['excess_gini'])}, Stage-tuned {_number(staged['excess_gini'])}",
        }
    ]


def _beats_controls(found: Mapping[str, Any], when: str, kind: str) -> list[Row]:
    """Ablation: recall lost with the shared set beyond each control; grafting: recall gained beyond each control."""
    rows = [row for row in found[kind] if row["when"] == when]
    shared = {row["fraction"]: row for row in rows if row["set"] == "shared"}
    if not shared:
        return []
    people = found["people"]["qa_ood"]
    effects: dict[str, Effect] = {}
    partly: dict[str, str] = {}
    for control in dict.fromkeys(row["set"] for row in rows if row["set"] != "shared"):
        by_fraction = {row["fraction"]: row for row in rows if row["set"] == control}
        common = [fraction for fraction in shared if fraction in by_fraction]
        if len(common) < len(shared):
            partly[control] = f" (only at {', '.join(f'{100 * f:g}' for f in common)} %: too few parameters are left)"
        ours = np.mean([_mean_answers(shared[f]) for f in common], axis=0)
        theirs = np.mean([_mean_answers(by_fraction[f]) for f in common], axis=0)
        more, less = (theirs, ours) if kind == "ablate" else (ours, theirs)
        effects[control] = tuple(cluster_bootstrap(more, less, people, seed=BOOTSTRAP_SEED))  # type: ignore[assignment]
    if not effects:
        return []
    strongest, verdict = _against_controls(effects)
    effect, low, high = effects[strongest]
    points = {name: None if e is None else 100 * e for name, (e, _, _) in effects.items()}
    does = "Ablating the shared set destroys" if kind == "ablate" else "Grafting the shared set restores"
    fractions = ", ".join(f"{100 * fraction:g}" for fraction in shared)
    return [
        {
            "claim": "ablation" if kind == "ablate" else "grafting",
            "text": f"{does} held-out recall more than any control",
            "when": when,
            "verdict": verdict,
            **_points(effect, low, high),
            "test": f"Mix-tuned held-out exact match, mean over the top {fractions} %, against each control of the "
            "same size: 95 % bootstrap interval over subjects above 0 for every control",
            "note": "against the strongest control, " + strongest + "; all: "
            + ", ".join(f"{name} {_number(e, '+.1f')}{partly.get(name, '')}" for name, e in points.items()),
        }
    ]  # fmt: skip


def _few_restore(found: Mapping[str, Any]) -> list[Row]:
    """Whether a few grafted parameters restore half of the held-out recall that was learned."""
    grafts = [row for row in found["grafts"] if row["part"] == HELD_OUT]
    ranked = [row for row in grafts if row["order"] == "contribution"]
    if not ranked:
        return []
    few = nearest([row["fraction"] for row in ranked], FEW)
    chosen = next(row for row in ranked if row["fraction"] == few)
    base, tuned = (next(row for row in grafts if row["order"] == order) for order in ("base", "tuned"))
    values = [_values(row["by_person"]) for row in (chosen, base, tuned)]
    facts = [*values[0]]
    restored, before, after = ([own[fact] for fact in facts] for own in values)
    effect, low, high = _over_people(restored, [(b + a) / 2 for b, a in zip(before, after)], facts)
    percent = f"{100 * chosen['fraction']:g} %"
    smallest = next(r for r in found["fewest"] if (r["part"], r["order"]) == (HELD_OUT, "contribution"))
    enough = "no graft restores" if smallest["size"] is None else f"{100 * smallest['fraction']:g} % restore"
    levels = ", ".join(
        f"{label} {_number(_mean(own), '.1%').replace('%', ' %')}"
        for label, own in (("base", before), (f"with {percent} grafted", restored), ("tuned", after))
    )
    return [
        {
            "claim": "minimal_graft",
            "text": f"Grafting {percent} of the parameters restores half of held-out recall",
            "when": "final",
            "verdict": _verdict(low, high),
            **_points(effect, low, high),
            "test": "base with the Mix-tuned values of the parameters whose change moves the trained answers most: "
            "held-out exact match, minus the mean of base and Mix-tuned model: 95 % bootstrap interval over subjects "
            "above 0",
            "note": f"{levels}{_counted(facts)}; {enough} nine tenths",
        }
    ]


def _restored_by_shared(found: Mapping[str, Any]) -> list[Row]:
    """Whether the parameters that restore recall hold the shared ones."""
    return [
        {
            "claim": "graft_is_shared",
            "text": "The parameters that restore recall when grafted hold the shared ones",
            "when": row["when"],
            "verdict": _verdict(row["excess_low"], row["excess_high"]),
            **_points(row["excess"], row["excess_low"], row["excess_high"]),
            "test": "the smallest graft that restores nine tenths of the Mix-tuned model's trained answers: the share "
            "of the shared set that it holds, minus the share expected with the same counts in each tensor: 95 % "
            "jackknife interval over parts of the questions above 0",
            "note": f"the graft has {row['graft']:,} parameters and holds {_number(row['overlap'], '.3f')} of the "
            f"{row['size']:,} shared ones, expected {_number(row['expected'], '.3f')}"
            if row["graft"]
            else "no graft restores nine tenths of the trained answers",
        }
        for row in found["overlap"]
        if row["when"] in TIMES
    ]


def _in_circuit(circuits: Mapping[str, Any], when: str, unit: str) -> list[Row]:
    """Whether mixed training shares more in the heads or neurons that its recall goes through."""
    agreements = {name: found["agreement"] for name, found in circuits.items()}
    pair = _pair(agreements, when=when, unit=unit, part="qa_id")
    if pair is None or any("concentration" not in row for row in pair):  # of an earlier version
        return []
    effect, low, high = _apart(*pair, name="concentration")
    units = "attention heads" if unit == "query_head" else "MLP neurons"
    levels = [_number(None if row["concentration"] is None else 100 * row["concentration"], "+.1f") for row in pair]
    return [
        {
            "claim": "in_circuit",
            "text": f"Mixed training shares more in the {units} that recall goes through",
            "when": when,
            "verdict": _verdict(low, high),
            **_points(effect, low, high),
            "test": f"share of the shared set's parameters in {units} that the tenth of them with the most "
            "attribution (trained questions) holds, minus their share of all such parameters; Mix-tuned minus "
            f"Stage-tuned: 95 % interval above 0, from bootstraps over {units}",
            "note": f"Mix-tuned {levels[0]}, Stage-tuned {levels[1]} percentage points",
        }
    ]


def _against_controls(effects: Mapping[str, Effect]) -> tuple[str, str]:
    """The strongest control, and the verdict on a claim that must hold against every one."""
    verdicts = [_verdict(low, high) for _, low, high in effects.values()]
    strongest = min(effects, key=lambda control: math.inf if (e := effects[control][0]) is None else e)
    if "does not hold" in verdicts:
        return strongest, "does not hold"
    return strongest, "holds" if set(verdicts) == {"holds"} else "undecided"


# ------------------------------------------------------------------------------- both formats of single facts


def compares_facts(part: str, row: Row) -> bool:
    """Whether a claim compares the single facts of this row of a part of the mechanism."""
    if row["part"] != HELD_OUT:
        return False
    if part == "gradients":
        return row["group"] in ("all", "shared", *RANDOM)
    if part == "minimal_graft":
        return row["order"] in ("base", "contribution", "tuned")
    if part == "representations":
        return row["place"] == "answer" and row["layer"] > 0
    return part == "signature" and row["format"] == "stored" and row["group"] in ASKED


def _gradient_consistency(found: Mapping[str, Sequence[Row]]) -> list[Row]:
    tables = [_tables(found.get(name, ()), "gradients", group="all") for name in (MIXED, STAGED)]
    if not all(tables):
        return []
    trained = [
        row["excess"] for name in (MIXED, STAGED) for row in found[name]
        if row["part"] == "qa_id" and row["group"] == "all"
    ]  # fmt: skip
    also = f"; trained facts {_models(trained[0], trained[1])}" if len(trained) == 2 else ""
    return [_compared(GRADIENTS, tables[0], tables[1], also=also)]


def _state_consistency(found: Mapping[str, Sequence[Row]]) -> list[Row]:
    tables = [_tables(found.get(name, ()), "representations") for name in (MIXED, STAGED)]
    return [_compared(STATES, tables[0], tables[1])] if all(tables) else []


def _input_signature(found: Mapping[str, Sequence[Row]]) -> list[Row]:
    shares: list[list[Values]] = []
    for name in (MIXED, STAGED):
        groups = [_tables(found.get(name, ()), "signature", group=group) for group in ASKED]
        if not all(groups):
            return []
        (subject,), (relation,) = groups
        shares.append([{fact: value + relation[fact] for fact, value in subject.items() if fact in relation}])
    return [_compared(INPUTS, shares[0], shares[1])]


def _while_training(what: Comparison, followed: Mapping[str, Any]) -> list[Row]:
    """A claim on each fact's mean over the share of training that checkpoints of both models span."""
    models = [_checkpoints((followed.get(name) or {}).get("rows") or (), what.measure) for name in (MIXED, STAGED)]
    if not all(models):
        return []
    start, stop = max(min(at) for at in models), min(max(at) for at in models)
    if start > stop:  # no share of training at which both were looked at
        return []
    mixed, staged = (_over_training(at, start, stop) for at in models)
    span = f"from {100 * start:.0f} % to {100 * stop:.0f} % of training"
    also = f"; {span}, {len(models[0])} and {len(models[1])} checkpoints"
    return [_compared(what, [mixed], [staged], when="training", also=also)]


def _checkpoints(rows: Sequence[Row], measure: str) -> dict[float, Values]:
    """The values of single facts at each checkpoint between the base and the end, by the share of training."""
    end = rows[-1]["update"] if rows else 0
    return {
        row["update"] / end: _values(row["by_person"][measure]) for row in rows
        if 0 < row["update"] < end and measure in row.get("by_person", ())
    }  # fmt: skip


def _over_training(at: Mapping[float, Values], start: float, stop: float) -> Values:
    """Each fact's mean from one share of training to another, of those facts that every checkpoint defines."""
    first, *others = at.values()
    facts = [fact for fact in first if all(fact in values for values in others)]
    return {fact: mean_between([*at], [values[fact] for values in at.values()], start, stop) for fact in facts}


def _in_shared_set(found: Sequence[Row], when: str) -> list[Row]:
    """Consistency of gradients inside the shared set of one time, beyond random sets."""
    inside, *controls = (_tables(found, "gradients", group=group, when=when) for group in ("shared", *RANDOM))
    if not inside or not all(controls):
        return []
    effects: dict[str, Effect] = {}
    levels: list[str] = []
    facts: set[tuple[str, int]] = set()
    for control, draws in zip(RANDOM, controls):
        common = [fact for fact in inside[0] if all(fact in draw for draw in draws)]
        random = [float(np.mean([draw[fact] for draw in draws])) for fact in common]
        effects[control] = _over_people([inside[0][fact] for fact in common], random, common)
        levels.append(f"{control} {_number(_mean(random))}")
        facts |= set(common)
    strongest, verdict = _against_controls(effects)
    effect, low, high = effects[strongest]
    note = f"inside {_number(_mean([inside[0][fact] for fact in inside[0] if fact in facts]))}, {', '.join(levels)}"
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
            "test": "Mix-tuned, held-out facts at the end of training: the cosine beyond another fact of the relation "
            "inside the shared set of the fraction nearest 5 %, minus its mean over random sets of the same size, and "
            "minus that over random sets of the same size in each tensor: 95 % bootstrap interval over subjects above "
            "0 for both",
            "note": f"against the stronger control, {strongest}; {note}{_counted(facts)}",
        }
    ]


def _tables(rows: Sequence[Row], part: str, **wanted: Any) -> list[Values]:
    """The single facts' values of the rows that a claim compares, those that are defined; layers in their order."""
    chosen = [
        row for row in rows
        if "by_person" in row and compares_facts(part, row) and all(row.get(k) == v for k, v in wanted.items())
    ]  # fmt: skip
    return [_values(row["by_person"]) for row in chosen]


def _values(by_person: Mapping[str, Sequence[float | None]]) -> Values:
    """The values that are defined."""
    return {
        (person, number): value
        for person, values in by_person.items()
        for number, value in enumerate(values)
        if value is not None
    }


def _compared(
    what: Comparison, mixed: Sequence[Values], staged: Sequence[Values], *, when: str = "final", also: str = ""
) -> Row:
    """A claim on the same facts in both models; of several tables (layers) the mean over those that define a fact."""
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    seen: set[tuple[str, int]] = set()
    for one, two in zip(mixed, staged):
        seen |= one.keys() | two.keys()
        for fact, value in one.items():
            if fact in two:
                found.setdefault(fact, []).append((value, two[fact]))
    a, b = ([float(np.mean([pair[i] for pair in pairs])) for pairs in found.values()] for i in (0, 1))
    effect, low, high = _over_people(a, b, list(found))
    percent = what.unit == "percentage points"
    amounts = _points(effect, low, high) if percent else {"effect": effect, "low": low, "high": high, "unit": what.unit}
    alone = len(seen) - len(found)
    left_out = f"; {alone} more defined in one model only" if alone else ""
    levels = _models(_mean(a), _mean(b), percent)
    return {
        "claim": what.claim,
        "text": what.says(when),
        "when": when,
        "verdict": _verdict(low, high),
        **amounts,
        "test": what.test(when),
        "note": f"{levels}{_counted(found)}{left_out}{also}",
    }


def _over_people(a: Sequence[float], b: Sequence[float], facts: Sequence[tuple[str, int]]) -> Effect:
    """Mean a − b of paired facts, and its interval over people if there are enough of them."""
    people = [person for person, _ in facts]
    if not people:
        return None, None, None
    effect, low, high = cluster_bootstrap(a, b, people, seed=BOOTSTRAP_SEED)
    return (effect, low, high) if len(set(people)) >= FEWEST else (effect, None, None)


def _counted(facts: Collection[tuple[str, int]]) -> str:
    people = len({person for person, _ in facts})
    few = f", too few for an interval (at least {FEWEST})" if people < FEWEST else ""
    return f"; {len(facts)} facts of {people} subjects{few}"


def _models(mixed: float | None, staged: float | None, percent: bool = False) -> str:
    told = [_number(value, ".1%" if percent else "+.3f").replace("%", " %") for value in (mixed, staged)]
    return f"Mix-tuned {told[0]}, Stage-tuned {told[1]}"


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _differences(rows: Sequence[Row], results: Mapping[str, Any]) -> list[Row]:
    """Why the trace's time matters, for each claim whose verdicts differ between the two times."""
    found = []
    for claim in dict.fromkeys(row["claim"] for row in rows):
        by_text: dict[str, dict[str, Row]] = {}
        for row in rows:
            if row["claim"] == claim:
                by_text.setdefault(row["text"], {})[row["when"]] = row
        differing = [
            text for text, at in by_text.items()
            if {"online", "final"} <= set(at) and at["online"]["verdict"] != at["final"]["verdict"]
        ]  # fmt: skip
        if differing:
            found += [{"claim": claim, "about": text, "text": _why(results)} for text in differing[:1]]
    return found


def _why(results: Mapping[str, Any]) -> str:
    """The explanation, with the numbers of this run."""
    losses = {
        name: {part: -results["recall"][name][part]["logprob"] for part in ("bio", "qa_id")}
        for name in (MIXED, STAGED) if name in results["recall"]
    }  # fmt: skip
    told = "; ".join(
        f"{name.replace('_', '-')}: {fit['bio']:.2f} nats an object in biographies and {fit['qa_id']:.2f} an answer"
        for name, fit in losses.items()
    )
    return (
        "The online trace adds up what pushed the parameters while they learned; the trace at the final checkpoint "
        "shows only what would push them now, which depends on how well each task is still fitted (negative "
        f"log-probability after training: {told}). What a fitted task still pushes is small, what a forgotten one "
        "pushes is large, so the two times need not rank the same parameters."
    )


def _pair(table: Mapping[str, Any], **wanted: Any) -> tuple[Row, Row] | None:
    found = []
    for name in (MIXED, STAGED):
        match = [row for row in table.get(name, ()) if all(row[key] == value for key, value in wanted.items())]
        if not match:
            return None
        found.append(match[0])
    return found[0], found[1]


def _difference(a: Row, b: Row, name: str) -> Effect:
    """a − b of two independent jackknife estimates, Welch's interval."""
    if any(row[key] is None for row in (a, b) for key in (name, "low", "high")):
        return None, None, None
    freedoms = [row["parts"] - 1 for row in (a, b)]
    errors = [
        (row["high"] - row["low"]) / 2 / float(student.ppf(0.975, freedom)) for row, freedom in zip((a, b), freedoms)
    ]
    effect, variance = a[name] - b[name], errors[0] ** 2 + errors[1] ** 2
    if variance == 0:
        return effect, effect, effect
    freedom = variance**2 / sum(error**4 / own for error, own in zip(errors, freedoms))
    half = float(student.ppf(0.975, freedom)) * math.sqrt(variance)
    return effect, effect - half, effect + half


def _apart(a: Row, b: Row, name: str) -> Effect:
    """a − b of two independent estimates whose 95 % intervals are known: their half-widths add up in quadrature."""
    if any(row[key] is None for row in (a, b) for key in (name, f"{name}_low", f"{name}_high")):
        return None, None, None
    effect = a[name] - b[name]
    half = math.hypot(*((row[f"{name}_high"] - row[f"{name}_low"]) / 2 for row in (a, b)))
    return effect, effect - half, effect + half


def _verdict(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return "undecided"
    return "holds" if low > 0 else "does not hold" if high < 0 else "undecided"


def _points(effect: float | None, low: float | None, high: float | None) -> Row:
    named = {"effect": effect, "low": low, "high": high}
    return {k: None if v is None else 100 * v for k, v in named.items()} | {"unit": "percentage points"}


def _answers(bits: str) -> np.ndarray:
    return np.array([bit == "1" for bit in bits], dtype=float)


def _mean_answers(row: Row) -> np.ndarray:
    return np.mean([_answers(bits) for bits in row["answers"]["qa_ood"]], axis=0)


def _number(value: float | None, form: str = "+.3f") -> str:
    return "undefined" if value is None else format(value, form)
