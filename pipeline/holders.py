"""Where DeepSpeed keeps a gradient: the ONLY file that tells the ZeRO stages apart. One class for each way.

| stage | held as | on a rank |
|---|---|---|
| 0 | `.grad` of the parameters | all of it |
| 1 in bf16 with fp32 accumulation | `BF16_Optimizer.fp32_groups_gradients` | all of it |
| 1, 2 | `averaged_gradients`; under offload `.grad` of the optimizer's fp32 partition | its stretch |
| 3 | `grad_partitions_flat_buffer`, on the CPU under offload to the CPU or to nvme | its share of each tensor |

DeepSpeed does not forget on its own: on most stages some buffer keeps last step's gradient of a tensor that gets none
in this one, and would apply it again. `clear` is therefore thorough, and a tensor without a gradient has gradient zero.

DeepSpeed 0.19.8 refuses: fp16 on a CPU ("Type fp16 is not supported on your device."); stage 0 in bf16 with fp32
accumulation ("unsupported mix of model_dtype=..."). We refuse fp16 on stage 0, where it divides gradients by a loss
scale that the loss was never multiplied with. Under ZeRO-2 and 3 all ranks must use the same tensors in each
micro-batch (for experts: `deepspeed.utils.set_z3_leaf_modules`).
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID, DeepSpeedZeroOptimizer
from deepspeed.utils import safe_get_local_grad
from torch import Tensor

log = logging.getLogger(__name__)


class Holder(ABC):
    """Where `engine.step()` reads the gradient, and how it is emptied."""

    replicated = False  # every rank holds the whole gradient
    refuses_nonfinite = False  # engine.step() skips the update on inf and NaN, on all ranks alike, in any dtype
    parameters: list[Any]  # what trains; the index in this list is the row of the synthesis
    layout: list[tuple[int, int]]  # (row, number of elements) of each slice on this rank
    starts: list[int]  # of each slice: which element of its tensor is its first
    dtype: torch.dtype
    device: torch.device | str

    def __init__(self, engine: Any) -> None:
        self.engine, self.optimizer = engine, engine.optimizer
        if engine.fp16_enabled() and engine.zero_optimization_stage():
            _raise_scale_after_step(self.optimizer)

    @abstractmethod
    def clear(self) -> None:
        """Zero everything that the next backward would add to, or that `engine.step()` would read."""

    @abstractmethod
    def finish(self) -> list[Tensor]:
        """Complete the reduction over ranks. The slices of `layout`, 1-D; writing to them is what step() will see."""

    @property
    def loss_scale(self) -> float:
        """What DeepSpeed multiplied this step's losses with, and so its gradients. 1 but in fp16; step() changes it."""
        return float(self.optimizer.loss_scale) if self.engine.fp16_enabled() else 1.0

    def hand_over(self, slices: list[Tensor]) -> None:  # noqa: B027  (most have derived nothing)
        """The slices have been overwritten: bring up to date what DeepSpeed derived from them."""

    def _reduce_now(self) -> None:
        """What a boundary backward would do after itself."""
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.allreduce_gradients()


