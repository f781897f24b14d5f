"""The stages of a run around its steps: bytes of the machine that moves most, and the least time of its disk."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.config.schema import RunConfig
from pipeline.planning.memory import Cluster, Zero, flattened
from pipeline.zero.sizes import EXPORT_FILE, DiskUse, in_units

if TYPE_CHECKING:
    from pipeline.planning.meta_trace import ModelShape


UNKNOWN = "not measured (give --disk-bandwidth)"


@dataclass(frozen=True)
class Stage:
    name: str
    bytes: float  # of one machine: those that its disk reads or writes, or that pass through its main memory
    on_disk: bool
    seconds: float | None  # of the disk alone, at the bandwidth that was given; None: not measured


def stages(shape: ModelShape, zero: Zero, config: RunConfig, machines: Cluster, written: DiskUse) -> list[Stage]:
    """Start, checkpoint, resume and export, which do not depend on `train.schedule`.

    The machines share the folders of model and run. Each file is read from the disk once by a machine, whose main
    memory has it for the other ranks; the files of a checkpoint are written and read by the ranks that they belong to.
    """

    def disk(name: str, size: float) -> Stage:
        rate = machines.disk_bandwidth
        return Stage(name, size, True, None if rate is None else size / (rate * 1e9))

    adapters = shape.trained if config.model.lora is not None else 0  # begin as random numbers
    found = [disk("start: read the weights", (shape.elements - adapters) * shape.itemsize)]
    if copied := machines.gpus * flattened(shape, zero, machines):
        found.append(Stage("start: one tensor of the trained weights", copied, False, None))
    if zero.optimizer_on != "nvme":  # which DeepSpeed cannot save
        others = (written.checkpoint - written.by_first_rank) / machines.nodes
        checkpoint = written.by_first_rank + others
        found += [disk("checkpoint", checkpoint), disk("resume, after the start", checkpoint)]
    return [*found, disk("export", _export_of_first_machine(config, machines, written.export))]


def _export_of_first_machine(config: RunConfig, machines: Cluster, size: int) -> float:
    """Rank k of N writes files k, k + N, ...; adapters are one file, of the first rank."""
    if config.model.lora is not None and not config.model.lora.merge:
        return size
    rounds, rest = divmod(math.ceil(size / EXPORT_FILE), machines.world)
    return min(size, (rounds * machines.gpus + min(rest, machines.gpus)) * EXPORT_FILE)


def stage_table(found: list[Stage], machines: Cluster) -> list[str]:
    """Lines of a Markdown table."""
    rate, title = machines.disk_bandwidth, "Stages around the steps, on the machine that moves most"
    if rate is not None:
        title += f"; seconds of its disk alone, at {rate:g} GB/s: processors, GPUs and network add to them"
    lines = [f"{title}.", "", "| stage | of one machine | seconds |", "|---|---|---|"]
    for stage in found:
        place, least = ("disk", UNKNOWN) if stage.on_disk else ("main memory", "not measured")
        if stage.seconds is not None:
            least = f"at least {stage.seconds:.3g}"
        lines.append(f"| {stage.name} | {in_units(stage.bytes)} of {place} | {least} |")
    return lines
