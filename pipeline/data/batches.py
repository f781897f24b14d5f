"""The batch of a step: a pure function of seed, step and rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from pipeline.data.tokenize import Sequences


@dataclass(frozen=True)
class Batch:
    """One micro-batch. R sequences right-padded to T tokens: R is B, or 2B with a preferred sequence for each."""

    index: Tensor  # [B] int64, the numbers of the sequences in the corpus
    input_ids: Tensor  # [R, T] int64
    attention_mask: Tensor  # [R, T] int64, 0 on padding
    labels: Tensor  # [R, T] int64, input_ids with prompts and padding masked; or what a sampler's target makes of them

    def to(self, device: torch.device) -> Batch:
        return Batch(*(tensor.to(device) for tensor in vars(self).values()))


def collate(sequences: Sequences, indices: np.ndarray, pad: int, preferred: Sequences | None = None) -> Batch:
    """Sequences `indices`, right-padded with token `pad`, padding masked in attention and labels, prompts in labels.

    With `preferred`, B rows of `sequences` come first, then their B counterparts of `preferred` in the same order.
    """
    sides = [sequences] if preferred is None else [sequences, preferred]
    rows = [np.array(side[int(index)], dtype=np.int64) for side in sides for index in indices]
    return pad_rows(rows, np.concatenate([side.prompt_lengths(indices) for side in sides]), indices, pad)


def pad_rows(rows: Sequence[np.ndarray], prompts: np.ndarray, indices: np.ndarray, pad: int) -> Batch:
    """R rows of int64 token ids as a batch; the first `prompts` [R] tokens of each have no label. indices: [B]."""
    input_ids = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(row) for row in rows], True, pad)
    position = torch.arange(input_ids.shape[1])
    real = position < torch.tensor([len(row) for row in rows]).unsqueeze(1)
    labels = input_ids.masked_fill(~real | (position < torch.from_numpy(prompts).unsqueeze(1)), IGNORED)
    return Batch(torch.from_numpy(indices), input_ids, real.long(), labels)


def stack(batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    """(input ids, attention mask) of all batches, one below the other, right-padded to the longest.

    The token of the padding is 0, which every model embeds; it is masked.
    """
    longest = max(batch.input_ids.shape[1] for batch in batches)

    def padded(tensor: Tensor) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, longest - tensor.shape[1]))

    ids, masks = [batch.input_ids for batch in batches], [batch.attention_mask for batch in batches]
    return torch.cat([padded(one) for one in ids]), torch.cat([padded(one) for one in masks])


def with_target(batch: Batch, target: Sequence[int]) -> Batch:
    """`batch` with the tokens of `target`, repeated, as labels of what each row predicts; its inputs stay."""
    predicted = batch.labels[:, 1:] != IGNORED
    wanted = torch.tensor(target)[(predicted.cumsum(1) - 1) % len(target)]
    labels = torch.full_like(batch.labels, IGNORED)
    labels[:, 1:] = wanted.where(predicted, labels[:, 1:])
    return replace(batch, labels=labels)


@dataclass(frozen=True)
class BatchSampler:
    """Batches of one corpus without end: seeded random permutations of its sequences, one after another."""

    sequences: Sequences
    seed: int
    task: int  # gives each of the two tasks an order of its own
    batch_size: int  # global
    micro_batch_size: int
    rank: int
    world_size: int
    pad: int
    preferred: Sequences | None = None  # the preferred counterpart of each of `sequences`
    target: tuple[int, ...] = ()  # token ids that, repeated, are to be predicted in place of a row's own

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that the model gets."""
        return max(side.longest for side in (self.sequences, self.preferred) if side is not None)

    @property
    def largest(self) -> int:
        """The largest token id that the model gets."""
        return max(*(side.largest for side in (self.sequences, self.preferred) if side is not None), *self.target, 0)

    def global_batch(self, step: int) -> np.ndarray:
        """[batch_size] int64: the sequences of step `step` (0-based), of all ranks."""
        size = len(self.sequences)
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        return np.array([_permutation(self.seed, self.task, int(at) // size, size)[int(at) % size] for at in positions])

    def batches(self, step: int) -> Iterator[Batch]:
        """This rank's micro-batches of step `step`; all ranks get the same number."""
        mine = self.global_batch(step).reshape(-1, self.world_size, self.micro_batch_size)[:, self.rank]
        made = (collate(self.sequences, indices, self.pad, self.preferred) for indices in mine)
        return (with_target(batch, self.target) for batch in made) if self.target else made

    def loss_denominator(self, step: int, normalize_by: str) -> int:
        """The number of terms that the mean over the global batch of step `step` is taken of.

        Its sequences (`sequence`), the tokens that they predict (`token`), or all of their tokens (`position`).
        Preferred sequences do not count.
        """
        if normalize_by == "sequence":
            return self.batch_size
        if normalize_by == "position":
            return sum(len(self.sequences[int(index)]) for index in self.global_batch(step))
        return int(self.sequences.num_predicted_tokens(self.global_batch(step)).sum())

    def indices_used(self, steps: int) -> np.ndarray:
        """Sorted indices of the sequences that the first `steps` steps use."""
        size = len(self.sequences)
        if steps * self.batch_size >= size:
            return np.arange(size)
        return np.unique(np.concatenate([self.global_batch(step) for step in range(steps)]))


@lru_cache(maxsize=4)  # a batch touches one or two permutations of each task
def _permutation(seed: int, task: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, task, epoch]).permutation(size)


IGNORED = -100  # label of a position that predicts nothing (padding, or masked by the data)
