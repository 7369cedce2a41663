"""Position-aware grafting: tuned weights at chosen tokens, the base's at all others, in one forward pass.

As in dynamic weight grafting (arXiv 2506.20746): with all tuned weights at the subject's tokens alone, does the model
look up there what it will answer? At the last token alone, does it do so there? Every module that owns selected
parameters is computed twice from the same input, and each token takes the output of its own weights; so at all tokens
this is plain grafting, at none the base. Nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from crosstrace.core.errors import UserError
from crosstrace.data.tokens import Encoded
from crosstrace.models.anatomy import Anatomy
from crosstrace.models.forward import forward, without_cache
from crosstrace.models.modes import evaluating
from crosstrace.sets.interventions import check_values
from crosstrace.sets.paramset import ParamSet

PLACES = ("subject", "relation", "last", "rest")
# where the tuned weights are: alone, together, and everywhere but there
CHOICES: tuple[tuple[str, ...], ...] = (
    (), ("subject",), ("relation",), ("last",), ("subject", "relation"), ("subject", "last"), ("relation", "last"),
    ("relation", "last", "rest"), ("subject", "relation", "rest"), PLACES,
)  # fmt: skip
Positions = Callable[[Tensor], Tensor]  # input_ids [B, T] -> bool [B, T]


def at_places(items: Sequence[Encoded], places: Collection[str]) -> Positions:
    """Which tokens of these texts are at the places, for `grafted_at`; padding is at none.

    Args:
        items: texts about one fact each.
        places: of PLACES. subject and relation are all tokens of their words; last, the tokens that predict the answer,
            from the one before the object on; rest, all others. A token of two places is of the first in that order.

    Raises:
        UserError: an unknown place, or a text of several facts; of the result, a text that is none of these.
    """
    unknown = [place for place in places if place not in PLACES]
    if unknown:
        raise UserError(f"unknown place {unknown[0]!r} of a text; expected of {', '.join(PLACES)}")
    known: dict[tuple[int, ...], Tensor] = {}
    for item in items:
        if len(item.mentions) != 1:
            raise UserError(f"example {item.example.id} is about {len(item.mentions)} facts; places are those of one")
        known[tuple(item.ids.tolist())] = torch.isin(
            _places(item), torch.tensor([PLACES.index(place) for place in places])
        )
    lengths = sorted({len(ids) for ids in known}, reverse=True)

    def positions(ids: Tensor) -> Tensor:
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for row, tokens in enumerate(ids.tolist()):
            own = next((known[key] for n in lengths if (key := tuple(tokens[:n])) in known), None)
            if own is None:
                raise UserError("a text was given to the model whose places are not known; give all of them beforehand")
            mask[row, : len(own)] = own
        return mask.to(ids.device)

    return positions


def _places(item: Encoded) -> Tensor:
    """The number of each token's place in PLACES."""
    mention = item.mentions[0]
    place = torch.full((len(item.ids),), PLACES.index("rest"))
    place[max(0, int(mention.object.nonzero().min()) - 1) :] = PLACES.index("last")
    place[mention.relation] = PLACES.index("relation")
    place[mention.subject] = PLACES.index("subject")
    return place


