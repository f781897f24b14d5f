"""Memory and traffic of a step of live engines, measured by wrappers around DeepSpeed and the combiner."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.config.deepspeed import deepspeed_config
from pipeline.config.schema import RunConfig

REDUCTIONS = "all_reduce broadcast reduce all_gather all_gather_into_tensor reduce_scatter reduce_scatter_tensor"
SHARES = ("ds_tensor", "ds_secondary_tensor")


def storages(tensors: Any) -> dict[int, int]:
    """Address -> bytes of the storages below `tensors`, those that hold something."""
    kept = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, Tensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in kept if storage.nbytes()}


def subclasses(kind: type) -> list[type]:
    return [one for below in kind.__subclasses__() for one in (below, *subclasses(below))]


def measure(configurations: dict[str, dict[str, Any]], report: str) -> None:
    """Of each run's third step on rank 0: bytes by kind just before `engine.step()`, bytes that collectives move."""
    import torch.distributed as dist

    sent: dict[str, int] = {}
    watching = False

    def watch(name: str) -> None:
        original = getattr(dist, name)

        def wrapper(*arguments: Any, **options: Any) -> Any:
            tensors = [x for x in (*arguments, *options.values()) if isinstance(x, Tensor)]
            kind = name.removesuffix("_into_tensor").removesuffix("_tensor")
            if dist.get_world_size(options.get("group")) < dist.get_world_size():
                kind += " within"
            if watching:
                sent[kind] = sent.get(kind, 0) + max(x.numel() * x.element_size() for x in tensors)
            return original(*arguments, **options)

        setattr(dist, name, wrapper)

    for collective in REDUCTIONS.split():
        watch(collective)

    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.utils import groups

    from pipeline import trainer as program
    from pipeline.zero import stages
    from pipeline.zero.combiner import GradientCombiner

    found: dict[str, Any] = {}
    live: dict[str, dict[int, int]] = {}
    current: GradientCombiner | None = None  # in a step, from the first `clear` to the end of `engine.step`
    run, step = "", -1
    clear, update = GradientCombiner.clear, DeepSpeedEngine.step

    def clear_and_count(combiner: GradientCombiner) -> None:
        """The first call in a step; another one makes room for the retain gradient."""
        nonlocal current, step, watching, live
        if current is None:
            current, step = combiner, step + 1
            watching, live = step == 2, {}
            sent.clear()
        clear(combiner)

    def reduce_and_count(store: stages.GradientStore) -> list[Tensor]:
        """The last call in a step: both gradients exist, and the optimizer has the state of the step before."""
        assert current is not None
        engine = store.engine
        parameters = list(engine.module.parameters())
        own = [getattr(parameter, key, None) for parameter in parameters for key in ("grad", "grad_accum")]
        before = storages(own)
        slices = reductions[type(store)](store)
        inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
        copies = [parameter for group in inner.param_groups for parameter in group["params"]]
        copies += getattr(engine.optimizer, "fp32_partitioned_groups_flat", [])
        moments = [value for state in inner.state.values() for value in state.values()]
        shares = [getattr(parameter, key, None) for parameter in parameters for key in SHARES]
        live["parameters"] = storages([*parameters, *shares])
        after = storages([*slices, *(copy.grad for copy in copies)])
        live["gradients"] = max(before, after, key=lambda at: sum(at.values()))
        live["stash"] = storages([current.stash, current.average])
        held = storages([*copies, *moments])
        live["optimizer"] = {at: size for at, size in held.items() if at not in live["parameters"]}
        return slices

    def step_and_report(engine: DeepSpeedEngine, *arguments: Any, **named: Any) -> None:
        nonlocal current, watching
        update(engine, *arguments, **named)
        current = None
        if watching:
            found[run] = {"memory": {kind: sum(at.values()) for kind, at in live.items()}, "sent": dict(sent)}
        watching = False

    reductions = {kind: kind.reduce for kind in subclasses(stages.GradientStore) if "reduce" in vars(kind)}
    for kind in reductions:
        kind.reduce = reduce_and_count
    GradientCombiner.clear, DeepSpeedEngine.step = clear_and_count, step_and_report
    for run in configurations:
        step = -1
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
        config = RunConfig.model_validate(configurations[run])
        program.run(config, deepspeed_config(config))
    if dist.get_rank() == 0:
        Path(report).write_text(json.dumps(found))
