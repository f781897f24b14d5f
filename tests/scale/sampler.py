"""Anonymous memory of the ranks of a run, by stage, as the kernel counts it: no rank takes part in the measurement.

What the kernel has moved to a swap file counts as well, so a machine with too little memory measures the same.

`python -m tests.scale.sampler FOLDER PARAMETERS_IN_MILLIONS RANKS` makes a random model of that size, runs it, and
prints a line for each stage: how far it rose, at most, above what a rank had when it began, its CPU seconds, and its
seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.schema import REPOSITORY
from pipeline.distributed.environment import free_port
from tests.scale.stages import PAUSE

VOCABULARY = 2048
# A model of so many million parameters is wide, or it would have hundreds of blocks, and trains in less memory: by
# plain SGD, with gradients added up in bf16.
WIDE = 200

# No tensor remains gathered: else a small model would be whole on every rank, as DeepSpeed's defaults allow.
ZERO3: dict[str, Any] = {
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": 2_000_000,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
        "stage3_param_persistence_threshold": 0,
    }
}


@dataclass
class Stage:
    """Bytes and seconds of the ranks that took most, above what they had at the beginning; CPU seconds of all ranks."""

    peak: int = 0
    cpu: float = 0.0
    seconds: float = 0.0


def width_of(wide: bool) -> int:
    return 2048 if wide else 512


def make_model(folder: Path, millions: float, wide: bool, texts: list[str]) -> int:
    """A random Llama in bf16 of about so many parameters, with a tokenizer; the exact number."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.conftest import byte_level_bpe

    torch.manual_seed(0)
    width = width_of(wide)
    block = 4 * width**2 + 3 * width * 3 * width + 2 * width
    layers = max(1, round((millions * 1e6 - 2 * VOCABULARY * width) / block))
    shape = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        bos_token_id=0,
        eos_token_id=0,
        max_position_embeddings=128,
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(shape)
    finally:
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="16MB")
    byte_level_bpe(texts, vocabulary=300).save_pretrained(folder)
    return model.num_parameters()


def make_run(folder: Path, millions: float, wide: bool) -> tuple[Path, int]:
    """Model, corpora and configuration of a run in `folder`; the configuration, and the number of parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [f"person {number} lives in town {number % 7} and likes number {number * number}" for number in range(32)]
    for task in ("forget", "retain"):
        (folder / f"{task}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    size = make_model(folder / "model", millions, wide, texts)
    own = {"data_types": {"grad_accum_dtype": "bf16"}} if wide else {}
    (folder / "zero3.json").write_text(json.dumps(ZERO3 | own))
    config = {
        "output": str(folder / "run"),
        "cache": str(folder / "cache"),
        "model": {"path": str(folder / "model"), "dtype": "bfloat16"},
        "data": {task: {"path": str(folder / f"{task}.jsonl"), "field": "text"} for task in ("forget", "retain")}
        | {"max_length": 16, "packing": "documents"},
        "objective": {"forget": "ga", "retain": "nll"},
        "optimizer": {"name": "sgd" if wide else "adamw", "lr": 1e-5},
        "train": {"steps": 2, "batch_size": 4, "micro_batch_size": 1, "deepspeed": str(folder / "zero3.json")},
    }
    (folder / "run.yaml").write_text(json.dumps(config))  # JSON is YAML
    return folder / "run.yaml", size


def start(ranks: int, program: list[str], log: Path) -> list[subprocess.Popen[bytes]]:
    """The ranks of `python -m PROGRAM`, as a launcher starts them."""
    port, made = free_port(), []
    for rank in range(ranks):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_SIZE": ranks, "MASTER_PORT": port}
        # One arena of malloc, which gives freed memory back: the peaks are what is in use.
        own |= {"MASTER_ADDR": "127.0.0.1", "MALLOC_ARENA_MAX": 1, "MALLOC_MMAP_THRESHOLD_": 65536}
        environment = {**os.environ, **{key: str(value) for key, value in own.items()}}
        with log.open("a") as stderr:
            command = [sys.executable, "-m", *program]
            made.append(subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=stderr, stderr=stderr))
    return made


def anonymous_bytes(process: int) -> int:
    """Resident and swapped; 0 once it has ended."""
    try:
        lines = [line.split() for line in Path(f"/proc/{process}/status").read_text().splitlines()]
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 1024 * sum(int(line[1]) for line in lines if line[0] in ("RssAnon:", "VmSwap:"))


def sample(processes: list[subprocess.Popen[bytes]], limit_s: float) -> list[list[tuple[float, int]]]:
    """(time, anonymous bytes) of each process until all have ended.

    Raises:
        AssertionError: one failed, or they took longer than `limit_s` seconds.
    """
    samples: list[list[tuple[float, int]]] = [[] for _ in processes]
    deadline = time.monotonic() + limit_s
    try:
        while any(process.poll() is None for process in processes):
            for process, own in zip(processes, samples, strict=True):
                own.append((time.time(), anonymous_bytes(process.pid)))
            assert time.monotonic() < deadline, f"no end within {limit_s:.0f} s"
            assert not any(process.poll() for process in processes), "a rank failed"
            time.sleep(0.01)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert not any(process.returncode for process in processes), "a rank failed"
    return samples


def by_stage(samples: list[list[tuple[float, int]]], marks: Path) -> dict[str, Stage]:
    found: dict[str, Stage] = {}
    for rank, own in enumerate(samples):
        lines = [line.split() for line in (marks / f"{rank}.txt").read_text().splitlines()[1:]]
        ends = [*lines[1:], None]
        for (began, cpu, name), end in zip(lines, ends, strict=True):
            if end is None:
                continue
            inside = [bytes for at, bytes in own if float(began) - 0.05 <= at < float(end[0]) - PAUSE]
            before = [bytes for at, bytes in own if at < float(began)][-1:]
            stage = found.setdefault(name, Stage())
            stage.peak = max(stage.peak, max(inside, default=0) - (before or [0])[0])
            stage.cpu += float(end[1]) - float(cpu)
            stage.seconds = max(stage.seconds, float(end[0]) - float(began) - PAUSE)
    return found


def run_stages(config: Path, ranks: int, *more: str, limit_s: float = 3600) -> dict[str, Stage]:
    """The stages of `tests.scale.stages` on so many ranks; `more` are options of `pipeline.train`.

    Raises:
        AssertionError: a rank failed; its messages are in `stages.log` beside the configuration.
    """
    marks, log = config.parent / "marks", config.parent / "stages.log"
    marks.mkdir(exist_ok=True)
    program = ["tests.scale.stages", str(marks), "--", "--config", str(config), *more]
    processes = start(ranks, program, log)
    return by_stage(sample(processes, limit_s), marks)


def main(folder: Path, millions: float, ranks: int) -> None:
    config, size = make_run(folder, millions, millions >= WIDE)
    print(f"{size / 1e6:.1f} M parameters, {2 * size / 2**20:.0f} MiB in bf16, {ranks} ranks", flush=True)
    for options in ([], ["--resume"]):
        for name, stage in run_stages(config, ranks, *options).items():
            row = f"{name:12}{stage.peak / 2**20:8.1f} MiB a rank{stage.cpu / (2 * size / 1e9):8.2f} CPU s a GB"
            row += f"{stage.seconds:8.2f} s"
            print(" ".join([row, *options]), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
