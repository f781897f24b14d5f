"""What to try where a run does not reach the level, from its own trajectory."""

from __future__ import annotations

import math
from collections.abc import Sequence

from eval.results.metrics import ForgetRetainMetric
from eval.results.numbers import printed
from eval.results.trajectories import Run, Scores

LATE = 2 / 3  # the slope is that of the last third of the steps
STILL = 0.05  # of the distance to the level: less than this is no movement
AGAIN = 0.1  # of the distance to the level: a rise after the lowest point that is more than noise
MOST_LONGER = 4  # times as many steps: beyond it, more steps alone are poor advice
FALLING = ("linear", "cosine")  # schedules that end near a learning rate of 0


def late_slope(trajectory: Sequence[Scores], score: str) -> float:
    """Change of the score a step, by least squares over the evaluations of its last third, at least two."""
    last = trajectory[-1]["step"]
    late = [scores for scores in trajectory if scores["step"] >= LATE * last]
    late = late if len(late) > 1 else [*trajectory[-2:]]
    steps, values = [s["step"] for s in late], [s[score] for s in late]
    mean, middle = sum(values) / len(values), sum(steps) / len(steps)
    spread = sum((step - middle) ** 2 for step in steps)
    return sum((s - middle) * (v - mean) for s, v in zip(steps, values, strict=True)) / spread if spread else 0.0


def advise(run: Run, measure: ForgetRetainMetric) -> str:
    """What to try, in one or two sentences, for a run that has no point at the level."""
    trajectory, forget = run.trajectory, measure.forget
    start, end = trajectory[0], trajectory[-1]
    distance = start[forget] - measure.level
    low = min(trajectory, key=lambda scores: scores[forget])
    if len(trajectory) < 2:
        return "One evaluation shows no direction: export on the way (train.export_every), or give --target."
    if end[forget] - low[forget] > AGAIN * distance:
        words = (
            f"It fell to {printed(low[forget])} at step {low['step']:g} and rose again to {printed(end[forget])}: "
            "retention has overtaken forgetting. More steps do not help; try a larger synthesis.gamma, or a forget "
            "objective that does not saturate (ga)."
        )
    elif start[forget] - end[forget] < STILL * distance:
        words = (
            f"It hardly moved ({printed(start[forget])} to {printed(end[forget])}): try a learning rate ten times as "
            f"large ({tenfold(run)}), and only then a larger synthesis.gamma."
        )
    else:
        words = from_slope(run, measure, distance)
    return f"{words} {room(start, end, measure)}".strip()


def from_slope(run: Run, measure: ForgetRetainMetric, distance: float) -> str:
    """How many more steps it takes at the slope of the last third, or that the score has come to rest."""
    end = run.trajectory[-1]
    slope, last = late_slope(run.trajectory, measure.forget), end["step"]
    ahead = end[measure.forget] - measure.level
    if slope >= 0 or ahead / -slope > MOST_LONGER * last:
        return (
            f"It has come to rest at {printed(end[measure.forget])}: more steps alone do not help; try a larger "
            f"synthesis.gamma (now {setting(run, 'synthesis.gamma')}), {tenfold(run, 3)}, or another forget objective."
        )
    more = math.ceil(round(ahead / -slope, 6))  # a slope has rounding errors
    total = 10 * math.ceil((last + more) / 10)
    falling = str(run.settings.get("optimizer.schedule")) in FALLING
    over = "; the learning rate was falling to 0 there, so fewer may do" if falling else ""
    return (
        f"In the last third of the steps it fell by {printed(-10 * slope)} in 10 steps, so about {more} more "
        f"would reach the level{over}: train.steps {total}, or {tenfold(run, 3)}."
    )


def room(start: Scores, end: Scores, measure: ForgetRetainMetric) -> str:
    """What the retain score allows."""
    before, after = start[measure.retain], end[measure.retain]
    if before <= 0:
        return ""
    if after >= 0.9 * before:
        return f"The retain score, {printed(after)} of {printed(before)}, leaves room for it."
    if after < 0.5 * before:
        return (
            f"The retain score is down to {printed(after)} of {printed(before)}: a stronger push costs more of it; try "
            "synthesis.rule sago, or a retain corpus that covers more."
        )
    return ""


def setting(run: Run, key: str) -> str:
    value = run.settings.get(key)
    return "unknown" if value is None else f"{value:g}" if isinstance(value, int | float) else str(value)


def tenfold(run: Run, times: int = 10) -> str:
    """The learning rate `times` as large, as the option that sets it."""
    rate = run.settings.get("optimizer.lr")
    return f"optimizer.lr {times * rate:.3g}" if isinstance(rate, int | float) else f"{times} times optimizer.lr"
