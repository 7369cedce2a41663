"""The input-level signature: does a model read a fact off its subject and relation, or off the whole context?

How much of an object's log-probability comes from the tokens of the subject, of the asked relation, of other facts and
of the rest? Two measures say so: the Shapley values of these groups, which share out all of it, and the erasure of one
group after the other. In both, an absent token has the mean embedding at its position. What happens between the
embeddings and the object is not looked at. Formulas: docs/method.md.

Gradients of the embeddings are of no use here: on the way from the mean embedding a deep model's log-probability is so
rough that no sum over points comes near its integral. With five groups every choice of them can be tried.

Takes a model and encoded texts; it knows no strategies, and draws nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from math import factorial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from crosstrace.analyses.consistency import FactPair, by_person, mean_over_people
from crosstrace.core.errors import UserError
from crosstrace.data.tokens import IGNORE, Batch, Encoded, token_batches
from crosstrace.models.modes import evaluating
from crosstrace.training.evaluation import judged
from crosstrace.training.losses import next_tokens

GROUPS = ("subject", "relation", "facts", "object", "rest")
ASKED = ("subject", "relation")  # the tokens of a biography that a question has too
WHOLE = (1 << len(GROUPS)) - 1  # all groups
FORMATS = ("stored", "recalled")
TOKENS = 1024  # that go through the model at once; the fewer, the less padding
Row = dict[str, Any]


def token_groups(item: Encoded) -> Tensor:
    """The number in GROUPS of each token but the last [T - 1].

    subject: all tokens that name the person, in other sentences too; relation: the words of the asked relation; facts:
    relation words and objects of other facts; object: the object's tokens but the last one; rest: all others. A token
    of two groups is of object, subject, relation or facts, the first in that order.

    Raises:
        UserError: the text is about several facts, does not end with the object, or begins with it.
    """
    if len(item.mentions) != 1 or not item.mentions[0].object[-1] or item.mentions[0].object[0]:
        raise UserError(
            f"example {item.example.id} is about {len(item.mentions)} facts, or does not end with its object after "
            "other words; the input-level signature is of texts about one fact, up to its object (Encoded.about)"
        )
    fact = item.mentions[0]
    group = torch.full((len(item.ids),), GROUPS.index("rest"))
    for other in item.context:
        group[other.relation | other.object] = GROUPS.index("facts")
    group[fact.relation] = GROUPS.index("relation")
    for mention in (fact, *item.context):
        group[mention.subject] = GROUPS.index("subject")
    group[fact.object] = GROUPS.index("object")
    return group[:-1]


def embedding_baseline(model: nn.Module, items: Sequence[Encoded], kind: Literal["mean", "zeros"] = "mean") -> Tensor:
    """The embedding of an absent token [width], float64: the mean over all tokens of the texts, or zeros.

    Raises:
        UserError: there is no text, the kind is unknown, or the model does not give its input embeddings.
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
    model: nn.Module, items: Sequence[Encoded], baseline: Tensor, *, pad_id: int, tokens: int = TOKENS
) -> tuple[np.ndarray, np.ndarray]:
    """Each text's object with every choice of groups of its tokens; the tokens of the other groups are at the baseline.

    Args:
        items: texts about one fact each, which end with its object.
        baseline: [width], of `embedding_baseline`.
        tokens: that go through the model at once, padding included; one text at least does.

    Returns:
        logprob [N, 32], the mean log-probability of the object's tokens in nats, and exact [N, 32], 1 if all of them
        are argmax, else 0. Column c has the tokens of GROUPS[g] as they are if bit g of c is set, so the last column is
        of the whole text. If a text has no token of a group, columns that differ in that group alone are the same.

    Raises:
        UserError: tokens is not positive, or a text is none of these.
    """
    if tokens < 1:
        raise UserError(f"tokens is {tokens}; expected at least 1")
    groups = [token_groups(item) for item in items]
    logprob, exact = (np.zeros((len(items), 1 << len(GROUPS))) for _ in range(2))
    with evaluating(model):
        for chosen, batch in _batches(model, items, tokens, pad_id):
            labels = batch["labels"]
            group = torch.full(labels.shape, -1)  # padding, and each text's last token
            for row, i in enumerate(chosen):
                group[row, : len(groups[i])] = groups[i]
            without = sum(1 << g for g in range(len(GROUPS)) if not bool((group == g).any()))
            group, is_target = group.to(labels.device), next_tokens(labels) != IGNORE
            for column in reversed(range(1 << len(GROUPS))):
                if (same := column | without) != column:  # no text of the batch has the group
                    logprob[chosen, column], exact[chosen, column] = logprob[chosen, same], exact[chosen, same]
                    continue
                absent = torch.zeros_like(group, dtype=torch.bool)
                for g in range(len(GROUPS)):
                    absent |= (group == g) & (not column >> g & 1)
                hook = functools.partial(_set_to_baseline, absent, baseline)
                with _embedding(model).register_forward_hook(hook):
                    right, losses, _ = judged(model, batch)
                logprob[chosen, column] = (-losses.sum(1) / is_target.sum(1)).cpu().numpy()
                exact[chosen, column] = (right | ~is_target).all(1).cpu().numpy()
    return logprob, exact


