"""An export in several files by several ranks: what `save_pretrained` writes, all of it or nothing."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.config.schema import Lora, Model
from pipeline.distributed import process_group
from pipeline.errors import FatalError
from pipeline.modeling import export as exporting
from pipeline.modeling.load import load_model
from tests.conftest import World
from tests.distributed import run_distributed
from tests.kinds import make_kind

STAGES = {
    stage: {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}, "bf16": {"enabled": False}}
    for stage in (2, 3)
}
BYTES = 30_000  # of a file: the models below have 50 to 150 kB
ADAPTERS = Lora.model_validate({"r": 2, "alpha": 3.0, "merge": True})


def model_of(folder: Path, **options: Any) -> Model:
    return Model.model_validate({"path": str(folder), "dtype": "float32", **options})


def export_in_parts(folder: Path) -> None:
    """On every rank: each model under each stage; which rank wrote what and when, and when it was renamed."""
    process_group.start()
    rank, fsync, replace, save = dist.get_rank(), os.fsync, os.replace, exporting.save_file
    events: list[tuple[float, int, str, str]] = []

    def noting_fsync(handle: int) -> None:
        fsync(handle)
        events.append((time.monotonic(), rank, "synced", os.readlink(f"/proc/self/fd/{handle}")))

    def noting_replace(source: Path, target: Path) -> None:
        events.append((time.monotonic(), rank, "renamed", f"{source} {target}"))
        replace(source, target)

    def noting_save(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
        save(tensors, file, metadata=metadata)
        events.append((time.monotonic(), rank, "written", str(file)))

    os.fsync, os.replace, exporting.save_file = noting_fsync, noting_replace, noting_save
    tokenizer = AutoTokenizer.from_pretrained(folder / "llama")
    for name in ("llama", "tied", "mixtral"):
        for stage, zero in STAGES.items():
            model = load_model(model_of(folder / name), zero)
            exporting.export(model, tokenizer, folder / f"{name}-{stage}", max_bytes=BYTES)
    model = load_model(model_of(folder / "llama", lora=ADAPTERS.model_dump()), STAGES[3])
    seen: dict[str, Tensor] = {}  # adapters that change something, the same on all ranks
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                torch.manual_seed(len(seen))
                parameter.data.normal_()
                seen[name] = parameter.detach().clone()
    exporting.export(model, tokenizer, folder / "merged", ADAPTERS, max_bytes=BYTES)
    if rank == 0:
        torch.save(seen, folder / "adapters.pt")
    (folder / f"events-{rank}.json").write_text(json.dumps(events))


@pytest.fixture(scope="module")
def exported(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    make_kind("mixtral", folder / "mixtral")
    for name, source in (("llama", "model"), ("tied", "tied")):
        os.symlink(world.folder / source, folder / name)
    run_distributed(export_in_parts, 2, folder)
    return folder


def weights_of(folder: Path) -> dict[str, Tensor]:
    """By the index, as every reader goes."""
    places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    files = {name: load_file(folder / name) for name in set(places.values())}
    assert sorted(places) == sorted(name for tensors in files.values() for name in tensors)
    return {name: files[file][name] for name, file in places.items()}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["llama", "tied"])
def test_the_files_are_those_of_save_pretrained(name: str, stage: int, exported: Path, tmp_path: Path) -> None:
    """Byte by byte: names, division, metadata, index, configuration."""
    AutoModelForCausalLM.from_pretrained(exported / name).save_pretrained(tmp_path, max_shard_size=BYTES)
    made = exported / f"{name}-{stage}"
    files = {file.name for file in tmp_path.iterdir()}
    assert len(files) >= 5 and files <= {file.name for file in made.iterdir()}
    for file in files:
        assert (made / file).read_bytes() == (tmp_path / file).read_bytes(), file


@pytest.mark.parametrize("stage", STAGES)
def test_experts_are_split_as_the_files_have_them(stage: int, exported: Path) -> None:
    source, made = load_file(exported / "mixtral" / "model.safetensors"), weights_of(exported / f"mixtral-{stage}")
    assert set(made) == set(source) and all(made[name].equal(tensor) for name, tensor in source.items())
    model: Any = AutoModelForCausalLM.from_pretrained(exported / f"mixtral-{stage}")
    assert isinstance(model, transformers.MixtralForCausalLM)


def test_adapters_are_merged_while_their_layer_is_gathered(exported: Path) -> None:
    """Against W + alpha / r B A, from the model's own file."""
    expected = load_file(exported / "llama" / "model.safetensors")
    adapters = torch.load(exported / "adapters.pt")
    for name, b in adapters.items():
        if "lora_B" in name:
            a = adapters[name.replace("lora_B", "lora_A")]
            expected[name.replace("lora_B.default.", "")] += 3.0 / 2 * b @ a
    made = weights_of(exported / "merged")
    assert set(made) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(made[name], tensor, rtol=0, atol=1e-6)


