"""Keys that a user leaves open: what fits the machine, and what `--resume` keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipeline.config.load import parse_command_line, resolve, to_yaml
from pipeline.config.run_folder import check_output_dir
from tests.pipeline.config.base import Resolve, keys, refusal


def decided(folder: Path, on_gpu: bool | None = None) -> tuple[str, str]:
    file = folder / "open.yaml"
    file.write_text(yaml.safe_dump(keys(folder)))
    made = resolve(file, on_gpu=on_gpu)
    return made.model.dtype, made.train.deepspeed


def test_precision_and_deepspeed_file_fit_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu, on_gpu = ("float32", "ds_configs/cpu.json"), ("bfloat16", "ds_configs/zero3.json")
    assert decided(tmp_path, on_gpu=False) == on_cpu and decided(tmp_path, on_gpu=True) == on_gpu
    for accelerator, expected in (("cpu", on_cpu), ("cuda", on_gpu)):  # what DeepSpeed itself obeys
        monkeypatch.setenv("DS_ACCELERATOR", accelerator)
        assert decided(tmp_path) == expected
    monkeypatch.delenv("DS_ACCELERATOR")
    for has_gpu, expected in ((False, on_cpu), (True, on_gpu)):
        monkeypatch.setattr("torch.cuda.is_available", lambda has_gpu=has_gpu: has_gpu)
        assert decided(tmp_path) == expected


def test_what_is_written_stays(config: Resolve) -> None:
    made = config("--model.dtype", "bfloat16", "--train.deepspeed", "zero2", "--data.packing", "blocks")
    assert (made.model.dtype, made.train.deepspeed, made.data.packing) == ("bfloat16", "zero2", "blocks")
    assert config("--model.dtype", "bfloat16").train.deepspeed == "ds_configs/cpu.json"


def test_questions_and_pairs_are_documents(config: Resolve) -> None:
    """Blocks cannot hold them, so nobody has to write it."""
    assert config("--data.forget.prompt", "q", "--data.forget.response", "a").data.packing == "documents"
    assert config("--data.retain.preferred", "b").data.packing == "documents"
    assert config().data.packing == "auto"


def test_a_resumed_run_keeps_what_it_was_given(tmp_path: Path) -> None:
    """On another machine, where something else would be chosen; what the user writes still has to agree."""
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(keys(tmp_path)))
    before = resolve(file, overrides=["--optimizer.lr", "3e-4", "--data.packing", "blocks"], on_gpu=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(before))
    now, resumes, _ = parse_command_line(["--config", str(file), "--resume"])
    assert resumes and now == before
    check_output_dir(now, resume=True)
    other = parse_command_line(["--config", str(file), "--resume", "--optimizer.lr", "1e-4"])[0]
    message = refusal(lambda: check_output_dir(other, resume=True))
    assert "optimizer.lr was 0.0003" in message and "0.0001 now" in message


def test_nothing_of_the_forget_corpus_is_held_out(config: Resolve) -> None:
    assert "data.forget.heldout" in refusal(lambda: config("--data.forget.heldout", "0.1"))
    assert "heldout" in refusal(lambda: config("--data.retain.heldout", "1.0"))
