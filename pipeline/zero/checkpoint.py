"""Save and resume: DeepSpeed shards a checkpoint, and a marker shows that it is complete.

A checkpoint counts once its marker exists, which is written last, when all else is on the disk: a kill or a power cut
while saving leaves the one before it. The marker has a checksum of each file, and what identifies the run. What
DeepSpeed does not save (the moving average of a rule, a dual weight, the random state) lies beside its files, one file
a rank. The position in the data is not saved: a batch is a function of the step.

DeepSpeed's files are pickles, which run code when they are loaded: resume only a run folder of your own.
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TypedDict

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.distributed.errors import is_lost, raise_on_all_ranks
from pipeline.distributed.slow_work import slow_work
from pipeline.errors import InputError, disk_errors, shorten
from pipeline.files import Json, remove_unfinished, sync, write_whole
from pipeline.zero.combiner import GradientCombiner
from pipeline.zero.engine import Engine
from pipeline.zero.optimizer_state import Fragment, optimizer_layout
from pipeline.zero.reshard import copy_fragments, load_optimizer
from pipeline.zero.storage import copy_into_memory, own_storage

MARKER = "complete.json"

COUNTERS = ("global_steps", "global_samples", "skipped_steps")  # of the engine

Identity = Json  # what decides the weights of a run, by name, as JSON has it


class RankState(TypedDict):
    """What each rank saves beside DeepSpeed's files."""

    average: Tensor | None  # of the combiner, as is the next; None too where the first rank saves all of it
    mean_square: Tensor | None
    average_layout: list[Json]  # the fragments of both, as dictionaries
    combinations: int  # of the combiner so far
    cosines: dict[str, float]  # of the combiner
    retain_weight: float  # of the combiner
    optimizer_layout: list[list[Json]]  # of `optimizer_layout`, likewise
    schedule: Json
    counters: dict[str, int]
    random: Tensor
    cuda_random: Tensor | None


class Marker(TypedDict):
    """`complete.json`."""

    step: int
    ranks: int
    run: Identity
    files: dict[str, list[int]]  # name -> `checksum`


def save(engine: Engine, combiner: GradientCombiner, run: Path, step: int, *, keep: int, identity: Identity) -> None:
    """Write `run/checkpoints/step-NNNNNN` after `step` steps. Every rank must call, between steps.

    Args:
        keep: how many checkpoints, the newest, are left on the disk.
        identity: `load` refuses a checkpoint of another.

    Raises:
        FatalError: the disk is full or cannot be written.
    """
    folder = run / "checkpoints" / f"step-{step:06d}"
    with disk_errors(folder, folder):
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)  # half of one, perhaps by another number of ranks
        dist.barrier()
        # Frozen weights are those that the run starts from, which the marker names by their digest.
        tied = engine.module.register_state_dict_post_hook(_drop_frozen)
        with own_storage(engine) as storage:
            place, tag = str(folder.parent), folder.name
            engine.save_checkpoint(place, tag=tag, save_latest=False, exclude_frozen_parameters=True)
        tied.remove()
        with raise_on_all_ranks(), slow_work(), disk_errors(folder):
            storage.write()
            torch.save(_rank_state(engine, combiner), _rank_file(folder, dist.get_rank()))
        sums: list[dict[str, list[int]]] = [{} for _ in range(dist.get_world_size())]
        with raise_on_all_ranks(), slow_work(), disk_errors(folder):
            own = [file for file in sorted(folder.iterdir()) if _is_own(file.name)]
            for file in own:  # an older checkpoint is removed below: this one must outlast a power cut by then
                sync(file)
            mine = {file.name: checksum(file) for file in own}
        dist.all_gather_object(sums, mine)
        with raise_on_all_ranks(), disk_errors(folder):
            if dist.get_rank() == 0:
                files = {name: value for part in sums for name, value in part.items()}
                marker: Marker = {"step": step, "ranks": dist.get_world_size(), "run": identity, "files": files}
                write_whole(folder / MARKER, json.dumps(marker))
                sync(folder.parent)
    with raise_on_all_ranks(), disk_errors(folder.parent):  # the new checkpoint stays, if an old one cannot be removed
        if dist.get_rank() == 0:
            tidy(run, keep)


def _rank_state(engine: Engine, combiner: GradientCombiner) -> RankState:
    # Where every rank has the whole gradient, its averages are the same: one file has them.
    elsewhere = combiner.store.replicated and combiner.group == 1 and dist.get_rank() != 0
    return {
        "average": None if elsewhere else combiner.average,
        "mean_square": None if elsewhere else combiner.mean_square,
        "average_layout": [asdict(fragment) for fragment in combiner.average_layout()],
        "combinations": combiner.state.step,
        "cosines": combiner.cosines(),
        "retain_weight": combiner.retain_weight,
        "optimizer_layout": [[asdict(fragment) for fragment in group] for group in optimizer_layout(engine)],
        "schedule": engine.lr_scheduler.state_dict(),
        "counters": {name: getattr(engine, name) for name in COUNTERS},
        "random": torch.get_rng_state(),
        "cuda_random": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,  # of dropout there
    }


def _drop_frozen(module: torch.nn.Module, state: dict[str, object], prefix: str, _: dict[str, object]) -> None:
    """Of a frozen tensor with two names (tied embeddings) DeepSpeed drops one and would write the other."""
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            state.pop(prefix + name, None)


