"""Values of files and data sets are the text that is written, by every road; typed ones what a person would write."""

from __future__ import annotations

import csv
import datetime
import decimal
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crosstrace.core.errors import UserError
from crosstrace.importing.tables import read_object, read_table
from crosstrace.importing.text_files import read_lines

# texts that some reader takes for a number, a date, a truth value or nothing
TRICKY = [
    "007", "1.10", "1e3", "1E5", "-0", "+5", "NA", "N/A", "nan", "NaN", "None", "null", "NULL", "True", "false", "yes",
    "1998", "1998.0", "1998-01-02", "02.01.1998", "1998-01-02T13:05:00", "13:05", "1,234", "1_000", "0x10", "inf",
    "12345678901234567890", "3.14159265358979323846", "  blanks  ", '"quoted"', "a, b", "=1+1", "Zoë", "#N/A", "-",
]  # fmt: skip


def texts(path: Path) -> list[Any]:
    return [row["object"] for _, row in read_table(path)]


def as_csv(path: Path, rows: list[str], separator: str = ",") -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=separator).writerows([("subject", "object"), *(("s", row) for row in rows)])


def as_json(path: Path, rows: list[str]) -> None:
    lines = [json.dumps({"subject": "s", "object": row}, ensure_ascii=False) for row in rows]
    path.write_text("[" + ",\n".join(lines) + "]" if path.suffix == ".json" else "\n".join(lines), encoding="utf-8")


def as_parquet(path: Path, rows: list[str]) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"subject": ["s"] * len(rows), "object": rows}), path)


def as_tsv(path: Path, rows: list[str]) -> None:
    as_csv(path, rows, "\t")


WRITERS = {".csv": as_csv, ".tsv": as_tsv, ".jsonl": as_json, ".parquet": as_parquet}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_text_stays_as_it_is_in_a_file(tmp_path: Path, kind: str) -> None:
    WRITERS[kind](tmp_path / f"facts{kind}", TRICKY)
    assert texts(tmp_path / f"facts{kind}") == TRICKY


@pytest.mark.parametrize("kind", [*WRITERS, ".json", "saved", "parts"])
def test_a_text_stays_as_it_is_in_a_data_set(tmp_path: Path, kind: str) -> None:
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "facts"
    if kind in ("saved", "parts"):
        whole = datasets.Dataset.from_dict({"subject": ["s"] * len(TRICKY), "object": TRICKY})
        (datasets.DatasetDict({"train": whole}) if kind == "parts" else whole).save_to_disk(folder)
    else:
        folder.mkdir()
        (WRITERS | {".json": as_json})[kind](folder / f"train{kind}", TRICKY)
    assert texts(folder) == TRICKY


def test_the_files_of_a_data_set_are_read_in_order_and_by_parts(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "facts").mkdir()
    as_csv(tmp_path / "facts" / "train-0.csv", ["01", "02"])
    as_csv(tmp_path / "facts" / "train-1.csv", ["03"])
    as_csv(tmp_path / "facts" / "test.csv", ["NA"])
    found = [(number, row["object"]) for number, row in read_table(tmp_path / "facts:train")]
    assert found == [(1, "01"), (2, "02"), (3, "03")]
    assert texts(tmp_path / "facts:test") == ["NA"]
    with pytest.raises(UserError, match="has the parts train, test"):
        texts(tmp_path / "facts")


