"""Rows of CSV, TSV, JSONL and Parquet files and of Hugging Face data sets, with every value as text.

In a file of text, a value is the text itself, letter by letter: 007, 1.10, 1e3, NA and None stay as they are written. A
typed value of a Parquet file or a saved data set becomes what a person would write: 1998 for 1998.0, 1.1 for a float32,
1998-01-02 for a date. A missing value is None. A value that is no text (a list, a truth value, bytes that are no UTF-8,
an infinite number) is passed on as it is, for the caller to refuse.

It knows nothing of facts, and no value passes through a Python float or a reader that guesses types.
"""

from __future__ import annotations

import csv
import json
import math
import re
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from datetime import date, time
from decimal import Decimal
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from crosstrace.core.errors import UserError
from crosstrace.importing.text_files import LONGEST, read_lines

Row = dict[str, Any]
KINDS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
EXPECTED = f"a file of rows ({', '.join(KINDS)}), or a data set: a folder or OWNER/NAME of the hub"
LISTS = ("data", "instances")  # names that a list of records has in a JSON file: SQuAD's, LMFlow's
SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars (|)"}
# settings of a data set's files that make no difference if the files are read as text
PLAIN_OPTIONS = {"name", "version", "data_dir", "data_files", "description", "features", "sep", "delimiter"}


def read_table(path: Path) -> Iterator[tuple[int, Row]]:
    """The numbered rows of a CSV, TSV, JSONL or Parquet file, or of a data set.

    Raises:
        UserError: there is no such file, or it is of another kind or malformed.
    """
    kind = path.suffix.lower()
    if data_set_of(path):
        yield from _data_set(path)
        return
    if not path.is_file():
        raise UserError(f"{path} does not exist; expected {EXPECTED}")
    if kind in (".csv", ".tsv"):
        yield from _csv(path, "\t" if kind == ".tsv" else ",")
    elif kind == ".jsonl":
        yield from _jsonl(path)
    elif kind == ".parquet":
        yield from _parquet(path)
    else:
        raise UserError(f"{path} is of no kind that can be read; expected {EXPECTED}")


def read_records(path: Path) -> Iterator[tuple[int, Row]]:
    """The numbered records of a JSON file: of its list, or of the list in it that is named as LISTS; or a table's rows.

    Raises:
        UserError: as `read_table` and `read_json`, or a record is no object.
    """
    if path.suffix.lower() != ".json":
        yield from read_table(path)
        return
    values = records_of(read_json(path))
    for number, value in enumerate(values if isinstance(values, list) else [values], 1):
        if not isinstance(value, dict):
            raise UserError(f"{path} record {number} is {value!r:.60}; expected an object")
        yield number, value


def first_record(path: Path) -> Row:
    """The first record of a file, as `read_records`, without reading a Parquet file as a whole; {} if it has none."""
    records = _parquet(path, most=1) if path.suffix.lower() == ".parquet" else read_records(path)
    return next((row for _, row in records), {})


def records_of(values: Any) -> Any:
    """What a JSON file holds, or the list in it that is named as LISTS."""
    if not isinstance(values, dict):
        return values
    return next((values[name] for name in LISTS if isinstance(values.get(name), list)), values)


