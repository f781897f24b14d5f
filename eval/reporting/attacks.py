"""What attacks on the forget corpus itself found: a table, and curves of relearning and of many samples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from statistics import fmean

from eval.reporting.charts import Chart, Panel, Trace
from eval.reporting.figures import compared, styles
from eval.results.stats import mean_sd
from eval.results.trajectories import Run
from pipeline.files import Json

Groups = Mapping[str, list[Run]]  # method -> its seeds


DIRECT = ("relearn_curve", "few_shot", "leak", "kl")  # they measure the corpus, and not a suite


SCORES = {
    "held_out.probability": "probability of the other half",
    "held_out.extraction_strength": "extraction strength of the other half",
    "greedy": "greedy answers that give the text away",
    "leak@1": "leak@1",
    "leak@16": "leak@16",
    "leak@128": "leak@128",
    "kl": "KL a token",
}


RELEARNING = "probability of the half that is not relearned"


def words_of(settings: Json) -> str:
    """The settings of an attack as "steps 100, lr 0.001", without its seed and empty ones."""
    shown = {key: value for key, value in settings.items() if key != "seed" and value not in (None, [], {})}
    return ", ".join(f"{key} {value}" for key, value in shown.items())


def entries(groups: Groups, name: str) -> Iterator[tuple[str, Json]]:
    """(method, entry) of each run on which the attack of this name was tried."""
    for method, runs in groups.items():
        for run in runs:
            for entry in (run.robustness or {"attacks": []})["attacks"]:
                if entry["name"] == name:
                    yield method, entry


def direct_table(groups: Groups) -> list[list[str]]:
    """Scores before and after each attack, mean ± sd over the runs; only the header if there was none."""
    rows = [["method", "attack", "score", "original", "before", "after", "s", "runs"]]
    for name in DIRECT:
        tries: dict[tuple[str, str], list[Json]] = defaultdict(list)
        for method, entry in entries(groups, name):
            settings = words_of(entry.get("settings") or {})
            tries[method, f"{name} ({settings})" if settings else name].append(entry)
        for (method, title), of in tries.items():
            seconds = mean_sd((entry["seconds"] for entry in of if "seconds" in entry), digits=0)
            for score, words in SCORES.items():
                columns = [
                    [entry[when][score] for entry in of if score in entry.get(when, {})]
                    for when in ("original", "before", "after")
                ]
                if any(columns):
                    rows.append([method, title, words, *(mean_sd(values) for values in columns), seconds, str(len(of))])
    return rows


def attack_chart(groups: Groups) -> Chart | None:
    """Relearning against the step, and leak@k against k, means over the runs of a method; None if neither was tried."""
    panels = [panel for panel in (relearning(groups), leaking(groups)) if panel.traces]
    return Chart(f"Attacks on the forget corpus: {compared(groups)}", panels, 2) if panels else None


def relearning(groups: Groups) -> Panel:
    found: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for method, entry in entries(groups, "relearn_curve"):
        for row in entry["curve"]:
            if (value := row.get("held_out", {}).get("probability")) is not None:
                found[method][row["step"]].append(value)
    panel = Panel("relearning one half", "step", RELEARNING)
    return with_means(panel, groups, found)


def leaking(groups: Groups) -> Panel:
    found: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    ks: list[str] = []
    for method, entry in entries(groups, "leak"):
        own = [key.removeprefix("leak@") for key in entry["after"]]
        ks = max(ks, own, key=len)
        for at, k in enumerate(own):
            found[method][at].append(entry["after"][f"leak@{k}"])
    panel = Panel("drawing k answers to each prompt", "k", "share of prompts that give the text away", ticks=ks)
    return with_means(panel, groups, found)


def with_means(panel: Panel, groups: Groups, found: Mapping[str, Mapping[float, list[float]]]) -> Panel:
    """The panel with a line a method: the means of `found`, {method: {x: values}}."""
    style = styles(groups)
    for method, points in found.items():
        x = sorted(points)
        y = [fmean(points[at]) for at in x]
        names = [panel.ticks[int(at)] if panel.ticks else f"{at:g}" for at in x]
        hover = [f"{method}, {panel.x} {name}: {value:.3f}" for name, value in zip(names, y, strict=True)]
        panel.traces.append(Trace(x, y, style[method].look, method, markers=True, hover=hover))
    return panel
