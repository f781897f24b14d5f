"""The scores of the model that a run began with, from files that are there already."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from eval.files import read_config, read_json, read_log
from eval.results.conditions import Measured, differences, of_evaluation, of_training
from eval.results.method import read_digests
from eval.results.trajectories import Scores, probes_of, read_scores
from pipeline.errors import InputError
from pipeline.files import Json


def base_of(run: Path) -> Path | None:
    """The model that a run began with; None if the folder does not say."""
    if not (run / "config.yaml").is_file():
        return None
    return Path(read_config(run, ("model",))["model"]["path"])


def scores_before(run: Path, entries: Sequence[Json]) -> dict[str, Scores]:
    """{suite: scores, as of step 0} of the model that a run began with, of those suites of which they are known.

    A probe before the first step gives them, and each JSON file of `eval.run` that names this model: in the run folder
    or beside it, in the model's folder or beside that. What does not measure the same as `entries` does not count, nor
    what is older than the model's weights. Later files come first.

    Args:
        entries: of the run's own evaluation, as `evaluate_all` returns them.

    Raises:
        InputError: the run's own files are malformed.
    """
    base = base_of(run)
    if base is None:
        return {}
    own = of_evaluation(run, entries)
    found: dict[str, Scores] = {}
    for measured, scores in (*_probed(run), *_evaluated(run, base)):
        for suite in own.suites.keys() & measured.suites.keys() - found.keys():
            if not differences(own.suites[suite], measured.suites[suite]):
                found[suite] = {key: x for key, x in scores.items() if key == "step" or key.startswith(f"{suite}.")}
    return found


def _probed(run: Path) -> Iterator[tuple[Measured, Scores]]:
    """What a probe before the first step measured."""
    row = read_log(run).before
    if row is not None:
        digests = read_digests(run / "digests.json")
        yield of_training(run / "metrics.jsonl", read_config(run, ()), digests), probes_of(row)


def _evaluated(run: Path, base: Path) -> Iterator[tuple[Measured, Scores]]:
    """What `eval.run` measured of the model `base`, the last file first."""
    places = {run, run.parent, *([base, base.parent] if base.is_dir() else [])}
    weights = max((file.stat().st_mtime for file in base.glob("*.safetensors")), default=0.0)
    files = {file.resolve() for place in places for file in place.glob("*.json")}
    for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
        if file.stat().st_mtime < weights or file.name.startswith(("config", "tokenizer")):
            continue
        try:
            content = read_json(file)
        except InputError:  # files of others lie here too
            continue
        for entry in content.get("trajectory") or [content] if isinstance(content, dict) else ():
            if isinstance(entry, dict) and "suites" in entry and _is_same(base, entry.get("model")):
                yield of_evaluation(file, [entry]), read_scores(entry, file, step=0)


def _is_same(base: Path, model: object) -> bool:
    return isinstance(model, str) and (Path(model) == base or Path(model).resolve() == base.resolve())
