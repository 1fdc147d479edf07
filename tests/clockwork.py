"""koid under a clock that only a test moves: alone (StillClock), or next to
Debian's cron (run).

koid reads its clock only when it wakes, so a busy machine changes nothing:
one turn of koid has one time, and koid decides all that follows from that
time before it sleeps again.

`run` starts this file in its own namespace: nothing outside is seen or
changed, and all that it starts ends with it. There both daemons are given
the same lines and the same clock (cron by libfaketime). What is started
before both daemons sleep again was started in that minute.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
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
# For support.program: Clock shows what is in the file {clock!r} since koid
# last woke. After it are the turns that koid has made, and the ticks until
# which it sleeps. The descriptor is kept: koid may have no other left. The
# numbers are there twice, because a read may see half of a write.
STILL = """
import os
file = os.open({clock!r}, os.O_RDWR)
shown = []

def look():
    numbers = os.pread(file, 200, 0).split()
    while numbers[:2] != numbers[2:]:
        numbers = os.pread(file, 200, 0).split()
    shown[:] = map(float, numbers[:2])

class Poll:
    turns = 0

    def __init__(self, poller):
        self.poller = poller

    def __getattr__(self, name):
        return getattr(self.poller, name)

    def poll(self, timeout=-1):
        self.turns += 1
        until = shown[1] + timeout / 1000 if timeout >= 0 else 2.0**40
        os.pwrite(file, b"%20d %20.3f" % (self.turns, until), 200)
        try:
            return self.poller.poll(timeout)
        finally:
            look()

def init(daemon, *args, init=k.Daemon.__init__):
    init(daemon, *args)
    daemon.poller.poll = Poll(daemon.poller.poll)

look()
k.Daemon.__init__ = init
k.Clock.now = lambda self: shown[0]
k.Clock.ticks = lambda self: shown[1]
"""
MINUTE = 60
PATIENCE = 60           # seconds until a daemon that hangs is given up
PAUSE = 0.001           # between two looks at what cannot be selected on


def show(clock: Path, wall: float, ticks: float) -> None:
    """Write what the clock shows, in place."""
    fd = os.open(clock, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    os.pwrite(fd, f"{wall!r} {ticks!r} {wall!r} {ticks!r}".ljust(
        200).encode(), 0)
    os.close(fd)


def show_faked(clock: Path, wall: int) -> None:
    """Write what the clock of a program under libfaketime shows."""
    new = clock.with_suffix(".new")
    new.write_text(f"{wall}\n")
    new.rename(clock)


def faked(clock: Path) -> dict[str, str]:
    """The environment of a program with that clock."""
    return {"LD_PRELOAD": "/usr/$LIB/faketime/libfaketime.so.1",
            "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_FMT": "%s",
            "FAKETIME_NO_CACHE": "1", "NO_FAKE_STAT": "1"}


def read_sleep(clock: Path) -> tuple[int, float]:
    """How many turns koid has made, and until which ticks it sleeps."""
    turns, until = clock.read_bytes()[200:].split()
    return int(turns), float(until)


class StillClock:
    """The wall clock and the monotonic clock of one koid of a test's. They
    stand still, but for these methods; the jobs have the machine's."""

    def __init__(self, koi):
        self.koi, self.file = koi, koi.folder / "clock"
        self.wall, self.ticks = 0.0, 1000.0
        show(self.file, self.wall, self.ticks)
        koi.patch += STILL.format(clock=str(self.file))

    def start(self, wall: float, *wrap: str, wait: bool = True,
              **env: str) -> None:
        """Start koid at that time."""
        self.set(wall)
        start = self.koi.start if wait else self.koi.spawn
        start(wrap=wrap, **{"TZ": "UTC0", **env})

    def set(self, wall: float) -> None:
        """Set the clock as an administrator does; no time passes."""
        self.move(wall - self.wall, 0.0)

    def shift(self, seconds: float) -> None:
        """Set the clock, by `seconds`."""
        self.move(seconds, 0.0)

    def elapse(self, seconds: float) -> None:
        """Time passes."""
        self.move(seconds, seconds)

    def elapse_to(self, wall: float) -> None:
        self.elapse(wall - self.wall)

    def move(self, wall: float, ticks: float) -> None:
        """koid is woken, as the kernel would wake it."""
        self.wall, self.ticks = self.wall + wall, self.ticks + ticks
        show(self.file, self.wall, self.ticks)
        if self.koi.daemon and self.koi.daemon.poll() is None:
            self.koi.daemon.send_signal(signal.SIGCHLD)

    def seen(self) -> None:
        """Wait until koid has looked at the clock and has started what is
        due: it does so before it answers."""
        self.koi.ask("status")

    def turns(self) -> int:
        return read_sleep(self.file)[0]

    def sleep(self) -> float:
        """For how long koid wants to sleep, in seconds."""
        return read_sleep(self.file)[1] - self.ticks


