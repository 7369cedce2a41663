"""Verdicts on hand-made numbers: every claim holds, does not hold, and stays undecided."""

from __future__ import annotations

from typing import Any

import pytest
from scipy.stats import t as student
from scipy.stats import ttest_ind_from_stats

from crosstrace.claims import judge

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
    return judge(results, evals, dict.fromkeys(names, found), [FRACTION])


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


def test_a_run_without_both_strategies_is_judged_on_what_it_has():
    rows, _ = _case(names=("mixed",))
    assert [row["claim"] for row in rows] == ["ablation", "grafting", "ablation", "grafting"]
    assert _case(names=("bio_only",)) == ([], [])
