"""Two gradients from one backward pass: the forget gradient beside the retain gradient that DeepSpeed reduces.

A joint pass reads the rows of a forget micro-batch and, below them, those of a retain micro-batch, so that each weight
is gathered once for both. The modules that own trained parameters compute two gradients of each, from the rows of each
task (`pipeline/modeling/row_rules.py`). The retain gradient is what autograd gets, so it takes DeepSpeed's own way. The
forget gradient comes here: into a bucket, which is reduced as DeepSpeed reduces its own, and from there into the forget
buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pipeline.zero.combiner import GradientCombiner
from pipeline.zero.local_sums import Places, add_mean_over_ranks, places_of
from pipeline.zero.sizes import reduces_once

Divert = Callable[[nn.Parameter, Tensor], None]  # gets a parameter and its whole forget gradient on this rank


@dataclass
class TaskRows:
    """Which rows of the present forward and backward pass belong to which task."""

    forget: int = 0  # the first rows
    total: int = 0  # with those of the retain task below them; 0 outside a joint pass
    divert: Divert | None = None  # gets the forget gradients; None: autograd adds them to the retain gradients
    shared: set[nn.Parameter] = field(default_factory=set)  # parameters of several modules, such as tied embeddings

    def parts(self, size: int) -> tuple[slice, slice] | None:
        """The forget part and the retain part of a dimension of `size` entries, equally many for each row, in order.

        None if `size` is not a multiple of the rows.
        """
        if not size or size % self.total:
            return None
        cut = size // self.total * self.forget
        return slice(0, cut), slice(cut, size)


class JointPass:
    """The joint passes of a run.

        joint.clear()
        for forget, retain in micro_batches:
            with joint.rows_of(len(forget), len(retain)):
                engine.backward(loss_of(engine(cat([forget, retain]))), scale_wrt_gas=False)
        joint.complete()
        combiner.combine()  # instead of combiner.stash_forget(), a second backward, and this

    Args:
        combiner: with a forget buffer, or, under `sum`, without one: then a joint pass is an ordinary one.
        rows: what the rules of the modules read; several runs of one engine share it.
        micro_batches: of a task, on each rank and in each step.
    """

    def __init__(self, combiner: GradientCombiner, rows: TaskRows, micro_batches: int) -> None:
        self.combiner, self.rows, self.engine = combiner, rows, combiner.engine
        self.pending: dict[nn.Parameter, Tensor] = {}  # forget gradients of this rank that wait for their reduction
        self.waiting = 0  # elements of those that need not wait for another use of their parameter
        self.limit = int(self.engine.zero_reduce_bucket_size())
        self.reduces_once = reduces_once(sum(combiner.sizes), self.limit, micro_batches)
        # A sum of micro-batches that is rounded to half precision on the wire would lose more than each of them does.
        self.wire = torch.float32 if self.reduces_once else self.engine.communication_data_type
        self.places: Places = {}
        self.divert: Divert | None = None
        if combiner.stash is not None:
            self.divert, self.places = self._add, places_of(combiner.store, combiner.stash_slices())

    def clear(self) -> None:
        """Zero the forget buffer."""
        self.pending.clear()
        self.waiting = 0
        if self.combiner.stash is not None:
            self.combiner.stash.zero_()

    @contextmanager
    def rows_of(self, forget: int, retain: int) -> Iterator[None]:
        """For one forward pass of so many rows, and its backward."""
        self.rows.forget, self.rows.total, self.rows.divert = forget, forget + retain, self.divert
        try:
            yield
        finally:
            self.rows.forget, self.rows.total, self.rows.divert = 0, 0, None
        if not self.reduces_once:
            self._reduce(list(self.pending))

    def _add(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Queue a gradient. All ranks queue the same parameters in the same order, as backward passes of one model."""
        if parameter in self.pending:
            self.pending[parameter].add_(gradient)
            return
        self.pending[parameter] = (gradient.float() if self.reduces_once else gradient).contiguous()
        if parameter not in self.rows.shared and not self.reduces_once:
            self.waiting += gradient.numel()
            if self.waiting >= self.limit:
                self._reduce([queued for queued in self.pending if queued not in self.rows.shared])

    def complete(self) -> None:
        """After the last micro-batch: the forget gradient is in the forget buffer, whole."""
        self._reduce(list(self.pending))
        self.combiner.is_stashed = self.combiner.stash is not None

    def _reduce(self, parameters: list[nn.Parameter]) -> None:
        """Add the mean over ranks of these gradients to the forget buffer, each rank its own share."""
        self.waiting = 0
        if parameters:
            gradients = [self.pending.pop(parameter).to(self.wire) for parameter in parameters]
            add_mean_over_ranks(self.engine, parameters, gradients, self.places)
