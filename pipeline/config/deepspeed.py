"""The DeepSpeed file and the number of ranks beside the run configuration: what `deepspeed.initialize` gets.

Imports neither torch nor DeepSpeed: what contradicts itself is refused before they are loaded. What DeepSpeed itself
refuses is in the same words, as soon as it is loaded.
"""

from __future__ import annotations

import importlib.util
import json
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.config.load import merge, read_text
from pipeline.config.schema import REPOSITORY, RunConfig
from pipeline.errors import InputError


def accumulation(config: RunConfig, world_size: int) -> int:
    """Micro-batches per task, step and rank.

    Raises:
        InputError: the global batch does not divide into whole micro-batches.
    """
    batch, micro = config.train.batch_size, config.train.micro_batch_size
    if batch % (micro * world_size):
        raise InputError(
            f"train.batch_size {batch} does not divide into micro-batches of {micro} on {world_size} rank(s): "
            f"it must be a multiple of {micro * world_size}"
        )
    return batch // (micro * world_size)


MONITORS = {"tensorboard": None, "csv_monitor": None, "wandb": "wandb", "comet": "comet_ml"}  # of DeepSpeed, and needs


# What changes a gradient or a step in DeepSpeed 0.19.8 and has no test here: (feature, the values that leave it out). A
# combination of two gradients is only as good as the place where it finds them.
_LOSSY_WIRE = "quantised communication of weights (ZeRO++ qwZ)"


UNTESTED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "zero_optimization.zero_quantized_gradients": ("quantised gradients (ZeRO++ qgZ)", (False, None)),
    "zero_optimization.zero_quantized_weights": (_LOSSY_WIRE, (False, None)),
    "zero_optimization.zero_quantized_nontrainable_weights": ("quantised frozen weights", (False, None)),
    "zero_optimization.zenflow": ("ZenFlow", (None,)),
    "zero_optimization.offload_optimizer.super_offload": ("SuperOffload", (False, None)),
    "zero_optimization.offload_optimizer.ratio": ("an optimizer offloaded in part", (1, None)),
    "zero_optimization.save_muon_momentum_buffer_in_memory": ("Muon", (False, None)),
    "zero_optimization.compute_grad_norm": ("a step without gradient norm", (True, None)),
    "zero_optimization.parameter_alignment": ("padding between parameters", (False, None)),
    "zero_optimization.legacy_stage1": ("the old ZeRO-1", (False, None)),
    "zero_optimization.elastic_checkpoint": ("elastic checkpoints", (False, None)),
    "zero_optimization.load_from_fp32_weights": ("resuming from rounded weights", (True, None)),
    "bf16.bf16_master_weights_and_grads": ("bf16 master weights", (False, None)),
    "bf16.bf16_optimizer_states": ("bf16 optimizer states", (False, None)),
    "bf16.immediate_grad_update": ("gradients added up during the backward pass", (False, None)),
    "bf16.check_grad_overflow": ("steps with a non-finite gradient", (True, None)),
    "fp16.fp16_master_weights_and_grads": ("fp16 master weights", (False, None)),
    "fp16.auto_cast": ("inputs in fp16", (False, None)),
    "torch_autocast.enabled": ("torch.autocast", (False, None)),
    "data_types.param_dtype": ("weights of another dtype than model.dtype", (None,)),
    "data_types.buffer_dtype": ("buffers of another dtype", (None,)),
    "data_types.keep_in_fp32_modules": ("buffers of another dtype", ("auto", None)),
    "prescale_gradients": ("gradients divided before they are added up", (False, None)),
    "gradient_predivide_factor": ("gradients divided before they are added up", (1, None)),
    "gradient_allreduce_op": ("gradients summed over ranks", ("mean", None)),
    "sequence_parallel_size": ("sequence parallelism", (1, None)),
    "tensor_parallel.autotp_size": ("tensor parallelism", (0, 1, None)),
    "expert_parallel.enabled": ("expert parallelism", (False, None)),
    "compile.deepcompile": ("DeepCompile", (False, None)),
    "data_efficiency.enabled": ("sampling and dropping of tokens", (False, None)),
    "hybrid_engine.enabled": ("the hybrid engine", (False, None)),
    "weight_quantization": ("quantised weights", (None,)),
    "checkpoint.load_universal": ("universal checkpoints", (False, None)),
    "checkpoint.use_node_local_storage": ("checkpoints on the machines' own disks", (False, None)),
    "checkpoint.writer": ("checkpoints written later", (None,)),
    "datastates_ckpt": ("checkpoints written later", (False, None)),
}


