"""mission when things go wrong: kills, signals, full disks, power cuts.

What holds each time: no traceback, a documented status, and a next run that
does its work and commits it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

import support
from support import count_commits, git, is_alive, is_committed, must_git
import sweep

DOCUMENTED = {0, 1, 2, 74, 75, 78}
# FS_IOC_SHUTDOWN, nothing flushed: what was not synced is gone, and every
# later call fails with EIO until the file system is mounted again.
CUT = ("import fcntl, os, struct, sys\n"
       "fcntl.ioctl(os.open(sys.argv[1], 0), 0x8004587D, "
       "struct.pack('I', 2))\n")


def counted(scratch, name: str = "sync") -> Path:
    """A storage to commit, with an empty file `count` in its first commit."""
    return support.make_repository(scratch.storage(name, commit=True),
                                   file="count", text="")


def tallying(scratch, *slugs: str) -> Path:
    """Tasks that each add a line to a file of the repository."""
    folder = counted(scratch)
    for slug in slugs:
        scratch.task(slug, f'echo "{slug} ran"\n'
                     f'echo {slug} >> "$SYNC_DIR/count"')
    return folder


def waiting(scratch, slug: str = "slow", first: str = "") -> tuple:
    """A task that runs until its gate opens, and the file of its pid."""
    gate, pids = scratch.folder / f"{slug}.gate", scratch.folder / "pids"
    os.mkfifo(gate)
    scratch.task(slug, f'{first}\necho $$ >> "$PIDS"\nread x < "$GATE"\n'
                 'echo through',
                 env={"GATE": str(gate), "PIDS": str(pids)})
    return gate, pids


def in_task(pids: Path) -> int:
    """Wait for the waiting task to be there; its pid."""
    support.wait_until(lambda: pids.exists() and pids.read_text().endswith(
        "\n"), 20, "the task")
    return int(pids.read_text().split()[-1])


def silent(result) -> None:
    """All well, and nothing on stderr."""
    assert (result.code, result.err) == (0, ""), result


def told(result, word: str) -> None:
    """The closing line names it. Above it may stand the log, which has no
    other place left, but no traceback."""
    line = result.err.splitlines()[-1]
    assert line.startswith("mission: error: ") and word in line, result
    assert "Traceback" not in result.err + result.out, result


def at_most_the_loss(scratch, result) -> None:
    """A good run, but for the one warning that the last run was lost."""
    last = scratch.history()[-1]
    assert result.code in (0, 1) and "Traceback" not in result.err, result
    assert last["errors"] == 0 and last["warnings"] == result.code, last
    assert {task["outcome"] for task in last["tasks"]} == {"ok"}, last


def its_start(scratch) -> str:
    """Where the work of mission begins, in a trace of it: Python's own start
    is behind it. A child has read the configuration."""
    return f'"{next(scratch.state.glob("*/lock"))}", O_RDWR'


# Killed at any system call ---------------------------------------------------


def test_run_after_one_killed_at_any_system_call_succeeds(scratch):
    support.need("strace")
    folder = tallying(scratch, "one", "two")
    silent(scratch.headless())
    seen = Counter()

    def made_good(name, n, done):
        seen[done.returncode] += 1
        place = f"killed at {name} number {n}"
        assert done.returncode in (-signal.SIGKILL, 0), place
        before = (folder / "count").read_text().count("\n")
        again = scratch.headless(write=False)
        try:
            at_most_the_loss(scratch, again)
            assert (folder / "count").read_text().count("\n") == before + 2
            # A damaged repository stays damaged: the short form checks it
            # after each fourth kill, and at the end.
            if support.FULL or sum(seen.values()) % 4 == 0:
                silent(scratch.headless(write=False))
                assert is_committed(folder)
        except AssertionError as error:
            raise AssertionError(f"{place}: {error}\n{again}") from None

    # 32 points: the about 29 that change a file, and a few others.
    struck = sweep.sweep(
        scratch.command("run", "--headless"), None,
        300 if support.FULL else 32, made_good, after=its_start(scratch),
        env=scratch.env)
    # The calls of two runs differ a little (polls); few points may miss.
    assert seen[-signal.SIGKILL] >= 0.8 * struck > 20, seen
    silent(scratch.headless(write=False))
    assert is_committed(folder)


def test_kill_sweep_detects_a_naive_program(tmp_path):
    # One that makes its lock by existence and writes its state in place.
    support.need("strace")
    naive = ("import os, sys\n"
             "lock = os.open('lock', os.O_CREAT | os.O_EXCL)\n"
             "with open('state', 'w') as file: file.write('whole')\n"
             "os.unlink('lock')\n")
    command = [sys.executable, "-I", "-S", "-c", naive]
    found = []

    def judge(name, n, done):
        stuck, state = tmp_path / "lock", tmp_path / "state"
        text = state.read_text() if state.exists() else ""
        found.append((stuck.exists(), text))
        if stuck.exists():
            stuck.unlink()

    struck = sweep.sweep(command, None, None, judge, after='"lock"',
                         cwd=str(tmp_path), env={"PATH": os.defpath})
    assert struck == len(found) > 5
    assert (True, "") in found          # locked for ever, the state cut


# The n-th call fails ---------------------------------------------------------


# Python's own note of a signal to the pipe that wakes the runner: a pipe is
# never on a full disk.
WAKING = r'^write\(\d+, "\\21", 1\)'
FORKS = ("clone", "clone3", "vfork", "fork")


@pytest.mark.parametrize("syscalls, error", [
    (("openat",), "EMFILE"),
    (("openat",), "EIO"),
    (("write",), "ENOSPC"),
    (("write",), "EIO"),
    (("fsync", "fdatasync"), "EIO"),
    (("fsync", "fdatasync"), "ENOSPC"),
    (("rename", "renameat2"), "ENOSPC"),
    (("rename", "renameat2"), "EIO"),
    (FORKS, "EAGAIN"),
    (("pipe2",), "EMFILE"),
    (("flock",), "ENOLCK"),
    (("mkdir", "ftruncate", "unlink"), "EIO"),
], ids=lambda value: value if isinstance(value, str) else value[0])
def test_a_failing_call_never_ends_in_a_traceback_or_a_false_success(
        scratch, syscalls, error):
    support.need("strace")
    folder = tallying(scratch, "one", "two")
    silent(scratch.headless())

    def judge(name, n, done):
        err = done.stderr.decode("utf-8", "replace")
        place = f"{name} number {n} gave {error}: exit {done.returncode}"
        assert "Traceback" not in err, f"{place}\n{err}"
        assert done.returncode in DOCUMENTED, f"{place}\n{err}"
        assert bool(err) == bool(done.returncode), f"{place}\n{err}"
        if done.returncode == 0:
            last = scratch.history()[-1]
            assert last["log"] and Path(last["log"]).exists(), place
            log = Path(last["log"]).read_text()
            assert "one ran" in log and "two ran" in log, place
            assert "FinishTime" in log and is_committed(folder), place

    struck = sweep.sweep(
        scratch.command("run", "--headless"), syscalls,
        25 if support.FULL else 3, judge, blow=f"error={error}",
        after=its_start(scratch), env=scratch.env, but=WAKING)
    after = scratch.headless(write=False)
    at_most_the_loss(scratch, after)
    silent(scratch.headless(write=False))
    assert is_committed(folder)
    assert struck or syscalls[0] in ("flock", "mkdir")


# A lost run ------------------------------------------------------------------


def test_a_killed_run_is_reported_once_and_listed_as_lost(scratch):
    gate, pids = waiting(scratch)
    scratch.task("quick", "echo quick")
    process = scratch.start("run", "--headless")
    with support.stopping(process):
        task = in_task(pids)
        process.kill()
        process.wait()
    # What the task had said until the kill is in the log.
    assert "Task: Slow" in scratch.log()
    os.kill(task, signal.SIGKILL)
    again = scratch.mission("run", "-t", "quick")
    lost, last = scratch.history()[-2:]
    assert again.code == 1 and again.err.count("\n") == 1
    warning = [line for line in again.out.splitlines() if "WARN: " in line]
    assert len(warning) == 1, again
    assert lost["id"][:8] in warning[0] and "slow" in warning[0]
    assert (lost["result"], last["errors"], last["warnings"]) \
        == ("lost", 0, 1)
    assert "lost" in scratch.mission("history").out
    silent(scratch.mission("run", "-t", "quick"))
    assert [run["result"] for run in scratch.history()].count("lost") == 1


def test_task_that_outlived_its_runner_is_not_started_again(scratch):
    pids = scratch.folder / "pids"
    scratch.task("slow", """
        exec 9> ../busy
        flock -n 9 || { echo twice; exit 7; }
        [ -e ../go ] || { echo $$ >> "$PIDS"; exec sleep 300; }
        """, env={"PIDS": str(pids)})
    process = scratch.start("run", "--headless")
    with support.stopping(process):
        orphan = in_task(pids)
        process.kill()
        process.wait()
    try:
        assert is_alive(orphan)
        (scratch.tasks / "go").touch()
        result = scratch.mission("run")
        # Ended first, or left and this task not started: either is said.
        assert "twice" not in result.out, result
        assert re.search(rf"\b{orphan}\b", result.out), result
    finally:
        if is_alive(orphan):
            os.kill(orphan, signal.SIGKILL)


@support.root_only
@pytest.mark.parametrize("uid, starts", [(support.MALLORY_UID, True),
                                         (0, False)])
def test_variables_of_a_process_of_another_user_stop_no_task(
        scratch, uid, starts):
    """The run's id is in its mails, and any user can set a variable."""
    pids, go = scratch.folder / "pids", scratch.tasks / "go"
    scratch.task("slow", '[ -e ../go ] || { echo $$ >> "$PIDS"; '
                 "exec sleep 300; }", env={"PIDS": str(pids)})
    process = scratch.start("run", "--headless")
    with support.stopping(process):
        task = in_task(pids)
        process.kill()
        process.wait()
    os.kill(task, signal.SIGKILL)
    support.wait_until(lambda: not is_alive(task), 30, "the task's end")
    go.touch()
    (state,) = scratch.state.glob("*/current.json")
    imposter = subprocess.Popen(
        ["sleep", "300"], user=uid, group=uid, extra_groups=[], env={
            "PATH": os.environ["PATH"], "MISSION_TASK": "slow",
            "MISSION_RUN_ID": json.loads(state.read_text())["id"]})
    with support.stopping(imposter):
        result = scratch.mission("run")
    assert (str(imposter.pid) not in result.out) == starts, result
    assert (scratch.outcomes()["slow"] == "ok") == starts


