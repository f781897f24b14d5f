"""The frozen model's log-probabilities: right, computed once, and never stale."""

from __future__ import annotations

import json
import logging
import os
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.data.batches import BatchSampler
from pipeline.data.tokenize import Sequences
from tests import oracle
from tests.conftest import World
from tests.distributed import run_distributed


def train_counting_forwards(config: dict[str, Any], report: str) -> None:
    """Run; report how many forward passes rank 0 made before its first step."""
    import torch.distributed as dist

    from pipeline.config.deepspeed import deepspeed_config
    from pipeline.config.schema import RunConfig
    from pipeline.modeling import reference
    from pipeline.trainer import run

    counts = []
    original = reference.collate

    def counting(*arguments: Any) -> Any:
        counts.append(1)
        return original(*arguments)

    reference.collate = counting
    parsed = RunConfig.model_validate(config)
    run(parsed, deepspeed_config(parsed))
    if dist.get_rank() == 0:
        Path(report).write_text(json.dumps(len(counts)))


def test_cached_once_then_reused_and_rebuilt_when_damaged_or_stale(world: World, tmp_path: Path) -> None:
    data = world.configuration("")["data"]
    own = tmp_path / "forget.jsonl"
    own.write_bytes((world.folder / "forget.jsonl").read_bytes())
    data["forget"] = {"path": str(own)}
    cache = tmp_path / "cache"

    def go(name: str, ranks: int = 2) -> int:
        config = world.configuration(
            tmp_path / name, data=data, cache=str(cache), objective={"forget": "npo"}, train={"steps": 3}
        )
        run_distributed(train_counting_forwards, ranks, config, str(tmp_path / f"{name}.json"))
        return json.loads((tmp_path / f"{name}.json").read_text())

    forwards = go("first")
    assert forwards == 8, "31 documents in micro-batches of 2 on 2 ranks"
    (file,) = (cache / "reference").iterdir()

    # what it holds is what a plain model says
    model = AutoModelForCausalLM.from_pretrained(world.folder / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(world.folder / "model")
    cached = load_file(file)["nll"].clone()  # not a view of the file, which is damaged below
    for index, text in enumerate(world.documents("forget")):
        ids = tokenizer(text, truncation=True, max_length=24).input_ids
        with torch.no_grad():
            assert cached[index].item() == pytest.approx(oracle.nll_of(model, ids).sum().item(), rel=1e-5)

    assert go("second", ranks=1) == 0, "found in the cache, also by another number of ranks"
    first, second = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("first", "second"))
    initial = load_file(world.folder / "model" / "model.safetensors")
    assert oracle.weight_change_error(second, first, initial) < 2e-4

    file.write_bytes(file.read_bytes()[:50])
    assert go("damaged") == 8
    assert torch.equal(load_file(file)["nll"], cached)

    own.write_text(own.read_text() + json.dumps({"text": "kara mivi suden"}) + "\n")
    assert go("changed") == 8, "32 documents: nothing of the old cache was used"
    assert len(list((cache / "reference").iterdir())) == 2


def test_weights_of_another_precision_have_a_cache_of_their_own(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is the same, and so is the dtype of what is computed; but weights in 4 bits are another model."""
    from pipeline.config.schema import RunConfig
    from pipeline.losses import task

    files: list[Path] = []

    def note(*_: Any, file: Path, **__: Any) -> torch.Tensor:
        files.append(file)
        return torch.zeros(1)

    monkeypatch.setattr(task, "sequence_nll", note)
    monkeypatch.setattr(task.dist, "get_rank", lambda: 0)
    sequences = Sequences(pa.chunked_array([pa.array([[0, 1]])]), 0, "text")
    sampler = BatchSampler(sequences, 0, 0, 1, 1, 0, 1, pad=0)
    adapters = {"path": str(world.folder / "model"), "lora": {"r": 2}}
    for own in ({"dtype": "float32"}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "load_in_4bit": True}):
        config = RunConfig.model_validate(
            {**world.configuration(""), "model": {**adapters, **own}, "cache": str(tmp_path)}
        )
        engine: Any = SimpleNamespace(device=torch.device("cpu"))
        task.reference_nll(config, sampler, 1, engine, {"model": "weights", "tokenizer": "words"})
    assert len(set(files)) == 3


def test_who_shares_the_cache_may_read_it(tmp_path: Path) -> None:
    """Log-probabilities as tokens, which lie beside them: by the umask. Else each user computed them anew."""
    from pipeline.modeling.reference import _load, _save

    nll, before = torch.tensor([1.5, torch.nan], dtype=torch.float64), os.umask(0o027)
    try:
        _save(nll, tmp_path / "x.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.safetensors").stat().st_mode) == 0o640
    assert torch.equal(_load(tmp_path / "x.safetensors", 2).isnan(), nll.isnan())


def test_a_damaged_cache_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from pipeline.modeling.reference import _load

    file = tmp_path / "x.safetensors"
    file.write_bytes(b"no tensors here")
    with caplog.at_level(logging.WARNING):
        assert torch.isnan(_load(file, 4)).all()
    assert str(file) in caplog.text and "damaged" in caplog.text
