"""A phase's checkpoints on disk: which are complete, which one is the last, and reading the weights of one.

A checkpoint is complete once everything lies in it: weights, optimiser, and the states of the listeners.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from crosstrace.core.files import remove, remove_folder
from crosstrace.core.pieces import at_rest, is_sharded, local
from crosstrace.core.processes import Processes
from crosstrace.models import adapters
from crosstrace.models.loading import load_model
from crosstrace.models.modes import silent
from crosstrace.training import optimisers

COMPLETE = "complete"  # the file that marks a complete checkpoint


def checkpoint_folder(folder: Path, update: int) -> Path:
    """The checkpoint after so many updates of the phase with this folder, as the Trainer calls it."""
    return folder / f"checkpoint-{update}"


def listener_folder(folder: Path, update: int, number: int) -> Path:
    """Where the listener of this number keeps its state in a checkpoint."""
    return checkpoint_folder(folder, update) / f"listener-{number}"


def last_checkpoint(folder: Path) -> int | None:
    """The update of the last complete checkpoint; None if there is none."""
    updates = _list_updates(folder)
    return updates[-1] if updates else None


def remove_checkpoints(folder: Path, keep: bool) -> None:
    """Remove what no resume needs: checkpoints whose writing was interrupted, and all before the last complete one.

    Args:
        keep: keep those before the last one, without their optimisers.
    """
    for update in _list_updates(folder, complete=False):
        remove_folder(checkpoint_folder(folder, update))
    for update in _list_updates(folder)[:-1]:
        checkpoint = checkpoint_folder(folder, update)
        remove_folder(checkpoint / optimisers.FOLDER if keep else checkpoint)
    for leftover in folder.glob("**/.removed-*"):  # a kill may have interrupted such a removal
        remove(leftover)


def load_weights(model: Any, checkpoint: Path, processes: Processes | None) -> None:
    """Put a checkpoint's weights into the model.

    transformers reads them: a checkpoint may lay tensors out in another way than memory does, or be in shards.
    """
    if adapters.is_adapted(model):
        return adapters.load_weights(model, checkpoint)
    if is_sharded(model):
        dtype = str(model.dtype).removeprefix("torch.")
        saved = at_rest(load_model(str(checkpoint), dtype, processes=processes))
        for name, p in at_rest(model).items():
            local(p.data).copy_(local(saved[name].data))
        return
    with silent():
        saved = type(model).from_pretrained(checkpoint, dtype=model.dtype, use_safetensors=True)
    model.load_state_dict(saved.state_dict())


def _list_updates(folder: Path, complete: bool = True) -> list[int]:
    """The updates of the complete checkpoints, or of the others, in order."""
    return sorted(
        int(checkpoint.name.rpartition("-")[2])
        for checkpoint in folder.glob("checkpoint-*")
        if (checkpoint / COMPLETE).exists() == complete
    )
