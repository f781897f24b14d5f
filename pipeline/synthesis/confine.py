"""Confinement: only a share of the weights moves, those with the largest scores, chosen anew at each step.

The threshold comes from one histogram over all ranks. Its bins are the upper bits of the score as a float32, so that a
bin is 2^-8 of its score wide, whatever the score's size; whole bins are chosen, the largest first, until they have the
share. So the share is met from above, by less than the elements of one bin, and which elements have it does not depend
on how they are spread over ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pipeline.synthesis.partition import Partition
from pipeline.synthesis.windows import write

SHIFT = 15  # bits of a float32 that a bin has in common: sign and exponent, and 8 of 23 bits of the fraction remain
BINS = 2 ** (31 - SHIFT)
FIRST_NAN = (0x7F800000 >> SHIFT) + 1  # the bin behind that of infinity

By = Literal["forget", "forget_mean_square", "forget_over_retain"]


class Confined(NamedTuple):
    """What one rank has of a parameter: 1-D tensors of equal length, each of which may lie in another memory."""

    row: int  # index of the parameter
    forget: Tensor  # [n]; f, which becomes 0 outside
    retain: Tensor  # [n]; r, likewise
    mean_square: Tensor | None = None  # [n] float32, for scores by `forget_mean_square`: their state, updated in place
    momentum: Tensor | None = None  # [n] of the optimizer; becomes 0 outside, so that nothing moves there


@dataclass(frozen=True)
class Confinement:
    """Which elements may move: the `share` of them with the largest scores.

    | by | score |
    |---|---|
    | `forget` | \\|f\\| |
    | `forget_mean_square` | q <- s f² + (1 - s) q, a moving average that begins at 0 |
    | `forget_over_retain` | f²/r² (as \\|f\\|/\\|r\\|, whose order is the same); r = 0: infinite |

    An element whose score is 0 never moves. Both gradients become 0 outside BEFORE a rule sees them: it solves its
    problem for the weights that can move, and its promises hold for the update that they get. Adam's momentum becomes 0
    there too; an element that comes back begins without. Its second moment decays, as at a gradient of 0.

    Raises:
        ValueError: a value without sense.
    """

    share: float
    by: By = "forget_mean_square"
    new_share: float = 0.1  # s

    def __post_init__(self) -> None:
        if not 0 < self.share < 1 or not 0 < self.new_share <= 1:
            raise ValueError(f"share {self.share} and new_share {self.new_share} must lie between 0 and 1")

    @property
    def has_state(self) -> bool:
        return self.by == "forget_mean_square"

    def confine_(
        self,
        pieces: Sequence[Confined],
        numel: int,
        reduce: Callable[[Tensor], object] = lambda counts: None,
        scale: float = 1.0,
    ) -> float:
        """Zero gradients and momentum outside of the share.

        Nothing is changed if a gradient has a value that is not finite: the step must be skipped.

        Args:
            numel: elements on all ranks.
            reduce: adds the histogram up over all ranks, in place: [BINS] int64.
            scale: the loss scale of fp16, by which both gradients are multiplied here; the state does not contain it.

        Returns:
            The share of the elements that may move; 1 if nothing was changed.
        """
        counts = torch.zeros(BINS, dtype=torch.int64, device=pieces[0].retain.device if pieces else "cpu")
        for _, vectors in self._windows(pieces):
            counts += torch.bincount(self._bins(scale, *vectors), minlength=BINS)
        reduce(counts)
        if counts[FIRST_NAN:].any():
            return 1.0
        tail = counts.flip(0).cumsum(0).flip(0)  # elements in each bin and those above it
        lowest = max(int((tail >= self.share * numel).sum()) - 1, 1)  # bin 0 has the scores that are 0
        for parts, (f, r, *state) in self._windows(pieces):
            outside = self._bins(scale, f, r, *state) < lowest
            if self.has_state:
                write(parts[2], self._mean_square(scale, f, state[0]))
            write(parts[0], f.masked_fill(outside, 0))
            write(parts[1], r.masked_fill(outside, 0))
            if pieces[0].momentum is not None:
                write(parts[-1], state[-1].masked_fill(outside, 0))
        return float(tail[lowest]) / numel

    def _windows(self, pieces: Sequence[Confined]) -> Iterator[tuple[list[list[Tensor]], list[Tensor]]]:
        vectors = [[piece.forget for piece in pieces], [piece.retain for piece in pieces]]
        for kind in ("mean_square", "momentum"):
            if pieces and getattr(pieces[0], kind) is not None:
                vectors.append([getattr(piece, kind) for piece in pieces])
        rows = [piece.row for piece in pieces]
        for _, parts, on_device in Partition(rows, vectors, max(rows, default=-1) + 1):
            yield parts, on_device

    def _mean_square(self, scale: float, f: Tensor, before: Tensor) -> Tensor:
        return (f.float() / scale).square_().mul_(self.new_share).add_(before, alpha=1 - self.new_share)

    def _bins(self, scale: float, f: Tensor, r: Tensor, *state: Tensor) -> Tensor:
        """[n] int32: the bin of each element's score; a gradient that is not finite has one from FIRST_NAN on."""
        if self.by == "forget_mean_square":
            score = self._mean_square(scale, f, state[0])
        else:
            score = f.float().abs()
            if self.by == "forget_over_retain":
                score = torch.where(score == 0, 0, score / r.float().abs())
        broken = ~(torch.isfinite(f) & torch.isfinite(r))
        return (score.masked_fill_(broken, torch.nan).view(torch.int32) & 0x7FFFFFFF) >> SHIFT
