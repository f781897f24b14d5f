"""A file or folder that this user may not reach, wherever a command meets it, is one line and not a traceback."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import pytest
import torch.distributed as dist

from eval.files import exit_status
from pipeline import plan, train
from pipeline.distributed.errors import raise_on_all_ranks
from pipeline.errors import InputError

SAID = "secret/run: permission denied; name another place, or have its owner permit it"


def denied(*_: object) -> NoReturn:
    raise PermissionError(13, "Permission denied", "secret/run")


@pytest.mark.parametrize(
    "command",
    [
        lambda: train.main(["--config", "my.yaml"]),
        lambda: plan.main(["--config", "my.yaml", "--gpus", "2", "--gpu-memory", "80"]),
        lambda: exit_status(denied),
    ],
    ids=["pipeline.train", "pipeline.plan", "eval"],
)
def test_a_command_names_it(
    command: Callable[[], int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "parse_command_line", denied)
    monkeypatch.setattr(plan, "parse", denied)
    assert command() == 2
    assert capsys.readouterr().err == f"error: {SAID}\n"


def test_it_is_the_error_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the other ranks would wait for one that has ended."""
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)

    def gather(found: list[Any], mine: object) -> None:
        found[0] = mine

    monkeypatch.setattr(dist, "all_gather_object", gather)
    with pytest.raises(InputError) as caught, raise_on_all_ranks():
        denied()
    assert str(caught.value) == SAID


def test_a_right_that_is_of_no_file_keeps_its_traceback() -> None:
    def port() -> NoReturn:
        raise PermissionError(13, "Permission denied")

    with pytest.raises(PermissionError):
        exit_status(port)
