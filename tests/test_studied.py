"""Which facts the mechanism is studied on."""

from __future__ import annotations

import random
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from crosstrace.experiment.studied import people_facts, sample_facts


def some(people: int, each: int) -> list[Any]:
    return [SimpleNamespace(person=f"p{n}", fact=f"{n}.{i}") for n in range(people) for i in range(each)]


@pytest.mark.parametrize("each", [1, 3, 6])
def test_whole_people_are_chosen_as_ever(each):
    """As long as a person has at most an eighth of the facts."""
    pairs, seed = some(30, each), "explain/qa_id"
    people = [f"p{n}" for n in range(30)]
    random.Random(seed).shuffle(people)
    found = people_facts(pairs, 48, seed)
    assert found == [pair for person in people[: 48 // each] for pair in pairs if pair.person == person]


def test_many_facts_of_one_document_leave_room_for_others():
    pairs = some(20, 5)
    found = people_facts(pairs, 24, "x")
    assert Counter(pair.person for pair in found) == dict.fromkeys({pair.person for pair in found}, 3)
    assert len(found) == 24 and found == people_facts(pairs, 24, "x") != people_facts(pairs, 24, "y")
    assert any(pair.fact.endswith(".4") for pair in found), "not the first ones alone"
    assert len(people_facts(some(1, 9), 4, "x")) == 2


def test_a_sample_is_of_enough_people_if_there_are():
    pairs = some(8, 3)
    for seed in map(str, range(50)):
        found = sample_facts(pairs, 8, seed)
        assert len(found) == len({pair.fact for pair in found}) == 8
        assert len({pair.person for pair in found}) >= 6 and found == sample_facts(pairs, 8, seed)
    drawn = random.Random("s").sample(some(40, 6), 24)
    assert sample_facts(some(40, 6), 24, "s") == drawn, "as ever where it suffices"
    assert len(sample_facts(some(2, 3), 8, "x")) == 6
    assert len({pair.person for pair in sample_facts(some(4, 9), 3, "x")}) == 3
