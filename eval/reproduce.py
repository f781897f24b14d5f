"""Train, evaluate and report every row of a table of the SAGO paper, beside the numbers that it printed.

    python -m eval.reproduce table1 --gpus N [--output FOLDER] [--data FOLDER] [--parts NAME [NAME …]]
        [--rows NAME [NAME …]] [--seeds N [N …]] [-- --key value, for every run]

Table 1 has three parts, WMDP Bio, WMDP Cyber and RWKU, which are recipes of this program with the paper's values. For
each part the target model is evaluated, `eval.frontier` trains and evaluates its rows, and `eval.report` compares them.
FOLDER/table1.md has the whole table, each row with the paper's below it; FOLDER/PART/report has the reports. All parts
are checked before the first run. The same command continues after a kill, and parts may be made one after the other,
with options of their own, into the same folder. Exit status: 0 done, 1 done but for failed runs, 2 unusable input.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eval import frontier
from eval.files import exit_status
from eval.reporting.pages import as_text
from eval.reporting.reproduction import write_table
from eval.results.metrics import nearest
from eval.results.paper import RECIPES, TABLE_1, presets_of
from eval.sweep.check import check_runs, configuration
from eval.sweep.launch import end_on_terminate, refuse_overrides, split_overrides
from eval.sweep.runs import Plan, trust_options
from pipeline.errors import InputError

OWN_KEYS = ("config", "method", "seed", "output", "resume")


@dataclass(frozen=True)
class Part:
    """One benchmark of the table: its sweep, and the target model that the sweep begins with."""

    plan: Plan
    sweep: list[str]  # the arguments of `eval.frontier`, without --target and the overrides
    overrides: tuple[str, ...]

    @property
    def target(self) -> Path:
        """The evaluation of the model before unlearning."""
        return self.plan.output / "target.json"

    def evaluation(self) -> list[str]:
        """The command that evaluates the target model as the runs are evaluated."""
        model = configuration(self.plan, self.plan.methods[0], {}).model
        data = ["--data", str(self.plan.data)] if self.plan.data else []
        suites = ["--suite", *self.plan.suites, *trust_options(model.model_dump())]
        return ["eval.run", "--model", model.path, *suites, *data, "--output", str(self.target)]

    def frontier(self) -> list[str]:
        """The command that trains and evaluates the rows."""
        return ["eval.frontier", *self.sweep, "--target", str(self.target), "--", *self.overrides]

    def report(self) -> list[str]:
        """The command that compares the finished runs; empty if there is none."""
        runs = sorted(str(file.parent) for file in self.plan.output.glob("runs/*/*/seed-*/evaluation.json"))
        output = str(self.plan.output / "report")
        return ["eval.report", *runs, "--target", str(self.target), "--output", output] if runs else []


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eval.reproduce", description="Reproduce a table of the paper.")
    add = parser.add_argument
    add("table", choices=["table1"], help="of the paper: table1 (WMDP Bio, WMDP Cyber, RWKU)")
    add("--gpus", type=int, required=True, metavar="N", help="GPUs of this machine that train a run")
    add("--output", type=Path, default=Path("runs/table1"), metavar="FOLDER", help="default runs/table1")
    add("--data", type=Path, metavar="FOLDER", help="local copies of the suites' data (default: the hub)")
    add("--parts", nargs="+", default=[*RECIPES], metavar="NAME", help=f"of {', '.join(RECIPES)} (default: all)")
    rows = [row for row in TABLE_1 if row != "target"]
    add("--rows", nargs="+", default=rows, metavar="NAME", help="rows as the paper names them, as 'NPO+GD, SAGO'")
    add("--seeds", nargs="+", type=int, default=[0], metavar="N", help="default 0; the paper has one seed")
    parser.epilog = "After --, overrides for every run of these parts: -- --train.micro_batch_size 2"
    return parser


def parse_command_line(arguments: Sequence[str]) -> tuple[list[Part], Path]:
    """The parts to make, and the folder; raises InputError."""
    own, overrides = split_overrides(arguments)
    options = make_parser().parse_args(own)
    refuse_overrides(overrides, OWN_KEYS, "by this command")
    for option, given, known in (("parts", options.parts, RECIPES), ("rows", options.rows, TABLE_1)):
        for name in given:
            if name not in known or name == "target":
                raise InputError(f"--{option} {name!r}: the nearest is {nearest(name, known)!r} ({'; '.join(known)})")
    if options.gpus < 1:
        raise InputError(f"--gpus {options.gpus}: give 1 or more")
    refuse_missing_gpus(options.gpus)
    parts = []
    for suite in dict.fromkeys(options.parts):
        methods = presets_of(suite, options.rows)
        if not methods:
            raise InputError(f"--rows {'; '.join(options.rows)}: the paper has none of them for {suite}; leave it out")
        sweep = ["--config", RECIPES[suite], "--methods", *methods, "--seeds", *map(str, options.seeds)]
        sweep += ["--ranks", str(options.gpus), "--output", str(options.output / suite)]
        sweep += ["--data", str(options.data)] if options.data else []
        plan, _ = frontier.parse_command_line([*sweep, "--", *overrides])
        parts.append(Part(plan, sweep, overrides))
    return parts, options.output


def refuse_missing_gpus(number: int) -> None:
    """Raises InputError if this machine has fewer GPUs, unless the ranks are to be of its CPU."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return
    import torch  # takes seconds

    if (found := torch.cuda.device_count()) < number:
        raise InputError(f"--gpus {number}: this machine has {found}; give fewer, or DS_ACCELERATOR=cpu for its CPU")


def run(module: Sequence[str]) -> int:
    """Run a module of this program with its output shown; returns its exit status. A signal ends it too."""
    with subprocess.Popen([sys.executable, "-m", *module]) as process:
        try:
            return process.wait()
        except BaseException:
            process.terminate()  # it ends its own ranks
            process.wait()
            raise


def make(part: Part) -> bool:
    """Make what a part lacks; False if some of its runs failed.

    Raises:
        InputError: a command refuses its input; its own message gives the reason.
    """
    suite = part.plan.output.name
    print(f"== {suite}: {', '.join(part.plan.methods)}", flush=True)
    commands = [] if part.target.exists() else [part.evaluation()]
    status = 0
    for command in [*commands, part.frontier()]:
        status = run(command)
        if status not in (0, 1) or (status and command[0] != "eval.frontier"):
            raise InputError(f"{suite}: {command[0]} ended with status {status}; see above, and start this again")
    if (report := part.report()) and run(report):
        raise InputError(f"{suite}: eval.report failed; see above")
    return status == 0


def main() -> int:
    """The command; returns 1 if one of the runs failed, else 0."""
    end_on_terminate()
    parts, output = parse_command_line(sys.argv[1:])
    for part in parts:
        check_runs(part.plan)
    complete = True
    for part in parts:
        complete &= make(part)
        table = write_table(output)
        print(f"{as_text(table)}\n\nread {output / 'table1.md'}", flush=True)
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(exit_status(main))
