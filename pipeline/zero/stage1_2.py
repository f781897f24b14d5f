"""ZeRO-1 and 2: gradients in one interval of each parameter group."""

from __future__ import annotations

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID
from torch import Tensor, nn

from pipeline.zero.compat import require, unexpected
from pipeline.zero.engine import Engine
from pipeline.zero.store import GradientStore, Master, log


class Stage12Store(GradientStore):
    """ZeRO-1 and 2: per parameter group, this rank owns one fragment of the tensors laid end to end.

    Without offload step() reads `averaged_gradients`, tensors whose concatenation is the fragment (in bf16 or fp16 with
    fp32 accumulation all views of one `flat_partition`), made anew for each task. Under offload it reads the `.grad` of
    the optimizer's fp32 partition, and the norm from a table beside it.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        optimizer = self.optimizer
        require(optimizer, "optimizer of ZeRO 1 and 2")
        self.offload = optimizer.cpu_offload
        self.reduces_every_backward = optimizer.partition_gradients  # ZeRO-2
        if self.offload:
            require(optimizer, "optimizer of ZeRO 1 and 2 under offload")
        if not optimizer.partition_gradients:
            # ZeRO-1 reduces once per task. Overlapping that with the last backward loses the tensors which only an
            # earlier micro-batch touches: step() would apply this rank's own gradient to them.
            if optimizer.overlap_comm:
                log.warning("train.deepspeed: overlap_comm is off: under ZeRO stage 1 it would lose gradients here")
            optimizer.overlap_comm = False
        parameters: list[nn.Parameter] = []
        self.parameters, self.layout, self.starts = parameters, [], []
        self.places: list[tuple[int, int, int, nn.Parameter]] = []  # group, offset in the fragment, size, parameter
        for group, members in enumerate(optimizer.round_robin_bit16_groups):
            rank = dist.get_rank(group=optimizer.real_dp_process_group[group])
            starts = optimizer.grad_partition_insertion_offset[group][rank]
            skips = optimizer.grad_start_offset[group][rank]
            for parameter in members:
                require(parameter, "parameter of ZeRO 1 and 2")
                parameters.append(parameter)
                key = optimizer.get_param_id(parameter)
                if key in starts:
                    size = min(parameter.numel() - skips[key], optimizer.partition_size[group] - starts[key])
                    self.places.append((group, int(starts[key]), int(size), parameter))
                    self.layout.append((len(parameters) - 1, int(size)))
                    self.starts.append(int(skips[key]))
        owned = optimizer.single_partition_of_fp32_groups  # [fragment] per group, fp32
        for group, partition in enumerate(owned):
            if partition.numel() != optimizer.partition_size[group] or (self.offload and partition.grad is None):
                raise unexpected("the optimizer's partition has another size, or no gradient under offload")
        accumulated = optimizer.gradient_accumulation_dtype
        self.dtype = owned[0].dtype if self.offload else accumulated
        self.device = owned[0].device

    def clear(self) -> None:
        optimizer = self.optimizer
        optimizer.zero_grad()
        self._clear_local_sum()
        for by_group in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
            for group in by_group:
                by_group[group] = None  # in place: DeepSpeed's other structures share these dictionaries
        optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
        if self.offload:
            optimizer.reset_cpu_buffers()
            optimizer._offload_accumulated_param_ids = set()
            for buffer in optimizer.accumulated_grads_in_cpu.values():
                buffer.zero_()
            for partition in optimizer.single_partition_of_fp32_groups:
                partition.grad.zero_()

    def reduce(self) -> list[Tensor]:
        optimizer = self.optimizer
        if optimizer.partition_gradients:
            optimizer.finalize_gradient_accumulation_boundary()  # ZeRO-2 has reduced after every backward
        else:
            self._fill_missing()
            self._reduce_now()
        if self.offload:
            # On a GPU the copies to pinned memory are only queued. step() waits for them, but reads after us.
            optimizer._wait_for_offload_copies()
            flats = [partition.grad for partition in optimizer.single_partition_of_fp32_groups]
            return self._with_local_sum([flats[group].narrow(0, start, size) for group, start, size, _ in self.places])
        found = {}
        for group, tensors in optimizer.averaged_gradients.items():
            start = 0
            for tensor in tensors:
                found.setdefault((group, start, tensor.numel()), tensor)
                start += tensor.numel()
        try:
            slices = [found[group, start, size].view(-1) for group, start, size, _ in self.places]
        except KeyError:
            raise unexpected("averaged_gradients is not this rank's fragment of the parameters") from None
        return self._with_local_sum(slices)

    def masters(self) -> list[Master]:
        flats = self.optimizer.single_partition_of_fp32_groups
        return [Master(flats[group], start, group) for group, start, _, _ in self.places]

    def write_back(self, slices: list[Tensor]) -> None:
        if self.offload:
            for (*_, parameter), gradient in zip(self.places, slices, strict=True):
                key = self.optimizer.get_param_id(parameter)
                self.optimizer.norm_for_param_grads[key] = gradient.double().norm(2)
                self.optimizer.update_offload_overflow_tracker(gradient)

    def _fill_missing(self) -> None:
        """Zero gradients where a tensor has none: ranks that reduce different lists of tensors would mix them up."""
        attribute = "grad_accum" if self.optimizer.use_grad_accum_attribute else "grad"
        dtype = self.optimizer.gradient_accumulation_dtype if attribute == "grad_accum" else None
        for parameter in self.parameters:
            if getattr(parameter, attribute) is None:
                setattr(parameter, attribute, torch.zeros_like(parameter, dtype=dtype, requires_grad=False))
