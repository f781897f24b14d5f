"""Evaluation of models that do not fit: batches found by memory, layers spread by a device map, one model at a time."""

from __future__ import annotations

import gc
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from eval import loading, run
from eval.evaluation import LoadedSuite, evaluate_all
from eval.suites import bios, corpus, scoring, sharing
from pipeline.errors import InputError
from tests.conftest import World
from tests.distributed import run_distributed

PROMPTS = ["kara lo", "mi", "ne su kato", "lora", "vi mi ne", "su", "kalo", "rane mi"]
PROBES = [{"split": "retain", "kind": "QA", "prompt": text, "answer": "mi"} for text in PROMPTS]
ZERO3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}


def load_narrow(folder: Path, rows: int, rank: int | None = None) -> tuple[Any, Any]:
    """The model on a device whose memory holds so many rows of a batch (on one rank alone, if it is given)."""
    model, tokenizer = loading.load(folder)

    def refuse(module: Any, inputs: Any, named: dict[str, Any]) -> None:
        if len(named["input_ids"]) > rows and rank in (None, sharing.rank_and_size()[0]):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    model.register_forward_pre_hook(refuse, with_kwargs=True)
    return model, tokenizer


def documents(world: World) -> list[dict[str, str]]:
    return [{"split": task, "text": text} for task in ("forget", "retain") for text in world.documents(task)[:9]]


def test_auto_finds_the_largest_batch_and_its_scores_are_those_of_that_number(world: World) -> None:
    suites = [LoadedSuite("bios", bios, PROBES), LoadedSuite("corpus", corpus, documents(world))]
    models: list[tuple[int | None, Path]] = [(1, world.folder / "model"), (2, world.folder / "tied")]
    found, _ = evaluate_all(models, suites, "auto", lambda folder: load_narrow(folder, 5))
    given, _ = evaluate_all(models, suites, 4, loading.load)
    for entry in found:
        assert [entry["suites"][name].pop("batch_size") for name in ("bios", "corpus")] == [4, 4]
    assert found == given


def test_a_number_that_does_not_fit_is_refused_with_the_remedy(world: World) -> None:
    models: list[tuple[int | None, Path]] = [(None, world.folder / "model")]
    suites = [LoadedSuite("bios", bios, PROBES)]
    with pytest.raises(InputError, match=r"bios model: .*--batch-size 8 .*Tried to allocate 2.00 GiB.*smaller"):
        evaluate_all(models, suites, 8, lambda folder: load_narrow(folder, 5))
    with pytest.raises(InputError, match=r"a single prompt .*--device-map auto"):
        evaluate_all(models, suites, "auto", lambda folder: load_narrow(folder, 0))


def evaluate_narrow(folder: Path, output: Path) -> None:
    """Memory is short on the second rank alone."""
    models: list[tuple[int | None, Path]] = [(None, folder)]
    sharing.start(sharded=False)
    entries, _ = evaluate_all(models, [LoadedSuite("bios", bios, PROBES)], "auto", lambda one: load_narrow(one, 1, 1))
    output.with_suffix(f".{dist.get_rank()}").write_text(json.dumps(entries))


def test_all_ranks_take_the_size_of_the_one_with_least_memory(world: World, tmp_path: Path) -> None:
    run_distributed(evaluate_narrow, 2, world.folder / "model", tmp_path / "found")
    found = [json.loads((tmp_path / f"found.{rank}").read_text()) for rank in (0, 1)]
    assert found[0] == found[1] and found[0][0]["suites"]["bios"].pop("batch_size") == 1
    models: list[tuple[int | None, Path]] = [(None, world.folder / "model")]
    assert found[0] == evaluate_all(models, [LoadedSuite("bios", bios, PROBES)], 1, loading.load)[0]


def test_long_prompts_come_first(world: World) -> None:
    widths: list[int] = []
    model, tokenizer = loading.load(world.folder / "model")
    model.register_forward_pre_hook(lambda *args: widths.append(args[2]["input_ids"].shape[1]), with_kwargs=True)
    answers = [(tokenizer(text).input_ids, 1) for text in world.documents("forget")]
    scoring.answer_losses(model, answers, batch_size=4, title="")
    assert widths == sorted(widths, reverse=True) and widths[0] > widths[-1]


