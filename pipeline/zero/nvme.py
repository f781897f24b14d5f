"""The folder that DeepSpeed offloads to: free, and read and written as DeepSpeed does it."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.ops.op_builder import AsyncIOBuilder  # pyright: ignore[reportAttributeAccessIssue]

from pipeline.errors import InputError


def check_nvme_path(folder: Path) -> None:
    """Take `folder` for this run, and write and read there as DeepSpeed will.

    What DeepSpeed does that with is compiled on first use, which takes minutes. It does not look at the result of a
    transfer, so a disk that refuses its requests would go unnoticed; and it gives two runs' files the same names.

    Raises:
        InputError: no folder, another run's, one that does not give back what was written, or nothing to compile with.
    """
    file = folder / f"rank{dist.get_rank()}.lock"
    try:
        fcntl.flock(os.open(file, os.O_RDWR | os.O_CREAT, 0o600), fcntl.LOCK_EX | fcntl.LOCK_NB)  # until we end
    except BlockingIOError:
        raise InputError(f"train.deepspeed: nvme_path {folder} is in use by another run; name another folder") from None
    except OSError as error:
        raise InputError(
            f"train.deepspeed: nvme_path {folder}: {error.strerror}; name a folder on the nvme that can be written"
        ) from None
    builder = AsyncIOBuilder()
    if not builder.is_compatible(verbose=False):
        raise InputError(
            "train.deepspeed: offload to nvme needs libaio and a C++ compiler (apt-get install libaio-dev g++); "
            "or use device cpu"
        )
    handle = builder.load(verbose=False).aio_handle()
    numbers = torch.arange(256.0)  # 1 KiB, the smallest request
    buffer = handle.new_cpu_locked_tensor(256, numbers).copy_(numbers)
    right = handle.sync_pwrite(buffer, str(file), 0) == 1 and file.read_bytes() == numbers.numpy().tobytes()
    if right:
        right = handle.sync_pread(buffer.zero_(), str(file), 0) == 1 and torch.equal(buffer, numbers)
    handle.free_cpu_locked_tensor(buffer)
    if not right:
        raise InputError(
            f"train.deepspeed: nvme_path {folder}: direct reads and writes of 1 KiB fail there; name a folder on "
            "another disk, or use device cpu"
        )
