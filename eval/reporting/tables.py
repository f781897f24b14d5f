"""The tables of the reports: runs grouped by method -> rows of text, of which the first is the header."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, median

from eval.reporting.attacks import DIRECT, marked_names, words_of
from eval.results import paper
from eval.results.general import GeneralAbility
from eval.results.grouping import plain_of
from eval.results.metrics import ADVERSARIAL, MEASURES, NEAREST_ZERO, ForgetRetainMetric, falls, label, readable
from eval.results.numbers import printed
from eval.results.stats import correlate, mean_of_known, mean_sd
from eval.results.trajectories import (
    COMB_RETAIN,
    COSINES,
    Run,
    Scores,
    best_below,
    lowest,
    matched,
    mean_of,
    starts_below,
)
from pipeline.files import Json

Rows = list[list[str]]


Groups = Mapping[str, list[Run]]  # method -> its seeds


WARM_UP_STEPS = 3  # slower than the rest: caches fill, kernels are chosen


def points_of(runs: Iterable[Run], measure: ForgetRetainMetric) -> list[Scores]:
    """The scores at the level of the runs that fall to it."""
    return [point for run in runs if (point := matched(run.trajectory, measure))]


def cells(points: Sequence[Scores], columns: Iterable[str]) -> list[str]:
    """Mean ± sd of each column over the points that have it, and how many they are, if not all have."""
    return [mean_of_known([point.get(column) for point in points]) for column in columns]


LOWER = "↓"  # beside the name of a score: lower is better


LEVEL_TITLES = ("step", "seeds that reached it")  # of the two last cells of `level_cells`


def level_cells(points: Sequence[Scores], number: int, columns: Iterable[str]) -> list[str]:
    """Mean ± sd of each column over the `points` at the level of `number` runs, of the step, and how many there are."""
    steps = mean_sd((point["step"] for point in points), digits=1)
    return [*cells(points, columns), steps, f"{len(points)} of {number}"]


def score_columns(groups: Groups) -> list[str]:
    """Every score that some export has, in the order of eval.run; the last export of a run may be broken."""
    runs = [run for members in groups.values() for run in members]
    exports = [scores for run in runs for scores in reversed(run.trajectory) if scores["step"]]
    return list(dict.fromkeys(key for scores in exports for key in scores if key != "step"))


def general_of(groups: Groups) -> GeneralAbility:
    """The scores of general ability that some run has."""
    found = [run.general for runs in groups.values() for run in runs]
    return GeneralAbility(
        tuple(dict.fromkeys(column for general in found for column in general.columns)),
        frozenset().union(*(general.lower_is_better for general in found)),
    )


def marked(title: str, column: str, general: GeneralAbility) -> str:
    """The title of a column, with an arrow where lower is better."""
    return f"{title} {LOWER}" if column in general.lower_is_better else title


def titles(columns: Sequence[str], measure: ForgetRetainMetric, groups: Groups) -> list[str]:
    """The titles of the columns; they keep the names of their suites if there are several."""
    of, general = [*columns, measure.forget, measure.retain], general_of(groups)
    return [marked(label(column, of), column, general) for column in columns]


def best_cells(rows: Rows, columns: Sequence[str], skip: Iterable[str] = ()) -> frozenset[tuple[int, int]]:
    """The cells (row, column) that hold the best value of their column, as it is printed, ties included.

    Args:
        columns: the scores of the cells from the second on; a score that forgetting lowers, or a title with LOWER, is
            best where it is lowest, and one of NEAREST_ZERO there.
        skip: scores without a best value, as the one that all rows have in common.

    Rows of the target model and of the paper compete with nobody, and a column with fewer than two values, or with
    equal ones, has no best.
    """
    best: set[tuple[int, int]] = set()
    for place, column in enumerate(columns, start=1):
        values = {
            at: float(found[0])
            for at, row in enumerate(rows[1:], start=1)
            if row[0] != "target model" and not row[0].startswith("paper")
            if (found := re.match(r"-?\d+\.?\d*(e-?\d+)?", row[place]))
        }
        if column not in skip and len({*values.values()}) > 1:
            low = falls(column) or rows[0][place].endswith(LOWER)
            winner = min(values.values()) if low else max(values.values())
            winner = min(values.values(), key=abs) if column in NEAREST_ZERO else winner
            best |= {(at, place) for at, value in values.items() if value == winner}
    return frozenset(best)


def target_row(target: Scores, columns: Iterable[str], end: Iterable[str]) -> list[str]:
    """The scores of the model that the runs begin with."""
    return ["target model", *(printed(target[c]) if c in target else "–" for c in columns), *end]


def matched_table(groups: Groups, measure: ForgetRetainMetric, columns: Sequence[str], target: Scores | None) -> Rows:
    """Scores at the level, mean ± sd over the seeds that reached it, with the step and the number of these seeds."""
    rows = [["method", *titles(columns, measure, groups), *LEVEL_TITLES]]
    if target:
        rows.append(target_row(target, columns, ("0", "reference")))
    for name, runs in groups.items():
        rows.append([name, *level_cells(points_of(runs, measure), len(runs), columns)])
    return rows


def best_table(groups: Groups, measure: ForgetRetainMetric, columns: Sequence[str]) -> Rows:
    """Scores of each run's best export at or below the level, mean ± sd over the seeds that have one."""
    rows = [["method", *titles(columns, measure, groups), "step", "seeds that have one"]]
    for name, runs in groups.items():
        points = [point for run in runs if (point := best_below(run.trajectory, measure))]
        steps = mean_sd((point["step"] for point in points), digits=0)
        rows.append([name, *cells(points, columns), steps, f"{len(points)} of {len(runs)}"])
    return rows


