"""What the frozen original model says, without a second model.

NPO and DPO compare a sequence's likelihood with the original's, which never changes: one float per sequence, computed
once before training and cached on disk. KL, UNDIAL and RMU's retain term ask for logits or hidden states of each batch:
for those, copies of what trains are kept, as sharded as the training is, and put back in place for a forward pass.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from pipeline.data.batches import Batch, collate
from pipeline.data.tokenize import Sequences
from pipeline.monitoring.console import is_live
from pipeline.zero.parameters import local_share, release_gathered

log = logging.getLogger(__name__)


def cache_file(cache: Path, parts: dict[str, Any]) -> Path:
    """Where the log-likelihoods for this model, tokenizer, text and packing are kept; other `parts`, another file."""
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    return cache / "reference" / f"{key}.safetensors"


def sequence_nll(
    engine: Any,
    sequences: Sequences,
    wanted: np.ndarray,
    *,
    micro_batch_size: int,
    pad: int,
    file: Path | None,
) -> Tensor:
    """nll_ref(x) of sequences `wanted`, the sum over their predicted tokens, under the engine's present weights.

    Every rank must call; each computes its part, in equally many forward passes.

    Args:
        wanted: sorted indices into `sequences`.
        file: the cache, read and written on rank 0 (None elsewhere). What it lacks is computed and added.

    Returns:
        [len(sequences)] float64 on the CPU, NaN where it was never computed.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    device = engine.device
    known = _load(file, len(sequences)) if file is not None else torch.empty(len(sequences), dtype=torch.float64)
    known = known.to(device)
    dist.broadcast(known, src=0)
    missing = wanted[torch.isnan(known).cpu().numpy()[wanted]]
    if not len(missing):
        return known.cpu()

    found = torch.zeros_like(known)
    turn = world * micro_batch_size
    padded = np.resize(missing, -(-len(missing) // turn) * turn).reshape(-1, world, micro_batch_size)
    engine.eval()
    with torch.no_grad():
        for indices in tqdm(padded[:, rank], "reference log-probabilities", disable=not is_live(), unit=" batches"):
            batch = collate(sequences, indices, pad).to(device)
            losses = engine(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
            found[batch.index] = losses.double().sum(1)
    engine.train()
    # A sequence that fills up the last round may be computed by several ranks: take it from one of them.
    owners = torch.full_like(known, float(world))
    owners[torch.from_numpy(np.unique(padded[:, rank])).to(device)] = float(rank)
    mine = owners.clone()
    dist.all_reduce(owners, dist.ReduceOp.MIN)
    found *= (owners == mine) & (mine < world)
    dist.all_reduce(found)
    known = torch.where(owners < world, found, known).cpu()
    if file is not None:
        unfinished = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({"nll": known}, unfinished)
            os.replace(unfinished, file)
        except (OSError, SafetensorError) as error:  # the run can do without it
            unfinished.unlink(missing_ok=True)
            log.warning("cannot write the reference cache %s (%s): a resumed run computes it again", file, error)
    return known


def _load(file: Path, size: int) -> Tensor:
    unknown = torch.full((size,), torch.nan, dtype=torch.float64)
    if not file.is_file():
        return unknown
    try:
        nll = load_file(file)["nll"]
        if nll.shape != unknown.shape or nll.dtype != unknown.dtype or torch.isinf(nll).any():
            raise ValueError(f"holds {nll.dtype} {list(nll.shape)}")
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        log.warning("the reference cache %s is damaged (%s); computing it again", file, error)
        return unknown
    return nll


class ReferenceWeights:
    """The frozen original: this rank's part of every trained tensor as it was, in place for a forward pass at a time.

    Costs what the trained tensors take in the model's dtype: a share of them under ZeRO-3, a few under RMU, adapters
    (which start at zero effect) under LoRA. Make it before the first step.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.trained = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
        self.kept = [local_share(parameter).detach().clone() for parameter in self.trained]

    @contextmanager
    def active(self) -> Iterator[None]:
        """No gradient, no dropout, original weights. Every rank must enter; not between a forward and its backward."""
        self._swap()
        self.engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.engine.train()
            self._swap()

    def _swap(self) -> None:
        for number, parameter in enumerate(self.trained):
            release_gathered(parameter)
            held = local_share(parameter)
            held.data, self.kept[number] = self.kept[number], held.data

    def logits(self, batch: Batch) -> Tensor:
        """[B, T, V] in the model's dtype."""
        with self.active():
            return self.engine(input_ids=batch.input_ids, attention_mask=batch.attention_mask)

    def hidden(self, batch: Batch, layer: int) -> Tensor:
        """[B, T, H] after decoder block `layer`."""
        with self.active():
            return self.engine(input_ids=batch.input_ids, attention_mask=batch.attention_mask, layer=layer)
