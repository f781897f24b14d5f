"""Rank and number of ranks, as a launcher writes them into the environment, and a free port. Imports no torch."""

from __future__ import annotations

import os
import socket


def world_from_environment() -> tuple[int, int]:
    """(rank, number of ranks) from the variables of deepspeed, torchrun, Open MPI or MPICH; (0, 1) without them."""
    for rank, size in (
        ("RANK", "WORLD_SIZE"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        ("PMI_RANK", "PMI_SIZE"),
    ):
        if rank in os.environ and size in os.environ:
            return int(os.environ[rank]), int(os.environ[size])
    return 0, 1


def free_port() -> int:
    """A TCP port of this machine that no process listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
