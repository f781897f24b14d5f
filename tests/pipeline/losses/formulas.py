"""Formulas of objectives, one token at a time in float64, where they need more than the token's own probability."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tests.pipeline.modeling.predictions import V, divergence, log_probabilities, per_prediction


def of_tokens(
    name: str, logits: Tensor, labels: Tensor, teacher: Tensor | None, exponents: tuple[float, float]
) -> list[Tensor]:
    """The term of each predicted token. teacher: [B, T, V] logits, for jsd; exponents: of satimp."""
    return [x for row in per_prediction(logits, labels, FORMULAS[name](teacher, *exponents)) for x in row]


Formula = Callable[[Tensor, int, int, int], Tensor]  # log p [V], token, sequence, position


def _ce_u(teacher: Tensor | None, *exponents: float) -> Formula:
    return lambda log_p, token, *_: -torch.stack([log_p[v].exp() for v in range(V) if v != token]).sum().log()


def _satimp(teacher: Tensor | None, saturation: float, importance: float) -> Formula:
    def formula(log_p: Tensor, token: int, number: int, at: int) -> Tensor:
        p = math.exp(log_p[token].item())
        return p**saturation * (1 - p) ** importance * log_p[token]

    return formula


def _pdu(teacher: Tensor | None, *exponents: float) -> Formula:
    def formula(log_p: Tensor, token: int, number: int, at: int) -> Tensor:
        largest = max(range(V), key=lambda v: log_p[v].item())  # of equal ones the first
        return (log_p[largest] - log_p.sum() / V) ** 2

    return formula


def _jensun(teacher: Tensor | None, *exponents: float) -> Formula:
    one_hot = torch.eye(V, dtype=torch.float64)
    return lambda log_p, token, *_: divergence(log_p.exp(), one_hot[token])


def _jsd(teacher: Tensor | None, *exponents: float) -> Formula:
    assert teacher is not None
    return lambda log_p, token, number, at: divergence(
        log_p.exp(), log_probabilities(teacher[number, at].double()).exp()
    )


FORMULAS: dict[str, Callable[..., Formula]] = {
    "ce_u": _ce_u,
    "satimp": _satimp,
    "pdu": _pdu,
    "jensun": _jensun,
    "jsd": _jsd,
}


def flat(nlls: list[list[Tensor]], kind: str) -> list[Tensor]:
    """Per pair, of the negative log-probabilities of the tokens of B answers and then of B refusals."""
    zero = torch.zeros((), dtype=torch.float64)
    means = [sum(((-nll).exp() for nll in row), zero) / max(len(row), 1) for row in nlls]
    half = len(means) // 2
    activation, conjugate = {
        "tv": (lambda x: torch.tanh(x) / 2, lambda x: torch.tanh(x) / 2),
        "kl": (lambda x: x, lambda x: torch.exp(x - 1)),
        "pearson": (lambda x: x, lambda x: x**2 / 4 + x),
    }[kind]
    return [conjugate(a) - activation(r) for a, r in zip(means[:half], means[half:], strict=True)]
