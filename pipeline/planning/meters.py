"""What a step moves between ranks, and its peak of memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

REDUCTIONS = "all_reduce broadcast reduce all_gather all_gather_into_tensor reduce_scatter reduce_scatter_tensor"


class Traffic:
    """Counts the bytes that collectives move, as this rank calls them."""

    def __init__(self) -> None:
        import torch.distributed as dist

        self.calls, self.bytes, self.gathered = 0, 0, 0
        for name in REDUCTIONS.split():
            setattr(dist, name, self._counted(getattr(dist, name), name.startswith("all_gather")))

    def _counted(self, collective: Callable[..., object], gathers: bool) -> Callable[..., object]:
        import torch

        def wrapper(*arguments: object, **options: object) -> object:
            tensors = [x for x in (*arguments, *options.values()) if isinstance(x, torch.Tensor)]
            self.calls += 1
            size = max((x.numel() * x.element_size() for x in tensors), default=0)
            self.bytes += size
            self.gathered += size if gathers else 0
            return collective(*arguments, **options)

        return wrapper


def restart_peak(cuda: bool) -> bool:
    """Reset the peak of memory to its present size; returns whether this system can."""
    if cuda:
        import torch

        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
    except OSError:
        return False
    return True


def peak(cuda: bool) -> int:
    """Most bytes of this rank since `restart_peak`: torch's on a GPU, else all resident pages of the process."""
    if cuda:
        import torch

        return torch.cuda.max_memory_allocated()
    (kilobytes,) = re.findall(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return 1024 * int(kilobytes)
