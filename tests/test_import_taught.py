"""Imports of rows of text, and experiments that teach what was imported."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from imported_files import CITIES, imported, refused, source_settings, table, worded

from crosstrace.cli import commands
from crosstrace.core.errors import UserError
from crosstrace.core.files import read_json, write_json
from crosstrace.data.text import NO_QUESTIONS, read_jsonl, texts
from crosstrace.data.tokens import encode
from crosstrace.experiment import checks, compare, config, pipeline
from crosstrace.importing.importing import DocumentFiles
from crosstrace.models import untaught
from crosstrace.planning import plan
from crosstrace.results.results import Results
from crosstrace.training.pretraining import word_tokenizer


def test_rows_of_two_tasks(tmp_path: Path) -> None:
    store, recall = tmp_path / "store.txt", tmp_path / "recall.jsonl"
    store.write_text("The key is under the mat.\n\nThe lamp is on the table.\nThe lamp is on the table.\n")
    rows = [
        {"prompt": f"Where is the {x}? ", "completion": y, "split": z}
        for x, y, z in (("key", "mat", "id"), ("lamp", "table", "ood"))
    ]
    recall.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = imported(tmp_path, rows={"store": store, "recall": recall})
    assert found.counts()["kept"] == 4 and found.counts()["dropped"] == {"duplicate": 1}
    taught = texts(source_settings(tmp_path))
    assert [item.split for item in taught["qa"]] == ["id", "ood"]
    for item in taught["qa"]:
        assert item.text[slice(*item.targets[0])] in ("mat", "table")
    assert taught["bio"][0].targets == ((0, len("The key is under the mat.")),)
    assert taught["bio"][0].text[slice(*taught["bio"][0].mentions[0].object)].strip() == "key is under the mat."


def test_a_pair_of_text_files_a_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = {
        "store.txt": "The key is\nThe lamp is\nThe cup is\n", "ends.txt": "here\nthere\n0\n",
        "ask.txt": "Where is the key?\nWhere is the lamp?\nWhere is the cup?\n", "answers.txt": "here\nthere\n0\n",
    }  # fmt: skip
    for name, text in lines.items():
        (tmp_path / name).write_text(text)
    given = ["--store", "store.txt", "--store-completions", "ends.txt", "--recall", "ask.txt"]
    given = [str(tmp_path / word) if word.endswith(".txt") else word for word in given]
    commands.main(["import", str(tmp_path / "own"), *given, "--recall-completions", str(tmp_path / "answers.txt")])
    assert "a blank was put between prompt and completion of 3 rows" in capsys.readouterr().out
    found = texts(source_settings(tmp_path))
    assert found["bio"][0].text == "The key is here" and found["qa"][2].text == "Where is the cup? 0"
    assert [item.text[slice(*item.targets[0])] for item in found["qa"]] == ["here", "there", "0"]
    about = read_json(tmp_path / "own" / "import.json")
    assert about["read"] == 6 and len(about["files"]) == 4
    (tmp_path / "answers.txt").write_text("here\nthere\n")
    again = [tmp_path / "new", *given, "--recall-completions", tmp_path / "answers.txt"]
    assert "ask.txt has more lines than" in refused(capsys, tmp_path, *again)


def test_rows_count_numbers_scripts_blanks_and_answers_given_away(tmp_path: Path) -> None:
    (tmp_path / "store.txt").write_text("Der Schlüssel liegt da.\n")
    rows = [
        ("Where is it?", "in Rome", "id", "a"), ("Is it here, yes or no? ", "no", "ood", "b"),
        ("東京は", "日本", "id", "c"), ("How many? ", 0, "ood", "d"), ("What? ", [["x"]], "id", "e"),
        ("Who? ", math.nan, "id", "f"),
    ]  # fmt: skip
    keys = ("prompt", "completion", "split", "subjct")
    (tmp_path / "recall.jsonl").write_text("".join(json.dumps(dict(zip(keys, row))) + "\n" for row in rows))
    rows = {"store": tmp_path / "store.txt", "recall": tmp_path / "recall.jsonl"}
    found = imported(tmp_path, rows=rows)
    assert found.counts()["dropped"] == {"not a text": 1, "empty": 1}
    asked = texts(source_settings(tmp_path))["qa"]
    assert [item.text for item in asked] == [
        "Where is it? in Rome",
        "Is it here, yes or no? no",
        "東京は日本",
        "How many? 0",
    ]
    notes = "\n".join(found.notes)
    assert "between prompt and completion of 1 rows" in notes and "subjct (is subject meant?)" in notes
    assert "1 prompts hold their completion, e.g. row 2" in notes and "letters beyond ASCII: 2 of 5 texts" in notes


def test_rows_without_a_split_are_divided_by_what_they_are_about(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n} {s}? ", "completion": f"a{n}{s}", "subject": s} for s in "abcdef" for n in range(3)]
    for name in ("store", "recall"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    imported(tmp_path, rows={name: tmp_path / f"{name}.jsonl" for name in ("store", "recall")})
    qa = texts(source_settings(tmp_path))["qa"]
    assert sum(item.split == "id" for item in qa) == 9
    assert all(len({item.split for item in qa if item.person == s}) == 1 for s in "abcdef")


def test_another_model_gets_the_settings_of_a_pretrained_one(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = table(tmp_path / "facts.csv", CITIES)
    commands.main(["import", str(path), str(tmp_path / "own"), "--model", "some/model"])
    assert "larger ones need a lower one" in capsys.readouterr().out
    own = config.load(tmp_path / "own" / "experiment.yaml")
    ready = config.load(Path(__file__).parents[1] / "examples" / "smollm2-own.yaml")
    assert own.model.name == "some/model" and own.train == ready.train and own.trace == ready.trace
    assert own.eval.precision == ready.eval.precision == "bf16"
    for mine, theirs in ((own, ready),):
        assert mine.interventions == theirs.interventions and mine.mechanism.together == theirs.mechanism.together
        assert mine.strategies["mixed"][0].weights == theirs.strategies["mixed"][0].weights == {"qa": 0.1}
    assert [phase.composition() for phase in own.strategies["two_stage"]] == [{"bio": 4}, {"qa": 32}]
    imported(tmp_path, path, overwrite=True, model="bundled")
    assert config.load(tmp_path / "own" / "experiment.yaml").train == config.Experiment().train


def test_a_new_model_has_a_token_for_every_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("Ægir", "land", "Ísland"), ("عمر", "land", "مصر"), ("美玲", "land", "中国"), ("Zoë", "land", "Česko")]
    imported(tmp_path, table(tmp_path / "facts.csv", rows))
    commands.main(["new-model", str(tmp_path / "model"), "--own", str(tmp_path / "own"), "--width", "16",
                   "--heads", "2", "--layers", "1", "--neurons", "32"])  # fmt: skip
    assert "LlamaForCausalLM" in capsys.readouterr().out
    from crosstrace.models import loading

    tokenizer, model = loading.load_tokenizer(str(tmp_path / "model")), loading.load_model(str(tmp_path / "model"))
    assert model.config.vocab_size == len(tokenizer) and model.config.eos_token_id == tokenizer.eos_token_id
    items = encode(tokenizer, texts(source_settings(tmp_path))["qa"])
    for item, (_, _, object) in zip(items, rows):
        assert object in tokenizer.decode(item.ids[item.targets["object"]])


@pytest.mark.parametrize("kind", ["gpt_neox", "gpt2", "qwen3", "llama"])
def test_new_models_of_other_architectures_are_seeded(tmp_path: Path, kind: str) -> None:
    options = untaught.NewModelSettings(architecture=kind, width=32, heads=4, kv_heads=2, layers=1, neurons=32)
    a, b = (untaught.new_model(tmp_path / name, ["some words"], options) for name in "ab")
    c = untaught.new_model(tmp_path / "c", ["some words"], replace(options, seed=2))
    name, weight = next(iter(a.named_parameters()))
    assert weight.equal(b.get_parameter(name)) and not weight.equal(c.get_parameter(name))


def test_unfit_models_are_told(tmp_path: Path) -> None:
    for options in ({"architecture": "none"}, {"heads": 3, "width": 16}, {"heads": 4, "kv_heads": 3}):
        with pytest.raises(UserError):
            untaught.new_model(tmp_path / "m", ["some words"], untaught.NewModelSettings(**options))
    assert not (tmp_path / "m").exists()


def test_a_tokenizer_without_the_words_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    imported(tmp_path, table(tmp_path / "facts.csv", [(s, r, f"Qq{o}") for s, r, o in CITIES]))
    with pytest.raises(SystemExit) as ended:
        commands.main(["run", str(tmp_path / "own" / "experiment.yaml"), str(tmp_path / "run"), "--trace.parts", "2",
                  "--strategies", "{only: [{name: a, batch: {bio: 1, qa: 1}, steps: 1}]}"])  # fmt: skip
    told = capsys.readouterr().err
    assert ended.value.code == 2 and "has no token for 4 of the objects" in told and "new-model" in told
    assert not (tmp_path / "run").exists() and word_tokenizer().unk_token_id is not None


TINY = {
    "trace.parts": "2", "trace.every": "1", "trace.check": "false", "train.recall_every": "0", "jobs": "1",
    "analysis.draws": "2", "interventions.run": "false", "mechanism.run": "false",
    "strategies": "{both: [{name: both, batch: {bio: 4, qa: 4}, steps: 2}]}",
}  # fmt: skip


def taught(tmp_path: Path, **settings: str) -> dict[str, Any]:
    """The results of a short run on what was imported, by a tiny model that knows nothing."""
    experiment = config.load(tmp_path / "own" / "experiment.yaml")
    if not (tmp_path / "model").exists():
        lines = [item.text for items in texts(experiment.facts).values() for item in items]
        options = untaught.NewModelSettings(width=16, heads=2, layers=1, neurons=32, vocabulary=300)
        untaught.new_model(tmp_path / "model", lines, options)
    changes = TINY | {"model.name": str(tmp_path / "model")} | settings
    return pipeline.run(config.override(experiment, changes), tmp_path / "run", quiet=True).as_values()


def test_documents_with_questions_from_file_to_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Windows, texts that answer nothing, the mechanism and the aligned share; and a comparison on the same import."""
    rows = []
    for n in range(12):
        born = f"Person {n} was born in the town of Town{n} in the year {1900 + n}."
        asked = [{"question": f"Where was Person {n} born?", "answer": f"Town{n}"},
                 {"question": f"When was Person {n} born?", "answer": str(1900 + n) if n else "unknown"}]  # fmt: skip
        rows.append({"title": f"Person {n}", "text": born + f" Nothing else is known of {n}." * 25, "questions": asked})
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = untaught.NewModelSettings(width=16, heads=2, layers=1, neurons=32, vocabulary=300)
    untaught.new_model(tmp_path / "model", [row["text"] for row in rows], options)
    given = ["--documents", tmp_path / "documents.jsonl", "--model", tmp_path / "model", "--window", "100"]
    commands.main(["import", str(tmp_path / "own"), *map(str, given)])
    printed = capsys.readouterr().out
    parts = "[gradients, representations, signature, positions]"
    (tmp_path / "later.txt").write_text("".join(f"The lamp of house {n} is lit.\n" for n in range(20)))
    found = taught(
        tmp_path, **{"mechanism.run": "true", "mechanism.parts": parts, "mechanism.facts": "4"},
        **{"retention.run": "true", "retention.text": str(tmp_path / "later.txt"), "retention.steps": "2"},
        strategies="{both: [{name: both, batch: {documents: 2, qa: 4, unasked: 1}, steps: 2}]}",
    )  # fmt: skip
    assert found["import"]["answers"] == {"exact": 23, "unaligned": 1} and not found["left_out"]
    assert found["run"]["facts"] == {}, "none was drawn"
    assert all(found["mechanism"][part]["both"] for part in ("gradients", "representations", "signature", "positions"))
    assert found["retention"]["both"]
    page = (tmp_path / "run" / "report" / "index.html").read_text()
    for text in ("answers in their document, word for word", "23 (95.8%)"):
        assert text in printed and text in page
    assert "1 of 24 answers do not stand in their document (4%)" in page and "Facts</" not in page
    compared = [compare.comparison("model", ["other"], str(tmp_path / name)) for name in ("own", "run")]
    for made, folder in zip(compared, (tmp_path / "own", tmp_path / "run" / "data")):
        assert made.roles.outcome == "qa_ood"
        assert {name: Path(task.source) for name, task in made.tasks.items()} == {
            name: folder / f"{name}.jsonl" for name in ("documents", "qa", "unasked")
        }


