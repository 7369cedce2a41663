"""Worlds: seeds, names, splits, frequencies."""

from __future__ import annotations

from collections import Counter

import pytest
from pydantic import ValidationError
from tiny_facts import tiny_world

from crosstrace.core.errors import UserError
from crosstrace.data.facts import FactSettings, World
from crosstrace.data.text import biographies, questions
from crosstrace.data.wording import NAME_PARTS, RELATIONS, names, packaged, pronouns


def test_the_same_settings_give_the_same_world_and_another_seed_another():
    assert tiny_world(seed=3).people == tiny_world(seed=3).people
    one, other = tiny_world(seed=3), tiny_world(seed=4)
    assert [p.name for p in one.people] != [p.name for p in other.people]
    assert [p.facts[0].object for p in one.people] != [p.facts[0].object for p in other.people]
    assert [p.in_distribution for p in one.people] != [p.in_distribution for p in other.people]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("people", [8, 9, 10, 13, 17, 20, 33, 100, 500, 2000])
@pytest.mark.parametrize("population", ["A", "B"])
def test_no_part_of_a_name_belongs_to_one_person_alone(people: int, seed: int, population: str):
    world = World.draw(FactSettings(people=people, seed=seed, population=population))  # type: ignore[arg-type]
    full = [person.name for person in world.people]
    assert len(full) == len(set(full)) == people
    for position in range(len(NAME_PARTS)):
        assert min(Counter(name.split()[position] for name in full).values()) >= 2


def test_populations_share_no_name_whatever_their_seeds():
    drawn: dict[str, set[str]] = {"A": set(), "B": set()}
    for population, found in drawn.items():
        for seed in range(3):
            found |= {person.name for person in tiny_world(people=2000, population=population, seed=seed).people}
    assert len(drawn["A"]) > 4000 and len(drawn["B"]) > 4000
    assert not drawn["A"] & drawn["B"]


@pytest.mark.parametrize("share, expected", [(0.0, 0), (0.25, 10), (0.5, 20), (0.51, 20), (1.0, 40)])
def test_the_split_is_exact(share: float, expected: int):
    world = tiny_world(people=40, qa_share=share)
    assert sum(person.in_distribution for person in world.people) == expected


@pytest.mark.parametrize("share, expected", [(0.0, 0), (0.1, 4), (1.0, 40)])
def test_the_augmented_share_is_exact(share: float, expected: int):
    assert sum(person.augmented for person in tiny_world(people=40, augmented_share=share).people) == expected


def test_a_setting_moves_no_draws_of_another():
    plain, changed = tiny_world(), tiny_world(qa_share=0.25, augmented_share=0.5, frequency="zipf", order="permuted")
    assert [p.facts for p in plain.people] == [p.facts for p in changed.people]
    few = {p.id for p in changed.people if p.in_distribution}
    assert few < {p.id for p in plain.people if p.in_distribution}


def test_zipf_by_hand():
    world = tiny_world(people=20, frequency="zipf", zipf_top=10, zipf_exponent=1.0)
    # 10/1, 10/2, 10/3, 10/4 (a half is rounded to even), 10/5, 10/6, and 1 from rank 7 on
    assert sorted((p.repeats for p in world.people), reverse=True) == [10, 5, 3, 2, 2, 2, *[1] * 14]
    steep = tiny_world(people=20, frequency="zipf", zipf_top=9, zipf_exponent=2.0)
    assert sorted((p.repeats for p in steep.people), reverse=True) == [9, 2, *[1] * 18]
    assert world.people[0].repeats != 10 or world.people[1].repeats != 5  # the order of drawing is no ranking
    assert {p.repeats for p in tiny_world(people=20).people} == {1}


def test_facts_belong_to_their_person_and_objects_to_their_relation():
    world = tiny_world(people=40)
    assert world.relations == RELATIONS and len(RELATIONS) >= 6
    for person in world.people:
        assert [fact.relation for fact in person.facts] == list(RELATIONS)
        assert person.pronoun == pronouns()[person.name.split()[0]]
        for fact in person.facts:
            assert (fact.person, fact.subject) == (person.id, person.name)
            assert fact.object in packaged().objects[fact.relation]
    ids = [fact.id for person in world.people for fact in person.facts]
    assert len(ids) == len(set(ids)) == 40 * len(RELATIONS)


def test_lists_hold_nothing_twice_and_wordings_hold_what_they_must():
    for part in NAME_PARTS:
        assert len(set(names(part))) == len(names(part)) >= 50
    for relation in RELATIONS:
        assert len(set(packaged().objects[relation])) == len(packaged().objects[relation])
        for other in RELATIONS:
            assert other == relation or not set(packaged().objects[relation]) & set(packaged().objects[other])
        biography, question = packaged().statements[relation], packaged().questions[relation]
        assert len(set(biography)) >= 6 and len(set(question)) >= 3
        for pattern in biography:
            assert pattern.count("{subject}") == pattern.count("{object}") == 1
        for pattern in question:
            assert pattern.count("{subject}") == 1 and "{object}" not in pattern
        assert all(p.count("[") == p.count("]") >= 1 for p in biography + question)


def test_too_many_people_are_refused():
    with pytest.raises(UserError, match=r"facts\.people is 400000.*at most 250000 people"):
        tiny_world(people=400_000)


@pytest.mark.parametrize(
    "bad", [{"people": 7}, {"qa_share": 1.1}, {"order": "random"}, {"zipf_exponent": 0}, {"peple": 20}]
)
def test_bad_settings_are_refused(bad: dict):
    with pytest.raises(ValidationError, match=next(iter(bad))):
        FactSettings(**bad)


def test_some_relations_alone():
    every, some = tiny_world(), tiny_world(relations=("employer", "birth_city"))
    assert some.relations == ("birth_city", "employer")  # in the order of biographies
    for one, other in zip(every.people, some.people):
        assert other.facts == tuple(fact for fact in one.facts if fact.relation in some.relations)
        assert (one.name, one.in_distribution) == (other.name, other.in_distribution)
    for text in (*biographies(some), *questions(some)):
        assert {mention.relation for mention in text.mentions} <= {"birth_city", "employer"}


@pytest.mark.parametrize("relations", [(), ("employer", "birthplace")])
def test_relations_that_there_are_not(relations: tuple[str, ...]):
    with pytest.raises(UserError, match=r"facts\.relations names (none|birthplace); the relations of people are birth"):
        tiny_world(relations=relations)
