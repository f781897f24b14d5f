"""The weight of the retain loss as a dual variable, and the tokens of a target."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config.schema import Objective
from pipeline.errors import InputError
from pipeline.losses.dual import move_weight
from pipeline.losses.task import target_tokens


def moved(losses: list[float | None], **keys: Any) -> list[float]:
    """The weight after each of these steps."""
    settings = Objective(**{"forget": "pdu", "retain_loss_eps": 2.0, "dual_step_size": 0.5, **keys})
    combiner: Any = SimpleNamespace(retain_weight=1.0)
    weights = []
    for step, loss in enumerate(losses):
        move_weight(combiner, settings, step, loss)
        weights.append(combiner.retain_weight)
    return weights


def test_the_weight_rises_above_the_level_and_falls_below_it_to_zero_at_most() -> None:
    assert moved([3.0, 1.0, 0.0, 0.0, 0.0, 4.0]) == [1.5, 1.0, 0.0, 0.0, 0.0, 1.0]


def test_the_weight_stays_in_a_warm_up_and_at_a_skipped_step() -> None:
    assert moved([3.0, 3.0, 3.0], dual_warmup_steps=2) == [1.0, 1.0, 1.5]
    assert moved([3.0, None, 3.0]) == [1.5, 1.5, 2.0]


@pytest.mark.parametrize("forget", ["ga", "none"])
def test_of_other_objectives_it_is_one(forget: str) -> None:
    assert moved([3.0, 9.0], forget=forget) == [1.0, 1.0]


def test_a_target_without_tokens_is_refused() -> None:
    def tokenizer(text: str, add_special_tokens: bool = True) -> Any:
        return SimpleNamespace(input_ids=[1] * add_special_tokens + [7] * len(text.split()))

    made: Any = tokenizer
    assert target_tokens("No idea", made) == (7, 7)
    with pytest.raises(InputError, match=r"objective\.target"):
        target_tokens(" ", made)
