"""Texts and questions in the forms in which trainers take them, and how well a model knows each of them.

It reads rows and asks a model. It does not know when it is asked, or by whom.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crosstrace.core.errors import UserError
from crosstrace.data.text import Example, Mention
from crosstrace.data.tokens import IGNORE, Encoded, Places, encode, token_batches
from crosstrace.models.loading import pad_id
from crosstrace.models.modes import evaluating
from crosstrace.training.evaluation import LOGITS, TOKENS, judged, recall

Row = str | Mapping[str, Any] | Example
QUESTIONS = ("prompt", "question", "instruction", "query")  # the names that data sets have for them
ANSWERS = ("completion", "answer", "response", "output")
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


def read_rows(name: str, rows: Iterable[Row], tokenizer: Any) -> list[Encoded]:
    """Rows of a data set as examples.

    A question is one with an answer to it; the answer is right whatever is said after it, so no end token is needed. A
    prompt is put before its completion as it is; between a question and its answer goes a blank, if there is none.

    Args:
        name: of these rows, for errors.

    Raises:
        UserError: a row has another form, or nothing to predict.
    """
    found: list[Example | Encoded] = []
    for number, row in enumerate(rows):
        where = f"{name}, row {number}"
        if isinstance(row, Example):
            found.append(row)
        elif isinstance(row, str):
            found.append(_text(where, row))
        elif isinstance(row, Mapping) and row.get("input_ids") is not None:
            found.append(_tokenized(where, row))
        elif isinstance(row, Mapping):
            found.append(_example(where, row, tokenizer))
        else:
            raise UserError(f"{where} is a {type(row).__name__}; expected {FORMS}")
    encoded = iter(encode(tokenizer, [item for item in found if isinstance(item, Example)]))
    items = [item if isinstance(item, Encoded) else next(encoded) for item in found]
    short = next((item for item in items if len(item.ids) < 2), None)
    if short is not None:
        raise UserError(f"{short.example.id} has {len(short.ids)} token; expected two or more, the first predicts none")
    return items


def _example(where: str, row: Mapping[str, Any], tokenizer: Any) -> Example:
    """A row of texts as an example."""
    prompt = next((key for key in QUESTIONS if row.get(key) is not None), None)
    answer = next((key for key in ANSWERS if row.get(key) is not None), None)
    if row.get("messages"):
        return _conversation(where, list(row["messages"]), tokenizer)
    if prompt and answer and not isinstance(row[prompt], str):
        return _conversation(where, [*row[prompt], *row[answer]], tokenizer)
    if prompt and answer:
        before, after = str(row[prompt]), row[answer]
        after = str(after[0] if isinstance(after, list) and after else after)
        joined = prompt == "prompt" or before[-1:].isspace() or after[:1].isspace()
        return _question(where, before + ("" if joined else " "), after)
    if isinstance(row.get("text"), str):
        return _text(where, row["text"])
    raise UserError(f"{where} has the keys {', '.join(map(str, row)) or 'none'}; expected {FORMS}")


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
    mention = Mention(where, "", name := "question", (0, 0), (), span)
    text = before + after + rest
    return Example(
        where, name, text, where, "id", (span,), (mention,), has_special_tokens=has_special_tokens, open_ended=True
    )


def _conversation(where: str, messages: list[Any], tokenizer: Any) -> Example:
    """A conversation, as the tokenizer's chat template writes it; its last message is the answer."""
    last = messages[-1] if messages else None
    if not isinstance(last, Mapping) or last.get("role") != "assistant" or not isinstance(last.get("content"), str):
        raise UserError(f"{where} is no conversation that ends with the assistant's text; expected role and content")
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # a template is other people's code, and may raise anything
        raise UserError(f"{where}: the chat template of the tokenizer refuses it ({str(error)[:120]})") from None
    answer = last["content"].strip()
    start = text.rfind(answer) if answer else -1
    if start < 0:
        raise UserError(f"{where}: the chat template does not write the answer as it is, or it is empty")
    return _question(where, text[:start], answer, has_special_tokens=True, rest=text[start + len(answer) :])


def _tokenized(where: str, row: Mapping[str, Any]) -> Encoded:
    """A row of tokens. Its labels, or the mask of a completion or assistant, mark the answer; a text is all marked."""
    ids = torch.as_tensor(row["input_ids"]).flatten()
    marked = _marked(row)
    if marked is not None and marked.shape != ids.shape:
        raise UserError(f"{where} has {len(ids)} tokens and {len(marked)} labels or marks; expected as many")
    if marked is not None:
        marked[:1] = False  # no token before it predicts it
    targets = {name: torch.ones_like(ids, dtype=torch.bool) for name in ("answer", "all")}
    if marked is None or bool(marked[1:].all()):
        return Encoded(Example(where, "text", "", where, "id", (), ()), ids, targets, ())
    if not marked.any():
        raise UserError(f"{where} has no label; expected tokens to predict")
    nothing = torch.zeros_like(marked)
    example = Example(
        where, "question", "", where, "id", (), (Mention(where, "", "question", (0, 0), (), (0, 0)),), open_ended=True
    )
    return Encoded(example, ids, targets | {"answer": marked}, (Places(nothing, nothing, marked),))


def _marked(row: Mapping[str, Any]) -> Tensor | None:
    """Which tokens of a row are to be predicted; None if it does not say."""
    if row.get("labels") is not None:
        return torch.as_tensor(row["labels"]).flatten() != IGNORE
    masks = [row[key] for key in ("completion_mask", "assistant_masks") if row.get(key) is not None]
    return torch.as_tensor(masks[0]).flatten().bool() if masks else None


def _text_scores(model: Any, tokenizer: Any, texts: Sequence[Encoded], bf16: bool) -> tuple[np.ndarray, np.ndarray]:
    """For each text, the share of its tokens that are predicted, and their mean log-probability."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i].ids))
    right, logprob = np.zeros(len(texts)), np.zeros(len(texts))
    config = model.config.get_text_config()
    most = max(1, LOGITS // config.vocab_size)
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
