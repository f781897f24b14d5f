"""A small model that has learned some answers by heart: a score of 0 everywhere would show nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


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
