#!/usr/bin/env python3
"""How koi compares: schedules with libraries, koid with other daemons.

    sudo python3 tests/bench/koi.py [--quick] [--only NAME] [--peers A,B]

The machine is noisy, so what counts are ratios within one run: of pairs of
deeds in turn (A B A B ...), or of daemons one after the other. Each row says
what is wanted and what was measured; nothing here fails. What can be had of
cronsim, croniter, croniter-rs and yacron (PyPI), cron (as installed), cronie
and busybox-static (Debian, unpacked) and supercronic (PATH, or by `go
install`) is put into a scratch directory; the output says what could not.

    next      200 expressions, 100 starts each, against the libraries
    idle      a daemon with 1,000 entries of which none comes: memory,
              wake-ups, processor time; all of them at the same time
    late      start lateness, the time that a job writes minus its minute,
              with 1, 100 and 1,000 jobs in each minute; one daemon at a
              time. The floor is posix_spawn of sh and date by one process.
              Then one job among 1,000 and 5,000 that are not due
    claim     what KOI_ONE_OF adds to the lateness of a start, with one
              member of etcd on this machine, and to the processor time
    hold      what watches a job that continues: its memory, for 1 job and
              100; all daemons at the same time
    many      koid's memory over 10,000 runs
    gush      1 GB of output: time against `cat`, memory of what reads it

All but the first need root, for cron in a mount namespace of its own.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import ctypes
import datetime
import importlib.util
import itertools
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ["cronsim", "croniter", "croniter-rs"]
STARTS, BEGIN = 100, 1735689600     # 2025-01-01 00:00 UTC
GIGABYTE = 1_000_000_000
SUPERCRONIC = "github.com/aptible/supercronic@latest"
READY_BY = 35       # the last second of a minute at which a daemon may start
AFTER = 25          # seconds until which all jobs of a minute should be done
LOOK = 0.02         # seconds between two looks at a process
PR_SET_CHILD_SUBREAPER = 36


def row(name: str, wanted: str, measured: str, note: str = "") -> None:
    print(f"{name:<35} {wanted:<16} {measured:<16} {note}".rstrip(),
          flush=True)


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


# --- next: schedules against libraries ------------------------------------


def koitab():
    spec = importlib.util.spec_from_file_location("koitab",
                                                  ROOT / "koitab.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def expressions() -> list[str]:
    """200 of the vectors that all peers can read and that do run."""
    import croniter_rs
    lines = (ROOT / "tests/cases/fires.tsv").read_text().splitlines()
    specs = dict.fromkeys(line.split("\t")[0] for line in lines
                          if line[0] not in "#@" and "never" not in line)
    good = []
    for spec in specs:
        try:
            found = croniter_rs.croniter(spec, float(BEGIN), float)
            for _ in range(STARTS):
                found.get_next()
        except Exception:       # it has errors of its own for each reason
            continue
        good.append(spec)
    return good[:200]


def rated(name: str, wanted: str, pairs: int, count: int, ours, theirs
          ) -> None:
    """The median ratio of the pairs, and both as a number per second."""
    times = []
    ours(), theirs()
    for operation in [ours, theirs] * pairs:
        began = time.perf_counter()
        operation()
        times.append(time.perf_counter() - began)
    mine, others = times[::2], times[1::2]
    ratio = statistics.median(b / a for a, b in zip(mine, others))
    row(name, wanted, f"{ratio:.2f}",
        f"ours {count / statistics.median(mine):,.0f}/s, "
        f"theirs {count / statistics.median(others):,.0f}/s")


def drain(iterators) -> None:
    for iterator in iterators:
        for _ in itertools.islice(iterator, STARTS):
            pass


def asked(schedules, zone) -> None:
    """Each start asked for with the one before, as a daemon does."""
    for schedule in schedules:
        after = BEGIN
        for _ in range(STARTS):
            after = schedule.next(after, zone)


def asked_of(specs, make) -> None:
    for spec in specs:
        follow = make(spec)
        for _ in range(STARTS):
            follow()


def compare(pairs: int) -> None:
    """All rows of `next`; this runs in the venv."""
    import cronsim
    koi, specs = koitab(), expressions()
    print(f"{len(specs)} expressions, Python {sys.version.split()[0]}")
    utc = datetime.datetime.fromtimestamp(BEGIN, datetime.timezone.utc)
    compare_parsing(pairs, koi, specs, utc)
    compare_starts(pairs, koi, specs, utc)
    name = "Europe/Berlin"      # which has summer time
    zone, info = koi.Machine().zone(name), __import__("zoneinfo")
    when = datetime.datetime.fromtimestamp(BEGIN, info.ZoneInfo(name))
    schedules = [koi.Schedule.parse(spec) for spec in specs]
    rated("zone: next / cronsim", "at least 5", pairs, len(specs) * STARTS,
          lambda: asked(schedules, zone),
          lambda: asked_of(specs, lambda spec: cronsim.CronSim(
              spec, when).__next__))


def compare_parsing(pairs: int, koi, specs, utc) -> None:
    """No memory of the time before; `first` asks for a start as well."""
    import croniter_rs
    import cronsim
    parse, many = koi.Schedule.parse, len(specs)
    rated("parse / cronsim", "at least 1", pairs, many,
          lambda: [parse(spec) for spec in specs],
          lambda: [cronsim.CronSim(spec, utc) for spec in specs])
    rated("parse / croniter-rs", "", pairs, many,
          lambda: [parse(spec) for spec in specs],
          lambda: [croniter_rs.croniter(spec, float(BEGIN), float)
                   for spec in specs])
    rated("first / cronsim", "", pairs, many,
          lambda: [parse(spec).next(BEGIN) for spec in specs],
          lambda: [next(cronsim.CronSim(spec, utc)) for spec in specs])


def compare_starts(pairs: int, koi, specs, utc) -> None:
    """`next` is asked for each start, `stream` is one iterator."""
    import croniter
    import croniter_rs
    import cronsim
    schedules = [koi.Schedule.parse(spec) for spec in specs]
    many = len(specs) * STARTS

    def ours():
        asked(schedules, koi.UTC)

    def stream():
        drain(schedule.iter_starts(BEGIN) for schedule in schedules)

    def rust(spec):
        return croniter_rs.croniter(spec, float(BEGIN), float)

    rated("next / cronsim", "at least 5", pairs, many, ours,
          lambda: asked_of(specs, lambda spec: cronsim.CronSim(
              spec, utc).__next__))
    rated("next / croniter", "", max(pairs // 3, 1), many, ours,
          lambda: asked_of(specs, lambda spec: croniter.croniter(
              spec, float(BEGIN), float).get_next))
    rated("next / croniter-rs", "", pairs, many, ours,
          lambda: asked_of(specs, lambda spec: rust(spec).get_next))
    rated("stream / croniter-rs", "more than 1", pairs, many, stream,
          lambda: drain(rust(spec) for spec in specs))
    rated("stream / cronsim", "", pairs, many, stream,
          lambda: drain(cronsim.CronSim(spec, utc) for spec in specs))


# --- processes, as /proc shows them ---------------------------------------


def status_of(pid: int, field: str, path: str = "status") -> int:
    """A number of /proc/PID/status or the like; 0 when it is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/{path}").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1])
    return 0


