"""Verdicts on hand-made numbers: every claim holds, does not hold, and stays undecided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from sample_results import filled
from scipy.stats import t as student
from scipy.stats import ttest_ind_from_stats

from crosstrace.analyses.claims.case import Case
from crosstrace.analyses.claims.judge import judge

PEOPLE = [f"B{n // 4}" for n in range(160)]  # 40 people, four questions each
PARTS = 4
FRACTION = 0.05


def _bits(right: int) -> str:
    """160 answers, `right` of them right, spread over the people."""
    return "".join("1" if (n * 77) % 160 < right else "0" for n in range(160))


def _row(value: float | None, error: float, name: str, **more) -> dict[str, Any]:
    """An estimate with its jackknife interval over PARTS parts."""
    if value is None:
        return {name: None, "low": None, "high": None, "parts": PARTS} | more
    half = float(student.ppf(0.975, PARTS - 1)) * error
    return {name: value, "low": value - half, "high": value + half, "parts": PARTS} | more


def _case(
    recall=(150, 10), overlap=((0.6, 0.02), (0.4, 0.01)), excess=((0.3, 0.02), (0.1, 0.01)),
    ablate=(20, 100, 90), graft=(90, 10, 20), names=("mixed", "two_stage"), final: dict | None = None,
) -> tuple[list[dict], list[dict]]:  # fmt: skip
    """Judge a run with these numbers: right answers of 160, overlaps and excess Gini with their standard errors, right
    answers with the shared set and two controls ablated or grafted. `final` replaces some at the final checkpoint."""
    online = {"overlap": overlap, "excess": excess, "ablate": ablate, "graft": graft}
    results: dict[str, Any] = {
        "training": dict.fromkeys(names),
        "run": {"trace": {"parts": PARTS}},
        "shared": {name: [] for name in names},
        "centralization": {name: [] for name in names},
        "recall": {name: {"bio": {"logprob": -0.5}, "qa_id": {"logprob": -0.25}} for name in names},
    }
    found: dict[str, Any] = {"ablate": [], "graft": [], "people": {"qa_ood": PEOPLE}}
    for when, numbers in (("online", online), ("final", online | (final or {}))):
        for name, (value, error), (gini, spread) in zip(names, numbers["overlap"], numbers["excess"]):
            place = {"when": when, "fraction": FRACTION}
            shared = {"reduction": "example", "chance": FRACTION}
            # another reduction and another fraction, which no claim is about
            results["shared"][name] += [
                _row(0.0, 1e-9, "overlap", **place, **shared | {"reduction": "step"}),
                _row(0.0, 1e-9, "overlap", **place | {"fraction": 0.5}, **shared),
                _row(value, error, "overlap", **place, **shared),
            ]
            for unit in ("query_head", "neuron", "module"):
                results["centralization"][name].append(_row(gini, spread, "excess_gini", **place, unit=unit))
        for kind in ("ablate", "graft"):
            for label, right in zip(("shared", "random", "bio_only"), numbers[kind]):
                answers = [_bits(right)] if label != "random" else [_bits(right - 1), _bits(right + 1)]
                row = {"when": when, "set": label, "answers": {"qa_ood": answers}}
                found[kind] += [row | {"fraction": 0.01}, row | {"fraction": FRACTION}]
    evals = {
        name: {"answers": {"qa_ood": _bits(right)}, "people": {"qa_ood": PEOPLE}} for name, right in zip(names, recall)
    }
    return judge(Case(filled(results), evals, dict.fromkeys(names, found), [FRACTION]))


def _verdicts(claim: str, **case) -> list[str]:
    rows = [row for row in _case(**case)[0] if row["claim"] == claim]
    for row in rows:
        assert row["text"] and row["test"] and row["note"] and row["unit"]
    return [row["verdict"] for row in rows]


def test_every_claim_is_judged_at_both_times():
    rows, differences = _case()
    assert [(row["claim"], row["when"]) for row in rows] == [
        ("recall", "training"),
        ("more_shared", "online"), ("more_central", "online"), ("more_central", "online"),
        ("more_shared", "final"), ("more_central", "final"), ("more_central", "final"),
        ("ablation", "online"), ("grafting", "online"), ("ablation", "final"), ("grafting", "final"),
    ]  # fmt: skip
    assert {row["verdict"] for row in rows} == {"holds"}
    assert differences == []


@pytest.mark.parametrize(
    "right, verdict",
    [
        ((150, 10), "holds"),
        ((10, 150), "does not hold"),
        ((150, 100), "does not hold"),  # better, but two-stage recalls as well
        ((60, 10), "does not hold"),  # better, but mixed does not recall
        ((81, 79), "undecided"),
        ((80, 80), "undecided"),
    ],
)
def test_recall(right: tuple[int, int], verdict: str):
    assert _verdicts("recall", recall=right) == [verdict]


def test_the_effect_on_recall_is_the_difference_in_points():
    row = _case(recall=(150, 10))[0][0]
    assert row["effect"] == pytest.approx(100 * 140 / 160) and row["unit"] == "percentage points"
    assert 0 < row["low"] < row["effect"] < row["high"] <= 100
    assert "Mix-tuned 93.8 %, Stage-tuned 6.2 % of 160 questions" in row["note"]


@pytest.mark.parametrize("name, claim, count", [("overlap", "more_shared", 2), ("excess", "more_central", 4)])
@pytest.mark.parametrize(
    "values, verdict",
    [
        (((0.6, 0.02), (0.4, 0.01)), "holds"),
        (((0.4, 0.02), (0.6, 0.01)), "does not hold"),
        (((0.41, 0.02), (0.4, 0.01)), "undecided"),
        (((0.4, 0.0), (0.4, 0.0)), "undecided"),
        (((0.6, 0.0), (0.4, 0.0)), "holds"),
        (((None, 0.0), (0.4, 0.01)), "undecided"),
    ],
)
def test_differences_of_jackknife_estimates(name: str, claim: str, count: int, values: tuple, verdict: str):
    assert _verdicts(claim, **{name: values}) == [verdict] * count


def test_welch_by_hand_and_by_scipy():
    (row,) = [r for r in _case()[0] if r["claim"] == "more_shared" and r["when"] == "online"]
    # errors 0.02 and 0.01: variance 0.0005, freedom 0.0005² / ((0.0004² + 0.0001²)/3) = 75/17
    half = float(student.ppf(0.975, 75 / 17)) * 0.0005**0.5
    assert [row[k] for k in ("effect", "low", "high")] == pytest.approx([20, 20 - 100 * half, 20 + 100 * half])
    test = ttest_ind_from_stats(0.6, 0.02 * PARTS**0.5, PARTS, 0.4, 0.01 * PARTS**0.5, PARTS, equal_var=False)
    assert test.statistic == pytest.approx(0.2 / 0.0005**0.5)
    # the interval just touches 0 where scipy's Welch test just reaches 5 %
    touching = student.ppf(0.975, 75 / 17) * 0.0005**0.5
    test = ttest_ind_from_stats(touching, 0.02 * 2, PARTS, 0.0, 0.01 * 2, PARTS, equal_var=False)
    assert test.pvalue == pytest.approx(0.05)


@pytest.mark.parametrize("kind, claim", [("ablate", "ablation"), ("graft", "grafting")])
@pytest.mark.parametrize(
    "gains, verdict",
    [
        ((70, 60), "holds"),
        ((70, 1), "undecided"),  # one control is as good
        ((70, -60), "does not hold"),  # one control is better
        ((-70, -60), "does not hold"),
        ((1, -1), "undecided"),
    ],
)
def test_interventions_must_beat_every_control(kind: str, claim: str, gains: tuple[int, int], verdict: str):
    sign = 1 if kind == "ablate" else -1  # ablation is to leave fewer right answers than the control's
    right = (80, *(80 + sign * gain for gain in gains))
    assert _verdicts(claim, **{kind: right}) == [verdict] * 2


def test_the_effect_of_an_intervention_is_against_the_strongest_control():
    rows = _case(ablate=(20, 100, 90), graft=(90, 10, 20))[0]
    for claim in ("ablation", "grafting"):
        row = next(row for row in rows if row["claim"] == claim)
        assert row["effect"] == pytest.approx(100 * 70 / 160)
        assert "strongest control, bio_only; all: random +50.0, bio_only +43.8" in row["note"] or claim == "grafting"
        assert row["low"] < row["effect"] < row["high"]


def test_one_sentence_where_the_two_times_differ():
    rows, differences = _case(final={"overlap": ((0.3, 0.01), (0.4, 0.01)), "ablate": (80, 81, 82)})
    assert [row["verdict"] for row in rows if row["claim"] == "more_shared"] == ["holds", "does not hold"]
    assert [found["claim"] for found in differences] == ["more_shared", "ablation"]
    for found in differences:
        assert "mixed: 0.50 nats an object in biographies and 0.25 an answer" in found["text"]
    assert len({found["text"] for found in differences}) == 1, "the report says it once"


def test_a_run_without_both_strategies_is_judged_on_what_it_has():
    rows, _ = _case(names=("mixed",))
    assert [row["claim"] for row in rows] == ["ablation", "grafting", "ablation", "grafting"]
    assert _case(names=("bio_only",)) == ([], [])


# ---- both formats of single facts

Facts = Mapping[str, Sequence[float | None]]  # person -> a value for each fact
SETS = ("shared", "random", "random", "random_per_tensor")


def _facts(*levels: float | None, people: int = 8) -> dict[str, list[float | None]]:
    """People with one fact for each level; half of them 0.01 above it, and half below."""
    spread = [0.01 if n % 2 else -0.01 for n in range(people)]
    return {f"B{n}": [None if x is None else x + spread[n] for x in levels] for n in range(people)}


def _steady(level: float, people: int = 8) -> dict[str, list[float | None]]:
    return {f"B{n}": [level] for n in range(people)}


def _compared(
    part: str, tables: Mapping[str, Sequence[Facts | None]], given: Sequence[str] = (), dynamics: dict | None = None
) -> list[dict]:
    """Judge one part of the mechanism; of each model the facts of each row that a claim compares, None if the row is
    of an older version, which had no single facts."""
    found: dict[str, list[dict[str, Any]]] = {}
    for model, facts in tables.items():
        places: list[dict[str, Any]]
        if part == "gradients":
            whens = [{"group": group, "when": when} for when in ("online", "final") for group in SETS]
            places = [{"group": "all"}, *whens][: len(facts)]
        elif part == "representations":
            places = [{"place": "answer", "layer": 1 + number} for number in range(len(facts))]
        else:
            places = [{"format": "stored", "group": group} for group in ("subject", "relation")]
        excess = {"excess": 0.5} if part == "gradients" else {}
        rows = [
            {"part": "qa_ood"} | excess | place | ({} if own is None else {"by_person": own})
            for place, own in zip(places, facts)
        ]
        # what no claim is about
        trained = [row | {"part": "qa_id", "by_person": _steady(-9.0)} for row in rows]
        elsewhere = {"group": "rest", "place": "subject", "layer": 0, "format": "recalled"}
        apart = {name: elsewhere[name] for name in elsewhere if rows and name in rows[0]} | {"by_person": _steady(-9.0)}
        found[model] = [rows[0] | apart, *trained, *rows] if rows else []
    recalled = {name: {"bio": {"logprob": -0.5}, "qa_id": {"logprob": -0.25}} for name in ("mixed", "two_stage")}
    results = {"mechanism": {part: found, "dynamics": dynamics or {}}, "recall": recalled}
    return judge(Case(filled(results), {}, {}, [FRACTION], given=given))[0]


def _one(part: str, mixed: Sequence[Facts | None], staged: Sequence[Facts | None]) -> dict:
    (row,) = _compared(part, {"mixed": mixed, "two_stage": staged, "base": staged})
    assert row["when"] == "final" and "at the end of training" in row["test"] and row["text"] and row["unit"]
    return row


@pytest.mark.parametrize(
    "part, claim, unit, scale",
    [
        ("gradients", "gradient_consistency", "cosine", 1),
        ("representations", "state_consistency", "percentage points", 100),
        ("signature", "input_signature", "percentage points", 100),
    ],
)
class TestTwoModelsOnTheSameFacts:
    @pytest.mark.parametrize(
        "mixed, staged, verdict",
        [(0.6, 0.2, "holds"), (0.2, 0.6, "does not hold"), (0.4, 0.4, "undecided")],
    )
    def test_verdicts(self, part, claim, unit, scale, mixed, staged, verdict):
        rows = 2 if part == "signature" else 1
        found = _one(part, [_facts(mixed / rows)] * rows, [_steady(staged / rows)] * rows)
        assert (found["claim"], found["unit"], found["verdict"]) == (claim, unit, verdict)
        # half of the people are 0.01 above the level and half below, in each row that is added up
        spread = 0.01 * rows
        assert found["effect"] == pytest.approx(scale * (mixed - staged))
        assert scale * (mixed - staged - spread) <= found["low"] < found["high"] <= scale * (mixed - staged + spread)
        assert "8 facts of 8 subjects" in found["note"]

    def test_a_few_people_against_the_others_leave_it_open(self, part, claim, unit, scale):
        facts = {f"B{n}": [0.5 if n < 5 else -0.4] for n in range(8)}
        found = _one(part, [facts] * 2, [_steady(0.0)] * 2)
        assert found["effect"] == pytest.approx(scale * (5 * 0.5 - 3 * 0.4) / 8 * (2 if part == "signature" else 1))
        assert found["low"] < 0 < found["high"] and found["verdict"] == "undecided"

    @pytest.mark.parametrize("people, verdict", [(1, "undecided"), (5, "undecided"), (6, "holds")])
    def test_too_few_people_give_no_interval(self, part, claim, unit, scale, people, verdict):
        found = _one(part, [_facts(0.6, people=people)] * 2, [_steady(0.2, people=people)] * 2)
        assert found["verdict"] == verdict and (found["low"] is None) == (verdict == "undecided")
        assert found["effect"] is not None and ("too few for an interval" in found["note"]) == (people < 6)
        told = filled({"claims": [found]}).claim_rows()[1][-1]
        assert told.endswith(f"] {unit}") and ("[–, –]" in told) == (people < 6)

    def test_facts_of_one_model_only_are_left_out_and_counted(self, part, claim, unit, scale):
        mixed = {f"B{n}": [0.6, 5.0] for n in range(8)}
        staged = {f"B{n}": [0.2, None] for n in range(8)} | {"B7": [None, None]}
        found = _one(part, [mixed] * 2, [staged] * 2)
        assert found["effect"] == pytest.approx(scale * 0.4 * (2 if part == "signature" else 1))
        assert "7 facts of 7 subjects; 9 more defined in one model only" in found["note"]

    def test_nothing_defined_is_undecided(self, part, claim, unit, scale):
        found = _one(part, [_facts(None)] * 2, [_facts(0.2)] * 2)
        assert [found[k] for k in ("effect", "low", "high")] == [None] * 3 and found["verdict"] == "undecided"
        assert "Mix-tuned undefined" in found["note"] and "0 facts of 0 subjects" in found["note"]

    def test_missing_rows_are_no_claim(self, part, claim, unit, scale):
        own = [_facts(0.5)] * 2
        others = ({"mixed": own}, {"two_stage": own}, {"mixed": own, "two_stage": []}, {})
        for tables in (*others, {"mixed": own, "two_stage": [None, None]}):
            assert [row for row in _compared(part, tables) if row["claim"] == claim] == []


def test_states_are_compared_over_all_layers_that_define_a_fact():
    low, high = {f"B{n}": [0.0, None] for n in range(6)}, {f"B{n}": [1.0, 1.0] for n in range(6)}
    found = _one("representations", [low, high, high], [low, low, low])
    # the first fact: (0 + 1 + 1)/3 - 0; the second one is defined in one model only, at every layer
    assert found["effect"] == pytest.approx(100 * 2 / 3)
    assert "6 facts of 6 subjects; 6 more defined in one model only" in found["note"]
    # the second fact counts by the layer at which both define it
    found = _one("representations", [low, high], [low, {f"B{n}": [1.0, 0.0] for n in range(6)}])
    assert found["effect"] == pytest.approx(100 * (0 + 1) / 2) and "defined in one" not in found["note"]


def test_the_note_on_gradients_tells_the_trained_facts():
    found = _one("gradients", [_steady(0.6)], [_steady(0.2)])
    assert found["note"].startswith("Mix-tuned +0.600, Stage-tuned +0.200; 8 facts of 8 subjects; trained facts Mix-")
    assert found["note"].endswith("trained facts Mix-tuned +0.500, Stage-tuned +0.500")


def _inside(shared: Facts, *controls: Facts, model: str = "mixed", given: Sequence[str] = ()) -> list[dict]:
    """Judge one model's gradients inside its shared set, two random sets and one with the counts of each tensor."""
    absent = [None] * (len(SETS) - 1 - len(controls))
    tables = {model: [_steady(0.0), *[shared, *controls, *absent] * 2]}
    return [row for row in _compared("gradients", tables, given) if row["claim"] == "consistency_in_shared_set"]


