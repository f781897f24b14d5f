"""A second answer to each prompt: in the same order, dropped together, from a column or a list of refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from pipeline.config.load import resolve
from pipeline.data.batches import IGNORED, BatchSampler, collate
from pipeline.errors import InputError
from pipeline.losses.task import open_sampler
from tests.conftest import World
from tests.pipeline.data.corpora import (
    CHAT,
    END,
    IS,
    KARA,
    LOVI,
    POET,
    ROWS,
    UNKNOWN,
    WHO,
    A,
    chat,
    labelled,
    plain,
    split,
    tokens,
    words,
)


def test_the_preferred_answers_are_in_the_order_of_the_answers(ask: Any) -> None:
    for template, form in ((None, plain), (CHAT, chat)):
        sequences, preferred = ask(pairing="preferred", preferred="better", tokenizer=words(template))
        assert labelled(sequences) == labelled(ask(tokenizer=words(template))[0])
        assert labelled(preferred) == [
            split(form(WHO, IS, KARA), [UNKNOWN, END]),
            split(form(WHO), [IS, KARA, A, POET, END]),
            split(form(IS, LOVI, A, POET), [A, END]),
        ]


def test_a_preferred_text_is_a_whole_sequence(ask: Any) -> None:
    keys = {"field": "said", "prompt": None, "response": None, "preferred": "better"}
    rows = [{"said": "a poet", "better": "who is kara"}, {"said": "who is kara", "better": "lovi lovi lovi"}]
    sequences, preferred = ask(rows, "preferred", **keys)
    assert labelled(sequences) == [([A, POET],) * 2, ([WHO, IS, KARA],) * 2]
    assert labelled(preferred) == [([WHO, IS, KARA],) * 2, ([LOVI] * 3,) * 2]
    assert sequences.num_predicted_tokens(np.array([0, 1])).tolist() == [1, 2]


@pytest.mark.parametrize("questions", [True, False])
def test_a_row_that_is_dropped_is_dropped_on_both_sides(questions: bool, ask: Any) -> None:
    long = "who " * 30  # a prompt beyond max_length on both sides; of plain text, one word is too short on one side
    texts = ["a poet", "a", "lovi lovi", "is kara", "poet", "poet a poet"]
    prompts = ["who", long, "is", "a", long, "kara"] if questions else [""] * 6
    rows = [
        {"asked": prompt, "said": text, "better": "unknown" if number == 3 and not questions else f"{text} unknown"}
        for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
    ]
    keys = {} if questions else {"field": "said", "prompt": None, "response": None}
    sequences, preferred = ask(rows, "preferred", preferred="better", max_length=20, **keys)
    kept = [0, 2, 3, 5] if questions else [0, 2, 5]
    assert sequences.usage is not None and sequences.usage.dropped == 6 - len(kept)
    assert len(sequences) == len(preferred) == len(kept)
    for at, number in enumerate(kept):
        answer = words()(texts[number]).input_ids
        start = plain(*words()(prompts[number]).input_ids) if questions else []
        end = [END] if questions else []
        assert sequences[at].tolist() == start + answer + end
        assert preferred[at].tolist() == start + answer + [UNKNOWN] + end


def test_a_row_is_refused_by_its_number_alone(ask: Any, tmp_path: Path) -> None:
    file = tmp_path / "refusals.txt"
    file.write_text("unknown\n\n  lovi is a poet \nkara\n")
    refusals = [[UNKNOWN], [LOVI, IS, A, POET], [KARA]]
    rows = [{"asked": "who " * (15 if number == 2 else 1 + number % 3), "said": "a"} for number in range(8)]
    sequences, preferred = ask(rows, "refusal", refusals=str(file), max_length=12)
    kept = [0, 1, 3, 4, 5, 6, 7]  # row 2 is too long, and the others keep their refusals
    expected = [split(plain(*[WHO] * (1 + number % 3)), [*refusals[number % 3], END]) for number in kept]
    assert labelled(preferred) == expected
    assert [ids[-2:] for ids, _ in labelled(sequences)] == [[A, END]] * len(kept)
    other, again = ask(rows[:4], "refusal", refusals=str(file), max_length=30, response="asked", prompt="said")
    assert [again[row][5:-1].tolist() for row in range(4)] == [refusals[row % 3] for row in range(4)]
    assert len(other) == 4


def test_the_built_in_refusals_serve_where_no_file_is_given(ask: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"asked": "kara", "said": "lovi"}] * 60
    _, preferred = ask(rows, "refusal", tokenizer=tokenizer, max_length=200)
    start = len("Question: kara\nAnswer: ")
    texts = [str(tokenizer.decode(ids))[start:] for ids in tokens(preferred)]  # pyright: ignore
    assert all(len(text) > 15 and text.endswith(".<end>") for text in texts)
    number = len(set(texts))
    assert 18 <= number <= 30
    assert texts == [texts[row % number] for row in range(60)]


def test_a_batch_of_pairs_has_both_sides_in_the_order_of_its_indices(ask: Any) -> None:
    sequences, preferred = ask(pairing="preferred", preferred="better")
    batch = collate(sequences, np.array([2, 0]), 7, preferred)
    assert batch.index.tolist() == [2, 0]
    expected = [
        split(plain(IS, LOVI, A, POET), [END]),
        split(plain(WHO, IS, KARA), [A, POET, END]),
        split(plain(IS, LOVI, A, POET), [A, END]),
        split(plain(WHO, IS, KARA), [UNKNOWN, END]),
    ]
    width = max(len(ids) for ids, _ in expected)
    assert batch.input_ids.tolist() == [ids + [7] * (width - len(ids)) for ids, _ in expected]
    assert batch.labels.tolist() == [labels + [IGNORED] * (width - len(labels)) for _, labels in expected]
    assert batch.attention_mask.tolist() == [[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in expected]
    assert {tensor.dtype for tensor in vars(batch).values()} == {torch.int64}


def test_each_side_of_a_pair_has_its_own_border(ask: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """` kara` takes the last space of the question into the answer's first token, ` 7` does not."""
    rows = [{"asked": "lovi", "said": "kara mito", "better": "7"}]
    sequences, preferred = ask(rows, "preferred", preferred="better", tokenizer=tokenizer)
    labels = collate(sequences, np.array([0]), 0, preferred).labels.tolist()
    texts: list[Any] = [tokenizer.decode([token for token in row if token != IGNORED]) for row in labels]
    assert texts == [" kara mito<end>", "7<end>"]


