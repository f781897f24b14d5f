"""`data.packing: auto`: blocks or documents, by what the corpora hold."""

from __future__ import annotations

from itertools import islice
from typing import Literal

from transformers import PreTrainedTokenizerBase

from pipeline.config.schema import Corpus
from pipeline.data.corpus import read

SAMPLE = 1000  # documents at the start of a corpus whose length is measured


def mean_length(corpus: Corpus, key: str, tokenizer: PreTrainedTokenizerBase) -> float:
    """Mean number of tokens of the first SAMPLE documents that are not empty; 0 if there are none.

    Raises:
        InputError: see `corpus.read`; `key` names the corpus.
    """
    texts = [row.texts[0] for row in islice(read(corpus, key)[0], SAMPLE) if row.texts[0].strip()]
    return sum(map(len, tokenizer(texts, verbose=False).input_ids)) / len(texts) if texts else 0.0


def choose_packing(
    corpora: dict[str, Corpus], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[Literal["blocks", "documents"], str]:
    """The packing for corpora of plain text, and why.

    Blocks waste no padding, but join what does not belong together: they are for documents that fill at least half a
    sequence on average. Short lines (facts, sentences) are sequences of their own, or a small corpus would be a handful
    of blocks.

    Raises:
        InputError: see `corpus.read`.
    """
    if tokenizer.eos_token_id is None:
        return "documents", "the tokenizer has no end-of-text token to put between the documents of a block"
    lengths = {key: mean_length(corpus, key, tokenizer) for key, corpus in corpora.items()}
    key = min(lengths, key=lambda name: lengths[name])
    packing = "documents" if lengths[key] < max_length / 2 else "blocks"
    compared = "less than" if packing == "documents" else "at least"
    return packing, (
        f"the documents of data.{key} have {lengths[key]:.0f} tokens on average, {compared} half of data.max_length "
        f"{max_length}"
    )
