"""koid when things go wrong: kills, power cuts, full disks, clocks, damage.

What holds each time: what was acknowledged is in the history, nothing was
executed twice, what koid cannot account for is called interrupted, and the
schedule continues. What a job appends to `truth` is what was executed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

import clockwork
import koid_kills
import support
from koid_kills import NOON, keep, restart, struck, truth
from support import is_alive, wait_until, wait_until_idle

koitab = support.load("koitab")
MINUTE = 60
HOUR = 60 * MINUTE
MANY = 500 if support.FULL else 256     # jobs in one minute
QUIET = 'MAILTO=""\n'
# FS_IOC_SHUTDOWN, nothing flushed: what was not synced is gone.
CUT = ("import fcntl, os, struct, sys\n"
       "fcntl.ioctl(os.open(sys.argv[1], 0), 0x8004587D, "
       "struct.pack('I', 2))\n")


def states(koi, job: str | None = None) -> list[str]:
    """Of all runs of a job, the oldest first."""
    fields = {"job": job, "limit": 1000} if job else {"limit": 1000}
    return [run["state"] for run in koi.history(**fields)][::-1]


def executed(koi, count: int = 1, seconds: float = 20) -> list[int]:
    """Return the truth, once it has `count` lines."""
    return wait_until(lambda: len(truth(koi)) >= count and truth(koi),
                      seconds, f"{count} runs\n{koi.log()}")


def refused(koi, job: str) -> str:
    """Return why a request to run a job is refused."""
    with pytest.raises(koitab.Error) as error:
        koi.launch(job)
    return error.value.message


class Gate:
    """Jobs wait at it until it opens; how many of them it does not matter."""

    def __init__(self, koi):
        import fcntl
        self.path = koi.folder / "gate"
        self.file = open(self.path, "w")
        fcntl.flock(self.file, fcntl.LOCK_EX)

    @property
    def wait(self) -> str:
        return f"flock -s {self.path} true"

    def open(self) -> None:
        self.file.close()


@pytest.fixture
def gate(koi):
    gate = Gate(koi)
    yield gate
    gate.open()


@pytest.fixture
def clock(koi):
    """The clock of a koid that is started with `clock.start`."""
    return clockwork.StillClock(koi)


# The sweep: killed at any call -----------------------------------------------


def test_koid_killed_at_any_system_call_loses_and_repeats_no_run(tmp_path):
    support.need("strace")
    most = 40 if support.FULL else 10
    seen, hits = koid_kills.kill_koid(koid_kills.Rig(tmp_path), most)
    print(f"\nkoid killed at {hits} calls: {koid_kills.counts(seen)}")
    assert hits >= most * 7 // 8 and seen["schedule done"] >= most // 2, seen


def test_run_of_a_supervisor_killed_at_any_call_is_interrupted(tmp_path):
    support.need("strace")
    most = 20 if support.FULL else 6
    seen, hits = koid_kills.kill_supervisor(koid_kills.Rig(tmp_path), most)
    print(f"\nsupervisor killed at {hits} calls: {koid_kills.counts(seen)}")
    assert hits >= most * 9 // 10 and seen["interrupted"] >= most // 2, seen


def test_stalled_supervisor_of_an_earlier_koid_does_not_repeat_a_run(tmp_path):
    support.need("strace")
    most = 8 if support.FULL else 4
    seen, hits = koid_kills.stall_supervisor(koid_kills.Rig(tmp_path), most)
    print(f"\nsupervisor stalled at {hits} calls: {koid_kills.counts(seen)}")
    assert hits == most, seen


# koid is killed --------------------------------------------------------------


def test_no_start_is_lost_if_koid_restarts_within_the_minute(koi, clock):
    koi.tab(f'{QUIET}"each" * * * * * {keep(koi)}\n')
    clock.start(NOON + 30)
    koi.stop(signal.SIGKILL)
    clock.start(NOON + MINUTE + 40)
    run, = koi.ended("each")
    assert (run["state"], run["due"]) == ("done", NOON + MINUTE)
    # Once, however often koid is killed.
    for _ in range(3):
        koi.stop(signal.SIGKILL)
        clock.start(NOON + MINUTE + 50)
    assert truth(koi) == [run["run"]] and states(koi) == ["done"]


def test_starts_due_while_koid_was_down_are_missed(koi, clock):
    koi.tab(f'{QUIET}"each" * * * * * {keep(koi)}\n'
            f'"noon" 1 12 * * * {keep(koi)}\n"late" 0 13 * * * true\n')
    clock.start(NOON + 30)
    koi.stop(signal.SIGKILL)
    clock.start(NOON + 10 * MINUTE + 20)
    koi.ended("each", 2)
    runs = {run["state"]: run for run in koi.history(job="each")}
    assert (runs["missed"]["due"], runs["missed"]["count"]) == (NOON + 60, 9)
    assert runs["missed"]["reason"] == "koid was not running"
    assert (runs["done"]["due"], truth(koi)) == (NOON + 600,
                                                 [runs["done"]["run"]])
    missed, = koi.history(job="noon")
    assert (missed["state"], missed["due"], missed["count"]) \
        == ("missed", NOON + 60, 1)
    assert koi.history(job="late") == []


@pytest.mark.parametrize("opens", ["before the restart", "after it"])
def test_running_jobs_survive_koid_and_their_results_are_kept(
        koi, gate, opens):
    count = 50 if support.FULL else 12
    koi.tab(f'{QUIET}"slow" @manual echo begun; {gate.wait}; {keep(koi)}; '
            "seq 2000; echo odd >&2; exit 3\n")
    koi.start()
    runs = [koi.launch("slow") for _ in range(count)]
    for run in runs:
        koi.running(run)
    koi.stop(signal.SIGKILL)
    if opens == "before the restart":
        gate.open()
        executed(koi, count)
    koi.start()
    gate.open()
    found = koi.ended("slow", count, seconds=60)
    assert sorted(run["run"] for run in found) == sorted(runs)
    assert {(run["state"], run["exit"]) for run in found} == {("done", 3)}
    assert Counter(truth(koi)) == Counter(runs)
    whole = "".join(f"{i}\n" for i in range(1, 2001))
    for run in runs:
        text = koi.text_of(run)
        assert text.replace("odd\n", "") == f"begun\nkept\n{whole}"
        assert text.count("odd\n") == 1
    assert os.listdir(koi.home / "runs") == []


def killed_before_its_first_fork(koi, job: str, **args: str) -> int:
    """Ask for a job of a koid that dies between the commit and the start:
    the run that it acknowledged."""
    support.need("strace")
    koi.start(wrap=struck("clone", 1))
    run = koi.launch(job, **args)
    koi.daemon.wait(20)
    assert koi.daemon.returncode == -signal.SIGKILL and truth(koi) == []
    return run


def test_run_acknowledged_before_a_kill_is_started_after_it(koi):
    koi.tab(f'{QUIET}"job" @manual echo {{{{Who}}}}; {keep(koi)}\n')
    run = killed_before_its_first_fork(koi, "job", Who="o'brien")
    for _ in range(3):
        koi.start()
        assert koi.end_of(run)["state"] == "done"
        koi.stop(signal.SIGKILL)
    assert truth(koi) == [run]
    koi.start()
    assert koi.text_of(run).startswith("o'brien\n")


def test_queued_run_with_a_secret_is_interrupted_by_a_kill_of_koid(koi):
    koi.tab(f'{QUIET}"job" @manual echo {{{{Key, secret}}}}; {keep(koi)}\n')
    run = killed_before_its_first_fork(koi, "job", Key="tomato")
    koi.start()
    assert koi.end_of(run)["state"] == "interrupted" and truth(koi) == []
    koi.stop()
    for file in koi.home.rglob("*"):
        if file.is_file():
            assert b"tomato" not in file.read_bytes(), file


@pytest.mark.parametrize("trigger, when, back, state", [
    ("schedule", "* * * * *", 50,       "done"),
    ("schedule", "* * * * *", 90,       "missed"),
    ("manual",   "@manual",   9 * MINUTE,  "done"),
    ("manual",   "@manual",   11 * MINUTE, "interrupted"),
])
def test_run_not_begun_before_a_restart_begins_soon_or_never(
        koi, clock, trigger, when, back, state):
    support.need("strace")
    koi.tab(f'{QUIET}"job" {when} {keep(koi)}\n')
    clock.start(NOON - MINUTE - 30)
    koi.stop()                  # it knows the job now
    koi.meta(seen=repr(NOON - 1.0), dials=None)
    clock.start(NOON + 1, *struck("clone", 1), wait=trigger == "manual")
    run = koi.launch("job") if trigger == "manual" else 1
    koi.daemon.wait(20)
    assert truth(koi) == []
    clock.start(NOON + 1 + back)
    assert koi.end_of(run)["state"] == state
    assert truth(koi).count(run) == (state == "done")


def test_sigterm_ends_koid_at_once_but_no_job(koi, clock, gate):
    koi.tab(f'{QUIET}"slow" @manual {gate.wait}; {keep(koi)}; exit 7\n')
    clock.start(NOON)           # a stopped clock: koid does not wait
    run = koi.launch("slow")
    job = koi.running(run).job
    assert koi.stop(signal.SIGTERM) == 0
    assert is_alive(job) and not (koi.home / "koid.sock").exists()
    clock.start(NOON)
    assert koi.row(run)["state"] == "running"
    gate.open()
    wait_until(lambda: koi.header(run).phase == koitab.ENDED, 20, "its end")
    clock.elapse(koitab.CHECK_AGAIN)
    assert (koi.end_of(run)["state"], koi.row(run)["exit"]) == ("done", 7)
    assert truth(koi) == [run]


def test_sigterm_that_arrives_with_another_signal_ends_koid(koi, clock):
    """It comes after koid has looked for signals, and before it empties the
    pipe that the signals fill to wake it."""
    file = koi.folder / "stop"
    koi.patch += f"""
