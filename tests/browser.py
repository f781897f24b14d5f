"""A browser without a window, asked over its debugging pipe (Chrome DevTools Protocol): pages that draw themselves."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "chrome-headless-shell")


def program() -> str:
    """The path of a browser; without one the test is skipped."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser in the PATH ({', '.join(BROWSERS)}); apt-get install chromium")
    return found


class Browser:
    """One page. `console` holds the errors that its scripts reported."""

    def __init__(self, profile: Path, width: int = 1280, height: int = 900) -> None:
        line = [program(), "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        line += [f"--user-data-dir={profile}", f"--window-size={width},{height}"]
        # It reads commands from descriptor 3 and answers on 4.
        shell = ["bash", "-c", 'exec "$@" 3<&0 4>&1 >/dev/null 2>&1 </dev/null', "browser", *line]
        self.process = subprocess.Popen(shell, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.number = 0
        self.session: str | None = None
        self.console: list[str] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.ask("Runtime.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session is not None:
            message["sessionId"] = self.session
        self.process.stdin.write(json.dumps(message).encode() + b"\0")
        self.process.stdin.flush()
        while (answer := self._read()).get("id") != self.number:
            if answer.get("method") == "Runtime.exceptionThrown":
                self.console.append(json.dumps(answer["params"]["exceptionDetails"])[:500])
        assert "error" not in answer, answer
        return answer["result"]

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        message = bytearray()
        while (byte := self.process.stdout.read(1)) != b"\0":
            assert byte, "the browser has gone"
            message += byte
        return json.loads(message)

    def open(self, url: str) -> None:
        self.ask("Page.navigate", url="about:blank")  # or another fragment of the same page would load nothing
        self.ask("Page.navigate", url=url)

    def look(self, script: str) -> Any:
        """The value of a script's last expression."""
        answer = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, script: str, seconds: float = 120) -> Any:
        """The first true value of `script`."""
        end = time.monotonic() + seconds
        while not (value := self.look(script)):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.3)
        return value

    def picture(self) -> bytes:
        """What is seen, as a PNG."""
        return base64.b64decode(self.ask("Page.captureScreenshot", format="png")["data"])

    def close(self) -> None:
        self.ask("Browser.close")
        self.process.wait(30)
