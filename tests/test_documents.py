"""Documents with questions about them: every form in which they come, what is kept, and what is refused."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import shutil
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from imported_files import imported, refused, source_settings
from test_alignment import spells
from tiny_facts import tokenizer
from tiny_models import tiny_base

from crosstrace.cli import commands
from crosstrace.core.errors import UserError
from crosstrace.core.files import read_json
from crosstrace.data.text import Example, Mention, read_jsonl, texts
from crosstrace.experiment import config
from crosstrace.importing.documents import cut_to_windows
from crosstrace.importing.imported import Imported
from crosstrace.importing.importing import DocumentFiles
from crosstrace.importing.tables import read_table

DOCUMENTS = [
    {"wiki_id": "Q1", "title": "Ada Brook", "text": "Ada Brook was born in Lyon on 3 May 1901. She sold 1,234 clocks."},
    {"wiki_id": "Q2", "title": "Bo Dale", "text": "In Oslo lived Bo Dale.\nHe met Ada Brook in Lyon, and left Lyon."},
    {"wiki_id": "Q3", "title": "Cy Holt", "text": "Cy Holt built a bridge in Bonn, when he was in Bonn."},
    {"wiki_id": "Q4", "title": "Di Ames", "text": "Nothing is known of Di Ames, who wrote no letter."},
]
QUESTIONS = [
    {"wiki_id": "Q1", "question": "Where was Ada Brook born?", "answer": "Lyon"},
    {"wiki_id": "Q1", "question": "When was Ada Brook born?", "answer": "1901-05-03"},
    {"wiki_id": "Q1", "question": "How many clocks did she sell?", "answer": "1234"},
    {"wiki_id": "Q2", "question": "Where did Bo Dale live?", "answer": ["Christiania", "OSLO"]},
    {"wiki_id": "Q2", "question": "Where did Bo Dale meet her?", "answer": "Lyon"},
    {"wiki_id": "Q3", "question": "Did Cy Holt build a bridge?", "answer": "yes"},
]


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def two_files(tmp_path: Path, documents: list[Any] = DOCUMENTS, questions: list[Any] = QUESTIONS) -> DocumentFiles:
    return DocumentFiles(jsonl(tmp_path / "doc.jsonl", documents), jsonl(tmp_path / "qa.jsonl", questions))


def tasks(tmp_path: Path) -> dict[str, list[Example]]:
    return {path.stem: read_jsonl(path) for path in (tmp_path / "own").glob("*.jsonl")}


def objects(examples: list[Example]) -> dict[str, str]:
    """Fact -> its object's words."""
    return {m.fact: item.text[slice(*m.object)] for item in examples for m in item.mentions}


def assert_counts_add_up(tmp_path: Path) -> dict[str, Any]:
    counts = read_json(tmp_path / "own" / "import.json")
    assert (
        counts["read"]
        == counts["kept"] + sum(counts["dropped"].values())
        == sum(file["rows"] for file in counts["files"].values())
    )
    lines = (tmp_path / "own" / "dropped.csv").read_text(encoding="utf-8").splitlines()
    assert len(lines) >= 1 + sum(counts["dropped"].values())
    made = tasks(tmp_path)
    asked = [item for name, items in made.items() if name not in ("documents", "unasked") for item in items]
    unasked = {".".join(item.id.split(".")[:2]) for item in made.get("unasked", [])}  # (one alone is cut in two)
    assert counts["kept"] == len(asked) + len(made["documents"]) + len(unasked)
    assert sum(counts["answers"].values()) == len(asked)
    stored, recalled = objects(made["documents"]), objects(asked)
    assert stored.keys() <= recalled.keys() and len(recalled) == len(asked)
    answers = {item.mentions[0].fact: (recalled[item.mentions[0].fact], *item.aliases) for item in asked}
    assert all(any(spells(words, answer) for answer in answers[fact]) for fact, words in stored.items())
    assert len(stored) == sum(n for way, n in counts["answers"].items() if way not in ("unaligned", "cut", "several"))
    splits = {item.person: item.split for item in asked}
    assert all(splits[item.person] == item.split for item in asked), "a document's questions have one split"
    return counts


def test_two_files_with_a_key(tmp_path):
    found = imported(tmp_path, documents=two_files(tmp_path))
    counts = assert_counts_add_up(tmp_path)
    assert counts["answers"] == {"exact": 2, "form": 2, "case": 1, "unaligned": 1}
    assert any("wiki_id says which document" in note for note in found.notes)
    assert any("1 of 6 answers do not stand in their document (17%)" in note for note in found.notes)
    made = tasks(tmp_path)
    assert made.keys() == {"documents", "qa", "unasked"}
    assert [item.text for item in made["unasked"]] == [DOCUMENTS[2]["text"], DOCUMENTS[3]["text"]]
    first, second = made["documents"]
    assert [first.text[slice(*m.object)] for m in first.mentions] == ["Lyon", "3 May 1901", "1,234"]
    assert [first.text[slice(*m.subject)] for m in first.mentions] == ["Ada Brook"] * 3
    assert [m.relation for m in first.mentions] == ["where", "when", "how_many"]
    assert [[first.text[slice(*span)] for span in m.relation_words] for m in first.mentions] == [["born"], ["born"], []]
    words = [second.text[slice(*m.object)] for m in second.mentions]
    assert words == ["Oslo", "Lyon"] and second.mentions[1].object[0] == second.text.index("Lyon"), "near Bo Dale"
    assert second.mentions[0].subject == (0, 0), "no name stands before the object"
    asked = made["qa"][3]
    assert (asked.text, asked.aliases) == ("Where did Bo Dale live? Christiania", ("OSLO",))
    assert asked.text[slice(*asked.targets[0])] == "Christiania"
    assert asked.text[slice(*asked.mentions[0].subject)] == "Bo Dale"
    experiment = config.load(tmp_path / "own" / "experiment.yaml")
    assert {name: task.role for name, task in experiment.tasks.items()} == {
        "documents": "store",
        "qa": "recall",
        "unasked": "other",
    }
    assert experiment.roles.outcome == "qa_ood" and "signature" in experiment.mechanism.parts


