"""One real step on two tiny tensors, compared with arithmetic on whole tensors, before a large model is loaded.

`compat.require` sees whether the attributes that this program uses are there. This sees whether they mean what they
meant: whether, for the ZeRO stage, dtype and offload of a run, the two gradients are where the stores look for them,
and whether the optimizer applies what they write.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import parameter_offload, partition_parameters
from torch import Tensor, nn

from pipeline.config.deepspeed import DeepSpeedDict
from pipeline.synthesis.combine import Synthesis
from pipeline.zero.combiner import GradientCombiner
from pipeline.zero.compat import check_version, clear_release_cache, unexpected
from pipeline.zero.engine import Engine

LR = 1.0
# Small whole numbers: exact in bf16 and fp16. Of each tensor: its start, and the directions of the two losses.
START = {"odd": [0.0] * 5, "wide": [[0.0] * 3] * 4}
FORGET = {"odd": [1, -2, 3, 0, 1], "wide": [[2, 1, 0], [-1, 3, 1], [0, 0, 2], [1, -1, 4]]}
RETAIN = {"odd": [-2, 1, 1, 2, 0], "wide": [[1, 1, 2], [2, 1, -1], [0, 3, 1], [1, 2, 0]]}  # conflict in `odd` alone
MICRO_BATCHES = 2


class Tiny(nn.Module):
    """Two tensors; the loss is linear in them, so its gradient is the direction it is given."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.odd = nn.Parameter(torch.tensor(START["odd"], dtype=dtype))
        self.wide = nn.Parameter(torch.tensor(START["wide"], dtype=dtype))

    def forward(self, odd: Tensor, wide: Tensor) -> Tensor:
        return (self.odd.float() * odd).sum() + (self.wide.float() * wide).sum()


def self_test(zero: DeepSpeedDict) -> None:
    """One step of `GradientCombiner` on an engine like that of the run. Every rank must call, before a model is loaded.

    The process group must have been started; nothing else is shared with the run: no monitor, no file, no seed. What
    the run offloads to nvme is offloaded to the CPU here, and copies within a machine (`zero_hpz_partition_size`) are
    left out. DeepSpeed prints what it prints when an engine is made.

    Args:
        zero: the dictionary for `deepspeed.initialize`, which is not changed.

    Raises:
        InputError: DeepSpeed is too old.
        RuntimeError: DeepSpeed keeps its gradients elsewhere, or the step gives other numbers; the message
            names what to install.
        AssertionError, ValueError, NotImplementedError: DeepSpeed's own, if it refuses the dictionary.
    """
    check_version()
    config = tiny_config(zero)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = next((half[key] for key in half if config[key]["enabled"]), torch.float32)
    with _without_trace():
        model = Tiny(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        engine = cast(Engine, deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0])
        combiner = GradientCombiner(engine, Synthesis("pcgrad", "module"), combine_tasks=True)
        combiner.clear()
        _accumulate(engine, FORGET)
        combiner.stash_forget()
        _accumulate(engine, RETAIN)
        combiner.combine()
        engine.step()
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            found = {name: parameter.detach().float().cpu() for name, parameter in model.named_parameters()}
        norm = engine.get_global_grad_norm()
        engine.destroy()
    expected, expected_norm = expected_step(dist.get_world_size(), config["gradient_clipping"])
    tolerance = 1e-4 if dtype == torch.float32 else 2**-6  # a few roundings of bf16; a wrong gradient is further off
    for name, change in expected.items():
        if not torch.allclose(found[name], change, rtol=tolerance, atol=tolerance * float(change.abs().max())):
            raise unexpected(f"a step on a tiny model moved {name} by {found[name].tolist()}, not {change.tolist()}")
    if norm is None or abs(float(norm) - expected_norm) > tolerance * expected_norm:
        raise unexpected(f"a step on a tiny model reports the gradient norm {norm}, not {expected_norm}")


def tiny_config(zero: DeepSpeedDict) -> DeepSpeedDict:
    """What of a run's DeepSpeed dictionary decides where gradients lie, with small buffers and nothing that writes."""
    given, small = zero.get("zero_optimization", {}), 64
    same = ("stage", "overlap_comm", "contiguous_gradients", "reduce_scatter", "round_robin_gradients")
    stage: DeepSpeedDict = {key: given[key] for key in same if key in given}
    for key in ("offload_optimizer", "offload_param"):
        offload = given.get(key) or {}
        if offload.get("device", "none") != "none":
            stage[key] = {"device": "cpu", "pin_memory": offload.get("pin_memory", False)}
    buffers = ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size")
    fp16 = zero.get("fp16", {}).get("enabled", False)
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": True,
        "gradient_clipping": zero.get("gradient_clipping", 0.0),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "bf16": {"enabled": zero.get("bf16", {}).get("enabled", False), "check_grad_overflow": True},
        "fp16": {"enabled": fp16, **({"initial_scale_power": 4} if fp16 else {})},  # nothing overflows
        "zero_optimization": {**stage, **dict.fromkeys(buffers, small), "stage3_param_persistence_threshold": 0},
        **{key: zero[key] for key in ("data_types",) if key in zero},
        # In half precision the rounding of the sum would grow with the number of ranks.
        "communication_data_type": "fp32",
    }


def expected_step(world_size: int, clip: float) -> tuple[dict[str, Tensor], float]:
    """(change of each tensor, gradient norm before clipping), of whole tensors, by the definition of PCGrad."""
    share = sum(_factor(rank) for rank in range(world_size)) / world_size
    combined = {}
    for name in START:
        f, r = (torch.tensor(direction[name], dtype=torch.float64) * share for direction in (FORGET, RETAIN))
        product = float((f * r).sum())
        combined[name] = f + r - (product / float((r * r).sum()) * r if product < 0 else 0.0)
    norm = float(torch.cat([gradient.flatten() for gradient in combined.values()]).norm())
    shrink = min(1.0, clip / norm) if clip else 1.0
    return {name: (-LR * shrink * gradient).float() for name, gradient in combined.items()}, norm


def _factor(rank: int) -> float:
    """Ranks have different gradients, or a reduction that is left out would go unnoticed."""
    return 0.5 if rank % 2 else 1.5


def _accumulate(engine: Engine, direction: Mapping[str, Sequence[float | Sequence[float]]]) -> None:
    scale = _factor(dist.get_rank()) / MICRO_BATCHES
    inputs = [torch.tensor(direction[name], dtype=torch.float32, device=engine.device) * scale for name in START]
    for _ in range(MICRO_BATCHES):
        engine.backward(engine(*inputs), scale_wrt_gas=False)


@contextmanager
def _without_trace() -> Iterator[None]:
    """DeepSpeed numbers parameters and lists modules for a whole process: restore both, and print nothing."""
    number, modules = partition_parameters.Init.param_id, list(parameter_offload.FWD_MODULE_STACK)
    library = logging.getLogger("DeepSpeed")
    level = library.level
    library.setLevel(logging.ERROR)  # it warns of the tiny model's optimizer
    try:
        yield
    finally:
        library.setLevel(level)
        partition_parameters.Init.param_id = number
        parameter_offload.FWD_MODULE_STACK[:] = modules
        clear_release_cache()
