"""Questions, with or without answers -> token ids in the tokenizer's chat template, for training and evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, tzinfo
from typing import TYPE_CHECKING, Any

from pipeline.errors import InputError, shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class _FixedClock(datetime):
    """A constant date, because some templates write today's and the same text must be the same tokens tomorrow."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:
        return datetime(2024, 7, 26, tzinfo=tz)


@contextmanager
def _fixed_clock() -> Iterator[None]:
    """Fix the clock that templates read with `strftime_now`; transformers gives them no other clock."""
    from transformers.utils import chat_template_utils as templates  # takes seconds, which --help should not

    before: Any = templates.datetime  # pyright: ignore[reportPrivateImportUsage]
    templates.datetime = _FixedClock  # pyright: ignore[reportPrivateImportUsage]
    try:
        yield
    finally:
        templates.datetime = before  # pyright: ignore[reportPrivateImportUsage]


def _render(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], answers: Sequence[str] | None = None
) -> list[str]:
    """Each question in the chat template with its answer or, without answers, with the header of the answer's turn.

    Raises:
        InputError: the template fails, or leaves a part of a text out.
    """
    from jinja2 import TemplateError

    turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
    for turn, answer in zip(turns, answers or (), strict=answers is not None):
        turn.append({"role": "assistant", "content": answer})
    render: Any = tokenizer.apply_chat_template
    date = _FixedClock.now().strftime("%d %b %Y")  # for templates that read a variable
    try:
        with _fixed_clock():
            texts: list[str] = render(turns, tokenize=False, add_generation_prompt=answers is None, date_string=date)
    except (TemplateError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"the tokenizer's chat template refuses a question with an answer: {reason}; repair it"
        ) from None
    for text, turn in zip(texts, turns, strict=True):
        _refuse_a_part_of(turn, text)
    return texts


def _refuse_a_part_of(turns: Sequence[dict[str, str]], text: str) -> None:
    """
    Raises:
        InputError: what turns say is not in `text`, one after another, but for white space. Templates of reasoning
            models take reasoning out of an answer; some of models that read images write no plain text at all.
    """
    left = "".join(text.split())
    for turn in turns:
        wanted = "".join(turn["content"].split())
        if wanted not in left:
            name = "question" if turn["role"] == "user" else "answer"
            raise InputError(
                f"the tokenizer's chat template leaves a part of the {name} {shorten(turn['content'])!r} out, so that "
                "another text would be learned; write the row without that part, or give the tokenizer another template"
            )
        left = left[left.index(wanted) + len(wanted) :]


def _before_answers(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[str]:
    """What the template writes before any answer to each question: the common part of two different answers.

    The header of the answer's turn and, where the template has one, an empty thinking block.
    """
    sides = (_render(tokenizer, prompts, [answer] * len(prompts)) for answer in ("0", "1"))
    return [one[: _num_shared(one, other)] for one, other in zip(*sides, strict=True)]


def openings(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[str]:
    """Each question in the chat template, up to the place where a model generates its answer.

    That is the template's generation prompt, unless the template writes something other than white space before an
    answer in a conversation, such as an empty thinking block, which then preceded every answer in training.

    Raises:
        InputError: the template fails.
    """
    pairs = zip(_render(tokenizer, prompts), _before_answers(tokenizer, prompts), strict=True)
    return [prompt if prompt.strip() == before.strip() else before for prompt, before in pairs]


def encode_answers(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], answers: Sequence[str]
) -> list[tuple[list[int], int]]:
    """Token ids of each question with its answer, and how many of them, from the start, are the question's.

    The form is the tokenizer's chat template, or TOFU's for models without one: `Question: ...`, a new line,
    `Answer: ...` and the end-of-text token. The question's tokens are the common prefix of the whole and of the text
    before any answer: a token that contains the end of one and the start of the other belongs to the answer. An
    empty thinking block that the template puts before the answer belongs to the question.

    Raises:
        InputError: the chat template fails on a question with an answer.
    """
    if tokenizer.chat_template is not None:
        texts, starts = _render(tokenizer, prompts, answers), _before_answers(tokenizer, prompts)
        whole = tokenizer(texts, add_special_tokens=False).input_ids
        alone = tokenizer(starts, add_special_tokens=False).input_ids
    else:
        end: Any = tokenizer.eos_token_id
        starts = [f"Question: {prompt}\nAnswer: " for prompt in prompts]
        texts = [start + text for start, text in zip(starts, answers, strict=True)]
        whole = [ended(ids, end) for ids in tokenizer(texts).input_ids]
        alone = [ids[:-1] if ids[-1:] == [end] else ids for ids in tokenizer(starts).input_ids]
    return [(ids, _num_shared(ids, start)) for ids, start in zip(whole, alone, strict=True)]


def closing_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that follow every answer: the end of text, or what the chat template writes behind a turn.

    Raises:
        InputError: the chat template fails.
    """
    (one, _), (other, _) = encode_answers(tokenizer, ["?", "?"], ["0", "1"])
    return one[len(one) - _num_shared(one[::-1], other[::-1]) :]


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The first special token that the chat template writes behind an answer, where a model that has learnt it ends.

    None without a template that can be used, or with one that writes none.
    """
    if tokenizer.chat_template is None:
        return None
    try:
        written = closing_tokens(tokenizer)
    except InputError:  # whoever asks in the template gets the reason
        return None
    added = tokenizer.added_tokens_decoder
    return next((token for token in written if token in added and added[token].special), None)


def first_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """Token ids of plain texts, of each the first `max_length`.

    The tokenizer truncates itself, because it may keep tokens of its own at the end; but at the end of the text, also
    where its `truncation_side` is left.
    """
    side, tokenizer.truncation_side = tokenizer.truncation_side, "right"
    try:
        found = tokenizer(list(texts), truncation=True, max_length=max_length).input_ids
    finally:
        tokenizer.truncation_side = side
    return [begun(ids, tokenizer.bos_token_id) for ids in found]


def begun(ids: list[int], begin: object) -> list[int]:
    """`ids` with the token `begin` before them once: a text may write the token that its tokenizer puts there."""
    return ids[1:] if ids[:2] == [begin, begin] else ids


def ended(ids: list[int], end: int) -> list[int]:
    """`ids` with the token `end` after them, once."""
    return ids if ids[-1:] == [end] else [*ids, end]


def _num_shared(ids: Sequence[object], others: Sequence[object]) -> int:
    """Length of the longest common prefix."""
    pairs = enumerate(zip(ids, others, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(ids), len(others)))
