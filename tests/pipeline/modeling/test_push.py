"""`--push-to-hub`: refused before training where it cannot succeed; the whole folder arrives at a server."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch.distributed as dist

from pipeline import train
from pipeline.config.load import hub_name, parse_command_line
from pipeline.distributed import process_group
from pipeline.errors import FatalError, InputError
from pipeline.modeling.push import check_push, push
from tests.conftest import World


class Hub:
    """Plays the client of the hub: keeps what it was asked, and fails where it is told to."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.failure, self.asked = failure, []

    def __call__(self) -> Hub:
        return self

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> Any:
        self.asked.append(("create", name, private, exist_ok))
        return SimpleNamespace(repo_id=f"owner/{name}", __str__=lambda: "address")

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        if self.failure:
            raise self.failure
        self.asked.append(("upload", repo_id, sorted(path.name for path in Path(folder_path).iterdir())))


def test_the_folder_is_uploaded_to_a_private_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "README.md").write_text("card")
    (tmp_path / "model.safetensors").write_text("weights")
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    push(tmp_path, "mine")
    assert hub.asked == [("create", "mine", True, True), ("upload", "owner/mine", ["README.md", "model.safetensors"])]
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub(OSError("503\nService Unavailable")))
    with pytest.raises(FatalError) as error:
        push(tmp_path, "mine")
    message = str(error.value)
    assert "503 Service Unavailable" in message and f"hf upload mine {tmp_path}" in message and "\n" not in message


def test_what_cannot_be_pushed_is_refused_before_training(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = world.write(tmp_path / "run.yaml", tmp_path / "run")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    for name, expected in (("mine", "hf auth login"), ("a/b/c", "OWNER/NAME")):
        assert train.main(["--config", str(file), "--push-to-hub", name]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: --push-to-hub") and expected in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    check_push("owner/mine")
    with pytest.raises(InputError, match="OWNER/NAME"):
        check_push("no name")


def test_the_option_is_no_key_of_the_configuration(world: World, tmp_path: Path) -> None:
    arguments = ["--config", str(world.write(tmp_path / "run.yaml", tmp_path / "run")), "--push-to-hub", "owner/mine"]
    config, resume, quiet = parse_command_line(arguments)
    assert hub_name(arguments) == "owner/mine" and not resume and not quiet
    assert "push" not in str(config.model_dump()) and hub_name(arguments[:2]) is None


def test_no_rank_waits_for_the_upload(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large model uploads for longer than a collective waits: the ranks have met for the last time before it."""
    order: list[str] = []
    ranks = [True]

    def meet() -> None:
        order.append("meet")

    def part() -> None:
        ranks.clear()

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    monkeypatch.setattr(dist, "is_initialized", lambda: bool(ranks))
    monkeypatch.setattr(dist, "barrier", meet)
    monkeypatch.setattr(dist, "destroy_process_group", part)
    monkeypatch.setattr("pipeline.trainer.run", lambda *_: order.append("train"))
    monkeypatch.setattr("pipeline.modeling.push.push", lambda *_: order.append("upload"))
    monkeypatch.setattr(process_group.os, "_exit", lambda status: order.append(f"end {status}"))
    monkeypatch.setattr(process_group.signal, "signal", lambda *_: None)
    file = world.write(tmp_path / "run.yaml", tmp_path / "run")
    train.main(["--config", str(file), "--push-to-hub", "owner/mine"])
    assert order == ["train", "meet", "upload", "end 0"]