class FlatPartition(Holder):
    """ZeRO-3: every backward reduce-scatters into one flat partition, which lies on the CPU under optimizer offload.

    Every tensor has ceil(numel / ranks) elements in it; those beyond its end are never written and stay zero.
    """

    refuses_nonfinite = True

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        flat = getattr(self.optimizer, "grad_partitions_flat_buffer", None)
        self.parameters = [parameter for group in self.optimizer.fp16_groups for parameter in group]
        sizes = [parameter.partition_numel() for parameter in self.parameters]
        if flat is None or flat.numel() != sum(sizes):
            raise unexpected("there is no flat gradient partition of the expected size")
        self.flat, self.dtype, self.device = flat, flat.dtype, flat.device
        self.layout = list(enumerate(sizes))
        self.starts = [dist.get_rank(group=p.ds_process_group) * p.partition_numel() for p in self.parameters]
        self.slices = list(flat.split(sizes))
        self.in_memory: list[Any] = []  # under offload: the parameters whose optimizer state is in memory, and
        self.on_disk: list[tuple[Any, Tensor, list[Any]]] = []  # where not: DeepSpeed's entry, stretch, its parameters
        if self.optimizer.offload_optimizer:
            _expect(self.optimizer, "_offload_boundary_param_ids", "finalize_gradient_accumulation_boundary")
            _expect(self.optimizer, "norm_for_param_grads", "_swappable_optimizer_subgroup")
            self._find_the_disk()
        elif flat.dtype == torch.float32:  # then DeepSpeed hands out the slice itself
            for parameter, view in zip(self.parameters, self.slices, strict=True):
                local = safe_get_local_grad(parameter)
                if local is not None and local.data_ptr() != view.data_ptr():
                    raise unexpected("the parameters' gradients are not the slices of the flat partition, in order")

    def _find_the_disk(self) -> None:
        optimizer, start = self.optimizer, 0
        for number, (group, owned) in enumerate(
            zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True)
        ):
            numel = sum(parameter.partition_numel() for parameter in group)
            if optimizer._swappable_optimizer_subgroup(number):  # large enough, and the device is nvme
                entry = getattr(optimizer.optimizer_swapper, "swap_params_info", {}).get(owned.ds_id)
                if entry is None or entry.numel() != numel or not hasattr(entry, "unswapped_gradients"):
                    raise unexpected("the optimizer's swapper has no entry for a sub-group on nvme")
                self.on_disk.append((entry, self.flat.narrow(0, start, numel), group))
            else:
                self.in_memory += group
            start += numel

    def clear(self) -> None:
        self.optimizer.zero_grad()
        self.flat.zero_()

    def finish(self) -> list[Tensor]:
        return self.slices

    def hand_over(self, slices: list[Tensor]) -> None:
        """Under offload, the optimizer's own copy of the gradient.

        DeepSpeed 0.19.8 would write the gradients of nvme to the disk and read each back to its place in one buffer.
        Direct I/O refuses a place that is no multiple of 512 bytes, DeepSpeed does not look at the result, and the
        update takes what the buffer held before. So the sub-group's gradient stays in memory, where it is anyway.
        """
        if self.optimizer.offload_optimizer:
            # The optimizer's own copy keeps last step's gradient of every tensor that is not in this set.
            self.optimizer._offload_boundary_param_ids = {parameter.ds_id for parameter in self.in_memory}
            self.optimizer.finalize_gradient_accumulation_boundary()
        for entry, stretch, group in self.on_disk:
            entry.unswapped_gradients = {0: stretch}  # first element -> what step() copies there
            for parameter, gradient in zip(group, stretch.split([p.partition_numel() for p in group]), strict=True):
                norm = torch.linalg.vector_norm(gradient, dtype=torch.float64)
                self.optimizer.norm_for_param_grads[self.optimizer.get_param_id(parameter)] = norm


