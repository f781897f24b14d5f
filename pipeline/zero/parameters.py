"""The part of a parameter that this rank stores, and its whole shape, on any ZeRO stage."""

from __future__ import annotations

from torch import Size, Tensor, nn

from pipeline.zero.engine import PartitionedParameter


def local_share(parameter: nn.Parameter) -> Tensor:
    """This rank's share under ZeRO-3, a 1-D tensor with padding; else the whole parameter."""
    return getattr(parameter, "ds_tensor", parameter)


def whole_shape(tensor: Tensor) -> Size:
    """The shape of a tensor of the model; under ZeRO-3 that of the gathered parameter."""
    return getattr(tensor, "ds_shape", tensor.shape)


def release_gathered(parameter: nn.Parameter) -> None:
    """Under ZeRO-3, drop what DeepSpeed made from `local_share`, which the caller is about to change.

    That is the gathered parameter, and the copy within a machine (`zero_hpz_partition_size`). Else nothing happens.
    """
    if hasattr(parameter, "ds_tensor"):
        partitioned: PartitionedParameter = parameter  # pyright: ignore[reportAssignmentType]
        if partitioned.ds_status.name == "AVAILABLE":
            partitioned.partition()
        partitioned.ds_secondary_tensor = None
