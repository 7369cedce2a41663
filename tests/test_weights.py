"""A checkpoint is read only if its files are one set and its model has a place for every weight; else the names are
told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_facts import tokenizer
from tiny_models import tiny_model
from torch import Tensor

from crosstrace.core.errors import UserError
from crosstrace.models.loading import load_model, save_model

IDS = torch.arange(1, 15).view(2, 7)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Tensors = dict[str, Tensor]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def saved(model: Any, folder: Path, **how) -> Path:
    model.save_pretrained(folder, **how)
    return folder


def configured(folder: Path, **values) -> None:
    """Change the config of a folder; None removes a key."""
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def rewritten(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    tensors = change(load_file(folder / WEIGHTS))
    save_file({name: x.clone() for name, x in tensors.items()}, folder / WEIGHTS, {"format": "pt"})


def refused(folder: Path, *parts: str, **how) -> str:
    """The one sentence with which a folder is refused; it holds each of the parts."""
    with pytest.raises(UserError) as found:
        load_model(str(folder), **how)
    told = str(found.value)
    assert "\n" not in told and str(folder) in told and len(told) < 700, told
    for part in parts:
        assert part in told, told
    return told


# ---- weights that the config has no place for


CHANGED_CONFIGS: dict[str, tuple[str, dict, dict, str]] = {
    "biases": ("llama", {"attention_bias": True}, {"attention_bias": False}, "layers.0.self_attn.k_proj.bias"),
    "biases of the MLP": ("llama", {"mlp_bias": True}, {"mlp_bias": False}, "layers.0.mlp.down_proj.bias"),
    "more layers": ("llama", {}, {"num_hidden_layers": 1, "layer_types": None}, "layers.1.input_layernorm.weight"),
    "more layers, counted by another name": ("gpt2", {}, {"n_layer": 1}, "h.1.attn.c_attn.bias"),
    "another architecture's norms": ("qwen3", {}, {"model_type": "llama"}, "self_attn.k_norm.weight"),
    "another architecture": ("gpt_neox", {}, {"model_type": "llama"}, "gpt_neox.layers.0.attention.dense.bias"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGED_CONFIGS)
@pytest.mark.parametrize("shards", [False, True])
def test_weights_that_the_config_has_no_place_for_are_refused_with_their_names(case, shards, tmp_path):
    kind, settings, change, name = CHANGED_CONFIGS[case]
    folder = saved(
        tiny_model(kind, torch.float32, **settings), tmp_path / "m", max_shard_size="9KB" if shards else "1GB"
    )
    assert (folder / INDEX).is_file() == shards
    load_model(str(folder))
    configured(folder, **change)
    told = refused(folder)
    assert name in told or "others" in told
    assert "has no place" in told or "lack" in told


@pytest.mark.parametrize(
    "name",
    [
        "score.weight", "v_head.summary.weight", "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "model.layers.0.self_attn.q_proj.lora_A.default.weight", "model.layers.7.mlp.up_proj.weight",
        "model.vision_tower.patch.weight", "lm_head.bias",
    ],
)  # fmt: skip
@pytest.mark.parametrize("pickled", [False, True])
def test_further_weights_are_refused(name, pickled, tmp_path):
    """Of a value head, a classifier, an adapter, another layer, an image tower, as trainers leave them."""
    folder = saved(tiny_model("llama", torch.float32), tmp_path / "m")
    rewritten(folder, lambda tensors: tensors | {name: torch.ones(3)})
    if pickled:
        torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
        (folder / WEIGHTS).unlink()
    refused(folder, name, "has no place", pickled=pickled)


def test_a_classifier_is_no_language_model(tmp_path):
    for tied in (False, True):
        config = tiny_model("llama", torch.float32, tied=tied).config
        folder = saved(transformers.LlamaForSequenceClassification(config), tmp_path / str(tied))
        refused(folder, "score.weight", *(() if tied else ("lack lm_head.weight",)))


def test_missing_weights_and_buffers_are_refused(tmp_path):
    folder = saved(tiny_model("llama", torch.float32), tmp_path / "m")
    rewritten(folder, lambda tensors: {k: v for k, v in tensors.items() if "lm_head" not in k})
    refused(folder, "lack lm_head.weight of LlamaForCausalLM")
    settings = {
        "vocab_size": 53, "hidden_size": 24, "intermediate_size": 40, "moe_intermediate_size": 20,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 8,
        "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 6, "n_shared_experts": 1,
    }  # fmt: skip
    folder = saved(transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**settings)), tmp_path / "experts")
    load_model(str(folder))
    rewritten(folder, lambda tensors: {k: v for k, v in tensors.items() if "e_score_correction_bias" not in k})
    refused(folder, "lack model.layers.1.mlp.gate.e_score_correction_bias")


def test_both_what_lacks_and_what_is_left_over_are_told(tmp_path):
    """As where a wrapper's prefix was saved too."""
    folder = saved(tiny_model("llama", torch.float32), tmp_path / "m")
    rewritten(folder, lambda tensors: {f"_orig_mod.{name}": x for name, x in tensors.items()})
    refused(folder, "lack lm_head.weight", "and hold _orig_mod.lm_head.weight")


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gpt2", "qwen3_moe"])
def test_a_body_saved_without_its_head_is_read_if_the_head_is_tied(kind, tmp_path):
    model = tiny_model(kind, torch.float32, tied=True)
    folder = saved(model, tmp_path / "m")
    saved(model.get_submodule(model.base_model_prefix), folder)  # whose names begin one module later
    assert not any(name.startswith(model.base_model_prefix) for name in load_file(folder / WEIGHTS))
    assert torch.equal(logits(load_model(str(folder))), logits(model))


