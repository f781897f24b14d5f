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
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.config.schema import REPOSITORY
from pipeline.distributed.environment import free_port
from tests.eval.suites import test_harness_tasks as tasks

pytestmark = pytest.mark.slow  # 90 MB of download, and minutes


def test_the_model_is_the_published_one(smollm2: Path) -> None:
    """Size and shape as the model card has them; it answers in its chat template; nothing half written is left."""
    model: Any = AutoModelForCausalLM.from_pretrained(smollm2)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert (model.config.num_hidden_layers, model.config.hidden_size, model.config.vocab_size) == (30, 576, 49_152)
    assert model.config.tie_word_embeddings and not hasattr(model.config, "quantization_config")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        answer = model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, ids["input_ids"].shape[1] :])
    assert not [path for path in smollm2.parent.iterdir() if path != smollm2]


def test_what_is_there_is_not_made_again(smollm2: Path, tmp_path: Path) -> None:
    before = (smollm2 / "model.safetensors").stat().st_mtime
    again = subprocess.run(["bash", "launch/smollm2.sh", str(smollm2)], cwd=REPOSITORY, capture_output=True, text=True)
    assert again.returncode == 0 and (smollm2 / "model.safetensors").stat().st_mtime == before
    (tmp_path / "other").mkdir()
    other = subprocess.run(
        ["bash", "launch/smollm2.sh", str(tmp_path / "other")], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert other.returncode == 2 and "holds no model" in other.stderr


def trained(smollm2: Path, output: Path, rule: str, zero: str, *, ranks: int = 1) -> dict[str, torch.Tensor]:
    """The exported weights after four steps of NPO on 2 + 2 questions of TOFU."""
    questions = {"prompt": "question", "response": "answer"}
    rows = REPOSITORY / "tests" / "data" / "tofu"
    config = {
        "output": str(output),
        "cache": str(output.parent / "cache"),
        "model": {"path": str(smollm2), "dtype": "float32"},
        "data": {
            "packing": "documents",
            "forget": {"path": str(rows / "forget01_perturbed.json"), **questions},
            "retain": {"path": str(rows / "retain_perturbed.json"), **questions},
        },
        "objective": {"forget": "npo", "retain": "nll"},
        "synthesis": {"rule": rule},
        # Plain SGD: Adam's first step is the sign of each gradient, which rounding decides where it is nearly 0. No
        # clipping: without ZeRO DeepSpeed takes the norm of a whole tensor in float32, and torch's on a CPU is off by
        # 1.6e-3 for the 28 million elements of the embedding. Of smaller steps more is lost when a weight is rounded.
        "optimizer": {"name": "sgd", "lr": 1e-3, "schedule": "constant", "warmup_ratio": 0.0, "max_grad_norm": 0.0},
        "train": {"steps": 4, "batch_size": 2, "micro_batch_size": 1, "deepspeed": zero},
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    file = output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config))
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(ranks)]
    line = [*launcher, "--master_port", str(free_port()), "--module", "pipeline.train", "--config", str(file)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return load_file(output / "final" / "model.safetensors")


@pytest.mark.parametrize("rule", ["sum", "pcgrad", "sago"])
def test_two_ranks_under_zero3_train_as_one_rank_without(rule: str, smollm2: Path, tmp_path: Path) -> None:
    """A batch has two sequences, each of which is a micro-batch, so that nothing is added up in another order.

    What remains is the last bit of a few products, from the attention of the last block on down. It decides the sign of
    a gradient that is nearly 0, where SAGO jumps: its error is that of a few elements in a million.
    """
    plain = tmp_path / "zero0.json"
    plain.write_text('{"zero_optimization": {"stage": 0}}')
    start = load_file(smollm2 / "model.safetensors")
    alone = trained(smollm2, tmp_path / "one" / "run", rule, str(plain))
    both = trained(smollm2, tmp_path / "two" / "run", rule, "zero3", ranks=2)
    change, differences = (
        torch.cat([(one[name].double() - other[name].double()).flatten() for name in one])
        for one, other in ((alone, start), (alone, both))
    )
    squares = differences.square() / change.square().sum()
    jumps = squares.topk(10_000).values.sum()
    error, rest = squares.sum().sqrt().item(), (squares.sum() - jumps).sqrt().item()
    print(f"{rule}: {error:.1e}, without 10,000 of {len(squares):,} elements {rest:.1e}")  # by pytest -s
    assert rest < 2e-5
    assert error < (2e-3 if rule == "sago" else 2e-5)


def test_tasks_score_as_by_the_command_line_of_the_harness(smollm2: Path, tmp_path: Path) -> None:
    """Four tasks, one of each kind of request, and a group: every digit."""
    tasks.write_tasks(tmp_path, REPOSITORY / "tests" / "data")
    named = ["--tasks", *tasks.NAMES]
    theirs = ["-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={smollm2},dtype=float32", *named]
    theirs += ["--include_path", "tasks", "--batch_size", "8", "--device", "cpu", "--output_path", "theirs"]
    ours = ["-m", "eval.run", "--model", str(smollm2), "--suite", "lm_eval", *named, "--tasks-dir", "tasks"]
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