def tidy(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` complete checkpoints, and what killed runs have left half written."""
    complete = sorted(marker.parent for marker in run.glob(f"checkpoints/step-*/{MARKER}"))
    for old in sorted({*run.glob("checkpoints/step-*")} - {*complete[-keep:]}):
        (old / MARKER).unlink(missing_ok=True)  # first: half a checkpoint must not look complete
        shutil.rmtree(old)
    for folder in (run, run / "exports"):
        remove_unfinished(folder)


def newest(run: Path) -> Path | None:
    """The last complete checkpoint of a run."""
    return max((marker.parent for marker in run.glob(f"checkpoints/step-*/{MARKER}")), default=None)


def load(engine: Engine, combiner: GradientCombiner, checkpoint: Path, identity: Identity) -> int:
    """Restore the engine and the rule's state as `save` found them; returns the steps done by then.

    Every rank must call, before training. On as many ranks all is as it was, bit for bit; on another number the weights
    and the state are the same numbers, sharded anew.

    Raises:
        InputError: the checkpoint is damaged, or of another run.
    """
    with raise_on_all_ranks(), slow_work():
        marker = _check(checkpoint, identity)
    rank, world = dist.get_rank(), dist.get_world_size()
    same = world == marker["ranks"]
    # Memory-mapped: of what other ranks wrote, only the parts are read that are this rank's now.
    before: list[RankState] = [
        torch.load(_rank_file(checkpoint, writer), map_location="cpu", mmap=True, weights_only=True)
        for writer in (dict.fromkeys([rank, 0]) if same else range(marker["ranks"]))
    ]
    if same or not engine.zero_optimization_stage():
        with own_storage(engine):
            found, _ = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name, load_module_strict=False)
        if found is None:
            raise RuntimeError(f"DeepSpeed finds no checkpoint in {checkpoint}")
        copy_into_memory(getattr(engine.optimizer, "optimizer", engine.optimizer))
    else:
        layouts = [[_fragments(group) for group in state["optimizer_layout"]] for state in before]
        load_optimizer(engine, checkpoint, layouts)
        engine.lr_scheduler.load_state_dict(before[0]["schedule"])
        for name, value in before[0]["counters"].items():
            setattr(engine, name, value)
    combiner.retain_weight = before[0]["retain_weight"]
    averages = (combiner.average, [state["average"] for state in before])
    for now, then in (averages, (combiner.mean_square, [state["mean_square"] for state in before])):
        if now is not None:
            flats = [
                (_fragments(state["average_layout"]), flat)
                for state, flat in zip(before, then, strict=True)
                if flat is not None
            ]
            copy_fragments(flats, (combiner.average_layout(), now))
    combiner.restore(before[0]["combinations"], before[0]["cosines"])
    if same:
        torch.set_rng_state(before[0]["random"])
        if (cuda_random := before[0]["cuda_random"]) is not None:
            torch.cuda.set_rng_state(cuda_random)
    else:  # dropout: other than in the steps before
        torch.manual_seed(torch.initial_seed() + 1_000_003 * marker["step"])
    return marker["step"]


def _fragments(saved: list[Json]) -> list[Fragment]:
    return [Fragment(**fragment) for fragment in saved]


def _check(checkpoint: Path, identity: Identity) -> Marker:
    """The marker, after a check that it is this run's and that its checksums hold; each rank reads a part of the files.

    Raises:
        InputError: see `load`.
    """
    with _damage(checkpoint):
        marker: Marker = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
        then, files = marker["run"], sorted(marker["files"].items())
        differing = [name for name in then | identity if then.get(name) != identity.get(name)]
        for name, value in files if not differing else ():
            if _is_own(name) and checksum(checkpoint / name) != value:
                raise ValueError(f"{name} is not what was written")
    if differing:
        was, now = (shorten(repr(side.get(differing[0]))) for side in (then, identity))
        raise InputError(
            f"--resume: {checkpoint} is of another run: {', '.join(differing)} differ ({differing[0]} was {was} and is "
            f"{now} now); restore what it was, or the version of this program that wrote it, or start a new run in "
            "another output folder"
        )
    return marker


@contextmanager
def _damage(checkpoint: Path) -> Iterator[None]:
    """Turns what goes wrong when `checkpoint` is read into one line: an InputError."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
        if is_lost(error):
            raise
        raise InputError(
            f"--resume: {checkpoint} is damaged ({shorten(error)}); remove it to resume from the one before"
        ) from error


def checksum(file: Path) -> list[int]:
    """[bytes, CRC-32] of a file: they find damage, and do not resist an attacker."""
    size = total = 0
    with file.open("rb") as content:
        while chunk := content.read(2**22):
            size, total = size + len(chunk), zlib.crc32(chunk, total)
    return [size, total]


def _is_own(file: str) -> bool:
    """Whether this rank has written the file, and will read it: its machine has it in memory, others fetch it.

    DeepSpeed names the rank in what each rank writes, and the first rank writes what has none.
    """
    named = re.search(r"(?:pp_rank_|own-)(\d+)", file)
    return int(named[1] if named else 0) % dist.get_world_size() == dist.get_rank()


def _rank_file(checkpoint: Path, rank: int) -> Path:
    return checkpoint / f"own-{rank}.pt"
