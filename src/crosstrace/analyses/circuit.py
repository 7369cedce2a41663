"""Circuit: which attention heads and MLP neurons the recall of a fact goes through.

A node is a head's reading of its values (what goes into the output projection) or a neuron's activation (what goes into
the down projection). To ablate a node is to set it to its mean over texts, at every position.

Importance is measured by attribution, with integrated gradients on the node's activation, and for single nodes by real
ablation. Keeping only the top nodes says whether they suffice, and ablating them whether they are needed. Formulas:
docs/method.md.

Takes a model, encoded texts and an Anatomy; it knows no strategies, and draws nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from crosstrace.core.errors import UserError
from crosstrace.core.statistics import mean_interval, mean_ranks
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
COMPLETE = 0.01  # how far, relatively, a module's attributions may be from what they should sum to
MOST = 128  # points of the quadrature
TOGETHER = 64  # texts that are attributed at once; a text counts once for each point
_SEED = 0


def node_means(
    model: nn.Module, batches: Sequence[Batch], anatomy: Anatomy, units: Sequence[str] = NODES
) -> dict[str, Tensor]:
    """Mean of every node's activation over all tokens of the texts: module path -> [width], float64.

    Modules that no text goes through are left out: cross-attention, for example, if there is nothing to attend to.

    Raises:
        UserError: the model's heads and neurons are not known (see `Anatomy`), or there is no text.
    """
    sites = _sites(anatomy, units)
    sums: dict[str, Tensor] = {}
    count = 0

    def add_inputs(site: str, mask: Tensor, module: nn.Module, args: tuple[Any, ...]) -> None:
        total = args[0].double().flatten(0, -2)[mask.flatten() != 0].sum(0)
        sums[site] = sums[site] + total if site in sums else total

    with evaluating(model):
        for batch in batches:
            batch = _move_to_model(model, batch)
            with ExitStack() as hooks:
                for site in sites:
                    hook = functools.partial(add_inputs, site, batch["attention_mask"])
                    hooks.callback(model.get_submodule(site).register_forward_pre_hook(hook).remove)
                forward(model, batch)
            count += int(batch["attention_mask"].sum())
    if not count:
        raise UserError("the nodes' means need at least one text")
    return {site: total / count for site, total in sums.items()}


@contextmanager
def nodes_ablated(
    model: nn.Module, anatomy: Anatomy, nodes: Mapping[str, Sequence[int]], means: Mapping[str, Tensor]
) -> Iterator[nn.Module]:
    """Within the context, some nodes of the model are at their means, at every position.

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
            hook = functools.partial(_set_to_mean, chosen.to(device), means[site].to(device))
            hooks.callback(module.register_forward_pre_hook(hook).remove)
        yield model


