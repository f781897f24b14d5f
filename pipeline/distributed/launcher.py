"""Which launcher starts the ranks of this machine: on the GPUs of CUDA_VISIBLE_DEVICES, or on the CPU, at a free port.

python -m pipeline.distributed.launcher [RANKS]      for scripts: each word of the command on a line of its own
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.config.automatic import has_gpu
from pipeline.distributed.environment import free_port
from pipeline.errors import InputError


def rank_launcher(ranks: int | None) -> list[str]:
    """The launcher, with its options, of this many ranks on this machine: a visible GPU for each if there are GPUs.

    None: a rank for each visible GPU, or two on a CPU.

    `--num_gpus N` would take GPUs 0 to N - 1 whatever CUDA_VISIBLE_DEVICES names: the launcher then deletes the
    variable. On a CPU its devices are the sockets of the machine, and only their number may be given. It knows GPUs by
    their numbers alone; `torchrun` leaves the variable as it is, so it starts ranks on GPUs named by UUID or MIG id.
    Without `-q` the launcher reports the whole environment and every process.

    Raises:
        InputError: fewer visible GPUs than ranks. Of several MIG instances CUDA sees the first alone.
    """
    count, visible = 0, os.environ.get("CUDA_VISIBLE_DEVICES")
    if has_gpu():
        import torch  # takes seconds

        count = torch.cuda.device_count()
    if ranks is None:
        ranks = count or 2
    if not count:
        return ["deepspeed", "-q", "--num_gpus", str(ranks)]
    if ranks > count:
        seen = f"{count} GPU{'s' * (count > 1)}" + (f" (CUDA_VISIBLE_DEVICES={visible})" if visible else "")
        raise InputError(
            f"--ranks {ranks}: each rank trains on a GPU of its own, and there is {seen}; give --ranks {count}"
        )
    if visible is None:
        return ["deepspeed", "-q", "--num_gpus", str(ranks)]
    names = [name.strip() for name in visible.split(",")][:ranks]
    if not all(name.isdecimal() for name in names):
        return ["torchrun", "--nproc_per_node", str(ranks)]
    return ["deepspeed", "-q", "--include", f"localhost:{','.join(names)}"]


def at_free_port(line: Sequence[str]) -> list[str]:
    """The line of a launcher with a port that no other job of this machine uses."""
    return [line[0], "--master_port", str(free_port()), *line[1:]]


def startable(line: Sequence[str]) -> list[str]:
    """`at_free_port` with the launcher from this Python's environment, or else from the PATH.

    Raises:
        InputError: there is no such program.
    """
    beside = Path(sys.executable).with_name(line[0])
    found = str(beside) if beside.is_file() else shutil.which(line[0])
    if found is None:
        raise InputError(f"there is no command {line[0]}; install requirements.txt into this environment")
    return [found, *at_free_port(line)[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pipeline.distributed.launcher", description=__doc__)
    parser.add_argument("ranks", type=int, nargs="?", help="default: one for each visible GPU, or two on a CPU")
    try:
        words = at_free_port(rank_launcher(parser.parse_args().ranks))
    except InputError as error:
        sys.exit(f"error: {error}")
    print("\n".join(words))


if __name__ == "__main__":
    main()
