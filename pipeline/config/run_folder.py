"""A run and its folder: what identifies the run, and what `--resume` may change."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from pipeline.config.load import resolve
from pipeline.config.schema import RunConfig
from pipeline.errors import FULL, InputError
from pipeline.files import Json, unwritable

# A resumed run may differ in these keys: its weights depend on none of them.
RELOCATABLE_KEYS = ("output", "cache")  # a run may move


# It may also read from other paths: digests of the content, and the keys of the DeepSpeed file, are compared instead.
BY_CONTENT = (
    "model.path",
    "train.deepspeed",
    *(f"data.{task}.{key}" for task in ("forget", "retain") for key in ("path", "refusals")),
)


RESUME_MUTABLE_KEYS = (
    *("method", "model.allow_pickle", "model.gradient_checkpointing"),
    *("synthesis.stash_device", "synthesis.update_geometry", "synthesis.layer_geometry_every"),
    *("train.schedule", "train.micro_batch_size", "train.checkpoint_every", "train.keep_checkpoints"),
    *("train.export_every", "train.max_skipped", "train.timeout_minutes"),
    *("train.probe_every", "train.stop_at", "train.stop_action"),
)  # another number of ranks may need another micro-batch


# The same for keys of the DeepSpeed file: monitors, and sizes and places that change how data moves but no result. A
# size that decides the layout of a checkpoint (sub_group_size) is not among them.
FREE_OF_DEEPSPEED = (
    *("tensorboard", "csv_monitor", "wandb", "comet", "flops_profiler", "comms_logger", "wall_clock_breakdown"),
    *("memory_breakdown", "dump_state", "steps_per_print", "train_micro_batch_size_per_gpu", "aio"),
    *(
        f"zero_optimization.{key}"
        for key in (
            *("overlap_comm", "contiguous_gradients", "reduce_bucket_size", "allgather_bucket_size"),
            *(
                "stage3_prefetch_bucket_size",
                "prefetch_bucket_size",
                "stage3_max_live_parameters",
                "max_live_parameters",
            ),
            *("stage3_max_reuse_distance", "max_reuse_distance", "stage3_param_persistence_threshold"),
            *("param_persistence_threshold", "offload_optimizer.pin_memory", "offload_param.pin_memory"),
            *("offload_optimizer.buffer_count", "offload_param.buffer_count", "offload_optimizer.nvme_path"),
        )
    ),
)


def check_output_dir(config: RunConfig, resume: bool) -> None:
    """Refuse to overwrite a run, and to resume another run than the one in the folder.

    Raises:
        InputError: `output` is a file, cannot be written, contains a run (without `resume`), or another run than
            `config` describes. `checkpoint.load` compares the content behind the keys of BY_CONTENT.
    """
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise InputError(f"output: {output} is a file; name a folder")
    found = unwritable(output)
    if found is not None and found[1].errno not in FULL:  # of a full disk, the file that does not fit says more
        place, reason = found
        raise InputError(
            f"output: {output} cannot be written, because of {place} ({reason.strerror}); name a folder elsewhere"
        )
    if not any((output / name).exists() for name in ("config.yaml", "metrics.jsonl", "final")):
        return
    if not resume:
        raise InputError(f"output: {output} already holds a run; name another folder, remove it, or give --resume")
    before, now = (_flat(run.model_dump()) for run in (resolve(output / "config.yaml", reads_data=False), config))
    for key in before | now:  # a section that is absent in one of them has its keys in the other only
        then, wanted = before.get(key), now.get(key)
        if then != wanted and not _may_differ(key):
            raise InputError(f"--resume: {key} was {then!r} in {output} and is {wanted!r} now; keep it")


def run_fingerprint(config: RunConfig, zero: Json) -> Json:
    """The keys that decide the numbers of a run and the layout of its checkpoints, with values as in JSON.

    Args:
        zero: as `deepspeed_config` returns it.
    """
    keys = {key: value for key, value in _flat(config.model_dump()).items() if not _may_differ(key)}
    return {**keys, **{f"train.deepspeed: {key}": value for key, value in _decisive_of_deepspeed(zero).items()}}


def _may_differ(key: str) -> bool:
    """Whether a resumed run may have another value of `key`, or one whose content is compared instead."""
    if key.startswith("data.probes."):  # names that the user chose lie between
        return key.endswith(".path")
    return any(f"{key}.".startswith(f"{free}.") for free in (*RELOCATABLE_KEYS, *BY_CONTENT, *RESUME_MUTABLE_KEYS))


def content_digest(zero: Json) -> str:
    """SHA-256 of the keys in the dictionary of `deepspeed_config` that decide the numbers of a run."""
    return hashlib.sha256(json.dumps(_decisive_of_deepspeed(zero), sort_keys=True).encode()).hexdigest()


def _decisive_of_deepspeed(zero: Json) -> Json:
    stated = {"zero_optimization.stage": 0, **_flat(zero)}
    return {
        key: value
        for key, value in stated.items()
        if not any(f"{key}.".startswith(f"{free}.") for free in FREE_OF_DEEPSPEED)
    }


def _flat(tree: Json, prefix: str = "") -> Json:
    """The tree as one level of dotted keys; an absent section is None."""
    leaves: Json = {}
    for key, value in tree.items():
        leaves |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves
