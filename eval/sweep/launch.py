"""For commands that start other commands: overrides behind `--`, the log, and the lock of a folder."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.distributed.run_lock import LOCKLESS
from pipeline.errors import InputError


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """(the arguments of the command itself, the overrides for training behind `--`)."""
    border = list(arguments).index("--") if "--" in arguments else len(arguments)
    return list(arguments[:border]), tuple(arguments[border + 1 :])


def refuse_overrides(overrides: Sequence[str], keys: Collection[str], reason: str) -> None:
    """Raise InputError, which gives the `reason`, for an override of one of the `keys`."""
    for token in overrides:
        key = token.removeprefix("--").partition("=")[0]
        if token.startswith("--") and key in keys:
            raise InputError(f"override {token}: {key} is decided {reason}; take it out from behind --")


def call(line: Sequence[str], log: Path) -> int:
    """Run a command with stdout in `log`.out and stderr in `log`.err; returns its exit status.

    The command leads a process group of its own, so that whatever ends this process also ends the ranks. It inherits
    the lock of the folder (`exclusive_lock`), the only inheritable file here.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{log}.out", "wb") as out, open(f"{log}.err", "wb") as err:
        process = subprocess.Popen(
            line, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True, close_fds=False
        )
        try:
            return process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=20)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # a rank in a collective does not react to the first
            raise


def end_on_terminate() -> None:
    """Make SIGTERM an exception, so that `call` ends the ranks."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def last_error(log: Path) -> str:
    """The line that explains a failure: the last `error: …` of this program's commands, else the last of stderr."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["nothing on stderr"])[-1].removeprefix("error: ")


@contextmanager
def exclusive_lock(folder: Path, command: str) -> Iterator[None]:
    """Lock the folder against a second `command`, also while a training outlives a `kill -9` of this process."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{folder} is in use by another {command} or by a training that outlived one; wait, or end it"
            ) from None
        except OSError as error:
            if error.errno not in LOCKLESS:
                raise
            reason = f"its file system has no locks, so nothing prevents a second {command} from using it"
            print(f"warning: {folder}: {reason}", file=sys.stderr)
        os.set_inheritable(lock.fileno(), True)
        yield
