"""What people do with the dashboard's page, done with a real browser, mouse
and keyboard, against a real dashboard and koid.

Each task counts its clicks and measures its seconds until its answer is to
be seen. tests/system/test_dashboard_tasks.py compares the clicks; the bench
of the page prints the seconds.
"""

from __future__ import annotations

import base64
import json
import time
from pathlib import Path

from dashboard_rig import (FEW_ROUNDS, HOST, HOST_TOKEN, DashboardHost,
                           DashboardProcess, PageDriver, frames,
                           spec, sync_payload)

TAB = '"Say hello" @manual echo Hello {{Name}}; sleep 0.2; echo done\n'
GOOD = "17,204 files\ndone\n"
BAD = "17,204 files\nrsync error: no space left on device\n"


def tag_of(name: str) -> str:
    """The tag of a job by its name."""
    return name.encode().hex()[:12]


class Scene:
    """A dashboard that is about to be started, a koid with a form, and a
    host without a koid: last night Files failed, and Price feed missed its
    start. `rounds` is a patch, as DashboardProcess has it."""

    def __init__(self, folder: Path, browser: PageDriver,
                 rounds: str = FEW_ROUNDS):
        sendmail = folder / "sendmail"
        sendmail.write_text("#!/bin/sh\nexec cat >/dev/null\n")
        sendmail.chmod(0o755)
        self.browser = browser
        self.dashboard = DashboardProcess(
            folder / "dashboard", rounds=rounds,
            patch=f"k.SENDMAILS = ({str(sendmail)!r},)\n")
        self.web1 = DashboardHost(folder / "web1", "web1", rounds=rounds)
        self.web1.install(TAB)
        self.web1.start()
        self.clicks, self.laps = 0, []

    def __enter__(self) -> Scene:
        return self

    def __exit__(self, *_error) -> None:
        self.web1.stop(9)
        self.web1.end_jobs()
        self.dashboard.kill()

    # --- what a person does

    def begin(self) -> None:
        """A task begins."""
        self.clicks, self.laps = 0, []
        self.began = time.monotonic()

    def lap(self) -> None:
        """An answer is to be seen."""
        self.laps.append(time.monotonic() - self.began)

    def click(self, css: str) -> None:
        self.clicks += 1
        self.browser.click(css)

    def press(self, words: str) -> None:
        self.clicks += 1
        self.browser.press(words)

    def type(self, text: str) -> None:
        """Type into the field that has the focus, and press Enter."""
        self.browser.command("Input.insertText", text=text)
        self.browser.keys("Enter")

    # --- what was before

    def last_night(self) -> None:
        """The host without a koid sends what happened. Once more, it says
        that it is still up."""
        now = time.time()
        day, night = (self.record(1, "Files", now - 90_000, GOOD),
                      self.record(2, "Files", now - 600, BAD, exit=3,
                                  line=BAD.splitlines()[-1]))
        missed = self.record(3, "Price feed", now - 300, "", state="missed",
                             started=None, ended=None, exit=None)
        specs = [spec(tag_of(name), section="Backup", name=name, label=name)
                 for name in ("Files", "Price feed")]
        self.sync(records=[day, night, missed], list={
            "mac": "e" * 64, "body": json.dumps({
                "v": 1, "dash": self.operator.dash, "host": HOST, "key":
                "0" * 16, "name": "db1", "at": 1, "jobs": specs})})
        self.sync(outputs=[
            {"run": number, "at": 0,
             "data": base64.b64encode(frames(text)).decode()}
            for number, text in ((1, GOOD), (2, BAD))])

    def sync(self, **fields) -> None:
        reply = self.dashboard.ask("POST", "/api/v1/sync", sync_payload(
            HOST, **fields), HOST_TOKEN)
        assert reply.status == 200, reply

    def record(self, number: int, name: str, at: float, text: str, **fields
               ) -> dict:
        return {"run": number, "change": number, "user": "root",
                "tag": tag_of(name), "section": "Backup",
                "name": name, "label": name, "trigger": "schedule",
                "state": "done", "due": at, "requested_at": None,
                "started": at, "ended": at + 40, "exit": 0, "signal": None,
                "reason": "", "args": {}, "attempt": 1, "count": 1,
                "bytes": len(text), "cut": False, "size": len(frames(text)),
                "next": None, "nonce": "", **fields}


