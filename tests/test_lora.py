"""LoRA: an adapter's folder is read as PEFT merges it; unmerged, every analysis gives what the merged model gives, or
what a plain loop gives over the adapter's own parameters."""

from __future__ import annotations

import copy
import functools
import json
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from reference import reference_trace
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from test_circuit import WORDS, asked
from test_consistency import gradient, word_pairs
from test_trace import assert_same, make_examples, pad
from test_training import TASKS, calm, of_task, taught, with_tasks
from tiny_facts import tiny_world
from tiny_models import tiny_model
from torch import Tensor, nn

from crosstrace.analyses import circuit, signature
from crosstrace.analyses.consistency import gradient_consistency, representation_consistency
from crosstrace.analyses.lens import attention_patterns, logit_lens
from crosstrace.analyses.positions import PLACES, at_places, components, grafted_at
from crosstrace.analyses.transfer import transfer
from crosstrace.core.errors import UserError
from crosstrace.data.tokens import collate
from crosstrace.models.anatomy import Anatomy
from crosstrace.models.loading import DTYPES, load_model, load_tokenizer, save_model
from crosstrace.models.locating import locate
from crosstrace.sets.interventions import ablated, grafted, snapshot
from crosstrace.sets.paramset import ParamSet
from crosstrace.sets.selection import scope
from crosstrace.trace import TrainingTrace, trace
from crosstrace.trace.products import gradient_products

SEPARATE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = {
    "llama": SEPARATE,
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "qwen3": SEPARATE,
    "qwen3_moe": SEPARATE[:4],
}
USUAL = {kind: ["q_proj", "v_proj"] for kind in TARGETS} | {"gpt_neox": ["query_key_value"], "gpt2": ["c_attn"]}
KINDS = list(TARGETS)
HEADS, PREFIX = 4, "base_model.model."


def adapter_config(kind: str, **settings) -> LoraConfig:
    own: dict[str, Any] = {"r": 3, "lora_alpha": 8, "target_modules": TARGETS[kind], "task_type": "CAUSAL_LM"}
    own["fan_in_fan_out"] = kind == "gpt2"
    own.update(settings)
    return LoraConfig(**own)


