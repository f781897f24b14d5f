"""Where DeepSpeed keeps a gradient: the interface that hides the ZeRO stages. One class, and file, for each way.

| stage | the gradient lies in | on a rank |
|---|---|---|
| 0 | `.grad` of the parameters | all of it |
| 1 in bf16 with fp32 accumulation | `BF16_Optimizer.fp32_groups_gradients` | all of it |
| 1, 2 | `averaged_gradients`; under offload `.grad` of the optimizer's fp32 partition | one fragment of each group |
| 3 | `grad_partitions_flat_buffer`, on the CPU under offload to the CPU or to nvme | its share of each tensor |

DeepSpeed does not clear gradients on its own: on most stages some buffer still has last step's gradient of a tensor
that gets none in this one, and would apply it again. `clear` is therefore thorough, and a tensor without a gradient has
gradient zero.

DeepSpeed 0.19.8 refuses: fp16 on a CPU ("Type fp16 is not supported on your device."); stage 0 in bf16 with fp32
accumulation ("unsupported mix of model_dtype=..."). We refuse fp16 on stage 0, where it divides gradients by a loss
scale that the loss was never multiplied with. Under ZeRO-2 and 3 all ranks must use the same tensors in each
micro-batch (for experts: `deepspeed.utils.set_z3_leaf_modules`).
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.synthesis.adam import AdamState
from pipeline.zero.compat import require, unexpected
from pipeline.zero.engine import Engine
from pipeline.zero.local_sums import LocalSum, places_of

log = logging.getLogger(__name__)


class Master(NamedTuple):
    """Where the weights of a slice lie that the optimizer updates."""

    tensor: Tensor  # in fp32; flat under ZeRO
    start: int  # its element that is the slice's first
    group: int  # of the optimizer's parameter groups


class GradientStore(ABC):
    """Where `engine.step()` reads the gradient, and how it is cleared.

    Raises:
        RuntimeError: DeepSpeed lacks an attribute of `compat.INTERNALS`, or its tensors have other sizes.
    """

    replicated = False  # every rank has the whole gradient
    reduces_every_backward = False  # DeepSpeed reduces the gradient of every micro-batch, not their sum
    optimizer_checks_overflow = False  # engine.step() skips the update on inf and NaN, on all ranks alike, in any dtype
    parameters: Sequence[nn.Parameter]  # the trainable ones; the index in this list is the row of the synthesis
    layout: list[tuple[int, int]]  # (row, number of elements) of each slice on this rank
    starts: list[int]  # of each slice: which element of its tensor is its first
    dtype: torch.dtype
    device: torch.device

    def __init__(self, engine: Engine) -> None:
        self.engine, self.optimizer = engine, engine.optimizer
        self.local_sum: LocalSum | None = None
        if engine.fp16_enabled() and engine.zero_optimization_stage():
            require(self.optimizer, "optimizer in fp16")
            _raise_scale_after_step(self.optimizer)

    @abstractmethod
    def clear(self) -> None:
        """Zero everything that the next backward would add to, or that `engine.step()` would read."""

    @abstractmethod
    def reduce(self) -> list[Tensor]:
        """Complete the reduction over ranks.

        Returns:
            The slices of `layout`, 1-D, in `dtype` on `device`. `engine.step()` reads what is written to them.
        """

    def sum_locally(self) -> None:
        """Reduce once a task from now on: ZeRO-2 and 3 no longer get the gradient of each micro-batch."""
        if not self.reduces_every_backward:
            return
        local_sum = self.local_sum = LocalSum(self.engine, self.parameters)

        def take(parameter: nn.Parameter, *group: int) -> None:
            assert parameter.grad is not None
            local_sum.add(parameter, parameter.grad)
            parameter.grad = None

        self.optimizer.reduce_ready_partitions_and_remove_grads = take

    def _with_local_sum(self, slices: list[Tensor]) -> list[Tensor]:
        """`slices`; what was added up on the ranks is in them from now on."""
        if self.local_sum is not None:
            self.local_sum.move_to(places_of(self, slices))
        return slices

    def _clear_local_sum(self) -> None:
        if self.local_sum is not None:
            self.local_sum.clear()

    @abstractmethod
    def masters(self) -> list[Master] | None:
        """One for each slice; None if this rank's optimizer updates less than it has gradients of, or on nvme."""

    @property
    def inner(self) -> torch.optim.Optimizer:
        """torch's optimizer, which DeepSpeed's wraps."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def adam(self, rates: Sequence[float] | None = None) -> list[AdamState] | None:
        """Adam's state of each slice, whose tensors are views.

        None if there is none: the optimizer is another, it has made no step, or see `masters`. Alike on all ranks.

        Args:
            rates: the learning rates of the parameter groups; None: those of the next step.
        """
        optimizer = self.inner
        has_stepped = self.engine.global_steps > self.engine.skipped_steps
        if not has_stepped or not {"betas", "eps"} <= optimizer.param_groups[0].keys():
            return None
        masters = self.masters()
        if masters is None:
            return None
        states = []
        for (tensor, start, number), (_, size) in zip(masters, self.layout, strict=True):
            state, group = optimizer.state[tensor], optimizer.param_groups[number]
            if "exp_avg_sq" not in state:
                raise unexpected("the optimizer has no exp_avg_sq of a tensor that it updates")
            flats = (tensor, state["exp_avg"], state["exp_avg_sq"])
            w, m, v = (flat.detach().view(-1)[start : start + size] for flat in flats)
            lr = group["lr"] if rates is None else rates[number]
            numbers = (lr, group["betas"], group["eps"], group["weight_decay"])
            states.append(AdamState(w, m, v, int(state["step"]), *numbers))
        return states

    @property
    def loss_scale(self) -> float:
        """The factor of this step's losses, and so of its gradients: 1 except in fp16, where step() changes it."""
        return float(self.optimizer.loss_scale) if self.engine.fp16_enabled() else 1.0

    def write_back(self, slices: list[Tensor]) -> None:  # noqa: B027  (most stages have derived nothing)
        """The slices have been overwritten: update what DeepSpeed derived from them."""

    def _reduce_now(self) -> None:
        """Do what a backward on the accumulation boundary does at its end."""
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.allreduce_gradients()


def _raise_scale_after_step(optimizer: Any) -> None:  # of a class of DeepSpeed: see Engine
    """Let a dynamic loss scale grow between steps.

    DeepSpeed 0.19.8 doubles it inside `step()`, before it takes the scale off the gradient: that update would be half
    as large, and under ZeRO-3 the reported norm too.
    """
    update, step = optimizer._update_scale, optimizer.step
    raised: list[float] = []

    def update_later(has_overflow: bool = False) -> None:
        before = optimizer.loss_scale
        update(has_overflow)
        if optimizer.loss_scale > before:
            raised.append(optimizer.loss_scale)
            optimizer.loss_scale = before

    def step_and_raise(*arguments: object, **named: object) -> None:
        step(*arguments, **named)
        if raised:
            optimizer.loss_scale = raised.pop()

    optimizer._update_scale, optimizer.step = update_later, step_and_raise
