"""Reading models: where from, in which dtype, and what is wrong with a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_facts import tokenizer
from tiny_models import tiny_model

from crosstrace.errors import UserError
from crosstrace.intervene import snapshot as weights
from crosstrace.models import (
    bundled_folder,
    evaluating,
    load_model,
    load_tokenizer,
    locate,
    pad_id,
    save_model,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tiny_model("llama", torch.float32, tied=True), tokenizer("word"), tmp_path / "model")
    return tmp_path / "model"


def test_a_saved_model_comes_back(folder: Path):
    saved = tiny_model("llama", torch.float32, tied=True)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        loaded = load_model(str(folder), str(dtype).removeprefix("torch."))
        assert not loaded.training
        mine, theirs = weights(saved), weights(loaded)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name].to(dtype), theirs[name]) and theirs[name].dtype == dtype for name in mine)
    assert load_tokenizer(str(folder)).get_vocab() == tokenizer("word").get_vocab()
    assert load_model(str(folder), attention="sdpa").config._attn_implementation == "sdpa"


def test_the_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert locate("~/model") == str(folder)


def test_the_bundled_base():
    assert locate("bundled") == str(bundled_folder())
    for file in ("config.json", "model.safetensors", "tokenizer.json", "README.md"):
        assert (bundled_folder() / file).is_file()
    model, words = load_model("bundled"), load_tokenizer("bundled")
    assert len(words) == model.get_input_embeddings().num_embeddings
    assert words("Lyon")["input_ids"] != [words.unk_token_id]


def test_hub_names_are_left_alone():
    assert locate("EleutherAI/pythia-160m") == "EleutherAI/pythia-160m"


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "/no/where", "~/nowhere", "a/b/c"])
def test_a_missing_folder(name: str):
    with pytest.raises(UserError, match=f"model folder {name} does not exist; expected 'bundled', a folder"):
        load_model(name)
    with pytest.raises(UserError, match=f"model folder {name} does not exist"):
        load_tokenizer(name)


def test_a_folder_without_config(folder: Path):
    with pytest.raises(UserError, match=r"holds no config\.json; .* the path probably names its parent"):
        load_model(str(folder.parent))


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _garble(file: Path) -> None:
    file.write_bytes(b"garbage!" + file.read_bytes()[8:])


def _shrink(file: Path) -> None:
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("spoil", [_cut, _garble, _shrink, Path.unlink])
def test_damaged_weights(folder: Path, spoil):
    spoil(folder / "model.safetensors")
    with pytest.raises(UserError, match="model") as found:
        load_model(str(folder))
    assert str(folder) in str(found.value) and "\n" not in str(found.value)


def test_weights_that_lack_a_parameter_are_no_model(folder: Path):
    """transformers would fill it with random numbers and go on."""
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lack model\.layers\.1\.mlp\.up_proj\.weight and 0 other parameters"):
        load_model(str(folder))


def test_other_problems_of_a_folder(folder: Path):
    with pytest.raises(UserError, match="no model could be read"):
        load_model(str(folder), attention="nonsense")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="no tokenizer could be read"):
        load_tokenizer(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="no model could be read"):
        load_model(str(folder))


def test_weights_are_copies_and_a_tied_tensor_is_named_once():
    model = tiny_model("llama", tied=True)
    copied = weights(model)
    assert list(copied) == [name for name, _ in model.named_parameters()]
    assert "model.embed_tokens.weight" in copied and "lm_head.weight" not in copied
    before = copied["model.embed_tokens.weight"].clone()
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    assert torch.equal(copied["model.embed_tokens.weight"], before) and before.any()


def test_evaluating_restores_every_mode_also_after_an_exception():
    model = tiny_model("llama").train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    assert set(modes) == {True, False}
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == modes and torch.is_grad_enabled()
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert [module.training for module in model.modules()] == modes and torch.is_grad_enabled()


def test_pad_id():
    class Words:
        pad_token_id: int | None = None
        eos_token_id: int | None = None

    words = Words()
    assert pad_id(words) == 0
    words.eos_token_id = 7
    assert pad_id(words) == 7
    words.pad_token_id = 0
    assert pad_id(words) == 0
    words.pad_token_id, words.eos_token_id = 3, 7
    assert pad_id(words) == 3
