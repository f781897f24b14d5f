"""The axes of a sweep, the settings that they span, and the folders named after the settings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from urllib.parse import quote, unquote

from pipeline.errors import InputError

Setting = dict[str, str]  # swept key -> its value as text for the command line


AS_IT_IS = "recipe"  # the folder and the name of the setting that sweeps nothing


OWN_KEYS = ("config", "method", "seed", "output", "resume")


@dataclass(frozen=True)
class Axis:
    """One swept key: the values of a list, or (with no values) a range."""

    key: str
    values: tuple[str, ...] = ()
    low: float = math.nan
    high: float = math.nan


def parse_axis(text: str) -> Axis:
    """`key=a,b,c` or `key=low:high`; raises InputError for anything else."""
    key, equals, content = text.partition("=")
    if not equals or not key or not content or key.startswith("-"):
        raise InputError(f"--sweep {text}: write KEY=A,B,C or KEY=LOW:HIGH, as synthesis.gamma=0.1,0.3,1")
    if key in OWN_KEYS:
        raise InputError(f"--sweep {text}: {key} cannot be swept; --methods, --seeds and --output decide it")
    if ":" in content:
        try:
            low, high = map(float, content.split(":"))
        except ValueError:
            raise InputError(f"--sweep {text}: a range is LOW:HIGH with two numbers, a list is A,B,C") from None
        if not 0 < low < high < math.inf:
            raise InputError(f"--sweep {text}: a range is logarithmic and needs 0 < LOW < HIGH")
        return Axis(key, low=low, high=high)
    values = tuple(content.split(","))
    if "" in values or len(set(values)) < len(values):
        raise InputError(f"--sweep {text}: a list needs different values, none of them empty")
    return Axis(key, values)


def parse_sweep(texts: Iterable[str]) -> list[Axis]:
    """The axes in order of their keys, so that the order on the command line does not matter."""
    axes = sorted(map(parse_axis, texts), key=lambda axis: axis.key)
    for one, other in pairwise(axes):
        if one.key == other.key:
            raise InputError(f"--sweep names {one.key} twice; give all its values in one list")
    return axes


def grid(axes: Sequence[Axis]) -> list[Setting]:
    """Every combination of the lists; no axis, one empty setting."""
    keys = [axis.key for axis in axes]
    return [dict(zip(keys, values, strict=True)) for values in product(*(axis.values for axis in axes))]


def name_of(setting: Mapping[str, str]) -> str:
    """`key=value, key=value`, for tables."""
    return ", ".join(f"{key}={value}" for key, value in setting.items()) or AS_IT_IS


def run_folder(output: Path, method: str, setting: Setting, seed: int) -> Path:
    """FOLDER/runs/METHOD/KEY=VALUE,KEY=VALUE/seed-N; characters that a file name cannot have are percent-encoded."""
    parts = [f"{quote(key, safe='')}={quote(value, safe='')}" for key, value in setting.items()]
    return output / "runs" / quote(method, safe="") / (",".join(parts) or AS_IT_IS) / f"seed-{seed}"


def parse_setting(folder: str) -> Setting:
    """The inverse of the name of a setting's folder."""
    pairs = [pair.split("=") for pair in folder.split(",")] if folder != AS_IT_IS else []
    return {unquote(key): unquote(value) for key, value in pairs}


def by_number(setting: Setting) -> list[tuple[str, float, str]]:
    """A sort key for settings: 0.3 before 1 before 10, words after numbers."""

    def number(text: str) -> float:
        try:
            return float(text)
        except ValueError:
            return math.inf

    return [(key, number(value), value) for key, value in setting.items()]