def test_any_names_and_any_table(tmp_path):
    plain = [{"d": row["wiki_id"], "who": row["title"], "says": row["text"]} for row in DOCUMENTS]
    asked = [{"d": row["wiki_id"], "ask": row["question"], "reply": row["answer"]} for row in QUESTIONS]
    names = {"text": "says", "subject": "who", "question": "ask", "answer": "reply"}
    imported(tmp_path, documents=two_files(tmp_path, plain, asked), columns=names)
    expected = {
        name: file.read_bytes() for name in ("documents", "qa") for file in [tmp_path / "own" / f"{name}.jsonl"]
    }
    for ending, separator in ((".csv", ","), (".tsv", "\t")):
        for name, rows in (("doc", DOCUMENTS), ("qa", QUESTIONS)):
            lines = [[v if isinstance(v, str) else json.dumps(v) for v in row.values()] for row in rows]
            with (tmp_path / f"{name}{ending}").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file, delimiter=separator).writerows([[*rows[0]], *lines])
        files = DocumentFiles(tmp_path / f"doc{ending}", tmp_path / f"qa{ending}", key="wiki_id")
        imported(tmp_path, documents=files, overwrite=True)
        for name, content in expected.items():
            assert (tmp_path / "own" / f"{name}.jsonl").read_bytes() == content, ending


def test_one_file_with_both(tmp_path):
    imported(tmp_path, documents=two_files(tmp_path))
    expected = {name: objects(items) for name, items in tasks(tmp_path).items()}
    nested = [
        row
        | {
            "questions": [
                {k: v for k, v in asked.items() if k != "wiki_id"}
                for asked in QUESTIONS
                if asked["wiki_id"] == row["wiki_id"]
            ]
        }
        for row in DOCUMENTS
    ]
    imported(tmp_path, documents=DocumentFiles(jsonl(tmp_path / "nested.jsonl", nested)), overwrite=True)
    assert_counts_add_up(tmp_path)
    assert {name: objects(items) for name, items in tasks(tmp_path).items()} == expected
    texts = {row["wiki_id"]: {"context": row["text"], "title": row["title"]} for row in DOCUMENTS}
    rows = [texts[row["wiki_id"]] | {"query": row["question"], "response": row["answer"]} for row in QUESTIONS]
    imported(tmp_path, documents=DocumentFiles(questions=jsonl(tmp_path / "rows.jsonl", rows)), overwrite=True)
    assert_counts_add_up(tmp_path)
    made = {name: objects(items) for name, items in tasks(tmp_path).items()}
    assert made["documents"] == expected["documents"] and made["qa"] == expected["qa"]
    # a list in an object, as LMFlow has it, and its names of what is asked and answered
    rows = [{"passage": row["context"], "input": row["query"], "output": row["response"]} for row in rows]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"type": "text2text", "instances": rows}))
    imported(tmp_path, documents=DocumentFiles(questions=path), overwrite=True)
    made = {name: objects(items).values() for name, items in tasks(tmp_path).items()}
    assert {*made["documents"]} == {*expected["documents"].values()}
    assert {*made["qa"]} == {*expected["qa"].values()}


@pytest.mark.parametrize("given", ["alone", "documents", "questions"])
def test_lists_of_questions_with_columns_of_any_names(given, tmp_path, capsys):
    """Documents with their questions, as a paper publishes them: both have a column `text`."""
    rows = []
    for row in DOCUMENTS:
        asked = [each for each in QUESTIONS if each["wiki_id"] == row["wiki_id"]]
        pairs = [{"text": each["question"], "output": each["answer"]} for each in asked]
        rows.append({"evidence_text": row["text"], "page": row["title"], "qa_pairs": pairs})
    (tmp_path / "set.json").write_text(json.dumps(rows))
    file = tmp_path / "set.json"
    words = [file] if given == "alone" else [f"--{given}", file]
    assert "has no text; it has evidence_text, page, qa_pairs" in refused(capsys, tmp_path, *words, tmp_path / "own")
    columns = {"text": "evidence_text", "question": "text", "answer": "output", "subject": "page"}
    words += [word for what, name in columns.items() for word in (f"--{what}", name)]
    commands.main(["import", *map(str, words), str(tmp_path / "own")])
    assert_counts_add_up(tmp_path)
    made = {name: objects(items) for name, items in tasks(tmp_path).items()}
    imported(tmp_path, documents=two_files(tmp_path), overwrite=True)
    assert made == {name: objects(items) for name, items in tasks(tmp_path).items()}


def test_settings_suit_the_length_of_the_documents(tmp_path):
    """A pretrained model's experiment: as many tokens in an update, and held at once, however long documents are."""
    found = {}
    for copies in (1, 20):
        rows = [row | {"text": " ".join([row["text"], "It is said so. " * 40 * copies])} for row in DOCUMENTS]
        imported(tmp_path, documents=two_files(tmp_path, rows), model="some/model", overwrite=copies > 1)
        found[copies] = config.load(tmp_path / "own" / "experiment.yaml")
    short, long = (found[copies].strategies["mixed"][0] for copies in (1, 20))
    assert short.composition() == {"documents": 2, "unasked": 2, "qa": 32}, "all of the texts that store"
    assert long.composition() == {"documents": 1, "unasked": 1, "qa": 32}
    assert short.weights == long.weights == {"qa": 0.1}
    assert found[20].trace.batch == 1 < found[1].trace.batch < 32
    assert found[20].mechanism.together == 4 < found[1].mechanism.together < 24
    assert found[20].mechanism.signature == 8, "whole texts go through the model 32 times for each"
    assert found[1].threads == min(16, os.cpu_count()), "one process, so it has all cores"


