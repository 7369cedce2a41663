"""Whether two checkpoints can be compared: one architecture, the same parameters, the same tokens for the same texts;
and whether a model's tokens and texts fit it.

Says in one sentence what differs. It knows nothing of how either was trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from crosstrace import models
from crosstrace.errors import UserError
from crosstrace.tokens import Encoded, check_room, context_length

# Of a config, what may differ between two checkpoints of one model: it changes no logits.
BOOKKEEPING = {
    "_name_or_path", "architectures", "attention_dropout", "bos_token_id", "chunk_size_feed_forward", "dtype",
    "eos_token_id", "id2label", "initializer_range", "label2id", "max_position_embeddings", "output_attentions",
    "output_hidden_states", "pad_token_id", "problem_type", "return_dict", "torch_dtype", "transformers_version",
    "use_cache", "hidden_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop",
}  # fmt: skip


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
    """Whether a tuned model has the base's architecture and parameters.

    Args:
        names: what the two are called in the sentence.

    Raises:
        UserError: the class, the names, a shape or a setting of the config differs.
    """
    of_base, of_tuned = names
    if type(base) is not type(tuned):
        raise UserError(
            f"{of_tuned} is a {type(tuned).__name__} and {of_base} a {type(base).__name__}; expected two checkpoints "
            "of one model"
        )
    mine, theirs = ({name: tuple(p.shape) for name, p in model.named_parameters()} for model in (base, tuned))
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
    settings = [_config(model) for model in (base, tuned)]
    for name in [*settings[0], *settings[1]]:
        one, other = (found.get(name) for found in settings)
        if one != other:
            raise UserError(
                f"{of_tuned} computes otherwise than {of_base}: {name} is {other!r} in its config and {one!r} in the "
                "base's; expected a model that was trained from this base"
            )


def _config(model: Any) -> dict[str, Any]:
    return {k: v for k, v in model.config.to_dict().items() if k not in BOOKKEEPING and not k.startswith("_")}


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
        own = models.load_tokenizer(name)
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
