"""Configuration: strict, complete, and the saved file is the runnable one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from crosstrace.core.errors import UserError
from crosstrace.experiment.config import Experiment, dumps, load, loads, override, parse, plain, quick_look
from crosstrace.training.recipes import Optimiser, Phase

FULL = """
name: all
model: {name: bundled, dtype: float64, attention: sdpa}
facts: {people: 40, qa_share: 0.25, order: permuted, frequency: zipf}
strategies:
  half: [{name: mixed, batch: {bio: 4, qa: 8}, epochs: 1.5, weights: {qa: 0.5}, replay: {bio: 2}}]
  other:
    - {name: bio, batch: {bio: 4}, steps: 3, optimiser: {betas: [0.8, 0.9], decay: constant}}
train: {seed: 3, optimiser: {learning_rate: 0.002}, keep_checkpoints: true}
trace: {measures: [square, net], examples: 12, checkpoints: true}
analysis: {fractions: [0.5, 1], how: mass}
interventions: {run: false}
"""


def test_round_trip():
    for experiment in (Experiment(), loads(FULL, "here")):
        assert loads(dumps(experiment), "saved") == experiment
        assert parse(plain(experiment), "saved") == experiment
    full = loads(FULL, "here")
    assert full.strategies["half"][0] == Phase("mixed", {"bio": 4, "qa": 8}, None, 1.5, {"qa": 0.5}, {"bio": 2})
    assert full.strategies["other"][0].optimiser == Optimiser(betas=(0.8, 0.9), decay="constant")
    assert (full.trace.examples, full.facts.people, full.analysis.fractions) == (12, 40, [0.5, 1.0])


def test_the_saved_file_names_every_setting():
    saved = yaml.safe_load(dumps(Experiment()))
    assert saved["facts"]["people"] == Experiment().facts.people
    given = {name for name in Experiment.__dataclass_fields__ if getattr(Experiment(), name) is not None}
    assert set(saved) == given
    assert saved["train"]["optimiser"]["learning_rate"] == Optimiser().learning_rate


def test_nothing_said_is_the_default():
    assert loads("", "here") == loads("{}", "here") == Experiment()


# lists of lists, each many times in the next: 9^10 words when they are written out
ENDLESS = "facts:\n  people:\n" + "\n".join(
    f"    - &a{n} [{', '.join([f'*a{n - 1}' if n else 'x'] * 9)}]" for n in range(10)
)


@pytest.mark.parametrize(
    "text, message",
    [
        ("peeple: 5", r"here: unknown setting 'peeple'; settings there are name, model, facts"),
        ("facts: {poeple: 50}", r"here: unknown setting 'facts\.poeple'; did you mean 'people'\?"),
        (
            "train: {optimiser: {learning_rat: 1}}",
            r"unknown setting 'train\.optimiser\.learning_rat'; did you mean 'lea",
        ),
        (
            "strategies: {x: [{name: a, batch: {bio: 1}, stepps: 3}]}",
            r"'strategies\.x\.0\.stepps'; did you mean 'steps'",
        ),
        (
            "strategies: {x: [{name: a, batch: {bio: 1}, steps: 3, optimiser: {warm: 1}}]}",
            r"'strategies\.x\.0\.optimiser\.warm'; did you mean 'warmup'",
        ),
        ("analysis: {fractions: [0.1, 0]}", r"here: setting analysis\.fractions\.1 is 0, but input should be greater"),
        ("analysis: {fractions: [1.5]}", r"setting analysis\.fractions\.0 is 1\.5, but input should be less"),
        ("analysis: {central_fractions: []}", r"setting analysis\.central_fractions is \[\], but "),
        ("interventions: {fractions: [.nan]}", r"setting interventions\.fractions\.0 is nan"),
        ("facts: {people: many}", r"setting facts\.people is 'many', but input should be a valid integer"),
        ("facts: 5", r"setting facts is 5"),
        ("strategies: {}", "there is nothing to analyse"),
        ("strategies: {x: []}", r"setting strategies\.x is \[\]"),
        ("trace: {measures: [absolute]}", r"setting trace\.measures\.0 is 'absolute', but input should be 'abs'"),
        ("facts: {qa_share: 0}", r"here: facts\.qa_share = 0 of \d+ people leaves nobody whose questions are trained"),
        ("facts: {qa_share: 1}", r"here: facts\.qa_share = 1 of \d+ people leaves nobody to test recall on"),
        ("facts: {qa_share: 0.01, people: 40}", r"facts\.qa_share = 0\.01 of 40 people leaves nobody whose questions"),
        ("trace: {checkpoints: true}", r"here: trace\.checkpoints needs train\.keep_checkpoints"),
        ("strategies: {a/b: [{name: a, batch: {bio: 1}, steps: 1}]}", r"strategy 'a/b' cannot name a folder"),
        ("strategies: {base: [{name: a, batch: {bio: 1}, steps: 1}]}", r"strategy 'base' cannot name a folder"),
        ("facts: {people: 5", r"here is not valid YAML: .*line 1"),
        ("a: b: c", r"here is not valid YAML"),
        ("name: 2020-99-99", r"here is not valid YAML: month must be in"),
        ("name: " + "[" * 5000, r"here is not valid YAML"),
        ("? [name]\n: 1", r"here is not valid YAML: a name is a list"),
        ("facts: {people: " + "9" * 5000 + "}", r"here is not valid YAML"),
        (ENDLESS, r"setting facts\.people is \[.*, but input should be a valid integer"),
        ("facts: {biographies: 1000000000}", r"setting facts\.biographies is 1000000000, but input should be less"),
        ("strategies: {x: [{name: a, batch: {bio: 1000000000000}, steps: 1}]}", r"batch\.bio is 10+, but "),
        ("- 1", r"here holds a list; expected settings"),
        ("facts", r"here holds a str; expected settings"),
        ("1: 2", r"here: .*1"),
    ],
)
def test_bad_settings_are_one_sentence(text: str, message: str):
    with pytest.raises(UserError, match=message) as found:
        loads(text, "here")
    assert "\n" not in str(found.value)


def test_files_that_cannot_be_read(tmp_path: Path):
    (tmp_path / "good.yaml").write_text(FULL)
    assert load(tmp_path / "good.yaml") == loads(FULL, "here")
    with pytest.raises(UserError, match=r"config file .*none\.yaml does not exist"):
        load(tmp_path / "none.yaml")
    with pytest.raises(UserError, match=r"cannot be read"):
        load(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(UserError, match=r"bytes\.yaml cannot be read.*expected YAML text in UTF-8"):
        load(tmp_path / "bytes.yaml")
    for text in ("", "\n# a comment alone\n", "{}"):
        (tmp_path / "empty.yaml").write_text(text)
        with pytest.raises(UserError, match=r"config file .*empty\.yaml holds no settings; .*cut short"):
            load(tmp_path / "empty.yaml")
    (tmp_path / "bad.yaml").write_text("facts: {poeple: 5}")
    with pytest.raises(UserError, match=r"bad\.yaml: unknown setting 'facts\.poeple'"):
        load(tmp_path / "bad.yaml")


def test_overrides():
    changed = override(
        loads(FULL, "here"),
        {
            "facts.people": "200",
            "strategies.half.0.batch": "{bio: 1, qa: 2}",
            "strategies.other.0.optimiser.learning_rate": "1e-4",
            "strategies.half.0.optimiser.warmup": "7",
            "trace.examples": "null",
            "analysis.fractions.1": "0.25",
            "name": "again",
        },
    )
    assert changed.facts.people == 200 and changed.facts.qa_share == 0.25
    assert changed.strategies["half"][0].batch == {"bio": 1, "qa": 2}
    assert changed.strategies["other"][0].optimiser == Optimiser(1e-4, (0.8, 0.9), decay="constant")
    assert changed.strategies["half"][0].optimiser == Optimiser(warmup=7)
    assert (changed.trace.examples, changed.analysis.fractions, changed.name) == (None, [0.5, 0.25], "again")
    assert override(Experiment(), {}) == Experiment()


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("facts.poeple", "5", r"the command line: unknown setting 'facts\.poeple'; did you mean 'people'"),
        ("fact.people", "5", r"the command line: unknown setting 'fact'; did you mean 'facts'"),
        ("facts.people.x", "5", r"--facts\.people\.x: facts\.people is a single value, so it has no setting 'x'"),
        ("facts.people.x.y", "5", r"--facts\.people\.x\.y: there is no setting 'x' inside a single value"),
        ("strategies.two_stage.7.steps", "5", r"'7' is no item of a list of \d; items are numbered from 0"),
        ("strategies.two_stage.first.steps", "5", r"'first' is no item of a list of 2"),
        ("strategies.two_stage.\u00b2.steps", "5", r"'\u00b2' is no item of a list of 2"),
        ("analysis.fractions.99", "0.5", r"'99' is no item of a list"),
        ("name", "2020-99-99", r"--name 2020-99-99: the value is not valid YAML"),
        ("facts.people", "[5", r"--facts\.people \[5: the value is not valid YAML"),
        ("facts.people", "3", r"the command line: setting facts\.people is 3, but input should be greater"),
        ("facts.qa_share", "1", r"the command line: facts\.qa_share = 1"),
    ],
)
def test_bad_overrides(name: str, value: str, message: str):
    with pytest.raises(UserError, match=message):
        override(Experiment(), {name: value})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("facts: {people: 40}\nfacts: {seed: 3}", "'facts' is given twice"),
        ("trace: {measures: []}", "trace.measures"),
        ("train: {seed: -1}", "train.seed"),
        ("train: {optimiser: {learning_rate: .inf}}", "learning_rate"),
        ("train: {optimiser: {betas: [2, 0.9]}}", "betas"),
        ("strategies: {a: [{name: a, batch: {bio: 8}, steps: 1000000000}]}", "steps"),
        ("strategies: {a: [{name: a, batch: {bio: 8}, epochs: .nan}]}", "epochs"),
        ("facts: {frequency: zipf, zipf_exponent: 1.0e+308}", "zipf_exponent"),
        ("facts: {people: 12}\ntrace: {parts: 50}", "trace.parts = 50, but only 6 people"),
        (
            "model: {sharded: true}\ntrain: {lora: {rank: 2}}",
            "train.lora needs the whole model",
        ),
        ("model: {sharded: true, random_init: 1}", "model.random_init needs"),
        ("name: ../../elsewhere", "cannot name a folder"),
        ('name: "a\\0b"', "cannot name a folder"),
    ],
)
def test_what_would_fail_late_or_silently_is_one_sentence(text: str, message: str):
    with pytest.raises(UserError, match=re.escape(message)):
        loads(text, "here.yaml")


def test_the_quick_look_is_the_default_experiment_in_small():
    quick, default = quick_look(), Experiment()
    assert quick.strategies.keys() == default.strategies.keys() and quick.tasks == default.tasks
    assert quick.model == default.model and quick.train.optimiser == default.train.optimiser
    assert quick.facts.people < default.facts.people and not quick.mechanism.run
