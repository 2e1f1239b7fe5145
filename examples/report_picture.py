"""A picture of a report's rollout viewer, as Chromium shows it, at the first token that the teacher took.

python examples/report_picture.py runs/demo-switch/report.html report.png
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright


def main(report: str, picture: str) -> None:
    """Open ``report`` and write ``picture`` (PNG)."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1180, "height": 900}, device_scale_factor=1.5)
        page.goto(Path(report).resolve().as_uri())
        teacher = page.locator("#response .token.teacher")
        if teacher.count():
            teacher.first.hover()
        page.locator("#viewer").screenshot(path=picture)
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
