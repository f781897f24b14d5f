"""Compare runs at matched forgetting: a verdict, answers, tables and figures, as Markdown and as one HTML page.

    python -m eval.report RUN [RUN …] --output FOLDER [--target FILE.json]
                          [--forget SUITE.METRIC] [--retain SUITE.METRIC] [--level X]

The report reads each RUN where its forget score first falls to the level (`eval/results/trajectories.py`). The suites
decide which scores and which level that is (`eval/results/metrics.py`), unless the options do. Runs that were evaluated
on several suites have all their scores in the tables.
"""

import argparse
import sys
from pathlib import Path

from eval.files import check_output, exit_status
from eval.reporting.pages import as_text
from eval.reporting.run_report import write_report
from eval.reporting.verdict import verdict
from eval.results.common import common_start, common_suites
from eval.results.conditions import of_target
from eval.results.grouping import group_runs
from eval.results.metrics import add_metric_options, choose
from eval.results.texts import read_target_texts
from eval.results.trajectories import prepare, read_run, read_target


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.report", description="Compare runs at matched forgetting.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders, evaluated or with probes")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="the folder for the report")
    parser.add_argument("--target", type=Path, metavar="FILE.json", help="evaluation of the model before unlearning")
    add_metric_options(parser)
    arguments = parser.parse_args()
    output = arguments.output
    check_output(output, "folder")
    target = read_target(arguments.target)
    runs = [read_run(folder) for folder in arguments.runs]
    suites = common_suites(runs, target, of_target(arguments.target))
    measure = choose(suites, arguments.forget, arguments.retain, arguments.level, target)
    prepared = [prepare(run, measure, target) for run in runs]
    groups, target = group_runs(prepared), common_start(prepared, target)
    table = write_report(output, groups, measure, target, read_target_texts(arguments.target))
    print("\n".join([*(finding.text for finding in verdict(groups, measure, target)), "", as_text(table)]))
    print(f"\nopen {output / 'index.html'} (or read {output / 'report.md'})")


if __name__ == "__main__":
    sys.exit(exit_status(main))
