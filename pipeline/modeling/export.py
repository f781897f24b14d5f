"""A trained model as a Hugging Face folder, in which several ranks write and which appears at once."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import deepspeed
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pipeline.config.schema import Lora
from pipeline.distributed.errors import raise_on_all_ranks
from pipeline.distributed.slow_work import slow_work
from pipeline.errors import disk_errors
from pipeline.files import remove_whole, sync, whole
from pipeline.modeling.lora import write_adapter
from pipeline.modeling.shards import File, Shards
from pipeline.zero.sizes import EXPORT_FILE

log = logging.getLogger(__name__)


def export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    lora: Lora | None = None,
    card: str | None = None,
    max_bytes: int = EXPORT_FILE,
) -> None:
    """Write `folder` for `AutoModelForCausalLM.from_pretrained`: safetensors, tokenizer, model card.

    The safetensors are a model's, or with `lora` and without `lora.merge` an adapter's as peft writes it. A model is
    written in files of at most `max_bytes`, unless one tensor (of experts: a block's) is larger; no rank has more than
    one of them in memory, and as many ranks write at once as see the folder. The folder is complete or absent
    (`files.whole`). Every rank must call.

    Raises:
        FatalError: on all ranks, if the disk refuses a file of one.
    """
    is_adapter = lora is not None and not lora.merge
    with _folder_of_all_ranks(folder) as unfinished:
        if is_adapter:
            _write_adapter(model, unfinished, folder)
        else:
            _write_model(model, unfinished, folder, max_bytes)
        with raise_on_all_ranks(), slow_work(), disk_errors(folder):
            if dist.get_rank() == 0:
                tokenizer.save_pretrained(unfinished)
                if card is not None:
                    (unfinished / "README.md").write_text(card, encoding="utf-8")
                written = unfinished / ("adapter_config.json" if is_adapter else "config.json")
                for file in unfinished.iterdir():  # safetensors writes files for this user alone, Python by the umask
                    shutil.copymode(written, file)


@contextmanager
def _folder_of_all_ranks(folder: Path) -> Iterator[Path]:
    """`files.whole(folder)` for a block that all ranks enter and in which all may write; an error of one is of all."""
    made: Path | None = None
    with ExitStack() as stack:
        stack.enter_context(raise_on_all_ranks())
        stack.enter_context(disk_errors(folder))
        with raise_on_all_ranks(), disk_errors(folder):  # before the others wait for the name of the folder
            if dist.get_rank() == 0:
                made = stack.enter_context(whole(folder))
                made.mkdir()
        yield _named_by_first_rank(made)
        if dist.get_rank() == 0:
            remove_whole(folder)  # an export of the run before it was resumed


def _named_by_first_rank(path: Path | None) -> Path:
    names = [path]
    dist.broadcast_object_list(names)
    assert names[0] is not None
    return names[0]


def _write_model(model: PreTrainedModel, unfinished: Path, folder: Path, max_bytes: int) -> None:
    """All of a model but the tokenizer. In each round every writer gathers one file, then all write."""
    shards, writers, rank = Shards.of(model, max_bytes), _writers(unfinished), dist.get_rank()
    if len(shards.files) > 1:
        size, number = shards.bytes / 1e9, len(shards.files)
        log.info("export of %.3g GB in %d files by %d ranks to %s", size, number, len(writers), folder)
    with raise_on_all_ranks(), disk_errors(folder):
        if rank == 0:
            model.save_pretrained(unfinished, state_dict={})  # all but the weights
            shards.write_index(unfinished)
    for first in range(0, len(shards.files), len(writers)):
        mine: tuple[File, dict[str, Tensor]] | None = None
        for writer, file in zip(writers, shards.files[first:], strict=False):
            tensors = shards.gather(file, wanted=writer == rank)
            mine = (file, tensors) if writer == rank else mine
        tensors = {}
        with raise_on_all_ranks(), slow_work(), disk_errors(folder):
            if mine is not None:
                _write(mine[1], unfinished / mine[0].name)


def _write_adapter(model: PreTrainedModel, unfinished: Path, folder: Path) -> None:
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter]):
                if dist.get_rank() == 0:
                    weights[name] = parameter.detach().to("cpu", copy=True)
    with raise_on_all_ranks(), slow_work(), disk_errors(folder):
        if dist.get_rank() == 0:
            write_adapter(model, weights, unfinished)


def _writers(folder: Path) -> list[int]:
    """The ranks that see `folder`: all where machines share its disk, else those of the first rank's machine."""
    sees: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(sees, folder.is_dir())
    return [rank for rank, does in enumerate(sees) if does]


def _write(tensors: dict[str, Tensor], file: Path) -> None:
    save_file(tensors, file, metadata={"format": "pt"})
    sync(file)  # by the rank that wrote it: the first one, on another machine, could not
