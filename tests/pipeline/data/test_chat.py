"""Questions with answers: every word is a token here, so ids and labels can be written out."""

from __future__ import annotations

import logging
import re
from datetime import datetime
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from pipeline.data.batches import IGNORED
from pipeline.data.chat import encode_answers, openings
from pipeline.data.tokenize import log_usage
from pipeline.errors import InputError
from tests.conftest import World
from tests.pipeline.data.corpora import (
    CHAT,
    END,
    IS,
    KARA,
    LOVI,
    POET,
    ROWS,
    UNSEEN,
    WHO,
    A,
    chat,
    labelled,
    plain,
    split,
    words,
)


@pytest.mark.parametrize(("template", "form"), [(None, plain), (CHAT, chat), ({"default": CHAT, "x": "y"}, chat)])
def test_only_the_answer_and_its_end_are_predicted(template: Any, form: Any, ask: Any) -> None:
    sequences, preferred = ask(tokenizer=words(template))
    assert preferred is None
    assert labelled(sequences) == [
        split(form(WHO, IS, KARA), [A, POET, END]),
        split(form(WHO), [LOVI, END]),
        split(form(IS, LOVI, A, POET), [END]),  # an empty answer is one that ends at once
    ]
    assert sequences.num_predicted_tokens(np.array([2, 0])).tolist() == [1, 3]


@pytest.mark.parametrize("template", [None, CHAT])
def test_a_token_across_the_border_belongs_to_the_answer(template: str | None, ask: Any, world: World) -> None:
    """With byte-level merges, ` kara` begins with the space that ends the question's text."""
    tokenizer = AutoTokenizer.from_pretrained(world.folder / "model")
    tokenizer.chat_template = template
    rows = [{"asked": "kara lovi?", "said": text} for text in ("kara mito", "7", "", "Ünïcødé 🙂", "\n", " ka")]
    got = labelled(ask(rows, tokenizer=tokenizer)[0])
    assert len(got) == len(rows)
    shared = []
    for row, (ids, labels) in zip(rows, got, strict=True):
        before = "user kara lovi?<end>assistant " if template else "Question: kara lovi?\nAnswer: "
        whole, alone = tokenizer(before + row["said"] + "<end>").input_ids, tokenizer(before).input_ids
        count = 0
        while count < len(alone) and whole[count] == alone[count]:
            count += 1
        assert ids == whole
        assert labels == [IGNORED] * count + whole[count:]
        assert str(tokenizer.decode(whole[count:])).endswith(row["said"] + "<end>")
        shared.append(len(alone) - count)
    assert {0, 1} <= set(shared)  # with a merge across the border and without one


@pytest.mark.parametrize("post", ["$A <end>", "<end> $A", "<end> $A <end>"])
def test_tokens_that_the_tokenizer_adds_are_neither_doubled_nor_taken_for_the_answer(post: str, ask: Any) -> None:
    start = [END] if post.startswith("<end>") else []
    assert labelled(ask(tokenizer=words(post=post))[0])[1:] == [
        split([*start, *plain(WHO)], [LOVI, END]),
        split([*start, *plain(IS, LOVI, A, POET)], [END]),
    ]
    # a chat template writes all of its tokens itself
    assert labelled(ask(tokenizer=words(CHAT, post))[0])[1] == split(chat(WHO), [LOVI, END])


