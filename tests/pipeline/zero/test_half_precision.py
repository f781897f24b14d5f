"""bf16 and fp16 on every way DeepSpeed stores a gradient, against a loop that rounds likewise."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pipeline.zero.stages import (
    CONFIGURATIONS,
    FP32_WIRE,
    RULES,
    SGD,
    STORES,
    WAYS,
    assert_equal_to_plain,
    parts,
    train,
)
from tests.toy import (
    Case,
    train_cases,
    train_plainly,
)


@parts
def test_bf16_equals_a_loop_that_rounds_likewise(more: bool, tmp_path: Path) -> None:
    """fp32 accumulation and fp32 on the wire: nothing is rounded to bf16 but what the plain loop rounds too."""
    cases = {
        f"{name} {rule}": Case(zero=zero, dtype="bfloat16", config=FP32_WIRE, **SGD, **options)
        for name, zero in CONFIGURATIONS.items()
        for rule, options in RULES.items()
        if name != "0" and (name in STORES or rule == "sago")
        if (rule in (*WAYS, "gru") if name in STORES else "overlap" in name) != more
    }
    assert_equal_to_plain(train(cases, 2, tmp_path), cases, 2)


@parts
def test_bf16_accumulation_stays_within_its_rounding(more: bool, tmp_path: Path) -> None:
    """Sums of 2 micro-batches x 2 ranks in bf16: 4 roundings of 2^-9 each, of parts a few times as large as the sum.

    `wire`: as the program sets it, where sums are fp32 and what ranks send each other is bf16, DeepSpeed's default.
    """
    accumulate = {"data_types": {"grad_accum_dtype": "bf16"}}
    cases = {
        f"{name} {rule}": Case(zero=CONFIGURATIONS[name], dtype="bfloat16", config=accumulate, **SGD, **options)
        for name in STORES
        for rule, options in RULES.items()
        if name == "0" or rule in WAYS or rule == "gru"  # stage 0 has no other bf16; the average is in bf16 here
        if (rule in WAYS or rule == "gru") != more
    }
    wire = [] if more else [(name, rule) for name in ("1", "2", "3") for rule in ("sum", "sago", "pcgrad-module")]
    for name, rule in wire:
        sums = {"data_types": {"grad_accum_dtype": "fp32"}}
        cases[f"{name}-wire {rule}"] = Case(
            zero=CONFIGURATIONS[name], dtype="bfloat16", config=sums, **SGD, **RULES[rule]
        )
    cases["0 mixed"] = Case(zero={"stage": 0}, dtype="bfloat16", config=FP32_WIRE)
    made = train(cases, 2, tmp_path)
    assert "NotImplementedError: unsupported mix of model_dtype=torch.bfloat16" in made["0 mixed"]["error"]
    del cases["0 mixed"]
    assert_equal_to_plain(made, cases, 2, lambda name: 8 * 4 * 2**-9)


def train_fp16_cases(cases: dict[str, Case], file: str) -> None:
    """DeepSpeed refuses fp16 on a CPU for lack of fast kernels; torch has slow ones, so the logic can be run."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # pyright: ignore
    train_cases(cases, file)


FP16 = (("sum", " forget"), ("sago", " retain"), ("pcgrad-global", ""))  # each rule, each task once


@parts
def test_fp16_overflow_of_either_task_lowers_the_scale(more: bool, tmp_path: Path) -> None:
    config = {**FP32_WIRE, "fp16": {"initial_scale_power": 8, "loss_scale_window": 100, "hysteresis": 1}}
    poisons = {"": None, " forget": (1, "forget", float("inf")), " retain": (1, "retain", float("nan"))}
    cases = {
        f"{name} {rule}{task}": Case(zero=zero, dtype="float16", config=config, poison=poison, **SGD, **RULES[rule])
        for name, zero in CONFIGURATIONS.items()
        for rule in ("sum", "sago", "pcgrad-global")
        for task, poison in poisons.items()
        if name in STORES[1:]
        if ((rule, task) in FP16 or (rule == "sago" and name in ("1", "3"))) != more
    }
    cases["0 sago"] = Case(zero={"stage": 0}, dtype="float16", config={"fp16": config["fp16"]})
    made = train(cases, 2, tmp_path, train_fp16_cases)
    assert "DeepSpeed does not scale the loss in fp16 without ZeRO" in made["0 sago"]["error"]
    del cases["0 sago"]
    assert_equal_to_plain(made, cases, 2)
    for name, case in cases.items():
        scales = [record["scale"] for record in made[name]["records"]]
        assert scales == ([256, 128, 128, 128] if case.poison else [256] * 4), name


@parts
def test_fp16_numbers_do_not_depend_on_a_scale_that_moves(more: bool, tmp_path: Path) -> None:
    """256, doubled after each step but the first and halved by an overflow: what is averaged and logged is without it.

    Only `gru` remembers a gradient from one scale to the next; the others answer to two gradients of one scale.
    """
    sums = {"fp32": FP32_WIRE, "fp16": {**FP32_WIRE, "data_types": {"grad_accum_dtype": "fp16"}}}
    fp16 = {"initial_scale_power": 8, "loss_scale_window": 1, "hysteresis": 1}
    cases = {
        f"{name} {sum_dtype} {clip}{' poisoned' if poison else ''} {rule}": Case(
            zero=CONFIGURATIONS[name],
            dtype="float16",
            config={**sums[sum_dtype], "fp16": fp16},
            poison=poison,
            clip=clip,
            steps=5,
            **SGD,
            **options,
        )
        for name in STORES[1:]
        if (name in ("1", "2", "3")) != more
        for rule, options in RULES.items()
        for sum_dtype in sums
        for poison in ((None, (2, "retain", float("inf"))) if rule == "gru" else (None,))
        for clip in ((0.5, 0.0) if rule == "sum" else (0.0,))
        if rule == "gru" or (rule in WAYS and sum_dtype == "fp32")
    }
    made = train(cases, 2, tmp_path, train_fp16_cases)
    # fp16 sums of 2 micro-batches x 2 ranks: 4 roundings of 2^-11 each, of parts a few times as large as the sum
    limits: dict[bool, float] = {True: 8 * 4 * 2**-11, False: 2e-4}
    assert_equal_to_plain(made, cases, 2, lambda name: limits[" fp16" in name])
    for name, case in cases.items():
        records, plain = made[name]["records"], list[dict[str, float]]()
        scales = [record["scale"] for record in records]
        assert scales == ([256, 512, 256, 256, 512] if case.poison else [256, 512, 1024, 2048, 4096]), name
        if case.rule != "sum":  # which is not measured here
            train_plainly(case, 2, plain)
            measured = [vars(record["geometry"]) for record in records if record["applied"]]
            for one, other in zip(measured, plain, strict=True):
                near = max(limits[" fp16" in name], 1e-3)
                expected = {key: value for key, value in other.items() if key not in ("dot", "square")}  # of the update
                assert {key: one[key] for key in expected} == pytest.approx(expected, rel=near, abs=near), name


def test_fp16_cannot_run_on_a_cpu(tmp_path: Path) -> None:
    made = train({"fp16": Case(zero={"stage": 3}, dtype="float16")}, 1, tmp_path)
    assert made["fp16"]["error"] == "ValueError: Type fp16 is not supported on your device."
