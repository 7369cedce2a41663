"""Comparing checkpoints that were tuned elsewhere: no training, the same numbers as the run that taught them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_lora_runs import LORA
from test_pipeline import SMALL, numbers
from tiny_facts import tokenizer
from tiny_models import tiny_model

from crosstrace.analyses.drift import drift
from crosstrace.cli import commands
from crosstrace.core.errors import UserError
from crosstrace.core.progress import Progress
from crosstrace.core.run_folder import Run
from crosstrace.data.facts import FactSettings
from crosstrace.experiment import config, pipeline
from crosstrace.experiment.compare import comparison, named, tasks_in
from crosstrace.experiment.studied import StudiedModel
from crosstrace.models import adapters
from crosstrace.models.adapters import LoraSettings, adapted, adapter_names
from crosstrace.models.anatomy import Anatomy
from crosstrace.models.compatibility import check_alike
from crosstrace.models.loading import load_model, load_tokenizer, save_model
from crosstrace.results.results import Results
from crosstrace.sets.interventions import snapshot
from crosstrace.sets.paramset import ParamSet
from crosstrace.trace import load_traces

FEW = {name: LORA[name] for name in LORA if name.startswith(("mechanism", "trace", "eval", "facts"))} | {
    "strategies": "{mixed: [{name: all, batch: {bio: 8, qa: 8}, steps: 2}]}", "train.recall_every": "0",
    "mechanism.run": "true", "mechanism.parts": "[representations, transfer]", "trace.online": "false",
    "interventions.seeds": "1",
}  # fmt: skip
MOVED = "model.layers.1.mlp.up_proj.weight"


def changed(experiment: Any) -> Any:
    """A comparison with the small settings."""
    small = config.plain(config.override(config.loads(SMALL, "SMALL"), FEW))
    values = config.plain(experiment)
    kept = ("trace", "analysis", "interventions", "mechanism", "eval", "jobs", "threads")
    return config.parse(values | {name: small[name] for name in kept}, "test")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that teaches the base, another model that differs from it in one tensor, and their comparison."""
    folder = tmp_path_factory.mktemp("compare")
    taught = config.override(config.loads(SMALL, "SMALL"), FEW)
    pipeline.run(taught, folder / "run", quiet=True)
    other = load_model("bundled")
    with torch.no_grad():
        other.get_parameter(MOVED)[:3].mul_(1.5)
    save_model(other, load_tokenizer("bundled"), folder / "two_stage")
    tuned = [str(folder / "run/models/mixed/all"), str(folder / "two_stage")]
    assert [named(text)[0] for text in tuned] == ["mixed", "two_stage"]
    pipeline.run(changed(comparison("bundled", tuned, str(folder / "run"))), folder / "compared", quiet=True)
    return folder


@pytest.mark.long
def test_a_comparison_has_the_numbers_of_the_run_that_taught_the_model(home: Path) -> None:
    one, other = numbers(home / "run"), numbers(home / "compared")
    for part in ("recall", "shared", "similarity", "centralization", "maps", "interventions", "drift"):
        assert one[part]["mixed"] == other[part]["mixed"], part
    for part in ("representations", "transfer"):
        assert one["mechanism"][part]["mixed"] == other["mechanism"][part]["mixed"]
    assert one["recall"]["base"] == other["recall"]["base"]
    assert one["run"]["facts"] == other["run"]["facts"]
    for task in ("bio", "qa"):
        mine, theirs = (
            load_traces(home / name / f"traces/mixed/final/{task}.safetensors") for name in ("run", "compared")
        )
        for a, b in zip(mine, theirs):
            assert a.weight == b.weight and all(torch.equal(a.values[name], b.values[name]) for name in a.values)
    sets = [ParamSet.load(home / name / "shared/mixed/final-0.05-shared.safetensors") for name in ("run", "compared")]
    assert sets[0] == sets[1] and sets[0].size


@pytest.mark.long
def test_nothing_is_trained_and_what_needs_training_is_told(home: Path) -> None:
    folder = home / "compared"
    shown = Results.read(folder)
    results = shown.as_values()
    assert results["training"] == results["history"] == {} and not (folder / "models").exists()
    assert {row["when"] for rows in results["shared"].values() for row in rows} == {"final"}
    verdicts = {(claim["claim"], claim["when"]): claim["verdict"] for claim in results["claims"]}
    assert {name for (name, when), verdict in verdicts.items() if verdict == "not tested"} == {
        "more_shared", "more_central", "ablation", "grafting"
    }  # fmt: skip
    assert all((verdict == "not tested") == (when == "online") for (_, when), verdict in verdicts.items())
    page = (folder / "report" / "index.html").read_text()
    for text in ("the models were tuned elsewhere", "not tested", "How far the weights moved", "tuned elsewhere: "):
        assert text in page
    assert "not tested" in str(shown)


