"""A run as TensorBoard shows it, in a real browser; what DeepSpeed's monitors get; what stands on the console."""

from __future__ import annotations

import csv
import fcntl
import html
import io
import json
import logging
import os
import pty
import re
import shlex
import shutil
import struct
import subprocess
import sys
import termios
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.config.deepspeed import deepspeed_config
from pipeline.config.load import resolve
from pipeline.errors import InputError
from pipeline.monitoring import console
from pipeline.monitoring.metrics import results
from pipeline.monitoring.tensorboard import COSINES, TensorBoardWriter, heat_map
from pipeline.monitoring.trackers import _cut
from pipeline.startup import hyperparameters
from tests.browser import Browser
from tests.conftest import World
from tests.distributed import free_port

REPOSITORY = Path(__file__).resolve().parents[3]
STEPS = 4


def train(config: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline.train", "--config", str(config), *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def told(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run, cut back to its checkpoint after 2 of 4 steps and resumed with --quiet: its folder, and what each said.

    DeepSpeed's csv_monitor and tensorboard are on in it; log.txt is that of the first, whole run.
    """
    folder = tmp_path_factory.mktemp("a board")  # with a space: what is printed is pasted into a shell
    monitors = {name: {"enabled": True, "output_path": str(folder / name)} for name in ("csv_monitor", "tensorboard")}
    zero = {**json.loads((REPOSITORY / "ds_configs/cpu.json").read_text()), **monitors}
    (folder / "zero.json").write_text(json.dumps(zero))
    config = world.write(
        folder / "run.yaml",
        folder / "runs" / "one",
        train={"steps": STEPS, "checkpoint_every": 2, "deepspeed": str(folder / "zero.json")},
        synthesis={"layer_geometry_every": 1, "gamma": 0.5},
        method="ga_sago",
    )
    first, run = train(config), folder / "runs" / "one"
    assert first.returncode == 0, first.stderr[-3000:]
    log = (run / "log.txt").read_text()
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints" / "step-000004")
    second = train(config, "--resume", "--quiet")
    assert second.returncode == 0, second.stderr[-3000:]
    files = {file.stem: list(csv.reader(file.open())) for file in (folder / "csv_monitor" / "one").iterdir()}
    theirs = folder / "tensorboard" / "one"
    return {"run": run, "first": first, "second": second, "csv": files, "theirs": theirs, "log": log}


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# Console


def test_without_a_terminal_plain_lines_and_a_summary(told: dict[str, Any]) -> None:
    done, run = told["first"], told["run"]
    assert done.stdout == "" and "\r" not in done.stderr and "\x1b" not in done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) < 20
    assert [line.split(":")[0] for line in lines[:2]] == ["data.forget", "data.retain"]  # how much of them is used
    assert next(line for line in lines[2:] if not line.startswith("warning: ")).startswith("step 1 of 4: forget ")
    assert any(line.startswith("step 4 of 4: forget ") and "0:00:00 left" in line for line in lines)
    losses = [row["retain_loss"] for row in rows(run)]
    said = next(line for line in lines if line.strip().startswith("retain loss"))
    assert [float(number) for number in said.split()[2::2]] == pytest.approx([losses[0], losses[-1]], rel=1e-3)
    assert any(re.match(rf"  model +{re.escape(str(run / 'final'))}$", line) for line in lines)
    proposed = ["--model", str(run / "final"), "--suite", "SUITE", "--output", str(run / "evaluation.json")]
    assert shlex.split(lines[-1]) == ["next", "python", "-m", "eval.run", *proposed]


def test_quiet_says_nothing(told: dict[str, Any]) -> None:
    assert told["second"].stderr == "" and told["second"].stdout == ""


def test_what_libraries_say_is_in_the_log(told: dict[str, Any]) -> None:
    assert "DeepSpeed Final Optimizer" in told["log"] and "rank 0 INFO pipeline: step 4 of 4" in told["log"]
    assert "DeepSpeed" not in told["first"].stderr
    assert (told["run"] / "log.txt").read_text().startswith(told["log"])  # the resumed run goes on below


def test_warnings_once_errors_always(tmp_path: Path) -> None:
    """In processes of their own, one for each of two ranks: it takes over Python's logging."""
    code = """
import logging, os, sys, warnings
from pathlib import Path
import datasets, transformers
from pipeline.monitoring import console
rank, folder = 1 if os.fork() else 0, Path(sys.argv[1])
os.dup2(os.open(folder / f"stderr-{rank}", os.O_CREAT | os.O_WRONLY), 2)
console.setup_logging(rank, quiet=True)
for _ in range(3):
    logging.getLogger("pipeline.data.tokenize").warning("rows are left out")
    logging.getLogger("DeepSpeed").warning("strange")
    logging.getLogger("DeepSpeed").info("chatter")
    warnings.warn("look out", UserWarning, stacklevel=1)
    warnings.warn("renamed soon", FutureWarning, stacklevel=1)
    logging.getLogger("transformers").warning("flags")
    logging.getLogger("somebody").error("broken")
with console.capture_stdout():
    print("compiling")
assert not (folder / "log.txt").exists()
(folder / str(rank)).mkdir()
console.open_log(folder / str(rank), rank)
if rank:
    os.wait()
"""
    line = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout == ""
    said = [(tmp_path / f"stderr-{rank}").read_text().splitlines() for rank in (0, 1)]
    logged = [(tmp_path / str(rank) / "log.txt").read_text() for rank in (0, 1)]
    errors = ["somebody: broken"] * 3
    assert [line for line in said[0] if line in errors] == errors and said[1] == errors
    others = [line for line in said[0] if line not in errors]
    assert others[:2] == ["warning: rows are left out", "warning: DeepSpeed: strange"]
    assert others[2].startswith("warning: python: look out (UserWarning, ") and len(others) == 3
    assert logged[0].count("INFO DeepSpeed: chatter") == 3 and "INFO DeepSpeed: compiling" in logged[0]
    assert "rank 0 INFO python: renamed soon" in logged[0] and logged[0].count("transformers: flags") == 1
    assert (
        "chatter" not in logged[1] and logged[1].count("rank 1 WARNING pipeline.data.tokenize: rows are left out") == 1
    )


def test_on_a_terminal_one_line_is_redrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    level = console.logger.level
    with os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        for now, is_drawn in ((logging.INFO, True), (logging.WARNING, False)):  # as `listen` sets it; then for --quiet
            console.logger.setLevel(now)
            progress = console.Progress(0, 2)
            for step in (1, 2):
                progress.update(step, {"forget": 0.25, "retain": None})
            progress.close()
            terminal.write("end")
            terminal.flush()
            seen = ""
            while not seen.endswith("end"):
                seen += os.read(reader, 10000).decode()
            if is_drawn:
                assert "\r" in seen and "2/2" in seen and "forget 0.25" in seen and "retain" not in seen
            else:
                assert seen == "end"
    os.close(reader)
    console.logger.setLevel(level)


def test_results_are_means_and_medians() -> None:
    history = [
        {"forget_loss": float(n), "retain_loss": None, "cos_forget_retain": n / 10, "skipped": int(n == 3)}
        | {"seconds": 1.0 if n else 60.0, "tokens_per_second": n, "peak_memory_bytes": n * 2**30}
        for n in range(20)
    ]
    found = results(history)
    assert found["forget_loss_start"] == 0.5 and found["forget_loss"] == 18.5 and "retain_loss" not in found
    assert found["cos_forget_retain"] == pytest.approx(0.95) and "conflict_fraction" not in found
    assert found["skipped"] == 1 and found["seconds"] == 1.0 and found["peak_memory_gib"] == 19


# ---------------------------------------------------------------------------------------------------------------------
# DeepSpeed's monitors


def test_csv_monitor_has_the_numbers_of_each_step_once(told: dict[str, Any]) -> None:
    """And nothing of DeepSpeed's own, which counts samples that are not this program's."""
    logged = rows(told["run"])
    names = {name for name in logged[0] if name != "step" and "/" not in name}
    assert set(told["csv"]) == names
    for name in ("forget_loss", "cos_forget_retain", "lr"):
        header, *body = told["csv"][name]
        assert header == ["step", name] and [int(step) for step, _ in body] == [1, 2, 3, 4]
        assert [float(value) for _, value in body] == pytest.approx([row[name] for row in logged], rel=1e-4)


def test_tensorboard_of_deepspeed_has_each_step_once(told: dict[str, Any]) -> None:
    found = EventAccumulator(str(told["theirs"])).Reload()
    assert len(list(told["theirs"].iterdir())) == 2  # the run's, and of its resumption
    for name in ("forget_loss", "cos_forget_retain", "seconds"):
        events = found.Scalars(name)
        assert [event.step for event in events] == [1, 2, 3, 4]
        assert [event.value for event in events] == pytest.approx([row[name] for row in rows(told["run"])], rel=1e-5)


def test_rows_of_later_steps_leave_a_csv_file(tmp_path: Path) -> None:
    """From the end alone: another run may have written above. A row that a full disk cut short goes with them."""
    file = tmp_path / "lr.csv"
    file.write_bytes(b"step,lr\r\n1,0.1\r\n9,0.1\r\n2,0.2\r\n3,0.3\r\n4,0.4\r\n")
    _cut(file, 2)
    assert file.read_bytes() == b"step,lr\r\n1,0.1\r\n9,0.1\r\n2,0.2\r\n"
    file.write_bytes(b"step,lr\r\n1,0.1\r\n1")
    _cut(file, 2)
    assert file.read_bytes() == b"step,lr\r\n1,0.1\r\n"
    assert [one.name for one in tmp_path.iterdir()] == ["lr.csv"]


@pytest.mark.parametrize(
    ("monitors", "message"),
    [
        ({"comet": {"enabled": True}}, "comet_ml"),
        ({"wandb": {"enabled": True}}, "package wandb"),
        ({"csv_monitor": True}, "'csv_monitor' must hold an object"),
    ],
)
def test_a_monitor_that_cannot_work_is_refused(
    monitors: dict[str, Any], message: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # as where the package is missing
    (tmp_path / "zero.json").write_text(json.dumps(monitors))
    config = world.write(tmp_path / "run.yaml", tmp_path / "run", train={"deepspeed": str(tmp_path / "zero.json")})
    with pytest.raises(InputError, match=message):
        deepspeed_config(resolve(config))


def test_monitors_are_given_every_step_and_the_name_of_the_run(world: World, tmp_path: Path) -> None:
    given = {"comet": {"enabled": False}, "csv_monitor": {"job_name": "mine"}, "tensorboard": {}}
    (tmp_path / "zero.json").write_text(json.dumps(given))
    config = world.write(tmp_path / "run.yaml", tmp_path / "run", train={"deepspeed": str(tmp_path / "zero.json")})
    found = deepspeed_config(resolve(config))
    assert found["comet"] == {"enabled": False, "samples_log_interval": 1, "experiment_name": "run"}
    assert found["csv_monitor"] == {"job_name": "mine"} and found["tensorboard"] == {"job_name": "run"}


# ---------------------------------------------------------------------------------------------------------------------
# TensorBoard


OTHERS = {"two": "pcgrad", "three": "sum"}  # runs beside the real one, by their rules


def write_others(folder: Path, history: list[dict[str, Any]]) -> None:
    """Two runs as the program would have written them; a `sum` has no cosines. Losses tell them apart."""
    for number, (name, rule) in enumerate(OTHERS.items(), 2):
        kept = ("step", "forget_loss", "retain_loss", "seconds", "tokens_per_second", "peak_memory_bytes", "skipped")
        also = () if rule == "sum" else (*COSINES, "conflict_fraction")
        logged = [{key: row[key] for key in (*kept, *also)} for row in history]
        for row in logged:
            row["forget_loss"] *= number
        board = TensorBoardWriter(folder / name / "tensorboard", start=0)
        told = hyperparameters(resolve(folder / "one" / "config.yaml"), STEPS, "element")  # TensorBoard lists one run's
        board.begin({**told, "rule": rule, "seed": number, "method": f"ga_{rule}"})
        for step in range(1, len(logged) + 1):
            board.write(logged[:step])
        board.end(logged, results(logged))
        board.writer.close()


@pytest.fixture(scope="module")
def server(told: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A `tensorboard` that serves the runs on this machine; its address."""
    write_others(told["run"].parent, rows(told["run"]))
    port = free_port()
    line = ["tensorboard", "--logdir", str(told["run"].parent), "--host", "localhost", "--port", str(port)]
    with (tmp_path_factory.mktemp("server") / "log").open("w") as log:
        process = subprocess.Popen(line, stdout=log, stderr=log)
    address, end = f"http://localhost:{port}", time.monotonic() + 120
    try:
        while True:
            try:
                if len(session_groups(address)) == 3:
                    break
            except (OSError, KeyError):  # not there yet, or nothing read yet
                pass
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.3)
        yield address
    finally:
        process.terminate()
        process.wait(30)


def get(url: str, body: dict[str, Any] | None = None) -> Any:
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def session_groups(server: str) -> list[dict[str, Any]]:
    """The lines of finished runs under HParams, with all columns."""
    listed = get(f"{server}/data/plugin/hparams/experiment", {"experimentName": ""})
    names = [{"hparam": one["name"]} for one in listed["hparamInfos"]]
    names += [{"metric": one["name"]} for one in listed["metricInfos"]]
    asked = {"experimentName": "", "allowedStatuses": ["STATUS_SUCCESS"], "startIndex": 0, "sliceSize": 10}
    columns = {"colParams": [{**name, "includeInResult": True} for name in names]}
    return get(f"{server}/data/plugin/hparams/session_groups", asked | columns)["sessionGroups"]


RUN = "one/tensorboard"
CHARTS = ["Forget and retain loss", "Cosines and conflict fraction", "Thousand tokens a second, peak memory in GiB"]


def test_charts_hold_what_they_say_and_no_layers(server: str, told: dict[str, Any]) -> None:
    (category,) = get(f"{server}/data/plugin/custom_scalars/layout")["category"]
    assert [chart["title"] for chart in category["chart"]] == CHARTS
    drawn = []
    for chart in category["chart"]:
        for tag in chart["multiline"]["tag"]:
            query = urllib.parse.urlencode({"run": RUN, "tag": tag})
            found = get(f"{server}/data/plugin/custom_scalars/scalars?{query}")["tag_to_events"]
            assert len(found) == 1, f"{tag} is matched by {list(found)}"
            drawn += found.items()
    assert [tag for tag, _ in drawn] == [
        *("forget_loss", "retain_loss", "cos_forget_retain", "cos_combined_forget", "cos_combined_retain"),
        *("conflict_fraction", "thousand_tokens_per_second", "peak_memory_gib"),
    ]
    logged = {name: [row[name] for row in rows(told["run"])] for name in rows(told["run"])[0]}
    logged["thousand_tokens_per_second"] = [n / 1000 for n in logged["tokens_per_second"]]
    logged["peak_memory_gib"] = [n / 2**30 for n in logged["peak_memory_bytes"]]
    for tag, events in drawn:
        assert [step for _, step, _ in events] == [1, 2, 3, 4], tag  # resumed: nothing twice
        assert [value for _, _, value in events] == pytest.approx(logged[tag], rel=1e-5), tag


def test_pictures_and_histograms_of_layers(server: str) -> None:
    tags = get(f"{server}/data/plugin/images/tags")[RUN]
    assert set(tags) == {"heat_map/conflict_fraction", "heat_map/cos_forget_retain"}
    for tag in tags:
        query = urllib.parse.urlencode({"run": RUN, "tag": tag, "sample": 0})
        found = get(f"{server}/data/plugin/images/images?{query}")
        assert found[-1]["step"] == STEPS
        with urllib.request.urlopen(f"{server}/data/plugin/images/individualImage?{found[-1]['query']}") as answer:
            picture = Image.open(io.BytesIO(answer.read()))
        assert picture.width > 600 and len(picture.convert("RGB").getcolors(10**6) or []) > 20
    cosines = ("cos_forget_retain", "cos_combined_forget", "cos_combined_retain")
    assert set(get(f"{server}/data/plugin/histograms/tags")[RUN]) == {f"layers/{name}" for name in cosines}
    query = urllib.parse.urlencode({"run": RUN, "tag": "layers/cos_forget_retain"})
    assert [step for _, step, _ in get(f"{server}/data/plugin/histograms/histograms?{query}")] == [1, 2, 3, 4]


def test_hparams_list_the_run_once_with_its_results(server: str, told: dict[str, Any]) -> None:
    (group,) = [group for group in session_groups(server) if group["sessions"][0]["name"] == RUN]
    given = group["hparams"]
    assert given["rule"] == "sago" and given["scope"] == "element" and given["gamma"] == 0.5 and given["lr"] == 1e-3
    assert given["method"] == "ga_sago" and given["steps"] == STEPS and given["seed"] == 0 and given["batch_size"] == 12
    values = {one["name"]["tag"]: one["value"] for one in group["metricValues"]}
    logged = rows(told["run"])
    assert values["result/forget_loss"] == pytest.approx(logged[-1]["forget_loss"], rel=1e-5)
    assert values["result/cos_forget_retain"] == pytest.approx(np.mean([r["cos_forget_retain"] for r in logged]), 1e-5)
    assert values["result/seconds"] == pytest.approx(np.median([row["seconds"] for row in logged]), rel=1e-5)


def test_configuration_and_model_card_are_text(server: str, told: dict[str, Any]) -> None:
    for tag, file in (("configuration", "config.yaml"), ("model_card", "final/README.md")):
        query = urllib.parse.urlencode({"run": RUN, "tag": f"{tag}/text_summary", "markdown": "false"})
        (one,) = get(f"{server}/data/plugin/text/text?{query}")
        assert (told["run"] / file).read_text().strip() in html.unescape(one["text"])


EVERY = """(() => {
  const found = [], walk = root => root.querySelectorAll('*').forEach(one => {
    found.push(one);
    if (one.shadowRoot) walk(one.shadowRoot);
  });
  walk(document);
  return found;
})()"""


CELLS = f"""{EVERY}.filter(one => one.tagName == 'VAADIN-GRID-CELL-CONTENT' && one.innerText.trim())
  .map(one => [one.getBoundingClientRect(), one.innerText.trim()]).filter(([place]) => place.width)
  .map(([place, text]) => [Math.round(place.top), Math.round(place.left), text])"""
LINES = f"""new Set({EVERY}.filter(one => one.tagName == 'path' && one.getBoundingClientRect().width > 600)
  .map(one => one.getAttribute('d'))).size"""


@pytest.mark.slow  # needs a browser, which no Python package brings
def test_a_browser_draws_charts_pictures_and_a_table_of_three_runs(
    server: str, told: dict[str, Any], tmp_path: Path
) -> None:
    browser = Browser(tmp_path / "profile")
    try:
        browser.open(f"{server}/#custom_scalars")
        cards = f"{EVERY}.filter(one => one.tagName == 'TF-CUSTOM-SCALAR-MULTI-LINE-CHART-CARD')"
        browser.wait(f"{cards}.length >= 3")
        matches = f"{cards}.map(card => (card.shadowRoot.textContent.match(/Matches \\((\\d+)\\)/) || [])[1])"
        browser.wait(f'JSON.stringify({matches}) == \'["6","8","6"]\'')  # tags of three runs, one without cosines
        headings = f"{EVERY}.filter(one => one.tagName == 'TF-CARD-HEADING').map(one => one.shadowRoot)"
        titles = browser.look(f"{headings}.map(one => one.querySelector('.heading-label').textContent.trim())")
        assert titles == CHARTS
        browser.open(f"{server}/#images")
        pictures = f"{EVERY}.filter(one => one.tagName == 'IMG' && one.naturalWidth > 600)"
        browser.wait(f"{pictures}.length == 2")
        browser.open(f"{server}/#hparams")
        browser.wait(f"{CELLS}.some(cell => cell[2] == 'pcgrad')")
        table: dict[int, dict[int, str]] = {}
        for top, left, text in browser.look(CELLS):
            table.setdefault(top, {})[left] = text
        columns = {text: left for row in table.values() if "rule" in row.values() for left, text in row.items()}
        shown = [
            "forget",
            "gamma",
            "lr",
            "rule",
            "seed",
            "forget loss",
            "retain loss",
            "s a step",
            "peak GiB",
            "skipped",
        ]
        assert sorted(shown, key=columns.__getitem__) == shown and len(columns) <= len(shown) + 2
        seen = {
            row[columns["rule"]]: row for row in table.values() if columns["rule"] in row and "rule" not in row.values()
        }
        last = rows(told["run"])[-1]
        assert {rule: float(row[columns["forget loss"]]) for rule, row in seen.items()} == pytest.approx(
            {rule: number * last["forget_loss"] for number, rule in enumerate(("sago", *OTHERS.values()), 1)}, rel=1e-4
        )
        browser.look(f"{EVERY}.filter(one => one.tagName == 'PAPER-TAB')[1].click()")
        browser.wait(f"{LINES} == 3")  # parallel coordinates: one lacks no axis that is shown unasked
        assert browser.console == []
        assert len(browser.picture()) > 10_000
    finally:
        browser.close()


@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_an_event_file_that_ends_in_the_middle_of_a_record(damage: str, tmp_path: Path) -> None:
    """As a kill while it is written leaves it: a run that goes on has each step once, with its own numbers."""

    def write(start: int, steps: int, by: float) -> Path:
        board = TensorBoardWriter(tmp_path, start=start)
        for step in range(start + 1, steps + 1):
            board.write([{"step": step, "forget_loss": by * step}])
            if step == 3:  # as before a checkpoint
                board.writer.flush()
        board.writer.close()
        return max(tmp_path.iterdir(), key=lambda file: file.name)

    killed = write(0, 5, by=1.0)
    content = killed.read_bytes()
    killed.write_bytes(content[:-7] if damage == "cut" else content[:-20] + bytes(range(100, 150)))
    assert write(3, 6, by=10.0) != killed
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("forget_loss")]
    assert found == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0), (5, 50.0), (6, 60.0)]


def test_heat_map_is_red_where_tasks_conflict() -> None:
    """Two layers, two steps: the pictures' colours say which is which, and grey that there was no number."""
    history = [
        {"step": 1, "conflict_fraction/a": 0.9, "conflict_fraction/b": 0.1},
        {"step": 2},
        {"step": 3, "conflict_fraction/a": None, "conflict_fraction/b": 0.5},
    ]
    picture = heat_map(history, "conflict_fraction")
    assert picture is not None and picture.dtype == np.uint8
    height, width = picture.shape[:2]
    inside = picture[:, : int(width * 0.8)].reshape(-1, 3).astype(int)  # without the bar that explains the colours
    seen, count = np.unique(inside, axis=0, return_counts=True)
    large = [tuple(map(int, colour)) for colour in seen[count > 0.02 * height * width]]
    assert any(r > 90 and g < 30 and b < 60 for r, g, b in large)  # a, step 1
    assert any(r < 30 and g < 80 and b > 90 for r, g, b in large)  # b, step 1
    assert (204, 204, 204) in large and len(large) <= 5  # a, step 3; and near white for b
    assert heat_map(history, "cos_forget_retain") is None
