#!/usr/bin/env python3
"""How fast the dashboard's page is: in Chromium, against a real dashboard.

    python3 tests/bench/page.py [--quick] [--only NAMES] [--koitab FILE]

Each row says what is wanted and what was measured; nothing here fails. The
processor time of the page's thread is given too, because other programs on
the machine do not lengthen it.

    wire      bytes of the page and of the state of 300 jobs, and the time
              until the state has come, over the loopback
    slow      300 jobs by a line of 1.6 Mbit/s and 150 ms, with a quarter of
              the processor: from Enter in the login to the rows
    push      300 and 3,000 jobs: first rows, nodes, memory, what each run
              that ends costs, the day, the way back and the filter
    tasks     what people do with the page: clicks, and seconds until the
              answer is to be seen, now and before (page_tasks.py)
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dashboard as server  # noqa: E402
import koi as bench  # noqa: E402
from koi import row  # noqa: E402

PASSWORD = "tzgm-4kfr-9wbd-2xhq-8mna"
RUNS_OF_JOB = 90        # as many as a run history bar has
LINE = {"offline": False, "latency": 150, "downloadThroughput": 200_000,
        "uploadThroughput": 200_000}
SLOWER = 4
# Notes when the rows of the list are drawn, and each task of over 50 ms.
WATCH_DRAWING = """
window.tasks = [];
new PerformanceObserver((list) => tasks.push(...list.getEntries().map(
  (one) => Math.round(one.duration)))).observe({type: "longtask"});
