"""Consistency: is one fact the same thing to a model in both of its formats? In gradients, and in hidden states.

A cosine between the formats means nothing by itself. So it is reported beside the cosines of texts about different
facts: another person's fact of the same relation, another fact of the same person, and another fact of another person.
Formulas are in docs/method.md.

Takes a model, pairs of encoded texts and ParamSets; it knows no strategies, and draws nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from crosstrace.core.errors import UserError
from crosstrace.core.statistics import cluster_bootstrap, finite, jackknife
from crosstrace.data.tokens import Encoded, collate
from crosstrace.models.forward import forward
from crosstrace.models.modes import evaluating
from crosstrace.sets.paramset import ParamSet
from crosstrace.trace.products import gradient_products

PAIRINGS = ("same", "relation", "person", "other")
PLACES = ("subject", "relation", "answer")
Row = dict[str, Any]
TIE = 1e-9  # cosines that differ by less are equal: of the same states, in another order of summation
_SEED = 0  # of the bootstraps and shuffles
_SHUFFLES = 20
_PARTS = 8  # groups of people that CKA's jackknife leaves out in turn


@dataclass(frozen=True)
class FactPair:
    """One fact, stored by one text and recalled by another; each text ends with the fact's object, its only target.

    Attributes:
        answer: relation and object: what two people may have in common.
    """

    fact: str
    relation: str
    person: str
    answer: tuple[str, str]
    stored: Encoded
    recalled: Encoded


def fact_pairs(stored: Sequence[Encoded], recalled: Sequence[Encoded]) -> list[FactPair]:
    """Every fact that both formats word, in the order in which it is stored; of several texts the first of each.

    Raises:
        UserError: no fact has both formats.
    """
    firsts: list[dict[str, tuple[Encoded, int]]] = []
    for items in (stored, recalled):
        first: dict[str, tuple[Encoded, int]] = {}
        for item in items:
            for number, mention in enumerate(item.example.mentions):
                first.setdefault(mention.fact, (item, number))
        firsts.append(first)
    pairs = []
    for fact, (item, number) in firsts[0].items():
        if fact not in firsts[1]:
            continue
        recall_item, recall_number = firsts[1][fact]
        mention = item.example.mentions[number]
        start, stop = mention.object
        answer = (mention.relation, item.example.text[start:stop])
        texts = item.about(number), recall_item.about(recall_number)
        pairs.append(FactPair(fact, mention.relation, item.example.person, answer, *texts))
    if not pairs:
        raise UserError(
            f"none of the {len(firsts[0])} facts that are stored is recalled by another text; consistency compares the "
            "two formats of one fact, so the texts must be about the same facts"
        )
    return pairs


def gradient_consistency(
    model: nn.Module, pairs: Sequence[FactPair], sets: Mapping[str, ParamSet], *, pad_id: int, together: int = 48
) -> list[Row]:
    """Cosine of the gradients of a fact's two formats, and of formats of different facts, over sets of parameters.

    g = ∂ℓ/∂θ of the mean cross-entropy of the object's tokens, in the text that stores the fact up to there and in the
    one that recalls it. cos_S(g_i, g_j) = ⟨g_i, g_j⟩_S / (‖g_i‖_S ‖g_j‖_S), from exact inner products.

    Args:
        sets: by label, e.g. one of all parameters, of a layer, a shared set, its complement.
        pad_id: of the tokenizer.
        together: facts that are compared with each other, and traced in one batch of twice as many texts. All facts of
            a person go together, if they fit.

    Returns:
        a row for each set: set, size; same, relation, person, other: mean cosine of each pairing, with
        `<pairing>_low` and `<pairing>_high`; excess: same − relation, with its interval; first: share of the facts
        whose cosine with themselves is the largest among the facts compared with each other, chance_first; facts,
        people; by_person: each fact's excess, a list for each person. Intervals are 95 % cluster bootstraps over
        people; None where nothing is defined.
    """
    values: dict[str, dict[str, list[np.ndarray]]] = {label: {} for label in sets}
    people: list[str] = []
    chance: list[float] = []
    groups = list(_groups(pairs, together))
    batches = [
        collate([pair.stored for pair in group] + [pair.recalled for pair in group], pad_id=pad_id) for group in groups
    ]
    for group, products_of in zip(groups, gradient_products(model, batches, sets)):
        n = len(group)
        pairing = _pairings(group)
        for label, products in products_of.items():
            norms = products.diagonal().sqrt()
            cosine = (products / (norms.unsqueeze(1) * norms))[:n, n:].cpu().numpy()
            for name in PAIRINGS:
                values[label].setdefault(name, []).append(_row_means(cosine, pairing == name))
            same = cosine.diagonal()[:, None]
            first = np.where(np.isnan(same[:, 0]), np.nan, (cosine <= same + TIE).all(1))
            values[label].setdefault("first", []).append(first)
        people += [pair.person for pair in group]
        chance += [1 / n] * n
    rows = []
    for label, by_group in values.items():
        flat = {name: np.concatenate(arrays) for name, arrays in by_group.items()}
        row: Row = {"set": label, "size": sets[label].size}
        for name in PAIRINGS:
            row |= mean_over_people(name, flat[name], people)
        row |= mean_over_people("excess", flat["same"] - flat["relation"], people)
        row |= mean_over_people("first", flat["first"], people)
        row |= {"chance_first": float(np.mean(chance)), "facts": len(people), "people": len(set(people))}
        row["by_person"] = by_person(flat["same"] - flat["relation"], people)
        rows.append(row)
    return rows


def _groups(pairs: Sequence[FactPair], most: int) -> Iterator[list[FactPair]]:
    """Groups of at most so many facts; all facts of a person are in one group, if they fit."""
    if most < 2:
        raise UserError(f"together is {most}; expected at least 2 facts to compare with each other")
    pairs_of: dict[str, list[FactPair]] = {}
    for pair in pairs:
        pairs_of.setdefault(pair.person, []).append(pair)
    group: list[FactPair] = []
    for person_pairs in pairs_of.values():
        if group and len(group) + len(person_pairs) > most:
            yield group
            group = []
        group += person_pairs
        while len(group) > most:
            yield group[:most]
            group = group[most:]
    if group:
        yield group


def _pairings(pairs: Sequence[FactPair]) -> np.ndarray:
    """Which of PAIRINGS the stored fact i and the recalled fact j are, [n, n]; "" is none of them."""
    relation = np.array([[a.relation == b.relation for b in pairs] for a in pairs])
    person = np.array([[a.person == b.person for b in pairs] for a in pairs])
    kinds = np.where(relation, "relation", np.where(person, "person", "other")).astype("<U8")
    kinds[relation & person] = ""  # the same fact, or a person's second object of one relation
    np.fill_diagonal(kinds, "same")
    return kinds


def representation_consistency(
    model: nn.Module,
    pairs: Sequence[FactPair],
    *,
    pad_id: int,
    other: nn.Module | None = None,
    batch_size: int = 64,
) -> list[Row]:
    """How alike a fact's two formats are in hidden states, layer by layer, at three places of the texts: where the
    subject ends, where the relation ends, and where the object is predicted (`answer`: the token before the object).

    If a model keeps several streams beside each other, a state is all of them, one after the other. The states of each
    format are centred over the facts. If all of them are the same, as those of a question mark's embedding, nothing is
    defined.

    Cosines and baselines are as in `gradient_consistency`. cka is linear CKA, ‖XᵀY‖² / (‖XᵀX‖ ‖YᵀY‖) (Kornblith et
    al. 2019). In retrieval the state of the text that recalls a fact looks for that fact among all that are stored, by
    cosine.

    Args:
        other: the model that reads the texts which recall, if it is another: of as many layers, and as wide.

    Returns:
        a row for each place and layer (0: the embeddings; the last is after the final norm): place, layer; same,
        relation, person, other, excess as above, with intervals; cka, cka_low, cka_high (jackknife over groups of
        people) and cka_shuffled, the mean over facts paired at random within their relation; top1 (with interval): how
        often the fact itself comes first, with ties counted against it; mrr: its mean reciprocal rank; answer_top1: how
        often what comes first has the same relation and object; chance_top1, chance_mrr; chance_relation
        (chance_person): the top1 of a model that knows the relation (the person) alone; facts, people; by_person: each
        fact's top1, a list for each person. A fact without a place in one of its texts is left out there.
    """
    pairing = _pairings(pairs)
    stored = hidden_states(model, [pair.stored for pair in pairs], pad_id, batch_size)
    recalled = hidden_states(other or model, [pair.recalled for pair in pairs], pad_id, batch_size)
    rows = []
    for place in PLACES:
        has_place = np.array([place in a and place in b for a, b in zip(stored, recalled)])
        if has_place.sum() < 2:
            continue
        chosen = [pair for pair, has in zip(pairs, has_place) if has]
        kinds = pairing[has_place][:, has_place]
        x, y = ([state[place] for state, has in zip(states, has_place) if has] for states in (stored, recalled))
        for layer in range(len(x[0])):
            a, b = (torch.stack([state[layer].flatten() for state in states]) for states in (x, y))  # [facts, width]
            rows.append({"place": place, "layer": layer} | _compare_states(a, b, chosen, kinds))
    return rows


def _compare_states(stored: Tensor, recalled: Tensor, pairs: Sequence[FactPair], kinds: np.ndarray) -> Row:
    """What `representation_consistency` says of one place and layer.

    Args:
        stored, recalled: states [facts, width] in float64.
        kinds: [facts, facts], as `_pairings` gives them.
    """
    people = [pair.person for pair in pairs]
    a, b = _centred(stored), _centred(recalled)
    cosine = ((a @ b.t()) / (a.norm(dim=1).unsqueeze(1) * b.norm(dim=1))).numpy()
    row: Row = {}
    means = {name: _row_means(cosine, kinds == name) for name in PAIRINGS}
    for name, values in means.items():
        row |= mean_over_people(name, values, people)
    row |= mean_over_people("excess", means["same"] - means["relation"], people)
    row |= _cka_row(a, b, pairs)

    # A column j is a recalled fact: its rows i, the stored facts, are ranked.
    defined = ~np.isnan(cosine).any(0)
    rank = np.where(defined, (cosine >= cosine.diagonal() - TIE).sum(0), np.nan)  # of fact j, ties counted against it
    answers = [pair.answer for pair in pairs]
    nearest = np.where(defined, np.nan_to_num(cosine, nan=-np.inf).argmax(0), 0)
    hit = np.array([answers[i] == answer for i, answer in zip(nearest, answers)], dtype=float)
    first = np.where(defined, rank == 1, np.nan)
    row |= mean_over_people("top1", first, people)
    row |= mean_over_people("answer_top1", np.where(defined, hit, np.nan), people)
    row["mrr"] = finite(float(np.nanmean(1 / rank))) if defined.any() else None
    n = len(pairs)
    row |= {"chance_top1": 1 / n, "chance_mrr": sum(1 / k for k in range(1, n + 1)) / n}
    # the mean over facts of 1 / (number of facts with the same relation, with the same person)
    row |= {"chance_relation": len({pair.relation for pair in pairs}) / n, "chance_person": len(set(people)) / n}
    return row | {"facts": n, "people": len(set(people)), "by_person": by_person(first, people)}


def _cka_row(a: Tensor, b: Tensor, pairs: Sequence[FactPair]) -> Row:
    """CKA of centred states [facts, width], its jackknife over groups of people, and that of facts paired at random."""
    people = [pair.person for pair in pairs]
    order = {person: number for number, person in enumerate(dict.fromkeys(people))}
    parts = min(_PARTS, len(order))
    part = np.array([order[person] % parts for person in people])
    split = [np.flatnonzero(part == number) for number in range(parts)]
    estimate = jackknife(lambda kept: cka(*(states[np.concatenate(kept)] for states in (a, b))), split)
    row: Row = {f"cka{end}": finite(value) for end, value in zip(("", "_low", "_high"), estimate)}
    rng = np.random.default_rng(_SEED)
    relations = np.array([pair.relation for pair in pairs])
    shuffled = []
    for _ in range(_SHUFFLES):
        partners = np.arange(len(pairs))
        for relation in np.unique(relations):
            facts = np.flatnonzero(relations == relation)
            partners[facts] = rng.permutation(facts)
        shuffled.append(cka(a, b[torch.from_numpy(partners)]))
    return row | {"cka_shuffled": finite(float(np.mean(shuffled)))}


def _centred(states: Tensor) -> Tensor:
    """States minus their mean; a state that differs from it by rounding only (the same token in all texts) is 0."""
    centred = states - states.mean(0)
    return centred.masked_fill((centred.norm(dim=1) <= 1e-5 * states.norm(dim=1)).unsqueeze(1), 0)


def cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of two sets of states [n, width] of the same n things; NaN if one is constant.

    ‖XᵀY‖_F² / (‖XᵀX‖_F ‖YᵀY‖_F) of the centred states, in [0, 1] (Kornblith et al. 2019, arXiv 1905.00414).
    """
    x, y = (_gram(states) for states in (x, y))
    scale = float(x.norm() * y.norm())
    return float((x * y).sum()) / scale if scale else math.nan


