"""What the sharded step costs and refuses: the forget buffer, the collectives, non-finite gradients, caches."""

from __future__ import annotations

import gc
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import World
from tests.distributed import run_distributed


def train(config: dict[str, Any], *, resume: bool = False) -> None:
    from pipeline.config.deepspeed import deepspeed_config
    from pipeline.config.schema import RunConfig
    from pipeline.trainer import run

    parsed = RunConfig.model_validate(config)
    run(parsed, deepspeed_config(parsed), resume)


# -- memory ------------------------------------------------------------------------------------------------------------


def live_storages() -> dict[int, int]:
    """Address -> bytes of every tensor storage that Python can reach."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor) and thing.device.type != "meta"]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def count_partitions_made(cases: list[tuple[dict[str, Any], int]]) -> None:
    """Large storages that exist after a step and did not when the engine had just been built, but for its own."""
    from pipeline import startup
    from pipeline.trainer import StepResult, TrainStep
    from pipeline.zero.combiner import GradientCombiner

    seen: dict[str, Any] = {}

    class Watched(GradientCombiner):
        def __init__(self, engine: Any, *arguments: Any, **options: Any) -> None:
            seen["before"] = live_storages()
            super().__init__(engine, *arguments, **options)

    step = TrainStep.train_step

    def watched_step(self: TrainStep, number: int) -> StepResult:
        result, engine = step(self, number), self.engine
        store: Any = self.combiner.store
        size = store.flat.nbytes
        states = [tensor for state in engine.optimizer.optimizer.state.values() for tensor in state.values()]
        own = {t.untyped_storage().data_ptr() for t in (*states, *engine.module.parameters())}
        born = {at: nbytes for at, nbytes in live_storages().items() if at not in seen["before"] and at not in own}
        seen.setdefault("large", []).append([nbytes for nbytes in born.values() if nbytes >= size // 4])
        seen["size"] = size
        return result

    startup.GradientCombiner = Watched
    TrainStep.train_step = watched_step  # pyright: ignore[reportAttributeAccessIssue]
    for config, expected in cases:
        seen.clear()
        train(config)
        assert len(seen["large"]) == 4
        for large in seen["large"]:
            assert large == [seen["size"]] * expected, (config["synthesis"], large, seen["size"])


def test_no_forget_buffer_under_sum_and_one_under_the_others(world: World, tmp_path: Path) -> None:
    buffers = {"sum": 0, "sago": 1, "pcgrad": 1}
    cases = [(world.configuration(tmp_path / rule, synthesis={"rule": rule}), n) for rule, n in buffers.items()]
    run_distributed(count_partitions_made, 2, cases)


# -- traffic -----------------------------------------------------------------------------------------------------------


def record_traffic(configs: list[dict[str, Any]], report: str) -> None:
    """Write every collective of each run's third step, with its size, as rank 0 saw it."""
    import torch.distributed as dist

    from pipeline.trainer import StepResult, TrainStep

    calls: list[tuple[str, int]] = []
    watching = False

    def watch(name: str) -> None:
        original = getattr(dist, name)

        def wrapper(*arguments: Any, **options: Any) -> Any:
            tensors = [x for x in (*arguments, *options.values()) if isinstance(x, torch.Tensor)]
            if watching:
                calls.append((name, sum(x.numel() for x in tensors)))
            return original(*arguments, **options)

        setattr(dist, name, wrapper)

    names = "all_reduce broadcast reduce all_gather all_gather_into_tensor reduce_scatter reduce_scatter_tensor"
    for name in names.split():
        watch(name)
    step = TrainStep.train_step

    def watched_step(self: TrainStep, number: int) -> StepResult:
        nonlocal watching
        watching = number == 2
        result = step(self, number)
        watching = False
        return result

    TrainStep.train_step = watched_step  # pyright: ignore[reportAttributeAccessIssue]
    traffic = []
    for config in configs:
        calls.clear()
        train(config)
        traffic.append(list(calls))
    if dist.get_rank() == 0:
        Path(report).write_text(json.dumps(traffic))


STAGES = ("cpu", "zero1", "zero2", "zero3_offload")  # files of ds_configs; cpu.json is ZeRO-3 in small buckets


RULES = ("sago", "pcgrad", "blur", "gru")
# Each rule on ZeRO-3, each stage with a rule of another kind. Slow: the rest.
FEW = [*(("cpu", rule) for rule in RULES), ("zero1", "pcgrad"), ("zero2", "gru"), ("zero3_offload", "sago")]


