"""What several files of this folder look at: rows of benchmarks, a small model that knows answers, a pretended sweep.

The model has learned some answers by heart: a score of 0 everywhere would show nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from eval import frontier
from eval.files import exit_status
from eval.reporting import sweep_report
from eval.sweep import runs
from tests.eval.pretender import RECIPE, Pretender


@pytest.fixture(scope="session")
def data() -> Path:
    """A few rows of RWKU, TOFU and MMLU, as `--data` takes them."""
    return Path(__file__).resolve().parents[1] / "data"


@pytest.fixture(scope="session")
def memorise() -> Callable[[list[str]], tuple[Any, Any]]:
    """texts -> (model, tokenizer): a Llama of 0.34 M parameters that has seen each text 45 times; no chat template."""
    import torch

    from eval import bios

    def learn(texts: list[str]) -> tuple[Any, Any]:
        tokenizer = bios.build_tokenizer(texts)
        model = bios.build_model(tokenizer, seed=0)
        rows = [torch.tensor(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        for _ in range(45):
            optimizer.zero_grad()
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
        return model.eval(), tokenizer

    return learn


@pytest.fixture
def pretender(monkeypatch: pytest.MonkeyPatch) -> Pretender:
    stub = Pretender()
    monkeypatch.setattr(runs, "call", stub)
    return stub


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`eval.frontier` in this process, on a recipe with `plain` and `sago`, into tmp_path/out; its figure is empty."""
    monkeypatch.setattr(sweep_report, "png", lambda figure: b"")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    monkeypatch.setattr(frontier, "end_on_terminate", lambda: None)  # the test runner keeps its own

    def run(*arguments: object) -> int:
        fixed = ["frontier.py", "--config", tmp_path / "recipe.yaml", "--output", tmp_path / "out"]
        monkeypatch.setattr(sys, "argv", [*map(str, [*fixed, *arguments])])
        return exit_status(frontier.main)

    return run
