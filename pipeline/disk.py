"""Disks: what one that is full says, and the folder that DeepSpeed offloads to."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch
import torch.distributed as dist
from deepspeed.ops.op_builder import AsyncIOBuilder  # pyright: ignore[reportAttributeAccessIssue]

from pipeline import ranks
from pipeline.config import InputError

log = logging.getLogger(__name__)

LOCKLESS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)  # Lustre without -o flock, NFS without lockd
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# torch.save writes in C++, which gives no reason: a write fails, or what is written at the end then finds it missing.
OF_TORCH = ("PytorchStreamWriter failed writing", "unexpected pos", "iostream error")


@contextmanager
def writing(path: Path, partial: Path | None = None) -> Iterator[None]:
    """What a disk that does not take `path` says, in one line; `partial`, what was written of it, is removed.

    Raises:
        ranks.Failure: in place of an error of the disk. Others pass.
    """
    try:
        yield
    except Exception as error:
        cause = _of_disk(error)
        if cause is None:
            raise
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        reason = "a file ends too early" if any(sign in str(cause) for sign in OF_TORCH) else shorten(cause)
        told, remedy = f"cannot write {path} ({reason})", "Make it writable"
        if _is_full(cause):
            free = shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free / 2**20
            told, remedy = f"{told}; its disk has {free:.1f} MiB left", "Make room"
        raise ranks.Failure(f"{told}. {remedy} and give --resume: what was saved before is whole") from error


def _of_disk(error: BaseException | None) -> BaseException | None:
    """The refusal of a disk that led to `error`, which libraries wrap; None if it was something else."""
    while error is not None and not isinstance(error, InputError):
        is_refusal = isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError)
        if is_refusal or _is_full(error):
            return error
        error = error.__cause__ or error.__context__
    return None


def _is_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in FULL
    # Rust, C++ and `datasets`, which looks before it writes, have no errno for us.
    signs = (*OF_TORCH, "Not enough disk space", *(os.strerror(number) for number in FULL))
    return any(sign in str(error) for sign in signs)


def shorten(what: object) -> str:
    """For one line of a message."""
    return " ".join(str(what).split())[:200] or type(what).__name__


class RunLock:
    """Keeps the folder of a run from another run while any rank of this one lives.

    The first rank takes it alone; then all ranks share it, so that ranks which outlive the first one still hold it. The
    lock is the kernel's (flock): it ends with the processes, however they end. On NFS the server keeps it, so it holds
    between machines as well, unless the mount says local_lock; after a machine crashed, until the server has noticed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file: IO[bytes] | None = None

    def take(self) -> None:
        """Of the first rank.

        Raises:
            InputError: another run has it.
        """
        self._flock(fcntl.LOCK_EX)

    def share(self) -> None:
        """Of every rank, after `take`.

        Raises:
            InputError: another run came between.
        """
        self._flock(fcntl.LOCK_SH)

    def release(self) -> None:
        if self.file is not None:
            self.file.close()

    def _flock(self, kind: int) -> None:
        try:
            if self.file is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.file = (self.folder / ".run.lock").open("a+b")  # NFS shares a lock of a readable file only
            fcntl.flock(self.file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"output: {self.folder} is in use by another run, or by a rank that outlived one; wait for it, end it, "
                "or name another folder"
            ) from None
        except OSError as error:
            if error.errno not in LOCKLESS:
                raise
            log.warning(f"{self.folder}: its file system has no locks, so nothing keeps a second run from it")


def try_disk(folder: Path) -> None:
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