@pytest.mark.parametrize("pretrained", [False, True])
@pytest.mark.parametrize("unanswered", [(), (3,), (0, 4), (1, 5, 9), (0, 4, 8, 12, 16), (2, 4, 6, 8, 10, 12, 14)])
def test_imported_documents_can_be_traced_as_their_experiment_says(
    tmp_path: Path, unanswered: tuple[int, ...], pretrained: bool
) -> None:
    """However few documents have no answer, every part of the trace has some of them."""
    rows = []
    for n in range(17):
        asked = [{"question": f"Where does Person {n} live?", "answer": "?" if n in unanswered else f"Town{n}"}]
        rows.append({"text": f"It is known that Person {n} lives in Town{n} by the sea.", "questions": asked})
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = untaught.NewModelSettings(width=16, heads=2, layers=1, neurons=32, vocabulary=300)
    untaught.new_model(tmp_path / "model", [row["text"] for row in rows], options)
    files = DocumentFiles(documents=tmp_path / "documents.jsonl")
    imported(tmp_path, documents=files, model=str(tmp_path / "model") if pretrained else None)
    experiment = config.load(tmp_path / "own" / "experiment.yaml")
    checks.check(config.override(experiment, {"model.name": str(tmp_path / "model")}), whole=True)
    assert experiment.trace.parts == (2 if pretrained or len(unanswered) in (1, 2) else min(4, len(unanswered) or 4))
    if unanswered:
        halves = [item.text for item in read_jsonl(tmp_path / "own" / "unasked.jsonl")]
        assert " ".join(halves) == " ".join(rows[n]["text"] for n in unanswered)
        assert len(halves) == max(2, len(unanswered))


