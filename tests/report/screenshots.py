"""Renew the pictures of docs/reports.md: ``PYTHONPATH=tests python -m report.screenshots`` (about a minute).

The report is that of the small detector that the tests train, in FP16, with one of its made photos. The comparison's
picture is of bundles from elsewhere.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from browser import DESKTOP, PHONE, Page, browser
from PIL import Image
from support import effdeploy
from toy import RECIPE, WEIGHTS
from toy.shapes import write_coco

IMAGES = Path(__file__).parents[2] / "docs" / "images"


def main() -> None:
    """Export the bundle, open its page as at a desk and as on a phone in the dark, and write the pictures."""
    with tempfile.TemporaryDirectory() as folder, browser() as page:
        photos = write_coco(Path(folder) / "shapes", 4) / "images"
        bundle = Path(folder) / "shapes-fp16"
        done = effdeploy(
            "export", RECIPE, "--weights", WEIGHTS, "--images", photos, "--fp16", "--baseline", "eager,naive",
            "--seconds", 3, "--no-reuse", "--out", bundle,
        )  # fmt: skip
        assert done.exit_code == 0, done.stdout + done.stderr
        page.open(bundle / "report.html", DESKTOP)
        _shoot(page, "report-desktop.png", "main", "#graph", scale=0.7)
        page.open(bundle / "report.html", PHONE, dark=True)
        _shoot(page, "report-phone.png", "#parity", "#graph", scale=1)


def _shoot(page: Page, name: str, first: str, behind: str, scale: float) -> None:
    """Write what is seen from the top of one element to the top of another, in 256 colours."""
    top, bottom = (
        page.evaluate(f'document.querySelector("{element}").getBoundingClientRect().top') for element in (first, behind)
    )
    width = page.evaluate("document.documentElement.clientWidth")
    path = IMAGES / name
    page.screenshot(path, {"x": 0, "y": max(0, top - 6), "width": width, "height": bottom - top})
    with Image.open(path) as taken:
        small = taken.convert("RGB").resize((round(scale * taken.width), round(scale * taken.height)), Image.LANCZOS)
    small.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main()
