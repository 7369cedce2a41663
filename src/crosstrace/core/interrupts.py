"""Ctrl-C, SIGTERM and a closed terminal: one line and an exit status, at any moment of the command line.

A signal raises `Interrupted` in the main thread, wherever it is, so that every context manager cleans up. If the
process has not ended after PATIENCE seconds, a thread ends it: the main thread may wait inside a library, which runs no
Python code meanwhile. A run goes on with --resume even then. Where Python drops the exception (in a destructor, or in a
weak reference's callback), the signal is sent once more.

The command line imports this module before any other, so it imports only modules that load at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

PATIENCE = 5.0  # seconds to clean up in
_AGAIN = 0.01  # seconds until a signal whose exception was dropped is sent once more
WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "its terminal was closed"}
RESUMED = ("demo", "run", "study", "compare")  # commands that continue with --resume
_FROM_TERMINAL = (signal.SIGINT, signal.SIGHUP)  # these reach all processes that were started from it
_received: list[int] = []  # the signals that have come; the first counts
_holding = False
_is_told = False


class Interrupted(KeyboardInterrupt):
    """A signal that ends the process has come."""


def listen() -> None:
    """From now on, let the signals that end a process raise `Interrupted` in the main thread, which calls this."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in WORDS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup asks for
            signal.signal(number, _receive)
    sys.unraisablehook = _send_again
    threading.Thread(target=_end_after, args=(reader,), daemon=True).start()


def received() -> int | None:
    """The number of the first signal that has come; None if there was none."""
    return _received[0] if _received else None


def exit_code() -> int:
    """The exit status after the signal that has come, as shells count it.

    If no signal has come, the KeyboardInterrupt was raised in another way, and the status is that of Ctrl-C.
    """
    return 128 + (received() or signal.SIGINT)


def tell(command: str = "", place: str = "") -> None:
    """Say on stderr which signal has come and how to go on.

    Args:
        command: what is interrupted; by the process's arguments if not given.
        place: which process this is, if there are several.
    """
    global _is_told
    _is_told = True
    command = command or (sys.argv[1] if len(sys.argv) > 1 else "")
    way = "go on with --resume" if command in RESUMED else "give the same command again to go on"
    what = WORDS[signal.Signals(received() or signal.SIGINT)]
    with suppress(OSError, ValueError):  # its terminal may be gone
        sys.stderr.write(f"crosstrace: {place}{what}; {way}\n")
        sys.stderr.flush()


@contextmanager
def held_back() -> Iterator[None]:
    """Within the context, no signal raises; one that came is raised at its end.

    Processes that are started within it ignore the signals of their terminal: a process that still imports its modules
    would answer Ctrl-C with a traceback.
    """
    global _holding
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _FROM_TERMINAL)
    _holding = True
    try:
        yield
    finally:
        _holding = False
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if _received:
        raise Interrupted


def leave_to_leader() -> None:
    """In a worker process: ignore the terminal's signals, since the process that started this one ends it."""
    for number in _FROM_TERMINAL:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FROM_TERMINAL)


def _receive(number: int, frame: object) -> None:
    _received.append(number)
    if len(_received) == 1 and not _holding:  # a second one must not disturb the cleaning up
        raise Interrupted


def _send_again(dropped: sys.UnraisableHookArgs) -> None:
    """Send the signal once more if its exception was dropped; other dropped exceptions are told as always."""
    if not isinstance(dropped.exc_value, Interrupted):
        sys.__unraisablehook__(dropped)
        return
    number = _received[0]
    _received.clear()
    threading.Timer(_AGAIN, os.kill, (os.getpid(), number)).start()  # when the destructor has ended


def _end_after(reader: int) -> None:
    """End the process PATIENCE seconds after a signal, if it is still there."""
    while (number := os.read(reader, 1)[0]) not in WORDS:
        pass
    threading.Event().wait(PATIENCE)
    if not _received:  # the main thread has not come to run the handler
        _received.append(number)
    if not _is_told:
        tell()
    os._exit(exit_code())
