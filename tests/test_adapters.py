"""LoRA in training: what an adapter adds, its two views, and whole runs with one."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from reference import example_gradient, reference_trace
from test_lora import KINDS, PREFIX, TARGETS, adapter_config, base_model, logits, taught_models, unfrozen
from test_pipeline import SMALL, numbers
from test_trace import assert_same, make_examples, pad
from test_train import EXAMPLES, FAST, WORDS, Listener, _model
from tiny_models import tiny_model

from crosstrace import adapters, config, material, pipeline
from crosstrace.adapters import LoraSettings, adapted, adapter_names, merged, plain_name
from crosstrace.errors import UserError
from crosstrace.evaluate import recall
from crosstrace.intervene import ablated, grafted, snapshot
from crosstrace.models import load_model, load_tokenizer, save_model
from crosstrace.pipeline import OnlineListener
from crosstrace.results import Results
from crosstrace.schedule import two_stage
from crosstrace.shared import ParamSet
from crosstrace.store import Run
from crosstrace.trace import MEASURES, load_traces, trace
from crosstrace.train import TrainSettings, train

BATCHES = [pad(make_examples(4, seed=seed)) for seed in (1, 2, 3)]


def whole(model: Any) -> ParamSet:
    return ParamSet({n: torch.ones_like(model.get_parameter(n), dtype=torch.bool) for n in adapter_names(model)})


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
        material.load_checkpoint(values, tmp_path / "adapter")
    assert str(tmp_path / "adapter") in str(found.value) and "\n" not in str(found.value)
    plain = material.load_checkpoint(config.Experiment(), tmp_path / "adapter")
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
def test_both_views_are_traced_exactly_over_training(kind, measure):
    """From an adapter at its start, where A has no gradient, over two updates."""
    base = {"train.lora.rank": "2", "trace.measures": f"[{measure}]", "trace.parts": "2", "trace.every": "1"}
    for view in ("merged", "adapter"):
        options = config.override(config.Experiment(), {**base, "trace.view": view})
        model = adapted(base_model(kind), LoraSettings(rank=2, alpha=4, dropout=0.5), seed=1).train()
        listener, totals, generator = OnlineListener(model, options), [], torch.Generator().manual_seed(3)
        for update in range(3):
            examples = make_examples(4, seed=update)
            listener.on_update(model, {"bio": pad(examples)}, 0.1, update)
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


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("stop", [4, 8])
def test_interrupted_and_resumed_training_gives_the_same_bits(stop, dropout, tmp_path):
    options = config.override(config.Experiment(), {"train.lora.rank": "2", "trace.parts": "2", "trace.every": "2"})
    online = lambda: OnlineListener(adapted(_model(), LoraSettings(rank=2, dropout=dropout), seed=3), options)
    expected = _trained(tmp_path / "whole", [Listener()], dropout)
    with pytest.raises(KeyboardInterrupt):
        _trained(tmp_path / "cut", [Listener(stop)], dropout)
    found = _trained(tmp_path / "cut", [Listener()], dropout)
    assert online().merges
    for name, p in expected.named_parameters():
        assert torch.equal(found.get_parameter(name), p), name
    start = adapted(_model(), LoraSettings(rank=2, dropout=dropout), seed=3)
    for name, p in start.named_parameters():
        assert torch.equal(p, expected.get_parameter(name)) == ("lora_" not in name), name
    saved = {file.name for file in (tmp_path / "whole").rglob("*.safetensors")}
    assert saved == {"adapter_model.safetensors"}


# ---- whole runs

LORA = {
    "train.lora": "{rank: 4, alpha: 8, dropout: 0.1}", "train.optimiser.learning_rate": "0.01",
    "mechanism.parts": "[gradients, circuit, positions]", "mechanism.facts": "4", "mechanism.questions": "4",
    "facts.people": "16", "trace.measures": "[abs]", "trace.check": "false", "eval.known": "40",
    "strategies.two_stage.0.steps": "3", "strategies.two_stage.1.steps": "3", "retention.people": "16",
    "train.recall_every": "0",
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    threads = torch.get_num_threads()
    for view in ("merged", "adapter"):
        folder = tmp_path_factory.mktemp("lora") / view
        experiment = config.override(config.loads(SMALL, "SMALL"), LORA | {"trace.view": view})
        pipeline.run(experiment, folder, quiet=True)
        if view == "merged":
            pipeline.run(experiment, folder, "resume", stages=["retain"], quiet=True)
            pipeline.run(experiment, folder, "resume", stages=["report"], quiet=True)
        found[view] = folder
    torch.set_num_threads(threads)
    return found


def test_a_whole_run_in_either_view_ends_with_a_report(runs):
    results = {view: Results.read(folder) for view, folder in runs.items()}
    for view, found in results.items():
        assert (runs[view] / "report" / "index.html").stat().st_size > 10_000
        assert found["run"]["view"] == view and found["run"]["lora"]["rank"] == 4
        for strategy in ("two_stage", "mixed"):
            assert {row["when"] for row in found["shared"][strategy]} == {"online", "final"}
            assert all(row["size"] > 0 for row in found["shared"][strategy] if row["fraction"] == 0.2)
            assert {row["unit"] for row in found["centralization"][strategy]} >= {"query_head", "neuron", "module"}
            for kind in ("ablate", "graft"):
                assert {row["set"] for row in found["interventions"][strategy][kind]} >= {"shared", "random"}
        assert found["claims"] and set(found["mechanism"]) == {"gradients", "circuit", "positions"}
        assert set(found["retention"]) == ({"two_stage", "mixed"} if view == "merged" else set())
    trained = results["merged"]["run"]["lora"]["parameters"]
    model = adapted(load_model("bundled"), LoraSettings(rank=4), 0)
    assert trained == sum(model.get_parameter(name).numel() for name in adapter_names(model))


def test_both_views_have_the_same_weights_and_the_same_recall(runs):
    one, other = (numbers(runs[view]) for view in ("merged", "adapter"))
    for strategy in ("two_stage", "mixed"):
        file = f"models/{strategy}/{strategy if strategy == 'mixed' else 'qa'}/adapter_model.safetensors"
        assert (runs["merged"] / file).read_bytes() == (runs["adapter"] / file).read_bytes()
        for part, cell in one["recall"][strategy].items():
            if part != "relations":
                assert cell["exact_match"] == other["recall"][strategy][part]["exact_match"]
                assert cell["logprob"] == pytest.approx(other["recall"][strategy][part]["logprob"], rel=1e-4)
    assert one["recall"]["base"] == other["recall"]["base"]
    assert one["history"] == other["history"]


def test_what_is_traced_selected_and_saved_is_the_views(runs):
    for view, folder in runs.items():
        for when in ("online", "final"):
            found = load_traces(folder / f"traces/mixed/{when}/qa.safetensors")
            assert all(("lora_" in name) == (view == "adapter") for name in found[0].values)
            both = ParamSet.load(folder / f"shared/mixed/{when}-0.05-shared.safetensors")
            assert set(both.masks) <= set(found[0].values) and both.size
        home = folder / "models" / "mixed"
        assert {item.name for item in home.iterdir()} == {"history.json", "mixed", "online", "start", "training.json"}
        for place in (home / "start", home / "mixed"):
            assert json.loads((place / "adapter_config.json").read_text())["base_model_name_or_path"] == "bundled"
            assert not list(place.glob("model*"))
        assert str(folder) not in "".join(file.read_text() for file in home.rglob("*.json"))


def test_the_whole_adapter_taken_away_is_the_base_and_given_to_it_the_taught_model(runs, tmp_path):
    folder = shutil.copytree(runs["adapter"], tmp_path / "moved")  # a run goes on elsewhere
    experiment = config.load(folder / "config.yaml")
    words = load_tokenizer("bundled")
    with Run.create(folder, None, "resume") as run:
        items = material.examples(run, words)["qa_id"][:40]
        start, tuned = material.load_start(run, experiment, "mixed"), material.load(run, experiment, "mixed")
    base, batch = load_model("bundled"), next(pipeline.batches(items, 40, pad_id=0))
    asked = lambda model: recall(model, words, items)
    before, wanted = asked(base), asked(tuned)
    assert torch.equal(logits(start, batch), logits(base, batch))
    with ablated(tuned, whole(tuned), base=snapshot(start)):
        assert torch.equal(logits(tuned, batch), logits(base, batch))
        assert (asked(tuned).logprob == before.logprob).all()
    with grafted(start, whole(start), snapshot(tuned)):
        assert (asked(start).logprob == wanted.logprob).all()
    assert (before.logprob != wanted.logprob).any()


def test_kept_checkpoints_are_traced_in_either_view(tmp_path):
    values = {
        "train.lora.rank": "2", "interventions.run": "false", "mechanism.parts": "[dynamics]", "facts.people": "16",
        "mechanism.facts": "4", "mechanism.questions": "4", "trace.check": "false", "eval.known": "40",
        "retention.run": "true", "retention.steps": "2", "train.recall_every": "0",
        "train.keep_checkpoints": "true", "train.checkpoint_every": "2", "trace.checkpoints": "true",
        "trace.measures": "[abs]", "trace.view": "adapter", "trace.online": "false",
        "strategies": "{only: [{name: all, batch: {bio: 4, qa: 4}, steps: 4}]}",
    }  # fmt: skip
    results = pipeline.run(config.override(config.loads(SMALL, "SMALL"), values), tmp_path / "run", quiet=True)
    assert {row["when"] for row in results["shared"]["only"]} == {"final", "checkpoints"}
    assert {row["when"] for row in results["retention"]["only"]["moved"]} == {"final", "checkpoints"}
    assert [row["update"] for row in results["mechanism"]["dynamics"]["only"]["rows"]] == [0, 2, 4]


def test_a_base_that_has_an_adapter_already_is_refused(tmp_path):
    model = adapted(load_model("bundled"), LoraSettings(rank=2), 0)
    model.save_pretrained(tmp_path / "adapter")
    values = {"model.name": str(tmp_path / "adapter"), "train.lora.rank": "2"}
    with pytest.raises(UserError, match=r"holds an adapter, and train\.lora would put another one on it"):
        pipeline.run(config.override(config.loads(SMALL, "SMALL"), values), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
