"""Transfer to other formats: planted knowledge is found in all of them, ignorance in none; scores by a plain loop."""

from __future__ import annotations

import copy
import functools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_facts import tiny_world, tokenizer
from tiny_models import tiny_model
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedTokenizerFast

from crosstrace.analyses.transfer import share_right, transfer
from crosstrace.analyses.transfer_formats import FORMATS, PARTS, formats
from crosstrace.core.errors import UserError
from crosstrace.core.statistics import cluster_bootstrap
from crosstrace.data.facts import Person, World
from crosstrace.data.text import biographies, questions
from crosstrace.data.wording import packaged

WORDS = tokenizer("word")
EXACT = ("asked", "wording", "cloze")
CHANCE = {**dict.fromkeys(EXACT, 1 / 50), "choice": 1 / 4, "pair": 1 / 2, "true_statement": 1 / 2, "yes_no": 1 / 2,
          "reversed": 1 / 4}  # fmt: skip


def sentence(pattern: str, subject: str, value: str) -> str:
    return pattern.replace("[", "").replace("]", "").replace("{subject}", subject).replace("{object}", value)


class Toy(nn.Module):
    """Enough of a causal language model for recall: it goes on with what it was taught, else all tokens are alike."""

    def __init__(self, own: Any):
        super().__init__()
        self.own = own
        self.table: dict[tuple[int, ...], int] = {}
        self.nothing = nn.Parameter(torch.zeros(1))

    def ids(self, text: str) -> list[int]:
        return self.own(text, add_special_tokens=False)["input_ids"]

    def learn(self, text: str, ended: bool = False) -> None:
        ids = self.ids(text) + [self.own.eos_token_id] * ended
        for i in range(1, len(ids)):
            self.table[tuple(ids[:i])] = ids[i]

    def next_token(self, ids: tuple[int, ...]) -> int | None:
        return self.table.get(ids)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        logits = torch.zeros(*input_ids.shape, len(self.own), dtype=torch.float64)
        for row, ids in enumerate(input_ids.tolist()):
            for end in range(1, int(attention_mask[row].sum()) + 1):
                token = self.next_token(tuple(ids[:end]))
                if token is not None:
                    logits[row, end - 1, token] = 20
        return SimpleNamespace(logits=logits)


class Knower(Toy):
    """Knows some people's facts in every wording, both ways."""

    def __init__(self, own: Any, people: Sequence[Person]):
        super().__init__(own)
        self.people = people
        for fact in [fact for person in people for fact in person.facts]:
            for pattern in packaged().questions[fact.relation]:
                self.learn(f"{sentence(pattern, fact.subject, '')} {fact.object}", ended=True)
            for pattern in packaged().statements[fact.relation]:
                text = sentence(pattern, fact.subject, fact.object)
                self.learn(text)
                self.learn(f"Is it true that {text[:-1]}? yes")

    def next_token(self, ids: tuple[int, ...]) -> int | None:
        if ids in self.table:
            return self.table[ids]
        (mark,), who, is_it_true = self.ids("?"), self.ids("Who"), self.ids("Is it true that")
        if mark not in ids:
            return None
        said = ids[::-1].index(mark)
        asked = ids[: len(ids) - said]
        if list(ids[: len(is_it_true)]) == is_it_true:
            return None if asked in self.table and said else dict(enumerate(self.ids(" no"))).get(said)
        return self.names(asked).get(said) if list(ids[: len(who)]) == who else None

    @functools.cache  # noqa: B019
    def names(self, asked: tuple[int, ...]) -> dict[int, int]:
        text = self.own.decode(asked)
        own = [one.name for one in self.people if all(fact.object in text for fact in one.facts)]
        return dict(enumerate(self.ids(" " + own[0]))) if own else {}


def without(word: str) -> Any:
    """The word-level tokenizer without one of its words."""
    state = json.loads(WORDS.backend_tokenizer.to_str())
    del state["model"]["vocab"][word]
    inner = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="<end>")


def of(rows: list[dict[str, Any]], part: str) -> dict[str, dict[str, Any]]:
    found = {row["format"]: row for row in rows if row["part"] == part}
    assert tuple(found) == FORMATS
    return found


