"""Journal: what do earlier runs say?"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
import types

import pytest

import support

mission = support.load("mission")


class FakeClock:
    """A clock that moves only when a test says so."""

    def __init__(self, now: float = 1774747800.0):
        self.time = now

    def now(self) -> float:
        return self.time

    def ticks(self) -> float:
        return self.time


@pytest.fixture
def journal(tmp_path):
    found = mission.StateDirectory(str(tmp_path / "state" / "m-1"),
                                   FakeClock())
    found.make_directory()
    return found


def run(name: str, **more) -> dict:
    return {"id": name, "pid": 7, "started": 1774747800.0, "boot": "b",
            "phase": "start", "task": "", **more}


def record(name: str, result: str = "ok", **more) -> dict:
    return {"id": name, "result": result, "tasks": [], **more}


def ids(records) -> list[str]:
    return [one["id"] for one in records]


def history_file(journal, data: bytes | None = None) -> bytes:
    path = os.path.join(journal.directory, "history.jsonl")
    if data is not None:
        with open(path, "wb") as file:
            file.write(data)
    with open(path, "rb") as file:
        return file.read()


# --- the history ----------------------------------------------------------


def test_history_is_empty_before_the_first_run(journal):
    assert journal.history() == [] and journal.lost() == []
    assert journal.expected() == {} and journal.queued_mails() == []


def test_runs_are_stored_in_order_one_per_line(journal):
    for name in "abc":
        journal.add_to_history(record(name, text="caf\u00e9\n"))
    assert ids(journal.history()) == ["a", "b", "c"]
    assert history_file(journal).count(b"\n") == 3
    assert support.mode(os.path.join(journal.directory, "history.jsonl")) \
        == 0o600


GOOD = b'{"id": "a"}\n'


@pytest.mark.parametrize("data, found", [
    (b"", []), (b"\n\n", []), (GOOD, ["a"]), (GOOD[:-1], ["a"]),
    (GOOD + b'{"id": "b", "ver', ["a"]),
    (b'{"id": "b", "ver\n' + GOOD, ["a"]), (GOOD + b"\0" * 4096, ["a"]),
    (b"\0" * 512 + b"\n" + GOOD, ["a"]), (GOOD + b"null\n5\n[]\n{}\n", ["a"]),
    (GOOD + b"\xff\xfe\n", ["a"]), (GOOD + b"9" * 5000 + b"\n", ["a"]),
], ids=lambda value: repr(value)[:40])
def test_incomplete_line_in_the_history_is_skipped(data, found, journal):
    history_file(journal, data)
    assert ids(journal.history()) == found
    journal.add_to_history(record("next"))
    assert ids(journal.history()) == [*found, "next"]


def test_next_run_is_read_after_an_incomplete_line_of_any_length(journal):
    whole = json.dumps(record("a")).encode() + b"\n"
    for end in range(len(whole) + 1):
        history_file(journal, whole[:end])
        journal.add_to_history(record("next"))
        assert ids(journal.history())[-1] == "next", end


def test_history_of_an_earlier_version_is_read(journal):
    """Its key was `verdict`, with another word for an undelivered mail."""
    journal.make_directory()
    for name, verdict in (("a", "trouble"), ("b", "failed")):
        old = {key: value for key, value in record(name).items()
               if key != "result"}
        journal.add_to_history({**old, "verdict": verdict})
    assert [run["result"] for run in journal.history()] == [
        "undelivered", "failed"]


def test_recorded_run_is_synced_to_disk(journal, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (
        synced.append(os.fstat(fd).st_size), real(fd))[1])
    journal.add_to_history(record("a"))
    assert len(history_file(journal)) in synced


def test_history_that_is_too_long_loses_its_older_half(journal, monkeypatch):
    monkeypatch.setattr(mission, "HISTORY_LIMIT", 5000)
    for number in range(200):
        journal.add_to_history(record(str(number)))
    found = ids(journal.history())
    assert found == [str(number) for number in range(
        200 - len(found), 200)]
    assert 10 < len(found) < 100
    assert len(history_file(journal)) < 5500


def test_planted_symbolic_link_is_not_followed_by_a_write(journal, tmp_path):
    victim = tmp_path / "victim"
    os.symlink(victim, os.path.join(journal.directory, "history.jsonl"))
    with pytest.raises(OSError):
        journal.add_to_history(record("a"))
    assert not victim.exists()


def test_usual_duration_is_the_median_of_the_last_ten_successful_runs(journal):
    for place, seconds in enumerate([99] * 5 + [*range(1, 11)]):
        journal.add_to_history(record(f"run{place}", tasks=[
            {"slug": "mail", "outcome": "ok", "seconds": seconds},
            {"slug": "mail", "outcome": "failed", "seconds": 1000}]))
    assert journal.expected() == {"mail": 6}


# --- the run in progress, and lost ones -----------------------------------


def test_a_run_that_finished_is_not_lost(journal):
    journal.write_current(run("a"))
    journal.update(phase="tasks", task="mail")
    assert journal.read_current()["task"] == "mail"
    journal.finish(record("a"))
    assert journal.lost() == [] and ids(journal.history()) == ["a"]
    assert journal.read_current()["phase"] == mission.FINISHED


def test_run_on_a_full_disk_overwrites_the_record_of_the_last_run(
        journal, monkeypatch):
    journal.write_current(run("a"))
    journal.finish(record("a"))

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(mission, "write_atomically", fail)
    monkeypatch.setattr(mission.StateDirectory, "add_to_history", fail)
    full = mission.StateDirectory(journal.directory, FakeClock())
    full.write_current(run("b"))
    assert ids(full.lost()) == ["b"] and "No space" in full.error
    with pytest.raises(OSError):
        full.finish(record("b", "undelivered"))
    assert ids(full.history()) == ["a"]
    shown = mission.runs_of(full)
    assert [(one["id"], one["result"]) for one in shown] == [
        ("a", "ok"), ("b", "undelivered")]


def test_result_missing_in_the_history_is_taken_from_the_current_record(
        journal):
    journal.write_current(run("a"))
    journal.add_to_history(record("a", "ok"))
    journal.update(phase=mission.FINISHED, result="undelivered")
    (shown,) = mission.runs_of(journal)
    assert shown["result"] == "undelivered"


def test_a_run_that_was_killed_is_lost_with_its_last_task(journal):
    journal.write_current(run("a"))
    journal.update(phase="tasks", task="mail")
    again = mission.StateDirectory(journal.directory, FakeClock())
    assert [(one["id"], one["task"]) for one in again.lost()] == [
        ("a", "mail")]


def test_run_killed_after_its_end_is_not_lost(journal):
    journal.write_current(run("a"))
    journal.update(phase=mission.FINISHED)
    assert journal.lost() == []


def test_run_killed_during_its_mail_is_lost(journal):
    journal.write_current(run("a"))
    journal.add_to_history(record("a"))
    journal.update(phase="mail_finish")
    assert ids(journal.lost()) == ["a"]


def test_later_record_of_a_run_replaces_the_earlier_one(journal):
    for name, result in (("a", "ok"), ("b", "ok"), ("a", "lost")):
        journal.add_to_history(record(name, result))
    assert [(one["id"], one["result"]) for one in journal.history()] == [
        ("a", "lost"), ("b", "ok")]


def test_consecutive_lost_runs_are_all_reported(journal):
    """Each dies before it can report the one before it."""
    for name in "abc":
        lost = journal.lost()
        for one in lost:
            journal.add_to_history(record(one["id"], "lost"))
        journal.write_current(run(name, lost=lost))
    assert ids(journal.lost()) == ["a", "b", "c"]
    journal.finish(record("c"))
    assert journal.lost() == []


@pytest.mark.parametrize("text", [
    "", "null", "[]", "5", '"x"', "{}", '{"id": "a"}', '{"id": "a", "star',
    "\0" * 100, '{"started": 1}', "\ufeff{}", "9" * 5000,
], ids=lambda text: repr(text)[:20])
def test_incomplete_record_of_a_run_is_a_lost_run(text, journal):
    with open(os.path.join(journal.directory, "current.json"), "w") as file:
        file.write(text)
    assert len(journal.lost()) == 1
    assert journal.busy()
    journal.write_current(run("b"))
    journal.finish(record("b"))
    assert ids(journal.history()) == ["b"]


def test_history_shows_a_lost_run_before_the_next_one_reports_it(journal):
    journal.write_current(run("a", task="mail"))
    found = mission.runs_of(journal)
    assert [(one["id"], one["result"], one["last"]) for one in found] == [
        ("a", "lost", "mail")]
    journal.acquire(0)
    assert [one["result"] for one in mission.runs_of(journal)] == ["running"]
    os.close(journal.held)


# --- the lock -------------------------------------------------------------


OTHER = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("mission", sys.argv[1])
mission = importlib.util.module_from_spec(spec)
sys.modules["mission"] = mission
spec.loader.exec_module(mission)
journal = mission.StateDirectory(sys.argv[2], mission.Clock())
journal.acquire(0)
journal.write_current({
    "id": "a", "pid": mission.os.getpid(), "started": mission.time.time() - 65,
    "phase": "tasks", "task": "mail"})
print("held", flush=True)
sys.stdin.read()
"""