def base_model(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    return tiny_model(kind, dtype, vocab_size=len(WORDS))


def teach(model: nn.Module) -> None:
    """A few AdamW steps on the adapter alone."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    batch = collate(asked(8), "answer", pad_id=0)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
    model.train()
    for _ in range(4):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    model.eval()


@functools.cache
def taught_models(kind: str) -> tuple[Any, Any]:
    """A base with a trained adapter, unmerged, and as PEFT merges it."""
    model: Any = get_peft_model(calm(base_model(kind)), adapter_config(kind))
    teach(model)
    model(torch.ones(1, 3, dtype=torch.long), output_hidden_states=True, output_attentions=True)  # its hooks stay
    merged = copy.deepcopy(model).merge_and_unload()
    assert all(p.any() for name, p in model.named_parameters() if "lora_B" in name)
    return model, merged.requires_grad_(True)


@contextmanager
def left_alone(model: nn.Module) -> Iterator[None]:
    """Whatever is done within leaves the model as it was, to the bit."""

    def state() -> tuple[Any, ...]:
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
        of = [(name, p.requires_grad, p.grad is None) for name, p in model.named_parameters()]
        return hooks, of, [module.training for module in model.modules()]

    before, bits = state(), snapshot(model)
    yield
    assert state() == before and all(torch.equal(p, bits[name]) for name, p in model.named_parameters())
    assert not all(p.requires_grad for p in model.parameters())


@pytest.fixture(params=KINDS)
def tuned(request) -> Iterator[Any]:
    model, _ = taught_models(request.param)
    with left_alone(model):
        yield model


def merged_of(model: Any) -> Any:
    return next(merged for one, merged in map(taught_models, KINDS) if one is model)


def unfrozen(model: nn.Module) -> Any:
    return copy.deepcopy(model).requires_grad_(True)


def adapter_names(model: nn.Module, part: str = "lora_") -> list[str]:
    return scope(model, include_embeddings=True, only=part)


def whole(model: nn.Module, part: str = "lora_") -> ParamSet:
    names = adapter_names(model, part)
    return ParamSet({name: torch.ones_like(model.get_parameter(name), dtype=torch.bool) for name in names})


def some(model: nn.Module) -> ParamSet:
    generator = torch.Generator().manual_seed(0)
    return ParamSet({n: torch.rand(m.shape, generator=generator) < 0.4 for n, m in whole(model).masks.items()})


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def assert_close(found: Any, expected: Any, tolerance: float = 1e-8) -> None:
    """Rows, arrays and tensors of the same structure, whose numbers are equal."""
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for pair in zip(found, expected):
            assert_close(*pair, tolerance)
    elif isinstance(expected, (Tensor, np.ndarray)):
        assert found.shape == expected.shape and float(abs(found - expected).max()) <= tolerance
    else:
        assert found == (pytest.approx(expected, abs=tolerance) if isinstance(expected, float) else expected)


def plain_name(name: str) -> str:
    return name.removeprefix(PREFIX).replace(".base_layer", "")


# ---- adapters on disk


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_adapter_is_pefts_own_merged_model_bit_for_bit(kind, tmp_path):
    save_model(base_model(kind, torch.float32), WORDS, tmp_path / "base")
    model: Any = get_peft_model(
        load_model(str(tmp_path / "base")), adapter_config(kind, target_modules=USUAL[kind], lora_dropout=0.1)
    )
    teach(model)
    model.save_pretrained(tmp_path / "adapter")
    place = str(tmp_path / "adapter")
    assert locate(place) == place
    for dtype in ("float32", "bfloat16"):
        state = torch.random.get_rng_state()
        loaded = load_model(place, dtype, attention="sdpa")
        assert torch.equal(torch.random.get_rng_state(), state)
        by_peft = PeftModel.from_pretrained(load_model(str(tmp_path / "base"), dtype), place).merge_and_unload()
        mine, theirs = dict(loaded.named_parameters()), dict(by_peft.named_parameters())
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) and mine[name].dtype == DTYPES[dtype] for name in mine)
        assert all(p.requires_grad for p in mine.values()) and not loaded.training
        assert not any(type(module).__module__.startswith("peft") for module in loaded.modules())
        assert loaded.config._attn_implementation == "sdpa" and loaded.config.name_or_path == place
    batch = collate(asked(4), pad_id=0)
    base, loaded = (load_model(str(tmp_path / name)) for name in ("base", "adapter"))
    torch.testing.assert_close(logits(loaded, batch), logits(model, batch), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(loaded, batch), logits(base, batch), rtol=1e-2, atol=1e-3)
    save_model(loaded, WORDS, tmp_path / "merged")
    again = load_model(str(tmp_path / "merged"))
    assert all(torch.equal(p, loaded.get_parameter(name)) for name, p in again.named_parameters())


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder with a base and an adapter of it."""
    home = tmp_path_factory.mktemp("lora")
    save_model(tiny_model("llama", torch.float32), WORDS, home / "base")
    model: Any = get_peft_model(load_model(str(home / "base")), adapter_config("llama"))
    model.save_pretrained(home / "adapter")
    return home


def test_the_tokenizer_is_the_adapters_or_else_the_bases(saved, tmp_path):
    assert load_tokenizer(str(saved / "adapter")).get_vocab() == WORDS.get_vocab()
    place = shutil.copytree(saved / "adapter", tmp_path / "own")
    own = copy.deepcopy(WORDS)
    own.add_tokens(["entirely new"])
    own.save_pretrained(place)
    assert load_tokenizer(str(place)).get_vocab() == own.get_vocab() != WORDS.get_vocab()


class Spoils:
    """Leaves a trace if it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("unpickled"),)


def _settings(**changed) -> Callable[[Path], None]:
    def spoil(place: Path) -> None:
        file = place / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changed))

    return spoil


def _weights(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], None]:
    def spoil(place: Path) -> None:
        file = place / "adapter_model.safetensors"
        save_file(change(load_file(file)), file, {"format": "pt"})

    return spoil


def _pickled(place: Path) -> None:
    (place / "adapter_model.safetensors").unlink()
    with open(place / "adapter_model.bin", "wb") as file:
        pickle.dump(Spoils(), file)


def _cut(place: Path) -> None:
    file = place / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def _both(place: Path) -> None:
    (place / "model-00001-of-00002.safetensors").touch()


def _of_itself(place: Path) -> None:
    _settings(base_model_name_or_path=str(place))(place)


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A"
BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (lambda place: (place / "adapter_model.safetensors").unlink(), r"holds no adapter_model\.safet"),
    "pickled": (_pickled, r"adapter_model\.bin is a pickle.*not read"),
    "cut short": (_cut, "SafetensorError"),
    "other shapes": (_weights(lambda x: {k: v[:-1].clone() for k, v in x.items()}), rf"size mismatch for {FIRST}"),
    "other rank": (_settings(r=5), rf"size mismatch for {FIRST}"),
    "weights left out": (_weights(lambda x: {k: v for k, v in x.items() if FIRST not in k}), f"{FIRST}.* and 0 others"),
    "weights without a place": (
        _weights(lambda x: x | {FIRST.replace(".0.", ".9.") + ".weight": torch.zeros(3, 24)}), "s.9.* and 0 others",
    ),
    "unknown type": (_settings(peft_type="FOO"), "of the type 'FOO'; expected LORA"),
    "another type": (_settings(peft_type="PREFIX_TUNING"), "of the type 'PREFIX_TUNING'"),
    "no type": (_settings(peft_type=None), "of the type None"),
    "imports": (_settings(megatron_config={"a": 1}, megatron_core="evil"), "of the type 'MEGATRON'"),
    "no settings": (lambda place: (place / "adapter_config.json").write_text("["), "can't be read"),
    "list of settings": (lambda place: (place / "adapter_config.json").write_text("[]"), "holds no settings"),
    "wrong settings": (_settings(lora_alpha="many"), "TypeError"),
    "other modules": (_settings(target_modules=["c_attn"]), "Target modules"),
    "no numbers": (
        _weights(lambda x: {k: v / 0 if FIRST in k else v for k, v in x.items()}),
        f"{FIRST}.* holds 72 NaN or infinite",
    ),
    "no merging": (_settings(alora_invocation_tokens=[1]), "does not support merging"),
    "no base": (_settings(base_model_name_or_path=None), "does not tell its base; put its absolute path"),
    "missing base": (_settings(base_model_name_or_path="/no/where"), "model folder /no/where does not exist"),
    "relative base": (_settings(base_model_name_or_path="../base"), r"by the relative path \.\./base"),
    "relative base, as a hub name": (_settings(base_model_name_or_path="some/base"), "by the relative path some/base"),
    "a revision of the base": (
        _settings(base_model_name_or_path="no/such-model", revision="abc"), "of the revision 'abc' of no/such-model",
    ),
    "an adapter as base": (_of_itself, "an adapter itself"),
    "a model too": (_both, "holds both a model and"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_adapters_are_told_in_one_sentence_and_nothing_of_theirs_is_run(case, saved, tmp_path, monkeypatch):
    (tmp_path / "here" / "some" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here" / "evil.py").write_text("open('imported', 'w')")
    monkeypatch.syspath_prepend(str(tmp_path / "here"))
    place = shutil.copytree(saved / "adapter", tmp_path / "adapter")
    spoil, message = BAD[case]
    spoil(place)
    with pytest.raises(UserError, match=message) as found:
        load_model(str(place))
    assert str(place) in str(found.value) and "\n" not in str(found.value)
    assert not Path("unpickled").exists() and not Path("imported").exists()
    if "base" in case:
        with pytest.raises(UserError, match=message):
            load_tokenizer(str(place))


def moved(kind: str, home: Path, tied: bool | None = None, **settings) -> Any:
    """A base in home/base with an adapter of these settings, all of whose weights are moved at random."""
    if not (home / "base").exists():
        save_model(tiny_model(kind, torch.float32, tied=tied), WORDS, home / "base")
    model: Any = get_peft_model(load_model(str(home / "base")), adapter_config(kind, **settings)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def assert_loads_exactly(model: Any, place: Path) -> Any:
    """The saved adapter gives the logits of the model that was saved, merged and on its base; the merged model."""
    batch = {"input_ids": torch.arange(1, 15).view(2, 7), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    truth, base = logits(model, batch), load_model(model.peft_config["default"].base_model_name_or_path)
    loaded = load_model(str(place))
    assert (logits(base, batch) - truth).abs().max() > 1e-2
    torch.testing.assert_close(logits(loaded, batch), truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(load_model(str(place), merge=False), batch), truth, rtol=1e-5, atol=1e-5)
    save_model(loaded, None, place.parent / "merged")
    torch.testing.assert_close(logits(load_model(str(place.parent / "merged")), batch), logits(loaded, batch))
    return loaded


Q_AND_DOWN = {"target_modules": ["q_proj", "down_proj"]}
EXACT: dict[str, tuple[str, dict]] = {
    "rslora": ("llama", Q_AND_DOWN | {"use_rslora": True}),
    "patterns": ("llama", {"rank_pattern": {"layers.0.self_attn.q_proj": 5}, "alpha_pattern": {"v_proj": 20}}),
    "transposed": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "transposed, not said": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": False}),
    "DoRA": ("llama", Q_AND_DOWN | {"use_dora": True}),
    "biases of B": ("gpt_neox", {"target_modules": ["query_key_value"], "lora_bias": True}),
    "biases of targets": ("gpt_neox", {"target_modules": ["query_key_value"], "bias": "lora_only"}),
    "all biases": ("gpt_neox", {"target_modules": ["query_key_value"], "bias": "all"}),
    "some layers": ("llama", {"layers_to_transform": [1]}),
    "all but some modules": ("llama", {"exclude_modules": ["v_proj", "layers.0.mlp.up_proj"]}),
    "modules by pattern": ("llama", {"target_modules": r".*\.1\.self_attn\.(q|k)_proj"}),
    "all linear layers": ("qwen3", {"target_modules": "all-linear"}),
    "experts": ("qwen3_moe", {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "gate.weight"]}),
    "experts and modules": ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}),
    "whole modules": ("llama", Q_AND_DOWN | {"modules_to_save": ["lm_head", "embed_tokens", "norm"]}),
    "the ends": ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "tokens": ("llama", Q_AND_DOWN | {"trainable_token_indices": [3, 5]}),
    **{f"begun {how}": ("llama", {"r": 4, "init_lora_weights": how})
       for how in ("gaussian", "orthogonal", "eva", "mica", "pissa", "olora")},
    "begun transposed": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "init_lora_weights": "pissa"}),
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("case", EXACT)
def test_an_adapter_of_any_settings_is_the_model_that_was_saved(case, tmp_path):
    kind, settings = EXACT[case]
    model = moved(kind, tmp_path, **settings)
    model.save_pretrained(tmp_path / "adapter")
    assert_loads_exactly(model, tmp_path / "adapter")


def test_adapters_that_decompose_the_base_are_read_in_double_precision_too(tmp_path):
    for how in ("pissa", "olora", "mica"):
        model = moved("llama", tmp_path, r=4, init_lora_weights=how)
        model.save_pretrained(tmp_path / how)
        batch = pad(make_examples(2))
        loaded = load_model(str(tmp_path / how), "float64")
        assert {p.dtype for p in loaded.parameters()} == {torch.float64}
        torch.testing.assert_close(logits(loaded, batch).float(), logits(model, batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["pissa_niter_4", "PiSSA_niter_16", "corda", "lora_ga", "loftq", "of tomorrow", 3])
def test_adapters_begun_on_a_base_that_can_not_be_restored_are_refused(how, tmp_path):
    """PEFT's own reload is off by as much as the base was changed, by other random numbers or not at all."""
    model = moved("llama", tmp_path)
    model.save_pretrained(tmp_path / "adapter")
    _settings(init_lora_weights=how)(tmp_path / "adapter")
    with pytest.raises(UserError, match="changes the base's weights in a way that the folder does not tell") as found:
        load_model(str(tmp_path / "adapter"))
    assert repr(how).lower() in str(found.value) and "merge_and_unload" in str(found.value)


def test_such_an_adapter_that_peft_converts_is_read(tmp_path):
    save_model(tiny_model("llama", torch.float32), WORDS, tmp_path / "base")
    model: Any = get_peft_model(
        load_model(str(tmp_path / "base")), adapter_config("llama", r=4, init_lora_weights="pissa_niter_4")
    )
    model.peft_config["default"].init_lora_weights = True  # as PEFT's guide says
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa_niter_4"
    with torch.no_grad():
        for name in adapter_names(model):
            model.get_parameter(name).add_(0.1)
    model.eval().save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert_loads_exactly(model, tmp_path / "adapter")


TIED_EXACT: dict[str, tuple[str, dict]] = {
    "tokens": ("llama", {"trainable_token_indices": [3, 5]}),
    "tokens by name": ("llama", {"trainable_token_indices": {"embed_tokens": [3, 5]}}),
    "tokens by both names": ("llama", {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [3, 5]}}),
    "tokens, tied": ("llama", {"trainable_token_indices": {"embed_tokens": [3]}, "ensure_weight_tying": True}),
    "tokens of GPT-2": ("gpt2", {"target_modules": ["c_attn"], "trainable_token_indices": {"wte": [3]}}),
    "the tensor": ("llama", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "the tensor by both names": (
        "llama", {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}
    ),
    "one for each use": ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "the unembedding alone": ("llama", {"modules_to_save": ["lm_head"]}),
    "the embeddings alone": ("llama", {"modules_to_save": ["embed_tokens"]}),
}  # fmt: skip


@pytest.mark.parametrize("case", TIED_EXACT)
def test_adapters_of_tied_embeddings_that_merge_exactly_are_read(case, tmp_path):
    kind, settings = TIED_EXACT[case]
    model = moved(kind, tmp_path, tied=True, **settings)
    model.save_pretrained(tmp_path / "adapter")
    loaded = assert_loads_exactly(model, tmp_path / "adapter")
    tied = loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert tied == loaded.config.tie_word_embeddings == (case.startswith("tokens") or case.startswith("the tensor"))


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "ensure_weight_tying": True},
        {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [4]}},
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("merge", [True, False])
def test_adapters_of_tied_embeddings_that_do_not_merge_are_told(settings, dtype, merge, tmp_path):
    moved("llama", tmp_path, tied=True, **settings).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"can't be merged exactly: .* which are one tensor") as found:
        load_model(str(tmp_path / "adapter"), dtype, merge=merge)
    assert "ensure_weight_tying" in str(found.value) and "\n" not in str(found.value)


