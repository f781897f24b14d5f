"""What this program uses of a DeepSpeed engine, as types: an engine's classes have none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import TypeVar

if TYPE_CHECKING:
    from deepspeed.monitor.monitor import MonitorMaster
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

Module = TypeVar("Module", bound=nn.Module, covariant=True, default=nn.Module)


class Forward(Protocol[Module]):
    """The part of an `Engine` that a forward pass needs."""

    optimizer: Any  # one of five classes of DeepSpeed without a common interface; `compat.INTERNALS` lists their parts
    device: torch.device

    @property
    def module(self) -> Module: ...

    def __call__(self, *inputs: object, **named: object) -> Any:
        """The module's forward pass. Its arguments and result are those of the module."""
        ...

    def train(self) -> nn.Module: ...

    def eval(self) -> nn.Module: ...


class Engine(Forward[Module], Protocol[Module]):
    """The methods and attributes of `deepspeed.initialize`'s first result that this program uses.

    All but one are in DeepSpeed's own public interface; what is used beyond it stands in `compat.INTERNALS`.
    """

    world_size: int
    communication_data_type: torch.dtype  # in which gradients are reduced
    lr_scheduler: LRScheduler
    monitor: MonitorMaster
    global_steps: int
    global_samples: int
    skipped_steps: int
    checkpoint_engine: CheckpointEngine  # what writes and reads the files of a checkpoint
    _global_grad_norm: float | None  # the one private attribute: see `compat.INTERNALS`

    def backward(self, loss: Tensor, *, scale_wrt_gas: bool = True) -> Tensor:
        """Adds the gradient of `loss`, a 0-dim tensor."""
        ...

    def step(self) -> None:
        """Clip, update, schedule; nothing of it unless the accumulation boundary is set."""
        ...

    def was_step_applied(self) -> bool:
        """Whether the last `step` changed weights."""
        ...

    def get_global_grad_norm(self) -> float | None:
        """Of the last `step`, before clipping, over all ranks."""
        ...

    def gradient_clipping(self) -> float:
        """The largest norm of a gradient; 0: any."""
        ...

    def get_lr(self) -> list[float]:
        """The learning rate of each parameter group in the next `step`."""
        ...

    def zero_grad(self) -> None: ...

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None: ...

    def is_gradient_accumulation_boundary(self) -> bool: ...

    def managed_gradient_accumulation(self) -> bool: ...

    def allreduce_gradients(self) -> None: ...

    def zero_optimization_stage(self) -> int: ...

    def zero_reduce_bucket_size(self) -> int: ...

    def fp16_enabled(self) -> bool: ...

    def autotp_size(self) -> int:
        """Ranks over which tensors are cut; 0 or 1 without tensor parallelism."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def buffers(self) -> Iterator[Tensor]: ...

    def save_checkpoint(
        self, save_dir: str, tag: str, *, save_latest: bool, exclude_frozen_parameters: bool
    ) -> object: ...

    def load_checkpoint(
        self, load_dir: str, tag: str, *, load_module_strict: bool
    ) -> tuple[str | None, Mapping[str, object]]: ...

    def destroy(self) -> None:
        """Removes what DeepSpeed hooked into the module."""
        ...


class PartitionedParameter(nn.Parameter):
    """The attributes that ZeRO-3 gives a parameter. No object is made of this class."""

    ds_id: int
    ds_numel: int
    ds_shape: torch.Size
    ds_process_group: torch.distributed.ProcessGroup
    ds_status: Enum
    ds_tensor: Tensor
    ds_secondary_tensor: Tensor | None

    def partition(self) -> None:
        """Drop the gathered parameter."""
        ...

    def partition_numel(self) -> int:
        """Elements of each rank's share, with the padding at its end."""
        ...
