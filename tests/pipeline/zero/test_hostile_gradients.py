"""What goes wrong: gradients that are not finite, that are missing, tiny, huge, stale or late."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.pipeline.zero.stages import (
    CONFIGURATIONS,
    FP32_WIRE,
    RULES,
    SGD,
    STORES,
    WAYS,
    assert_equal_to_plain,
    bound,
    markdown,
    parts,
    train,
)
from tests.toy import (
    ALPHA,
    BATCH,
    Case,
    chunks_of,
    engine_of,
    error_of,
    model_of,
    train_on_engine,
    train_plainly,
    weights_of,
)


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
