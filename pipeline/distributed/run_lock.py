"""One run at a time in a run folder: a lock of the kernel's, shared by the run's ranks."""

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
