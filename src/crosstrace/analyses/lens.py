"""Lens: how a recalled object comes about along the layers, and what the important heads attend to on the way.

The logit lens (nostalgebraist 2020) reads every layer's hidden state as if the layers after it were not there: through
the model's own final norm and unembedding. It says what can be read from a state in that way, not what the later layers
do with it. An attention pattern says where a head looks, not what it takes from there.

Takes a model and encoded texts about one fact each; it knows no strategies, and draws nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import product
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
LOOKING = ("subject", "answer")  # the places from which attention is measured
Row = dict[str, Any]
_ROWS = 256  # states that are unembedded at once: the logits of a large vocabulary take the memory


def logit_lens(model: nn.Module, items: Sequence[Encoded], *, pad_id: int, batch_size: int = 64) -> list[Row]:
    """The object's first token, read from the hidden states of every layer at three places of the texts: where the
    subject ends, where the relation ends, and where the object is predicted (`answer`: the token before the object).

    The states are the inputs of each layer, and the input of the final norm. All of them go through the model itself
    from its final norm on. So at `answer` the last layer's reading is the model's own prediction. If the model keeps
    several streams beside each other, the state of a layer is all of them, and the model joins them as it joins the
    streams after its last layer.

    Args:
        items: texts about one fact each. A text without a place (see `consistency.places`) is left out there.
        pad_id: of the tokenizer.

    Returns:
        a row for each place and layer (0: the embeddings; the last is the model's own output): place, layer; logprob:
        mean log-probability of the object's first token, in nats; rank: its median rank, 1 = first, with ties counted
        against it; mrr: the mean reciprocal rank; top1: how often it is first; margin: the mean of its log-probability
        minus that of the first tokens of the relation's other objects among the texts, each counted once; a model that
        knows the relation but not the fact has about 0; facts, people. logprob, top1 and margin have `_low` and
        `_high`, 95 % cluster bootstraps over people; margin is None if a relation has one object only.

    Raises:
        UserError: there is no text, or one about several facts; or the model's final norm can't be found.
    """
    _check_texts(items)
    norm = final_norm(model, items[0].ids)
    objects = [int(item.ids[item.mentions[0].object][0]) for item in items]
    relations = [item.example.mentions[0].relation for item in items]
    tokens = sorted(set(objects))
    of_relation = {(relation, token) for relation, token in zip(relations, objects)}
    others = torch.tensor(
        [
            [(relation, token) in of_relation and token != object for token in tokens]
            for relation, object in zip(relations, objects)
        ]
    )
    readings: dict[str, dict[int, np.ndarray]] = {place: {} for place in PLACES}  # place -> text -> [layers, 3]
    order = sorted(range(len(items)), key=lambda i: len(items[i].ids))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        with _residual_stream(model, norm):
            states_of = hidden_states(model, [items[i] for i in chosen], pad_id, batch_size)
        where = [(i, place) for i, by_place in zip(chosen, states_of) for place in by_place]
        if not where:
            continue
        # every state of every text, place and layer, one after the other
        states = [state for by_place in states_of for layers in by_place.values() for state in layers]
        texts = torch.tensor([i for i, _ in where]).repeat_interleave(len(states) // len(where))
        values = torch.empty(len(states), 3, dtype=torch.float64)
        in_streams = torch.tensor([state.dim() == 2 for state in states])
        if in_streams.any():
            check_joined(model, items[0].ids)
        for same_kind in (in_streams, ~in_streams):
            for part in same_kind.nonzero()[:, 0].split(_ROWS) if same_kind.any() else ():
                some, of = torch.stack([states[number] for number in part]), texts[part]
                logits = joined(model, some) if in_streams[part[0]] else unembedded(model, norm, some)
                values[part] = _read(logits, [objects[i] for i in of], tokens, others[of])
        for (i, place), of_layers in zip(where, values.view(len(where), -1, 3).numpy()):
            readings[place][i] = of_layers
    return _lens_rows(readings, items)


def _lens_rows(readings: Mapping[str, Mapping[int, np.ndarray]], items: Sequence[Encoded]) -> list[Row]:
    """The rows of `logit_lens`.

    Args:
        readings: place -> number of the text -> what `_read` gives for each layer [layers, 3].
    """
    rows = []
    for place, by_text in readings.items():
        people = [items[i].example.person for i in by_text]
        for layer, values in enumerate(np.stack(list(by_text.values()), 1) if by_text else ()):
            logprob, rank, margin = values.T
            row: Row = {"place": place, "layer": layer} | mean_over_people("logprob", logprob, people)
            row |= {"rank": float(np.median(rank)), "mrr": float(np.mean(1 / rank))}
            row |= mean_over_people("top1", rank == 1, people) | mean_over_people("margin", margin, people)
            rows.append(row | {"facts": len(people), "people": len(set(people))})
    return rows


def _read(logits: Tensor, objects: Sequence[int], tokens: Sequence[int], others: Tensor) -> Tensor:
    """Log-probability of the object's token, its rank, and its margin over the mean of the others [n, 3], in float64.

    Args:
        logits: [n, V].
        objects: n tokens, one of each row.
        tokens, others: [K] tokens, and bool [n, K]: which of them are a row's others.
    """
    column = torch.tensor(objects, device=logits.device).unsqueeze(1)
    logprobs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    rank = (~(logits < logits.gather(1, column))).sum(1).cpu()
    value = logprobs.gather(1, column)[:, 0].double().cpu()
    mean = (logprobs[:, list(tokens)].double().cpu() * others).sum(1) / others.sum(1)  # NaN if there are none
    return torch.stack([value, rank.double(), value - mean], 1)


@contextmanager
def _residual_stream(model: nn.Module, norm: nn.Module) -> Iterator[None]:
    """Within the context, the model's hidden_states are the inputs of each layer, and the input of the final norm.

    Those of transformers itself end after the norm for most models, and Mamba's leave the embeddings out.

    Raises:
        UserError: as `_layers`.
    """
    layers = _layers(model)
    states: list[Tensor] = []

    def note_input(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    def replace_states(module: nn.Module, args: Any, output: Any) -> None:
        output.hidden_states = tuple(states)
        states.clear()

    with ExitStack() as hooks:
        for module in (*layers, norm):
            hooks.callback(module.register_forward_pre_hook(note_input, with_kwargs=True).remove)
        hooks.callback(model.register_forward_hook(replace_states).remove)
        yield


def _layers(model: nn.Module) -> nn.ModuleList:
    """The model's layers, in their order.

    Raises:
        UserError: no list of its modules has as many as the config says.
    """
    typed: Any = model
    decoder = getattr(model, "get_decoder", lambda: None)()
    number = typed.config.get_text_config().num_hidden_layers
    modules = (decoder if isinstance(decoder, nn.Module) else model).modules()
    layers = next((m for m in modules if isinstance(m, nn.ModuleList) and len(m) == number), None)
    if layers is None:
        raise UserError(
            f"the layers of {type(model).__name__} could not be told; expected a list of {number} modules, as many as "
            "its config says"
        )
    return layers


def final_norm(model: nn.Module, ids: Tensor) -> nn.Module:
    """The norm between the last layer and the unembedding: what the model does from its input on, it does for each
    token by itself.

    It is the last norm outside the layers that is called when the text `ids` [T] is read. It is checked that its input
    alone gives the model's logits.

    Raises:
        UserError: there is no such norm.
    """
    calls: list[tuple[nn.Module, Tensor]] = []

    def note_call(module: nn.Module, args: Any, output: Any) -> None:
        if args:
            calls.append((module, args[0]))

    with ExitStack() as hooks, evaluating(model):
        for path, module in model.named_modules():
            if "norm" in type(module).__name__.lower() and not any(part.isdigit() for part in path.split(".")):
                hooks.callback(module.register_forward_hook(note_call).remove)
        expected = _logits_of(model, ids)
    if calls:
        norm, states = calls[-1]
        try:
            logits = unembedded(model, norm, states[0])
        except (RuntimeError, IndexError):  # after it comes more than an unembedding, and the shapes don't fit
            logits = torch.empty(0)
        if logits.shape == expected.shape and _are_close(logits, expected):
            return norm
    raise UserError(
        f"no norm between the last layer and the unembedding of {type(model).__name__} could be told, through which "
        "the logit lens reads the states of earlier layers; expected a model that ends with a norm and an unembedding"
    )


def unembedded(model: nn.Module, norm: nn.Module, states: Tensor) -> Tensor:
    """Logits [n, V] of states [n, width] that enter the model at its final norm.

    The model itself goes on from there, so a projection, scaling or cap of its logits is not forgotten. It reads a text
    of one token, and what it computes before the norm is thrown away.
    """

    def enter_states(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (states.unsqueeze(1).to(args[0].device, args[0].dtype), *args[1:])

    with norm.register_forward_pre_hook(enter_states), evaluating(model):
        return forward(model, _one_token(model)).logits.flatten(0, 1)


def joined(model: nn.Module, states: Tensor) -> Tensor:
    """Logits [n, V] of states [n, streams, width] of a model that keeps several streams beside each other.

    They replace the output of the last layer, and the model itself joins the streams to one state and goes on.

    Raises:
        UserError: as `_layers`.
    """

    def replace_output(module: nn.Module, args: Any, output: Any) -> Any:
        streams = output[0] if isinstance(output, tuple) else output
        new = states.unsqueeze(1).to(streams)  # [n, one token, streams, width]
        if len(streams) > 1:  # the streams come first
            new = new.movedim(2, 0)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    with _layers(model)[-1].register_forward_hook(replace_output), evaluating(model):
        return forward(model, _one_token(model)).logits.flatten(0, 1)


def check_joined(model: nn.Module, ids: Tensor) -> None:
    """Raise a `UserError` unless the last layer's output alone gives the model's logits, by `joined`.

    Args:
        ids: [T], of a text.
    """
    outputs: list[Tensor] = []

    def note_output(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    with _layers(model)[-1].register_forward_hook(note_output), evaluating(model):
        expected = _logits_of(model, ids)
    streams = outputs[0]
    states = streams[:, 0].movedim(0, 1) if len(streams) > 1 else streams[0]  # [T, streams, width]
    if not _are_close(joined(model, states), expected):
        raise UserError(
            f"{type(model).__name__} joins its streams by more than what the last layer gives, so the logit lens can't "
            "read those of earlier layers; expected a model that goes on from the last layer's states alone"
        )


def _logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """The model's logits [T, V] of one text [T]."""
    text = {"input_ids": ids.unsqueeze(0), "attention_mask": torch.ones_like(ids).unsqueeze(0)}
    return forward(model, text).logits[0]


def _one_token(model: nn.Module) -> Batch:
    """A text of one token."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _are_close(logits: Tensor, expected: Tensor) -> bool:
    return torch.allclose(logits, expected, rtol=0.05, atol=0.05 * float(expected.std()))


def attention_patterns(
    model: nn.Module, items: Sequence[Encoded], heads: Sequence[int], *, pad_id: int, batch_size: int = 64
) -> list[Row]:
    """How much attention a head pays to which tokens, from two places of the texts: the subject's last token, and the
    token before the object.

    Every token that is visible from there (in a sliding window: within it) is in the first of GROUPS that fits:

    - subject: all tokens that name the person, in other sentences too;
    - relation: the words of the relation;
    - first: the first token of the text, where heads look that look for nothing;
    - self: the token from which the head looks;
    - rest: all others.

    So `first` is empty if a text begins with its subject, and `self` is empty at the place `subject`.

    Args:
        items: texts about one fact each. A text without a place (see `consistency.places`) is left out there.
        heads: numbers of query heads, as `Anatomy(model).units("query_head")` lists them.
        pad_id: of the tokenizer.

    Returns:
        a row for each head, place (of LOOKING) and group: head (its label), place, group; mass: mean of the sum of the
        attention to the group, with mass_low and mass_high, a 95 % cluster bootstrap over people; uniform: what mass
        would be if all visible tokens got the same; facts, people. The groups' masses sum to 1, but for rounding in the
        model's dtype, and for the attention to a sink that is no token (GPT-OSS). GPT-Neo's local layers do not say how
        far they see; for uniform all tokens before count there.

    Raises:
        UserError: there is no text, or one about several facts; the model does not have one of the heads, or their
            geometry is not known; or it gives no attention weights.
    """
    _check_texts(items)
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
    heads_of: dict[str, tuple[list[int], list[int]]] = {}  # attention module -> numbers in `heads`, numbers within it
    for site, index in anatomy.sites("query_head").items():
        inside = index.unique().tolist()
        pairs = [(number, inside.index(head)) for number, head in enumerate(heads) if head in inside]
        if pairs:
            heads_of[site.rpartition(".")[0]] = [number for number, _ in pairs], [head for _, head in pairs]
    token_of = [places(item) for item in items]
    shape = (len(heads), len(LOOKING), len(items), len(GROUPS))
    mass, uniform = np.full(shape, np.nan), np.full(shape, np.nan)
    order = sorted(range(len(items)), key=lambda i: len(items[i].ids))
    with evaluating(model), _eager(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            attention = _attentions(model, collate([items[i] for i in chosen], pad_id=pad_id), list(heads_of))
            for (row, i), (looking, place) in product(enumerate(chosen), enumerate(LOOKING)):
                if place not in token_of[i]:
                    continue
                token = token_of[i][place]
                groups = _groups(items[i], token)
                for path, (numbers, inner) in heads_of.items():
                    weights, visible = (x[row, inner, token, : len(groups)].double() for x in attention[path])
                    mass[numbers, looking, i] = weights @ groups
                    uniform[numbers, looking, i] = visible @ groups / visible.sum(1, keepdim=True)
    rows = []
    for (number, head), (looking, place) in product(enumerate(heads), enumerate(LOOKING)):
        texts = [i for i, by_place in enumerate(token_of) if place in by_place]
        people = [items[i].example.person for i in texts]
        for group, name in enumerate(GROUPS if texts else ()):
            cells = number, looking, texts, group
            row = {"head": labels[head], "place": place, "group": name}
            row |= mean_over_people("mass", mass[cells], people) | {"uniform": float(uniform[cells].mean())}
            rows.append(row | {"facts": len(people), "people": len(set(people))})
    return rows


def _attentions(model: nn.Module, batch: Batch, modules: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """The weights of some attention modules, and which tokens are visible, on the CPU.

    Returns:
        path -> (weights [B, heads, T, T], bool of the same shape).
    """
    attention: dict[str, tuple[Tensor, Tensor]] = {}
    length = batch["input_ids"].shape[1]

    def note_weights(path: str, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if not isinstance(weights, Tensor) or weights.shape[-2:] != (length, length):
            raise UserError(
                f"{path} ({type(module).__name__}) does not tell its attention weights, even with the eager kernel; "
                "attention patterns need a transformers model that honours output_attentions"
            )
        mask = kwargs.get("attention_mask")  # it has the windows; a token of weight 0 may still be visible
        if mask is None:
            mask = torch.ones(length, length, dtype=torch.bool, device=weights.device).tril()
        elif mask.dtype != torch.bool:
            mask = mask > torch.finfo(mask.dtype).min / 2
        attention[path] = weights.cpu(), mask.expand(weights.shape).cpu()

    with ExitStack() as hooks:
        for path in modules:
            hook = functools.partial(note_weights, path)
            hooks.callback(model.get_submodule(path).register_forward_hook(hook, with_kwargs=True).remove)
        forward(model, batch, output_attentions=True)
    return attention


def _groups(item: Encoded, token: int) -> Tensor:
    """Which of GROUPS each token of a text is in, seen from the given token: one-hot [T, groups], float64."""
    mention = item.mentions[0]
    group = torch.full((len(item.ids),), GROUPS.index("rest"))
    group[token] = GROUPS.index("self")
    group[0] = GROUPS.index("first")
    group[mention.relation] = GROUPS.index("relation")
    for about in (mention, *item.context):
        group[about.subject] = GROUPS.index("subject")
    return F.one_hot(group, len(GROUPS)).double()


@contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """Within the context, the model uses the attention kernel that gives its weights.

    The kernel is set in the configs, which the modules read at every forward. `set_attn_implementation` would not
    change Falcon's, and does not say which kernels of a model's parts to restore.
    """
    every = (getattr(module, "config", None) for module in model.modules())
    configs: dict[int, Any] = {id(config): config for config in every if hasattr(config, "_attn_implementation")}
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation_internal = "eager"
        yield
    finally:
        for config, kernel in before:
            config._attn_implementation_internal = kernel


def _check_texts(items: Sequence[Encoded]) -> None:
    """Raise a `UserError` unless there are texts, and each is about one fact."""
    if not items:
        raise UserError("no text was given; expected texts about one fact each")
    several = next((item for item in items if len(item.mentions) != 1), None)
    if several is not None:
        raise UserError(
            f"example {several.example.id} is about {len(several.mentions)} facts; expected texts about one fact each, "
            "as `Encoded.about` cuts them"
        )
