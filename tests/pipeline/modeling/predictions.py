"""Small batches of predictions, and the formulas of their losses in float64, one token at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.config.objectives import Term
from pipeline.data.batches import IGNORED
from pipeline.modeling.token_losses import OutputLayer, token_losses

V, H = 13, 5  # vocabulary, hidden width


WAYS = ("logits", "hidden", "hidden+bias")


ERRORS = {torch.float64: (1e-12, 1e-12), torch.float32: (1e-5, 1e-5), torch.bfloat16: (1e-5, 2**-6)}  # value, gradient


# Token ids per sequence; `None` is a label that the data masks. Right-padded when they meet in a batch.
SEQUENCES: list[list[int | None]] = [
    [3, 1, 4, 1, 5, 9],
    [2],  # one token predicts nothing
    [6, 5],
    [3, None, None, 8, 9],
    [7, None, None],  # two positions, none of them predicted
    [0, 0, 10, 0],  # 0 is a token like any other
]


def batch_of(rows: Sequence[list[int | None]], width: int | None = None) -> Tensor:
    """[B, T] labels."""
    width = width or max(map(len, rows))
    return torch.tensor(
        [[IGNORED if token is None else token for token in row] + [IGNORED] * (width - len(row)) for row in rows]
    )


def mask_of(rows: Sequence[list[int | None]], width: int | None = None) -> Tensor:
    """[B, T]: 1 on real tokens, masked by the data or not."""
    width = width or max(map(len, rows))
    return torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])


LABELS, MASK = batch_of(SEQUENCES), mask_of(SEQUENCES)


def random(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def logits_for(labels: Tensor, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return random(*labels.shape, V, seed=seed).to(dtype)


def eighths(*shape: int, seed: int, step: float) -> Tensor:
    """Few multiples of a power of two: products of them, summed over H, are exact in bf16 too."""
    return step * torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).double()


def leaves_of(way: str, labels: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The tensors that get a gradient: logits; or hidden states, weight and, perhaps, bias."""
    if way == "logits":
        return [logits_for(labels, dtype=dtype).requires_grad_()]
    made = [eighths(*labels.shape, H, seed=1, step=0.5), eighths(V, H, seed=2, step=0.25)]
    made += [eighths(V, seed=3, step=0.125)] if way == "hidden+bias" else []
    return [tensor.to(dtype).requires_grad_() for tensor in made]


def losses_of(
    leaves: list[Tensor],
    labels: Tensor,
    teacher: Tensor | None = None,
    penalty: float = 0.0,
    term: Term | None = None,
) -> Tensor:
    states, weight, bias = [*leaves, None, None][:3]
    assert states is not None
    compared = {"teacher_logits": teacher, "logit_penalty": penalty, "term": term}
    return token_losses(states, labels, layer=None if weight is None else OutputLayer(weight, bias), **compared)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """The Jensen-Shannon divergence of two distributions [V], nats, with 0 log 0 = 0."""
    m, zero = (p + q) / 2, p.sum() * 0
    terms = [x * (x / y).log() for one in (p, q) for x, y in zip(one, m, strict=True) if x > 0]
    return sum(terms, zero) / 2


def exactly(leaves: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """(the leaves in float64, the logits that follow from them)."""
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    if len(exact) == 1:
        return exact, exact[0]
    logits = torch.einsum("bth,vh->btv", exact[0], exact[1])
    return exact, logits if len(exact) == 2 else logits + exact[2]


def log_probabilities(row: Tensor) -> Tensor:
    """[V]: z - log Σ exp(z)."""
    top = row.detach().max()
    return row - top - (row - top).exp().sum().log()


def per_prediction(
    logits: Tensor, labels: Tensor, what: Callable[[Tensor, int, int, int], Tensor]
) -> list[list[Tensor]]:
    """Per sequence `what(log p [V], token, sequence, position)` of every predicted token."""
    return [
        [
            what(log_probabilities(row[at]), token, number, at)
            for at, token in enumerate(tokens[1:])  # position at predicts the token after it
            if token != IGNORED
        ]
        for number, (row, tokens) in enumerate(zip(logits.double(), labels.tolist(), strict=True))
    ]


def gradients_of(loss: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, list(leaves))


def assert_gradients_close(got: Sequence[Tensor], want: Sequence[Tensor], error: float) -> None:
    for mine, exact in zip(got, want, strict=True):
        atol = error * exact.abs().max().item()
        torch.testing.assert_close(mine.double(), exact, rtol=error, atol=max(atol, 1e-15))


class Created(TorchDispatchMode):
    """The shapes of all tensors that operations return: what exists at some moment, whoever frees them."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]  # views of what was given are not
        self.shapes += [tuple(x.shape) for x in made if x.untyped_storage().data_ptr() not in given]
        return result

    @property
    def largest(self) -> int:
        return max(map(math.prod, self.shapes))
