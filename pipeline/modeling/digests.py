"""Digests of a model's weights: each rank reads a part of the files, and none is read twice."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import (
    PreTrainedModel,
)

from pipeline.data.corpus import file_digest


def weight_digests(model: PreTrainedModel, known: Path) -> dict[str, list[Any]]:
    """[bytes, mtime in ns, SHA-256] of each weight file of a local model folder, by path; empty for a hub's.

    Hashes gigabytes for a large model, so every rank must call: each reads a part of the files.

    Args:
        known: what was returned before, as JSON, or no file. A file of the same path, size and mtime is not read again.
    """
    folder = Path(str(model.config.name_or_path))
    if not folder.is_dir():
        return {}
    try:
        before = json.loads(known.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = {}
    files = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.bin")) + [folder / "config.json"]
    found: list[Any] = [None] * dist.get_world_size()
    mine = {}
    for file in files[dist.get_rank() :: dist.get_world_size()]:
        path, state = str(file.resolve()), file.stat()
        same = before.get(path, [])[:2] == [state.st_size, state.st_mtime_ns]
        mine[path] = before[path] if same else [state.st_size, state.st_mtime_ns, file_digest(file)]
    dist.all_gather_object(found, mine)
    return {path: entry for part in found for path, entry in part.items()}


def fingerprint(model: PreTrainedModel, digests: dict[str, list[Any]]) -> str:
    """Identifies the weights that were loaded: the hub's commit, or one digest of a folder's `weight_digests`."""
    if not digests:
        return f"{model.config.name_or_path}@{getattr(model.config, '_commit_hash', None)}"
    lines = sorted(f"{Path(path).name} {sha256}\n" for path, (_, _, sha256) in digests.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()
