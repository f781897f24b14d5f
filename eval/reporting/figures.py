"""Every figure of the reports, as charts: one panel for each pair of objectives, with runs on one of the two alone in
the same panel. A method has one colour in all of them, a shade of its rule's, and a rule has one marker."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from eval.reporting.charts import Chart, Dashes, Look, Mark, Panel, Trace
from eval.results.metrics import ForgetRetainMetric, readable
from eval.results.numbers import printed
from eval.results.trajectories import Run, Scores, at_level, matched, mean_of, step_means
from pipeline.files import Json

Groups = Mapping[str, list[Run]]  # method -> its seeds


# Rule -> a colour that also differs in lightness, and a marker.
RULES = {
    "sum": ("#d55e00", "o"),
    "pcgrad": ("#0072b2", "s"),
    "sago": ("#009e73", "*"),
    "blur": ("#cc79a7", "D"),
    "gru": ("#7a5195", "^"),
}


OTHER_RULE = ("#777777", "v")


SHADES = (0.0, 0.45, -0.4, 0.65, -0.6, 0.25, -0.2)  # of a rule's colour: > 0 towards white, < 0 towards black


DASHES: tuple[Dashes, ...] = (
    "-",
    "--",
    ":",
    "-.",
    (0, (6, 1, 1, 1, 1, 1)),
    (0, (1, 3)),
)  # settings of one rule in one panel


FILLS = ("full", "none", "left", "top", "right", "bottom")


@dataclass(frozen=True)
class Style:
    """How a method is drawn: in the panel of its objectives, under a label that is unique there."""

    objective: str
    label: str
    look: Look


def shaded(colour: str, share: float) -> str:
    """The colour (#rrggbb) moved by `share` towards white, or by -`share` towards black."""
    end = 255 if share > 0 else 0
    parts = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    return "#" + "".join(f"{round(part + abs(share) * (end - part)):02x}" for part in parts)


def styles(groups: Groups) -> dict[str, Style]:
    """{method: style}. Methods of one colour differ in its shade, and those in one panel also in their dashes and in
    the fill of their marker. Rules without a colour of their own share one."""
    in_panel: dict[tuple[str, str], int] = {}
    of_colour: dict[str, int] = {}
    found = {}
    pairs = [runs[0].objective for runs in groups.values() if runs[0].rule]
    for name, runs in groups.items():
        run = runs[0]
        colour, shape = RULES.get(str(run.rule), OTHER_RULE)
        panel = run.objective if run.rule else next((p for p in pairs if run.objective in p.split("+")), run.objective)
        number = in_panel[panel, colour] = in_panel.get((panel, colour), -1) + 1
        shade = of_colour[colour] = of_colour.get(colour, -1) + 1
        look = Look(
            shaded(colour, SHADES[shade % len(SHADES)]),
            DASHES[number % len(DASHES)],
            shape,
            FILLS[number % len(FILLS)],
        )
        found[name] = Style(panel, name.removeprefix(f"{run.objective} "), look)
    return found


def panels(groups: Groups) -> dict[str, list[str]]:
    """{objectives: its methods}."""
    found: dict[str, list[str]] = {}
    for name, style in styles(groups).items():
        found.setdefault(style.objective, []).append(name)
    return found


def compared(groups: Groups, most: int = 4) -> str:
    """What a figure compares, for its title: the methods by name if they are few."""
    by_objective = panels(groups)
    if len(groups) > most:
        return f"{len(groups)} methods ({', '.join(by_objective)})"
    style = styles(groups)
    parts = []
    for objective, names in by_objective.items():
        labels = [style[name].label for name in names]
        parts.append(f"{objective} " + (f"with {enumerated(labels)}" if len(labels) > 1 else labels[0]))
    return "; ".join(parts)


def enumerated(words: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join([*([", ".join(words[:-1])] if len(words) > 1 else []), *words[-1:]])


def marks_of(measure: ForgetRetainMetric, target: Scores | None) -> list[Mark]:
    """The level, chance, and the retain score of the target model."""
    marks = [Mark(measure.level, True, f"the level, {measure.level:g}")]
    if measure.chance is not None:
        marks.append(Mark(measure.chance, True, f"chance, {measure.chance:g}", ":"))
    if target:
        marks.append(
            Mark(target[measure.retain], False, f"retained by the target model, {target[measure.retain]:.3g}", "-")
        )
    return marks


def target_trace(measure: ForgetRetainMetric, target: Scores | None) -> list[Trace]:
    if not target:
        return []
    x, y = target[measure.forget], target[measure.retain]
    look = Look("#888888", marker="X")
    hover = f"target model: {printed(x)}, {printed(y)}"
    return [Trace([x], [y], look, "target model", lines=False, markers=True, hover=[hover])]


def axes_of(measure: ForgetRetainMetric) -> tuple[str, str]:
    return f"{readable(measure.forget)} (lower: more forgotten)", f"{readable(measure.retain)} (higher: more retained)"


def frontier(groups: Groups, measure: ForgetRetainMetric, target: Scores | None) -> Chart:
    """Forget against retain score along each run, one panel per pair of objectives, with the points at the level."""
    style, both = styles(groups), (measure.forget, measure.retain)
    found = []
    for objective, names in panels(groups).items():
        panel = Panel(objective, *axes_of(measure), marks=marks_of(measure, target))
        for name in names:
            own = style[name]
            reached = [(run, point) for run in groups[name] if (point := matched(run.trajectory, measure))]
            for number, run in enumerate(groups[name]):
                x, y = ([scores[key] for scores in run.trajectory] for key in both)
                label = "" if number else f"{own.label}: its runs" + ("" if reached else " (level not reached)")
                hover = [
                    f"{name}, seed {run.seed}, step {scores['step']:g}: "
                    f"forget {printed(scores[measure.forget])}, retain {printed(scores[measure.retain])}"
                    for scores in run.trajectory
                ]
                panel.traces.append(Trace(x, y, own.look, label, hover=hover, faint=True))
            if reached:
                x, y = ([point[key] for _, point in reached] for key in both)
                hover = [
                    f"{name}, seed {run.seed}, at the level: step {point['step']:.1f}, retain {printed(point[both[1]])}"
                    for run, point in reached
                ]
                label = f"{own.label}: at the level"
                panel.traces.append(Trace(x, y, own.look, label, lines=False, markers=True, hover=hover))
        panel.traces.extend(target_trace(measure, target))
        found.append(panel)
    return Chart(f"Forgetting against retention along each run: {compared(groups)}", found, 3, same_axes=True)


def running_mean(values: Sequence[float]) -> np.ndarray:
    """Mean over the last twentieth of the steps, float64, same length: single steps are too noisy to read."""
    window = max(1, len(values) // 20)
    sums = np.cumsum(np.concatenate([np.zeros(1), values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def curves(title: str, groups: Groups, numbers: Mapping[str, str]) -> Chart:
    """Logged numbers ({key: title}) against the step, two panels abreast, for each pair of objectives in turn.

    What no run logged has no panel.
    """
    style = styles(groups)
    found = []
    for objective, names in panels(groups).items():
        for key, words in numbers.items():
            panel = Panel(f"{objective}: {words}", "step", words)
            for name in names:
                steps, values = step_means(groups[name], key)
                if steps:
                    own, means = style[name], [float(value) for value in running_mean(values)]
                    hover = [f"{name}, step {step}: {value:.4g}" for step, value in zip(steps, means, strict=True)]
                    panel.traces.append(Trace(steps, means, own.look, own.label, hover=hover))
            if panel.traces:
                found.append(panel)
    return Chart(f"{title}: {compared(groups)}", found, 2)


def layers_of(runs: Iterable[Run], key: str) -> list[str]:
    """The layers for which `key` was logged, in the order of the log."""
    found = dict.fromkeys(name for run in runs for step in run.steps for name in step if name.startswith(f"{key}/"))
    return [name.removeprefix(f"{key}/") for name in found]


def layers(groups: Groups, numbers: Mapping[str, str]) -> Chart:
    """Logged numbers of each layer, means over the steps that logged them: one row per pair of objectives."""
    style = styles(groups)
    runs = [run for members in groups.values() for run in members]
    logged = layers_of(runs, next(iter(numbers)))
    ticks = [layer.removeprefix("model.") for layer in logged]
    found = []
    for objective, names in panels(groups).items():
        for key, words in numbers.items():
            panel = Panel(f"{objective}: {words}", "layer", words, ticks=ticks)
            for name in names:
                of_layers = [
                    [m for run in groups[name] if (m := mean_of(run, f"{key}/{layer}")) is not None] for layer in logged
                ]
                means = [fmean(values) if values else math.nan for values in of_layers]
                hover = [f"{name}, {layer}: {printed(mean)}" for layer, mean in zip(ticks, means, strict=True)]
                own = style[name]
                panel.traces.append(Trace(range(len(logged)), means, own.look, own.label, markers=True, hover=hover))
            found.append(panel)
    return Chart(f"Conflict of the two tasks in each layer: {compared(groups)}", found, len(numbers))


def matched_curve(trajectories: Sequence[list[Scores]], measure: ForgetRetainMetric) -> tuple[np.ndarray, np.ndarray]:
    """(levels, retain at each level and seed): forget levels, shape (k,), that every seed passes, and shape (n, k)."""
    highest = min(trajectory[0][measure.forget] for trajectory in trajectories)
    lowest = max(min(scores[measure.forget] for scores in trajectory) for trajectory in trajectories)
    levels = np.linspace(highest, lowest, 60) if lowest < highest else np.array([])
    at = [ForgetRetainMetric(measure.forget, measure.retain, float(level)) for level in levels]
    points = [[at_level(trajectory, one) for one in at] for trajectory in trajectories]
    # Rounding can put the last level just below the lowest score: then no point exists, and nan is not drawn.
    return levels, np.array([[p[measure.retain] if p else math.nan for p in row] for row in points])


def best(groups: Groups, front: Sequence[Json], measure: ForgetRetainMetric, target: Scores | None) -> Chart:
    """Forget against retain: for each method's best setting the mean over seeds at each level, ± sd shaded."""
    style = styles(groups)
    found = []
    for objective, names in panels(groups).items():
        panel = Panel(objective, *axes_of(measure), marks=marks_of(measure, target))
        for name in names:
            trajectories = [run.trajectory for run in groups[name]]
            reached = any(at_level(trajectory, measure) for trajectory in trajectories)
            label = name + (", mean" if len(trajectories) > 1 else "") + ("" if reached else " (level not reached)")
            levels, retained = matched_curve(trajectories, measure)
            mean = retained.mean(axis=0) if len(levels) else levels
            band = None
            if len(retained) > 1 and len(levels):
                spread = retained.std(axis=0, ddof=1)
                band, label = ((mean - spread).tolist(), (mean + spread).tolist()), f"{label} ± sd"
            panel.traces.append(Trace(levels.tolist(), mean.tolist(), style[name].look, label, band=band))
        x, y = ([point[key] for point in front] for key in ("forget", "retain"))
        outside = "no point of any setting is better"
        panel.traces.append(Trace(x, y, Look("#444444", marker="."), outside, lines=False, markers=True))
        panel.traces.extend(target_trace(measure, target))
        found.append(panel)
    return Chart(f"Methods at their best setting: {compared(groups)}", found, 3, same_axes=True)