@pytest.mark.parametrize(
    "level, controls, verdict",
    [
        (0.6, (0.1, 0.3, 0.4), "holds"),
        (0.6, (0.1, 0.3, 0.6), "undecided"),  # a random set of the same counts in each tensor is as good
        (0.6, (0.9, 0.9, 0.4), "does not hold"),  # random sets are better
        (0.6, (0.1, 0.3, 0.8), "does not hold"),
        (0.6, (0.5, 0.7, 0.4), "undecided"),  # the mean of the two draws is as good
    ],
)
def test_consistency_inside_the_shared_set_must_beat_both_controls(level: float, controls: tuple, verdict: str):
    rows = _inside(_facts(level, level), *({f"B{n}": [c, c] for n in range(8)} for c in controls))
    assert [(row["when"], row["verdict"]) for row in rows] == [("online", verdict), ("final", verdict)]
    strongest = max((controls[0] + controls[1]) / 2, controls[2])
    for row in rows:
        assert row["effect"] == pytest.approx(level - strongest) and row["unit"] == "cosine"
        assert f"random_per_tensor {controls[2]:+.3f}" in row["note"] and "inside +0.600" in row["note"]
        assert "16 facts of 8 subjects" in row["note"]


def test_consistency_inside_the_shared_set_that_cannot_be_told():
    few = _inside(_steady(0.6, 5), *[_steady(0.1, 5)] * 3)
    assert [row["verdict"] for row in few] == ["undecided"] * 2 and few[0]["effect"] == pytest.approx(0.5)
    assert few[0]["low"] is None and "too few for an interval" in few[0]["note"]
    nothing = _inside(_facts(None), *[_facts(0.1)] * 3)
    assert [row["verdict"] for row in nothing] == ["undecided"] * 2 and nothing[0]["effect"] is None
    # a fact counts where every draw defines it
    (row, _) = _inside(_facts(0.6, 0.6), _facts(0.1, 0.1), _facts(0.1, None), _facts(0.1, None))
    assert row["effect"] == pytest.approx(0.5) and "8 facts of 8 subjects" in row["note"]
    assert _inside(_facts(0.6), _facts(0.1)) == []  # no control with the counts of each tensor