def other_run(journal) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", OTHER, str(support.ROOT / "mission.py"),
         journal.directory], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    return process


def test_busy_lock_is_reported_with_the_process_that_holds_it(journal):
    journal.clock = mission.Clock()
    with support.stopping(other_run(journal)) as process:
        with pytest.raises(mission.Error) as caught:
            journal.acquire(0)
        assert caught.value.status == mission.EXIT_BUSY
        assert f"pid {process.pid}, since 2" in caught.value.message
        assert 'in task "mail"' in caught.value.message
        assert "(1m" in caught.value.message
        process.kill()
        process.wait()
    journal.acquire(0)      # its death freed the lock
    assert ids(journal.lost()) == ["a"]
    os.close(journal.held)


def test_option_wait_waits_for_the_end_of_the_other_run(journal):
    journal.clock = mission.Clock()
    with support.stopping(other_run(journal)) as process:
        began = time.monotonic()
        with pytest.raises(mission.Error):
            journal.acquire(0.3)
        assert time.monotonic() - began >= 0.3
        process.stdin.close()
        journal.acquire(60)
        os.close(journal.held)


def test_lock_without_a_record_is_reported_as_a_run_started_just_now(journal):
    held = mission.try_lock(journal.path("lock"))
    with pytest.raises(mission.Error, match="started just now"):
        journal.acquire(0)
    os.close(held)