def read_json(path: Path) -> Any:
    """The value of a JSON file, which may be one long line. Its numbers stay texts; NaN is None.

    If it has an object in each line (JSON Lines by another name), they are a list.

    Raises:
        UserError: there is no such file, or it is no JSON or names something twice in an object.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; expected a JSON file")
    state = path.stat()
    return _parsed(path, state.st_mtime_ns, state.st_size, state.st_ino)


@lru_cache(maxsize=1)  # its form is looked for before it is read
def _parsed(path: Path, *state: int) -> Any:
    """The value of a JSON file as long as its `state` stays; the caller leaves it as it is."""
    lines = [*read_lines(path, longest=None)]
    filled = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if len(filled) > 1 and filled[0][1].lstrip().startswith("{") and _is_json(filled[0][1]):
        return [read_object(line, f"{path} line {number}") for number, line in filled]
    return _json("".join(lines), str(path))


def _csv(path: Path, separator: str) -> Iterator[tuple[int, Row]]:
    limit = csv.field_size_limit(LONGEST)
    try:
        # A blank before an opening quote is skipped. Any other blank at the beginning of a field is part of its text,
        # so it is hidden from `csv` as a zero byte, which no line holds.
        blanks = re.compile(rf'(?:^|(?<={re.escape(separator)})) +(?! *")')
        lines = (blanks.sub(_hide, line) for line in read_lines(path))
        reader = csv.reader(lines, delimiter=separator, skipinitialspace=True, strict=True)
        names: list[str] | None = None
        for fields_of_line in reader:
            if not fields_of_line:
                continue
            values = [value.replace("\0", " ") for value in fields_of_line]
            if names is None:
                names = [value.strip() for value in values]
                _check_names(path, names, separator)
                continue
            if len(values) != len(names):
                raise UserError(
                    f"{path} line {reader.line_num} has {len(values)} fields, but its first line names {len(names)} "
                    f"columns ({', '.join(names)}); is a text with a {separator!r} not quoted?"
                )
            yield reader.line_num, dict(zip(names, values))
        if names is None:
            raise UserError(f"{path} is empty; expected a first line that names its columns")
    except csv.Error as error:
        if "expected after" in str(error):
            cause = "a quoted text must end with its closing quote, and a quote inside it must be doubled"
        else:
            cause = "is a quote not closed?"
        raise UserError(f"{path} is malformed CSV near line {reader.line_num}: {error}; {cause}") from None
    finally:
        csv.field_size_limit(limit)


def _hide(blanks: re.Match[str]) -> str:
    """As many zero bytes as there are blanks."""
    return "\0" * len(blanks[0])


def _check_names(path: Path, names: Sequence[str], separator: str) -> None:
    """Raise a `UserError` unless the first line is split at the right separator and names each column differently."""
    others = [other for other in SEPARATORS if other != separator and other in names[0]]
    if len(names) == 1 and others:
        other = max(others, key=names[0].count)
        remedy = "name it .tsv" if other == "\t" else f"save it with {SEPARATORS[separator]}"
        if other == ",":
            remedy = "name it .csv"
        raise UserError(
            f"{path} has its columns separated by {SEPARATORS[other]}: its first line is {names[0][:80]!r}; expected "
            f"{SEPARATORS[separator]} in a {path.suffix} file, so {remedy}"
        )
    unnamed = [str(number) for number, name in enumerate(names, 1) if not name]
    if len(unnamed) > 1:
        raise UserError(
            f"{path} has no names for columns {', '.join(unnamed)} in its first line "
            f"({separator.join(names)}); expected a name for each, so name these or, if they are empty, delete them"
        )
    _check_once(path, names, "in its first line")


def _check_once(path: Path, names: Sequence[str], where: str) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{path} has a column twice {where}: {', '.join(twice)}; expected each name once")


def _jsonl(path: Path) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            yield number, read_object(line, f"{path} line {number}")


def read_object(text: str, where: str) -> Row:
    """A JSON object. Its numbers stay texts, as they are written; NaN is None.

    Raises:
        UserError: it is no JSON object, or names something twice.
    """
    values = _json(text, where)
    if not isinstance(values, dict):
        raise UserError(f'{where} holds a {type(values).__name__}; expected an object, e.g. {{"subject": …}}')
    return values


def _json(text: str, where: str) -> Any:
    """Any JSON value, as `read_object`."""

    def object_of(pairs: list[tuple[str, Any]]) -> Row:
        values = dict(pairs)
        if len(values) < len(pairs):
            name = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            raise UserError(f"{where} gives {name!r} twice; expected each name once in an object")
        return values

    try:
        return json.loads(text, parse_int=str, parse_float=str, parse_constant=_constant, object_pairs_hook=object_of)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f'{where} is not JSON: {error}; expected one object, e.g. {{"subject": …}}') from None


def _constant(name: str) -> float | None:
    """The value of NaN, Infinity or -Infinity. NaN is a missing value in tables of numbers; the others are no text."""
    return None if name == "NaN" else float(name)


def _json_file(path: Path) -> Iterator[tuple[int, Row]]:
    """The rows of a data set's JSON file: one object a line, a list of objects, or a single object."""
    lines = [line for line in read_lines(path) if line.strip()]
    if not lines:
        return
    whole = lines[0].lstrip().startswith("[") or not _is_json(lines[0])
    if not whole:
        yield from _jsonl(path)
        return
    values = _json("".join(lines), str(path))
    for number, value in enumerate(values if isinstance(values, list) else [values], 1):
        if isinstance(value, str):  # a list of texts
            value = {"text": value}
        if not isinstance(value, dict):
            raise UserError(f"{path} row {number} holds a {type(value).__name__}; expected an object")
        yield number, value


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _parquet(
    path: Path, classes: Mapping[str, Sequence[str]] | None = None, most: int | None = None
) -> Iterator[tuple[int, Row]]:
    """The numbered rows of a Parquet file; the first `most` of them if given."""
    import pyarrow
    import pyarrow.parquet

    try:
        # (`read_table` would add columns, and guess their types, from folders named like year=1998)
        with pyarrow.parquet.ParquetFile(path) as file:
            if most is None:
                table = file.read()
            else:
                table = pyarrow.Table.from_batches(islice(file.iter_batches(most), 1), file.schema_arrow)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} can't be read as Parquet: {str(error).splitlines()[0]}") from None
    _check_once(path, table.column_names, "in its schema")
    yield from _arrow(table, path, classes)