import os, signal
start_queued = k.Scheduler.start_queued
def start_and_stop(self):
    start_queued(self)
    if os.path.exists({str(file)!r}):
        os.unlink({str(file)!r})
        os.kill(os.getpid(), signal.SIGTERM)
k.Scheduler.start_queued = start_and_stop
"""
    koi.tab('"job" @manual true\n')
    clock.start(NOON)           # the clock is stopped: no due time wakes koid
    file.touch()
    koi.daemon.send_signal(signal.SIGCHLD)
    assert koi.daemon.wait(30) == 0


def test_koid_stops_cleanly_while_tabs_change(koi):
    koi.tab('"job" @manual true\n')
    file = koi.home / "tabs" / koi.user
    code = ("import os, sys, time\nprint(flush=True)\n"
            "while True: os.utime(sys.argv[1]), time.sleep(0.001)\n")
    with support.stopping(subprocess.Popen(
            [koi.python, "-c", code, str(file)],
            stdout=subprocess.PIPE)) as toucher:
        toucher.stdout.readline()
        for _ in range(8 if support.FULL else 3):
            assert koi.start().stop() == 0


def test_ending_koid_has_no_active_timer(koi):
    """Python ends with the default action of SIGALRM."""
    at_exit = ("import atexit, signal\natexit.register(lambda: print('left', "
               "signal.getitimer(signal.ITIMER_REAL), file=sys.stderr))")
    koi.patch = at_exit + "\n"
    koi.tab('"job" * * * * * true\n')
    assert koi.start().stop() == 0
    assert "left (0.0, 0.0)" in koi.log()


def test_other_signals_do_not_end_koid(koi):
    koi.tab(f'"job" @manual {keep(koi)}\n')
    koi.start()
    for number in (signal.SIGHUP, signal.SIGCHLD, signal.SIGPIPE,
                   signal.SIGIO):
        for _ in range(20):
            koi.daemon.send_signal(number)
        assert koi.run("job")[3]["exit"] == 0
    assert "Traceback" not in koi.log()


def test_second_koid_is_refused_and_the_first_keeps_running(koi):
    koi.tab(f'"job" @manual {keep(koi)}\n')
    koi.start()
    second = subprocess.run(
        koi.command("daemon"), env=koi.env, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=30)
    assert second.returncode == 1 and b"already running" in second.stderr
    assert second.stderr.count(b"\n") == 2     # an error and its hint
    assert koi.run("job")[3]["exit"] == 0
    assert koi.ask("status")["pid"] == koi.daemon.pid


# A supervisor is killed, or koid sleeps --------------------------------------


def test_supervisor_ignores_signals_until_its_job_ends(koi, gate):
    # As systemd does to all of a unit, or a logout.
    koi.tab(f'{QUIET}"slow" @manual {gate.wait}; {keep(koi)}; exit 3\n')
    koi.start()
    runs = [koi.launch("slow") for _ in range(4)]
    for run, number in zip(runs, (signal.SIGTERM, signal.SIGINT,
                                  signal.SIGHUP, signal.SIGPIPE)):
        os.kill(koi.running(run).supervisor, number)
    gate.open()
    for run in runs:
        assert koi.end_of(run)["exit"] == 3 and koi.text_of(run) == "kept\n"


@pytest.mark.parametrize("killed", ["supervisor", "both"])
def test_a_killed_supervisor_leaves_its_output_and_is_not_replaced(
        koi, gate, killed):
    koi.tab(f'{QUIET}KOI_RETRY=3\n"slow" @manual {keep(koi)}; echo half; '
            f"{gate.wait}; echo rest\n")
    koi.start()
    run = koi.launch("slow")
    found = koi.running(run)
    wait_until(lambda: b"half" in (koi.home / "runs" / str(run)).read_bytes(),
               20, "its output")
    if killed == "both":
        koi.stop(signal.SIGKILL)
    os.kill(found.supervisor, signal.SIGKILL)
    if killed == "both":
        koi.start()
    ended = koi.end_of(run)
    assert (ended["state"], ended["exit"]) == ("interrupted", None)
    assert koi.text_of(run) == "kept\nhalf\n"
    gate.open()
    wait_until(lambda: not is_alive(found.job), 20, "the job")
    assert truth(koi) == [run] and states(koi) == ["interrupted"]


def test_koid_starts_cleanly_after_all_supervisors_and_koid_were_killed(
        koi, gate):
    koi.tab(f'{QUIET}"slow" @manual {keep(koi)}; {gate.wait}\n'
            '"quick" @manual exit 4\n')
    koi.start()
    runs = [koi.launch("slow") for _ in range(10)]
    found = [koi.running(run) for run in runs]
    executed(koi, 10)
    for pid in [koi.daemon.pid, *(each.supervisor for each in found)]:
        os.kill(pid, signal.SIGKILL)
    koi.daemon.wait()
    koi.start()
    ended = koi.ended("slow", 10)
    assert {run["state"] for run in ended} == {"interrupted"}
    assert koi.run("quick")[3]["exit"] == 4
    assert Counter(truth(koi)) == Counter(runs)
    wait_until(lambda: not os.listdir(koi.home / "runs"), 20, "no files")


def test_koid_continues_normally_after_sigstop_and_sigcont(koi, gate):
    koi.tab(f'{QUIET}"slow" @manual {gate.wait}; exit 5\n'
            f'"quick" @manual {keep(koi)}\n')
    koi.start()
    run = koi.launch("slow")
    job = koi.running(run).job
    koi.daemon.send_signal(signal.SIGSTOP)
    wait_until(lambda: support.process_state(koi.daemon.pid) == "T", 20,
               "its stop")
    gate.open()
    wait_until(lambda: not is_alive(job), 20, "the job")
    caller = socket.socket(socket.AF_UNIX)
    with caller:
        caller.connect(str(koi.home / "koid.sock"))
        caller.sendall(b'{"op": "run", "job": "quick"}\n')
        assert truth(koi) == []
        koi.daemon.send_signal(signal.SIGCONT)
        assert (koi.end_of(run)["state"], koi.row(run)["exit"]) == ("done", 5)
        executed(koi)
    wait_until(lambda: sorted(states(koi)) == ["done", "done"], 20, "both")
    assert len(truth(koi)) == 1


# Clocks ----------------------------------------------------------------------


def starts(koi, job: str) -> list[tuple]:
    """(state, minutes after noon, count) of each start, in order."""
    return [(run["state"], (run["due"] - NOON) / 60, run["count"])
            for run in koi.history(job=job)][::-1]


def test_starts_during_a_suspend_of_eight_hours_are_recorded_as_missed(
        koi, clock):
    # At the wake-up the wall clock has advanced, and the ticks have not.
    koi.tab(f'{QUIET}"hourly" 0 * * * * {keep(koi)}\n'
            f'"daily" 0 15 * * * {keep(koi)}\n'
            f'"five" */5 * * * * {keep(koi)}\n')
    clock.start(NOON + 30)
    koi.daemon.send_signal(signal.SIGSTOP)
    clock.shift(8 * HOUR)
    koi.daemon.send_signal(signal.SIGCONT)
    clock.seen()
    for minute in range(1, 7):
        clock.elapse_to(NOON + 8 * HOUR + minute * MINUTE)
        clock.seen()
    koi.ended("five", 2)
    assert starts(koi, "daily") == [("missed", 180, 1)]
    assert starts(koi, "hourly") == [("missed", 60, 8)]
    assert starts(koi, "five") == [("missed", 5, 96), ("done", 485, 1)]
    assert len(executed(koi)) == 1


def test_start_skipped_by_a_clock_jump_is_caught_up_once(koi, clock):
    koi.tab(f'{QUIET}KOI_CATCHUP=yes\n"daily" 0 15 * * * {keep(koi)}\n')
    clock.start(NOON + 30)
    clock.shift(8 * HOUR)
    clock.seen()
    clock.elapse_to(NOON + 8 * HOUR + MINUTE)
    wait_until(lambda: "done" in states(koi), 20, "its end")
    for _ in range(20):
        clock.seen()
        clock.elapse(1)
    assert sorted(states(koi)) == ["done", "missed"]
    assert len(truth(koi)) == 1


def test_clock_set_forward_an_hour_makes_each_fixed_start_once(koi, clock):
    koi.tab(f'{QUIET}"five" */5 * * * * {keep(koi)}\n'
            f'"half" 30 12 * * * {keep(koi)}\n')
    clock.start(NOON + 30)
    clock.shift(HOUR)
    clock.seen()
    for minute in range(1, 12):
        clock.elapse_to(NOON + HOUR + minute * MINUTE)
        clock.seen()
    # A fixed time that was skipped is made up for, once; */5 is not.
    koi.ended("five", 2)
    koi.ended("half")
    assert [count for *_, count in starts(koi, "half")] == [1]
    assert states(koi, "half") == ["done"]
    assert starts(koi, "five") == [("done", 65, 1), ("done", 70, 1)]
    assert len(truth(koi)) == 3 and koi.problems() == ""


def test_clock_set_back_an_hour_repeats_no_fixed_start(koi, clock):
    koi.tab(f'{QUIET}"each" * * * * * {keep(koi)}\n'
            f'"half" 30 11 * * * {keep(koi)}\n')
    clock.start(NOON - 31 * MINUTE + 30)
    clock.elapse_to(NOON - 30 * MINUTE)
    koi.ended("half")
    clock.shift(-HOUR)
    clock.seen()
    for minute in range(-89, -25):
        clock.elapse_to(NOON + minute * MINUTE)
        clock.seen()
    wait_until(lambda: states(koi, "each").count("done") >= 64, 20, "64")
    assert states(koi, "half") == ["done"]
    wait_until_idle(koi.daemon.pid)     # it does not spin
    assert clock.sleep() == MINUTE


def test_clock_set_ten_years_forward_and_back_blocks_no_job(koi, clock):
    koi.tab(f'{QUIET}"each" * * * * * {keep(koi)}\n"hand" @manual true\n')
    years = 3653 * 24 * HOUR
    clock.start(NOON + 30)
    for wall, jump in ((NOON + years, years), (NOON + 4 * MINUTE, -years)):
        clock.shift(jump)
        clock.seen()
        for minute in range(1, 5):
            clock.elapse_to(wall + minute * MINUTE)
            clock.seen()
    koi.ended("each", 2)
    found = Counter(run["due"] for run in koi.history(job="each")
                    if run["state"] != "missed")
    assert max(found.values()) == 1
    assert NOON + 8 * MINUTE in found and NOON + years + 180 in found
    assert koi.run("hand")[3]["exit"] == 0 and koi.problems() == ""
    # A koid that comes in between waits a few minutes, and not ten years.
    koi.stop()
    koi.meta(seen=repr(float(NOON + years)))
    clock.start(NOON + 10 * MINUTE)
    assert "clock" in refused(koi, "hand") and "clock" in koi.problems()
    clock.elapse(5 * MINUTE)
    clock.seen()
    clock.elapse(MINUTE)
    assert koi.run("hand")[3]["exit"] == 0
    wait_until(lambda: koi.history(job="each")[0]["due"]
               == NOON + 16 * MINUTE, 20, "the next minute")


SPRING, AUTUMN = 1_774_746_000, 1_792_890_000       # 01:00 UTC


@pytest.mark.parametrize("begin, minutes, when, count", [
    (SPRING - 120, 40, "30 2 * * *", 1),
    (SPRING - 120, 40, "0 * * * *",  1),
    (AUTUMN - 3720, 130, "30 2 * * *", 1),
    (AUTUMN - 3720, 130, "0 * * * *", 3),
    (AUTUMN - 3720, 130, "*/30 2 * * *", 4),
])
def test_changes_of_daylight_saving_time_make_one_start(
        koi, clock, begin, minutes, when, count):
    support.need_zone("Europe/Berlin")
    koi.tab(f'{QUIET}"job" {when} {keep(koi)}\n')
    clock.start(begin + 30, TZ="Europe/Berlin")
    for minute in range(1, minutes):
        clock.elapse_to(begin + minute * MINUTE)
        clock.seen()
    koi.ended("job", count)
    assert states(koi, "job") == ["done"] * count
    assert len(truth(koi)) == count


def test_koid_booted_with_a_clock_of_1970_waits_until_the_clock_is_set(
        koi, clock):
    koi.tab(f'{QUIET}"each" * * * * * {keep(koi)}\n'
            f'"boot" @reboot {keep(koi)}\n"hand" @manual true\n')
    clock.start(90)
    assert "clock is not set" in koi.problems()
    assert "clock" in refused(koi, "hand")
    assert truth(koi) == [] and koi.history() == []
    clock.set(NOON + 58)
    koi.ended("boot")
    clock.elapse_to(NOON + MINUTE)
    koi.ended("each")
    assert koi.problems() == ""
    assert [run["due"] for run in koi.history(job="each")] == [NOON + 60]
    assert koi.run("hand")[3]["exit"] == 0


def test_clock_that_is_never_set_is_accepted_after_the_wait(koi, clock):
    koi.tab(f'{QUIET}"each" * * * * * {keep(koi)}\n"hand" @manual true\n')
    clock.start(90)
    assert "clock" in refused(koi, "hand")
    clock.elapse(5 * MINUTE + 1)
    wait_until(lambda: "not set; running jobs" in koi.problems(), 10,
               "a warning")
    clock.elapse(MINUTE)
    koi.ended("each")
    assert koi.run("hand")[3]["exit"] == 0


def test_starts_missed_before_a_boot_in_1970_are_recorded_once_it_is_set(
        koi, clock):
    koi.tab(f'{QUIET}"noon" 1 12 * * * {keep(koi)}\nKOI_CATCHUP=yes\n'
            f'"again" 2 12 * * * {keep(koi)}\n')
    clock.start(NOON + 30)
    koi.stop(signal.SIGKILL)
    clock.start(90)
    assert "clock is not set" in koi.problems()
    clock.set(NOON + HOUR)
    wait_until(lambda: koi.history(job="noon"), 10,
               f"what was missed\n{koi.log()}")
    assert states(koi, "noon") == ["missed"]
    koi.ended("again", 2)
    assert sorted(run["trigger"] for run in koi.history(job="again")) \
        == ["catch-up", "schedule"]


@support.root_only
def test_changed_zone_file_is_reloaded(koi, tmp_path):
    support.need("unshare")
    support.need_zone("Europe/Berlin")
    support.need_zone("Asia/Tokyo")
    etc = tmp_path / "etc"
    shutil.copytree("/etc", etc, symlinks=True,
                    ignore=shutil.ignore_patterns("ssl", "ca-certificates"))

    def live_in(zone: str) -> None:
        new = etc / "localtime.new"
        new.symlink_to(f"/usr/share/zoneinfo/{zone}")
        new.rename(etc / "localtime")

    koi.host = support.Host(tmp_path / "host")
    koi.host.binds = [(str(etc), "/etc")]
    koi.tab(f'{QUIET}"noon" 0 12 * * * {keep(koi)}\n')
    live_in("Europe/Berlin")
    koi.start()

    def noon() -> str:
        due = koi.ask("jobs")["jobs"][0]["next"]
        return time.strftime("%H:%M", time.gmtime(due))

    assert noon() in ("10:00", "11:00")
    live_in("Asia/Tokyo")
    wait_until(lambda: noon() == "03:00", 10, "the new zone")


def test_impossible_dates_do_not_delay_other_jobs(koi, clock):
    never = ["0 0 31 4,6,9,11 *", "0 0 30 2 *", "* * 31 2 *"]
    koi.tab(QUIET + "".join(
        f'"never {n}" {when} {keep(koi)}\n' for n, when in enumerate(never))
        + f'"leap" 0 0 29 2 * true\n"each" * * * * * {keep(koi)}\n')
    clock.start(NOON + 58)
    jobs = {job["name"]: job["next"] for job in koi.ask("jobs")["jobs"]}
    assert [jobs[f"never {n}"] for n in range(3)] == [None] * 3
    assert jobs["leap"] == 1_835_395_200        # 2028-02-29
    clock.elapse_to(NOON + 60)
    koi.ended("each")
    assert len(truth(koi)) == 1


# Full disks and power cuts ---------------------------------------------------


def starts_nothing(koi) -> None:
    """What koid was to start when it came has been started by its first
    answer, as a child of koid's, and has ended."""
    koi.ask("status")
    wait_until(lambda: not support.children_of(koi.daemon.pid), 20,
               "a second start to end")
    koi.ask("status")