def _gram(x: Tensor) -> Tensor:
    """Inner products of the centred states [n, n]: ‖XᵀY‖² = Σ (XXᵀ ∘ YYᵀ), and n is less than the width."""
    x = x - x.mean(0)
    return x @ x.t()


def hidden_states(
    model: nn.Module, items: Sequence[Encoded], pad_id: int, batch_size: int
) -> list[dict[str, list[Tensor]]]:
    """For each text: place -> the hidden state of each layer there, the embeddings' first, float64 on the CPU.

    A state is [width]. If a model keeps several streams beside each other (Gemma 3n, hyper-connections), the state of
    a token is all of them, [streams, width].

    Raises:
        UserError: the model gives no hidden states, or it can't be told which part of them belongs to which token.
    """
    states_of: dict[int, dict[str, list[Tensor]]] = {}  # by the text's number
    order = sorted(range(len(items)), key=lambda i: len(items[i].ids))
    axes: list[tuple[int, int]] | None = None
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = collate([items[i] for i in chosen], pad_id=pad_id)
            states = _states(model, batch)
            if axes is None:
                axes = token_axes(model, states, batch["input_ids"].shape)
            token_of = [places(items[i]) for i in chosen]
            tokens = torch.tensor(
                [[by_place.get(place, 0) for place in PLACES] for by_place in token_of], device=states[0].device
            )
            rows = torch.arange(len(chosen), device=tokens.device).unsqueeze(1)
            picked = [state.movedim(pair, (0, 1))[rows, tokens].double().cpu() for state, pair in zip(states, axes)]
            for row, (i, by_place) in enumerate(zip(chosen, token_of)):
                states_of[i] = {place: [state[row, PLACES.index(place)] for state in picked] for place in by_place}
    return [states_of[i] for i in range(len(items))]


