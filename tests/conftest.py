"""Small real models and corpora, made by code: no download."""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks share the cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


# Files that take longest, in seconds of a processor: they begin first, so that neither of two processes has to wait for
# the other at the end. All others follow in the order of their names.
LONGEST = (
    *("pipeline/zero/test_sharded.py", "pipeline/zero/test_stages.py", "pipeline/modeling/test_load.py"),
    *("pipeline/zero/test_checkpoint.py", "pipeline/zero/test_half_precision.py", "pipeline/zero/test_reshard.py"),
    *("pipeline/planning/test_device_check.py", "pipeline/zero/test_combiner.py", "pipeline/zero/test_joint.py"),
    *("test_recipes.py", "test_bad_input.py", "eval/test_robustness.py", "eval/test_own_corpus.py"),
    *("test_extending.py", "test_launchers.py", "pipeline/test_run.py"),
)


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):  # of pytest-xdist, which would begin with the files of most tests
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {Path(__file__).parent / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


GPUS = 8  # of the pretended machine


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """visible -> a machine with GPUS GPUs, of which CUDA_VISIBLE_DEVICES names some; None: the variable is not set."""
    import torch

    def pretend(visible: str | None, gpus: int = GPUS) -> None:
        monkeypatch.delenv("DS_ACCELERATOR", raising=False)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        count = gpus if visible is None else len([name for name in visible.split(",") if name])
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)

    return pretend


@dataclass(frozen=True)
class World:
    """A folder with `model/` (tiny Llama and tokenizer), `tied/` (the same with tied embeddings) and two corpora."""

    folder: Path

    def documents(self, task: str) -> list[str]:
        lines = (self.folder / f"{task}.jsonl").read_text().splitlines()
        return [json.loads(line)["text"] for line in lines]

    def configuration(self, output: Path | str, **sections: Any) -> dict[str, Any]:
        """Keys of a short two-task run; `sections` are merged over them, section by section."""
        base: dict[str, Any] = {
            "output": str(output),
            "cache": str(self.folder / "cache"),
            "model": {"path": str(self.folder / "model"), "dtype": "float32"},
            "data": {
                "max_length": 24,
                "packing": "documents",
                "long_documents": "truncate",  # a sequence for each document, as most tests count them
                "forget": {"path": str(self.folder / "forget.jsonl")},
                "retain": {"path": str(self.folder / "retain.jsonl")},
            },
            "objective": {"forget": "ga", "retain": "nll"},
            "synthesis": {"rule": "sago"},
            "optimizer": {"lr": 1e-3, "schedule": "constant", "warmup_ratio": 0.0},
            "train": {"steps": 4, "batch_size": 12, "micro_batch_size": 2, "deepspeed": "ds_configs/cpu.json"},
        }
        for section, keys in sections.items():
            base[section] = {**base[section], **keys} if isinstance(keys, dict) else keys
        return base

    def write(self, file: Path, output: Path | str, **sections: Any) -> Path:
        file.write_text(yaml.safe_dump(self.configuration(output, **sections)))
        return file


def byte_level_bpe(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer trained on the texts, with an end-of-text token and without a beginning."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    bpe.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<end>"],  # pyright: ignore[reportCallIssue]
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # pyright: ignore[reportCallIssue]
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>", pad_token="<end>")


def processor_seconds() -> float:
    """Of the processes that this one started and waited for; other programs on the machine hardly change it."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("world")
    dice = random.Random(0)
    words = [f"{a}{b}" for a in ("ka", "lo", "mi", "ne", "su") for b in ("ra", "to", "vi", "", "den")]
    corpora = {
        task: [" ".join(dice.choices(words, k=dice.randint(3, 20))) for _ in range(size)]
        for task, size in (("forget", 31), ("retain", 40))
    }
    for task, documents in corpora.items():
        (folder / f"{task}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    tokenizer = byte_level_bpe(corpora["forget"] + corpora["retain"], vocabulary=300)
    for name, tied in (("model", False), ("tied", True)):
        torch.manual_seed(0)
        shape = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
            bos_token_id=0,
            eos_token_id=0,
        )
        LlamaForCausalLM(shape).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return World(folder)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of SmolLM2-135M-Instruct, a real pretrained model: for tests marked slow, because it is downloaded."""
    from pipeline.config.schema import REPOSITORY

    output = tmp_path_factory.mktemp("smollm2") / "model"
    done = subprocess.run(
        ["bash", "launch/smollm2.sh", str(output)], cwd=REPOSITORY, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "134,515,008 parameters" in done.stdout
    return output
