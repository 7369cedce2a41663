"""Texts and questions in the forms in which trainers take them, and how well a model knows each of them.

It reads rows and asks a model. It does not know when it is asked, or by whom.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crosstrace.core.errors import UserError
from crosstrace.data.chat import ANSWER
from crosstrace.data.columns import NAMES, answers_of
from crosstrace.data.text import Example, Mention
from crosstrace.data.tokens import IGNORE, Encoded, Places, encode, token_batches
from crosstrace.models.loading import pad_id
from crosstrace.models.modes import evaluating
from crosstrace.training.evaluation import LOGITS, TOKENS, judged, recall, vocabulary_size

Row = str | Mapping[str, Any] | Example
FORMS = (
    "a text, a mapping with `text`, with `prompt` and `completion`, with `question` and `answer`, with `messages` or "
    "with `input_ids`, or an Example"
)


@dataclass(frozen=True)
class Watched:
    """Some texts or questions that a model is asked again and again.

    Attributes:
        name: of the part, such as `stored`.
        items: its examples. Those that mention an object are questions; the others are texts.
    """

    name: str
    items: list[Encoded]

    def scores(self, model: Any, tokenizer: Any, bf16: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """How well the model knows each item: (right [N], log-probability [N] in nats).

        An answer is right (1) if the model's greedy answer has all of its tokens, else it is not (0). Of a text, it is
        the share of its tokens that are the most likely ones after the tokens before them. The log-probability is that
        of an answer, or the mean over a text's tokens.
        """
        questions = [item for item in self.items if item.example.mentions]
        texts = [item for item in self.items if not item.example.mentions]
        answered = recall(model, tokenizer, questions, bf16=bf16)
        right, logprob = _text_scores(model, tokenizer, texts, bf16)
        return np.concatenate([answered.exact, right]), np.concatenate([answered.logprob, logprob])


def read_rows(name: str, rows: Iterable[Row], tokenizer: Any, room: int | None = None) -> list[Encoded]:
    """Rows of a data set as examples.

    A question is one with an answer to it; the answer is right whatever is said after it, so no end token is needed. A
    prompt is put before its completion as it is; between a question and its answer goes a blank, if there is none.

    Args:
        name: of these rows, for errors.
        room: tokens that the model can read; a longer text is cut.

    Raises:
        UserError: a row has another form, nothing to predict, or is a question with more tokens than that.
    """
    read: list[Example | Encoded] = []
    for number, row in enumerate(rows):
        where = f"{name}, row {number}"
        if isinstance(row, Example):
            read.append(row)
        elif isinstance(row, str):
            read.append(_text(where, row))
        elif isinstance(row, Mapping) and row.get("input_ids") is not None:
            read.append(_tokenized(where, row))
        elif isinstance(row, Mapping):
            read.append(_example(where, row, tokenizer))
        else:
            raise UserError(f"{where} is a {type(row).__name__}; expected {FORMS}")
    encoded = iter(encode(tokenizer, [item for item in read if isinstance(item, Example)]))
    return [_fitting(item if isinstance(item, Encoded) else next(encoded), room) for item in read]


def _fitting(item: Encoded, room: int | None) -> Encoded:
    """The item, cut to what the model can read if it is a text."""
    where = item.example.id
    if len(item.ids) < 2:
        raise UserError(f"{where} has {len(item.ids)} token; expected two or more, since nothing predicts the first")
    if room is None or len(item.ids) <= room:
        return item
    if item.example.mentions:
        raise UserError(
            f"{where} has {len(item.ids)} tokens, but the training reads {room}; expected a shorter question"
        )
    return replace(item, ids=item.ids[:room], targets={name: mask[:room] for name, mask in item.targets.items()})


def _example(where: str, row: Mapping[str, Any], tokenizer: Any) -> Example:
    """A row of texts as an example."""
    question, answer = (
        next((key for key in NAMES[what] if row.get(key) is not None), None) for what in ("question", "answer")
    )
    if row.get("messages"):
        return _conversation(where, list(row["messages"]), tokenizer)
    if question and answer and _are_messages(row[question]) and _are_messages(row[answer]):
        return _conversation(where, [*row[question], *row[answer]], tokenizer)
    if question and answer:
        before, after = _words(where, question, row[question]), _words(where, answer, row[answer])
        if str(row.get("input") or "").strip():  # of Alpaca's rows
            before = f"{before}\n{row['input']}"
        is_joined = question == "prompt" or before[-1:].isspace() or after[:1].isspace()
        return _question(where, before + ("" if is_joined else " "), after)
    if isinstance(row.get("text"), str):
        return _text(where, row["text"])
    raise UserError(f"{where} has the keys {', '.join(map(str, row)) or 'none'}; expected {FORMS}")


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _words(where: str, key: str, value: Any) -> str:
    """A question or an answer as text; the first one of several answers."""
    if isinstance(value, Mapping):  # as TriviaQA and SQuAD have answers
        value = value.get("value", value.get("text"))
    listed = [str(each) if _is_number(each) else each for each in (value if isinstance(value, list) else [value])]
    answers = answers_of(listed if isinstance(value, list) else listed[0])
    if not answers:
        raise UserError(f"{where}: {key} is {str(value)[:60]!r}; expected a text, a number, or a list of answers")
    return answers[0]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _text(where: str, text: str) -> Example:
    """A text, all of whose tokens are to be known."""
    if not text.strip():
        raise UserError(f"{where} is an empty text; expected words")
    return Example(where, "text", text, where, "id", ((0, len(text)),), ())


def _question(where: str, before: str, after: str, *, has_special_tokens: bool = False, rest: str = "") -> Example:
    """A question and its answer."""
    answer = after.strip()
    if not answer:
        raise UserError(f"{where} has an empty answer; expected words")
    start = len(before) + after.index(answer)
    span = (start, start + len(answer))
    mention = Mention(where, "", "question", (0, 0), (), span)
    return Example(
        where,
        "question",
        before + after + rest,
        where,
        "id",
        (span,),
        (mention,),
        has_special_tokens=has_special_tokens,
        open_ended=True,
    )


def _conversation(where: str, messages: list[Any], tokenizer: Any) -> Example:
    """A conversation, as the tokenizer's chat template writes it; its last message is the answer.

    Where the template puts the answer is seen by another answer in its place: the answer's letters may be anywhere.
    """
    last = messages[-1] if messages else None
    if not isinstance(last, Mapping) or last.get("role") != "assistant" or not isinstance(last.get("content"), str):
        raise UserError(f"{where} is no conversation that ends with the assistant's text; expected role and content")
    answer = last["content"].strip()
    try:
        text, marked = (
            tokenizer.apply_chat_template([*messages[:-1], {**last, "content": content}], tokenize=False)
            for content in (answer, ANSWER)
        )
    except Exception as error:  # a template is other people's code, and may raise anything
        raise UserError(f"{where}: the chat template of the tokenizer refuses it ({str(error)[:120]})") from None
    before, found, after = marked.partition(ANSWER)
    if not answer or not found or text != before + answer + after:
        raise UserError(f"{where}: the chat template does not write the answer as it is, or it is empty")
    return _question(where, before, answer, has_special_tokens=True, rest=after)


def _tokenized(where: str, row: Mapping[str, Any]) -> Encoded:
    """A row of tokens. Its labels, or the mask of a completion or assistant, mark the answer; a text is all marked.

    Padding, which the attention mask leaves out or which no label marks at the end, is dropped.
    """
    ids = torch.as_tensor(row["input_ids"]).flatten()
    marked = _marked(row)
    attended = torch.as_tensor(row["attention_mask"]).flatten().bool() if _has(row, "attention_mask") else None
    for other in (marked, attended):
        if other is not None and other.shape != ids.shape:
            raise UserError(f"{where} has {len(ids)} tokens and {len(other)} labels or marks; expected as many")
    if _is_packed(row):
        raise UserError(f"{where} holds several texts in one row (packing); expected rows from before they are packed")
    kept = torch.ones_like(ids, dtype=torch.bool) if attended is None else attended
    if marked is not None and marked.any():
        kept &= torch.arange(len(ids)) <= int(marked.nonzero().max())
    ids, marked = ids[kept], None if marked is None else marked[kept].clone()
    if marked is not None:
        marked[:1] = False  # no token before it predicts it
    targets = {name: torch.ones_like(ids, dtype=torch.bool) for name in ("answer", "all")}
    if marked is None or bool(marked[1:].all()):
        return Encoded(Example(where, "text", "", where, "id", (), ()), ids, targets, ())
    if not marked.any():
        raise UserError(f"{where} has no label; expected tokens to predict")
    nothing = torch.zeros_like(marked)
    mention = Mention(where, "", "question", (0, 0), (), (0, 0))
    example = Example(where, "question", "", where, "id", (), (mention,), open_ended=True)
    return Encoded(example, ids, targets | {"answer": marked}, (Places(nothing, nothing, marked),))


def _has(row: Mapping[str, Any], key: str) -> bool:
    return row.get(key) is not None


def _is_packed(row: Mapping[str, Any]) -> bool:
    """Whether a row holds several texts, by the columns that trainers give such rows."""
    lengths = row.get("seq_lengths")
    positions = torch.as_tensor(row["position_ids"]).flatten() if _has(row, "position_ids") else torch.arange(0)
    return (lengths is not None and len(lengths) > 1) or bool((positions[1:] < positions[:-1]).any())


def _marked(row: Mapping[str, Any]) -> Tensor | None:
    """Which tokens of a row are to be predicted; None if it does not say."""
    if _has(row, "labels"):
        return torch.as_tensor(row["labels"]).flatten() != IGNORE
    masks = [row[key] for key in ("completion_mask", "assistant_masks") if _has(row, key)]
    return torch.as_tensor(masks[0]).flatten().bool() if masks else None


def _text_scores(model: Any, tokenizer: Any, texts: Sequence[Encoded], bf16: bool) -> tuple[np.ndarray, np.ndarray]:
    """For each text, the share of its tokens that are predicted, and their mean log-probability."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i].ids))
    right, logprob = np.zeros(len(texts)), np.zeros(len(texts))
    most = max(1, LOGITS // vocabulary_size(model, tokenizer))
    device = next(model.parameters()).device
    at = 0
    with evaluating(model), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for batch in token_batches(
            [texts[i] for i in order], TOKENS, "all", pad_id=pad_id(tokenizer), predictions=most
        ):
            is_right, losses, _ = (x.cpu().numpy() for x in judged(model, batch))
            counts = (batch["attention_mask"].sum(1) - 1).numpy()
            rows = order[at : at + len(counts)]
            right[rows] = is_right.sum(1) / counts
            logprob[rows] = -losses.sum(1) / counts
            at += len(counts)
    return right, logprob
