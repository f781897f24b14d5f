"""Whether a step is exact on this device: every rule, on each way DeepSpeed keeps gradients, in each dtype.

    deepspeed --num_gpus N --module pipeline.planning.device_check [--small] [--output FILE]

Four identities, of an untrained Llama on random tokens. Plain SGD without clipping makes a step the gradient itself.
1. fp32: the step of one task is the gradient that torch alone takes of a whole copy of the model.
2. In any dtype: the step of a rule is the rule (`synthesize`, on whole tensors) of the steps of the two tasks alone.
3. The step of PCGrad in joint passes is its step in two passes.
4. A run that is saved and resumed in a new engine makes the same weights, bit for bit.
The first needs no other precision than the device's, so matrix products in TF32 must be off (torch's default).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.files import write_whole
from pipeline.planning.identities import Way, dense_gradients, error, layers, resumes, step

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.synthesis.combine import Synthesis

# Relative, of the norm of the change. What the optimizer reads and writes is fp32, but for bf16 without ZeRO.
BOUND, ROUNDED = 2e-5, 2.0**-7
HEADER = "| way | gradient of a task | worst rule | joint against sequential | resumed | seconds | |"


@dataclass
class Check:
    """What was found on one way: the largest relative error of each identity, and where."""

    way: str
    seconds: float = 0.0
    gradients: float | None = None  # identity 1
    rules: dict[str, float] = field(default_factory=dict)  # identity 2, by rule and scope
    joint: float = 0.0  # identity 3
    resumed: bool = False  # identity 4
    failed: list[str] = field(default_factory=list)


def ways(cuda: bool, small: bool) -> list[Way]:
    """The ways that this device has. Without ZeRO DeepSpeed does not scale the loss of fp16."""
    if small:
        return [Way(2), Way(3, "bfloat16")]
    dtypes = ("float32", "bfloat16", "float16") if cuda else ("float32", "bfloat16")
    plain = [Way(stage, dtype) for dtype in dtypes for stage in range(4) if stage or dtype != "float16"]
    return plain + [Way(stage, dtype, True) for dtype in dtypes[:2] for stage in (2, 3)]


def syntheses(small: bool) -> Iterator[Synthesis]:
    """Every rule at its scope in the paper, PCGrad at all; small: two rules, PCGrad per module and per layer."""
    from pipeline.synthesis.combine import Synthesis
    from pipeline.synthesis.rules import RULES, SCOPES

    for rule in ("sago", "pcgrad") if small else RULES:
        for scope in (("module", "layer") if small else SCOPES) if rule == "pcgrad" else (None,):
            yield Synthesis(rule, scope, alpha=0.75, gamma=1.25)


def check(way: Way, folder: Path, small: bool) -> Check:
    """The identities on one way."""
    import torch

    from pipeline.synthesis import synthesize

    began, result, bound = (
        time.perf_counter(),
        Check(way.name),
        BOUND if way.stage or way.dtype == "float32" else ROUNDED,
    )
    forget, retain = (step(way, None, (task,)) for task in ("forget", "retain"))
    if way.dtype == "float32":
        dense = dense_gradients(way)
        result.gradients = max(error(forget, dense["forget"]), error(retain, dense["retain"]))
        if not result.gradients < bound:
            result.failed.append("gradients")
    made: dict[str, list[Tensor]] = {}
    for synthesis in syntheses(small):
        name = f"{synthesis.rule} {synthesis.resolved_scope}"
        expected = synthesize(
            forget,
            retain,
            rule=synthesis.rule,
            scope=synthesis.scope,
            alpha=synthesis.alpha,
            gamma=synthesis.gamma,
            layers=layers() if synthesis.scope == "layer" else None,
            average=[torch.zeros_like(tensor) for tensor in retain] if synthesis.averages_retain else None,
        )
        made[name] = step(way, synthesis)
        result.rules[name] = error(made[name], expected)
        if not result.rules[name] < bound * (10 if synthesis.rule == "sago" else 1):  # it jumps where a sign turns
            result.failed.append(name)
    pcgrad = next(synthesis for synthesis in syntheses(small) if synthesis.scope == "module")
    result.joint = error(step(way, pcgrad, joint=True), made["pcgrad module"])
    if not result.joint < max(bound, 0.0 if way.dtype == "float32" else ROUNDED):  # each pass rounds to the dtype
        result.failed.append("joint")
    result.resumed = resumes(way, folder / way.name)
    if not result.resumed:
        result.failed.append("resume")
    result.seconds = time.perf_counter() - began
    return result


def row(result: Check) -> str:
    """A row of the table."""
    rule, worst = max(result.rules.items(), key=lambda one: one[1])
    cells = [
        *(result.way, "–" if result.gradients is None else f"{result.gradients:.1e}", f"{worst:.1e} ({rule})"),
        *(f"{result.joint:.1e}", "same bits" if result.resumed else "differs", f"{result.seconds:.0f}"),
        f"FAILED: {', '.join(result.failed)}" if result.failed else "ok",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="deepspeed --module pipeline.planning.device_check",
        description="Whether a step is exact on this device: every rule, ZeRO stage and dtype.",
    )
    parser.add_argument("--small", action="store_true", help="two ways of keeping a gradient, and two rules")
    parser.add_argument("--output", type=Path, help="write the results here, as JSON")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()

    import torch.distributed as dist

    from pipeline.distributed import process_group as ranks
    from pipeline.monitoring.console import capture_stdout, quiet_libraries

    quiet_libraries()
    device = ranks.start()
    results = []
    if dist.get_rank() == 0:
        print(f"{HEADER}\n{'|---' * 7}|", flush=True)
    with tempfile.TemporaryDirectory() as own:
        shared = [own]  # of the first rank
        dist.broadcast_object_list(shared)
        for way in ways(device.type == "cuda", options.small):
            with capture_stdout():
                results.append(check(way, Path(shared[0]), options.small))
            if dist.get_rank() == 0:
                print(row(results[-1]), flush=True)
        dist.barrier()
    failed = sum(bool(result.failed) for result in results)
    if dist.get_rank() == 0:
        print(f"\n{len(results) - failed} of {len(results)} ways are exact, on {dist.get_world_size()} rank(s)")
        if options.output:
            write_whole(options.output, json.dumps([asdict(result) for result in results], indent=1) + "\n")
    ranks.leave(1 if failed else 0)


if __name__ == "__main__":
    main()
