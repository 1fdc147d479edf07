#!/usr/bin/env python3
"""How mission compares: start-up, tasks, log lines, memory.

    python3 tests/bench/mission.py [--runs N] [--only NAME] [--python PATH]

The machine is noisy, so a figure is a pair of programs that run in turn,
A B A B ..., and what counts is the median of the ratios pair by pair. Each
row says what is wanted and what was measured; nothing here fails.

    start     `mission list` with 5 tasks, against python -I -S -c pass
    tasks     a headless run of 200 empty tasks, against a bare sh loop
    lines     1,000,000 lines into a headless log, against ts and cat; with
              elapsed column, one redaction, and two filters for the mail
    memory    1 GB of output in lines of 200 bytes, as the same
    endless   1 GB of output in one line that never ends
    chown     the walk over 200,000 small files, all or none to change,
              against `chown -R` (root)
    commit    a run that commits the same with 0 or 100 files changed,
              with and without chown, against `git add` and `git commit`
              (root)
    nights    60 runs that commit 250 changed files each, against git alone:
              loose objects, size, the last night against the first

--quick takes 20,000 files and 30 nights.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pwd
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHON = "/usr/bin/python3"     # the one that cron would start
LINES, GIGABYTE = 1_000_000, 1_000_000_000
FILES, NIGHTS, CHANGED = 200_000, 60, 250
QUICK_FILES, QUICK_NIGHTS = 20_000, 30
PER_DIRECTORY = 100
LOOK = 0.02                     # s between two looks at a process's memory


class Bench:
    """A configuration in a directory, and the commands to be compared."""

    def __init__(self, folder: Path, script: Path, python: str):
        self.folder, self.script, self.python = folder, script, python
        self.tasks, self.logs = folder / "tasks", folder / "logs"
        self.out, self.config = folder / "out", folder / "mission.config.json"
        self.bin = folder / "bin"
        self.files, self.nights = FILES, NIGHTS
        for path in (self.tasks, self.logs, self.bin):
            path.mkdir()
        # The mail must be made, or the filters have nothing to do.
        program(self.bin / "sendmail", "exec cat > /dev/null")
        self.env = {"PATH": f"{self.bin}:{os.environ.get('PATH', os.defpath)}",
                    "HOME": str(folder), "MISSION_STATE": str(folder / "s")}

    def write(self, scripts: dict[str, str], **more) -> None:
        for slug, script in scripts.items():
            (self.tasks / slug).mkdir(exist_ok=True)
            program(self.tasks / slug / "run", script)
        self.config.write_text(json.dumps({
            "tasks": [{"slug": slug, "name": slug, "type": "exec",
                       "scheduled": True} for slug in scripts],
            "user": {"name": some_user(), "email": "bench@example.com"},
            **{"storage": {"tasks": {"path": str(self.tasks)},
                           "logs": {"path": str(self.logs)}}, **more}}))
        self.config.chmod(0o600)

    def write_noisy(self, script: str) -> None:
        """One task, with everything on that looks at each of its lines."""
        self.write({"noisy": script}, mail={"enabled": True,
                                            "type": "sendmail"},
                   filters=[r"^skipping \.", r"unchanged$"],
                   redact=[r"token=[0-9a-f]{8,}"])

    def mission(self, *args: str) -> list[str]:
        """The script as it is installed, or with another python."""
        if self.python == PYTHON and os.access(self.script, os.X_OK):
            return [str(self.script), "-c", str(self.config), *args]
        return self.compiled(*args)

    def compiled(self, *args: str) -> list[str]:
        """The script given to python: compiled anew at each start."""
        return [self.python, "-I", "-S", str(self.script),
                "-c", str(self.config), *args]

    def seconds(self, command: list[str]) -> float:
        """How long a command takes; its output goes to self.out."""
        with open(self.out, "wb") as out:
            began = time.perf_counter()
            pid = os.posix_spawn(command[0], command, self.env, file_actions=[
                (os.POSIX_SPAWN_DUP2, out.fileno(), 1)])
            status = os.waitpid(pid, 0)[1]
            took = time.perf_counter() - began
        if status:
            raise SystemExit(f"bench: {command} ended with status {status:#x}")
        return took

    def cpu_seconds(self, command: list[str]) -> float:
        """The processor time of a command and all that it starts."""
        before = os.times()
        self.seconds(command)
        after = os.times()
        return (after.children_user - before.children_user
                + after.children_system - before.children_system)

    def megabytes(self, command: list[str]) -> tuple[float, float]:
        """A program's own peak memory, and the largest of all it started."""
        pid = os.posix_spawn(command[0], command, self.env)
        peak = 0
        while True:
            done, status, usage = os.wait4(pid, os.WNOHANG)
            if done:
                break
            peak = max(peak, high_water(pid))
            time.sleep(LOOK)
        if status:
            raise SystemExit(f"bench: {command} ended with status {status:#x}")
        return peak / 1024, usage.ru_maxrss / 1024

    def new_log(self) -> Path:
        return max(self.logs.glob("*.txt"), key=lambda p: p.stat().st_mtime)

    def forget_logs(self) -> None:
        for path in [*self.logs.iterdir(), self.out]:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()


