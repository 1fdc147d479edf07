"""koid under systemd, or under another manager that does what systemd does:
readiness, the journal, places that cannot be written."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest

import dashboard_rig
import support
from support import wait_until

koitab = support.load("koitab")


@pytest.fixture
def koi(tmp_path):
    koi = support.Koi(tmp_path)
    yield koi
    koi.stop()
    koi.end_jobs()


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path):
    """A socket on which a manager of services waits, and NOTIFY_SOCKET."""
    name = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        if request.param == "path":
            sock.bind(name)
        else:
            sock.bind("\0" + name)
            name = "@" + name
        sock.settimeout(30)
        yield sock, name


def test_koid_is_ready_when_it_answers(koi, manager):
    sock, name = manager
    koi.tab('"it" @manual env\n')
    koi.spawn(NOTIFY_SOCKET=name)
    assert sock.recv(100) == b"READY=1"
    assert koi.ask("status")["daemon"]      # at the first try
    assert b"NOTIFY_SOCKET" not in koi.run("it")[1]
    koi.stop()
    assert sock.recv(100) == b"STOPPING=1"


def test_koid_that_cannot_start_is_not_ready(koi, manager):
    sock, name = manager
    koi.home.chmod(0o755)
    assert koi.spawn(NOTIFY_SOCKET=name).wait(30) == 1
    sock.setblocking(False)
    with pytest.raises(BlockingIOError):
        sock.recv(100)


def test_the_dashboard_is_ready_when_it_listens(tmp_path, manager):
    sock, name = manager
    dashboard = dashboard_rig.DashboardProcess(
        tmp_path / "dashboard", prefix=("env", f"NOTIFY_SOCKET={name}"))
    with dashboard:
        assert sock.recv(100) == b"READY=1"
    with dashboard:
        assert sock.recv(100) == b"READY=1"
        dashboard.stop()
        assert sock.recv(100) == b"STOPPING=1"


@support.root_only
def test_every_line_is_in_the_journal_once(koi, tmp_path):
    """systemd connects stderr with the journal, and the journal is also what
    reads the lines for syslog."""
    support.need("unshare")
    log = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    log.bind(str(tmp_path / "log"))
    log.settimeout(30)
    ours, theirs = socket.socketpair()
    with log, ours, theirs:
        status = os.fstat(theirs.fileno())
        script = (
            'mount --rbind /dev devices && mount -t tmpfs tmpfs /dev && '
            'for it in null zero random urandom; do touch /dev/$it && '
            'mount --bind devices/$it /dev/$it || exit; done; '
            'ln -s /proc/self/fd /dev/fd; ln -s "$PWD/log" /dev/log; '
            'exec "$@"')
        (tmp_path / "devices").mkdir()
        koi.tab("")
        process = subprocess.Popen(
            ["unshare", "-m", "sh", "-c", script, "sh",
             *koi.command("daemon")], stdin=subprocess.DEVNULL,
            stdout=theirs, stderr=theirs, cwd=str(tmp_path), env={
                **koi.env,
                "JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"})
        theirs.close()
        with support.stopping(process):
            line = log.recv(500).decode()
            assert line.rstrip("\0").endswith(
                f": koid {koitab.VERSION}: 0 jobs")
            process.terminate()
            process.wait(30)
        assert ours.recv(500) == b""        # nothing on stderr


def test_log_lines_are_printed_to_stderr_without_a_journal(koi):
    koi.tab("")
    koi.start(JOURNAL_STREAM="1:2")
    wait_until(lambda: f"koid: koid {koitab.VERSION}: 0 jobs\n" in koi.log(),
               10, "a line")


# --- places that cannot be written ------------------------------------------

@support.root_only
def test_unwritable_directory_is_named(tmp_path):
    """A read-only /run has no room for cron's PID file, a read-only state
    directory names the variable that moves it."""
    host = support.Host(tmp_path)
    host.setup += ["mount -t tmpfs -o ro tmpfs /run",
                   "mount -t tmpfs -o ro tmpfs /var/lib"]
    koid = support.program("koitab") + ["daemon", "--system"]
    path = {"PATH": os.environ["PATH"], "HOME": "/root"}
    done = host.run(koid, env=path)
    assert done.code == 1
    assert done.err.splitlines() == [
        "koitab: error: /var/lib/koi: Read-only file system",
        "koitab: hint: set KOI_HOME to another directory"]
    done = host.run(koid, env={**path, "KOI_HOME": str(tmp_path / "koi")})
    assert (done.code, done.err) == (
        1, "koitab: error: /run/crond.pid: Read-only file system\n")


@support.root_only
def test_a_backup_by_root_finds_the_database_of_the_unit(tmp_path):
    made = tmp_path / "lib/koi-dashboard"
    made.mkdir(parents=True)
    with dashboard_rig.DashboardProcess(tmp_path / "dashboard",
                                        db=str(made / "dashboard.db")) as it:
        pass
    host = support.Host(tmp_path)
    host.bind(tmp_path / "lib", "/var/lib")
    command = support.program("koitab") + [
        "dashboard", "--backup", str(tmp_path / "copy.db")]
    path = {"PATH": os.environ["PATH"], "HOME": "/root"}
    done = host.run(command, env=path)
    assert (done.code, done.out, done.err) == (0, "", "")
    assert Path(tmp_path / "copy.db").read_bytes()[:6] == b"SQLite"
    it.db.unlink()
    done = host.run(command, env=path)
    assert (done.code, done.err.splitlines()[0]) == (
        1, "koitab: error: /var/lib/koi-dashboard/dashboard.db does not exist")