@pytest.mark.parametrize("more", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["few", "more"])
def test_synthesis_adds_one_small_collective(more: bool, world: World, tmp_path: Path) -> None:
    """The table of sums, on every stage; ZeRO-1 also reduces each task's gradient by itself."""
    pairs = [(stage, rule) for stage in STAGES for rule in RULES if ((stage, rule) in FEW) != more]
    keys = list(dict.fromkeys((stage, rule) for pair in pairs for stage, rule in ((pair[0], "sum"), pair)))
    configs = [
        world.configuration(
            tmp_path / f"{stage}-{rule}",
            synthesis={"rule": rule},
            train={"deepspeed": f"ds_configs/{stage}.json", "steps": 3},
        )
        for stage, rule in keys
    ]
    run_distributed(record_traffic, 2, configs, str(tmp_path / "traffic.json"))
    traffic = dict(zip(keys, json.loads((tmp_path / "traffic.json").read_text()), strict=True))
    tensors = load_file(world.folder / "model" / "model.safetensors")
    seen = {name for stage in STAGES if (stage, "sum") in keys for name, _ in traffic[stage, "sum"]}
    assert "reduce_scatter_tensor" in seen, "the watch sees the real traffic"
    for stage, rule in pairs:
        mine, plain = (Counter(map(tuple, traffic[stage, name])) for name in (rule, "sum"))
        extra = Counter({("all_reduce", 10 * len(tensors)): 1})
        if stage == "zero1":  # which reduces when a gradient is complete: once under `sum`, else twice
            extra["all_reduce", sum(tensor.numel() for tensor in tensors.values())] += 1
        looked = Counter({("all_reduce", 1): 1} if stage in ("zero1", "zero2") else {})  # `sum` has no table to tell it
        assert (mine - plain, plain - mine) == (extra, looked), (stage, rule)


# -- non-finite gradients ----------------------------------------------------------------------------------------------


def poison(config: dict[str, Any], steps: list[int], bad: float, task: str, *, resume: bool = False) -> None:
    """Train while rank 1 alone finds `bad` in one element of one gradient at the given steps."""
    from unittest import mock

    import torch.distributed as dist

    from pipeline.trainer import StepResult, TrainStep
    from pipeline.zero.combiner import Combined, GradientCombiner

    stash, combine, step, now = GradientCombiner.stash_forget, GradientCombiner.combine, TrainStep.train_step, [-1]

    def spoil(combiner: GradientCombiner) -> None:
        if now[0] in steps and dist.get_rank() == 1:
            store: Any = combiner.store
            store.flat[3] = bad

    def stash_forget(self: GradientCombiner) -> None:
        if task == "forget":
            spoil(self)
        stash(self)

    def combined(self: GradientCombiner) -> Combined:
        if task == "retain":
            spoil(self)
        return combine(self)

    def counted(self: TrainStep, number: int) -> StepResult:
        now[0] = number
        parameters: list[Any] = list(self.engine.module.parameters())
        before = [p.ds_tensor.clone() for p in parameters]
        result = step(self, number)
        pairs = zip(before, parameters, strict=True)
        assert all(torch.equal(old, p.ds_tensor) for old, p in pairs) == (number in steps), f"step {number}"
        return result

    with (
        mock.patch.object(GradientCombiner, "stash_forget", stash_forget),
        mock.patch.object(GradientCombiner, "combine", combined),
        mock.patch.object(TrainStep, "train_step", counted),
    ):
        train(config, resume=resume)


def poison_each(cases: list[tuple[dict[str, Any], float, str]]) -> None:
    for config, bad, task in cases:
        poison(config, [1], bad, task)


def test_non_finite_gradient_on_one_rank_skips_the_step_on_all(world: World, tmp_path: Path) -> None:
    cases = [
        (world.configuration(tmp_path / f"{rule}-{task}", synthesis={"rule": rule}), bad, task)
        for rule in ("sago", "pcgrad", "sum")
        for bad, task in ((float("inf"), "forget"), (float("nan"), "retain"))
    ]
    run_distributed(poison_each, 2, cases)
    for config, *_ in cases:
        run = Path(config["output"])
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [line["skipped"] for line in lines] == [0, 1, 0, 0], run.name
        final = load_file(run / "final" / "model.safetensors")
        assert all(torch.isfinite(tensor).all() for tensor in final.values()), run.name


def poison_until_it_ends(config: dict[str, Any], resume: bool) -> None:
    with pytest.raises(RuntimeError, match=r"3 steps in a row .*lower optimizer\.lr"):
        poison(config, list(range(100)), float("nan"), "forget", resume=resume)


def test_too_many_non_finite_steps_end_the_run(world: World, tmp_path: Path) -> None:
    config = world.configuration(tmp_path / "run", train={"max_skipped": 3, "steps": 50, "checkpoint_every": 2})
    for resume in (False, True):  # from step 2: two of the three are behind it
        run_distributed(poison_until_it_ends, 2, config, resume)
        assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3
        assert not (tmp_path / "run" / "final").exists()


# -- frozen tensors ----------------------------------------------------------------------------------------------------


def test_only_named_tensors_train(world: World, tmp_path: Path) -> None:
    model = {"trainable": [r"layers\.1\.mlp\.down_proj", "^model.norm"]}
    config = world.configuration(tmp_path / "run", model={**world.configuration("")["model"], **model})
    run_distributed(train, 2, config)
    final = load_file(tmp_path / "run" / "final" / "model.safetensors")
    initial = load_file(world.folder / "model" / "model.safetensors")
    changed = {name for name in final if not torch.equal(final[name], initial[name])}
    assert changed == {"model.layers.1.mlp.down_proj.weight", "model.norm.weight"}
