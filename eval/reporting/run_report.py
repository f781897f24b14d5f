"""The report on runs: its sections in order, its figures, and its files."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from eval.reporting import figures, scatters, sections, tables
from eval.reporting.answers import Answers
from eval.reporting.attacks import attack_chart, budget_note, direct_table
from eval.reporting.charts import Chart
from eval.reporting.outside import BESIDE, beside_retain, general, outside
from eval.reporting.pages import Block, Figure, Heading, Table, Text, Verdict, Warn, as_html, as_markdown
from eval.reporting.pictures import draw as picture
from eval.reporting.pictures import png
from eval.reporting.verdict import verdict
from eval.results import paper
from eval.results.metrics import ForgetRetainMetric, readable
from eval.results.texts import Texts, compare_texts, retain_seen, title_of_set
from eval.results.trajectories import COSINES, Run, Scores, at_level, matched
from pipeline.files import write_whole

LOSSES = {"forget_loss": "forget loss", "retain_loss": "retain loss"}
GEOMETRY = {**COSINES, "conflict_fraction": "conflict fraction"}
LAYERS = {"cos_forget_retain": "forget-retain", "conflict_fraction": "conflict fraction"}
SHOWN = 3  # prompts of the forget set that the page shows unfolded; of another set it shows one


def compose(
    groups: dict[str, list[Run]], measure: ForgetRetainMetric, target: Scores | None, before: Texts | None = None
) -> list[Block]:
    """The report in order, before it becomes Markdown or HTML; `before`: the texts of the target model."""
    runs = [run for members in groups.values() for run in members]
    texts = answer_blocks(groups, measure, before or {})
    has_text = any(isinstance(block, Answers) for block in texts)
    reached = any(matched(run.trajectory, measure) for run in runs)  # else tables at the level would be dashes
    return [
        Verdict(verdict(groups, measure, target)),
        *(texts if has_text else []),
        *results(groups, measure, target),
        *(texts if not has_text else []),
        *beside_the_paper(groups, measure),
        *(outside(groups, measure, target) if reached else []),
        *general(groups, measure, target),
        *losses(groups),
        *geometry(groups, measure),
        *robustness(groups),
        *cost(groups, measure),
        *([Heading("Every score at the level"), Table(tables.every_score(groups, measure, target))] if reached else []),
        Heading("Every run"),
        Table(tables.seed_table(groups, measure)),
        *left_out(runs, measure),
        *sections.how_it_was_made(runs, commands_of(runs)),
    ]  # fmt: skip


def answer_blocks(groups: dict[str, list[Run]], measure: ForgetRetainMetric, before: Texts) -> list[Block]:
    """What the models answer, before and after, side by side."""
    found = compare_texts(groups, measure, before)
    if not found.sets:
        return [
            Heading("What the models say"),
            Text("No text to show: some run has no evaluation with texts (none at all, or an older one), or they share "
                 "no prompt. `python -m eval.run` writes it."),
        ]  # fmt: skip
    marks = "marked: words of the answer before that no method uses, and words that are new." if found.before else ""
    reached = "the first export at or below the level, else its last, of its first seed"
    missing = "" if found.before else " Give --target, evaluated with this version, to see the answers before."
    blocks: list[Block] = [
        Heading("What the models say, before and after" if found.before else "What the models say"),
        Text(
            "A fixed choice of prompts, with greedy answers or, of multiple choice, the most likely one. A method is "
            f"shown by {reached}; {marks}{missing}".strip()
        ),
    ]
    for number, (name, rows) in enumerate(found.sets.items()):
        shown = SHOWN if number == 0 else 1
        blocks.append(Answers(title_of_set(name, rows), found.names, rows, found.before, shown))
    return blocks


def results(groups: dict[str, list[Run]], measure: ForgetRetainMetric, target: Scores | None) -> list[Block]:
    """At the matched level, and at the end of the runs."""
    columns = sections.headline_columns(tables.score_columns(groups), measure, tables.general_of(groups))
    runs = [(f"{name} seed {run.seed}", run) for name, members in groups.items() for run in members]
    missed = {
        name: [(f"{name} seed {run.seed}", run) for run in members if not at_level(run.trajectory, measure)]
        for name, members in groups.items()
    }
    those = [one for members in missed.values() for one in members]
    level = tables.matched_table(groups, measure, columns, target)
    ends = tables.end_table(groups, measure, [measure.forget, *columns], target)
    standing = sections.not_reached(missed, measure)
    is_reached = any(matched(run.trajectory, measure) for _, run in runs)
    reached: list[Block] = [Table(level, tables.best_cells(level, columns))] if is_reached else []
    return [
        *(standing if not reached else []),
        Heading(f"Results at {readable(measure.forget)} {measure.level:g}"),
        *sections.early_runs([run for _, run in runs], measure),
        *rehearsal([run for _, run in runs]),
        Figure("frontier.png", "Lines: the evaluations of single runs; markers: the points at the level.",
               f"{sections.reading(measure, target is not None)} {sections.never_reached(those, measure)}"),
        *reached,
        *(standing if reached else []),
        *(early_stopping(groups, measure, columns) if reached else []),
        Heading("Results at the end of the runs"),
        Figure("points.png", "In the form of the paper's Figures 3 and 4; bars: sd over the seeds.",
               "The last export of each run, whatever it has forgotten by then: where each method ends. A dashed line "
               "joins a rule to sum with the same settings."
               + (" Outlines: the paper's own points." if paper.rows(measure.suite) else "")),
        Table(ends, tables.best_cells(ends, [measure.forget, *columns])),
    ]  # fmt: skip


def early_stopping(groups: dict[str, list[Run]], measure: ForgetRetainMetric, columns: list[str]) -> list[Block]:
    """What early stopping would select."""
    rows = tables.best_table(groups, measure, [measure.forget, *columns])
    return [
        Heading("The best export at or below the level"),
        Text("A run may rise above the level again after it first crosses it: an objective that saturates (NPO) stops "
             "forgetting, and the model relearns what it had lost of the retain set. This table takes, of the exports "
             "at or below the level, the one with the highest retain score, as early stopping would. The table shows "
             "the score that selected the export, and a longer run has more exports to select from."),
        Table(rows, tables.best_cells(rows, [measure.forget, *columns], (measure.forget,))),
    ]  # fmt: skip


def rehearsal(runs: list[Run]) -> list[Block]:
    """That the retain documents of suite `corpus` are those of the training, if they are."""
    found = {str(run.folder): seen for run in runs if (seen := retain_seen(run)) and seen["seen"]}
    if not found:
        return []
    by_share: dict[str, list[str]] = {}
    for folder, seen in found.items():
        by_share.setdefault(f"{seen['seen']} of {seen['documents']} documents", []).append(folder)
    those = "; ".join(
        f"{share} (" + (folders[0] if len(folders) == 1 else f"{len(folders)} of {len(runs)} runs") + ")"
        for share, folders in by_share.items()
    )
    return [
        Warn("The training saw retain documents of suite `corpus`, so this score shows rehearsal, not knowledge that "
             f"survives: {those}. Put documents that resemble the retain corpus and are not in it into the suite's "
             "`retain`.")
    ]  # fmt: skip


def beside_the_paper(groups: dict[str, list[Run]], measure: ForgetRetainMetric) -> list[Block]:
    """The paper's rows for this benchmark below those of the runs."""
    rows = tables.paper_table(groups, measure)
    if not rows:
        return []
    models = sorted({run.model for members in groups.values() for run in members})
    heading, where = paper.source(measure.suite)
    return [
        Heading(heading),
        Text(f"The paper's rows are {where}. The runs here began with {', '.join(models)}; with other models or "
             "questions the numbers are not comparable."),
        Table(rows),
    ]  # fmt: skip


