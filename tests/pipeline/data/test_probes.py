"""Sets of probes: which rows are read, and which are refused by name."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from pipeline.config.sources import Probe
from pipeline.data.chat import encode_answers
from pipeline.data.probes import Question, read_set
from pipeline.errors import InputError
from tests.conftest import World

COLUMNS = {"prompt": "q", "choices": "c", "answer": "a"}


@pytest.fixture(scope="module")
def tokenizer(world: World) -> Any:
    return AutoTokenizer.from_pretrained(world.folder / "model")


def written(folder: Path, *rows: object) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def probe_of(path: str, **keys: object) -> Probe:
    return Probe.model_validate({"path": path, **keys})


def test_the_first_rows_of_a_choice_with_the_right_one_by_number_or_by_text(tmp_path: Path, tokenizer: Any) -> None:
    """TOFU's wrong answers stand alone, and the right one beside them; a long choice leaves its question out."""
    rows = [
        {"q": "one", "c": ["to", "vi", "ra"], "a": 1},
        {"q": "two", "c": ["to", "vi"], "a": "ra"},
        {"q": "three", "c": ["to", "kara " * 40], "a": 0},
        {"q": "four", "c": ["to", "ra"], "a": "ra"},
        {"q": "five", "c": ["to", "ra"], "a": 9},
    ]
    probe = probe_of(written(tmp_path, *rows), limit=4, **COLUMNS)
    found = read_set("x", probe, tokenizer, 60, key="probes.x")
    assert found.questions == [Question(range(0, 3), 1), Question(range(3, 6), 2), Question(range(6, 8), 1)]
    expected = encode_answers(tokenizer, ["two"] * 3, ["to", "vi", "ra"])
    assert found.sequences[3:6] == expected and len(found.sequences) == 8


def test_texts_are_cut_and_empty_ones_left_out(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(tmp_path, {"text": "kara " * 40}, {"text": ""}, {"text": "lovi mito"}, {"text": "beyond"})
    with caplog.at_level(logging.WARNING):
        found = read_set("x", probe_of(path, limit=3), tokenizer, 10, key="probes.x")
    assert found.sequences == [
        (tokenizer("kara " * 40).input_ids[:10], 0),
        (tokenizer("lovi mito").input_ids, 0),
    ]
    assert "data.probes.x: probes cannot use 1 row without two tokens or more" in caplog.text


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"q": "one", "c": ["to", "vi"], "a": 2}, "field 'a' holds 2, which is none of 2 choices"),
        ({"q": "one", "c": ["to", "vi"], "a": True}, "field 'a' holds True"),
        ({"q": "one", "c": ["to"], "a": 0}, "none of 1 choices"),
        ({"q": "one", "c": "to", "a": 0}, "field 'c' needs a list of texts"),
        ({"q": "one", "a": 0}, "no field 'c'; it has 'q', 'a'"),
        ({"c": ["to"], "a": 0}, "no field 'q'"),
        ([1], "expected an object"),
        ({"q": "one", "c": ["to", "vi"], "a": "B"}, "field 'a' holds 'B', which is no choice"),  # as ARC's answerKey
        ({"q": "one", "c": ["to", "vi"], "a": "1"}, "field 'a' holds '1', which is no choice"),
        ({"q": "one", "c": ["to", "vi"], "a": "vi "}, "field 'a' holds 'vi ', which is no choice"),
    ],
)
def test_a_row_is_refused_by_its_place(row: object, expected: str, tmp_path: Path, tokenizer: Any) -> None:
    path = written(tmp_path, {"q": "fine", "c": ["to", "vi"], "a": 0}, row)
    with pytest.raises(InputError) as caught:
        read_set("x", probe_of(path, **COLUMNS), tokenizer, 60, key="probes.x")
    assert str(caught.value).startswith(f"{path}, line 2: ") and expected in str(caught.value)


def test_a_set_without_a_row_that_can_be_used_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(InputError, match=r"data.probes.x: .* has none in its first 64 rows with two tokens or more"):
        read_set("x", probe_of(written(tmp_path, {"text": ""})), tokenizer, 60, key="probes.x")
