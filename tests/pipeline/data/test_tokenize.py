"""Documents -> sequences: truncated, split or joined into blocks, and what is counted and logged on the way."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from eval.suites.scoring import encode_document, encode_text
from pipeline.config.sources import Probe
from pipeline.data.batches import BatchSampler, collate
from pipeline.data.probes import read_set
from pipeline.data.tokenize import Sequences, log_usage, num_shared
from pipeline.errors import InputError
from pipeline.losses.task import warn_of_overlap
from tests.conftest import World
from tests.pipeline.data.corpora import (
    DOCUMENTS,
    MANY,
    ROWS,
    tokens,
    truncated,
    write,
)


def test_documents_are_what_the_tokenizer_says(read: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = write(tmp_path / "corpus.jsonl", MANY)
    for limit in (5, 30):
        sequences = read(path, max_length=limit)
        assert tokens(sequences) == truncated(tokenizer, MANY, limit)
        assert max(map(len, tokens(sequences))) <= limit
    indices = np.array([3, 0, 2099])
    assert sequences.num_predicted_tokens(indices).tolist() == [len(tokenizer(MANY[i]).input_ids) - 1 for i in indices]


def begin_with(tokenizer: PreTrainedTokenizerBase, token: str) -> None:
    """Make `token` the beginning-of-text token, which the tokenizer puts before each text, as Llama's does."""
    tokenizer.bos_token = token
    backend: Any = tokenizer.backend_tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    backend.post_processor = TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, tokenizer.convert_tokens_to_ids(token))]
    )


