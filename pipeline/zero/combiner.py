"""Two gradients where DeepSpeed keeps one, on every ZeRO stage (`holders.py` knows what differs between them).

All micro-batches of one task are accumulated before its gradient is looked at. Then DeepSpeed holds this rank's share
of the complete gradient; the forget share is set aside in one spare partition, the retain share accumulates in its
place, and the combination is written back where `engine.step()` looks for the gradient. No gradient is gathered whole;
what crosses the network is one table of 10 numbers per parameter.

DeepSpeed runs in managed mode and no backward is ever its accumulation boundary: `stash_forget` and `combine` are. So
it never matters which tensors the last micro-batch happens to touch, and an `engine.step()` without `combine` updates
nothing.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.synthesis.combine import Piece, Synthesis, units_of
from pipeline.synthesis.geometry import Geometry
from pipeline.zero.optimizer_state import Fragment
from pipeline.zero.stages import gradient_store
from pipeline.zero.store import unexpected


class Combined(NamedTuple):
    """What `combine` found."""

    geometry: Geometry | None  # None if the two gradients were added up without being compared
    should_step: bool  # False: a gradient is non-finite, on some rank; no rank may step


class GradientCombiner:
    """The gradients of one step, sharded as DeepSpeed shards them.

    The step is: `clear`, the backward passes of the forget task, `stash_forget`, those of the retain task, `combine`,
    then, if its answer says `should_step`, `engine.step()`. With `combine_tasks=False` (one task, or the rule `sum`)
    both tasks accumulate into DeepSpeed's own buffers with their weights, and there is no forget buffer.

    Args:
        stash_device: where the forget buffer lies: beside the gradient (`device`), or in pinned memory of the machine
            (`host`), from where it crosses the bus in bounded parts.

    Raises:
        RuntimeError: DeepSpeed does not keep its gradients where this file expects them.
    """

    def __init__(self, engine: Any, synthesis: Synthesis, *, combine_tasks: bool, stash_device: str = "device") -> None:
        self.engine = engine
        self.synthesis = synthesis
        if not engine.managed_gradient_accumulation():
            raise unexpected("managed_gradient_accumulation is off, so the boundary cannot be set")
        self.holder = gradient_store(engine)
        names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
        self.names = [names[id(parameter)] for parameter in self.holder.parameters]
        self.sizes = [getattr(p, "ds_numel", p.numel()) for p in self.holder.parameters]  # of whole parameters
        self.units = units_of(synthesis.resolved_scope, [layer_of(name) for name in self.names])
        self.stash: Tensor | None = None  # the forget gradient of this rank, all slices one after another
        self.average: Tensor | None = None  # laid out alike: the state of a rule that averages the retain gradient
        if combine_tasks:
            numel = sum(size for _, size in self.holder.layout)
            pinned = stash_device == "host" and torch.device(self.holder.device).type == "cuda"
            place: dict[str, Any] = {"pin_memory": True} if pinned else {"device": self.holder.device}
            self.stash = torch.empty(numel, dtype=self.holder.dtype, **place)
            if synthesis.averages_retain:
                # Without the loss scale an average in fp16 would underflow.
                dtype = torch.float32 if self.holder.dtype == torch.float16 else self.holder.dtype
                self.average = torch.zeros(numel, dtype=dtype, **place)
        self.table: Tensor | None = None  # after `combine`: the sums that describe the step, by parameter
        self.scale = 1.0  # in fp16: of the gradients that those sums are of

    def loss_weight(self, task: str) -> float:
        """What the loss of `task` is multiplied with: its weight where gradients simply add up, else 1."""
        if self.stash is not None:
            return 1.0
        return self.synthesis.gamma if task == "forget" else self.synthesis.alpha

    def clear(self) -> None:
        """Zero the gradient, wherever DeepSpeed keeps a part of it."""
        self.engine.set_gradient_accumulation_boundary(False)
        self.holder.clear()

    def stash_forget(self) -> None:
        """The forget gradient is complete: copy it to the forget buffer and make room for the retain gradient.

        Nothing where the two are simply added up.
        """
        if self.stash is not None:
            for kept, gradient in zip(self._cut(self.stash), self.holder.reduce(), strict=True):
                kept.copy_(gradient, non_blocking=True)  # what follows is queued behind it
            self.clear()

    def combine(self) -> Combined:
        """Replace the retain gradient by the combination.

        One all-reduce of 10 float64 per parameter, whatever their sizes. Every rank gets the same answer. No rank
        should step if either gradient is non-finite. (fp16: all ranks step all the same, with a gradient that DeepSpeed
        recognises as an overflow, so that it skips the update and lowers its loss scale.)
        """
        slices = self.holder.reduce()
        geometry = None
        if self.stash is not None:
            rows = [row for row, _ in self.holder.layout]
            averages = [None] * len(rows) if self.average is None else self._cut(self.average)
            pieces = [Piece(*piece) for piece in zip(rows, self._cut(self.stash), slices, averages, strict=True)]
            self.scale = self.holder.loss_scale
            self.table = self.synthesis.combine_(pieces, self.units, self._add_up, self.scale).cpu()
            geometry = Geometry.of(self.table, sum(self.sizes), self.scale)
        finite = self._all_finite(slices) if geometry is None else geometry.finite
        if not finite and self.engine.fp16_enabled():
            for gradient in slices[:1]:
                gradient[0] = torch.nan
        should_step = finite or bool(self.engine.fp16_enabled())
        if should_step:
            self.holder.write_back(slices)
            self.engine.set_gradient_accumulation_boundary(True)
        return Combined(geometry, should_step)

    def average_layout(self) -> list[Fragment]:
        """What lies in `average` on this rank."""
        layout, at = [], 0
        for (row, size), start in zip(self.holder.layout, self.holder.starts, strict=True):
            real = max(min(size, self.sizes[row] - start), 0)  # what is beyond the parameter's end is padding
            layout.append(Fragment(self.names[row], start, real, at))
            at += size
        return layout

    def by_layer(self) -> dict[str, Geometry]:
        """The geometry of the last `combine` for each decoder block, the embedding, the head; empty if it had none."""
        members: dict[str, list[int]] = {}
        for row, name in enumerate(self.names):
            members.setdefault(layer_of(name), []).append(row)
        if self.table is None:
            return {}
        return {
            layer: Geometry.of(self.table[rows], sum(self.sizes[row] for row in rows), self.scale)
            for layer, rows in members.items()
        }

    def _cut(self, flat: Tensor) -> list[Tensor]:
        """Views of `flat`, one a slice."""
        return list(flat.split([size for _, size in self.holder.layout]))

    def _add_up(self, table: Tensor) -> None:
        """Sum over ranks, in place. Ranks that hold the same gradient count it once and still decide alike."""
        total = table.to(self.engine.device)  # offloaded gradients are summed on the CPU, which NCCL cannot reduce
        dist.all_reduce(total)
        table.copy_(total / dist.get_world_size() if self.holder.replicated else total)

    def _all_finite(self, slices: list[Tensor]) -> bool:
        """Without a table to tell it (no spare): whether DeepSpeed may see this gradient."""
        if self.holder.optimizer_checks_overflow:
            return True  # engine.step() looks itself
        bad = torch.tensor(float(sum(not torch.isfinite(s).all() for s in slices)), device=self.engine.device)
        dist.all_reduce(bad)
        return bad.item() == 0


def layer_of(name: str) -> str:
    """The decoder block that a parameter belongs to (`model.layers.3`), or its own module (the embedding, the head)."""
    block = re.match(r"(.*?\.\d+)\.", name)
    return block.group(1) if block else name.rpartition(".")[0] or name
