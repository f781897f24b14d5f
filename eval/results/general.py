"""General ability: scores of what a model could do before it met either corpus."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Suites whose scores are what a model can do at large: a table of their own, for each named task.
GENERAL = ("lm_eval", "rwku_utility")


@dataclass(frozen=True)
class GeneralAbility:
    """The scores of the named tasks, and all scores of the suite where lower is better (perplexities)."""

    columns: tuple[str, ...] = ()
    lower_is_better: frozenset[str] = frozenset()

    @property
    def headlines(self) -> list[str]:
        """One score for each task: its accuracy, or else the first."""
        first: dict[str, str] = {}
        for column in self.columns:
            task, _, metric = column.rpartition(".")
            if task not in first or metric == "acc":
                first[task] = column
        return list(first.values())


def general_ability(suites: Mapping[str, Mapping[str, Any]]) -> GeneralAbility:
    """What the `suites` of an evaluation measure beside their forget and retain sets.

    A metric directly below a task is one of the task itself; deeper ones belong to the members of a group.
    """
    columns, lower = [], set()
    for suite in GENERAL:
        result = suites.get(suite, {})
        for task, metrics in result.get("metrics", {}).items():
            columns += [f"{suite}.{task}.{metric}" for metric, value in metrics.items() if not isinstance(value, dict)]
        lower |= {f"{suite}.{score}" for score in lower_scores(result.get("higher_is_better", {}))}
    return GeneralAbility(tuple(columns), frozenset(lower))


def lower_scores(higher_is_better: Mapping[str, Any], name: str = "") -> set[str]:
    """The dotted names of what is False in a nested table."""
    found: set[str] = set()
    for key, value in higher_is_better.items():
        dotted = f"{name}.{key}" if name else key
        if isinstance(value, dict):
            found |= lower_scores(value, dotted)
        elif value is False:
            found.add(dotted)
    return found
