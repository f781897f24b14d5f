"""A large corpus is tokenised by several processes, in files of which those that are whole are not made again."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pipeline.config.sources import Corpus
from pipeline.data import stripes
from pipeline.data.encode import TokenOptions
from pipeline.data.tokenize import tokenize
from pipeline.errors import FatalError
from tests.conftest import World

TEXTS = [f"kara lovi {'mito ' * (number % 9)}number {number}" for number in range(60)] + [""]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return file


def ids_of(world: World, corpus: Path, cache: Path, **options: Any) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(world.folder / "model")
    wanted = TokenOptions(**{"max_length": 12, "packing": "documents", **options})
    source = Corpus.model_validate({"path": str(corpus), "field": "text"})
    made, _ = tokenize(source, "forget", tokenizer, wanted, cache=cache, show_progress=False)
    assert made.usage is not None and made.usage.documents == len(TEXTS)
    return [list(map(int, made[number])) for number in range(len(made))]


def test_several_processes_make_the_tokens_of_one(
    world: World, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ids are those of the tokenizer, document by document; the cache has the same key and files."""
    tokenizer = AutoTokenizer.from_pretrained(world.folder / "model")
    expected = [tokenizer(text, truncation=True, max_length=12).input_ids for text in TEXTS[:-1]]
    options = {"long_documents": "truncate"}
    monkeypatch.setattr(stripes, "STRIPE", 300)
    monkeypatch.setattr(stripes, "num_processes", lambda: 1)
    assert ids_of(world, corpus, tmp_path / "one", **options) == expected
    monkeypatch.setattr(stripes, "num_processes", lambda: 2)
    monkeypatch.setattr(stripes, "FIRST_ALONE", 1)
    monkeypatch.setattr(stripes.Recipe, "write", only_in(os.getpid(), {"000000.arrow"}))
    assert ids_of(world, corpus, tmp_path / "two", **options) == expected
    files = [{f.relative_to(side): f.read_bytes() for f in side.rglob("*.arrow")} for side in each(tmp_path)]
    assert len(files[0]) > 5 and files[0] == files[1]


def each(folder: Path) -> list[Path]:
    return [folder / "one", folder / "two"]


def only_in(process: int, names: set[str]) -> Any:
    """`Recipe.write` that refuses, in this process, files of other names; others have their own."""
    write = stripes.Recipe.write

    def guarded(recipe: stripes.Recipe, rows: Any, encode: Any, file: Path) -> None:
        assert os.getpid() == process and file.name in names, file
        write(recipe, rows, encode, file)

    return guarded


def test_what_was_cut_off_is_continued(
    world: World, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stripes, "STRIPE", 300)
    monkeypatch.setattr(stripes, "num_processes", lambda: 1)
    whole = ids_of(world, corpus, tmp_path / "whole")
    write, made = stripes.Recipe.write, list[str]()

    def killed(recipe: stripes.Recipe, rows: Any, encode: Any, file: Path) -> None:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(file.name)
        write(recipe, rows, encode, file)

    monkeypatch.setattr(stripes.Recipe, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        ids_of(world, corpus, tmp_path / "cut")
    assert not list((tmp_path / "cut").rglob(stripes.MARKER))
    made.clear()
    monkeypatch.setattr(stripes.Recipe, "write", lambda *given: made.append(given[-1].name) or write(*given))
    assert ids_of(world, corpus, tmp_path / "cut") == whole
    assert min(made) == "000003.arrow"  # the three before were whole
    calls = len(made)
    monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", None)
    assert ids_of(world, corpus, tmp_path / "cut") == whole and len(made) == calls


@pytest.mark.parametrize("content", [None, b"", b"half"], ids=["purged", "empty", "cut off"])
def test_a_file_that_a_cache_has_lost_is_made_again(
    content: bytes | None, world: World, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster's scratch disk removes single files that nobody has read for a month."""
    monkeypatch.setattr(stripes, "STRIPE", 300)
    monkeypatch.setattr(stripes, "num_processes", lambda: 1)
    expected = ids_of(world, corpus, tmp_path / "cache")
    lost = sorted((tmp_path / "cache").rglob("*.arrow"))[1]
    whole = lost.read_bytes()
    lost.unlink() if content is None else lost.write_bytes(content)
    monkeypatch.setattr(stripes.Recipe, "write", only_in(os.getpid(), {lost.name}))
    assert ids_of(world, corpus, tmp_path / "cache") == expected and lost.read_bytes() == whole


def test_two_machines_that_share_a_cache_make_a_table_at_once(
    world: World, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first rank of each machine tokenises; here the other begins and ends while one is about to name a file."""
    monkeypatch.setattr(stripes, "STRIPE", 300)
    monkeypatch.setattr(stripes, "num_processes", lambda: 1)
    alone, replace, others = ids_of(world, corpus, tmp_path / "alone"), os.replace, list[list[list[int]]]()

    def overtaken(source: Path, target: Path) -> None:
        if target.name == "000001.arrow" and not others:
            others.append([])
            others[0] = ids_of(world, corpus, tmp_path / "shared")
        replace(source, target)

    monkeypatch.setattr(os, "replace", overtaken)
    assert ids_of(world, corpus, tmp_path / "shared") == alone == others[0]


def test_a_malformed_line_leaves_nothing(world: World, corpus: Path, tmp_path: Path) -> None:
    corpus.write_text(corpus.read_text() + "{\n")
    with pytest.raises(Exception, match=r"data\.forget: .*line 62"):
        ids_of(world, corpus, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.arrow"))


def end_by_kill(rows: object, file: Path) -> None:
    """`stripes._write` of a process that the kernel kills, because memory is short."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_is_an_error_that_names_the_corpus(
    world: World, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stripes, "STRIPE", 300)
    monkeypatch.setattr(stripes, "num_processes", lambda: 2)
    monkeypatch.setattr(stripes, "FIRST_ALONE", 1)
    monkeypatch.setattr(stripes, "_write", end_by_kill)
    pool = stripes.ProcessPoolExecutor
    monkeypatch.setattr(stripes, "ProcessPoolExecutor", lambda number, *begin: pool(1, *begin))  # one is enough
    with pytest.raises(FatalError, match=f"^data.forget: {corpus}: a process .* was killed.*memory.*taskset"):
        ids_of(world, corpus, tmp_path / "cache")
    assert [file.name for file in (tmp_path / "cache").rglob("*.arrow")] == ["000000.arrow"], "it is not made again"
