"""The errors that end a run, and one line for a disk that is full or refuses a file."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class InputError(Exception):
    """Unusable input. Its text is one line that names the culprit and the remedy; the command ends with status 2."""


@contextmanager
def denied_files() -> Iterator[None]:
    """Turn a file or folder that this user may not reach into one line: each path that a user names may be such a one.

    Raises:
        InputError: in place of a PermissionError that names a file.
    """
    try:
        yield
    except PermissionError as error:
        if error.filename is None:
            raise
        text = f"{error.filename}: permission denied; name another place, or have its owner permit it"
        raise InputError(text) from error


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


# torch.save writes in C++, which gives no reason: a write fails, or the last write finds an earlier one missing.
OF_TORCH = ("PytorchStreamWriter failed writing", "unexpected pos", "iostream error")


@contextmanager
def disk_errors(path: Path, partial: Path | None = None) -> Iterator[None]:
    """Turn a failure to write `path` into one line, and remove `partial`, the unfinished files.

    Raises:
        FatalError: in place of an error of the disk. Other errors pass, also a FatalError that tells of a disk.
    """
    try:
        yield
    except Exception as error:
        cause = _of_disk(error)
        if partial is not None and (cause is not None or isinstance(error, FatalError)):
            shutil.rmtree(partial, ignore_errors=True)
        if cause is None:
            raise
        reason = "a file ends too early" if any(sign in str(cause) for sign in OF_TORCH) else shorten(cause)
        problem, remedy = f"cannot write {path} ({reason})", "Make it writable"
        if _is_full(cause):
            free = shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free / 2**20
            problem, remedy = f"{problem}; its disk has {free:.1f} MiB left", "Make room"
        raise FatalError(f"{problem}. {remedy} and give --resume: what was saved before is whole") from error


def _of_disk(error: BaseException | None) -> BaseException | None:
    """The error of a disk behind `error`, which libraries may have wrapped; None if the cause is another one."""
    while error is not None and not isinstance(error, InputError | FatalError):  # whose text may name the disk
        is_refusal = isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError)
        if is_refusal or _is_full(error):
            return error
        error = error.__cause__ or error.__context__
    return None


def _is_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in FULL
    # Errors of Rust, of C++ and of `datasets`, which checks the space first, carry no errno.
    signs = (*OF_TORCH, "Not enough disk space", *(os.strerror(number) for number in FULL))
    return any(sign in str(error) for sign in signs)


def shorten(what: object) -> str:
    """Text that fits into one line of a message."""
    return " ".join(str(what).split())[:200] or type(what).__name__


class FatalError(Exception):
    """An error that ends the run with status 1 and whose text is the whole message. It ends all ranks."""
