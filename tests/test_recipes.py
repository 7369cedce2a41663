"""A run's recipe for other trainers: their own loaders read the very tokens and labels, in the order of the run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_cli import fails
from tiny_models import tiny_base

from crosstrace.cli import commands
from crosstrace.core.run_folder import Run
from crosstrace.experiment import config
from crosstrace.experiment.examples import examples, training_examples
from crosstrace.models.loading import load_model, load_tokenizer
from crosstrace.training.updates import Updates

BASE = """
name: recipes
facts: {people: 12}
strategies:
  two_stage:
    - {name: bio, batch: {bio: 4}, steps: 5, optimiser: {decay: linear, floor: 0.2, warmup: 2}}
    - {name: qa, batch: {qa: 6}, replay: {bio: 1}, steps: 3, optimiser: {name: adafactor, decay: constant}}
  mixed:
    - {name: mixed, batch: {bio: 4, qa: 6}, weights: {qa: 0.1}, steps: 6}
"""
# what LLaMA-Factory 0.9.5 and axolotl 0.19.0 import to read data, beside what the tests have
PACKAGES = {
    "llamafactory": ("llamafactory==0.9.5", "omegaconf", "antlr4-python3-runtime==4.9.3", "modelscope", "torchdata",
                     "fire", "termcolor", "tyro<0.9"),
    "axolotl": ("axolotl==0.19.0", "addict", "posthog", "distro", "numba", "llvmlite"),
}  # fmt: skip


def begin(folder: Path, text: str) -> Path:
    """A run whose data stage is done."""
    (folder / "mine.yaml").write_text(text)
    commands.main(["data", str(folder / "run"), "--config", str(folder / "mine.yaml")])
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return begin(tmp_path_factory.mktemp("recipes"), BASE)


def export(run: Path, folder: Path, form: str, *arguments: str) -> Path:
    commands.main(["export", str(run), str(folder), "--for", form, *arguments])
    return folder


def seen(run: Path, strategy: str) -> list[list[dict[str, list[int]]]]:
    """What the run's own training sees in each phase: tokens and labels, update after update, as sets of rows."""
    experiment = config.loads((run / "config.yaml").read_text(), "config.yaml")
    tokenizer = load_tokenizer(experiment.model.name)
    with Run.create(run, None, "resume") as opened:
        taught = training_examples(examples(opened, experiment, tokenizer), experiment.roles)
    phases = []
    for index, phase in enumerate(experiment.strategies[strategy]):
        updates = Updates(phase, taught, f"{experiment.train.seed}/{index}", 0, "trace")
        rows = []
        for update in range(len(updates)):
            for batches in updates[update].values():
                for batch in batches:
                    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"].bool()):
                        labels[0] = -100  # no token before it predicts it
                        rows.append({"input_ids": ids[mask].tolist(), "labels": labels[mask].tolist()})
        phases.append(rows)
    return phases


def assert_same_updates(found: list[dict[str, Any]], expected: list[dict[str, Any]], updates: int) -> None:
    """Every update has the same rows; their order within an update makes no difference."""
    assert len(found) == len(expected) and len(found) % updates == 0
    size = len(found) // updates

    def sorted_update(rows: list[dict[str, Any]], update: int) -> list[str]:
        part = rows[update * size : (update + 1) * size]
        return sorted(json.dumps([row["input_ids"], [-100, *list(row["labels"])[1:]]]) for row in part)

    for update in range(updates):
        assert sorted_update(found, update) == sorted_update(expected, update)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def test_rows_are_those_of_every_update(run, tmp_path):
    folder = export(run, tmp_path / "plain", "jsonl", "--strategy", "two_stage")
    lines = [json.loads(line) for line in (folder / "data" / "1-qa.jsonl").read_text().splitlines()]
    assert [line["task"] for line in lines] == (["qa"] * 6 + ["bio"]) * 3
    assert [line["update"] for line in lines] == sorted([0, 1, 2] * 7)
    bios = {json.loads(line)["text"] for line in (run / "data" / "bio.jsonl").read_text().splitlines()}
    for line in lines:
        whole = line["prompt"] + line["completion"]
        assert (not line["prompt"] and whole in bios) if line["task"] == "bio" else line["prompt"].endswith("?")
    phase = read_json(folder / "1-qa.json")
    assert phase["base"] == "./out/0-bio" and phase["recipe_base"] == "./base" and phase["updates"] == 3
    card = read_json(folder / "crosstrace.json")
    assert [row["rows"] for row in card["phases"]] == [20, 21]
    assert (folder / "base" / "model.safetensors").is_file() and "1-qa" in (folder / "README.md").read_text()


