"""The memory of a run, by arithmetic on the shapes of its model and its cluster.

`states` is the memory of model, gradients and optimizer in DeepSpeed 0.19.8 by stage, `working` what a micro-batch
needs beside it. docs/results/plan.md shows how far to trust the figures.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline.config.objectives import NEEDS
from pipeline.config.rules import combines_tasks, keeps_mean_square, num_averages
from pipeline.config.schema import RunConfig
from pipeline.files import Json
from pipeline.zero.sizes import EXPORT_FILE, reduces_once, sums_locally

if TYPE_CHECKING:
    from pipeline.planning.meta_trace import ModelShape, Pass


GIB = 2**30
RESERVED = 3 * GIB  # of a GPU, for CUDA's context, NCCL's buffers, cuBLAS' workspace and fragmentation


# An element in NF4 with double quantisation: 4 bits; a scale in 8 bits for 64 elements, and one in fp32 for 256 scales.
PACKED_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


ADAM_BYTES = 48  # memory traffic of an element in combination, clipping and AdamW: 12 reads and writes of 4 bytes


@dataclass(frozen=True)
class Cluster:
    gpus: int  # per machine
    nodes: int
    gpu_memory: float  # GiB
    bandwidth: float  # GB/s into and out of a machine
    tflops: float  # sustained, of a GPU
    disk_bandwidth: float | None = None  # GB/s that a machine reads or writes, if it was measured

    @property
    def world(self) -> int:
        return self.gpus * self.nodes


@dataclass
class Memory:
    """Bytes by kind."""

    gpu: dict[str, float] = field(default_factory=dict)
    host: dict[str, float] = field(default_factory=dict)  # of one rank
    disk: float = 0  # of one rank
    step: float = 0  # on the GPU, during engine.step() only
    saving: float = 0  # in main memory, of one rank, while it writes its part of a checkpoint


@dataclass(frozen=True)
class Zero:
    """The keys of a DeepSpeed configuration that the plan depends on."""

    stage: int
    overlap: bool
    bucket: int
    sub_group: int
    persistent: int  # tensors of at most so many elements are never partitioned
    live: int  # elements that remain gathered
    prefetch: int
    hpz: int
    optimizer_on: str  # device, cpu or nvme
    parameters_on: str
    buffers: int  # of the optimizer's swapper
    accumulate: int  # bytes of an element of the gradient
    wire: int  # and of one that is being reduced

    def once(self, shape: ModelShape, config: RunConfig, machines: Cluster, micro: int) -> tuple[bool, bool]:
        """Whether there is one reduction for all micro-batches of `micro` sequences: of what DeepSpeed would reduce by
        micro-batches (ZeRO 2 and 3), and of the forget gradient of a joint pass.
        """
        micro_batches = config.train.batch_size // (micro * machines.world)
        diverts = config.train.schedule == "joint" and keeps_stash(config) > 0
        own = self.stage >= 2 and sums_locally(shape.trained, shape.elements, self.bucket, micro_batches)
        return own, diverts and reduces_once(shape.trained, self.bucket, micro_batches)

    @staticmethod
    def of(zero: Json, shape: ModelShape) -> Zero:
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


def keeps_stash(config: RunConfig) -> int:
    """Buffers of a whole gradient beside DeepSpeed's: 0, or 1 (the forget buffer) and one for each moving average."""
    return 1 + num_averages(config.synthesis) if combines_tasks(config) else 0


