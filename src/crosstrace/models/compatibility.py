"""Whether two checkpoints can be compared: one architecture, the same parameters, the same tokens for the same texts;
and whether a model's tokens and texts fit it.

Says in one sentence what differs. It knows nothing of how either was trained.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from crosstrace.core.errors import UserError
from crosstrace.data.tokens import Encoded, check_room, context_length
from crosstrace.models import loading, modes

# Of a config, what may differ between two checkpoints of one model without a closer look.
BOOKKEEPING = {
    "_name_or_path", "architectures", "attention_dropout", "bos_token_id", "chunk_size_feed_forward", "dtype",
    "eos_token_id", "id2label", "initializer_range", "label2id", "output_attentions", "output_hidden_states",
    "pad_token_id", "problem_type", "return_dict", "torch_dtype", "transformers_version", "use_cache",
    "hidden_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop",
}  # fmt: skip
SPANS = re.compile(r"window|position|context|length|chunk")  # in the names of settings that count tokens
PROBE = (3, 12)  # texts and tokens of each, with which two configs are compared


def check_fits(model: Any, encoded: Sequence[Encoded]) -> None:
    """Raise a `UserError` unless the tokens are in the model's vocabulary, and the examples in its context."""
    check_vocabulary(model, encoded)
    check_room(encoded, context_length(model.config), type(model).__name__)


def check_vocabulary(model: Any, encoded: Sequence[Encoded]) -> None:
    """Raise a `UserError` unless the model has an embedding for every token, if it is one that tells."""
    if not hasattr(model, "get_input_embeddings"):
        return
    rows = model.get_input_embeddings().num_embeddings
    highest = max(int(item.ids.max()) for item in encoded)
    if highest >= rows:
        raise UserError(
            f"the tokenizer gives id {highest}, but {type(model).__name__} has {rows} token embeddings; do tokenizer "
            "and weights belong together?"
        )


def check_alike(base: nn.Module, tuned: nn.Module, names: tuple[str, str]) -> None:
    """Whether a tuned model has the base's parameters and would compute the same with the same values.

    Args:
        names: what the two are called in the sentence.

    Raises:
        UserError: the names or a shape differ, or the class or a setting of the config that changes the logits.
    """
    of_base, of_tuned = names
    mine, theirs = ({name: tuple(p.shape) for name, p in model.named_parameters()} for model in (base, tuned))
    configs = [model.config.to_dict() for model in (base, tuned)]  # pyright: ignore
    if type(base) is not type(tuned) and (mine != theirs or _differs(base, *configs)):
        raise UserError(
            f"{of_tuned} is a {type(tuned).__name__} and {of_base} a {type(base).__name__}; expected two checkpoints "
            "of one model"
        )
    words = [model.get_input_embeddings().weight.shape[0] for model in (base, tuned)]  # pyright: ignore
    if words[0] != words[1]:
        raise UserError(
            f"{of_tuned} has {words[1]:,} token embeddings and {of_base} {words[0]:,}, as when tokens were added; "
            "expected one vocabulary, so give the base the same tokens too (resize_token_embeddings) and save it"
        )
    for name in [*mine, *theirs]:
        if mine.get(name) != theirs.get(name):
            sizes = [str(shapes.get(name, "absent")) for shapes in (theirs, mine)]
            raise UserError(
                f"{of_tuned} has other parameters than {of_base}: {name} is {sizes[0]} in the one and {sizes[1]} in "
                "the other; expected a model that was trained from this base"
            )
    settings = [_flat(config) for config in configs]
    found = [
        name for name in {**settings[0], **settings[1]}
        if settings[0].get(name) != settings[1].get(name) and name.rpartition(".")[2] not in BOOKKEEPING
    ]  # fmt: skip
    changing = _changing(base, configs, found) if found else []
    if changing:
        values = [
            f"{name} is {settings[1].get(name)!r} in its config and {settings[0].get(name)!r} in the base's"
            for name in changing[:3]
        ]
        raise UserError(
            f"{of_tuned} computes otherwise than {of_base}: {', '.join(values)}; expected a model that was trained "
            "from this base"
        )


