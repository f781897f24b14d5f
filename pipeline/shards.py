"""Two gradients where DeepSpeed keeps one: the ONLY file that knows where gradients live, on every ZeRO stage.

All micro-batches of one task are accumulated before its gradient is looked at. Then DeepSpeed holds this rank's share of
the complete gradient; the forget share is set aside in one spare partition, the retain share accumulates in its place,
and the combination is written back where `engine.step()` looks for the gradient. No gradient is ever gathered whole;
what crosses the network is one table of 7 numbers per parameter.

DeepSpeed runs in managed mode and no backward is ever its accumulation boundary: `take` and `combine` are. So it never
matters which tensors the last micro-batch happens to touch, and an `engine.step()` without `combine` updates nothing.

DeepSpeed does not forget on its own: on every stage some buffer keeps last step's gradient of a tensor that gets none
in this one, and would apply it again. `clear` is therefore thorough, and a tensor without a gradient has gradient zero.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID, DeepSpeedZeroOptimizer
from deepspeed.utils import safe_get_local_grad
from torch import Tensor

from pipeline.synthesis import Geometry, Piece, Synthesis, units_of


class Shards:
    """The gradients of one step, sharded as DeepSpeed shards them.

    The step is: `clear`, the backwards of one task, `take(task)`, the same for the next task, `combine`, then, if
    `ready`, `engine.step()`. With `combine_tasks=False` (one task, or the rule `sum`) both tasks accumulate into
    DeepSpeed's own buffers with their weights and there is no spare.

    Raises:
        RuntimeError: DeepSpeed does not keep its gradients where this file expects them.
    """

    def __init__(self, engine: Any, synthesis: Synthesis, *, combine_tasks: bool) -> None:
        self.engine = engine
        self.synthesis = synthesis
        if not engine.managed_gradient_accumulation():
            raise _unexpected("managed_gradient_accumulation is off, so the boundary cannot be set")
        self.holder = holder_of(engine)
        names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
        self.names = [names[id(parameter)] for parameter in self.holder.parameters]
        self.num_elements = sum(getattr(p, "ds_numel", p.numel()) for p in self.holder.parameters)
        self.units = units_of(synthesis.resolved_scope, [layer_of(name) for name in self.names])
        self.spare: Tensor | None = None  # the forget gradient of this rank, all slices one after another
        if combine_tasks:
            numel = sum(size for _, size in self.holder.layout)
            self.spare = torch.empty(numel, dtype=self.holder.dtype, device=self.holder.device)
        self.ready = False  # after `combine`: engine.step() may be called

    @property
    def partition(self) -> Tensor:
        """ZeRO-3 only, where the gradients of a rank are one tensor."""
        return self.holder.flat

    def weight(self, task: str) -> float:
        """What the loss of `task` is multiplied with: its weight where gradients simply add up, else 1."""
        if self.spare is not None:
            return 1.0
        return self.synthesis.gamma if task == "forget" else self.synthesis.alpha

    def clear(self) -> None:
        """Zero the gradient, wherever DeepSpeed keeps a part of it."""
        self.ready = False
        self.engine.set_gradient_accumulation_boundary(False)
        self.holder.clear()

    def take(self, task: str) -> None:
        """The backwards of `task` are done: set the forget gradient aside and make room for the retain gradient."""
        if task == "forget" and self.spare is not None:
            for kept, gradient in zip(self._spares(), self.holder.finish(), strict=True):
                kept.copy_(gradient)
            self.clear()

    def combine(self) -> Geometry | None:
        """Replace the retain gradient by the combination; None if there was nothing to combine.

        One all-reduce of 7 float64 per parameter, whatever their sizes. Every rank gets the same answer. Afterwards
        `ready` says whether to call `engine.step()`: not if either gradient is non-finite. (fp16: then all the same,
        with a gradient that DeepSpeed recognises as an overflow, for it to skip the update and lower its loss scale.)
        """
        slices = self.holder.finish()
        geometry = None
        if self.spare is not None:
            rows = [row for row, _ in self.holder.layout]
            pieces = [Piece(*piece) for piece in zip(rows, self._spares(), slices, strict=True)]
            geometry = Geometry.of(self.synthesis.combine_(pieces, self.units, self._add_up), self.num_elements)
        finite = self._all_finite(slices) if geometry is None else geometry.finite
        if not finite and self.engine.fp16_enabled():
            for gradient in slices[:1]:
                gradient[0] = torch.nan
        self.ready = finite or self.engine.fp16_enabled()
        if self.ready:
            self.holder.hand_over(slices)
            self.engine.set_gradient_accumulation_boundary(True)
        return geometry

    def _spares(self) -> list[Tensor]:
        assert self.spare is not None
        return list(self.spare.split([size for _, size in self.holder.layout]))

    def _add_up(self, table: Tensor) -> None:
        """Sum over ranks, in place. Ranks that hold the same gradient count it once and still decide alike."""
        total = table.to(self.engine.device)  # offloaded gradients are summed on the CPU, which NCCL cannot reduce
        dist.all_reduce(total)
        table.copy_(total / dist.get_world_size() if self.holder.replicated else total)

    def _all_finite(self, slices: list[Tensor]) -> bool:
        """Without a table to tell it (no spare): whether DeepSpeed may see this gradient."""
        if self.holder.refuses_nonfinite:
            return True  # engine.step() looks itself
        bad = torch.tensor(float(sum(not torch.isfinite(s).all() for s in slices)), device=self.engine.device)
        dist.all_reduce(bad)
        return bad.item() == 0


def layer_of(name: str) -> str:
    """The decoder block that a parameter belongs to (`model.layers.3`), or its own module (the embedding, the head)."""
    block = re.match(r"(.*?\.\d+)\.", name)
    return block.group(1) if block else name.rpartition(".")[0] or name


# ---------------------------------------------------------------------------------------------------------------------
# DeepSpeed's ways of holding a gradient


class Holder:
    """Where `engine.step()` reads the gradient, and how it is emptied."""

    replicated = False  # every rank holds the whole gradient
    refuses_nonfinite = False  # engine.step() skips the update on inf and NaN, on all ranks alike, in any dtype
    parameters: list[Any]  # what trains; the index in this list is the row of the synthesis
    layout: list[tuple[int, int]]  # (row, number of elements) of each slice on this rank
    dtype: torch.dtype
    device: torch.device | str
    flat: Tensor

    def __init__(self, engine: Any) -> None:
        self.engine, self.optimizer = engine, engine.optimizer

    def clear(self) -> None:
        """Zero everything that the next backward would add to, or that `engine.step()` would read."""
        raise NotImplementedError

    def finish(self) -> list[Tensor]:
        """Complete the reduction over ranks. The slices of `layout`, 1-D; writing to them is what step() will see."""
        raise NotImplementedError

    def hand_over(self, slices: list[Tensor]) -> None:
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
            raise _unexpected("there is no flat gradient partition of the expected size")
        self.flat, self.dtype, self.device = flat, flat.dtype, flat.device
        self.layout = list(enumerate(sizes))
        self.slices = list(flat.split(sizes))
        if self.optimizer.offload_optimizer:
            _expect(self.optimizer, "_offload_boundary_param_ids", "finalize_gradient_accumulation_boundary")
        elif flat.dtype == torch.float32:  # then DeepSpeed hands out the slice itself
            for parameter, view in zip(self.parameters, self.slices, strict=True):
                local = safe_get_local_grad(parameter)
                if local is not None and local.data_ptr() != view.data_ptr():
                    raise _unexpected("the parameters' gradients are not the slices of the flat partition, in order")

    def clear(self) -> None:
        self.optimizer.zero_grad()
        self.flat.zero_()

    def finish(self) -> list[Tensor]:
        return self.slices

    def hand_over(self, slices: list[Tensor]) -> None:
        if self.optimizer.offload_optimizer:
            # The optimizer's own copy keeps last step's gradient of every tensor that is not in this set.
            self.optimizer._offload_boundary_param_ids = {parameter.ds_id for parameter in self.parameters}
            self.optimizer.finalize_gradient_accumulation_boundary()


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
        if not optimizer.partition_gradients:
            # ZeRO-1 reduces once per task. Overlapping that with the last backward loses the tensors which only an
            # earlier micro-batch touches: they would be stepped on with this rank's own gradient.
            optimizer.overlap_comm = False
        self.parameters, self.layout = [], []
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
        owned = optimizer.single_partition_of_fp32_groups  # [stretch] per group, fp32
        for group, partition in enumerate(owned):
            if partition.numel() != optimizer.partition_size[group] or (self.offload and partition.grad is None):
                raise _unexpected("the optimizer's partition has another size, or no gradient under offload")
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
            raise _unexpected("averaged_gradients is not this rank's stretch of the parameters") from None

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
        gradients = self._gradients()
        if [gradient.numel() for gradient in gradients] != [size for _, size in self.layout]:
            raise _unexpected("the fp32 gradients of BF16_Optimizer do not have the sizes of the parameters")
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
    raise _unexpected(f"ZeRO stage {stage} with {type(optimizer).__name__}")


def _expect(optimizer: Any, *names: str) -> None:
    for name in names:
        if not hasattr(optimizer, name):
            raise _unexpected(f"{type(optimizer).__name__} has no {name}")


def _unexpected(problem: str) -> RuntimeError:
    return RuntimeError(
        f"DeepSpeed keeps its gradients elsewhere than expected: {problem}; "
        "this program supports deepspeed>=0.19.8,<0.20 with ZeRO stages 0 to 3"
    )