@pytest.mark.parametrize("state", [
    b"", b"{", b"\0" * 512, b"[]", b"null", b'{"id": 7}', b"\xff\xfe",
    b'{"pid": "x", "id": [], "task": {"a": 1}, "started": null}',
    b"[" * 100000,
], ids=lambda state: repr(state[:12]))
def test_damaged_record_of_the_current_run_stops_no_task(scratch, state):
    scratch.task("hello", "echo hello")
    silent(scratch.mission("run"))
    folder = next(scratch.state.iterdir())
    (folder / "current.json").write_bytes(state)
    result = scratch.mission("run")
    at_most_the_loss(scratch, result)
    assert "hello" in result.out
    silent(scratch.mission("run"))
    for command in ("history", "log", "list"):
        assert "Traceback" not in scratch.mission(command).err


@pytest.mark.parametrize("torn", [
    b'{"id": "3f2a91bc", "start": "2026-11-2', b"\0" * 300, b"{}\n",
    b"null\n", b"\xff\n", b"[" * 100000 + b"\n", b'{"id": 1}\n',
    b'{"id": "x", "tasks": 3, "seconds": "long", "start": 1}\n',
], ids=lambda torn: repr(torn[:12]))
def test_incomplete_last_line_of_the_history_loses_only_that_line(
        scratch, torn):
    scratch.task("hello")
    silent(scratch.mission("run"))
    silent(scratch.mission("run"))
    file = next(scratch.state.glob("*/history.jsonl"))
    with open(file, "ab") as history:
        history.write(torn)
    for args in (["history"], ["history", "--json"], ["run", "--dry-run"]):
        result = scratch.mission(*args)
        assert result.code == 0 and "Traceback" not in result.err, result
    result = scratch.mission("run")
    assert result.code == 0, result
    told = json.loads(scratch.mission("history", "--json").out)
    assert [run["result"] for run in told].count("ok") == 3, told


