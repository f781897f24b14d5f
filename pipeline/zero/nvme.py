"""Check the folder that DeepSpeed offloads to: no other run uses it, and it can be read and written."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.ops.op_builder import AsyncIOBuilder  # pyright: ignore[reportAttributeAccessIssue]

from pipeline.errors import InputError


def check_nvme_path(folder: Path) -> None:
    """Lock `folder` for this run, and write and read there as DeepSpeed will.

    DeepSpeed's module for that is compiled on first use, which takes minutes. It does not check the result of a
    transfer, so nobody would notice a disk that refuses its requests; and it gives two runs' files the same names.

    Raises:
        InputError: there is no such folder, another run uses it, it does not return what was written, or there is no
            compiler.
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
