"""Whether an answer is right as people judge it: normalized, against any alias, and in part.

The definitions are those of SQuAD's evaluation (Rajpurkar et al., 2016, arXiv 1606.05250): lower letters, no
punctuation, no articles, one blank between words; of several right answers the best counts. Exact match by token
(`evaluation`) is the stricter measure, and stays the headline.
"""

from __future__ import annotations

import itertools
import re
import string
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from crosstrace.core.processes import Processes
from crosstrace.data.tokens import Encoded
from crosstrace.models.loading import pad_id
from crosstrace.models.modes import evaluating
from crosstrace.training.evaluation import TOKENS

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = {ord(letter): None for letter in string.punctuation + "“”‘’„«»–—…。、，？！"}


@dataclass(frozen=True)
class Spoken:
    """What a model says, and how right it is, in the order of the questions.

    Attributes:
        said: [N] the generated answers.
        normalized: [N] whether it is an answer once both are normalized.
        f1: [N] the harmonic mean of the share of its words that the answer has, and of the answer's words that it has.
        contains: [N] whether it has all words of an answer, in a row.
    """

    said: list[str]
    normalized: np.ndarray
    f1: np.ndarray
    contains: np.ndarray

    def summary(self) -> dict[str, float | None]:
        """The mean of each measure; None without questions."""
        measures = {"normalized_match": self.normalized, "f1": self.f1, "contains": self.contains}
        return {name: float(values.mean()) if len(values) else None for name, values in measures.items()}


def normalized(text: str) -> str:
    """A text as SQuAD compares it."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def token_f1(said: str, answer: str) -> float:
    """F1 of the words of a normalized text and of an answer's; 1 if neither has a word."""
    words, right = normalized(said).split(), normalized(answer).split()
    if not words or not right:
        return float(words == right)
    common = (Counter(words) & Counter(right)).total()
    return 2 * common / (len(words) + len(right))


def has_answer(said: str, answer: str) -> bool:
    """Whether a text has the words of an answer, in a row, both normalized. An answer without words is in none."""
    right = normalized(answer)
    return bool(right) and f" {right} " in f" {normalized(said)} "


def judge(said: Sequence[str], answers: Sequence[Sequence[str]]) -> Spoken:
    """How right some texts are.

    Args:
        said: [N].
        answers: [N] the right answers to each, one or more.
    """
    pairs = list(zip(said, answers, strict=True))
    return Spoken(
        list(said),
        np.array(
            [any(normalized(text) == normalized(right) for right in rights) for text, rights in pairs], dtype=bool
        ),
        np.array([max(token_f1(text, right) for right in rights) for text, rights in pairs], dtype=np.float64),
        np.array([any(has_answer(text, right) for right in rights) for text, rights in pairs], dtype=bool),
    )


def speak(
    model: Any, tokenizer: Any, encoded: Sequence[Encoded], length: int, tokens: int, processes: Processes | None = None
) -> Spoken:
    """Have a model answer questions, greedily, and judge what it says.

    What it says ends with its end token, the special token that ends the questions, its first line or its length. The
    right answers are the example's own and its aliases.

    Args:
        encoded: questions; each has one object, at its end.
        length: tokens of an answer at most.
        tokens: that go through the model at once, answers included.
        processes: all that were started, each with the whole model; each asks its share, and all get all results.
    """
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].ids))
    mine = order if processes is None else processes.share(order)

    # A conversation's turn ends with a token of its own, which is no end token of every tokenizer.
    ends = {int(item.ids[-1]) for item in encoded} & {*tokenizer.added_tokens_decoder}

    def ask() -> dict[int, str]:
        return dict(zip(mine, continued(model, tokenizer, [prompt(encoded[i]) for i in mine], length, tokens, ends)))

    shares = [ask()] if processes is None else processes.gathered_from(ask)
    said = {i: text for share in shares for i, text in share.items()}
    answers = []
    for item in encoded:
        start, stop = item.example.mentions[0].object
        answers.append([item.example.text[start:stop], *item.example.aliases])
    return judge([next(iter(said[i].splitlines()), "") for i in range(len(encoded))], answers)


def prompt(item: Encoded) -> list[int]:
    """The tokens before a text's object."""
    return item.ids[: int(item.mentions[0].object.nonzero()[0])].tolist()


def continued(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    length: int,
    tokens: int = TOKENS,
    ends: Collection[int] = (),
) -> list[str]:
    """What a model says after each prompt, greedily, up to its end token, without special tokens or blanks around it.

    Prompts of one length go through the model together, so none is padded.

    Args:
        prompts: their tokens.
        length: tokens that it says at most.
        tokens: that go through the model at once, those that it says included.
        ends: further tokens that end what it says.
    """
    stops = {*ends} | ({tokenizer.eos_token_id} - {None})
    config = GenerationConfig(
        max_new_tokens=length, do_sample=False, pad_token_id=pad_id(tokenizer), eos_token_id=sorted(stops) or None,
        bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, ids in enumerate(prompts):
        by_length[len(ids)].append(number)
    texts = [""] * len(prompts)
    device = next(model.parameters()).device
    with evaluating(model):
        for size, numbers in by_length.items():
            most = max(1, tokens // (size + length))
            for start in range(0, len(numbers), most):
                chosen = numbers[start : start + most]
                ids = torch.tensor([prompts[number] for number in chosen], device=device)
                out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
                for number, row in zip(chosen, out[:, size:].tolist()):
                    said = itertools.takewhile(lambda token: token not in stops, row)
                    texts[number] = tokenizer.decode([*said], skip_special_tokens=True).strip()
    return texts