def end_table(groups: Groups, measure: ForgetRetainMetric, columns: Sequence[str], target: Scores | None) -> Rows:
    """Scores of each run's last export, mean ± sd over all seeds."""
    rows = [["method", *titles(columns, measure, groups), "step", "seeds"]]
    if target:
        rows.append(target_row(target, columns, ("0", "reference")))
    for name, runs in groups.items():
        ends = [run.trajectory[-1] for run in runs]
        steps = mean_sd((end["step"] for end in ends), digits=0)
        rows.append([name, *cells(ends, columns), steps, str(len(runs))])
    return rows


def paper_table(groups: Groups, measure: ForgetRetainMetric) -> Rows:
    """The runs at the end and at the level, below them published rows; empty for a benchmark without."""
    theirs = paper.rows(measure.suite)
    if not theirs:
        return []
    columns = list(paper.COLUMNS[measure.suite])
    retain, *_ = titles([measure.retain], measure, groups)
    at_the_end = [f"{title}, at the end" for title in titles(columns, measure, groups)]
    rows = [["method", *at_the_end, f"{retain}, at {readable(measure.forget)} {measure.level:g}"]]
    for name, runs in groups.items():
        ends = [run.trajectory[-1] for run in runs]
        rows.append([name, *cells(ends, columns), *cells(points_of(runs, measure), [measure.retain])])
    for name, scores in theirs.items():
        rows.append([name, *(printed(scores[column]) if column in scores else "–" for column in columns), "–"])
    return rows


def every_score(groups: Groups, measure: ForgetRetainMetric, target: Scores | None) -> Rows:
    """At the level, a row for each score and a column for each method."""
    columns, general = score_columns(groups), general_of(groups)
    rows = [["score", *(["target model"] if target else []), *groups]]
    points_of_methods = [points_of(runs, measure) for runs in groups.values()]
    for column in columns:
        first = [printed(target[column]) if column in target else "–"] if target else []
        rows.append(
            [marked(column, column, general), *first, *(cells(points, [column])[0] for points in points_of_methods)]
        )
    return rows


