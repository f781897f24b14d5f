"""Answers and scores of texts: padding tokens without a row, settings of the model's own, texts that do not fit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from eval.suites import progress, scoring, shared_lm
from pipeline.errors import InputError
from tests.conftest import byte_level_bpe

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


WORDS = 12  # entries of the small models below, which have learned nothing
POSITIONS = 16


class Spelled:
    """A tokenizer that spells token ids, and has no token with a meaning."""

    pad_token_id = eos_token_id = None

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


def gpt2() -> Any:
    """It has a row for each position: one beyond them is an IndexError."""
    torch.manual_seed(0)
    shape = GPT2Config(vocab_size=WORDS, n_positions=POSITIONS, n_embd=16, n_layer=1, n_head=2)
    return GPT2LMHeadModel(shape).eval()


def llama() -> Any:
    """It rotates by the position, and computes on without an error beyond those that it was trained on."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, max_position_embeddings=POSITIONS, **sizes)).eval()


@torch.no_grad()
def greedy(model: Any, prompt: list[int], length: int) -> list[int]:
    """One token after another: no padding, no batch, no cache, no `generate`."""
    ids = [*prompt]
    while len(ids) < len(prompt) + length:
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def answers(model: Any, prompts: list[list[int]], length: int | list[int], seed: int | None = None) -> list[list[int]]:
    stopping = scoring.Stopping(length, tokens=(), seed=seed)
    tokenizer: Any = Spelled()
    found = scoring.answer(model, tokenizer, prompts, stopping=stopping, batch_size=8, title="suite")
    return [[int(token) for token in text.split()] for text in found]


PROMPTS = [[1, 2, 3], [4, 5], [7]]


@pytest.mark.parametrize(
    "own",
    [
        {"suppress_tokens": [*range(1, WORDS)]},
        {"no_repeat_ngram_size": 1},
        {"min_new_tokens": 2, "forced_eos_token_id": 3},
        {"return_dict_in_generate": True, "output_scores": True},
        {"num_return_sequences": 2, "do_sample": True},
        {"stop_strings": ["a"]},
    ],
    ids=lambda own: next(iter(own)),
)
def test_settings_that_come_with_a_model_do_not_change_greedy_answers(own: dict[str, Any]) -> None:
    model = gpt2()
    expected = [greedy(model, prompt, 6) for prompt in PROMPTS]
    assert len({token for ids in expected for token in ids} - {0}) > 1
    model.generation_config = settings = GenerationConfig(**own)
    assert answers(model, PROMPTS, 6) == expected
    assert model.generation_config is settings, "an export has the settings that it came with"


def test_settings_that_come_with_a_model_do_not_change_what_is_drawn() -> None:
    model = gpt2()
    plain = answers(model, PROMPTS, 6, seed=1)
    assert plain != [greedy(model, prompt, 6) for prompt in PROMPTS]
    for own in ({"min_p": 0.99}, {"typical_p": 0.01}, {"epsilon_cutoff": 0.3}, {"temperature": 0.01, "top_k": 1}):
        model.generation_config = GenerationConfig(do_sample=True, **own)
        assert answers(model, PROMPTS, 6, seed=1) == plain, own


def test_an_answer_ends_where_the_template_ends_a_turn() -> None:
    """The end of a turn is not the end of text in base models with a template (Qwen2.5), nor in their settings."""
    tokenizer: Any = byte_level_bpe(["who lives there"], 300)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=302, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    tokenizer.add_special_tokens({"extra_special_tokens": ["<turn>"]})
    tokenizer.add_tokens("<plain>")
    turn, end = tokenizer.convert_tokens_to_ids("<turn>"), tokenizer.eos_token_id
    body = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}END{% endfor %}{% if add_generation_prompt %}?{% endif %}"
    )
    for written, expected in (("<turn>\n", {turn, end}), (" <plain><turn>", {turn, end}), ("\n", {end}), ("", {end})):
        tokenizer.chat_template = body.replace("END", written)
        assert {*scoring.ends_of_answer(model, tokenizer)} - {None, 2} == expected, (
            written
        )  # 2: of the model's settings
    for template in (None, "{{ raise_exception('no') }}"):  # what asks without the template does not need it
        tokenizer.chat_template = template
        assert {*scoring.ends_of_answer(model, tokenizer)} - {None, 2} == {end}


@pytest.mark.parametrize("build", [gpt2, llama])
def test_a_text_of_more_tokens_than_the_model_has_positions_is_refused(build: Callable[[], Any]) -> None:
    """The longest that fits is scored; one token more is refused, also as a prompt."""
    model, fits = build(), [n % WORDS for n in range(POSITIONS)]

    def number(at: int, ids: torch.Tensor, logits: torch.Tensor) -> int:
        return len(logits)

    assert scoring.read_logits(model, [fits, [1]], number, batch_size=2, title="suite") == [POSITIONS, 1]
    limit = rf"muse_news privleak: .*{POSITIONS + 1} tokens.* {POSITIONS} positions; "
    with pytest.raises(InputError, match=limit):
        scoring.read_logits(model, [[1], [*fits, 1]], number, batch_size=1, title="muse_news privleak")
    tokenizer: Any = Spelled()
    stopping = scoring.Stopping(1, tokens=())
    with pytest.raises(InputError, match=limit):
        scoring.answer(model, tokenizer, [[*fits, 1]], stopping=stopping, batch_size=1, title="muse_news privleak")


def test_a_prompt_without_a_token_is_refused() -> None:
    """As an empty question is, where no template and no beginning-of-text token stands before it."""
    with pytest.raises(InputError, match="suite: a prompt has no token; repair or remove it"):
        answers(gpt2(), [[1, 2], []], 3)


def test_an_answer_ends_where_the_positions_do() -> None:
    """14 tokens of a prompt leave room for three: the last one is not read again. A short prompt is not cut for it."""
    model, long = gpt2(), [n % WORDS for n in range(14)]
    assert answers(model, [long, [1]], [8, 12]) == [greedy(model, long, 3), greedy(model, [1], 12)]


def test_progress_is_shown_within_a_batch_of_answers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One batch of 12 tokens, 4 s each: a line as soon as ten seconds have passed since the last."""
    now, model = [0.0], gpt2()
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "_last_line", [0.0])

    def four_seconds(*_: object) -> None:
        now[0] += 4.0

    model.register_forward_hook(four_seconds)
    found = answers(model, [[4, 5], [7]], [12, 3])
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"suite: {n} of 12 tokens, 0:00:{4 * (12 - n):02d} left" for n in (3, 6, 9)]
    assert found == [greedy(model, [4, 5], 12), greedy(model, [7], 3)]
