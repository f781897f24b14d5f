"""What Adam knows about a piece of a parameter, and what it makes of a gradient: its metric, and its update."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class AdamState(NamedTuple):
    """torch's state of Adam for consecutive elements, and the numbers of their parameter group."""

    weights: Tensor  # [n] in fp32, which the optimizer updates
    first: Tensor  # [n] m, the running mean of the gradient
    second: Tensor  # [n] v, that of its square
    steps: int  # so far
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float  # decoupled, as in AdamW

    def first_elements(self, numel: int) -> AdamState:
        return self._replace(weights=self.weights[:numel], first=self.first[:numel], second=self.second[:numel])

    @property
    def numbers(self) -> tuple[object, ...]:
        return self[3:]

    @property
    def corrections(self) -> tuple[float, float]:
        """1 - β^t of both moments: m and v over these are means of the gradients so far."""
        return 1 - self.betas[0] ** self.steps, 1 - self.betas[1] ** self.steps
