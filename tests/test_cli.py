"""Every mistake is one sentence that names the thing and the remedy, exit code 2, and nothing is written over."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from crosstrace import cli, models


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("crosstrace: ")
    return lines[0]


CONFIGS = {
    "facts: {peple: 40}": "unknown setting 'facts.peple'; did you mean 'people'",
    "bogus: 1": "unknown setting 'bogus'",
    "analysis: {fractions: [0.5, 1.5]}": r"analysis\.fractions\.1 is 1\.5",
    "interventions: {fractions: [0]}": r"interventions\.fractions\.0 is 0",
    "facts: {qa_share: 0}": "facts.qa_share = 0",
    "facts: {qa_share: 1.0}": "facts.qa_share = 1",
    "facts: {people: 2}": "facts.people is 2",
    "facts: {people: 40, questions: 9}": "facts.questions is 9",
    "strategies: {}": "strategies",
    "strategies: {mixed: []}": r"strategies\.mixed",
    "strategies: {mixed: [{name: a, batch: {}, steps: 3}]}": "phase a has an empty batch",
    "strategies: {mixed: [{name: a, batch: {poems: 3}, steps: 3}]}": "'poems', which has no training example",
    "strategies: {mixed: [{name: a, batch: {bio: 3}}]}": "either steps or epochs",
    "strategies: {'../x': [{name: a, batch: {bio: 3}, steps: 1}]}": "strategy '../x' cannot name a folder",
    "strategies: {mixed: [{name: ../../b, batch: {bio: 3}, steps: 1}]}": "cannot name a folder",
    "trace: {measures: [absolute]}": r"trace\.measures\.0 is 'absolute'",
    "trace: {checkpoints: true}": "needs train.keep_checkpoints",
    "model: {name: ./nowhere}": "model folder ./nowhere does not exist",
    "a: [": "not valid YAML",
    "- 1": "holds a list",
    "just text": "holds a str",
}


@pytest.mark.parametrize(("text", "told"), CONFIGS.items())
def test_bad_configs(capsys, tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    message = fails(capsys, "run", str(tmp_path / "bad.yaml"), str(tmp_path / "run"))
    assert re.search(told, message), message
    assert not (tmp_path / "run" / "data").exists()


def test_missing_config_and_model_files(capsys, tmp_path: Path) -> None:
    assert "no.yaml does not exist" in fails(capsys, "run", str(tmp_path / "no.yaml"))
    (tmp_path / "empty").mkdir()
    message = fails(capsys, "demo", str(tmp_path / "run"), "--model.name", str(tmp_path / "empty"))
    assert "no config.json" in message


def test_a_tokenizer_without_offsets(capsys, tmp_path: Path) -> None:
    shutil.copytree(models.bundled_folder(), tmp_path / "slow")
    for file in ("tokenizer.json", "tokenizer_config.json", "recipe.json"):
        (tmp_path / "slow" / file).unlink()
    message = fails(capsys, "demo", str(tmp_path / "run"), "--model.name", str(tmp_path / "slow"), "--jobs", "1")
    assert "tokenizer" in message


def test_existing_folders_are_left_alone(capsys, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    for flag in ([], ["--resume"], ["--overwrite"]):
        assert "holds no crosstrace run" in fails(capsys, "demo", str(foreign), *flag)
    assert [path.name for path in foreign.iterdir()] == ["thesis.txt"]
    cli.main(["data", str(tmp_path / "run"), "--quiet"])
    before = (tmp_path / "run" / "data" / "bio.jsonl").read_bytes()
    message = fails(capsys, "demo", str(tmp_path / "run"))
    assert "--resume" in message and "--overwrite" in message
    assert "facts.people" in fails(capsys, "demo", str(tmp_path / "run"), "--resume", "--facts.people", "99")
    assert (tmp_path / "run" / "data" / "bio.jsonl").read_bytes() == before


def test_misused_words(capsys, tmp_path: Path) -> None:
    assert "did you mean 'demo'" in fails(capsys, "dmo")
    assert "exclude each other" in fails(capsys, "demo", "--resume", "--overwrite")
    assert "no config.yaml" in fails(capsys, "trace", str(tmp_path))
    assert "needs a value" in fails(capsys, "demo", str(tmp_path / "run"), "--facts.people")
    assert "unknown setting 'facts.peeple'" in fails(capsys, "demo", str(tmp_path / "run"), "--facts.peeple", "4")
    assert "begin one with" in fails(capsys, "eval", str(tmp_path / "nothing"))


def test_a_stage_whose_inputs_are_missing(capsys, tmp_path: Path) -> None:
    cli.main(["data", str(tmp_path / "run"), "--quiet"])
    message = fails(capsys, "report", str(tmp_path / "run"), "--quiet")
    assert "has no finished" in message


@pytest.mark.parametrize("command", [[], *([name] for name in cli.COMMANDS)])
def test_help_teaches(capsys, command: list[str]) -> None:
    try:
        cli.main([*command, "--help"])
    except SystemExit as stop:
        assert stop.code == 0
    assert len(capsys.readouterr().out) > 100


def test_settings_print_a_config_that_runs(capsys, tmp_path: Path) -> None:
    from crosstrace import config

    cli.main(["settings"])
    assert config.loads(capsys.readouterr().out, "printed") == config.Experiment()
