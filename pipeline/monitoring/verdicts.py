"""What the losses of a run say about it: warnings for results that a user would otherwise take for success."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, variance

from pipeline.config.objectives import NEEDS

# Nats a token. SmolLM2-135M gives 5.9 to sentences about invented persons, 3.9 to common facts, 4.8 to biographies; a
# model of billions of parameters gives less to all of them, so what counts below the first is the difference to retain.
SURELY_UNKNOWN, PERHAPS_UNKNOWN, FARTHER = 5.0, 3.5, 0.5


def rose(values: Sequence[float]) -> bool:
    """Whether the second half of a series lies above the first by more than chance: Welch's t above 3.

    Batches differ, so single losses say little. Fewer than four values say nothing.
    """
    half = len(values) // 2
    if half < 2:
        return False
    early, late = values[:half], values[-half:]
    rise = fmean(late) - fmean(early)
    return rise > 3 * math.sqrt((variance(early) + variance(late)) / half) and rise > 1e-6 * abs(fmean(early))


def forgetting_failed(objective: str, losses: Sequence[float]) -> str | None:
    """A warning if the forget loss rose, unless that can be success. losses: of each step, in order."""
    if not rose(losses) or (rise := NEEDS[objective].rise) == "unclear":
        return None
    meaning = "its text became likelier" if rise == "likelier" else "the model moved away from its goal"
    return (
        f"objective.forget: the loss of {objective} rose from {losses[0]:.4g} to {losses[-1]:.4g}: {meaning}, nothing "
        "was forgotten; set a larger synthesis.gamma, or remove from data.retain what resembles data.forget"
    )


def looks_unseen(forget: float, retain: float | None) -> bool:
    """Whether a model finds the forget corpus as improbable as text that it never saw.

    Args:
        forget, retain: NLL a token of the two corpora before training, in nats; None without a retain task.
    """
    less_likely = retain is not None and forget > PERHAPS_UNKNOWN and forget > retain + FARTHER
    return forget >= SURELY_UNKNOWN or less_likely


def never_known(forget: float, retain: float | None) -> str | None:
    """A warning if the forget corpus `looks_unseen`; arguments as there."""
    if not looks_unseen(forget, retain):
        return None
    beside = f"; those of data.retain {math.exp(-retain):.2g}" if retain is not None else ""
    return (
        f"data.forget: before training the model gives its tokens a probability of {math.exp(-forget):.2g}{beside}. So "
        "improbable is text that a model never saw: there may be nothing to forget; try with eval.chat whether "
        "model.path knows it, or first train a model on it (objective.forget: none, with the text as data.retain)"
    )