def most_hurt(groups: Groups, measure: ForgetRetainMetric, columns: Iterable[str]) -> list[str]:
    """A sentence per column: the methods with its worst and its best mean at the level."""
    sentences, general = [], general_of(groups)
    for column in columns:
        found = {name: [p[column] for p in points_of(runs, measure) if column in p] for name, runs in groups.items()}
        means = {name: fmean(values) for name, values in found.items() if values}
        if len(means) > 1:
            low, high = min(means, key=lambda name: means[name]), max(means, key=lambda name: means[name])
            ends = [f"lowest under {low} ({printed(means[low])})", f"highest under {high} ({printed(means[high])})"]
            ends = ends[::-1] if column in general.lower_is_better else ends  # the worst first
            sentences.append(f"{marked(readable(column), column, general)}: {', '.join(ends)}.")
    return sentences


def standing_table(runs: Iterable[tuple[str, Run]], measure: ForgetRetainMetric) -> Rows:
    """Where the runs (by name) that do not reach the level stand: before, at their lowest, and at the end."""
    forget, retain = (words.partition(" (")[0] for words in (readable(measure.forget), readable(measure.retain)))
    header = ["run", f"{forget} before", "lowest", "at step", "last", f"{retain} before", "at the lowest", "last"]
    rows = [[*header, "at step"]]
    for name, run in runs:
        first, last = run.trajectory[0], run.trajectory[-1]
        low = min(run.trajectory, key=lambda scores: scores[measure.forget])
        before = [printed(first[score]) if first["step"] == 0 else "–" for score in (measure.forget, measure.retain)]
        forgotten = [before[0], printed(low[measure.forget]), f"{low['step']:g}", printed(last[measure.forget])]
        retained = [before[1], printed(low[measure.retain]), printed(last[measure.retain]), f"{last['step']:g}"]
        rows.append([name, *forgotten, *retained])
    return rows


def seed_table(groups: Groups, measure: ForgetRetainMetric) -> Rows:
    """One row per run, including those that missed the level."""
    at_it = f"{label(measure.retain, [measure.retain])} at the level"
    rows = [["run", "method", "seed", "lowest forget", "step at the level", at_it, "skipped steps"]]
    for name, run in ((name, run) for name, runs in groups.items() for run in runs):
        point = matched(run.trajectory, measure)
        missed = "below from the first" if starts_below(run.trajectory, measure) else "not reached"
        found = [f"{point['step']:.1f}", printed(point[measure.retain])] if point else [missed, "–"]
        skipped = sum(bool(step.get("skipped")) for step in run.steps)
        rows.append([str(run.folder), name, str(run.seed), printed(lowest(run, measure)), *found, str(skipped)])
    return rows


def cosine_table(groups: Groups) -> Rows:
    """The paper's Table 3 for these runs: mean over all steps, then mean ± sd over seeds; the paper's rows below."""
    rows = [["method", *COSINES.values(), "conflict fraction"]]
    for name, runs in groups.items():
        means = [[mean_of(run, key) for run in runs] for key in (*COSINES, "conflict_fraction")]
        rows.append([name, *(mean_of_known(column, digits=2) for column in means)])
    theirs = paper.TABLE_3.items()
    return rows + [[f"paper, Table 3: {name}", *(f"{value:.2f}" for value in values), "–"] for name, values in theirs]


def prediction(groups: Groups, measure: ForgetRetainMetric) -> str:
    """One sentence: how well the mean cos(g, g_r) of a run predicts what it retains at the level."""
    pairs = []
    for run in (run for members in groups.values() for run in members):
        point, cosine = matched(run.trajectory, measure), mean_of(run, COMB_RETAIN)
        if point and cosine is not None:
            pairs.append((cosine, point[measure.retain]))
    found = correlate(pairs)
    if found["pearson"] is None:
        return "Fewer than five different runs reached the level: too few to correlate comb-retain with retention."
    return (
        f"Over {found['n']} runs, the correlation of comb-retain with {readable(measure.retain)} at the level is "
        f"r = {found['pearson']:.2f} (Spearman {found['spearman']:.2f})."
    )


