"""The pictures of the documents: a run's report as Chromium shows it, and the live view that the run had in a terminal.

switchkd report runs/demo-switch
python examples/report_picture.py runs/demo-switch/report.html docs/report.png

writes docs/report.png (the first answer of the report), docs/report-viewer.png (who wrote each token, and why),
docs/report-phone.png (the same on a phone) and docs/report-live.svg (the terminal, in the middle of the run).
"""

import io
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

from PIL import Image
from playwright.sync_api import Browser, sync_playwright
from rich.console import Console

from switchkd import Rollout
from switchkd.decoding.rollouts import Rollouts
from switchkd.reports.live import TrainView
from switchkd.reports.record import RunRecord


def main(report: str, picture: str) -> None:
    """Open ``report``, which lies in its run, and write ``picture`` (PNG) and three more with longer names beside it."""
    place, run = Path(picture), Path(report).resolve().parent
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        address = (run / Path(report).name).as_uri()
        first_answer(browser, address, place)
        viewer(browser, address, place.with_name(f"{place.stem}-viewer.png"))
        phone(browser, address, place.with_name(f"{place.stem}-phone.png"))
        browser.close()
    for png in place.parent.glob(f"{place.stem}*.png"):  # few colours: documents stay small
        Image.open(png).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(png, optimize=True)
    live_view(run, place.with_name(f"{place.stem}-live.svg"))


def first_answer(browser: Browser, address: str, picture: Path) -> None:
    """From the top of the page to the answers side by side."""
    page = browser.new_page(viewport={"width": 960, "height": 900})
    page.goto(address)
    box = page.locator("#answers").bounding_box()
    height = box["y"] + box["height"] if box else 900
    page.screenshot(path=picture, full_page=True, clip={"x": 0, "y": 0, "width": 960, "height": height})


def viewer(browser: Browser, address: str, picture: Path) -> None:
    """The viewer at the first token that the teacher wrote."""
    page = browser.new_page(viewport={"width": 1100, "height": 900}, device_scale_factor=1.25)
    page.goto(address)
    if (teacher := page.locator("#response .token.teacher")).count():
        teacher.first.hover()
    box = page.locator("#texts").bounding_box()
    assert box, "the report has no texts"
    top = box["y"] + page.evaluate("scrollY")  # the box is where the window shows it, and pointing has scrolled
    page.screenshot(
        path=picture, full_page=True, clip={"x": 0, "y": top, "width": 1100, "height": min(box["height"], 760)}
    )


def phone(browser: Browser, address: str, picture: Path) -> None:
    """A token that was tapped, in the dark."""
    page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark", has_touch=True)
    page.goto(address)
    if (tokens := page.locator("#response .token")).count():
        page.evaluate("document.querySelector('#response').scrollIntoView()")
        tokens.nth(tokens.count() // 4).tap()
    page.screenshot(path=picture)


def live_view(run: Path, picture: Path) -> None:
    """What a terminal of 80 columns showed in the middle of the run."""
    record = RunRecord.read(run)
    steps = record.metrics[: len(record.metrics) // 2 + 1]
    trainer = SimpleNamespace(
        step=0, progress=0.0, total_steps=len(record.metrics), pair=SimpleNamespace(tokenizer=record.tokenizer())
    )
    pictures, seconds = [], [0.0]
    view = TrainView(trainer, record.metrics.primary, pictures.append, lambda: seconds[0])  # type: ignore[arg-type]
    file = run / "rollouts.jsonl"
    texts = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for line in steps:
        trainer.step, trainer.progress = line["step"], line["step"] / len(record.metrics)
        seconds[0] += line["seconds"]
        own = [Rollout.from_json(text) for text in texts if text["step"] == line["step"]]
        view.on_step(line, Rollouts(own))
    view.on_phase("updating")
    seconds[0] += 2
    console = Console(file=io.StringIO(), record=True, width=80)
    console.print(pictures[-1])
    drawn = console.export_svg(title=f"switchkd train {record.settings['policy']['name']}")
    picture.write_text(
        re.sub(r"@font-face \{.*?\}", "", drawn, flags=re.S), encoding="utf-8"
    )  # which would ask a network


if __name__ == "__main__":
    main(*sys.argv[1:])
