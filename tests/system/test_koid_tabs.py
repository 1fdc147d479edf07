"""What koid does with runs and histories when a tab changes.

What the tab says when a run starts is what runs; a job that was renamed keeps
its history; the history of a job that was removed goes after 30 days.
"""

from __future__ import annotations

import contextlib
import sqlite3

import pytest

import clockwork
import support
from support import wait_until

koitab = support.load("koitab")
EDGE = 1795343400       # 2026-11-22 10:30:00 UTC
DAY = 86_400


@pytest.fixture
def clock(koi):
    """The clock of a koid that is started with `clock.start`."""
    return clockwork.StillClock(koi)


@pytest.fixture
def gate(tmp_path):
    """A shell command that waits for `gate.touch()`."""
    class Gate:
        path = tmp_path / "gate"
        wait = f"until [ -e {tmp_path}/gate ]; do sleep 0.02; done"
    return Gate()


def install(koi, text: str) -> None:
    assert koi.ask("install", text=text)["installed"]


def change(koi, text: str | None) -> None:
    """Replace the tab, or remove it."""
    if text is None:
        assert koi.ask("remove")["removed"]
    else:
        install(koi, text)


def outcomes(koi) -> list[tuple]:
    """Trigger, state and reason of all runs, the oldest first."""
    return [(run["trigger"], run["state"], run["reason"])
            for run in reversed(koi.history())]


REMOVED = ("skipped", "the job was removed")
CHANGED = ("skipped", "the job was changed")


# ==========================================================================
# Runs that wait
# ==========================================================================

@pytest.mark.parametrize("after, how", [
    (None, REMOVED), ('KOI_RETRY=5\n* * 1 1 * echo NEW; false\n', REMOVED),
    ('KOI_RETRY=5\n"it" * * 1 1 * echo NEW; false\n', CHANGED),
    ('KOI_RETRY=5\n"it" 5 * 1 1 * echo OLD; false\n', CHANGED)])
def test_retry_of_a_removed_or_changed_job_is_dropped(koi, clock, after, how):
    koi.tab('KOI_RETRY=5\n"it" * * 1 1 * echo OLD; false\n')
    clock.start(EDGE)
    koi.run("it")
    koi.ended()         # in the transaction that adds the retry
    change(koi, after)
    assert outcomes(koi)[1:] == [("retry", *how)]
    clock.elapse(koitab.RETRY_LONGEST)
    clock.seen()
    assert len(koi.history()) == 2


@pytest.mark.parametrize("after", [None, '"it" @manual echo NEW; false\n'])
def test_run_that_fails_after_its_job_changed_has_no_retry(koi, clock, gate,
                                                           after):
    koi.tab(f'KOI_RETRY=5\n"it" @manual {gate.wait}; false\n')
    clock.start(EDGE)
    run = koi.launch("it")
    change(koi, after and f"KOI_RETRY=5\n{after}")
    gate.path.touch()
    assert koi.end_of(run)["exit"] == 1
    assert koi.unfinished() == []


def test_retry_follows_the_current_settings_of_the_tab(koi, clock, gate):
    tab = f'KOI_RETRY=5\n"it" @manual {gate.wait}; echo $A; false\n'
    koi.tab("A=old\n" + tab)
    clock.start(EDGE)
    run = koi.launch("it")
    install(koi, "A=new\n" + tab.replace("RETRY=5", "RETRY=1"))
    gate.path.touch()
    koi.end_of(run)
    clock.elapse(koitab.RETRY_FIRST)
    retry = koi.ended("it", 2)[0]
    assert (koi.text_of(run), koi.text_of(retry["run"])) == ("old\n", "new\n")
    assert koi.unfinished() == []


@pytest.mark.parametrize("after, how", [
    (None, REMOVED), ("echo NEW", CHANGED)])