def states(shape: ModelShape, zero: Zero, config: RunConfig, machines: Cluster) -> Memory:
    """Memory that does not depend on the micro-batch, in bytes of one rank."""
    world, b = machines.world, shape.itemsize
    mine = trained_share(shape, zero, world)
    moments = 2 if config.optimizer.name == "adamw" else 0
    master = 0 if b == 4 and zero.stage == 0 else 1  # ZeRO copies fp32 weights as well
    gradient = shape.trained if zero.stage == 0 or (zero.stage == 1 and zero.optimizer_on == "device") else mine
    combined = shape.trained if zero.stage == 0 or (zero.stage == 1 and b == 2) else mine

    memory = Memory()
    gpu, host = memory.gpu, memory.host
    offloaded = zero.optimizer_on != "device"
    at = host if offloaded else gpu
    weights = b * sum(_shares(shape, world)) if zero.stage == 3 else whole_weights(shape)
    (host if zero.parameters_on == "cpu" else gpu)["parameters"] = weights
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
    waits = host if offloaded or config.synthesis.stash_device == "host" else gpu
    width = 4 if offloaded and zero.stage < 3 else zero.accumulate if zero.stage else b
    squares = int(keeps_mean_square(config.synthesis))  # in fp32
    waits["stash"] = combined * ((keeps_stash(config) - squares) * width + 4 * squares)
    optimizer = 4 * mine * (master + moments)
    if zero.optimizer_on == "nvme":
        memory.disk = optimizer
        host["optimizer"] = 4 * zero.buffers * min(zero.sub_group, mine)
    else:
        at["optimizer"] = optimizer
    references = {NEEDS[getattr(config.objective, task)].reference for task in config.tasks}
    if references & {"logits", "hidden"}:
        copied = mine if zero.stage == 3 else shape.trained
        (host if zero.parameters_on == "cpu" else gpu)["reference"] = b * copied
    gpu["buffers"] = buffers(shape, zero) + b * max(shape.packed, default=0)  # unpacked for its product
    updated = min(zero.sub_group, mine) if zero.stage == 3 else mine
    if not offloaded:  # the gradient as one fp32 tensor, and what AdamW computes before it writes
        memory.step = updated * 4 * (2 if moments else 1)
        memory.saving = updated * 4  # torch.save copies one tensor after the other from the GPU
    if waits is gpu and keeps_stash(config) > 1:  # the averages
        memory.saving = max(memory.saving, combined * 4)
    if zero.stage in (1, 2) and offloaded:
        memory.step = 0
    return memory


