"""Every way DeepSpeed stores a gradient gives the plain loop's weights: real engines, one process group per rank count.

The toy of `tests/toy.py` has tensors that only one task, one step or one micro-batch touches; `tests/oracle.py` is the
reference of the program's own runs. What DeepSpeed cannot do without an accelerator fails with DeepSpeed's own message.
"""

from __future__ import annotations

import gc
import json
import logging
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.config.schema import REPOSITORY
from tests import oracle
from tests.conftest import World
from tests.distributed import run_distributed
from tests.pipeline.zero.test_sharded import train_cases as train_program
from tests.toy import (
    ALPHA,
    BATCH,
    Case,
    chunks_of,
    engine_of,
    error_of,
    model_of,
    train_cases,
    train_on_engine,
    train_plainly,
    weights_of,
)

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
SMALL = {"sub_group_size": 20, "reduce_bucket_size": 10, "stage3_param_persistence_threshold": 0}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "0": {"stage": 0},
    "1": {"stage": 1},
    "1-overlap": {"stage": 1, "overlap_comm": True},
    "1-scattered": {"stage": 1, "contiguous_gradients": False, "reduce_bucket_size": 10},
    "1-offload": {"stage": 1, **OFFLOAD},
    "1-offload-overlap": {"stage": 1, "overlap_comm": True, **OFFLOAD},
    "2": {"stage": 2},
    "2-overlap-small": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 10},
    "2-scattered": {"stage": 2, "contiguous_gradients": False},
    "2-scattered-overlap": {"stage": 2, "contiguous_gradients": False, "overlap_comm": True},
    "2-allreduce": {"stage": 2, "reduce_scatter": False},
    "2-round-robin": {"stage": 2, "round_robin_gradients": True},
    "2-offload": {"stage": 2, **OFFLOAD},
    "2-offload-overlap-small": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 10, **OFFLOAD},
    "3": {"stage": 3},
    "3-no-overlap": {"stage": 3, "overlap_comm": False},
    "3-small": {"stage": 3, **SMALL},
    "3-scattered": {"stage": 3, "contiguous_gradients": False},
    "3-allreduce": {"stage": 3, "reduce_scatter": False},
    "3-offload-small": {"stage": 3, **SMALL, **OFFLOAD},
    "3-offload-all": {"stage": 3, "offload_param": {"device": "cpu"}, **OFFLOAD},
}
STORES = ("0", "1", "1-offload", "2", "2-offload", "3", "3-offload-small")  # one configuration per way and place
RULES: dict[str, dict[str, Any]] = {
    "sum": {"rule": "sum"},
    "sago": {"rule": "sago"},
    "sago-retain": {"rule": "sago", "zero_forget": "retain"},
    "pcgrad-element": {"rule": "pcgrad", "scope": "element"},
    "pcgrad-module": {"rule": "pcgrad", "scope": "module"},
    "pcgrad-layer": {"rule": "pcgrad", "scope": "layer"},
    "pcgrad-global": {"rule": "pcgrad", "scope": "global"},
    "blur": {"rule": "blur", "scope": "global"},
    "gru": {"rule": "gru", "scope": "global"},
}
# One for each way a rule uses a store: no forget buffer, one pass, Gramians per tensor, Gramians over all ranks.
WAYS = {rule: RULES[rule] for rule in ("sum", "sago", "pcgrad-module", "pcgrad-global")}
OF_OPTIONS = ("sum", "pcgrad-module")  # no forget buffer, and Gramians in which an element at a wrong place shows
# A table's cells by default, and, marked slow, all its others: no cell is made twice.
parts = pytest.mark.parametrize("more", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["few", "more"])
FP32_WIRE = {"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}}
SGD: dict[str, Any] = {"optimizer": "sgd", "lr": 0.5}


def bound(rule: str) -> float:
    return 2e-4 if "sago" in rule else 2e-5


def train(cases: dict[str, Case], world_size: int, folder: Path, function: Any = train_cases) -> dict[str, Any]:
    run_distributed(function, world_size, cases, str(folder / "made.pt"), timeout=900)
    return torch.load(folder / "made.pt", weights_only=False)


def assert_equal_to_plain(made: dict[str, Any], cases: dict[str, Case], world_size: int, limits: Any = bound) -> None:
    """Every case has the weights and gradient norms of the plain loop, and skipped what it skipped."""
    plain: dict[str, Any] = {}
    wrong, table = [], {}
    for name, case in cases.items():
        assert "error" not in made[name], (name, made[name]["error"])
        key = repr(replace(case, zero={}, config={}, leaves=()))
        if key not in plain:
            plain[key] = train_plainly(case, world_size)
        weights, norms = plain[key]
        error = error_of(case, made[name], weights)
        print(f"{world_size} ranks, {name}: relative error of the weight change {error:.1e}")
        table[tuple(name.rsplit(" ", 1))] = error
        if error >= limits(name):
            wrong.append((name, error))
        skipped = [step for step, record in enumerate(made[name]["records"]) if not record["applied"]]
        assert skipped == ([case.poison[0]] if case.poison else []), name
        measured = [record["norm"] for record in made[name]["records"] if record["applied"]]
        assert measured == pytest.approx(norms, rel=max(1e-5, limits(name))), name
    if all(len(key) == 2 for key in table):
        print(markdown(table))
    assert not wrong


def markdown(errors: dict[tuple[str, ...], float]) -> str:
    """A row for each first key, a column for each second, the keys in order of appearance."""
    rows, columns = (list(dict.fromkeys(key[axis] for key in errors)) for axis in (0, 1))
    cells = [[f"{errors[row, column]:.0e}" if (row, column) in errors else "" for column in columns] for row in rows]
    lines = [
        ["ZeRO", *columns],
        ["---"] * (len(columns) + 1),
        *([row, *line] for row, line in zip(rows, cells, strict=True)),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# -- the table ---------------------------------------------------------------------------------------------------------


def rules_of(name: str, world_size: int) -> tuple[str, ...]:
    """Two ranks: all rules on each way a gradient is stored, two on each option. One and three, on each way: a rule
    without sums over ranks, one with, one with a state."""
    if world_size != 2:
        return ("sago", "pcgrad-global", "gru") if name in STORES else ()
    return tuple(RULES) if name in STORES else OF_OPTIONS


@pytest.mark.parametrize(
    ("world_size", "micro", "more"),
    [(1, 4, False), (2, 2, False), (3, 1, False), pytest.param(2, 2, True, marks=pytest.mark.slow)],
)
def test_weights_equal_the_plain_loop(world_size: int, micro: int, more: bool, tmp_path: Path) -> None:
    """`python -m pytest tests/pipeline/zero/test_stages.py -rP -k plain_loop` prints the errors as a table.

    more: two ranks, every rule on every option that has not been tried by then.
    """
    cases = {
        f"{name} {rule}": Case(zero=zero, micro=micro, **options)
        for name, zero in CONFIGURATIONS.items()
        for rule, options in RULES.items()
        if (rule in rules_of(name, world_size)) != more
    }
    if world_size == 3:  # `early` belongs to the samples of the first half: one micro-batch would give it to all
        cases = {name: replace(case, micro=4) for name, case in cases.items()}
    made = train(cases, world_size, tmp_path)
    assert_equal_to_plain(made, cases, world_size)
    if more:
        return
    touched = {name for record in made["3 sago"]["records"] for name in record["changed"]}
    assert {"early", "even", "forget_only"} <= touched and not {"never", "frozen.weight"} & touched


PROGRAM = ("zero1", "zero2", "zero3_offload")


@parts
def test_shipped_configurations_through_the_program(more: bool, world: World, tmp_path: Path) -> None:
    (tmp_path / "zero0.json").write_text("{}")
    files = {"zero0": str(tmp_path / "zero0.json"), **{name: f"ds_configs/{name}.json" for name in PROGRAM}}
    rules = [*WAYS, "blur", "gru"]  # the other scopes and `zero_forget` through the program: test_sharded.py
    few = {(file, rule) for file in PROGRAM for rule in ("sum", "sago", "pcgrad-module")}
    few |= {("zero0", "pcgrad-global"), ("zero2", "pcgrad-global"), ("zero2", "blur"), ("zero1", "gru")}
    wanted = {(file, rule) for file in PROGRAM for rule in rules} - few if more else few
    settings = {
        (file, rule): world.configuration(
            tmp_path / f"{file}-{rule}", synthesis=RULES[rule], train={"deepspeed": files[file]}
        )
        for file, rule in sorted(wanted)
    }
    run_distributed(train_program, 2, list(settings.values()), timeout=900)
    initial = load_file(world.folder / "model" / "model.safetensors")
    for rule in sorted({rule for _, rule in wanted}):
        weights, records = oracle.train(next(config for (_, other), config in settings.items() if other == rule))
        for (file, other), config in settings.items():
            if other == rule:
                final = load_file(Path(config["output"]) / "final" / "model.safetensors")
                error = oracle.weight_change_error(final, weights, initial)
                print(f"program, {file} {rule}: relative error of the weight change {error:.1e}")
                assert error < bound(rule), (file, rule)
                lines = (Path(config["output"]) / "metrics.jsonl").read_text().splitlines()
                norms = [json.loads(line)["grad_norm"] for line in lines]
                assert norms == pytest.approx([record["grad_norm"] for record in records], rel=1e-4)


# -- half precision ----------------------------------------------------------------------------------------------------


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


def test_fp16_numbers_do_not_depend_on_a_scale_that_moves(tmp_path: Path) -> None:
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
                assert {key: one[key] for key in other} == pytest.approx(other, rel=near, abs=near), name


def test_fp16_cannot_run_on_a_cpu(tmp_path: Path) -> None:
    made = train({"fp16": Case(zero={"stage": 3}, dtype="float16")}, 1, tmp_path)
    assert made["fp16"]["error"] == "ValueError: Type fp16 is not supported on your device."


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@parts
def test_non_finite_gradient_on_one_rank(more: bool, tmp_path: Path) -> None:
    """Only rank 0's loss is poisoned, and only one gradient element: no rank steps, and the next step is right."""
    cases = {
        f"{name} {rule} {task} {dtype}": Case(
            zero=zero, poison=(1, task, bad), dtype=dtype, config=config, **SGD, **RULES[rule]
        )
        for name, zero in CONFIGURATIONS.items()
        for rule, task, bad in (
            ("sago", "forget", float("inf")),
            ("sum", "retain", float("nan")),
            ("gru", "retain", float("nan")),  # whose average must not see it
        )
        for dtype, config in (("float32", {}), ("bfloat16", FP32_WIRE))
        if name in STORES and (dtype == "float32" or name != "0")
        if (dtype == "float32" or rule == "sago") != more
    }
    made = train(cases, 2, tmp_path)
    assert_equal_to_plain(made, cases, 2)
    assert all(not made[name]["records"][1]["changed"] for name in cases)


@parts
def test_a_task_without_gradient(more: bool, tmp_path: Path) -> None:
    """Every rule is the retain gradient then, but SAGO, taken literally, is zero: not even momentum moves a weight."""
    cases = {
        f"{name} {rule}": Case(
            zero=CONFIGURATIONS[name], scales={"forget": 0.0}, optimizer="adamw" if rule == "sago" else "sgd", **options
        )
        for name in STORES
        for rule, options in RULES.items()
        if (name == "3" or rule in WAYS) != more
    }
    made = train(cases, 2, tmp_path)
    for name in [name for name in cases if name.endswith(" sago")]:
        assert [record["changed"] for record in made[name]["records"]] == [[]] * 4, name
        assert [record["applied"] for record in made[name]["records"]] == [True] * 4, name
        del cases[name]
    assert_equal_to_plain(made, cases, 2)


# Factors of the losses, and an optimizer that gives the update a size which weights show. Where the tasks differ by
# 1e30, SGD would show the larger only; AdamW, whose step has no scale, also shows what only the smaller one reaches.
# The bounds are those of the table: a factor multiplies a loss once, is rounded once, and no rule subtracts more than
# it does at equal scales. (In float32 alone 1e-30 squared would be 0, and 1e15 / 1e-15 times 1e15 not finite.)
HOSTILE: dict[str, tuple[dict[str, float], dict[str, Any]]] = {
    "1e-30": ({"forget": 1e-30, "retain": 1e-30}, {"optimizer": "sgd", "lr": 1e29}),
    "1e15/1e-15": ({"forget": 1e15, "retain": 1e-15}, {"eps": 1e-30}),
    "1e-15/1e15": ({"forget": 1e-15, "retain": 1e15}, {"eps": 1e-30}),
}
# But `gain`, of one element, is a unit of its own here: f off r is 0, of which any arithmetic that subtracts makes a
# rounding of f, 1e15 2^-24, beside which alpha r does not exist. AdamW would compare the signs of two roundings.
CANCELS = {("1e15/1e-15", rule): {"optimizer": "sgd", "lr": 1e-15} for rule in ("pcgrad-module", "pcgrad-layer")}


@parts
def test_hostile_scales(more: bool, tmp_path: Path) -> None:
    """1e-30: products of two of them are 0 in fp32, and so is DeepSpeed's norm (no clipping, which is right)."""
    cases = {
        f"{name} {scale} {dtype} {rule}": Case(
            zero=CONFIGURATIONS[name],
            scales=scales,
            dtype=dtype,
            config=config,
            clip=0.0,
            steps=2,
            **CANCELS.get((scale, rule), optimizer),
            **options,
        )
        for name in ("0", "1", "2-offload", "3")  # whole, fragments, on the CPU, shares
        for scale, (scales, optimizer) in HOSTILE.items()
        for dtype, config in (("float32", {}), ("bfloat16", FP32_WIRE))
        for rule, options in RULES.items()
        if dtype == "float32" or (name != "0" and scale == "1e-30")
        if ((name == "3" and dtype == "float32") or (rule in WAYS and (name, dtype) != ("1", "float32"))) != more
    }
    made = train(cases, 2, tmp_path)
    errors, plain = {}, {}
    for name, case in cases.items():
        assert "error" not in made[name], (name, made[name]["error"])
        assert all(record["applied"] for record in made[name]["records"]), name
        key = repr(replace(case, zero={}, config={}))
        if key not in plain:
            plain[key] = train_plainly(case, 2)[0]
        errors[tuple(name.rsplit(" ", 1))] = error_of(case, made[name], plain[key])
    print(markdown(errors))
    assert not {key: error for key, error in errors.items() if not error < bound(key[1])}


def test_a_tensor_of_the_retain_task_alone(tmp_path: Path) -> None:
    """SAGO, taken literally, leaves it where it was; under `zero_forget: retain` it moves by -lr alpha g_r."""
    cases = {
        f"{name} {zero_forget}": Case(
            zero=CONFIGURATIONS[name], rule="sago", zero_forget=zero_forget, clip=0.0, steps=1, **SGD
        )
        for name in STORES
        for zero_forget in ("literal", "retain")
    }
    made = train(cases, 2, tmp_path)
    for name, case in cases.items():
        model = model_of(case)
        start = dict(model.named_parameters())["retain_only"]
        losses = [model(tokens, "retain", early, True) for [(tokens, early)] in chunks_of(case, 0, "retain", 1)]
        (gradient,) = torch.autograd.grad(torch.stack(losses).sum() / BATCH, [start])
        assert gradient.abs().min() > 1e-4
        change = made[name]["weights"]["retain_only"] - start.detach()
        wanted = -0.5 * ALPHA * gradient if case.zero_forget == "retain" else torch.zeros(3)
        torch.testing.assert_close(change, wanted, rtol=1e-4, atol=0.0, msg=name)


def train_as_documented(cases: dict[str, Case], file: str) -> None:
    """DeepSpeed alone, one backward per step: which tensors did the second step, which does not touch `even`, move?"""
    import torch.distributed as dist

    from pipeline.distributed import process_group as ranks

    ranks.start()
    made = {}
    for name, case in cases.items():
        model = model_of(case)
        engine = engine_of(case, model)
        tokens = torch.tensor([[dist.get_rank(), 3], [4, 5]])
        for even in (True, False):
            before = weights_of(model)
            engine.backward(engine(tokens, "retain", True, even))
            engine.step()
        after = weights_of(model)
        made[name] = {"changed": [key for key in after if not torch.equal(before[key], after[key])]}
        engine.destroy()
    if dist.get_rank() == 0:
        torch.save(made, file)


STALE = {"1-offload": True, "2-offload": True, "3": True, "3-offload-small": True, "0": False, "1": False, "2": False}


@parts
def test_stale_gradients_are_not_applied(more: bool, tmp_path: Path) -> None:
    """DeepSpeed alone applies the last step's gradient again to a tensor that this step does not touch; we do not."""
    cases = {name: Case(zero=CONFIGURATIONS[name], **SGD) for name in STALE}
    alone = train(cases, 2, tmp_path, train_as_documented)
    assert {name: "even" in alone[name]["changed"] for name in cases} == STALE
    cases = {
        f"{name} {rule}": replace(cases[name], **RULES[rule])
        for name in STALE
        for rule in WAYS
        if (rule in ("sum", "sago")) != more
    }
    made = train(cases, 2, tmp_path)
    for name in cases:
        for step, record in enumerate(made[name]["records"]):
            assert ("even" in record["changed"]) == (step % 2 == 0), (name, step)


class LateCopies:
    """Copies to pinned memory that a GPU's stream has queued: they arrive when their event is waited for."""

    def __init__(self) -> None:
        self.queued: list[tuple[torch.Tensor, torch.Tensor]] = []

    def synchronize(self) -> None:
        for place, arrives in self.queued:
            place.copy_(arrives)
        self.queued.clear()


def queue_copies(engine: Any, combiner: Any) -> None:
    """From now on DeepSpeed's copies of gradients to its optimizer on the CPU are late, as they may be on a GPU."""
    from deepspeed.accelerator import get_accelerator

    optimizer, late = engine.optimizer, LateCopies()
    copy = optimizer.async_inplace_copy_grad_to_fp32_buffer_from_gpu

    def later(parameter: Any) -> None:
        group, _, start, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        place = optimizer.single_partition_of_fp32_groups[group].grad.view(-1).narrow(0, start, size)
        before = place.clone()
        copy(parameter)
        late.queued.append((place, place.clone()))
        place.copy_(before)
        optimizer._pending_offload_events[get_accelerator().current_stream()] = late  # pyright: ignore

    optimizer.async_inplace_copy_grad_to_fp32_buffer_from_gpu = later


def train_with_late_copies(cases: dict[str, Case], file: str) -> None:
    import torch.distributed as dist

    from pipeline.distributed import process_group as ranks

    ranks.start()
    made = {name: train_on_engine(case, queue_copies) for name, case in cases.items()}
    if dist.get_rank() == 0:
        torch.save(made, file)


def test_offloaded_gradients_are_waited_for(tmp_path: Path) -> None:
    cases = {
        f"{name} {rule}": Case(zero=CONFIGURATIONS[name], **SGD, **options)
        for name in ("1-offload", "2-offload")
        for rule, options in WAYS.items()
    }
    assert_equal_to_plain(train(cases, 2, tmp_path, train_with_late_copies), cases, 2)


# -- models with adapters and experts ----------------------------------------------------------------------------------


@parts
def test_adapters_and_experts(more: bool, tmp_path: Path) -> None:
    moe: dict[str, Any] = {"model": "moe", "micro": 4}  # 1 or 2 tokens a micro-batch, 8 experts: most are not routed to
    cases = {}
    for rule, options in WAYS.items():
        for name in STORES:
            if (rule in ("sago", "pcgrad-global") or name == "3") == more:
                continue
            leaves = ("MixtralSparseMoeBlock",) if name.startswith("3") else ()
            cases[f"adapters {name} {rule}"] = Case(model="adapters", zero=CONFIGURATIONS[name], **SGD, **options)
            cases[f"moe {name} {rule}"] = Case(zero=CONFIGURATIONS[name], leaves=leaves, **moe, **SGD, **options)
    made = train(cases, 2, tmp_path)
    assert_equal_to_plain(made, cases, 2)
    for name in [name for name in cases if name.startswith("adapters")]:
        touched = {changed for record in made[name]["records"] for changed in record["changed"]}
        assert touched and all("lora_" in changed for changed in touched), name


# -- memory and checks -------------------------------------------------------------------------------------------------


def live_bytes() -> int:
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor) and thing.device.type != "meta"]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def watch_memory(seen: list[tuple[int, ...]], engine: Any, combiner: Any) -> None:
    """(elements of the forget buffer, of a rank's share of the gradient), then (bytes born,) after each `combine`."""
    stash = 0 if combiner.stash is None else combiner.stash.numel()
    parts = 1 if combiner.store.replicated else engine.world_size
    seen.append((stash, sum(combiner.sizes) // parts))
    before = live_bytes() - 4 * stash
    combine = combiner.combine

    def combined() -> Any:
        geometry = combine()
        seen.append((live_bytes() - before,))
        return geometry

    combiner.combine = combined


def measure_memory(names: list[str]) -> None:
    """At the moment of combining, `sago` needs exactly one partition more than `sum`, in every step."""
    from pipeline.distributed import process_group as ranks

    ranks.start()
    for name in names:
        seen: dict[str, list[tuple[int, ...]]] = {"sum": [], "sago": []}
        for rule in seen:
            case = Case(model="wide", zero=CONFIGURATIONS[name], steps=3, **SGD, **RULES[rule])
            train_on_engine(case, partial(watch_memory, seen[rule]))
        (numel, share), *_ = seen["sago"]
        assert seen["sum"][0][0] == 0
        assert abs(numel - share) < 100, (name, "but for padding")
        for without, with_stash in zip(seen["sum"][1:], seen["sago"][1:], strict=True):
            assert abs(with_stash[0] - without[0] - 4 * numel) < numel // 50, (name, seen)


def test_one_forget_buffer_on_every_stage() -> None:
    run_distributed(measure_memory, 2, list(STORES))


def check_the_checks() -> None:
    from pipeline.distributed import process_group as ranks
    from pipeline.synthesis.combine import Synthesis
    from pipeline.zero.combiner import GradientCombiner

    ranks.start()
    hidden = {"3": "grad_partitions_flat_buffer", "2": "averaged_gradients", "1-offload": "norm_for_param_grads"}
    for name, attribute in hidden.items():
        case = Case(zero=CONFIGURATIONS[name])
        engine = engine_of(case, model_of(case))
        delattr(engine.optimizer, attribute)
        with pytest.raises(RuntimeError, match=r"elsewhere than expected.*deepspeed>=0\.19\.8"):
            GradientCombiner(engine, Synthesis("sago"), combine_tasks=True)
    case = Case(zero=CONFIGURATIONS["3"])
    engine = engine_of(case, model_of(case))
    engine.optimizer.fp16_groups[0].reverse()  # the slots of the flat partition in another order
    with pytest.raises(RuntimeError, match="in order"):
        GradientCombiner(engine, Synthesis("sago"), combine_tasks=True)
    foreign: Any = SimpleNamespace(
        optimizer=object(), zero_optimization_stage=lambda: 2, managed_gradient_accumulation=lambda: True
    )
    with pytest.raises(RuntimeError, match="ZeRO stage 2 with object"):
        GradientCombiner(foreign, Synthesis("sago"), combine_tasks=True)


def test_a_buffer_elsewhere_is_refused_at_start() -> None:
    run_distributed(check_the_checks, 1)


def check_the_limit() -> None:
    """DeepSpeed makes groups without a limit: 30 minutes in its releases up to 0.19.5, 10 since."""
    import deepspeed
    import torch.distributed as dist

    from pipeline.distributed import process_group as ranks

    ranks.start(7.0)
    for group in (dist.group.WORLD, deepspeed.comm.new_group([0])):
        limit: Any = group._get_backend(torch.device("cpu")).options  # pyright: ignore
        assert limit._timeout == timedelta(minutes=7)


def test_every_group_of_ranks_has_the_limit_of_the_run() -> None:
    """In a process of its own: the group of a pool has the limit with which the pool began."""
    code = f"from {__name__} import check_the_limit; check_the_limit()"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def check_the_warning() -> None:
    from pipeline.distributed import process_group as ranks
    from pipeline.synthesis.combine import Synthesis
    from pipeline.zero.combiner import GradientCombiner

    ranks.start()
    logged: list[str] = []
    logging.getLogger("pipeline.zero.store").addFilter(lambda record: logged.append(record.getMessage()) is not None)
    for name, number in (("1", 0), ("2-overlap-small", 0), ("1-overlap", 1)):
        case = Case(zero=CONFIGURATIONS[name])
        GradientCombiner(engine_of(case, model_of(case)), Synthesis("sago"), combine_tasks=True)
        assert len(logged) == number, (name, logged)
    assert "overlap_comm" in logged[0] and "train.deepspeed" in logged[0]


def test_overlap_comm_that_is_switched_off_is_logged_once() -> None:
    run_distributed(check_the_warning, 1)
