"""The cost of a rule compared with `sum`: time, memory and traffic of a step on the same model, tokens and micro-batch.

    deepspeed --num_gpus N --module pipeline.planning.step_cost [--rules sago pcgrad] [--hidden 512 --layers 8] ...

One engine and one process group run `sum` and the rules, each in both schedules (`train.schedule`), in turns, step by
step, so every ratio is a median over pairs of neighbouring steps. A rule is compared with the cheapest `sum`: where
memory limits the micro-batch, no joint pass fits, and `sum` in two passes is what a user would run. `sum` in joint
passes is DeepSpeed's ordinary step on both batches.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from pipeline.config.schema import RunConfig
from pipeline.files import Json, write_whole
from pipeline.planning.meters import Traffic, peak, restart_peak

if TYPE_CHECKING:
    from pipeline.planning.random_run import RandomRun
    from pipeline.trainer import TrainStep
    from pipeline.zero.combiner import Combined


def llama(shape: Json) -> Json:
    """The arguments of LlamaConfig for the options of this command."""
    return {
        "vocab_size": shape["vocabulary"],
        "hidden_size": shape["hidden"],
        "intermediate_size": shape["hidden"] * 3,
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": max(shape["hidden"] // 64, 1),
    }


def build(options: argparse.Namespace) -> RandomRun:
    """A run of the given shape."""
    import torch.distributed as dist

    from pipeline.planning.random_run import random_run

    batch = options.micro_batch * options.accumulation * dist.get_world_size()
    settings = {
        "output": "unused",
        "model": {"path": "unused", "dtype": options.dtype, "gradient_checkpointing": options.checkpointing},
        "data": {"max_length": options.tokens},
        "optimizer": {"lr": 1e-5},
        "train": {"batch_size": batch, "micro_batch_size": options.micro_batch, "deepspeed": options.ds_config},
    }
    return random_run(RunConfig.model_validate(settings), llama(vars(options)))


SCHEDULES = ("sequential", "joint")


@dataclass
class Cost:
    """Of one rule in one schedule."""

    rule: str
    schedule: str
    seconds: list[float] = field(default_factory=list)  # of each measured step
    peaks: list[int] = field(default_factory=list)  # bytes; empty if the system does not measure it
    collectives: int = 0  # these four of one step
    moved: int = 0  # bytes
    gathered: int = 0  # bytes of weights, among them
    kernels: int = 0
    waits: int = 0  # of the host for the device; on a CPU, the reads that would be such
    bytes_an_element: float | None = None  # of the partition, by `GradientCombiner.combine`: reads and writes

    def ratio(self, other: Cost) -> float:
        return median(mine / theirs for mine, theirs in zip(self.seconds, other.seconds, strict=True))


class Bench:
    """One engine on which every rule takes steps in every schedule."""

    def __init__(self, options: argparse.Namespace, traffic: Traffic) -> None:
        self.run, self.micro_batches = build(options), options.accumulation
        self.traffic, self.cuda = traffic, self.run.engine.device.type == "cuda"

    def step_of(self, cost: Cost) -> TrainStep:
        """Its forget buffer exists as long as the caller has it."""
        from pipeline.synthesis.combine import Synthesis
        from pipeline.trainer import TrainStep
        from pipeline.zero.combiner import GradientCombiner
        from pipeline.zero.joint import JointPass

        engine, forget, retain, rows = self.run
        combiner = GradientCombiner(engine, Synthesis(cost.rule), combine_tasks=cost.rule != "sum")
        joint = JointPass(combiner, rows, self.micro_batches) if cost.schedule == "joint" else None
        return TrainStep(engine, combiner, forget, retain, joint=joint)

    def time(self, cost: Cost, number: int, is_measured: bool) -> None:
        step = self.step_of(cost)
        self.synchronize()
        measures_peak = restart_peak(self.cuda)
        before = vars(self.traffic).copy()
        start = time.perf_counter()
        step.train_step(number)
        self.synchronize()
        elapsed = time.perf_counter() - start
        calls, moved, gathered = (vars(self.traffic)[name] - before[name] for name in ("calls", "bytes", "gathered"))
        cost.collectives, cost.moved, cost.gathered = calls, moved, gathered
        if is_measured:
            cost.seconds.append(elapsed)
            if measures_peak:
                cost.peaks.append(peak(self.cuda))

    def count_kernels(self, cost: Cost, number: int) -> None:
        from torch.profiler import profile

        from pipeline.planning.bytes_moved import NO_KERNEL

        step = self.step_of(cost)
        with profile() as profiler:
            step.train_step(number)
        events = list(profiler.events() or ())
        if self.cuda:
            cost.kernels = sum(str(event.device_type).endswith("CUDA") for event in events)
        else:
            cost.kernels = sum(event.name not in NO_KERNEL for event in events if not event.cpu_children)
        cost.waits = sum(event.name in WAITS["cuda" if self.cuda else "cpu"] for event in events)

    def count_bytes(self, cost: Cost, number: int) -> None:
        from pipeline.planning.bytes_moved import BytesMoved

        step, moved = self.step_of(cost), BytesMoved()
        combine = step.combiner.combine

        def counted() -> Combined:
            with moved.through_compiled():
                return combine()

        step.combiner.combine = counted
        step.train_step(number)
        cost.bytes_an_element = moved.total / sum(size for _, size in step.combiner.store.layout)

    def synchronize(self) -> None:
        import torch

        if self.cuda:
            torch.cuda.synchronize()


WAITS = {
    "cuda": ("cudaStreamSynchronize", "cudaDeviceSynchronize"),
    "cpu": ("aten::_local_scalar_dense", "aten::nonzero"),
}


def measure(options: argparse.Namespace, traffic: Traffic) -> tuple[list[Cost], int]:
    """(the costs, bytes of one gradient partition)."""
    bench = Bench(options, traffic)
    costs = [Cost(rule, schedule) for rule in ("sum", *options.rules) for schedule in SCHEDULES]
    for pair in range(options.warm_up + options.pairs):
        for cost in costs if pair % 2 else reversed(costs):  # no schedule is always the first
            bench.time(cost, pair % 4, pair >= options.warm_up)
    for cost in costs:
        bench.count_kernels(cost, 0)
        bench.count_bytes(cost, 0)
    store = bench.step_of(costs[0]).combiner.store
    return costs, sum(size for _, size in store.layout) * store.dtype.itemsize


def bandwidth() -> dict[str, float]:
    """Bytes a second of SAGO's combination (reads f and r, writes g) and of a copy on the device; empty on a CPU."""
    import torch

    from pipeline.synthesis.combine import Synthesis
    from pipeline.synthesis.partition import Piece

    if not torch.cuda.is_available():
        return {}
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
    return {"combination": combination, "copy": copy}


