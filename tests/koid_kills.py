"""Kill koid or a supervisor at any system call, and count what was run.

The job of these tests appends its KOI_RUN to a file, with fsync: that file
is the truth. Whatever is killed wherever, a fresh koid has to make of it:

- no run was executed twice, and no minute of a schedule;
- every run that was executed is in the history, as done or interrupted;
- every run that was acknowledged is there, and in one final state;
- every minute is there that koid was to serve, started or missed;
- @reboot as well.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import time
from collections import Counter
from pathlib import Path

import support
import sweep

# One line of a tab: the truth about a run, on the disk.
KEEP = 'echo "$KOI_RUN" | dd of={} oflag=append conv=notrunc,fsync ' \
    'status=none && echo kept'
TAB = 'MAILTO=""\n"slot" * * * * * {keep}\n"boot" @reboot {keep}\n' \
    '"hand" @manual {keep}\n'
FINAL = {"done", "interrupted", "missed", "skipped", "unstartable"}
MINUTE = 60
PATIENCE = 30           # seconds for what should take one
BUSY = "already runs"   # a supervisor that has not begun holds the lock


class Faulty(Exception):
    """What a fresh koid made of it is wrong."""


def keep(koi) -> str:
    """A command that notes that its run was executed."""
    return KEEP.format(koi.folder / "truth")


def truth(koi) -> list[int]:
    """The runs that were executed, in order."""
    file = koi.folder / "truth"
    return [int(line) for line in file.read_text().split()] \
        if file.exists() else []


def meta(koi, **values: str | None) -> None:
    """Change what a koid that is gone knew: None forgets it."""
    db = sqlite3.connect(koi.home / "history.db")
    with db:
        for name, value in values.items():
            db.execute("delete from meta where name = ?", (name,))
            if value is not None:
                db.execute("insert into meta values (?, ?)", (name, value))
    db.close()


def unfinished(koi) -> list[dict]:
    return [run for run in koi.history() if run["state"] not in FINAL]


# --- one life of a koid, and what comes after it ----------------------------


class Rig:
    """A koid that always has something to start, made anew for each kill."""

    def __init__(self, folder: Path):
        self.folder, self.count = Path(folder), 0
        self.seed = self.make()
        self.seed.start()
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
        koi.tab(tab.format(keep=keep(koi)))
        return koi

    def fresh(self) -> support.Koi:
        """One for which a minute is due, and @reboot, as it starts."""
        koi = self.make()
        file = koi.home / "history.db"
        file.write_bytes(self.data)
        file.chmod(0o600)
        koi.since = time.time() // MINUTE * MINUTE - 1
        meta(koi, seen=repr(koi.since), boot="another boot")
        return koi


def begin(koi, *wrap: str, command: list | None = None) -> subprocess.Popen:
    """Start koid and do not wait for it."""
    with open(koi.said, "ab") as log:
        koi.daemon = subprocess.Popen(
            [*wrap, *(command or koi.command("daemon"))], env=koi.env,
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            cwd=str(koi.folder))
    return koi.daemon


def restart(koi, *wrap: str) -> None:
    """Start a fresh koid, as systemd would: again if it is told to wait."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        size = len(koi.log())
        begin(koi, *wrap)
        if answered(koi):
            return
        if BUSY not in koi.log()[size:]:
            break
        time.sleep(0.1)
    raise Faulty(f"a fresh koid does not start: {koi.log()}")


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
            with koi.link() as link:
                run, connection, _ = link.follow(job, {})
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


