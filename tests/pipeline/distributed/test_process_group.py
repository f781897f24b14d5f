"""What joining the process group changes of DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from deepspeed.accelerator import cuda_accelerator
from torch.distributed import distributed_c10d

from pipeline.distributed import process_group

FREE = {0: 3 << 30, 1: 5 << 30}  # bytes of the pretended GPUs


@pytest.fixture
def join(monkeypatch: pytest.MonkeyPatch) -> Callable[[], cuda_accelerator.CUDA_Accelerator]:
    """Join a group of one rank on a machine with two pretended GPUs; returns DeepSpeed's accelerator."""
    accelerator = cuda_accelerator.CUDA_Accelerator()
    nvml = SimpleNamespace(
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(free=FREE[handle]),
    )
    monkeypatch.setattr(cuda_accelerator, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (FREE[device or 0], 8 << 30))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(process_group, "get_accelerator", lambda: accelerator)
    monkeypatch.setattr(process_group.deepspeed, "init_distributed", lambda **_: None)
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        monkeypatch.setattr(distributed_c10d, name, getattr(distributed_c10d, name))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, {"WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.get(name, "0"))

    def start() -> cuda_accelerator.CUDA_Accelerator:
        assert process_group.start() == torch.device("cuda:0")
        return accelerator

    return start


@pytest.mark.parametrize("visible", [None, "0,1", "GPU-5f1c,GPU-77aa", "MIG-5f1c", "MIG-GPU-5f1c/1/0"])
def test_free_memory_is_that_of_the_visible_gpu(
    visible: str | None, join: Callable[[], cuda_accelerator.CUDA_Accelerator], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ZeRO 1 and 2 read it; DeepSpeed would take what the variable names for numbers."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    accelerator = join()
    assert (accelerator.available_memory(), accelerator.available_memory(1)) == (FREE[0], FREE[1])
