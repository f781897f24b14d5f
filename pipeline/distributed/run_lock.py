"""One run at a time in a run folder: a lock of the kernel, shared by the ranks of the run."""

from __future__ import annotations

import errno
import fcntl
import logging
from pathlib import Path
from typing import IO

from pipeline.errors import InputError

log = logging.getLogger(__name__)


LOCKLESS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)  # Lustre without -o flock, NFS without lockd


class RunLock:
    """Prevents another run from using the folder while any rank of this run lives.

    The first rank acquires the lock exclusively; then all ranks share it, so that a rank that outlives the first one
    still holds it. The kernel (flock) releases it when the processes end, however they end. On NFS the server manages
    it, so it works between machines as well, unless the mount option is local_lock; after a crash of a machine it
    remains until the server has noticed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file: IO[bytes] | None = None

    def take(self) -> None:
        """Acquire the lock exclusively, on the first rank.

        Raises:
            InputError: another run holds it.
        """
        self._flock(fcntl.LOCK_EX)

    def share(self) -> None:
        """Share the lock, on every rank, after `take`.

        Raises:
            InputError: another run acquired it in between.
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
            log.warning(f"{self.folder}: its file system has no locks, so nothing prevents a second run from using it")
