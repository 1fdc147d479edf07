"""koid: starts that are not made: dates in KOI_SKIP and paused jobs."""

from __future__ import annotations

import signal

import pytest

import clockwork

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


def test_starts_on_skipped_dates_are_not_missed_while_no_koid_runs(koi,
                                                                   clock):
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
