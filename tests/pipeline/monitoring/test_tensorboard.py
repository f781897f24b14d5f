"""A run as TensorBoard shows it, in a real browser."""

from __future__ import annotations

import html
import io
import json
import subprocess
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

from pipeline.config.load import resolve
from pipeline.monitoring.metrics import results
from pipeline.monitoring.tensorboard import COSINES, TensorBoardWriter, heat_map
from pipeline.startup import hyperparameters
from tests.browser import Browser
from tests.distributed import free_port
from tests.pipeline.monitoring.base import STEPS, evaluate, rows

SCORES = {"one": 0.1, "two": 0.2, "three": 0.3}  # of forgetting, by run; of retention 1 minus that


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
        (folder / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in logged))
        (folder / name / "config.yaml").write_text(f"objective: {{forget: ga}}\nsynthesis: {{rule: {rule}}}\n")


@pytest.fixture(scope="module")
def server(told: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A `tensorboard` that serves the runs on this machine; its address."""
    write_others(told["run"].parent, rows(told["run"]))
    for name, score in SCORES.items():
        evaluate(told["run"].parent / name, {STEPS: score})
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
CHARTS = [
    *("Forget loss", "Retain loss", "Cosines and conflict fraction"),
    "Thousand tokens a second, peak memory in GiB",
]


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
        *("2_loss/forget_loss", "2_loss/retain_loss", "3_geometry/cos_forget_retain"),
        *("3_geometry/cos_combined_forget", "3_geometry/cos_combined_retain", "3_geometry/conflict_fraction"),
        *("4_training/thousand_tokens_per_second", "4_training/peak_memory_gib"),
    ]
    assert [len(chart["multiline"]["tag"]) for chart in category["chart"]] == [1, 1, 4, 2]  # an axis for each loss
    logged = {name: [row[name] for row in rows(told["run"])] for name in rows(told["run"])[0]}
    logged["thousand_tokens_per_second"] = [n / 1000 for n in logged["tokens_per_second"]]
    logged["peak_memory_gib"] = [n / 2**30 for n in logged["peak_memory_bytes"]]
    for tag, events in drawn:
        assert [step for _, step, _ in events] == [1, 2, 3, 4], tag  # resumed: nothing twice
        assert [value for _, _, value in events] == pytest.approx(logged[tag.partition("/")[2]], rel=1e-5), tag


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
    assert values["result/forget_score"] == pytest.approx(0.1) and values["result/retain_score"] == pytest.approx(0.9)
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
        browser.wait(f"{cards}.length >= 4")
        matches = f"{cards}.map(card => (card.shadowRoot.textContent.match(/Matches \\((\\d+)\\)/) || [])[1])"
        browser.wait(f'JSON.stringify({matches}) == \'["3","3","8","6"]\'')  # tags of three runs, one without cosines
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
            "forget score",
            "retain score",
            "forget loss",
            "retain loss",
            "s a step",
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
        return max(tmp_path.iterdir(), key=lambda file: file.stat().st_mtime_ns)

    killed = write(0, 5, by=1.0)
    content = killed.read_bytes()
    killed.write_bytes(content[:-7] if damage == "cut" else content[:-20] + bytes(range(100, 150)))
    time.sleep(1.1)  # the names of event files begin with the second: the board reads them in that order
    assert write(3, 6, by=10.0) != killed
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("2_loss/forget_loss")]
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
