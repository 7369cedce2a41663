"""Locks of a run folder: one leader at a time, and no worker of an earlier one."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import IO

from crosstrace.core.errors import UserError

WORKERS_PATIENCE = 30.0  # seconds given to the workers of a killed process to notice and end


def lock_folder(folder: Path) -> IO[str]:
    """Hold `folder` alone; the lock ends with the process, however it ends."""
    busy = UserError(
        f"{folder} is in use by another crosstrace process; wait for it, stop it, or choose another folder"
    )
    try:
        (folder / "manifest").mkdir(parents=True, exist_ok=True)
        lock = open(folder / "manifest" / "lock", "a")  # noqa: SIM115  (held open as long as the run is)
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}); choose another folder") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(lock.fileno()), os.stat(lock.name)):
            raise busy  # the folder was replaced while we opened it
    except OSError:
        lock.close()
        raise busy from None
    except UserError:
        lock.close()
        raise
    return lock


def lock_workers(folder: Path, kind: int, patience: float) -> IO[str]:
    """Hold the second lock: workers share it while they live, and a new leader takes it to know that they are gone."""
    lock = open(folder / "manifest" / "workers", "a")  # noqa: SIM115
    until = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
            return lock
        except OSError:
            if time.monotonic() >= until:
                lock.close()
                raise UserError(
                    f"{folder} is still written to by a worker of an earlier crosstrace process; stop it and try again"
                ) from None
        time.sleep(0.1)
