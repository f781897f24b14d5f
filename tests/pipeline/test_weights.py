"""Weights come whole from their files, and go back under the names that they came with, whatever the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from pipeline import ranks
from pipeline.config import InputError, Model
from pipeline.model import export, load_model
from tests.conftest import World
from tests.distributed import run_distributed
from tests.kinds import KINDS, LAYOUTS, make_kind

STAGES = {
    stage: {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}, "bf16": {"enabled": False}}
    for stage in (2, 3)
}


def named(folder: Path) -> Model:
    return Model.model_validate({"path": str(folder), "dtype": "float32"})


# -- names -------------------------------------------------------------------------------------------------------------


def export_all(folder: Path, tokenizer: str) -> None:
    """On every rank: what was loaded under each stage, exported again."""
    ranks.start()
    for name in (*KINDS, *LAYOUTS):
        for stage, zero in STAGES.items():
            model = load_model(named(folder / name), zero)
            export(model, AutoTokenizer.from_pretrained(tokenizer), folder / f"{name}-{stage}")


@pytest.fixture(scope="module")
def exported(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kinds")
    for name in (*KINDS, *LAYOUTS):
        make_kind(name, folder / name)
    run_distributed(export_all, 2, folder, str(world.folder / "model"))
    return folder


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", [*KINDS, *LAYOUTS])
def test_an_export_has_the_names_and_tensors_of_its_source(name: str, stage: int, exported: Path) -> None:
    source, made = (load_file(exported / each / "model.safetensors") for each in (name, f"{name}-{stage}"))
    assert set(made) == set(source)
    assert all(made[name].equal(tensor) for name, tensor in source.items())
