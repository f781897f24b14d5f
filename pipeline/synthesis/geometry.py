"""Cosines and norms of the two gradients and their combination."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pipeline.synthesis.combine import is_finite


@dataclass(frozen=True)
class Geometry:
    """Cosines, norms and the fraction of conflicting elements of one step. Cosines with a zero vector are 0."""

    cos_forget_retain: float
    cos_combined_forget: float
    cos_combined_retain: float
    forget_norm: float
    retain_norm: float
    combined_norm: float
    conflict_fraction: float
    finite: bool  # False: inf or NaN in a gradient or in the combination: the step must be skipped

    @classmethod
    def of(cls, table: Tensor, num_elements: int, scale: float = 1.0) -> Geometry:
        """From the reduced table of `Synthesis.combine_` (any subset of its rows) over `num_elements` elements.

        `scale` is the one given there; the norms are without it.
        """
        ff, fr, rr, gf, gr, gg, conflicts, *_ = table.sum(0).tolist()

        def cosine(product: float, a: float, b: float) -> float:
            return product / (a**0.5 * b**0.5) if a > 0 and b > 0 else 0.0

        return cls(
            cos_forget_retain=cosine(fr, ff, rr),
            cos_combined_forget=cosine(gf, gg, ff),
            cos_combined_retain=cosine(gr, gg, rr),
            forget_norm=ff**0.5 / scale,
            retain_norm=rr**0.5 / scale,
            combined_norm=max(gg, 0.0) ** 0.5 / scale,
            conflict_fraction=conflicts / max(num_elements, 1),
            finite=is_finite(table),
        )
