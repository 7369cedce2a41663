"""Grafted and ablated models as folders: the very bits, plain transformers, cards that tell, nothing half written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny_models import tiny_model

from crosstrace import artefacts, cli, config, harness, models, pipeline
from crosstrace.errors import UserError
from crosstrace.evaluate import recall
from crosstrace.intervene import ablated, grafted
from crosstrace.material import examples
from crosstrace.results import Results
from crosstrace.shared import ParamSet, scope
from crosstrace.store import Run, read_json

EXPERIMENT = """
facts: {people: 24}
strategies: {mixed: [{name: mixed, batch: {bio: 8, qa: 8}, steps: 4}]}
train: {precision: float32, recall_every: 0, recall_examples: 8}
eval: {known: 24}
trace: {parts: 2, every: 1, check: false}
analysis: {fractions: [0.05], central_fractions: [0.05], draws: 2}
interventions: {fractions: [0.05, 0.9], seeds: 2, questions: 24}
mechanism: {run: false}
jobs: 1
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    pipeline.run(config.loads(EXPERIMENT, "EXPERIMENT"), folder, quiet=True)
    return folder


def values(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def plain(folder: Path, dtype: torch.dtype = torch.float64):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gpt2", "qwen3", "qwen3_moe"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_bits_are_those_of_the_intervention(tmp_path: Path, kind: str, tied: bool) -> None:
    base, tuned = (tiny_model(kind, tied=tied, seed=seed) for seed in (1, 2))
    before = values(base), values(tuned)
    generator = torch.Generator().manual_seed(0)
    names = scope(base, include_embeddings=True)
    shapes = dict(base.named_parameters())
    pset = ParamSet({name: torch.rand(shapes[name].shape, generator=generator) < 0.3 for name in names}, "some")
    artefacts.write_grafted(base, tuned, pset, tmp_path / "graft", card={"data": "none"})
    artefacts.write_ablated(tuned, base, pset, tmp_path / "ablate")
    artefacts.write_ablated(tuned, base, pset, tmp_path / "zero", to="zero")
    with grafted(base, pset, before[1]):
        wanted = {"graft": values(base)}
    with ablated(tuned, pset, "base", before[0]):
        wanted["ablate"] = values(tuned)
    with ablated(tuned, pset, "zero"):
        wanted["zero"] = values(tuned)
    for name, expected in wanted.items():
        found = values(plain(tmp_path / name))
        assert found.keys() == expected.keys() and all(found[key].equal(expected[key]) for key in expected), name
    assert all(
        a.equal(b) for model, old in zip((base, tuned), before) for a, b in zip(values(model).values(), old.values())
    )
    card = read_json(tmp_path / "graft" / "crosstrace.json")
    assert card["set"]["size"] == pset.size and card["dtype"] == "float64" and card["data"] == "none"
    assert card["base"]["weights"] != card["tuned"]["weights"]
    assert ParamSet.load(tmp_path / "graft/crosstrace/set.safetensors") == pset


def test_a_runs_graft_answers_as_the_run_measured(whole: Path, tmp_path: Path) -> None:
    tokenizer = models.load_tokenizer("bundled")
    for kind, fraction in (("graft", 0.9), ("ablate", 0.05)):  # enough for some right answers, and some wrong ones
        cli.main([kind, str(whole), str(tmp_path / kind), "--when", "final", "--fraction", str(fraction)])
        card = read_json(tmp_path / kind / "crosstrace.json")
        with Run.create(whole, None, "resume") as run:
            parts = examples(run, tokenizer)
        found = recall(models.load_model(str(tmp_path / kind)), tokenizer, parts["qa_id"])
        rows = Results.read(whole)["interventions"]["mixed"][kind]
        row = next(r for r in rows if (r["when"], r["set"], r["fraction"]) == ("final", "shared", fraction))
        assert 0 < row["qa_id"] < 1
        assert card["recall"]["this"]["qa_id"] == row["qa_id"] and card["set"]["size"] == row["size"]
        asked = {item.example.id for item in pipeline.sample(parts["qa_id"], 24)}
        right = [bool(e) for e, item in zip(found.exact, parts["qa_id"]) if item.example.id in asked]
        assert sum(right) / len(right) == pytest.approx(row["qa_id"])
        text = (tmp_path / kind / "README.md").read_text()
        assert card["base"]["revision"] in text and card["data"] in text and "--when final" in text
        own = plain(tmp_path / kind, torch.float32)
        batch = {"input_ids": parts["qa_id"][0].ids[None]}
        assert own(**batch).logits.equal(models.load_model(str(tmp_path / kind), attention="sdpa")(**batch).logits)


def test_controls_are_those_of_the_run(whole: Path, tmp_path: Path) -> None:
    sizes = {}
    for name in ("shared", "bio", "qa", "bio_only", "random", "random_per_tensor"):
        options = artefacts.EditSettings(set=name, when="final", fraction=0.05)
        sizes[name] = artefacts.write_from_run(whole, tmp_path / name, "graft", options)["set"]["size"]
    assert len({sizes[n] for n in ("shared", "bio_only", "random", "random_per_tensor")}) == 1
    assert sizes["bio"] == sizes["qa"] > sizes["shared"]
    other = artefacts.EditSettings(set="random", when="final", fraction=0.05, draw=1)
    artefacts.write_from_run(whole, tmp_path / "other", "graft", other)
    first, second = (ParamSet.load(tmp_path / n / "crosstrace/set.safetensors") for n in ("random", "other"))
    assert first.size == second.size and first != second


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"strategy": "none"}, "no strategy 'none'"), ({"when": "checkpoints"}, "no checkpoints trace"),
        ({"set": "all"}, "no set 'all'"), ({"draw": 3}, "is not random"),
    ],
)  # fmt: skip
def test_what_a_run_lacks_is_told(whole: Path, tmp_path: Path, options: dict, told: str) -> None:
    with pytest.raises(UserError, match=told):
        artefacts.write_from_run(whole, tmp_path / "out", "graft", artefacts.EditSettings(**options))
    assert not (tmp_path / "out").exists()