@contextmanager
def grafted_at(
    model: nn.Module, pset: ParamSet, tuned: Mapping[str, Tensor], positions: Positions
) -> Iterator[nn.Module]:
    """Within the context, the base `model` uses the tuned values of the selected parameters at some tokens only.

    Args:
        tuned: name -> the values to put in.
        positions: of every forward's input_ids [B, T] the tokens [B, T] that get them. It may answer otherwise later
            on: entering costs a copy of the selected tensors and four short forwards, another choice of tokens nothing.

    Raises:
        UserError: a tensor of the set is missing or has another shape; a module that mixes positions within itself
            (Mamba's) owns some of them, so that they can't be told apart by token.
    """
    parameters = dict(model.named_parameters())
    names = {id(p): name for name, p in parameters.items()}
    touched = [name for name, count in pset.counts().items() if count]
    check_values(pset, touched, parameters, tuned)
    mixed = {}
    for name in touched:
        p, mask = parameters[name].detach(), pset.masks[name].to(parameters[name].device)
        mixed[name] = torch.where(mask, tuned[name].detach().to(p.device, p.dtype), p)

    owners: list[tuple[nn.Module, dict[str, Tensor]]] = []
    for path, module in model.named_modules():
        own = {local: mixed[names[id(p)]] for local, p in module._parameters.items()
               if p is not None and names[id(p)] in mixed}  # fmt: skip
        if own and any(True for child in module.children() for _ in child.parameters()):
            raise UserError(
                f"module {path!r} ({type(module).__name__}) has parameters of its own beside other modules, so it may "
                "mix positions; grafting at positions expects parameters in linear layers, embeddings, norms, experts"
            )
        if own:
            owners.append((module, own))
    current: list[Positions] = [lambda ids: torch.ones_like(ids, dtype=torch.bool)]
    now: list[Tensor] = []  # the tokens of the forward that is going on
    busy = False

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        now[:] = [current[0](kwargs["input_ids"] if "input_ids" in kwargs else args[0])]

    def choose(own: dict[str, Tensor], module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        nonlocal busy
        if busy:  # the second computation's own call
            return None
        busy = True
        try:
            other = torch.func.functional_call(module, own, args, kwargs)
        finally:
            busy = False
        leaves, tree = tree_flatten(output)
        others = tree_leaves(other)
        return tree_unflatten([pick(module, place, *pair) for place, pair in enumerate(zip(leaves, others))], tree)

    def pick(module: nn.Module, place: int, base: Any, grafted: Any) -> Any:
        if not isinstance(base, Tensor):
            return base
        where, axis = now[0], axes[id(module)][place]
        if axis is None:  # looked up once for all texts, without an axis for them
            base, grafted = (x.expand(len(where), *x.shape) for x in (base, grafted))
            mask = where
        elif axis == 0:  # all tokens of the batch in one row
            mask = where.flatten()
        else:
            mask = where.view(len(where), *[1] * (axis - 1), -1)
            if len(base) == 1 < len(where):  # looked up once for all texts, as positions are
                base, grafted = (x.expand(len(where), *x.shape[1:]) for x in (base, grafted))
        return torch.where(mask.view(*mask.shape, *[1] * (base.dim() - mask.dim())), grafted, base)

    axes = _token_axes(model, [module for module, _ in owners])
    owners = [owner for owner in owners if axes[id(owner[0])]]  # the others are not called, as those for images
    with ExitStack() as hooks:
        hooks.callback(model.register_forward_pre_hook(begin, with_kwargs=True).remove)
        for module, own in owners:
            hook = lambda module, args, kwargs, output, own=own: choose(own, module, args, kwargs, output)
            hooks.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        busy = True  # the model as it is, with the values that are to be put in
        wanted = _probe(model, mixed)
        busy = False
        found = _probe(model, {})  # put in at all tokens
        current[0] = positions
        if not torch.allclose(found, wanted, rtol=0.05, atol=0.05 * float(wanted.std())):
            raise UserError(
                f"{type(model).__name__} uses some of its parameters without calling the modules that they belong to, "
                "so they can't be grafted at positions; expected modules that are called"
            )
        yield model


def _probe(model: nn.Module, values: dict[str, Tensor]) -> Tensor:
    """Logits of two short texts, with other values of some parameters."""
    ids = torch.zeros(2, 5, dtype=torch.long, device=next(model.parameters()).device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **without_cache(model)}
    with evaluating(model):
        return torch.func.functional_call(model, values, kwargs=inputs).logits


def components(anatomy: Anatomy, names: Sequence[str] | None = None) -> dict[str, ParamSet]:
    """The sets whose tuned values are put in: every parameter, those of attention, those of the MLPs (with experts and
    routers); of all parameters or of `names` alone."""
    belongs: dict[str, Callable[[str], bool]] = {
        "all": lambda kind: True,
        "attention": lambda kind: kind.startswith("attention."),
        "mlp": lambda kind: kind.startswith("mlp.") or kind in ("experts", "router"),
    }
    found = {
        name: anatomy.whole([n for n in names or anatomy.shapes if wanted(anatomy.kind[n])], name)
        for name, wanted in belongs.items()
    }
    return {name: pset for name, pset in found.items() if pset.masks}


def _token_axes(model: nn.Module, modules: Sequence[nn.Module]) -> dict[int, list[int | None]]:
    """Along which axis of its outputs each module has the tokens: seen from texts of two lengths.

    0 stands for B·T rows, None for T rows, alike for all texts; no shape by itself could tell tokens from heads.
    """
    shapes: dict[int, list[list[torch.Size]]] = {id(module): [] for module in modules}
    note = lambda module, args, output: shapes[id(module)].append(
        [x.shape if isinstance(x, Tensor) else torch.Size() for x in tree_leaves(output)]
    )
    device = next(model.parameters()).device
    with ExitStack() as hooks, evaluating(model):
        for module in modules:
            hooks.callback(module.register_forward_hook(note).remove)
        for length in (5, 7):
            ids = torch.zeros(2, length, dtype=torch.long, device=device)
            forward(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    axes: dict[int, list[int | None]] = {}
    for module in modules:
        seen = shapes[id(module)]
        half = len(seen) // 2  # a module may be called more than once in a forward
        axes[id(module)] = []
        for short, long in zip(seen[0], seen[half]) if seen else ():
            changed = [i for i, (a, b) in enumerate(zip(short, long)) if a != b]
            sizes = [(short[i], long[i]) for i in changed]
            if short and sizes != [(5, 7)] and (sizes, changed) != ([(10, 14)], [0]):
                raise UserError(
                    f"a {type(module).__name__} gives {list(short)} for two texts of 5 tokens, in which tokens can't "
                    "be told apart; grafting at positions expects one output for each token"
                )
            axes[id(module)].append(None if sizes == [(5, 7)] and changed == [0] else changed[0] if changed else 0)
    return axes
