"""The schema of results.json: what is written is read, what is wrong is told, and the docs describe it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sample_results import sample_results

from crosstrace.core.errors import UserError
from crosstrace.results import describe
from crosstrace.results.results import SCHEMA, Results
from crosstrace.results.study import StudyResults

DOCS = Path(__file__).parents[1] / "docs"


def test_what_is_read_is_written_again() -> None:
    values = sample_results()
    results = Results.of(values)
    assert json.loads(json.dumps(results.as_values())) == json.loads(json.dumps(values))
    assert results.shared["mixed"][0].overlap == values["shared"]["mixed"][0]["overlap"]
    assert {row.strategy for row in results.shared["mixed"]} == {"mixed"}


def test_an_attribute_that_there_is_not_is_an_error() -> None:
    row = Results.of(sample_results()).shared["mixed"][0]
    with pytest.raises(AttributeError):
        row.overlapp  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("schema", [0, SCHEMA + 1, "2", None])
def test_another_version_is_refused(schema: object, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(sample_results() | {"schema": schema}))
    with pytest.raises(UserError, match=rf"results\.json has schema .*reads 1 to {SCHEMA}"):
        Results.read(tmp_path)


def test_a_file_of_the_version_before_is_read() -> None:
    values = sample_results() | {"schema": 1}
    for name in ("tasks", "compare", "words"):
        values["run"].pop(name, None)
    assert Results.of(values).roles.outcome == "qa_ood"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values["shared"]["mixed"][3].update(overlapp=1.0), r"at shared\.mixed\.3\.overlapp, extra"),
        (lambda values: values["shared"]["mixed"][3].pop("overlap"), r"at shared\.mixed\.3\.overlap, field required"),
        (lambda values: values["claims"][0].update(effect="much"), r"at claims\.0\.effect, input should be a valid"),
        (lambda values: values.update(more={}), "at more, extra inputs"),
    ],
)
def test_what_is_not_of_the_format_is_told_with_its_place(change, message: str, tmp_path: Path) -> None:
    values = sample_results()
    change(values)
    (tmp_path / "results.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=message):
        Results.read(tmp_path)


def test_what_is_no_results_at_all_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"results\.json"):
        Results.read(tmp_path)
    (tmp_path / "results.json").write_text("[1]")
    with pytest.raises(UserError, match="holds a list; expected the results of a run"):
        Results.read(tmp_path)
    (tmp_path / "results.json").write_text('{"levels": []}')
    with pytest.raises(UserError, match="no study's results of this format: at study, field required"):
        StudyResults.read(tmp_path)
    (tmp_path / "results.json").write_text('{"schema": 3}')
    with pytest.raises(UserError, match="has schema 3; this version of crosstrace reads 1 to 2"):
        StudyResults.read(tmp_path)


def test_the_docs_describe_the_records() -> None:
    again = "made anew by: python -m crosstrace.results.describe docs"
    text = (DOCS / describe.PAGE).read_text(encoding="utf-8")
    assert describe.page(text) == text, again
    for name, record in describe.RECORDS.items():
        assert describe.schema(record) == (DOCS / f"{name}.schema.json").read_text(encoding="utf-8"), again
    assert "| – |" not in text, "every field is explained"
    with pytest.raises(UserError, match="lacks the marks of results"):
        describe.page("# another page\n")