def see_the_first_job(scene: Scene) -> None:
    """Two commands, the URL and the passphrase."""
    scene.dashboard.start()
    scene.operator = scene.web1.create_dashboard(scene.dashboard)
    scene.browser.go(f"{scene.dashboard.url}/#{scene.operator.dash}")
    scene.browser.wait("document.activeElement.id === 'secret'")
    scene.type(scene.operator.password)
    scene.browser.shows("Say hello", css=".jobs")
    scene.lap()
    scene.dashboard.register_host(HOST, HOST_TOKEN, scene.operator.token)


def run_a_form(scene: Scene) -> None:
    """A coworker has the bookmark of Run by hand."""
    scene.browser.visit("by-hand", ".by-hand")
    scene.begin()
    scene.click("a[aria-label='Run Say hello']")
    scene.browser.wait("document.activeElement.id === 'arg0'")
    scene.type("Ann")
    scene.browser.shows("Hello Ann", css=".pane")
    scene.lap()
    scene.browser.shows("Say hello worked", css="h1")
    scene.lap()


def see_why_a_job_failed(scene: Scene) -> None:
    """Somebody is woken at 3 am, and the list of jobs is open."""
    scene.last_night()
    scene.browser.visit("jobs", ".attention .row")
    scene.browser.shows("no space left", css=".attention")
    scene.begin()
    scene.click(".attention [href$='?diff']")
    scene.browser.shows("no space left", css=".difflines")
    scene.lap()


def see_what_did_not_run(scene: Scene) -> None:
    scene.last_night()
    scene.browser.visit("jobs", ".attention .row")
    scene.begin()
    scene.press("Day")
    scene.click("[data-state=missed]")
    scene.browser.wait("[...document.querySelectorAll('.dayrow > a')].map("
                       "(one) => one.firstChild.textContent.trim()).join() "
                       "=== 'Price feed'")
    scene.lap()


def be_silent_for_a_weekend(scene: Scene) -> None:
    """Until Monday, which is tomorrow's line on a Sunday."""
    scene.last_night()
    scene.browser.visit("jobs", ".attention .row")
    scene.begin()
    scene.click("[aria-label='Snooze Files']")
    scene.browser.wait(
        "[...document.querySelectorAll('#menu button')].some((one) => one"
        ".textContent.includes(new Date().getDay() ? 'Monday' : 'tomorrow') "
        "&& (one.id = 'monday'))")
    scene.click("#monday")
    scene.browser.shows("snoozed until", css=".attention")
    scene.lap()


def add_a_check(scene: Scene) -> None:
    """Until the line with curl is copied."""
    scene.browser.visit("jobs", ".row")
    scene.begin()
    scene.press("New check")
    scene.browser.wait("document.activeElement.matches('.runform input')")
    scene.type("Laptop backup")
    scene.browser.shows("&& curl -fsS", css="#main")
    scene.lap()
    scene.click(".snippet button")


def be_notified_by_mail(scene: Scene) -> None:
    """Until a test mail was delivered."""
    scene.browser.visit("jobs", ".row")
    scene.begin()
    scene.press("Alerts")
    scene.press("New notification\u2026")
    scene.browser.wait("document.activeElement.id === 'channel-kind'")
    scene.browser.keys("Tab")
    scene.type("ann@example.org")
    scene.browser.shows("Delivered", css=".channels")
    scene.lap()


# The task, its clicks and seconds before the page was rebuilt (None: it was
# not possible), and its clicks now. Text and Enter are not counted.
TASKS = [
    (see_the_first_job, 0, "2.2", 0), (run_a_form, 1, "1.2 2.7", 1),
    (see_why_a_job_failed, 1, "0.18", 1),
    (see_what_did_not_run, None, "", 2),
    (be_silent_for_a_weekend, None, "", 2), (add_a_check, 2, "1.0", 2),
    (be_notified_by_mail, 3, "4.0", 2)]
