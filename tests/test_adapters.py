"""LoRA in training: what an adapter adds, its two views, and the same bits after a resume."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from reference import example_gradient, reference_trace
from test_lora import KINDS, PREFIX, TARGETS, adapter_config, base_model, logits, taught_models, unfrozen
from test_trace import assert_same, make_examples, pad
from test_train import EXAMPLES, FAST, WORDS, Told, _model
from tiny_models import tiny_model

from crosstrace.core.errors import UserError
from crosstrace.core.pieces import Pieces
from crosstrace.experiment import config
from crosstrace.experiment.stages.tracers import OnlineListener
from crosstrace.experiment.studied import View
from crosstrace.models import adapters
from crosstrace.models.adapters import LoraSettings, adapted, adapter_names, merged, plain_name
from crosstrace.models.loading import load_model, save_model
from crosstrace.sets.interventions import snapshot
from crosstrace.trace import MEASURES, trace
from crosstrace.training.recipes import two_stage
from crosstrace.training.settings import TrainSettings
from crosstrace.training.trainer import train

BATCHES = [pad(make_examples(4, seed=seed)) for seed in (1, 2, 3)]


# ---- a new adapter


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_changes_nothing_and_alone_is_trained(kind):
    base, state = base_model(kind), torch.random.get_rng_state()
    model = adapted(copy.deepcopy(base), LoraSettings(rank=3, alpha=6), seed=4)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(logits(model, BATCHES[0]), logits(base, BATCHES[0]))
    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learned == set(adapter_names(model)) and adapters.is_adapted(model) and not adapters.is_adapted(base)
    targets = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in learned}
    assert targets == set(TARGETS[kind]) | ({"experts", "base_layer", "gate"} if kind == "qwen3_moe" else set())
    assert [plain_name(name) for name in adapters.base_names(model)] == [name for name, _ in base.named_parameters()]
    for name in learned:
        values = model.get_parameter(name)
        assert values.dtype == torch.float64 and bool(values.any()) == ("lora_A" in name)
    again = adapted(copy.deepcopy(base), LoraSettings(rank=3, alpha=6), seed=4)
    other = adapted(copy.deepcopy(base), LoraSettings(rank=3, alpha=6), seed=5)
    for name in learned:
        assert torch.equal(again.get_parameter(name), model.get_parameter(name))
        assert torch.equal(other.get_parameter(name), model.get_parameter(name)) == ("lora_B" in name)


def test_targets_that_there_are_not_or_that_are_ends_are_told():
    for targets, message in ((["c_attn"], "fits no Llama"), (["embed_tokens"], "names the embeddings"),
                             (["q_proj", "lm_head"], "names the embeddings or the unembedding")):  # fmt: skip
        with pytest.raises(UserError, match=message) as found:
            adapted(tiny_model("llama"), LoraSettings(targets=targets), 0)
        assert "\n" not in str(found.value)


VARIANTS = {
    "DoRA": ("llama", {"use_dora": True}),
    "biases": ("gpt_neox", {"lora_bias": True}),
    "whole modules": ("llama", {"modules_to_save": ["lm_head"]}),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "trained biases": ("gpt_neox", {"bias": "all"}),
}


@pytest.mark.parametrize("case", VARIANTS)
def test_other_adapters_are_read_merged_and_refused_as_they_are(case, tmp_path):
    kind, settings = VARIANTS[case]
    save_model(tiny_model(kind, torch.float32), WORDS, tmp_path / "base")
    model = get_peft_model(load_model(str(tmp_path / "base")), adapter_config(kind, **settings))
    model.save_pretrained(tmp_path / "adapter")
    values = config.override(config.Experiment(), {"train.lora.rank": "2", "trace.view": "adapter"})
    with pytest.raises(UserError, match="has more than matrices A and B") as found:
        View(values).load_checkpoint(tmp_path / "adapter")
    assert str(tmp_path / "adapter") in str(found.value) and "\n" not in str(found.value)
    plain = View(config.Experiment()).load_checkpoint(tmp_path / "adapter")
    assert not adapters.is_adapted(plain)


def test_what_does_not_go_together_is_told():
    for values, message in (
        ({"trace.view": "adapter"}, "trace.view: adapter needs train.lora"),
        ({"train.lora.rank": "4", "model.random_init": "1"}, "train.lora needs a base that can be read again"),
        ({"train.lora.rank": "0"}, "train.lora.rank"),
        ({"train.lora.dora": "true"}, "unknown setting 'train.lora.dora'"),
    ):
        with pytest.raises(UserError, match=message):
            config.override(config.Experiment(), values)


# ---- two views of one adapter


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_the_views_agree_by_the_chain_rule_for_every_example(kind):
    """W + s·B·A: ∂ℓ/∂B = s·G·Aᵀ and ∂ℓ/∂A = s·Bᵀ·G with G = ∂ℓ/∂W of the merged weights."""
    tuned, plain = taught_models(kind)
    free, scale = unfrozen(tuned), 8 / 3
    for example in make_examples(3, seed=5):
        (own,) = trace(tuned, [example], task="qa", measures=["net"], names=adapter_names(tuned))
        (of_weights,) = trace(plain, [example], task="qa", measures=["net"])
        assert list(own.values) == adapter_names(tuned)
        reference = example_gradient(free, example)
        for name, value in own.values.items():
            torch.testing.assert_close(value, reference[name], rtol=1e-9, atol=1e-12)
        for name in (n for n in own.values if "lora_A" in n):
            twin = name.replace("lora_A", "lora_B")
            a, b = tuned.get_parameter(name), tuned.get_parameter(twin)
            g = of_weights.values[name.partition(".lora_")[0].removeprefix(PREFIX) + ".weight"]
            g = g.t() if kind == "gpt2" else g  # Conv1D keeps [in, out]
            bound = {"rtol": 1e-8, "atol": 1e-10 * float(g.abs().max())}
            torch.testing.assert_close(own.values[twin], scale * g @ a.t(), **bound)
            torch.testing.assert_close(own.values[name], scale * b.t() @ g, **bound)


@pytest.mark.parametrize("kind", KINDS)
def test_the_trace_of_the_adapter_alone_is_the_reference(kind):
    tuned, _ = taught_models(kind)
    examples = make_examples(5)
    for one in trace(tuned, [pad(examples[:3]), pad(examples[3:])], task="qa", measures=MEASURES,
                     names=adapter_names(tuned)):  # fmt: skip
        expected = reference_trace(unfrozen(tuned), examples, one.measure)
        assert_same(one.values, {name: expected[name] for name in adapter_names(tuned)})


@pytest.mark.parametrize("kind", KINDS)
def test_within_merged_the_weights_are_those_that_are_read_and_every_bit_comes_back(kind):
    tuned, plain = taught_models(kind)
    before, flags = snapshot(tuned), [p.requires_grad for p in tuned.parameters()]
    expected = dict(plain.named_parameters())
    with pytest.raises(KeyboardInterrupt), merged(tuned):
        for name in adapters.base_names(tuned):
            assert torch.equal(tuned.get_parameter(name), expected[plain_name(name)])
        assert torch.equal(logits(tuned, BATCHES[0]), logits(plain, BATCHES[0]))
        raise KeyboardInterrupt
    assert all(torch.equal(p, before[name]) for name, p in tuned.named_parameters())
    assert [p.requires_grad for p in tuned.parameters()] == flags
    assert not any(getattr(module, "merged", False) for module in tuned.modules())


@pytest.mark.parametrize("kind, measure", [("llama", "abs"), ("gpt2", "taylor")])
def test_both_views_are_traced_exactly_over_training(kind, measure, tmp_path):
    """From an adapter at its start, where A has no gradient, over two updates."""
    base = {"train.lora.rank": "2", "trace.measures": f"[{measure}]", "trace.parts": "2", "trace.every": "1"}
    for view in ("merged", "adapter"):
        options = config.override(config.Experiment(), {**base, "trace.view": view})
        model = adapted(base_model(kind), LoraSettings(rank=2, alpha=4, dropout=0.5), seed=1).train()
        listener, totals, generator = OnlineListener(model, options, tmp_path), [], torch.Generator().manual_seed(3)
        for update in range(3):
            examples = make_examples(4, seed=update)
            listener.on_update(model, {"bio": pad(examples)}, 0.1, update, {})
            calm_model = copy.deepcopy(model).eval()
            if view == "merged":
                totals.append(reference_trace(calm_model.merge_and_unload().requires_grad_(True), examples, measure))
            else:
                found = reference_trace(unfrozen(calm_model), examples, measure)
                totals.append({name: found[name] for name in adapter_names(model)})
            with torch.no_grad():
                for name in adapter_names(model):
                    p = model.get_parameter(name)
                    p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=0.1)
        traces = [item for item in listener.traces()["bio"] if item.reduction == "example"]
        assert len(traces) == 2
        for name, value in totals[0].items():
            expected = sum(total[name] for total in totals) / 3
            combined = (traces[0].values[name] + traces[1].values[name]) / 2  # two examples of each update in each part
            torch.testing.assert_close(combined, expected, rtol=1e-9, atol=1e-12 + 1e-10 * float(value.abs().max()))
        assert list(traces[0].values) == list(totals[0]) and model.training
        assert traces[0].meta["coverage"].keys() <= {"linear", "transposed linear", "embedding", "shift", "gain",
                                                     "scale", "linear+linear", "embedding+linear"}  # fmt: skip


# ---- training


def _trained(folder: Path, listeners: list[Any], dropout: float) -> Any:
    model = adapted(_model(), LoraSettings(rank=2, dropout=dropout), seed=3)
    settings = TrainSettings(optimiser=FAST, checkpoint_every=3)
    train(model, WORDS, two_stage(4, 4, 5), EXAMPLES, folder, settings, listeners=listeners)
    return model


@pytest.mark.long
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("stop", [4, 8])
def test_interrupted_and_resumed_training_gives_the_same_bits(stop, dropout, tmp_path):
    options = config.override(config.Experiment(), {"train.lora.rank": "2", "trace.parts": "2", "trace.every": "2"})
    made = adapted(_model(), LoraSettings(rank=2, dropout=dropout), seed=3)
    assert OnlineListener(made, options, tmp_path).merges
    expected = _trained(tmp_path / "whole", [Told()], dropout)
    with pytest.raises(KeyboardInterrupt):
        _trained(tmp_path / "cut", [Told(stop)], dropout)
    (optimiser,) = (tmp_path / "cut").rglob("optimiser")
    assert all("lora_" in name for name in Pieces(optimiser, "optimiser").shapes)
    found = _trained(tmp_path / "cut", [Told()], dropout)
    for name, p in expected.named_parameters():
        assert torch.equal(found.get_parameter(name), p), name
    start = adapted(_model(), LoraSettings(rank=2, dropout=dropout), seed=3)
    for name, p in start.named_parameters():
        assert torch.equal(p, expected.get_parameter(name)) == ("lora_" not in name), name
    saved = {file.parent.name: file.name for file in (tmp_path / "whole").rglob("*.safetensors")}
    assert set(saved.values()) == {"adapter_model.safetensors"}