def texts(item: Any) -> list[str]:
    return [candidate.example.text for candidate in item.candidates]


# ---- who knows, and who does not


@pytest.mark.parametrize("kind", ["word", "space"])
def test_who_knows_everything_is_right_in_every_format(kind):
    own, world = tokenizer(kind), tiny_world(people=8)
    rows = transfer(Knower(own, list(world.people)), own, world, number=6)
    for part in PARTS:
        for name, row in of(rows, part).items():
            if kind == "word" and name == "yes_no":
                assert "Is it true" in row["absent"] and (row["correct"], row["n"]) == (None, 0)
                continue
            # half of them know 4 people: 6 facts of 4 people, and each person backwards; a true and a false statement
            assert (row["n"], row["people"]) == ({"yes_no": 12, "reversed": 4}.get(name, 6), 4)
            assert (row["correct"], row["correct_low"], row["correct_high"]) == (1, 1, 1), name
            assert row["chance"] == pytest.approx(CHANCE[name]) and row["absent"] is None
            if name != "true_statement":
                assert -1e-3 < row["logprob"] < 0


def test_who_knows_some_people_knows_no_others():
    world = tiny_world(people=16)
    rows = transfer(Knower(WORDS, [one for one in world.people if one.in_distribution]), WORDS, world, number=48)
    for name, row in of(rows, "qa_id").items():
        assert row["correct"] == (None if name == "yes_no" else 1)
    for name, row in of(rows, "qa_ood").items():
        # to whom all candidates are alike; shared by ties
        assert row["correct"] == pytest.approx({"yes_no": None, **dict.fromkeys(EXACT, 0)}.get(name, CHANCE[name]))


def test_who_knows_the_trained_questions_alone_knows_nothing_else():
    world, model = tiny_world(), Toy(WORDS)
    for example in questions(world):
        model.learn(example.text, ended=True)
    for part in PARTS:
        found = {name: row["correct"] for name, row in of(transfer(model, WORDS, world, number=48), part).items()}
        assert found == pytest.approx({**CHANCE, "asked": 1, "choice": 1, "pair": 1, "wording": 0, "cloze": 0,
                                       "yes_no": None})  # fmt: skip


def test_who_knows_nothing_is_at_chance():
    rows = transfer(Toy(WORDS), WORDS, tiny_world(), number=12)
    for row in rows:
        if row["format"] in EXACT:
            assert (row["correct"], row["correct_high"]) == (0, 0)
        elif row["format"] != "yes_no":
            assert row["correct"] == row["correct_low"] == row["chance"] == CHANCE[row["format"]]
    other = of(transfer(Toy(tokenizer("space")), tokenizer("space"), tiny_world(), number=12), "qa_ood")
    assert other["yes_no"]["n"] == 24


def test_always_yes_is_right_half_of_the_time():
    class Yes(Toy):
        def next_token(self, ids: tuple[int, ...]) -> int | None:
            return self.ids(" yes")[0] if ids[-1:] == tuple(self.ids("?")) else None

    own = tokenizer("space")
    row = of(transfer(Yes(own), own, tiny_world(), number=8), "qa_ood")["yes_no"]
    assert row["correct"] == 0.5


def test_choices_by_hand():
    assert share_right([-1.0, -2.0, -3.0]) == 1
    assert share_right([-2.0, -1.0, -3.0]) == 0
    assert share_right([-1.0, -1.0, -3.0]) == 1 / 2
    assert share_right([-1.0, -1.0 + 1e-9, -1.0, -1.0]) == 1 / 4
    assert share_right([-1.0, -1.0 + 1e-5]) == 0
    assert share_right([float("-inf"), -9.0]) == 0 and share_right([float("nan"), -9.0]) == 0


# ---- log-probabilities


def alone(model: nn.Module, text: str, start: int, ended: bool) -> tuple[bool, float]:
    """One text alone: whether every token from a character on is the likeliest, and their log-probability."""
    row = WORDS(text, return_offsets_mapping=True)
    ids = row["input_ids"] + [WORDS.eos_token_id] * ended
    judged = [place for place in range(1, len(row["input_ids"])) if row["offset_mapping"][place][1] > start]
    judged += [len(ids) - 1] * ended
    with torch.no_grad():
        chances = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    exact = all(int(chances[place - 1].argmax()) == ids[place] for place in judged)
    return exact, sum(float(chances[place - 1, ids[place]]) for place in judged)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gpt2", "qwen3", "qwen3_moe"])
