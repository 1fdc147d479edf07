"""make pictures: the dashboard's page as the README shows it, taken with a
real browser from a made-up world (page_server.py). They are PNG files in
tests/pictures/.

`tests/pictures.py --all DIRECTORY [VIEW...]` takes every view at three widths,
light and dark, whole pages: to look at, not to keep.
"""

from __future__ import annotations

import argparse
import base64
import subprocess
import shutil
import time
from pathlib import Path

import page_server
from dashboard_rig import PageDriver

FOLDER = Path(__file__).resolve().parent / "pictures"
SIZE, PHONE = (1280, 800), (390, 760)
SETTLED = """return document.fonts.ready.then(() => new Promise((done) =>
    requestAnimationFrame(() => requestAnimationFrame(() => done(true)))))"""
CHOOSE = """document.querySelector(".channels > div > .btn")?.click();
    const kind = document.querySelector(".channels form select");
    kind.value = "%s";
    kind.dispatchEvent(new Event("change"))"""


def take(browser: PageDriver, name: str, place: str, ready: str) -> None:
    """Go to a place of the page; the picture, once it is there."""
    browser.js("location.hash = arguments[0]", place)
    browser.wait(ready)
    browser.js(SETTLED)
    path = FOLDER / f"{name}.png"
    browser.shot(str(path))
    if shutil.which("pngquant"):        # a third of the size
        subprocess.run(["pngquant", "--force", "--output", str(path),
                        "--quality", "70-95", str(path)], check=False)
    print(path.relative_to(FOLDER.parent.parent))


# What to look at: name, options of the world, path, a script, a CSS selector
# of what must be there. The path may name numbers of the world.
VIEWS = [
    ("login", {}, None, "", ".login"),
    ("first-page", {"founded": False}, None, "", ".login .snippet"),
    ("jobs", {}, "jobs", "", ".row"),
    ("jobs-stale", {}, "jobs", "stream.lost = Date.now() - 60000;"
     "app.showAge()", ".stale .row"),
    ("viewer", {"well": True}, "jobs", "session.role = 'viewer'; app.open()",
     ".row"),
    ("viewer-settings", {"well": True}, "settings", "", "#stay"),
    ("menu", {}, "jobs", "document.querySelector('.why [aria-haspopup]')"
     ".click()", "#menu:popover-open"),
    ("jobs-well", {"well": True}, "jobs", "", ".row"),
    ("jobs-many", {"many": True}, "jobs", "", ".row"),
    ("jobs-empty", {"empty": True}, "jobs", "", "#main h2"),
    ("job-failed", {}, "job/{failed[id]}", "", ".list"),
    ("job-well", {"well": True}, "job/1", "", ".list"),
    ("run-failed", {}, "run/{failed[last][id]}", "", ".line"),
    ("run-colours", {}, "run/{world.colours}", "", ".line"),
    ("run-live", {}, "run/{world.live}", "", ".line"),
    ("run-quiet", {}, "run/{world.quiet}", "", ".nothing"),
    ("diff", {}, "run/{failed[last][id]}?diff", "", ".difflines"),
    ("day", {}, "day", "", ".dayrow"),
    ("day-6", {}, "day/{day}?h=6&at=3", "", "#main .day > *"),
    ("by-hand", {}, "by-hand", "", ".by-hand"),
    ("form", {}, "job/{world.every_type}/run", "", ".runform"),
    ("form-errors", {}, "job/{world.every_type}/run",
     "document.querySelector('.runform').requestSubmit()", ".error"),
    ("form-down", {}, "job/{down[id]}/run", "", ".runform .late"),
    ("confirm", {}, "job/{confirm[id]}/run",
     "document.querySelector('.runform').requestSubmit()", ".question"),
    ("alerts", {}, "alerts", "", ".channels li"),
    ("alerts-webhook", {}, "alerts", CHOOSE % "webhook", ".channels form"),
    ("alerts-smtp", {}, "alerts", CHOOSE % "smtp", ".channels form"),
    ("alerts-empty", {"empty": True}, "alerts", "", ".channels .btn"),
    ("hosts", {}, "hosts", "", "table"),
    ("check", {}, "check/{check}", "", ".snippet"),
    ("check-new", {}, "check/new", "", ".runform"),
    ("search", {}, "search?q=done", "", ".matches"),
    ("search-empty", {}, "search", "", ".empty"),
    ("audit", {}, "audit", "", "table"),
    ("settings", {}, "settings", "", ".snippet"),
    ("keys", {}, "jobs", "showShortcuts()", "dialog[open]"),
]
WIDTHS = {1440: 900, 820: 1100, 390: 780}


