"""Kill koid or a supervisor at any system call, and count what was run.

The job of these tests appends its KOI_RUN to a file, with fsync: that file
is the truth. After any kill a fresh koid must ensure that:

- no run was executed twice, and no minute of a schedule;
- every run that was executed is in the history, as done or interrupted;
- every run that was acknowledged is there, and in one final state;
- every minute is there that koid was to serve, started or missed;
- @reboot as well;
- each run that succeeded by schedule has one of the job that follows.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import time
from collections import Counter
from pathlib import Path

import clockwork
import support
import sweep
from support import is_alive, process_state

# One line of a tab: the truth about a run, on the disk.
KEEP = 'echo "$KOI_RUN" | dd of={} oflag=append conv=notrunc,fsync ' \
    'status=none && echo kept'
TAB = 'MAILTO=""\n"slot" * * * * * {keep}\n"boot" @reboot {keep}\n' \
    '"hand" @manual {keep}\n"next" @after "slot" {keep}\n'
# Of a supervisor's calls: between closing koid's lock and claiming the
# run; the start of the job; its end; the end of all.
TELLING = ("getpid", "clone3", "vfork", "wait4", "exit_group")
FINAL = {"done", "interrupted", "missed", "skipped", "unstartable"}
MINUTE = 60
NOON = 1_795_348_800    # 2026-11-22 12:00:00 UTC; the clock is stopped
PATIENCE = 30           # seconds for what should take one
KOITAB = support.load("koitab")
BUSY = "already running"    # a supervisor that has not begun holds the lock


class WrongState(Exception):
    """A fresh koid did not restore a correct state."""


def keep(koi) -> str:
    """A command that notes that its run was executed."""
    return KEEP.format(koi.folder / "truth")


def truth(koi) -> list[int]:
    """The runs that were executed, in order."""
    file = koi.folder / "truth"
    return [int(line) for line in file.read_text().split()] \
        if file.exists() else []


# --- one life of a koid, and what comes after it ----------------------------


class Rig:
    """A koid that always has something to start, made anew for each kill.

    Its clock stands still, a few seconds after a minute that is due."""

    def __init__(self, folder: Path):
        self.folder, self.count = Path(folder), 0
        self.seed = self.make()
        self.seed.clock.start(NOON + 5)
        self.seed.ended("boot")
        self.seed.stop()
        db = sqlite3.connect(self.seed.home / "history.db")
        for statement in ("delete from runs", "delete from output",
                          "delete from meta", "pragma journal_mode=wal"):
            db.execute(statement).fetchall()
            db.commit()
        db.close()
        self.data = (self.seed.home / "history.db").read_bytes()

    def make(self, tab: str = TAB) -> support.Koi:
        self.count += 1
        folder = self.folder / f"{self.count}"
        folder.mkdir(mode=0o755)
        koi = support.Koi(folder)
        koi.clock = clockwork.StillClock(koi)
        koi.clock.set(NOON + 5)
        koi.tab(tab.format(keep=keep(koi)))
        return koi

    def fresh(self) -> support.Koi:
        """One for which a minute is due, and @reboot, as it starts."""
        koi = self.make()
        file = koi.home / "history.db"
        file.write_bytes(self.data)
        file.chmod(0o600)
        koi.since = NOON - 1.0
        koi.meta(seen=repr(koi.since), boot="another boot")
        return koi


def restart(koi, *wrap: str) -> None:
    """Start a fresh koid, as systemd would: again if it is asked to wait."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        size = len(koi.log())
        koi.spawn(wrap=wrap)
        if answered(koi):
            return
        if BUSY not in koi.log()[size:]:
            break
        time.sleep(0.1)
    raise WrongState(f"a fresh koid does not start: {koi.log()}")


