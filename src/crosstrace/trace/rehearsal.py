"""Counts the memory of a computation on PyTorch's fake tensors, which have shapes and types but no numbers.

Each storage that would have been allocated is counted, from the operation that makes it until its last tensor is gone.
Two things are not counted: the scratch memory inside a kernel, and what an allocator keeps for later.

Nothing here knows models.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Parts = dict[str, float]  # label of what is held -> bytes


class Rehearsal(TorchDispatchMode):
    """Within the context, counts the storages of fake tensors that operations make.

        with Rehearsal({"logits": lambda x: x.shape[-1:] == (vocabulary,)}) as seen:
            model(input_ids=ids).logits.sum().backward()
        seen.peak()                                  # {"logits": bytes, "other": bytes}, at the peak

    What was there before (the weights) is not counted.

    Args:
        labels: label -> whether a new tensor has it. A storage gets the first label that its first tensor has.
        pretending: the mode of a model in pieces, so that FSDP2's own buffers are fake too.
    """

    def __init__(
        self, labels: Mapping[str, Callable[[Tensor], bool]] | None = None, pretending: FakeTensorMode | None = None
    ) -> None:
        super().__init__()
        self._labels, self._pretending = dict(labels or {}), pretending
        self._alive: dict[int, int] = {}  # storage -> its number
        self._label: list[str] = []  # by number
        self._size: list[int] = []  # by number: bytes now
        self._events: list[tuple[int, int]] = []  # in order: number, bytes that were added (if negative: freed)
        self._marks: list[tuple[int, bool]] = [(0, True)]  # the event with which a part begins, and whether it counts

    def __enter__(self) -> Any:
        """Also watch `resize_`: FSDP2 frees and allocates storages with it while their tensors stay."""
        self._resize = resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            if storage._cdata in self._alive:
                self._set_size(self._alive[storage._cdata], size)
            return resize(storage, size)

        torch.UntypedStorage.resize_ = resized  # pyright: ignore[reportAttributeAccessIssue]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _GROUPED and isinstance(args[0], FakeTensor):
            result = args[0].new_empty(_grouped_shape(*args, **(kwargs or {})))
        elif func is torch.ops.aten.empty.memory_format and self._pretending is not None:
            with self._pretending:
                result = func(*args, **(kwargs or {}))
        else:
            result = func(*args, **(kwargs or {}))
        new = [x for x in tree_leaves(result) if isinstance(x, FakeTensor) and _storage(x) not in self._alive]
        if new:  # it may be a view, or the result of an operation in place: then an argument has the same storage
            old = {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, FakeTensor)}
            for x in new:
                if _storage(x) not in old and _storage(x) not in self._alive:
                    self._add(x)
        return result

    def _add(self, x: FakeTensor) -> None:
        storage, number, key = x.untyped_storage(), len(self._label), _storage(x)
        self._alive[key] = number
        self._label.append(next((name for name, fits in self._labels.items() if fits(x)), "other"))
        self._size.append(0)
        self._set_size(number, storage.nbytes())
        weakref.finalize(storage, self._remove, key, number).atexit = False

    def _remove(self, key: int, number: int) -> None:
        self._alive.pop(key, None)
        self._set_size(number, 0)

    def _set_size(self, number: int, size: int) -> None:
        self._events.append((number, size - self._size[number]))
        self._size[number] = size

    def name(self, x: Tensor | None, label: str) -> None:
        """Give the storage of a tensor another label, from its beginning on."""
        if isinstance(x, FakeTensor) and _storage(x) in self._alive:
            self._label[self._alive[_storage(x)]] = label

    def mark(self, counts: bool = True) -> None:
        """Begin a new part.

        Args:
            counts: whether `peaks` gives its peak.
        """
        self._marks.append((len(self._events), counts))

    def peak(self) -> Parts:
        """The bytes by label at the moment at which most bytes were held."""
        return self._peak(0, len(self._events))

    def peaks(self) -> list[Parts]:
        """`peak` of each part that counts."""
        ends = [*(start for start, _ in self._marks[1:]), len(self._events)]
        return [self._peak(start, stop) for (start, counts), stop in zip(self._marks, ends) if counts]

    def most(self, label: str) -> int:
        """The most bytes of one label that were held at once."""
        now = most = 0
        for number, size in self._events:
            now += size * (self._label[number] == label)
            most = max(most, now)
        return most

    def _peak(self, start: int, stop: int) -> Parts:
        now, most, end = 0, -1, 0
        for i, (_, size) in enumerate(self._events[:stop]):
            now += size
            if now > most and i >= start - 1:  # what was held when the part began counts too
                most, end = now, i + 1
        parts: Parts = defaultdict(float)
        for number, size in self._events[:end]:
            parts[self._label[number]] += size
        return {label: size for label, size in parts.items() if size}


_GROUPED = getattr(getattr(torch.ops.aten, "_grouped_mm", None), "default", None)


def _grouped_shape(a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> list[int]:
    """The shape of a grouped product of experts. (For fake tensors torch knows it in bf16 alone.)

    Two matrices give one product for each group of the dimension that they share."""
    if a.dim() == b.dim() == 2:
        assert offs is not None
        return [len(offs), a.shape[0], b.shape[1]]
    return [*a.shape[-3:-1], b.shape[-1]] if a.dim() == b.dim() else [a.shape[-2], b.shape[-1]]


def _storage(x: Tensor) -> int:
    """Identifies a tensor's storage as long as that lives. (A fake tensor has no address.)"""
    return x.untyped_storage()._cdata
