"""Numbers over seeds and runs: mean and spread, correlation, Pareto front."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import isfinite
from statistics import fmean, stdev

import numpy as np

from eval.results.numbers import with_spread
from pipeline.files import Json


def summarise(values: Iterable[float]) -> dict[str, float | None]:
    """{"mean", "sd"}; sd is the sample standard deviation, None for one value. Both are None for no value.

    Of values that are not all finite, as a broken model has them, sd is None.
    """
    numbers = list(values)
    spread = len(numbers) > 1 and all(map(isfinite, numbers))
    return {"mean": fmean(numbers) if numbers else None, "sd": stdev(numbers) if spread else None}


def mean_sd(values: Iterable[float], digits: int | None = None) -> str:
    """Mean ± sample standard deviation; the mean alone for one value; a dash for none.

    Args:
        digits: decimals of both; None: those of a score (`with_spread`).
    """
    summary = summarise(values)
    mean, sd = summary["mean"], summary["sd"]
    if mean is None:
        return "–"
    if digits is None:
        return with_spread(mean, sd)
    return f"{mean:.{digits}f}" + ("" if sd is None else f" ± {sd:.{digits}f}")


def mean_of_known(values: Sequence[float | None], digits: int | None = None) -> str:
    """`mean_sd` of the values that are known and, if others are not, of how many: "0.320 ± 0.283 (2 of 3)"."""
    known = [value for value in values if value is not None]
    found = mean_sd(known, digits)
    return found if len(known) in (0, len(values)) else f"{found} ({len(known)} of {len(values)})"


def ranks_of(values: Sequence[float]) -> np.ndarray:
    """Ranks from 1, float64, same shape; equal values share the mean of their ranks."""
    _, position, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[position]


FEWEST = 5  # points of a correlation: of fewer, unrelated numbers often lie near a line


def correlate(pairs: Iterable[tuple[float, float]]) -> Json:
    """{"n", "pearson", "spearman"}; the two are None for fewer than FEWEST pairs, or if one side does not vary."""
    rows = list(pairs)
    if len(rows) < FEWEST or any(len(set(values)) == 1 for values in zip(*rows, strict=True)):
        return {"n": len(rows), "pearson": None, "spearman": None}
    one, other = map(list, zip(*rows, strict=True))
    return {
        "n": len(rows),
        "pearson": float(np.corrcoef(one, other)[0, 1]),
        "spearman": float(np.corrcoef(ranks_of(one), ranks_of(other))[0, 1]),
    }


def pareto(points: Iterable[Json]) -> list[Json]:
    """The points with `forget` and `retain` that no other point dominates (at least equal in both, better in one)."""
    front: list[Json] = []
    for point in sorted(points, key=lambda point: (point["forget"], -point["retain"])):
        equal = front and (point["forget"], point["retain"]) == (front[-1]["forget"], front[-1]["retain"])
        if not front or equal or point["retain"] > front[-1]["retain"]:
            front.append(point)
    return front
