"""The plain loop's confinement: whole tensors, all scores sorted."""

from __future__ import annotations

import torch
from torch import Tensor

Named = dict[str, Tensor]


def confine(f: Named, r: Named, confined: tuple[float, str], squares: Named, optimizer: torch.optim.Optimizer) -> Named:
    """Zero f and r in place, and Adam's momentum, where an element is not among the `share` with the largest scores.

    Scores that agree in the exponent and in 8 bits behind the leading one stay together, the last of them too.
    `squares` is the state of `forget_mean_square`, empty at first. Returns by name where elements may move.
    """
    share, by = confined
    keys = {}
    for name, value in f.items():
        squares[name] = 0.1 * value.square() + 0.9 * squares.get(name, torch.zeros_like(value))
        score = {"forget": value.abs(), "forget_mean_square": squares[name]}.get(by)
        if score is None:
            score = torch.where(value == 0, 0, value.abs() / r[name].abs())
        mantissa, exponent = torch.frexp(score)
        key = exponent * 1000 + (mantissa * 512).floor()
        keys[name] = torch.where(score.isinf(), 10**6, torch.where(score == 0, -(10**6), key))
    ordered = torch.cat([key.flatten() for key in keys.values()]).sort(descending=True).values
    last = ordered[max(-int(-share * len(ordered) // 1) - 1, 0)]
    inside = {name: (key >= last) & (key > -(10**6)) for name, key in keys.items()}
    for gradient in (f, r):
        for name, value in gradient.items():
            value[~inside[name]] = 0
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    shapes = {id(p): name for name, p in zip(f, parameters, strict=True)}  # one group, in the order of f
    for parameter in parameters:
        if "exp_avg" in optimizer.state[parameter]:
            optimizer.state[parameter]["exp_avg"][~inside[shapes[id(parameter)]]] = 0
    return inside
