"""`python -m pipeline.plan --config FILE --gpus N --gpu-memory GIB [...]`: what a run needs, before it has machines.

It reads the configuration and the model's `config.json` only. A pass is traced without weights
(`planning/meta_trace.py`), the rest is arithmetic (`planning/memory.py`, `planning/traffic.py`). This file chooses the
micro-batch and the cheapest DeepSpeed file, and prints the table.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline.config.checks import check_schedule
from pipeline.config.deepspeed import deepspeed_config, refuse_uneven_groups, refuse_what_deepspeed_refuses
from pipeline.config.files import DEEPSPEED_FILES
from pipeline.config.load import Parser, add_config_options, resolve
from pipeline.config.objectives import NEEDS
from pipeline.config.schema import DEFAULT_STEPS, RunConfig
from pipeline.errors import InputError, denied_files
from pipeline.planning.memory import GIB, RESERVED, Cluster, Zero, keeps_stash, main_memory, states, unreduced, working
from pipeline.planning.run_stages import Stage, stage_table, stages
from pipeline.planning.traffic import CommVolume, Seconds, seconds, traffic
from pipeline.zero.sizes import DiskUse, disk_use

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pipeline.planning.meta_trace import ModelShape, Pass

SHIPPED = ("zero1", "zero2", "zero3", "zero3_hpz", "zero3_offload", "zero3_nvme")  # files in ds_configs


@dataclass(frozen=True)
class Row:
    """One DeepSpeed configuration at its largest micro-batch that fits (or at 1, which does not). Bytes, seconds."""

    deepspeed: str
    schedule: str  # of the tasks
    fits: bool
    micro_batch_size: int
    gpu: dict[str, float]  # by kind, of one GPU
    total: float
    lacks: float  # bytes beyond the GPU's memory
    host: float  # of one machine
    disk: float  # of one machine
    written: DiskUse  # in the run's folder
    stages: list[Stage]  # beside the steps
    sent: list[CommVolume]
    seconds: Seconds


def fit(file: str, zero: Zero, shape: ModelShape, config: RunConfig, machines: Cluster, passes: dict[str, Pass]) -> Row:
    """The configuration at the largest micro-batch that fits and divides the batch."""
    memory = states(shape, zero, config, machines)
    share = config.train.batch_size // machines.world
    written = disk_use(config, zero.stage, shape.elements, shape.trained, shape.itemsize, _steps(config))
    limit = machines.gpu_memory * GIB - RESERVED
    resident = sum(memory.gpu.values())
    gpu, total, micro = memory.gpu, resident, 1
    for micro in [size for size in range(share, 0, -1) if share % size == 0]:
        activations, logits = working(config, shape, passes, micro)
        whole = unreduced(shape, zero, config, machines, micro)
        total = resident + whole + max(activations + logits, memory.step)
        gpu = {**memory.gpu, "unreduced": whole, "activations": activations, "logits": logits, "step": memory.step}
        if total <= limit:
            break
    return Row(
        deepspeed=file,
        schedule=config.train.schedule,
        fits=total <= limit,
        micro_batch_size=micro,
        gpu=gpu,
        total=total + RESERVED,
        lacks=max(total - limit, 0.0),
        host=main_memory(shape, zero, memory, machines, written.export),
        disk=machines.gpus * memory.disk,
        written=written,
        stages=stages(shape, zero, config, machines, written),
        sent=traffic(shape, zero, config, machines, passes, micro),
        seconds=seconds(shape, zero, config, machines, passes, micro),
    )


def _steps(config: RunConfig) -> int:
    """Of the run; with `train.epochs`, which count by data that is not read here, the default."""
    return config.train.steps or DEFAULT_STEPS


@dataclass(frozen=True)
class Plan:
    shape: ModelShape
    rows: list[Row]
    refused: dict[str, str]  # by configuration: the reason
    other_schedule: Row | None = None  # of the cheapest; None where the run would refuse that schedule

    @property
    def cheapest(self) -> Row | None:
        """The configuration with the shortest step among those that fit."""
        return min((row for row in self.rows if row.fits), key=lambda row: row.seconds.step, default=None)


def make_plan(config: RunConfig, machines: Cluster) -> Plan:
    """Plan the run's own DeepSpeed file and every shipped one.

    Raises:
        InputError: the batch does not divide over the GPUs; see also `model_without_weights`, `install_rules` and
            `rehearse`.
    """
    from pipeline.modeling.row_rules import install_rules
    from pipeline.planning.meta_trace import model_without_weights, rehearse, shape_of
    from pipeline.zero.joint import TaskRows

    if config.train.batch_size % machines.world:
        raise InputError(
            f"train.batch_size {config.train.batch_size} does not divide over {machines.world} GPUs; give a multiple, "
            f"as --train.batch_size {-(-config.train.batch_size // machines.world) * machines.world}"
        )
    model = model_without_weights(config)
    if config.train.schedule == "joint" and keeps_stash(config):
        install_rules(model, TaskRows())  # or the run would refuse the model, once it has its machines
    shape = shape_of(model, config.model.load_in_4bit)
    rehearsed: dict[int | None, Pass] = {}
    passes = {}
    for task in config.tasks:
        layer = config.objective.layer if NEEDS[getattr(config.objective, task)].hidden else None
        if layer not in rehearsed:
            rehearsed[layer] = rehearse(model, config.data.max_length, layer)
        passes[task] = rehearsed[layer]
    own, shipped = (
        config.train.deepspeed,
        [f"{DEEPSPEED_FILES.folder}/{name}{DEEPSPEED_FILES.suffix}" for name in SHIPPED],
    )
    files = [own, *(file for file in shipped if DEEPSPEED_FILES.find(file) != DEEPSPEED_FILES.find(own))]
    rows, refused = [], {}
    for file in files:
        train = config.train.model_copy(update={"deepspeed": file})
        candidate = config.model_copy(update={"train": train})
        try:
            given = deepspeed_config(candidate)
            refuse_uneven_groups(given, machines.world)
            refuse_what_deepspeed_refuses(candidate, given)
        except InputError as error:
            if file == own:
                raise
            refused[file] = str(error)
            continue
        rows.append(fit(file, Zero.of(given, shape), shape, config, machines, passes))
    plan = Plan(shape, rows, refused)
    if plan.cheapest is None:
        return plan
    other = _in_other_schedule(plan.cheapest.deepspeed, model, shape, config, machines, passes)
    return replace(plan, other_schedule=other)


def other_schedule(config: RunConfig) -> Literal["sequential", "joint"]:
    return "sequential" if config.train.schedule == "joint" else "joint"


def _in_other_schedule(
    file: str,
    model: PreTrainedModel,
    shape: ModelShape,
    config: RunConfig,
    machines: Cluster,
    passes: dict[str, Pass],
) -> Row | None:
    """The row of the DeepSpeed file under the other `train.schedule`, or None. Nothing may trace `model` afterwards."""
    from pipeline.modeling.row_rules import install_rules
    from pipeline.zero.joint import TaskRows

    train = config.train.model_copy(update={"deepspeed": file, "schedule": other_schedule(config)})
    candidate = config.model_copy(update={"train": train})
    try:
        check_schedule(candidate, file)
        if train.schedule == "joint" and keeps_stash(candidate):
            install_rules(model, TaskRows())
    except InputError:
        return None
    return fit(file, Zero.of(deepspeed_config(candidate), shape), shape, candidate, machines, passes)


def launch_line(row: Row, machines: Cluster, arguments: Sequence[str]) -> str:
    """The command that trains as planned; `arguments` are those of the plan that describe the run."""
    where = f"--num_gpus {machines.gpus}" if machines.nodes == 1 else "--hostfile hosts"
    chosen = [
        *("--train.deepspeed", row.deepspeed),
        *("--train.micro_batch_size", str(row.micro_batch_size)),
    ]
    return f"deepspeed {where} --module pipeline.train {shlex.join([*arguments, *chosen])}"


STATES = ("parameters", "gradients", "stash", "optimizer", "reference", "buffers")
KINDS = (*STATES, "unreduced", "activations", "logits", "step")


def report(plan: Plan, machines: Cluster, arguments: Sequence[str]) -> str:
    """The plan as text: a Markdown table, the cheapest configuration and its command. GiB, GB, seconds."""
    shape = plan.shape
    kinds = [kind for kind in KINDS if any(row.gpu.get(kind) for row in plan.rows)]
    columns = ["configuration", "micro-batch", *kinds, "total", "fits", "host", "sent", "seconds"]
    lines = [
        f"{shape.elements / 1e9:.2f} G parameters, {shape.trained / 1e9:.2f} G of them train; {machines.nodes} x "
        f"{machines.gpus} GPUs of {machines.gpu_memory:g} GiB, {machines.tflops:g} TFLOP/s sustained"
        + (f", {machines.bandwidth:g} GB/s between machines" if machines.nodes > 1 else ""),
        "GiB of one GPU by kind; total: the larger of activations + logits and step, all others, and "
        f"{RESERVED // GIB} reserved.",
        "GiB of main memory and disk of one machine. GB that the collectives of a step move, and its seconds.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    for row in plan.rows:
        host = f"{row.host / GIB:.0f}" + (f" + {row.disk / GIB:.0f} disk" if row.disk else "")
        cells = [Path(row.deepspeed).stem, str(row.micro_batch_size)]
        cells += [f"{row.gpu.get(kind, 0) / GIB:.1f}" for kind in kinds]
        cells += [f"{row.total / GIB:.1f}", "yes" if row.fits else f"lacks {row.lacks / GIB:.1f}", host]
        cells += [f"{sum(one.bytes for one in row.sent) / 1e9:.0f}", f"{row.seconds.step:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"{Path(file).stem}: {reason}" for file, reason in plan.refused.items()]
    best = plan.cheapest
    if best is None:
        return "\n".join(
            [
                *lines,
                "",
                "nothing fits; use more GPUs, --model.gradient_checkpointing true, or a smaller --data.max_length",
            ]
        )
    lines += ["", f"cheapest that fits: {best.deepspeed}, micro-batches of {best.micro_batch_size}"]
    lines.append(f"it writes, at most: {best.written}")
    lines += [*schedule_lines(best, plan.other_schedule), "", *stage_table(best.stages, machines), ""]
    if machines.nodes > 1:
        lines.append(f"# hosts: {machines.nodes} lines like `NAME slots={machines.gpus}`, one a machine")
    return "\n".join([*lines, launch_line(best, machines, arguments)])


def schedule_lines(best: Row, other: Row | None) -> list[str]:
    """What a step takes under the other `train.schedule`, if it is not the same."""
    if other is None:
        return []
    where = f"under train.schedule: {other.schedule}"
    if not other.fits:
        return [f"{where} it lacks {other.lacks / GIB:.1f} GiB"]
    there, here = f"{other.seconds.step:.1f} s", f"{best.seconds.step:.1f} s"
    size = other.micro_batch_size
    return [] if there == here else [f"{where} a step takes {there} in micro-batches of {size}, not {here}"]


# ---------------------------------------------------------------------------------------------------------------------
# The command line

DISK_HELP = "what a machine reads and writes on the disk of model and run, as you have measured it"


def parse(arguments: Sequence[str] | None) -> tuple[RunConfig, Cluster, bool, list[str]]:
    """(run, cluster, whether to print JSON, the arguments that describe the run).

    Raises:
        InputError: see `config.load.resolve`; or an impossible cluster.
    """
    parser = Parser(
        prog="python -m pipeline.plan",
        description="What a run needs on a cluster, and which DeepSpeed files fit: memory, traffic, time, the command.",
        epilog="Further arguments override keys of the configuration, as in pipeline.train: --a.b VALUE.",
        allow_abbrev=False,
    )
    add_config_options(parser)
    option = parser.add_argument
    option("--gpus", type=int, required=True, metavar="N", help="GPUs per machine")
    option("--gpu-memory", type=float, required=True, metavar="GIB", help="memory of a GPU")
    option("--nodes", type=int, default=1, metavar="M", help="machines [1]")
    option("--bandwidth", type=float, metavar="GB/S", help="into and out of a machine; required with --nodes")
    option("--disk-bandwidth", type=float, metavar="GB/S", help=DISK_HELP)
    sustained = "sustained TFLOP/s of a GPU [400: 40 %% of an H100's 989 in bf16]"
    option("--tflops", type=float, default=400.0, metavar="T", help=sustained)
    option("--json", action="store_true", help="print JSON, in bytes and seconds")
    known, rest = parser.parse_known_args(arguments)
    for name in ("gpus", "nodes", "gpu_memory", "tflops", "bandwidth", "disk_bandwidth"):
        value = getattr(known, name)
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"command line: --{name.replace('_', '-')} must be above 0, not {value}")
    if known.nodes > 1 and known.bandwidth is None:
        raise InputError("command line: --nodes needs --bandwidth, GB/s into a machine (400 for 8 x 400 Gb/s)")
    method = [] if known.method is None else ["--method", known.method]
    speeds = (known.bandwidth or 0.0, known.tflops, known.disk_bandwidth)
    machines = Cluster(known.gpus, known.nodes, known.gpu_memory, *speeds)
    config = resolve(known.config, known.method, rest, reads_data=False, on_gpu=True)
    return config, machines, known.json, ["--config", known.config, *method, *rest]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its status: 0, or 2 for unusable input."""
    try:
        with denied_files():
            config, machines, wants_json, given = parse(arguments)
        with denied_files(), redirect_stdout(sys.stderr):  # where libraries print messages when they are imported
            plan = make_plan(config, machines)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if wants_json:
        best, other = plan.cheapest, plan.other_schedule
        rows = [asdict(row) for row in plan.rows]
        answer = {"configurations": rows, "refused": plan.refused, "cheapest": best and best.deepspeed}
        answer["other_schedule"] = other and asdict(other)
        print(json.dumps({**answer, "launch": best and launch_line(best, machines, given)}, indent=2))
    else:
        print(report(plan, machines, given))
    return 0


if __name__ == "__main__":
    sys.exit(main())
