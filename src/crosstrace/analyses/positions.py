"""Position-aware grafting: tuned weights at chosen tokens, the base's at all others, in one forward pass.

As in dynamic weight grafting (arXiv 2506.20746): with all tuned weights at the subject's tokens alone, does the model
look up there what it will answer? At the last token alone, does it do so there?

Every module that owns selected parameters is computed twice from the same input, and each token takes the output of its
own weights. So at all tokens this is plain grafting, and at none it is the base. Nothing is measured here.
"""

from __future__ import annotations

import functools
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
    (),
    ("subject",),
    ("relation",),
    ("last",),
    ("subject", "relation"),
    ("subject", "last"),
    ("relation", "last"),
    ("relation", "last", "rest"),
    ("subject", "relation", "rest"),
    PLACES,
)
Positions = Callable[[Tensor], Tensor]  # input_ids [B, T] -> bool [B, T]


def at_places(items: Sequence[Encoded], places: Collection[str]) -> Positions:
    """Which tokens of these texts are at the places, for `grafted_at`; padding is at none.

    Args:
        items: texts about one fact each.
        places: of PLACES. subject and relation are all tokens of their words; last, the tokens that predict the answer,
            from the one before the object on; rest, all others. A token of two places is of the first in that order.

    Raises:
        UserError: an unknown place, or a text of several facts. What is returned raises it for a text that is none of
            these.
    """
    unknown = [place for place in places if place not in PLACES]
    if unknown:
        raise UserError(f"unknown place {unknown[0]!r} of a text; expected of {', '.join(PLACES)}")
    chosen = torch.tensor([PLACES.index(place) for place in places])
    masks: dict[tuple[int, ...], Tensor] = {}  # by the ids of the text
    for item in items:
        if len(item.mentions) != 1:
            raise UserError(f"example {item.example.id} is about {len(item.mentions)} facts; places are those of one")
        masks[tuple(item.ids.tolist())] = torch.isin(_place_numbers(item), chosen)
    lengths = sorted({len(ids) for ids in masks}, reverse=True)

    def positions(ids: Tensor) -> Tensor:
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for row, tokens in enumerate(ids.tolist()):
            starts = (tuple(tokens[:length]) for length in lengths)  # without padding, the text is one of these
            text = next((start for start in starts if start in masks), None)
            if text is None:
                raise UserError("a text was given to the model whose places are not known; give all of them beforehand")
            mask[row, : len(text)] = masks[text]
        return mask.to(ids.device)

    return positions


def _place_numbers(item: Encoded) -> Tensor:
    """The number in PLACES of each token's place."""
    mention = item.mentions[0]
    numbers = torch.full((len(item.ids),), PLACES.index("rest"))
    numbers[max(0, int(mention.object.nonzero().min()) - 1) :] = PLACES.index("last")
    numbers[mention.relation] = PLACES.index("relation")
    numbers[mention.subject] = PLACES.index("subject")
    return numbers