def test_a_stream_of_pairs_counts_the_tokens_of_its_own_side(ask: Any) -> None:
    sequences, preferred = ask(pairing="preferred", preferred="better")
    keys: dict[str, Any] = {"seed": 1, "task": 0, "batch_size": 4, "micro_batch_size": 2, "rank": 0, "world_size": 1}
    paired, alone = BatchSampler(sequences, pad=0, preferred=preferred, **keys), BatchSampler(sequences, pad=0, **keys)
    answers = [3, 2, 1]  # predicted tokens of the three rows
    for step in range(3):
        indices = alone.global_batch(step)
        assert paired.global_batch(step).tolist() == indices.tolist()
        assert (
            paired.loss_denominator(step, "token")
            == alone.loss_denominator(step, "token")
            == sum(answers[i] for i in indices)
        )
        assert paired.loss_denominator(step, "sequence") == 4
        for one, both in zip(alone.batches(step), paired.batches(step), strict=True):
            assert both.index.tolist() == one.index.tolist()
            assert both.input_ids.shape[0] == 4 and one.input_ids.shape[0] == 2
            real = one.attention_mask.sum(1).tolist()
            for row, size in enumerate(real):
                assert both.labels[row, :size].tolist() == one.labels[row, :size].tolist()


def test_what_a_pairing_lacks_is_named(ask: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.forget\.preferred is missing"):
        ask(pairing="preferred")
    with pytest.raises(InputError, match=r"data\.forget: a refusal answers a question.*prompt and response"):
        ask(pairing="refusal", field="said", prompt=None, response=None)
    (tmp_path / "blank.txt").write_text("\n  \n")
    with pytest.raises(InputError, match=r"data\.forget\.refusals: .*blank\.txt holds no refusal"):
        ask(pairing="refusal", refusals=str(tmp_path / "blank.txt"))
    with pytest.raises(InputError, match=r"data\.forget\.refusals: cannot read .*none\.txt: No such file"):
        ask(pairing="refusal", refusals=str(tmp_path / "none.txt"))
    (tmp_path / "latin.txt").write_bytes(b"no\nd\xe9sol\xe9\n")
    with pytest.raises(InputError, match=r"latin\.txt, line 2: not UTF-8"):
        ask(pairing="refusal", refusals=str(tmp_path / "latin.txt"))


def test_a_hub_data_set_has_columns_too(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    keep = {"number": 1}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list([r | keep for r in ROWS]))
    local = ask(pairing="preferred", preferred="better")
    hub = ask("some/set", pairing="preferred", preferred="better")
    assert [labelled(side) for side in hub] == [labelled(side) for side in local]
    for key in ("prompt", "response", "preferred"):
        with pytest.raises(InputError, match=rf"data\.forget\.{key}: some/set has no 'oops'; it has .*said"):
            ask("some/set", pairing="preferred", **{"preferred": "better", key: "oops"})
    with pytest.raises(InputError, match=r"data\.forget\.field: some/set has no 'text'"):
        ask("some/set", field="text", prompt=None, response=None)
    with pytest.raises(InputError, match=r"data\.forget: some/set, row 1: field 'number' holds int, not text"):
        ask("some/set", response="number")


def test_open_stream_hands_the_pairs_on(
    ask: Any, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    (tmp_path / "forget.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    corpus = {"path": str(tmp_path / "forget.jsonl"), "prompt": "asked", "response": "said", "preferred": "better"}
    sections = {"data": {"forget": corpus}, "train": {"batch_size": 2, "micro_batch_size": 1}}
    file = world.write(tmp_path / "run.yaml", tmp_path / "run", **sections)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    try:
        for objective, pairing in (("ga", None), ("dpo", "preferred"), ("dpo_idk", "refusal"), ("idk", "refusal")):
            config = resolve(file, None, ["--cache", str(tmp_path), "--objective.forget", objective])
            stream = open_sampler(config, "forget", words())
            sides = (stream.sequences, stream.preferred)
            expected = ask(pairing=pairing, preferred="better")
            if objective == "idk":  # the refusals alone
                expected = (expected[1], None)
            assert [side and labelled(side) for side in sides] == [side and labelled(side) for side in expected]
            assert len(next(stream.batches(0)).input_ids) == (2 if "dpo" in objective else 1)
    finally:
        torch.distributed.destroy_process_group()


DATA = Path(__file__).resolve().parents[2] / "data"


@pytest.mark.parametrize(
    ("file", "prompt", "response", "count"),
    [
        ("tofu/forget01.json", "question", "answer", 10),
        ("tofu/world_facts_perturbed.json", "question", "answer", 5),
        ("rwku/Batch/1-50/forget_level2.json", "query", "answer", 5),
    ],
)
def test_benchmark_files_are_read_whole(
    file: str, prompt: str, response: str, count: int, ask: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    text = (DATA / file).read_text()
    rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
    keys: dict[str, Any] = {"prompt": prompt, "response": response, "tokenizer": tokenizer, "max_length": 4096}
    sequences, preferred = ask(DATA / file, "refusal", **keys)
    assert len(sequences) == len(preferred) == len(rows) == count
    for row, ids, refused, start in zip(
        rows, tokens(sequences), tokens(preferred), sequences.prompt_lengths(np.arange(count)), strict=True
    ):
        assert tokenizer.decode(ids) == f"Question: {row[prompt]}\nAnswer: {row[response]}<end>"
        assert str(tokenizer.decode(ids[start:])).removeprefix(" ") == f"{row[response]}<end>"
        assert str(tokenizer.decode(refused)).startswith(f"Question: {row[prompt]}\nAnswer: ") and refused != ids


def test_a_perturbed_answer_is_no_text(ask: Any) -> None:
    with pytest.raises(InputError, match=r"line 1: field 'perturbed_answer' holds list"):
        ask(DATA / "tofu" / "forget01_perturbed.json", prompt="question", response="perturbed_answer")