# Signals ---------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT,
                                    signal.SIGHUP])
def test_signal_stops_the_task_and_skips_the_rest(scratch, number):
    folder = counted(scratch)
    gate, pids = waiting(
        scratch, first="trap 'echo cleaning up; exit 0' TERM\n"
        'echo half > "$SYNC_DIR/half"')
    scratch.task("never", "touch ../ran")
    scratch.task("late", "touch ../ran", post=True)
    process = scratch.start("run", "--headless")
    with support.stopping(process):
        task = in_task(pids)
        process.send_signal(number)
        # dash runs its trap when the read is interrupted.
        result = support.ended(process, 40)
    assert result.code in (128 + number, -number), result
    assert len(result.err.splitlines()) == 1, result
    assert not is_alive(task)
    assert not (scratch.tasks / "ran").exists()
    log, last = scratch.log(), scratch.history()[-1]
    assert number.name in log or str(int(number)) in log
    assert last["result"] == "stopped"
    done = {entry["slug"]: entry["outcome"] for entry in last["tasks"]}
    assert done["never"] == done["late"] == "skipped"
    for slug in ("never", "late"):
        assert re.search(rf"(?i)skipped.*\b{slug}\b|\b{slug}\b.*skipped",
                         log)
    # No commit of half a backup, and the next run has nothing to report.
    assert git(folder, "log", "--format=%s").out == "first\n"
    silent(scratch.mission("run", "-t", "never"))


