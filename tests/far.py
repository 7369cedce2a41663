"""A device that is not there: tensors on it compute as the CPU's do, but mix with none of the CPU's.

    with far_away():
        model.to(FAR)

As on a GPU, an operation on tensors of two devices is an error (a CPU's number without dimensions and CPU indices
aside), and so is numpy's view of one. It shows which `.to(device)` lacks where there is no GPU; it knows no kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

FAR = torch.device("privateuseone", 0)
aten = torch.ops.aten


class _Module:
    """What torch asks of a device's own module before it makes anything there."""

    is_available = staticmethod(lambda: True)
    is_initialized = staticmethod(lambda: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    _lazy_init = staticmethod(lambda: None)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    manual_seed_all = staticmethod(lambda seed: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.float16, torch.bfloat16])


_CROSS = (aten._to_copy.default, aten.copy_.default)
_INDEXED = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._unsafe_index.Tensor)


class Far(Tensor):
    """A CPU tensor that says it is elsewhere."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> Far:
        made: Any = Tensor._make_wrapper_subclass(  # pyright: ignore
            cls, near.size(), strides=near.stride(), storage_offset=near.storage_offset(), dtype=near.dtype,
            layout=near.layout, device="cpu", requires_grad=False,
        )  # fmt: skip
        made.near = near
        return made

    @property
    def device(self) -> torch.device:  # (torch's C++ takes it for one on the CPU: there is nothing to guard)
        return FAR

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device is None or device == FAR:
            return self if dtype in (None, self.dtype) else super().to(dtype)
        return aten._to_copy.default(self, dtype=dtype or self.dtype, device=device)

    def cpu(self) -> Tensor:
        return self.to("cpu")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Far({self.near!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


def _computed(func: Any, args: Any, kwargs: Any) -> Any:
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    far = any(isinstance(x, Far) for x in tensors)
    alone = [x for x in tensors if not isinstance(x, Far) and x.dim() and not hasattr(x, "anywhere")]
    if far and alone and func not in _CROSS + _INDEXED:
        raise RuntimeError(f"{func}: tensors on {FAR} and on the CPU, of shape {tuple(alone[0].shape)}")
    if func in _INDEXED and far and not isinstance(args[0], Far):
        raise RuntimeError(f"{func}: a CPU tensor with indices on {FAR}")
    device = _asked(args, kwargs)
    to = device if device is not None else FAR if far else torch.device("cpu")
    near_args, near_kwargs = tree_map_only(Far, lambda x: x.near, (args, kwargs))
    near_args, near_kwargs = tree_map_only(torch.device, lambda x: torch.device("cpu"), (near_args, near_kwargs))
    out = func(*near_args, **near_kwargs)
    if func is aten.copy_.default:
        return args[0]
    if to.type == "cpu":
        return out
    # a view in inference mode of a tensor that is not of it is none either
    view = any(a.alias_info is not None for a in func._schema.returns)
    outside = view and any(isinstance(x, Far) and not x.is_inference() for x in tensors)
    with torch.inference_mode(False) if outside else nullcontext():
        wrapped = tree_map_only(Tensor, Far, out)
        return return_and_correct_aliasing(func, args, kwargs, wrapped) if far else wrapped


def _asked(args: Any, kwargs: Any) -> torch.device | None:
    """The device that an operation's result is to be on, where that is said."""
    return next((x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.device)), None)


class _Away(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        far = any(isinstance(x, Far) for x in tree_leaves((args, kwargs)))
        if far or _asked(args, kwargs) == FAR:
            return _computed(func, args, kwargs)
        if func is aten._efficientzerotensor.default:  # (of forward-mode differentiation, in C++: it knows no far)
            zeros: Any = torch.zeros(args[0], dtype=kwargs.get("dtype"))
            zeros.anywhere = True
            return zeros
        return func(*args, **kwargs)


class _Made(TorchFunctionMode):
    """torch.tensor and torch.as_tensor go past the dispatcher, and where another tensor is, C++ can't see."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and device is not None and torch.device(device).type == FAR.type:
            return func(*args, **{**kwargs, "device": "cpu"}).to(FAR)
        if func is Tensor.to and len(args) > 1 and isinstance(args[1], Far):
            return args[0].to(FAR, args[1].dtype)
        return func(*args, **kwargs)


@contextmanager
def far_away() -> Iterator[torch.device]:
    """Within the context, there is such a device."""
    if not hasattr(torch, FAR.type):
        torch._register_device_module(FAR.type, _Module)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # or tied tensors would be two
    try:
        with _Made(), _Away():
            yield FAR
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
