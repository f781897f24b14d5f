"""The keys of probes: what is refused, what a resumed run may change, what is read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.load import resolve
from pipeline.config.run_folder import check_output_dir, run_fingerprint
from pipeline.config.sources import Probe
from tests.pipeline.config.base import Resolve, refusal

ON = ["--train.probe_every", "5"]
CHOICE = {"path": "hub/arc", "prompt": "q", "choices": "c", "answer": "a"}
REFUSED: list[tuple[dict[str, Any], list[str], list[str]]] = [
    ({"arc": CHOICE}, ["--data.probes.arc.lmit", "3"], ["'data.probes.arc.lmit'", "did you mean 'limit'"]),
    ({"arc": CHOICE}, ["--data.probes.arc.limit", "0"], ["data.probes.arc.limit"]),
    ({"arc": {**CHOICE, "response": "r"}}, [], ["data.probes.arc", "response", "remove"]),
    ({"arc": {**CHOICE, "answer": "c"}}, [], ["data.probes.arc", "different columns"]),
    ({"arc": {**CHOICE, "path": "a.csv"}}, [], ["data.probes.arc", "a.csv", ".jsonl"]),
    (
        {"arc": {"path": "hub/arc", "choices": "c", "answer": "a"}},
        [],
        ["data.probes.arc", "prompt, choices and answer"],
    ),
    ({"arc": {"path": "hub/arc", "prompt": "q"}}, [], ["data.probes.arc", "prompt needs response"]),
    ({"arc": {"path": "no/such.jsonl"}}, [], ["data.probes.arc.path", "no/such.jsonl"]),
    ({"a/b": {"path": "hub/arc"}}, [], ["data.probes.a/b"]),
    ({}, ["--train.stop_at.forget.loss", "3"], ["train.stop_at", "train.probe_every is 0"]),
    ({}, [*ON, "--train.stop_at.forgot.loss", "3"], ["train.stop_at.forgot", "did you mean 'forget'"]),
    ({}, [*ON, "--train.stop_at.forget.los", "3"], ["train.stop_at.forget.los", "did you mean 'loss'"]),
    ({"arc": CHOICE}, [*ON, "--train.stop_at.arc.loss", "3"], ["train.stop_at.arc", "'loss'", "accuracy"]),
    ({}, [*ON, "--train.stop_at.forget.accuracy", "0.3"], ["train.stop_at.forget", "'accuracy'", "loss"]),
]


@pytest.mark.parametrize(("probes", "tokens", "expected"), REFUSED, ids=[str(number) for number in range(len(REFUSED))])
def test_refused_with_the_culprit(
    probes: dict[str, Any], tokens: list[str], expected: list[str], config: Resolve, tmp_path: Path
) -> None:
    message = refusal(lambda: with_probes(config, probes, tokens))
    for part in expected:
        assert part in message


def with_probes(config: Resolve, probes: dict[str, Any], tokens: list[str]) -> Any:
    return config("--data.probes", yaml.safe_dump(probes, default_flow_style=True).strip(), *tokens)


def test_the_corpora_are_sets_of_their_own_unless_others_have_their_names(config: Resolve, tmp_path: Path) -> None:
    more = ["--data.packing", "documents", "--data.forget.prompt", "q", "--data.forget.response", "a"]
    made = with_probes(config, {"arc": CHOICE, "retain": {"path": "hub/other", "limit": 3}}, more)
    forget = Probe.model_validate({"path": str(tmp_path / "forget.jsonl"), "prompt": "q", "response": "a"})
    assert made.probes == {
        "forget": forget,
        "retain": Probe.model_validate({"path": "hub/other", "limit": 3}),
        "arc": Probe.model_validate(CHOICE),
    }
    assert made.probes["forget"].limit == 64
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(made.model_dump()))
    assert resolve(tmp_path / "again.yaml") == made


def test_a_resumed_run_may_probe_at_other_steps_and_from_other_paths_but_not_other_sets(
    config: Resolve, tmp_path: Path
) -> None:
    def made(arc: dict[str, Any], *tokens: str) -> Any:
        return with_probes(config, {"arc": {**CHOICE, **arc}}, [*tokens])

    before, zero = made({}), {"zero_optimization": {"stage": 2}}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(before.model_dump()))
    moved = made({"path": "hub/moved"}, *ON, "--train.stop_at.arc.accuracy", "0.3", "--train.stop_action", "export")
    check_output_dir(moved, resume=True)
    assert run_fingerprint(before, zero) == run_fingerprint(moved, zero)
    other = made({"limit": 5})
    assert "data.probes.arc.limit" in refusal(lambda: check_output_dir(other, resume=True))
    assert run_fingerprint(before, zero) != run_fingerprint(other, zero)
