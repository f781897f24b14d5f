"""Probes: what the model knows of some sets of rows, from one forward pass of each, with teacher forcing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.config.schema import Train
from pipeline.data.batches import IGNORED, Batch, pad_rows
from pipeline.data.probes import Encoded, ProbeSet, RowScores, measure_sets, schedule
from pipeline.modeling.outputs import ModelForward, TokenScores, forward
from pipeline.modeling.token_losses import shifted
from pipeline.monitoring import console
from pipeline.monitoring.levels import Levels, probe_names
from pipeline.monitoring.metrics import Monitor


@dataclass(frozen=True)
class Prober:
    """Measures the sets under the present weights of an engine.

    The batches do not depend on the number of ranks, and the scores of each sequence are collected before means are
    taken: what is measured does not depend on it either.
    """

    engine: ModelForward
    sets: Sequence[ProbeSet]
    batch_size: int  # sequences of one forward pass

    def measure(self) -> dict[str, dict[str, float]]:
        """{set: {measure: value}}, the same on every rank. Every rank must call; weights and random states stay.

        Each rank computes every world-size-th batch; all make equally many forward passes, as a sharded model needs.
        """
        rank, world, device = dist.get_rank(), dist.get_world_size(), self.engine.device
        sequences = [sequence for found in self.sets for sequence in found.sequences]
        batches = schedule(self.sets, self.batch_size)
        scores = torch.zeros(len(sequences), len(RowScores._fields), dtype=torch.float64, device=device)
        self.engine.eval()
        with torch.no_grad():
            for number in range(rank, -(-len(batches) // world) * world, world):
                batch = batch_of(sequences, batches[min(number, len(batches) - 1)]).to(device)
                found, _ = score_rows(self.engine, batch)
                if number < len(batches):
                    scores[batch.index] = found
        self.engine.train()
        dist.all_reduce(scores)  # each row was computed by one rank and is 0 on the others: nothing is rounded
        return measure_sets(self.sets, rows_of(scores))


@dataclass(frozen=True)
class Probes:
    """The probes of a run: when they are due, where they are logged, and what `train.stop_at` makes of them."""

    prober: Prober
    metrics: Monitor
    levels: Levels
    settings: Train
    steps: int  # of the run

    @property
    def is_over(self) -> bool:
        """Whether a level has ended the run."""
        return self.levels.step is not None and self.settings.stop_action == "end"

    def exports(self, done: int) -> bool:
        """Whether the model after `done` steps is exported because its probe was the first to reach a level."""
        return self.levels.step == done and self.settings.stop_action == "export"

    def begin(self, start: int) -> None:
        """The probe before the first step; of a run that is resumed after `start` steps, those that it has made."""
        rows = [self.metrics.probes]
        dist.broadcast_object_list(rows, src=0)
        self.levels.replay(rows[0])
        if not start and self.settings.probe_every:
            self.record(0)
            self.metrics.flush(0)
        if self.is_over:
            console.logger.warning(
                "train.stop_at: the probe after step %d had reached a level; the run ends with the weights of step %d",
                *(self.levels.step, start),
            )
        elif expected := self.levels.expected():
            console.logger.info("train.stop_at waits until %s", " or ".join(expected))

    def record(self, done: int) -> None:
        """Record a probe after `done` steps, if one is due. All ranks measure the same and reach a level together."""
        every = self.settings.probe_every
        if not every or (done % every and done < self.steps):
            return
        began = time.perf_counter()
        numbers = probe_names(self.prober.measure())
        for name, value in numbers.items():
            self.metrics.record(name, value)
        self.metrics.record("probe_seconds", time.perf_counter() - began, reduce="max")
        for reached in self.levels.see(done, numbers):
            what = "the run ends here" if self.is_over else "the model is exported"
            console.logger.info("step %d: %s (train.stop_at); %s", done, reached, what)


def batch_of(sequences: Sequence[Encoded], numbers: Sequence[int]) -> Batch:
    """Sequences `numbers` as one batch; padding is masked everywhere, so any token will do."""
    rows = [np.array(sequences[number][0], dtype=np.int64) for number in numbers]
    prompts = np.array([sequences[number][1] for number in numbers], dtype=np.int64)
    return pad_rows(rows, prompts, np.array(numbers, dtype=np.int64), pad=0)


def score_rows(engine: ModelForward, batch: Batch) -> tuple[Tensor, Tensor]:
    """[B, 4] float64: the `RowScores` of each sequence of the batch; [B, T] int64: the greedy token of each prediction.

    Every rank must call, without autograd.
    """
    losses, correct, greedy = forward(engine, batch, TokenScores())
    predicted = shifted(batch.labels) != IGNORED
    place = torch.arange(predicted.shape[1], device=predicted.device).expand_as(predicted)
    last_miss = place.masked_fill(~predicted | correct.bool(), -1).amax(1, keepdim=True)
    suffix = predicted & (place > last_miss)
    return torch.stack([of.double().sum(1) for of in (losses, predicted, correct, suffix)], dim=1), greedy.long()


def rows_of(scores: Tensor) -> list[RowScores]:
    """The rows of [N, 4] float64, the scores that `score_rows` returns."""
    return [RowScores(loss, int(tokens), int(hits), int(suffix)) for loss, tokens, hits, suffix in scores.tolist()]
