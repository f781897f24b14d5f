"""`python -m pipeline.plan --config FILE --gpus N --gpu-memory GIB [...]`: what a run needs, before it has machines.

From the configuration and the model's `config.json` alone. Forward and backward are rehearsed on the meta device, where
tensors have shapes and no contents; what they keep alive and compute is counted (`rehearse`). What DeepSpeed keeps is
arithmetic (`states`), as is what it sends (`traffic`). docs/plan.md says how far to trust the figures.
"""

from __future__ import annotations

import json
import shlex
import sys
import weakref
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.config import InputError, Parser, RunConfig, deepspeed_config, refuse_uneven_groups, resolve

GIB = 2**30
RESERVED = 3 * GIB  # of a GPU: CUDA's context, NCCL's buffers, cuBLAS' workspace, what the allocator cannot use
ADAM_BYTES = 48  # an element moves through memory in combination, clipping and AdamW: 12 reads and writes of 4 bytes
# Bytes a second. Of nominal figures about two thirds, as sustained.
NVLINK = 300e9  # one GPU, one direction, within a machine
PCIE = 25e9  # one GPU, one direction, to and from main memory
HBM = 2e12  # one GPU's own memory
MAIN_MEMORY = 200e9  # one machine
DISK = 5e9  # one machine
SHIPPED = ("zero1", "zero2", "zero3", "zero3_hpz", "zero3_offload", "zero3_nvme")  # of ds_configs


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
# The model, without weights


@dataclass(frozen=True)
class Affine:
    """a + b * (sequences of a micro-batch)"""

    a: float
    b: float

    def __call__(self, sequences: int) -> float:
        return self.a + self.b * sequences


@dataclass(frozen=True)
class Pass:
    """Forward and backward of one task's micro-batch on one GPU, up to the states that its loss is taken from."""

    kept: Affine  # bytes alive between forward and backward
    peak: Affine  # bytes alive at most, backward's own and one tensor's whole gradient included
    flops: Affine  # of both
    forward_flops: Affine
    used: list[int]  # numbers (rows of `Shape.sizes`) of the parameters of each module, whenever forward calls it
    used_again: list[int]  # and by backward, which also recomputes
    reached: list[int]  # numbers of the parameters that get a gradient


@dataclass(frozen=True)
class Shape:
    sizes: list[int]  # elements of each parameter, tied ones once
    trains: list[bool]
    itemsize: int  # bytes of an element
    head: tuple[int, int]  # vocabulary, width
    head_trains: bool
    plain_head: bool  # logits are the product with its weight, and are never made whole

    @property
    def elements(self) -> int:
        return sum(self.sizes)

    @property
    def trained(self) -> int:
        return sum(size for size, trains in zip(self.sizes, self.trains, strict=True) if trains)


def model_without_weights(config: RunConfig) -> Any:
    """The model on the meta device, in `model.dtype`, with what trains chosen as in a run.

    Raises:
        InputError: see `model.load_shape` and `model.choose_what_trains`.
    """
    import torch
    from transformers import AttentionInterface, AutoModelForCausalLM
    from transformers.utils import logging

    from pipeline.model import choose_what_trains, load_shape

    logging.set_verbosity_error()
    wanted = config.model.attn_implementation
    padded = config.data.packing == "documents" and wanted in (None, "sdpa")
    AttentionInterface.register("rehearsed", partial(_attention, padded=padded))
    shape = load_shape(config.model)
    options = {"attn_implementation": "eager" if wanted == "eager" else "rehearsed"}
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shape, dtype=getattr(torch, config.model.dtype), **options)
            choose_what_trains(model, config.model, config.seed)
    except (ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"model.path: {config.model.path!r} cannot be made without weights: {reason}") from None
    return model.train()


def _attention(
    module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float | None = None, *, padded: bool, **_: Any
) -> Any:
    """What a GPU's fused kernel keeps: inputs, output and one float a row. With padding also a mask, and keys repeated.

    query: [B, heads, T, D]; key, value: [B, kv heads, T, D]. Returns ([B, T, heads, D], None).
    """
    import torch

    aten = torch.ops.aten
    if not padded and query.dtype != torch.float32:
        found = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, False, scale=scaling)
    else:
        size, length = query.shape[0], query.shape[2]
        bias = query.new_empty(size, 1, length, length).expand(-1, query.shape[1], -1, -1) if padded else None
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        kernel = aten._scaled_dot_product_efficient_attention
        found = kernel(query, key, value, bias, True, 0.0, not padded, scale=scaling)
    return found[0].transpose(1, 2).contiguous(), None


