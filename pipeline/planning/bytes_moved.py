"""The bytes that kernels read and write, counted at torch's operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.synthesis import partition
from pipeline.synthesis.kernels import Kernel, form_, gate_

VIEWS = "as_strided view _unsafe_view alias detach slice select narrow unbind split t transpose expand unsqueeze"
ALLOCATIONS = "empty empty_like empty_strided new_empty new_empty_strided resize_ lift_fresh resolve_conj"
NO_KERNEL = {f"aten::{name}" for name in (*VIEWS.split(), *ALLOCATIONS.split())}
OVERWRITE = {"aten::copy_", "aten::fill_", "aten::zero_", "aten::_foreach_copy_"}  # do not read what they write
GATHERS = {
    "aten::index_select",
    "aten::index",
    "aten::gather",
}  # read as many elements of the first argument as they write


class BytesMoved(TorchDispatchMode):
    """Adds up, while it is active, the bytes of the arguments and of the results of every operation that has a kernel.

    Each operation is taken to read each of its different arguments once and to write its results once, whatever a cache
    keeps. A compiled kernel reads its arguments and writes its results, and nothing between. Collectives, which are no
    operations of ATen, do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self,
        func: Any,  # an OpOverload
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        named = kwargs or {}
        result = func(*args, **named)
        schema = func._schema
        if func.namespace != "aten" or func.is_view or schema.name in NO_KERNEL:
            return result
        read, written = list[Tensor](), tensors(result)
        for number, argument in enumerate(schema.arguments):
            value = args[number] if number < len(args) else named.get(argument.name)
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if is_written:
                written += tensors(value)
            if not (is_written and (argument.is_out or schema.name in OVERWRITE)):
                read += tensors(value)
        writes = size(written)
        if schema.name in GATHERS:
            source, *rest = read
            self.total += writes + min(size([source]), writes) + size(rest)
        else:
            self.total += writes + size(read)
        return result

    @contextmanager
    def through_compiled(self) -> Iterator[None]:
        """Be active, and count compiled kernels of the synthesis from the outside: there is nothing else to see."""
        original = partition.compiled

        def compiled(function: Kernel, *settings: Any) -> Callable[..., Tensor]:
            fast = original(function, *settings)

            def count(*blocks: Tensor) -> Tensor:
                self.__exit__(None, None, None)
                try:
                    sums = fast(*blocks)
                finally:
                    self.__enter__()
                overwritten = blocks[1:2] if function in (gate_, form_) else ()
                self.total += size(blocks) + size([sums, *overwritten])
                return sums

            return count

        partition.compiled = compiled
        try:
            with self:
                yield
        finally:
            partition.compiled = original


def tensors(value: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def size(some: Sequence[Tensor]) -> int:
    """Bytes of the different tensors among them; an expanded one has those that lie in memory."""
    found = dict[tuple[object, ...], int]()
    for tensor in some:
        numel = 1
        for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
            numel *= length if stride or not length else 1
        found[tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()] = numel * tensor.itemsize
    return sum(found.values())
