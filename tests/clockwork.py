"""Debian's cron and koid side by side, under one clock that we move.

`run` starts this file in a namespace of its own: nothing outside is seen or
changed, and all that it starts ends with it. There both daemons are given
the same lines and, by libfaketime, the same clock. The clock stands still
until we set it, so a slow machine changes nothing: what is started before
both daemons sleep again was started in that minute.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PYTHON = "/usr/bin/python3"
MOUNTS = """
mount -t tmpfs tmpfs "$1" && mkdir "$1/etc" "$1/spool" && : > "$1/empty" &&
mount -t tmpfs tmpfs /run && mount -t tmpfs tmpfs /dev/shm &&
mount --bind "$1/etc" /etc/cron.d && mount --bind "$1/empty" /etc/crontab &&
mount --bind "$1/spool" /var/spool/cron/crontabs &&
exec "$2" -IS "$3"
"""
PATIENCE = 60           # seconds until a daemon that hangs is given up
PAUSE = 0.001           # between two looks at what cannot be selected on


def run(folder: Path, zone: str, lines: list[str], walls: list[int],
        koitab: Path | None) -> dict:
    """What each daemon started: {"cron": [[line, instant], ..], "koid": ..}.

    `walls` are the instants that the clock shows, one after the other;
    `lines` are times without a command, numbered from 1."""
    folder.mkdir()
    order = {"folder": str(folder), "zone": zone, "lines": lines,
             "walls": walls, "koitab": koitab and str(koitab)}
    done = subprocess.run(
        ["unshare", "-m", "-p", "-f", "--kill-child", "--mount-proc", "sh",
         "-c", MOUNTS, "sh", str(folder), PYTHON, str(Path(__file__))],
        input=json.dumps(order).encode(), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, timeout=10 * PATIENCE)
    if done.returncode:
        raise AssertionError(done.stderr.decode("utf-8", "replace"))
    return json.loads(done.stdout)


class Daemon:
    """A daemon under the clock, and the pipe its jobs write to."""

    def __init__(self, name: str, command: list[str], folder: Path,
                 env: dict):
        self.name, self.notes = name, folder / f"{name}.notes"
        self.errors = folder / f"{name}.errors"
        with open(self.errors, "wb") as errors:
            self.process = subprocess.Popen(
                command, env=env, cwd="/", stdin=subprocess.DEVNULL,
                stdout=errors, stderr=errors)
        self.pid = self.process.pid
        self.starts: list[list[int]] = []

    def open(self) -> None:
        # With a writer of our own there is never an end of the file.
        self.fd = os.open(self.notes, os.O_RDWR | os.O_NONBLOCK)
        fcntl.fcntl(self.fd, fcntl.F_SETPIPE_SZ, 2**20)

    def heed(self, wall: int) -> int:
        """Note what its jobs have written; how many that were."""
        try:
            lines = os.read(self.fd, 2**20).split()
        except BlockingIOError:
            return 0
        self.starts += [[int(line), wall] for line in lines]
        return len(lines)

    def wait(self, question, what: str):
        """Ask until the answer is true."""
        deadline = time.monotonic() + PATIENCE
        while True:
            answer = question()
            if answer:
                return answer
            code = self.process.poll()
            if code is not None or time.monotonic() > deadline:
                raise SystemExit(
                    f"{self.name} {what}; exit {code}\n"
                    f"{self.errors.read_text()}\n{processes()}")
            select.select([], [], [], PAUSE)


class Cron(Daemon):
    """It sleeps until the next minute, and ten seconds between two minutes
    that it makes up for. Any signal ends a sleep early."""

    def asleep(self) -> bool:
        """It sleeps, and no job is left: children come before a sleep."""
        try:
            wchan = Path(f"/proc/{self.pid}/wchan").read_text()
        except OSError:
            return False
        return "nanosleep" in wchan and not children(self.pid)

    def naps(self) -> int:
        """How often it has gone to sleep."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])

    def ready(self) -> None:
        self.wait(self.asleep, "does not fall asleep")

    def turn(self, wall: int) -> None:
        """Wake it until it starts nothing more."""
        started = True
        while started:
            naps = self.naps()
            os.kill(self.pid, signal.SIGHUP)
            self.wait(lambda: self.naps() > naps and self.asleep(),
                      "does not go back to sleep")
            started = self.heed(wall)


