"""Small worlds, and tokenizers of every manner trained on the spot, without network."""

from __future__ import annotations

import functools
import string
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from crosstrace.data.facts import FactSettings, World
from crosstrace.data.text import biographies, questions
from crosstrace.data.tokens import Encoded, encode
from crosstrace.training.pretraining import word_tokenizer


def tiny_world(**settings) -> World:
    return World.draw(FactSettings(**({"people": 16} | settings)))


def tiny_examples(tokenizer: Any, **settings) -> dict[str, list[Encoded]]:
    """What is trained: every biography, and the questions of the people in distribution."""
    world = tiny_world(**settings)
    return {
        "bio": encode(tokenizer, biographies(world)),
        "qa": encode(tokenizer, [q for q in questions(world) if q.split == "id"]),
    }


@functools.cache
def tokenizer(kind: str) -> Any:
    """`word`; `space` (byte-level BPE, " Lyon"); `spaceless` (BPE, no token holds a space); `bos` (as `space`,
    with a begin and an end token that it adds itself)."""
    if kind == "word":
        return word_tokenizer()
    inner = Tokenizer(models.BPE(unk_token=None))
    specials = ["<s>", "</s>"]
    if kind == "spaceless":
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=specials,
            show_progress=False,
            initial_alphabet=list(string.printable),
        )
    else:
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=specials,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
    world = tiny_world(people=60, seed=5)
    inner.train_from_iterator([example.text for example in biographies(world) + questions(world)], trainer)
    if kind == "bos":
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
        return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