def test_rows_equal_a_loop_over_single_candidates(kind):
    length: dict[str, Any] = {"n_positions" if kind == "gpt2" else "max_position_embeddings": 128}
    model = tiny_model(kind, vocab_size=len(WORDS), **length)
    world = tiny_world()
    values = {fact.id: fact.object for person in world.people for fact in person.facts}
    model.train()
    rows = of(transfer(model, WORDS, world, parts={"qa_ood": "qa_ood"}, number=4, k=3, tokens=40), "qa_ood")
    assert all(module.training for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

    model.eval()
    asked, _ = formats(world, WORDS, "qa_ood", number=4, k=3)
    assert set(asked) == set(FORMATS) - {"yes_no"}
    for name, items in asked.items():
        right, true = [], []
        for item in items:
            found = []
            for text in texts(item):
                start = 0 if name == "true_statement" else text.rfind("?") + 1
                if name == "cloze":
                    value = values[item.candidates[0].example.mentions[0].fact]
                    start = text.rindex(value)
                    text = text[: start + len(value)]
                found.append(alone(model, text, start, name in ("asked", "wording")))
            sums = [logprob for _, logprob in found]
            right.append(float(found[0][0] if name in EXACT else sums[0] == max(sums)))
            true.append(sums[0])
        row = rows[name]
        assert row["logprob"] == pytest.approx(np.mean(true), rel=1e-10)
        interval = cluster_bootstrap(right, [0.0] * len(right), [item.person for item in items], seed=0)
        assert (row["correct"], row["correct_low"], row["correct_high"]) == interval
        assert row["n"] == len(items) == 4


def test_a_model_is_left_as_it_was_after_an_error():
    class Broken(Toy):
        def next_token(self, ids: tuple[int, ...]) -> int | None:
            raise RuntimeError("broken")

    model = Broken(WORDS).train()
    with pytest.raises(RuntimeError, match="broken"):
        transfer(model, WORDS, tiny_world(), number=2)
    assert model.training and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_batch_size_and_padding_do_not_matter():
    model = tiny_model("llama", vocab_size=len(WORDS), max_position_embeddings=128)
    plain, *others = [transfer(model, WORDS, tiny_world(), number=6, tokens=size) for size in (1, 100, 8192)]
    for rows in others:
        for row, expected in zip(rows, plain, strict=True):
            assert row | {"logprob": 0} == expected | {"logprob": 0}
            if row["absent"] is None:
                assert row["logprob"] == pytest.approx(expected["logprob"], rel=1e-10)
    assert len({row["logprob"] for row in plain}) > 8
    assert {row["correct"] for row in plain} - {0, 1, None}


# ---- what is asked


@pytest.mark.parametrize("kind", ["word", "space", "spaceless", "bos"])
def test_what_is_judged_is_what_differs(kind):
    own, world = tokenizer(kind), tiny_world()
    values = {fact.id: fact for person in world.people for fact in person.facts}
    names = {person.id: person.name for person in world.people}

    def plain(ids):
        return own.decode(ids).replace(" ", "")

    asked, _ = formats(world, own, "qa_ood", number=12)
    for name, items in asked.items():
        for item in items:
            said = []
            for candidate in item.candidates:
                text = plain(candidate.ids[candidate.targets["answer"]])
                said.append(text.removesuffix(own.eos_token) if name in ("asked", "wording") else text)
                assert len(text) > len(said[-1]) or name not in ("asked", "wording")
            whole = [text.replace(" ", "") for text in texts(item)]
            if name == "true_statement":
                first = WORDS.tokenize(texts(item)[0])[0]
                assert all(len(first) >= len(text) - len(part) for text, part in zip(whole, said))
                assert all(text.endswith(part) for text, part in zip(whole, said))
                assert (kind == "bos") == (whole == said)  # a token before all predicts the first
            elif name == "yes_no":
                assert sorted(said) == ["no", "yes"]
            elif name == "reversed":
                assert said[0] == names[item.person].replace(" ", "")
            else:
                about = values[item.candidates[0].example.mentions[0].fact]
                assert said[0] == about.object.replace(" ", "")
                assert set(said) <= {value.replace(" ", "") for value in packaged().objects[about.relation]}
            assert len(set(said)) == len(item.candidates)
            assert len(item.candidates) == (1 if name in EXACT else 4 if name in ("choice", "reversed") else 2)


def test_every_format_asks_about_the_same_facts():
    world = tiny_world()
    number = 3 * len(world.relations) + 2
    asked, _ = formats(world, tokenizer("space"), "qa_id", number=number)
    about = {name: [item.candidates[0].example.mentions[0].fact for item in items] for name, items in asked.items()}
    assert set(asked) == set(FORMATS)
    for name in set(FORMATS) - {"reversed", "yes_no"}:
        assert about[name] == about["asked"]
    assert about["yes_no"] == [fact for fact in about["asked"] for _ in range(2)]
    assert len(set(about["asked"])) == number  # of 8 people, and 3 or 4 of each relation
    assert set(about["reversed"]) == {fact.split(".")[0] for fact in about["asked"]} and len(about["reversed"]) == 8
    counts = Counter(fact.split(".")[1] for fact in about["asked"])
    assert len(counts) == len(world.relations) and set(counts.values()) <= {3, 4}
    for pair, choice, statement in zip(asked["pair"], asked["choice"], asked["true_statement"]):
        assert texts(pair) == texts(choice)[:2]
        assert texts(statement)[1].endswith(texts(pair)[1].rsplit("? ", 1)[1] + ".")  # the same false object
    everything, _ = formats(world, WORDS, "qa_id", number=10_000)
    assert len(everything["asked"]) == 8 * 6 and len({texts(item)[0] for item in everything["asked"]}) == 48


@pytest.mark.parametrize("settings", [{}, {"questions": 2, "biographies": 3, "order": "permuted", "subject": "either"}])
def test_wordings_are_others_than_the_world_uses(settings):
    world = tiny_world(**settings)
    asked, _ = formats(world, tokenizer("space"), "qa_id", number=48)
    trained = {example.text for example in questions(world)}
    told = {(mention.fact, mention.wording) for text in biographies(world) for mention in text.mentions}
    patterns = {fact.id: [sentence(p, "", "").split("  ") for p in packaged().statements[fact.relation]]
                for person in world.people for fact in person.facts}  # fmt: skip
    assert {texts(item)[0] for name in ("asked", "choice") for item in asked[name]} <= trained
    assert not {texts(item)[0] for item in asked["wording"]} & trained
    for name in ("wording", "cloze", "true_statement", "yes_no"):
        assert len({item.candidates[0].example.mentions[0].wording for item in asked[name]}) > 6
    for name in ("cloze", "true_statement", "yes_no"):
        for item in asked[name]:
            (mention,) = item.candidates[0].example.mentions
            number = int(mention.wording.rsplit(".", 1)[1])
            words = patterns[mention.fact][number][0].strip(" .")
            assert words in texts(item)[0] and (mention.fact, mention.wording) not in told
    for item in asked["yes_no"]:
        yes, no = sorted(texts(item), reverse=True)
        assert yes.startswith("Is it true that ") and (yes[:-4], yes[-4:], no[-3:]) == (no[:-3], " yes", " no")


def test_wordings_that_are_all_used_are_told():
    asked, absent = formats(tiny_world(questions=3, biographies=60), WORDS, "qa_ood", number=12)
    assert set(asked) == {"asked", "choice", "pair", "reversed"}
    assert "trained in all wordings" in absent["wording"]
    assert all("tell every fact in all wordings" in absent[name] for name in ("cloze", "true_statement", "yes_no"))
    assert len(asked["reversed"]) == 8


def test_names_to_choose_from_are_of_others_of_the_part_who_have_other_facts():
    world = tiny_world(people=24)
    twins = [person for person in world.people if not person.in_distribution][:2]
    copied = tuple(replace(fact, object=own.object) for fact, own in zip(twins[1].facts, twins[0].facts))
    world = World(world.settings, tuple(replace(p, facts=copied) if p is twins[1] else p for p in world.people))
    people = {person.name: person for person in world.people}
    asked, _ = formats(world, WORDS, "qa_ood", number=12, k=10)
    assert len(asked["reversed"]) == 12
    for item in asked["reversed"]:
        prompts, names = zip(*(text.rsplit("? ", 1) for text in texts(item)))
        assert len(set(prompts)) == 1 and len(set(names)) == 10
        said = [f"{part}." for part in prompts[0].split("? ")]
        answers = [
            name for name in names
            if all(any(sentence(p, "Who", fact.object) == part for p in packaged().statements[fact.relation])
                   for part, fact in zip(said, people[name].facts, strict=True))
        ]  # fmt: skip
        assert answers == [names[0]] and people[names[0]].id == item.person
        assert not any(people[name].in_distribution for name in names)
    asked, absent = formats(world, WORDS, "qa_ood", number=12, k=12)
    assert {item.person for item in asked["reversed"]} == {p.id for p in world.people if not p.in_distribution} - {
        twin.id for twin in twins
    }  # who have but 10 others to be told from
    assert "can be told from 12" in formats(world, WORDS, "qa_ood", k=13)[1]["reversed"] and "reversed" not in absent


def test_parts_are_the_people_whose_questions_are_trained_and_the_others():
    world = tiny_world(qa_share=0.25)
    split = {person.id: person.in_distribution for person in world.people}
    for part in PARTS:
        asked, _ = formats(world, WORDS, part, number=100)
        people = {item.person for items in asked.values() for item in items}
        assert {split[person] for person in people} == {part == "qa_id"}
        assert len(people) == {"qa_id": 4, "qa_ood": 12}[part]
    rows = transfer(Toy(WORDS), WORDS, tiny_world(qa_share=1.0), number=2)
    assert all(row["n"] == 0 and "nobody" in row["absent"] for row in of(rows, "qa_ood").values())
    assert of(rows, "qa_id")["asked"]["n"] == 2
    assert len(transfer(Toy(WORDS), WORDS, world, number=2, parts={"held out": "qa_ood"})) == len(FORMATS)


def test_the_same_is_drawn_again_and_something_else_with_another_seed():
    def draw(**options: int) -> dict[str, list[list[str]]]:
        asked, _ = formats(tiny_world(), WORDS, "qa_ood", **options)
        return {name: [texts(item) for item in items] for name, items in asked.items()}

    assert draw(number=24) == draw(number=24)
    some, more, others = draw(number=8), draw(number=24), draw(number=8, seed=1)
    for name in some:
        assert some[name] == more[name][: len(some[name])]
        assert sorted(some[name]) != sorted(others[name])


def test_words_that_the_tokenizer_lacks_are_told_and_an_end_is_no_such_word():
    own = without("Who")
    asked, absent = formats(tiny_world(), own, "qa_ood", number=48)
    assert set(asked) == {"cloze", "true_statement"}
    assert set(absent) == set(FORMATS) - set(asked)  # "Who is the employer of …?" is a question of some
    assert all("Who" in absent[name] for name in ("reversed", "asked", "wording")) and "Is it true" in absent["yes_no"]
    same = copy.deepcopy(tokenizer("space"))
    same.unk_token = same.eos_token
    asked, absent = formats(tiny_world(), same, "qa_ood", number=12)
    assert not absent and set(asked) == set(FORMATS)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"k": 1}, "k is 1; expected from 2"),
        ({"k": 51}, "k is 51; expected from 2 candidates to 50"),
        ({"number": 0}, "number is 0"),
        ({"part": "qa"}, "unknown part 'qa'"),
    ],
)
def test_what_can_not_be_asked(options, told):
    with pytest.raises(UserError, match=told):
        formats(tiny_world(), WORDS, **({"part": "qa_id"} | options))


def test_a_tokenizer_without_offsets_is_refused():
    with pytest.raises(UserError, match="offsets"):
        transfer(Toy(WORDS), SimpleNamespace(is_fast=False), tiny_world())