def table(costs: list[Cost], partition: int) -> str:
    cheapest = min((cost for cost in costs if cost.rule == "sum"), key=lambda cost: median(cost.seconds))
    lines = [
        "| rule | schedule | seconds a step | of the cheapest `sum` | of its sequential step | extra peak, partitions "
        "| collectives | MB moved | MB gathered | kernels | waits | bytes an element, `combine()` |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cost in costs:
        two_passes = next(other for other in costs if (other.rule, other.schedule) == (cost.rule, "sequential"))
        extra = [(mine - theirs) / partition for mine, theirs in zip(cost.peaks, cheapest.peaks, strict=True)]
        cells = [
            *(cost.rule, cost.schedule, f"{median(cost.seconds):.4f}"),
            *(f"{cost.ratio(cheapest):.3f}", f"{cost.ratio(two_passes):.3f}"),
            *(f"{median(extra):.2f}" if extra else "–", str(cost.collectives)),
            *(f"{cost.moved / 1e6:.2f}", f"{cost.gathered / 1e6:.2f}", f"{cost.kernels:,}", f"{cost.waits:,}"),
            "–" if cost.bytes_an_element is None else f"{cost.bytes_an_element:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
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
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()

    import torch.distributed as dist

    from pipeline.distributed import process_group as ranks
    from pipeline.monitoring.console import quiet_libraries

    quiet_libraries()
    traffic = Traffic()  # before DeepSpeed binds the collectives
    device = ranks.start()
    costs, partition = measure(options, traffic)
    if dist.get_rank() == 0:
        shape = {k: v for k, v in vars(options).items() if k not in ("local_rank", "output", "json", "rules")}
        text = f"{dist.get_world_size()} rank(s) on {device.type}, {shape}\n\n{table(costs, partition)}\n"
        speed = bandwidth()
        if speed:
            text += "combination {combination:.3g} bytes a second, copy {copy:.3g}\n".format(**speed)
        print(text)
        if options.json:
            found = {
                "shape": shape,
                "ranks": dist.get_world_size(),
                "partition": partition,
                "costs": [asdict(cost) for cost in costs],
                **speed,
            }
            write_whole(options.json, json.dumps(found, indent=1) + "\n")
        if options.output:
            with options.output.open("a", encoding="utf-8") as file:
                file.write(text + "\n")
    ranks.leave(0)


if __name__ == "__main__":
    sys.exit(main())