class Disk:
    """A file system of the test's own, with koid's home, in a mount
    namespace that lives as long as the test."""

    def __init__(self, koi, mount: str, more: str = "true"):
        self.koi, self.mount = koi, mount
        self.place = koi.folder / "disk"
        self.place.mkdir()
        self.holder = subprocess.Popen(
            ["unshare", "-m", "sh", "-c",
             f"{mount} && {more} && echo && exec sleep 900"],
            stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
        if not self.holder.stdout.readline():
            support.absent(f"cannot mount here: {mount}")
        koi.host = self
        koi.env["KOI_HOME"] = f"{self.place}/koi"
        koi.home = Path(f"/proc/{self.holder.pid}/root{self.place}/koi")
        for path in (koi.home, koi.home / "tabs"):
            path.mkdir(mode=0o700)

    def command(self, command: list[str]) -> list[str]:
        return ["nsenter", "-r", "-m", "-t", str(self.holder.pid), *command]

    def run(self, *command: str) -> int:
        return subprocess.run(self.command(list(command)), timeout=60,
                              stdin=subprocess.DEVNULL).returncode

    def fill(self, leave: int = 0) -> None:
        """Leave no room, or so many bytes."""
        filler = self.koi.home.parent / "filler"
        with contextlib.suppress(OSError):
            with open(filler, "ab", buffering=0) as file:
                while True:
                    file.write(b"x" * 4096)
        if leave:
            os.truncate(filler, filler.stat().st_size - leave)

    def free(self) -> None:
        (self.koi.home.parent / "filler").unlink()

    def cut(self) -> None:
        """Take the power away: what was not synced is lost. Nobody may be
        writing: a process in fsync can hang in the kernel after this, and
        keep the file system from being unmounted. What is killed first
        leaves the same bytes on the disk."""
        assert self.run(self.koi.python, "-c", CUT, str(self.place)) == 0

    def back(self) -> None:
        """Mount it again: the journal is replayed."""
        wait_until(lambda: self.run("umount", "-q", str(self.place)) == 0,
                   20, "umount")
        assert self.run("sh", "-c", self.mount) == 0


@pytest.fixture
def tiny(koi):
    """koid's home on a disk that is soon full."""
    support.need("unshare", "nsenter")
    disk = Disk(koi, f"mount -t tmpfs -o size=1m,mode=755 tmpfs "
                f"{koi.folder}/disk")
    with support.stopping(disk.holder):
        yield disk
        koi.stop(signal.SIGKILL)
        koi.end_jobs()


BOOT_ID = "/proc/sys/kernel/random/boot_id"


@pytest.fixture
def ext4(koi):
    """koid's home on a disk whose power can be cut; after it there is
    another boot."""
    support.need("unshare", "nsenter", "mkfs.ext4")
    image, boot = koi.folder / "image", koi.folder / "boot_id"
    boot.write_text("first\n")
    disk = Disk(koi, f"{{ [ -e {image} ] || {{ truncate -s 32M {image} && "
                f"mkfs.ext4 -q -F {image}; }}; }} && mount -o "
                f"loop,commit=600 {image} {koi.folder}/disk",
                f"mount --bind {boot} {BOOT_ID}")
    disk.boot = boot
    disk.run("sync")
    with support.stopping(disk.holder):
        yield disk
        koi.stop(signal.SIGKILL)
        koi.end_jobs()
        disk.run("umount", str(disk.place))


@support.root_only
def test_jobs_run_on_a_full_disk_and_the_history_is_complete_afterwards(
        koi, clock, tiny):
    koi.tab(f'{QUIET}"each" * * * * * {keep(koi)}; exit 3\n'
            f'"hand" @manual {keep(koi)}\n')
    clock.start(NOON + 30)
    tiny.fill()
    for minute in (1, 2, 3):
        clock.elapse_to(NOON + minute * MINUTE)
        executed(koi, minute)
    why = refused(koi, "hand")
    assert "cannot be recorded" in why and "full" in why
    assert "full" in koi.problems() and len(truth(koi)) == 3
    tiny.free()
    clock.elapse(6)
    found = koi.ended("each", 3)
    assert {(run["state"], run["exit"]) for run in found} == {("done", 3)}
    assert [run["due"] for run in found] == [
        NOON + minute * MINUTE for minute in (3, 2, 1)]
    assert sorted(run["run"] for run in found) == sorted(truth(koi))
    assert koi.run("hand")[3]["exit"] == 0
    assert koi.problems() == ""


@support.root_only
def test_job_running_while_the_disk_fills_keeps_its_exit_status(
        koi, gate, tiny):
    koi.tab(f'{QUIET}"slow" @manual echo begun; {gate.wait}; {keep(koi)}; '
            "seq 200000; exit 6\n")
    koi.start()
    run = koi.launch("slow")
    koi.running(run)
    tiny.fill(leave=16_384)
    gate.open()
    executed(koi)
    wait_until(lambda: not os.listdir(koi.home / "runs")
               or koitab.parse_header((koi.home / "runs" / str(run))
                                      .read_bytes()).phase == koitab.ENDED, 20,
               "its end")
    tiny.free()
    ended = koi.end_of(run)
    assert (ended["state"], ended["exit"], ended["cut"]) == ("done", 6, True)
    assert ended["bytes"] > 1_000_000
    assert koi.text_of(run).startswith("begun\n")
    assert "left out" in koi.text_of(run)


@support.root_only
def test_run_without_a_file_begins_once_though_koid_is_killed_before_it(
        koi, tiny):
    """koid is frozen as soon as it has forked the supervisor."""
    koi.tab(f'{QUIET}"quick" @manual {keep(koi)}\n')
    koi.start()
    fillers = fill_inodes(koi, tiny)
    request = threading.Thread(target=launch_or_fail, args=(koi, "quick"))
    request.start()
    freeze_at_a_child(koi.daemon.pid)
    koi.stop(signal.SIGKILL)
    request.join()
    shutil.rmtree(fillers)
    koi.start()
    executed(koi)
    wait_until(lambda: "running" not in states(koi), 20, "its end")
    assert len(truth(koi)) == 1


def launch_or_fail(koi, job: str) -> None:
    with contextlib.suppress(koitab.Error, OSError):
        koi.launch(job)


def freeze_at_a_child(pid: int) -> None:
    """Send SIGSTOP to koid when it has a child, and wait until the child
    waits for koid, or for the job."""
    while not (children := support.children_of(pid)):
        pass
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: support.process_state(children[0]) in ("S", ""), 20,
               "the supervisor to wait")


