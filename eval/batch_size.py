"""How many prompts are in one batch: a number, or as many as the accelerator's memory holds.

`auto` begins with many and evaluates the suite again with half as many whenever memory does not suffice, on all ranks
together. Batches are worked on from the longest prompts down, so that a size that does not fit shows at once. The
scores are those of `--batch-size` with the number that was found.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Literal, TypeVar

from pipeline.errors import InputError

T = TypeVar("T")

AUTO = "auto"
DEFAULT = 64
MOST = 512  # where `auto` begins; without a GPU at DEFAULT, because there no error reports that memory is short


def rows_or_auto(text: str) -> int | Literal["auto"]:
    """The value of `--batch-size`; raises ArgumentTypeError if it is neither a number nor `auto`."""
    try:
        return AUTO if text == AUTO else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor {AUTO}") from None


class BatchSize:
    """Of one suite; what `auto` found for a model is where it begins for the next one."""

    def __init__(self, given: int | Literal["auto"]) -> None:
        import torch

        self.is_auto = given == AUTO
        self.rows = given if isinstance(given, int) else MOST if torch.cuda.is_available() else DEFAULT

    def fit(self, evaluate: Callable[..., T], name: str) -> T:
        """`evaluate(batch_size=rows)`, with half as many rows, if they are `auto`, whenever memory does not suffice.

        Args:
            name: of what is evaluated, for the message.

        Raises:
            InputError: the number that the user gave, or a single row, does not fit.
        """
        import torch

        from pipeline.modeling.weights import release_memory

        while True:
            try:
                return evaluate(batch_size=self.rows)
            except torch.OutOfMemoryError as error:
                lacks = " ".join(str(error).split())[:200]
            release_memory()  # here, where the error no longer references what the failed batch made
            if not self.is_auto:
                raise InputError(
                    f"{name}: memory does not hold --batch-size {self.rows} ({lacks}); give a smaller one, or auto"
                )
            if self.rows == 1:
                raise InputError(
                    f"{name}: memory does not hold a single prompt ({lacks}); spread the model by --device-map auto, "
                    "or shard it by --ds-config"
                )
            self.rows //= 2
