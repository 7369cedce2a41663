"""Reading models: where from, in which dtype, and what is wrong with a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_facts import tokenizer
from tiny_models import tiny_model

from crosstrace.cli import commands
from crosstrace.core.errors import UserError
from crosstrace.models.loading import load_model, load_tokenizer, pad_id, save_model
from crosstrace.models.locating import bundled_folder, locate
from crosstrace.models.modes import evaluating
from crosstrace.sets.interventions import snapshot as weights


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


def test_a_gguf_file_beside_a_config_without_weights(folder: Path, tmp_path: Path):
    (folder / "words.gguf").write_bytes(b"GGUF")
    load_model(str(folder))  # its own weights
    (folder / "model.safetensors").rename(tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"no safetensors and a GGUF file, words\.gguf; if that is the model, name it"):
        load_model(str(folder))


def test_a_file_is_no_folder(folder: Path):
    with pytest.raises(UserError, match=r"model\.safetensors is a file; expected the folder"):
        load_model(str(folder / "model.safetensors"))


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
    with pytest.raises(UserError, match=r"lack model\.layers\.1\.mlp\.up_proj\.weight of LlamaForCausalLM"):
        load_model(str(folder))


KINDS = [("llama", False), ("llama", True), ("gpt_neox", None), ("gpt2", None), ("qwen3_moe", None), ("phi3", None)]


@pytest.mark.parametrize("kind, tied", KINDS)
def test_checkpoints_in_shards_are_read_whole(kind: str, tied: bool | None, tmp_path: Path):
    """Tied, grouped-query, fused and expert weights, the last of which a file lays out one by one."""
    model = tiny_model(kind, torch.float32, tied=tied)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*-of-*.safetensors"))
    assert len(shards) > 2 and (tmp_path / "model.safetensors.index.json").is_file()
    loaded = load_model(str(tmp_path))
    mine, theirs = weights(model), weights(loaded)
    assert list(mine) == list(theirs) and all(torch.equal(mine[name], theirs[name]) for name in mine)
    ids = torch.arange(1, 15).view(2, 7)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, loaded(input_ids=ids).logits)
    if tied or (kind == "gpt2"):
        assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    if kind == "qwen3_moe":
        assert any(".experts.3." in name for shard in shards for name in load_file(shard))
        assert theirs["model.layers.0.mlp.experts.gate_up_proj"].shape == (4, 40, 24)
    for spoil in (_cut, _garble, Path.unlink):
        kept = shards[1].read_bytes()
        spoil(shards[1])
        with pytest.raises(UserError) as found:
            load_model(str(tmp_path))
        assert str(tmp_path) in str(found.value) and "\n" not in str(found.value)
        shards[1].write_bytes(kept)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_are_no_numbers_are_told(folder: Path, value: float, dtype: str):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][2, 3:5] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    message = r"are no numbers: model\.layers\.1\.mlp\.up_proj\.weight holds 2 NaN or infinite values of 960"
    with pytest.raises(UserError, match=message) as found:
        load_model(str(folder), dtype)
    assert str(folder) in str(found.value) and "\n" not in str(found.value)


def test_large_weights_whose_sum_overflows_are_numbers(folder: Path):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"].fill_(3e38)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert bool((load_model(str(folder)).get_parameter("model.norm.weight") == 3e38).all())


def test_other_problems_of_a_folder(folder: Path):
    with pytest.raises(UserError, match="no model could be read"):
        load_model(str(folder), attention="nonsense")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="no tokenizer could be read"):
        load_tokenizer(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
        load_model(str(folder))


def changed(file: str, **values: object) -> Callable[[Path], object]:
    """An edit of a JSON file in a folder."""
    return lambda folder: (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | values))


def written(file: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_text(text)


OWN_CODE = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model", "AutoTokenizer": ["own.Tokens", None]}
BROKEN = {
    "config: a list": written("config.json", "[]"),
    "config: cut short": written("config.json", '{"model_type": '),
    "config: heads are no number": changed("config.json", num_attention_heads="x"),
    "config: heads that do not divide": changed("config.json", num_attention_heads=5),
    "config: a negative width": changed("config.json", hidden_size=-3),
    "config: another width": changed("config.json", hidden_size=48),
    "config: fewer tokens": changed("config.json", vocab_size=3),
    "config: no such architecture": changed("config.json", model_type="nonsense"),
    "config: no such activation": changed("config.json", hidden_act="nonsense"),
    "config: quantised": changed(
        "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}
    ),
    "code of its own": changed("config.json", model_type="own", auto_map=OWN_CODE),
    "tokenizer: empty": written("tokenizer.json", "{}"),
    "tokenizer: no tokenizer": written("tokenizer.json", '{"added_tokens": [], "model": {"type": "BPE", "vocab": 3}}'),
    "tokenizer: settings are a list": written("tokenizer_config.json", "[]"),
    "weights: a pipe": lambda folder: (
        (folder / "model.safetensors").unlink(),
        os.mkfifo(folder / "model.safetensors"),
    ),
    "weights: a device": lambda folder: (folder / "more.safetensors").symlink_to("/dev/zero"),
    "weights: an index that leads away": lambda folder: (
        (folder / "model.safetensors").unlink(),
        written("model.safetensors.index.json", '{"weight_map": {"model.norm.weight": "../../x.safetensors"}}')(folder),
    ),
    "weights: an index of pickles": lambda folder: (
        (folder / "model.safetensors").rename(folder / "other.safetensors"),
        written("model.safetensors.index.json", '{"weight_map": {"model.norm.weight": "w.bin"}}')(folder),
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders_are_told_in_one_sentence(name: str, folder: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked to run code"))
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    BROKEN[name](folder)
    with pytest.raises(SystemExit) as ended:
        commands.main(["doctor", str(folder)])
    told = capsys.readouterr().err.strip()
    assert ended.value.code == 2 and "Traceback" not in told and str(folder) in told
    assert "\n" not in told and len(told) < 600, told
    assert not (folder / "ran").exists()


class Spoils:
    """Leaves a trace if it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_pickled_weights_are_read_on_request_and_never_run(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    expected = weights(load_model(str(folder)))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"are pickled \(pytorch_model\.bin\).*set model\.pickled: true"):
        load_model(str(folder))
    found = weights(load_model(str(folder), pickled=True))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    torch.save({"model.norm.weight": Spoils()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="its pickle holds more than tensors"):
        load_model(str(folder), pickled=True)
    assert not (tmp_path / "ran").exists()


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
