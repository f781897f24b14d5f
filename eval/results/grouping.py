"""Which runs are seeds of one method: those whose resolved configuration and data are the same."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from eval.results.trajectories import Run
from pipeline.config.rules import READERS
from pipeline.errors import InputError
from pipeline.files import Json

OF_RULES = {f"synthesis.{key}" for key in ("rule", "scope", "zero_forget", *READERS)}


def differing_keys(one: Run, other: Run) -> list[str]:
    """The keys in which two methods differ."""
    return sorted({key for key, _ in {*one.method} ^ {*other.method}})


def plain_of(name: str, groups: Mapping[str, list[Run]]) -> str | None:
    """The method with rule `sum` that differs from `name` in the rule, and in what `sum` does not read, alone."""

    def rest(runs: list[Run]) -> Json:
        return {key: x for key, x in runs[0].settings.items() if key not in OF_RULES}

    found = [other for other, runs in groups.items() if runs[0].rule == "sum"]
    return next((other for other in found if other != name and rest(groups[other]) == rest(groups[name])), None)


def group_runs(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs by method, named "forget+retain rule" and, if that is ambiguous, by the settings that differ.

    Raises:
        InputError: two runs of one method and seed, which would count as two seeds.
    """
    by_method: dict[tuple[tuple[str, str], ...], list[Run]] = defaultdict(list)
    for run in runs:
        twin = next((other for other in by_method[run.method] if other.seed == run.seed), None)
        if twin is not None:
            raise InputError(
                f"{twin.folder} and {run.folder} are one method and one seed ({run.seed}): the same run twice is no "
                "second seed; name one of them"
            )
        by_method[run.method].append(run)

    def short(members: list[Run]) -> str:
        return f"{members[0].objective} {members[0].rule or 'alone'}"

    groups = {}
    for method, members in by_method.items():
        rivals = [others[0] for others in by_method.values() if short(others) == short(members)]
        keys = [key for key, value in method if any((key, value) not in other.method for other in rivals)]
        differing = [f"{key}={value_of(key, members[0], rivals)}" for key in keys]
        groups[" ".join([short(members), *differing])] = sorted(members, key=lambda run: run.seed)
    return groups


def value_of(key: str, run: Run, rivals: Iterable[Run]) -> str:
    """A setting as text. Of a file that is known by its digest: the path, or the digest if paths are ambiguous."""
    value, path = str(run.settings[key]), run.paths.get(key)
    if path is None and key != "tokenizer":
        return value
    if path is not None and all(rival.settings.get(key) == value or rival.paths.get(key) != path for rival in rivals):
        return path
    return re.sub("[0-9a-f]{9,}", lambda found: found[0][:8], value)
