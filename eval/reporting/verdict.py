"""What a comparison found, in a sentence for each pair of objectives: computed from the points at the level alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from eval.reporting.figures import Groups, enumerated, panels, styles
from eval.reporting.pages import Finding
from eval.results.known import nothing_to_forget
from eval.results.metrics import ForgetRetainMetric, collateral, readable, words_of_score
from eval.results.numbers import printed
from eval.results.stats import summarise
from eval.results.trajectories import Scores, lowest, matched, starts_below

Points = Mapping[str, Sequence[Scores]]  # label -> its points at the level, one a seed that reached it


def verdict(groups: Groups, measure: ForgetRetainMetric, target: Scores | None) -> list[Finding]:
    """A sentence or two for each pair of objectives; what never reached the level is named, and is not compared.

    One finding alone if the target model has nothing to forget: a comparison would say how unneeded runs differ.
    """
    if target is not None and (nothing := nothing_to_forget(measure, target)):
        return [Finding(nothing, compares=False)]
    style, by_objective = styles(groups), panels(groups)
    findings = []
    for objective, names in by_objective.items():
        label = {name: style[name].label for name in names}
        if len(by_objective) > 1:
            label = {name: name for name in names}
        early = {name: [run for run in groups[name] if starts_below(run.trajectory, measure)] for name in names}
        points = {label[name]: [p for run in groups[name] if (p := matched(run.trajectory, measure))] for name in names}
        seeds = {label[name]: len(groups[name]) for name in names}
        reached = {name: of for name, of in points.items() if of}
        missed = {
            label[name]: min(lowest(run, measure) for run in groups[name])
            for name in names
            if not points[label[name]] and not early[name]
        }
        parts = []
        if reached:
            parts.append(keeps(reached, seeds, measure, target) + lead(reached, measure))
            parts.append(likewise(reached, measure, target))
            parts.append(unprotected(reached, measure, target))
        if any(early.values()):
            starts = {label[name]: [run.trajectory[0][measure.forget] for run in of] for name, of in early.items()}
            parts.append(unmatched({name: of for name, of in starts.items() if of}, measure))
        if missed:
            parts.append(never(missed, "" if reached or any(early.values()) else objective, measure))
        findings.append(Finding(" ".join(part for part in parts if part), compares=bool(reached)))
    return findings


def keeps(points: Points, seeds: Mapping[str, int], measure: ForgetRetainMetric, target: Scores | None) -> str:
    """How much of the retain score each method keeps where all have forgotten equally, the best first."""
    whole = target[measure.retain] if target else 0.0
    parts = []
    for name, share in shares(points, measure.retain, whole):
        short = "" if len(points[name]) == seeds[name] else f" ({len(points[name])} of {seeds[name]} seeds)"
        parts.append(f"{name} {'' if parts else 'keeps '}{share}{short}")
    of = f"the target model's {readable(measure.retain)}" if whole > 0 else readable(measure.retain)
    first, *rest = parts
    others = f", {enumerated(rest)}" if rest else ""
    same = "at the same forgetting" if rest else "where it has forgotten"
    return f"{first} of {of} {same} ({readable(measure.forget)} {measure.level:g}){others}"


def shares(points: Points, score: str, whole: float) -> list[tuple[str, str]]:
    """(method, mean ± sd of the score at the level), the best first: as a share of `whole`, if that is above 0."""
    found = []
    for name in sorted(points, key=lambda name: -fmean(p[score] for p in points[name])):
        of = summarise(p[score] / whole if whole > 0 else p[score] for p in points[name])
        scale, digits, unit = (100, 1, " %") if whole > 0 else (1, 3, "")
        spread = "" if of["sd"] is None else f" ± {scale * of['sd']:.{digits}f}"
        found.append((name, f"{scale * (of['mean'] or 0):.{digits}f}{unit}{spread}"))
    return found


def likewise(points: Points, measure: ForgetRetainMetric, target: Scores | None) -> str:
    """What is retained by the kind of score that measures forgetting, if retention is compared by another kind.

    A probability falls much later than a text that is known by heart is lost, so one alone would flatter.
    """
    score = f"{measure.retain.rpartition('.')[0]}.{measure.forget.rpartition('.')[2]}"
    if score in (measure.retain, measure.forget) or not all(score in p for of in points.values() for p in of):
        return ""
    found = shares(points, score, (target or {}).get(score, 0.0))
    return f"By {readable(score)}: {enumerated([f'{name} {share}' for name, share in found])}."


def lead(points: Points, measure: ForgetRetainMetric) -> str:
    """The end of the sentence: whether the best is ahead of the next by more than the spread of the seeds."""
    if len(points) < 2:
        return "."
    found = {name: summarise(p[measure.retain] for p in of) for name, of in points.items()}
    (_, best), (second, other) = sorted(found.items(), key=lambda item: -(item[1]["mean"] or 0))[:2]
    if best["sd"] is None or other["sd"] is None:
        return "; with one seed there is no spread to judge the difference by."
    ahead = (best["mean"] or 0) - (other["mean"] or 0)
    if ahead > math.hypot(best["sd"], other["sd"]):
        return f"; its lead over {second}, {printed(ahead)}, is more than the spread of the seeds."
    return f"; its lead over {second}, {printed(ahead)}, is no more than the spread of the seeds."


def unprotected(points: Points, measure: ForgetRetainMetric, target: Scores | None) -> str:
    """What became of the scores of what neither corpus covers, and under which method each is lowest."""
    found: list[str] = []
    scores = dict.fromkeys(score for each in points.values() for point in each for score in point if score != "step")
    for score in filter(collateral, scores):
        of = {name: [p[score] for p in each if score in p] for name, each in points.items()}
        means = {name: fmean(values) for name, values in of.items() if values}
        start = (target or {}).get(score, 0.0)
        if score == measure.retain or not means or start <= 0:
            continue
        worst, best = min(means, key=lambda name: means[name]), max(means, key=lambda name: means[name])
        place = "" if len(means) < 2 else f" under {worst} and {printed(means[best], 2)} under {best}"
        found.append(f"{words_of_score(score)} {printed(means[worst], 2)}{place} (before: {printed(start, 2)})")
    return f"What neither corpus covers: {'; '.join(found)}." if found else ""


def unmatched(starts: Mapping[str, Sequence[float]], measure: ForgetRetainMetric) -> str:
    """That runs were below the level when they were first evaluated, by method, and what lets them be compared."""
    found = enumerated([f"{name} ({', '.join(map(printed, of))})" for name, of in starts.items()])
    return (
        f"Not compared, because below {readable(measure.forget)} {measure.level:g} from the first evaluation: {found}. "
        "Give the evaluation of the model before unlearning by --target, or evaluate earlier exports (a smaller "
        "train.export_every or train.probe_every)."
    )


def never(missed: Mapping[str, float], objective: str, measure: ForgetRetainMetric) -> str:
    lows = enumerated([f"{name} ({printed(low)})" for name, low in missed.items()])
    who = f"No run of {objective}" if objective else "Not compared, because none of its seeds"
    return f"{who} reached {readable(measure.forget)} {measure.level:g}; the lowest: {lows}."