def fill_inodes(koi, disk: Disk) -> Path:
    """Leave no inode: the history can still be written. Return the directory
    of what takes them."""
    fillers = koi.home.parent / "fillers"
    fillers.mkdir()
    assert disk.run("mount", "-o", "remount,nr_inodes=40",
                    str(disk.place)) == 0
    with contextlib.suppress(OSError):
        for name in range(100):
            (fillers / str(name)).touch()
    return fillers


@support.root_only
def test_run_whose_file_cannot_be_created_is_not_started_again(
        koi, gate, tiny):
    koi.tab(f'{QUIET}"slow" @manual {keep(koi)}; {gate.wait}\n')
    koi.start()
    fillers = fill_inodes(koi, tiny)
    try:
        koi.launch("slow")
    except koitab.Error:
        pass                    # refused is good, too
    else:
        executed(koi)
    before = truth(koi)
    koi.stop(signal.SIGKILL)
    shutil.rmtree(fillers)
    koi.start()
    starts_nothing(koi)
    assert truth(koi) == before
    gate.open()
    wait_until(lambda: "running" not in states(koi), 20, "its end")
    assert truth(koi) == before


@support.root_only
def test_restart_while_the_disk_is_full_loses_no_run(koi, clock, tiny):
    koi.tab(f'{QUIET}"each" * * * * * {keep(koi)}\n')
    clock.start(NOON + 30)
    tiny.fill(leave=8192)       # room for a run's file, not for the history
    clock.elapse_to(NOON + MINUTE)
    run, = executed(koi)
    wait_until(lambda: not (header := koi.header(run))
               or header.phase == koitab.ENDED, 20, "its end")
    koi.stop()
    tiny.free()
    clock.start(NOON + 5 * MINUTE + 20)
    wait_until(lambda: any(found["run"] == run and found["state"] in (
        "done", "interrupted") for found in koi.history()), 10,
        f"run {run} in {koi.history()}")