def answered(koi) -> bool:
    """Wait until koid answers; False if it ends instead."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and koi.daemon.poll() is None:
        if (koi.home / "koid.sock").exists():
            try:
                return bool(koi.ask("status"))
            except support.load("koitab").Error:
                pass
        time.sleep(0.005)
    return False


def by_hand(koi, job: str = "hand") -> int | None:
    """Ask for a run; its number if it was acknowledged. Waits for its end,
    if koid lives as long."""
    while koi.daemon.poll() is None:
        try:
            run, connection, _ = koi.follow(job)
        except support.load("koitab").Error as error:
            if "not running" not in error.message:
                return None
            time.sleep(0.002)   # the socket is not there yet, or is old
            continue
        with connection:
            connection.settimeout(PATIENCE)
            while connection.recv(65_536):
                pass
        return run
    return None


def end(process: subprocess.Popen) -> int:
    """Stop a koid, under strace or not; return how it ended."""
    traced = process.args[0] == "strace"
    pids = support.children_of(process.pid)[:1] if traced else [process.pid]
    for pid in pids:
        support.kill(pid, signal.SIGTERM)
    try:
        return process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        for pid in pids:
            support.kill(pid)
        process.wait()
        raise WrongState("koid hangs") from None


def life(koi, *wrap: str) -> tuple[int | None, int]:
    """From a start, with a minute and @reboot due, over a run by hand to a
    stop: the acknowledged run, and how koid ended."""
    process = koi.spawn(wrap=wrap)
    acked = by_hand(koi)
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        if acked and not os.listdir(koi.home / "runs"):
            break               # koid has taken all of them in
        time.sleep(0.002)
    return acked, end(process)


def settled(koi, acked: int | None) -> Counter:
    """What a fresh koid makes of it: the states of all runs. Raises
    WrongState."""
    # koid checks adopted runs every few seconds, but its clock is stopped.
    support.wait_until(lambda: not any(map(supervised, list(
        (koi.home / "runs").iterdir()))), PATIENCE, "the supervisors")
    restart(koi)
    deadline = time.monotonic() + PATIENCE
    while not finished(koi) and time.monotonic() < deadline:
        time.sleep(0.01)
    runs, executed = koi.history(), Counter(truth(koi))
    wrong = faults(koi, runs, executed, acked, koi.clock.wall)
    if koi.stop():
        wrong.append(f"the fresh koid ended with {koi.daemon.returncode}")
    if wrong:
        raise WrongState("; ".join(wrong) + f"\n{runs}\n{koi.log()}")
    return Counter(f"{run['trigger']} {run['state']}" for run in runs)


def finished(koi) -> bool:
    return all(run["state"] in FINAL for run in koi.history())


def supervised(file: Path) -> bool:
    """Has the run of this file a supervisor that is still at work?"""
    try:
        header = KOITAB.parse_header(file.read_bytes())
    except FileNotFoundError:
        return False
    return bool(header) and header.phase in (
        KOITAB.CLAIMED, KOITAB.RUNNING) and KOITAB.process_start_time(
            header.supervisor) == header.supervisor_start


def faults(koi, runs: list, executed: Counter, acked: int | None,
           now: float) -> list[str]:
    """Where the history and the truth do not agree."""
    state = {run["run"]: run["state"] for run in runs}
    wrong = [f"run {run} executed {count} times"
             for run, count in executed.items() if count > 1]
    wrong += [f"run {run} executed, and is {state.get(run, 'forgotten')}"
              for run in executed if state.get(run) not in (
                  "done", "interrupted")]
    wrong += [f"run {run} is done, and was not executed"
              for run in state if state[run] == "done"
              and run not in executed]
    wrong += [f"run {run} stays {what}" for run, what in state.items()
              if what not in FINAL]
    if acked and acked not in state:
        wrong.append(f"run {acked} was acknowledged, and is forgotten")
    slots = Counter()
    for run in runs:
        if run["trigger"] == "schedule":
            slots[run["due"]] += run["count"]
    first = (koi.since // MINUTE + 1) * MINUTE
    for due in range(int(first), int(now) - 1, MINUTE):
        if slots[due] != 1 and not many(runs, due):
            wrong.append(f"minute {due}: {slots[due]} rows")
    boots = [run for run in runs if run["trigger"] == "reboot"]
    if len(boots) != 1:
        wrong.append(f"{len(boots)} runs of @reboot")
    good = sum(run["trigger"] == "schedule" and run["exit"] == 0
               for run in runs)
    after = sum(run["trigger"] == "after" for run in runs)
    if good != after:
        wrong.append(f"{good} good runs, and {after} that follow")
    return wrong


def many(runs: list, due: int) -> bool:
    """Whether a row that counts several starts includes a minute."""
    return any(run["due"] <= due < run["due"] + run["count"] * MINUTE
               for run in runs if run["count"] > 1)


# --- where to strike ---------------------------------------------------------


def struck(name: str, n: int, blow: str = sweep.KILL) -> tuple[str, ...]:
    """What is put before a command so that its n-th such call is hit."""
    return ("strace", "-qq", "-o", "/dev/null", "-e", f"trace={name}",
            "-e", f"inject={name}:{blow}:when={n}")


def calls_of(koi, *wrap: str) -> list[tuple[str, str]]:
    """(name, line) of each call in a life of koid's, in order."""
    trace = koi.folder / "trace"
    life(koi, *wrap, "strace", "-qq", "-s", "256", "-o", str(trace))
    lines = trace.read_text(errors="replace").splitlines()
    return [(found[1], line) for line in lines
            for found in [sweep.CALL.match(line)] if found]


