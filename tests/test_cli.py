"""Every mistake is one sentence that names the thing and the remedy, exit code 2, and nothing is written over."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest

from crosstrace.cli import commands, options
from crosstrace.core import processes
from crosstrace.data.tasks import TaskSettings
from crosstrace.experiment import config, pipeline
from crosstrace.models import locating
from crosstrace.results.results import Results
from crosstrace.training import recipes


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        commands.main(list(arguments))
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
    shutil.copytree(locating.bundled_folder(), tmp_path / "slow")
    for file in ("tokenizer.json", "tokenizer_config.json", "recipe.json"):
        (tmp_path / "slow" / file).unlink()
    message = fails(capsys, "demo", str(tmp_path / "run"), "--model.name", str(tmp_path / "slow"), "--jobs", "1")
    assert "tokenizer" in message


@pytest.mark.long
def test_existing_folders_are_left_alone(capsys, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    for flag in ([], ["--resume"], ["--overwrite"]):
        assert "holds no crosstrace run" in fails(capsys, "demo", str(foreign), *flag)
    assert [path.name for path in foreign.iterdir()] == ["thesis.txt"]
    commands.main(["data", str(tmp_path / "run"), "--quiet"])
    before = (tmp_path / "run" / "data" / "bio.jsonl").read_bytes()
    message = fails(capsys, "demo", str(tmp_path / "run"))
    assert "--resume" in message and "--overwrite" in message
    assert "facts.people" in fails(capsys, "demo", str(tmp_path / "run"), "--resume", "--facts.people", "99")
    assert (tmp_path / "run" / "data" / "bio.jsonl").read_bytes() == before


def test_misused_words(capsys, tmp_path: Path) -> None:
    assert 'Did you mean "demo"?' in fails(capsys, "dmo")
    assert "exclude each other" in fails(capsys, "demo", "--resume", "--overwrite")
    assert "exclude each other" in fails(capsys, "demo", "--quick", "--resume", "--overwrite")
    assert "no config.yaml" in fails(capsys, "trace", str(tmp_path))
    assert "needs a value" in fails(capsys, "demo", str(tmp_path / "run"), "--facts.people")
    assert "Unknown option: --trace.no-online" in fails(capsys, "demo", "--trace.no-online", "--quiet")
    assert "Did you mean --facts.people?" in fails(capsys, "demo", str(tmp_path / "run"), "--facts.peeple", "4")
    assert "valid list" in fails(capsys, "demo", "--analysis.fractions", "0.01", "0.05")
    assert "Did you mean --resume?" in fails(capsys, "demo", "--resum")
    assert "Unknown option: -q" in fails(capsys, "demo", "-q")
    assert "begin one with" in fails(capsys, "eval", str(tmp_path / "nothing"))


def test_a_stage_whose_inputs_are_missing(capsys, tmp_path: Path) -> None:
    commands.main(["data", str(tmp_path / "run"), "--quiet"])
    message = fails(capsys, "report", str(tmp_path / "run"), "--quiet")
    assert "has no finished" in message


@pytest.mark.parametrize("command", [[], *([name] for name in commands.COMMANDS)])
def test_help_teaches(capsys, command: list[str]) -> None:
    try:
        commands.main([*command, "--help"])
    except SystemExit as stop:
        assert stop.code == 0
    assert len(capsys.readouterr().out) > 100


def leaves(value: dict, prefix: str = "") -> list[tuple[str, object]]:
    nested = [leaves(v, f"{prefix}{k}.") if isinstance(v, dict) else [(f"{prefix}{k}", v)] for k, v in value.items()]
    return [leaf for part in nested for leaf in part]


def test_every_setting_is_an_option_whose_default_is_the_experiments(monkeypatch, tmp_path: Path) -> None:
    experiment = config.Experiment()
    shown = {name: options.word(value) for name, value, _, _ in options.leaves(experiment)}
    named = {name for name, _ in leaves(config.plain(experiment))}
    assert {name for name in named if not name.startswith(("strategies.", "tasks."))} <= set(shown)
    got: list[config.Experiment] = []

    def run(experiment: config.Experiment, *_: object, **__: object) -> Results:
        got.append(experiment)
        return Results()

    monkeypatch.setattr(pipeline, "run", run)
    commands.main(["demo", *(word for name, value in shown.items() for word in (f"--{name}", value))])
    assert got == [experiment]
    # another value of each kind arrives, in a strategy with '-' in its name and in a section that is off, too
    (tmp_path / "two.yaml").write_text("strategies: {a-b: [{name: a, batch: {bio: 3}, steps: 3}]}")
    changes = ["--analysis.fractions", "[0.5]", "--trace.online=false", "--strategies.a-b.0.steps", "7"]
    commands.main(["run", str(tmp_path / "two.yaml"), *changes, "--train.lora.rank", "2", "--quiet"])
    assert got[1].analysis.fractions == [0.5] and got[1].trace.online is False
    assert got[1].strategies["a-b"][0].steps == 7
    assert got[1].train.lora is not None and got[1].train.lora.rank == 2


def test_help_explains_every_setting(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    commands.main(["run", "--help"])
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 90
    flat = re.sub(r"[\s│╭╮╰╯─]+", " ", printed)
    assert "--facts.people INT Number of people. [default: 500]" in flat
    assert "[choices: fixed, permuted] [default: fixed]" in flat
    for name, _, _, _ in options.leaves(config.Experiment()):
        assert f"--{name}" in flat.replace(" .", "."), name  # a long name may be broken before a dot


def test_a_setting_is_explained_by_itself(capsys, tmp_path: Path) -> None:
    commands.main(["settings", "facts.people"])
    assert capsys.readouterr().out == "--facts.people 500\n    Number of people.\n"
    (tmp_path / "some.yaml").write_text("facts: {people: 77}")
    commands.main(["settings", "facts.people", "--config", str(tmp_path / "some.yaml")])
    assert capsys.readouterr().out.startswith("--facts.people 77\n")
    commands.main(["settings", "facts"])
    printed = capsys.readouterr().out
    assert "--facts.order fixed" in printed and "One of fixed, permuted." in printed
    commands.main(["settings", "strategies"])
    printed = capsys.readouterr().out
    assert all(f"--strategies.NAME.NUMBER.{item.name}" in printed for item in fields(recipes.Phase))
    commands.main(["settings", "tasks"])
    printed = capsys.readouterr().out
    assert all(f"--tasks.NAME.{item.name}" in printed for item in fields(TaskSettings))
    assert "there is no setting 'facts.peple'; did you mean 'facts.people'?" in fails(capsys, "settings", "facts.peple")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands_and_settings(capsys, shell: str) -> None:
    commands.main(["completion", shell])
    script = capsys.readouterr().out
    assert "crosstrace" in script and "pretrain-base" in script and "facts.people" in script
    if shell == "bash":
        assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


@pytest.mark.parametrize("stage", ["train", "eval", "trace", "analyze", "intervene", "report"])
def test_a_stage_goes_on_with_the_settings_of_its_run(capsys, tmp_path: Path, stage: str) -> None:
    commands.main([stage, "--help"])
    printed = capsys.readouterr().out
    assert "Finished work is not done again" in printed and "RUN/config.yaml" in printed
    told = fails(capsys, stage, str(tmp_path), "--facts.people", "10")
    assert "settings of an existing run cannot be changed" in told
    assert f"`crosstrace run {tmp_path}/config.yaml NEWRUN --facts.people 10`" in told
    assert f"Unknown option: --bogus. `crosstrace {stage} --help`" in fails(capsys, stage, str(tmp_path), "--bogus")
    assert f"{stage} needs RUN" in fails(capsys, stage)


def test_data_begins_a_run_from_a_config(capsys, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    assert "Unknown option: --bogus" in fails(capsys, "data", run, "--bogus")
    assert "--config needs a value" in fails(capsys, "data", run, "--config")
    assert "belongs in that file" in fails(capsys, "data", run, "--facts.people", "10")
    (tmp_path / "some.yaml").write_text("facts: {people: 20}")
    commands.main(["data", run, "--config", str(tmp_path / "some.yaml"), "--quiet"])
    assert config.load(tmp_path / "run" / "config.yaml").facts.people == 20
    assert "cannot be changed" in fails(capsys, "data", run, "--facts.people", "10")


@pytest.mark.parametrize(("command", "way"), [("demo", "go on with --resume"), ("train", "give the same command")])
def test_an_interrupted_command_says_how_to_go_on(capsys, monkeypatch, command: str, way: str) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(commands.COMMANDS, command, interrupted)
    with pytest.raises(SystemExit) as stop:
        commands.main([command])
    assert stop.value.code == 130
    assert way in capsys.readouterr().err


def test_what_one_process_does_is_refused_under_a_launcher(capsys, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(processes, "main", lambda work: work(SimpleNamespace(rank=0, size=2)))
    assert set(commands.TOGETHER) < set(commands.COMMANDS)
    for command in set(commands.COMMANDS) - set(commands.TOGETHER):
        assert "without one" in fails(capsys, command, "x")
    monkeypatch.delenv("RANK")  # of something that is no launcher of processes
    assert "no config.yaml" in fails(capsys, "train", "x")


def test_settings_print_a_config_that_runs(capsys, tmp_path: Path) -> None:
    commands.main(["settings"])
    assert config.loads(capsys.readouterr().out, "printed") == config.Experiment()


@pytest.mark.parametrize("arguments", [["demo", "x"], ["mechanism", "x"], ["report", "x"]])
def test_a_run_with_parts_left_out_says_so_at_its_end(
    capsys, monkeypatch, tmp_path: Path, arguments: list[str]
) -> None:
    row = {"stage": "mechanism", "part": "lens", "model": "mixed", "error": "KeyError", "reason": "KeyError: 'at'"}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.yaml").write_text("name: x\n")
    monkeypatch.setattr(pipeline, "run", lambda *_, **__: Results(left_out=[row]))
    with pytest.raises(SystemExit) as stop:
        commands.main(arguments)
    assert stop.value.code == 3
    assert "left out: mixed: mechanism, lens: KeyError: 'at'" in capsys.readouterr().out
    monkeypatch.setattr(pipeline, "run", lambda *_, **__: Results(left_out=[]))
    commands.main(arguments)
