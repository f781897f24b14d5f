"""Tokens come from the cache when nothing that decides them has changed, and only then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pipeline.data.tokenize import Sequences, tokenizer_digest
from tests.conftest import World
from tests.pipeline.data.corpora import (
    CHAT,
    DOCUMENTS,
    END,
    KARA,
    LOVI,
    ROWS,
    WHO,
    chat,
    labelled,
    tokens,
    truncated,
    words,
    write,
)


def test_unchanged_text_is_tokenised_once(read: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "corpus.jsonl", DOCUMENTS)
    keys = [{}, {"packing": "blocks", "max_length": 4}]
    first = [tokens(read(path, **key)) for key in keys]
    moved = tmp_path / "elsewhere.jsonl"
    shutil.copy(path, moved)

    def again(*_: Any, **__: Any) -> Any:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", again)
    for file in (path, moved):
        assert [tokens(read(file, **key)) for key in keys] == first
    read(path, packing="blocks", max_length=6)  # blocks of another length are cut from the same stream
    with pytest.raises(Exception, match=r"."):
        read(path, cache=tmp_path / "other")  # proves that the tripwire works


def test_what_changes_the_tokens_is_not_answered_from_the_cache(
    read: Any, tokenizer: PreTrainedTokenizerBase, world: World, tmp_path: Path
) -> None:
    path = tmp_path / "corpus.jsonl"
    rows = [{"text": f"kara {number}", "other": f"lovi {number}"} for number in range(5)]

    def save() -> None:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    save()
    read(path)
    assert tokens(read(path, "other")) == truncated(tokenizer, [row["other"] for row in rows])
    assert tokens(read(path, max_length=3)) == truncated(tokenizer, [row["text"] for row in rows], 3)
    rows[2]["text"] = "mara 2"  # the same length, perhaps within the same second
    save()
    assert tokens(read(path)) == truncated(tokenizer, [row["text"] for row in rows])
    upper = AutoTokenizer.from_pretrained(world.folder / "model")
    upper.backend_tokenizer.post_processor = TemplateProcessing(
        single="<end> $A", special_tokens=[("<end>", upper.eos_token_id)]
    )
    assert tokens(read(path, tokenizer=upper)) == truncated(upper, [row["text"] for row in rows])


def test_another_end_of_text_token_is_another_stream(read: Any, world: World, tmp_path: Path) -> None:
    """A base model and its chat version often share the tokenizer file and differ in this token alone."""
    path = write(tmp_path / "corpus.jsonl", DOCUMENTS)
    first = AutoTokenizer.from_pretrained(world.folder / "model")
    second = AutoTokenizer.from_pretrained(world.folder / "model")
    second.eos_token = "ka" if "ka" in second.get_vocab() else "k"
    assert first.eos_token_id != second.eos_token_id
    read(path, packing="blocks", max_length=4, tokenizer=first)
    blocks = np.concatenate(tokens(read(path, packing="blocks", max_length=4, tokenizer=second)))
    length = len(second(DOCUMENTS[0]).input_ids)
    assert blocks[length] == second.eos_token_id


def test_the_same_bytes_in_another_format_are_another_text(
    read: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = write(tmp_path / "corpus.jsonl", DOCUMENTS)
    read(path)
    lines = path.read_text().splitlines()
    path = path.rename(tmp_path / "corpus.txt")
    assert tokens(read(path)) == truncated(tokenizer, lines)


def test_every_way_to_read_a_file_has_its_own_digest_and_tokens(ask: Any, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("unknown\nlovi\n")
    (tmp_path / "two.txt").write_text("unknown\npoet\n")
    text = {"prompt": None, "response": None}
    ways: list[dict[str, Any]] = [
        {},
        {"prompt": "said", "response": "asked"},
        {"prompt": "better"},
        {"response": "better"},
        {"field": "asked", **text},
        {"field": "better", **text, "max_length": 49},
        {"pairing": "preferred", "preferred": "better"},
        {"pairing": "preferred", "preferred": "better", "prompt": "said", "response": "asked"},
        {"pairing": "preferred", "preferred": "better", "field": "asked", **text},
        {"pairing": "refusal"},
        {"pairing": "refusal", "refusals": str(tmp_path / "one.txt")},
        {"pairing": "refusal", "refusals": str(tmp_path / "two.txt")},
    ]
    rows = [{name: f"{cell} a a" for name, cell in row.items()} for row in ROWS]

    def sides(cache: str, way: dict[str, Any]) -> list[Sequences]:
        return [side for side in ask(rows, cache=tmp_path / cache, **way) if side is not None]

    def everything(of: list[Sequences]) -> list[Any]:
        return [labelled(side) for side in of]

    shared = [sides("shared", way) for way in ways]
    again = [sides("shared", way) for way in ways]
    for number, (first, second, way) in enumerate(zip(shared, again, ways, strict=True)):
        fresh = sides(f"fresh{number}", way)
        assert everything(first) == everything(second) == everything(fresh)
        assert [side.digest for side in first] == [side.digest for side in second] == [side.digest for side in fresh]
    digests = [side.digest for way in shared for side in way]
    assert len(set(digests)) == len(digests) == 18
    unread = [sides("shared", {"preferred": "better"}), sides("shared", {"refusals": str(tmp_path / "one.txt")})]
    assert [side[0].digest for side in unread] == [shared[0][0].digest] * 2  # named, but not asked for


def test_another_chat_template_is_another_conversation(ask: Any) -> None:
    one, other = words(CHAT), words(CHAT.replace("assistant ", "assistant : "))
    beginning = words("{{ bos_token }} " + CHAT)
    beginning.bos_token = "lovi"
    for tokenizer in (words(), one, other, beginning):
        ask(tokenizer=tokenizer)
    assert ask(tokenizer=one)[0][1].tolist() == [*chat(WHO), LOVI, END]
    assert ask(tokenizer=beginning)[0][1].tolist() == [LOVI, *chat(WHO), LOVI, END]
    beginning.bos_token = "kara"  # the template is the same, what it writes is not
    assert ask(tokenizer=beginning)[0][1].tolist() == [KARA, *chat(WHO), LOVI, END]
    assert len({tokenizer_digest(tokenizer) for tokenizer in (words(), one, other, beginning)}) == 4
