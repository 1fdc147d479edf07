"""koid: jobs that start after another one has succeeded (@after)."""

from __future__ import annotations

import signal

import pytest

import clockwork
from support import wait_until

HOUR = 3600
EVE = 1_798_070_400     # 2026-12-24 00:00:00 UTC
QUIET = 'MAILTO=""\n'
# koid kills itself just before the end of a run and its follower are
# committed, or just after.
STRIKE = """
import os, signal

def strike(scheduler, *args, real=k.Scheduler.{method}):
    found = ((), (), []) if {after} else real(scheduler, *args)
    if any(queued.trigger == "after" for queued in found[2] or args[0]):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(scheduler, *args) if {after} else found

k.Scheduler.{method} = strike
"""


@pytest.fixture
def clock(koi):
    return clockwork.StillClock(koi)


def shown(koi) -> list[tuple]:
    """Name, trigger and state of all runs, oldest first."""
    return [(run["name"], run["trigger"], run["state"])
            for run in reversed(koi.history())]


def test_follower_starts_after_success_and_not_after_a_run_by_hand(koi,
                                                                   clock):
    koi.tab(QUIET + f"""\
"C" @after "B" echo c
[Night]
"A" 0 * * * * test -e {koi.folder}/ok
"B" @after "Night/A" echo {{{{To, string, you}}}}
"D" @after "A" false
"E" @after "D" echo never
""")
    clock.start(EVE + 1)
    clock.elapse_to(EVE + HOUR)
    koi.ended("A")
    assert shown(koi) == [("A", "schedule", "done")]    # it failed
    (koi.folder / "ok").touch()
    assert koi.run("A")[3]["exit"] == 0                 # by hand
    assert len(koi.history()) == 2
    clock.elapse_to(EVE + 2 * HOUR)
    found = {run["name"]: run for run in reversed(koi.ended(count=6))}
    assert sorted(shown(koi)[2:]) == [
        ("A", "schedule", "done"), ("B", "after", "done"),
        ("C", "after", "done"), ("D", "after", "done")]
    assert found["B"]["due"] == min(found["A"]["ended"], clock.wall)
    assert found["B"]["args"] == {"To": "you"}
    assert koi.text_of(found["B"]["run"]) == "you\n"
    assert koi.ask("jobs")["jobs"][0]["words"] == "After B"


def test_retry_that_succeeds_starts_the_follower_once(koi, clock):
    ok = koi.folder / "ok"
    koi.tab(QUIET + f'KOI_RETRY=1\n"A" 0 * * * * test -e {ok} || '
            f'{{ touch {ok}; exit 1; }}\n"B" @after "A" echo b\n')
    clock.start(EVE + 1)
    clock.elapse_to(EVE + HOUR)
    wait_until(lambda: len(koi.history()) == 2, 30, "the retry's row")
    clock.elapse(10)
    koi.ended(count=3)
    assert shown(koi) == [("A", "schedule", "done"), ("A", "retry", "done"),
                          ("B", "after", "done")]
    ok.unlink()
    koi.run("A")                    # its retry belongs to the run by hand
    wait_until(lambda: len(koi.history()) == 5, 30, "the retry's row")
    clock.elapse(10)
    koi.ended(count=5)
    assert [run["name"] for run in koi.history()[:2]] == ["A", "A"]


def test_run_that_a_signal_ends_starts_no_follower(koi, clock):
    koi.tab(QUIET + '"A" 0 * * * * kill -9 $$\n"B" @after "A" echo b\n')
    clock.start(EVE + 1)
    clock.elapse_to(EVE + HOUR)
    koi.ended("A")
    assert shown(koi) == [("A", "schedule", "done")]


