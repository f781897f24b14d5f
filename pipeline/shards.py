"""Two gradients where DeepSpeed keeps one: the ONLY file that knows where gradient partitions live (ZeRO-3).

Each backward reduce-scatters, so after the micro-batches of one task this rank holds its share of that task's complete
gradient in DeepSpeed's flat partition. The forget share is set aside in one spare partition, the retain share
accumulates in its place, and the combination is written back where `engine.step()` looks for the gradient. No gradient
is ever gathered whole; what crosses the network is one table of 10 numbers per parameter.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_local_grad
from torch import Tensor

from pipeline.synthesis import Geometry, Piece, Synthesis, units_of


class Shards:
    """The gradients of one step, sharded as DeepSpeed shards them.

    The step is: `clear`, the backwards of one task, `take(task)`, the same for the next task, `combine`, then
    `engine.step()`. With `combine_tasks=False` (one task, or the rule `sum`) both tasks accumulate into DeepSpeed's own
    partition with their weights and there is no spare.

    Raises:
        RuntimeError: DeepSpeed does not keep its gradients where this file expects them.
    """

    def __init__(self, engine: Any, synthesis: Synthesis, *, combine_tasks: bool) -> None:
        self.engine = engine
        self.synthesis = synthesis
        self.partition = _flat_partition(engine)  # [Σ ceil(numel / ranks)], the reduced gradient of this rank
        self.spare = torch.empty_like(self.partition) if combine_tasks else None
        slots = engine.optimizer.fp16_groups  # the order of the slots in the flat partition
        parameters = [parameter for group in slots for parameter in group]
        names = {parameter.ds_id: name for name, parameter in engine.module.named_parameters()}
        self.names = [names[parameter.ds_id] for parameter in parameters]
        self.num_elements = sum(parameter.ds_numel for parameter in parameters)
        self.units = units_of(synthesis.resolved_scope, [layer_of(name) for name in self.names])
        self.pieces: list[Piece] = []
        if self.spare is not None:
            sizes = [parameter.partition_numel() for parameter in parameters]
            both = zip(self.spare.split(sizes), self.partition.split(sizes), strict=True)
            self.pieces = [Piece(row, forget, retain) for row, (forget, retain) in enumerate(both)]

    def weight(self, task: str) -> float:
        """What the loss of `task` is multiplied with: its weight where gradients simply add up, else 1."""
        if self.spare is not None:
            return 1.0
        return self.synthesis.gamma if task == "forget" else self.synthesis.alpha

    def clear(self) -> None:
        """Zero the partition. DeepSpeed does not: a tensor that misses a gradient would keep the last step's."""
        self.engine.optimizer.zero_grad()
        self.partition.zero_()

    def take(self, task: str) -> None:
        """The backwards of `task` are done: set the forget gradient aside and make room for the retain gradient."""
        if task == "forget" and self.spare is not None:
            self.spare.copy_(self.partition)
            self.clear()

    def combine(self) -> Geometry | None:
        """Replace the retain gradient by the combination; None if there was nothing to combine.

        One all-reduce of 10 float64 per parameter, whatever their sizes. If the geometry is not `finite` the partition
        holds no usable gradient and the step must be skipped; every rank sees the same answer.
        """
        if self.spare is None:
            return None
        table = self.synthesis.combine_(self.pieces, self.units, dist.all_reduce)
        return Geometry.of(table, self.num_elements)


def layer_of(name: str) -> str:
    """The decoder block that a parameter belongs to (`model.layers.3`), or its own module (the embedding, the head)."""
    block = re.match(r"(.*?\.\d+)\.", name)
    return block.group(1) if block else name.rpartition(".")[0] or name


def _flat_partition(engine: Any) -> Tensor:
    """DeepSpeed's flat gradient partition, after checking that it is what `engine.step()` will read."""
    optimizer = engine.optimizer
    flat = getattr(optimizer, "grad_partitions_flat_buffer", None)
    parameters = [parameter for group in getattr(optimizer, "fp16_groups", []) for parameter in group]
    sizes = [parameter.partition_numel() for parameter in parameters]
    if flat is None or flat.numel() != sum(sizes):
        raise _unexpected("there is no flat gradient partition of the expected size")
    for parameter, view in zip(parameters, flat.split(sizes), strict=True):
        local = safe_get_local_grad(parameter)  # of an fp32 partition DeepSpeed hands out the slice itself
        if flat.dtype == torch.float32 and local is not None and local.data_ptr() != view.data_ptr():
            raise _unexpected("the parameters' gradients are not the slices of the flat partition, in order")
    if engine.managed_gradient_accumulation():
        raise _unexpected("engine.step() is not the accumulation boundary")
    return flat


def _unexpected(problem: str) -> RuntimeError:
    return RuntimeError(
        f"DeepSpeed keeps its gradients elsewhere than expected: {problem}; "
        "this program supports deepspeed>=0.19.8,<0.20 with ZeRO stage 3"
    )
