"""Tensors that lie in pieces on several processes, as FSDP2 leaves a model's parameters: their rows and their files.

Such a tensor is a `DTensor` of the whole shape, and each process holds some of its rows. Traces and sets of a sharded
model are made of them too, so no process ever holds a whole one. Only the layout of `fully_shard` is supported: rows in
equal parts (the last ones may be shorter, or empty) over one group of processes. It knows neither traces nor sets.

On disk they are a folder with one safetensors file for each process, and an index.json that says which file has which
rows. Any other number of processes can read the folder, and one process alone can write it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from crosstrace.core.errors import UserError
from crosstrace.core.files import read_json, replacing, write_json
from crosstrace.core.processes import Processes
from crosstrace.core.provenance import versions

INDEX = "index.json"


def at_rest(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters by name, those of a sharded model as DTensors.

    FSDP2 keeps some parameters whole after a forward without a backward. These would hide the pieces and their later
    changes, so the modules are sharded again first.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return dict(model.named_parameters())


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` was applied to the model or to a part of it."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def processes_of(tensors: Mapping[str, Tensor]) -> Processes | None:
    """The processes that hold the pieces of these tensors; None if the tensors are ordinary ones.

    Raises:
        UserError: only some of them are in pieces, or their layout is not one of rows over one group.
    """
    sharded = {name: x for name, x in tensors.items() if isinstance(x, DTensor)}
    if not sharded:
        return None
    if len(sharded) < len(tensors):
        odd = next(name for name in tensors if name not in sharded)
        raise UserError(
            f"'{odd}' is whole while other parameters are sharded; expected all of them, so apply fully_shard to the "
            "model itself too, not to its layers alone"
        )
    first = next(iter(sharded.values())).device_mesh
    for name, x in sharded.items():
        if x.device_mesh != first or len(x.placements) != 1 or x.placements[0] != Shard(0):
            raise UserError(
                f"'{name}' is laid out as {x.placements} over {x.device_mesh}; expected rows over one group of "
                "processes, as fully_shard does by itself (no tensor parallelism, no copies of the shards)"
            )
    return Processes(first.get_group())


def local(x: Tensor) -> Tensor:
    """What this process holds of x: its rows, or all of an ordinary tensor. Shares memory with x."""
    return x.to_local() if isinstance(x, DTensor) else x


def rows_of(size: int, rank: int, processes: int) -> tuple[int, int]:
    """First and last + 1 of the rows, out of `size`, that a process holds: torch.chunk's parts, then empty ones."""
    part = -(-size // processes)
    return min(rank * part, size), min((rank + 1) * part, size)


def own_rows(like: Tensor) -> tuple[int, int] | None:
    """The rows of a sharded tensor that this process holds; None if the tensor is an ordinary one."""
    if not isinstance(like, DTensor):
        return None
    mesh = like.device_mesh
    return rows_of(like.shape[0], mesh.get_local_rank(), mesh.size())


def laid(piece: Tensor, like: Tensor) -> Tensor:
    """This process's rows as a tensor of the shape and layout of `like`."""
    if not isinstance(like, DTensor):
        return piece
    return DTensor.from_local(
        piece, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=_stride(like.shape)
    )


def piece(x: Tensor, like: Tensor) -> Tensor:
    """What this process holds of x in the layout of `like`: the rows of a whole x, the piece of a sharded one.

    Raises:
        UserError: x is in pieces and `like` is not, or it is in other pieces.
    """
    rows = own_rows(like)
    if not isinstance(x, DTensor):
        return x if rows is None else x[rows[0] : rows[1]]
    if rows is None or not isinstance(like, DTensor):
        raise UserError(
            "a tensor in pieces on several processes was given for one that is whole; bring it together with "
            "`pieces.whole`, or load it without `like`"
        )
    if x.device_mesh != like.device_mesh or x.placements != like.placements:
        raise UserError("two tensors lie in pieces on other processes; expected the layout of one sharded model")
    return x.to_local()


def whole(x: Tensor) -> Tensor:
    """All of a tensor, on the CPU of every process."""
    return (x.full_tensor() if isinstance(x, DTensor) else x).cpu()


def _stride(shape: Iterable[int]) -> tuple[int, ...]:
    return torch.empty(tuple(shape), device="meta").stride()


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    processes: Processes | None,
    kind: str,
    header: Mapping[str, Any],
    pack: Callable[[Tensor], Tensor] = lambda x: x.contiguous(),
) -> None:
    """Write tensors to a folder, which appears whole or not at all. Each process writes a file with its rows.

    All processes that hold a piece call this, and they must see one file system.

    Args:
        path: the folder.
        processes: those that hold the pieces. If None, this process has the whole tensors and writes them alone.
        kind: what the folder holds; a reader names it to `Pieces`.
        header: JSON-able; process 0's is written.
        pack: from a piece to what is stored of it.

    Raises:
        UserError: a process could not write; nothing is left then.
    """
    rank, size = (0, 1) if processes is None else (processes.rank, processes.size)
    files = [f"{number:05d}-of-{size:05d}.safetensors" for number in range(1, size + 1)]
    with ExitStack() as stack:
        partial: Path | None = None
        if rank == 0:
            partial = stack.enter_context(replacing(path))
            partial.mkdir()
        folder = partial if processes is None else processes.from_first(partial)
        assert folder is not None
        failure = None
        try:
            pieces = {name: pack(local(x).detach().cpu()) for name, x in tensors.items()}
            save_file(pieces, folder / files[rank])
        except (OSError, SafetensorError) as error:
            failure = str(error)
        failures = [failure] if processes is None else processes.gathered(failure)
        failed = [(number, reason) for number, reason in enumerate(failures) if reason is not None]
        if failed:
            number, reason = failed[0]
            raise UserError(
                f"{path} could not be written by process {number}: {reason}; is the disk full, or not "
                "shared by all processes?"
            )
        if partial is not None:
            index = {
                "kind": kind,
                "header": header,
                "versions": versions(),
                "files": files,
                "tensors": {
                    name: {
                        "shape": list(x.shape),
                        "rows": [rows_of(x.shape[0], number, size) for number in range(size)],
                    }
                    for name, x in tensors.items()
                },
            }
            write_json(partial / INDEX, index)
    if processes is not None:
        processes.wait()  # no process may read the folder before it is there