OLD_NAMES = {
    "bfloat16": "bf16",
    "zero_optimization.cpu_offload": "zero_optimization.offload_optimizer",
    "zero_optimization.cpu_offload_param": "zero_optimization.offload_param",
    "zero_optimization.cpu_offload_use_pin_memory": "pin_memory in zero_optimization.offload_optimizer",
}


SHORT_NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}  # DeepSpeed's, of a dtype


def _refuse_untested(config: RunConfig, given: dict[str, Any], path: Path) -> None:
    """Features without a test are refused by name, whatever name DeepSpeed reads them by.

    Raises:
        InputError: the file asks for something of UNTESTED, or uses one of OLD_NAMES.
    """
    own = SHORT_NAMES[config.model.dtype]
    wire = ("communication in another dtype than fp32 or the model's", ("fp32", own, None))
    for key, (feature, off) in {**UNTESTED, "communication_data_type": wire}.items():
        value = _at(given, key)
        if value not in off and value != "auto":
            raise InputError(
                f"train.deepspeed: {path} sets {key!r} to {value!r}: {feature} would change what a gradient or a step "
                "is, and this program was never tested with that; remove it"
            )
    for key, new in OLD_NAMES.items():
        if _at(given, key) is not None:
            raise InputError(f"train.deepspeed: {path} sets {key!r}, an old name that is not read here; write {new}")


