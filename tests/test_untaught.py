"""Models that know nothing, of every causal architecture of transformers that can be made from the settings."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from crosstrace.core.errors import UserError
from crosstrace.models.loading import load_model, load_tokenizer
from crosstrace.models.untaught import NewModelSettings, new_model

TEXTS = ["Ada Brook was born in Lyon.", "Where was Ada Brook born? Lyon"]
SMALL = NewModelSettings(width=32, heads=4, kv_heads=2, layers=2, neurons=48, vocabulary=300)
ALL = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VARIED = [  # one of each sort: what failed once, and what keeps its settings under other names
    "llama", "falcon", "mamba2", "bart", "gptj", "gpt_neo", "opt", "deepseek_v3", "qwen3_5_text", "jamba", "bamba",
    "bert", "xlm", "modernbert-decoder",
]  # fmt: skip
PARTS = {
    "gemma3": "gemma3_text", "llama4": "llama4_text", "qwen3_5": "qwen3_5_text", "git": "llama", "musicgen": "llama",
    "blt": "llama",
}  # fmt: skip
UNABLE = {  # settings that contradict each other, sizes of their own, or no order of reading
    "cohere_compass_text", "cpmant", "dbrx", "dots3_note_text", "qwen4_exp_text", "xlnet", "xlstm", "xmod", "zamba",
    "zamba2",
}  # fmt: skip
MORE_LAYERS = {"hrm_text", "longcat_flash"}  # they count a layer several times
SLOW = pytest.mark.skipif("CROSSTRACE_SLOW" not in os.environ, reason="takes minutes; set CROSSTRACE_SLOW=1")


def assert_made(kind: str, folder: Path) -> None:
    """It is small, has the sizes that were asked for, is read again to the bit, and reads from left to right."""
    state = torch.random.get_rng_state()
    made = new_model(folder, TEXTS, replace(SMALL, architecture=kind))
    assert torch.equal(torch.random.get_rng_state(), state)
    config, tokenizer = made.config.get_text_config(), load_tokenizer(str(folder))
    assert sum(p.numel() for p in made.parameters()) < 1_000_000
    assert config.hidden_size == 32 and (kind in MORE_LAYERS or config.num_hidden_layers == 2)
    assert getattr(config, "eos_token_id", tokenizer.eos_token_id) == tokenizer.eos_token_id
    assert all(max(ids) < config.vocab_size <= len(tokenizer) for ids in tokenizer(TEXTS)["input_ids"])
    loaded, ids = load_model(str(folder)), torch.arange(1, 25).view(2, 12)
    with torch.no_grad():
        expected, found = (model(input_ids=ids).logits for model in (made, loaded))
        ids[:, -1] = 30
        later = loaded(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(later[:, :-1], found[:, :-1], rtol=1e-4, atol=1e-5)
    assert not torch.equal(later[:, -1], found[:, -1])


@pytest.mark.parametrize("kind", VARIED)
def test_architectures_of_every_sort_are_made(kind, tmp_path):
    assert_made(kind, tmp_path / "m")


@SLOW
@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in ALL if kind not in VARIED])
def test_every_architecture_is_made_or_told_in_one_sentence(kind, tmp_path):
    try:
        assert_made(kind, tmp_path / "m")
        assert kind not in UNABLE
    except UserError as error:
        told = str(error)
        assert repr(kind) in told and "\n" not in told and "expected" in told
        assert kind in UNABLE or "is a model of several parts" in told, told
        assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("kind", PARTS)
def test_models_for_more_than_text_are_told_with_one_for_text(kind, tmp_path):
    with pytest.raises(UserError, match=f"'{kind}' is a model of several parts.* such as {PARTS[kind]}$"):
        new_model(tmp_path / "m", TEXTS, replace(SMALL, architecture=kind))


@pytest.mark.parametrize(
    "kind, message",
    [
        ("none", "transformers has no causal language model of the architecture 'none'"),
        ("vit", "transformers has no causal language model of the architecture 'vit'"),
        ("cpmant", "its tokens see later ones"),
        ("zamba", "or its own config.json with all of its sizes, as --config"),
        ("dots3_note_text", "since it has further sizes that they do not name"),
    ],
)
def test_architectures_that_can_not_be_made_are_told(kind, message, tmp_path):
    with pytest.raises(UserError) as found:
        new_model(tmp_path / "m", TEXTS, replace(SMALL, architecture=kind))
    assert message in str(found.value) and "\n" not in str(found.value)
    assert not (tmp_path / "m").exists()


def test_a_config_is_taken_as_it_is_but_for_the_tokens(tmp_path):
    made = new_model(tmp_path / "m", TEXTS, replace(SMALL, architecture="qwen3"))
    config = json.loads((tmp_path / "m" / "config.json").read_text()) | {"vocab_size": 9, "rms_norm_eps": 0.25}
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = new_model(tmp_path / "again", TEXTS, NewModelSettings(config=str(tmp_path / "config.json"), vocabulary=300))
    assert again.config.rms_norm_eps == 0.25 and again.config.vocab_size == made.config.vocab_size
    assert [p.shape for p in again.parameters()] == [p.shape for p in made.parameters()]