def _arrow(table: Any, path: Path, classes: Mapping[str, Sequence[str]] | None = None) -> Iterator[tuple[int, Row]]:
    """The rows of an Arrow table, their values as text.

    Args:
        classes: column -> the names that its numbers stand for.
    """
    import pyarrow

    classes = _classes(table.schema) | dict(classes or {})
    try:
        columns = {name: _texts(table.column(name), classes.get(name)) for name in table.column_names}
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:  # text that is no UTF-8, times without a date
        raise UserError(f"{path} holds a value that can't be read: {str(error).splitlines()[0]}") from None
    for number, values in enumerate(zip(*columns.values()), 1):
        yield number, dict(zip(columns, values))


def _classes(schema: Any) -> dict[str, Sequence[str]]:
    """The names of classes that the library `datasets` stores as numbers, from its notes in a schema."""
    try:
        kinds = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        classes = {name: kind["names"] for name, kind in kinds.items() if kind.get("_type") == "ClassLabel"}
    except (ValueError, AttributeError, KeyError, TypeError):  # there are no notes, or anyone's
        return {}
    return {
        column: names
        for column, names in classes.items()
        if isinstance(names, list) and all(isinstance(name, str) for name in names)
    }


def _texts(column: Any, classes: Sequence[str] | None = None) -> list[Any]:
    """The values of an Arrow column as a person would write them; None for a missing one."""
    import pyarrow
    from pyarrow import types

    kind = column.type
    if isinstance(kind, pyarrow.DictionaryType):
        pieces = [piece.dictionary_decode() for piece in column.chunks]
        return _texts(pyarrow.chunked_array(pieces, kind.value_type), classes)
    if types.is_date(kind) or types.is_time(kind) or types.is_timestamp(kind):
        return _times(column)
    values = column.to_pylist()
    if classes is not None and types.is_integer(kind):
        return [classes[value] if value is not None and 0 <= value < len(classes) else None for value in values]
    return [_plain(value, kind) for value in values]


def _plain(value: Any, kind: Any) -> Any:
    """A value of an Arrow type as text if it can be one; of a list or an object, each value in it."""
    from pyarrow import DataType, types

    if value is None:
        return None
    if types.is_floating(kind):
        return number_text({16: np.float16, 32: np.float32, 64: np.float64}[kind.bit_width](value))
    if isinstance(value, list) and isinstance(getattr(kind, "value_type", None), DataType):
        return [_plain(each, kind.value_type) for each in value]
    if isinstance(value, dict) and types.is_struct(kind):
        return {name: _plain(each, kind.field(name).type) for name, each in value.items()}
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value
    if isinstance(value, Decimal):
        return format(value, "f")
    if isinstance(value, date | time):  # in a list; a column of its own is read by `_times`
        return value.isoformat()
    if isinstance(value, uuid.UUID) or (isinstance(value, int) and not isinstance(value, bool)):
        return str(value)
    return value


def number_text(value: np.floating) -> str | float | None:
    """A number of any width as a person would write it; None for NaN, and an infinite number as it is.

    It has the fewest digits that mean this number, no ".0", and no exponent from 1e-6 to 1e21, as in ECMAScript.
    """
    if np.isnan(value):
        return None
    if np.isinf(value):
        return math.inf
    if value == 0:
        return "0"
    if 1e-6 <= abs(float(value)) < 1e21:
        return np.format_float_positional(value, trim="-")
    return np.format_float_scientific(value, trim="-", exp_digits=1).replace("e+", "e")


def _times(column: Any) -> list[str | None]:
    """Dates, times of day and timestamps in ISO form.

    If all timestamps of a column are at midnight, they are dates: many programs can't store dates otherwise.
    """
    import pyarrow
    from pyarrow import types

    texts = column.cast(pyarrow.string()).to_pylist()  # 1998-01-02 13:05:00.500000+0100
    beyond = next((text for text in texts if text is not None and text.startswith("<")), None)
    if beyond is not None:  # a year that no calendar has
        raise ValueError(beyond)
    if types.is_timestamp(column.type):
        if all(text is None or re.fullmatch(r"\S+ 00:00:00(\.0+)?", text) for text in texts):
            return [text and text.split()[0] for text in texts]
        texts = [text and text.replace(" ", "T") for text in texts]
    return [text and _iso(text) for text in texts]


