"""A picture of a terminal: run a command under a pseudo-terminal, and write what stands there in the end as SVG.

    python docs/terminal.py FILE.svg COMMAND [ARGUMENT ...]

The terminal has COLUMNS columns and as many rows as it needs. What a line was before it was redrawn is not in the
picture. `rich`, which comes with transformers, draws it; the picture loads no font from elsewhere.
"""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import shlex
import struct
import sys
import termios
from pathlib import Path

from rich.ansi import AnsiDecoder
from rich.console import Console
from rich.terminal_theme import SVG_EXPORT_THEME

COLUMNS, ROWS = 118, 40


def output_of(command: list[str]) -> str:
    """What a command writes to its terminal, on both streams; raises SystemExit if it fails."""
    child, terminal = pty.fork()
    if child == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))  # before anything looks at it
        size = {"COLUMNS", "LINES"}  # of the terminal that starts this
        environment = {key: value for key, value in os.environ.items() if key not in size}
        os.execvpe(command[0], command, environment | {"TERM": "xterm-256color"})
    written = bytearray()
    while True:
        try:
            read = os.read(terminal, 65536)
        except OSError:  # how Linux reports that the last process has closed the terminal
            break
        if not read:
            break
        written += read
        os.write(1, read)  # so that the command can be watched
    if status := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise SystemExit(f"error: {shlex.join(command)} ended with {status}; no picture was made")
    return written.decode(errors="replace")


def redrawn(line: str) -> str:
    """A line after each carriage return in it, behind which the next text covers what was there (escapes count too)."""
    shown = ""
    for part in line.split("\r"):
        shown = part + shown[len(part) :]
    return shown.rstrip()


def svg_of(output: str, title: str) -> str:
    """The terminal after `output`: each line as it was drawn last; a long one goes on in the next row."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    for line in AnsiDecoder().decode("\n".join(map(redrawn, re.split(r"\r*\n", output.rstrip())))):
        for row in line.divide(range(COLUMNS, len(line), COLUMNS)):
            console.print(row, overflow="crop", no_wrap=True)
    drawn = console.export_svg(title=title, theme=SVG_EXPORT_THEME)
    return re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL)


def main() -> None:
    if len(sys.argv) < 3:
        raise SystemExit("usage: python docs/terminal.py FILE.svg COMMAND [ARGUMENT ...]")
    picture, *command = sys.argv[1:]
    title = shlex.join(command)
    Path(picture).write_text(svg_of(output_of(command), title), encoding="utf-8")


if __name__ == "__main__":
    main()
