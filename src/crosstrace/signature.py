"""The input-level signature: does a model read a fact off its subject and relation, or off the whole context?

How much of the log-probability of an object comes from the tokens of the subject, of the asked relation, of other facts
and of the rest: by integrated gradients on the embeddings (Captum), which share out all of it, and by erasing one group
of tokens after the other. In both, a token that is not there has the mean embedding, at its own position. What goes on
between the embeddings and the object is not looked at. Formulas: docs/method.md.

Takes a model and encoded texts; it knows no strategies, and draws nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from crosstrace.circuit import COMPLETE
from crosstrace.consistency import FactPair, by_person, mean_over_people
from crosstrace.errors import UserError
from crosstrace.forward import forward
from crosstrace.losses import example_losses
from crosstrace.models import differentiating, evaluating
from crosstrace.tokens import IGNORE, Batch, Encoded, collate

GROUPS = ("subject", "relation", "facts", "object", "rest")
ASKED = ("subject", "relation")  # the tokens of a biography that a question has too
ERASED = ("none", *GROUPS, "all")
FORMATS = ("stored", "recalled")
MOST = 256  # points of the quadrature
Row = dict[str, Any]


@dataclass(frozen=True)
class Attribution:
    """What each token carries of log-probability of its text's object, in nats.

    Attributes:
        tokens: per text [T - 1], the last token left out: nothing is predicted from it.
        drop: [N] what the text loses with all its tokens at the baseline: what they should sum to.
        steps: [N] points of the quadrature that it took.
    """

    tokens: list[Tensor]
    drop: np.ndarray
    steps: np.ndarray

    @property
    def complete(self) -> np.ndarray:
        """[N] whether the tokens do sum to it, to a per cent."""
        sums = np.array([float(own.sum()) for own in self.tokens])
        return np.abs(sums - self.drop) <= COMPLETE * np.abs(self.drop) + 1e-4


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

    A model that normalizes its embeddings at once (RMSNorm) jumps at zeros, which the points of `input_attribution`
    then miss.

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


def input_attribution(
    model: nn.Module, items: Sequence[Encoded], baseline: Tensor, *, pad_id: int, steps: int = 32, batch_size: int = 64
) -> Attribution:
    """How much of an object's log-probability each token carries, by integrated gradients on its embedding.

    With e_t the embeddings as the model's embedding module gives them, ē the baseline, and F the mean log-probability
    of the object's tokens, all tokens on the way at once,

        A_t = (e_t − ē) · ∫₀¹ ∂F/∂e_t at ē + α (e − ē) dα        (Sundararajan et al. 2017)

    by Captum's IntegratedGradients with Gauss-Legendre quadrature. A text's tokens sum to its F minus F with all of
    them at the baseline; where they do not to a per cent, its points are doubled, up to MOST: a router's choice of
    experts jumps on the way, and no number of points may be enough.

    Args:
        items: texts about one fact each, which end with its object.
        baseline: [width], of `embedding_baseline`.
        steps: points of the quadrature to begin with; each costs a forward and backward.
        batch_size: texts at one point each that go through the model at once.

    Raises:
        UserError: steps or batch_size is not positive, or a text is none of these.
    """
    from captum.attr import IntegratedGradients

    if min(steps, batch_size) < 1:
        raise UserError(f"steps is {steps} and batch_size {batch_size}; expected at least 1 of both")
    for item in items:
        token_groups(item)

    def score(embeddings: Tensor, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return -example_losses(_logits(model, batch, lambda _: embeddings), labels)

    integrated = IntegratedGradients(score)
    tokens: dict[int, Tensor] = {}
    drop, taken = np.zeros(len(items)), np.zeros(len(items), dtype=int)
    left, points = list(range(len(items))), steps
    with differentiating(model):
        while left:
            for chosen, batch in _batches(model, items, left, max(1, batch_size // points), pad_id):
                arguments = (batch["input_ids"], batch["attention_mask"], batch["labels"])
                with torch.no_grad():
                    embeddings = _embedding(model)(batch["input_ids"])
                found, apart = integrated.attribute(
                    embeddings, baseline.to(embeddings).expand_as(embeddings), additional_forward_args=arguments,
                    n_steps=points, method="gausslegendre", internal_batch_size=batch_size,
                    return_convergence_delta=True,
                )  # fmt: skip
                found = found.double().sum(-1).cpu()
                for row, i in enumerate(chosen):
                    tokens[i] = found[row, : len(items[i].ids) - 1]
                    drop[i], taken[i] = float(found[row].sum()) - float(apart[row]), points
            complete = Attribution([tokens[i] for i in range(len(items))], drop, taken).complete
            left = [i for i in left if not complete[i] and 2 * points <= MOST]
            points *= 2
    return Attribution([tokens[i] for i in range(len(items))], drop, taken)


def erasure(
    model: nn.Module, items: Sequence[Encoded], baseline: Tensor, *, pad_id: int, batch_size: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """What is left of a text's object with one group of its tokens at the baseline, and with all of them.

    Args:
        items, baseline: as of `input_attribution`.

    Returns:
        logprob [N, ERASED], mean log-probability of the object's tokens in nats, and exact [N, ERASED], 1 where all of
        them are argmax and else 0; the first column is the text as it is. NaN where a text has no token of the group.
    """
    groups = [token_groups(item) for item in items]
    logprob, exact = (np.full((len(items), len(ERASED)), np.nan) for _ in range(2))
    with evaluating(model):
        for chosen, batch in _batches(model, items, list(range(len(items))), batch_size, pad_id):
            labels = batch["labels"]
            group = torch.full(labels.shape, -1)  # padding, and each text's last token
            for row, i in enumerate(chosen):
                group[row, : len(groups[i])] = groups[i]
            group = group.to(labels.device)
            masks = [group < -1, *(group == number for number in range(len(GROUPS))), group >= 0]  # as in ERASED
            for column, where in enumerate(masks):
                there = (where.any(1) | (column == 0)).cpu().numpy()
                if not there.any():
                    continue
                change = lambda x, where=where: torch.where(where.unsqueeze(-1), baseline.to(x), x)
                logits = _logits(model, batch, change)
                right = (logits[:, :-1].argmax(-1) == labels[:, 1:]) | (labels[:, 1:] == IGNORE)
                own = np.array(chosen)[there]
                logprob[own, column] = -example_losses(logits, labels).double().cpu().numpy()[there]
                exact[own, column] = right.all(1).cpu().numpy()[there]
    return logprob, exact


def input_signature(
    model: nn.Module,
    pairs: Sequence[FactPair],
    *,
    pad_id: int,
    steps: int = 32,
    baseline: Literal["mean", "zeros"] = "mean",
    batch_size: int = 64,
    formats: Sequence[str] = FORMATS,
) -> list[Row]:
    """Off which tokens a model reads the facts, in the text that stores each and in the one that recalls it.

    Args:
        baseline: what an absent token's embedding is; the mean is over the texts of both formats.
        steps, batch_size: as of `input_attribution`.
        formats: which of FORMATS are measured.

    Returns:
        for each format a row of each of GROUPS and of "all" tokens: format, group; tokens: their mean number;
        attribution: their mean sum in nats; share: mean over texts of |sum of the group| / Σ |sums of all groups|; over
        all texts, so that groups add up; erased: mean drop of log-probability in nats with the group at the baseline,
        and erased_exact: the share of texts whose object is still the argmax, over those texts which have such tokens:
        facts, people. With `<name>_low` and `<name>_high`, 95 % cluster bootstraps over people; None where nothing is
        defined. by_person: each text's share, a list for each person. Rows of "all" also have logprob and exact of the
        texts as they are; steps, the most points that a text took, and incomplete, how many texts' attributions are
        further than a per cent from their sum (`erased`).

    Raises:
        UserError: see `input_attribution`.
    """
    start = embedding_baseline(model, [getattr(pair, name) for name in FORMATS for pair in pairs], baseline)
    people = [pair.person for pair in pairs]
    rows = []
    for name in formats:
        items: list[Encoded] = [getattr(pair, name) for pair in pairs]
        numbers = [token_groups(item).numpy() for item in items]
        found = input_attribution(model, items, start, pad_id=pad_id, steps=steps, batch_size=batch_size)
        logprob, exact = erasure(model, items, start, pad_id=pad_id, batch_size=batch_size)
        counts = np.array([np.bincount(own, minlength=len(GROUPS)) for own in numbers])
        sums = np.array([np.bincount(own, t, len(GROUPS)) for own, t in zip(numbers, found.tokens)])
        size = np.abs(sums).sum(1, keepdims=True)
        share = np.divide(np.abs(sums), size, out=np.full_like(sums, np.nan), where=size > 0)
        counts, sums, share = (np.column_stack([x, x.sum(1)]) for x in (counts, sums, share))
        for column, group in enumerate((*GROUPS, "all")):
            erased = 1 + column  # the text as it is comes first
            row: Row = {"format": name, "group": group, "tokens": float(counts[:, column].mean())}
            row |= mean_over_people("attribution", sums[:, column], people)
            row |= mean_over_people("share", share[:, column], people)
            row |= mean_over_people("erased", logprob[:, 0] - logprob[:, erased], people)
            row |= mean_over_people("erased_exact", exact[:, erased], people)
            has = counts[:, column] > 0
            row |= {"facts": int(has.sum()), "people": len({who for who, own in zip(people, has) if own})}
            row["by_person"] = by_person(share[:, column], people)
            rows.append(row)
        rows[-1] |= {"logprob": float(logprob[:, 0].mean()), "exact": float(exact[:, 0].mean())}
        rows[-1] |= {"steps": int(found.steps.max()), "incomplete": int((~found.complete).sum())}
    return rows


def _logits(model: nn.Module, batch: Batch, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The model's logits with the output of its embedding module changed."""
    put: Callable[..., Tensor] = lambda module, args, output: change(output).clone()  # CTRL scales it in place
    with _embedding(model).register_forward_hook(put):
        return forward(model, batch).logits


def _embedding(model: nn.Module) -> nn.Module:
    find: Any = getattr(model, "get_input_embeddings", None)
    own = find() if find else None
    if own is None:
        raise UserError(
            f"{type(model).__name__} tells no input embeddings, which the input-level signature is about; expected a "
            "transformers model with get_input_embeddings"
        )
    return own


def _batches(
    model: nn.Module, items: Sequence[Encoded], chosen: Sequence[int], size: int, pad_id: int
) -> Iterator[tuple[list[int], Batch]]:
    """Batches of some of the texts, shortest first, with the numbers of the texts."""
    order = sorted(chosen, key=lambda i: len(items[i].ids))
    device = _device(model)
    for at in range(0, len(order), size):
        numbers = order[at : at + size]
        batch = collate([items[i] for i in numbers], pad_id=pad_id)
        yield numbers, {name: value.to(device) for name, value in batch.items() if name != "group"}


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