@pytest.mark.parametrize("settings", [{}, {"layers_to_transform": [1]}])
def test_adapters_of_layers_that_share_a_tensor_are_told(settings, tmp_path):
    """PEFT would merge into one layer what was trained for several."""
    moved("llama", tmp_path, layer_replication=[[0, 2], [1, 2]], **settings).save_pretrained(tmp_path / "adapter")
    for merge in (True, False):
        with pytest.raises(UserError, match=r"can't be merged exactly: .*layer_replication.* shares its tensor"):
            load_model(str(tmp_path / "adapter"), merge=merge)


def test_weights_of_an_adapter_that_its_settings_do_not_name_are_refused(tmp_path):
    """PEFT would put them into the base, and of a tied base into both uses, or leave them out."""
    for tied in (False, True):
        home = tmp_path / str(tied)
        moved("llama", home, tied=tied, modules_to_save=["lm_head", "norm"]).save_pretrained(home / "adapter")
        _settings(modules_to_save=None)(home / "adapter")
        with pytest.raises(
            UserError, match=r"holds base_model\.model\.lm_head\.weight, which its adapter_config\.json does"
        ):
            load_model(str(home / "adapter"))
    home = tmp_path / "biases"
    moved("gpt_neox", home, target_modules=["query_key_value"], bias="all").save_pretrained(home / "adapter")
    _settings(bias="none")(home / "adapter")
    with pytest.raises(UserError, match=r"bias"):
        load_model(str(home / "adapter"))