# --- where it is kept -----------------------------------------------------


def test_the_state_directory_is_accessible_to_its_owner_only(tmp_path):
    old = os.umask(0)
    try:
        journal = mission.StateDirectory(str(tmp_path / "a" / "b" / "c"),
                                         FakeClock())
        journal.make_directory()
    finally:
        os.umask(old)
    assert support.mode(tmp_path / "a" / "b" / "c") == 0o700
    assert support.mode(tmp_path / "a" / "b") & 0o022 == 0


@pytest.mark.parametrize("spoil", ["mode", "link", "file", "owner"])
def test_state_directory_that_others_can_write_is_refused(spoil, tmp_path):
    folder = tmp_path / "state"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    if spoil == "link":
        folder.symlink_to(elsewhere)
    elif spoil == "file":
        folder.write_text("")
    else:
        folder.mkdir()
        folder.chmod(0o770 if spoil == "mode" else 0o700)
    if spoil == "owner":
        if not support.AS_ROOT:
            folder.chmod(0o722)
        else:
            os.chown(folder, 1500, 1500)
    with pytest.raises(mission.Error):
        mission.StateDirectory(str(folder), FakeClock()).make_directory()
    assert os.listdir(elsewhere) == []


def test_each_configuration_has_its_own_state_directory(tmp_path):
    names = set()
    for name in ("a/m.json", "b/m.json", "a/m.config.json", "a/.json",
                 "a/\u00e9 \n.json", "a/" + "x" * 200):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
        names.add(mission.state_name(str(path)))
    assert len(names) == 6
    for name in names:
        assert "/" not in name and name.isprintable() and " " not in name
        assert len(name.encode()) <= 255
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "a" / "m.json")
    assert mission.state_name(str(link)) == mission.state_name(
        str(tmp_path / "a" / "m.json"))


