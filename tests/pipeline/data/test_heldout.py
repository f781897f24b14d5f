"""Documents of the retain corpus that training does not see, and the packing that a corpus gets by itself."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from pipeline.config.load import resolve
from pipeline.config.schema import Corpus
from pipeline.data.corpus import read, read_heldout
from pipeline.data.packing import choose_packing
from pipeline.data.probes import read_sets
from tests.conftest import World


def corpus(path: Path, **keys: Any) -> Corpus:
    return Corpus(**{"path": str(path), **keys})


def texts(path: Path, share: float) -> tuple[list[str], list[str]]:
    """(those of training, those held out)."""
    chosen = corpus(path, heldout=share)
    return [row.texts[0] for row in read(chosen, "retain")[0]], [row.texts[0] for row in read_heldout(chosen, "retain")]


@pytest.mark.parametrize(("lines", "share"), [(1, 0.5), (2, 0.9), (20, 0.05), (97, 0.1), (300, 0.001)])
def test_every_document_is_on_one_side(lines: int, share: float, tmp_path: Path) -> None:
    file, all_texts = tmp_path / "retain.txt", [f"line {number}" for number in range(lines)]
    file.write_text("\n".join(all_texts))
    trained, heldout = texts(file, share)
    assert sorted(trained + heldout) == sorted(all_texts)
    assert len(heldout) == min(math.ceil(share * lines), lines - 1)
    assert trained == [text for text in all_texts if text not in heldout]  # in the order of the file


def test_the_choice_depends_on_the_documents_alone(tmp_path: Path) -> None:
    """Not on their order; and duplicates, but for case and white space, are on one side."""
    file, lines = tmp_path / "retain.txt", [f"Line {number}" for number in range(40)]
    file.write_text("\n".join(lines))
    _, first = texts(file, 0.2)
    random.Random(3).shuffle(lines)
    file.write_text("\n".join([*lines, *(line.upper() for line in lines), *(f" {line}  " for line in lines)]))
    trained, heldout = texts(file, 0.2)
    assert len(first) == 8 and {text.strip().casefold() for text in heldout} == {text.casefold() for text in first}
    assert len(heldout) == 24 and not {text.strip().casefold() for text in trained} & {t.casefold() for t in first}


def test_nothing_changes_without_the_key(tmp_path: Path) -> None:
    """The digest, which keys caches and checkpoints, is another where the rows are others, and only there."""
    file = tmp_path / "retain.txt"
    file.write_text("a\nb\nc\nd\n")
    plain, share = read(corpus(file), "retain")[1], read(corpus(file, heldout=0.5), "retain")[1]
    assert plain != share and plain == read(corpus(file, heldout=0.0), "retain")[1]
    assert read_heldout(corpus(file), "retain") == []


def test_questions_are_held_out_with_their_answers(tmp_path: Path) -> None:
    file = tmp_path / "retain.jsonl"
    file.write_text("".join(json.dumps({"q": f"q{n % 5}", "a": f"a{n}"}) + "\n" for n in range(10)))
    chosen = corpus(file, prompt="q", response="a", heldout=0.3, field=None)
    rows = read_heldout(chosen, "retain")
    assert len(rows) == 3 and all(row.prompt == f"q{int(row.texts[0][1:]) % 5}" for row in rows)
    assert len(list(read(chosen, "retain")[0])) == 7


def test_probes_of_the_retain_corpus_are_of_what_is_trained(world: World, tmp_path: Path) -> None:
    """Its set `retain` would else mix documents that the model sees with some that it does not."""
    tokenizer, file = AutoTokenizer.from_pretrained(world.folder / "model"), tmp_path / "retain.txt"
    file.write_text("".join(f"{letter * 8}\n" for letter in "abcdefghij"))
    chosen = {"path": str(file), "heldout": 0.3}
    written = world.write(tmp_path / "run.yaml", tmp_path / "run", data={"retain": chosen}, train={"probe_every": 1})
    config = resolve(written)
    found = {one.name: one for one in read_sets(config, tokenizer)}["retain"]
    trained = [row.texts[0] for row in read(corpus(file, heldout=0.3), "retain")[0]]
    assert len(trained) == 7 and [tokenizer.decode(ids, skip_special_tokens=True) for ids, _ in found.sequences] == (
        [tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) for text in trained]
    )


@pytest.mark.parametrize(
    ("forget", "retain", "expected"),
    [(4, 6, "documents"), (80, 90, "blocks"), (80, 6, "documents"), (6, 80, "documents"), (33, 32, "blocks")],
)
def test_packing_by_what_the_files_hold(forget: int, retain: int, expected: str, world: World, tmp_path: Path) -> None:
    """Words of which each is one token; half of max_length 64 is 32."""
    tokenizer = AutoTokenizer.from_pretrained(world.folder / "model")
    assert len(tokenizer("x" * 5).input_ids) == 5
    corpora = {}
    for task, length in (("forget", forget), ("retain", retain)):
        (tmp_path / f"{task}.txt").write_text("\n".join(["x" * length] * 3 + ["", "  "]))
        corpora[task] = corpus(tmp_path / f"{task}.txt")
    packing, reason = choose_packing(corpora, tokenizer, 64)
    assert packing == expected
    shorter = "forget" if forget < retain else "retain"
    assert f"data.{shorter} have {min(forget, retain)} tokens" in reason and "data.max_length 64" in reason
    tokenizer.eos_token = None
    assert choose_packing(corpora, tokenizer, 64)[0] == "documents"