def losses(groups: dict[str, list[Run]]) -> list[Block]:
    drawn = Figure("losses.png", "Mean over each method's seeds, running mean over a twentieth of the steps (the "
                   "paper's Figure 1); a method has one colour in every figure.")  # fmt: skip
    has_losses = bool(figures.curves("", groups, LOSSES).panels)
    return [Heading("Loss dynamics"), drawn if has_losses else Text("In these runs, no step logged a loss.")]


def geometry(groups: dict[str, list[Run]], measure: ForgetRetainMetric) -> list[Block]:
    """Cosines and conflict over the steps, and for each layer if that was logged."""
    runs = [run for members in groups.values() for run in members]
    blocks: list[Block] = [
        Heading("Geometry of the gradients"),
        Text("Cosines of the two gradients and of the combined one, mean over all steps, mean ± sd over seeds; `sum` "
             f"logs them with synthesis.geometry. {tables.prediction(groups, measure)} The paper's rows are WMDP "
             "Cyber, 100 steps."),
        Table(tables.cosine_table(groups)),
    ]  # fmt: skip
    if figures.curves("", groups, GEOMETRY).panels:
        blocks.append(Figure("geometry.png", "The same numbers during training, drawn in the same way as the losses."))
    if figures.layers_of(runs, next(iter(LAYERS))):
        blocks.append(Figure("layers.png", "Each layer, mean over the steps that logged it: where the two tasks "
                             "conflict."))  # fmt: skip
    return blocks