class _TokenGraft:
    """Hooks that give each token of a forward the output of its own weights.

    Attributes:
        positions: which tokens get the tuned values; all of them at first.
        is_recomputing: whether the second computation of a module is going on; the hooks then leave outputs alone.
    """

    def __init__(self, axes: Mapping[int, Sequence[int | None]]) -> None:
        self.positions: Positions = _every_position
        self.is_recomputing = False
        self._axes = axes
        self._mask = torch.empty(0)  # the chosen tokens of the forward that is going on, bool [B, T]

    def note_tokens(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the model's forward: choose the tokens."""
        self._mask = self.positions(kwargs["input_ids"] if "input_ids" in kwargs else args[0])

    def mix_output(self, values: dict[str, Tensor], module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """After a module's forward: its output, with that of the tuned `values` at the chosen tokens."""
        if self.is_recomputing:
            return None
        self.is_recomputing = True
        try:
            tuned_output = torch.func.functional_call(module, values, args, kwargs)
        finally:
            self.is_recomputing = False
        leaves, tree = tree_flatten(output)
        pairs = zip(leaves, tree_leaves(tuned_output))
        axes = self._axes[id(module)]
        return tree_unflatten([self._mix(axes[number], *pair) for number, pair in enumerate(pairs)], tree)

    def _mix(self, axis: int | None, base: Any, tuned: Any) -> Any:
        """One output: `tuned` at the chosen tokens, which lie along `axis` (see `_token_axes`), and else `base`."""
        if not isinstance(base, Tensor):
            return base
        mask = self._mask
        texts = len(mask)
        if axis is None:  # looked up once for all texts, without an axis for them
            base, tuned = (x.expand(texts, *x.shape) for x in (base, tuned))
        elif axis == 0:  # all tokens of the batch in one row
            mask = mask.flatten()
        else:
            mask = mask.view(texts, *[1] * (axis - 1), -1)
            if len(base) == 1 < texts:  # looked up once for all texts, as positions are
                base, tuned = (x.expand(texts, *x.shape[1:]) for x in (base, tuned))
        return torch.where(mask.view(*mask.shape, *[1] * (base.dim() - mask.dim())), tuned, base)


def _every_position(ids: Tensor) -> Tensor:
    return torch.ones_like(ids, dtype=torch.bool)


@contextmanager
def grafted_at(
    model: nn.Module, pset: ParamSet, tuned: Mapping[str, Tensor], positions: Positions
) -> Iterator[nn.Module]:
    """Within the context, the base `model` uses the tuned values of the selected parameters at some tokens only.

    Args:
        tuned: name -> the values to put in.
        positions: which tokens [B, T] get them, from every forward's input_ids [B, T]. It may answer otherwise later
            on: entering costs a copy of the selected tensors and four short forwards, another choice of tokens nothing.

    Raises:
        UserError: a tensor of the set is missing or has another shape; or a module that mixes positions within itself
            (Mamba's) owns some of them, so that its tokens can't be told apart.
    """
    grafted_values = _grafted_values(model, pset, tuned)
    owners = _owners(model, grafted_values)
    axes = _token_axes(model, [module for module, _ in owners])
    graft = _TokenGraft(axes)
    with ExitStack() as hooks:
        hooks.callback(model.register_forward_pre_hook(graft.note_tokens, with_kwargs=True).remove)
        for module, values in owners:
            if axes[id(module)]:  # some modules are not called, as those for images
                hook = functools.partial(graft.mix_output, values)
                hooks.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        graft.is_recomputing = True  # for the hooks to leave the outputs of the whole grafted model alone
        expected = _short_logits(model, grafted_values)
        graft.is_recomputing = False
        logits = _short_logits(model, {})  # grafted at every token
        graft.positions = positions
        if not torch.allclose(logits, expected, rtol=0.05, atol=0.05 * float(expected.std())):
            raise UserError(
                f"{type(model).__name__} uses some of its parameters without calling the modules that they belong to, "
                "so they can't be grafted at positions; expected modules that are called"
            )
        yield model


def _grafted_values(model: nn.Module, pset: ParamSet, tuned: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that have selected parameters, with the tuned values of those."""
    parameters = dict(model.named_parameters())
    touched = [name for name, count in pset.counts().items() if count]
    check_values(pset, touched, parameters, tuned)
    values = {}
    for name in touched:
        p, mask = parameters[name].detach(), pset.masks[name].to(parameters[name].device)
        values[name] = torch.where(mask, tuned[name].detach().to(p.device, p.dtype), p)
    return values


def _owners(model: nn.Module, values: Mapping[str, Tensor]) -> list[tuple[nn.Module, dict[str, Tensor]]]:
    """The modules that own tensors of `values`, and those values by the names that the module itself gives them.

    Raises:
        UserError: such a module has other modules with parameters below it.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    owners: list[tuple[nn.Module, dict[str, Tensor]]] = []
    for path, module in model.named_modules():
        full_names = {local: names[id(p)] for local, p in module._parameters.items() if p is not None}
        module_values = {local: values[name] for local, name in full_names.items() if name in values}
        if not module_values:
            continue
        if any(True for child in module.children() for _ in child.parameters()):
            raise UserError(
                f"module {path!r} ({type(module).__name__}) has parameters of its own beside other modules, so it may "
                "mix positions; grafting at positions expects parameters in linear layers, embeddings, norms, experts"
            )
        owners.append((module, module_values))
    return owners


def _short_logits(model: nn.Module, values: dict[str, Tensor]) -> Tensor:
    """Logits of two short texts, with other values of some parameters."""
    ids = torch.zeros(2, 5, dtype=torch.long, device=next(model.parameters()).device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **without_cache(model)}
    with evaluating(model):
        return torch.func.functional_call(model, values, kwargs=inputs).logits


def components(anatomy: Anatomy, names: Sequence[str] | None = None) -> dict[str, ParamSet]:
    """The sets whose tuned values are put in: every parameter, those of attention, and those of the MLPs (with experts
    and routers). They are of all parameters, or of `names` alone."""
    sets = {}
    for component in ("all", "attention", "mlp"):
        chosen = [name for name in names or anatomy.shapes if _is_in(component, anatomy.kind[name])]
        sets[component] = anatomy.whole(chosen, component)
    return {component: pset for component, pset in sets.items() if pset.masks}


def _is_in(component: str, kind: str) -> bool:
    """Whether a kind of tensor belongs to one of the `components`."""
    if component == "attention":
        return kind.startswith("attention.")
    if component == "mlp":
        return kind.startswith("mlp.") or kind in ("experts", "router")
    return True


def _token_axes(model: nn.Module, modules: Sequence[nn.Module]) -> dict[int, list[int | None]]:
    """Along which axis of its outputs each module has the tokens, by the module's id.

    No single shape could tell tokens from heads, so the axes are found from texts of two lengths. 0 stands for B·T
    rows; None for T rows, alike for all texts.
    """
    shapes: dict[int, list[list[torch.Size]]] = {id(module): [] for module in modules}

    def note_shapes(module: nn.Module, args: Any, output: Any) -> None:
        shapes[id(module)].append([x.shape if isinstance(x, Tensor) else torch.Size() for x in tree_leaves(output)])

    device = next(model.parameters()).device
    with ExitStack() as hooks, evaluating(model):
        for module in modules:
            hooks.callback(module.register_forward_hook(note_shapes).remove)
        for length in (5, 7):
            ids = torch.zeros(2, length, dtype=torch.long, device=device)
            forward(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    axes: dict[int, list[int | None]] = {}
    for module in modules:
        calls = shapes[id(module)]
        half = len(calls) // 2  # a module may be called more than once in a forward
        axes[id(module)] = []
        for short, long in zip(calls[0], calls[half]) if calls else ():
            changed = [i for i, (a, b) in enumerate(zip(short, long)) if a != b]
            sizes = [(short[i], long[i]) for i in changed]
            if short and sizes != [(5, 7)] and (sizes, changed) != ([(10, 14)], [0]):
                raise UserError(
                    f"a {type(module).__name__} gives {list(short)} for two texts of 5 tokens, in which tokens can't "
                    "be told apart; grafting at positions expects one output for each token"
                )
            axes[id(module)].append(None if sizes == [(5, 7)] and changed == [0] else changed[0] if changed else 0)
    return axes
