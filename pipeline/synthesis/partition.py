"""What one rank has of the gradients: pieces of parameters, as vectors in windows."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.synthesis.adam import AdamState
from pipeline.synthesis.kernels import Kernel, compiled, compute_dtype, form_, gate_
from pipeline.synthesis.windows import Segments, cut, plan, read, to_blocks, to_device, write


class Piece(NamedTuple):
    """The part of one parameter's two gradients that this rank has: 1-D tensors of equal length and dtype.

    `forget` and `average` may be in host memory; the computation runs on the device of `retain`.
    """

    row: int  # index of the parameter
    forget: Tensor  # [n]
    retain: Tensor  # [n]; becomes the combined gradient
    average: Tensor | None = None  # [n] for rules that average the retain gradient: the state m, updated in place
    start: int = 0  # for rules that draw: the number that the first element has among all elements of the model
    adam: AdamState | None = None  # for Adam's metric; None before the optimizer's first step


class Partition:
    """Lists of 1-D tensors of one rank, each list as one vector in windows, on the device of the second list.

    Args:
        rows: of each tensor, the index of its parameter.
        vectors: two lists or more, of tensors of equal lengths.
        num_rows: number of parameters.
        starts: of each tensor, the number of its first element among all elements of the model.
        is_large: a compiled kernel pays for the time to compile it.
    """

    def __init__(
        self,
        rows: Sequence[int],
        vectors: Sequence[Sequence[Tensor]],
        num_rows: int,
        *,
        starts: Sequence[int] = (),
        is_large: bool = False,
    ) -> None:
        self.vectors, self.is_large = vectors, is_large
        sizes = tuple(map(len, vectors[1]))
        self.ends = list(accumulate(sizes))
        self.starts = [start + size - end for start, size, end in zip(starts, sizes, self.ends, strict=False)]
        sample = vectors[1][0] if vectors[1] else torch.empty(0)
        self.device, self.compute_dtype = sample.device, compute_dtype(sample)
        self.plan = plan(tuple(rows), sizes, num_rows, self.device, is_large)

    def __iter__(self) -> Iterator[tuple[Segments, list[list[Tensor]], list[Tensor]]]:
        """Of each window: its segments; the parts of each vector, where they lie; the vectors, on the device."""
        sizes = [segments.numel for segments in self.plan.windows]
        for segments, *parts in zip(self.plan.windows, *(cut(vector, sizes) for vector in self.vectors), strict=True):
            yield segments, parts, [read(part, self.device) for part in parts]

    def sums(
        self,
        kernel: Kernel,
        *constants: Hashable,
        draw: Callable[[Tensor], Tensor] | None = None,
        keep_retain: bool = False,
    ) -> tuple[Tensor, ...]:
        """[rows] for each of a kernel's sums; nothing if there are no elements.

        `gate_` and `form_` overwrite the second vector, r. `draw` makes one more vector for the kernel from the numbers
        of the elements. With `keep_retain` the first vector becomes what r was.
        """
        plain, sums, low = partial(kernel, *constants), [], 0
        fast = plain
        if self.is_large:
            fast = compiled(kernel, constants, tuple(vector[0].dtype for vector in self.vectors), str(self.device))
        for segments, parts, vectors in self:
            before = vectors[1].clone() if keep_retain else None
            if draw is not None:
                vectors.append(draw(self._numbers(low, segments.numel)))
            blocks = [to_blocks(vector) for vector in vectors]
            sums.append(segments.sums(plain, fast if segments.compiled else plain, *blocks))
            if kernel in (gate_, form_) and blocks[1].data_ptr() != parts[1][0].data_ptr():
                write(parts[1], blocks[1].view(-1)[: segments.numel])
            if before is not None:
                write(parts[0], before)
            low += segments.numel
        return self.plan.rows(sums).unbind() if sums else ()

    def _numbers(self, low: int, numel: int) -> Tensor:
        """[numel] int64: which elements of the model those from `low` on in this rank's vector are."""
        place = torch.arange(low, low + numel, device=self.device)
        starts, ends = (to_device(self.device, torch.tensor(values)) for values in (self.starts, self.ends))
        piece = torch.searchsorted(ends, place, right=True)  # the first that ends behind it: an empty one never does
        return place + starts.index_select(0, piece)