@support.root_only
def test_koid_on_a_read_only_disk_ends_with_an_error(koi, tiny):
    koi.tab(f'{QUIET}"job" @manual {keep(koi)}\n')
    koi.start()
    assert koi.run("job")[3]["exit"] == 0
    koi.stop()
    assert tiny.run("mount", "-o", "remount,ro", str(tiny.place)) == 0
    assert koi.spawn().wait(20) == 1
    assert "Read-only" in koi.log() and "Traceback" not in koi.log()
    assert tiny.run("mount", "-o", "remount,rw", str(tiny.place)) == 0
    koi.start()
    assert koi.run("job")[3]["exit"] == 0


@support.root_only
@pytest.mark.parametrize("when", ["fsync 1", "rename 1", "fsync 2", "after"])
def test_power_cut_during_an_installation_leaves_a_complete_tab(
        koi, ext4, when):
    support.need("strace")
    old, new = '"old" @manual true\n', '"new" @manual echo new\n'
    koi.start()
    assert koi.ask("install", text=old)["installed"]
    koi.stop()
    tab = koi.home / "tabs" / koi.user
    if when == "after":
        koi.start()
        assert koi.ask("install", text=new)["installed"]
    else:
        koi.start(wrap=struck(*when.split()))
        with pytest.raises(koitab.Error):
            koi.ask("install", text=new)
    koi.stop(signal.SIGKILL)
    ext4.cut()
    ext4.back()
    text = tab.read_text()
    assert text == new if when == "after" else text in (old, new)
    koi.start()
    assert len(koi.ask("jobs")["jobs"]) == 1 and koi.problems() == ""


@support.root_only
@pytest.mark.parametrize("when", ["at once", "claimed", "executed"])
def test_an_acknowledged_run_survives_the_power_cut_and_is_not_repeated(
        koi, gate, ext4, when):
    koi.tab(f'{QUIET}"hand" @manual {keep(koi)}; {gate.wait}\n')
    ext4.run("sync")
    koi.start()
    runs = []
    for count in range(1, 4 if support.FULL else 3):
        before = len(truth(koi))
        runs.append(koi.launch("hand"))
        if when == "claimed":
            wait_until(lambda: koi.header(runs[-1]), 20, "its supervisor")
        elif when == "executed":
            executed(koi, before + 1)
        koi.stop(signal.SIGKILL)
        wait_until(lambda: not end_all(koi, ext4), 20, "all to have ended")
        ext4.cut()
        ext4.back()
        ext4.boot.write_text(f"boot {count}\n")
        koi.start()
        starts_nothing(koi)
        assert koi.row(runs[-1])["state"] == "interrupted"
        ran = Counter(truth(koi))
        assert max(ran.values(), default=0) <= 1, ran
    assert sorted(run["run"] for run in koi.history()) == runs


def end_all(koi, disk) -> list[int]:
    """End all that was started here, as the power cut did. Return the pids
    of these processes; each may have had a child meanwhile."""
    mine, place, ended = str(koi.folder).encode(), str(disk.place), []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            files = [os.readlink(fd) for fd in (process / "fd").iterdir()]
            if int(process.name) not in (os.getpid(), disk.holder.pid) and (
                    mine in (process / "cmdline").read_bytes()
                    or any(file.startswith(place) for file in files)):
                support.kill(int(process.name))
                ended.append(int(process.name))
    return ended


# A disk that fails -----------------------------------------------------------


def failing(calls: str, error: str, when: str, *paths: Path) -> tuple:
    """What is put before koid's command so that these calls fail."""
    wanted = [word for path in paths for word in ("-P", str(path))]
    return ("strace", "-qq", "-o", "/dev/null", "-e", f"trace={calls}",
            *wanted, "-e", f"inject={calls}:error={error}:when={when}")


@pytest.mark.parametrize("calls, error, what", [
    ("read",       "EIO",    "the tab"),
    ("openat",     "EIO",    "the tab"),
    ("openat",     "EMFILE", "the tab"),
    ("openat",     "EMFILE", "the folder"),
    ("getdents64", "EIO",    "the folder"),
])
def test_unreadable_tab_keeps_running_in_its_last_version(
        koi, calls, error, what):
    support.need("strace")
    tab = koi.tab(f'{QUIET}"job" @manual {keep(koi)}\n')
    path = tab if what == "the tab" else tab.parent
    # The first look is good; the directory is also opened to be watched.
    first = {("openat", "the folder"): 3, ("getdents64", "the folder"): 3,
             ("read", "the tab"): 3}.get((calls, what), 2)
    koi.start(wrap=failing(calls, error, f"{first}+", path))
    pid = koi.ask("status")["pid"]
    assert koi.run("job")[3]["exit"] == 0
    koi.tab(f'{QUIET}"other" @manual true\n')
    os.kill(pid, signal.SIGHUP)
    try:
        wait_until(lambda: str(path) in koi.problems(), 20, "the error")
        assert [job["name"] for job in koi.ask("jobs")["jobs"]] == ["job"]
        assert koi.run("job")[3]["exit"] == 0
    finally:
        support.kill(pid)


def test_failed_fsync_is_never_acknowledged(koi):
    support.need("strace")
    koi.tab(f'{QUIET}"job" @manual {keep(koi)}\n')
    koi.start()
    koi.run("job")
    koi.stop()
    for n in range(1, 12, 1 if support.FULL else 3):
        koi.spawn(wrap=failing("fdatasync", "EIO", str(n)))
        ran = len(truth(koi))
        acked = koid_kills.by_hand(koi, "job")
        status = koid_kills.end(koi.daemon)
        if acked is None:
            assert status not in (0, -signal.SIGKILL), n
            assert "disk I/O error" in koi.log(), n
        restart(koi)
        wait_until(lambda: not koi.unfinished(), 20, "the ends")
        runs = {run["run"]: run["state"] for run in koi.history()}
        assert acked is None or acked in runs, n
        assert set(truth(koi)) <= set(runs), n
        assert max(Counter(truth(koi)).values()) == 1, n
        assert len(truth(koi)) <= ran + 1, n
        koi.stop()


def test_failed_fsync_is_not_repeated(koi):
    # The kernel may say that all is well the second time, and it is not.
    support.need("strace")
    koi.tab(f'{QUIET}"job" @manual {keep(koi)}; exit 9\n')
    koi.start()
    koi.run("job")
    koi.stop()
    trace = koi.folder / "trace"
    for n in range(1, 8, 1 if support.FULL else 3):
        koi.spawn(wrap=("strace", "-qq", "-o", str(trace), "-e",
                        "trace=fdatasync,unlinkat", "-e",
                        f"inject=fdatasync:error=EIO:when={n}"))
        acked = koid_kills.by_hand(koi, "job")
        koid_kills.end(koi.daemon)
        lines = trace.read_text().splitlines()
        # Of a directory's sync SQLite does not mind the failure.
        failed = [at for at, line in enumerate(lines) if "INJECTED" in line
                  and line.partition(")")[0] in "".join(lines[:at])]
        # After it no run's file is removed: it may be all that there is.
        after = lines[failed[0] + 1:] if failed else []
        assert "unlinkat" not in "".join(after), (n, lines)
        restart(koi)
        assert acked is None or koi.end_of(acked)["exit"] == 9
        koi.stop()


@pytest.mark.parametrize("error", ["EDQUOT", "EROFS"])
def test_exceeded_quota_or_read_only_disk_is_handled_like_a_full_disk(
        koi, error):
    support.need("strace")
    koi.tab(f'{QUIET}"job" @manual {keep(koi)}\n')
    koi.start()
    koi.run("job")
    koi.stop()
    koi.start(wrap=failing("pwrite64", error, "12..30"))
    pid = koi.ask("status")["pid"]
    for _ in range(3):
        with contextlib.suppress(koitab.Error):
            koi.launch("job")
    assert koi.ask("status")["pid"] == pid
    os.kill(pid, signal.SIGTERM)
    koi.daemon.wait(20)


