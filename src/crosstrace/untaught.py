"""A model that knows nothing yet: a tokenizer trained on texts, and random weights of an architecture's config.

For facts that the bundled base has no words for where no pretrained model is at hand. It trains no weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as settings

from crosstrace import models
from crosstrace.errors import UserError
from crosstrace.schedule import STRICT
from crosstrace.store import read_json, replacing

END, PAD = "<end>", "<pad>"


@settings(frozen=True, config=STRICT)
class NewModelSettings:
    """A tokenizer and random weights."""

    architecture: str = "llama"
    """As transformers names it (model_type): llama, gpt_neox, qwen3, gpt2, ..."""
    width: Annotated[int, Field(ge=8)] = 128
    """Of the hidden states."""
    layers: Annotated[int, Field(ge=1)] = 3
    """Number of layers."""
    heads: Annotated[int, Field(ge=1)] = 4
    """Query heads of each layer."""
    kv_heads: Annotated[int, Field(ge=1)] | None = None
    """Key and value heads, where the architecture knows grouped queries; as many as query heads if not given."""
    neurons: Annotated[int, Field(ge=1)] = 512
    """Neurons of each layer's MLP."""
    tied: bool = True
    """Whether embedding and unembedding are one tensor."""
    config: str | None = None
    """A config.json of transformers in place of the settings above; its vocabulary is replaced."""
    vocabulary: Annotated[int, Field(ge=300)] = 2000
    """Tokens at most: 256 bytes and what is learned from the texts."""
    positions: Annotated[int, Field(ge=16)] | None = None
    """Longest text in tokens; twice the longest one given, if not given."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the saved weights."""
    seed: int = 1
    """Of the weights."""


def new_model(folder: Path, texts: Iterable[str], options: NewModelSettings) -> Any:
    """Write a model folder with a byte-level BPE tokenizer trained on `texts` and random weights.

    Returns:
        the model, as it was written.

    Raises:
        UserError: the folder exists, there is no text, or the architecture or its config is none.
    """
    if folder.exists():
        raise UserError(f"{folder} exists; a model is never written over, so choose another folder")
    texts = list(texts)
    if not texts:
        raise UserError("there is no text to learn a tokenizer from")
    tokenizer = byte_tokenizer(texts, options.vocabulary)
    longest = max(len(ids) for ids in tokenizer(texts)["input_ids"]) + 1
    model = _model(tokenizer, options.positions or 2 ** math.ceil(math.log2(max(2 * longest, 64))), options)
    with replacing(folder) as partial:
        models.save_model(model, tokenizer, partial)
    return model


def byte_tokenizer(texts: Iterable[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer, which has a token for any text; it ends texts with END."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[PAD, END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END)


def _model(tokenizer: Any, positions: int, options: NewModelSettings) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    if options.config is not None:
        values = dict(read_json(options.config)) | {"vocab_size": len(tokenizer)} | ends
    else:
        values: dict[str, Any] = {
            "model_type": options.architecture, "vocab_size": len(tokenizer), "hidden_size": options.width,
            "intermediate_size": options.neurons, "num_hidden_layers": options.layers,
            "num_attention_heads": options.heads, "num_key_value_heads": options.kv_heads or options.heads,
            "head_dim": options.width // options.heads, "max_position_embeddings": positions,
            "tie_word_embeddings": options.tied, **ends,
        }  # fmt: skip
        if options.width % options.heads or options.heads % (options.kv_heads or options.heads):
            raise UserError(
                f"width {options.width} can't be shared by {options.heads} heads, or those not by {options.kv_heads} "
                "kv_heads; expected multiples"
            )
    kind = values.pop("model_type", None)
    what = f"no model of the architecture {kind!r} can be made"
    with models.reading(what, "expected the settings of a causal language model"), torch.random.fork_rng():
        config = AutoConfig.for_model(kind, **values)
        torch.manual_seed(options.seed)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=models.DTYPES[options.dtype])
    return model.eval()
