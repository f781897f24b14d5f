"""Warnings where nothing was forgotten: a loss that rose, a text that was never known; plain lines without a width."""

from __future__ import annotations

import fcntl
import math
import os
import pty
import random
import struct
import sys
import termios
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.distributed.terminal import can_redraw
from pipeline.monitoring import console
from pipeline.monitoring.verdicts import forgetting_failed, never_known, rose
from tests.conftest import World
from tests.distributed import run_distributed


def noisy(start: float, end: float, steps: int, spread: float, seed: int) -> list[float]:
    dice = random.Random(seed)
    return [start + (end - start) * n / (steps - 1) + dice.gauss(0, spread) for n in range(steps)]


def test_a_rise_is_told_from_noise() -> None:
    """Of 300 series without a trend, 3 standard errors let a few of a thousand through, at these lengths a few more."""
    assert sum(rose(noisy(5, 5, 40, 0.5, seed)) for seed in range(300)) <= 3
    assert not any(rose(noisy(5, 4, 40, 0.5, seed)) for seed in range(300))
    assert sum(rose(noisy(5, 6, 40, 0.5, seed)) for seed in range(300)) > 150
    assert rose([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) and not rose([6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    assert not rose([1.0, 2.0]) and not rose([]) and not rose([2.0] * 9)


def test_a_forget_loss_that_rose_is_told_for_what_it_is() -> None:
    rising = [-4.0, -3.5, -3.0, -2.5, -2.0, -1.5]
    assert "likelier" in str(forgetting_failed("ga", rising)) and "-4" in str(forgetting_failed("ga", rising))
    assert "likelier" not in str(forgetting_failed("rmu", rising))
    assert forgetting_failed("ga", rising[::-1]) is None
    # -p^beta NLL at NLL 2, 4, 8, 16: wga's loss rises while the text becomes ever less likely.
    assert forgetting_failed("wga", [-math.exp(-nll) * nll for nll in (2, 3, 4, 6, 8, 16)]) is None


def test_text_that_was_never_known() -> None:
    """Measured on SmolLM2-135M: invented persons 5.9 nats a token, common facts 3.9."""
    assert "nothing to forget" in str(never_known(5.9, None)) and never_known(3.9, None) is None
    assert "objective.forget: none" in str(never_known(5.9, 5.9))  # how a model learns it first
    assert never_known(3.9, 3.9) is None and never_known(4.5, 3.9) is not None
    assert never_known(2.0, 0.2) is None  # a retain corpus known by heart says nothing about the other


def measure(keys: dict[str, Any], file: str) -> None:
    """What `nll_per_token` gives in a run that is set up, of both corpora."""
    from pipeline.config.deepspeed import deepspeed_config
    from pipeline.config.schema import RunConfig
    from pipeline.losses.known import nll_per_token
    from pipeline.trainer import setup

    config = RunConfig.model_validate(keys)
    trainer = setup(config, deepspeed_config(config))
    assert trainer is not None and trainer.forget is not None and trainer.retain is not None
    found = [nll_per_token(task.sampler, trainer.engine) for task in (trainer.forget, trainer.retain)]
    trainer.run.lock.release()
    np.savetxt(f"{file}.{trainer.engine.global_rank}", found)  # pyright: ignore[reportAttributeAccessIssue]


def test_what_is_measured_is_the_mean_over_the_first_batch(world: World, tmp_path: Path) -> None:
    """Beside one plain forward pass a document; and an untrained model gets the warning, in the log."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pipeline.data.batches import _permutation

    keys = world.configuration(tmp_path / "run")
    run_distributed(measure, 2, keys, str(tmp_path / "found"))
    model = AutoModelForCausalLM.from_pretrained(world.folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(world.folder / "model")
    for number, task in enumerate(("forget", "retain")):
        documents = world.documents(task)
        total = count = 0
        for index in _permutation(0, number, 0, len(documents))[:12]:
            ids = torch.tensor([tokenizer(documents[index]).input_ids[:24]])
            with torch.no_grad():
                total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
        for rank in (0, 1):
            assert np.loadtxt(tmp_path / f"found.{rank}")[number] == pytest.approx(total / count, rel=1e-5)
    assert "there may be nothing to forget" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize(("columns", "redraws"), [(0, False), (120, True)])
def test_a_terminal_without_a_width_gets_plain_lines(
    columns: int, redraws: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setattr(console.logger, "level", 20)
        assert can_redraw(terminal) == redraws and console.is_live() == redraws
        assert console.Progress(0, 2).bar.disable != redraws
    os.close(reader)


def test_a_file_is_no_terminal(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        assert not can_redraw(file)
