"""The page of `eval.reproduce`: a table of the paper with each row measured here, and the paper's below it."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from eval.reporting import tables
from eval.reporting.pages import Block, Code, Table, Text, as_markdown
from eval.results.metrics import SUITE_WORDS, readable, suite_of
from eval.results.numbers import printed
from eval.results.paper import COLUMNS, PRESETS, RECIPES, TABLE_1, TARGETS, rows
from eval.results.trajectories import Run, Scores, read_run, read_target
from pipeline.files import write_whole

Measured = dict[str, list[Scores]]  # row of the paper -> the last scores of each seed


def title_of(column: str, suite: str) -> str:
    """The score of a column in words; one that several parts have, with its part."""
    return readable(column) if suite_of(column) == suite else f"{readable(column)} ({SUITE_WORDS[suite]})"


def read_part(folder: Path) -> tuple[Measured, list[Run]]:
    """What the runs of a part measured at their end, and these runs; raises InputError for a malformed file."""
    found: Measured = {}
    runs = []
    target = read_target(folder / "target.json") if (folder / "target.json").is_file() else None
    if target is not None:
        found["target"] = [target]
    for row, preset in PRESETS.items():
        of_row = [read_run(file.parent) for file in sorted(folder.glob(f"runs/{preset}/*/seed-*/evaluation.json"))]
        if of_row:
            found[row] = [run.trajectory[-1] for run in of_row]
        runs += of_row
    return found, runs


def table_of(parts: dict[str, Measured]) -> list[list[str]]:
    """A row of the paper's table as measured here (mean ± sd over seeds), and below it the paper's; a dash for none."""
    columns = [(suite, column) for suite in parts for column in COLUMNS[suite]]
    published = {suite: rows(suite) for suite in parts}
    table = [["row", *(title_of(column, suite) for suite, column in columns)]]
    for row in TABLE_1:
        theirs = {suite: published[suite].get(f"paper, Table 1: {row}", {}) for suite in parts}
        if not any(theirs.values()):
            continue
        table.append([row, *(tables.cells(parts[suite].get(row, []), [column])[0] for suite, column in columns)])
        values = [theirs[suite].get(column) for suite, column in columns]
        table.append(["paper's", *("–" if value is None else printed(value) for value in values)])
    return table


def write_table(output: Path) -> list[list[str]]:
    """Write OUTPUT/table1.md from the runs that are there; returns its table."""
    parts: dict[str, Measured] = {}
    models: list[str] = []
    for suite in RECIPES:
        if (output / suite).is_dir():
            parts[suite], runs = read_part(output / suite)
            steps = ", ".join(map(str, sorted({len(run.steps) for run in runs})))
            begun = ", ".join(sorted({run.model for run in runs}))
            made = f"{len(runs)} runs of {steps} steps from {begun}" if runs else "no run"
            models.append(f"{SUITE_WORDS[suite]}: {made} (the paper's: {TARGETS[suite]})")
    table = table_of(parts)
    blocks: list[Block] = [
        Text(
            "Scores in [0, 1] where a run ends, mean ± sd over its seeds; a row of the paper stands below each. The "
            "paper has one seed and tuned its rows to about equal forgetting, so compare the forget scores of two rows "
            "before their retain scores. With other models, steps or questions than the paper's the numbers are not "
            "comparable."
        ),
        *(Text(words) for words in models),
        Table(table),
        Text("PART/report/index.html compares the rows of a part at matched forgetting, with curves and commands."),
        Code(shlex.join(["python", "-m", "eval.reproduce", *sys.argv[1:]])),
    ]
    write_whole(output / "table1.md", f"# Table 1 of the SAGO paper, measured here\n\n{as_markdown(blocks)}")
    return table
