"""Ranks and the DeepSpeed file: what `deepspeed.initialize` gets, or a refusal."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.deepspeed import accumulation, deepspeed_config
from pipeline.config.run_folder import content_digest
from pipeline.config.untested import OLD_NAMES, UNTESTED
from pipeline.distributed.environment import world_from_environment
from tests.pipeline.config.base import NVME, STAGE3, Resolve, refusal


@pytest.mark.parametrize(
    ("batch", "micro", "world", "count"), [(32, 4, 1, 8), (32, 4, 2, 4), (12, 2, 3, 2), (6, 3, 2, 1)]
)
def test_accumulation_makes_up_the_global_batch(
    batch: int, micro: int, world: int, count: int, config: Resolve
) -> None:
    made = config(train={"batch_size": batch, "micro_batch_size": micro})
    assert accumulation(made, world) == count and count * micro * world == batch


@pytest.mark.parametrize(("batch", "micro", "world"), [(32, 3, 1), (32, 4, 3), (4, 4, 2), (1, 2, 1)])
def test_a_batch_that_does_not_divide_is_refused(batch: int, micro: int, world: int, config: Resolve) -> None:
    message = refusal(lambda: accumulation(config(train={"batch_size": batch, "micro_batch_size": micro}), world))
    for part in ("train.batch_size", str(batch), f"{world} rank", str(micro * world)):
        assert part in message


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, (3, 8)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, (1, 2)),
        ({"PMI_RANK": "5", "PMI_SIZE": "6"}, (5, 6)),
    ],
)
def test_the_world_is_what_the_launcher_says(
    environment: dict[str, str], expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(os.environ):
        if name in ("RANK", "WORLD_SIZE") or name.startswith(("OMPI_COMM_WORLD", "PMI_")):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert world_from_environment() == expected


def test_the_digest_of_a_deepspeed_file_is_of_what_it_decides(deepspeed: Any) -> None:
    """Logging, monitors, micro-batch and the order of keys are not; the stage, clipping and precision are."""
    whole = content_digest(deepspeed(STAGE3))
    csv = {"csv_monitor": {"enabled": True, "output_path": "runs/csv"}, "wall_clock_breakdown": True}
    assert content_digest(deepspeed({**csv, **STAGE3, "steps_per_print": 3}, train={"micro_batch_size": 8})) == whole
    others = [
        deepspeed({"zero_optimization": {"stage": 2}}),
        deepspeed(STAGE3, optimizer={"max_grad_norm": 0.5}),
        deepspeed(STAGE3, model={"path": "x", "dtype": "float16"}),
        deepspeed({**STAGE3, "communication_data_type": "fp32"}),
    ]
    assert len({whole, *map(content_digest, others)}) == 5


def test_the_run_decides_batch_clipping_and_precision(deepspeed: Any) -> None:
    made = deepspeed(STAGE3, train={"micro_batch_size": 8}, optimizer={"max_grad_norm": 0.5})
    assert made["train_micro_batch_size_per_gpu"] == 8
    assert made["gradient_clipping"] == 0.5
    assert made["bf16"]["enabled"] is True and made["fp16"]["enabled"] is False
    assert made["managed_gradient_accumulation"] is True  # the boundary is set by pipeline/zero/combiner.py
    assert made["data_types"]["grad_accum_dtype"] == "fp32"  # gradients are complete, and exact, before they meet
    assert made["zero_optimization"]["stage"] == 3
    full = deepspeed(STAGE3, model={"dtype": "float32"})
    assert not full["bf16"]["enabled"] and not full["fp16"]["enabled"]
    assert deepspeed(STAGE3, model={"dtype": "float16"})["fp16"]["enabled"] is True


def test_what_the_file_says_beside_that_is_kept(deepspeed: Any) -> None:
    given = {
        "zero_optimization": {"stage": 3, "overlap_comm": True},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": "auto",
        "optimizer": "auto",
        "bf16": {"enabled": "auto", "check_grad_overflow": "auto"},
        "fp16": {"initial_scale_power": 12},
        "data_types": {"grad_accum_dtype": "bf16"},
        "wall_clock_breakdown": True,
    }
    made = deepspeed(given)
    assert made["zero_optimization"] == given["zero_optimization"]
    assert made["bf16"]["enabled"] is True and made["fp16"] == {"enabled": False, "initial_scale_power": 12}
    assert made["data_types"] == {"grad_accum_dtype": "bf16"} and made["wall_clock_breakdown"] is True
    assert "optimizer" not in made and made["train_micro_batch_size_per_gpu"] == 4


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({**STAGE3, "optimizer": {"type": "Adam"}}, ["'optimizer'"]),
        ({**STAGE3, "scheduler": {"type": "WarmupLR"}}, ["'scheduler'", "optimizer.schedule"]),
        ({**STAGE3, "train_batch_size": 32}, ["'train_batch_size'"]),
        ({**STAGE3, "train_micro_batch_size_per_gpu": 5}, ["'train_micro_batch_size_per_gpu'", "5", "4"]),
        ({**STAGE3, "gradient_accumulation_steps": 2}, ["'gradient_accumulation_steps'", "2"]),
        ({**STAGE3, "gradient_clipping": 0.3}, ["'gradient_clipping'", "0.3", "1.0"]),
        ({**STAGE3, "bf16": {"enabled": False}}, ["'bf16'", "False", "True"]),
        ({**STAGE3, "fp16": {"enabled": True}}, ["'fp16'", "True", "False"]),
        ({**STAGE3, "managed_gradient_accumulation": False}, ["'managed_gradient_accumulation'"]),
        ("{\n  'stage': 3\n}", ["line 2", "JSON"]),
        ('{"zero_optimization": {"stage": 3}', ["line 1", "JSON"]),
        ("", ["JSON"]),
        ("[1, 2]", ["object", "list"]),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, ["nvme_path", "folder"]),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": NVME}}, ["nvme", "stage 3", "cpu"]),
        ({"zero_optimization": {"stage": 3, "offload_param": NVME}}, ["offload_param", "nvme", "cpu"]),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, ["stage 3"]),
        ({"zero_optimization": {"stage": 4}}, ["stage"]),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": True}}, ["offload_optimizer", "object", "True"]),
        ("3", ["object", "int"]),
        ('{"zero_optimization": {"stage": 3}, "zero_optimization": {"stage": 2}}', ["'zero_optimization'", "twice"]),
        pytest.param(
            {**STAGE3, "data_types": None},
            ["data_types"],
        ),
        pytest.param(
            {**STAGE3, "data_types": "fp32"},
            ["data_types"],
        ),
    ],
)
def test_a_deepspeed_file_that_contradicts_the_run_is_refused(
    content: Any, expected: list[str], deepspeed: Any
) -> None:
    message = refusal(lambda: deepspeed(content))
    for part in (*expected, "train.deepspeed", "ds.json"):
        assert part in message


def test_auto_inside_a_section_counts_as_unset(deepspeed: Any) -> None:
    """As in DeepSpeed's own models; the code here that reads the file must never see the word."""
    keys = (
        "overlap_comm",
        "reduce_bucket_size",
        "sub_group_size",
        "zero_hpz_partition_size",
        "stage3_max_live_parameters",
    )
    zero = {**dict.fromkeys(keys, "auto"), "offload_optimizer": {"device": "cpu", "buffer_count": "auto"}}
    data_types = {"grad_accum_dtype": "auto"}
    made = deepspeed(
        {"zero_optimization": {"stage": 3, **zero}, "data_types": data_types, "communication_data_type": "auto"}
    )
    assert made["zero_optimization"] == {"stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True}}
    assert made["data_types"] == {"grad_accum_dtype": "fp32"} and "communication_data_type" not in made
    assert made == deepspeed({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}})
    assert "stage" in refusal(lambda: deepspeed({"zero_optimization": {"stage": "auto"}}))


