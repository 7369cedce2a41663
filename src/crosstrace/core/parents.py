"""A worker process that ends with the process that started it.

A worker of a run is prepared before it imports torch, so this module imports only modules that load at once.
"""

from __future__ import annotations

import os
import threading

from crosstrace.core import interrupts, machine


def start_worker(leader: int) -> None:
    """Make this process a worker of the process `leader`: it ends when the leader does.

    Args:
        leader: its process id.
    """
    end_with_parent(leader)
    interrupts.leave_to_leader()
    machine.prepare()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def end_with_parent(parent: int, until: threading.Event | None = None) -> None:
    """End this process within a second of its parent's end, however that ended, unless `until` is set before.

    Args:
        parent: process id, as the parent gave it: it may be gone before its child asks.
    """
    until = until or threading.Event()

    def watch() -> None:
        while not until.wait(0.25):
            if os.getppid() != parent:
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
