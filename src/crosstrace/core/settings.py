"""How settings are read: unknown keys and values that are no numbers fail."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from pydantic import AfterValidator, ConfigDict
from pydantic_core import PydanticCustomError

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


def one_of(names: Collection[str]) -> Any:
    """For `Annotated[str, one_of(names)]`: one of some names, which are looked up when a value is checked."""

    def check(name: str) -> str:
        if name not in names:
            known = " or ".join(map(repr, names))
            raise PydanticCustomError("unknown_name", "input should be {known}", {"known": known})
        return name

    return AfterValidator(check)
