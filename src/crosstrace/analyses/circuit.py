"""Circuit: which attention heads and MLP neurons the recall of a fact goes through.

A node is a head's reading of its values (what goes into the output projection) or a neuron's activation (what goes into
the down projection). Ablating a node puts its mean over texts in its place, at every position. Importance is measured
by attribution, with integrated gradients on the node's activation, and for single nodes by real ablation; whether the
important nodes suffice, and whether they are needed, by keeping and by ablating the top ones. Formulas: docs/method.md.

Takes a model, encoded texts and an Anatomy; it knows no strategies, and draws nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor, nn

from crosstrace.core.errors import UserError
from crosstrace.core.statistics import mean_interval
from crosstrace.data.tokens import Batch, Encoded, batches
from crosstrace.models.anatomy import Anatomy
from crosstrace.models.forward import forward
from crosstrace.models.loading import pad_id
from crosstrace.models.modes import differentiating, evaluating
from crosstrace.sets.paramset import ParamSet
from crosstrace.training.evaluation import Recall, recall
from crosstrace.training.losses import example_losses

NODES = ("query_head", "neuron")
CRITICAL = 0.1  # share of the nodes that count as critical, where a yes or no is needed
Row = dict[str, Any]
COMPLETE = 0.01  # how far a module's attributions may be from what they should sum to
MOST = 128  # points of the quadrature
TOGETHER = 64  # texts that are attributed at once, a text at each point counted
_SEED = 0


def node_means(
    model: nn.Module, batches: Sequence[Batch], anatomy: Anatomy, units: Sequence[str] = NODES
) -> dict[str, Tensor]:
    """Mean of every node's activation over all tokens of the texts: module path -> [width], float64.

    A module that no text goes through is not there: cross-attention, for example, if there is nothing to attend to.

    Raises:
        UserError: the model's heads and neurons are not known (see `Anatomy`), or there is no text.
    """
    sites = _sites(anatomy, units)
    sums: dict[str, Tensor] = {}
    count = 0

    def add(site: str, x: Tensor, mask: Tensor) -> None:
        own = x.double().flatten(0, -2)[mask.flatten() != 0].sum(0)
        sums[site] = sums[site] + own if site in sums else own

    with evaluating(model):
        for batch in batches:
            batch = _here(model, batch)
            with ExitStack() as hooks:
                for site in sites:
                    read = lambda module, args, site=site, mask=batch["attention_mask"]: add(site, args[0], mask)
                    hooks.callback(model.get_submodule(site).register_forward_pre_hook(read).remove)
                forward(model, batch)
            count += int(batch["attention_mask"].sum())
    if not count:
        raise UserError("the nodes' means need at least one text")
    return {site: total / count for site, total in sums.items()}


@contextmanager
def nodes_ablated(
    model: nn.Module, anatomy: Anatomy, nodes: Mapping[str, Sequence[int]], means: Mapping[str, Tensor]
) -> Iterator[nn.Module]:
    """The model with some nodes at their means, at every position; as it was afterwards.

    Args:
        nodes: unit -> numbers of its nodes, as `anatomy.units(unit)` lists them.
        means: as `node_means` gives them.
    """
    columns: dict[str, Tensor] = {}
    _sites(anatomy, list(nodes))
    for unit, numbers in nodes.items():
        wanted, count = torch.as_tensor(list(numbers), dtype=torch.long), len(anatomy.units(unit))
        if len(wanted) and not 0 <= int(wanted.min()) <= int(wanted.max()) < count:
            raise UserError(f"nodes {list(numbers)[:8]} of {unit} were given; expected numbers from 0 to {count - 1}")
        for site, index in anatomy.sites(unit).items():
            columns[site] = columns.get(site, torch.zeros(len(index), dtype=torch.bool)) | torch.isin(index, wanted)
    with ExitStack() as hooks:
        for site, chosen in columns.items():
            if site not in means or not chosen.any():
                continue
            module = model.get_submodule(site)
            device = next(module.parameters()).device
            put = functools.partial(_put, chosen.to(device), means[site].to(device))
            hooks.callback(module.register_forward_pre_hook(put).remove)
        yield model


def _put(chosen: Tensor, mean: Tensor, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (torch.where(chosen, mean.to(args[0].dtype), args[0]), *args[1:])


def attribution(
    model: nn.Module,
    batches: Sequence[Batch],
    anatomy: Anatomy,
    means: Mapping[str, Tensor],
    units: Sequence[str] = NODES,
    steps: int = 16,
) -> tuple[dict[str, np.ndarray], list[Row]]:
    """How much of the answers' log-probability each node carries, by integrated gradients on its activation.

    For the nodes a of one module, with ā their means and F_i = −ℓ_i as a function of that module's input alone,

        A_a = mean_i Σ_t (a_it − ā) · ∫₀¹ ∂F_i/∂a_it at ā + α (a_i − ā) dα        (Sundararajan et al. 2017)

    by Gauss-Legendre quadrature. The nodes of a module sum to F_i − F_i with all of them ablated; where they do not to
    a per cent, the points are doubled.

    Args:
        batches: labels are the answers whose mean log-probability is F.
        steps: points of the quadrature to begin with; each costs a forward and backward of the texts per module.

    Returns:
        per unit the attributions [n_units] in nats, and for each module a row {module, sum, drop, steps}: what its
        nodes sum to, what ablating all of them does take away, and the points that it took. They differ by more than a
        per cent where even MOST points are too few: where something jumps on the way, as a router's choice does.
    """
    sites = [site for site in _sites(anatomy, units) if site in means]
    found = {unit: np.zeros(len(anatomy.units(unit))) for unit in units}
    rows = []
    data = [_here(model, batch) for batch in batches]
    if not data:
        raise UserError("attribution needs at least one text")
    count = sum(len(batch["labels"]) for batch in data)
    with differentiating(model):
        whole = sum(-float(_losses(model, batch).detach().sum()) for batch in data) / count
        for site in sites:
            left = (
                sum(float(_on_the_way(model, batch, site, means[site], torch.zeros(1))[0].detach()) for batch in data)
                / count
            )
            drop, points = whole - left, steps
            while True:
                value = torch.stack([_integrated(model, batch, site, means[site], points) for batch in data]).sum(0)
                value /= count
                apart = abs(float(value.sum()) - drop)
                if apart <= COMPLETE * abs(drop) + 1e-4 or 2 * points > MOST:
                    break
                points *= 2
            rows.append({"module": site, "sum": float(value.sum()), "drop": drop, "steps": points})
            for unit in units:
                index = anatomy.sites(unit).get(site)
                if index is not None:
                    own = index.numpy()
                    np.add.at(found[unit], own[own >= 0], value.numpy()[own >= 0])
    return found, rows


def _integrated(model: nn.Module, batch: Batch, site: str, mean: Tensor, steps: int) -> Tensor:
    """Σ over texts and tokens of (a − ā) · ∫ ∂ΣF/∂a [width] of one module's input, float64 on the CPU.

    As many points go through the model at once as make TOGETHER texts, each a copy of the batch.
    """
    points, weights = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(steps))  # on [−1, 1]
    count = len(batch["labels"])
    total: Tensor | None = None
    for own, weight in zip(*(x.split(max(1, TOGETHER // count)) for x in (points, weights))):
        copies = {name: value.repeat(len(own), 1) for name, value in batch.items()}
        value, at, apart = _on_the_way(model, copies, site, mean, ((own + 1) / 2).repeat_interleave(count))
        (gradient,) = torch.autograd.grad(value, at)
        product = (gradient.double() * apart.double()).reshape(len(own), -1, at.shape[-1])  # points, positions, width
        term = weight.to(product) @ product.sum(1) / 2
        total = term if total is None else total + term
    assert total is not None
    return total.cpu()


def _on_the_way(
    model: nn.Module, batch: Batch, site: str, mean: Tensor, alpha: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """ΣF with a module's input at ā + α (a − ā), α of each text [B] or one for all, that input, and a − ā."""
    inner: dict[str, Tensor] = {}

    def change(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0].detach()
        start = mean.to(x.device, x.dtype).expand_as(x)
        inner["apart"] = x - start
        share = alpha.to(x).repeat_interleave(len(x) // alpha.numel())  # (some modules get all positions as rows)
        inner["at"] = (start + share.view(-1, *[1] * (x.dim() - 1)) * inner["apart"]).requires_grad_()
        return (inner["at"], *args[1:])

    with model.get_submodule(site).register_forward_pre_hook(change):
        value = -_losses(model, batch).sum()
    return value, inner["at"], inner["apart"]


def single_ablations(
    model: nn.Module,
    tokenizer: Any,
    items: Sequence[Encoded],
    anatomy: Anatomy,
    means: Mapping[str, Tensor],
    unit: str,
    numbers: Sequence[int],
) -> list[Row]:
    """What each of some nodes takes away by itself: rows {unit, node, drop (of the answers' mean log-probability, in
    nats a token), exact_match} with the node ablated."""
    before = _answered(recall(model, tokenizer, items), items)
    rows = []
    for number in numbers:
        with nodes_ablated(model, anatomy, {unit: [number]}, means):
            after = recall(model, tokenizer, items)
        rows.append(
            {
                "unit": unit,
                "node": anatomy.units(unit)[number],
                "drop": float(np.mean(before - _answered(after, items))),
                "exact_match": float(after.exact.mean()),
            }
        )
    return rows


def curve(
    model: nn.Module,
    tokenizer: Any,
    items: Sequence[Encoded],
    anatomy: Anatomy,
    means: Mapping[str, Tensor],
    scores: np.ndarray,
    unit: str,
    fractions: Sequence[float] = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0),
    seeds: int = 3,
) -> list[Row]:
    """Faithfulness and completeness: recall with the top nodes of a unit kept and all others ablated, and with the top
    nodes ablated and all others kept; beside random nodes, as many.

    Args:
        scores: [n_units], the nodes' importance; the highest are the top.
        fractions: of the unit's nodes, to whole nodes; 0 keeps (ablates) none.
        seeds: random orders of the nodes.

    Returns:
        rows {unit, kind ("keep" or "ablate"), order ("top" or "random"), fraction, nodes, exact_match, logprob (mean a
        token, nats)}, for "random" the mean over seeds with exact_match_low and exact_match_high.
    """
    total = len(scores)
    orders = {"top": [np.argsort(-scores, kind="stable")]}
    orders["random"] = [np.random.default_rng([_SEED, seed]).permutation(total) for seed in range(seeds)]

    @functools.cache
    def without(nodes: frozenset[int]) -> tuple[float, float]:  # all and none are asked for in every order
        with nodes_ablated(model, anatomy, {unit: sorted(nodes)}, means):
            result = recall(model, tokenizer, items)
        return float(result.exact.mean()), float(_answered(result, items).mean())

    rows = []
    for kind in ("keep", "ablate"):
        for name, each in orders.items():
            for count in sorted({round(fraction * total) for fraction in fractions}):
                ablated = [order[count:] if kind == "keep" else order[:count] for order in each]
                found = [without(frozenset(nodes.tolist())) for nodes in ablated]
                exact, low, high = mean_interval([e for e, _ in found])
                row: Row = {"unit": unit, "kind": kind, "order": name, "fraction": count / total, "nodes": count}
                row |= {"exact_match": exact, "logprob": float(np.mean([logprob for _, logprob in found]))}
                if len(found) > 1:
                    row |= {"exact_match_low": max(0.0, low), "exact_match_high": min(1.0, high)}
                rows.append(row)
    return rows