@pytest.mark.long
def test_drift_is_what_moved(home: Path) -> None:
    found = Results.read(home / "compared").as_values()["drift"]["two_stage"]
    base = load_model("bundled").get_parameter(MOVED).detach()
    way = 0.5 * base[:3].double()
    (row,) = [row for row in found["tensors"] if row["changed"]]
    assert row["tensor"] == MOVED and row["changed"] == int((base[:3] != 0).sum()) and row["share"] == 1.0
    assert row["way"] == pytest.approx(float(way.norm()), rel=1e-6)
    assert row["relative"] == pytest.approx(float(way.norm() / base.double().norm()), rel=1e-6)
    assert row["largest"] == pytest.approx(float(way.abs().max()), rel=1e-6)
    (module,) = [row for row in found["modules"] if row["changed"] and row["kind"] != "all"]
    assert (module["layer"], module["kind"]) == (1, "mlp.up") and module["size"] == base.numel()
    assert found["modules"][-1]["way"] == pytest.approx(row["way"])
    assert {row["set"] for row in found["sets"]} == {"shared", "random", "random_per_tensor"}
    assert all(row["energy"] is not None for row in found["sets"])


def test_drift_by_hand() -> None:
    model = tiny_model("llama", tied=True)
    before = snapshot(model)
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[:2] += torch.tensor([3.0, 4.0], dtype=torch.float64)
        model.get_parameter("model.layers.0.mlp.up_proj.weight")[0, 0] += 12.0
    found = drift(model, before, Anatomy(model))
    assert [row["tensor"] for row in found["tensors"]] == list(before)
    rows = {row["tensor"]: row for row in found["tensors"] if row["changed"]}
    assert {name: (row["changed"], row["way"], row["largest"]) for name, row in rows.items()} == {
        "model.norm.weight": (2, pytest.approx(5.0), pytest.approx(4.0)),
        "model.layers.0.mlp.up_proj.weight": (1, pytest.approx(12.0), pytest.approx(12.0)),
    }
    assert found["modules"][-1]["way"] == pytest.approx(13.0) and found["modules"][-1]["changed"] == 3
    assert rows["model.norm.weight"]["share"] == pytest.approx(25 / 169)
    still = drift(model, snapshot(model), Anatomy(model), ["model.norm.weight"])
    assert [(row["share"], row["relative"]) for row in still["tensors"]] == [(None, 0.0)]


