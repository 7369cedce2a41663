"""Every causal language model of transformers, as small as its config can be made.

The list is made from the registry of transformers, and no architecture is named here but those few whose config wants
more than smaller numbers.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

HEADS, KEYS, WIDTH, NEURONS, LAYERS, VOCABULARY = 4, 2, 32, 40, 4, 64

# Settings by the names that configs have for them; a config takes those that it knows.
_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "d_model": WIDTH, "n_embd": WIDTH, "embedding_size": WIDTH,
    "intermediate_size": NEURONS, "ffn_dim": NEURONS, "decoder_ffn_dim": NEURONS, "encoder_ffn_dim": NEURONS,
    "num_hidden_layers": LAYERS, "n_layer": LAYERS, "num_layers": LAYERS, "decoder_layers": LAYERS,
    "encoder_layers": LAYERS, "num_attention_heads": HEADS, "n_head": HEADS, "num_heads": HEADS,
    "decoder_attention_heads": HEADS, "encoder_attention_heads": HEADS, "num_key_value_heads": KEYS,
    "head_dim": 8, "kv_channels": 8, "max_position_embeddings": 128, "n_positions": 128, "n_ctx": 128,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "top_k": 2,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16,
    "n_group": 1, "topk_group": 1, "q_lora_rank": 12, "kv_lora_rank": 12, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_head_dim": 16, "index_n_heads": 2, "index_head_dim": 16,
    "index_topk": 4, "state_size": 4, "sliding_window": 5, "word_embed_proj_dim": WIDTH,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2, "mamba_n_groups": 1,
    "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "ssm_state_size": 8, "chunk_size": 8,
    "time_step_rank": 4, "lru_width": WIDTH, "attention_hidden_size": WIDTH, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 1, "global_head_dim": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "attention_dropout": 0.0, "hidden_dropout": 0.0,
    "ffn_hidden_size": NEURONS, "inner_dim": NEURONS, "n_inner": NEURONS, "rotary_dim": 4, "dff": NEURONS,
    "num_global_key_value_heads": 1, "mlp_ffn_hidden_size": NEURONS, "expert_ffn_hidden_size": 16,
    "linear_num_heads": 8, "linear_head_dim": 8, "swa_num_attention_heads": 8, "swa_num_key_value_heads": 4,
    "swa_head_dim": 8, "zero_expert_num": 1, "moe_topk": 2, "is_decoder": True, "mtp_num_hidden_layers": 0,
    "num_mem_blocks": 1,
}  # fmt: skip

_MORE: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], LAYERS // 2]]},
    "zaya": {"num_experts_per_tok": 1},
    "falcon_h1": {"mamba_d_ssm": 64},
    "dots1": {"first_k_dense_replace": 1, "n_shared_experts": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (LAYERS // 2)},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2)},
    "gemma4_text": {"num_kv_shared_layers": 0},
    "zamba2": {"layer_types": ["mamba", "hybrid"] * (LAYERS // 2), "hybrid_layer_ids": [1, 3]},
}  # fmt: skip


def names() -> list[str]:
    """The model types that transformers can make a causal language model of."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny(kind: str, **settings: Any) -> nn.Module:
    """A causal language model of a type, with random weights, in evaluation mode and float32.

    Raises:
        Exception: whatever transformers raises where it can't be made this small.
    """
    config = AutoConfig.for_model(kind)
    config = type(config)(**_fitting(config) | settings)
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    try:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():  # ones and zeros (norms, biases) would hide mistakes
                if parameter.is_floating_point():
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    finally:
        torch.random.set_rng_state(state)
    return model.eval()


def _fitting(config: Any) -> dict[str, Any]:
    """The small settings that a config knows, those of its parts included."""
    known = set(inspect.signature(type(config).__init__).parameters) | set(vars(config)) | set(config.attribute_map)
    known |= set(getattr(type(config), "__dataclass_fields__", {}))
    chosen = {name: value for name, value in _SMALL.items() if name in known}
    if "kv_lora_rank" in known:  # latent attention has no groups
        chosen["num_key_value_heads"] = HEADS
    chosen |= _MORE.get(config.model_type, {})
    for name in config.sub_configs:
        own = getattr(config, name, None)
        if own is not None and not isinstance(own, dict):
            chosen[name] = _fitting(own)
    return copy.deepcopy(chosen)