def program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def some_user() -> str:
    return "daemon" if os.geteuid() == 0 else pwd.getpwuid(os.getuid()).pw_name


def high_water(pid: int) -> int:
    """The peak resident size (kB) of this process image, without its
    children; ru_maxrss would count them, and what was there before exec."""
    with contextlib.suppress(OSError):
        with open(f"/proc/{pid}/status") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1])
    return 0


def in_turn(runs: int, *operations) -> list[list[float]]:
    """A B A B ...: the times of each operation; the first turn warms the disk.
    """
    turns = [[operation() for operation in operations]
             for _ in range(runs + 1)][1:]
    return [list(times) for times in zip(*turns)]


def median(values) -> float:
    return statistics.median(values)


def row(name: str, wanted: str, measured: str, note: str = "") -> None:
    print(f"{name:<34} {wanted:<16} {measured:<14} {note}".rstrip(),
          flush=True)


def start(bench: Bench, runs: int) -> None:
    bench.write({f"task{n}": "true" for n in range(5)})
    bare, ours, anew = in_turn(
        runs or 31,
        lambda: bench.seconds([bench.python, "-I", "-S", "-c", "pass"]),
        lambda: bench.seconds(bench.mission("list")),
        lambda: bench.seconds(bench.compiled("list")))
    for name, wanted, times in (("start: list / pass", "at most 4", ours),
                                ("start: the same, compiled anew", "", anew)):
        ratio = median(b / a for a, b in zip(bare, times))
        row(name, wanted, f"{ratio:.2f}", f"list {median(times) * 1e3:.1f} ms"
            f", pass {median(bare) * 1e3:.1f} ms")


def tasks(bench: Bench, runs: int) -> None:
    slugs = [f"task{n:03}" for n in range(200)]
    bench.write(dict.fromkeys(slugs, ""))
    loop = ["/bin/sh", "-c",
            f"for run in {bench.tasks}/*/run; do \"$run\"; done"]
    run = bench.mission("run", "--headless")
    # The processor's part tells a slow disk (fsync) from a slow program.
    for name, wanted, measure in (
            ("tasks: a task above a sh loop", "at most 2.5 ms", bench.seconds),
            ("tasks: of that, processor time", "", bench.cpu_seconds)):
        bare, ours = in_turn(runs or 9, partial(measure, loop),
                             partial(measure, run))
        above = median((b - a) / len(slugs) * 1e3 for a, b in zip(bare, ours))
        row(name, wanted, f"{above:.2f} ms", f"ours {median(ours) * 1e3:.0f} "
            f"ms, sh {median(bare) * 1e3:.0f} ms")


def lines(bench: Bench, runs: int) -> None:
    if not shutil.which("ts"):
        row("lines: ts / mission", "at least 8", "not measured",
            "apt-get install moreutils")
        return
    source = bench.folder / "source"
    with open(source, "w") as file:
        file.writelines(f"{n:07} sent /srv/data/photos/{n % 997}.jpg\n"
                        for n in range(LINES))
    bench.write_noisy(f"exec cat {source}")

    def mission() -> float:
        took = bench.seconds(bench.mission("run", "--headless"))
        with open(bench.new_log(), "rb") as log:
            arrived = sum(1 for line in log if b" sent /srv" in line)
        bench.forget_logs()
        if arrived != LINES:
            row("lines: LOST", "0", f"{LINES - arrived:,}")
        return took

    stamps, copied, ours = in_turn(
        runs or 5,
        lambda: bench.seconds(
            ["/bin/sh", "-c", f"cat {source} | ts -s '[%H:%M:%.S]'"]),
        lambda: bench.seconds(["/bin/cat", str(source)]), mission)
    row("lines: ts / mission", "at least 8",
        f"{median(a / b for a, b in zip(stamps, ours)):.1f}",
        f"ts {median(stamps):.2f} s, ours {median(ours):.2f} s")
    row("lines: mission / cat", "",
        f"{median(b / a for a, b in zip(copied, ours)):.1f}",
        f"ours {median(ours):.2f} s, cat {median(copied):.2f} s")