def test_consistency_inside_the_set_of_a_model_that_was_taught_elsewhere():
    others = [_steady(0.1)] * 3
    rows = _inside(_steady(0.6), *others, model="theirs", given=["theirs"])
    assert [row["text"].startswith("theirs: ") for row in rows] == [True, True]
    assert "Mix-tuned" not in rows[0]["test"] and "theirs" in rows[0]["test"]
    assert _inside(_steady(0.6), *others, model="two_stage") == []


def _grafted(restored: Facts, base: Facts, tuned: Facts, excess: tuple = (0.1, 0.05, 0.15), given=(), model="mixed"):
    """Judge the smallest grafts of one model: a graft of 5 % beside others, base and tuned model."""

    def row(order: str, fraction: float, facts: Facts) -> dict:
        place = {"part": "qa_ood", "order": order, "fraction": fraction}
        return place | {"size": 100, "exact_match": 0.5, "by_person": facts}

    wrong = {person: [-9.0 for _ in values] for person, values in base.items()}
    grafts = [row("base", 0.0, base), row("tuned", 1.0, tuned), row("contribution", 0.05, restored)]
    grafts += [row("contribution", 0.01, wrong), row("contribution", 1.0, wrong), row("movement", 0.05, wrong)]
    grafts += [other | {"part": "qa_id", "by_person": wrong} for other in grafts]
    shares = {"overlap": 0.4, "expected": 0.3, "size": 100, "fraction": 0.05, "parts": 4}
    shares["graft"] = None if excess[0] is None else 4000
    shares |= dict(zip(("excess", "excess_low", "excess_high"), excess))
    found = {
        "grafts": grafts,
        "fewest": [{"part": "qa_ood", "order": "contribution", "size": 200, "fraction": 0.1}],
        "overlap": [{"when": when, **shares} for when in ("online", "final", "checkpoints")],
    }
    recalled = {name: {"bio": {"logprob": -0.5}, "qa_id": {"logprob": -0.25}} for name in ("mixed", "two_stage")}
    results = {"mechanism": {"minimal_graft": {model: found, "two_stage": found}}, "recall": recalled}
    return judge(Case(filled(results), {}, {}, [FRACTION], given=given))[0]


