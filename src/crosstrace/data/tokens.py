"""Examples to tokens: ids, labels and masks. The only module that uses a tokenizer.

Labels come from character offsets: a token belongs to a span if they share a character. So it does not matter whether a
space belongs to a token. It knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crosstrace.core.errors import UserError
from crosstrace.data.text import Example, Span

Batch = dict[str, Tensor]
IGNORE = -100
# the names that configs have for the number of tokens that a model can read
CONTEXT_LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions")


@dataclass(frozen=True)
class Places:
    """The tokens of one fact in a text: masks [T] of its subject, of the words of its relation, and of its object."""

    subject: Tensor
    relation: Tensor
    object: Tensor


@dataclass(frozen=True)
class Encoded:
    """An example's tokens.

    Attributes:
        ids: [T].
        targets: kind -> which tokens are targets of this kind [T].
        mentions: the tokens of each mention.
        group: the number of the person. What needs independent parts of the data keeps a group together.
        context: the tokens of mentions that stand in the text, though it is no longer about them (see `about`).
    """

    example: Example
    ids: Tensor
    targets: dict[str, Tensor]
    mentions: tuple[Places, ...]
    group: int = 0
    context: tuple[Places, ...] = ()

    def about(self, number: int) -> Encoded:
        """What states the fact of one mention: the example up to that mention's object, which is its only target."""
        end = int(self.mentions[number].object.nonzero().max()) + 1
        cut = [Places(p.subject[:end], p.relation[:end], p.object[:end]) for p in (*self.mentions, *self.context)]
        mention = cut.pop(number)
        example = replace(self.example, mentions=(self.example.mentions[number],))
        return Encoded(example, self.ids[:end], {"object": mention.object}, (mention,), self.group, tuple(cut))


def check_fast(tokenizer: Any) -> None:
    """Raise a `UserError` unless the tokenizer tells which characters each token covers."""
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"tokenizer {type(tokenizer).__name__} gives no character offsets, which the labels need; expected a "
            "fast tokenizer (tokenizer.json), so convert it with transformers' AutoTokenizer(use_fast=True)"
        )


def encode(tokenizer: Any, examples: Sequence[Example], groups: Mapping[str, int] | None = None) -> list[Encoded]:
    """Tokenize examples and find their targets.

    The kinds of target (docs/method.md) are

    - `object`: the tokens of the objects;
    - `answer`: the tokens of the objects, and the end token;
    - `all`: every token;
    - `train`: what training predicts, which is the example's own targets and the end token.

    A text that holds its special tokens gets no others; its last token is its end token.

    Args:
        groups: the number of each person; in order of appearance if not given.

    Raises:
        UserError: the tokenizer gives no offsets, or an object has no token.
    """
    check_fast(tokenizer)
    if not examples:
        return []
    numbers = dict(groups or {})
    encoded = []
    for example, (ids, offsets) in zip(examples, _tokenized(tokenizer, examples)):
        has_end = example.has_special_tokens or tokenizer.eos_token_id is not None
        spans = [example.targets]
        for mention in example.mentions:
            spans += [(mention.subject,), mention.relation_words, (mention.object,)]
        trained, *places = _tokens_of(spans, offsets)
        mentions = tuple(Places(*places[i : i + 3]) for i in range(0, len(places), 3))
        objects = torch.zeros(len(ids), dtype=torch.bool)
        for places in mentions:
            objects |= places.object
        ends = torch.zeros(len(ids), dtype=torch.bool)
        ends[-1] = has_end
        for mention, places in zip(example.mentions, mentions):
            if not places.object.any():
                start, stop = mention.object
                raise UserError(
                    f"example {example.id}: no token covers the object {example.text[start:stop]!r} at characters "
                    f"{start} to {stop}; the tokenizer drops these characters or the spans belong to another text"
                )
        answer = objects | ends
        if example.has_special_tokens and example.mentions:  # a template may put a blank between answer and end
            answer |= trained & (torch.arange(len(ids)) > objects.nonzero().max())
        targets = {
            "object": objects,
            "answer": answer,
            "all": torch.ones(len(ids), dtype=torch.bool),
            "train": trained | ends,
        }
        group = numbers.setdefault(example.person, len(numbers))
        encoded.append(Encoded(example, torch.tensor(ids), targets, mentions, group))
    return encoded


def _tokenized(tokenizer: Any, examples: Sequence[Example]) -> list[tuple[list[int], list[Span]]]:
    """The ids of each text with its special tokens, and the characters of each token."""
    tokenized: list[tuple[list[int], list[Span]]] = [([], [])] * len(examples)
    for has_special_tokens in (False, True):
        numbers = [i for i, example in enumerate(examples) if example.has_special_tokens == has_special_tokens]
        if not numbers:
            continue
        options = {"add_special_tokens": False} if has_special_tokens else {}
        # (not verbose: a text that is too long is told by `check_room`)
        rows = tokenizer([examples[i].text for i in numbers], return_offsets_mapping=True, verbose=False, **options)
        for number, ids, offsets in zip(numbers, rows["input_ids"], rows["offset_mapping"]):
            end = tokenizer.eos_token_id
            if not has_special_tokens and end is not None and ids[-1] != end:
                ids, offsets = [*ids, end], [*offsets, (0, 0)]
            tokenized[number] = ids, offsets
    return tokenized


