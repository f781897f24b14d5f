"""The rows of a run's log, `metrics.jsonl`: one a step, and before them the row of a probe before the first step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from pipeline.errors import InputError
from pipeline.files import Json
from pipeline.monitoring.levels import PREFIX


@dataclass
class Rows:
    """The rows of a log by what they are.

    A row of step 0 belongs to no step: it has the probes of the model that the run begins with, and no loss.
    """

    steps: list[Json] = field(default_factory=list)  # in their order; row["step"] counts from 1
    before: Json | None = None

    def add(self, row: Json) -> None:
        """Add the next row of the log."""
        if row["step"]:
            self.steps.append(row)
        else:
            self.before = row

    @property
    def all(self) -> list[Json]:
        """Every row, in the order of the file."""
        return self.steps if self.before is None else [self.before, *self.steps]

    @property
    def probed(self) -> list[Json]:
        """The rows with numbers of probes, in the order of the file."""
        return [row for row in self.all if any(key.startswith(PREFIX) for key in row)]


def read_rows(located: Iterable[tuple[str, object]]) -> Rows:
    """The rows of a log, of which each comes with its place for messages.

    Raises:
        InputError: a row without a step, or with one that does not follow the step before; names its place.
    """
    rows, last = Rows(), -1
    for place, row in located:
        step = row.get("step") if isinstance(row, dict) else None
        if not isinstance(row, dict) or type(step) is not int or step <= last:
            raise InputError(
                f"{place}: needs an object with step, a whole number above that of the row before it; repair or remove "
                "the line"
            )
        rows.add(row)
        last = step
    return rows
