"""What the suites share: prompts as token ids, greedy answers, scores of given text, ROUGE-L recall, words.

Every function takes rows and gives one result a row, in their order, so that rows may be dealt out and put together.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from eval.ranks import share
from pipeline.chat import openings

if TYPE_CHECKING:  # importing these takes seconds, which --help and a wrong argument should not cost
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")

MOST_TOKENS = 8192  # a batch's, where all logits are held at once: 2 GB in bfloat16 with 128,000 entries
NO_ANSWER = "NOANSWER"  # RWKU's stand-in for an empty answer, on which its scorer would fail

# ---------------------------------------------------------------------------------------------------------------------
# Prompts


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", question: str, opening: str = "") -> list[int]:
    """Token ids of a question (the user's turn, in a chat template) and of the `opening` of its answer.

    One beginning-of-text token at most: a template that writes its own gets no second one.
    """
    if tokenizer.chat_template is None:
        ids = tokenizer(question + opening).input_ids
        return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids
    [text] = openings(tokenizer, [question])
    return tokenizer(text + opening, add_special_tokens=False).input_ids


# ---------------------------------------------------------------------------------------------------------------------
# Models


def batches(
    sequences: Sequence[Sequence[int]],
    batch_size: int,
    most_tokens: int | None = None,
    *,
    longest_first: bool = False,
) -> list[list[int]]:
    """Indices of the sequences, those of like length together (little padding), equal lengths in their order.

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


def spread(order: list[list[int]], found: list[list[T]]) -> list[T]:
    """Results of batches of indices, put back at those indices."""
    at = {
        i: result for batch, results in zip(order, found, strict=True) for i, result in zip(batch, results, strict=True)
    }
    return [at[i] for i in range(len(at))]


def answer(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int | Sequence[int],
    stop_tokens: Sequence[Any],
    stop_texts: Sequence[str],
    batch_size: int,
    title: str,
) -> list[str]:
    """Greedy answers to prompts of token ids, each ended by a stop token, cut at the first stop text and stripped.

    `max_new_tokens` is one number, or one for each prompt. Stop tokens are ids; a None among them (a tokenizer without
    that token) is left out. Stop texts are looked for in the finished answer: they decide what is scored, not how long
    the model writes.
    """
    import torch

    stops = [token for token in stop_tokens if token is not None]
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (stops or [0])[0]
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens

    def work(batch: list[int]) -> list[str]:
        width = max(len(prompts[i]) for i in batch)
        pads = [width - len(prompts[i]) for i in batch]
        ids = torch.tensor([[padding] * pad + prompts[i] for pad, i in zip(pads, batch, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads])
        generated = model.generate(  # pyright: ignore[reportCallIssue] (its mixin is typed as a Module)
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max(limits[i] for i in batch),
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,  # some models' own settings have another: then it is not greedy
            eos_token_id=stops or None,
            pad_token_id=padding,
        )
        texts = []
        for i, tokens in zip(batch, generated[:, width:].tolist(), strict=True):
            end = next((at for at, token in enumerate(tokens) if token in stops), len(tokens))
            end = min(end, limits[i])
            text = str(tokenizer.decode(tokens[:end], skip_special_tokens=True))
            cuts = [at for stop in stop_texts if (at := text.find(stop)) >= 0]
            texts.append(text[: min(cuts, default=len(text))].strip())
        return texts

    order = batches(prompts, batch_size)
    return spread(order, share(order, work, title))


def read_logits(
    model: "PreTrainedModel",
    sequences: Sequence[list[int]],
    score: "Callable[[int, Tensor, Tensor], T]",
    *,
    batch_size: int,
    title: str,
) -> list[T]:
    """`score(index, ids, logits)` of every sequence, from one forward a batch.

    Sequence `index` has T tokens: ids [T] int64, and logits [T, V] float32 of what follows each of them.
    """
    import torch

    def work(batch: list[int]) -> list[T]:
        rows = [torch.tensor(sequences[i]) for i in batch]
        # Padding comes after the text, where a causal model cannot see it; any token will do.
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
        lengths = torch.tensor([len(row) for row in rows], device=model.device)
        mask = (torch.arange(ids.shape[1], device=model.device) < lengths.unsqueeze(1)).long()
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            sizes = [len(row) for row in rows]
            return [
                score(i, ids[row, :size], logits[row, :size].float())
                for row, (i, size) in enumerate(zip(batch, sizes, strict=True))
            ]

    order = batches(sequences, batch_size, MOST_TOKENS)
    return spread(order, share(order, work, title))


def answer_losses(
    model: "PreTrainedModel", answers: Sequence[tuple[list[int], int]], *, batch_size: int, title: str
) -> list[float]:
    """Mean negative log-likelihood, in nats a token, of each answer given its question (see `chat.encode_answers`)."""
    from torch.nn.functional import cross_entropy

    def loss(index: int, ids: "Tensor", logits: "Tensor") -> float:
        start = max(answers[index][1], 1)  # nothing predicts a first token
        return cross_entropy(logits[start - 1 : -1], ids[start:]).item()

    return read_logits(model, [ids for ids, _ in answers], loss, batch_size=batch_size, title=title)


# ---------------------------------------------------------------------------------------------------------------------
# ROUGE-L recall, by the two packages that publications use


def recall_rouge(references: Sequence[str], answers: Sequence[str]) -> list[float]:
    """PyPI `rouge`: words as they stand (case, punctuation), each counted once, sentences cut at full stops."""
    from rouge import Rouge

    scorer: Any = Rouge(metrics=["rouge-l"], stats=["r"])
    given = [text if text.strip(".") else NO_ANSWER for text in answers]
    return [score["rouge-l"]["r"] for score in scorer.get_scores(given, list(references))]


def recall_rouge_score(references: Sequence[str], answers: Sequence[str]) -> list[float]:
    """PyPI `rouge_score` with stemming: lower case, ASCII letters and digits only, every occurrence counted."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = zip(references, answers, strict=True)
    return [scorer.score(reference, given)["rougeL"].recall for reference, given in pairs]


# ---------------------------------------------------------------------------------------------------------------------
# Scripts that write no space between words: both packages take a sentence for one word, or for nothing

# First words of the names that Unicode gives their characters (most are of the line-breaking classes ID and SA of
# Unicode Standard Annex 14, those between which a line may break without a space).
SPACELESS = {
    *("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "BOPOMOFO", "YI"),
    *("THAI", "LAO", "MYANMAR", "KHMER", "TAI", "TIBETAN", "JAVANESE", "BALINESE"),
}
SCRIPT_WORDS = "references in scripts without spaces by the character, in lower case, as longest common subsequence"


@cache
def _is_spaceless(character: str) -> bool:
    name = unicodedata.name(character, "").removeprefix("NEW ")  # New Tai Lue
    return unicodedata.category(character)[0] == "L" and name.replace("-", " ").split(" ")[0] in SPACELESS


def is_spaceless(text: str) -> bool:
    """Whether a letter of the text is of a script that writes no space between words."""
    return any(_is_spaceless(character) for character in unicodedata.normalize("NFKC", text))


def words(text: str) -> list[str]:
    """Words of letters and digits in lower case, compatible forms made one (NFKC), punctuation left out.

    A letter of a script without spaces is a word of its own, with the marks that stand on it.
    """
    if text.isascii():  # the same, faster
        return re.findall("[a-z0-9]+", text.lower())
    found: list[str] = []
    is_open = False  # whether the next letter goes on the last word
    for character in unicodedata.normalize("NFKC", text.casefold()):
        kind = unicodedata.category(character)[0]
        alone = _is_spaceless(character)
        if kind in "LN" and (alone or not is_open):
            found.append(character)
        elif found and (kind == "M" or kind in "LN"):
            found[-1] += character
        is_open = not alone and (kind in "LN" or (kind == "M" and is_open))
    return found


class _Words:
    """`words`, as rouge_score wants a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


def recall_by_script(
    references: Sequence[str], answers: Sequence[str], scorer: Callable[[Sequence[str], Sequence[str]], list[float]]
) -> list[float]:
    """`scorer` (one of the two above); but ROUGE-L recall over `words` where the reference has no spaces to split at.

    For suites of our own. Published protocols keep their scorers, with `script_note` in the answer.
    """
    from rouge_score.rouge_scorer import RougeScorer

    recalls = scorer(references, answers)
    by_character = RougeScorer(["rougeL"], tokenizer=_Words())
    for at, (reference, given) in enumerate(zip(references, answers, strict=True)):
        if is_spaceless(reference):
            recalls[at] = by_character.score(reference, given)["rougeL"].recall
    return recalls


def script_note(references: Sequence[str]) -> dict[str, str]:
    """{"rouge": what a published protocol makes of references in scripts without spaces}; {} where there are none."""
    count = sum(map(is_spaceless, references))
    if not count:
        return {}
    return {
        "rouge": f"{count} of {len(references)} reference answers are in a script without spaces between words, which "
        "the published scorers do not split: rouge takes a sentence for one word (0 or 1), rouge_score sees ASCII "
        "letters and digits alone"
    }
