"""What a waiting user sees on stderr.

On a terminal it is a bar with the time left; elsewhere a line for each finished stage, and one a minute while a stage
takes longer.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

EVERY = 60  # seconds between the lines of a stage if there is no terminal


class Progress:
    """Progress of one process; `position` is the terminal line of its bar when several processes draw one."""

    def __init__(self, quiet: bool = False, position: int = 0):
        self.quiet, self.position = quiet, position
        self.draws = sys.stderr.isatty() and not quiet
        self.began = time.monotonic()

    @contextmanager
    def bar(self, label: str, total: int | None = None) -> Iterator[Bar]:
        """A bar for one piece of work: call it with (done, total), or `add` to it."""
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
            yield Bar(bar, None if self.draws or self.quiet else label, total)

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
    """A tqdm bar: call it with how much is done in all, or `add` what is newly done.

    Args:
        label: of the lines that replace the bar, one a minute; if None, there are no lines.
    """

    def __init__(self, bar: Any, label: str | None, total: int | None):
        self._bar, self._label, self._total = bar, label, total
        self._done, self._first, self._doing = 0, 0, ""
        self._began = self._told = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        self._bar.total = self._total = total
        if not self._done:
            self._first = done - 1  # a resumed run's, of another day
        self.add(done - self._done)

    def label(self, text: str) -> None:
        """Say what is being done, if there is nothing to count."""
        self._doing = text
        self._bar.set_postfix_str(text)
        self._tell()

    def add(self, number: int) -> None:
        """Count what is newly done."""
        self._done += number
        self._bar.update(number)
        self._tell()

    def _tell(self) -> None:
        now = time.monotonic()
        if self._label is None or now - self._told < EVERY:
            return
        self._told = now
        print(f"  {self._label:24} {self._state(now - self._began)}", file=sys.stderr, flush=True)

    def _state(self, seconds: float) -> str:
        """How far the work is, and how long the rest will take at the pace so far."""
        if not self._done or not self._total:
            return f"{duration(seconds)} so far" + (f", {self._doing}" if self._doing else "")
        left = seconds * (self._total - self._done) / max(1, self._done - self._first)
        return f"{100 * self._done / self._total:.0f} % in {duration(seconds)}, about {duration(left)} left"


def duration(seconds: float) -> str:
    """Seconds as a person says them: 40 s, 3 min, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