def shape_of(model: Any) -> Shape:
    from torch import nn

    head = model.get_output_embeddings()
    parameters = list(model.parameters())
    text = model.config.get_text_config()
    capped = ("final_logit_softcapping", "logits_scaling", "logit_scale")  # Gemma 2, Granite, Cohere
    weight = next(iter(head.parameters()))
    return Shape(
        sizes=[parameter.numel() for parameter in parameters],
        trains=[parameter.requires_grad for parameter in parameters],
        itemsize=parameters[0].element_size(),
        head=(text.vocab_size, text.hidden_size),
        head_trains=weight.requires_grad,
        plain_head=type(head) is nn.Linear and all(getattr(text, name, None) is None for name in capped),
    )


def rehearse(model: Any, length: int, layer: int | None) -> Pass:
    """Run forward and backward on the meta device, of one sequence and of two, and count.

    Args:
        length: tokens of a sequence.
        layer: number of the block after which the pass ends, or None for all of them.

    Raises:
        InputError: a forward pass that needs to see what is in a tensor.
    """
    runs = {size: _rehearse(model, size, length, layer) for size in (1, 2)}
    numbers = {}
    for name in ("kept", "peak", "flops", "forward_flops"):
        one, two = runs[1][name], runs[2][name]
        numbers[name] = Affine(2 * one - two, two - one)
    return Pass(**numbers, **{name: runs[1][name] for name in ("used", "used_again", "reached")})


def _rehearse(model: Any, size: int, length: int, layer: int | None) -> dict[str, Any]:
    import torch

    from pipeline.forward import hidden_after

    parameters = list(model.parameters())
    number = {id(parameter): i for i, parameter in enumerate(parameters)}
    used: list[int] = []
    needed: list[int] = []  # by backward: whatever it goes through
    reached: list[int] = []

    def called(module: Any, inputs: Any, output: Any) -> None:
        own = [number[id(parameter)] for parameter in module.parameters(recurse=False)]
        used.extend(own)
        first = output[0] if isinstance(output, tuple) else output
        needed.extend(own if first.requires_grad else [])

    def reduced(parameter: Any) -> None:  # ZeRO takes a gradient away as soon as it is there
        reached.append(number[id(parameter)])
        parameter.grad = None

    owners = [module for module in model.modules() if list(module.parameters(recurse=False))]
    hooks = [module.register_forward_hook(called) for module in owners]
    hooks += [p.register_post_accumulate_grad_hook(reduced) for p in parameters if p.requires_grad]
    base, head = getattr(model, model.base_model_prefix), model.get_output_embeddings()
    ids = torch.zeros(size, length, dtype=torch.long, device="meta")
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    ledger = _ledger(parameters)
    try:
        with ledger:
            states = base(**inputs).last_hidden_state if layer is None else hidden_after(base, layer, inputs)
            kept, forward_flops, num_used, num_needed = ledger.alive, ledger.flops, len(used), len(needed)
            if states.requires_grad:
                states.backward(torch.empty_like(states))
    except (RuntimeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"model.path: its forward pass cannot be rehearsed without weights: {reason}") from None
    finally:
        for hook in hooks:
            hook.remove()
    last = [number[id(parameter)] for parameter in head.parameters()] if layer is None else []
    return {
        "kept": kept,
        "peak": ledger.peak,
        "flops": ledger.flops,
        "forward_flops": forward_flops,
        "used": used[:num_used] + last,
        "used_again": needed[:num_needed] + used[num_used:] + last,
        "reached": sorted({*reached, *(row for row in last if parameters[row].requires_grad)}),
    }


def _ledger(parameters: list[Any]) -> Any:
    """A context in which every operation is seen: bytes of the storages it makes, while they live, and its FLOPs."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    class Ledger(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.alive = self.peak = self.flops = 0
            self.known: dict[int, tuple[int, Any]] = {}
            for parameter in parameters:  # and views of them
                self.known[parameter.untyped_storage()._cdata] = (0, None)

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            packet = function._overloadpacket
            if packet is torch.ops.aten._grouped_mm:  # experts: [rows, in] with [experts, in, out], or two of rows
                self.flops += 2 * args[0].shape[0] * args[0].shape[1] * args[1].shape[-1]
            elif packet in flop_registry:
                self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, torch.Tensor):
                    self._add(tensor.untyped_storage())
            return out

        def _add(self, storage: Any) -> None:
            key = storage._cdata
            if key not in self.known:
                self.known[key] = (storage.nbytes(), weakref.ref(storage, lambda _, key=key: self._remove(key)))
                self.alive += storage.nbytes()
                self.peak = max(self.peak, self.alive)

        def _remove(self, key: int) -> None:
            self.alive -= self.known.pop(key)[0]

    return Ledger()


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
        """`zero`: as `config.deepspeed_config` returns it. Defaults are DeepSpeed 0.19.8's (runtime/zero/config.py)."""
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
        size = micro * (2 if objective.pairing else 1)
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


