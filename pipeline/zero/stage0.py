"""Stage 0, plain data parallelism: the whole gradient on every rank."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.zero.compat import require, unexpected
from pipeline.zero.engine import Engine
from pipeline.zero.store import GradientStore, Master
from pipeline.zero.tensor_parallel import copies, group_size


class Stage0Store(GradientStore):
    """Stage 0, plain data parallelism: the whole gradient is the parameters' own `.grad`, on every rank."""

    replicated = True

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        if engine.fp16_enabled():  # its updates would be too small by the loss scale
            raise RuntimeError("DeepSpeed does not scale the loss in fp16 without ZeRO; use ZeRO stage 1, or bf16")
        self.parameters = [p for p in engine.module.parameters() if p.requires_grad and p.numel()]
        self.layout = [(row, parameter.numel()) for row, parameter in enumerate(self.parameters)]
        self.starts = [0] * len(self.layout)
        self.dtype, self.device = self.parameters[0].dtype, self.parameters[0].device
        if self.dtype == torch.bfloat16:
            require(self.optimizer, "optimizer without ZeRO in bf16")

    def clear(self) -> None:
        self.engine.zero_grad()

    def reduce(self) -> list[Tensor]:
        self._reduce_now()  # gives a zero gradient to parameters that have none
        return [_gradient(parameter).view(-1) for parameter in self.parameters]

    def masters(self) -> list[Master]:
        groups = self.optimizer.param_groups
        if hasattr(self.optimizer, "fp16_groups"):  # in bf16: DeepSpeed's copies in fp32, in the same groups
            pairs = zip(self.optimizer.fp16_groups, self.optimizer.fp32_groups, strict=True)
            wide = {id(p): w for group, copies in pairs for p, w in zip(group, copies, strict=True)}
        else:
            wide = {id(p): p for group in groups for p in group["params"]}
        number = {id(p): index for index, group in enumerate(groups) for p in group["params"]}
        return [Master(copy := wide[id(parameter)], 0, number[id(copy)]) for parameter in self.parameters]

    def write_back(self, slices: list[Tensor]) -> None:
        if not hasattr(self.optimizer, "_global_grad_norm"):  # fp32: nothing else computes it
            norms = torch.stack([gradient.double().norm() for gradient in slices])
            if (group := group_size(self.engine)) > 1:
                squares = norms.square() / torch.tensor(copies(self.engine, self.parameters), device=norms.device)
                dist.all_reduce(squares)
                norms = (squares / (dist.get_world_size() // group)).sqrt()
            self.engine._global_grad_norm = float(norms.norm())


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        raise unexpected("a parameter has no gradient after allreduce_gradients")
    return parameter.grad
