"""make test: the tests in two halves that run side by side, for most of
their time is waiting; and one line that adds both up.

    halves.py PYTHON [OPTION]...    what follows goes to pytest

Most tests start real daemons and wait for them, beside another half that
does the same. So a test that failed is run once more, alone: what fails then
has failed, and what passes is told of and counts as passed.

Which file goes where is decided by its weight: seconds that were measured
once, in this table, or its length. A file is never parted.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent
SECONDS = {     # on a machine with two cores, both busy
    "test_koid_faults.py": 274, "test_mission_faults.py": 165,
    "test_koid_users.py": 150, "test_koitab_arguments.py": 116,
    "test_dashboard_whole.py": 100, "test_mission_delivery.py": 89,
    "test_koitab_link.py": 60,
    "test_mission_builtins.py": 72, "test_koid_link.py": 66,
    "test_dashboard_page.py": 62, "test_koid_runs.py": 57,
    "test_dashboard_kills.py": 52, "test_dashboard_http.py": 40,
    "test_koid_beside_cron.py": 38, "test_mission_run.py": 33,
    "test_mission_processes.py": 32, "test_mission_chown.py": 29,
    "test_mission_git.py": 25, "test_mission_files.py": 19,
    "test_koitab_schedule.py": 14, "test_koitab_crontab.py": 11}
LINES_A_SECOND = 150    # of a file that is not in the table
MOST_AGAIN = 5          # more than that is no bad luck
COUNTED = re.compile(r"(\d+) (passed|failed|skipped|errors?)\b")


def weight(file: Path) -> float:
    return SECONDS.get(file.name) or len(
        file.read_text().splitlines()) / LINES_A_SECOND


def halves(files: list[Path]) -> list[list[Path]]:
    """The heaviest first, each to the half that has less so far."""
    found, loads = [[], []], [0.0, 0.0]
    for file in sorted(files, key=weight, reverse=True):
        less = loads.index(min(loads))
        found[less].append(file)
        loads[less] += weight(file)
    return found


def counted(text: str) -> dict[str, int]:
    """What pytest's last line says."""
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
    last = (text.strip().splitlines() or [""])[-1]
    for number, what in COUNTED.findall(last):
        what = "failed" if what.startswith("error") else what
        counts[what] += int(number)
    return counts


def start(python: str, options: list[str], cache: str, files: list[Path],
          **how) -> subprocess.Popen:
    return subprocess.Popen(
        [python, "-B", "-m", "pytest", "-q", "-c", str(TESTS / "pytest.ini"),
         "-o", f"cache_dir={cache}", *options, *map(str, files)],
        stderr=subprocess.STDOUT, encoding="utf-8", errors="replace", **how)


def shown(process: subprocess.Popen) -> str:
    """What it says, passed on line by line."""
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    process.wait()
    return "".join(lines)


def again(python: str, options: list[str], cache: str, files: list[Path],
          status: int, text: str) -> tuple[int, dict[str, int]]:
    """The status of a half and its counts; its failed tests once more."""
    counts = counted(text)
    if status != 1 or counts["failed"] > MOST_AGAIN:
        return status, counts
    print(f"\n--- {counts['failed']} failed beside the other half; alone:")
    process = start(python, [*options, "--lf", "--lfnf=none"], cache, files,
                    stdout=subprocess.PIPE)
    alone = counted(shown(process))
    return process.returncode, {
        "passed": counts["passed"] + alone["passed"],
        "failed": alone["failed"], "skipped": counts["skipped"]}


def run(python: str, options: list[str]) -> int:
    """Both halves, the first one seen as it goes; the worse status."""
    files = halves(sorted(TESTS.glob("test_*.py"))
                   + sorted(TESTS.glob("system/test_*.py")))
    with tempfile.TemporaryDirectory(prefix="halves-") as folder, \
            open(f"{folder}/said", "w+", errors="replace") as also:
        caches = [f"{folder}/{number}" for number in range(2)]
        other = start(python, options, caches[1], files[1], stdout=also)
        this = start(python, options, caches[0], files[0],
                     stdout=subprocess.PIPE)
        texts = [shown(this)]
        other.wait()
        also.seek(0)
        texts.append(also.read())
        print(texts[1], end="", flush=True)
        found = [again(python, options, cache, half, process.returncode, text)
                 for cache, half, process, text in zip(
                     caches, files, (this, other), texts)]
    total = {what: sum(counts[what] for _, counts in found)
             for what in ("passed", "failed", "skipped")}
    print(", ".join(f"{number} {what}" for what, number in total.items()))
    # 5 says that no test was collected: in neither half is that well.
    return max((status for status, _ in found), key=abs)


if __name__ == "__main__":
    os.chdir(TESTS.parent)
    sys.exit(run(sys.argv[1], sys.argv[2:]))