def run(folder: Path, zone: str, lines: list[str], walls: list[int],
        command: list[str], sleeper: bool) -> dict:
    """What each daemon started: {"cron": [[line, instant], ..], "koid": ..}.

    `walls` are the instants that the clock shows, one after the other, a
    minute apart unless it is set; `lines` are times without a command,
    numbered from 1. `command` starts koitab, with STILL on folder/koid.clock.
    Is koid a `sleeper`, it is not woken each minute, but when it would wake
    by itself."""
    folder.mkdir()
    order = {"folder": str(folder), "zone": zone, "lines": lines,
             "walls": walls, "command": command, "sleeper": sleeper}
    done = subprocess.run(
        ["unshare", "-m", "-p", "-f", "--kill-child", "--mount-proc", "sh",
         "-c", MOUNTS, "sh", str(folder), PYTHON, str(Path(__file__))],
        input=json.dumps(order).encode(), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, timeout=10 * PATIENCE)
    if done.returncode:
        raise AssertionError(done.stderr.decode("utf-8", "replace"))
    return json.loads(done.stdout)


# In the namespace ------------------------------------------------------------


class Sleeper:
    """A daemon under a stopped clock.

    A signal that it does not mind ends its sleep early: it looks at the
    clock, and starts what is due. Then it sleeps again, in the call `rest`.
    """

    def __init__(self, process: subprocess.Popen, rest: str,
                 errors: Path | None = None):
        self.process, self.rest, self.errors = process, rest, errors
        self.pid = process.pid
        self.wait(self.asleep, "does not fall asleep")

    def of_process(self, name: str) -> str:
        return Path(f"/proc/{self.pid}/{name}").read_text()

    def asleep(self) -> bool:
        """It rests, and no job is left: jobs are started before a rest."""
        return self.rest in self.of_process("wchan") \
            and not self.of_process(f"task/{self.pid}/children")

    def rests(self) -> int:
        """Return how often it went to sleep without a signal."""
        _, _, count = self.of_process("status").partition(
            "\nvoluntary_ctxt_switches:")
        return int(count.split()[0])

    def wake(self) -> None:
        rests = self.rests()
        os.kill(self.pid, signal.SIGCHLD)
        self.wait(lambda: self.rests() > rests and self.asleep(),
                  "does not go back to sleep")

    def wait(self, question, what: str) -> None:
        """Ask until the answer is true."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self.process.poll() is None:
            if question():
                return
            select.select([], [], [], PAUSE)
        processes = subprocess.run(
            ["ps", "-eo", "pid,ppid,stat,wchan:20,args"], check=False,
            stdout=subprocess.PIPE).stdout.decode("utf-8", "replace")
        raise AssertionError(
            f"{self.process.args} {what}; exit {self.process.poll()}\n"
            f"{self.errors.read_text() if self.errors else ''}\n{processes}")


class Daemon(Sleeper):
    """One of the two, and the pipe its jobs write to."""

    def __init__(self, name: str, rest: str, command: list[str],
                 folder: Path, env: dict):
        self.starts: list[list[int]] = []
        # With our own writer there is never an end of the file.
        self.notes = os.open(folder / f"{name}.notes",
                             os.O_RDWR | os.O_NONBLOCK)
        fcntl.fcntl(self.notes, fcntl.F_SETPIPE_SZ, 2**20)
        errors = folder / f"{name}.errors"
        with open(errors, "wb") as file:
            super().__init__(subprocess.Popen(
                command, env=env, cwd="/", stdin=subprocess.DEVNULL,
                stdout=file, stderr=file), rest, errors)

    def turn(self, wall: int) -> None:
        """Wake it until it starts nothing more. Between two minutes that it
        makes up for, cron sleeps for ten seconds."""
        self.wake()
        while self.heed(wall):
            self.wake()

    def heed(self, wall: int) -> bool:
        """Note what its jobs have written, if they have."""
        try:
            lines = os.read(self.notes, 2**20).split()
        except BlockingIOError:
            return False
        self.starts += [[int(line), wall] for line in lines]
        return True


class Stage:
    """The directory, the clock and the daemons of one run."""

    def __init__(self, folder: str, zone: str, lines: list[str],
                 walls: list[int], command: list[str], sleeper: bool):
        self.folder, self.walls, self.lines = Path(folder), walls, lines
        self.command, self.sleeper = command, sleeper
        self.clock, self.home = self.folder / "clock", self.folder / "home"
        self.koids = self.folder / "koid.clock"
        self.env = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root",
            "TZ": zone, "KOI_HOME": str(self.home)}
        self.faked = {**self.env, **faked(self.clock)}

    def set(self, ticks: int, wall: int) -> None:
        """Let both clocks show this. libfaketime knows no other ticks."""
        show_faked(self.clock, wall)
        show(self.koids, wall, ticks)

    def tab(self, name: str, path: Path) -> None:
        os.mkfifo(self.folder / f"{name}.notes")
        path.write_text(f"NOTES={self.folder}/{name}.notes\n" + "".join(
            f"{line} echo {number} >> $NOTES\n"
            for number, line in enumerate(self.lines, 1)))
        path.chmod(0o600)

    def start_cron(self) -> Daemon:
        self.tab("cron", self.folder / "spool" / "root")
        return Daemon("cron", "nanosleep", ["cron", "-f"], self.folder,
                      self.faked)

    def start_koid(self) -> Daemon:
        (self.home / "tabs").mkdir(parents=True, mode=0o700)
        self.home.chmod(0o700)
        self.tab("koid", self.home / "tabs" / "root")
        return Daemon("koid", "poll", [*self.command, "daemon"], self.folder,
                      self.env)

    def play(self) -> dict:
        """Minute by minute. When somebody sets the clock, in the middle of
        a minute, the kernel tells koid. Cron does not notice until it wakes;
        Debian's does that one second after the minute."""
        self.set(0, self.walls[0])
        cron, koid = self.start_cron(), self.start_koid()
        for turn, wall in enumerate(self.walls[1:], 1):
            ticks = turn * MINUTE
            if wall != self.walls[turn - 1] + MINUTE:
                self.set(ticks - 30, wall - 30)
                koid.turn(wall - MINUTE)
            self.set(ticks, wall)
            if not self.sleeper or self.wakes(ticks):
                koid.turn(wall)
            self.set(ticks + 1, wall + 1)
            cron.turn(wall)
        return {"cron": cron.starts, "koid": koid.starts}

    def wakes(self, ticks: int) -> bool:
        """Has koid slept as long as it wanted to?"""
        return read_sleep(self.koids)[1] <= ticks


if __name__ == "__main__":
    json.dump(Stage(**json.load(sys.stdin)).play(), sys.stdout)