def test_folders_are_not_written_over_and_appear_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_model("llama")
    pset = ParamSet({name: torch.ones_like(p, dtype=torch.bool) for name, p in base.named_parameters()})
    write = lambda **more: artefacts.write_grafted(base, tiny_model("llama", seed=3), pset, tmp_path / "m", **more)
    with monkeypatch.context() as patch:
        patch.setattr(artefacts, "_readme", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write()
    assert os.listdir(tmp_path) == []
    write()
    with pytest.raises(UserError, match="--overwrite"):
        write()
    write(overwrite=True)
    (tmp_path / "m" / "crosstrace.json").unlink()
    with pytest.raises(UserError, match="did not write it"):
        write(overwrite=True)
    with pytest.raises(UserError, match="made for another model"):
        artefacts.write_grafted(tiny_model("gpt2"), base, pset, tmp_path / "other")


def test_sets_and_traces_tell_their_origin(whole: Path) -> None:
    for path in (whole / "shared/mixed/final-0.05-shared.safetensors", whole / "traces/mixed/final/qa.safetensors",
                 whole / "traces/mixed/online/qa.safetensors"):  # fmt: skip
        with safe_open(path, "pt") as file:
            told = file.metadata()
        text = " ".join(told.values())
        for wanted in ("bundled", "sha256:", "abs", "example", "float32", "transformers"):
            assert wanted in text, (path.name, wanted)


# ------------------------------------------------------------------------------- the harness


def test_tasks_hold_the_runs_questions(whole: Path, tmp_path: Path) -> None:
    card = harness.export_run(whole, tmp_path / "tasks")
    assert set(card["tasks"]) == {
        f"crosstrace_demo_{part}{way}" for part in ("qa_id", "qa_ood") for way in ("", "_generate")
    }
    for part in ("qa_id", "qa_ood"):
        rows = [json.loads(line) for line in (tmp_path / "tasks" / f"{part}.jsonl").read_text().splitlines()]
        assert len(rows) == 72 and card["tasks"][f"crosstrace_demo_{part}"]["left_out"] == 0
        assert all(row["continuation"].strip().startswith(row["answer"]) for row in rows)
    with pytest.raises(UserError, match="--overwrite"):
        harness.export_run(whole, tmp_path / "tasks")


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is not installed (pip install 'crosstrace[lm-eval]')")
def test_the_real_harness_gives_the_runs_numbers(whole: Path, tmp_path: Path) -> None:
    harness.export_run(whole, tmp_path / "tasks")
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args",
               f"pretrained={whole / 'models/mixed/mixed'},dtype=float32",
               "--include_path", str(tmp_path / "tasks"), "--tasks", "crosstrace_demo", "--device", "cpu",
               "--batch_size", "16",
               "--output_path", str(tmp_path / "out")]  # fmt: skip
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path,
                   env=clean | {"HF_HOME": str(tmp_path / "hf")})  # fmt: skip
    (file,) = (tmp_path / "out").rglob("results_*.json")
    found, measured = read_json(file)["results"], Results.read(whole)["recall"]["mixed"]
    for part in ("qa_id", "qa_ood"):
        assert found[f"crosstrace_demo_{part}"]["acc,none"] == pytest.approx(measured[part]["exact_match"])
        assert found[f"crosstrace_demo_{part}_generate"]["exact_match,none"] == pytest.approx(
            measured[part]["exact_match"]
        )


# ------------------------------------------------------------------------------- trackers


def test_a_tracker_that_is_not_installed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from crosstrace import train

    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    experiment = config.override(config.loads(EXPERIMENT, "EXPERIMENT"), {"train.report_to": "[tensorboard]"})
    with pytest.raises(UserError, match="tensorboard, which is not installed"):
        pipeline.run(experiment, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
