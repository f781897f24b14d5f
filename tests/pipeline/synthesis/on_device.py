"""`python -m tests.pipeline.synthesis.on_device`: what every rule and scope does on a device that pretends, as JSON."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from pipeline.synthesis import windows
from pipeline.synthesis.adam import AdamState
from pipeline.synthesis.combine import State, Synthesis
from pipeline.synthesis.partition import Piece
from pipeline.synthesis.rules import RULES
from tests import pretended_device

SIZES = (700, 1, 0, 900)  # elements of the pieces; a window has 512
UNITS = [0, 1, 1, 0]


def combine(synthesis: Synthesis, place: Any, *, offloaded: bool) -> list[Tensor]:
    """Pieces, their averages and the table after two steps; `offloaded`: the forget gradients are in pinned memory."""
    generator = torch.Generator().manual_seed(0)
    forget, retain, average, *moments = ([torch.randn(size, generator=generator) for size in SIZES] for _ in range(6))
    state, pieces, start = State(), [], 0
    for row, size in enumerate(SIZES):
        adam = None
        if synthesis.metric == "adam":
            weights, first, second = (place(tensors[row]) for tensors in moments)
            adam = AdamState(weights, first, second.abs(), 3, 1e-3, (0.9, 0.99), 1e-8, 0.1)
        own = forget[row].pin_memory() if offloaded else place(forget[row])
        mean = place(average[row]) if synthesis.averages_retain else None
        pieces.append(Piece(row, own, place(retain[row]), mean, start, adam))
        start += size
    synthesis.combine_(pieces, UNITS, state=state)
    pretended_device.waits.clear()
    table = synthesis.combine_(pieces, UNITS, state=state)
    tensors = [tensor for piece in pieces for tensor in (piece.retain, piece.average) if tensor is not None]
    return [table, *tensors]


def main() -> None:
    device = pretended_device.start()
    windows.eager_window = lambda device: 512
    cases = [Synthesis(rule, scope) for rule in RULES for scope in RULES[rule].scopes]
    cases += [Synthesis(rule, "module", metric="adam") for rule in ("sago", "pcgrad", "blur")]
    found: dict[str, Any] = {}
    for synthesis in cases:
        for offloaded in (False, True):
            with pretended_device.Pretended():
                here = combine(synthesis, lambda tensor: tensor.to(device), offloaded=offloaded)
                waits = list(pretended_device.waits)
                here = [tensor.cpu() for tensor in here]
            plain = combine(synthesis, torch.clone, offloaded=False)
            key = f"{synthesis.rule} {synthesis.resolved_scope} {synthesis.metric} {offloaded}"
            found[key] = {"same": all(map(torch.equal, here, plain)), "waits": waits}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