def peak(bench: Bench, runs: int, name: str, script: str) -> None:
    bench.write_noisy(script)
    own, largest, sizes = [], [], []
    for _ in range(runs or 1):
        mine, all_of_them = bench.megabytes(bench.mission("run", "--headless"))
        sizes.append(bench.new_log().stat().st_size)
        bench.forget_logs()
        own.append(mine)
        largest.append(all_of_them)
    row(name, "under 40 MB", f"{max(own):.1f} MB",
        f"largest process {max(largest):.1f} MB, "
        f"log {median(sizes) / 1e6:,.0f} MB")


def memory(bench: Bench, runs: int) -> None:
    peak(bench, runs, "memory: 1 GB in lines of 200 bytes",
         f"yes {'x' * 199} | head -c {GIGABYTE}")


def endless(bench: Bench, runs: int) -> None:
    peak(bench, runs, "endless: 1 GB in one line",
         f"head -c {GIGABYTE} /dev/zero | tr '\\0' x")


# --- storages: chown and commit ----------------------------------------------


def make_files(folder: Path, count: int) -> None:
    """Small files of different content, in directories."""
    for first in range(0, count, PER_DIRECTORY):
        place = folder / f"{first // PER_DIRECTORY:05}"
        place.mkdir(parents=True)
        for number in range(first, min(first + PER_DIRECTORY, count)):
            fd = os.open(place / f"{number:07}.txt", os.O_CREAT | os.O_WRONLY)
            os.write(fd, b"%d\n" % number)
            os.close(fd)


