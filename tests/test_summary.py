"""What a study says: intervals, paired differences and predictions on numbers worked by hand."""

from __future__ import annotations

import math

import pytest
from sample_results import filled, sample_results
from scipy.stats import t as student

from crosstrace.experiment import study_page, summary
from crosstrace.report import words as say
from crosstrace.report.blocks import Cell, Table
from crosstrace.results.results import Results
from crosstrace.results.study import StudyResults


def row(setting: str, seed: int, strategy: str, outcome: float | None, value: float | None) -> dict:
    return {
        "setting": setting, "seed": seed, "strategy": strategy, "recall.qa_ood": outcome,
        "gradient.qa_id.excess": value,
    }  # fmt: skip


def the(rows: list[dict], **wanted) -> dict:
    (found,) = [r for r in rows if all(r[key] == value for key, value in wanted.items())]
    return found


def test_levels_are_means_over_seeds_with_students_interval() -> None:
    rows = [row("a", seed, "mixed", value, None) for seed, value in enumerate([0.8, 0.9, 1.0])]
    found = the(summary.levels(rows), measure="recall.qa_ood")
    half = student.ppf(0.975, 2) * 0.1 / math.sqrt(3)
    assert found["mean"] == pytest.approx(0.9) and found["seeds"] == 3
    assert found["low"] == pytest.approx(0.9 - half) and found["high"] == 1.0, "0.9 + half would be more than all"
    (single,) = summary.levels(rows[:1])
    assert single["low"] is None and single["high"] is None, "one seed has no interval"
    assert not [r for r in summary.levels(rows) if r["measure"] != "recall.qa_ood"], "what is unknown is left out"


def rows_of(table: Table) -> list[tuple[Cell, Cell]]:
    """The rows of a table of two columns."""
    return [(a, b) for a, b in table.rows if isinstance(a, Cell) and isinstance(b, Cell)]


def test_a_study_of_three_tasks_says_which_two_share_most() -> None:
    tasks = {"bio": "store", "qa": "recall", "cloze": "recall"}
    about = {
        "name": "three", "runs": 3, "seeds": [1, 2, 3], "settings": {"default": {}}, "strategies": {"mixed": ""},
        "tasks": {"roles": tasks, "split": ["qa", "cloze"], "outcome": "qa_ood", "shared": [*tasks]},
        "compare": [], "hours": 0.0, "peak_gib": 0.0,
    }  # fmt: skip
    overlaps = {"bio+qa": (0.5, 0.1, 0.3), "bio+cloze": (0.4, 0.2, 0.1), "qa+cloze": (0.3, 0.6, None)}
    rows = [
        {"setting": "default", "seed": seed, "strategy": "mixed"}
        | {f"overlap.{pair}.final.example.0.05": values[seed - 1] for pair, values in overlaps.items()}
        for seed in (1, 2, 3)
    ]
    section = study_page.pairs(StudyResults.of({"study": about, "levels": summary.levels(rows)}), rows)
    (table,) = section.blocks
    assert isinstance(table, Table) and table.head == ["Tasks", "Mix-tuned"]
    told = {str(words.main): (cell.main, cell.sub.split("; ")[-1]) for words, cell in rows_of(table)}
    assert told == {
        "Biographies and questions": (say.percent(0.3), "the most in 2 of 3 runs"),
        "Biographies and statements to complete": (say.percent(0.7 / 3), "the most in 0 of 3 runs"),
        "Questions and statements to complete": (say.percent(0.45), "the most in 1 of 3 runs"),
    }
    assert study_page.pairs(StudyResults.of({"study": about}), []).absent
    empty = [{"setting": "default", "seed": 4, "strategy": "mixed"}]
    assert summary.largest(rows + empty, list(rows[0])[3:]).total() == 3, "a run without overlaps does not count"


def test_differences_are_paired_by_seed() -> None:
    rows = [row("a", 1, "mixed", 0.9, None), row("a", 2, "mixed", 0.5, None), row("a", 3, "mixed", 0.1, None)]
    rows += [row("a", 2, "two_stage", 0.6, None), row("a", 1, "two_stage", 0.4, None)]  # in another order, one missing
    found = the(summary.differences(rows, ("mixed", "two_stage")), measure="recall.qa_ood")
    assert found["mean"] == pytest.approx((0.5 - 0.1) / 2) and found["seeds"] == 2 and found["above"] == 1


