"""Evaluate a model folder, or every export of a training run, on named suites.

    python -m eval.run --model FOLDER --suite NAME [NAME …] --output FILE.json [--data FOLDER]
                       [--batch-size N|auto] [--shots N] [--tasks NAME [NAME …] [--tasks-dir FOLDER] [--limit N]]
                       [--ds-config FILE.json | --device-map auto | --backend vllm]
                       [--allow-pickle] [--trust-remote-code]

The command reads weights from safetensors only and does not run code that comes with a model, unless the last two
options allow it.

Under `torchrun` or `deepspeed` (`--module eval.run`) the ranks share the work; the scores are those of one rank, and
the first rank writes them. For a model that does not fit on one GPU, `--device-map auto` spreads it over those of a
machine, in one process, and `--ds-config` shards it over the ranks by ZeRO-3, which gathers the whole model for each
token that it generates.

A *run folder* (with `metrics.jsonl`, and `exports/` or `final/`) gives {"trajectory": [{"step", "model", "suites"}, …],
…} in the order of steps; any other folder is one Hugging Face model and gives {"model", "suites", …}. Each suite gives
"metrics" (nested means), "counts" and the "protocol" in words. The command prints the headline scores as a table, with
a row `before` where the model that the run began with has been evaluated (eval/results/before.py). It writes those of
the last model into its card (README.md), if it has one, and those of a run into its TensorBoard log.
Without --data, suite `corpus` scores the corpora of the run folder. Until all is evaluated, FILE.json.partial has what
there is, in the same form. Exit status: 0 done, 2 unusable input (one line on stderr).
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from eval.batch_size import AUTO, DEFAULT, rows_or_auto
from eval.evaluation import evaluate_all, find_models, load_suites, provenance
from eval.files import check_output, exit_status, read_config, read_log, without_nan
from eval.loading import add_trust_options
from eval.placement import add_placement_options, loader_of
from eval.reporting.card import write_scores
from eval.reporting.pages import as_text
from eval.results.before import base_of, scores_before
from eval.results.known import unknown_to
from eval.results.metrics import flatten, headlines, label
from eval.results.numbers import printed
from eval.results.trajectories import Scores, probes_of, read_scores
from eval.suites import MMLU_SHOTS, SUITES, check_suites, sharing
from eval.suites.task_options import add_task_options, task_options
from pipeline.errors import InputError
from pipeline.files import Json, write_whole

FORGET_SETS = ("forget01", "forget05", "forget10")  # of TOFU on the hub


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eval.run", description="Evaluate a model or a run.")
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="FOLDER", help="a model or run folder, or a name on the hub")
    add("--suite", nargs="+", required=True, metavar="NAME", help=f"one or more of: {', '.join(SUITES)}")
    add("--output", type=Path, required=True, metavar="FILE.json", help="the file to write: one JSON object")
    add("--data", type=Path, metavar="FOLDER", help="local copies of the suites' data")
    size = f"prompts in one batch (default {DEFAULT}); auto: as many as the GPU's memory holds"
    add("--batch-size", type=rows_or_auto, default=DEFAULT, metavar="N", help=size)
    add("--shots", type=int, metavar="N", help=f"examples before each question of mmlu (default {MMLU_SHOTS})")
    add("--forget-set", choices=FORGET_SETS, help=f"of tofu from the hub (default {FORGET_SETS[-1]})")
    add_task_options(parser)
    add("--config", type=Path, metavar="FILE", help="for probes: the YAML with data.probes (default: the run's own)")
    add_placement_options(parser)
    add_trust_options(parser)
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # `deepspeed` adds it
    return parser


def check(arguments: argparse.Namespace, suites: list[str]) -> dict[str, Json]:
    """Further arguments of `load_probes` by the suite's name; raises InputError for options that do not fit."""
    if arguments.batch_size != AUTO and arguments.batch_size < 1:
        raise InputError(f"--batch-size {arguments.batch_size}: give 1 or more, or auto")
    if arguments.shots is not None and "mmlu" not in suites:
        raise InputError("--shots belongs to suite mmlu alone; leave it out")
    if arguments.forget_set is not None and ("tofu" not in suites or arguments.data is not None):
        raise InputError("--forget-set belongs to suite tofu from the hub alone; --data decides the forget set itself")
    if arguments.shots is not None and arguments.shots < 0:
        raise InputError(f"--shots {arguments.shots}: give 0 or more")
    options: dict[str, Json] = {}
    if tasks := task_options(arguments, suites):
        options["lm_eval"] = tasks
    if arguments.config is not None and "probes" not in suites:
        raise InputError("--config belongs to suite probes alone; leave it out")
    if "probes" in suites:
        own = arguments.model / "config.yaml"
        options["probes"] = {"run": arguments.config or (own if own.is_file() else None)}
    if arguments.shots is not None:
        options["mmlu"] = {"shots": arguments.shots}
    if arguments.forget_set is not None:
        options["tofu"] = {"forget_set": arguments.forget_set}
    return options


