"""A user's own corpora: how probable the model finds their documents, and how much of them it has memorised.

Without --data, a run folder gives them: the forget corpus of its config.yaml, and of the retain corpus the documents
that training did not see (heldout.jsonl, see `data.retain.heldout`) or, without such, those that it saw.

Else FOLDER/corpus or FOLDER holds `forget`, `retain` and optionally `other`, as `.txt` (one document for each line), or
as `.jsonl` or another format that training reads: a document under `text`, or a question under `prompt` with its answer
under `response`. The user chooses the content: documents of the forget corpus; documents that resemble the retain
corpus but are not part of it, so that the score measures knowledge and not rehearsal; and under `other` what neither
corpus mentions.

Each split has two scores in [0, 1], means over at most MOST_DOCUMENTS documents (always the same ones), cut at
MOST_TOKENS or the model's positions:

- `probability`: the geometric mean of the probabilities of its tokens, exp(-NLL a token), of the answer where there is
  a question (TOFU, Maini et al. 2024);
- `rouge`: ROUGE-L recall of greedy decoding: of a document's second half, given the first (verbatim memorisation, MUSE,
  Shi et al. 2024, there as F1), or of the answer; as many tokens as that has, at most MOST_NEW_TOKENS. It compares
  words, or characters where a script has no spaces between words (Chinese, Japanese, Thai, ...);
- `rouge_unseen`: about what `rouge` is for a model that never saw these documents but knows their kind: the recall of
  what the most similar other document of the split has in that place. It depends on no model.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from pydantic import ValidationError

from eval.results.method import refuse_changed
from eval.suites import NoData, scoring
from eval.suites.rouge import SCRIPT_WORDS, recall_by_script, recall_rouge, words
from eval.suites.texts import Answered, choose_texts
from pipeline.config.load import resolve
from pipeline.config.sources import Corpus, format_of
from pipeline.data.corpus import is_saved_dataset, normalised, read, read_rows, text_of
from pipeline.errors import InputError
from pipeline.files import Json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Probe = dict[str, str]  # split, and text or prompt and response


SPLITS = ("forget", "retain", "other")


MOST_TOKENS, MOST_NEW_TOKENS = 512, 64

MOST_DOCUMENTS = 500  # that are scored: the mean hardly changes with more, and a corpus may have millions

T = TypeVar("T")


PROTOCOL = (
    f"documents cut at {MOST_TOKENS} tokens, or the model's positions; probability: exp of the mean log-probability of "
    "a token; rouge: ROUGE-L recall (PyPI rouge) of what is decoded greedily after the first half, or after the "
    f"question, as many tokens as the document has there, at most {MOST_NEW_TOKENS}; {SCRIPT_WORDS}; rouge_unseen: "
    "what the most similar other document has there"
)


def sample(rows: Sequence[T], seed: int) -> list[T]:
    """At most MOST_DOCUMENTS of the rows, chosen by `seed`."""
    return list(rows) if len(rows) <= MOST_DOCUMENTS else random.Random(seed).sample(list(rows), MOST_DOCUMENTS)


def read_split(path: Path) -> list[Probe]:
    """The documents of a file or folder that are not empty, read as training reads them; raises InputError."""
    located = list(read_rows(Corpus(path=str(path)))[0])  # pyright: ignore[reportCallIssue]
    questions = bool(located) and isinstance(located[0][1], dict) and "prompt" in located[0][1]
    keys = ("prompt", "response") if questions else ("text",)
    rows = [{key: text_of(where, row, key) for key in keys} for where, row in located]
    rows = [row for row in rows if row[keys[-1]].strip()]
    if not rows:
        raise InputError(f"{path} holds no text; write a document a line, or objects with {', '.join(keys)}")
    return rows


def probes_of_run(run: Path) -> list[Probe]:
    """The documents of a run's own corpora: of `retain`, those that training did not see, if some were set aside.

    Raises:
        InputError: no such run, a run without one of the corpora, or a corpus that can no longer be read or is
            another one by now.
    """
    data, heldout, probes = resolve(run / "config.yaml", reads_data=False).data, run / "heldout.jsonl", []
    for split, corpus in (("forget", data.forget), ("retain", data.retain)):
        if split == "retain" and heldout.is_file():
            probes += [{"split": split, **row} for row in sample(read_split(heldout), seed=0)]
            continue
        if corpus is None:
            raise InputError(f"{run} has no data.{split}; give --data FOLDER with {split}.txt and its counterpart")
        try:
            refuse_changed(run, f"data.{split}", corpus)
            rows = [row for row in read(corpus, split)[0] if row.texts[0].strip()]
        except InputError as error:
            if Path(corpus.path).is_absolute() or Path(corpus.path).exists():
                raise
            raise InputError(
                f"{error}; start this command where the run was started, or give --data FOLDER with copies"
            ) from error
        for row in sample(rows, seed=0):
            content = {"text": row.texts[0]} if row.prompt is None else {"prompt": row.prompt, "response": row.texts[0]}
            probes.append({"split": split, **content})
    return probes


def load_probes(folder: Path | None, suite: str = "corpus", run: Path | None = None) -> list[Probe]:
    """The documents of all splits, of `folder` (--data, which may be a run folder) or else of the evaluated run.

    Raises:
        InputError: neither is given, no forget or retain file, a row without text.
    """
    if folder is None and run is None:
        raise InputError(
            "suite corpus scores your own files, and --model is no run folder (with config.yaml), which names them: "
            "correct its path, or give --data FOLDER with forget.txt and retain.txt (or .jsonl), or a run folder"
        )
    if folder is None or (folder / "config.yaml").is_file():
        own = folder or run
        assert own is not None
        return probes_of_run(own)
    where = folder / "corpus" if (folder / "corpus").is_dir() else folder
    there = sorted(where.iterdir()) if where.is_dir() else []
    of_splits = {split: [path for path in there if path.name.split(".")[0] == split] for split in SPLITS}
    found = {split: [path for path in paths if is_corpus(path)] for split, paths in of_splits.items()}
    probes = []
    for split, files in found.items():
        if len(files) > 1:
            raise InputError(f"{where} has {files[0].name} and {files[1].name}; leave one")
        if not files and split != "other":
            text = (
                f"{where} has no {split}.txt or {split}.jsonl, which suite corpus reads (nor {split} in another of the "
                "formats that training reads)"
            )
            raise InputError(text) if any(found.values()) else NoData(text, has_own=run is not None)
        probes += [{"split": split, **row} for file in files for row in sample(read_split(file), seed=0)]
    return probes


def is_corpus(path: Path) -> bool:
    """Whether training reads the file (by its name) or the folder (by its content)."""
    return is_saved_dataset(path) or (format_of(path) is not None and path.is_file())


def group_of(probe: Probe) -> str:
    """The text by which a row of a corpus is known to be about this probe (eval/attacks/matching.py)."""
    return probe["prompt"] if "prompt" in probe else probe["text"]


def forgotten(probe: Probe) -> bool:
    """Whether a probe belongs to the forget set."""
    return probe["split"] == "forget"


class Encoded(NamedTuple):
    """A document as tokens: the probability counts from token `scored`, and decoding begins at token `continued`."""

    ids: list[int]
    scored: int
    continued: int


def encode(tokenizer: PreTrainedTokenizerBase, probe: Probe, max_length: int) -> Encoded:
    if "prompt" in probe:
        ids, start = scoring.encode_document(tokenizer, probe["response"], max_length, question=probe["prompt"])
        return Encoded(ids, start, start)
    ids, start = scoring.encode_document(tokenizer, probe["text"], max_length)
    return Encoded(ids, start, len(ids) // 2)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    probes: list[Probe],
    *,
    batch_size: int = 64,
    title: str = "corpus",
) -> Json:
    """{"metrics": {split: {"probability", "rouge", "rouge_unseen"}}, "counts": {split: {"documents", "rouge"}},
    "protocol": text, "texts": {split: [{"prompt", "expected", "answer"}, …]} (see `choose_texts`)}.

    Raises:
        InputError: a split has no document with a token to predict.

    A document without a predicted token counts nowhere, one without words to decode does not count under `rouge`, and a
    split whose documents all continue with the same words has no `rouge_unseen`.
    """
    model.eval()
    max_length = min(MOST_TOKENS, scoring.positions_of(model) or MOST_TOKENS)
    encoded = [encode(tokenizer, probe, max_length) for probe in probes]
    found: dict[str, dict[str, list[float]]] = {
        probe["split"]: {"probability": [], "rouge": [], "rouge_unseen": []} for probe in probes
    }

    scored = [number for number, one in enumerate(encoded) if len(one.ids) > one.scored]
    there = {probes[number]["split"] for number in scored}
    if lacking := [split for split in found if split not in there]:
        raise InputError(f"{title}: no document of {lacking[0]} has a second token; give longer ones")
    pairs = [(encoded[number].ids, encoded[number].scored) for number in scored]
    losses = scoring.answer_losses(model, pairs, batch_size=batch_size, title=f"{title} probability")
    for number, loss in zip(scored, losses, strict=True):
        found[probes[number]["split"]]["probability"].append(math.exp(-loss))

    continued, references = continuation_targets(tokenizer, encoded)
    limits = [min(len(encoded[n].ids) - encoded[n].continued, MOST_NEW_TOKENS) for n in continued]
    answers = scoring.answer(
        model,
        tokenizer,
        [encoded[number].ids[: encoded[number].continued] for number in continued],
        stopping=scoring.Stopping(limits, scoring.ends_of_answer(model, tokenizer)),
        batch_size=batch_size,
        title=f"{title} rouge",
    )
    recalls = recall_by_script(references, answers, recall_rouge)
    splits = [probes[number]["split"] for number in continued]
    for split, recall in zip(splits, recalls, strict=True):
        found[split]["rouge"].append(recall)
    prompts = [prompt_of(tokenizer, probes[number], encoded[number]) for number in continued]
    for at, recall in unseen_recalls(splits, prompts, references).items():
        found[splits[at]]["rouge_unseen"].append(recall)
    rows = zip(splits, prompts, references, answers, strict=True)
    texts = choose_texts((split, Answered(prompt=p, expected=e, answer=a)) for split, p, e, a in rows)
    metrics = {split: {name: fmean(x) for name, x in scores.items() if x} for split, scores in found.items()}
    counts = {split: {"documents": len(x["probability"]), "rouge": len(x["rouge"])} for split, x in found.items()}
    return {"metrics": metrics, "counts": counts, "protocol": PROTOCOL, "texts": texts}


def unseen_recalls(splits: Sequence[str], prompts: Sequence[str], references: Sequence[str]) -> dict[int, float]:
    """{index of a document: recall of what the document of its split with the most similar prompt has instead}.

    Similar: the share of words (as sets) that two prompts have in common; of equally similar ones the first. Documents
    with the same reference do not count, and one without any other document is left out.
    """
    numbers: dict[str, int] = {}
    sets = [sum(1 << numbers.setdefault(word, len(numbers)) for word in {*words(text)}) for text in prompts]

    def similarity(one: int, other: int) -> float:
        return (sets[one] & sets[other]).bit_count() / max((sets[one] | sets[other]).bit_count(), 1)

    instead: dict[int, str] = {}
    for split in dict.fromkeys(splits):
        own = [at for at, other in enumerate(splits) if other == split]
        for at in own:
            others = [other for other in own if references[other] != references[at]]
            if others:
                instead[at] = references[max(others, key=lambda other: similarity(at, other))]
    recalls = recall_by_script([references[at] for at in instead], [*instead.values()], recall_rouge)
    return dict(zip(instead, recalls, strict=True))


def prompt_of(tokenizer: PreTrainedTokenizerBase, probe: Probe, encoded: Encoded) -> str:
    """What a reader sees as the prompt: the question, or the part of the document from which the model continued."""
    if "prompt" in probe:
        return probe["prompt"]
    return str(tokenizer.decode(encoded.ids[: encoded.continued], skip_special_tokens=True))


def seen_in_training(probes: Sequence[Probe], config: Json) -> dict[str, int] | None:
    """{"documents", "seen"}: how many documents the split `retain` has, and how many of them are rows of the retain
    corpus of a run, but for case and white space.

    Args:
        config: the resolved configuration of the run.

    Returns None if the run has no retain corpus, or if it can no longer be read where the configuration names it.
    """
    section = (config.get("data") or {}).get("retain")
    if not section:
        return None
    try:
        rows = [(row.prompt or "", row.texts[0]) for row in read(Corpus(**section), "retain")[0]]
    except (InputError, ValidationError):
        return None
    own = [probe for probe in probes if probe["split"] == "retain"]
    pairs = [(probe.get("prompt", ""), probe.get("response", probe.get("text", ""))) for probe in own]
    trained = {tuple(map(normalised, pair)) for pair in rows}
    return {"documents": len(own), "seen": sum(tuple(map(normalised, pair)) in trained for pair in pairs)}


def continuation_targets(tokenizer: PreTrainedTokenizerBase, encoded: Sequence[Encoded]) -> tuple[list[int], list[str]]:
    """Numbers of the documents that have words after the prompt, and these words."""
    numbers, texts = [], []
    for number, one in enumerate(encoded):
        rest = one.ids[one.continued : one.continued + MOST_NEW_TOKENS]
        text = str(tokenizer.decode(rest, skip_special_tokens=True)).strip()
        if one.continued and text.strip(". \n"):
            numbers.append(number)
            texts.append(text)
    return numbers, texts
