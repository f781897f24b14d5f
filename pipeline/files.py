"""Files and folders that are whole or absent, whatever ends the program or the machine while they are written."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Json = dict[str, Any]  # an object of a JSON or YAML file: who reads one checks what is in it

UNFINISHED = ".unfinished"  # how the name of what is not whole ends


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A free name beside `path`, for a file or a folder that takes the place of `path` when the block ends.

    Readers, and whoever looks after a kill or a power cut, find at `path` what was there before or all that the block
    has written: it is on the disk (fsync) before the rename, and the rename is when this returns. An error in the block
    removes what it wrote; a kill leaves that, under a name for `remove_unfinished`. A folder replaces an empty one
    only: a block that replaces a full one removes it at its end, by `remove_whole`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _unfinished_name(path)
    try:
        yield unfinished
        for part in (*unfinished.rglob("*"), unfinished):
            sync(part)
        os.replace(unfinished, path)
    except BaseException:
        _remove(unfinished)
        raise
    sync(path.parent)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file by `whole`; text in UTF-8."""
    with whole(path) as unfinished:
        unfinished.write_bytes(content if isinstance(content, bytes) else content.encode())


def unwritable(place: Path) -> tuple[Path, OSError] | None:
    """What stands in the way of a file or folder at `place`, and why; None if it can be made. Leaves nothing behind.

    Raises:
        PermissionError: `place` may not even be looked at.
    """
    place = place.absolute()
    there = next(one for one in (place, *place.parents) if one.exists() and not (one == place and one.is_file()))
    try:
        with tempfile.TemporaryFile(dir=there):
            return None
    except OSError as error:
        return there, error


def remove_whole(folder: Path) -> None:
    """Remove a folder, if it exists; a kill meanwhile leaves all of it, or nothing under its name."""
    if folder.exists():
        old = _unfinished_name(folder)
        os.replace(folder, old)
        _remove(old)


def remove_unfinished(folder: Path) -> None:
    """Remove what killed writers have left in `folder`. Nobody may be writing there."""
    for left in folder.glob(f".*{UNFINISHED}"):
        _remove(left)


def sync(path: Path) -> None:
    """Return once the content of a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that has no such promise
            raise
    finally:
        os.close(handle)


def _unfinished_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{UNFINISHED}")  # two writers have two names


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
