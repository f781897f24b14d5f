"""Memory and traffic of a step of live engines, measured by wrappers around DeepSpeed and the combiner."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from pipeline.config.deepspeed import deepspeed_config
from pipeline.config.schema import RunConfig

if TYPE_CHECKING:
    from pipeline.zero.combiner import GradientCombiner
    from pipeline.zero.joint import JointPass
    from pipeline.zero.store import GradientStore

REDUCTIONS = "all_reduce broadcast reduce all_gather all_gather_into_tensor reduce_scatter reduce_scatter_tensor"
SHARES = ("ds_tensor", "ds_secondary_tensor")


def storages(tensors: Iterable[object]) -> dict[int, int]:
    """Address -> bytes of the storages below `tensors`, those that hold something."""
    kept = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, Tensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in kept if storage.nbytes()}


def subclasses(kind: type) -> list[type]:
    return [one for below in kind.__subclasses__() for one in (below, *subclasses(below))]


class StepMeter:
    """Measures one step of each run of this process, from its first `clear` to the end of `engine.step`."""

    def __init__(self, number: int) -> None:
        self.number = number  # of the step to measure, from 0
        self.step = -1
        self.combiner: GradientCombiner | None = None  # while a step runs
        self.sent: dict[str, int] = {}
        self.live: dict[str, dict[int, int]] = {}
        self.waiting = 0  # bytes of whole gradients that a joint pass has collected, at most
        self.summed = 0  # bytes of those that add up on a rank
        self.flattened = 0  # bytes that the last engine took through main memory to make one tensor of its weights
        self.found: dict[str, Any] = {}

    def install(self) -> None:
        """Wrap the collectives, the combiner's `clear`, every store's `reduce`, DeepSpeed's `step` and `defragment`."""
        from deepspeed.runtime.engine import DeepSpeedEngine
        from deepspeed.runtime.zero import stage3

        from pipeline.zero import stages
        from pipeline.zero.combiner import GradientCombiner
        from pipeline.zero.joint import JointPass

        for name in REDUCTIONS.split():
            self._wrap_collective(name)
        clear, update = GradientCombiner.clear, DeepSpeedEngine.step
        GradientCombiner.clear = lambda self_: self._begin(self_) or clear(self_)  # pyright: ignore
        for kind in subclasses(stages.GradientStore):
            if "reduce" in vars(kind):
                kind.reduce = lambda store, reduce=kind.reduce: self._reduce(store, reduce)
        flush = JointPass._reduce
        JointPass._reduce = lambda self_, tensors: self._flush(self_, lambda: flush(self_, tensors))  # pyright: ignore
        defragment = stage3.defragment
        stage3.defragment = lambda tensors: self._flatten(defragment(tensors))
        DeepSpeedEngine.step = lambda engine, *a, **k: self._end(update(engine, *a, **k))  # pyright: ignore

    def _wrap_collective(self, name: str) -> None:
        import torch.distributed as dist

        original = getattr(dist, name)

        def wrapper(*arguments: Any, **options: Any) -> Any:
            tensors = [x for x in (*arguments, *options.values()) if isinstance(x, Tensor)]
            kind = name.removesuffix("_into_tensor").removesuffix("_tensor")
            if dist.get_world_size(options.get("group")) < dist.get_world_size():
                kind += " within"
            if self.combiner is not None:
                self.sent[kind] = self.sent.get(kind, 0) + max(x.numel() * x.element_size() for x in tensors)
            with _disable_current_modes():  # what gloo allocates inside itself is none of ours
                return original(*arguments, **options)

        setattr(dist, name, wrapper)

    def _flatten(self, made: Tensor) -> Tensor:
        self.flattened = made.nbytes
        return made

    def _begin(self, combiner: GradientCombiner) -> None:
        if self.combiner is None:  # a later `clear` in a step makes room for the retain gradient
            self.combiner, self.step = combiner, self.step + 1
            self.sent, self.live, self.waiting = {}, {}, 0

    def _flush(self, joint: JointPass, flush: Callable[[], None]) -> None:
        """The gradients that a joint pass has collected, and what their reduction makes of them."""
        from pipeline.planning.meta_trace import LiveBytes

        waiting = list(joint.pending.values())
        with LiveBytes([*waiting, *joint.combiner.stash_slices()]) as ledger:
            flush()
        copied = 0 if joint.reduces_once else ledger.peak  # in the backward pass, or after the last
        self.waiting = max(self.waiting, sum(storages(waiting).values()) + copied)

    def _reduce(self, store: GradientStore, reduce: Any) -> list[Tensor]:
        """The last call in a step: both gradients exist, and the optimizer has the state of the step before."""
        assert self.combiner is not None
        optimizer = store.engine.optimizer
        parameters = list(store.engine.module.parameters())
        own = [getattr(parameter, key, None) for parameter in parameters for key in ("grad", "grad_accum")]
        before = storages(own)
        slices = reduce(store)
        inner = getattr(optimizer, "optimizer", optimizer)
        copies = [parameter for group in inner.param_groups for parameter in group["params"]]
        copies += getattr(optimizer, "fp32_partitioned_groups_flat", [])
        moments = [value for state in inner.state.values() for value in state.values()]
        shares = [getattr(parameter, key, None) for parameter in parameters for key in SHARES]
        self.live["parameters"] = storages([*parameters, *shares])
        after = storages([*slices, *(copy.grad for copy in copies)])
        self.live["gradients"] = max(before, after, key=lambda at: sum(at.values()))
        self.summed = 0 if store.local_sum is None else store.local_sum.flat.nbytes
        self.live["stash"] = storages([self.combiner.stash, self.combiner.average, self.combiner.mean_square])
        held = storages([*copies, *moments])
        self.live["optimizer"] = {at: size for at, size in held.items() if at not in self.live["parameters"]}
        return slices

    def _end(self, _: object) -> None:
        self.combiner = None
        if self.step == self.number:
            memory = {kind: sum(at.values()) for kind, at in self.live.items()}
            unreduced = self.waiting + self.summed
            self.found = {"memory": memory, "sent": dict(self.sent), "unreduced": unreduced}


def measure(configurations: dict[str, dict[str, Any]], report: str) -> None:
    """Of each run's third step on rank 0: bytes by kind just before `engine.step()`, bytes that collectives move."""
    import torch.distributed as dist
    from deepspeed.utils import groups

    from pipeline import trainer

    meter, found = StepMeter(2), {}
    meter.install()
    for run in configurations:
        meter.step, meter.flattened, meter.found = -1, 0, {}
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
        config = RunConfig.model_validate(configurations[run])
        trainer.run(config, deepspeed_config(config))
        found[run] = {**meter.found, "flattened": meter.flattened}
    if dist.get_rank() == 0:
        Path(report).write_text(json.dumps(found))
