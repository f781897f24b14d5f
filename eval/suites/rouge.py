"""ROUGE-L recall: by words of any alphabet, or by characters in scripts without spaces."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from eval.suites.scoring import NO_ANSWER


def recall_rouge(references: Sequence[str], answers: Sequence[str]) -> list[float]:
    """PyPI `rouge`: words with case and punctuation, each counted once, sentences cut at full stops."""
    from rouge import Rouge

    scorer: Any = Rouge(metrics=["rouge-l"], stats=["r"])
    answered = [text if text.strip(".") else NO_ANSWER for text in answers]
    return [score["rouge-l"]["r"] for score in scorer.get_scores(answered, list(references))]


def recall_rouge_score(references: Sequence[str], answers: Sequence[str]) -> list[float]:
    """PyPI `rouge_score` with stemming: lower case, ASCII letters and digits only, every occurrence counted."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = zip(references, answers, strict=True)
    return [scorer.score(reference, answer)["rougeL"].recall for reference, answer in pairs]


def f1_rouge_score(references: Sequence[str], answers: Sequence[str]) -> list[float]:
    """PyPI `rouge_score` without stemming: F1 of ROUGE-L, as MUSE has it."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    pairs = zip(references, answers, strict=True)
    return [scorer.score(reference, answer)["rougeL"].fmeasure for reference, answer in pairs]


# First words of the names that Unicode gives their characters (most are of the line-breaking classes ID and SA of
# Unicode Standard Annex 14, those between which a line may break without a space).
SPACELESS = {
    *("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "BOPOMOFO", "YI"),
    *("THAI", "LAO", "MYANMAR", "KHMER", "TAI", "TIBETAN", "JAVANESE", "BALINESE"),
}


SCRIPT_WORDS = "references in scripts without spaces by the character, in lower case, as longest common subsequence"


WORDS_OF_ALPHABETS = "references with letters beyond a to z by their words in lower case, without stemming"


@cache
def _is_spaceless(character: str) -> bool:
    name = unicodedata.name(character, "").removeprefix("NEW ")  # New Tai Lue
    return unicodedata.category(character)[0] == "L" and name.replace("-", " ").split(" ")[0] in SPACELESS


def is_spaceless(text: str) -> bool:
    """Whether a letter of the text is of a script that writes no space between words."""
    return any(_is_spaceless(character) for character in unicodedata.normalize("NFKC", text))


def unseen_letters(text: str) -> float:
    """The share of a text's letters and digits that rouge_score does not see: all of Cyrillic, the é of café."""
    if text.isascii():
        return 0.0
    letters = [character for character in text.lower() if unicodedata.category(character)[0] in "LN"]
    return sum(not character.isascii() for character in letters) / max(len(letters), 1)


def words(text: str) -> list[str]:
    """Words of letters and digits in lower case, with compatible forms unified (NFKC) and without punctuation.

    A letter of a script without spaces is a word of its own, together with its marks.
    """
    if text.isascii():  # the same, faster
        return re.findall("[a-z0-9]+", text.lower())
    found: list[str] = []
    is_open = False  # whether the next letter continues the last word
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
    """`words` in the interface that rouge_score needs for a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


def recall_by_script(
    references: Sequence[str], answers: Sequence[str], scorer: Callable[[Sequence[str], Sequence[str]], list[float]]
) -> list[float]:
    """`scorer` (one of the two above), but ROUGE-L recall over `words` of a reference that it cannot read: one without
    spaces to split at or, of rouge_score, one with letters that it does not see, so that no answer would ever count.

    For the suites of this repository. Published protocols keep their scorers, and `script_note` is in their results.
    """
    from rouge_score.rouge_scorer import RougeScorer

    recalls = scorer(references, answers)
    by_words = RougeScorer(["rougeL"], tokenizer=_Words())
    for at, (reference, answer) in enumerate(zip(references, answers, strict=True)):
        if is_spaceless(reference) or (scorer is recall_rouge_score and unseen_letters(reference)):
            recalls[at] = by_words.score(reference, answer)["rougeL"].recall
    return recalls


MOST_OF_IT = 0.5  # of its letters: a text with more of them unseen is in another alphabet, and has not only accents


def script_note(references: Sequence[str]) -> dict[str, str]:
    """{"rouge": which references the published scorers do not read, and how they treat them}; {} if there are none."""
    spaceless = sum(map(is_spaceless, references))
    unseen = sum(unseen_letters(text) > MOST_OF_IT and not is_spaceless(text) for text in references)
    found = []
    if spaceless:
        found.append(
            f"{spaceless} of {len(references)} reference answers are in a script without spaces between words, which "
            "the published scorers do not split: rouge takes a sentence for one word (0 or 1), rouge_score sees ASCII "
            "letters and digits alone"
        )
    if unseen:
        found.append(
            f"{unseen} of {len(references)} reference answers are in another alphabet than a to z, of which "
            "rouge_score sees no letter: they score 0 whatever the model says"
        )
    return {"rouge": "; ".join(found)} if found else {}