def score_tables(entries: list[Json], before: Mapping[str, Scores]) -> dict[str, list[list[str]]]:
    """A table of the headline scores of each suite: a row a model, by step, below a row of names.

    A suite without headline scores shows all of its scores, and a dash those of a model that are not finite.

    Args:
        before: by suite, of the model that a run began with; they get the first row.
    """
    tables: dict[str, list[list[str]]] = {}
    for suite in entries[0]["suites"]:
        scores = [flatten(entry["suites"][suite]["metrics"], suite) for entry in entries]
        every = dict.fromkeys(score for found in scores for score in found)  # the last model may be broken
        shown = headlines(every) or list(every)
        single = entries[0]["step"] is None
        header = ["model" if single else "step", *(label(score, shown) for score in shown)]
        names = [Path(entry["model"]).name if single else str(entry["step"]) for entry in entries]
        rows = [*([("before", before[suite])] if suite in before else []), *zip(names, scores, strict=True)]
        tables[suite] = [header if shown else [*header, "no score is finite"]] + [
            [name, *(printed(found[score]) if score in found else "-" for score in shown or [""])]
            for name, found in rows
        ]
    return tables


def before_unlearning(folder: Path, entries: list[Json], before: Mapping[str, Scores]) -> tuple[str, Scores]:
    """A single model and its scores; the model that a run began with and what is known of it.

    Of a model that a run has unlearned, which should know nothing, and of one with which a run learned, no scores.
    """
    if entries[0]["step"] is None:
        run = folder.parent.parent if folder.parent.name == "exports" else folder.parent
        unlearned = (run / "metrics.jsonl").is_file() and not is_learning(run)
        return "this model", {} if unlearned else read_scores(entries[0], folder, step=0)
    row, known = read_log(folder).before, dict[str, float]()
    for scores in (*([probes_of(row)] if row else []), *before.values()):
        known |= scores
    if not known or is_learning(folder):
        return "the model before the first step", {}
    return "the model before the first step", known


def is_learning(run: Path) -> bool:
    """Whether a run has no forget task, so that it begins with a model that need not know anything."""
    return read_config(run, ["objective"])["objective"].get("forget") == "none"


def how_to_see_before(arguments: argparse.Namespace, base: Path, suites: list[str]) -> str:
    """The command that evaluates the model `base` as the run was, on the suites whose tables have no row of it."""
    run, parser = arguments.model, make_parser()
    changed = {"model": base, "suite": suites, "output": run / "before.json"}
    if "corpus" in suites and arguments.data is None:
        changed["data"] = run
    if "probes" in suites and arguments.config is None:
        changed["config"] = run / "config.yaml"
    words = ["python", "-m", "eval.run"]
    for key, value in (vars(arguments) | changed).items():
        if key != "local_rank" and value != parser.get_default(key):
            values = value if isinstance(value, list) else [] if value is True else [value]
            words += [f"--{key.replace('_', '-')}", *map(str, values)]
    return (
        f"no evaluation of the model before the first step on {', '.join(suites)} was found: `{shlex.join(words)}` "
        "makes it, for a row of this table and for eval.report --target"
    )


@contextmanager
def noting(what: str, output: Path) -> Iterator[None]:
    """A block that writes beside the output, which has the scores already: what may not be written is named alone."""
    try:
        yield
    except OSError as error:
        print(f"note: {what} gets no scores ({error.strerror or error}); {output} has them", file=sys.stderr)


def main() -> None:
    arguments = make_parser().parse_args()
    started = time.perf_counter()
    names = check_suites(arguments.suite)
    options = check(arguments, names)
    load, sharded = loader_of(arguments, names), arguments.ds_config is not None
    runs_model = ["deepspeed"] if sharded else ["vllm"] if arguments.backend == "vllm" else []
    sharing.start(sharded)
    is_first = sharing.rank_and_size()[0] == 0
    with sharing.raise_on_all_ranks():
        if is_first:  # which alone writes: the others may be on machines without that folder
            check_output(arguments.output)
        models = find_models(arguments.model)
        if "corpus" in names and (arguments.model / "config.yaml").is_file():
            options["corpus"] = {"run": arguments.model}
        suites = load_suites(names, arguments.data, options)  # before any model: a wrong --data costs no time
    single, unfinished = models[0][0] is None, arguments.output.with_name(f"{arguments.output.name}.partial")

    def save(path: Path, entries: list[Json], dtype: str) -> None:
        scores = {"model": entries[0]["model"], "suites": entries[0]["suites"]} if single else {"trajectory": entries}
        seconds = round(time.perf_counter() - started, 3)
        answer = {**scores, **provenance(names, runs_model, dtype), "seconds": seconds}
        write_whole(path, json.dumps(without_nan(answer), indent=2) + "\n")

    entries, dtype = evaluate_all(models, suites, arguments.batch_size, load, partial(save, unfinished))
    if not is_first:
        return
    save(arguments.output, entries, dtype)
    unfinished.unlink(missing_ok=True)
    before = {} if single else scores_before(arguments.model, entries)
    for name, rows in score_tables(entries, before).items():
        print(f"{name}\n{as_text(rows)}\n")
        with noting(f"the card of {models[-1][1]}", arguments.output):
            write_scores(models[-1][1], name, rows)
    for sentence in unknown_to(*before_unlearning(arguments.model, entries, before)):
        print(f"{sentence}\n")
    base, lacking = None if single else base_of(arguments.model), [name for name in names if name not in before]
    if base is not None and lacking and not is_learning(arguments.model):
        print(f"{how_to_see_before(arguments, base, lacking)}\n")
    from eval.reporting.board import write_to_board  # TensorBoard, which --help does without

    with noting(f"the TensorBoard log of {arguments.model}", arguments.output):
        write_to_board(models, entries)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    sharing.leave(exit_status(main))