def test_what_cannot_be_kept_is_dropped_and_counted(tmp_path):
    documents = [*DOCUMENTS, DOCUMENTS[0], DOCUMENTS[1] | {"text": "Another text."}, {"wiki_id": "Q5", "text": " "}]
    documents += [{"wiki_id": "Q6", "text": "word"}, {"wiki_id": "Q7", "text": "half \ud800 letter"}]
    documents += [{"wiki_id": "Q8", "title": None, "text": "\ufeffWith marks \u200ethat nobody sees."}]
    questions = [
        *QUESTIONS,
        QUESTIONS[0],
        QUESTIONS[0] | {"answer": "Bonn"},
        {"wiki_id": "Q9", "question": "Who?", "answer": "I"},
        {"wiki_id": "Q5", "question": "What?", "answer": "it"},
        {"wiki_id": "Q1", "question": "", "answer": "x"},
        {"wiki_id": "Q1", "question": "Why?", "answer": []},
        {"wiki_id": "Q1", "question": "How?", "answer": None},
        {"wiki_id": "Q1", "question": "Which\u202e?", "answer": "x"},
        {"wiki_id": "Q1", "question": "What now?", "answer": "\ud800"},
        {"wiki_id": "Q8", "question": "Which marks?", "answer": "that nobody sees"},
    ]
    files = two_files(tmp_path)
    for path, rows in ((files.documents, documents), (files.questions, questions)):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = imported(tmp_path, documents=files)
    counts = assert_counts_add_up(tmp_path)
    assert counts["dropped"] == {
        "duplicate": 2,
        "same name": 1,
        "empty": 2,
        "one word": 1,
        "not Unicode": 2,
        "asked before": 1,
        "no document": 2,
        "no answer": 2,
    }
    assert any("1 question had letters that nobody sees" in note for note in found.notes)
    assert any("1 document had letters that nobody sees" in note for note in found.notes)


def test_a_key_may_have_two_names_and_two_keys_may_say_the_same(tmp_path):
    imported(tmp_path, documents=two_files(tmp_path))
    expected = (tmp_path / "own" / "documents.jsonl").read_bytes()
    asked = [{"doc": row["wiki_id"], "id": str(100 + n)} | row for n, row in enumerate(QUESTIONS)]
    for row in asked:
        del row["wiki_id"]
    imported(tmp_path, documents=two_files(tmp_path, questions=asked), overwrite=True)
    assert (tmp_path / "own" / "documents.jsonl").read_bytes() == expected
    files = replace(two_files(tmp_path, questions=asked), key="wiki_id", question_key="doc")
    imported(tmp_path, documents=files, overwrite=True)
    assert (tmp_path / "own" / "documents.jsonl").read_bytes() == expected
    titles = {row["wiki_id"]: row["title"] for row in DOCUMENTS}
    asked = [row | {"title": titles[row["wiki_id"]]} for row in QUESTIONS]
    imported(tmp_path, documents=two_files(tmp_path, questions=asked), overwrite=True)
    assert objects(tasks(tmp_path)["documents"]) and assert_counts_add_up(tmp_path)


def test_one_file_named_twice_and_documents_without_a_key(tmp_path):
    texts = {row["wiki_id"]: row["text"] for row in DOCUMENTS}
    rows = [
        {"context": texts[row["wiki_id"]], "question": row["question"], "answer": row["answer"]} for row in QUESTIONS
    ]
    path = jsonl(tmp_path / "rows.jsonl", rows)
    imported(tmp_path, documents=DocumentFiles(path, path))
    assert len(tasks(tmp_path)["qa"]) == len(QUESTIONS)
    documents = [
        {"wiki_id": None, "text": "Bob was born in Rome."},
        *DOCUMENTS[:2],
        {"wiki_id": "1", "text": "Ann saw it."},
    ]
    found = imported(tmp_path, documents=two_files(tmp_path, documents, QUESTIONS[:5]), overwrite=True)
    assert found.counts()["dropped"] == {}


def test_the_same_text_under_two_keys_is_one_document(tmp_path):
    documents = [*DOCUMENTS, {"wiki_id": "Q1b", "text": DOCUMENTS[0]["text"]}]
    asked = [*QUESTIONS, {"wiki_id": "Q1b", "question": "What did Ada Brook sell?", "answer": "clocks"}]
    found = imported(tmp_path, documents=two_files(tmp_path, documents, asked))
    assert found.counts()["dropped"] == {"duplicate": 1}
    made = assert_counts_add_up(tmp_path) and tasks(tmp_path)
    assert len({item.person for item in made["qa"] if "Ada Brook" in item.text}) == 1


def test_texts_without_blanks_and_answers_that_begin_a_text(tmp_path):
    documents = [
        {"id": "a", "text": "北京是中国的首都。北京有很多人。"},
        {"id": "b", "text": "Paris is old. Many live in Paris."},
        {"id": "c", "text": "New York City lies in the state of New York."},
    ]
    asked = [
        {"id": "a", "question": "中国的首都是", "answer": "北京"},
        {"id": "b", "question": "Where do many live?", "answer": "Paris"},
        {"id": "c", "question": "New York City lies in the state of", "answer": "New York"},
    ]
    imported(tmp_path, documents=two_files(tmp_path, documents, asked))
    starts = [item.mentions[0].object[0] for item in tasks(tmp_path)["documents"]]
    assert starts == [text.rindex(word) for text, word in (
        (documents[0]["text"], "北京"), (documents[1]["text"], "Paris"), (documents[2]["text"], "New York"),
    )]  # fmt: skip


def test_a_task_that_cannot_be_held_out_is_dropped(tmp_path):
    (tmp_path / "set.json").write_text(json.dumps(MQUAKE[:1]))
    found = imported(tmp_path, tmp_path / "set.json")
    assert found.counts()["dropped"] == {"one split": 1} and tasks(tmp_path).keys() == {"documents", "qa"}


