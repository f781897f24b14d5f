"""The DeepSpeed file and the number of ranks beside the run configuration: what `deepspeed.initialize` gets.

Imports neither torch nor DeepSpeed, so that a contradiction is refused before they are loaded. What DeepSpeed itself
refuses becomes a message of the same form as soon as DeepSpeed is loaded.
"""

from __future__ import annotations

import importlib.util
import json
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.config.files import DEEPSPEED_FILES, find_file
from pipeline.config.load import merge, read_text
from pipeline.config.schema import RunConfig
from pipeline.config.untested import refuse_untested
from pipeline.errors import InputError
from pipeline.files import Json

DeepSpeedDict = Json  # the `config` of `deepspeed.initialize`; DeepSpeed itself has no type for it


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


# DeepSpeed's monitors, and the package that each needs.
MONITORS = {"tensorboard": None, "csv_monitor": None, "wandb": "wandb", "comet": "comet_ml"}


def deepspeed_config(config: RunConfig) -> DeepSpeedDict:
    """The dictionary for `deepspeed.initialize`: the user's file plus what the run configuration decides.

    Raises:
        InputError: an unreadable file, or one that contradicts the run configuration.
    """
    path = find_file(config.train.deepspeed, "train.deepspeed", DEEPSPEED_FILES)
    given = _without_auto(_read(path))
    _prepare_monitors(given, config, path)
    for key, owner in (("optimizer", "optimizer"), ("scheduler", "optimizer.schedule"), ("train_batch_size", "train")):
        if given.pop(key, "auto") != "auto":
            raise InputError(f"train.deepspeed: {path} sets {key!r}, which belongs to the run's `{owner}`; remove it")
    refuse_untested(config, given, path)
    decided = _decided_by_the_run(config)
    _refuse_contradictions(given, decided, path)
    merged = merge(given, decided)
    merged.setdefault("steps_per_print", 10**9)  # the program prints its own progress line
    zero = merged.setdefault("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else zero
    if stage not in (0, 1, 2, 3) or not isinstance(zero, dict):
        raise InputError(f"train.deepspeed: {path}: zero_optimization.stage must be 0, 1, 2 or 3")
    if stage == 0 and config.model.dtype == "float16":
        raise InputError(
            f"train.deepspeed: {path}: without ZeRO DeepSpeed does not scale the loss in float16; use stage 1, or "
            "model.dtype bfloat16"
        )
    if stage == 3 and config.model.load_in_4bit:
        raise InputError(
            f"train.deepspeed: {path}: ZeRO stage 3 cuts every weight into shares while it loads, and "
            "model.load_in_4bit packs a weight together with constants that cannot be cut so; use stage 2 "
            "(ds_configs/zero2.json), or remove model.load_in_4bit"
        )
    if stage:  # else bf16 runs accumulate in bf16; without ZeRO DeepSpeed has no other way
        merged.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    _check_offload(zero, stage, config, path)
    _check_optimizer_state(merged, stage, config, path)
    return merged


def _read(path: Path) -> Json:
    """
    Raises:
        InputError: no JSON object, or one whose sections are not objects.
    """
    try:
        given = json.loads(read_text(path, "train.deepspeed"), object_pairs_hook=partial(_once, path))
    except json.JSONDecodeError as error:
        raise InputError(
            f"train.deepspeed: {path}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}"
        ) from None
    if not isinstance(given, dict):
        raise InputError(f"train.deepspeed: {path} must hold a JSON object, not {type(given).__name__}")
    for key in ("zero_optimization", "data_types", "bf16", "fp16", *MONITORS):
        if not isinstance(given.get(key, {}), dict):
            raise InputError(f"train.deepspeed: {path}: {key!r} must hold an object, not {given[key]!r}")
    return given


def _once(path: Path, pairs: list[tuple[str, Any]]) -> Json:
    """The object of these pairs; raises InputError for a key that is there twice, of which JSON keeps the last."""
    found: Json = {}
    for key, value in pairs:
        if key in found:
            raise InputError(f"train.deepspeed: {path}: key {key!r} is there twice in one object; join them")
        found[key] = value
    return found


def _prepare_monitors(given: Json, config: RunConfig, path: Path) -> None:
    """Give DeepSpeed's monitors the name of the run.

    Raises:
        InputError: the package of a monitor is not installed.
    """
    for key, package in MONITORS.items():
        if given.get(key, {}).get("enabled") and package is not None and importlib.util.find_spec(package) is None:
            raise InputError(f"train.deepspeed: {path} enables {key!r}, which needs the package {package}; install it")
    for key, name in (("csv_monitor", "job_name"), ("tensorboard", "job_name"), ("comet", "experiment_name")):
        if key in given:  # runs that share a file get different names
            given[key].setdefault(name, Path(config.output).name)
    if "comet" in given:  # the program counts steps; DeepSpeed's default interval is meant for samples
        given["comet"].setdefault("samples_log_interval", 1)


def _decided_by_the_run(config: RunConfig) -> Json:
    """The keys of a DeepSpeed configuration that the run's own configuration decides."""
    return {
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


def _refuse_contradictions(given: Json, decided: Json, path: Path) -> None:
    """
    Raises:
        InputError: the file sets a key to another value than the run decides.
    """
    for key, value in decided.items():
        wanted = value if isinstance(value, dict) else {key: value}
        section = given.get(key, {}) if isinstance(value, dict) else given
        for name, ours in wanted.items():
            theirs = section.get(name, "auto") if isinstance(section, dict) else section
            if theirs not in ("auto", ours):
                raise InputError(
                    f"train.deepspeed: {path} sets {key!r} to {theirs!r}, but the run's configuration makes it "
                    f"{ours!r}; remove it from the file"
                )


def _check_offload(zero: Json, stage: int, config: RunConfig, path: Path) -> None:
    """Check the sections of offload in `zero_optimization`, and pin their memory unless the file sets it otherwise.

    Raises:
        InputError: an offload that DeepSpeed does not do correctly, or that the run's configuration excludes.
    """
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


def _check_optimizer_state(merged: Json, stage: int, config: RunConfig, path: Path) -> None:
    """
    Raises:
        InputError: a rule needs Adam's state of the gradient's elements where a rank does not have it in memory.
    """
    offload = (merged["zero_optimization"].get("offload_optimizer") or {}).get("device", "none")
    wide = merged.get("data_types", {}).get("grad_accum_dtype") == "fp32" and config.model.dtype == "bfloat16"
    metric, confine = config.synthesis.metric, config.synthesis.confine
    key = "synthesis.metric: adam" if metric == "adam" else "synthesis.confine" if confine is not None else None
    if key is None or config.optimizer.name != "adamw":
        return
    if offload == "nvme":
        raise InputError(
            f"{key} reads the moments of Adam, which {path} offloads to nvme; use device cpu, or remove it"
        )
    if stage == 1 and wide and offload == "none":
        raise InputError(
            f"{key} needs the moments of all elements whose gradient a rank has; under ZeRO stage 1 in bfloat16 "
            f"({path}) it has the whole gradient and the moments of a share; use stage 2"
        )


def _without_auto(tree: Json) -> Json:
    """The tree without the keys whose value is `"auto"`, which DeepSpeed's own models treat as unset; but not the
    stage, which the file must state."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in tree.items()
        if value != "auto" or key == "stage"
    }


def refuse_what_deepspeed_refuses(config: RunConfig, zero: DeepSpeedDict) -> None:
    """Run DeepSpeed's own validation before anything is loaded.

    Args:
        zero: as `deepspeed_config` returns it.

    Raises:
        InputError: DeepSpeed's reason, with the name of the file.
    """
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    refusals = (AssertionError, ValueError, TypeError, KeyError, AttributeError, DeepSpeedConfigError)
    try:
        DeepSpeedConfig(deepcopy(zero))
    except refusals as error:
        raise _refused(config, error) from error


@contextmanager
def blaming_the_file(config: RunConfig) -> Iterator[None]:
    """Name the file when DeepSpeed refuses it only after it has seen the device, the model or the optimizer.

    Raises:
        InputError: in place of an error by which DeepSpeed itself refuses a combination. Other errors pass.
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
    if "supported on your device" in reason:  # the run chooses the precision, not the file
        return InputError(f"model.dtype: {config.model.dtype}: DeepSpeed refuses it: {reason}")
    return InputError(f"train.deepspeed: {config.train.deepspeed}: DeepSpeed refuses it: {reason}")


def refuse_uneven_groups(zero: DeepSpeedDict, world_size: int) -> None:
    """Refuse ranks that do not divide into ZeRO++'s groups, each of which stores a second copy of the weights.

    Args:
        zero: as `deepspeed_config` returns it.

    Raises:
        InputError: `zero_hpz_partition_size` does not divide the ranks.
    """
    size = zero["zero_optimization"].get("zero_hpz_partition_size", 1)
    if isinstance(size, int) and size > 1 and world_size % min(size, world_size):
        raise InputError(
            f"train.deepspeed: zero_hpz_partition_size {size} does not divide {world_size} ranks; set it to the number "
            "of GPUs of a machine"
        )