@pytest.mark.parametrize("environ, uid, home", [
    ({"MISSION_STATE": "/s/t"}, 1000, "/s/t"),
    ({"MISSION_STATE": "/s/t"}, 0, "/s/t"), ({}, 0, "/var/lib/mission"),
    ({"XDG_STATE_HOME": "/x"}, 0, "/var/lib/mission"),
    ({"XDG_STATE_HOME": "/x", "HOME": "/h"}, 1000, "/x/mission"),
    ({"HOME": "/h"}, 1000, "/h/.local/state/mission"),
])
def test_the_state_directory_follows_user_and_variables(
        environ, uid, home, monkeypatch):
    for name in ("MISSION_STATE", "XDG_STATE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    assert mission.state_home() == home


# --- mails that wait ------------------------------------------------------


def test_queued_mails_are_in_the_order_of_their_runs(journal):
    for number, name in enumerate(("b", "a", "c")):
        journal.queue_mail(name, name.encode())
        path = journal.path("outbox", name + ".eml")
        os.utime(path, (1000 + number, 1000 + number))
        assert support.mode(path) == 0o600
    assert [os.path.basename(path) for path in journal.queued_mails()] == [
        "b.eml", "a.eml", "c.eml"]
    assert support.mode(journal.path("outbox")) == 0o700


def test_outbox_keeps_the_newest_fifty_mails(journal):
    for number in range(mission.OUTBOX_LIMIT + 5):
        journal.queue_mail(f"{number:03}", b"x")
        os.utime(journal.path("outbox", f"{number:03}.eml"),
                 (1000 + number, 1000 + number))
    names = [os.path.basename(path) for path in journal.queued_mails()]
    assert len(names) == mission.OUTBOX_LIMIT
    assert names[0] == "005.eml" and names[-1] == "054.eml"


def test_incomplete_mail_is_not_in_the_outbox(journal):
    journal.queue_mail("a", b"x")
    with open(journal.path("outbox", "b.eml.new"), "w") as file:
        file.write("half a ma")
    assert len(journal.queued_mails()) == 1


# --- the log of a run -----------------------------------------------------


@pytest.mark.parametrize("name, ours", [
    ("2026-03-29-02-00-00.txt", True), ("2026-03-29-02-00-00-2.txt", True),
    ("2026-03-29-02-00-00-17.txt", True), ("2026-03-29-02-00-00", False),
    ("2026-03-29-02-00-00.log", False), ("notes.txt", False),
    ("2026-03-29.txt", False), ("2026-03-29-02-00-00-2-3.txt", False),
    ("2026-03-29-02-00-00-.txt", False), ("x2026-03-29-02-00-00.txt", False),
    ("2026-03-29-02-00-0\u0660.txt", False), (".txt", False),
    ("2026-03-29-02-00-00-x.txt", False), ("", False),
    ("20260329-02-00-00-00-00.txt", False),
    ("1-2-3-4-5-6000000000000.txt", False),
])
def test_only_files_with_the_name_of_a_run_log_are_run_logs(name, ours):
    assert bool(re.fullmatch(mission.LOG_FILE, name)) is ours


def log_of(folder, at: float = 1774747800.0):
    log = mission.RunLog(FakeClock(), False)
    log.open(str(folder), at)
    return log


def test_run_log_is_a_new_file_that_only_the_runner_can_read(tmp_path):
    first, second = log_of(tmp_path), log_of(tmp_path)
    name = time.strftime("%Y-%m-%d-%H-%M-%S", time.localtime(1774747800))
    assert os.path.basename(first.path) == f"{name}.txt"
    assert os.path.basename(second.path) == f"{name}-2.txt"
    assert support.mode(first.path) == 0o600
    first.write("caf\u00e9 \udcff\n")
    with open(first.path, "rb") as file:
        assert file.read() == b"caf\xc3\xa9 \\udcff\n"


def test_planted_file_at_the_name_of_the_log_is_skipped(tmp_path):
    name = time.strftime("%Y-%m-%d-%H-%M-%S", time.localtime(1774747800))
    (tmp_path / f"{name}.txt").symlink_to(tmp_path / "victim")
    os.mkfifo(tmp_path / f"{name}-2.txt")
    assert log_of(tmp_path).path.endswith(f"{name}-3.txt")
    assert not (tmp_path / "victim").exists()


def prune(folder, current: str, keep: int) -> None:
    writer = types.SimpleNamespace(directory=os.open(folder, os.O_RDONLY))
    mission.LogWriter.prune(writer, current, keep)
    os.close(writer.directory)


def test_prune_removes_only_the_oldest_logs(tmp_path):
    logs = ["2030-01-01-00-00-00.txt", "2026-01-01-00-00-00.txt",
            "2026-01-01-00-00-00-2.txt", "2025-01-01-00-00-00.txt"]
    others = ["notes.txt", "2024-01-01-00-00-00.log", "2020.txt"]
    for place, name in enumerate(logs + others):
        (tmp_path / name).write_text("x")
        os.utime(tmp_path / name, (place, place))
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "keep").write_text("x")
    (tmp_path / "2020-01-01-00-00-00.txt").symlink_to(victim / "keep")
    (tmp_path / "2020-01-01-00-00-01.txt").mkdir()
    prune(tmp_path, logs[3], 2)             # the log of this run
    left = set(os.listdir(tmp_path))
    assert set(others) <= left and set(logs[2:]) <= left
    assert not set(logs[:2]) & left
    assert (victim / "keep").read_text() == "x"
    assert "2020-01-01-00-00-01.txt" in left