def test_run_in_the_overlap_queue_is_dropped_with_its_job(koi, gate, after,
                                                          how):
    koi.tab(f'KOI_OVERLAP=queue\n"it" @manual {gate.wait}\n')
    koi.start()
    first = koi.launch("it")
    _, connection, _ = koi.follow("it")
    change(koi, after and f'KOI_OVERLAP=queue\n"it" @manual {after}\n')
    with connection:
        assert how[1].encode() in connection.recv(65_536)
    assert outcomes(koi)[1:] == [("manual", *how)]
    gate.path.touch()
    koi.end_of(first)
    assert koi.unfinished() == []


DELAYED = 'RANDOM_DELAY=1440\n"it" 30 10 * * * echo {}\n'


def test_start_due_in_the_minute_in_which_koid_starts_is_delayed(koi, clock):
    koi.tab(DELAYED.format("x"))
    clock.start(EDGE - 60)
    clock.seen()
    koi.stop()
    clock.start(EDGE + 1)
    clock.seen()
    assert outcomes(koi) == [("schedule", "queued", "")]


@pytest.mark.parametrize("after, how", [
    (None, REMOVED), (DELAYED.format("NEW"), CHANGED),
    ("A=b\n" + DELAYED.format("OLD"), ("queued", ""))])
@pytest.mark.parametrize("restart", [False, True])
def test_delayed_run_is_dropped_with_its_job(koi, clock, after, how, restart):
    """Also if koid does not run while the tab changes."""
    koi.tab(DELAYED.format("OLD"))
    clock.start(EDGE - 1)
    clock.elapse(1)
    wait_until(koi.unfinished, what="the run to wait")
    if restart:
        koi.stop()
    change(koi, after)
    if restart:
        clock.start(EDGE + 1)
    assert outcomes(koi) == [("schedule", *how)]


@pytest.mark.parametrize("nonce, why", [
    ("", ""), ("ab" * 16, "the job was changed")])
def test_request_of_a_dashboard_is_dropped_if_assignments_change(nonce, why):
    """It was signed for them; `koitab run` was not."""
    first, second = (koitab.ScheduledJob(
        koitab.parse_tab(f'A={value}\n"it" @manual echo $A\n').jobs[0],
        koitab.TabFile("/t", "alice", (), ""), 0) for value in (1, 2))
    queued = koitab.QueuedRun(first, "manual", 0.0, 0.0)
    queued.nonce = nonce
    assert tuple(map(queued.obsolete_reason, (first, second))) == ("", why)


# ==========================================================================
# Which job is which
# ==========================================================================

RENAMED = [
    # before, after, the job after that has the one run
    ('"a" @manual true\n', '"b" @manual true\n', "b"),
    ('"a" @manual true\n', '[S]\n"a" @manual true\n', "a"),
    ('"a" 1 1 1 1 * true\n', '1 1 1 1 * true\n', "true"),
    ('M=1\n1 1 1 1 * true\n',
     'M=1\n1 1 1 1 * true\nM=2\n1 1 1 1 * true\n', "1"),
    ('M=1\n1 1 1 1 * true\nM=2\n1 1 1 1 * true\n',
     'M=1\n1 1 1 1 * true\n', "1"),
]
ANEW = [
    ('"a" @manual true\n', '"b" @manual :\n'),
    ('"a" 1 1 1 1 * true\n', '"b" 2 1 1 1 * true\n'),
    ('"a" @manual true\n', 'KOI_RETRY=1\n"b" @manual true\n'),
    ('"a" @manual true\n', '"b" @manual true\n"c" @manual true\n'),
    ('"a" @manual true\n"x" @manual true\n', '"b" @manual true\n'),
    ('"a" @manual true\n', '"b" @manual true\n"a" @manual true\n'),
]


def counts(koi) -> list[int]:
    """How many runs each job of the tab has, in the order of its lines."""
    return [len(koi.history(job=job["tag"]))
            for job in koi.ask("jobs")["jobs"]]


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("before, after, name", RENAMED)
def test_renamed_job_keeps_its_history(koi, before, after, name, restart):
    koi.tab(before)
    koi.start()
    koi.run(koi.ask("jobs")["jobs"][0]["tag"])
    if restart:
        koi.stop()
    change(koi, after)
    if restart:
        koi.start()
    assert counts(koi) == [1] + [0] * (len(counts(koi)) - 1)
    assert koi.history()[0]["tag"] == koi.ask("jobs")["jobs"][0]["tag"]
    koi.run(koi.ask("jobs")["jobs"][0]["tag"])
    assert counts(koi)[0] == 2


