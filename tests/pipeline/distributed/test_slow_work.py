"""Work that takes longer than a collective waits ends no run, as long as who works lives."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed import distributed_c10d

from pipeline.distributed import process_group, slow_work
from pipeline.distributed.errors import local_main_first, raise_on_all_ranks
from pipeline.errors import FatalError
from tests.distributed import run_distributed

LIMIT_S = 0.5  # in place of train.timeout_minutes


def work_slowly() -> None:
    process_group.start()
    rank = dist.get_rank()
    distributed_c10d.default_pg_timeout = timedelta(seconds=LIMIT_S)
    slow_work.BEAT_S = LIMIT_S / 10
    began = time.monotonic()
    with slow_work.slow_work():
        time.sleep(3 * LIMIT_S * rank)
    assert time.monotonic() - began >= 3 * LIMIT_S  # both left together, and neither was ended

    built = local_main_first(lambda: time.sleep(2 * LIMIT_S) or rank)
    assert built == rank

    began = time.monotonic()
    with pytest.raises(FatalError, match="the disk of rank 0"), raise_on_all_ranks(), slow_work.slow_work():
        if rank == 0:
            raise FatalError("the disk of rank 0")
        time.sleep(2 * LIMIT_S)
    assert time.monotonic() - began >= 2 * LIMIT_S  # nobody writes any longer when the error is known

    slow_work.BEAT_S = 100.0 if rank else LIMIT_S  # rank 1 hangs: it gives no sign of life
    dist.barrier()
    if rank:
        with slow_work.slow_work():
            time.sleep(4 * LIMIT_S)
    else:
        began = time.monotonic()
        with pytest.raises(dist.DistStoreError, match="timed out: 1 of 2 ranks"), slow_work.slow_work():
            pass
        assert LIMIT_S <= time.monotonic() - began < 4 * LIMIT_S
    dist.barrier()


def test_ranks_wait_for_slow_work_and_not_for_a_rank_that_hangs(tmp_path: Path) -> None:
    run_distributed(work_slowly, 2)
