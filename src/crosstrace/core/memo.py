"""What was computed once and is kept for the next who asks."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any


class Memo:
    """Keeps what functions returned, each under a key, as long as the object lives."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, Any] = {}

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` returned when it was first called for this key."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]