def test_end_that_cannot_be_written_is_reported_through_the_pipe(koi, gate):
    # The supervisor cannot write: koid, which lives, knows the status.
    koi.tab(f'{QUIET}"slow" @manual {gate.wait}; exit 9\n')
    support.need("strace")
    koi.start()
    run = koi.launch("slow")
    found = koi.running(run)
    with support.stopping(subprocess.Popen(
            ["strace", "-p", str(found.supervisor), "-o", "/dev/null",
             "-e", "trace=pwrite64", "-e", "inject=pwrite64:error=EIO"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE)) as tracer:
        assert b"attached" in tracer.stderr.readline()
        gate.open()
        ended = koi.end_of(run)
        tracer.wait(20)
    assert (ended["state"], ended["exit"]) == ("done", 9)


# Too few of something --------------------------------------------------------


def test_failed_fork_is_repeated(koi):
    support.need("strace")
    koi.tab(f'{QUIET}"job" @manual {keep(koi)}\n')
    koi.start(wrap=failing("clone", "EAGAIN", "1..2"))
    pid = koi.ask("status")["pid"]
    run = koi.launch("job")
    wait_until(lambda: "no process" in koi.problems(), 10, "a word about it")
    assert koi.end_of(run)["state"] == "done" and truth(koi) == [run]
    assert koi.problems() == ""
    support.kill(pid)


def test_run_without_a_process_for_a_minute_is_unstartable(koi, clock):
    support.need("strace")
    koi.tab(f'{QUIET}"job" @manual {keep(koi)}\n')
    clock.start(NOON, *failing("clone", "EAGAIN", "1+"))
    pid = koi.ask("status")["pid"]
    run = koi.launch("job")
    wait_until(lambda: "no process" in koi.problems(), 10, "a word about it")
    clock.elapse(koitab.TRY_FOR + 1)
    ended = koi.end_of(run)
    assert ended["state"] == "unstartable" and truth(koi) == []
    assert "temporarily unavailable" in ended["reason"]
    support.kill(pid)


def test_job_whose_fork_fails_is_started_again(koi):
    support.need("strace")
    koi.tab(f'{QUIET}"job" @manual {keep(koi)}\n')
    koi.start(wrap=("strace", "-f", "-qq", "-o", "/dev/null", "-e",
                    "trace=clone3,vfork", "-e",
                    "inject=clone3,vfork:error=EAGAIN:when=1"))
    pid = koi.ask("status")["pid"]
    run = koi.launch("job")
    assert koi.end_of(run)["state"] == "done" and truth(koi) == [run]
    support.kill(pid)


def callers(koi, count: int) -> list:
    """Return clients that connect and send nothing."""
    found = []
    for _ in range(count):
        found.append(socket.socket(socket.AF_UNIX))
        found[-1].connect(str(koi.home / "koid.sock"))
    return found


def peaceful(koi) -> bool:
    """koid answers, and has nothing to complain about."""
    try:
        return koi.problems() == ""
    except koitab.Error:
        return False


def test_a_koid_without_descriptors_starts_and_ends_its_jobs(koi, clock):
    koi.tab(f'{QUIET}"each" * * * * * {keep(koi)}; exit 3\n'
            f'"hand" @manual echo whole; {keep(koi)}\n')
    clock.start(NOON + 30, "sh", "-c", 'ulimit -n 48; exec "$@"', "sh")
    silent = callers(koi, 60)
    silent[-1].settimeout(20)
    assert b"busy" in silent[-1].recv(1000)     # koid has met all of them
    clock.elapse_to(NOON + MINUTE)
    executed(koi)
    koi.daemon.send_signal(signal.SIGHUP)       # it cannot read its tabs now
    clock.elapse_to(NOON + 2 * MINUTE)
    executed(koi, 2)
    for caller in silent:
        caller.close()
    wait_until(lambda: peaceful(koi), 20, "room again")
    runs = koi.ended("each", 2)
    assert {(run["state"], run["exit"]) for run in runs} == {("done", 3)}
    assert [koi.text_of(run["run"]) for run in runs] == ["kept\n"] * 2
    assert koi.run("hand")[1] == b"whole\nkept\n"
    assert koi.daemon.poll() is None


def test_silent_clients_do_not_block_other_clients(koi, clock):
    koi.tab(f'{QUIET}"job" @manual {keep(koi)}\n')
    clock.start(NOON)           # stopped: they stay connected
    silent = callers(koi, 300)
    assert koi.run("job")[3]["exit"] == 0
    for caller in silent:
        caller.close()
    assert koi.run("job")[3]["exit"] == 0


def test_all_jobs_of_a_very_full_minute_start_once(koi, clock):
    koi.tab(QUIET + "".join(
        f'"job {n}" * * * * * {"true" if n % 50 else keep(koi)}\n'
        for n in range(MANY)))
    clock.start(NOON + 30)
    began = time.monotonic()
    clock.elapse_to(NOON + MINUTE)
    deadline = 30 + MANY / 50
    wait_until(lambda: count_of(koi, "done") == MANY, deadline, "them all")
    print(f"\n{MANY} jobs of one minute: all had ended "
          f"{time.monotonic() - began:.1f} s after it began")
    db = sqlite3.connect(koi.home / "history.db")
    rows = db.execute("select count(distinct job), max(started) - "
                      "min(requested_at) from runs where due = ?",
                      (NOON + 60,)).fetchone()
    db.close()
    assert rows[0] == MANY
    assert count_of(koi, "done") == MANY
    wanted = (MANY + 49) // 50
    assert len(truth(koi)) == len(set(truth(koi))) == wanted


def count_of(koi, state: str) -> int:
    db = sqlite3.connect(koi.home / "history.db")
    try:
        return db.execute("select count(*) from runs where state = ?",
                          (state,)).fetchone()[0]
    finally:
        db.close()


@pytest.mark.parametrize("policy, wanted", [
    ("allow", {"running": 4}),
    ("skip", {"running": 1, "skipped": 3}),
    ("queue", {"running": 1, "queued": 3}),
])
def test_jobs_that_never_end_do_not_block_other_jobs(
        koi, clock, policy, wanted):
    koi.tab(f'{QUIET}"other" @manual {keep(koi)}\nKOI_OVERLAP={policy}\n'
            + "".join(f'"ever {n}" * * * * * exec sleep 1000\n'
                      for n in range(5)))
    clock.start(NOON + 30)
    for minute in range(1, 5):
        clock.elapse_to(NOON + minute * MINUTE)
        clock.seen()
    for n in range(5):
        assert Counter(states(koi, f"ever {n}")) == wanted
    assert koi.run("other")[3]["exit"] == 0
    wait_until_idle(koi.daemon.pid)
    last = koi.history(limit=1)[0]["run"]
    koi.stop()
    restart(koi)
    running = [run["run"] for run in koi.history(job="ever 1")
               if run["state"] == "running" and run["run"] <= last]
    assert len(running) == wanted["running"]


ENDS = [
    ("kill -9 $$",                          None, 9, ""),
    ("exec >&- 2>&-; sleep 0.2; exit 4",    4, None, ""),
    ("printf abc",                          0, None, "abc"),
    ("printf '\\377\\000\\033'; exit 2",    2, None, None),
    ("exit 255",                            255, None, ""),
]


def test_every_way_a_job_can_end_is_recorded(koi):
    koi.tab(QUIET + "".join(f'"job {n}" @manual {command}\n'
                            for n, (command, *_) in enumerate(ENDS)))
    koi.start()
    for n, (command, exit_status, number, out) in enumerate(ENDS):
        _, text, _, last = koi.run(f"job {n}")
        assert (last["exit"], last["signal"]) == (exit_status, number), \
            command
        run, = koi.ended(f"job {n}")
        assert (run["exit"], run["signal"]) == (exit_status, number)
        assert out is None or text.decode() == out


def test_process_left_by_a_job_does_not_keep_its_run_active(koi):
    pid = koi.folder / "pid"
    koi.tab(f'{QUIET}"job" @manual setsid sleep 1000 & echo $! > {pid}; '
            "echo done\n")
    koi.set_constants(LINGER=0.1).start()
    assert koi.run("job")[1] == b"done\n"
    assert "left behind" in koi.text_of(koi.ended("job")[0]["run"])
    support.kill(int(pid.read_text()))


def test_endless_output_does_not_fill_the_memory_of_the_supervisor(koi, gate):
    koi.installed = True
    koi.tab(f'{QUIET}"job" @manual head -c 50000000 /dev/zero; {gate.wait}\n')
    koi.start()
    run = koi.launch("job")
    found = koi.running(run)
    wait_until(lambda: koitab.parse_header((koi.home / "runs" / str(run))
               .read_bytes()).total == 50_000_000, 60, "the flood")
    status = Path(f"/proc/{found.supervisor}/status").read_text()
    size = int(status.partition("VmHWM:")[2].split()[0])
    assert size <= 32 * 1024, f"{size} KiB"
    gate.open()
    ended = koi.end_of(run)
    assert (ended["bytes"], ended["cut"]) == (50_000_000, True)


# Damage ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def old_history(tmp_path_factory):
    """A history of some pages, of a koid that is gone."""
    koi = support.Koi(tmp_path_factory.mktemp("history"))
    tab_of_history(koi)
    clockwork.StillClock(koi).start(NOON)
    for _ in range(4):
        koi.run("much")
        koi.run("hand", Who="somebody")
    wait_until(lambda: not koi.unfinished(), 20, "the ends")
    koi.stop()
    file = koi.home / "history.db"
    db = sqlite3.connect(file)
    db.execute("pragma wal_checkpoint(truncate)").fetchall()
    db.close()
    assert file.stat().st_size > 10 * 4096 and not Path(f"{file}-wal").exists()
    return file.read_bytes()


def tab_of_history(koi) -> None:
    koi.tab(f'{QUIET}"each" * * * * * {keep(koi)}\n'
            '"much" @manual seq 3000; exit 3\n"hand" @manual echo {{Who}}\n')


@pytest.fixture
def history(koi, clock, old_history):
    """The history of a koid that is to be started, at noon."""
    tab_of_history(koi)
    file = koi.home / "history.db"
    file.write_bytes(old_history)
    file.chmod(0o600)
    clock.set(NOON)
    return file


def carries_on(koi, clock) -> None:
    """The schedule continues, and jobs can be run: at once, or after koid has
    ended with a word, as systemd starts it again."""
    for last in (False, False, True):
        before = len(truth(koi))
        try:
            restart(koi)
            assert koi.run("much")[3].get("exit") == 3
            koi.stop()
            clock.elapse(MINUTE)
            restart(koi)
            has_started(koi, before)
            assert koi.stop() == 0
            return
        except (koitab.Error, AssertionError, koid_kills.WrongState,
                sqlite3.Error, pytest.fail.Exception):
            if last:
                raise
            koi.stop()


def has_started(koi, before: int) -> None:
    """What koid started before its first answer has been executed."""
    wait_until(lambda: len(truth(koi)) > before
               or not support.children_of(koi.daemon.pid), 20, "a start")
    assert len(truth(koi)) > before


def overwrite(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new):]