def look(browser, directory, server, name, path, script, ready) -> None:
    """Take one view of a world at each width and in each scheme."""
    world = server.world
    failing = [job for job in world.jobs.values() if job["failing"]]
    numbers = {
        "world": world, "failed": failing and failing[0],
        "day": time.strftime("%Y-%m-%d", time.localtime(world.now)),
        "down": next((job for job in world.jobs.values() if job["manual"] and
                      job["state"] == "unknown"), None),
        "check": next(iter(world.checks), ""), "confirm": next(
            (job for job in world.jobs.values() if job["confirm"] == "yes"),
            None)}
    for width, height in WIDTHS.items():
        browser.size(width, height)
        for scheme in ("light", "dark"):
            browser.media(prefers_color_scheme=scheme)
            if path is not None:
                browser.js("location.hash = '#/nowhere'")
                browser.visit(path.format(**numbers))
            if script:
                browser.wait(f"(() => {{ try {{ {script}; return true; }}"
                             " catch { return false; } })()")
            browser.find(ready)
            browser.js(SETTLED)
            # Groups outside the screen have no content: show all of it.
            browser.size(width, max(height, min(2400, browser.js(
                "return document.documentElement.scrollHeight"))))
            browser.js(SETTLED)
            shot = browser.command("Page.captureScreenshot")
            browser.size(width, height)
            file = directory / f"{name}-{width}-{scheme}.png"
            file.write_bytes(base64.b64decode(shot["data"]))


def look_at_all(directory: Path, wanted: list[str]) -> None:
    """Take the pictures of all views, or of those that are wanted."""
    directory.mkdir(parents=True, exist_ok=True)
    worlds = {}
    for name, options, *view in VIEWS:
        if not wanted or name in wanted:
            worlds.setdefault(str(options), (options, []))[1].append(
                (name, *view))
    with PageDriver() as browser:
        for options, views in worlds.values():
            with page_server.Server(**options) as server:
                browser.go(server.url)
                is_open = False
                for name, path, *view in views:
                    if path is not None and not is_open:
                        browser.open(server.url, page_server.PASSWORD)
                        is_open = True
                    look(browser, directory, server, name, path, *view)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", metavar="DIRECTORY", type=Path)
    parser.add_argument("views", nargs="*")
    options = parser.parse_args()
    if options.all:
        look_at_all(options.all, options.views)
    else:
        take_readme_pictures()


def take_readme_pictures() -> None:
    FOLDER.mkdir(exist_ok=True)
    with page_server.Server() as server, PageDriver() as browser:
        world = server.world
        browser.size(*SIZE)
        browser.open(server.url, page_server.PASSWORD)
        shown = "document.querySelector('main').innerText.length > 200"
        take(browser, "jobs", "#/jobs", "document.querySelector('.row')")
        take(browser, "run", f"#/run/{world.colours}",
             "document.querySelectorAll('.line, .block').length > 0")
        take(browser, "form", f"#/job/{world.every_type}/run",
             "document.querySelector('main form') !== null")
        take(browser, "day", "#/day", "document.querySelector('.dayrow')")
        browser.media(prefers_color_scheme="dark")
        take(browser, "dark", "#/jobs", shown)
        browser.media(prefers_color_scheme="light")
        browser.size(*PHONE)
        take(browser, "phone", "#/jobs", shown)


if __name__ == "__main__":
    main()
