"""Which elements may move: the definition by sorting, and the same elements however they are spread over ranks."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from pipeline.synthesis import windows
from pipeline.synthesis.confine import BINS, Confined, Confinement

SIZES = (1000, 1, 0, 3, 64, 700, 2500)
TOTAL = sum(SIZES)
KINDS = ("forget", "forget_mean_square", "forget_over_retain")


def gradients(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Six orders of magnitude, and zeros in either."""
    dice = torch.Generator().manual_seed(seed)
    f, r = (torch.randn(TOTAL, generator=dice) * 10 ** (3 * torch.randn(TOTAL, generator=dice)) for _ in range(2))
    f[::13], r[::17] = 0.0, 0.0
    return f, r


def scores(by: str, f: Tensor, r: Tensor, q: Tensor) -> Tensor:
    """By their definitions, float64."""
    f, r = f.double(), r.double()
    if by == "forget_mean_square":
        return 0.1 * f**2 + 0.9 * q.double()
    return f.abs() if by == "forget" else torch.where(f == 0, 0, f**2 / r**2)


def pieces_of(f: Tensor, r: Tensor, q: Tensor | None, m: Tensor | None = None) -> list[Confined]:
    columns = [[None] * len(SIZES) if x is None else x.split(SIZES) for x in (q, m)]
    return [
        Confined(row, *parts) for row, parts in enumerate(zip(f.split(SIZES), r.split(SIZES), *columns, strict=True))
    ]


@pytest.mark.parametrize("share", [0.01, 0.2, 0.9])
@pytest.mark.parametrize("by", KINDS)
def test_the_largest_scores_may_move_up_to_a_bin(by: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "eager_window", lambda device: 512)
    windows.plan.cache_clear()
    (f, r), q, m = gradients(), gradients(3)[0] ** 2, torch.ones(TOTAL)
    before = [x.clone() for x in (f, r, q)]
    score = scores(by, *before)
    state = q if by == "forget_mean_square" else None
    found = Confinement(share, by).confine_(pieces_of(f, r, state, m), TOTAL)  # pyright: ignore[reportArgumentType]
    inside = m == 1
    assert found == pytest.approx(inside.sum().item() / TOTAL)
    lowest, highest = score[inside].min(), score[~inside].max()
    assert lowest > highest * (1 - 2**-6)  # a bin of a root is twice as wide for the square
    wanted = min(share, (score > 0).double().mean().item()) * TOTAL
    width = 2**-8 if by != "forget_over_retain" else 2**-7
    in_bin = ((score >= lowest * (1 - width)) & (score <= lowest * (1 + width))).sum()
    assert wanted <= inside.sum() <= wanted + in_bin
    for now, then in zip((f, r), before[:2], strict=True):
        assert torch.equal(now, torch.where(inside, then, 0))
    if by == "forget_mean_square":
        torch.testing.assert_close(q, score.float())
        assert set(m.tolist()) == {0.0, 1.0}
    else:
        assert torch.equal(q, before[2])


@pytest.mark.parametrize("by", KINDS)
def test_two_ranks_choose_what_one_chooses(by: str) -> None:
    """Bit for bit, with the elements cut in the middle of a tensor, padded, and in another order."""
    f, r = gradients()
    whole = [x.clone() for x in (f, r, f**2)]
    state = whole[2] if by == "forget_mean_square" else None
    confinement = Confinement(0.2, by)  # pyright: ignore[reportArgumentType]
    alone = confinement.confine_(pieces_of(whole[0], whole[1], state), TOTAL)
    ranks = []
    for a, b in ((0, 1500), (1500, TOTAL)):
        padded = [torch.cat([x[a:b], torch.zeros(7)]) for x in (f, r, f**2)]
        ranks.append([Confined(0, padded[0], padded[1], None if state is None else padded[2])])
    total, meet, found = torch.zeros(BINS, dtype=torch.int64), threading.Barrier(2), [0.0, 0.0]

    def run(rank: int) -> None:
        def add(counts: Tensor) -> None:
            if rank:
                total.add_(counts)
                meet.wait()
                meet.wait()
            else:
                meet.wait()
                total.add_(counts)
                meet.wait()
            counts.copy_(total)

        found[rank] = confinement.confine_(ranks[rank], TOTAL, add)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == [alone, alone]
    for index in range(2):
        joined = torch.cat([ranks[0][0][1 + index][:-7], ranks[1][0][1 + index][:-7]])
        assert torch.equal(joined, whole[index])


def test_a_loss_scale_is_in_no_state_and_changes_no_choice() -> None:
    made = []
    for scale in (1.0, 1024.0):
        (f, r), q = gradients(), gradients(3)[0] ** 2
        Confinement(0.2).confine_(pieces_of(f * scale, r * scale, q), TOTAL, scale=scale)
        made.append(q)
    assert torch.equal(*made)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("by", KINDS)
def test_a_value_that_is_not_finite_is_left_for_the_step_to_see(by: str, bad: float) -> None:
    for broken in range(2):
        pair = gradients()
        pair[broken][5] = bad
        q = torch.ones(TOTAL) if by == "forget_mean_square" else None
        before = [x.clone() for x in pair]
        share = Confinement(0.2, by).confine_(pieces_of(*pair, q), TOTAL)  # pyright: ignore[reportArgumentType]
        assert share == 1.0 and (q is None or torch.equal(q, torch.ones(TOTAL)))
        assert all(torch.equal(now, then) or bad != bad for now, then in zip(pair, before, strict=True))
        assert not torch.isfinite(pair[broken]).all()


def test_where_nothing_is_forgotten_nothing_moves() -> None:
    f, r = torch.zeros(TOTAL), gradients()[1]
    assert Confinement(0.2, "forget").confine_(pieces_of(f, r, None), TOTAL) == 0.0
    assert not r.any()
    for share, new_share in ((0.0, 0.1), (1.0, 0.1), (0.2, 0.0)):
        with pytest.raises(ValueError, match="between 0 and 1"):
            Confinement(share, new_share=new_share)
