"""A finished run, made by hand."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from eval.files import write_jsonl
from pipeline.config.load import resolve, to_yaml
from tests.conftest import World
from tests.eval.attacks.lamps import CHOICE, FORGET, RETAIN


@pytest.fixture
def run(world: World, tmp_path: Path) -> Path:
    """A finished run whose `final/` is a model that knows nothing, with a set of choices about what it forgot."""
    for name, rows in (("forget", FORGET), ("retain", RETAIN), ("choice", CHOICE)):
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    corpora = {name: {"path": str(tmp_path / f"{name}.jsonl"), "prompt": "q"} for name in ("forget", "retain")}
    choice = {"path": str(tmp_path / "choice.jsonl"), "prompt": "q", "choices": "c", "answer": "right"}
    data = {
        "max_length": 64,
        **{name: {**keys, "response": "a"} for name, keys in corpora.items()},
        "probes": {"choice": choice},
    }
    file = world.write(tmp_path / "recipe.yaml", tmp_path / "run", data=data, train={"batch_size": 4})
    shutil.copytree(world.folder / "model", tmp_path / "run" / "final")
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(resolve(file)))
    return tmp_path / "run"