def test_what_a_data_set_says_of_its_files_is_heeded_or_refused(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    folder = tmp_path / "facts"
    folder.mkdir()
    as_csv(folder / "train.csv", ["01"], ";")
    card = "---\nconfigs:\n- config_name: default\n  data_files: train.csv\n  {}\n---\n"
    (folder / "README.md").write_text(card.format('sep: ";"'))
    assert texts(folder) == ["01"]
    (folder / "README.md").write_text(card.format('sep: ";"\n  skiprows: 1'))
    with pytest.raises(UserError, match=r"read with skiprows, which an import doesn't know; name the files"):
        texts(folder)


def test_other_files_of_data_sets_are_read_by_the_library(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "train.txt").write_text("007\nNA\n")
    assert [row for _, row in read_table(tmp_path / "lines")] == [{"text": "007"}, {"text": "NA"}]
    with datasets.arrow_writer.ArrowWriter(path=str(tmp_path / "train.arrow")) as writer:
        writer.write_table(pyarrow.table({"object": pyarrow.array([1.1], pyarrow.float32())}))
        writer.finalize()
    (tmp_path / "arrow").mkdir()
    (tmp_path / "train.arrow").rename(tmp_path / "arrow" / "train.arrow")
    assert texts(tmp_path / "arrow") == ["1.1"]


# ------------------------------------------------------------------------------- typed values


def moments(unit: str, *values: str | None, zone: str | None = None) -> pyarrow.Array:
    return pyarrow.array([v and datetime.datetime.fromisoformat(v) for v in values], pyarrow.timestamp(unit, zone))


Decimal = decimal.Decimal
TYPED: dict[str, tuple[pyarrow.Array, list[Any]]] = {
    "whole numbers": (pyarrow.array([7, -3, 2**63 - 1, None]), ["7", "-3", "9223372036854775807", None]),
    "unsigned": (pyarrow.array([2**64 - 1], pyarrow.uint64()), ["18446744073709551615"]),
    "years beside a missing one": (pyarrow.array([1998.0, None, float("nan")]), ["1998", None, None]),
    "float64": (pyarrow.array([1.1, -2.5, 0.1 + 0.2]), ["1.1", "-2.5", "0.30000000000000004"]),
    "float32": (pyarrow.array([1.1, 2.5, 16777216.0], pyarrow.float32()), ["1.1", "2.5", "16777216"]),
    "float16": (pyarrow.array([1.1, 2.5], pyarrow.float16()), ["1.1", "2.5"]),
    "zeros": (pyarrow.array([0.0, -0.0]), ["0", "0"]),
    "large and small": (
        pyarrow.array([1e16, 2.0**53, 1e20, 6.02214076e23, 0.0001, 0.000001, 1e-7]),
        ["1" + "0" * 16, "9007199254740992", "1" + "0" * 20, "6.02214076e23", "0.0001", "0.000001", "1e-7"],
    ),
    "infinite": (pyarrow.array([float("inf")]), [float("inf")]),
    "decimals": (pyarrow.array([Decimal("1.10"), Decimal("-2.50"), None]), ["1.10", "-2.50", None]),
    "small decimals": (pyarrow.array([Decimal("0.00000001")]), ["0.00000001"]),
    "dates": (pyarrow.array([datetime.date(1998, 1, 2), datetime.date(476, 9, 4)]), ["1998-01-02", "0476-09-04"]),
    "date64": (pyarrow.array([datetime.date(1998, 1, 2)], pyarrow.date64()), ["1998-01-02"]),
    "dates as pandas has them": (moments("ns", "1998-01-02", None), ["1998-01-02", None]),
    "moments": (
        moments("us", "1998-01-02T00:00", "1998-01-02T13:05", "1998-01-02T13:05:07.250"),
        ["1998-01-02T00:00:00", "1998-01-02T13:05:00", "1998-01-02T13:05:07.25"],
    ),
    "nanoseconds": (pyarrow.array([123456789], pyarrow.timestamp("ns")), ["1970-01-01T00:00:00.123456789"]),
    "moments in UTC": (moments("ms", "1998-01-02T13:05:00", zone="UTC"), ["1998-01-02T13:05:00+00:00"]),
    "moments in a zone": (moments("ms", "1998-01-02T13:05:00", zone="+05:30"), ["1998-01-02T18:35:00+05:30"]),
    "times of day": (pyarrow.array([datetime.time(13, 5), datetime.time(0, 0, 7, 500000)]), ["13:05:00", "00:00:07.5"]),
    "categories": (pyarrow.array(["NA", "007", "NA"]).dictionary_encode(), ["NA", "007", "NA"]),
    "categories of numbers": (pyarrow.array([1998.0, 2001.0, None]).dictionary_encode(), ["1998", "2001", None]),
    "large strings": (pyarrow.array(["007"], pyarrow.large_string()), ["007"]),
    "string views": (pyarrow.array(["007"], pyarrow.string_view()), ["007"]),
    "bytes": (pyarrow.array(["Zoë".encode(), b"\xff"]), ["Zoë", b"\xff"]),
    "fixed bytes": (pyarrow.array([b"007"], pyarrow.binary(3)), ["007"]),
    "identifiers": (pyarrow.array([uuid.UUID(int=7).bytes], pyarrow.uuid()), [str(uuid.UUID(int=7))]),
    "nothing": (pyarrow.array([None, None]), [None, None]),
    "no text": (pyarrow.array([["a"], None]), [["a"], None]),
    "truth values": (pyarrow.array([True]), [True]),
    "durations": (pyarrow.array([datetime.timedelta(1)]), [datetime.timedelta(1)]),
}


@pytest.mark.parametrize("case", TYPED)
@pytest.mark.parametrize("road", ["file", "folder", "saved"])
def test_a_typed_value_is_what_a_person_would_write(tmp_path: Path, case: str, road: str) -> None:
    column, expected = TYPED[case]
    table = pyarrow.table({"object": column})
    if road == "saved":
        datasets = pytest.importorskip("datasets")
        try:
            saved = datasets.Dataset(table)
        except (ValueError, TypeError) as error:  # a few types the library does not know
            pytest.skip(str(error))
        saved.save_to_disk(tmp_path / "facts")
    else:
        pytest.importorskip("datasets")
        (tmp_path / "facts").mkdir()
        pyarrow.parquet.write_table(table, tmp_path / "facts" / "train.parquet")
    found = texts(tmp_path / "facts" / ("train.parquet" if road == "file" else ""))
    assert found == expected and [type(v) for v in found] == [type(v) for v in expected]


def test_classes_have_their_names(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"object": datasets.ClassLabel(names=["NA", "007"])})
    whole = datasets.Dataset.from_dict({"object": [1, 0, None, -1]}, features=features)
    whole.save_to_disk(tmp_path / "saved")
    (tmp_path / "folder").mkdir()
    whole.to_parquet(tmp_path / "folder" / "train.parquet")
    for path in (tmp_path / "saved", tmp_path / "folder", tmp_path / "folder" / "train.parquet"):
        assert texts(path) == ["007", "NA", None, None]


