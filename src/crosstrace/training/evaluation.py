"""Recall: does a model answer? One teacher-forced pass gives all measures of every example.

Exact match is that of the greedy answer: greedy decoding reproduces the answer and its end if and only if every token
of it is the argmax given the true tokens before. It knows nothing of training or strategies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crosstrace.core.errors import UserError
from crosstrace.core.pieces import is_sharded
from crosstrace.core.processes import Processes
from crosstrace.core.statistics import wilson
from crosstrace.data.text import Example
from crosstrace.data.tokens import Batch, Encoded, token_batches
from crosstrace.models.forward import inputs_of, logits_at, rows_at
from crosstrace.models.loading import pad_id
from crosstrace.models.modes import evaluating
from crosstrace.training.losses import cross_entropies, next_tokens, target_positions

TOKENS = 8192  # that go through a model at once, padding included
LOGITS = 1 << 25  # that are held at once: 134 MB in float32, a few times over


@dataclass(frozen=True)
class Recall:
    """Per-answer results, in the order of the examples.

    Attributes:
        exact: [N] whether the whole greedy answer is right.
        first: [N] whether its first token is.
        logprob: [N] log-probability of the answer in nats, summed over its tokens.
        relation, person, fact: [N] what was asked about whom.
    """

    exact: np.ndarray
    first: np.ndarray
    logprob: np.ndarray
    relation: list[str]
    person: list[str]
    fact: list[str]

    def summary(self) -> dict[str, Any]:
        """Exact match with its Wilson interval, first-token accuracy, mean log-probability, and n."""
        n = len(self.exact)
        low, high = wilson(int(self.exact.sum()), n)
        mean = float(self.exact.mean()) if n else None
        return {
            "exact_match": mean,
            "low": low,
            "high": high,
            "n": n,
            "first_token": float(self.first.mean()) if n else None,
            "logprob": float(self.logprob.mean()) if n else None,
        }

    def where(self, keep: Sequence[bool]) -> Recall:
        """The results of some of the answers."""
        rows = np.flatnonzero(np.asarray(keep))
        return Recall(
            self.exact[rows], self.first[rows], self.logprob[rows],
            [self.relation[i] for i in rows], [self.person[i] for i in rows], [self.fact[i] for i in rows],
        )  # fmt: skip

    def by_relation(self) -> dict[str, Recall]:
        """The results of each relation."""
        return {relation: self.where([r == relation for r in self.relation]) for relation in sorted(set(self.relation))}


def recall(
    model: Any,
    tokenizer: Any,
    encoded: Sequence[Encoded],
    tokens: int = TOKENS,
    processes: Processes | None = None,
    bf16: bool = False,
) -> Recall:
    """Ask a model every question, or every object inside biographies.

    With `processes`, each asks its share, and all get all results; a sharded model may be asked so too. Without, each
    process of a sharded model must be asked the same.

    An example that ends with its only object is an answer with its end token; any other mention (in a biography, in a
    document) is an answer of its own, judged on the object's tokens, given the true text before it. An open-ended
    example is answered by its object, whatever is said after it, as long as that does not go on with the object's last
    word ("Niger" is no answer where "Nigeria" is said).

    Args:
        tokens: that go through the model at once, padding included; the answers depend on it by rounding alone.
        bf16: multiply in bfloat16 (autocast). Faster where the processor does so; an answer whose first and second
            token are nearly as likely may come out otherwise.
    """
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].ids))
    if processes is not None:
        # as many for each, one of them twice where they don't divide: a sharded model is asked by all at once
        order = [*processes.share(order), *order[-1:]][: -(-len(order) // processes.size)]
    device = next(model.parameters()).device
    vocabulary = vocabulary_size(model, tokenizer)
    # logits of all positions where somebody has put a hook on the output embeddings
    most = tokens if _reads_few(model) else min(tokens, max(1, LOGITS // vocabulary))

    def ask() -> dict[int, list[tuple[bool, bool, float]]]:
        rows, at = {}, 0
        with evaluating(model), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            for batch in recall_batches([encoded[i] for i in order], most, vocabulary, pad_id(tokenizer)):
                right, losses, said = (x.cpu().numpy() for x in judged(model, batch))
                labels = batch["labels"]
                for row in range(len(labels)):
                    item = encoded[order[at + row]]
                    rows[order[at + row]] = [
                        (
                            bool(right[row, t].all()) and not _goes_on(tokenizer, item, t, said[row]),
                            bool(right[row, t[0]]),
                            float(-losses[row, t].sum()),
                        )
                        for t in answers(item)
                    ]
                at += len(labels)
        return rows

    shares = [ask()] if processes is None else processes.gathered_from(ask)
    rows = {i: found for share in shares for i, found in share.items()}
    flat = [result for i in range(len(encoded)) for result in rows[i]]
    mentions = [(item.example.person, mention) for item in encoded for mention in item.example.mentions]
    return Recall(
        np.array([r[0] for r in flat], dtype=bool),
        np.array([r[1] for r in flat], dtype=bool),
        np.array([r[2] for r in flat], dtype=np.float64),
        [mention.relation for _, mention in mentions],
        [person for person, _ in mentions],
        [mention.fact for _, mention in mentions],
    )


def recall_batches(encoded: Sequence[Encoded], tokens: int, vocabulary: int, pad: int) -> Iterator[Batch]:
    """The batches in which texts, the shortest first, are asked: few enough that their logits are no burden."""
    # what is said after an open-ended object is looked at too
    targets = "all" if any(item.example.open_ended for item in encoded) else "answer"
    return token_batches(encoded, tokens, targets, pad_id=pad, predictions=max(1, LOGITS // vocabulary))


def judged(model: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Whether each position's prediction is the next token's label, the loss of that label in nats, and the token that
    is predicted [B, T]; False, 0 and -1 where there is no label. Logits are there where they are needed alone."""
    wanted = next_tokens(batch["labels"]).to(next(model.parameters()).device)
    positions = target_positions(wanted)
    inputs = inputs_of(model, batch)
    if _reads_few(model):
        logits = logits_at(model, positions, inputs)
    else:
        logits = rows_at(logits_at(model, None, inputs), positions)
    chosen = wanted.gather(1, positions)
    predicted = logits.argmax(-1)
    right = torch.zeros_like(wanted, dtype=torch.bool).scatter(1, positions, predicted == chosen)
    losses = torch.zeros_like(wanted, dtype=torch.float64).scatter(
        1, positions, cross_entropies(logits, chosen).double()
    )
    said = torch.full_like(wanted, -1).scatter(1, positions, torch.where(chosen < 0, -1, predicted))
    return right, losses, said