def test_effects_are_paired_by_seed_and_by_the_other_axes() -> None:
    rows = []
    for seed, gain in ((1, 0.10), (2, 0.30), (3, -0.02)):
        for order, base in (("fixed", 0.2), ("permuted", 0.5)):
            for people, more in (("250", 0.0), ("500", gain)):
                place = {"vary.order": order, "vary.people": people}
                rows.append(row(f"{order}+{people}", seed, "mixed", base + more, None) | place)
    rows.append(row("fixed+500", 4, "mixed", 1.0, None) | {"vary.order": "fixed", "vary.people": "500"})  # no partner
    found = summary.effects(rows)
    people, order = (
        the(found, axis="people", measure="recall.qa_ood"),
        the(found, axis="order", measure="recall.qa_ood"),
    )
    values = [0.10, 0.30, -0.02]
    mean = sum(values) / 3
    half = student.ppf(0.975, 2) * math.sqrt(sum((v - mean) ** 2 for v in values) / 2 / 3)
    assert (people["point"], people["against"], people["seeds"], people["above"]) == ("500", "250", 3, 2)
    assert people["mean"] == pytest.approx(mean)
    assert (people["low"], people["high"]) == pytest.approx((mean - half, mean + half))
    assert order["mean"] == pytest.approx(0.3) and (order["against"], order["above"]) == ("fixed", 3)
    assert summary.effects([row("a", 1, "mixed", 0.9, None)]) == []


def planted(good: float) -> list[dict]:
    """Six settings of two strategies and two seeds: recall depends on the setting (d) and the strategy; the measure
    follows the strategy by `good` and the setting backwards."""
    rows = []
    for d in range(6):
        for seed in (1, 2):
            for number, strategy in enumerate(("two_stage", "mixed")):
                outcome = 0.05 * d + 0.4 * number + 0.001 * seed
                rows.append(row(f"s{d}", seed, strategy, outcome, good * number - 10 * d + 0.0001 * good * seed))
    return rows


def test_a_measure_may_tell_recipes_apart_and_mislead_between_settings() -> None:
    found = the(summary.prediction(planted(1.0)), measure="gradient.qa_id.excess")
    assert found["rows"] == 24 and found["settings"] == 6 and found["pairs"] == 12
    assert found["right"] == found["right_low"] == found["right_high"] == 1.0
    assert found["within"] == pytest.approx(1.0), "the order of the four rows of each setting is right"
    assert found["strategies"]["mixed"] < -0.9 and found["across"] < 0, "over settings it is backwards"
    assert found["across_low"] <= found["across"] <= found["across_high"]
    turned = the(summary.prediction(planted(-1.0)), measure="gradient.qa_id.excess")
    assert turned["right"] == 0.0 and turned["within"] == pytest.approx(-1.0)


def test_pairs_that_hardly_differ_say_nothing_and_ties_count_half() -> None:
    rows = [row("a", 1, "x", 0.5, 1.0), row("a", 1, "y", 0.5 + summary.MARGIN / 2, 2.0), row("a", 1, "z", 0.9, 1.0)]
    rows += [row("a", 2, "x", 0.1, 5.0)]  # of another seed: no pair
    found = the(summary.prediction(rows), measure="gradient.qa_id.excess")
    assert found["pairs"] == 2, "x and y differ by less than the margin"
    assert found["right"] == pytest.approx((0.5 + 0.0) / 2), "x and z are tied, y and z the wrong way around"
    assert found["right_low"] is None, "one setting has no interval over settings"


def test_what_is_constant_or_unknown_predicts_nothing() -> None:
    rows = [{**r, "gradient.qa_id.excess": 1.0} for r in planted(1.0)]
    found = the(summary.prediction(rows), measure="gradient.qa_id.excess")
    assert found["across"] is None and found["within"] is None and found["right"] == 0.5
    assert found["across_low"] is None
    unknown = [{**r, "gradient.qa_id.excess": None} for r in planted(1.0)]
    assert summary.prediction(unknown) == []


def test_claims_are_counted_over_runs() -> None:
    claim = lambda verdict, effect: {
        "claim": "recall", "text": "It does", "when": "training", "unit": "points", "verdict": verdict, "effect": effect
    }  # fmt: skip
    claims = [claim("holds", 2.0), claim("does not hold", -1.0), claim("undecided", None)]
    (found,) = summary.claims_over_runs([("a", filled({"claims": [one]}).claims) for one in claims])
    assert (found["holds"], found["does_not_hold"], found["undecided"]) == (1, 1, 1)
    assert found["effect"] == pytest.approx(0.5) and found["seeds"] == 2


def test_every_measure_of_a_run_is_found_by_name() -> None:
    results = Results.of(sample_results())
    assert results.run is not None
    for strategy in results.run.strategies:
        found = summary.measures(results, strategy)
        assert found["recall.qa_ood"] == results.recall[strategy]["qa_ood"].exact_match
        kinds = {name.partition(".")[0] for name in found}
        assert {"recall", "logprob", "updates", "overlap", "spearman", "excess_gini", "ablate", "graft", "gradient",
                "states"} <= kinds  # fmt: skip
        best = max(
            row.top1 for row in results.mechanism.representations[strategy]
            if (row.part, row.place) == ("qa_ood", "answer") and row.top1 is not None
        )  # fmt: skip
        assert found["states.qa_ood.answer.top1"] == best
