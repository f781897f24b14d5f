"""Whether the model knows what it is to forget, measured before the first step."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from itertools import islice

import torch
import torch.distributed as dist

from pipeline.config.schema import RunConfig
from pipeline.data.batches import IGNORED, BatchSampler
from pipeline.losses.objectives import OBJECTIVES
from pipeline.modeling.outputs import ModelEngine, TokenLosses, forward
from pipeline.modeling.token_losses import shifted
from pipeline.monitoring.verdicts import never_known

log = logging.getLogger(__name__)

MOST = 32  # sequences of a corpus that are measured: of the first batch


def nll_per_token(sampler: BatchSampler, engine: ModelEngine) -> float:
    """Mean NLL, in nats, of the tokens that the first batch predicts (of its first MOST sequences or so).

    Under the present weights. Every rank must call.
    """
    passes = max(MOST // (sampler.micro_batch_size * sampler.world_size), 1)
    total = torch.zeros(2, dtype=torch.float64, device=engine.device)  # nats, tokens
    engine.eval()
    with torch.no_grad():
        for batch in islice(sampler.batches(0), passes):
            own, size = batch.to(engine.device), len(batch.index)  # preferred answers come behind them
            losses = forward(engine, own, TokenLosses())[:size]
            total[0] += losses.double().sum()
            total[1] += (shifted(own.labels[:size]) != IGNORED).sum()
    engine.train()
    dist.all_reduce(total)
    return float(total[0] / total[1])


def warn_of_unknown(config: RunConfig, samplers: Mapping[str, BatchSampler], engine: ModelEngine) -> None:
    """Warn if the model finds the forget corpus as improbable as text that it never saw. Every rank must call.

    Not for an objective that teaches other text than the forget corpus (idk, jensun), or trains a part of the model
    (rmu).
    """
    objective = OBJECTIVES.get(config.objective.forget)
    if "forget" not in samplers or objective is None or objective.replaces or objective.hidden or objective.has_target:
        return
    found = {task: nll_per_token(sampler, engine) for task, sampler in samplers.items()}
    warning = never_known(found["forget"], found.get("retain"))
    if warning is not None and dist.get_rank() == 0:
        log.warning(warning)
