"""What TensorBoard shows first, and the evaluations on it, read back by its own reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData  # pyright: ignore[reportAttributeAccessIssue]

from eval.reporting.board import write_to_board
from pipeline.monitoring.metrics import results
from pipeline.monitoring.tensorboard import TensorBoardWriter
from tests.conftest import World
from tests.pipeline.monitoring.base import STEPS, evaluate, rows, scalars, train


def short_run(folder: Path, forget: str = "ga", has_probes: bool = True) -> Path:
    """Two steps, with a probe before and one after, as `Monitor` writes them."""
    board = TensorBoardWriter(folder / "tensorboard", start=0, has_probes=has_probes)
    board.begin({"forget": forget, "rule": "sum"})
    cost = {"seconds": 1.0, "tokens_per_second": 10.0, "peak_memory_bytes": 2**30, "skipped": 0}
    losses = {"retain_loss": 2.0} if forget == "none" else {"forget_loss": -90.0, "retain_loss": 2.0}
    steps: list[dict[str, Any]] = [{"step": step, **losses, **cost} for step in (1, 2)]
    others = {"probe/others/extraction_strength": 0.5}
    before = {"probe/forget/extraction_strength": 1.0, "probe/retain/extraction_strength": 1.0}
    board.write([{"step": 0, **before, **others}])
    board.write(steps[:1])
    steps[1] |= {"probe/forget/extraction_strength": 0.25, "probe/retain/extraction_strength": 0.75}
    board.write(steps)
    board.end(steps, results(steps))
    board.writer.close()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    (folder / "config.yaml").write_text(f"objective: {{forget: {forget}}}\n")
    return folder


def test_the_first_page_begins_with_scores_then_losses_then_geometry(tmp_path: Path, told: dict[str, Any]) -> None:
    """*Time series* sorts by group and name, and each tag is a card with an axis of its own.

    Forget and retain scores are the first two cards, and tasks of general ability do not come before them.
    """
    run = short_run(tmp_path / "run")
    evaluate(run, {2: 0.5})
    tasks = {"arc_easy": {"acc": 0.4}, "lambada_openai": {"perplexity": 30.0}}
    write_to_board([(2, run / "final")], [{"suites": {"lm_eval": {"metrics": tasks}}}])
    groups = {tag.partition("/")[0] for tag in (*scalars(run), *scalars(told["run"]))}
    assert sorted(groups)[:7] == [
        *("1_probe", "1_probe_others", "1_scores", "2_loss", "3_geometry", "4_training", "5_general"),
    ]
    assert sorted(scalars(run))[:5] == [
        *("1_probe/extraction_strength/forget", "1_probe/extraction_strength/retain"),
        "1_probe_others/extraction_strength/others",
        *("1_scores/bios.forget.all", "1_scores/bios.retain.all"),
    ]
    assert scalars(run)["1_probe/extraction_strength/forget"] == {0: 1.0, 2: 0.25}
    assert scalars(run)["5_general/lm_eval.arc_easy.acc"] == {2: pytest.approx(0.4)}
    assert scalars(run)["2_loss/forget_loss"] == {1: -90.0, 2: -90.0}


def columns(run: Path) -> list[str]:
    """The columns of results under HParams, in their order."""
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    content = events.SummaryMetadata("_hparams_/experiment").plugin_data.content
    return [one.name.tag for one in HParamsPluginData.FromString(content).experiment.metric_infos]


def test_hparams_begin_with_the_scores_of_probes_or_of_evaluations(tmp_path: Path) -> None:
    """TensorBoard shows five; every run has all columns, because TensorBoard takes them from one of the runs."""
    probed, plain = short_run(tmp_path / "a"), short_run(tmp_path / "b", has_probes=False)
    strengths = ["result/forget_extraction_strength", "result/retain_extraction_strength"]
    losses = ["result/forget_loss", "result/retain_loss"]
    assert columns(probed)[:4] == [*strengths, *losses]
    assert columns(plain)[:4] == ["result/forget_score", "result/retain_score", *losses]
    assert sorted(columns(probed)) == sorted(columns(plain))
    assert [scalars(probed)[tag] for tag in strengths] == [{2: 0.25}, {2: 0.75}]  # of the last probe


def test_an_evaluation_is_on_the_board_once(tmp_path: Path) -> None:
    run = short_run(tmp_path / "run")
    before = scalars(run)
    evaluate(run, {1: 0.5, 2: 0.125})
    assert scalars(run)["1_scores/bios.forget.all"] == {1: 0.5, 2: 0.125}
    assert scalars(run)["result/retain_score"] == {1: 0.5, 2: 0.875}
    assert "1_scores/bios.forget.city" not in scalars(run)  # no headline score
    assert {tag: found for tag, found in scalars(run).items() if tag in before} == before
    files = sorted(run.glob("tensorboard/*"))
    evaluate(run, {1: 0.5, 2: 0.25})
    assert scalars(run)["1_scores/bios.forget.all"] == {1: 0.5, 2: 0.25} and sorted(run.glob("tensorboard/*")) == files


def test_exports_of_a_run_that_ended_before_its_first_row_are_on_the_board(tmp_path: Path) -> None:
    """A run that is stopped early leaves an export, and no row or half a row in its log."""
    run = short_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text("")
    evaluate(run, {1: 0.5, 2: 0.25})
    assert scalars(run)["1_scores/bios.forget.all"] == {1: 0.5, 0: 0.25}  # nothing says after which step final/ is


def test_a_model_that_is_no_export_leaves_the_board_alone(tmp_path: Path) -> None:
    run = short_run(tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    entry = {"suites": {"bios": {"metrics": {"forget": {"all": 0.5}}}}}
    for model in (run / "relearned", tmp_path / "other" / "final", Path("owner/name")):
        write_to_board([(None, model)], [entry])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_that_makes_a_target_model_has_charts_of_its_own(tmp_path: Path) -> None:
    """It shares no chart with runs that unlearn, whose axes its many steps would stretch."""
    target, run = short_run(tmp_path / "target", forget="none"), short_run(tmp_path / "run")
    evaluate(target, {2: 0.5})
    evaluate(run, {2: 0.5})
    shared = set(scalars(target)) & set(scalars(run))
    assert all(tag.startswith("result/") for tag in shared)  # for HParams, a number each
    assert scalars(target)["training/2_loss/retain_loss"] == {1: 2.0, 2: 2.0}
    titles = []
    for folder in (target, run):
        events = EventAccumulator(str(folder / "tensorboard")).Reload()
        layout = Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
        titles.append({chart.title for category in layout.category for chart in category.chart})
    assert not titles[0] & titles[1] and len(titles[0]) == 5


def test_a_run_shorter_than_the_interval_measures_its_layers_once_at_the_end(world: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = world.write(tmp_path / "run.yaml", run, train={"steps": STEPS}, synthesis={"layer_geometry_every": 50})
    done = train(config)
    assert done.returncode == 0, done.stderr[-3000:]
    layered = [row["step"] for row in rows(run) if any(key.startswith("cos_forget_retain/") for key in row)]
    assert layered == [STEPS]
    images = EventAccumulator(str(run / "tensorboard")).Reload()
    assert images.Tags()["images"] == ["heat_map/conflict_fraction", "heat_map/cos_forget_retain"]
    assert [one.step for one in images.Images("heat_map/cos_forget_retain")][-1] == STEPS
