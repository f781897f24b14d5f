"""A real pretrained model: `launch/smollm2.sh` makes it, it knows what it should, and training on it is exact."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.config.schema import REPOSITORY
from tests.eval.suites import test_harness_tasks as tasks

pytestmark = pytest.mark.slow  # 90 MB of download, and minutes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("smollm2") / "model"
    done = subprocess.run(
        ["bash", "launch/smollm2.sh", str(output)], cwd=REPOSITORY, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "134,515,008 parameters" in done.stdout
    return output


def test_the_model_is_the_published_one(folder: Path) -> None:
    """Size and shape as the model card has them; it answers in its chat template; nothing half written is left."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert (model.config.num_hidden_layers, model.config.hidden_size, model.config.vocab_size) == (30, 576, 49_152)
    assert model.config.tie_word_embeddings and not hasattr(model.config, "quantization_config")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        answer = model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, ids["input_ids"].shape[1] :])
    assert not [path for path in folder.parent.iterdir() if path != folder]


def test_what_is_there_is_not_made_again(folder: Path, tmp_path: Path) -> None:
    before = (folder / "model.safetensors").stat().st_mtime
    again = subprocess.run(["bash", "launch/smollm2.sh", str(folder)], cwd=REPOSITORY, capture_output=True, text=True)
    assert again.returncode == 0 and (folder / "model.safetensors").stat().st_mtime == before
    (tmp_path / "other").mkdir()
    other = subprocess.run(
        ["bash", "launch/smollm2.sh", str(tmp_path / "other")], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert other.returncode == 2 and "holds no model" in other.stderr


def test_tasks_score_as_by_the_command_line_of_the_harness(folder: Path, tmp_path: Path) -> None:
    """Four tasks, one of each kind of request, and a group: every digit."""
    tasks.write_tasks(tmp_path, REPOSITORY / "tests" / "data")
    named = ["--tasks", *tasks.NAMES]
    theirs = ["-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={folder},dtype=float32", *named]
    theirs += ["--include_path", "tasks", "--batch_size", "8", "--device", "cpu", "--output_path", "theirs"]
    ours = ["-m", "eval.run", "--model", str(folder), "--suite", "lm_eval", *named, "--tasks-dir", "tasks"]
    ours += ["--batch-size", "8", "--output", "ours.json"]
    for command in (theirs, ours):
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            timeout=3600,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    (file,) = (tmp_path / "theirs").rglob("results_*.json")
    scores = json.loads((tmp_path / "ours.json").read_text())["suites"]["lm_eval"]["metrics"]
    pairs = tasks.pairs_of(scores, json.loads(file.read_text())["results"])
    assert [one for one, _ in pairs] == [other for _, other in pairs]
    assert scores["both"]["arc_easy"]["acc"] > 0.25  # it is better than guessing
