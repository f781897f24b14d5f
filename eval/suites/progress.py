"""How far an evaluation is: a bar on a terminal, and elsewhere a line now and then, lest the program seem to hang."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from pipeline.distributed.terminal import can_redraw

if TYPE_CHECKING:
    import torch
    from transformers import StoppingCriteriaList

PROGRESS_EVERY_S = 10.0  # between two lines of progress where stderr is no terminal
_last_line = [float("-inf")]  # when this process printed the last one, whatever it was about


def announce(line: str, *, always: bool = False) -> None:
    """Print a line of progress on stderr, unless one was printed a moment ago. always: even then."""
    if always or time.monotonic() - _last_line[0] >= PROGRESS_EVERY_S:
        _last_line[0] = time.monotonic()
        print(line, file=sys.stderr, flush=True)


class Unit(NamedTuple):
    """What progress counts."""

    singular: str
    plural: str


class Progress:
    """Of this process, in units of `total`. Its `bar` is to be closed."""

    def __init__(self, total: int, title: str, unit: Unit, is_shown: bool) -> None:
        from pipeline.distributed.bar import Bar

        self.done, self.total, self.title, self.unit = 0, total, title, unit
        self.bar = Bar(title=f"{title}, {unit.singular}", total=total, is_shown=is_shown and can_redraw(sys.stderr))
        self.has_lines = is_shown and self.bar.disable
        self.began = time.monotonic()
        if _last_line[0] == float("-inf"):  # what takes no ten seconds needs no line
            _last_line[0] = self.began

    def advance(self, units: int = 1) -> None:
        self.done += units
        self.bar.update(units)
        if self.has_lines and 0 < self.done < self.total:
            left = (time.monotonic() - self.began) / self.done * (self.total - self.done)
            of = f"{self.done} of {self.total} {self.unit.plural}"
            announce(f"{self.title}: {of}, {timedelta(seconds=round(left))} left")


def after_each_token(call: Callable[[], None]) -> StoppingCriteriaList:
    """What makes `generate` call a function after each token, and stops nothing."""
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Calling(StoppingCriteria):
        def __call__(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> torch.BoolTensor:
            call()
            return cast(torch.BoolTensor, torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device))

    return StoppingCriteriaList([Calling()])