def deaf(scratch) -> Path:
    """A task that records SIGTERM and continues; the file of its pid."""
    pids, heard = scratch.folder / "pids", scratch.folder / "heard"
    scratch.task("deaf", "trap '' INT HUP\n"
                 "trap 'echo TERM >> \"$HEARD\"' TERM\n"
                 "echo $$ >> \"$PIDS\"\nwhile :; do sleep 1; done",
                 env={"PIDS": str(pids), "HEARD": str(heard)})
    return pids


def test_a_second_signal_kills_at_once(scratch):
    pids = deaf(scratch)
    process = scratch.start("run")
    with support.stopping(process):
        task = in_task(pids)
        process.terminate()
        # Two signals at once would be one.
        support.wait_until((scratch.folder / "heard").exists, 20,
                           "the first SIGTERM to reach the task")
        assert process.poll() is None
        began = time.monotonic()
        process.terminate()
        result = support.ended(process)
    assert time.monotonic() - began < 8         # not the 10 s of the first
    assert result.code in (143, -15) and not is_alive(task)
    assert "Traceback" not in result.err


def test_a_task_that_ignores_sigterm_is_killed_later(scratch):
    pids = deaf(scratch)
    scratch.patch(TERM_TO_KILL=0.3)
    process = scratch.start("run")
    with support.stopping(process):
        task = in_task(pids)
        process.terminate()
        result = support.ended(process, 40)
    assert result.code in (143, -15) and not is_alive(task)


def test_ctrl_c_reaches_the_task_once_and_through_the_runner(scratch):
    # A terminal signals the whole foreground group; the task is not in it.
    seen = scratch.folder / "seen"
    gate, pids = waiting(scratch, first='trap \'echo int >> "$SEEN"\' INT\n'
                         'trap \'echo term >> "$SEEN"; exit 1\' TERM')
    scratch.config["tasks"][-1]["env"]["SEEN"] = str(seen)
    process = scratch.start("run", start_new_session=True)
    with support.stopping(process):
        in_task(pids)
        os.killpg(process.pid, signal.SIGINT)
        result = support.ended(process, 40)
    assert result.code in (130, -2), result
    assert seen.read_text() == "term\n"


@pytest.mark.parametrize("args", ["list", "list -v", "dump", "history",
                                  "--help", "completion bash", "log",
                                  "run --dry-run"])
def test_closed_pipe_causes_no_traceback(scratch, args):
    for number in range(300):
        scratch.task(f"t{number}", "echo x")
    scratch.config["tasks"][0]["scheduled"] = True
    for entry in scratch.config["tasks"][1:]:
        entry["scheduled"] = False
    scratch.headless()
    read, write = os.pipe()
    os.close(read)
    process = scratch.start(*args.split(), stdout=write)
    os.close(write)
    result = support.ended(process)
    assert "Traceback" not in result.err and "Exception" not in result.err
    assert result.code in DOCUMENTED | {-signal.SIGPIPE,
                                        128 + signal.SIGPIPE}, result


@pytest.mark.parametrize("sink", ["closed pipe", "/dev/full"])
def test_run_with_a_closed_pipe_still_runs_its_tasks(scratch, sink):
    folder = tallying(scratch, "one", "two")
    if sink == "/dev/full":
        out = os.open(sink, os.O_WRONLY)
    else:
        read, out = os.pipe()
        os.close(read)
    process = scratch.start("run", stdout=out)
    os.close(out)
    result = support.ended(process)
    assert (folder / "count").read_text() == "one\ntwo\n"
    assert is_committed(folder)
    assert count_commits(folder) == 2
    if sink == "closed pipe":       # only the copy that it read ends
        assert (result.code, result.err) == (0, "")
    else:
        assert result.code == 74, result
        told(result, "log")


def test_run_succeeds_with_closed_stdout_or_stderr(scratch):
    folder = tallying(scratch, "one")
    scratch.write()
    for closing in ("1>&-", "2>&-", "0<&- 1>&- 2>&-"):
        done = subprocess.run(
            ["sh", "-c", f'"$@" {closing}', "sh", *scratch.command("run")],
            env=scratch.env, stdout=subprocess.PIPE, timeout=60,
            stderr=subprocess.PIPE)
        assert done.returncode in (0, 74), (closing, done)
        assert b"Traceback" not in done.stdout + done.stderr
        # What mission opens must not become the task's or its own stdout.
        assert is_committed(folder)
    assert (folder / "count").read_text() == "one\n" * 3


# The lock --------------------------------------------------------------------