@pytest.mark.parametrize("note", ["[]", "{", '{"info": {"features": {"object": {"_type": "ClassLabel", "names": 3}}}}'])
def test_notes_on_classes_that_make_no_sense_are_passed_over(tmp_path: Path, note: str) -> None:
    table = pyarrow.table({"object": [1]}).replace_schema_metadata({"huggingface": note})
    pyarrow.parquet.write_table(table, tmp_path / "facts.parquet")
    assert texts(tmp_path / "facts.parquet") == ["1"]


def test_folders_named_like_columns_add_none(tmp_path: Path) -> None:
    path = tmp_path / "object=007" / "facts.parquet"
    path.parent.mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"subject": ["s"]}), path)
    assert [row for _, row in read_table(path)] == [{"subject": "s"}]


def test_years_that_no_calendar_has_and_columns_of_one_name_are_told(tmp_path: Path) -> None:
    path = tmp_path / "facts.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"object": pyarrow.array([10**15], pyarrow.timestamp("ms"))}), path)
    with pytest.raises(UserError, match="holds a value that can't be read: <value out of range"):
        texts(path)
    column = pyarrow.array(["a"])
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([column, column], names=["object", "object"]), path)
    with pytest.raises(UserError, match="a column twice in its schema: object"):
        texts(path)


NUMBERS = [
    "1.10",
    "1e3",
    "1E+5",
    "-0",
    "-0.0",
    "0",
    "3.14159265358979323846",
    "12345678901234567890",
    "1e400",
    "1998.0",
]


@pytest.mark.parametrize("road", ["file", "folder", "list"])
def test_a_number_of_json_is_the_text_that_stands_there(tmp_path: Path, road: str) -> None:
    lines = [f'{{"object": {number}}}' for number in NUMBERS]
    path = tmp_path / "facts" / ("train.json" if road == "list" else "train.jsonl")
    path.parent.mkdir()
    path.write_text("[" + ",".join(lines) + "]" if road == "list" else "\n".join(lines))
    if road != "file":
        pytest.importorskip("datasets")
        path = path.parent
    assert texts(path) == NUMBERS


def test_json_constants_and_lists() -> None:
    found = read_object('{"a": NaN, "b": Infinity, "c": null, "d": true, "e": [1.10, {"f": 1e3}]}', "here")
    assert found == {"a": None, "b": float("inf"), "c": None, "d": True, "e": ["1.10", {"f": "1e3"}]}
    with pytest.raises(UserError, match=r"here gives 'a' twice; expected each name once"):
        read_object('{"a": 1, "a": 2}', "here")


