"""The page of a leaderboard: a table for each benchmark and target model, published rows below those of the runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from eval.reporting.pages import Block, Heading, Table, Text, as_markdown
from eval.results.metrics import SUITE_WORDS, readable
from eval.results.numbers import printed
from eval.results.paper import COLUMNS, HUB_NAMES, rows
from eval.results.stats import mean_of_known, mean_sd
from pipeline.files import Json, write_whole

INTRODUCTION = """# Leaderboard

A row is a method on a benchmark: the scores where its runs end, mean ± sd over the seeds, in [0, 1] (PrivLeak: per
cent). The order of the rows is no ranking. Methods end at different forgetting, so compare the retain scores of rows
whose forget scores are about equal ([choosing a method](../guides/choosing.md)). A table holds runs from one target
model, evaluated by one protocol on as many questions. The digest of a configuration covers every key that decides the
numbers, and the content of the run's files; runs that share it are seeds. Rows that begin with *paper* are published.

`python -m eval.leaderboard RUN` adds the run in a folder, from its `config.yaml`, `digests.json`, `metrics.jsonl` and
`evaluation.json`. It refuses a run that is not comparable, and adding a run twice changes nothing. The command writes
this page from the file `leaderboard.jsonl` beside it, which also has the environment of each run; do not edit the page.
"""


def table_of(benchmark: str, entries: Sequence[Json], published: bool) -> Table:
    """The methods of one table in the order of the entries, and the published rows if `published`."""
    columns = list(dict.fromkeys(score for entry in entries for score in entry["scores"])) or [*COLUMNS[benchmark]]
    lines = [["method", "seeds", *(readable(column) for column in columns), "steps", "configuration"]]
    methods: dict[str, list[Json]] = {}
    for entry in entries:
        methods.setdefault(entry["configuration"], []).append(entry)
    for digest, seeds in methods.items():
        names = ", ".join(str(entry["seed"]) for entry in seeds)
        found = [mean_of_known([entry["scores"].get(column) for entry in seeds]) for column in columns]
        steps = mean_sd((entry["steps"] for entry in seeds), digits=0)
        lines.append([seeds[0]["method"], names, *found, steps, f"`{digest}`"])
    for name, scores in (rows(benchmark) if published else {}).items():
        cells = [printed(scores[column]) if column in scores else "–" for column in columns]
        lines.append([name, "–", *cells, "–", "–"])
    return Table(lines)


def page_of(entries: Sequence[Json]) -> str:
    """The whole page as Markdown."""
    keys = [(benchmark, model) for benchmark, model in HUB_NAMES.items()]
    keys += sorted({(entry["benchmark"], entry["model"]) for entry in entries} - {*keys})
    blocks: list[Block] = []
    for benchmark, model in keys:
        own = [entry for entry in entries if (entry["benchmark"], entry["model"]) == (benchmark, model)]
        blocks.append(Heading(f"{SUITE_WORDS.get(benchmark, benchmark)}, {model}"))
        for suite, words in own[0]["protocol"].items() if own else ():
            counts = ", ".join(f"{name} {number:g}" for name, number in own[0]["counts"][suite].items())
            blocks.append(Text(f"{suite}: {words}. Numbers: {counts}."))
        blocks.append(table_of(benchmark, own, HUB_NAMES.get(benchmark) == model))
    return f"{INTRODUCTION}\n{as_markdown(blocks)}"


def write_board(page: Path, entries: Sequence[Json]) -> None:
    """Write the page, and the entries into the file of JSON lines beside it."""
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    write_whole(page.with_suffix(".jsonl"), lines)
    write_whole(page, page_of(entries))