class Pieces:
    """Reads what `write` wrote, in any number of processes.

    Raises:
        UserError: the folder is missing, damaged, or of another kind.
    """

    def __init__(self, path: str | os.PathLike[str], kind: str) -> None:
        self.path = Path(path)
        index = read_json(self.path / INDEX)
        if not isinstance(index, dict) or index.get("kind") != kind:
            raise UserError(f"{path} does not hold what was expected ({kind}); was another folder given in its place?")
        try:
            self.header: dict[str, Any] = dict(index["header"])
            self.shapes = {name: tuple(entry["shape"]) for name, entry in index["tensors"].items()}
            self._rows = {
                name: [(int(a), int(b)) for a, b in entry["rows"]] for name, entry in index["tensors"].items()
            }
            names = [str(name) for name in index["files"]]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{self.path / INDEX} can't be understood ({error!r}); it was edited or damaged") from None
        if any(Path(name).name != name for name in names):
            raise UserError(f"{self.path / INDEX} names files outside its folder; it was edited or damaged")
        self._files = [self.path / name for name in names]
        for name, rows in self._rows.items():
            ends = [0, *(b for _, b in rows)]
            if len(rows) != len(names) or [a for a, _ in rows] != ends[:-1] or ends[-1:] != [*self.shapes[name][:1]]:
                raise UserError(f"{self.path / INDEX} does not tell all rows of '{name}'; it was edited or damaged")

    def read(
        self,
        name: str,
        rows: tuple[int, int] | None = None,
        unpack: Callable[[Tensor, tuple[int, ...]], Tensor] | None = None,
    ) -> Tensor:
        """The tensor, or some of its rows.

        Args:
            unpack: from what is stored of a piece, and the piece's shape, to the piece; if None, it is stored as it is.
        """
        shape = self.shapes[name]
        start, stop = (0, shape[0]) if rows is None else rows
        parts = []
        for path, (first, last) in zip(self._files, self._rows[name]):
            low, high = max(start, first), min(stop, last)
            if low >= high and not (first == 0 and not parts and start >= stop):  # (an empty one still has a dtype)
                continue
            inside = slice(low - first, max(low, high) - first)
            try:
                with safe_open(path, framework="pt") as file:
                    if unpack is None:
                        parts.append(file.get_slice(name)[inside])
                    else:
                        parts.append(unpack(file.get_tensor(name), (last - first, *shape[1:]))[inside])
            except (SafetensorError, OSError, RuntimeError) as error:
                raise UserError(f"{path} can't be read ({error}); it is missing, truncated or damaged") from None
        tensor = torch.cat(parts)
        expected = (max(0, stop - start), *shape[1:])
        if tensor.shape != expected:
            raise UserError(
                f"'{name}' in {self.path} has shape {tuple(tensor.shape)}, and its index says {expected}; it is damaged"
            )
        return tensor
