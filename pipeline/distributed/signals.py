"""SIGTERM: stop after the step, on all ranks."""

from __future__ import annotations

import os
import signal
import threading
import time

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again later


INTERRUPTED, KILLED = 130, 143  # the convention of shells: 128 + SIGINT, 128 + SIGTERM


class Preempted(Exception):
    """All ranks have stopped because of SIGTERM: the run is saved, and ends with status STOPPED."""


# A second SIGTERM within so many seconds counts as the first one: a launcher that gets the signal together with its
# ranks, as members of a process group do, sends it to them again.
DUPLICATE_SIGTERM_S = 5.0


def stop_on_sigterm() -> threading.Event:
    """Let SIGTERM set the event that is returned; one more, after DUPLICATE_SIGTERM_S, ends the process with KILLED."""
    requested = threading.Event()
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)

    def wait_for_signals() -> None:  # in a thread, because the main one may be waiting for another rank
        first = 0.0
        while True:
            if os.read(read_end, 1)[0] != signal.SIGTERM:
                continue
            if not requested.is_set():
                first = time.monotonic()
                requested.set()
            elif time.monotonic() - first > DUPLICATE_SIGTERM_S:
                os._exit(KILLED)

    signal.signal(signal.SIGTERM, lambda number, frame: None)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    threading.Thread(target=wait_for_signals, daemon=True).start()
    return requested
