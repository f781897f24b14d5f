"""The report's page in a real browser without a window: what a reader would see wide, on a phone, and in the dark."""

import html
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from eval import report
from eval.files import exit_status
from tests.browser import program
from tests.eval.runs import make_run

pytestmark = pytest.mark.slow  # needs a browser, which no Python package brings
WIDTHS = (1280, 420)
LOOK = """
const frames = [...document.querySelectorAll('iframe')];
// The charts are unpacked and drawn after the page has loaded; a page without any is looked at as it is.
for (let tries = 0; tries < 600; tries++) {
  const pages = frames.map(frame => frame.contentDocument);
  if (pages.every(page => !page.getElementById('charts') || page.body.dataset.charts)) break;
  await new Promise(done => setTimeout(done, 100));
}
const seen = frames.map(frame => {
  const page = frame.contentDocument, root = page.documentElement;
  return {
    width: root.clientWidth, content: root.scrollWidth, height: root.scrollHeight,
    images: [...page.images].map(image => image.naturalWidth),
    hidden: [...page.querySelectorAll('.picture')].filter(picture => picture.hidden).length,
    charts: [...page.querySelectorAll('.panels > div')].map(place => {
      const drawn = place.querySelector('.main-svg');
      return [place.clientWidth, drawn ? drawn.clientWidth : 0, place.querySelectorAll('.scatterlayer .trace').length];
    }),
    legends: [...page.querySelectorAll('.legendtext')].map(entry => entry.textContent),
    broken: [...page.querySelectorAll('nav a')].filter(a => !page.querySelector(a.getAttribute('href'))).length,
    links: page.querySelectorAll('nav a').length,
    tables: [...page.querySelectorAll('table')].map(table => {
      const box = table.parentElement;
      const style = getComputedStyle(box);
      return [table.scrollWidth, box.clientWidth, style.overflowX, style.backgroundAttachment];
    }),
    text: getComputedStyle(page.body).color, paper: getComputedStyle(page.body).backgroundColor,
    loaded: frame.contentWindow.performance.getEntriesByType('resource').map(one => one.name)
      .filter(name => !name.startsWith('data:')),
  };
});
document.body.innerHTML = ''; document.body.dataset.seen = JSON.stringify(seen);
"""


@pytest.fixture(scope="module")
def browser() -> str:
    return program()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """index.html of six runs, one of them with a name that is wide and looks like a tag."""
    folder = tmp_path_factory.mktemp("page")
    runs = []
    for number, rule in enumerate(("sum", "pcgrad", "sago")):
        for seed in (0, 1):
            kept = {"acc": {"all": 0.4 + number / 20, "anatomy": 0.5}}
            exports = [{"wmdp_cyber": {"acc": {"all": x - seed / 50}}, "mmlu": kept} for x in (0.42, 0.35, 0.27)]
            name = f"{rule}-{seed}" if seed else f"{rule} <img src=x onerror=console.error(1)> {'wide' * 20}"
            logged = ("cos_forget_retain", "conflict_fraction")
            layers = {f"{key}__layers.{n}": [0.2] for key in logged for n in range(3)}
            runs.append(make_run(folder / name, exports, rule=rule, seed=seed, seconds=[1.0] * 9, **layers))
    arguments = [sys.argv[0], *map(str, runs), "--output", str(folder / "report")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        assert exit_status(report.main) == 0
    return (folder / "report" / "index.html").read_text(encoding="utf-8")


def look(browser: str, folder: Path, page: str, *options: str) -> tuple[list[dict[str, Any]], list[str]]:
    """(what is seen at each of `WIDTHS`, lines of the console) of a page, opened from a file without network."""
    frames = "".join(f'<iframe width={w} height=900 srcdoc="{html.escape(page)}"></iframe>' for w in WIDTHS)
    (folder / "frames.html").write_text(
        f"<!doctype html><body>{frames}<script>onload = async () => {{{LOOK}}}</script></body>"
    )
    line = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    line += [f"--user-data-dir={folder / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND", *options]
    line += ["--virtual-time-budget=90000"]  # else the page is read before it has drawn itself
    result = subprocess.run(
        [*line, f"file://{folder / 'frames.html'}"], capture_output=True, text=True, timeout=240, check=False
    )
    told = re.search(r'data-seen="([^"]*)"', result.stdout)
    assert told, result.stderr[-2000:]
    return json.loads(html.unescape(told[1])), [row for row in result.stderr.splitlines() if "CONSOLE" in row]


def test_wide_and_narrow(browser: str, page: str, tmp_path: Path) -> None:
    seen, console = look(browser, tmp_path, page)
    assert console == []
    assert [one["width"] for one in seen] == pytest.approx(WIDTHS, abs=20)  # less a scroll bar
    for one in seen:
        assert one["content"] <= one["width"]  # the page itself never scrolls sideways
        assert len(one["images"]) == 5 and min(one["images"]) > 500  # in the file, for a browser that draws no charts
        # Frontier, points, two losses, three cosines (the conflict fraction was logged of layers alone), two of layers:
        # each as wide as its place, none of them empty.
        assert one["hidden"] == 5 and len(one["charts"]) == 9
        wrong = [chart for chart in one["charts"] if abs(chart[0] - chart[1]) > 1 or not chart[2]]
        assert not wrong, f"[width of the place, of the drawing, lines] at {one['width']} px: {wrong}"
        assert {"sago: at the level", "the level, 0.3", "chance, 0.25"} <= {*one["legends"]}
        assert one["links"] >= 10 and one["broken"] == 0 and one["loaded"] == []
        assert all(width <= box or scroll == "auto" for width, box, scroll, _ in one["tables"])
        # A shade at the edge shows that a table goes on; its cover scrolls with the table and ends where that ends.
        assert {shade for *_, shade in one["tables"]} == {"local, scroll"}
        assert one["text"] == "rgb(28, 31, 35)" and one["paper"] == "rgb(255, 255, 255)"
    assert any(width > box for width, box, *_ in seen[1]["tables"])  # or the line above proves nothing


def test_dark(browser: str, page: str, tmp_path: Path) -> None:
    seen, console = look(browser, tmp_path, page, "--blink-settings=preferredColorScheme=0")
    assert console == [] and seen[0]["text"] == "rgb(228, 231, 235)" and seen[0]["paper"] == "rgb(21, 24, 28)"


def test_the_browser_would_tell(browser: str, tmp_path: Path) -> None:
    """The checks above can fail: a script's error, a file from elsewhere, a page that is too wide, a dead link."""
    bad = (
        '<nav><a href="#nowhere">x</a></nav><script>console.error("seen")</script><img src="http://localhost:9/x.png">'
    )
    seen, console = look(browser, tmp_path, bad + '<div style="width:2000px">wide</div>')
    assert any("seen" in row for row in console)
    assert seen[1]["content"] > seen[1]["width"] and seen[1]["broken"] == 1 and seen[1]["images"] == [0]
    assert seen[1]["loaded"] == ["http://localhost:9/x.png"]