# ---- weights that change nothing


def test_buffers_of_old_checkpoints_change_nothing(tmp_path):
    rotary = torch.linspace(1, 0, 3)
    mask = torch.ones(9, 9).tril().bool()[None, None]
    for kind, more in (
        ("llama", {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": rotary for i in range(2)}),
        ("gpt_neox", {"gpt_neox.layers.0.attention.bias": mask,
                      "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
                      "gpt_neox.layers.0.attention.rotary_emb.inv_freq": rotary}),
        ("gpt2", {"h.0.attn.bias": mask.to(torch.uint8), "h.1.attn.masked_bias": torch.tensor(-1e4)}),
        ("opt", {"model.decoder.embed_positions.position_ids": torch.arange(9)[None]}),
    ):  # fmt: skip
        model = tiny_model(kind, torch.float32)
        folder = saved(model, tmp_path / kind)
        rewritten(folder, lambda tensors, more=more: tensors | more)
        assert torch.equal(logits(load_model(str(folder))), logits(model)), kind


@pytest.mark.parametrize("kind, name", [("gpt2", "h.0.attn.bias"), ("gpt_neox", "gpt_neox.layers.1.attention.bias")])
def test_a_bias_that_is_no_mask_is_refused(kind, name, tmp_path):
    """transformers declares the names of causal masks unused, whatever is in them."""
    folder = saved(tiny_model(kind, torch.float32), tmp_path / "m")
    for value in (torch.randn(24), torch.ones(1, 1, 9, 9), torch.randn(1, 1, 9, 9).tril()):
        rewritten(folder, lambda tensors, value=value: tensors | {name: value})
        if value.dim() == 4 and bool((value.bool() == torch.ones(9, 9).tril().bool()).all()):
            load_model(str(folder))  # a mask that was saved as other numbers than ones
        else:
            refused(folder, name)


def test_copies_of_tied_weights_change_nothing_unless_they_differ(tmp_path):
    model = tiny_model("llama", torch.float32, tied=True)
    folder = saved(model, tmp_path / "m")
    embeddings = load_file(folder / WEIGHTS)["model.embed_tokens.weight"]
    for name in ("lm_head.weight", "shared.weight", "model.embed_out.weight"):
        rewritten(folder, lambda tensors, name=name: tensors | {name: embeddings})
        loaded = load_model(str(folder))
        assert torch.equal(logits(loaded), logits(model))
        assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    rewritten(folder, lambda tensors: tensors | {"shared.weight": embeddings + 1})
    refused(folder, "shared.weight", "has no place")
    rewritten(
        folder,
        lambda tensors: {k: v for k, v in tensors.items() if k != "shared.weight"} | {"lm_head.weight": embeddings + 1},
    )
    refused(folder, "ties lm_head.weight to model.embed_tokens.weight", "with different values", "tie_word_embeddings")


def test_the_config_of_an_untied_model_may_not_tie_it(tmp_path):
    folder = saved(tiny_model("llama", torch.float32, tied=False), tmp_path / "m")
    configured(folder, tie_word_embeddings=True)
    refused(folder, "ties lm_head.weight")


GLM = {
    "vocab_size": 53, "hidden_size": 24, "intermediate_size": 40, "moe_intermediate_size": 20, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "first_k_dense_replace": 99, "num_hidden_layers": 47,
}  # fmt: skip


def test_heads_that_draft_tokens_change_nothing_and_a_layer_of_their_number_is_refused(tmp_path):
    """transformers leaves out what has the number of such a head in the published checkpoints, whatever it is."""
    torch.manual_seed(0)
    model = transformers.Glm4MoeForCausalLM(transformers.Glm4MoeConfig(**GLM)).eval()
    folder = saved(model, tmp_path / "m")
    configured(folder, num_hidden_layers=46)
    refused(folder, "model.layers.46.")
    rewritten(folder, lambda tensors: tensors | {"model.layers.46.eh_proj.weight": torch.ones(24, 48)})
    model.model.layers = model.model.layers[:46]
    torch.testing.assert_close(logits(load_model(str(folder))), logits(model))
    small = saved(tiny_model("qwen3", torch.float32), tmp_path / "small")
    more = {f"model.layers.2.{name}": torch.ones(24) for name in ("enorm.weight", "mlp.up_proj.weight")}
    rewritten(small, lambda tensors: tensors | more | {"mtp.layers.0.mlp.up_proj.weight": torch.ones(24)})
    load_model(str(small))


def test_the_text_part_of_a_model_for_images_is_read_without_its_other_parts(tmp_path):
    text = {
        "vocab_size": 53, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "linear_num_value_heads": 2, "linear_num_key_heads": 2,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 24, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 24}
    config = transformers.Qwen3_5Config(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    model = transformers.Qwen3_5ForConditionalGeneration(config).eval()
    folder = saved(model, tmp_path / "m")
    assert any("visual" in name for name in load_file(folder / WEIGHTS))
    loaded = load_model(str(folder))
    assert type(loaded).__name__ == "Qwen3_5ForCausalLM"
    torch.testing.assert_close(logits(loaded), logits(model))
    name = "model.language_model.layers.1.self_attn.q_proj.bias"
    rewritten(folder, lambda tensors: tensors | {name: torch.ones(3)})
    refused(folder, "self_attn.q_proj.bias")


# ---- files that are not one set


@pytest.fixture
def sharded(tmp_path) -> Path:
    return saved(tiny_model("llama", torch.float32), tmp_path / "m", max_shard_size="9KB")


def _map(folder: Path, change: Callable[[dict[str, str]], dict[str, str]]) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_an_index_that_does_not_describe_its_files_is_refused(sharded):
    kept = (sharded / INDEX).read_text()
    where = json.loads(kept)["weight_map"]
    norm = where["model.norm.weight"]
    other = next(file for file in where.values() if file != norm)
    for change, part in (
        (
            lambda names: names | {"model.norm.weight": other},
            f"puts model.norm.weight into {other}, but it lies in {norm}",
        ),
        (lambda names: names | {"model.more.weight": norm}, f"puts model.more.weight into {norm}, but it lies in none"),
        (
            lambda names: {k: v for k, v in names.items() if k != "model.norm.weight"},
            f"puts model.norm.weight into no file, but it lies in {norm}",
        ),
        (lambda names: {k: v for k, v in names.items() if v != other}, f"{other} does not belong to {INDEX}"),
        (lambda names: names | {"model.norm.weight": "model-00099-of-00099.safetensors"}, "is missing"),
    ):
        _map(sharded, change)
        refused(sharded, part)
        (sharded / INDEX).write_text(kept)
    load_model(str(sharded))
    twice = load_file(sharded / norm)
    save_file(twice | load_file(sharded / other), sharded / other, {"format": "pt"})
    refused(sharded, " and ")


def test_two_sets_of_weights_in_one_folder_are_refused(sharded, tmp_path):
    other = saved(tiny_model("llama", torch.float32, seed=3), tmp_path / "other")
    whole = (other / WEIGHTS).read_bytes()
    (sharded / WEIGHTS).write_bytes(whole)
    refused(sharded, "two sets of weights, model.safetensors and the files of model.safetensors.index.json")
    (sharded / INDEX).unlink()
    refused(sharded, "two sets of weights: model-00001-of-")
    (other / "shard-00000-model-00000-of-00001.safetensors").write_bytes(whole)
    refused(other, "pieces of a distributed checkpoint")


def test_weights_beside_those_that_are_read_do_no_harm(tmp_path):
    """As in published folders: the same weights for other programs."""
    model = tiny_model("llama", torch.float32)
    folder = saved(model, tmp_path / "m")
    for name in ("consolidated.safetensors", "pytorch_model.bin", "model.fp16.safetensors"):
        (folder / name).write_bytes((folder / WEIGHTS).read_bytes())
    assert torch.equal(logits(load_model(str(folder))), logits(model))


def test_weights_under_the_name_that_the_config_gives_are_checked_too(tmp_path):
    model = tiny_model("llama", torch.float32)
    folder = saved(model, tmp_path / "m")
    rewritten(folder, lambda tensors: tensors | {"lm_head.bias": torch.ones(53)})
    (folder / WEIGHTS).rename(folder / "own.safetensors")
    configured(folder, transformers_weights="own.safetensors")
    refused(folder, "lm_head.bias")


def test_what_crosstrace_saves_it_reads(tmp_path):
    for kind in ("llama", "gpt2", "gpt_neox", "qwen3_moe", "mamba", "bloom", "falcon"):
        model = tiny_model(kind, torch.float32)
        save_model(model, tokenizer("word"), tmp_path / kind)
        torch.testing.assert_close(logits(load_model(str(tmp_path / kind))), logits(model))
