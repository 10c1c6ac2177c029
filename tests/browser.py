"""A headless Chromium for pages of reports, over the DevTools protocol on a pair of pipes: no driver is installed."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WHY = "no Chromium on PATH (apt-get install chromium)"
PHONE, DESKTOP = (390, 844), (1280, 900)
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-quic", "--disable-extensions", "--hide-scrollbars",
    "--disable-dev-shm-usage", "--remote-debugging-pipe",
)  # fmt: skip
_SECONDS = 60
# Chromium reads from descriptor 3 and writes to 4.
_START = (
    "import fcntl, os, sys; low, high = (fcntl.fcntl(int(n), fcntl.F_DUPFD, 10) for n in sys.argv[1:3]); "
    "os.dup2(low, 3); os.dup2(high, 4); os.execv(sys.argv[3], sys.argv[3:])"
)

# Charts without size or marks, texts that overlap, marks outside of their chart, and whether the page scrolls sideways.
LOOK = """(() => {
  const boxes = (list) => [...list].map((e) => ({ e, b: e.getBoundingClientRect() }));
  const charts = [...document.querySelectorAll("svg.chart")];
  const found = { charts: charts.length, images: 0, empty: [], overlapping: [], outside: [], invisible: [] };
  for (const chart of charts) {
    const name = chart.querySelector("title").textContent, frame = chart.getBoundingClientRect();
    const marks = chart.querySelectorAll("circle, .bar, .bar-before, .dots circle");
    if (frame.width < 100 || frame.height < 20 || !marks.length) found.empty.push(name);
    const texts = boxes(chart.querySelectorAll("text")).filter((t) => t.b.width > 0);
    for (let i = 0; i < texts.length; i++) for (let j = 0; j < i; j++) {
      const [a, b] = [texts[i].b, texts[j].b];
      const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (wide > 1 && high > 3) found.overlapping.push(texts[i].e.textContent + " / " + texts[j].e.textContent);
    }
    for (const { e, b } of boxes([...marks, ...chart.querySelectorAll("text")]))
      if (b.width && (b.left < frame.left - 8 || b.right > frame.right + 8 || b.bottom > frame.bottom + 8))
        found.outside.push(name + ": " + (e.textContent || e.getAttribute("class")));
    const page = getComputedStyle(chart.closest("section")).backgroundColor;
    for (const { e } of texts)  // the number of a run stands on its filled mark
      if (getComputedStyle(e).fill === page && !e.classList.contains("spot-front-number"))
        found.invisible.push(e.textContent);
  }
  for (const image of document.images) found.images += image.complete && image.naturalWidth > 0 ? 1 : 0;
  found.pictures = document.images.length;
  found.sideways = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  return found;
})()"""


def chromium() -> str | None:
    """Return the browser's program, or ``None`` where there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Page:
    """A tab. ``problems`` are console errors, exceptions and blocked requests since the last ``open``."""

    def __init__(self, send: int, receive: int) -> None:
        self._send, self._receive = send, receive
        self._buffer, self._next, self._session = b"", 0, ""
        self.problems: list[str] = []

    def attach(self) -> None:
        """Make the tab."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def open(self, path: Path, size: tuple[int, int], *, dark: bool = False, media: str = "screen") -> None:
        """Show a file at a width and height in CSS pixels."""
        self.problems.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=size[0], height=size[1], deviceScaleFactor=1,
                  mobile=size[0] < 720)  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self.call("Page.navigate", url=path.as_uri())
        deadline = time.monotonic() + _SECONDS
        while self.evaluate("document.readyState + location.protocol") != "completefile:":
            if time.monotonic() > deadline:
                raise TimeoutError(f"{path} was not loaded in {_SECONDS} s")

    def evaluate(self, expression: str) -> Any:
        """Return the JSON value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in result:
            raise ValueError(f"{expression}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def screenshot(self, path: Path, box: dict[str, float] | None = None) -> None:
        """Write a PNG of what is seen, or of a box of the page (x, y, width, height)."""
        clip = {"clip": {**box, "scale": 1}, "captureBeyondViewport": True} if box else {}
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png", **clip)["data"]))

    def pdf(self) -> bytes:
        """Print to PDF."""
        return base64.b64decode(self.call("Page.printToPDF", printBackground=True)["data"])

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result; events on the way are looked at."""
        self._next += 1
        message = {"id": self._next, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._next:
                if "error" in answer:
                    raise ValueError(f"{method}: {answer['error']}")
                return dict(answer["result"])
            self._note(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._receive], [], [], _SECONDS)[0]:
                raise TimeoutError("Chromium does not answer")
            data = os.read(self._receive, 1 << 20)
            if not data:
                raise EOFError("Chromium ended")
            self._buffer += data
        text, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(text))

    def _note(self, event: dict[str, Any]) -> None:
        kind, about = event.get("method"), event.get("params", {})
        if kind == "Runtime.exceptionThrown":
            self.problems.append(str(about["exceptionDetails"].get("text")))
        elif kind == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning", "assert"):
            self.problems.append(str(about["args"]))
        elif kind == "Log.entryAdded" and about["entry"]["level"] in ("error", "warning"):
            self.problems.append(about["entry"]["text"])
        elif kind == "Network.requestWillBeSent" and not about["request"]["url"].startswith(("file:", "data:")):
            self.problems.append(f"request to {about['request']['url']}")


@contextlib.contextmanager
def browser() -> Iterator[Page]:
    """Start Chromium and give a tab; it ends with the block."""
    program = chromium()
    if program is None:
        raise FileNotFoundError(WHY)
    (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [program, *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
        starter = [sys.executable, "-S", "-E", "-c", _START, str(theirs_in), str(theirs_out), *command]
        process = subprocess.Popen(
            starter, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=(theirs_in, theirs_out)
        )
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            page = Page(ours_out, ours_in)
            page.attach()
            yield page
        finally:
            process.terminate()
            process.wait(20)
            os.close(ours_out)
            os.close(ours_in)


def seen(page: Page, path: Path, view: dict[str, Any]) -> dict[str, Any]:
    """Open a page and return what ``LOOK`` finds; no problem may have been told."""
    page.open(path, **view)
    found = page.evaluate(LOOK)
    assert page.problems == []
    return dict(found)


def faults(found: dict[str, Any]) -> dict[str, Any]:
    """Return what is wrong with the charts of a page."""
    return {name: found[name] for name in ("empty", "overlapping", "outside", "invisible") if found[name]}
