"""The pool of ranks: one process group for all calls, no trace of one call in the next, a new pool after a failure."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.conftest import LONGEST
from tests.distributed import Ranks, run_distributed


def write_own_id(folder: Path) -> None:
    from pipeline.distributed import process_group

    process_group.start()
    (folder / os.environ["RANK"]).write_text(str(os.getpid()))


def ids(folder: Path, world_size: int = 2) -> list[str]:
    run_distributed(write_own_id, world_size, folder)
    return [(folder / str(rank)).read_text() for rank in range(world_size)]


def meddle() -> None:
    """Leave behind whatever a test may change."""
    import logging
    import sys
    import warnings

    import torch
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import groups
    from transformers.models.llama.modeling_llama import LlamaMLP

    import pipeline.trainer
    from pipeline.distributed import signals
    from pipeline.monitoring import console

    torch.distributed.all_reduce = meddle  # pyright: ignore[reportAttributeAccessIssue]
    console.setup_logging(0)
    signals.stop_on_sigterm()
    os.environ |= {"RANK": "7", "LEFT": "behind"}
    os.chdir("/")
    sys.argv, sys.excepthook = ["left", "behind"], print
    warnings.simplefilter("error")
    logging.getLogger("left.behind").setLevel(logging.ERROR)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(1)
    for owner, name in ((torch, "compile"), (LlamaMLP, "forward"), (pipeline.trainer, "setup")):
        setattr(owner, name, meddle)
    get_accelerator().is_fp16_supported = meddle  # pyright: ignore[reportOptionalMemberAccess,reportAttributeAccessIssue]
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = "left behind"  # pyright: ignore[reportAttributeAccessIssue]


def look(folder: Path, file: str) -> None:
    """Write what `meddle` would have changed."""
    import logging
    import signal
    import sys
    import warnings

    import torch
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import groups
    from transformers.models.llama.modeling_llama import LlamaMLP

    import pipeline.trainer
    from pipeline.distributed import process_group

    patched = torch.distributed.all_reduce, torch.compile, LlamaMLP.forward, pipeline.trainer.setup
    seen = [
        *(function.__module__ for function in patched),
        "is_fp16_supported" in vars(get_accelerator()),
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP,
        logging.root.handlers,
        logging.getLogger("DeepSpeed").propagate,
        logging.getLogger("left.behind").level,
        signal.getsignal(signal.SIGTERM),
        dict(os.environ),
        os.getcwd(),
        sys.argv,
        sys.excepthook is sys.__excepthook__,
        warnings.filters,
        torch.rand(3),
        torch.zeros(()).dtype,
    ]
    process_group.start()
    total = torch.tensor([torch.distributed.get_rank() + 1.0])
    torch.distributed.all_reduce(total)
    assert total.item() == 3
    (folder / file).with_suffix(f".{torch.distributed.get_rank()}").write_text(repr(seen))


def test_one_call_leaves_no_trace_for_the_next(tmp_path: Path) -> None:
    ranks = Ranks(2)
    assert ranks.call(look, (tmp_path, "before"), 100) == {}
    for _ in range(2):
        assert ranks.call(meddle, (), 100) == {}
        assert ranks.call(look, (tmp_path, "after"), 100) == {}
        for rank in range(2):
            assert (tmp_path / f"after.{rank}").read_text() == (tmp_path / f"before.{rank}").read_text()
    ranks.end()


def test_the_same_ranks_serve_all_calls(tmp_path: Path) -> None:
    first = ids(tmp_path)
    assert first[0] != first[1] and ids(tmp_path) == first
    assert ids(tmp_path, 1) != first[:1]
    assert ids(tmp_path) == first


def leave_as_a_command_does() -> None:
    from pipeline.distributed import process_group

    process_group.start()
    process_group.leave(0)


def test_ranks_that_leave_with_status_0_have_done_their_work_and_are_replaced(tmp_path: Path) -> None:
    before = ids(tmp_path)
    run_distributed(leave_as_a_command_does, 2)
    assert not set(ids(tmp_path)) & set(before)


def raise_on_the_second(error: str) -> None:
    import torch.distributed as dist

    from pipeline.distributed import process_group

    process_group.start()
    if dist.get_rank() == 1:
        raise AssertionError(error)
    dist.barrier()


def end_on_the_second() -> None:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)


def hang_on_the_second() -> None:
    if os.environ["RANK"] == "1":
        time.sleep(1000)


def test_ranks_that_fail_end_or_hang_are_named_and_replaced(tmp_path: Path) -> None:
    used = set(ids(tmp_path))
    for function, arguments, message in (
        (raise_on_the_second, ("two is not three",), r"rank 1 of 2: (.|\n)*two is not three"),
        (end_on_the_second, (), "^rank 1 of 2: its process ended with exit code -9$"),
        (hang_on_the_second, (), "^rank 1 of 2: no answer within 2 s$"),
    ):
        with pytest.raises(AssertionError, match=message):
            run_distributed(function, 2, *arguments, timeout=2)
        for process in used:
            assert not Path("/proc", process).exists()
        used = set(ids(tmp_path))


def test_the_files_that_begin_first_are_there() -> None:
    assert not [name for name in LONGEST if not (Path(__file__).parent / name).is_file()]
