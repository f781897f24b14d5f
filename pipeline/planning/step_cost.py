"""The cost of a rule compared with `sum`: time, memory and traffic of a step on the same model, tokens and micro-batch.

    deepspeed --num_gpus N --module pipeline.planning.step_cost [--rules sago pcgrad] [--hidden 512 --layers 8] ...

One engine and one process group run all schedules in turns, step by step, so every ratio is a median over pairs of
neighbouring steps. `joint` is the schedule that only `sum` allows: one forward and backward over both batches at once.
It gathers parameters once instead of twice and stores the activations of both batches. If memory limits the
micro-batch, `joint` does not fit, and a user would run `sum` in two passes.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

from pipeline.config.deepspeed import deepspeed_config
from pipeline.config.schema import RunConfig

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.data.batches import Batch
    from pipeline.losses.objectives import LossInputs
    from pipeline.losses.task import Task
    from pipeline.modeling.outputs import ModelEngine
    from pipeline.zero.combiner import GradientCombiner

REDUCTIONS = "all_reduce broadcast reduce all_gather all_gather_into_tensor reduce_scatter reduce_scatter_tensor"


class Traffic:
    """Counts the bytes that collectives move, as this rank calls them."""

    def __init__(self) -> None:
        import torch.distributed as dist

        self.calls, self.bytes = 0, 0
        for name in REDUCTIONS.split():
            setattr(dist, name, self._counted(getattr(dist, name)))

    def _counted(self, collective: Callable[..., object]) -> Callable[..., object]:
        import torch

        def wrapper(*arguments: object, **options: object) -> object:
            tensors = [x for x in (*arguments, *options.values()) if isinstance(x, torch.Tensor)]
            self.calls += 1
            self.bytes += max((x.numel() * x.element_size() for x in tensors), default=0)
            return collective(*arguments, **options)

        return wrapper


def restart_peak(cuda: bool) -> bool:
    """Reset the peak of memory to its present size; returns whether this system can."""
    if cuda:
        import torch

        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
    except OSError:
        return False
    return True


def peak(cuda: bool) -> int:
    """Most bytes of this rank since `restart_peak`: torch's on a GPU, else all resident pages of the process."""
    if cuda:
        import torch

        return torch.cuda.max_memory_allocated()
    (kilobytes,) = re.findall(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return 1024 * int(kilobytes)


def build(options: argparse.Namespace) -> tuple[ModelEngine, list[Task]]:
    """(engine, the two tasks): an untrained Llama of the given shape, on random tokens."""
    import deepspeed
    import torch
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM, LlamaConfig
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    from pipeline.modeling.outputs import install_outputs
    from pipeline.optim import make_optimizer, make_schedule
    from pipeline.planning.random_tasks import random_tasks

    world = dist.get_world_size()
    batch = options.micro_batch * options.accumulation * world
    config = RunConfig.model_validate(
        {
            "output": "unused",
            "model": {"path": "unused", "dtype": options.dtype, "gradient_checkpointing": options.checkpointing},
            "data": {"max_length": options.tokens},
            "optimizer": {"lr": 1e-5},
            "train": {"batch_size": batch, "micro_batch_size": options.micro_batch, "deepspeed": options.ds_config},
        }
    )
    zero = deepspeed_config(config)
    keep = HfDeepSpeedConfig(zero)  # while it lives, models are built partitioned
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 3,
        num_hidden_layers=options.layers,
        num_attention_heads=max(options.hidden // 64, 1),
    )
    model = AutoModelForCausalLM.from_config(shape, dtype=getattr(torch, options.dtype))
    del keep
    if options.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    made = deepspeed.initialize(
        model=model,
        optimizer=make_optimizer(config, model, zero),  # pyright: ignore[reportArgumentType]
        lr_scheduler=lambda optimizer: make_schedule(config, optimizer, 100),  # pyright: ignore[reportArgumentType]
        config=zero,
    )
    engine = cast("ModelEngine", made[0])
    install_outputs(engine)
    return engine, random_tasks(config, options.vocabulary)


def joint_step(engine: ModelEngine, combiner: GradientCombiner, tasks: list[Task], step: int) -> None:
    """`sum` in its fastest schedule: each forward and backward contains a micro-batch of both tasks."""
    import torch

    from pipeline.data.batches import Batch
    from pipeline.modeling.outputs import TokenLosses, forward

    combiner.clear()
    forget, retain = tasks
    for pair in zip(forget.sampler.batches(step), retain.sampler.batches(step), strict=True):
        both = Batch(*(torch.cat(parts) for parts in zip(*(vars(b).values() for b in pair), strict=True)))
        both = both.to(engine.device)
        losses = forward(engine, both, TokenLosses())
        size = len(pair[0].index)
        loss = retain.objective.terms(loss_inputs(losses[size:], pair[1])) / retain.loss_denominator(step)
        loss = loss + forget.objective.terms(loss_inputs(losses[:size], pair[0])) / forget.loss_denominator(step)
        engine.backward(loss * engine.world_size, scale_wrt_gas=False)
    combiner.combine()
    engine.step()


def loss_inputs(losses: Tensor, batch: Batch) -> LossInputs:
    from pipeline.losses.objectives import LossInputs

    return LossInputs(batch.labels, batch.attention_mask, beta=0.1, delta=0.0, token_losses=losses)


def measure(options: argparse.Namespace, traffic: Traffic) -> list[SimpleNamespace]:
    """One row a schedule: step seconds, ratios to `sum` and to `joint`, memory and traffic of a step."""
    import torch

    from pipeline.synthesis.combine import Synthesis
    from pipeline.trainer import TrainStep
    from pipeline.zero.combiner import GradientCombiner

    engine, tasks = build(options)
    plain = GradientCombiner(engine, Synthesis("sum"), combine_tasks=False)
    partition_bytes = sum(size for _, size in plain.store.layout) * plain.store.dtype.itemsize
    schedules: dict[str, Callable[[int], object]] = {
        "sum": TrainStep(engine, plain, *tasks).train_step,
        "joint": lambda step: joint_step(engine, plain, tasks, step),
    }
    held: dict[str, GradientCombiner] = {}  # of the present schedule: its forget buffer exists during its own step only
    for rule in options.rules:
        schedules[rule] = lambda step, rule=rule: TrainStep(engine, held[rule], *tasks).train_step(step)
    cuda = engine.device.type == "cuda"
    seconds: dict[str, list[float]] = {name: [] for name in schedules}
    peaks: dict[str, list[int]] = {name: [] for name in schedules}  # empty if the system does not measure it
    rows = {name: SimpleNamespace(name=name) for name in schedules}
    for pair in range(options.warm_up + options.pairs):
        order = list(schedules) if pair % 2 else list(reversed(schedules))  # no schedule is always the first
        for name in order:
            held.clear()
            if name in options.rules:
                held[name] = GradientCombiner(engine, Synthesis(name), combine_tasks=True)
            if cuda:
                torch.cuda.synchronize()
            measures_peak = restart_peak(cuda)
            before_calls, before_bytes = traffic.calls, traffic.bytes
            start = time.perf_counter()
            schedules[name](pair % 4)
            if cuda:
                torch.cuda.synchronize()
            elapsed = time.perf_counter() - start
            rows[name].calls, rows[name].bytes = traffic.calls - before_calls, traffic.bytes - before_bytes
            if pair >= options.warm_up:
                seconds[name].append(elapsed)
                if measures_peak:
                    peaks[name].append(peak(cuda))
    for name, row in rows.items():
        row.seconds = median(seconds[name])
        for rival in ("sum", "joint"):
            ratios = [a / b for a, b in zip(seconds[name], seconds[rival], strict=True)]
            setattr(row, rival, median(ratios))
        extra = [(a - b) / partition_bytes for a, b in zip(peaks[name], peaks["sum"], strict=True)]
        row.partitions = median(extra) if extra else None
    return list(rows.values())


def bandwidth() -> str | None:
    """Bytes a second of SAGO's combination (reads f and r, writes g) against a device-to-device copy; GPU only."""
    import torch

    from pipeline.synthesis.combine import Piece, Synthesis

    if not torch.cuda.is_available():
        return None
    f, r = (torch.randn(2**28, device="cuda") for _ in range(2))

    def timed(work: Callable[[], object]) -> float:
        samples = []
        for _ in range(7):
            torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            torch.cuda.synchronize()
            samples.append(time.perf_counter() - start)
        return median(samples[2:])

    copy = 2 * f.nbytes / timed(lambda: r.copy_(f))
    combination = 3 * f.nbytes / timed(lambda: Synthesis("sago").combine_([Piece(0, f, r)], [0]))
    return f"combination {combination / 1e9:.0f} GB/s, copy {copy / 1e9:.0f} GB/s: {combination / copy:.0%}"


def table(rows: list[SimpleNamespace]) -> str:
    def cell(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    lines = [
        "| schedule | seconds a step | of `sum` | of `joint` | extra peak, partitions | collectives | MB moved |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [f"{row.seconds:.4f}", f"{row.sum:.3f}", f"{row.joint:.3f}", cell(row.partitions, ".2f")]
        lines.append(f"| {row.name} | {' | '.join(cells)} | {row.calls} | {row.bytes / 1e6:.2f} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="deepspeed --module pipeline.planning.step_cost", description="The cost of a rule compared with sum."
    )
    parser.add_argument("--rules", nargs="+", default=["sago", "pcgrad"], help="rules to compare with `sum`")
    parser.add_argument("--ds-config", default="ds_configs/zero3.json", help="DeepSpeed file, or a shipped name: zero3")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=128, help="length of a sequence")
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences per forward and rank")
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches per task and step")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--pairs", type=int, default=15, help="measured steps of each schedule")
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--output", type=Path, help="also append the table to this file")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()

    import torch.distributed as dist

    from pipeline.distributed import process_group as ranks
    from pipeline.monitoring.console import quiet_libraries

    quiet_libraries()
    traffic = Traffic()  # before DeepSpeed binds the collectives
    device = ranks.start()
    rows = measure(options, traffic)
    if dist.get_rank() == 0:
        shape = {k: v for k, v in vars(options).items() if k not in ("local_rank", "output", "rules")}
        text = f"{dist.get_world_size()} rank(s) on {device.type}, {shape}\n\n{table(rows)}\n{bandwidth() or ''}\n"
        print(text)
        if options.output:
            with options.output.open("a", encoding="utf-8") as file:
                file.write(text + "\n")
    ranks.leave(0)


if __name__ == "__main__":
    sys.exit(main())
