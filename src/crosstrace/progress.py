"""What a waiting user sees: a bar with time left on a terminal, else a line for each finished stage, on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Progress:
    """Progress of one process; `position` is the terminal line of its bar when several processes draw one."""

    def __init__(self, quiet: bool = False, position: int = 0):
        self.quiet, self.position = quiet, position
        self.draws = sys.stderr.isatty() and not quiet
        self.began = time.monotonic()

    @contextmanager
    def bar(self, label: str, total: int | None = None) -> Iterator[Bar]:
        """A bar for one piece of work; call it with (done, total), or `add` to it."""
        from tqdm import tqdm

        bar = tqdm(
            total=total,
            desc=f"{label:24}",
            position=self.position,
            leave=False,
            disable=not self.draws,
            dynamic_ncols=True,
        )
        with bar:
            yield Bar(bar)

    def note(self, text: str) -> None:
        """Say something that a stage found out, unless quiet."""
        if not self.quiet:
            from tqdm import tqdm

            tqdm.write(f"    {text}", file=sys.stderr)

    def done(self, label: str, seconds: float | None = None) -> None:
        """Say that a stage is complete, unless quiet."""
        if self.quiet:
            return
        from tqdm import tqdm

        took = time.monotonic() - self.began if seconds is None else seconds
        self.began = time.monotonic()
        tqdm.write(f"  {label:24} done in {took:6.1f} s", file=sys.stderr)


class Bar:
    """A tqdm bar that can be told where it stands, or how much was done."""

    def __init__(self, bar: Any):
        self._bar = bar

    def __call__(self, done: int, total: int) -> None:
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def label(self, text: str) -> None:
        """Say what is being done, where there is nothing to count."""
        self._bar.set_postfix_str(text)

    def add(self, number: int) -> None:
        self._bar.update(number)
