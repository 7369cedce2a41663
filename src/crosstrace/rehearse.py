"""What a computation holds in memory at once, found without its numbers: it is rehearsed on tensors that have none.

A model is made of PyTorch's fake tensors, which have shapes and types but no storage, and then really run: forward,
backward, under autocast. What is small and decides what happens (token ids, masks, labels) stays real. Each storage that
would have been allocated is counted from the operation that makes it until the last tensor on it is gone, so the peak
is that of the code as it is. Not seen: the scratch memory inside a kernel, and what an allocator keeps for later.

It knows models and tensors; it knows nothing of experiments.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def pretended(make: Callable[[], nn.Module]) -> Any:
    """The model that `make` makes, of fake tensors: nothing of its size is allocated."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return make()


class Rehearsal(TorchDispatchMode):
    """Within the context, counts the storages of fake tensors that operations make.

        with Rehearsal(labels={"logits": lambda x: x.shape[-1:] == (vocabulary,)}) as seen:
            model(input_ids=ids).logits.sum().backward()
        seen.peak()                                  # {"logits": bytes, "other": bytes}, at the fullest moment

    What was there before (the weights) is not counted.

    Args:
        labels: name -> whether a new tensor is of that kind; the first that says yes names its storage.
    """

    def __init__(self, labels: Mapping[str, Callable[[Tensor], bool]] | None = None) -> None:
        super().__init__()
        self._labels = dict(labels or {})
        self._alive: dict[int, int] = {}  # storage -> its number
        self._label: list[str] = []  # by number
        self._events: list[tuple[int, int]] = []  # number, bytes that came (or went, if negative), in order

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # in place, or a view: of a storage that was there before
        old = {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, FakeTensor)}
        for x in tree_leaves(result):
            if isinstance(x, FakeTensor) and _storage(x) not in self._alive and _storage(x) not in old:
                self._came(x)
        return result

    def _came(self, x: FakeTensor) -> None:
        storage, number = x.untyped_storage(), len(self._label)
        key, size = _storage(x), storage.nbytes()
        self._alive[key] = number
        self._label.append(next((name for name, fits in self._labels.items() if fits(x)), "other"))
        self._events.append((number, size))
        weakref.finalize(storage, self._went, key, number, size).atexit = False

    def _went(self, key: int, number: int, size: int) -> None:
        self._alive.pop(key, None)
        self._events.append((number, -size))

    def name(self, x: Tensor | None, label: str) -> None:
        """Give the storage of a tensor another label, also for the past."""
        if isinstance(x, FakeTensor) and _storage(x) in self._alive:
            self._label[self._alive[_storage(x)]] = label

    def peak(self) -> dict[str, int]:
        """Bytes by label at the moment at which most of them were held."""
        now = most = at = 0
        for i, (_, size) in enumerate(self._events):
            now += size
            if now > most:
                most, at = now, i
        found: dict[str, int] = defaultdict(int)
        for number, size in self._events[: at + 1] if most else ():
            found[self._label[number]] += size
        return {label: size for label, size in found.items() if size}


def _storage(x: Tensor) -> int:
    """What identifies a tensor's storage as long as that lives; a fake one has no address."""
    return x.untyped_storage()._cdata
