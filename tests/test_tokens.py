"""Tokens and labels, for tokenizers whose tokens hold the space and whose tokens do not."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from tiny_facts import tiny_world, tokenizer

from crosstrace.core.errors import UserError
from crosstrace.data import wording
from crosstrace.data.text import Example, Mention, biographies, questions
from crosstrace.data.tokens import IGNORE, batches, collate, context_length, encode

KINDS = ["word", "space", "spaceless", "bos"]


def _squeezed(text: str) -> str:
    return re.sub(r"\s", "", text)


@pytest.mark.parametrize("kind", KINDS)
def test_each_target_decodes_to_its_object(kind: str):
    words = tokenizer(kind)
    world = tiny_world(order="permuted", subject="either", questions=2)
    encoded = encode(words, biographies(world) + questions(world))
    several = 0
    for item in encoded:
        for mention, tokens in zip(item.example.mentions, item.mentions, strict=True):
            wanted = item.example.text[slice(*mention.object)]
            decoded = words.decode(item.ids[tokens.object])
            assert _squeezed(decoded) == _squeezed(wanted)
            if kind in ("space", "bos"):
                assert decoded.lstrip() == wanted
                several += decoded != wanted
            several += int(tokens.object.sum()) > 1
        union = torch.stack([m.object for m in item.mentions]).any(0)
        assert torch.equal(item.targets["object"], union)
        assert union.sum() == sum(int(m.object.sum()) for m in item.mentions)  # objects share no token
    assert several > 50  # spaces inside tokens, or objects of several tokens: the test is not about single words


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_target(kind: str):
    words = tokenizer(kind)
    world = tiny_world()
    for item in encode(words, biographies(world)[:4] + questions(world)[:24]):
        ends = item.ids == words.eos_token_id
        assert ends.nonzero().tolist() == [[len(item.ids) - 1]]  # one end token, the last, however it came there
        assert torch.equal(item.targets["answer"], item.targets["object"] | ends)
        assert item.targets["all"].all()
        if item.example.task == "bio":
            begins = item.ids == words.bos_token_id if kind == "bos" else torch.zeros_like(ends)
            assert torch.equal(item.targets["train"], ~begins)
        else:
            assert torch.equal(item.targets["train"], item.targets["answer"])
            assert 0 < item.targets["train"].sum() < len(item.ids) / 2 + 6
            first = int(item.targets["answer"].nonzero()[0])
            assert item.targets["answer"][first:].all()  # from the object on


def test_a_tokenizer_without_an_end_token_gets_none():
    from transformers import PreTrainedTokenizerFast

    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer("spaceless").backend_tokenizer)
    assert words.eos_token_id is None
    for item in encode(words, questions(tiny_world())[:6]):
        assert torch.equal(item.targets["answer"], item.targets["object"])
        assert len(item.ids) == len(words(item.example.text)["input_ids"])


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(UserError, match="tokenizer Slow gives no character offsets"):
        encode(Slow(), questions(tiny_world())[:1])


def test_an_object_without_a_token_is_refused():
    example = questions(tiny_world())[0]
    mention = example.mentions[0]
    space = example.text.index(" ")
    lost = replace(example, mentions=(replace(mention, object=(space, space + 1)),))
    with pytest.raises(UserError, match=rf"{example.id}: no token covers the object ' ' at characters {space}"):
        encode(tokenizer("word"), [lost])


@pytest.mark.long
def test_the_word_tokenizer_knows_every_word():
    words = tokenizer("word")
    texts = []
    for population in "AB":
        world = tiny_world(
            people=1500, population=population, subject="either", order="permuted", augmented_share=0.5, questions=3
        )
        texts += [example.text for example in biographies(world) + questions(world)]
    texts += [name for part in wording.NAME_PARTS for name in wording.names(part)]
    texts += [value for relation in wording.RELATIONS for value in wording.packaged().objects[relation]]
    used = {token for ids in words(texts)["input_ids"] for token in ids}
    assert words.unk_token_id not in used
    assert len(used) > 0.9 * (len(words) - 3)  # and has few that no text uses
    assert words("zyxw")["input_ids"] == [words.unk_token_id]


def _encoded(*lengths: int):
    """Hand-made examples of `lengths` words; the object is the last one."""
    words = tokenizer("word")
    examples = []
    for n, length in enumerate(lengths):
        text = " ".join([*["Where"] * (length - 1), "Lyon"])
        span = (len(text) - 4, len(text))
        examples.append(Example(str(n), "qa", text, "B0", "id", (span,), (Mention("f", "r", "w", span, (), span),)))
    return words, encode(words, examples)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_by_hand(side: str):
    words, encoded = _encoded(2, 4)
    where, city = (words.convert_tokens_to_ids(word) for word in ("Where", "Lyon"))
    end, pad = words.eos_token_id, words.pad_token_id
    short, long = [where, city, end], [where, where, where, city, end]
    batch = collate(encoded, "object", pad_id=pad, side=side)

    def place(row, fill):
        return [fill] * 2 + row if side == "left" else row + [fill] * 2

    assert batch["input_ids"].tolist() == [place(short, pad), long]
    assert batch["attention_mask"].tolist() == [place([1, 1, 1], 0), [1] * 5]
    assert batch["labels"].tolist() == [place([IGNORE, city, IGNORE], IGNORE), [IGNORE] * 3 + [city, IGNORE]]
    answer = collate(encoded, "answer", pad_id=pad, side=side)["labels"]
    assert answer.tolist() == [place([IGNORE, city, end], IGNORE), [IGNORE] * 3 + [city, end]]
    if side == "left":
        assert batch["position_ids"].tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    else:
        assert "position_ids" not in batch


def test_batches_hold_every_example_once_in_order_or_by_length():
    words, encoded = _encoded(5, 2, 4, 3, 2)

    def lengths(**options):
        return [batch["attention_mask"].sum(1).tolist() for batch in batches(encoded, 2, pad_id=0, **options)]

    assert lengths() == [[6, 3], [5, 4], [3]]
    assert lengths(by_length=True) == [[3, 3], [4, 5], [6]]
    assert words.pad_token_id == 0


def test_no_examples_no_tokens():
    assert encode(tokenizer("word"), []) == []


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        ("gpt2", {"n_positions": 48}, 48), ("gptj", {"n_positions": 48}, 48), ("ctrl", {"n_positions": 48}, 48),
        ("rwkv", {"context_length": 48}, 48), ("mpt", {"max_seq_len": 48}, 48), ("llama", {}, 2048),
        ("llama", {"max_position_embeddings": 48}, 48), ("opt", {"max_position_embeddings": 48}, 48),
        ("gemma3", {"text_config": {"max_position_embeddings": 48}}, 48), ("whisper", {"max_target_positions": 48}, 48),
        ("xlnet", {}, None), ("mamba", {}, None), ("bloom", {}, None),
    ],
)  # fmt: skip
def test_a_context_length_is_known_by_any_of_its_names(kind: str, values: dict, expected: int | None) -> None:
    from transformers import AutoConfig

    assert context_length(AutoConfig.for_model(kind, **values)) == expected


def test_a_config_without_a_context_length_has_no_limit() -> None:
    assert context_length(None) is None and context_length(object()) is None
