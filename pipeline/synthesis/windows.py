"""Flat windows: lists of tensors as one vector, cut in parts of equal length whatever the tensors, and sums by tensor.

The number of kernels then depends on the length of the vector, not on the number of tensors in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 256  # elements that are added up first; a window is a matrix [blocks, BLOCK]
COMPILED = {"cpu": 2**20, "accelerator": 2**24}  # elements of a window of a compiled kernel, which has no temporaries


def compiled_window(device: torch.device) -> int:
    return COMPILED["cpu" if device.type == "cpu" else "accelerator"]


def eager_window(device: torch.device) -> int:
    """Elements of a window: the temporaries fit the cache of a CPU, and are small beside a partition on a GPU."""
    return 2**15 * max(torch.get_num_threads(), 4) if device.type == "cpu" else 2**22


def join_neighbours(tensors: Sequence[Tensor]) -> list[Tensor]:
    """1-D views of the same elements in the same order, where tensors that follow each other in memory are one."""
    groups: list[list[int]] = []  # first tensor, number of elements
    end = limit = -1  # addresses: where the present group ends, and its storage
    for number, tensor in enumerate(tensors):
        numel, address = tensor.numel(), tensor.data_ptr()
        if not numel:
            continue
        if address == end < limit and tensor.is_contiguous():
            groups[-1][1] += numel
        else:
            groups.append([number, numel])
            storage = tensor.untyped_storage()
            limit = storage.data_ptr() + storage.nbytes() if tensor.is_contiguous() else -1
        end = address + numel * tensor.itemsize
    # The stride of a single element may be any number, so it is not read.
    strides = [(1,) if tensors[first].is_contiguous() else tensors[first].stride() for first, _ in groups]
    return [tensors[first].as_strided((n,), stride) for (first, n), stride in zip(groups, strides, strict=True)]


def cut(tensors: Sequence[Tensor], sizes: Sequence[int]) -> Iterator[list[Tensor]]:
    """The vector that the tensors make up, in windows of the given sizes: for each a list of views."""
    rest = iter(join_neighbours(tensors))
    tensor, start = torch.empty(0), 0
    for size in sizes:
        window = []
        while size:
            if start == len(tensor):
                tensor, start = next(rest), 0
            length = min(size, len(tensor) - start)
            window.append(tensor.narrow(0, start, length))
            start, size = start + length, size - length
        yield window


def read(parts: list[Tensor], device: torch.device) -> Tensor:
    """One window on `device`: a view if it is one part that is there, else a copy."""
    there = [part.to(device, non_blocking=True) for part in parts]  # before they are joined, which pins no memory
    return there[0] if len(there) == 1 else torch.cat(there)


def write(parts: Sequence[Tensor], vector: Tensor) -> None:
    """Copy the window `vector` to its parts, whatever their dtype and device."""
    copy_all_(parts, vector.split([len(part) for part in parts]))


def copy_all_(places: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy tensors to others, without waiting for it; a GPU does it in a few kernels."""
    if places:
        torch._foreach_copy_(tuple(places), tuple(values), non_blocking=True)  # pyright: ignore[reportPrivateImportUsage]


class Shared(NamedTuple):
    """The blocks of a window that several segments share: a part for each, and how all parts are added up."""

    block: Tensor  # [parts] index of the block
    start: Tensor  # [parts, 1] first element in it
    end: Tensor  # [parts, 1] element after the last
    order: Tensor  # [atoms] index of a whole block, or number of blocks + index of a part, in the order of the elements
    atoms: Tensor  # [segments] how many of those each segment has


class Segments(NamedTuple):
    """The tensors, or parts of tensors, in one window, in the order of its elements."""

    rows: list[int]  # [segments] of the table
    rows_on_device: Tensor  # [segments] the same
    lengths: Tensor  # [segments] elements of each
    numel: int
    compiled: bool
    shared: Shared | None  # None: there is one segment

    def sums(self, plain: Callable[..., Tensor], fast: Callable[..., Tensor], *blocks: Tensor) -> Tensor:
        """[columns, segments] sums over each segment of the window whose vectors are `blocks`, by `to_blocks`.

        `plain` gives [columns, n] sums of the rows of matrices [n, BLOCK]. Where they are all 0 it must give 0. It
        may overwrite them. `fast` gives the same of all blocks of the window.
        """
        if self.shared is None:
            return fast(*blocks).sum(1, keepdim=True)
        block, start, end, order, atoms = self.shared
        column = torch.arange(BLOCK, device=start.device)
        inside = (column >= start) & (column < end)
        parts = plain(*(torch.where(inside, matrix.index_select(0, block), 0) for matrix in blocks))
        return sum_runs(torch.cat([fast(*blocks), parts], 1).index_select(1, order), atoms)

    def spread(self, values: Tensor) -> Tensor:
        """[numel] from one value a segment."""
        return torch.repeat_interleave(values, self.lengths, output_size=self.numel)


