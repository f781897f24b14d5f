"""The scores of a model in its card, README.md of the model folder."""

from __future__ import annotations

import re
from pathlib import Path

from eval.reporting.pages import Heading, Table, as_markdown
from pipeline.files import write_whole

# In a card that training writes (pipeline/modeling/card.py); scores stand before the second.
OURS, PLACE = "tags: [unlearning]\n", "## How to use it\n"


def write_scores(model: Path, suite: str, rows: list[list[str]]) -> None:
    """Put the last row of a suite's table into the card of a model, in place of an earlier one of the suite.

    A row `before` stands above it. A card that this program did not write stays as it is.
    """
    card = model / "README.md"
    if not card.is_file():
        return
    text = card.read_text(encoding="utf-8")
    if OURS not in text or PLACE not in text:
        return
    begin, end = f"[//]: # (scores of {suite})\n", f"\n[//]: # (end of {suite})\n"  # which Markdown does not show
    before = [row for row in rows[1:-1] if row[0] == "before"]
    section = begin + as_markdown([Heading(f"Scores on {suite}"), Table([rows[0], *before, rows[-1]])]) + end
    earlier = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    written = earlier.sub(lambda _: section, text)
    write_whole(card, written if earlier.search(text) else text.replace(PLACE, section + PLACE, 1))
