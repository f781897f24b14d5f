"""A user's own corpora: how likely the model finds their documents, and how much of them it knows by heart.

FOLDER/corpus or FOLDER holds `forget`, `retain` and, if there is one, `other`, as `.txt` (a document a line), or as
`.jsonl` or another form that training reads: a document under `text`, or a question under `prompt` with its answer
under `response`. What to put there is the user's: documents of the forget corpus; documents like those of the retain
corpus but not out of it, so that the score is of knowledge and not of rehearsal; and under `other` what neither
mentions.

Two scores in [0, 1] a split, means over documents (of at most MOST_DOCUMENTS, always the same, cut at MOST_TOKENS or
the model's positions):

- `probability`: the geometric mean of the probabilities of its tokens, exp(-NLL a token), of the answer where there is
  a question (TOFU, Maini et al. 2024);
- `rouge`: ROUGE-L recall of greedy decoding: of a document's second half, given the first (verbatim memorisation, MUSE,
  Shi et al. 2024, there as F1), or of the answer; as many tokens as that has, at most MOST_NEW_TOKENS. By the word, and
  by the character where a script has no spaces between words (Chinese, Japanese, Thai, ...).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from eval.attacks.relearn import sample
from eval.suites import scoring
from eval.suites.rouge import SCRIPT_WORDS, recall_by_script, recall_rouge
from pipeline.config.schema import Corpus, format_of
from pipeline.data.chat import encode_answers
from pipeline.data.corpus import is_saved_dataset, read_rows, text_of
from pipeline.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Probe = dict[str, str]  # split, and text or prompt and response


SPLITS = ("forget", "retain", "other")


MOST_TOKENS, MOST_NEW_TOKENS = 512, 64


PROTOCOL = (
    f"documents cut at {MOST_TOKENS} tokens, or the model's positions; probability: exp of the mean log-probability of "
    "a token; rouge: ROUGE-L recall (PyPI rouge) of what is decoded greedily after the first half, or after the "
    f"question, as many tokens as the document has there, at most {MOST_NEW_TOKENS}; {SCRIPT_WORDS}"
)


def read_split(path: Path) -> list[dict[str, str]]:
    """The documents of a file or folder, read as training reads it, without empty ones; raises UnusableInput."""
    located = list(read_rows(Corpus(path=str(path)))[0])  # pyright: ignore[reportCallIssue]
    questions = bool(located) and isinstance(located[0][1], dict) and "prompt" in located[0][1]
    keys = ("prompt", "response") if questions else ("text",)
    rows = [{key: text_of(where, row, key) for key in keys} for where, row in located]
    rows = [row for row in rows if row[keys[-1]].strip()]
    if not rows:
        raise InputError(f"{path} holds no text; write a document a line, or objects with {', '.join(keys)}")
    return rows


def load_probes(folder: Path | None, suite: str = "corpus") -> list[Probe]:
    """The documents of all splits. Raises UnusableInput: no folder, no forget or retain file, a row without text."""
    if folder is None:
        raise InputError("suite corpus asks about your files: --data FOLDER with forget.txt and retain.txt (or .jsonl)")
    where = folder / "corpus" if (folder / "corpus").is_dir() else folder
    there = sorted(where.iterdir()) if where.is_dir() else []
    probes = []
    for split in SPLITS:
        files = [path for path in there if path.name.split(".")[0] == split and is_corpus(path)]
        if len(files) > 1:
            raise InputError(f"{where} has {files[0].name} and {files[1].name}; leave one")
        if not files and split != "other":
            raise InputError(
                f"{where} has no {split}.txt or {split}.jsonl, which suite corpus reads (nor {split} in another of the "
                "formats that training reads)"
            )
        probes += [{"split": split, **row} for file in files for row in sample(read_split(file), seed=0)]
    return probes


def is_corpus(path: Path) -> bool:
    """By its name, or by what is in the folder."""
    return is_saved_dataset(path) or (format_of(path) is not None and path.is_file())


def group_of(probe: Probe) -> str:
    """The text by which a row of a corpus is known to be of this probe (eval/attacks/matching.py)."""
    return probe["prompt"] if "prompt" in probe else probe["text"]


def forgotten(probe: Probe) -> bool:
    """Whether a probe asks for what was to be forgotten."""
    return probe["split"] == "forget"


class Encoded(NamedTuple):
    """A document as tokens: `scored` is the first of those whose probability counts, `asked` of those to be said."""

    ids: list[int]
    scored: int
    asked: int


def encode(tokenizer: PreTrainedTokenizerBase, probe: Probe, longest: int) -> Encoded:
    if "prompt" in probe:
        [(ids, start)] = encode_answers(tokenizer, [probe["prompt"]], [probe["response"]])
        return Encoded(ids[:longest], start, start)
    ids = tokenizer(probe["text"], truncation=True, max_length=longest).input_ids
    return Encoded(ids, 1, len(ids) // 2)  # nothing predicts a first token


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    probes: list[Probe],
    *,
    batch_size: int = 64,
    title: str = "corpus",
) -> dict[str, Any]:
    """{"metrics": {split: {"probability", "rouge"}}, "counts": {split: {"documents", "rouge"}}, "protocol": text}.

    A document without a predicted token counts nowhere, and one without words in what is to be said not under `rouge`.
    """
    model.eval()
    longest = min(MOST_TOKENS, getattr(model.config, "max_position_embeddings", None) or MOST_TOKENS)
    encoded = [encode(tokenizer, probe, longest) for probe in probes]
    found: dict[str, dict[str, list[float]]] = {probe["split"]: {"probability": [], "rouge": []} for probe in probes}

    scored = [number for number, one in enumerate(encoded) if len(one.ids) > max(one.scored, 1)]
    pairs = [(encoded[number].ids, encoded[number].scored) for number in scored]
    losses = scoring.answer_losses(model, pairs, batch_size=batch_size, title=f"{title} probability")
    for number, loss in zip(scored, losses, strict=True):
        found[probes[number]["split"]]["probability"].append(math.exp(-loss))

    asked, references = continuation_targets(tokenizer, encoded)
    answers = scoring.answer(
        model,
        tokenizer,
        [encoded[number].ids[: encoded[number].asked] for number in asked],
        max_new_tokens=[min(len(encoded[number].ids) - encoded[number].asked, MOST_NEW_TOKENS) for number in asked],
        stop_tokens=(tokenizer.eos_token_id,),
        stop_texts=(),
        batch_size=batch_size,
        title=f"{title} rouge",
    )
    recalls = recall_by_script(references, answers, recall_rouge)
    for number, recall in zip(asked, recalls, strict=True):
        found[probes[number]["split"]]["rouge"].append(recall)
    metrics = {split: {name: fmean(x) for name, x in scores.items() if x} for split, scores in found.items()}
    counts = {split: {"documents": len(x["probability"]), "rouge": len(x["rouge"])} for split, x in found.items()}
    return {"metrics": metrics, "counts": counts, "protocol": PROTOCOL}


def continuation_targets(tokenizer: PreTrainedTokenizerBase, encoded: Sequence[Encoded]) -> tuple[list[int], list[str]]:
    """Numbers of the documents of which something is left to say, and that."""
    numbers, texts = [], []
    for number, one in enumerate(encoded):
        rest = one.ids[one.asked : one.asked + MOST_NEW_TOKENS]
        text = str(tokenizer.decode(rest, skip_special_tokens=True)).strip()
        if one.asked and text.strip(". \n"):
            numbers.append(number)
            texts.append(text)
    return numbers, texts
