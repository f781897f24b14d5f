"""Disks: what one that is full says, and the folder that DeepSpeed offloads to."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class InputError(Exception):
    """Unusable input. Its text is one line that names the culprit and the remedy; the command ends with status 2."""


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


# torch.save writes in C++, which gives no reason: a write fails, or what is written at the end then finds it missing.
OF_TORCH = ("PytorchStreamWriter failed writing", "unexpected pos", "iostream error")


@contextmanager
def disk_errors(path: Path, partial: Path | None = None) -> Iterator[None]:
    """What a disk that does not take `path` says, in one line; `partial`, what was written of it, is removed.

    Raises:
        Failure: in place of an error of the disk. Others pass.
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
        raise FatalError(f"{told}. {remedy} and give --resume: what was saved before is whole") from error


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


class FatalError(Exception):
    """What a run can end with whose text is all there is to say; status 1. The rank that meets it takes all along."""
