"""Who reads what: digests of weights and checksums of checkpoints are shared out, and no file is read for nothing."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipeline.errors import FatalError
from pipeline.modeling import digests as models_digests
from pipeline.zero import checkpoint
from tests.distributed import run_distributed
from tests.toy import Case, train_on_engine

FILES = {f"model-0000{n}-of-00004.safetensors": bytes([n]) * 1000 for n in range(1, 5)} | {"config.json": b"{}"}
FILES |= {"modeling_own.py": b"FACTOR = 1\n"}  # with it, the same weights are another model


def digest_twice(folder: Path, known: Path) -> None:
    from pipeline.distributed import process_group as ranks

    ranks.start()
    read: list[str] = []
    real = models_digests.file_digest
    models_digests.file_digest = lambda path: (read.append(path.name), real(path))[1]  # pyright: ignore
    model: Any = SimpleNamespace(config=SimpleNamespace(name_or_path=str(folder)))

    def digests() -> tuple[dict[str, list[Any]], list[list[str]]]:
        read.clear()
        found, everyones = models_digests.weight_digests(model, known), [[], []]
        dist.all_gather_object(everyones, list(read))
        return found, everyones

    first, everyones = digests()
    assert sorted(everyones[0] + everyones[1]) == sorted(FILES) and len(everyones[0]) == len(everyones[1]) == 3
    assert {Path(path).name: entry[2] for path, entry in first.items()} == {
        name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()
    }
    dist.barrier()
    if dist.get_rank() == 0:
        known.write_text(json.dumps(first))
    dist.barrier()
    assert digests() == (first, [[], []])

    other = folder / "model-00003-of-00004.safetensors"
    if dist.get_rank() == 0:
        state = other.stat()
        other.write_bytes(b"x" * 1000)  # as long as before
        os.utime(other, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    dist.barrier()
    changed, everyones = digests()
    assert everyones[0] + everyones[1] == [other.name]
    assert models_digests.fingerprint(model, changed) != models_digests.fingerprint(model, first)


def test_each_rank_reads_some_of_the_weights_once(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    run_distributed(digest_twice, 2, folder, tmp_path / "known.json")


def save_at(stage: int, folder: Path) -> None:
    from pipeline.distributed import process_group as ranks

    ranks.start()
    written, summed = set[str](), set[str]()
    real_save, real_sum = torch.save, checkpoint.checksum

    def save(what: Any, file: Any, *rest: Any, **more: Any) -> None:
        written.add(Path(str(file)).name)
        real_save(what, file, *rest, **more)

    def checksum(file: Path) -> list[int]:
        summed.add(file.name)
        return real_sum(file)

    def keep(engine: Any, combiner: Any, step: int) -> None:
        engine.lr_scheduler = SimpleNamespace(state_dict=dict)
        torch.save, checkpoint.checksum = save, checksum
        checkpoint.save(engine, combiner, folder, 1, keep=1, identity={})
        torch.save, checkpoint.checksum = real_save, real_sum
        engine.lr_scheduler = None

    train_on_engine(Case(zero={"stage": stage}, steps=1), between=keep)
    assert written == summed and f"own-{dist.get_rank()}.pt" in summed
    marker = json.loads((folder / "checkpoints" / "step-000001" / checkpoint.MARKER).read_text())
    assert summed <= set(marker["files"]) == {file.name for file in (folder / "checkpoints/step-000001").glob("*.pt")}


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_who_writes_a_file_of_a_checkpoint_sums_it(stage: int, tmp_path: Path) -> None:
    run_distributed(save_at, 2, stage, tmp_path)


def save_beside_one_that_stays(folder: Path) -> None:
    from pipeline.distributed import process_group as ranks

    ranks.start()

    def refuse(run: Path, keep: int) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(run))

    def keep(engine: Any, combiner: Any, step: int) -> None:
        engine.lr_scheduler = SimpleNamespace(state_dict=dict)
        checkpoint.tidy = refuse
        with pytest.raises(FatalError, match="Permission denied"):
            checkpoint.save(engine, combiner, folder, 1, keep=1, identity={})
        engine.lr_scheduler = None

    train_on_engine(Case(zero={"stage": 3}, steps=1), between=keep)


def test_an_old_checkpoint_that_cannot_be_removed_leaves_the_new_one_whole(tmp_path: Path) -> None:
    run_distributed(save_beside_one_that_stays, 1, tmp_path)
    new = checkpoint.newest(tmp_path)
    assert new is not None and new == tmp_path / "checkpoints" / "step-000001"
    files = json.loads((new / checkpoint.MARKER).read_text())["files"]
    assert files and all(checkpoint.checksum(new / name) == value for name, value in files.items())