def test_second_run_reports_the_process_that_holds_the_lock(scratch):
    gate, pids = waiting(scratch)
    scratch.task("other", "touch ../ran")
    process = scratch.start("run")
    with support.stopping(process):
        in_task(pids)
        for args in (["run"], ["run", "--headless"], ["run", "-t", "other"],
                     ["run", "--wait", "1s"]):
            busy = scratch.mission(*args)
            assert busy.code == 75 and busy.out == "", busy
            assert [line.split(": ")[1] for line in busy.err.splitlines()
                    ] == ["error", "hint"], busy
            assert re.search(rf"\b{process.pid}\b", busy.err), busy
            assert re.search(r"\d\d:\d\d", busy.err), busy
            assert "slow" in busy.err, busy
        assert not (scratch.tasks / "ran").exists()
        for args in ("list", "check", "dump", "history", "run --dry-run"):
            assert scratch.mission(*args.split()).code == 0, args
        gate.write_text("x\n")
        assert support.ended(process).code == 0
    assert len(scratch.history()) == 1


def test_wait_takes_the_lock_when_it_is_free(scratch):
    gate, pids = waiting(scratch)
    scratch.task("other", "echo other")
    first = scratch.start("run", "-t", "slow")
    with support.stopping(first):
        in_task(pids)
        second = scratch.start("run", "-t", "other", "--wait", "60s")
        with support.stopping(second):
            with pytest.raises(subprocess.TimeoutExpired):
                second.wait(timeout=0.5)
            gate.write_text("x\n")
            assert support.ended(first).code == 0
            silent(support.ended(second))


def test_runs_started_together_never_overlap(scratch):
    scratch.task("one", "mkdir ../busy || exit 9\nsleep 0.2\nrmdir ../busy\n"
                 "echo x >> ../count")
    runs = [scratch.start("run") for _ in range(6)]
    results = [support.ended(process) for process in runs]
    codes = Counter(result.code for result in results)
    assert set(codes) <= {0, 75} and codes[0] >= 1, results
    assert (scratch.tasks / "count").read_text().count("x") == codes[0]


def test_leftover_lock_file_does_not_lock(scratch):
    scratch.task("hello")
    silent(scratch.mission("run"))
    lock = next(scratch.state.glob("*/lock"))
    assert support.mode(lock) & 0o077 == 0
    assert support.mode(lock.parent) == 0o700
    lock.write_text('{"pid": 1}')
    silent(scratch.mission("run"))


def test_process_left_by_a_task_does_not_hold_the_lock(scratch):
    pidfile = scratch.folder / "pid"
    scratch.task("daemon", 'setsid sh -c \'echo $$ > "$PIDFILE"; exec sleep '
                 '300\' >/dev/null 2>&1 &\nwhile ! [ -s "$PIDFILE" ]; do '
                 "sleep 0.05; done", env={"PIDFILE": str(pidfile)})
    scratch.task("hello")
    scratch.patch(GRACE=0.2)
    assert scratch.mission("run", "-t", "daemon").code in (0, 1)
    try:
        silent(scratch.mission("run", "-t", "hello"))
    finally:
        os.kill(int(pidfile.read_text()), signal.SIGKILL)


@support.root_only
def test_run_by_another_user_fails_with_permission_denied(alice, host):
    alice.task("hello", "touch ../ran")
    alice.write()
    home = host.home["mallory"]
    shutil.copy(support.ROOT / "mission.py", home)
    result = host.run(
        [support.SHARED_PYTHON, "-I", "-S", str(home / "mission.py"), "-c",
         str(alice.path), "run"], user=support.MALLORY,
        env={"PATH": os.environ["PATH"], "HOME": str(home)})
    assert result.code == 78 and "ermission" in result.err, result
    assert "Traceback" not in result.err
    assert not (alice.tasks / "ran").exists()


# git killed and locks left ---------------------------------------------------


def fake_git(scratch, script: str) -> None:
    """A git before the real one in PATH; "$GIT" is the real one."""
    scratch.stand_in("git", f"GIT={shutil.which('git')}\n{script}\n"
                     'exec "$GIT" "$@"')


@pytest.mark.parametrize("command, leaves", [
    ("add",    "index.lock"),
    ("commit", "index.lock"),
    ("commit", "HEAD.lock"),
    ("commit", "refs/heads/$BRANCH.lock"),
])
def test_killed_git_fails_one_run_and_not_the_next(scratch, command, leaves):
    folder = tallying(scratch, "one")
    branch = git(folder, "symbolic-ref", "--short", "HEAD").out.strip()
    lock = leaves.replace("$BRANCH", branch)
    path = scratch.env["PATH"]
    fake_git(scratch, f'case " $* " in *" {command} "*)\n'
             f'  touch "{folder}/.git/{lock}"; kill -9 $$;; esac')
    result = scratch.mission("run")
    assert result.code == 1 and len(result.err.splitlines()) == 1, result
    assert not is_committed(folder)
    scratch.env["PATH"] = path
    again = scratch.mission("run")
    assert again.code == 0, again
    assert is_committed(folder)
    assert git(folder, "show", "HEAD:count").out == "one\none\n"