def numbered_rows(tmp_path: Path, store: int, recall: int, splits: tuple[str, ...]) -> dict[str, Path]:
    """So many lines that store and rows that recall, the latter's splits by turns; none names a subject."""
    (tmp_path / "store.txt").write_text("".join(f"The key {n} is under mat {n}.\n" for n in range(store)))
    rows = [(f"Where is key {n}? ", f"mat {n}", splits[n % len(splits)]) for n in range(recall)]
    table(tmp_path / "recall.csv", rows, ("prompt", "completion", "split"))
    return {"store": tmp_path / "store.txt", "recall": tmp_path / "recall.csv"}


def test_rows_without_subjects_spread_over_the_traces_parts(tmp_path: Path) -> None:
    imported(tmp_path, rows=numbered_rows(tmp_path, 8, 16, ("ood", "id")))
    about = read_json(tmp_path / "own" / "import.json")
    for file in about["files"].values():
        file["sha256"] = None  # as of a data set on the hub
    write_json(tmp_path / "own" / "import.json", about)
    found = taught(tmp_path)
    assert [file["sha256"] for file in found["import"]["files"].values()] == [None, None]
    assert {row["when"] for row in found["shared"]["both"]} == {"online", "final"}
    assert all(row["parts"] == 2 for row in found["shared"]["both"])