def smallest(rows: Sequence[Row], share: float = 0.9) -> int | None:
    """The fewest top nodes of a `curve` that keep `share` of the recall with all of them; None if none do."""
    kept = sorted((r for r in rows if r["kind"] == "keep" and r["order"] == "top"), key=lambda row: -row["nodes"])
    fewest = None
    for row in kept:  # from all nodes down, as long as it is enough
        if not row["exact_match"] or row["exact_match"] < share * kept[0]["exact_match"] - 1e-9:  # of rounding
            break
        fewest = row["nodes"]
    return fewest


def agreement(scores: np.ndarray, pset: ParamSet, anatomy: Anatomy, unit: str, permutations: int = 10_000) -> Row:
    """Are the nodes that matter those that hold the set's parameters?

    Importance |score| against the share of each node's parameters that the set holds: Spearman's correlation, and the
    area under the ROC curve of that share telling the critical nodes (the top tenth by importance) from the others,
    each with a permutation test that deals the shares out anew (two-sided). Both differ between layers for reasons of
    their own, so the correlation is also that of ranks within each layer, less the layer's mean, and tested by dealing
    the shares out within layers only.

    How concentrated the set is in the critical nodes is told too: the share of its parameters in nodes of this kind
    that they hold, minus their share of all parameters in such nodes, with a bootstrap that draws nodes.

    Returns:
        {unit, nodes, critical, spearman, spearman_p, within, within_p, auc, auc_p, concentration, concentration_low,
        concentration_high}; None where the set holds nothing of these nodes, or of all the same share (within: in every
        layer; concentration: only where it holds nothing).
    """
    sizes = anatomy.sizes(unit, list(pset.masks))
    has = sizes > 0
    share = anatomy.count(pset, unit)[has] / sizes[has]
    weight = np.abs(scores)[has]
    critical = np.zeros(len(weight), dtype=bool)
    critical[np.argsort(-weight, kind="stable")[: max(1, round(CRITICAL * len(weight)))]] = True
    row: Row = {"unit": unit, "nodes": int(has.sum()), "critical": int(critical.sum())}
    row |= _concentration(anatomy.count(pset, unit)[has], sizes[has], critical)
    if len(weight) < 3 or np.ptp(share) == 0 or np.ptp(weight) == 0:
        return row | dict.fromkeys(("spearman", "spearman_p", "within", "within_p", "auc", "auc_p"))

    # All statistics are sums over ranks less their mean.
    held, target, m = rankdata(share), rankdata(weight), critical.sum()
    held, target = held - held.mean(), target - target.mean()
    norm, ranks = np.linalg.norm(held) * np.linalg.norm(target), m * (~critical).sum()
    draw = np.random.default_rng(_SEED)
    spearman, auc = np.empty(permutations + 1), np.empty(permutations + 1)
    for number in range(permutations + 1):
        dealt = draw.permutation(held) if number else held
        spearman[number] = dealt @ target / norm
        auc[number] = 0.5 + dealt[critical].sum() / ranks
    extreme = lambda values: float((np.abs(values) >= abs(values[0]) - 1e-12).mean())  # the found one counts
    layer = np.array([label.partition(".")[0] for label in anatomy.units(unit)])[has]
    within = _within(share, weight, layer, permutations, draw)
    return row | {
        "spearman": float(spearman[0]),
        "spearman_p": extreme(spearman),
        "within": None if within is None else float(within[0]),
        "within_p": None if within is None else extreme(within),
        "auc": float(auc[0]),
        "auc_p": extreme(auc - 0.5),
    }