def _shares(shape: ModelShape, world: int) -> list[int]:
    """Elements of each tensor on a rank under ZeRO-3, which pads every one to a multiple of the ranks."""
    return [-(-size // world) for size in shape.sizes]


def trained_share(shape: ModelShape, zero: Zero, world: int) -> int:
    """Elements that the optimizer of a rank updates."""
    if zero.stage == 3:
        return sum(part for part, trains in zip(_shares(shape, world), shape.trains, strict=True) if trains)
    return -(-shape.trained // world) if zero.stage else shape.trained


def whole_weights(shape: ModelShape) -> float:
    """Bytes of the whole model, of which some weights may be in 4 bits."""
    packed = sum(shape.packed)
    return (shape.elements - packed) * shape.itemsize + packed * PACKED_BYTES


def flattened(shape: ModelShape, zero: Zero, machines: Cluster) -> float:
    """Bytes in main memory of one rank while DeepSpeed makes one tensor of the weights that it trains.

    Under ZeRO-3 they leave the GPU and return in one piece (`defragment`). Below, they leave it only where it has room
    for them and not for a second copy, and are copied in main memory.
    """
    size = shape.itemsize * trained_share(shape, zero, machines.world)
    if zero.stage == 3:
        return size if zero.parameters_on == "device" else 0
    size, weights, limit = shape.itemsize * shape.trained, whole_weights(shape), machines.gpu_memory * GIB - RESERVED
    return 2 * size if zero.stage and weights <= limit < weights + size else 0


def main_memory(shape: ModelShape, zero: Zero, memory: Memory, machines: Cluster, exported: float) -> float:
    """Peak bytes of main memory of one machine: at the start, while a checkpoint or an export is written, or always.

    To resume takes none beside what is offloaded, because files are mapped and the state is copied from there.

    Args:
        exported: bytes of an export.
    """
    whole = 0 if zero.stage == 3 else shape.elements * shape.itemsize  # from_pretrained reads into main memory
    start = machines.gpus * max(whole, flattened(shape, zero, machines))
    file = max(EXPORT_FILE, max(shape.sizes) * shape.itemsize)
    export = min(machines.gpus * file, exported)  # every rank writes a file at a time
    weights = 0 if zero.stage == 3 else shape.trained * shape.itemsize  # in a checkpoint, by the first rank
    saving = max(memory.saving, weights) + (machines.gpus - 1) * memory.saving
    return max(start, machines.gpus * sum(memory.host.values()) + max(export, saving))


def buffers(shape: ModelShape, zero: Zero) -> float:
    """DeepSpeed's communication buffers on the GPU, and the weights that are gathered at a time, in bytes."""
    if zero.stage == 3:
        partitioned = [size for size in shape.sizes if size > zero.persistent]
        live = min(sum(partitioned), max(zero.live, max(partitioned, default=0)) + zero.prefetch)
        return zero.wire * zero.bucket + shape.itemsize * live
    if zero.stage == 2:
        return zero.wire * zero.bucket * (2 if zero.overlap else 1)
    return zero.accumulate * zero.bucket if zero.stage == 1 and shape.itemsize == 4 else 0


def unreduced(shape: ModelShape, zero: Zero, config: RunConfig, machines: Cluster, micro: int) -> float:
    """Bytes of whole gradients on a rank that wait for their reduction, beside DeepSpeed's own bucket.

    They are sums of micro-batches, where these are reduced once; else the forget gradients of a joint pass, which wait
    until there are as many elements as in DeepSpeed's bucket, and are copied to be reduced.
    """
    own, forget = zero.once(shape, config, machines, micro)
    if forget or config.train.schedule != "joint" or not keeps_stash(config):
        return 4 * shape.trained * (own + forget)
    largest = max((size for size, trains in zip(shape.sizes, shape.trains, strict=True) if trains), default=0)
    return 2 * zero.wire * min(shape.trained, zero.bucket + largest)


def head_bytes(shape: ModelShape, tokens: int, asks_logits: bool) -> float:
    """Peak bytes of the token losses of `tokens` positions, beside their hidden states (modeling/token_losses.py)."""
    from pipeline.modeling.token_losses import _CHUNK

    vocabulary, width = shape.head
    whole = tokens * vocabulary
    gradient = vocabulary * width * shape.itemsize if shape.head_trains else 0
    soft = whole * shape.itemsize if asks_logits else 0
    if not shape.plain_head:  # logits, intermediates of their cap, their gradient
        return 4 * whole * shape.itemsize + gradient + soft
    chunk = min(max(_CHUNK, vocabulary, tokens), whole)  # twice in fp32, and once in the model's dtype
    each = 8 + (shape.itemsize if shape.itemsize < 4 else 0) + (8 if asks_logits else 0)
    states = tokens * width * (shape.itemsize + 4)  # a copy of those that predict; their gradient in fp32
    return chunk * each + states + gradient + soft


def working(config: RunConfig, shape: ModelShape, passes: dict[str, Pass], micro: int) -> tuple[float, float]:
    """(activations, logits): peak bytes of forward and backward beside `states`, of the task that needs more.

    A joint pass stores the activations of both tasks. It computes their token losses one after the other, except those
    of a model whose own code makes the logits (`plain_head`): it makes those of both at once.
    """
    found = []
    for name, one in passes.items():
        objective = NEEDS[getattr(config.objective, name)]
        size = micro * objective.num_answers
        asks = objective.reference == "logits"
        head = 0.0 if objective.hidden else head_bytes(shape, size * config.data.max_length, asks)
        found.append((max(one.saved(size), one.peak(size) - head), head))
    if config.train.schedule == "joint":
        heads = [logits for _, logits in found]
        return sum(activations for activations, _ in found), max(heads) if shape.plain_head else sum(heads)
    return max(found, key=sum)
