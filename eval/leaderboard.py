"""Add evaluated runs to a leaderboard: a page of tables, and a file of JSON lines beside it.

    python -m eval.leaderboard RUN [RUN …] [--file PAGE.md]

Each RUN is a finished run folder with `evaluation.json`. A run becomes a row, or another seed of a row, in the table of
its benchmark and its target model, with the protocol of the evaluation and the digest of the configuration. A run that
is not comparable with its table is refused, and then nothing is written; a run that is there already changes nothing.
Exit status: 0 done, 2 unusable input.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from eval.files import exit_status
from eval.reporting.leaderboard import write_board
from eval.results.leaderboard import added, entries_of, read_board
from pipeline.errors import InputError

PAGE = Path("docs/results/leaderboard.md")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.leaderboard", description="Add runs to a leaderboard.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="finished run folders, evaluated")
    parser.add_argument("--file", type=Path, default=PAGE, metavar="PAGE.md", help=f"the page (default {PAGE})")
    arguments = parser.parse_args()
    page = arguments.file
    if page.suffix != ".md" or not page.parent.is_dir():
        raise InputError(f"--file {page}: name a page that ends in .md, in a folder that exists")
    entries = read_board(page.with_suffix(".jsonl"))
    for folder in arguments.runs:
        for new in entries_of(folder):
            before, entries = len(entries), added(entries, new, str(folder))
            done = "added" if len(entries) > before else "there already"
            print(f"{folder}: {new['method']} seed {new['seed']}, {new['benchmark']} on {new['model']}: {done}")
    write_board(page, entries)
    print(f"read {page}")


if __name__ == "__main__":
    sys.exit(exit_status(main))