class Plan(NamedTuple):
    windows: list[Segments]
    by_row: Tensor  # [segments of all windows] their order by row
    counts: Tensor  # [rows] segments of each row

    def rows(self, sums: Sequence[Tensor]) -> Tensor:
        """[columns, rows] from the sums of each window."""
        return sum_runs(torch.cat(list(sums), 1).index_select(1, self.by_row), self.counts)


def to_blocks(vector: Tensor) -> Tensor:
    """[blocks, BLOCK] a view, or a copy with zeros behind a length that is no multiple of BLOCK."""
    return F.pad(vector, (0, -len(vector) % BLOCK)).view(-1, BLOCK) if len(vector) % BLOCK else vector.view(-1, BLOCK)


def sum_runs(values: Tensor, lengths: Tensor) -> Tensor:
    """[columns, runs] sums of neighbouring columns, always in the same order (`index_add_` on a GPU has none)."""
    columns = len(values)
    # One dimension: on a GPU each run is then added up by a block of threads, else by a single thread.
    flat = torch.segment_reduce(
        values.flatten(), "sum", lengths=lengths.repeat(columns), unsafe=True, initial=0.0
    )  # unsafe: without a check that would read `lengths` from the device
    return flat.view(columns, -1)


@lru_cache(maxsize=8)
def plan(rows: tuple[int, ...], sizes: tuple[int, ...], num_rows: int, device: torch.device, compiled: bool) -> Plan:
    """How to cut tensors of these sizes, one after another, in windows; the same layout is planned once.

    Args:
        rows: [tensors] of the table, each may occur several times.
        sizes: [tensors] elements of each.
        num_rows: of the table.
        device: where the computation runs.
        compiled: the windows of size `compiled_window` have a compiled kernel; only the rest is cut smaller.
    """
    row, numels = (torch.tensor(column, dtype=torch.int64) for column in (rows, sizes))
    row, numels = row[numels > 0], numels[numels > 0]
    ends, total = numels.cumsum(0), sum(sizes)
    starts = ends - numels
    windows, all_rows = [], []
    low = 0
    while low < total:
        large = compiled and total - low >= compiled_window(device)
        numel = compiled_window(device) if large else min(eager_window(device), total - low)
        first, last = int(torch.searchsorted(ends, low, right=True)), int(torch.searchsorted(starts, low + numel))
        here, local = row[first:last], (starts[first:last] - low).clamp_min(0)
        lengths = torch.diff(local, append=torch.tensor([numel]))
        shared = _shared(local, numel, device) if len(here) > 1 else None
        windows.append(
            Segments(here.tolist(), to_device(device, here), to_device(device, lengths), numel, large, shared)
        )
        all_rows.append(here)
        low += numel
    segments = torch.cat([row[:0], *all_rows])
    return Plan(
        windows,
        to_device(device, segments.argsort(stable=True)),
        to_device(device, torch.bincount(segments, minlength=num_rows)),
    )


def _shared(starts: Tensor, numel: int, device: torch.device) -> Shared:
    cuts = torch.unique(torch.cat([torch.arange(0, numel, BLOCK), starts]))  # where an atom begins, sorted
    ends = torch.cat([cuts[1:], torch.tensor([numel])])
    block = cuts // BLOCK
    several = torch.bincount(block)[block] > 1
    order = torch.where(several, int(block[-1]) + several.cumsum(0), block)
    start, end = cuts - block * BLOCK, ends - block * BLOCK
    atoms = torch.bincount(torch.searchsorted(starts, cuts, right=True) - 1, minlength=len(starts))
    return Shared(
        to_device(device, block[several]),
        to_device(device, start[several, None]),
        to_device(device, end[several, None]),
        to_device(device, order),
        to_device(device, atoms),
    )


def to_device(device: torch.device, tensor: Tensor) -> Tensor:
    """On `device`, without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type != "cpu" else tensor
