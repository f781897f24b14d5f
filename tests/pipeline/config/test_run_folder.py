"""What identifies a run, and what a resumed run may change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.run_folder import check_output_dir, run_fingerprint
from pipeline.config.schema import RunConfig
from tests.pipeline.config.base import Resolve, refusal


def test_an_output_that_holds_a_run_is_refused(tmp_path: Path, config: Resolve) -> None:
    def check(output: Path, resume: bool = False) -> None:
        check_output_dir(config(output=str(output)), resume)

    for resume in (False, True):  # a job script may always say --resume
        check(tmp_path / "new", resume)
        check(tmp_path, resume)  # a folder without a run will do
    (tmp_path / "note.txt").touch()
    before = [*tmp_path.iterdir()]
    assert "is a file" in refusal(lambda: check(tmp_path / "note.txt"))
    for output, place in ((tmp_path / "note.txt" / "run", tmp_path / "note.txt"), (Path("/proc/new/run"), "/proc")):
        said = refusal(lambda output=output: check(output))
        assert f"output: {output} cannot be written, because of {place} (" in said and "name a folder elsewhere" in said
    assert [*tmp_path.iterdir()] == before, "nothing is left of the attempt"
    for name in ("config.yaml", "metrics.jsonl", "final"):
        folder = tmp_path / f"with-{name}"
        folder.mkdir()
        (folder / name).touch()
        assert str(folder) in refusal(lambda folder=folder: check(folder))


def test_what_a_resumed_run_may_have_otherwise(tmp_path: Path, config: Resolve) -> None:
    def made(**train: Any) -> RunConfig:
        return config(output=str(tmp_path / "run"), train=train)

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(made().model_dump()))
    free = {
        "micro_batch_size": 2, "checkpoint_every": 7, "keep_checkpoints": 5, "timeout_minutes": 1.5, "export_every": 3,
        "max_skipped": 2, "deepspeed": "moved/zero3.json",
    }  # fmt: skip
    check_output_dir(made(**free), resume=True)
    (tmp_path / "run").rename(tmp_path / "moved")
    moved = config(output=str(tmp_path / "moved"), cache=str(tmp_path / "cache"), train=free)
    check_output_dir(moved, resume=True)
    (tmp_path / "moved").rename(tmp_path / "run")
    assert "train.batch_size" in refusal(lambda: check_output_dir(made(**free, batch_size=64), resume=True))
    zero: dict[str, Any] = {"zero_optimization": {"stage": 2}}
    assert run_fingerprint(made(), zero) == run_fingerprint(made(**free), zero)
    assert run_fingerprint(made(), zero) != run_fingerprint(made(batch_size=64), zero)


def test_what_a_resumed_run_reads_may_have_moved(tmp_path: Path, config: Resolve) -> None:
    """The old files are gone; whether the content is the same is the checkpoint's to say, by digests."""
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    (tmp_path / "run").mkdir()
    old.touch()
    here = {"output": str(tmp_path / "run"), "data": {"forget": {"path": str(old)}, "retain": {"path": str(old)}}}
    before = config(**here)
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(before.model_dump()))
    old.rename(new)
    corpora = {"forget": {"path": str(new)}, "retain": {"path": str(new)}}
    synthesis = {"layer_geometry_every": 3, "update_geometry": False, "stash_device": "host"}
    changed = {"synthesis": synthesis, "data": corpora}
    now = config(**{**here, **changed, "model": {"path": "elsewhere", "gradient_checkpointing": True}}).model_copy(
        update={"method": "b"}
    )
    check_output_dir(now, resume=True)
    zero = {"zero_optimization": {"stage": 3}}
    assert run_fingerprint(before, zero) == run_fingerprint(now, zero)
    for other in ({"model": {"torch_compile": True}}, {"seed": 1}, {"synthesis": {"gamma": 2.0}}):
        assert run_fingerprint(before, zero) != run_fingerprint(config(**{**here, "data": corpora, **other}), zero)


@pytest.mark.parametrize(
    ("changed", "decides"),
    [
        ({"zero_optimization": {"stage": 2}}, True),
        ({"zero_optimization": {"stage": 3, "sub_group_size": 10}}, True),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, True),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}, True),
        ({"communication_data_type": "bf16"}, True),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, True),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": 10, "overlap_comm": False}}, False),
        ({"csv_monitor": {"enabled": True}, "wall_clock_breakdown": True, "train_micro_batch_size_per_gpu": 1}, False),
    ],
)
def test_the_keys_of_a_deepspeed_file_decide_and_not_its_name(
    changed: dict[str, Any], decides: bool, config: Resolve
) -> None:
    zero = {"zero_optimization": {"stage": 3}}
    same = run_fingerprint(config(), zero) == run_fingerprint(config(), {**zero, **changed})
    assert same is not decides


@pytest.mark.parametrize(("before", "now"), [(None, {"r": 4}), ({"r": 4}, None), ({"r": 4}, {"r": 8})])
def test_a_run_is_not_resumed_with_other_adapters(before: Any, now: Any, tmp_path: Path, config: Resolve) -> None:
    def made(lora: Any) -> RunConfig:
        return config(output=str(tmp_path / "run"), model={"lora": lora})

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(made(before).model_dump()))
    check_output_dir(made(before), resume=True)
    assert "model.lora" in refusal(lambda: check_output_dir(made(now), resume=True))