@pytest.mark.parametrize("before, after", ANEW)
def test_new_job_begins_a_new_history(koi, before, after):
    koi.tab(before)
    koi.start()
    koi.run("a")
    change(koi, after)
    assert {job["name"]: len(koi.history(job=job["tag"]))
            for job in koi.ask("jobs")["jobs"] if job["name"] != "a"} \
        == dict.fromkeys(set(koi.names()) - {"a"}, 0)


def test_job_of_another_file_or_user_does_not_get_the_history():
    def job(user="alice", file="/t"):
        return koitab.ScheduledJob(
            koitab.parse_tab("@reboot true\n").jobs[0],
            koitab.TabFile(file, user, (), ""), 0)
    row = {"id": 1, "user": "alice", "content": job().content}
    for new, found in ((job(), 1), (job("bob"), 0), (job(file="/u"), 0)):
        assert len(koitab.find_renamed([row], [new])) == found


def test_running_and_waiting_runs_stay_with_a_renamed_job(koi, gate):
    tab = f'KOI_OVERLAP=queue\n"a" @manual {gate.wait}; echo $KOI_RUN\n'
    koi.tab(tab)
    koi.start()
    runs = [koi.launch("a") for _ in range(2)]
    install(koi, tab.replace('"a"', '"b"'))
    runs.append(koi.launch("b"))
    assert [run["state"] for run in koi.history(job="b")] == [
        "queued", "queued", "running"]
    assert koi.ask("jobs")["jobs"][0]["running"] == 1
    gate.path.touch()
    for run in runs:
        assert koi.end_of(run)["name"] == "b"
        assert koi.text_of(run) == f"{run}\n"


def test_runs_of_a_renamed_job_are_sent_again(koi):
    """So that the dashboard has them under the new name."""
    koi.tab('"a" @manual true\n')
    koi.start()
    koi.run("a"), koi.run("a")
    before = max(run["change"] for run in koi.ended(count=2))
    install(koi, '"b" @manual true\n')
    changes = [run["change"] for run in koi.history()]
    assert min(changes) > before and len(set(changes)) == 2


# ==========================================================================
# The end of a history
# ==========================================================================

def count(koi, table: str) -> int:
    with contextlib.closing(sqlite3.connect(koi.home / "history.db")) as db:
        return db.execute(f"select count(*) from {table}").fetchone()[0]


def test_history_of_a_removed_job_is_deleted_after_30_days(koi, clock):
    koi.set_constants(FORGET_AT_ONCE=2)
    kept = '"kept" @manual echo\n'
    koi.tab(kept + '"gone" @manual echo\n')
    clock.start(EDGE)
    koi.run("kept")
    for _ in range(5):
        koi.run("gone")
    koi.ended(count=6)
    install(koi, kept)
    clock.elapse(30 * DAY - 60)
    clock.seen()
    assert len(koi.history(job="gone")) == 5
    clock.elapse(DAY)
    for _ in range(8):
        clock.elapse(koitab.FORGET_PAUSE)
        clock.seen()
    assert [run["name"] for run in koi.history()] == ["kept"]
    assert [count(koi, table) for table in ("jobs", "runs", "output")] \
        == [1, 1, 1]
    install(koi, kept + '"gone" @manual echo\n')
    koi.run("gone")
    assert len(koi.history(job="gone")) == 1


def test_job_that_comes_back_in_time_keeps_its_history(koi, clock):
    koi.tab('"it" @manual echo\n')
    clock.start(EDGE)
    koi.run("it")
    koi.ended()
    koi.ask("remove")
    clock.elapse(29 * DAY)
    install(koi, '"it" @manual echo\n')
    for _ in range(3):
        clock.elapse(DAY)
        clock.seen()
    assert len(koi.history(job="it")) == 1
