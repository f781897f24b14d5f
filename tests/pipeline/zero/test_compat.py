"""What is used of DeepSpeed's inside is listed, and a step on a tiny model notices when it means something else."""

from __future__ import annotations

import ast
import functools
import gc
import json
import logging
import os
import time
import weakref
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.schema import REPOSITORY
from pipeline.errors import InputError
from pipeline.modeling.weights import release_memory
from pipeline.zero.compat import INSTALL, INTERNALS, OLDEST, TOO_NEW, check_version, require, unexpected
from tests.distributed import run_distributed

LISTED = {name for names in INTERNALS.values() for name in names}


def test_nothing_is_listed_that_is_not_used_and_every_reason_is_given() -> None:
    files = [file for file in (REPOSITORY / "pipeline" / "zero").glob("*.py") if file.stem != "compat"]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    strings = {node.value for node in nodes if isinstance(node, ast.Constant)}
    own = {"FWD_MODULE_STACK", "PartitionedParameterCoordinator"}  # in compat.py itself
    assert not LISTED - used - strings - own
    assert all(len(why.split()) >= 3 for names in INTERNALS.values() for why in names.values())


def test_every_private_attribute_that_is_used_is_listed() -> None:
    """Of anything but an object's own: `self._x` is ours."""
    found: dict[str, str] = {}
    for file in (REPOSITORY / "pipeline" / "zero").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
            if (
                isinstance(node, ast.Attribute)
                and node.attr.startswith("_")
                and not node.attr.startswith("__")
                and not own
            ):
                found[node.attr] = file.name
    assert "_hp_mapping" in found
    assert set(found) - LISTED <= {"_lru_cache_wrapper"}, found  # of functools


def test_a_missing_attribute_is_named_with_what_to_install() -> None:
    with pytest.raises(RuntimeError, match="object has no is_invalid_trace") as caught:
        require(object(), "coordinator of ZeRO 3")
    assert INSTALL in str(caught.value)


def test_the_supported_versions_are_everywhere_the_same() -> None:
    supported = f"deepspeed>={OLDEST},<{TOO_NEW}"
    assert f'pip install "{supported}"' == INSTALL
    assert f"supports {supported} with" in str(unexpected(""))
    pinned = [line.split()[0] for line in (REPOSITORY / "requirements.txt").read_text().splitlines() if line]
    assert supported in pinned


def test_old_versions_are_refused_and_new_ones_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    for version in ("0.19.7", "0.16.9"):
        with pytest.raises(InputError) as caught:
            check_version(version)
        assert version in str(caught.value) and INSTALL in str(caught.value)
    with caplog.at_level(logging.WARNING):
        for version in ("0.19.8", "0.19.8+abc", "0.19.11"):
            check_version(version)
        assert not caplog.messages
        for version in ("0.20.0", "1.0"):
            check_version(version)
    assert len(caplog.messages) == 2 and "0.20.0" in caplog.messages[0] and INSTALL in caplog.messages[0]


class Complete:
    """A coordinator with a recorded order, as far as its cached method reads it."""

    def __getattr__(self, name: str) -> Any:
        return (lambda: True) if name == "is_complete_trace" else []


