"""Probes in the log: their names, and `train.stop_at`, the levels of which the first to be passed ends the run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

Measure = TypeVar("Measure", bound=str)

PREFIX = "probe/"  # of the names in `metrics.jsonl`: probe/SET/MEASURE

SHOWN = {"extraction_strength": "ES", "accuracy": "accuracy"}  # on the line of progress, of the sets that have them


def probe_names(measured: Mapping[str, Mapping[Measure, float]]) -> dict[str, float]:
    """{set: {measure: value}} as the rows of `metrics.jsonl` name it."""
    return {f"{PREFIX}{name}/{measure}": value for name, found in measured.items() for measure, value in found.items()}


def probes_in(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of probes in a row of `metrics.jsonl`, by their names; without those that are not finite (null)."""
    return {name: value for name, value in row.items() if name.startswith(PREFIX) and value is not None}


def short(numbers: Mapping[str, float]) -> dict[str, float]:
    """The numbers of probes that a line has room for: {"forget ES": 0.1}."""
    parts = {name: name.split("/")[1:] for name in numbers}
    return {f"{of} {SHOWN[what]}": numbers[name] for name, (of, what) in parts.items() if what in SHOWN}


@dataclass
class Levels:
    """Levels by the names of the log. A level is passed where a probe lies on it, or on the other side than the first.

    So one key serves a model that forgets (extraction strength falls to .1) and one that learns (it rises to .8).
    """

    levels: Mapping[str, float]
    first: dict[str, float] = field(default_factory=dict)  # the first value of each
    step: int | None = None  # the step whose probe was the first to pass a level

    def see(self, step: int, numbers: Mapping[str, float]) -> list[str]:
        """Take account of the probe of `step`; the levels that it passes, in words, if none was passed before."""
        passed = []
        for name, level in self.levels.items():
            value = numbers.get(name)
            if value is None or not math.isfinite(
                value
            ):  # not measured, or null in the log: a resumed run sees the same
                continue
            if name not in self.first:
                self.first[name] = value
            elif value >= level if self.first[name] < level else value <= level:
                passed.append(f"{name} {value:.4g} has reached {level:g}")
        if self.step is not None or not passed:
            return []
        self.step = step
        return passed

    def replay(self, rows: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Take account of the probes (step, numbers) of a run that is resumed."""
        for step, numbers in rows:
            self.see(step, numbers)

    def expected(self) -> list[str]:
        """In words: where each level lies beside the first probe."""
        return [
            f"{name} {'rises' if self.first[name] < level else 'falls'} from {self.first[name]:.4g} to {level:g}"
            for name, level in self.levels.items()
            if name in self.first
        ]
