"""What is computed for the elements of a window: sums of products, the gate by sign, and both compiled to one loop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.synthesis.elements import opposite_signs
from pipeline.synthesis.gramian import Weights
from pipeline.synthesis.windows import BLOCK, compiled_window

log = logging.getLogger("pipeline")

LARGE_WEIGHT = 1e30

Kernel = Callable[..., Tensor]  # matrices [blocks, BLOCK] -> [sums, blocks] float64


def compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def moving_average(scale: float, new_share: float, retain: Tensor, average: Tensor) -> Tensor:
    """The moving average of r after this step, times `scale` like the retain gradient."""
    new = retain.to(compute_dtype(retain))
    return average.to(new.dtype).mul((1 - new_share) * scale).add_(new, alpha=new_share)


def sum_products(scale: float, new_share: float, f: Tensor, r: Tensor, m: Tensor | None = None) -> Tensor:
    """Of each block: ff fr rr and, with the anchor a of a state m, fa ra aa; then the number of conflicts."""
    anchor = () if m is None else (moving_average(scale, new_share, r, m),)
    return _sums(opposite_signs(f, r), f, r, *anchor)


class Gate(NamedTuple):
    """The two mixtures of which an element gets one."""

    clash: Weights  # where signs are opposed
    agree: Weights
    no_forget_clashes: bool  # where f = 0: clash
    no_retain_clashes: bool  # where r = 0: clash


def gate_(gate: Gate, f: Tensor, r: Tensor) -> Tensor:
    """Overwrite r with g. Of each block: ff fr rr fg rg gg, then the number of conflicts."""
    clashes = opposed = opposite_signs(f, r)
    if gate.no_forget_clashes:
        clashes = clashes | (f == 0)
    if gate.no_retain_clashes:
        clashes = clashes | (r == 0)
    g = choose(clashes, _mix(gate.clash, f, r), _mix(gate.agree, f, r))
    sums = _sums(opposed, f, r, g)
    r.copy_(g)
    return sums


def choose(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`torch.where`, bit for bit.

    On a CPU torch takes a branch for each element. Signs of gradients cannot be foreseen, so every other branch is
    mispredicted: 3.8 ns an element, where masking the bits takes 0.4.
    """
    if a.device.type != "cpu" or a.dtype != b.dtype or torch.compiler.is_compiling():
        return torch.where(condition, a, b)
    integer = torch.int32 if a.itemsize == 4 else torch.int64
    bits, others = a.view(integer), b.view(integer)
    return (bits ^ others).mul_(condition).bitwise_xor_(others).view(a.dtype)


def form_(form: Callable[..., Tensor], f: Tensor, r: Tensor, *draw: Tensor) -> Tensor:
    """The same with g = form(f, r), of `elements.py`."""
    dtype = compute_dtype(r)
    g = form(f.to(dtype), r.to(dtype), *draw)
    sums = _sums(opposite_signs(f, r), f, r, g)
    r.copy_(g)
    return sums


def weighted(weights: tuple[float, float, float], f: Tensor, r: Tensor, a: Tensor | None = None) -> Tensor:
    """w_f f + w_r r + w_a a, a new tensor in fp32 or better, whatever the gradients' dtype."""
    w_f, w_r, w_a = weights
    dtype = torch.float64 if needs_float64(weights) else compute_dtype(r)
    if w_f == 0:  # as SAGO's two mixtures, each of one gradient alone
        g = r.to(dtype) * w_r
    elif w_r == 0:
        g = f.to(dtype) * w_f
    else:
        g = (r.to(dtype) * w_r).add_(f.to(dtype), alpha=w_f)
    return g if a is None else g.add_(a, alpha=w_a)


def weighted_by_element(weights: list[Tensor], f: Tensor, r: Tensor, a: Tensor | None) -> Tensor:
    """The same with weights [n] each, bit for bit but for the sign of a zero.

    The weights are in the dtype of the computation, or in float64 if `needs_float64` holds for some of them.
    """

    def mix(dtype: torch.dtype) -> Tensor:
        w_f, w_r, w_a = (w.to(dtype) for w in weights)
        g = (r.to(dtype) * w_r).addcmul_(f.to(dtype), w_f)  # like add_, a fused multiply-add
        return g if a is None else g.addcmul_(a.to(dtype), w_a)

    usual = compute_dtype(r)
    if weights[0].dtype == usual:
        return mix(usual)
    return torch.where(torch.stack(weights).abs().amax(0) >= LARGE_WEIGHT, mix(torch.float64), mix(usual).double())


def needs_float64(weights: Iterable[float]) -> bool:
    """Projecting a large gradient off a tiny one takes a weight that float32 may not hold."""
    return max(map(abs, weights)) >= LARGE_WEIGHT


def _mix(weights: Weights, f: Tensor, r: Tensor) -> Tensor:
    """`weights` where every element is a scope of its own: projecting off a non-zero number leaves 0."""
    mixed = weighted((weights.f, weights.r, 0.0), f, r)
    if weights.f_off_r:
        mixed = mixed + torch.where(r == 0, f.to(mixed.dtype) * weights.f_off_r, 0)
    if weights.r_off_f:
        mixed = mixed + torch.where(f == 0, r.to(mixed.dtype) * weights.r_off_f, 0)
    return mixed


def _sums(opposed: Tensor, *vectors: Tensor) -> Tensor:
    """[sums, rows] the products of all pairs, then the conflicts, in float64: squares of 1e-38 and 1e38 exist there."""
    double = [vector.double() for vector in vectors]
    products = [(x * y).sum(1) for number, y in enumerate(double, 1) for x in double[:number]]
    return torch.stack([*products, opposed.sum(1).double()])


@lru_cache(maxsize=8)
def compiled(function: Kernel, constants: tuple[object, ...], dtypes: tuple[torch.dtype, ...], device: str) -> Kernel:
    """`function`, with its first arguments, as one loop that reads and writes each element once.

    It is tried on zeros. The plain function is returned, and a line is logged once, where nothing can be compiled.
    """
    from torch._dynamo.exc import TorchDynamoException  # a second of imports, for large partitions only

    plain = partial(function, *constants)
    fast = torch.compile(plain, dynamic=False)
    rows = compiled_window(torch.device(device)) // BLOCK
    try:
        fast(*(torch.zeros(rows, BLOCK, dtype=dtype, device=device) for dtype in dtypes))
    except TorchDynamoException as error:
        log.warning("gradients are combined without a compiled kernel, about 4 times slower: %s", error)
        return plain
    return fast
