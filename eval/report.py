"""Compare runs at matched forgetting: tables and figures as Markdown, and as one HTML file that needs no network.

    python -m eval.report RUN [RUN …] --output FOLDER [--target FILE.json]
                          [--forget SUITE.METRIC] [--retain SUITE.METRIC] [--level X]

Each RUN is read where its forget score first falls to the level (`eval.trajectories`); which scores and which level is
the suites' (`eval.measures`) or the user's choice. Runs of several suites get all their scores in the tables.
"""

import argparse
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

from eval.files import exit_status, write_atomically
from eval.reporting import figures, tables
from eval.reporting.pages import Block, Code, Figure, Heading, Table, Text, Warn, as_html, as_markdown, as_text, png
from eval.results import paper
from eval.results.grouping import group_runs
from eval.results.metrics import COLLATERAL, IN_RETAIN, ForgetRetainMetric, choose
from eval.results.trajectories import COSINES, Run, Scores, at_level, common_suites, prepare, read_run, read_target
from pipeline.errors import InputError

LOSSES = {"forget_loss": "forget loss", "retain_loss": "retain loss"}
GEOMETRY = {**COSINES, "conflict_fraction": "conflict fraction"}
LAYERS = {"cos_forget_retain": "forget-retain", "conflict_fraction": "conflict fraction"}


def compose(groups: dict[str, list[Run]], measure: ForgetRetainMetric, target: Scores | None) -> list[Block]:
    """The report in order, before it becomes Markdown or HTML."""
    runs = [run for members in groups.values() for run in members]
    return [
        *results(groups, measure, target),
        *beside_the_paper(groups, measure),
        *outside(groups, measure, target),
        Heading("Loss dynamics"),
        Figure("losses.png", "Forget and retain loss along the training (the paper's Figure 1): mean of each method's "
               "seeds, running mean over a twentieth of the steps."),
        *geometry(groups, measure),
        *robustness(groups),
        *cost(groups, measure),
        Heading("Every score at the level"),
        Table(tables.every_score(groups, measure, target)),
        Heading("Every run"),
        Table(tables.seed_table(groups, measure)),
        *left_out(runs, measure),
        *how(runs),
    ]  # fmt: skip


def results(groups: dict[str, list[Run]], measure: ForgetRetainMetric, target: Scores | None) -> list[Block]:
    """At the matched level, and at the end of the runs."""
    columns = tables.headline_columns(groups, measure)
    missed = [f"{name} seed {r.seed}" for name, rs in groups.items() for r in rs if not at_level(r.trajectory, measure)]
    verdict = f"Did not reach it, and are in no mean: {', '.join(missed)}." if missed else "Every run reached it."
    chance = "" if measure.chance is None else f" A model that knows nothing scores about {measure.chance:g}."
    start = "" if target else " Without --target the way from the original to the first export is not seen."
    early = [run.folder for rs in groups.values() for run in rs if run.trajectory[0][measure.forget] <= measure.level]
    blocks: list[Block] = [
        Heading(f"Results at {measure.forget} {measure.level:g}"),
        Text("Rules forget at different speeds, so each run is read where its forget score first falls to the level, "
             f"interpolated between the two evaluations around it: {measure.forget} (lower: more forgotten) at "
             f"{measure.level:g}, compared by {measure.retain} (higher: more kept). Mean ± sample sd over seeds; "
             f"scores in [0, 1].{chance}{start} {verdict}"),
        Table(tables.matched_table(groups, measure, columns, target)),
        Figure("frontier.png", "Forget against retain score along each run; the markers are the points at the level "
               "(dashed; dotted: chance; cross and line: the target model)."),
        Heading("The best export at or below the level"),
        Text("Where a run first crosses the level may be a low that it leaves again: an objective that saturates "
             "(NPO) stops forgetting, and what was lost of the retain set is learnt again. So, of the exports at or "
             "below the level, the one that keeps most, which whoever evaluates along the way would take. It is "
             "chosen by the score that is shown, and of a longer run there are more to choose from."),
        Table(tables.best_table(groups, measure, [measure.forget, *columns])),
        Heading("Results at the end of the runs"),
        Text("The last export of each run, whatever it has forgotten by then."),
        Table(tables.end_table(groups, measure, [measure.forget, *columns], target)),
        Figure("points.png", "Where each method ends, mean ± sd of seeds, in the form of the paper's Figures 3 and 4; "
               "a dashed line joins a rule to sum with the same settings, the grey one is the target model"
               + ("; grey: the paper's own points." if paper.rows(measure.suite) else ".")),
    ]  # fmt: skip
    if early:
        first = ", ".join(map(str, early))
        warning = f"At or below the level from their first point, which is where they are read: {first}."
        blocks.insert(2, Warn(f"{warning} Give --target, or a lower --level."))
    return blocks


