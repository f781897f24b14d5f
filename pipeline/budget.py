"""What a run holds, sends and takes, by arithmetic on the shapes of its model and of its machines.

`states` is what DeepSpeed 0.19.8 keeps on each stage, `working` what a micro-batch needs beside it, `traffic` what
collectives move in a step, `seconds` how long that takes. docs/plan.md says how far to trust the figures.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.config import RunConfig

if TYPE_CHECKING:
    from pipeline.rehearsal import Pass, Shape

GIB = 2**30
ADAM_BYTES = 48  # an element moves through memory in combination, clipping and AdamW: 12 reads and writes of 4 bytes
# Bytes a second. Of nominal figures about two thirds, as sustained.
NVLINK = 300e9  # one GPU, one direction, within a machine
PCIE = 25e9  # one GPU, one direction, to and from main memory
HBM = 2e12  # one GPU's own memory
MAIN_MEMORY = 200e9  # one machine
DISK = 5e9  # one machine


@dataclass(frozen=True)
class Machines:
    gpus: int  # of a machine
    nodes: int
    gpu_memory: float  # GiB
    bandwidth: float  # GB/s into, and out of, a machine
    tflops: float  # that a GPU sustains

    @property
    def world(self) -> int:
        return self.gpus * self.nodes


# ---------------------------------------------------------------------------------------------------------------------
# What DeepSpeed keeps


@dataclass
class Memory:
    """Bytes by kind."""

    gpu: dict[str, float] = field(default_factory=dict)
    host: dict[str, float] = field(default_factory=dict)  # of one rank
    disk: float = 0  # of one rank
    step: float = 0  # on the GPU, during engine.step() only


@dataclass(frozen=True)
class Zero:
    """The keys of a DeepSpeed configuration that the plan depends on."""

    stage: int
    overlap: bool
    bucket: int
    sub_group: int
    persistent: int  # tensors of at most so many elements are never partitioned
    live: int  # elements that stay gathered
    prefetch: int
    hpz: int
    optimizer_on: str  # device, cpu or nvme
    parameters_on: str
    buffers: int  # of the optimizer's swapper
    accumulate: int  # bytes of an element of the gradient
    wire: int  # and of one that is being reduced

    @staticmethod
    def of(zero: dict[str, Any], shape: Shape) -> Zero:
        """`zero`: as `deepspeed_config` returns it. Defaults are DeepSpeed 0.19.8's (runtime/zero/config.py)."""
        keys = zero["zero_optimization"]
        stage = keys.get("stage", 0)
        offload = {name: keys.get(name) or {} for name in ("offload_optimizer", "offload_param")}
        places = {name: given.get("device", "none").replace("none", "device") for name, given in offload.items()}
        widths = {"fp32": 4, "fp16": 2, "bf16": 2, None: shape.itemsize}
        return Zero(
            stage=stage,
            overlap=bool(keys.get("overlap_comm", stage == 3)),
            bucket=int(keys.get("reduce_bucket_size", 5e8)),
            sub_group=int(keys.get("sub_group_size", 1e9)),
            persistent=int(keys.get("stage3_param_persistence_threshold", 1e5)) if stage == 3 else 0,
            live=int(keys.get("stage3_max_live_parameters", 1e9)),
            prefetch=int(keys.get("stage3_prefetch_bucket_size", 5e7)),
            hpz=int(keys.get("zero_hpz_partition_size", 1)),
            optimizer_on=places["offload_optimizer"],
            parameters_on=places["offload_param"],
            buffers=int(offload["offload_optimizer"].get("buffer_count", 4)),
            accumulate=widths[zero.get("data_types", {}).get("grad_accum_dtype")],
            wire=widths[zero.get("communication_data_type")],
        )


def keeps_spare(config: RunConfig) -> int:
    """Gradients kept beside DeepSpeed's: 0, 1, or 2 with a moving average (as `train.run` decides)."""
    rule = config.synthesis.rule
    if len(config.tasks) < 2 or (rule == "sum" and not config.synthesis.geometry):
        return 0
    return 2 if rule == "gru" else 1