def _iso(text: str) -> str:
    """A time without zeros at the end of a second's fraction, and with its zone as ISO writes it."""
    text = re.sub(r"(\.\d*?)0+(?=$|[Z+-])", r"\1", text)
    text = re.sub(r"\.(?=$|[Z+-])", "", text)
    return re.sub(r"([+-]\d\d)(\d\d)$", r"\1:\2", text.replace("Z", "+00:00"))


def data_set_of(path: Path) -> tuple[Path, str] | None:
    """The name and the part of a Hugging Face data set; None if the path is of something else.

    A data set is FOLDER or OWNER/NAME, perhaps with :PART; without it the part is "".
    """
    name, _, part = str(path).partition(":")
    if not path.exists() and path.suffix.lower() in (*KINDS, ".txt"):
        return None
    if Path(name).is_dir() or (not path.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)):
        return Path(name), part
    return None


def _data_set(path: Path) -> Iterator[tuple[int, Row]]:
    """The rows of a data set.

    The library `datasets` finds its files, and runs no code of the data set. Files of text or Parquet are read here,
    since `datasets` would guess types.
    """
    name, part = data_set_of(path) or (path, "")
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{path} is a data set, and the library datasets, which reads it, is not installed; run `pip install "
            "'crosstrace[datasets]'`"
        ) from None
    is_saved = any((name / file).is_file() for file in ("state.json", "dataset_dict.json"))
    with tempfile.TemporaryDirectory(prefix="crosstrace-") as cache:  # else it would keep a copy of a folder's files
        bars = datasets.is_progress_bar_enabled()
        datasets.disable_progress_bars()
        try:
            if is_saved:
                loaded: Any = datasets.load_from_disk(str(name))
                parts = dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"": loaded}
                yield from _arrow(_part(name, parts, part).with_format("arrow")[:], path)
            else:
                yield from _files_of(path, name, part, cache)
        except UserError:
            raise
        except Exception as error:  # loaders of many formats raise many kinds
            lines = str(error).strip().splitlines() or [""]
            raise UserError(
                f"{path} can't be read as a data set: {type(error).__name__}: {lines[0]}; expected {EXPECTED}"
            ) from None
        finally:
            if bars:
                datasets.enable_progress_bars()


def _part(name: Path, parts: Mapping[Any, Any], part: str) -> Any:
    """The part of a data set that was named, or the only one."""
    if part not in parts and (part or len(parts) > 1):
        raise UserError(
            f"{name} has the parts {', '.join(map(str, parts)) or 'none'}; expected one of them, e.g. "
            f"{name}:{next(iter(parts), 'train')}"
        )
    return parts[part] if part else next(iter(parts.values()))


def _files_of(path: Path, name: Path, part: str, cache: str) -> Iterator[tuple[int, Row]]:
    """The rows of a data set that is a folder of files, here or on the hub."""
    import datasets

    cache_options: Any = {"cache_dir": cache} if name.is_dir() else {}
    builder = datasets.load_dataset_builder(str(name), **cache_options)
    options: Any = builder.config
    kind = builder.name
    if kind not in ("csv", "json", "parquet"):
        parts: Any = datasets.load_dataset(str(name), **cache_options)
        yield from _arrow(_part(name, parts, part).with_format("arrow")[:], path)
        return
    default = type(options)()
    odd = [
        option.name
        for option in fields(options)
        if option.name not in PLAIN_OPTIONS and getattr(options, option.name) != getattr(default, option.name)
    ]
    if odd:
        raise UserError(
            f"{path} says in its README.md that its files are read with {odd[0]}, which an import doesn't know; name "
            "the files in place of the data set"
        )
    loader = datasets.DownloadManager(
        dataset_name=builder.dataset_name,
        data_dir=options.data_dir,
        download_config=datasets.DownloadConfig(**cache_options),
        base_path=builder.base_path,
    )
    files: Any = loader.download_and_extract({str(key): [*each] for key, each in options.data_files.items()})
    features = builder.info.features or {}
    classes = {
        column: feature.names for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)
    }
    number = 0
    for file in map(Path, loader.iter_files(_part(name, files, part))):
        if kind == "csv":
            rows = _csv(file, options.sep)
        elif kind == "json":
            rows = _json_file(file)
        else:
            rows = _parquet(file, classes)
        for _, row in rows:
            number += 1
            yield number, row
