"""Strategies as data: what an update holds, and for how long."""

from __future__ import annotations

import pytest

from crosstrace.core.errors import UserError
from crosstrace.experiment.config import loads
from crosstrace.training.recipes import Optimiser, Phase, bio_only, mixed, qa_first, qa_only, two_stage

SIZES = {"bio": 100, "qa": 30, "empty": 0}


def test_updates_by_steps_and_by_epochs_of_the_first_task():
    assert Phase("p", {"bio": 8}, steps=17).updates(SIZES) == 17
    assert Phase("p", {"bio": 8, "qa": 8}, epochs=2).updates(SIZES) == 25
    assert Phase("p", {"qa": 8, "bio": 8}, epochs=2).updates(SIZES) == 8  # 7.5
    assert Phase("p", {"bio": 64}, epochs=0.01).updates(SIZES) == 1


def test_composition_adds_replay():
    phase = Phase("p", {"qa": 8}, 1, replay={"bio": 3, "qa": 2})
    assert phase.composition() == {"qa": 10, "bio": 3}
    assert phase.batch == {"qa": 8}
    assert Phase("p", {"qa": 8}, epochs=4, replay={"qa": 2}).updates(SIZES) == 15  # epochs count the batch alone


@pytest.mark.parametrize(
    "phase, message",
    [
        (Phase("p", {}, 1), "phase p has an empty batch"),
        (Phase("p", {"bio": 1}), "phase p needs either steps or epochs, and not both"),
        (Phase("p", {"bio": 1}, 1, 1.0), "phase p needs either steps or epochs, and not both"),
        (Phase("p", {"empty": 1}, 1), r"task 'empty', which has no training example \(tasks with examples: bio, qa\)"),
        (Phase("p", {"qna": 1}, 1), "trains task 'qna', which has no training example"),
        (Phase("p", {"bio": 1}, 1, replay={"empty": 1}), "trains task 'empty'"),
        (Phase("p", {"bio": 1}, 1, weights={"qa": 2.0}), "phase p weighs qa, which its batch does not hold"),
    ],
)
def test_ill_defined_phases(phase: Phase, message: str):
    with pytest.raises(UserError, match=message):
        phase.updates(SIZES)


def test_the_strategies():
    assert two_stage(4, 5, 6) == [Phase("bio", {"bio": 4}, 6), Phase("qa", {"qa": 5}, 6)]
    assert mixed(4, 5, 6) == [Phase("mixed", {"bio": 4, "qa": 5}, 6)]
    assert qa_first(4, 5, 6) == [Phase("qa", {"qa": 5}, 6), Phase("bio", {"bio": 4}, 6)]
    assert bio_only(4, 6) == [Phase("bio", {"bio": 4}, 6)]
    assert qa_only(5, 6) == [Phase("qa", {"qa": 5}, 6)]
    # at equal cost: both see as many examples of each task
    seen = lambda strategy: {
        task: sum(phase.composition().get(task, 0) * phase.updates(SIZES) for phase in strategy)
        for task in ("bio", "qa")
    }
    assert seen(two_stage()) == seen(mixed()) == seen(qa_first())


def test_every_strategy_can_be_written_in_yaml():
    text = """
    strategies:
      two_stage: [{name: bio, batch: {bio: 64}, steps: 500}, {name: qa, batch: {qa: 128}, steps: 500}]
      qa_first: [{name: qa, batch: {qa: 128}, steps: 500}, {name: bio, batch: {bio: 64}, steps: 500}]
      one_to_ten:
        - {name: mixed, batch: {bio: 8, qa: 80}, epochs: 2.5, weights: {bio: 1, qa: 0.1}}
      replayed:
        - {name: bio, batch: {bio: 64}, steps: 10}
        - {name: qa, batch: {qa: 64}, steps: 10, replay: {bio: 8}, optimiser: {learning_rate: 1.0e-4, warmup: 0}}
    """
    strategies = loads(text, "here").strategies
    assert strategies["two_stage"] == two_stage(64, 128, 500)
    assert strategies["qa_first"] == qa_first(64, 128, 500)
    assert strategies["one_to_ten"] == [Phase("mixed", {"bio": 8, "qa": 80}, None, 2.5, {"bio": 1, "qa": 0.1})]
    optimiser = Optimiser(learning_rate=1e-4, warmup=0)
    assert strategies["replayed"][1] == Phase("qa", {"qa": 64}, 10, replay={"bio": 8}, optimiser=optimiser)