def _right(*people: int, n: int = 8) -> dict[str, list[float | None]]:
    """Two facts a person, of which so many are right: of the first, the second, … person."""
    counts = [people[i % len(people)] for i in range(n)]
    return {f"B{i}": [float(k < count) for k in range(2)] for i, count in enumerate(counts)}


@pytest.mark.parametrize(
    "restored, tuned, verdict",
    [
        (_right(2, 2, 1), _right(2), "holds"),
        (_right(0, 0, 1), _right(2), "does not hold"),
        (_right(1, 2, 0, 1), _right(2), "undecided"),  # exactly half
        (_right(0), _right(0), "undecided"),  # nothing was learned
    ],
)
def test_a_small_graft_must_restore_half_of_recall(restored: Facts, tuned: Facts, verdict: str):
    row, *shared = _grafted(restored, _right(0), tuned)
    assert (row["claim"], row["when"], row["verdict"]) == ("minimal_graft", "final", verdict)
    assert row["text"] == "Grafting 5 % of the parameters restores half of held-out recall"
    right, all_right = (sum(sum(values) for values in facts.values()) for facts in (restored, tuned))  # type: ignore[arg-type]
    assert row["effect"] == pytest.approx(100 * (right - all_right / 2) / 16) and row["unit"] == "percentage points"
    assert row["note"].endswith("16 facts of 8 subjects; 10 % restore nine tenths")
    assert [(r["claim"], r["when"]) for r in shared] == [("graft_is_shared", "online"), ("graft_is_shared", "final")]


