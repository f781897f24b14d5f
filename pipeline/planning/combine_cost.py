"""The cost of the combination alone: kernels, nanoseconds and bytes an element, for few tensors and for many.

    OMP_NUM_THREADS=1 python -m pipeline.planning.combine_cost [--rule sago --scope element] [--compiled] [--window N]

Both gradients of one rank are one vector each, as under ZeRO-3, cut in tensors of equal sizes. Time is that of the
processor (of all threads), which other programs on the machine hardly change; on a GPU it is the time of a clock. Bytes
are those that kernels read and write (`bytes_moved.py`), an element of the partition.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch._C._autograd import DeviceType
from torch.profiler import profile

from pipeline.files import write_whole
from pipeline.planning.bytes_moved import NO_KERNEL, BytesMoved
from pipeline.synthesis import combine, windows
from pipeline.synthesis.combine import Synthesis, units_of
from pipeline.synthesis.partition import Piece


class Cost(NamedTuple):
    kernels: int
    syncs: int | None  # waits of the host for the device; None where there is no device
    nanoseconds: float  # an element; the least of several runs
    bytes_an_element: float | None = None  # None: from a file that does not have it


def measure(synthesis: Synthesis, tensors: int, elements: int, repeats: int) -> Cost:
    """The cost of one combination of `elements` float32 in `tensors` tensors."""
    cuda = torch.cuda.is_available()
    sizes = [elements // tensors + (row < elements % tensors) for row in range(tensors)]
    forget, retain = (torch.randn(elements, device="cuda" if cuda else "cpu") for _ in range(2))
    pieces = [Piece(row, *pair) for row, pair in enumerate(zip(forget.split(sizes), retain.split(sizes), strict=True))]
    units = units_of(synthesis.resolved_scope, range(tensors))
    clock, seconds = time.perf_counter if cuda else time.process_time, []
    for _ in range(repeats + 1):  # the first plans the layout
        start = clock()
        synthesis.combine_(pieces, units)
        seconds.append(clock() - start)
    with profile() as profiler:
        synthesis.combine_(pieces, units)
    events = list(profiler.events() or ())
    if cuda:
        kernels = sum(event.device_type == DeviceType.CUDA for event in events)
        syncs = sum(event.name in ("cudaStreamSynchronize", "cudaDeviceSynchronize") for event in events)
    else:
        leaves = [event.name for event in events if not event.cpu_children]
        kernels, syncs = sum(name not in NO_KERNEL for name in leaves), None
    moved = BytesMoved()
    with moved.through_compiled():
        synthesis.combine_(pieces, units)
    return Cost(kernels, syncs, min(seconds[1:]) / elements * 1e9, moved.total / elements)


HEADER = "| tensors | kernels | waits for the device | ns an element | bytes an element |\n|---|---|---|---|---|"


def row(tensors: int, cost: Cost) -> str:
    syncs = "–" if cost.syncs is None else cost.syncs
    return f"| {tensors:,} | {cost.kernels:,} | {syncs} | {cost.nanoseconds:.1f} | {amount(cost.bytes_an_element)} |"


def amount(bytes_an_element: float | None) -> str:
    return "–" if bytes_an_element is None else f"{bytes_an_element:.1f}"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.planning.combine_cost", description="The cost of the combination alone."
    )
    parser.add_argument("--rule", default="sago")
    parser.add_argument("--scope", help="default: the rule's scope in its paper")
    parser.add_argument("--tensors", type=int, nargs="+", default=[1, 100, 1_000, 10_000])
    parser.add_argument("--elements", type=int, default=2**21)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--window", type=int, help="elements of a window: 4194304 is a GPU's; default: this machine's")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--compiled", action="store_true", help="compile also where the partition is small")
    options = parser.parse_args()

    if options.compiled:
        combine.COMPILE_FROM = 0
    if options.window is not None:
        if options.window < 1:
            parser.error(f"--window {options.window}: give a number of elements, 1 or more")
        windows.eager_window = lambda device: options.window
    synthesis = Synthesis(options.rule, options.scope)
    print(f"{options.rule} at scope {synthesis.resolved_scope}, {options.elements:,} elements")
    print(f"\n{HEADER}")
    found = {}
    for tensors in options.tensors:
        found[tensors] = cost = measure(synthesis, tensors, options.elements, options.repeats)
        print(row(tensors, cost), flush=True)
    if options.json:
        write_whole(options.json, json.dumps({tensors: cost._asdict() for tensors, cost in found.items()}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
