"""The gradient store of an engine: one class for each way DeepSpeed keeps a gradient."""

from __future__ import annotations

from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from pipeline.zero.compat import unexpected
from pipeline.zero.engine import Engine
from pipeline.zero.stage0 import Stage0Store
from pipeline.zero.stage1_2 import Stage12Store
from pipeline.zero.stage1_bf16 import Stage1Bf16Store
from pipeline.zero.stage3 import Stage3Store
from pipeline.zero.store import GradientStore


def gradient_store(engine: Engine) -> GradientStore:
    """The class for this engine's stage and optimizer.

    Raises:
        RuntimeError: there is none, or DeepSpeed keeps its gradients elsewhere.
    """
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3 and type(optimizer) is DeepSpeedZeroOptimizer_Stage3:
        return Stage3Store(engine)
    if stage in (1, 2) and type(optimizer) is DeepSpeedZeroOptimizer:
        return Stage12Store(engine)
    if stage == 1 and type(optimizer) is BF16_Optimizer:
        return Stage1Bf16Store(engine)
    if stage == 0:
        return Stage0Store(engine)
    raise unexpected(f"ZeRO stage {stage} with {type(optimizer).__name__}")
