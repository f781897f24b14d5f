"""Which DeepSpeed this program works with, and everything it uses of it beyond the documented interface.

`INTERNALS` is the whole list. Only `pipeline/zero` touches what stands in it, and nothing of DeepSpeed's inside beyond
it (`tests/test_architecture.py` and `tests/pipeline/zero/test_compat.py` read the sources). The gradient stores check
at start-up, by `require`, that their attributes exist; `self_test.py` checks that they mean what they meant.
"""

from __future__ import annotations

import functools
import logging
import sys
from importlib import metadata

from packaging.version import Version

from pipeline.errors import InputError

log = logging.getLogger(__name__)

OLDEST, TOO_NEW = "0.19.8", "0.20"
INSTALL = f'pip install "deepspeed>={OLDEST},<{TOO_NEW}"'

# Owner -> attribute -> why there is no way around it.
INTERNALS: dict[str, dict[str, str]] = {
    "engine": {
        "_global_grad_norm": "without ZeRO in fp32 nothing computes the norm of a gradient that was written by hand",
    },
    "parameter under tensor parallelism": {
        "tensor_model_parallel": "tells the tensors that are cut from those that each rank of a group has whole",
    },
    "optimizer without ZeRO in bf16": {
        "fp16_groups": "the parameters in the order of their copies",
        "fp32_groups": "those copies, by which Adam's state is found",
    },
    "optimizer of ZeRO 1 and 2": {
        "averaged_gradients": "the reduced gradient that step() reads; cleared and combined in place",
        "all_grad_tensors": "the gradient that accumulates between boundaries; cleared",
        "micro_step_id": "the next backward overwrites, and does not add, when this is reset",
        "partition_gradients": "tells ZeRO-2, which reduces after every backward, from ZeRO-1, which reduces on demand",
        "reduce_ready_partitions_and_remove_grads": "what ZeRO-2 does with a gradient; replaced to reduce once a task",
        "overlap_comm": "ZeRO-1 would lose gradients of tensors that the last micro-batch does not touch; turned off",
        "cpu_offload": "where the gradient lies",
        "finalize_gradient_accumulation_boundary": "completes the reduction of ZeRO-2 without another backward",
        "round_robin_bit16_groups": "the parameters in the order of the flat partition; a checkpoint records where",
        "grad_partition_insertion_offset": "where a parameter starts in this rank's partition",
        "grad_start_offset": "which element of a parameter is the first in this rank's partition",
        "partition_size": "elements of this rank's partition",
        "real_dp_process_group": "the ranks that share a partition",
        "get_param_id": "the key of the three tables above and of the norms",
        "single_partition_of_fp32_groups": "the master weights; under offload step() reads their gradient",
        "gradient_accumulation_dtype": "dtype of the gradient, and so of the stash",
        "use_grad_accum_attribute": "whether a parameter's gradient is `.grad` or `.grad_accum`",
        "update_lp_params": "after a change of the number of ranks: copies the master weights into the model",
    },
    "optimizer of ZeRO 1 and 2 under offload": {
        "accumulated_grads_in_cpu": "the gradient that accumulates in host memory; cleared",
        "_offload_accumulated_param_ids": "the parameters in it; cleared",
        "reset_cpu_buffers": "forgets the last step's norms",
        "norm_for_param_grads": "step() takes the norm from this table, not from the gradient",
        "update_offload_overflow_tracker": "step() takes the overflow from this, not from the gradient",
        "_wait_for_offload_copies": "copies from the GPU are only queued when the reduction returns",
    },
    "parameter of ZeRO 1 and 2": {
        "grad_accum": "the gradient in another dtype than the parameter's; ZeRO-1 reduces it",
        "_hp_mapping": "where this rank's fragment of a parameter lies; None on ranks without one",
    },
    "_hp_mapping of a parameter": {
        "lp_fragment_address": "the fragment's place in the parameter",
        "hp_fragment_address": "its place in the flat fp32 tensor",
    },
    "optimizer of ZeRO 1 in bf16": {
        "bf16_groups": "the parameters in the order of the gradients",
        "fp32_groups_gradients": "the whole gradient in fp32, which step() reads",
        "fp32_groups_has_gradients": "norm and clipping leave out what is not flagged here",
    },
    "optimizer of ZeRO 3": {
        "grad_partitions_flat_buffer": "the reduced gradient, which step() reads; cleared and combined in place",
        "fp16_groups": "the parameters in the order of that buffer",
        "offload_optimizer": "whether step() reads a copy of the gradient",
        "reduce_ready_partitions_and_remove_grads": "what it does with a gradient; replaced to reduce once a task",
        "fp32_partitioned_groups_flat": "the master weights of each sub-group: under offload to nvme, and Adam's state",
        "sub_group_to_group_id": "the parameter group of a sub-group, with its learning rate",
        "parameter_offload": "owner of the coordinator of prefetching",
        "checkpoint_event_prologue": "gives partitioned weights back before they are loaded",
        "checkpoint_event_epilogue": "partitions them again",
    },
    "optimizer of ZeRO 3 under offload": {
        "_offload_boundary_param_ids": "which gradients the boundary copies to the optimizer: all, not the last task's",
        "finalize_gradient_accumulation_boundary": "copies the combined gradient to the optimizer",
        "norm_for_param_grads": "step() takes the norm from this table",
        "get_param_id": "the key of that table",
        "_swappable_optimizer_subgroup": "which sub-groups lie on nvme",
        "optimizer_swapper": "what moves sub-groups between memory and nvme",
    },
    "swapper of ZeRO 3 on nvme": {
        "swap_params_info": "the entry of each sub-group",
    },
    "swapped sub-group": {
        "unswapped_gradients": "gradients that stay in memory: direct I/O of small ones fails without an error",
    },
    "parameter of ZeRO 3": {
        "ds_id": "key of a parameter in DeepSpeed's tables",
        "ds_numel": "elements of the whole parameter",
        "ds_process_group": "the ranks that share it",
        "ds_shape": "shape of the whole parameter, by which the files of an export are planned",
        "ds_status": "whether it is gathered at the moment",
        "ds_tensor": "this rank's share, swapped while the reference model runs",
        "partition_numel": "elements of a share, with padding",
    },
    "parameter of ZeRO 3 with a copy within each machine": {
        "ds_secondary_tensor": "that copy (ZeRO++ hpZ), out of date once the share is swapped",
    },
    "parameter_offload of ZeRO 3": {
        "param_coordinator": "holds one recorded order of modules; replaced by one for each kind of forward pass",
    },
    "coordinator of ZeRO 3": {
        "is_invalid_trace": "whether an order is recorded",
        "_invalidate_trace": "begins a new recording",
        "_clear_trace_structures": "empties the recording",
    },
    "optimizer in fp16": {
        "_update_scale": "raises the loss scale inside step(), before the scale is taken off the gradient; delayed",
        "loss_scale": "the factor of the gradient",
    },
    "module deepspeed.runtime.zero.parameter_offload": {
        "FWD_MODULE_STACK": "references the outermost module of every model that was ever sharded; emptied",
    },
    "module deepspeed.runtime.zero.partitioned_param_coordinator": {
        "PartitionedParameterCoordinator": "a method of it has a cache that references every such model; emptied",
    },
    "class deepspeed.runtime.zero.partition_parameters.Init": {
        "param_id": "the self-test gives the counter of parameters back as it was",
    },
}


