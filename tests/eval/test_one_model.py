"""While a run's exports are evaluated, one model is alive at a time, whole or sharded: by references and by memory."""

from __future__ import annotations

import gc
import json
import sys
import weakref
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from eval import placement, run
from eval.files import write_jsonl
from tests.conftest import World
from tests.distributed import run_distributed

NUM_EXPORTS = 4
WHOLE_BYTES = 192 * 2**20  # large beside what a process gains and loses otherwise
SHARDED_BYTES = 24 * 2**20  # models are counted, no memory is
WIDTH = 512
ZERO3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}


def make_exports(world: World, folder: Path, size: int) -> None:
    """`run/`: four exports of about `size` bytes, which are one file under four names."""
    tokenizer = AutoTokenizer.from_pretrained(world.folder / "model")
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=size // (4 * 4 * 3 * WIDTH) - WIDTH,  # 4 bytes, 4 blocks, 3 tensors of the MLP
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    first = folder / "run" / "exports" / "step-000001"
    LlamaForCausalLM(shape).save_pretrained(first)
    tokenizer.save_pretrained(first)
    for step in range(2, NUM_EXPORTS + 1):
        other = first.with_name(f"step-{step:06d}")
        other.mkdir()
        for file in first.iterdir():
            (other / file.name).symlink_to(file)
    write_jsonl(folder / "run" / "metrics.jsonl", [{"step": step} for step in range(1, NUM_EXPORTS + 1)])
    write_jsonl(folder / "probes.jsonl", [{"split": "retain", "kind": "QA", "prompt": "kara lo", "answer": "mi"}] * 2)
    quiz = {"question": "Which?", "choices": ["ka", "lo", "mi", "ne"], "answer": 1}
    (folder / "wmdp").mkdir()
    write_jsonl(folder / "wmdp" / "wmdp_bio.jsonl", [quiz, {**quiz, "question": "Who?"}])
    (folder / "zero3.json").write_text(json.dumps(ZERO3))


def evaluate_watched(exports: Path, sharded: bool) -> None:
    """The command. After each loading: how many models are alive, and how many bytes the process has."""
    load, models, alive, sizes = placement.load, [], [], []

    def watched(*arguments: Any, **options: Any) -> tuple[Any, Any]:
        model, tokenizer = load(*arguments, **options)
        models.append(weakref.ref(model))
        alive.append(sum(reference() is not None for reference in models))
        sizes.append(psutil.Process().memory_info().rss)
        return model, tokenizer

    placement.load = watched
    gc.disable()  # what is freed by chance, on some later allocation, is not freed in time
    more = ["--ds-config", exports / "zero3.json"] if sharded else []
    given = ["--model", exports / "run", "--data", exports, "--output", exports / f"answer-{sharded}.json", *more]
    sys.argv = ["run.py", *map(str, given), "--suite", "bios", "wmdp_bio"]
    run.main()
    assert alive == [1] * NUM_EXPORTS, alive
    if sharded:  # the resident size moves by more than a share of a model between exports, either way: no bound here
        return
    growth = [(size - sizes[0]) / WHOLE_BYTES for size in sizes]
    print(f"growth since the first model, in models: {[round(one, 3) for one in growth]}", flush=True)
    # The first model also brings libraries and the allocator's reserve; later ones bring nothing.
    assert growth[-1] - growth[1] < 0.3, growth


@pytest.mark.parametrize("sharded", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_ranks_hold_one_model_at_a_time(sharded: bool, world: World, tmp_path: Path) -> None:
    make_exports(world, tmp_path, SHARDED_BYTES if sharded else WHOLE_BYTES)
    run_distributed(evaluate_watched, 2, tmp_path, sharded)
    assert len(json.loads((tmp_path / f"answer-{sharded}.json").read_text())["trajectory"]) == NUM_EXPORTS
