"""What all tables of results have in common: strict records whose fields explain themselves.

A record refuses a key that it does not have, so a misspelt key is an error where it is written, and an attribute that
there is not is an error where it is read. It knows no single table.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError

from crosstrace.core.errors import UserError
from crosstrace.core.files import read_json

Number = float | None  # None: undefined, e.g. a mean over nothing


class Record(BaseModel):
    """A record of results.json. Fields that were not measured are not written."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), ser_json_inf_nan="constants"
    )

    def as_values(self) -> dict[str, Any]:
        """Plain values, as results.json holds them: what was never given is left out."""
        return self.model_dump(exclude_unset=True)


class ResultsFile(Record):
    """A record that is a file of its own, with the version of its format."""

    what: ClassVar[str]
    """What such a file is called in an error."""
    newest: ClassVar[int]
    """The version that this one of crosstrace writes; it reads all from 1."""

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str = "results") -> Self:
        """Results of plain values, as the file holds them.

        Raises:
            UserError: they are not of this format; the sentence says what is wrong and `where`.
        """
        version = values.get("schema", cls.newest)
        if not isinstance(version, int) or not 1 <= version <= cls.newest:
            raise UserError(
                f"{where} has schema {version!r}; this version of crosstrace reads 1 to {cls.newest}. A newer version "
                "wrote it? Read it with that one"
            )
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(step) for step in first["loc"])
            raise UserError(
                f"{where} holds no {cls.what} of this format: at {name}, {first['msg'][0].lower()}{first['msg'][1:]}; "
                "expected what docs/results-format.md describes. Was it edited, or written by an early version?"
            ) from None

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read `results.json`, or the one in a folder.

        Raises:
            UserError: there is none, or it is damaged or of another format.
        """
        path = Path(path)
        path = path / "results.json" if path.is_dir() else path
        values = read_json(path)
        if not isinstance(values, dict):
            raise UserError(f"{path} holds a {type(values).__name__}; expected the {cls.what}")
        return cls.of(values, str(path))

    def as_values(self) -> dict[str, Any]:
        """Plain values, as the file holds them."""
        return self.model_dump(by_alias=True, exclude_unset=True)


class Row(Record):
    """A row of a table that each model has of its own."""

    _of: str = PrivateAttr("")  # which model's

    named: ClassVar[str] = "strategy"
    """What the column with the model's name is called beside the row's own."""

    @property
    def strategy(self) -> str:
        """The model whose row it is: a strategy, or a given model."""
        return self._of

    @property
    def model(self) -> str:
        """The model whose row it is, `base` included."""
        return self._of

    def set_owner(self, name: str) -> None:
        """Say whose row it is."""
        self._of = name

    def as_row(self) -> dict[str, Any]:
        """The row as a table has it, with the model's name first and without the values of single facts."""
        return {self.named: self._of} | self.model_dump(exclude_unset=True, exclude={"by_person"})


class ModelRow(Row):
    """A row of a table that the base has too."""

    named: ClassVar[str] = "model"


class Open(BaseModel):
    """A record with further keys, whose names the run decides: parts of the examples, or measures."""

    model_config = ConfigDict(extra="allow")

    @property
    def rest(self) -> dict[str, Any]:
        """The further keys with their values."""
        return self.__pydantic_extra__ or {}
