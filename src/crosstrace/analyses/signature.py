"""The input-level signature: does a model read a fact off its subject and relation, or off the whole context?

How much of the log-probability of an object comes from the tokens of the subject, of the asked relation, of other facts
and of the rest: by the Shapley values of these groups, which share out all of it, and by erasing one group after the
other. In both, a token that is not there has the mean embedding, at its own position. What goes on between the
embeddings and the object is not looked at. Formulas: docs/method.md.

Gradients of the embeddings tell nothing here: on the way from the mean embedding a deep model's log-probability is so
rough that no sum over points of it comes near its integral. With five groups every choice of them can be tried.

Takes a model and encoded texts; it knows no strategies, and draws nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import factorial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from crosstrace.analyses.consistency import FactPair, by_person, mean_over_people
from crosstrace.core.errors import UserError
from crosstrace.data.tokens import IGNORE, Batch, Encoded, collate
from crosstrace.models.modes import evaluating
from crosstrace.training.evaluation import judged
from crosstrace.training.losses import next_tokens

GROUPS = ("subject", "relation", "facts", "object", "rest")
ASKED = ("subject", "relation")  # the tokens of a biography that a question has too
WHOLE = (1 << len(GROUPS)) - 1  # all groups
FORMATS = ("stored", "recalled")
Row = dict[str, Any]


def token_groups(item: Encoded) -> Tensor:
    """The number in GROUPS of each token but the last [T - 1].

    subject: all tokens that name the person, in other sentences too; relation: the words of the asked relation; facts:
    relation words and objects of other facts; object: the earlier tokens of an object of several; rest: all others. A
    token of two groups is of object, subject, relation or facts, the first in that order.

    Raises:
        UserError: the text is about several facts, does not end with the object, or begins with it.
    """
    if len(item.mentions) != 1 or not item.mentions[0].object[-1] or item.mentions[0].object[0]:
        raise UserError(
            f"example {item.example.id} is about {len(item.mentions)} facts, or does not end with its object after "
            "other words; the input-level signature is of texts about one fact, up to its object (Encoded.about)"
        )
    own = item.mentions[0]
    group = torch.full((len(item.ids),), GROUPS.index("rest"))
    for other in item.context:
        group[other.relation | other.object] = GROUPS.index("facts")
    group[own.relation] = GROUPS.index("relation")
    for mention in (own, *item.context):
        group[mention.subject] = GROUPS.index("subject")
    group[own.object] = GROUPS.index("object")
    return group[:-1]


def embedding_baseline(model: nn.Module, items: Sequence[Encoded], kind: Literal["mean", "zeros"] = "mean") -> Tensor:
    """What takes a token's place [width], float64: the mean embedding of all tokens of the texts, or zeros.

    Raises:
        UserError: there is no text, the kind is unknown, or the model tells no input embeddings.
    """
    if kind not in ("mean", "zeros"):
        raise UserError(f"unknown baseline {kind!r} of embeddings; expected mean or zeros")
    if not items:
        raise UserError("the mean embedding needs at least one text")
    ids, counts = torch.cat([item.ids for item in items]).unique(return_counts=True)
    with evaluating(model):
        vectors = _embedding(model)(ids.to(_device(model))).double()
    mean = counts.to(vectors) @ vectors / counts.sum()
    return mean if kind == "mean" else torch.zeros_like(mean)


def coalitions(
    model: nn.Module, items: Sequence[Encoded], baseline: Tensor, *, pad_id: int, batch_size: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """What is left of a text's object with every choice of groups of its tokens, those of the others at the baseline.

    Args:
        items: texts about one fact each, which end with its object.
        baseline: [width], of `embedding_baseline`.
        batch_size: texts that go through the model at once.

    Returns:
        logprob [N, 32], mean log-probability of the object's tokens in nats, and exact [N, 32], 1 where all of them are
        argmax and else 0. Column c has the tokens of GROUPS[g] as they are if bit g of c is set, so the last one is the
        text as it is. Where a text has no token of a group, columns that differ in it alone are the same.

    Raises:
        UserError: batch_size is not positive, or a text is none of these.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; expected at least 1")
    groups = [token_groups(item) for item in items]
    logprob, exact = (np.zeros((len(items), 1 << len(GROUPS))) for _ in range(2))
    with evaluating(model):
        for chosen, batch in _batches(model, items, batch_size, pad_id):
            labels = batch["labels"]
            group = torch.full(labels.shape, -1)  # padding, and each text's last token
            for row, i in enumerate(chosen):
                group[row, : len(groups[i])] = groups[i]
            absent = sum(1 << g for g in range(len(GROUPS)) if not bool((group == g).any()))
            group, wanted = group.to(labels.device), next_tokens(labels) != IGNORE
            for column in reversed(range(1 << len(GROUPS))):
                if (same := column | absent) != column:  # no text of the batch has the group
                    logprob[chosen, column], exact[chosen, column] = logprob[chosen, same], exact[chosen, same]
                    continue
                gone = torch.zeros_like(group, dtype=torch.bool)
                for g in range(len(GROUPS)):
                    gone |= (group == g) & (not column >> g & 1)
                put: Callable[..., Tensor] = lambda module, args, output, gone=gone: torch.where(
                    gone.unsqueeze(-1), baseline.to(output), output
                )
                with _embedding(model).register_forward_hook(put):
                    right, losses, _ = judged(model, batch)
                logprob[chosen, column] = (-losses.sum(1) / wanted.sum(1)).cpu().numpy()
                exact[chosen, column] = (right | ~wanted).all(1).cpu().numpy()
    return logprob, exact


