"""The weight of the retain loss as a dual variable (Entesari et al., 2025, PDU).

Unlearning under the condition that the retain loss stays at or below epsilon has the Lagrangian
forget loss + a (retain loss - epsilon) with a >= 0. Training lowers it in the weights; a rises by a step along its
derivative, retain loss - epsilon, and never falls below 0.
"""

from __future__ import annotations

from pipeline.config.objectives import NEEDS
from pipeline.config.schema import Objective
from pipeline.monitoring.metrics import Monitor
from pipeline.zero.combiner import GradientCombiner


def has_dual(settings: Objective) -> bool:
    """Whether the forget objective weighs the retain loss."""
    return settings.forget in NEEDS and NEEDS[settings.forget].weighs_retain


def log_weight(combiner: GradientCombiner, settings: Objective, metrics: Monitor) -> None:
    """Record the weight that the present step uses, if it is a dual variable."""
    if has_dual(settings):
        metrics.record("dual_weight", combiner.retain_weight)


def move_weight(combiner: GradientCombiner, settings: Objective, step: int, retain_loss: float | None) -> None:
    """Set the weight of the next step, if it is a dual variable.

    Every rank must call with the same arguments, so that all have the same weight.

    Args:
        step: 0-based, the one that is done.
        retain_loss: its mean over the global batch, under the weights before the update; None: the step was skipped.
    """
    if not has_dual(settings) or retain_loss is None or step < settings.dual_warmup_steps:
        return
    assert settings.retain_loss_eps is not None, "the configuration refuses this"
    moved = combiner.retain_weight + settings.dual_step_size * (retain_loss - settings.retain_loss_eps)
    combiner.retain_weight = max(0.0, moved)