@pytest.mark.long
def test_a_finished_comparison_is_not_done_again_and_another_model_is(home: Path, tmp_path: Path) -> None:
    folder = home / "compared"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    experiment = config.load(folder / "config.yaml")
    assert pipeline.run(experiment, folder, "resume", quiet=True) == Results.read(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == before
    copy = tmp_path / "copy"
    shutil.copytree(home / "two_stage", copy)
    with Run.create(folder, None, "resume") as run:
        key = StudiedModel(run, experiment, "two_stage", Progress(quiet=True)).key()
        moved = config.override(experiment, {"given.two_stage": str(copy)})
        assert StudiedModel(run, moved, "two_stage", Progress(quiet=True)).key() == key
        other = load_model("bundled")
        save_model(other, load_tokenizer("bundled"), copy)
        assert StudiedModel(run, moved, "two_stage", Progress(quiet=True)).key() != key


@pytest.mark.long
def test_an_adapter_is_compared_in_either_view(tmp_path: Path) -> None:
    model = adapted(load_model("bundled"), LoraSettings(rank=2), 1)
    with torch.no_grad():
        for name in adapter_names(model):
            model.get_parameter(name).add_(0.05)
    model.save_pretrained(tmp_path / "tuned")
    adapters.name_base(tmp_path / "tuned", "bundled")
    tasks = tmp_path / "tasks"
    pipeline.run(
        config.override(config.loads(SMALL, "SMALL"), {"facts.people": "16"}), tmp_path / "made", stages=["data"]
    )
    shutil.copytree(tmp_path / "made" / "data", tasks)  # bio.jsonl and qa.jsonl, and no more is known
    experiment = comparison("bundled", [str(tmp_path / "tuned")], str(tasks))
    assert experiment.facts == FactSettings(source=str(tasks)) and list(experiment.given) == ["tuned"]
    values = {"trace.view": "adapter", "interventions.run": "false", "mechanism.parts": "[transfer]"}
    results = pipeline.run(config.override(changed(experiment), values), tmp_path / "run", quiet=True).as_values()
    assert results["shared"]["tuned"] and results["claims"] == []
    assert results["mechanism"]["transfer"]["tuned"] == []  # whose other wordings nobody knows
    assert {row["tensor"] for row in results["drift"]["tuned"]["tensors"]} == set(adapter_names(model))
    with Run.create(tmp_path / "run", None, "resume") as run:
        saved = config.load(tmp_path / "run" / "config.yaml")
        start = StudiedModel(run, saved, "tuned", Progress(quiet=True)).load_start()
    ids = torch.arange(5, 25).view(2, 10)
    with torch.no_grad():
        assert torch.equal(start(input_ids=ids).logits, load_model("bundled")(input_ids=ids).logits)
    full = config.override(saved, {"given.tuned": "bundled"})
    with pytest.raises(UserError, match=r"given\.tuned = bundled has no adapter"):
        pipeline.run(full, tmp_path / "other", quiet=True)


# ---- what cannot be compared


def test_models_that_are_no_checkpoints_of_one_are_told() -> None:
    base = tiny_model("llama")
    check_alike(base, tiny_model("llama", seed=3), ("the base", "tuned"))
    more = tiny_model("llama", vocab_size=58)
    for other, message in (
        (tiny_model("qwen3"), "tuned is a Qwen3.* and the base a Llama"),
        (more, "tuned has 58 token embeddings and the base 53, as when tokens were added"),
        (tiny_model("llama", num_hidden_layers=3), r"layers\.2\.\S+ is \(24, 24\) in the one and absent in the other"),
        (tiny_model("llama", intermediate_size=44), r"gate_proj\.weight is \(44, 24\) in the one and \(40, 24\)"),
        (tiny_model("llama", tied=True), r"lm_head\.weight is absent"),
        (tiny_model("llama", num_attention_heads=2, head_dim=12, num_key_value_heads=1), "num_attention_heads is 2"),
        (tiny_model("llama", rms_norm_eps=1e-3), r"rms_norm_eps is 0\.001 in its config and 1e-06"),
    ):
        with pytest.raises(UserError, match=message) as found:
            check_alike(base, other, ("the base", "tuned"))
        assert "\n" not in str(found.value)


NO_CHANGE: list[tuple[str, dict, dict]] = [
    ("llama", {}, {"unsloth_version": "2026.1", "tokenizer_class": "Tokens", "quantization": {"a": 1}}),
    ("llama", {}, {"max_position_embeddings": 4096, "pretraining_tp": 2, "sliding_window": 8}),  # which Llama has not
    ("llama", {}, {"rope_theta": 10000.0, "use_cache": False, "output_attentions": True, "return_dict": False}),
    ("qwen3_moe", {}, {"output_router_logits": True, "router_aux_loss_coef": 0.5}),
    ("mistral", {"sliding_window": None}, {"sliding_window": None, "max_position_embeddings": 8}),
    ("gpt2", {}, {"summary_type": "mean", "n_ctx": 1024}),
    ("falcon", {}, {"ffn_hidden_size": 96, "hidden_dropout": 0.3}),
]
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
CHANGE: list[tuple[str, dict, dict, str]] = [
    ("llama", {}, {"rms_norm_eps": 1e-5}, r"rms_norm_eps is 1e-05"),
    ("llama", {}, {"hidden_act": "gelu"}, r"hidden_act is 'gelu'"),
    ("llama", {}, {"rope_theta": 5e5}, r"rope_parameters\.rope_theta is 500000"),
    (
        "llama",
        {"rope_parameters": DYNAMIC},
        {"rope_parameters": DYNAMIC | {"factor": 4.0}},
        r"rope_parameters\.factor is 4",
    ),
    (
        "llama",
        {"rope_parameters": DYNAMIC},
        {"rope_parameters": DYNAMIC, "max_position_embeddings": 2048},
        "max_position",
    ),
    ("llama", {}, {"num_attention_heads": 2, "head_dim": 12, "num_key_value_heads": 1}, "num_attention_heads is 2"),
    ("mistral", {"sliding_window": 4096}, {"sliding_window": None}, "sliding_window is None"),
    ("mistral", {"sliding_window": 4096}, {"sliding_window": 2048}, "sliding_window is 2048"),
    ("gemma3", {}, {"layer_types": ["full_attention", "full_attention"]}, "layer_types is"),
    ("gemma3", {}, {"query_pre_attn_scalar": 8}, "query_pre_attn_scalar is 8"),
    ("gemma3", {}, {"final_logit_softcapping": 3.0}, "final_logit_softcapping is 3"),
    ("qwen3_moe", {}, {"num_experts_per_tok": 1}, "num_experts_per_tok is 1"),
    ("qwen3_moe", {}, {"norm_topk_prob": True}, "norm_topk_prob is True"),
    ("gpt2", {}, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
    ("gpt_neox", {}, {"rotary_pct": 0.25}, "partial_rotary_factor is 0.25"),
    ("gpt_neox", {}, {"use_parallel_residual": False}, "use_parallel_residual is False"),
    ("falcon", {}, {"alibi": True}, "alibi is True"),
]


def two_models(kind: str, of_base: dict, of_tuned: dict, dtype: torch.dtype) -> tuple[Any, Any]:
    """Two models with other weights; the tuned one is asked after one text, as the base may be."""
    return tiny_model(kind, dtype, **of_base), tiny_model(kind, dtype, seed=1, **of_tuned)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind, of_base, of_tuned", NO_CHANGE)
def test_settings_that_change_no_logits_may_differ(kind, of_base, of_tuned, dtype) -> None:
    base, tuned = two_models(kind, of_base, of_tuned, dtype)
    before = snapshot(base)
    check_alike(base, tuned, ("the base", "tuned"))
    check_alike(tuned, base, ("the base", "tuned"))
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())


@pytest.mark.long
@pytest.mark.parametrize("kind, of_base, of_tuned, message", CHANGE)
def test_settings_that_change_logits_are_told_by_name(kind, of_base, of_tuned, message) -> None:
    base, tuned = two_models(
        kind, of_base | {"tokenizer_class": "A"}, of_tuned | {"tokenizer_class": "B"}, torch.float32
    )
    with pytest.raises(UserError, match=f"tuned computes otherwise than the base: .*{message}") as found:
        check_alike(base, tuned, ("the base", "tuned"))
    assert "tokenizer_class" not in str(found.value)
    with pytest.raises(UserError, match="computes otherwise"):
        check_alike(tuned, base, ("the base", "tuned"))


def test_two_classes_that_compute_the_same_are_one_model() -> None:
    llama = tiny_model("llama", torch.float32)
    check_alike(llama, tiny_model("mistral", torch.float32, sliding_window=None), ("the base", "tuned"))
    with pytest.raises(UserError, match="tuned is a MistralForCausalLM and the base a LlamaForCausalLM"):
        check_alike(llama, tiny_model("mistral", torch.float32, sliding_window=4096), ("the base", "tuned"))


def test_another_tokenizer_and_a_folder_without_tasks_are_told(tmp_path: Path) -> None:
    pipeline.run(
        config.override(config.loads(SMALL, "SMALL"), {"facts.people": "16"}), tmp_path / "made", stages=["data"]
    )
    save_model(load_model("bundled"), tokenizer("space"), tmp_path / "tuned")
    experiment = changed(comparison("bundled", [str(tmp_path / "tuned")], str(tmp_path / "made")))
    with pytest.raises(UserError, match=r"the tokenizer of .*tuned gives .* other tokens than that of bundled"):
        pipeline.run(experiment, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"holds no bio\.jsonl and qa\.jsonl"):
        tasks_in(tmp_path / "tuned")
    with pytest.raises(UserError, match=r"would both be called a; write one of them as NAME="):
        comparison("bundled", ["x/a", "y/a"], str(tmp_path / "made"))


def test_names_are_taken_from_the_path_or_given() -> None:
    assert named("runs/demo/models/mixed/mixed") == ("mixed", "runs/demo/models/mixed/mixed")
    assert named("me/my.model v2") == ("my-model-v2", "me/my.model v2")
    assert named("best=a/b") == ("best", "a/b") and named("a/b=c") == ("b-c", "a/b=c")
    assert named("runs/base") == ("tuned", "runs/base") == named("tuned=runs/base")


@pytest.mark.parametrize(
    "words, message",
    [
        (["bundled", "--tasks", "TASKS"], "compare takes a base"),
        (["bundled", "x"], "compare needs --tasks"),
        (["bundled", "no/such/model", "--tasks", "TASKS"], "model folder no/such/model does not exist"),
        (["bundled", "bundled", "--tasks", "TASKS", "--rnu", "x"], "Unknown option: --rnu. Did you mean --run?"),
        (["bundled", "bundled", "--tasks", "nowhere"], "tasks folder nowhere holds no"),
    ],
)
def test_mistakes_on_the_command_line_are_one_sentence(words, message, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks").mkdir()
    if "TASKS" in words:
        pipeline.run(
            config.override(config.loads(SMALL, "SMALL"), {"facts.people": "8"}), tmp_path / "made", stages=["data"]
        )
    with pytest.raises(SystemExit) as ended:
        commands.main(["compare", *(str(tmp_path / "made") if word == "TASKS" else word for word in words)])
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2 and message in told
    assert not (tmp_path / "runs").exists()


def test_an_experiment_without_models_or_with_one_name_twice_is_told() -> None:
    for text, message in (
        ("{strategies: {}}", "there is nothing to analyse"),
        ("{given: {mixed: bundled}}", "'mixed' is both a strategy and a given model"),
        ("{strategies: {}, given: {base: bundled}}", "strategy 'base' cannot name"),
    ):
        with pytest.raises(UserError, match=message):
            config.loads(text, "test")
