"""The program that draws the documents' picture of a terminal: it shows what a terminal would, and nothing else."""

import html
import re
import subprocess
import sys
from pathlib import Path

from pipeline.config.schema import REPOSITORY

REDRAWN = r"printf 'first\r\n\rhalf of it\rall of it \r\n'; tput cols; printf '%0119d\n' 0; test -t 2"


def test_a_picture_has_the_last_state_of_each_line_and_no_address(tmp_path: Path) -> None:
    picture = tmp_path / "terminal.svg"
    line = [sys.executable, str(REPOSITORY / "docs" / "terminal.py"), str(picture), "bash", "-c"]
    subprocess.run([*line, REDRAWN], check=True, timeout=60, capture_output=True)
    drawn = picture.read_text(encoding="utf-8")
    texts = [html.unescape(text).strip("\xa0 \n") for text in re.findall(r"<text[^>]*>(.*?)</text>", drawn, re.DOTALL)]
    rows = [text.replace("\xa0", " ") for text in texts if text][1:]  # below the title
    assert rows == ["first", "all of it", "118", "0" * 118, "0"]
    assert set(re.findall(r"https?://[^\"'\s<)]+", drawn)) == {
        "http://www.w3.org/2000/svg",
        "https://www.textualize.io",
    }
    failed = subprocess.run([*line, "exit 3"], timeout=60, capture_output=True, text=True, check=False)
    assert failed.returncode == 1 and "ended with 3; no picture was made" in failed.stderr