def test_prune_keeps_the_current_log_after_the_clock_was_set_back(tmp_path):
    names = ["2030-01-01-02-00-00.txt", "2030-01-02-02-00-00.txt",
             "2026-01-01-02-00-00.txt"]
    for name in names:
        (tmp_path / name).write_text("x")
        os.utime(tmp_path / name, (2e9, 2e9))
    os.utime(tmp_path / names[2], (1e9, 1e9))
    prune(tmp_path, names[2], 2)
    assert sorted(os.listdir(tmp_path)) == sorted(names[1:])


def test_log_on_a_full_disk_is_printed_to_stderr_up_to_a_limit(
        tmp_path, monkeypatch, capfd):
    log, clock = log_of(tmp_path), FakeClock()
    log.clock = clock
    good = log.file.ask
    full = [True]

    def ask(*request, **more):
        if full[0]:
            raise OSError(28, "No space left on device")
        return good(*request, **more)
    monkeypatch.setattr(log.file, "ask", ask)
    monkeypatch.setattr(mission, "SPILL_LIMIT", 25)
    log.write("first line\n")
    log.write("second line\n")
    log.write("third line\n")
    assert "No space left" in log.error and log.lost == 34
    err = capfd.readouterr().err
    assert "cannot write the log, so" in err and "first line\nsecond" in err
    assert "third line\n" not in err
    full[0] = False
    log.write("too early\n")            # it tries again after some seconds
    clock.time += mission.RETRY_LOG
    log.write("room again\n")
    with open(log.path) as file:
        text = file.read()
    assert "<<44 bytes of the log could not be written: No space" in text
    assert text.endswith("room again\n")


def test_a_missing_log_directory_does_not_crash(tmp_path, capfd):
    log = log_of(tmp_path / "gone")
    log.write("to stderr\n")
    assert log.error and log.path == ""
    assert "to stderr\n" in capfd.readouterr().err


# --- where the lock is ------------------------------------------------------


@pytest.mark.parametrize("home_exists", [True, False])
def test_lock_is_in_the_home_of_the_account_if_there_is_one(
        tmp_path, monkeypatch, home_exists):
    home = tmp_path / ("home" if home_exists else "missing")
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MISSION_STATE", str(tmp_path / "state"))
    monkeypatch.setattr(mission.os, "geteuid", lambda: 4242)
    monkeypatch.setattr(mission, "account_of", lambda _: mission.Account(
        "alice", 4242, 4242, str(home)))
    assert mission.lock_home() == str(
        home / ".local/state/mission" if home_exists else tmp_path / "state")


# --- metrics --------------------------------------------------------------


def test_earlier_signal_does_not_stop_the_writer_of_metrics(
        tmp_path, monkeypatch):
    """SIGTERM stopped the run; the child that writes must not end of it."""
    gate, path = tmp_path / "gate", tmp_path / "mission.prom"
    os.mkfifo(gate)
    processes = mission.Processes(mission.Clock())
    processes.stopped, processes.signals = signal.SIGTERM, 1
    looks = []

    def on_tick() -> None:
        looks.append(1)
        if len(looks) > 3:      # it was looked at, and still writes
            with contextlib.suppress(OSError):
                os.close(os.open(gate, os.O_WRONLY | os.O_NONBLOCK))

    real = mission.open_directory

    def slow(directory: str) -> int:
        os.close(os.open(gate, os.O_RDONLY))
        return real(directory)

    processes.on_tick = on_tick
    monkeypatch.setattr(mission, "open_directory", slow)
    monkeypatch.setattr(mission, "metrics_text", lambda *_: "all well\n")
    config = types.SimpleNamespace(
        metrics=types.SimpleNamespace(textfile=str(path)), path="m.json")
    mission.Delivery(config, processes).write_metrics({}, 0)
    assert path.read_text() == "all well\n"
