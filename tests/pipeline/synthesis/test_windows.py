"""The windows against the plain combination, tensor by tensor: the same gradient bit for bit, whatever the cuts."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.synthesis import combine, kernels, windows
from pipeline.synthesis.combine import COLUMNS, Piece, Synthesis, units_of
from pipeline.synthesis.rules import RULES, SCOPES
from tests.pipeline.synthesis.literature import CLASSIC
from tests.pipeline.synthesis.plain import combine_plainly_

CASES = [(rule, scope) for rule in CLASSIC for scope in SCOPES if scope in RULES[rule].scopes]
every_rule_and_scope = pytest.mark.parametrize(("rule", "scope"), CASES)
SIZES = (1000, 1, 0, 63, 64, 65, 128, 700, 3, 3, 3, 2500, 1, 512)  # with windows of 512: whole, shared, tiny, empty
ROWS = (0, 1, 2, 3, 4, 5, 6, 0, 8, 9, 8, 11, 12, 7)  # rows 0 and 8 have two pieces that do not touch, 10 and 13 none
LAYERS = "aabbbccccdddee"


@pytest.fixture(params=[512, 2**17])
def small_windows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "eager_window", lambda device: request.param)
    windows.plan.cache_clear()


def vector(seed: int, dtype: torch.dtype) -> Tensor:
    """Signs, zeros of both signs, and a tensor that would drown its neighbours."""
    values = torch.randn(sum(SIZES), generator=torch.Generator().manual_seed(seed))
    values[seed::7] = 0.0
    values[seed::11] = -0.0
    values[1100:1200] *= 100.0
    return values.to(dtype)


def lay_out(flat: Tensor, separate: bool) -> list[Tensor]:
    """Slices of one vector, or tensors of their own."""
    return [part.clone() if separate else part for part in flat.clone().split(SIZES)]


def make_pieces(dtype: torch.dtype, separate: bool, averages: bool) -> list[Piece]:
    lists = [lay_out(vector(seed, dtype), separate) for seed in (1, 2)]
    state = torch.float32 if dtype == torch.float16 else dtype
    m: Sequence[Tensor | None] = lay_out(vector(3, state), separate) if averages else [None] * len(SIZES)
    return [Piece(*piece) for piece in zip(ROWS, *lists, m, strict=True)]


@every_rule_and_scope
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.usefixtures("small_windows")
def test_equals_the_plain_combination(rule: str, scope: str, dtype: torch.dtype, separate: bool) -> None:
    for zero_forget in ("literal", "retain") if rule == "sago" else ("literal",):
        synthesis, units = Synthesis(rule, scope, 0.7, 0.3, zero_forget), units_of(scope, LAYERS)
        ours, theirs = (make_pieces(dtype, separate, synthesis.averages_retain) for _ in range(2))
        table = synthesis.combine_(ours, units, scale=4.0)
        want = torch.tensor(combine_plainly_(synthesis, theirs, units, scale=4.0), dtype=torch.float64)
        for mine, other in zip(ours, theirs, strict=True):
            if dtype == torch.float64 and scope != "element":  # a weight's last bit follows the order of additions
                torch.testing.assert_close(mine.retain, other.retain, rtol=1e-13, atol=1e-13)
            else:
                assert torch.equal(mine.retain, other.retain)
            assert mine.average is None or other.average is None or torch.equal(mine.average, other.average)
        norms = {"f": want[:, 0].sqrt(), "r": want[:, 2].sqrt(), "g": want[:, 5].sqrt(), "a": want[:, 9].sqrt()}
        for number, name in enumerate(COLUMNS):
            bound = torch.ones(len(want)) if name == "conflicts" else norms[name[0]] * norms[name[1]]
            assert ((table[:, number] - want[:, number]).abs() <= 3e-14 * bound).all(), name


@pytest.mark.usefixtures("small_windows")
def test_sums_are_those_of_exact_arithmetic() -> None:
    """`math.fsum` rounds once: products of float32 are exact in float64."""
    pieces = make_pieces(torch.float32, False, False)
    want = [[0.0] * 3 for _ in ROWS]
    for row in range(len(ROWS)):
        mine = [piece for piece in pieces if piece.row == row]
        f = torch.cat([torch.empty(0), *(piece.forget for piece in mine)]).double()
        r = torch.cat([torch.empty(0), *(piece.retain for piece in mine)]).double()
        want[row] = [math.fsum((a * b).tolist()) for a, b in ((f, f), (f, r), (r, r))]
    table = Synthesis("sum").combine_(pieces, units_of("global", ROWS))
    for (ff, fr, rr), found in zip(want, table.tolist(), strict=True):
        assert found[0] == pytest.approx(ff, rel=3e-14) and found[2] == pytest.approx(rr, rel=3e-14)
        assert found[1] == pytest.approx(fr, rel=0, abs=3e-14 * (ff * rr) ** 0.5)


@pytest.mark.usefixtures("small_windows")
def test_a_weight_that_float32_cannot_hold_beside_others() -> None:
    """Each module is computed in the precision that its own weights need."""
    f, r = (torch.cat([torch.randn(70), scale * torch.randn(70)]) for scale in (1e10, 1e-30))
    f[70:] = -r[70:].sign() * f[70:].abs()  # in conflict
    ours, theirs = ([Piece(0, f[:70], r[:70]), Piece(1, f[70:], r[70:])] for r in (r.clone(), r.clone()))
    synthesis = Synthesis("pcgrad", "module")
    synthesis.combine_(ours, [0, 1])
    combine_plainly_(synthesis, theirs, [0, 1])
    assert all(torch.equal(a.retain, b.retain) for a, b in zip(ours, theirs, strict=True))


def test_neighbours_in_memory_are_one_view() -> None:
    flat, other = torch.arange(10.0), torch.arange(3.0)
    parts = [flat[:4], flat[4:4], flat[4:9], other, other[:2], flat[9:], torch.ones(1).expand(5), flat[0:6:2]]
    joined = windows.join_neighbours(parts)
    assert [part.tolist() for part in joined[:5]] == [list(range(9)), [0, 1, 2], [0, 1], [9], [1] * 5]
    assert joined[5].tolist() == [0, 2, 4] and joined[0].data_ptr() == flat.data_ptr()


class Operations(TorchDispatchMode):
    """The operations that compute something: neither views nor new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and "empty" not in func.__name__:
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def operations_of(rule: str, scope: str, tensors: int, elements: int = 2**18) -> list[str]:
    f, r = (torch.randn(elements, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
    sizes = [elements // tensors + (row < elements % tensors) for row in range(tensors)]
    pieces = [Piece(row, *pair) for row, pair in enumerate(zip(f.split(sizes), r.split(sizes), strict=True))]
    units = units_of(scope, range(tensors))
    Synthesis(rule, scope).combine_(pieces, units)  # the layout is planned once
    with Operations() as counted:
        Synthesis(rule, scope).combine_(pieces, units)
    return counted.names


@pytest.mark.parametrize(("rule", "scope"), [("sago", "element"), ("pcgrad", "module"), ("sago", "layer")])
def test_the_number_of_kernels_does_not_depend_on_the_number_of_tensors(rule: str, scope: str) -> None:
    few, many = (len(operations_of(rule, scope, tensors)) for tensors in (100, 10_000))
    assert many <= 1.1 * few
    assert few < 200  # in two windows


@every_rule_and_scope
def test_nothing_waits_for_the_device_but_the_read_of_the_table(
    rule: str, scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after it: no value goes to the host, and no list goes to the device as an index."""
    pieces = make_pieces(torch.float32, False, rule == "gru")
    synthesis, units = Synthesis(rule, scope), units_of(scope, LAYERS)
    synthesis.combine_(pieces, units)
    seen = Operations()
    second = combine._combine_units_

    def watched(*arguments: object) -> None:
        with seen:
            second(*arguments)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(combine, "_combine_units_", watched)
    seen.__enter__()
    synthesis.combine_(pieces, units, reduce=lambda table: seen.__exit__(None, None, None))
    assert len(seen.names) > 20
    waits = ("_local_scalar_dense", "nonzero", "lift_fresh", "index.Tensor", "index_put_", "masked_select", "equal")
    allowed = {"lift_fresh.default"} if scope != "element" else set()  # of the weights, in one pinned copy
    assert not {name for name in seen.names if name.startswith(waits)} - allowed


@pytest.mark.parametrize(
    ("rule", "scope"), [("sago", "element"), ("pcgrad", "element"), ("pcgrad", "module"), ("gru", "global")]
)
@pytest.mark.slow
def test_a_compiled_kernel_gives_the_same(rule: str, scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute each: it is compiled."""
    monkeypatch.setitem(windows.COMPILED, "cpu", 1024)
    windows.plan.cache_clear()
    kernels.compiled.cache_clear()
    found = []
    for start in (0, 2**40):
        monkeypatch.setattr(combine, "COMPILE_FROM", start)
        pieces = make_pieces(torch.float32, False, rule == "gru")
        table = Synthesis(rule, scope, 0.7, 0.3).combine_(pieces, units_of(scope, LAYERS))
        found.append((table, pieces))
    (table, ours), (other, theirs) = found
    torch.testing.assert_close(table, other, rtol=3e-14, atol=3e-14 * float(other.abs().max()))
    assert all(torch.equal(a.retain, b.retain) for a, b in zip(ours, theirs, strict=True))


def test_where_nothing_can_be_compiled_the_plain_kernel_is_used_and_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("/no/compiler",))
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    monkeypatch.setattr(combine, "COMPILE_FROM", 0)
    monkeypatch.setitem(windows.COMPILED, "cpu", 1024)
    windows.plan.cache_clear()
    kernels.compiled.cache_clear()
    ours, theirs = (make_pieces(torch.float32, False, False) for _ in range(2))
    with caplog.at_level(logging.WARNING, "pipeline"):
        for _ in range(2):
            Synthesis("sago").combine_(ours, range(len(SIZES)))
            combine_plainly_(Synthesis("sago"), theirs, range(len(SIZES)))
    assert all(torch.equal(a.retain, b.retain) for a, b in zip(ours, theirs, strict=True))
    assert len([line for line in caplog.messages if "without a compiled kernel" in line]) == 1


def test_one_element_of_any_stride_joins_its_neighbours() -> None:
    """torch calls a tensor of one element contiguous whatever its stride, which says nothing about the next one."""
    base = torch.arange(12.0)
    [joined] = windows.join_neighbours([base[::5][:1], base[1:4]])
    assert joined.tolist() == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_choosing_bits_is_choosing_numbers(dtype: torch.dtype) -> None:
    """Every pair of numbers under both choices, also those that arithmetic would change."""
    odd = torch.tensor([0.0, -0.0, 1.5, -3e38, math.inf, -math.inf, math.nan, 1e-45], dtype=dtype)
    a, b = odd.repeat_interleave(len(odd)), odd.repeat(len(odd))
    bits = torch.int32 if dtype == torch.float32 else torch.int64
    for condition in (torch.ones_like(a, dtype=torch.bool), torch.zeros_like(a, dtype=torch.bool)):
        expected = a if condition.all() else b
        assert torch.equal(kernels.choose(condition, a, b).view(bits), expected.view(bits))
    mixed = kernels.choose(condition, a.float(), b.double())
    assert torch.equal(mixed.view(torch.int64), b.double().view(torch.int64)), "of two dtypes the wider"
