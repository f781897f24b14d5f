"""The numbers of a step's geometry, as `metrics.jsonl` and TensorBoard name them; those of a layer end in its name."""

from __future__ import annotations

from dataclasses import asdict

from torch import Tensor

from pipeline.monitoring.metrics import Monitor
from pipeline.synthesis.geometry import Geometry

GEOMETRY = (
    *("cos_forget_retain", "cos_combined_forget", "cos_combined_retain", "conflict_fraction"),
    *("forget_norm", "retain_norm", "combined_norm"),
)


def record_geometry(metrics: Monitor, geometry: Geometry | None, update: Tensor | None, layer: str = "") -> None:
    """Record the angles between the two gradients, their combination and the update.

    Args:
        geometry: None where the two gradients were added up without being compared.
        update: [parameters, 2] float64, a part of `zero.update.update_sums`; None where it is not known.
    """
    suffix = f"/{layer}" if layer else ""
    measured = asdict(geometry) if geometry is not None else {}
    for name in GEOMETRY:
        metrics.record(f"{name}{suffix}", measured.get(name))
    product, square = (None, None) if update is None else update.sum(0).tolist()
    metrics.record_update(product, square, measured.get("retain_norm"), suffix)