def test_models_that_were_sharded_are_released(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is found where the garbage collector finds it, and both places are emptied."""
    from deepspeed.runtime.zero import parameter_offload

    name = "deepspeed.runtime.zero.partitioned_param_coordinator"
    caches = [one for one in gc.get_objects() if type(one) is functools._lru_cache_wrapper and one.__module__ == name]
    assert len(caches) == 1
    model: Any = torch.nn.Module()
    model.ds_external_parameters = lambda: []  # what DeepSpeed gives a module that it shards
    cache = caches[0]
    cache(Complete(), model, 0)
    assert cache.cache_info().currsize == 1
    monkeypatch.setattr(parameter_offload, "FWD_MODULE_STACK", [model])
    seen = weakref.ref(model)
    release_memory()
    assert not parameter_offload.FWD_MODULE_STACK and cache.cache_info().currsize == 0
    del model
    assert seen() is None


# -- the step ----------------------------------------------------------------------------------------------------------


def dictionary(stage: int, dtype: str = "fp32", offload: dict[str, Any] | None = None) -> dict[str, Any]:
    sums = {"data_types": {"grad_accum_dtype": "fp32"}} if stage else {}
    low = {key: {"enabled": dtype == key} for key in ("bf16", "fp16")}
    return {"gradient_clipping": 1.0, **low, **sums, "zero_optimization": {"stage": stage, **(offload or {})}}


CPU = {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
DICTIONARIES = [
    dictionary(stage, dtype, offload)
    for dtype in ("fp32", "bf16", "fp16")
    for stage in (0, 1, 2, 3)
    for offload in ({}, CPU)
    if stage or (dtype != "fp16" and not offload)
]


def test_every_stage_dtype_and_offload_passes_and_leaves_no_trace(tmp_path: Path) -> None:
    run_distributed(run_and_look_for_traces, 2, DICTIONARIES, str(tmp_path / "seconds.json"))
    seconds = json.loads((tmp_path / "seconds.json").read_text())
    print("seconds of each self-test:", [round(one, 2) for one in seconds])
    assert sorted(seconds)[len(seconds) // 2] < 1.0, seconds


def traces() -> dict[str, Any]:
    """What of a process the model that is loaded next could notice."""
    from deepspeed.runtime.zero import parameter_offload, partition_parameters

    return {
        "seed": torch.get_rng_state().tolist(),
        "dtype": torch.get_default_dtype(),
        "parameters numbered": partition_parameters.Init.param_id,
        "modules": list(parameter_offload.FWD_MODULE_STACK),
        "zero.Init": (
            partition_parameters.zero_init_context,
            torch.nn.Module.__init__,
            torch.Tensor.__new__,
            torch.empty,
        ),
        "environment": dict(os.environ),
        "files": sorted(os.listdir()),
    }


def run_and_look_for_traces(dictionaries: list[dict[str, Any]], report: str) -> None:
    import torch.distributed as dist
    from deepspeed.accelerator import get_accelerator
    from torch.distributed import distributed_c10d

    from pipeline.distributed import process_group
    from pipeline.zero import self_test as module

    process_group.start()
    get_accelerator().is_fp16_supported = lambda: True  # slowly, on a CPU  # pyright: ignore
    os.chdir(Path(report).parent)
    for stage in (0, 1, 3):  # what DeepSpeed makes once for a process: groups of ranks, compiled modules
        module.self_test(dictionary(stage))
    made: list[weakref.ref[Any]] = []

    class Watched(module.Tiny):
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__(dtype)
            made.append(weakref.ref(self))

    module.Tiny = Watched  # pyright: ignore[reportAttributeAccessIssue]
    seconds, groups = [], len(distributed_c10d._world.pg_map)
    for zero in dictionaries:
        before, given, start = traces(), deepcopy(zero), time.perf_counter()
        module.self_test(zero)
        seconds.append(time.perf_counter() - start)
        assert traces() == before and zero == given, zero
        assert len(distributed_c10d._world.pg_map) == groups, zero
        gc.collect()
        assert made.pop()() is None, zero
    nvme = {"offload_optimizer": {"device": "nvme", "nvme_path": "/nowhere"}}
    module.self_test({**dictionary(3, offload=nvme), "tensorboard": {"enabled": True, "output_path": "board"}})
    assert not Path("board").exists()
    if dist.get_rank() == 0:
        Path(report).write_text(json.dumps(seconds))


def break_deepspeed() -> None:
    """Releases that could come: each changes what a name means, and none removes it."""
    from unittest import mock

    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Three
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer as Two

    from pipeline.distributed import process_group
    from pipeline.zero.self_test import self_test

    process_group.start()

    def doubled(method: Any) -> Any:
        return lambda *arguments, **named: 2 * method(*arguments, **named)

    nothing: Any = lambda *arguments, **named: None  # noqa: E731
    faults = [
        (dictionary(3), mock.patch.object(Three, "unscale_and_clip_grads", nothing), "moved odd"),
        (dictionary(3, offload=CPU), mock.patch.object(Three, "finalize_gradient_accumulation_boundary", nothing), ""),
        (dictionary(2), mock.patch.object(Two, "scaled_global_norm", doubled(Two.scaled_global_norm)), ""),
        (dictionary(0), mock.patch.object(DeepSpeedEngine, "allreduce_gradients", nothing), ""),
        (dictionary(1, "bf16"), mock.patch.object(DeepSpeedEngine, "allreduce_gradients", nothing), ""),
    ]
    for zero, fault, message in faults:
        with fault:
            with pytest.raises(
                RuntimeError, match=rf"elsewhere than expected: .*step on a tiny model.*{message}"
            ) as caught:
                self_test(zero)
            assert INSTALL in str(caught.value), zero


def test_a_deepspeed_that_means_something_else_is_noticed() -> None:
    run_distributed(break_deepspeed, 2)