def test_a_small_graft_of_few_people_has_no_interval():
    few = _grafted(_right(2, n=5), _right(0, n=5), _right(2, n=5))[0]
    assert few["verdict"] == "undecided" and few["effect"] == 50 and few["low"] is None


@pytest.mark.parametrize(
    "excess, verdict",
    [((0.1, 0.05, 0.15), "holds"), ((-0.1, -0.15, -0.05), "does not hold"), ((0.1, -0.1, 0.3), "undecided"),
     ((0.1, None, None), "undecided"), ((None, None, None), "undecided")],
)  # fmt: skip
def test_what_restores_recall_is_shared_beyond_chance(excess: tuple, verdict: str):
    _, *rows = _grafted(_right(2), _right(0), _right(2), excess)
    assert [(row["claim"], row["verdict"]) for row in rows] == [("graft_is_shared", verdict)] * 2
    assert rows[0]["effect"] == (None if excess[0] is None else pytest.approx(100 * excess[0]))
    told = "the graft has 4,000 parameters and holds 0.400 of the 100 shared ones, expected 0.300"
    assert rows[0]["note"] == (
        told
        if excess[0] is not None
        else "no graft of less than all parameters restores nine tenths of the trained answers"
    )


def test_grafts_of_models_that_were_taught_elsewhere():
    rows = _grafted(_right(2), _right(0), _right(2), given=["theirs"], model="theirs")
    judged = [row for row in rows if row["verdict"] != "not tested"]
    assert [row["text"].startswith("theirs: ") for row in judged] == [True] * 3
    assert all("Mix-tuned" not in row["test"] for row in judged)
    assert _grafted(_right(2), _right(0), _right(2), model="another") == []


