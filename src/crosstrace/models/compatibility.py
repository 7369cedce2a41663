"""Checks that two checkpoints can be compared, and that tokens and texts fit a model.

Two checkpoints can be compared if they have one architecture, the same parameters, and the same tokens for the same
texts. An error says in one sentence what differs. It knows nothing of how either was trained.
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

# Settings of a config that may differ between two checkpoints of one model without a closer look.
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
    """Raise a `UserError` unless the model has an embedding for every token; not if it does not show its embeddings."""
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
    """Raise a `UserError` unless a tuned model has the base's parameters and computes the same with the same values.

    Args:
        names: of the base and the tuned model, for the sentence.

    Raises:
        UserError: the names or a shape differ, or the class or a setting of the config that changes the logits.
    """
    base_name, tuned_name = names
    base_shapes, tuned_shapes = (
        {name: tuple(p.shape) for name, p in model.named_parameters()} for model in (base, tuned)
    )
    configs = [model.config.to_dict() for model in (base, tuned)]  # pyright: ignore
    if type(base) is not type(tuned) and (base_shapes != tuned_shapes or _gives_other_logits(base, *configs)):
        raise UserError(
            f"{tuned_name} is a {type(tuned).__name__} and {base_name} a {type(base).__name__}; expected two "
            "checkpoints of one model"
        )
    counts = [model.get_input_embeddings().weight.shape[0] for model in (base, tuned)]  # pyright: ignore
    if counts[0] != counts[1]:
        raise UserError(
            f"{tuned_name} has {counts[1]:,} token embeddings and {base_name} {counts[0]:,}, as when tokens were "
            "added; expected one vocabulary, so give the base the same tokens too (resize_token_embeddings) and save it"
        )
    for name in [*base_shapes, *tuned_shapes]:
        if base_shapes.get(name) != tuned_shapes.get(name):
            sizes = [str(shapes.get(name, "absent")) for shapes in (tuned_shapes, base_shapes)]
            raise UserError(
                f"{tuned_name} has other parameters than {base_name}: {name} is {sizes[0]} in the one and {sizes[1]} "
                "in the other; expected a model that was trained from this base"
            )
    settings = [_flatten(config) for config in configs]
    differing = [
        name for name in {**settings[0], **settings[1]}
        if settings[0].get(name) != settings[1].get(name) and name.rpartition(".")[2] not in BOOKKEEPING
    ]  # fmt: skip
    changing = _find_changing(base, configs, differing) if differing else []
    if changing:
        values = [
            f"{name} is {settings[1].get(name)!r} in its config and {settings[0].get(name)!r} in the base's"
            for name in changing[:3]
        ]
        raise UserError(
            f"{tuned_name} computes otherwise than {base_name}: {', '.join(values)}; expected a model that was trained "
            "from this base"
        )


def _find_changing(base: Any, configs: Sequence[dict[str, Any]], names: list[str]) -> list[str]:
    """Those of the differing settings that change the logits, if both models have the base's weights.

    Each setting is tried alone. If they change the logits only together, all of them are returned.
    """
    base_config, tuned_config = configs
    if not _gives_other_logits(base, base_config, tuned_config):
        return []
    alone = [
        name
        for name in names
        if _gives_other_logits(base, base_config, _replace_setting(base_config, tuned_config, name.split(".")))
    ]
    return alone or names


def _gives_other_logits(base: Any, one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two configs give other logits with the base's weights.

    They are tried on short texts twice: as they are, and with everything that counts tokens (windows, the context) made
    shorter than these texts. The second shows what long texts would show.
    """
    spans = sorted({value for config in (one, other) for value in _token_counts(config)})
    shorter = {value: 4 + 2 * number for number, value in enumerate(spans)}
    for change in ({}, shorter):
        logits = [_probe_logits(base, _shorten(config, change)) for config in (one, other)]
        if logits[0] is None and change:
            continue  # the base itself can't be shortened like this, so nothing follows
        if logits[0] is None or logits[1] is None or not torch.equal(logits[0], logits[1]):
            return True
    return False


@torch.no_grad()
def _probe_logits(base: Any, config: dict[str, Any]) -> Tensor | None:
    """The logits of fixed texts by a model of this config with the base's weights; None if it can't be made."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    rows = base.get_input_embeddings().weight.shape[0]
    ids = torch.randint(rows, PROBE, generator=torch.Generator().manual_seed(0)).to(base.device)
    try:
        with modes.silent(), torch.random.fork_rng(), init_empty_weights(include_buffers=False):
            parsed = AutoConfig.for_model(**config)
            model = AutoModelForCausalLM.from_config(
                parsed, dtype=base.dtype, attn_implementation=base.config._attn_implementation,
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


def _flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings of a config by their dotted names."""
    settings: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            settings |= _flatten(value, f"{prefix}{name}.")
        elif not str(name).startswith("_"):
            settings[f"{prefix}{name}"] = value
    return settings


def _token_counts(config: dict[str, Any]) -> list[int]:
    """The numbers of tokens in a config."""
    settings = _flatten(config)
    return [value for name, value in settings.items() if type(value) is int and value > 2 and SPANS.search(name)]


def _shorten(config: dict[str, Any], change: dict[int, int]) -> dict[str, Any]:
    """The config with other numbers of tokens: `change` is old -> new."""
    shortened: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            shortened[name] = _shorten(value, change)
        else:
            shortened[name] = change.get(value, value) if type(value) is int and SPANS.search(str(name)) else value
    return shortened


def _replace_setting(config: dict[str, Any], other: dict[str, Any], path: list[str]) -> dict[str, Any]:
    """The config with one setting of another config; without it if the other has none."""
    first, *rest = path
    inner, other_inner = config.get(first), other.get(first)
    if rest and isinstance(inner, dict) and isinstance(other_inner, dict):
        return config | {first: _replace_setting(inner, other_inner, rest)}
    changed = {name: value for name, value in config.items() if name != first}
    return changed | ({first: other_inner} if first in other else {})


def check_same_tokens(tokenizer: Any, name: str, texts: Sequence[str], base: str) -> None:
    """Raise a `UserError` unless a tuned model's tokenizer, if it has one, gives the texts the base's tokens.

    Args:
        tokenizer: the base's, which is used with all models.
        name: the tuned model.
        base: the base's name, for the sentence.

    Raises:
        UserError: a text has other tokens.
    """
    try:
        tuned_tokenizer = loading.load_tokenizer(name)
    except UserError:
        return  # it has none, so the base's is used
    base_ids, tuned_ids = (each([*texts])["input_ids"] for each in (tokenizer, tuned_tokenizer))
    for text, one, other in zip(texts, base_ids, tuned_ids):
        if one != other:
            raise UserError(
                f"the tokenizer of {name} gives {text[:60]!r} other tokens than that of {base} ({len(other)} and "
                f"{len(one)} of them, or others); expected one tokenizer, as the models could not be asked the same"
            )
    if tuned_tokenizer.eos_token_id != tokenizer.eos_token_id:
        raise UserError(
            f"the tokenizer of {name} ends a text with the token {tuned_tokenizer.eos_token!r} and that of {base} with "
            f"{tokenizer.eos_token!r}; expected one end, which is part of an answer"
        )
