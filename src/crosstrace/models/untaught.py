"""A model that knows nothing yet: a tokenizer trained on texts, and random weights of an architecture's config.

It is for facts that the bundled base has no words for, if there is no pretrained model. It trains no weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as settings

from crosstrace.core.errors import UserError
from crosstrace.core.files import read_json, replacing
from crosstrace.core.settings import STRICT
from crosstrace.models import loading, locating

END, PAD = "<end>", "<pad>"
EXPECTED = "expected a causal language model's architecture as transformers names it (llama, gpt_neox, qwen3, ...)"
OWN_CONFIG = "expected another architecture, such as llama, or its own config.json with all of its sizes, as --config"
TEXT_ONLY = ("dbrx", "mpt")  # their configs have several parts, but they are models for text alone


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
        UserError: the folder exists, there is no text, or there is no such architecture or config.
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
        loading.save_model(model, tokenizer, partial)
    return model


def byte_tokenizer(texts: Iterable[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer, which has tokens for any text; it ends texts with END."""
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
    """A model of the architecture with random weights, checked on a few tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if options.config is not None:
        values = {**read_json(options.config)}
        taken = {"vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", *values}
        values |= {name: value for name, value in _token_settings(tokenizer).items() if name in taken}
        kind = values.pop("model_type", None)
    else:
        kind = options.architecture
        values = _config_values(kind, tokenizer, positions, options)
    what = f"no model of the architecture {kind!r} can be made"
    with locating.reading(what, OWN_CONFIG), torch.random.fork_rng():
        config = AutoConfig.for_model(kind, **values)
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    most = 100 * (2 * len(tokenizer) + options.layers * (4 * options.width + 3 * options.neurons)) * options.width
    if options.config is None and size > most:
        raise UserError(
            f"{what}: with these settings it has {size:,} parameters, since it has further sizes that they do not "
            f"name; {OWN_CONFIG}"
        )
    with locating.reading(what, OWN_CONFIG), torch.random.fork_rng():
        torch.manual_seed(options.seed)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=loading.DTYPES[options.dtype])
        _check_reads_left_to_right(model.eval(), what)
    return model


def _config_values(kind: str, tokenizer: Any, positions: int, options: NewModelSettings) -> dict[str, Any]:
    """The settings as an architecture's config takes them.

    Raises:
        UserError: transformers has no causal language model of this architecture, or one for images or sound too.
    """
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    if options.width % options.heads or options.heads % (options.kv_heads or options.heads):
        raise UserError(
            f"width {options.width} can't be shared by {options.heads} heads, or those not by {options.kv_heads} "
            "kv_heads; expected multiples"
        )
    if kind not in CONFIG_MAPPING or CONFIG_MAPPING[kind] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"transformers has no causal language model of the architecture {kind!r}; {EXPECTED}")
    config_class: Any = CONFIG_MAPPING[kind]
    text = config_class.sub_configs.get("text_config")
    if config_class.sub_configs and kind not in TEXT_ONLY:
        part = text.model_type if text in MODEL_FOR_CAUSAL_LM_MAPPING else "llama"
        raise UserError(
            f"{kind!r} is a model of several parts, for more than text; expected one for text alone, such as {part}"
        )
    with locating.reading(f"no model of the architecture {kind!r} can be made", EXPECTED):
        default = config_class()
    known = {*default.to_dict(), *config_class.attribute_map}
    values = _token_settings(tokenizer) | _sizes(positions, options)
    if "kv_lora_rank" in known:  # every head has its own keys and values
        values["num_key_value_heads"] = options.heads
    kinds = getattr(default, "layer_types", None)
    if isinstance(kinds, list) and kinds:
        values["layer_types"] = _kinds_of_layers(kinds, options.layers)
    values |= _own_sizes(kind, positions, options)
    names = {name: config_class.attribute_map.get(name, name) for name in values if name in known}
    return {name: values[name] for name, target in names.items() if not _is_fixed(config_class, target)}


def _is_fixed(config: type, name: str) -> bool:
    """Whether a config computes a setting and can't be given it."""
    attribute = getattr(config, name, None)
    return isinstance(attribute, property) and attribute.fset is None


def _kinds_of_layers(kinds: list[str], layers: int) -> list[str]:
    """The kinds of layers of an architecture, in turn; the last layer attends to all tokens if any kind does."""
    distinct = list(dict.fromkeys(kinds))
    last = next((kind for kind in distinct if kind in ("full_attention", "attention")), distinct[-1])
    others = [kind for kind in distinct if kind != last] or [last]
    return [*(others[number % len(others)] for number in range(layers - 1)), last]


def _token_settings(tokenizer: Any) -> dict[str, Any]:
    """The settings that follow from the tokenizer, under all names that architectures have for them."""
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    return {
        "vocab_size": len(tokenizer), "vocab_size_per_layer_input": len(tokenizer), "pad_token_id": pad,
        "bos_token_id": end, "eos_token_id": end, "sep_token_id": end, "eod_token_id": end,
        "decoder_start_token_id": end, "forced_eos_token_id": None,
    }  # fmt: skip


