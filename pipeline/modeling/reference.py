"""Outputs of the reference model, the frozen model that training started from, without a second model.

NPO and DPO compare a sequence's log-probability with the reference model's, which never changes: one float per sequence
is computed once before training and cached on disk. KL, UNDIAL and RMU's retain term need the reference model's logits
or hidden states of each batch: for those, each rank copies its share of every trained tensor, and swaps the copies in
for a forward pass.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from pipeline.data.batches import Batch, collate
from pipeline.data.tokenize import Sequences
from pipeline.distributed.bar import Bar
from pipeline.files import write_whole
from pipeline.modeling.outputs import HiddenStates, Logits, ModelForward, TokenLosses, forward
from pipeline.monitoring.console import is_live
from pipeline.zero.parameters import local_share, release_gathered

log = logging.getLogger(__name__)


def cache_file(cache: Path, parts: Mapping[str, object]) -> Path:
    """The file for the log-probabilities of one model, tokenizer, text and packing; other `parts` have another file."""
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    return cache / "reference" / f"{key}.safetensors"


def sequence_nll(
    engine: ModelForward,
    sequences: Sequences,
    indices: np.ndarray,
    *,
    micro_batch_size: int,
    pad: int,
    file: Path | None,
) -> Tensor:
    """nll_ref(x) of sequences `indices`, the sum over their predicted tokens, under the engine's present weights.

    Every rank must call; each computes its part, in equally many forward passes.

    Args:
        indices: sorted, into `sequences`.
        file: the cache, read and written on rank 0 (None elsewhere). What it lacks is computed and added.

    Returns:
        [len(sequences)] float64 on the CPU, NaN where it was never computed.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    device = engine.device
    known = _load(file, len(sequences)) if file is not None else torch.empty(len(sequences), dtype=torch.float64)
    known = known.to(device)
    dist.broadcast(known, src=0)
    missing = indices[torch.isnan(known).cpu().numpy()[indices]]
    if not len(missing):
        return known.cpu()

    computed = torch.zeros_like(known)
    size = world * micro_batch_size  # sequences of all ranks in one forward pass
    padded = np.resize(missing, -(-len(missing) // size) * size).reshape(-1, world, micro_batch_size)
    engine.eval()
    with torch.no_grad():
        for own in Bar(padded[:, rank], title="reference log-probabilities, batch", is_shown=is_live()):
            batch = collate(sequences, own, pad).to(device)
            computed[batch.index] = forward(engine, batch, TokenLosses()).double().sum(1)
    engine.train()
    # A sequence that fills up the last pass may be computed by several ranks: only the lowest of them counts.
    owners = torch.full_like(known, float(world))
    owners[torch.from_numpy(np.unique(padded[:, rank])).to(device)] = float(rank)
    own_rank = owners.clone()
    dist.all_reduce(owners, dist.ReduceOp.MIN)
    computed *= (owners == own_rank) & (own_rank < world)
    dist.all_reduce(computed)
    known = torch.where(owners < world, computed, known).cpu()
    if file is not None:
        _save(known, file)
    return known


def _save(nll: Tensor, file: Path) -> None:
    """Write the cache; log a warning where the disk refuses it, because the run works without."""
    try:
        write_whole(file, save({"nll": nll}))  # safetensors itself makes files for this user alone
    except OSError as error:
        log.warning("cannot write the reference cache %s (%s): a resumed run computes it again", file, error)


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
    """This rank's share of every trained tensor as training found it, swapped in for a forward pass at a time.

    Costs the bytes of the trained tensors in the model's dtype: a share of them under ZeRO-3, three tensors under RMU,
    the adapters (whose effect is zero at the start) under LoRA. Make it before the first step.
    """

    def __init__(self, engine: ModelForward) -> None:
        self.engine = engine
        self.trained = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
        self.copies = [local_share(parameter).detach().clone() for parameter in self.trained]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Reference weights, no gradient, no dropout. Every rank must enter; not between a forward and its backward."""
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
            share = local_share(parameter)
            share.data, self.copies[number] = self.copies[number], share.data

    def logits(self, batch: Batch) -> Tensor:
        """[B, T, V] in the model's dtype."""
        with self.active():
            return forward(self.engine, batch, Logits())

    def hidden_states(self, batch: Batch, layer: int) -> Tensor:
        """[B, T, H] after decoder block `layer`."""
        with self.active():
            return forward(self.engine, batch, HiddenStates(layer))
