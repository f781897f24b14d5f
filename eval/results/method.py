"""Which keys of a resolved configuration define a method, and which only describe where and how it ran."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from pydantic import BaseModel

from eval.files import read_json
from pipeline.config.schema import RunConfig
from pipeline.config.sources import Source, format_of
from pipeline.data.corpus import is_saved_dataset, read_rows
from pipeline.errors import InputError
from pipeline.files import Json

# Keys of config.yaml that do not distinguish methods: names, places, how often the run saves and measures, and where it
# computes the same numbers. Every other key does, also one that is added later.
NOT_METHOD = (
    *("output", "cache", "seed", "method"),
    *("train.micro_batch_size", "train.checkpoint_every", "train.keep_checkpoints", "train.export_every"),
    *("train.max_skipped", "model.gradient_checkpointing", "model.allow_pickle"),
    *("train.timeout_minutes", "synthesis.geometry", "synthesis.layer_geometry_every", "synthesis.stash_device"),
    *("train.probe_every", "train.stop_action", "train.schedule", "synthesis.update_geometry"),
)


NOT_METHOD_TABLES = (
    "data.probes.",
    "train.stop_at.",
)  # with names that the user chose: where a run is measured, and ends


COVERED_BY_DIGEST = ("name", "split", "refusals")  # of a corpus, beside its path; its digest covers them


def dotted(config: Json, prefix: str = "") -> Json:
    """{"train": {"steps": 5}} -> {"train.steps": 5}; keys that are null are left out."""
    return {key: value for key, value in _leaves(config, prefix).items() if value is not None}


def _leaves(config: Json, prefix: str = "") -> Json:
    leaves: Json = {}
    for key, value in config.items():
        leaves |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves


@cache
def _defaults() -> Json:
    """{key: default} of the keys of each section of a configuration."""
    sections = {name: field.annotation for name, field in RunConfig.model_fields.items()}
    return {
        f"{section}.{key}": field.default
        for section, keys in sections.items()
        if isinstance(keys, type) and issubclass(keys, BaseModel)
        for key, field in keys.model_fields.items()
        if not field.is_required() and field.default_factory is None
    }


def method_of(config: Json, digests: dict[str, str]) -> tuple[tuple[str, str], ...]:
    """The method of a run: its whole resolved configuration without NOT_METHOD, as JSON, sorted.

    Two runs with the same method are seeds of it. `digests` replace the paths of the files: the same files in another
    place are the same method, other files in the same place are another. A run without digests is known by its paths.
    A run of an earlier version lacks the keys that came later; it computed what their defaults stand for.
    Where a run is measured makes no method; `eval.results.conditions` refuses to compare what differs there.
    """
    corpora = [key.removesuffix("path") for key in digests if key.startswith("data.")]
    ignored = {*NOT_METHOD, *(corpus + key for corpus in corpora for key in COVERED_BY_DIGEST)}
    complete = dotted({**_defaults(), **_leaves(config)})
    found = {key: value for key, value in {**complete, **digests}.items() if not key.startswith(NOT_METHOD_TABLES)}
    return tuple(sorted((key, json.dumps(value)) for key, value in found.items() if key not in ignored))


def read_digests(path: Path) -> dict[str, str]:
    """{key of config.yaml, or `tokenizer`: digest of the content}; {} if the file does not exist."""
    digests = read_json(path) if path.is_file() else {}
    if not isinstance(digests, dict) or not all(isinstance(digest, str) for digest in digests.values()):
        raise InputError(f"{path} is not as training writes it; train again, or remove it to compare by paths")
    return digests


def refuse_changed(run: Path, key: str, source: Source) -> None:
    """Refuse rows that are not those of the run: its file has another content now, or another file lies at its path.

    What comes from the hub has a revision and no content here. A run of an earlier version may have no digests.

    Args:
        key: of the source in the run's configuration, as data.forget.

    Raises:
        InputError: they are not; or the source cannot be read.
    """
    digest = read_digests(run / "digests.json").get(f"{key}.path")
    is_local = format_of(source.path) is not None or is_saved_dataset(Path(source.path))
    if digest is None or not is_local:
        return
    if read_rows(source, f"{key}.")[1] != digest.partition("-")[0]:  # the rest is about columns
        raise InputError(
            f"{key}.path: {source.path} is not what {run} read: its content has changed, or it is "
            "another file of that name; restore it, or start this command where the run was started"
        )
