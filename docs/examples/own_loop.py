"""Two losses of your own, combined by a rule, in a DeepSpeed loop of your own, on any ZeRO stage.

`model(batch)` returns a loss, a 0-dim tensor. Under ZeRO-2 and 3 every rank must run as many forward and backward
passes as the others.
"""

from collections.abc import Iterable

import deepspeed
from torch import Tensor, nn, optim

from pipeline.synthesis.combine import Synthesis
from pipeline.zero.combiner import GradientCombiner

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,  # any number of backward passes a step: the combiner ends the accumulation
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 3},
    "zero_allow_untested_optimizer": True,  # any optimizer of torch
    "zero_force_ds_cpu_optimizer": False,
}


def train(model: nn.Module, optimizer: optim.Optimizer, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Ascend the loss of each forget batch and descend that of each retain batch, where the two do not conflict."""
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
    combiner = GradientCombiner(engine, Synthesis("pcgrad", gamma=0.5), combine_tasks=True)
    for forget, retain in batches:
        combiner.clear()
        engine.backward(-engine(forget), scale_wrt_gas=False)  # or several micro-batches
        combiner.stash_forget()
        engine.backward(engine(retain), scale_wrt_gas=False)
        if combiner.combine().should_step:  # False, on all ranks, if a gradient is not finite
            engine.step()
