"""The files of a checkpoint are written when DeepSpeed waits for nobody, and read without a second copy in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import run_distributed
from tests.toy import Case, train_on_engine, weights_of

CASES = {
    "zero3": Case(zero={"stage": 3}),
    "zero3, sub-groups": Case(zero={"stage": 3, "sub_group_size": 60}),
    "zero2": Case(zero={"stage": 2}, dtype="bfloat16", config={"data_types": {"grad_accum_dtype": "fp32"}}),
    "none": Case(),
}


def mapped_addresses(file: Path) -> list[tuple[int, int]]:
    """Where this process has `file` in its address space, as the kernel says."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in lines if line.endswith(str(file))]
    return [(int(first, 16), int(last, 16)) for first, last in spans]


def base_of(engine: Any) -> torch.optim.Optimizer:
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def state_of(engine: Any) -> list[Tensor]:
    states = base_of(engine).state.values()
    return [value for state in states for value in state.values() if isinstance(value, Tensor)]


def give_schedule(engine: Any, _: Any = None) -> None:
    """One that changes nothing: a checkpoint has the state of a schedule."""
    engine.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(base_of(engine), lambda step: 1.0)


def save_and_load(folder: Path) -> None:
    """On every rank: before step 2 of each case all is saved and loaded; then the weights are as without that."""
    import torch.distributed as dist

    from pipeline.distributed import process_group
    from pipeline.zero import checkpoint

    process_group.start()
    load = torch.load
    for name, case in CASES.items():
        run, mapped = folder / name, []

        def noting_load(file: Any, *rest: Any, mapped: list[bool] = mapped, **options: Any) -> Any:
            mapped.append(options.get("mmap") is True)
            return load(file, *rest, **options)

        def between(engine: Any, combiner: Any, step: int, run: Path = run, mapped: list[bool] = mapped) -> None:
            if step != 2:
                return
            save_files = engine.save_checkpoint

            def noting_save(place: str, **options: Any) -> Any:
                done = save_files(place, **options)
                dist.barrier()
                assert not list(Path(place).rglob("*.pt")), "DeepSpeed has written a file, and its barriers wait"
                return done

            engine.save_checkpoint = noting_save
            checkpoint.save(engine, combiner, run, step, keep=1, identity={})
            before = [value.clone() for value in state_of(engine)]
            torch.load = noting_load
            assert checkpoint.load(engine, combiner, run / "checkpoints" / "step-000002", {}) == 2
            torch.load = load
            assert mapped and all(mapped)
            after = state_of(engine)
            assert len(after) == len(before) > 0 and all(map(torch.equal, after, before))
            spans = [span for file in run.rglob("*.pt") for span in mapped_addresses(file)]
            for value in [*after, *weights_of(engine.module).values()]:
                assert not any(first <= value.data_ptr() < last for first, last in spans), "state lies in a file"

        cut = train_on_engine(case, give_schedule, between)["weights"]
        whole = train_on_engine(case)["weights"]
        assert all(torch.equal(cut[key], tensor) for key, tensor in whole.items()), name


def test_files_are_written_after_the_barriers_and_read_from_their_place(tmp_path: Path) -> None:
    run_distributed(save_and_load, 2, tmp_path)


def test_a_full_disk_of_one_rank_ends_all(tmp_path: Path) -> None:
    run_distributed(fill_the_disk, 2, tmp_path)


def fill_the_disk(run: Path) -> None:
    import torch.distributed as dist

    from pipeline.distributed import process_group
    from pipeline.errors import FatalError
    from pipeline.zero import checkpoint

    process_group.start()
    save = torch.save

    def full(content: Any, path: Any) -> None:
        if dist.get_rank() == 1:
            raise OSError(28, "No space left on device", str(path))
        save(content, path)

    def between(engine: Any, combiner: Any, step: int) -> None:
        if step == 1:
            torch.save = full
            with pytest.raises(FatalError, match=r"cannot write .*step-000001 \(.*Make room"):
                checkpoint.save(engine, combiner, run, step, keep=1, identity={})
            dist.barrier()
            assert not list(run.rglob("step-*")), "half a checkpoint takes the room"
            torch.save = save

    train_on_engine(CASES["zero3"], give_schedule, between)
