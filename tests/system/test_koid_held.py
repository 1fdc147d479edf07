"""koid: starts that are not made: dates in KOI_SKIP and paused jobs."""

from __future__ import annotations

import json
import signal
import subprocess

import pytest

import clockwork
import support

koitab = support.load("koitab")

HOUR, DAY = 3600, 86_400
EVE = 1_798_070_400     # 2026-12-24 00:00:00 UTC


@pytest.fixture
def clock(koi):
    return clockwork.StillClock(koi)


def rows_of(koi, job: str) -> list[tuple]:
    """Trigger, state, reason, due and count of a job's runs, oldest first."""
    return [(run["trigger"], run["state"], run["reason"], run["due"],
             run["count"]) for run in reversed(koi.history(job=job))]


def test_skipped_date_makes_one_row_with_the_number_of_its_starts(koi, clock):
    koi.tab("""\
        KOI_SKIP=2026-12-24,2026-12-26..2026-12-27
        "it" 0 * * * * echo it
        "asked" @manual echo asked
        """)
    clock.start(EVE - 1)
    for _ in range(3):
        clock.elapse_to(clock.wall // HOUR * HOUR + HOUR)
        clock.seen()
    assert rows_of(koi, "it") == [
        ("schedule", "skipped", "date in KOI_SKIP", EVE, 3)]
    assert koi.run("it")[1] == b"it\n"      # by hand it starts
    assert koi.run("asked")[1] == b"asked\n"
    koi.stop(signal.SIGKILL)
    clock.start(clock.wall + 0.5)
    clock.elapse_to(EVE + 3 * HOUR)
    clock.seen()
    assert rows_of(koi, "it")[0][-1] == 4   # the next koid counts on
    clock.elapse_to(EVE + DAY)
    assert koi.ended("it", count=3)[0]["state"] == "done"
    clock.elapse_to(EVE + 2 * DAY)
    clock.seen()
    assert rows_of(koi, "it")[-1] == (
        "schedule", "skipped", "date in KOI_SKIP", EVE + 2 * DAY, 1)


def test_starts_on_skipped_dates_are_not_missed_while_koid_is_down(koi, clock):
    koi.tab("""\
        KOI_CATCHUP=yes
        KOI_SKIP=2026-12-24..2026-12-25
        "it" 30 */6 * * * echo it
        """)
    clock.start(EVE - 20 * HOUR)
    koi.stop()
    clock.start(EVE + 2 * DAY + HOUR)
    koi.ended("it", count=4)
    assert rows_of(koi, "it")[:4] == [
        ("schedule", "missed", "koid was not running",
         EVE - 18 * HOUR + HOUR / 2, 4),
        ("schedule", "skipped", "date in KOI_SKIP", EVE + HOUR / 2, 4),
        ("schedule", "skipped", "date in KOI_SKIP", EVE + DAY + HOUR / 2, 4),
        ("catch-up", "done", "", EVE - 18 * HOUR + HOUR / 2, 1)]


def test_next_start_is_after_the_skipped_dates(koi, clock):
    koi.tab('KOI_SKIP=2026-12-24..2026-12-26\n"it" * * * * * echo it\n')
    clock.start(EVE)
    assert koi.ask("jobs")["jobs"][0]["next"] == EVE + 3 * DAY
    assert koi.ask("status")["next"] == EVE + 3 * DAY


def test_job_has_its_niceness(koi):
    koi.tab("""\
        "as koid" @manual nice
        KOI_NICE=7
        "nice" @manual nice
        """)
    koi.start()
    before = int(koi.run("as koid")[1])
    assert int(koi.run("nice")[1]) == max(before, 7)


def test_paused_job_starts_only_by_hand_until_it_is_resumed(koi, clock):
    koi.tab("""\
        "it" * * * * * echo it
        "other" * * * * * echo other
        "asked" @manual echo asked
        """)
    clock.start(EVE + 1)
    assert koi.ask("pause", job="it") == {"label": "it", "daemon": True}
    koi.ask("pause", job="asked")
    job, other, asked = koi.ask("jobs")["jobs"]
    assert (job["paused"], job["next"]) == (0, None)
    assert (other["paused"], asked["paused"]) == (None, 0)
    for minute in (1, 2):
        clock.elapse_to(EVE + minute * 60)
        koi.ended("other", count=minute)
    assert rows_of(koi, "it") == [("schedule", "skipped", "paused", EVE + 60,
                                   2)]
    assert koi.run("it")[1] == b"it\n"
    assert koi.run("asked")[1] == b"asked\n"
    koi.stop(signal.SIGKILL)
    clock.start(EVE + 3 * 60)           # the pause survives, and the count
    clock.seen()
    assert rows_of(koi, "it")[0][-1] == 3
    koi.ask("resume", job="it")
    assert koi.ask("jobs")["jobs"][0]["next"] == EVE + 4 * 60
    clock.elapse_to(EVE + 4 * 60)
    assert koi.ended("it", count=3)[0]["trigger"] == "schedule"
    with pytest.raises(koitab.Error, match="is not paused"):
        koi.ask("resume", job="it")
    with pytest.raises(koitab.Error, match="is in the past"):
        koi.ask("pause", job="it", until=EVE)


def test_renamed_job_stays_paused(koi, clock):
    koi.tab('"it" * * * * * echo it\n')
    clock.start(EVE + 1)
    koi.ask("pause", job="it")
    koi.tab('[Night]\n"other" * * * * * echo it\n')
    koi.daemon.send_signal(signal.SIGHUP)
    support.wait_until(lambda: koi.names() == ["other"], 30, "the new tab")
    assert koi.ask("jobs")["jobs"][0]["paused"] == 0
    koi.stop()
    clock.start(EVE + 1)
    assert koi.ask("jobs")["jobs"][0]["paused"] == 0
    koi.ask("resume", job="other")


def test_pause_expires_even_while_koid_is_down(koi, clock):
    koi.tab('KOI_CATCHUP=yes\n"it" 30 * * * * echo it\n')
    clock.start(EVE)
    koi.ask("pause", job="it", until=EVE + 3 * HOUR + HOUR // 2)
    assert koi.ask("jobs")["jobs"][0]["next"] == EVE + 3 * HOUR + HOUR // 2
    clock.elapse_to(EVE + HOUR // 2)
    clock.seen()
    koi.stop()
    clock.start(EVE + 6 * HOUR)
    koi.ended("it", count=3)
    assert rows_of(koi, "it") == [
        ("schedule", "skipped", "paused", EVE + HOUR / 2, 3),
        ("schedule", "missed", "koid was not running", EVE + 3.5 * HOUR, 3),
        ("catch-up", "done", "", EVE + 3.5 * HOUR, 1)]
    assert koi.ask("jobs")["jobs"][0]["paused"] is None


def test_pause_stops_retries_but_not_those_of_a_run_by_hand(koi, clock):
    koi.tab('KOI_RETRY=1\n"it" 1 0 * * * exit 3\n')
    clock.start(EVE)
    clock.elapse_to(EVE + 60)
    support.wait_until(lambda: len(koi.history()) == 2, 30, "the retry's row")
    koi.ask("pause", job="it")
    clock.elapse(10)
    clock.seen()
    assert [run["state"] for run in koi.history()] == ["skipped", "done"]
    koi.run("it")
    support.wait_until(lambda: len(koi.history()) == 4, 30, "the retry's row")
    clock.elapse(10)
    assert koi.ended(count=4)[0]["trigger"] == "retry"
    assert koi.history()[0]["state"] == "done"


def type_in(koi, *words: str, status: int = 0) -> str:
    """What a command of koitab's prints, its errors last."""
    done = subprocess.run(koi.command(*words), env={**koi.env, "TZ": "UTC0"},
                          stdin=subprocess.DEVNULL, capture_output=True,
                          text=True, check=False)
    assert done.returncode == status, done
    return done.stdout + done.stderr


def test_pause_and_resume_print_what_they_changed(koi, clock):
    koi.tab('[Night]\n"it" 0 3 * * * echo it\n')
    koi.patch += "k.Machine.local_zone = lambda machine: k.UTC\n"
    clock.start(EVE)
    assert type_in(koi, "pause", "it", "--until", "2026-12-24T12:00") == \
        "it: paused until 2026-12-24T12:00:00+00:00\n"
    assert "paused    it: paused until 2026-12-24T12:00:00+00:00\n" \
        in type_in(koi, "status")
    assert type_in(koi, "pause", "Night/it", "--until", "3d") == \
        "it: paused until 2026-12-27T00:00:00+00:00\n"
    assert type_in(koi, "pause", "it") == "it: paused\n"
    assert "paused    it: paused\n" in type_in(koi, "status")
    assert type_in(koi, "resume", "it") == "it: resumed\n"
    assert "paused" not in type_in(koi, "status")
    assert "is not paused" in type_in(koi, "resume", "it", status=1)
    assert "--until soon: not a time" in type_in(
        koi, "pause", "it", "--until", "soon", status=2)
    assert "in the past" in type_in(koi, "pause", "it", "--until", "",
                                    status=1)
    koi.stop()
    assert "koid is not running" in type_in(koi, "pause", "it", status=1)


def test_next_shows_pause_and_last_run(koi, clock):
    koi.tab("""\
        MAILTO=""
        "it" 0 3 * * * exit 3
        "new" @manual echo new
        "B" @after "it" echo b
        """)
    koi.patch += "k.Machine.local_zone = lambda machine: k.UTC\n"
    clock.start(EVE - HOUR)
    run = koi.run("it")[0]
    koi.ended("it")
    koi.ask("pause", job="it", until=EVE + 5 * HOUR)
    koi.ask("pause", job="B")
    row = koi.row(run)
    started, ended = (koitab.format_rfc3339(row[name], 0)
                      for name in ("started", "ended"))
    lines = type_in(koi, "next", "-n1").splitlines()
    assert lines[:3] == [
        "it: At 03:00", "    paused until 2026-12-24T05:00:00+00:00",
        "    2026-12-25T03:00:00+00:00 (in 28 h)"]
    assert lines[3].startswith(f"    last: {started} (")
    assert " ago): exit 3, took " in lines[3]
    assert lines[4:] == ["new: By hand", "B: After it", "    paused"]
    it, new, follower = json.loads(type_in(koi, "next", "-n1", "--json"))
    assert it["paused"] == {"until": "2026-12-24T05:00:00+00:00"}
    assert it["next"] == ["2026-12-25T03:00:00+00:00"]
    assert it["last"] == {
        "run": run, "trigger": "manual", "state": "done", "exit": 3,
        "signal": None, "count": 1, "result": "exit 3",
        "due": "2026-12-23T23:00:00+00:00", "started": started,
        "ended": ended}
    assert (new["paused"], new["last"]) == (None, None)
    assert follower["paused"] == {"until": None}
    assert json.loads(type_in(koi, "next", "it", "--utc", "--json"))[0][
        "last"]["due"] == "2026-12-23T23:00:00Z"
    assert "(in " not in type_in(koi, "next", "--from", "2027-01-01")