def _concentration(held: np.ndarray, sizes: np.ndarray, critical: np.ndarray, draws: int = 2000) -> Row:
    """The critical nodes' share of a set's parameters minus their share of all, with a percentile interval over draws
    of nodes.

    Args:
        held, sizes: [nodes] the parameters of each node in the set, and all of them.
        critical: [nodes] bool.
    """
    names = ("concentration", "concentration_low", "concentration_high")
    if not held.sum():
        return dict.fromkeys(names)
    rng, n = np.random.default_rng(_SEED), len(held)
    columns = np.stack([held * critical, held, sizes * critical, sizes], axis=1).astype(float)
    at_once = max(1, 2_000_000 // n)
    times = [rng.multinomial(n, np.full(n, 1 / n), min(at_once, draws - done)) for done in range(0, draws, at_once)]
    sums = np.concatenate([own @ columns for own in times])
    sums = sums[sums[:, 1] > 0]  # a draw of nodes that the set has nothing of
    low, high = np.quantile(sums[:, 0] / sums[:, 1] - sums[:, 2] / sums[:, 3], [0.025, 0.975])
    inside, whole, critical_sizes, all_sizes = columns.sum(0)
    return dict(zip(names, (float(inside / whole - critical_sizes / all_sizes), float(low), float(high))))


def _within(
    share: np.ndarray, weight: np.ndarray, layer: np.ndarray, permutations: int, draw: np.random.Generator
) -> np.ndarray | None:
    """The correlation of ranks within layers, as found and with the shares dealt out anew within them
    [permutations + 1]; None where either is the same in each layer."""
    groups = [np.flatnonzero(layer == name) for name in np.unique(layer)]
    held, target = (np.empty(len(share)) for _ in range(2))
    for own in groups:
        for ranks, values in ((held, share), (target, weight)):
            ranks[own] = rankdata(values[own]) - (len(own) + 1) / 2
    scale = np.linalg.norm(held) * np.linalg.norm(target)
    if not scale:
        return None
    sums = np.zeros(permutations + 1)
    for own in groups:
        sums[0] += held[own] @ target[own]
        for number in range(1, permutations + 1):
            sums[number] += draw.permutation(held[own]) @ target[own]
    return sums / scale


def answer_batches(items: Sequence[Encoded], tokenizer: Any, size: int = 64) -> list[Batch]:
    """The texts with their answers as labels, shortest first, for `node_means` and `attribution`."""
    return list(batches(items, size, "answer", pad_id=pad_id(tokenizer), by_length=True))


def _answered(found: Recall, items: Sequence[Encoded]) -> np.ndarray:
    """Log-probability a token of every answer; questions only, which have one answer each."""
    tokens = np.array([int(item.targets["answer"].sum()) for item in items])
    if len(tokens) != len(found.logprob):
        raise UserError("circuits are of questions with one answer each; a text with several facts was given")
    return found.logprob / tokens


def _losses(model: nn.Module, batch: Batch) -> Tensor:
    return example_losses(forward(model, batch).logits, batch["labels"])


def _here(model: nn.Module, batch: Batch) -> Batch:
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in batch.items() if name != "group"}


def _sites(anatomy: Anatomy, units: Sequence[str]) -> list[str]:
    found = [site for unit in units for site in anatomy.sites(unit)]
    unknown = [unit for unit in units if not anatomy.sites(unit)]
    if unknown:
        raise UserError(
            f"the model has no {unknown[0]} whose place is known ({anatomy.why(unknown[0])}); circuits need a model "
            "whose geometry crosstrace can read (docs/method.md, Centralization)"
        )
    return found