def test_weights_of_an_adapter_that_its_settings_name_must_be_there(tmp_path):
    for name, kind, settings, part in (
        ("a", "gpt_neox", {"target_modules": ["query_key_value"], "bias": "all"}, "dense.bias"),
        ("b", "llama", {"modules_to_save": ["norm"]}, "norm.weight"),
        ("c", "llama", {"trainable_token_indices": [3]}, "token_adapter"),
    ):
        moved(kind, tmp_path / name, **settings).save_pretrained(tmp_path / name / "adapter")
        _weights(lambda tensors, part=part: {k: v for k, v in tensors.items() if part not in k})(
            tmp_path / name / "adapter"
        )
        with pytest.raises(UserError, match=rf"lacks \S*{part}"):
            load_model(str(tmp_path / name / "adapter"))


def test_copies_of_the_base_in_an_adapter_change_nothing(tmp_path):
    model = moved("llama", tmp_path)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    assert "base_model.model.lm_head.weight" in load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert_loads_exactly(model, tmp_path / "adapter")


def test_random_weights_and_a_missing_peft_are_told(saved, monkeypatch):
    with pytest.raises(UserError, match="holds an adapter, which fits no random weights"):
        load_model(str(saved / "adapter"), random_init=0)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        UserError, match=r"peft, which reads it, is not installed; run `pip install 'crosstrace\[peft\]'`"
    ):
        load_model(str(saved / "adapter"))
    load_model(str(saved / "base"))