# ---------------------------------------------------------------------------------------------------------------------
# The plan


@dataclass(frozen=True)
class Row:
    """One DeepSpeed configuration at its largest micro-batch that fits (or at 1, which does not). Bytes, seconds."""

    deepspeed: str
    fits: bool
    micro_batch_size: int
    gpu: dict[str, float]  # by kind, of one GPU
    total: float
    lacks: float  # beyond the GPU's memory
    host: float  # of one machine
    disk: float  # of one machine
    sent: list[Sent]
    seconds: Seconds


def working(config: RunConfig, shape: Shape, passes: dict[str, Pass], micro: int) -> tuple[float, float]:
    """(activations, logits): bytes alive in forward and backward of the task that needs more, beside the states."""
    from pipeline.objectives import OBJECTIVES

    found = []
    for name, one in passes.items():
        objective = OBJECTIVES[getattr(config.objective, name)]
        size = micro * (2 if objective.pairing else 1)
        asks = objective.asks == "logits"
        head = 0.0 if objective.hidden else head_bytes(shape, size * config.data.max_length, asks)
        found.append((max(one.kept(size), one.peak(size) - head), head))
    return max(found, key=sum)


def fit(file: str, zero: Zero, shape: Shape, config: RunConfig, machines: Machines, passes: dict[str, Pass]) -> Row:
    """The configuration at the largest micro-batch that fits and divides the batch."""
    memory = states(shape, zero, config, machines)
    share = config.train.batch_size // machines.world
    limit = machines.gpu_memory * GIB - RESERVED
    held = sum(memory.gpu.values())
    gpu, total, micro = memory.gpu, held, 1
    for micro in [size for size in range(share, 0, -1) if share % size == 0]:
        activations, logits = working(config, shape, passes, micro)
        total = held + max(activations + logits, memory.step)
        gpu = {**memory.gpu, "activations": activations, "logits": logits, "step": memory.step}
        if total <= limit:
            break
    loading = 0 if zero.stage == 3 else shape.elements * shape.itemsize  # from_pretrained reads into main memory
    return Row(
        deepspeed=file,
        fits=total <= limit,
        micro_batch_size=micro,
        gpu=gpu,
        total=total + RESERVED,
        lacks=max(total - limit, 0.0),
        host=machines.gpus * max(sum(memory.host.values()), loading),
        disk=machines.gpus * memory.disk,
        sent=traffic(shape, zero, config, machines, passes, micro),
        seconds=seconds(shape, zero, config, machines, passes, micro),
    )


@dataclass(frozen=True)
class Plan:
    shape: Shape
    rows: list[Row]
    refused: dict[str, str]  # by configuration: why it cannot be used

    @property
    def cheapest(self) -> Row | None:
        """The least GPU time for a step, among those that fit."""
        return min((row for row in self.rows if row.fits), key=lambda row: row.seconds.step, default=None)


def make_plan(config: RunConfig, machines: Machines) -> Plan:
    """Every shipped configuration, and the run's own.

    Raises:
        InputError: a batch that does not divide over the GPUs; see `model_without_weights` and `rehearse`.
    """
    from pipeline.objectives import OBJECTIVES

    if config.train.batch_size % machines.world:
        raise InputError(
            f"train.batch_size {config.train.batch_size} does not divide over {machines.world} GPUs; give a multiple, "
            f"as --train.batch_size {-(-config.train.batch_size // machines.world) * machines.world}"
        )
    model = model_without_weights(config)
    shape = shape_of(model)
    rehearsed: dict[int | None, Pass] = {}
    passes = {}
    for task in config.tasks:
        layer = config.objective.layer if OBJECTIVES[getattr(config.objective, task)].hidden else None
        if layer not in rehearsed:
            rehearsed[layer] = rehearse(model, config.data.max_length, layer)
        passes[task] = rehearsed[layer]
    files = dict.fromkeys([config.train.deepspeed, *(f"ds_configs/{name}.json" for name in SHIPPED)])
    rows, refused = [], {}
    for file in files:
        train = config.train.model_copy(update={"deepspeed": file})
        try:
            given = deepspeed_config(config.model_copy(update={"train": train}))
            refuse_uneven_groups(given, machines.world)
        except InputError as error:
            if file == config.train.deepspeed:
                raise
            refused[file] = str(error)
            continue
        rows.append(fit(file, Zero.of(given, shape), shape, config, machines, passes))
    return Plan(shape, rows, refused)