@pytest.mark.parametrize(
    "mixed, staged, verdict",
    [
        ((0.3, 0.25, 0.35), (0.1, 0.05, 0.15), "holds"),
        ((0.1, 0.05, 0.15), (0.3, 0.25, 0.35), "does not hold"),
        ((0.15, 0.1, 0.2), (0.1, 0.05, 0.15), "undecided"),
        ((None, None, None), (0.1, 0.05, 0.15), "undecided"),
    ],
)
def test_sharing_in_the_circuit(mixed: tuple, staged: tuple, verdict: str):
    names = ("concentration", "concentration_low", "concentration_high")

    def row(values: tuple, **place: str) -> dict:
        return {"unit": "query_head", "when": "online", "part": "qa_id", **place} | dict(zip(names, values))

    others = [row((9.0, 8.0, 10.0), part="qa_ood"), row((9.0, 8.0, 10.0), when="checkpoints")]
    circuits = {
        name: {"agreement": [*others, row(values), row(values, unit="neuron", when="final")]}
        for name, values in (("mixed", mixed), ("two_stage", staged))
    }
    recalled = {name: {"bio": {"logprob": -0.5}, "qa_id": {"logprob": -0.25}} for name in circuits}
    rows = judge(Case(filled({"mechanism": {"circuit": circuits}, "recall": recalled}), {}, {}, [FRACTION]))[0]
    assert [(r["claim"], r["when"], r["verdict"]) for r in rows] == [
        ("in_circuit", "online", verdict), ("in_circuit", "final", verdict)
    ]  # fmt: skip
    assert "attention heads" in rows[0]["text"] and "MLP neurons" in rows[1]["text"]
    if mixed[0] is not None:
        half = 100 * np.hypot(0.05, 0.05)
        assert rows[0]["high"] - rows[0]["effect"] == pytest.approx(half) == rows[0]["effect"] - rows[0]["low"]
        assert rows[0]["effect"] == pytest.approx(100 * (mixed[0] - staged[0]))
    older = {name: {"agreement": [{"unit": "query_head", "when": "online", "part": "qa_id"}]} for name in circuits}
    assert judge(Case(filled({"mechanism": {"circuit": older}, "recall": recalled}), {}, {}, [FRACTION]))[0] == []


