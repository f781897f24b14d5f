"""What the suites share: prompts as token ids, greedy answers, and scores of given texts.

Every function takes rows and returns one result for each row, in their order, so that ranks can share the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, TypeVar, cast

from eval.suites.progress import after_each_token
from eval.suites.sharing import share, share_writing
from eval.vllm_model import VllmModel
from pipeline.data.chat import begun, encode_answers, end_of_turn, first_tokens, openings
from pipeline.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


T = TypeVar("T")


MOST_TOKENS = 8192  # in a batch whose logits are all in memory at once: 2 GB in bfloat16 with 128,000 entries

NO_ANSWER = "NOANSWER"  # RWKU puts it in place of an empty answer, on which its scorer would fail


@dataclass(frozen=True)
class Stopping:
    """Where decoding ends, and whether it draws.

    Args:
        max_new_tokens: one number, or one for each prompt.
        tokens: ids that end an answer. None among them (a tokenizer without that token) is left out.
        texts: what an answer is cut at, once it is complete: they decide what is scored, not how long the model writes.
        seed: draws each token from the model's own distribution, at temperature 1; None: greedy.
    """

    max_new_tokens: int | Sequence[int]
    tokens: Sequence[int | None]
    texts: Sequence[str] = ()
    seed: int | None = None

    def limits(self, number: int) -> Sequence[int]:
        """The most new tokens of each of `number` prompts."""
        return [self.max_new_tokens] * number if isinstance(self.max_new_tokens, int) else self.max_new_tokens

    def cut(self, text: str) -> str:
        """The text before the first of `texts`, stripped."""
        ends = [at for stop in self.texts if (at := text.find(stop)) >= 0]
        return text[: min(ends, default=len(text))].strip()


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of the end-of-text token; None if the tokenizer has no such token."""
    end = tokenizer.eos_token_id
    return end if isinstance(end, int) else None


def is_embedded(model: PreTrainedModel, token: object) -> bool:
    """Whether the model has a row for the token, which a tokenizer may have got later than the model."""
    embeddings = cast("torch.nn.Embedding", model.get_input_embeddings())
    return isinstance(token, int) and token < embeddings.num_embeddings


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a forward pass takes its tokens. Weights that a device map keeps elsewhere until then are on `meta`."""
    import torch

    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    return model.device if hook is None else torch.device(hook.execution_device)


def ends_of_answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int | None, ...]:
    """The ids that end an answer: the end of text, the template's end of a turn, and those that the model names."""
    settings = model.generation_config
    ends: int | list[int] | None = None if settings is None else settings.eos_token_id
    return (end_of_text(tokenizer), end_of_turn(tokenizer), *(ends if isinstance(ends, list) else [ends]))


def encode_prompt(tokenizer: PreTrainedTokenizerBase, question: str, opening: str = "") -> list[int]:
    """Token ids of a question (the user's turn, in a chat template) and of the `opening` of its answer.

    They hold one beginning-of-text token at most: a template that writes its own gets no second one.
    """
    if tokenizer.chat_template is None:
        return encode_text(tokenizer, question + opening)
    [text] = openings(tokenizer, [question])
    return tokenizer(text + opening, add_special_tokens=False).input_ids


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that the model continues, as they are without a chat template, and without an end."""
    ids = begun(tokenizer(text).input_ids, tokenizer.bos_token_id)
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids


def encode_document(
    tokenizer: PreTrainedTokenizerBase, text: str, max_length: int, question: str | None = None
) -> tuple[list[int], int]:
    """Token ids, at most `max_length`, and the index of the first that the model has to predict.

    Without a question that is the second token, because nothing predicts the first; with one, the first of the answer
    `text` (see `chat.encode_answers`), or the second token where the question has none.
    """
    if question is None:
        return first_tokens(tokenizer, [text], max_length)[0], 1
    [(ids, start)] = encode_answers(tokenizer, [question], [text])
    return ids[:max_length], max(start, 1)


def positions_of(model: PreTrainedModel) -> int | None:
    """The most tokens that the model reads at once; None if its configuration sets no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def check_positions(model: PreTrainedModel, longest: int, title: str) -> None:
    """Raises InputError, which begins with `title`, if a text of `longest` tokens is longer than the model reads.

    Some models fail there without a reason, others compute numbers that mean nothing.
    """
    positions = positions_of(model)
    if positions is not None and longest > positions:
        raise InputError(
            f"{title}: a text has {longest} tokens, and the model has {positions} positions; leave the suite out, or "
            "give it texts that fit"
        )


