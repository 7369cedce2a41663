"""Recall: does a model answer? One teacher-forced pass gives all measures of every example.

Exact match is that of the greedy answer: greedy decoding reproduces the answer and its end if and only if every token
of it is the argmax given the true tokens before. It knows nothing of training or strategies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from crosstrace.errors import UserError
from crosstrace.forward import forward
from crosstrace.losses import token_losses
from crosstrace.models import evaluating, pad_id
from crosstrace.processes import Processes
from crosstrace.stats import wilson
from crosstrace.tokens import Encoded, batches


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
    batch_size: int = 256,
    processes: Processes | None = None,
) -> Recall:
    """Ask a model every question, or every object inside biographies.

    With `processes`, each asks its share, and all get all results; a sharded model may be asked so too. Without, each
    process of a sharded model must be asked the same.

    An example with one mention is an answer with its end token; each mention of an example with several (a
    biography) is an answer of its own, judged on the object's tokens, given the true text before it.
    """
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].ids))
    if processes is not None:
        # as many for each, one of them twice where they don't divide: a sharded model is asked by all at once
        order = [*processes.share(order), *order[-1:]][: -(-len(order) // processes.size)]
    device = next(model.parameters()).device

    def ask() -> dict[int, list[tuple[bool, bool, float]]]:
        rows, at = {}, 0
        with evaluating(model):
            for batch in batches([encoded[i] for i in order], batch_size, "answer", pad_id=pad_id(tokenizer)):
                batch = {name: tensor.to(device) for name, tensor in batch.items()}
                labels = batch["labels"]
                logits = forward(model, batch).logits
                losses, _ = token_losses(logits, labels)
                right = (logits[:, :-1].argmax(-1) == labels[:, 1:]).cpu().numpy()
                losses = losses.double().cpu().numpy()
                for row in range(len(labels)):
                    rows[order[at + row]] = [
                        (bool(right[row, t].all()), bool(right[row, t[0]]), float(-losses[row, t].sum()))
                        for t in answers(encoded[order[at + row]])
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


def answers(item: Encoded) -> list[np.ndarray]:
    """For each mention, the positions whose prediction is judged: one before each of the answer's tokens."""
    masks = [item.targets["answer"]] if len(item.example.mentions) == 1 else [m.object for m in item.mentions]
    positions = [np.flatnonzero(mask.numpy()) - 1 for mask in masks]
    if any(places[0] < 0 for places in positions):
        raise UserError(
            f"example {item.example.id} begins with an object, which no token before it predicts; expected words "
            "before it, so change the wording or use a tokenizer that begins every text with a token of its own"
        )
    return positions


def summaries(parts: Mapping[str, Recall]) -> dict[str, Any]:
    """Summaries of several sets of questions, and of each relation within them."""
    relations: dict[str, dict[str, Any]] = {}
    for name, part in parts.items():
        for relation, results in part.by_relation().items():
            relations.setdefault(relation, {})[name] = results.summary()
    return {**{name: part.summary() for name, part in parts.items()}, "relations": relations}
