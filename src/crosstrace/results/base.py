"""What all tables of results have in common: strict records whose fields explain themselves.

A record refuses a key that it does not have, so a misspelt key is an error where it is written, and an attribute that
there is not is an error where it is read. It knows no single table.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, PrivateAttr

Number = float | None  # None: undefined, e.g. a mean over nothing


class Record(BaseModel):
    """A record of results.json. Fields that were not measured are not written."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), ser_json_inf_nan="constants"
    )

    def as_values(self) -> dict[str, Any]:
        """Plain values, as results.json holds them: what was never given is left out."""
        return self.model_dump(exclude_unset=True)


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