def test_shares_of_the_loss_are_told(run, tmp_path):
    (phase,) = read_json(export(run, tmp_path / "plain", "jsonl") / "crosstrace.json")["phases"]
    assert phase["name"] == "0-mixed"
    bio, qa = phase["tasks"]
    assert bio["loss"] == pytest.approx(1 / 1.1) and qa["loss"] == pytest.approx(0.1 / 1.1)
    rows = seen(run, "mixed")[0]
    counts = {True: 0, False: 0}
    for row in rows:
        counts[row["labels"][1] != -100] += sum(label != -100 for label in row["labels"])
    assert bio["tokens"] == pytest.approx(counts[True] / sum(counts.values()), abs=0.02)
    assert bio["tokens"] + qa["tokens"] == pytest.approx(1)


def test_the_texts_to_watch_are_read_by_the_callback(run, tmp_path):
    from crosstrace.training.watched import read_rows

    folder = export(run, tmp_path / "plain", "jsonl")
    counts = read_json(folder / "crosstrace.json")["watch"]
    tokenizer = load_tokenizer("bundled")
    for part, count in counts.items():
        rows = [json.loads(line) for line in (folder / "watch" / f"{part}.jsonl").read_text().splitlines()]
        items = read_rows(part, rows, tokenizer)
        assert len(items) == count and all(bool(item.example.mentions) == (part != "bio") for item in items)


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["two_stage", "mixed"])
def test_trl_reads_the_same_and_trains(strategy, run, tmp_path, monkeypatch):
    pytest.importorskip("trl")
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser, get_dataset

    folder = export(run, tmp_path / "trl", "trl", "--strategy", strategy)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model = None
    for phase, expected in zip(read_json(folder / "crosstrace.json")["phases"], seen(run, strategy), strict=True):
        parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig))
        words = ["--config", f"{phase['name']}.yaml", "--use_cpu", "true", "--disable_tqdm", "true"]
        _, training, of_model, of_data = parser.parse_args_and_config(args=words, fail_with_unknown_args=True)
        assert Path(of_model.model_name_or_path).is_dir()
        data = get_dataset(of_data)["train"]
        trainer = SFTTrainer(of_model.model_name_or_path, training, train_dataset=data)
        rows = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in trainer.train_dataset]
        assert_same_updates(rows, expected, phase["updates"])
        batches = list(trainer.get_train_dataloader())
        together = [
            ids[mask.bool()].tolist() for b in batches for ids, mask in zip(b["input_ids"], b["attention_mask"])
        ]
        assert together == [row["input_ids"] for row in rows]  # in the order of the file
        before = {name: p.clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        trainer.save_model(training.output_dir)  # as TRL's command does, which the next phase begins with
        assert trainer.state.global_step == phase["updates"]
        assert any(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
        model = trainer.model
    assert model is not None


@pytest.mark.long
def test_settings_say_what_the_phases_say(run, tmp_path):
    for form, key in {
        "trl": "model_name_or_path",
        "llamafactory": "model_name_or_path",
        "axolotl": "base_model",
    }.items():
        folder = export(run, tmp_path / form, form, "--strategy", "two_stage")
        first, second = (yaml.safe_load((folder / f"{name}.yaml").read_text()) for name in ("0-bio", "1-qa"))
        assert first[key] == "./base" and second[key] == first["output_dir"] == "./out/0-bio"
        assert (first["max_steps"], second["max_steps"]) == (5, 3)
        micro = "micro_batch_size" if form == "axolotl" else "per_device_train_batch_size"
        assert second[micro] * second["gradient_accumulation_steps"] == 7
        optimiser = "optimizer" if form == "axolotl" else "optim"
        assert (first[optimiser], second[optimiser]) == ("adamw_torch", "adafactor")
        schedule = "lr_scheduler" if form == "axolotl" else "lr_scheduler_type"
        assert (first[schedule], second[schedule]) == ("polynomial", "constant_with_warmup")
        assert first["lr_scheduler_kwargs"]["lr_end"] == pytest.approx(0.2 * first["learning_rate"])
        same = read_json(folder / "crosstrace.json")["same_tokens"]
        assert same["same"] == same["of"] > 12 and same["first_other"] is None


def test_files_have_the_documented_form(run, tmp_path):
    """LLaMA-Factory's alpaca rows behind dataset_info.json, and axolotl's input_output segments."""
    folder = export(run, tmp_path / "lf", "llamafactory")
    (entry,) = read_json(folder / "data" / "dataset_info.json").values()
    rows = [json.loads(line) for line in (folder / "data" / entry["file_name"]).read_text().splitlines()]
    assert entry["columns"] == {"prompt": "instruction", "response": "output"}
    assert all(row.keys() == {"instruction", "output"} and row["output"].endswith("<end>") for row in rows)
    folder = export(run, tmp_path / "ax", "axolotl")
    for line in (folder / "data" / "0-mixed.jsonl").read_text().splitlines():
        *before, last = json.loads(line)["segments"]
        assert (
            last["label"] is True and last["text"].endswith("<end>") and [s["label"] for s in before] in ([], [False])
        )


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("CROSSTRACE_SLOW"), reason="installs packages; set CROSSTRACE_SLOW=1")
@pytest.mark.parametrize("trainer", PACKAGES)
def test_its_own_loader_reads_the_same(trainer, run, tmp_path):
    folder, packages = export(run, tmp_path / trainer, trainer), tmp_path / "packages"
    install = (sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(packages))
    subprocess.run([*install, *PACKAGES[trainer]], check=True)
    # LLaMA-Factory imports it for audio alone, and it must match torch's build
    (packages / "torchaudio.py").write_text("")
    environment = os.environ | {
        "PYTHONPATH": str(packages), "DISABLE_VERSION_CHECK": "1", "AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
    }  # fmt: skip
    reader = Path(__file__).with_name("reads_recipes.py")
    words = [sys.executable, str(reader), trainer, "0-mixed.yaml", str(tmp_path / "rows.json")]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_updates(read_json(tmp_path / "rows.json"), seen(run, "mixed")[0], 6)


@pytest.mark.long
def test_adapters_go_on_from_phase_to_phase(tmp_path, capsys):
    run = begin(tmp_path, BASE + "train: {lora: {rank: 4, alpha: 8, targets: [q_proj, v_proj]}}\n")
    folder = export(run, tmp_path / "lf", "llamafactory", "--strategy", "two_stage")
    second = yaml.safe_load((folder / "1-qa.yaml").read_text())
    assert second["model_name_or_path"] == "./base" and second["adapter_name_or_path"] == "./out/0-bio"
    assert second["lora_rank"] == 4 and second["lora_target"] == "q_proj,v_proj"
    folder = export(run, tmp_path / "ax", "axolotl", "--strategy", "two_stage")
    second = yaml.safe_load((folder / "1-qa.yaml").read_text())
    assert second["lora_model_dir"] == "./out/0-bio" and second["lora_target_modules"] == ["q_proj", "v_proj"]
    first = yaml.safe_load((export(run, tmp_path / "trl", "trl") / "0-mixed.yaml").read_text())
    assert first["use_peft"] and first["lora_r"] == 4
    capsys.readouterr()
    message = fails(capsys, "export", str(run), str(tmp_path / "two"), "--for", "trl", "--strategy", "two_stage")
    assert "begins every phase with a new adapter" in message and not (tmp_path / "two").exists()


@pytest.mark.long
def test_a_base_of_any_kind_can_be_loaded(tmp_path):
    folder = tiny_base()
    run = begin(tmp_path, BASE + f"model: {{name: {folder}}}\n")
    out = export(run, tmp_path / "out", "trl")
    assert yaml.safe_load((out / "0-mixed.yaml").read_text())["model_name_or_path"] == str(folder.resolve())
    assert not (out / "base").exists()
    again = tmp_path / "new"
    again.mkdir()
    run = begin(again, BASE + "model: {name: bundled, random_init: 3}\n")
    out = export(run, again / "out", "trl")
    written, drawn = load_model(str(out / "base"), "float32"), load_model("bundled", "float32", random_init=3)
    assert all(torch.equal(p, q) for p, q in zip(written.parameters(), drawn.parameters()))


def test_what_a_prompt_and_a_completion_cannot_say_is_refused(tmp_path, capsys, run):
    tasks = "tasks: {bio: {role: store, source: biographies, targets: object}, qa: {role: recall, source: questions}}\n"
    objects = begin(tmp_path, BASE + tasks)
    capsys.readouterr()
    message = fails(capsys, "export", str(objects), str(tmp_path / "out"), "--for", "trl")
    assert "trains tokens in the middle of its text" in message and not (tmp_path / "out").exists()
    for words, expected in [
        (
            ("--for", "trl", "--strategy", "none"),
            "strategy 'none' is none of the run's; expected one of two_stage, mixed",
        ),
        (("--for", "unsloth"), "unsloth"),
        (("--strategy", "mixed"), "--strategy names a recipe"),
    ]:
        assert expected in fails(capsys, "export", str(run), str(tmp_path / "out"), *words)
    export(run, tmp_path / "there", "jsonl")
    capsys.readouterr()
    assert "exists; choose another folder" in fails(
        capsys, "export", str(run), str(tmp_path / "there"), "--for", "jsonl"
    )
    export(run, tmp_path / "there", "trl", "--overwrite")
    assert (tmp_path / "there" / "0-mixed.yaml").is_file() and not (tmp_path / "there" / "0-mixed.json").exists()


@pytest.mark.long
def test_questions_in_a_chat_template_keep_their_tokens(tmp_path):
    folder = tiny_base()
    tokenizer = load_tokenizer(str(folder))
    turns = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<end>{% else %} {% endif %}"
    tokenizer.chat_template = turns + "{% endfor %}"
    tokenizer.save_pretrained(folder)
    run = begin(tmp_path, BASE.replace("{people: 12}", "{people: 12, template: chat}") + f"model: {{name: {folder}}}\n")
    for form in ("trl", "llamafactory", "axolotl"):
        same = read_json(export(run, tmp_path / form, form) / "crosstrace.json")["same_tokens"]
        assert same["same"] == same["of"] and same["first_other"] is None

    from tokenizers.processors import TemplateProcessing

    begins = load_tokenizer(
        str(folder)
    )  # a tokenizer that begins every text with a token, which the template writes too
    begins.bos_token = begins.pad_token
    begins.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begins.bos_token} $A", special_tokens=[(begins.bos_token, begins.bos_token_id)]
    )
    begins.chat_template = begins.bos_token + " " + turns + "{% endfor %}"
    begins.save_pretrained(folder)
    again = tmp_path / "again"
    again.mkdir()
    run = begin(again, BASE.replace("{people: 12}", "{people: 12, template: chat}") + f"model: {{name: {folder}}}\n")
    for form in ("trl", "llamafactory", "axolotl"):
        out = export(run, again / form, form)
        same = read_json(out / "crosstrace.json")["same_tokens"]
        assert same["same"] == same["of"] and same["first_other"] is None
        assert begins.bos_token * 2 not in (out / "data" / "0-mixed.jsonl").read_text()