@pytest.mark.parametrize(
    ("counts", "settings", "told"),
    [
        (
            (1, 16),
            {},
            "the 1 examples of bio to trace are about 1 people or subjects, which leaves 1 of the parts empty",
        ),
        ((8, 2), {}, "the 1 examples of qa"),
        ((8, 16), {"trace.parts": "9"}, "trace.parts = 9, but the 8 examples of bio"),
        ((8, 16), {"trace.parts": "3", "trace.examples": "2"}, "the 2 examples of bio"),
    ],
)
def test_too_few_for_the_traces_parts_is_told_before_anything_is_written(
    tmp_path: Path, counts: tuple[int, int], settings: dict, told: str
) -> None:
    imported(tmp_path, rows=numbered_rows(tmp_path, *counts, ("ood", "id")))
    with pytest.raises(UserError, match=told):
        taught(tmp_path, **settings)
    assert not (tmp_path / "run").exists()


NOT_ASKED = "{statements: ['{subject} lives in {object}.'], questions: []}"


@pytest.mark.parametrize("kind", ["rows", "facts"])
def test_texts_without_questions_are_taught_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    if kind == "rows":
        rows = numbered_rows(tmp_path, 8, 0, ("id",))
        commands.main(["import", str(tmp_path / "own"), "--store", str(rows["store"])])
    else:
        wording = worded(tmp_path, f"city: {NOT_ASKED}")
        commands.main(
            ["import", str(table(tmp_path / "f.csv", CITIES)), str(tmp_path / "own"), "--wording", str(wording)]
        )
    assert NO_QUESTIONS in capsys.readouterr().out
    assert NO_QUESTIONS in read_json(tmp_path / "own" / "import.json")["notes"]
    found = taught(tmp_path, strategies="{store: [{name: store, batch: {bio: 4}, steps: 2}]}", **CHECKED)
    shown = Results.read(tmp_path / "run")
    assert found["lacking"] == NO_QUESTIONS and found["claims"] == [] and found["shared"] == {"store": []}
    assert found["recall"]["store"]["bio"]["n"] == found["import"]["kept"] and "qa_ood" not in found["recall"]["store"]
    assert NO_QUESTIONS in str(shown) and NO_QUESTIONS in shown._repr_html_()
    page = (tmp_path / "run" / "report" / "index.html").read_text()
    assert "No claims were tested: there are no questions" in page and "What was imported" in page
    assert "adds this" not in page, "no command could"
    for stage in ("intervene", "mechanism", "retain"):
        with pytest.raises(SystemExit) as ended:
            commands.main([stage, str(tmp_path / "run"), "--quiet"])
        assert ended.value.code == 2 and "nothing to ask" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        commands.main(["export", str(tmp_path / "run"), str(tmp_path / "tasks")])
    assert ended.value.code == 2 and "no questions to export" in capsys.readouterr().err