def tasks_of(pid: int) -> list[str]:
    with contextlib.suppress(OSError):
        return [f"{pid}/task/{task}"
                for task in os.listdir(f"/proc/{pid}/task")]
    return []


def wakes_of(pid: int) -> int:
    """How often its threads went to sleep by themselves."""
    return sum(status_of(task, "voluntary_ctxt_switches")
               for task in tasks_of(pid))


def seconds_of(pid: int) -> float:
    """The processor time of its threads, in nanoseconds' precision."""
    return sum(int(Path(f"/proc/{task}/schedstat").read_text().split()[0])
               for task in tasks_of(pid)) / 1e9


def pss_of(pid: int) -> int:
    """Its memory (kB), with a fair part of what it shares."""
    return status_of(pid, "Pss", "smaps_rollup")


def below(pid: int) -> list[int]:
    """All processes that descend from one."""
    found = []
    for task in tasks_of(pid):
        with contextlib.suppress(OSError):
            for child in Path(f"/proc/{task}/children").read_text().split():
                found += [int(child), *below(int(child))]
    return found


def runs_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/exe")
    return ""


def adopt_orphans() -> None:
    """Let what the daemons leave behind be ours, to be counted and ended."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_all() -> None:
    """End and reap all that we started, and what they started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in below(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + 8
        while below(os.getpid()) and time.monotonic() < deadline:
            time.sleep(0.1)
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass


def children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# --- the daemons ----------------------------------------------------------

# Cron knows no other directories, so it gets these for itself.
CRON_ROOM = """\
mount -t tmpfs -o mode=1730 tmpfs /var/spool/cron/crontabs
mount -t tmpfs tmpfs /etc/cron.d
mount -t tmpfs tmpfs /run
if [ -e /etc/crontab ]; then
    : > /run/crontab
    mount --bind /run/crontab /etc/crontab
fi
cp "$1" /var/spool/cron/crontabs/root
chmod 0600 /var/spool/cron/crontabs/root
shift
exec "$@"
"""


class Entry(NamedTuple):
    when: str
    command: str


class Start(NamedTuple):
    """How a daemon is started; it is ready when a path is there."""
    argv: list
    env: dict = {}
    ready: Path | None = None


def write_tab(path: Path, entries: list[Entry]) -> Path:
    """As crontab(5). What does not know \\% as a percent sign hands the
    backslash to sh, which takes it away."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(
        f"{when} {command}\n".replace("%", "\\%")
        for when, command in entries))
    path.chmod(0o600)
    return path


class Peers:
    """Where the daemons are, and how each of them is started. A method
    that returns None could not find its own; `why` then tells."""

    def __init__(self, folder: Path, python: Path, script: Path):
        self.folder, self.python, self.script = folder, python, script
        self.why, self.found = {}, {}

    def unpacked(self, package: str, *names: str) -> str:
        """A program of a Debian package that is not installed."""
        if package not in self.found:
            self.found[package] = self.unpack(package, names)
        return self.found[package]

    def unpack(self, package: str, names) -> str:
        room = self.folder / package
        room.mkdir()
        done = subprocess.run(["apt-get", "download", "-q", package],
                              cwd=room, stdout=subprocess.DEVNULL,
                              stderr=subprocess.PIPE, text=True)
        for deb in room.glob("*.deb"):
            subprocess.run(["dpkg", "-x", deb, room], check=True)
        for name in names:
            if os.access(room / name, os.X_OK):
                return str(room / name)
        self.why[package] = (done.stderr.strip().splitlines() or [
            "not in its package"])[-1]
        return ""

    def koid(self, room: Path, entries) -> Start:
        home = room / "home"
        home.mkdir(mode=0o700)
        (home / "tabs").mkdir(mode=0o700)
        write_tab(home / "tabs" / "root", entries)
        return Start([self.script, "daemon"], {"KOI_HOME": str(home)},
                     home / "koid.sock")

    def group(self, room: Path, entries) -> Start:
        """koid, whose jobs are those of a group, and a member of etcd."""
        named = [Entry(f'"{number}" {entry.when}', entry.command)
                 for number, entry in enumerate(entries)]
        start = self.koid(room, named)
        tab = room / "home" / "tabs" / "root"
        tab.write_text("KOI_ONE_OF=bench\nCRON_TZ=UTC\n" + tab.read_text())
        peer = ETCD.replace("20790", "20791")
        etcd = f"etcd --data-dir {room}/etcd --listen-client-urls {ETCD} " \
            f"--advertise-client-urls {ETCD} --listen-peer-urls {peer} " \
            f"--initial-advertise-peer-urls {peer} --initial-cluster " \
            f"default={peer} --log-level error"
        return start._replace(argv=[
            "/bin/sh", "-c", f'{etcd} & exec "$@"', "sh", *start.argv,
            "--etcd", ETCD, "--etcd-insecure"])

    def in_a_room(self, room: Path, entries, *argv: str) -> Start:
        tab = write_tab(room / "tab", entries)
        return Start(["unshare", "-m", "--propagation", "private",
                      "/bin/sh", "-ec", CRON_ROOM, "sh", tab, *argv])

    def cron(self, room: Path, entries) -> Start | None:
        binary = shutil.which("cron", path="/usr/sbin:/sbin")
        if not binary:
            self.why["cron"] = "apt-get install cron"
            return None
        return self.in_a_room(room, entries, binary, "-f")

    def cronie(self, room: Path, entries) -> Start | None:
        binary = self.unpacked("cronie", "usr/sbin/crond", "usr/sbin/cron",
                               "usr/sbin/cronie")
        return binary and self.in_a_room(room, entries, binary, "-n")

    def busybox(self, room: Path, entries) -> Start | None:
        binary = self.unpacked("busybox-static", "bin/busybox",
                               "usr/bin/busybox")
        if not binary:
            self.why["busybox"] = self.why["busybox-static"]
            return None
        write_tab(room / "tabs" / "root", entries)
        return Start([binary, "crond", "-f", "-l", "9", "-L", "/dev/null",
                      "-c", room / "tabs"])

    def supercronic(self, room: Path, entries) -> Start | None:
        binary = shutil.which("supercronic") or self.built()
        if not binary:
            self.why["supercronic"] = "not on PATH, nor by go install"
            return None
        tab = write_tab(room / "tab", entries)
        return Start([binary, "-quiet", tab])

    def built(self) -> str:
        if "supercronic" not in self.found and shutil.which("go"):
            subprocess.run(["go", "install", SUPERCRONIC],
                           env={**os.environ, "GOBIN": str(self.folder)},
                           stderr=subprocess.DEVNULL)
            self.found["supercronic"] = shutil.which(
                "supercronic", path=str(self.folder))
        return self.found.get("supercronic") or ""

    def yacron(self, room: Path, entries) -> Start | None:
        binary = self.python.with_name("yacron")
        if not binary.exists():
            self.why["yacron"] = "pip could not install it"
            return None
        tab = room / "yacron.yaml"
        tab.write_text("jobs:\n" + "".join(
            f"  - name: job{n}\n    command: {json.dumps(entry.command)}\n"
            f"    schedule: {json.dumps(entry.when)}\n"
            for n, entry in enumerate(entries)))
        return Start([binary, "-l", "ERROR", "-c", tab])


ETCD = "http://127.0.0.1:20790"
DAEMONS = ("koid", "cron", "cronie", "busybox", "supercronic", "yacron")
# p50 / p99 at 1, 100 and 1,000 jobs in ms, on an idle machine with 2 cores;
# the floor was 529 / 1,095 at 1,000. For peers that are hard to have.
EARLIER = {"cronie": "53 / 60, 325 / 657, 1,470 / 2,911 ms (2.7 x floor); "
                     "2.7 MB, a wake-up a minute",
           "supercronic": "21 / 63, 72 / 153, 684 / 1,524 ms (1.4 x floor); "
                          "20.9 MB, none"}
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Bench:
    """The peers that could be had, and a scratch directory for each start."""

    def __init__(self, folder: Path, peers: Peers, names, minutes: int):
        self.folder, self.peers, self.minutes = folder, peers, minutes
        self.rooms = itertools.count()
        self.names = [name for name in names
                      if getattr(peers, name)(self.room(), [])]
        for name in names:
            if name not in self.names:
                row(f"{name}: not measured", "", "", peers.why[name])
                if name in EARLIER:
                    row("", "", "", f"earlier: {EARLIER[name]}")

    def room(self) -> Path:
        room = self.folder / f"room{next(self.rooms)}"
        room.mkdir()
        return room

    def start(self, name: str, entries: list[Entry]) -> int:
        """Start a daemon; its pid, once it is ready."""
        room = self.room()
        start = getattr(self.peers, name)(room, entries)
        with open(room / "log", "wb") as log:
            process = subprocess.Popen(
                start.argv, env={"PATH": PATH, "HOME": "/root", **start.env},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, cwd="/")
        deadline = time.monotonic() + 20
        while start.ready and not start.ready.exists() \
                and process.poll() is None and time.monotonic() < deadline:
            time.sleep(LOOK)
        time.sleep(0.5)
        if process.poll() is not None:
            print((room / "log").read_text(errors="replace")[-2000:])
            raise SystemExit(f"bench: {name} ended: {process.returncode}")
        process.returncode = 0          # end_all will reap it
        return process.pid


def next_minute() -> int:
    """The next minute for which there is time to start a daemon."""
    if time.time() % 60 > READY_BY:
        time.sleep(60.01 - time.time() % 60)
    return int(time.time()) // 60 * 60 + 60


# --- idle: 1,000 entries of which none comes ------------------------------


class Look(NamedTuple):
    at: float
    wakes: int
    seconds: float

    @classmethod
    def of(cls, pid: int) -> Look:
        return cls(time.time(), wakes_of(pid), seconds_of(pid))


def quiet_entries(count: int = 1000) -> list[Entry]:
    """Entries that are half a year away."""
    month = (time.localtime().tm_mon + 5) % 12 + 1
    return [Entry(f"{n % 60} {n // 60 % 24} 3,{n % 28 + 1} {month} *",
                  f"/usr/local/bin/backup --of host{n} > /dev/null")
            for n in range(count)]


def idle(bench: Bench) -> None:
    """They sleep, so they do not disturb each other."""
    pids = {name: bench.start(name, quiet_entries()) for name in bench.names}
    time.sleep(20)
    before = {name: Look.of(pid) for name, pid in pids.items()}
    time.sleep(60 * max(bench.minutes, 2))
    for name, pid in pids.items():
        idle_row(name, pid, before[name], Look.of(pid))
    end_all()


def idle_row(name: str, pid: int, before: Look, after: Look) -> None:
    minutes = (after.at - before.at) / 60
    ours = name == "koid"
    row(f"idle: wake-ups a minute, {name}", "none" if ours else "",
        f"{(after.wakes - before.wakes) / minutes:.1f}",
        f"CPU {(after.seconds - before.seconds) / minutes * 1e3:,.1f} ms a "
        "minute")
    row(f"idle: memory, {name}", "at most 16 MB" if ours else "",
        f"{status_of(pid, 'VmRSS') / 1024:.1f} MB",
        f"Pss {pss_of(pid) / 1024:.1f} MB, peak "
        f"{status_of(pid, 'VmHWM') / 1024:.1f} MB")


# --- late: when do jobs start? --------------------------------------------


class Late(NamedTuple):
    """What a daemon did with a number of jobs a minute."""
    times: list             # seconds after the minute, in order
    due: int
    cpu: float              # seconds a minute, of the daemon and its jobs

    def at(self, part: float) -> float:
        """The lateness (ms) that so large a part was below."""
        if not self.times:
            return float("nan")
        place = max(int(len(self.times) * part + 0.999999) - 1, 0)
        return self.times[place] * 1e3

    def text(self) -> str:
        return f"{self.at(.5):,.0f} / {self.at(.99):,.0f} ms"


def date_job(out: Path, number: int) -> str:
    """The comment makes each its own job, for koi."""
    return f"date +%s.%N >> {out} # {number}"


def lateness(out: Path, jobs: int, minutes: int, cpu: float) -> Late:
    lines = out.read_text().split() if out.exists() else []
    return Late(sorted(float(line) % 60 for line in lines), jobs * minutes,
                cpu / minutes)


def came(out: Path) -> int:
    return out.read_bytes().count(b"\n") if out.exists() else 0


def late_of(bench: Bench, name: str, jobs: int, others: int = 0) -> Late:
    """Start a daemon, let it have its minutes, and end it. `others` are
    entries that are not due."""
    first, out = next_minute(), bench.room() / "out"
    last = first + 60 * (bench.minutes - 1)
    before = children_seconds()
    bench.start(name, [Entry("* * * * *", date_job(out, n))
                       for n in range(jobs)] + quiet_entries(others))
    time.sleep(max(last + 1 - time.time(), 0))
    while time.time() < last + AFTER and \
            came(out) < jobs * bench.minutes:
        time.sleep(0.5)
    time.sleep(2)           # what writes down the end has some time, too
    end_all()
    return lateness(out, jobs, bench.minutes, children_seconds() - before)


def floor_of(bench: Bench, jobs: int) -> Late:
    """What nobody can beat with one process: start sh, which starts date."""
    first, out = next_minute(), bench.room() / "out"
    before = children_seconds()
    commands = [date_job(out, n) for n in range(jobs)]
    for minute in range(bench.minutes):
        time.sleep(max(first + 60 * minute - time.time(), 0))
        pids = [os.posix_spawn("/bin/sh", ["sh", "-c", command],
                               {"PATH": PATH}) for command in commands]
        for pid in pids:
            os.waitpid(pid, 0)
    return lateness(out, jobs, bench.minutes, children_seconds() - before)


WANTED_LATE = {1: "p50 under 20 ms", 100: "", 1000: "p99 under 1.5 s"}


def late(bench: Bench) -> None:
    for jobs in WANTED_LATE:
        floor = floor_of(bench, jobs)
        late_row(jobs, "floor", floor, floor, None)
        ours = None
        for name in bench.names:
            found = late_of(bench, name, jobs)
            late_row(jobs, name, found, floor, ours)
            ours = found if name == "koid" else ours
    late_among_others(bench)


def late_among_others(bench: Bench) -> None:
    """One job among entries that are not due must not wait for them."""
    floor = floor_of(bench, 1)
    for others in (1000, 5000):
        for name in bench.names:
            if name in ("koid", "cron"):
                found = late_of(bench, name, 1, others)
                row(f"late: 1 job among {others:,}, {name}",
                    "p50 under 15 ms" if name == "koid" else "",
                    f"{found.at(.5):,.0f} ms",
                    f"floor {floor.at(.5):,.0f} ms, {len(found.times)} of "
                    f"{found.due} starts")


def late_row(jobs: int, name: str, found: Late, floor: Late,
             ours: Late | None) -> None:
    note = f"p50 / p99, {found.at(.99) / floor.at(.99):.2f} x floor"
    if ours:
        note += f", {found.at(.99) / ours.at(.99):.2f} x koid"
    note += f", CPU {found.cpu:.1f} s a minute"
    if len(found.times) != found.due:
        note += f"; {len(found.times):,} OF {found.due:,} STARTS"
    row(f"late: {plural(jobs, 'job')}, {name}",
        WANTED_LATE[jobs] if name == "koid" else "", found.text(), note)


# --- claim: what does a group cost? ---------------------------------------


def claim(bench: Bench) -> None:
    for jobs in (1, 100, 1000):
        alone = late_of(bench, "koid", jobs)
        shared = late_of(bench, "group", jobs)
        row(f"claim: {plural(jobs, 'job')} a minute", "",
            f"{shared.at(.5) - alone.at(.5):+,.0f} / "
            f"{shared.at(.99) - alone.at(.99):+,.0f} ms",
            f"p50 / p99; in a group {shared.text()}, alone {alone.text()}; "
            f"koi-claims and etcd: {shared.cpu - alone.cpu:.1f} s CPU a "
            f"minute; {len(shared.times):,} of {shared.due:,} starts")


# --- hold: what watches a job that continues? -------------------------------


def hold(bench: Bench) -> None:
    """They sleep, so they do not disturb each other."""
    for jobs in (1, 100):
        first = next_minute()
        entries = [Entry("* * * * *", f"exec sleep {60 + n / 1e3}")
                   for n in range(jobs)]
        pids = {name: bench.start(name, entries) for name in bench.names}
        alone = {name: pss_of(pid) for name, pid in pids.items()}
        time.sleep(first + AFTER - time.time())
        for name, pid in pids.items():
            hold_row(name, pid, jobs, alone[name])
        end_all()


def hold_row(name: str, pid: int, jobs: int, alone: int) -> None:
    """The daemon's own image, wherever it runs: what a fork has become is
    no longer its memory."""
    family = below(pid)
    sleeping = sum(runs_of(child).endswith("sleep") for child in family)
    watchers = [child for child in family if runs_of(child) == runs_of(pid)]
    sizes = [pss_of(child) / 1024 for child in watchers]
    whole = pss_of(pid) / 1024 + sum(sizes)
    row(f"hold: {plural(jobs, 'job')}, {name}", "",
        f"{whole - alone / 1024:.1f} MB more",
        f"in all {whole:.1f} MB (Pss) with {plural(len(sizes), 'watcher')}"
        + (f" of {statistics.median(sizes):.1f} MB" if sizes else "")
        + ("" if sleeping == jobs else f"; {sleeping} OF {jobs} STARTED"))


# --- many: memory over 10,000 runs ----------------------------------------

MANY = 10_000


def many(bench: Bench) -> None:
    """Run one job 10,000 times, by eight callers at a time. What koid keeps
    of ended runs would show as growth."""
    if "koid" not in bench.names:
        return
    pid = bench.start("koid", [Entry('"True" @manual', "true")])
    os.environ["KOI_HOME"] = str(max(
        bench.folder.glob("*/home/koid.sock"), key=os.path.getmtime).parent)
    koi = koitab()
    client = koi.DaemonClient(koi.Machine())

    def run_once(_: int) -> None:
        _, connection, _ = client.attach("True", {})
        with connection:
            while connection.recv(65536):
                pass

    sizes = []
    with concurrent.futures.ThreadPoolExecutor(8) as callers:
        for _ in range(10):
            list(callers.map(run_once, range(MANY // 10)))
            sizes.append(status_of(pid, "VmRSS") / 1024)
    del os.environ["KOI_HOME"]
    row("many: koid's memory after 1,000 and 10,000 runs", "no growth",
        f"{sizes[0]:.1f} / {sizes[-1]:.1f} MB",
        f"{sizes[-1] / sizes[0]:.2f} times")
    end_all()


# --- gush: 1 GB of output -------------------------------------------------

OUTPUTS = {
    "lines of 200 bytes": f"yes {'x' * 199} | head -c {GIGABYTE}",
    "one line": f"head -c {GIGABYTE} /dev/zero | tr '\\0' x",
}


def gush(bench: Bench) -> None:
    if "koid" not in bench.names:
        return
    for name, script in OUTPUTS.items():
        began = time.perf_counter()
        subprocess.run(["/bin/sh", "-c", f"{{ {script}; }} | cat > "
                        "/dev/null"], check=True)
        gushed(bench, name, script, time.perf_counter() - began)


def gushed(bench: Bench, name: str, script: str, bare: float) -> None:
    """The peak memory of the job's parent, which is there until the end."""
    first, out = next_minute(), bench.room() / "out"
    at = time.localtime(first)
    pid = bench.start("koid", [Entry(
        f"{at.tm_min} {at.tm_hour} * * *", f"echo $PPID >> {out}; date "
        f"+%s.%N >> {out}; {script}; date +%s.%N >> {out}")])
    peak = 0
    while time.time() < first + 300 and came(out) < 3:
        if came(out):
            parent = int(out.read_text().split()[0])
            peak = max(peak, status_of(parent, "VmHWM"))
        time.sleep(LOOK)
    words = out.read_text().split() if came(out) == 3 else ["", "nan", "nan"]
    took = float(words[2]) - float(words[1])
    row(f"gush: 1 GB, {name} / cat", "", f"{took / bare:.1f}",
        f"{took:.2f} s, cat {bare:.2f} s")
    row(f"gush: 1 GB, {name}, peak", "", f"{peak / 1024:.1f} MB",
        f"koid {status_of(pid, 'VmHWM') / 1024:.1f} MB")
    end_all()


# --- what was typed -------------------------------------------------------

FIGURES = {figure.__name__: figure for figure in (idle, late, claim, hold,
                                                    many, gush)}


def make_venv(folder: Path, python: str) -> Path:
    """A venv with the libraries, and yacron if it can be had."""
    subprocess.run([python, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    for packages, must in ((LIBRARIES, True), (["yacron"], False)):
        subprocess.run([python, "-m", "pip", "install", "-q", *packages],
                       check=must, stderr=subprocess.DEVNULL)
    return python


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="NAMES",
                        help="next,idle,late,claim,hold,many,gush")
    parser.add_argument("--peers", default=",".join(DAEMONS),
                        metavar="NAMES", help=",".join(DAEMONS))
    parser.add_argument("--quick", action="store_true",
                        help="one minute for each instead of three")
    parser.add_argument("--pairs", type=int, default=11, metavar="N",
                        help="pairs for each row of next")
    parser.add_argument("--python", default=sys.executable,
                        help="what makes the venv")
    parser.add_argument("--venv", type=Path, metavar="PYTHON",
                        help="the python of a venv that has the libraries")
    parser.add_argument("--koitab", type=Path, default=ROOT / "koitab.py",
                        help="another koitab.py than the one at the top")
    parser.add_argument("--dir", help="where the scratch folder is made")
    parser.add_argument("--inside", action="store_true",
                        help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(args: argparse.Namespace, folder: Path) -> None:
    python = args.venv or make_venv(folder / "venv", args.python)
    chosen = (args.only or ",".join(["next", *FIGURES])).split(",")
    if "next" in chosen:
        subprocess.run([python, Path(__file__).resolve(), "--inside",
                        "--pairs", str(args.pairs)], check=True)
    if os.geteuid() or chosen == ["next"]:
        if os.geteuid():
            print("idle, late, hold and gush need root")
        return
    script = args.koitab.resolve()
    subprocess.run([script, "--version"], stdout=subprocess.DEVNULL)
    adopt_orphans()
    bench = Bench(folder, Peers(folder, python, script),
                  args.peers.split(","), 1 if args.quick else 3)
    for name in chosen:
        if name in FIGURES:
            FIGURES[name](bench)


def main() -> None:
    args = parsed()
    if args.inside:
        compare(args.pairs)
        return
    print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}")
    row("figure", "wanted", "measured")
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        try:
            measure(args, Path(folder))
        finally:
            end_all()


if __name__ == "__main__":
    main()