def test_ranks_take_turns_and_the_name_comes_last(exported: Path) -> None:
    events = [event for rank in (0, 1) for event in json.loads((exported / f"events-{rank}.json").read_text())]
    for name in ("llama-3", "mixtral-2", "merged"):
        (renamed,) = [event for event in events if event[2] == "renamed" and event[3].endswith(f" {exported / name}")]
        unfinished = renamed[3].split()[0]
        written = {Path(place): (at, rank) for at, rank, what, place in events if what == "written"}
        mine = {file.name: found for file, found in written.items() if str(file.parent) == unfinished}
        assert {rank for _, rank in mine.values()} == {0, 1}
        for number, file in enumerate(sorted(mine)):
            assert mine[file][1] == number % 2, file
            synced = [e for e in events if e[2] == "synced" and e[1] == number % 2 and e[3] == f"{unfinished}/{file}"]
            assert synced and mine[file][0] < synced[0][0] < renamed[0]
        assert {file.name for file in (exported / name).glob("*.safetensors")} == set(mine)


def fail_on_one_rank(folder: Path, work: Path) -> None:
    process_group.start()
    rank, save = dist.get_rank(), exporting.save_file
    tokenizer = AutoTokenizer.from_pretrained(folder / "llama")
    model = load_model(model_of(folder / "llama"), STAGES[3])
    target = work / "export"
    exporting.export(model, tokenizer, target, max_bytes=BYTES)
    before = {file.name: file.stat().st_mtime_ns for file in target.iterdir()}

    def full(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
        if rank == 1 and "00004-of" in file.name:
            raise OSError(28, "No space left on device", str(file))
        save(tensors, file, metadata=metadata)

    exporting.save_file = full
    with pytest.raises(FatalError) as caught:
        exporting.export(model, tokenizer, target, max_bytes=BYTES)
    (work / f"error-{rank}").write_text(str(caught.value))
    dist.barrier()
    assert {file.name: file.stat().st_mtime_ns for file in target.iterdir()} == before
    assert not list(work.glob(".*")), "something half written is left"
    dist.barrier()
    exporting.save_file = save
    exporting.export(model, tokenizer, target, max_bytes=BYTES)  # in place of the one before
    dist.barrier()
    assert {file.name for file in target.iterdir()} == set(before) and not list(work.glob(".*"))


def test_a_full_disk_of_one_rank_is_one_error_of_all(exported: Path, tmp_path: Path) -> None:
    run_distributed(fail_on_one_rank, 2, exported, tmp_path)
    (text,) = {(tmp_path / f"error-{rank}").read_text() for rank in (0, 1)}
    assert text.startswith(f"cannot write {tmp_path / 'export'} (") and "Make room and give --resume" in text
    assert text.count("cannot write") == 1


def no_folder(folder: Path, work: Path) -> None:
    process_group.start()
    tokenizer = AutoTokenizer.from_pretrained(folder / "llama")
    model = load_model(model_of(folder / "llama"), STAGES[2])
    for target in (work / "a file" / "export", work / "a file" / "exports" / "step"):
        with pytest.raises(FatalError) as caught:
            exporting.export(model, tokenizer, target)
        assert str(caught.value).startswith(f"cannot write {target} ("), caught.value
    dist.barrier()


def test_a_folder_that_cannot_be_made_is_one_error_of_all(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("where a folder is to be")
    run_distributed(no_folder, 2, exported, tmp_path, timeout=60)