def kill_koid(rig: Rig, most: int | None, report=None) -> tuple[Counter, int]:
    """Kill koid at `most` of its calls: the states that came of it, and how
    often it was hit. Raises WrongState, or calls `report`."""
    made = calls_of(rig.fresh())
    points = sweep.choose(made, after="/koi/lock", most=most)
    seen, hits = Counter(), 0
    for name, n in points:
        koi = rig.fresh()
        try:
            acked, status = life(koi, *struck(name, n))
            hits += status == -signal.SIGKILL
            seen += settled(koi, acked)
        except WrongState as fault:
            judge(f"koid killed at {name} number {n}", fault, report)
        finally:
            koi.stop(signal.SIGKILL)
            koi.end_jobs()
    return seen, hits


def judge(place: str, fault: WrongState, report) -> None:
    if not report:
        raise WrongState(f"{place}: {fault}") from None
    report(f"{place}: {fault}")


# --- a supervisor: it stops as it begins, so that strace can take hold -------

HOLD = """
import os, signal

def live(supervisor, live=k.Supervisor.serve):
    with open({file!r}, "a") as notes:
        notes.write(f"{{os.getpid()}}\\n")
    os.kill(os.getpid(), signal.SIGSTOP)
    live(supervisor)

k.Supervisor.serve = live
"""


class Held:
    """A koid whose supervisors wait for us before they do anything."""

    def __init__(self, rig: Rig):
        self.koi = rig.make('MAILTO=""\n"hand" @manual {keep}\n')
        self.file = self.koi.folder / "supervisors"
        self.file.touch()
        self.unheld = self.koi.patch
        self.held = self.unheld + HOLD.format(file=str(self.file))
        self.start()

    def start(self) -> None:
        """Start koid so that supervisors wait; restart() does without."""
        self.koi.patch = self.held
        self.koi.spawn()
        self.koi.patch = self.unheld
        if not answered(self.koi):
            raise WrongState(self.koi.log())

    def ask(self) -> tuple[int, int]:
        """Have a run; its number, and the pid of its supervisor, which is
        stopped."""
        before = len(self.file.read_text().splitlines())
        run = self.koi.launch("hand")
        support.wait_until(
            lambda: len(self.file.read_text().splitlines()) > before,
            PATIENCE, "a supervisor")
        pid = int(self.file.read_text().split()[-1])
        support.wait_until(lambda: process_state(pid) == "T", PATIENCE,
                           "its stop")
        return run, pid


