"""The options of suite lm_eval, for every command that evaluates: which tasks, from where, and how much of each."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import InputError

SUITE = "lm_eval"


def add_task_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `task_options` reads."""
    add = parser.add_argument
    add("--tasks", nargs="+", metavar="NAME", help="of suite lm_eval: tasks, groups or tags of lm-evaluation-harness")
    add("--tasks-dir", type=Path, metavar="FOLDER", help="YAML files of tasks of your own; they may run Python code")
    add("--limit", type=int, metavar="N", help="evaluate the first N documents of each of the tasks alone")


def task_options(arguments: argparse.Namespace, suites: Sequence[str]) -> dict[str, Any]:
    """The further arguments of `load_probes` of the suite, empty without it; raises InputError for a contradiction."""
    given = {"--tasks": arguments.tasks, "--tasks-dir": arguments.tasks_dir, "--limit": arguments.limit}
    if SUITE not in suites:
        for option, value in given.items():
            if value is not None:
                raise InputError(f"{option} belongs to suite {SUITE} alone; leave it out, or add {SUITE} to --suite")
        return {}
    if arguments.tasks is None:
        raise InputError(f"suite {SUITE} evaluates the tasks that --tasks names; give at least one, as arc_easy")
    if arguments.tasks_dir is not None and not arguments.tasks_dir.is_dir():
        raise InputError(f"--tasks-dir {arguments.tasks_dir} is no folder; name one with YAML files of tasks")
    if arguments.limit is not None and arguments.limit < 1:
        raise InputError(f"--limit {arguments.limit}: give 1 or more")
    return {"tasks": arguments.tasks, "tasks_dir": arguments.tasks_dir, "limit": arguments.limit}


def task_arguments(options: Mapping[str, Any]) -> list[str]:
    """The options as a command line of `eval.run` has them."""
    if not options:
        return []
    folder = [] if options["tasks_dir"] is None else ["--tasks-dir", str(options["tasks_dir"])]
    limit = [] if options["limit"] is None else ["--limit", str(options["limit"])]
    return ["--tasks", *options["tasks"], *folder, *limit]
