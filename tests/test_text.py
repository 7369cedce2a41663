"""Texts: bytes, spans, order, naming, and the file they are kept in."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_facts import tiny_world

from crosstrace.core.errors import UserError
from crosstrace.data.facts import FactSettings, World
from crosstrace.data.text import Example, Mention, biographies, questions, read_jsonl, write_jsonl
from crosstrace.data.wording import RELATIONS, packaged

WORLDS = st.builds(
    FactSettings,
    people=st.integers(16, 40),
    seed=st.integers(0, 50),
    qa_share=st.floats(0, 1),
    biographies=st.integers(1, 3),
    augmented_share=st.floats(0, 1),
    augmented_biographies=st.integers(1, 4),
    order=st.sampled_from(["fixed", "permuted"]),
    subject=st.sampled_from(["name", "pronoun", "either"]),
    questions=st.integers(1, 3),
    frequency=st.sampled_from(["uniform", "zipf"]),
    population=st.sampled_from(["A", "B"]),
)


def _bytes(path: Path, seed: int) -> bytes:
    world = tiny_world(seed=seed, subject="either", order="permuted", augmented_share=0.5)
    write_jsonl(path, biographies(world) + questions(world))
    return path.read_bytes()


def test_same_seed_same_bytes_and_other_seed_other_bytes(tmp_path: Path):
    first, again, other = (_bytes(tmp_path / str(n), seed) for n, seed in enumerate((1, 1, 2)))
    assert first and first == again
    assert first != other


def _words(pattern: str) -> list[str]:
    """The bracketed words of a pattern."""
    return re.findall(r"\[(.*?)\]", pattern)


@settings(max_examples=25, deadline=None)
@given(WORLDS)
def test_every_span_covers_its_words(options: FactSettings):
    world = World.draw(options)
    facts = {fact.id: fact for person in world.people for fact in person.facts}
    people = {person.id: person for person in world.people}
    seen = 0
    for example in biographies(world) + questions(world):

        def cover(span, text=example.text):
            return text[slice(*span)]

        person = people[example.person]
        assert example.repeats == person.repeats
        assert example.split == ("id" if person.in_distribution else "ood")
        for mention in example.mentions:
            fact = facts[mention.fact]
            task, relation, number = mention.wording.split(".")
            patterns = packaged().statements if task == "bio" else packaged().questions
            pattern = patterns[relation][int(number)]
            assert (task, relation) == (example.task, fact.relation) == (example.task, mention.relation)
            assert cover(mention.object) == fact.object
            assert cover(mention.subject) in (person.name, person.pronoun.capitalize(), person.pronoun)
            assert [cover(span) for span in mention.relation_words] == _words(pattern) != []
            # the sentence is the pattern, filled
            filled = re.sub(r"[\[\]]", "", pattern).format(subject=cover(mention.subject), object=fact.object)
            assert filled in example.text
            seen += 1
        if example.task == "bio":
            assert example.targets == ((0, len(example.text)),)
            assert len(example.text) == len(example.text.strip()) and "  " not in example.text
        else:
            assert example.targets == (example.mentions[0].object,) and example.text.endswith(cover(example.targets[0]))
    assert seen >= 12 * len(world.people)


def test_a_biography_has_every_relation_once_in_fixed_or_permuted_order():
    def orders(**options) -> list[list[str]]:
        return [[m.relation for m in example.mentions] for example in biographies(tiny_world(people=20, **options))]

    assert orders() == [list(RELATIONS)] * 20
    permuted = orders(order="permuted", biographies=2)
    assert len(permuted) == 40 and all(sorted(order) == sorted(RELATIONS) for order in permuted)
    assert len({tuple(order) for order in permuted}) > 20


def test_augmented_people_have_more_biographies_in_permuted_order():
    world = tiny_world(people=20, augmented_share=0.3, augmented_biographies=4, biographies=2)
    by_person: dict[str, list[Example]] = {}
    for example in biographies(world):
        by_person.setdefault(example.person, []).append(example)
    for person in world.people:
        examples = by_person[person.id]
        assert len(examples) == (4 if person.augmented else 2)
        assert len({example.id for example in examples}) == len(examples)
        orders = {tuple(m.relation for m in example.mentions) for example in examples}
        assert (orders == {RELATIONS}) is not person.augmented
    assert sum(map(len, by_person.values())) == 6 * 4 + 14 * 2


def test_biographies_of_one_person_are_worded_anew():
    texts = [example.text for example in biographies(tiny_world(biographies=3))]
    assert len(set(texts)) == len(texts) == 48


@pytest.mark.parametrize("subject, by_name", [("name", {True}), ("pronoun", {False}), ("either", {True, False})])
def test_sentences_after_the_first_name_the_person_as_set(subject: str, by_name: set[bool]):
    world = tiny_world(people=20, subject=subject)
    people = {person.id: person for person in world.people}
    found = set()
    for example in biographies(world):
        person = people[example.person]
        first, *rest = [example.text[slice(*mention.subject)] for mention in example.mentions]
        assert first == person.name
        named = {subject == person.name for subject in rest}
        assert len(named) == 1  # one way within a biography
        found |= named
        assert named == {True} or {subject.lower() for subject in rest} == {person.pronoun}
    assert found == by_name


def test_questions_name_the_person_and_are_worded_differently():
    examples = questions(tiny_world(questions=2))
    assert len(examples) == 16 * len(RELATIONS) * 2
    for one, other in zip(examples[::2], examples[1::2], strict=True):
        assert one.mentions[0].fact == other.mentions[0].fact
        assert one.mentions[0].wording != other.mentions[0].wording and one.text != other.text
    assert len({example.id for example in examples}) == len(examples)


def test_more_questions_than_wordings_are_refused():
    with pytest.raises(UserError, match=r"facts\.questions is 99.*use at most \d"):
        questions(tiny_world(questions=99))


def test_jsonl_round_trip(tmp_path: Path):
    world = tiny_world(frequency="zipf", order="permuted")
    examples = biographies(world) + questions(world)
    # text that is no ASCII, and a line separator inside a text, must survive
    span = (0, 2)
    examples.append(
        Example("x", "qa", "Ø\u2028é", "B1", "id", (span,), (Mention("f", "r", "w", span, (span,), span),), 3)
    )
    write_jsonl(tmp_path / "all.jsonl", examples)
    assert read_jsonl(tmp_path / "all.jsonl") == examples
    assert len((tmp_path / "all.jsonl").read_bytes().split(b"\n")) == len(examples) + 1


def _without(key: str):
    return lambda line: json.dumps({k: v for k, v in json.loads(line).items() if k != key}).encode()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda line: line[: len(line) // 2],
        lambda line: b"",
        lambda line: b"[1, 2]",
        lambda line: b"7",
        lambda line: line.replace(b"born", b"b\xffrn").replace(b"text", b"te\xfft"),
        _without("mentions"),
        _without("repeats"),
        lambda line: json.dumps(json.loads(line) | {"targets": [[1, 2, 3]]}).encode(),
        lambda line: json.dumps(json.loads(line) | {"targets": [["a", "b"]]}).encode(),
        lambda line: json.dumps(json.loads(line) | {"targets": [[0, 10**9]]}).encode(),
        lambda line: json.dumps(json.loads(line) | {"text": 7}).encode(),
        lambda line: json.dumps(json.loads(line) | {"text": "\ud800" * 9000}).encode(),
        lambda line: json.dumps(json.loads(line) | {"repeats": 10**12}).encode(),
        lambda line: b"[" * 100_000,
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, spoil):
    path = tmp_path / "bio.jsonl"
    write_jsonl(path, biographies(tiny_world()))
    lines = path.read_bytes().splitlines()
    lines[2] = spoil(lines[2])
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(UserError, match=rf"{re.escape(str(path))} line 3 is not an example"):
        read_jsonl(path)