def _sizes(positions: int, options: NewModelSettings) -> dict[str, Any]:
    """The settings under all names that architectures have for them, and further sizes that fit them."""
    width, layers, heads, neurons = options.width, options.layers, options.heads, options.neurons
    kv_heads, head, inner = options.kv_heads or heads, width // heads, 2 * width
    return {
        "tie_word_embeddings": options.tied, "is_decoder": True, "scale_embedding": False,
        # width, layers and positions
        "hidden_size": width, "embedding_size": width, "word_embed_proj_dim": width, "attention_hidden_size": width,
        "num_hidden_layers": layers, "decoder_layers": layers, "encoder_layers": layers, "num_layers": layers,
        "num_decoder_layers": layers, "num_encoder_layers": layers,
        "max_position_embeddings": positions, "n_positions": positions, "max_seq_len": positions,
        "model_max_length": positions, "local_attention_window_len": positions,
        # attention
        "num_attention_heads": heads, "decoder_attention_heads": heads, "encoder_attention_heads": heads,
        "num_decoder_attention_heads": heads, "num_encoder_attention_heads": heads,
        "num_key_value_heads": kv_heads, "num_kv_heads": kv_heads, "head_dim": head, "attention_head_dim": head,
        "dim_head": head, "kv_channels": head, "rotary_dim": head // 2 * 2, "query_pre_attn_scalar": head,
        "swa_num_attention_heads": heads, "swa_num_key_value_heads": kv_heads, "swa_head_dim": head,
        "swa_v_head_dim": head, "global_head_dim": head, "num_global_key_value_heads": kv_heads,
        "qk_rope_head_dim": head, "qk_nope_head_dim": head, "qk_head_dim": 2 * head, "v_head_dim": head,
        "q_lora_rank": width, "kv_lora_rank": width, "o_lora_rank": width, "index_n_heads": heads,
        "index_head_dim": 2 * head, "index_topk": 16, "num_kv_shared_layers": 0,
        # neurons and experts
        "intermediate_size": neurons, "decoder_ffn_dim": neurons, "encoder_ffn_dim": neurons, "ffn_dim": neurons,
        "ffn_hidden_size": neurons, "dim_ff": neurons, "dff": neurons, "n_inner": neurons,
        "moe_intermediate_size": neurons, "shared_expert_intermediate_size": neurons,
        "shared_intermediate_size": neurons, "shared_experts_intermediate_size": neurons,
        "expert_ffn_hidden_size": neurons, "moe_shared_expert_intermediate_size": neurons,
        "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
        "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2, "top_k_experts": 2,
        "n_group": 1, "topk_group": 1, "num_expert_group": 1, "zero_expert_num": 2,
        "n_shared_experts": 1, "first_k_dense_replace": 1,
        # state-space layers and linear attention
        "state_size": 16, "mamba_d_state": 16, "ssm_state_size": 16, "time_step_rank": max(1, width // 16),
        "mamba_dt_rank": max(1, width // 16), "mamba_d_ssm": inner, "mamba_n_heads": inner // head,
        "mamba_num_heads": inner // head, "n_mamba_heads": inner // head, "mamba_d_head": head,
        "mamba_head_dim": head, "mamba_headdim": head, "mamba_n_groups": 1, "mamba_ngroups": 1, "n_groups": 1,
        "linear_num_heads": heads, "linear_num_key_heads": heads, "linear_num_value_heads": heads,
        "linear_head_dim": head, "linear_key_head_dim": head, "linear_value_head_dim": head,
    }  # fmt: skip


def _own_sizes(kind: str, positions: int, options: NewModelSettings) -> dict[str, Any]:
    """The settings that an architecture calls by other names, or can't have as the others do."""
    width, layers, heads = options.width, options.layers, options.heads
    match kind:
        case "bamba":
            return {"attn_layer_indices": [layers - 1]}
        case "gpt_neo":
            return {"attention_types": [[["global"], layers]]}
        case "granitemoehybrid":
            return {"layer_types": _kinds_of_layers(["mamba", "attention"], layers)}
        case "jamba":
            return {"attn_layer_period": 2, "attn_layer_offset": 1}
        case "lfm2_moe":
            return {"layer_types": _kinds_of_layers(["conv", "full_attention"], layers)}
        case "mamba2":  # its heads are those of the state-space layers
            return {"num_heads": heads, "head_dim": 2 * width // heads}
        case "recurrent_gemma":
            return {"block_types": _kinds_of_layers(["recurrent", "attention"], layers)}
        case "reformer":
            shape = (2 ** (positions.bit_length() // 2), positions // 2 ** (positions.bit_length() // 2))
            return {"axial_pos_shape": shape, "axial_pos_embds_dim": (width // 2, width - width // 2)}
        case "roc_bert":
            unused = {"enable_pronunciation": False, "enable_shape": False}
            return unused | {"pronunciation_vocab_size": 1, "shape_vocab_size": 1}
        case "xlm":
            return {"causal": True}
        case "zaya":
            return {"num_experts_per_tok": 1}
    return {}


def _check_reads_left_to_right(model: Any, what: str) -> None:
    """Raise a `UserError` unless the model reads tokens alone, and no token sees a later one."""
    rows = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(rows, (2, 9))
    other_ids = ids.clone()
    other_ids[:, -1] = (ids[:, -1] + 1) % rows
    with torch.no_grad():
        logits, other_logits = (model(input_ids=x).logits[:, :-1].float() for x in (ids, other_ids))
    if not bool(logits.isfinite().all()):
        raise UserError(f"{what}: its random weights give logits that are no numbers; expected another architecture")
    if float((logits - other_logits).abs().max()) > 1e-5 * (1 + float(logits.abs().max())):
        raise UserError(f"{what}: its tokens see later ones; expected an architecture that reads from left to right")
