"""SIGTERM: stop after the step, on all ranks."""

from __future__ import annotations

import os
import signal
import threading
import time

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: come back later


INTERRUPTED, KILLED = 130, 143  # as shells say it: 128 + SIGINT, + SIGTERM


class Preempted(Exception):
    """SIGTERM was obeyed by all ranks: the run is saved, and ends with status STOPPED."""


# Seconds in which a second SIGTERM is taken for the first: a launcher that was signalled together with its ranks, as a
# process group is, passes on to them what they had.
DUPLICATE_SIGTERM_S = 5.0


def stop_on_sigterm() -> threading.Event:
    """From now on SIGTERM sets the event that is returned; another one, ECHO later, ends the process with KILLED."""
    asked = threading.Event()
    heard, told = os.pipe()
    os.set_blocking(told, False)

    def listen() -> None:  # beside the main thread, which may wait for another rank and be deaf
        first = 0.0
        while True:
            if os.read(heard, 1)[0] != signal.SIGTERM:
                continue
            if not asked.is_set():
                first = time.monotonic()
                asked.set()
            elif time.monotonic() - first > DUPLICATE_SIGTERM_S:
                os._exit(KILLED)

    signal.signal(signal.SIGTERM, lambda number, frame: None)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    threading.Thread(target=listen, daemon=True).start()
    return asked
