"""Lens: how a recalled object comes about along the layers, and what the heads that matter look at on the way.

The logit lens (nostalgebraist 2020) reads every layer's hidden state as if the layers after it were not there: through
the model's own final norm and unembedding. It tells what can be read off a state in that way, not what the layers after
it do with it. An attention pattern tells where a head looks, not what it takes from there.

Takes a model and encoded texts about one fact each; it knows no strategies, and draws nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosstrace.analyses.consistency import PLACES, hidden_states, mean_over_people, places
from crosstrace.core.errors import UserError
from crosstrace.data.tokens import Batch, Encoded, collate
from crosstrace.models.anatomy import Anatomy
from crosstrace.models.forward import forward
from crosstrace.models.modes import evaluating

GROUPS = ("subject", "relation", "first", "self", "rest")
LOOKING = ("subject", "answer")  # the tokens whose attention is told
Row = dict[str, Any]
_ROWS = 256  # states that are unembedded at once: the logits of a large vocabulary are what takes memory


# ------------------------------------------------------------------------------- logit lens


def logit_lens(model: nn.Module, items: Sequence[Encoded], *, pad_id: int, batch_size: int = 64) -> list[Row]:
    """The object's first token, read off the hidden states of every layer where the subject ends, the relation ends,
    and the object is predicted (`answer`: the token before the object).

    The states are those that each layer gets, and what the final norm gets; all of them go through the model itself
    from its final norm on, so that at `answer` the last layer's reading is the model's own prediction. If the model
    keeps several streams beside each other, the state of a layer is all of them, and the model joins them as it joins
    those that its last layer gives.

    Args:
        items: texts about one fact each. A text without a place (see `consistency.places`) is left out there.
        pad_id: of the tokenizer.

    Returns:
        a row for each place and layer (0: the embeddings; the last is the model's own output): place, layer; logprob:
        mean log-probability of the object's first token, in nats; rank: its median rank, 1 = first, with ties counted
        against it; mrr, the mean reciprocal rank; top1: how often it is first; margin: mean of its log-probability
        minus the mean one of the first tokens of the relation's other objects among the texts, each counted once, so
        that who knows the relation but not the fact has about 0; facts, people. logprob, top1 and margin have
        `_low` and `_high`, 95 % cluster bootstraps over people; margin is None where a relation has one object only.

    Raises:
        UserError: no text, or one about several facts; the model's final norm can't be told.
    """
    _check(items)
    norm = final_norm(model, items[0].ids)
    objects = [int(item.ids[item.mentions[0].object][0]) for item in items]
    relations = [item.example.mentions[0].relation for item in items]
    tokens = sorted(set(objects))
    of_relation = {(relation, token) for relation, token in zip(relations, objects)}
    others = torch.tensor(
        [[(relation, token) in of_relation and token != own for token in tokens]
         for relation, own in zip(relations, objects)]
    )  # fmt: skip
    found: dict[str, dict[int, np.ndarray]] = {place: {} for place in PLACES}  # text -> [layers, 3]
    order = sorted(range(len(items)), key=lambda i: len(items[i].ids))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        with _residual_stream(model, norm):
            states = hidden_states(model, [items[i] for i in chosen], pad_id, batch_size)
        where = [(i, place) for i, own in zip(chosen, states) for place in own]
        if not where:
            continue
        # every state of every text and layer, one after the other
        flat = [state for own in states for layers in own.values() for state in layers]
        texts = torch.tensor([i for i, _ in where]).repeat_interleave(len(flat) // len(where))
        read = torch.empty(len(flat), 3, dtype=torch.float64)
        in_streams = torch.tensor([state.dim() == 2 for state in flat])
        if in_streams.any():
            check_joined(model, items[0].ids)
        for alike in (in_streams, ~in_streams):
            for part in alike.nonzero()[:, 0].split(_ROWS) if alike.any() else ():
                own, of = torch.stack([flat[number] for number in part]), texts[part]
                logits = joined(model, own) if in_streams[part[0]] else unembedded(model, norm, own)
                read[part] = _read(logits, [objects[i] for i in of], tokens, others[of])
        for (i, place), values in zip(where, read.view(len(where), -1, 3).numpy()):
            found[place][i] = values
    rows = []
    for place, there in found.items():
        people = [items[i].example.person for i in there]
        for layer, values in enumerate(np.stack(list(there.values()), 1) if there else ()):
            logprob, rank, margin = values.T
            row: Row = {"place": place, "layer": layer} | mean_over_people("logprob", logprob, people)
            row |= {"rank": float(np.median(rank)), "mrr": float(np.mean(1 / rank))}
            row |= mean_over_people("top1", rank == 1, people) | mean_over_people("margin", margin, people)
            rows.append(row | {"facts": len(people), "people": len(set(people))})
    return rows


def _read(logits: Tensor, own: Sequence[int], tokens: Sequence[int], others: Tensor) -> Tensor:
    """Log-probability of the own token, its rank, and the margin over the mean of the others' [n, 3], in float64.

    Args:
        logits: [n, V].
        own: n tokens.
        tokens, others: [K] and bool [n, K]: of which tokens the others are.
    """
    at = torch.tensor(own, device=logits.device).unsqueeze(1)
    logprobs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    rank = (~(logits < logits.gather(1, at))).sum(1).cpu()
    value = logprobs.gather(1, at)[:, 0].double().cpu()
    mean = (logprobs[:, list(tokens)].double().cpu() * others).sum(1) / others.sum(1)  # NaN where there are none
    return torch.stack([value, rank.double(), value - mean], 1)


@contextmanager
def _residual_stream(model: nn.Module, norm: nn.Module) -> Iterator[None]:
    """The model with other hidden_states: what each layer gets, and what the final norm gets.

    Those of transformers end after the norm for most models, and Mamba's leave the embeddings out.

    Raises:
        UserError: as `_layers`.
    """
    layers = _layers(model)
    seen: list[Tensor] = []
    note = lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"])

    def give(module: nn.Module, args: Any, output: Any) -> None:
        output.hidden_states = tuple(seen)
        seen.clear()

    with ExitStack() as hooks:
        for module in (*layers, norm):
            hooks.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
        hooks.callback(model.register_forward_hook(give).remove)
        yield


def _layers(model: nn.Module) -> nn.ModuleList:
    """The model's layers, in their order.

    Raises:
        UserError: it can't be told which of its modules they are.
    """
    whole: Any = model
    decoder = getattr(model, "get_decoder", lambda: None)()
    number = whole.config.get_text_config().num_hidden_layers
    modules = (decoder if isinstance(decoder, nn.Module) else model).modules()
    layers = next((m for m in modules if isinstance(m, nn.ModuleList) and len(m) == number), None)
    if layers is None:
        raise UserError(
            f"the layers of {type(model).__name__} could not be told; expected a list of {number} modules, as many as "
            "its config says"
        )
    return layers


def final_norm(model: nn.Module, ids: Tensor) -> nn.Module:
    """The norm between the last layer and the unembedding: from its input on, the model does nothing that needs more
    than the state of one token.

    It is the last norm outside the layers that is called when the text `ids` [T] is read; that its input alone gives
    the model's logits is checked.

    Raises:
        UserError: there is no such norm.
    """
    called: list[tuple[nn.Module, Tensor]] = []
    text = {"input_ids": ids.unsqueeze(0), "attention_mask": torch.ones_like(ids).unsqueeze(0)}
    note = lambda module, args, output: called.append((module, args[0])) if args else None
    with ExitStack() as hooks, evaluating(model):
        for path, module in model.named_modules():
            if "norm" in type(module).__name__.lower() and not any(part.isdigit() for part in path.split(".")):
                hooks.callback(module.register_forward_hook(note).remove)
        logits = forward(model, text).logits[0]
    if called:
        norm, states = called[-1]
        try:
            found = unembedded(model, norm, states[0])
        except (RuntimeError, IndexError):  # more than an unembedding comes after it, for which the shapes don't fit
            found = torch.empty(0)
        if found.shape == logits.shape and torch.allclose(found, logits, rtol=0.05, atol=0.05 * float(logits.std())):
            return norm
    raise UserError(
        f"no norm between the last layer and the unembedding of {type(model).__name__} could be told, through which "
        "the logit lens reads the states of earlier layers; expected a model that ends with a norm and an unembedding"
    )


def unembedded(model: nn.Module, norm: nn.Module, states: Tensor) -> Tensor:
    """Logits [n, V] of states [n, width] that enter the model at its final norm.

    The model itself goes on from there, so that a projection, scaling or cap of its logits is not forgotten; what it
    does before, for a text of one token, is thrown away.
    """
    ids = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    put = lambda module, args: (states.unsqueeze(1).to(args[0].device, args[0].dtype), *args[1:])
    with norm.register_forward_pre_hook(put), evaluating(model):
        return forward(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits.flatten(0, 1)


def joined(model: nn.Module, states: Tensor) -> Tensor:
    """Logits [n, V] of states [n, streams, width] of a model that keeps several streams beside each other.

    They take the place of what the last layer gives, and the model itself joins the streams to one state and goes on.

    Raises:
        UserError: as `_layers`.
    """
    ids = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    last = _layers(model)[-1]

    def put(module: nn.Module, args: Any, output: Any) -> Any:
        own = output[0] if isinstance(output, tuple) else output
        new = states.unsqueeze(1).to(own)  # [n, one token, streams, width]
        if len(own) > 1:  # the streams come first
            new = new.movedim(2, 0)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    with last.register_forward_hook(put), evaluating(model):
        return forward(model, text).logits.flatten(0, 1)


def check_joined(model: nn.Module, ids: Tensor) -> None:
    """Raise a `UserError` if what the last layer gives for the text `ids` [T] does not alone give the model's logits
    of it, by `joined`."""
    given: list[Tensor] = []
    note = lambda module, args, output: given.append(output[0] if isinstance(output, tuple) else output)
    with _layers(model)[-1].register_forward_hook(note), evaluating(model):
        text = {"input_ids": ids.unsqueeze(0), "attention_mask": torch.ones_like(ids).unsqueeze(0)}
        wanted = forward(model, text).logits[0]
    states = given[0][:, 0].movedim(0, 1) if len(given[0]) > 1 else given[0][0]  # [T, streams, width]
    if not torch.allclose(joined(model, states), wanted, rtol=0.05, atol=0.05 * float(wanted.std())):
        raise UserError(
            f"{type(model).__name__} joins its streams by more than what the last layer gives, so the logit lens can't "
            "read those of earlier layers; expected a model that goes on from the last layer's states alone"
        )


# ------------------------------------------------------------------------------- attention patterns


def attention_patterns(
    model: nn.Module, items: Sequence[Encoded], heads: Sequence[int], *, pad_id: int, batch_size: int = 64
) -> list[Row]:
    """How much of its attention a head pays to what, from the subject's last token and from the one before the object.

    Every token that is visible from there (in a sliding window: within it) is in one of GROUPS, the first that fits:
    the subject's tokens (all that name the person, in other sentences too), the words of the relation, the first token
    of the text (where heads look that look for nothing), the token itself, the rest. So `first` is empty where a text
    begins with its subject, and `self` is at the place `subject`.

    Args:
        items: texts about one fact each. A text without a place (see `consistency.places`) is left out there.
        heads: numbers of query heads, as `Anatomy(model).units("query_head")` lists them.
        pad_id: of the tokenizer.

    Returns:
        a row for each head, place (of LOOKING) and group: head (its label), place, group; mass: mean of the sum of the
        attention to the group, with mass_low and mass_high, a 95 % cluster bootstrap over people; uniform: what mass
        would be if all visible tokens got the same (GPT-Neo's local layers do not tell how far they see: there, all
        before count); facts, people. The groups' masses sum to 1 but for rounding in the model's dtype, and for what a
        head gives to a sink of its own that is no token (GPT-OSS).

    Raises:
        UserError: no text, or one about several facts; a head that the model does not have, or whose place is not
            known; a model without attention weights.
    """
    _check(items)
    anatomy = Anatomy(model)
    labels = anatomy.units("query_head")
    if not labels:
        raise UserError(
            f"{type(model).__name__} has no attention heads whose place is known, so no patterns of theirs: "
            f"{anatomy.why('query_head')}"
        )
    unknown = [head for head in heads if not 0 <= head < len(labels)]
    if unknown:
        raise UserError(f"query head {unknown[0]} was asked for; expected numbers from 0 to {len(labels) - 1}")
    asked: dict[str, tuple[list[int], list[int]]] = {}  # attention module -> which of `heads` it has, and where in it
    for site, index in anatomy.sites("query_head").items():
        inside = index.unique().tolist()
        own = [(number, inside.index(head)) for number, head in enumerate(heads) if head in inside]
        if own:
            asked[site.rpartition(".")[0]] = [number for number, _ in own], [head for _, head in own]
    at = [places(item) for item in items]
    shape = (len(heads), len(LOOKING), len(items), len(GROUPS))
    mass, uniform = np.full(shape, np.nan), np.full(shape, np.nan)
    order = sorted(range(len(items)), key=lambda i: len(items[i].ids))
    with evaluating(model), _eager(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            seen = _attentions(model, collate([items[i] for i in chosen], pad_id=pad_id), list(asked))
            for row, i in enumerate(chosen):
                for looking, place in enumerate(LOOKING):
                    if place not in at[i]:
                        continue
                    token = at[i][place]
                    groups = _groups(items[i], token)
                    for path, (numbers, inner) in asked.items():
                        weights, visible = (x[row, inner, token, : len(groups)].double() for x in seen[path])
                        mass[numbers, looking, i] = weights @ groups
                        uniform[numbers, looking, i] = visible @ groups / visible.sum(1, keepdim=True)
    rows = []
    for number, head in enumerate(heads):
        for looking, place in enumerate(LOOKING):
            there = [i for i, own in enumerate(at) if place in own]
            people = [items[i].example.person for i in there]
            for group, name in enumerate(GROUPS if there else ()):
                cells = number, looking, there, group
                row = {"head": labels[head], "place": place, "group": name}
                row |= mean_over_people("mass", mass[cells], people) | {"uniform": float(uniform[cells].mean())}
                rows.append(row | {"facts": len(people), "people": len(set(people))})
    return rows


def _attentions(model: nn.Module, batch: Batch, modules: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """What some attention modules pay to which tokens, and which those can be: path -> (weights [B, heads, T, T], bool
    of the same shape), on the CPU."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    length = batch["input_ids"].shape[1]

    def note(path: str, module: nn.Module, kwargs: dict[str, Any], output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if not isinstance(weights, Tensor) or weights.shape[-2:] != (length, length):
            raise UserError(
                f"{path} ({type(module).__name__}) does not tell its attention weights, even with the eager kernel; "
                "attention patterns need a transformers model that honours output_attentions"
            )
        mask = kwargs.get("attention_mask")  # it knows of windows; a weight of 0 is not yet a token out of sight
        if mask is None:
            mask = torch.ones(length, length, dtype=torch.bool, device=weights.device).tril()
        elif mask.dtype != torch.bool:
            mask = mask > torch.finfo(mask.dtype).min / 2
        seen[path] = weights.cpu(), mask.expand(weights.shape).cpu()

    with ExitStack() as hooks:
        for path in modules:
            hook = lambda module, args, kwargs, output, path=path: note(path, module, kwargs, output)
            hooks.callback(model.get_submodule(path).register_forward_hook(hook, with_kwargs=True).remove)
        forward(model, batch, output_attentions=True)
    return seen


def _groups(item: Encoded, token: int) -> Tensor:
    """Which of GROUPS each token of a text is in, seen from one of them: one-hot [T, groups], float64."""
    mention = item.mentions[0]
    group = torch.full((len(item.ids),), GROUPS.index("rest"))
    group[token] = GROUPS.index("self")
    group[0] = GROUPS.index("first")
    group[mention.relation] = GROUPS.index("relation")
    for place in (mention, *item.context):
        group[place.subject] = GROUPS.index("subject")
    return F.one_hot(group, len(GROUPS)).double()


@contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """The model with the attention kernel that tells its weights; with its own afterwards.

    By the configs, which the modules ask at every forward: `set_attn_implementation` leaves Falcon's as it is, and
    does not tell which kernels of a model's parts to put back.
    """
    found = (getattr(module, "config", None) for module in model.modules())
    configs: dict[int, Any] = {id(config): config for config in found if hasattr(config, "_attn_implementation")}
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation_internal = "eager"
        yield
    finally:
        for config, kernel in before:
            config._attn_implementation_internal = kernel


def _check(items: Sequence[Encoded]) -> None:
    if not items:
        raise UserError("no text was given; expected texts about one fact each")
    several = next((item for item in items if len(item.mentions) != 1), None)
    if several is not None:
        raise UserError(
            f"example {several.example.id} is about {len(several.mentions)} facts; expected texts about one fact each, "
            "as `Encoded.about` cuts them"
        )