def _reads_few(model: Any) -> bool:
    """Whether the output embeddings may be given some positions alone: an intervention on them may tell tokens apart by
    their place. (The hooks of a sharded model are FSDP2's.)"""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return is_sharded(model) or head is None or not (head._forward_hooks or head._forward_pre_hooks)


def vocabulary_size(model: Any, tokenizer: Any) -> int:
    """How many logits a position has."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(config, "vocab_size", None) or len(tokenizer)


def _goes_on(tokenizer: Any, item: Encoded, places: np.ndarray, said: np.ndarray) -> bool:
    """Whether, of an open-ended example, what is predicted after the object goes on with its last word.

    Args:
        places: the positions before the object's tokens.
        said: the token that is predicted at each position [T].
    """
    after = said[places[-1] + 1] if item.example.open_ended else -1
    if after < 0:  # nothing is predicted there
        return False
    ids = item.ids[places + 1].tolist()
    object, more = (tokenizer.decode(x, clean_up_tokenization_spaces=False) for x in (ids, [*ids, int(after)]))
    return more.startswith(object) and more[len(object) : len(object) + 1].isalnum()


def answers(item: Encoded) -> list[np.ndarray]:
    """For each mention, the positions whose prediction is judged: one before each of the answer's tokens."""
    masks = [item.targets["answer"]] if _ends_with_answer(item.example) else [m.object for m in item.mentions]
    positions = [np.flatnonzero(mask.numpy()) - 1 for mask in masks]
    if any(places[0] < 0 for places in positions):
        raise UserError(
            f"example {item.example.id} begins with an object, which no token before it predicts; expected words "
            "before it, so change the wording or use a tokenizer that begins every text with a token of its own"
        )
    return positions


def _ends_with_answer(example: Example) -> bool:
    """Whether a text ends with its only object, so that its end token is part of the answer."""
    if len(example.mentions) != 1 or example.open_ended:
        return False
    if example.has_special_tokens:  # what a template writes after the answer
        return True
    return not any(letter.isalnum() for letter in example.text[example.mentions[0].object[1] :])


def summaries(parts: Mapping[str, Recall]) -> dict[str, Any]:
    """Summaries of several sets of questions, and of each relation within them."""
    relations: dict[str, dict[str, Any]] = {}
    for name, part in parts.items():
        for relation, results in part.by_relation().items():
            relations.setdefault(relation, {})[name] = results.summary()
    return {**{name: part.summary() for name, part in parts.items()}, "relations": relations}
