"""Tiny random models from config, without network: one per architecture that crosstrace claims to handle."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode

VOCABULARY = 53
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_NARROW = _SPECIAL | {"vocab_size": VOCABULARY, "hidden_size": 24}
_BASE = _NARROW | {
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GROUPED = _BASE | {"num_key_value_heads": 2, "head_dim": 6}
_EXPERTS = _GROUPED | {"num_experts_per_tok": 2, "moe_intermediate_size": 20}
_SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}

# kind -> (config class, settings)
KINDS: dict[str, tuple[str, dict]] = {
    "llama": ("LlamaConfig", _GROUPED),
    "gpt_neox": ("GPTNeoXConfig", _BASE | {"rotary_pct": 0.5}),
    "gpt2": (
        "GPT2Config",
        _SPECIAL | {"vocab_size": VOCABULARY, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ),
    "qwen3": ("Qwen3Config", _GROUPED),
    "gemma3": ("Gemma3TextConfig", _GROUPED | _SLIDING | {"query_pre_attn_scalar": 6}),
    "qwen3_moe": ("Qwen3MoeConfig", _EXPERTS | {"num_experts": 4}),
    "mixtral": ("MixtralConfig", _EXPERTS | {"num_local_experts": 4}),
    "opt": ("OPTConfig", _BASE | {"ffn_dim": 40, "word_embed_proj_dim": 24}),
    "phi3": ("Phi3Config", _GROUPED),
    "olmo2": ("Olmo2Config", _GROUPED),
    "mistral": ("MistralConfig", _GROUPED),
    "falcon": ("FalconConfig", _BASE | {"num_kv_heads": 1}),
    "bloom": ("BloomConfig", _NARROW | {"n_layer": 2, "n_head": 4}),
    "mamba": (
        "MambaConfig",
        _NARROW | {"state_size": 4, "num_hidden_layers": 2, "intermediate_size": 48, "time_step_rank": 2},
    ),
}


def tiny_model(kind: str, dtype: torch.dtype = torch.float64, tied: bool | None = None, seed: int = 0,
               attention: str = "eager", **settings) -> nn.Module:  # fmt: skip
    """A causal language model of `kind` with random weights, in evaluation mode.

    A float64 model is float64 throughout: transformers computes norms, softmax and rotations in float32
    whatever the dtype, so that the same example alone and in a padded batch would differ by 1e-7 (and a fully
    masked row would be NaN, as the float64 minimum is -inf in float32).

    Args:
        tied: whether embedding and unembedding are one tensor; None leaves it to the architecture.
        settings: override the config, e.g. num_hidden_layers=3, vocab_size=100.
    """
    name, base = KINDS[kind]
    config = getattr(transformers, name)(**(base | settings | ({} if tied is None else {"tie_word_embeddings": tied})))
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation=attention, dtype=dtype, experts_implementation="eager"
        )
        with torch.no_grad():
            for parameter in model.parameters():  # ones and zeros (norms, biases) would hide mistakes
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    finally:
        torch.random.set_rng_state(state)
    return in_float64(model).eval() if dtype == torch.float64 else model.eval()


@functools.cache
def tiny_base(layers: int = 2) -> Path:
    """A folder with a tiny Llama of random weights and the bundled tokenizer, for whole runs of little computation; it
    is there until the process ends."""
    from crosstrace.models.loading import load_tokenizer, save_model

    tokenizer = load_tokenizer("bundled")
    sizes = {"num_hidden_layers": layers, "vocab_size": len(tokenizer), "max_position_embeddings": 256}
    folder = Path(tempfile.mkdtemp(prefix="crosstrace-tiny-base-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    save_model(tiny_model("llama", torch.float32, tied=True, **sizes), tokenizer, folder)
    return folder


def in_float64(model: nn.Module) -> nn.Module:
    """A float64 model that computes everything in float64."""
    for module in model.modules():
        module.__class__ = _float64_class(type(module))  # not the instance's forward: copies must work
    return model


class _NoFloat32(TorchFunctionMode):
    """Every request for float32 is one for float64."""

    active = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.float:
            return args[0].double()
        for argument in (*args, *kwargs.values()):
            if argument is torch.float32:  # (seldom; `in` would compare tensors)
                args = [_float64_for(x) for x in args]
                kwargs = {name: _float64_for(x) for name, x in kwargs.items()}
                break
        return func(*args, **kwargs)


def _float64_for(argument: object) -> object:
    return torch.float64 if argument is torch.float32 else argument


@functools.cache
def _float64_class(cls: type[nn.Module]) -> type[nn.Module]:
    @functools.wraps(cls.forward)
    def forward(self, *args, **kwargs):
        if _NoFloat32.active:
            return cls.forward(self, *args, **kwargs)
        _NoFloat32.active = True
        try:
            with _NoFloat32():
                return cls.forward(self, *args, **kwargs)
        finally:
            _NoFloat32.active = False

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})
