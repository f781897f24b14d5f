"""Keys of objectives: values out of range, and what an objective lacks, are refused by name."""

from __future__ import annotations

import pytest

from tests.pipeline.config.base import refusal
from tests.pipeline.config.conftest import Resolve

WRONG = {
    "beta1": "-1",
    "beta2": "-0.5",
    "divergence": "js",
    "target": "''",
    "retain_loss_eps": "-0.1",
    "dual_step_size": "0",
    "dual_warmup_steps": "-1",
}


@pytest.mark.parametrize("key", WRONG)
def test_values_out_of_range(key: str, config: Resolve) -> None:
    assert f"objective.{key}" in refusal(lambda: config(f"--objective.{key}", WRONG[key]))


def test_a_divergence_is_one_of_three(config: Resolve) -> None:
    assert all(name in refusal(lambda: config("--objective.divergence", "pearsn")) for name in ("tv", "kl", "pearson"))


PDU = ["--objective.forget", "pdu"]
ALLOWED = ["--objective.retain_loss_eps", "0.3"]
LACKING: list[tuple[list[str], list[str]]] = [
    (PDU, ["objective.retain_loss_eps is missing", "before unlearning"]),
    ([*PDU, *ALLOWED, "--objective.retain", "none"], ["objective.retain: none", "pdu", "nll"]),
    (["--objective.forget", "flat"], ["data.forget", "flat", "prompt and response"]),
    (["--objective.forget", "altpo"], ["data.forget.preferred", "altpo"]),
]


@pytest.mark.parametrize(("tokens", "expected"), LACKING)
def test_what_an_objective_lacks_is_named(tokens: list[str], expected: list[str], config: Resolve) -> None:
    message = refusal(lambda: config(*tokens))
    assert all(part in message for part in expected), message


def test_a_level_of_the_retain_loss_is_asked_of_pdu_alone(config: Resolve) -> None:
    assert config(*PDU, *ALLOWED).objective.retain_loss_eps == 0.3
    assert config("--objective.forget", "ce_u", "--objective.retain", "jsd").objective.retain_loss_eps is None
