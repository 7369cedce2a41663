"""Whole runs with a LoRA adapter, in both views of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_lora import logits
from test_pipeline import SMALL, numbers
from tiny_models import tiny_model

from crosstrace.core.errors import UserError
from crosstrace.core.progress import Progress
from crosstrace.core.run_folder import Run
from crosstrace.data.tokens import batches
from crosstrace.experiment import config, pipeline
from crosstrace.experiment.examples import examples
from crosstrace.experiment.studied import StudiedModel
from crosstrace.models.adapters import LoraSettings, adapted, adapter_names
from crosstrace.models.loading import load_model, load_tokenizer, save_model
from crosstrace.results.results import Results
from crosstrace.sets.interventions import ablated, grafted, snapshot
from crosstrace.sets.paramset import ParamSet
from crosstrace.trace import load_traces
from crosstrace.training.evaluation import recall

LORA = {
    "train.lora": "{rank: 4, alpha: 8, dropout: 0.1}", "train.optimiser.learning_rate": "0.01",
    "mechanism.run": "false", "mechanism.facts": "4", "mechanism.questions": "4",
    "facts.people": "16", "trace.measures": "[abs]", "trace.check": "false", "eval.known_examples": "40",
    "strategies": "{mixed: [{name: mixed, batch: {bio: 8, qa: 8}, steps: 4}]}", "retention.people": "16",
    "train.recall_every": "0",
}  # fmt: skip


def whole(model: Any) -> ParamSet:
    return ParamSet({n: torch.ones_like(model.get_parameter(n), dtype=torch.bool) for n in adapter_names(model)})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for view in ("merged", "adapter"):
        folder = tmp_path_factory.mktemp("lora") / view
        experiment = config.override(config.loads(SMALL, "SMALL"), LORA | {"trace.view": view})
        pipeline.run(experiment, folder, quiet=True)
        found[view] = folder
    return found


def test_a_whole_run_in_either_view_ends_with_a_report(runs):
    results = {view: Results.read(folder).as_values() for view, folder in runs.items()}
    for view, found in results.items():
        assert (runs[view] / "report" / "index.html").stat().st_size > 10_000
        assert found["run"]["view"] == view and found["run"]["lora"]["rank"] == 4
        assert {row["when"] for row in found["shared"]["mixed"]} == {"online", "final"}
        assert all(row["size"] > 0 for row in found["shared"]["mixed"] if row["fraction"] == 0.2)
        assert {row["unit"] for row in found["centralization"]["mixed"]} >= {"query_head", "neuron", "module"}
        for kind in ("ablate", "graft"):
            assert {row["set"] for row in found["interventions"]["mixed"][kind]} >= {"shared", "random"}
        assert {claim["claim"] for claim in found["claims"]} == {"ablation", "grafting"}
    trained = results["merged"]["run"]["lora"]["parameters"]
    model = adapted(load_model("bundled"), LoraSettings(rank=4), 0)
    assert trained == sum(model.get_parameter(name).numel() for name in adapter_names(model))


def test_both_views_have_the_same_weights_and_the_same_recall(runs):
    one, other = (numbers(runs[view]) for view in ("merged", "adapter"))
    file = "models/mixed/mixed/adapter_model.safetensors"
    assert (runs["merged"] / file).read_bytes() == (runs["adapter"] / file).read_bytes()
    for part, cell in one["recall"]["mixed"].items():
        if part != "relations":
            assert cell["exact_match"] == other["recall"]["mixed"][part]["exact_match"]
            assert cell["logprob"] == pytest.approx(other["recall"]["mixed"][part]["logprob"], rel=1e-4)
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
        items = examples(run, experiment, words)["qa_id"][:40]
        studied = StudiedModel(run, experiment, "mixed", Progress(quiet=True))
        start, tuned = studied.load_start(), studied.load()
    base, batch = load_model("bundled"), next(batches(items, 40, pad_id=0))
    asked = lambda model: recall(model, words, items)
    before, wanted = asked(base), asked(tuned)
    assert torch.equal(logits(start, batch), logits(base, batch))
    with ablated(tuned, whole(tuned), base=snapshot(start)):
        assert torch.equal(logits(tuned, batch), logits(base, batch))
        assert (asked(tuned).logprob == before.logprob).all()
    with grafted(start, whole(start), snapshot(tuned)):
        assert (asked(start).logprob == wanted.logprob).all()
    assert (before.logprob != wanted.logprob).any()


@pytest.mark.long
@pytest.mark.parametrize(
    "view, parts", [("merged", "[positions]"), ("adapter", "[dynamics, circuit, gradients, positions]")]
)
def test_the_mechanism_kept_checkpoints_and_further_training_take_either_view(view, parts, tmp_path):
    words = load_tokenizer("bundled")
    base = tiny_model("llama", torch.float32, vocab_size=len(words), max_position_embeddings=160)
    save_model(base, words, tmp_path / "base")
    values = LORA | {
        "model.name": str(tmp_path / "base"), "interventions.run": "false", "mechanism.run": "true",
        "mechanism.parts": parts, "retention.run": "true", "retention.steps": "2", "trace.view": view,
        "train.keep_checkpoints": "true", "train.checkpoint_every": "2", "trace.checkpoints": "true",
        "trace.online": "false", "strategies": "{only: [{name: all, batch: {bio: 4, qa: 4}, steps: 4}]}",
    }  # fmt: skip
    changed = config.override(config.loads(SMALL, "SMALL"), values)
    results = pipeline.run(changed, tmp_path / "run", quiet=True).as_values()
    assert {row["when"] for row in results["shared"]["only"]} == {"final", "checkpoints"}
    for row in results["retention"]["only"]["moved"]:
        assert row["when"] in ("final", "checkpoints") and row["energy"] is not None
    found = results["mechanism"]
    rows = [row for row in found["positions"]["only"] if row["component"] == "all"]
    ends = {len(row["places"]): row["logprob"] for row in rows}
    assert len(ends) > 2 and ends[0] != ends[4]
    if view == "adapter":
        groups = {row["group"] for row in found["gradients"]["only"]}
        assert groups >= {"all", "query_head", "shared", "rest"}
        assert [row["update"] for row in found["dynamics"]["only"]["rows"]] == [0, 2, 4]
        assert {row["unit"] for row in found["circuit"]["only"]["agreement"]} == {"query_head", "neuron"}
    saved = json.loads((tmp_path / "run/models/only/all/adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(tmp_path / "base")


def test_a_base_that_has_an_adapter_already_is_refused(tmp_path):
    model = adapted(load_model("bundled"), LoraSettings(rank=2), 0)
    model.save_pretrained(tmp_path / "adapter")
    values = {"model.name": str(tmp_path / "adapter"), "train.lora.rank": "2"}
    with pytest.raises(UserError, match=r"holds an adapter, and train\.lora would put another one on it"):
        pipeline.run(config.override(config.loads(SMALL, "SMALL"), values), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
