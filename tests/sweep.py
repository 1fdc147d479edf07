"""Kill a program at its n-th system call, or let that call fail.

A run under strace lists the calls that the program makes, in order; in each
further run one of them is the target. `when=N` of strace counts per name and
per process, so a point is a pair (name, n). Only the program itself is
traced, not its children: they survive a killed runner, as without strace.
"""

from __future__ import annotations

import re
import signal
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

# Where a crash does most harm: these are never left out of a short sweep.
TELLING = ("rename", "renameat", "renameat2", "fsync", "fdatasync", "unlink",
           "unlinkat", "flock", "kill", "clone", "clone3", "vfork", "fork",
           "mkdir", "ftruncate", "sync", "link", "symlink")
CALL = re.compile(r"^(\w+)\(")
KILL = f"signal={signal.SIGKILL.name}"


def calls(command: list[str], **options) -> list[tuple[str, str]]:
    """(name, the whole line) of every system call of one run, in order."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace"
        subprocess.run(["strace", "-qq", "-s", "256", "-o", str(file),
                        *command], stdin=subprocess.DEVNULL,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                       check=True, timeout=120, **options)
        lines = file.read_text(errors="replace").splitlines()
    return [(found[1], line) for line in lines
            for found in [CALL.match(line)] if found]


def choose(made: list[tuple[str, str]], after: str = "", but: str = "",
           syscalls: tuple[str, ...] | None = None, most: int | None = None,
           telling: tuple[str, ...] = TELLING) -> list[tuple[str, int]]:
    """The (name, n) to strike: every call of `syscalls` (None: of any name)
    made after the first line that contains `after`, but no line that matches
    `but`; `most` of them, spread evenly, those of `telling` before the
    rest."""
    counted, started, found = Counter(), not after, []
    for name, line in made:
        counted[name] += 1
        started = started or after in line
        if started and (syscalls is None or name in syscalls) \
                and not (but and re.search(but, line)):
            found.append((name, counted[name]))
    if most is None or len(found) <= most:
        return found
    first = [point for point in found if point[0] in telling]
    rest = [point for point in found if point[0] not in telling]
    chosen = set(spread(first, most))
    chosen |= set(spread(rest, most - len(chosen)))
    return [point for point in found if point in chosen]


def spread(values: list, most: int) -> list:
    """At most that many of the values, evenly, the first and the last too."""
    if len(values) <= most:
        return values
    step = (len(values) - 1) / max(most - 1, 1)
    return [values[round(i * step)] for i in range(most)]


def strike(command: list[str], name: str, n: int, blow: str = KILL,
           timeout: float = 60, **options) -> subprocess.CompletedProcess:
    """Run the command; its n-th call of that name is hit by `blow`, which
    is `signal=SIGKILL` or `error=EIO` or the like."""
    strace = ["strace", "-qq", "-o", "/dev/null", "-e", f"trace={name}",
              "-e", f"inject={name}:{blow}:when={n}"]
    options.setdefault("stdout", subprocess.PIPE)
    options.setdefault("stderr", subprocess.PIPE)
    return subprocess.run(strace + command, stdin=subprocess.DEVNULL,
                          timeout=timeout, **options)


def sweep(command, syscalls, points, check, blow=KILL, after="", but="",
          **options):
    """Strike `command` at `points` of its calls (None: at all of them) named
    in `syscalls` (None: any), and ask `check(name, n, done)` after each.
    The number of points struck."""
    struck = choose(calls(command, **options), after, but, syscalls, points)
    for name, n in struck:
        check(name, n, strike(command, name, n, blow, **options))
    return len(struck)
