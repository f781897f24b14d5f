"""A device that only pretends, for what must be true on a GPU and can be seen without one.

Its tensors lie in the memory of the CPU and behave otherwise as those of an accelerator do: an operation that is given
one of them and a tensor of the CPU fails, and what makes the host wait is counted. Registering a device changes torch
for the whole process, so a test that uses this starts a process of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend as register

NAME = "pretended"
DEVICE = torch.device("cpu")  # that device, once `start` has registered it
READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero")  # the host waits for a value

waits: list[str] = []  # what made the host wait, in order
pinned: list[torch.UntypedStorage] = []  # alive, so that no other tensor gets their addresses


def start() -> torch.device:
    global DEVICE
    register(NAME)
    DEVICE = torch.device(NAME, 0)
    return DEVICE


class OnDevice(torch.Tensor):
    """A tensor of the device, around one of the CPU."""

    host: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
            requires_grad=inner.requires_grad,
        )
        made.host = inner
        return made

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.host.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Pretended(TorchDispatchMode):
    """Inside it, what is made on the device, or copied to it, is."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operation on the tensors inside; what it makes is on the device if its arguments are, or if it is told.

    Raises:
        RuntimeError: it is given tensors of both.
    """
    name = func._schema.name
    if name == "aten::_pin_memory":
        copy = args[0].clone()
        pinned.append(copy.untyped_storage())
        return copy
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    own = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    others = [tensor for tensor in tensors if not isinstance(tensor, OnDevice)]
    host_args, host_kwargs = tree_map(lambda leaf: leaf.host if isinstance(leaf, OnDevice) else leaf, (args, kwargs))
    on_device = bool(own)
    if name in ("aten::_to_copy", "aten::copy_", "aten::_foreach_copy_"):
        if name == "aten::_to_copy":
            on_device = kwargs.get("device", DEVICE if own else None) == DEVICE
        else:
            on_device = isinstance(tree_flatten(args[0])[0][0], OnDevice)
        asynchronous = bool(kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        places = {storage.data_ptr() for storage in pinned}
        is_pinned = all(tensor.untyped_storage().data_ptr() in places for tensor in others)
        if (own and not on_device) or (on_device and others and not (asynchronous and is_pinned)):
            waits.append(f"{name} {[tuple(tensor.shape) for tensor in tensors]}")
    elif own and any(tensor.dim() for tensor in others):  # a CPU tensor without dimensions is a number
        raise RuntimeError(f"{name}: {[tuple(tensor.shape) for tensor in others]} of the CPU, with tensors of {NAME}")
    elif own and name in READS:
        waits.append(name)
    elif "device" in kwargs:
        on_device = kwargs["device"] == DEVICE
    if "device" in host_kwargs:
        host_kwargs["device"] = torch.device("cpu")
    made = func(*host_args, **host_kwargs)
    if func._schema.is_mutable and name.endswith("_"):  # in place
        return None if made is None else next(iter(args))
    return tree_map(lambda leaf: OnDevice(leaf) if on_device and isinstance(leaf, Tensor) else leaf, made)
