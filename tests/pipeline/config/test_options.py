"""A misspelt option is blamed on the option, with the nearest option or key."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipeline.config import load
from pipeline.config.schema import RunConfig
from tests.pipeline.config.base import keys, refusal


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["--resme"], "--resume"),
        (["--quiett", "--resume"], "--quiet"),
        (["--push_to_hub", "mine"], "--push-to-hub"),
        (["--steps", "3"], "--train.steps"),
        (["--stepss=3"], "--train.steps"),
        (["--lr", "1e-4"], "--optimizer.lr"),
        (["--alpha", "3"], "--model.lora.alpha or --synthesis.alpha"),
        (["--heldout", "0.1"], "--data.forget.heldout or --data.retain.heldout"),
        (["--zzz", "3"], ""),
    ],
)
def test_an_option_that_is_none(typed: list[str], meant: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(keys(tmp_path)))
    message = refusal(lambda: load.parse_command_line(["--config", str(file), *typed]))
    option = typed[0].partition("=")[0]
    assert message.startswith("command line: unknown key") and f"called {option};" in message
    assert (f"did you mean {meant}?" in message) if meant else "did you mean" not in message


def test_the_options_of_the_command_are_those_that_are_proposed() -> None:
    parser = load._train_parser()
    found = {text for action in parser._actions for text in action.option_strings if text.startswith("--")}
    assert found - {"--local_rank"} == {f"--{name}" for name in load.OPTIONS}
    assert {"train.steps", "model.lora.r", "data.retain.heldout", "seed"} <= {*load.leaves(RunConfig)}