def test_a_stale_lock_is_removed_and_logged(scratch):
    folder = tallying(scratch, "one")
    lock = folder / ".git" / "index.lock"
    lock.touch()
    os.utime(lock, (0, 0))
    result = scratch.mission("run")
    assert result.code == 0 and "index.lock" in result.out, result
    assert is_committed(folder) and not lock.exists()


def test_lock_of_a_running_git_is_not_removed(scratch):
    folder = tallying(scratch, "one")
    # A commit that waits for its editor holds index.lock, as in life.
    (folder / "staged").write_text("x")
    git(folder, "add", "staged")
    editor = scratch.folder / "editor"
    ready = scratch.folder / "ready"
    editor.write_text(f"#!/bin/sh\ntouch {ready}\nexec sleep 300\n")
    editor.chmod(0o755)
    process = subprocess.Popen(
        ["git", "-C", str(folder), "-c", "user.name=x", "-c",
         "user.email=x@localhost", "commit", "-a"], start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**scratch.env, "GIT_EDITOR": str(editor)})
    try:
        support.wait_until(ready.exists, 20, "the editor")
        lock = folder / ".git" / "index.lock"
        assert lock.exists()
        os.utime(lock, (0, 0))
        # Its clock is fast: the 30 s of waiting last one.
        scratch.patch("""
            ticks = k.Clock.ticks
            k.Clock.ticks = lambda self: 30 * ticks(self)
            """)
        result = scratch.mission("run", timeout=120)
        assert lock.exists() and process.poll() is None
        assert result.code == 1 and "index.lock" in result.out, result
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# Full disks and power cuts ---------------------------------------------------