def change_files(folder: Path, count: int, uid: int, turn: int) -> None:
    """Another content for files in as many directories, given to `uid`."""
    paths = sorted(folder.glob("[0-9]*"))
    for number in range(count):
        files = sorted(paths[number % len(paths)].glob("*.txt"))
        path = files[(number // len(paths) + turn) % len(files)]
        path.write_text(f"{turn} {number}\n")
        os.chown(path, uid, uid)


# The walk alone, in a new process; its time is what it prints.
WALK = """
import importlib.util, sys, time
spec = importlib.util.spec_from_file_location("mission", sys.argv[1])
mission = importlib.util.module_from_spec(spec)
sys.modules["mission"] = mission
spec.loader.exec_module(mission)
before = time.perf_counter()
mission.chown_tree(sys.argv[2], int(sys.argv[3]), int(sys.argv[3]))
print(time.perf_counter() - before)
"""


def chown(bench: Bench, runs: int) -> None:
    if os.geteuid():
        return row("chown", "", "not measured", "needs root")
    folder, uid = bench.folder / "tree", pwd.getpwnam(some_user()).pw_uid
    make_files(folder, bench.files)

    def theirs(owner: int) -> float:
        return bench.seconds(["/bin/chown", "-R", f"{owner}:{owner}",
                              str(folder)])

    def ours(owner: int) -> float:
        bench.seconds([bench.python, "-I", "-S", "-c", WALK,
                       str(bench.script), str(folder), str(owner)])
        return float(bench.out.read_text())

    for name, wanted, before in (("chown: all to change", "2.0", 0),
                                 ("chown: nothing to change", "1.0", uid)):
        pairs = in_turn(runs or 7, partial(theirs, before),
                        partial(theirs, uid), partial(theirs, before),
                        partial(ours, uid))
        _, peer, _, mine = pairs
        row(name, wanted, f"{median(b / a for a, b in zip(peer, mine)):.2f}",
            f"{bench.files:,} files: ours {median(mine):.2f} s, chown -R "
            f"{median(peer):.2f} s")
    return None


class Committed:
    """A repository of another user, and two ways to commit it."""

    def __init__(self, bench: Bench, name: str, files: int):
        self.bench, self.folder = bench, bench.folder / name
        self.user = pwd.getpwnam(some_user())
        self.become = ["/usr/bin/setpriv", f"--reuid={self.user.pw_uid}",
                       f"--regid={self.user.pw_gid}", "--clear-groups"] \
            if os.geteuid() == 0 else ["/usr/bin/env"]
        self.git = [shutil.which("git"), "-C", str(self.folder), "-c",
                    "user.name=bench", "-c", "user.email=bench@example.com",
                    "-c", "gc.autoDetach=false"]
        make_files(self.folder, files)
        self.shell("git init -q; git add -A; git commit -qm first; git gc -q",
                   "-c", "core.fsync=none")

    def shell(self, text: str, *options: str) -> float:
        """Run git commands as the owner; the seconds they took."""
        if os.geteuid() == 0 and not (self.folder / ".git").exists():
            subprocess.run(["chown", "-R", str(self.user.pw_uid),
                            str(self.folder)], check=True)
        git = " ".join(self.git + list(options))
        return self.bench.seconds([*self.become, "/bin/sh", "-ec",
                                   text.replace("git ", git + " ")])

    def by_git(self) -> float:
        return self.shell("git add -A; git commit -qm night || true")

    def by_mission(self) -> float:
        return self.bench.seconds(self.bench.mission("run", "--headless"))

    def change(self, count: int, turn: int) -> None:
        change_files(self.folder, count, self.user.pw_uid, turn)

    def size(self) -> tuple[int, float]:
        """The number of loose objects, and the megabytes of .git."""
        loose = sum(len(list(place.iterdir())) for place in
                    (self.folder / ".git/objects").glob("??"))
        blocks = sum(os.lstat(os.path.join(place, name)).st_blocks
                     for place, _, names in os.walk(self.folder / ".git")
                     for name in names)
        return loose, blocks * 512 / 1e6


def configure(bench: Bench, storage: Committed, with_chown: bool) -> None:
    bench.write({"nothing": ""}, storage={
        "tasks": {"path": str(bench.tasks)}, "logs": {"path": str(bench.logs)},
        "sync": {"path": str(storage.folder), "commit": True,
                 "chown": with_chown}})


def commit(bench: Bench, runs: int) -> None:
    if os.geteuid():
        return row("commit", "", "not measured", "needs root")
    alone = Committed(bench, "alone", bench.files)
    ours = Committed(bench, "ours", bench.files)
    turn = 0
    for with_chown in (False, True):
        configure(bench, ours, with_chown)
        for count in (0, 100):
            pairs = []
            for _ in range((runs or 5) + 1):
                turn += 1
                alone.change(count, turn)
                ours.change(count, turn)
                pairs.append((alone.by_git(), ours.by_mission()))
            pairs = pairs[1:]
            row(f"commit: {count} changed{', chown' * with_chown}",
                "1.5 to 2.5", f"{median(b / a for a, b in pairs):.2f}",
                f"{bench.files:,} files: ours "
                f"{median(b for _, b in pairs):.2f} s, git "
                f"{median(a for a, _ in pairs):.2f} s")
    return None


def nights(bench: Bench, _runs: int) -> None:
    """Ours and git alone in turn, on repositories of 1,000 files."""
    repositories = [Committed(bench, name, 1000) for name in ("git", "ours")]
    configure(bench, repositories[1], False)
    times = []
    for night in range(bench.nights):
        for repository in repositories:
            repository.change(CHANGED, night)
        times.append((repositories[0].by_git(), repositories[1].by_mission()))
        bench.forget_logs()
    for repository, mine, name in zip(repositories, zip(*times),
                                      ("git alone", "mission")):
        loose, size = repository.size()
        row(f"nights: {name}, {bench.nights} of {CHANGED}", "",
            f"{loose:,} loose", f"{size:.0f} MB; first three "
            f"{median(mine[:3]):.2f} s, last three {median(mine[-3:]):.2f} s, "
            f"longest {max(mine):.2f} s")


FIGURES = {figure.__name__: figure
           for figure in (start, tasks, lines, memory, endless, chown, commit,
                          nights)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=0, metavar="N",
                        help="pairs per figure (default: its own number)")
    parser.add_argument("--only", choices=FIGURES, metavar="NAME",
                        help=", ".join(FIGURES))
    parser.add_argument("--python", default=PYTHON)
    parser.add_argument("--mission", type=Path, default=ROOT / "mission.py",
                        help="another mission.py than the one at the top")
    parser.add_argument("--dir", help="where 2 GB are free (default: /tmp)")
    parser.add_argument("--quick", action="store_true",
                        help=f"{QUICK_FILES:,} files, {QUICK_NIGHTS} nights")
    args = parser.parse_args()
    version = subprocess.run([args.python, "-V"], stdout=subprocess.PIPE)
    print(f"{version.stdout.decode().strip()}, {os.cpu_count()} processors, "
          f"load {os.getloadavg()[0]:.1f}")
    row("figure", "wanted", "measured")
    for name, figure in FIGURES.items():
        if args.only in (None, name):
            with tempfile.TemporaryDirectory(dir=args.dir) as folder:
                os.chmod(folder, 0o755)
                bench = Bench(Path(folder), args.mission.resolve(),
                              args.python)
                if args.quick:
                    bench.files, bench.nights = QUICK_FILES, QUICK_NIGHTS
                figure(bench, args.runs)


if __name__ == "__main__":
    sys.exit(main())