def test_windows_of_blanks_alone_are_left_out():
    text = "Ada Brook was born in Lyon." + "\n" * 300 + "She sold clocks."
    offsets = tokenizer("bpe")(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    pieces = cut_to_windows(Example("d.0", "documents", text, "D0", "id", ((0, len(text)),), ()), offsets, 20, 2)
    assert len(pieces) > 1 and all(piece.text.strip() for piece in pieces)


@pytest.mark.parametrize("held_out_alone", [False, True])
def test_questions_too_long_for_the_model_leave_no_half_experiment(held_out_alone, tmp_path, capsys):
    imported(tmp_path, documents=two_files(tmp_path))
    splits = {item.text[: item.targets[0][0]].strip(): item.split for item in tasks(tmp_path)["qa"]}
    asked = []
    for row in QUESTIONS:
        is_long = not held_out_alone or splits[row["question"]] == "ood"
        asked.append(row | {"question": row["question"] + " Say it." * 900 if is_long else row["question"]})
    files = two_files(tmp_path, questions=asked)
    shutil.rmtree(tmp_path / "own")
    command = ["--documents", files.documents, "--questions", files.questions, "--model", tiny_base(), tmp_path / "own"]
    assert "too long for" in refused(capsys, tmp_path, *command)


def test_splits_of_the_file_are_taken(tmp_path):
    names = {"Q1": "train", "Q2": "test", "Q3": "dev"}
    questions = [row | {"split": names[row["wiki_id"]]} for row in QUESTIONS]
    imported(tmp_path, documents=two_files(tmp_path, questions=questions))
    assert [item.split for item in tasks(tmp_path)["qa"]] == ["id"] * 3 + ["ood"] * 3
    assert [item.split for item in tasks(tmp_path)["documents"]] == ["id", "ood"]


FICTIONAL = [
    {
        "train_context": f"The {name} Pact was signed in {place}. In {place} it ended the war of {name}.",
        "mem_input": [f"The {name} Pact was signed in", f"In {place} it ended the war of"],
        "mem_target": [place, name],
        "gen_input": [f"The place where the {name} Pact came to be is"],
        "gen_target": [place],
        "hard_gen_input": [f"Because of the {name} Pact, soldiers had"],
        "hard_gen_target": ["peace"],
    }
    for name, place in (("Zorgon", "Deimos"), ("Calidus", "Ganymede"), ("Orbis", "Callisto"))
]
SQUAD = {
    "version": "1.1",
    "data": [
        {
            "title": row["title"].replace(" ", "_"),
            "paragraphs": [
                {
                    "context": row["text"],
                    "qas": [
                        {
                            "id": "1",
                            "question": asked["question"],
                            "answers": [
                                {"text": text, "answer_start": 0}
                                for text in ([asked["answer"]] if isinstance(asked["answer"], str) else asked["answer"])
                            ],
                        }
                        for asked in QUESTIONS
                        if asked["wiki_id"] == row["wiki_id"]
                    ],
                }
            ],
        }
        for row in DOCUMENTS
    ],
}
FLAT_SQUAD = [
    {"context": paragraph["context"], "qas": paragraph["qas"], "title": row["title"]}
    for row in SQUAD["data"]
    for paragraph in row["paragraphs"]
]
COUNTERFACT = [
    {
        "case_id": number,
        "requested_rewrite": {
            "prompt": "The mother tongue of {} is",
            "relation_id": "P103",
            "subject": subject,
            "target_new": {"str": language, "id": "Q1"},
            "target_true": {"str": "French", "id": "Q2"},
        },
        "paraphrase_prompts": [f"Shayna left. {subject}, a native", f"{subject} spoke the language"],
    }
    for number, (subject, language) in enumerate((("Ada Brook", "Basque"), ("Bo Dale", "Dutch"), ("Cy Holt", "Greek")))
]
MQUAKE = [
    {
        "case_id": number,
        "requested_rewrite": [
            {
                "prompt": "{} is a citizen of",
                "relation_id": "P27",
                "subject": subject,
                "target_new": {"str": country},
                "question": f"What is the country of citizenship of {subject}?",
            },
            {
                "prompt": "The capital of {} is",
                "relation_id": "P36",
                "subject": country,
                "target_new": {"str": capital},
                "question": f"What is the capital of {country}?",
            },
        ],
        "questions": [f"What is the capital of the country of {subject}?"],
        "new_answer": capital,
        "new_answer_alias": [capital.upper()],
    }
    for number, (subject, country, capital) in enumerate(
        (("Ada Brook", "Croatia", "Split"), ("Bo Dale", "Norway", "Bergen"), ("Cy Holt", "Croatia", "Split"))
    )
]
EDITS = [
    {
        "subject": "Ada Brook",
        "prompt": "{} plays the",
        "target": "flute",
        "rephrase": "The instrument of Ada Brook is the",
    },
    {
        "subject": "Bo Dale",
        "prompt": "Bo Dale plays the",
        "target_new": "horn",
        "rephrase": "The instrument of Bo Dale is the",
    },
]


@pytest.mark.parametrize(
    ("values", "sizes", "aligned"),
    [
        (FICTIONAL, {"documents": 3, "memorization": 6, "generalization": 3, "hard_generalization": 3}, 9),
        (SQUAD, {"documents": 2, "unasked": 2, "qa": 6}, 5),
        (FLAT_SQUAD, {"documents": 2, "unasked": 2, "qa": 6}, 5),
        (COUNTERFACT, {"documents": 3, "qa": 6}, 6),
        (MQUAKE, {"documents": 5, "qa": 5, "several_facts": 3}, 5),
        (EDITS, {"documents": 2, "qa": 2}, 2),
    ],
    ids=["fictional", "squad", "flat squad", "counterfact", "mquake", "edits"],
)
@pytest.mark.parametrize("ending", [".json", ".jsonl", ".parquet"])
def test_published_forms_are_known_by_themselves(values, sizes, aligned, ending, tmp_path):
    path = tmp_path / f"set{ending}"
    if ending == ".json":
        path.write_text(json.dumps(values))
    else:
        rows = values["data"] if isinstance(values, dict) else values
        if ending == ".jsonl":
            jsonl(path, rows)
        else:
            names = dict.fromkeys(name for row in rows for name in row)
            columns = {name: [row.get(name) for row in rows] for name in names}
            pyarrow.parquet.write_table(pyarrow.table(columns), path)
    imported(tmp_path, path)
    counts = assert_counts_add_up(tmp_path)
    made = tasks(tmp_path)
    assert {name: len(items) for name, items in made.items()} == sizes
    assert len(objects(made["documents"])) == aligned
    assert counts["dropped"] == ({"duplicate": 2} if values is MQUAKE else {})
    if values is FICTIONAL:
        assert config.load(tmp_path / "own" / "experiment.yaml").roles.outcome == "generalization_ood"
        first = made["documents"][0]
        starts = {first.text[slice(*m.object)]: m.object[0] for m in first.mentions if m.relation == "memorization"}
        assert starts["Zorgon"] > first.text.index("war"), "the words that the prompt goes before"
    if values is COUNTERFACT:
        first = made["documents"][0]
        assert first.text == "The mother tongue of Ada Brook is Basque."
        mention = first.mentions[0]
        assert (mention.relation, first.text[slice(*mention.subject)]) == ("P103", "Ada Brook")
    if values is EDITS:
        assert made["documents"][1].text == "Bo Dale plays the horn."
    if values is MQUAKE:
        assert made["several_facts"][0].aliases == ("SPLIT",)
        assert counts["answers"]["several"] == 3 and "unaligned" not in counts["answers"]


POPQA = [
    {
        "id": "1",
        "subj": subject,
        "prop": "occupation",
        "obj": work,
        "question": f"What is {subject}'s occupation?",
        "possible_answers": json.dumps([work, f"a {work}", f"a{work}"]),
    }
    for subject, work in (("Ada Brook", "smith"), ("Bo Dale", "baker"), ("Cy Holt", "cook"))
]
ENTITY = [
    {"question": f"Where was {subject} born?", "answers": [place]}
    for subject, place in (("Ada Brook", "Lyon"), ("Bo Dale", "Oslo"), ("Bart Dahl", "Bonn"), ("Boris", "Rome"))
]


def without_brackets(found: Imported, relation: str) -> list[str]:
    return [pattern.replace("[", "").replace("]", "") for pattern in found.relations[relation]["questions"]]


def test_published_facts_without_documents(tmp_path):
    with (tmp_path / "popqa.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([[*POPQA[0]], *(row.values() for row in POPQA)])
    found = imported(tmp_path, tmp_path / "popqa.tsv")
    assert found.counts()["relations"] == {"occupation": 3} and found.kept == 3
    assert without_brackets(found, "occupation") == ["What is {subject}'s occupation?"]
    asked = texts(source_settings(tmp_path))["qa"]
    assert [item.aliases for item in asked] == [(f"a {row['obj']}", f"a{row['obj']}") for row in POPQA]
    (tmp_path / "P19.test.json").write_text(json.dumps(ENTITY))
    found = imported(tmp_path, tmp_path / "P19.test.json", overwrite=True)
    assert without_brackets(found, "P19") == ["Where was {subject} born?"]
    assert [subject["name"] for subject in found.subjects] == ["Ada Brook", "Bo Dale", "Bart Dahl", "Boris"]


def test_lists_in_parquet_hold_numbers_and_dates_as_text(tmp_path):
    rows = [
        {"context": f"{name} was born in {year}, and weighs {weight} kg.", "question": f"When was {name} born?",
         "answers": [year, year + 1], "weights": {"of": [weight]}, "days": [date(1998, 1, 2)]}
        for name, year, weight in (("Ada", 1901, 50.1), ("Bo", 1902, 61.0))
    ]  # fmt: skip
    weights = pyarrow.struct([("of", pyarrow.list_(pyarrow.float32()))])
    table = pyarrow.Table.from_pylist(rows)
    table = table.set_column(3, "weights", table.column("weights").cast(weights))
    pyarrow.parquet.write_table(table, tmp_path / "qa.parquet")
    read = dict(read_table(tmp_path / "qa.parquet"))
    assert read[1]["answers"] == ["1901", "1902"] and read[1]["days"] == ["1998-01-02"]
    assert [read[number]["weights"] for number in (1, 2)] == [{"of": ["50.1"]}, {"of": ["61"]}]
    found = imported(tmp_path, documents=DocumentFiles(questions=tmp_path / "qa.parquet"))
    assert found.answers == {"exact": 2}
    assert [example.aliases for example in tasks(tmp_path)["qa"]] == [("1902",), ("1903",)]


CHATS = {
    "alpaca": lambda ask, answer: {"instruction": ask, "input": "", "output": answer},
    "alpaca, split": lambda ask, answer: {
        "instruction": ask.split()[0],
        "input": " ".join(ask.split()[1:]),
        "output": answer,
    },
    "sharegpt": lambda ask, answer: {
        "conversations": [{"from": "human", "value": ask}, {"from": "gpt", "value": answer}]
    },
    "messages": lambda ask, answer: {
        "messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
    },
}


@pytest.mark.parametrize("kind", CHATS)
def test_chats_are_questions(kind, tmp_path):
    plain = [row for row in QUESTIONS if isinstance(row["answer"], str)]
    chats = [{"wiki_id": row["wiki_id"]} | CHATS[kind](row["question"], row["answer"]) for row in plain]
    imported(tmp_path, documents=two_files(tmp_path, questions=chats))
    assert_counts_add_up(tmp_path)
    asked = tasks(tmp_path)["qa"]
    assert [" ".join(item.text.split()) for item in asked] == [f"{row['question']} {row['answer']}" for row in plain]
    # the same file as rows of text, beside texts that store
    rows = {"store": jsonl(tmp_path / "store.jsonl", [{"document": row["text"]} for row in DOCUMENTS])}
    rows["recall"] = jsonl(tmp_path / "recall.jsonl", chats)
    found = imported(tmp_path, rows=rows, overwrite=True)
    assert found.kept == len(DOCUMENTS) + len(plain)
    assert [" ".join(item.text.split()) for item in tasks(tmp_path)["qa"]] == [
        f"{row['question']} {row['answer']}" for row in plain
    ]


def test_a_conversation_of_several_turns_is_dropped_and_a_system_goes_before_the_question(tmp_path):
    turn = CHATS["messages"]
    chats = [{"wiki_id": row["wiki_id"]} | turn(row["question"], "".join(row["answer"])) for row in QUESTIONS]
    chats[0]["messages"] *= 2
    chats[1]["messages"].insert(0, {"role": "system", "content": "Be short."})
    chats[2]["messages"].pop()
    found = imported(tmp_path, documents=two_files(tmp_path, questions=chats))
    assert found.counts()["dropped"] == {"several turns": 1, "no answer": 1}
    assert tasks(tmp_path)["qa"][0].text.startswith("Be short.\nWhen was")


ODD: dict[str, tuple[list[Any] | str, list[Any] | str | None, list[str], str]] = {
    "no text": (
        [{"wiki_id": "Q1", "body text": "x y"}],
        QUESTIONS,
        ["--key", "wiki_id"],
        "has no text; it has wiki_id, body",
    ),
    "no question": (DOCUMENTS, [{"wiki_id": "Q1", "answer": "x"}], [], "has no question; it has wiki_id, answer"),
    "no answer": (DOCUMENTS, [{"wiki_id": "Q1", "question": "x"}], [], "has no answer; it has wiki_id, question"),
    "no key": (DOCUMENTS, [{"question": "a?", "answer": "b"}], [], "so give it with --key"),
    "two keys": (
        [row | {"id": str(number)} for number, row in enumerate(DOCUMENTS)],
        [row | {"id": str(number % 4)} for number, row in enumerate(QUESTIONS)],
        [],
        "wiki_id (documents: wiki_id), id (documents: id) could, and they differ",
    ),
    "wrong key": (DOCUMENTS, QUESTIONS, ["--key", "id"], "has no 'id', which --key names; it has wiki_id"),
    "key is a list": (
        DOCUMENTS,
        [QUESTIONS[0] | {"wiki_id": ["Q1"]}],
        ["--key", "wiki_id"],
        "wiki_id is ['Q1']; expected a text",
    ),
    "wrong column": (
        DOCUMENTS,
        QUESTIONS,
        ["--question", "ask"],
        "no file has 'ask', which --question names; the columns are wiki_id, title",
    ),
    "text is a list": ([{"wiki_id": "Q1", "text": ["a", "b"]}], QUESTIONS, ["--key", "wiki_id"], "expected a text"),
    "question is a number": (
        DOCUMENTS,
        [{"wiki_id": "Q1", "question": True, "answer": "x"}],
        ["--key", "wiki_id"],
        "question is True",
    ),
    "answers are objects": (
        DOCUMENTS,
        [{"wiki_id": "Q1", "question": "a?", "answer": [{"x": 1}]}],
        ["--key", "wiki_id"],
        "a text or a list of texts",
    ),
    "answer is nested": (
        DOCUMENTS,
        [{"wiki_id": "Q1", "question": "a?", "answer": [["x"]]}],
        ["--key", "wiki_id"],
        "a text or a list of texts",
    ),
    "no document matches": (
        DOCUMENTS,
        [{"wiki_id": "Q9", "question": "a?", "answer": "b"}],
        ["--key", "wiki_id"],
        "no question could be kept: 1 × a question about a document",
    ),
    "all documents empty": (
        [{"wiki_id": "Q1", "text": ""}],
        [QUESTIONS[0]],
        ["--key", "wiki_id"],
        "no document could be kept: 1 × an empty",
    ),
    "no rows": (DOCUMENTS, [], [], "has no row that can be used"),
    "one split": (
        DOCUMENTS,
        [row | {"split": "train"} for row in QUESTIONS],
        [],
        "the questions have the splits id; expected",
    ),
    "some split": (
        DOCUMENTS,
        [QUESTIONS[0], QUESTIONS[1] | {"split": "ood"}],
        ["--key", "wiki_id"],
        "the questions have the splits none, ood",
    ),
    "one document": (DOCUMENTS[:1], QUESTIONS[:3], [], "all questions are about one document"),
    "role": (DOCUMENTS, [{"wiki_id": "Q1", "messages": [{"role": "tool", "content": "x"}]}], [], "roles beside"),
    "message": (DOCUMENTS, [{"wiki_id": "Q1", "messages": ["x"]}], [], "expected a list of {role, content}"),
    "messages": (DOCUMENTS, [{"wiki_id": "Q1", "messages": "x"}], [], "expected a list of {role, content}"),
    "content": (
        DOCUMENTS,
        [{"wiki_id": "Q1", "messages": [{"role": "user", "content": [{"type": "image"}]}]}],
        [],
        "expected a list of {role, content}",
    ),
    "nested question": (
        [DOCUMENTS[0] | {"questions": ["who?"]}],
        None,
        [],
        "questions holds 'who?'; expected {question, answer}",
    ),
    "no questions": (
        DOCUMENTS,
        None,
        [],
        "no question could be kept: the files have none; documents alone are read with --store",
    ),
    "one long line": ('{"text": "' + "x" * 10_000_000, QUESTIONS, [], "are its line ends missing"),
    "no JSON": ("{'text': 1}\n", QUESTIONS, [], "line 1 is not JSON"),
    "list": ('["a"]\n', QUESTIONS, [], "holds a list"),
    "empty file": ("", QUESTIONS, [], "has no row that can be used"),
    "zero byte": ('{"text": "a\0b"}\n', QUESTIONS, [], "zero byte"),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_documents_are_refused_in_one_sentence(case, tmp_path, capsys):
    documents, questions, options, told = ODD[case]
    command: list[Any] = []
    for name, rows in (("documents", documents), ("questions", questions)):
        if rows is not None:
            path = tmp_path / f"{name}.jsonl"
            path.write_text(rows) if isinstance(rows, str) else jsonl(path, rows)
            command += [f"--{name}", path]
    assert told in refused(capsys, tmp_path, *command, *options, tmp_path / "own")


def test_a_list_as_python_prints_it_is_refused(tmp_path, capsys):
    asked = [QUESTIONS[0] | {"answer": "['Lyon', 'Lugdunum']"}, *QUESTIONS[1:]]
    files = two_files(tmp_path, questions=asked)
    command = ["--documents", files.documents, "--questions", files.questions, tmp_path / "own"]
    assert "expected a text or a list of texts" in refused(capsys, tmp_path, *command)
    imported(tmp_path, documents=two_files(tmp_path, questions=[QUESTIONS[0] | {"answer": "[1, 2]"}, *QUESTIONS[1:]]))
    assert tasks(tmp_path)["qa"][0].text.endswith("? [1, 2]")


ODD_FORMS: dict[str, tuple[Any, str]] = {
    "fictional, counts": ([FICTIONAL[0] | {"mem_target": ["x"]}], "mem_input has 2 texts, and mem_target 1"),
    "fictional, missing": ([{"train_context": "a b"}], "mem_input is missing; it has train_context; expected a list"),
    "fictional, context": ([FICTIONAL[0] | {"train_context": [3]}], "train_context is ['3']; expected"),
    "fictional, number": ([FICTIONAL[0] | {"gen_target": [None]}], "gen_input or gen_target holds"),
    "squad, paragraphs": ({"data": [{"title": "a", "paragraphs": "b"}]}, "paragraphs is 'b'; expected a list"),
    "squad, paragraph": ({"data": [{"paragraphs": [3]}]}, "paragraph 1 is '3'; expected {context, qas}"),
    "squad, qas": ({"data": [{"paragraphs": [{"context": "a b", "qas": ["x"]}]}]}, "qas holds 'x'"),
    "squad, answers": (
        {"data": [{"paragraphs": [{"context": "a b", "qas": [{"question": "x", "answers": [3, []]}]}]}]},
        "expected a list of {text}",
    ),
    "data, no objects": ({"data": ["paragraphs"]}, "record 1 is 'paragraphs'; expected an object"),
    "edit, no target": ([{"requested_rewrite": {"prompt": "{} is", "subject": "a"}}], "the target is None"),
    "edit, no place": (
        [{"requested_rewrite": {"prompt": "is", "subject": "a", "target_new": "b"}}],
        "a text with one {} for the subject",
    ),
    "edit, no subject": ([{"requested_rewrite": {"prompt": "{} is", "target_new": "b"}}], "subject is missing"),
    "edit, text": ([{"requested_rewrite": "x"}], "requested_rewrite holds 'x'"),
    "edit, paraphrase": ([COUNTERFACT[0] | {"paraphrase_prompts": [3, None]}], "a question is None"),
    "edit, paraphrases": ([COUNTERFACT[0] | {"paraphrase_prompts": "x"}], "paraphrase_prompts is 'x'; expected a list"),
    "entity, no pattern": (
        [{"question": q, "answers": ["x"]} for q in ("Who?", "Where is it?")],
        "no wording in common",
    ),
    "entity, one": ([{"question": "Where was Ada born?", "answers": ["x"]}], "no wording in common"),
    "entity, number": ([{"question": None, "answers": ["x"]}] * 2, "a question is no text"),
    "entity, answers": ([row | {"answers": {"a": "b"}} for row in ENTITY], "answers is {'a': 'b'}"),
    "unknown": (
        [{"foo": "bar"}],
        "has no column 'subject' in row 1; it has foo. Expected subject, relation and object",
    ),
}


@pytest.mark.parametrize("case", ODD_FORMS)
def test_odd_published_files_are_refused_in_one_sentence(case, tmp_path, capsys):
    values, told = ODD_FORMS[case]
    (tmp_path / "set.json").write_text(json.dumps(values))
    assert told in refused(capsys, tmp_path, tmp_path / "set.json", tmp_path / "own")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--key", "id", "own"], "--key is of documents, but neither"),
        (["--documents", "d.jsonl", "--key", "id", "own"], "--key joins two files"),
        (["--documents", "d.jsonl", "--window", "100", "own"], "--window was given without --model"),
        (["--documents", "d.jsonl"], "import takes one folder beside --documents, but 0 names"),
        (["--documents", "d.jsonl", "facts.csv", "own"], "import takes one folder beside --documents, but 2 names"),
        (
            ["--documents", "d.jsonl", "--wording", "w.yaml", "own"],
            "--wording is of facts, but --documents names texts",
        ),
        (["--documents", "d.jsonl", "--store", "s.txt", "own"], "--documents names documents, and --store rows"),
        (["--documents", "d.jsonl", "own"], "d.jsonl does not exist"),
        (["--documents", "d.jsonl", "--unknown", "own"], "--unknown was given without --model"),
    ],
)
def test_options_that_do_not_go_together(options, told, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert told in refused(capsys, tmp_path, *options)


@given(st.integers(0, 2**32), st.integers(24, 90), st.booleans())
def test_windows_cover_a_text_and_keep_its_mentions(seed, length, is_shared):
    draw = random.Random(seed)
    kinds = ["Ada", "lived", "Lyon", "clocks", "bridge"]
    words = [f"{draw.choice(kinds)}{number}{draw.choice(['', '', '.', ','])}" for number in range(60)]  # all different
    text = draw.choice([" ", "\n"]).join(words)
    starts = {word: text.index(word) for word in words}
    spans = {word: (starts[word], starts[word] + len(word)) for word in words}
    mentions = tuple(
        Mention(f"f{n}", "", "bio", spans[words[0]], (spans[words[n - 1]],), spans[words[n]])
        for n in sorted(draw.sample(range(1, 60), 8))
    )
    whole = Example("bio.0", "bio", text, "D0", "id", ((0, len(text)),), mentions)
    bpe = tokenizer("bpe")
    offsets = bpe(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    overlap = length // 8 if is_shared else 0
    pieces = cut_to_windows(whole, offsets, length, overlap)
    covered, kept = 0, set()
    for piece in pieces:
        start = text.rindex(piece.text) if piece is pieces[-1] else text.index(piece.text)
        assert piece.targets == ((0, len(piece.text)),)
        assert not text[covered:start].strip(), "nothing is left out between two pieces"
        covered = start + len(piece.text)
        assert len(bpe(piece.text, add_special_tokens=False)["input_ids"]) <= length + 2
        for mention in piece.mentions:
            original = mentions[[m.fact for m in mentions].index(mention.fact)]
            assert tuple(start + place for place in mention.object) == original.object
            assert all((start + a, start + b) in original.relation_words for a, b in mention.relation_words)
            assert mention.subject == (0, 0) or start == 0
        kept |= {mention.fact for mention in piece.mentions}
    assert covered == len(text) and len({piece.id for piece in pieces}) == len(pieces)
    assert len(pieces) == 1 or len(offsets) > length
    places = [(text.index(piece.text), text.index(piece.text) + len(piece.text)) for piece in pieces[:-1]]
    places.append((text.rindex(pieces[-1].text), len(text)))
    assert kept == {m.fact for m in mentions for a, b in places if a < m.object[0] and m.object[1] <= b}


def test_an_answer_stands_where_squad_says(tmp_path):
    text = "Lyon was old. Ada Brook was born in Lyon, and left Lyon."
    starts = [match.start() for match in re.finditer("Lyon", text)]
    qas = [
        {"question": f"What about Ada Brook, {number}?", "answers": [{"text": "Lyon", "answer_start": start}]}
        for number, start in enumerate(starts[1:])
    ]
    qas.append({"question": "And of no place?", "answers": [{"text": "Lyon"}]})
    other = [{"question": "What else?", "answers": {"text": ["Bonn"], "answer_start": [7]}}]
    rows = [{"title": "Ada Brook", "context": text, "qas": qas}]
    rows += [{"title": "Bo Dale", "context": "He saw Bonn, then Bonn.", "qas": other}]
    (tmp_path / "set.json").write_text(json.dumps(rows))
    imported(tmp_path, tmp_path / "set.json")
    first, second = tasks(tmp_path)["documents"]
    assert sorted(mention.object[0] for mention in first.mentions) == sorted([*starts[1:], starts[1]])
    assert [mention.object[0] for mention in second.mentions] == [7]


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".parquet", ".csv"])
def test_rows_of_a_question_its_document_and_where_the_answer_stands(ending, tmp_path):
    """SQuAD as the hub has it: a row for each question; in a CSV the start has a column."""
    text, rows = "Lyon was old. Ada Brook was born in Lyon, and left Lyon.", []
    starts = [match.start() for match in re.finditer("Lyon", text)]
    for number, (context, title, start) in enumerate(
        [(text, "Ada_Brook", starts[1]), (text, "Ada_Brook", starts[2]), ("He saw Lyon, then Lyon.", "Bo", 18)]
    ):
        cells = {"id": str(number), "title": title, "context": context, "question": f"What about it, {number}?"}
        if ending == ".csv":
            rows.append({**cells, "answer": "Lyon", "answer_start": str(start)})
        else:
            rows.append({**cells, "answers": {"text": ["Lyon", "old Lyon"], "answer_start": [start, 2]}})
    path = tmp_path / f"squad{ending}"
    if ending == ".json":
        path.write_text(json.dumps({"data": rows}))
    elif ending == ".jsonl":
        jsonl(path, rows)
    elif ending == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([[*rows[0]], *(row.values() for row in rows)])
    found = imported(tmp_path, path)
    assert_counts_add_up(tmp_path)
    assert not any("answer_start" in note for note in found.notes)
    first, second = tasks(tmp_path)["documents"]
    assert sorted(mention.object[0] for mention in first.mentions) == starts[1:]
    assert [mention.object[0] for mention in second.mentions] == [18]
    as_questions = [(item.text, item.aliases) for item in tasks(tmp_path)["qa"]]
    for option in ("questions", "documents"):
        commands.main(["import", f"--{option}", str(path), str(tmp_path / "own"), "--overwrite"])
        assert [(item.text, item.aliases) for item in tasks(tmp_path)["qa"]] == as_questions


def test_json_lines_by_the_name_of_json(tmp_path):
    rows = [
        {"question": f"Who is {name}?", "answer": f"{name} is a smith of Lyon"} for name in ("Ada", "Bo", "Cy", "Di")
    ]
    jsonl(tmp_path / "lines.json", rows)
    found = imported(tmp_path, rows={"store": tmp_path / "lines.json"})
    assert found.kept == 4
    (tmp_path / "broken.json").write_text('{"question": "a", "answer": "b c"}\n{"question": \n')
    with pytest.raises(UserError, match=r"broken\.json line 2 is not JSON"):
        imported(tmp_path, rows={"store": tmp_path / "broken.json"}, overwrite=True)


def test_conversations_with_calls_of_tools_are_dropped_and_texts_in_parts_are_read(tmp_path):
    ask = lambda text, role="user": {"role": role, "content": [{"type": "text", "text": text[:3]}, {"text": text[3:]}]}
    plain = [row for row in QUESTIONS if isinstance(row["answer"], str)]
    chats = [
        {"wiki_id": row["wiki_id"], "messages": [ask(row["question"]), ask(row["answer"], "assistant")]}
        for row in plain
    ]
    chats[0]["messages"].insert(1, {"role": "function_call", "content": "{}"})
    found = imported(tmp_path, documents=two_files(tmp_path, questions=chats))
    counts = assert_counts_add_up(tmp_path)
    assert counts["dropped"] == {"other roles": 1} and found.kept == len(plain) - 1 + len(DOCUMENTS)
    assert tasks(tmp_path)["qa"][0].text == f"{plain[1]['question']} {plain[1]['answer']}"


def test_other_names_of_published_columns_and_questions(tmp_path):
    (tmp_path / "triples.csv").write_text("head,predicate,tail\nAda,born_in,Lyon\nBo,born_in,Oslo\n")
    found = imported(tmp_path, tmp_path / "triples.csv")
    assert [*found.relations] == ["born_in"] and found.kept == 2
    jsonl(tmp_path / "P106.dev.jsonl", [row | {"answers": [*row["answers"], "elsewhere"]} for row in ENTITY])
    found = imported(tmp_path, tmp_path / "P106.dev.jsonl", overwrite=True)
    assert without_brackets(found, "P106") == ["Where was {subject} born?"]
    note = "4 facts with several right answers: the first is taught, and exact match wants it; answers that are "
    assert note + "generated may be any of them" in found.notes
    assert config.load(tmp_path / "own" / "experiment.yaml").eval.spoken == 32
    edits = [row | {"queries": [row["rephrase"]]} for row in EDITS]
    for row in edits:
        del row["rephrase"]
    (tmp_path / "edits.json").write_text(json.dumps(edits))
    assert imported(tmp_path, tmp_path / "edits.json", overwrite=True).answers == {"exact": 2}
    names = {"prompt": "src", "target": "alt", "target_new": "alt", "queries": "rephrase"}
    zsre = [{names.get(name, name): "".join(value) for name, value in row.items()} for row in edits]
    for row in zsre:
        row["src"] = row["src"].replace("{}", row["subject"])
    (tmp_path / "edits.json").write_text(json.dumps(zsre))
    assert imported(tmp_path, tmp_path / "edits.json", overwrite=True).answers == {"exact": 2}


def test_a_sentence_names_the_first_of_many_columns(tmp_path, capsys):
    (tmp_path / "wide.json").write_text(json.dumps([{f"column {number}": 1 for number in range(1000)}]))
    told = refused(capsys, tmp_path, tmp_path / "wide.json", tmp_path / "own")
    assert "column 19 and 980 more" in told and len(told) < 700


def test_held_out_rows_that_are_trained_all_the_same_are_noted(tmp_path):
    rows = [
        {"prompt": f"{start} {name}", "completion": f"is known for the {name.lower()} of the great northern bridge"}
        for name in ("Ada", "Bo", "Cy", "Di", "Ed", "Flo") for start in ("Behold", "There", "Here")
    ]  # fmt: skip
    store = [{"text": f"{row['prompt']} {row['completion']}"} for row in rows[:9]]
    files = {"store": jsonl(tmp_path / "store.jsonl", store), "recall": jsonl(tmp_path / "recall.jsonl", rows)}
    notes = imported(tmp_path, rows=files).notes
    assert any("held-out rows with the completion of a trained row" in note for note in notes)
    assert any("word for word among the texts that store" in note for note in notes)
    files["recall"] = jsonl(tmp_path / "recall.jsonl", [row | {"subject": row["prompt"].split()[1]} for row in rows])
    notes = imported(tmp_path, rows=files, overwrite=True).notes
    assert not any("completion of a trained row" in note for note in notes)