def step_number(run: Run, key: str) -> float | None:
    """Median of a logged number over the steps after `WARM_UP_STEPS` (all steps of a shorter run)."""
    steps = [step[key] for step in run.steps if step.get(key) is not None and math.isfinite(step[key])]
    return median(steps[WARM_UP_STEPS:] or steps) if steps else None


def cost_table(groups: Groups, measure: ForgetRetainMetric) -> Rows:
    """Time per step, its ratio to `sum` with the same settings, tokens per second, memory, and time to the level."""

    def seconds(runs: Iterable[Run]) -> list[float]:
        return [value for run in runs if (value := step_number(run, "seconds")) is not None]

    rows = [["method", "s a step", "of sum", "tokens/s", "peak GiB a rank", "steps to the level", "s to the level"]]
    for name, runs in groups.items():
        plain = name if runs[0].rule == "sum" else plain_of(name, groups)
        own, reference = seconds(runs), seconds(groups[plain]) if plain else []
        ratio = f"{fmean(own) / fmean(reference):.2f}" if own and reference else "–"
        speeds = [value for run in runs if (value := step_number(run, "tokens_per_second")) is not None]
        peaks = [step["peak_memory_bytes"] for run in runs for step in run.steps if step.get("peak_memory_bytes")]
        peak = f"{max(peaks) / 2**30:.2f}" if peaks else "–"
        reached = [(point["step"], step_number(run, "seconds")) for run in runs for point in points_of([run], measure)]
        steps = mean_sd((step for step, _ in reached), digits=0)
        way = mean_sd((step * each for step, each in reached if each is not None), digits=0)
        rows.append([name, mean_sd(own), ratio, mean_sd(speeds, digits=0), peak, steps, way])
    return rows


def read_attack(suite: str, scores: Mapping[str, float]) -> dict[str, float | None]:
    """{"forget", "retain", "nll"} of the scores before or after an attack, by the metric of its suite."""
    named = {f"{suite}.{metric}": value for metric, value in scores.items()}
    measure = next((measure for measure in MEASURES if measure.suite == suite), None)
    read: dict[str, float | None] = {"nll": scores.get("held_out_nll", scores.get("forget_nll"))}
    if measure:
        read["forget"] = named.get(measure.forget, named.get(ADVERSARIAL.get(measure.forget, "")))
        read["retain"] = named.get(measure.retain)
    return read


ATTACK_COLUMNS = {
    "forget before": ("before", "forget"),
    "forget after": ("after", "forget"),
    "original": ("original", "forget"),
    "retain before": ("before", "retain"),
    "retain after": ("after", "retain"),
    "NLL before": ("before", "nll"),
    "NLL after": ("after", "nll"),
}


def attack_table(groups: Groups) -> Rows:
    """Scores before and after each attack, mean ± sd over the runs; only the header if none was attacked."""
    found: dict[tuple[str, str, str], list[Json]] = defaultdict(list)
    for name, runs in groups.items():
        for run in runs:
            results = run.robustness or {"suite": "", "attacks": []}
            suite = results["suite"]
            for attack in results["attacks"]:
                if attack["name"] in DIRECT:
                    continue
                settings = words_of(attack.get("settings") or {})
                title = f"{attack['name']} ({settings})" if settings else attack["name"]
                found[name, suite, title].append(attack)
    rows, names = [["method", "suite", "attack", *ATTACK_COLUMNS, "s", "runs"]], marked_names(groups)
    for (name, suite, title), tries in found.items():
        scores = []
        for when, what in ATTACK_COLUMNS.values():
            scores.append(mean_of_known([read_attack(suite, one.get(when) or {}).get(what) for one in tries]))
        seconds = mean_sd((entry["seconds"] for entry in tries if entry.get("seconds") is not None), digits=0)
        rows.append([names[name], suite, title, *scores, seconds, str(len(tries))])
    return rows
