"""make pictures: the dashboard's page as the README shows it, taken with a
real browser from a made-up world (page_server.py). They are PNG files in
tests/pictures/.
"""

from __future__ import annotations

import subprocess
import shutil
from pathlib import Path

import page_server
from dashboard_rig import PageDriver

FOLDER = Path(__file__).resolve().parent / "pictures"
SIZE, PHONE = (1280, 800), (390, 760)


def take(browser: PageDriver, name: str, place: str, ready: str) -> None:
    """Go to a place of the page; the picture, once it is there."""
    browser.js("location.hash = arguments[0]", place)
    browser.wait(ready)
    browser.js("return document.fonts.ready.then(() => new Promise((done) =>"
               " requestAnimationFrame(() => requestAnimationFrame(done))))")
    path = FOLDER / f"{name}.png"
    browser.shot(str(path))
    if shutil.which("pngquant"):        # a third of the size
        subprocess.run(["pngquant", "--force", "--output", str(path),
                        "--quality", "70-95", str(path)], check=False)
    print(path.relative_to(FOLDER.parent.parent))


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    with page_server.Server() as server, PageDriver() as browser:
        world = server.world
        browser.size(*SIZE)
        browser.open(server.url, page_server.PASSWORD)
        shown = "document.querySelector('main').innerText.length > 200"
        take(browser, "jobs", "#/jobs", shown)
        take(browser, "run", f"#/run/{world.colours}",
             "document.querySelectorAll('.line, .block').length > 0")
        take(browser, "form", f"#/job/{world.every_type}/run",
             "document.querySelector('main form') !== null")
        take(browser, "day", "#/day", shown)
        browser.media(prefers_color_scheme="dark")
        take(browser, "dark", "#/jobs", shown)
        browser.media(prefers_color_scheme="light")
        browser.size(*PHONE)
        take(browser, "phone", "#/jobs", shown)


if __name__ == "__main__":
    main()