def _states(model: nn.Module, batch: Mapping[str, Tensor]) -> Sequence[Tensor]:
    states = getattr(forward(model, batch, output_hidden_states=True), "hidden_states", None)
    if not states:
        raise UserError(
            f"{type(model).__name__} gives no hidden_states, which are read layer by layer; "
            "expected a transformers model that honours output_hidden_states"
        )
    return states


def token_axes(model: nn.Module, states: Sequence[Tensor], shape: Sequence[int]) -> list[tuple[int, int]]:
    """Along which axes of each layer's hidden states its texts and their tokens lie.

    Args:
        states: of a batch of texts.
        shape: of that batch, [texts, tokens].

    Raises:
        UserError: there are no such axes.
    """
    if shape[0] != shape[1] and all(state.dim() == 3 and state.shape[:2] == tuple(shape) for state in states):
        return [(0, 1)] * len(states)
    # The axes' lengths alone do not tell them apart, so two batches of other numbers and lengths of texts are compared.
    device = next(model.parameters()).device
    shapes = []
    for size in ((2, 5), (3, 7)):
        ids = torch.zeros(size, dtype=torch.long, device=device)
        small = _states(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        shapes.append([state.shape for state in small])
    axes = []
    for few, many in zip(*shapes, strict=True):
        changes = list(zip(few, many))
        if [change for change in changes if change[0] != change[1]] != [(2, 3), (5, 7)]:
            raise UserError(
                f"{type(model).__name__} gives hidden states {list(few)} for two texts of 5 tokens, in which tokens "
                "can't be told apart; expected one state for each token"
            )
        axes.append((changes.index((2, 3)), changes.index((5, 7))))
    return axes


def places(item: Encoded) -> dict[str, int]:
    """The tokens of a text about one fact that PLACES names, without those that it does not have.

    subject: the subject's last token; relation: the last token of the relation's words, if the subject comes before;
    answer: the token that predicts the object.
    """
    mention = item.mentions[0]
    tokens = {}
    for place, mask in (("subject", mention.subject), ("relation", mention.relation)):
        if mask.any():
            tokens[place] = int(mask.nonzero().max())
    if tokens.get("relation", 0) < tokens.get("subject", 0):
        del tokens["relation"]  # in "What is the birthplace of Ada?" nothing there knows of whom
    before = int(mention.object.nonzero().min()) - 1
    if before >= 0:
        tokens["answer"] = before
    return tokens


def _row_means(values: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Mean of each row's chosen values [n]; NaN if there is none, or if one of them is NaN."""
    count = where.sum(1)
    sums = np.where(where, values, 0).sum(1)
    return np.divide(sums, count, out=np.full(len(values), np.nan), where=count > 0)


def mean_over_people(name: str, values: np.ndarray, people: Sequence[str]) -> Row:
    """A mean over facts with its interval over people; facts without a value are left out."""
    kept = ~np.isnan(values)
    if not kept.any():
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    chosen = values[kept].astype(float)
    clusters = [person for person, keep in zip(people, kept) if keep]
    mean, low, high = cluster_bootstrap(chosen, np.zeros_like(chosen), clusters, seed=_SEED)
    return {name: mean, f"{name}_low": low, f"{name}_high": high}


def by_person(values: np.ndarray, people: Sequence[str]) -> dict[str, list[float | None]]:
    """Each person's facts in their order, to six digits; None where a fact has no value.

    With these lists two models can be compared fact by fact.
    """
    lists: dict[str, list[float | None]] = {person: [] for person in people}
    for person, value in zip(people, values):
        lists[person].append(None if np.isnan(value) else float(f"{value:.6g}"))
    return lists
