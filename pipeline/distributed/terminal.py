"""Whether a stream is a terminal on which a line can be redrawn. Imports nothing heavy."""

from __future__ import annotations

import os
from typing import TextIO


def can_redraw(stream: TextIO) -> bool:
    """A terminal whose width is known: some (of editors, of CI, `ssh -T`) report 0 columns, and a bar has no room."""
    if not stream.isatty():
        return False
    try:
        return os.get_terminal_size(stream.fileno()).columns > 0
    except OSError:
        return False