class Partitioned(Holder):
    """ZeRO-1 and 2: per parameter group, this rank owns one stretch of the tensors laid end to end.

    Without offload step() reads `averaged_gradients`, tensors whose concatenation is the stretch (in bf16 or fp16 with
    fp32 accumulation all views of one `flat_partition`), made anew for each task. Under offload it reads the `.grad` of
    the optimizer's fp32 partition, and the norm from a table beside it.
    """

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        optimizer = self.optimizer
        _expect(optimizer, "averaged_gradients", "all_grad_tensors", "round_robin_bit16_groups", "grad_start_offset")
        _expect(optimizer, "grad_partition_insertion_offset", "finalize_gradient_accumulation_boundary")
        self.offload = optimizer.cpu_offload
        if self.offload:
            _expect(optimizer, "accumulated_grads_in_cpu", "norm_for_param_grads", "_offload_accumulated_param_ids")
            _expect(optimizer, "_wait_for_offload_copies")
        if not optimizer.partition_gradients:
            # ZeRO-1 reduces once per task. Overlapping that with the last backward loses the tensors which only an
            # earlier micro-batch touches: they would be stepped on with this rank's own gradient.
            if optimizer.overlap_comm:
                log.warning("train.deepspeed: overlap_comm is off: under ZeRO stage 1 it would lose gradients here")
            optimizer.overlap_comm = False
        self.parameters, self.layout, self.starts = [], [], []
        self.places: list[tuple[int, int, int, Any]] = []  # group, first element of the stretch, number, parameter
        for group, members in enumerate(optimizer.round_robin_bit16_groups):
            rank = dist.get_rank(group=optimizer.real_dp_process_group[group])
            starts = optimizer.grad_partition_insertion_offset[group][rank]
            skips = optimizer.grad_start_offset[group][rank]
            for parameter in members:
                self.parameters.append(parameter)
                key = optimizer.get_param_id(parameter)
                if key in starts:
                    size = min(parameter.numel() - skips[key], optimizer.partition_size[group] - starts[key])
                    self.places.append((group, int(starts[key]), int(size), parameter))
                    self.layout.append((len(self.parameters) - 1, int(size)))
                    self.starts.append(int(skips[key]))
        owned = optimizer.single_partition_of_fp32_groups  # [stretch] per group, fp32
        for group, partition in enumerate(owned):
            if partition.numel() != optimizer.partition_size[group] or (self.offload and partition.grad is None):
                raise unexpected("the optimizer's partition has another size, or no gradient under offload")
        accumulated = optimizer.gradient_accumulation_dtype
        self.dtype = owned[0].dtype if self.offload else accumulated
        self.device = owned[0].device

    def clear(self) -> None:
        optimizer = self.optimizer
        optimizer.zero_grad()
        for held in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
            for group in held:
                held[group] = None  # in place: DeepSpeed's other structures share these dictionaries
        optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
        if self.offload:
            optimizer.reset_cpu_buffers()
            optimizer._offload_accumulated_param_ids = set()
            for buffer in optimizer.accumulated_grads_in_cpu.values():
                buffer.zero_()
            for partition in optimizer.single_partition_of_fp32_groups:
                partition.grad.zero_()

    def finish(self) -> list[Tensor]:
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
            return [flats[group].narrow(0, start, size) for group, start, size, _ in self.places]
        found = {}
        for group, tensors in optimizer.averaged_gradients.items():
            start = 0
            for tensor in tensors:
                found.setdefault((group, start, tensor.numel()), tensor)
                start += tensor.numel()
        try:
            return [found[group, start, size].view(-1) for group, start, size, _ in self.places]
        except KeyError:
            raise unexpected("averaged_gradients is not this rank's stretch of the parameters") from None

    def hand_over(self, slices: list[Tensor]) -> None:
        if self.offload:
            for (*_, parameter), gradient in zip(self.places, slices, strict=True):
                key = self.optimizer.get_param_id(parameter)
                self.optimizer.norm_for_param_grads[key] = gradient.double().norm(2)
                self.optimizer.update_offload_overflow_tracker(gradient)

    def _fill_missing(self) -> None:
        """Zero gradients where a tensor has none: ranks that reduce different lists of tensors would mix them up."""
        kept = "grad_accum" if self.optimizer.use_grad_accum_attribute else "grad"
        dtype = self.optimizer.gradient_accumulation_dtype if kept == "grad_accum" else None
        for parameter in self.parameters:
            if getattr(parameter, kept) is None:
                setattr(parameter, kept, torch.zeros_like(parameter, dtype=dtype, requires_grad=False))


class Bf16Whole(Holder):
    """ZeRO-1 in bf16 with fp32 accumulation: BF16_Optimizer keeps the whole gradient, in fp32, on every rank.

    step() updates from this rank's stretch of it, but takes the norm from all of it: so all of it is combined.
    """

    replicated = True

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        _expect(self.optimizer, "fp32_groups_gradients", "fp32_groups_has_gradients", "bf16_groups")
        self.parameters = [parameter for group in self.optimizer.bf16_groups for parameter in group]
        self.layout = [(row, parameter.numel()) for row, parameter in enumerate(self.parameters)]
        self.starts = [0] * len(self.layout)
        gradients = self._gradients()
        if [gradient.numel() for gradient in gradients] != [size for _, size in self.layout]:
            raise unexpected("the fp32 gradients of BF16_Optimizer do not have the sizes of the parameters")
        self.dtype, self.device = gradients[0].dtype, gradients[0].device

    def _gradients(self) -> list[Tensor]:
        return [gradient for group in self.optimizer.fp32_groups_gradients for gradient in group]

    def clear(self) -> None:
        self.optimizer.zero_grad()

    def finish(self) -> list[Tensor]:
        self._reduce_now()
        return self._gradients()

    def hand_over(self, slices: list[Tensor]) -> None:
        # Norm and clipping leave out what is not flagged: here, what only the forget task touched.
        for flags in self.optimizer.fp32_groups_has_gradients:
            flags[:] = [True] * len(flags)