@contextmanager
def without_own_settings(model: PreTrainedModel) -> Iterator[None]:
    """A block in which `generate` adds no setting of the model's generation_config.json to those that it is given.

    transformers fills every setting that the caller leaves open with the model's own, also in a whole configuration.
    """
    from transformers import GenerationConfig

    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def batches(
    sequences: Sequence[Sequence[int]],
    batch_size: int,
    most_tokens: int | None = None,
    *,
    longest_first: bool = False,
) -> list[list[int]]:
    """Indices of the sequences, sorted by length for little padding; sequences of one length stay in their order.

    A batch has at most `batch_size` rows and, padded, at most `most_tokens` tokens, but at least one row.
    """
    made: list[list[int]] = []
    for i in sorted(range(len(sequences)), key=lambda i: len(sequences[i]), reverse=longest_first):
        # Lengths only grow, or only shrink: the padded width is the newcomer's, or the first row's.
        width = len(sequences[made[-1][0] if longest_first and made else i])
        full = most_tokens is not None and made and (len(made[-1]) + 1) * width > most_tokens
        if not made or full or len(made[-1]) == batch_size:
            made.append([])
        made[-1].append(i)
    return made


def restore_order(order: list[list[int]], found: list[list[T]]) -> list[T]:
    """The results in order of the indices, from `order` (batches of indices) and their results."""
    at = {
        i: result for batch, results in zip(order, found, strict=True) for i, result in zip(batch, results, strict=True)
    }
    return [at[i] for i in range(len(at))]


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], stops: Sequence[int], stopping: Stopping) -> str:
    """The text of an answer's tokens before the first of `stops`, cut by the rules of `stopping`."""
    end = next((at for at, token in enumerate(tokens) if token in stops), len(tokens))
    return stopping.cut(str(tokenizer.decode(list(tokens[:end]), skip_special_tokens=True)))