def test_settings_of_the_follower_apply(koi, clock):
    wait = f"until test -e {koi.folder}/go; do sleep 0.01; done"
    koi.tab(QUIET + f"""\
"A" 0 * * * * true
KOI_OVERLAP=skip
"slow" @after "A" {wait}
KOI_OVERLAP=allow
"paused" @after "A" echo paused
KOI_TIMEOUT=0.1s
"long" @after "A" exec sleep 60
KOI_SKIP=2026-12-24
"date" @after "A" echo date
""")
    clock.start(EVE + 1)
    koi.ask("pause", job="paused")
    clock.elapse_to(EVE + HOUR)
    assert koi.ended("long")[0]["reason"] == "timeout after 100ms"
    clock.elapse_to(EVE + 2 * HOUR)
    koi.ended("long", count=2)
    found = {run["name"]: (run["trigger"], run["state"], run["reason"],
                           run["count"]) for run in reversed(koi.history())}
    assert found["slow"] == ("after", "skipped", "the previous run was still "
                             "running", 1)
    assert found["paused"] == ("after", "skipped", "paused", 2)
    assert found["date"] == ("after", "skipped", "date in KOI_SKIP", 2)
    (koi.folder / "go").touch()
    koi.ended("slow", count=2)


def test_follower_starts_after_a_run_that_ended_while_koid_was_down(
        koi, clock):
    wait = f"until test -e {koi.folder}/go; do sleep 0.01; done"
    koi.tab(QUIET + f'"A" 0 * * * * {wait}\n"B" @after "A" echo b\n')
    clock.start(EVE + 1)
    clock.elapse_to(EVE + HOUR)
    run = wait_until(koi.history, 30, "the run")[0]["run"]
    koi.running(run)
    koi.stop(signal.SIGKILL)
    (koi.folder / "go").touch()
    clock.start(EVE + HOUR + 600)
    koi.ended("B")
    koi.stop(signal.SIGKILL)
    clock.start(EVE + HOUR + 900)
    assert shown(koi) == [("A", "schedule", "done"), ("B", "after", "done")]


@pytest.mark.parametrize("method, after", [("record_end", False),
                                           ("start_runs", True)])
def test_follower_starts_once_if_koid_is_killed_at_the_commit(
        koi, clock, method, after):
    koi.tab(QUIET + '"A" 0 * * * * true\n"B" @after "A" echo b\n')
    before = koi.patch
    koi.patch += STRIKE.format(method=method, after=after)
    clock.start(EVE + 1)
    clock.elapse_to(EVE + HOUR)
    assert koi.daemon.wait(30) == -signal.SIGKILL
    koi.patch = before
    clock.start(EVE + HOUR + 1)
    koi.ended("B")
    koi.stop()
    clock.start(EVE + HOUR + 2)
    assert shown(koi) == [("A", "schedule", "done"), ("B", "after", "done")]


def test_follower_waits_while_the_disk_is_full(koi, clock):
    """Else a koid that is killed then would start it once more."""
    wait = f"until test -e {koi.folder}/go; do sleep 0.01; done"
    koi.tab(QUIET + f'"A" 0 * * * * {wait}\n"B" @after "A" echo b\n')
    koi.patch += f"""
import os, sqlite3
def execute(db, text, *values, real=k.Database.execute):
    if text.startswith("begin") and os.path.exists({str(koi.folder)!r} +
                                                   "/full"):
        raise sqlite3.OperationalError("database or disk is full")
    return real(db, text, *values)
k.Database.execute = execute
"""
    clock.start(EVE + 1)
    clock.elapse_to(EVE + HOUR)
    koi.running(1)
    for name in ("full", "go"):
        (koi.folder / name).touch()
    wait_until(lambda: "disk is full" in koi.problems(), 30, "the problem")
    clock.elapse(2)
    clock.seen()
    assert not (koi.home / "runs/2").exists()
    (koi.folder / "full").unlink()
    clock.elapse(6)
    clock.seen()
    clock.elapse(6)
    koi.ended("B")
    assert shown(koi) == [("A", "schedule", "done"), ("B", "after", "done")]
