"""What a store of gradients costs, and what it refuses at start."""

from __future__ import annotations

import gc
import logging
from datetime import timedelta
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.distributed import Ranks, end_idle_ranks, run_distributed
from tests.pipeline.zero.stages import CONFIGURATIONS, RULES, SGD, STORES
from tests.toy import (
    Case,
    engine_of,
    model_of,
    train_on_engine,
)


def live_storages() -> dict[int, torch.UntypedStorage]:
    """Where it begins -> the storage of every tensor that is alive."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor) and thing.device.type != "meta"]
    return {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}


def watch_memory(seen: list[tuple[int, ...]], engine: Any, combiner: Any) -> None:
    """(elements of the forget buffer, of a rank's share of the gradient), then (bytes born,) after each `combine`.

    What was alive before is held: a thread of gloo lets go of an earlier run's tensor when it pleases, and nothing that
    is born may begin where that one stood.
    """
    buffer = combiner.stash
    stash = 0 if buffer is None else buffer.numel()
    parts = 1 if combiner.store.replicated else engine.world_size
    seen.append((stash, sum(combiner.sizes) // parts))
    before = live_storages()
    if buffer is not None:
        del before[buffer.untyped_storage().data_ptr()]
    combine = combiner.combine

    def combined() -> Any:
        geometry = combine()
        seen.append((sum(storage.nbytes() for start, storage in live_storages().items() if start not in before),))
        return geometry

    combiner.combine = combined


def measure_memory(names: list[str]) -> None:
    """At the moment of combining, `sago` needs exactly one partition more than `sum`, in every step."""
    from pipeline.distributed import process_group as ranks

    ranks.start()
    for name in names:
        seen: dict[str, list[tuple[int, ...]]] = {"sum": [], "sago": []}
        for rule in seen:
            case = Case(model="wide", zero=CONFIGURATIONS[name], steps=3, **SGD, **RULES[rule])
            train_on_engine(case, partial(watch_memory, seen[rule]))
        (numel, share), *_ = seen["sago"]
        assert seen["sum"][0][0] == 0
        assert abs(numel - share) < 100, (name, "but for padding")
        for without, with_stash in zip(seen["sum"][1:], seen["sago"][1:], strict=True):
            assert abs(with_stash[0] - without[0] - 4 * numel) < numel // 50, (name, seen)


def test_one_forget_buffer_on_every_stage() -> None:
    end_idle_ranks()  # what other tests left behind must not die while this one counts
    run_distributed(measure_memory, 2, list(STORES))


def check_the_checks() -> None:
    from pipeline.distributed import process_group as ranks
    from pipeline.synthesis.combine import Synthesis
    from pipeline.zero.combiner import GradientCombiner

    ranks.start()
    hidden = {"3": "grad_partitions_flat_buffer", "2": "averaged_gradients", "1-offload": "norm_for_param_grads"}
    for name, attribute in hidden.items():
        case = Case(zero=CONFIGURATIONS[name])
        engine = engine_of(case, model_of(case))
        delattr(engine.optimizer, attribute)
        with pytest.raises(RuntimeError, match=r"elsewhere than expected.*deepspeed>=0\.19\.8"):
            GradientCombiner(engine, Synthesis("sago"), combine_tasks=True)
    case = Case(zero=CONFIGURATIONS["3"])
    engine = engine_of(case, model_of(case))
    engine.optimizer.fp16_groups[0].reverse()  # the slots of the flat partition in another order
    with pytest.raises(RuntimeError, match="in order"):
        GradientCombiner(engine, Synthesis("sago"), combine_tasks=True)
    foreign: Any = SimpleNamespace(
        optimizer=object(), zero_optimization_stage=lambda: 2, managed_gradient_accumulation=lambda: True
    )
    with pytest.raises(RuntimeError, match="ZeRO stage 2 with object"):
        GradientCombiner(foreign, Synthesis("sago"), combine_tasks=True)


def test_a_buffer_elsewhere_is_refused_at_start() -> None:
    run_distributed(check_the_checks, 1)


def check_the_limit() -> None:
    """DeepSpeed makes groups without a limit: 30 minutes in its releases up to 0.19.5, 10 since."""
    import deepspeed
    import torch.distributed as dist

    from pipeline.distributed import process_group as ranks

    ranks.start(7.0)
    for group in (dist.group.WORLD, deepspeed.comm.new_group([0])):
        limit: Any = group._get_backend(torch.device("cpu")).options  # pyright: ignore
        assert limit._timeout == timedelta(minutes=7)


def test_every_group_of_ranks_has_the_limit_of_the_run() -> None:
    """In a pool of its own: the group of a pool has the limit with which the pool began."""
    ranks = Ranks(1)
    try:
        assert not ranks.call(check_the_limit, (), timeout=100)
    finally:
        ranks.end()


def check_the_warning() -> None:
    from pipeline.distributed import process_group as ranks
    from pipeline.synthesis.combine import Synthesis
    from pipeline.zero.combiner import GradientCombiner

    ranks.start()
    logged: list[str] = []
    logging.getLogger("pipeline.zero.store").addFilter(lambda record: logged.append(record.getMessage()) is not None)
    for name, number in (("1", 0), ("2-overlap-small", 0), ("1-overlap", 1)):
        case = Case(zero=CONFIGURATIONS[name])
        GradientCombiner(engine_of(case, model_of(case)), Synthesis("sago"), combine_tasks=True)
        assert len(logged) == number, (name, logged)
    assert "overlap_comm" in logged[0] and "train.deepspeed" in logged[0]


def test_overlap_comm_that_is_switched_off_is_logged_once() -> None:
    run_distributed(check_the_warning, 1)
