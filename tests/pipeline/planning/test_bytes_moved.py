"""Bytes that kernels read and write, counted by hand from the operations of two rules."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.planning import combine_cost, step_cost
from pipeline.planning.bytes_moved import BytesMoved
from pipeline.synthesis import combine, partition
from pipeline.synthesis.combine import Synthesis
from pipeline.synthesis.windows import BLOCK, COMPILED

N = 1000


@pytest.mark.parametrize(
    ("work", "moved"),
    [
        (lambda a, b: a + b, 12 * N),
        (lambda a, b: a + a, 8 * N),  # one argument, read once
        (lambda a, b: a.mul_(b), 12 * N),
        (lambda a, b: torch.mul(a, b, out=b), 12 * N),
        (lambda a, b: torch.neg(a, out=b), 8 * N),  # what is written is not read
        (lambda a, b: a.copy_(b), 8 * N),
        (lambda a, b: a.zero_(), 4 * N),
        (lambda a, b: torch._foreach_copy_([a], [b]), 8 * N),  # pyright: ignore[reportPrivateImportUsage]
        (lambda a, b: a.double(), 12 * N),
        (lambda a, b: a.view(10, -1).t()[2:].unsqueeze(0), 0),
        (lambda a, b: a.split([1, N - 1]), 0),
        (lambda a, b: torch.empty_like(a), 0),
        (lambda a, b: a.sum(), 4 * N + 4),
        (lambda a, b: b[:1].expand(N) + a, 4 + 8 * N),
        (lambda a, b: a.index_select(0, torch.tensor([3, 5])), 8 + 8 + 2 * 8),  # 2 of N are read
    ],
)
def test_what_an_operation_moves(work: Callable[[Tensor, Tensor], Any], moved: int) -> None:
    a, b, counter = torch.randn(N), torch.randn(N), BytesMoved()
    with counter:
        work(a, b)
    assert counter.total == moved


# Bytes an element of one tensor in fp32. Signs: r.sign() 4 + 4, times f 8 + 4, below 0: 4 + 1.
SIGNS = 8 + 12 + 5
BY_BLOCK = 8 / BLOCK  # a sum in float64, which is written once a block, and read to add up the blocks
CONFLICTS = 1 + 4 * BY_BLOCK  # a bool is read, its sum written; to float64: read and written; and read by `stack`
# A product of vectors in float64: a square reads 8 and writes 8, another reads 16 and writes 8; its sum reads 8.
SQUARE, CROSS, STACKED = 16 + 8 + BY_BLOCK, 24 + 8 + BY_BLOCK, BY_BLOCK


def test_sago_as_counted_by_hand() -> None:
    """f and r times their weights, a choice of bits in three operations, 3 squares and 3 products, r overwritten."""
    mixtures = 2 * (4 + 4)
    choice = (4 + 4 + 4) + (4 + 1 + 4) + (4 + 4 + 4)
    sums = 3 * (4 + 8) + 3 * SQUARE + 3 * CROSS + CONFLICTS + 6 * STACKED + 7 * STACKED + 7 * STACKED
    expected = SIGNS + mixtures + choice + sums + (4 + 4)
    found = combine_cost.measure(Synthesis("sago", "element"), 1, 2**17, 1)
    assert expected == pytest.approx(287, abs=1)
    assert found.bytes_an_element == pytest.approx(expected, abs=0.3)
    assert combine_cost.row(1, found).endswith(f" | {found.bytes_an_element:.1f} |")


def test_pcgrad_as_counted_by_hand() -> None:
    """Two passes. Products of f and r; then r times its weight, f added to it, and the result copied to r."""
    first = SIGNS + 2 * (4 + 8) + 2 * SQUARE + CROSS + CONFLICTS
    second = (4 + 4) + (4 + 4 + 4) + (4 + 4)
    found = combine_cost.measure(Synthesis("pcgrad", "module"), 1, 2**17, 1)
    assert found.bytes_an_element == pytest.approx(first + second, abs=0.8)


def test_a_compiled_kernel_reads_and_writes_each_element_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """f and r are read, r is written: 12 bytes; and 7 sums a block, which are then added up."""
    monkeypatch.setattr(combine, "COMPILE_FROM", 0)
    monkeypatch.setattr(partition, "compiled", lambda function, constants, *_: partial(function, *constants))
    found = combine_cost.measure(Synthesis("sago", "element"), 1, COMPILED["cpu"], 1)
    assert found.bytes_an_element == pytest.approx(12 + 2 * 7 * BY_BLOCK, abs=0.01)


def test_a_file_without_the_figure_is_read() -> None:
    """`device_rows` makes the rows again from what an earlier version wrote."""
    assert combine_cost.row(1, combine_cost.Cost(kernels=1, syncs=None, nanoseconds=2.0)).endswith("| 2.0 | – |")
    before = step_cost.Cost(rule="sum", schedule="joint", seconds=[1.0])
    after = step_cost.Cost(rule="sum", schedule="sequential", seconds=[2.0], bytes_an_element=3.25)
    header, _, one, other = step_cost.table([before, after], 1).splitlines()
    assert header.endswith("| bytes an element, `combine()` |") and one.endswith("| – |") and other.endswith("| 3.2 |")