class Disk:
    """A file system of the test's own, in a mount namespace that lives as
    long as the test; `see` reaches into it from outside."""

    def __init__(self, folder: Path, mount: str):
        self.folder, self.mount = folder, mount
        folder.mkdir()
        self.holder = subprocess.Popen(
            ["unshare", "-m", "sh", "-c",
             f"{mount} && echo && exec sleep 900"], stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL)
        if not self.holder.stdout.readline():
            support.absent(f"cannot mount here: {mount}")

    def command(self, command: list[str]) -> list[str]:
        return ["nsenter", "-r", "-m", "-t", str(self.holder.pid), *command]

    def run(self, command: list[str], **options) -> support.Result:
        done = subprocess.run(self.command(command), timeout=60,
                              stdin=subprocess.DEVNULL, **options,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        return support.Result(done.returncode, done.stdout.decode(),
                              done.stderr.decode())

    def see(self, path: Path) -> Path:
        return Path(f"/proc/{self.holder.pid}/root{path}")

    def cut(self) -> None:
        """Take the power away, now."""
        self.run([sys.executable, "-c", CUT, str(self.folder)])

    def back(self) -> None:
        """Mount it again: the journal is replayed."""
        support.wait_until(lambda: self.run(
            ["umount", str(self.folder)]).code == 0, 20, "umount")
        done = self.run(["sh", "-c", self.mount])
        assert done.code == 0, done


@pytest.fixture
def disk(request, tmp_path):
    """A Disk at tmp_path/disk, mounted by the test's parameter."""
    support.need("unshare", "nsenter")
    if "mkfs.ext4" in request.param:
        support.need("mkfs.ext4")
    disk = Disk(tmp_path / "disk", request.param.format(
        folder=tmp_path / "disk", image=tmp_path / "image"))
    with support.stopping(disk.holder):
        yield disk


EXT4 = ("{{ [ -e {image} ] || {{ truncate -s 32M {image} && "
        "mkfs.ext4 -q -F {image}; }}; }} && "
        "mount -o loop,commit=600 {image} {folder}")


def tmpfs(size: str):
    return pytest.mark.parametrize(
        "disk", [f"mount -t tmpfs -o size={size} tmpfs {{folder}}"],
        indirect=True, ids=[size])


@pytest.fixture
def on_disk(scratch, disk):
    """A backup whose repository, logs and state are on the disk."""
    support.need("git")
    scratch.host = disk
    place = disk.folder
    for name in ("sync", "logs", "state"):
        disk.run(["mkdir", str(place / name)])
    scratch.config["storage"]["sync"] = {"path": str(place / "sync"),
                                         "commit": True}
    scratch.config["storage"]["logs"] = {"path": str(place / "logs")}
    scratch.state = disk.see(place / "state")
    scratch.env["MISSION_STATE"] = str(place / "state")
    scratch.task("one", 'date +%N >> "$SYNC_DIR/count"\necho "one ran"')
    for args in ("init -q", "commit -q --allow-empty -m first"):
        must_git(place / "sync", *args.split(), host=disk)
    disk.run(["sync"])
    return scratch


def whole_again(scratch, disk) -> None:
    """After the power cut: git is sound and the next two runs do well."""
    sync = disk.folder / "sync"
    fsck = git(sync, "fsck", "--full", host=disk)
    assert fsck.code == 0, fsck
    at_most_the_loss(scratch, scratch.headless())
    assert is_committed(sync, host=disk)
    silent(scratch.headless())
    assert is_committed(sync, host=disk)


@support.root_only
@pytest.mark.parametrize("disk", [
    EXT4, EXT4.replace("commit=600", "commit=600,noauto_da_alloc")],
    indirect=True, ids=["ext4", "noauto_da_alloc"])
def test_commit_of_a_run_survives_a_power_cut(on_disk, disk):
    support.need("mkfs.ext4")
    for _ in range(3 if support.FULL else 1):
        silent(on_disk.headless())
        sync = disk.folder / "sync"
        head = git(sync, "rev-parse", "HEAD", host=disk).out
        last = on_disk.history()[-1]
        disk.cut()
        disk.back()
        assert git(sync, "rev-parse", "HEAD", host=disk).out == head
        assert is_committed(sync, host=disk)
        # So did its log and its entry in the history.
        assert on_disk.history()[-1] == last
        assert "one ran" in disk.see(Path(last["log"])).read_text()
        whole_again(on_disk, disk)


@support.root_only
@pytest.mark.parametrize("disk", [EXT4], indirect=True, ids=["ext4"])
@pytest.mark.parametrize("when", ["before add", "after add", "in commit",
                                  "after commit"])
def test_power_cut_during_the_commit_leaves_a_valid_repository(
        on_disk, disk, when):
    support.need("mkfs.ext4")
    cut = f"{sys.executable} -c \"$CUT\" {disk.folder}"
    place, command = when.split()
    arms = {"before": f"{cut}",
            "after": f'"$GIT" "$@"; status=$?; {cut}; exit $status',
            "in": f'"$GIT" "$@" & sleep 0.004; {cut}; wait $!; exit $?'}
    fake_git(on_disk, f"CUT='{CUT}'\n".replace("'I'", "\"I\"")
             + f'case " $* " in *" {command} "*) {arms[place]};; esac')
    path = on_disk.env["PATH"]
    for _ in range(2 if support.FULL else 1):
        on_disk.env["PATH"] = path
        result = on_disk.headless()
        assert result.code in (1, 74), result
        assert "Traceback" not in result.err
        on_disk.env["PATH"] = os.environ["PATH"]
        disk.back()
        whole_again(on_disk, disk)


@support.root_only
@pytest.mark.parametrize("disk", [EXT4], indirect=True, ids=["ext4"])
def test_a_power_cut_during_a_task_is_reported_by_the_next_run(on_disk,
                                                               disk):
    support.need("mkfs.ext4")
    fifo = on_disk.folder / "gate"
    os.mkfifo(fifo)
    on_disk.task("slow", f"echo ready > {fifo}; read x < {fifo}")
    silent(on_disk.mission("run", "-t", "one"))
    process = on_disk.start("run", "--headless")
    with support.stopping(process):
        assert fifo.read_text() == "ready\n"
        disk.cut()
        process.kill()
        process.wait()
        fifo.write_text("x\n")      # the task ends, and frees the disk
    disk.back()
    result = on_disk.mission("run", "-t", "one")
    assert result.code == 1 and "slow" in result.out, result
    assert on_disk.history()[-2]["result"] == "lost"
    silent(on_disk.mission("run", "-t", "one"))


@support.root_only
@tmpfs("64k")
def test_full_log_directory_stops_no_task(scratch, disk):
    folder = tallying(scratch, "one")
    scratch.task("much", "seq 100000; echo done > ../done")
    scratch.task("two", 'echo two >> "$SYNC_DIR/count"')
    scratch.config["storage"]["logs"]["path"] = str(disk.folder)
    scratch.host = disk
    result = scratch.headless()
    assert result.code == 74, result
    told(result, "log")
    assert (folder / "count").read_text() == "one\ntwo\n"
    assert is_committed(folder)
    assert (scratch.tasks / "done").exists()
    last = scratch.history()[-1]
    assert {task["outcome"] for task in last["tasks"]} == {"ok"}
    # The same with no room for the log's name even.
    disk.run(["sh", "-c", f"cat /dev/zero > {disk.folder}/filler"])
    assert scratch.headless().code == 74
    assert is_committed(folder)


@support.root_only
@pytest.mark.parametrize("disk", [
    f"mount -t tmpfs -o size=3m,{more} tmpfs {{folder}}"
    for more in ("mode=755", "nr_inodes=24")], indirect=True,
    ids=["no space", "no inode"])
def test_mail_is_sent_with_a_full_root_file_system(scratch, disk):
    """State, storage and temporary files are on one file system, which the
    task fills, as a single root file system would be."""
    mails, place = scratch.keep_mail(start=False), disk.folder
    for name in ("state", "out", "tmp"):
        disk.run(["mkdir", "-m", "1777" if name == "tmp" else "755",
                  str(place / name)])
    scratch.host = disk
    scratch.env.update(MISSION_STATE=str(place / "state"),
                       TMPDIR=str(place / "tmp"))
    scratch.state = disk.see(place / "state")
    scratch.config["storage"]["out"] = {"path": str(place / "out")}
    scratch.task("a", 'i=0; while touch "$OUT_DIR/$i" 2>/dev/null; do\n'
                 'i=$((i + 1)); [ $i -lt 99 ] || break; done\n'
                 'cat /dev/zero >> "$OUT_DIR/0" 2>/dev/null; true')
    scratch.task("b", "echo b")
    result = scratch.headless()
    assert result.code in (0, 74), result
    assert len(list(mails.iterdir())) == 1
    assert scratch.headless("-t", "b").code == 74       # full from the start
    assert len(list(mails.iterdir())) == 2
    disk.run(["sh", "-c", f"rm {place}/out/*"])
    result = scratch.headless("-t", "b")
    assert (result.code, result.err) == (0, ""), result     # nothing is lost
    assert len(list(mails.iterdir())) == 3


@support.root_only
@tmpfs("1m")
def test_full_repository_fails_only_its_commit(scratch, disk):
    other = tallying(scratch, "one")
    full = disk.folder
    scratch.config["storage"]["full"] = {"path": str(full), "commit": True}
    scratch.host = disk
    assert git(full, "init", "-q", host=disk).code == 0
    scratch.task("fill", 'head -c 700000 /dev/urandom > "$FULL_DIR/big"')
    result = scratch.mission("run")
    assert result.code == 1 and len(result.err.splitlines()) == 1, result
    assert re.search("(?i)no space", result.out), result
    assert is_committed(other)
    assert git(other, "log", "--format=%s").out.count("\n") == 2
    # With room again the next run commits it all.
    disk.run(["mount", "-o", "remount,size=8m", str(full)])
    result = scratch.mission("run")
    assert result.code == 0, result
    assert is_committed(full, host=disk)


@support.root_only
@tmpfs("64k")
def test_a_full_state_directory_is_reported_and_stops_no_task(scratch, disk):
    folder = tallying(scratch, "one", "two")
    scratch.host = disk
    scratch.env["MISSION_STATE"] = str(disk.folder)
    scratch.state = disk.see(disk.folder)
    silent(scratch.mission("run"))
    disk.run(["sh", "-c", f"cat /dev/zero > {disk.folder}/filler"])
    result = scratch.mission("run")
    assert result.code == 74, result
    told(result, "No space left")
    assert (folder / "count").read_text() == "one\ntwo\n" * 2
    assert is_committed(folder)
    disk.run(["rm", str(disk.folder / "filler")])
    at_most_the_loss(scratch, scratch.mission("run"))


@support.root_only
@tmpfs("64k")
def test_a_read_only_state_directory_is_reported(scratch, disk):
    scratch.task("one", "echo one")
    scratch.host = disk
    scratch.env["MISSION_STATE"] = str(disk.folder)
    disk.run(["mount", "-o", "remount,ro", str(disk.folder)])
    result = scratch.mission("run")
    assert result.code in DOCUMENTED - {0} and result.err, result
    assert "Traceback" not in result.err


def test_a_lack_of_file_descriptors_is_reported(scratch):
    folder = tallying(scratch, "one")
    scratch.write()
    for limit in (4, 6, 8, 10, 12, 16):
        done = subprocess.run(
            ["sh", "-c", f'ulimit -n {limit}; exec "$@"', "sh",
             *scratch.command("run")], env=scratch.env, timeout=60,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE)
        assert done.returncode in DOCUMENTED, (limit, done)
        assert done.returncode == 0 or done.stderr, (limit, done)
        if done.returncode == 0:
            assert is_committed(folder)
    assert done.returncode == 0, done           # 16 are enough