def test_an_adapter_of_the_hub_is_told(monkeypatch):
    monkeypatch.setattr(
        "transformers.utils.peft_utils.find_adapter_config_file", lambda name: f"/cache/{name}/adapter_config.json"
    )
    with pytest.raises(UserError, match="some/adapter is an adapter on the hub; download it"):
        load_model("some/adapter")


# ---- where an adapter's parameters belong


def test_the_wrapper_hides_no_layer_kind_or_unit(tuned):
    anatomy, plain = Anatomy(tuned), Anatomy(merged_of(tuned))
    for unit in ("query_head", "kv_head", "head", "neuron", "module", "layer", "kind"):
        assert anatomy.units(unit) == plain.units(unit)
        base = [name for name in anatomy.shapes if "lora_" not in name]
        assert anatomy.sizes(unit, base).tolist() == plain.sizes(unit).tolist()
        sites = {path.removeprefix(PREFIX): index for path, index in anatomy.sites(unit).items()}
        assert_close(sites, plain.sites(unit), 0)
    for name, kind in anatomy.kind.items():
        projection = name.partition(".lora_")[0] + ".base_layer.weight"
        expected = (kind, anatomy.layer[name]) if "lora_" not in name else (
            plain.kind[plain_name(projection)], plain.layer[plain_name(projection)])  # fmt: skip
        assert (anatomy.kind[name], anatomy.layer[name]) == expected
    assert components(anatomy).keys() == components(plain).keys()


