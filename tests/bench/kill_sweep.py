"""Kill a run at every one of its system calls; does the next make it good?

    python3 tests/bench/kill_sweep.py [--step N] [--folder DIR]

For each call of a run, from the reading of the configuration on: kill -9
there, run again (which must do its tasks and commit, with at most the one
warning that a run was lost), run once more (which must be silent), and let
git check the repository. Prints the counts, and each place that failed.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import support  # noqa: E402
import sweep  # noqa: E402


def git(folder: Path, *args: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", "-C", str(folder), *args],
                          stdin=subprocess.DEVNULL, timeout=60,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def backup(folder: Path) -> support.Scratch:
    """Two tasks that each add a line to a repository."""
    scratch = support.Scratch(folder)
    sync = scratch.storage("sync", commit=True)
    git(sync, "init", "-q")
    for slug in ("one", "two"):
        scratch.task(slug, f'echo {slug} >> "$SYNC_DIR/count"')
    assert scratch.mission("run", "--headless").code == 0
    return scratch


def faults(scratch: support.Scratch) -> list[str]:
    """What is wrong after a kill: the next run, and the one after it."""
    sync = scratch.folder / "sync"
    count = (sync / "count").read_text().count("\n")
    again = scratch.mission("run", "--headless", write=False)
    last, found = scratch.history()[-1], []
    if again.code not in (0, 1) or last["errors"] \
            or last["warnings"] != again.code:
        found.append(f"next run: exit {again.code}: {again.err.strip()}")
    if (sync / "count").read_text().count("\n") != count + 2:
        found.append("next run: a task did not run")
    third = scratch.mission("run", "--headless", write=False)
    if third.code or third.err:
        found.append(f"third run: exit {third.code}: {third.err.strip()}")
    if git(sync, "status", "--porcelain").stdout:
        found.append("not all is committed")
    fsck = git(sync, "fsck", "--full", "--strict")
    if fsck.returncode or b"error" in fsck.stderr:
        found.append("git fsck: " + fsck.stderr.decode().strip())
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--step", type=int, default=1,
                        help="strike only every N-th call")
    parser.add_argument("--folder", help="where to work (default: a new one)")
    args = parser.parse_args()
    began, counts, names = time.monotonic(), Counter(), Counter()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        scratch = backup(Path(folder))
        command = scratch.command("run", "--headless")
        points = sweep.choose(sweep.calls(command, env=scratch.env),
                              after=scratch.path.name)[::args.step]
        for name, n in points:
            done = sweep.strike(command, name, n, env=scratch.env)
            killed = done.returncode == -signal.SIGKILL
            counts["killed" if killed else "not reached"] += 1
            lost = len(scratch.history())
            wrong = faults(scratch)
            counts["lost run reported"] += scratch.history()[lost]["result"] \
                == "lost"
            counts["made good" if not wrong else "NOT MADE GOOD"] += 1
            names[name] += 1
            for line in wrong:
                print(f"{name} number {n}: {line}", flush=True)
    print(f"{len(points)} kill points in {time.monotonic() - began:.0f} s")
    for word, count in counts.items():
        print(f"{count:6}  {word}")
    print("struck: " + ", ".join(f"{count} {name}" for name, count
                                 in names.most_common()))
    return 1 if counts["NOT MADE GOOD"] else 0


if __name__ == "__main__":
    sys.exit(main())