def beside_the_paper(groups: dict[str, list[Run]], measure: ForgetRetainMetric) -> list[Block]:
    """The paper's rows for this benchmark beneath ours."""
    rows = tables.paper_table(groups, measure)
    if not rows:
        return []
    models = sorted({run.model for members in groups.values() for run in members})
    return [
        Heading("Beside the paper's Tables 1 and 2"),
        Text(f"The paper's rows are its own figures for {paper.TARGETS[measure.suite]} (Xiao et al., ACL 2026), as "
             "printed, tuned to about equal forgetting but not interpolated to a level, one seed. The runs here began "
             f"with {', '.join(models)}; other models and questions are another comparison."),
        Table(rows),
    ]  # fmt: skip


def outside(groups: dict[str, list[Run]], measure: ForgetRetainMetric, target: Scores | None) -> list[Block]:
    """What neither corpus mentions."""
    columns = tables.outside_columns(groups, measure)
    if not columns:
        return []
    covered = [words for score, words in IN_RETAIN.items() if score in tables.score_columns(groups)]
    shown = list(
        dict.fromkeys([*columns, *(s for s in IN_RETAIN if s in tables.score_columns(groups)), measure.retain])
    )
    return [
        Heading("What neither corpus mentions"),
        Warn("Nothing in the training looks after what the retain corpus does not cover, and a rule that keeps that "
             "corpus best may hurt the rest most: a high retain score does not speak for it. Put what must stay into "
             "the retain corpus."),
        Text(" ".join(f"{COLLATERAL[column][0].upper()}{COLLATERAL[column][1:]}." for column in columns)
             + "".join(f" For comparison: {words}." for words in covered)),
        Text(" ".join(tables.most_hurt(groups, measure, columns))),
        *([Table(tables.matched_table(groups, measure, shown, target))] if len(shown) > 1 else []),
    ]  # fmt: skip


def geometry(groups: dict[str, list[Run]], measure: ForgetRetainMetric) -> list[Block]:
    """Cosines and conflict over the steps, and layer by layer where that was logged."""
    runs = [run for members in groups.values() for run in members]
    blocks: list[Block] = [
        Heading("Geometry of the gradients"),
        Text("Cosines of the two gradients and of the combined one, mean over all steps, mean ± sd over seeds; `sum` "
             f"logs them with synthesis.geometry. {tables.prediction(groups, measure)} The paper's rows are WMDP "
             "Cyber, 100 steps."),
        Table(tables.cosine_table(groups)),
        Figure("geometry.png", "The same along the training, drawn likewise."),
    ]  # fmt: skip
    if figures.layers_of(runs, next(iter(LAYERS))):
        blocks.append(Figure("layers.png", "Layer by layer, mean over the steps that logged it: where the two tasks "
                             "conflict."))  # fmt: skip
    return blocks


def robustness(groups: dict[str, list[Run]]) -> list[Block]:
    """What attacks brought back, of the runs that have a robustness.json."""
    rows = tables.attack_table(groups)
    if len(rows) == 1:
        said = "No RUN/robustness.json: none of these runs was attacked (python -m eval.robustness)."
        return [Heading("Robustness"), Text(said)]
    told = [run.robustness for members in groups.values() for run in members if run.robustness]
    asked = dict.fromkeys(f"{one.get('dtype', 'dtype unknown')}, seed {one.get('seed', 'unknown')}" for one in told)
    return [
        Heading("Robustness"),
        Text("A forget score that rises under attack was hidden, not gone. Before: the unlearned model; after: the "
             "same model attacked; original: the model that was to be unlearned, asked the same. NLL: nats a token of "
             "the forget corpus, or of its part that was not learned again. `probes` asks as an adversary does. Mean ± "
             f"sd over the runs ({'; '.join(asked)}); RUN/robustness.json has every score."),
        Table(rows),
    ]  # fmt: skip


