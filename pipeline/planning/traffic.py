"""The communication of a step, and an estimate of its time: arithmetic on the trace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.config.objectives import NEEDS
from pipeline.config.schema import RunConfig
from pipeline.planning.memory import ADAM_BYTES, Cluster, Zero, keeps_stash

if TYPE_CHECKING:
    from pipeline.planning.meta_trace import ModelShape, Pass


# Bytes per second, sustained: about two thirds of the nominal figures.
NVLINK = 300e9  # one GPU, one direction, within a machine


PCIE = 25e9  # one GPU, one direction, to and from main memory


HBM = 2e12  # one GPU's own memory


MAIN_MEMORY = 200e9  # one machine


DISK = 5e9  # one machine


@dataclass(frozen=True)
class CommVolume:
    """Bytes that the collectives of one kind move in a step, counted as the whole tensor on one rank."""

    collective: str  # all_gather, reduce_scatter, all_reduce
    bytes: float
    within_machine: bool = False

    def seconds(self, machines: Cluster) -> float:
        """Of a ring: all but one share crosses each link once, in an all-reduce twice. The slower link counts."""
        times = 2 if self.collective == "all_reduce" else 1
        ranks = machines.gpus if self.within_machine else machines.world
        inside = times * self.bytes * (ranks - 1) / ranks / NVLINK
        if self.within_machine or machines.nodes == 1:
            return inside
        across = times * self.bytes * (machines.nodes - 1) / machines.nodes / (machines.bandwidth * 1e9)
        return max(inside, across)


def micro_batches(config: RunConfig, machines: Cluster, micro: int) -> int:
    return config.train.batch_size // (micro * machines.world)


def _bytes_of_rule(shape: ModelShape, config: RunConfig) -> int:
    """The products of each tensor that trains, and the histogram of a confinement: numbers of 8 bytes."""
    from pipeline.synthesis.combine import Synthesis  # torch, which --help does without
    from pipeline.synthesis.confine import BINS

    wanted = config.synthesis
    columns = Synthesis(wanted.rule, wanted.scope, metric=wanted.metric).columns
    return 8 * (columns * sum(shape.trains) + (BINS if wanted.confine is not None else 0))


def traffic(
    shape: ModelShape, zero: Zero, config: RunConfig, machines: Cluster, passes: dict[str, Pass], micro: int
) -> list[CommVolume]:
    """The collectives of a step. `passes`: the trace of each task."""
    if machines.world == 1:
        return []
    count = micro_batches(config, machines, micro)
    joint, once = config.train.schedule == "joint", zero.once(shape, config, machines, micro)
    reduced = _bytes_reduced(shape, zero, config, passes, count, once)
    sent = [CommVolume("all_reduce", _bytes_of_rule(shape, config))] if keeps_stash(config) else []
    sent.append(CommVolume("all_reduce", _bytes_of_checks(shape, zero, config, machines)))
    if zero.stage < 3:
        sent.append(CommVolume("all_reduce", reduced))
        return sent if zero.stage == 0 else [*sent, CommVolume("all_gather", shape.trained * shape.itemsize)]
    hpz = min(zero.hpz, machines.world) > 1
    trained_rows = {row for row, trains in enumerate(shape.trains) if trains}
    copied = set(range(len(shape.sizes))) - trained_rows  # have a copy in the machine, valid until the weights change
    gathered = {True: 0, False: 0}  # bytes; True: within the machine

    def gather(rows: list[int]) -> None:
        for row in rows:
            if shape.sizes[row] > zero.persistent:
                gathered[hpz and row in copied] += shape.sizes[row] * shape.itemsize
                copied.add(row)

    for number, (name, one) in enumerate(passes.items()):
        shares = joint and number > 0  # the pass, and so the gathers, of the first task
        for _ in range(count):
            if NEEDS[getattr(config.objective, name)].reference in (
                "logits",
                "hidden",
            ):  # the reference model's forward
                copied -= trained_rows
                gather(one.used)
                copied -= trained_rows
            if not shares:
                gather(one.used)
                gather(one.backward_gathers)
    persistent = shape.itemsize * sum(size for size in shape.sizes if size <= zero.persistent)  # updated after the step
    sent += [CommVolume("all_gather", gathered[False] + persistent), CommVolume("reduce_scatter", reduced)]
    return [*sent, CommVolume("all_gather", gathered[True], within_machine=True)] if hpz else sent


def _bytes_of_checks(shape: ModelShape, zero: Zero, config: RunConfig, machines: Cluster) -> int:
    """What finiteness and norm of the gradient take, in DeepSpeed 0.19.8 and the combiner.

    step() adds up a squared norm for each group of parameters that decay alike, in float64 under ZeRO-3 without
    offload, where it cuts groups in sub-groups; in half precision it also asks whether anything overflowed.
    """
    low, offloaded = shape.itemsize < 4, zero.optimizer_on != "device"
    groups = 2 if config.optimizer.weight_decay and config.model.lora is None else 1
    if zero.stage == 3:
        sub_groups = max(groups, -(-shape.trained // (machines.world * zero.sub_group)))
        return sub_groups * (4 if offloaded else 8) + (config.model.dtype == "float16")
    finite = 0 if keeps_stash(config) else 4  # else the table of products shows it
    if zero.stage == 0 or (zero.stage == 1 and low and not offloaded):  # each rank has the whole gradient
        return finite
    return finite + 4 * groups + low


def _bytes_reduced(
    shape: ModelShape, zero: Zero, config: RunConfig, passes: dict[str, Pass], count: int, once: tuple[bool, bool]
) -> float:
    """What the reductions of gradients move.

    Args:
        count: micro-batches of a task and rank.
        once: whether they are added up first, in fp32 (`Zero.once`).
    """
    own_once, forget_once = once
    combines, joint = keeps_stash(config) > 0, config.train.schedule == "joint"
    diverts = combines and joint  # the forget gradient, from DeepSpeed
    elements = [shape.trained for _ in passes]
    if zero.stage == 3:  # elsewhere DeepSpeed reduces zeros too
        elements = [sum(shape.sizes[row] for row in one.reached) for one in passes.values()]
    if zero.stage < 2 or own_once:
        own = (4 if own_once else zero.wire) * shape.trained * (1 + combines - diverts)
    else:
        own = zero.wire * count * sum(elements[-1:] if joint else elements)
    return own + diverts * elements[0] * (4 if forget_once else zero.wire * count)


@dataclass(frozen=True)
class Seconds:
    compute: float
    network: float
    offload: float
    update: float
    step: float


def seconds(
    shape: ModelShape, zero: Zero, config: RunConfig, machines: Cluster, passes: dict[str, Pass], micro: int
) -> Seconds:
    """Time of one step. With `overlap_comm` communication overlaps computation, else it adds to it."""
    count, world = micro_batches(config, machines, micro), machines.world
    vocabulary, width = shape.head
    flops = 0.0
    for name, one in passes.items():
        objective = NEEDS[getattr(config.objective, name)]
        size = micro * objective.num_answers
        product = 0.0 if objective.hidden else 2.0 * size * config.data.max_length * vocabulary * width
        flops += count * (one.flops(size) + product * (4 if shape.head_trains else 3))  # backward recomputes the logits
        if objective.reference in ("logits", "hidden"):
            flops += count * (one.forward_flops(size) + product)
    compute = flops / (machines.tflops * 1e12)
    sent = traffic(shape, zero, config, machines, passes, micro)
    network = sum(one.seconds(machines) for one in sent)
    mine = shape.trained / world if zero.stage else shape.trained
    offload = 0.0
    if zero.parameters_on == "cpu":  # each gather reads from main memory; the new weights return there
        gathered = sum(one.bytes for one in sent if one.collective == "all_gather")
        offload += gathered / world / PCIE
    if zero.optimizer_on != "device":
        times = 1 if zero.once(shape, config, machines, micro)[0] else count
        # to main memory, and back to be accumulated
        offload += mine * zero.accumulate * (2 * times * len(passes) - 1) / PCIE
        update = mine * ADAM_BYTES * machines.gpus / MAIN_MEMORY + mine * shape.itemsize / PCIE
        if zero.optimizer_on == "nvme":
            update += mine * 24 * machines.gpus / DISK  # weights and two moments, read and written
    else:
        update = mine * ADAM_BYTES / HBM
    parts = (compute, network, offload)
    return Seconds(compute, network, offload, update, (max(parts) if zero.overlap else sum(parts)) + update)