def _set_to_baseline(absent: Tensor, baseline: Tensor, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """An embedding's output, with absent tokens [B, T] at the baseline."""
    return torch.where(absent.unsqueeze(-1), baseline.to(output), output)


def shapley(values: np.ndarray) -> np.ndarray:
    """Each player's share of a game's value (Shapley 1953), exactly.

    It is the mean, over all orders in which the n players may come, of how much the value rises when this one comes.

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
    tokens: int = TOKENS,
    formats: Sequence[str] = FORMATS,
) -> list[Row]:
    """Off which tokens a model reads each fact, in the text that stores it and in the one that recalls it.

    Args:
        baseline: the embedding of an absent token; the mean is over the texts of both formats.
        tokens: as of `coalitions`.
        formats: which of FORMATS are measured.

    Returns:
        for each format a row of each of GROUPS and of "all" tokens: format, group; tokens: their mean number;
        attribution: their mean Shapley value in nats; share: mean over texts of |the group's value| / Σ |the values of
        all groups|; it is over all texts, so the groups add up; erased: mean drop of log-probability in nats with the
        group at the baseline; erased_exact: the share of texts whose object is still the argmax then; both are over the
        texts that have such tokens: facts, people. `<name>_low` and `<name>_high` are 95 % cluster bootstraps over
        people; None where nothing is defined. by_person: each text's share, a list for each person. Rows of "all" also
        have logprob and exact of the whole texts.

    Raises:
        UserError: see `coalitions`.
    """
    start = embedding_baseline(model, [getattr(pair, name) for name in FORMATS for pair in pairs], baseline)
    people = [pair.person for pair in pairs]
    rows = []
    for name in formats:
        items: list[Encoded] = [getattr(pair, name) for pair in pairs]
        numbers = [token_groups(item).numpy() for item in items]
        logprob, exact = coalitions(model, items, start, pad_id=pad_id, tokens=tokens)
        counts = np.array([np.bincount(of_text, minlength=len(GROUPS)) for of_text in numbers])
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
            row |= {"facts": int(has.sum()), "people": len({person for person, one in zip(people, has) if one})}
            row["by_person"] = by_person(share[:, column], people)
            rows.append(row)
        rows[-1] |= {"logprob": float(logprob[:, WHOLE].mean()), "exact": float(exact[:, WHOLE].mean())}
    return rows


def _embedding(model: nn.Module) -> nn.Module:
    """The model's input embeddings."""
    find: Any = getattr(model, "get_input_embeddings", None)
    embedding = find() if find else None
    if embedding is None:
        raise UserError(
            f"{type(model).__name__} tells no input embeddings, which the input-level signature is about; expected a "
            "transformers model with get_input_embeddings"
        )
    return embedding


def _batches(model: nn.Module, items: Sequence[Encoded], tokens: int, pad_id: int) -> Iterator[tuple[list[int], Batch]]:
    """Batches of the texts, shortest first, with their numbers; each of so many tokens at most, or of one text."""
    numbers, device = sorted(range(len(items)), key=lambda i: len(items[i].ids)), _device(model)
    for batch in token_batches([items[i] for i in numbers], tokens, pad_id=pad_id):
        count = len(batch["labels"])
        yield numbers[:count], {name: value.to(device) for name, value in batch.items() if name != "group"}
        numbers = numbers[count:]


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