@pytest.mark.parametrize(
    ("content", "feature"),
    [
        ({"optimizer": {"type": "Muon"}}, "'optimizer'"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, "qgZ"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "qwZ"),
        ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, "ZenFlow"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}},
            "SuperOffload",
        ),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, "in part"),
        ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, "without gradient norm"),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, "offload_optimizer"),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, "bf16 master weights"),
        ({"bf16": {"check_grad_overflow": False}}, "non-finite"),
        ({"fp16": {"fp16_master_weights_and_grads": True}}, "fp16 master weights"),
        ({"bfloat16": {"enabled": True}}, "bf16"),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "autocast"),
        ({"data_types": {"param_dtype": "fp32"}}, "model.dtype"),
        ({"gradient_allreduce_op": "sum"}, "summed"),
        ({"prescale_gradients": True}, "divided"),
        ({"communication_data_type": "fp16"}, "communication"),
        ({"compile": {"deepcompile": True}}, "DeepCompile"),
        ({"tensor_parallel": {"autotp_size": 2}}, "no run goes with tensor parallelism"),
        ({"tensor_parallel": {"tp": {"tp_size": 2}}}, "no run goes with tensor parallelism"),
    ],
)
def test_what_was_never_tested_is_refused_by_name(content: Any, feature: str, deepspeed: Any) -> None:
    message = refusal(lambda: deepspeed({**STAGE3, **content}))
    assert feature in message and "ds.json" in message and ("remove it" in message or "write " in message)
    assert "\n" not in message


# What DeepSpeed 0.19.8 can be told below these sections, sorted by hand: how much at a time, in which order, from where
# and with what checks, but not what comes out. `stage3_` is left off, and what was never tested is refused.
TOLD = {
    "zero_optimization": """stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce
        allgather_partitions allgather_bucket_size overlap_comm offload_param offload_optimizer sub_group_size
        prefetch_bucket_size param_persistence_threshold model_persistence_threshold max_live_parameters
        max_reuse_distance gather_16bit_weights_on_model_save module_granularity_threshold
        use_all_reduce_for_fetch_params allgather_sequential gather_fp16_weights_on_model_save
        ignore_unused_parameters round_robin_gradients zero_hpz_partition_size memory_efficient_linear
        pipeline_loading_checkpoint override_module_apply log_trace_cache_warnings enable_sanity_checks leaf_module""",
    "zero_optimization.offload_optimizer": """device nvme_path buffer_count pin_memory pipeline_read pipeline_write
        fast_init cpuadam_cores_perc""",
    "zero_optimization.offload_param": "device nvme_path buffer_count buffer_size max_in_cpu pin_memory",
    "bf16": "enabled",
    "fp16": """enabled loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis
        min_loss_scale""",
}