@pytest.mark.parametrize("begin", [False, True])
@pytest.mark.parametrize("limit", [2, 5, 12])
def test_a_long_document_is_split_and_every_token_predicted_once(
    begin: bool, limit: int, read: Any, world: World, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world.folder / "model")
    if begin:
        begin_with(tokenizer, "Q")  # which is in none of the texts
    texts = [*DOCUMENTS, "kara lovi mito nesu " * 30, "x"]
    keys = {"tokenizer": tokenizer, "long_documents": "split", "max_length": limit}
    sequences = read(write(tmp_path / "corpus.jsonl", texts), **keys)
    whole = [ids for text in texts if len(ids := tokenizer(text).input_ids) > 1]
    assert max(map(len, tokens(sequences))) <= limit
    left = tokens(sequences)
    for ids in whole:
        made: list[int] = []
        first, sizes = True, []
        while len(made) < len(ids):
            piece = left.pop(0)
            assert first or piece[0] == (ids[0] if begin else made[-1])
            made += piece if first else piece[1:]
            first, sizes = False, [*sizes, len(piece)]
        assert made == ids
        assert len(sizes) == max(-(-(len(ids) - 1) // (limit - 1)), 1) and max(sizes) - min(sizes) <= 1
    assert not left
    predicted = sequences.num_predicted_tokens(np.arange(len(sequences)))
    assert predicted.sum() == sum(len(ids) - 1 for ids in whole) and predicted.min() > 0
    assert sequences.usage is not None and sequences.usage.unused == sum(
        len(tokenizer(text).input_ids) < 2 for text in texts
    )


def test_short_documents_are_the_same_either_way(read: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "corpus.jsonl", MANY)
    assert tokens(read(path, max_length=64, long_documents="split")) == tokens(read(path, max_length=64))


def test_the_last_block_is_one_where_it_predicts_anything(
    read: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = write(tmp_path / "corpus.jsonl", ["k"] * 9)  # 18 tokens, ends among them
    joined = [tokenizer("k").input_ids[0], tokenizer.eos_token_id] * 9
    for block, number in ((4, 5), (5, 4), (17, 1), (18, 1), (40, 1), (16, 2)):
        sequences = read(path, packing="blocks", max_length=block, long_documents="split")
        assert tokens(sequences) == [joined[at : at + block] for at in range(0, 18, block)][:number]
        assert sequences.num_predicted_tokens(np.arange(number)).tolist() == [len(row) - 1 for row in tokens(sequences)]
        assert sequences.longest == min(block, 18)
    assert len(read(path, packing="blocks", max_length=4)) == 4
    batch = collate(read(path, packing="blocks", max_length=16, long_documents="split"), np.array([1, 0]), 0)
    assert batch.attention_mask.sum(1).tolist() == [2, 16]


def test_the_share_of_the_tokens_that_are_used_is_said(
    read: Any, ask: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """From the cache as well. Hand counts: two documents of 600 tokens cut at 6; 18 tokens in blocks of 5."""
    path = write(tmp_path / "long.txt", ["k " * 300, "s " * 300])
    size = len(words_of(read(path, max_length=10_000)))
    blocks = write(tmp_path / "blocks.txt", ["k"] * 9)
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (path, {"max_length": 6}, f"{1000 * 12 // size / 10:g} % of the tokens of 2 documents"),
        (path, {"max_length": 6, "long_documents": "split"}, "100 % of the tokens of 2 documents"),
        (blocks, {"packing": "blocks", "max_length": 5}, "83.3 % of the tokens of 9 documents"),
        (blocks, {"packing": "blocks", "max_length": 5, "long_documents": "split"}, "100 % of the tokens of 9"),
        (blocks, {"packing": "blocks", "max_length": 17, "long_documents": "split"}, "94.4 % of the tokens of 9"),
    ]
    for file, keys, expected in cases * 2:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            log_usage("forget", read(file, **keys), keys["max_length"], keys.get("long_documents") != "split")
        (message,) = [record.getMessage() for record in caplog.records]
        assert message.startswith(f"data.forget: {expected}"), (message, expected)
        assert ("data.long_documents: split" in message) is (keys.get("long_documents") is None)


def words_of(sequences: Sequences) -> list[int]:
    return [token for row in tokens(sequences) for token in row]


def test_empty_answers_are_counted_and_said_once(ask: Any, caplog: pytest.LogCaptureFixture) -> None:
    rows = [*ROWS, {"asked": "who", "said": " ", "better": "a"}]
    for _ in range(2):  # tokenised, and from the cache
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            log_usage("forget", ask(rows)[0], 50, False)
        assert [record.getMessage() for record in caplog.records] == [
            "data.forget contains 2 empty answers, of which only the end is predicted"
        ]


def test_documents_in_both_corpora_are_counted(read: Any, ask: Any, tmp_path: Path) -> None:
    forget = write(tmp_path / "forget.txt", ["Kara  LOVI ", "mito vi", "ne", "ﬁne mito ", "kara lovi", "x"])
    retain = write(tmp_path / "retain.jsonl", ["kara lovi", "fine mito", "mito", "vi", "ne ne"])
    for keys in ({}, {"packing": "blocks", "max_length": 4}, {"max_length": 2, "long_documents": "split"}):
        one, other = read(forget, **keys), read(retain, **keys)
        assert (num_shared(one, other), num_shared(other, one)) == (3, 2)
    asked = ask([{"asked": "who", "said": "a poet"}, {"asked": "is kara", "said": "a poet"}])[0]
    again = ask([{"asked": "Who", "said": "a  poet"}, {"asked": "is kara", "said": "a"}])[0]
    assert num_shared(asked, again) == 1  # the question and its answer


def test_an_overlap_is_said_in_one_line(read: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys: dict[str, Any] = {"seed": 1, "task": 0, "batch_size": 2, "micro_batch_size": 2, "rank": 0, "world_size": 1}
    texts = {"forget": ["kara lovi", "mito vi"], "retain": ["ne ne", "Kara  lovi"], "other": ["su su"]}
    walks = {
        name: BatchSampler(read(write(tmp_path / f"{name}.txt", some)), pad=0, **keys) for name, some in texts.items()
    }
    with caplog.at_level(logging.WARNING):
        warn_of_overlap({"forget": walks["forget"], "retain": walks["other"]})
        warn_of_overlap({"retain": walks["retain"]})
        assert not caplog.records
        warn_of_overlap({"forget": walks["forget"], "retain": walks["retain"]})
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("data.retain contains 1 document of data.forget (")


def test_one_is_counted_in_the_singular(read: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        log_usage("forget", read(write(tmp_path / "corpus.txt", ["kara lovi", "k"])), 12, False)
        log_usage("forget", read(write(tmp_path / "one.txt", ["kara lovi"])), 12, False)
    _, dropped, one = [record.getMessage() for record in caplog.records]
    assert dropped == "data.forget: the run cannot use 1 document without two tokens or more"
    assert one == "data.forget: 100 % of the tokens of 1 document are used, in 1 sequence of at most 12 tokens"


def test_tokenising_leaves_the_tokenizer_as_it_was(read: Any, world: World, tmp_path: Path) -> None:
    """It is exported with the model: neither our truncation nor the loss of the source's own."""
    path = write(tmp_path / "corpus.jsonl", DOCUMENTS)
    for number, own in enumerate((None, {"max_length": 77, "stride": 1})):
        tokenizer = AutoTokenizer.from_pretrained(world.folder / "model")
        if own is not None:
            tokenizer.backend_tokenizer.enable_truncation(**own)
            tokenizer.backend_tokenizer.enable_padding(pad_id=0, pad_token="<end>", length=9)
        tokenizer.save_pretrained(tmp_path / "before")
        for packing in ("blocks", "documents"):
            read(path, packing=packing, max_length=4, tokenizer=tokenizer, cache=tmp_path / str(number))
        tokenizer.save_pretrained(tmp_path / "after")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            assert (tmp_path / "after" / file).read_text() == (tmp_path / "before" / file).read_text()


@pytest.mark.parametrize("block", [2, 7, 64])
def test_blocks_are_cut_from_the_documents_joined_by_the_end_of_text(
    block: int, read: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    sequences = read(write(tmp_path / "corpus.jsonl", MANY), packing="blocks", max_length=block)
    joined = [token for text in MANY for token in (*tokenizer(text).input_ids, tokenizer.eos_token_id)]
    assert len(sequences) in (len(joined) // block, (len(joined) - 1) // block)  # an end after the last one, or not
    for index in (0, 1, len(sequences) // 2, len(sequences) - 1):
        assert sequences[index].tolist() == joined[index * block : (index + 1) * block]
    flat = np.concatenate([sequences[index] for index in range(len(sequences))])
    assert flat.tolist() == joined[: len(flat)]
    assert sequences.num_predicted_tokens(np.array([0, 1])).tolist() == [block - 1] * 2


def test_a_tokenizer_that_ends_documents_itself_gets_no_second_end(read: Any, world: World, tmp_path: Path) -> None:
    ending = AutoTokenizer.from_pretrained(world.folder / "model")
    ending.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", ending.eos_token_id)]
    )
    path = write(tmp_path / "corpus.jsonl", DOCUMENTS)
    blocks = np.concatenate(tokens(read(path, packing="blocks", max_length=2, tokenizer=ending)))
    joined = [token for text in DOCUMENTS for token in ending(text).input_ids]
    assert joined[-1] == ending.eos_token_id
    assert blocks.tolist() == joined[: len(blocks)] and len(joined) - len(blocks) < 2


def test_documents_that_predict_nothing_are_left_out_and_counted(
    read: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = ["k", "kara lovi", "", "s", "mito vi", "x"]
    assert [len(tokenizer(text).input_ids) for text in texts if len(text) < 2] == [1, 0, 1, 1]
    with caplog.at_level(logging.WARNING):
        sequences = read(write(tmp_path / "corpus.jsonl", texts))
        log_usage("forget", sequences, 12, False)
    assert tokens(sequences) == truncated(tokenizer, ["kara lovi", "mito vi"])
    assert any("4" in record.getMessage() and "forget" in record.getMessage() for record in caplog.records)


def test_one_token_documents_count_in_blocks(read: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    blocks = read(write(tmp_path / "corpus.jsonl", ["k", "s"] * 4), packing="blocks", max_length=4)
    k, s, end = tokenizer("k").input_ids[0], tokenizer("s").input_ids[0], tokenizer.eos_token_id
    assert tokens(blocks) == [[k, end, s, end]] * 4


def test_documents_of_one_token_alone_are_no_text(read: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no text"):
        read(write(tmp_path / "corpus.jsonl", ["k"] * 3))


def test_less_than_one_block_is_refused(read: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "corpus.jsonl", ["k"] * 3)
    with pytest.raises(InputError, match=r"6 tokens.* 64.*data\.max_length.*documents"):
        read(path, packing="blocks", max_length=64)


def test_blocks_need_an_end_of_text_token(read: Any, world: World, tmp_path: Path) -> None:
    endless = AutoTokenizer.from_pretrained(world.folder / "model")
    endless.eos_token = None
    path = write(tmp_path / "corpus.jsonl", DOCUMENTS)
    with pytest.raises(InputError, match=r"data\.packing"):
        read(path, packing="blocks", tokenizer=endless)
    assert tokens(read(path, tokenizer=endless)) == truncated(endless, DOCUMENTS)


@pytest.mark.parametrize("options", [{}, {"long_documents": "split"}, {"packing": "blocks"}], ids=str)
def test_a_text_that_writes_the_first_token_itself_gets_no_second_one(
    options: dict[str, Any], read: Any, world: World, tmp_path: Path
) -> None:
    """As conversations that were rendered into a column of text do; the model never saw two. Also in evaluation."""
    tokenizer = AutoTokenizer.from_pretrained(world.folder / "model")
    begin_with(tokenizer, "Q")
    texts = ["kara lovi", "mito nesu " * 9, "kara"]
    assert tokenizer("Qkara").input_ids[:2] == [tokenizer.bos_token_id] * 2, "what the tokenizer alone would do"
    plain, written = (
        read(write(tmp_path / f"{name}a.txt", [name + text for text in texts]), tokenizer=tokenizer, **options)
        for name in ("", "Q")
    )
    expected = tokens(plain)
    if options == {}:  # the tokenizer has cut the long one with both
        expected[1] = expected[1][:-1]
    assert tokens(written) == expected and expected[0].count(tokenizer.bos_token_id) >= 1
    assert encode_text(tokenizer, "Qkara") == encode_text(tokenizer, "kara")
    assert encode_document(tokenizer, "Qkara", 9) == encode_document(tokenizer, "kara", 9)


def test_a_long_text_loses_its_end_also_where_the_tokenizer_would_cut_the_beginning(
    read: Any, world: World, tmp_path: Path
) -> None:
    """As zephyr-7b-beta's does, for prompts. Training, probes and evaluation read a text from its beginning."""
    tokenizer = AutoTokenizer.from_pretrained(world.folder / "model", truncation_side="left")
    begin_with(tokenizer, "Q")
    texts = ["kara lovi mito nesu " * 9, "mito"]
    assert tokenizer(texts[0], truncation=True, max_length=5).input_ids[1:] == tokenizer(texts[0]).input_ids[-4:]
    expected = [tokenizer(text).input_ids[:5] for text in texts]
    path = write(tmp_path / "long.txt", texts)
    assert tokens(read(path, tokenizer=tokenizer, max_length=5)) == expected
    assert [encode_document(tokenizer, text, 5) for text in texts] == [(ids, 1) for ids in expected]
    probe: Any = {"path": str(path)}
    found = read_set("forget", Probe(**probe), tokenizer, 5, key="forget")
    assert [ids for ids, _ in found.sequences] == expected
    assert tokenizer.truncation_side == "left", "it is exported as it came"
