"""Digests of a model's weights: each rank reads a part of the files, and no file is read twice."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch.distributed as dist
from transformers import (
    PreTrainedModel,
)

from pipeline.data.corpus import file_digest

Digest = list[int | str]  # [bytes, mtime in ns, SHA-256]


def weight_digests(model: PreTrainedModel, known: Path) -> dict[str, Digest]:
    """The digest of each file of a local model folder that decides what it computes, by path; empty for a hub's.

    These are weights, shape, and code that comes with the model.

    A large model has gigabytes to hash, so every rank must call: each reads a part of the files.

    Args:
        known: the return value of an earlier call, as JSON, or no file. A file of the same path, size and mtime is not
            read again.
    """
    folder = Path(str(model.config.name_or_path))
    if not folder.is_dir():
        return {}
    try:
        before: dict[str, Digest] = json.loads(known.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = {}
    files = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.bin"))
    files += [folder / "config.json", *sorted(folder.glob("*.py"))]
    found: list[dict[str, Digest]] = [{}] * dist.get_world_size()
    mine: dict[str, Digest] = {}
    for file in files[dist.get_rank() :: dist.get_world_size()]:
        path, state = str(file.resolve()), file.stat()
        same = before.get(path, [])[:2] == [state.st_size, state.st_mtime_ns]
        mine[path] = before[path] if same else [state.st_size, state.st_mtime_ns, file_digest(file)]
    dist.all_gather_object(found, mine)
    return {path: entry for part in found for path, entry in part.items()}


def fingerprint(model: PreTrainedModel, digests: dict[str, Digest]) -> str:
    """The identity of the loaded weights: the hub's commit, or one digest of a folder's `weight_digests`."""
    if not digests:
        return f"{model.config.name_or_path}@{getattr(model.config, '_commit_hash', None)}"
    lines = sorted(f"{Path(path).name} {sha256}\n" for path, (_, _, sha256) in digests.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()
