"""`crosstrace pretrain-base` makes a base that loads and replays, goes on after a kill, and mixes no two recipes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from crosstrace import load_model, load_tokenizer
from crosstrace.cli import commands
from crosstrace.core.errors import UserError
from crosstrace.training import pretraining
from crosstrace.training.pretraining import POPULATION_A, PretrainSettings, pretrain_base

TINY: dict[str, Any] = {
    "layers": 1, "width": 16, "heads": 2, "kv_heads": 2, "neurons": 16, "warmup_people": 8, "warmup_steps": 2,
    "steps": 2, "bio": 2, "qa": 2, "bf16": False, "facts": {"people": 12},
}  # fmt: skip


def recipe(**changes: Any) -> PretrainSettings:
    settings = TINY | changes
    settings["facts"] = replace(POPULATION_A, **settings["facts"])
    return TypeAdapter(PretrainSettings).validate_python(settings)


def words(**changes: Any) -> list[str]:
    """The recipe as settings of the command line."""
    settings = TINY | changes
    facts = settings.pop("facts")
    settings |= {f"facts.{name}": value for name, value in facts.items()}
    words = {name: value if isinstance(value, str) else json.dumps(value) for name, value in settings.items()}
    return ["--threads", "1", *(f"--recipe.{name}={word}" for name, word in words.items())]


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        commands.main(["pretrain-base", *arguments])
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    return captured.err


@pytest.mark.long
@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_a_base_loads_and_its_recipe_replays(capsys, tmp_path: Path, architecture: str) -> None:
    base, again = tmp_path / "base", tmp_path / "again"
    commands.main(["pretrain-base", str(base), *words(architecture=architecture)])
    assert "qa_held_out" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["base"]  # no work folder, no partial one
    assert load_model(str(base)).config.model_type == architecture
    assert load_tokenizer(str(base)).eos_token == "<end>"
    commands.main(["pretrain-base", str(again), str(base / "recipe.json"), "--threads", "1"])
    assert weights(again) == weights(base)
    assert (again / "recipe.json").read_bytes() == (base / "recipe.json").read_bytes()
    capsys.readouterr()
    assert "exists" in told(capsys, str(base), *words())


def interrupt(folder: Path, at: int, options: PretrainSettings) -> None:
    def progress(done: int, total: int) -> None:
        if done == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain_base(folder, options, work=folder.with_name("base-work"), progress=progress)
    assert not folder.exists() and folder.with_name("base-work").is_dir()


def test_an_interrupted_base_goes_on_to_the_same_weights(monkeypatch, tmp_path: Path) -> None:
    whole, base = tmp_path / "whole", tmp_path / "base"
    pretrain_base(whole, recipe(), work=tmp_path / "whole-work")
    interrupt(base, 3, recipe())
    # and once more while the result is being written
    save = pretraining.save_model

    def half(model: Any, tokenizer: Any, folder: Path) -> None:
        save(model, tokenizer, folder)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretraining, "save_model", half)
        pretrain_base(base, recipe(), work=tmp_path / "base-work")
    assert not base.exists()
    pretrain_base(base, recipe(), work=tmp_path / "base-work")
    assert weights(base) == weights(whole)
    assert (base / "recipe.json").read_bytes() == (whole / "recipe.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "whole"]


def test_another_recipe_never_takes_over_the_checkpoints(capsys, tmp_path: Path) -> None:
    interrupt(tmp_path / "base", 3, recipe())
    message = told(capsys, str(tmp_path / "base"), *words(seed=2))
    assert "another recipe (seed differs)" in message
    assert not (tmp_path / "base").exists() and (tmp_path / "base-work").is_dir()


def test_a_foreign_work_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="something else is there"):
        pretrain_base(tmp_path / "base", recipe(), work=tmp_path / "work")
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "width is 16 and heads is 3"),
        ({"kv_heads": 3, "heads": 4}, "heads is 4 and kv_heads is 3"),
        ({"architecture": "gpt_neox", "kv_heads": 1}, "set kv_heads to 2"),
        ({"architecture": "gpt_neox", "heads": 4, "kv_heads": 4}, "a width that 32 divides"),
        ({"heads": 0}, "setting recipe.heads is 0, but input should be"),
        ({"qa": 0}, "setting recipe.qa is 0"),
        ({"architecture": "rnn"}, 'Invalid value "rnn" for --recipe.architecture'),
        ({"facts": {"people": 12, "qa_share": 1.0}}, "nobody to test recall on"),
        ({"facts": {"people": 12, "qa_share": 0.01}}, "nobody whose questions are trained"),
        ({"facts": {"people": 10**6}}, "facts.people is 1000000"),
        ({"warmup_people": 1, "facts": {"people": 12, "qa_share": 0.1}}, "warmup_people is 1"),
        ({"bogus": 1}, "Unknown option: --recipe.bogus"),
    ],
)
def test_a_recipe_that_cannot_be_is_told_before_anything_is_written(capsys, tmp_path: Path, changes, message) -> None:
    assert message in told(capsys, str(tmp_path / "base"), *words(**changes))
    assert list(tmp_path.iterdir()) == []


def test_misused_words(capsys, tmp_path: Path) -> None:
    base = str(tmp_path / "base")
    assert "Unknown option: --bogus" in told(capsys, base, "--bogus", "1")
    assert "needs a value" in told(capsys, base, "--recipe.tied")
    assert "pretrain-base needs FOLDER" in told(capsys)
    assert "not valid YAML" in told(capsys, base, "--recipe.seed", "[")
    (tmp_path / "other.json").write_text("[]")
    (tmp_path / "damaged.json").write_text('{"recipe": {"facts": 3}}')
    assert "recipe.facts is 3" in told(capsys, base, str(tmp_path / "damaged.json"), "--recipe.facts.people", "9")
    assert "holds no recipe" in told(capsys, base, str(tmp_path / "other.json"))


def test_grouped_queries_and_the_smallest_heads_that_are_allowed(tmp_path: Path) -> None:
    for number, sizes in enumerate(({"heads": 8, "kv_heads": 2}, {"architecture": "gpt_neox", "heads": 2})):
        pretrain_base(tmp_path / str(number), recipe(**sizes), work=tmp_path / "work")