CHECKED = {"trace.check": "true"}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "trains task 'qa', which has no training example"),
        ({"interventions.run": "true"}, "interventions.run is true, but there are no questions"),
        ({"mechanism.run": "true"}, "mechanism.run is true"), ({"retention.run": "true"}, "retention.run is true"),
    ],
)  # fmt: skip
def test_what_needs_questions_is_refused_without(tmp_path: Path, settings: dict, told: str) -> None:
    imported(tmp_path, rows={"store": numbered_rows(tmp_path, 8, 0, ("id",))["store"]})
    with pytest.raises(UserError, match=told):
        taught(tmp_path, **settings)
    assert not (tmp_path / "run").exists()


def test_a_plan_needs_no_questions(tmp_path: Path) -> None:
    imported(tmp_path, rows={"store": numbered_rows(tmp_path, 8, 0, ("id",))["store"]})
    lines = [item.text for item in texts(source_settings(tmp_path))["bio"]]
    untaught.new_model(tmp_path / "model", lines, untaught.NewModelSettings(width=16, heads=2, layers=2, neurons=32))
    experiment = config.load(tmp_path / "own" / "experiment.yaml")
    experiment = config.override(experiment, {"model.name": str(tmp_path / "model"), "trace.parts": "2"})
    assert plan.plan(experiment).fits
    with pytest.raises(UserError, match=r"mechanism.run is true"):
        plan.plan(config.override(experiment, {"mechanism.run": "true"}))


