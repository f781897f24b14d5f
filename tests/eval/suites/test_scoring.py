"""Greedy answers: what a padding token that the model does not embed may do to them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from eval.suites import scoring, shared_lm

FACTS = {"the red fruit is": " an apple", "green:": " a pear", "what of the blue one, tell me, it is": " a plum"}


@pytest.fixture(scope="module")
def learned(memorise: Callable[[list[str]], tuple[Any, Any]]) -> tuple[Any, Any, Any]:
    """A model, its tokenizer, and the tokenizer with a padding token that was added after the training."""
    model, tokenizer = memorise([f"{question}{answer}\n" for question, answer in FACTS.items()])
    later = copy.deepcopy(tokenizer)
    later.add_special_tokens({"pad_token": "<later>"})
    assert later.pad_token_id >= model.get_input_embeddings().num_embeddings
    return model, tokenizer, later


def test_a_padding_token_beyond_the_embedding(learned: tuple[Any, Any, Any]) -> None:
    """One batch of prompts of three lengths, whose answers end at different steps."""
    model, tokenizer, later = learned
    end = tokenizer("\n", add_special_tokens=False).input_ids[-1]
    for given in (tokenizer, later):
        prompts = [given(question, add_special_tokens=False).input_ids for question in FACTS]
        assert len({len(prompt) for prompt in prompts}) == 3
        stopping = scoring.Stopping(8, tokens=[end])
        answers = scoring.answer(model, given, prompts, stopping=stopping, batch_size=3, title="")
        assert answers == [answer.strip() for answer in FACTS.values()]


class Request:
    """What the harness asks of a model that writes."""

    task_name = "fruit"

    def __init__(self, context: str) -> None:
        self.args = (context, {"until": ["\n"], "max_gen_toks": 8, "do_sample": False})


def test_a_padding_token_beyond_the_embedding_in_the_harness(learned: tuple[Any, Any, Any]) -> None:
    model, _, later = learned
    lm = shared_lm.SharedLM(model, later, batch_size=3, title="fruit")
    assert lm.generate_until([Request(question) for question in FACTS]) == list(FACTS.values())
    assert later.pad_token == "<later>"  # the caller's tokenizer stays as it is
