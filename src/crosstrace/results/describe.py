"""Write the description of results.json: docs/results-format.md's tables and a JSON Schema, made of the records.

    python -m crosstrace.results.describe docs

The page's words before and after the tables are its own; what stands between the two marks is replaced.
"""

from __future__ import annotations

import json
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from crosstrace.core.errors import UserError
from crosstrace.core.files import write_text
from crosstrace.results.results import Results
from crosstrace.results.study import StudyResults

PAGE = "results-format.md"
RECORDS = {"results": Results, "study-results": StudyResults}  # the name of a part of the page and of its schema
PLAIN = {float: "number", int: "integer", str: "text", bool: "true or false", Any: "any value", type(None): "null"}
COMMON = {  # what a name means in every table that does not say otherwise
    "part": "part of the examples, e.g. qa_ood",
    "when": "which trace: online, summed, final or checkpoints",
    "fraction": "share of the parameters, or of the nodes",
    "size": "parameters in the set",
    "layer": "number of the layer",
    "place": "place in the text: subject, relation or answer",
    "format": "format of the text: stored or recalled",
    "group": "group of places or of parameters",
    "unit": "query_head, kv_head, neuron, module or layer",
    "order": "how parameters or nodes are ranked",
    "node": "head or neuron, by layer and number",
    "nodes": "number of heads or neurons",
    "head": "layer and number of the head",
    "module": "layer and kind of the module",
    "arm": "alone: further training on new facts; replay: with old examples among them",
    "set": "the set of parameters: shared, or a control",
    "phase": "phase of training",
    "update": "number of updates made",
    "facts": "number of facts",
    "people": "number of people",
    "n": "number of answers",
    "parts": "parts of the trace, or of the questions, over which the jackknife goes",
    "exact_match": "share of answers that are right in every token",
    "first_token": "share of answers whose first token is right",
    "logprob": "mean log-probability of an answer, in nats",
    "low": "lower end of the 95 % interval",
    "high": "upper end",
    "mean": "mean over seeds",
    "seeds": "number of seeds",
    "setting": "a point of each axis of the study",
    "strategy": "which strategy",
    "measure": "dotted name of the measure",
    "rows": "names of the grid's rows",
    "columns": "names of the grid's columns",
    "values": "the grid, row by row",
    "relation": "which relation",
    "model": "which model",
}


def schema(record: type[BaseModel]) -> str:
    """The JSON Schema (draft 2020-12) of a file that holds this record, as text."""
    return json.dumps(record.model_json_schema(by_alias=True), indent=1, ensure_ascii=False) + "\n"


def tables(record: type[BaseModel]) -> str:
    """The fields of a record, and of each record in it, as Markdown: a heading and a table each."""
    parts = []
    for part in _records(record):
        lines = [f"### {part.__name__}", _text(part.__doc__), "", "| key | holds | meaning |", "|---|---|---|"]
        for name, field in part.model_fields.items():
            if name.removesuffix("_low").removesuffix("_high") != name and name.rpartition("_")[0] in part.model_fields:
                continue  # it stands with the value that it bounds
            interval = " with `_low`, `_high`" if f"{name}_low" in part.model_fields else ""
            optional = "" if field.is_required() else " (may be absent)"
            key = f"`{field.alias or name}`{interval}{optional}"
            lines.append(f"| {key} | {_kind(field.annotation)} | {_meaning(name, field)} |")
        extra = _further(part)
        if extra is not None:
            lines.append(f"| further keys | {_kind(extra)} | names that the run decides |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def page(text: str) -> str:
    """The page with its tables made anew.

    Raises:
        UserError: the page lacks the marks between which they stand.
    """
    for name, record in RECORDS.items():
        begin, end = f"<!-- {name}: made of the records -->\n", f"<!-- end of {name} -->\n"
        before, _, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not closed:
            raise UserError(f"{PAGE} lacks the marks of {name}; expected {begin.strip()!r} and {end.strip()!r}")
        text = before + begin + tables(record) + end + after
    return text


def _records(record: type[BaseModel]) -> list[type[BaseModel]]:
    """The record and all records inside it, each once, in the order in which one meets them."""
    met: dict[type[BaseModel], None] = {record: None}
    for part in list(met):
        for annotation in [*(f.annotation for f in part.model_fields.values()), _further(part)]:
            for inner in _inside(annotation):
                met |= dict.fromkeys(_records(inner))
    return list(met)


def _further(record: type[BaseModel]) -> Any:
    """What the keys hold that are no fields; None if the record has fields alone."""
    if record.model_config.get("extra") != "allow":
        return None
    extra = typing.get_type_hints(record).get("__pydantic_extra__")
    return typing.get_args(extra)[1] if typing.get_args(extra) else Any


def _inside(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _inside(argument)


def _kind(annotation: Any) -> str:
    """A type in words, e.g. "key → list of Overlap"."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(_kind(argument) for argument in arguments)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is tuple:
        return "list of " + " and ".join(dict.fromkeys(_kind(argument) for argument in arguments))
    if origin is list:
        return f"list of {_kind(arguments[0])}"
    if origin is dict:
        return f"key → {_kind(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    return PLAIN[annotation]


def _meaning(name: str, field: FieldInfo) -> str:
    """What a field says of itself, else what its records say, else what its name means everywhere."""
    if field.description:
        return _text(field.description)
    for record in _inside(field.annotation):
        return _text(record.__doc__)
    return COMMON.get(name, "–")


def _text(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


def write(folder: Path) -> None:
    """Write the page and the schemas of a folder of documentation anew."""
    write_text(folder / PAGE, page((folder / PAGE).read_text(encoding="utf-8")))
    for name, record in RECORDS.items():
        write_text(folder / f"{name}.schema.json", schema(record))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m crosstrace.results.describe FOLDER")
    write(Path(sys.argv[1]))
