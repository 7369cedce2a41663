"""Grafted and ablated models as folders: the very bits, plain transformers, cards that tell, nothing half written."""

from __future__ import annotations

import json
import os
import string
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from tiny_models import tiny_model
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from crosstrace.cli import commands
from crosstrace.core.errors import UserError
from crosstrace.core.files import read_json
from crosstrace.core.run_folder import Run
from crosstrace.data.text import Example, Mention
from crosstrace.data.tokens import collate, encode
from crosstrace.experiment import config, pipeline
from crosstrace.experiment.examples import examples, sample
from crosstrace.export import artefacts, harness
from crosstrace.models import loading, untaught
from crosstrace.results.results import Results
from crosstrace.sets.interventions import ablated, grafted
from crosstrace.sets.paramset import ParamSet
from crosstrace.sets.selection import scope
from crosstrace.training.evaluation import recall

EXPERIMENT = """
facts: {people: 24}
strategies: {mixed: [{name: mixed, batch: {bio: 8, qa: 8}, steps: 4}]}
train: {precision: float32, recall_every: 0, recall_examples: 8}
eval: {known_examples: 24}
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


@pytest.mark.long
def test_a_runs_graft_answers_as_the_run_measured(whole: Path, tmp_path: Path) -> None:
    tokenizer = loading.load_tokenizer("bundled")
    for kind, fraction in (("graft", 0.9), ("ablate", 0.05)):  # enough for some right answers, and some wrong ones
        commands.main([kind, str(whole), str(tmp_path / kind), "--when", "final", "--fraction", str(fraction)])
        card = read_json(tmp_path / kind / "crosstrace.json")
        with Run.create(whole, None, "resume") as run:
            parts = examples(run, config.load(whole / "config.yaml"), tokenizer)
        found = recall(loading.load_model(str(tmp_path / kind)), tokenizer, parts["qa_id"])
        rows = Results.read(whole).as_values()["interventions"]["mixed"][kind]
        row = next(r for r in rows if (r["when"], r["set"], r["fraction"]) == ("final", "shared", fraction))
        assert 0 < row["qa_id"] < 1
        assert card["recall"]["this"]["qa_id"] == row["qa_id"] and card["set"]["size"] == row["size"]
        asked = {item.example.id for item in sample(parts["qa_id"], 24)}
        right = [bool(e) for e, item in zip(found.exact, parts["qa_id"]) if item.example.id in asked]
        assert sum(right) / len(right) == pytest.approx(row["qa_id"])
        text = (tmp_path / kind / "README.md").read_text()
        assert card["base"]["revision"] in text and card["data"] in text and "--when final" in text
        own = plain(tmp_path / kind, torch.float32)
        batch = {"input_ids": parts["qa_id"][0].ids[None]}
        assert own(**batch).logits.equal(loading.load_model(str(tmp_path / kind), attention="sdpa")(**batch).logits)


@pytest.mark.long
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


@pytest.mark.long
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


@pytest.mark.long
def test_sets_and_traces_tell_their_origin(whole: Path) -> None:
    for path in (whole / "shared/mixed/final-0.05-shared.safetensors", whole / "traces/mixed/final/qa.safetensors",
                 whole / "traces/mixed/online/qa.safetensors"):  # fmt: skip
        with safe_open(path, "pt") as file:
            told = file.metadata()
        text = " ".join(told.values())
        for wanted in ("bundled", "sha256:", "abs", "example", "float32", "transformers"):
            assert wanted in text, (path.name, wanted)


# ------------------------------------------------------------------------------- the harness


@pytest.mark.long
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


@pytest.mark.long
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is not installed (pip install 'crosstrace[lm-eval]')")
def test_the_real_harness_gives_the_runs_numbers(whole: Path, tmp_path: Path) -> None:
    harness.export_run(whole, tmp_path / "tasks")
    found = asked_by_lm_eval(tmp_path, whole / "models/mixed/mixed", "crosstrace_demo")
    measured = Results.read(whole).as_values()["recall"]["mixed"]
    for part in ("qa_id", "qa_ood"):
        assert found[f"crosstrace_demo_{part}"]["acc,none"] == pytest.approx(measured[part]["exact_match"])
        assert found[f"crosstrace_demo_{part}_generate"]["exact_match,none"] == pytest.approx(
            measured[part]["exact_match"]
        )


# answers that a reader of files may take for a date, a time, a number or a truth value; the blank before digits is a
# token of its own where a tokenizer splits numbers as Llama 3 and Qwen do
LOOKS: dict[str, list[str]] = {
    "born": [f"19{n:02}-0{n % 9 + 1}-{n + 10}" for n in range(12)],
    "opens": [f"{n + 8:02}:30:00" for n in range(12)],
    "founded": [str(1890 + 3 * n) for n in range(12)],
    "code": [f"00{n}" for n in range(12)],
    "member": ["true", "false"] * 6,
    "seen": [f"1998-01-{n + 10}T13:05:00" for n in range(12)],
    "size": [f"{n}.10" for n in range(12)],
    "city": ["Lyon", "NA", "null", "Oslo", "None", "Bonn", "nan", "Rome", "Nice", "inf", "Bern", "Kiel"],
}


def looks() -> list[Example]:
    """Questions whose answers look like something else."""
    found = []
    for name, answers in LOOKS.items():
        for n, answer in enumerate(answers):
            text = f"What is the {name} of Person{chr(65 + n)}? It is {answer}"
            start = len(text) - len(answer)
            mention = Mention(f"{name}.{n}", name, "q", (0, 0), (), (start, len(text)))
            found.append(Example(f"{name}.{n}.qa", "qa", text, f"P{n}", "ood", (mention.object,), (mention,)))
    return found


def look_tokenizer(kind: str) -> Any:
    """A tokenizer of the questions of `looks`: it splits numbers into three digits (`llama3`) or one (`qwen`), keeps
    them whole (`bytes`), writes blanks as a letter (`sentencepiece`), or begins every text with a token (`begin`)."""
    tokenizer = Tokenizer(BPE(unk_token=None))
    digits = {"llama3": "{1,3}", "qwen": "", "begin": "{1,3}"}.get(kind)
    if digits is not None:
        words = rf"[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(words), behavior="isolated"), byte_level]
        )
    elif kind == "sentencepiece":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Metaspace(), pre_tokenizers.Digits(individual_digits=True)]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.Metaspace() if kind == "sentencepiece" else decoders.ByteLevel()
    alphabet = [*string.printable, "▁"] if kind == "sentencepiece" else pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<pad>", "</s>", "<s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([example.text for example in looks()], trainer)
    if kind == "begin":
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", bos_token="<s>")


def as_the_harness_loads(folder: Path) -> dict[str, Any]:
    datasets = pytest.importorskip("datasets")
    common = yaml.safe_load((folder / "_questions").read_text())
    cache = {"cache_dir": str(folder.parent / "cache")}
    return datasets.load_dataset(path=common["dataset_path"], **common["dataset_kwargs"], **cache)


@pytest.mark.parametrize("kind", ["llama3", "qwen", "bytes", "sentencepiece", "begin"])
def test_answers_are_strings_whatever_they_look_like_under_every_tokenizer(tmp_path: Path, kind: str) -> None:
    tokenizer = look_tokenizer(kind)
    items = encode(tokenizer, looks())
    parts = {name: [item for item in items if item.example.mentions[0].relation == name] for name in LOOKS}
    card = harness.write_tasks(parts, tokenizer, "looks", tmp_path / "tasks")
    loaded = as_the_harness_loads(tmp_path / "tasks")
    for name, answers in LOOKS.items():
        rows = [json.loads(line) for line in (tmp_path / "tasks" / f"{name}.jsonl").read_text().splitlines()]
        asked = loaded[f"{name}_generate"]
        assert list(asked) == rows and [row["answer"] for row in asked] == answers
        assert all(feature.dtype == "string" for feature in asked.features.values())
        assert card["tasks"][f"crosstrace_looks_{name}_generate"]["left_out"] == 0
        for row, item in zip(asked, parts[name]):
            first = item.targets["answer"].tolist().index(True)
            assert tokenizer(row["prompt"])["input_ids"] == item.ids[:first].tolist()
            assert row["generated"].strip() == row["answer"]
        scored = card["tasks"][f"crosstrace_looks_{name}"]
        assert scored["questions"] == len(loaded.get(name, []))
        assert scored["left_out_by_relation"] == ({name: 12} if scored["questions"] == 0 else {})
        for row in loaded.get(name, []):
            assert not row["prompt"][-1].isspace() and (row["prompt"] + row["continuation"]).endswith("</s>")
    blanks = {name for name in LOOKS if not card["tasks"][f"crosstrace_looks_{name}"]["questions"]}
    splits_numbers = kind in ("llama3", "qwen", "sentencepiece", "begin")
    assert blanks == ({"born", "opens", "founded", "code", "seen", "size"} if splits_numbers else set())
    assert harness.summary(card).endswith("crosstrace_looks_city_generate  12 questions, exact_match")
    assert ("0 questions, acc; left out 12 of born" in harness.summary(card)) == splits_numbers
    assert ("| 12 of born |" in (tmp_path / "tasks" / "README.md").read_text()) == splits_numbers


def test_what_is_left_out_is_counted_by_relation(tmp_path: Path) -> None:
    tokenizer = look_tokenizer("bytes")
    examples = looks()
    for n, example in enumerate(examples[:3]):  # text after the answer
        examples[n] = replace(example, text=example.text + " I think")
    card = harness.write_tasks({"qa": encode(tokenizer, examples)}, tokenizer, "looks", tmp_path / "tasks")
    for way in ("", "_generate"):
        told = card["tasks"][f"crosstrace_looks_qa{way}"]
        assert told["left_out_by_relation"] == {"born": 3} and told["left_out"] == 3
    assert "left out 3 of born" in harness.summary(card)


@pytest.mark.long
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is not installed (pip install 'crosstrace[lm-eval]')")
def test_the_real_harness_finds_what_recall_finds_of_answers_that_look_like_dates(tmp_path: Path) -> None:
    tokenizer = look_tokenizer("llama3")
    items = encode(tokenizer, looks())
    options = untaught.NewModelSettings(width=64, heads=4, layers=2, neurons=128, positions=64)
    model = untaught._model(tokenizer, 64, options).train()
    batch = collate([item for n, item in enumerate(items) if n % 4], "answer", pad_id=tokenizer.pad_token_id)
    batch.pop("group")
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        model(**batch).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    loading.save_model(model.eval(), tokenizer, tmp_path / "model")
    parts = {name: [item for item in items if item.example.mentions[0].relation == name] for name in LOOKS}
    parts["every"] = items
    card = harness.write_tasks(parts, tokenizer, "looks", tmp_path / "tasks")
    found = asked_by_lm_eval(tmp_path, tmp_path / "model", "crosstrace_looks")
    for part, questions in parts.items():
        exact = recall(model, tokenizer, questions).exact
        assert 0 < exact.mean() < 1
        assert found[f"crosstrace_looks_{part}_generate"]["exact_match,none"] == pytest.approx(exact.mean())
        if card["tasks"][f"crosstrace_looks_{part}"]["questions"]:
            is_scored = [harness.question(item, tokenizer).is_scored for item in questions]
            assert found[f"crosstrace_looks_{part}"]["acc,none"] == pytest.approx(exact[is_scored].mean())


def asked_by_lm_eval(folder: Path, model: Path, tasks: str) -> dict[str, Any]:
    """The results of lm_eval, asked the tasks in folder/tasks."""
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={model},dtype=float32",
               "--include_path", str(folder / "tasks"), "--tasks", tasks, "--device", "cpu", "--batch_size", "16",
               "--output_path", str(folder / "out")]  # fmt: skip
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(command, check=True, capture_output=True, cwd=folder, env=clean | {"HF_HOME": str(folder / "hf")})
    (file,) = (folder / "out").rglob("results_*.json")
    return read_json(file)["results"]


# ------------------------------------------------------------------------------- trackers


def test_a_tracker_that_is_not_installed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from crosstrace.training import trainer

    monkeypatch.setattr(trainer.importlib.util, "find_spec", lambda name: None)
    experiment = config.override(config.loads(EXPERIMENT, "EXPERIMENT"), {"train.report_to": "[tensorboard]"})
    with pytest.raises(UserError, match="tensorboard, which is not installed"):
        pipeline.run(experiment, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
