"""Bytes that a run writes, and what is small enough, by arithmetic on numbers of parameters. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.rules import num_averages
from pipeline.config.schema import RunConfig

EXPORT_FILE = 5 * 10**9  # bytes, as the hub splits models by default; a larger tensor has a file of its own
SMALL_PART = 8  # a trained set is small if it is at most the eighth part of the model
UNITS = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6))


@dataclass(frozen=True)
class DiskUse:
    """Of a run's folder: bytes of one checkpoint and of one export, and how many of each there are at once, at most."""

    checkpoint: int
    by_first_rank: int  # of a checkpoint: what no other rank has a part of
    checkpoints: int
    export: int
    exports: int

    @property
    def peak(self) -> int:
        return self.checkpoint * self.checkpoints + self.export * self.exports

    def __str__(self) -> str:
        return (
            f"{in_units(self.checkpoint)} a checkpoint, {self.checkpoints} of them at the peak; "
            f"{in_units(self.export)} an export, {self.exports} of them"
        )


def disk_use(config: RunConfig, stage: int, elements: int, trained: int, itemsize: int, steps: int) -> DiskUse:
    """What checkpoints and exports of a run take.

    A checkpoint has, of what trains, the fp32 weights, the optimizer's moments and moving averages of gradients; below
    ZeRO-3 the weights in the model's dtype too. An old one goes when the new one is complete. Exports stay.

    Args:
        elements: parameters of the model, of which `trained` train, of `itemsize` bytes each.
    """
    train, moments = config.train, 2 if config.optimizer.name == "adamw" else 0
    master = 0 if itemsize == 4 and stage == 0 else 1
    averages = num_averages(config.synthesis) if len(config.tasks) == 2 else 0
    weights = itemsize * trained if stage < 3 else 0
    checkpoint = 4 * trained * (master + moments + averages) + weights
    replicated = stage == 1 and config.model.dtype == "bfloat16"  # the gradient, and so its averages
    adapter = config.model.lora is not None and not config.model.lora.merge
    export = trained if adapter else elements - (trained if config.model.lora is not None else 0)
    return DiskUse(
        checkpoint=checkpoint,
        by_first_rank=weights + 4 * trained * averages * replicated if stage else checkpoint,
        checkpoints=train.keep_checkpoints + 1 if train.checkpoint_every else 1,  # 1: SIGTERM saves
        export=export * itemsize,
        exports=1 + (steps // train.export_every if train.export_every else 0),
    )


def reduces_once(trained: int, bucket: int, micro_batches: int) -> bool:
    """Whether a joint pass keeps the forget gradients of a task's micro-batches until there are all, and adds them up.

    Where all of them fit in a bucket, it has them together at the end of each backward pass anyway, twice while they
    are reduced. A sum in float32 takes no more.

    Args:
        trained: elements that train.
        bucket: elements of DeepSpeed's `reduce_bucket_size`.
        micro_batches: of a task, rank and step.
    """
    return micro_batches > 1 and trained <= bucket


def sums_locally(trained: int, elements: int, bucket: int, micro_batches: int) -> bool:
    """Whether the gradients that DeepSpeed would reduce by micro-batches are added up on each rank instead.

    Then a rank has one more gradient, whole, so it must be small beside the model, of `elements`.
    """
    return reduces_once(trained, bucket, micro_batches) and trained <= elements // SMALL_PART


def in_units(size: float) -> str:
    """`1.06 TB`, `12.3 GB`, `400 MB`."""
    unit, one = next(((unit, one) for unit, one in UNITS if size >= one), UNITS[-1])
    return f"{size / one:.3g} {unit}"