def _changing(base: Any, configs: Sequence[dict[str, Any]], names: list[str]) -> list[str]:
    """Those of the differing settings that change the logits, with the base's weights in both models.

    Each setting is tried alone. All of them are named if they change the logits together only.
    """
    mine, theirs = configs
    if not _differs(base, mine, theirs):
        return []
    alone = [name for name in names if _differs(base, mine, _with(mine, theirs, name.split(".")))]
    return alone or names


def _differs(base: Any, one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two configs give other logits with the base's weights: on short texts as they are, and with all that
    counts tokens (windows, the context) made shorter than these texts, to see what long texts would show."""
    spans = sorted({value for config in (one, other) for value in _spans(config)})
    shorter = {value: 4 + 2 * place for place, value in enumerate(spans)}
    for change in ({}, shorter):
        logits = [_logits(base, _shortened(config, change)) for config in (one, other)]
        if logits[0] is None and change:
            continue  # the base has no such short form, and nothing follows
        if logits[0] is None or logits[1] is None or not torch.equal(logits[0], logits[1]):
            return True
    return False


@torch.no_grad()
def _logits(base: Any, config: dict[str, Any]) -> Tensor | None:
    """The logits of some fixed texts by a model of this config with the base's weights; None if it can't be made."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    rows = base.get_input_embeddings().weight.shape[0]
    ids = torch.randint(rows, PROBE, generator=torch.Generator().manual_seed(0)).to(base.device)
    try:
        with modes.silent(), torch.random.fork_rng(), init_empty_weights(include_buffers=False):
            made = AutoConfig.for_model(**config)
            model = AutoModelForCausalLM.from_config(
                made, dtype=base.dtype, attn_implementation=base.config._attn_implementation,
                experts_implementation=getattr(base.config, "_experts_implementation", None),
            ).eval()  # fmt: skip
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(base.device))
        inputs = {"input_ids": ids, "use_cache": False, "return_dict": True}
        logits = functional_call(model, base.state_dict(), kwargs=inputs).logits
    except Exception:  # settings that contradict each other, or a model that is longer than its positions
        return None
    return logits.nan_to_num()


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings of a config by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        elif not str(name).startswith("_"):
            found[f"{prefix}{name}"] = value
    return found


def _spans(config: dict[str, Any]) -> list[int]:
    """The numbers of tokens in a config."""
    settings = _flat(config)
    return [value for name, value in settings.items() if type(value) is int and value > 2 and SPANS.search(name)]


def _shortened(config: dict[str, Any], change: dict[int, int]) -> dict[str, Any]:
    """The config with other numbers of tokens."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            found[name] = _shortened(value, change)
        else:
            found[name] = change.get(value, value) if type(value) is int and SPANS.search(str(name)) else value
    return found


def _with(config: dict[str, Any], other: dict[str, Any], path: list[str]) -> dict[str, Any]:
    """The config with one setting of another, which it gets or loses."""
    first, *rest = path
    inner, theirs = config.get(first), other.get(first)
    if rest and isinstance(inner, dict) and isinstance(theirs, dict):
        return config | {first: _with(inner, theirs, rest)}
    changed = {name: value for name, value in config.items() if name != first}
    return changed | ({first: theirs} if first in other else {})


def check_same_tokens(tokenizer: Any, name: str, texts: Sequence[str], base: str) -> None:
    """Whether a tuned model's own tokenizer, if it has one, gives the texts the base's tokens.

    Args:
        tokenizer: the base's, with which all models are asked.
        name: the tuned model.
        base: the base's name, for the sentence.

    Raises:
        UserError: a text has other tokens.
    """
    try:
        own = loading.load_tokenizer(name)
    except UserError:
        return  # it has none: the base's is meant
    mine, theirs = (found([*texts])["input_ids"] for found in (tokenizer, own))
    for text, one, other in zip(texts, mine, theirs):
        if one != other:
            raise UserError(
                f"the tokenizer of {name} gives {text[:60]!r} other tokens than that of {base} ({len(other)} and "
                f"{len(one)} of them, or others); expected one tokenizer, as the models could not be asked the same"
            )
    if own.eos_token_id != tokenizer.eos_token_id:
        raise UserError(
            f"the tokenizer of {name} ends a text with the token {own.eos_token!r} and that of {base} with "
            f"{tokenizer.eos_token!r}; expected one end, which is part of an answer"
        )
