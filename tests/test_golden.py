"""The golden run: ten steps whose numbers stand in `golden.json`, made by the plain loop in float64.

The other comparisons make both sides anew, so what both share may drift unseen: the order of documents, the tokens,
a library's model. Here nothing is drawn or downloaded: weights and texts are formulas, a token is a byte. When a number
has to change, `python -m tests.test_golden` writes the file, and the commit says why.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests import oracle
from tests.distributed import run_distributed

FILE = Path(__file__).with_name("golden.json")
PLACES = ("harbour", "mill", "tower", "garden", "bridge")
DEEDS = ("opened", "burned", "was sold", "stood empty", "was rebuilt", "flooded", "closed")


def write_world(folder: Path) -> None:
    """`model/`, `forget.jsonl`, `retain.jsonl`: every byte follows from this function."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    for task, year in (("forget", 1900), ("retain", 1800)):
        texts = [f"The {p} {d} in {year + 7 * i + j}." for i, p in enumerate(PLACES) for j, d in enumerate(DEEDS)]
        rows = texts[: 23 if task == "forget" else 35]
        (folder / f"{task}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": 0, **{letter: number for number, letter in enumerate(letters, 1)}}
    bytes_only = Tokenizer(models.BPE(vocabulary, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    bytes_only.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="<end>", pad_token="<end>")
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=1,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    with torch.no_grad():
        for number, (name, weight) in enumerate(model.named_parameters()):
            at = torch.arange(weight.numel(), dtype=torch.float64)
            wave = torch.sin(0.7 * number + 1.3 * at + 1e-3 * at**2).reshape(weight.shape)
            weight.copy_(1 + 0.1 * wave if "norm" in name else 0.15 * wave)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


def configurations(folder: Path) -> dict[str, dict[str, Any]]:
    """Two runs of ten steps: a rule that gates on signs, and one that projects."""
    base: dict[str, Any] = {
        "cache": str(folder / "cache"),
        "seed": 11,
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "data": {task: {"path": str(folder / f"{task}.jsonl")} for task in ("forget", "retain")},
        "optimizer": {"lr": 2e-3, "eps": 1e-6, "schedule": "constant", "warmup_ratio": 0.0},
        "train": {"steps": 10, "batch_size": 8, "micro_batch_size": 2, "deepspeed": "ds_configs/cpu.json"},
    }
    base["data"] |= {"packing": "documents", "max_length": 40}
    cases = {
        "npo_sago": {"objective": {"forget": "npo", "retain": "nll"}, "synthesis": {"rule": "sago", "gamma": 0.9}},
        "ga_pcgrad": {"objective": {"forget": "ga", "retain": "nll"}, "synthesis": {"rule": "pcgrad"}},
    }
    return {name: {**base, **case, "output": str(folder / name)} for name, case in cases.items()}


def made_by_the_plain_loop(folder: Path) -> dict[str, Any]:
    """For each run: the numbers of its steps, and how far each tensor moved (norm of the change)."""
    initial = load_file(folder / "model" / "model.safetensors")
    answer = {}
    for name, config in configurations(folder).items():
        weights, records = oracle.train(config, torch.float64)
        answer[name] = {"steps": records, "moved": moved(weights, initial)}
    return answer


def moved(final: dict[str, Tensor], initial: dict[str, Tensor]) -> dict[str, float]:
    return {name: (final[name].double() - initial[name].double()).norm().item() for name in sorted(final)}


def train_all(configurations: list[dict[str, Any]]) -> None:
    from pipeline.config.deepspeed import deepspeed_config
    from pipeline.config.schema import RunConfig
    from pipeline.trainer import run

    for keys in configurations:
        config = RunConfig.model_validate(keys)
        run(config, deepspeed_config(config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("golden")
    write_world(made)
    return made


def agree(found: dict[str, float], golden: dict[str, float], rel: float, where: object) -> None:
    for name, value in golden.items():
        assert found[name] == pytest.approx(value, rel=rel, abs=rel), (where, name)


def test_the_plain_loop_still_makes_them(folder: Path) -> None:
    golden = json.loads(FILE.read_text())
    for name, made in made_by_the_plain_loop(folder).items():
        for step, (found, record) in enumerate(zip(made["steps"], golden[name]["steps"], strict=True), 1):
            agree(found, record, 1e-7, (name, step))  # roundings of float64 that ten steps have magnified
        agree(made["moved"], golden[name]["moved"], 1e-7, name)


def test_two_ranks_under_zero3_make_them(folder: Path) -> None:
    golden = json.loads(FILE.read_text())
    runs = configurations(folder)
    run_distributed(train_all, 2, list(runs.values()))
    initial = load_file(folder / "model" / "model.safetensors")
    for name, config in runs.items():
        lines = (Path(config["output"]) / "metrics.jsonl").read_text().splitlines()
        for step, (line, record) in enumerate(zip(lines, golden[name]["steps"], strict=True), 1):
            agree(json.loads(line), record, 2e-4, (name, step))
        final = load_file(Path(config["output"]) / "final" / "model.safetensors")
        agree(moved(final, initial), golden[name]["moved"], 2e-4, name)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        write_world(Path(scratch))
        FILE.write_text(json.dumps(made_by_the_plain_loop(Path(scratch)), indent=1) + "\n")
    sys.stdout.write(f"{FILE.name} is written; say in the commit why its numbers had to change\n")
