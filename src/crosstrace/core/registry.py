"""Records by name: those of the package, and those that other installed packages add.

A package adds records through an entry point of the group `crosstrace.extensions`, which names an object that holds
them: a list, or a function that returns one. Nothing that a setting or a file says is ever imported.

    [project.entry-points."crosstrace.extensions"]
    mine = "my_package:EXTENSIONS"          # EXTENSIONS = [Measure(...), Analysis(...), Stage(...)]

It knows nothing of what the records are for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache, cached_property
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from crosstrace.core.errors import UserError, did_you_mean

GROUP = "crosstrace.extensions"
Record = TypeVar("Record")


@cache
def extensions() -> tuple[object, ...]:
    """The records that installed packages add, in the order of the entry points' names.

    Raises:
        UserError: an entry point can't be loaded, or gives no list.
    """
    records: list[object] = []
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        about = f"the extension {point.name} ({point.value})"
        try:
            given: Any = point.load()
            given = given() if callable(given) else given
        except Exception as error:
            raise UserError(f"{about} can't be loaded: {type(error).__name__}: {error}; repair or remove it") from error
        if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
            raise UserError(f"{about} is a {type(given).__name__}; expected a list of records, or a function of one")
        records += given
    return tuple(records)


class Registry(Mapping[str, Record], Generic[Record]):
    """All records of one kind by their names, the package's own first.

    Args:
        kind: the class of the records, each of which has a `name`.
        built_in: where the package's own records are, as an entry point would name them: "module:attribute". They are
            imported when a record is first looked up. So settings can be checked against the names of records whose
            modules import the settings.
    """

    def __init__(self, kind: type[Record], built_in: str) -> None:
        self.kind, self._built_in = kind, built_in

    @cached_property
    def _records(self) -> dict[str, Record]:
        records: dict[str, Record] = {}
        module, _, attribute = self._built_in.partition(":")
        built_in: Iterable[Record] = getattr(import_module(module), attribute)
        added = [record for record in extensions() if isinstance(record, self.kind)]
        for record in [*built_in, *added]:
            name = record.name  # pyright: ignore[reportAttributeAccessIssue]
            if name in records:
                raise UserError(f"two extensions add a {self.kind.__name__} of the name {name!r}; remove one of them")
            records[name] = record
        return records

    def __getitem__(self, name: str) -> Record:
        if name not in self._records:
            raise UserError(self.unknown(name))
        return self._records[name]

    def __contains__(self, name: object) -> bool:
        return name in self._records

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def unknown(self, name: str) -> str:
        """The sentence of an error about a name that no record has."""
        hint = did_you_mean(name, self, f"expected of {', '.join(self)}")
        return f"unknown {self.kind.__name__.lower()} {name!r}; {hint}, or is the package that adds it not installed?"