def _set_to_mean(chosen: Tensor, mean: Tensor, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A module's inputs with the chosen columns at their means."""
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

    by Gauss-Legendre quadrature. The nodes of a module should sum to F_i minus F_i with all of them ablated. If they
    miss that by more than a per cent, the points are doubled.

    Args:
        batches: labels are the answers whose mean log-probability is F.
        steps: points of the quadrature to begin with; each costs a forward and backward of the texts per module.

    Returns:
        per unit the attributions [n_units] in nats, and for each module a row {module, sum, drop, steps}: what its
        nodes sum to, what ablating all of them really takes away, and how many points were used. Sum and drop differ by
        more than a per cent if even MOST points are too few: if something jumps on the way, as a router's choice does.
    """
    sites = [site for site in _sites(anatomy, units) if site in means]
    scores = {unit: np.zeros(len(anatomy.units(unit))) for unit in units}
    rows = []
    data = [_move_to_model(model, batch) for batch in batches]
    if not data:
        raise UserError("attribution needs at least one text")
    count = sum(len(batch["labels"]) for batch in data)
    with differentiating(model):
        intact = sum(-float(_losses(model, batch).detach().sum()) for batch in data) / count
        for site in sites:
            start = torch.zeros(1)  # of the way from the means: all nodes of the module are ablated
            values = (_value_on_the_way(model, batch, site, means[site], start)[0] for batch in data)
            ablated = sum(float(value.detach()) for value in values) / count
            drop, points = intact - ablated, steps
            while True:
                shares = torch.stack([_integrate(model, batch, site, means[site], points) for batch in data]).sum(0)
                shares /= count
                error = abs(float(shares.sum()) - drop)
                if error <= COMPLETE * abs(drop) + 1e-4 or 2 * points > MOST:
                    break
                points *= 2
            rows.append({"module": site, "sum": float(shares.sum()), "drop": drop, "steps": points})
            for unit in units:
                index = anatomy.sites(unit).get(site)
                if index is not None:
                    nodes = index.numpy()
                    np.add.at(scores[unit], nodes[nodes >= 0], shares.numpy()[nodes >= 0])
    return scores, rows


def _integrate(model: nn.Module, batch: Batch, site: str, mean: Tensor, steps: int) -> Tensor:
    """Σ over texts and tokens of (a − ā) · ∫ ∂ΣF/∂a [width] of one module's input, float64 on the CPU.

    Each point is a copy of the batch; as many points go through the model at once as make TOGETHER texts.
    """
    points, weights = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(steps))  # on [−1, 1]
    count = len(batch["labels"])
    total: Tensor | None = None
    size = max(1, TOGETHER // count)
    for chunk, weight in zip(points.split(size), weights.split(size)):
        copies = {name: value.repeat(len(chunk), 1) for name, value in batch.items()}
        alpha = ((chunk + 1) / 2).repeat_interleave(count)
        value, inputs, change = _value_on_the_way(model, copies, site, mean, alpha)
        (gradient,) = torch.autograd.grad(value, inputs)
        products = (gradient.double() * change.double()).reshape(len(chunk), -1, inputs.shape[-1])
        term = weight.to(products) @ products.sum(1) / 2  # [points] @ [points, width]
        total = term if total is None else total + term
    assert total is not None
    return total.cpu()


def _value_on_the_way(
    model: nn.Module, batch: Batch, site: str, mean: Tensor, alpha: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """ΣF with a module's input at ā + α (a − ā), that input, and a − ā.

    Args:
        alpha: α of each text [B], or of all [1].
    """
    inner: dict[str, Tensor] = {}

    def move_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0].detach()
        start = mean.to(x.device, x.dtype).expand_as(x)
        inner["change"] = x - start
        share = alpha.to(x).repeat_interleave(len(x) // alpha.numel())  # (some modules get all positions as rows)
        inner["input"] = (start + share.view(-1, *[1] * (x.dim() - 1)) * inner["change"]).requires_grad_()
        return (inner["input"], *args[1:])

    with model.get_submodule(site).register_forward_pre_hook(move_input):
        value = -_losses(model, batch).sum()
    return value, inner["input"], inner["change"]


def single_ablations(
    model: nn.Module,
    tokenizer: Any,
    items: Sequence[Encoded],
    anatomy: Anatomy,
    means: Mapping[str, Tensor],
    unit: str,
    numbers: Sequence[int],
) -> list[Row]:
    """What each of some nodes takes away by itself, when it is ablated: rows {unit, node, drop, exact_match}.

    drop is that of the answers' mean log-probability, in nats a token.
    """
    before = _answer_logprobs(recall(model, tokenizer, items), items)
    rows = []
    for number in numbers:
        with nodes_ablated(model, anatomy, {unit: [number]}, means):
            after = recall(model, tokenizer, items)
        rows.append(
            {
                "unit": unit,
                "node": anatomy.units(unit)[number],
                "drop": float(np.mean(before - _answer_logprobs(after, items))),
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
    """Faithfulness and completeness of a unit's top nodes, beside as many random nodes.

    Faithfulness is recall with the top nodes kept and all others ablated; completeness is recall with the top nodes
    ablated and all others kept.

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

    @functools.cache  # every order needs all nodes and none
    def recall_without(nodes: frozenset[int]) -> tuple[float, float]:
        with nodes_ablated(model, anatomy, {unit: sorted(nodes)}, means):
            result = recall(model, tokenizer, items)
        return float(result.exact.mean()), float(_answer_logprobs(result, items).mean())

    rows = []
    counts = sorted({round(fraction * total) for fraction in fractions})
    for kind, name, count in product(("keep", "ablate"), orders, counts):
        ablated = [order[count:] if kind == "keep" else order[:count] for order in orders[name]]
        results = [recall_without(frozenset(nodes.tolist())) for nodes in ablated]
        exact, low, high = mean_interval([exact for exact, _ in results])
        row: Row = {"unit": unit, "kind": kind, "order": name, "fraction": count / total, "nodes": count}
        row |= {"exact_match": exact, "logprob": float(np.mean([logprob for _, logprob in results]))}
        if len(results) > 1:
            row |= {"exact_match_low": max(0.0, low), "exact_match_high": min(1.0, high)}
        rows.append(row)
    return rows


def smallest(rows: Sequence[Row], share: float = 0.9) -> int | None:
    """The fewest top nodes of a `curve` that keep `share` of the recall with all of them; None if none do."""
    kept = [row for row in rows if row["kind"] == "keep" and row["order"] == "top"]
    kept.sort(key=lambda row: -row["nodes"])
    fewest = None
    for row in kept:  # from all nodes down, as long as the recall is enough
        enough = share * kept[0]["exact_match"] - 1e-9  # less what rounding may add
        if not row["exact_match"] or row["exact_match"] < enough:
            break
        fewest = row["nodes"]
    return fewest


def agreement(scores: np.ndarray, pset: ParamSet, anatomy: Anatomy, unit: str, permutations: int = 10_000) -> Row:
    """Are the nodes that matter those that hold the set's parameters?

    A node's importance |score| is compared with its share: how much of its parameters the set holds. Two numbers say
    how they agree, each with a two-sided permutation test that deals the shares out anew:

    - spearman: Spearman's correlation;
    - auc: the area under the ROC curve by which the share tells the critical nodes (the top tenth by importance) from
      the others.

    Importance and share both differ between layers for other reasons. So `within` is the correlation of ranks within
    each layer, less the layer's mean, and its test deals the shares out within layers only.

    concentration says how concentrated the set is in the critical nodes. It is their share of the set's parameters in
    nodes of this kind, minus their share of all parameters in such nodes, with a bootstrap that draws nodes.

    Returns:
        {unit, nodes, critical, spearman, spearman_p, within, within_p, auc, auc_p, concentration, concentration_low,
        concentration_high}; None where the set holds nothing of these nodes, or of all the same share (within: in every
        layer; concentration: only where it holds nothing).
    """
    sizes = anatomy.sizes(unit, list(pset.masks))
    in_scope = sizes > 0
    share = anatomy.count(pset, unit)[in_scope] / sizes[in_scope]
    importance = np.abs(scores)[in_scope]
    critical = np.zeros(len(importance), dtype=bool)
    critical[np.argsort(-importance, kind="stable")[: max(1, round(CRITICAL * len(importance)))]] = True
    row: Row = {"unit": unit, "nodes": int(in_scope.sum()), "critical": int(critical.sum())}
    row |= _concentration(anatomy.count(pset, unit)[in_scope], sizes[in_scope], critical)
    if len(importance) < 3 or np.ptp(share) == 0 or np.ptp(importance) == 0:
        return row | dict.fromkeys(("spearman", "spearman_p", "within", "within_p", "auc", "auc_p"))

    # All statistics are sums over ranks less their mean.
    share_ranks, importance_ranks = mean_ranks(share), mean_ranks(importance)
    share_ranks, importance_ranks = share_ranks - share_ranks.mean(), importance_ranks - importance_ranks.mean()
    norm = np.linalg.norm(share_ranks) * np.linalg.norm(importance_ranks)
    pairs = critical.sum() * (~critical).sum()
    rng = np.random.default_rng(_SEED)
    spearman, auc = np.empty(permutations + 1), np.empty(permutations + 1)
    for number in range(permutations + 1):
        dealt = rng.permutation(share_ranks) if number else share_ranks
        spearman[number] = dealt @ importance_ranks / norm
        auc[number] = 0.5 + dealt[critical].sum() / pairs
    layer = np.array([label.partition(".")[0] for label in anatomy.units(unit)])[in_scope]
    within = _correlations_within_layers(share, importance, layer, permutations, rng)
    return row | {
        "spearman": float(spearman[0]),
        "spearman_p": _p_value(spearman),
        "within": None if within is None else float(within[0]),
        "within_p": None if within is None else _p_value(within),
        "auc": float(auc[0]),
        "auc_p": _p_value(auc - 0.5),
    }


def _p_value(statistics: np.ndarray) -> float:
    """Two-sided: the share of the statistics that are as far from 0 as the first, the measured one, which counts."""
    return float((np.abs(statistics) >= abs(statistics[0]) - 1e-12).mean())


def _concentration(held: np.ndarray, sizes: np.ndarray, critical: np.ndarray, draws: int = 2000) -> Row:
    """The critical nodes' share of a set's parameters minus their share of all parameters.

    Its percentile interval is over draws of nodes.

    Args:
        held, sizes: [nodes] how many of each node's parameters the set has, and how many there are.
        critical: [nodes] bool.
    """
    names = ("concentration", "concentration_low", "concentration_high")
    if not held.sum():
        return dict.fromkeys(names)
    rng, n = np.random.default_rng(_SEED), len(held)
    columns = np.stack([held * critical, held, sizes * critical, sizes], axis=1).astype(float)
    at_once = max(1, 2_000_000 // n)
    times = [rng.multinomial(n, np.full(n, 1 / n), min(at_once, draws - done)) for done in range(0, draws, at_once)]
    sums = np.concatenate([counts @ columns for counts in times])
    sums = sums[sums[:, 1] > 0]  # without the draws of nodes of which the set has nothing
    low, high = np.quantile(sums[:, 0] / sums[:, 1] - sums[:, 2] / sums[:, 3], [0.025, 0.975])
    inside, whole, critical_sizes, all_sizes = columns.sum(0)
    return dict(zip(names, (float(inside / whole - critical_sizes / all_sizes), float(low), float(high))))


def _correlations_within_layers(
    share: np.ndarray, importance: np.ndarray, layer: np.ndarray, permutations: int, rng: np.random.Generator
) -> np.ndarray | None:
    """The correlation of ranks within layers [permutations + 1]: measured, then with the shares dealt out anew.

    None if one of the two differs within no layer.
    """
    layers = [np.flatnonzero(layer == name) for name in np.unique(layer)]
    share_ranks, importance_ranks = (np.empty(len(share)) for _ in range(2))
    for nodes in layers:
        for ranks, values in ((share_ranks, share), (importance_ranks, importance)):
            ranks[nodes] = mean_ranks(values[nodes]) - (len(nodes) + 1) / 2
    scale = np.linalg.norm(share_ranks) * np.linalg.norm(importance_ranks)
    if not scale:
        return None
    sums = np.zeros(permutations + 1)
    for nodes in layers:
        sums[0] += share_ranks[nodes] @ importance_ranks[nodes]
        for number in range(1, permutations + 1):
            sums[number] += rng.permutation(share_ranks[nodes]) @ importance_ranks[nodes]
    return sums / scale


def answer_batches(items: Sequence[Encoded], tokenizer: Any, size: int = 64) -> list[Batch]:
    """The texts with their answers as labels, shortest first, for `node_means` and `attribution`."""
    return list(batches(items, size, "answer", pad_id=pad_id(tokenizer), by_length=True))


def _answer_logprobs(recalled: Recall, items: Sequence[Encoded]) -> np.ndarray:
    """Log-probability a token of every answer; of questions only, which have one answer each."""
    tokens = np.array([int(item.targets["answer"].sum()) for item in items])
    if len(tokens) != len(recalled.logprob):
        raise UserError("circuits are of questions with one answer each; a text with several facts was given")
    return recalled.logprob / tokens


def _losses(model: nn.Module, batch: Batch) -> Tensor:
    return example_losses(forward(model, batch).logits, batch["labels"])


def _move_to_model(model: nn.Module, batch: Batch) -> Batch:
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in batch.items() if name != "group"}


def _sites(anatomy: Anatomy, units: Sequence[str]) -> list[str]:
    """The modules whose inputs are the units' nodes."""
    sites = [site for unit in units for site in anatomy.sites(unit)]
    unknown = [unit for unit in units if not anatomy.sites(unit)]
    if unknown:
        raise UserError(
            f"the model has no {unknown[0]} whose place is known ({anatomy.why(unknown[0])}); circuits need a model "
            "whose geometry crosstrace can read (docs/method.md, Centralization)"
        )
    return sites
