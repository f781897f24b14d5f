"""Answers of several models to the same prompts, side by side, with the words marked in which they differ."""

from __future__ import annotations

import difflib
import html
import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass

from eval.results.texts import Sides

MOST_PROMPT, MOST_ANSWER = 400, 1200  # characters that are shown; evaluation.json has all


@dataclass(frozen=True)
class Answers:
    """Prompts with the right answer and those of the models `names`. If `before`, the first model is the one before
    unlearning, in which the words are marked that no other answer contains, and in the others the words that it lacks.
    The first `shown` are visible, and the others unfold.
    """

    title: str
    names: tuple[str, ...]
    rows: list[Sides]
    before: bool
    shown: int


def pieces(text: str) -> list[str]:
    """Words and the white space between them, which together are the text."""
    return re.findall(r"\s+|\S+", text)


def changed(one: str, other: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Each text as (piece, whether it is a word that the other lacks there): the difference of their words, by difflib.

    White space is compared with nothing: a space that matches a space would keep words apart that match.
    """
    texts = (pieces(one), pieces(other))
    places = [[at for at, piece in enumerate(text) if piece.strip()] for text in texts]
    words = [[text[at] for at in of] for text, of in zip(texts, places, strict=True)]
    found = difflib.SequenceMatcher(None, *words, autojunk=False).get_matching_blocks()
    unchanged = [
        {places[side][at] for block in found for at in range(block[side], block[side] + block.size)} for side in (0, 1)
    ]
    before, after = (
        [(piece, bool(piece.strip()) and at not in same) for at, piece in enumerate(text)]
        for text, same in zip(texts, unchanged, strict=True)
    )
    return before, after


def marked(sides: Sides, before: bool) -> list[list[tuple[str, bool]]]:
    """The answer of each model as (piece, whether it is marked)."""
    texts = [shorten(text) for text in sides.answers]
    if not before or len(texts) < 2:
        return [[(piece, False) for piece in pieces(text)] for text in texts]
    pairs = [changed(texts[0], text) for text in texts[1:]]
    # In the answer before: what every other model dropped.
    first = [(piece, all(own[at][1] for own, _ in pairs)) for at, piece in enumerate(pieces(texts[0]))]
    return [first, *(other for _, other in pairs)]


def shorten(text: str) -> str:
    return text if len(text) <= MOST_ANSWER else text[:MOST_ANSWER] + " …"


def ending(prompt: str) -> str:
    """The end of a long prompt: a text is continued from there."""
    return prompt if len(prompt) <= MOST_PROMPT else "… " + prompt[-MOST_PROMPT:]


def spaces_with_words(parts: list[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """White space marked where both of its neighbours are, and nowhere else."""
    words = [mark and bool(piece.strip()) for piece, mark in parts]
    between = [0 < at < len(parts) - 1 and words[at - 1] and words[at + 1] for at in range(len(parts))]
    return [(piece, words[at] or (not piece.strip() and between[at])) for at, (piece, _) in enumerate(parts)]


def joined(parts: Iterable[tuple[str, bool]], tag: str) -> str:
    """HTML, escaped, with each run of marked words inside one element."""
    found, is_open = [], False
    for piece, mark in spaces_with_words([*parts]):
        if mark != is_open:
            found.append(f"<{tag}>" if mark else f"</{tag}>")
            is_open = mark
        found.append(html.escape(piece))
    return "".join(found) + (f"</{tag}>" if is_open else "")


def answer_html(sides: Sides, answers: Answers) -> str:
    cells = [("right answer", html.escape(shorten(sides.expected)))]
    for at, (name, parts) in enumerate(zip(answers.names, marked(sides, answers.before), strict=True)):
        cells.append((name, joined(parts, "del" if answers.before and at == 0 else "ins") or "<i>(nothing)</i>"))
    body = "".join(f"<div><small>{html.escape(name)}</small><span>{text}</span></div>" for name, text in cells)
    return f'<div class="answer"><h4>{html.escape(ending(sides.prompt))}</h4><div class="answers">{body}</div></div>'


def answers_html(answers: Answers) -> str:
    cards = [answer_html(sides, answers) for sides in answers.rows]
    first, rest = cards[: answers.shown], cards[answers.shown :]
    more = f"<details><summary>{len(rest)} more</summary><div class=answers>{''.join(rest)}</div></details>"
    shown = f'<div class="answers">{"".join(first)}</div>' if first else ""
    return f"<h3>{html.escape(answers.title)}</h3>{shown}{more if rest else ''}"


def answers_markdown(answers: Answers) -> str:
    """A table of the answers that the page shows unfolded; words that differ are bold."""

    def cell(parts: Iterable[tuple[str, bool]]) -> str:
        runs = itertools.groupby(spaces_with_words([*parts]), key=lambda part: part[1])
        texts = [(mark, escaped("".join(piece for piece, _ in run))) for mark, run in runs]
        return "".join(f"**{text}**" if mark else text for mark, text in texts) or "*(nothing)*"

    header = ["prompt", "right answer", *answers.names]
    lines = [header, ["---"] * len(header)]
    for sides in answers.rows[: max(answers.shown, 1)]:
        plain = [[(text, False)] for text in (ending(sides.prompt), shorten(sides.expected))]
        lines.append([cell(parts) for parts in (*plain, *marked(sides, answers.before))])
    return f"### {answers.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escaped(text: str) -> str:
    """The text inside a cell of a table of Markdown."""
    return re.sub(r"([|*_`<\\])", r"\\\1", text.replace("\n", " "))