def context_length(config: Any) -> int | None:
    """How many tokens a model can read, by any name that its config has for that; None if there is no limit.

    For a config of several models (of text and pictures, say) it is the text model's. transformers itself follows a
    config's `attribute_map`, by which e.g. GPT-2's `n_positions` is its `max_position_embeddings` too.
    """
    read_text_config = getattr(config, "get_text_config", None)
    for part in (config, read_text_config(decoder=True) if read_text_config else None):
        for name in CONTEXT_LENGTHS:
            length = getattr(part, name, None)
            if isinstance(length, int) and length > 0:  # (some say -1 where there is no limit)
                return length
    return None


def too_long(encoded: Sequence[Encoded], room: int | None) -> list[Encoded]:
    """The examples with more tokens than a model has positions (`room`); none if it has no limit."""
    return [item for item in encoded if room and len(item.ids) > room]


def check_room(encoded: Sequence[Encoded], room: int | None, model: str) -> None:
    """Raise a `UserError` unless every example has at most as many tokens as the model has positions."""
    long = too_long(encoded, room)
    if long:
        longest = max(long, key=lambda item: len(item.ids))
        raise UserError(
            f"{len(long)} of {len(encoded)} examples have more tokens than the {room} positions of {model}, the "
            f"longest, {longest.example.id}, {len(longest.ids)}; shorten them, drop them (`crosstrace import --model` "
            "does), or take a model with more positions"
        )


def _tokens_of(groups: Sequence[Sequence[Span]], offsets: Sequence[tuple[int, int]]) -> Tensor:
    """For each group of spans, which tokens share a character with one of them: bool [groups, tokens].

    Special tokens have empty offsets, so they never do.
    """
    start, end = np.array(offsets).T
    low, high = np.array([span for spans in groups for span in spans]).reshape(-1, 2).T[..., None]
    masks_of_spans = iter((start < high) & (low < end))  # span by span
    masks = np.zeros((len(groups), len(offsets)), dtype=bool)
    for row, spans in zip(masks, groups):
        for _ in spans:
            row |= next(masks_of_spans)
    return torch.from_numpy(masks)


def collate(encoded: Sequence[Encoded], targets: str = "object", *, pad_id: int, side: str = "right") -> Batch:
    """Pad examples into one batch of input_ids, attention_mask and labels [B, T], and group [B].

    Padding on the left adds position_ids, so that every token keeps the position it has alone.
    """
    length = max(len(item.ids) for item in encoded)
    shape = (len(encoded), length)
    ids = torch.full(shape, pad_id)
    mask = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORE)
    for row, item in enumerate(encoded):
        columns = slice(0, len(item.ids)) if side == "right" else slice(length - len(item.ids), length)
        ids[row, columns] = item.ids
        mask[row, columns] = 1
        labels[row, columns] = torch.where(item.targets[targets], item.ids, IGNORE)
    groups = torch.tensor([item.group for item in encoded])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "group": groups}
    if side == "left":
        batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return batch


def batches(
    encoded: Sequence[Encoded], size: int, targets: str = "object", *, pad_id: int, by_length: bool = False
) -> Iterator[Batch]:
    """Batches for a model, each as `collate` makes it.

    Args:
        encoded: the examples, in order.
        size: examples in a batch; the last one may have fewer.
        targets: the kind of target that the labels mark (see `encode`).
        pad_id: the id of the padding token.
        by_length: give the shortest examples first, to save padding.
    """
    items = sorted(encoded, key=lambda item: len(item.ids)) if by_length else list(encoded)
    for start in range(0, len(items), size):
        yield collate(items[start : start + size], targets, pad_id=pad_id)


def token_batches(
    encoded: Sequence[Encoded], tokens: int, targets: str = "object", *, pad_id: int, predictions: int | None = None
) -> Iterator[Batch]:
    """Batches in the given order, each of as many texts as fit, and of at least one.

    Args:
        tokens: tokens of a batch at most, padding included.
        predictions: target tokens of a batch at most, as if each text had as many as the text with the most.
    """
    chosen: list[Encoded] = []
    longest = most = 0
    for item in encoded:
        count = int(item.targets[targets].sum())
        texts = len(chosen) + 1
        too_many = predictions is not None and texts * max(most, count) > predictions
        if chosen and (texts * max(longest, len(item.ids)) > tokens or too_many):
            yield collate(chosen, targets, pad_id=pad_id)
            chosen, longest, most = [], 0, 0
        chosen.append(item)
        longest, most = max(longest, len(item.ids)), max(most, count)
    if chosen:
        yield collate(chosen, targets, pad_id=pad_id)