def child_of(process: subprocess.Popen) -> int:
    """The pid of what strace runs."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    try:
        return int(children.read_text().split()[0])
    except (OSError, IndexError):
        return 0


def end(process: subprocess.Popen) -> int:
    """Tell a koid to stop, under strace or not; how it ended."""
    traced = process.args[0] == "strace"
    pid = child_of(process) if traced else process.pid
    hit(pid, signal.SIGTERM)
    try:
        return process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        hit(pid, signal.SIGKILL)
        process.wait()
        raise Faulty("koid hangs") from None


def hit(pid: int, number: int) -> None:
    """Signal a process that may be gone."""
    if pid:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


def life(koi, *wrap: str) -> tuple[int | None, int]:
    """From a start, with a minute and @reboot due, over a run by hand to a
    stop: the acknowledged run, and how koid ended."""
    process = begin(koi, *wrap)
    acked = by_hand(koi)
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        if acked and not os.listdir(koi.home / "runs"):
            break               # koid has taken all of them in
        time.sleep(0.002)
    return acked, end(process)


def settled(koi, acked: int | None) -> Counter:
    """What a fresh koid makes of it: the states of all runs. Raises
    Faulty."""
    restart(koi)
    deadline = time.monotonic() + PATIENCE
    while unfinished(koi) and time.monotonic() < deadline:
        time.sleep(0.01)
    now, runs, executed = time.time(), koi.history(), Counter(truth(koi))
    wrong = faults(koi, runs, executed, acked, now)
    if koi.stop():
        wrong.append(f"the fresh koid ended with {koi.daemon.returncode}")
    if wrong:
        raise Faulty("; ".join(wrong) + f"\n{runs}\n{koi.log()}")
    return Counter(f"{run['trigger']} {run['state']}" for run in runs)


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
    return wrong


def many(runs: list, due: int) -> bool:
    """Is a minute one of a row that stands for several?"""
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


def kill_koid(rig: Rig, most: int | None, tell=None) -> tuple[Counter, int]:
    """Kill koid at `most` of its calls: the states that came of it, and how
    often it was hit. Raises Faulty, or gives `tell` what was wrong."""
    made = calls_of(rig.fresh())
    points = sweep.choose(made, after="/koi/lock", most=most)
    seen, hits = Counter(), 0
    for name, n in points:
        koi = rig.fresh()
        try:
            acked, status = life(koi, *struck(name, n))
            hits += status == -signal.SIGKILL
            seen += settled(koi, acked)
        except Faulty as fault:
            judge(f"koid killed at {name} number {n}", fault, tell)
        finally:
            koi.stop(signal.SIGKILL)
            koi.end_jobs()
    return seen, hits


def judge(place: str, fault: Faulty, tell) -> None:
    if not tell:
        raise Faulty(f"{place}: {fault}") from None
    tell(f"{place}: {fault}")


# --- a supervisor: it stops as it begins, so that strace can take hold -------

# koid, with one change: argv is a koitab.py, and a file for the pids of
# supervisors.
HOLD = """
import importlib.util, os, signal, sys
spec = importlib.util.spec_from_file_location("koitab", sys.argv[1])
koitab = sys.modules["koitab"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(koitab)
live = koitab.Supervisor.live

def stopped(supervisor):
    with open(sys.argv[2], "a") as notes:
        notes.write(f"{os.getpid()}\\n")
    os.kill(os.getpid(), signal.SIGSTOP)
    live(supervisor)

koitab.Supervisor.live = stopped
sys.exit(koitab.main(["daemon"]))
"""


class Held:
    """A koid whose supervisors wait for us before they do anything."""

    def __init__(self, rig: Rig):
        self.koi = rig.make('MAILTO=""\n"hand" @manual {keep}\n')
        self.file = self.koi.folder / "supervisors"
        self.file.touch()
        self.start()

    def start(self) -> None:
        begin(self.koi, command=[
            self.koi.python, "-IS", "-c", HOLD,
            str(support.ROOT / "koitab.py"), str(self.file)])
        if not answered(self.koi):
            raise Faulty(self.koi.log())

    def ask(self) -> tuple[int, int]:
        """Have a run; its number, and the pid of its supervisor, which is
        stopped."""
        before = len(self.file.read_text().splitlines())
        with self.koi.link() as link:
            run, connection, _ = link.follow("hand", {})
        connection.close()
        support.wait_until(
            lambda: len(self.file.read_text().splitlines()) > before,
            PATIENCE, "a supervisor")
        pid = int(self.file.read_text().split()[-1])
        support.wait_until(lambda: phase_of(pid) == "T", PATIENCE, "its stop")
        return run, pid


def phase_of(pid: int) -> str:
    """As ps shows it: R, S, T; "" when it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[0].replace("Z", "")


def watch(pid: int, *options: str) -> subprocess.Popen:
    """Let strace take hold of a process that is stopped, and let it go."""
    tracer = subprocess.Popen(
        ["strace", "-p", str(pid), *options], stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    line = tracer.stderr.readline()
    if b"attached" not in line:
        raise Faulty(f"strace: {line!r}")
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


def kill_supervisor(rig: Rig, most: int | None, tell=None
                    ) -> tuple[Counter, int]:
    """Kill a supervisor at `most` of its calls; koid goes on, or at every
    second one is killed with it. As kill_koid."""
    held = Held(rig)
    koi, seen, hits = held.koi, Counter(), 0
    points = sweep.choose(calls_of_supervisor(held), most=most)
    try:
        for count, (name, n) in enumerate(points):
            try:
                state = strike_supervisor(held, name, n, both=count % 2 == 1)
                seen[state] += 1
                hits += 1
            except Faulty as fault:
                judge(f"supervisor killed at {name} number {n}", fault, tell)
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
        raise Faulty(f"executed {executed} times, and is {state}")
    if (koi.home / "runs" / str(run)).exists():
        raise Faulty("its file is left")
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


def stall_supervisor(rig: Rig, most: int | None, tell=None
                     ) -> tuple[Counter, int]:
    """Stop a supervisor at `most` of its calls, as a busy machine might;
    kill koid; let a fresh one do what it will, and the supervisor go on."""
    held, seen, hits = Held(rig), Counter(), 0
    points = sweep.choose(calls_of_supervisor(held), most=most)
    try:
        for name, n in points:
            try:
                seen[stall(held, name, n)] += 1
                hits += 1
            except Faulty as fault:
                judge(f"supervisor stalled at {name} number {n}", fault, tell)
    finally:
        held.koi.stop(signal.SIGKILL)
        held.koi.end_jobs()
    return seen, hits


def stall(held: Held, name: str, n: int) -> str:
    """The state of a run whose supervisor slept at that call while koid was
    killed and another came."""
    koi = held.koi
    run, pid = held.ask()
    tracer = watch(pid, "-o", "/dev/null", "-e", f"trace={name}", "-e",
                   f"inject={name}:signal=SIGSTOP:when={n}")
    support.wait_until(lambda: phase_of(pid) in ("t", "T", ""), PATIENCE,
                       "its stop")
    koi.stop(signal.SIGKILL)
    begin(koi)
    # Time enough for a second start, should this koid dare; or it waits.
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline and run not in truth(koi):
        time.sleep(0.01)
    if run in truth(koi) and answered(koi):
        support.wait_until(lambda: final_state(koi, run) or phase_of(pid) in
                           ("t", "T"), PATIENCE, "its end")
        time.sleep(0.2)
    hit(pid, signal.SIGCONT)
    gone(tracer)
    if not answered(koi):
        restart(koi)
    state = support.wait_until(lambda: final_state(koi, run), PATIENCE,
                               f"the end of run {run}: {koi.log()}")
    quiet(koi, run)
    executed = truth(koi).count(run)
    koi.stop()
    held.start()
    if executed > 1 or executed and state not in ("done", "interrupted"):
        raise Faulty(f"executed {executed} times, and is {state}")
    return state


def counts(seen: Counter) -> str:
    return ", ".join(f"{count} {word}" for word, count in sorted(
        seen.items()))