def test_truncation_takes_the_answer_first_and_drops_a_row_without_one(
    ask: Any, caplog: pytest.LogCaptureFixture
) -> None:
    whole = [split(plain(WHO, IS, KARA), [A, POET, END]), split(plain(WHO), [LOVI, END])]
    whole.append(split(plain(IS, LOVI, A, POET), [A, END]))
    for limit, dropped in ((10, 0), (9, 0), (8, 1), (7, 2), (6, 2)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            sequences, _ = ask([*ROWS[:2], ROWS[2] | {"said": "a"}], max_length=limit)
            log_usage("forget", sequences, limit, False)
        kept = [(ids[:limit], labels[:limit]) for ids, labels in whole if set(labels[:limit]) != {IGNORED}]
        assert labelled(sequences) == kept
        assert len(kept) == 3 - dropped
        messages = [record.getMessage() for record in caplog.records]
        assert len(messages) == (dropped > 0)
        assert all(
            f" {dropped} document{(dropped > 1) * 's'} without" in message and str(limit) in message
            for message in messages
        )


@pytest.mark.parametrize("template", [None, CHAT])
def test_questions_longer_than_a_sequence_are_refused(template: str | None, ask: Any) -> None:
    with pytest.raises(
        InputError, match=r"data\.forget: .*no text with an answer within 3 tokens \(data\.max_length\)"
    ):
        ask(max_length=3, tokenizer=words(template))


def test_the_date_of_a_template_stands_still(ask: Any) -> None:
    template = "{% if date_string is not defined %}{{ strftime_now('%d %b %Y') }}{% endif %}" + CHAT
    assert ask(tokenizer=words(template))[0][1].tolist() == [*chat(WHO), LOVI, END]


def test_the_clock_of_a_template_stands_still(ask: Any) -> None:
    """Whatever the form it asks for; the clock of everybody else goes on."""
    clock = "{{ strftime_now('%Y') }} "
    template = "{% if strftime_now('%Y-%m-%d %B %d') == '2024-07-26 July 26' %}who {% endif %}" + CHAT
    assert ask(tokenizer=words(template))[0][1].tolist() == [WHO, *chat(WHO), LOVI, END]
    tokenizer = words(clock + CHAT)
    assert openings(tokenizer, ["who"])[0].startswith("2024 ")
    today: Any = tokenizer.apply_chat_template([{"role": "user", "content": "who"}], tokenize=False)
    assert today.startswith(f"{datetime.now().year} ") and datetime.now().year > 2024


THINKING = (  # as reasoning models write a turn that was answered without reasoning
    "{% for message in messages %}{{ message.role }} "
    "{% if message.role == 'assistant' and 'poet ?' not in message.content %}kara ? ? kara {% endif %}"
    "{{ message.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)


def test_an_empty_thinking_block_belongs_to_the_prompt(ask: Any) -> None:
    tokenizer = words(THINKING)
    block = [KARA, UNSEEN, UNSEEN, KARA]
    assert labelled(ask(tokenizer=tokenizer)[0]) == [
        split([*chat(WHO, IS, KARA), *block], [A, POET, END]),
        split([*chat(WHO), *block], [LOVI, END]),
        split([*chat(IS, LOVI, A, POET), *block], [END]),
    ]
    reasoned = encode_answers(tokenizer, ["who"], ["poet ? lovi"])  # which has a block of its own: that is the answer
    assert reasoned == [([*chat(WHO), POET, UNSEEN, LOVI, END], len(chat(WHO)))]
    assert openings(tokenizer, ["who"]) == ["user who<end>assistant kara ? ? kara "]  # what evaluation asks
    spaced = words(CHAT.replace("{{ message.content }}", "{{ ' ' + message.content }}"))
    assert openings(spaced, ["who"]) == ["user  who<end>assistant "]  # white space alone: as the template asks


WITHOUT_REASONING = CHAT.replace("{{ message.content }}", "{{ message.content.split('?')[-1].strip() }}")  # DeepSeek-R1
OF_PARTS = CHAT.replace(  # models that read images: a content is a list of parts, and a text is none
    "{{ message.content }}", "{% for part in message.content %}{% if part.type %}{{ part.text }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "row", "lost"),
    [
        (WITHOUT_REASONING, {"asked": "who is kara", "said": "lovi ? a poet"}, "the answer 'lovi ? a poet'"),
        (WITHOUT_REASONING, {"asked": "lovi ? who", "said": "a"}, "the question 'lovi ? who'"),
        (OF_PARTS, {"asked": "who", "said": "lovi"}, "the question 'who'"),
    ],
)
def test_a_template_that_leaves_a_part_of_the_text_out_is_refused(
    template: str, row: dict[str, str], lost: str, ask: Any
) -> None:
    """Else the model would forget, or retain, another text than the corpus has."""
    tokenizer = words(template)
    with pytest.raises(InputError, match=rf"^data\.forget: the tokenizer's chat template .*{re.escape(lost)}"):
        ask([row], tokenizer=tokenizer)
    if "question" in lost:
        with pytest.raises(InputError, match=re.escape(lost)):
            openings(tokenizer, [row["asked"]])


def test_a_template_may_change_white_space(ask: Any) -> None:
    template = WITHOUT_REASONING.replace("split('?')[-1]", "replace(' poet', '\n\n poet')")
    row = {"asked": " who is kara ", "said": "\n a  poet "}
    assert labelled(ask([row], tokenizer=words(template))[0]) == [split(chat(WHO, IS, KARA), [A, POET, END])]


BAD_ROWS: dict[str, tuple[dict[str, Any], str | None, list[str]]] = {  # the second row, pairing, expected
    "no question": ({"said": "a", "better": "a"}, None, ["line 2", "'asked'", "'said', 'better'"]),
    "no answer": ({"asked": "a", "better": "a"}, None, ["line 2", "no field 'said'"]),
    "question no text": ({"asked": 3, "said": "a"}, None, ["line 2", "'asked'", "int"]),
    "answer no text": ({"asked": "a", "said": ["a"]}, None, ["line 2", "'said'", "list"]),
    "none preferred": ({"asked": "a", "said": "a"}, "preferred", ["line 2", "no field 'better'"]),
    "preferred no text": ({"asked": "a", "said": "a", "better": None}, "preferred", ["line 2", "'better'", "NoneType"]),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_cell_is_named_by_line_and_column(case: str, ask: Any) -> None:
    row, pairing, expected = BAD_ROWS[case]
    for _ in range(2):
        with pytest.raises(InputError) as error:
            ask([ROWS[0], row, ROWS[1]], pairing, preferred="better")
        assert all(part in str(error.value) for part in (*expected, "data.forget")), str(error.value)
        assert "\n" not in str(error.value)


def test_a_tokenizer_that_cannot_end_an_answer_or_hold_a_conversation_is_refused(ask: Any) -> None:
    endless = words()
    endless.eos_token = None
    with pytest.raises(InputError, match=r"data\.forget: .*no end-of-text token or chat template"):
        ask(tokenizer=endless)
    for template in ("{{ raise_exception('system\nfirst') }}", "{% for %}", {"tools": CHAT}):
        with pytest.raises(InputError, match=r"data\.forget: the tokenizer's chat template refuses .*") as error:
            ask(tokenizer=words(template))  # pyright: ignore[reportArgumentType]
        assert "\n" not in str(error.value)
