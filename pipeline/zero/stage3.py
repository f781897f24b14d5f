"""ZeRO-3: gradients in one flat partition."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_local_grad
from torch import Tensor

from pipeline.zero.compat import require, unexpected
from pipeline.zero.engine import Engine, PartitionedParameter
from pipeline.zero.store import GradientStore, Master

if TYPE_CHECKING:
    from deepspeed.runtime.swap_tensor.optimizer_utils import OptimizerStateSwapInfo


class Stage3Store(GradientStore):
    """ZeRO-3: every backward reduce-scatters into one flat partition, which lies on the CPU under optimizer offload.

    Every tensor has ceil(numel / ranks) elements in it; those beyond its end are never written and stay zero.
    """

    reduces_every_backward = True
    optimizer_checks_overflow = True

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        require(self.optimizer, "optimizer of ZeRO 3")
        flat = self.optimizer.grad_partitions_flat_buffer
        parameters: list[PartitionedParameter] = [p for group in self.optimizer.fp16_groups for p in group]
        for parameter in parameters:
            require(parameter, "parameter of ZeRO 3")
        sizes = [parameter.partition_numel() for parameter in parameters]
        if flat is None or flat.numel() != sum(sizes):
            raise unexpected("there is no flat gradient partition of the expected size")
        self.parameters, self.flat, self.dtype, self.device = parameters, flat, flat.dtype, flat.device
        self.layout = list(enumerate(sizes))
        self.starts = [dist.get_rank(group=p.ds_process_group) * p.partition_numel() for p in parameters]
        self.slices = list(flat.split(sizes))
        self.in_memory: list[PartitionedParameter] = []  # under offload: those whose optimizer state is in memory, and
        # those on nvme, by sub-group: DeepSpeed's entry, the gradient, the parameters
        self.on_nvme: list[tuple[OptimizerStateSwapInfo, Tensor, list[PartitionedParameter]]] = []
        if self.optimizer.offload_optimizer:
            require(self.optimizer, "optimizer of ZeRO 3 under offload")
            self._find_swapped_groups()
        elif flat.dtype == torch.float32:  # then DeepSpeed hands out the slice itself
            for parameter, view in zip(parameters, self.slices, strict=True):
                local = safe_get_local_grad(parameter)
                if local is not None and local.data_ptr() != view.data_ptr():
                    raise unexpected("the parameters' gradients are not the slices of the flat partition, in order")

    def _find_swapped_groups(self) -> None:
        optimizer, start = self.optimizer, 0
        for number, (group, owned) in enumerate(
            zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True)
        ):
            numel = sum(parameter.partition_numel() for parameter in group)
            if optimizer._swappable_optimizer_subgroup(number):  # large enough, and the device is nvme
                require(optimizer.optimizer_swapper, "swapper of ZeRO 3 on nvme")
                entry = optimizer.optimizer_swapper.swap_params_info.get(owned.ds_id)
                if entry is None or entry.numel() != numel:
                    raise unexpected("the optimizer's swapper has no entry for a sub-group on nvme")
                require(entry, "swapped sub-group")
                self.on_nvme.append((entry, self.flat.narrow(0, start, numel), group))
            else:
                self.in_memory += group
            start += numel

    def clear(self) -> None:
        self.optimizer.zero_grad()
        self.flat.zero_()
        self._clear_local_sum()

    def reduce(self) -> list[Tensor]:
        return self._with_local_sum(self.slices)

    def masters(self) -> list[Master] | None:
        if self.on_nvme:
            return None
        found, optimizer = [], self.optimizer
        for number, (group, flat) in enumerate(
            zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True)
        ):
            start = 0
            for parameter in group:
                found.append(Master(flat, start, optimizer.sub_group_to_group_id[number]))
                start += parameter.partition_numel()
        return found

    def write_back(self, slices: list[Tensor]) -> None:
        """Under offload, update the optimizer's own copy of the gradient.

        DeepSpeed 0.19.8 would write the gradients of nvme to the disk and read each back to its place in one buffer.
        Direct I/O refuses a place that is no multiple of 512 bytes, DeepSpeed does not look at the result, and the
        update takes what the buffer had before. So the sub-group's gradient stays in memory, where it is anyway.
        """
        if self.optimizer.offload_optimizer:
            # The optimizer's own copy has last step's gradient of every tensor that is not in this set.
            self.optimizer._offload_boundary_param_ids = {parameter.ds_id for parameter in self.in_memory}
            self.optimizer.finalize_gradient_accumulation_boundary()
        for entry, gradients, group in self.on_nvme:
            entry.unswapped_gradients = {0: gradients}  # first element -> what step() copies there
            for parameter, gradient in zip(group, gradients.split([p.partition_numel() for p in group]), strict=True):
                norm = torch.linalg.vector_norm(gradient, dtype=torch.float64)
                self.optimizer.norm_for_param_grads[self.optimizer.get_param_id(parameter)] = norm