def test_what_needs_no_trace_is_not_told_as_untested():
    tables = {name: [_steady(0.6), *[_steady(0.1)] * 4] for name in ("mixed", "two_stage")}
    rows = _compared("gradients", tables, given=["mixed", "two_stage"])
    assert [row["when"] for row in rows if row["claim"] == "gradient_consistency"] == ["final"]
    assert {row["verdict"] for row in rows} <= {"holds", "does not hold", "undecided"}


# ---- both formats of single facts while training

BOTH = ("mixed", "two_stage")
FAR = _steady(9.0)  # the base's and the end's values, which do not count


def _followed(measure: str, at: Mapping[int, Facts | None], end: int) -> dict[str, Any]:
    """What `dynamics` says of a model: update -> single facts, None as in a run of the time before there were any."""
    moments = {0: FAR, **at, end: FAR}
    rows = [
        {"update": update, measure: 0.5} | ({} if facts is None else {"by_person": {measure: facts}})
        for update, facts in moments.items()
    ]
    return {"rows": rows, "appearance": []}


def _training(measure: str, mixed: Facts | None, staged: Facts | None) -> dict:
    """Judge two models that were looked at halfway and later, one of them trained for twice as many updates."""
    found = _followed(measure, {10: mixed, 15: mixed}, 20), _followed(measure, {20: staged, 30: staged}, 40)
    (row,) = _of_dynamics(dict(zip(BOTH, found)))
    return row


def _of_dynamics(dynamics: Mapping[str, Any]) -> list[dict]:
    return _compared("gradients", {}, dynamics=dict(dynamics))