def test_every_key_that_deepspeed_knows_was_looked_at() -> None:
    """A release that brings another one fails here, until somebody has decided what it does to a gradient."""
    from deepspeed.runtime import precision_config
    from deepspeed.runtime.zero import config as zero
    from deepspeed.runtime.zero import offload_config as offload

    models: dict[str, Any] = {
        "zero_optimization": zero.DeepSpeedZeroConfig,
        "zero_optimization.offload_optimizer": offload.DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param": offload.DeepSpeedZeroOffloadParamConfig,
        "bf16": precision_config.DeepSpeedBF16Config,
        "fp16": precision_config.DeepSpeedFP16Config,
    }
    for section, model in models.items():
        there = {name.removeprefix("stage3_") for name in model.model_fields}
        refused = {key.removeprefix(f"{section}.") for key in (*UNTESTED, *OLD_NAMES)}
        assert there - refused == {*TOLD[section].split()}, section


def test_what_deepspeed_changed_the_default_of_is_stated(deepspeed: Any) -> None:
    """Of 0.16.0 to 0.19.8, as their sources have it: clipping 0 then 1, the bf16 overflow check off then on, immediate
    updates on in 0.16.9, pinned memory off then on. (The limit of collectives, 30 minutes then 10: `ranks.start`.)"""
    offload = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu", "pin_memory": False}}
    made = deepspeed({"zero_optimization": {"stage": 3, **offload}}, optimizer={"max_grad_norm": 0.0})
    assert made["gradient_clipping"] == 0.0 and made["managed_gradient_accumulation"] is True
    assert made["bf16"] == {"enabled": True, "check_grad_overflow": True, "immediate_grad_update": False}
    assert made["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert made["zero_optimization"]["offload_param"] == {"device": "cpu", "pin_memory": False}


def test_what_nvme_would_not_restore_is_not_saved(deepspeed: Any) -> None:
    content = {"zero_optimization": {"stage": 3, "offload_optimizer": NVME}}
    assert deepspeed(content)["zero_optimization"]["offload_optimizer"] == {**NVME, "pin_memory": True}
    message = refusal(lambda: deepspeed(content, train={"checkpoint_every": 5}))
    assert "train.checkpoint_every" in message and "nvme" in message and "ds.json" in message


def test_a_metric_whose_moments_a_rank_does_not_have_is_refused(deepspeed: Any) -> None:
    synthesis, half = {"metric": "adam"}, {"path": "some/model", "dtype": "bfloat16"}
    on_nvme = {"zero_optimization": {"stage": 3, "offload_optimizer": NVME}}
    message = refusal(lambda: deepspeed(on_nvme, synthesis=synthesis))
    assert "synthesis.metric" in message and "nvme" in message and "use device cpu" in message
    first = {"zero_optimization": {"stage": 1}}
    message = refusal(lambda: deepspeed(first, synthesis=synthesis, model=half))
    assert "synthesis.metric" in message and "ZeRO stage 1 in bfloat16" in message and "use stage 2" in message
    message = refusal(lambda: deepspeed(first, synthesis={"confine": {"share": 0.2}}, model=half))
    assert message.startswith("synthesis.confine needs the moments") and "use stage 2" in message
    for content, sections in (
        (first, {"model": {"path": "some/model", "dtype": "float32"}}),
        (first, {"model": half, "optimizer": {"name": "sgd"}}),
        (STAGE3, {"model": half}),
    ):
        assert deepspeed(content, synthesis=synthesis, **sections)
    offload = {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}
    assert deepspeed(offload, synthesis=synthesis, model=half)


def test_a_missing_deepspeed_file_is_refused(config: Resolve) -> None:
    message = refusal(lambda: deepspeed_config(config("--train.deepspeed", "no/such.json")))
    assert "train.deepspeed" in message and "no/such.json" in message


def test_shipped_deepspeed_files_are_found_from_any_folder(
    config: Resolve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert deepspeed_config(config("--train.deepspeed", "ds_configs/zero3.json"))["zero_optimization"]["stage"] == 3


def test_fp16_without_zero_is_refused(deepspeed: Any) -> None:
    """DeepSpeed divides by a loss scale there that it has not multiplied with."""
    model = {"path": "some/model", "dtype": "float16"}
    message = refusal(lambda: deepspeed({"zero_optimization": {"stage": 0}}, model=model))
    assert "ds.json" in message and "float16" in message and "stage 1" in message
    assert deepspeed({"zero_optimization": {"stage": 1}}, model=model)["fp16"]["enabled"] is True