def shapley(values: np.ndarray) -> np.ndarray:
    """Each player's share of a game's value (Shapley 1953), exactly: over all orders in which n players may come, the
    mean of what the value rises by when this one comes.

    Args:
        values: [N, 2^n], of N games; column c is the value of the players whose bits are set in c.

    Returns:
        [N, n]; a game's shares sum to the value of all players minus that of none.
    """
    players = (values.shape[1] - 1).bit_length()
    shares = np.zeros((len(values), players))
    for player in range(players):
        for others in (c for c in range(1 << players) if not c >> player & 1):
            orders = factorial(others.bit_count()) * factorial(players - 1 - others.bit_count()) / factorial(players)
            shares[:, player] += orders * (values[:, others | 1 << player] - values[:, others])
    return shares


def input_signature(
    model: nn.Module,
    pairs: Sequence[FactPair],
    *,
    pad_id: int,
    baseline: Literal["mean", "zeros"] = "mean",
    batch_size: int = 64,
    formats: Sequence[str] = FORMATS,
) -> list[Row]:
    """Off which tokens a model reads the facts, in the text that stores each and in the one that recalls it.

    Args:
        baseline: what an absent token's embedding is; the mean is over the texts of both formats.
        batch_size: as of `coalitions`.
        formats: which of FORMATS are measured.

    Returns:
        for each format a row of each of GROUPS and of "all" tokens: format, group; tokens: their mean number;
        attribution: their mean Shapley value in nats; share: mean over texts of |the group's value| / Σ |the values of
        all groups|, over all texts, so that groups add up; erased: mean drop of log-probability in nats with the group
        at the baseline, and erased_exact: the share of texts whose object is still the argmax, over those texts which
        have such tokens: facts, people. With `<name>_low` and `<name>_high`, 95 % cluster bootstraps over people; None
        where nothing is defined. by_person: each text's share, a list for each person. Rows of "all" also have logprob
        and exact of the texts as they are.

    Raises:
        UserError: see `coalitions`.
    """
    start = embedding_baseline(model, [getattr(pair, name) for name in FORMATS for pair in pairs], baseline)
    people = [pair.person for pair in pairs]
    rows = []
    for name in formats:
        items: list[Encoded] = [getattr(pair, name) for pair in pairs]
        numbers = [token_groups(item).numpy() for item in items]
        logprob, exact = coalitions(model, items, start, pad_id=pad_id, batch_size=batch_size)
        counts = np.array([np.bincount(own, minlength=len(GROUPS)) for own in numbers])
        sums = shapley(logprob)
        size = np.abs(sums).sum(1, keepdims=True)
        share = np.divide(np.abs(sums), size, out=np.full_like(sums, np.nan), where=size > 0)
        counts, sums, share = (np.column_stack([x, x.sum(1)]) for x in (counts, sums, share))
        for column, group in enumerate((*GROUPS, "all")):
            erased = WHOLE ^ 1 << column if group != "all" else 0
            row: Row = {"format": name, "group": group, "tokens": float(counts[:, column].mean())}
            row |= mean_over_people("attribution", sums[:, column], people)
            row |= mean_over_people("share", share[:, column], people)
            has = counts[:, column] > 0
            row |= mean_over_people("erased", np.where(has, logprob[:, WHOLE] - logprob[:, erased], np.nan), people)
            row |= mean_over_people("erased_exact", np.where(has, exact[:, erased], np.nan), people)
            row |= {"facts": int(has.sum()), "people": len({who for who, own in zip(people, has) if own})}
            row["by_person"] = by_person(share[:, column], people)
            rows.append(row)
        rows[-1] |= {"logprob": float(logprob[:, WHOLE].mean()), "exact": float(exact[:, WHOLE].mean())}
    return rows


def _embedding(model: nn.Module) -> nn.Module:
    find: Any = getattr(model, "get_input_embeddings", None)
    own = find() if find else None
    if own is None:
        raise UserError(
            f"{type(model).__name__} tells no input embeddings, which the input-level signature is about; expected a "
            "transformers model with get_input_embeddings"
        )
    return own


def _batches(model: nn.Module, items: Sequence[Encoded], size: int, pad_id: int) -> Iterator[tuple[list[int], Batch]]:
    """Batches of the texts, shortest first, with their numbers."""
    order = sorted(range(len(items)), key=lambda i: len(items[i].ids))
    device = _device(model)
    for at in range(0, len(order), size):
        numbers = order[at : at + size]
        batch = collate([items[i] for i in numbers], pad_id=pad_id)
        yield numbers, {name: value.to(device) for name, value in batch.items() if name != "group"}


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