class Whole(Holder):
    """Stage 0, plain data parallelism: the whole gradient is the parameters' own `.grad`, on every rank."""

    replicated = True

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        if engine.fp16_enabled():  # its updates would be too small by the loss scale
            raise RuntimeError("DeepSpeed does not scale the loss in fp16 without ZeRO; use ZeRO stage 1, or bf16")
        self.parameters = [p for p in engine.module.parameters() if p.requires_grad and p.numel()]
        self.layout = [(row, parameter.numel()) for row, parameter in enumerate(self.parameters)]
        self.starts = [0] * len(self.layout)
        self.dtype, self.device = self.parameters[0].dtype, self.parameters[0].device

    def clear(self) -> None:
        self.engine.zero_grad()

    def finish(self) -> list[Tensor]:
        self._reduce_now()  # gives a zero gradient to parameters that have none
        return [parameter.grad.view(-1) for parameter in self.parameters]

    def hand_over(self, slices: list[Tensor]) -> None:
        if not hasattr(self.optimizer, "_global_grad_norm"):  # fp32: nothing else would know it
            norms = [gradient.double().norm() for gradient in slices]
            self.engine._global_grad_norm = float(torch.stack(norms).norm())


def holder_of(engine: Any) -> Holder:
    """How this engine holds gradients.

    Raises:
        RuntimeError: in no way that this file knows.
    """
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3 and type(optimizer) is DeepSpeedZeroOptimizer_Stage3:
        return FlatPartition(engine)
    if stage in (1, 2) and type(optimizer) is DeepSpeedZeroOptimizer:
        return Partitioned(engine)
    if stage == 1 and type(optimizer) is BF16_Optimizer:
        return Bf16Whole(engine)
    if stage == 0:
        return Whole(engine)
    raise unexpected(f"ZeRO stage {stage} with {type(optimizer).__name__}")


def _raise_scale_after_step(optimizer: Any) -> None:
    """Let a dynamic loss scale grow between steps.

    DeepSpeed 0.19.8 doubles it inside `step()`, before it takes the scale off the gradient: that update would be half
    as large, and under ZeRO-3 the reported norm too.
    """
    update, step = optimizer._update_scale, optimizer.step
    raised: list[float] = []

    def update_later(has_overflow: bool = False) -> None:
        before = optimizer.loss_scale
        update(has_overflow)
        if optimizer.loss_scale > before:
            raised.append(optimizer.loss_scale)
            optimizer.loss_scale = before

    def step_and_raise(*arguments: Any, **named: Any) -> None:
        step(*arguments, **named)
        if raised:
            optimizer.loss_scale = raised.pop()

    optimizer._update_scale, optimizer.step = update_later, step_and_raise


@dataclass(frozen=True)
class Stretch:
    """Elements of a parameter in a flat tensor."""

    name: str
    start: int  # the first of them, in the parameter
    numel: int
    at: int  # where it lies in the flat tensor


def optimizer_layout(engine: Any) -> list[list[Stretch]]:
    """What lies in each flat fp32 tensor that this rank's optimizer updates. None without ZeRO: nothing is split."""
    if not engine.zero_optimization_stage():
        return []
    optimizer, layout = engine.optimizer, []
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    if engine.zero_optimization_stage() == 3:
        for group in optimizer.fp16_groups:
            layout.append([])
            at = 0
            for parameter in group:
                share = parameter.partition_numel()
                start = dist.get_rank(group=parameter.ds_process_group) * share
                real = max(min(share, parameter.ds_numel - start), 0)  # what is beyond the end is padding
                layout[-1].append(Stretch(names[id(parameter)], start, real, at))
                at += share
        return layout
    for group in getattr(optimizer, "bf16_groups", None) or optimizer.bit16_groups:
        owned = [(parameter, parameter._hp_mapping) for parameter in group if parameter._hp_mapping is not None]
        layout.append(
            [
                Stretch(
                    names[id(p)],
                    found.lp_fragment_address.start,
                    found.lp_fragment_address.numel,
                    found.hp_fragment_address.start,
                )
                for p, found in owned
            ]
        )
    return layout


def _expect(optimizer: Any, *names: str) -> None:
    for name in names:
        if not hasattr(optimizer, name):
            raise unexpected(f"{type(optimizer).__name__} has no {name}")


def unexpected(problem: str) -> RuntimeError:
    return RuntimeError(
        f"DeepSpeed keeps its gradients elsewhere than expected: {problem}; "
        "this program supports deepspeed>=0.19.8,<0.20 with ZeRO stages 0 to 3"
    )