def writing_batches(
    prompts: Sequence[list[int]], limits: Sequence[int], batch_size: int, positions: int | None
) -> list[list[int]]:
    """The `batches` of the prompts; alone where the longest prompt and the longest answer together do not fit.

    An answer that has ended takes positions until the last one of its batch ends.
    """

    def fits(batch: list[int]) -> bool:
        return positions is None or max(len(prompts[i]) for i in batch) + max(limits[i] for i in batch) <= positions + 1

    found = batches(prompts, batch_size)
    return [part for batch in found for part in ([batch] if fits(batch) else [[i] for i in batch])]


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    stopping: Stopping,
    batch_size: int,
    title: str,
) -> list[str]:
    """The greedy (or drawn) answer to each prompt of token ids, ended by the rules of `stopping` and stripped.

    It also ends where the model's positions do. Settings that come with the model change nothing.

    Raises:
        InputError: a prompt alone is longer than the model reads, or has no token.
    """
    import torch
    from transformers import GenerationConfig

    check_positions(model, max(map(len, prompts), default=0), title)
    if not all(prompts):
        raise InputError(f"{title}: a prompt has no token; repair or remove it")
    stops = [token for token in stopping.tokens if token is not None]
    limits, positions = stopping.limits(len(prompts)), positions_of(model)
    if positions is not None:  # nothing reads the last token
        limits = [min(most, positions + 1 - len(ids)) for most, ids in zip(limits, prompts, strict=True)]
    if isinstance(model, VllmModel):
        written = model.write(prompts, limits, stops, stopping.seed)
        return [decode(tokenizer, tokens, stops, stopping) for tokens in written]
    padding = next(token for token in (tokenizer.pad_token_id, *stops, 0) if is_embedded(model, token))
    device = input_device(model)

    def work(batch: list[int], advance: Callable[[], None]) -> list[str]:
        width = max(len(prompts[i]) for i in batch)
        pads = [width - len(prompts[i]) for i in batch]
        ids = torch.tensor([[padding] * pad + prompts[i] for pad, i in zip(pads, batch, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads])
        drawn = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        settings = GenerationConfig(
            max_new_tokens=max(limits[i] for i in batch),
            **({"do_sample": False} if stopping.seed is None else drawn),
            num_beams=1,
            eos_token_id=stops or None,
            pad_token_id=padding,
        )
        with torch.random.fork_rng(enabled=stopping.seed is not None), without_own_settings(model):
            if stopping.seed is not None:
                torch.manual_seed(stopping.seed * len(prompts) + batch[0])  # of the batch: ranks do not matter
            generated = model.generate(  # pyright: ignore[reportCallIssue] (its mixin is typed as a Module)
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=settings,
                stopping_criteria=after_each_token(advance),
            )
        new = zip(batch, generated[:, width:].tolist(), strict=True)
        return [decode(tokenizer, tokens[: limits[i]], stops, stopping) for i, tokens in new]

    order = writing_batches(prompts, limits, batch_size, positions)[::-1]  # what memory does not hold shows at once
    lengths = [max(limits[i] for i in batch) for batch in order]
    return restore_order(order, share_writing(order, work, lengths, title))


def read_logits(
    model: PreTrainedModel,
    sequences: Sequence[list[int]],
    score: Callable[[int, Tensor, Tensor], T],
    *,
    batch_size: int,
    title: str,
) -> list[T]:
    """`score(index, ids, logits)` of every sequence, from one forward pass for each batch.

    Sequence `index` has T tokens: ids [T] int64, and logits [T, V] float32 that predict the token after each of them.

    Raises:
        InputError: a sequence is longer than the model reads.
    """
    import torch

    check_positions(model, max(map(len, sequences), default=0), title)
    device = input_device(model)

    def work(batch: list[int]) -> list[T]:
        rows = [torch.tensor(sequences[i]) for i in batch]
        # Padding comes after the text, where a causal model cannot see it; any token will do.
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        mask = (torch.arange(ids.shape[1], device=device) < lengths.unsqueeze(1)).long()
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            sizes = [len(row) for row in rows]
            return [
                score(i, ids[row, :size], logits[row, :size].float())
                for row, (i, size) in enumerate(zip(batch, sizes, strict=True))
            ]

    order = batches(sequences, batch_size, MOST_TOKENS)[::-1]
    return restore_order(order, share(order, work, title))


def answer_losses(
    model: PreTrainedModel, answers: Sequence[tuple[list[int], int]], *, batch_size: int, title: str
) -> list[float]:
    """Mean negative log-likelihood, in nats a token, of each answer given its question (see `chat.encode_answers`)."""
    from torch.nn.functional import cross_entropy

    if isinstance(model, VllmModel):
        found = model.score([ids for ids, _ in answers])
        starts = [max(start, 1) - 1 for _, start in answers]
        return [-fmean(value for value, _ in own[start:]) for own, start in zip(found, starts, strict=True)]

    def loss(index: int, ids: Tensor, logits: Tensor) -> float:
        start = max(answers[index][1], 1)  # nothing predicts a first token
        return cross_entropy(logits[start - 1 : -1], ids[start:]).item()

    return read_logits(model, [ids for ids, _ in answers], loss, batch_size=batch_size, title=title)