def launch_line(row: Row, machines: Machines, arguments: Sequence[str]) -> str:
    """The command that trains as planned; `arguments` are the plan's own that say what run it is."""
    where = f"--num_gpus {machines.gpus}" if machines.nodes == 1 else "--hostfile hosts"
    chosen = [
        *("--train.deepspeed", row.deepspeed),
        *("--train.micro_batch_size", str(row.micro_batch_size)),
    ]
    return f"deepspeed {where} --module pipeline.train {shlex.join([*arguments, *chosen])}"


KINDS = ("parameters", "gradients", "spare", "optimizer", "original", "buffers", "activations", "logits", "step")


def report(plan: Plan, machines: Machines, arguments: Sequence[str]) -> str:
    """The plan as text: a table in Markdown, what is cheapest, and how to start it. GiB, GB, seconds."""
    shape = plan.shape
    kinds = [kind for kind in KINDS if any(row.gpu.get(kind) for row in plan.rows)]
    columns = ["configuration", "micro-batch", *kinds, "total", "fits", "host", "sent", "seconds"]
    lines = [
        f"{shape.elements / 1e9:.2f} G parameters, {shape.trained / 1e9:.2f} G of them train; {machines.nodes} x "
        f"{machines.gpus} GPUs of {machines.gpu_memory:g} GiB, {machines.tflops:g} TFLOP/s sustained"
        + (f", {machines.bandwidth:g} GB/s between machines" if machines.nodes > 1 else ""),
        "GiB of one GPU by kind; total: the larger of activations + logits and step, all others, and "
        f"{RESERVED // GIB} reserved.",
        "GiB of main memory and disk of one machine. GB that a step asks collectives to move, and its seconds.",
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
            [*lines, "", "nothing fits; more GPUs, or --model.gradient_checkpointing true, or shorter rows"]
        )
    lines += ["", f"cheapest that fits: {best.deepspeed}, micro-batches of {best.micro_batch_size}", ""]
    if machines.nodes > 1:
        lines.append(f"# hosts: {machines.nodes} lines like `NAME slots={machines.gpus}`, one a machine")
    return "\n".join([*lines, launch_line(best, machines, arguments)])


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def parse(arguments: Sequence[str] | None) -> tuple[RunConfig, Machines, bool, list[str]]:
    """(run, machines, whether JSON is wanted, the arguments that say what run it is).

    Raises:
        InputError: see `config.resolve`; or machines that cannot be.
    """
    parser = Parser(
        prog="python -m pipeline.plan",
        description="What a run needs on a cluster, and what fits: memory by kind, traffic, time, the launch line.",
        epilog="Further arguments override keys of the configuration, as in pipeline.train: --a.b VALUE.",
        allow_abbrev=False,
    )
    number: Callable[..., Any] = parser.add_argument
    number("--config", required=True, metavar="FILE", help="the run's YAML file")
    number("--method", metavar="NAME", help="a preset from the file's table `methods:`")
    number("--gpus", type=int, required=True, metavar="N", help="GPUs of a machine")
    number("--gpu-memory", type=float, required=True, metavar="GIB", help="memory of a GPU")
    number("--nodes", type=int, default=1, metavar="M", help="machines [1]")
    number("--bandwidth", type=float, metavar="GB/S", help="into, and out of, a machine; needed beside --nodes")
    number(
        *("--tflops",),
        **{"type": float, "default": 400.0, "metavar": "T"},
        help="what a GPU sustains [400: 40 %% of an H100's 989 in bf16]",
    )
    number("--json", action="store_true", help="for scripts: bytes and seconds")
    known, rest = parser.parse_known_args(arguments)
    for name in ("gpus", "nodes", "gpu_memory", "tflops", "bandwidth"):
        value = getattr(known, name)
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"command line: --{name.replace('_', '-')} must be above 0, not {value}")
    if known.nodes > 1 and known.bandwidth is None:
        raise InputError("command line: --nodes needs --bandwidth, GB/s into a machine (400 for 8 x 400 Gb/s)")
    method = [] if known.method is None else ["--method", known.method]
    machines = Machines(known.gpus, known.nodes, known.gpu_memory, known.bandwidth or 0.0, known.tflops)
    config = resolve(known.config, known.method, rest)
    return config, machines, known.json, ["--config", known.config, *method, *rest]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its status: 0, or 2 for unusable input."""
    try:
        config, machines, wants_json, given = parse(arguments)
        with redirect_stdout(sys.stderr):  # where libraries say on import what they found
            plan = make_plan(config, machines)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if wants_json:
        best = plan.cheapest
        rows = [asdict(row) for row in plan.rows]
        answer = {"configurations": rows, "refused": plan.refused, "cheapest": best and best.deepspeed}
        print(json.dumps({**answer, "launch": best and launch_line(best, machines, given)}, indent=2))
    else:
        print(report(plan, machines, given))
    return 0


if __name__ == "__main__":
    sys.exit(main())
