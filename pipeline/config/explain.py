"""One line for what pydantic refused: the place, the key and the remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pipeline.config.schema import RunConfig
from pipeline.errors import InputError
from pipeline.files import Json

RENAMED = {
    "model.train": "model.trainable",
    "objective.steering": "objective.steering_coeff",
    "synthesis.spare": "synthesis.stash_device",
    "optimizer.clip": "optimizer.max_grad_norm",
    "optimizer.warmup": "optimizer.warmup_ratio",
    "train.timeout": "train.timeout_minutes",
}


def nearest(name: str, valid: Sequence[str]) -> str:
    """A hint for a misspelt name: the closest valid one, and the list when it is short enough to read."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}valid: {', '.join(valid)}"


def subsection(annotation: object) -> type[BaseModel] | None:
    """The section that a field of this type holds (also `Lora | None`), or None for a plain value."""
    options = getattr(annotation, "__args__", (annotation,))
    return next((one for one in options if isinstance(one, type) and issubclass(one, BaseModel)), None)


def is_table(annotation: object) -> bool:
    """Whether a field of this type maps names that the user chooses to sections."""
    return getattr(annotation, "__origin__", None) is dict


def _keys_at(location: Sequence[str | int]) -> list[str]:
    """The valid keys of the section at `location`, for the hint beside an unknown key."""
    section: type[BaseModel] = RunConfig
    parts = iter(location)
    for part in parts:
        annotation = section.model_fields[str(part)].annotation
        section = subsection(annotation) or section
        if is_table(annotation):
            next(parts, None)  # a name of the user's
    return list(section.model_fields)


def _sets(tree: object, location: Sequence[str | int]) -> bool:
    for part in location:
        if not isinstance(tree, dict):
            return True
        if part not in tree:
            return False
        tree = tree[part]
    return True


def _place(error: ErrorDetails, file: str, layers: dict[str, Json]) -> str:
    """Where the refused value was written: the last of the layers that sets it, or the file."""
    if error["type"] != "extra_forbidden" and isinstance(
        error["input"], dict
    ):  # keys contradict each other, or one is missing
        return file
    return next((name for name in reversed(layers) if _sets(layers[name], error["loc"])), file)


def _renamed(where: str, key: str) -> InputError:
    return InputError(f"{where}: the key {key!r} has a new name; write {RENAMED[key]!r}")


def refuse_renamed(tree: object, where: str) -> None:
    """
    Raises:
        InputError: the configuration `tree`, read from `where`, has a key under an old name, which nothing would read.
    """
    for key in RENAMED:
        *sections, name = key.split(".")
        found = tree
        for section in sections:
            found = found.get(section) if isinstance(found, dict) else None
        if isinstance(found, dict) and name in found:
            raise _renamed(where, key)


def explain(refusal: ValidationError, file: str, layers: dict[str, Json]) -> InputError:
    """One line for the first error of pydantic; a misspelt key comes before the missing key that it leaves behind.

    Args:
        layers: what the configuration was merged from, by the place where it was written; the last wins.
    """
    first = min(refusal.errors(), key=lambda one: one["type"] != "extra_forbidden")
    where, location = _place(first, file, layers), [part for part in first["loc"] if part != "[key]"]
    key = ".".join(str(part) for part in location)
    if first["type"] == "extra_forbidden":
        if key in RENAMED:
            return _renamed(where, key)
        hint = nearest(str(location[-1]), _keys_at(location[:-1]))
        return InputError(f"{where}: unknown key {key!r}; {hint}")
    if first["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", first.get("ctx", {})["expected"])
        return InputError(
            f"{where}: {key}: {first['input']!r} is not a choice; {nearest(str(first['input']), choices)}"
        )
    if first["type"] == "missing":
        return InputError(f"{where}: {key!r} is missing; set it in the file or with --{key} VALUE")
    given = "" if isinstance(first["input"], dict) else f" (it is {first['input']!r})"
    return InputError(f"{where}: {key}: {first['msg'].removeprefix('Value error, ')}{given}")