@pytest.mark.parametrize(
    "measure, claim, unit, scale",
    [
        ("gradient.qa_ood", "gradient_consistency", "cosine", 1),
        ("states.qa_ood", "state_consistency", "percentage points", 100),
        ("signature.qa_ood", "input_signature", "percentage points", 100),
    ],
)
class TestTwoModelsWhileTheyTrain:
    @pytest.mark.parametrize(
        "mixed, staged, verdict",
        [(0.6, 0.2, "holds"), (0.2, 0.6, "does not hold"), (0.4, 0.4, "undecided")],
    )
    def test_verdicts(self, measure, claim, unit, scale, mixed, staged, verdict):
        found = _training(measure, _facts(mixed), _steady(staged))
        assert [found[k] for k in ("claim", "when", "unit", "verdict")] == [claim, "training", unit, verdict]
        assert found["text"].endswith(" while it trains") and "held-out facts during training: " in found["test"]
        assert found["effect"] == pytest.approx(scale * (mixed - staged))
        assert scale * (mixed - staged - 0.01) <= found["low"] < found["high"] <= scale * (mixed - staged + 0.01)
        assert found["note"].endswith("; 8 facts of 8 subjects; from 50 % to 75 % of training, 2 and 2 checkpoints")
        (told,) = filled({"claims": [found]}).claim_rows()[1:]
        assert told[:3] == [found["text"], "training", verdict]

    def test_a_few_people_against_the_others_leave_it_open(self, measure, claim, unit, scale):
        found = _training(measure, {f"B{n}": [0.5 if n < 5 else -0.4] for n in range(8)}, _steady(0.0))
        assert found["effect"] == pytest.approx(scale * (5 * 0.5 - 3 * 0.4) / 8)
        assert found["low"] < 0 < found["high"] and found["verdict"] == "undecided"

    @pytest.mark.parametrize("people, verdict", [(5, "undecided"), (6, "holds")])
    def test_too_few_people_give_no_interval(self, measure, claim, unit, scale, people, verdict):
        found = _training(measure, _facts(0.6, people=people), _steady(0.2, people))
        assert found["verdict"] == verdict and (found["low"] is None) == (people < 6)
        assert found["effect"] is not None and ("too few for an interval" in found["note"]) == (people < 6)

    def test_a_fact_counts_where_every_checkpoint_of_both_models_defines_it(self, measure, claim, unit, scale):
        whole, partly = ({f"B{n}": [0.6, value] for n in range(8)} for value in (5.0, None))
        staged = _followed(measure, {20: whole, 25: partly, 30: whole}, 40)
        (found,) = _of_dynamics({"mixed": _followed(measure, {10: whole, 15: whole}, 20), "two_stage": staged})
        assert found["effect"] == pytest.approx(0) and "8 facts of 8 subjects; 8 more defined in one" in found["note"]
        nothing = _training(measure, _facts(None), _facts(0.2))
        assert [nothing[k] for k in ("effect", "low", "high")] == [None] * 3 and nothing["verdict"] == "undecided"

    def test_the_mean_is_over_the_share_of_training_that_both_were_looked_at(self, measure, claim, unit, scale):
        mixed = _followed(measure, {10: _steady(0.0), 20: _steady(0.4), 30: _steady(0.8)}, 40)
        staged = _followed(measure, {40: _steady(0.1), 50: _steady(0.3)}, 80)
        (found,) = _of_dynamics({"mixed": mixed, "two_stage": staged})
        # from 1/2 to 5/8 of training: mixed goes from 0.4 to 0.6, halfway to its 0.8 at 3/4, two-stage from 0.1 to 0.3
        assert found["effect"] == pytest.approx(scale * (0.5 - 0.2))
        assert found["note"].endswith("from 50 % to 62 % of training, 3 and 2 checkpoints")
        # checkpoints lie as closely as they may: what counts is for how long
        often = {update: _steady(0.4 if update < 41 else 0.0) for update in (20, 30, 32, 34, 36, 38, 40, 60)}
        steady = {20: _steady(0.1), 60: _steady(0.1)}
        (found,) = _of_dynamics({n: _followed(measure, at, 80) for n, at in zip(BOTH, (often, steady))})
        assert found["effect"] == pytest.approx(scale * ((0.4 * 20 + 0.2 * 20) / 40 - 0.1))

    def test_without_checkpoints_between_base_and_end_there_is_no_claim(self, measure, claim, unit, scale):
        own = _followed(measure, {10: _facts(0.5)}, 20)
        ends, older, nothing = (_followed(measure, at, 20) for at in ({}, {10: None}, {}))
        nothing["rows"] = []
        apart = _followed(measure, {8: _facts(0.5)}, 20)  # at another share of training
        for other in (ends, older, nothing, apart, {}):
            for dynamics in ({"mixed": own, "two_stage": other}, {"mixed": other, "two_stage": own}):
                assert _of_dynamics(dynamics) == []
        assert _of_dynamics({"mixed": own}) == []


def test_claims_while_training_come_after_those_at_the_end_and_change_nothing_in_them():
    tables = {"mixed": [_facts(0.6)], "two_stage": [_steady(0.2)]}
    dynamics = {name: _followed("gradient.qa_ood", {10: _facts(0.3)}, 20) for name in BOTH}
    rows = _compared("gradients", tables, dynamics=dynamics)
    assert [(row["when"], row["verdict"]) for row in rows] == [("final", "holds"), ("training", "undecided")]
    assert rows[:1] == _compared("gradients", tables) and [*rows[0]] == [*rows[1]]
    assert rows[1]["text"] == f"{rows[0]['text']} while it trains"
