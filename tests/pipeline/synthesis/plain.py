"""The plain combination: one tensor after another, whole, in the order of the formulas. The oracle of the windows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.synthesis.combine import COLUMNS, Piece, Synthesis
from pipeline.synthesis.rules import Gramian


def combine_plainly_(
    synthesis: Synthesis, pieces: Sequence[Piece], units: Sequence[int], scale: float = 1.0
) -> list[list[float]]:
    """`Synthesis.combine_` of finite gradients on one rank: the same effect and the same table."""
    table: list[dict[str, float]] = [{name: 0.0 for name in COLUMNS} for _ in units]
    for piece in pieces:
        f, r, row = piece.forget.double(), piece.retain.double(), table[piece.row]
        row["conflicts"] += (((f > 0) & (r < 0)) | ((f < 0) & (r > 0))).sum().item()
        _add(row, ff=(f, f), fr=(f, r), rr=(r, r))
        if piece.average is not None:
            a = _anchor(piece, scale)
            _add(row, fa=(f, a), ra=(r, a), aa=(a, a))
    if synthesis.resolved_scope == "element":
        for piece in pieces:
            g = _gated(synthesis, piece)
            _add(table[piece.row], gf=(g, piece.forget), gr=(g, piece.retain), gg=(g, g))
            piece.retain.copy_(g)
    else:
        weights = [
            _weights(synthesis, [row for row, u in zip(table, units, strict=True) if u == unit]) for unit in units
        ]
        for row, (f, r, a) in zip(table, weights, strict=True):
            row["gf"] = f * row["ff"] + r * row["fr"] + a * row["fa"]
            row["gr"] = f * row["fr"] + r * row["rr"] + a * row["ra"]
            row["gg"] = f * row["gf"] + r * row["gr"] + a * (f * row["fa"] + r * row["ra"] + a * row["aa"])
        for piece in pieces:
            f, r, a = weights[piece.row]
            anchor = None if piece.average is None else _anchor(piece, scale)
            g = _mixed(f, piece.forget, r, piece.retain)
            piece.retain.copy_(g if anchor is None else g.add_(anchor, alpha=a))
            if piece.average is not None and anchor is not None:
                piece.average.copy_(anchor / scale)
    return [list(row.values()) for row in table]


def _add(row: dict[str, float], **pairs: tuple[Tensor, Tensor]) -> None:
    for name, (a, b) in pairs.items():
        row[name] += (a.double() * b.double()).sum().item()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _anchor(piece: Piece, scale: float) -> Tensor:
    assert piece.average is not None
    return _wide(piece.average).mul((1 - 0.8) * scale).add_(_wide(piece.retain), alpha=0.8)


def _mixed(w_f: float, f: Tensor, w_r: float, r: Tensor) -> Tensor:
    if max(abs(w_f), abs(w_r)) >= 1e30:
        f, r = f.double(), r.double()
    return (_wide(r) * w_r).add_(_wide(f), alpha=w_f)


def _weights(synthesis: Synthesis, rows: list[dict[str, float]]) -> tuple[float, float, float]:
    fr, rr = ("fa", "aa") if synthesis.averages_retain else ("fr", "rr")
    gramian = Gramian(*(sum(row[name] for row in rows) for name in ("ff", fr, rr)))
    w_f, w_r = synthesis.weights(gramian).on(gramian)
    return (w_f, synthesis.alpha, w_r) if synthesis.averages_retain else (w_f, w_r, 0.0)


def _gated(synthesis: Synthesis, piece: Piece) -> Tensor:
    """What each rule does with two numbers: projecting off a number that is not 0 leaves nothing."""
    f, r, alpha, gamma = piece.forget, piece.retain, synthesis.alpha, synthesis.gamma
    conflict = ((f > 0) & (r < 0)) | ((f < 0) & (r > 0))
    both, only_f, only_r = _mixed(gamma, f, alpha, r), _wide(f) * gamma, _wide(r) * alpha
    if synthesis.rule == "sago":
        retained = conflict | (f == 0) if synthesis.zero_forget == "retain" else conflict
        return torch.where(retained, only_r, only_f)
    if synthesis.rule == "pcgrad":
        return torch.where(conflict, only_r, both)
    return torch.where(f == 0, only_r, only_f) if synthesis.rule == "blur" else both