def cost(groups: dict[str, list[Run]], measure: ForgetRetainMetric) -> list[Block]:
    return [
        Heading("Cost"),
        Text(f"Median over the steps after the first {tables.WARM_UP_STEPS}, mean ± sd over seeds; the time is the "
             "slowest rank's, memory the largest rank's peak (GPU: allocated by torch; CPU: the whole process). The "
             "ratio to `sum` compares separate runs with the same settings, perhaps on other machines: "
             "`python -m eval.speed` measures rules step by step in turn."),
        Table(tables.cost_table(groups, measure)),
    ]  # fmt: skip


def left_out(runs: list[Run], measure: ForgetRetainMetric) -> list[Block]:
    """The exports that could not be read, if any."""
    some = [f"{run.folder}: step {', '.join(f'{step:g}' for step in run.left_out)}" for run in runs if run.left_out]
    scores = f"{measure.forget} or {measure.retain}"
    return [Warn(f"Exports whose {scores} is no number are left out: {'; '.join(some)}.")] if some else []


def how(runs: list[Run]) -> list[Block]:
    """Protocols, environments, and the exact commands."""
    train = ["deepspeed", "--module", "pipeline.train", "--output", "NEW_FOLDER", "--config"]
    commands = [shlex.join([*train, str(run.folder / "config.yaml")]) for run in runs]
    commands += [run.command for run in runs]
    commands += [run.robustness["command"] for run in runs if run.robustness and "command" in run.robustness]
    commands.append(shlex.join(["python", "-m", "eval.report", *sys.argv[1:]]))
    protocols = dict.fromkeys(f"{suite}: {words}" for run in runs for suite, words in run.protocols.items())
    here = f"python {platform.python_version()}, matplotlib {version('matplotlib')}"
    environments: dict[str, int] = {}
    for run in runs:
        environments[run.environment] = environments.get(run.environment, 0) + 1
    rows = [["of", "environment"]]
    rows += [[f"evaluation of {number} runs", words] for words, number in environments.items()]
    return [
        Heading("Protocols and environment"),
        *(Text(words) for words in protocols),
        Table([*rows, ["this report", here]]),
        Heading("Commands"),
        Code("\n".join(dict.fromkeys(commands))),
    ]


def draw(groups: dict[str, list[Run]], measure: ForgetRetainMetric, target: Scores | None) -> dict[str, bytes]:
    """{file: PNG} of all figures."""
    drawings = {
        "frontier.png": figures.draw_frontier(groups, measure, target),
        "points.png": figures.draw_points(groups, measure, target),
        "losses.png": figures.draw_curves(groups, LOSSES),
        "geometry.png": figures.draw_curves(groups, GEOMETRY),
    }
    runs = [run for members in groups.values() for run in members]
    if figures.layers_of(runs, next(iter(LAYERS))):
        drawings["layers.png"] = figures.draw_layers(groups, LAYERS)
    return {name: png(figure) for name, figure in drawings.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.report", description="Compare runs at matched forgetting.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders with evaluation.json")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where the report goes")
    parser.add_argument("--target", type=Path, metavar="FILE.json", help="evaluation of the model the runs began with")
    parser.add_argument("--forget", metavar="SUITE.METRIC", help="score that falls (default: the suite's)")
    parser.add_argument("--retain", metavar="SUITE.METRIC", help="score to compare by (default: the suite's)")
    parser.add_argument("--level", type=float, metavar="X", help="forget score to compare at (default: the suite's)")
    arguments = parser.parse_args()
    output = arguments.output
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output} is a file; name a folder")
    target = read_target(arguments.target)
    runs = [read_run(folder) for folder in arguments.runs]
    measure = choose(common_suites(runs, target), arguments.forget, arguments.retain, arguments.level, target)
    groups = group_runs(prepare(run, measure, target) for run in runs)

    blocks, images = compose(groups, measure, target), draw(groups, measure, target)
    title = f"Unlearning compared at {measure.forget} {measure.level:g}"
    for name, image in images.items():
        write_atomically(output / name, image)
    write_atomically(output / "report.md", f"# {title}\n\n{as_markdown(blocks)}")
    write_atomically(output / "index.html", as_html(title, blocks, images))
    print(as_text(next(block.rows for block in blocks if isinstance(block, Table))))
    print(f"\nopen {output / 'index.html'} (or read {output / 'report.md'})")


if __name__ == "__main__":
    sys.exit(exit_status(main))