class Koid(Daemon):
    """It looks at the clock whenever it wakes, and a request wakes it."""

    def __init__(self, name, command, folder, env):
        self.socket = f"{env['KOI_HOME']}/koid.sock"
        super().__init__(name, command, folder, env)

    def ask(self) -> dict:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(PATIENCE)
            connection.connect(self.socket)
            connection.sendall(b'{"op": "status"}\n')
            with connection.makefile("rb") as replies:
                return json.loads(replies.readline())

    def answers(self) -> bool:
        try:
            return bool(self.ask())
        except OSError:
            return False

    def ready(self) -> None:
        self.wait(self.answers, "does not answer")

    def idle(self) -> bool:
        return not self.ask()["running"] and not children(self.pid)

    def turn(self, wall: int) -> None:
        """Ask it, so that it looks; and wait until nothing runs."""
        started = True
        while started:
            self.ask()
            self.wait(self.idle, "is never done")
            started = self.heed(wall)


def children(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return ""


def processes() -> str:
    """All of the namespace, for somebody who looks for a fault."""
    done = subprocess.run(["ps", "-eo", "pid,ppid,stat,wchan:20,args"],
                          stdout=subprocess.PIPE, check=False)
    return done.stdout.decode("utf-8", "replace")


class Stage:
    """The folder, the clock and the tabs of one run."""

    def __init__(self, folder: str, zone: str, lines: list[str],
                 walls: list[int], koitab: str | None):
        self.folder, self.walls = Path(folder), walls
        self.lines, self.koitab = lines, koitab
        self.clock, self.home = self.folder / "clock", self.folder / "home"
        self.env = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root",
            "TZ": zone, "KOI_HOME": str(self.home),
            "LD_PRELOAD": "/usr/$LIB/faketime/libfaketime.so.1",
            "FAKETIME_TIMESTAMP_FILE": str(self.clock),
            "FAKETIME_FMT": "%s", "FAKETIME_NO_CACHE": "1",
            "NO_FAKE_STAT": "1"}

    def set(self, wall: int) -> None:
        """One second after the minute: Debian's cron wakes then."""
        new = self.folder / "clock.new"
        new.write_text(str(wall + 1))
        new.rename(self.clock)

    def tab(self, name: str, path: Path) -> None:
        os.mkfifo(self.folder / f"{name}.notes", 0o666)
        head = f"NOTES={self.folder}/{name}.notes\n"
        path.write_text(head + "".join(
            f"{line} echo {number} >> $NOTES\n"
            for number, line in enumerate(self.lines, 1)))
        path.chmod(0o600)

    def daemons(self):
        self.tab("cron", self.folder / "spool" / "root")
        yield Cron("cron", ["cron", "-f"], self.folder, self.env)
        if self.koitab:
            (self.home / "tabs").mkdir(parents=True, mode=0o700)
            self.home.chmod(0o700)
            self.tab("koid", self.home / "tabs" / "root")
            yield Koid("koid", [PYTHON, "-IS", self.koitab, "daemon"],
                       self.folder, self.env)

    def play(self) -> dict:
        self.set(self.walls[0])
        daemons = list(self.daemons())
        for daemon in daemons:
            daemon.open()
            daemon.ready()
        for wall in self.walls[1:]:
            self.set(wall)
            for daemon in daemons:
                daemon.turn(wall)
        return {daemon.name: daemon.starts for daemon in daemons}


def main() -> None:
    """What `unshare` starts: process 1 of the namespace."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    stage = Stage(**json.load(sys.stdin))
    json.dump(stage.play(), sys.stdout)


if __name__ == "__main__":
    main()
