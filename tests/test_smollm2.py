"""A real pretrained model: `launch/smollm2.sh` makes it, it knows what it should, and training on it is exact."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.config.schema import REPOSITORY

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