def watch(pid: int, *options: str) -> subprocess.Popen:
    """Let strace take hold of a process that is stopped, and let it go."""
    tracer = subprocess.Popen(
        ["strace", "-p", str(pid), *options], stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    line = tracer.stderr.readline()
    if b"attached" not in line:
        raise WrongState(f"strace: {line!r}")
    os.kill(pid, signal.SIGCONT)
    return tracer


def gone(tracer: subprocess.Popen) -> None:
    tracer.stderr.read()
    tracer.wait(PATIENCE)


def calls_of_supervisor(held: Held) -> list[tuple[str, str]]:
    trace = held.koi.folder / "trace"
    run, pid = held.ask()
    gone(watch(pid, "-s", "256", "-o", str(trace)))
    lines = trace.read_text(errors="replace").splitlines()
    return [(found[1], line) for line in lines
            for found in [sweep.CALL.match(line)] if found]


def kill_supervisor(rig: Rig, most: int | None, report=None
                    ) -> tuple[Counter, int]:
    """Kill a supervisor at `most` of its calls; koid continues, or at every
    second one is killed with it. As kill_koid."""
    held = Held(rig)
    koi, seen, hits = held.koi, Counter(), 0
    points = sweep.choose(calls_of_supervisor(held), most=most,
                          telling=TELLING)
    try:
        for count, (name, n) in enumerate(points):
            try:
                state = strike_supervisor(held, name, n, both=count % 2 == 1)
                seen[state] += 1
                hits += 1
            except WrongState as fault:
                judge(f"supervisor killed at {name} number {n}", fault, report)
    finally:
        koi.stop(signal.SIGKILL)
        koi.end_jobs()
    return seen, hits


def strike_supervisor(held: Held, name: str, n: int, both: bool) -> str:
    """The state that a run has whose supervisor was killed there."""
    koi = held.koi
    run, pid = held.ask()
    gone(watch(pid, "-o", "/dev/null", "-e", f"trace={name}", "-e",
               f"inject={name}:{sweep.KILL}:when={n}"))
    if both:
        koi.stop(signal.SIGKILL)
        # Until init has reaped it, it seems to be at work.
        support.wait_until(lambda: not KOITAB.process_start_time(pid),
                           PATIENCE, "its end")
        restart(koi)
    state = support.wait_until(lambda: final_state(koi, run), PATIENCE,
                               f"the end of run {run}: {koi.log()}")
    quiet(koi, run)
    executed = truth(koi).count(run)
    if both:
        koi.stop()
        held.start()
    if executed > 1 or state not in ("done", "interrupted") \
            or state == "done" and not executed:
        raise WrongState(f"executed {executed} times, and is {state}")
    if (koi.home / "runs" / str(run)).exists():
        raise WrongState("its file is left")
    return state


def final_state(koi, run: int) -> str:
    """The state of a run, when it is final; "forgotten" if it is not
    there."""
    states = [row["state"] for row in koi.history(limit=5)
              if row["run"] == run]
    state = states[0] if states else "forgotten"
    return state if state in FINAL | {"forgotten"} else ""


def quiet(koi, run: int) -> None:
    """Wait for the processes of a run that has lost its supervisor."""
    mark = f"KOI_RUN={run}\0".encode()
    place = str(koi.folder).encode()

    def none() -> bool:
        for process in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in process.read_bytes() and place in (
                        process.parent / "cmdline").read_bytes():
                    return False
            except OSError:
                pass            # another's, or just gone
        return True
    support.wait_until(none, PATIENCE, "its job")


def stall_supervisor(rig: Rig, most: int | None, report=None
                     ) -> tuple[Counter, int]:
    """Stop a supervisor at `most` of its calls, as a busy machine might;
    kill koid; start a fresh one, and let the supervisor continue."""
    held, seen, hits = Held(rig), Counter(), 0
    points = sweep.choose(calls_of_supervisor(held), most=most,
                          telling=TELLING)
    try:
        for name, n in points:
            try:
                seen[stall(held, name, n)] += 1
                hits += 1
            except WrongState as fault:
                judge(f"supervisor stalled at {name} number {n}", fault,
                      report)
    finally:
        held.koi.stop(signal.SIGKILL)
        held.koi.end_jobs()
    return seen, hits


def stall(held: Held, name: str, n: int) -> str:
    """The state of a run whose supervisor slept at that call while koid was
    killed and another came."""
    koi = held.koi
    run, pid = held.ask()
    trace = koi.folder / "stop"
    trace.write_text("")
    tracer = watch(pid, "-o", str(trace), "-e", f"trace={name}", "-e",
                   f"inject={name}:signal=SIGSTOP:when={n}")
    support.wait_until(lambda: has_stopped(trace) or not is_alive(pid),
                       PATIENCE, "its stop")
    koi.stop(signal.SIGKILL)
    # It ends if the supervisor still has the lock, and koid's socket, where
    # nobody would answer; or it comes, and says so.
    said = len(koi.log())
    koi.spawn()
    support.wait_until(lambda: koi.daemon.poll() is not None
                       or f"koid {KOITAB.VERSION}: " in koi.log()[said:],
                       PATIENCE, "a fresh koid")
    if koi.daemon.poll() is None:
        # Should it dare a second start, that comes to its end first.
        koi.ask("status")
        support.wait_until(lambda: not support.children_of(koi.daemon.pid),
                           PATIENCE, "a second start")
        koi.ask("status")
    support.kill(pid, signal.SIGCONT)
    gone(tracer)
    if not answered(koi):
        restart(koi)
    koi.clock.elapse(KOITAB.CHECK_AGAIN)     # at the run that it adopted
    state = support.wait_until(lambda: final_state(koi, run), PATIENCE,
                               f"the end of run {run}: {koi.log()}")
    quiet(koi, run)
    executed = truth(koi).count(run)
    koi.stop()
    held.start()
    if executed > 1 or executed and state not in ("done", "interrupted"):
        raise WrongState(f"executed {executed} times, and is {state}")
    return state


def has_stopped(trace: Path) -> bool:
    """By the signal of ours, and not by the one that held it at first."""
    _, signal_came, after = trace.read_text().partition("--- SIGSTOP {")
    return bool(signal_came) and "--- stopped by SIGSTOP" in after


def counts(seen: Counter) -> str:
    return ", ".join(f"{count} {word}" for word, count in sorted(
        seen.items()))

