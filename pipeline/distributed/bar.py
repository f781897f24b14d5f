"""The one form of a progress bar that is redrawn on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, MutableMapping
from typing import Any

from tqdm import tqdm

# The bar stands last, because a narrow terminal cuts the end of the line.
LAYOUT = "{desc} {n_fmt}/{total_fmt}: {pace}, {remaining} left{postfix} |{bar}|"
WITHOUT_TOTAL = "{desc} {n_fmt}: {pace}"


class Bar(tqdm):
    """`title 3/10: 33.9 s each, 03:57 left |###   |` on stderr; of an iterable without a length, number and pace.

    tqdm's own line writes a unit behind a count as well as behind "s/", and no text reads well in both places.

    Args:
        is_shown: whether the bar is drawn: on the rank that prints, where stderr is a terminal that can redraw a line.
        leave: whether the last state stays on the screen; other bars vanish, because a line with the result follows.
    """

    def __init__(
        self,
        iterable: Iterable[object] | None = None,
        *,
        title: str,
        is_shown: bool,
        total: int | None = None,
        initial: int = 0,
        leave: bool = False,
    ) -> None:
        super().__init__(
            iterable,
            title,
            total=total,
            initial=initial,
            leave=leave,
            disable=not is_shown,
            file=sys.stderr,
            mininterval=0.5,
            dynamic_ncols=True,
        )

    @property
    def format_dict(self) -> MutableMapping[str, Any]:
        """What tqdm formats its line from, here with the layout and the pace."""
        fields = super().format_dict
        done, elapsed = self.n - fields["initial"], fields["elapsed"]
        fields["pace"] = pace(fields["rate"] or (done / elapsed if elapsed else 0))
        fields["bar_format"] = WITHOUT_TOTAL if self.total is None else LAYOUT
        return fields


def pace(rate: float) -> str:
    """A number a second in words: `4.8 a second`, `33.9 s each` below one a second, `? s each` before the first."""
    if rate >= 1:
        return f"{rate:.3g} a second"
    return f"{1 / rate:.3g} s each" if rate else "? s each"
