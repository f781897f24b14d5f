"""`deepspeed --module pipeline.train --config FILE [--method NAME] [--a.b VALUE ...]`: unlearn, and export the model.

Exit status: 0 done; 2 unusable input (one line on stderr, nothing written); 75 SIGTERM, saved, go on with --resume; 130
Ctrl-C; 143 SIGTERM before training or a second time; 1 anything else.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.config.deepspeed import (
    accumulation,
    deepspeed_config,
    refuse_uneven_groups,
)
from pipeline.config.load import hub_name, parse_command_line
from pipeline.config.run_folder import check_output_dir
from pipeline.distributed.environment import world_from_environment
from pipeline.errors import InputError, denied_files


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns (or, once ranks have met, exits with) the status."""
    rank, world_size = world_from_environment()
    try:
        with denied_files():
            config, resume, quiet = parse_command_line(arguments)
            accumulation(config, world_size)
            zero = deepspeed_config(config)
            refuse_uneven_groups(zero, world_size)
            check_output_dir(config, resume)
        if repository := hub_name(arguments):
            from pipeline.modeling.push import check_push

            check_push(repository)
    except InputError as error:
        if rank:  # torchrun ends all as soon as one has ended, and the first has something to say
            time.sleep(3)
        return refuse(error, rank)

    from pipeline.distributed import process_group
    from pipeline.distributed.errors import report
    from pipeline.distributed.signals import STOPPED, Preempted
    from pipeline.modeling.push import push
    from pipeline.monitoring import console, trackers
    from pipeline.trainer import run

    status = 0
    try:
        run(config, zero, resume, quiet)
        if repository:
            process_group.part()
        if repository and rank == 0:
            console.logger.info("uploaded to %s", push(Path(config.output) / "final", repository))
    except InputError as error:
        status = refuse(error, rank)
    except Preempted as stopped:
        if rank == 0:
            print(f"\n{stopped}", file=sys.stderr)
        status = STOPPED
    except BaseException as error:
        status = report(error, logged=console.log_end(error))
    trackers.end(status)
    process_group.leave(status)


def refuse(error: InputError, rank: int) -> int:
    if rank == 0:
        print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
