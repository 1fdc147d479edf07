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
LOOK = 0.02                     # s between two looks at a process's memory


class Bench:
    """A configuration in a folder, and the commands to be compared."""

    def __init__(self, folder: Path, script: Path, python: str):
        self.folder, self.script, self.python = folder, script, python
        self.tasks, self.logs = folder / "tasks", folder / "logs"
        self.out, self.config = folder / "out", folder / "mission.config.json"
        self.bin = folder / "bin"
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
            "storage": {"tasks": {"path": str(self.tasks)},
                        "logs": {"path": str(self.logs)}}, **more}))
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


def in_turn(runs: int, *deeds) -> list[list[float]]:
    """A B A B ...: the times of each deed. The first turn warms the disk."""
    turns = [[deed() for deed in deeds] for _ in range(runs + 1)][1:]
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


FIGURES = {figure.__name__: figure
           for figure in (start, tasks, lines, memory, endless)}


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
    args = parser.parse_args()
    version = subprocess.run([args.python, "-V"], stdout=subprocess.PIPE)
    print(f"{version.stdout.decode().strip()}, {os.cpu_count()} processors, "
          f"load {os.getloadavg()[0]:.1f}")
    row("figure", "wanted", "measured")
    for name, figure in FIGURES.items():
        if args.only in (None, name):
            with tempfile.TemporaryDirectory(dir=args.dir) as folder:
                os.chmod(folder, 0o755)
                figure(Bench(Path(folder), args.mission.resolve(),
                             args.python), args.runs)


if __name__ == "__main__":
    sys.exit(main())