def _at(tree: Any, key: str) -> Any:
    """The value below a dotted key, or None."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def deepspeed_config(config: RunConfig) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`: the user's file plus what the run configuration decides.

    Raises:
        InputError: an unreadable file, or one that contradicts the run configuration.
    """
    path = Path(config.train.deepspeed)
    if not path.is_file() and (REPOSITORY / path).is_file():
        path = REPOSITORY / path  # the shipped files are found from any working directory
    try:
        given = json.loads(read_text(path, "train.deepspeed"))
    except json.JSONDecodeError as error:
        raise InputError(
            f"train.deepspeed: {path}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}"
        ) from None
    if not isinstance(given, dict):
        raise InputError(f"train.deepspeed: {path} must hold a JSON object, not {type(given).__name__}")
    for key in ("zero_optimization", "data_types", "bf16", "fp16", *MONITORS):
        if not isinstance(given.get(key, {}), dict):
            raise InputError(f"train.deepspeed: {path}: {key!r} must hold an object, not {given[key]!r}")
    given = _without_auto(given)
    for key, package in MONITORS.items():
        if given.get(key, {}).get("enabled") and package is not None and importlib.util.find_spec(package) is None:
            raise InputError(f"train.deepspeed: {path} enables {key!r}, which needs the package {package}; install it")
    for key, name in (("csv_monitor", "job_name"), ("tensorboard", "job_name"), ("comet", "experiment_name")):
        if key in given:  # runs by one file are told apart
            given[key].setdefault(name, Path(config.output).name)
    if "comet" in given:  # counted in what the program counts in, steps; DeepSpeed's default is for samples
        given["comet"].setdefault("samples_log_interval", 1)
    for key, owner in (("optimizer", "optimizer"), ("scheduler", "optimizer.schedule"), ("train_batch_size", "train")):
        if given.pop(key, "auto") != "auto":
            raise InputError(f"train.deepspeed: {path} sets {key!r}, which belongs to the run's `{owner}`; remove it")
    _refuse_untested(config, given, path)
    decided: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": 1,  # the program accumulates: two tasks, one boundary
        "managed_gradient_accumulation": True,  # the program sets the boundary (pipeline/zero/combiner.py)
        "gradient_clipping": config.optimizer.max_grad_norm,  # 0 before 0.19.3, then 1
        "bf16": {
            "enabled": config.model.dtype == "bfloat16",
            "check_grad_overflow": True,  # False before 0.19.3
            "immediate_grad_update": False,  # True in 0.16.9
        },
        "fp16": {"enabled": config.model.dtype == "float16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    for key, value in decided.items():
        wanted = value if isinstance(value, dict) else {key: value}
        holder = given.get(key, {}) if isinstance(value, dict) else given
        for name, ours in wanted.items():
            theirs = holder.get(name, "auto") if isinstance(holder, dict) else holder
            if theirs not in ("auto", ours):
                raise InputError(
                    f"train.deepspeed: {path} sets {key!r} to {theirs!r}, but the run's configuration makes it "
                    f"{ours!r}; remove it from the file"
                )
    merged = merge(given, decided)
    merged.setdefault("steps_per_print", 10**9)  # the program has its own progress line
    zero = merged.setdefault("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else zero
    if stage not in (0, 1, 2, 3) or not isinstance(zero, dict):
        raise InputError(f"train.deepspeed: {path}: zero_optimization.stage must be 0, 1, 2 or 3")
    if stage:  # else bf16 runs accumulate in bf16; without ZeRO DeepSpeed has no other way
        merged.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    offload = {key: zero.get(key) or {} for key in ("offload_optimizer", "offload_param")}
    for key, value in offload.items():
        if not isinstance(value, dict):
            raise InputError(f"train.deepspeed: {path}: zero_optimization.{key} must hold an object, not {value!r}")
    devices = {key: value.get("device", "none") for key, value in offload.items()}
    for key, device in devices.items():
        if device != "none":
            zero[key] = {"pin_memory": True, **offload[key]}  # False before 0.19.5
    if devices["offload_param"] == "nvme":  # measured, as is the next: docs/log.md
        raise InputError(
            f"train.deepspeed: {path}: offload_param to nvme gives wrong weights in DeepSpeed 0.19.8; use device cpu"
        )
    if devices["offload_param"] != "none" and stage != 3:
        raise InputError(f"train.deepspeed: {path}: offload of parameters needs ZeRO stage 3")
    if devices["offload_optimizer"] == "nvme":
        if stage != 3:
            raise InputError(f"train.deepspeed: {path}: offload to nvme needs ZeRO stage 3; or use device cpu")
        if not isinstance(offload["offload_optimizer"].get("nvme_path"), str):
            raise InputError(f"train.deepspeed: {path}: offload_optimizer.nvme_path must name a folder on the nvme")
        if config.train.checkpoint_every:
            raise InputError(
                f"train.checkpoint_every: DeepSpeed 0.19.8 does not restore what {path} offloads to nvme; set it to 0, "
                "or use device cpu"
            )
    return merged


def _without_auto(value: Any) -> Any:
    """`"auto"` is as good as nothing, as DeepSpeed's own models take it; but a stage has to be told."""
    if not isinstance(value, dict):
        return value
    return {key: _without_auto(inner) for key, inner in value.items() if inner != "auto" or key == "stage"}


def refuse_what_deepspeed_refuses(config: RunConfig, zero: dict[str, Any]) -> None:
    """DeepSpeed's own validation, before anything is loaded.

    Args:
        zero: as `deepspeed_config` returns it.

    Raises:
        InputError: what DeepSpeed says, blamed on the file.
    """
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    refusals = (AssertionError, ValueError, TypeError, KeyError, AttributeError, DeepSpeedConfigError)
    try:
        DeepSpeedConfig(deepcopy(zero))
    except refusals as error:
        raise _refused(config, error) from error


@contextmanager
def blaming_the_file(config: RunConfig) -> Iterator[None]:
    """What DeepSpeed refuses of the file only once it sees the device, the model or the optimizer.

    Raises:
        InputError: in place of an error with which DeepSpeed itself refuses a combination. Others pass.
    """
    try:
        yield
    except (AssertionError, ValueError, NotImplementedError) as error:
        raiser = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][-1]
        if not str(raiser.f_globals.get("__name__")).startswith("deepspeed."):
            raise
        raise _refused(config, error) from error


def _refused(config: RunConfig, error: BaseException) -> InputError:
    reason = (
        f"{type(error).__name__}: {error}" if isinstance(error, KeyError | AttributeError | TypeError) else str(error)
    )
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = f"{where}: {first['msg'].removeprefix('Value error, ')}, given {first['input']!r}".removeprefix(": ")
    reason = " ".join(reason.split())[:300] or type(error).__name__
    if "supported on your device" in reason:  # the precision is the run's to choose
        return InputError(f"model.dtype: {config.model.dtype}: DeepSpeed refuses it: {reason}")
    return InputError(f"train.deepspeed: {config.train.deepspeed}: DeepSpeed refuses it: {reason}")


def refuse_uneven_groups(zero: dict[str, Any], world_size: int) -> None:
    """ZeRO++ keeps a copy of the weights in each group of `zero_hpz_partition_size` ranks.

    Args:
        zero: as `deepspeed_config` returns it.

    Raises:
        InputError: the ranks do not divide into such groups.
    """
    size = zero["zero_optimization"].get("zero_hpz_partition_size", 1)
    if isinstance(size, int) and size > 1 and world_size % min(size, world_size):
        raise InputError(
            f"train.deepspeed: zero_hpz_partition_size {size} does not divide {world_size} ranks; set it to the number "
            "of GPUs of a machine"
        )