def states(shape: Shape, zero: Zero, config: RunConfig, machines: Machines) -> Memory:
    """What is held whatever the micro-batch, in bytes of one rank."""
    from pipeline.objectives import OBJECTIVES

    world, b = machines.world, shape.itemsize
    share = [-(-size // world) for size in shape.sizes]  # every tensor is padded to a multiple of the ranks
    mine = sum(part for part, trains in zip(share, shape.trains, strict=True) if trains)
    if zero.stage in (1, 2):
        mine = -(-shape.trained // world)
    elif zero.stage == 0:
        mine = shape.trained
    moments = 2 if config.optimizer.name == "adamw" else 0
    master = 0 if b == 4 and zero.stage == 0 else 1  # ZeRO copies fp32 weights too
    gradient = shape.trained if zero.stage == 0 or (zero.stage == 1 and zero.optimizer_on == "device") else mine
    spare = keeps_spare(config) * (shape.trained if zero.stage == 0 or (zero.stage == 1 and b == 2) else mine)

    memory = Memory()
    gpu, host = memory.gpu, memory.host
    offloaded = zero.optimizer_on != "device"
    at = host if offloaded else gpu
    weights = sum(share) if zero.stage == 3 else shape.elements
    (host if zero.parameters_on == "cpu" else gpu)["parameters"] = b * weights
    if zero.stage == 3:
        kept_whole = b * sum(size for size in shape.sizes if size <= zero.persistent)
        gpu["parameters"] = gpu.get("parameters", 0) + kept_whole
        group = min(zero.hpz, world)
        if group > 1:
            second = b * sum(-(-size // world) * world // group for size in shape.sizes if size > zero.persistent)
            place = host if zero.parameters_on == "cpu" else gpu
            place["parameters"] = place.get("parameters", 0) + second
    at["gradients"] = gradient * (zero.accumulate if zero.stage else b)
    if zero.optimizer_on == "cpu":
        at["gradients"] += 4 * mine  # the copy in fp32 that the optimizer reads
    waits = host if offloaded or config.synthesis.spare == "host" else gpu
    waits["spare"] = spare * (4 if offloaded and zero.stage < 3 else zero.accumulate if zero.stage else b)
    optimizer = 4 * mine * (master + moments)
    if zero.optimizer_on == "nvme":
        memory.disk = optimizer
        host["optimizer"] = 4 * zero.buffers * min(zero.sub_group, mine)
    else:
        at["optimizer"] = optimizer
    asks = {OBJECTIVES[getattr(config.objective, task)].asks for task in config.tasks}
    if asks & {"logits", "hidden"}:
        held = mine if zero.stage == 3 else shape.trained
        (host if zero.parameters_on == "cpu" else gpu)["original"] = b * held
    gpu["buffers"] = buffers(shape, zero)
    stretch = min(zero.sub_group, mine) if zero.stage == 3 else mine
    if not offloaded:  # the gradient as one fp32 tensor, and what AdamW computes before it writes
        memory.step = stretch * 4 * (2 if moments else 1)
    if zero.stage in (1, 2) and offloaded:
        memory.step = 0
    return memory


def buffers(shape: Shape, zero: Zero) -> float:
    """What DeepSpeed holds on the GPU to communicate, and the weights that are gathered at a time."""
    if zero.stage == 3:
        partitioned = [size for size in shape.sizes if size > zero.persistent]
        live = min(sum(partitioned), max(zero.live, max(partitioned, default=0)) + zero.prefetch)
        return zero.wire * zero.bucket + shape.itemsize * live
    if zero.stage == 2:
        return zero.wire * zero.bucket * (2 if zero.overlap else 1)
    return zero.accumulate * zero.bucket if zero.stage == 1 and shape.itemsize == 4 else 0


def head_bytes(shape: Shape, tokens: int, asks_logits: bool) -> float:
    """At most alive for token losses of `tokens` positions beside the states they are taken from (objectives.py)."""
    from pipeline.objectives import _CHUNK

    vocabulary, width = shape.head
    whole = tokens * vocabulary
    gradient = vocabulary * width * shape.itemsize if shape.head_trains else 0
    soft = whole * shape.itemsize if asks_logits else 0
    if not shape.plain_head:  # logits, what caps them, their gradient
        return 4 * whole * shape.itemsize + gradient + soft
    chunk = min(max(_CHUNK, vocabulary, tokens), whole)  # twice in fp32, and once as the model's product gave it
    each = 8 + (shape.itemsize if shape.itemsize < 4 else 0) + (8 if asks_logits else 0)
    states = tokens * width * (shape.itemsize + 4)  # a copy of the predicting ones; their gradient in fp32
    return chunk * each + states + gradient + soft


def working(config: RunConfig, shape: Shape, passes: dict[str, Pass], micro: int) -> tuple[float, float]:
    """(activations, logits): bytes alive in forward and backward of the task that needs more, beside the states."""
    from pipeline.objectives import OBJECTIVES

    found = []
    for name, one in passes.items():
        objective = OBJECTIVES[getattr(config.objective, name)]
        size = micro * objective.num_answers
        asks = objective.asks == "logits"
        head = 0.0 if objective.hidden else head_bytes(shape, size * config.data.max_length, asks)
        found.append((max(one.kept(size), one.peak(size) - head), head))
    return max(found, key=sum)


# ---------------------------------------------------------------------------------------------------------------------
# What a step sends, and how long it takes


@dataclass(frozen=True)
class Sent:
    """Bytes that collectives of one kind are asked to move in a step, counted as the whole tensor on one rank."""

    collective: str  # all_gather, reduce_scatter, all_reduce
    bytes: float
    within_machine: bool = False

    def seconds(self, machines: Machines) -> float:
        """A ring: all but this rank's share crosses each link once, twice in an all-reduce. The slower link decides."""
        times = 2 if self.collective == "all_reduce" else 1
        ranks = machines.gpus if self.within_machine else machines.world
        inside = times * self.bytes * (ranks - 1) / ranks / NVLINK
        if self.within_machine or machines.nodes == 1:
            return inside
        across = times * self.bytes * (machines.nodes - 1) / machines.nodes / (machines.bandwidth * 1e9)
        return max(inside, across)


def micro_batches(config: RunConfig, machines: Machines, micro: int) -> int:
    return config.train.batch_size // (micro * machines.world)


def traffic(
    shape: Shape, zero: Zero, config: RunConfig, machines: Machines, passes: dict[str, Pass], micro: int
) -> list[Sent]:
    """The collectives of a step. `passes`: of each task."""
    from pipeline.objectives import OBJECTIVES

    if machines.world == 1:
        return []
    count = micro_batches(config, machines, micro)
    trained, combines = shape.trained, keeps_spare(config) > 0
    sent = [Sent("all_reduce", 80 * sum(shape.trains))] if combines else []
    if zero.stage < 3:
        whole = shape.trained * zero.wire
        times = count * len(config.tasks) if zero.stage == 2 else 1 + combines
        sent.append(Sent("all_reduce", whole * times))
        return sent if zero.stage == 0 else [*sent, Sent("all_gather", trained * shape.itemsize)]
    hpz = min(zero.hpz, machines.world) > 1
    trained_rows = {row for row, trains in enumerate(shape.trains) if trains}
    held = set(range(len(shape.sizes))) - trained_rows  # with a copy in the machine, which a change of weights ends
    gathered = {True: 0, False: 0}  # bytes, by whether they stay within the machine

    def gather(rows: list[int]) -> None:
        for row in rows:
            if shape.sizes[row] > zero.persistent:
                gathered[hpz and row in held] += shape.sizes[row] * shape.itemsize
                held.add(row)

    reduced = 0
    for name, one in passes.items():
        for _ in range(count):
            if OBJECTIVES[getattr(config.objective, name)].asks in ("logits", "hidden"):  # the original's own forward
                held -= trained_rows
                gather(one.used)
                held -= trained_rows
            gather(one.used)
            gather(one.used_again)
        reduced += count * zero.wire * sum(shape.sizes[row] for row in one.reached)
    kept = shape.itemsize * sum(size for size in shape.sizes if size <= zero.persistent)  # brought up to date
    sent += [Sent("all_gather", gathered[False] + kept), Sent("reduce_scatter", reduced)]
    return [*sent, Sent("all_gather", gathered[True], within_machine=True)] if hpz else sent


@dataclass(frozen=True)
class Seconds:
    compute: float
    network: float
    offload: float
    update: float
    step: float


def seconds(
    shape: Shape, zero: Zero, config: RunConfig, machines: Machines, passes: dict[str, Pass], micro: int
) -> Seconds:
    """Of one step. Communication hides behind computation where `overlap_comm` lets it, and adds to it elsewhere."""
    from pipeline.objectives import OBJECTIVES

    count, world = micro_batches(config, machines, micro), machines.world
    vocabulary, width = shape.head
    flops = 0.0
    for name, one in passes.items():
        objective = OBJECTIVES[getattr(config.objective, name)]
        size = micro * objective.num_answers
        product = 0.0 if objective.hidden else 2.0 * size * config.data.max_length * vocabulary * width
        flops += count * (one.flops(size) + product * (4 if shape.head_trains else 3))  # backward makes logits again
        if objective.asks in ("logits", "hidden"):
            flops += count * (one.forward_flops(size) + product)
    compute = flops / (machines.tflops * 1e12)
    sent = traffic(shape, zero, config, machines, passes, micro)
    network = sum(one.seconds(machines) for one in sent)
    mine = shape.trained / world if zero.stage else shape.trained
    offload = 0.0
    if zero.parameters_on == "cpu":  # each gather starts from main memory; the new weights go back there
        gathered = sum(one.bytes for one in sent if one.collective == "all_gather")
        offload += gathered / world / PCIE
    if zero.optimizer_on != "device":
        offload += mine * zero.accumulate * (2 * count * len(passes) - 1) / PCIE  # down, and up again to be added to
        update = mine * ADAM_BYTES * machines.gpus / MAIN_MEMORY + mine * shape.itemsize / PCIE
        if zero.optimizer_on == "nvme":
            update += mine * 24 * machines.gpus / DISK  # weights and two moments, read and written
    else:
        update = mine * ADAM_BYTES / HBM
    parts = (compute, network, offload)
    return Seconds(compute, network, offload, update, (max(parts) if zero.overlap else sum(parts)) + update)