def columns_read(model: Any, site: str, batch: dict[str, Tensor]) -> Tensor:
    seen: list[Tensor] = []
    with model.get_submodule(site).register_forward_pre_hook(lambda module, args: seen.append(args[0])):
        logits(model, batch)
    return seen[0].flatten(0, -2)


def test_rows_of_b_move_their_own_units_and_no_others(tuned):
    """Of query heads, key/value heads and neurons; what they read is seen at the output or down projection."""
    anatomy, batch, values = Anatomy(tuned), collate(asked(3), pad_id=0), snapshot(tuned)
    groups = [unit for unit in ("query_head", "kv_head", "neuron") if anatomy.units(unit)]
    assert groups == ["query_head", "kv_head", "neuron"] or ".experts." in " ".join(values)
    for unit in groups:
        sites = anatomy.sites("neuron" if unit == "neuron" else "query_head")
        site, index = list(sites.items())[-1]  # of the last layer
        before = columns_read(tuned, site, batch)
        labels = [label for label in anatomy.units(unit) if label.startswith("L1.")]
        readers = len(index.unique()) // len(labels)  # query heads of a key/value head
        for number in (0, len(labels) - 1):
            members = anatomy.members(unit, labels[number], adapter_names(tuned, "lora_B"))
            own = torch.isin(index - index.min(), torch.arange(readers * number, readers * (number + 1)))
            other = {
                name: values[name] + torch.randn(values[name].shape, dtype=torch.float64) for name in members.masks
            }
            with grafted(tuned, members, other):
                moved = ((columns_read(tuned, site, batch) - before).abs() > 1e-10).any(0)
            assert torch.equal(moved, own) and members.size


def test_columns_of_a_read_their_own_units_and_no_others(tuned):
    """Zeroing them is the same as taking the units away from the adapter alone."""
    anatomy, batch = Anatomy(tuned), collate(asked(3), pad_id=0)
    for unit in [unit for unit in circuit.NODES if anatomy.units(unit)]:
        site, index = next(iter(anatomy.sites(unit).items()))
        label = anatomy.units(unit)[1]
        members = anatomy.members(unit, label, adapter_names(tuned, "lora_A"))
        assert {name for name, count in members.counts().items() if count} == {f"{site}.lora_A.default.weight"}
        with ablated(tuned, members, to="zero"):
            found = logits(tuned, batch)
        inner = tuned.get_submodule(f"{site}.lora_A.default")
        with inner.register_forward_pre_hook(lambda module, args, index=index: (args[0].masked_fill(index == 1, 0),)):
            expected = logits(tuned, batch)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        assert (found - logits(tuned, batch)).abs().max() > 1e-8


def test_the_rank_belongs_to_no_unit_and_each_row_to_one(tuned):
    anatomy = Anatomy(tuned)
    counted = 0
    for units, family in ((("query_head", "kv_head"), "attention."), (("neuron",), "mlp.")):
        for name in adapter_names(tuned) if anatomy.units(units[0]) else ():
            if anatomy.kind[name].startswith(family):
                inward = anatomy.kind[name] in ("attention.o", "mlp.down")
                belongs = ("lora_A" in name) == inward
                held = sum(int(anatomy.sizes(unit, [name]).sum()) for unit in units)
                assert held == (anatomy.shapes[name].numel() if belongs else 0), name
                counted += 1
    assert counted == len(adapter_names(tuned))
    third = some(tuned)
    for unit in ("query_head", "kv_head"):
        units = [anatomy.members(unit, label, adapter_names(tuned)) for label in anatomy.units(unit)]
        assert anatomy.count(third, unit).tolist() == [(third & own).size for own in units]


def test_an_adapter_that_transformers_put_on_is_found_too():
    model: Any = tiny_model("llama")
    model.add_adapter(LoraConfig(r=3, target_modules=["q_proj", "o_proj"], init_lora_weights=False))
    anatomy = Anatomy(model)
    assert len(anatomy.units("query_head")) == 2 * HEADS and len(anatomy.units("neuron")) == 80
    assert anatomy.sizes("query_head", scope(model, only="lora_")).tolist() == [3 * 6 + 3 * 6] * 8


# ---- nodes: the unmerged model gives what the merged one gives


def test_circuits_are_those_of_the_merged_model(tuned, monkeypatch):
    monkeypatch.setattr(circuit, "MOST", 2)
    items = asked(4)
    data, found = circuit.answer_batches(items, WORDS), []
    for model in (tuned, merged_of(tuned)):
        anatomy = Anatomy(model)
        units = [unit for unit in circuit.NODES if anatomy.sites(unit)]
        means = circuit.node_means(model, data, anatomy, units)
        scores, rows = circuit.attribution(model, data, anatomy, means, units, steps=2)
        alone = circuit.single_ablations(model, WORDS, items, anatomy, means, "query_head", [5])
        order = scores["query_head"]
        curve = circuit.curve(model, WORDS, items, anatomy, means, order, "query_head", (0.5,), seeds=1)
        found.append((list(means.values()), scores, [list(row.values())[1:] for row in rows], alone, curve))
    assert_close(*found)
    assert np.abs(found[0][1]["query_head"]).max() > 1e-3


