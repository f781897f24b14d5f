"""ZeRO-1 in bf16 with fp32 accumulation: the whole gradient on every rank."""

from __future__ import annotations

from torch import Tensor

from pipeline.zero.compat import require, unexpected
from pipeline.zero.engine import Engine
from pipeline.zero.store import GradientStore


class Stage1Bf16Store(GradientStore):
    """ZeRO-1 in bf16 with fp32 accumulation: BF16_Optimizer has the whole gradient, in fp32, on every rank.

    step() updates from this rank's fragment of it, but takes the norm from all of it: so all of it is combined.
    """

    replicated = True

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        require(self.optimizer, "optimizer of ZeRO 1 in bf16")
        self.parameters = [parameter for group in self.optimizer.bf16_groups for parameter in group]
        self.layout = [(row, parameter.numel()) for row, parameter in enumerate(self.parameters)]
        self.starts = [0] * len(self.layout)
        gradients = self._gradients()
        if [gradient.numel() for gradient in gradients] != [size for _, size in self.layout]:
            raise unexpected("the fp32 gradients of BF16_Optimizer do not have the sizes of the parameters")
        self.dtype, self.device = gradients[0].dtype, gradients[0].device

    def _gradients(self) -> list[Tensor]:
        return [gradient for group in self.optimizer.fp32_groups_gradients for gradient in group]

    def clear(self) -> None:
        self.optimizer.zero_grad()

    def reduce(self) -> list[Tensor]:
        self._reduce_now()
        return self._gradients()

    def masters(self) -> None:
        return None  # it updates its fragment alone

    def write_back(self, slices: list[Tensor]) -> None:
        # Norm and clipping leave out what is not flagged: here, what only the forget task touched.
        for flags in self.optimizer.fp32_groups_has_gradients:
            flags[:] = [True] * len(flags)