def test_other_layouts_of_a_data_sets_json(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    layouts = {
        '[\n{"text": "007"},\n{"text": "NA"}\n]': ["007", "NA"],
        '{\n  "text": 1.10\n}': ["1.10"],
        '["007", "NA"]': ["007", "NA"],
        '{"text": "a"}\n\n{"text": "b"}\n': ["a", "b"],
    }
    for number, (layout, expected) in enumerate(layouts.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "train.json").write_text(layout)
        assert [row["text"] for _, row in read_table(folder)] == expected


# ------------------------------------------------------------------------------- CSV and text


def written(tmp_path: Path, text: str | bytes, name: str = "facts.csv") -> Path:
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return tmp_path / name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('subject, object\n"Ada", "Lyon"\n', ["Lyon"]),
        ('subject,   "object"\n"Ada",   "Lyon, France"\n', ["Lyon, France"]),
        ('subject,object\na, "say ""hi"", now"\n', ['say "hi", now']),
        ('subject,object\na,"b, ""c"", d"\n', ['b, "c", d']),
        ("subject,object\na, b\na,  \n", [" b", "  "]),
        ('subject,object\na,"one\n  two, ""three"" "\n', ['one\n  two, "three" ']),
        ('subject,object\n a , b "c" \n', [' b "c" ']),
    ],
)
def test_blanks_around_quotes_are_no_text_and_others_are(tmp_path: Path, text: str, expected: list[str]) -> None:
    assert texts(written(tmp_path, text)) == expected
    assert texts(written(tmp_path, text.replace(",", "\t"), "facts.tsv")) == [e.replace(",", "\t") for e in expected]


CELL = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(CELL, CELL), min_size=1, max_size=4), st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
def test_what_csv_writes_is_read(tmp_path: Path, rows: list[tuple[str, str]], quoting: Any) -> None:
    with (tmp_path / "facts.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=quoting).writerows([("a", "b"), *rows])
    assert [tuple(row.values()) for _, row in read_table(tmp_path / "facts.csv")] == rows


LINES = "subject,object\nZoë,Lyon\nBo,東京\n"
ENCODINGS: dict[str, Callable[[str], bytes]] = {
    "utf-8": str.encode,
    "utf-8 with a mark": lambda text: text.encode("utf-8-sig"),
    "utf-16": lambda text: text.encode("utf-16"),
    "utf-16, the other way round": lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
    "utf-32": lambda text: text.encode("utf-32"),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_marked_unicode_and_any_line_end_are_read(tmp_path: Path, encoding: str, end: str) -> None:
    encode = ENCODINGS[encoding]
    assert texts(written(tmp_path, encode(LINES.replace("\n", end)))) == ["Lyon", "東京"]
    rows = written(tmp_path, encode(f'{{"object": "é"}}{end}{{"object": 1.10}}{end}'), "facts.jsonl")
    assert texts(rows) == ["é", "1.10"]
    lines = read_lines(written(tmp_path, encode(f"one{end}two{end}"), "lines.txt"))
    assert [line.strip() for line in lines] == ["one", "two"]


def test_a_carriage_return_inside_a_text_ends_no_line(tmp_path: Path) -> None:
    assert texts(written(tmp_path, 'subject,object\r\na,"b\rc"\r\n')) == ["b\rc"]
    assert list(read_lines(written(tmp_path, "a\rb\nc\n", "lines.txt"))) == ["a\rb\n", "c\n"]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.csv", b"subject;relation;object\na;b;c\n", "columns separated by semicolons: .*expected commas in a .csv"),
        ("a.csv", b"subject;object\na;1,5\n", "columns separated by semicolons"),
        ("a.csv", b"subject\tobject\na\tb\n", "columns separated by tabs: .* so name it .tsv"),
        ("a.csv", b"subject|object\na|b\n", r"columns separated by bars \(\|\)"),
        ("a.csv", b"sep=;\nsubject;object\na;b\n", "columns separated by semicolons"),
        ("a.tsv", b"subject,object\na,b\n", "columns separated by commas: .* so name it .csv"),
        ("a.csv", b"subject,object,,\na,b,,\n", "no names for columns 3, 4 in its first line"),
        ("a.csv", b"subject,object,object\na,b,c\n", "a column twice in its first line: object;"),
        ("a.csv", b'subject,object\n"a" ,b\n', "must end with its closing quote"),
        ("a.csv", b'subject,object\n"a,b\n', "is a quote not closed"),
        ("a.csv", "subject,object\na,b\n".encode("utf-16-le"), "UTF-16.* iconv -f utf-16le -t utf-8"),
        ("a.csv", "subject,object\na,b\n".encode("utf-16-be"), "UTF-16.* iconv -f utf-16be -t utf-8"),
        ("a.csv", "subject,object\na,b\n".encode("utf-16")[:-1], "marked as UTF-16, but is damaged"),
        ("a.csv", "subject,object\na,b\nc,Zoë\n".encode("latin-1"), r"line 3 is not UTF-8 \(.* at byte 4\)"),
        ("a.jsonl", b'{"object": "a", "object": "b"}\n', "line 1 gives 'object' twice"),
    ],
)
def test_what_a_file_is_and_what_to_do_is_told(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    with pytest.raises(UserError, match=told):
        texts(written(tmp_path, content, name))