addEventListener("keydown", (event) => {
  if (event.key === "Enter") window.entered ||= performance.now();
}, true);
const look = () => {
  if (document.querySelector(".row")) {
    requestAnimationFrame(() => setTimeout(() => {
      window.drawn = performance.now();
    }));
  } else requestAnimationFrame(look);
};
requestAnimationFrame(look);
"""


class World(server.Filling):
    """Jobs on twenty hosts, each with as many runs as its bar shows; the
    passphrase of the dashboard is PASSWORD."""

    def __init__(self, jobs: int):
        super().__init__(jobs * RUNS_OF_JOB, jobs, jobs)
        self.keys = server.KOI.derive_keys(PASSWORD, bytes(16))
        self.change = 10 ** 6

    def __call__(self, db) -> None:
        super().__call__(db)
        db.execute("update dashboard set api_sha256 = ?", (
            server.KOI.sha256_hex(self.keys.api.hex()),))

    def send(self, ours, host: int, *records: str) -> None:
        """Send what a host has to say."""
        body = json.dumps(server.greeting(host, 0))[:-1] \
            + ', "records": [' + ",".join(records) + "]}"
        client = ours.client()
        client.request("POST", "/api/v1/sync", body, {
            "Authorization": f"Bearer {server.token_of_host(host)}",
            "Content-Type": "application/json"})
        reply = client.getresponse()
        if reply.status != 200:
            raise SystemExit(f"bench: {reply.status} {reply.read()!r}")
        client.close()

    def keep_up(self, ours, ended: threading.Event) -> None:
        """All hosts say that they are there, until `ended`."""
        while not ended.wait(20):
            for host in range(1, self.hosts + 1):
                self.send(ours, host)

    def end_run(self, ours, job: int, failed: bool = False) -> int:
        """A run of a job has ended; its number."""
        self.change += 1
        now = time.time()
        host = job % self.hosts + 1
        self.send(ours, host, server.RECORD % (
            self.change, self.change, job, job, job, "done", now, now - 1,
            f"{now:.3f}", str(int(failed)), now + 300))
        return self.change


class Served:
    """A dashboard with a number of jobs, whose hosts are up."""

    def __init__(self, args, folder: Path, jobs: int):
        self.world = World(jobs)
        self.dashboard = server.Dashboard(
            args, Path(tempfile.mkdtemp(dir=folder), "jobs"), self.world)
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.world.keep_up, args=(
            self.dashboard, self.ended))

    def __enter__(self):
        for host in range(1, self.world.hosts + 1):
            self.world.send(self.dashboard, host)
        self.thread.start()
        return self

    def __exit__(self, *error) -> None:
        self.ended.set()
        self.thread.join()
        self.dashboard.__exit__()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.dashboard.port}/"

    def ask(self, path: str, **headers: str):
        """(status, headers, bytes), as they come by the wire."""
        client = self.dashboard.client()
        client.request("GET", path, headers={
            "Authorization": f"Bearer {self.world.keys.api.hex()}",
            "Accept": "application/vnd.koi+json",   # as the page asks
            "Accept-Encoding": "gzip", **headers})
        reply = client.getresponse()
        found = reply.status, reply.headers, reply.read()
        client.close()
        return found


# --- wire -----------------------------------------------------------------


def wire(args, folder: Path) -> None:
    with Served(args, folder, 300) as served:
        _, headers, page = served.ask("/")
        row("wire: the page, gzip", "65,000 bytes", f"{len(page):,}",
            f"{len(gzip.decompress(page)):,} unpacked")
        again, _, body = served.ask("/", **{"If-None-Match": headers["ETag"]})
        row("wire: the page again", "304", f"{again}", f"{len(body)} bytes")
        times = []
        for _ in range(10 if args.quick else 40):
            began = time.perf_counter()
            _, _, state = served.ask("/api/v1/state")
            times.append((time.perf_counter() - began) * 1e3)
        times.sort()
        row("wire: state of 300 jobs, gzip", "200,000 bytes",
            f"{len(state):,}", f"{len(gzip.decompress(state)):,} unpacked")
        row("wire: state of 300 jobs", "100 ms",
            f"{times[len(times) // 2]:.0f}"
            " ms", f"the median; the shortest {times[0]:.0f} ms")


# --- in the browser -------------------------------------------------------


def logged_in(browser, served, slow: bool = False) -> float:
    """Log in; seconds from Enter to the rows."""
    browser.command("Page.enable")
    added = browser.command("Page.addScriptToEvaluateOnNewDocument",
                            source=WATCH_DRAWING)
    browser.go(served.url)
    browser.command("Page.removeScriptToEvaluateOnNewDocument", **added)
    browser.wait("document.activeElement.id === 'secret'", 60)
    browser.command("Input.insertText", text=PASSWORD)
    if slow:
        browser.command("Network.enable")
        browser.command("Network.emulateNetworkConditions", **LINE)
        browser.command("Emulation.setCPUThrottlingRate", rate=SLOWER)
    browser.keys("Enter")
    browser.wait("window.drawn", 120)
    if slow:
        browser.command("Emulation.setCPUThrottlingRate", rate=1)
        browser.command("Network.emulateNetworkConditions", offline=False,
                        latency=0, downloadThroughput=-1,
                        uploadThroughput=-1)
    return browser.js("return (drawn - entered) / 1000")


def slow(args, folder: Path) -> None:
    with Served(args, folder, 300) as served:
        times = []
        for _ in range(1 if args.quick else 3):
            with PageDriver() as browser:
                times.append(logged_in(browser, served, slow=True))
        row("slow: 300 jobs, Enter to rows", "3.0 s",
            f"{sorted(times)[len(times) // 2]:.2f} s", "1.6 Mbit/s, 150 ms, "
            f"processor / {SLOWER}; " + " ".join(f"{each:.2f}"
                                                 for each in times))


# Waits until two frames are drawn after something is true; milliseconds.
AFTER = """
    const [begin, ready] = [arguments[0], new Function(
      `return ${arguments[1]}`)];
    const began = performance.now();
    new Function(begin)();
    return new Promise((done) => {
      const look = () => ready() ? requestAnimationFrame(() => setTimeout(
        () => done(performance.now() - began)))
        : requestAnimationFrame(look);
      look();
    });"""


class Timing:
    """What a step in the page took: until it was drawn, on the processor,
    and its tasks of over 50 ms."""

    def __init__(self, browser):
        self.browser = browser
        self.cpu = browser.cpu_seconds()
        browser.js("tasks.length = 0")

    def step(self, begin: str, ready: str) -> str:
        took = self.browser.js(AFTER, begin, ready)
        return f"{took:.0f} ms"

    def note(self, many: int = 1) -> str:
        # The observer hears of a task when the next one begins.
        self.browser.js("return new Promise((done) => setTimeout(() => "
                        "done(true), 100))")
        tasks = self.browser.js("return tasks")
        cpu = (self.browser.cpu_seconds() - self.cpu) / many * 1e3
        return f"CPU {cpu:.0f} ms" + ("; tasks " + " ".join(
            map(str, sorted(tasks, reverse=True)[:6])) if tasks else "")


def push(args, folder: Path) -> None:
    for jobs in (300, 3000):
        with Served(args, folder, jobs) as served, PageDriver() as browser:
            took = logged_in(browser, served)
            name = f"push: {jobs:,} jobs, "
            wanted = "no task of 50 ms" if jobs > 300 else ""
            browser.command("Performance.enable", timeDomain="threadTicks")
            found = {each["name"]: each["value"] for each in browser.command(
                "Performance.getMetrics")["metrics"]}
            row(name + "Enter to rows", "", f"{took:.2f} s",
                f"{found['Nodes']:,.0f} nodes, "
                f"{found['JSHeapUsedSize'] / 2**20:.1f} MB, tasks "
                f"{browser.js('return tasks')}")
            pushed(browser, served, name, wanted, 10 if args.quick else 30)
            for what, begin, ready in (
                    ("the day", "location.hash = '#/day'",
                     "document.querySelector('.dayrow')"),
                    ("back", "history.back()",
                     "document.querySelector('.row')"),
                    ("the filter", "jobList.text.value = '--number 17'; "
                     "jobList.text.dispatchEvent(new Event('input'))",
                     "[...document.querySelectorAll('.row')].every((row) => "
                     "row.textContent.includes('--number 17'))")):
                timing = Timing(browser)
                row(name + what, "", timing.step(begin, ready), timing.note())


def pushed(browser, served, name: str, wanted: str, many: int) -> None:
    """Runs end one after the other, as they do on a calm day, and every
    fifth has failed."""
    timing, longest = Timing(browser), []
    for number in range(many):
        before = browser.js("return state.seq")
        served.world.end_run(served.dashboard, number * 7 % 290,
                             number % 5 == 4)
        browser.wait(f"state.seq > {before} && !app.waiting")
    note = timing.note(many)
    longest = browser.js("return tasks")
    row(name + "a push", wanted, f"{len(longest)} of {many} long", note)


# --- tasks ----------------------------------------------------------------


def tasks(_args, folder: Path) -> None:
    import page_tasks
    place = Path(tempfile.mkdtemp(dir=folder))
    with PageDriver() as browser, page_tasks.Scene(place, browser, ""
                                                   ) as scene:
        for task, clicks, seconds, _ in page_tasks.TASKS:
            scene.begin()
            task(scene)
            before = f"{clicks} clicks, {seconds} s" if seconds else \
                "not possible"
            row(f"tasks: {task.__name__.replace('_', ' ')}", before,
                f"{scene.clicks} clicks, " + " ".join(
                    f"{lap:.2f}" for lap in scene.laps) + " s")


# --- what was typed -------------------------------------------------------

FIGURES = {figure.__name__: figure for figure in (wire, slow, push, tasks)}
PageDriver = None


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="NAMES", help=",".join(FIGURES))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--koitab", type=Path,
                        default=server.ROOT / "koitab.py",
                        help="another koitab.py than the one at the top")
    return parser.parse_args()


def main() -> None:
    global PageDriver
    args = parsed()
    bench.ROOT = args.koitab.resolve().parent
    server.KOI = bench.koitab()
    from dashboard_rig import PageDriver
    row("figure", "wanted", "measured")
    with tempfile.TemporaryDirectory() as folder:
        for name in (args.only or ",".join(FIGURES)).split(","):
            print(f"--- {name}, load {server.loads()}", flush=True)
            FIGURES[name](args, Path(folder))


if __name__ == "__main__":
    main()
