"""TensorBoard: scores, then losses, then geometry on the first page; heat maps of layers; runs beside each other."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData  # pyright: ignore[reportAttributeAccessIssue]
from torch.utils.tensorboard.summary import hparams
from torch.utils.tensorboard.writer import FileWriter, SummaryWriter

from pipeline.monitoring.levels import PREFIX

GIB = 2**30


THOUSANDS, MEMORY = "thousand_tokens_per_second", "peak_memory_gib"  # in these units one axis holds both


COSINES = {
    "cos_forget_retain": "cosine of forget and retain",
    "cos_combined_forget": "cosine of update and forget",
    "cos_combined_retain": "cosine of update and retain",
}


# Of the update Δθ that the optimizer made, weights after less weights before: ⟨r, Δθ⟩ is, to first order, how much the
# retain loss of the step's batch rises by it.
UPDATE = ("cos_update_retain", "dot_update_retain", "update_norm")


# TensorBoard opens on *Time series*, sorted by group: what was forgotten first, how it came about below.
GROUPS = {
    **dict.fromkeys(("forget_loss", "retain_loss", "dual_weight"), "2_loss"),
    **dict.fromkeys((*COSINES, "conflict_fraction", "forget_norm", "retain_norm", "combined_norm"), "3_geometry"),
    **dict.fromkeys((*UPDATE, "share_updated"), "3_geometry"),
}
# The groups of the scores `probe/SET/MEASURE` of the two corpora and of other sets, and of everything else. Within a
# group the measure comes first, so that the cards of what is forgotten and what is retained stand side by side.
PROBE, PROBE_OTHERS, COST = "1_probe", "1_probe_others", "4_training"


# A loss has an axis of its own: that of GA falls without bound, and would make a straight line of the other.
CHARTS = {
    "Forget loss": ("2_loss/forget_loss",),
    "Retain loss": ("2_loss/retain_loss",),
    "Cosines and conflict fraction": tuple(f"3_geometry/{name}" for name in (*COSINES, "conflict_fraction")),
    "Thousand tokens a second, peak memory in GiB": (f"{COST}/{THOUSANDS}", f"{COST}/{MEMORY}"),
}


# Of a run with probes, before the others: a line for each set, by the measures of its kind.
PROBES = {
    "Probes: extraction strength, accuracy": (f"{PROBE}[^/]*/extraction_strength/.*", f"{PROBE}[^/]*/accuracy/.*"),
    "Probes: loss": (f"{PROBE}[^/]*/loss/.*",),
}


# Before the tags of a run without a forget corpus, such as one that makes a target model: a chart that it shared with
# runs that unlearn would have its axes, which are often much longer.
TRAINING = "training/"


# The scores under HParams: a short heading, because columns are narrow, and its meaning. They come first.
PROBED = {
    "forget_extraction_strength": ("forget ES", "extraction strength of the probe `forget`, last"),
    "retain_extraction_strength": ("retain ES", "extraction strength of the probe `retain`, last"),
}
EVALUATED = {  # eval.run writes these
    "forget_score": ("forget score", "of the last model that eval.run evaluated, by the forget score of its suite"),
    "retain_score": ("retain score", "of the last model that eval.run evaluated, by the retain score of its suite"),
}


# The other results under HParams.
MEASURES = {
    "forget_loss": ("forget loss", "mean over the last tenth of the steps"),
    "retain_loss": ("retain loss", "mean over the last tenth of the steps"),
    "seconds": ("s a step", "seconds of a step, median"),
    "peak_memory_gib": ("peak GiB", "most memory of a rank"),
    "skipped": ("skipped", "steps that were not finite"),
    **{name: (name.replace("_", " "), f"{what}, mean over the steps") for name, what in COSINES.items()},
    "conflict_fraction": ("in conflict", "fraction of elements in conflict, mean over the steps"),
    "tokens_per_second": ("tokens/s", "tokens a second, median"),
}


SHOWN = (
    "forget",
    "gamma",
    "lr",
    "rule",
    "seed",
)  # the hyper-parameters shown by default: also five; TensorBoard sorts them by name


# The heat maps: title, neutral value (white) and colours around it (red: the tasks conflict). The neutral value of the
# fraction is one half: half of the elements of two random gradients differ in sign.
HEAT_MAPS = {
    "conflict_fraction": ("fraction of elements in conflict", 0.5, "RdBu_r"),
    "cos_forget_retain": ("cosine of forget and retain gradient", 0.0, "RdBu"),
}


HEAT_MAP_EVERY_S = 60.0  # drawing one takes some tenths of a second


class TensorBoardWriter:
    """The event file of a run, on rank 0. A resumed run replaces the steps from `start` + 1 on."""

    def __init__(self, folder: Path, *, start: int, has_probes: bool = False) -> None:
        self.writer = SummaryWriter(str(folder), purge_step=start + 1 if start else 0)
        self.has_probes = has_probes
        self.prefix = ""  # of every tag
        self.drawn = time.monotonic()  # a short run draws once, at its end

    def begin(self, hyperparameters: dict[str, str | float]) -> None:
        """Write the layout of the charts, and the run's row under HParams with the scalars `result/<measure>`, which
        `end` writes.

        The row goes into this file; `add_hparams` would make a second run in a folder of its own.
        """
        is_training = hyperparameters["forget"] == "none"
        self.prefix = TRAINING if is_training else ""
        shown = {**PROBES, **CHARTS} if self.has_probes else CHARTS
        # A chart takes the tags that match a regular expression at their beginning: layers would come along.
        charts = {
            title + " (training)" * is_training: ["Multiline", [f"^{self.prefix}{tag}$" for tag in tags]]
            for title, tags in shown.items()
            if not (is_training and "forget" in title.lower())
        }
        self.writer.add_custom_scalars({"Training" if is_training else "Unlearning": charts})
        columns = self.columns()
        table, run, _ = hparams(hyperparameters, {f"result/{name}": None for name in columns})
        plugin = table.value[0].metadata.plugin_data
        content = HParamsPluginData.FromString(plugin.content)
        for column in content.experiment.hparam_infos:
            column.differs = column.name in SHOWN  # TensorBoard shows these first
        for column, (heading, meaning) in zip(content.experiment.metric_infos, columns.values(), strict=True):
            column.display_name, column.description = heading, meaning
        plugin.content = content.SerializeToString()
        for summary in (table, run):
            self.file.add_summary(summary, 0)
        self.hyperparameters = hyperparameters

    def columns(self) -> dict[str, tuple[str, str]]:
        """The results under HParams, of which TensorBoard shows the first five by default.

        Scores come first: those of probes in a run that has them, those of `eval.run` in another.
        """
        return {**PROBED, **MEASURES, **EVALUATED} if self.has_probes else {**EVALUATED, **MEASURES, **PROBED}

    @property
    def file(self) -> FileWriter:
        return self.writer._get_file_writer()

    def write(self, history: Sequence[Mapping[str, float | None]]) -> None:
        """The last row of `history`, rows of `metrics.jsonl`."""
        row = history[-1]
        values = {name: value for name, value in row.items() if name != "step" and value is not None}
        step = int(row["step"] or 0)
        if "tokens_per_second" in values:
            values[THOUSANDS] = values["tokens_per_second"] / 1000
        if "peak_memory_bytes" in values:
            values[MEMORY] = values["peak_memory_bytes"] / GIB
        for name, value in values.items():
            self.writer.add_scalar(self.prefix + tag_of(name), value, step)
        for name in COSINES:
            of_layers = np.array([value for key, value in values.items() if key.startswith(f"{name}/")])
            if of_layers.size:
                self.writer.add_histogram(f"{self.prefix}layers/{name}", of_layers, step)
        if (
            any(name.partition("/")[0] in HEAT_MAPS for name in values if "/" in name)
            and time.monotonic() - self.drawn > HEAT_MAP_EVERY_S
        ):
            self.draw(history)

    def draw(self, history: Sequence[Mapping[str, float | None]]) -> None:
        """Draw the heat maps, layers × steps, of the steps so far."""
        for name in HEAT_MAPS:
            image = heat_map(history, name)
            if image is not None:
                self.writer.add_image(
                    f"{self.prefix}heat_map/{name}", image, int(history[-1]["step"] or 0), dataformats="HWC"
                )
        self.drawn = time.monotonic()

    def end(self, history: Sequence[Mapping[str, float | None]], results: Mapping[str, float]) -> None:
        """Write the last heat maps, and the results beside the hyper-parameters."""
        self.draw(history)
        for name, value in results.items():
            self.writer.add_scalar(f"result/{name}", value, int(history[-1]["step"] or 0))
        self.file.add_summary(hparams(self.hyperparameters, {})[2], 0)  # the status: success


def tag_of(name: str) -> str:
    """The tag of a number of `metrics.jsonl`: in its group, but that of a layer, which has a group already."""
    first, _, rest = name.partition("/")
    if f"{first}/" == PREFIX:
        of, _, measure = rest.rpartition("/")
        return f"{PROBE if of in ('forget', 'retain') else PROBE_OTHERS}/{measure}/{of}"
    if rest:
        return name
    return f"{GROUPS.get(name, COST)}/{name}"


def heat_map(history: Sequence[Mapping[str, float | None]], name: str) -> np.ndarray | None:
    """`name/LAYER` of the rows that have it, a line a layer, a column a step: [height, width, 3] uint8, or None."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in history if any(key.startswith(f"{name}/") for key in row)]
    layers = list(dict.fromkeys(key for row in rows for key in row if key.startswith(f"{name}/")))
    missing = math.nan
    values = np.array([[missing if (v := row.get(key)) is None else v for row in rows] for key in layers], dtype=float)
    if not np.isfinite(values).any():
        return None
    title, middle, colours = HEAT_MAPS[name]
    reach = max(float(np.nanmax(np.abs(values - middle))), 1e-3)
    figure = Figure(figsize=(6, 1.4 + 0.22 * min(len(layers), 40)), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(
        values, aspect="auto", interpolation="nearest", cmap=colours, vmin=middle - reach, vmax=middle + reach
    )
    axes.set_facecolor("0.8")  # where there was no number
    every = -(-len(layers) // 40)
    axes.set_yticks(range(0, len(layers), every), [layers[i].partition("/")[2] for i in range(0, len(layers), every)])
    ticks = range(0, len(rows), -(-len(rows) // 12))
    axes.set_xticks(ticks, [str(rows[x]["step"]) for x in ticks])
    axes.set_xlabel("step")
    axes.set_title(title)
    figure.colorbar(image, ax=axes)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
