"""What attacks on the forget corpus itself found: a table, and curves of relearning and of many samples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from statistics import fmean

from eval.reporting.charts import Chart, Panel, Trace
from eval.reporting.figures import compared, styles
from eval.results.stats import mean_of_known, mean_sd
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


KL_BUDGET = 0.01  # nats a token on WikiText; RepSelect, arXiv 2606.17168, tunes every method within it
BEYOND = f"KL > {KL_BUDGET:g}"  # the mark of a method that moved further: its robustness may be damage


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


def marked_names(groups: Groups) -> dict[str, str]:
    """{method: its name in the tables}: with BEYOND if its KL, the mean over the runs, is not within KL_BUDGET."""
    found: dict[str, list[float]] = defaultdict(list)
    for method, entry in entries(groups, "kl"):
        found[method].append(entry["after"]["kl"])
    beyond = {method for method, values in found.items() if not fmean(values) <= KL_BUDGET}
    return {method: f"{method} ({BEYOND})" if method in beyond else method for method in groups}


def budget_note(groups: Groups) -> str:
    """The sentence that explains BEYOND; nothing if no method has it."""
    if list(marked_names(groups).values()) == list(groups):
        return ""
    return (
        f" {BEYOND}: the method moved the model further than a mean of {KL_BUDGET:g} nats a token on the texts of the "
        f"attack `kl`, so its robustness may be damage; compare only methods without the mark {BEYOND}."
    )


def direct_table(groups: Groups) -> list[list[str]]:
    """Scores before and after each attack, mean ± sd over the runs; only the header if there was none.

    A method beyond the budget is marked.
    """
    rows, names = [["method", "attack", "score", "original", "before", "after", "s", "runs"]], marked_names(groups)
    for attack in DIRECT:
        tries: dict[tuple[str, str], list[Json]] = defaultdict(list)
        for method, entry in entries(groups, attack):
            settings = words_of(entry.get("settings") or {})
            tries[method, f"{attack} ({settings})" if settings else attack].append(entry)
        for (method, title), of in tries.items():
            seconds = mean_sd((entry["seconds"] for entry in of if "seconds" in entry), digits=0)
            for score, words in SCORES.items():
                columns = [[entry.get(when, {}).get(score) for entry in of] for when in ("original", "before", "after")]
                if any(value is not None for column in columns for value in column):
                    values = [mean_of_known(column) for column in columns]
                    rows.append([names[method], title, words, *values, seconds, str(len(of))])
    return rows


def attack_chart(groups: Groups) -> Chart | None:
    """Fine-tuning against the step, and leak@k against k, means over the runs of a method; None without them."""
    relearned = training_curve(groups, "relearn_curve", "held_out", Panel("relearning one half", "step", RELEARNING))
    moved = Panel("fine-tuning on unrelated texts", "step", "probability of the forget corpus")
    panels = [relearned, training_curve(groups, "unrelated", "forget", moved), leaking(groups)]
    panels = [panel for panel in panels if panel.traces]
    return Chart(f"Attacks on the forget corpus: {compared(groups)}", panels, 2) if panels else None


def training_curve(groups: Groups, attack: str, probed: str, panel: Panel) -> Panel:
    """The panel with the probability of the set `probed` while the attack trains."""
    found: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for method, entry in entries(groups, attack):
        for row in entry.get("curve", []):
            if (value := row.get(probed, {}).get("probability")) is not None:
                found[method][row["step"]].append(value)
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
