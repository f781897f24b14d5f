"""Measures of probes, counted by hand, and the batches that they are taken in."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from pipeline.data.batches import Batch
from pipeline.data.probes import ProbeSet, Question, RowScores, measures_of, schedule
from pipeline.modeling.probes import rows_of, score_rows
from pipeline.modeling.token_losses import OutputLayer, token_scores
from pipeline.monitoring.levels import Levels


def test_strength_and_memorization_of_a_row_counted_by_hand() -> None:
    """Logits of five positions; token t+1 is greedy at 1, 3 and 4: of four predicted tokens the last two follow on."""
    labels = torch.tensor([[7, 1, 2, 3, 4], [7, 1, 2, -100, -100]])
    greedy = torch.tensor([[1, 0, 3, 4, 9], [0, 2, 5, 5, 5]])  # what position t predicts
    logits = 3.0 * F.one_hot(greedy, 10).float()
    losses, correct, largest = token_scores(logits, labels)
    assert largest.tolist() == [[1, 0, 3, 4, 0], [0, 2, 0, 0, 0]]  # of the predictions alone
    assert correct.tolist() == [[1, 0, 1, 1, 0], [0, 1, 0, 0, 0]]
    hit, miss = math.log(math.exp(3) + 9) - 3, math.log(math.exp(3) + 9)
    expected = [[hit, miss, hit, hit, 0], [miss, hit, 0, 0, 0]]
    assert torch.allclose(losses, torch.tensor(expected))
    batch = Batch(torch.arange(2), labels.clamp(min=0), (labels >= 0).long(), labels)
    engine: Any = lambda output, **inputs: token_scores(logits, inputs["labels"])  # noqa: E731
    scores, tokens = score_rows(engine, batch)
    rows_ = rows_of(scores)
    assert tokens.dtype == torch.int64 and tokens.tolist() == largest.tolist()
    assert [row[1:] for row in rows_] == [(4, 3, 2), (2, 1, 1)]
    found = measures_of(ProbeSet("two", [([7, 1, 2, 3, 4], 1), ([7, 1, 2], 1)], ""), rows_)
    assert found == pytest.approx(
        {
            "extraction_strength": (2 / 4 + 1 / 2) / 2,  # k is 2 of 4, and 1 of 2
            "exact_memorization": (3 / 4 + 1 / 2) / 2,
            "probability": (math.exp(-(3 * hit + miss) / 4) + math.exp(-(hit + miss) / 2)) / 2,
            "loss": (4 * hit + 2 * miss) / 6,
        }
    )


def test_scores_from_hidden_states_equal_those_from_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunk by chunk; a position that predicts nothing costs nothing and is 0."""
    from pipeline.modeling import token_losses

    monkeypatch.setattr(token_losses, "_CHUNK", 64)
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(2, 7, 5), torch.randn(30, 5), torch.randn(30)
    labels = torch.randint(30, (2, 7)).index_put((torch.tensor([0, 1]), torch.tensor([2, 6])), torch.tensor(-100))
    through_logits = token_scores(hidden @ weight.T + bias, labels)
    assert torch.allclose(token_scores(hidden, labels, OutputLayer(weight, bias)), through_logits, atol=1e-6)
    assert torch.equal(through_logits[0], token_losses.token_losses(hidden @ weight.T + bias, labels))
    assert (through_logits[:, 0, 1] == 0).all() and (through_logits[:, :, -1] == 0).all()


def test_choices_go_to_the_least_summed_loss() -> None:
    """Two questions: the right answer is longer with the smaller sum, then shorter by the mean alone."""
    rows_ = [RowScores(loss, tokens, 0, 0) for loss, tokens in ((4.0, 8), (5.0, 2), (6.0, 6), (2.0, 1))]
    found = ProbeSet("two", [], "", [Question(range(0, 2), 0), Question(range(2, 4), 0)])
    assert measures_of(found, rows_) == {"accuracy": 0.5}
    broken = [RowScores(math.nan, 1, 0, 0), *rows_[1:]]
    assert math.isnan(measures_of(found, broken)["accuracy"])


def test_batches_do_not_mix_sets_and_are_those_of_a_set_alone() -> None:
    sets = [
        ProbeSet(name, [([1] * n, 1) for n in sizes], "") for name, sizes in (("a", (5, 2, 9)), ("b", (3, 3, 1, 8)))
    ]
    assert schedule(sets, 2) == [[1, 0], [2], [5, 3], [4, 6]]
    assert schedule(sets[1:], 2) == [[2, 0], [1, 3]]


def test_a_level_is_reached_on_it_or_beyond_it_as_seen_from_the_first_probe() -> None:
    """Falling, rising, not finite; the first probe reaches none, and only the first to be reached counts."""
    falls = Levels({"probe/forget/loss": 3.0})
    assert not falls.see(0, {"probe/forget/loss": 4.0}) and falls.expected() == ["probe/forget/loss falls from 4 to 3"]
    assert not falls.see(1, {"probe/forget/loss": 3.1}) and not falls.see(2, {"probe/forget/loss": math.nan})
    assert not falls.see(2, {"probe/forget/loss": -math.inf}), "the log has null, so a resumed run would not see it"
    assert falls.see(3, {"probe/forget/loss": 3.0}) == ["probe/forget/loss 3 has reached 3"] and falls.step == 3
    assert not falls.see(4, {"probe/forget/loss": 2.0}) and falls.step == 3
    rises = Levels({"probe/a/accuracy": 0.5, "probe/b/loss": 1.0})
    rises.replay([(0, {"probe/a/accuracy": 0.2, "probe/b/loss": 0.9}), (5, {"probe/a/accuracy": 0.4})])
    assert rises.step is None and rises.see(10, {"probe/a/accuracy": 0.7, "probe/b/loss": 0.1}) and rises.step == 10