def robustness(groups: dict[str, list[Run]]) -> list[Block]:
    """What attacks recovered, of the runs that have a robustness.json."""
    rows, direct, chart = tables.attack_table(groups), direct_table(groups), attack_chart(groups)
    if len(rows) == len(direct) == 1:
        absent = "No RUN/robustness.json: none of these runs was attacked (python -m eval.robustness)."
        return [Heading("Robustness"), Text(absent)]
    attacked = [run.robustness for members in groups.values() for run in members if run.robustness]
    settings = dict.fromkeys(f"{a.get('dtype', 'dtype unknown')}, seed {a.get('seed', 'unknown')}" for a in attacked)
    return [
        Heading("Robustness"),
        Text("A forget score that rises under attack was hidden, not gone. Before: the unlearned model; after: the "
             "same model attacked; original: the model before unlearning, on the same probes. NLL: nats per token of "
             "the forget corpus, or of its part that was not relearned. `probes` puts the questions as an adversary "
             f"does. Mean ± sd over the runs ({'; '.join(settings)}); RUN/robustness.json has every score."
             + budget_note(groups)),
        *([Table(rows)] if len(rows) > 1 else []),
        *([Table(direct)] if len(direct) > 1 else []),
        *([Figure("attacks.png", "Means over the runs of a method: how fast one half of the forget corpus returns "
                  "while the other, or unrelated text, is learned, and what is among k answers.")] if chart else []),
    ]  # fmt: skip


def cost(groups: dict[str, list[Run]], measure: ForgetRetainMetric) -> list[Block]:
    return [
        Heading("Cost"),
        Text(f"Median over the steps after the first {tables.WARM_UP_STEPS}, mean ± sd over seeds; the time is that of "
             "the slowest rank, memory the largest peak of a rank (GPU: allocated by torch; CPU: the whole process). "
             "The ratio to `sum` compares separate runs with the same settings, perhaps on other machines: "
             "`python -m pipeline.planning.step_cost` measures rules in alternating steps."),
        Table(tables.cost_table(groups, measure)),
    ]  # fmt: skip


def left_out(runs: list[Run], measure: ForgetRetainMetric) -> list[Block]:
    """The exports that could not be read, if any."""
    some = [f"{run.folder}: step {', '.join(f'{step:g}' for step in run.left_out)}" for run in runs if run.left_out]
    scores = f"{measure.forget} or {measure.retain}"
    return [Warn(f"Exports whose {scores} is not finite are left out: {'; '.join(some)}.")] if some else []


def commands_of(runs: list[Run]) -> list[str]:
    """The commands that train, evaluate and attack the runs, and that of this report."""
    train = ["deepspeed", "--module", "pipeline.train", "--output", "NEW_FOLDER", "--config"]
    commands = [shlex.join([*train, str(run.folder / "config.yaml")]) for run in runs]
    commands += [run.command for run in runs]
    commands += [run.robustness["command"] for run in runs if run.robustness and "command" in run.robustness]
    return [*commands, shlex.join(["python", "-m", "eval.report", *sys.argv[1:]])]


def charts_of(groups: dict[str, list[Run]], measure: ForgetRetainMetric, target: Scores | None) -> dict[str, Chart]:
    """{file of its picture: chart} of all figures."""
    charts = {
        "frontier.png": figures.frontier(groups, measure, target),
        "points.png": scatters.points(groups, measure, target),
        "losses.png": figures.curves("Losses during training", groups, LOSSES),
        "geometry.png": figures.curves("Cosines of the gradients and their conflict", groups, GEOMETRY),
        BESIDE: beside_retain(groups, measure),
    }
    runs = [run for members in groups.values() for run in members]
    if figures.layers_of(runs, next(iter(LAYERS))):
        charts["layers.png"] = figures.layers(groups, LAYERS)
    charts |= {"attacks.png": chart} if (chart := attack_chart(groups)) else {}
    return {file: chart for file, chart in charts.items() if chart.panels}


def draw(charts: dict[str, Chart]) -> dict[str, bytes]:
    """{file: PNG} of all figures."""
    return {name: png(picture(chart)) for name, chart in charts.items()}


def title_of(groups: dict[str, list[Run]], measure: ForgetRetainMetric) -> str:
    return f"{figures.compared(groups)}, at {readable(measure.forget)} {measure.level:g}"


def write_report(
    folder: Path,
    groups: dict[str, list[Run]],
    measure: ForgetRetainMetric,
    target: Scores | None,
    before: Texts | None = None,
) -> list[list[str]]:
    """Write `index.html`, `report.md` and the figures into `folder`; returns the first table."""
    blocks, charts = compose(groups, measure, target, before), charts_of(groups, measure, target)
    images = draw(charts)
    title = title_of(groups, measure)
    for name, image in images.items():
        write_whole(folder / name, image)
    write_whole(folder / "report.md", f"# {title}\n\n{as_markdown(blocks)}")
    write_whole(folder / "index.html", as_html(title, blocks, images, charts))
    return next(block.rows for block in blocks if isinstance(block, Table))
