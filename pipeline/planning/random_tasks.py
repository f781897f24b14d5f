"""Two tasks on random tokens, for measurements of a step that need no text."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch.distributed as dist

from pipeline.config.schema import RunConfig
from pipeline.data.batches import BatchSampler
from pipeline.data.tokenize import Sequences
from pipeline.losses.objectives import OBJECTIVES
from pipeline.losses.task import Task


def random_tasks(config: RunConfig, vocabulary: int) -> list[Task]:
    """`ga` and `nll`, forget then retain, on `data.max_length` random tokens a sequence, of this rank."""
    batch, tokens, tasks = config.train.batch_size, config.data.max_length, []
    for number, (name, objective) in enumerate((("forget", "ga"), ("retain", "nll"))):
        dice = np.random.default_rng(number)
        ids = pa.array(dice.integers(0, vocabulary, 4 * batch * tokens).astype(np.int32))
        rows = pa.chunked_array([pa.ListArray.from_arrays([0, len(ids)], ids)])
        sampler = BatchSampler(
            Sequences(rows, tokens, "random"),
            0,
            number,
            batch,
            config.train.micro_batch_size,
            dist.get_rank(),
            dist.get_world_size(),
            0,
        )
        tasks.append(Task(name, sampler, OBJECTIVES[objective], config.objective))
    return tasks