DAMAGE = {
    "no header": lambda data: overwrite(data, 0, b"\0" * 100),
    "rubbish": lambda data: os.urandom(len(data)),
    "half of it": lambda data: data[:len(data) // 2],
    "a part of a page": lambda data: data[:-1000],
    "nothing": lambda data: b"",
    "one byte": lambda data: b"S",
    "another program's": lambda data: overwrite(data, 68, b"\0\0\0\0"),
    **{f"page {page} is zero": lambda data, page=page: overwrite(
        data, page * 4096, b"\0" * 4096) for page in range(1, 10)},
    **{f"page {page} is rubbish": lambda data, page=page: overwrite(
        data, page * 4096, os.urandom(4096)) for page in range(1, 10)},
}


@pytest.mark.parametrize("damage", support.sample(
    DAMAGE, "no header", "half of it", "a part of a page", "nothing",
    "another program's", "page 1 is zero"))
def test_damaged_history_is_moved_aside_and_jobs_continue(
        koi, clock, history, damage):
    file = history
    data = DAMAGE[damage](file.read_bytes())
    file.write_bytes(data)
    size = len(koi.log())
    carries_on(koi, clock)
    aside = [path for path in koi.home.glob("history.db.corrupt-*")
             if not path.name.endswith(("-wal", "-shm"))]
    if aside:
        assert max(path.stat().st_size for path in aside) >= len(data)
        assert "damaged" in koi.log()[size:] and aside[0].name in koi.log()
    else:                       # nothing was stored on that page
        assert len(koi.history()) > 8
    assert "Traceback" not in koi.log()


@pytest.mark.parametrize("damage, ending", support.sample(
    [(damage, ending) for ending in ("-wal", "-shm")
     for damage in ("rubbish", "half of it", "nothing", "removed")],
    ("half of it", "-wal"), ("removed", "-wal"), ("rubbish", "-shm")))
def test_damaged_files_next_to_the_history_stop_no_job(
        koi, clock, history, damage, ending):
    restart(koi)
    koi.run("hand", Who="me")
    koi.stop(signal.SIGKILL)
    file = koi.home / f"history.db{ending}"
    data = file.read_bytes()
    assert data
    if damage == "removed":
        file.unlink()
    else:
        file.write_bytes(DAMAGE[damage](data))
    carries_on(koi, clock)
    assert "Traceback" not in koi.log()


NONSENSE = [
    "update runs set args = '{' where id = 2",
    "update runs set args = x'ff', reason = x'00ff' where id = 2",
    "update runs set state = 'running', args = '[' where id = 2",
    "update runs set state = 'running', due = 'x', started = 'y'",
    "update runs set state = 'queued', job = 99 where id = 2",
    "update runs set state = 'what' where id = 2",
    "update meta set value = 'never' where name = 'seen'",
    "update meta set value = 'x=1' where name = 'dials'",
    "update meta set value = '=,' where name = 'dials'",
    "delete from meta",
    "update jobs set identity = x'ff00' where id = 1",
    "delete from jobs",
    "drop table output",
    "drop table meta",
]


@pytest.mark.parametrize("statement", support.sample(
    NONSENSE, *NONSENSE[1:12:5], "drop table output"))
def test_history_with_invalid_values_stops_no_job(
        koi, clock, history, statement):
    db = sqlite3.connect(history)
    with db:
        db.execute(statement)
    db.close()
    carries_on(koi, clock)
    assert "Traceback" not in koi.log()


def test_history_damaged_at_run_time_ends_koid_with_an_error(
        koi, clock, history):
    restart(koi)
    size = history.stat().st_size
    with open(history, "r+b") as damaged:
        damaged.seek(4096)
        damaged.write(os.urandom(size - 4096))
    for _ in range(3):
        with contextlib.suppress(koitab.Error):
            koi.launch("much")
    ran = Counter(truth(koi))
    koi.stop()
    carries_on(koi, clock)
    assert "damaged" in koi.log() and "Traceback" not in koi.log()
    assert all(count == 1 for count in ran.values())


@pytest.mark.parametrize("mode", ["wal", "delete"])
def test_history_of_a_newer_koi_is_refused_without_a_write(koi, history, mode):
    file = history
    db = sqlite3.connect(file)
    db.execute("pragma user_version = 99")
    db.execute(f"pragma journal_mode = {mode}").fetchall()
    db.close()
    data = file.read_bytes()
    assert koi.spawn().wait(20) == 1
    assert "newer koi" in koi.log() and "Traceback" not in koi.log()
    assert file.read_bytes() == data
    assert not list(koi.home.glob("history.db.corrupt*"))


CORRUPT = [
    (b"\x7fELF\x02\x01\x01\0\0\0", ["good"], "NUL"),
    (b"* * * * * true\r\n\"two\" @manual true\r\n", None, "tabs/"),
    (b'"job" @manual true\n"late" @manual true', ["job"], ":2:"),
    (b'"job" @manual true\n\xff\xfe * * * * rubbish\n', ["job"], ":2:"),
    (b'"job" @manual true\n61 * * * * late\n', ["job"], ":2:"),
    (b'"t\xc3\xa4g\xff" @manual true\n', None, ""),
    (b"\0" * 5000, ["good"], "NUL"),
    (b'"job" @manual true\n' + b"x" * 2**20, ["good"], "tabs/"),
    (b"", [], ""),
    (b"[" * 5000, None, "tabs/"),
]


def wait_for_tab(koi, clock, jobs: list, troubled: bool) -> None:
    """Until koid has read the tab, and has these jobs. A change that it
    notices by itself it reads a moment later, so time has to pass."""
    def is_read() -> bool:
        clock.elapse(1)
        seen[:] = koi.names(), koi.problems()
        return seen[0] == jobs and bool(seen[1]) == troubled
    seen: list = []
    try:
        wait_until(is_read, 20, f"{jobs}")
    finally:
        print(seen, koi.log())


def test_corrupt_tab_loses_its_invalid_lines_or_keeps_its_last_version(
        koi, clock):
    tab = koi.tab(f'"good" @manual {keep(koi)}\n')
    clock.start(NOON)
    for data, jobs, word in CORRUPT:
        tab.write_bytes(data)
        koi.daemon.send_signal(signal.SIGHUP)
        if jobs is not None:
            wait_for_tab(koi, clock, jobs, bool(word))
            assert word in koi.problems()
        assert "Traceback" not in koi.log()
        koi.tab(f'"good" @manual {keep(koi)}\n')
        koi.daemon.send_signal(signal.SIGHUP)
        wait_for_tab(koi, clock, ["good"], False)
        assert koi.run("good")[3]["exit"] == 0


# A SIGHUP comes while koid handles a SIGIO: at the first look at the clock
# after this file was made.
HANGUP_IN_TIME = """
import os, signal
def ticks(self, ticks=k.Clock.ticks):
    if os.path.exists({file!r}) and not os.path.exists({fresh!r}):
        os.unlink({file!r})
        os.kill(os.getpid(), signal.SIGHUP)
    return ticks(self)
k.Clock.ticks = ticks
"""


def test_sighup_during_the_notification_of_a_change_is_not_lost(koi, clock):
    """SIGHUP means now, and SIGIO a moment later, when time has passed. It
    comes when the new tab is in place, in whichever turn that is."""
    file, fresh = koi.folder / "hangup", koi.folder / "fresh"
    koi.patch += HANGUP_IN_TIME.format(file=str(file), fresh=str(fresh))
    koi.tab('"old" @manual true\n')
    clock.start(NOON)
    assert koi.names() == ["old"]
    fresh.write_text('"new" @manual true\n')
    fresh.chmod(0o600)
    clock.seen()
    file.touch()
    fresh.rename(koi.home / "tabs" / koi.user)
    wait_until(lambda: koi.names() == ["new"], 20, "the new tab")


def test_run_with_a_damaged_file_is_interrupted(koi, gate):
    koi.tab(f'{QUIET}"slow" @manual {keep(koi)}; {gate.wait}\n')
    koi.start()
    damaged = [b"", b"K", b"KOI1", b"\0" * 256, b"KOI9" + b"\0" * 300,
               os.urandom(400), b"KOI1" + b"\xff" * 300]
    runs = [koi.launch("slow") for _ in damaged]
    found = [koi.running(run) for run in runs]
    executed(koi, len(runs))
    koi.stop(signal.SIGKILL)
    for header, run, data in zip(found, runs, damaged):
        support.kill(header.supervisor)
        (koi.home / "runs" / str(run)).write_bytes(data)
        (koi.home / "runs" / f"stray{run}").write_bytes(data)
    koi.start()
    for run, data in zip(runs, damaged):
        assert koi.end_of(run)["state"] == "interrupted", data
    assert sorted(truth(koi)) == runs and "Traceback" not in koi.log()
    gate.open()


# Upgrades and changes --------------------------------------------------------


@pytest.mark.parametrize("way", ["cp", "mv"])
def test_replaced_koitab_py_adopts_the_running_jobs(koi, gate, way):
    koi.tab(f'{QUIET}"slow" @manual {gate.wait}; {keep(koi)}; exit 8\n'
            f'"mail" @manual {keep(koi)}\n')
    program, new = koi.folder / "koitab.py", koi.folder / "new.py"
    text = (support.ROOT / "koitab.py").read_text()
    version = f'VERSION = "koitab", "{koitab.VERSION}"'
    assert version in text
    program.write_text(text)
    new.write_text(text.replace(version, 'VERSION = "koitab", "77.7"'))
    koi.command = lambda *args: [koi.python, "-IS", str(program), *args]
    koi.start()
    run = koi.launch("slow")
    koi.running(run)
    subprocess.run([way, str(new), str(program)], check=True)
    assert koi.run("mail")[3]["exit"] == 0
    assert koi.ask("status")["version"] == koitab.VERSION
    koi.stop()
    koi.start()
    assert koi.ask("status")["version"] == "77.7"
    assert koi.row(run)["state"] == "running"
    gate.open()
    assert koi.end_of(run)["exit"] == 8 and len(truth(koi)) == 2


# From koid's first turn on nothing can be imported that is not loaded.
BLOCKED = """
class Gone:
    def find_spec(self, name, path=None, target=None):
        with open({wanted!r}, "a") as notes:
            notes.write(name + "\\n")
        raise ImportError(f"the standard library is gone: {{name}}")

def first_turn(daemon, turn=k.Daemon.run_once):
    sys.meta_path.insert(0, Gone())
    k.Daemon.run_once = turn
    turn(daemon)

k.Daemon.run_once = first_turn
k.SENDMAILS = ({sendmail!r},)
"""


def test_upgraded_python_stops_no_job(koi):
    """What koid needs is loaded before the first job, but for what makes
    the tags that people see, and mails."""
    mail, wanted = koi.folder / "mail", koi.folder / "wanted"
    sendmail = koi.folder / "sendmail"
    sendmail.write_text(f"#!/bin/sh\ncat >> {mail}\n")
    sendmail.chmod(0o755)
    wanted.touch()
    koi.tab(f'"mailed" @reboot echo hello; {keep(koi)}\n'
            f'"slow" @manual {keep(koi)}; exec sleep 1000\n'
            f'KOI_RETRY=1\n"args" @manual echo {{{{Who}}}}; exit 3\n'
            f'"stdin" @manual cat | wc -c%{"x" * 70000}\n')
    koi.patch = BLOCKED.format(wanted=str(wanted), sendmail=str(sendmail))
    koi.start()
    run = koi.launch("slow")
    koi.running(run)
    koi.ask("kill", run=run)
    assert koi.end_of(run)["signal"] == signal.SIGTERM
    assert koi.run("args", Who="you")[1] == b"you\n"
    assert koi.run("stdin")[1].strip() in (b"70000", b"70001")
    assert koi.ask("install", text=koi.ask("list")["text"])["installed"]
    for op in ("status", "jobs", "history"):
        koi.ask(op)
    with pytest.raises(koitab.Error):
        koi.ask("nonsense")
    # What a mail needs is not held in memory; the next koid sends it.
    wait_until(lambda: "MAIL (run" in koi.log(), 20, "the mail to fail")
    assert {found["mail"] for found in koi.history(job="mailed")} == {"due"}
    koi.daemon.send_signal(signal.SIGHUP)
    koi.ask("status")
    assert koi.stop() == 0
    assert set(wanted.read_text().split()) <= {
        "hashlib", "email", "difflib"}, koi.log()


@pytest.mark.parametrize("change", ["edited", "removed", "renamed",
                                    "no tab"])
def test_changed_tab_does_not_affect_a_running_job(koi, gate, change):
    line = f'{QUIET}KOI_OVERLAP=skip\n"slow" @manual {gate.wait}; ' \
        f"{keep(koi)}; exit 8\n"
    other = '"other" @manual true\n'
    koi.tab(line + other)
    koi.start()
    run = koi.launch("slow")
    job = koi.running(run).job
    if change == "no tab":
        koi.ask("remove")
    else:
        text = {"edited": line.replace("exit 8", "exit 1") + other,
                "removed": other,
                "renamed": line.replace("slow", "fast") + other}[change]
        assert koi.ask("install", text=text)["installed"]
    assert is_alive(job) and koi.row(run)["state"] == "running"
    if change == "renamed":
        assert koi.ask("kill", run=run)["run"]["name"] == "fast"
        assert koi.end_of(run)["reason"].startswith("killed by")
        return
    gate.open()
    ended = koi.end_of(run)
    assert (ended["exit"], ended["name"]) == (8, "slow")
    assert truth(koi) == [run]
    assert [found["run"] for found in koi.history(job="slow")] == [run]


@pytest.mark.parametrize("change", ["removed", "edited"])
def test_run_whose_tab_changed_while_koid_was_down_is_adopted(
        koi, gate, change):
    koi.tab(f'{QUIET}"slow" @manual {gate.wait}; {keep(koi)}; exit 8\n')
    koi.start()
    run = koi.launch("slow")
    koi.running(run)
    koi.stop(signal.SIGKILL)
    koi.tab('"other" @manual true\n' if change == "removed" else
            f'{QUIET}"slow" @manual echo {{{{Who}}}}\n')
    koi.start()
    gate.open()
    assert koi.end_of(run)["exit"] == 8 and truth(koi) == [run]


def test_sweep_detects_a_koid_that_records_no_end(tmp_path):
    """A sweep that finds nothing must be able to find something."""
    rig = koid_kills.Rig(tmp_path)
    koi = rig.fresh()
    acked, _ = koid_kills.life(koi)
    db = sqlite3.connect(koi.home / "history.db")
    with db:
        db.execute("update runs set state = 'running', ended = null")
    db.close()
    for run in (1, 2, 3):       # as if no supervisor had claimed them
        assert not (koi.home / "runs" / str(run)).exists()
    with pytest.raises(koid_kills.WrongState, match="executed 2 times"):
        koid_kills.settled(koi, acked)
    koi.stop(signal.SIGKILL)