def test_agreement_is_over_the_adapters_own_parameters(tuned):
    anatomy, pset = Anatomy(tuned), some(tuned)
    scores = np.random.default_rng(0).normal(size=len(anatomy.units("query_head")))
    row = circuit.agreement(scores, pset, anatomy, "query_head", permutations=9)
    own = [anatomy.members("query_head", label, list(pset.masks)) for label in anatomy.units("query_head")]
    shares = [(pset & unit).size / unit.size for unit in own]
    assert row["nodes"] == 2 * HEADS and row["spearman"] == pytest.approx(
        spearmanr(shares, np.abs(scores))[0], abs=1e-12
    )


def test_hidden_states_lens_and_attention_are_those_of_the_merged_model(tuned):
    items, pairs, merged = asked(6), word_pairs(2), merged_of(tuned)
    for analysis in (
        lambda model: representation_consistency(model, pairs, pad_id=0),
        lambda model: logit_lens(model, items, pad_id=0),
        lambda model: attention_patterns(model, items, [0, 5], pad_id=0),
    ):
        assert_close(analysis(tuned), analysis(merged))


def test_signature_and_transfer_are_those_of_the_merged_model(tuned):
    pairs, merged, world = word_pairs(2)[:3], merged_of(tuned), tiny_world(people=8)
    for analysis in (
        lambda model: signature.input_signature(model, pairs, pad_id=0),
        lambda model: transfer(model, WORDS, world, number=2),
    ):
        assert_close(analysis(tuned), analysis(merged))


# ---- parameters: traces, gradients, interventions


def test_traces_are_exact_for_the_adapter_and_its_frozen_base(tuned):
    examples = make_examples(5)
    found = trace(tuned, [pad(examples[:3]), pad(examples[3:])], task="qa", measures=("abs", "net"))
    for one in found:
        assert_same(one.values, reference_trace(unfrozen(tuned), examples, one.measure))
    assert "general" not in found[0].meta["coverage"] and "alone" not in found[0].meta["coverage"]
    (plain,) = trace(merged_of(tuned), [pad(examples)], task="qa")
    base = {plain_name(name): value for name, value in found[0].values.items() if "lora_" not in name}
    assert_same({name: base[name] for name in plain.values}, plain.values, 1e-8)
    assert len(base) == len(plain.values)


@pytest.mark.long
@pytest.mark.parametrize("reuse", [False, True])
def test_traces_of_a_training_are_of_the_adapter_alone(tuned, reuse):
    model = copy.deepcopy(tuned)  # it is trained
    examples = with_tasks(make_examples(8, seed=3))
    with TrainingTrace(model, TASKS, reuse=reuse) as tracing:
        taught(model, [examples], tracing)
    for found in tracing.traces():
        expected = reference_trace(unfrozen(tuned), of_task(examples, TASKS.index(found.task)), found.measure)
        assert list(found.values) == adapter_names(tuned)
        assert_same(found.values, {name: expected[name] for name in found.values})
    twin = copy.deepcopy(tuned)
    taught(twin, [examples])
    for name, p in twin.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), p, rtol=1e-9, atol=1e-12 if reuse else 0)
        assert torch.equal(p, tuned.get_parameter(name)) == ("lora_" not in name)


def test_gradients_of_the_adapter_are_compared_exactly(tuned):
    pairs, sets = word_pairs(1), {"all": whole(tuned), "some": some(tuned)}
    free = unfrozen(tuned)
    texts = [pair.stored for pair in pairs] + [pair.recalled for pair in pairs]
    gradients = torch.stack([gradient(free, item) for item in texts])
    (products,) = gradient_products(tuned, [collate(texts, pad_id=0)], sets)
    rows = gradient_consistency(tuned, pairs, sets, pad_id=0)
    for (label, pset), row in zip(sets.items(), rows):
        nothing = torch.zeros((), dtype=torch.bool)
        chosen = torch.cat([pset.masks.get(n, nothing).expand(p.shape).flatten() for n, p in tuned.named_parameters()])
        g = gradients[:, chosen]
        torch.testing.assert_close(products[label], g @ g.t(), rtol=1e-10, atol=1e-10 * float((g @ g.t()).abs().max()))
        unit = nn.functional.normalize(g, dim=1)
        cosines = (unit[: len(pairs)] * unit[len(pairs) :]).sum(1)
        assert row["same"] == pytest.approx(float(cosines.mean()), abs=1e-10) and row["size"] == pset.size


