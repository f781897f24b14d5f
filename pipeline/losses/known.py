"""Whether the model knows what it is to forget, measured before the first step."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch.distributed as dist

from pipeline.config.schema import RunConfig
from pipeline.data.batches import BatchSampler
from pipeline.losses.objectives import OBJECTIVES
from pipeline.modeling.reference import sequence_nll
from pipeline.monitoring.verdicts import never_known

log = logging.getLogger(__name__)

MOST = 32  # sequences of a corpus that are measured: of the first batch


def nll_per_token(sampler: BatchSampler, engine: Any) -> float:
    """Mean NLL, in nats, of the tokens that the first batch predicts, of its first MOST sequences.

    Under the present weights. Every rank must call.
    """
    indices = np.unique(sampler.global_batch(0))[:MOST]
    nll = sequence_nll(
        engine, sampler.sequences, indices, micro_batch_size=sampler.micro_batch_size, pad=sampler.pad, file=None
    )
    return float(nll[indices].sum()) / int(sampler.sequences.num_predicted_tokens(indices).sum())


def warn_of_unknown(config: RunConfig, samplers: Mapping[str, BatchSampler], engine: Any) -> None:
    """Warn if the model finds the forget corpus as improbable as text that it never saw. Every rank must call.

    Not for an objective that trains on other text than the forget corpus (idk), or on a part of the model (rmu).
    """
    objective = OBJECTIVES.get(config.objective.forget)
    if "forget" not in samplers or objective is None or objective.replaces or objective.hidden:
        return
    found = {task: nll_per_token(sampler, engine) for task, sampler in samplers.items()}
    warning = never_known(found["forget"], found.get("retain"))
    if warning is not None and dist.get_rank() == 0:
        log.warning(warning)
