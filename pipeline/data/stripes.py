"""The table of token sequences on disk: a file for each stripe of a corpus, a large one's by several processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from pipeline.data.corpus import Row
from pipeline.data.encode import COUNTS, Counts, Encoder, TokenOptions, encoder, table_rows
from pipeline.errors import InputError
from pipeline.files import Json, whole, write_whole

STRIPE = 2**23  # characters of text in a file; another value needs another `encode.FORMAT_VERSION`
FIRST_ALONE = 4  # files that this process makes itself: to start others takes as long
MOST_PROCESSES = 64
MARKER = "complete.json"


@dataclass(frozen=True)
class Recipe:
    """How rows become a table."""

    tokenizer: PreTrainedTokenizerBase
    options: TokenOptions
    columns: Sequence[tuple[str, str]]  # names for ids and for the length of the prompt, of each text of a row

    @property
    def schema(self) -> pa.Schema:
        ids = [pa.field(name, pa.list_(pa.int32())) for name, _ in self.columns]
        prompts = [pa.field(name, pa.int32()) for _, name in self.columns]
        return pa.schema([*ids, *prompts, pa.field("key", pa.int64())])

    def write(self, rows: list[Row], encode: Encoder, file: Path) -> None:
        """The table of some rows, with what was counted in its metadata."""
        table, counts = table_rows(rows, encode, self.columns, self.options.packing)
        schema = self.schema.with_metadata({"counts": json.dumps(counts)})
        with whole(file) as unfinished, unfinished.open("wb") as target, pa.ipc.new_file(target, schema) as writer:
            writer.write_table(pa.Table.from_pylist(table, schema))


def stored_table(rows: Iterable[Row], recipe: Recipe, folder: Path) -> tuple[pa.Table, Counts]:
    """The table of all rows, memory-mapped, and what was counted; made in `folder` unless it is there.

    The files are the same however many processes, runs or machines make them, also at once. What is killed leaves
    whole files, which are not made again, and one that is not, in nobody's way.

    Raises:
        InputError: of `rows`, of which nothing stays in `folder`.
        OSError: the disk refuses a file.
        BrokenProcessPool: one of several processes was killed; the files that are whole stay.
    """
    marker = folder / MARKER
    if not _is_whole(folder):
        folder.mkdir(parents=True, exist_ok=True)  # another machine of this run, or another run, may be writing there
        try:
            number = _make_files(rows, recipe, folder)
        except InputError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        write_whole(marker, json.dumps({"files": number}))
    files: Json = json.loads(marker.read_text(encoding="utf-8"))
    counts: Counts = {name: 0 for name in COUNTS}
    tables = [recipe.schema.empty_table()]
    for number in range(files["files"]):
        table = pa.ipc.open_file(pa.memory_map(str(_file(folder, number)))).read_all()
        tables.append(table.replace_schema_metadata(None))
        for name, value in json.loads(table.schema.metadata[b"counts"]).items():
            counts[name] += value
    return pa.concat_tables(tables), counts


def _is_whole(folder: Path) -> bool:
    """Whether the marker and all files are there; removes files that are not whole, as a failing disk leaves them."""
    marker = folder / MARKER
    if not marker.exists():
        return False
    files: Json = json.loads(marker.read_text(encoding="utf-8"))
    lost = []
    for file in (_file(folder, number) for number in range(files["files"])):
        try:
            pa.ipc.open_file(pa.memory_map(str(file)))
        except (FileNotFoundError, pa.ArrowInvalid):
            file.unlink(missing_ok=True)
            lost.append(file)
    return not lost


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.arrow"


def _make_files(rows: Iterable[Row], recipe: Recipe, folder: Path) -> int:
    """Write the files that are missing; returns how many there are."""
    number = 0
    with _workers(recipe) as workers:
        for stripe in stripes(rows):
            if not _file(folder, number).exists():
                workers.write(stripe, _file(folder, number), alone=number < FIRST_ALONE)
            number += 1
        workers.wait()
    return number


def stripes(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """The rows in lists of STRIPE characters or a little more."""
    stripe, size = [], 0
    for row in rows:
        stripe.append(row)
        size += len(row.prompt or "") + sum(map(len, row.texts))
        if size >= STRIPE:
            yield stripe
            stripe, size = [], 0
    if stripe:
        yield stripe


class _Workers:
    """Processes that write files of a table; none before one is needed."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.number = num_processes()
        # The class of a tokenizer that came with a model cannot be imported in another process.
        self.can_share = self.number > 1 and type(recipe.tokenizer).__module__.startswith("transformers.")
        self.encode = encoder(recipe.tokenizer, recipe.options)
        self.pool: ProcessPoolExecutor | None = None
        self.pending: deque[Future[None]] = deque()

    def write(self, rows: list[Row], file: Path, *, alone: bool) -> None:
        if alone or not self.can_share:
            self.recipe.write(rows, self.encode, file)
            return
        if self.pool is None:  # not forked: this process has threads of torch and of the tokenizer
            initial = (self.recipe, os.getpid())
            self.pool = ProcessPoolExecutor(self.number, get_context("spawn"), _begin, initial)
        self.pending.append(self.pool.submit(_write, rows, file))
        if len(self.pending) > 2 * self.number:  # more would be the corpus in memory
            self.pending.popleft().result()

    def wait(self) -> None:
        while self.pending:
            self.pending.popleft().result()


@contextmanager
def _workers(recipe: Recipe) -> Iterator[_Workers]:
    workers = _Workers(recipe)
    try:
        yield workers
    finally:
        if workers.pool is not None:
            workers.pool.shutdown(cancel_futures=True)


def num_processes() -> int:
    """The cores of this process; the other ranks of the machine wait meanwhile."""
    return min(len(os.sched_getaffinity(0)), MOST_PROCESSES)


_OWN: list[tuple[Recipe, Encoder]] = []  # of a process that writes files


def _begin(recipe: Recipe, parent: int) -> None:
    """In a process of `_Workers`: it ends with its parent, also if that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all; the parent ends the others
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores already
    _OWN[:] = [(recipe, encoder(recipe.tokenizer, recipe.options))]

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _write(rows: list[Row], file: Path) -> None:
    recipe, encode = _OWN[0]
    recipe.write(rows, encode, file)
