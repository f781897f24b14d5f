"""Compare the finished runs of a sweep: each method's best setting, and what all runs show together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from eval.results.common import known_before
from eval.results.conditions import of_target, refuse_different
from eval.results.metrics import ForgetRetainMetric
from eval.results.numbers import printed, with_spread
from eval.results.stats import correlate, summarise
from eval.results.trajectories import COMB_RETAIN, Run, Scores, lowest, matched, mean_of, starts_below
from eval.sweep.axes import Setting, by_number, parse_setting
from eval.sweep.runs import Plan, finished_runs, read_seeds
from pipeline.files import Json


@dataclass(frozen=True)
class Trained:
    """A finished run, and the point where it falls to the level (None: nowhere)."""

    method: str
    setting: Setting
    seed: int
    run: Run
    measure: ForgetRetainMetric

    @property
    def point(self) -> Scores | None:
        return matched(self.run.trajectory, self.measure)

    @property
    def is_early(self) -> bool:
        """Whether there is no `point` because no evaluation saw the run above the level (`starts_below`)."""
        return starts_below(self.run.trajectory, self.measure)

    @property
    def lowest(self) -> float:
        return lowest(self.run, self.measure)

    @property
    def retained(self) -> float | None:
        return self.point[self.measure.retain] if self.point else None

    @property
    def cosine(self) -> float | None:
        """cos(g, g_r), mean over the steps up to the matched one."""
        return mean_of(self.run, COMB_RETAIN, until=self.point["step"]) if self.point else None


@dataclass(frozen=True)
class Group:
    """The finished seeds of one method in one setting."""

    method: str
    setting: Setting
    members: list[Trained]

    @property
    def points(self) -> list[Scores]:
        return [member.point for member in self.members if member.point]

    @property
    def retained(self) -> list[float]:
        """Retain scores of the seeds that reach the level."""
        return [member.retained for member in self.members if member.retained is not None]

    @property
    def rank(self) -> tuple[float, float]:
        """Orders settings of a method: first by the share of seeds that reach the level, then by their retain score."""
        if not self.retained:
            return 0.0, -fmean(member.lowest for member in self.members)
        return len(self.retained) / len(self.members), fmean(self.retained)


def collect(plan: Plan) -> list[Group]:
    """All finished runs of the plan's methods and seeds in its folder, those of earlier sweeps included.

    Raises:
        InputError: see `read_seeds`; or scores of one suite, in two of the runs or in the target's, do not measure the
            same (`refuse_different`).
    """
    groups = list[Group]()
    for method in plan.methods:
        found = [(parse_setting(folder), seeds) for folder, seeds in finished_runs(plan, method).items()]
        for setting, seeds in sorted(found, key=lambda one: by_number(one[0])):
            runs = read_seeds(plan, method, setting, seeds)
            members = [Trained(method, setting, run.seed, run, plan.measure) for run in runs]
            groups.append(Group(method, setting, members))
    runs = [member.run for group in groups for member in group.members]
    measured = [one for run in runs for one in run.measured]
    refuse_different(measured, of_target(plan.target_file), unused=known_before(runs))
    return groups


def best_groups(groups: Iterable[Group]) -> dict[str, Group]:
    """The best setting of each method (`Group.rank`)."""
    best: dict[str, Group] = {}
    for group in groups:
        if group.method not in best or group.rank > best[group.method].rank:
            best[group.method] = group
    return best


def seed_means(group: Group) -> list[dict[str, float]]:
    """{"step", "forget", "retain"} of each evaluated step that all seeds have, as means over the seeds."""
    measure = group.members[0].measure
    trajectories = [{scores["step"]: scores for scores in member.run.trajectory} for member in group.members]
    steps = sorted(set.intersection(*(set(trajectory) for trajectory in trajectories)) - {0})  # 0 is the target model
    return [
        {
            "step": step,
            "forget": fmean(trajectory[step][measure.forget] for trajectory in trajectories),
            "retain": fmean(trajectory[step][measure.retain] for trajectory in trajectories),
        }
        for step in steps
    ]


def cosine_and_retention(members: Iterable[Trained]) -> Json:
    """{"n", "pearson", "spearman"} of cos(g, g_r) with retention, over the runs that fall to the level and log it."""
    found = [(m.cosine, m.retained) for m in members]
    return correlate((cosine, retained) for cosine, retained in found if cosine is not None and retained is not None)


def sum_against_others(groups: Sequence[Group]) -> list[Json]:
    """For each objective, the best `sum` over its ratios gamma / alpha, beside the best of each other rule.

    One entry for each pair of a `sum` whose ratio was varied and another rule with the same objective; `difference` is
    the other's mean retain score minus that of `sum`, None if one of the two has not reached the level, or if a run of
    one was below it from its first evaluation (`early`, the methods): that one has forgotten more than the other.
    """

    def objective(group: Group) -> str:
        return group.members[0].run.objective

    def ratio(group: Group) -> float:
        settings = group.members[0].run.settings
        alpha, gamma = settings["synthesis.alpha"], settings["synthesis.gamma"]
        return gamma / alpha if alpha else math.inf

    def rule(group: Group) -> str | None:
        return group.members[0].run.rule

    best = best_groups(groups)
    answers = []
    for plain in best.values():
        ratios = {ratio(group) for group in groups if rule(group) == "sum" and objective(group) == objective(plain)}
        if rule(plain) != "sum" or len(ratios) < 2:
            continue
        for other in best.values():
            if rule(other) == "sum" or objective(other) != objective(plain):
                continue
            sides = [summarise(group.retained) for group in (plain, other)]
            early = [group.method for group in (plain, other) if any(member.is_early for member in group.members)]
            known = [side["mean"] for side in sides if side["mean"] is not None and not early]
            answers.append(
                {
                    "sum": {"method": plain.method, "setting": plain.setting, "ratio": ratio(plain), **sides[0]},
                    "other": {"method": other.method, "setting": other.setting, "ratio": ratio(other), **sides[1]},
                    "ratios_tried": len(ratios),
                    "early": early,
                    "difference": known[1] - known[0] if len(known) == 2 else None,
                }
            )
    return answers


def answer_sum(answers: Sequence[Json], level: float) -> str:
    """Sentences that answer whether a plain sum with its best ratio reaches the same frontier."""
    if not answers:
        return (
            "Not answered by these runs: the comparison needs a method with the rule sum in several ratios "
            "gamma / alpha (--sweep synthesis.gamma=…) and one with another rule and the same objective."
        )
    sentences = []
    for answer in answers:
        plain, other, difference = answer["sum"], answer["other"], answer["difference"]
        if answer["early"]:
            sentences.append(
                f"{' and '.join(answer['early'])} had forgotten more than the level at the first evaluation, so "
                f"{plain['method']} and {other['method']} cannot be compared at it: give --target, or evaluate earlier."
            )
            continue
        if difference is None:
            late = " and ".join(side["method"] for side in (plain, other) if side["mean"] is None)
            sentences.append(f"{late} reached forget {level:g} in no run, so the two cannot be compared.")
            continue
        sides = [
            f"{side['method']} at its best (gamma / alpha {side['ratio']:g}) retains "
            + with_spread(side["mean"], side["sd"])
            for side in (plain, other)
        ]
        if plain["sd"] is None or other["sd"] is None:
            verdict = "with one seed there is no spread to judge it by"
        elif abs(difference) <= math.hypot(plain["sd"], other["sd"]):
            verdict = "no more than the spread of the seeds, so sum reaches the same frontier at this level"
        elif difference > 0:
            verdict = "more than the spread of the seeds, so sum does not reach it"
        else:
            verdict = "more than the spread of the seeds, so sum is ahead"
        ahead = f"{'+' if difference >= 0 else ''}{printed(difference)}"
        sentences.append(
            f"Of {answer['ratios_tried']} ratios, {sides[0]}; {sides[1]}: a difference of {ahead}, {verdict}."
        )
    return " ".join(sentences)
