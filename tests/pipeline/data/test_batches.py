"""Sequences -> the batch of a step: random order without replacement, the same for any number of ranks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from pipeline.data.batches import IGNORED, Batch, BatchSampler, collate, stack, with_target
from tests.pipeline.data.corpora import (
    MANY,
    truncated,
    write,
)


class Rows(list[np.ndarray]):
    """Sequences of chosen lengths, in memory."""

    def num_predicted_tokens(self, indices: np.ndarray) -> np.ndarray:
        return np.array([len(self[int(index)]) - 1 for index in indices])

    def prompt_lengths(self, indices: np.ndarray) -> np.ndarray:
        return np.zeros(len(indices), dtype=np.int64)


def stream(
    size: int = 10, batch: int = 4, micro: int = 1, rank: int = 0, world: int = 1, **changed: int
) -> BatchSampler:
    dice = np.random.default_rng(7)
    rows = Rows(dice.integers(1, 50, dice.integers(2, 9)) for _ in range(size))
    keys = {"seed": 0, "task": 0, "pad": 49, **changed}
    return BatchSampler(rows, batch_size=batch, micro_batch_size=micro, rank=rank, world_size=world, **keys)  # pyright: ignore


def walk(of: BatchSampler, steps: int) -> list[int]:
    return np.concatenate([of.global_batch(step) for step in range(steps)]).tolist()


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(size=st.integers(1, 23), batch=st.integers(1, 30), steps=st.integers(1, 9), seed=st.integers(0, 3))
def test_a_stream_walks_permutations_without_replacement(size: int, batch: int, steps: int, seed: int) -> None:
    positions = walk(stream(size, batch, seed=seed), steps)
    assert len(positions) == steps * batch
    for start in range(0, len(positions), size):
        window = positions[start : start + size]
        assert len(set(window)) == len(window) and set(window) <= set(range(size))
    seen: Counter[int] = Counter()
    for position in positions:  # at no moment is a sequence two visits ahead of another
        seen[position] += 1
        counts = [seen[index] for index in range(size)]
        assert max(counts) - min(counts) <= 1


def test_the_permutations_differ_by_turn_seed_and_task() -> None:
    size = 50
    turns = np.array(walk(stream(size, size), 3)).reshape(3, size)
    others = [turns[0], turns[1], turns[2], walk(stream(size, size, seed=1), 1), walk(stream(size, size, task=1), 1)]
    # seed s with task t must not be seed t with task s either
    others += [walk(stream(size, size, seed=2), 1), walk(stream(size, size, seed=0, task=2), 1)]
    assert len({tuple(int(i) for i in order) for order in others}) == len(others)
    assert list(range(size)) not in [list(order) for order in others]


def test_a_batch_depends_on_the_step_and_not_on_what_was_asked_before() -> None:
    forward, backward = stream(13, 5), stream(13, 5)
    steps = range(12)
    first = {step: forward.global_batch(step).tolist() for step in steps}
    assert {step: backward.global_batch(step).tolist() for step in reversed(steps)} == first


@pytest.mark.parametrize(("world", "micro"), [(1, 1), (1, 4), (1, 12), (2, 1), (2, 3), (2, 6), (3, 1), (3, 2), (3, 4)])
def test_the_global_batch_is_the_same_for_any_ranks_and_micro_batches(world: int, micro: int) -> None:
    for step in range(4):
        want = stream(17, 12).global_batch(step)
        indices, predicted = [], 0
        for rank in range(world):
            mine = stream(17, 12, micro, rank, world)
            assert mine.global_batch(step).tolist() == want.tolist()
            batches = list(mine.batches(step))
            assert [len(batch.index) for batch in batches] == [micro] * (12 // (micro * world))
            for batch in batches:
                indices += batch.index.tolist()
                predicted += int((batch.labels[:, 1:] != IGNORED).sum())
                for row, index in enumerate(batch.index.tolist()):
                    assert (
                        batch.input_ids[row][batch.attention_mask[row] == 1].tolist() == mine.sequences[index].tolist()
                    )
            assert mine.loss_denominator(step, "sequence") == 12
        assert sorted(indices) == sorted(want.tolist())
        assert all(stream(17, 12, micro, r, world).loss_denominator(step, "token") == predicted for r in range(world))


@pytest.mark.parametrize(
    ("size", "batch", "steps"), [(10, 3, 1), (10, 3, 3), (10, 3, 4), (10, 5, 2), (3, 7, 1), (40, 4, 9)]
)
def test_visited_is_what_the_steps_use(size: int, batch: int, steps: int) -> None:
    got = stream(size, batch).indices_used(steps)
    assert got.tolist() == sorted(set(walk(stream(size, batch), steps)))


def test_padding_is_on_the_right_and_masked_everywhere() -> None:
    rows = Rows([np.array([5, 6, 7]), np.array([8, 49]), np.array([1, 2])])  # 49, the pad, is a token here
    batch = collate(rows, np.array([1, 0]), 49)  # pyright: ignore[reportArgumentType]
    assert batch.index.tolist() == [1, 0]
    assert batch.input_ids.tolist() == [[8, 49, 49], [5, 6, 7]]
    assert batch.attention_mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.labels.tolist() == [[8, 49, IGNORED], [5, 6, 7]]
    assert {tensor.dtype for tensor in vars(batch).values()} == {torch.int64}
    assert collate(rows, np.array([2, 1]), 49).input_ids.shape == (2, 2)  # pyright: ignore[reportArgumentType]


def test_a_target_is_repeated_over_what_each_row_predicts() -> None:
    """By hand: from the first token that is predicted on, which the first of a row never is; all else stays."""
    labels = torch.tensor([[5, 6, 7, 8], [IGNORED, IGNORED, 3, IGNORED], [4, IGNORED, IGNORED, IGNORED]])
    given = Batch(torch.arange(3), torch.ones(3, 4).long(), torch.ones(3, 4).long(), labels)
    got = with_target(given, (21, 22))
    x = IGNORED
    assert got.labels.tolist() == [[x, 21, 22, 21], [x, x, 21, x], [x, x, x, x]]
    assert got.input_ids is given.input_ids and got.attention_mask is given.attention_mask
    plain, aimed = stream(), stream(target=(21, 22))  # pyright: ignore
    for one, other in zip(plain.batches(0), aimed.batches(0), strict=True):
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(with_target(one, (21, 22)).labels, other.labels)


def test_batches_read_from_disk_are_the_corpus(read: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """The whole chain: the sequences of a step are the documents that its indices name."""
    sequences = read(write(tmp_path / "corpus.jsonl", MANY[:30]))
    walk = BatchSampler(sequences, seed=3, task=1, batch_size=6, micro_batch_size=3, rank=0, world_size=1, pad=0)
    expected = truncated(tokenizer, MANY[:30])
    for batch in walk.batches(2):
        for index, ids, mask in zip(batch.index.tolist(), batch.input_ids, batch.attention_mask, strict=True):
            assert ids[: int(mask.sum())].tolist() == expected[index]


def test_two_batches_in_one_are_padded_to_the_longer() -> None:
    rows = Rows([np.array([5, 6, 7]), np.array([8, 9]), np.array([1, 2, 3, 4])])
    ids, mask = stack([collate(rows, np.array(indices), 49) for indices in ([0, 1], [2])])  # pyright: ignore
    assert ids.tolist() == [[5, 6, 7, 0], [8, 9, 49, 0], [1, 2, 3, 4]]
    assert mask.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