@pytest.mark.parametrize("embeddings", ["cpu", "disk"])
def test_a_model_spread_over_devices_has_the_scores_of_a_whole_one(world: World, embeddings: str) -> None:
    """Devices of a CPU: memory, and the disk, from which accelerate reads a module when it is called."""
    places = {"model.embed_tokens": embeddings, "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu"}
    spread = loading.load(world.folder / "model", device_map={**places, "lm_head": "disk", "model.rotary_emb": "cpu"})
    assert {parameter.device.type for parameter in spread[0].parameters()} == {"cpu", "meta"}
    assert scoring.input_device(spread[0]) == torch.device("cpu")
    for module, probes in ((bios, PROBES), (corpus, documents(world))):
        whole = module.evaluate(*loading.load(world.folder / "model"), probes, batch_size=4, title="")
        assert module.evaluate(*spread, probes, batch_size=4, title="") == whole


def command(monkeypatch: pytest.MonkeyPatch, world: World, tmp_path: Path, *more: str) -> None:
    (tmp_path / "probes.jsonl").write_text("".join(json.dumps(probe) + "\n" for probe in PROBES))
    given = ["--model", world.folder / "model", "--suite", "bios", "--data", tmp_path, "--output", tmp_path / "a.json"]
    monkeypatch.setattr(sys, "argv", [*map(str, ["run.py", *given, *more])])
    run.main()


def test_the_option_reaches_the_loading_of_the_model(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.modeling import weights

    given: list[dict[str, Any]] = []
    original = weights.load_whole

    def recorded(path: Path, **options: Any) -> Any:
        assert Path(options["offload_folder"]).is_dir()
        given.append(options)
        return original(path, **options)

    monkeypatch.setattr(weights, "load_whole", recorded)
    command(monkeypatch, world, tmp_path, "--device-map", "auto", "--batch-size", "auto")
    gc.collect()
    assert given[0]["device_map"] == "auto" and not Path(given[0]["offload_folder"]).exists()
    assert json.loads((tmp_path / "a.json").read_text())["suites"]["bios"]["batch_size"] == 64  # without a GPU


@pytest.mark.parametrize(
    ("more", "ranks", "message"),
    [
        (["--batch-size", "auto", "--ds-config", "ds_configs/zero3.json"], 1, "--batch-size auto does not go with"),
        (["--device-map", "auto", "--ds-config", "ds_configs/zero3.json"], 1, "both place the weights; leave one out"),
        (["--device-map", "auto"], 2, "to one process, and there are 2; start one"),
        (["--device-map", "auto", "--suite", "probes"], 1, "does not go with suite probes"),
    ],
)
def test_options_that_contradict_each_other(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], ranks: int, message: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InputError, match=message):
        command(monkeypatch, world, tmp_path, *more)


def evaluate_trajectory(folder: Path, output: Path) -> None:
    """Parameters with a share on this rank that are in memory once a model is loaded, for each of the models."""
    counts: list[int] = []

    def load(one: Path) -> tuple[Any, Any]:
        loaded = loading.load(one, ZERO3)
        counts.append(sum(hasattr(one, "ds_tensor") for one in gc.get_objects() if isinstance(one, torch.nn.Parameter)))
        return loaded

    sharing.start(sharded=True)
    models: list[tuple[int | None, Path]] = [(step, folder / f"step-{step}") for step in (1, 2, 3)]
    evaluate_all(models, [LoadedSuite("bios", bios, PROBES[:2])], 2, load)
    output.with_suffix(f".{dist.get_rank()}").write_text(json.dumps(counts))


def test_a_sharded_trajectory_has_one_model_in_memory(world: World, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        shutil.copytree(world.folder / "model", tmp_path / f"step-{step}")
    run_distributed(evaluate_trajectory, 2, tmp_path, tmp_path / "counts", timeout=250)
    for rank in (0, 1):
        first, *others = json.loads((tmp_path / f"counts.{rank}").read_text())
        assert others == [first, first], "each further model leaves its share behind"