@pytest.mark.parametrize("kind", KINDS)
def test_an_ablated_adapter_is_the_base(kind):
    tuned, merged = taught_models(kind)
    base, batch = calm(base_model(kind)), collate(asked(4), pad_id=0)
    wrapped: Any = get_peft_model(calm(base_model(kind)), adapter_config(kind)).eval()  # B is zero
    with left_alone(tuned), left_alone(wrapped):
        with ablated(tuned, whole(tuned, "lora_B"), to="zero"):
            torch.testing.assert_close(logits(tuned, batch), logits(base, batch), rtol=0, atol=0)
        with ablated(tuned, whole(tuned), base=snapshot(wrapped)):
            torch.testing.assert_close(logits(tuned, batch), logits(base, batch), rtol=0, atol=0)
        assert not torch.allclose(logits(tuned, batch), logits(base, batch))
        with grafted(wrapped, whole(wrapped), snapshot(tuned)):
            torch.testing.assert_close(logits(wrapped, batch), logits(merged, batch), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_grafted_at_positions_as_the_merged_weights_are(kind):
    tuned, merged = taught_models(kind)
    base, items = calm(base_model(kind)), asked(4)
    wrapped: Any = get_peft_model(calm(base_model(kind)), adapter_config(kind)).eval()
    batch = collate(items, "answer", pad_id=0)
    real, of_all = batch["attention_mask"] != 0, whole(merged, "")
    expected = {(): logits(base, batch), PLACES: logits(tuned, batch)}
    for places in (("last",), ("subject", "rest")):
        with grafted_at(base, of_all, snapshot(merged), at_places(items, places)):
            expected[places] = logits(base, batch)
    with left_alone(wrapped):
        for places, wanted in expected.items():
            with grafted_at(wrapped, whole(wrapped), snapshot(tuned), at_places(items, places)):
                found = logits(wrapped, batch)
            torch.testing.assert_close(found[real], wanted[real], rtol=0, atol=1e-9)
    for one, other in zip(list(expected.values()), list(expected.values())[1:]):
        assert not torch.allclose(one[real], other[real])


# ---- other adapters


def other_adapter(kind: str, **settings) -> Any:
    model: Any = get_peft_model(tiny_model(kind), adapter_config(kind, **settings)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name in adapter_names(model, "lora_(embedding_)?[AB]"):
            p = model.get_parameter(name)
            p.copy_(0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    logits(model, pad(make_examples(1)))  # PEFT puts experts' parameters in another order when they are first used
    return model


OTHERS = {
    "DoRA": ("llama", {"target_modules": ["q_proj", "o_proj", "down_proj"], "use_dora": True}),
    "biases": ("gpt_neox", {"target_modules": ["query_key_value"], "lora_bias": True, "bias": "lora_only"}),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "whole modules": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "experts": ("qwen3_moe", {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "gate.weight"]}),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_variants_have_exact_traces_and_known_kinds(case):
    model, examples = other_adapter(OTHERS[case][0], **OTHERS[case][1]), make_examples(4)
    with left_alone(model):
        (found,) = trace(model, [pad(examples)], task="qa")
    assert_same(found.values, reference_trace(unfrozen(model), examples, "abs"))
    anatomy, plain = Anatomy(model), Anatomy(tiny_model(OTHERS[case][0]))
    assert set(anatomy.kind.values()) == set(plain.kind.values())
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(logits(merged, pad(examples)), logits(model, pad(examples)), rtol=0, atol=1e-10)
    if case == "DoRA":
        magnitudes = adapter_names(model, "q_proj.lora_magnitude")
        assert anatomy.sizes("query_head", magnitudes).tolist() == [6] * 8
        assert anatomy.sizes("neuron", adapter_names(model, "down_proj.lora_magnitude")).sum() == 0
    if case == "biases":
        assert anatomy.sizes("head", adapter_names(model, "lora_B.default.bias")).tolist() == [18] * 8


@pytest.mark.parametrize("case", ["DoRA", "embeddings", "experts"])
def test_adapters_whose_parts_see_no_tokens_are_not_grafted_at_positions(case):
    model = other_adapter(OTHERS[case][0], **OTHERS[case][1])
    values = {name: p.detach() + 0.5 for name, p in model.named_parameters()}

    def every(ids: Tensor) -> Tensor:
        return torch.ones_like(ids, dtype=torch.bool)

    with left_alone(model), pytest.raises(UserError, match=r"graft(ed|ing) at positions"):
        with grafted_at(model, whole(model), values, every):
            pass