def test_the_imports_own_experiment_needs_no_questions(tmp_path: Path) -> None:
    store = {"store": numbered_rows(tmp_path, 8, 0, ("id",))["store"]}
    for model in (None, "some/model"):
        imported(tmp_path, rows=store, model=model, overwrite=True)
        own = config.load(tmp_path / "own" / "experiment.yaml")
        assert [[phase.batch.keys() for phase in phases] for phases in own.strategies.values()] == [[{"bio"}]]
        assert not (own.interventions.run or own.mechanism.run or own.retention.run)


def test_a_relation_may_be_stored_only(tmp_path: Path) -> None:
    rows = [*CITIES, *((s, "pet", f"cat {i}") for i, (s, *_) in enumerate(CITIES))]
    found = imported(tmp_path, table(tmp_path / "f.csv", rows), wording=worded(tmp_path, f"city: {NOT_ASKED}"))
    assert "nothing is asked about city: these facts are stored only" in found.notes
    both = texts(source_settings(tmp_path))
    assert {q.mentions[0].relation for q in both["qa"]} == {"pet"} and len(both["bio"][0].mentions) == 2


def test_texts_too_long_for_the_model_are_dropped_at_import_and_named_by_a_run(tmp_path: Path) -> None:
    rows = [*CITIES, ("Ed Fox", "city", " ".join(["Rome"] * 40))]
    path = table(tmp_path / "facts.csv", rows)
    imported(tmp_path, path)
    lines = [item.text for items in texts(source_settings(tmp_path)).values() for item in items]
    options = untaught.NewModelSettings(width=16, heads=2, layers=1, neurons=32, vocabulary=300, positions=48)
    untaught.new_model(tmp_path / "model", lines, options)
    with pytest.raises(
        UserError, match=r"2 of 10 examples have more tokens than the 48 positions .* S000004.* drop them"
    ):
        taught(tmp_path)
    assert not (tmp_path / "run").exists()
    found = imported(tmp_path, path, overwrite=True, model=str(tmp_path / "model"))
    assert found.counts()["dropped"] == {"too long for the model": 1} and found.dropped[0][1] == 6
    assert len(texts(source_settings(tmp_path))["bio"]) == 4 == found.kept
    (tmp_path / "store.txt").write_text("The key is here.\n" + "and so on " * 40 + "\nThe lamp is there.\n")
    store = {"store": tmp_path / "store.txt"}
    found = imported(tmp_path, rows=store, overwrite=True, model=str(tmp_path / "model"))
    assert (
        found.counts()["dropped"] == {"too long for the model": 1} and len(texts(source_settings(tmp_path))["bio"]) == 2
    )
    (tmp_path / "store.txt").write_text("and so on " * 40)
    with pytest.raises(UserError, match="every text is too long"):
        imported(tmp_path, rows=store, overwrite=True, model=str(tmp_path / "model"))


@pytest.mark.long
@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox"])
def test_a_model_that_calls_its_context_otherwise_drops_what_its_run_would_refuse(tmp_path: Path, kind: str) -> None:
    rows = [*CITIES, ("Ed Fox", "city", " ".join(["Rome"] * 40))]
    path = table(tmp_path / "facts.csv", rows)
    imported(tmp_path, path)
    lines = [item.text for items in texts(source_settings(tmp_path)).values() for item in items]
    options = untaught.NewModelSettings(
        architecture=kind, width=16, heads=2, layers=1, neurons=32, vocabulary=300, positions=48
    )
    untaught.new_model(tmp_path / "model", lines, options)
    assert ("n_positions" in read_json(tmp_path / "model" / "config.json")) == (kind == "gpt2")
    with pytest.raises(UserError, match="more tokens than the 48 positions"):
        taught(tmp_path)
    found = imported(tmp_path, path, overwrite=True, model=str(tmp_path / "model"))
    assert found.counts()["dropped"] == {"too long for the model": 1} and found.dropped[0][1] == 6
    taught(tmp_path)