def require(thing: object, owner: str) -> None:
    """Check that `thing` has every attribute that `INTERNALS` lists for `owner`.

    Raises:
        RuntimeError: one is missing; the message names it and what to install.
    """
    for name in INTERNALS[owner]:
        if not hasattr(thing, name):
            raise unexpected(f"{type(thing).__name__} has no {name}")


def unexpected(problem: str) -> RuntimeError:
    """The error for a DeepSpeed whose inside is not as `INTERNALS` has it."""
    return RuntimeError(
        f"DeepSpeed keeps its gradients elsewhere than expected: {problem}; "
        f"this program supports deepspeed>=0.19.8,<0.20 with ZeRO stages 0 to 3: {INSTALL}"
    )


def check_version(version: str | None = None) -> None:
    """Refuse a DeepSpeed that is too old, and warn of one that is newer than those this program was tested with.

    Raises:
        InputError: older than `OLDEST`. Those releases go wrong where no self-test of one step sees it: they apply
            non-finite gradients, and on CPUs read weights before they have arrived (docs/log.md).
    """
    version = version or metadata.version("deepspeed")
    found = Version(Version(version).base_version)
    if found < Version(OLDEST):
        raise InputError(f"DeepSpeed {version} gives wrong results in places this program uses; {INSTALL}")
    if found >= Version(TOO_NEW):
        log.warning(f"DeepSpeed {version} is newer than what this program was tested with; if it fails: {INSTALL}")


def forget_models() -> None:
    """Remove what DeepSpeed references models by that are no longer used. None may be inside a forward pass.

    DeepSpeed 0.19 references every model that it ever sharded from two places of a process: a list that holds the
    outermost module, and a cache of a method with the module among its keys.
    """
    if (offload := sys.modules.get("deepspeed.runtime.zero.parameter_offload")) is not None:
        offload.FWD_MODULE_STACK.clear()
    clear_release_cache()


def clear_release_cache() -> None:
    """Empty the cache in which ZeRO-3's coordinators, all of a process together, note which weights to release."""
    if (module := sys.modules.get("deepspeed.runtime.zero.partitioned_param_coordinator")) is None:
        return
    for method in vars(module.PartitionedParameterCoordinator).values():
        for cell in getattr(method, "__closure__", None) or ():  # the cached method is inside another decorator
            if isinstance(cell.cell_contents, functools._lru_cache_wrapper):
                cell.cell_contents.cache_clear()
